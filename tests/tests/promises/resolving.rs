//! The agent shows the conflicts of all nodes, and one command ends a quarrel: replication goes on, all nodes have the same.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Server, wait_until};
use tokio::join;

use crate::PATIENCE;
use crate::conflicts::{Conflict, apart, call, conflicts, expect_errors, id, settled, wait_conflict, wait_open};
use crate::runs::{Run, Started, agent};

/// A node's conflict as the command line wants it.
fn name(node: &Server, row: &Conflict) -> String {
    format!("{}/{}", node.name(), id(row))
}

/// Both nodes' first open conflict of these types.
async fn both(cluster: &Cluster, sikorsky: &str, gideon: &str) -> Result<(Conflict, Conflict)> {
    let (sikorsky, gideon) =
        join!(wait_open(cluster.node("sikorsky"), sikorsky), wait_open(cluster.node("gideon"), gideon),);
    Ok((sikorsky?, gideon?))
}

/// Resolves a conflict with the agent, all the way, and prints how long it took until replication was past every conflict.
async fn resolve(cluster: &Cluster, name: &str, keep: &str) -> Result<Run> {
    let began = Instant::now();
    let past = "select coalesce(bool_and(multihome.is_past(subscription_oid, remote_commit_lsn)), true)
                  from multihome.log where node = multihome.node_id() and remote_commit_lsn is not null";
    let streaming = async {
        for node in cluster.nodes() {
            wait_until(&format!("replication to go on into {}", node.name()), PATIENCE, || async {
                Ok(node.value::<bool>(DATABASE, past).await?.then_some(()))
            })
            .await?;
        }
        anyhow::Ok(began.elapsed())
    };
    let run =
        async { anyhow::Ok((agent(cluster, &["conflicts", "resolve", name, "--keep", keep]).await?, began.elapsed())) };
    let (streaming, run) = join!(streaming, run);
    let (run, took) = run?;
    let run = run.expect_code(0)?;
    println!("{name} --keep {keep}: streaming after {:?}, the agent's end after {took:?}", streaming?);
    ensure!(run.json["outcome"] == "done" && run.json["keep"] == keep, "{run:#?}");
    ensure!(run.json["not_compared"] == json!([]) && run.json["not_streaming"] == json!([]), "{run:#?}");
    Ok(run)
}

/// Nothing is open, all nodes are the same, and the log says who won.
async fn ended(cluster: &Cluster, run: &Run) -> Result<()> {
    settled(cluster).await?;
    for conflict in run.json["conflicts"].as_array().context("no conflicts")? {
        let (node, number) = conflict.as_str().and_then(|name| name.split_once('/')).context("no name")?;
        let number: i64 = number.parse()?;
        let row = wait_conflict(cluster.node(node), "the conflict", |row| id(row) == number).await?;
        let resolution = row["resolution"].as_str().unwrap_or_default();
        ensure!(row["status"] == "resolved" && resolution.starts_with("winner "), "{row:#}");
        ensure!(row["resolved_by"].as_str().is_some_and(|by| by.starts_with("stillebot-agent ")), "{row:#}");
    }
    Ok(())
}

/// The value of one row's column on a node, which settled nodes have in common; nothing if there is no such row.
async fn one(cluster: &Cluster, query: &str) -> Result<Option<String>> {
    let client = cluster.node("gideon").superuser(DATABASE).await?;
    Ok(client.query_opt(query, &[]).await?.and_then(|row| row.get(0)))
}

fn config(key: i64, by: &str) -> String {
    format!("insert into stillebot.config values ({key}, 'k', '{{\"by\": \"{by}\"}}');")
}

async fn config_of(cluster: &Cluster, key: i64) -> Result<Option<String>> {
    one(cluster, &format!("select data->>'by' from stillebot.config where twitchid = {key}")).await
}

fn raid(from: i64, to: i64) -> String {
    format!("insert into stillebot.raids values ({from}, {to});")
}

async fn raids(cluster: &Cluster) -> Result<i64> {
    cluster.node("gideon").value(DATABASE, "select count(*) from stillebot.raids").await
}

// ---- what there is to see ----

