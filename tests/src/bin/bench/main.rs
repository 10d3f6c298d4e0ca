//! `make bench`: what the extension costs, as ratios to the same server without it, how long a hop refuses writes, and how
//! long a conflict stops replication. About eleven minutes on an otherwise idle machine; `SUBJECTS='apply conflicts'` is a
//! part of it, and `QUICK=1` a smoke run whose figures mean nothing.
//!
//! Two servers side by side take turns of a few seconds, A B B A, so that whatever drifts (clock rate, disk, neighbours)
//! drifts for both; a ratio is made of each pair. After half of the pairs they swap roles, so that luck with memory or
//! files is no advantage of either. Exits non-zero only if something got lost or duplicated: a missed goal is said, not
//! hidden.

mod apply;
mod conflicts;
mod hops;
mod pgbench;

use std::{env, fs, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use stillebot_tests::{Installation, Server, figures::Figures};

const DATABASE: &str = "postgres";
/// Between the quartiles of the ratios, on a machine that does nothing else.
const QUIET: f64 = 0.05;

/// All servers' settings beside the defaults, where two are compared: nothing of one's upkeep shall fall into the other's
/// turn.
const SETTINGS: [(&str, &str); 7] = [
    ("fsync", "on"),
    ("shared_buffers", "128MB"),
    ("max_connections", "100"),
    ("dynamic_shared_memory_type", "posix"),
    ("autovacuum", "off"),
    ("checkpoint_timeout", "1h"),
    ("max_wal_size", "4GB"),
];

const SUBJECTS: [&str; 4] = ["pgbench", "hops", "apply", "conflicts"];

/// How much is measured.
struct Effort {
    /// Of runs of pgbench, for each mode. A multiple of four: two halves, each in whole A B B A.
    pairs: usize,
    /// Of one run of pgbench.
    seconds: u32,
    hops: usize,
    /// Of runs of each load of apply, in the order of [`apply::LOADS`]. Multiples of four.
    apply_pairs: [usize; 4],
    /// What those are divided by, in size.
    apply_share: u32,
    /// Conflicts that stop apply and are resolved.
    conflicts: usize,
    /// The same without the extension, which take seconds each.
    retries: usize,
}

const FULL: Effort =
    Effort { pairs: 16, seconds: 3, hops: 100, apply_pairs: [16, 8, 16, 4], apply_share: 1, conflicts: 50, retries: 8 };
const SMOKE: Effort =
    Effort { pairs: 4, seconds: 1, hops: 10, apply_pairs: [4; 4], apply_share: 10, conflicts: 5, retries: 2 };

/// A line of the table at the end.
struct Finding {
    what: String,
    goal: String,
    result: String,
    spread: String,
    met: Option<bool>,
    /// Missing it is a failure, however slow the machine.
    essential: bool,
    /// The machine was busy with something else.
    restless: bool,
}

impl Finding {
    fn new(what: impl Into<String>, result: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            goal: String::new(),
            result: result.into(),
            spread: String::new(),
            met: None,
            essential: false,
            restless: false,
        }
    }

    /// Of what is better the larger it is, with the extension to without.
    fn ratio(what: impl Into<String>, goal: Option<f64>, ratios: &Figures) -> Self {
        let (ratio, low, high) = (ratios.median(), ratios.quantile(0.25), ratios.quantile(0.75));
        Self {
            goal: goal.map_or_else(String::new, |goal| format!("≥ {goal}")),
            spread: format!("quartiles {low:.3} to {high:.3}"),
            met: goal.map(|goal| ratio >= goal),
            restless: goal.is_some() && high - low > QUIET,
            ..Self::new(what, format!("{ratio:.3}"))
        }
    }

    /// Milliseconds that may not be exceeded.
    fn milliseconds(what: impl Into<String>, goal: Option<f64>, share: f64, figures: &Figures) -> Self {
        let took = figures.quantile(share);
        Self {
            goal: goal.map_or_else(String::new, |goal| format!("≤ {goal} ms")),
            spread: format!("{:.1} to {:.1} ms", figures.min(), figures.max()),
            met: goal.map(|goal| took <= goal),
            ..Self::new(what, format!("{took:.1} ms"))
        }
    }

    /// A number of things that may not happen.
    fn never(what: impl Into<String>, number: usize) -> Self {
        Self { goal: "0".to_owned(), met: Some(number == 0), essential: true, ..Self::new(what, number.to_string()) }
    }
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
    let effort = if quick { SMOKE } else { FULL };
    let mut subjects: Vec<String> = env::args().skip(1).collect();
    if let Some(unknown) = subjects.iter().find(|subject| !SUBJECTS.contains(&subject.as_str())) {
        bail!("there is no subject {unknown}, only {}", SUBJECTS.join(", "));
    }
    if subjects.is_empty() {
        subjects = SUBJECTS.map(str::to_owned).to_vec();
    }
    if quick {
        println!("QUICK=1: the figures below mean nothing.\n");
    }
    describe_machine()?;
    let mut findings = Vec::new();
    for subject in subjects {
        findings.extend(match subject.as_str() {
            "pgbench" => pgbench::measure(&effort).await?,
            "hops" => hops::measure(&effort).await?,
            "apply" => apply::measure(&effort).await?,
            _ => conflicts::measure(&effort).await?,
        });
    }

    println!("\n| measured | goal | result | spread | |");
    println!("| --- | --- | --- | --- | --- |");
    for Finding { what, goal, result, spread, met, .. } in &findings {
        let verdict = met.map_or("", |met| if met { "met" } else { "**missed**" });
        println!("| {what} | {goal} | {result} | {spread} | {verdict} |");
    }
    if findings.iter().any(|finding| finding.restless) {
        println!(
            "\nA spread this wide means that the machine was busy with something else: run it again on an idle one."
        );
    }
    let broken: Vec<_> = findings.iter().filter(|finding| finding.essential && finding.met == Some(false)).collect();
    ensure!(
        broken.is_empty(),
        "{}",
        broken.iter().map(|f| format!("{}: {}", f.what, f.result)).collect::<Vec<_>>().join("; ")
    );
    Ok(())
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

/// What is configured besides the defaults and what the harness needs for itself.
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
    Ok(())
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
        server.execute(DATABASE, "vacuum analyze").await?;
        server.execute(DATABASE, "checkpoint").await?;
    }
    Ok(())
}

/// What is told beside the ratios.
fn median(values: impl IntoIterator<Item = f64>) -> Result<f64> {
    Ok(Figures::new(values).context("nothing was measured")?.median())
}

/// Time that a process has been on a processor. Finer than the ticks of its `stat`.
fn processor_time(pid: i32) -> Result<Duration> {
    let path = format!("/proc/{pid}/schedstat");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let nanoseconds = text.split(' ').next().and_then(|number| number.parse().ok());
    Ok(Duration::from_nanos(nanoseconds.with_context(|| format!("{path}: {text}"))?))
}

/// Kilobytes of memory that a process shares with no other; 0 if it is gone.
fn private_memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
