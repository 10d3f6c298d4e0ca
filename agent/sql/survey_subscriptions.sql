-- The subscriptions of this database, as they were made.
select jsonb_build_object(
           'name', s.subname,
           'enabled', s.subenabled,
           'origin', s.suborigin,
           'streaming', case s.substream when 'f' then 'off' when 't' then 'on' when 'p' then 'parallel' end,
           'disable_on_error', s.subdisableonerr,
           'slot', s.subslotname,
           'publications', s.subpublications,
           'copying', (select count(*) from pg_subscription_rel r where r.srsubid = s.oid and r.srsubstate not in ('r', 's'))
       )::text as survey
  from pg_subscription s
 where s.subdbid = (select oid from pg_database where datname = current_database())
 order by s.subname
