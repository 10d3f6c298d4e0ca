//! What the promises have in common: a database with something to write to, and what a refusal looks like.

use std::fmt::Debug;

use anyhow::Result;
use stillebot_tests::{Server, ServerBuilder, wait_until};
use tokio_postgres::{Error, error::SqlState};

use crate::PATIENCE;

/// A server whose database `postgres` has the extension, an owner, a guest with every privilege on the tables, and things to
/// write to.
pub async fn furnished(builder: ServerBuilder) -> Result<Server> {
    let server = builder.start().await?;
    server.expect_log(" 25006 ");
    server
        .execute(
            "postgres",
            "create extension stillebot;
             create extension pg_walinspect;
             create role owner login createdb;
             create role guest login;
             grant all on database postgres to owner;
             grant all on schema public to owner, guest;
             set role owner;
             create table t (id int primary key, note text);
             create table empty (id int);
             create sequence s;
             create materialized view m as select count(*) from t;
             create function write_inside(i int) returns int language plpgsql as
               $$ begin insert into public.t values (i, 'inside'); return i; end $$;
             create function write_as_owner(i int) returns int language plpgsql security definer as
               $$ begin insert into public.t values (i, 'as owner'); return i; end $$;
             create procedure commit_and_write(i int) language plpgsql as
               $$ begin commit; insert into public.t values (i, 'after commit'); end $$;
             grant all on t, empty, m to guest;
             grant all on sequence s to guest;
             insert into t values (1, 'first');",
        )
        .await?;
    Ok(server)
}

/// As [`furnished`], with two-phase commit and a prepared transaction that is replication's, as its name says: any other is
/// in the way of going down.
pub async fn furnished_with_two_phase(builder: ServerBuilder) -> Result<(Server, String)> {
    let server = furnished(builder.config("max_prepared_transactions", "10")).await?;
    server.expect_log(" 01000 "); // The subscription is not connected, which its creation warns of.
    server
        .execute(
            "postgres",
            "create subscription nowhere connection 'dbname=nowhere' publication nothing
               with (connect = false, slot_name = none, two_phase = true)",
        )
        .await?;
    let gid: String = server
        .value("postgres", "select format('pg_gid_%s_1', oid) from pg_subscription where subname = 'nowhere'")
        .await?;
    server.execute("postgres", &format!("begin; insert into empty values (1); prepare transaction '{gid}'")).await?;
    Ok((server, gid))
}

/// The answer must be core's own refusal of a write, with our hint.
#[track_caller]
pub fn assert_refused<T: Debug>(answer: Result<T, Error>, what: &str) {
    let error = match answer {
        Ok(value) => panic!("not refused: {what} gave {value:?}"),
        Err(error) => error,
    };
    let report = error.as_db_error().unwrap_or_else(|| panic!("{what} failed for another reason: {error}"));
    assert_eq!(report.code(), &SqlState::READ_ONLY_SQL_TRANSACTION, "{what}: {report:?}");
    assert!(
        report.hint().is_some_and(|hint| hint.starts_with("The database was taken down by postgres at 2")
            && hint.contains(": the test says so. ")),
        "{what}: hint {:?}",
        report.hint()
    );
}

/// The answer must be an error with this SQLSTATE; returns its report.
#[track_caller]
pub fn assert_error<T: Debug>(answer: Result<T, Error>, code: &SqlState) -> tokio_postgres::error::DbError {
    let error = answer.expect_err("expected an error");
    let report = error.as_db_error().unwrap_or_else(|| panic!("failed for another reason: {error}")).clone();
    assert_eq!(report.code(), code, "{report:?}");
    report
}

/// Takes the database `postgres` of a server down, with the reason that [`assert_refused`] looks for.
pub async fn take_down(server: &Server) -> Result<()> {
    server.execute("postgres", "select stillebot_down('the test says so')").await
}

/// `up`, or `down` from the first refused write on.
pub async fn state(server: &Server, database: &str) -> Result<String> {
    server.value(database, "select state from stillebot_status()").await
}

/// Waits until the database `postgres` is up again, after a call that failed: PostgreSQL reports an error first and rolls
/// back then.
pub async fn up_again(server: &Server) -> Result<()> {
    wait_until("the way back", PATIENCE, || async { Ok((state(server, "postgres").await? == "up").then_some(())) })
        .await
}
