//! Whole Debian hosts on this machine: each with a file system, a network, processes and a name of its own.
//!
//! A host is a copy-on-write view of the image that `scripts/debian-image` makes, and the namespaces of one process that
//! waits for ever: when that process ends, so does everything on the host. Deliberately knows nothing of PostgreSQL.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    postgres::{self, workspace},
    process,
    scratch::Scratch,
    wait::{PATIENCE, wait_until},
};

/// A host that runs. It is gone, with all that ran on it, when this is dropped.
pub struct Host {
    name: String,
    directory: Scratch,
    /// Holds the namespaces; its only child is the host's first process.
    holder: Child,
}

impl Host {
    /// A host as it is when Debian and PostgreSQL's packages have been installed, and nothing configured.
    pub async fn start(name: &str) -> Result<Self> {
        let image = workspace().join("target/debian-13/system");
        ensure!(image.exists(), "there is no {}; run scripts/debian-image as root", image.display());
        let directory = Scratch::new(name)?;
        let [upper, work, root] = ["upper", "work", "root"].map(|part| directory.path().join(part));
        for part in [&upper, &work, &root] {
            fs::create_dir(part)?;
        }
        let options = format!("lowerdir={},upperdir={},workdir={}", image.display(), upper.display(), work.display());
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .with_context(|| format!("overlay on {}", root.display()))?;
        let holder = match boot(name, directory.path()) {
            Ok(holder) => holder,
            Err(error) => {
                let _ = umount2(&root, MntFlags::MNT_DETACH);
                return Err(error);
            }
        };
        let host = Self { name: name.to_owned(), directory, holder };
        host.wait_booted().await?;
        Ok(host)
    }

    /// Stops everything on the host at once, as a power failure does, and starts it again. What was connected to its
    /// network has to be connected again.
    pub async fn power_cycle(&mut self) -> Result<()> {
        self.power_off()?;
        self.holder = boot(&self.name, self.directory.path())?;
        self.wait_booted().await
    }

    fn power_off(&mut self) -> Result<()> {
        if let Some(init) = self.init() {
            kill(init, Signal::SIGKILL)?;
        }
        self.holder.wait()?;
        Ok(())
    }

    async fn wait_booted(&self) -> Result<()> {
        wait_until(&format!("{} to be up", self.name), PATIENCE, || async {
            Ok(self.run("test -e /run/booted").is_ok().then_some(()))
        })
        .await
        .with_context(|| fs::read_to_string(self.directory.path().join("boot.log")).unwrap_or_default())
    }

    /// Its name, which it answers to on its own network as well.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file system, as this machine sees it.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// A place in its file system, as this machine sees it.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.root().join(inside.trim_start_matches('/'))
    }

    /// Its first process, as this machine numbers it.
    fn init(&self) -> Option<Pid> {
        let id = self.holder.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok().map(Pid::from_raw)
    }

    /// Its network namespace, as nsenter takes it.
    pub fn network(&self) -> Result<PathBuf> {
        let init = self.init().with_context(|| format!("{} does not run", self.name))?;
        Ok(PathBuf::from(format!("/proc/{init}/ns/net")))
    }

    /// A command on the host, to be started.
    pub fn command(&self, script: &str) -> Result<Command> {
        let init = self.init().with_context(|| format!("{} does not run", self.name))?;
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(init.to_string()).args(["--mount", "--uts", "--net", "--pid", "--root", "--wd"]);
        command.args(["env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"]);
        command.args(["LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "sh", "-euc", script]).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a script of the shell as root; what it prints. An error shows what it said.
    pub fn run(&self, script: &str) -> Result<String> {
        let output = self.command(script)?.output()?;
        ensure!(
            output.status.success(),
            "on {}: {script}: {}\n{}{}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }

    /// Runs SQL in a database as the superuser, through the socket, each statement by itself; what it returns.
    pub fn sql(&self, database: &str, statements: &str) -> Result<String> {
        let psql = format!("psql -XAtq -v ON_ERROR_STOP=1 -d {database}");
        self.run(&format!(
            "cd /; exec setpriv --reuid=postgres --regid=postgres --init-groups {psql} <<'END'\n{statements}\nEND"
        ))
    }

    /// Lays a cable to another host; both ends get an address, of one network of 256.
    pub fn connect(&self, address: &str, other: &Self, its_address: &str) -> Result<()> {
        let init =
            |host: &Self| host.init().map(|pid| pid.to_string()).with_context(|| format!("{} is off", host.name));
        let (near, far) = (init(self)?, init(other)?);
        let mut link = Command::new("ip");
        link.args([
            "link", "add", "name", "eth0", "netns", &near, "type", "veth", "peer", "name", "eth0", "netns", &far,
        ]);
        postgres::run(&mut link)?;
        for (host, address) in [(self, address), (other, its_address)] {
            host.run(&format!("ip address add {address}/24 dev eth0; ip link set eth0 up"))?;
        }
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.power_off();
        let _ = umount2(&self.root(), MntFlags::MNT_DETACH);
    }
}

/// Starts the first process of a host, which takes in orphans and otherwise does nothing.
fn boot(name: &str, directory: &Path) -> Result<Child> {
    let script = format!(
        "mount -t proc proc /proc; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /dev/shm; mkdir -p /run/postgresql; \
         chown postgres:postgres /run/postgresql; hostname {name}; ip link set lo up; touch /run/booted; \
         exec tini -s sleep infinity"
    );
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "SIGKILL", "unshare", "--fork", "--pid", "--mount", "--net", "--uts"]);
    // Dies with its holder, as that dies with us.
    command.args(["setpriv", "--pdeathsig", "SIGKILL", "chroot"]);
    command.arg(directory.join("root")).args(["sh", "-euc", &script]).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(File::create(directory.join("boot.log"))?);
    process::spawn(command)
}
