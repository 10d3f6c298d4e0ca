//! `make bench`: what the extension costs, as ratios to the same server without it, and how long a hop refuses writes.
//! About six minutes on an otherwise idle machine; `QUICK=1` is a smoke run whose figures mean nothing.
//!
//! Two servers side by side take turns of a few seconds, A B B A, so that whatever drifts (clock rate, disk, neighbours)
//! drifts for both; a ratio is made of each pair. After half of the pairs they swap roles, so that luck with memory or
//! files is no advantage of either. Exits non-zero only if writes got lost or duplicated: a missed goal is said, not hidden.

use std::{
    env,
    fmt::Write as _,
    fs,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use stillebot_tests::{
    Cluster, Installation, Server, Workload, WorkloadOptions, cluster::NAMES, figures::Figures, log_check,
    wait::PATIENCE, wait_until,
};

const DATABASE: &str = "postgres";
const SCALE: u32 = 10;
const CLIENTS: u32 = 4;
const THREADS: u32 = 2;
const RATIO_GOAL: f64 = 0.99;
/// Between the quartiles of the ratios, on a machine that does nothing else.
const QUIET: f64 = 0.05;
const BOTS: usize = 8;
/// Milliseconds.
const GAP_GOALS: [(&str, f64, f64); 2] = [("p50", 0.5, 20.0), ("p99", 0.99, 100.0)];

/// What pgbench is asked to do.
const MODES: [(&str, &[&str]); 3] =
    [("pgbench -S", &["-S"]), ("pgbench -S -M prepared", &["-S", "-M", "prepared"]), ("pgbench -N", &["-N"])];

/// Both servers' settings beside the defaults: nothing of one's upkeep shall fall into the other's turn.
const SETTINGS: [(&str, &str); 7] = [
    ("fsync", "on"),
    ("shared_buffers", "128MB"),
    ("max_connections", "100"),
    ("dynamic_shared_memory_type", "posix"),
    ("autovacuum", "off"),
    ("checkpoint_timeout", "1h"),
    ("max_wal_size", "4GB"),
];

/// How much is measured.
struct Effort {
    /// Of runs, for each mode. A multiple of four: two halves, each in whole A B B A.
    pairs: usize,
    /// Of one run.
    seconds: u32,
    hops: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    match bench().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench() -> Result<()> {
    let quick = env::var_os("QUICK").is_some_and(|value| !value.is_empty() && value != "0");
    let effort =
        if quick { Effort { pairs: 4, seconds: 1, hops: 10 } } else { Effort { pairs: 16, seconds: 3, hops: 100 } };
    if quick {
        println!("QUICK=1: the figures below mean nothing.\n");
    }
    describe_machine()?;
    let ratios = against_plain_postgresql(&effort).await?;
    let (gaps, bad) = hops(&effort).await?;

    println!("\n| measured | goal | result | spread | |");
    println!("| --- | --- | --- | --- | --- |");
    let mut busy = false;
    for ((mode, _), ratios) in MODES.iter().zip(&ratios) {
        let spread = |ratio: &Figures| (ratio.quantile(0.25), ratio.quantile(0.75));
        let (ratio, (low, high)) = (ratios.tps.median(), spread(&ratios.tps));
        let met = verdict(ratio >= RATIO_GOAL);
        println!(
            "| `{mode}`, with to without the extension | ≥ {RATIO_GOAL} | {ratio:.3} | quartiles {low:.3} to {high:.3} | {met} |"
        );
        busy |= high - low > QUIET;
        let (ratio, (low, high)) = (ratios.per_cpu_second.median(), spread(&ratios.per_cpu_second));
        println!(
            "| the same, per second of the server's processor time | | {ratio:.3} | quartiles {low:.3} to {high:.3} | |"
        );
    }
    for (name, share, goal) in GAP_GOALS {
        let gap = gaps.quantile(share);
        println!(
            "| write gap of {} hops, {name} | ≤ {goal} ms | {gap:.1} ms | {:.1} to {:.1} ms | {} |",
            effort.hops,
            gaps.min(),
            gaps.max(),
            verdict(gap <= goal)
        );
    }
    println!("| writes lost or duplicated in those | 0 | {bad} | | {} |", verdict(bad == 0));
    if busy {
        println!(
            "\nA spread this wide means that the machine was busy with something else: run it again on an idle one."
        );
    }
    ensure!(bad == 0, "{bad} writes were lost or duplicated");
    Ok(())
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "**missed**" }
}

fn describe_machine() -> Result<()> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = fs::read_to_string("/proc/loadavg")?;
    println!(
        "{}, {} cores, Linux {}, load {} at the start",
        model.trim_start_matches([' ', '\t', ':']),
        std::thread::available_parallelism()?,
        kernel.trim(),
        load.split(' ').next().unwrap_or_default()
    );
    println!("{}, stillebot {}", Installation::get()?.version, env!("CARGO_PKG_VERSION"));
    Ok(())
}

// ---- pgbench, with and without ----

