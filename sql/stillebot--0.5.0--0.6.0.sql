-- stillebot 0.6.0: what happens when a schema drifts, is said where it is looked for.

\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit

-- The log of conflicts: what it must not tell, which worker met it, and what each answer needs.

alter table multihome.log add column copied oid, add column tuple_complete boolean, add column remedy text;
create index log_settling on multihome.log (node) where settling;

create or replace view multihome.conflicts as
    select id, subscription, conflict_type, schemaname, relname, constraint_name, remote_origin, remote_xid, remote_commit_lsn,
           remote_commit_ts, replica_identity, remote_tuple, local_conflicts, sqlstate, message, detail, context, first_seen,
           last_seen, occurrences, status, resolution, resolved_by, resolved_at, operation, change_number, transaction_kind,
           changes_complete, blocking, tuple_complete, remedy
      from multihome.log
     where node = multihome.node_id();
comment on column multihome.conflicts.tuple_complete is
'Whether remote_tuple is all of the row: not, if the publisher left out long values that did not change, or if values are cut or binary. Null: there is none, or it was recorded by an older version.';
comment on column multihome.conflicts.remedy is
'Of an apply_error that comes of tables that differ between the nodes: statements, on this node, that make what it lacks or has of another type; run them, and apply goes on. From what the publisher sends of a
table: names, types and key. Defaults and constraints are in stillebot-agent conflicts show and schema diff. Null: tables do not differ in that, or it is an initial copy.';
comment on column multihome.conflicts.remote_origin is
'The replication origin of the subscription, as in pg_replication_origin; of a table that is being copied, that of its copy.';

create function multihome.is_past(entry multihome.log) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
-- A copy has a worker and an origin of its own, until it has caught up with the subscription.
return case when coalesce(entry.copied, case when entry.transaction_kind = 'copy' then entry.relation end) is null
            then multihome.is_past(entry.subscription_oid, entry.remote_commit_lsn)
            else not exists (select from pg_subscription_rel r
                              where r.srsubid = entry.subscription_oid and r.srrelid = coalesce(entry.copied, entry.relation) and r.srsubstate not in ('s', 'r'))
                 or coalesce((select o.remote_lsn > entry.remote_commit_lsn from pg_replication_origin_status o
                               where o.external_id = format('pg_%s_%s', entry.subscription_oid, entry.copied)), false) end;
revoke execute on function multihome.is_past(multihome.log) from public;
comment on function multihome.is_past(multihome.log) is 'Whether the worker that met a conflict has got past its transaction, or has ended the copy that it was at.';

create function multihome.is_open(conflict_id bigint) returns boolean
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
    select exists (select from multihome.log as l
                    where l.node = multihome.node_id() and l.id = conflict_id and l.status = 'open' and not (l.blocking and multihome.is_past(l)));
end;
revoke execute on function multihome.is_open(bigint) from public;
comment on function multihome.is_open(bigint) is
'Whether a conflict is still to be answered: it is not closed, nor has apply gone on without its having been noted yet. For the agent, which answers what others may have answered.';

create function multihome.is_here(relation oid, key jsonb) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    condition text := multihome.by_key(relation, 't', '$1');
begin
    if condition is null or key is null or not key ?& multihome.key_columns(relation) then
        return false;
    end if;
    return multihome.as_role(multihome.owner_of(relation), format('select ''yes'' from %s as t where %s limit 1', relation::regclass, condition), key::text) is not null;
exception when others then
    return true; -- A lock, a function that raises: then it is said rather than not.
end $$;
revoke execute on function multihome.is_here(oid, jsonb) from public;
comment on function multihome.is_here(oid, jsonb) is 'Whether a table has a row with that key. False if it has no key; true if it cannot be looked at.';

create or replace function multihome.is_redacted(schemaname text, relname text) returns boolean
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    -- A partition is what its parents are.
    select coalesce(bool_or(trim(t.pattern) in ('*', names.schemaname || '.*', names.schemaname || '.' || names.relname)), false)
      from string_to_table(current_setting('stillebot.redact'), ',') as t (pattern),
           (select is_redacted.schemaname, is_redacted.relname
            union all
            select n.nspname::text, c.relname::text
              from pg_partition_ancestors(to_regclass(quote_ident(is_redacted.schemaname) || '.' || quote_ident(is_redacted.relname))) as a
              join pg_class c on c.oid = a.relid
              join pg_namespace n on n.oid = c.relnamespace) as names (schemaname, relname);
end;
comment on function multihome.is_redacted(text, text) is 'Whether only keys of a table go into the log: stillebot.redact, which names it or a table that it is a partition of.';

create or replace function multihome.scrubbed(text text) returns text
language sql immutable parallel safe
set search_path = pg_catalog, pg_temp
-- As libpq reads them: up to a blank that is neither quoted nor escaped.
return regexp_replace(regexp_replace(text, '(password\s*=\s*)(''([^''\\]|\\.)*(''|$))?(\\.|[^\s\\])*', '\1***', 'gi'), '(://[^:/@\s]*:)[^@\s]+@', '\1***@', 'g');
comment on function multihome.scrubbed(text) is 'A text without the passwords of connection strings.';

