-- known conflicts: which of them there is still something to do about, and the first of all others, those that hold up replication
-- first. An answer of this role that says only what was kept here is one that was not followed through on the other nodes.
with todo as (
    select c.id, coalesce(c.blocking, false) as blocking from multihome.conflicts c where c.status = 'open'
    union all
    select c.id, false
      from multihome.conflicts c
     where c.status = 'resolved'
       and c.resolution like 'kept %'
       and c.resolved_by = session_user)
select t.id, t.blocking from todo t where t.id = any ($1::int8[])
union all
(select t.id, t.blocking from todo t where t.id <> all ($1::int8[]) order by not t.blocking, t.id limit 1)