/// What one run of pgbench came to.
#[derive(Clone, Copy)]
struct Run {
    tps: f64,
    /// Transactions per second of processor time that the server used. Neighbours on the machine hardly touch it.
    per_cpu_second: f64,
}

/// The ratios of all pairs of one mode, with the extension to without.
struct Ratios {
    tps: Figures,
    per_cpu_second: Figures,
}

/// For each mode, in its order.
async fn against_plain_postgresql(effort: &Effort) -> Result<Vec<Ratios>> {
    let mut servers = Vec::new();
    for name in ["left", "right"] {
        let server = Server::builder(name).without_stillebot();
        let server = SETTINGS.iter().fold(server, |server, (key, value)| server.config(key, *value)).start().await?;
        run(&server, "pgbench", &["-i", "-q", "-s", &SCALE.to_string()])?;
        servers.push(server);
    }
    describe_settings(&servers[0]).await?;

    let mut ratios = Vec::new();
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
        ratios.push(Ratios { tps, per_cpu_second });
    }
    for server in servers {
        server.finish().await?;
    }
    Ok(ratios)
}

/// Gives one server the extension, preloaded, created and up, and takes it from the other.
async fn assign(ours: &Server, plain: &Server) -> Result<()> {
    plain.execute(DATABASE, "drop extension if exists stillebot").await?;
    plain.config(&[("shared_preload_libraries", "")]).await?;
    plain.restart().await?;
    ours.config(&[("shared_preload_libraries", "stillebot")]).await?;
    ours.restart().await?;
    ours.execute(DATABASE, "create extension if not exists stillebot").await?;
    let state: String = ours.value(DATABASE, "select state from stillebot_status()").await?;
    ensure!(state == "up", "{} is {state}", ours.name());
    for server in [ours, plain] {
        run(server, "vacuumdb", &["--analyze", "--quiet"])?;
        server.execute(DATABASE, "checkpoint").await?;
    }
    Ok(())
}

async fn describe_settings(server: &Server) -> Result<()> {
    let session = server.superuser(DATABASE).await?;
    let rows = session
        .query(
            "select name || ' = ' || current_setting(name) from pg_settings \
             where source = 'configuration file' and setting is distinct from boot_val \
                   and name !~ '^(ssl|log_|unix_socket|port|shared_preload|config_file|lc_|listen|TimeZone)' \
             union select 'fsync = ' || current_setting('fsync') order by 1",
            &[],
        )
        .await?;
    let settings: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    println!("settings beside the defaults: {}", settings.join(", "));
    println!("pgbench -c {CLIENTS} -j {THREADS}, scale {SCALE}, through the unix socket\n");
    Ok(())
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

// ---- hops under load ----

/// The write gaps in milliseconds, and how many writes were lost or duplicated.
async fn hops(effort: &Effort) -> Result<(Figures, usize)> {
    let cluster = Cluster::builder().direct().config("fsync", "on").start().await?;
    cluster.expect_log(" 25006 client backend ");
    cluster.agent(&["down", NAMES[1]]).await?.expect_code(0)?;
    let options = WorkloadOptions { clients: BOTS, ..Default::default() };
    println!(
        "\n{} hops of two nodes over TLS, fsync on, {BOTS} bots that write every {:?}",
        effort.hops, options.pause
    );
    let workload = Workload::start(&cluster, options);
    let began = Instant::now();
    let mut hops = Vec::new();
    for number in 1..=effort.hops {
        workload.wait_writes((number + 1) % 2, 40).await?;
        hops.push(cluster.hop(NAMES[number % 2]).await?);
    }
    let took = began.elapsed();
    workload.wait_writes(effort.hops % 2, 40).await?;
    let report = workload.stop(Duration::from_secs(10)).await?;
    cluster.wait_replicated().await?;
    let verdict = report.verify(&cluster).await?;
    cluster.assert_identical().await?;

    let servers = Figures::milliseconds(hops.iter().map(|hop| hop.write_gap)).context("no hops")?;
    let clients = hops.iter().map(|hop| report.longest_pause(hop.began, hop.ended));
    let clients = Figures::milliseconds(clients).context("no hops")?;
    let agent = Figures::milliseconds(hops.iter().map(|hop| hop.ended - hop.began)).context("no hops")?;
    for (what, figures) in [
        ("write gap, by the servers' clocks", &servers),
        ("longest pause of all bots together", &clients),
        ("the agent, from start to end", &agent),
    ] {
        let mut line = format!("{what:<36}");
        for (name, share) in [("min", 0.0), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
            write!(line, "  {name} {:.1}", figures.quantile(share))?;
        }
        println!("{line} ms");
    }
    println!(
        "{} writes acknowledged in {:.0} s, {} refused as the database was down",
        verdict.acknowledged,
        took.as_secs_f64(),
        report.refused
    );
    println!("{verdict}");
    let bad = verdict.lost.len() + verdict.duplicated.len();
    if bad == 0 {
        verdict.ensure_clean()?;
    }
    cluster.finish().await?;
    Ok((servers, bad))
}
