-- stillebot 0.3.0: every conflict and error of replication is a row, and can be resolved.
\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit

-- What SQL cannot do by itself. For the functions below and the collector; nobody else has EXECUTE.

create function multihome.begin_local(verb text) returns void
language c volatile strict parallel unsafe
as 'MODULE_PATHNAME', 'multihome_begin_local_wrapper';
revoke execute on function multihome.begin_local(text) from public;
comment on function multihome.begin_local(text) is
'Keeps all of this transaction on this node, and lets it write also while the database is down. verb: what to call it in errors. Refused in transaction blocks and after writes.';

create function multihome.end_local() returns void
language c volatile parallel unsafe
as 'MODULE_PATHNAME', 'multihome_end_local_wrapper';
revoke execute on function multihome.end_local() from public;
comment on function multihome.end_local() is
'Ends what multihome.begin_local() began: the rest of the transaction is read-only, for it would not replicate.';

create function multihome.as_role(role oid, query text, first text default null, second text default null) returns text
language c volatile parallel unsafe
as 'MODULE_PATHNAME', 'multihome_as_role_wrapper';
revoke execute on function multihome.as_role(oid, text, text, text) from public;
comment on function multihome.as_role(oid, text, text, text) is
'Runs a query with the rights of a role and returns the first column, a text, of the first row. first, second: its parameters $1 and $2.
Whatever of the role''s making the query calls cannot gain the rights of the caller.';

create function multihome.exclude(subscription oid, lsn pg_lsn, change_number integer, fingerprint bigint) returns boolean
language c volatile strict parallel unsafe
as 'MODULE_PATHNAME', 'multihome_exclude_wrapper';
revoke execute on function multihome.exclude(oid, pg_lsn, integer, bigint) from public;
comment on function multihome.exclude(oid, pg_lsn, integer, bigint) is
'Has one change of a remote transaction, that with its commit at lsn, left out when it comes, if it still has that fingerprint. False if too many are waited for. Forgotten at a restart; multihome.resume() says it again.';

create function multihome.restart(subscription oid) returns void
language c volatile strict parallel unsafe
as 'MODULE_PATHNAME', 'multihome_restart_wrapper';
revoke execute on function multihome.restart(oid) from public;
comment on function multihome.restart(oid) is
'Has the apply worker of a subscription started right after this transaction, instead of wal_retrieve_retry_interval after its last start.';

create function multihome.node_id() returns text
language c stable parallel safe
as 'MODULE_PATHNAME', 'multihome_node_id_wrapper';
comment on function multihome.node_id() is 'This database of this server: its system identifier and the oid of the database.';

create function multihome.collector() returns integer
language c volatile parallel restricted
as 'MODULE_PATHNAME', 'multihome_collector_wrapper';
comment on function multihome.collector() is 'The process that records conflicts of this database; null: there is none now.';

create function multihome.dropped() returns bigint
language c volatile parallel restricted
as 'MODULE_PATHNAME', 'multihome_dropped_wrapper';
comment on function multihome.dropped() is
'Events of replication in this database that could not be recorded since the server started.';

-- The log. Its rows are written by transactions that stay on this node, so they do not travel; an initial copy brings
-- those of the peer, which are told apart by the node, not shown, and removed by multihome.upkeep().

create sequence multihome.log_id;
comment on sequence multihome.log_id is 'Numbers of conflicts on this node.';

create table multihome.log (
    node text not null default multihome.node_id(),
    id bigint not null default nextval('multihome.log_id'),
    subscription_oid oid not null,
    subscription text not null,
    conflict_type text not null,
    relation oid,
    schemaname text,
    relname text,
    constraint_name text,
    remote_origin text,
    remote_xid xid,
    remote_commit_lsn pg_lsn,
    remote_commit_ts timestamptz,
    replica_identity jsonb,
    remote_tuple jsonb,
    local_conflicts jsonb not null default '[]',
    sqlstate text,
    message text,
    detail text,
    context text,
    operation text,
    change_number integer,
    fingerprint bigint,
    transaction_kind text,
    changes jsonb not null default '[]',
    changes_seen integer not null default 0,
    changes_complete boolean not null default false,
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    occurrences bigint not null default 1,
    status text not null default 'open' check (status in ('open', 'resolved', 'skipped')),
    resolution text,
    resolved_by text,
    resolved_at timestamptz,
    blocking boolean not null,
    settling boolean not null default false,
    -- What was decided, while resolution says it in words: local, remote or skip.
    answer text,
    primary key (id, node)
);
-- Floods come while the collector has plans from when the log was small: for each of its questions there is one index that is
-- never the worse one.
create index log_open on multihome.log (node, blocking) where status = 'open';
create index log_transaction on multihome.log (node, subscription_oid, coalesce(remote_commit_lsn, '0/0'), id);
comment on table multihome.log is 'What multihome.conflicts shows, of this and, after an initial copy, of other nodes.';

create view multihome.conflicts as
    select id, subscription, conflict_type, schemaname, relname, constraint_name, remote_origin, remote_xid, remote_commit_lsn,
           remote_commit_ts, replica_identity, remote_tuple, local_conflicts, sqlstate, message, detail, context, first_seen,
           last_seen, occurrences, status, resolution, resolved_by, resolved_at, operation, change_number, transaction_kind,
           changes_complete, blocking
      from multihome.log
     where node = multihome.node_id();
comment on view multihome.conflicts is
'Every conflict and error that replication met on this node, newest information first seen to last. NOTIFY stillebot_conflict, with the id, tells of new ones.';
comment on column multihome.conflicts.conflict_type is
'insert_exists, update_exists, multiple_unique_conflicts: the incoming row violates one or several unique indexes. update_missing, delete_missing: there is no row to change; apply goes on.
update_origin_differs, delete_origin_differs: as PostgreSQL 18 and newer report them. apply_error: anything else that stops apply or an initial copy.';
comment on column multihome.conflicts.remote_origin is 'The replication origin of the subscription, as in pg_replication_origin.';
comment on column multihome.conflicts.remote_commit_lsn is 'Where the remote transaction''s commit is at the publisher; null for an initial copy.';
comment on column multihome.conflicts.replica_identity is 'The key of the incoming change.';
comment on column multihome.conflicts.remote_tuple is
'The incoming row. A value that was too long (stillebot.max_tuple_size) is {"cut": its length, "begin": its first bytes}; what the publisher did not send is left out.';
comment on column multihome.conflicts.local_conflicts is
'The local rows in the way: xid, commit_ts, origin (local or the subscription that brought it; null if not known), index, key, tuple.';
comment on column multihome.conflicts.occurrences is 'How often this was seen: apply tries again and again.';
comment on column multihome.conflicts.status is 'open; resolved, also by itself; skipped, with the whole remote transaction.';
comment on column multihome.conflicts.change_number is 'The place of the change in its transaction, counted from 1; null if not known.';
comment on column multihome.conflicts.transaction_kind is 'plain; streamed, while it ran; prepared, in two phases; copy, an initial copy.';
comment on column multihome.conflicts.changes_complete is 'Whether multihome.conflict_changes() has all changes of the transaction.';
comment on column multihome.conflicts.blocking is 'Whether this stops its subscription.';

create function multihome.conflict_changes(
    conflict_id bigint,
    out change_number integer, out schemaname text, out relname text, out operation text, out key jsonb, out tuple jsonb,
    out failed boolean, out complete boolean
) returns setof record
language sql stable parallel safe security definer
set search_path = pg_catalog, pg_temp
begin atomic
    select (c.change ->> 'change_number')::integer, c.change ->> 'schemaname', c.change ->> 'relname', c.change ->> 'operation',
           c.change -> 'key', c.change -> 'tuple', coalesce((c.change ->> 'change_number')::integer = l.change_number, false), l.changes_complete
      from multihome.log l, jsonb_array_elements(l.changes) with ordinality as c (change, place)
     where l.node = multihome.node_id() and l.id = conflict_id
     order by c.place;
end;
revoke execute on function multihome.conflict_changes(bigint) from public;
comment on function multihome.conflict_changes(bigint) is
'What the remote transaction of a conflict did, in order, as far as it was seen before it failed; values as text. failed: this change did not go in.
complete: these are all changes of the transaction, as is known once it was skipped.';

create table multihome.fault (
    node text not null default multihome.node_id(),
    subscription_oid oid not null,
    subscription text not null,
    sqlstate text not null,
    message text,
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    occurrences bigint not null default 1,
    -- How often without two seconds of peace.
    burst integer not null default 1,
    primary key (node, subscription_oid, sqlstate)
);
comment on table multihome.fault is 'What multihome.faults shows, of this and, after an initial copy, of other nodes.';

create view multihome.faults as
    select f.subscription, f.sqlstate, f.message, f.first_seen, f.last_seen, f.occurrences,
           s.oid is null or coalesce(w.last_msg_receipt_time > f.last_seen, false) as healed
      from multihome.fault f
      left join pg_catalog.pg_subscription s on s.oid = f.subscription_oid
      left join pg_catalog.pg_stat_subscription w on w.subid = f.subscription_oid and w.relid is null and w.pid is not null
     where f.node = multihome.node_id();
