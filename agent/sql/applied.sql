-- On the target: subscription, position it shall reach; and how far it has received, which moves as long as apply does. The apply
-- worker handles messages one after the other and sets latest_end_lsn when it handles a keepalive, so what was sent before that
-- keepalive is applied and committed. (The walsender's replay_lsn says the same, but only after the target's WAL writer has
-- flushed: 400 ms later under load.)
select w.latest_end_lsn >= $2 as applied, w.received_lsn as received
  from pg_stat_subscription w
  join pg_subscription s on s.oid = w.subid
 where s.subname = $1
   and s.subdbid = (select oid from pg_database where datname = current_database())
   and w.relid is null
   and w.leader_pid is null
   and w.pid is not null
