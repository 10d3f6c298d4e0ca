//! Every conflict and error of replication is a row on the node that met it, with both versions of the data; and a call
//! gets replication going again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Server, wait_until};

use crate::PATIENCE;

/// A row of `multihome.conflicts`, as JSON.
pub type Conflict = Value;

/// Writes on both nodes while they cannot hear each other, and joins them again.
pub async fn apart(cluster: &Cluster, sikorsky: &str, gideon: &str) -> Result<()> {
    let links = [cluster.link("sikorsky", "gideon"), cluster.link("gideon", "sikorsky")];
    for link in links {
        link.cut().await?;
    }
    for (node, statements) in [("sikorsky", sikorsky), ("gideon", gideon)] {
        if !statements.is_empty() {
            cluster.node(node).execute(DATABASE, statements).await?;
        }
    }
    for link in links {
        link.heal().await?;
    }
    Ok(())
}

/// All rows of a node, oldest first, that there are with every version of PostgreSQL; see [`crossed`].
pub async fn conflicts(node: &Server) -> Result<Vec<Conflict>> {
    rows(node, "not like '%origin_differs'").await
}

/// Those that PostgreSQL 18 has besides: of rows that were changed on both sides at once, where apply replaced the later
/// version.
pub async fn crossed(node: &Server) -> Result<Vec<Conflict>> {
    rows(node, "like '%origin_differs'").await
}

async fn rows(node: &Server, of_type: &str) -> Result<Vec<Conflict>> {
    let query = format!(
        "select coalesce(jsonb_agg(to_jsonb(c) order by c.id), '[]')::text from multihome.conflicts c where conflict_type {of_type}"
    );
    let rows: String = node.value(DATABASE, &query).await?;
    Ok(serde_json::from_str(&rows)?)
}

/// Waits for the first row for which this holds.
pub async fn wait_conflict(node: &Server, what: &str, wanted: impl Fn(&Conflict) -> bool) -> Result<Conflict> {
    let found = wait_until(&format!("{what} on {}", node.name()), PATIENCE, || async {
        Ok(conflicts(node).await?.into_iter().find(|row| wanted(row)))
    })
    .await;
    match found {
        Ok(row) => Ok(row),
        Err(error) => {
            let rows = serde_json::to_string_pretty(&conflicts(node).await?)?;
            Err(error.context(format!("the rows there are: {rows}\nthe log: {}", node.log_tail(10))))
        }
    }
}

/// An open row of that type.
pub async fn wait_open(node: &Server, conflict_type: &str) -> Result<Conflict> {
    wait_conflict(node, &format!("an open {conflict_type}"), |row| {
        row["conflict_type"] == conflict_type && row["status"] == "open"
    })
    .await
}

/// What a call of `stillebot_resolve()` or `stillebot_skip()` says.
pub async fn call(node: &Server, call: &str) -> Result<String> {
    node.value(DATABASE, &format!("select {call}")).await
}

pub fn id(row: &Conflict) -> i64 {
    row["id"].as_i64().expect("a number")
}

/// Waits until nothing is open on any node, and all is the same on all of them.
pub async fn settled(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        let closed = wait_until(&format!("no open conflict on {}", node.name()), PATIENCE, || async {
            let open: i64 = node.value(DATABASE, "select open_conflicts from stillebot_status()").await?;
            Ok((open == 0).then_some(()))
        })
        .await;
        if let Err(error) = closed {
            let rows = serde_json::to_string_pretty(&conflicts(node).await?)?;
            return Err(error.context(format!("{rows}\nthe log of {}: {}", node.name(), node.log_tail(10))));
        }
    }
    cluster.wait_replicated().await?;
    cluster.assert_identical().await
}

/// Allows core's own lines for errors that apply or a copy meets again and again.
pub fn expect_errors(cluster: &Cluster, sqlstates: &[&str]) {
    for sqlstate in sqlstates {
        cluster.expect_log(format!(" {sqlstate} logical replication"));
    }
    // A worker may be started before the one that met the error has quite gone.
    cluster.expect_log(" 55006 logical replication");
}

