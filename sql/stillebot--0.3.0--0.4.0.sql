-- stillebot 0.4.0: a node knows who it is and refuses to be subscribed to itself; set-up by the agent.

\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit

-- A worker that is just starting has a time of its last message, its own start, but no position: it has heard nothing yet.
create or replace view multihome.faults as
    select f.subscription, f.sqlstate, f.message, f.first_seen, f.last_seen, f.occurrences,
           s.oid is null or coalesce(w.received_lsn is not null and w.last_msg_receipt_time > f.last_seen, false) as healed
      from multihome.fault f
      left join pg_catalog.pg_subscription s on s.oid = f.subscription_oid
      left join pg_catalog.pg_stat_subscription w on w.subid = f.subscription_oid and w.relid is null and w.pid is not null
     where f.node = multihome.node_id();

-- Rows that go from node to node and back: what set-up proves replication with.

create table multihome.probe (
    token uuid primary key,
    node text not null,
    sent_at timestamptz not null default clock_timestamp()
);
comment on table multihome.probe is 'Rows by which the agent proves that replication works: written on one node, answered by each other one. Removed afterwards.';
comment on column multihome.probe.node is 'The name of the node that wrote it.';

-- Who a node is.

create function multihome.identify(node text, pair uuid) returns uuid
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_identify_wrapper';
revoke execute on function multihome.identify(text, uuid) from public;
comment on function multihome.identify(text, uuid) is
'Tells this database which node it is, of which pair, and returns the node''s own uuid, which is made the first time. Again, with the same pair: may change the name.
A copy of the data directory knows itself by that and does not join. Also while down.';

create function multihome.forget_identity() returns void
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_forget_identity_wrapper';
revoke execute on function multihome.forget_identity() from public;
comment on function multihome.forget_identity() is
'Undoes multihome.identify(). A copy of another node becomes a database of its own, which is down and whose subscriptions are disabled.';

create function multihome.identity() returns jsonb
language c volatile parallel restricted
as 'MODULE_PATHNAME', 'multihome_identity_wrapper';
comment on function multihome.identity() is
'Who this database is: node, pair, id, home (where it was told so), since, parked (subscriptions that were disabled because it is a copy), foreign (it is a copy), why, system_identifier, database_oid,
postmaster_started_us (microseconds since 1970). null: nobody has told it; see multihome.identify().';

create function public.stillebot_adopt_identity() returns text
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'stillebot_adopt_identity_wrapper';
revoke execute on function public.stillebot_adopt_identity() from public;
comment on function public.stillebot_adopt_identity() is
'Makes this copy of a node the node itself: after the original is gone for good, its data directory was moved, or pg_upgrade. Never while the original runs.
Its subscriptions are enabled again; the database stays down. Returns what to do next.';

comment on function multihome.node_id() is
'This node, in the log: its own uuid if it has an identity, otherwise the system identifier of the server and the oid of the database.';

-- What subscriptions connect with: the catalog shows that to superusers only, because of the passwords in it.

create function multihome.connections() returns table (subscription name, conninfo text)
language sql stable security definer
set search_path = pg_catalog, pg_temp
begin atomic
    -- scrubbed() takes a value without quotes to end at the first quote, which libpq does not.
    select s.subname,
           multihome.scrubbed(regexp_replace(s.subconninfo, '(password\s*=\s*)(''(?:[^''\\]|\\.)*''|(?:[^\s\\]|\\.)+)', '\1***', 'gi'))
      from pg_subscription s
      join pg_database d on d.oid = s.subdbid
     where d.datname = current_database()
     order by s.subname;
end;
revoke execute on function multihome.connections() from public;
comment on function multihome.connections() is 'What the subscriptions of this database connect with, without the passwords.';

-- What a replication worker says when it must not replicate is no error of replication.

alter function multihome.record(jsonb) rename to write_down;
comment on function multihome.write_down(jsonb) is
'Writes down what a replication worker reported, and returns the number of the row; 0 if there is none of it. For multihome.record().';

create function multihome.record(event jsonb) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    name text;
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
    return multihome.write_down(event);
end $$;
revoke execute on function multihome.record(jsonb) from public;
comment on function multihome.record(jsonb) is
'Writes down what a replication worker reported, and returns the number of the row; 0 if there is none of it. Disables a subscription of this database to itself.
For the collector, in a transaction that stays on this node.';

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
           || (select array_agg('conflicts are not being recorded: no collector is running; is there a free place among max_worker_processes?'::text)
                 from pg_database d
                where d.datname = current_database() and multihome.collector() is null
                  and exists (select from pg_subscription s join pg_stat_subscription w on w.subid = s.oid where s.subdbid = d.oid and w.pid is not null));
end;

create function multihome.park() returns bigint
language c volatile parallel unsafe
as 'MODULE_PATHNAME', 'multihome_park_wrapper';
revoke execute on function multihome.park() from public;
comment on function multihome.park() is
'Disables the subscriptions of a database that is a copy of another node, and remembers them for stillebot_adopt_identity(). Returns how many. For the collector.';

-- A renewed client certificate is used by a subscription from its next connection on.

create function multihome.reconnect(subscription text) returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    worker integer;
begin
    perform from pg_subscription s join pg_database d on d.oid = s.subdbid
      where d.datname = current_database() and s.subname = subscription;
    if not found then
        raise undefined_object using message = format('there is no subscription %s in this database', quote_nullable(subscription));
    end if;
    select w.pid into worker
      from pg_stat_subscription w join pg_subscription s on s.oid = w.subid join pg_database d on d.oid = s.subdbid
     where d.datname = current_database() and s.subname = subscription and w.relid is null and w.leader_pid is null and w.pid is not null;
    if worker is not null and not pg_terminate_backend(worker) then
        worker := null;
    end if;
    return worker;
end $$;
revoke execute on function multihome.reconnect(text) from public;
comment on function multihome.reconnect(text) is 'Ends the apply worker of a subscription, so that the next one, started at once, connects anew and with the certificate that is there now. Returns the process id of the one that was ended; null if there was none.';
