//! The agent's smaller verbs, what it says, and how it gets to the nodes.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stillebot_tests::cluster::{DATABASE, active_name};
use stillebot_tests::{AgentOutput, Authority, Cluster, wait_until};
use tokio::process::Command;

use crate::PATIENCE;
use crate::runs::{active_side, agent, assert_settled, is_writable, status, writable};

/// Runs the agent with another configuration, and these environment variables of all that it reads.
async fn agent_with(
    cluster: &Cluster,
    configuration: &str,
    variables: &[(&str, &str)],
    arguments: &[&str],
) -> Result<AgentOutput> {
    let path = cluster.agent_configuration().with_file_name("other.toml");
    fs::write(&path, configuration)?;
    agent_at(cluster, &path, variables, arguments).await
}

async fn agent_at(
    cluster: &Cluster,
    configuration: &Path,
    variables: &[(&str, &str)],
    arguments: &[&str],
) -> Result<AgentOutput> {
    let mut command = Command::new(cluster.agent_command(&[]).as_std().get_program());
    command.arg("--config").arg(configuration).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    for variable in ["PGUSER", "PGDATABASE", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGPASSFILE", "SSL_CERT_FILE"] {
        command.env_remove(variable);
    }
    let output = command.envs(variables.iter().copied()).output().await?;
    Ok(AgentOutput {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
    })
}

/// The configuration as the cluster has it.
fn configuration(cluster: &Cluster) -> Result<String> {
    Ok(fs::read_to_string(cluster.agent_configuration())?)
}

fn node<'a>(status: &'a Value, name: &str) -> Result<&'a Value> {
    let nodes = status["nodes"].as_array().context("no nodes")?;
    nodes.iter().find(|node| node["name"] == name).with_context(|| format!("no {name} in {status:#}"))
}

/// A configuration with other lines in the `[[node]]` of that name.
fn with_node(configuration: &str, name: &str, change: impl Fn(&str) -> Option<String>) -> Result<String> {
    let mut lines = Vec::new();
    let mut inside = false;
    for line in configuration.lines() {
        if line.starts_with("[[") {
            inside = false;
        }
        inside |= line.starts_with("name ") && line.contains(&format!("\"{name}\""));
        lines.push(inside.then(|| change(line)).flatten().unwrap_or_else(|| line.to_owned()));
    }
    let changed = lines.join("\n");
    ensure!(changed.trim() != configuration.trim(), "nothing to change for {name}");
    Ok(changed)
}

// ---- status ----

#[tokio::test]
async fn status_shows_all_nodes_and_who_is_connected() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 25006 ");
    let reason = "the disks are being changed";
    agent(&cluster, &["down", "gideon", "--reason", reason]).await?.expect_code(0)?;
    let bot = cluster.node("sikorsky").endpoint().connect("rosuav", DATABASE, "stillebot").await?;
    bot.batch_execute("begin; insert into stillebot.raids values (1, 2)").await?;

    let shown = status(&cluster).await?;
    ensure!(shown["command"] == "status" && shown["unfinished_hop"].is_null(), "{shown:#}");
    let (sikorsky, gideon) = (node(&shown, "sikorsky")?, node(&shown, "gideon")?);
    for (node, state, active) in [(sikorsky, "up", true), (gideon, "down", false)] {
        ensure!(node["reachable"] == true && node["is_active"] == active, "{node:#}");
        ensure!(node["active"] == active_name("sikorsky"), "{node:#}");
        ensure!(node["state"]["state"] == state, "{node:#}");
        ensure!(node["server_version"].is_string() && node["extension"]["version"].is_string(), "{node:#}");
        ensure!(node["subscriptions"][0]["working"] == true && node["senders"][0]["connected"] == true, "{node:#}");
    }
    ensure!(gideon["state"]["reason"] == reason && gideon["state"]["by"] == "stillebot_agent", "{gideon:#}");
    ensure!(gideon["state"]["since"].is_string(), "{gideon:#}");
    ensure!(sikorsky["state"]["writers"] == 1 && gideon["state"]["writers"] == 0, "{shown:#}");
    let sessions = sikorsky["sessions"].as_array().context("no sessions")?;
    let bots = json!({"application_name": "stillebot", "client": "127.0.0.1", "user": "rosuav",
        "state": "idle in transaction", "sessions": 1});
    ensure!(sessions.contains(&bots), "{sessions:#?}");
    ensure!(sessions.iter().all(|session| session["application_name"] != "stillebot-agent"), "{sessions:#?}");
    let replication = shown["replication"].as_array().context("no replication")?;
    for (from, to) in [("sikorsky", "gideon"), ("gideon", "sikorsky")] {
        let direction = replication.iter().find(|d| d["from"] == from && d["to"] == to).context("direction")?;
        ensure!(direction["connected"] == true && direction["trouble"].is_null(), "{direction:#}");
        ensure!(direction["bytes_behind"].is_u64() && direction["last_message_age"].is_number(), "{direction:#}");
    }
    ensure!(shown["verdict"]["ready"] == true, "{shown:#}");

    // And for people, without a colour, as this is no terminal.
    let text = cluster.agent(&["status"]).await?.expect_code(0)?.stdout;
    ensure!(!text.contains('\u{1b}'), "{text:?}");
    for part in
        [reason, "stillebot_agent", "sikorsky -> gideon", "rosuav", "127.0.0.1", "ready to hop: sikorsky is writable"]
    {
        ensure!(text.contains(part), "{part}:\n{text}");
    }
    ensure!(text.contains(&format!("{} (this node)", active_name("sikorsky"))), "{text}");
    drop(bot);
    cluster.finish().await
}

