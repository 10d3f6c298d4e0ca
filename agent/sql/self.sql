-- This very session, so that a later one can make sure that it has ended.
select pid, (extract(epoch from backend_start) * 1000000)::int8 as started_us
  from pg_stat_activity
 where pid = pg_backend_pid()
