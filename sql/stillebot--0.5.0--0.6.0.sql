-- stillebot 0.6.0: what happens when a schema drifts, is said where it is looked for.

\echo Use "ALTER EXTENSION stillebot UPDATE" to load this file. \quit
