//! The harness itself: what all other tests rely on.

use std::{fs, net::TcpListener, time::Duration};

use anyhow::{Result, ensure};
use stillebot_tests::{Backup, Cluster, Rows, Server, Shutdown, Workload, WorkloadOptions, wait_until};

#[tokio::test]
async fn a_server_is_reached_over_tls_with_a_client_certificate() -> Result<()> {
    let server = Server::builder("sikorsky").without_stillebot().start().await?;
    server.execute("postgres", "create role rosuav login").await?;
    let client = server.connect("rosuav", "postgres").await?;
    let row =
        client.query_one("select ssl, version, client_dn from pg_stat_ssl where pid = pg_backend_pid()", &[]).await?;
    assert!(row.get::<_, bool>(0));
    assert_eq!(row.get::<_, &str>(1), "TLSv1.3");
    assert_eq!(row.get::<_, &str>(2), "/CN=rosuav");
    // libpq verifies the server in full, too.
    let mut psql = stillebot_tests::Installation::get()?.command("psql");
    let output = psql.args(["-XAtc", "select current_user", "-d", &server.conninfo("rosuav", "postgres")?]).output()?;
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "rosuav", "{output:?}");
    drop(client);
    server.finish().await
}

#[tokio::test]
async fn a_killed_server_comes_back_with_what_was_committed() -> Result<()> {
    let server = Server::builder("sikorsky").without_stillebot().start().await?;
    server.execute("postgres", "create table t (i int); insert into t values (42)").await?;
    server.kill().await?;
    assert!(!server.is_running());
    assert!(server.superuser("postgres").await.is_err());
    server.start().await?;
    assert_eq!(server.value::<i32>("postgres", "select i from t").await?, 42);
    server.stop(Shutdown::Immediate).await?;
    server.start().await?;
    server.restart().await?;
    assert_eq!(server.psql("postgres", "select i from t")?, "42");
    server.finish().await
}

#[tokio::test]
async fn settings_are_in_force_after_a_reload() -> Result<()> {
    let server = Server::builder("sikorsky").without_stillebot().config("work_mem", "1MB").start().await?;
    server.config(&[("work_mem", "2MB")]).await?;
    assert_eq!(server.psql("postgres", "show work_mem")?, "2MB");
    server.finish().await
}

#[tokio::test]
async fn servers_are_not_copies_of_each_other_but_backups_are() -> Result<()> {
    let identifier = "select system_identifier::text from pg_control_system()";
    let one = Server::builder("sikorsky").without_stillebot().start().await?;
    let two = Server::builder("gideon").without_stillebot().start().await?;
    let original: String = one.value("postgres", identifier).await?;
    assert_ne!(original, two.value::<String>("postgres", identifier).await?);

    let copy = one.base_backup("restored", Backup::Restored)?;
    copy.start().await?;
    assert_eq!(original, copy.value::<String>("postgres", identifier).await?);
    assert!(!copy.value::<bool>("postgres", "select pg_is_in_recovery()").await?);

    let standby = one.base_backup("standby", Backup::Standby)?;
    standby.start().await?;
    assert!(standby.value::<bool>("postgres", "select pg_is_in_recovery()").await?);
    one.execute("postgres", "create table t as select 1 as i").await?;
    wait_until("the standby to follow", Duration::from_secs(10), || async {
        Ok(standby.value::<bool>("postgres", "select to_regclass('t') is not null").await?.then_some(()))
    })
    .await?;
    standby.finish().await?;
    copy.finish().await?;
    two.finish().await?;
    one.finish().await
}

