//! The vocabulary of the watchdog: what can be the matter with what, in words for people and for programs.
//!
//! Pure, and deliberately judges nothing; `watchdog.rs` does.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::sight::Wait;

/// What something is the matter with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(untagged)]
pub enum Subject {
    /// A node.
    Node {
        /// Its name.
        node: String,
    },
    /// A slot, and whom it keeps WAL for.
    Slot {
        /// The node that has it.
        node: String,
        /// Its name.
        slot: String,
    },
    /// A certificate that is in use, or should be.
    Certificate {
        /// Whose it is.
        node: String,
        /// Which one.
        certificate: String,
    },
    /// Conflicts of one table, on the node that met them.
    Table {
        /// The node.
        node: String,
        /// The table.
        table: String,
    },
    /// Replication from one node to another.
    Direction {
        /// Where it was written.
        from: String,
        /// Where it is applied.
        to: String,
    },
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node { node } => f.write_str(node),
            Self::Slot { node, slot } => write!(f, "slot {slot} on {node}"),
            Self::Certificate { node, certificate } => write!(f, "certificate ({certificate}) of {node}"),
            Self::Table { node, table } => write!(f, "{table} on {node}"),
            Self::Direction { from, to } => write!(f, "{from} -> {to}"),
        }
    }
}

/// What is the matter.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "condition", rename_all = "snake_case")]
pub enum Condition {
    /// The node cannot be asked.
    Unreachable {
        /// Why.
        error: String,
    },
    /// The extension warns of something.
    Warning {
        /// In its words.
        warning: String,
    },
    /// A node's schema is not that of the others.
    Drift {
        /// The node that it is compared with.
        reference: String,
        /// Tables that only one of the two publishes.
        missing: Vec<String>,
    },
    /// The target has no such subscription.
    SubscriptionMissing {
        /// The subscription that there should be.
        subscription: String,
    },
    /// The source does not have the subscription's slot.
    SlotMissing {
        /// The slot; none if the subscription is not associated with one.
        slot: Option<String>,
    },
    /// The source has removed WAL that the target needs.
    SlotLost {
        /// The slot.
        slot: String,
    },
    /// Apply fails at the same place again and again, or waits for a conflict to be resolved.
    Erroring {
        /// Errors since the last progress, as far as counted.
        errors: i64,
        /// Numbers, on the target, of the conflicts that stop apply.
        conflicts: Vec<i64>,
        /// The first of them, in words.
        message: Option<String>,
        /// The subscription has been disabled for it.
        disabled: bool,
    },
    /// The subscription is switched off.
    Disabled {
        /// The subscription.
        subscription: String,
    },
    /// A worker waits for a lock that somebody holds.
    Blocked(Wait),
    /// The target is not connected to the source.
    Disconnected {
        /// Which end says so, and what it says.
        evidence: String,
    },
    /// The target believes to be connected, and at the source nobody reads the slot.
    SlotInactive {
        /// The slot.
        slot: String,
    },
    /// Connected, behind, and nothing moves.
    Stalled {
        /// Bytes of WAL not yet applied.
        bytes_behind: u64,
        /// Seconds that the worker has been inside one remote transaction.
        seconds_applying: Option<f64>,
        /// What it waits for; empty if it is at work.
        waiting_for: String,
    },
    /// Moving, but what is applied now was written long ago.
    Slow {
        /// Bytes of WAL not yet applied.
        bytes_behind: u64,
        /// How old, at least, what is being applied is.
        seconds_behind: f64,
        /// When it has caught up if it goes on as it does.
        catch_up: CatchUp,
    },
    /// Conflicts that no rule resolves are open.
    Unresolved {
        /// The first of them.
        conflict: i64,
        /// How many there are.
        conflicts: usize,
        /// Why the first one is left to a person.
        why: String,
    },
    /// A certificate expires soon, is not verified, or is not the one that is served.
    Certificate {
        /// In words.
        trouble: String,
    },
    /// A slot whose reader is gone, or takes nothing, keeps WAL.
    WalKept {
        /// Whom it is for, if that is a node of ours.
        peer: Option<String>,
        /// Bytes.
        bytes: u64,
        /// Bytes of WAL that the node writes in a second.
        bytes_per_second: u64,
        /// What ends it, as far as the agent can see.
        end: Option<End>,
        /// In how many seconds, at the present rate.
        seconds_left: Option<f64>,
    },
}

