//! Server logs: what may be in them and what may not.

use std::sync::{Arc, Mutex, PoisonError};

/// The harness's log_line_prefix, and what the parser here relies on: pid in brackets, then the SQLSTATE.
pub(crate) const LOG_LINE_PREFIX: &str = "%m [%p] %e %b %q%d %a ";

const LEVELS: [&str; 12] =
    ["LOG", "INFO", "NOTICE", "WARNING", "ERROR", "FATAL", "PANIC", "DETAIL", "HINT", "CONTEXT", "STATEMENT", "QUERY"];
const PRIMARY: [&str; 7] = ["LOG", "INFO", "NOTICE", "WARNING", "ERROR", "FATAL", "PANIC"];
const BAD: [&str; 4] = ["WARNING", "ERROR", "FATAL", "PANIC"];

/// What a server or a link that goes away leaves in the logs of everybody around it.
const WEATHER: [&str; 9] = [
    " 57P0", // sessions ended by a shutdown, connections too early or too late for a server
    " 08006 ",
    "could not connect to the publisher",
    "could not receive data from WAL stream",
    "could not send data to WAL stream",
    "could not receive database system identifier", // a server that goes between the two
    "could not start WAL streaming",
    "is active for PID", // the subscriber is back before the publisher noticed that it had gone
    "is already active for PID", // a worker is back before the one before it has let go of the subscription's origin
];

/// Parts of log lines that a test allows. Clones share one list.
#[derive(Debug, Clone, Default)]
pub struct Expected(Arc<Mutex<Vec<String>>>);

impl Expected {
    /// Allows lines that contain this, anywhere: SQLSTATE, database, application name, message. Allowed is not required.
    pub fn allow(&self, part: impl Into<String>) {
        let part = part.into();
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !list.contains(&part) {
            list.push(part);
        }
    }

    /// Allows what servers say when a server or a link goes away and comes back.
    pub(crate) fn allow_weather(&self) {
        WEATHER.iter().for_each(|&part| self.allow(part));
    }

    fn covers(&self, line: &str) -> bool {
        let list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().any(|part| line.contains(part))
    }
}

/// The entries of a log that nobody expects: WARNING, ERROR, FATAL, PANIC, processes ended by a signal and Rust panics, each
/// with the detail, hint, context and statement lines after it.
pub fn unexpected(log: &str, expected: &[&Expected]) -> Vec<String> {
    let mut entries: Vec<String> = Vec::new();
    let mut inside = false;
    for line in log.lines() {
        let level = level(line);
        if level.is_none_or(|level| !PRIMARY.contains(&level)) && !line.contains("panicked at") {
            if inside && let Some(entry) = entries.last_mut() {
                entry.push('\n');
                entry.push_str(line);
            }
            continue;
        }
        let bad = level.is_some_and(|level| BAD.contains(&level))
            || line.contains("terminated by signal")
            || line.contains("panicked at");
        inside = bad && !expected.iter().any(|list| list.covers(line));
        if inside {
            entries.push(line.to_owned());
        }
    }
    entries
}

/// The last lines of a log.
pub fn tail(log: &str, lines: usize) -> String {
    let all: Vec<_> = log.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The level of a line, or nothing for the second and later lines of a long message.
fn level(line: &str) -> Option<&'static str> {
    if !line.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    // The leftmost wins: a message may well quote another.
    LEVELS
        .into_iter()
        .filter_map(|level| line.find(&format!(" {level}:  ")).map(|at| (at, level)))
        .min()
        .map(|(_, level)| level)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
2026-01-02 03:04:05.678 UTC [10] 00000 postmaster LOG:  server process (PID 11) was terminated by signal 9: Killed
2026-01-02 03:04:05.678 UTC [12] 25006 client backend stillebot psql ERROR:  cannot execute INSERT in a read-only transaction
2026-01-02 03:04:05.678 UTC [12] 25006 client backend stillebot psql HINT:  It is down.
2026-01-02 03:04:05.678 UTC [12] 25006 client backend stillebot psql STATEMENT:  insert into t
\tvalues (1)
2026-01-02 03:04:05.678 UTC [13] 00000 client backend stillebot psql LOG:  statement: raise ERROR:  no
";

    #[test]
    fn a_bad_line_comes_with_what_belongs_to_it() {
        let found = unexpected(LOG, &[]);
        assert_eq!(found.len(), 2);
        assert!(found[0].ends_with("signal 9: Killed"));
        assert_eq!(found[1].lines().count(), 4);
    }

    #[test]
    fn an_expected_line_is_passed_over_with_what_belongs_to_it() {
        let expected = Expected::default();
        expected.allow(" 25006 ");
        expected.allow("terminated by signal 9");
        assert!(unexpected(LOG, &[&expected]).is_empty());
    }
}
