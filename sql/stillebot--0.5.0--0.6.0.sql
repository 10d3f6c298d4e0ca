-- stillebot 0.6.0: what happens when a schema drifts, is said where it is looked for.

\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit

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

-- A publisher that has gone back in time: when its WAL has grown past what is applied here, nobody could tell any more, so its
-- subscription is disabled at once.

create function multihome.part() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    name text;
begin
    select s.subname into name from pg_subscription s where s.oid = new.subscription_oid and s.subenabled;
    if found then
        begin
            execute format('alter subscription %I disable', name);
        exception when lock_not_available then
            null; -- It comes again.
        end;
    end if;
    return null;
end $$;
revoke execute on function multihome.part() from public;
comment on function multihome.part() is 'Disables a subscription whose publisher has gone back in time.';

-- As subscription.rs words it.
create trigger part after insert or update of occurrences on multihome.log
for each row when (new.sqlstate = '55000' and new.message like 'subscription "%" does not replicate: its publisher has gone back in time')
execute function multihome.part();
comment on trigger part on multihome.log is 'Disables a subscription whose publisher has gone back in time.';
