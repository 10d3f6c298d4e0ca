//! What goes wrong in replication in practice, one scenario after the other: what the log of conflicts says of it on each
//! node, what gets replication going again, and that both nodes are the same afterwards.
//!
//! Who resolves on both nodes at once, the agent, has its own tests: here each node is resolved by hand.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Installation, Server, wait_until};
use tokio_postgres::error::SqlState;

use crate::PATIENCE;
use crate::answers::assert_error;
use crate::conflicts::{Conflict, apart, call, conflicts, crossed, expect_errors, id, settled, wait_conflict};

/// Makes tables on all nodes, which replicate from then on.
async fn create(cluster: &Cluster, tables: &str) -> Result<()> {
    for node in cluster.nodes() {
        node.execute(DATABASE, &format!("set role rosuav; set search_path = stillebot; {tables}")).await?;
    }
    for node in cluster.nodes() {
        node.execute(DATABASE, "select multihome.refresh(false)").await?;
    }
    cluster.wait_replicated().await
}

/// Writes on one node only: the changes carry the origin of a third one, from which they would reach the others directly.
async fn only_here(node: &Server, statements: &str) -> Result<()> {
    let origin =
        "select pg_replication_origin_create('elsewhere') where pg_replication_origin_oid('elsewhere') is null;
                  select pg_replication_origin_session_setup('elsewhere');";
    node.execute(DATABASE, &format!("{origin} {statements}")).await
}

/// An open row of that table.
async fn wait_table(node: &Server, table: &str) -> Result<Conflict> {
    wait_conflict(node, &format!("an open conflict of {table}"), |row| {
        row["relname"] == table && row["status"] == "open"
    })
    .await
}

/// A row that apply got past by itself.
async fn wait_went_on(node: &Server, row: &Conflict) -> Result<Conflict> {
    wait_conflict(node, &format!("the end of conflict {}", id(row)), |now| {
        now["id"] == row["id"] && now["status"] == "resolved" && now["resolution"] == "apply went on"
    })
    .await
}

async fn resolve(node: &Server, row: &Conflict, keep: &str) -> Result<String> {
    call(node, &format!("stillebot_resolve({}, '{keep}')", id(row))).await
}

async fn skip(node: &Server, row: &Conflict) -> Result<String> {
    call(node, &format!("stillebot_skip({})", id(row))).await
}

/// A call that must be refused with this SQLSTATE; what it says, with detail and hint.
async fn refused(node: &Server, call: &str, sqlstate: &str) -> Result<String> {
    node.expect_log(format!(" {sqlstate} client backend"));
    let session = node.superuser(DATABASE).await?;
    let report = assert_error(session.simple_query(&format!("select {call}")).await, &SqlState::from_code(sqlstate));
    Ok([Some(report.message()), report.detail(), report.hint()].into_iter().flatten().collect::<Vec<_>>().join(" "))
}

/// Writes the row of a conflict anew where it is to stay as it is, which makes it the same everywhere.
async fn rewrite(node: &Server, row: &Conflict) -> Result<()> {
    let assign = format!("select multihome.assign({}, '{}', '{{}}')", id(row), row["replica_identity"]);
    ensure!(node.value::<bool>(DATABASE, &assign).await?, "the row is gone: {row:#}");
    Ok(())
}

async fn text(node: &Server, query: &str) -> Result<Option<String>> {
    node.value(DATABASE, &format!("select ({query})::text")).await
}

async fn count(node: &Server, what: &str) -> Result<i64> {
    node.value(DATABASE, &format!("select count(*) from {what}")).await
}

/// One table, what each node writes into it while they are apart, and what comes of it where the incoming version is kept.
struct Clash {
    table: &'static str,
    sikorsky: &'static str,
    gideon: &'static str,
    /// What sikorsky's row says.
    conflict_type: &'static str,
    constraint: &'static str,
    replica_identity: Value,
    /// Keys of the rows in the way, in order of their indexes' creation.
    in_the_way: &'static [i64],
    /// The places of the changes that gideon leaves out.
    left_out: &'static [i64],
}

#[tokio::test]
async fn every_kind_of_unique_index_makes_a_row_and_one_call_on_each_node_resolves_it() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for node in [sikorsky, gideon] {
        // Changes of partitions come as changes of the table, and go into whatever partition is the right one there.
        node.execute(DATABASE, "alter publication multihome set (publish_via_partition_root = true)").await?;
    }
    create(
        &cluster,
        "create table second (id int primary key, name text unique);
         create table lowered (id int primary key, name text);
         create unique index lowered_name on lowered (lower(name)) where name <> '';
         create table nulls (id int primary key, a int, b int, unique nulls not distinct (a, b));
         create table generated (id int primary key, a int, b int, sum int generated always as (a + b) stored unique);
         create table several (id int primary key, name text unique);
         create table same (id int primary key, name text unique);
         create table moved (id int primary key, name text);
         create table parts (id int, part int, name text, primary key (id, part)) partition by list (part);
         create table parts_1 partition of parts for values in (1);
         create table parts_2 partition of parts for values in (2);
         create table twice (id int primary key, name text);
         create table thrice (id int primary key, name text);",
    )
    .await?;
    sikorsky.execute(DATABASE, "insert into stillebot.moved values (1, 'moved')").await?;
    cluster.wait_replicated().await?;

    let insert = |table| (table, "insert_exists");
    let clash = |(table, conflict_type), sikorsky, gideon, constraint, key, in_the_way, left_out| Clash {
        table,
        sikorsky,
        gideon,
        conflict_type,
        constraint,
        replica_identity: key,
        in_the_way,
        left_out,
    };
    let clashes = [
        clash(insert("second"), "(1, 'x')", "(2, 'x')", "second_name_key", json!({"id": 2}), &[1], &[1]),
        clash(insert("lowered"), "(1, 'Name')", "(2, 'nAmE')", "lowered_name", json!({"id": 2}), &[1], &[1]),
        clash(insert("nulls"), "(1, 7, null)", "(2, 7, null)", "nulls_a_b_key", json!({"id": 2}), &[1], &[1]),
        clash(insert("generated"), "(1, 1, 4)", "(2, 2, 3)", "generated_sum_key", json!({"id": 2}), &[1], &[1]),
        // One row, and two in its way; on the other node, two rows come, and one is in the way of each.
        clash(
            ("several", "multiple_unique_conflicts"),
            "(1, 'x'), (2, 'y')",
            "(1, 'y')",
            "several_pkey",
            json!({"id": 1}),
            &[1, 2],
            &[1, 2],
        ),
        // One row in the way, twice.
        clash(
            ("same", "multiple_unique_conflicts"),
            "(1, 'x')",
            "(1, 'x')",
            "same_pkey",
            json!({"id": 1}),
            &[1, 1],
            &[1],
        ),
        clash(insert("parts"), "(1, 1, 'x')", "(1, 1, 'y')", "parts_1_pkey", json!({"id": 1, "part": 1}), &[1], &[1]),
        // The second change of the row is for the row that the first one made.
        clash(
            insert("twice"),
            "(1, 'sikorsky')",
            "(1, 'first'); update stillebot.twice set name = 'second' where id = 1",
            "twice_pkey",
            json!({"id": 1}),
            &[1],
            &[1],
        ),
        // And where the first one is left out, so is the second.
        clash(
            insert("thrice"),
            "(1, 'first'); update stillebot.thrice set name = 'second' where id = 1",
            "(1, 'gideon')",
            "thrice_pkey",
            json!({"id": 1}),
            &[1],
            &[1],
        ),
        clash(
            ("moved", "update_exists"),
            "(9, 'in the way')",
            "update stillebot.moved set id = 9",
            "moved_pkey",
            json!({"id": 1}),
            &[9],
            &[1],
        ),
    ];
    let transactions = |what: fn(&Clash) -> &'static str| {
        let statement = |clash: &Clash| match what(clash) {
            values if values.starts_with('(') => {
                let overriding = if clash.table == "generated" { "(id, a, b)" } else { "" };
                format!("begin; insert into stillebot.{} {overriding} values {values}; commit;", clash.table)
            }
            other => format!("begin; {other}; commit;"),
        };
        clashes.iter().map(statement).collect::<String>()
    };
    apart(&cluster, &transactions(|clash| clash.sikorsky), &transactions(|clash| clash.gideon)).await?;

    for clash in &clashes {
        let row = wait_table(sikorsky, clash.table).await.with_context(|| clash.table)?;
        ensure!(row["conflict_type"] == clash.conflict_type, "{row:#}");
        ensure!(row["constraint_name"] == clash.constraint && row["sqlstate"] == "23505", "{row:#}");
        ensure!(row["replica_identity"] == clash.replica_identity, "{row:#}");
        ensure!(row["remote_tuple"].is_object() && row["remote_commit_lsn"].is_string(), "{row:#}");
        ensure!(row["change_number"] == 1 && row["blocking"] == true && row["transaction_kind"] == "plain", "{row:#}");
        let in_the_way = row["local_conflicts"].as_array().context("no array")?;
        let keys: Vec<_> = in_the_way.iter().filter_map(|local| local["key"]["id"].as_i64()).collect();
        ensure!(keys == clash.in_the_way, "{row:#}");
        ensure!(in_the_way.iter().all(|local| local["origin"] == "local" && local["commit_ts"].is_string()), "{row:#}");
        resolve(sikorsky, &row, "remote").await?;
        for place in clash.left_out {
            let what = format!("change {place} of {}", clash.table);
            let row = wait_conflict(gideon, &what, |row| {
                row["relname"] == clash.table && row["change_number"] == *place && row["status"] == "open"
            })
            .await?;
            resolve(gideon, &row, "local").await?;
        }
    }
    settled(&cluster).await?;
    for (table, kept) in [
        ("second", "(2,x)"),
        ("lowered", "(2,nAmE)"),
        ("nulls", "(2,7,)"),
        ("generated", "(2,2,3,5)"),
        ("several", "(1,y)"),
        ("parts", "(1,1,y)"),
        ("twice", "(1,second)"),
        ("thrice", "(1,gideon)"),
        ("moved", "(9,moved)"),
    ] {
        let found = text(sikorsky, &format!("select string_agg(t::text, ' ') from stillebot.{table} t")).await?;
        ensure!(found.as_deref() == Some(kept), "{table}: {found:?}");
    }
    cluster.finish().await
}