comment on view multihome.faults is
'Troubles of replication that are no fault of the data and end by themselves: a lost connection, a deadlock, a full disk, a worker whose predecessor is not quite gone (SQLSTATE 40001, 40P01, 55006, 55P03, classes 08, 53, 57).
first_seen: when the present or last such time began. healed: the subscription has heard from its peer since.';

-- Rows of user tables, as JSON.

create function multihome.key_index(relation oid) returns oid
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    select indexrelid from pg_index
     where indrelid = relation and (indisprimary or indisreplident)
     order by indisreplident desc
     limit 1;
end;
revoke execute on function multihome.key_index(oid) from public;
comment on function multihome.key_index(oid) is 'The unique index by which replication tells the rows of a table apart; null if there is none.';

create function multihome.key_columns(relation oid) returns text[]
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    select array_agg(a.attname::text order by k.place)
      from pg_index i, unnest(i.indkey) with ordinality as k (attnum, place), pg_attribute a
     where i.indexrelid = multihome.key_index(relation) and k.place <= i.indnkeyatts and a.attrelid = relation and a.attnum = k.attnum;
end;
revoke execute on function multihome.key_columns(oid) from public;
comment on function multihome.key_columns(oid) is 'The columns of multihome.key_index(), in its order.';

create function multihome.key_object(relation oid, alias text) returns text
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    select format('jsonb_build_object(%s)', string_agg(format('%L, %I.%I', name, alias, name), ', ' order by place))
      from unnest(multihome.key_columns(relation)) with ordinality as k (name, place);
end;
revoke execute on function multihome.key_object(oid, text) from public;
comment on function multihome.key_object(oid, text) is 'An expression: the key of a row, called alias, as a JSON object.';

create function multihome.equality(index oid, place integer) returns text
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    select format('operator(%I.%s)', n.nspname, o.oprname)
      from pg_index i
      join pg_opclass c on c.oid = i.indclass[place - 1]
      -- Strategy 3 of a B-tree is equality; all unique indexes are B-trees.
      join pg_amop a on a.amopfamily = c.opcfamily and a.amoplefttype = c.opcintype and a.amoprighttype = c.opcintype and a.amopstrategy = 3
      join pg_operator o on o.oid = a.amopopr
      join pg_namespace n on n.oid = o.oprnamespace
     where i.indexrelid = index;
end;
revoke execute on function multihome.equality(oid, integer) from public;
comment on function multihome.equality(oid, integer) is 'What a unique index takes for equal in one of its columns, counted from 1: an operator, wherever it may be.';

create function multihome.record_of(relation oid, parameter text) returns text
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    select format('(select %s from jsonb_populate_record(null::%s, %s::jsonb) as incoming)',
                  string_agg(case when a.attgenerated = '' then format('incoming.%I', a.attname)
                                  else format('(%s) as %I', pg_get_expr(d.adbin, d.adrelid), a.attname) end, ', ' order by a.attnum),
                  relation::regclass, parameter)
      from pg_attribute a
      left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
     where a.attrelid = relation and a.attnum > 0 and not a.attisdropped;
end;
revoke execute on function multihome.record_of(oid, text) from public;
comment on function multihome.record_of(oid, text) is 'A subquery: the row of a table that a JSON object, a parameter of the query, describes; generated columns are computed.';

create function multihome.is_cut(value jsonb) returns boolean
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return case when jsonb_typeof(value) = 'object' then value ?& array['cut', 'begin'] or (value ? 'binary' and value = jsonb_build_object('binary', value -> 'binary')) else false end;
revoke execute on function multihome.is_cut(jsonb) from public;
comment on function multihome.is_cut(jsonb) is 'Whether a value in the log is not the whole value, or not in a form that can be read back.';

create function multihome.owner_of(relation oid) returns oid
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    select relowner from pg_class where oid = relation;
end;
revoke execute on function multihome.owner_of(oid) from public;
comment on function multihome.owner_of(oid) is 'The owner of a table.';

create function multihome.typed(relation oid, tuple jsonb) returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    whole jsonb := tuple;
    cut boolean := tuple @? '$.* ? (exists (@.cut) || exists (@.binary))';
begin
    if relation is null or tuple is null then
        return tuple;
    end if;
    if cut then
        select coalesce(jsonb_object_agg(key, value), '{}') into whole from jsonb_each(tuple) where not multihome.is_cut(value);
    end if;
    whole := multihome.as_role((select relowner from pg_class where oid = relation),
        format('select to_jsonb(r)::text from jsonb_populate_record(null::%s, $1::jsonb) as r', relation::regclass), whole::text);
    return (select jsonb_object_agg(t.key, case when whole ? t.key and not (cut and multihome.is_cut(t.value)) then whole -> t.key else t.value end)
              from jsonb_each(tuple) as t);
exception when others then
    return tuple;
end $$;
revoke execute on function multihome.typed(oid, jsonb) from public;
comment on function multihome.typed(oid, jsonb) is
'A row whose values came as text, with numbers, booleans and JSON as to_jsonb() would have them; as it came if the table has another shape here.';

