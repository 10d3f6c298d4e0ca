-- schema, table, array of keys: the conflicts of that table in which a row with one of the keys takes part, and which are open
-- or have been answered without all nodes having been compared afterwards.
select to_jsonb(c)::text as conflict
  from multihome.conflicts c
 where (c.status = 'open' or c.status = 'resolved' and c.resolution like 'kept %')
   and c.schemaname = $1
   and c.relname = $2
   and exists (select from jsonb_array_elements($3::text::jsonb) k (key)
                where c.replica_identity = k.key
                   or c.remote_tuple @> k.key
                   or c.local_conflicts @> jsonb_build_array(jsonb_build_object('key', k.key)))
 order by c.status = 'open' desc, c.id desc
 limit 100
