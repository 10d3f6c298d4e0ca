-- The workers of this database's subscriptions that wait for a lock, and who holds it: of several, one that does not wait
-- itself. Process id 0 is a prepared transaction.
select s.subname::text as subscription,
       w.pid as worker,
       l.locktype as lock,
       coalesce(l.relation, t.relation)::regclass::text as relation,
       coalesce(extract(epoch from clock_timestamp() - l.waitstart), 0)::float8 as waited,
       h.pid as holder,
       h.others,
       h.usename::text as usename,
       h.application_name,
       coalesce(host(h.client_addr), 'local') as client,
       h.backend_type,
       h.state,
       left(h.query, 200) as query
  from pg_stat_subscription w
  join pg_subscription s on s.oid = w.subid
  join pg_stat_activity a on a.pid = w.pid and a.wait_event_type = 'Lock'
  join pg_locks l on l.pid = w.pid and not l.granted
  left join lateral (select k.relation
                       from pg_locks k
                      where k.pid = w.pid and k.locktype = 'tuple' and k.granted
                      limit 1) t on true
 cross join lateral (select b.pid, count(*) over () - 1 as others,
                            c.usename, c.application_name, c.client_addr, c.backend_type, c.state, c.query
                       from unnest(pg_blocking_pids(w.pid)) b (pid)
                       left join pg_stat_activity c on c.pid = b.pid
                      order by c.wait_event_type is not distinct from 'Lock', b.pid
                      limit 1) h
 where s.subdbid = (select oid from pg_database where datname = current_database())
 order by waited desc
