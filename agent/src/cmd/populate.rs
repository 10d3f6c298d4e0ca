//! `schema populate`: copies a table that was created with rows in it to the nodes where it is empty.
//!
//! Deliberately copies nothing itself: it has the subscription on the other node make its own initial copy of that one table
//! once more, which PostgreSQL fits between what was replicated before and after, and whose rows do not travel on.

use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{Context, Reply, refresh, schema as diff, unreachable};
use crate::crew::{Crew, LOOK_BOUND};
use crate::failure::{Failure, Kind};
use crate::node::NodeError;
use crate::{schema, sql};

/// The table's lock is waited for, and the end of a worker.
const START_BOUND: Duration = Duration::from_secs(30);
/// How long counting the rows of a table may take.
const COUNT_BOUND: Duration = Duration::from_secs(60);
/// Between two looks at the copy.
const PAUSE: Duration = Duration::from_millis(100);

/// What is wished.
pub struct Wish<'a> {
    /// The table, with its schema.
    pub table: &'a str,
    /// The node that has the rows.
    pub from: &'a str,
    /// How long it may take.
    pub timeout: Duration,
}

/// Runs it.
pub async fn run(context: &Context, wish: &Wish<'_>, dry_run: bool) -> Result<Reply, Failure> {
    let Wish { table, from, timeout } = *wish;
    let source = context.node(from)?;
    let (mut crew, errors) = Crew::muster(&context.config, &context.connector, &context.nodes()).await;
    if let Some(failure) = unreachable(&errors) {
        return Err(failure);
    }
    crew.lock().await?;
    let targets: Vec<String> = crew.names().into_iter().filter(|name| *name != source.name).collect();
    alike(context, table).await?;
    let rows = count(&crew, from, table).await?;
    for target in &targets {
        let there = count(&crew, target, table).await?;
        if there > 0 {
            return Err(Failure::new(
                Kind::Undone,
                format!("table {table} has {there} rows on {target} and {rows} on {from}; nothing was changed"),
            )
            .hint(
                "only an empty table is populated, and rows that are deleted on one node are deleted on all: copy what is \
                 missing by hand",
            ));
        }
    }
    let json = |outcome: &str| json!({"command": "schema populate", "outcome": outcome, "table": table, "from": from, "nodes": targets, "rows": rows});
    let names = targets.join(", ");
    if dry_run {
        return Ok(Reply::done(format!("would copy {rows} rows of {table} from {from} to {names}"), json("dry_run")));
    }
    if rows == 0 {
        return Ok(Reply::done(format!("table {table} is empty on all nodes: nothing to copy"), json("done")));
    }
    let until = Instant::now() + timeout;
    let subscription = context.config.subscription_to(from);
    for target in &targets {
        let session = crew.session(target)?;
        session.run("set default_transaction_read_only = off", LOOK_BOUND).await?;
        session.rows(sql::COPY_TABLE, &[&table, &subscription], START_BOUND).await?;
        session.rows(sql::RESTART_APPLY, &[&subscription], LOOK_BOUND).await?;
    }
    // The other directions have nothing to copy.
    for node in crew.names() {
        refresh::node_of(&mut crew, &node).await?;
    }
    for target in &targets {
        while !is_ready(&crew, context, target, table, &subscription).await? {
            let signal = context.signals.received();
            if signal.is_none() && Instant::now() < until {
                sleep(PAUSE).await;
                continue;
            }
            let why = match signal {
                Some(signal) => format!("stopped by {signal}"),
                None => format!("not done within {}", humantime::format_duration(timeout)),
            };
            let rows = crew.session(target)?.rows(sql::SETUP_TROUBLE, &[&subscription], LOOK_BOUND).await?;
            let mut failure = Failure::new(Kind::NeedsPerson, format!("the copy of {table} to {target}: {why}"))
                .hint("it goes on by itself; watch it with status, and what stops it with conflicts list");
            failure.detail = rows.first().map(|row| row.get(0));
            return Err(failure);
        }
    }
    Ok(Reply::done(format!("copied {rows} rows of {table} from {from} to {names}"), json("done")))
}

/// Refuses a table that is not the same everywhere.
async fn alike(context: &Context, table: &str) -> Result<(), Failure> {
    let nodes = diff::read(context).await?;
    let is_table = |object: &schema::Object| object.kind == "table" && object.name == table;
    if !nodes.iter().any(|(_, schema)| schema.keys().any(is_table)) {
        return Err(Failure::new(Kind::Usage, format!("there is no table {table}"))
            .hint("name it with its schema, and quoted where SQL wants it"));
    }
    let concerns = |object: &schema::Object| is_table(object) || object.relation == table;
    let differences = schema::compare(&nodes);
    let differences: Vec<String> =
        differences.iter().filter(|found| concerns(&found.object)).map(ToString::to_string).collect();
    if differences.is_empty() {
        return Ok(());
    }
    Err(Failure::new(Kind::Undone, format!("table {table} is not alike on all nodes; nothing was changed"))
        .detail(differences.join("\n"))
        .hint("make it alike first; schema diff --ddl has the statements"))
}

async fn count(crew: &Crew<'_>, node: &str, table: &str) -> Result<i64, NodeError> {
    let row = crew.session(node)?.row(sql::COUNT_ROWS, &[&table, &i64::MAX], COUNT_BOUND).await?;
    Ok(row.get("counted"))
}

/// Whether a table has been copied by a subscription of a node, and replicates.
async fn is_ready(
    crew: &Crew<'_>,
    context: &Context,
    node: &str,
    table: &str,
    subscription: &str,
) -> Result<bool, NodeError> {
    let rows = crew.session(node)?.rows(sql::TABLES, &[&context.config.publication], LOOK_BOUND).await?;
    Ok(rows.iter().any(|row| {
        row.get::<_, String>("name") == table
            && row.get::<_, Vec<String>>("ready").iter().any(|known| known == subscription)
    }))
}