#[tokio::test]
async fn two_inserts_of_one_key_are_a_row_on_each_node_and_one_call_on_each_resolves_them() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let insert = |text: &str| {
        format!(
            "begin;
             insert into stillebot.raids values (1, 1, '\"first\"');
             insert into stillebot.config values (7, 'k', '{{\"by\": \"{text}\"}}');
             insert into stillebot.raids values ({}, 2, '\"rest\"');
             commit",
            text.len()
        )
    };
    // The first row of each transaction is the same, so only the second is in the way.
    apart(&cluster, &insert("sikorsky").replace("(1, 1,", "(1, 10,"), &insert("gideon").replace("(1, 1,", "(1, 11,"))
        .await?;

    let there = wait_open(gideon, "insert_exists").await?;
    let here = wait_open(sikorsky, "insert_exists").await?;
    ensure!(here["schemaname"] == "stillebot" && here["relname"] == "config", "{here:#}");
    ensure!(here["constraint_name"] == "config_pkey" && here["sqlstate"] == "23505", "{here:#}");
    ensure!(here["replica_identity"] == json!({"twitchid": 7, "keyword": "k"}), "{here:#}");
    ensure!(here["remote_tuple"] == json!({"twitchid": 7, "keyword": "k", "data": {"by": "gideon"}}), "{here:#}");
    ensure!(here["change_number"] == 2 && here["blocking"] == true && here["operation"] == "insert", "{here:#}");
    ensure!(here["transaction_kind"] == "plain", "{here:#}");
    let local = here["local_conflicts"].as_array().context("no array")?;
    ensure!(local.len() == 1, "{here:#}");
    ensure!(local[0]["tuple"]["data"] == json!({"by": "sikorsky"}) && local[0]["origin"] == "local", "{here:#}");
    ensure!(local[0]["commit_ts"].is_string() && local[0]["xid"].is_number(), "{here:#}");

    // What the transaction did, up to where it stopped.
    let changes = sikorsky.psql(
        DATABASE,
        &format!("select relname, operation, failed, complete from multihome.conflict_changes({})", id(&here)),
    )?;
    ensure!(changes == "raids|insert|f|f\nconfig|insert|t|f", "{changes}");

    // The newer version wins, on both nodes.
    let said = call(sikorsky, &format!("stillebot_resolve({}, 'remote')", id(&here))).await?;
    ensure!(said.contains("on the other node"), "{said}");
    call(gideon, &format!("stillebot_resolve({}, 'local')", id(&there))).await?;
    settled(&cluster).await?;
    let kept: String = sikorsky.value(DATABASE, "select data->>'by' from stillebot.config where twitchid = 7").await?;
    ensure!(kept == "gideon", "{kept}");
    // The rest of both transactions is there.
    let rest: i64 = gideon.value(DATABASE, "select count(*) from stillebot.raids where toid in (2, 10, 11)").await?;
    ensure!(rest == 4, "{rest}");
    // What was removed stays in the log.
    let row = wait_conflict(sikorsky, "the resolved row", |row| row["status"] == "resolved").await?;
    ensure!(row["local_conflicts"][0]["tuple"]["data"] == json!({"by": "sikorsky"}), "{row:#}");
    ensure!(row["resolution"].as_str().is_some_and(|text| text.starts_with("kept remote")), "{row:#}");
    ensure!(row["resolved_by"] == "postgres", "{row:#}");
    cluster.finish().await
}

#[tokio::test]
async fn a_conflict_is_told_by_notification_within_a_second() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let gideon = cluster.node("gideon");
    let mut listener = gideon.listen("rosuav", DATABASE).await?;
    listener.client.batch_execute("listen stillebot_conflict").await?;
    gideon.execute(DATABASE, "insert into stillebot.raids values (1, 1)").await?;
    cluster.wait_replicated().await?;
    // The row of one node is gone behind replication's back, so to say: its insert will be one of a row that is there.
    let sikorsky = cluster.node("sikorsky");
    sikorsky.execute(DATABASE, "alter table stillebot.raids drop constraint raids_pkey").await?;
    let began = Instant::now();
    sikorsky.execute(DATABASE, "insert into stillebot.raids values (1, 1)").await?;
    let told = tokio::time::timeout(PATIENCE, listener.notifications.recv()).await?.context("the session ended")?;
    let took = began.elapsed();
    ensure!(told.channel() == "stillebot_conflict", "{told:?}");
    let row = wait_open(gideon, "insert_exists").await?;
    ensure!(told.payload() == id(&row).to_string(), "{told:?} {row:#}");
    ensure!(took < Duration::from_secs(1) || std::env::var_os("CI").is_some(), "it took {took:?}");
    call(gideon, &format!("stillebot_resolve({}, 'local')", id(&row))).await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    cluster.finish().await
}

/// Ends the process that collects events on a node, if there is one.
pub async fn end_collector(node: &Server) -> Result<bool> {
    let query = "select count(*) > 0 from (select pg_terminate_backend(pid) from pg_stat_activity \
                 where backend_type = 'stillebot collector') ended";
    node.value("postgres", query).await
}

