-- The subscriptions of this database, with their main apply worker.
select s.subname::text as name,
       s.subenabled as enabled,
       s.subslotname::text as slot,
       s.substream = 'p' as parallel,
       w.pid is not null as working,
       extract(epoch from clock_timestamp() - nullif(w.last_msg_receipt_time, '-infinity'))::float8 as last_message_age,
       coalesce(e.apply_error_count, 0) as apply_errors,
       coalesce(e.sync_error_count, 0) as sync_errors,
       (select count(*) from pg_subscription_rel r where r.srsubid = s.oid and r.srsubstate not in ('r', 's')) as copying
  from pg_subscription s
  left join pg_stat_subscription w on w.subid = s.oid and w.relid is null and w.leader_pid is null
  left join pg_stat_subscription_stats e on e.subid = s.oid
 where s.subdbid = (select oid from pg_database where datname = current_database())
 order by s.subname
