-- Who holds the lock of lock.sql.
select a.pid,
       coalesce(a.usename::text, '?') as usename,
       coalesce(a.application_name, '') as application_name,
       coalesce(host(a.client_addr), 'local') as client,
       (extract(epoch from a.backend_start) * 1000000)::int8 as started_us,
       to_char(a.backend_start, 'YYYY-MM-DD HH24:MI:SS TZ') as since
  from pg_locks l
  join pg_stat_activity a on a.pid = l.pid
 where l.locktype = 'advisory'
   and l.database = (select oid from pg_database where datname = current_database())
   and l.classid = 1937010028
   and l.objid = 1
   and l.objsubid = 2
   and l.granted
