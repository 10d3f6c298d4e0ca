//! The maintenance window: the only way through a database that is down, for one role, for a while.

use anyhow::{Context, Result, ensure};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Server, Shutdown, wait_until};
use tokio_postgres::{Client, error::SqlState};

use crate::PATIENCE;
use crate::answers::{assert_error, assert_refused, furnished, state, take_down};

/// A server that is down, and the session that holds a window open for `owner`.
async fn opened(builder: stillebot_tests::ServerBuilder) -> Result<(Server, Client)> {
    let server = furnished(builder).await?;
    take_down(&server).await?;
    let holder = server.superuser("postgres").await?;
    open(&holder).await?;
    Ok((server, holder))
}

async fn open(holder: &Client) -> Result<()> {
    Ok(holder.batch_execute("select multihome.open_window('owner', '10 min')").await?)
}

/// A change as the bot makes it: `begin read write` overrides what the session is told by its database.
async fn change(server: &Server, role: &str, statements: &str) -> Result<(), tokio_postgres::Error> {
    let session = server.connect(role, "postgres").await.expect("a down database takes sessions");
    session.batch_execute(&format!("begin read write; {statements}; commit")).await
}

/// What a refused write says that the window had let in.
#[track_caller]
fn assert_over(answer: Result<(), tokio_postgres::Error>) {
    let report = assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
    assert_eq!(
        report.hint(),
        Some("The maintenance window that this transaction began in is over. Open one again, and begin anew.")
    );
}

#[tokio::test]
async fn in_a_window_only_the_named_role_passes() -> Result<()> {
    let (server, holder) = opened(Server::builder("sikorsky")).await?;
    change(&server, "owner", "create table made (i int); insert into made values (1)").await?;
    assert_refused(change(&server, "guest", "insert into t values (2, 'x')").await, "another role");
    assert_refused(change(&server, "postgres", "insert into t values (2, 'x')").await, "a superuser");
    // Neither what a session acts as nor what a superuser makes of itself is who logged in.
    assert_refused(
        change(&server, "postgres", "set local role owner; insert into t values (2, 'x')").await,
        "SET ROLE",
    );
    let session = server.superuser("postgres").await?;
    session.batch_execute("set session authorization owner; begin read write").await?;
    assert_refused(session.batch_execute("insert into t values (2, 'x')").await, "SET SESSION AUTHORIZATION");
    assert_refused(holder.batch_execute("begin read write; insert into t values (2, 'x')").await, "its holder");
    let rows: i64 = server.value("postgres", "select count(*) from t").await?;
    ensure!(rows == 1, "{rows} rows");
    server.finish().await
}

#[tokio::test]
async fn a_session_from_before_the_window_is_refused_and_told_to_connect_anew() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let before = server.connect("owner", "postgres").await?;
    take_down(&server).await?;
    // The holder is older than its window, too.
    let holder = server.connect("postgres", "postgres").await?;
    holder.batch_execute("select multihome.open_window('postgres', '10 min')").await?;
    holder.batch_execute("begin read write; insert into t values (2, 'x'); commit").await?;
    holder.batch_execute("select multihome.close_window()").await?;
    open(&holder).await?;
    let report = assert_error(
        before.batch_execute("begin read write; insert into t values (3, 'x'); commit").await,
        &SqlState::READ_ONLY_SQL_TRANSACTION,
    );
    let hint = "A maintenance window is open for this role, and for sessions that began after it. Connect anew.";
    ensure!(report.hint() == Some(hint), "{report:?}");
    before.batch_execute("rollback").await?;
    change(&server, "owner", "insert into t values (4, 'x')").await?;
    // Nor is it let in by what it may commit or prepare.
    assert_error(
        before.batch_execute("begin read write; create table made (i int)").await,
        &SqlState::READ_ONLY_SQL_TRANSACTION,
    );
    let ids: String = server.value("postgres", "select string_agg(id::text, ' ' order by id) from t").await?;
    ensure!(ids == "1 2 4", "{ids}");
    server.finish().await
}

