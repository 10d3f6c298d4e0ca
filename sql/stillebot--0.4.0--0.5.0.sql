-- stillebot 0.5.0: schema changes by a window in a database that is down, what differs between the nodes' schemas, and sequences
-- that do not collide.

\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit
