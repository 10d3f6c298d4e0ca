//! A table that was created with rows in it is filled on the other nodes once, one way, by choice.

use anyhow::{Context, Result, ensure};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, wait_until};

use crate::PATIENCE;
use crate::runs::agent;

const TABLE: &str = "create table stillebot.songs (id bigint primary key, title text, cover bytea)";
const ROWS: &str = "insert into stillebot.songs select i, 'song ' || i, decode(repeat('00ff', 50), 'hex') \
                    from generate_series(1, 5000) i";

/// Two nodes with a table that has rows on the first only.
async fn begun() -> Result<Cluster> {
    let cluster = Cluster::start().await?;
    // Rows of a table that is not there stop apply until it is, and then are left out.
    cluster.expect_log("logical replication target relation \"stillebot.songs\" does not exist");
    cluster.expect_log("exited with exit code 1");
    // The worker that is ended for the copy may not have let go when the next one starts, which tries again.
    cluster.expect_log("is already active for PID");
    cluster.node("sikorsky").execute(DATABASE, &format!("{TABLE}; {ROWS}")).await?;
    cluster.node("gideon").execute(DATABASE, TABLE).await?;
    cluster.wait_replicated().await?;
    Ok(cluster)
}

async fn count(cluster: &Cluster, node: &str) -> Result<i64> {
    cluster.node(node).value(DATABASE, "select count(*) from stillebot.songs").await
}

