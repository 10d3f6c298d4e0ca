//! What is done to the schema by hand is noticed, and a table that exists on both ends replicates without a hand.

use anyhow::{Result, ensure};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Server, wait_until};

use crate::PATIENCE;
use crate::watch::Watch;

const TABLE: &str = "create table stillebot.songs (id bigint primary key, title text)";

async fn watched() -> Result<(Cluster, Watch)> {
    let cluster = Cluster::start().await?;
    // Looks seldom: what happens at once was told.
    cluster.configure_agent("\n[watch]\nchannel = \"scream.emergency\"\ninterval = \"2s\"\n")?;
    let watch = Watch::start(&cluster).await?;
    Ok((cluster, watch))
}

async fn wait_printed(watch: &Watch, part: &str) -> Result<()> {
    wait_until(&format!("{part:?} among what watch says"), PATIENCE, || async {
        Ok(watch.printed().iter().any(|line| line.contains(part)).then_some(()))
    })
    .await
}

async fn count(cluster: &Cluster, node: &str) -> Result<i64> {
    cluster.node(node).value(DATABASE, "select count(*) from stillebot.songs").await
}

#[tokio::test]
async fn a_table_made_by_hand_on_both_nodes_replicates_from_its_first_row() -> Result<()> {
    let (cluster, watch) = watched().await?;
    cluster.node("sikorsky").execute(DATABASE, TABLE).await?;
    cluster.node("gideon").execute(DATABASE, TABLE).await?;
    for node in ["sikorsky", "gideon"] {
        wait_printed(&watch, &format!("new tables replicate to {node}: stillebot.songs")).await?;
    }
    cluster.node("sikorsky").execute(DATABASE, "insert into stillebot.songs values (1, 'a')").await?;
    cluster.node("gideon").execute(DATABASE, "insert into stillebot.songs values (2, 'b')").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    ensure!(count(&cluster, "gideon").await? == 2);
    ensure!(!watch.printed().iter().any(|line| line.contains("populate")), "{:?}", watch.printed());
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn rows_from_before_a_table_replicated_are_said_to_be_missing() -> Result<()> {
    let (cluster, watch) = watched().await?;
    // Rows of a table that is not there stop apply until it is, and then are left out.
    cluster.expect_log("logical replication target relation \"stillebot.songs\" does not exist");
    cluster.expect_log("exited with exit code 1");
    let with_rows = format!("{TABLE}; insert into stillebot.songs values (1, 'early')");
    cluster.node("sikorsky").execute(DATABASE, &with_rows).await?;
    cluster.node("gideon").execute(DATABASE, TABLE).await?;
    wait_printed(&watch, "schema populate stillebot.songs --from sikorsky").await?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_table_that_one_node_lacks_is_named_and_joined_when_it_is_there() -> Result<()> {
    let (cluster, watch) = watched().await?;
    cluster.node("sikorsky").execute(DATABASE, TABLE).await?;
    watch.hear("gideon", &["gideon with another schema", "table stillebot.songs is missing on gideon"]).await?;
    cluster.node("gideon").execute(DATABASE, TABLE).await?;
    wait_printed(&watch, "new tables replicate to gideon: stillebot.songs").await?;
    cluster.node("sikorsky").execute(DATABASE, "insert into stillebot.songs values (1, 'a')").await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    ensure!(count(&cluster, "gideon").await? == 1);
    watch.hear("gideon", &["gideon is well again"]).await?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_stops_apply_for_lack_of_a_column_or_table_is_shown_with_the_statement_that_mends_it() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log("is missing replicated column");
    cluster.expect_log("exited with exit code 1");
    let sikorsky = cluster.node("sikorsky");
    sikorsky.execute(DATABASE, "alter table stillebot.raids add column note text").await?;
    sikorsky.execute(DATABASE, "insert into stillebot.raids (fromid, toid, note) values (1, 2, 'x')").await?;
    let gideon = cluster.node("gideon");
    let id: i64 = wait_until("the row of the log", PATIENCE, || async {
        let query = "select coalesce(max(id), 0) from multihome.conflicts where sqlstate = '55000' and status = 'open'";
        let id: i64 = gideon.value(DATABASE, query).await?;
        Ok((id > 0).then_some(id))
    })
    .await?;
    let name = format!("gideon/{id}");
    let shown = cluster.agent(&["conflicts", "show", &name, "--json"]).await?.expect_code(0)?.json()?;
    ensure!(shown["ddl"][0] == "alter table stillebot.raids add column note text;", "{shown}");
    gideon.execute(DATABASE, "alter table stillebot.raids add column note text").await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    cluster.assert_identical().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_change_of_the_schema_is_told_and_what_is_passing_is_not() -> Result<()> {
    let server = Server::builder("sikorsky").config("max_prepared_transactions", "0").start().await?;
    server.execute("postgres", "create extension stillebot").await?;
    let mut listener = server.listen("postgres", "postgres").await?;
    listener.client.batch_execute("listen stillebot_schema").await?;
    let session = server.superuser("postgres").await?;
    session
        .batch_execute(
            "create temporary table t (i int); drop table t; create extension pg_trgm; drop extension pg_trgm;",
        )
        .await?;
    for (statement, told) in [
        ("create table public.t (i int)", "CREATE TABLE public.t"),
        ("alter table public.t add column j int", "ALTER TABLE public.t"),
        ("create index on public.t (j)", "CREATE INDEX public.t_j_idx"),
        ("drop table public.t", "DROP TABLE public.t"),
    ] {
        session.batch_execute(statement).await?;
        loop {
            let notification = tokio::time::timeout(PATIENCE, listener.notifications.recv()).await?;
            let payload = notification.map(|notification| notification.payload().to_owned()).unwrap_or_default();
            ensure!(!payload.contains("pg_temp"), "{payload}");
            if payload.contains(told) {
                break;
            }
        }
    }
    server.finish().await
}

#[tokio::test]
async fn a_change_of_the_schema_can_be_prepared_where_transactions_can() -> Result<()> {
    let server = Server::builder("sikorsky").config("max_prepared_transactions", "5").start().await?;
    server.execute("postgres", "create extension stillebot").await?;
    let session = server.superuser("postgres").await?;
    session.batch_execute("begin; create table public.t (i int); prepare transaction 'x'").await?;
    session.batch_execute("commit prepared 'x'").await?;
    server.finish().await
}
