-- Held on each node by the one watching agent that speaks there: several may watch, and an alarm shall come once.
select pg_try_advisory_lock(1937010028, 2) as locked
