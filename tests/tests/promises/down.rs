//! Down means down: for every session and every known way to write. And only writing: the rest goes on.

use anyhow::{Context, Result, ensure};
use stillebot_tests::{Server, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::Client;

use crate::PATIENCE;
use crate::answers::{assert_refused, furnished, furnished_with_two_phase, state, take_down};

/// Statements that come first and may succeed, then the one that must not.
struct Bypass {
    name: &'static str,
    before: &'static [&'static str],
    attempt: &'static str,
}

const fn bypass(name: &'static str, attempt: &'static str) -> Bypass {
    Bypass { name, before: &[], attempt }
}

/// Whatever was found open in the read-only modes of other systems, and what came to mind.
const BYPASSES: &[Bypass] = &[
    bypass("insert", "insert into t values (100, 'x')"),
    bypass("update", "update t set note = 'x'"),
    bypass("delete", "delete from t"),
    bypass("merge", "merge into t using (values (1)) v (id) on t.id = v.id when matched then delete"),
    bypass("copy from", "copy t from stdin"),
    bypass("writable CTE", "with w as (insert into t values (101, 'x') returning id) select * from w"),
    bypass("explain analyze", "explain analyze insert into t values (102, 'x')"),
    bypass("select for update", "select * from t for update"),
    bypass("insert in a function", "select write_inside(103)"),
    bypass("insert in a security definer function", "select write_as_owner(104)"),
    bypass("DO", "do $$ begin insert into public.t values (105, 'x'); end $$"),
    bypass("DO that assigns a nextval", "do $$ declare i int; begin i := nextval('public.s'); end $$"),
    bypass("DO that commits and goes on", "do $$ begin commit; insert into public.t values (106, 'x'); end $$"),
    bypass(
        "DO that commits and assigns a nextval",
        "do $$ declare i int; begin commit; i := nextval('public.s'); end $$",
    ),
    bypass(
        "DO that commits and creates a large object",
        "do $$ declare i oid; begin commit; i := lo_create(0); end $$",
    ),
    bypass(
        "DO that turns read-only off",
        "do $$ begin commit; set transaction_read_only = off; insert into public.t values (107, 'x'); end $$",
    ),
    bypass(
        "DO that catches the refusal and tries again",
        "do $$ begin
           begin insert into public.t values (108, 'x'); exception when read_only_sql_transaction then null; end;
           insert into public.t values (108, 'x');
         end $$",
    ),
    bypass("procedure that commits and goes on", "call commit_and_write(109)"),
    bypass("nextval", "select nextval('s')"),
    bypass("setval", "select setval('s', 42)"),
    bypass("lo_create", "select lo_create(0)"),
    bypass("lo_from_bytea", "select lo_from_bytea(0, 'x')"),
    bypass("truncate", "truncate empty"),
    bypass("create table", "create table public.other (i int)"),
    bypass("create table as", "create table public.other as select 1"),
    bypass("select into", "select 1 as i into public.other"),
    bypass("create temporary table", "create temporary table other (i int)"),
    Bypass { name: "begin read write", before: &["begin read write"], attempt: "insert into t values (111, 'x')" },
    Bypass {
        name: "set transaction",
        before: &["begin", "set transaction read write"],
        attempt: "insert into t values (112, 'x')",
    },
    Bypass {
        name: "set session characteristics",
        before: &["set session characteristics as transaction read write"],
        attempt: "insert into t values (113, 'x')",
    },
    Bypass {
        name: "set default_transaction_read_only",
        before: &["set default_transaction_read_only = off"],
        attempt: "insert into t values (114, 'x')",
    },
    Bypass {
        name: "set_config of default_transaction_read_only",
        before: &["select set_config('default_transaction_read_only', 'off', false)"],
        attempt: "insert into t values (115, 'x')",
    },
    Bypass {
        name: "set transaction_read_only",
        before: &["begin", "set transaction_read_only = off"],
        attempt: "insert into t values (116, 'x')",
    },
    Bypass {
        name: "savepoint and back",
        before: &["begin read write", "savepoint a", "select 1", "rollback to a"],
        attempt: "insert into t values (117, 'x')",
    },
    Bypass {
        name: "prepared statement",
        before: &["prepare w as insert into t values (118, 'x')", "set default_transaction_read_only = off"],
        attempt: "execute w",
    },
    Bypass {
        name: "prepared utility command",
        before: &["prepare w as select write_inside(119)", "begin read write"],
        attempt: "explain analyze execute w",
    },
    Bypass {
        name: "cursor over a function that writes",
        before: &["begin read write", "declare c cursor for select write_inside(120)"],
        attempt: "fetch c",
    },
    Bypass {
        name: "holdable cursor written out at commit",
        before: &["begin read write", "declare c cursor with hold for select write_inside(121)"],
        attempt: "commit",
    },
    Bypass { name: "prepare transaction", before: &["begin read write"], attempt: "prepare transaction 'x'" },
];

