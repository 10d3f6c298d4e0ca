-- Which of these privileges the role $1 has. $2: what kind of thing, $3: its schema, $4: its name, $5: of a function, the
-- types of its arguments, $6: the privilege. Null: there is no such thing, or, but for a role as the thing, no such role. Names are looked up in the catalog, for to_regprocedure()
-- and its like are errors to who may not use the schema.
select case g.kind
           when 'role' then (select coalesce(pg_has_role(r.oid, o.oid, coalesce(nullif(g.privilege, ''), 'usage')), false) from pg_roles o where o.rolname = g.name)
           when 'schema' then (select has_schema_privilege(r.oid, n.oid, g.privilege) from pg_namespace n where n.nspname = g.name)
           when 'table' then (select has_table_privilege(r.oid, c.oid, g.privilege)
                                from pg_class c
                                join pg_namespace n on n.oid = c.relnamespace
                               where n.nspname = g.schema
                                 and c.relname = g.name)
           when 'function' then (select has_function_privilege(r.oid, p.oid, g.privilege)
                                   from pg_proc p
                                   join pg_namespace n on n.oid = p.pronamespace
                                  where n.nspname = g.schema
                                    and p.proname = g.name
                                    and oidvectortypes(p.proargtypes) = g.arguments)
       end as granted
  from unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[]) with ordinality
       as g (kind, schema, name, arguments, privilege, number)
  left join pg_roles r on r.rolname = $1
 order by g.number
