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
