-- The traces of schema changes: those committed here, those prepared here and by whom, and whether any could be prepared. And
-- whether this role may act as another one; null if there is no such role.
select (select coalesce(jsonb_agg(jsonb_build_object('id', c.id, 'file', c.file, 'sha256', c.sha256, 'nodes', c.nodes)), '[]')::text
          from multihome.schema_changes() as c) as journal,
       (select coalesce(jsonb_object_agg(substr(p.gid, length('stillebot_schema_') + 1), p.owner), '{}')::text
          from pg_prepared_xacts p
         where p.database = current_database() and starts_with(p.gid, 'stillebot_schema_')) as prepared,
       current_setting('max_prepared_transactions')::int4 > 0 as two_phase,
       (select pg_has_role(r.oid, 'SET') from pg_roles r where r.rolname = $1::text) as may_act
