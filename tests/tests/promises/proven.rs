//! When stillebot_down() returns, nobody can write any more; when it fails, nothing has changed.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use stillebot_tests::{Server, wait_until};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error, SimpleQueryMessage, error::SqlState};

use crate::PATIENCE;
use crate::answers::{assert_error, assert_refused, furnished, furnished_with_two_phase, state, take_down, up_again};

type Down = JoinHandle<Result<Vec<SimpleQueryMessage>, Error>>;

/// Starts a call of stillebot_down() and returns when the edge is drawn.
async fn begin_to_take_down(server: &Server, arguments: &str) -> Result<Down> {
    let operator = server.superuser("postgres").await?;
    let statement = format!("select stillebot_down('the test says so'{arguments})");
    let down = tokio::spawn(async move { operator.simple_query(&statement).await });
    wait_until("the edge", PATIENCE, || async { Ok((state(server, "postgres").await? == "down").then_some(())) })
        .await?;
    Ok(down)
}

/// The LSN that stillebot_down() returned.
fn edge(answer: &[SimpleQueryMessage]) -> Result<String> {
    match answer {
        [.., SimpleQueryMessage::Row(row), _] => Ok(row.get(0).unwrap_or_default().to_owned()),
        other => bail!("{other:?}"),
    }
}

/// Runs a statement that stands still in the middle, until [`Gatekeeper::open`].
struct Gatekeeper(Client);

impl Gatekeeper {
    async fn new(server: &Server) -> Result<Gatekeeper> {
        let client = server.superuser("postgres").await?;
        client.execute("select pg_advisory_lock(1)", &[]).await?;
        Ok(Gatekeeper(client))
    }

    /// Starts the statement, which waits for advisory lock 1 somewhere, and returns when it does.
    async fn start(server: &Server, statement: &'static str) -> Result<JoinHandle<Result<(), Error>>> {
        let session = server.connect("guest", "postgres").await?;
        let waiting = tokio::spawn(async move { session.batch_execute(statement).await });
        wait_until("the statement to wait", PATIENCE, || async {
            let waits = "select count(*) > 0 from pg_locks where locktype = 'advisory' and not granted";
            Ok(server.value::<bool>("postgres", waits).await?.then_some(()))
        })
        .await?;
        Ok(waiting)
    }

    async fn open(self) -> Result<()> {
        self.0.execute("select pg_advisory_unlock(1)", &[]).await?;
        Ok(())
    }
}

/// Nothing in the WAL past this position changes a table: walinspect would see it.
async fn assert_nothing_written_past(server: &Server, lsn: &str) -> Result<()> {
    // walinspect wants a record to begin with.
    server.execute("postgres", "select pg_logical_emit_message(true, 'test', '')").await?;
    let query = format!(
        "select count(*) from pg_get_wal_records_info('{lsn}', pg_current_wal_lsn())
          where resource_manager in ('Heap', 'Heap2', 'Sequence') and record_type ~ 'INSERT|UPDATE|DELETE|LOG'
            and block_ref !~ 'rel 1664/0/'"
    );
    let records: i64 = server.value("postgres", &query).await?;
    ensure!(records == 0, "{records} changes past {lsn}");
    Ok(())
}

#[tokio::test]
async fn a_running_statement_without_an_xid_is_waited_for() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    for (id, statement) in [
        // It passed every check already, and will write when it goes on: the transaction has no id yet.
        (600, "insert into t select 600, 'slow' from (select pg_advisory_lock_shared(1)) gate"),
        // A query could still call anything.
        (
            601,
            "do $$ begin perform pg_advisory_lock_shared(1); perform write_inside(601); exception when others then null; end $$",
        ),
    ] {
        let gate = Gatekeeper::new(&server).await?;
        let slow = Gatekeeper::start(&server, statement).await?;
        let xids: i64 =
            server.value("postgres", "select count(backend_xid) from pg_stat_activity where usename = 'guest'").await?;
        ensure!(id == 601 || xids == 0, "the point of the test is that it has none");
        let down = begin_to_take_down(&server, "").await?;
        ensure!(!down.is_finished());
        gate.open().await?;
        slow.await??;
        let lsn = edge(&down.await??)?;
        assert_nothing_written_past(&server, &lsn).await?;
        let there: bool = server.value("postgres", &format!("select exists (select from t where id = {id})")).await?;
        ensure!(there == (id == 600), "what passed before the edge is there, what came after is not");
        server.execute("postgres", "select stillebot_up()").await?;
    }
    server.finish().await
}