#[tokio::test]
async fn an_unreachable_node_is_a_line_of_status() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.agent_link("gideon").cut().await?;
    let run = agent(&cluster, &["status"]).await?.expect_code(69)?;
    let gideon = node(&run.json, "gideon")?;
    ensure!(gideon["reachable"] == false && gideon["error"].is_string() && gideon["hint"].is_string(), "{run:#?}");
    let sikorsky = node(&run.json, "sikorsky")?;
    ensure!(sikorsky["state"]["state"] == "up" && sikorsky["senders"][0]["connected"] == true, "{run:#?}");
    ensure!(run.json["verdict"]["ready"] == false, "{run:#?}");
    let text = cluster.agent(&["status"]).await?.expect_code(69)?.stdout;
    let line = text.lines().find(|line| line.trim_start().starts_with("gideon")).context(text.clone())?;
    ensure!(line.contains("unreachable"), "{text}");
    ensure!(text.lines().any(|line| line.trim_start().starts_with("sikorsky  up ")), "{text}");
    ensure!(text.contains("not ready to hop: gideon cannot be reached"), "{text}");

    // One that swallows everything does not hold the others up for long.
    cluster.agent_link("gideon").freeze().await?;
    let began = Instant::now();
    let run = agent(&cluster, &["status"]).await?.expect_code(69)?;
    ensure!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    ensure!(node(&run.json, "sikorsky")?["state"]["state"] == "up", "{run:#?}");
    cluster.agent_link("gideon").heal().await?;
    cluster.finish().await
}

#[tokio::test]
async fn status_of_a_server_without_the_extension_says_what_is_missing() -> Result<()> {
    let cluster = Cluster::builder().without_extension().start().await?;
    let shown = agent(&cluster, &["status"]).await?.expect_code(0)?.json;
    for name in ["sikorsky", "gideon"] {
        let node = node(&shown, name)?;
        ensure!(node["extension"] == "missing" && node["state"].is_null(), "{node:#}");
        ensure!(node["active"] == active_name("sikorsky"), "what can be told is told: {node:#}");
        ensure!(node["senders"][0]["connected"] == true, "{node:#}");
    }
    ensure!(shown["verdict"]["ready"] == false, "{shown:#}");
    let text = cluster.agent(&["status"]).await?.expect_code(0)?.stdout;
    ensure!(text.contains("shared_preload_libraries") && text.contains("create extension stillebot"), "{text}");
    for command in [&["hop", "gideon"][..], &["up", "gideon"], &["down", "gideon"]] {
        let run = agent(&cluster, command).await?.expect_code(1)?;
        ensure!(run.says("extension"), "{command:?}: {run:#?}");
    }
    cluster.finish().await
}

