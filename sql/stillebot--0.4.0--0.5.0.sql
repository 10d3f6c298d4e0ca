-- stillebot 0.5.0: schema changes by a window in a database that is down, what differs between the nodes' schemas, and sequences
-- that do not collide.

\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit

-- Sequences: what gives keys, and what is to come next from it. None of this is replicated.

create function multihome.next_value(sequence oid, increment bigint) returns numeric
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    upcoming numeric := pg_sequence_last_value(sequence)::numeric + increment;
begin
    if upcoming is null then -- Not called yet: where setval() or ALTER SEQUENCE .. RESTART put it.
        execute format('select last_value from %s', sequence::regclass) into upcoming;
    end if;
    return upcoming;
end $$;
revoke execute on function multihome.next_value(oid, bigint) from public;
comment on function multihome.next_value(oid, bigint) is 'What a sequence with that increment hands out next; beyond its bounds if it is exhausted.';

create function multihome.sequence_positions() returns jsonb
language sql volatile security definer
set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(jsonb_object_agg(format('%I.%I', n.nspname, c.relname), multihome.next_value(q.seqrelid, q.seqincrement)), '{}')
      from pg_sequence q
      join pg_class c on c.oid = q.seqrelid
      join pg_namespace n on n.oid = c.relnamespace
     where c.relpersistence = 'p'
       and n.nspname <> 'multihome'
       and not q.seqcycle;
end;
revoke execute on function multihome.sequence_positions() from public;
comment on function multihome.sequence_positions() is
'What each sequence hands out next, by its name. Those that cycle are left out, for they hand out everything again anyhow. Final in a database that is down.';

