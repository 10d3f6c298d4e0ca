-- Ends an earlier session of this agent whose connection is lost but which the server may still be working for.
select pg_terminate_backend(pid) as ended
  from pg_stat_activity
 where pid = $1
   and (extract(epoch from backend_start) * 1000000)::int8 = $2
   and pid <> pg_backend_pid()