#[tokio::test]
async fn status_shows_the_window_and_nobody_takes_the_database_for_the_live_one() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let mut listener = server.listen("postgres", "postgres").await?;
    take_down(&server).await?;
    listener.client.batch_execute("listen readonly").await?;
    let holder = server.superuser("postgres").await?;
    open(&holder).await?;
    let row = holder.query_one("select state, reason, by_whom, pg_backend_pid() from stillebot_status()", &[]).await?;
    let (shown, reason, by, pid): (String, String, String, i32) = (row.get(0), row.get(1), row.get(2), row.get(3));
    ensure!(shown == "maintenance" && by == "postgres", "{shown} by {by}");
    ensure!(reason.starts_with("maintenance window for owner until 20"), "{reason}");
    ensure!(
        reason.ends_with(&format!("opened by postgres (process {pid}); down before: the test says so")),
        "{reason}"
    );
    // Even to the role that may write.
    for role in ["owner", "guest"] {
        let session = server.connect(role, "postgres").await?;
        let told: String = session.query_one("show transaction_read_only", &[]).await?.get(0);
        ensure!(told == "on", "{role} is told {told}");
    }
    holder.batch_execute("select multihome.close_window()").await?;
    ensure!(state(&server, "postgres").await? == "down");
    // Notifications come in the order of commits: the first one that does is not a window's.
    holder.batch_execute("select stillebot_up()").await?;
    let heard = listener.notifications.recv().await.context("nothing was heard")?;
    ensure!(heard.payload() == "off", "a window is nobody's business but its role's: {heard:?}");
    server.finish().await
}

#[tokio::test]
async fn every_change_of_structure_can_be_made_in_a_window() -> Result<()> {
    let (server, holder) = opened(Server::builder("sikorsky")).await?;
    change(
        &server,
        "owner",
        "alter table t add column more int default 7;
         create index on t (more);
         create function touch() returns trigger language plpgsql as $$ begin new.more := 8; return new; end $$;
         create trigger touch before insert on t for each row execute function touch();
         alter table t enable always trigger touch;
         create table child (id int primary key references t, at timestamptz default now());
         insert into t values (2, 'x');
         alter sequence s increment 16; select nextval('s');
         truncate empty; drop materialized view m; comment on table t is 'changed'",
    )
    .await?;
    let session = server.connect("owner", "postgres").await?;
    session.batch_execute("set default_transaction_read_only = off").await?;
    session.batch_execute("create index concurrently by_note on t (note)").await?;
    session
        .batch_execute(
            "do $$ begin alter table public.t drop column more; commit; create table public.last (i int); end $$",
        )
        .await?;
    holder.batch_execute("select multihome.close_window()").await?;
    let done: bool = server
        .value(
            "postgres",
            "select (select indisvalid from pg_index where indexrelid = 'by_note'::regclass)
                and to_regclass('last') is not null and (select count(*) from t) = 2",
        )
        .await?;
    ensure!(done);
    assert_refused(session.batch_execute("drop table last").await, "the session after the window");
    server.finish().await
}

#[tokio::test]
async fn after_close_window_nothing_of_the_window_can_be_committed() -> Result<()> {
    let (server, holder) = opened(Server::builder("sikorsky")).await?;
    server.expect_log(" 57P01 ");
    let late = server.connect("owner", "postgres").await?;
    late.batch_execute("begin read write; insert into t values (2, 'late')").await?;
    let unwritten = server.connect("owner", "postgres").await?;
    unwritten.batch_execute("begin read write; select * from t").await?;
    change(&server, "owner", "insert into t values (3, 'in time')").await?;
    let committed: String = server.value("postgres", "select pg_current_wal_insert_lsn()::text").await?;
    // Who has written and does not end is ended.
    let edge: String = holder.query_one("select multihome.close_window('50 ms')::text", &[]).await?.get(0);
    let past: bool = server.value("postgres", &format!("select '{edge}'::pg_lsn >= '{committed}'::pg_lsn")).await?;
    ensure!(past, "{edge} is not past {committed}");
    late.batch_execute("commit").await.expect_err("its session was ended");
    assert_over(unwritten.batch_execute("insert into t values (4, 'late')").await);
    unwritten.batch_execute("rollback").await?;
    let ids: String = server.value("postgres", "select string_agg(id::text, ' ' order by id) from t").await?;
    ensure!(ids == "1 3", "{ids}");
    server.finish().await
}