/// An INSERT asks core once whether it may write, when it starts. What nested statements are told later, in the middle of
/// it, must not hide it from the drain.
#[tokio::test]
async fn a_statement_whose_nested_statements_meet_the_edge_is_waited_for() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server
        .execute(
            "postgres",
            "create function two_gates() returns int language plpgsql as
               $$ begin perform pg_advisory_lock_shared(1); perform pg_advisory_lock_shared(2); return 680; end $$",
        )
        .await?;
    for (statement, written) in [
        ("insert into t select two_gates(), 'x'", "exists (select from t where id = 680)"),
        ("begin; insert into t select two_gates() + 1, 'x'; commit", "exists (select from t where id = 681)"),
        // A block with an exception handler forgets at its end what it was told, and what follows is evaluated anew by nobody.
        (
            "do $$ declare x oid; begin
               for i in 1..2 loop
                 x := case when i = 2 then lo_create(682) end;
                 if i = 1 then
                   begin perform two_gates(); exception when division_by_zero then null; end;
                 end if;
               end loop;
             end $$",
            "exists (select from pg_largeobject_metadata where oid = 682)",
        ),
    ] {
        let second = server.superuser("postgres").await?;
        second.execute("select pg_advisory_lock(2)", &[]).await?;
        let first = Gatekeeper::new(&server).await?;
        let slow = Gatekeeper::start(&server, statement).await?;
        let down = begin_to_take_down(&server, "").await?;
        first.open().await?;
        wait_until("the second gate", PATIENCE, || async {
            let waits = "select count(*) > 0 from pg_locks where locktype = 'advisory' and not granted and objid = 2";
            Ok(server.value::<bool>("postgres", waits).await?.then_some(()))
        })
        .await?;
        let writers: i32 = server.value("postgres", "select writers from stillebot_status()").await?;
        ensure!(writers == 1 && !down.is_finished(), "{statement} was lost sight of");
        second.execute("select pg_advisory_unlock(2)", &[]).await?;
        slow.await??;
        let lsn = edge(&down.await??)?;
        assert_nothing_written_past(&server, &lsn).await?;
        ensure!(
            server.value::<bool>("postgres", &format!("select {written}")).await?,
            "it passed before the edge: {statement}"
        );
        server.execute("postgres", "select stillebot_up()").await?;
    }
    server.finish().await
}

#[tokio::test]
async fn an_idle_writer_and_a_copy_are_waited_for() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let writer = server.connect("guest", "postgres").await?;
    writer.batch_execute("begin; insert into t values (610, 'idle')").await?;
    let down = begin_to_take_down(&server, "").await?;
    writer.batch_execute("commit").await?;
    down.await??;
    let rows: i64 = server.value("postgres", "select count(*) from t").await?;
    ensure!(rows == 2, "a commit that came in time is kept");
    server.execute("postgres", "select stillebot_up()").await?;

    let copy = server.connect("guest", "postgres").await?;
    let sink = copy.copy_in::<_, bytes::Bytes>("copy t from stdin").await?;
    let down = begin_to_take_down(&server, "").await?;
    ensure!(!down.is_finished());
    let mut sink = std::pin::pin!(sink);
    futures_util::SinkExt::send(&mut sink, bytes::Bytes::from("611\tcopied\n")).await?;
    sink.finish().await?;
    down.await??;
    server.finish().await
}