#[tokio::test]
async fn conflicts_are_listed_and_shown_with_both_versions_and_what_can_be_done() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let text = async |arguments: &[&str]| anyhow::Ok(cluster.agent(arguments).await?.expect_code(0)?.stdout);
    ensure!(text(&["conflicts", "list"]).await? == "no open conflicts\n");
    ensure!(text(&["conflicts", "list", "--all"]).await? == "no conflicts\n");
    let listed = agent(&cluster, &["conflicts", "list"]).await?.expect_code(0)?.json;
    ensure!(listed["conflicts"] == json!([]) && listed["errors"] == json!([]), "{listed:#}");

    let transaction = |by: &str, to| format!("begin; {} {} commit", raid(1, to), config(7, by));
    apart(&cluster, &transaction("sikorsky", 1), &transaction("gideon", 2)).await?;
    let (here, there) = both(&cluster, "insert_exists", "insert_exists").await?;
    let (here, there) = (name(sikorsky, &here), name(gideon, &there));
    let listed = text(&["conflicts", "list"]).await?;
    for part in [here.as_str(), &there, "insert_exists", "stillebot.config", "open", "multihome", "config_pkey"] {
        ensure!(listed.contains(part), "{part}:\n{listed}");
    }
    let listed = agent(&cluster, &["conflicts", "list", "--node", "gideon"]).await?.expect_code(0)?.json;
    let rows = listed["conflicts"].as_array().context("no conflicts")?;
    ensure!(rows.len() == 1 && rows[0]["node"] == "gideon" && rows[0]["peer"] == "sikorsky", "{listed:#}");
    ensure!(rows[0]["blocking"] == true && rows[0]["status"] == "open", "{listed:#}");
    ensure!(!text(&["conflicts", "list", "--node", "gideon"]).await?.contains(&here));

    let shown = text(&["conflicts", "show", &there]).await?;
    for part in [
        "gideon/1: insert_exists in stillebot.config",
        "open; subscription multihome waits for it",
        "(23505)",
        r#"{"keyword":"k","twitchid":7}"#,
        "incoming, of sikorsky",
        "on gideon",
        "→ marks the change that failed",
        "what can be done:",
        "gideon keeps its row, and sikorsky gets it",
        "conflicts resolve gideon/1 --keep remote",
        "conflicts skip gideon/1",
    ] {
        ensure!(shown.contains(part), "{part}:\n{shown}");
    }
    let line = |column: &str| {
        let mut table = shown.lines().skip_while(|line| !line.contains("incoming, of"));
        table.find(|line| line.contains(&format!(" {column} "))).unwrap_or_default()
    };
    ensure!(
        line("data").contains('≠') && line("data").contains("sikorsky") && line("data").contains("gideon"),
        "{shown}"
    );
    ensure!(!line("keyword").contains('≠') && !line("twitchid").contains('≠'), "{shown}");
    let shown = agent(&cluster, &["conflicts", "show", &there]).await?.expect_code(0)?.json;
    ensure!(shown["conflict"]["remote_tuple"]["data"]["by"] == "sikorsky", "{shown:#}");
    ensure!(shown["conflict"]["local_conflicts"][0]["from"] == "gideon", "{shown:#}");
    let changes = shown["changes"].as_array().context("no changes")?;
    ensure!(changes.len() == 2 && changes[0]["failed"] == false && changes[1]["failed"] == true, "{shown:#}");
    ensure!(shown["ways"].as_array().is_some_and(|ways| ways.len() == 4), "{shown:#}");

    // Both nodes have a number 1: which is meant has to be said. A number that only one node has open is enough.
    let run = agent(&cluster, &["conflicts", "show", "1"]).await?.expect_code(2)?;
    ensure!(run.says("say which: gideon/1 or sikorsky/1") || run.says("say which: sikorsky/1 or gideon/1"), "{run:#?}");
    resolve(&cluster, &here, "local").await?;
    apart(&cluster, &config(8, "sikorsky"), "").await?;
    cluster.wait_replicated().await?;
    gideon.execute(DATABASE, "select nextval('multihome.log_id')").await?;
    apart(&cluster, &config(9, "sikorsky"), &config(9, "gideon")).await?;
    let (_, there) = both(&cluster, "insert_exists", "insert_exists").await?;
    let shown = agent(&cluster, &["conflicts", "show", &id(&there).to_string()]).await?.expect_code(0)?.json;
    ensure!(shown["conflict"]["node"] == "gideon", "{shown:#}");
    let run = agent(&cluster, &["conflicts", "resolve", &id(&there).to_string(), "--keep", "remote"]).await?;
    ended(&cluster, &run.expect_code(0)?).await?;

    ensure!(text(&["conflicts", "list"]).await? == "no open conflicts\n");
    let all = agent(&cluster, &["conflicts", "list", "--all"]).await?.expect_code(0)?.json;
    let rows = all["conflicts"].as_array().context("no conflicts")?;
    ensure!(rows.len() == 4 && rows.iter().all(|row| row["status"] == "resolved"), "{all:#}");
    let shown = text(&["conflicts", "show", "gideon/1"]).await?;
    ensure!(shown.contains("winner ") && !shown.contains("what can be done"), "{shown}");
    cluster.finish().await
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_with_a_reason_and_changes_nothing() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    cluster.expect_log(" 23514 logical replication");
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for arguments in [
        &["conflicts"][..],
        &["conflicts", "show"],
        &["conflicts", "show", "gideon/x"],
        &["conflicts", "show", "gideon/5"],
        &["conflicts", "show", "5"],
        &["conflicts", "show", "nowhere/5"],
        &["conflicts", "list", "--node", "nowhere"],
        &["conflicts", "resolve", "gideon/5"],
        &["conflicts", "resolve", "gideon/5", "--keep", "both"],
        &["conflicts", "resolve", "gideon/5", "--keep", "local"],
        &["conflicts", "skip", "gideon/5"],
    ] {
        let code = cluster.agent(arguments).await?.code;
        ensure!(matches!(code, Some(2 | 78)), "{arguments:?}: {code:?}");
    }
    let run = agent(&cluster, &["conflicts", "show", "gideon/5"]).await?.expect_code(2)?;
    ensure!(run.says("there is no conflict 5 on gideon") && run.says("conflicts list --all"), "{run:#?}");

    // The agent's role is nobody special.
    let special = "select rolsuper or rolreplication or rolcreaterole or rolbypassrls from pg_roles where rolname = 'stillebot_agent'";
    ensure!(!gideon.value::<bool>(DATABASE, special).await?);

    // What is about no two versions.
    gideon.execute(DATABASE, "alter table stillebot.raids add constraint small check (fromid < 100)").await?;
    sikorsky.execute(DATABASE, &raid(100, 1)).await?;
    let row = wait_open(gideon, "apply_error").await?;
    let error = name(gideon, &row);
    for keep in ["local", "remote", "newest"] {
        let run = agent(&cluster, &["conflicts", "resolve", &error, "--keep", keep]).await?.expect_code(1)?;
        ensure!(run.says("mend its cause, or skip") && run.says("nothing was changed"), "{run:#?}");
    }
    let shown = cluster.agent(&["conflicts", "show", &error]).await?.expect_code(0)?.stdout;
    ensure!(shown.contains("mend the cause") && !shown.contains("--keep"), "{shown}");
    gideon.execute(DATABASE, "alter table stillebot.raids drop constraint small").await?;
    settled(&cluster).await?;
    let run = agent(&cluster, &["conflicts", "resolve", &error, "--keep", "local"]).await?.expect_code(1)?;
    ensure!(run.says("is resolved already"), "{run:#?}");
    let run = agent(&cluster, &["conflicts", "skip", &error]).await?.expect_code(1)?;
    ensure!(run.says("is resolved already"), "{run:#?}");

    // The other node is not there.
    apart(&cluster, &config(1, "sikorsky"), &config(1, "gideon")).await?;
    let (here, there) = both(&cluster, "insert_exists", "insert_exists").await?;
    cluster.agent_link("gideon").cut().await?;
    let run = agent(&cluster, &["conflicts", "resolve", &name(sikorsky, &here), "--keep", "local"]).await?;
    let run = run.expect_code(69)?;
    ensure!(run.says("cannot reach gideon") && run.says("nothing was changed"), "{run:#?}");
    let listed = agent(&cluster, &["conflicts", "list"]).await?.expect_code(69)?.json;
    ensure!(listed["conflicts"].as_array().is_some_and(|rows| rows.len() == 1), "{listed:#}");
    ensure!(listed["errors"][0]["node"] == "gideon", "{listed:#}");
    cluster.agent_link("gideon").heal().await?;

    // What would be done is told, and not done.
    let run =
        agent(&cluster, &["conflicts", "resolve", &name(sikorsky, &here), "--keep", "remote", "--dry-run"]).await?;
    let run = run.expect_code(0)?;
    ensure!(run.json["outcome"] == "dry_run" && run.json["winner"]["origin"] == "gideon", "{run:#?}");
    let steps = run.json["steps"].as_array().context("no steps")?;
    for (node, keep) in [("sikorsky", "remote"), ("gideon", "local")] {
        ensure!(steps.iter().any(|step| step["node"] == node && step["keep"] == keep), "{run:#?}");
    }
    agent(&cluster, &["conflicts", "skip", &name(sikorsky, &here), "--dry-run"]).await?.expect_code(0)?;
    for (node, row) in [(sikorsky, &here), (gideon, &there)] {
        let now = wait_open(node, "insert_exists").await?;
        ensure!(now["id"] == row["id"] && now["blocking"] == true && now["resolution"].is_null(), "{now:#}");
        let by: String = node.value(DATABASE, "select data->>'by' from stillebot.config").await?;
        ensure!(by == node.name(), "{by}");
    }
    let run = resolve(&cluster, &name(sikorsky, &here), "remote").await?;
    ended(&cluster, &run).await?;
    ensure!(config_of(&cluster, 1).await?.as_deref() == Some("gideon"));
    cluster.finish().await
}

