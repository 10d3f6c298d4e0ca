-- On the publisher: ends whoever is still making that slot for a subscription that has been given up.
select pg_terminate_backend(w.pid)
  from pg_stat_activity w
 where w.backend_type = 'walsender'
   and w.state = 'active'
   and position(format('CREATE_REPLICATION_SLOT "%s"', $1::text) in w.query) > 0
