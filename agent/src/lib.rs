//! `stillebot-agent`: what two or more live PostgreSQL nodes need from outside the servers.
//!
//! ```text
//! main.rs    a dozen lines: run, print, exit code
//! cli.rs     the grammar of the command line
//! config.rs  agent.toml and psql's variables      pgpass.rs  libpq's password file
//! cmd/       one file a command: asks, decides, acts, reports
//! hop.rs     the hop's table of steps and its decisions, without IO
//! change.rs  the steps of a schema change and its decisions, without IO
//! facts.rs   what nodes tell about themselves, and what follows from it
//! conflict.rs a conflict as its node tells it
//! resolve.rs what to do about conflicts, without IO
//! resolver.rs does it on the nodes, for `conflicts` and by rules
//! order.rs   which of two values of a column is the greater
//! template.rs texts with columns in them
//! certs.rs   certificates: what they say and whether they will do, without IO
//! deploy.rs  where a certificate and its key are put, as a pair
//! inspect.rs how all certificates in use stand
//! renewal.rs how the last deployment of a certificate ended
//! conninfo.rs libpq's connection strings
//! connection.rs which subscriptions connect with something else, and whether the right node answers, without IO
//! crew.rs    the sessions of one command, each holding its node's lock
//! survey.rs  what one node tells about itself for set-up
//! check.rs   what of it is right, what is not, and what mends it, without IO
//! hba.rs     who gets in by pg_hba.conf, without IO
//! grants.rs  what the agent's role has to be allowed
//! clock.rs   a server's clock, measured from here
//! schema.rs  what differs between the nodes' schemas, and the statements that mend it
//! setup.rs   from what the nodes are to a set that replicates, without IO
//! leave.rs   and back again
//! sight.rs   what one node tells the watchdog
//! watchdog.rs what is wrong with replication, without IO
//! condition.rs the watchdog's vocabulary
//! alarm.rs   what of it is said, and when, without IO
//! sequences.rs who hands out which keys, without IO
//! node.rs    the only file that opens a connection
//! stop.rs    signals and the deadline
//! quote.rs   names and values as SQL wants them
//! sql.rs     the names of the queries in sql/, one a file
//! failure.rs exit codes and how an error is shown
//! ```
//!
//! Deliberately a library only so that tests can see [`hop::STEPS`]; it promises no API.

pub mod alarm;
pub mod certs;
pub mod change;
pub mod check;
pub mod cli;
pub mod clock;
pub mod cmd;
pub mod condition;
pub mod config;
pub mod conflict;
pub mod connection;
pub mod conninfo;
pub mod crew;
pub mod deploy;
pub mod digest;
pub mod facts;
pub mod failure;
pub mod grants;
pub mod hba;
pub mod hop;
pub mod inspect;
pub mod leave;
pub mod node;
pub mod order;
pub mod pgpass;
pub mod quote;
pub mod renewal;
pub mod resolve;
pub mod resolver;
pub mod schema;
pub mod sequences;
pub mod setup;
pub mod sight;
pub mod sql;
pub mod stop;
pub mod survey;
pub mod template;
pub mod watchdog;