#[tokio::test]
async fn two_commands_that_are_active_at_once_are_a_row_and_either_can_be_kept_or_both() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    sikorsky
        .execute(
            DATABASE,
            "insert into stillebot.commands (twitchid, cmdname, active, content) values (1, 'hi', true, '\"old\"')",
        )
        .await?;
    cluster.wait_replicated().await?;
    // As the bot saves a command.
    let save = |content: &str| {
        format!(
            "begin read write;
             update stillebot.commands set active = false where twitchid = 1 and cmdname = 'hi' and active;
             insert into stillebot.commands (twitchid, cmdname, active, content) values (1, 'hi', true, '\"{content}\"');
             commit"
        )
    };
    let active = "select string_agg(content #>> '{}', ' ') from stillebot.commands where active";

    apart(&cluster, &save("by sikorsky"), &save("by gideon")).await?;
    let (here, there) = (wait_table(sikorsky, "commands").await?, wait_table(gideon, "commands").await?);
    ensure!(here["conflict_type"] == "insert_exists" && here["constraint_name"] == "commands_active", "{here:#}");
    // The row that was deactivated on both nodes is not in the way, and did not fail.
    ensure!(here["change_number"] == 2 && here["operation"] == "insert", "{here:#}");
    ensure!(here["remote_tuple"]["content"] == "by gideon", "{here:#}");
    let local = here["local_conflicts"].as_array().context("no array")?;
    ensure!(local.len() == 1 && local[0]["tuple"]["content"] == "by sikorsky", "{here:#}");
    ensure!(there["replica_identity"] == local[0]["key"], "{there:#}");
    resolve(sikorsky, &here, "remote").await?;
    resolve(gideon, &there, "local").await?;
    settled(&cluster).await?;
    ensure!(text(sikorsky, active).await?.as_deref() == Some("by gideon"));
    ensure!(count(gideon, "stillebot.commands").await? == 2);

    // Both stay, and one of them is active: what the agent's rule for this table does.
    apart(&cluster, &save("again by sikorsky"), &save("again by gideon")).await?;
    let (here, there) = (wait_table(sikorsky, "commands").await?, wait_table(gideon, "commands").await?);
    for (node, row) in [(sikorsky, &here), (gideon, &there)] {
        let before = call(node, &format!("multihome.make_room({}, '{{\"active\": false}}')::text", id(row))).await?;
        ensure!(serde_json::from_str::<Value>(&before)?["active"] == true, "{before}");
    }
    cluster.wait_replicated().await?;
    // Each node has its own deactivated and the other's active; the loser first, so that nothing clashes.
    let loser = &here["local_conflicts"][0]["key"];
    for (key, assignments) in [(loser, r#"{"active": false}"#), (&here["replica_identity"], "{}")] {
        let assigned: bool = sikorsky
            .value(DATABASE, &format!("select multihome.assign({}, '{key}', '{assignments}')", id(&here)))
            .await?;
        ensure!(assigned, "{key}");
    }
    for (node, row) in [(sikorsky, &here), (gideon, &there)] {
        let open = wait_conflict(node, "the conflict that was made room for", |now| now["id"] == row["id"]).await?;
        ensure!(open["status"] == "open", "it is open until it is settled: {open:#}");
        let settled: bool =
            node.value(DATABASE, &format!("select multihome.settle({}, 'both kept', 'the test')", id(row))).await?;
        ensure!(settled);
    }
    settled(&cluster).await?;
    ensure!(text(gideon, active).await?.as_deref() == Some("again by gideon"));
    ensure!(count(gideon, "stillebot.commands").await? == 4);
    cluster.finish().await
}

#[tokio::test]
async fn rows_that_are_not_there_are_told_without_stopping_anything_and_ordinary_changes_are_not() -> Result<()> {
    let cluster = Cluster::start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    create(
        &cluster,
        "create table docs (id int primary key, n int, body text);
         alter table docs alter column body set storage external;
         create table lines (n int, line text);
         alter table lines replica identity full;
         create table deferred (id int primary key, name text unique deferrable);",
    )
    .await?;
    let long = "(select string_agg(i::text, ' ') from generate_series(1, 2000) i)";
    sikorsky
        .execute(DATABASE, &format!("insert into stillebot.docs select i, 0, case i when 5 then {long} else '' end from generate_series(1, 20) i"))
        .await?;
    sikorsky.execute(DATABASE, "insert into stillebot.lines values (1, 'first')").await?;
    cluster.wait_replicated().await?;

    // Nothing of this is a conflict: rows of one's own, rows that the other wrote last, one row again and again.
    for round in 0..3 {
        for node in [sikorsky, gideon] {
            let load = format!(
                "begin;
                 update stillebot.docs set n = n + 1 where id > 10;
                 update stillebot.docs set n = n + 1 where id = 11;
                 delete from stillebot.docs where id = 12;
                 insert into stillebot.docs values (12, {round}, '');
                 update stillebot.docs set id = 30 where id = 12;
                 update stillebot.docs set id = 12 where id = 30;
                 commit"
            );
            node.execute(DATABASE, &load).await?;
            cluster.wait_replicated().await?;
        }
    }
    cluster.assert_identical().await?;

    apart(
        &cluster,
        "begin;
         delete from stillebot.docs where id in (1, 2, 3, 5);
         update stillebot.docs set n = 100 where id = 4;
         delete from stillebot.lines;
         insert into stillebot.deferred values (1, 'x');
         commit",
        "begin;
         update stillebot.docs set n = 201 where id = 1;
         update stillebot.docs set n = 202 where id = 2;
         delete from stillebot.docs where id = 3;
         update stillebot.docs set n = 204 where id = 4;
         update stillebot.docs set n = 205 where id = 5;
         update stillebot.lines set line = 'gideon';
         insert into stillebot.deferred values (2, 'x');
         commit",
    )
    .await?;
    // Apply goes on, whatever it misses.
    cluster.wait_replicated().await?;
    let missing = async |node: &Server, number: i64| {
        wait_conflict(node, &format!("change {number}"), |row| row["change_number"] == number).await
    };
    let updated = missing(sikorsky, 1).await?;
    let stays_deleted = missing(sikorsky, 2).await?;
    let deleted = missing(sikorsky, 3).await?;
    let incomplete = missing(sikorsky, 5).await?;
    for row in [&updated, &stays_deleted, &incomplete] {
        ensure!(row["conflict_type"] == "update_missing" && row["status"] == "open", "{row:#}");
        ensure!(row["operation"] == "update" && row["blocking"] == false, "{row:#}");
    }
    ensure!(updated["replica_identity"] == json!({"id": 1}), "{updated:#}");
    ensure!(updated["remote_tuple"] == json!({"id": 1, "n": 201, "body": ""}), "{updated:#}");
    ensure!(updated["local_conflicts"] == json!([]) && updated["transaction_kind"] == "plain", "{updated:#}");
    ensure!(incomplete["remote_tuple"] == json!({"id": 5, "n": 205}), "what is stored out of line was not sent");
    ensure!(deleted["conflict_type"] == "delete_missing" && deleted["status"] == "resolved", "{deleted:#}");
    ensure!(deleted["replica_identity"] == json!({"id": 3}) && deleted["operation"] == "delete", "{deleted:#}");
    let there = wait_conflict(gideon, "the row that both deleted", |row| row["replica_identity"]["id"] == 3).await?;
    ensure!(there["conflict_type"] == "delete_missing" && there["status"] == "resolved", "{there:#}");

    let (rows_here, rows_there) = (conflicts(sikorsky).await?, conflicts(gideon).await?);
    ensure!(rows_here.len() == 5 && rows_there.len() == 2, "{rows_here:#?} {rows_there:#?}");
    // Two updates of one row change places, and an update goes with the row. Before version 18, PostgreSQL does not tell that
    // a row it changes was last changed by somebody else; then it does, and the node whose later version is gone has a row.
    let tells = Installation::get()?.major >= 18;
    wait_until("what crossed to be told", PATIENCE, || async {
        Ok((crossed(gideon).await?.len() == if tells { 4 } else { 0 }).then_some(()))
    })
    .await?;
    ensure!(crossed(sikorsky).await?.is_empty(), "{:#?}", crossed(sikorsky).await?);
    for row in crossed(gideon).await? {
        let updated = row["replica_identity"] == json!({"id": 4});
        ensure!(
            row["conflict_type"] == if updated { "update_origin_differs" } else { "delete_origin_differs" },
            "{row:#}"
        );
        ensure!(
            row["status"] == "resolved" && row["resolved_by"] == "replication" && row["blocking"] == false,
            "{row:#}"
        );
        ensure!(row["detail"].as_str().is_some_and(|detail| detail.contains("modified locally")), "{row:#}");
        ensure!(!updated || row["remote_tuple"] == json!({"id": 4, "n": 100, "body": ""}), "{row:#}");
    }
    let n = "select n from stillebot.docs where id = 4";
    ensure!(text(sikorsky, n).await?.as_deref() == Some("204") && text(gideon, n).await?.as_deref() == Some("100"));
    // A deferrable constraint is checked by a trigger, which does not fire in apply.
    for node in [sikorsky, gideon] {
        ensure!(count(node, "stillebot.deferred where name = 'x'").await? == 2);
    }
    // Writing the row anew makes it the same everywhere.
    sikorsky.execute(DATABASE, "update stillebot.docs set n = n where id = 4").await?;

    // Without a key, all of the row has to be the same: there, it is not the row that was deleted here.
    let keyless = missing(sikorsky, 6).await?;
    ensure!(keyless["replica_identity"] == json!({"n": 1, "line": "first"}), "{keyless:#}");
    ensure!(keyless["remote_tuple"] == json!({"n": 1, "line": "gideon"}), "{keyless:#}");
    let kept = wait_conflict(gideon, "the other one that is missing", |row| row["relname"] == "lines").await?;
    ensure!(kept["conflict_type"] == "delete_missing" && kept["status"] == "resolved", "{kept:#}");
    resolve(sikorsky, &keyless, "remote").await?;

    let said = resolve(sikorsky, &stays_deleted, "local").await?;
    ensure!(said.contains("stays deleted"), "{said}");
    let reason = refused(sikorsky, &format!("stillebot_resolve({}, 'remote')", id(&incomplete)), "55000").await?;
    ensure!(reason.contains("not complete") && reason.contains("out of line"), "{reason}");
    resolve(sikorsky, &incomplete, "local").await?;
    // gideon has the row no more: it has applied the delete.
    let said = resolve(sikorsky, &updated, "remote").await?;
    ensure!(said.contains("inserted here") && said.contains("on the other node"), "{said}");
    ensure!(count(gideon, "stillebot.docs where id = 1").await? == 0);
    sikorsky.execute(DATABASE, "update stillebot.docs set n = n where id = 1").await?;
    let again = wait_conflict(gideon, "the update of the row that came back", |row| row["status"] == "open").await?;
    ensure!(again["conflict_type"] == "update_missing" && again["replica_identity"] == json!({"id": 1}), "{again:#}");
    resolve(gideon, &again, "remote").await?;
    settled(&cluster).await?;
    ensure!(text(gideon, "select n from stillebot.docs where id = 1").await?.as_deref() == Some("201"));

    for node in [sikorsky, gideon] {
        let log = node.log();
        ensure!(!log.contains("DEBUG") && !log.contains("did not find row"), "{}", node.log_tail(20));
    }
    cluster.finish().await
}

