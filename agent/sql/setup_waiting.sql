-- On the publisher: which transactions the making of a slot waits for. It waits for all that were under way when it began.
select case when p.gid is not null
            then format('the prepared transaction %L of %s, since %s', p.gid, p.owner,
                        to_char(p.prepared, 'YYYY-MM-DD HH24:MI:SS TZ'))
            else format('pid %s of %s (%s), in a transaction since %s', b.pid, coalesce(a.usename::text, '?'),
                        coalesce(a.application_name, ''), coalesce(to_char(a.xact_start, 'YYYY-MM-DD HH24:MI:SS TZ'), '?'))
       end as who
  from pg_stat_activity w
 cross join lateral unnest(pg_blocking_pids(w.pid)) as b (pid)
  left join pg_stat_activity a on a.pid = b.pid
  -- Prepared transactions have no process; which of them it is, the lock says that is waited for.
  left join lateral (
      select x.gid, x.owner, x.prepared
        from pg_locks l
        join pg_prepared_xacts x on x.transaction = l.transactionid
       where b.pid = 0 and l.pid = w.pid and l.locktype = 'transactionid' and not l.granted
  ) p on true
 where w.pid <> pg_backend_pid()
   and (position(format('CREATE_REPLICATION_SLOT "%s"', $1::text) in w.query) > 0
        or position(format('pg_create_logical_replication_slot(%L', $1::text) in w.query) > 0)
