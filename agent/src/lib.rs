//! `stillebot-agent`: what two or more live PostgreSQL nodes need from outside the servers.
//!
//! ```text
//! main.rs    a dozen lines: run, print, exit code
//! cli.rs     the grammar of the command line
//! config.rs  agent.toml and psql's variables      pgpass.rs  libpq's password file
//! cmd/       one file a command: asks, decides, acts, reports
//! hop.rs     the hop's table of steps and its decisions, without IO
//! facts.rs   what nodes tell about themselves, and what follows from it
//! crew.rs    the sessions of one command, each holding its node's lock
//! node.rs    the only file that opens a connection
//! stop.rs    signals and the deadline
//! template.rs texts with columns in them
//! sql.rs     the names of the queries in sql/, one a file
//! failure.rs exit codes and how an error is shown
//! ```
//!
//! Deliberately a library only so that tests can see [`hop::STEPS`]; it promises no API.

pub mod cli;
pub mod cmd;
pub mod config;
pub mod crew;
pub mod facts;
pub mod failure;
pub mod hop;
pub mod node;
pub mod pgpass;
pub mod sql;
pub mod stop;
pub mod template;