/// Each node deletes rows that the other one updates, in as many transactions: the updates find nothing.
#[tokio::test]
async fn a_storm_of_conflicts_loses_no_row_uncounted_and_stalls_nothing_while_the_collector_is_killed() -> Result<()> {
    const EACH: i64 = 5_000;
    let cluster = Cluster::start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    sikorsky
        .execute(DATABASE, &format!("insert into stillebot.raids select g, g from generate_series(1, {}) g", 2 * EACH))
        .await?;
    cluster.wait_replicated().await?;
    let links = [cluster.link("sikorsky", "gideon"), cluster.link("gideon", "sikorsky")];
    for link in links {
        link.cut().await?;
    }
    for (node, deleting, updating) in [(sikorsky, 1, EACH + 1), (gideon, EACH + 1, 1)] {
        let client = node.superuser(DATABASE).await?;
        client.batch_execute("set synchronous_commit = off").await?;
        for (statement, from) in [("delete from", deleting), ("update", updating)] {
            let set = if statement == "update" { "set data = '1'" } else { "" };
            let one = format!("{statement} stillebot.raids {set} where fromid = i; commit;");
            let to = from + EACH - 1;
            client.batch_execute(&format!("do $$ begin for i in {from}..{to} loop {one} end loop; end $$")).await?;
        }
    }
    for link in links {
        link.heal().await?;
    }

    let (mut ended, mut highest, mut told, mut killed_at) = (0, 0, [0, 0], [0, 0]);
    let deadline = Instant::now() + 4 * PATIENCE;
    while told.iter().any(|told| *told < EACH) {
        ensure!(Instant::now() < deadline, "{told:?} of {EACH} were told: {}", gideon.log_tail(10));
        for (node, (told, killed_at)) in [sikorsky, gideon].into_iter().zip(told.iter_mut().zip(&mut killed_at)) {
            if *told >= *killed_at + EACH / 10 {
                *killed_at = *told;
                ended += i32::from(end_collector(node).await?);
            }
            highest = highest.max(resident(node)?);
            let query = "select (select coalesce(sum(occurrences), 0)::bigint from multihome.conflicts
                                  where conflict_type = 'update_missing') + events_dropped from stillebot_status()";
            *told = node.value(DATABASE, query).await?;
        }
    }
    ensure!(ended >= 4, "the collectors were ended {ended} times");
    cluster.wait_replicated().await?;
    for node in [sikorsky, gideon] {
        let rows: i64 = node.value(DATABASE, "select count(*) from multihome.conflicts").await?;
        let dropped: i64 = node.value(DATABASE, "select events_dropped from stillebot_status()").await?;
        println!("{}: {rows} rows, {dropped} dropped, {ended} collectors ended, {highest} kB", node.name());
        ensure!(rows > 0 && rows + dropped >= EACH, "{}: {rows} rows, {dropped} dropped", node.name());
        // Nothing stalled: apply met no error but the links that were cut.
        let rows: i64 = node.value(DATABASE, "select count(*) from multihome.conflicts where blocking").await?;
        ensure!(rows == 0, "{rows} conflicts stopped {}", node.name());
    }
    ensure!(highest < 100_000, "the processes have {highest} kB");
    cluster.finish().await
}

/// Kilobytes of private memory that the replication workers and the collector of a node have.
pub fn resident(node: &Server) -> Result<i64> {
    let pids = node.psql(
        "postgres",
        "select pid from pg_stat_activity where backend_type in ('stillebot collector', 'stillebot launcher', 'logical replication worker', 'logical replication apply worker')",
    )?;
    let mut sum = 0;
    for pid in pids.lines() {
        sum += crate::watch::resident(pid.parse()?)?;
    }
    Ok(sum)
}

/// Has gideon meet an update of a row that it does not have, which stops nothing.
async fn miss(cluster: &Cluster, key: i64) -> Result<()> {
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    sikorsky.execute(DATABASE, &format!("insert into stillebot.raids values ({key}, {key})")).await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    // As an apply worker would, so that it does not travel.
    gideon
        .execute(
            DATABASE,
            &format!(
                "begin; set local session_replication_role = replica;
                 select pg_replication_origin_session_setup('elsewhere');
                 delete from stillebot.raids where fromid = {key}; commit"
            ),
        )
        .await?;
    sikorsky.execute(DATABASE, &format!("update stillebot.raids set data = '1' where fromid = {key}")).await?;
    cluster.wait_applied("sikorsky", "gideon").await
}

async fn allow_missing(cluster: &Cluster) -> Result<()> {
    cluster.node("gideon").execute(DATABASE, "select pg_replication_origin_create('elsewhere')").await
}

fn is_of(key: i64) -> impl Fn(&Conflict) -> bool {
    move |row| row["replica_identity"]["fromid"] == key
}

