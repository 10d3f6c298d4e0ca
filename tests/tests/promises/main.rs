//! The promises of this project, each proved on real servers. One module per part; a test is named as the promise.

use std::time::Duration;

mod agent;
mod answers;
mod certbot;
mod certs;
mod check;
mod clients;
mod conflicts;
mod connection;
mod contract;
mod down;
mod harness;
mod hop;
mod identity;
mod lasting;
mod leaving;
mod mending;
mod oneself;
mod populate;
mod proven;
mod replication;
mod resolving;
mod rules;
mod runs;
mod scenarios;
mod schema_change;
mod schema_diff;
mod schema_drift;
mod sequences;
mod setup;
mod testme;
mod versions;
mod watch;
mod window;

/// How long to wait for what should happen at once: long, because a loaded machine is not a failure.
const PATIENCE: Duration = Duration::from_secs(30);
