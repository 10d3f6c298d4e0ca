//! `schema populate`: copies a table that was created with rows in it to the nodes where it is empty.
//!
//! Deliberately copies nothing itself: it has the subscription on the other node make its own initial copy of that one table
//! once more, which PostgreSQL fits between what was replicated before and after, and whose rows do not travel on.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;

use super::{Context, Reply, refresh, schema as diff, unreachable};
use crate::crew::{Crew, LOOK_BOUND};
use crate::failure::{Failure, Kind};
use crate::node::{NodeError, Trouble};
use crate::{facts, schema, sql};

/// The table's lock is waited for, and the end of a worker.
const START_BOUND: Duration = Duration::from_secs(30);
/// So many rows are counted at most: it is for people, and to see whether there are any.
const COUNTED: i64 = 100_000;
/// How long that may take.
const COUNT_BOUND: Duration = Duration::from_secs(20);
/// How long the other nodes may take to apply what a node had written before it was taken down.
const DRAIN_BOUND: Duration = Duration::from_secs(30);
/// Between two looks at the copy.
const PAUSE: Duration = Duration::from_millis(100);

/// What is wished.
pub struct Wish<'a> {
    /// The table, with its schema.
    pub table: &'a str,
    /// The node that has the rows.
    pub from: &'a str,
    /// Rows on the other nodes give way.
    pub replace: bool,
    /// How long it may take.
    pub timeout: Duration,
}

/// What is done about the table on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    /// It is empty there: copied.
    Copy,
    /// Its rows give way to the copy.
    Replace,
    /// A copy is under way, of an earlier run: waited for.
    Wait,
    /// It has rows: left as it is.
    Keep,
}

fn course(rows: i64, copying: bool, replace: bool) -> Course {
    match (copying, rows > 0, replace) {
        (true, ..) => Course::Wait,
        (_, true, true) => Course::Replace,
        (_, true, false) => Course::Keep,
        (_, false, _) => Course::Copy,
    }
}

/// As many as were counted.
fn shown(rows: i64) -> String {
    if rows < COUNTED { rows.to_string() } else { format!("{rows} or more") }
}

