-- conflict, row: makes this node's row with the same key equal to it, on this node only.
select multihome.put($1, $2::text::jsonb)
