-- The roles of these names.
select jsonb_build_object(
           'name', r.rolname,
           'login', r.rolcanlogin,
           'replication', r.rolreplication,
           'superuser', r.rolsuper,
           'past_row_security', r.rolsuper or r.rolbypassrls,
           'reads_all', pg_has_role(r.oid, 'pg_read_all_data', 'usage'),
           'groups', (select coalesce(jsonb_agg(g.rolname order by g.rolname), '[]')
                        from pg_roles g
                       where pg_has_role(r.oid, g.oid, 'member'))
       )::text as survey
  from pg_roles r
 where r.rolname = any ($1)
 order by r.rolname
