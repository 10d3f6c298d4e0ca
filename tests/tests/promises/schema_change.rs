//! A change of the schema is made on all nodes or on none, with the bot's tables replicating before and after.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use stillebot_agent::change::STEPS;
use stillebot_tests::cluster::{DATABASE, PAIR};
use stillebot_tests::{Cluster, Shutdown, wait_until};
use tokio_postgres::error::SqlState;

use crate::PATIENCE;
use crate::answers::assert_error;
use crate::runs::{Run, Started, agent, status};

const NEW_TABLE: &str = "create table stillebot.made (id int primary key, note text);
insert into stillebot.made values (1, 'filled in by the change');
alter table stillebot.raids add column extra int;
create function stillebot.noticed() returns trigger language plpgsql as $$ begin perform pg_notify('made', new.id::text); return null; end $$;
create trigger noticed after insert on stillebot.made for each row execute function stillebot.noticed();
alter table stillebot.made enable always trigger noticed;
";

/// Fails where table raids has a comment.
const UNLESS_COMMENTED: &str = "do $$ begin if obj_description('stillebot.raids'::regclass) is not null then
    raise unique_violation using message = 'not here'; end if; end $$";

async fn cluster(prepared: bool) -> Result<Cluster> {
    cluster_of(2, prepared).await
}

/// Nodes whose agent may act as the tables' owner. `prepared`: with two-phase commit, or without.
async fn cluster_of(nodes: usize, prepared: bool) -> Result<Cluster> {
    let builder = Cluster::builder().nodes(nodes).config("max_prepared_transactions", if prepared { "4" } else { "0" });
    let cluster = builder.start().await?;
    cluster.configure_agent("\n[schema]\nrole = \"rosuav\"\n")?;
    for node in cluster.nodes() {
        node.execute(DATABASE, "grant rosuav to stillebot_agent with inherit false, set true").await?;
        node.execute(
            DATABASE,
            "insert into stillebot.raids values (extract(epoch from now())::int8, pg_backend_pid())",
        )
        .await?;
    }
    cluster.wait_replicated().await?;
    Ok(cluster)
}

fn file(cluster: &Cluster, name: &str, statements: &str) -> Result<String> {
    let path = cluster.agent_configuration().with_file_name(name);
    fs::write(&path, statements)?;
    Ok(path.display().to_string())
}

async fn apply(cluster: &Cluster, statements: &str, options: &[&str]) -> Result<Run> {
    let file = file(cluster, "change.sql", statements)?;
    agent(cluster, &[&["schema", "apply", &file], options].concat()).await
}

/// `up`, `sole` or `down` of each node, and whether it has the new table.
async fn stands(cluster: &Cluster) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for node in cluster.nodes() {
        let query = "select case when s.state->>'state' = 'up' and (s.state->>'sole')::boolean then 'sole' else s.state->>'state' end
                         || case when to_regclass('stillebot.made') is null then ', old' else ', new' end
                       from (select multihome.state()) as s (state)";
        all.push(node.value::<String>(DATABASE, query).await?);
    }
    Ok(all)
}

/// No window outlives its agent.
async fn windows_close(cluster: &Cluster) -> Result<()> {
    wait_until("the windows to close", PATIENCE, || async {
        Ok((!stands(cluster).await?.concat().contains("maintenance")).then_some(()))
    })
    .await
}

/// Rows of the new table travel from each node to the other.
async fn assert_replicates(cluster: &Cluster) -> Result<()> {
    for (number, node) in cluster.nodes().iter().enumerate() {
        if node.value::<String>(DATABASE, "select multihome.state()->>'state'").await? != "up" {
            continue;
        }
        let next =
            format!("insert into stillebot.made select 10 * max(id) + {number}, 'x' from stillebot.made returning id");
        let id: i32 = node.value(DATABASE, &next).await?;
        cluster.wait_replicated().await?;
        for other in cluster.nodes() {
            let there: i64 =
                other.value(DATABASE, &format!("select count(*) from stillebot.made where id = {id}")).await?;
            ensure!(there == 1, "{} lacks what {} wrote", other.name(), node.name());
        }
    }
    for node in cluster.nodes() {
        let conflicts: i64 = node.value(DATABASE, "select count(*) from multihome.conflicts").await?;
        ensure!(conflicts == 0, "{conflicts} conflicts on {}", node.name());
        let rest: i64 = node.value(DATABASE, "select count(*) from pg_prepared_xacts").await?;
        ensure!(rest == 0, "a transaction is left prepared on {}", node.name());
    }
    cluster.assert_identical().await
}

