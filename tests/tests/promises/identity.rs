//! What is promised of a node that knows who it is, and of its copies.

use anyhow::{Result, ensure};
use serde_json::Value;
use stillebot_tests::Server;
use tokio_postgres::error::SqlState;

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
    let answer = operator.batch_execute("drop extension stillebot").await;
    assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
    drop((operator, guest));
    server.execute("template1", "create database copy template postgres").await?;
    ensure!(identity(&server, "copy").await? == Value::Null && state(&server, "copy").await? == "up");
    server.execute("postgres", "select multihome.forget_identity()").await?;
    server.execute("postgres", "drop extension stillebot").await?;
    let settings: i64 = server.value("postgres", "select count(*) from pg_db_role_setting").await?;
    ensure!(settings == 0, "settings are left behind");
    server.finish().await
}
