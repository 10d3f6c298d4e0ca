//! Rules, when there is much for them to do, when they fail, and when whoever follows them dies.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::Value;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Server, wait_until};

use crate::PATIENCE;
use crate::conflicts::{
    Conflict, apart, conflicts, end_collector, expect_errors, resident, settled, wait_conflict, wait_open,
};
use crate::watch::Watch;

const WATCH: &str = "
[watch]
channel = \"scream.emergency\"
interval = \"500ms\"
";

/// A rule, as it is written in agent.toml.
fn rule(table: &str, strategy: &str) -> String {
    format!("\n[[rule]]\ntable = \"stillebot.{table}\"\nstrategy = {strategy}\n")
}

const COMMANDS: &str = "\"deactivate-older\"\nflag = \"active\"\nby = \"created\"";
const OF_GIDEON: &str = "\"keep-node\"\nnode = \"gideon\"";

async fn ruled(builder: stillebot_tests::ClusterBuilder, rules: &[(&str, &str)]) -> Result<Cluster> {
    let cluster = builder.start().await?;
    expect_errors(&cluster, &["23505"]);
    let rules: String = rules.iter().map(|(table, strategy)| rule(table, strategy)).collect();
    cluster.configure_agent(&format!("{WATCH}{rules}"))?;
    Ok(cluster)
}

fn command(name: &str, text: &str) -> String {
    format!(
        "insert into stillebot.commands (twitchid, cmdname, active, content) values (1, '{name}', true, '\"{text}\"');"
    )
}

fn config(key: &str, by: &str) -> String {
    format!("insert into stillebot.config values (1, '{key}', '{{\"by\": \"{by}\"}}');")
}

async fn raids(cluster: &Cluster, count: i64) -> Result<()> {
    let rows = format!("insert into stillebot.raids select g, g from generate_series(1, {count}) g");
    cluster.node("gideon").execute(DATABASE, &rows).await?;
    cluster.wait_replicated().await
}

/// Has sikorsky meet an update of each of these raids, which it has deleted.
async fn miss(cluster: &Cluster, count: i64) -> Result<()> {
    let updates = format!(
        "do $$ begin for i in 1..{count} loop update stillebot.raids set data = '1' where fromid = i; commit; end loop; end $$"
    );
    apart(cluster, "delete from stillebot.raids", &updates).await
}

async fn open(node: &Server, table: &str) -> Result<i64> {
    let query = format!("select count(*) from multihome.conflicts where status = 'open' and relname = '{table}'");
    node.value(DATABASE, &query).await
}

/// What was printed of conflicts.
fn told(watch: &Watch, event: &str) -> Result<Vec<Value>> {
    let lines: Vec<Value> =
        watch.printed().iter().map(|line| serde_json::from_str(line)).collect::<std::result::Result<_, _>>()?;
    Ok(lines.into_iter().filter(|line| line["event"] == event).collect())
}

#[tokio::test]
async fn what_stops_apply_waits_behind_no_other_conflict_and_streaming_goes_on_within_a_second() -> Result<()> {
    const COLLISIONS: i64 = 5;
    // PostgreSQL's own pause between two attempts.
    let builder = Cluster::builder().config("wal_retrieve_retry_interval", "5s");
    let cluster = ruled(builder, &[("commands", COMMANDS), ("raids", OF_GIDEON)]).await?;
    let sikorsky = cluster.node("sikorsky");
    raids(&cluster, 100).await?;
    miss(&cluster, 100).await?;
    wait_until("the backlog", PATIENCE, || async { Ok((open(sikorsky, "raids").await? == 100).then_some(())) }).await?;
    let watch = Watch::start(&cluster).await?;
    wait_until("the rule to begin with it", PATIENCE, || async {
        Ok((open(sikorsky, "raids").await? < 100).then_some(()))
    })
    .await?;

    let mut streams = Vec::new();
    for node in cluster.nodes() {
        streams.push(node.superuser(DATABASE).await?);
    }
    for number in 1..=COLLISIONS {
        // In transactions that overlap, so that each node meets the other's.
        for (client, by) in streams.iter().zip(["sikorsky", "gideon"]) {
            client.batch_execute(&format!("begin; {}", command(&number.to_string(), by))).await?;
        }
        tokio::try_join!(streams[0].batch_execute("commit"), streams[1].batch_execute("commit"))?;
        for (node, client) in cluster.nodes().iter().zip(&streams) {
            // By that server's clock: since the error was met, until both rows are there.
            let query = format!(
                "select extract(epoch from clock_timestamp() - min(c.first_seen))::float8
                   from multihome.conflicts c
                  where c.relname = 'commands' and c.remote_tuple ->> 'cmdname' = '{number}'
                    and (select count(*) from stillebot.commands where cmdname = '{number}') = 2"
            );
            let took = wait_until("streaming to go on", PATIENCE, || async {
                Ok(client.query_one(&query, &[]).await?.get::<_, Option<f64>>(0))
            })
            .await?;
            println!("{}: {took:.3} s", node.name());
            ensure!(took < 1.0, "{} streamed again after {took} s", node.name());
        }
        wait_until("the rule's answer", PATIENCE, || async {
            let open = open(sikorsky, "commands").await? + open(cluster.node("gideon"), "commands").await?;
            Ok((open == 0).then_some(()))
        })
        .await?;
    }
    let left = open(sikorsky, "raids").await?;
    ensure!(left > 0, "nothing was in the way");
    watch.end().await?;
    cluster.finish().await
}

