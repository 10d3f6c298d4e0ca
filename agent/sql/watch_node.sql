-- This node as the watchdog wants it: where its WAL stands and is kept, and what its extension can tell. Asked from the
-- catalog first, because a question that this version cannot answer would be an error in the server's log at every look.
select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end as written,
       pg_size_bytes(current_setting('wal_segment_size')) as segment,
       extract(epoch from current_setting('wal_retrieve_retry_interval')::interval)::float8 as retry,
       exists (select
                 from pg_proc p
                 join pg_namespace n on n.oid = p.pronamespace
                where n.nspname = 'multihome'
                  and p.proname = 'free_space'
                  and has_schema_privilege(n.oid, 'usage')
                  and has_function_privilege(p.oid, 'execute')) as measures,
       exists (select
                 from pg_class c
                 join pg_namespace n on n.oid = c.relnamespace
                where n.nspname = 'multihome'
                  and c.relname = 'conflicts'
                  and has_schema_privilege(n.oid, 'usage')
                  and has_table_privilege(c.oid, 'select')) as records,
       exists (select
                 from pg_proc p
                 join pg_namespace n on n.oid = p.pronamespace
                where n.nspname = 'public'
                  and p.proname = 'stillebot_status'
                  and 'warnings' = any (p.proargnames)) as warns
