//! What is remembered of the last deployment of each certificate: a note that the watchdog reads, and the lock that keeps
//! deployments apart.
//!
//! A note is written before anything is done and completed at the end, so that one which was killed has left one that says so.
//! It says nothing that a certificate does not tell everybody. Deliberately decides nothing.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::certs::Facts;

/// Where, under the directory of what the agent remembers.
const FOLDER: &str = "certificates";
/// How long another deployment is waited for.
const LOCK_BOUND: Duration = Duration::from_secs(120);
/// Between two attempts to take the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// How a deployment ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It was begun, and as far as this note knows it has not ended.
    Unfinished,
    /// The pair is in place, and served unless the server is not running.
    Deployed,
    /// It was not deployed, or undone.
    Failed {
        /// Why.
        why: String,
    },
}

/// One deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Of which certificate.
    pub lineage: String,
    /// When it was begun, in seconds since 1970.
    pub began: i64,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The certificate that is in the configured places now; none if that is not known.
    pub certificate: Option<Facts>,
}

/// A note that is being written, and the lock. Both are open, so that they can be used by whoever this process becomes.
pub struct Ledger {
    file: File,
    _lock: File,
}

impl Ledger {
    /// Waits for other deployments to end, and begins a note.
    pub async fn begin(state: &Path, lineage: &str, began: i64) -> Result<Self, String> {
        let folder = state.join(FOLDER);
        let flaw = |path: &Path, error: io::Error| format!("cannot write {}: {error}", path.display());
        fs::create_dir_all(&folder).map_err(|error| flaw(&folder, error))?;
        let path = folder.join("lock");
        let lock = open(&path).map_err(|error| flaw(&path, error))?;
        let began_to_wait = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if began_to_wait.elapsed() < LOCK_BOUND => sleep(LOCK_PAUSE).await,
                Err(TryLockError::WouldBlock) => {
                    let bound = humantime::format_duration(LOCK_BOUND);
                    return Err(format!("another deployment has held {} for {bound}", path.display()));
                }
                Err(TryLockError::Error(error)) => return Err(flaw(&path, error)),
            }
        }
        let path = note_path(state, lineage);
        let certificate = read(state, lineage).and_then(|note| note.certificate);
        let mut ledger = Self { file: open(&path).map_err(|error| flaw(&path, error))?, _lock: lock };
        let note = Note { lineage: lineage.into(), began, outcome: Outcome::Unfinished, certificate };
        ledger.write(&note).map_err(|error| flaw(&path, error))?;
        Ok(ledger)
    }

    /// Replaces the note. What is cut off in the middle reads as unfinished.
    pub fn write(&mut self, note: &Note) -> io::Result<()> {
        let text = serde_json::to_vec(note)?;
        self.file.rewind()?;
        self.file.set_len(0)?;
        self.file.write_all(&text)?;
        self.file.sync_all()
    }
}

fn note_path(state: &Path, lineage: &str) -> PathBuf {
    state.join(FOLDER).join(format!("{lineage}.json"))
}

/// Everybody may read: the watchdog is another user.
fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(path)?;
    // Whatever the umask of certbot.
    if file.metadata()?.permissions().mode() & 0o444 != 0o444 {
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
    }
    Ok(file)
}

/// The note of the last deployment of a certificate on this host, if there was one.
pub fn read(state: &Path, lineage: &str) -> Option<Note> {
    let mut text = String::new();
    File::open(note_path(state, lineage)).ok()?.read_to_string(&mut text).ok()?;
    let unfinished = Note { lineage: lineage.into(), began: 0, outcome: Outcome::Unfinished, certificate: None };
    Some(serde_json::from_str(&text).unwrap_or(unfinished))
}

/// Whether a deployment is under way on this host.
pub fn is_under_way(state: &Path) -> bool {
    let lock = File::open(state.join(FOLDER).join("lock"));
    lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_note_says_how_it_ended_and_what_was_cut_off_did_not() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(read(state.path(), "a"), None);
        let mut ledger = Ledger::begin(state.path(), "a", 7).await.unwrap();
        assert_eq!(read(state.path(), "a").unwrap().outcome, Outcome::Unfinished);
        let outcome = Outcome::Failed { why: "the disk is full".into() };
        let facts = Facts { serial: "AB".into(), names: vec![], issuer: "x".into(), not_before: 1, not_after: 2 };
        let note = Note { lineage: "a".into(), began: 7, outcome, certificate: Some(facts) };
        ledger.write(&note).unwrap();
        assert_eq!(read(state.path(), "a"), Some(note.clone()));
        drop(ledger);
        // What is in place is known to the next one, too.
        let _ledger = Ledger::begin(state.path(), "a", 8).await.unwrap();
        assert_eq!(read(state.path(), "a").unwrap().certificate, note.certificate);
        fs::write(note_path(state.path(), "a"), "{\"lineage\":").unwrap();
        assert_eq!(read(state.path(), "a").unwrap().outcome, Outcome::Unfinished);
    }
}
