//! Conflicts are resolved by rule, with nobody there: on the active side only, with the same rows on all nodes afterwards,
//! and the application is told.

use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::Value;
use stillebot_tests::cluster::{DATABASE, active_name};
use stillebot_tests::{Cluster, Server, wait_until};

use crate::PATIENCE;
use crate::conflicts::{apart, conflicts, expect_errors, settled, wait_conflict, wait_open};
use crate::watch::Watch;

/// What a bot's operator would write.
const RULES: &str = r#"
[watch]
channel = "scream.emergency"
interval = "500ms"

[[rule]]
table    = "stillebot.commands"
strategy = "deactivate-older"
flag     = "active"
by       = "created"
notify   = { channel = "stillebot.commands", payload = "{twitchid}:{cmdname}" }

[[rule]]
table    = "stillebot.uploads"
strategy = "keep-node"
node     = "gideon"

[[rule]]
table    = "stillebot.raids"
strategy = "none"

[[rule]]
table    = "stillebot.*"
strategy = "newest"
"#;

/// Saves a command as the bot does.
fn save(name: &str, text: &str) -> String {
    format!(
        "begin;
         update stillebot.commands set active = false where twitchid = 1 and cmdname = '{name}' and active;
         insert into stillebot.commands (twitchid, cmdname, active, content) values (1, '{name}', true, '\"{text}\"');
         commit"
    )
}

async fn active(node: &Server, name: &str) -> Result<Option<String>> {
    let query = format!(
        "select string_agg(content #>> '{{}}', ' and ') from stillebot.commands where cmdname = '{name}' and active"
    );
    node.value(DATABASE, &query).await
}

async fn value(node: &Server, query: &str) -> Result<String> {
    node.value(DATABASE, query).await
}

#[tokio::test]
async fn a_command_saved_on_both_sides_is_settled_by_its_rule_and_the_bots_are_told() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    cluster.configure_agent(RULES)?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    sikorsky.execute(DATABASE, &save("hug", "the first")).await?;
    cluster.wait_replicated().await?;
    let mut bot = gideon.listen("rosuav", DATABASE).await?;
    let watch = Watch::start(&cluster).await?;

    // Gideon's is the newer one.
    apart(&cluster, &save("hug", "of sikorsky"), &save("hug", "of gideon")).await?;
    let began = Instant::now();
    let resolved = |row: &Value| row["status"] == "resolved" && row["relname"] == "commands";
    let here = wait_conflict(sikorsky, "the rule's answer", resolved).await?;
    let there = wait_conflict(gideon, "the rule's answer", resolved).await?;
    println!("resolved within {:?} of the link's return", began.elapsed());
    for row in [&here, &there] {
        let resolution = row["resolution"].as_str().unwrap_or_default();
        ensure!(resolution.starts_with("rule deactivate-older: winner"), "{row:#}");
        ensure!(row["resolved_by"].as_str().is_some_and(|by| by.starts_with("stillebot-agent watch on ")), "{row:#}");
    }
    settled(&cluster).await?;
    for node in [sikorsky, gideon] {
        ensure!(active(node, "hug").await?.as_deref() == Some("of gideon"), "{:?}", active(node, "hug").await?);
    }
    let versions: i64 = gideon.value(DATABASE, "select count(*) from stillebot.commands where cmdname = 'hug'").await?;
    ensure!(versions == 3, "no version is lost: {versions}");
    bot.client.batch_execute("listen \"stillebot.commands\"").await?;

    // Again, and now a bot listens.
    apart(&cluster, &save("wave", "of sikorsky"), &save("wave", "of gideon")).await?;
    // The table's own trigger says the same when a row is saved; this is said by the agent.
    let agents = "select pid from pg_stat_activity where application_name = 'stillebot-agent'";
    let agents: Vec<i32> = bot.client.query(agents, &[]).await?.iter().map(|row| row.get(0)).collect();
    wait_until("the bot to be told", PATIENCE, || {
        let told = bot.notifications.try_recv().ok();
        let by_agent = told.filter(|told| told.payload() == "1:wave" && agents.contains(&told.process_id()));
        async move { Ok(by_agent.map(|_| ())) }
    })
    .await?;
    settled(&cluster).await?;
    ensure!(active(sikorsky, "wave").await?.is_some_and(|text| text == "of gideon"));
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn each_table_has_its_rule_and_what_has_none_is_left_to_a_person() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    cluster.configure_agent(RULES)?;
    let sikorsky = cluster.node("sikorsky");
    let watch = Watch::start(&cluster).await?;

    // Newest: by commit time. The later one is sikorsky's, here.
    let upsert = |text: &str| format!("insert into stillebot.config values (1, 'k', '\"{text}\"')");
    apart(&cluster, "", &upsert("early")).await?;
    cluster.wait_applied("gideon", "sikorsky").await?;
    apart(&cluster, &upsert("s").replace("'k'", "'two'"), &upsert("g").replace("'k'", "'two'")).await?;
    settled(&cluster).await?;
    let kept = value(sikorsky, "select data #>> '{}' from stillebot.config where keyword = 'two'").await?;
    ensure!(kept == "g", "{kept}");

    // keep-node, although it is the older one.
    let id = "11111111-1111-1111-1111-111111111111";
    let upload =
        |uploader: i32| format!("insert into stillebot.uploads (id, channel, uploader) values ('{id}', 1, {uploader})");
    apart(&cluster, &upload(1), &upload(2)).await?;
    settled(&cluster).await?;
    let kept: i64 = sikorsky.value(DATABASE, "select uploader from stillebot.uploads").await?;
    ensure!(kept == 2, "{kept}");

    // none: open, and said so.
    apart(&cluster, "insert into stillebot.raids values (1, 1, '1')", "insert into stillebot.raids values (1, 1, '2')")
        .await?;
    wait_until("a person to be called", PATIENCE, || async {
        Ok(watch.printed().iter().any(|line| line.contains("left to a person")).then_some(()))
    })
    .await?;
    let open = wait_open(sikorsky, "insert_exists").await?;
    ensure!(open["relname"] == "raids", "{open:#}");
    let id = open["id"].to_string();
    cluster.agent(&["conflicts", "resolve", &format!("sikorsky/{id}"), "--keep", "remote"]).await?.expect_code(0)?;
    settled(&cluster).await?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn only_the_watch_of_the_active_side_resolves() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    cluster.configure_agent(RULES)?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let watch = Watch::start_for(&cluster, "gideon").await?;
    apart(&cluster, &save("hug", "of sikorsky"), &save("hug", "of gideon")).await?;
    wait_open(sikorsky, "insert_exists").await?;
    wait_open(gideon, "insert_exists").await?;
    // It has looked, and left it alone.
    watch.look_on(6).await?;
    ensure!(conflicts(gideon).await?.iter().all(|row| row["status"] == "open"));
    // Replication of the active side is stopped by the conflict, so it is said on both.
    for node in [sikorsky, gideon] {
        let activate = format!("update stillebot.settings set active_bot = '{}'", active_name("gideon"));
        node.execute(DATABASE, &activate).await?;
    }
    settled(&cluster).await?;
    ensure!(active(sikorsky, "hug").await?.as_deref() == Some("of gideon"));
    watch.end().await?;
    cluster.finish().await
}