#[tokio::test]
async fn status_goes_on_watching_until_it_is_told_to_stop() -> Result<()> {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let cluster = Cluster::start().await?;
    let mut child = cluster.agent_command(&["status", "--watch", "0.2", "--json"]).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
    let mut next = async || -> Result<Value> {
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await??.context("it ended")?;
        Ok(serde_json::from_str(&line)?)
    };
    ensure!(node(&next().await?, "gideon")?["state"]["state"] == "up");
    agent(&cluster, &["down", "gideon"]).await?.expect_code(0)?;
    while node(&next().await?, "gideon")?["state"]["state"] != "down" {}
    let pid = nix::unistd::Pid::from_raw(child.id().context("it ended")?.try_into()?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    ensure!(tokio::time::timeout(PATIENCE, child.wait()).await??.success());
    cluster.finish().await
}

// ---- down, up, activate, refresh ----

#[tokio::test]
async fn up_makes_the_only_writable_node_the_only_one_and_up_of_both_clears_that() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 25006 ");
    let run = agent(&cluster, &["down", "gideon"]).await?.expect_code(0)?;
    ensure!(run.json["changed"] == true && run.json["lsn"].is_string(), "{run:#?}");
    let run = agent(&cluster, &["down", "gideon"]).await?.expect_code(0)?;
    ensure!(run.json["changed"] == false, "{run:#?}");
    // It was one of two; that it is the only one now has to be said.
    ensure!(node(&status(&cluster).await?, "sikorsky")?["state"]["sole"] == false);
    agent(&cluster, &["up", "sikorsky"]).await?.expect_code(0)?;
    assert_settled(&cluster, &["sikorsky"]).await?;
    agent(&cluster, &["up", "gideon"]).await?.expect_code(0)?;
    assert_settled(&cluster, &["sikorsky", "gideon"]).await?;

    // Both down, as for a change of the schema: the first one up is the only one until the other follows.
    for name in ["sikorsky", "gideon"] {
        agent(&cluster, &["down", name]).await?.expect_code(0)?;
    }
    ensure!(writable(&cluster).await?.is_empty());
    agent(&cluster, &["up", "sikorsky"]).await?.expect_code(0)?;
    assert_settled(&cluster, &["sikorsky"]).await?;
    cluster.node("sikorsky").kill().await?;
    cluster.node("sikorsky").start().await?;
    ensure!(writable(&cluster).await?.is_empty());
    agent(&cluster, &["up", "sikorsky"]).await?.expect_code(0)?;
    agent(&cluster, &["up", "gideon"]).await?.expect_code(0)?;
    for node in cluster.nodes() {
        node.kill().await?;
        node.start().await?;
    }
    assert_settled(&cluster, &["sikorsky", "gideon"]).await?;

    // Two writable nodes that do not replicate would drift apart.
    agent(&cluster, &["down", "gideon"]).await?.expect_code(0)?;
    cluster.link("sikorsky", "gideon").cut().await?;
    wait_until("the subscriber to notice", PATIENCE, || async {
        let working = "select count(pid) from pg_stat_subscription where relid is null";
        Ok((cluster.node("gideon").value::<i64>(DATABASE, working).await? == 0).then_some(()))
    })
    .await?;
    let run = agent(&cluster, &["up", "gideon"]).await?.expect_code(1)?;
    ensure!(run.says("replication does not flow"), "{run:#?}");
    ensure!(writable(&cluster).await? == ["sikorsky"]);
    cluster.link("sikorsky", "gideon").heal().await?;
    cluster.finish().await
}

