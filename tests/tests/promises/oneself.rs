//! Nobody subscribes to oneself; whoever tries is told so at once, and replication between others is not disturbed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Installation, Server, wait_until};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::PATIENCE;
use crate::answers::{assert_error, state};

/// A session that does not wait for ever where core alone would.
async fn impatient(server: &Server, database: &str) -> Result<Client> {
    let session = server.superuser(database).await?;
    session.batch_execute("set statement_timeout = '20 s'; set default_transaction_read_only = off").await?;
    Ok(session)
}

/// The answer must be the refusal.
#[track_caller]
fn assert_own<T: std::fmt::Debug>(answer: Result<T, tokio_postgres::Error>) {
    let report = assert_error(answer, &SqlState::INVALID_OBJECT_DEFINITION);
    assert!(report.message().ends_with("would replicate this database to itself"), "{report:?}");
    assert!(report.hint().is_some_and(|hint| hint.contains("dbname")), "{report:?}");
}

async fn count(server: &Server, database: &str, what: &str) -> Result<i64> {
    server.value(database, &format!("select count(*) from {what}")).await
}

/// As the harness's own subscriptions connect, but to that port.
fn conninfo(server: &Server, host: &str, port: u16) -> Result<String> {
    let tls = server.outgoing_tls("replicator")?;
    // The certificate is not for every name.
    Ok(format!("host={host} port={port} dbname={DATABASE} user=replicator {tls} sslmode=verify-ca"))
}

#[tokio::test]
async fn no_name_address_socket_or_forwarded_port_leads_a_subscription_to_oneself() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 42P17 ");
    let sikorsky = cluster.node("sikorsky");
    let session = impatient(sikorsky, DATABASE).await?;
    let forwarded = cluster.link("sikorsky", "gideon").port();
    let socket = format!(
        "host={} port={} dbname={DATABASE} user=replicator",
        sikorsky.socket_directory().display(),
        sikorsky.port()
    );
    for (way, conninfo) in [
        ("address", conninfo(sikorsky, "127.0.0.1", sikorsky.port())?),
        ("name", conninfo(sikorsky, "localhost", sikorsky.port())?),
        ("forwarded port", conninfo(sikorsky, "127.0.0.1", forwarded)?),
        ("socket", socket.clone()),
        ("the second of two hosts", format!("{socket} host=/nowhere,{}", sikorsky.socket_directory().display())),
    ] {
        let began = Instant::now();
        let create =
            format!("create subscription own connection '{conninfo}' publication multihome with (origin = none)");
        assert_own(session.batch_execute(&create).await);
        ensure!(began.elapsed() < Duration::from_secs(10), "{way} took {:?}", began.elapsed());

        // Swapped strings, as it happens.
        let alter = format!("alter subscription multihome connection '{conninfo}'");
        assert_own(session.batch_execute(&alter).await);

        // Made unseen, and switched on.
        let create = format!(
            "create subscription own connection '{conninfo}' publication multihome with (connect = false, slot_name = own)"
        );
        session.batch_execute(&create).await?;
        assert_own(session.batch_execute("alter subscription own enable").await);
        assert_own(session.batch_execute("begin; alter subscription own enable").await);
        session
            .batch_execute("rollback; alter subscription own disable; alter subscription own set (slot_name = none)")
            .await?;
        session.batch_execute("drop subscription own").await?;
    }
    cluster.expect_log(" 01000 "); // A subscription that is not connected is warned of.
    ensure!(count(sikorsky, DATABASE, "pg_subscription").await? == 1);
    ensure!(count(sikorsky, DATABASE, "pg_replication_slots").await? == 1, "a slot was left behind");
    // Replication was never interrupted.
    sikorsky.execute(DATABASE, "insert into stillebot.http_sessions (cookie) values ('x')").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_peer_that_cannot_be_reached_keeps_nobody_waiting_and_is_for_the_workers_to_find() -> Result<()> {
    let cluster = Cluster::start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let session = impatient(sikorsky, DATABASE).await?;
    let right: String = sikorsky.value(DATABASE, "select subconninfo from pg_subscription").await?;
    session.batch_execute("alter subscription multihome disable").await?;
    cluster.link("gideon", "sikorsky").freeze().await?;
    for statement in
        [format!("alter subscription multihome connection '{right}'"), "alter subscription multihome enable".into()]
    {
        let began = Instant::now();
        session.batch_execute(&statement).await?;
        ensure!(began.elapsed() < Duration::from_secs(15), "{statement} took {:?}", began.elapsed());
    }
    cluster.link("gideon", "sikorsky").cut().await?;
    session.batch_execute("alter subscription multihome disable").await?;
    session.batch_execute("alter subscription multihome enable").await?;
    // A statement that is to end still ends, and one that follows is not hit.
    cluster.link("gideon", "sikorsky").heal().await?;
    cluster.link("gideon", "sikorsky").freeze().await?;
    cluster.expect_log(" 57014 ");
    session.batch_execute("set statement_timeout = '1 s'").await?;
    let answer = session.batch_execute("alter subscription multihome enable").await;
    assert_error(answer, &SqlState::QUERY_CANCELED);
    session.batch_execute("set statement_timeout = 0; select pg_sleep(0.1)").await?;
    cluster.link("gideon", "sikorsky").heal().await?;
    gideon.execute(DATABASE, "insert into stillebot.http_sessions (cookie) values ('x')").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    cluster.finish().await
}

