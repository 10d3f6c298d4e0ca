//! Every conflict and error of replication is a row on the node that met it, with both versions of the data; and a call
//! gets replication going again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Server, wait_until};

use crate::PATIENCE;

/// A row of `multihome.conflicts`, as JSON.
pub type Conflict = Value;

/// Writes on both nodes while they cannot hear each other, and joins them again.
pub async fn apart(cluster: &Cluster, sikorsky: &str, gideon: &str) -> Result<()> {
    let links = [cluster.link("sikorsky", "gideon"), cluster.link("gideon", "sikorsky")];
    for link in links {
        link.cut().await?;
    }
    for (node, statements) in [("sikorsky", sikorsky), ("gideon", gideon)] {
        if !statements.is_empty() {
            cluster.node(node).execute(DATABASE, statements).await?;
        }
    }
    for link in links {
        link.heal().await?;
    }
    Ok(())
}

/// All rows of a node, oldest first.
pub async fn conflicts(node: &Server) -> Result<Vec<Conflict>> {
    let rows: String = node
        .value(DATABASE, "select coalesce(jsonb_agg(to_jsonb(c) order by c.id), '[]')::text from multihome.conflicts c")
        .await?;
    Ok(serde_json::from_str(&rows)?)
}

/// Waits for the first row for which this holds.
pub async fn wait_conflict(node: &Server, what: &str, wanted: impl Fn(&Conflict) -> bool) -> Result<Conflict> {
    let found = wait_until(&format!("{what} on {}", node.name()), PATIENCE, || async {
        Ok(conflicts(node).await?.into_iter().find(|row| wanted(row)))
    })
    .await;
    match found {
        Ok(row) => Ok(row),
        Err(error) => {
            let rows = serde_json::to_string_pretty(&conflicts(node).await?)?;
            Err(error.context(format!("the rows there are: {rows}\nthe log: {}", node.log_tail(10))))
        }
    }
}

/// An open row of that type.
pub async fn wait_open(node: &Server, conflict_type: &str) -> Result<Conflict> {
    wait_conflict(node, &format!("an open {conflict_type}"), |row| {
        row["conflict_type"] == conflict_type && row["status"] == "open"
    })
    .await
}

/// What a call of `stillebot_resolve()` or `stillebot_skip()` says.
pub async fn call(node: &Server, call: &str) -> Result<String> {
    node.value(DATABASE, &format!("select {call}")).await
}

pub fn id(row: &Conflict) -> i64 {
    row["id"].as_i64().expect("a number")
}

/// Waits until nothing is open on any node, and all is the same on all of them.
pub async fn settled(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        wait_until(&format!("no open conflict on {}", node.name()), PATIENCE, || async {
            let open: i64 = node.value(DATABASE, "select open_conflicts from stillebot_status()").await?;
            Ok((open == 0).then_some(()))
        })
        .await
        .with_context(|| format!("the log of {}: {}", node.name(), node.log_tail(10)))?;
    }
    cluster.wait_replicated().await?;
    cluster.assert_identical().await
}

/// Core's own lines for an error that apply meets again and again.
fn expect_unique_violation(cluster: &Cluster) {
    cluster.expect_log(" 23505 logical replication");
}