// ---- two versions of a row ----

#[tokio::test]
async fn of_two_inserts_of_one_key_the_kept_one_is_on_both_nodes_with_the_rest_of_both_transactions() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for (key, keep, on, winner) in [
        (1, "local", sikorsky, "sikorsky"),
        (2, "remote", sikorsky, "gideon"),
        (3, "local", gideon, "gideon"),
        (4, "remote", gideon, "sikorsky"),
        (5, "newest", sikorsky, "gideon"),
    ] {
        let insert =
            |by: &str, to| format!("begin; {} {} {} commit", raid(key, to), config(key, by), raid(key, to + 1));
        apart(&cluster, &insert("sikorsky", 10), &insert("gideon", 20)).await?;
        both(&cluster, "insert_exists", "insert_exists").await?;
        let row = wait_open(on, "insert_exists").await?;
        let run = resolve(&cluster, &name(on, &row), keep).await?;
        ended(&cluster, &run).await?;
        ensure!(run.json["winner"]["origin"] == winner && run.json["row"]["data"]["by"] == winner, "{run:#?}");
        ensure!(config_of(&cluster, key).await?.as_deref() == Some(winner), "{keep}");
        ensure!(raids(&cluster).await? == 4 * key);
    }
    cluster.finish().await
}

#[tokio::test]
async fn what_was_written_to_the_rows_behind_the_conflict_leaves_both_nodes_the_same() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let sikorsky = cluster.node("sikorsky");
    for (key, keep) in [(1, "local"), (2, "remote"), (3, "newest")] {
        let queued = |by: &str, to| {
            format!(
                "begin; {} {} commit;
                 update stillebot.config set data = '{{\"by\": \"{by}, later\"}}' where twitchid = {key};
                 {}
                 update stillebot.config set data = '{{\"by\": \"{by}, last\"}}' where twitchid = {key};",
                config(key, by),
                raid(key, to),
                raid(key, to + 1),
            )
        };
        // Each statement a transaction of its own.
        let links = [cluster.link("sikorsky", "gideon"), cluster.link("gideon", "sikorsky")];
        for link in links {
            link.cut().await?;
        }
        for (node, to) in [("sikorsky", 10), ("gideon", 20)] {
            cluster.node(node).psql(DATABASE, &queued(node, to))?;
        }
        for link in links {
            link.heal().await?;
        }
        both(&cluster, "insert_exists", "insert_exists").await?;
        let row = wait_open(sikorsky, "insert_exists").await?;
        let run = resolve(&cluster, &name(sikorsky, &row), keep).await?;
        ended(&cluster, &run).await?;
        let kept = config_of(&cluster, key).await?.unwrap_or_default();
        ensure!(kept.ends_with(", last"), "{keep}: {kept}");
        ensure!(run.json["row"]["data"]["by"] == kept, "{kept}: {run:#?}");
        ensure!(raids(&cluster).await? == 4 * key);
    }
    cluster.finish().await
}