create or replace function multihome.commit_of(xid xid, out commit_ts timestamptz, out origin oid)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if current_setting('track_commit_timestamp')::boolean then
        select t.timestamp, t.roident into commit_ts, origin from pg_xact_commit_timestamp_origin(xid) as t;
        -- An initial copy commits rows of any age, with an origin of its own that is gone afterwards.
        if origin not in (0, 65535) and not exists (select from pg_replication_origin o where o.roident = origin and o.roname !~ '^pg_\d+_\d+$') then
            commit_ts := null;
        end if;
    end if;
end $$;
comment on function multihome.commit_of(xid) is
'When a transaction was committed and through which replication origin it came (0 or 65535: made here); nulls if that is not known any more, or never was. Of an initial copy the time is not known: it tells nothing of the rows.';

create or replace function multihome.rows_in_the_way(relation oid, tuple jsonb, own_key jsonb) returns jsonb
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
         where i.indrelid = relation and i.indisunique and i.indisvalid and i.indimmediate -- Apply does not check the others.
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
comment on function multihome.rows_in_the_way(oid, jsonb, jsonb) is
'The rows of a table that keep another one out, by any unique index that is not deferrable: an array of {index, xid, commit_ts, origin (number), key, tuple, tableoid, ctid}.
tuple: the row that comes, values as text. own_key: the row that it replaces, which is not in its own way; null for an insert.';

create or replace function multihome.write_down(event jsonb) returns bigint
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
    -- What core says of a change that was applied out of a file, past what is kept.
    last_line text := substring(event ->> 'context' from '[^\n]*$');
    target record;
    unseen text;
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
           and (l.blocking or l.status in ('open', 'skipped'));
        return 0;
    end if;

    -- Which change it is, and of which table.
    select c into change from jsonb_array_elements(event -> 'changes') as c where c ->> 'change_number' = event ->> 'change_number';
    entry.schemaname := coalesce(change ->> 'schemaname', event ->> 'schemaname');
    entry.relname := coalesce(change ->> 'relname', event ->> 'relname');
    if kind = 'error' and change is null and not event ? 'copied' then
        -- Applied out of a file, where nobody sees which change it is: core says of which table.
        select n.nspname, c.relname into target
          from pg_subscription_rel r join pg_class c on c.oid = r.srrelid join pg_namespace n on n.oid = c.relnamespace
         where r.srsubid = entry.subscription_oid and last_line ~ '\m(INSERT|UPDATE|DELETE)\M' and strpos(last_line, format('%s.%s', n.nspname, c.relname)) > 0
         order by length(n.nspname) + length(c.relname) desc limit 1;
        if found then
            entry.schemaname := target.nspname;
            entry.relname := target.relname;
            unseen := lower(substring(last_line from '\m(INSERT|UPDATE)\M'));
        end if;
    end if;
    if event ? 'copied' then
        entry.copied := (event ->> 'copied')::oid;
        entry.relation := entry.copied;
        select n.nspname, c.relname into entry.schemaname, entry.relname
          from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = entry.relation;
    else
        entry.relation := to_regclass(quote_ident(entry.schemaname) || '.' || quote_ident(entry.relname));
    end if;
    redacted := redacting
        and (multihome.is_redacted(entry.schemaname, entry.relname)
             -- A trigger writes to other tables.
             or multihome.is_redacted(event ->> 'schemaname', event ->> 'relname')
             -- Of an unknown change, whatever the transaction may have changed.
             or change is null and not event ? 'copied' and (event ? 'transaction_kind' or event ? 'context')
                and (not entry.changes_complete
                     or exists (select from jsonb_array_elements(event -> 'changes') as c where multihome.is_redacted(c ->> 'schemaname', c ->> 'relname'))));
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
            if change is null and event ->> 'transaction_kind' = 'streamed' and jsonb_array_length(event -> 'changes') > 0 then
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
            elsif change is null and unseen is not null then
                entry.conflict_type := unseen || '_exists';
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
    entry.remote_origin := concat_ws('_', 'pg', entry.subscription_oid, entry.copied);
    entry.remote_xid := (event ->> 'remote_xid')::xid;
    entry.remote_commit_ts := (event ->> 'remote_commit_ts')::timestamptz;
    entry.replica_identity := multihome.typed(entry.relation, case when redacted then multihome.only_key(change) else change end -> 'key');
    entry.remote_tuple := case when not redacted then multihome.typed(entry.relation, change -> 'tuple') end;
    entry.local_conflicts := case when way = '[]' then way else multihome.without_places(way, true) end;
    entry.message := multihome.scrubbed(event ->> 'message');
    entry.detail := multihome.scrubbed(event ->> 'detail');
    entry.context := multihome.scrubbed(event ->> 'context');
    if redacted then
        -- Texts may quote values; the untranslated message does not, unless it is all that a function said.
        select coalesce(jsonb_agg(w - 'tuple'), '[]') into entry.local_conflicts from jsonb_array_elements(entry.local_conflicts) as w;
        if kind = 'error' then
            entry.message := coalesce(nullif(event ->> 'message_id', '%s'), format('SQLSTATE %s (text withheld: table is redacted)', entry.sqlstate));
        end if;
        entry.detail := null;
        entry.context := null;
    end if;
    entry.tuple_complete := case when entry.remote_tuple is not null then not change ? 'incomplete' end;
    entry.operation := coalesce(change ->> 'operation', unseen, event ->> 'operation', case when event ? 'copied' then 'copy' end);
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
        -- Until multihome.sweep() has looked whether it comes back in the same transaction.
        entry.settling := true;
        entry.status := 'resolved';
        entry.resolution := 'nothing to do: the row was gone here already';
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
            or kind = 'error' and (l.change_number is null or entry.change_number is null)
               -- With streaming = off it comes as another kind.
               and (entry.transaction_kind is not distinct from 'streamed' or l.transaction_kind is distinct from entry.transaction_kind))
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
               tuple_complete = coalesce(entry.tuple_complete, l.tuple_complete), transaction_kind = entry.transaction_kind,
               operation = case when change is null then l.operation else entry.operation end,
               change_number = coalesce(entry.change_number, l.change_number), fingerprint = coalesce(entry.fingerprint, l.fingerprint),
               -- Rows that were removed for it stay in the log.
               local_conflicts = case when entry.local_conflicts = '[]' or l.settling then l.local_conflicts
                                      when known.status <> 'open' then l.local_conflicts || entry.local_conflicts
                                      else entry.local_conflicts end,
               changes = case when jsonb_array_length(entry.changes) >= jsonb_array_length(l.changes) then entry.changes else l.changes end,
               changes_seen = greatest(l.changes_seen, entry.changes_seen),
               settling = l.settling or entry.settling,
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
create or replace function multihome.sweep() returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    entry multihome.log;
begin
    update multihome.log as l
       set blocking = false,
           status = case when l.settling then l.status when l.answer = 'skip' then 'skipped' else 'resolved' end,
           resolution = case when l.settling then l.resolution else coalesce(l.resolution, 'apply went on') end,
           resolved_by = case when l.settling then l.resolved_by else coalesce(l.resolved_by, 'replication') end,
           resolved_at = case when l.settling then l.resolved_at else coalesce(l.resolved_at, clock_timestamp()) end
     where l.node = multihome.node_id() and l.status = 'open' and l.blocking
       and (not exists (select from pg_subscription s where s.oid = l.subscription_oid)
            or case when l.remote_commit_lsn is not null or l.transaction_kind = 'copy' then multihome.is_past(l)
                    else exists (select from pg_stat_subscription w
                                  where w.subid = l.subscription_oid and w.relid is null and w.pid is not null and w.last_msg_receipt_time > l.last_seen)
                    end);
    for entry in
        select * from multihome.log l
         where l.node = multihome.node_id() and l.settling and l.conflict_type = 'delete_missing'
           and (l.remote_commit_lsn is null or multihome.is_past(l)
                or not exists (select from pg_subscription s where s.oid = l.subscription_oid))
           for update
    loop
        if multihome.is_here(entry.relation, entry.replica_identity) then
            update multihome.log as l
               set settling = false, status = 'open', resolved_by = null, resolved_at = null,
                   resolution = 'a row with this key is here now: the nodes may differ in it'
             where l.node = entry.node and l.id = entry.id;
            perform pg_notify('stillebot_conflict', entry.id::text);
        else
            update multihome.log as l set settling = false, resolution = 'nothing to do: the row was gone here already' where l.node = entry.node and l.id = entry.id;
        end if;
    end loop;
    return (select count(*) from multihome.log l where l.node = multihome.node_id() and l.status = 'open' and l.blocking)
           + (select count(*) from multihome.log l where l.node = multihome.node_id() and l.settling and l.conflict_type = 'delete_missing');
