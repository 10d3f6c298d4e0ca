-- A slot of this database: whether somebody reads it, since when (microseconds, by this server's clock), and whether that one has
-- applied everything up to a position. $2 may be null.
select s.active_pid as pid,
       (extract(epoch from w.backend_start) * 1000000)::int8 as started_us,
       coalesce(w.replay_lsn >= $2::pg_lsn, false) as heard
  from pg_replication_slots s
  left join pg_stat_replication w on w.pid = s.active_pid
 where s.slot_name = $1
   and s.database = current_database()