create function multihome.advance_sequences(positions jsonb) returns text[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
    entry record;
    upcoming numeric;
    moved text[] := '{}';
    quiet boolean := multihome.state() ->> 'state' = 'down';
begin
    perform multihome.begin_local('multihome.advance_sequences()');
    -- Opening the database commits synchronously and makes this durable, too.
    perform set_config('synchronous_commit', 'off', true);
    for entry in
        select q.seqrelid as sequence, q.seqincrement as increment, q.seqcache as cache, q.seqmin as least, q.seqmax as most, p.name,
               case when q.seqincrement > 0 then p.highest else p.lowest end as reached
          from (select one.key as name, max(one.value::numeric) as highest, min(one.value::numeric) as lowest
                  from jsonb_array_elements(positions) as node (told) cross join jsonb_each_text(node.told) as one
                 group by one.key) as p
          join pg_sequence q on q.seqrelid = to_regclass(p.name)
         where not q.seqcycle
         order by p.name
    loop
        upcoming := multihome.next_value(entry.sequence, entry.increment);
        continue when (entry.reached - upcoming) * entry.increment <= 0;
        -- Takes the lock that nextval() waits for, and makes sessions forget what they keep in CACHE.
        if entry.cache > 1 or not quiet then
            execute format('alter sequence %s increment by %s', entry.sequence::regclass, entry.increment);
            upcoming := multihome.next_value(entry.sequence, entry.increment);
            continue when (entry.reached - upcoming) * entry.increment <= 0;
        end if;
        -- Whole steps only: where nodes have strides, each keeps its residue.
        upcoming := upcoming + entry.increment * ceil((entry.reached - upcoming) / entry.increment);
        if upcoming between entry.least and entry.most then
            perform setval(entry.sequence, upcoming::bigint, false);
        else -- Nothing is left there that was not handed out elsewhere.
            perform setval(entry.sequence, case when entry.increment > 0 then entry.most else entry.least end, true);
        end if;
        moved := moved || entry.name;
    end loop;
    perform multihome.end_local();
    return moved;
end $$;
revoke execute on function multihome.advance_sequences(jsonb) from public;
comment on function multihome.advance_sequences(jsonb) is
'Moves the sequences of this database past what others have handed out: an array of what multihome.sequence_positions() returned there. Never back; keeps residues. Also while down.
Not durable before the next synchronous commit, which multihome.up() is. Returns the names of those that were moved.';

create function multihome.sequences() returns setof jsonb
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    entry record;
    feed record;
    highest bigint;
    columns jsonb;
begin
    for entry in
        select q.*, format('%I.%I', n.nspname, c.relname) as name
          from pg_sequence q
          join pg_class c on c.oid = q.seqrelid
          join pg_namespace n on n.oid = c.relnamespace
         where c.relpersistence = 'p'
           and n.nspname <> 'multihome'
         order by name
    loop
        columns := '[]';
        for feed in
            select a.attrelid::regclass as relation, a.attname as name, format('%I.%I', n.nspname, t.relname) as table_name,
                   case coalesce(nullif(y.typbasetype, 0), y.oid)
                       when 'int2'::regtype then 32767
                       when 'int4'::regtype then 2147483647
                       when 'int8'::regtype then 9223372036854775807
                   end as most
              from (select d.refobjid as relation, d.refobjsubid as number
                      from pg_depend d
                     where d.classid = 'pg_class'::regclass and d.objid = entry.seqrelid and d.objsubid = 0
                       and d.refclassid = 'pg_class'::regclass and d.refobjsubid > 0 and d.deptype in ('a', 'i')
                    union
                    select f.adrelid, f.adnum
                      from pg_attrdef f
                      join pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = f.oid
                     where d.refclassid = 'pg_class'::regclass and d.refobjid = entry.seqrelid) as feeds
              join pg_class t on t.oid = feeds.relation and t.relkind in ('r', 'p') and t.relpersistence = 'p'
              join pg_namespace n on n.oid = t.relnamespace and n.nspname not in ('pg_catalog', 'information_schema', 'multihome')
              join pg_attribute a on a.attrelid = t.oid and a.attnum = feeds.number and not a.attisdropped
              join pg_type y on y.oid = a.atttypid
             where exists (select
                             from pg_index i
                            where i.indrelid = t.oid and i.indisunique and i.indisvalid
                              and a.attnum = any (i.indkey[0 : i.indnkeyatts - 1]))
             order by table_name, name
        loop
            highest := null;
            if feed.most is not null then
                execute format('select max(%I)::bigint from %s', feed.name, feed.relation) into highest;
            end if;
            columns := columns || jsonb_build_object(
                'table', feed.table_name, 'column', format('%I', feed.name), 'most', feed.most, 'highest', highest);
        end loop;
        if columns <> '[]' then
            return next jsonb_build_object(
                'name', entry.name, 'increment', entry.seqincrement, 'start', entry.seqstart, 'least', entry.seqmin, 'most', entry.seqmax,
                'cache', entry.seqcache, 'cycle', entry.seqcycle, 'next', multihome.next_value(entry.seqrelid, entry.seqincrement),
                'columns', columns);
        end if;
    end loop;
end $$;
revoke execute on function multihome.sequences() from public;
comment on function multihome.sequences() is
'The sequences that give values to a column of a key, one JSON object each: name, increment, start, least, most, cache, cycle, next (what it hands out next), and columns: table, column, most (the greatest
value of its type), highest (the greatest value in use).';

create function multihome.stride(changes jsonb) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
    change record;
    own pg_sequence;
begin
    if multihome.state() ->> 'state' <> 'down' then
        raise object_not_in_prerequisite_state using message = 'strides are given to sequences of a database that is down only',
              hint = 'Use stillebot-agent sequences stride, which takes all nodes down for it.';
    end if;
    perform multihome.begin_local('multihome.stride()');
    for change in select * from jsonb_to_recordset(changes) as c (name text, increment bigint, start bigint, next bigint) order by name loop
        select q.* into own from pg_sequence q where q.seqrelid = to_regclass(change.name);
        if not found then
            raise undefined_object using message = format('there is no sequence %s', change.name), hint = 'Run stillebot-agent sequences stride again.';
        end if;
        if own.seqincrement < 0 or own.seqcycle or change.increment < 1
           or change.next <= multihome.next_value(own.seqrelid, own.seqincrement) - own.seqincrement then
            raise object_not_in_prerequisite_state using
                  message = format('sequence %s would hand out values again', change.name),
                  hint = 'Strides are for ascending sequences without CYCLE, and lead forward.';
        end if;
        -- Makes sessions forget what they keep in CACHE, too.
        execute format('alter sequence %s increment by %s start with %s', own.seqrelid::regclass, change.increment, change.start);
        perform setval(own.seqrelid, change.next, false);
    end loop;
    perform multihome.end_local();