#[tokio::test]
async fn rows_of_different_keys_that_a_second_unique_index_keeps_apart_are_resolved() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for node in cluster.nodes() {
        node.execute(DATABASE, "create unique index login on stillebot.botservice (login)").await?;
    }
    for (key, keep, kept) in [(10, "local", 11), (20, "remote", 22), (30, "newest", 32)] {
        let insert = |own: i64| {
            format!(
                "begin; insert into stillebot.botservice values ({}, null, 'login {key}', 'name'); {} commit;",
                key + own,
                raid(key, own)
            )
        };
        apart(&cluster, &insert(1), &insert(2)).await?;
        let (here, there) = both(&cluster, "insert_exists", "insert_exists").await?;
        ensure!(here["constraint_name"] == "login", "{here:#}");
        let (node, row) = if keep == "newest" { (gideon, &there) } else { (sikorsky, &here) };
        let run = resolve(&cluster, &name(node, row), keep).await?;
        ended(&cluster, &run).await?;
        let left =
            format!("select string_agg(twitchid::text, ',') from stillebot.botservice where login = 'login {key}'");
        ensure!(one(&cluster, &left).await? == Some(kept.to_string()), "{keep}");
        ensure!(raids(&cluster).await? == key / 10 * 2);
    }
    cluster.finish().await
}

