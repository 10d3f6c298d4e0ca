-- conflict, columns to set in the rows in its way; returns these rows as they were.
select r.tuple::text as tuple from multihome.make_room($1, $2::text::jsonb) as r (tuple)