#[tokio::test]
async fn two_inserts_of_one_key_are_a_row_on_each_node_and_one_call_on_each_resolves_them() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_unique_violation(&cluster);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let insert = |text: &str| {
        format!(
            "begin;
             insert into stillebot.raids values (1, 1, '\"first\"');
             insert into stillebot.config values (7, 'k', '{{\"by\": \"{text}\"}}');
             insert into stillebot.raids values ({}, 2, '\"rest\"');
             commit",
            text.len()
        )
    };
    // The first row of each transaction is the same, so only the second is in the way.
    apart(&cluster, &insert("sikorsky").replace("(1, 1,", "(1, 10,"), &insert("gideon").replace("(1, 1,", "(1, 11,"))
        .await?;

    let there = wait_open(gideon, "insert_exists").await?;
    let here = wait_open(sikorsky, "insert_exists").await?;
    ensure!(here["schemaname"] == "stillebot" && here["relname"] == "config", "{here:#}");
    ensure!(here["constraint_name"] == "config_pkey" && here["sqlstate"] == "23505", "{here:#}");
    ensure!(here["replica_identity"] == json!({"twitchid": 7, "keyword": "k"}), "{here:#}");
    ensure!(here["remote_tuple"] == json!({"twitchid": 7, "keyword": "k", "data": {"by": "gideon"}}), "{here:#}");
    ensure!(here["change_number"] == 2 && here["blocking"] == true && here["operation"] == "insert", "{here:#}");
    ensure!(here["transaction_kind"] == "plain", "{here:#}");
    let local = here["local_conflicts"].as_array().context("no array")?;
    ensure!(local.len() == 1, "{here:#}");
    ensure!(local[0]["tuple"]["data"] == json!({"by": "sikorsky"}) && local[0]["origin"] == "local", "{here:#}");
    ensure!(local[0]["commit_ts"].is_string() && local[0]["xid"].is_number(), "{here:#}");

    // What the transaction did, up to where it stopped.
    let changes = sikorsky.psql(
        DATABASE,
        &format!("select relname, operation, failed, complete from multihome.conflict_changes({})", id(&here)),
    )?;
    ensure!(changes == "raids|insert|f|f\nconfig|insert|t|f", "{changes}");

    // The newer version wins, on both nodes.
    let said = call(sikorsky, &format!("stillebot_resolve({}, 'remote')", id(&here))).await?;
    ensure!(said.contains("on the other node"), "{said}");
    call(gideon, &format!("stillebot_resolve({}, 'local')", id(&there))).await?;
    settled(&cluster).await?;
    let kept: String = sikorsky.value(DATABASE, "select data->>'by' from stillebot.config where twitchid = 7").await?;
    ensure!(kept == "gideon", "{kept}");
    // The rest of both transactions is there.
    let rest: i64 = gideon.value(DATABASE, "select count(*) from stillebot.raids where toid in (2, 10, 11)").await?;
    ensure!(rest == 4, "{rest}");
    // What was removed stays in the log.
    let row = wait_conflict(sikorsky, "the resolved row", |row| row["status"] == "resolved").await?;
    ensure!(row["local_conflicts"][0]["tuple"]["data"] == json!({"by": "sikorsky"}), "{row:#}");
    ensure!(row["resolution"].as_str().is_some_and(|text| text.starts_with("kept remote")), "{row:#}");
    ensure!(row["resolved_by"] == "postgres", "{row:#}");
    cluster.finish().await
}

#[tokio::test]
async fn a_conflict_is_told_by_notification_within_a_second() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_unique_violation(&cluster);
    let gideon = cluster.node("gideon");
    let mut listener = gideon.listen("rosuav", DATABASE).await?;
    listener.client.batch_execute("listen stillebot_conflict").await?;
    gideon.execute(DATABASE, "insert into stillebot.raids values (1, 1)").await?;
    cluster.wait_replicated().await?;
    // The row of one node is gone behind replication's back, so to say: its insert will be one of a row that is there.
    let sikorsky = cluster.node("sikorsky");
    sikorsky.execute(DATABASE, "alter table stillebot.raids drop constraint raids_pkey").await?;
    let began = Instant::now();
    sikorsky.execute(DATABASE, "insert into stillebot.raids values (1, 1)").await?;
    let told = tokio::time::timeout(PATIENCE, listener.notifications.recv()).await?.context("the session ended")?;
    let took = began.elapsed();
    ensure!(told.channel() == "stillebot_conflict", "{told:?}");
    let row = wait_open(gideon, "insert_exists").await?;
    ensure!(told.payload() == id(&row).to_string(), "{told:?} {row:#}");
    ensure!(took < Duration::from_secs(1) || std::env::var_os("CI").is_some(), "it took {took:?}");
    call(gideon, &format!("stillebot_resolve({}, 'local')", id(&row))).await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    cluster.finish().await
}