/// Saves a command as the bot does.
fn save(name: &str, content: &str) -> String {
    format!(
        "begin;
         update stillebot.commands set active = false where twitchid = 1 and cmdname = '{name}' and active;
         insert into stillebot.commands (twitchid, cmdname, active, content) values (1, '{name}', true, '\"{content}\"');
         commit;"
    )
}

#[tokio::test]
async fn of_two_active_commands_the_kept_one_stays() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for (name_, keep, kept) in [("a", "local", "sikorsky"), ("b", "remote", "gideon"), ("c", "newest", "gideon")] {
        // One that was active before, which both deactivate.
        sikorsky.execute(DATABASE, &save(name_, "first")).await?;
        cluster.wait_replicated().await?;
        apart(&cluster, &save(name_, "sikorsky"), &save(name_, "gideon")).await?;
        let (here, _) = both(&cluster, "insert_exists", "insert_exists").await?;
        ensure!(here["constraint_name"] == "commands_active", "{here:#}");
        let run = resolve(&cluster, &name(sikorsky, &here), keep).await?;
        ended(&cluster, &run).await?;
        let active = format!("select content #>> '{{}}' from stillebot.commands where active and cmdname = '{name_}'");
        ensure!(one(&cluster, &active).await?.as_deref() == Some(kept), "{keep}");
        let all: i64 = gideon
            .value(DATABASE, &format!("select count(*) from stillebot.commands where cmdname = '{name_}'"))
            .await?;
        ensure!(all == 2, "{keep}: {all}");
    }
    cluster.finish().await
}

#[tokio::test]
async fn a_key_that_was_moved_onto_an_existing_one_is_resolved() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for (key, keep, on) in
        [(10, "local", gideon), (20, "remote", gideon), (30, "local", sikorsky), (40, "remote", sikorsky)]
    {
        sikorsky.execute(DATABASE, &config(key, "old")).await?;
        cluster.wait_replicated().await?;
        let moved = format!(
            "begin;
             update stillebot.config set twitchid = {}, data = '{{\"by\": \"sikorsky\"}}' where twitchid = {key}; {}
             commit;",
            key + 1,
            raid(key, 1)
        );
        apart(&cluster, &moved, &format!("begin; {} {} commit", config(key + 1, "gideon"), raid(key, 2))).await?;
        both(&cluster, "insert_exists", "update_exists").await?;
        let row = wait_conflict(on, "an open conflict", |row| row["status"] == "open").await?;
        let run = resolve(&cluster, &name(on, &row), keep).await?;
        ended(&cluster, &run).await?;
        let winner = if (keep == "local") == (on.name() == "gideon") { "gideon" } else { "sikorsky" };
        ensure!(config_of(&cluster, key + 1).await?.as_deref() == Some(winner), "{keep} on {}", on.name());
        // Where the move lost, the row is where it was.
        let old = (winner == "gideon").then_some("old");
        ensure!(config_of(&cluster, key).await?.as_deref() == old, "{keep} on {}", on.name());
        ensure!(raids(&cluster).await? == key / 10 * 2);
    }
    cluster.finish().await
}

