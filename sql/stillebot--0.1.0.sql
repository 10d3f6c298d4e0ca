-- stillebot 0.1.0: a database that can be taken down and up, and says which it is.
\echo Use "CREATE EXTENSION stillebot" to load this file. \quit

create schema multihome;
comment on schema multihome is 'stillebot: what programs use; people use the stillebot_* functions';
grant usage on schema multihome to public;

create function public.stillebot_down(
    reason text default null,
    timeout interval default '30 s',
    terminate boolean default false
) returns pg_lsn
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'stillebot_down_wrapper';
revoke execute on function public.stillebot_down(text, interval, boolean) from public;
comment on function public.stillebot_down(text, interval, boolean) is
'Makes this database refuse writes from now on, also after a crash or reboot, and returns an LSN past every committed write.
reason: shown to whoever is refused. timeout: how long transactions that could still write may take to end; then an error names them and the database is up as before.
terminate: end their sessions instead. Sends NOTIFY readonly, ''on''. When down already: returns at once.';

create function public.stillebot_up() returns void
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'stillebot_up_wrapper';
revoke execute on function public.stillebot_up() from public;
comment on function public.stillebot_up() is
'Lets this database take writes again, also after a crash or reboot. Sends NOTIFY readonly, ''off''. When up already: does nothing.';

create function multihome.state() returns jsonb
language c volatile parallel restricted
as 'MODULE_PATHNAME', 'multihome_state_wrapper';
comment on function multihome.state() is
'The state of this database for programs: node, state (up, down), since, by, reason, sole, rejoin, hop, writers; stillebot_status() explains them.';

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
    out events_dropped bigint
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
           null::bigint,
           sub.subscriptions,
           sub.enabled,
           sub.working,
           sub.lag,
           null::bigint
      from (select multihome.state()) as s (state),
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
heard from its peer (an idle peer speaks every half wal_sender_timeout). open_conflicts, events_dropped: null, this version does not record conflicts.';