#[tokio::test]
async fn down_names_who_is_in_the_way_and_leaves_the_node_up() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 55006 ");
    cluster.expect_log(" 57014 ");
    cluster.expect_log(" 57P01 ");
    cluster.expect_log(" 25006 ");
    let sikorsky = cluster.node("sikorsky");
    let writer = sikorsky.endpoint().connect("rosuav", DATABASE, "the slow one").await?;
    writer.batch_execute("begin; insert into stillebot.raids values (1, 2)").await?;
    let run = agent(&cluster, &["down", "sikorsky", "--timeout", "200ms"]).await?.expect_code(1)?;
    ensure!(run.says("the slow one") && run.says("terminate"), "{run:#?}");
    ensure!(is_writable(sikorsky).await?);

    let mut started = crate::runs::Started::new(&cluster, &["down", "sikorsky"])?;
    wait_until("the edge", PATIENCE, || async {
        Ok((sikorsky.value::<String>(DATABASE, "select state from stillebot_status()").await? == "down").then_some(()))
    })
    .await?;
    started.signal(nix::sys::signal::Signal::SIGINT)?;
    started.end().await?.expect_code(1)?;
    ensure!(is_writable(sikorsky).await?);

    let run = agent(&cluster, &["down", "sikorsky", "--timeout", "200ms", "--terminate"]).await?.expect_code(0)?;
    ensure!(run.json["state"]["state"] == "down", "{run:#?}");
    ensure!(writer.batch_execute("commit").await.is_err());
    ensure!(sikorsky.value::<i64>(DATABASE, "select count(*) from stillebot.raids").await? == 0);
    cluster.finish().await
}

#[tokio::test]
async fn activate_writes_the_row_where_writing_is_possible_and_replication_carries_it_on() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 25006 ");
    agent(&cluster, &["down", "gideon"]).await?.expect_code(0)?;
    let mut bot = cluster.node("gideon").listen("rosuav", DATABASE).await?;
    bot.client.batch_execute(r#"listen "stillebot.settings""#).await?;
    // Gideon is down: its name is written on sikorsky, and arrives.
    let run = agent(&cluster, &["activate", "gideon"]).await?.expect_code(0)?;
    ensure!(run.json["written_on"] == "sikorsky" && run.json["changed"] == true, "{run:#?}");
    for name in ["sikorsky", "gideon"] {
        wait_until("the active side", PATIENCE, || async {
            Ok((active_side(cluster.node(name)).await? == active_name("gideon")).then_some(()))
        })
        .await?;
    }
    let heard = tokio::time::timeout(PATIENCE, bot.notifications.recv()).await?;
    ensure!(heard.is_some_and(|heard| heard.channel() == "stillebot.settings"), "the bot there hears of it");
    let run = agent(&cluster, &["activate", "gideon"]).await?.expect_code(0)?;
    ensure!(run.json["changed"] == false, "{run:#?}");
    agent(&cluster, &["down", "sikorsky"]).await?.expect_code(0)?;
    let run = agent(&cluster, &["activate", "sikorsky"]).await?.expect_code(1)?;
    ensure!(run.says("no node is writable"), "{run:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn refresh_works_while_down_and_a_table_made_on_both_sides_then_replicates() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 25006 ");
    for node in cluster.nodes() {
        node.execute(DATABASE, "set role rosuav; create table stillebot.fresh (id int primary key)").await?;
    }
    for node in cluster.nodes() {
        // What is there is not copied: with copy_data it would collide.
        node.execute(DATABASE, "insert into stillebot.fresh values (1)").await?;
    }
    cluster.wait_replicated().await?;
    for name in ["sikorsky", "gideon"] {
        agent(&cluster, &["down", name]).await?.expect_code(0)?;
    }
    let run = agent(&cluster, &["refresh"]).await?.expect_code(0)?;
    ensure!(run.json["nodes"] == json!({"sikorsky": ["multihome"], "gideon": ["multihome"]}), "{run:#?}");
    for name in ["sikorsky", "gideon"] {
        agent(&cluster, &["up", name]).await?.expect_code(0)?;
    }
    cluster.node("sikorsky").execute(DATABASE, "insert into stillebot.fresh values (2)").await?;
    cluster.node("gideon").execute(DATABASE, "insert into stillebot.fresh values (3)").await?;
    wait_until("the rows to cross", PATIENCE, || async {
        cluster.wait_replicated().await?;
        let mut counts = Vec::new();
        for node in cluster.nodes() {
            counts.push(node.value::<i64>(DATABASE, "select count(*) from stillebot.fresh").await?);
        }
        Ok((counts == [3, 3]).then_some(()))
    })
    .await?;
    cluster.assert_identical().await?;

    // Half of it would make a table replicate one way only.
    cluster.agent_link("gideon").cut().await?;
    let run = agent(&cluster, &["refresh"]).await?.expect_code(69)?;
    ensure!(run.says("nothing was changed"), "{run:#?}");
    cluster.agent_link("gideon").heal().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_dry_run_of_any_command_changes_nothing() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 25006 ");
    agent(&cluster, &["down", "gideon"]).await?.expect_code(0)?;
    let picture = async || -> Result<Vec<String>> {
        let mut picture = Vec::new();
        for node in cluster.nodes() {
            for question in [
                "select multihome.state()::text",
                "select jsonb_agg(t)::text from stillebot.settings t",
                "select count(*)::text from pg_subscription_rel",
            ] {
                picture.push(node.value::<String>(DATABASE, question).await?);
            }
        }
        Ok(picture)
    };
    for node in cluster.nodes() {
        let create = "set default_transaction_read_only = off; create table stillebot.fresh (id int primary key)";
        if node.name() == "sikorsky" {
            node.execute(DATABASE, create).await?;
        }
    }
    let before = picture().await?;
    for command in [
        &["down", "sikorsky"][..],
        &["up", "gideon"],
        &["up", "sikorsky"],
        &["hop", "gideon"],
        &["hop", "gideon", "--both"],
        &["activate", "gideon"],
        &["refresh"],
    ] {
        let run = agent(&cluster, &[command, &["--dry-run"]].concat()).await?.expect_code(0)?;
        ensure!(run.json["outcome"] == "dry_run", "{command:?}: {run:#?}");
        let text = cluster.agent(&[command, &["--dry-run"]].concat()).await?.expect_code(0)?.stdout;
        ensure!(text.contains("would "), "{command:?}: {text}");
        let after = picture().await?;
        ensure!(after == before, "{command:?} changed {before:#?} to {after:#?}");
    }
    cluster.finish().await
}