#[tokio::test]
async fn a_line_nobody_expected_is_an_error_and_an_expected_one_is_not() -> Result<()> {
    for expected in [false, true] {
        let server = Server::builder("sikorsky").without_stillebot().start().await?;
        if expected {
            server.expect_log(" 22012 ");
        }
        server.execute("postgres", "select 1 / 0").await.expect_err("division by zero");
        let result = server.finish().await;
        assert_eq!(result.is_ok(), expected, "{result:?}");
        if let Err(error) = result {
            let text = error.to_string();
            assert!(text.contains("division by zero") && text.contains("STATEMENT:  select 1 / 0"), "{text}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn nothing_is_left_of_a_server_that_is_dropped() -> Result<()> {
    for killed in [false, true] {
        let server = Server::builder("sikorsky").without_stillebot().start().await?;
        let (port, pid) = (server.port(), server.pid().expect("it runs"));
        let directory = server.socket_directory().to_owned();
        let segment = fs::read_to_string(server.data_directory().join("postmaster.pid"))?;
        let segment = segment.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)).map(str::to_owned);
        let segment = segment.expect("the id of a shared memory segment");
        let session = server.superuser("postgres").await?;
        if killed {
            server.kill().await?;
        }
        drop(server);
        assert!(session.is_closed() || session.simple_query("select 1").await.is_err());
        TcpListener::bind(("127.0.0.1", port))?;
        assert!(!directory.exists());
        assert!(!fs::exists(format!("/proc/{pid}"))?);
        let segments = fs::read_to_string("/proc/sysvipc/shm")?;
        assert!(!segments.lines().any(|line| line.split_whitespace().nth(1) == Some(&segment)), "{segments}");
        let ports = directory.parent().expect("a parent").join("ports");
        assert!(!ports.join(port.to_string()).exists());
    }
    Ok(())
}

#[tokio::test]
async fn a_server_can_be_left_running_with_the_command_that_stops_it() -> Result<()> {
    let server = Server::builder("sikorsky").without_stillebot().lasting().start().await?;
    let (endpoint, directory) = (server.endpoint(), server.socket_directory().to_owned());
    let stop = server.leave_running()?;
    endpoint.superuser("postgres").await?.simple_query("select 1").await?;
    let status = std::process::Command::new("sh").args(["-c", &stop]).stdout(std::process::Stdio::null()).status()?;
    assert!(status.success(), "{stop}");
    assert!(!directory.exists());
    assert!(endpoint.superuser("postgres").await.is_err());
    Ok(())
}

#[tokio::test]
async fn two_nodes_replicate_both_ways_and_links_can_be_cut() -> Result<()> {
    let cluster = Cluster::builder().without_extension().start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    sikorsky.execute("stillebot", "insert into stillebot.config values (1, 'a', '{}')").await?;
    gideon.execute("stillebot", "insert into stillebot.config values (2, 'b', '{}')").await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;

    // The bot hears of what replication brings, through the triggers marked ENABLE ALWAYS.
    let mut bot = gideon.listen("rosuav", "stillebot").await?;
    bot.client.batch_execute(r#"listen "stillebot.config:c""#).await?;
    for cut in [true, false] {
        let link = cluster.link("sikorsky", "gideon");
        if cut {
            link.cut().await?
        } else {
            link.freeze().await?
        }
        let keyword = if cut { 'c' } else { 'd' };
        sikorsky.execute("stillebot", &format!("insert into stillebot.config values (3, '{keyword}', '{{}}')")).await?;
        gideon.execute("stillebot", &format!("insert into stillebot.config values (4, '{keyword}', '{{}}')")).await?;
        let query = format!("select count(*) from stillebot.config where keyword = '{keyword}'");
        wait_until("the other way to go on", Duration::from_secs(10), || async {
            Ok((sikorsky.value::<i64>("stillebot", &query).await? == 2).then_some(()))
        })
        .await?;
        assert_eq!(gideon.value::<i64>("stillebot", &query).await?, 1);
        let difference = cluster.assert_identical().await.expect_err("they differ").to_string();
        assert!(difference.contains(r#"{"keyword": ""#) && difference.contains("gideon: -"), "{difference}");
        link.heal().await?;
        cluster.wait_replicated().await?;
        cluster.assert_identical().await?;
    }
    let mut heard = Vec::new();
    while heard.len() < 2 {
        let notification = tokio::time::timeout(Duration::from_secs(10), bot.notifications.recv()).await?;
        heard.push(notification.expect("connected").payload().to_owned());
    }
    heard.sort();
    assert_eq!(heard, ["3", "4"]);
    drop(bot);
    cluster.finish().await
}

#[tokio::test]
async fn three_nodes_replicate_in_a_full_mesh() -> Result<()> {
    let cluster = Cluster::builder().without_extension().nodes(3).start().await?;
    for (index, node) in cluster.nodes().iter().enumerate() {
        node.execute("stillebot", &format!("insert into stillebot.config values ({index}, 'a', '{{}}')")).await?;
    }
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    assert_eq!(cluster.node("rodan").value::<i64>("stillebot", "select count(*) from stillebot.config").await?, 3);
    cluster.finish().await
}

/// The bot's protocol with the notes' advisory down and up, which plain PostgreSQL has.
#[tokio::test]
async fn every_write_of_the_workload_is_accounted_for() -> Result<()> {
    let cluster = Cluster::builder().without_extension().start().await?;
    let workload = Workload::start(&cluster, WorkloadOptions { rows: Rows::PerClientAndNode, ..Default::default() });
    workload.wait_writes(0, 100).await?;
    workload.wait_writes(1, 100).await?;

    // Sikorsky goes down, in words only: the clients leave it.
    let sikorsky = cluster.node("sikorsky");
    sikorsky
        .execute("stillebot", "alter database stillebot set default_transaction_read_only = on; notify readonly, 'on'")
        .await?;
    let watched = "select count(*) from pg_stat_activity where usename = 'rosuav' and application_name = 'stillebot'";
    wait_until("the clients to leave", Duration::from_secs(10), || async {
        Ok((sikorsky.value::<i64>("stillebot", watched).await? == 0).then_some(()))
    })
    .await?;
    let left = workload.acknowledged_by(0);
    workload.wait_writes(1, 100).await?;
    assert_eq!(workload.acknowledged_by(0), left);

    // Then the other one dies while they write there, and comes back: nothing that was acknowledged may be lost.
    let gideon = cluster.node("gideon");
    gideon.kill().await?;
    sikorsky
        .execute(
            "stillebot",
            "begin read write; alter database stillebot reset default_transaction_read_only; commit; \
             notify readonly, 'off'",
        )
        .await?;
    workload.wait_writes(0, 100).await?;
    gideon.start().await?;
    workload.wait_writes(0, 100).await?;

    let report = workload.stop(Duration::from_secs(10)).await?;
    ensure!(!report.switches().is_empty());
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    let verdict = report.verify(&cluster).await?;
    ensure!(verdict.lost.is_empty() && verdict.phantom.is_empty() && verdict.failed.is_empty(), "{verdict:#?}");
    // A write whose COMMIT the killed server did not answer may have been made on both.
    ensure!(verdict.duplicated.iter().all(|(_, ambiguous)| *ambiguous), "{verdict:#?}");
    println!("{verdict}");
    cluster.finish().await
}
