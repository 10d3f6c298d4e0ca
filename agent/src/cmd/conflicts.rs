//! `conflicts`: what replication stumbled over, both versions of it, and a way on that leaves all nodes alike.
//!
//! Deliberately leaves decisions to `resolve.rs` and the work to `resolver.rs`; here is what people see and type.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use comfy_table::{Cell, Color};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{Context, Reply, render, table, unreachable, whoami};
use crate::cli::{ConflictId, Conflicts};
use crate::config::Node;
use crate::conflict::{self, Change, Conflict};
use crate::crew::{Crew, LOOK_BOUND};
use crate::failure::{Failure, Kind};
use crate::node::{NodeError, Trouble};
use crate::resolve::{self, Course, Step, Wish};
use crate::resolver::{self, COUNTERPART_BOUND, Deed, Work};
use crate::stop::Limits;
use crate::{quote, schema, sql};

/// How long resolving or skipping may take until replication goes on and the nodes are alike.
const BOUND: Duration = Duration::from_secs(30);
/// How long the subscriptions may take to be at work again, after everything else is done.
const STREAMING_BOUND: Duration = Duration::from_secs(5);
/// How long the log may take to know all of a transaction that was skipped.
const KNOWN_BOUND: Duration = Duration::from_secs(1);
/// How much of a value is shown in a table, in characters.
const SHOWN: usize = 60;

/// Runs it.
pub async fn run(context: &Context, verb: &Conflicts) -> Result<Reply, Failure> {
    match verb {
        Conflicts::List { node, all } => list(context, node.as_deref(), *all).await,
        Conflicts::Show { id } => show(context, id).await,
        Conflicts::Resolve { id, keep, dry_run } => resolve(context, id, *keep, *dry_run).await,
        Conflicts::Skip { id, dry_run } => skip(context, id, *dry_run).await,
    }
}

// ---- finding ----

/// An older extension has no log of conflicts; its error does not say what to do.
fn with_hint(mut error: NodeError) -> NodeError {
    if error.trouble == Trouble::Refused && error.hint.is_none() {
        error.hint = Some("needs stillebot 0.3.0 there: alter extension stillebot update".into());
    }
    error
}

/// Sessions whose nodes write times and rows alike.
async fn muster<'a>(context: &'a Context, nodes: &[&Node]) -> (Crew<'a>, BTreeMap<String, NodeError>) {
    let (crew, errors) = Crew::muster(&context.config, &context.connector, nodes).await;
    let names = crew.names();
    let even = names.iter().map(async |node| crew.session(node)?.run(sql::EVEN, LOOK_BOUND).await);
    for error in join_all(even).await.into_iter().filter_map(Result::err) {
        tracing::debug!(%error, "times may be shown in the server's time zone");
    }
    (crew, errors)
}

/// The conflict that is meant. A number alone will do if one node has it open; or, with none open, if one node has it at all.
async fn find(
    context: &Context,
    crew: &Crew<'_>,
    errors: &BTreeMap<String, NodeError>,
    id: &ConflictId,
) -> Result<Conflict, Failure> {
    let names = match &id.node {
        Some(name) => {
            context.node(name)?;
            if let Some(error) = errors.get(name) {
                return Err(error.clone().into());
            }
            vec![name.clone()]
        }
        None => crew.names(),
    };
    let looks =
        join_all(names.iter().map(async |node| conflict::by_id(crew.session(node)?, &context.config, id.number).await))
            .await;
    let mut found = Vec::new();
    for look in looks {
        found.extend(look.map_err(with_hint)?);
    }
    let open: Vec<&Conflict> = found.iter().filter(|conflict| conflict.is_open()).collect();
    let meant = if open.is_empty() { found.iter().collect() } else { open };
    match meant.as_slice() {
        [one] => Ok((*one).clone()),
        [] if id.node.is_none() && !errors.is_empty() => {
            let failure = unreachable(errors).unwrap_or_else(|| Failure::new(Kind::Unreachable, "no node answers"));
            Err(failure.hint(format!("name the node: NODE/{}", id.number)))
        }
        [] => {
            let on = id.node.as_ref().map_or_else(|| "any node".into(), Clone::clone);
            Err(Failure::new(Kind::Usage, format!("there is no conflict {} on {on}", id.number))
                .hint("see `conflicts list --all`"))
        }
        several => {
            let names: Vec<String> = several.iter().map(|conflict| conflict.name()).collect();
            Err(Failure::new(Kind::Usage, format!("{} nodes have a conflict {}", names.len(), id.number))
                .hint(format!("say which: {}", names.join(" or "))))
        }
    }
}