/// Runs it.
pub async fn run(context: &Context, wish: &Wish<'_>, dry_run: bool) -> Result<Reply, Failure> {
    let Wish { table, from, replace, timeout } = *wish;
    let source = context.node(from)?;
    let (mut crew, errors) = Crew::muster(&context.config, &context.connector, &context.nodes()).await;
    if let Some(failure) = unreachable(&errors) {
        return Err(failure);
    }
    crew.lock().await?;
    let until = Instant::now() + timeout;
    let subscription = context.config.subscription_to(from);
    alike(context, table).await?;
    let rows = count(&crew, from, table).await?;
    let mut courses = Vec::new();
    for target in crew.names().into_iter().filter(|name| *name != source.name) {
        let there = count(&crew, &target, table).await?;
        let copying = standing(&crew, context, &target, table, &subscription).await? == Standing::Copying;
        courses.push((target, there, course(there, copying, replace)));
    }
    let of = |wanted: &[Course]| -> Vec<String> {
        let these = courses.iter().filter(|(_, _, course)| wanted.contains(course));
        these.map(|(target, ..)| target.clone()).collect()
    };
    let targets = of(&[Course::Copy, Course::Replace, Course::Wait]);
    if rows == 0 && courses.iter().all(|(_, there, _)| *there == 0) && of(&[Course::Wait]).is_empty() {
        let json = json(wish, "done", &targets, rows);
        return Ok(Reply::done(format!("table {table} is empty on all nodes: nothing to copy"), json));
    }
    // As after a run that was killed, whose copies came to their end by themselves.
    if courses.iter().all(|(_, there, course)| *there == rows && *course == Course::Keep) {
        let text =
            format!("table {table} has {} rows on every node: nothing to copy; they are not compared", shown(rows));
        return Ok(Reply::done(text, json(wish, "done", &targets, rows)));
    }
    let filled = courses.iter().find(|(_, there, _)| *there > 0);
    if let (Some((target, there, _)), true) = (filled, targets.is_empty() || rows == 0) {
        return Err(Failure::new(
            Kind::Undone,
            format!(
                "table {table} has {} rows on {target} and {} on {from}; nothing was changed",
                shown(*there),
                shown(rows)
            ),
        )
        .hint(
            "only an empty table is populated, and rows that are deleted on one node are deleted on all: copy what is \
             missing by hand, or take the other nodes down and have their rows give way with --replace",
        ));
    }
    let replaced = of(&[Course::Replace]);
    for target in &replaced {
        if facts::state(crew.session(target)?, LOOK_BOUND).await?.is_up() {
            return Err(Failure::new(
                Kind::Undone,
                format!("{target} takes writes, and its rows of {table} are to give way; nothing was changed"),
            )
            .hint(format!("stillebot-agent down {target}, and then again")));
        }
    }
    let mut text = String::new();
    for (target, there, _) in courses.iter().filter(|(.., course)| *course == Course::Keep) {
        let _ = writeln!(text, "{target} has {} rows already, and is left as it is", shown(*there));
    }
    for (target, there, _) in courses.iter().filter(|(.., course)| *course == Course::Replace) {
        let _ = writeln!(text, "{target}: {} rows give way", shown(*there));
    }
    let done = format!("{} rows of {table} from {from} to {}", shown(rows), targets.join(", "));
    if dry_run {
        return Ok(Reply::done(format!("{text}would copy {done}"), json(wish, "dry_run", &targets, rows)));
    }
    // The source first: what the others write from now on, it gets. They copy before they are refreshed, or rows might be there before the copy.
    refresh::node_of(&mut crew, from).await?;
    for target in &replaced {
        drain(context, &crew, target, until).await?;
    }
    for (target, _, course) in &courses {
        if matches!(course, Course::Copy | Course::Replace) {
            begin(&crew, target, table, &subscription, *course == Course::Replace).await?;
        }
    }
    // The other directions have nothing to copy.
    for target in courses.iter().map(|(target, ..)| target) {
        refresh::node_of(&mut crew, target).await?;
    }
    for target in &targets {
        while standing(&crew, context, target, table, &subscription).await? != Standing::Ready {
            let Some(why) = halt(context, until, timeout) else {
                sleep(PAUSE).await;
                continue;
            };
            let rows = crew.session(target)?.rows(sql::SETUP_TROUBLE, &[&subscription], LOOK_BOUND).await?;
            let mut failure = Failure::new(Kind::NeedsPerson, format!("the copy of {table} to {target}: {why}"))
                .hint("it goes on by itself; watch it with status, and what stops it with conflicts list");
            failure.detail = rows.first().map(|row| row.get(0));
            return Err(failure);
        }
    }
    Ok(Reply::done(format!("{text}copied {done}"), json(wish, "done", &targets, rows)))
}

fn json(wish: &Wish<'_>, outcome: &str, targets: &[String], rows: i64) -> serde_json::Value {
    json!({"command": "schema populate", "outcome": outcome, "table": wish.table, "from": wish.from, "nodes": targets,
        "rows": rows, "replace": wish.replace})
}

/// Why not to wait any longer.
fn halt(context: &Context, until: Instant, timeout: Duration) -> Option<String> {
    match context.signals.received() {
        Some(signal) => Some(format!("stopped by {signal}")),
        None if Instant::now() < until => None,
        None => Some(format!("not done within {}", humantime::format_duration(timeout))),
    }
}

