-- The conflicts for a list: the open ones, or all. Without the rows in them, which may be big and many.
select (to_jsonb(c) - '{remote_tuple,local_conflicts,context}'::text[])::text as conflict
  from multihome.conflicts c
 where c.status = 'open' or $1
 order by c.first_seen, c.id
