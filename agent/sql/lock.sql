-- The one lock that every agent holds on every node while it changes anything; 1937010028 is 'stil' in ASCII.
select pg_try_advisory_lock(1937010028, 1) as locked
