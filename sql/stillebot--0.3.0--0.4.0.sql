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