#[tokio::test]
async fn a_table_created_with_rows_is_copied_once_and_replicates_both_ways_from_then_on() -> Result<()> {
    let cluster = begun().await?;
    let dry = agent(&cluster, &["schema", "populate", "stillebot.songs", "--from", "sikorsky", "--dry-run"]);
    let dry = dry.await?.expect_code(0)?;
    ensure!(dry.json["outcome"] == "dry_run" && dry.json["rows"] == 5000, "{dry:?}");
    ensure!(count(&cluster, "gideon").await? == 0);

    // Written while it is copied: none is lost, none comes twice.
    let writer = cluster.node("sikorsky").superuser(DATABASE).await?;
    let writing = async {
        for i in 0..200 {
            let row = format!("insert into stillebot.songs values ({}, 'meanwhile')", 10_000 + i);
            writer.batch_execute(&row).await?;
        }
        anyhow::Ok(())
    };
    let arguments = ["schema", "populate", "stillebot.songs", "--from", "sikorsky"];
    let (written, run) = tokio::join!(writing, agent(&cluster, &arguments));
    written?;
    let run = run?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done", "{run:?}");
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    ensure!(count(&cluster, "gideon").await? == 5200);

    cluster.node("gideon").execute(DATABASE, "update stillebot.songs set title = 'new' where id = 7").await?;
    cluster.node("sikorsky").execute(DATABASE, "delete from stillebot.songs where id = 8").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;

    // Run again, there is nothing to do; and a table that has other rows on both is left alone.
    let again = agent(&cluster, &arguments).await?.expect_code(0)?;
    ensure!(again.json["nodes"] == serde_json::json!([]) && again.json["rows"] == 5199, "{again:?}");
    cluster.node("gideon").execute(DATABASE, "alter subscription multihome disable").await?;
    cluster.node("sikorsky").execute(DATABASE, "insert into stillebot.songs values (-1, 'late')").await?;
    let again = agent(&cluster, &arguments).await?.expect_code(1)?;
    ensure!(again.says("has 5199 rows on gideon and 5200 on sikorsky"), "{again:?}");
    cluster.node("gideon").execute(DATABASE, "alter subscription multihome enable").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    cluster.expect_log("terminating logical replication worker due to administrator command");
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_is_down_is_populated_and_stays_down() -> Result<()> {
    let cluster = begun().await?;
    cluster.expect_log("terminating logical replication worker due to administrator command");
    // Joined without its rows, as a refresh does.
    agent(&cluster, &["refresh"]).await?.expect_code(0)?;
    agent(&cluster, &["down", "gideon"]).await?.expect_code(0)?;
    let run = agent(&cluster, &["schema", "populate", "stillebot.songs", "--from", "sikorsky"]).await?;
    run.expect_code(0)?;
    wait_until("the rows", PATIENCE, || async { Ok((count(&cluster, "gideon").await? == 5000).then_some(())) }).await?;
    let state: String = cluster.node("gideon").value(DATABASE, "select state from stillebot_status()").await?;
    ensure!(state == "down");
    cluster.finish().await
}

#[tokio::test]
async fn a_table_that_is_not_alike_or_not_there_is_not_populated() -> Result<()> {
    let cluster = begun().await?;
    cluster.node("gideon").execute(DATABASE, "alter table stillebot.songs add column more text").await?;
    let run = agent(&cluster, &["schema", "populate", "stillebot.songs", "--from", "sikorsky"]).await?;
    let run = run.expect_code(1)?;
    ensure!(run.says("column stillebot.songs.more: not on sikorsky"), "{run:?}");
    ensure!(count(&cluster, "gideon").await? == 0);
    let run = agent(&cluster, &["schema", "populate", "stillebot.none", "--from", "sikorsky"]).await?;
    run.expect_code(2)?;
    cluster.finish().await
}

#[tokio::test]
async fn a_run_that_was_killed_is_finished_by_the_next_one_and_three_nodes_end_alike() -> Result<()> {
    let cluster = Cluster::builder().nodes(3).start().await?;
    for allowed in [
        "logical replication target relation \"stillebot.songs\" does not exist",
        "exited with exit code 1",
        "is already active for PID",
        "terminating logical replication worker due to administrator command",
    ] {
        cluster.expect_log(allowed);
    }
    cluster.node("sikorsky").execute(DATABASE, &format!("{TABLE}; {ROWS}")).await?;
    for node in ["gideon", "rodan"] {
        cluster.node(node).execute(DATABASE, TABLE).await?;
    }
    cluster.wait_replicated().await?;
    // Holds the copy up on one node, so that the run is killed in the middle: what keeps other writers out keeps the copy out.
    let holder = cluster.node("rodan").superuser(DATABASE).await?;
    holder.batch_execute("begin; lock table stillebot.songs in share row exclusive mode").await?;
    let arguments = ["schema", "populate", "stillebot.songs", "--from", "sikorsky"];
    let mut child = cluster.agent_command(&arguments).spawn()?;
    wait_until("gideon to have its copy", PATIENCE, || async {
        Ok((count(&cluster, "gideon").await? == 5000).then_some(()))
    })
    .await?;
    child.kill().await?;
    holder.batch_execute("rollback").await?;
    drop(holder);
    // The lock of the one that was killed is free when its server process has noticed.
    let run = wait_until("the next run", PATIENCE, || async {
        let run = agent(&cluster, &arguments).await?;
        println!("{run:?}");
        Ok((run.code == Some(0)).then_some(run))
    })
    .await?;
    ensure!(run.json["outcome"] == "done", "{run:?}");
    cluster.node("gideon").execute(DATABASE, "insert into stillebot.songs values (-1, 'gideon')").await?;
    cluster.node("rodan").execute(DATABASE, "insert into stillebot.songs values (-2, 'rodan')").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    ensure!(count(&cluster, "rodan").await? == 5002);
    cluster.finish().await
}

#[tokio::test]
async fn a_copy_is_refused_if_the_worker_does_not_end() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 55P03 client backend");
    cluster.expect_log("did not terminate within");
    cluster.expect_log("terminating logical replication worker due to administrator command");
    cluster.expect_log("exited with exit code 1");
    cluster.expect_log("is already active for PID");
    let gideon = cluster.node("gideon");
    let worker: i32 = gideon.value(DATABASE, "select pid from pg_stat_subscription where relid is null").await?;
    let worker = nix::unistd::Pid::from_raw(worker);
    // A process that does not react.
    nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGSTOP)?;
    let session = gideon.superuser(DATABASE).await?;
    let call = "select multihome.copy_table('stillebot.raids', 'multihome', false)";
    let refused = session.batch_execute(call).await;
    nix::sys::signal::kill(worker, nix::sys::signal::Signal::SIGCONT)?;
    let error = refused.err().context("copied beside a worker that was at work")?;
    ensure!(format!("{error:?}").contains("does not end"), "{error:?}");
    let state: String = gideon
        .value(DATABASE, "select srsubstate::text from pg_subscription_rel where srrelid = 'stillebot.raids'::regclass")
        .await?;
    ensure!(state == "r", "{state}");
    cluster.wait_replicated().await?;
    cluster.finish().await
}
