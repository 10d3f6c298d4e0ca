-- slot: who serves its reader, and which certificate the reader has connected with; none if it was not asked for one.
select w.pid,
       w.state = 'streaming' as streaming,
       t.client_serial::text as serial,
       t.issuer_dn as issuer
  from pg_replication_slots s
  join pg_stat_replication w on w.pid = s.active_pid
  left join pg_stat_ssl t on t.pid = w.pid
 where s.slot_name = $1