// ---- configuration and connections ----

#[tokio::test]
async fn configuration_errors_exit_78_and_name_the_key_and_usage_errors_exit_2() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).without_extension().start().await?;
    let sound = configuration(&cluster)?;
    let status = ["status", "--json"];
    for (from, to, key) in [
        ("database ", "databse ", "databse"),
        ("verify-full", "verify-some", "mode"),
        ("[[node]]", "[[nodes]]\nname = 'x'\n[[node]]", "nodes"),
        ("port        = ", "port        = 1000000", "port"),
        ("family      = \"ipv4\"", "family      = \"ipv6\"", "node.family"),
        ("agent.key", "missing.key", "tls.key"),
        ("agent.pem", "agent.key", "tls.cert"),
        ("root.pem", "missing.pem", "tls.root"),
        ("stillebot.settings", "a.b.c", "active.table"),
    ] {
        ensure!(sound.contains(from), "{from} is not in {sound}");
        let output = agent_with(&cluster, &sound.replacen(from, to, 1), &[], &status).await?.expect_code(78)?;
        ensure!(output.stderr.contains(key), "{key}: {output:#?}");
        let json = serde_json::from_str::<Value>(&output.stdout)?;
        ensure!(
            json["outcome"] == "configuration" && json["error"].as_str().is_some_and(|e| e.contains(key)),
            "{json:#}"
        );
    }
    // A key that everybody can read is no key.
    let key = cluster.agent_configuration().with_file_name("agent.key");
    let permissions = fs::metadata(&key)?.permissions();
    let mut open = permissions.clone();
    std::os::unix::fs::PermissionsExt::set_mode(&mut open, 0o644);
    fs::set_permissions(&key, open)?;
    let output = agent_with(&cluster, &sound, &[], &status).await?.expect_code(78)?;
    ensure!(output.stderr.contains("tls.key") && output.stderr.contains("accessible to others"), "{output:#?}");
    fs::set_permissions(&key, permissions)?;

    let nowhere = Path::new("/nowhere/agent.toml");
    let output = agent_at(&cluster, nowhere, &[], &status).await?.expect_code(78)?;
    ensure!(output.stderr.contains("/nowhere/agent.toml") && output.stderr.contains("--config"), "{output:#?}");
    for usage in
        [&["stutas"][..], &["hop"], &["up"], &["down", "sikorsky", "--timeout", "soon"], &["--colour", "status"], &[]]
    {
        let output = cluster.agent(usage).await?;
        ensure!(output.code == Some(2) && !output.stderr.is_empty(), "{usage:?}: {output:#?}");
    }
    for unknown in [&["up", "rodan"][..], &["down", "rodan"], &["hop", "rodan"], &["activate", "rodan"]] {
        let output = cluster.agent(unknown).await?.expect_code(2)?;
        ensure!(
            output.stderr.contains("no node rodan") && output.stderr.contains("the nodes are sikorsky"),
            "{output:#?}"
        );
    }
    cluster.finish().await
}

