//! What is promised of the Debian packages, on whole Debian hosts. `make test-hosts` makes the packages and runs this, as root.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use stillebot_tests::{Host, log_check, wait_until};

mod cable;
mod packages;
mod pair;
mod scenes;

/// The packages that `make deb` has made of this version.
fn packages() -> Result<Vec<PathBuf>> {
    let version = env!("CARGO_PKG_VERSION");
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/deb");
    let names =
        [format!("postgresql-17-stillebot_{version}-1_amd64.deb"), format!("stillebot-agent_{version}-1_amd64.deb")];
    names
        .into_iter()
        .map(|name| folder.join(&name).canonicalize().with_context(|| format!("no {name}; run make deb")))
        .collect()
}

/// Puts the packages on a host, and installs them.
fn install(host: &Host) -> Result<()> {
    for package in packages()? {
        let name = package.file_name().context("a file")?;
        fs::copy(&package, host.path("/srv").join(name)).with_context(|| package.display().to_string())?;
    }
    host.run("dpkg -i /srv/*.deb").map(drop)
}

/// Makes the cluster that Debian would have made, with what stillebot wants of it; started.
async fn create_cluster(host: &Host) -> Result<()> {
    host.run("pg_createcluster --locale C.UTF-8 17 main >/dev/null")?;
    let settings = format!(
        "shared_preload_libraries = 'stillebot'\nstillebot.node = '{}'\nlisten_addresses = '*'\nwal_level = logical\n\
         track_commit_timestamp = on\nmax_worker_processes = 16\nlog_line_prefix = '%m [%p] %e %b %q%d %a '\n",
        host.name()
    );
    let file = host.path("/etc/postgresql/17/main/conf.d/stillebot.conf");
    fs::write(&file, settings).with_context(|| file.display().to_string())?;
    start_cluster(host).await
}

async fn start_cluster(host: &Host) -> Result<()> {
    host.run("pg_ctlcluster 17 main start")?;
    wait_until("the cluster", stillebot_tests::wait::PATIENCE, || async {
        Ok(host.sql("postgres", "select 1").is_ok().then_some(()))
    })
    .await
}

/// That the log of the cluster has nothing in it that nobody expected.
fn check_log(host: &Host, expected: &[&str]) -> Result<()> {
    let log = fs::read_to_string(host.path("/var/log/postgresql/postgresql-17-main.log"))?;
    let allowed = log_check::Expected::default();
    // It cannot know its parent's place in another process namespace; sessions too early for a server that starts.
    [" 57P03 "].iter().chain(expected).for_each(|part| allowed.allow(*part));
    let findings = log_check::unexpected(&log, &[&allowed]);
    ensure!(findings.is_empty(), "the log of {} has lines nobody expected:\n{}", host.name(), findings.join("\n"));
    Ok(())
}
