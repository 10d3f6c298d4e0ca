//! Keys from sequences: after `sequences stride` no two nodes hand out the same one, and after a hop none is handed out again.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Server};

use crate::runs::{Started, agent, writable};

/// One of each kind: serial, identity, and a narrow column fed by a wide sequence.
const TABLES: &str = "
    create table stillebot.tickets (id serial primary key, note text);
    create table stillebot.\"Runs\" (\"Id\" bigint generated always as identity primary key, note text);
    create sequence stillebot.numbers cache 20;
    create table stillebot.few (number smallint not null default nextval('stillebot.numbers') unique, note text);
    alter table stillebot.few replica identity using index few_number_key;";
const EACH: [&str; 3] = ["stillebot.tickets", "stillebot.\"Runs\"", "stillebot.few"];

async fn with_keys(size: usize) -> Result<Cluster> {
    let cluster = Cluster::builder().nodes(size).start().await?;
    for node in cluster.nodes() {
        node.execute(DATABASE, TABLES).await?;
    }
    cluster.agent(&["refresh"]).await?.expect_code(0)?;
    Ok(cluster)
}

async fn insert(node: &Server, rows: usize) -> Result<()> {
    for table in EACH {
        let insert = format!("insert into {table} (note) values ('{}');", node.name());
        node.execute(DATABASE, &insert.repeat(rows)).await.with_context(|| format!("{table} on {}", node.name()))?;
    }
    Ok(())
}

async fn assert_rows(cluster: &Cluster, rows: i64) -> Result<()> {
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    for table in EACH {
        let found: i64 = cluster.nodes()[0].value(DATABASE, &format!("select count(*) from {table}")).await?;
        ensure!(found == rows, "{found} rows of {rows} in {table}");
    }
    Ok(())
}

/// Increment and residue of a sequence on each node.
async fn strides(cluster: &Cluster, sequence: &str) -> Result<Vec<(i64, i64)>> {
    let run = agent(cluster, &["sequences", "check"]).await?;
    let all = run.json["sequences"].as_array().with_context(|| format!("{run:#?}"))?;
    let found = all.iter().find(|one| one["name"] == sequence).with_context(|| format!("no {sequence}: {run:#?}"))?;
    let nodes = found["nodes"].as_array().context("no nodes")?;
    let number = |node: &Value, key: &str| node[key].as_i64().with_context(|| format!("no {key} in {node}"));
    nodes.iter().map(|node| Ok((number(node, "increment")?, number(node, "residue")?))).collect()
}

