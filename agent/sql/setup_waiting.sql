-- On the publisher: which transactions the making of a slot waits for. It waits for all that were under way when it began.
select b.pid,
       coalesce(a.usename::text, 'a prepared transaction') as usename,
       coalesce(a.application_name, '') as application_name,
       coalesce(to_char(a.xact_start, 'YYYY-MM-DD HH24:MI:SS TZ'), 'unknown') as since
  from pg_stat_activity w
 cross join lateral unnest(pg_blocking_pids(w.pid)) as b (pid)
  left join pg_stat_activity a on a.pid = b.pid
 where w.backend_type = 'walsender'
   and position(format('CREATE_REPLICATION_SLOT "%s"', $1::text) in w.query) > 0
