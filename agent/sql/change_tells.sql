-- Whether the extension here keeps a journal of schema changes, and may be asked by this role.
select coalesce(bool_or(has_schema_privilege(n.oid, 'usage') and has_function_privilege(p.oid, 'execute')), false) as tells
  from pg_proc p join pg_namespace n on n.oid = p.pronamespace
 where n.nspname = 'multihome' and p.proname = 'schema_changes'