#[tokio::test]
async fn an_update_of_a_row_that_was_deleted_is_resolved_both_ways() -> Result<()> {
    let cluster = Cluster::start().await?;
    let sikorsky = cluster.node("sikorsky");
    for (key, keep) in [(1, "local"), (2, "remote")] {
        sikorsky.execute(DATABASE, &config(key, "old")).await?;
        cluster.wait_replicated().await?;
        apart(
            &cluster,
            &format!("delete from stillebot.config where twitchid = {key}"),
            &format!("update stillebot.config set data = '{{\"by\": \"gideon\"}}' where twitchid = {key}"),
        )
        .await?;
        let row = wait_open(sikorsky, "update_missing").await?;
        cluster.wait_replicated().await?;
        let shown = cluster.agent(&["conflicts", "show", &name(sikorsky, &row)]).await?.expect_code(0)?.stdout;
        ensure!(shown.contains("open; replication goes on") && shown.contains("the row stays away"), "{shown}");
        let run = agent(&cluster, &["conflicts", "resolve", &name(sikorsky, &row), "--keep", "newest"]).await?;
        ensure!(run.expect_code(1)?.says("when the row was deleted on sikorsky is not known"));
        let run = agent(&cluster, &["conflicts", "skip", &name(sikorsky, &row)]).await?.expect_code(1)?;
        ensure!(run.says("stops nothing"), "{run:#?}");
        let run = resolve(&cluster, &name(sikorsky, &row), keep).await?;
        ended(&cluster, &run).await?;
        let kept = (keep == "remote").then_some("gideon");
        ensure!(config_of(&cluster, key).await?.as_deref() == kept, "{keep}");
    }
    cluster.finish().await
}

#[tokio::test]
async fn a_quarrel_that_only_one_node_noticed_is_resolved() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let gideon = cluster.node("gideon");
    for (key, keep) in [(1, "local"), (2, "remote"), (3, "newest")] {
        // On sikorsky the row is gone before the one of gideon comes.
        let links = [cluster.link("sikorsky", "gideon"), cluster.link("gideon", "sikorsky")];
        for link in links {
            link.cut().await?;
        }
        let gone = format!("{} delete from stillebot.config where twitchid = {key};", config(key, "sikorsky"));
        cluster.node("sikorsky").psql(DATABASE, &gone)?;
        gideon.psql(DATABASE, &config(key, "gideon"))?;
        for link in links {
            link.heal().await?;
        }
        let row = wait_open(gideon, "insert_exists").await?;
        cluster.wait_applied("gideon", "sikorsky").await?;
        let run = resolve(&cluster, &name(gideon, &row), keep).await?;
        ended(&cluster, &run).await?;
        let kept = config_of(&cluster, key).await?;
        ensure!(run.json["row"].is_null() == kept.is_none(), "{keep}: {kept:?} {run:#?}");
        ensure!(kept.as_deref() == (keep != "remote").then_some("gideon"), "{keep}: {kept:?}");
    }
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_is_down_takes_part() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for (key, keep, kept) in [(1, "local", "gideon"), (2, "remote", "sikorsky")] {
        apart(&cluster, &config(key, "sikorsky"), &config(key, "gideon")).await?;
        let (_, there) = both(&cluster, "insert_exists", "insert_exists").await?;
        gideon.execute(DATABASE, "select stillebot_down()").await?;
        let run = resolve(&cluster, &name(gideon, &there), keep).await?;
        ended(&cluster, &run).await?;
        ensure!(config_of(&cluster, key).await?.as_deref() == Some(kept), "{keep}");
        let state: String = gideon.value(DATABASE, "select state from stillebot_status()").await?;
        ensure!(state == "down", "{state}");
        gideon.execute(DATABASE, "select stillebot_up()").await?;
    }
    // An update of a missing row, found while down: it comes, and there is nothing to write on the node that has it.
    sikorsky.execute(DATABASE, &config(3, "old")).await?;
    cluster.wait_replicated().await?;
    apart(
        &cluster,
        "update stillebot.config set data = '{\"by\": \"sikorsky\"}' where twitchid = 3",
        "delete from stillebot.config where twitchid = 3",
    )
    .await?;
    let row = wait_open(gideon, "update_missing").await?;
    // The deletion has come to sikorsky, which met no conflict and so cannot be asked for the row, and gideon may not write.
    cluster.wait_replicated().await?;
    gideon.execute(DATABASE, "select stillebot_down()").await?;
    let row = name(gideon, &row);
    let run = agent(&cluster, &["conflicts", "resolve", &row, "--keep", "remote"]).await?.expect_code(3)?;
    ensure!(run.json["not_compared"] == json!(["sikorsky"]), "{run:#?}");
    gideon.execute(DATABASE, "select stillebot_up()").await?;
    let run = resolve(&cluster, &row, "remote").await?;
    ended(&cluster, &run).await?;
    ensure!(config_of(&cluster, 3).await?.as_deref() == Some("sikorsky"));
    cluster.finish().await
}

