-- What the agent's role may do: watch, open and close, and say which side is active. Nothing as superuser.
grant usage on schema multihome to stillebot_agent;
grant execute on function
    public.stillebot_down(text, interval, boolean),
    public.stillebot_up(),
    multihome.down(text, interval, boolean, jsonb),
    multihome.up(boolean),
    multihome.set_hop(jsonb),
    multihome.refresh(boolean)
to stillebot_agent;
