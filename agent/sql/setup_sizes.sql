-- Tables and about how many rows and bytes they have.
select c.oid::regclass::text as relation,
       c.reltuples::int8 as tuples,
       pg_table_size(c.oid) as bytes
  from pg_class c
  join pg_namespace n on n.oid = c.relnamespace
 where c.relkind = 'r'
   and c.relpersistence = 'p'
   and n.nspname not in ('pg_catalog', 'information_schema')