/// What stops apply on gideon when sikorsky writes, and what mends it.
struct Failure {
    table: &'static str,
    sqlstate: &'static str,
    message: &'static str,
    operation: &'static str,
    /// Of gideon's table.
    breaks: &'static str,
    write: &'static str,
    mends: &'static str,
}

#[tokio::test]
async fn whatever_else_stops_apply_is_a_row_that_closes_itself_when_the_cause_is_mended() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["P0001", "55000", "23502", "23503", "23514", "22P02"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let failures = [
        Failure {
            table: "raising",
            sqlstate: "P0001",
            message: "no entry today",
            operation: "insert",
            breaks: "create trigger refuse before insert on raising for each row execute function refuse();
                     alter table raising enable always trigger refuse",
            write: "insert into raising values (1, 'x')",
            mends: "drop trigger refuse on raising",
        },
        Failure {
            table: "deferring",
            sqlstate: "P0001",
            message: "no entry today",
            operation: "commit",
            // While apply acts for an owner who is not the subscription's, it cannot fire such triggers: 42501 at once.
            breaks: "create constraint trigger refuse after insert on deferring deferrable initially deferred
                       for each row execute function refuse();
                     alter table deferring enable always trigger refuse;
                     reset role;
                     alter table deferring owner to postgres",
            write: "insert into deferring values (1, 'x')",
            mends: "reset role; drop trigger refuse on deferring",
        },
        Failure {
            table: "missing",
            sqlstate: "55000",
            message: "\"stillebot.missing\" does not exist",
            operation: "insert",
            breaks: "alter table missing rename to elsewhere",
            write: "insert into missing values (1, 'x')",
            mends: "alter table elsewhere rename to missing",
        },
        Failure {
            table: "emptied",
            sqlstate: "55000",
            message: "\"stillebot.emptied\" does not exist",
            operation: "truncate",
            breaks: "alter table emptied rename to elsewhere",
            write: "truncate emptied",
            mends: "alter table elsewhere rename to emptied",
        },
        Failure {
            table: "narrow",
            sqlstate: "55000",
            message: "missing replicated column: \"name\"",
            operation: "insert",
            breaks: "alter table narrow drop column name",
            write: "insert into narrow values (1, 'x')",
            mends: "alter table narrow add column name text",
        },
        Failure {
            table: "wide",
            sqlstate: "23502",
            message: "null value in column \"extra\"",
            operation: "insert",
            breaks: "alter table wide add column extra int not null",
            write: "insert into wide values (1, 'x')",
            mends: "alter table wide drop column extra",
        },
        Failure {
            table: "strict",
            sqlstate: "23502",
            message: "null value in column \"name\"",
            operation: "insert",
            breaks: "alter table strict alter column name set not null",
            write: "insert into strict values (1, null)",
            mends: "alter table strict alter column name drop not null",
        },
        Failure {
            table: "checked",
            sqlstate: "23514",
            message: "violates check constraint \"short\"",
            operation: "update",
            breaks: "alter table checked add constraint short check (name < 'y')",
            write: "update checked set name = 'z'",
            mends: "alter table checked drop constraint short",
        },
        // Apply does not look at foreign keys, unless it is made to.
        Failure {
            table: "child",
            sqlstate: "23503",
            message: "violates foreign key constraint \"of_parent\"",
            operation: "insert",
            breaks: "reset role;
                     alter table child add constraint of_parent foreign key (id) references stillebot.narrow;
                     do $$
                     declare name text;
                     begin
                         for name in select tgname from pg_trigger where tgrelid = 'stillebot.child'::regclass loop
                             execute format('alter table stillebot.child enable always trigger %I', name);
                         end loop;
                     end $$",
            write: "insert into child values (7, 'x')",
            mends: "alter table child drop constraint of_parent",
        },
        Failure {
            table: "typed",
            sqlstate: "22P02",
            message: "invalid input syntax for type integer: \"x\"",
            operation: "insert",
            breaks: "alter table typed alter column name type int using null",
            write: "insert into typed values (1, 'x')",
            mends: "alter table typed alter column name type text",
        },
    ];
    let tables: String = failures
        .iter()
        .map(|failure| format!("create table {} (id int primary key, name text);", failure.table))
        .collect();
    create(&cluster, &tables).await?;
    gideon
        .execute(
            DATABASE,
            "set role rosuav;
             create function stillebot.refuse() returns trigger language plpgsql as $$ begin raise 'no entry today'; end $$",
        )
        .await?;
    sikorsky.execute(DATABASE, "insert into stillebot.checked values (1, 'x')").await?;
    cluster.wait_replicated().await?;

    for (place, failure) in failures.iter().enumerate() {
        let as_owner = |statements| format!("set role rosuav; set search_path = stillebot; {statements}");
        gideon.execute(DATABASE, &as_owner(failure.breaks)).await?;
        let write = format!("begin; insert into raids values (1, {place}); {}; commit", failure.write);
        sikorsky.execute(DATABASE, &as_owner(&write)).await?;
        // The commit is of no table.
        let of_table = failure.operation != "commit";
        let row = wait_conflict(gideon, failure.table, |row| {
            row["status"] == "open" && (row["relname"] == failure.table || !of_table)
        })
        .await?;
        ensure!(row["conflict_type"] == "apply_error" && row["sqlstate"] == failure.sqlstate, "{row:#}");
        ensure!(row["message"].as_str().is_some_and(|message| message.contains(failure.message)), "{row:#}");
        ensure!(row["operation"] == failure.operation && row["blocking"] == true, "{row:#}");
        ensure!(row["change_number"] == if of_table { json!(2) } else { Value::Null }, "{row:#}");
        ensure!(row["changes_complete"] != of_table && row["transaction_kind"] == "plain", "{row:#}");
        ensure!(row["remote_commit_lsn"].is_string() && row["remote_commit_ts"].is_string(), "{row:#}");
        if matches!(failure.operation, "insert" | "update") {
            ensure!(row["remote_tuple"].is_object() && row["replica_identity"].is_object(), "{row:#}");
        }
        let changes = text(
            gideon,
            &format!("select string_agg(relname || ' ' || failed, ', ' order by change_number) from multihome.conflict_changes({})", id(&row)),
        )
        .await?;
        ensure!(changes == Some(format!("raids false, {} {of_table}", failure.table)), "{changes:?}");
        if place < 2 {
            let reason = refused(gideon, &format!("stillebot_resolve({}, 'remote')", id(&row)), "55000").await?;
            ensure!(reason.contains("no two versions") && reason.contains("stillebot_skip"), "{reason}");
        }
        gideon.execute(DATABASE, &as_owner(failure.mends)).await?;
        let closed = wait_went_on(gideon, &row).await.with_context(|| failure.table)?;
        ensure!(closed["resolved_by"] == "replication" && closed["blocking"] == false, "{closed:#}");
    }
    settled(&cluster).await?;
    ensure!(count(gideon, "stillebot.raids").await? == i64::try_from(failures.len())?);
    // Errors of one cause are one row each, however often they were met.
    ensure!(conflicts(gideon).await?.len() == failures.len() && conflicts(sikorsky).await?.is_empty());
    cluster.finish().await
}

