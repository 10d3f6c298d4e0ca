-- Which server and database this is, and what the session may do there.
select (select c.system_identifier::text from pg_control_system() c) as system_identifier,
       (extract(epoch from pg_postmaster_start_time()) * 1000000)::int8 as started_us,
       (select oid::int8 from pg_database where datname = current_database()) as database_oid,
       (extract(epoch from clock_timestamp()) * 1000000)::int8 as now_us,
       (select rolsuper from pg_roles where rolname = current_user) as superuser,
       gen_random_uuid()::text as fresh