/// More, for those who may more.
const OWNERS_BYPASSES: &[Bypass] = &[
    bypass("alter table", "alter table t add column more int"),
    bypass("drop table", "drop table t"),
    bypass("create index", "create index on t (note)"),
    bypass("create index concurrently", "create index concurrently on t (note)"),
    bypass("refresh materialized view", "refresh materialized view m"),
    bypass("grant", "grant select on t to public"),
    bypass("comment", "comment on table t is 'x'"),
    bypass("create function", "create function f() returns int language sql as 'select 1'"),
];
const SUPERUSERS_BYPASSES: &[Bypass] = &[
    bypass("alter database set", "alter database postgres set default_transaction_read_only = off"),
    bypass("alter database reset all", "alter database postgres reset all"),
    bypass("alter role set", "alter role owner set default_transaction_read_only = off"),
    bypass("create role", "create role other"),
    bypass("catalog by hand", "delete from pg_db_role_setting"),
    bypass("drop extension", "drop extension stillebot"),
    bypass("comment on subscription", "comment on subscription nowhere is 'x'"),
    bypass("copy from program", "copy t from program 'echo 122'"),
    bypass("dump of the old script", "alter database postgres reset default_transaction_read_only"),
];

#[tokio::test]
async fn every_known_way_to_write_is_refused_on_a_down_database() -> Result<()> {
    let (server, gid) = furnished_with_two_phase(Server::builder("sikorsky")).await?;
    take_down(&server).await?;
    server.expect_log(" 42501 "); // A guest may not everything an owner may; down comes first where both apply.
    for (role, lists) in [
        ("guest", &[BYPASSES][..]),
        ("owner", &[BYPASSES, OWNERS_BYPASSES]),
        ("postgres", &[BYPASSES, OWNERS_BYPASSES, SUPERUSERS_BYPASSES]),
    ] {
        for extended in [false, true] {
            for attempt in lists.iter().copied().flatten() {
                let what =
                    format!("{} as {role}, {} protocol", attempt.name, if extended { "extended" } else { "simple" });
                let session = server.connect(role, "postgres").await?;
                for statement in attempt.before {
                    run(&session, extended, statement).await.with_context(|| format!("{what}: {statement}"))?;
                }
                assert_refused(run(&session, extended, attempt.attempt).await, &what);
            }
        }
    }
    let session = server.superuser("postgres").await?;
    assert_refused(session.batch_execute(&format!("commit prepared '{gid}'")).await, "commit prepared");
    let untouched: bool = server.value("postgres", "select count(*) = 1 and min(note) = 'first' from t").await?;
    ensure!(untouched, "something was written after all");
    server.finish().await
}

async fn run(session: &Client, extended: bool, statement: &str) -> Result<(), tokio_postgres::Error> {
    if extended { session.execute(statement, &[]).await.map(drop) } else { session.batch_execute(statement).await }
}

#[tokio::test]
async fn a_fastpath_call_is_refused() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let sequence: u32 = server.value("postgres", "select 's'::regclass::oid").await?;
    let functions: Vec<(&str, u32, Vec<u32>)> = vec![
        ("nextval", server.value("postgres", "select 'nextval(regclass)'::regprocedure::oid").await?, vec![sequence]),
        ("lo_creat", server.value("postgres", "select 'lo_creat(int)'::regprocedure::oid").await?, vec![0x60000]),
        ("lo_unlink", server.value("postgres", "select 'lo_unlink(oid)'::regprocedure::oid").await?, vec![1]),
    ];
    // The session is from before the edge, and has used the way: nothing is new to it.
    let mut old = Fastpath::connect(&server).await?;
    ensure!(old.call(functions[0].1, &functions[0].2).await?.is_none(), "nextval works while up");
    take_down(&server).await?;
    let mut new = Fastpath::connect(&server).await?;
    for session in [&mut old, &mut new] {
        for (name, function, arguments) in &functions {
            let error = session.call(*function, arguments).await?.with_context(|| format!("{name} was not refused"))?;
            ensure!(error.contains("C25006\0"), "{name}: {error}");
            ensure!(error.contains("The database was taken down by postgres"), "{name} without our hint: {error}");
        }
    }
    server.finish().await
}

/// A session that speaks the function call part of the protocol, which drivers leave out.
struct Fastpath(tokio::net::UnixStream);

