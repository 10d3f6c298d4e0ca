//! Server processes: started so that they never outlive this process, found again by where they live.

use std::{
    fs, io,
    path::Path,
    process::{Child, Command},
    sync::{OnceLock, mpsc},
    thread,
};

use anyhow::{Context, Result};
use nix::unistd::Pid;

type Job = (Command, mpsc::SyncSender<io::Result<Child>>);

/// Starts a command from a thread that lives as long as this process.
///
/// A server is started under `setpriv --pdeathsig`, so that the kernel stops it even when this process is killed by
/// SIGKILL. That signal comes when the parent *thread* ends, and the thread of a test ends with the test, a tokio
/// worker whenever it likes; hence one thread that never ends starts them all.
pub(crate) fn spawn(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("spawner".to_owned())
            .spawn(move || {
                for (mut command, reply) in jobs {
                    let _ = reply.send(command.spawn());
                }
            })
            .expect("a thread");
        sender
    });
    let (reply, answer) = mpsc::sync_channel(1);
    spawner.send((command, reply)).ok().context("the spawner thread is gone")?;
    Ok(answer.recv().context("the spawner thread is gone")??)
}

/// The processes whose working directory is this one: for a data directory, the postmaster and all its children, also
/// those that lost their parent. Zombies do not count.
pub(crate) fn living_in(directory: &Path) -> Vec<Pid> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == directory))
        .map(Pid::from_raw)
        .collect()
}

/// Whether there is a process of that number.
pub(crate) fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}