#[tokio::test]
async fn another_database_of_the_same_server_is_a_peer() -> Result<()> {
    let server = Server::builder("sikorsky").start().await?;
    server.expect_log(" 57P01 "); // DROP SUBSCRIPTION ends the worker.
    server.execute("postgres", "create database other").await?;
    for database in ["postgres", "other"] {
        server.execute(database, "create extension stillebot; create table t (i int primary key); create publication multihome for table t").await?;
    }
    for (here, there) in [("postgres", "other"), ("other", "postgres")] {
        // Making a slot would wait for the very transaction that makes the subscription, so it is made before.
        server.execute(there, &format!("select pg_create_logical_replication_slot('to_{here}', 'pgoutput')")).await?;
        let socket = server.socket_directory().display().to_string();
        let create = format!(
            "create subscription s connection 'host={socket} port={} dbname={there} user=postgres' publication multihome
               with (origin = none, copy_data = false, create_slot = false, slot_name = to_{here})",
            server.port()
        );
        impatient(&server, here).await?.batch_execute(&create).await?;
    }
    server.execute("postgres", "insert into t values (1)").await?;
    server.execute("other", "insert into t values (2)").await?;
    for database in ["postgres", "other"] {
        wait_until("both rows", PATIENCE, || async { Ok((count(&server, database, "t").await? == 2).then_some(())) })
            .await?;
        impatient(&server, database).await?.batch_execute("drop subscription s").await?;
    }
    server.finish().await
}

