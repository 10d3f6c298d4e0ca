-- Makes a slot for a subscription that is not there yet. Its name is a literal, so that whoever looks sees which slot is made.
select pg_create_logical_replication_slot($1, 'pgoutput')