end $$;
comment on function multihome.sweep() is 'Closes conflicts that apply has got past, opens those of deleted rows that have come back, and returns how many it has to look at again. For the collector.';

create or replace function multihome.open_conflict(conflict_id bigint, verb text) returns multihome.log
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
    elsif entry.blocking and multihome.is_past(entry) then
        raise object_not_in_prerequisite_state using message = format('conflict %s is over: apply went on', conflict_id);
    end if;
    return entry;
end $$;
comment on function multihome.open_conflict(bigint, text) is 'A conflict that can be resolved, locked, in a transaction that stays on this node; or an error that says why not.';

create or replace function public.stillebot_skip(conflict_id bigint) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
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
    elsif entry.copied is not null then
        raise object_not_in_prerequisite_state using message = format('conflict %s stops the copy of table %s only', conflict_id, entry.copied::regclass),
            detail = 'A transaction is skipped for all tables, and the subscription may have applied it to the others already.',
            hint = 'Keep remote: stillebot_resolve(). Or change the row in the way by hand; the worker of the copy tries again by itself.';
    elsif entry.transaction_kind = 'prepared' and entry.operation = 'commit' and entry.changes_seen = 0 then
        raise object_not_in_prerequisite_state using message = format('conflict %s is of the commit of a prepared transaction, which cannot be skipped', conflict_id),
            detail = entry.message,
            hint = 'Mend the cause; apply tries again by itself. Is the transaction still in pg_prepared_xacts?';
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
     where l.node = entry.node and l.subscription_oid = entry.subscription_oid and l.remote_commit_lsn = entry.remote_commit_lsn and l.status = 'open';
    perform multihome.go_on(entry);
    perform multihome.end_local();
    return format('the whole transaction at %s is skipped on this node; lost: %s', entry.remote_commit_lsn, multihome.summary(entry.changes, false));
end $$;
comment on function public.stillebot_skip(bigint) is
'Skips the whole remote transaction that a conflict stopped, if it still stops its subscription, and lets the subscription go on (enabled again, if disable_on_error had disabled it).
Returns what is lost; afterwards multihome.conflict_changes() has all of it. Prefer stillebot_resolve(), which keeps the rest of the transaction. Errors: 02000 no such conflict, 55000 closed, over, or not the one.';