// ---- list ----

async fn list(context: &Context, node: Option<&str>, all: bool) -> Result<Reply, Failure> {
    let nodes = match node {
        Some(name) => vec![context.node(name)?],
        None => context.nodes(),
    };
    let (crew, mut errors) = muster(context, &nodes).await;
    let names = crew.names();
    let looks =
        join_all(names.iter().map(async |node| conflict::list(crew.session(node)?, &context.config, all).await)).await;
    let mut found = Vec::new();
    for (node, look) in names.into_iter().zip(looks) {
        match look {
            Ok(conflicts) => found.extend(conflicts),
            Err(error) => drop(errors.insert(node, with_hint(error))),
        }
    }
    let kind =
        errors.values().map(|e| if e.trouble == Trouble::Refused { Kind::Undone } else { Kind::Unreachable }).next();
    let json = json!({"command": "conflicts list", "conflicts": found,
        "errors": errors.iter().map(|(node, error)| json!({"node": node, "error": error.to_string(),
            "hint": error.hint})).collect::<Vec<_>>()});

    let mut lines =
        table(&["conflict", "type", "table", "key", "status", "first seen", "last seen", "times", "blocks", "what"]);
    for conflict in &found {
        let colour = match (conflict.is_open(), conflict.blocking) {
            (true, true) => Color::Red,
            (true, false) => Color::Yellow,
            (false, _) => Color::Green,
        };
        let what = conflict.resolution.clone().or_else(|| conflict.gist());
        lines.add_row(vec![
            Cell::new(conflict.name()),
            Cell::new(&conflict.conflict_type),
            Cell::new(conflict.table()),
            Cell::new(shown(&conflict.replica_identity)),
            Cell::new(&conflict.status).fg(colour),
            Cell::new(second(conflict.first_seen.as_deref())),
            Cell::new(second(conflict.last_seen.as_deref())),
            Cell::new(conflict.occurrences),
            Cell::new(if conflict.blocking { conflict.subscription.as_str() } else { "-" }),
            Cell::new(what.as_deref().map_or_else(|| "-".into(), |text| short(text, SHOWN))),
        ]);
    }
    let mut text = if found.is_empty() && errors.is_empty() {
        if all { "no conflicts\n".to_owned() } else { "no open conflicts\n".to_owned() }
    } else if found.is_empty() {
        String::new()
    } else {
        render(&lines)
    };
    for error in errors.values() {
        let hint = error.hint.as_ref().map_or_else(String::new, |hint| format!(" ({hint})"));
        let _ = writeln!(text, "conflicts not known: {error}{hint}");
    }
    Ok(Reply { text, json, kind })
}

// ---- show ----

