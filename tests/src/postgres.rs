//! Which PostgreSQL is under test, and how its programs are started.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Mutex, OnceLock, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::{Gid, Uid, User};

/// The user that servers run as when we are root, because PostgreSQL refuses to. Made by `scripts/setup`.
const TEST_USER: &str = "stillebot-test";

/// An installed PostgreSQL, as its `pg_config` describes it.
#[derive(Debug)]
pub struct Installation {
    /// Path of the `pg_config` everything else was learnt from.
    pub pg_config: PathBuf,
    /// Where `postgres`, `initdb` and `psql` are.
    pub bindir: PathBuf,
    /// Where extension libraries are.
    pub pkglibdir: PathBuf,
    /// Where extension control files are, in its subfolder `extension`.
    pub sharedir: PathBuf,
    /// As printed, for example `PostgreSQL 16.14`.
    pub version: String,
    /// For example 16.
    pub major: u32,
    pub(crate) server_user: ServerUser,
}

/// Who owns data directories and server processes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ServerUser {
    pub uid: Uid,
    pub gid: Gid,
}

impl ServerUser {
    fn find() -> Result<Self> {
        if !Uid::effective().is_root() {
            return Ok(Self { uid: Uid::effective(), gid: Gid::effective() });
        }
        let user = User::from_name(TEST_USER)?
            .with_context(|| format!("no user {TEST_USER} to run servers as; run scripts/setup"))?;
        Ok(Self { uid: user.uid, gid: user.gid })
    }

    /// Whether that is somebody else than this process.
    pub fn is_other(self) -> bool {
        self.uid != Uid::effective()
    }

    /// Gives a file or directory to that user.
    pub fn own(self, path: &Path) -> Result<()> {
        if self.is_other() {
            std::os::unix::fs::chown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))
                .with_context(|| format!("chown of {}", path.display()))?;
        }
        Ok(())
    }
}

/// The root of the checkout.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is inside the workspace")
}

impl Installation {
    /// pg_ident.conf: we, and the servers' own user, may be any role through the socket.
    pub(crate) fn local_users(&self) -> Result<String> {
        let mut lines = String::new();
        for uid in [Uid::effective(), self.server_user.uid] {
            let user = User::from_uid(uid)?.with_context(|| format!("user {uid} has no name"))?;
            lines.push_str(&format!("harness \"{}\" all\n", user.name));
        }
        Ok(lines)
    }

    /// The one under test: `$PG_CONFIG`, else what `scripts/setup` wrote to `target/pg_config`. Looked up once.
    pub fn get() -> Result<&'static Self> {
        static FOUND: OnceLock<Result<Installation, String>> = OnceLock::new();
        FOUND
            .get_or_init(|| Self::find().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow::anyhow!("no PostgreSQL to test with: {error}"))
    }

    /// The one of that major version: the one under test, or `$PG_CONFIG_18` and the like.
    pub fn of(major: u32) -> Result<&'static Self> {
        static OTHERS: Mutex<BTreeMap<u32, &'static Installation>> = Mutex::new(BTreeMap::new());
        let tested = Self::get()?;
        if tested.major == major {
            return Ok(tested);
        }
        let mut others = OTHERS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = others.get(&major) {
            return Ok(found);
        }
        let variable = format!("PG_CONFIG_{major}");
        let pg_config =
            variable_of(&variable).with_context(|| format!("{variable} is not set; make test-pairs sets it"))?;
        let found = Self::at(pg_config)?;
        ensure!(found.major == major, "{variable} is of {}", found.version);
        ensure!(
            found.has_extension(),
            "{} has no stillebot; run make install PG_CONFIG=...",
            found.pg_config.display()
        );
        let found: &'static Self = Box::leak(Box::new(found));
        others.insert(major, found);
        Ok(found)
    }

    fn find() -> Result<Self> {
        Self::at(match variable_of("PG_CONFIG") {
            Some(path) => path,
            None => {
                let note = workspace().join("target/pg_config");
                let path =
                    fs::read_to_string(&note).with_context(|| format!("{}; run scripts/setup", note.display()))?;
                PathBuf::from(path.trim())
            }
        })
    }

    fn at(pg_config: PathBuf) -> Result<Self> {
        let ask = |what: &str| -> Result<String> {
            let output =
                Command::new(&pg_config).arg(what).output().with_context(|| pg_config.display().to_string())?;
            ensure!(output.status.success(), "{} {what} failed", pg_config.display());
            Ok(String::from_utf8(output.stdout)?.trim().to_owned())
        };
        let version = ask("--version")?;
        let major = version
            .split(|c: char| !c.is_ascii_digit())
            .find_map(|digits| digits.parse().ok())
            .with_context(|| format!("no number in {version:?}"))?;
        Ok(Self {
            bindir: ask("--bindir")?.into(),
            pkglibdir: ask("--pkglibdir")?.into(),
            sharedir: ask("--sharedir")?.into(),
            version,
            major,
            server_user: ServerUser::find()?,
            pg_config,
        })
    }

    /// Where the libraries of extensions are.
    pub fn library_directory(&self) -> &Path {
        &self.pkglibdir
    }

    /// Whether this project's extension has been installed here.
    pub fn has_extension(&self) -> bool {
        self.sharedir.join("extension/stillebot.control").exists()
    }

    /// A PostgreSQL program, run by the user we are, without the PG* variables of whoever runs the tests.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bindir.join(program));
        strip_environment(&mut command);
        command
    }

    /// A PostgreSQL program, run by the user who owns the servers. `setpriv` options may come before it.
    pub(crate) fn server_command(&self, program: &str, setpriv_options: &[&str]) -> Command {
        let ServerUser { uid, gid } = self.server_user;
        let mut command = Command::new("setpriv");
        if self.server_user.is_other() {
            command.args([format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".to_owned()]);
        }
        command.args(setpriv_options).arg("--").arg(self.bindir.join(program));
        strip_environment(&mut command);
        // Our own directory may be closed to that user.
        command.current_dir("/tmp");
        command
    }
}

fn variable_of(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn strip_environment(command: &mut Command) {
    for (key, _) in env::vars_os() {
        if key.to_str().is_some_and(|key| key.starts_with("PG") || key.starts_with("LC_") || key == "LANG") {
            command.env_remove(key);
        }
    }
}

/// Runs a command to its end; an error holds what it said.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let Output { status, stdout, stderr } = command.output().with_context(|| format!("could not run {name}"))?;
    if !status.success() {
        bail!(
            "{:?} failed with {status}: {}{}",
            command,
            String::from_utf8_lossy(&stderr),
            String::from_utf8_lossy(&stdout)
        );
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}