end $$;
revoke execute on function multihome.stride(jsonb) from public;
comment on function multihome.stride(jsonb) is
'Gives sequences other increments, on this node and while it is down: an array of objects with name, increment, start (where TRUNCATE .. RESTART IDENTITY begins again) and next (the value to come, never one
that was handed out). All of them or none.';

-- The maintenance window.

create function multihome.open_window(role name, length interval) returns void
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_open_window_wrapper';
revoke execute on function multihome.open_window(name, interval) from public;
comment on function multihome.open_window(name, interval) is
'Opens a maintenance window in this database, which is down and stays so: for that long, at most 24 hours, sessions that logged in as role may write, and nobody else, superusers included.
What they write stays on this node, so it has to be done on every node.
It ends with multihome.close_window(), with the session that calls this, at its deadline, or with a restart. What a transaction of the role has not committed by then is not committed.';

create function multihome.close_window(timeout interval default '5 s') returns pg_lsn
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_close_window_wrapper';
revoke execute on function multihome.close_window(interval) from public;
comment on function multihome.close_window(interval) is
'Closes the maintenance window of this database and returns an LSN past everything that was committed in it. Nothing of it can be committed afterwards: transactions under way have that long
to end, and then their sessions are ended. Refused while there are prepared transactions. When none is open: returns the LSN all the same.';