#[tokio::test]
async fn skipping_says_what_is_lost_and_enables_a_subscription_that_an_error_disabled() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let enabled = "select subenabled from pg_subscription";
    for disable_on_error in [false, true] {
        gideon
            .execute(DATABASE, &format!("alter subscription multihome set (disable_on_error = {disable_on_error})"))
            .await?;
        only_here(gideon, "insert into stillebot.config values (1, 'k', '\"gideon\"')").await?;
        sikorsky
            .execute(
                DATABASE,
                "begin;
                 insert into stillebot.raids values (1, 1);
                 insert into stillebot.config values (1, 'k', '\"sikorsky\"');
                 insert into stillebot.raids values (1, 2);
                 commit",
            )
            .await?;
        let row = wait_table(gideon, "config").await?;
        ensure!(row["conflict_type"] == "insert_exists" && row["changes_complete"] == false, "{row:#}");
        ensure!(
            row["local_conflicts"][0]["origin"].as_str().is_some_and(|origin| origin.starts_with("origin ")),
            "{row:#}"
        );
        if disable_on_error {
            wait_until("the subscription to be disabled", PATIENCE, || async {
                Ok((!gideon.value::<bool>(DATABASE, enabled).await?).then_some(()))
            })
            .await?;
        }
        let said = skip(gideon, &row).await?;
        ensure!(said.contains("the whole transaction") && said.contains("insert stillebot.config"), "{said}");
        let skipped = wait_conflict(gideon, "all changes of the transaction", |now| {
            now["id"] == row["id"] && now["status"] == "skipped" && now["changes_complete"] == true
        })
        .await?;
        let lost = skipped["resolution"].as_str().unwrap_or_default();
        ensure!(lost.contains(r#"insert stillebot.raids {"toid": "2", "fromid": "1"}"#), "{skipped:#}");
        ensure!(skipped["resolved_by"] == "postgres", "{skipped:#}");
        let changes = text(
            gideon,
            &format!("select string_agg(relname || ' ' || failed || ' ' || complete, ', ' order by change_number) from multihome.conflict_changes({})", id(&row)),
        )
        .await?;
        ensure!(changes.as_deref() == Some("raids false true, config true true, raids false true"), "{changes:?}");
        ensure!(gideon.value::<bool>(DATABASE, enabled).await?);
        ensure!(count(gideon, "stillebot.raids").await? == 0, "none of it came");
        // What was lost is mended by hand.
        sikorsky.execute(DATABASE, "update stillebot.config set data = data; delete from stillebot.raids").await?;
        settled(&cluster).await?;
        sikorsky.execute(DATABASE, "delete from stillebot.config").await?;
        cluster.wait_replicated().await?;
    }

    // Resolving enables it too.
    only_here(gideon, "insert into stillebot.config values (2, 'k', '\"gideon\"')").await?;
    sikorsky.execute(DATABASE, "insert into stillebot.config values (2, 'k', '\"sikorsky\"')").await?;
    let row = wait_table(gideon, "config").await?;
    wait_until("the subscription to be disabled", PATIENCE, || async {
        Ok((!gideon.value::<bool>(DATABASE, enabled).await?).then_some(()))
    })
    .await?;
    resolve(gideon, &row, "remote").await?;
    settled(&cluster).await?;
    cluster.finish().await
}

/// All tables of the cluster's subscription on gideon, from the beginning, with other options.
async fn subscribe_anew(cluster: &Cluster, options: &str) -> Result<()> {
    let gideon = cluster.node("gideon");
    let connection: String = gideon.value(DATABASE, "select quote_literal(subconninfo) from pg_subscription").await?;
    gideon.execute(DATABASE, "drop subscription multihome").await?;
    let statement = format!(
        "create subscription multihome connection {connection} publication multihome
           with (slot_name = multihome, origin = none, copy_data = false, {options})"
    );
    gideon.execute(DATABASE, &statement).await?;
    cluster.wait_applied("sikorsky", "gideon").await
}

#[tokio::test]
async fn a_huge_transaction_is_kept_in_part_and_a_streamed_one_is_told_by_its_rows() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let conflicting = |key: i32| format!("insert into stillebot.config values ({key}, 'k', '\"sikorsky\"')");
    let in_the_way = |key: i32| format!("insert into stillebot.config values ({key}, 'k', '\"gideon\"')");
    let many = |from: i32, rows: i32| {
        format!("insert into stillebot.raids select {from}, i from generate_series(1, {rows}) i")
    };

    only_here(gideon, &in_the_way(1)).await?;
    sikorsky.execute(DATABASE, &format!("begin; {}; {}; commit", many(1, 10_000), conflicting(1))).await?;
    let row = wait_table(gideon, "config").await?;
    ensure!(row["conflict_type"] == "insert_exists" && row["transaction_kind"] == "plain", "{row:#}");
    ensure!(row["change_number"] == 10_001 && row["changes_complete"] == false, "{row:#}");
    ensure!(row["remote_tuple"]["data"] == "sikorsky", "{row:#}");
    ensure!(row["local_conflicts"][0]["tuple"]["data"] == "gideon", "{row:#}");
    // The beginning and the change that failed.
    let changes = text(
        gideon,
        &format!(
            "select format('%s %s %s %s', min(change_number), max(change_number), count(*) < 10000, count(*) filter (where failed))
               from multihome.conflict_changes({})",
            id(&row)
        ),
    )
    .await?;
    ensure!(changes.as_deref() == Some("1 10001 t 1"), "{changes:?}");
    resolve(gideon, &row, "remote").await?;
    settled(&cluster).await?;
    ensure!(count(gideon, "stillebot.raids").await? == 10_000);

    // Sent while it runs, applied out of a file: which change it is at, nobody can see.
    sikorsky.config(&[("logical_decoding_work_mem", "64kB")]).await?;
    for key in [2, 3] {
        only_here(gideon, &in_the_way(key)).await?;
        let statements = format!("begin; {}; {}; {}; commit", many(key, 1000), conflicting(key), many(10 * key, 1000));
        sikorsky.execute(DATABASE, &statements).await?;
        let row = wait_table(gideon, "config").await?;
        ensure!(row["conflict_type"] == "insert_exists" && row["transaction_kind"] == "streamed", "{row:#}");
        ensure!(row["change_number"] == 1001 && row["replica_identity"]["twitchid"] == key, "{row:#}");
        ensure!(row["remote_tuple"]["data"] == "sikorsky" && row["changes_complete"] == true, "{row:#}");
        ensure!(row["local_conflicts"][0]["tuple"]["data"] == "gideon", "{row:#}");
        ensure!(row["remote_commit_ts"].is_string() && row["remote_xid"].is_string(), "{row:#}");
        let reason = refused(gideon, &format!("stillebot_resolve({}, 'local')", id(&row)), "55000").await?;
        ensure!(reason.contains("one change of a streamed transaction cannot be left out"), "{reason}");
        if key == 2 {
            resolve(gideon, &row, "remote").await?;
        } else {
            skip(gideon, &row).await?;
            let skipped = wait_conflict(gideon, "the end of it", |now| {
                now["id"] == row["id"] && now["status"] == "skipped" && now["blocking"] == false
            })
            .await?;
            ensure!(skipped["changes_complete"] == true, "{skipped:#}");
            // What was lost is brought by hand.
            only_here(gideon, &format!("{}; {}", many(key, 1000), many(10 * key, 1000))).await?;
            sikorsky.execute(DATABASE, "update stillebot.config set data = data where twitchid = 3").await?;
        }
        settled(&cluster).await?;
    }
    ensure!(count(gideon, "stillebot.raids").await? == 14_000);
    let (here, there) = (conflicts(sikorsky).await?, conflicts(gideon).await?);
    ensure!(here.is_empty() && there.len() == 3, "{here:#?} {there:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn transactions_in_two_phases_and_rows_in_binary_are_told_as_what_they_are() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let conflict = async |key: i32, prepare: &str| -> Result<Conflict> {
        only_here(gideon, &format!("insert into stillebot.phases values ({key}, 'gideon')")).await?;
        let insert = format!("insert into stillebot.phases values ({key}, 'sikorsky')");
        sikorsky.execute(DATABASE, &format!("begin; {insert}; {prepare}")).await?;
        wait_table(gideon, "phases").await
    };

    // A transaction that has notified cannot be prepared, so that most of the bot's tables cannot take part.
    create(&cluster, "create table phases (id int primary key, name text)").await?;
    cluster.expect_log(" 57P01 logical replication"); // A subscription's worker goes with it.
    subscribe_anew(&cluster, "two_phase = true, streaming = on").await?;
    wait_until("two-phase commit", PATIENCE, || async {
        let state = gideon.value::<i8>(DATABASE, "select subtwophasestate from pg_subscription").await?;
        Ok((state == b'e' as i8).then_some(()))
    })
    .await?;
    for (key, keep) in [(1, "remote"), (2, "local")] {
        let row = conflict(key, &format!("prepare transaction 'number {key}'")).await?;
        ensure!(row["transaction_kind"] == "prepared" && row["conflict_type"] == "insert_exists", "{row:#}");
        ensure!(row["change_number"] == 1 && row["remote_commit_lsn"].is_string(), "{row:#}");
        ensure!(row["remote_tuple"]["name"] == "sikorsky", "{row:#}");
        ensure!(row["local_conflicts"][0]["tuple"]["name"] == "gideon", "{row:#}");
        resolve(gideon, &row, keep).await?;
        wait_until("the transaction to be prepared", PATIENCE, || async {
            Ok((count(gideon, "pg_prepared_xacts").await? == 1).then_some(()))
        })
        .await?;
        sikorsky.execute(DATABASE, &format!("commit prepared 'number {key}'")).await?;
        cluster.wait_applied("sikorsky", "gideon").await?;
        let kept = text(gideon, &format!("select name from stillebot.phases where id = {key}")).await?;
        ensure!(kept.as_deref() == Some(if keep == "remote" { "sikorsky" } else { "gideon" }), "{kept:?}");
        if keep == "local" {
            // Written anew where it is to stay, it is the same everywhere.
            rewrite(gideon, &row).await?;
        }
    }
    settled(&cluster).await?;

    gideon.execute(DATABASE, "alter subscription multihome set (binary = true)").await?;
    let row = conflict(3, "commit").await?;
    ensure!(row["conflict_type"] == "insert_exists" && row["constraint_name"] == "phases_pkey", "{row:#}");
    ensure!(row["remote_tuple"]["id"] == json!({"binary": "00000003"}), "{row:#}");
    let reason = refused(gideon, &format!("stillebot_resolve({}, 'remote')", id(&row)), "55000").await?;
    ensure!(reason.contains("came in binary") && reason.contains("SET (binary = off)"), "{reason}");
    resolve(gideon, &row, "local").await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    sikorsky.execute(DATABASE, "update stillebot.phases set name = name where id = 3").await?;
    // As text it can be read.
    let row = conflict(4, "commit").await?;
    gideon.execute(DATABASE, "alter subscription multihome set (binary = false)").await?;
    let row = wait_conflict(gideon, "the row as text", |now| {
        now["id"] == row["id"] && now["local_conflicts"][0]["tuple"]["name"] == "gideon"
    })
    .await?;
    ensure!(row["remote_tuple"] == json!({"id": 4, "name": "sikorsky"}), "{row:#}");
    resolve(gideon, &row, "remote").await?;
    settled(&cluster).await?;
    ensure!(count(gideon, "stillebot.phases where name = 'sikorsky'").await? == 3);
    cluster.finish().await
}

