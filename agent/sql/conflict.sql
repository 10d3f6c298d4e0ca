-- One conflict, whole.
select to_jsonb(c)::text as conflict from multihome.conflicts c where c.id = $1