create or replace function public.stillebot_status(
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
           case when s.state ->> 'state' = 'maintenance'
                then format('maintenance window for %s until %s, opened by %s (process %s)%s',
                            s.state #>> '{window,role}', (s.state #>> '{window,until}')::timestamptz, s.state #>> '{window,by}', s.state #>> '{window,pid}',
                            '; down before: ' || (s.state ->> 'reason'))
                else s.state ->> 'reason' end,
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
'One row on this database. node: the setting stillebot.node. state: up, down, or maintenance (down, with a window for one role: reason says for whom and until when); since when it is up or down, by whom and why. writers: transactions that could write, now.
lsn: the current WAL position. subscriptions: how many there are, are enabled, and have a running apply worker. subscription_lag: the longest time since such a worker
heard from its peer (an idle peer speaks every half wal_sender_timeout). open_conflicts: open rows of multihome.conflicts. events_dropped: events that could not be recorded since the server started.
faults: troubles that are no fault of the data and have not ended, see multihome.faults. warnings: what about the subscriptions should be changed, and how.';

comment on function multihome.state() is
'The state of this database for programs: node, state (up, down, maintenance), since, by, reason, sole, rejoin, hop, window (role, until, by, pid), writers; stillebot_status() explains them.';

-- What the agent has changed of the schema, on this node. Rows are written in the transaction of the change, in a window, so
-- they do not travel; an initial copy brings those of the peer, which are told apart by the node.

create table multihome.schema_change (
    node text not null default multihome.node_id(),
    id text not null,
    file text not null,
    sha256 text not null,
    nodes text[] not null,
    by_whom text not null,
    at timestamptz not null default now(),
    primary key (node, id)
);
comment on table multihome.schema_change is 'Changes of the schema that stillebot-agent schema apply has committed on this node. A change is whole when each of its nodes has a row of it.';
comment on column multihome.schema_change.node is 'Whose row it is: multihome.node_id().';
comment on column multihome.schema_change.id is 'Of the change; the same on all nodes.';
comment on column multihome.schema_change.file is 'The name of the file with its statements.';
comment on column multihome.schema_change.sha256 is 'Of the file''s content.';
comment on column multihome.schema_change.nodes is 'The nodes that it is for, as the agent calls them.';
comment on column multihome.schema_change.by_whom is 'User and host of the agent.';
comment on column multihome.schema_change.at is 'When its transaction began here.';

create function multihome.note_schema_change(id text, file text, sha256 text, nodes text[], by_whom text) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp
begin atomic
    insert into multihome.schema_change (id, file, sha256, nodes, by_whom)
    values (note_schema_change.id, note_schema_change.file, note_schema_change.sha256, note_schema_change.nodes, note_schema_change.by_whom);
end;
revoke execute on function multihome.note_schema_change(text, text, text, text[], text) from public;
comment on function multihome.note_schema_change(text, text, text, text[], text) is 'Notes, in the transaction of a change of the schema, that it was made.';

create function multihome.schema_changes() returns setof multihome.schema_change
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
    select * from multihome.schema_change as c where c.node = multihome.node_id();
end;
revoke execute on function multihome.schema_changes() from public;
comment on function multihome.schema_changes() is 'The rows of multihome.schema_change that are this node''s own.';

-- PostgreSQL 18 tells conflicts itself: it names table and index in sentences only, and tells of rows that were last changed by another
-- origin. Of those only the ones that crossed come here, see apply_log.rs.

create or replace function multihome.record(event jsonb) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    name text;
    told jsonb := event;
    written bigint;
begin
    -- As subscription.rs words them.
    if event ->> 'message_id' = 'subscription "%s" does not replicate: this data directory is a copy of another node''s' then
        return 0; -- multihome.park() is for that.
    end if;
    if event ->> 'message_id' = 'subscription "%s" would replicate this database to itself' then
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
    end if;
    written := multihome.write_down(coalesce(told, event));
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
'Writes down what a replication worker reported, and returns the number of the row; 0 if there is none of it. Disables a subscription of this database to itself.
For the collector, in a transaction that stays on this node.';

comment on column multihome.conflicts.conflict_type is
'insert_exists, update_exists, multiple_unique_conflicts: the incoming row violates one or several unique indexes. update_missing, delete_missing: there is no row to change; apply goes on.
update_origin_differs, delete_origin_differs (from PostgreSQL 18 on): a change made here later was replaced by an earlier one of another node, for the two crossed; apply goes on. apply_error: anything else that stops apply or an initial copy.';

-- What there is, in words that can be compared between nodes.

create function multihome.schema()
returns table (kind text, relation text, name text, definition text, place integer)
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    with members as materialized (
        select d.classid, d.objid from pg_depend d where d.deptype = 'e'),
    schemas as materialized (
        select n.oid, quote_ident(n.nspname) as name from pg_namespace n
         where n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'multihome')
           and not exists (select from members m where m.classid = 'pg_namespace'::regclass and m.objid = n.oid)),
    relations as materialized (
        select c.*, format('%s.%I', s.name, c.relname) as name
          from pg_class c join schemas s on s.oid = c.relnamespace
         where c.relpersistence <> 't'
           and not exists (select from members m where m.classid = 'pg_class'::regclass and m.objid = c.oid)),
    constraints as materialized (
        select c.* from pg_constraint c where c.contype in ('c', 'p', 'u', 'x', 'f'))
    select 'schema', '', s.name, '', 0 from schemas s
    union all
    select case r.relkind when 'v' then 'view' when 'm' then 'materialized view' when 'f' then 'foreign table'
                          when 'c' then 'composite type' else 'table' end,
           '', r.name,
           concat_ws(' ', case when r.relpersistence = 'u' then 'unlogged' end,
                     case when r.relkind = 'p' then 'partition by ' || pg_get_partkeydef(r.oid) end,
                     (select case when r.relispartition then 'partition of ' else 'inherits ' end
                             || string_agg(i.inhparent::regclass::text, ', ' order by i.inhseqno)
                        from pg_inherits i where i.inhrelid = r.oid),
                     case when r.relispartition then pg_get_expr(r.relpartbound, r.oid) end,
                     case when r.relkind in ('v', 'm') then pg_get_viewdef(r.oid) end), 0
      from relations r where r.relkind in ('r', 'p', 'v', 'm', 'f', 'c')
    union all
    select 'column', r.name, quote_ident(a.attname),
           concat_ws(' ', format_type(a.atttypid, a.atttypmod),
                     case when a.attcollation <> t.typcollation then 'collate ' || a.attcollation::regcollation::text end,
                     case a.attidentity when 'a' then 'generated always as identity' when 'd' then 'generated by default as identity' end,
                     case a.attgenerated when 's' then format('generated always as (%s) stored', pg_get_expr(d.adbin, d.adrelid))
                                         when 'v' then format('generated always as (%s)', pg_get_expr(d.adbin, d.adrelid))
                                         else 'default ' || pg_get_expr(d.adbin, d.adrelid) end,
                     case when a.attnotnull then 'not null' end), a.attnum
      from relations r
      join pg_attribute a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
      join pg_type t on t.oid = a.atttypid
      left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
     where r.relkind in ('r', 'p', 'f', 'c')
    union all
    select 'replica identity', r.name, '',
           case r.relreplident when 'f' then 'full' when 'n' then 'nothing' when 'i' then 'using index '
                || coalesce((select quote_ident(c.relname) from pg_index i join pg_class c on c.oid = i.indexrelid
                              where i.indrelid = r.oid and i.indisreplident), '(dropped)')
                else 'default' end, 0
      from relations r where r.relkind in ('r', 'p')
    union all
    select 'row level security', r.name, '', case when r.relforcerowsecurity then 'force' else 'enable' end, 0
      from relations r where r.relrowsecurity
    union all
    select 'constraint', r.name, quote_ident(c.conname), pg_get_constraintdef(c.oid),
           case c.contype when 'p' then 1 when 'u' then 2 when 'f' then 4 else 3 end
      from relations r join constraints c on c.conrelid = r.oid
    union all
    select 'index', i.indrelid::regclass::text, quote_ident(r.relname),
           pg_get_indexdef(i.indexrelid) || case when i.indisvalid then '' else ' /* invalid */' end, 0
      from relations r join pg_index i on i.indexrelid = r.oid
     where not exists (select from constraints c where c.conindid = i.indexrelid and c.contype in ('p', 'u', 'x'))
    union all
    select 'trigger', r.name, quote_ident(t.tgname),
           pg_get_triggerdef(t.oid) || case when t.tgenabled <> 'O'
                then format('; alter table %s %s trigger %I', r.name,
                            case t.tgenabled when 'A' then 'enable always' when 'R' then 'enable replica' else 'disable' end, t.tgname)
                else '' end, 0
      from relations r join pg_trigger t on t.tgrelid = r.oid
     where not t.tgisinternal
    union all
    select 'policy', r.name, quote_ident(p.polname),
           concat_ws(' ', case when p.polpermissive then 'permissive' else 'restrictive' end, 'for', p.polcmd,
                     'to', (select string_agg(case o.role when 0 then 'public' else o.role::regrole::text end, ', ' order by o.role::regrole::text)
                              from unnest(p.polroles) as o (role)),
                     'using ' || pg_get_expr(p.polqual, p.polrelid), 'check ' || pg_get_expr(p.polwithcheck, p.polrelid)), 0
      from relations r join pg_policy p on p.polrelid = r.oid
    union all
    select 'sequence', '', r.name, 'as ' || format_type(s.seqtypid, null) || case when s.seqcycle then ' cycle' else '' end, 0
      from relations r join pg_sequence s on s.seqrelid = r.oid
     where not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = r.oid and d.deptype = 'i')
    union all
    select 'function', '', format('%s.%I(%s)', s.name, p.proname, pg_get_function_identity_arguments(p.oid)),
           case when p.prokind = 'a' then 'aggregate ' || pg_get_function_result(p.oid) else pg_get_functiondef(p.oid) end, 0
      from pg_proc p join schemas s on s.oid = p.pronamespace
     where not exists (select from members m where m.classid = 'pg_proc'::regclass and m.objid = p.oid)
    union all
    select 'type', '', format('%s.%I', s.name, t.typname),
           case t.typtype
               when 'e' then format('enum (%s)', (select string_agg(quote_literal(e.enumlabel), ', ' order by e.enumsortorder)
                                                    from pg_enum e where e.enumtypid = t.oid))
               when 'd' then concat_ws(' ', 'domain', format_type(t.typbasetype, t.typtypmod), 'default ' || t.typdefault,
                                       case when t.typnotnull then 'not null' end,
                                       (select string_agg(format('constraint %I %s', c.conname, pg_get_constraintdef(c.oid)), ' ' order by c.conname)
                                          from constraints c where c.contypid = t.oid))
               else 'range of ' || (select format_type(r.rngsubtype, null) from pg_range r where r.rngtypid = t.oid) end, 0
      from pg_type t join schemas s on s.oid = t.typnamespace
     where t.typtype in ('e', 'd', 'r')
       and not exists (select from members m where m.classid = 'pg_type'::regclass and m.objid = t.oid)
    union all
    select 'publication', '', quote_ident(p.pubname),
           concat_ws(' ', case when p.puballtables then 'for all tables' end,
                     'for tables in schema ' || (select string_agg(quote_ident(n.nspname), ', ' order by n.nspname)
                                                   from pg_publication_namespace pn join pg_namespace n on n.oid = pn.pnnspid where pn.pnpubid = p.oid),
                     'for table ' || (select string_agg(concat(pr.prrelid::regclass::text,
                                                               ' (' || (select string_agg(quote_ident(a.attname), ', ' order by a.attname)
                                                                          from pg_attribute a where a.attrelid = pr.prrelid and a.attnum = any (pr.prattrs)) || ')',
                                                               ' where ' || pg_get_expr(pr.prqual, pr.prrelid)), ', ' order by pr.prrelid::regclass::text)
                                        from pg_publication_rel pr where pr.prpubid = p.oid),
                     case when not p.pubinsert then 'without insert' end, case when not p.pubupdate then 'without update' end,
                     case when not p.pubdelete then 'without delete' end, case when not p.pubtruncate then 'without truncate' end,
                     case when p.pubviaroot then 'via root' end), 0
      from pg_publication p;
