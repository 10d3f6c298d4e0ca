//! What is promised of a node that knows who it is, and of its copies.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::Value;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Backup, Cluster, Server, Shutdown, wait_until};
use tokio_postgres::error::SqlState;

use crate::PATIENCE;
use crate::answers::{assert_error, furnished, state, take_down};

const PAIR: &str = "6f1d8a52-0f43-4a7e-9a51-3b8f0a5c7d11";
const OTHER_PAIR: &str = "00000000-0f43-4a7e-9a51-3b8f0a5c7d11";

/// Tells a database who it is.
async fn identify(server: &Server, database: &str, node: &str) -> Result<String> {
    server.value(database, &format!("select multihome.identify('{node}', '{PAIR}')::text")).await
}

async fn identity(server: &Server, database: &str) -> Result<Value> {
    let text: Option<String> = server.value(database, "select multihome.identity()::text").await?;
    Ok(text.map_or(Ok(Value::Null), |text| serde_json::from_str(&text))?)
}

#[tokio::test]
async fn a_node_is_told_once_who_it_is_and_keeps_it_over_restarts() -> Result<()> {
    let server = furnished(Server::builder("sikorsky").config("stillebot.node", "")).await?;
    server.expect_log(" 55000 ");
    ensure!(identity(&server, "postgres").await? == Value::Null);
    let id = identify(&server, "postgres", "sikorsky").await?;
    ensure!(identify(&server, "postgres", "sikorsky").await? == id);
    let known = identity(&server, "postgres").await?;
    ensure!(known["node"] == "sikorsky" && known["pair"] == PAIR && known["id"] == id.as_str(), "{known}");
    ensure!(known["foreign"] == false && known["why"] == Value::Null, "{known}");
    let facts: String = server
        .value(
            "postgres",
            // SQL has no unsigned numbers.
            "select format('%s %s %s', (select case when i < 0 then 18446744073709551616 + i else i end from (select system_identifier::numeric from pg_control_system()) as s (i)), (select oid from pg_database where datname = 'postgres'),
                           (extract(epoch from pg_postmaster_start_time()) * 1000000)::bigint)",
        )
        .await?;
    let told = format!("{} {} {}", known["system_identifier"], known["database_oid"], known["postmaster_started_us"]);
    ensure!(facts == told, "{facts} is not {told}");

    // While down too, and under another name; but not as part of another pair.
    take_down(&server).await?;
    ensure!(identify(&server, "postgres", "gideon").await? == id);
    let node: String = server.value("postgres", "select node from stillebot_status()").await?;
    ensure!(node == "gideon", "{node}");
    let operator = server.superuser("postgres").await?;
    let answer = operator.batch_execute(&format!("select multihome.identify('gideon', '{OTHER_PAIR}')")).await;
    let report = assert_error(answer, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    ensure!(report.hint().is_some_and(|hint| hint.contains("multihome.forget_identity()")), "{report:?}");
    ensure!(state(&server, "postgres").await? == "down");
    operator.batch_execute("select stillebot_up()").await?;

    server.restart().await?;
    ensure!(state(&server, "postgres").await? == "up");
    server.kill().await?;
    server.start().await?;
    ensure!(state(&server, "postgres").await? == "up");
    let known = identity(&server, "postgres").await?;
    ensure!(known["id"] == id.as_str() && known["foreign"] == false, "{known}");

    let operator = server.superuser("postgres").await?;
    operator.batch_execute("select multihome.forget_identity()").await?;
    ensure!(identity(&server, "postgres").await? == Value::Null);
    operator.batch_execute(&format!("select multihome.identify('gideon', '{OTHER_PAIR}')")).await?;
    ensure!(identity(&server, "postgres").await?["id"] != id.as_str());
    server.finish().await
}

#[tokio::test]
async fn the_log_of_conflicts_follows_the_identity() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let row =
        "insert into multihome.log (subscription_oid, subscription, conflict_type, first_seen, last_seen, blocking)
               values (1, 'multihome', 'apply_error', now(), now(), false)";
    server.execute("postgres", row).await?;
    let seen = "select count(*) from multihome.conflicts";
    ensure!(server.value::<i64>("postgres", seen).await? == 1);
    let id = identify(&server, "postgres", "sikorsky").await?;
    ensure!(server.value::<String>("postgres", "select multihome.node_id()").await? == id);
    ensure!(server.value::<i64>("postgres", seen).await? == 1);
    server.execute("postgres", "select multihome.upkeep()").await?;
    ensure!(server.value::<i64>("postgres", seen).await? == 1);
    server.execute("postgres", "select multihome.forget_identity()").await?;
    ensure!(server.value::<i64>("postgres", seen).await? == 1);
    server.finish().await
}