create or replace function multihome.present_way(entry multihome.log) returns jsonb
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
            detail = case when entry.transaction_kind is distinct from 'plain' then 'What was sent while it ran and applied out of a file is kept only at its beginning, and nobody sees which change it is at.' end,
            hint = case when entry.transaction_kind is distinct from 'plain'
                        then format('ALTER SUBSCRIPTION %I SET (streaming = off) has the transaction come again change by change: then this conflict can be resolved, and streaming set again. Or skip it: stillebot_skip().', entry.subscription)
                        else 'Change the row in the way by hand, or skip the transaction: stillebot_skip().' end;
    elsif exists (select from jsonb_each(tuple) as t where t.value ? 'binary' and multihome.is_cut(t.value)) then
        raise object_not_in_prerequisite_state using message = format('the incoming row of conflict %s came in binary', entry.id),
            hint = 'ALTER SUBSCRIPTION .. SET (binary = off) has it come again as text. Or keep local, or skip the transaction: stillebot_skip().';
    end if;
    return multihome.rows_in_the_way(entry.relation, tuple,
        case when entry.operation = 'update' then multihome.typed(entry.relation, change -> 'key') end);
end $$;
comment on function multihome.present_way(multihome.log) is 'The rows that are in the way of a conflict''s change now, as multihome.rows_in_the_way() returns them.';

create or replace function multihome.as_apply(relation oid, query text, first text default null, second text default null) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set session_replication_role = replica
as $$
begin
    return multihome.as_role(multihome.owner_of(relation), query, first, second);
exception when lock_not_available then
    raise lock_not_available using message = format('a row of table %s is locked by another session', relation::regclass),
        hint = 'Try again when that session has ended its transaction: pg_locks shows who waits for whom.';
end $$;
comment on function multihome.as_apply(oid, text, text, text) is
'Changes rows as the apply worker would: as the owner of the table, with triggers that are ENABLE REPLICA or ENABLE ALWAYS only, and without foreign keys. Returns what the query does.';

create or replace function public.stillebot_resolve(conflict_id bigint, keep text) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set datestyle = iso
set timezone = 'UTC'
set intervalstyle = postgres
set bytea_output = hex
set extra_float_digits = 1
set lock_timeout = '5s'
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
        elsif kept = 'remote' and exists (select from pg_prepared_xacts p where p.gid = format('pg_gid_%s_%s', entry.subscription_oid, entry.remote_xid) and p.database = current_database()) then
            raise object_not_in_prerequisite_state using message = format('the transaction of conflict %s is prepared, and may be rolled back yet', conflict_id),
                hint = 'Try again when it has been committed on the other node.';
        elsif kept = 'remote' and entry.remote_commit_lsn is not null and not multihome.is_past(entry) then
            raise object_not_in_prerequisite_state using message = format('the transaction of conflict %s is not applied yet', conflict_id),
                hint = 'Try again when it is. If another conflict stops it, settle that one first.';
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
    elsif entry.conflict_type = 'delete_missing' then
        if kept <> 'local' then
            raise object_not_in_prerequisite_state using message = format('the row of conflict %s was deleted on the other node, so there is no other version', conflict_id),
                hint = 'DELETE it here to have it nowhere; DELETE and INSERT it here, in one transaction, to have it on all nodes. Then say local.';
        end if;
        update multihome.log as l
           set status = 'resolved', answer = kept, resolved_by = session_user, resolved_at = clock_timestamp(), resolution = 'kept local: as it is here'
         where l.node = entry.node and l.id = entry.id;
        perform multihome.end_local();
        return 'nothing was changed; compare the row on all nodes';
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
        if entry.copied is not null then
            raise object_not_in_prerequisite_state using message = format('conflict %s is of a table that is being copied, %s, and the copy leaves out no change', conflict_id, entry.copied::regclass),
                hint = 'Keep remote; the local row stays in the log, and can be written again when the copy has ended.';
        elsif coalesce(entry.transaction_kind, '') not in ('plain', 'prepared') or entry.fingerprint is null then
            raise object_not_in_prerequisite_state using message = format('one change of a %s transaction cannot be left out', coalesce(entry.transaction_kind, 'unknown')),
                hint = format('ALTER SUBSCRIPTION %I SET (streaming = off) has it come again change by change: then it can. Or keep remote, or skip the whole transaction: stillebot_skip().', entry.subscription);
        end if;
        if not multihome.exclude(entry.subscription_oid, entry.remote_commit_lsn, entry.change_number, entry.fingerprint) then
            raise program_limit_exceeded using message = 'too many changes are waited for to be left out', hint = 'Try again when replication has gone on.';
        end if;
        advice := 'on the other node, keep its remote row (this one): its own shall go; if it has no conflict of this row, have the agent make both the same: stillebot-agent conflicts resolve';
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
        advice := 'on the other node, keep its local row (the one that comes here): its remote row shall be left out; if it has no conflict of this row, have the agent make both the same: stillebot-agent conflicts resolve';
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
comment on function public.stillebot_resolve(bigint, text) is
'Resolves one conflict on this node, without losing the rest of the remote transaction. keep: remote, the local rows in the way go (they stay in the log) and the incoming row comes;
local, the incoming change is left out; newest, by commit time. For update_missing: remote inserts the row, local leaves it deleted.
Returns what was done and what must be done on the other node; the agent does both. Works while down; does not replicate. Errors: 22023 keep, 02000 no such conflict, 55000 cannot be resolved so, 23503 referenced.';

