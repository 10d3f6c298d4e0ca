-- The slots of this server, what they keep, and who reads them.
select jsonb_build_object(
           'name', s.slot_name,
           'here', s.slot_type = 'logical' and s.database = current_database(),
           'active', s.active,
           'unmade', s.slot_type = 'logical' and s.confirmed_flush_lsn is null,
           'unread', s.confirmed_flush_lsn is not null and s.wal_status is distinct from 'lost' and not s.conflicting
                     and coalesce(t.total_txns, 0) = 0,
           'wal_status', s.wal_status,
           'kept', greatest(pg_wal_lsn_diff(p.lsn, s.restart_lsn), 0)::int8,
           'reader', host(r.client_addr)
       )::text as survey
  from pg_replication_slots s
 cross join (select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end as lsn) p
  left join pg_stat_replication r on r.pid = s.active_pid
  left join pg_stat_replication_slots t on t.slot_name = s.slot_name
 where not s.temporary
 order by s.slot_name
