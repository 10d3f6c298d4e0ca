-- subscription: its slot and its apply worker, as far as a change of its certificate is concerned. When a worker is connected,
-- see watch_subscriptions.sql.
select s.subenabled as enabled,
       s.subslotname::text as slot,
       w.pid,
       w.received_lsn is not null or coalesce(a.wait_event = 'LogicalApplyMain', false) as connected,
       coalesce(t.apply_error_count, 0) as apply_errors
  from pg_subscription s
  left join pg_stat_subscription w on w.subid = s.oid and w.relid is null and w.leader_pid is null
  left join pg_stat_activity a on a.pid = w.pid
  left join pg_stat_subscription_stats t on t.subid = s.oid
 where s.subdbid = (select oid from pg_database where datname = current_database())
   and s.subname = $1