/// CREATE INDEX CONCURRENTLY goes on in transactions that no hook sees begin. It also waits for every older snapshot, the
/// one of stillebot_down() included, so a down that comes in the middle of one ends at its timeout.
#[tokio::test]
async fn an_index_that_is_being_created_concurrently_is_in_the_way() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 55006 ");
    let reader = server.connect("guest", "postgres").await?;
    reader.batch_execute("begin; insert into t values (612, 'holds a lock')").await?;
    let owner = server.connect("owner", "postgres").await?;
    let index = tokio::spawn(async move { owner.batch_execute("create index concurrently by_note on t (note)").await });
    wait_until("the index to wait for the writer", PATIENCE, || async {
        let waits = "select count(*) > 0 from pg_locks where locktype = 'virtualxid' and not granted";
        Ok(server.value::<bool>("postgres", waits).await?.then_some(()))
    })
    .await?;
    let down = begin_to_take_down(&server, ", '1 s'").await?;
    reader.batch_execute("rollback").await?;
    let report = assert_error(down.await?, &SqlState::OBJECT_IN_USE);
    ensure!(report.detail().is_some_and(|detail| detail.contains("user owner")), "{report:?}");
    index.await??;
    let valid: bool =
        server.value("postgres", "select indisvalid from pg_index where indexrelid = 'by_note'::regclass").await?;
    ensure!(valid);
    take_down(&server).await?;
    server.finish().await
}

#[tokio::test]
async fn readers_are_not_waited_for() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let idle = server.connect("guest", "postgres").await?;
    idle.batch_execute("begin; select * from t").await?;
    // As pg_dump does, and reports that declare what they are: they could not write before the edge either.
    let gate = Gatekeeper::new(&server).await?;
    let report = Gatekeeper::start(&server, "begin read only; select pg_advisory_lock_shared(1)").await?;
    // An error that a savepoint caught leaves nothing behind that counts as writing.
    server.expect_log(" 42P07 ");
    let forgiven = server.connect("guest", "postgres").await?;
    forgiven.batch_execute("begin").await?;
    forgiven.batch_execute("savepoint a").await?;
    assert_error(forgiven.batch_execute("create table t (i int)").await, &SqlState::DUPLICATE_TABLE);
    forgiven.batch_execute("rollback to a").await?;
    forgiven.batch_execute("commit").await?;
    let forgiven =
        tokio::spawn(async move { forgiven.batch_execute("begin read only; select pg_advisory_lock_shared(1)").await });
    wait_until("the second report to wait", PATIENCE, || async {
        let waits = "select count(*) = 2 from pg_locks where locktype = 'advisory' and not granted";
        Ok(server.value::<bool>("postgres", waits).await?.then_some(()))
    })
    .await?;
    take_down(&server).await?;
    gate.open().await?;
    report.await??;
    forgiven.await??;
    server.finish().await
}

#[tokio::test]
async fn at_the_timeout_the_sessions_in_the_way_are_named_and_the_database_is_up_as_before() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 55006 ");
    let writer = server.connect("guest", "postgres").await?;
    writer.batch_execute("set application_name = 'the slow one'; begin; insert into t values (620, 'secret')").await?;
    let operator = server.superuser("postgres").await?;
    let mut bot = server.listen("guest", "postgres").await?;
    bot.client.batch_execute("listen readonly").await?;

    let answer = operator.batch_execute("select stillebot_down(timeout => '100 ms')").await;
    let report = assert_error(answer, &SqlState::OBJECT_IN_USE);
    let detail = report.detail().unwrap_or_default();
    ensure!(
        detail.contains("user guest") && detail.contains("\"the slow one\"") && detail.contains("idle in transaction")
    );
    ensure!(!detail.contains("secret"), "what they run may be a secret");
    ensure!(report.hint().is_some_and(|hint| hint.contains("terminate => true")));

    up_again(&server).await?;
    writer.batch_execute("insert into t values (621, 'goes on'); commit").await?;
    operator.batch_execute("insert into t values (622, 'and so do others'); notify readonly, 'end of test'").await?;
    let heard = bot.notifications.recv().await.map(|heard| heard.payload().to_owned());
    ensure!(heard.as_deref() == Some("end of test"), "bots were told {heard:?} of a down that never was");
    ensure!(!server.listen("guest", "postgres").await?.default_transaction_read_only);
    server.finish().await
}

