-- conflict, array of keys: these rows of its table as they are here now.
select v.key::text as key, v.tuple::text as tuple from multihome.versions($1, $2::text::jsonb) v
