-- Who this is: enough to tell two names for one server apart from two servers, and whether the extension is there.
select current_setting('server_version') as server_version,
       pg_is_in_recovery() as in_recovery,
       (extract(epoch from pg_postmaster_start_time()) * 1000000)::int8 as started_us,
       (select oid::int8 from pg_database where datname = current_database()) as database_oid,
       (select extversion from pg_extension where extname = 'stillebot') as extension,
       pg_has_role('pg_monitor', 'usage') as monitors
