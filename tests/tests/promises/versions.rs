//! Nodes of different major versions of PostgreSQL: the time of an upgrade, in which everything must hold as before.
//!
//! They need a second server, so `make test` counts them as ignored: `make test-pairs` runs those of 16 and 18.

use std::collections::VecDeque;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use stillebot_tests::cluster::{DATABASE, active_name};
use stillebot_tests::{Cluster, Installation, Shutdown, Workload, WorkloadOptions};

use crate::PATIENCE;
use crate::conflicts::{apart, conflicts, expect_errors, settled, wait_open};
use crate::runs::agent;

/// Rows go both ways, the writable side moves there and back under writes, and a conflict is a row on each node, alike but for
/// what the versions say in words.
async fn replicate_hop_and_log(old: u32, new: u32) -> Result<()> {
    let installations = [Installation::of(old)?, Installation::of(new)?];
    let cluster = Cluster::builder().on(&installations).start().await?;
    expect_errors(&cluster, &["23505"]);
    cluster.expect_log(" 25006 ");
    for (node, installation) in cluster.nodes().iter().zip(&installations) {
        let major: i32 = node.value("postgres", "select current_setting('server_version_num')::int / 10000").await?;
        ensure!(u32::try_from(major)? == installation.major, "{} runs {major}", node.name());
    }

    // The winner is the same, whichever node is asked.
    let insert =
        |key: i32, by: &str| format!("insert into stillebot.config values ({key}, 'k', '{{\"by\": \"{by}\"}}');");
    for (key, asked) in [(1, "sikorsky"), (2, "gideon")] {
        apart(&cluster, &insert(key, "sikorsky"), &insert(key, "gideon")).await?;
        for (node, other) in [("sikorsky", "gideon"), ("gideon", "sikorsky")] {
            let row = wait_open(cluster.node(node), "insert_exists").await?;
            ensure!(row["constraint_name"] == "config_pkey" && row["sqlstate"] == "23505", "{row:#}");
            ensure!(row["replica_identity"] == json!({"twitchid": key, "keyword": "k"}), "{row:#}");
            ensure!(row["remote_tuple"]["data"]["by"] == other, "{row:#}");
            ensure!(row["local_conflicts"][0]["tuple"]["data"]["by"] == node, "{row:#}");
            ensure!(row["local_conflicts"][0]["origin"] == "local" && row["blocking"] == true, "{row:#}");
        }
        let row = wait_open(cluster.node(asked), "insert_exists").await?;
        let name = format!("{asked}/{}", row["id"]);
        agent(&cluster, &["conflicts", "resolve", &name, "--keep", "newest"]).await?.expect_code(0)?;
        settled(&cluster).await?;
        for node in cluster.nodes() {
            let by = format!("select data ->> 'by' from stillebot.config where twitchid = {key}");
            let by: String = node.value(DATABASE, &by).await?;
            ensure!(by == "gideon", "{} kept {by}'s, which is the older one", node.name());
        }
    }
    for node in cluster.nodes() {
        ensure!(conflicts(node).await?.len() == 2, "{:#?}", conflicts(node).await?);
    }

    agent(&cluster, &["hop", "sikorsky"]).await?.expect_code(0)?;
    let workload = Workload::start(&cluster, WorkloadOptions::default());
    for (source, target) in [(0, 1), (1, 0)] {
        workload.wait_writes(source, 50).await?;
        agent(&cluster, &["hop", cluster.nodes()[target].name()]).await?.expect_code(0)?;
        workload.wait_writes(target, 50).await?;
    }
    assert_nothing_lost(&cluster, workload).await?;
    cluster.finish().await
}

async fn assert_nothing_lost(cluster: &Cluster, workload: Workload) -> Result<()> {
    let report = workload.stop(PATIENCE).await?;
    ensure!(report.unsaved.is_empty(), "writes were left: {:?}", report.unsaved);
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    report.verify(cluster).await?.ensure_clean()
}

#[tokio::test]
#[ignore = "needs a 16 and a 17, PG_CONFIG_17"]
async fn a_pair_of_16_and_17_replicates_hops_and_logs_conflicts() -> Result<()> {
    replicate_hop_and_log(16, 17).await
}

