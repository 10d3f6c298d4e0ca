-- Who is connected to this database, but for this agent.
select coalesce(a.application_name, '') as application_name,
       coalesce(host(a.client_addr), 'local') as client,
       coalesce(a.usename::text, '?') as usename,
       coalesce(a.state, '?') as state,
       count(*) as sessions
  from pg_stat_activity a
 where a.datname = current_database()
   and a.backend_type = 'client backend'
   and a.application_name is distinct from 'stillebot-agent'
 group by 1, 2, 3, 4
 order by 1, 2, 3, 4