#[tokio::test]
async fn whatever_becomes_of_the_log_apply_goes_on() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gideon = cluster.node("gideon");
    cluster.expect_log("stillebot could not write its log of conflicts");
    allow_missing(&cluster).await?;
    miss(&cluster, 1).await?;
    let row = wait_conflict(gideon, "a missing row", is_of(1)).await?;
    ensure!(row["conflict_type"] == "update_missing" && row["status"] == "open", "{row:#}");
    ensure!(row["blocking"] == false && row["remote_tuple"]["data"] == 1, "{row:#}");

    // The table is gone, and comes back.
    gideon.execute(DATABASE, "alter table multihome.log rename to elsewhere").await?;
    miss(&cluster, 2).await?;
    wait_until("the event to be given up and counted", PATIENCE, || async {
        let dropped: i64 = gideon.value(DATABASE, "select multihome.dropped()").await?;
        Ok((dropped >= 1).then_some(()))
    })
    .await?;
    gideon.execute(DATABASE, "alter table multihome.elsewhere rename to log").await?;
    miss(&cluster, 3).await?;
    wait_conflict(gideon, "a missing row", is_of(3)).await?;

    // The collector dies at any time.
    ensure!(end_collector(gideon).await?);
    miss(&cluster, 4).await?;
    wait_conflict(gideon, "a missing row", is_of(4)).await?;

    // The extension is dropped, and created again.
    gideon.execute(DATABASE, "drop extension stillebot").await?;
    miss(&cluster, 5).await?;
    gideon.execute(DATABASE, "create extension stillebot").await?;
    miss(&cluster, 6).await?;
    wait_conflict(gideon, "a missing row", is_of(6)).await?;
    cluster.finish().await
}

#[tokio::test]
async fn the_log_of_a_node_stays_there() -> Result<()> {
    let cluster = Cluster::start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    cluster.expect_log("terminating logical replication worker due to administrator command");
    cluster.expect_log("requested copy_data with origin = NONE");
    allow_missing(&cluster).await?;
    for node in [sikorsky, gideon] {
        // Also where the peer has been told to replicate the log's tables.
        let refreshed: i64 = node.value(DATABASE, "select count(*) from multihome.refresh(false)").await?;
        ensure!(refreshed == 1);
    }
    miss(&cluster, 1).await?;
    let row = wait_conflict(gideon, "a missing row", is_of(1)).await?;
    call(gideon, &format!("stillebot_resolve({}, 'local')", id(&row))).await?;
    cluster.wait_replicated().await?;
    let elsewhere: i64 = sikorsky.value(DATABASE, "select count(*) from multihome.log").await?;
    ensure!(elsewhere == 0, "{elsewhere} rows have travelled");

    // An initial copy takes the tables of the log along. It must neither collide nor show.
    gideon.execute(DATABASE, "insert into stillebot.raids values (50, 50)").await?;
    cluster.wait_replicated().await?;
    sikorsky.execute(DATABASE, "drop subscription multihome").await?;
    sikorsky.execute(DATABASE, "truncate stillebot.raids, stillebot.settings, stillebot.config").await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    gideon.execute(DATABASE, "insert into stillebot.raids values (51, 51)").await?;
    let port = cluster.link("gideon", "sikorsky").port();
    let tls = sikorsky.outgoing_tls("replicator")?;
    let connection = format!("host=127.0.0.1 port={port} dbname={DATABASE} user=replicator {tls}");
    sikorsky
        .execute(
            DATABASE,
            &format!(
                "create subscription multihome connection '{connection}' publication multihome
             with (origin = none, streaming = on, copy_data = true)"
            ),
        )
        .await?;
    wait_until("the copy to arrive", PATIENCE, || async {
        let query = "select not exists (select from pg_subscription_rel where srsubstate <> 'r')
                            and exists (select from stillebot.raids where fromid = 51)";
        Ok(sikorsky.value::<bool>(DATABASE, query).await?.then_some(()))
    })
    .await
    .with_context(|| sikorsky.log_tail(10))?;
    ensure!(conflicts(sikorsky).await?.is_empty());
    wait_until("what was copied of the log to be removed", PATIENCE, || async {
        let rows: i64 = sikorsky.value(DATABASE, "select count(*) from multihome.log").await?;
        Ok((rows == 0).then_some(()))
    })
    .await?;
    ensure!(conflicts(gideon).await?.len() == 1);
    cluster.finish().await
}

#[tokio::test]
async fn a_resolution_outlives_a_crash_before_it_takes_effect() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    // The worker waits a long time before it tries again, and so meets the crash first.
    apart(
        &cluster,
        "insert into stillebot.raids values (1, 1, '\"s\"')",
        "insert into stillebot.raids values (1, 1, '\"g\"')",
    )
    .await?;
    let (here, there) = (wait_open(sikorsky, "insert_exists").await?, wait_open(gideon, "insert_exists").await?);
    gideon.execute(DATABASE, "alter subscription multihome disable").await?;
    call(gideon, &format!("stillebot_resolve({}, 'local')", id(&there))).await?;
    gideon.kill().await?;
    gideon.start().await?;
    gideon.execute(DATABASE, "alter subscription multihome enable").await?;
    call(sikorsky, &format!("stillebot_resolve({}, 'remote')", id(&here))).await?;
    settled(&cluster).await?;
    let kept: String = sikorsky.value(DATABASE, "select data #>> '{}' from stillebot.raids").await?;
    ensure!(kept == "g", "{kept}");
    cluster.finish().await
}

