-- conflict, what to keep; says what was done. No row: the conflict is closed by now, replication has got past it, perhaps.
select public.stillebot_resolve(c.id, $2) as done
  from multihome.conflicts c
 where c.id = $1
   and multihome.is_open(c.id)