end;
revoke execute on function multihome.schema() from public;
comment on function multihome.schema() is
'What there is in this database, in words that are the same on every node that has the same: kind, relation it is part of, name, definition; place orders columns and constraints and is no part of what is compared.
Left out: what is PostgreSQL''s own, an extension''s, temporary, or in schema multihome; owners and privileges; the order of columns; where sequences are and how they step.';

create function multihome.schema_fingerprint() returns text
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
begin atomic
    select encode(sha256(convert_to(coalesce(string_agg(line.text, e'\n' order by line.text collate "C"), ''), 'UTF8')), 'hex')
      from multihome.schema() as s
     cross join lateral (select concat_ws(e'\x1f', s.kind, s.relation, s.name, s.definition)) as line (text);
end;
revoke execute on function multihome.schema_fingerprint() from public;
comment on function multihome.schema_fingerprint() is 'The same on two nodes exactly if multihome.schema() is.';

-- A change of the schema is told to whoever listens: the agent's watch.

create function multihome.tell_schema_change() returns event_trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    names text;
begin
    -- A transaction that has notified cannot be prepared, so where that may be wanted nothing is told; the watch sees it at its next look.
    if current_setting('max_prepared_transactions')::integer > 0 then
        return;
    end if;
    if tg_event = 'sql_drop' then
        select string_agg(o.object_identity, ', ') into names
          from pg_event_trigger_dropped_objects() o where o.original and not o.is_temporary;
    else
        select string_agg(c.object_identity, ', ') into names
          from pg_event_trigger_ddl_commands() c
         where not c.in_extension and c.schema_name is distinct from 'pg_temp';
    end if;
    if names is not null then
        perform pg_notify('stillebot_schema', left(concat_ws(' ', tg_tag, names), 1900));
    end if;