/// Waits until what a node that is down has written is applied everywhere: what came later would be in the way of a copy, or missing in it.
async fn drain(context: &Context, crew: &Crew<'_>, from: &str, until: Instant) -> Result<(), Failure> {
    let position: PgLsn = crew.session(from)?.row(sql::POSITION, &[], LOOK_BOUND).await?.get("lsn");
    let subscription = context.config.subscription_to(from);
    let until = until.min(Instant::now() + DRAIN_BOUND);
    for to in crew.names().into_iter().filter(|name| name != from) {
        while !crew.has_applied(&to, &subscription, position).await? {
            if let Some(why) = halt(context, until, DRAIN_BOUND) {
                let message = format!("{to} has not applied all that {from} had written: {why}; nothing was changed");
                return Err(Failure::new(Kind::Undone, message).hint("see status and conflicts list"));
            }
            sleep(PAUSE).await;
        }
    }
    Ok(())
}

/// Has one node begin to copy a table.
pub async fn begin(
    crew: &Crew<'_>,
    node: &str,
    table: &str,
    subscription: &str,
    replace: bool,
) -> Result<(), NodeError> {
    let session = crew.session(node)?;
    // The state of a down database must not refuse the agent's own session.
    session.run("set default_transaction_read_only = off", LOOK_BOUND).await?;
    session.rows(sql::COPY_TABLE, &[&table, &subscription, &replace], START_BOUND).await.map_err(|error| {
        // The functions of this project say what to do; what they are called by does not.
        let hint = (error.trouble == Trouble::Refused).then(|| {
            "needs stillebot 0.6.0 there: alter extension stillebot update, and grant the agent's role what `check` says"
                .to_owned()
        });
        NodeError { hint: error.hint.clone().or(hint), ..error }
    })?;
    session.rows(sql::RESTART_APPLY, &[&subscription], LOOK_BOUND).await?;
    Ok(())
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
    let row = crew.session(node)?.row(sql::COUNT_ROWS, &[&table, &COUNTED], COUNT_BOUND).await?;
    Ok(row.get("counted"))
}

/// How a table stands with a subscription.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    Unknown,
    Copying,
    Ready,
}

async fn standing(
    crew: &Crew<'_>,
    context: &Context,
    node: &str,
    table: &str,
    subscription: &str,
) -> Result<Standing, NodeError> {
    let rows = crew.session(node)?.rows(sql::TABLES, &[&context.config.publication], LOOK_BOUND).await?;
    let Some(row) = rows.iter().find(|row| row.get::<_, String>("name") == table) else {
        return Ok(Standing::Unknown);
    };
    let has = |list: &str| row.get::<_, Vec<String>>(list).iter().any(|known| known == subscription);
    Ok(match (has("subscriptions"), has("ready")) {
        (_, true) => Standing::Ready,
        (true, false) => Standing::Copying,
        (false, false) => Standing::Unknown,
    })
}

/// Has one node begin to copy a table that is new to the subscription; nothing if it is not.
pub async fn join(
    crew: &Crew<'_>,
    context: &Context,
    node: &str,
    table: &str,
    subscription: &str,
) -> Result<(), NodeError> {
    match standing(crew, context, node, table, subscription).await? {
        Standing::Unknown => begin(crew, node, table, subscription, false).await,
        Standing::Copying | Standing::Ready => Ok(()),
    }
}

/// Whether these tables have been copied by a subscription of a node, and replicate.
pub async fn are_ready(
    crew: &Crew<'_>,
    context: &Context,
    node: &str,
    tables: &BTreeSet<String>,
    subscription: &str,
) -> Result<bool, NodeError> {
    for table in tables {
        if standing(crew, context, node, table, subscription).await? != Standing::Ready {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_give_way_only_if_that_is_wished_and_a_copy_under_way_goes_on() {
        assert_eq!(course(0, false, false), Course::Copy);
        assert_eq!(course(0, false, true), Course::Copy);
        assert_eq!(course(1, false, false), Course::Keep);
        assert_eq!(course(1, false, true), Course::Replace);
        for replace in [false, true] {
            assert_eq!(course(0, true, replace), Course::Wait);
        }
        assert_eq!((shown(7), shown(COUNTED)), ("7".to_owned(), "100000 or more".to_owned()));
    }
}
