-- The numbers of all open conflicts, those that hold up replication first.
select c.id from multihome.conflicts c where c.status = 'open' order by not coalesce(c.blocking, false), c.id