#[tokio::test]
async fn terminate_ends_the_sessions_in_the_way_and_nothing_of_them_is_committed() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 57P01 ");
    let mut writers = Vec::new();
    for id in 630..634 {
        let writer = server.connect("guest", "postgres").await?;
        writer.batch_execute(&format!("begin; insert into t values ({id}, 'in the way')")).await?;
        writers.push(writer);
    }
    let gate = Gatekeeper::new(&server).await?;
    let running =
        Gatekeeper::start(&server, "insert into t select 634, 'runs' from (select pg_advisory_lock_shared(1)) gate")
            .await?;
    server.execute("postgres", "select stillebot_down('the test says so', '100 ms', terminate => true)").await?;
    for writer in writers {
        ensure!(writer.batch_execute("commit").await.is_err());
    }
    ensure!(running.await?.is_err());
    gate.open().await?;
    let rows: i64 = server.value("postgres", "select count(*) from t").await?;
    ensure!(rows == 1, "nothing of the terminated sessions may be there, and {rows} rows are");
    ensure!(state(&server, "postgres").await? == "down");
    server.finish().await
}

/// The race at the end of the drain: writers that commit in the very moment they are to be terminated. A commit that was
/// acknowledged is there; one that was not is not, and everything is before the LSN.
#[tokio::test]
async fn down_under_fire_loses_no_acknowledged_commit_and_keeps_no_other() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 57P01 ");
    // What a trigger looks up meets the hooks in the middle of an INSERT that has passed them.
    server
        .execute(
            "postgres",
            "create function look_up() returns trigger language plpgsql as
               $$ begin perform 1 from public.empty limit 1; perform 1 from public.t limit 1; return new; end $$;
             create trigger look_up before insert on t for each row execute function look_up()",
        )
        .await?;
    for round in 0..60 {
        let terminate = round % 2 == 1;
        let mut writers = Vec::new();
        for writer in 0..6 {
            let session = server.connect("guest", "postgres").await?;
            writers.push(tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                for number in 0.. {
                    let id = 1_000_000 + round * 10_000 + writer * 1_000 + number;
                    let insert = format!("begin; insert into t values ({id}, 'x')");
                    if session.batch_execute(&insert).await.is_err() || session.batch_execute("commit").await.is_err() {
                        // A commit after a refused insert is a rollback, and reports no error: only these count.
                        break;
                    }
                    acknowledged.push(id);
                }
                acknowledged
            }));
        }
        wait_until("writers to write", PATIENCE, || async {
            let busy = format!("select count(*) > 20 from t where id >= {}", 1_000_000 + round * 10_000);
            Ok(server.value::<bool>("postgres", &busy).await?.then_some(()))
        })
        .await?;
        let down = format!(
            "select stillebot_down('the test says so', '{}', {terminate})::text",
            if terminate { "0" } else { "30 s" }
        );
        let lsn: String = server.value("postgres", &down).await?;
        let mut acknowledged = Vec::new();
        for writer in writers {
            acknowledged.extend(writer.await?);
        }
        acknowledged.sort_unstable();
        let client = server.superuser("postgres").await?;
        let query = format!("select id from t where id >= {} order by id", 1_000_000 + round * 10_000);
        let found: Vec<i32> = client.query(&query, &[]).await?.iter().map(|row| row.get(0)).collect();
        let lost = acknowledged.iter().filter(|id| found.binary_search(id).is_err()).count();
        ensure!(lost == 0, "round {round}: {lost} acknowledged commits are lost");
        ensure!(terminate || found == acknowledged, "round {round}: an unacknowledged commit is there");
        assert_nothing_written_past(&server, &lsn).await?;
        server.execute("postgres", "select stillebot_up()").await?;
    }
    server.finish().await
}

