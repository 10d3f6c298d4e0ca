-- stillebot 0.6.0: what happens when a schema drifts, is said where it is looked for.

\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit

-- Answers that were not followed through on the other nodes: the agent looks for them.

create index log_kept on multihome.log (node) where status = 'resolved' and resolution like 'kept %';
comment on index multihome.log_kept is 'Conflicts that were answered on this node, and whose nodes have not been compared since.';
