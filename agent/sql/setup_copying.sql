-- The tables of a subscription: how far the initial copy of each is.
select r.srrelid::regclass::text as relation,
       r.srsubstate in ('r', 's') as copied,
       coalesce(p.tuples_processed, 0) as tuples,
       coalesce(p.bytes_processed, 0) as bytes
  from pg_subscription s
  join pg_subscription_rel r on r.srsubid = s.oid
  left join pg_stat_progress_copy p on p.relid = r.srrelid and p.datid = s.subdbid and p.command = 'COPY FROM'
 where s.subname = $1
   and s.subdbid = (select oid from pg_database where datname = current_database())
 order by 1
