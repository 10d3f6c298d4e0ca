//! `stillebot-agent check`: each thing that is not as it must be is found, and what is said to mend it does.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Uid;
use serde_json::Value;
use stillebot_tests::cluster::{DATABASE, active_name};
use stillebot_tests::{Cluster, wait_until};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::process::Command;

use crate::PATIENCE;
use crate::runs::agent;

/// A pair about which there is nothing to say.
async fn good_pair() -> Result<Cluster> {
    Cluster::builder().config("max_slot_wal_keep_size", "4GB").start().await
}

/// What `check` finds, but for what is as it should be.
async fn troubles(cluster: &Cluster) -> Result<Vec<Value>> {
    let run = agent(cluster, &["check"]).await?;
    let findings = run.json["findings"].as_array().with_context(|| format!("no findings: {run:#?}"))?;
    let troubles: Vec<Value> = findings.iter().filter(|finding| finding["verdict"] != "ok").cloned().collect();
    let worst = if troubles.iter().any(|finding| finding["verdict"] == "error") { 1 } else { 0 };
    ensure!(run.code == Some(worst), "the exit code is not {worst}: {run:#?}");
    Ok(troubles)
}

/// Subject, node and verdict of each.
fn told(troubles: &[Value]) -> BTreeSet<String> {
    let word = |trouble: &Value, key: &str| trouble[key].as_str().unwrap_or_default().to_owned();
    troubles.iter().map(|t| format!("{} {} {}", word(t, "node"), word(t, "verdict"), word(t, "subject"))).collect()
}

/// Does what the findings say, to the letter. What a shell has to do is left.
async fn mend(cluster: &Cluster, troubles: &[Value]) -> Result<()> {
    let mut restarts = BTreeSet::new();
    for remedy in troubles.iter().flat_map(|trouble| trouble["remedy"].as_array().into_iter().flatten()) {
        let word = |key: &str| remedy[key].as_str().with_context(|| format!("no {key} in {remedy}"));
        let node = cluster.node(word("node")?);
        match word("kind")? {
            "sql" => node.execute(DATABASE, word("statement")?).await?,
            "file" => {
                let (path, line) = (word("path")?, word("line")?);
                let text = fs::read_to_string(path)?;
                let mut lines: Vec<&str> = text.lines().collect();
                let index = |key: &str| remedy[key].as_u64().map(|number| number as usize - 1);
                match (index("instead_of"), index("before")) {
                    (Some(number), _) => lines[number] = line,
                    (None, Some(number)) => lines.insert(number, line),
                    (None, None) => lines.push(line),
                }
                fs::write(path, lines.join("\n") + "\n")?;
            }
            "restart" => drop(restarts.insert(node.name())),
            "shell" => {}
            kind => bail!("a remedy of no known kind: {kind}"),
        }
    }
    for node in restarts {
        cluster.node(node).restart().await?;
    }
    Ok(())
}

/// Exactly these things are found, and nothing any more once they are mended. Some show only when others are mended.
async fn assert_found_and_mended(cluster: &Cluster, what: &str, expected: &[&str]) -> Result<()> {
    let mut found = troubles(cluster).await?;
    let wanted: BTreeSet<String> = expected.iter().map(|&line| line.to_owned()).collect();
    ensure!(told(&found) == wanted, "{what}: not {wanted:?}, but {found:#?}");
    for _ in 0..3 {
        mend(cluster, &found).await.with_context(|| format!("{what}: mending {found:#?}"))?;
        found = troubles(cluster).await?;
        if found.is_empty() {
            return Ok(());
        }
    }
    bail!("{what}: mended, and still {found:#?}")
}

#[tokio::test]
async fn a_good_pair_is_all_well() -> Result<()> {
    let cluster = good_pair().await?;
    let found = troubles(&cluster).await?;
    ensure!(found.is_empty(), "{found:#?}");
    let shown = cluster.agent(&["check"]).await?.expect_code(0)?.stdout;
    ensure!(shown.lines().count() == 2, "a line a node: {shown}");
    let shown = cluster.agent(&["check", "--verbose"]).await?.expect_code(0)?.stdout;
    for line in
        ["ok       wal_level: logical", "ok       clock gideon: ", "ok       pg_hba_replication gideon: line 4: "]
    {
        ensure!(shown.contains(line), "no {line:?} in {shown}");
    }
    cluster.finish().await
}

