-- The subscriptions of this database, with all that they connect with: for a superuser.
select s.subname::text as subscription,
       s.subconninfo as conninfo,
       s.subenabled as enabled,
       s.subslotname::text as slot
  from pg_subscription s
 where s.subdbid = (select oid from pg_database where datname = current_database())
