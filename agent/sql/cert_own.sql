-- The certificate that this very session has connected with; none if it was not asked for one.
select client_serial::text as serial from pg_stat_ssl where pid = pg_backend_pid()