exception when others then
    null; -- No change of a schema fails because nobody could be told.
end $$;
revoke execute on function multihome.tell_schema_change() from public;
comment on function multihome.tell_schema_change() is
'NOTIFY stillebot_schema with the command and the names of what it changed, unless that is temporary or an extension''s. Tells nothing where max_prepared_transactions is not 0.';

-- Commands about subscriptions are none of it: they pass in a database that is down, where a trigger could not.
create event trigger stillebot_schema_changed on ddl_command_end
    when tag in ('CREATE SCHEMA', 'CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO', 'CREATE INDEX', 'CREATE SEQUENCE', 'CREATE FUNCTION', 'CREATE PROCEDURE',
                 'CREATE AGGREGATE', 'CREATE TRIGGER', 'CREATE TYPE', 'CREATE DOMAIN', 'CREATE VIEW', 'CREATE MATERIALIZED VIEW', 'CREATE FOREIGN TABLE',
                 'CREATE POLICY', 'CREATE PUBLICATION',
                 'ALTER SCHEMA', 'ALTER TABLE', 'ALTER INDEX', 'ALTER SEQUENCE', 'ALTER FUNCTION', 'ALTER PROCEDURE', 'ALTER AGGREGATE', 'ALTER TRIGGER',
                 'ALTER TYPE', 'ALTER DOMAIN', 'ALTER VIEW', 'ALTER MATERIALIZED VIEW', 'ALTER FOREIGN TABLE', 'ALTER POLICY', 'ALTER PUBLICATION')
    execute function multihome.tell_schema_change();
