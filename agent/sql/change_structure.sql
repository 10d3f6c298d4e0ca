-- What there is in this database, in words that are the same on every node that has the same: kind, name, definition. Left out:
-- what is PostgreSQL's own, an extension's, or stillebot's; the order of columns, and where sequences are and how they step.
with schemas as materialized (
    select n.oid, n.nspname from pg_namespace n
     where n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'multihome')),
owned as materialized (
    select d.classid, d.objid from pg_depend d where d.deptype = 'e'),
relations as materialized (
    select c.*, format('%I.%I', s.nspname, c.relname) as name
      from pg_class c join schemas s on s.oid = c.relnamespace
     where c.relpersistence <> 't' and not exists (select from owned o where o.classid = 'pg_class'::regclass and o.objid = c.oid))
select 'schema' as kind, quote_ident(s.nspname) as name, '' as definition
  from schemas s
union all
select case r.relkind when 'r' then 'table' when 'p' then 'table' when 'v' then 'view' when 'm' then 'materialized view' when 'f' then 'foreign table' else 'type' end,
       r.name,
       concat_ws(' ', case when r.relpersistence = 'u' then 'unlogged' end,
                 case when r.relkind = 'p' then 'partition by ' || pg_get_partkeydef(r.oid) end,
                 case when r.relispartition then 'partition of ' || (select i.inhparent::regclass::text from pg_inherits i where i.inhrelid = r.oid limit 1)
                                                 || ' ' || pg_get_expr(r.relpartbound, r.oid) end,
                 case when r.relkind in ('v', 'm') then pg_get_viewdef(r.oid) end,
                 case when r.relkind in ('r', 'p') then 'replica identity ' || case r.relreplident when 'd' then 'default' when 'f' then 'full' when 'n' then 'nothing'
                      else 'index ' || coalesce((select i.indexrelid::regclass::text from pg_index i where i.indrelid = r.oid and i.indisreplident), '?') end end,
                 case when r.relrowsecurity then 'row level security' end)
  from relations r where r.relkind in ('r', 'p', 'v', 'm', 'f', 'c')
union all
select 'column', r.name || '.' || quote_ident(a.attname),
       concat_ws(' ', format_type(a.atttypid, a.atttypmod),
                 case when a.attcollation <> t.typcollation then 'collate ' || a.attcollation::regcollation end,
                 case when a.attnotnull then 'not null' end,
                 case when a.attidentity <> '' then 'identity ' || a.attidentity::text end,
                 case when a.attgenerated <> '' then 'generated as' when d.oid is not null then 'default' end,
                 pg_get_expr(d.adbin, d.adrelid))
  from relations r
  join pg_attribute a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
  join pg_type t on t.oid = a.atttypid
  left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
 where r.relkind in ('r', 'p', 'f', 'c')
union all
select 'constraint', r.name || '.' || quote_ident(c.conname), pg_get_constraintdef(c.oid)
  from relations r join pg_constraint c on c.conrelid = r.oid
 where c.contype <> 'n'
union all
select 'index', r.name, pg_get_indexdef(i.indexrelid) || case when i.indisvalid then '' else ' (invalid)' end
  from relations r join pg_index i on i.indexrelid = r.oid
union all
select 'trigger', r.name || '.' || quote_ident(t.tgname),
       pg_get_triggerdef(t.oid) || ' ' || case t.tgenabled when 'O' then 'enabled' when 'D' then 'disabled' when 'A' then 'always' else 'replica' end
  from relations r join pg_trigger t on t.tgrelid = r.oid
 where not t.tgisinternal
union all
select 'policy', r.name || '.' || quote_ident(p.polname),
       concat_ws(' ', p.polcmd::text, p.polpermissive::text, p.polroles::regrole[]::text, pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
  from relations r join pg_policy p on p.polrelid = r.oid
union all
select 'sequence', r.name, format_type(s.seqtypid, null) || case when s.seqcycle then ' cycle' else '' end
  from relations r join pg_sequence s on s.seqrelid = r.oid
union all
select 'function', format('%I.%I(%s)', s.nspname, p.proname, pg_get_function_identity_arguments(p.oid)),
       case when p.prokind = 'a' then 'aggregate ' || pg_get_function_result(p.oid) else pg_get_functiondef(p.oid) end
  from pg_proc p join schemas s on s.oid = p.pronamespace
 where not exists (select from owned o where o.classid = 'pg_proc'::regclass and o.objid = p.oid)
union all
select 'type', format('%I.%I', s.nspname, t.typname),
       case t.typtype
            when 'e' then 'enum ' || (select string_agg(quote_literal(e.enumlabel), ', ' order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid)
            when 'd' then concat_ws(' ', 'domain', format_type(t.typbasetype, t.typtypmod), case when t.typnotnull then 'not null' end, t.typdefault,
                                    (select string_agg(pg_get_constraintdef(c.oid), ' ' order by c.conname) from pg_constraint c where c.contypid = t.oid))
            else 'range ' || (select format_type(r.rngsubtype, null) from pg_range r where r.rngtypid = t.oid) end
  from pg_type t join schemas s on s.oid = t.typnamespace
 where t.typtype in ('e', 'd', 'r') and not exists (select from owned o where o.classid = 'pg_type'::regclass and o.objid = t.oid)
union all
select 'publication', quote_ident(p.pubname),
       concat_ws(' ', case when p.puballtables then 'all tables' end, case when p.pubinsert then 'insert' end, case when p.pubupdate then 'update' end,
                 case when p.pubdelete then 'delete' end, case when p.pubtruncate then 'truncate' end,
                 (select string_agg(t.schemaname || '.' || t.tablename, ', ' order by 1)
                    from pg_publication_tables t where t.pubname = p.pubname and not p.puballtables))
  from pg_publication p