#[tokio::test]
async fn of_a_redacted_table_only_keys_are_told_and_of_no_connection_its_password() -> Result<()> {
    let cluster = Cluster::builder().config("stillebot.redact", "stillebot.http_sessions, elsewhere.*").start().await?;
    expect_errors(&cluster, &["23505"]);
    cluster.expect_log(" 23514 logical replication");
    let gideon = cluster.node("gideon");
    let insert = |data: &str| format!("insert into stillebot.http_sessions (cookie, data) values ('c', '{data}')");
    apart(&cluster, &insert("secret of sikorsky"), &insert("secret of gideon")).await?;
    let there = wait_open(gideon, "insert_exists").await?;
    let here = wait_open(cluster.node("sikorsky"), "insert_exists").await?;
    ensure!(there["replica_identity"] == json!({"cookie": "c"}) && there["remote_tuple"].is_null(), "{there:#}");
    ensure!(there["local_conflicts"][0]["key"] == json!({"cookie": "c"}), "{there:#}");
    let everything = "select string_agg(l::text, ' ') from multihome.log l";
    // A bytea is written in hexadecimal.
    let secret = |text: &str| text.contains("secret") || text.contains("736563726574");
    let before: String = gideon.value(DATABASE, everything).await?;
    ensure!(!secret(&before), "{before}");
    // Resolving works all the same, and what is removed is not told either.
    call(gideon, &format!("stillebot_resolve({}, 'remote')", id(&there))).await?;
    call(cluster.node("sikorsky"), &format!("stillebot_resolve({}, 'local')", id(&here))).await?;
    settled(&cluster).await?;
    let after: String = gideon.value(DATABASE, everything).await?;
    ensure!(!secret(&after), "{after}");
    let removed = conflicts(gideon).await?.swap_remove(0);
    ensure!(removed["local_conflicts"][0]["key"] == json!({"cookie": "c"}), "{removed:#}");

    for (text, scrubbed) in [
        ("host=h password=abc user=u", "host=h password=*** user=u"),
        ("password = 'it''s' port=1", "password = *** port=1"),
        ("password=\"abc\" user=u", "password=*** user=u"),
        (r"password=a\ abc\\ user=u", "password=*** user=u"),
        ("password='a b' port=1", "password=*** port=1"),
        ("password='left open abc", "password=***"),
        (r"password='a\'b' x", "password=*** x"),
        ("postgres://u:pw@h/d", "postgres://u:***@h/d"),
        ("nothing here", "nothing here"),
    ] {
        let quoted = text.replace('\'', "''");
        let said: String = gideon.value(DATABASE, &format!("select multihome.scrubbed('{quoted}')")).await?;
        ensure!(said == scrubbed || text.contains("''"), "{text}: {said}");
        ensure!(!said.contains("abc") && !said.contains("pw@"), "{said}");
    }
    cluster.finish().await
}

#[tokio::test]
async fn status_counts_conflicts_tells_of_faults_and_warns_of_parallel_apply() -> Result<()> {
    let cluster = Cluster::start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    allow_missing(&cluster).await?;
    miss(&cluster, 1).await?;
    wait_conflict(gideon, "a missing row", is_of(1)).await?;
    // Anybody may ask.
    let bot = gideon.connect("rosuav", DATABASE).await?;
    let status = "select open_conflicts, events_dropped, faults, warnings from stillebot_status()";
    let row = bot.query_one(status, &[]).await?;
    ensure!(row.get::<_, i64>(0) == 1 && row.get::<_, i64>(1) == 0);
    ensure!(row.get::<_, Option<Vec<String>>>(2).is_none() && row.get::<_, Option<Vec<String>>>(3).is_none());

    // A lost connection is a fault, not a conflict, and heals.
    let link = cluster.link("sikorsky", "gideon");
    link.cut().await?;
    let faults = || async {
        Ok::<_, anyhow::Error>(bot.query_one(status, &[]).await?.get::<_, Option<Vec<String>>>(2).unwrap_or_default())
    };
    wait_until("a fault", PATIENCE, || async { Ok(faults().await?.iter().any(|f| f.contains("08006")).then_some(())) })
        .await?;
    link.heal().await?;
    wait_until("the fault to heal", PATIENCE, || async { Ok(faults().await?.is_empty().then_some(())) }).await?;
    let open: i64 = gideon.value(DATABASE, "select count(*) from multihome.conflicts where status = 'open'").await?;
    ensure!(open == 1, "an outage is no conflict");
    let healed: bool = gideon.value(DATABASE, "select bool_and(healed) from multihome.faults").await?;
    ensure!(healed);

    sikorsky.execute(DATABASE, "alter subscription multihome set (streaming = parallel)").await?;
    let warnings: Vec<String> = sikorsky.value(DATABASE, "select warnings from stillebot_status()").await?;
    ensure!(
        warnings.len() == 1 && warnings[0].ends_with("ALTER SUBSCRIPTION multihome SET (streaming = on)"),
        "{warnings:?}"
    );
    cluster.finish().await
}