create or replace function multihome.newest(entry multihome.log, way jsonb) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    here timestamptz;
    unknown boolean;
begin
    select max((r ->> 'commit_ts')::timestamptz), bool_or(r ->> 'commit_ts' is null) into here, unknown from jsonb_array_elements(way) as r;
    if way = '[]' then
        return 'remote';
    elsif (select count(distinct (r -> 'tableoid', r -> 'ctid')) from jsonb_array_elements(way) as r) > 1 then
        raise object_not_in_prerequisite_state using message = 'several rows are in the way, and each node sees others',
            hint = format('Say local or remote, or have the agent compare all of them on all nodes: stillebot-agent conflicts resolve %s/%s --keep newest.', coalesce(nullif(current_setting('stillebot.node', true), ''), 'NODE'), entry.id);
    elsif unknown or entry.remote_commit_ts is null then
        raise object_not_in_prerequisite_state using message = 'when the local row was committed is not known',
            detail = 'Commit times are kept only with track_commit_timestamp = on, and not for ever.',
            hint = 'Say local or remote.';
    end if;
    if entry.remote_commit_ts = here then
        -- The agent has an order for that, and whoever answers one node by hand and the other by the agent must come to the same end.
        raise object_not_in_prerequisite_state using message = 'both versions were committed at the same time',
            hint = 'Say local or remote, or have the agent decide: stillebot-agent conflicts resolve.';
    end if;
    return case when entry.remote_commit_ts > here then 'remote' else 'local' end;
end $$;
comment on function multihome.newest(multihome.log, jsonb) is 'Which version is newer, local or remote.';

create or replace function multihome.health(out open_conflicts bigint, out faults text[], out warnings text[])
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
    with subscription as (
        select s.* from pg_subscription s join pg_database d on d.oid = s.subdbid where d.datname = current_database()
    )
    select (select count(*) from multihome.log l where l.node = multihome.node_id() and l.status = 'open'),
           (select array_agg(format('%s: SQLSTATE %s, %s times since %s', f.subscription, f.sqlstate, f.occurrences, f.first_seen) order by f.subscription, f.sqlstate)
              from multihome.faults f where not f.healed),
           (select array_agg(format('subscription %I applies in parallel, where conflicts are seen without their rows: ALTER SUBSCRIPTION %I SET (streaming = on)', s.subname, s.subname) order by s.subname)
              from subscription s
             where s.substream = 'p')
           || (select array_agg(format('subscription %I is disabled by any error, a lost connection included: ALTER SUBSCRIPTION %I SET (disable_on_error = false)', s.subname, s.subname) order by s.subname)
                 from subscription s
                where s.subdisableonerr)
           -- A cascade is right with it, so it is said what must not be besides.
           || (select array_agg(format('subscription %I has origin = any, and this database publishes: what it brings is sent on, and loops if its publisher gets it back: ALTER SUBSCRIPTION %I SET (origin = none)', s.subname, s.subname) order by s.subname)
                 from subscription s
                where s.suborigin = 'any' and exists (select from pg_publication))
           || (select array_agg(format('subscription %I would replicate this database to itself and is disabled: DROP SUBSCRIPTION %I, or ALTER SUBSCRIPTION %I CONNECTION .. and ENABLE', s.subname, s.subname, s.subname) order by s.subname)
                 from subscription s
                where not s.subenabled
                  and exists (select from multihome.log l
                               where l.node = multihome.node_id() and l.status = 'open' and l.subscription_oid = s.oid
                                 and l.sqlstate = '42P17' and l.message like '%would replicate this database to itself'))
           -- A worker that follows another meets it for a moment. The publisher says it in words only.
           || (select array_agg(format('the slot of subscription %I is in use by another for %s: is a copy of this node running?', f.subscription, date_trunc('second', f.last_seen - f.first_seen)) order by f.subscription)
                 from multihome.faults f
                where not f.healed and f.message like '%slot%is active for PID%' and f.last_seen - f.first_seen > interval '2 minutes')
           || (select array_agg(format('index %s is deferrable, and replication does not check it: rows may come twice; have it not deferrable', i.indexrelid::regclass) order by i.indexrelid::regclass::text)
                 from pg_index i
                where i.indisunique and not i.indimmediate
                  and exists (select from pg_subscription_rel r join subscription s on s.oid = r.srsubid where r.srrelid = i.indrelid))
           || (select array_agg('conflicts are not being recorded: no collector is running; is there a free place among max_worker_processes?'::text)
                 from pg_database d
                where d.datname = current_database() and multihome.collector() is null
                  and exists (select from pg_subscription s join pg_stat_subscription w on w.subid = s.oid where s.subdbid = d.oid and w.pid is not null));
end;

alter function multihome.make_room(bigint, jsonb) set lock_timeout = '5s';
alter function multihome.put(bigint, jsonb) set lock_timeout = '5s';

-- Schema changes.

