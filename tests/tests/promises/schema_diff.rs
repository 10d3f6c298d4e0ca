//! What is not alike on all nodes is named, in words and as statements, and seen in `status` and by `watch`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillebot_tests::Cluster;
use stillebot_tests::cluster::DATABASE;

use crate::runs::agent;
use crate::watch::Watch;

/// The differences that `schema diff` tells, as `kind relation name`.
async fn differences(cluster: &Cluster) -> Result<Vec<String>> {
    let run = agent(cluster, &["schema", "diff"]).await?;
    let found = run.json["differences"].as_array().with_context(|| format!("{run:?}"))?;
    ensure!(run.code == Some(if found.is_empty() { 0 } else { 1 }), "{run:?}");
    ensure!(run.json["alike"] == found.is_empty());
    Ok(found.iter().filter_map(|difference| difference["object"].as_str().map(str::to_owned)).collect())
}

#[tokio::test]
async fn nodes_that_were_set_up_alike_are_said_to_be() -> Result<()> {
    let cluster = Cluster::builder().nodes(3).start().await?;
    let output = cluster.agent(&["schema", "diff"]).await?.expect_code(0)?;
    ensure!(output.stdout == "the schemas of sikorsky, gideon, rodan are alike\n", "{output:?}");
    ensure!(differences(&cluster).await?.is_empty());
    let status = cluster.agent(&["status", "--json"]).await?.json()?;
    let fingerprints: Vec<&Value> = status["nodes"].as_array().context("nodes")?.iter().map(|n| &n["schema"]).collect();
    ensure!(fingerprints[0].as_str().is_some_and(|text| text.len() == 64), "{status}");
    ensure!(fingerprints.iter().all(|fingerprint| *fingerprint == fingerprints[0]), "{status}");
    ensure!(status["schemas_alike"] == true, "{status}");
    cluster.finish().await
}

#[tokio::test]
async fn each_kind_of_object_that_differs_is_named_and_nothing_else() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gideon = cluster.node("gideon");
    // What differs, and how it is undone.
    for (change, back, named) in [
        ("create schema more", "drop schema more", "schema more"),
        ("create table stillebot.t (i int primary key)", "drop table stillebot.t", "table stillebot.t"),
        (
            "alter table stillebot.raids add column note text",
            "alter table stillebot.raids drop column note",
            "column stillebot.raids.note",
        ),
        (
            "alter table stillebot.config alter column keyword type text",
            "alter table stillebot.config alter column keyword type varchar",
            "column stillebot.config.keyword",
        ),
        (
            "alter table stillebot.raids alter column data set default '{}'",
            "alter table stillebot.raids alter column data set default '[]'",
            "column stillebot.raids.data",
        ),
        (
            "alter table stillebot.raids add constraint few check (toid > 0)",
            "alter table stillebot.raids drop constraint few",
            "constraint few on stillebot.raids",
        ),
        (
            "create index by_toid on stillebot.raids (toid)",
            "drop index stillebot.by_toid",
            "index by_toid on stillebot.raids",
        ),
        (
            "alter table stillebot.raids replica identity full",
            "alter table stillebot.raids replica identity default",
            "replica identity of stillebot.raids",
        ),
        (
            "create function stillebot.f(i int) returns int language sql return i",
            "drop function stillebot.f",
            "function stillebot.f(i integer)",
        ),
        ("create sequence stillebot.s", "drop sequence stillebot.s", "sequence stillebot.s"),
        ("create type stillebot.e as enum ('a', 'b')", "drop type stillebot.e", "type stillebot.e"),
        ("create domain stillebot.d as int check (value > 0)", "drop domain stillebot.d", "type stillebot.d"),
        ("create view stillebot.v as select 1 as i", "drop view stillebot.v", "view stillebot.v"),
        ("create publication other for table stillebot.raids", "drop publication other", "publication other"),
    ] {
        gideon.execute(DATABASE, change).await?;
        let found = differences(&cluster).await?;
        ensure!(found == [named], "{change}: {found:?}");
        gideon.execute(DATABASE, back).await?;
    }
    // A trigger's state is part of it: one that is not ENABLE ALWAYS is silent about what replication brings.
    let trigger: String = gideon
        .value(DATABASE, "select tgname::text from pg_trigger where tgrelid = 'stillebot.config'::regclass limit 1")
        .await?;
    gideon.execute(DATABASE, &format!("alter table stillebot.config enable trigger {trigger}")).await?;
    let found = differences(&cluster).await?;
    ensure!(found == [format!("trigger {trigger} on stillebot.config")], "{found:?}");
    gideon.execute(DATABASE, &format!("alter table stillebot.config enable always trigger {trigger}")).await?;

    // What is apart on purpose: where sequences are, temporary tables, the order of columns, and what sees it from where.
    for node in cluster.nodes() {
        node.execute(DATABASE, "create sequence stillebot.s; alter database stillebot set search_path = stillebot")
            .await?;
    }
    gideon.execute(DATABASE, "alter sequence stillebot.s increment by 16 restart with 7").await?;
    gideon.execute(DATABASE, "alter database stillebot set search_path = public").await?;
    let first = "create table stillebot.o (a int primary key, b text)";
    cluster.node("sikorsky").execute(DATABASE, first).await?;
    gideon.execute(DATABASE, "create table stillebot.o (b text, a int primary key)").await?;
    let session = gideon.superuser(DATABASE).await?;
    session.batch_execute("create temporary table passing (i int)").await?;
    let found = differences(&cluster).await?;
    ensure!(found.is_empty(), "{found:?}");
    cluster.finish().await
}