#[tokio::test]
async fn old_rows_go_and_open_ones_stay() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gideon = cluster.node("gideon");
    allow_missing(&cluster).await?;
    for key in 1..=3 {
        miss(&cluster, key).await?;
        wait_conflict(gideon, "a missing row", is_of(key)).await?;
    }
    let rows = conflicts(gideon).await?;
    call(gideon, &format!("stillebot_resolve({}, 'local')", id(&rows[0]))).await?;
    let gone: i64 = gideon.value(DATABASE, "select stillebot_prune(now() - interval '1 day')").await?;
    ensure!(gone == 0);
    let gone: i64 = gideon.value(DATABASE, "select stillebot_prune(now())").await?;
    ensure!(gone == 1 && conflicts(gideon).await?.len() == 2);

    // By itself, too: as if two months had passed.
    call(gideon, &format!("stillebot_resolve({}, 'local')", id(&rows[1]))).await?;
    gideon.execute(DATABASE, "update multihome.log set last_seen = last_seen - interval '60 days'").await?;
    wait_until("the old row to go", PATIENCE, || async { Ok((conflicts(gideon).await?.len() == 1).then_some(())) })
        .await?;
    ensure!(conflicts(gideon).await?[0]["status"] == "open");
    cluster.finish().await
}

#[tokio::test]
async fn functions_of_a_tables_owner_gain_nothing_from_its_conflicts() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    // Runs wherever a row of the table is looked at, and makes the owner's functions be found first, or so he hopes.
    let trap = "
        create schema evil authorization rosuav;
        set role rosuav;
        create function evil.jsonb_array_elements(jsonb) returns setof jsonb language plpgsql as $$
        begin
            alter role rosuav superuser;
            return query select pg_catalog.jsonb_array_elements($1);
        end $$;
        create function evil.jsonb_each(jsonb, out key text, out value jsonb) returns setof record language plpgsql as $$
        begin
            alter role rosuav superuser;
            return query select * from pg_catalog.jsonb_each($1);
        end $$;
        create function evil.norm(text) returns text language plpgsql immutable as $$
        begin
            perform pg_catalog.set_config('search_path', 'evil, pg_catalog', false);
            return pg_catalog.lower($1);
        end $$;
        create table stillebot.trapped (id int primary key, name text);
        create unique index trapped_name on stillebot.trapped (evil.norm(name));
        grant usage on schema evil to public;";
    for node in [sikorsky, gideon] {
        node.execute(DATABASE, trap).await?;
    }
    for node in [sikorsky, gideon] {
        node.execute(DATABASE, "alter subscription multihome refresh publication with (copy_data = false)").await?;
    }
    apart(
        &cluster,
        "insert into stillebot.trapped values (1, 'Name')",
        "insert into stillebot.trapped values (2, 'NAME')",
    )
    .await?;
    let (here, there) = (wait_open(sikorsky, "insert_exists").await?, wait_open(gideon, "insert_exists").await?);
    ensure!(here["local_conflicts"][0]["key"] == json!({"id": 1}), "{here:#}");
    call(sikorsky, &format!("stillebot_resolve({}, 'remote')", id(&here))).await?;
    call(gideon, &format!("stillebot_resolve({}, 'local')", id(&there))).await?;
    settled(&cluster).await?;
    for node in [sikorsky, gideon] {
        let gained: bool = node.value(DATABASE, "select rolsuper from pg_roles where rolname = 'rosuav'").await?;
        ensure!(!gained, "the owner of a table has become superuser on {}", node.name());
    }
    cluster.finish().await
}

