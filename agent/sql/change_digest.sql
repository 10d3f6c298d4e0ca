-- What the catalogs say of everything that is not PostgreSQL's own: a statement that leaves this as it was has changed nothing
-- but rows of tables.
select coalesce(md5(string_agg(line, e'\n' order by line)), '') as digest
  from (select (to_jsonb(c) - '{relpages,reltuples,relallvisible,relallfrozen,relfrozenxid,relminmxid}'::text[])::text from pg_class c where c.oid >= 16384
        union all select a::text from pg_attribute a where a.attrelid >= 16384
        union all select d::text from pg_attrdef d
        union all select t::text from pg_type t where t.oid >= 16384
        union all select e::text from pg_enum e
        union all select r::text from pg_range r where r.rngtypid >= 16384
        union all select c::text from pg_constraint c where c.oid >= 16384
        union all select i::text from pg_index i where i.indexrelid >= 16384
        union all select i::text from pg_inherits i
        union all select p::text from pg_partitioned_table p
        union all select t::text from pg_trigger t
        union all select p::text from pg_policy p
        union all select r::text from pg_rewrite r where r.oid >= 16384
        union all select s::text from pg_sequence s
        union all select s::text from pg_statistic_ext s
        union all select p::text from pg_proc p where p.oid >= 16384
        union all select a::text from pg_aggregate a where a.aggfnoid >= 16384
        union all select o::text from pg_operator o where o.oid >= 16384
        union all select o::text from pg_opclass o where o.oid >= 16384
        union all select o::text from pg_opfamily o where o.oid >= 16384
        union all select a::text from pg_amop a where a.oid >= 16384
        union all select a::text from pg_amproc a where a.oid >= 16384
        union all select c::text from pg_cast c where c.oid >= 16384
        union all select c::text from pg_collation c where c.oid >= 16384
        union all select l::text from pg_language l where l.oid >= 16384
        union all select t::text from pg_ts_config t where t.oid >= 16384
        union all select t::text from pg_ts_config_map t where t.mapcfg >= 16384
        union all select t::text from pg_ts_dict t where t.oid >= 16384
        union all select n::text from pg_namespace n
        union all select e::text from pg_extension e
        union all select e::text from pg_event_trigger e
        union all select d::text from pg_default_acl d
        union all select p::text from pg_publication p
        union all select p::text from pg_publication_rel p
        union all select p::text from pg_publication_namespace p
        union all select f::text from pg_foreign_data_wrapper f
        union all select f::text from pg_foreign_server f
        union all select f::text from pg_foreign_table f
        union all select d::text from pg_description d where d.objoid >= 16384
        union all select s::text from pg_seclabel s
        union all select l.oid::text || l.lomowner || coalesce(l.lomacl::text, '') from pg_largeobject_metadata l) as lines (line)
