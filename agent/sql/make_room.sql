-- conflict, columns to set in the rows in its way; returns these rows as they were. No row: it may be closed by now, as replication has
-- got past it.
select r.tuple::text as tuple
  from multihome.conflicts c
 cross join lateral multihome.make_room(c.id, $2::text::jsonb) as r (tuple)
 where c.id = $1
   and multihome.is_open(c.id)