#[tokio::test]
async fn the_statements_that_are_shown_make_the_schemas_alike() -> Result<()> {
    let cluster = Cluster::start().await?;
    let sikorsky = cluster.node("sikorsky");
    sikorsky
        .execute(
            DATABASE,
            r#"create schema "More";
               create type "More".mood as enum ('it''s', 'b');
               create sequence "More".numbers;
               create table "More"."T" (
                   id bigint primary key default nextval('"More".numbers'),
                   mood "More".mood not null default 'b',
                   twice bigint generated always as (id * 2) stored,
                   n int generated by default as identity,
                   twitchid bigint references stillebot.botservice,
                   unique (twitchid, mood));
               create index on "More"."T" (mood) where n > 0;
               alter table "More"."T" replica identity full;
               create function "More".told() returns trigger language plpgsql as $$ begin return new; end $$;
               create trigger told before insert on "More"."T" for each row execute function "More".told();
               alter table "More"."T" enable always trigger told;
               create view "More".v as select id from "More"."T";
               alter table stillebot.raids add column note text collate "C" default 'x' not null"#,
        )
        .await?;
    let output = cluster.agent(&["schema", "diff", "--ddl"]).await?.expect_code(1)?;
    ensure!(output.stdout.contains("-- on gideon:") && !output.stdout.contains("-- on sikorsky"), "{output:?}");
    // What is not a statement is a comment.
    cluster.node("gideon").execute(DATABASE, &output.stdout).await.with_context(|| output.stdout.clone())?;
    let output = cluster.agent(&["schema", "diff"]).await?;
    ensure!(output.code == Some(0), "{output:?}");
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_cannot_be_asked_is_neither_alike_nor_different() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.agent_link("gideon").cut().await?;
    let run = agent(&cluster, &["schema", "diff"]).await?.expect_code(69)?;
    ensure!(run.says("gideon"), "{run:?}");
    cluster.finish().await
}

#[tokio::test]
async fn a_difference_that_lasts_is_an_alarm_and_its_end_is_said() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.configure_agent("\n[watch]\nchannel = \"scream.emergency\"\ninterval = \"200ms\"\n")?;
    let watch = Watch::start(&cluster).await?;
    cluster.node("gideon").execute(DATABASE, "create index by_toid on stillebot.raids (toid)").await?;
    for node in ["sikorsky", "gideon"] {
        let words = ["gideon with another schema since", "it is not that of sikorsky, see schema diff"];
        watch.hear(node, &words).await?;
    }
    let once = agent(&cluster, &["watch", "--once"]).await?.expect_code(1)?;
    ensure!(once.json["conditions"][0]["condition"] == "drift", "{once:?}");
    let status = cluster.agent(&["status"]).await?;
    ensure!(status.stdout.contains("the schemas differ, see schema diff: gideon"), "{status:?}");
    cluster.node("sikorsky").execute(DATABASE, "create index by_toid on stillebot.raids (toid)").await?;
    watch.hear("gideon", &["gideon is well again: was with another schema for"]).await?;
    watch.end().await?;
    cluster.finish().await
}
