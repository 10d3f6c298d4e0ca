-- What this transaction has written, and how many rows: of tables, and of each catalog. Temporary tables end with their session.
select pg_current_xact_id_if_assigned() is not null as written,
       current_setting('track_counts')::boolean as counted,
       (select coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::int8
          from pg_stat_xact_user_tables where schemaname !~ '^pg_temp_') as rows,
       (select coalesce(jsonb_object_agg(relname, n_tup_ins + n_tup_upd + n_tup_del), '{}')::text
          from pg_stat_xact_sys_tables
         where schemaname = 'pg_catalog' and n_tup_ins + n_tup_upd + n_tup_del > 0) as catalogs
