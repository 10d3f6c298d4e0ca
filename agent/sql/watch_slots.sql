-- The slots of this server: how far each reader is, and what WAL each keeps. `unread`: for how long nobody has read it;
-- servers before 17 do not know.
select s.slot_name::text as slot,
       coalesce(s.slot_type = 'logical' and s.database = current_database(), false) as here,
       s.active_pid as sender,
       s.confirmed_flush_lsn as confirmed,
       w.replay_lsn as replayed,
       s.restart_lsn as restart,
       greatest(pg_wal_lsn_diff(p.lsn, s.restart_lsn), 0)::int8 as kept,
       s.wal_status,
       s.safe_wal_size as spare,
       extract(epoch from clock_timestamp() - (to_jsonb(s)->>'inactive_since')::timestamptz)::float8 as unread
  from pg_replication_slots s
 cross join (select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end as lsn) p
  left join pg_stat_replication w on w.pid = s.active_pid
 where not s.temporary
 order by s.slot_name