#[tokio::test]
#[ignore = "needs a 16 and an 18: make test-pairs"]
async fn a_pair_of_16_and_18_replicates_hops_and_logs_conflicts() -> Result<()> {
    replicate_hop_and_log(16, 18).await
}

/// A line of a block of commands in docs/upgrading.md, and on which host it is typed if that matters.
struct Line {
    command: String,
    host: Option<String>,
}

fn lines() -> Vec<Line> {
    let mut inside = false;
    let mut lines = Vec::new();
    for line in include_str!("../../../docs/upgrading.md").lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
        } else if inside {
            let (command, host) =
                line.split_once(" # on ").map_or((line, None), |(command, host)| (command, Some(host)));
            lines.push(Line { command: command.trim().to_owned(), host: host.map(str::to_owned) });
        }
    }
    lines
}

/// Words as a shell takes them; nothing on that page quotes but whole words.
fn words(command: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (index, part) in command.split('"').enumerate() {
        if index % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words
}

#[tokio::test]
#[ignore = "needs a 16 and an 18: make test-pairs"]
async fn a_pair_is_upgraded_node_by_node_under_writes_and_loses_none() -> Result<()> {
    let [old, new] = [Installation::of(16)?, Installation::of(18)?];
    let builder = Cluster::builder().bare().on(&[old, old]).config("max_slot_wal_keep_size", "4GB");
    let mut cluster = builder.start().await?;
    for allowed in [
        " 25006 ",
        " 55006 ",
        " 28000 ",
        " 3D000 ",
        "terminating logical replication worker due to administrator command",
    ] {
        cluster.expect_log(allowed);
    }
    let active = format!("insert into stillebot.settings (active_bot) values ('{}')", active_name("sikorsky"));
    cluster.node("sikorsky").execute(DATABASE, &active).await?;
    let first = cluster.as_admin("init", &["--yes"]);
    agent(&cluster, &first.iter().map(String::as_str).collect::<Vec<_>>()).await?.expect_code(0)?;
    agent(&cluster, &["hop", "sikorsky"]).await?.expect_code(0)?;

    let workload = Workload::start(&cluster, WorkloadOptions::default());
    let mut writable = 0;
    workload.wait_writes(writable, 50).await?;
    let mut lines: VecDeque<Line> = lines().into();
    ensure!(lines.len() > 20, "docs/upgrading.md has lost its commands");
    while let Some(Line { command, host }) = lines.pop_front() {
        println!("{command}");
        let words = words(&command);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let on = || host.as_deref().with_context(|| format!("on which host: {command}"));
        match words.as_slice() {
            ["stillebot-agent", verb @ ("init" | "deinit"), options @ ..] => {
                let words = cluster.as_admin(verb, options);
                agent(&cluster, &words.iter().map(String::as_str).collect::<Vec<_>>()).await?.expect_code(0)?;
            }
            ["stillebot-agent", words @ ..] => {
                agent(&cluster, words).await?.expect_code(0)?;
                if let ["hop", target] = words {
                    writable = usize::from(*target == "gideon");
                    workload.wait_writes(writable, 50).await?;
                }
            }
            ["pg_ctlcluster", "16", "main", "stop"] => cluster.node(on()?).stop(Shutdown::Fast).await?,
            // With all that belongs to it: the harness has templates of that.
            ["pg_createcluster", "18", "main", "--start"] => {
                cluster.replace(on()?, new).await?;
                for command in ["psql -c \"create role rosuav nologin\"", "createdb -O rosuav stillebot", "pg_dump "] {
                    let next = lines.pop_front().map(|line| line.command).unwrap_or_default();
                    ensure!(next.starts_with(command), "{next} instead of {command}");
                }
            }
            ["psql", "-c", statement] => cluster.node(on()?).execute("postgres", statement).await?,
            _ => bail!("the test does not know how to do what docs/upgrading.md says: {command}"),
        }
        // Never without a node that takes writes.
        workload.wait_writes(writable, 10).await?;
    }
    for node in cluster.nodes() {
        ensure!(node.installation().major == 18, "{} was left as it was", node.name());
    }
    assert_nothing_lost(&cluster, workload).await?;
    cluster.finish().await
}
