-- Up to where this server's WAL is safe, which is what can have been sent.
select pg_current_wal_flush_lsn() as lsn