#[tokio::test]
async fn a_transaction_at_its_end_is_waited_for_and_sees_the_window_closed() -> Result<()> {
    let (server, holder) = opened(Server::builder("sikorsky")).await?;
    // A deferred trigger holds the transaction at its end until we let it go.
    change(
        &server,
        "owner",
        "create function stay() returns trigger language plpgsql as
           $$ begin perform pg_advisory_xact_lock(7); return null; end $$;
         create constraint trigger stay after insert on t deferrable initially deferred for each row execute function stay()",
    )
    .await?;
    let gate = server.superuser("postgres").await?;
    gate.batch_execute("select pg_advisory_lock(7)").await?;
    let waiting =
        |what: &'static str, query: &'static str| {
            let server = &server;
            wait_until(what, PATIENCE, move || async move {
                Ok(server.value::<bool>("postgres", query).await?.then_some(()))
            })
        };
    let (committed, closed, ()) = tokio::try_join!(
        async { Ok(change(&server, "owner", "insert into t values (2, 'at its end')").await) },
        async {
            waiting("the commit", "select exists (select from pg_locks where locktype = 'advisory' and not granted)")
                .await?;
            Ok(holder.batch_execute("select multihome.close_window('20 s')").await)
        },
        async {
            waiting("the closing", "select exists (select from pg_stat_activity where query like '%close_window(''20%' and wait_event = 'Extension' and pid <> pg_backend_pid())").await?;
            gate.batch_execute("select pg_advisory_unlock(7)").await.context("let it go")
        },
    )?;
    closed?;
    // It had not looked at the window for the last time.
    assert_over(committed);
    let rows: i64 = server.value("postgres", "select count(*) from t").await?;
    ensure!(rows == 1);
    server.finish().await
}

#[tokio::test]
async fn close_window_returns_behind_the_last_of_many_commits() -> Result<()> {
    let (server, holder) = opened(Server::builder("sikorsky")).await?;
    server.expect_log(" 57P01 ");
    let server = std::sync::Arc::new(server);
    for round in 1..=5 {
        let writers: Vec<_> = (0..6)
            .map(|writer| {
                let server = server.clone();
                tokio::spawn(async move {
                    let session = server.connect("owner", "postgres").await?;
                    let mut committed = 0;
                    loop {
                        let id = round * 1_000_000 + writer * 100_000 + committed;
                        let insert = format!("begin read write; insert into t values ({id}, 'x'); commit");
                        if session.batch_execute(&insert).await.is_err() {
                            return anyhow::Ok(committed);
                        }
                        committed += 1;
                    }
                })
            })
            .collect();
        let in_round = format!("select count(*) from t where id >= {round} * 1000000");
        wait_until("writes", PATIENCE, || async {
            Ok((server.value::<i64>("postgres", &in_round).await? > 20 * i64::from(round)).then_some(()))
        })
        .await?;
        holder.batch_execute("select multihome.close_window()").await?;
        let at_close: i64 = server.value("postgres", &in_round).await?;
        let mut committed = 0;
        for writer in writers {
            committed += i64::from(writer.await??);
        }
        let now: i64 = server.value("postgres", &in_round).await?;
        // A commit whose answer was lost with its session may be more.
        ensure!(
            now == at_close && committed <= now && now <= committed + 6,
            "{at_close}, {now}, {committed} confirmed"
        );
        open(&holder).await?;
    }
    let Ok(server) = std::sync::Arc::try_unwrap(server) else { anyhow::bail!("a writer is left") };
    server.finish().await
}