#[tokio::test]
async fn a_node_whose_host_is_a_socket_directory_is_reached_there() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 25006 ");
    let sikorsky = cluster.node("sikorsky");
    let (directory, port) = (sikorsky.socket_directory().display().to_string(), sikorsky.port().to_string());
    let sound = configuration(&cluster)?;
    let local = with_node(&sound, "sikorsky", |line| match line.split(' ').next() {
        Some("host") => Some(format!("host = {directory:?}")),
        Some("port") => Some(format!("port = {port}")),
        Some("family") => Some(String::new()),
        _ => None,
    })?;
    // Not through the network: that way is closed.
    cluster.agent_link("sikorsky").cut().await?;
    let output = agent_with(&cluster, &local, &[], &["hop", "gideon", "--json"]).await?.expect_code(0)?;
    ensure!(serde_json::from_str::<Value>(&output.stdout)?["target"] == "gideon", "{output:#?}");
    ensure!(writable(&cluster).await? == ["gideon"]);
    let address = "select count(*) from pg_stat_activity where application_name = 'stillebot-agent'";
    ensure!(sikorsky.value::<i64>(DATABASE, address).await? == 0, "its sessions have ended");

    // Peer authentication, as the notes have it, is refused to a role that is not the operating system's user.
    let hba = sikorsky.data_directory().join("pg_hba.conf");
    let rules = fs::read_to_string(&hba)?;
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid())?.context("no user")?.name;
    fs::write(&hba, format!("local all postgres trust\nlocal all all peer\n{rules}"))?;
    sikorsky.reload().await?;
    // Gideon, over TLS, does not know them either.
    cluster.expect_log(" 28000 ");
    let output = agent_with(&cluster, &local, &[], &["status"]).await?.expect_code(69)?;
    ensure!(output.stdout.contains("Peer authentication failed"), "{output:#?}");
    // With PGUSER and no user in the file, that one; and so with neither, by libpq's rule.
    sikorsky.expect_log(format!("role \"{user}\" does not exist"));
    let without_user = local.lines().filter(|line| !line.starts_with("user ")).collect::<Vec<_>>().join("\n");
    let output = agent_with(&cluster, &without_user, &[], &["status"]).await?.expect_code(69)?;
    ensure!(output.stdout.contains(&format!("role \"{user}\" does not exist")), "{output:#?}");
    let cluster_user = agent_with(&cluster, &without_user, &[("PGUSER", "postgres")], &["status", "--json"]).await?;
    let json: Value = serde_json::from_str(&cluster_user.stdout)?;
    ensure!(node(&json, "sikorsky")?["reachable"] == true, "{json:#}");
    cluster.agent_link("sikorsky").heal().await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_psql_takes_from_the_environment_is_a_default() -> Result<()> {
    let cluster = Cluster::start().await?;
    let directory = cluster.agent_configuration().parent().context("a directory")?.display().to_string();
    let sound = configuration(&cluster)?;
    let keys = ["user ", "root ", "cert ", "key  "];
    let bare =
        sound.lines().filter(|line| !keys.iter().any(|key| line.starts_with(key))).collect::<Vec<_>>().join("\n");
    let (root, cert, key) =
        (format!("{directory}/root.pem"), format!("{directory}/agent.pem"), format!("{directory}/agent.key"));
    let variables =
        [("PGUSER", "stillebot_agent"), ("PGSSLROOTCERT", &*root), ("PGSSLCERT", &*cert), ("PGSSLKEY", &*key)];
    agent_with(&cluster, &bare, &variables, &["status"]).await?.expect_code(0)?;
    // Each of them counts.
    for missing in 0..variables.len() {
        let some: Vec<_> = variables.iter().enumerate().filter(|(i, _)| *i != missing).map(|(_, v)| *v).collect();
        let output = agent_with(&cluster, &bare, &some, &["status"]).await?;
        ensure!(matches!(output.code, Some(69 | 78)), "without {}: {output:#?}", variables[missing].0);
    }
    // The file wins.
    let wrong =
        [("PGUSER", "nobody"), ("PGSSLROOTCERT", "/nowhere"), ("PGSSLCERT", "/nowhere"), ("PGSSLKEY", "/nowhere")];
    agent_with(&cluster, &sound, &wrong, &["status"]).await?.expect_code(0)?;
    for node in cluster.nodes() {
        node.expect_log(" 28000 ");
        node.expect_log(" 08P01 ");
    }
    cluster.finish().await
}

