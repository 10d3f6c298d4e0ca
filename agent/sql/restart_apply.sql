-- Has the apply worker of a subscription started at once.
select multihome.restart_apply($1)