#[tokio::test]
async fn with_strides_both_nodes_write_and_no_key_is_handed_out_twice() -> Result<()> {
    let cluster = with_keys(2).await?;
    insert(cluster.node("sikorsky"), 5).await?;
    cluster.wait_replicated().await?;
    // Sessions that live across it, with values in their cache.
    let mut sessions = Vec::new();
    for node in cluster.nodes() {
        let session = node.superuser(DATABASE).await?;
        if node.name() == "sikorsky" {
            session.execute("insert into stillebot.few default values", &[]).await?;
        }
        sessions.push(session);
    }

    let run = agent(&cluster, &["sequences", "check"]).await?.expect_code(1)?;
    let all = run.json["sequences"].as_array().context("no sequences")?;
    ensure!(all.len() == 3 && all.iter().all(|one| one["verdict"] == "error"), "{run:#?}");

    let run = agent(&cluster, &["sequences", "stride", "--dry-run"]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "dry_run" && run.json["changes"]["gideon"].is_array(), "{run:#?}");
    agent(&cluster, &["sequences", "check"]).await?.expect_code(1)?;

    let run = agent(&cluster, &["sequences", "stride"]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done", "{run:#?}");
    ensure!(writable(&cluster).await?.len() == 2, "both were writable before");
    agent(&cluster, &["sequences", "check"]).await?.expect_code(0)?;
    let run = agent(&cluster, &["sequences", "stride"]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "nothing_to_do", "{run:#?}");

    for session in &sessions {
        session.execute("insert into stillebot.few default values", &[]).await?;
    }
    // Both before either has what the other wrote.
    for node in cluster.nodes() {
        insert(node, 20).await?;
    }
    cluster.wait_replicated().await?;
    let few: i64 = cluster.node("gideon").value(DATABASE, "select count(*) from stillebot.few").await?;
    ensure!(few == 5 + 1 + 2 + 40, "{few} rows");
    cluster.node("sikorsky").execute(DATABASE, "delete from stillebot.few where note is null").await?;
    assert_rows(&cluster, 45).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_third_node_later_gets_a_place_and_the_first_two_keep_theirs() -> Result<()> {
    let cluster = with_keys(3).await?;
    insert(cluster.node("rodan"), 3).await?;
    cluster.wait_replicated().await?;
    // As two nodes have them after a while, in the order in which they were set up.
    for (node, residue) in [("gideon", 0), ("sikorsky", 1)] {
        for sequence in ["stillebot.tickets_id_seq", "stillebot.\"Runs_Id_seq\"", "stillebot.numbers"] {
            let strided = format!(
                "alter sequence {sequence} increment by 16 start with {} restart with {}",
                16 + residue,
                160 + residue
            );
            cluster.node(node).execute(DATABASE, &strided).await?;
        }
    }
    let sequence = "stillebot.tickets_id_seq";
    agent(&cluster, &["sequences", "stride"]).await?.expect_code(0)?;
    let found = strides(&cluster, sequence).await?;
    ensure!(found == [(16, 1), (16, 0), (16, 2)], "{found:?}");
    for node in cluster.nodes() {
        insert(node, 10).await?;
    }
    assert_rows(&cluster, 33).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_hop_hands_out_no_key_twice_with_or_without_strides() -> Result<()> {
    let cluster = with_keys(2).await?;
    cluster.expect_log(" 25006 ");
    agent(&cluster, &["hop", "sikorsky"]).await?.expect_code(0)?;
    insert(cluster.node("sikorsky"), 5).await?;
    // Never used there; rows that are gone count, too.
    cluster.node("sikorsky").execute(DATABASE, "delete from stillebot.tickets where id = 5").await?;
    let run = agent(&cluster, &["hop", "gideon"]).await?.expect_code(0)?;
    let steps = run.json["steps"].as_array().context("no steps")?;
    ensure!(steps.iter().any(|step| step["step"] == "sequences"), "{run:#?}");
    let gideon = cluster.node("gideon");
    let id: i32 = gideon.value(DATABASE, "insert into stillebot.tickets default values returning id").await?;
    ensure!(id == 6, "{id} is not the first key that was not handed out");
    insert(gideon, 5).await?;
    // A session on the other side with values of its own from before.
    agent(&cluster, &["hop", "sikorsky"]).await?.expect_code(0)?;
    insert(cluster.node("sikorsky"), 5).await?;
    agent(&cluster, &["sequences", "stride"]).await?.expect_code(0)?;
    ensure!(writable(&cluster).await? == ["sikorsky"], "{:?}", writable(&cluster).await?);
    for target in ["gideon", "sikorsky", "gideon"] {
        agent(&cluster, &["hop", target]).await?.expect_code(0)?;
        insert(cluster.node(target), 5).await?;
    }
    let found = strides(&cluster, "stillebot.tickets_id_seq").await?;
    ensure!(found == [(16, 0), (16, 1)], "a hop keeps residues: {found:?}");
    cluster.node("gideon").execute(DATABASE, "delete from stillebot.tickets where id = 6").await?;
    cluster.node("gideon").execute(DATABASE, "insert into stillebot.tickets (id) values (5)").await?;
    assert_rows(&cluster, 30).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_stride_that_was_cut_off_is_finished_by_the_next_one() -> Result<()> {
    let cluster = with_keys(2).await?;
    cluster.expect_log(" 25006 ");
    insert(cluster.node("gideon"), 3).await?;
    for place in ["after:close", "before:stride", "after:stride"] {
        let mut started = Started::paused(&cluster, &["sequences", "stride"], place).await?;
        ensure!(writable(&cluster).await?.is_empty(), "{place}: nobody may write meanwhile");
        started.signal(Signal::SIGKILL)?;
        drop(started.end().await);
        agent(&cluster, &["sequences", "stride"]).await?.expect_code(0)?;
        ensure!(writable(&cluster).await?.len() == 2, "{place}: both were writable before");
        agent(&cluster, &["sequences", "check"]).await?.expect_code(0)?;
        for node in cluster.nodes() {
            node.execute(DATABASE, "alter sequence stillebot.tickets_id_seq increment by 1").await?;
        }
    }
    // Killed, and the operator has opened one of them: that one stays the only one.
    let mut started = Started::paused(&cluster, &["sequences", "stride"], "after:stride").await?;
    started.signal(Signal::SIGKILL)?;
    drop(started.end().await);
    agent(&cluster, &["up", "gideon"]).await?.expect_code(0)?;
    agent(&cluster, &["sequences", "stride"]).await?.expect_code(0)?;
    ensure!(writable(&cluster).await? == ["gideon"]);
    cluster.finish().await
}

#[tokio::test]
async fn what_would_be_exhausted_is_refused_and_what_soon_is_is_told() -> Result<()> {
    let cluster = with_keys(2).await?;
    let sikorsky = cluster.node("sikorsky");
    sikorsky.execute(DATABASE, "select setval('stillebot.numbers', 32750)").await?;
    let run = agent(&cluster, &["sequences", "check"]).await?.expect_code(1)?;
    let all = run.json["sequences"].as_array().context("no sequences")?;
    let numbers = all.iter().find(|one| one["name"] == "stillebot.numbers").context("no numbers")?;
    ensure!(numbers["nodes"][0]["left"] == 17 && numbers["nodes"][0]["scarce"] == true, "{numbers:#}");
    let run = agent(&cluster, &["sequences", "stride", "--places", "32"]).await?.expect_code(1)?;
    ensure!(run.says("none was changed") && run.says("the greatest possible is 32767"), "{run:#?}");
    ensure!(strides(&cluster, "stillebot.tickets_id_seq").await? == [(1, 0), (1, 0)], "nothing was changed");
    ensure!(writable(&cluster).await?.len() == 2);
    // The verb itself refuses to do so in an open database.
    cluster.expect_log("strides are given to sequences of a database that is down only");
    let refused = sikorsky
        .execute(DATABASE, "select multihome.stride('[{\"name\": \"stillebot.numbers\", \"increment\": 16, \"start\": 1, \"next\": 1}]')")
        .await;
    ensure!(refused.is_err_and(|error| format!("{error:#}").contains("down")), "it was not refused");
    cluster.finish().await
}
