-- What the session may do here, and a name for a set of nodes that nobody else has.
select (select rolsuper from pg_roles where rolname = current_user) as superuser,
       gen_random_uuid()::text as fresh
