-- Server, database and extension, as set-up wants them; what of the rest this role may ask; how many of the places that
-- replication takes are taken by others. $1: the slots, $2: the subscriptions that the configuration knows.
with allowed as (
    select p.proname
      from pg_proc p
      join pg_namespace n on n.oid = p.pronamespace
     where n.nspname = 'multihome'
       and has_schema_privilege(n.oid, 'usage')
       and has_function_privilege(p.oid, 'execute')
)
select jsonb_build_object(
           'version', current_setting('server_version'),
           'version_num', current_setting('server_version_num')::int4,
           'in_recovery', pg_is_in_recovery(),
           'system_identifier', (select c.system_identifier::text from pg_control_system() c),
           'started_us', (extract(epoch from pg_postmaster_start_time()) * 1000000)::int8,
           'database_oid', d.oid::int8,
           'encoding', pg_encoding_to_char(d.encoding),
           'provider', case d.datlocprovider when 'c' then 'libc' when 'i' then 'icu' when 'b' then 'builtin' end,
           'collate', d.datcollate,
           'ctype', d.datctype,
           -- 16 has its own name for it.
           'locale', coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'),
           'collation_version', d.datcollversion,
           'collation_version_now', pg_database_collation_actual_version(d.oid),
           'extension', (select e.extversion from pg_extension e where e.extname = 'stillebot'),
           'extension_available', (select a.default_version from pg_available_extensions a where a.name = 'stillebot'),
           'may_see_rules', has_function_privilege('pg_catalog.pg_hba_file_rules()', 'execute'),
           'may_see_mappings', has_function_privilege('pg_catalog.pg_ident_file_mappings()', 'execute'),
           'may_see_space', exists (select from allowed where proname = 'free_space'),
           'may_see_connections', exists (select from allowed where proname = 'connections'),
           'knows_itself', exists (select from allowed where proname = 'identity'),
           'client', host(inet_client_addr()),
           'client_tls', (select t.ssl from pg_stat_ssl t where t.pid = pg_backend_pid()),
           'other_slots', (select count(*) from pg_replication_slots s where not s.slot_name = any ($1) and not s.temporary),
           'other_senders', (select count(*)
                               from pg_stat_replication r
                               left join pg_replication_slots s on s.active_pid = r.pid
                              where not coalesce(s.slot_name = any ($1), false)),
           'other_subscriptions', (select count(*)
                                     from pg_subscription s
                                    where s.subenabled
                                      and not (s.subdbid = d.oid and s.subname = any ($2))),
           'other_databases', (select count(distinct s.subdbid) from pg_subscription s where s.subenabled and s.subdbid <> d.oid)
       )::text as survey
  from pg_database d
 where d.datname = current_database()