async fn a_change_is_made(prepared: bool) -> Result<()> {
    let cluster = cluster(prepared).await?;
    let run = apply(&cluster, NEW_TABLE, &[]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done" && run.json["writes_refused_ms"].as_f64() > Some(0.0), "{run:#?}");
    ensure!(stands(&cluster).await? == ["up, new", "up, new"], "{:?}", stands(&cluster).await?);
    assert_replicates(&cluster).await?;
    let owner: String =
        cluster.nodes()[1].value(DATABASE, "select tableowner::text from pg_tables where tablename = 'made'").await?;
    ensure!(owner == "rosuav", "{owner}");
    // One node writable: it is that again, and the other one stays down.
    agent(&cluster, &["hop", "gideon"]).await?.expect_code(0)?;
    apply(&cluster, "alter table stillebot.made add column more text", &[]).await?.expect_code(0)?;
    ensure!(stands(&cluster).await? == ["down, new", "sole, new"], "{:?}", stands(&cluster).await?);
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_change_is_made_on_all_nodes_which_then_are_as_before() -> Result<()> {
    a_change_is_made(false).await
}

#[tokio::test]
async fn a_change_is_made_with_prepared_transactions_where_they_are_configured() -> Result<()> {
    a_change_is_made(true).await
}

#[tokio::test]
async fn a_change_that_changes_nothing_takes_no_node_down() -> Result<()> {
    let cluster = cluster(false).await?;
    let again = "create table if not exists stillebot.raids (i int);
                 create or replace function stillebot.same() returns int language sql as 'select 1';
                 update stillebot.raids set data = '{}' where fromid = -1";
    apply(&cluster, again, &[]).await?.expect_code(0)?;
    let since = async || -> Result<Vec<Option<String>>> {
        let mut all = Vec::new();
        for node in cluster.nodes() {
            all.push(node.value(DATABASE, "select since::text from stillebot_status()").await?);
        }
        Ok(all)
    };
    let before = since().await?;
    let run = apply(&cluster, again, &[]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "nothing_to_do" && before == since().await?, "{run:#?}");
    // The same while down, where a window is needed to see it.
    for node in cluster.nodes() {
        agent(&cluster, &["down", node.name()]).await?.expect_code(0)?;
    }
    let run = apply(&cluster, again, &[]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "nothing_to_do", "{run:#?}");
    ensure!(stands(&cluster).await? == ["down, old", "down, old"]);
    cluster.finish().await
}

#[tokio::test]
async fn whatever_a_statement_changes_is_seen_and_only_said_if_no_node_may_go_down() -> Result<()> {
    let cluster = cluster(false).await?;
    for node in cluster.nodes() {
        node.execute(DATABASE, "set role rosuav; create sequence stillebot.numbers").await?;
    }
    for statement in [
        "comment on table stillebot.raids is 'who went where'",
        "grant select on stillebot.raids to replicator",
        "truncate stillebot.raids",
        "update stillebot.raids set data = '{}'",
        "alter table stillebot.raids replica identity full",
        "alter table stillebot.raids alter fromid set default 1",
        "alter role rosuav set work_mem = '5MB'",
        "comment on database stillebot is 'of the bot'",
        "select setval('stillebot.numbers', nextval('stillebot.numbers') + 5)",
        "select lo_from_bytea(0, 'x')",
    ] {
        let run = apply(&cluster, statement, &["--no-down"]).await?.expect_code(1)?;
        ensure!(run.says("are writable, and there is something to change; nothing was changed"), "{run:#?}");
        ensure!(
            run.json["detail"].as_str().is_some_and(|list| list.contains("changed") || list.contains("written")),
            "{run:#?}"
        );
        let run = apply(&cluster, statement, &["--dry-run"]).await?.expect_code(0)?;
        ensure!(run.json["would"].as_array().is_some_and(|would| would.len() == 3), "{run:#?}");
    }
    let run = apply(&cluster, NEW_TABLE, &["--no-down"]).await?.expect_code(1)?;
    for line in [
        "table stillebot.made: created",
        "column stillebot.raids.extra: created",
        "trigger stillebot.made.noticed: created",
        "rows: 1 written",
    ] {
        ensure!(run.says(line), "{line}: {run:#?}");
    }
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    cluster.finish().await
}

#[tokio::test]
async fn what_others_do_meanwhile_or_the_server_does_not_count_makes_no_change_of_nothing_and_no_nothing_of_a_change()
-> Result<()> {
    let cluster = cluster(false).await?;
    let same = "create or replace function stillebot.same() returns int language sql as 'select 1'";
    apply(&cluster, same, &[]).await?.expect_code(0)?;
    // Somebody makes temporary tables all the time.
    let busy = cluster.nodes()[0].connect("rosuav", DATABASE).await?;
    let busy = tokio::spawn(async move {
        for number in 0.. {
            busy.batch_execute(&format!("create temp table t{number} (id serial primary key, note text default 'x')"))
                .await?;
        }
        anyhow::Ok(())
    });
    for _ in 0..3 {
        let run = apply(&cluster, &format!("select pg_sleep(0.1); {same}"), &[]).await?.expect_code(0)?;
        ensure!(run.json["outcome"] == "nothing_to_do", "{run:#?}");
    }
    let uncounted = apply(&cluster, "create temp table mine (i int); insert into mine values (1)", &[]).await?;
    ensure!(uncounted.expect_code(0)?.json["outcome"] == "nothing_to_do");
    busy.abort();
    for node in cluster.nodes() {
        node.execute(DATABASE, "alter database stillebot set track_counts = off").await?;
    }
    let update = "update stillebot.raids set data = '[1]'";
    let run = apply(&cluster, update, &["--no-down"]).await?.expect_code(1)?;
    ensure!(run.says("something that is not compared: changed"), "{run:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn a_change_begins_with_schemas_that_are_alike_and_a_role_that_it_may_act_as() -> Result<()> {
    let cluster = cluster(false).await?;
    cluster.nodes()[1].execute(DATABASE, "alter table stillebot.raids add column only_here int default 3").await?;
    let run = apply(&cluster, NEW_TABLE, &[]).await?.expect_code(1)?;
    ensure!(run.says("column stillebot.raids.only_here: not on sikorsky"), "{run:#?}");
    cluster.nodes()[0].execute(DATABASE, "alter table stillebot.raids add column only_here int default 4").await?;
    let run = apply(&cluster, NEW_TABLE, &[]).await?.expect_code(1)?;
    ensure!(run.says("sikorsky and gideon differ: integer default 4 | integer default 3"), "{run:#?}");
    let run = apply(&cluster, NEW_TABLE, &["--role", "nobody"]).await?.expect_code(1)?;
    ensure!(run.says("has no role nobody"), "{run:#?}");
    let run = apply(&cluster, NEW_TABLE, &["--role", "replicator"]).await?.expect_code(1)?;
    ensure!(run.says("grant replicator to stillebot_agent with inherit false, set true"), "{run:#?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    cluster.finish().await
}

#[tokio::test]
async fn what_cannot_be_one_transaction_is_refused_before_a_node_is_taken_down() -> Result<()> {
    let cluster = cluster(false).await?;
    for code in ["0A000", "25001", "42601", "42P01", "55P03", "42501"] {
        cluster.expect_log(format!(" {code} "));
    }
    for (statements, message, advice) in [
        ("create table stillebot.made (i int); commit; drop table stillebot.raids", "transaction", "leave BEGIN"),
        ("begin; create table stillebot.made (i int); commit", "transaction", "leave BEGIN"),
        ("create index concurrently on stillebot.raids (toid)", "CONCURRENTLY", "`schema run`"),
        (
            "create table stillebot.made (i int);\n\nselect * from stillebot.nowhere",
            "does not exist",
            "line 3: select * from",
        ),
        ("create tabel x", "syntax error", "line 1: create tabel"),
        ("create role other", "permission denied", ""),
    ] {
        let run = apply(&cluster, statements, &[]).await?.expect_code(1)?;
        ensure!(run.says(message) && run.says(advice) && run.says("nothing was changed"), "{statements}: {run:#?}");
        ensure!(stands(&cluster).await? == ["up, old", "up, old"], "{statements}");
    }
    // Somebody reads a table, and does not end.
    let reader = cluster.nodes()[1].connect("rosuav", DATABASE).await?;
    reader.batch_execute("begin; select * from stillebot.raids").await?;
    let run =
        apply(&cluster, "alter table stillebot.raids add x int", &["--lock-timeout", "200ms"]).await?.expect_code(1)?;
    ensure!(run.says("lock timeout") && run.says("--lock-timeout"), "{run:#?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    // Where the trial is, and everybody else waits behind it, that is a matter of a second.
    let reader = cluster.nodes()[0].connect("rosuav", DATABASE).await?;
    reader.batch_execute("begin; select * from stillebot.raids").await?;
    let run = apply(&cluster, "alter table stillebot.raids add x int", &[]).await?.expect_code(1)?;
    ensure!(
        run.says("lock timeout") && run.says("up waits for 1s at most") && run.says("nothing was changed"),
        "{run:#?}"
    );
    let blocked = run.json["writes_blocked_ms"].as_f64().context("not told")?;
    ensure!((1000.0..5000.0).contains(&blocked), "{blocked} ms");
    cluster.finish().await
}

async fn fails_on_one_node(prepared: bool) -> Result<()> {
    let cluster = cluster(prepared).await?;
    cluster.expect_log(" 23505 ");
    // Sikorsky goes first, and would let it pass.
    cluster.nodes()[1].execute(DATABASE, "comment on table stillebot.raids is 'not here'").await?;
    let statements = format!("{NEW_TABLE} {UNLESS_COMMENTED}");
    let run = apply(&cluster, &statements, &[]).await?.expect_code(1)?;
    ensure!(run.says("gideon") && run.says("not here") && run.says("everything is as it was"), "{run:#?}");
    ensure!(run.says("writes were refused for"), "{run:#?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old"], "{:?}", stands(&cluster).await?);
    cluster.nodes()[1].execute(DATABASE, "comment on table stillebot.raids is null").await?;
    apply(&cluster, &statements, &[]).await?.expect_code(0)?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_one_node_refuses_is_done_on_none() -> Result<()> {
    fails_on_one_node(false).await
}

#[tokio::test]
async fn what_one_node_refuses_is_prepared_on_none() -> Result<()> {
    fails_on_one_node(true).await
}

/// Every place to die at, in one cluster after the other.
async fn killed_at_every_step(prepared: bool) -> Result<()> {
    for both in [true, false] {
        let cluster = cluster(prepared).await?;
        if !both {
            agent(&cluster, &["hop", "sikorsky"]).await?.expect_code(0)?;
        }
        let before = if both { ["up", "up"] } else { ["sole", "down"] };
        for (number, place) in
            STEPS.iter().flat_map(|step| [format!("before:{step}"), format!("after:{step}")]).enumerate()
        {
            let statements = format!("alter table stillebot.raids add column c{number} int");
            let name = file(&cluster, "change.sql", &statements)?;
            let arguments = ["schema", "apply", &name];
            let mut started = Started::paused(&cluster, &arguments, &place).await.with_context(|| place.clone())?;
            started.signal(Signal::SIGKILL)?;
            started.end().await?;
            windows_close(&cluster).await?;
            agent(&cluster, &arguments)
                .await?
                .expect_code(if place == "after:reopen" { 1 } else { 0 })
                .with_context(|| place.clone())?;
            let expected = before.map(|state| format!("{state}, old"));
            ensure!(stands(&cluster).await? == expected, "{place}: {:?}", stands(&cluster).await?);
            for node in cluster.nodes() {
                let columns = format!(
                    "select (select count(*) = 1 from pg_attribute where attname = 'c{number}')
                        and not exists (select from pg_prepared_xacts)"
                );
                ensure!(node.value::<bool>(DATABASE, &columns).await?, "{place}: {}", node.name());
            }
        }
        cluster.expect_log(" 42701 "); // Of the last one, which had been done.
        cluster.assert_identical().await?;
        cluster.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_agent_killed_at_any_step_leaves_a_change_that_the_same_command_ends() -> Result<()> {
    killed_at_every_step(false).await
}

#[tokio::test]
async fn an_agent_killed_at_any_step_leaves_a_prepared_change_that_the_same_command_ends() -> Result<()> {
    killed_at_every_step(true).await
}

#[tokio::test]
async fn a_change_that_one_node_has_committed_has_to_be_finished_before_another_one() -> Result<()> {
    let cluster = cluster(false).await?;
    let name = file(&cluster, "first.sql", NEW_TABLE)?;
    let mut started = Started::paused(&cluster, &["schema", "apply", &name], "after:commit").await?;
    started.signal(Signal::SIGKILL)?;
    started.end().await?;
    windows_close(&cluster).await?;
    ensure!(stands(&cluster).await?.iter().all(|node| node.starts_with("down")));
    let run = apply(&cluster, "create table stillebot.other (i int)", &[]).await?.expect_code(1)?;
    ensure!(run.says("an earlier change, of first.sql, is not committed on gideon"), "{run:#?}");
    let hop = agent(&cluster, &["hop", "gideon"]).await?.expect_code(1)?;
    ensure!(hop.says("is closed for an unfinished change of the schema"), "{hop:#?}");
    let told = status(&cluster).await?;
    let left = &told["unfinished_schema_changes"];
    ensure!(left[0]["what"] == "first.sql" && left[0]["missing_on"][0] == "gideon" && left[1].is_null(), "{left:#}");
    ensure!(told["verdict"]["ready"] == false, "{told:#}");
    let text = cluster.agent(&["status"]).await?.stdout;
    ensure!(
        text.contains(" of first.sql: committed on sikorsky, not on gideon, closed for it: gideon and sikorsky"),
        "{text}"
    );
    // Nobody opens a node as if nothing were; and whoever does has not made it forget.
    for node in ["sikorsky", "gideon"] {
        let up = agent(&cluster, &["up", node]).await?.expect_code(1)?;
        ensure!(up.says("was not opened: unfinished schema change") && up.says("--force"), "{up:#?}");
        agent(&cluster, &["up", node, "--force"]).await?.expect_code(0)?;
    }
    let hop = agent(&cluster, &["hop", "gideon"]).await?.expect_code(1)?;
    ensure!(hop.says("of first.sql: committed on sikorsky, not on gideon"), "{hop:#?}");
    let run = agent(&cluster, &["schema", "apply", &name, "--no-down"]).await?.expect_code(3)?;
    ensure!(run.says("cannot be finished, and nothing was changed"), "{run:#?}");
    ensure!(stands(&cluster).await? == ["up, new", "up, old"], "{:?}", stands(&cluster).await?);
    agent(&cluster, &["schema", "apply", &name]).await?.expect_code(0)?;
    ensure!(stands(&cluster).await? == ["up, new", "up, new"]);
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_cannot_finish_a_change_is_not_taken_down_for_it_and_may_be_said_to_have_it() -> Result<()> {
    let cluster = cluster(false).await?;
    cluster.expect_log(" 42P07 ");
    let name = file(&cluster, "change.sql", NEW_TABLE)?;
    let mut started = Started::paused(&cluster, &["schema", "apply", &name], "after:commit").await?;
    started.signal(Signal::SIGKILL)?;
    started.end().await?;
    windows_close(&cluster).await?;
    for node in ["gideon", "sikorsky"] {
        agent(&cluster, &["up", node, "--force"]).await?.expect_code(0)?;
    }
    // By hand, or with the data of a node that had it.
    cluster.node("gideon").execute(DATABASE, &format!("set role rosuav; {NEW_TABLE}")).await?;
    let run = agent(&cluster, &["schema", "apply", &name]).await?.expect_code(3)?;
    ensure!(run.says("cannot be finished, and nothing was changed") && run.says("already exists"), "{run:#?}");
    ensure!(
        run.says("what is missing on gideon") && run.says("select multihome.conclude_schema_changes()"),
        "{run:#?}"
    );
    ensure!(stands(&cluster).await? == ["up, new", "up, new"], "{:?}", stands(&cluster).await?);
    cluster.node("sikorsky").execute(DATABASE, "select multihome.conclude_schema_changes()").await?;
    ensure!(status(&cluster).await?["unfinished_schema_changes"] == serde_json::json!([]));
    apply(&cluster, "alter table stillebot.raids add column more int", &[]).await?.expect_code(0)?;
    for node in cluster.nodes() {
        let conflicts: i64 =
            node.value(DATABASE, "select count(*) from multihome.conflicts where relname = 'schema_change'").await?;
        ensure!(conflicts == 0, "the journal has travelled to {}", node.name());
    }
    cluster.finish().await
}

#[tokio::test]
async fn an_interrupted_change_is_undone_until_it_is_committed_and_finished_afterwards() -> Result<()> {
    for (prepared, place, done) in [
        (false, "after:close", false),
        (true, "after:window", false),
        (true, "before:change", false),
        (false, "after:commit", true),
        (true, "before:refresh", true),
    ] {
        let cluster = cluster(prepared).await?;
        let name = file(&cluster, "change.sql", NEW_TABLE)?;
        let mut started = Started::paused(&cluster, &["schema", "apply", &name], place).await?;
        started.signal(Signal::SIGINT)?;
        started.signal(Signal::SIGCONT)?;
        let run = started.end().await?.expect_code(if done { 0 } else { 1 })?;
        let expected = if done { ["up, new", "up, new"] } else { ["up, old", "up, old"] };
        ensure!(stands(&cluster).await? == expected, "{place}: {:?} {run:#?}", stands(&cluster).await?);
        ensure!(done || run.says("SIGINT"), "{run:#?}");
        if !done {
            apply(&cluster, NEW_TABLE, &[]).await?.expect_code(0)?;
        }
        assert_replicates(&cluster).await?;
        cluster.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn neither_hop_nor_another_change_comes_between() -> Result<()> {
    let cluster = cluster(false).await?;
    let name = file(&cluster, "change.sql", NEW_TABLE)?;
    let mut started = Started::paused(&cluster, &["schema", "apply", &name], "after:window").await?;
    for arguments in [&["hop", "gideon"][..], &["up", "gideon"], &["schema", "apply", &name]] {
        let run = agent(&cluster, arguments).await?.expect_code(1)?;
        ensure!(run.says("another agent is at work"), "{run:#?}");
    }
    started.signal(Signal::SIGCONT)?;
    started.end().await?.expect_code(0)?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_does_not_catch_up_or_cannot_be_reached_stops_a_change_before_it_begins() -> Result<()> {
    let cluster = cluster(false).await?;
    let name = file(&cluster, "change.sql", NEW_TABLE)?;
    // Replication stops after all that can be checked before has been.
    let arguments = ["schema", "apply", &name, "--wait", "1s"];
    let mut started = Started::paused(&cluster, &arguments, "before:close").await?;
    cluster.link("sikorsky", "gideon").freeze().await?;
    started.signal(Signal::SIGCONT)?;
    let run = started.end().await?.expect_code(1)?;
    ensure!(run.says("while gideon was still applying what sikorsky had written; everything is as it was"), "{run:#?}");
    cluster.link("sikorsky", "gideon").heal().await?;
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    cluster.isolate("gideon").await?;
    let run = agent(&cluster, &arguments).await?.expect_code(69)?;
    ensure!(run.says("nothing was changed"), "{run:#?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    cluster.reconnect("gideon").await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_goes_away_before_the_first_commit_keeps_no_other_node_down() -> Result<()> {
    for prepared in [false, true] {
        let cluster = cluster(prepared).await?;
        for place in ["before:change", "before:commit"] {
            let name = file(&cluster, "change.sql", &NEW_TABLE.replace("extra", &place.replace(':', "_")))?;
            let mut started = Started::paused(&cluster, &["schema", "apply", &name], place).await?;
            cluster.isolate("gideon").await?;
            started.signal(Signal::SIGCONT)?;
            let run = started.end().await?.expect_code(3)?;
            ensure!(run.says("nothing is committed; sikorsky as before; writes were refused for"), "{run:#?}");
            ensure!(run.says("gideon could not be undone"), "{run:#?}");
            ensure!(stands(&cluster).await? == ["up, old", "down, old"], "{:?}", stands(&cluster).await?);
            cluster.nodes()[0]
                .execute(DATABASE, "insert into stillebot.raids select max(fromid) + 1, 7 from stillebot.raids")
                .await?;
            cluster.reconnect("gideon").await?;
            let left: i64 = cluster.nodes()[1].value(DATABASE, "select count(*) from pg_prepared_xacts").await?;
            ensure!((left == 1) == (prepared && place == "before:commit"), "{left} prepared {place}");
            if left == 1 {
                let up = agent(&cluster, &["up", "gideon"]).await?.expect_code(1)?;
                ensure!(up.says("prepared on gideon"), "{up:#?}");
            }
            // The rest is undone first, and what was up is up in the end.
            agent(&cluster, &["schema", "apply", &name]).await?.expect_code(0)?;
            ensure!(stands(&cluster).await? == ["up, new", "up, new"], "{:?}", stands(&cluster).await?);
            assert_replicates(&cluster).await?;
            apply(&cluster, "drop table stillebot.made; drop function stillebot.noticed", &[]).await?.expect_code(0)?;
        }
        cluster.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_node_that_goes_away_while_others_have_prepared_leaves_nothing_prepared_there() -> Result<()> {
    let cluster = cluster(true).await?;
    let name = file(&cluster, "change.sql", NEW_TABLE)?;
    // Keeps gideon behind; what only reads is not waited for when it goes down.
    let reader = cluster.nodes()[1].connect("rosuav", DATABASE).await?;
    reader.batch_execute("begin read only; select * from stillebot.raids").await?;
    let started = Started::new(&cluster, &["schema", "apply", &name])?;
    wait_until("sikorsky to have prepared", PATIENCE, || async {
        let query = "select exists (select from pg_prepared_xacts where gid like 'stillebot_schema_%_sikorsky')";
        Ok(cluster.nodes()[0].value::<bool>(DATABASE, query).await?.then_some(()))
    })
    .await?;
    cluster.isolate("gideon").await?;
    let run = started.end().await?.expect_code(3)?;
    ensure!(run.says("sikorsky as before"), "{run:#?}");
    ensure!(stands(&cluster).await?[0] == "up, old", "{:?}", stands(&cluster).await?);
    let left: i64 = cluster.nodes()[0].value(DATABASE, "select count(*) from pg_prepared_xacts").await?;
    ensure!(left == 0);
    reader.batch_execute("rollback").await?;
    cluster.reconnect("gideon").await?;
    windows_close(&cluster).await?;
    ensure!(stands(&cluster).await? == ["up, old", "down, old"], "{:?}", stands(&cluster).await?);
    agent(&cluster, &["schema", "apply", &name]).await?.expect_code(0)?;
    ensure!(stands(&cluster).await? == ["up, new", "up, new"]);
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_one_server_has_no_room_to_prepare_is_done_on_none() -> Result<()> {
    let cluster = cluster(true).await?;
    cluster.expect_log(" 53200 ");
    let other = cluster.nodes()[1].superuser("postgres").await?;
    for number in 0..4 {
        other.batch_execute(&format!("begin; create table t{number} (); prepare transaction 'full{number}'")).await?;
    }
    let run = apply(&cluster, NEW_TABLE, &[]).await?.expect_code(1)?;
    ensure!(run.says("everything is as it was"), "{run:#?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    for number in 0..4 {
        other.batch_execute(&format!("rollback prepared 'full{number}'")).await?;
    }
    apply(&cluster, NEW_TABLE, &[]).await?.expect_code(0)?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_cannot_be_prepared_is_committed_on_one_node_after_the_other() -> Result<()> {
    let cluster = cluster(true).await?;
    cluster.expect_log(" 0A000 ");
    cluster.nodes()[0].execute(DATABASE, "insert into stillebot.config values (1, 'k', '{}')").await?;
    cluster.wait_replicated().await?;
    for statement in [
        // The bot's own trigger tells of it.
        "update stillebot.config set data = '{\"changed\": true}'",
        "create temp table between (i int) on commit drop; insert into between values (7); insert into stillebot.raids select i, i from between",
    ] {
        let run = apply(&cluster, statement, &[]).await?.expect_code(0)?;
        ensure!(
            run.json["steps"]
                .to_string()
                .contains("cannot be prepared, so it is committed on one node after the other"),
            "{run:#?}"
        );
        ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    }
    apply(&cluster, NEW_TABLE, &[]).await?.expect_code(0)?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_change_that_is_whole_stays_so_when_a_node_loses_its_journal() -> Result<()> {
    let cluster = cluster(false).await?;
    apply(&cluster, NEW_TABLE, &[]).await?.expect_code(0)?;
    let rows = async || -> Result<i64> {
        cluster.nodes()[1].value(DATABASE, "select count(*) from multihome.schema_changes() where done").await
    };
    ensure!(rows().await? == 1);
    // Under another identity it is the same journal.
    for call in ["forget_identity()", &format!("identify('gideon', '{PAIR}')")] {
        cluster.nodes()[1].execute(DATABASE, &format!("select multihome.{call}")).await?;
    }
    ensure!(rows().await? == 1);
    let grants = include_str!("../../../agent/sql/grants.sql").replace("{role}", "stillebot_agent");
    cluster.nodes()[1].execute(DATABASE, "drop extension stillebot").await?;
    cluster.nodes()[1].execute(DATABASE, "create extension stillebot").await?;
    cluster.nodes()[1].execute(DATABASE, &grants).await?;
    cluster.nodes()[1].execute(DATABASE, &format!("select multihome.identify('gideon', '{PAIR}')")).await?;
    ensure!(rows().await? == 0);
    apply(&cluster, "alter table stillebot.made add column more text", &[]).await?.expect_code(0)?;
    agent(&cluster, &["hop", "gideon"]).await?.expect_code(0)?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_server_that_crashes_between_two_commits_leaves_a_change_that_the_same_command_ends() -> Result<()> {
    for prepared in [false, true] {
        let cluster = cluster(prepared).await?;
        let name = file(&cluster, "change.sql", NEW_TABLE)?;
        let mut started = Started::paused(&cluster, &["schema", "apply", &name], "after:commit").await?;
        cluster.node("gideon").stop(Shutdown::Immediate).await?;
        started.signal(Signal::SIGCONT)?;
        let run = started.end().await?.expect_code(3)?;
        ensure!(run.says("the change may not be committed on gideon") && run.says("committed on sikorsky"), "{run:#?}");
        cluster.node("gideon").start().await?;
        ensure!(stands(&cluster).await? == ["down, new", "down, old"], "{:?}", stands(&cluster).await?);
        agent(&cluster, &["schema", "apply", &name]).await?.expect_code(0)?;
        ensure!(stands(&cluster).await? == ["up, new", "up, new"], "{:?}", stands(&cluster).await?);
        assert_replicates(&cluster).await?;
        cluster.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn three_nodes_are_changed_or_none_is() -> Result<()> {
    let cluster = cluster_of(3, true).await?;
    cluster.expect_log(" 23505 ");
    let all = |state: &str| vec![state.to_owned(); 3];
    // Sikorsky and gideon would let it pass.
    cluster.node("rodan").execute(DATABASE, "comment on table stillebot.raids is 'not here'").await?;
    let statements = format!("{NEW_TABLE} {UNLESS_COMMENTED}");
    let run = apply(&cluster, &statements, &[]).await?.expect_code(1)?;
    ensure!(run.says("rodan") && run.says("everything is as it was"), "{run:#?}");
    ensure!(stands(&cluster).await? == all("up, old"), "{:?}", stands(&cluster).await?);
    cluster.node("rodan").execute(DATABASE, "comment on table stillebot.raids is null").await?;
    // One goes away: the two others are as before.
    let name = file(&cluster, "change.sql", &statements)?;
    let mut started = Started::paused(&cluster, &["schema", "apply", &name], "before:commit").await?;
    cluster.isolate("rodan").await?;
    started.signal(Signal::SIGCONT)?;
    let run = started.end().await?.expect_code(3)?;
    ensure!(run.says("sikorsky and gideon as before") && run.says("rodan could not be undone"), "{run:#?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old", "down, old"], "{:?}", stands(&cluster).await?);
    cluster.reconnect("rodan").await?;
    // And once more, killed with one of three commits made.
    let mut started = Started::paused(&cluster, &["schema", "apply", &name], "after:commit").await?;
    started.signal(Signal::SIGKILL)?;
    started.end().await?;
    windows_close(&cluster).await?;
    agent(&cluster, &["schema", "apply", &name]).await?.expect_code(0)?;
    ensure!(stands(&cluster).await? == all("up, new"), "{:?}", stands(&cluster).await?);
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_window_is_shown_and_lets_no_session_in_that_is_older_than_it() -> Result<()> {
    let cluster = cluster(false).await?;
    cluster.expect_log(" 25006 ");
    // A bot that has not heard that its databases are down.
    let bot = cluster.nodes()[0].connect("rosuav", DATABASE).await?;
    let gate = cluster.agent_configuration().with_file_name("gate");
    let script = format!("while [ ! -e '{}' ]; do sleep 0.05; done", gate.display());
    let mut command = cluster.agent_command(&["--json", "schema", "run", "--", "sh", "-c", &script]);
    let child = command.spawn()?;
    wait_until("the window", PATIENCE, || async {
        Ok((stands(&cluster).await? == ["maintenance, old", "maintenance, old"]).then_some(()))
    })
    .await?;
    let told = status(&cluster).await?;
    for node in told["nodes"].as_array().context("no nodes")? {
        ensure!(
            node["state"]["window"]["role"] == "rosuav" && node["state"]["window"]["until"].is_string(),
            "{node:#}"
        );
        ensure!(node["state"]["reason"].as_str().is_some_and(|reason| reason.contains(" (sh), up before")), "{node:#}");
    }
    let text = cluster.agent(&["status"]).await?.stdout;
    ensure!(text.contains("maintenance: rosuav may write until 20"), "{text}");
    let refused = bot.batch_execute("begin read write; insert into stillebot.raids values (7, 7); commit").await;
    let report = assert_error(refused, &SqlState::READ_ONLY_SQL_TRANSACTION);
    ensure!(report.hint().is_some_and(|hint| hint.ends_with("Connect anew.")), "{report:?}");
    fs::write(gate, "")?;
    let output = child.wait_with_output().await?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    cluster.finish().await
}

// --- schema run ---------------------------------------------------------------------------------------------------

/// As the bot's --dbupdate: on each node, as rosuav, `begin read write; ...; commit`.
fn update(cluster: &Cluster, statements: &str, nodes: &[usize]) -> Result<String> {
    let mut script = String::from("set -e\n");
    for &node in nodes {
        let conninfo = cluster.nodes()[node].conninfo("rosuav", DATABASE)?;
        script += &format!(
            "psql -X -q -v ON_ERROR_STOP=1 \"{conninfo}\" <<'END'\nbegin read write;\n{statements}\ncommit;\nEND\n"
        );
    }
    Ok(script)
}

async fn run(cluster: &Cluster, options: &[&str], script: &str) -> Result<stillebot_tests::AgentOutput> {
    cluster.agent(&[&["--json", "schema", "run"], options, &["--", "sh", "-c", script]].concat()).await
}

#[tokio::test]
async fn the_bots_own_update_gets_through_on_all_nodes() -> Result<()> {
    let cluster = cluster(false).await?;
    let script = update(&cluster, NEW_TABLE, &[0, 1])?;
    let output = run(&cluster, &[], &script).await?.expect_code(0)?;
    let report = output.json()?;
    ensure!(report["command"] == "schema run" && report["writes_refused_ms"].as_f64() > Some(0.0), "{output:#?}");
    ensure!(stands(&cluster).await? == ["up, new", "up, new"]);
    assert_replicates(&cluster).await?;
    let told = "test \"$STILLEBOT_NODES $PGDATABASE $PGUSER\" = 'sikorsky,gideon stillebot rosuav' && test -n \"$STILLEBOT_HOSTS$STILLEBOT_PORTS\"";
    run(&cluster, &[], told).await?.expect_code(0)?;
    cluster.finish().await
}

#[tokio::test]
async fn a_command_makes_alike_what_is_not() -> Result<()> {
    let cluster = cluster(false).await?;
    cluster.nodes()[1]
        .execute(DATABASE, "set role rosuav; alter table stillebot.raids add column only_here int")
        .await?;
    for node in cluster.nodes() {
        agent(&cluster, &["down", node.name()]).await?.expect_code(0)?;
    }
    let file = apply(&cluster, NEW_TABLE, &[]).await?.expect_code(1)?;
    ensure!(file.says("column stillebot.raids.only_here: not on sikorsky"), "{file:#?}");
    let script = update(&cluster, "alter table stillebot.raids add column only_here int;", &[0])?;
    run(&cluster, &[], &script).await?.expect_code(0)?;
    ensure!(stands(&cluster).await? == ["down, old", "down, old"]);
    apply(&cluster, NEW_TABLE, &[]).await?.expect_code(0)?;
    cluster.finish().await
}

/// As the bot's --dbupdate: does nothing if there is nothing to do, and refuses to do anything while a database is up.
fn update_unless_up(cluster: &Cluster) -> Result<String> {
    let mut script = String::from("set -e\n");
    for node in cluster.nodes() {
        let conninfo = node.conninfo("rosuav", DATABASE)?;
        script += &format!(
            "psql() {{ command psql -X -q -A -t -v ON_ERROR_STOP=1 \"{conninfo}\" \"$@\"; }}
             if [ -z \"$(psql -c \"select to_regclass('stillebot.made')\")\" ]; then
                 if [ \"$(psql -c 'show default_transaction_read_only')\" = off ]; then echo 'database is up'; exit 1; fi
                 psql <<'END'\nbegin read write;\n{NEW_TABLE}\ncommit;\nEND\nfi\n"
        );
    }
    Ok(script)
}

#[tokio::test]
async fn a_command_that_has_nothing_to_do_takes_no_node_down_if_it_may_try() -> Result<()> {
    let cluster = cluster(false).await?;
    let script = update_unless_up(&cluster)?;
    let output = run(&cluster, &["--try-up", "--no-down"], &script).await?.expect_code(1)?;
    let expected = "sikorsky and gideon are writable, and with the nodes as they are the command failed: exit status: 1; nothing was changed";
    ensure!(output.stderr.contains(expected), "{output:#?}");
    let output = run(&cluster, &["--no-down"], &script).await?.expect_code(1)?;
    ensure!(output.stderr.contains("are writable, and whether there is something to change"), "{output:#?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    let output = run(&cluster, &["--try-up"], &script).await?.expect_code(0)?;
    ensure!(output.json()?["writes_refused_ms"].as_f64() > Some(0.0), "{output:#?}");
    ensure!(stands(&cluster).await? == ["up, new", "up, new"]);
    assert_replicates(&cluster).await?;
    let since = "select since::text from stillebot_status()";
    let before: Option<String> = cluster.nodes()[0].value(DATABASE, since).await?;
    let output = run(&cluster, &["--try-up", "--no-down"], &script).await?.expect_code(0)?;
    ensure!(output.json()?["outcome"] == "nothing_to_do", "{output:#?}");
    ensure!(cluster.nodes()[0].value::<Option<String>>(DATABASE, since).await? == before);
    // One that does it all the same is said to have done it, and what it has made replicates.
    let output =
        run(&cluster, &["--try-up"], &update(&cluster, "create table stillebot.live (id int primary key);", &[0, 1])?)
            .await?;
    ensure!(output.expect_code(0)?.json()?["outcome"] == "done");
    cluster.nodes()[0].execute(DATABASE, "insert into stillebot.live values (1)").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_command_that_fails_is_said_and_the_nodes_are_as_before() -> Result<()> {
    let cluster = cluster(false).await?;
    let output = run(&cluster, &[], "exit 7").await?.expect_code(1)?;
    ensure!(output.stderr.contains("the command failed: exit status: 7; the nodes are as they were"), "{output:#?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    // One that does not end is ended with its window.
    let output = run(&cluster, &["--window", "1s"], "exec sleep 600").await?.expect_code(1)?;
    ensure!(output.stderr.contains("the command was ended"), "{output:#?}");
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    cluster.finish().await
}

#[tokio::test]
async fn a_command_that_did_one_node_only_needs_a_person_and_the_nodes_stay_down() -> Result<()> {
    let cluster = cluster(false).await?;
    let script = update(&cluster, NEW_TABLE, &[0])? + "exit 1";
    let output = run(&cluster, &[], &script).await?.expect_code(3)?;
    ensure!(output.stderr.contains("table stillebot.made: not on gideon"), "{output:#?}");
    ensure!(stands(&cluster).await? == ["down, new", "down, old"]);
    // The rest of it, and what was up is up again.
    let script = update(&cluster, NEW_TABLE, &[1])?;
    run(&cluster, &[], &script).await?.expect_code(0)?;
    ensure!(stands(&cluster).await? == ["up, new", "up, new"]);
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn an_agent_that_is_killed_takes_the_window_of_its_command_with_it() -> Result<()> {
    let cluster = cluster(false).await?;
    cluster.expect_log(" 25006 ");
    let mut command = cluster.agent_command(&["schema", "run", "--", "sleep", "5"]);
    let mut child = command.spawn()?;
    wait_until("the window", PATIENCE, || async {
        Ok((stands(&cluster).await? == ["maintenance, old", "maintenance, old"]).then_some(()))
    })
    .await?;
    child.start_kill()?;
    child.wait().await?;
    wait_until("its end", PATIENCE, || async {
        Ok((stands(&cluster).await? == ["down, old", "down, old"]).then_some(()))
    })
    .await?;
    let late = cluster.nodes()[0].connect("rosuav", DATABASE).await?;
    let refused = late.batch_execute("begin read write; create table stillebot.made (i int); commit").await;
    ensure!(refused.is_err());
    tokio::time::timeout(Duration::from_secs(60), run(&cluster, &[], "true")).await??.expect_code(0)?;
    ensure!(stands(&cluster).await? == ["up, old", "up, old"]);
    cluster.finish().await
}