alter table multihome.schema_change add column done boolean not null default true; -- What was made before counts as done.
alter table multihome.schema_change alter column done set default false;
comment on column multihome.schema_change.done is 'The change is committed on all of its nodes. One that says so is enough, for a node may lose its rows: rebuilt, or after DROP EXTENSION.';
comment on table multihome.schema_change is 'Changes of the schema that stillebot-agent schema apply has committed on this node. A change is whole when each of its nodes has a row of it, or one row says so.';

create or replace function multihome.schema_changes() returns setof multihome.schema_change
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
    select * from multihome.schema_change as c where c.node = multihome.node_id();
end;

create function multihome.conclude_schema_changes() returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform multihome.begin_local('multihome.conclude_schema_changes()');
    update multihome.schema_change as c set done = true where c.node = multihome.node_id() and not c.done;
    perform multihome.end_local();
end $$;
revoke execute on function multihome.conclude_schema_changes() from public;
comment on function multihome.conclude_schema_changes() is 'Says of all changes of this node that they are committed on all of their nodes, or have come to them by other means. It stays on this node; also while down.';

comment on function multihome.open_window(name, interval) is
'Opens a maintenance window in this database, which is down and stays so: for that long, at most 24 hours, sessions that logged in as role may write, and nobody else, superusers included.
Only those that begin after it is opened, and the one that opens it: an application that has not heard that its database is down must not write what stays here.
What they write stays on this node, so it has to be done on every node.
It ends with multihome.close_window(), with the session that calls this, at its deadline, or with a restart. What a transaction of the role has not committed by then is not committed.';

-- Remedies: what stops apply because tables differ between the nodes says which statements would mend it.

create function multihome.type_of(described jsonb) returns text
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    -- Oids below are the same on every server; of other types the publisher tells the names.
    select case when (described ->> 'type')::bigint < 10000 then (select format_type(t.oid, (described ->> 'typmod')::integer) from pg_type t where t.oid = (described ->> 'type')::oid)
                when described ? 'typename'
                then coalesce(format_type(to_regtype(format('%I.%I', described ->> 'typeschema', described ->> 'typename')), (described ->> 'typmod')::integer),
                              format('%I.%I', described ->> 'typeschema', described ->> 'typename')) end;
end;
revoke execute on function multihome.type_of(jsonb) from public;
comment on function multihome.type_of(jsonb) is 'The type of a column as a publisher described it, in the words of this server; null if it cannot be known.';

create function multihome.remedy(described jsonb, other_types boolean) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    name text := format('%I.%I', described ->> 'schemaname', described ->> 'relname');
    here oid := (select c.oid from pg_class c where c.oid = to_regclass(name) and c.relkind in ('r', 'p'));
    unknown text;
    remedy text;
begin
    select string_agg(c ->> 'name', ', ' order by place) into unknown
      from jsonb_array_elements(described -> 'columns') with ordinality as t (c, place)
     where multihome.type_of(c) is null
       and (other_types or not exists (select from pg_attribute a where a.attrelid = here and a.attname = c ->> 'name' and not a.attisdropped));
    if unknown is not null then
        return format('-- %s: the types of %s are not known here; stillebot-agent schema diff --ddl has the statements', name, unknown);
    elsif here is null then
        select format(e'create table %s (%s);\n-- defaults and constraints are not known here; stillebot-agent schema diff --ddl has them', name,
                      string_agg(format('%I %s', c ->> 'name', multihome.type_of(c)), ', ' order by place)
                      || coalesce(format(', primary key (%s)', string_agg(quote_ident(c ->> 'name'), ', ' order by place)
                                         filter (where (c ->> 'key')::boolean and described ->> 'identity' = 'd')), ''))
          into remedy
          from jsonb_array_elements(described -> 'columns') with ordinality as t (c, place);
        return remedy;
    end if;
    select string_agg(case when a.attname is null then format('alter table %s add column %I %s;', name, c ->> 'name', multihome.type_of(c))
                           when a.attgenerated <> '' then format('alter table %s alter column %I drop expression; -- generated here only', name, c ->> 'name')
                           else format('alter table %1$s alter column %2$I type %3$s using %2$I::%3$s; -- %4$s here, %3$s on the other node',
                                       name, c ->> 'name', multihome.type_of(c), format_type(a.atttypid, a.atttypmod)) end, e'\n' order by place)
      into remedy
      from jsonb_array_elements(described -> 'columns') with ordinality as t (c, place)
      left join pg_attribute a on a.attrelid = here and a.attname = c ->> 'name' and a.attnum > 0 and not a.attisdropped
     where a.attname is null or a.attgenerated <> '' or other_types and multihome.type_of(c) <> format_type(a.atttypid, a.atttypmod);
    return remedy;
end $$;
revoke execute on function multihome.remedy(jsonb, boolean) from public;
comment on function multihome.remedy(jsonb, boolean) is
'The statements that give a table here what its publisher has sent of it: the table, columns, and with other_types their types. described: an element of relations, as the collector tells it. Null: nothing differs.';

create or replace function multihome.record(event jsonb) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    name text;
    told jsonb := event;
    lacking jsonb;
    mending text;
    written bigint;