#[tokio::test]
async fn with_three_nodes_all_have_the_winner() -> Result<()> {
    let cluster = Cluster::builder().nodes(3).start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for (key, keep, kept) in [(1, "local", "sikorsky"), (2, "remote", "gideon"), (3, "newest", "gideon")] {
        apart(&cluster, &config(key, "sikorsky"), &config(key, "gideon")).await?;
        let (here, _) = both(&cluster, "insert_exists", "insert_exists").await?;
        wait_open(cluster.node("rodan"), "insert_exists").await?;
        let run = resolve(&cluster, &name(sikorsky, &here), keep).await?;
        ended(&cluster, &run).await?;
        ensure!(config_of(&cluster, key).await?.as_deref() == Some(kept), "{keep}");
    }
    ensure!(conflicts(gideon).await?.len() == 3);
    cluster.finish().await
}

#[tokio::test]
async fn the_next_conflict_in_line_is_told_and_does_not_hold_up_the_resolution() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let sikorsky = cluster.node("sikorsky");
    let two = |by: &str| format!("begin; {} commit; begin; {} commit", config(1, by), config(2, by));
    apart(&cluster, &two("sikorsky"), &two("gideon")).await?;
    both(&cluster, "insert_exists", "insert_exists").await?;
    let first = wait_open(sikorsky, "insert_exists").await?;
    let run = agent(&cluster, &["conflicts", "resolve", &name(sikorsky, &first), "--keep", "local"]).await?;
    let run = run.expect_code(3)?;
    ensure!(run.json["held_up"].as_array().is_some_and(|held| !held.is_empty()), "{run:#?}");
    let next = wait_conflict(sikorsky, "the next conflict", |row| row["status"] == "open").await?;
    ensure!(next["replica_identity"]["twitchid"] == 2, "{next:#}");
    let run = resolve(&cluster, &name(sikorsky, &next), "remote").await?;
    ended(&cluster, &run).await?;
    let run = resolve(&cluster, &name(sikorsky, &first), "local").await?;
    ended(&cluster, &run).await?;
    ensure!(config_of(&cluster, 1).await?.as_deref() == Some("sikorsky"));
    ensure!(config_of(&cluster, 2).await?.as_deref() == Some("gideon"));
    cluster.finish().await
}

// ---- skipping ----

