-- stillebot 0.6.0: what happens when a schema drifts, is said where it is looked for.

\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit

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

alter table multihome.log add column remedy text;

create or replace view multihome.conflicts as
    select id, subscription, conflict_type, schemaname, relname, constraint_name, remote_origin, remote_xid, remote_commit_lsn,
           remote_commit_ts, replica_identity, remote_tuple, local_conflicts, sqlstate, message, detail, context, first_seen,
           last_seen, occurrences, status, resolution, resolved_by, resolved_at, operation, change_number, transaction_kind,
           changes_complete, blocking, remedy
      from multihome.log
     where node = multihome.node_id();
comment on column multihome.conflicts.remedy is
'Of an apply_error that comes of tables that differ between the nodes: statements, on this node, that make what it lacks or has of another type; run them, and apply goes on. From what the publisher sends of a
table: names, types and key. Defaults and constraints are in stillebot-agent conflicts show and schema diff. Null: tables do not differ in that, or it is an initial copy.';

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