begin
    -- As subscription.rs words them.
    if event ->> 'message_id' = 'subscription "%s" does not replicate: this data directory is a copy of another node''s' then
        return 0; -- multihome.park() is for that.
    end if;
    -- When the WAL of a publisher that went back in time has grown past what is applied here, nobody can tell any more.
    if event ->> 'message_id' in ('subscription "%s" would replicate this database to itself',
                                  'subscription "%s" does not replicate: its publisher has gone back in time') then
        select s.subname into name from pg_subscription s where s.oid = (event ->> 'subscription')::oid and s.subenabled;
        if found then
            begin
                execute format('alter subscription %I disable', name);
            exception when lock_not_available then
                null; -- It comes again.
            end;
        end if;
    end if;
    if event ->> 'kind' = 'error' and event ? 'conflict_type' and not event ? 'relname' then
        -- The table is in the message only, which may be in any language.
        select event || jsonb_build_object('schemaname', c ->> 'schemaname', 'relname', c ->> 'relname') into told
          from jsonb_array_elements(event -> 'changes') as c
         where strpos(event ->> 'message', format('%s.%s', c ->> 'schemaname', c ->> 'relname')) > 0
         order by length(c ->> 'schemaname') + length(c ->> 'relname') desc limit 1;
    elsif event ->> 'kind' = 'error' and (event ->> 'sqlstate' = '55000' or left(event ->> 'sqlstate', 2) in ('22', '42')) then
        -- The message may be in any language: what was sent of the tables is compared with what is here.
        begin
            select string_agg(r.remedy, e'\n'), case when count(*) = 1 then jsonb_agg(r.described) -> 0 end into mending, lacking
              from (select d.described, multihome.remedy(d.described, event ->> 'sqlstate' <> '55000') as remedy
                      from jsonb_array_elements(event -> 'relations') as d (described)
                     -- Those of the change that failed; of a streamed transaction nobody knows which it was.
                     where not event ? 'change_number'
                        or exists (select from jsonb_array_elements(event -> 'changes') as c
                                    where c ->> 'change_number' = event ->> 'change_number'
                                      and c ->> 'schemaname' = d.described ->> 'schemaname' and c ->> 'relname' = d.described ->> 'relname')) as r
             where r.remedy is not null;
            if lacking is not null then
                told := event || jsonb_build_object('schemaname', lacking ->> 'schemaname', 'relname', lacking ->> 'relname');
            end if;
        exception when others then
            null; -- Somebody is just mending it. The error is recorded in any case.
        end;
    end if;
    written := multihome.write_down(coalesce(told, event));
    if event ->> 'kind' = 'error' then
        update multihome.log as l set remedy = mending
         where l.node = multihome.node_id() and l.id = written and l.remedy is distinct from mending;
    end if;
    if event ->> 'kind' = 'error' and not event ? 'constraint_name' and event ? 'conflict_type' then
        update multihome.log as l
           set constraint_name = coalesce(substring(event ->> 'detail' from 'unique index "([^"]+)"'), l.local_conflicts #>> '{0,index}')
         where l.node = multihome.node_id() and l.id = written and l.constraint_name is null;
    elsif event ->> 'conflict_type' in ('update_origin_differs', 'delete_origin_differs') then
        -- PostgreSQL has applied it. Of a deletion the other node tells the rest: there the change made here found no row.
        update multihome.log as l
           set status = 'resolved', resolved_by = 'replication', resolved_at = l.last_seen,
               resolution = case l.conflict_type
                                when 'delete_origin_differs' then 'deleted here, as on the other node, though changed here later'
                                else 'replaced by the incoming row, though changed here later: the nodes may differ in this row until it is written again on one of them'
                            end
         where l.node = multihome.node_id() and l.id = written and l.status = 'open';
    end if;
    return written;
end $$;
comment on function multihome.record(jsonb) is
'Writes down what a replication worker reported, with the remedy if tables differ, and returns the number of the row; 0 if there is none of it. Disables a subscription of this database to itself, or to a publisher that has gone back in time.
For the collector, in a transaction that stays on this node.';

-- A change of the schema is told after its commit, by the collector, so that its transaction can be prepared.

create function multihome.tell_at_commit(text text) returns boolean
language c volatile strict parallel unsafe
as 'MODULE_PATHNAME', 'multihome_tell_at_commit_wrapper';
revoke execute on function multihome.tell_at_commit(text) from public;
comment on function multihome.tell_at_commit(text) is
'Has the collector NOTIFY stillebot_schema with that text when this transaction is committed, and not if it is rolled back; of a prepared one, when it is committed, with other words. False: there is no collector.';

-- With the owner's rights, for whoever changes the schema may do nothing in multihome.
create or replace function multihome.tell_schema_change() returns event_trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    names text;
    told text;
begin
    if tg_event = 'sql_drop' then
        select string_agg(o.object_identity, ', ') into names
          from pg_event_trigger_dropped_objects() o where o.original and not o.is_temporary;
    else
        select string_agg(c.object_identity, ', ') into names
          from pg_event_trigger_ddl_commands() c
         where not c.in_extension and c.schema_name is distinct from 'pg_temp';
    end if;
    if names is null then
        return;
    end if;
    told := left(concat_ws(' ', tg_tag, names), 450);
    -- Without subscriptions there is no collector, and the transaction notifies by itself, if it need not be prepared.
    if not multihome.tell_at_commit(told) and current_setting('max_prepared_transactions')::integer = 0 then
        perform pg_notify('stillebot_schema', told);
    end if;
exception when others then
    null; -- No change of a schema fails because nobody could be told.
end $$;
comment on function multihome.tell_schema_change() is
'NOTIFY stillebot_schema, after the commit, with the command and the names of what it changed, unless that is temporary or an extension''s. In a database without subscriptions where max_prepared_transactions is not 0 nothing is told.';

-- Copying one table. PostgreSQL has no statement for it: REFRESH PUBLICATION copies what is new to a subscription, all of it, whatever rows
-- are here, and nothing that it knows already; a publication FOR ALL TABLES cannot leave one out, and a second subscription would copy beside
-- the first one's apply, at another position. So the state of the table is set as REFRESH sets it, under the lock that REFRESH takes.

create function multihome.copy_table(relation text, subscription text, replace boolean) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '10s'
set session_replication_role = replica
as $$
declare
    target oid := to_regclass(relation);
    source oid := (select s.oid from pg_subscription s join pg_database d on d.oid = s.subdbid
                    where d.datname = current_database() and s.subname = copy_table.subscription);
    worker integer;
begin
    -- What is written here is written of this node only, and it may be down.
    perform multihome.begin_local('multihome.copy_table()');
    if source is null or target is null then
        raise object_not_in_prerequisite_state using
            message = format('there is no table %s or no subscription %s', quote_nullable(relation), quote_nullable(subscription)),
            hint = 'Name the table with its schema.';
    elsif replace and multihome.state() ->> 'state' = 'up' then
        raise object_not_in_prerequisite_state using message = format('the rows of table %s are replaced in a database that is down only', relation),
            hint = 'Take it down first, and wait until the other nodes have applied what was written here.';
    end if;
    -- Keeps the apply worker from the table until this is committed. Before the other lock, as apply takes them.
    execute format('lock table %s in %s mode', target::regclass, case when replace then 'access exclusive' else 'share row exclusive' end);
    lock table pg_catalog.pg_subscription_rel in access exclusive mode;
    if exists (select from pg_subscription_rel r where r.srsubid = source and r.srrelid = target and r.srsubstate <> 'r') then
        raise object_in_use using message = format('table %s is being copied by subscription %s', relation, quote_ident(subscription)),
            hint = 'Wait for the end of the copy.';
    elsif replace then
        -- Not what refers to it: that would be gone on this node only.
        execute format('truncate %s', target::regclass);
    elsif multihome.count_rows(relation, 1) > 0 then
        raise object_not_in_prerequisite_state using message = format('table %s has rows', relation),
            hint = 'Only an empty table is populated. Rows that are deleted here are deleted on the other nodes, too.';
    end if;
    update pg_subscription_rel set srsubstate = 'i', srsublsn = null where srsubid = source and srrelid = target;
    if not found then
        -- New to the subscription: apply looks it up at each change until it is ready, so the worker can stay. With a refresh before,
        -- rows written since then might be here before the copy.
        insert into pg_subscription_rel (srsubid, srrelid, srsubstate) values (source, target, 'i');
    else
        -- A worker that knew the table as ready would go on to apply to it. The next one waits for the lock before it knows anything.
        for worker in select w.pid from pg_stat_subscription w where w.subid = source and w.relid is null and w.pid is not null loop
            perform pg_terminate_backend(worker, 10000);
            if exists (select from pg_stat_subscription w where w.subid = source and w.relid is null and w.pid = worker) then
                raise lock_not_available using message = format('the worker of subscription %s (process %s) does not end', quote_ident(subscription), worker),
                    hint = 'See in pg_stat_activity what it waits for, then try again. Nothing was changed.';
            end if;
        end loop;
    end if;
    perform multihome.end_local();
end $$;
revoke execute on function multihome.copy_table(text, text, boolean) from public;
comment on function multihome.copy_table(text, text, boolean) is
'Has the rows of a table copied, once more if need be, from the publisher of a subscription, by that subscription''s own initial copy: consistent with what replicates meanwhile, and nothing of it travels on. Refused unless the table is
empty here, or, with replace, the database is down: then the rows here give way, on this node only. If the table was replicated already, ends the apply worker; multihome.restart_apply() has the next one started at once.';

create or replace function multihome.copy_table(relation text, subscription text) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
begin atomic
    select multihome.copy_table(relation, subscription, false);
end;
comment on function multihome.copy_table(text, text) is 'multihome.copy_table() without replace.';

-- Free space where the WAL is.

create function multihome.free_space() returns bigint
language c volatile parallel safe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_free_space_wrapper';
revoke execute on function multihome.free_space() from public;
comment on function multihome.free_space() is 'Free bytes of the file system that holds the WAL of this server; null if that cannot be asked.';

-- Adoption where a publisher does not answer: unknown counts as running.

drop function public.stillebot_adopt_identity();
create function public.stillebot_adopt_identity(force boolean default false) returns text
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_adopt_identity_wrapper';
revoke execute on function public.stillebot_adopt_identity(boolean) from public;
comment on function public.stillebot_adopt_identity(boolean) is
'Makes this copy of a node the node itself: after the original is gone for good, its data directory was moved, or pg_upgrade. Never while the original runs;
force: although a publisher cannot be asked whether it does. Its subscriptions are enabled again; the database stays down. Returns what to do next.';

-- Answers that were not followed through on the other nodes: the agent looks for them.

create index log_kept on multihome.log (node) where status = 'resolved' and resolution like 'kept %';
comment on index multihome.log_kept is 'Conflicts that were answered on this node, and whose nodes have not been compared since.';
