//! What a test borrows from the machine and gives back: directories and ports.
//!
//! Everything is under one directory per user, so that runs that were killed can be cleaned up by the next one.

use std::{
    env,
    fs::{self, File, TryLockError},
    net::TcpListener,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicU16, Ordering},
    },
};

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use crate::process;

/// Below the range that the kernel takes outgoing ports from.
const PORTS: std::ops::Range<u16> = 20000..32000;
/// A directory with this file in it is not swept.
const KEEP_MARK: &str = "keep";

fn base() -> Result<PathBuf> {
    // Not $TMPDIR: the path of a unix socket must stay below 108 bytes, and the server's user must get in.
    let base = PathBuf::from(format!("/tmp/stillebot-tests-{}", Uid::effective()));
    fs::create_dir_all(base.join("ports"))?;
    fs::set_permissions(&base, fs::Permissions::from_mode(0o755))?;
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| sweep(&base));
    Ok(base)
}

/// Removes what test processes left that were killed. Their servers died with them.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.split('-').nth(1)).and_then(|pid| pid.parse().ok());
        if owner.is_some_and(|pid| !process::exists(pid)) && !entry.path().join(KEEP_MARK).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    for entry in fs::read_dir(base.join("ports")).into_iter().flatten().flatten() {
        // Taking the port and giving it back removes the file; one that is in use stays.
        drop(Port::lock(entry.path(), 0));
    }
}

/// Whether the person at the keyboard wants to look at the remains (`KEEP=1`).
pub(crate) fn keep_requested() -> bool {
    env::var_os("KEEP").is_some_and(|value| !value.is_empty() && value != "0")
}

/// A directory that is removed at the end, unless it is to be kept.
#[derive(Debug)]
pub(crate) struct Scratch(Option<tempfile::TempDir>);

impl Scratch {
    pub fn new(label: &str) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix(&format!("{label}-{}-", std::process::id()))
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(base()?)?;
        Ok(Self(Some(directory)))
    }

    pub fn path(&self) -> &Path {
        self.0.as_ref().expect("there until drop").path()
    }

    /// Removes it now, whatever the person at the keyboard wants to look at.
    pub fn discard(mut self) -> Result<()> {
        let directory = self.0.take().expect("there until drop");
        Ok(directory.close()?)
    }

    /// Leaves the directory to whoever comes next.
    pub fn keep(&mut self) {
        let directory = self.0.as_mut().expect("there until drop");
        let _ = File::create(directory.path().join(KEEP_MARK));
        directory.disable_cleanup(true);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let undecided = self.0.as_ref().is_some_and(|directory| !directory.path().join(KEEP_MARK).exists());
        if undecided && keep_requested() {
            self.keep();
            eprintln!("kept {}", self.path().display());
        }
    }
}

/// A port of 127.0.0.1 that nobody else who asks here has: the file lock keeps test processes apart, binding it keeps
/// away from strangers.
#[derive(Debug)]
pub struct Port {
    /// Its number.
    pub number: u16,
    path: PathBuf,
    _lock: File,
}

impl Port {
    /// The next one that is free.
    pub fn take() -> Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let folder = base()?.join("ports");
        // Processes start at different places, to look for free ports in different places.
        let start = u16::try_from(std::process::id().wrapping_mul(97) % u32::from(PORTS.end - PORTS.start))?;
        for _ in PORTS {
            let step = NEXT.fetch_add(1, Ordering::Relaxed);
            let number = PORTS.start + start.wrapping_add(step) % (PORTS.end - PORTS.start);
            let path = folder.join(number.to_string());
            if let Some(port) = Self::lock(path, number)?
                && TcpListener::bind(("127.0.0.1", number)).is_ok()
            {
                return Ok(port);
            }
        }
        bail!("no free port in {PORTS:?}")
    }

    /// Nothing if somebody else has it.
    fn lock(path: PathBuf, number: u16) -> Result<Option<Self>> {
        let lock = File::create(&path).with_context(|| path.display().to_string())?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        // The one before us removed the file between our open and our lock: our lock guards nothing.
        let guards = lock.metadata()?.nlink() > 0;
        Ok(guards.then_some(Self { number, path, _lock: lock }))
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // Before the lock goes, so that nobody can hold a lock on a file that is no longer there unknowingly.
        let _ = fs::remove_file(&self.path);
    }
}