#[tokio::test]
async fn skip_says_what_is_lost_and_is_only_for_what_stops_replication() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    gideon.execute(DATABASE, &config(1, "gideon")).await?;
    cluster.wait_replicated().await?;
    // The row goes on sikorsky only, as an apply worker would have done it.
    sikorsky
        .execute(
            DATABASE,
            "select pg_replication_origin_create('elsewhere');
             begin; select pg_replication_origin_session_setup('elsewhere');
             delete from stillebot.config; commit;
             select pg_replication_origin_session_reset()",
        )
        .await?;
    sikorsky
        .execute(DATABASE, &format!("begin; {} {} {} commit", raid(1, 1), config(1, "sikorsky"), raid(1, 2)))
        .await?;
    let row = wait_open(gideon, "insert_exists").await?;
    let row = name(gideon, &row);
    let text = cluster.agent(&["conflicts", "skip", &row, "--dry-run"]).await?.expect_code(0)?.stdout;
    ensure!(text.contains("would skip on gideon, for good") && text.contains("stillebot.raids"), "{text}");
    let run = agent(&cluster, &["conflicts", "skip", &row]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done" && run.json["not_streaming"] == json!([]), "{run:#?}");
    // What came after the failing change is known once the transaction has been skipped.
    let lost = run.json["changes"].as_array().context("no changes")?;
    ensure!(lost.len() == 3 && run.json["changes_complete"] == true, "{run:#?}");
    cluster.wait_replicated().await?;
    ensure!(raids(&cluster).await? == 0);
    let skipped = wait_conflict(gideon, "the skipped conflict", |row| row["status"] == "skipped").await?;
    ensure!(skipped["resolved_by"] == "stillebot_agent", "{skipped:#}");
    let run = agent(&cluster, &["conflicts", "skip", &row]).await?.expect_code(1)?;
    ensure!(run.says("is skipped already"), "{run:#?}");
    let shown = cluster.agent(&["conflicts", "show", &row]).await?.expect_code(0)?.stdout;
    ensure!(shown.contains("that is all of it") && shown.contains("transaction skipped; lost:"), "{shown}");
    // As told, the nodes differ now.
    ensure!(cluster.assert_identical().await.is_err());
    sikorsky.execute(DATABASE, "update stillebot.config set data = data; delete from stillebot.raids").await?;
    settled(&cluster).await?;
    cluster.finish().await
}

// ---- half-way ----

#[tokio::test]
async fn an_agent_killed_half_way_is_run_again_and_ends_it() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let status = async |node: &Server, key: i64| {
        let query = format!(
            "select status from multihome.conflicts where replica_identity->>'twitchid' = '{key}' order by id desc limit 1"
        );
        node.value::<String>(DATABASE, &query).await
    };

    // One node has answered; on the other one the row in the way is locked.
    apart(&cluster, &config(1, "sikorsky"), &config(1, "gideon")).await?;
    let (here, _) = both(&cluster, "insert_exists", "insert_exists").await?;
    let here = name(sikorsky, &here);
    let lock = gideon.superuser(DATABASE).await?;
    lock.batch_execute("begin; select from stillebot.config for update").await?;
    let mut started = Started::new(&cluster, &["conflicts", "resolve", &here, "--keep", "local"])?;
    wait_until("one half", PATIENCE, || async { Ok((status(sikorsky, 1).await? == "resolved").then_some(())) }).await?;
    ensure!(status(gideon, 1).await? == "open");
    started.signal(Signal::SIGKILL)?;
    started.end().await?;
    // What the agent had asked for may still be done, or not; a session that waits for a lock does not see its client go.
    gideon
        .execute(
            DATABASE,
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity where usename = 'stillebot_agent'",
        )
        .await?;
    lock.batch_execute("commit").await?;
    cluster.expect_log(" 57P01 ");
    let run = resolve(&cluster, &here, "local").await?;
    ended(&cluster, &run).await?;
    ensure!(config_of(&cluster, 1).await?.as_deref() == Some("sikorsky"));

    // Both have answered, and what comes into gideon behind the conflict waits for a lock.
    let transaction = format!("begin; {} {} commit", config(2, "sikorsky"), raid(2, 2));
    apart(&cluster, &transaction, &config(2, "gideon")).await?;
    let (here, _) = both(&cluster, "insert_exists", "insert_exists").await?;
    let here = name(sikorsky, &here);
    lock.batch_execute("begin; lock table stillebot.raids in exclusive mode").await?;
    let mut started = Started::new(&cluster, &["conflicts", "resolve", &here, "--keep", "local"])?;
    for node in cluster.nodes() {
        wait_until("both halves", PATIENCE, || async { Ok((status(node, 2).await? == "resolved").then_some(())) })
            .await?;
    }
    started.signal(Signal::SIGKILL)?;
    started.end().await?;
    lock.batch_execute("rollback").await?;
    let run = agent(&cluster, &["conflicts", "resolve", &here, "--keep", "remote"]).await?.expect_code(1)?;
    ensure!(run.says("local was kept already"), "{run:#?}");
    let run = resolve(&cluster, &here, "local").await?;
    ended(&cluster, &run).await?;
    ensure!(config_of(&cluster, 2).await?.as_deref() == Some("sikorsky"));
    let run = agent(&cluster, &["conflicts", "resolve", &here, "--keep", "local"]).await?.expect_code(1)?;
    ensure!(run.says("is resolved already"), "{run:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn what_one_node_was_told_by_hand_the_agent_brings_to_the_others() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    apart(&cluster, &config(1, "sikorsky"), &config(1, "gideon")).await?;
    let (here, there) = both(&cluster, "insert_exists", "insert_exists").await?;
    call(gideon, &format!("stillebot_resolve({}, 'remote')", id(&there))).await?;
    let run = resolve(&cluster, &name(sikorsky, &here), "local").await?;
    settled(&cluster).await?;
    ensure!(run.json["row"]["data"]["by"] == "sikorsky", "{run:#?}");
    cluster.finish().await
}
