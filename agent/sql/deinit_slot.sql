-- Drops a slot of this database that nobody reads; whether it is gone.
select coalesce(bool_and(s.active_pid is null), true) as gone,
       count(case when s.active_pid is null then pg_drop_replication_slot(s.slot_name)::text end) as dropped
  from pg_replication_slots s
 where s.slot_name = $1 and s.database = current_database()
