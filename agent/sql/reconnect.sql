-- subscription
select multihome.reconnect($1)
