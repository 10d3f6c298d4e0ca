-- Whether this transaction has written anything, and how many rows of tables.
select pg_current_xact_id_if_assigned() is not null as written,
       (select coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::int8 from pg_stat_xact_user_tables) as rows