#[tokio::test]
async fn a_connection_that_breaks_or_stands_still_is_a_fault_that_heals_and_never_a_conflict() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &[]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let link = cluster.link("sikorsky", "gideon");
    sikorsky.config(&[("logical_decoding_work_mem", "64kB")]).await?;
    let faults = "select string_agg(sqlstate || ' ' || healed, ', ' order by sqlstate) from multihome.faults";
    let healed = async || {
        wait_until("the faults to be healed", PATIENCE, || async {
            let found = text(gideon, faults).await?;
            Ok(found.filter(|found| found.contains("08006 true") && !found.contains("false")))
        })
        .await
    };

    // Cut while a transaction is on its way, which is sent again from its beginning.
    let session = sikorsky.superuser(DATABASE).await?;
    session.batch_execute("begin; insert into stillebot.raids select 1, i from generate_series(1, 5000) i").await?;
    wait_until("the transaction to be streamed", PATIENCE, || async {
        // Positions are counted by the sender when it has sent.
        session.batch_execute("select pg_logical_emit_message(true, 'more', repeat('x', 10000))").await?;
        Ok((count(sikorsky, "pg_stat_replication_slots where stream_bytes > 0").await? > 0).then_some(()))
    })
    .await?;
    link.cut().await?;
    session.batch_execute("insert into stillebot.raids select 2, i from generate_series(1, 5000) i; commit").await?;
    wait_until("the fault", PATIENCE, || async {
        Ok(text(gideon, faults).await?.filter(|found| found.contains("08006 false")))
    })
    .await?;
    // A worker that waits for its connection has heard nothing yet.
    link.freeze().await?;
    wait_until("a worker that connects", PATIENCE, || async {
        Ok((count(gideon, "pg_stat_subscription where pid is not null").await? > 0).then_some(()))
    })
    .await?;
    let shown = text(gideon, "select faults from stillebot_status()").await?.context("no faults")?;
    ensure!(shown.contains("multihome: SQLSTATE 08006"), "{shown}");
    link.heal().await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    healed().await?;
    ensure!(count(gideon, "stillebot.raids").await? == 10_000, "each once");

    // A publisher that neither speaks nor goes away.
    gideon.config(&[("wal_receiver_timeout", "1s")]).await?;
    let sender: i32 = sikorsky.value(DATABASE, "select pid from pg_stat_replication").await?;
    let signal = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(sender), signal);
    signal(nix::sys::signal::SIGSTOP)?;
    wait_until("the fault", PATIENCE, || async {
        Ok(text(gideon, faults).await?.filter(|found| found.contains("08006 false")))
    })
    .await?;
    sikorsky.execute(DATABASE, "insert into stillebot.raids values (3, 3)").await?;
    signal(nix::sys::signal::SIGCONT)?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    healed().await?;
    ensure!(text(gideon, "select faults from stillebot_status()").await?.is_none());
    settled(&cluster).await?;
    ensure!(count(gideon, "stillebot.raids").await? == 10_001);
    ensure!(conflicts(gideon).await?.is_empty() && conflicts(sikorsky).await?.is_empty());
    cluster.finish().await
}

#[tokio::test]
async fn the_newest_wins_on_both_nodes_and_where_times_are_not_known_nobody_guesses() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let insert =
        |key: i32, node: &Server| format!("insert into stillebot.config values ({key}, 'k', '\"{}\"')", node.name());
    let of = async |node: &Server, key: i32| {
        wait_conflict(node, &format!("the conflict of {key}"), |row| {
            row["replica_identity"]["twitchid"] == key && row["status"] == "open"
        })
        .await
    };
    let kept = async |node: &Server, key: i32| {
        text(node, &format!("select data #>> '{{}}' from stillebot.config where twitchid = {key}")).await
    };

    for link in [cluster.link("sikorsky", "gideon"), cluster.link("gideon", "sikorsky")] {
        link.cut().await?;
    }
    gideon.execute(DATABASE, &insert(2, gideon)).await?;
    sikorsky.execute(DATABASE, &insert(1, sikorsky)).await?;
    sikorsky.execute(DATABASE, &insert(2, sikorsky)).await?;
    gideon.execute(DATABASE, &insert(1, gideon)).await?;
    for node in [sikorsky, gideon] {
        // A frozen row has its time as long as the server keeps it.
        node.execute(DATABASE, "vacuum freeze stillebot.config").await?;
    }
    for link in [cluster.link("sikorsky", "gideon"), cluster.link("gideon", "sikorsky")] {
        link.heal().await?;
    }
    for (node, key, keeps) in
        [(sikorsky, 2, "local"), (sikorsky, 1, "remote"), (gideon, 1, "local"), (gideon, 2, "remote")]
    {
        let row = of(node, key).await?;
        ensure!(row["local_conflicts"][0]["commit_ts"].is_string(), "{row:#}");
        resolve(node, &row, "newest").await?;
        let row = wait_conflict(node, "the resolved row", |now| now["id"] == row["id"] && now["status"] == "resolved")
            .await?;
        let resolution = row["resolution"].as_str().unwrap_or_default();
        ensure!(
            resolution.starts_with(&format!("kept {keeps} (the newest)")),
            "{key} on {}: {resolution}",
            node.name()
        );
    }
    settled(&cluster).await?;
    ensure!(kept(gideon, 1).await?.as_deref() == Some("gideon"));
    ensure!(kept(sikorsky, 2).await?.as_deref() == Some("sikorsky"));

    // A clock that is five seconds ahead wins over a later write: times are what the nodes' clocks said.
    only_here(
        gideon,
        &format!("select pg_replication_origin_xact_setup('0/1', now() + interval '5 seconds'); {}", insert(3, gideon)),
    )
    .await?;
    sikorsky.execute(DATABASE, &insert(3, sikorsky)).await?;
    let row = of(gideon, 3).await?;
    let said = resolve(gideon, &row, "newest").await?;
    ensure!(said.contains("left out here (the newest)"), "{said}");
    cluster.wait_applied("sikorsky", "gideon").await?;
    rewrite(gideon, &row).await?;
    settled(&cluster).await?;
    ensure!(kept(sikorsky, 3).await?.as_deref() == Some("gideon"));

    gideon.config(&[("track_commit_timestamp", "off")]).await?;
    gideon.restart().await?;
    only_here(gideon, &insert(4, gideon)).await?;
    sikorsky.execute(DATABASE, &insert(4, sikorsky)).await?;
    let row = of(gideon, 4).await?;
    let local = &row["local_conflicts"][0];
    ensure!(local["tuple"]["data"] == "gideon" && local["xid"].is_number(), "{row:#}");
    ensure!(local["commit_ts"].is_null() && local["origin"].is_null(), "{row:#}");
    let reason = refused(gideon, &format!("stillebot_resolve({}, 'newest')", id(&row)), "55000").await?;
    ensure!(reason.contains("not known") && reason.contains("track_commit_timestamp"), "{reason}");
    resolve(gideon, &row, "remote").await?;
    settled(&cluster).await?;
    cluster.finish().await
}

