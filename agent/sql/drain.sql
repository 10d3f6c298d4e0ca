-- On the source: slot of the target's subscription, position the target shall reach. Whether this database is (still) down,
-- and how far the walsender is: with what it has sent, and with what it knows to be applied.
select multihome.state()->>'state' = 'down' as down,
       coalesce(w.sent_lsn >= $2, false) as sent,
       coalesce(w.replay_lsn >= $2, false) as applied
  from (select) one
  left join pg_replication_slots s on s.slot_name = $1
  left join pg_stat_replication w on w.pid = s.active_pid
