//! `stillebot-agent init`: servers that nobody has set up become nodes that replicate, and no row is lost on the way.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
#[allow(unused_imports)]
use nix::sys::signal::Signal;
use serde_json::Value;
use stillebot_tests::cluster::{DATABASE, active_name};
use stillebot_tests::{Cluster, ClusterBuilder, Rows, Server, Workload, WorkloadOptions, wait_until};

use crate::PATIENCE;
use crate::runs::{self, Run, Started, agent};

/// Enough rows for a copy that can be watched and interrupted.
const ROWS: i64 = 40_000;

/// Servers that nobody has set up.
fn bare() -> ClusterBuilder {
    Cluster::builder().bare().config("max_slot_wal_keep_size", "4GB")
}

/// Arguments of `init`, with these as well.
fn arguments(cluster: &Cluster, more: &[&str]) -> Vec<String> {
    let more = more.iter().map(|&word| word.to_owned());
    cluster.init_arguments().into_iter().chain(more).collect()
}

async fn init(cluster: &Cluster, more: &[&str]) -> Result<Run> {
    let arguments = arguments(cluster, more);
    agent(cluster, &arguments.iter().map(String::as_str).collect::<Vec<_>>()).await
}

fn start_init(cluster: &Cluster, more: &[&str]) -> Result<Started> {
    let arguments = arguments(cluster, more);
    Started::new(cluster, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Rows as a bot has them after a while.
async fn fill(node: &Server, rows: i64) -> Result<()> {
    node.execute(
        DATABASE,
        &format!(
            "insert into stillebot.settings (active_bot) values ('{}');
             insert into stillebot.config (twitchid, keyword, data)
             select n, 'counter', jsonb_build_object('n', n, 'text', repeat(md5(n::text), 8)) from generate_series(1, {rows}) n;
             insert into stillebot.http_sessions (cookie, data)
             select 'session-' || n, convert_to(md5(n::text), 'UTF8') from generate_series(1, {rows} / 4) n;",
            active_name(node.name())
        )
        // Cookies of the workload begin with a number.
        .replace("'session-'", "'0-'"),
    )
    .await
}

/// A row from each node comes to all others, all tables are the same, and `check` finds no error.
async fn assert_replicates(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        let name = node.name();
        let key = format!("from {name}");
        let session = node.connect("rosuav", DATABASE).await?;
        session.execute("insert into stillebot.config values (0, $1, '{}')", &[&key]).await?;
        for peer in cluster.nodes() {
            let seen = format!("select exists (select from stillebot.config where keyword = '{key}')");
            wait_until(&format!("a row of {name} on {}", peer.name()), PATIENCE, || async {
                Ok(peer.value::<bool>(DATABASE, &seen).await?.then_some(()))
            })
            .await?;
        }
        session.execute("delete from stillebot.config where keyword = $1", &[&key]).await?;
    }
    // The deletions, and whatever a workload has written last.
    wait_until("all nodes to have the same rows", PATIENCE, || async { cluster.assert_identical().await.map(Some) })
        .await?;
    let left: Vec<i64> = probes(cluster).await?;
    ensure!(left.iter().all(|&count| count == 0), "rows of the proof were left: {left:?}");
    let check = agent(cluster, &["check"]).await?;
    ensure!(check.code == Some(0), "check is not content: {:#}", troubles(&check.json));
    Ok(())
}

async fn probes(cluster: &Cluster) -> Result<Vec<i64>> {
    let mut counts = Vec::new();
    for node in cluster.nodes() {
        counts.push(node.value(DATABASE, "select count(*) from multihome.probe").await?);
    }
    Ok(counts)
}

fn troubles(check: &Value) -> Value {
    let findings = check["findings"].as_array().cloned().unwrap_or_default();
    findings.into_iter().filter(|finding| finding["verdict"] != "ok").collect()
}

/// What `init` could have made on a node.
async fn made(node: &Server) -> Result<String> {
    node.value(
        DATABASE,
        "select format('roles %s, extensions %s, publications %s, subscriptions %s, slots %s, file settings %s',
                       (select string_agg(rolname, ' ' order by rolname) from pg_roles where rolname !~ '^pg_'),
                       (select string_agg(extname, ' ' order by extname) from pg_extension),
                       (select count(*) from pg_publication), (select count(*) from pg_subscription),
                       (select count(*) from pg_replication_slots),
                       (select string_agg(name || sourcefile, ' ') from pg_file_settings
                         where sourcefile like '%auto.conf'))",
    )
    .await
}

async fn all_made(cluster: &Cluster) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for node in cluster.nodes() {
        all.push(made(node).await?);
    }
    Ok(all)
}

async fn count(node: &Server, table: &str) -> Result<i64> {
    node.value(DATABASE, &format!("select count(*) from stillebot.{table}")).await
}

#[tokio::test]
async fn two_fresh_servers_become_a_pair_and_a_second_init_has_nothing_to_do() -> Result<()> {
    let cluster = bare().start().await?;
    let run = init(&cluster, &["--yes"]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done", "{run:#?}");
    let proof = run.json["proof"].as_array().context("no proof")?;
    ensure!(proof.len() == 2 && proof.iter().all(|way| way["by"] == "row"), "{run:#?}");
    ensure!(runs::writable(&cluster).await?.len() == 2, "a node was left closed");
    assert_replicates(&cluster).await?;

    let again = init(&cluster, &["--yes"]).await?.expect_code(0)?;
    ensure!(again.json["outcome"] == "nothing_to_do", "{again:#?}");
    cluster.finish().await
}