#[tokio::test]
async fn an_initial_copy_that_fails_is_a_row_and_ends_by_itself_when_the_cause_is_mended() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for node in [sikorsky, gideon] {
        let table = "set role rosuav; create table stillebot.copied (id int primary key, name text)";
        node.execute(DATABASE, table).await?;
    }
    // Neither has subscribed to it yet.
    for node in [sikorsky, gideon] {
        node.execute(DATABASE, &format!("insert into stillebot.copied values (1, '{}')", node.name())).await?;
    }
    cluster.wait_replicated().await?;
    gideon.execute(DATABASE, "select multihome.refresh(true)").await?;
    let row = wait_table(gideon, "copied").await?;
    ensure!(row["conflict_type"] == "apply_error" && row["transaction_kind"] == "copy", "{row:#}");
    ensure!(
        row["operation"] == "copy" && row["constraint_name"] == "copied_pkey" && row["sqlstate"] == "23505",
        "{row:#}"
    );
    ensure!(row["remote_commit_lsn"].is_null() && row["change_number"].is_null() && row["blocking"] == true, "{row:#}");
    ensure!(row["detail"] == "Key (id)=(1) already exists.", "{row:#}");
    let reason = refused(gideon, &format!("stillebot_skip({})", id(&row)), "55000").await?;
    ensure!(reason.contains("no transaction") && reason.contains("the initial copy is tried again"), "{reason}");
    refused(gideon, &format!("stillebot_resolve({}, 'remote')", id(&row)), "55000").await?;
    // The other tables go on meanwhile, and it is one row however often it is tried.
    sikorsky.execute(DATABASE, "insert into stillebot.raids values (1, 1)").await?;
    wait_until("the row", PATIENCE, || async { Ok((count(gideon, "stillebot.raids").await? == 1).then_some(())) })
        .await?;
    wait_conflict(gideon, "the same again", |now| now["occurrences"].as_i64() > Some(1)).await?;
    ensure!(conflicts(gideon).await?.len() == 1);
    only_here(gideon, "delete from stillebot.copied").await?;
    wait_went_on(gideon, &row).await?;
    sikorsky.execute(DATABASE, "select multihome.refresh(false)").await?;
    settled(&cluster).await?;
    ensure!(text(gideon, "select name from stillebot.copied").await?.as_deref() == Some("sikorsky"));
    cluster.finish().await
}

#[tokio::test]
async fn a_conflict_is_resolved_on_a_database_that_is_down_and_wrong_calls_are_refused() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    sikorsky.execute(DATABASE, "insert into stillebot.config values (1, 'gone', '1')").await?;
    cluster.wait_replicated().await?;
    apart(
        &cluster,
        "delete from stillebot.config where twitchid = 1;
         insert into stillebot.config values (2, 'k', '\"sikorsky\"')",
        "begin;
         update stillebot.config set data = '2' where twitchid = 1;
         insert into stillebot.config values (2, 'k', '\"gideon\"');
         commit",
    )
    .await?;
    let there = wait_table(gideon, "config").await?;
    let missed = wait_conflict(sikorsky, "the update", |row| row["conflict_type"] == "update_missing").await?;
    let here = wait_conflict(sikorsky, "the insert", |row| row["conflict_type"] == "insert_exists").await?;
    gideon.execute(DATABASE, "select stillebot_down('the test says so')").await?;

    let calls = ["stillebot_resolve(4711, 'local')", "stillebot_skip(4711)", "stillebot_skip(null)"];
    for call in calls {
        let reason = refused(gideon, call, "02000").await?;
        ensure!(reason.contains("there is no conflict"), "{reason}");
    }
    for keep in ["'both'", "null"] {
        let reason = refused(gideon, &format!("stillebot_resolve({}, {keep})", id(&there)), "22023").await?;
        ensure!(reason.contains("keep must be local, remote or newest"), "{reason}");
    }
    let reason = refused(sikorsky, &format!("stillebot_skip({})", id(&missed)), "55000").await?;
    ensure!(reason.contains("stops nothing"), "{reason}");
    let operator = gideon.superuser(DATABASE).await?;
    for call in [format!("stillebot_resolve({}, 'remote')", id(&there)), format!("stillebot_skip({})", id(&there))] {
        gideon.expect_log(" 25001 client backend");
        operator.batch_execute("begin").await?;
        let report =
            assert_error(operator.simple_query(&format!("select {call}")).await, &SqlState::ACTIVE_SQL_TRANSACTION);
        ensure!(report.message().contains("cannot run inside a transaction block"), "{report:?}");
        operator.batch_execute("rollback").await?;
        gideon.expect_log(" 42501 client backend");
        let bot = gideon.connect("rosuav", DATABASE).await?;
        assert_error(bot.simple_query(&format!("select {call}")).await, &SqlState::INSUFFICIENT_PRIVILEGE);
    }

    resolve(gideon, &there, "remote").await?;
    for call in [format!("stillebot_resolve({}, 'remote')", id(&there)), format!("stillebot_skip({})", id(&there))] {
        let reason = refused(gideon, &call, "55000").await?;
        ensure!(reason.contains("is resolved already"), "{reason}");
    }
    wait_until("sikorsky's row on gideon", PATIENCE, || async {
        Ok((count(gideon, "stillebot.config where data = '\"sikorsky\"'").await? == 1).then_some(()))
    })
    .await?;
    ensure!(gideon.value::<String>(DATABASE, "select state from stillebot_status()").await? == "down");
    // What is decided stays so when its transaction comes again because of the other change.
    resolve(sikorsky, &missed, "local").await?;
    resolve(sikorsky, &here, "local").await?;
    settled(&cluster).await?;
    // gideon has removed its own row, and only its own.
    ensure!(text(sikorsky, "select data #>> '{}' from stillebot.config").await?.as_deref() == Some("sikorsky"));
    gideon.execute(DATABASE, "select stillebot_up()").await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_row_that_is_too_long_for_the_log_is_cut_and_its_conflict_is_resolved_all_the_same() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let upload = |node: &Server| {
        format!(
            "insert into stillebot.uploads (id, channel, uploader, data)
             select '00000000-0000-0000-0000-000000000001', 1, 1, decode(string_agg(md5('{}' || i), ''), 'hex')
               from generate_series(1, 10000) i",
            node.name()
        )
    };
    apart(&cluster, &upload(sikorsky), &upload(gideon)).await?;
    let (here, there) = (wait_table(sikorsky, "uploads").await?, wait_table(gideon, "uploads").await?);
    for row in [&here, &there] {
        ensure!(row["conflict_type"] == "insert_exists" && row["remote_tuple"]["channel"] == 1, "{row:#}");
        ensure!(row["remote_tuple"]["data"]["cut"] == 320_002, "{row:#}");
        let local = &row["local_conflicts"][0]["tuple"];
        ensure!(local["uploader"] == 1 && local["data"]["cut"] == 320_002, "{row:#}");
        ensure!(row.to_string().len() < 100_000, "{}", row.to_string().len());
    }
    resolve(sikorsky, &here, "remote").await?;
    resolve(gideon, &there, "local").await?;
    settled(&cluster).await?;
    // The one that went is in the log, all of it.
    let gone = wait_conflict(sikorsky, "the resolved row", |row| row["status"] == "resolved").await?;
    ensure!(gone["local_conflicts"][0]["tuple"]["data"].as_str().is_some_and(|data| data.len() == 320_002));
    cluster.finish().await
}

/// Everything that a node's log says, as one text.
async fn everything(node: &Server) -> Result<String> {
    node.value(DATABASE, "select coalesce(string_agg(l::text, ' '), '') from multihome.log l").await
}