#[tokio::test]
async fn a_subscription_to_oneself_from_before_never_streams_and_can_be_dropped() -> Result<()> {
    let server = Server::builder("sikorsky").without_stillebot().start().await?;
    server.expect_log(" 01000 ");
    server.expect_log(" 42P17 ");
    server
        .execute(
            "postgres",
            "create extension stillebot; create table t (i int); create publication multihome for table t",
        )
        .await?;
    server.execute("postgres", "select pg_create_logical_replication_slot('own', 'pgoutput')").await?;
    let socket = server.socket_directory().display().to_string();
    let create = format!(
        "create subscription own connection 'host={socket} port={} dbname=postgres user=postgres' publication multihome
           with (connect = false, slot_name = own)",
        server.port()
    );
    server.execute("postgres", &create).await?;
    server.config(&[("shared_preload_libraries", "stillebot")]).await?;
    server.stop(stillebot_tests::Shutdown::Fast).await?;
    // Switched on while nobody looks.
    server.config(&[("shared_preload_libraries", "")]).await?;
    server.start().await?;
    server.execute("postgres", "alter system set max_logical_replication_workers = 0").await?;
    server.restart().await?;
    server.execute("postgres", "alter subscription own enable; insert into t values (1)").await?;
    server.execute("postgres", "alter system reset all").await?;
    server.config(&[("shared_preload_libraries", "stillebot")]).await?;
    server.restart().await?;

    wait_until("the subscription to be disabled", PATIENCE, || async {
        Ok((!server.value::<bool>("postgres", "select subenabled from pg_subscription").await?).then_some(()))
    })
    .await?;
    ensure!(count(&server, "postgres", "t").await? == 1, "it has replicated");
    let told = "select message from multihome.conflicts where conflict_type = 'apply_error' and status = 'open'";
    let message: String = server.value("postgres", told).await?;
    ensure!(message.ends_with("would replicate this database to itself"), "{message}");
    let warnings: Vec<String> = server.value("postgres", "select warnings from stillebot_status()").await?;
    let warning = warnings.iter().find(|warning| warning.contains("itself")).context("no warning")?;
    ensure!(warning.contains("DROP SUBSCRIPTION own"), "{warning}");
    let lines = server.log().lines().filter(|line| line.contains("would replicate this database to itself")).count();
    ensure!((1..=3).contains(&lines), "{lines} lines in the log");

    // Also while down.
    server.execute("postgres", "select stillebot_down('the test says so')").await?;
    impatient(&server, "postgres").await?.batch_execute("drop subscription own").await?;
    ensure!(count(&server, "postgres", "pg_replication_slots").await? == 0);
    ensure!(state(&server, "postgres").await? == "down");
    server.finish().await
}

#[tokio::test]
async fn replication_is_mended_while_down() -> Result<()> {
    let cluster = Cluster::start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let right: String = sikorsky.value(DATABASE, "select subconninfo from pg_subscription").await?;
    sikorsky.execute(DATABASE, "select stillebot_down('the test says so')").await?;
    let session = impatient(sikorsky, DATABASE).await?;
    session.batch_execute(&format!("alter subscription multihome connection '{right}'")).await?;
    session.batch_execute("drop subscription multihome").await?;
    session
        .batch_execute(&format!(
            "create subscription multihome connection '{right}' publication multihome with (origin = none, streaming = on, copy_data = false)"
        ))
        .await?;
    session.batch_execute("alter subscription multihome set (disable_on_error = false)").await?;
    gideon.execute(DATABASE, "insert into stillebot.http_sessions (cookie) values ('x')").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;

    // A publisher that is gone for good.
    cluster.link("gideon", "sikorsky").cut().await?;
    session.batch_execute("alter subscription multihome disable").await?;
    session.batch_execute("alter subscription multihome set (slot_name = none)").await?;
    session.batch_execute("drop subscription multihome").await?;
    ensure!(state(sikorsky, DATABASE).await? == "down");
    cluster.finish().await
}

/// What psql's user is told besides.
fn notices(server: &Server, statement: &str) -> Result<String> {
    let output = server.psql_command(DATABASE).args(["-c", statement]).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test]
