-- What the subscriptions of this database connect with, passwords left out.
select c.subscription::text as subscription, c.conninfo from multihome.connections() c