/// When a slow direction has caught up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CatchUp {
    /// In so many seconds.
    Seconds(f64),
    /// It falls further behind.
    Never,
    /// One transaction is being applied; there is nothing to reckon with.
    Unknown,
}

/// What keeping WAL leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The file system is full, and the server stops.
    DiskFull,
    /// `max_slot_wal_keep_size` is reached, and the reader has to be set up anew.
    SlotLost,
}

impl Condition {
    /// Its name, as in `--json`.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Warning { .. } => "warning",
            Self::Drift { .. } => "drift",
            Self::SubscriptionMissing { .. } => "subscription_missing",
            Self::SlotMissing { .. } => "slot_missing",
            Self::SlotLost { .. } => "slot_lost",
            Self::Erroring { .. } => "erroring",
            Self::Disabled { .. } => "disabled",
            Self::Blocked(_) => "blocked",
            Self::Disconnected { .. } => "disconnected",
            Self::SlotInactive { .. } => "slot_inactive",
            Self::Stalled { .. } => "stalled",
            Self::Slow { .. } => "slow",
            Self::Unresolved { .. } => "unresolved",
            Self::Certificate { .. } => "certificate",
            Self::WalKept { .. } => "wal_kept",
        }
    }

    /// The same for people: "sikorsky -> gideon *stalled* since ..".
    pub fn phrase(&self) -> &'static str {
        match self {
            Self::Warning { .. } => "not set up well",
            Self::Drift { .. } => "with another schema",
            Self::SubscriptionMissing { .. } => "without subscription",
            Self::SlotMissing { .. } => "without slot",
            Self::SlotLost { .. } => "broken for good",
            Self::Blocked(_) => "blocked by a lock",
            Self::SlotInactive { .. } => "with an unread slot",
            Self::Certificate { .. } => "in trouble",
            Self::WalKept { .. } => "keeping WAL",
            _ => self.word(),
        }
    }

    /// What makes it the same condition at two looks: its name and, for what the extension says, its text.
    pub fn identity(&self) -> (&'static str, &str) {
        match self {
            Self::Warning { warning } => (self.word(), warning),
            _ => (self.word(), ""),
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { error } => f.write_str(error),
            Self::Warning { warning } => f.write_str(warning),
            Self::Certificate { trouble } => f.write_str(trouble),
            Self::Drift { reference, missing } => {
                write!(f, "it is not that of {reference}, see schema diff")?;
                if missing.is_empty() { Ok(()) } else { write!(f, "; {}", missing.join("; ")) }
            }
            Self::SubscriptionMissing { subscription } => write!(f, "there is no subscription {subscription}"),
            Self::SlotMissing { slot: Some(slot) } => {
                write!(f, "slot {slot} is gone at the source, what was written since it was is not coming")
            }
            Self::SlotMissing { slot: None } => f.write_str("the subscription has no slot"),
            Self::SlotLost { slot } => {
                write!(f, "slot {slot} has lost WAL that was needed, the target has to be set up anew")
            }
            Self::Erroring { errors, conflicts, message, disabled } => {
                match conflicts.split_first() {
                    Some((first, others)) => {
                        write!(f, "conflict {first}")?;
                        if !others.is_empty() {
                            write!(f, " (and {} more)", others.len())?;
                        }
                        f.write_str(" stops apply")?;
                    }
                    None => write!(f, "{errors} errors without progress")?,
                }
                match message {
                    Some(message) => write!(f, ": {message}")?,
                    None => f.write_str(", see the target's log")?,
                }
                if *disabled { f.write_str("; the subscription is disabled") } else { Ok(()) }
            }
            Self::Disabled { subscription } => write!(f, "subscription {subscription} is switched off"),
            Self::Blocked(wait) => {
                let relation = wait.relation.as_deref().map(|name| format!(" of {name}")).unwrap_or_default();
                write!(f, "worker {} waits for a {} lock{relation} held by ", wait.worker, wait.lock)?;
                if wait.holder == 0 {
                    return f.write_str("a prepared transaction, see pg_prepared_xacts");
                }
                let or = |text: &Option<String>, other| text.clone().filter(|t| !t.is_empty()).unwrap_or(other);
                write!(
                    f,
                    "pid {} ({}, {}, {}, {})",
                    wait.holder,
                    or(&wait.user, or(&wait.backend_type, "?".into())),
                    or(&wait.application, "no application name".into()),
                    wait.client,
                    or(&wait.state, "?".into()),
                )?;
                if wait.others > 0 {
                    write!(f, " and {} more", wait.others)?;
                }
                match &wait.query {
                    Some(query) if !query.is_empty() => {
                        write!(f, ": {}", query.split_whitespace().collect::<Vec<_>>().join(" "))
                    }
                    _ => Ok(()),
                }
            }
            Self::Disconnected { evidence } => f.write_str(evidence),
            Self::Unresolved { conflict, conflicts, why } => {
                write!(f, "conflict {conflict}")?;
                if *conflicts > 1 {
                    write!(f, " (and {} more)", conflicts - 1)?;
                }
                write!(f, " is left to a person: {why}")
            }
            Self::SlotInactive { slot } => {
                write!(f, "nobody reads slot {slot}, though the target believes to be connected")
            }
            Self::Stalled { bytes_behind, seconds_applying, waiting_for } => {
                write!(f, "connected, {} behind, nothing moves", Size(*bytes_behind))?;
                let Some(seconds) = seconds_applying else { return Ok(()) };
                let waiting = if waiting_for.is_empty() { "at work" } else { waiting_for };
                write!(f, "; applying one transaction for {} ({waiting})", Span(*seconds))
            }
            Self::Slow { bytes_behind, seconds_behind, catch_up } => {
                write!(f, "{} and at least {} behind, ", Size(*bytes_behind), Span(*seconds_behind))?;
                match catch_up {
                    CatchUp::Seconds(seconds) => write!(f, "{} to catch up at the present rate", Span(*seconds)),
                    CatchUp::Never => f.write_str("not catching up at the present rate"),
                    CatchUp::Unknown => f.write_str("in the middle of a transaction"),
                }
            }
            Self::WalKept { peer, bytes, bytes_per_second, end, seconds_left } => {
                match peer {
                    Some(peer) => write!(f, "{} kept for {peer}", Size(*bytes))?,
                    None => write!(f, "{} kept for a reader that is no node of this configuration", Size(*bytes))?,
                }
                write!(f, ", {}/s more", Size(*bytes_per_second))?;
                let what = match end {
                    None => return Ok(()),
                    Some(End::DiskFull) => "the disk is full",
                    Some(End::SlotLost) => "the slot is lost",
                };
                match seconds_left {
                    Some(seconds) => write!(f, ", {what} in {}", Span(*seconds)),
                    None => write!(f, ", {what} in the end"),
                }
            }
        }
    }
}

/// Bytes, for people.
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        for unit in ["B", "kB", "MB", "GB"] {
            if value < 1024.0 {
                let digits = if unit == "B" || value >= 100.0 { 0 } else { 1 };
                return write!(f, "{value:.digits$} {unit}");
            }
            value /= 1024.0;
        }
        write!(f, "{value:.1} TB")
    }
}

/// Seconds, for people: two units at most.
struct Span(f64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.max(0.0) as u64;
        match seconds {
            0..60 => write!(f, "{seconds} s"),
            60..3600 => write!(f, "{} min {} s", seconds / 60, seconds % 60),
            3600..86400 => write!(f, "{} h {} min", seconds / 3600, seconds % 3600 / 60),
            _ => write!(f, "{} d {} h", seconds / 86400, seconds % 86400 / 3600),
        }
    }
}

/// A duration, for people.
pub fn span(duration: Duration) -> String {
    Span(duration.as_secs_f64()).to_string()
}

/// Something is the matter.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// With what.
    pub subject: Subject,
    /// What.
    pub condition: Condition,
    /// Since when, counted back from now; zero if nobody else has noticed before.
    pub age: Duration,
}
