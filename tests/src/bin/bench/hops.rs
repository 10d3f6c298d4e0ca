//! How long a hop refuses writes, by the servers' clocks, under load.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use stillebot_tests::{Cluster, Workload, WorkloadOptions, cluster::NAMES, figures::Figures};

use crate::{Effort, Finding};

const BOTS: usize = 8;
/// Milliseconds.
const GOALS: [(&str, f64, f64); 2] = [("p50", 0.5, 20.0), ("p99", 0.99, 100.0)];

/// The write gaps, and how many writes were lost or duplicated.
pub async fn measure(effort: &Effort) -> Result<Vec<Finding>> {
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
    let mut findings: Vec<_> = GOALS
        .map(|(name, share, goal)| {
            let what = format!("write gap of {} hops, {name}", effort.hops);
            Finding::milliseconds(what, Some(goal), share, &servers)
        })
        .into();
    findings.push(Finding::never("writes lost or duplicated in those", bad));
    Ok(findings)
}