#[tokio::test]
async fn a_prepared_transaction_is_in_the_way_and_terminate_does_not_break_its_promise() -> Result<()> {
    let (server, gid) = furnished_with_two_phase(Server::builder("sikorsky")).await?;
    server.expect_log(" 55006 ");
    server
        .execute("postgres", "begin; insert into t values (640, 'promised'); prepare transaction 'of a coordinator'")
        .await?;
    for terminate in [false, true] {
        let operator = server.superuser("postgres").await?;
        let answer = operator.batch_execute(&format!("select stillebot_down('x', '50 ms', {terminate})")).await;
        let report = assert_error(answer, &SqlState::OBJECT_IN_USE);
        ensure!(report.detail().is_some_and(|detail| detail.contains("'of a coordinator'")));
        ensure!(report.detail().is_some_and(|detail| !detail.contains(&gid)), "replication's own is not in the way");
        up_again(&server).await?;
    }
    server.execute("postgres", "commit prepared 'of a coordinator'").await?;

    // A name like replication's does not make it replication's.
    server.execute("postgres", "begin; insert into t values (641, 'x'); prepare transaction 'pg_gid_1_1'").await?;
    let operator = server.superuser("postgres").await?;
    let answer = operator.batch_execute("select stillebot_down('x', '50 ms')").await;
    assert_error(answer, &SqlState::OBJECT_IN_USE);
    server.execute("postgres", "rollback prepared 'pg_gid_1_1'").await?;
    take_down(&server).await?;
    server.finish().await
}

#[tokio::test]
async fn cancelling_or_losing_the_call_leaves_the_database_up() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 57014 ");
    server.expect_log(" 57P01 ");
    let writer = server.connect("guest", "postgres").await?;
    writer.batch_execute("begin; insert into t values (650, 'x')").await?;

    let operator = server.superuser("postgres").await?;
    let token = operator.cancel_token();
    let down = tokio::spawn(async move { operator.batch_execute("select stillebot_down()").await });
    wait_until("the edge", PATIENCE, || async { Ok((state(&server, "postgres").await? == "down").then_some(())) })
        .await?;
    token.cancel_query(tokio_postgres::NoTls).await?;
    assert_error(down.await?, &SqlState::QUERY_CANCELED);
    up_again(&server).await?;

    let operator = server.superuser("postgres").await?;
    operator.batch_execute("set statement_timeout = '100 ms'").await?;
    assert_error(operator.batch_execute("select stillebot_down()").await, &SqlState::QUERY_CANCELED);
    up_again(&server).await?;

    let down = begin_to_take_down(&server, "").await?;
    server
        .execute(
            "postgres",
            "select pg_terminate_backend(pid) from pg_stat_activity where query like 'select stillebot_down%'",
        )
        .await?;
    ensure!(down.await?.is_err());
    up_again(&server).await?;
    writer.batch_execute("insert into t values (651, 'x'); commit").await?;
    server.finish().await
}

