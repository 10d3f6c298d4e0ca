-- Where this server's WAL stands.
select pg_current_wal_lsn() as lsn
