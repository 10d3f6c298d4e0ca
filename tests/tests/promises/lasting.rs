//! A node that restarts is in the state it was in, and what is unknown counts as down.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};
use stillebot_tests::{Backup, Server, Shutdown, wait_until};
use tokio_postgres::error::SqlState;

use crate::PATIENCE;
use crate::answers::{assert_error, assert_refused, furnished, state, take_down};

async fn assert_down(server: &Server) -> Result<()> {
    let session = server.listen("guest", "postgres").await?;
    ensure!(session.default_transaction_read_only, "libpq and the bot must not take it for live");
    let insert = "begin read write; insert into t values (700, 'x'); commit";
    assert_refused(session.client.batch_execute(insert).await, "a write after the restart");
    session.client.batch_execute("rollback").await?;
    ensure!(state(server, "postgres").await? == "down");
    Ok(())
}

async fn assert_up(server: &Server) -> Result<()> {
    let session = server.listen("guest", "postgres").await?;
    ensure!(!session.default_transaction_read_only);
    session
        .client
        .batch_execute("begin; insert into t values (701, 'x'); delete from t where id = 701; commit")
        .await?;
    ensure!(state(server, "postgres").await? == "up");
    Ok(())
}

#[tokio::test]
async fn down_and_up_last_through_crash_immediate_stop_and_restart() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    for down in [true, false] {
        if down {
            take_down(&server).await?;
        } else {
            server.execute("postgres", "select stillebot_up()").await?;
        }
        for ending in ["crash", "immediate stop", "fast stop"] {
            match ending {
                "crash" => server.kill().await?,
                "immediate stop" => server.stop(Shutdown::Immediate).await?,
                _ => server.stop(Shutdown::Fast).await?,
            }
            server.start().await?;
            if down { assert_down(&server).await? } else { assert_up(&server).await? }
        }
    }
    server.finish().await
}

#[tokio::test]
async fn a_crash_of_one_backend_leaves_the_state_as_it_was() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log("terminated by signal 9");
    server.expect_log(" 57P0"); // Everybody else is told to go, and meanwhile nobody is let in.
    for down in [true, false] {
        if down {
            take_down(&server).await?;
        } else {
            server.execute("postgres", "select stillebot_up()").await?;
        }
        let victim = server.superuser("postgres").await?;
        let pid: i32 = victim.query_one("select pg_backend_pid()", &[]).await?.get(0);
        // The postmaster throws shared memory away and starts all over.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
        wait_until("the session to be gone", PATIENCE, || async { Ok(victim.is_closed().then_some(())) }).await?;
        wait_until("the server to be back", PATIENCE, || async { state(&server, "postgres").await.map(Some) }).await?;
        if down { assert_down(&server).await? } else { assert_up(&server).await? }
    }
    server.finish().await
}

#[tokio::test]
async fn a_crash_in_the_middle_of_going_down_leaves_the_database_up() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let writer = server.connect("guest", "postgres").await?;
    writer.batch_execute("begin; insert into t values (710, 'x')").await?;
    let operator = server.superuser("postgres").await?;
    let down = tokio::spawn(async move { operator.batch_execute("select stillebot_down()").await });
    wait_until("the edge", PATIENCE, || async { Ok((state(&server, "postgres").await? == "down").then_some(())) })
        .await?;
    server.kill().await?;
    ensure!(down.await?.is_err());
    server.start().await?;
    assert_up(&server).await?;
    server.finish().await
}

#[tokio::test]
async fn a_restored_base_backup_is_in_the_state_it_was_taken_in() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let taken_up = server.base_backup("copy-of-up", Backup::Restored)?;
    take_down(&server).await?;
    let taken_down = server.base_backup("copy-of-down", Backup::Restored)?;
    taken_up.start().await?;
    taken_down.start().await?;
    taken_down.expect_log(" 25006 ");
    assert_up(&taken_up).await?;
    assert_down(&taken_down).await?;
    taken_up.finish().await?;
    taken_down.finish().await?;
    server.finish().await
}

