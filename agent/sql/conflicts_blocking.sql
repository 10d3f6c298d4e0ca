-- The open conflicts that hold up replication.
select c.id, c.subscription from multihome.conflicts c where c.status = 'open' and c.blocking order by c.id
