//! A change of the schema is made on all nodes or on none, with the bot's tables replicating before and after.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use stillebot_agent::change::STEPS;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, wait_until};

use crate::PATIENCE;
use crate::runs::{Run, Started, agent};

const NEW_TABLE: &str = "create table stillebot.made (id int primary key, note text);
insert into stillebot.made values (1, 'filled in by the change');
alter table stillebot.raids add column extra int;
create function stillebot.noticed() returns trigger language plpgsql as $$ begin perform pg_notify('made', new.id::text); return null; end $$;
create trigger noticed after insert on stillebot.made for each row execute function stillebot.noticed();
alter table stillebot.made enable always trigger noticed;
";

/// Two nodes whose agent may act as the tables' owner. `prepared`: with two-phase commit, or without.
async fn cluster(prepared: bool) -> Result<Cluster> {
    let builder = Cluster::builder().config("max_prepared_transactions", if prepared { "4" } else { "0" });
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
    for statement in [
        "comment on table stillebot.raids is 'who went where'",
        "grant select on stillebot.raids to replicator",
        "truncate stillebot.raids",
        "update stillebot.raids set data = '{}'",
        "alter table stillebot.raids replica identity full",
        "alter table stillebot.raids alter fromid set default 1",
    ] {
        let run = apply(&cluster, statement, &["--no-down"]).await?.expect_code(1)?;
        ensure!(run.says("is writable, and there is something to change; nothing was changed"), "{run:#?}");
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
    cluster.finish().await
}

async fn fails_on_one_node(prepared: bool) -> Result<()> {
    let cluster = cluster(prepared).await?;
    cluster.expect_log(" 23505 ");
    // Sikorsky goes first, and would let it pass.
    cluster.nodes()[1].execute(DATABASE, "comment on table stillebot.raids is 'not here'").await?;
    let statements = format!(
        "{NEW_TABLE} do $$ begin if obj_description('stillebot.raids'::regclass) is not null then raise unique_violation using message = 'not here'; end if; end $$"
    );
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
            // No window outlives its agent.
            wait_until("the windows to close", PATIENCE, || async {
                Ok((!stands(&cluster).await?.concat().contains("maintenance")).then_some(()))
            })
            .await?;
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
    ensure!(stands(&cluster).await?.iter().all(|node| node.starts_with("down")));
    let run = apply(&cluster, "create table stillebot.other (i int)", &[]).await?.expect_code(1)?;
    ensure!(run.says("an earlier change, of first.sql, is not committed on gideon"), "{run:#?}");
    let hop = agent(&cluster, &["hop", "gideon"]).await?.expect_code(1)?;
    ensure!(hop.says("is closed for an unfinished change of the schema"), "{hop:#?}");
    agent(&cluster, &["schema", "apply", &name]).await?.expect_code(0)?;
    ensure!(stands(&cluster).await? == ["up, new", "up, new"]);
    assert_replicates(&cluster).await?;
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