impl Fastpath {
    async fn connect(server: &Server) -> Result<Fastpath> {
        let socket = server.socket_directory().join(format!(".s.PGSQL.{}", server.port()));
        let mut session = Fastpath(tokio::net::UnixStream::connect(socket).await?);
        let mut startup = Vec::from(0x0003_0000u32.to_be_bytes());
        startup.extend_from_slice(b"user\0postgres\0database\0postgres\0\0");
        session.0.write_all(&(startup.len() as u32 + 4).to_be_bytes()).await?;
        session.0.write_all(&startup).await?;
        ensure!(session.answer().await?.is_none(), "no session");
        Ok(session)
    }

    /// Calls a function with 4-byte arguments. Returns the error's fields, if it was one.
    async fn call(&mut self, function: u32, arguments: &[u32]) -> Result<Option<String>> {
        let mut body = Vec::from(function.to_be_bytes());
        body.extend(1u16.to_be_bytes().iter().chain(&1u16.to_be_bytes())); // all arguments: binary
        body.extend((arguments.len() as u16).to_be_bytes());
        for argument in arguments {
            body.extend(4u32.to_be_bytes().iter().chain(&argument.to_be_bytes()));
        }
        body.extend(1u16.to_be_bytes()); // so the result
        self.0.write_u8(b'F').await?;
        self.0.write_all(&(body.len() as u32 + 4).to_be_bytes()).await?;
        self.0.write_all(&body).await?;
        self.answer().await
    }

