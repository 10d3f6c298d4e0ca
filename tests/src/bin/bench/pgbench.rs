//! What the extension costs clients: pgbench, with and without.

use std::fs;

use anyhow::{Context, Result, ensure};
use stillebot_tests::{Installation, Server, figures::Figures, log_check, wait::PATIENCE, wait_until};

use crate::{DATABASE, Effort, Finding, SETTINGS, assign, describe_settings};

const SCALE: u32 = 10;
const CLIENTS: u32 = 4;
const THREADS: u32 = 2;
const GOAL: f64 = 0.99;

/// What pgbench is asked to do.
const MODES: [(&str, &[&str]); 3] =
    [("pgbench -S", &["-S"]), ("pgbench -S -M prepared", &["-S", "-M", "prepared"]), ("pgbench -N", &["-N"])];

/// What one run of pgbench came to.
#[derive(Clone, Copy)]
struct Run {
    tps: f64,
    /// Transactions per second of processor time that the server used. Neighbours on the machine hardly touch it.
    per_cpu_second: f64,
}

/// The ratios of all pairs of each mode, with the extension to without.
pub async fn measure(effort: &Effort) -> Result<Vec<Finding>> {
    let mut servers = Vec::new();
    for name in ["left", "right"] {
        let server = Server::builder(name).without_stillebot();
        let server = SETTINGS.iter().fold(server, |server, (key, value)| server.config(key, *value)).start().await?;
        run(&server, "pgbench", &["-i", "-q", "-s", &SCALE.to_string()])?;
        servers.push(server);
    }
    describe_settings(&servers[0]).await?;
    println!("pgbench -c {CLIENTS} -j {THREADS}, scale {SCALE}, through the unix socket\n");

    let mut findings = Vec::new();
    for (mode, options) in MODES {
        let mut pairs: Vec<(Run, Run)> = Vec::new();
        for half in 0..2 {
            let (ours, plain) = (&servers[half], &servers[1 - half]);
            assign(ours, plain).await?;
            for server in [ours, plain] {
                pgbench(server, options, effort.seconds.min(2)).await?;
            }
            for pair in 0..effort.pairs / 2 {
                pairs.push(if pair % 2 == 0 {
                    let with = pgbench(ours, options, effort.seconds).await?;
                    (with, pgbench(plain, options, effort.seconds).await?)
                } else {
                    let without = pgbench(plain, options, effort.seconds).await?;
                    (pgbench(ours, options, effort.seconds).await?, without)
                });
            }
        }
        let figures = |of: &dyn Fn(&(Run, Run)) -> f64| Figures::new(pairs.iter().map(of)).context("no runs");
        let tps = figures(&|(with, without)| with.tps / without.tps)?;
        println!(
            "{mode:<24}{:>8.0} tps with, {:>8.0} without; {} pairs of {} s: ratio {:.3} ({:.3} to {:.3})",
            figures(&|(with, _)| with.tps)?.median(),
            figures(&|(_, without)| without.tps)?.median(),
            effort.pairs,
            effort.seconds,
            tps.median(),
            tps.min(),
            tps.max()
        );
        let per_cpu_second = figures(&|(with, without)| with.per_cpu_second / without.per_cpu_second)?;
        findings.push(Finding::ratio(format!("`{mode}`, with to without the extension"), Some(GOAL), &tps));
        findings.push(Finding::ratio("the same, per second of the server's processor time", None, &per_cpu_second));
    }
    for server in servers {
        server.finish().await?;
    }
    Ok(findings)
}

async fn pgbench(server: &Server, options: &[&str], seconds: u32) -> Result<Run> {
    let (clients, threads, seconds) = (CLIENTS.to_string(), THREADS.to_string(), seconds.to_string());
    let mut arguments = vec!["-n", "-c", &clients, "-j", &threads, "-T", &seconds];
    arguments.extend(options);
    let (children, before) = (children(server)?, cpu_seconds(server)?);
    let said = run(server, "pgbench", &arguments)?;
    // What a process has used is its parent's to know when it has ended.
    wait_until("the sessions of pgbench to end", PATIENCE, || async {
        Ok((self::children(server)? <= children).then_some(()))
    })
    .await?;
    let number = |prefix: &str| -> Result<f64> {
        let number = said.lines().find_map(|line| line.strip_prefix(prefix)?.split([' ', '/']).next()?.parse().ok());
        number.with_context(|| format!("pgbench did not say {prefix:?}: {said}"))
    };
    let used = cpu_seconds(server)? - before;
    let transactions = number("number of transactions actually processed: ")?;
    Ok(Run { tps: number("tps = ")?, per_cpu_second: transactions / used })
}

/// How many processes a server's postmaster has.
fn children(server: &Server) -> Result<usize> {
    let pid = server.pid().context("it does not run")?;
    Ok(fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?.split_whitespace().count())
}

/// Processor time that ended processes of a server have used: `cutime` and `cstime` of its postmaster, see proc(5).
fn cpu_seconds(server: &Server) -> Result<f64> {
    /// USER_HZ, the same on every Linux that PostgreSQL runs on.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = fs::read_to_string(format!("/proc/{}/stat", server.pid().context("it does not run")?))?;
    // After the name, which may hold anything, the third field comes first.
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |field: usize| fields.get(field - 3).and_then(|ticks| ticks.parse::<f64>().ok());
    Ok(ticks(16).zip(ticks(17)).map(|(user, system)| user + system).context("no cutime")? / TICKS_PER_SECOND)
}

/// One of PostgreSQL's programs, as superuser through the unix socket.
fn run(server: &Server, program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Installation::get()?.command(program);
    command.arg("-h").arg(server.socket_directory()).args(["-p", &server.port().to_string(), "-U", "postgres"]);
    let output = command.args(arguments).arg(DATABASE).output().with_context(|| format!("could not run {program}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?}: {errors}\n{}", log_check::tail(&server.log(), 10));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