#[tokio::test]
async fn a_window_closes_by_itself_at_its_deadline() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    take_down(&server).await?;
    let holder = server.superuser("postgres").await?;
    holder.batch_execute("select multihome.open_window('owner', '1 s')").await?;
    let (late, crossing) = (server.connect("owner", "postgres").await?, server.connect("owner", "postgres").await?);
    crossing.batch_execute("begin read write; insert into t values (2, 'crossing')").await?;
    late.batch_execute("begin read write; insert into t values (3, 'late')").await?;
    wait_until("the deadline", PATIENCE, || async { Ok((state(&server, "postgres").await? == "down").then_some(())) })
        .await?;
    assert_over(late.batch_execute("insert into t values (4, 'late')").await);
    // A later window does not let in what an earlier one had.
    open(&holder).await?;
    assert_over(crossing.batch_execute("commit").await);
    change(&server, "owner", "insert into t values (5, 'in time')").await?;
    let ids: String = server.value("postgres", "select string_agg(id::text, ' ' order by id) from t").await?;
    ensure!(ids == "1 5", "{ids}");
    server.finish().await
}

#[tokio::test]
async fn a_window_closes_when_its_holder_is_gone() -> Result<()> {
    let (server, holder) = opened(Server::builder("sikorsky")).await?;
    let late = server.connect("owner", "postgres").await?;
    late.batch_execute("begin read write; insert into t values (2, 'late')").await?;
    drop(holder);
    wait_until("the end of the window", PATIENCE, || async {
        Ok((state(&server, "postgres").await? == "down").then_some(()))
    })
    .await?;
    assert_over(late.batch_execute("commit").await);
    assert_refused(change(&server, "owner", "insert into t values (3, 'x')").await, "a new transaction");
    server.finish().await
}

#[tokio::test]
async fn a_restart_closes_a_window() -> Result<()> {
    let (server, holder) = opened(Server::builder("sikorsky")).await?;
    server.stop(Shutdown::Immediate).await?;
    drop(holder);
    server.start().await?;
    ensure!(state(&server, "postgres").await? == "down");
    assert_refused(change(&server, "owner", "insert into t values (2, 'x')").await, "after the restart");
    server.finish().await
}

#[tokio::test]
async fn a_prepared_transaction_is_committed_in_the_window_or_keeps_it_open() -> Result<()> {
    let (server, holder) = opened(Server::builder("sikorsky").config("max_prepared_transactions", "5")).await?;
    server.expect_log(" 55006 ");
    let session = server.connect("owner", "postgres").await?;
    session.batch_execute("begin read write; create table made (i int); prepare transaction 'change'").await?;
    let report = assert_error(holder.batch_execute("select multihome.close_window()").await, &SqlState::OBJECT_IN_USE);
    ensure!(report.detail() == Some("'change' of owner"), "{report:?}");
    session.batch_execute("commit prepared 'change'").await?;
    session.batch_execute("begin read write; create table other (i int); prepare transaction 'left'").await?;
    // The window ends without its holder's asking: what was prepared can be undone, not done.
    drop(holder);
    wait_until("the end of the window", PATIENCE, || async {
        Ok((state(&server, "postgres").await? == "down").then_some(()))
    })
    .await?;
    assert_refused(session.batch_execute("commit prepared 'left'").await, "commit prepared");
    let other = server.superuser("postgres").await?;
    let asked = other.batch_execute("select stillebot_down(timeout => '0')").await;
    assert_error(asked, &SqlState::OBJECT_IN_USE);
    let asked = other.batch_execute("select multihome.close_window('0')").await;
    let report = assert_error(asked, &SqlState::OBJECT_IN_USE);
    ensure!(report.message().starts_with("cannot close the maintenance window"), "{report:?}");
    session.batch_execute("rollback prepared 'left'").await?;
    other.batch_execute("select multihome.close_window()").await?;
    other.batch_execute("select stillebot_down()").await?;
    ensure!(server.value::<bool>("postgres", "select to_regclass('made') is not null").await?);
    server.finish().await
}