comment on event trigger stillebot_schema_changed is 'NOTIFY stillebot_schema: the schema has changed.';
create event trigger stillebot_schema_dropped on sql_drop
    when tag in ('DROP SCHEMA', 'DROP TABLE', 'DROP INDEX', 'DROP SEQUENCE', 'DROP FUNCTION', 'DROP PROCEDURE', 'DROP ROUTINE', 'DROP AGGREGATE', 'DROP TRIGGER',
                 'DROP TYPE', 'DROP DOMAIN', 'DROP VIEW', 'DROP MATERIALIZED VIEW', 'DROP FOREIGN TABLE', 'DROP POLICY', 'DROP PUBLICATION', 'DROP OWNED')
    execute function multihome.tell_schema_change();
comment on event trigger stillebot_schema_dropped is 'NOTIFY stillebot_schema: something of the schema was dropped.';

-- A table that has rows on one node before it replicates.

create function multihome.count_rows(relation text, most bigint) returns bigint
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    counted bigint;
begin
    perform from pg_class where oid = to_regclass(relation) and relkind in ('r', 'p');
    if not found then
        raise undefined_table using message = format('there is no table %s', quote_nullable(relation));
    end if;
    execute format('select count(*) from (select from %s limit $1) as t', to_regclass(relation)) into counted using most;
    return counted;
end $$;
revoke execute on function multihome.count_rows(text, bigint) from public;
comment on function multihome.count_rows(text, bigint) is 'How many rows a table has, counted up to most.';

create function multihome.copy_table(relation text, subscription text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '10s'
as $$
declare
    target oid := to_regclass(relation);
    source oid := (select s.oid from pg_subscription s join pg_database d on d.oid = s.subdbid
                    where d.datname = current_database() and s.subname = copy_table.subscription);
    worker integer;
begin
    -- What is written here is written of this node only, and it may be down.
    perform multihome.begin_local('multihome.copy_table()');
    if source is null or target is null or exists (select from pg_subscription_rel r
                                                    where r.srsubid = source and r.srrelid = target and r.srsubstate <> 'r') then
        raise object_not_in_prerequisite_state using
            message = format('there is no table %s, no subscription %s, or the one is being copied by the other', quote_nullable(relation), quote_nullable(subscription)),
            hint = 'Name the table with its schema, and wait for the end of a copy.';
    end if;
    -- Keeps the apply worker from the table until this is committed.
    execute format('lock table %s in share row exclusive mode', target::regclass);
    if multihome.count_rows(relation, 1) > 0 then
        raise object_not_in_prerequisite_state using message = format('table %s has rows', relation),
            hint = 'Only an empty table is populated. Rows that are deleted here are deleted on the other nodes, too.';
    end if;
    update pg_subscription_rel set srsubstate = 'i', srsublsn = null where srsubid = source and srrelid = target;
    if not found then
        -- New to the subscription. With a refresh before, rows written since then might be here before the copy.
        insert into pg_subscription_rel (srsubid, srrelid, srsubstate) values (source, target, 'i');
    end if;
    -- A worker that knew the table as ready would go on to apply to it. The next one cannot have opened it before the commit.
    for worker in select w.pid from pg_stat_subscription w where w.subid = source and w.relid is null and w.pid is not null loop
        perform pg_terminate_backend(worker, 10000);
    end loop;
    perform multihome.end_local();
end $$;
revoke execute on function multihome.copy_table(text, text) from public;
comment on function multihome.copy_table(text, text) is
'Has the rows of a table copied, once more if need be, from the publisher of a subscription, by that subscription''s own initial copy: consistent with what replicates meanwhile, and nothing of it travels on. Refused unless the table is empty here.
Ends the apply worker; multihome.restart_apply() has the next one started at once.';
