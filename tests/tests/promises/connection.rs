//! `stillebot-agent set-connection`: subscriptions reach the right node at another place and with other files, or what was is back.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::log_check::Expected;
use stillebot_tests::{Cluster, Proxy, Server, wait_until};

use crate::PATIENCE;
use crate::runs::{Run, Started, agent};

/// The words of the command: the superuser's ways in are the sockets.
fn words(cluster: &Cluster, options: &[&str]) -> Vec<String> {
    let ways = cluster
        .nodes()
        .iter()
        .map(|node| format!("--via={}={}:{}", node.name(), node.socket_directory().display(), node.port()));
    ["set-connection"].iter().chain(options).map(|&word| word.to_owned()).chain(ways).collect()
}

async fn set(cluster: &Cluster, options: &[&str]) -> Result<Run> {
    let words = words(cluster, options);
    agent(cluster, &words.iter().map(String::as_str).collect::<Vec<_>>()).await
}

/// What all subscriptions of a node connect with.
async fn conninfo(node: &Server) -> Result<String> {
    node.value(
        DATABASE,
        "select string_agg(subname || ': ' || subconninfo, e'\\n' order by subname) from pg_subscription",
    )
    .await
}

async fn all_conninfo(cluster: &Cluster) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for node in cluster.nodes() {
        all.push(conninfo(node).await?);
    }
    Ok(all)
}

/// A row of each node arrives at all others.
async fn assert_replicates(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        let key = format!("from {}", node.name());
        let write = format!(
            "insert into stillebot.config values (0, '{key}', '0')
             on conflict (twitchid, keyword) do update set data = to_jsonb(config.data::text::int + 1)
             returning data::text"
        );
        let written: String = node.value(DATABASE, &write).await?;
        for peer in cluster.nodes() {
            let seen = format!(
                "select exists (select from stillebot.config where keyword = '{key}' and data::text = '{written}')"
            );
            wait_until(&format!("the row {key} on {}", peer.name()), PATIENCE, || async {
                Ok(peer.value::<bool>(DATABASE, &seen).await?.then_some(()))
            })
            .await?;
        }
    }
    Ok(())
}

fn text<'a>(run: &'a Run, key: &str) -> &'a str {
    run.json[key].as_str().unwrap_or_default()
}

/// Another way to a node.
async fn another_way(node: &Server) -> Result<(Proxy, String)> {
    let proxy = Proxy::open(node.port(), &Expected::default()).await?;
    let port = proxy.port().to_string();
    Ok((proxy, port))
}

