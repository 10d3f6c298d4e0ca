-- The logical slots of this database and how far their subscribers are.
select s.slot_name::text as slot,
       w.pid is not null as connected,
       w.state,
       w.application_name,
       greatest(pg_wal_lsn_diff(p.lsn, coalesce(w.replay_lsn, s.confirmed_flush_lsn)), 0)::int8 as bytes_behind,
       extract(epoch from w.replay_lag)::float8 as seconds_behind
  from pg_replication_slots s
 cross join (select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end as lsn) p
  left join pg_stat_replication w on w.pid = s.active_pid
 where s.slot_type = 'logical'
   and s.database = current_database()
   and not s.temporary
 order by s.slot_name