#[tokio::test]
async fn two_callers_at_once_get_one_answer_each() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 55P03 ");
    let writer = server.connect("guest", "postgres").await?;
    writer.batch_execute("begin; insert into t values (660, 'x')").await?;
    let first = begin_to_take_down(&server, "").await?;
    // The second waits for the first, no longer than its own timeout.
    let impatient = server.superuser("postgres").await?;
    let answer = impatient.batch_execute("select stillebot_down('impatient', '50 ms')").await;
    assert_error(answer, &SqlState::LOCK_NOT_AVAILABLE);
    let second = server.superuser("postgres").await?;
    let second = tokio::spawn(async move { second.batch_execute("select stillebot_down('second')").await });
    writer.batch_execute("commit").await?;
    first.await??;
    second.await??;
    let reason: String = server.value("postgres", "select reason from stillebot_status()").await?;
    ensure!(reason == "the test says so", "down already: the second changes nothing");

    // Neither takes the other, which waits, for somebody who could write.
    server.execute("postgres", "select stillebot_up()").await?;
    let blocker = server.superuser("postgres").await?;
    blocker.batch_execute("begin; comment on extension stillebot is 'in the way of both'").await?;
    let mut callers = Vec::new();
    for _ in 0..3 {
        let caller = server.superuser("postgres").await?;
        callers.push(tokio::spawn(async move {
            caller.batch_execute("select stillebot_down('x', '20 s')").await.map(|()| std::time::Instant::now())
        }));
    }
    wait_until("all to wait", PATIENCE, || async {
        let waiting =
            "select count(*) = 3 from pg_stat_activity where query like 'select stillebot_down%' and state = 'active'";
        Ok(server.value::<bool>("postgres", waiting).await?.then_some(()))
    })
    .await?;
    let released = std::time::Instant::now();
    blocker.batch_execute("rollback").await?;
    for caller in callers {
        let answered = caller.await??;
        ensure!(answered - released < Duration::from_secs(10), "the callers waited for each other");
    }

    // An up while a down drains waits for it, and then opens.
    server.execute("postgres", "select stillebot_up()").await?;
    writer.batch_execute("begin; insert into t values (661, 'x')").await?;
    let down = begin_to_take_down(&server, "").await?;
    let opener = server.superuser("postgres").await?;
    let up = tokio::spawn(async move { opener.batch_execute("select stillebot_up()").await });
    writer.batch_execute("commit").await?;
    down.await??;
    up.await??;
    ensure!(state(&server, "postgres").await? == "up");
    server.finish().await
}

#[tokio::test]
async fn down_when_down_returns_at_once_and_up_when_up_does_nothing() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    // The background writer writes a few bytes of its own now and then; an up that wrote would do so every time.
    wait_until("an up when up that writes nothing", PATIENCE, || async {
        let before: String = server.value("postgres", "select pg_current_wal_lsn()::text").await?;
        let up: String = server.value("postgres", "select stillebot_up()::text || pg_current_wal_lsn()").await?;
        Ok((up == before).then_some(()))
    })
    .await?;
    take_down(&server).await?;
    let since: String = server.value("postgres", "select since::text from stillebot_status()").await?;
    let lsn: String = server.value("postgres", "select stillebot_down('another reason')::text").await?;
    assert_nothing_written_past(&server, &lsn).await?;
    let again: String = server.value("postgres", "select since::text from stillebot_status()").await?;
    ensure!(since == again);
    let reader = server.connect("guest", "postgres").await?;
    assert_refused(reader.batch_execute("insert into t values (1, 'x')").await, "an insert after the second down");
    server.finish().await
}

#[tokio::test]
async fn in_a_transaction_block_or_a_writing_statement_the_verbs_are_refused() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 25001 ");
    let operator = server.superuser("postgres").await?;
    for verb in ["stillebot_down()", "stillebot_up()", "multihome.down('x', '1 s', false, null)", "multihome.up(true)"]
    {
        operator.batch_execute("begin").await?;
        let answer = operator.batch_execute(&format!("select {verb}")).await;
        assert_error(answer, &SqlState::ACTIVE_SQL_TRANSACTION);
        operator.batch_execute("rollback").await?;
        for writing in [
            format!("insert into t select 670, '' from {verb}"),
            format!("with w as (insert into t values (671, '') returning id) select {verb} from w"),
            format!("do $$ begin insert into t values (672, ''); perform {verb}; end $$"),
        ] {
            assert_error(operator.batch_execute(&writing).await, &SqlState::ACTIVE_SQL_TRANSACTION);
        }
    }
    // Behind a down in the same statement or function nothing can be written either.
    server.expect_log(" 25006 ");
    let answer = operator.batch_execute("select stillebot_down('the test says so'), lo_create(777)").await;
    assert_refused(answer, "a large object in the same statement");
    server.expect_log(" 25006 ");
    let answer = operator
        .batch_execute("do $$ begin perform stillebot_down('the test says so'); insert into t values (673, ''); end $$")
        .await;
    assert_refused(answer, "an insert behind down in one block");
    up_again(&server).await?; // The block, down included, is undone.
    let rows: i64 = server.value("postgres", "select count(*) from t").await?;
    ensure!(rows == 1);
    server.finish().await
}

