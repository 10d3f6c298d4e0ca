//! Every known way to write into a database, and sessions that have been in one since before it was taken down.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use stillebot_tests::{Server, cluster::DATABASE};
use tokio_postgres::{Client, Error, Statement, error::SqlState};

/// What the ways below need; nothing of it is in the bot's own schema.
pub const PROPS: &str = "
    create schema demo;
    create sequence demo.numbers;
    create materialized view demo.copy as select count(*) from stillebot.config;
    create function demo.write() returns int language plpgsql as
        $$ begin insert into stillebot.raids values (0, 0); return 1; end $$;
    create function demo.write_as_owner() returns int language plpgsql security definer as
        $$ begin insert into stillebot.raids values (0, 1); return 1; end $$;
    create procedure demo.commit_and_write() language plpgsql as
        $$ begin commit; insert into stillebot.raids values (0, 2); end $$;";

/// Statements that come first and may succeed, then the one that must not.
pub struct Way {
    pub name: &'static str,
    before: &'static [&'static str],
    attempt: &'static str,
}

/// Ways of one kind.
pub struct Group {
    pub label: &'static str,
    pub ways: &'static [Way],
    /// Only a superuser may do that anyhow.
    pub superuser: bool,
}

const fn way(name: &'static str, attempt: &'static str) -> Way {
    Way { name, before: &[], attempt }
}

const fn after(name: &'static str, before: &'static [&'static str], attempt: &'static str) -> Way {
    Way { name, before, attempt }
}

const INSERT: &str = "insert into stillebot.raids values (1, 1)";

pub const GROUPS: &[Group] = &[
    Group {
        label: "plain statements",
        superuser: false,
        ways: &[
            way("insert", INSERT),
            way("update", "update stillebot.config set data = '0'"),
            way("delete", "delete from stillebot.commands"),
            way(
                "merge",
                "merge into stillebot.config c using (values (1)) v (id) on c.twitchid = v.id \
                 when matched then delete when not matched then insert values (1, 'x', '0')",
            ),
            way("upsert", "insert into stillebot.raids values (1, 1) on conflict do nothing"),
            way("truncate", "truncate stillebot.uploads"),
            way("copy", "copy stillebot.raids from stdin"),
            way("select for update", "select * from stillebot.settings for update"),
        ],
    },
    Group {
        label: "hidden in others",
        superuser: false,
        ways: &[
            way("writable CTE", "with w as (insert into stillebot.raids values (1, 1) returning 1) select * from w"),
            way("explain analyze", "explain analyze insert into stillebot.raids values (1, 1)"),
            way("function", "select demo.write()"),
            way("security definer function", "select demo.write_as_owner()"),
            way("procedure that commits and goes on", "call demo.commit_and_write()"),
            way("DO", "do $$ begin insert into stillebot.raids values (1, 1); end $$"),
            way(
                "DO that catches the refusal",
                "do $$ begin
                   begin insert into stillebot.raids values (1, 1); exception when others then null; end;
                   insert into stillebot.raids values (1, 1);
                 end $$",
            ),
            way("nextval", "select nextval('demo.numbers')"),
            way("large object", "select lo_create(0)"),
        ],
    },
    Group {
        label: "read-only switched off",
        superuser: false,
        ways: &[
            after("begin read write", &["begin read write"], INSERT),
            after("set transaction", &["begin", "set transaction read write"], INSERT),
            after("set transaction_read_only", &["begin", "set transaction_read_only = off"], INSERT),
            after("session characteristics", &["set session characteristics as transaction read write"], INSERT),
            after("set default_transaction_read_only", &["set default_transaction_read_only = off"], INSERT),
            after("set_config()", &["select set_config('default_transaction_read_only', 'off', false)"], INSERT),
            after("savepoint and back", &["begin read write", "savepoint s", "select 1", "rollback to s"], INSERT),
            way(
                "DO that switches it off",
                "do $$ begin
                   commit; set transaction_read_only = off; insert into stillebot.raids values (1, 1);
                 end $$",
            ),
        ],
    },
    Group {
        label: "in two steps",
        superuser: false,
        ways: &[
            after(
                "prepared statement",
                &["prepare w as insert into stillebot.raids values (1, 1)", "begin read write"],
                "execute w",
            ),
            after("cursor", &["begin read write", "declare c cursor for select demo.write()"], "fetch c"),
            after(
                "cursor written out at commit",
                &["begin read write", "declare c cursor with hold for select demo.write()"],
                "commit",
            ),
            after("two-phase commit", &["begin read write"], "prepare transaction 'x'"),
        ],
    },
    Group {
        label: "schema",
        superuser: false,
        ways: &[
            way("create table", "create table stillebot.more (i int)"),
            way("create table as", "create table stillebot.more as select 1"),
            way("alter table", "alter table stillebot.config add column more int"),
            way("drop table", "drop table stillebot.uploads"),
            way("create index concurrently", "create index concurrently on stillebot.config (data)"),
            way("create temporary table", "create temporary table more (i int)"),
            way("refresh materialized view", "refresh materialized view demo.copy"),
            way("grant", "grant select on stillebot.config to public"),
        ],
    },
    Group {
        label: "superuser's powers",
        superuser: true,
        ways: &[
            way("dbctl up of old", "alter database stillebot reset default_transaction_read_only"),
            way("alter role", "alter role rosuav set default_transaction_read_only = off"),
            way("delete from a catalog", "delete from pg_catalog.pg_db_role_setting"),
            way("drop extension", "drop extension stillebot"),
            way("copy from program", "copy stillebot.raids from program 'echo 1'"),
        ],
    },
];

/// What became of an attempt.
pub enum Answer {
    /// 25006, with the hint that came with it.
    Refused(String),
    /// Anything else.
    Otherwise(String),
}

impl Answer {
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_))
    }
}

