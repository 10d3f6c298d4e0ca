-- The traces of schema changes: those committed here, those prepared here and by whom, and whether any could be prepared. See
-- change_tells.sql.
select jsonb_build_object(
           'journal', (select coalesce(jsonb_agg(to_jsonb(c) - '{node,by_whom,at}'::text[]), '[]')
                         from multihome.schema_changes() as c),
           'prepared', (select coalesce(jsonb_agg(jsonb_build_object('id', split_part(p.gid, '_', 3), 'gid', p.gid, 'owner', p.owner)), '[]')
                          from pg_prepared_xacts p
                         where p.database = current_database() and starts_with(p.gid, 'stillebot_schema_')),
           'two_phase', current_setting('max_prepared_transactions')::int4 > 0)::text as traces
