-- The conflicts of this node that nobody has resolved, those that stop apply first.
select c.id,
       c.subscription,
       c.conflict_type,
       nullif(concat_ws('.', c.schemaname, c.relname), '') as relation,
       c.message,
       c.resolution,
       c.blocking,
       extract(epoch from clock_timestamp() - c.first_seen)::float8 as age
  from multihome.conflicts c
 where c.status = 'open'
 order by c.blocking desc, c.id
 limit 100