async fn what_would_loop_is_warned_of_and_shown_in_status() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log("has origin = any");
    cluster.expect_log(" 23505 "); // What is warned of: a row of its own that comes back.
    cluster.expect_log("is active for PID"); // A worker that follows another.
    cluster.expect_log("is already active for PID");
    cluster.expect_log(" 57P01 "); // DROP SUBSCRIPTION ends the worker.
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let warnings = "select coalesce(array_to_string(warnings, '; '), '') from stillebot_status()";
    ensure!(sikorsky.value::<String>(DATABASE, warnings).await?.is_empty());

    let told = notices(sikorsky, "alter subscription multihome set (origin = any)")?;
    ensure!(told.contains("WARNING") && told.contains("SET (origin = none)"), "{told:?}");
    let status: String = sikorsky.value(DATABASE, warnings).await?;
    ensure!(status.contains("subscription multihome has origin = any"), "{status}");
    let told = notices(sikorsky, "alter subscription multihome set (origin = none)")?;
    ensure!(told.is_empty(), "{told:?}");
    ensure!(sikorsky.value::<String>(DATABASE, warnings).await?.is_empty());

    let right: String = sikorsky.value(DATABASE, "select subconninfo from pg_subscription").await?;
    notices(sikorsky, "drop subscription multihome")?;
    let create = |origin: &str| {
        format!(
            "create subscription multihome connection '{right}' publication multihome with (copy_data = false, streaming = on, origin = {origin})"
        )
    };
    let told = notices(sikorsky, &create("any"))?;
    ensure!(told.contains("WARNING") && told.contains("loops"), "{told:?}");
    notices(sikorsky, "drop subscription multihome")?;
    let told = notices(sikorsky, &create("none"))?;
    ensure!(!told.contains("WARNING"), "{told:?}");

    // A plain subscriber of a plain publisher is nobody's loop.
    notices(gideon, "drop subscription multihome")?;
    notices(sikorsky, "drop publication multihome")?;
    notices(sikorsky, "drop subscription multihome")?;
    let told = notices(sikorsky, &create("any"))?;
    ensure!(!told.contains("WARNING"), "{told:?}");
    ensure!(sikorsky.value::<String>(DATABASE, warnings).await?.is_empty());
    cluster.finish().await
}

#[tokio::test]
async fn a_slot_that_another_keeps_using_is_told_as_a_sign_of_a_copy() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log("is active for PID");
    cluster.expect_log(" 08P01 ");
    cluster.expect_log(" 57P01 ");
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    notices(sikorsky, "alter subscription multihome disable")?;
    let free = "select from pg_replication_slots where slot_name = 'multihome' and active_pid is null";
    wait_until("the slot to be free", PATIENCE, || async {
        Ok((count(gideon, DATABASE, &format!("({free}) as s")).await? == 1).then_some(()))
    })
    .await?;
    // A clone of the disk, say.
    let mut clone = Installation::get()?
        .command("pg_recvlogical")
        .arg("-h")
        .arg(gideon.socket_directory())
        .args([
            "-p",
            &gideon.port().to_string(),
            "-U",
            "postgres",
            "-d",
            DATABASE,
            "-S",
            "multihome",
            "--start",
            "-f",
            "/dev/null",
        ])
        .args(["-o", "proto_version=1", "-o", "publication_names=multihome"])
        .spawn()?;
    wait_until("the slot to be taken", PATIENCE, || async {
        Ok((count(gideon, DATABASE, &format!("({free}) as s")).await? == 0).then_some(()))
    })
    .await?;
    notices(sikorsky, "alter subscription multihome enable")?;
    wait_until("the fault", PATIENCE, || async {
        Ok((count(sikorsky, DATABASE, "multihome.faults where not healed").await? == 1).then_some(()))
    })
    .await?;
    let warning = "select count(*) from unnest((select warnings from stillebot_status())) as w where w like '%is a copy of this node running%'";
    ensure!(sikorsky.value::<i64>(DATABASE, warning).await? == 0, "it may be a moment only");
    sikorsky.execute(DATABASE, "update multihome.fault set first_seen = first_seen - interval '3 minutes'").await?;
    ensure!(sikorsky.value::<i64>(DATABASE, warning).await? == 1);
    clone.kill()?;
    clone.wait()?;
    wait_until("the warning to go", PATIENCE, || async {
        Ok((sikorsky.value::<i64>(DATABASE, warning).await? == 0).then_some(()))
    })
    .await?;
    cluster.finish().await
}