/// Tries it, over one of the two protocols, and leaves the session as good as new.
pub async fn attempt(session: &Client, way: &Way, extended: bool) -> Result<Answer> {
    for statement in way.before {
        run(session, statement, extended).await.with_context(|| format!("{}: {statement}", way.name))?;
    }
    let answer = sort(run(session, way.attempt, extended).await);
    // Often there is none any more, and then only a warning says so.
    session.batch_execute("rollback").await?;
    session.batch_execute("discard all").await?;
    Ok(answer)
}

async fn run(session: &Client, statement: &str, extended: bool) -> Result<(), Error> {
    if extended { session.execute(statement, &[]).await.map(drop) } else { session.batch_execute(statement).await }
}

/// A fastpath call, the protocol's oldest way in. psql has it under `\lo_unlink`.
pub fn fastpath(node: &Server) -> Result<Answer> {
    let mut psql = node.psql_command(DATABASE);
    let output = psql.args(["-v", "VERBOSITY=verbose", "-c", r"\lo_unlink 1"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(if said.contains("25006:") { Answer::Refused(said) } else { Answer::Otherwise(said) })
}

fn sort<T>(answer: Result<T, Error>) -> Answer {
    match answer {
        Ok(_) => Answer::Otherwise("it succeeded".to_owned()),
        Err(error) => match error.as_db_error() {
            Some(report) if report.code() == &SqlState::READ_ONLY_SQL_TRANSACTION => {
                Answer::Refused(report.hint().unwrap_or_default().to_owned())
            }
            _ => Answer::Otherwise(format!("{error:#}")),
        },
    }
}

/// Sessions that were there first, each with something ready to fire.
pub struct OldSessions {
    prepared: (Client, Statement),
    cached: Client,
    cursor: Client,
    snapshot: Client,
    half_done: Client,
}

impl OldSessions {
    /// Opens them, while the database is still up.
    pub async fn open(node: &Server) -> Result<Self> {
        let session = || node.connect("rosuav", DATABASE);
        let prepared = session().await?;
        let statement = prepared.prepare(INSERT).await?;
        let cached = session().await?;
        cached.batch_execute("begin; select demo.write(); rollback").await?;
        let cursor = session().await?;
        cursor.batch_execute("begin; declare c cursor for select demo.write()").await?;
        let snapshot = session().await?;
        snapshot.batch_execute("begin isolation level repeatable read read write; select 1").await?;
        let half_done = session().await?;
        half_done.batch_execute("begin read write; insert into stillebot.raids values (2, 2)").await?;
        Ok(Self { prepared: (prepared, statement), cached, cursor, snapshot, half_done })
    }

    /// One more write of the transaction that is in the way of the node going down; ends that transaction.
    pub async fn half_done(&self) -> Result<Answer> {
        let answer = sort(self.half_done.batch_execute(INSERT).await);
        // Rolls back, as it failed; without this the node would wait for it.
        self.half_done.batch_execute("commit").await?;
        Ok(answer)
    }

    /// The others, once it is down.
    pub async fn fire(&self) -> Vec<(&'static str, Answer)> {
        let (prepared, statement) = &self.prepared;
        vec![
            ("prepared statement", sort(prepared.execute(statement, &[]).await)),
            ("function with a cached plan", sort(self.cached.batch_execute("select demo.write()").await)),
            ("open cursor", sort(self.cursor.batch_execute("fetch c").await)),
            ("transaction that has read", sort(self.snapshot.batch_execute(INSERT).await)),
        ]
    }
}

/// Tries to write from before a server accepts connections until it has said no that often, each time in a new session.
/// An error if it ever says yes. Returns the hint that came with the last no.
pub async fn hammer(node: &Server, refusals: usize) -> Result<String> {
    let write = format!("begin read write; {INSERT}; commit");
    let (mut refused, mut last) = (0, String::new());
    while refused < refusals {
        let Ok(session) = node.connect("rosuav", DATABASE).await else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        match sort(session.batch_execute(&write).await) {
            Answer::Refused(hint) => (refused, last) = (refused + 1, hint),
            Answer::Otherwise(what) => bail!("a write on {} was not refused: {what}", node.name()),
        }
    }
    Ok(last)
}
