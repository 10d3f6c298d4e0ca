//! What is done to the schema by hand is noticed, and a table that exists on both ends replicates without a hand.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Server, wait_until};

use crate::PATIENCE;
use crate::runs::agent;
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
async fn a_table_made_by_hand_under_writes_has_all_rows_on_both_nodes_in_the_end() -> Result<()> {
    let (cluster, watch) = watched().await?;
    // Rows of a table that is not there stop apply until it is.
    cluster.expect_log("logical replication target relation \"stillebot.songs\" does not exist");
    cluster.expect_log("exited with exit code 1");
    let sikorsky = cluster.node("sikorsky").superuser(DATABASE).await?;
    sikorsky.batch_execute(&format!("{TABLE}; insert into stillebot.songs values (1, 'early')")).await?;
    let writing = async {
        let mut id = 1;
        // On, until it replicates and some more.
        while watch.printed().iter().filter(|line| line.contains("new tables replicate to")).count() < 2 || id < 200 {
            id += 1;
            sikorsky.batch_execute(&format!("insert into stillebot.songs values ({id}, 'meanwhile')")).await?;
            ensure!(id < 100_000, "{:?}", watch.printed());
        }
        Ok(id)
    };
    let making = async { cluster.node("gideon").execute(DATABASE, TABLE).await };
    let (written, made) = tokio::join!(writing, making);
    made?;
    let written: i64 = written?;
    wait_until("all rows", PATIENCE, || async { Ok((count(&cluster, "gideon").await? == written).then_some(())) })
        .await?;
    cluster.node("gideon").execute(DATABASE, "insert into stillebot.songs values (0, 'back')").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    ensure!(!watch.printed().iter().any(|line| line.contains("populate")), "{:?}", watch.printed());
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn rows_of_both_nodes_from_before_a_table_replicated_are_told_with_advice_that_helps() -> Result<()> {
    let (cluster, watch) = watched().await?;
    // Rows of a table that is not there stop apply until it is, and then are left out.
    cluster.expect_log("logical replication target relation \"stillebot.songs\" does not exist");
    cluster.expect_log("exited with exit code 1");
    cluster.expect_log("terminating logical replication worker due to administrator command");
    cluster.expect_log("is already active for PID");
    // Refused to the watch: gideon has rows.
    cluster.expect_log(" 55000 client backend");
    // In one transaction, so that no watch comes between.
    let with = |id: i32| format!("begin; {TABLE}; insert into stillebot.songs values ({id}, 'early'); commit");
    cluster.node("sikorsky").execute(DATABASE, &with(1)).await?;
    cluster.node("gideon").execute(DATABASE, &with(2)).await?;
    for node in ["sikorsky", "gideon"] {
        watch.hear(node, &["table stillebot.songs had rows on gideon and sikorsky", "--replace"]).await?;
    }
    let arguments = ["schema", "populate", "stillebot.songs", "--from", "sikorsky", "--replace"];
    let refused = agent(&cluster, &arguments).await?.expect_code(1)?;
    ensure!(refused.says("gideon takes writes") && count(&cluster, "gideon").await? == 1, "{refused:?}");
    agent(&cluster, &["down", "gideon"]).await?.expect_code(0)?;
    agent(&cluster, &arguments).await?.expect_code(0)?;
    agent(&cluster, &["up", "gideon"]).await?;
    cluster.node("sikorsky").execute(DATABASE, "insert into stillebot.songs values (3, 'late')").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    ensure!(count(&cluster, "gideon").await? == 2);
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
async fn what_stops_apply_because_tables_differ_says_what_mends_it_and_that_does() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 55000 logical replication");
    cluster.expect_log(" 22P02 logical replication");
    cluster.expect_log("exited with exit code 1");
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for node in cluster.nodes() {
        node.execute(DATABASE, "create type stillebot.mood as enum ('good', 'bad')").await?;
    }
    // On sikorsky, on gideon, and what gideon's row says.
    for (change, here, remedy) in [
        (
            "alter table stillebot.raids add column note varchar(20), add column mood stillebot.mood;
             insert into stillebot.raids (fromid, toid, note) values (1, 2, 'x')",
            "select",
            "alter table stillebot.raids add column note character varying(20);\n\
             alter table stillebot.raids add column mood stillebot.mood;",
        ),
        (
            "create table stillebot.\"My songs\" (id bigint, part smallint, moods stillebot.mood[], price numeric(10,2), primary key (id, part));
             insert into stillebot.\"My songs\" values (1, 1, '{good}', 0.5)",
            "select",
            "create table stillebot.\"My songs\" (id bigint, part smallint, moods stillebot.mood[], price numeric(10,2), primary key (id, part));\n\
             -- defaults and constraints are not known here; stillebot-agent schema diff --ddl has them",
        ),
        (
            "alter table stillebot.raids add column count text; insert into stillebot.raids (fromid, toid, count) values (2, 3, 'many')",
            "alter table stillebot.raids add column count integer",
            "alter table stillebot.raids alter column count type text using count::text; -- integer here, text on the other node",
        ),
        (
            "alter table stillebot.raids add column twice bigint; insert into stillebot.raids (fromid, toid, twice) values (3, 4, 8)",
            "alter table stillebot.raids add column twice bigint generated always as (toid * 2) stored",
            "alter table stillebot.raids alter column twice drop expression; -- generated here only",
        ),
    ] {
        gideon.execute(DATABASE, here).await?;
        sikorsky.execute(DATABASE, change).await?;
        let row = open(gideon).await?;
        ensure!(row["conflict_type"] == "apply_error" && row["remedy"] == remedy, "{change}: {row:#}");
        ensure!(row["schemaname"] == "stillebot" && row["blocking"] == true, "{row:#}");
        gideon.execute(DATABASE, row["remedy"].as_str().unwrap_or_default()).await?;
        cluster.wait_applied("sikorsky", "gideon").await?;
        wait_until("the conflict to be over", PATIENCE, || async {
            let open: i64 = gideon.value(DATABASE, "select open_conflicts from stillebot_status()").await?;
            Ok((open == 0).then_some(()))
        })
        .await?;
    }
    cluster.finish().await
}

/// The open row of the log.
async fn open(node: &Server) -> Result<Value> {
    let query = "select max(to_jsonb(c)::text) from multihome.conflicts c where status = 'open'";
    let row = wait_until("a row of the log", PATIENCE, || node.value::<Option<String>>(DATABASE, query)).await?;
    Ok(serde_json::from_str(&row)?)
}

#[tokio::test]
async fn the_remedy_does_not_depend_on_the_language_of_messages() -> Result<()> {
    let server = Server::builder("sikorsky").start().await?;
    server.execute("postgres", "create extension stillebot; create table public.t (id int primary key)").await?;
    // As the collector tells it, in words that a server with translations has.
    let column = |name: &str, key: bool| json!({"name": name, "key": key, "type": 23, "typmod": -1});
    let event = |table: &str, number: Option<i32>| {
        let mut event = json!({"kind": "error", "sqlstate": "55000", "subscription": 1, "at": "2026-01-01T00:00:00Z", "complete": false,
            "message": format!("in Zielrelation für logische Replikation »public.{table}« fehlen replizierte Spalten: »n«"),
            "remote_commit_lsn": "0/1", "transaction_kind": if number.is_some() { "plain" } else { "streamed" },
            "changes": [{"change_number": 1, "operation": "insert", "schemaname": "public", "relname": table}],
            "relations": [{"schemaname": "public", "relname": table, "identity": "d", "columns": [column("id", true), column("n", false)]}]});
        if let Some(number) = number {
            event["change_number"] = number.into();
        }
        event
    };
    let unknown = json!([{"name": "m", "key": false, "type": 16500, "typmod": -1}]);
    let mut unsent = event("other", Some(1));
    unsent["relations"][0]["columns"] = unknown;
    let create = "create table public.absent (id integer, n integer, primary key (id));";
    for (event, remedy) in [
        (event("t", Some(1)), "alter table public.t add column n integer;"),
        (event("t", None), "alter table public.t add column n integer;"),
        (event("absent", Some(1)), create),
        (
            unsent,
            "-- public.other: the types of m are not known here; stillebot-agent schema diff --ddl has the statements",
        ),
    ] {
        let id: i64 = server.value("postgres", &format!("select multihome.record('{event}')")).await?;
        let query = format!("select concat_ws(' ', relname, remedy) from multihome.conflicts where id = {id}");
        let told: String = server.value("postgres", &query).await?;
        let table = event["relations"][0]["relname"].as_str().unwrap_or_default();
        ensure!(told.starts_with(&format!("{table} {remedy}")), "{told}");
    }
    server.finish().await
}

#[tokio::test]
async fn what_stops_apply_for_lack_of_a_column_is_shown_with_its_default() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log("is missing replicated column");
    cluster.expect_log("exited with exit code 1");
    let column = "alter table stillebot.raids add column note text default ''::text not null;";
    cluster.node("sikorsky").execute(DATABASE, column).await?;
    let row = "insert into stillebot.raids (fromid, toid, note) values (1, 2, 'x')";
    cluster.node("sikorsky").execute(DATABASE, row).await?;
    let gideon = cluster.node("gideon");
    let row = open(gideon).await?;
    let name = format!("gideon/{}", row["id"]);
    let shown = cluster.agent(&["conflicts", "show", &name, "--json"]).await?.expect_code(0)?.json()?;
    ensure!(shown["ddl"][0] == column && shown["conflict"]["remedy"] == row["remedy"], "{shown}");
    gideon.execute(DATABASE, column).await?;
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
async fn a_change_of_the_schema_is_told_when_it_is_committed_also_where_transactions_can_be_prepared() -> Result<()> {
    let cluster = Cluster::start().await?;
    let sikorsky = cluster.node("sikorsky");
    let mut listener = sikorsky.listen("rosuav", DATABASE).await?;
    listener.client.batch_execute("listen stillebot_schema").await?;
    let table = |name: &str| format!("create table stillebot.{name} (i int primary key)");
    // As the bot, which may do nothing in schema multihome. What was rolled back is not told before what comes after it.
    for (statements, told) in [
        (
            vec![format!("begin; {}; rollback; {}", table("undone"), table("a"))],
            "CREATE TABLE stillebot.a, stillebot.a_pkey",
        ),
        (
            vec![format!(
                "begin; {}; savepoint s; {}; rollback to s; {}; commit",
                table("b"),
                table("undone"),
                table("c")
            )],
            "CREATE TABLE stillebot.b, stillebot.b_pkey; CREATE TABLE stillebot.c, stillebot.c_pkey",
        ),
        (
            vec![format!("begin; {}; prepare transaction 'x'", table("d")), "commit prepared 'x'".into()],
            "COMMIT PREPARED",
        ),
        (vec!["drop table stillebot.a".to_owned()], "DROP TABLE stillebot.a"),
    ] {
        let bot = sikorsky.connect("rosuav", DATABASE).await?;
        for statement in &statements {
            bot.batch_execute(statement).await?;
        }
        let notification = tokio::time::timeout(PATIENCE, listener.notifications.recv()).await?;
        let payload = notification.map(|notification| notification.payload().to_owned()).unwrap_or_default();
        ensure!(payload == told, "{payload}, not {told}");
    }
    cluster.finish().await
}

#[tokio::test]
async fn the_watch_acts_on_a_change_of_the_schema_at_once() -> Result<()> {
    let cluster = Cluster::start().await?;
    // By itself it would look again long after the test has lost its patience.
    cluster.configure_agent("\n[watch]\ninterval = \"5m\"\nstall = \"5m\"\n")?;
    let watch = Watch::start(&cluster).await?;
    for node in cluster.nodes() {
        node.execute(DATABASE, TABLE).await?;
    }
    for node in ["sikorsky", "gideon"] {
        wait_printed(&watch, &format!("new tables replicate to {node}: stillebot.songs")).await?;
    }
    watch.end().await?;
    cluster.finish().await
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