#[tokio::test]
async fn only_its_own_functions_change_the_identity_and_a_copied_database_has_none() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 42501 ");
    server.expect_log(" 22023 ");
    identify(&server, "postgres", "sikorsky").await?;
    let guest = server.connect("guest", "postgres").await?;
    for call in [
        format!("multihome.identify('x', '{PAIR}')"),
        "multihome.forget_identity()".into(),
        "stillebot_adopt_identity()".into(),
    ] {
        assert_error(guest.batch_execute(&format!("select {call}")).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    guest.batch_execute("select multihome.identity()").await?;
    let elsewhere = server.superuser("template1").await?;
    for statement in [
        "alter database postgres reset all",
        "alter database postgres reset stillebot.identity",
        "alter database postgres set stillebot.identity = ''",
        "alter role all in database postgres set stillebot.identity = ''",
    ] {
        let answer = elsewhere.batch_execute(statement).await;
        let report = assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
        ensure!(report.hint().is_some_and(|hint| hint.contains("multihome.identify()")), "{statement}: {report:?}");
    }
    let operator = server.superuser("postgres").await?;
    assert_error(operator.batch_execute("set stillebot.identity = ''").await, &SqlState::INVALID_PARAMETER_VALUE);
    operator.batch_execute("begin; drop extension stillebot; rollback").await?;
    ensure!(identity(&server, "postgres").await?["node"] == "sikorsky");
    drop((operator, guest));
    server.execute("template1", "create database copy template postgres").await?;
    ensure!(identity(&server, "copy").await? == Value::Null && state(&server, "copy").await? == "up");
    server.execute("postgres", "drop extension stillebot").await?;
    let settings: i64 = server.value("postgres", "select count(*) from pg_db_role_setting").await?;
    ensure!(settings == 0, "settings are left behind");
    server.finish().await
}

/// Two nodes that know who they are.
async fn pair() -> Result<Cluster> {
    let cluster = Cluster::start().await?;
    // Workers of a copy that were refused, once or twice.
    cluster.expect_log("does not replicate: this data directory is a copy of another node's");
    cluster.expect_log(" 25006 ");
    cluster.expect_log(" 55000 ");
    Ok(cluster)
}

/// A row that a node writes.
async fn write(node: &Server, key: &str) -> Result<()> {
    node.execute(DATABASE, &format!("insert into stillebot.http_sessions (cookie) values ('{key}')")).await
}

async fn has(node: &Server, key: &str) -> Result<bool> {
    node.value(DATABASE, &format!("select exists (select from stillebot.http_sessions where cookie = '{key}')")).await
}

async fn wait_has(node: &Server, key: &str) -> Result<()> {
    wait_until(&format!("{key} on {}", node.name()), PATIENCE, || async { Ok(has(node, key).await?.then_some(())) })
        .await
}

/// A copy of sikorsky is awake: it must not take part, and must say so.
async fn assert_foreign(copy: &Server) -> Result<()> {
    let session = copy.superuser(DATABASE).await?;
    let answer = session.batch_execute("insert into stillebot.http_sessions (cookie) values ('copy')").await;
    let report = assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
    ensure!(report.hint().is_some_and(|hint| hint.contains("stillebot_adopt_identity()")), "{report:?}");
    let told: String = session.query_one("show default_transaction_read_only", &[]).await?.get(0);
    ensure!(told == "on", "libpq takes it for writable");
    let row = session.query_one("select state, reason from stillebot_status()", &[]).await?;
    let (state, reason): (String, String) = (row.get(0), row.get(1));
    ensure!(state == "down" && reason.contains("a copy of that of node sikorsky"), "{state}: {reason}");
    for call in ["stillebot_up()", "multihome.up(true)", "multihome.set_hop('{}')"] {
        let answer = session.batch_execute(&format!("select {call}")).await;
        let report = assert_error(answer, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        ensure!(report.hint().is_some_and(|hint| hint.contains("stillebot_adopt_identity()")), "{report:?}");
    }
    wait_until("its subscription to be disabled", PATIENCE, || async {
        Ok((!copy.value::<bool>(DATABASE, "select subenabled from pg_subscription").await?).then_some(()))
    })
    .await?;
    let known = identity(copy, DATABASE).await?;
    ensure!(known["foreign"] == true && known["parked"] == serde_json::json!(["multihome"]), "{known}");
    let lines = copy.log().lines().filter(|line| line.contains("does not replicate")).count();
    ensure!((1..=4).contains(&lines), "{lines} lines in the log of the copy");
    let open: i64 = copy.value(DATABASE, "select open_conflicts from stillebot_status()").await?;
    ensure!(open == 0, "what we refuse ourselves is no conflict");
    Ok(())
}

#[tokio::test]
async fn a_base_backup_that_wakes_beside_its_original_does_not_join() -> Result<()> {
    let cluster = pair().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let copy = sikorsky.base_backup("copy", Backup::Restored)?;
    copy.start().await?;
    assert_foreign(&copy).await?;

    // The original does not notice.
    write(gideon, "afterwards").await?;
    wait_has(sikorsky, "afterwards").await?;
    write(sikorsky, "before").await?;
    wait_has(gideon, "before").await?;
    ensure!(!has(&copy, "afterwards").await?, "the copy took what is the original's");
    ensure!(state(sikorsky, DATABASE).await? == "up");

    // Not while the original runs; nor does a restart make it anything else.
    let session = copy.superuser(DATABASE).await?;
    let answer = session.batch_execute("select stillebot_adopt_identity()").await;
    let report = assert_error(answer, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    ensure!(report.message().contains("still running"), "{report:?}");
    copy.restart().await?;
    assert_foreign(&copy).await?;

    // The original is gone for good; gideon knows that it had what is missing in the copy.
    let written: String = gideon.value(DATABASE, "select pg_current_wal_lsn()::text").await?;
    let confirmed =
        format!("select coalesce(bool_and(confirmed_flush_lsn >= '{written}'), false) from pg_replication_slots");
    wait_until("the slot to be past it", PATIENCE, || async {
        Ok(gideon.value::<bool>(DATABASE, &confirmed).await?.then_some(()))
    })
    .await?;
    sikorsky.stop(Shutdown::Immediate).await?;
    let session = copy.superuser(DATABASE).await?;
    let next: String = wait_until("the publisher to notice", PATIENCE, || async {
        Ok(Some(session.query_one("select stillebot_adopt_identity()", &[]).await?.get(0)))
    })
    .await?;
    ensure!(next.starts_with("This is node sikorsky now.") && next.contains("rows are missing"), "{next}");
    ensure!(state(&copy, DATABASE).await? == "down");
    ensure!(identity(&copy, DATABASE).await?["foreign"] == false);
    let again: String = copy.value(DATABASE, "select stillebot_adopt_identity()").await?;
    ensure!(again.contains("nothing to do"), "{again}");
    copy.restart().await?;
    ensure!(state(&copy, DATABASE).await? == "down");
    copy.execute(DATABASE, "select stillebot_up()").await?;
    write(gideon, "to the new one").await?;
    wait_has(&copy, "to the new one").await?;
    // As was said: what came between the backup and now is not there.
    ensure!(!has(&copy, "afterwards").await?);
    copy.finish().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_copied_data_directory_does_not_join_and_can_take_over() -> Result<()> {
    let cluster = pair().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    sikorsky.execute(DATABASE, "select stillebot_down('for the move')").await?;
    sikorsky.stop(Shutdown::Fast).await?;
    let copy = sikorsky.copy("copy")?;
    copy.start().await?;
    assert_foreign(&copy).await?;
    // It can be read, dumped and taken apart.
    ensure!(copy.psql(DATABASE, "select count(*) from stillebot.settings")? == "1");
    write(gideon, "meanwhile").await?;
    copy.kill().await?;
    copy.start().await?;
    assert_foreign(&copy).await?;
    copy.execute(DATABASE, "select stillebot_adopt_identity()").await?;
    wait_has(&copy, "meanwhile").await?;
    copy.execute(DATABASE, "select stillebot_up()").await?;
    write(&copy, "at the new place").await?;
    let id = identity(&copy, DATABASE).await?["id"].clone();
    ensure!(id == copy.value::<String>(DATABASE, "select multihome.node_id()").await?.as_str());

    // Now it is the old place that is not at home. Nothing must be lost of what it still may have of use.
    sikorsky.start().await?;
    ensure!(state(sikorsky, DATABASE).await? == "down");
    sikorsky.stop(Shutdown::Fast).await?;
    copy.finish().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_copy_is_not_adopted_while_nobody_says_whether_the_original_runs_unless_by_force() -> Result<()> {
    let cluster = pair().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let copy = sikorsky.base_backup("copy", Backup::Restored)?;
    copy.start().await?;
    assert_foreign(&copy).await?;
    sikorsky.stop(Shutdown::Immediate).await?;
    cluster.link("gideon", "sikorsky").cut().await?;
    let session = copy.superuser(DATABASE).await?;
    for call in ["stillebot_adopt_identity()", "stillebot_adopt_identity(null)"] {
        let answer = session.batch_execute(&format!("select {call}")).await;
        let report = assert_error(answer, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        ensure!(report.message().starts_with("cannot ask the publisher of subscription multihome"), "{report:?}");
        ensure!(report.hint().is_some_and(|hint| hint.contains("(force => true)")), "{report:?}");
        ensure!(identity(&copy, DATABASE).await?["foreign"] == true);
    }
    let next: String = session.query_one("select stillebot_adopt_identity(force => true)", &[]).await?.get(0);
    ensure!(next.starts_with("This is node sikorsky now."), "{next}");
    ensure!(state(&copy, DATABASE).await? == "down");
    cluster.link("gideon", "sikorsky").heal().await?;
    write(gideon, "to the new one").await?;
    wait_has(&copy, "to the new one").await?;
    copy.finish().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_copy_can_become_a_database_of_its_own() -> Result<()> {
    let cluster = pair().await?;
    let copy = cluster.node("sikorsky").base_backup("copy", Backup::Restored)?;
    copy.start().await?;
    copy.execute(DATABASE, "select multihome.forget_identity()").await?;
    ensure!(identity(&copy, DATABASE).await? == Value::Null && state(&copy, DATABASE).await? == "down");
    let enabled: bool = copy.value(DATABASE, "select subenabled from pg_subscription").await?;
    ensure!(!enabled);
    let session = copy.superuser(DATABASE).await?;
    session.batch_execute("alter subscription multihome set (slot_name = none)").await?;
    session.batch_execute("drop subscription multihome").await?;
    copy.restart().await?;
    copy.execute(DATABASE, "select stillebot_up()").await?;
    write(&copy, "on its own").await?;
    cluster.wait_replicated().await?;
    ensure!(!has(cluster.node("gideon"), "on its own").await?);
    copy.finish().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_promoted_standby_is_down_until_it_is_told_that_it_is_the_node_now() -> Result<()> {
    let cluster = pair().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let standby = sikorsky.base_backup("standby", Backup::Standby)?;
    standby.start().await?;
    let waiting = standby.superuser(DATABASE).await?;
    waiting.batch_execute("select * from stillebot_status()").await?;
    write(sikorsky, "before").await?;
    wait_has(&standby, "before").await?;
    standby.execute("postgres", "select pg_promote()").await?;
    assert_foreign(&standby).await?;
    let answer = waiting.batch_execute("insert into stillebot.http_sessions (cookie) values ('old session')").await;
    assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
    write(gideon, "to the original").await?;
    wait_has(sikorsky, "to the original").await?;
    ensure!(!has(&standby, "to the original").await?);

    sikorsky.stop(Shutdown::Immediate).await?;
    wait_until("the publisher to notice", PATIENCE, || async {
        standby.execute(DATABASE, "select stillebot_adopt_identity(); ").await.map(Some)
    })
    .await?;
    standby.execute(DATABASE, "select stillebot_up()").await?;
    write(gideon, "to the new one").await?;
    wait_has(&standby, "to the new one").await?;
    standby.finish().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_backup_restored_to_the_same_place_is_a_copy_too() -> Result<()> {
    let cluster = pair().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let backup = sikorsky.base_backup("backup", Backup::Restored)?;
    write(gideon, "after the backup").await?;
    wait_has(sikorsky, "after the backup").await?;
    sikorsky.stop(Shutdown::Fast).await?;
    // A backup has no slots: what its subscriber needs is another matter.
    gideon.execute(DATABASE, "alter subscription multihome disable").await?;
    sikorsky.restore(&backup)?;
    sikorsky.start().await?;
    assert_foreign(sikorsky).await?;
    ensure!(!has(sikorsky, "after the backup").await?);
    sikorsky.execute(DATABASE, "select stillebot_adopt_identity()").await?;
    sikorsky.execute(DATABASE, "select stillebot_up()").await?;
    write(gideon, "from now on").await?;
    wait_has(sikorsky, "from now on").await?;
    cluster.finish().await
}

/// Puts what files have of a directory into the files of another one: they stay the same files. What is only there goes.
fn roll_back(to: &Path, from: &Path) -> Result<()> {
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        if !from.join(entry.file_name()).exists() {
            if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path())? } else { fs::remove_file(entry.path())? }
        }
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let place = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            if !place.exists() {
                fs::create_dir(&place)?;
                let owner = entry.metadata()?;
                std::os::unix::fs::chown(&place, Some(owner.uid()), Some(owner.gid()))?;
                fs::set_permissions(&place, owner.permissions())?;
            }
            roll_back(&place, &entry.path())?;
        } else if place.exists() {
            fs::write(&place, fs::read(entry.path())?)?;
        } else {
            fs::copy(entry.path(), &place)?;
            let owner = entry.metadata()?;
            std::os::unix::fs::chown(&place, Some(owner.uid()), Some(owner.gid()))?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn nobody_follows_a_node_that_was_rolled_back_in_place() -> Result<()> {
    let cluster = pair().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    write(sikorsky, "before").await?;
    wait_has(gideon, "before").await?;
    sikorsky.stop(Shutdown::Fast).await?;
    let snapshot = sikorsky.copy("snapshot")?;
    sikorsky.start().await?;
    let inode = fs::metadata(sikorsky.data_directory().join("global/pg_control"))?.ino();
    sikorsky
        .execute(DATABASE, "insert into stillebot.raids (fromid, toid) select n, 1 from generate_series(1, 2000) n")
        .await?;
    write(sikorsky, "lost").await?;
    wait_has(gideon, "lost").await?;
    sikorsky.stop(Shutdown::Fast).await?;
    roll_back(&sikorsky.data_directory(), &snapshot.data_directory())?;
    ensure!(fs::metadata(sikorsky.data_directory().join("global/pg_control"))?.ino() == inode);
    cluster.expect_log("its publisher has gone back in time");
    sikorsky.start().await?;
    ensure!(!has(sikorsky, "lost").await? && identity(sikorsky, DATABASE).await?["foreign"] == false);

    let parted = "select not subenabled from pg_subscription";
    wait_until("gideon to part with it", PATIENCE, || async {
        Ok(gideon.value::<bool>(DATABASE, parted).await?.then_some(()))
    })
    .await?;
    let told = "select message || ': ' || detail || ' ' || coalesce(conflict_type, '') from multihome.conflicts where status = 'open'";
    let told: String = gideon.value(DATABASE, told).await?;
    ensure!(
        told.contains("\"multihome\" does not replicate: its publisher has gone back in time")
            && told.contains("apply_error"),
        "{told}"
    );
    // However much it writes now, nothing of it is taken for what comes next, until somebody says so.
    sikorsky
        .execute(DATABASE, "insert into stillebot.raids (fromid, toid) select n, 2 from generate_series(1, 5000) n")
        .await?;
    write(sikorsky, "in the past").await?;
    ensure!(gideon.value::<bool>(DATABASE, parted).await? && !has(gideon, "in the past").await?);
    snapshot.finish().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_pg_upgrade_has_made_anew_is_down_and_has_its_log_until_it_is_told_that_it_replaces_the_old_one()
-> Result<()> {
    let old = furnished(Server::builder("sikorsky")).await?;
    identify(&old, "postgres", "sikorsky").await?;
    let row = "create table kept (id int primary key); insert into kept values (1);
               insert into multihome.log (subscription_oid, subscription, conflict_type, first_seen, last_seen, blocking)
               values (1, 'multihome', 'apply_error', now(), now(), false)";
    old.execute("postgres", row).await?;
    take_down(&old).await?;
    let before = identity(&old, "postgres").await?;
    old.stop(Shutdown::Fast).await?;

    let new = old.upgrade("sikorsky")?;
    new.expect_log(" 25006 ");
    new.expect_log(" 55000 ");
    new.start().await?;
    ensure!(state(&new, "postgres").await? == "down");
    let after = identity(&new, "postgres").await?;
    ensure!(after["id"] == before["id"] && after["foreign"] == true, "{after}");
    let operator = new.superuser("postgres").await?;
    assert_error(operator.batch_execute("insert into kept values (2)").await, &SqlState::READ_ONLY_SQL_TRANSACTION);
    let up = operator.batch_execute("select stillebot_up()").await;
    assert_error(up, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
    operator.batch_execute("select stillebot_adopt_identity()").await?;
    operator.batch_execute("select stillebot_up()").await?;
    operator.batch_execute("insert into kept values (2)").await?;
    let known = identity(&new, "postgres").await?;
    ensure!(known["foreign"] == false && known["pair"] == PAIR, "{known}");
    ensure!(new.value::<i64>("postgres", "select count(*) from multihome.log").await? == 1, "the log is gone");
    ensure!(new.value::<i64>("postgres", "select count(*) from kept").await? == 2, "rows are gone");
    drop(operator);
    old.finish().await?;
    new.finish().await
}
