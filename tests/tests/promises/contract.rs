//! What is promised of the SQL objects: who may call them, what they belong to, how they come and go.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use stillebot_tests::{Installation, Server, postgres};
use tokio_postgres::error::SqlState;

use crate::answers::{assert_error, assert_refused, furnished, state, take_down};

#[tokio::test]
async fn each_database_of_a_server_has_its_own_state() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.execute("postgres", "create database other").await?;
    server.execute("other", "create extension stillebot; create table t (i int)").await?;
    take_down(&server).await?;
    server.execute("other", "insert into t values (1)").await?;
    server.execute("template1", "create table t (i int); drop table t").await?;
    ensure!(state(&server, "other").await? == "up");
    server.execute("other", "select stillebot_down('the test says so')").await?;
    server.execute("postgres", "select stillebot_up()").await?;
    let other = server.superuser("other").await?;
    assert_refused(other.batch_execute("insert into t values (2)").await, "a write in the other database");
    server.execute("postgres", "insert into t values (800, 'x')").await?;
    server.restart().await?;
    ensure!(state(&server, "other").await? == "down" && state(&server, "postgres").await? == "up");
    // A database copied from one that is down is a new database.
    server.execute("postgres", "create database copy template other").await?;
    ensure!(state(&server, "copy").await? == "up");
    server.finish().await
}

#[tokio::test]
async fn no_other_database_can_make_a_down_database_forget() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    take_down(&server).await?;
    let elsewhere = server.superuser("template1").await?;
    for statement in [
        "alter database postgres reset all",
        "alter database postgres reset stillebot.state",
        "alter database postgres set stillebot.state = ''",
        "alter database postgres reset default_transaction_read_only",
        "alter database postgres set default_transaction_read_only = off",
        "alter role all in database postgres reset all",
        "alter role all in database postgres reset stillebot.state",
        "do $$ begin execute 'alter database postgres reset all'; end $$",
    ] {
        let answer = elsewhere.batch_execute(statement).await;
        let report = assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
        ensure!(report.hint().is_some_and(|hint| hint.contains("stillebot_up()")), "{statement}: {report:?}");
    }
    // And a session cannot talk itself out of it either.
    server.expect_log(" 22023 ");
    for statement in ["set stillebot.state = ''", "select set_config('stillebot.state', '', false)"] {
        let session = server.superuser("postgres").await?;
        assert_error(session.batch_execute(statement).await, &SqlState::INVALID_PARAMETER_VALUE);
    }
    let mut psql = server.psql_command("postgres");
    let output =
        psql.env("PGOPTIONS", "-c stillebot.state=").args(["-c", "insert into t values (810, 'x')"]).output()?;
    ensure!(!output.status.success(), "{output:?}");
    elsewhere.batch_execute("alter database template1 reset all").await?;
    server.restart().await?;
    ensure!(state(&server, "postgres").await? == "down");
    server.finish().await
}

#[tokio::test]
async fn who_and_why_are_kept_in_any_encoding() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.execute("postgres", "create database latin encoding 'LATIN1' locale 'C' template template0").await?;
    server
        .execute("latin", "create extension stillebot; create role jürgen superuser login; create table t (i int)")
        .await?;
    let operator = server.superuser("latin").await?;
    operator.batch_execute("set session authorization jürgen").await?;
    operator.batch_execute("select stillebot_down('für alle')").await?;
    for _ in 0..2 {
        let who: String = server.value("latin", "select by_whom || ': ' || reason from stillebot_status()").await?;
        ensure!(who == "jürgen: für alle", "{who}");
        let session = server.superuser("latin").await?;
        let answer = session.batch_execute("insert into t values (1)").await;
        let report = assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
        ensure!(
            report.hint().is_some_and(|hint| hint.contains("by j?rgen") && hint.contains("f?r alle")),
            "{report:?}"
        );
        server.restart().await?;
    }
    server.finish().await
}