#[tokio::test]
async fn a_standby_answers_for_itself_and_is_promoted_into_the_state_of_its_primary() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let standby = server.base_backup("standby", Backup::Standby)?;
    standby.start().await?;
    standby.expect_log(" 25006 ");
    server.expect_log("08006");
    let early = standby.superuser("postgres").await?;
    ensure!(early.query_one("select state from stillebot_status()", &[]).await?.get::<_, String>(0) == "up");
    let report =
        assert_error(early.batch_execute("select stillebot_down()").await, &SqlState::READ_ONLY_SQL_TRANSACTION);
    ensure!(report.message().contains("recovery"), "{report}");

    take_down(&server).await?;
    let lsn: String = server.value("postgres", "select pg_current_wal_lsn()::text").await?;
    wait_until("the standby to have it", PATIENCE, || async {
        let replayed = format!("select pg_last_wal_replay_lsn() >= '{lsn}'");
        Ok(standby.value::<bool>("postgres", &replayed).await?.then_some(()))
    })
    .await?;
    server.kill().await?;
    standby.expect_log("08006");
    standby.execute("postgres", "select pg_promote()").await?;
    // This session is from before the promotion, from before even the primary went down.
    assert_refused(early.batch_execute("insert into t values (720, 'x')").await, "a write of an old session");
    assert_down(&standby).await?;
    standby.execute("postgres", "select stillebot_up()").await?;
    assert_up(&standby).await?;
    standby.finish().await
}

#[tokio::test]
async fn the_only_writable_node_comes_back_closed_until_it_is_told_otherwise() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.execute("postgres", "select multihome.up(true)").await?;
    assert_up(&server).await?;
    for _ in 0..2 {
        server.kill().await?;
        server.start().await?;
        let session = server.listen("guest", "postgres").await?;
        ensure!(session.default_transaction_read_only, "libpq and the bot must not take it for live");
        let answer = session.client.batch_execute("begin read write; insert into t values (730, 'x')").await;
        let report = assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
        ensure!(report.hint().is_some_and(|hint| hint.contains("only writable node")), "{report:?}");
        ensure!(state(&server, "postgres").await? == "down");
    }
    let extension = server.superuser("postgres").await?;
    let answer = extension.batch_execute("drop extension stillebot").await;
    assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
    server.execute("postgres", "select multihome.up(true)").await?;
    assert_up(&server).await?;
    extension.batch_execute("set default_transaction_read_only = off").await?;
    let answer = extension.batch_execute("drop extension stillebot").await;
    let report = assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
    ensure!(report.hint().is_some_and(|hint| hint.contains("stillebot_up()")), "{report:?}");
    // Plainly up it is an ordinary database again, and up lasts.
    server.execute("postgres", "select stillebot_up()").await?;
    server.kill().await?;
    server.start().await?;
    assert_up(&server).await?;
    server.finish().await
}

#[tokio::test]
async fn a_hundred_crashes_let_no_write_through_from_the_first_accepted_connection_on() -> Result<()> {
    let server = Arc::new(furnished(Server::builder("sikorsky")).await?);
    server.expect_log(" 57P03 "); // the database system is starting up
    take_down(&server).await?;
    let refused = Arc::new(AtomicU64::new(0));
    let through = Arc::new(AtomicU64::new(0));
    let mut writers = Vec::new();
    for _ in 0..3 {
        let (server, refused, through) = (Arc::clone(&server), Arc::clone(&refused), Arc::clone(&through));
        writers.push(tokio::spawn(async move {
            loop {
                let Ok(session) = server.superuser("postgres").await else {
                    tokio::task::yield_now().await;
                    continue;
                };
                loop {
                    match session.batch_execute("begin read write; insert into t values (740, 'x'); commit").await {
                        Ok(()) => drop(through.fetch_add(1, Ordering::Relaxed)),
                        Err(error) if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => {
                            refused.fetch_add(1, Ordering::Relaxed);
                            let _ = session.batch_execute("rollback").await;
                        }
                        Err(_) => break,
                    }
                }
            }
        }));
    }
    for _ in 0..100 {
        let before = refused.load(Ordering::Relaxed);
        server.kill().await?;
        server.spawn()?;
        // Each life is long enough for somebody to have tried.
        wait_until("a write to be refused", PATIENCE, || async {
            Ok((refused.load(Ordering::Relaxed) > before).then_some(()))
        })
        .await?;
    }
    for writer in &writers {
        writer.abort();
    }
    for writer in writers {
        let _ = writer.await;
    }
    ensure!(through.load(Ordering::Relaxed) == 0, "a write got through");
    server.wait_ready().await?;
    assert_down(&server).await?;
    let rows: i64 = server.value("postgres", "select count(*) from t").await?;
    ensure!(rows == 1);
    Arc::into_inner(server).expect("the writers have ended").finish().await
}