#[tokio::test]
async fn a_down_that_waits_behind_drop_extension_fails_and_the_database_is_up() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 42704 ");
    for verb in ["stillebot_down()", "stillebot_up()"] {
        let dropper = server.superuser("postgres").await?;
        dropper.batch_execute("begin; drop extension stillebot").await?;
        let operator = server.superuser("postgres").await?;
        let call = format!("select {verb}");
        let waiting = tokio::spawn(async move { operator.batch_execute(&call).await });
        wait_until("the call to wait", PATIENCE, || async {
            let waits =
                format!("select count(*) > 0 from pg_stat_activity where query = 'select {verb}' and state = 'active'");
            Ok(server.value::<bool>("postgres", &waits).await?.then_some(()))
        })
        .await?;
        dropper.batch_execute("commit").await?;
        assert_error(waiting.await?, &SqlState::UNDEFINED_OBJECT);
        server.execute("postgres", "create extension stillebot; insert into empty values (1)").await?;
    }
    server.finish().await
}

/// A transaction that was told no while a down was tried, and that failed, is told why it still is.
#[tokio::test]
async fn a_transaction_made_read_only_by_a_failed_down_is_told_so() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 55006 ");
    let writer = server.connect("guest", "postgres").await?;
    writer.batch_execute("begin; insert into t values (690, 'x')").await?;
    let other = server.connect("guest", "postgres").await?;
    other.batch_execute("begin; select 1").await?;
    let down = begin_to_take_down(&server, ", '500 ms'").await?;
    other.batch_execute("select 1").await?;
    assert_error(down.await?, &SqlState::OBJECT_IN_USE);
    up_again(&server).await?;
    let answer = other.batch_execute("insert into t values (691, 'x')").await;
    let report = assert_error(answer, &SqlState::READ_ONLY_SQL_TRANSACTION);
    ensure!(report.hint().is_some_and(|hint| hint.contains("Begin a new one")), "{report:?}");
    other.batch_execute("rollback").await?;
    other.batch_execute("insert into t values (691, 'x')").await?;
    writer.batch_execute("commit").await?;
    server.finish().await
}

#[tokio::test]
async fn bad_arguments_are_named() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server.expect_log(" 22");
    let operator = server.superuser("postgres").await?;
    for (call, code) in [
        ("stillebot_down(timeout => '-1 s')", &SqlState::INVALID_PARAMETER_VALUE),
        ("stillebot_down(timeout => null)", &SqlState::NULL_VALUE_NOT_ALLOWED),
        ("stillebot_down(terminate => null)", &SqlState::NULL_VALUE_NOT_ALLOWED),
        ("stillebot_down(repeat('x', 5000))", &SqlState::STRING_DATA_RIGHT_TRUNCATION),
        ("multihome.up(null)", &SqlState::NULL_VALUE_NOT_ALLOWED),
    ] {
        let report = assert_error(operator.batch_execute(&format!("select {call}")).await, code);
        ensure!(report.hint().is_some(), "{call}: no hint what to do");
    }
    // What is odd but right: quotes, backslashes, other scripts, no reason, for ever.
    let reason = r#"it's "quoted" \ and ünïcode 🙂 %s"#;
    operator.execute("select stillebot_down($1, '1000 years')", &[&reason]).await?;
    let kept: String = server.value("postgres", "select reason from stillebot_status()").await?;
    ensure!(kept == reason);
    server.restart().await?;
    let kept: String = server.value("postgres", "select reason from stillebot_status()").await?;
    ensure!(kept == reason);
    tokio::time::timeout(Duration::from_secs(5), server.execute("postgres", "select stillebot_up()")).await??;
    server.finish().await
}
