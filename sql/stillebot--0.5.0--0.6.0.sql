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