#[tokio::test]
async fn a_redacted_table_is_not_told_of_by_an_error_elsewhere_or_at_a_commit_or_out_of_a_file_or_by_a_partition()
-> Result<()> {
    let redact = "stillebot.secrets, stillebot.parted";
    let cluster = Cluster::builder().config("stillebot.redact", redact).start().await?;
    expect_errors(&cluster, &["23505", "P0001"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    create(
        &cluster,
        "create table secrets (id int primary key, name text unique);
         create table parted (id int primary key, name text) partition by range (id);
         create table leaf partition of parted for values from (0) to (1000);
         create table plain (id int primary key, name text);",
    )
    .await?;
    let quiet = async |what: &str| -> Result<Conflict> {
        let row = wait_conflict(gideon, what, |row| row["status"] == "open" && row["blocking"] == true).await?;
        let said = everything(gideon).await?;
        ensure!(!said.contains("hush"), "{what}: {said}");
        Ok(row)
    };

    // A partition, of which the list has the parent.
    only_here(gideon, "insert into stillebot.parted values (1, 'hush here')").await?;
    sikorsky.execute(DATABASE, "insert into stillebot.parted values (1, 'hush there')").await?;
    let row = quiet("the partition").await?;
    ensure!(row["relname"] == "leaf" && row["replica_identity"] == json!({"id": 1}), "{row:#}");
    ensure!(row["remote_tuple"].is_null() && row["tuple_complete"].is_null(), "{row:#}");
    resolve(gideon, &row, "remote").await?;
    settled(&cluster).await?;

    // A trigger on another table.
    let trigger = "create function stillebot.also() returns trigger language plpgsql as
                     $$ begin insert into stillebot.secrets values (new.id, 'hush'); return new; end $$;
                   create trigger also after insert on stillebot.plain for each row execute function stillebot.also();
                   alter table stillebot.plain enable replica trigger also;";
    gideon.execute(DATABASE, trigger).await?;
    only_here(gideon, "insert into stillebot.secrets values (1, 'hush')").await?;
    sikorsky.execute(DATABASE, "insert into stillebot.plain values (2, 'open')").await?;
    let row = quiet("the trigger").await?;
    ensure!(row["conflict_type"] == "apply_error" && row["constraint_name"] == "secrets_name_key", "{row:#}");
    ensure!(row["detail"].is_null() && row["context"].is_null() && row["sqlstate"] == "23505", "{row:#}");
    only_here(gideon, "delete from stillebot.secrets").await?;
    settled_here(&cluster).await?;
    gideon.execute(DATABASE, "drop trigger also on stillebot.plain").await?;

    // What is checked at the commit: which change it was of, nobody knows.
    let deferred = "create function stillebot.no() returns trigger language plpgsql as
                      $$ begin raise 'not %', new.name; end $$;
                    create constraint trigger no after insert on stillebot.secrets deferrable initially deferred
                      for each row execute function stillebot.no();
                    alter table stillebot.secrets enable replica trigger no;";
    gideon.execute(DATABASE, deferred).await?;
    // As a table's owner, which is the default, apply cannot defer anything.
    gideon.execute(DATABASE, "alter subscription multihome set (run_as_owner = true)").await?;
    sikorsky.execute(DATABASE, "insert into stillebot.secrets values (3, 'hush 3')").await?;
    let row = quiet("the commit").await?;
    ensure!(row["operation"] == "commit" && row["sqlstate"] == "P0001", "{row:#}");
    ensure!(row["message"].as_str().is_some_and(|message| message.contains("text withheld")), "{row:#}");
    gideon.execute(DATABASE, "drop trigger no on stillebot.secrets").await?;
    settled_here(&cluster).await?;

    // Out of a file, past what is kept of it.
    sikorsky.config(&[("logical_decoding_work_mem", "64kB")]).await?;
    only_here(gideon, "insert into stillebot.secrets values (4, 'hush 4')").await?;
    sikorsky
        .execute(
            DATABASE,
            "begin; insert into stillebot.raids select 1, i from generate_series(1, 10000) i;
             insert into stillebot.secrets values (4, 'hush there'); commit",
        )
        .await?;
    let row = quiet("the file").await?;
    ensure!(row["transaction_kind"] == "streamed" && row["relname"] == "secrets", "{row:#}");
    ensure!(row["detail"].is_null(), "{row:#}");
    only_here(gideon, "delete from stillebot.secrets where id = 4").await?;
    settled_here(&cluster).await?;
    cluster.finish().await
}

/// Waits until apply has got past everything, whatever the nodes' rows.
async fn settled_here(cluster: &Cluster) -> Result<()> {
    let gideon = cluster.node("gideon");
    gideon.execute(DATABASE, "select multihome.restart_apply('multihome')").await?;
    wait_until("no open conflict", PATIENCE, || async {
        Ok((count(gideon, "multihome.conflicts where status = 'open'").await? == 0).then_some(()))
    })
    .await?;
    cluster.wait_applied("sikorsky", "gideon").await
}

#[tokio::test]
async fn a_streamed_conflict_past_what_is_kept_says_its_table_and_is_resolved_when_it_comes_again_unstreamed()
-> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    sikorsky.config(&[("logical_decoding_work_mem", "64kB")]).await?;
    for (key, keep) in [(1, "local"), (2, "remote")] {
        only_here(gideon, &format!("insert into stillebot.config values ({key}, 'k', '\"gideon\"')")).await?;
        sikorsky
            .execute(
                DATABASE,
                &format!(
                    "begin; insert into stillebot.raids select {key}, i from generate_series(1, 10000) i;
                     insert into stillebot.config values ({key}, 'k', '\"sikorsky\"'); commit"
                ),
            )
            .await?;
        let row = wait_table(gideon, "config").await?;
        ensure!(row["conflict_type"] == "insert_exists" && row["transaction_kind"] == "streamed", "{row:#}");
        ensure!(row["operation"] == "insert" && row["change_number"].is_null(), "{row:#}");
        ensure!(row["remote_tuple"].is_null() && row["changes_complete"] == false, "{row:#}");
        for keep in ["remote", "local", "newest"] {
            let reason = refused(gideon, &format!("stillebot_resolve({}, '{keep}')", id(&row)), "55000").await?;
            ensure!(reason.contains("ALTER SUBSCRIPTION multihome SET (streaming = off)"), "{reason}");
        }
        gideon.execute(DATABASE, "alter subscription multihome set (streaming = off)").await?;
        let whole = wait_conflict(gideon, "the change", |now| now["id"] == row["id"] && now["change_number"] == 10_001);
        let whole = whole.await?;
        ensure!(whole["transaction_kind"] == "plain" && whole["remote_tuple"]["data"] == "sikorsky", "{whole:#}");
        ensure!(
            whole["local_conflicts"][0]["tuple"]["data"] == "gideon" && whole["tuple_complete"] == true,
            "{whole:#}"
        );
        resolve(gideon, &whole, keep).await?;
        cluster.wait_applied("sikorsky", "gideon").await?;
        let kept =
            text(gideon, &format!("select data #>> '{{}}' from stillebot.config where twitchid = {key}")).await?;
        ensure!(kept.as_deref() == Some(if keep == "local" { "gideon" } else { "sikorsky" }), "{kept:?}");
        sikorsky.execute(DATABASE, "update stillebot.config set data = data").await?;
        gideon.execute(DATABASE, "alter subscription multihome set (streaming = on)").await?;
    }
    settled(&cluster).await?;
    ensure!(count(gideon, "stillebot.raids").await? == 20_000 && conflicts(gideon).await?.len() == 2);
    cluster.finish().await
}

#[tokio::test]
async fn a_conflict_of_a_copy_that_catches_up_stays_open_while_its_table_is_stuck_and_says_what_helps() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    for node in [sikorsky, gideon] {
        node.execute(DATABASE, "set role rosuav; create table stillebot.copied (id int primary key, name text)")
            .await?;
    }
    // The copy has its snapshot, and waits at its first row.
    let wait = "create function stillebot.wait() returns trigger language plpgsql as
                  $$ begin perform pg_advisory_xact_lock_shared(7); return new; end $$;
                create trigger wait before insert on stillebot.copied for each row execute function stillebot.wait();
                alter table stillebot.copied enable replica trigger wait;";
    gideon.execute(DATABASE, wait).await?;
    let gate = gideon.superuser(DATABASE).await?;
    gate.batch_execute("select pg_advisory_lock(7)").await?;
    sikorsky.execute(DATABASE, "insert into stillebot.copied values (1, 'sikorsky')").await?;
    gideon.execute(DATABASE, "select multihome.refresh(true)").await?;
    wait_until("the copy to wait", PATIENCE, || async {
        let waiting = count(gideon, "pg_stat_activity where wait_event = 'advisory'").await?;
        Ok((waiting == 1).then_some(()))
    })
    .await?;
    gideon.execute(DATABASE, "insert into stillebot.copied values (2, 'gideon')").await?;
    sikorsky.execute(DATABASE, "insert into stillebot.copied values (2, 'sikorsky')").await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    gate.batch_execute("select pg_advisory_unlock(7)").await?;
    let row = wait_table(gideon, "copied").await?;
    ensure!(row["conflict_type"] == "insert_exists" && row["transaction_kind"] == "plain", "{row:#}");
    ensure!(row["local_conflicts"][0]["tuple"]["name"] == "gideon" && row["remote_commit_lsn"].is_string(), "{row:#}");
    // All else goes on meanwhile, beyond that transaction.
    sikorsky.execute(DATABASE, "insert into stillebot.raids values (1, 1)").await?;
    wait_until("the row", PATIENCE, || async { Ok((count(gideon, "stillebot.raids").await? == 1).then_some(())) })
        .await?;
    let again = wait_conflict(gideon, "the same again", |now| now["occurrences"].as_i64() > Some(1)).await?;
    ensure!(again["id"] == row["id"] && again["status"] == "open" && again["blocking"] == true, "{again:#}");
    let reason = refused(gideon, &format!("stillebot_skip({})", id(&row)), "55000").await?;
    ensure!(reason.contains("stops the copy of table stillebot.copied only"), "{reason}");
    let reason = refused(gideon, &format!("stillebot_resolve({}, 'local')", id(&row)), "55000").await?;
    ensure!(reason.contains("being copied"), "{reason}");
    resolve(gideon, &row, "remote").await?;
    wait_until("the copy to end", PATIENCE, || async {
        Ok((count(gideon, "pg_subscription_rel where srsubstate <> 'r'").await? == 0).then_some(()))
    })
    .await?;
    sikorsky.execute(DATABASE, "select multihome.refresh(false)").await?;
    // The time of a copied row is the copy's.
    let known =
        "stillebot.copied as t cross join multihome.commit_of(t.xmin) as c where t.id = 1 and c.commit_ts is not null";
    ensure!(count(gideon, known).await? == 0 && count(sikorsky, known).await? == 1);
    settled(&cluster).await?;
    ensure!(
        text(gideon, "select string_agg(name, ' ') from stillebot.copied").await?.as_deref()
            == Some("sikorsky sikorsky")
    );
    cluster.finish().await
}