#[tokio::test]
async fn only_the_owner_may_call_the_verbs_and_two_grants_share_them() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 42501 ");
    let guest = server.connect("guest", "postgres").await?;
    for call in [
        "stillebot_down()",
        "stillebot_up()",
        "multihome.down(null, '1 s', false, null)",
        "multihome.up(false)",
        "multihome.set_hop(null)",
        "multihome.refresh()",
    ] {
        assert_error(guest.batch_execute(&format!("select {call}")).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    ensure!(guest.query_one("select state from stillebot_status()", &[]).await?.get::<_, String>(0) == "up");
    server
        .execute(
            "postgres",
            "grant execute on function stillebot_down(text, interval, boolean) to guest;
             grant execute on function stillebot_up() to guest",
        )
        .await?;
    guest.batch_execute("select stillebot_down('a plain role may')").await?;
    let by: String = server.value("postgres", "select by_whom from stillebot_status()").await?;
    ensure!(by == "guest", "the session's user, not the function's owner: {by}");
    guest.batch_execute("select stillebot_up()").await?;
    guest.batch_execute("insert into t values (820, 'x')").await?;
    server.finish().await
}

#[tokio::test]
async fn status_is_for_everyone_and_says_who_when_why_and_how_many() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let guest = server.connect("guest", "postgres").await?;
    let writer = server.connect("guest", "postgres").await?;
    writer.batch_execute("begin; insert into t values (830, 'x')").await?;
    let row = guest
        .query_one("select node, state, writers, lsn is not null, subscriptions from stillebot_status()", &[])
        .await?;
    ensure!(row.get::<_, String>(0) == "sikorsky" && row.get::<_, String>(1) == "up");
    ensure!(row.get::<_, i32>(2) == 1 && row.get::<_, bool>(3) && row.get::<_, i32>(4) == 0);
    writer.batch_execute("rollback").await?;
    take_down(&server).await?;
    let row = guest
        .query_one(
            "select state, by_whom, reason, writers, since between now() - interval '1 minute' and now() from stillebot_status()",
            &[],
        )
        .await?;
    ensure!(row.get::<_, String>(0) == "down" && row.get::<_, String>(1) == "postgres");
    ensure!(row.get::<_, String>(2) == "the test says so" && row.get::<_, i32>(3) == 0 && row.get::<_, bool>(4));
    server.finish().await
}

#[tokio::test]
async fn without_preloading_every_function_says_what_to_set() -> Result<()> {
    let server = Server::builder("sikorsky").without_stillebot().start().await?;
    server.expect_log(" 55000 ");
    server.execute("postgres", "create extension stillebot").await?;
    let operator = server.superuser("postgres").await?;
    for call in ["stillebot_down()", "stillebot_up()", "stillebot_status()", "multihome.state()", "multihome.refresh()"]
    {
        let answer = operator.batch_execute(&format!("select {call}")).await;
        let report = assert_error(answer, &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        ensure!(
            report.hint().is_some_and(|hint| hint.contains("shared_preload_libraries = 'stillebot'")),
            "{report:?}"
        );
    }
    operator.batch_execute("create table t (i int); insert into t values (1)").await?;
    server.finish().await
}

#[tokio::test]
async fn dropping_the_extension_is_refused_while_down_and_leaves_a_plain_database_while_up() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    take_down(&server).await?;
    let operator = server.superuser("postgres").await?;
    operator.batch_execute("set default_transaction_read_only = off").await?;
    assert_refused(operator.batch_execute("drop extension stillebot").await, "drop extension");
    assert_refused(operator.batch_execute("drop schema multihome cascade").await, "drop schema");
    operator.batch_execute("select stillebot_up()").await?;
    operator.batch_execute("drop extension stillebot").await?;
    let settings: i64 = server.value("postgres", "select count(*) from pg_db_role_setting").await?;
    ensure!(settings == 0, "settings are left behind");
    let objects: i64 = server.value("postgres", "select count(*) from pg_proc where proname like 'stillebot%'").await?;
    ensure!(objects == 0);
    server.restart().await?;
    server.execute("postgres", "insert into t values (840, 'x'); create extension stillebot").await?;
    server.execute("postgres", "select stillebot_down()").await?;
    server.finish().await
}

#[tokio::test]
async fn every_released_version_can_be_installed_and_updated() -> Result<()> {
    let server = Server::builder("sikorsky").config("max_prepared_transactions", "10").start().await?;
    server.expect_log(" 25006 ");
    let current: String = server
        .value("postgres", "select default_version from pg_available_extensions where name = 'stillebot'")
        .await?;
    let operator = server.superuser("postgres").await?;
    let released = operator
        .query("select version from pg_available_extension_versions where name = 'stillebot' order by 1", &[])
        .await?;
    ensure!(released.len() >= 2, "the first release and its successors");
    let fresh = objects(&operator, &current, None).await?;
    ensure!(fresh.len() > 5);
    for version in released.iter().map(|row| row.get::<_, String>(0)) {
        let updated = objects(&operator, &version, Some(&current)).await?;
        ensure!(updated == fresh, "updating from {version} gives other objects than installing {current}");
    }

    // An update needs the database up, and carries the state of the extension over.
    operator.batch_execute("create extension stillebot version '0.1.0'").await?;
    operator.batch_execute("select stillebot_down('the test says so')").await?;
    assert_refused(operator.batch_execute("alter extension stillebot update").await, "an update");
    operator.batch_execute("select stillebot_up()").await?;
    operator.batch_execute("alter extension stillebot update").await?;
    let version: String =
        server.value("postgres", "select extversion from pg_extension where extname = 'stillebot'").await?;
    ensure!(version == current);
    operator.batch_execute("select multihome.down('x', '1 s', false, null)").await?;
    operator.batch_execute("select stillebot_up()").await?;
    server.finish().await
}