#[tokio::test]
async fn peers_reach_a_node_at_another_port_and_nothing_is_lost_on_the_way() -> Result<()> {
    let cluster = Cluster::start().await?;
    let sikorsky = cluster.node("sikorsky");
    let (_way, port) = another_way(sikorsky).await?;
    let before = all_conninfo(&cluster).await?;
    let plan = set(&cluster, &["sikorsky", "--port", &port, "--dry-run"]).await?.expect_code(0)?;
    ensure!(plan.json["outcome"] == "dry_run" && plan.json["changes"][0]["node"] == "gideon", "{plan:#?}");
    ensure!(all_conninfo(&cluster).await? == before, "a dry run changed something");

    let run = set(&cluster, &["sikorsky", "--port", &port]).await?.expect_code(0)?;
    ensure!(run.json["changes"].as_array().is_some_and(|changes| changes.len() == 1), "{run:#?}");
    ensure!(run.json["changes"][0]["milliseconds"].as_f64().is_some_and(|gap| gap > 0.0), "{run:#?}");
    ensure!(run.json["configuration"][0] == format!("port = {port}"), "{run:#?}");
    // The old way is needed no more.
    cluster.link("sikorsky", "gideon").cut().await?;
    assert_replicates(&cluster).await?;
    ensure!(conninfo(sikorsky).await? == before[0], "the other direction was changed");
    let after = conninfo(cluster.node("gideon")).await?;
    let old = format!("port={} ", cluster.link("sikorsky", "gideon").port());
    ensure!(after == before[1].replace(&old, &format!("port={port} ")), "more than the port was changed: {after}");

    let again = set(&cluster, &["sikorsky", "--port", &port]).await?.expect_code(0)?;
    ensure!(again.json["outcome"] == "nothing_to_do", "{again:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn a_place_where_another_server_answers_is_refused_and_nothing_is_changed() -> Result<()> {
    let cluster = Cluster::start().await?;
    let strangers = Cluster::builder().direct().start().await?;
    let plain = Server::builder("plain").start().await?;
    plain.execute("postgres", "create role stillebot_agent login in role pg_monitor").await?;
    plain.execute("postgres", "create database stillebot").await?;
    let before = all_conninfo(&cluster).await?;
    let own = cluster.node("gideon").port().to_string();
    let through = cluster.link("gideon", "sikorsky").port().to_string();
    let namesake = strangers.node("sikorsky").port().to_string();
    let plain_port = plain.port().to_string();
    for (port, why) in [
        (&own, "the subscriber itself"),
        (&through, "the subscriber itself"),
        (&namesake, "where the configuration has it"),
        (&plain_port, "does not say which node it is"),
    ] {
        let run = set(&cluster, &["sikorsky", "--port", port]).await?.expect_code(1)?;
        let error = text(&run, "error");
        ensure!(error.contains("is not sikorsky") && error.contains(why), "{run:#?}");
        ensure!(error.ends_with("nothing was changed"), "{run:#?}");
        ensure!(all_conninfo(&cluster).await? == before, "something was changed: {run:#?}");
    }
    assert_replicates(&cluster).await?;
    strangers.finish().await?;
    plain.finish().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_cannot_be_reached_there_is_told_of_and_nothing_is_changed() -> Result<()> {
    let cluster = Cluster::start().await?;
    let (way, port) = another_way(cluster.node("sikorsky")).await?;
    way.cut().await?;
    let before = all_conninfo(&cluster).await?;
    let run = set(&cluster, &["sikorsky", "--port", &port]).await?.expect_code(69)?;
    ensure!(text(&run, "error").ends_with("nothing was changed"), "{run:#?}");
    let nameless = set(&cluster, &["sikorsky", "--host", "nowhere.invalid"]).await?.expect_code(69)?;
    ensure!(text(&nameless, "error").contains("nowhere.invalid"), "{nameless:#?}");
    ensure!(all_conninfo(&cluster).await? == before, "something was changed");
    let unknown = set(&cluster, &["zeppelin", "--port", &port]).await?.expect_code(2)?;
    ensure!(text(&unknown, "hint").contains("sikorsky"), "{unknown:#?}");
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_has_moved_is_found_though_the_configured_way_to_it_is_dead() -> Result<()> {
    let cluster = Cluster::start().await?;
    let (_way, port) = another_way(cluster.node("sikorsky")).await?;
    cluster.isolate("sikorsky").await?;
    cluster.link("gideon", "sikorsky").heal().await?;
    let ways = [format!(
        "--via=gideon={}:{}",
        cluster.node("gideon").socket_directory().display(),
        cluster.node("gideon").port()
    )];
    let run = agent(&cluster, &["set-connection", "sikorsky", "--port", &port, &ways[0]]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done", "{run:#?}");
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

/// Copies of the files that a node's subscriptions use, under other names: certificate, key.
fn other_files(node: &Server) -> Result<[String; 2]> {
    let tls = node.socket_directory().join("tls");
    let mut copies = Vec::new();
    for file in ["server-as-replicator.pem", "server-as-replicator.key"] {
        let copy = tls.join(format!("new-{file}"));
        fs::copy(tls.join(file), &copy)?;
        // As its owner the server reads it.
        let owner = fs::metadata(tls.join(file))?;
        std::os::unix::fs::chown(
            &copy,
            Some(std::os::unix::fs::MetadataExt::uid(&owner)),
            Some(std::os::unix::fs::MetadataExt::gid(&owner)),
        )?;
        fs::set_permissions(&copy, owner.permissions())?;
        copies.push(copy.display().to_string());
    }
    copies.try_into().ok().context("two files")
}

#[tokio::test]
async fn a_node_presents_another_certificate_also_while_it_is_down() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gideon = cluster.node("gideon");
    let [cert, key] = other_files(gideon)?;
    agent(&cluster, &["down", "gideon"]).await?.expect_code(0)?;
    let run = set(&cluster, &["gideon", "--cert", &cert, "--key", &key]).await?.expect_code(0)?;
    ensure!(run.json["changes"][0]["node"] == "gideon", "{run:#?}");
    let lines: Vec<&str> =
        run.json["configuration"].as_array().context("no lines")?.iter().filter_map(Value::as_str).collect();
    ensure!(lines == [format!("cert = \"{cert}\""), format!("key = \"{key}\"")], "{run:#?}");
    let now = conninfo(gideon).await?;
    ensure!(now.contains(&format!("sslcert={cert} ")) && now.contains(&format!("sslkey={key} ")), "{now}");
    agent(&cluster, &["up", "gideon"]).await?.expect_code(0)?;
    assert_replicates(&cluster).await?;

    // agent.toml still has the old files: without options, everything is as it says.
    let run = set(&cluster, &["gideon"]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done", "{run:#?}");
    ensure!(!conninfo(gideon).await?.contains("/new-"), "the files are not those of the configuration");
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_file_that_does_not_do_is_taken_back_and_replication_goes_on() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gideon = cluster.node("gideon");
    let before = all_conninfo(&cluster).await?;
    let missing = set(&cluster, &["gideon", "--cert", "/nowhere/cert.pem"]).await?.expect_code(1)?;
    ensure!(text(&missing, "error").contains("gideon has no file /nowhere/cert.pem"), "{missing:#?}");
    ensure!(all_conninfo(&cluster).await? == before, "something was changed: {missing:#?}");

    // A certificate that the key does not belong to.
    cluster.expect_log("could not connect to the publisher");
    let stranger = gideon.socket_directory().join("tls/server.pem").display().to_string();
    ensure!(fs::exists(&stranger)?, "{stranger} is not there");
    let run = set(&cluster, &["gideon", "--cert", &stranger, "--patience", "2s"]).await?.expect_code(1)?;
    ensure!(text(&run, "error").contains("was not connected again within 2s"), "{run:#?}");
    ensure!(text(&run, "error").ends_with("what was changed is as it was"), "{run:#?}");
    ensure!(text(&run, "detail").contains("could not connect"), "it does not say why: {run:#?}");
    ensure!(all_conninfo(&cluster).await? == before, "the old is not back");
    assert_replicates(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn of_three_nodes_all_are_changed_or_none() -> Result<()> {
    let cluster = Cluster::builder().nodes(3).start().await?;
    let (way, port) = another_way(cluster.node("sikorsky")).await?;
    let before = all_conninfo(&cluster).await?;
    // The agent gets through, and the first subscriber; the second one finds nobody who lets it in.
    let rodan = cluster.node("rodan");
    cluster.expect_log("could not connect to the publisher");
    rodan.execute(DATABASE, "alter subscription multihome_sikorsky disable").await?;
    let other = before[2].lines().find_map(|line| line.strip_prefix("multihome_sikorsky: ")).context("no conninfo")?;
    let wrong = other.replace("user=replicator", "user=nobody");
    rodan.execute(DATABASE, &format!("alter subscription multihome_sikorsky connection '{wrong}'")).await?;
    rodan.execute(DATABASE, "alter subscription multihome_sikorsky enable").await?;
    cluster.node("sikorsky").expect_log(" 28000 ");
    let broken = all_conninfo(&cluster).await?;
    let run = set(&cluster, &["sikorsky", "--port", &port, "--patience", "2s"]).await?.expect_code(3)?;
    ensure!(text(&run, "error").starts_with("rodan: the subscription multihome_sikorsky"), "{run:#?}");
    ensure!(text(&run, "detail").contains("does not connect with that either"), "{run:#?}");
    ensure!(all_conninfo(&cluster).await? == broken, "gideon was left changed");

    rodan.execute(DATABASE, &format!("alter subscription multihome_sikorsky connection '{other}'")).await?;
    // As a run that was killed after the first subscriber has left it.
    let gideon = cluster.node("gideon");
    let half = conninfo(gideon).await?;
    let half = half.lines().find_map(|line| line.strip_prefix("multihome_sikorsky: ")).context("no conninfo")?;
    let link = format!("port={} ", cluster.link("sikorsky", "gideon").port());
    let half = half.replace(&link, &format!("port={port} "));
    gideon.execute(DATABASE, &format!("alter subscription multihome_sikorsky connection '{half}'")).await?;
    let run = set(&cluster, &["sikorsky", "--port", &port]).await?.expect_code(0)?;
    let changed: Vec<&Value> =
        run.json["changes"].as_array().context("none")?.iter().map(|change| &change["node"]).collect();
    ensure!(changed == ["rodan"], "{run:#?}");
    for subscriber in ["gideon", "rodan"] {
        cluster.link("sikorsky", subscriber).cut().await?;
    }
    assert_replicates(&cluster).await?;
    drop(way);
    cluster.finish().await
}

#[tokio::test]
async fn a_run_that_was_killed_or_interrupted_leaves_nothing_that_the_next_one_does_not_mend() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log("could not connect to the publisher");
    let gideon = cluster.node("gideon");
    let before = all_conninfo(&cluster).await?;
    let stranger = gideon.socket_directory().join("tls/server.pem").display().to_string();
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let words = words(&cluster, &["gideon", "--cert", &stranger, "--patience", "60s"]);
        let mut started = Started::new(&cluster, &words.iter().map(String::as_str).collect::<Vec<_>>())?;
        wait_until("the subscription to be changed", PATIENCE, || async {
            Ok(conninfo(gideon).await?.contains(&stranger).then_some(()))
        })
        .await?;
        started.signal(signal)?;
        let run = started.end().await?;
        if signal == Signal::SIGINT {
            ensure!(run.code == Some(1), "{run:#?}");
            ensure!(all_conninfo(&cluster).await? == before, "an interrupted run left something: {run:#?}");
        } else {
            let run = set(&cluster, &["gideon"]).await?.expect_code(0)?;
            ensure!(run.json["changes"].as_array().is_some_and(|changes| changes.len() == 1), "{run:#?}");
        }
        assert_replicates(&cluster).await?;
    }
    cluster.finish().await
}

#[tokio::test]
async fn secrets_in_connection_strings_stay_and_are_not_shown() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gideon = cluster.node("gideon");
    let (_way, port) = another_way(cluster.node("sikorsky")).await?;
    let old = conninfo(gideon).await?;
    let old = old.strip_prefix("multihome: ").context("no conninfo")?;
    gideon.execute(DATABASE, &format!("alter subscription multihome connection '{old} password=hushhush'")).await?;
    for more in [&["--dry-run"][..], &[]] {
        let run = set(&cluster, &[&["sikorsky", "--port", &port], more].concat()).await?.expect_code(0)?;
        let said = format!("{run:?}");
        ensure!(said.contains("password=***") && !said.contains("hushhush"), "{said}");
    }
    ensure!(conninfo(gideon).await?.contains("password=hushhush"), "the password is gone");
    assert_replicates(&cluster).await?;
    cluster.finish().await
}