create function multihome.shortened(tuple jsonb) returns jsonb
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
return case when octet_length(tuple::text) <= pg_size_bytes(current_setting('stillebot.max_tuple_size')) then tuple
       else (select jsonb_object_agg(key, case when octet_length(value::text) <= 1000 then value
                                               else jsonb_build_object('cut', octet_length(value #>> '{}'), 'begin', left(value #>> '{}', 200)) end)
               from jsonb_each(tuple)) end;
revoke execute on function multihome.shortened(jsonb) from public;
comment on function multihome.shortened(jsonb) is 'A row with its long values cut, if it is longer than stillebot.max_tuple_size.';

create function multihome.rows_in_the_way(relation oid, tuple jsonb, own_key jsonb) returns jsonb
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    own record;
    key text := coalesce(multihome.key_object(relation, 'stillebot row'), 'null::jsonb');
    -- As core finds the row that an update changes: by the key, or else by all of the row.
    is_own text := coalesce(multihome.by_key(relation, 'stillebot row', '$2'), 'to_jsonb("stillebot row") = $2::jsonb');
    expressions text;
    condition text;
    rows jsonb := '[]';
    whole jsonb;
begin
    -- What is cut cannot be read as its type, and is too long for an index anyway.
    select coalesce(jsonb_object_agg(t.key, t.value), '{}') into whole from jsonb_each(tuple) as t where not multihome.is_cut(t.value);
    for own in
        select i.indexrelid, i.indnkeyatts, i.indnullsnotdistinct, coalesce(pg_get_expr(i.indpred, i.indrelid), 'true') as predicate, c.relname
          from pg_index i join pg_class c on c.oid = i.indexrelid
         where i.indrelid = relation and i.indisunique and i.indisvalid
         order by i.indexrelid
    loop
        -- Expressions of an index name columns without a table, so nothing else in the query may have columns of such names.
        select string_agg(format('%s as "stillebot %s"', e, n), ', ' order by n),
               string_agg(format(case when own.indnullsnotdistinct
                                      then '(%1$s %3$s "stillebot key"."stillebot %2$s" or (%1$s is null and "stillebot key"."stillebot %2$s" is null))'
                                      else '%1$s %3$s "stillebot key"."stillebot %2$s"' end, e, n, multihome.equality(own.indexrelid, n)), ' and ' order by n)
          into expressions, condition
          from generate_series(1, own.indnkeyatts) as n, pg_get_indexdef(own.indexrelid, n, true) as e;
        rows := rows || coalesce(multihome.as_role(multihome.owner_of(relation), format(
            'with "stillebot key" as (select %s from %s as incoming where %s),
                  hit as (select "stillebot row".xmin as xmin_, "stillebot row".tableoid as tableoid_, "stillebot row".ctid as ctid_,
                                 %s as key, to_jsonb("stillebot row") as tuple
                            from %s as "stillebot row" cross join "stillebot key"
                           where %s and (%s) and ($2::jsonb is null or (%s) is not true))
             select jsonb_agg(jsonb_build_object(
                        ''index'', %L, ''xid'', hit.xmin_::text::bigint, ''commit_ts'', c.commit_ts, ''origin'', c.origin::text::bigint,
                        ''key'', hit.key, ''tuple'', hit.tuple, ''tableoid'', hit.tableoid_::bigint, ''ctid'', hit.ctid_::text))::text
               from hit left join lateral multihome.commit_of(hit.xmin_) as c on true',
            expressions, multihome.record_of(relation, '$1'), own.predicate,
            key, relation::regclass, condition, own.predicate, is_own, own.relname), whole::text, own_key::text)::jsonb, '[]');
    end loop;
    return rows;
end $$;
revoke execute on function multihome.rows_in_the_way(oid, jsonb, jsonb) from public;
comment on function multihome.rows_in_the_way(oid, jsonb, jsonb) is
'The rows of a table that keep another one out, by any unique index: an array of {index, xid, commit_ts, origin (number), key, tuple, tableoid, ctid}.
tuple: the row that comes, values as text. own_key: the row that it replaces, which is not in its own way; null for an insert.';

create function multihome.commit_of(xid xid, out commit_ts timestamptz, out origin oid)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if current_setting('track_commit_timestamp')::boolean then
        select t.timestamp, t.roident into commit_ts, origin from pg_xact_commit_timestamp_origin(xid) as t;
    end if;
end $$;
comment on function multihome.commit_of(xid) is
'When a transaction was committed and through which replication origin it came (0 or 65535: made here); nulls if that is not known any more, or never was.';

create function multihome.without_places(rows jsonb, subscriptions boolean) returns jsonb
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(jsonb_agg(r.value - 'tableoid' - 'ctid' || jsonb_build_object(
               'tuple', case when subscriptions then multihome.shortened(r.value -> 'tuple') else r.value -> 'tuple' end,
               'origin', case when r.value ->> 'origin' is null then null
                              when (r.value ->> 'origin')::bigint in (0, 65535) then 'local'
                              else coalesce((select s.subname::text from pg_replication_origin o join pg_subscription s on o.roname = 'pg_' || s.oid
                                              where o.roident = (r.value ->> 'origin')::oid), 'origin ' || (r.value ->> 'origin')) end)), '[]')
      from jsonb_array_elements(rows) as r;
end;
revoke execute on function multihome.without_places(jsonb, boolean) from public;
comment on function multihome.without_places(jsonb, boolean) is 'Rows in the way as the log has them: origins by name, long values cut if wanted, without their physical places.';

-- What goes into the log, and what does not.

create function multihome.is_redacted(schemaname text, relname text) returns boolean
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
return coalesce(exists (select from string_to_table(current_setting('stillebot.redact'), ',') as t (pattern)
                         where trim(pattern) in ('*', schemaname || '.*', schemaname || '.' || relname)), false);
revoke execute on function multihome.is_redacted(text, text) from public;
comment on function multihome.is_redacted(text, text) is 'Whether only keys of a table go into the log: stillebot.redact.';

create function multihome.only_key(change jsonb) returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
-- What the publisher calls the key is all of the row with REPLICA IDENTITY FULL.
return change - 'tuple' || jsonb_build_object('key', (
    select jsonb_object_agg(name, change -> 'key' -> name)
      from unnest(multihome.key_columns(to_regclass(quote_ident(change ->> 'schemaname') || '.' || quote_ident(change ->> 'relname')))) as name
     where change -> 'key' ? name));
revoke execute on function multihome.only_key(jsonb) from public;
comment on function multihome.only_key(jsonb) is 'A change without what must not be known of a redacted table: all but its key on this node.';

create function multihome.scrubbed(text text) returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return regexp_replace(regexp_replace(text, '(password\s*=\s*)(''([^''\\]|\\.)*''|[^\s''"]+)', '\1***', 'gi'), '(://[^:/@\s]*:)[^@\s]+@', '\1***@', 'g');
revoke execute on function multihome.scrubbed(text) from public;
comment on function multihome.scrubbed(text) is 'A text without the passwords of connection strings.';

create function multihome.is_transient(sqlstate text) returns boolean
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
return sqlstate in ('40001', '40P01', '55006', '55P03') or left(sqlstate, 2) in ('08', '53', '57');
revoke execute on function multihome.is_transient(text) from public;
comment on function multihome.is_transient(text) is 'Whether an error is no fault of the data and ends by itself, so that nothing may ever be skipped because of it.';

create function multihome.progress(subscription oid) returns pg_lsn
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
    select remote_lsn from pg_replication_origin_status where external_id = 'pg_' || subscription;
end;
revoke execute on function multihome.progress(oid) from public;
comment on function multihome.progress(oid) is 'Up to where, in the publisher''s WAL, the transactions of a subscription have been applied.';

create function multihome.is_past(subscription oid, lsn pg_lsn) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
-- Beyond, not at it: when the transaction before has been applied its end is there, if the two commits are neighbours in the WAL.
return coalesce(multihome.progress(subscription) > lsn, false)
       -- A transaction of which nothing was left to apply leaves no trace there; but keepalives are handled in order.
       or exists (select from pg_stat_subscription w
                   where w.subid = subscription and w.relid is null and w.leader_pid is null and w.pid is not null and w.latest_end_lsn > lsn);
revoke execute on function multihome.is_past(oid, pg_lsn) from public;
comment on function multihome.is_past(oid, pg_lsn) is 'Whether a subscription has got past the transaction whose commit is at lsn.';

create function multihome.summary(changes jsonb, complete boolean) returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(string_agg(format('%s %s.%s %s', c ->> 'operation', c ->> 'schemaname', c ->> 'relname', c ->> 'key'), '; ' order by place)
                        filter (where place <= 5), 'nothing that was seen')
           || case when count(*) > 5 then format('; and %s more changes', count(*) - 5) else '' end
           || case when complete then '' else ' (more may follow that was not seen)' end
      from jsonb_array_elements(changes) with ordinality as t (c, place);
end;
revoke execute on function multihome.summary(jsonb, boolean) from public;
comment on function multihome.summary(jsonb, boolean) is 'The changes of a transaction in a line.';

create function multihome.record(event jsonb) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    happened timestamptz := (event ->> 'at')::timestamptz;
    kind text := event ->> 'kind';
    redacting boolean := current_setting('stillebot.redact') <> '';
    -- Which change did not go in; with all its values, whatever may be kept.
    change jsonb;
    way jsonb := '[]';
    redacted boolean;
    burst integer;
    entry multihome.log;
    known multihome.log;
begin
    entry.node := multihome.node_id();
    entry.subscription_oid := (event ->> 'subscription')::oid;
    entry.subscription := coalesce((select subname from pg_subscription where oid = entry.subscription_oid), 'dropped subscription ' || entry.subscription_oid);
    entry.sqlstate := event ->> 'sqlstate';
    entry.remote_commit_lsn := (event ->> 'remote_commit_lsn')::pg_lsn;
    if entry.remote_commit_lsn is null and not event ? 'copied' then
        -- A parallel worker, which the tap does not see; core says it at the end of a line. The context of a copy has data in it.
        entry.remote_commit_lsn := substring(event ->> 'context' from '(?w).*\m([0-9A-F]{1,8}/[0-9A-F]{1,8})$')::pg_lsn;
    end if;

    if kind = 'error' and multihome.is_transient(entry.sqlstate) then
        insert into multihome.fault as f (subscription_oid, subscription, sqlstate, message, first_seen, last_seen)
             values (entry.subscription_oid, entry.subscription, entry.sqlstate, multihome.scrubbed(event ->> 'message'), happened, happened)
        on conflict (node, subscription_oid, sqlstate) do update
                set message = excluded.message, subscription = excluded.subscription, last_seen = excluded.last_seen,
                    -- After a minute of peace it is another trouble.
                    first_seen = case when f.last_seen < excluded.last_seen - interval '1 minute' then excluded.last_seen else f.first_seen end,
                    occurrences = case when f.last_seen < excluded.last_seen - interval '1 minute' then 1 else f.occurrences + 1 end,
                    burst = case when f.last_seen < excluded.last_seen - interval '2 s' then 1 else f.burst + 1 end
          returning f.burst into burst;
        -- The worker before this one had not let go of its origin or slot yet: no reason to wait for the next turn. Unless it is
        -- another that does not let go: then core's own pace is right.
        if burst <= 10 and (entry.sqlstate = '55006' or event ->> 'message' ~ 'is active for PID') then
            perform multihome.restart(entry.subscription_oid);
        end if;
        return 0;
    end if;

    entry.changes := event -> 'changes';
    if redacting then
        select coalesce(jsonb_agg(case when multihome.is_redacted(c ->> 'schemaname', c ->> 'relname') then multihome.only_key(c) else c end order by place), '[]')
          into entry.changes
          from jsonb_array_elements(event -> 'changes') with ordinality as t (c, place);
    end if;
    entry.changes_seen := coalesce((event ->> 'seen')::integer, 0);
    entry.changes_complete := (event ->> 'complete')::boolean;

    if kind = 'skipped' then
        update multihome.log as l
           set changes = entry.changes, changes_seen = entry.changes_seen, changes_complete = entry.changes_complete,
               status = 'skipped', blocking = false, resolved_at = coalesce(l.resolved_at, happened),
               resolved_by = coalesce(l.resolved_by, 'alter subscription'),
               answer = 'skip',
               -- Whoever skipped it may have said why.
               resolution = coalesce(substring(l.resolution from '^(.*)transaction skipped; lost: '), '')
                            || 'transaction skipped; lost: ' || multihome.summary(entry.changes, entry.changes_complete)
         where l.node = entry.node and l.subscription_oid = entry.subscription_oid and l.remote_commit_lsn = entry.remote_commit_lsn
           and (l.blocking or l.status = 'skipped');
        return 0;
    end if;

    -- Which change it is, and of which table.
    select c into change from jsonb_array_elements(event -> 'changes') as c where c ->> 'change_number' = event ->> 'change_number';
    entry.schemaname := coalesce(change ->> 'schemaname', event ->> 'schemaname');
    entry.relname := coalesce(change ->> 'relname', event ->> 'relname');
    if event ? 'copied' then
        entry.relation := (event ->> 'copied')::oid;
        select n.nspname, c.relname into entry.schemaname, entry.relname
          from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = entry.relation;
    else
        entry.relation := to_regclass(quote_ident(entry.schemaname) || '.' || quote_ident(entry.relname));
    end if;
    redacted := redacting and multihome.is_redacted(entry.schemaname, entry.relname);
    -- The log of the peer, which comes to a subscription without origin = none, and is removed here: nobody's data.
    if kind = 'silent' and entry.schemaname = 'multihome' and entry.relname in ('log', 'fault') then
        return 0;
    end if;

    entry.conflict_type := 'apply_error';
    begin
        if kind = 'silent' then
            entry.conflict_type := event ->> 'conflict_type';
        elsif entry.sqlstate = '23505'
              and (event ? 'conflict_type' or to_regclass(quote_ident(event ->> 'schemaname') || '.' || quote_ident(event ->> 'relname'))
                                              in (select entry.relation union all select relid from pg_partition_tree(entry.relation))) then
            if change is null and event ->> 'transaction_kind' = 'streamed' then
                -- Applied out of a file: the rows tell which change of the table it was.
                select c, w into change, way
                  from jsonb_array_elements(event -> 'changes') with ordinality as t (c, place),
                       multihome.rows_in_the_way(entry.relation, c -> 'tuple',
                           case when c ->> 'operation' = 'update' then multihome.typed(entry.relation, c -> 'key') end) as w
                 where c ->> 'operation' in ('insert', 'update') and c ->> 'schemaname' = entry.schemaname and c ->> 'relname' = entry.relname and w <> '[]'
                 order by place limit 1;
            elsif change ->> 'operation' in ('insert', 'update') then
                way := multihome.rows_in_the_way(entry.relation, change -> 'tuple',
                    case when change ->> 'operation' = 'update' then multihome.typed(entry.relation, change -> 'key') end);
            end if;
            if (select count(distinct w ->> 'index') from jsonb_array_elements(way) as w) > 1 then
                entry.conflict_type := 'multiple_unique_conflicts';
            elsif change ->> 'operation' in ('insert', 'update') then
                entry.conflict_type := (change ->> 'operation') || '_exists';
            end if;
        end if;
    exception when others then
        -- A lock, a table of another shape: then without the rows in the way.
        way := '[]';
        if change ->> 'operation' in ('insert', 'update') then
            entry.conflict_type := (change ->> 'operation') || '_exists';
        end if;
    end;

    entry.constraint_name := event ->> 'constraint_name';
    entry.remote_origin := 'pg_' || entry.subscription_oid;
    entry.remote_xid := (event ->> 'remote_xid')::xid;
    entry.remote_commit_ts := (event ->> 'remote_commit_ts')::timestamptz;
    entry.replica_identity := multihome.typed(entry.relation, case when redacted then multihome.only_key(change) else change end -> 'key');
    entry.remote_tuple := case when not redacted then multihome.typed(entry.relation, change -> 'tuple') end;
    entry.local_conflicts := case when way = '[]' then way else multihome.without_places(way, true) end;
    entry.message := multihome.scrubbed(event ->> 'message');
    entry.detail := multihome.scrubbed(event ->> 'detail');
    entry.context := multihome.scrubbed(event ->> 'context');
    if redacted then
        -- Texts may quote values; the untranslated message does not.
        select coalesce(jsonb_agg(w - 'tuple'), '[]') into entry.local_conflicts from jsonb_array_elements(entry.local_conflicts) as w;
        entry.message := coalesce(event ->> 'message_id', entry.message);
        entry.detail := null;
        entry.context := null;
    end if;
    entry.operation := coalesce(change ->> 'operation', event ->> 'operation', case when event ? 'copied' then 'copy' end);
    entry.change_number := coalesce((change ->> 'change_number')::integer, (event ->> 'change_number')::integer);
    entry.fingerprint := (event ->> 'fingerprint')::bigint;
    entry.transaction_kind := event ->> 'transaction_kind';
    entry.first_seen := happened;
    entry.last_seen := happened;
    entry.occurrences := 1;
    entry.blocking := kind = 'error';
    entry.settling := false;
    entry.status := 'open';
    if entry.conflict_type = 'delete_missing' then
        entry.status := 'resolved';
        entry.resolution := 'nothing to do: the row is gone here too';
        entry.resolved_by := 'replication';
        entry.resolved_at := happened;
    end if;

    -- The same again?
    select * into known
      from multihome.log l
     where l.node = entry.node and l.subscription_oid = entry.subscription_oid
       and coalesce(l.remote_commit_lsn, '0/0') = coalesce(entry.remote_commit_lsn, '0/0')
       and l.sqlstate is not distinct from entry.sqlstate
       and (l.change_number is not distinct from entry.change_number
            -- Which one it was the rows told, when they were still there.
            or entry.transaction_kind = 'streamed' and kind = 'error' and (l.change_number is null or entry.change_number is null))
       and l.schemaname is not distinct from entry.schemaname and l.relname is not distinct from entry.relname
       and (kind = 'silent') = (l.conflict_type in ('update_missing', 'delete_missing', 'update_origin_differs', 'delete_origin_differs'))
       and (kind <> 'silent' or l.conflict_type = entry.conflict_type)
       and (entry.remote_commit_lsn is not null or l.message is not distinct from entry.message)
     order by id desc limit 1
       for update;
    if found and known.status <> 'open' and (kind = 'silent' or happened <= known.resolved_at) then
        -- Its transaction comes again because of another change; or it was reported before it was resolved, and is written down
        -- after that.
        update multihome.log as l set occurrences = l.occurrences + 1, last_seen = happened where l.node = entry.node and l.id = known.id;
        return known.id;
    elsif found then
        update multihome.log as l
           set occurrences = l.occurrences + 1, last_seen = happened, message = entry.message,
               detail = entry.detail, context = entry.context,
               replica_identity = coalesce(entry.replica_identity, l.replica_identity), remote_tuple = coalesce(entry.remote_tuple, l.remote_tuple),
               conflict_type = case when entry.local_conflicts = '[]' then l.conflict_type else entry.conflict_type end,
               change_number = coalesce(l.change_number, entry.change_number), fingerprint = coalesce(entry.fingerprint, l.fingerprint),
               -- Rows that were removed for it stay in the log.
               local_conflicts = case when entry.local_conflicts = '[]' or l.settling then l.local_conflicts
                                      when known.status <> 'open' then l.local_conflicts || entry.local_conflicts
                                      else entry.local_conflicts end,
               changes = case when jsonb_array_length(entry.changes) >= jsonb_array_length(l.changes) then entry.changes else l.changes end,
               changes_seen = greatest(l.changes_seen, entry.changes_seen),
               -- What comes again was not resolved, or its resolution was forgotten at a restart.
               status = entry.status, blocking = entry.blocking
         where l.node = entry.node and l.id = known.id;
        if known.status <> 'open' and entry.status = 'open' then
            perform pg_notify('stillebot_conflict', known.id::text);
        end if;
        if known.status = 'resolved' and known.answer = 'local' and entry.blocking then
            perform multihome.exclude(known.subscription_oid, known.remote_commit_lsn, known.change_number, known.fingerprint);
            perform multihome.restart(known.subscription_oid);
        end if;
        return known.id;
    end if;

    entry.id := nextval('multihome.log_id');
    insert into multihome.log select entry.*;
    perform pg_notify('stillebot_conflict', entry.id::text);
    return entry.id;
end $$;
revoke execute on function multihome.record(jsonb) from public;
comment on function multihome.record(jsonb) is
'Writes down what a replication worker reported, and returns the number of the row; 0 if there is none of it. For the collector, in a transaction that stays on this node.';

create function multihome.sweep() returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    update multihome.log as l
       set blocking = false,
           status = case when l.settling then l.status when l.answer = 'skip' then 'skipped' else 'resolved' end,
           resolution = case when l.settling then l.resolution else coalesce(l.resolution, 'apply went on') end,
           resolved_by = case when l.settling then l.resolved_by else coalesce(l.resolved_by, 'replication') end,
           resolved_at = case when l.settling then l.resolved_at else coalesce(l.resolved_at, clock_timestamp()) end
     where l.node = multihome.node_id() and l.status = 'open' and l.blocking
       and (not exists (select from pg_subscription s where s.oid = l.subscription_oid)
            or case when l.transaction_kind = 'copy'
                    then not exists (select from pg_subscription_rel r
                                      where r.srsubid = l.subscription_oid and r.srrelid = l.relation and r.srsubstate not in ('s', 'r'))
                    when l.remote_commit_lsn is not null then multihome.is_past(l.subscription_oid, l.remote_commit_lsn)
                    else exists (select from pg_stat_subscription w
                                  where w.subid = l.subscription_oid and w.relid is null and w.pid is not null and w.last_msg_receipt_time > l.last_seen)
                    end);
    return (select count(*) from multihome.log l where l.node = multihome.node_id() and l.status = 'open' and l.blocking);
end $$;
revoke execute on function multihome.sweep() from public;
comment on function multihome.sweep() is 'Closes conflicts that apply has got past, and returns how many still stop a subscription. For the collector.';

create function multihome.resume() returns bigint
language sql
set search_path = pg_catalog, pg_temp
begin atomic
    select count(*) filter (where multihome.exclude(l.subscription_oid, l.remote_commit_lsn, l.change_number, l.fingerprint))
      from multihome.log l
     where l.node = multihome.node_id() and l.answer = 'local' and l.conflict_type in ('insert_exists', 'update_exists', 'multiple_unique_conflicts')
       and l.remote_commit_lsn is not null and coalesce(multihome.progress(l.subscription_oid) <= l.remote_commit_lsn, true)
       and exists (select from pg_subscription s where s.oid = l.subscription_oid);
end;
revoke execute on function multihome.resume() from public;
comment on function multihome.resume() is 'Says again which changes are to be left out, after a restart of the server. For the collector.';

create function multihome.upkeep() returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    keep interval := current_setting('stillebot.retention')::interval;
    gone bigint;
begin
    delete from multihome.log where node <> multihome.node_id();
    delete from multihome.fault where node <> multihome.node_id();
    if keep = interval '0' then
        return 0;
    end if;
    delete from multihome.log l where l.node = multihome.node_id() and l.status <> 'open' and l.last_seen < now() - keep;
    get diagnostics gone = row_count;
    delete from multihome.fault f where f.node = multihome.node_id() and f.last_seen < now() - keep;
    return gone;
end $$;
revoke execute on function multihome.upkeep() from public;
comment on function multihome.upkeep() is 'Removes rows that are older than stillebot.retention, and what an initial copy brought of other nodes'' logs. For the collector.';

create function public.stillebot_prune(before timestamptz) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    gone bigint;
begin
    if before is null then
        raise null_value_not_allowed using message = 'before must not be null', hint = 'Give the time up to which closed conflicts shall go: now() - interval ''7 days''.';
    end if;
    perform multihome.begin_local('stillebot_prune()');
    delete from multihome.log l where l.node = multihome.node_id() and l.status <> 'open' and l.last_seen < before;
    get diagnostics gone = row_count;
    perform multihome.end_local();
    return gone;
end $$;
revoke execute on function public.stillebot_prune(timestamptz) from public;
comment on function public.stillebot_prune(timestamptz) is
'Deletes closed conflicts that were last seen before then, on this node, and returns how many. Open ones stay. stillebot.retention does this by itself.';

-- Resolving.

create function multihome.open_conflict(conflict_id bigint, verb text) returns multihome.log
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    entry multihome.log;
begin
    perform multihome.begin_local(verb);
    select * into entry from multihome.log l where l.node = multihome.node_id() and l.id = conflict_id for update;
    if not found then
        raise exception using errcode = '02000', message = format('there is no conflict %s', coalesce(conflict_id::text, 'null')),
            hint = 'SELECT id, status, message FROM multihome.conflicts shows them.';
    elsif entry.status <> 'open' then
        raise object_not_in_prerequisite_state using message = format('conflict %s is %s already', conflict_id, entry.status),
            detail = format('%s, by %s at %s.', entry.resolution, entry.resolved_by, entry.resolved_at);
    elsif not exists (select from pg_subscription s where s.oid = entry.subscription_oid) then
        raise object_not_in_prerequisite_state using message = format('the subscription of conflict %s was dropped', conflict_id);
    elsif entry.blocking and multihome.is_past(entry.subscription_oid, entry.remote_commit_lsn) then
        raise object_not_in_prerequisite_state using message = format('conflict %s is over: apply went on', conflict_id);
    end if;
    return entry;
end $$;
revoke execute on function multihome.open_conflict(bigint, text) from public;
comment on function multihome.open_conflict(bigint, text) is 'A conflict that can be resolved, locked, in a transaction that stays on this node; or an error that says why not.';

create function multihome.go_on(entry multihome.log) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    -- disable_on_error; by hand nobody disables a subscription that an error has stopped already.
    if exists (select from pg_subscription s where s.oid = entry.subscription_oid and not s.subenabled and s.subdisableonerr) then
        execute format('alter subscription %I enable', (select subname from pg_subscription where oid = entry.subscription_oid));
    end if;
    perform multihome.restart(entry.subscription_oid);
end $$;
revoke execute on function multihome.go_on(multihome.log) from public;
comment on function multihome.go_on(multihome.log) is 'Has the subscription of a conflict try again at once, and enables it if an error had it disabled.';

create function public.stillebot_skip(conflict_id bigint) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    entry multihome.log := multihome.open_conflict(conflict_id, 'stillebot_skip()');
    latest bigint;
begin
    if not entry.blocking then
        raise object_not_in_prerequisite_state using message = format('conflict %s stops nothing, so there is nothing to skip', conflict_id),
            hint = 'stillebot_resolve() settles it.';
    elsif entry.remote_commit_lsn is null then
        raise object_not_in_prerequisite_state using message = format('conflict %s is of no transaction that could be skipped', conflict_id),
            hint = case entry.transaction_kind when 'copy' then 'Mend the cause; the initial copy is tried again by itself.' else 'Mend the cause; apply tries again by itself.' end;
    end if;
    select l.id into latest from multihome.log l
     where l.node = entry.node and l.subscription_oid = entry.subscription_oid and l.blocking and l.status = 'open' and l.remote_commit_lsn is not null
     order by l.last_seen desc, l.id desc limit 1;
    if (select l.remote_commit_lsn from multihome.log l where l.node = entry.node and l.id = latest) <> entry.remote_commit_lsn then
        raise object_not_in_prerequisite_state using message = format('conflict %s is not the one that stops the subscription now', conflict_id),
            hint = format('That is conflict %s.', latest);
    end if;
    execute format('alter subscription %I skip (lsn = %L)', (select subname from pg_subscription where oid = entry.subscription_oid), entry.remote_commit_lsn);
    update multihome.log as l
       set status = 'skipped', answer = 'skip', resolved_by = session_user, resolved_at = clock_timestamp(), blocking = false,
           resolution = 'transaction skipped; lost: ' || multihome.summary(l.changes, false)
     where l.node = entry.node and l.subscription_oid = entry.subscription_oid and l.remote_commit_lsn = entry.remote_commit_lsn and l.blocking;
    perform multihome.go_on(entry);
    perform multihome.end_local();
    return format('the whole transaction at %s is skipped on this node; lost: %s', entry.remote_commit_lsn, multihome.summary(entry.changes, false));
end $$;
revoke execute on function public.stillebot_skip(bigint) from public;
comment on function public.stillebot_skip(bigint) is
'Skips the whole remote transaction that a conflict stopped, if it still stops its subscription, and lets the subscription go on (enabled again, if disable_on_error had disabled it).
Returns what is lost; afterwards multihome.conflict_changes() has all of it. Prefer stillebot_resolve(), which keeps the rest of the transaction. Errors: 02000 no such conflict, 55000 closed, over, or not the one.';

create function multihome.raw_change(entry multihome.log) returns jsonb
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
    select c from jsonb_array_elements(entry.changes) as c where (c ->> 'change_number')::integer = entry.change_number limit 1;
end;
revoke execute on function multihome.raw_change(multihome.log) from public;
comment on function multihome.raw_change(multihome.log) is 'The change of a conflict, values as text.';

create function multihome.present_way(entry multihome.log) returns jsonb
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    change jsonb := multihome.raw_change(entry);
    -- For a redacted table the key is all there is.
    tuple jsonb := coalesce(change -> 'tuple', change -> 'key');
begin
    if tuple is null or to_regclass(quote_ident(entry.schemaname) || '.' || quote_ident(entry.relname)) is distinct from entry.relation then
        raise object_not_in_prerequisite_state using message = format('the incoming row of conflict %s is not known', entry.id),
            hint = 'Change the row in the way by hand, or skip the transaction: stillebot_skip().';
    elsif exists (select from jsonb_each(tuple) as t where t.value ? 'binary' and multihome.is_cut(t.value)) then
        raise object_not_in_prerequisite_state using message = format('the incoming row of conflict %s came in binary', entry.id),
            hint = 'ALTER SUBSCRIPTION .. SET (binary = off) has it come again as text. Or keep local, or skip the transaction: stillebot_skip().';
    end if;
    return multihome.rows_in_the_way(entry.relation, tuple,
        case when entry.operation = 'update' then multihome.typed(entry.relation, change -> 'key') end);
end $$;
revoke execute on function multihome.present_way(multihome.log) from public;
comment on function multihome.present_way(multihome.log) is 'The rows that are in the way of a conflict''s change now, as multihome.rows_in_the_way() returns them.';

create function multihome.as_apply(relation oid, query text, first text default null, second text default null) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set session_replication_role = replica
as $$
begin
    return multihome.as_role(multihome.owner_of(relation), query, first, second);
end $$;
revoke execute on function multihome.as_apply(oid, text, text, text) from public;
comment on function multihome.as_apply(oid, text, text, text) is
'Changes rows as the apply worker would: as the owner of the table, with triggers that are ENABLE REPLICA or ENABLE ALWAYS only, and without foreign keys. Returns what the query does.';

create function multihome.refuse_if_referenced(relation oid, tuple jsonb) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    foreign_key record;
begin
    for foreign_key in
        select c.conname, c.conrelid, string_agg(format('parent.%I operator(%I.%s) child.%I', p.attname, n.nspname, o.oprname, f.attname), ' and ') as condition
          from pg_constraint c
         cross join unnest(c.conkey, c.confkey, c.conpfeqop) as k (child, parent, equal)
          join pg_attribute f on f.attrelid = c.conrelid and f.attnum = k.child
          join pg_attribute p on p.attrelid = c.confrelid and p.attnum = k.parent
          join pg_operator o on o.oid = k.equal
          join pg_namespace n on n.oid = o.oprnamespace
         where c.contype = 'f' and c.confrelid = refuse_if_referenced.relation and c.conparentid = 0
         group by c.oid, c.conname, c.conrelid
    loop
        if multihome.as_role(multihome.owner_of(foreign_key.conrelid),
               format('select ''yes'' from %s as child, jsonb_populate_record(null::%s, $1::jsonb) as parent where %s limit 1',
                      foreign_key.conrelid::regclass, relation::regclass, foreign_key.condition), tuple::text) is not null then
            raise foreign_key_violation using message = format('the row in the way is referenced from table %s', foreign_key.conrelid::regclass),
                detail = format('Foreign key "%s".', foreign_key.conname),
                hint = 'Change the rows that reference it first, or keep the local row.';
        end if;
    end loop;
end $$;
revoke execute on function multihome.refuse_if_referenced(oid, jsonb) from public;
comment on function multihome.refuse_if_referenced(oid, jsonb) is 'An error if a row that is to go, and not to be replaced by one with the same key, is referenced by a foreign key.';

create function public.stillebot_resolve(conflict_id bigint, keep text) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set datestyle = iso
set timezone = 'UTC'
set intervalstyle = postgres
set bytea_output = hex
set extra_float_digits = 1
as $$
declare
    entry multihome.log;
    change jsonb;
    way jsonb;
    kept text := keep;
    reason text := '';
    hit jsonb;
    gone integer := 0;
    later multihome.log;
    advice text;
begin
    if keep is null or keep not in ('local', 'remote', 'newest') then
        raise invalid_parameter_value using message = format('keep must be local, remote or newest, not %s', coalesce(quote_literal(keep), 'null'));
    end if;
    entry := multihome.open_conflict(conflict_id, 'stillebot_resolve()');
    change := multihome.raw_change(entry);

    if entry.conflict_type = 'update_missing' then
        -- The publisher went on from there: what it has now is in the last of them, or nowhere.
        select * into later
          from multihome.log l
         where l.node = entry.node and l.subscription_oid = entry.subscription_oid and l.relation = entry.relation and l.id <> entry.id
           and l.conflict_type in ('update_missing', 'delete_missing')
           and (l.remote_commit_lsn, l.change_number) > (entry.remote_commit_lsn, entry.change_number)
           and l.replica_identity in (entry.replica_identity, (select jsonb_object_agg(name, entry.remote_tuple -> name) from unnest(multihome.key_columns(entry.relation)) as name))
         order by l.remote_commit_lsn desc, l.change_number desc
         limit 1;
        if later.status = 'open' or later.id is not null and kept <> 'local' then
            raise object_not_in_prerequisite_state using message = format('the row of conflict %s was changed again on the other node', conflict_id),
                detail = format('The last that is known of it is in conflict %s, %s, which is %s.', later.id, later.conflict_type, later.status),
                hint = case later.status when 'open' then 'Settle that one; this one goes with it.' else 'Keep local; compare the row on both nodes.' end;
        end if;
        if kept = 'newest' then
            raise object_not_in_prerequisite_state using message = 'when the local row was deleted is not known, so neither is which is newer',
                hint = 'Say local (it stays deleted) or remote (it comes back).';
        elsif kept = 'remote' then
            if change -> 'tuple' is null or change ? 'incomplete' then
                raise object_not_in_prerequisite_state using message = format('the incoming row of conflict %s is not complete', conflict_id),
                    detail = 'Values that did not change and are stored out of line are not sent; values longer than stillebot.max_tuple_size are not kept.',
                    hint = 'On the other node update the row once more after inserting its key here, or keep local and delete it there.';
            end if;
            perform multihome.insert_row(entry.relation, change -> 'tuple');
            advice := 'on the other node the row is gone too, if the DELETE made here has come there: then update it here once more, and keep remote there';
        else
            advice := case when later.id is null then 'on the other node, delete the row that this node does not have' else 'nothing to do on the other node' end;
        end if;
        update multihome.log as l
           set status = 'resolved', blocking = false, answer = kept, resolved_by = session_user, resolved_at = clock_timestamp(),
               resolution = case kept when 'remote' then 'kept remote: row inserted' else 'kept local: the row stays deleted' end
         where l.node = entry.node and l.id = entry.id;
        update multihome.log as l
           set status = 'resolved', resolution = format('settled with conflict %s, of the same row', conflict_id), resolved_by = session_user, resolved_at = clock_timestamp()
         where l.node = entry.node and l.subscription_oid = entry.subscription_oid and l.relation = entry.relation and l.status = 'open'
           and l.conflict_type = 'update_missing' and l.replica_identity = entry.replica_identity
           and (l.remote_commit_lsn, l.change_number) < (entry.remote_commit_lsn, entry.change_number);
        perform multihome.end_local();
        return format('%s; %s', case kept when 'remote' then 'the incoming row was inserted here' else 'the row stays deleted here' end, advice);
    elsif entry.conflict_type not in ('insert_exists', 'update_exists', 'multiple_unique_conflicts') then
        raise object_not_in_prerequisite_state using message = format('conflict %s, %s, has no two versions to choose from', conflict_id, entry.conflict_type),
            detail = entry.message,
            hint = 'Mend the cause, and apply goes on by itself; or skip the whole transaction: stillebot_skip().';
    end if;

    way := case when kept = 'local' then '[]' else multihome.present_way(entry) end;
    if kept = 'newest' then
        kept := multihome.newest(entry, way);
        reason := ' (the newest)';
    end if;
    if kept = 'local' then
        if entry.transaction_kind not in ('plain', 'prepared') or entry.fingerprint is null then
            raise object_not_in_prerequisite_state using message = format('one change of a %s transaction cannot be left out', coalesce(entry.transaction_kind, 'unknown')),
                hint = 'Keep remote, or skip the whole transaction: stillebot_skip(). ALTER SUBSCRIPTION .. SET (streaming = off) avoids it in future.';
        end if;
        if not multihome.exclude(entry.subscription_oid, entry.remote_commit_lsn, entry.change_number, entry.fingerprint) then
            raise program_limit_exceeded using message = 'too many changes are waited for to be left out', hint = 'Try again when replication has gone on.';
        end if;
        advice := 'on the other node, keep its remote row (this one): its own shall go';
    elsif way = '[]' then
        -- The row in the way has gone since, or cannot be found: then this is not over, and whether it is, apply will tell.
        perform multihome.go_on(entry);
        perform multihome.end_local();
        return format('no row in the way of conflict %s can be seen now; apply tries again at once, and closes it if it goes on', conflict_id);
    else
        for hit in select r from jsonb_array_elements(way) as r loop
            if hit -> 'key' is distinct from multihome.typed(entry.relation, change -> 'key') then
                perform multihome.refuse_if_referenced(entry.relation, hit -> 'tuple');
            end if;
            gone := gone + coalesce(multihome.as_apply(entry.relation,
                format('with gone as (delete from %s as t where t.tableoid = ($1::jsonb ->> ''tableoid'')::oid and t.ctid = ($1::jsonb ->> ''ctid'')::tid and t.xmin::text = $1::jsonb ->> ''xid'' returning 1) select count(*)::text from gone', entry.relation::regclass),
                hit::text)::integer, 0);
        end loop;
        -- A row in the way of two indexes is there twice, and goes once.
        if gone <> (select count(distinct (r -> 'tableoid', r -> 'ctid')) from jsonb_array_elements(way) as r) then
            raise serialization_failure using message = 'the row in the way was changed meanwhile', hint = 'Try again.';
        end if;
        advice := 'on the other node, keep its local row (the one that comes here): its remote row shall be left out';
    end if;
    update multihome.log as l
       set status = 'resolved', blocking = false, answer = kept, resolved_by = session_user, resolved_at = clock_timestamp(),
           -- What goes is kept here, and whole; of a redacted table, its key.
           local_conflicts = case when way = '[]' or kept = 'local' then l.local_conflicts
                                  when multihome.is_redacted(l.schemaname, l.relname)
                                  then (select jsonb_agg(r - 'tuple') from jsonb_array_elements(multihome.without_places(way, false)) as r)
                                  else multihome.without_places(way, false) end,
           resolution = case when kept = 'local' then format('kept local%s: the incoming %s was left out', reason, l.operation)
                             when multihome.is_redacted(l.schemaname, l.relname) then format('kept remote%s: %s local rows removed, their keys are in local_conflicts', reason, gone)
                             else format('kept remote%s: %s local rows removed, kept here in local_conflicts', reason, gone) end
     where l.node = entry.node and l.id = entry.id;
    perform multihome.go_on(entry);
    perform multihome.end_local();
    return format('%s%s; %s', case kept when 'local' then format('the incoming %s is left out here', entry.operation)
                                        else format('%s local rows were removed here, and the incoming %s goes in', gone, entry.operation) end, reason, advice);
end $$;
revoke execute on function public.stillebot_resolve(bigint, text) from public;
comment on function public.stillebot_resolve(bigint, text) is
'Resolves one conflict on this node, without losing the rest of the remote transaction. keep: remote, the local rows in the way go (they stay in the log) and the incoming row comes;
local, the incoming change is left out; newest, by commit time. For update_missing: remote inserts the row, local leaves it deleted.
Returns what was done and what must be done on the other node; the agent does both. Works while down; does not replicate. Errors: 22023 keep, 02000 no such conflict, 55000 cannot be resolved so, 23503 referenced.';

create function multihome.newest(entry multihome.log, way jsonb) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    here timestamptz;
    unknown boolean;
    theirs jsonb := multihome.typed(entry.relation, multihome.raw_change(entry) -> 'tuple');
begin
    select max((r ->> 'commit_ts')::timestamptz), bool_or(r ->> 'commit_ts' is null) into here, unknown from jsonb_array_elements(way) as r;
    if way = '[]' then
        return 'remote';
    elsif unknown or entry.remote_commit_ts is null then
        raise object_not_in_prerequisite_state using message = 'when the local row was committed is not known',
            detail = 'Commit times are kept only with track_commit_timestamp = on, and not for ever.',
            hint = 'Say local or remote.';
    end if;
    -- Both nodes compare the same two versions and must come to the same end: a tie is for the row whose text is greater.
    return case when entry.remote_commit_ts > here then 'remote'
                when entry.remote_commit_ts < here then 'local'
                -- Of the local row what the other node has sent of its own, which leaves out generated columns.
                when theirs::text collate "C" > (select max((select jsonb_object_agg(name, r -> 'tuple' -> name) from jsonb_object_keys(theirs) as name)::text collate "C")
                                                   from jsonb_array_elements(way) as r) then 'remote'
                else 'local' end;
end $$;
revoke execute on function multihome.newest(multihome.log, jsonb) from public;
comment on function multihome.newest(multihome.log, jsonb) is 'Which version is newer, local or remote.';

create function multihome.insert_row(relation oid, tuple jsonb) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform multihome.as_apply(relation, (
        select format('with put as (insert into %s (%s) overriding system value select %s from jsonb_populate_record(null::%s, $1::jsonb) as r returning 1) select count(*)::text from put',
                      relation::regclass, string_agg(format('%I', a.attname), ', ' order by a.attnum), string_agg(format('r.%I', a.attname), ', ' order by a.attnum), relation::regclass)
          from pg_attribute a
         where a.attrelid = relation and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' and tuple ? a.attname), tuple::text);
end $$;
revoke execute on function multihome.insert_row(oid, jsonb) from public;
comment on function multihome.insert_row(oid, jsonb) is 'Inserts a row as the apply worker would. Columns that are not in the object get their defaults.';

-- Resolving on all nodes: for the agent.

create function multihome.make_room(conflict_id bigint, assignments jsonb) returns setof jsonb
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set datestyle = iso
set timezone = 'UTC'
set intervalstyle = postgres
set bytea_output = hex
set extra_float_digits = 1
as $$
declare
    entry multihome.log := multihome.open_conflict(conflict_id, 'multihome.make_room()');
    hit jsonb;
    changed text;
begin
    for hit in select distinct on (r -> 'tableoid', r -> 'ctid') r from jsonb_array_elements(multihome.present_way(entry)) as r loop
        changed := multihome.as_apply(entry.relation, (
            select format('with t as (update %s as t set %s from jsonb_populate_record(null::%s, $1::jsonb) as a where t.tableoid = ($2::jsonb ->> ''tableoid'')::oid and t.ctid = ($2::jsonb ->> ''ctid'')::tid and t.xmin::text = $2::jsonb ->> ''xid'' returning 1) select count(*)::text from t',
                          entry.relation::regclass, string_agg(format('%1$I = a.%1$I', key), ', '), entry.relation::regclass)
              from jsonb_object_keys(assignments) as key), assignments::text, hit::text);
        if changed is distinct from '1' then
            raise serialization_failure using message = 'the row in the way was changed meanwhile', hint = 'Try again.';
        end if;
        return next hit -> 'tuple';
    end loop;
    update multihome.log as l
       set settling = true, resolution = format('made room: %s on the rows in the way', assignments), resolved_by = session_user
     where l.node = entry.node and l.id = entry.id;
    perform multihome.go_on(entry);
    perform multihome.end_local();
end $$;
revoke execute on function multihome.make_room(bigint, jsonb) from public;
comment on function multihome.make_room(bigint, jsonb) is
'Sets columns of the local rows in the way of a conflict, on this node only and also while it is down, so that the incoming row fits beside them, and has apply go on at once.
Returns the rows as they were. The conflict stays open until multihome.settle().';

create function multihome.taking_part(conflict_id bigint, key jsonb) returns multihome.log
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    entry multihome.log;
begin
    select * into entry from multihome.log l where l.node = multihome.node_id() and l.id = conflict_id;
    if not found then
        raise exception using errcode = '02000', message = format('there is no conflict %s', coalesce(conflict_id::text, 'null'));
    elsif key is distinct from entry.replica_identity and not exists (select from jsonb_array_elements(entry.local_conflicts) as r where r -> 'key' = key)
          -- Where an update moves the row to.
          and key is distinct from (select jsonb_object_agg(name, entry.remote_tuple -> name) from unnest(multihome.key_columns(entry.relation)) as name) then
        raise insufficient_privilege using message = format('the row %s takes no part in conflict %s', key, conflict_id);
    end if;
    return entry;
end $$;
revoke execute on function multihome.taking_part(bigint, jsonb) from public;
comment on function multihome.taking_part(bigint, jsonb) is 'A conflict, if a row with that key takes part in it; otherwise an error.';

create function multihome.by_key(relation oid, alias text, parameter text) returns text
language sql stable
set search_path = pg_catalog, pg_temp
begin atomic
    select string_agg(format('%1$I.%2$I %5$s (select k.%2$I from jsonb_populate_record(null::%3$s, %4$s::jsonb) as k)',
                             alias, name, relation::regclass, parameter, multihome.equality(multihome.key_index(relation), place::integer)), ' and ')
      from unnest(multihome.key_columns(relation)) with ordinality as k (name, place);
end;
revoke execute on function multihome.by_key(oid, text, text) from public;
comment on function multihome.by_key(oid, text, text) is 'A condition: the row called alias has the key that a JSON object, a parameter of the query, describes.';

create function multihome.versions(conflict_id bigint, keys jsonb)
returns table (key jsonb, tuple jsonb, commit_ts timestamptz, origin text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set datestyle = iso
set timezone = 'UTC'
set intervalstyle = postgres
set bytea_output = hex
set extra_float_digits = 1
as $$
declare
    entry multihome.log;
    wanted jsonb;
    version jsonb;
begin
    for wanted in select k from jsonb_array_elements(keys) as k loop
        entry := multihome.taking_part(conflict_id, wanted);
        version := multihome.as_role(multihome.owner_of(entry.relation), format(
            'select jsonb_build_object(''tuple'', to_jsonb(t), ''xid'', t.xmin::text::bigint)::text from %s as t where %s',
            entry.relation::regclass, multihome.by_key(entry.relation, 't', '$1')), wanted::text)::jsonb;
        if version is not null then
            select c.commit_ts, case when c.origin in (0, 65535) then 'local' else coalesce((select roname from pg_replication_origin where roident = c.origin), c.origin::text) end
              into commit_ts, origin
              from multihome.commit_of((version ->> 'xid')::xid) as c;
            key := wanted;
            tuple := version -> 'tuple';
            return next;
        end if;
    end loop;
end $$;
revoke execute on function multihome.versions(bigint, jsonb) from public;
comment on function multihome.versions(bigint, jsonb) is
'The rows with these keys, an array of objects, as they are on this node now. Only rows that take part in the conflict; rows that are not there are left out.';

create function multihome.assign(conflict_id bigint, key jsonb, assignments jsonb) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set datestyle = iso
set timezone = 'UTC'
set intervalstyle = postgres
set bytea_output = hex
set extra_float_digits = 1
as $$
declare
    entry multihome.log := multihome.taking_part(conflict_id, key);
begin
    return multihome.as_role(multihome.owner_of(entry.relation), (
        -- A value that is stored out of line and does not change would not be sent: by way of text every value is made anew.
        select format('with t as (update %s as t set %s from jsonb_populate_record(null::%s, $2::jsonb) as a where %s returning 1) select count(*)::text from t',
                      entry.relation::regclass,
                      string_agg(format(case when assignments ? a.attname then '%1$I = a.%1$I'
                                             when a.attlen = -1 then '%1$I = t.%1$I::text::%2$s'
                                             else '%1$I = t.%1$I' end, a.attname, format_type(a.atttypid, a.atttypmod)), ', '),
                      entry.relation::regclass, multihome.by_key(entry.relation, 't', '$1'))
          from pg_attribute a
         where a.attrelid = entry.relation and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' and a.attidentity <> 'a'),
        key::text, assignments::text) = '1';
end $$;
revoke execute on function multihome.assign(bigint, jsonb, jsonb) from public;
comment on function multihome.assign(bigint, jsonb, jsonb) is
'An ordinary UPDATE, which replicates, of one row that takes part in a conflict; refused while down. All of the row is sent, so the copies of all nodes become equal; assignments {} changes nothing else.
False: there is no such row.';

create function multihome.remove(conflict_id bigint, key jsonb) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    entry multihome.log := multihome.taking_part(conflict_id, key);
begin
    return multihome.as_role(multihome.owner_of(entry.relation),
        format('with t as (delete from %s as t where %s returning 1) select count(*)::text from t', entry.relation::regclass, multihome.by_key(entry.relation, 't', '$1')),
        key::text) = '1';
end $$;
revoke execute on function multihome.remove(bigint, jsonb) from public;
comment on function multihome.remove(bigint, jsonb) is 'An ordinary DELETE, which replicates, of one row that takes part in a conflict; refused while down. False: there is no such row.';

create function multihome.put(conflict_id bigint, tuple jsonb) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set datestyle = iso
set timezone = 'UTC'
set intervalstyle = postgres
set bytea_output = hex
set extra_float_digits = 1
as $$
declare
    key jsonb;
    entry multihome.log;
begin
    perform multihome.begin_local('multihome.put()');
    select l.replica_identity, l.relation into key, entry.relation from multihome.log l where l.node = multihome.node_id() and l.id = conflict_id;
    select jsonb_object_agg(name, tuple -> name) into key from unnest(multihome.key_columns(entry.relation)) as name;
    entry := multihome.taking_part(conflict_id, key);
    perform multihome.as_apply(entry.relation,
        format('with t as (delete from %s as t where %s returning 1) select count(*)::text from t', entry.relation::regclass, multihome.by_key(entry.relation, 't', '$1')), key::text);
    perform multihome.insert_row(entry.relation, tuple);
    perform multihome.end_local();
end $$;
revoke execute on function multihome.put(bigint, jsonb) from public;
comment on function multihome.put(bigint, jsonb) is
'Makes the row of this node with the key of a row equal that row, as to_jsonb() wrote it, if it takes part in the conflict. On this node only; also while it is down.';

create function multihome.settle(conflict_id bigint, resolution text, by_whom text default null) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    settled boolean;
begin
    perform multihome.begin_local('multihome.settle()');
    update multihome.log as l
       set status = case l.status when 'open' then 'resolved' else l.status end, blocking = false, settling = false,
           resolution = settle.resolution || case when l.status <> 'open' and l.answer is not null then '; ' || l.resolution else '' end,
           resolved_by = coalesce(by_whom, session_user), resolved_at = clock_timestamp()
     where l.node = multihome.node_id() and l.id = conflict_id
       and (l.status = 'open' or l.answer is not null and l.resolved_by = session_user);
    settled := found;
    perform multihome.end_local();
    return settled;
end $$;
revoke execute on function multihome.settle(bigint, text, text) from public;
comment on function multihome.settle(bigint, text, text) is
'Marks an open conflict as resolved, and says how and by whom; of one that the same role has just resolved or skipped it says the reason. False: it was closed otherwise, or is not there.';

create function multihome.note(conflict_id bigint, resolution text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform multihome.begin_local('multihome.note()');
    update multihome.log as l set resolution = note.resolution where l.node = multihome.node_id() and l.id = conflict_id and l.status = 'open';
    perform multihome.end_local();
end $$;
revoke execute on function multihome.note(bigint, text) from public;
comment on function multihome.note(bigint, text) is 'Writes into an open conflict what was tried. It stays open.';

create function multihome.restart_apply(subscription text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform multihome.restart(s.oid)
       from pg_subscription s join pg_database d on d.oid = s.subdbid
      where d.datname = current_database() and s.subname = subscription;
    if not found then
        raise undefined_object using message = format('there is no subscription %s in this database', quote_nullable(subscription));
    end if;
end $$;
revoke execute on function multihome.restart_apply(text) from public;
comment on function multihome.restart_apply(text) is 'Has an apply worker that has ended with an error started at once, instead of wal_retrieve_retry_interval after its last start.';

-- Status, with what is new.

create function multihome.health(out open_conflicts bigint, out faults text[], out warnings text[])
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
    select (select count(*) from multihome.log l where l.node = multihome.node_id() and l.status = 'open'),
           (select array_agg(format('%s: SQLSTATE %s, %s times since %s', f.subscription, f.sqlstate, f.occurrences, f.first_seen) order by f.subscription, f.sqlstate)
              from multihome.faults f where not f.healed),
           (select array_agg(format('subscription %I applies in parallel, where conflicts are seen without their rows: ALTER SUBSCRIPTION %I SET (streaming = on)', s.subname, s.subname) order by s.subname)
              from pg_subscription s join pg_database d on d.oid = s.subdbid
             where d.datname = current_database() and s.substream = 'p')
           || (select array_agg(format('subscription %I is disabled by any error, a lost connection included: ALTER SUBSCRIPTION %I SET (disable_on_error = false)', s.subname, s.subname) order by s.subname)
                 from pg_subscription s join pg_database d on d.oid = s.subdbid
                where d.datname = current_database() and s.subdisableonerr)
           || (select array_agg('conflicts are not being recorded: no collector is running; is there a free place among max_worker_processes?'::text)
                 from pg_database d
                where d.datname = current_database() and multihome.collector() is null
                  and exists (select from pg_subscription s join pg_stat_subscription w on w.subid = s.oid where s.subdbid = d.oid and w.pid is not null));
end;
comment on function multihome.health() is 'What stillebot_status() says of replication: numbers, SQLSTATEs and names, no data.';

drop function public.stillebot_status();
create function public.stillebot_status(
    out node text,
    out state text,
    out since timestamptz,
    out by_whom text,
    out reason text,
    out writers integer,
    out lsn pg_lsn,
    out open_conflicts bigint,
    out subscriptions integer,
    out subscriptions_enabled integer,
    out subscriptions_working integer,
    out subscription_lag interval,
    out events_dropped bigint,
    out faults text[],
    out warnings text[]
)
language sql volatile parallel restricted
begin atomic
    select s.state ->> 'node',
           s.state ->> 'state',
           (s.state ->> 'since')::timestamptz,
           s.state ->> 'by',
           s.state ->> 'reason',
           (s.state ->> 'writers')::integer,
           case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end,
           h.open_conflicts,
           sub.subscriptions,
           sub.enabled,
           sub.working,
           sub.lag,
           multihome.dropped(),
           h.faults,
           h.warnings
      from (select multihome.state()) as s (state),
           multihome.health() as h,
           (select count(*)::integer,
                   count(*) filter (where pg_subscription.subenabled)::integer,
                   count(worker.pid)::integer,
                   max(clock_timestamp() - worker.last_msg_receipt_time)
              from pg_subscription
              join pg_database on pg_database.oid = pg_subscription.subdbid
              left join pg_stat_subscription as worker
                     on worker.subid = pg_subscription.oid and worker.relid is null and worker.leader_pid is null
             where pg_database.datname = current_database()) as sub (subscriptions, enabled, working, lag);
end;
comment on function public.stillebot_status() is
'One row on this database. node: the setting stillebot.node. state: up or down, since when, by whom and why. writers: transactions that could write, now.
lsn: the current WAL position. subscriptions: how many there are, are enabled, and have a running apply worker. subscription_lag: the longest time since such a worker
heard from its peer (an idle peer speaks every half wal_sender_timeout). open_conflicts: open rows of multihome.conflicts. events_dropped: events that could not be recorded since the server started.
faults: troubles that are no fault of the data and have not ended, see multihome.faults. warnings: what about the subscriptions should be changed, and how.';
