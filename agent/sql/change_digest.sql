-- What the catalogs say of everything that is not PostgreSQL's own: a statement that leaves this as it was has changed nothing
-- but rows of tables, or what is_hidden() in change.rs finds out. Temporary tables of any session are nobody's schema.
with temporary_relation as (select c.oid from pg_class c where c.relpersistence = 't'),
     temporary_schema as (select n.oid from pg_namespace n where n.nspname ~ '^pg_(toast_)?temp_'),
     this_database as (select d.oid from pg_database d where d.datname = current_database())
select coalesce(md5(string_agg(line, e'\n' order by line)), '') as digest
  from (select (to_jsonb(c) - '{relpages,reltuples,relallvisible,relallfrozen,relfrozenxid,relminmxid}'::text[])::text from pg_class c where c.oid >= 16384 and c.relpersistence <> 't'
        union all select a::text from pg_attribute a where a.attrelid >= 16384 and a.attrelid not in (select oid from temporary_relation)
        union all select d::text from pg_attrdef d where d.adrelid not in (select oid from temporary_relation)
        union all select t::text from pg_type t where t.oid >= 16384 and t.typnamespace not in (select oid from temporary_schema)
        union all select e::text from pg_enum e
        union all select r::text from pg_range r where r.rngtypid >= 16384
        union all select c::text from pg_constraint c where c.oid >= 16384 and c.connamespace not in (select oid from temporary_schema)
        union all select i::text from pg_index i where i.indexrelid >= 16384 and i.indexrelid not in (select oid from temporary_relation)
        union all select i::text from pg_inherits i where i.inhrelid not in (select oid from temporary_relation)
        union all select p::text from pg_partitioned_table p where p.partrelid not in (select oid from temporary_relation)
        union all select t::text from pg_trigger t where t.tgrelid not in (select oid from temporary_relation)
        union all select p::text from pg_policy p where p.polrelid not in (select oid from temporary_relation)
        union all select r::text from pg_rewrite r where r.oid >= 16384 and r.ev_class not in (select oid from temporary_relation)
        union all select s::text from pg_sequence s where s.seqrelid not in (select oid from temporary_relation)
        union all select s::text from pg_statistic_ext s where s.stxrelid not in (select oid from temporary_relation)
        union all select p::text from pg_proc p where p.oid >= 16384 and p.pronamespace not in (select oid from temporary_schema)
        union all select a::text from pg_aggregate a where a.aggfnoid >= 16384
        union all select o::text from pg_operator o where o.oid >= 16384
        union all select o::text from pg_opclass o where o.oid >= 16384
        union all select o::text from pg_opfamily o where o.oid >= 16384
        union all select a::text from pg_amop a where a.oid >= 16384
        union all select a::text from pg_amproc a where a.oid >= 16384
        union all select c::text from pg_cast c where c.oid >= 16384
        union all select c::text from pg_collation c where c.oid >= 16384
        union all select l::text from pg_language l where l.oid >= 16384
        union all select t::text from pg_transform t
        union all select t::text from pg_ts_config t where t.oid >= 16384
        union all select t::text from pg_ts_config_map t where t.mapcfg >= 16384
        union all select t::text from pg_ts_dict t where t.oid >= 16384
        union all select n::text from pg_namespace n where n.oid not in (select oid from temporary_schema)
        union all select e::text from pg_extension e
        union all select e::text from pg_event_trigger e
        union all select d::text from pg_default_acl d
        union all select p::text from pg_publication p
        union all select p::text from pg_publication_rel p
        union all select p::text from pg_publication_namespace p
        union all select f::text from pg_foreign_data_wrapper f
        union all select f::text from pg_foreign_server f
        union all select f::text from pg_foreign_table f
        union all select d::text from pg_description d where (d.objoid >= 16384 or d.classoid = 'pg_namespace'::regclass) and d.objoid not in (select oid from temporary_relation)
        union all select s::text from pg_seclabel s
        union all select l.oid::text || l.lomowner || coalesce(l.lomacl::text, '') from pg_largeobject_metadata l
        union all select r::text from pg_roles r
        union all select m::text from pg_auth_members m
        union all select s::text from pg_db_role_setting s where s.setdatabase = 0 or s.setdatabase = (select oid from this_database)
        union all select (to_jsonb(d) - '{datfrozenxid,datminmxid}'::text[])::text from pg_database d where d.oid = (select oid from this_database)
        union all select d::text from pg_shdescription d
        union all select a::text from pg_parameter_acl a
        union all select t::text from pg_tablespace t) as lines (line)