/// Lets a table refuse rows on a node that says so; the same everywhere, or it would be drift.
async fn refusing(cluster: &Cluster, table: &str) -> Result<()> {
    for node in cluster.nodes() {
        let constraint = format!(
            "alter table stillebot.{table} add constraint no
             check (current_setting('test.refuses', true) is distinct from 'on')"
        );
        node.execute(DATABASE, &constraint).await?;
    }
    cluster.expect_log(" 23514 ");
    Ok(())
}

#[tokio::test]
async fn a_rule_that_fails_is_given_up_the_channel_is_told_once_and_again_when_a_person_has_resolved_it() -> Result<()>
{
    let cluster = ruled(Cluster::builder(), &[("raids", OF_GIDEON)]).await?;
    refusing(&cluster, "raids").await?;
    let sikorsky = cluster.node("sikorsky");
    raids(&cluster, 1).await?;
    sikorsky.config(&[("test.refuses", "on")]).await?;
    let watch = Watch::start(&cluster).await?;
    miss(&cluster, 1).await?;
    watch
        .hear(
            "gideon",
            &["stillebot.raids on sikorsky unresolved since 2", "rule keep-node failed 3 times: ", "\"no\""],
        )
        .await?;
    let ends: Vec<Value> = told(&watch, "conflict")?.iter().map(|line| line["end"].clone()).collect();
    ensure!(ends == ["not resolved", "given up"] || ends == ["not resolved", "not resolved", "given up"], "{ends:?}");
    let row = wait_open(sikorsky, "update_missing").await?;
    ensure!(row["resolution"].as_str().is_some_and(|text| text.contains("failed 3 times")), "{row:#}");
    watch.look_on(6).await?;

    sikorsky.config(&[("test.refuses", "off")]).await?;
    let name = format!("sikorsky/{}", row["id"]);
    cluster.agent(&["conflicts", "resolve", &name, "--keep", "remote"]).await?.expect_code(0)?;
    for node in ["sikorsky", "gideon"] {
        watch.hear(node, &["stillebot.raids on sikorsky is well again: was unresolved for"]).await?;
        ensure!(watch.on(node).len() == 2, "{:#?}", watch.on(node));
    }
    settled(&cluster).await?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_flood_of_conflicts_is_a_line_a_look_and_one_alarm() -> Result<()> {
    const MANY: i64 = 300;
    let cluster = ruled(Cluster::builder(), &[("commands", COMMANDS)]).await?;
    raids(&cluster, MANY).await?;
    miss(&cluster, MANY).await?;
    let sikorsky = cluster.node("sikorsky");
    wait_until("the flood", PATIENCE, || async { Ok((open(sikorsky, "raids").await? == MANY).then_some(())) }).await?;
    // A second one has not seen what the first one said, and says it in few words, too.
    for _ in 0..2 {
        let watch = Watch::start(&cluster).await?;
        let more = || -> Result<i64> {
            let lines = told(&watch, "conflicts")?;
            ensure!(lines.iter().all(|line| line["end"] == "left to a person" && line["table"] == "stillebot.raids"));
            Ok(lines.iter().filter_map(|line| line["more"].as_i64()).sum())
        };
        wait_until("all to be told of", PATIENCE, || async {
            Ok((more()? + told(&watch, "conflict")?.len() as i64 == MANY).then_some(()))
        })
        .await?;
        let first = told(&watch, "conflict")?;
        // A look may have come between the first and the second.
        ensure!(first.len() <= 2 && first[0]["text"] == "there is no rule for stillebot.raids", "{first:#?}");
        let alarm = watch.hear("gideon", &["stillebot.raids on sikorsky unresolved since"]).await?;
        ensure!(alarm.ends_with(" more) is left to a person: there is no rule for stillebot.raids"), "{alarm}");
        ensure!(watch.on("gideon").len() == 1, "{:#?}", watch.on("gideon"));
        watch.end().await?;
    }
    cluster.finish().await
}

#[tokio::test]
async fn a_backlog_behind_a_conflict_costs_no_attempt_and_the_application_is_told_in_the_end() -> Result<()> {
    let notify = "\"newest\"\nnotify = { channel = \"answers\", payload = \"{keyword}\" }";
    let cluster = ruled(Cluster::builder(), &[("config", notify)]).await?;
    // What comes in takes its time; more of it than a rule has.
    for node in cluster.nodes() {
        let slow = "create function stillebot.slow() returns trigger language plpgsql as $$
                    begin perform pg_sleep(0.02); return new; end $$;
                    create trigger slow before insert on stillebot.raids for each row execute function stillebot.slow();
                    alter table stillebot.raids enable replica trigger slow";
        node.execute(DATABASE, slow).await?;
    }
    let mut bot = cluster.node("sikorsky").listen("rosuav", DATABASE).await?;
    bot.client.batch_execute("listen answers").await?;
    let watch = Watch::start(&cluster).await?;
    let backlog =
        "do $$ begin for i in 1..400 loop insert into stillebot.raids values (i, i); commit; end loop; end $$";
    let links = [cluster.link("sikorsky", "gideon"), cluster.link("gideon", "sikorsky")];
    for link in links {
        link.cut().await?;
    }
    cluster.node("sikorsky").execute(DATABASE, &config("k", "sikorsky")).await?;
    cluster.node("gideon").execute(DATABASE, &config("k", "gideon")).await?;
    cluster.node("gideon").execute(DATABASE, backlog).await?;
    for link in links {
        link.heal().await?;
    }
    wait_until("the application to be told", PATIENCE, || {
        let told = bot.notifications.try_recv().ok().filter(|told| told.payload() == "k");
        async move { Ok(told.map(|_| ())) }
    })
    .await?;
    settled(&cluster).await?;
    let ends: Vec<Value> = told(&watch, "conflict")?.iter().map(|line| line["end"].clone()).collect();
    ensure!(!ends.is_empty() && ends.iter().all(|end| end == "resolved"), "{ends:?}");
    for node in cluster.nodes() {
        wait_conflict(node, "what the rule did", |row| {
            row["resolution"].as_str().is_some_and(|text| text.starts_with("rule newest: winner"))
        })
        .await?;
    }
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_a_killed_watch_had_begun_the_next_one_ends() -> Result<()> {
    let cluster = ruled(Cluster::builder(), &[("commands", COMMANDS), ("config", "\"newest\"")]).await?;
    let gideon = cluster.node("gideon");
    // Commands: killed between making room and crowning. Config: when each node has answered, and nobody has compared them.
    let row = |table, key: &str, by: &str| if table == "commands" { command(key, by) } else { config(key, by) };
    for (number, (table, begun)) in [("commands", "made room"), ("config", "kept ")].into_iter().enumerate() {
        let watch = Watch::start(&cluster).await?;
        let lock = gideon.superuser(DATABASE).await?;
        lock.batch_execute("begin; lock table stillebot.raids in exclusive mode").await?;
        let behind =
            format!("begin; {} insert into stillebot.raids values ({number}, 1); commit", row(table, "k", "sikorsky"));
        apart(&cluster, &behind, &row(table, "k", "gideon")).await?;
        for node in cluster.nodes() {
            let is_begun = |row: &Conflict| row["resolution"].as_str().is_some_and(|text| text.starts_with(begun));
            wait_conflict(node, begun, |row| row["relname"] == table && is_begun(row)).await?;
        }
        watch.kill(&cluster).await?;
        lock.batch_execute("commit").await?;
        let watch = Watch::start(&cluster).await?;
        for node in cluster.nodes() {
            wait_conflict(node, "the end of it", |row| {
                let resolution = row["resolution"].as_str().unwrap_or_default();
                row["relname"] == table && resolution.starts_with("rule ") && resolution.contains(": winner ")
            })
            .await?;
        }
        settled(&cluster).await?;
        watch.end().await?;
    }
    let active: i64 = gideon.value(DATABASE, "select count(*) from stillebot.commands where active").await?;
    ensure!(active == 1, "{active}");
    let by: String = gideon.value(DATABASE, "select data ->> 'by' from stillebot.config").await?;
    ensure!(by == "gideon", "{by}");
    cluster.finish().await
}

#[tokio::test]
async fn a_row_that_one_side_deleted_stays_away_by_rule_whether_or_not_the_other_still_has_it() -> Result<()> {
    let cluster = ruled(Cluster::builder(), &[("config", "\"let-delete-win\"")]).await?;
    let update =
        |key: &str| format!("update stillebot.config set data = '{{\"by\": \"gideon\"}}' where keyword = '{key}';");
    let delete = |key: &str| format!("delete from stillebot.config where keyword = '{key}';");
    cluster.node("sikorsky").execute(DATABASE, &format!("{} {}", config("has", "x"), config("lacks", "x"))).await?;
    cluster.wait_replicated().await?;
    let watch = Watch::start(&cluster).await?;
    let links = [cluster.link("sikorsky", "gideon"), cluster.link("gideon", "sikorsky")];
    for link in links {
        link.cut().await?;
    }
    cluster.node("sikorsky").execute(DATABASE, &format!("{} {}", delete("has"), delete("lacks"))).await?;
    for statement in [update("has"), update("lacks"), delete("lacks")] {
        cluster.node("gideon").execute(DATABASE, &statement).await?;
    }
    for link in links {
        link.heal().await?;
    }
    for key in ["has", "lacks"] {
        wait_conflict(cluster.node("sikorsky"), "the rule's answer", |row| {
            row["replica_identity"]["keyword"] == key
                && row["resolution"].as_str().is_some_and(|text| text.starts_with("rule let-delete-win: winner"))
        })
        .await?;
    }
    settled(&cluster).await?;
    let rows: i64 = cluster.node("gideon").value(DATABASE, "select count(*) from stillebot.config").await?;
    ensure!(rows == 0, "{rows}");
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_rule_skips_or_takes_the_greater_column_and_leaves_a_missing_row_it_cannot_judge() -> Result<()> {
    let by_text = "\"newest\"\nby = \"login\"";
    let by_commit = "\"newest\"";
    let rules = [("raids", "\"skip\""), ("botservice", by_text), ("config", by_commit)];
    let cluster = ruled(Cluster::builder(), &rules).await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let watch = Watch::start(&cluster).await?;

    // Skipped: each keeps its own, so they differ, and that is what was asked for.
    let raid = |data: i64| format!("insert into stillebot.raids values (1, 1, '{data}')");
    apart(&cluster, &raid(1), &raid(2)).await?;
    for node in cluster.nodes() {
        wait_conflict(node, "the rule's answer", |row| row["relname"] == "raids" && row["status"] == "skipped").await?;
    }
    gideon.execute(DATABASE, "delete from stillebot.raids").await?;
    cluster.wait_replicated().await?;

    // The greater column, although it is the older row.
    let service = |login: &str| format!("insert into stillebot.botservice values (1, null, '{login}', 'x')");
    apart(&cluster, &service("z"), &service("a")).await?;
    for node in cluster.nodes() {
        wait_conflict(node, "the rule's answer", |row| row["relname"] == "botservice" && row["status"] == "resolved")
            .await?;
    }
    settled(&cluster).await?;
    let kept: String = gideon.value(DATABASE, "select login from stillebot.botservice").await?;
    ensure!(kept == "z", "{kept}");

    // When a row was deleted is not known, so newest is not for it.
    sikorsky.execute(DATABASE, &config("k", "x")).await?;
    cluster.wait_replicated().await?;
    apart(&cluster, "delete from stillebot.config", "update stillebot.config set data = '1'").await?;
    watch.hear("gideon", &["stillebot.config on sikorsky unresolved since", "rule newest does not fit"]).await?;
    let row = wait_open(sikorsky, "update_missing").await?;
    let name = format!("sikorsky/{}", row["id"]);
    cluster.agent(&["conflicts", "resolve", &name, "--keep", "local"]).await?.expect_code(0)?;
    watch.hear("gideon", &["stillebot.config on sikorsky is well again"]).await?;
    settled(&cluster).await?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn with_three_nodes_a_rule_leaves_all_with_one_active_command() -> Result<()> {
    let cluster = ruled(Cluster::builder().nodes(3), &[("commands", COMMANDS)]).await?;
    let watch = Watch::start(&cluster).await?;
    let nodes = ["sikorsky", "gideon", "rodan"];
    for node in nodes {
        cluster.isolate(node).await?;
    }
    for node in nodes {
        cluster.node(node).execute(DATABASE, &command("hug", node)).await?;
    }
    for node in nodes {
        cluster.reconnect(node).await?;
    }
    for node in cluster.nodes() {
        wait_conflict(node, "the rule's answer", |row| row["status"] == "resolved").await?;
    }
    settled(&cluster).await?;
    for node in cluster.nodes() {
        let query = "select string_agg(content #>> '{}', ' and ') from stillebot.commands where active";
        let active: Option<String> = node.value(DATABASE, query).await?;
        let all: i64 = node.value(DATABASE, "select count(*) from stillebot.commands").await?;
        ensure!(active.as_deref() == Some("rodan") && all == 3, "{}: {active:?} of {all}", node.name());
        ensure!(conflicts(node).await?.iter().all(|row| row["status"] != "open"));
    }
    watch.end().await?;
    cluster.finish().await
}

/// Every key is inserted on both sides, each in a transaction of its own, so apply stops at each of them.
#[tokio::test]
async fn a_storm_of_conflicts_that_stop_apply_is_settled_by_rule_while_collectors_are_killed() -> Result<()> {
    const EACH: i64 = 120;
    let cluster = ruled(Cluster::builder(), &[("raids", OF_GIDEON)]).await?;
    let inserts = |by: i64| {
        format!(
            "do $$ begin for i in 1..{EACH} loop
                 insert into stillebot.raids values (i, i, '{by}'); commit;
             end loop; end $$"
        )
    };
    let watch = Watch::start(&cluster).await?;
    apart(&cluster, &inserts(1), &inserts(2)).await?;
    let kept = "select count(*) from stillebot.raids where data = '2'";
    let (mut ended, mut killed_at) = (0, 0);
    let memory = || -> Result<[i64; 3]> {
        Ok([watch.resident()?, resident(cluster.node("sikorsky"))?, resident(cluster.node("gideon"))?])
    };
    wait_until("the rule to settle a part of it", 4 * PATIENCE, || async {
        Ok((cluster.node("sikorsky").value::<i64>(DATABASE, kept).await? >= EACH / 5).then_some(()))
    })
    .await?;
    let early = memory()?;
    let deadline = Instant::now() + 4 * PATIENCE;
    loop {
        let settled: i64 = cluster.node("sikorsky").value(DATABASE, kept).await?;
        if settled == EACH {
            break;
        }
        ensure!(Instant::now() < deadline, "{settled} of {EACH} are settled");
        if settled >= killed_at + EACH / 10 {
            killed_at = settled;
            for node in cluster.nodes() {
                ended += i32::from(end_collector(node).await?);
            }
        }
    }
    settled(&cluster).await?;
    let late = memory()?;
    println!("memory at 20 %: {early:?} kB, at the end: {late:?} kB; {ended} collectors ended");
    ensure!(ended >= 4, "the collectors were ended {ended} times");
    for (early, late) in early.into_iter().zip(late) {
        ensure!(late < early * 3 / 2 + 10_000, "{early} kB have become {late} kB");
    }
    let mut told = BTreeSet::new();
    for node in cluster.nodes() {
        let of_raids = conflicts(node).await?.into_iter().filter(|row| row["relname"] == "raids");
        told.extend(of_raids.map(|row| row["replica_identity"].to_string()));
    }
    ensure!(told.len() as i64 == EACH, "{} of {EACH} are in a log", told.len());
    watch.end().await?;
    cluster.finish().await
}
