-- What the agent's role may do: watch, open and close, say which side is active, and resolve conflicts. Nothing as superuser.
grant usage on schema multihome to stillebot_agent;
grant execute on function
    public.stillebot_down(text, interval, boolean),
    public.stillebot_up(),
    multihome.down(text, interval, boolean, jsonb),
    multihome.up(boolean),
    multihome.set_hop(jsonb),
    multihome.refresh(boolean),
    public.stillebot_skip(bigint),
    public.stillebot_resolve(bigint, text),
    multihome.conflict_changes(bigint),
    multihome.make_room(bigint, jsonb),
    multihome.versions(bigint, jsonb),
    multihome.assign(bigint, jsonb, jsonb),
    multihome.remove(bigint, jsonb),
    multihome.put(bigint, jsonb),
    multihome.settle(bigint, text, text),
    multihome.note(bigint, text),
    multihome.restart_apply(text)
to stillebot_agent;
grant select on multihome.conflicts, multihome.faults to stillebot_agent;
