-- stillebot 0.2.0: what the agent needs to move the live side between nodes.
\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit

create function multihome.down(reason text, timeout interval, terminate boolean, hop jsonb) returns pg_lsn
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_down_wrapper';
revoke execute on function multihome.down(text, interval, boolean, jsonb) from public;
comment on function multihome.down(text, interval, boolean, jsonb) is
'stillebot_down() for the agent. hop: which hop this is part of, kept with the state until multihome.set_hop(null) or up; when down already, replaces it unless null.';

create function multihome.up(sole boolean) returns void
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_up_wrapper';
revoke execute on function multihome.up(boolean) from public;
comment on function multihome.up(boolean) is
'stillebot_up() for the agent. sole: this is now the only writable node, so that after a restart, when its peer may have been opened, it comes back down until told otherwise.
When up already: changes only that.';

create function multihome.set_hop(hop jsonb) returns void
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_set_hop_wrapper';
revoke execute on function multihome.set_hop(jsonb) from public;
comment on function multihome.set_hop(jsonb) is
'Replaces the note of an unfinished hop in the state of this database, which is down; null: there is none.';

create function multihome.refresh(copy_data boolean default false) returns setof text
language c volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp
as 'MODULE_PATHNAME', 'multihome_refresh_wrapper';
revoke execute on function multihome.refresh(boolean) from public;
comment on function multihome.refresh(boolean) is
'ALTER SUBSCRIPTION .. REFRESH PUBLICATION for each enabled subscription of this database, also while it is down; returns their names.
copy_data: whether to copy the rows that newly published tables already have at the publisher.';
