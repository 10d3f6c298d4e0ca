-- The subscriptions of this database: how far their apply workers are, and whether they are at it. A worker sets the time
-- of its last message when it starts (and has -infinity before), so that is no sign of a connection; waiting for a
-- message is.
select s.subname::text as name,
       s.subenabled as enabled,
       s.subslotname::text as slot,
       w.pid as worker,
       w.received_lsn as received,
       w.latest_end_lsn as handled,
       (extract(epoch from nullif(w.last_msg_receipt_time, '-infinity')) * 1000000)::int8 as heard_us,
       w.received_lsn is not null or coalesce(a.wait_event = 'LogicalApplyMain', false) as connected,
       coalesce(a.state = 'active', false) as busy,
       case when a.state = 'active' then extract(epoch from clock_timestamp() - a.xact_start)::float8 end as applying,
       concat_ws(' ', a.wait_event_type, a.wait_event) as waiting_for,
       coalesce(e.apply_error_count, 0) as apply_errors,
       coalesce(e.sync_error_count, 0) as sync_errors,
       (select count(*) from pg_subscription_rel r where r.srsubid = s.oid and r.srsubstate not in ('r', 's')) as copying
  from pg_subscription s
  left join pg_stat_subscription w on w.subid = s.oid and w.relid is null and w.leader_pid is null
  left join pg_stat_activity a on a.pid = w.pid
  left join pg_stat_subscription_stats e on e.subid = s.oid
 where s.subdbid = (select oid from pg_database where datname = current_database())
 order by s.subname