/// With a password, where the server asks for one: it is taken from the file, and shown nowhere.
#[tokio::test]
async fn a_password_comes_from_its_file_and_is_shown_nowhere() -> Result<()> {
    const SECRET: &str = "vErYsEcReT";
    let cluster = Cluster::builder().nodes(1).without_extension().start().await?;
    let sikorsky = cluster.node("sikorsky");
    sikorsky.execute("postgres", &format!("alter role stillebot_agent password '{SECRET}'")).await?;
    let hba = sikorsky.data_directory().join("pg_hba.conf");
    let rules = fs::read_to_string(&hba)?;
    fs::write(&hba, format!("hostssl all stillebot_agent 127.0.0.1/32 scram-sha-256\n{rules}"))?;
    sikorsky.reload().await?;
    sikorsky.expect_log(" 28P01 ");
    sikorsky.expect_log(" 08P01 ");

    let passfile = cluster.agent_configuration().with_file_name("pgpass");
    let path = passfile.display().to_string();
    for (password, code) in [(SECRET, 0), ("wRoNgSeCrEt", 69)] {
        fs::write(&passfile, format!("127.0.0.1:*:{DATABASE}:stillebot_agent:{password}\n"))?;
        fs::set_permissions(&passfile, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        for arguments in [&["status"][..], &["status", "--json"], &["--log", "trace", "status"]] {
            let variables = [("PGPASSFILE", &*path)];
            let output =
                agent_with(&cluster, &configuration(&cluster)?, &variables, arguments).await?.expect_code(code)?;
            ensure!(!format!("{output:?}").contains(password), "{output:#?}");
        }
    }
    // Without one it says what is missing.
    let (sound, nowhere) = (configuration(&cluster)?, [("PGPASSFILE", "/nowhere")]);
    let output = agent_with(&cluster, &sound, &nowhere, &["status", "--json"]).await?.expect_code(69)?;
    ensure!(output.stdout.contains("PGPASSFILE"), "{output:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn a_server_with_another_name_or_of_another_authority_is_refused() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).without_extension().start().await?;
    let sikorsky = cluster.node("sikorsky");
    let sound = configuration(&cluster)?;
    let other = Authority::new()?;
    let other_root = cluster.agent_configuration().with_file_name("other-root.pem");
    fs::write(&other_root, other.root_pem()?)?;
    let refuse = async |configuration: &str, variables: &[(&str, &str)], what: &str| -> Result<()> {
        let output = agent_with(&cluster, configuration, variables, &["status", "--json"]).await?;
        let output = output.expect_code(69).context(what.to_owned())?;
        ensure!(output.stdout.contains("certificate verify failed"), "{what}: {output:#?}");
        ensure!(output.stdout.contains("tls.root"), "{what}: it says where to look: {output:#?}");
        Ok(())
    };
    for log in [" 08P01 ", "could not accept SSL connection", " 08006 "] {
        sikorsky.expect_log(log);
    }
    agent_with(&cluster, &sound, &[], &["status"]).await?.expect_code(0)?;

    // 127.0.0.2 is the same server, and not in its certificate.
    sikorsky.config(&[("listen_addresses", "127.0.0.1,127.0.0.2")]).await?;
    sikorsky.restart().await?;
    let hba = sikorsky.data_directory().join("pg_hba.conf");
    fs::write(&hba, fs::read_to_string(&hba)?.replace("127.0.0.1/32", "127.0.0.0/8"))?;
    sikorsky.reload().await?;
    let other_name = with_node(&sound, "sikorsky", |line| match line.split(' ').next() {
        Some("host") => Some("host = \"127.0.0.2\"".to_owned()),
        Some("port") => Some(format!("port = {}", sikorsky.port())),
        _ => None,
    })?;
    refuse(&other_name, &[], "another name").await?;
    // That it is the name, and nothing else.
    let by_authority_only = other_name.replace("verify-full", "verify-ca");
    agent_with(&cluster, &by_authority_only, &[], &["status"]).await?.expect_code(0)?;

    // Another authority, also if the system trusts it: only `root` counts, as in libpq.
    sikorsky.install_certificate(&other.server(&[])?)?;
    sikorsky.reload().await?;
    refuse(&sound, &[], "another authority").await?;
    refuse(&sound.replace("verify-full", "verify-ca"), &[], "another authority, verify-ca").await?;
    let trusted = [("SSL_CERT_FILE", other_root.to_str().context("a path")?)];
    refuse(&sound, &trusted, "another authority, which the system trusts").await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_dead_address_is_passed_over_and_the_family_decides_which_are_tried() -> Result<()> {
    let both = tokio::net::lookup_host(("localhost", 1)).await?.collect::<Vec<_>>();
    let has_ipv6 = both.iter().any(std::net::SocketAddr::is_ipv6);
    let cluster = Cluster::builder().nodes(1).without_extension().start().await?;
    let port = cluster.node("sikorsky").port();
    let sound = configuration(&cluster)?;
    let localhost = |family: &str| {
        with_node(&sound, "sikorsky", |line| match line.split(' ').next() {
            Some("host") => Some("host = \"localhost\"".to_owned()),
            Some("port") => Some(format!("port = {port}")),
            Some("family") => Some(format!("family = \"{family}\"")),
            _ => None,
        })
    };
    // The server listens on 127.0.0.1 only.
    for family in ["any", "ipv4"] {
        let began = Instant::now();
        agent_with(&cluster, &localhost(family)?, &[], &["status"]).await?.expect_code(0)?;
        ensure!(began.elapsed() < Duration::from_secs(3), "{family} took {:?}", began.elapsed());
    }
    let output = agent_with(&cluster, &localhost("ipv6")?, &[], &["status", "--json"]).await?.expect_code(69)?;
    let said = if has_ipv6 { "onnection refused" } else { "no address of the wanted family" };
    ensure!(output.stdout.contains(said), "{output:#?}");
    cluster.finish().await
}

/// The agent's role is nobody special: what it may not do, it is told.
#[tokio::test]
async fn a_missing_privilege_is_named() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 42501 ");
    let sikorsky = cluster.node("sikorsky");
    sikorsky
        .execute(
            DATABASE,
            "revoke execute on function multihome.down(text, interval, boolean, jsonb) from stillebot_agent",
        )
        .await?;
    let run = agent(&cluster, &["down", "sikorsky"]).await?.expect_code(1)?;
    ensure!(run.says("permission denied") && run.says("grant"), "{run:#?}");
    let run = agent(&cluster, &["hop", "gideon"]).await?.expect_code(1)?;
    ensure!(run.says("permission denied"), "{run:#?}");
    ensure!(writable(&cluster).await? == ["sikorsky", "gideon"]);
    cluster.finish().await
}