#[tokio::test]
async fn what_a_statement_writes_beside_a_verb_is_refused_and_not_kept_from_the_other_node() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 25006 client backend ");
    cluster.expect_log(" 55000 client backend ");
    let sikorsky = cluster.node("sikorsky");
    let beside = "do $$ begin
                      perform stillebot_prune(now() - interval '1 year');
                      insert into stillebot.raids values (1, 1);
                  end $$";
    let refused = |result: Result<(), tokio_postgres::Error>, state: &str| -> Result<()> {
        let error = result.err().context("it was not refused")?;
        ensure!(error.code().is_some_and(|code| code.code() == state), "{error:?}");
        Ok(())
    };
    let session = sikorsky.superuser(DATABASE).await?;
    refused(session.batch_execute(beside).await, "25006")?;
    sikorsky.execute(DATABASE, "select stillebot_down('the test says so')").await?;
    let late = sikorsky.superuser(DATABASE).await?;
    refused(late.batch_execute(beside).await, "25006")?;
    sikorsky.execute(DATABASE, "select stillebot_up()").await?;
    // Nor can a verb take a session's own origin away.
    session.batch_execute("select pg_replication_origin_create('replayed')").await?;
    session.batch_execute("select pg_replication_origin_session_setup('replayed')").await?;
    refused(session.batch_execute("select stillebot_prune(now())").await, "55000")?;
    session.batch_execute("select pg_replication_origin_session_reset()").await?;
    // The next transaction of the session is as any other.
    session.batch_execute("insert into stillebot.raids values (2, 2)").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    let rows: i64 = cluster.node("gideon").value(DATABASE, "select count(*) from stillebot.raids").await?;
    ensure!(rows == 1, "{rows}");
    cluster.finish().await
}

