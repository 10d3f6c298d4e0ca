-- What the agent's role may do: watch, open and close, and resolve conflicts. Nothing as superuser. One statement a line,
-- which `init` runs and `check` looks for; {role} is the role.
grant pg_monitor to {role};
grant usage on schema multihome to {role};
grant execute on function multihome.down(text, interval, boolean, jsonb) to {role};
grant execute on function multihome.up(boolean) to {role};
grant execute on function multihome.set_hop(jsonb) to {role};
grant execute on function multihome.refresh(boolean) to {role};
grant execute on function multihome.connections() to {role};
grant execute on function multihome.sequences() to {role};
grant execute on function multihome.sequence_positions() to {role};
grant execute on function multihome.advance_sequences(jsonb) to {role};
grant execute on function multihome.stride(jsonb) to {role};
grant execute on function public.stillebot_skip(bigint) to {role};
grant execute on function public.stillebot_resolve(bigint, text) to {role};
grant execute on function multihome.conflict_changes(bigint) to {role};
grant execute on function multihome.make_room(bigint, jsonb) to {role};
grant execute on function multihome.versions(bigint, jsonb) to {role};
grant execute on function multihome.assign(bigint, jsonb, jsonb) to {role};
grant execute on function multihome.remove(bigint, jsonb) to {role};
grant execute on function multihome.put(bigint, jsonb) to {role};
grant execute on function multihome.settle(bigint, text, text) to {role};
grant execute on function multihome.note(bigint, text) to {role};
grant execute on function multihome.restart_apply(text) to {role};
grant execute on function multihome.reconnect(text) to {role};
grant execute on function pg_catalog.pg_reload_conf() to {role};
grant execute on function pg_catalog.pg_hba_file_rules() to {role};
grant select on table multihome.conflicts to {role};
grant select on table multihome.faults to {role};