    /// Reads up to ReadyForQuery.
    async fn answer(&mut self) -> Result<Option<String>> {
        let mut error = None;
        loop {
            let tag = self.0.read_u8().await?;
            let mut body = vec![0; self.0.read_u32().await? as usize - 4];
            self.0.read_exact(&mut body).await?;
            match tag {
                b'E' => error = Some(String::from_utf8_lossy(&body).into_owned()),
                b'Z' => return Ok(error),
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn what_was_prepared_bound_or_cached_before_the_edge_is_refused_after_it() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;

    // A statement that the server has planned already, in the protocol and in SQL.
    let prepared = server.connect("guest", "postgres").await?;
    let insert = prepared.prepare("insert into t values ($1, 'prepared')").await?;
    prepared.execute(&insert, &[&200]).await?;
    prepared.batch_execute("prepare w (int) as insert into t values ($1, 'prepared'); execute w (201)").await?;

    // A function whose plan is cached, and one whose expression is.
    let cached = server.connect("guest", "postgres").await?;
    cached.execute("select write_inside(202)", &[]).await?;

    // A portal bound, and a cursor open, in transactions that have written nothing yet.
    let mut bound = server.connect("guest", "postgres").await?;
    let bound = bound.build_transaction().read_only(false).start().await?;
    let portal = bound.bind("select write_inside(203)", &[]).await?;
    let cursor = server.connect("guest", "postgres").await?;
    cursor.batch_execute("begin; declare c cursor for select nextval('s') from generate_series(1, 10)").await?;

    // A transaction that has read, in the mode that it keeps to its end.
    let reader = server.connect("guest", "postgres").await?;
    reader.batch_execute("begin isolation level repeatable read read write; select * from t").await?;

    // A temporary table of before is the session's own.
    let temporary = server.connect("guest", "postgres").await?;
    temporary.batch_execute("create temporary table mine (i int)").await?;

    take_down(&server).await?; // Nobody is in the way: nobody has written and nothing runs.
    assert_refused(prepared.execute(&insert, &[&204]).await, "a prepared statement");
    assert_refused(prepared.batch_execute("execute w (205)").await, "a prepared statement of SQL");
    assert_refused(cached.execute("select write_inside(206)", &[]).await, "a cached plan");
    assert_refused(bound.query_portal(&portal, 0).await, "a bound portal");
    assert_refused(cursor.batch_execute("fetch c").await, "an open cursor");
    assert_refused(reader.batch_execute("insert into t values (207, 'x')").await, "a transaction that has read");
    temporary.batch_execute("begin; insert into mine values (1); commit; update mine set i = 2").await?;

    let rows: i64 = server.value("postgres", "select count(*) from t").await?;
    ensure!(rows == 4, "1, 200, 201 and 202 are from before, and there are {rows} rows");
    server.finish().await
}

#[tokio::test]
async fn a_transaction_that_had_written_writes_no_more_after_the_edge() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let writer = server.connect("guest", "postgres").await?;
    writer.batch_execute("begin; insert into t values (300, 'before')").await?;
    let operator = server.superuser("postgres").await?;
    let down = tokio::spawn(async move { operator.execute("select stillebot_down('the test says so')", &[]).await });
    wait_until("the edge", PATIENCE, || async { Ok((state(&server, "postgres").await? == "down").then_some(())) })
        .await?;
    ensure!(!down.is_finished(), "down must wait for a transaction that has written");
    assert_refused(writer.batch_execute("insert into t values (301, 'after')").await, "a second write");
    writer.batch_execute("commit").await?; // It failed, so this rolls back.
    down.await??;
    let rows: i64 = server.value("postgres", "select count(*) from t").await?;
    ensure!(rows == 1);
    server.finish().await
}

#[tokio::test]
async fn reads_and_upkeep_go_on_while_down() -> Result<()> {
    let (server, gid) =
        furnished_with_two_phase(Server::builder("sikorsky").config("max_parallel_workers_per_gather", "2")).await?;
    // A session of before, whose own transactions are read-write, as those are that maintenance commands begin.
    let old = server.superuser("postgres").await?;
    old.batch_execute("create temporary table mine (i int)").await?;
    take_down(&server).await?;
    let mut session = server.listen("postgres", "postgres").await?;
    for statement in [
        "select * from t",
        "set debug_parallel_query = on; set parallel_setup_cost = 0; set parallel_tuple_cost = 0; set min_parallel_table_scan_size = 0; \
         select sum(id) from t",
        "copy t to '/dev/null'",
        "explain insert into t values (1, 'x')",
        "begin; lock table t in access exclusive mode; commit",
        "select pg_advisory_lock(1)",
        "listen something",
        "notify something, 'heard'",
        "begin; declare c cursor with hold for select * from t; commit; fetch c",
        "discard all",
        "listen something",
    ] {
        session.client.batch_execute(statement).await.with_context(|| statement.to_owned())?;
    }
    for statement in [
        "vacuum t",
        "vacuum full t",
        "analyze",
        "reindex table t",
        "reindex table concurrently t",
        "cluster",
        "checkpoint",
        // Mending replication must not require opening the database.
        "alter subscription nowhere disable",
        "alter subscription nowhere skip (lsn = '0/1')",
        "alter subscription nowhere connection 'dbname=elsewhere'",
        "alter subscription nowhere set (streaming = on)",
    ] {
        // One each: some refuse to run in the implicit block of several.
        for session in [&session.client, &old] {
            session.batch_execute(statement).await.with_context(|| statement.to_owned())?;
        }
    }
    let create = "create subscription another connection 'dbname=nowhere' publication nothing with (connect = false, slot_name = none)";
    for statement in [create, "alter subscription another rename to other", "drop subscription other"] {
        session.client.batch_execute(statement).await.with_context(|| statement.to_owned())?;
    }
    old.batch_execute(
        "begin; savepoint a; insert into mine values (1); rollback to a; insert into mine values (2); commit",
    )
    .await?;
    session.client.batch_execute("notify something, 'again'").await?;
    for payload in ["heard", "again"] {
        let heard = session.notifications.recv().await.context("no notification")?;
        ensure!(heard.payload() == payload);
    }
    session.client.batch_execute(&format!("rollback prepared '{gid}'")).await?;
    server.finish().await
}

/// PL/pgSQL keeps the check of a domain over a composite type across its own COMMIT: what that calls meets no hook.
#[tokio::test]
async fn a_cached_expression_behind_a_commit_writes_nothing_that_lasts() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    server
        .execute(
            "postgres",
            "create type c as (a int);
             create domain d as c
               check (case when (value).a = 2 then lo_from_bytea(424243, 'data') > 0 else true end)",
        )
        .await?;
    take_down(&server).await?;
    for before in ["commit; set transaction_read_only = off", "set default_transaction_read_only = off; commit"] {
        let session = server.connect("guest", "postgres").await?;
        let block = format!("do $$ declare r d; begin r.a := 1; {before}; r.a := 2; commit; end $$");
        assert_refused(session.batch_execute(&block).await, before);
    }
    let objects: i64 = server.value("postgres", "select count(*) from pg_largeobject_metadata").await?;
    ensure!(objects == 0);
    server.finish().await
}

#[tokio::test]
async fn bots_and_libpq_learn_of_down_and_up_as_they_always_did() -> Result<()> {
    let server = furnished(Server::builder("sikorsky")).await?;
    let mut bot = server.listen("guest", "postgres").await?;
    ensure!(!bot.default_transaction_read_only);
    bot.client.batch_execute("listen readonly").await?;
    take_down(&server).await?;
    let heard = bot.notifications.recv().await.context("no notification")?;
    ensure!((heard.channel(), heard.payload()) == ("readonly", "on"));
    ensure!(server.listen("guest", "postgres").await?.default_transaction_read_only, "a new session is told at once");

    // An operator whose session is from while it was down can go on working in it.
    let operator = server.superuser("postgres").await?;
    operator.batch_execute("select stillebot_up()").await?;
    operator.batch_execute("insert into t values (500, 'up')").await?;
    let heard = bot.notifications.recv().await.context("no notification")?;
    ensure!((heard.channel(), heard.payload()) == ("readonly", "off"));
    ensure!(!server.listen("guest", "postgres").await?.default_transaction_read_only);
    server.finish().await
}
