-- Whether this role may act as $1, null if there is no such role; and whether it may say that a change is whole, null if the
-- extension here is too old for that.
select (select pg_has_role(r.oid, 'SET') from pg_roles r where r.rolname = $1::text) as may_act,
       (select bool_or(has_function_privilege(p.oid, 'execute'))
          from pg_proc p join pg_namespace n on n.oid = p.pronamespace
         where n.nspname = 'multihome' and p.proname = 'conclude_schema_changes') as may_conclude