#[tokio::test]
async fn a_window_opens_only_where_it_may() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    for code in ["55000", "42704", "22023", "42501", "55006", "25001", "22012", "22004"] {
        server.expect_log(format!(" {code} "));
    }
    let session = server.superuser("postgres").await?;
    let fails = async |call: &str, code: &SqlState| {
        let report = assert_error(session.batch_execute(call).await, code);
        report.message().to_owned()
    };
    let message =
        fails("select multihome.open_window('owner', '1 min')", &SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE).await;
    ensure!(message == "this database cannot be opened for maintenance: it is not down", "{message}");
    take_down(&server).await?;
    fails("select multihome.open_window('nobody', '1 min')", &SqlState::UNDEFINED_OBJECT).await;
    fails("select multihome.open_window(null, '1 min')", &SqlState::NULL_VALUE_NOT_ALLOWED).await;
    for length in ["0", "-1 s", "24 h 1 s", "1 mon -30 d"] {
        fails(&format!("select multihome.open_window('owner', '{length}')"), &SqlState::INVALID_PARAMETER_VALUE).await;
    }
    fails("begin; select multihome.open_window('owner', '1 min')", &SqlState::ACTIVE_SQL_TRANSACTION).await;
    session.batch_execute("rollback").await?;
    fails(
        "select multihome.open_window('owner', '1 min'), 1 / (select count(*) from pg_class where relname = '')",
        &SqlState::DIVISION_BY_ZERO,
    )
    .await;
    ensure!(state(&server, "postgres").await? == "down", "a call that failed has opened it");
    let guest = server.connect("guest", "postgres").await?;
    for call in ["open_window('guest', '1 min')", "close_window()"] {
        let answer = guest.batch_execute(&format!("select multihome.{call}")).await;
        assert_error(answer, &SqlState::INSUFFICIENT_PRIVILEGE);
    }
    open(&session).await?;
    for call in [
        "multihome.open_window('owner', '1 min')",
        "stillebot_up()",
        "stillebot_down()",
        "multihome.down(null, '1 s', false, '{}')",
    ] {
        let message = fails(&format!("select {call}"), &SqlState::OBJECT_IN_USE).await;
        ensure!(message.ends_with(" is refused while a maintenance window is open"), "{message}");
    }
    // Closing twice is closing once, and then the database opens as ever.
    for call in ["multihome.close_window()", "multihome.close_window()", "stillebot_up()"] {
        session.batch_execute(&format!("select {call}")).await?;
    }
    change(&server, "guest", "insert into t values (2, 'x')").await?;
    server.finish().await
}

#[tokio::test]
async fn what_is_written_in_a_window_stays_on_its_node() -> Result<()> {
    let cluster = Cluster::builder().config("max_prepared_transactions", "2").start().await?;
    let mut holders = Vec::new();
    for node in cluster.nodes() {
        let holder = node.superuser(DATABASE).await?;
        holder.batch_execute("select stillebot_down()").await?;
        holder.batch_execute("select multihome.open_window('rosuav', '1 min')").await?;
        holders.push(holder);
    }
    // The same row on both, once in two steps: had either travelled, it would have been in the other's way.
    for node in cluster.nodes() {
        let session = node.connect("rosuav", DATABASE).await?;
        session.batch_execute("begin read write; create table stillebot.made (i int primary key); insert into stillebot.made values (1); commit").await?;
        session
            .batch_execute("begin read write; insert into stillebot.made values (2); prepare transaction 'two'")
            .await?;
        session.batch_execute("commit prepared 'two'").await?;
    }
    for holder in &holders {
        holder.batch_execute("select multihome.close_window()").await?;
        holder.batch_execute("select stillebot_up()").await?;
        holder.batch_execute("alter subscription multihome refresh publication with (copy_data = false)").await?;
    }
    // What is written afterwards travels, also from a session that has been in a window.
    let session = cluster.node("sikorsky").connect("rosuav", DATABASE).await?;
    session.batch_execute("insert into stillebot.made values (3)").await?;
    cluster.wait_replicated().await?;
    for node in cluster.nodes() {
        let rows: String =
            node.value(DATABASE, "select string_agg(i::text, ' ' order by i) from stillebot.made").await?;
        ensure!(rows == "1 2 3", "{}: {rows}", node.name());
        ensure!(node.value::<i64>(DATABASE, "select count(*) from multihome.conflicts").await? == 0);
    }
    cluster.finish().await
}
