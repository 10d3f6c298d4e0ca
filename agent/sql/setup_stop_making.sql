-- On the publisher: ends whoever is still making that slot for a subscription that has been given up. A finished one stays.
select pg_terminate_backend(w.pid)
  from pg_stat_activity w
 where w.pid <> pg_backend_pid()
   and w.state = 'active'
   and (position(format('CREATE_REPLICATION_SLOT "%s"', $1::text) in w.query) > 0
        or position(format('pg_create_logical_replication_slot(%L', $1::text) in w.query) > 0)
