-- The tables that a publication of all tables has in it, or would have if they were logged; without the extension's own,
-- which are alike where its version is. Names are quoted for SQL. $1: the role that makes initial copies. A table has an
-- identity if an update or a delete of it can be published: by core's rules, a deferrable key is none.
select jsonb_build_object(
           'name', format('%I.%I', n.nspname, c.relname),
           'partitioned', c.relkind = 'p',
           'unlogged', c.relpersistence = 'u',
           'readable', (select has_schema_privilege(r.oid, n.oid, 'usage') and has_table_privilege(r.oid, c.oid, 'select')
                          from pg_roles r
                         where r.rolname = $1),
           'row_security', c.relrowsecurity,
           'identity', case c.relreplident when 'd' then 'default' when 'n' then 'nothing' when 'f' then 'full' when 'i' then 'index' end,
           'has_identity', c.relreplident = 'f'
                           or exists (select
                                        from pg_index i
                                       where i.indrelid = c.oid
                                         and i.indisvalid
                                         and i.indisunique
                                         and i.indimmediate
                                         and i.indpred is null
                                         and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end),
           'identity_columns', (select coalesce(jsonb_agg(format('%I', a.attname) order by a.attname), '[]')
                                  from pg_index i
                                  join pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey[0 : i.indnkeyatts - 1])
                                 where i.indrelid = c.oid
                                   and i.indisvalid
                                   and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end),
           'keys', (select coalesce(jsonb_agg(jsonb_build_object(
                               'name', format('%I', x.relname),
                               'primary', i.indisprimary,
                               'deferrable', not i.indimmediate,
                               'constraint', exists (select from pg_constraint k where k.conindid = i.indexrelid and k.contype in ('p', 'u')),
                               -- As ALTER TABLE .. REPLICA IDENTITY USING INDEX wants it.
                               'fit', i.indimmediate and i.indpred is null and i.indexprs is null
                                      and not exists (select
                                                        from pg_attribute a
                                                       where a.attrelid = c.oid
                                                         and a.attnum = any (i.indkey[0 : i.indnkeyatts - 1])
                                                         and not a.attnotnull),
                               'rule', (select string_agg(pg_get_indexdef(i.indexrelid, k, true), ', ' order by k)
                                          from generate_series(1, i.indnkeyatts) k)
                                       || case when i.indnullsnotdistinct then ' nulls not distinct' else '' end
                                       || coalesce(' where ' || pg_get_expr(i.indpred, i.indrelid), ''),
                               'columns', (select coalesce(jsonb_agg(format('%I', a.attname) order by k.number), '[]')
                                             from unnest(i.indkey[0 : i.indnkeyatts - 1]) with ordinality k (attnum, number)
                                             join pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum)
                           ) order by i.indisprimary desc, x.relname), '[]')
                      from pg_index i
                      join pg_class x on x.oid = i.indexrelid
                     where i.indrelid = c.oid
                       and i.indisunique
                       and i.indisvalid),
           'columns', (select coalesce(jsonb_agg(jsonb_build_object(
                                  'name', format('%I', a.attname),
                                  'type', format_type(a.atttypid, a.atttypmod),
                                  'not_null', a.attnotnull,
                                  'generated', a.attgenerated <> '',
                                  'always', a.attidentity = 'a',
                                  'sequence', (select jsonb_build_object(
                                                          'name', format('%I.%I', sn.nspname, sc.relname),
                                                          'increment', q.seqincrement,
                                                          'start', q.seqstart,
                                                          'least', q.seqmin,
                                                          'most', q.seqmax,
                                                          'last', case when has_sequence_privilege(sc.oid, 'usage, select')
                                                                       then pg_sequence_last_value(sc.oid) end)
                                                 from pg_sequence q
                                                 join pg_class sc on sc.oid = q.seqrelid
                                                 join pg_namespace sn on sn.oid = sc.relnamespace
                                                where exists (select
                                                                from pg_depend o
                                                               where o.classid = 'pg_class'::regclass
                                                                 and o.objid = sc.oid
                                                                 and o.refclassid = 'pg_class'::regclass
                                                                 and o.refobjid = c.oid
                                                                 and o.refobjsubid = a.attnum
                                                                 and o.deptype = 'i')
                                                   or exists (select
                                                                from pg_attrdef f
                                                                join pg_depend u on u.classid = 'pg_attrdef'::regclass
                                                                                and u.objid = f.oid
                                                                                and u.refclassid = 'pg_class'::regclass
                                                                                and u.refobjid = sc.oid
                                                               where f.adrelid = c.oid
                                                                 and f.adnum = a.attnum)
                                                limit 1)
                              ) order by a.attnum), '[]')
                         from pg_attribute a
                        where a.attrelid = c.oid
                          and a.attnum > 0
                          and not a.attisdropped)
       )::text as survey
  from pg_class c
  join pg_namespace n on n.oid = c.relnamespace
 where c.relkind in ('r', 'p')
   and c.relpersistence in ('p', 'u')
   and n.nspname not in ('pg_catalog', 'information_schema', 'multihome')
 order by n.nspname, c.relname