/// All that the extension consists of after an installation and perhaps an update, with comments and privileges.
async fn objects(operator: &tokio_postgres::Client, version: &str, update: Option<&str>) -> Result<BTreeSet<String>> {
    operator.batch_execute(&format!("create extension stillebot version '{version}'")).await?;
    if let Some(current) = update {
        operator.batch_execute(&format!("alter extension stillebot update to '{current}'")).await?;
    }
    let rows = operator
        .query(
            "select pg_describe_object(d.classid, d.objid, 0) || coalesce(obj_description(d.objid, 'pg_proc'), '')
                    || coalesce(p.proacl::text, '') || coalesce(p.proconfig::text, '') || coalesce(p.prosecdef::text, '')
               from pg_depend d left join pg_proc p on d.classid = 'pg_proc'::regclass and p.oid = d.objid
              where d.deptype = 'e' and d.refobjid = (select oid from pg_extension where extname = 'stillebot')",
            &[],
        )
        .await?;
    operator.batch_execute("drop extension stillebot; drop schema if exists multihome").await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

#[tokio::test]
async fn a_dump_of_the_whole_database_can_be_restored() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.execute("postgres", "create table more (i int primary key); insert into more values (1)").await?;
    server.execute("postgres", "create database restored template template0").await?;
    let program = |name: &str, database: &str| {
        let mut command = server.installation().command(name);
        command.arg("-h").arg(server.socket_directory()).args([
            "-p",
            &server.port().to_string(),
            "-U",
            "postgres",
            "-d",
            database,
        ]);
        command
    };
    let dump = program("pg_dump", "postgres").output()?;
    ensure!(dump.status.success(), "{dump:?}");
    let mut psql = program("psql", "restored")
        .args(["-Xq1", "-v", "ON_ERROR_STOP=1", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    psql.stdin.take().context("no stdin")?.write_all(&dump.stdout)?;
    ensure!(psql.wait()?.success());
    let rows: i64 = server.value("restored", "select count(*) from more").await?;
    let triggers: i64 =
        server.value("restored", "select count(*) from pg_event_trigger where evtname like 'stillebot%'").await?;
    ensure!(rows == 1 && triggers == 2, "{rows} rows, {triggers} triggers");
    ensure!(state(&server, "restored").await? == "up");
    server.finish().await
}

#[tokio::test]
async fn every_sql_object_has_a_comment() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let bare: i64 = server
        .value(
            "postgres",
            "select count(*) from pg_depend d
              where d.deptype = 'e' and d.refobjid = (select oid from pg_extension where extname = 'stillebot')
                -- From 17 on the types that tables bring along are members too.
                and d.classid <> 'pg_type'::regclass
                and not exists (select from pg_description c where c.objoid = d.objid and c.classoid = d.classid)",
        )
        .await?;
    ensure!(bare == 0, "{bare} objects of the extension have no comment");
    server.finish().await
}

#[test]
fn every_exported_function_is_declared_in_sql_and_the_reverse() -> Result<()> {
    let library = Installation::get()?.library_directory().join("stillebot.so");
    let symbols = Command::new("nm").args(["-D", "--defined-only"]).arg(&library).output().context("nm")?;
    ensure!(symbols.status.success(), "nm {}: {symbols:?}", library.display());
    let exported: BTreeSet<String> = String::from_utf8(symbols.stdout)?
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .filter(|symbol| symbol.ends_with("_wrapper") && !symbol.starts_with("pg_finfo_"))
        .map(str::to_owned)
        .collect();
    let mut declared = BTreeSet::new();
    for file in std::fs::read_dir(postgres::workspace().join("sql"))? {
        let sql = std::fs::read_to_string(file?.path())?;
        for line in sql.lines().filter(|line| line.starts_with("as 'MODULE_PATHNAME'")) {
            declared.insert(line.split('\'').nth(3).context("a C function names its symbol")?.to_owned());
        }
    }
    ensure!(!exported.is_empty() && exported == declared, "exported {exported:?}, declared {declared:?}");
    Ok(())
}