#[tokio::test]
async fn a_database_without_subscriptions_is_let_go_and_the_launcher_comes_back() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gideon = cluster.node("gideon");
    cluster.expect_log("terminating logical replication worker due to administrator command");
    let ended = "select count(*) > 0 from (select pg_terminate_backend(pid) from pg_stat_activity
                  where backend_type in ('stillebot launcher', 'stillebot collector')) e";
    ensure!(gideon.value::<bool>("postgres", ended).await?, "there is neither launcher nor collector");
    allow_missing(&cluster).await?;
    miss(&cluster, 1).await?;
    wait_conflict(gideon, "a missing row", is_of(1)).await?;
    gideon.execute(DATABASE, "alter subscription multihome disable").await?;
    // DROP DATABASE and the like wait five seconds for others to leave.
    wait_until("the collector to leave", Duration::from_secs(5), || async {
        let query = "select count(*) = 0 from pg_stat_activity where backend_type = 'stillebot collector'";
        Ok(gideon.value::<bool>("postgres", query).await?.then_some(()))
    })
    .await?;
    gideon.execute(DATABASE, "alter subscription multihome enable").await?;
    miss(&cluster, 2).await?;
    wait_conflict(gideon, "a missing row", is_of(2)).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_conflict_whose_commit_follows_another_commit_at_once_stays_open() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let (writer, committer) = (gideon.connect("rosuav", DATABASE).await?, gideon.connect("rosuav", DATABASE).await?);
    // Where the one ends the other begins, unless a page of the WAL or somebody else's record comes between.
    let mut met = None;
    for key in 1..=10 {
        sikorsky.execute(DATABASE, &format!("insert into stillebot.config values ({key}, 'k', '1')")).await?;
        cluster.link("sikorsky", "gideon").cut().await?;
        cluster.wait_applied("gideon", "sikorsky").await?;
        sikorsky.execute(DATABASE, &format!("insert into stillebot.config values ({key}, 'l', '1')")).await?;
        writer.batch_execute(&format!("begin; insert into stillebot.config values ({key}, 'l', '2')")).await?;
        committer.batch_execute(&format!("begin; insert into stillebot.raids values ({key}, 1, '1')")).await?;
        committer.batch_execute("commit").await?;
        writer.batch_execute("commit").await?;
        let conflict = wait_open(sikorsky, "insert_exists").await?;
        let neighbours = format!(
            "select multihome.progress(subscription_oid) = remote_commit_lsn from multihome.log where id = {}",
            id(&conflict)
        );
        let neighbours: bool = sikorsky.value(DATABASE, &neighbours).await?;
        if neighbours {
            met = Some(conflict);
        } else {
            call(sikorsky, &format!("stillebot_resolve({}, 'local')", id(&conflict))).await?;
        }
        cluster.link("sikorsky", "gideon").heal().await?;
        if met.is_some() {
            break;
        }
        let there = wait_open(gideon, "insert_exists").await?;
        call(gideon, &format!("stillebot_resolve({}, 'remote')", id(&there))).await?;
        settled(&cluster).await?;
    }
    let met = met.context("no two commits were neighbours")?;
    // The second attempt: nobody has taken it for resolved meanwhile.
    let again = wait_conflict(sikorsky, "it again", |row| {
        row["id"] == met["id"] && row["occurrences"].as_i64() > met["occurrences"].as_i64()
    })
    .await?;
    ensure!(again["status"] == "open" && again["resolved_at"].is_null(), "{again:#}");
    call(sikorsky, &format!("stillebot_resolve({}, 'local')", id(&met))).await?;
    let there = wait_open(gideon, "insert_exists").await?;
    call(gideon, &format!("stillebot_resolve({}, 'remote')", id(&there))).await?;
    settled(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_log_that_cannot_be_written_for_a_while_misses_nothing() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log("stillebot could not write its log of conflicts");
    let gideon = cluster.node("gideon");
    allow_missing(&cluster).await?;
    let dropped = async || gideon.value::<i64>(DATABASE, "select multihome.dropped()").await;

    // Longer than three attempts take.
    let locker = gideon.superuser(DATABASE).await?;
    locker.batch_execute("begin; lock table multihome.log").await?;
    let began = Instant::now();
    for key in 1..=3 {
        miss(&cluster, key).await?;
    }
    tokio::time::sleep_until((began + Duration::from_secs(6)).into()).await;
    locker.batch_execute("rollback").await?;
    for key in 1..=3 {
        let row = wait_conflict(gideon, "a missing row", is_of(key)).await?;
        ensure!(row["remote_tuple"]["data"] == 1, "it came without its row: {row:#}");
    }
    let said = gideon.log().matches("could not write its log of conflicts").count();
    ensure!((1..=4).contains(&said), "it was said {said} times");

    // A disk that is full.
    let full = "create function multihome.filled() returns trigger language plpgsql as
                  $$ begin raise 'no space' using errcode = '53100'; end $$;
                create trigger filled before insert on multihome.log for each row execute function multihome.filled()";
    gideon.execute(DATABASE, full).await?;
    miss(&cluster, 4).await?;
    wait_until("it to be tried", PATIENCE, || async { Ok(gideon.log().contains("conflicts: no space").then_some(())) })
        .await?;
    gideon.execute(DATABASE, "drop function multihome.filled() cascade").await?;
    wait_conflict(gideon, "a missing row", is_of(4)).await?;
    ensure!(dropped().await? == 0);

    // The extension goes while a batch is being written.
    locker.batch_execute("begin; lock table multihome.log").await?;
    miss(&cluster, 5).await?;
    let waiting = async |what: &str, whom: &str| {
        let query = format!("select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock' and {whom}");
        wait_until(what, PATIENCE, || async { Ok(gideon.value::<bool>(DATABASE, &query).await?.then_some(())) }).await
    };
    waiting("the collector to wait", "backend_type = 'stillebot collector'").await?;
    let dropper = gideon.superuser(DATABASE).await?;
    let drop = tokio::spawn(async move { dropper.batch_execute("drop extension stillebot").await });
    waiting("the drop to wait", "query like 'drop extension%'").await?;
    locker.batch_execute("rollback").await?;
    drop.await??;
    gideon.execute(DATABASE, "create extension stillebot").await?;
    miss(&cluster, 6).await?;
    wait_conflict(gideon, "a missing row", is_of(6)).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_verb_does_not_wait_for_ever_for_a_row_that_another_session_has() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    cluster.expect_log(" 55P03 client backend");
    // The row of the log is the verb's while it waits.
    cluster.expect_log("stillebot could not write its log of conflicts");
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    apart(&cluster, "insert into stillebot.raids values (1, 1)", "insert into stillebot.raids values (1, 1)").await?;
    let (here, there) = (wait_open(sikorsky, "insert_exists").await?, wait_open(gideon, "insert_exists").await?);
    let holder = gideon.superuser(DATABASE).await?;
    holder.batch_execute("begin; select * from stillebot.raids for update").await?;
    let session = gideon.superuser(DATABASE).await?;
    let resolve = format!("select stillebot_resolve({}, 'remote')", id(&there));
    let error = session.batch_execute(&resolve).await.err().context("it was not refused")?;
    let report = error.as_db_error().context("no answer")?;
    ensure!(report.code().code() == "55P03", "{report:?}");
    ensure!(report.message() == "a row of table stillebot.raids is locked by another session", "{report:?}");
    holder.batch_execute("rollback").await?;
    session.batch_execute(&resolve).await?;
    call(sikorsky, &format!("stillebot_resolve({}, 'local')", id(&here))).await?;
    settled(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_stops_apply_is_a_row_also_where_the_servers_log_has_no_errors() -> Result<()> {
    let cluster = Cluster::builder().config("log_min_messages", "fatal").start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    apart(&cluster, "insert into stillebot.raids values (1, 1)", "insert into stillebot.raids values (1, 1)").await?;
    let (here, there) = (wait_open(sikorsky, "insert_exists").await?, wait_open(gideon, "insert_exists").await?);
    for node in [sikorsky, gideon] {
        ensure!(!node.log().contains("duplicate key"), "{}", node.log_tail(10));
    }
    call(gideon, &format!("stillebot_resolve({}, 'remote')", id(&there))).await?;
    call(sikorsky, &format!("stillebot_resolve({}, 'local')", id(&here))).await?;
    settled(&cluster).await?;
    cluster.finish().await
}
