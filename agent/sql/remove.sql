-- conflict, key: deletes this row; this replicates.
select multihome.remove($1, $2::text::jsonb) as removed
