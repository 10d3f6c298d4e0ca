//! What is remembered of the last deployment of each certificate: a note that the watchdog reads, and the lock that keeps
//! deployments apart.
//!
//! A note is written before anything is done and completed at the end, so that one which was killed has left one that says so.
//! It says nothing that a certificate does not tell everybody. Deliberately decides nothing.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{self, OFlag};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::fsync;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::certs::Facts;

/// Where, under the directory of what the agent remembers.
const FOLDER: &str = "certificates";
/// Held by whoever deploys.
const LOCK: &str = "lock";
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
    /// The pair is in place, but something that uses it could not be asked.
    Unproven {
        /// What.
        why: String,
    },
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
        let flaw = |path: &Path, error: io::Error| format!("cannot write {}: {error}", path.display());
        let folder = folder(state).map_err(|error| flaw(&state.join(FOLDER), error))?;
        let path = state.join(FOLDER).join(LOCK);
        let lock = open(&folder, LOCK, 0o600).map_err(|error| flaw(&path, error))?;
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
        let file = open(&folder, &file_name(lineage), 0o644).map_err(|error| flaw(&path, error))?;
        fsync(&folder).map_err(|error| flaw(&path, error.into()))?;
        let mut ledger = Self { file, _lock: lock };
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

fn file_name(lineage: &str) -> String {
    format!("{lineage}.json")
}

fn note_path(state: &Path, lineage: &str) -> PathBuf {
    state.join(FOLDER).join(file_name(lineage))
}

/// The directory of the notes, made if need be, for everybody to read, whatever the umask of certbot. It may belong to a lesser
/// user than this process, so nothing in it is followed anywhere.
fn folder(state: &Path) -> io::Result<OwnedFd> {
    let readable = Mode::from_bits_truncate(0o755);
    let made = !state.exists();
    fs::create_dir_all(state)?;
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let state = fcntl::open(state, flags, Mode::empty())?;
    if made {
        fchmod(&state, readable)?;
    }
    let made = match mkdirat(&state, FOLDER, readable) {
        Ok(()) => true,
        Err(Errno::EEXIST) => false,
        Err(error) => return Err(error.into()),
    };
    let folder = fcntl::openat(&state, FOLDER, flags | OFlag::O_NOFOLLOW, Mode::empty())?;
    if made {
        fchmod(&folder, readable)?;
        fsync(&state)?;
    }
    Ok(folder)
}

/// A file of exactly that mode. Everybody may read notes, as the watchdog is another user; nobody else the lock, for whoever can
/// open a file can hold it.
fn open(folder: &OwnedFd, name: &str, mode: u32) -> io::Result<File> {
    let bits = Mode::from_bits_truncate(mode);
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = File::from(fcntl::openat(folder, name, flags, bits)?);
    if file.metadata()?.permissions().mode() & 0o777 != mode {
        fchmod(&file, bits)?;
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

/// Whether a deployment is under way on this host. Who may not open the lock can still see in the kernel's list that it is held.
pub fn is_under_way(state: &Path) -> bool {
    let Ok(lock) = fs::metadata(state.join(FOLDER).join(LOCK)) else { return false };
    let held = fs::read_to_string("/proc/locks").unwrap_or_default();
    let inode = |line: &str| line.split_whitespace().find_map(|word| word.splitn(3, ':').nth(2)?.parse::<u64>().ok());
    held.lines().any(|line| line.contains(" FLOCK ") && inode(line) == Some(lock.ino()))
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

    #[tokio::test]
    async fn strangers_cannot_hold_the_lock_and_can_read_the_notes() {
        let state = tempfile::tempdir().unwrap();
        fs::create_dir(state.path().join(FOLDER)).unwrap();
        // As an older agent has left it.
        File::create(state.path().join(FOLDER).join(LOCK)).unwrap();
        assert!(!is_under_way(state.path()));
        let _ledger = Ledger::begin(state.path(), "a", 1).await.unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state.path().join(FOLDER).join(LOCK)), 0o600);
        assert_eq!(mode(&note_path(state.path(), "a")), 0o644);
        assert!(is_under_way(state.path()));
    }

    #[tokio::test]
    async fn nothing_is_followed_out_of_the_directory() {
        let (state, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let victim = elsewhere.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), state.path().join(FOLDER)).unwrap();
        assert!(Ledger::begin(state.path(), "a", 1).await.is_err());
        fs::remove_file(state.path().join(FOLDER)).unwrap();
        fs::create_dir(state.path().join(FOLDER)).unwrap();
        std::os::unix::fs::symlink(&victim, note_path(state.path(), "a")).unwrap();
        assert!(Ledger::begin(state.path(), "a", 1).await.is_err());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 1);
    }
}
