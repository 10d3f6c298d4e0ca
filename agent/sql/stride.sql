-- JSON array of name, increment, start, next
select multihome.stride($1::text::jsonb)
