//! `stillebot-agent init`: servers that nobody has set up become nodes that replicate, and no row is lost on the way.

use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use stillebot_tests::cluster::{DATABASE, active_name};
use stillebot_tests::{Cluster, ClusterBuilder, Rows, Server, Workload, WorkloadOptions, wait_until};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::PATIENCE;
use crate::runs::{self, Run, Started, agent};

/// What a server says when the agent that it was working for is gone.
const KILLED: &str = "connection to client lost";
/// Enough rows for a copy that can be watched and interrupted.
const ROWS: i64 = 40_000;

/// Servers that nobody has set up.
fn bare() -> ClusterBuilder {
    Cluster::builder().bare().config("max_slot_wal_keep_size", "4GB")
}

async fn init(cluster: &Cluster, more: &[&str]) -> Result<Run> {
    let arguments = cluster.as_admin("init", more);
    agent(cluster, &arguments.iter().map(String::as_str).collect::<Vec<_>>()).await
}

fn start_init(cluster: &Cluster, more: &[&str]) -> Result<Started> {
    let arguments = cluster.as_admin("init", more);
    Started::new(cluster, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Rows as a bot has them after a while.
async fn fill(node: &Server, rows: i64) -> Result<()> {
    node.execute(
        DATABASE,
        &format!(
            "insert into stillebot.settings (active_bot) values ('{}');
             insert into stillebot.config (twitchid, keyword, data)
             select n, 'counter', jsonb_build_object('n', n, 'text', repeat(md5(n::text), 8)) from generate_series(1, {rows}) n;
             insert into stillebot.http_sessions (cookie, data)
             select 'session-' || n, convert_to(md5(n::text), 'UTF8') from generate_series(1, {rows} / 4) n;",
            active_name(node.name())
        )
        // Cookies of the workload begin with a number.
        .replace("'session-'", "'0-'"),
    )
    .await
}

/// A row from each node comes to all others, all tables are the same, and `check` finds no error.
async fn assert_replicates(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        let name = node.name();
        let key = format!("from {name}");
        let session = node.connect("rosuav", DATABASE).await?;
        session.execute("insert into stillebot.config values (0, $1, '{}')", &[&key]).await?;
        for peer in cluster.nodes() {
            let seen = format!("select exists (select from stillebot.config where keyword = '{key}')");
            wait_until(&format!("a row of {name} on {}", peer.name()), PATIENCE, || async {
                Ok(peer.value::<bool>(DATABASE, &seen).await?.then_some(()))
            })
            .await?;
        }
        session.execute("delete from stillebot.config where keyword = $1", &[&key]).await?;
    }
    // The deletions, and whatever a workload has written last.
    wait_until("all nodes to have the same rows", PATIENCE, || async { cluster.assert_identical().await.map(Some) })
        .await?;
    let left: Vec<i64> = probes(cluster).await?;
    ensure!(left.iter().all(|&count| count == 0), "rows of the proof were left: {left:?}");
    let check = agent(cluster, &["check"]).await?;
    ensure!(check.code == Some(0), "check is not content: {:#}", troubles(&check.json));
    Ok(())
}

async fn probes(cluster: &Cluster) -> Result<Vec<i64>> {
    let mut counts = Vec::new();
    for node in cluster.nodes() {
        counts.push(node.value(DATABASE, "select count(*) from multihome.probe").await?);
    }
    Ok(counts)
}

fn troubles(check: &Value) -> Value {
    let findings = check["findings"].as_array().cloned().unwrap_or_default();
    findings.into_iter().filter(|finding| finding["verdict"] != "ok").collect()
}

/// What `init` could have made on a node.
async fn made(node: &Server) -> Result<String> {
    node.value(
        DATABASE,
        "select format('roles %s, extensions %s, publications %s, subscriptions %s, slots %s, file settings %s',
                       (select string_agg(rolname, ' ' order by rolname) from pg_roles where rolname !~ '^pg_'),
                       (select string_agg(extname, ' ' order by extname) from pg_extension),
                       (select count(*) from pg_publication), (select count(*) from pg_subscription),
                       (select count(*) from pg_replication_slots),
                       (select string_agg(name || sourcefile, ' ') from pg_file_settings
                         where sourcefile like '%auto.conf'))",
    )
    .await
}

