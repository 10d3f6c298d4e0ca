-- The tables that publication $1 has, each with the subscriptions of this database that it is part of; the second list has those
-- that have it in full: also when core has not noticed yet, which it does with the next message of the publisher.
select format('%I.%I', t.schemaname, t.tablename) as name,
       coalesce(array_agg(s.subname::text) filter (where s.oid is not null), '{}') as subscriptions,
       coalesce(array_agg(s.subname::text) filter (where s.oid is not null and r.srsubstate in ('r', 's')), '{}') as ready
  from (select distinct schemaname, tablename from pg_publication_tables where pubname = $1) t
  join pg_namespace n on n.nspname = t.schemaname
  join pg_class c on c.relnamespace = n.oid and c.relname = t.tablename
  left join pg_subscription_rel r on r.srrelid = c.oid
  left join pg_subscription s on s.oid = r.srsubid and s.subdbid = (select oid from pg_database where datname = current_database())
 group by t.schemaname, t.tablename
