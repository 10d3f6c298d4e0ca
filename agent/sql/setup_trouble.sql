-- What keeps a subscription from replicating, as its node has noted it, the latest first.
select t.message
  from (select c.message || coalesce(' (' || c.detail || ')', '') as message, c.last_seen
          from multihome.conflicts c
         where c.subscription = $1 and c.status = 'open' and c.blocking
        union all
        select f.message, f.last_seen
          from multihome.faults f
         where f.subscription = $1 and not f.healed) t
 order by t.last_seen desc
 limit 1