/// A command as a superuser through the servers' sockets.
fn through_sockets(cluster: &Cluster, command: &str) -> Vec<String> {
    let places = cluster
        .nodes()
        .iter()
        .map(|node| format!("--via={}={}:{}", node.name(), node.socket_directory().display(), node.port()));
    std::iter::once(command.to_owned()).chain(places).collect()
}

#[tokio::test]
async fn servers_that_nobody_has_set_up_are_told_all_that_init_needs_and_after_it_init_runs() -> Result<()> {
    let cluster = Cluster::builder()
        .bare()
        .config("wal_level", "replica")
        .config("track_commit_timestamp", "off")
        .config("ssl_ca_file", "")
        .config("listen_addresses", "")
        .config("shared_preload_libraries", "")
        .start()
        .await?;
    let run = async |command: &str, more: &[&str]| {
        let words = through_sockets(&cluster, command);
        agent(&cluster, &words.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>()).await
    };
    agent(&cluster, &["check"]).await?.expect_code(69)?;
    let refused = run("init", &["--yes"]).await?.expect_code(1)?;
    let detail = refused.json["detail"].as_str().context("no detail")?;
    for line in [
        "gideon: wal_level: replica",
        "  mend:   alter system set wal_level = 'logical';",
        "  mend:   restart the server",
    ] {
        ensure!(detail.lines().any(|found| found == line), "no {line:?} in {refused:#?}");
    }
    let check = run("check", &[]).await?.expect_code(1)?;
    let findings = check.json["findings"].as_array().context("no findings")?;
    let of_file = |finding: &&Value| {
        finding["verdict"] == "error"
            && finding["remedy"][0]["statement"].as_str().is_some_and(|text| text.starts_with("alter system"))
    };
    let settings: Vec<Value> = findings.iter().filter(of_file).cloned().collect();
    let subjects =
        ["wal_level", "track_commit_timestamp", "ssl_ca_file", "listen_addresses", "shared_preload_libraries"];
    let wanted: BTreeSet<String> = ["sikorsky", "gideon"]
        .iter()
        .flat_map(|node| subjects.map(|subject| format!("{node} error {subject}")))
        .collect();
    ensure!(told(&settings) == wanted, "{settings:#?}");
    mend(&cluster, &settings).await?;
    run("init", &["--yes"]).await?.expect_code(0)?;
    cluster.node("gideon").execute(DATABASE, "insert into stillebot.raids values (1, 2)").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    let found = troubles(&cluster).await?;
    ensure!(found.iter().all(|finding| finding["verdict"] != "error"), "{found:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn before_the_agent_can_log_in_check_says_how_to_look_nevertheless() -> Result<()> {
    let cluster = Cluster::builder().bare().start().await?;
    cluster.expect_log(" 28000 ");
    cluster.expect_log("Connection matched");
    let run = agent(&cluster, &["check"]).await?.expect_code(69)?;
    let line = &run.json["findings"][0];
    ensure!(line["subject"] == "connection", "{line:#}");
    ensure!(line["needed"].as_str().is_some_and(|text| text.contains("with --admin or --via")), "{line:#}");
    let words = cluster.as_admin("check", &[]);
    let run = agent(&cluster, &words.iter().map(String::as_str).collect::<Vec<_>>()).await?.expect_code(1)?;
    let findings = run.json["findings"].as_array().context("no findings")?;
    for subject in ["agent_role", "replication_role", "extension", "publication", "subscription"] {
        let found = findings.iter().filter(|line| line["subject"] == subject && line["verdict"] == "error").count();
        ensure!(found == 2, "{subject}: {findings:#?}");
    }
    cluster.finish().await
}

#[tokio::test]
async fn databases_of_another_encoding_or_collation_are_found() -> Result<()> {
    let cluster = Cluster::builder().bare().start().await?;
    // Certificates are looked at as the agent, who is not there yet.
    cluster.expect_log(" 28000 ");
    let gideon = cluster.node("gideon");
    for (other, expected, says) in [
        ("encoding 'UTF8' locale 'C.UTF-8'", "sikorsky warning collation", "lc_collate: C here, C.UTF-8 on gideon"),
        ("encoding 'LATIN1' locale 'C'", "sikorsky error encoding", "UTF8 here, LATIN1 on gideon"),
    ] {
        gideon.execute("postgres", "drop database stillebot").await?;
        let create = format!("create database stillebot owner rosuav template template0 {other}");
        gideon.execute("postgres", &create).await?;
        let words = cluster.as_admin("check", &[]);
        let run = agent(&cluster, &words.iter().map(String::as_str).collect::<Vec<_>>()).await?.expect_code(1)?;
        let findings = run.json["findings"].as_array().context("no findings")?;
        let alike = |finding: &&Value| matches!(finding["subject"].as_str(), Some("collation" | "encoding"));
        let differing: Vec<Value> =
            findings.iter().filter(alike).filter(|finding| finding["verdict"] != "ok").cloned().collect();
        ensure!(told(&differing) == BTreeSet::from([expected.to_owned()]), "{other}: {differing:#?}");
        ensure!(differing[0]["found"].as_str().is_some_and(|text| text.contains(says)), "{differing:#?}");
    }
    let words = cluster.as_admin("init", &["--yes"]);
    let run = agent(&cluster, &words.iter().map(String::as_str).collect::<Vec<_>>()).await?.expect_code(1)?;
    ensure!(run.json["detail"].as_str().is_some_and(|text| text.contains("UTF8 here, LATIN1 on gideon")), "{run:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn the_space_for_wal_is_what_the_file_system_has() -> Result<()> {
    let cluster = good_pair().await?;
    let run = cluster.agent(&["check", "--verbose"]).await?.expect_code(0)?;
    ensure!(run.stdout.matches("ok       disk_space: ").count() == 2, "{}", run.stdout);
    let gideon = cluster.node("gideon");
    let free: i64 = gideon.value(DATABASE, "select multihome.free_space()").await?;
    let volume = nix::sys::statvfs::statvfs(&gideon.data_directory().join("pg_wal"))?;
    let seen = volume.blocks_available() as i64 * volume.fragment_size() as i64;
    ensure!(free > 0 && (free - seen).abs() < 4 << 30, "{free} bytes, and not {seen}");
    cluster.finish().await
}

#[tokio::test]
async fn what_is_wrong_with_roles_is_found_and_mended() -> Result<()> {
    let cluster = good_pair().await?;
    for (statement, expected) in [
        ("alter role replicator superuser", &["gideon warning replication_role"][..]),
        ("alter role replicator noreplication", &["gideon error replication_role"]),
        ("revoke pg_read_all_data from replicator", &["gideon error replication_reads"]),
        ("alter role stillebot_agent superuser", &["gideon warning agent_role"]),
        ("revoke execute on function multihome.up(boolean) from stillebot_agent", &["gideon error agent_grants"]),
        ("revoke update on stillebot.settings from stillebot_agent", &["gideon error agent_grants"]),
        (
            "revoke pg_monitor from stillebot_agent; grant pg_read_all_settings to stillebot_agent",
            &["gideon error agent_grants"],
        ),
        (
            "revoke execute on function pg_hba_file_rules() from stillebot_agent",
            &["gideon error agent_grants", "gideon unknown pg_hba"],
        ),
        (
            "revoke execute on function multihome.free_space() from stillebot_agent",
            &["gideon error agent_grants", "gideon unknown disk_space"],
        ),
        ("revoke execute on function pg_ident_file_mappings() from stillebot_agent", &["gideon error agent_grants"]),
        (
            "revoke execute on function multihome.connections() from stillebot_agent",
            &["gideon error agent_grants", "gideon unknown subscription_connection"],
        ),
    ] {
        cluster.node("gideon").execute(DATABASE, statement).await?;
        assert_found_and_mended(&cluster, statement, expected).await?;
    }
    cluster.configure_agent("\n[schema]\nrole = \"rosuav\"\n")?;
    let expected = ["sikorsky error agent_grants", "gideon error agent_grants"];
    assert_found_and_mended(&cluster, "acting as the tables' owner", &expected).await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_is_wrong_with_tables_is_found_and_mended() -> Result<()> {
    let cluster = good_pair().await?;
    for (statement, verdict) in [
        ("create table stillebot.extra (a integer)", "error replica_identity"),
        ("create table stillebot.extra (a integer not null unique)", "error replica_identity"),
        (
            "create table stillebot.extra (a integer primary key); alter table stillebot.extra replica identity nothing",
            "error replica_identity",
        ),
        ("create table stillebot.extra (a integer primary key deferrable)", "error deferrable_key"),
        ("create table stillebot.extra (a integer unique deferrable)", "error deferrable_key"),
        ("create unlogged table stillebot.extra (a integer primary key)", "warning unlogged_table"),
        (
            "create table stillebot.extra (a integer primary key) partition by range (a);
          create table stillebot.part partition of stillebot.extra default;
          alter table stillebot.part replica identity nothing",
            "error replica_identity",
        ),
    ] {
        for node in cluster.nodes() {
            node.execute(DATABASE, statement).await?;
        }
        let expected = [format!("sikorsky {verdict}"), format!("gideon {verdict}")];
        assert_found_and_mended(&cluster, statement, &[&expected[0], &expected[1]]).await?;
        for node in cluster.nodes() {
            node.execute(DATABASE, "drop table stillebot.extra").await?;
        }
    }
    cluster.finish().await
}

#[tokio::test]
async fn tables_that_are_not_alike_are_found() -> Result<()> {
    let cluster = good_pair().await?;
    for (here, there, expected, says) in [
        (
            "create table stillebot.extra (a integer primary key)",
            "select 1",
            "gideon error table_missing",
            "sikorsky only",
        ),
        (
            "create table stillebot.extra (a integer primary key, b text)",
            "create table stillebot.extra (a integer primary key)",
            "sikorsky error table_differs",
            "b is on sikorsky only",
        ),
        (
            "create table stillebot.extra (a integer primary key, b text not null)",
            "create table stillebot.extra (a bigint primary key, b text)",
            "sikorsky error table_differs",
            "a is integer on sikorsky, bigint on gideon, b is not null on sikorsky only",
        ),
        (
            "create table stillebot.extra (a integer primary key, b text not null);
             create unique index extra_b on stillebot.extra (lower(b)) where a > 0",
            "create table stillebot.extra (a integer primary key, b text not null);
             create unique index extra_b on stillebot.extra (lower(b)) where a > 1",
            "sikorsky error table_differs",
            "unique (lower(b) where (a > 0)) is on sikorsky only, unique (lower(b) where (a > 1)) is on gideon only",
        ),
        (
            "create table stillebot.extra (a integer primary key, b text unique)",
            "create table stillebot.extra (a integer primary key, b text unique deferrable)",
            "sikorsky warning table_differs",
            "unique (b) is deferrable on gideon only",
        ),
        (
            "create table stillebot.extra (a integer primary key, b text not null unique)",
            "create table stillebot.extra (a integer primary key, b text not null unique);
             alter table stillebot.extra replica identity using index extra_b_key",
            "sikorsky error table_differs",
            "replica identity is (a) on sikorsky, (b) on gideon",
        ),
        (
            "create table stillebot.extra (a integer primary key)",
            "create table stillebot.extra (a integer primary key); alter table stillebot.extra replica identity full",
            "sikorsky warning table_differs",
            "replica identity is (a) on sikorsky, full on gideon",
        ),
        (
            "alter table stillebot.raids enable row level security",
            "select 1",
            "sikorsky warning row_security",
            "stillebot.raids",
        ),
    ] {
        cluster.node("sikorsky").execute(DATABASE, here).await?;
        cluster.node("gideon").execute(DATABASE, there).await?;
        let found = troubles(&cluster).await?;
        ensure!(told(&found) == BTreeSet::from([expected.to_owned()]), "{here}: {found:#?}");
        ensure!(found[0]["found"].as_str().is_some_and(|text| text.contains(says)), "{says}: {found:#?}");
        for node in cluster.nodes() {
            node.execute(
                DATABASE,
                "drop table if exists stillebot.extra; alter table stillebot.raids disable row level security",
            )
            .await?;
        }
    }
    cluster.finish().await
}

#[tokio::test]
async fn keys_that_two_sequences_would_give_twice_are_found_and_given_strides() -> Result<()> {
    let cluster = good_pair().await?;
    for (statement, table) in [
        ("create table stillebot.tickets (id serial primary key, note text)", "stillebot.tickets"),
        (
            "create table stillebot.\"Runs\" (\"Id\" bigint generated by default as identity primary key)",
            "stillebot.\"Runs\"",
        ),
    ] {
        for node in cluster.nodes() {
            node.execute(DATABASE, statement).await?;
        }
        cluster.agent(&["refresh"]).await?.expect_code(0)?;
        let insert = format!("insert into {table} default values");
        cluster.node("sikorsky").execute(DATABASE, &format!("{insert}; {insert}; {insert}")).await?;
        cluster.wait_replicated().await?;
        let found = troubles(&cluster).await?;
        ensure!(
            told(&found) == BTreeSet::from(["sikorsky warning sequence_key".to_owned()]),
            "{statement}: {found:#?}"
        );
        ensure!(found[0]["remedy"][0]["command"] == "stillebot-agent sequences stride", "{found:#?}");
        cluster.agent(&["sequences", "stride"]).await?.expect_code(0)?;
        let found = troubles(&cluster).await?;
        ensure!(found.is_empty(), "{statement}: {found:#?}");
        // What was said is true: both write at the same time, and no two rows collide.
        for node in cluster.nodes() {
            node.execute(DATABASE, &format!("{insert}; {insert}; {insert}; {insert}")).await?;
        }
        cluster.wait_replicated().await?;
        let rows: i64 = cluster.node("gideon").value(DATABASE, &format!("select count(*) from {table}")).await?;
        ensure!(rows == 11, "{rows} rows of 11");
    }
    // An ordinary role does not see where a sequence stands, and need not.
    cluster.assert_identical().await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_is_wrong_with_publications_and_subscriptions_is_found_and_mended() -> Result<()> {
    let cluster = good_pair().await?;
    // Without its publication, or with a new connection, a subscription stops and comes back.
    cluster.expect_log("does not exist");
    cluster.expect_log("terminating logical replication worker due to administrator command");
    cluster.expect_log("WARNING:  subscription was created, but is not connected");
    cluster.expect_log("has origin = any");
    // A worker is back before the one before it has let go of the origin, or of the slot.
    cluster.expect_log(" 55006 ");
    let other = "create table stillebot.extra (a integer primary key)";
    for node in cluster.nodes() {
        node.execute(DATABASE, other).await?;
    }
    cluster.agent(&["refresh"]).await?.expect_code(0)?;
    for (statements, expected) in [
        (&["alter publication multihome set (publish = 'insert, update')"][..], &["gideon error publication"][..]),
        (&["drop publication multihome"], &["gideon error publication"]),
        (
            &["begin; drop publication multihome; create publication multihome for table stillebot.extra; commit"],
            &["gideon error publication"],
        ),
        (&["alter subscription multihome disable"], &["gideon error subscription_enabled"]),
        (&["alter subscription multihome set (origin = any)"], &["gideon error subscription_origin"]),
        (&["alter subscription multihome set (streaming = parallel)"], &["gideon error subscription_streaming"]),
        (
            &["alter subscription multihome set (disable_on_error = true)"],
            &["gideon warning subscription_disable_on_error"],
        ),
        (
            &["alter subscription multihome set publication other with (refresh = false)"],
            &["gideon error subscription_publication"],
        ),
        (
            &["do $$ begin execute format('alter subscription multihome connection %L', \
               (select replace(subconninfo, 'verify-full', 'require') from pg_subscription)); end $$"],
            &["gideon error subscription_connection"],
        ),
        (
            &["do $$ begin execute format('alter subscription multihome connection %L', \
               (select replace(subconninfo, 'tcp_user_timeout=5000', '') from pg_subscription)); end $$"],
            &["gideon warning subscription_connection"],
        ),
        (&["drop subscription multihome"], &["gideon error subscription"]),
        (
            &["create subscription stray connection 'host=127.0.0.1 port=1' publication p \
               with (connect = false, slot_name = none, enabled = false)"],
            &["gideon warning subscription_unknown"],
        ),
        (&["select pg_create_logical_replication_slot('stray', 'pgoutput')"], &["gideon warning slot_unused"]),
    ] {
        for statement in statements {
            cluster.node("gideon").execute(DATABASE, statement).await?;
        }
        assert_found_and_mended(&cluster, statements[0], expected).await?;
    }
    // And it is a pair that works.
    cluster.node("gideon").execute(DATABASE, "insert into stillebot.extra values (1)").await?;
    cluster.node("sikorsky").execute(DATABASE, "insert into stillebot.extra values (2)").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    cluster.finish().await
}

#[tokio::test]
async fn passwords_of_subscriptions_are_not_shown_to_the_agent() -> Result<()> {
    let cluster = good_pair().await?;
    let gideon = cluster.node("gideon");
    let agent = gideon.connect("stillebot_agent", DATABASE).await?;
    for password in [
        "password=geheim",
        r"password='ge heim\' geheim'",
        r"password = geheim\ geheim",
        "password=ge'heim geheim=",
        "password=\"geheim",
    ] {
        let connection = format!("host=127.0.0.1 {password}").replace('\\', r"\\").replace('\'', "''");
        let create = format!(
            "create subscription stray connection E'{connection}' publication p \
             with (connect = false, slot_name = none, enabled = false, password_required = false)"
        );
        // Not all of these are right, and then there is no such subscription.
        if gideon.execute(DATABASE, &create).await.is_ok() {
            let row = agent
                .query_one("select conninfo from multihome.connections() where subscription = 'stray'", &[])
                .await?;
            let shown: String = row.get(0);
            ensure!(shown.contains("host=127.0.0.1") && shown.contains("***") && !shown.contains("heim"), "{shown}");
            gideon.execute(DATABASE, "drop subscription stray").await?;
        }
    }
    cluster.expect_log(" 42601 ");
    cluster.expect_log("WARNING:  subscription was created, but is not connected");
    cluster.expect_log("has origin = any");
    cluster.finish().await
}

#[tokio::test]
async fn what_is_wrong_with_pg_hba_is_found_and_mended() -> Result<()> {
    let cluster = good_pair().await?;
    let gideon = cluster.node("gideon");
    // A file with a line that is not understood is not loaded.
    cluster.expect_log(" F0000 ");
    cluster.expect_log("pg_hba.conf was not reloaded");
    let path = gideon.data_directory().join("pg_hba.conf");
    let good = fs::read_to_string(&path)?;
    for (text, expected) in [
        (
            good.replace("local   all         all  peer map=harness", "local all all trust"),
            &["gideon error pg_hba_line"][..],
        ),
        (good.clone() + "host all all 192.0.2.0/24 scram-sha-256\n", &["gideon warning pg_hba_line"]),
        (good.clone() + "hostssl other all 192.0.2.0/24 md5\n", &["gideon warning pg_hba_line"]),
        (good.clone() + "hostssl other all 192.0.2.0/24 trust\n", &["gideon error pg_hba_line"]),
        (good.clone() + "hostssl all all 0.0.0.0/0 cert\n", &["gideon warning pg_hba_line"]),
        (
            good.replace(
                "hostssl all         all  127.0.0.1/32  cert",
                "hostssl all replicator 127.0.0.1/32 cert map=nodes\nhostssl all all 127.0.0.1/32 cert",
            ),
            &["gideon error pg_hba_replication"],
        ),
        (good.clone() + "local replication all trust\n", &["gideon error pg_hba_line"]),
        (good.clone() + "hostssl stillebot all all cert\n", &["gideon warning pg_hba_line"]),
        (good.clone() + "hostssl all rosuav 0.0.0.0/0 cert\n", &["gideon warning pg_hba_line"]),
        (
            good.replace(
                "local   all         all  peer map=harness",
                "local all postgres reject\nlocal other all peer",
            ),
            &["gideon warning pg_hba_local"],
        ),
        (format!("hostssl all replicator all reject\n{good}"), &["gideon error pg_hba_replication"]),
        (
            good.replace(
                "hostssl all         all  127.0.0.1/32  cert",
                "hostssl all stillebot_agent 127.0.0.1/32 cert",
            ),
            &["gideon error pg_hba_replication"],
        ),
    ] {
        ensure!(text != good);
        fs::write(&path, &text)?;
        let found = troubles(&cluster).await?;
        ensure!(told(&found) == expected.iter().map(|&line| line.to_owned()).collect(), "{text}: {found:#?}");
        // The harness, too, comes through the socket as itself.
        let mended: Vec<Value> = found
            .into_iter()
            .map(|mut finding| {
                for remedy in finding["remedy"].as_array_mut().into_iter().flatten() {
                    if remedy["line"] == "local all all peer" {
                        remedy["line"] = "local all all peer map=harness".into();
                    }
                }
                finding
            })
            .collect();
        mend(&cluster, &mended).await?;
        let found = troubles(&cluster).await?;
        ensure!(found.is_empty(), "{text}: mended, and still {found:#?}");
        fs::write(&path, &good)?;
        gideon.reload().await?;
    }
    fs::write(&path, good.clone() + "hostssl all all 192.0.2.0/24 nonsense\n")?;
    let found = troubles(&cluster).await?;
    ensure!(told(&found) == BTreeSet::from(["gideon error pg_hba_line".to_owned()]), "{found:#?}");
    ensure!(found[0]["about"].as_str().is_some_and(|about| about.ends_with("pg_hba.conf line 6")), "{found:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn settings_are_found_and_are_right_after_what_is_said_and_a_restart() -> Result<()> {
    let cluster = Cluster::builder()
        .config("track_commit_timestamp", "off")
        .config("max_replication_slots", "2")
        .config("max_wal_senders", "2")
        .config("max_logical_replication_workers", "1")
        .config("max_worker_processes", "6")
        .start()
        .await?;
    cluster.node("gideon").config(&[("stillebot.node", "sikorsky")]).await?;
    cluster.node("gideon").execute(DATABASE, "alter system set max_connections = 150; ").await?;
    cluster.node("gideon").reload().await?;
    let common = [
        "error track_commit_timestamp",
        "warning max_replication_slots",
        "warning max_wal_senders",
        "warning max_logical_replication_workers",
        "warning max_worker_processes",
        "warning max_slot_wal_keep_size",
    ];
    let expected: Vec<String> = ["sikorsky", "gideon"]
        .into_iter()
        .flat_map(|node| common.map(|line| format!("{node} {line}")))
        .chain(["gideon warning stillebot.node".to_owned(), "gideon warning pending_restart".to_owned()])
        .collect();
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    assert_found_and_mended(&cluster, "settings", &expected).await?;
    cluster.wait_replicated().await?;
    cluster.finish().await
}

#[tokio::test]
async fn an_extension_that_is_missing_or_old_is_found_and_mended() -> Result<()> {
    let cluster = good_pair().await?;
    let gideon = cluster.node("gideon");
    for statements in
        ["drop extension stillebot", "drop extension stillebot; create extension stillebot version '0.3.0'"]
    {
        gideon.execute(DATABASE, statements).await?;
        let found = troubles(&cluster).await?;
        ensure!(told(&found).contains("gideon error extension"), "{statements}: {found:#?}");
        for _ in 0..2 {
            mend(&cluster, &troubles(&cluster).await?).await?;
        }
        let found = troubles(&cluster).await?;
        ensure!(found.is_empty(), "{statements}: mended, and still {found:#?}");
    }
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_does_not_answer_is_a_line_and_exit_code_69() -> Result<()> {
    let cluster = good_pair().await?;
    cluster.expect_log(" 08006 ");
    cluster.isolate("gideon").await?;
    let run = agent(&cluster, &["check"]).await?.expect_code(69)?;
    let findings = run.json["findings"].as_array().context("no findings")?;
    let missing = findings.iter().find(|finding| finding["subject"] == "connection").context("no line")?;
    ensure!(missing["node"] == "gideon" && missing["verdict"] == "error", "{missing:#}");
    ensure!(findings.iter().any(|finding| finding["node"] == "sikorsky" && finding["subject"] == "wal_level"));
    cluster.reconnect("gideon").await?;
    cluster.finish().await
}

// ---- addresses ----

/// An address where nobody says yes or no, as one that does not route: a listener whose queue is full.
struct Deaf {
    _listener: TcpListener,
    _queue: Vec<TcpStream>,
}

impl Deaf {
    async fn at(address: SocketAddr) -> Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address).with_context(|| format!("this test needs the loopback address {}", address.ip()))?;
        let listener = socket.listen(0)?;
        let mut queue = Vec::new();
        while let Ok(caller) = tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
            queue.push(caller?);
            ensure!(queue.len() < 16, "the queue of {address} does not fill");
        }
        Ok(Self { _listener: listener, _queue: queue })
    }
}

/// The agent, where names are what this file says. Such a place is root's to make, or anybody's who may be root of his own.
async fn agent_with_hosts(cluster: &Cluster, hosts: &str, arguments: &[&str]) -> Result<(Value, Duration)> {
    let path = cluster.agent_configuration().with_file_name("hosts");
    fs::write(&path, hosts)?;
    let plain = cluster.agent_command(arguments);
    let plain = plain.as_std();
    let mut command = Command::new("unshare");
    command.arg("--mount");
    if !Uid::effective().is_root() {
        command.arg("--map-root-user");
    }
    command.args(["sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]).arg(&path);
    command.arg(plain.get_program()).args(plain.get_args()).arg("--json");
    command.stdin(Stdio::null()).kill_on_drop(true);
    let began = Instant::now();
    let output = command.output().await.context("unshare")?;
    let took = began.elapsed();
    let json = serde_json::from_slice(&output.stdout).with_context(|| format!("not a document: {output:?}"))?;
    Ok((json, took))
}

#[tokio::test]
async fn a_dead_address_costs_the_agent_a_second_and_check_says_so() -> Result<()> {
    let cluster = Cluster::builder().direct().config("max_slot_wal_keep_size", "4GB").start().await?;
    let sikorsky = cluster.node("sikorsky");
    let port = sikorsky.port();
    let _deaf = Deaf::at(format!("[::1]:{port}").parse()?).await?;
    let name = active_name("sikorsky");
    let hosts = format!("::1 {name}\n127.0.0.1 {name}\n");
    let good = fs::read_to_string(cluster.agent_configuration())?;
    // The first node of the file is sikorsky.
    let named = good.replacen("host        = \"127.0.0.1\"", &format!("host        = \"{name}\""), 1);
    let any = named.replacen("family      = \"ipv4\"", "family      = \"any\"", 1);
    ensure!(named != good && any != named);

    fs::write(cluster.agent_configuration(), &any)?;
    let (status, took) = agent_with_hosts(&cluster, &hosts, &["status"]).await?;
    ensure!(status["nodes"][0]["reachable"] == true, "{status:#}");
    let second = Duration::from_secs(1);
    ensure!(took >= second && took < 3 * second, "a dead address cost {took:?}");

    let (check, _) = agent_with_hosts(&cluster, &hosts, &["check"]).await?;
    let of = |subject: &str| {
        let findings = check["findings"].as_array().into_iter().flatten();
        findings.clone().find(|finding| finding["subject"] == subject && finding["node"] == "sikorsky").cloned()
    };
    for (subject, costs, needed) in [
        ("agent_addresses", "the agent may lose 1 s at each connect", "family = \"ipv4\"".to_owned()),
        (
            "replication_addresses",
            "subscriptions may lose 5 s at each connect",
            "a name that has only 127.0.0.1".to_owned(),
        ),
    ] {
        let line = of(subject).with_context(|| format!("no {subject}: {check:#}"))?;
        let found = line["found"].as_str().unwrap_or_default();
        ensure!(line["verdict"] == "warning", "{line:#}");
        ensure!(
            found.starts_with("::1 does not answer within 1 s, 127.0.0.1 answers: ") && found.ends_with(costs),
            "{found}"
        );
        ensure!(line["needed"].as_str().is_some_and(|text| text.contains(&needed)), "{line:#}");
    }

    // As it said: the family for the agent, a name with one address for the peers.
    let mended = named.replacen("[node.replication]", "[node.replication]\nhost = \"127.0.0.1\"", 1);
    fs::write(cluster.agent_configuration(), &mended)?;
    let (check, _) = agent_with_hosts(&cluster, &hosts, &["check"]).await?;
    let findings = check["findings"].as_array().context("no findings")?;
    let troubles: Vec<&Value> = findings.iter().filter(|finding| finding["verdict"] != "ok").collect();
    ensure!(troubles.is_empty(), "{troubles:#?}");
    let (_, took) = agent_with_hosts(&cluster, &hosts, &["status"]).await?;
    ensure!(took < second, "without the dead address it took {took:?}");
    cluster.finish().await
}

#[tokio::test]
async fn a_subscription_gives_up_a_dead_address_and_takes_the_next() -> Result<()> {
    let cluster = Cluster::builder().direct().start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let port = sikorsky.port();
    let _deaf = Deaf::at(format!("[::1]:{port}").parse()?).await?;
    cluster.expect_log(" 55006 "); // A worker is back before the one before it has let go.
    cluster.expect_log("terminating logical replication worker due to administrator command");
    // What libpq makes of a name with two addresses, without a resolver: the same name twice.
    let connection: String = gideon.value(DATABASE, "select subconninfo from pg_subscription").await?;
    let dead_first = connection.replace("host=127.0.0.1 ", "host=localhost,localhost hostaddr=::1,127.0.0.1 ");
    ensure!(dead_first != connection && dead_first.contains("tcp_user_timeout=5000"), "{connection}");
    let began = Instant::now();
    gideon.execute(DATABASE, &format!("alter subscription multihome connection '{dead_first}'")).await?;
    let from_localhost = "select count(*) from pg_stat_subscription s join pg_subscription p on p.oid = s.subid \
         where s.pid is not null and s.received_lsn is not null and p.subconninfo like '%localhost%'";
    wait_until("the subscription to be connected", PATIENCE, || async {
        Ok((gideon.value::<i64>(DATABASE, from_localhost).await? == 1).then_some(()))
    })
    .await?;
    sikorsky.execute(DATABASE, "insert into stillebot.raids values (1, 2)").await?;
    cluster.wait_replicated().await?;
    let took = began.elapsed();
    ensure!(took >= Duration::from_secs(5), "the dead address was not tried: {took:?}");
    cluster.finish().await
}
