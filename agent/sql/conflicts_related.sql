-- schema, table, array of keys: the open conflicts of that table in which a row with one of the keys takes part.
select to_jsonb(c)::text as conflict
  from multihome.conflicts c
 where c.status = 'open'
   and c.schemaname = $1
   and c.relname = $2
   and exists (select from jsonb_array_elements($3::text::jsonb) k (key)
                where c.replica_identity = k.key
                   or c.local_conflicts @> jsonb_build_array(jsonb_build_object('key', k.key)))
 order by c.id
 limit 100