async fn all_made(cluster: &Cluster) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for node in cluster.nodes() {
        all.push(made(node).await?);
    }
    Ok(all)
}

async fn count(node: &Server, table: &str) -> Result<i64> {
    node.value(DATABASE, &format!("select count(*) from stillebot.{table}")).await
}

#[tokio::test]
async fn two_fresh_servers_become_a_pair_and_a_second_init_has_nothing_to_do() -> Result<()> {
    let cluster = bare().start().await?;
    cluster.configure_agent("\n[schema]\nrole = \"rosuav\"\n")?;
    let run = init(&cluster, &["--yes"]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done", "{run:#?}");
    let proof = run.json["proof"].as_array().context("no proof")?;
    ensure!(proof.len() == 2 && proof.iter().all(|way| way["by"] == "row"), "{run:#?}");
    ensure!(runs::writable(&cluster).await?.len() == 2, "a node was left closed");
    assert_replicates(&cluster).await?;
    for node in cluster.nodes() {
        let acts = "select pg_has_role('stillebot_agent', 'rosuav', 'set') and not pg_has_role('stillebot_agent', 'rosuav', 'usage')";
        ensure!(node.value::<bool>(DATABASE, acts).await?, "the agent may not act as the tables' owner, or is it");
    }

    let again = init(&cluster, &["--yes"]).await?.expect_code(0)?;
    ensure!(again.json["outcome"] == "nothing_to_do", "{again:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn over_sockets_init_needs_no_certificate() -> Result<()> {
    let cluster = bare().start().await?;
    let places = cluster
        .nodes()
        .iter()
        .map(|node| format!("--via={}={}:{}", node.name(), node.socket_directory().display(), node.port()));
    let places: Vec<String> = places.collect();
    let arguments: Vec<&str> = ["init", "--yes"].into_iter().chain(places.iter().map(String::as_str)).collect();
    agent(&cluster, &arguments).await?.expect_code(0)?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_bot_goes_on_writing_while_the_other_node_gets_a_copy_and_nothing_is_lost() -> Result<()> {
    let cluster = bare().start().await?;
    fill(&cluster.nodes()[0], ROWS).await?;
    // One client prefers the first node; the other one must be empty until it is closed.
    let options = WorkloadOptions { clients: 1, pause: Duration::from_millis(1), rows: Rows::PerClient };
    let work = Workload::start(&cluster, options);
    work.wait_writes(0, 20).await?;
    let run = init(&cluster, &["--yes"]).await?.expect_code(0)?;
    ensure!(run.json["plan"]["source"] == "sikorsky", "{run:#?}");
    work.wait_writes(0, 20).await?;
    let report = work.stop(PATIENCE).await?;
    assert_replicates(&cluster).await?;
    let verdict = report.verify(&cluster).await?;
    verdict.ensure_clean()?;
    ensure!(verdict.acknowledged > 40, "too little was written: {verdict}");
    ensure!(report.switches().is_empty(), "the node with the rows was closed: {:?}", report.switches());
    cluster.finish().await
}

#[tokio::test]
async fn same_rows_on_both_are_left_as_they_are_if_the_operator_says_so() -> Result<()> {
    let cluster = bare().start().await?;
    for node in cluster.nodes() {
        fill(node, 1000).await?;
    }
    for table in ["settings", "http_sessions"] {
        make_same(&cluster, table).await?;
    }
    let before = all_made(&cluster).await?;
    let refused = init(&cluster, &["--yes"]).await?.expect_code(1)?;
    ensure!(refused.json["error"].as_str().is_some_and(|text| text.contains("the same")), "{refused:#?}");
    ensure!(refused.json["hint"].as_str().is_some_and(|text| text.contains("--assume-identical")), "{refused:#?}");
    ensure!(all_made(&cluster).await? == before, "something was changed");

    init(&cluster, &["--yes", "--assume-identical"]).await?.expect_code(0)?;
    ensure!(count(&cluster.nodes()[1], "config").await? == 1000, "rows were copied");
    ensure!(runs::writable(&cluster).await?.len() == 2, "a node was left closed");
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

/// What the nodes have of a table becomes what the first one has.
async fn make_same(cluster: &Cluster, table: &str) -> Result<()> {
    let text = format!("select coalesce(jsonb_agg(to_jsonb(t)), '[]')::text from stillebot.{table} t");
    let rows: String = cluster.nodes()[0].value(DATABASE, &text).await?;
    for node in &cluster.nodes()[1..] {
        let session = node.superuser(DATABASE).await?;
        let insert = format!(
            "insert into stillebot.{table} select * from jsonb_populate_recordset(null::stillebot.{table}, $1::text::jsonb)"
        );
        session.batch_execute(&format!("truncate stillebot.{table}")).await?;
        session.execute(&insert, &[&rows]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn different_rows_are_refused_with_tables_and_counts_and_nothing_is_changed() -> Result<()> {
    let cluster = bare().start().await?;
    fill(&cluster.nodes()[0], 1000).await?;
    fill(&cluster.nodes()[1], 400).await?;
    let before = all_made(&cluster).await?;
    for more in [&["--yes"][..], &["--yes", "--assume-identical"], &["--yes", "--from", "gideon"]] {
        let run = init(&cluster, more).await?.expect_code(1)?;
        let detail = run.json["detail"].as_str().unwrap_or_default();
        ensure!(detail.contains("stillebot.config: 1000 rows on sikorsky, 400 rows on gideon"), "{run:#?}");
        ensure!(detail.contains("stillebot.http_sessions: 250 rows on sikorsky, 100 rows on gideon"), "{run:#?}");
        // One row each, and not the same.
        ensure!(detail.contains("stillebot.settings: 1 rows on sikorsky, 1 rows on gideon"), "{run:#?}");
        ensure!(all_made(&cluster).await? == before, "something was changed: {run:#?}");
    }
    ensure!(count(&cluster.nodes()[0], "config").await? == 1000, "rows were lost");
    ensure!(count(&cluster.nodes()[1], "config").await? == 400, "rows were lost");
    cluster.finish().await
}

/// `init` through the servers' sockets.
async fn init_through_sockets(cluster: &Cluster, more: &[&str]) -> Result<Run> {
    let places = cluster
        .nodes()
        .iter()
        .map(|node| format!("--via={}={}:{}", node.name(), node.socket_directory().display(), node.port()));
    let words: Vec<String> = std::iter::once("init".to_owned()).chain(places).collect();
    agent(cluster, &words.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>()).await
}

#[tokio::test]
async fn what_init_leaves_as_it_is_is_told_with_the_plan() -> Result<()> {
    // Without a bound of WAL that slots keep.
    let cluster = Cluster::builder().bare().start().await?;
    for node in cluster.nodes() {
        node.execute(DATABASE, "create unlogged table stillebot.scratch (a integer primary key)").await?;
    }
    let run = init(&cluster, &["--dry-run"]).await?.expect_code(0)?;
    let concerns = run.json["concerns"].as_array().context("no concerns")?;
    let told: BTreeSet<&str> = concerns.iter().filter_map(|finding| finding["subject"].as_str()).collect();
    ensure!(told == BTreeSet::from(["max_slot_wal_keep_size", "unlogged_table"]), "{concerns:#?}");
    let words = cluster.as_admin("init", &["--dry-run"]);
    let shown = cluster.agent(&words.iter().map(String::as_str).collect::<Vec<_>>()).await?.expect_code(0)?.stdout;
    for line in [
        "what init leaves as it is:",
        "  sikorsky: unlogged_table stillebot.scratch: unlogged: nothing of it is replicated",
        "      mend:   alter table stillebot.scratch set logged;",
        "  gideon: max_slot_wal_keep_size: no bound",
    ] {
        ensure!(shown.lines().any(|found| found == line), "no {line:?} in {shown}");
    }
    let run = init(&cluster, &["--yes"]).await?.expect_code(0)?;
    ensure!(run.json["concerns"].as_array().is_some_and(|all| all.len() == 4), "{run:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn files_that_a_server_does_not_have_are_told_before_anything_is_done() -> Result<()> {
    let cluster = bare().start().await?;
    let key = cluster.node("gideon").socket_directory().join("tls/server-as-replicator.key");
    let away = key.with_extension("away");
    fs::rename(&key, &away)?;
    let before = all_made(&cluster).await?;
    let run = init(&cluster, &["--yes"]).await?.expect_code(1)?;
    ensure!(run.json["detail"] == format!("gideon has no file {}", key.display()), "{run:#?}");
    ensure!(all_made(&cluster).await? == before, "something was changed");
    fs::rename(&away, &key)?;
    init(&cluster, &["--yes"]).await?.expect_code(0)?;
    cluster.finish().await
}

#[tokio::test]
async fn who_set_up_through_sockets_is_told_where_the_agent_does_not_get_in() -> Result<()> {
    let cluster = bare().start().await?;
    cluster.expect_log(" 28000 ");
    let gideon = cluster.node("gideon");
    let path = gideon.data_directory().join("pg_hba.conf");
    let good = fs::read_to_string(&path)?;
    fs::write(&path, format!("hostssl all stillebot_agent all reject\n{good}"))?;
    gideon.reload().await?;
    let run = init_through_sockets(&cluster, &["--yes"]).await?.expect_code(0)?;
    let shut_out = run.json["agent_shut_out"].as_object().context("no such thing")?;
    ensure!(shut_out.len() == 1, "{run:#?}");
    let said = shut_out["gideon"].as_str().unwrap_or_default();
    ensure!(said.starts_with("the agent itself does not get into gideon") && said.contains("check"), "{said}");
    fs::write(&path, good)?;
    gideon.reload().await?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_is_under_way_among_nodes_that_replicate_is_no_difference_to_a_third() -> Result<()> {
    let cluster = bare().nodes(3).direct().start().await?;
    cluster.expect_log("terminating logical replication worker due to administrator command");
    cluster.expect_log(" 55006 "); // A worker is back before the one before it has let go.
    cluster.agent_knows(&["sikorsky", "gideon"])?;
    init(&cluster, &["--yes"]).await?.expect_code(0)?;
    // What gideon has, and sikorsky will have: rodan has it already.
    cluster.node("sikorsky").execute(DATABASE, "alter subscription multihome disable").await?;
    let rows = "insert into stillebot.config select n, 'same', jsonb_build_object('text', repeat(md5(n::text), 8))
                  from generate_series(1, 40000) n";
    for node in ["gideon", "rodan"] {
        cluster.node(node).execute(DATABASE, rows).await?;
    }
    cluster.agent_knows(&["sikorsky", "gideon", "rodan"])?;
    init(&cluster, &["--yes", "--assume-identical"]).await?.expect_code(0)?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn on_a_terminal_a_copy_has_bars_with_rows_and_a_percentage() -> Result<()> {
    let cluster = bare().start().await?;
    fill(&cluster.nodes()[0], 4000).await?;
    cluster.nodes()[0].execute(DATABASE, "analyze stillebot.config").await?;
    // A copy that takes two seconds.
    let slowly = "create function stillebot.slowly() returns trigger language plpgsql as
                    $$ begin perform pg_sleep(0.05); return new; end $$;
                  create trigger slowly before insert on stillebot.config for each row when (new.twitchid % 100 = 0)
                    execute function stillebot.slowly();
                  alter table stillebot.config enable always trigger slowly";
    cluster.node("gideon").execute(DATABASE, slowly).await?;
    let words = cluster.as_admin("init", &["--yes"]);
    let plain = cluster.agent_command(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let plain = plain.as_std();
    let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_string_lossy());
    let command: Vec<String> = std::iter::once(plain.get_program()).chain(plain.get_args()).map(quoted).collect();
    // It gives what it runs a terminal.
    let mut script = Command::new("script");
    script.args(["-qefc", &format!("stty cols 160; {}", command.join(" ")), "/dev/null"]);
    script.env("TERM", "xterm").stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(2 * PATIENCE, script.output()).await.context("it stands still")??;
    let shown = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && shown.contains("done in"), "{shown}");
    let bars: Vec<&str> = shown
        .split(['\r', '\n'])
        .filter(|line| line.contains("stillebot.config") && line.contains(" rows, "))
        .collect();
    let percent = |bar: &&str| {
        let before = bar.split(" %").next().and_then(|text| text.split_whitespace().last());
        before.and_then(|text| text.parse::<u32>().ok()).is_some_and(|number| (1..=99).contains(&number))
    };
    ensure!(bars.iter().any(percent), "no bar of a copy half-way: {shown:?}");
    cluster.finish().await
}

#[tokio::test]
async fn hosts_that_are_swapped_in_the_configuration_are_refused_before_anything_is_done() -> Result<()> {
    let cluster = bare().start().await?;
    let path = cluster.agent_configuration();
    let text = fs::read_to_string(&path)?;
    let swapped = text
        .replace("name        = \"sikorsky\"", "name        = \"X\"")
        .replace("name        = \"gideon\"", "name        = \"sikorsky\"")
        .replace("name        = \"X\"", "name        = \"gideon\"");
    ensure!(swapped != text, "nothing was swapped");
    fs::write(&path, swapped)?;
    let before = all_made(&cluster).await?;
    let run = init(&cluster, &["--yes"]).await?.expect_code(1)?;
    ensure!(run.json["detail"].as_str().is_some_and(|text| text.contains("stillebot.node")), "{run:#?}");
    ensure!(all_made(&cluster).await? == before, "something was changed");
    cluster.finish().await
}

/// Whether rows are being copied to a node right now.
async fn wait_copying(cluster: &Cluster, node: &str) -> Result<()> {
    let copying = "select exists (select from pg_subscription_rel where srsubstate <> 'r')";
    wait_until("a copy to be under way", PATIENCE, || async {
        Ok(cluster.node(node).value::<bool>(DATABASE, copying).await?.then_some(()))
    })
    .await
}

/// `init` while the second node's connection to the first is cut, so that the copy stands still.
async fn init_that_stands_still(cluster: &Cluster) -> Result<Started> {
    let started = start_init(cluster, &["--yes"])?;
    wait_copying(cluster, "gideon").await?;
    cluster.link("sikorsky", "gideon").cut().await?;
    Ok(started)
}

#[tokio::test]
async fn an_init_that_was_killed_or_interrupted_is_finished_by_the_next_one() -> Result<()> {
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        let cluster = bare().start().await?;
        fill(&cluster.nodes()[0], ROWS).await?;
        // We look whether a closed node takes writes.
        cluster.expect_log(" 25006 ");
        // What the interrupted one was waiting for, it has ended itself.
        cluster.expect_log("canceling statement due to user request");
        cluster.expect_log(KILLED);
        let mut started = init_that_stands_still(&cluster).await?;
        started.signal(signal)?;
        let run = started.end().await?;
        if signal == Signal::SIGINT {
            ensure!(run.code == Some(3), "{run:#?}");
            let detail = run.json["detail"].as_str().unwrap_or_default();
            ensure!(detail.contains("steps are done") && detail.contains("gideon stays down"), "{run:#?}");
        }
        ensure!(runs::writable(&cluster).await? == ["sikorsky"], "a node with half a copy takes writes");
        cluster.link("sikorsky", "gideon").heal().await?;
        init(&cluster, &["--yes"]).await?.expect_code(0)?;
        ensure!(runs::writable(&cluster).await?.len() == 2, "a node was left closed");
        assert_replicates(&cluster).await.with_context(|| format!("after {signal}"))?;
        cluster.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_init_whose_connection_is_cut_is_finished_by_the_next_one() -> Result<()> {
    let cluster = bare().start().await?;
    cluster.expect_log(KILLED);
    fill(&cluster.nodes()[0], ROWS).await?;
    let started = start_init(&cluster, &["--yes"])?;
    wait_copying(&cluster, "gideon").await?;
    cluster.agent_link("gideon").cut().await?;
    let run = started.end().await?;
    ensure!(run.code == Some(3), "{run:#?}");
    ensure!(run.json["hint"].as_str().is_some_and(|text| text.contains("init again")), "{run:#?}");
    cluster.agent_link("gideon").heal().await?;
    init(&cluster, &["--yes"]).await?.expect_code(0)?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn three_servers_become_a_set_and_all_get_the_rows_of_one() -> Result<()> {
    let cluster = bare().nodes(3).direct().start().await?;
    fill(&cluster.nodes()[2], 2000).await?;
    let run = init(&cluster, &["--yes"]).await?.expect_code(0)?;
    ensure!(run.json["plan"]["source"] == "rodan", "{run:#?}");
    ensure!(run.json["proof"].as_array().is_some_and(|proof| proof.len() == 6), "{run:#?}");
    assert_replicates(&cluster).await?;
    let again = init(&cluster, &["--yes"]).await?.expect_code(0)?;
    ensure!(again.json["outcome"] == "nothing_to_do", "{again:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn a_pair_becomes_a_set_of_three_while_a_bot_writes() -> Result<()> {
    let cluster = bare().nodes(3).direct().start().await?;
    fill(&cluster.nodes()[0], ROWS).await?;
    cluster.agent_knows(&["sikorsky", "gideon"])?;
    init(&cluster, &["--yes"]).await?.expect_code(0)?;
    cluster.agent_knows(&["sikorsky", "gideon", "rodan"])?;
    // Said of any copy from a node that subscribes itself; the rows of the other one are waited for before.
    cluster.expect_log("requested copy_data with origin = NONE but might copy data that had a different origin");
    let options = WorkloadOptions { clients: 1, pause: Duration::from_millis(1), rows: Rows::PerClient };
    let work = Workload::start(&cluster, options);
    work.wait_writes(0, 20).await?;
    init(&cluster, &["--yes"]).await?.expect_code(0)?;
    let report = work.stop(PATIENCE).await?;
    assert_replicates(&cluster).await?;
    report.verify(&cluster).await?.ensure_clean()?;
    let again = init(&cluster, &["--yes"]).await?.expect_code(0)?;
    ensure!(again.json["outcome"] == "nothing_to_do", "{again:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_without_a_terminal_nobody_is_taken_at_his_silence() -> Result<()> {
    let cluster = bare().start().await?;
    fill(&cluster.nodes()[0], 100).await?;
    let before = all_made(&cluster).await?;
    let run = init(&cluster, &["--dry-run"]).await?.expect_code(0)?;
    let steps = run.json["plan"]["steps"].as_array().context("no steps")?;
    let last = steps.last().context("an empty plan")?;
    ensure!(last["action"] == "prove" && last["node"] == "sikorsky", "{run:#?}");
    ensure!(all_made(&cluster).await? == before, "a dry run changed something");
    let run = init(&cluster, &[]).await?.expect_code(1)?;
    ensure!(run.json["hint"].as_str().is_some_and(|text| text.contains("--yes")), "{run:#?}");
    ensure!(all_made(&cluster).await? == before, "something was changed that nobody agreed to");
    cluster.finish().await
}

/// Kills `init` at its second, third, .. seventh step, again and again, until it comes to its end before; how often that was.
async fn init_killed_again_and_again(cluster: &Cluster, more: &[&str]) -> Result<usize> {
    cluster.expect_log(KILLED);
    let words = cluster.as_admin("init", more);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    for killed in 0..60 {
        if !runs::killed_at(cluster, &words, 2 + killed % 6).await? {
            return Ok(killed);
        }
    }
    anyhow::bail!("killed so often, init makes no headway");
}

#[tokio::test]
async fn an_init_of_three_that_is_killed_again_and_again_goes_on_with_the_same_words() -> Result<()> {
    let cluster = bare().nodes(3).direct().start().await?;
    fill(cluster.node("rodan"), 2000).await?;
    let killed = init_killed_again_and_again(&cluster, &["--yes", "--from", "rodan"]).await?;
    ensure!(killed > 8, "it was killed only {killed} times");
    ensure!(runs::writable(&cluster).await?.len() == 3, "a node was left closed");
    ensure!(count(cluster.node("gideon"), "config").await? == 2000, "rows are missing");
    assert_replicates(&cluster).await?;
    let again = init(&cluster, &["--yes", "--from", "rodan"]).await?.expect_code(0)?;
    ensure!(again.json["outcome"] == "nothing_to_do", "{again:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn a_third_node_joins_while_one_is_down_which_stays_so_however_often_init_is_killed() -> Result<()> {
    let cluster = bare().nodes(3).direct().start().await?;
    fill(&cluster.nodes()[0], 2000).await?;
    cluster.agent_knows(&["sikorsky", "gideon"])?;
    init(&cluster, &["--yes"]).await?.expect_code(0)?;
    cluster.agent_knows(&["sikorsky", "gideon", "rodan"])?;
    cluster.expect_log("requested copy_data with origin = NONE but might copy data that had a different origin");
    cluster.expect_log(" 25006 ");
    let sikorsky = cluster.node("sikorsky");
    sikorsky.execute(DATABASE, "select stillebot_down('kernel update')").await?;
    let killed = init_killed_again_and_again(&cluster, &["--yes"]).await?;
    ensure!(killed > 4, "it was killed only {killed} times");
    let state: String =
        sikorsky.value(DATABASE, "select format('%s %s', state, reason) from stillebot_status()").await?;
    ensure!(state == "down kernel update", "{state}");
    ensure!(runs::writable(&cluster).await? == ["gideon", "rodan"], "a node was left closed");
    sikorsky.execute(DATABASE, "select stillebot_up()").await?;
    ensure!(count(cluster.node("rodan"), "config").await? == 2000, "rows are missing");
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_slot_that_waits_for_a_transaction_says_for_whose_and_leaves_nothing_half_done() -> Result<()> {
    let cluster = bare().start().await?;
    let sikorsky = cluster.node("sikorsky");
    // Given up, by the agent or because it was killed.
    cluster.expect_log("canceling statement due to user request");
    cluster.expect_log(KILLED);
    cluster.expect_log("terminating connection due to administrator command");
    cluster.expect_log("could not create replication slot");
    let session = sikorsky.superuser(DATABASE).await?;
    session.batch_execute("set application_name = 'forgotten'; begin; select pg_current_xact_id()").await?;
    let pid: i32 = session.query_one("select pg_backend_pid()", &[]).await?.get(0);
    let given_up = |run: &Run| {
        let detail = run.json["detail"].as_str().unwrap_or_default();
        ensure!(
            detail.contains(&format!("pid {pid} of ")) && detail.contains("(forgotten), in a transaction since 2"),
            "{run:#?}"
        );
        ensure!(detail.contains("gideon stays down until init has come to its end"), "{run:#?}");
        ensure!(run.json["hint"].as_str().is_some_and(|hint| hint.contains("pg_terminate_backend()")), "{run:#?}");
        Ok(())
    };
    let left =
        "select count(*) from (select from pg_replication_slots union all select from pg_subscription) as all_of_them";
    let nothing_left = || async {
        for node in cluster.nodes() {
            wait_until("nothing to be left", PATIENCE, || async {
                Ok((node.value::<i64>(DATABASE, left).await? == 0).then_some(()))
            })
            .await?;
        }
        anyhow::Ok(())
    };
    let run = init(&cluster, &["--yes", "--patience", "2s"]).await?.expect_code(3)?;
    given_up(&run)?;
    nothing_left().await?;

    let mut killed = start_init(&cluster, &["--yes"])?;
    wait_until("the slot to be in the making", PATIENCE, || async {
        let making = "select exists (select from pg_replication_slots where confirmed_flush_lsn is null)";
        Ok(sikorsky.value::<bool>(DATABASE, making).await?.then_some(()))
    })
    .await?;
    killed.signal(Signal::SIGKILL)?;
    killed.end().await?;
    let run = init(&cluster, &["--yes", "--patience", "2s"]).await?.expect_code(3)?;
    given_up(&run)?;
    nothing_left().await?;

    session.batch_execute("commit").await?;
    init(&cluster, &["--yes"]).await?.expect_code(0)?;
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

/// The agent on a terminal of its own, at which somebody types this: exit code, and all that is seen there.
async fn at_a_terminal(cluster: &Cluster, words: &[String], typed: &str) -> Result<(Option<i32>, String)> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let command = cluster.agent_command(&words);
    let line: Vec<String> = std::iter::once(command.as_std().get_program())
        .chain(command.as_std().get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &line.join(" "), "/dev/null"]).kill_on_drop(true);
    let mut child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut keyboard = child.stdin.take().context("no stdin")?;
    keyboard.write_all(typed.as_bytes()).await?;
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.context("it does not end")??;
    drop(keyboard);
    Ok((output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned()))
}

#[tokio::test]
async fn at_a_terminal_it_asks_and_whatever_is_not_yes_changes_nothing() -> Result<()> {
    let cluster = bare().start().await?;
    fill(&cluster.nodes()[0], 1000).await?;
    let before = all_made(&cluster).await?;
    for typed in ["n\n", "\n", "yellow\n"] {
        let (code, seen) = at_a_terminal(&cluster, &cluster.as_admin("init", &[]), typed).await?;
        ensure!(code == Some(1), "{code:?}: {seen}");
        ensure!(seen.contains("Do it? [y/N]") && seen.contains("not agreed to; nothing was changed"), "{seen}");
        ensure!(seen.contains("create subscription multihome"), "the plan was not shown: {seen}");
        ensure!(all_made(&cluster).await? == before, "something was changed that nobody agreed to");
    }
    let (code, seen) = at_a_terminal(&cluster, &cluster.as_admin("init", &[]), "y\n").await?;
    ensure!(code == Some(0) && seen.contains("done in "), "{code:?}: {seen}");
    assert_replicates(&cluster).await?;
    let (code, seen) = at_a_terminal(&cluster, &cluster.as_admin("deinit", &[]), "n\n").await?;
    ensure!(code == Some(1) && seen.contains("not agreed to; nothing was changed"), "{code:?}: {seen}");
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn without_a_terminal_progress_is_plain_lines_one_for_each_step_and_table() -> Result<()> {
    let cluster = bare().start().await?;
    fill(&cluster.nodes()[0], ROWS).await?;
    let words = cluster.as_admin("init", &["--yes"]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let output = cluster.agent_command(&words).output().await?;
    let (stdout, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success(), "{stdout}{stderr}");
    ensure!(stdout.contains("a row came after") && stdout.trim_end().ends_with(" s"), "{stdout}");
    ensure!(!stderr.contains(|c: char| c.is_control() && c != '\n'), "{stderr:?}");
    let steps: Vec<&str> = stderr.lines().filter(|line| line.starts_with('[')).collect();
    for (number, step) in steps.iter().enumerate() {
        ensure!(step.starts_with(&format!("[{}/{}] ", number + 1, steps.len())), "{stderr}");
    }
    let copied = stderr.lines().filter(|line| *line == "      gideon: stillebot.config: copied").count();
    ensure!(copied == 1, "{stderr}");
    ensure!(stderr.lines().all(|line| line.starts_with('[') || line.starts_with("      ")), "{stderr}");
    cluster.finish().await
}

#[tokio::test]
async fn init_gives_strides_if_that_is_wished_and_says_so_beforehand() -> Result<()> {
    let cluster = bare().start().await?;
    cluster.expect_log(" 25006 ");
    for node in cluster.nodes() {
        let table = "set role rosuav; create table stillebot.tickets (id bigserial primary key, note text)";
        node.execute(DATABASE, table).await?;
    }
    fill(cluster.node("sikorsky"), 10).await?;
    let mut dry = cluster.as_admin("init", &["--dry-run", "--stride"]);
    let plan = cluster.agent(&dry.iter().map(String::as_str).collect::<Vec<_>>()).await?.expect_code(0)?.stdout;
    let said = "keys that two nodes would hand out both: stillebot.tickets.id; ";
    ensure!(plan.contains(&format!("{said}they get strides at the end")), "{plan}");
    dry.pop();
    let plan = cluster.agent(&dry.iter().map(String::as_str).collect::<Vec<_>>()).await?.expect_code(0)?.stdout;
    ensure!(plan.contains(&format!("{said}`init --stride`")), "{plan}");

    // Also of nodes that replicate already.
    for (options, outcome) in
        [(&["--yes"][..], "done"), (&["--yes", "--stride"], "nothing_to_do"), (&["--yes", "--stride"], "nothing_to_do")]
    {
        let run = init(&cluster, options).await?.expect_code(0)?;
        ensure!(run.json["outcome"] == outcome, "{run:#?}");
        ensure!(run.json["stride"].is_object() == (options.len() > 1), "{run:#?}");
        let increments = async |node: &Server| {
            let query = "select seqincrement from pg_sequence where seqrelid = 'stillebot.tickets_id_seq'::regclass";
            node.value::<i64>(DATABASE, query).await
        };
        for node in cluster.nodes() {
            ensure!(increments(node).await? == if options.len() > 1 { 16 } else { 1 }, "{}", node.name());
        }
    }
    for node in cluster.nodes() {
        let insert = "insert into stillebot.tickets (note) select 'x' from generate_series(1, 20)";
        node.connect("rosuav", DATABASE).await?.batch_execute(insert).await?;
    }
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    cluster.finish().await
}