#[tokio::test]
async fn a_deleted_row_that_came_back_is_left_open_for_the_nodes_may_differ() -> Result<()> {
    let cluster = Cluster::start().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    sikorsky.execute(DATABASE, "insert into stillebot.raids values (1, 1), (2, 2)").await?;
    cluster.wait_replicated().await?;
    apart(
        &cluster,
        "delete from stillebot.raids",
        "begin; delete from stillebot.raids; insert into stillebot.raids values (1, 1, '\"again\"'); commit",
    )
    .await?;
    let row = wait_conflict(sikorsky, "the row that came back", |row| row["status"] == "open").await?;
    ensure!(row["conflict_type"] == "delete_missing" && row["blocking"] == false, "{row:#}");
    ensure!(row["replica_identity"]["fromid"] == 1, "{row:#}");
    ensure!(row["resolution"].as_str().is_some_and(|words| words.contains("the nodes may differ")), "{row:#}");
    ensure!(row["resolved_at"].is_null() && row["resolved_by"].is_null(), "{row:#}");
    let other = wait_conflict(sikorsky, "the other one", |row| row["replica_identity"]["fromid"] == 2).await?;
    ensure!(other["status"] == "resolved", "{other:#}");
    ensure!(other["resolution"] == "nothing to do: the row was gone here already", "{other:#}");

    let reason = refused(sikorsky, &format!("stillebot_resolve({}, 'remote')", id(&row)), "55000").await?;
    ensure!(reason.contains("DELETE and INSERT it here"), "{reason}");
    cluster.wait_replicated().await?;
    ensure!(count(sikorsky, "stillebot.raids").await? == 1 && count(gideon, "stillebot.raids").await? == 0);
    let anew = "begin; create temp table kept as select * from stillebot.raids; delete from stillebot.raids;
                insert into stillebot.raids select * from kept; commit";
    sikorsky.execute(DATABASE, anew).await?;
    resolve(sikorsky, &row, "local").await?;
    // There it looks the same: a deletion that finds nothing, and the row is there.
    let there = wait_conflict(gideon, "the row that came back", |row| row["status"] == "open").await?;
    resolve(gideon, &there, "local").await?;
    settled(&cluster).await?;
    ensure!(count(gideon, "stillebot.raids").await? == 1);
    cluster.finish().await
}

#[tokio::test]
async fn several_rows_in_the_way_are_left_to_the_agent_and_a_deferrable_index_puts_none_there() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    create(
        &cluster,
        "create table several (id int primary key, name text unique);
         create table deferred (id int primary key, name text unique deferrable);",
    )
    .await?;
    only_here(gideon, "insert into stillebot.several values (1, 'a'), (2, 'b')").await?;
    sikorsky.execute(DATABASE, "insert into stillebot.several values (1, 'b')").await?;
    let row = wait_table(gideon, "several").await?;
    ensure!(row["conflict_type"] == "multiple_unique_conflicts", "{row:#}");
    let reason = refused(gideon, &format!("stillebot_resolve({}, 'newest')", id(&row)), "55000").await?;
    ensure!(
        reason.contains(&format!("stillebot-agent conflicts resolve gideon/{} --keep newest", id(&row))),
        "{reason}"
    );
    let said = resolve(gideon, &row, "remote").await?;
    ensure!(said.contains("2 local rows") && said.contains("if it has no conflict of this row"), "{said}");
    settled(&cluster).await?;

    let warnings = text(gideon, "select warnings from stillebot_status()").await?.unwrap_or_default();
    ensure!(warnings.contains("index stillebot.deferred_name_key is deferrable"), "{warnings}");
    only_here(gideon, "insert into stillebot.deferred values (1, 'gideon'), (2, 'x')").await?;
    sikorsky.execute(DATABASE, "insert into stillebot.deferred values (1, 'x')").await?;
    let row = wait_table(gideon, "deferred").await?;
    ensure!(row["conflict_type"] == "insert_exists" && row["constraint_name"] == "deferred_pkey", "{row:#}");
    resolve(gideon, &row, "remote").await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    ensure!(count(gideon, "stillebot.deferred where name = 'x'").await? == 2, "a row went that was in nothing's way");
    cluster.finish().await
}

#[tokio::test]
async fn what_may_be_rolled_back_yet_is_not_inserted_and_what_cannot_be_skipped_says_so() -> Result<()> {
    let cluster = Cluster::start().await?;
    expect_errors(&cluster, &["23505", "42704"]);
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    create(&cluster, "create table phases (id int primary key, name text)").await?;
    cluster.expect_log(" 57P01 logical replication"); // A subscription's worker goes with it.
    subscribe_anew(&cluster, "two_phase = true").await?;
    wait_until("two-phase commit", PATIENCE, || async {
        let state = gideon.value::<i8>(DATABASE, "select subtwophasestate from pg_subscription").await?;
        Ok((state == b'e' as i8).then_some(()))
    })
    .await?;
    let prepared = async || {
        wait_until("the transaction to be prepared", PATIENCE, || async {
            text(gideon, "select gid from pg_prepared_xacts where database = current_database()").await
        })
        .await
    };
    sikorsky.execute(DATABASE, "insert into stillebot.phases values (1, 'a'), (2, 'b'), (3, 'c')").await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    only_here(gideon, "delete from stillebot.phases where id in (1, 3)").await?;

    let update = "begin; update stillebot.phases set name = 'x' where id = 1; prepare transaction 'one'";
    sikorsky.execute(DATABASE, update).await?;
    let row = wait_table(gideon, "phases").await?;
    ensure!(row["conflict_type"] == "update_missing", "{row:#}");
    prepared().await?;
    let reason = refused(gideon, &format!("stillebot_resolve({}, 'remote')", id(&row)), "55000").await?;
    ensure!(reason.contains("is prepared, and may be rolled back yet"), "{reason}");
    sikorsky.execute(DATABASE, "commit prepared 'one'").await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    resolve(gideon, &row, "remote").await?;

    // Somebody ends it here, and it is to be committed.
    sikorsky
        .execute(DATABASE, "begin; update stillebot.phases set name = 'y' where id = 2; prepare transaction 'two'")
        .await?;
    let gid = prepared().await?;
    gideon.execute(DATABASE, &format!("rollback prepared '{gid}'")).await?;
    sikorsky.execute(DATABASE, "commit prepared 'two'").await?;
    let row = wait_conflict(gideon, "the commit", |row| row["sqlstate"] == "42704").await?;
    let reason = refused(gideon, &format!("stillebot_skip({})", id(&row)), "55000").await?;
    ensure!(reason.contains("commit of a prepared transaction, which cannot be skipped"), "{reason}");
    only_here(
        gideon,
        &format!("begin; update stillebot.phases set name = 'y' where id = 2; prepare transaction '{gid}'"),
    )
    .await?;
    wait_went_on(gideon, &row).await?;

    // With a transaction goes whatever was open of it.
    only_here(gideon, "insert into stillebot.phases values (4, 'gideon')").await?;
    sikorsky
        .execute(
            DATABASE,
            "begin; update stillebot.phases set name = 'z' where id = 3; insert into stillebot.phases values (4, 'd'); commit",
        )
        .await?;
    let missing =
        wait_conflict(gideon, "the update", |row| row["status"] == "open" && row["blocking"] == false).await?;
    let row = wait_conflict(gideon, "the insert", |row| row["status"] == "open" && row["blocking"] == true).await?;
    let reason = refused(gideon, &format!("stillebot_resolve({}, 'remote')", id(&missing)), "55000").await?;
    ensure!(reason.contains("is not applied yet"), "{reason}");
    skip(gideon, &row).await?;
    let skipped =
        wait_conflict(gideon, "the end of it", |now| now["id"] == missing["id"] && now["status"] != "open").await?;
    ensure!(skipped["status"] == "skipped", "{skipped:#}");
    cluster.wait_applied("sikorsky", "gideon").await?;
    ensure!(count(gideon, "multihome.conflicts where status = 'open'").await? == 0);
    cluster.finish().await
}
