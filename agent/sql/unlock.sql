-- Gives back the lock of lock.sql, however often this session took it.
select pg_advisory_unlock_all()