async fn show(context: &Context, id: &ConflictId) -> Result<Reply, Failure> {
    let (crew, errors) = muster(context, &context.nodes()).await;
    let conflict = find(context, &crew, &errors, id).await?;
    let (changes, flaw) = match conflict::changes(crew.session(&conflict.node)?, conflict.id).await {
        Ok(changes) => (changes, None),
        Err(error) if error.trouble == Trouble::Refused => (Vec::new(), Some(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    let ways = ways(&conflict);
    let mut text = facts(&conflict);
    if conflict.is_clash() || conflict.is_missing() {
        text.push('\n');
        text.push_str(&render(&versions(&conflict)));
    }
    text.push('\n');
    text.push_str(&transaction(&conflict, &changes, flaw.as_deref()));
    if !ways.is_empty() {
        text.push_str("\nwhat can be done:\n");
        for (command, effect) in &ways {
            let _ = writeln!(text, "  {command}\n      {effect}");
        }
    }
    let (ddl, flaw_of_ddl) = match ddl(context, &conflict).await {
        Ok(ddl) => (ddl, None),
        Err(failure) => (Vec::new(), Some(failure.to_string())),
    };
    // What the nodes say of themselves is exact; the remedy is what one of them could tell from what it was sent.
    let remedy =
        if ddl.is_empty() { conflict.remedy.clone().filter(|_| conflict.is_open()) } else { Some(ddl.join("\n")) };
    if let Some(remedy) = remedy {
        let _ = write!(text, "\nwhat would mend it, on {}:\n{remedy}\n", conflict.node);
    }
    if let Some(flaw) = &flaw_of_ddl {
        let _ = writeln!(text, "\nwhat would mend it is not known: {flaw}");
    }
    let ways: Vec<Value> = ways.iter().map(|(command, effect)| json!({"command": command, "effect": effect})).collect();
    let json = json!({"command": "conflicts show", "conflict": conflict, "changes": changes, "changes_error": flaw,
        "ways": ways, "ddl": ddl, "ddl_error": flaw_of_ddl});
    Ok(Reply::done(text, json))
}

/// The statements that make what its node lacks, if that is what stops it.
async fn ddl(context: &Context, conflict: &Conflict) -> Result<Vec<String>, Failure> {
    let (true, Some(namespace), Some(table)) =
        (conflict.is_open() && conflict.may_be_drift(), &conflict.schemaname, &conflict.relname)
    else {
        return Ok(Vec::new());
    };
    let table = format!("{}.{}", quote::name(namespace), quote::name(table));
    Ok(schema::mend_table(&super::schema::read(context).await?, &conflict.node, &table))
}

/// Everything about it that is not a row.
fn facts(conflict: &Conflict) -> String {
    let mut text = format!("{}: {} in {}", conflict.name(), conflict.conflict_type, conflict.table());
    let state = match (conflict.is_open(), conflict.blocking) {
        (true, true) => format!("open; subscription {} waits for it", conflict.subscription),
        (true, false) => "open; replication goes on".into(),
        (false, _) => conflict.status.clone(),
    };
    let peer = conflict.peer.as_deref().unwrap_or("?");
    let transaction = match (&conflict.remote_xid, &conflict.remote_commit_lsn) {
        (None, None) => None,
        (xid, lsn) => Some(format!(
            "{} of {peer}, committed {} at {}",
            xid.as_deref().unwrap_or("?"),
            conflict.remote_commit_ts.as_deref().unwrap_or("?"),
            lsn.as_deref().unwrap_or("?"),
        )),
    };
    let error = conflict.message.as_ref().map(|message| match &conflict.sqlstate {
        Some(sqlstate) => format!("{message} ({sqlstate})"),
        None => message.clone(),
    });
    let closed =
        conflict.resolved_at.as_ref().map(|at| format!("{at} by {}", conflict.resolved_by.as_deref().unwrap_or("?")));
    let times = match conflict.occurrences {
        1 => "once".to_owned(),
        times => format!("{times} times"),
    };
    let seen = Some(match (&conflict.first_seen, &conflict.last_seen) {
        (Some(first), Some(last)) if first != last => format!("{times}, {first} to {last}"),
        (Some(first), _) => format!("{times}, {first}"),
        _ => times,
    });
    for (label, value) in [
        ("status", Some(state)),
        ("seen", seen),
        ("key", conflict.replica_identity.is_object().then(|| conflict.replica_identity.to_string())),
        ("constraint", conflict.constraint_name.clone()),
        ("error", error),
        ("detail", conflict.detail.clone()),
        ("context", conflict.context.clone()),
        ("from", Some(format!("{peer}, by subscription {}", conflict.subscription))),
        ("transaction", transaction),
        ("note", conflict.resolution.clone().filter(|_| conflict.is_open())),
        ("resolution", conflict.resolution.clone().filter(|_| !conflict.is_open())),
        ("closed", closed),
    ] {
        if let Some(value) = value {
            let _ = write!(text, "\n  {label:<12} {}", value.replace('\n', "\n               "));
        }
    }
    text.push('\n');
    text
}

/// The incoming row beside each row in its way; columns that differ are marked.
fn versions(conflict: &Conflict) -> comfy_table::Table {
    let peer = conflict.peer.as_deref().unwrap_or("?");
    let mut titles = vec![String::new(), "column".into(), format!("incoming, of {peer}")];
    let mut rows = vec![&conflict.remote_tuple];
    let mut times = vec![conflict.remote_commit_ts.as_deref()];
    if conflict.is_missing() {
        titles.push(format!("on {}", conflict.node));
        rows.push(&Value::Null);
        times.push(None);
    }
    for local in &conflict.local_conflicts {
        let by = if local.from == conflict.node { String::new() } else { format!(", of {}", local.from) };
        titles.push(format!("on {}{by}", conflict.node));
        rows.push(&local.tuple);
        times.push(local.commit_ts.as_deref());
    }
    let mut lines = table(&titles.iter().map(String::as_str).collect::<Vec<_>>());
    let committed = std::iter::once("".to_owned()).chain(["(committed)".to_owned()]);
    let committed = committed.chain(times.iter().map(|time| time.map_or_else(|| "-".into(), str::to_owned)));
    lines.add_row(committed.collect::<Vec<_>>());
    let all: BTreeSet<&String> =
        rows.iter().filter_map(|row| row.as_object()).flat_map(serde_json::Map::keys).collect();
    let in_key = |column: &&String| conflict.replica_identity.get(column.as_str()).is_some();
    let (key, rest): (Vec<&String>, Vec<&String>) = all.into_iter().partition(in_key);
    for column in key.into_iter().chain(rest) {
        let values: Vec<Option<&Value>> = rows.iter().map(|row| row.get(column)).collect();
        let differs = values.iter().any(|value| *value != values[0]);
        let mut line = vec![Cell::new(if differs { "≠" } else { "" }), Cell::new(column)];
        line.extend(values.iter().map(|value| Cell::new(value.map_or_else(|| "-".into(), shown))));
        lines.add_row(if differs { line.into_iter().map(|cell| cell.fg(Color::Yellow)).collect() } else { line });
    }
    lines
}

fn transaction(conflict: &Conflict, changes: &[Change], flaw: Option<&str>) -> String {
    if let Some(flaw) = flaw {
        return format!("the transaction's changes are not known: {flaw}\n");
    }
    if changes.is_empty() {
        return "the transaction's changes are not known\n".into();
    }
    let mut lines = table(&["", "change", "operation", "table", "key", "row"]);
    for change in changes {
        let relation = match (&change.schemaname, &change.relname) {
            (Some(schema), Some(table)) => format!("{schema}.{table}"),
            (_, table) => table.clone().unwrap_or_else(|| "-".into()),
        };
        let line = [
            if change.failed { "→".to_owned() } else { String::new() },
            change.change_number.to_string(),
            change.operation.clone(),
            relation,
            shown(&change.key),
            shown(&change.tuple),
        ];
        let cells = line.into_iter().map(Cell::new);
        lines.add_row(cells.map(|cell| if change.failed { cell.fg(Color::Red) } else { cell }).collect::<Vec<_>>());
    }
    let kind = match conflict.transaction_kind.as_deref() {
        None | Some("plain") => String::new(),
        Some(kind) => format!(" ({kind})"),
    };
    let complete = changes.iter().all(|change| change.complete);
    let end = if complete { "that is all of it" } else { "more may follow that this node has not seen or not kept" };
    format!("the transaction{kind}, → marks the change that failed; {end}:\n{}", render(&lines))
}

/// The commands that can be given about it, each with what it comes to.
fn ways(conflict: &Conflict) -> Vec<(String, String)> {
    if !conflict.is_open() {
        return Vec::new();
    }
    let (name, node) = (conflict.name(), &conflict.node);
    let peer = conflict.peer.as_deref().unwrap_or("the other node");
    let keep = |which: &str| format!("stillebot-agent conflicts resolve {name} --keep {which}");
    let mut ways = Vec::new();
    if conflict.is_clash() {
        ways.push((keep("local"), format!("{node} keeps its row, and {peer} gets it")));
        ways.push((keep("remote"), format!("{peer} keeps its row, and {node} gets it")));
        ways.push((keep("newest"), "the version that was committed later is kept, on all nodes".into()));
    } else if conflict.is_missing() {
        ways.push((keep("local"), "the row stays away".into()));
        ways.push((keep("remote"), format!("{node} gets the row as {peer} wrote it")));
    } else if conflict.blocking {
        ways.push(("mend the cause".into(), "replication tries again by itself, and the conflict closes".into()));
    }
    if conflict.blocking {
        let effect = format!("all changes of that transaction are left out on {node}; the nodes differ from then on");
        ways.push((format!("stillebot-agent conflicts skip {name}"), effect));
    }
    ways
}

// ---- resolve ----

/// Sessions on all nodes, ready to act, and the conflict that is meant: open, and its other node there. To be resolved can also
/// be one that was answered, but not to the end: by an agent that was cut off, or by hand on one node.
async fn begin<'a>(context: &'a Context, id: &ConflictId, alone: bool) -> Result<(Crew<'a>, Conflict), Failure> {
    let (mut crew, _) = Crew::muster(&context.config, &context.connector, &[]).await;
    let errors = resolver::connect(&mut crew).await;
    let conflict = find(context, &crew, &errors, id).await?;
    if !conflict.is_open() && (alone || conflict.kept().is_none()) {
        let how = conflict.resolution.as_deref().unwrap_or("nothing more is known");
        let message = format!("{} is {} already: {how}", conflict.name(), conflict.status);
        return Err(Failure::new(Kind::Undone, message).hint("see `conflicts list` for what is open"));
    }
    match conflict.peer.as_ref().and_then(|peer| errors.get(peer)) {
        Some(error) if !alone => {
            let mut failure = Failure::from(error.clone());
            failure.message = format!("cannot reach {error}; nothing was changed");
            Err(failure)
        }
        _ => Ok((crew, conflict)),
    }
}

/// Takes the lock unless nothing is going to be changed.
async fn lock(crew: &Crew<'_>, dry_run: bool) -> Result<(), Failure> {
    if dry_run { Ok(()) } else { crew.lock().await }
}

fn deeds(deeds: &[Deed]) -> String {
    let line = |deed: &Deed| match &deed.said {
        Some(said) => format!("  {}: {} ({said})\n", deed.node, deed.what),
        None => format!("  {}: {}\n", deed.node, deed.what),
    };
    deeds.iter().map(line).collect()
}

/// What stands when it did not succeed. `again`: commands that go on with it, each while its conflict is open.
fn failed(mut failure: Failure, done: &[Deed], again: &[String]) -> Failure {
    failure.report.insert("steps".into(), json!(done));
    if done.is_empty() {
        failure.message = format!("{}; nothing was changed", failure.message);
        return failure;
    }
    failure.kind = Kind::NeedsPerson;
    let stands = format!("done so far:\n{}", deeds(done).trim_end());
    failure.detail = Some(match failure.detail {
        Some(detail) => format!("{detail}\n{stands}"),
        None => stands,
    });
    let again: Vec<String> = again.iter().map(|command| format!("`{command}`")).collect();
    let hint = match again.join(" or ") {
        none if none.is_empty() => "see `conflicts list`".to_owned(),
        commands => format!("see `conflicts list`, and go on with what is open there: {commands}"),
    };
    failure.hint = Some(match failure.hint {
        Some(earlier) => format!("{earlier}\n{hint}"),
        None => hint,
    });
    failure
}

async fn resolve(context: &Context, id: &ConflictId, wish: Wish, dry_run: bool) -> Result<Reply, Failure> {
    let (mut crew, conflict) = begin(context, id, false).await?;
    lock(&crew, dry_run).await?;
    let limits = Limits::new(BOUND, &context.signals);
    let name = conflict.name();
    let mut work = Work::new(context, &mut crew, limits, format!("stillebot-agent conflicts by {}", whoami()));

    let patience = if conflict.is_open() { COUNTERPART_BOUND } else { Duration::ZERO };
    let group = work.both_sides(&conflict, patience).await.map_err(|failure| failed(failure, &[], &[]))?;
    let course = resolve::course_of_wish(wish, &conflict, &group).map_err(|why| {
        Failure::new(Kind::Undone, format!("{name} cannot be resolved that way: {why}; nothing was changed"))
            .hint(format!("see `conflicts show {name}`"))
    })?;
    let Course::Keep(winner) = &course else {
        return Err(Failure::new(Kind::Undone, "there is no version to keep; nothing was changed"));
    };
    if let Some(kept) = conflict.kept()
        && kept != resolve::side(winner, &conflict).word()
    {
        return Err(Failure::new(Kind::Undone, format!("{name}: {kept} was kept already; nothing was changed"))
            .hint(format!("to make the nodes alike: conflicts resolve {name} --keep {kept}")));
    }
    if dry_run {
        let plan = resolve::plan(&course, &group);
        let mut would: Vec<String> = plan.iter().map(Step::to_string).collect();
        would.push(format!("make all nodes have these rows as {} has them", winner.origin));
        let text = format!("{winner} would win:\n{}", would.join("\n"));
        let json = json!({"command": "conflicts resolve", "outcome": "dry_run", "conflict": name, "keep": wish.word(),
            "winner": winner, "steps": plan, "would": would});
        return Ok(Reply::done(text, json));
    }

    // Whichever of the conflicts is left, the same version must win.
    let again = group.iter().map(|conflict| {
        format!("conflicts resolve {} --keep {}", conflict.name(), resolve::side(winner, conflict).word())
    });
    let again: Vec<String> = again.collect();
    let result = async {
        let resolved = work.follow(&course, group).await?;
        // Otherwise it can be run again, to compare them after all.
        if resolved.not_compared.is_empty() && resolved.held_up.is_empty() {
            work.settle(&resolved).await?;
        }
        let nodes = resolved.conflicts.iter().map(|(node, _)| node.clone()).chain(conflict.peer.clone()).collect();
        let idle = match resolved.held_up.as_slice() {
            [] => work.streaming(&nodes, STREAMING_BOUND).await?,
            _ => Vec::new(),
        };
        Ok((resolved, idle))
    }
    .await;
    let done = std::mem::take(&mut work.deeds);
    let (resolved, idle) = result.map_err(|failure| failed(failure, &done, &again))?;

    let mut text = format!("done:\n{}", deeds(&done));
    let alike = match (resolved.held_up.as_slice(), resolved.not_compared.as_slice()) {
        ([], []) => "all nodes have it",
        ([], _) => "the nodes that were asked have it",
        _ => "it is on its way",
    };
    let _ = write!(text, "{name} is resolved: {}; {alike}", resolved.resolution);
    let mut kind = None;
    if !resolved.not_compared.is_empty() {
        let nodes = resolved.not_compared.join(", ");
        let keys = resolve::keys(std::slice::from_ref(&conflict));
        let keys: Vec<String> = keys.iter().map(Value::to_string).collect();
        let keys = keys.join(" and ");
        let _ = write!(
            text,
            "\nnot compared: {nodes} met no conflict of these rows, and no other node could write them for it; look there at {keys} in {}",
            conflict.table()
        );
        kind = Some(Kind::NeedsPerson);
    }
    for note in &resolved.notes {
        let _ = write!(text, "\n{note}");
    }
    if let Some(next) = next(&resolved.held_up) {
        let _ = write!(text, "\n{next}");
        kind = Some(Kind::NeedsPerson);
    }
    if kind.is_some() {
        let keep = resolve::side(winner, &conflict).word();
        let _ = write!(text, "\nto compare the nodes after that: conflicts resolve {name} --keep {keep}");
    }
    for subscription in &idle {
        let _ = write!(text, "\nnot at work yet: {subscription}; see `conflicts list` and `status`");
        kind = Some(Kind::NeedsPerson);
    }
    let json = json!({"command": "conflicts resolve", "outcome": kind.map_or("done", Kind::word), "conflict": name,
        "keep": wish.word(), "winner": winner, "row": resolved.row, "resolution": resolved.resolution,
        "conflicts": resolved.conflicts.iter().map(|(node, id)| format!("{node}/{id}")).collect::<Vec<_>>(),
        "not_compared": resolved.not_compared, "held_up": resolved.held_up, "not_streaming": idle, "steps": done});
    Ok(Reply { text, json, kind })
}

/// What replication has met next, in a line.
fn next(held_up: &[String]) -> Option<String> {
    (!held_up.is_empty()).then(|| format!("replication has met {} next; see `conflicts list`", held_up.join(", ")))
}

// ---- skip ----

async fn skip(context: &Context, id: &ConflictId, dry_run: bool) -> Result<Reply, Failure> {
    let (mut crew, conflict) = begin(context, id, true).await?;
    let (name, node) = (conflict.name(), conflict.node.clone());
    if !conflict.blocking {
        return Err(Failure::new(Kind::Undone, format!("{name} stops nothing, so there is nothing to skip"))
            .hint(format!("see `conflicts show {name}`")));
    }
    // What is not known here cannot be told as lost; the log says what it knows.
    let mut changes = conflict::changes(crew.session(&node)?, conflict.id).await.unwrap_or_default();
    if dry_run {
        let lost = transaction(&conflict, &changes, None);
        let text = format!("would skip on {node}, for good: {}", lost.trim_end());
        let json = json!({"command": "conflicts skip", "outcome": "dry_run", "conflict": name, "changes": changes,
            "changes_complete": is_complete(&changes)});
        return Ok(Reply::done(text, json));
    }
    lock(&crew, dry_run).await?;
    let limits = Limits::new(BOUND, &context.signals);
    let again = [format!("conflicts skip {name}")];
    let mut work = Work::new(context, &mut crew, limits, format!("stillebot-agent conflicts by {}", whoami()));
    let result = async {
        let resolved = work.follow(&Course::Skip, vec![conflict.clone()]).await?;
        let nodes = std::iter::once(node.clone()).chain(conflict.peer.clone()).collect();
        let idle = match resolved.held_up.as_slice() {
            [] => work.streaming(&nodes, STREAMING_BOUND).await?,
            _ => Vec::new(),
        };
        Ok((resolved.held_up, idle))
    }
    .await;
    let done = std::mem::take(&mut work.deeds);
    let (held_up, idle) = result.map_err(|failure| failed(failure, &done, &again))?;
    // All of the transaction has come by now, and the log has it a moment later.
    let until = Instant::now() + KNOWN_BOUND;
    while !is_complete(&changes) && Instant::now() < until {
        sleep(Duration::from_millis(20)).await;
        match conflict::changes(crew.session(&node)?, conflict.id).await {
            Ok(now) => changes = now,
            Err(_) => break,
        }
    }
    let lost = transaction(&conflict, &changes, None);
    let mut text = format!("done:\n{}lost on {node}: {}\n", deeds(&done), lost.trim_end());
    let _ = write!(text, "{name} is skipped; the nodes differ in these rows now");
    for subscription in &idle {
        let _ = write!(text, "\nnot at work yet: {subscription}; see `conflicts list` and `status`");
    }
    if let Some(next) = next(&held_up) {
        let _ = write!(text, "\n{next}");
    }
    let kind = (!idle.is_empty() || !held_up.is_empty()).then_some(Kind::NeedsPerson);
    let json = json!({"command": "conflicts skip", "outcome": kind.map_or("done", Kind::word), "conflict": name,
        "changes": changes, "changes_complete": is_complete(&changes), "held_up": held_up, "not_streaming": idle,
        "steps": done});
    Ok(Reply { text, json, kind })
}

fn is_complete(changes: &[Change]) -> bool {
    !changes.is_empty() && changes.iter().all(|change| change.complete)
}

// ---- words ----

/// A value as a table shows it.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => "null".into(),
        value => value.to_string(),
    };
    short(&text, SHOWN)
}

/// The first line of a text, cut to so many characters.
fn short(text: &str, length: usize) -> String {
    let line = text.lines().next().unwrap_or_default();
    let cut: String = line.chars().take(length).collect();
    if cut.len() < text.len() { format!("{cut}…") } else { cut }
}

/// A time without what is smaller than a second.
fn second(time: Option<&str>) -> String {
    time.map_or_else(|| "-".into(), |time| time.get(..19).unwrap_or(time).replace('T', " "))
}
