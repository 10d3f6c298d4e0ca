//! Does on the nodes what `resolve.rs` decides: for `conflicts resolve` and, by the rules of the configuration, for `watch`.
//!
//! Deliberately prints nothing and decides nothing about data. Everything it does may be interrupted anywhere and done
//! again: open conflicts say what is left to do, and a step that has been taken already changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::{join, join_all};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;

use crate::cmd::{Context, hostname};
use crate::config::{Rule, Strategy};
use crate::conflict::{self, Conflict};
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts;
use crate::failure::{Failure, Kind};
use crate::node::{NodeError, Session, Trouble};
use crate::resolve::{self, Attempts, Course, Handles, Leftover, Row, Rows, Sight, Step, Todo, Version, Wish};
use crate::sql;
use crate::stop::{Halt, Limits};

/// How long a rule may take; what it waits for takes milliseconds.
const RULE_BOUND: Duration = Duration::from_secs(5);
/// How long one step may take: it may wait for a lock on a row.
const STEP_BOUND: Duration = Duration::from_secs(5);
/// How often is looked whether replication has gone on.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the other side of a quarrel may take to come up.
pub const COUNTERPART_BOUND: Duration = Duration::from_millis(600);
/// How long a node may take to say that it lacks a row that was rewritten elsewhere: its log is written after the fact.
const GRACE: Duration = Duration::from_millis(500);
/// How long a conflict may look open to the log after replication has got past it.
const HINDSIGHT: Duration = Duration::from_secs(1);
/// Replication that moved so lately is at work.
const MOVES: Duration = Duration::from_secs(2);
/// How often the nodes are made alike, should they drift apart again.
const ROUNDS: usize = 3;
/// How often one conflict is answered; more, and the answers do not help.
const ANSWERS: usize = 5;

/// Something that was done on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Deed {
    /// The node.
    pub node: String,
    /// What was done, in the words of the step.
    pub what: String,
    /// What the node said about it.
    pub said: Option<String>,
}

/// What a resolution came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The row that won, as it is on all nodes now; null if that is no row, and for a skipped transaction.
    pub row: Value,
    /// In one line, for the log.
    pub resolution: String,
    /// The conflicts that it closed.
    pub conflicts: Vec<(String, i64)>,
    /// Nodes whose rows could not be compared.
    pub not_compared: Vec<String>,
    /// Conflicts that replication has met next: what is written comes to those nodes after they are resolved.
    pub held_up: Vec<String>,
    /// What else should be known.
    pub notes: Vec<String>,
}

/// How an attempt to resolve a conflict by the rules ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It is resolved; this is in the log.
    Resolved(String),
    /// There is nothing to do: it was closed before.
    Closed,
    /// It is for a person.
    Left(String),
    /// Not now, and no attempt is counted: a node cannot be reached, or another agent is at work.
    Later(String),
    /// The rule failed, and will be tried again.
    Failed {
        /// The number of this attempt, from 1.
        attempt: u32,
        /// Why.
        why: String,
    },
    /// The rule failed too often; it is noted in the log and left open.
    GivenUp(String),
}

/// The end of an attempt, and what was done on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The table; empty if it could not be learned.
    pub table: String,
    /// How it ended.
    pub end: End,
    /// What was done, in order.
    pub deeds: Vec<Deed>,
    /// What else should be known of a resolution.
    pub notes: Vec<String>,
}

impl Outcome {
    fn at_once(table: String, end: End) -> Self {
        Self { table, end, deeds: Vec::new(), notes: Vec::new() }
    }
}

/// Connects to the nodes that have no sound session, all at once, and makes new sessions fit for resolving; returns the nodes
/// that cannot be reached. Takes no lock.
pub async fn connect(crew: &mut Crew<'_>) -> BTreeMap<String, NodeError> {
    let before: BTreeSet<(i32, i64)> = backends(crew).into_keys().collect();
    let errors = crew.refill().await;
    let new = backends(crew).into_iter().filter(|(backend, _)| !before.contains(backend)).map(|(_, node)| node);
    make_ready(crew, new.collect()).await;
    errors
}

fn backends(crew: &Crew<'_>) -> BTreeMap<(i32, i64), String> {
    let sessions = crew.names();
    sessions.into_iter().filter_map(|node| Some((crew.session(&node).ok()?.backend, node))).collect()
}

/// Makes sessions even with each other, and every query known to the servers, so that the first conflict costs no more than
/// the next one.
async fn make_ready(crew: &Crew<'_>, nodes: Vec<String>) {
    let queries = [
        sql::CONFLICT,
        sql::CONFLICTS_BLOCKING,
        sql::CONFLICTS_OPEN,
        sql::CONFLICTS_RELATED,
        sql::MAKE_ROOM,
        sql::RESOLVE,
        sql::VERSIONS,
        sql::ASSIGN,
        sql::FLUSHED,
        sql::APPLIED,
        sql::SETTLE,
        sql::NOTIFY,
        sql::WRITABLE,
    ];
    let sessions = nodes.iter().filter_map(|node| crew.session(node).ok());
    join_all(sessions.map(async |session| {
        let even = session.run(sql::EVEN, LOOK_BOUND);
        let known = join_all(queries.iter().map(|query| session.prepare(query, LOOK_BOUND)));
        let (even, known) = join(even, known).await;
        for error in even.err().into_iter().chain(known.into_iter().filter_map(Result::err)) {
            // Whoever needs it meets the same error, and tells it.
            tracing::debug!(%error, "not ready");
        }
    }))
    .await;
}

/// Which nodes are writable and which is the active side; a node that does not answer is left out.
pub async fn sights(context: &Context, crew: &Crew<'_>) -> Vec<Sight> {
    let names = crew.names();
    let looks = join_all(names.iter().map(async |node| {
        let session = crew.session(node)?;
        let (row, active) =
            join(session.row(sql::WRITABLE, &[], LOOK_BOUND), facts::active(session, &context.config, LOOK_BOUND))
                .await;
        let up: Option<bool> = row?.get("up");
        // A role that may not read it sees no active side, and then there is none to resolve.
        Ok::<_, NodeError>(Sight { node: node.clone(), up: up == Some(true), active: active.unwrap_or_default() })
    }))
    .await;
    looks.into_iter().flatten().collect()
}

/// The conflict that a rule is to be tried for next, of those of all connected nodes. Asked anew after each: one that holds up
/// replication waits behind none that does not.
pub async fn next(crew: &Crew<'_>, attempts: &mut Attempts, now: Duration) -> Option<Todo> {
    let names = crew.names();
    let looks = join_all(names.iter().map(async |node| {
        let known = attempts.known(node);
        crew.session(node)?.rows(sql::CONFLICTS_OPEN, &[&known], LOOK_BOUND).await
    }))
    .await;
    let mut todo = Vec::new();
    for (node, rows) in names.into_iter().zip(looks) {
        match rows {
            Ok(rows) => {
                attempts.retain(&node, &rows.iter().map(|row| row.get(0)).collect());
                todo.extend(rows.iter().map(|row| Todo { node: node.clone(), id: row.get(0), blocking: row.get(1) }));
            }
            Err(error) => tracing::debug!(%error, "open conflicts not known"),
        }
    }
    attempts.next(todo, now)
}

/// Resolves a conflict by the first rule for its table. To be called by the watcher of the active side only
/// ([`resolve::active_side`]). Takes the lock of all nodes and gives it back.
pub async fn resolve_by_rules(
    context: &Context,
    crew: &mut Crew<'_>,
    attempts: &mut Attempts,
    node: &str,
    id: i64,
) -> Outcome {
    let errors = connect(crew).await;
    let conflict = match crew.session(node) {
        Ok(session) => conflict::by_id(session, &context.config, id).await,
        Err(error) => Err(errors.get(node).cloned().unwrap_or(error)),
    };
    let conflict = match conflict {
        Ok(Some(conflict)) if conflict.is_open() || conflict.is_cut_off(&context.config.user) => conflict,
        Ok(_) => {
            attempts.forget(node, id);
            return Outcome::at_once(String::new(), End::Closed);
        }
        Err(error) => {
            if error.trouble == Trouble::Lost {
                crew.give_up(node);
            }
            return Outcome::at_once(String::new(), End::Later(error.to_string()));
        }
    };
    let table = conflict.table();
    let left = |why: &str| Leftover { table: conflict.table(), why: why.to_owned() };
    let rule = match resolve::rule_for(&context.config.rules, &conflict) {
        None => Err(format!("there is no rule for {}", conflict.table())),
        Some(Rule { strategy: Strategy::Leave, .. }) => {
            Err(format!("the rule for {} leaves it to a person", conflict.table()))
        }
        Some(rule) => Ok(rule),
    };
    let rule = match rule {
        Ok(rule) => rule,
        Err(why) => {
            attempts.leave(node, id, left(&why));
            return Outcome::at_once(table, End::Left(why));
        }
    };
    // With one side alone the other would stay as it is, and find its own end later.
    if let Some(error) = conflict.peer.as_ref().and_then(|peer| errors.get(peer)) {
        return Outcome::at_once(table, End::Later(format!("cannot reach {error}")));
    }
    if let Err(failure) = crew.lock().await {
        crew.unlock().await;
        return Outcome::at_once(table, End::Later(failure.message));
    }

    let attempt = attempts.begin(node, id);
    let limits = Limits::new(RULE_BOUND, &context.signals);
    let mut work =
        Work::new(context, crew, limits, format!("stillebot-agent watch on {}", hostname().as_deref().unwrap_or("?")));
    let result = work.by_rule(rule, &conflict).await;
    let deeds = std::mem::take(&mut work.deeds);
    let mut notes = Vec::new();
    let end = match result {
        Ok(resolved) => {
            for (node, id) in &resolved.conflicts {
                attempts.forget(node, *id);
            }
            notes = resolved.notes;
            if !resolved.not_compared.is_empty() {
                notes.push(format!(
                    "not compared: {}, which met no conflict of these rows",
                    resolved.not_compared.join(", ")
                ));
            }
            if !resolved.held_up.is_empty() {
                notes.push(format!("replication has met {} next", resolved.held_up.join(", ")));
            }
            End::Resolved(resolved.resolution)
        }
        Err(ByRule::Unfit(why)) => {
            let why = format!("rule {} does not fit: {why}", rule.strategy.name());
            attempts.leave(node, id, left(&why));
            work.note(node, id, &why).await;
            End::Left(why)
        }
        Err(ByRule::Closed) => {
            attempts.forget(node, id);
            End::Closed
        }
        Err(ByRule::NotNow(why)) => {
            attempts.take_back(node, id);
            End::Later(why)
        }
        Err(ByRule::Failed(failure)) if failure.kind == Kind::Unreachable => {
            attempts.take_back(node, id);
            End::Later(failure.message)
        }
        // What comes in takes its time, and the rule has nothing to do with that.
        Err(ByRule::Failed(failure)) if work.limits.remaining().is_zero() && work.moves() => {
            attempts.take_back(node, id);
            End::Later(format!("{}, which goes on", failure.message))
        }
        Err(ByRule::Failed(failure)) => {
            let why = [Some(failure.message), failure.detail].into_iter().flatten().collect::<Vec<_>>().join("; ");
            if attempt >= context.config.watch.attempts {
                let times = if attempt == 1 { "once".into() } else { format!("{attempt} times") };
                let why = format!("rule {} failed {times}: {why}", rule.strategy.name());
                attempts.leave(node, id, left(&why));
                work.note(node, id, &why).await;
                End::GivenUp(why)
            } else {
                End::Failed { attempt, why }
            }
        }
    };
    crew.unlock().await;
    Outcome { table, end, deeds, notes }
}

enum ByRule {
    /// The rule is not for such a conflict: trying again is of no use.
    Unfit(String),
    /// Somebody else was faster.
    Closed,
    /// Something is missing that may come.
    NotNow(String),
    Failed(Failure),
}

impl From<Failure> for ByRule {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// What a node returned for a step.
#[derive(Debug, Default)]
struct Answer {
    said: Option<String>,
    rows: Vec<Value>,
    /// There was nothing left to do.
    idle: bool,
}

/// How often a conflict was answered, how often it had come up then, and what its node refused, and when.
type Answered = (usize, i64, Option<(NodeError, Instant)>);

/// What one node has yet to apply of another.
struct Way {
    from: String,
    to: String,
    subscription: String,
    position: PgLsn,
    /// Another conflict is in the way.
    held_up: bool,
}

/// One resolution under way. The sessions hold the lock of their nodes.
pub struct Work<'r, 'c> {
    context: &'r Context,
    crew: &'r mut Crew<'c>,
    limits: Limits,
    by_whom: String,
    /// How far each node has received what another one wrote, and when any of that last moved.
    received: BTreeMap<(String, String), PgLsn>,
    moved: Option<Instant>,
    /// What was done so far; to be told also if it does not succeed.
    pub deeds: Vec<Deed>,
}

impl<'r, 'c> Work<'r, 'c> {
    /// Nothing is done yet. `by_whom` goes into the log.
    pub fn new(context: &'r Context, crew: &'r mut Crew<'c>, limits: Limits, by_whom: String) -> Self {
        Self { context, crew, limits, by_whom, received: BTreeMap::new(), moved: None, deeds: Vec::new() }
    }

    async fn by_rule(&mut self, rule: &Rule, conflict: &Conflict) -> Result<Resolved, ByRule> {
        let role = &self.context.config.user;
        // Where a version is chosen before anything is done, both sides must be seen; a crown is given afterwards.
        let patience = match rule.strategy {
            Strategy::Newest { .. } | Strategy::KeepNode(_) if conflict.is_open() => COUNTERPART_BOUND,
            _ => Duration::ZERO,
        };
        let mut group = self.both_sides(conflict, patience).await?;
        let fresh = group.iter().find(|other| (&other.node, other.id) == (&conflict.node, conflict.id));
        let fresh = fresh.filter(|conflict| conflict.is_open() || conflict.is_cut_off(role));
        let conflict = &fresh.cloned().ok_or(ByRule::Closed)?;
        // What was answered is followed through as it was answered, by whatever agent.
        let course = match conflict.kept() {
            None => resolve::course_of_rule(&rule.strategy, conflict, &group),
            Some("local") => resolve::course_of_wish(Wish::Local, conflict, &group),
            Some(_) => resolve::course_of_wish(Wish::Remote, conflict, &group),
        };
        let course = course.map_err(ByRule::Unfit)?;
        if course == Course::Skip {
            group = vec![conflict.clone()];
        }
        if matches!(course, Course::Deactivate { .. }) {
            // No row must lose its flag while there is no node to give it to another.
            let sights = self.sights().await?;
            let candidates = group.iter().map(|conflict| conflict.node.as_str()).collect();
            if resolve::hand(&self.context.config, &sights, &candidates).is_none() {
                return Err(ByRule::NotNow("none of the nodes that met this conflict is writable".into()));
            }
        }
        let mut resolved = self.follow(&course, group).await?;
        resolved.resolution = format!("rule {}: {}", rule.strategy.name(), resolved.resolution);
        self.settle(&resolved).await?;
        if let Some(notify) = &rule.notify {
            // The data are right by now; that nobody could be told does not make them wrong.
            if let Err(why) = self.tell(notify, &resolved.row).await {
                resolved.notes.push(format!("channel {:?} was not notified: {why}", notify.channel));
            }
        }
        Ok(resolved)
    }

    /// Brings about what was decided for all of the conflicts, up to where all nodes have the same rows.
    pub async fn follow(&mut self, course: &Course, group: Vec<Conflict>) -> Result<Resolved, Failure> {
        let mut group = self.settle_down(course, group).await?;
        let mut resolved = match course {
            Course::Keep(winner) => self.make_alike(course, winner, &mut group).await?,
            Course::Deactivate { flag, by } => self.crown(course, flag, by, &mut group).await?,
            Course::Skip => Resolved {
                row: Value::Null,
                resolution: "transaction skipped".into(),
                conflicts: Vec::new(),
                not_compared: Vec::new(),
                held_up: self.get_past(&group).await?,
                notes: Vec::new(),
            },
        };
        resolved.conflicts = group.into_iter().map(|conflict| (conflict.node, conflict.id)).collect();
        Ok(resolved)
    }

    /// Writes what was done into the log of all nodes concerned.
    pub async fn settle(&mut self, resolved: &Resolved) -> Result<(), Failure> {
        let steps = resolved.conflicts.iter().map(|(node, id)| Step::Settle {
            node: node.clone(),
            id: *id,
            resolution: resolved.resolution.clone(),
        });
        self.perform_all(&steps.collect::<Vec<_>>()).await
    }

    async fn tell(&mut self, notify: &crate::config::Notify, row: &Value) -> Result<(), String> {
        let payload = notify.payload.fill(row)?;
        let step = |node| Step::Notify { node, channel: notify.channel.clone(), payload: payload.clone() };
        let steps: Vec<Step> = self.crew.names().into_iter().map(step).collect();
        self.perform_all(&steps).await.map_err(|failure| failure.message)
    }

    /// Tells in the log what a person should know; the conflict stays open.
    async fn note(&mut self, node: &str, id: i64, text: &str) {
        if let Err(error) = self.crew.ask(node, sql::NOTE, &[&id, &text], LOOK_BOUND).await {
            tracing::warn!(%error, id, "not noted in the log: {text}");
        }
    }

    // ---- looking ----

    fn halted(&self, halt: Halt, waiting_for: &str) -> Failure {
        Failure::new(Kind::Undone, format!("{halt} while waiting for {waiting_for}"))
    }

    fn troubled(&mut self, error: NodeError) -> Failure {
        if error.trouble == Trouble::Lost {
            self.crew.give_up(&error.node);
        }
        error.into()
    }

    /// These conflicts with all others that are open now and belong to them, from all connected nodes.
    async fn gather(&mut self, known: &[Conflict]) -> Result<Vec<Conflict>, Failure> {
        let Some(first) = known.iter().find(|conflict| conflict.is_clash()) else { return Ok(known.to_vec()) };
        let mut group = known.to_vec();
        loop {
            let keys = resolve::keys(&group);
            let mut found = self.related(first, &keys).await?;
            found.retain(Conflict::is_open);
            for member in known.iter().filter(|conflict| conflict.is_clash()) {
                group = merge(group, resolve::group(member, &found));
            }
            // A conflict that was not known before may bring in rows, and through them others.
            if resolve::keys(&group).len() == keys.len() {
                return Ok(group);
            }
        }
    }

    /// The conflicts of all nodes, of whatever type, in which rows with these keys take part: open, or answered and not compared.
    async fn related(&mut self, like: &Conflict, keys: &[Value]) -> Result<Vec<Conflict>, Failure> {
        let names = self.crew.names();
        let table = (&like.schemaname, &like.relname);
        let looks =
            join_all(names.iter().map(async |node| {
                conflict::related(self.crew.session(node)?, &self.context.config, table, keys).await
            }));
        let looks = self.limits.run(looks).await.map_err(|halt| self.halted(halt, "the nodes' logs"))?;
        let mut found = Vec::new();
        for look in looks {
            found.extend(look.map_err(|error| self.troubled(error))?);
        }
        Ok(found)
    }

    /// The quarrel as it is now, with its other side, which is given a moment to come up: both sides usually meet at once.
    pub async fn both_sides(&mut self, conflict: &Conflict, patience: Duration) -> Result<Vec<Conflict>, Failure> {
        let until = Instant::now() + patience;
        let reachable = conflict.peer.as_ref().is_some_and(|peer| self.crew.session(peer).is_ok());
        loop {
            let group = self.look_again(vec![conflict.clone()]).await?;
            let complete = !conflict.is_clash() || resolve::counterpart(conflict, &group).is_some();
            if complete || !reachable || Instant::now() >= until {
                return Ok(group);
            }
            sleep(PAUSE).await;
        }
    }

    /// The rows of the quarrel, as the nodes that have conflicts of them have them now.
    async fn observe(&mut self, handles: &Handles) -> Result<BTreeMap<String, Rows>, Failure> {
        let looks = join_all(handles.iter().map(async |(node, keys)| {
            let session = self.crew.session(node)?;
            let mut rows = Rows::new();
            for id in keys.values().collect::<BTreeSet<_>>() {
                let of_it = keys.iter().filter(|(_, its)| *its == id).map(|(key, _)| key.as_str());
                let asked = format!("[{}]", of_it.collect::<Vec<_>>().join(","));
                for row in session.rows(sql::VERSIONS, &[id, &asked], LOOK_BOUND).await? {
                    let read = |column: &str| {
                        serde_json::from_str::<Value>(row.get(column)).map_err(|error| {
                            session
                                .error(Trouble::Refused, format!("a row of conflict {id} is not understood: {error}"))
                        })
                    };
                    let (key, tuple) = (read("key")?, read("tuple")?);
                    rows.insert(key.to_string(), Row { key, tuple });
                }
            }
            Ok::<_, NodeError>((node.clone(), rows))
        }));
        let looks = self.limits.run(looks).await.map_err(|halt| self.halted(halt, "the rows"))?;
        let mut nodes = BTreeMap::new();
        for look in looks {
            let (node, rows) = look.map_err(|error| self.troubled(error))?;
            nodes.insert(node, rows);
        }
        Ok(nodes)
    }

    /// What these nodes have yet to apply of each other: all that is written up to now.
    async fn ways(&mut self, nodes: &BTreeSet<String>) -> Result<Vec<Way>, Failure> {
        let nodes: Vec<&String> = nodes.iter().filter(|node| self.crew.session(node).is_ok()).collect();
        let looks = join_all(nodes.iter().map(async |node| {
            let position: PgLsn = self.crew.session(node)?.row(sql::FLUSHED, &[], LOOK_BOUND).await?.get("lsn");
            Ok::<_, NodeError>((*node, position))
        }));
        let looks = self.limits.run(looks).await.map_err(|halt| self.halted(halt, "the nodes' positions"))?;
        let mut ways = Vec::new();
        for look in looks {
            let (from, position) = look.map_err(|error| self.troubled(error))?;
            let subscription = self.context.config.subscription_to(from);
            ways.extend(nodes.iter().filter(|to| **to != from).map(|to| Way {
                from: from.clone(),
                to: (*to).clone(),
                subscription: subscription.clone(),
                position,
                held_up: false,
            }));
        }
        Ok(ways)
    }

    /// The nodes of these conflicts and those that the changes came from.
    fn concerned(group: &[Conflict]) -> BTreeSet<String> {
        group.iter().flat_map(|conflict| std::iter::once(conflict.node.clone()).chain(conflict.peer.clone())).collect()
    }

    /// Leaves what is not applied yet; returns the other conflicts that hold it up.
    async fn catch_up(&mut self, ways: &mut Vec<Way>, group: &[Conflict]) -> Result<Vec<String>, Failure> {
        let looks = join_all(ways.iter().map(async |way| {
            let session = self.crew.session(&way.to)?;
            let rows = session.rows(sql::APPLIED, &[&way.subscription, &way.position], LOOK_BOUND).await?;
            if rows.first().and_then(|row| row.get("applied")) == Some(true) {
                return Ok(None);
            }
            let received: Option<PgLsn> = rows.first().and_then(|row| row.get("received"));
            let blocking = session.rows(sql::CONFLICTS_BLOCKING, &[], LOOK_BOUND).await?;
            let others = blocking.iter().filter(|other| {
                other.get::<_, &str>("subscription") == way.subscription
                    && !group.iter().any(|known| known.node == way.to && known.id == other.get::<_, i64>("id"))
            });
            let others: Vec<String> = others.map(|other| format!("{}/{}", way.to, other.get::<_, i64>("id"))).collect();
            Ok::<_, NodeError>(Some((received, others)))
        }));
        let looks = self.limits.run(looks).await.map_err(|halt| self.halted(halt, "the subscriptions"))?;
        let (mut left, mut held_up) = (Vec::new(), BTreeSet::new());
        for (mut way, look) in std::mem::take(ways).into_iter().zip(looks) {
            if let Some((received, others)) = look.map_err(|error| self.troubled(error))? {
                if let Some(received) = received {
                    let before = self.received.insert((way.from.clone(), way.to.clone()), received);
                    if before.is_some_and(|before| before < received) {
                        self.moved = Some(Instant::now());
                    }
                }
                way.held_up = !others.is_empty();
                held_up.extend(others);
                left.push(way);
            }
        }
        *ways = left;
        Ok(held_up.into_iter().collect())
    }

    /// Whether replication that was waited for has got on lately.
    fn moves(&self) -> bool {
        self.moved.is_some_and(|moved| moved.elapsed() < MOVES)
    }

    /// Whether other conflicts hold up replication on any node.
    async fn others_wait(&mut self, group: &[Conflict]) -> Result<bool, Failure> {
        let names = self.crew.names();
        let looks = join_all(names.iter().map(async |node| {
            let rows = self.crew.session(node)?.rows(sql::CONFLICTS_BLOCKING, &[], LOOK_BOUND).await?;
            let known = |id: i64| group.iter().any(|known| known.node == *node && known.id == id);
            Ok::<_, NodeError>(rows.iter().any(|row| !known(row.get("id"))))
        }));
        let looks = self.limits.run(looks).await.map_err(|halt| self.halted(halt, "the nodes' logs"))?;
        let mut wait = false;
        for look in looks {
            wait |= look.map_err(|error| self.troubled(error))?;
        }
        Ok(wait)
    }

    async fn pause(&self, ways: &[Way]) -> Result<(), Failure> {
        let what = match ways {
            [] => "the nodes to become alike".to_owned(),
            ways => {
                let ways: Vec<String> =
                    ways.iter().map(|way| format!("{} to have applied {}", way.to, way.from)).collect();
                ways.join(" and ")
            }
        };
        self.limits.run(sleep(PAUSE)).await.map_err(|halt| self.halted(halt, &what))
    }

    /// Waits until the nodes of these conflicts have applied all that comes from where they came from, or another conflict
    /// holds that up.
    async fn get_past(&mut self, group: &[Conflict]) -> Result<Vec<String>, Failure> {
        let mut ways = self.ways(&Self::concerned(group)).await?;
        ways.retain(|way| group.iter().any(|it| it.node == way.to && it.peer.as_ref() == Some(&way.from)));
        loop {
            let held_up = self.catch_up(&mut ways, group).await?;
            if ways.is_empty() || !held_up.is_empty() {
                return Ok(held_up);
            }
            self.pause(&ways).await?;
        }
    }

    // ---- acting ----

    /// Takes steps: those on one node one after the other, the nodes at the same time. The results in the steps' order.
    async fn perform<'s>(&mut self, steps: &'s [Step]) -> Result<Vec<(&'s Step, Result<Answer, NodeError>)>, Failure> {
        let mut nodes: BTreeMap<&str, Vec<(usize, &Step)>> = BTreeMap::new();
        for (place, step) in steps.iter().enumerate() {
            if let Some(node) = step.node() {
                nodes.entry(node).or_default().push((place, step));
            }
        }
        let work = join_all(nodes.iter().map(async |(node, steps)| {
            let mut results = Vec::new();
            for (place, step) in steps {
                let result = match self.crew.session(node) {
                    Ok(session) => take(session, step, &self.by_whom).await,
                    Err(error) => Err(error),
                };
                let failed = result.is_err();
                results.push((*place, *step, result));
                if failed {
                    break;
                }
            }
            results
        }));
        let results = match self.limits.run(work).await {
            Ok(results) => results,
            Err(halt) => {
                // What was asked last may be done or not: these sessions are of no use any more.
                let names: Vec<String> = nodes.keys().map(|node| (*node).to_owned()).collect();
                let failure = self.halted(halt, &format!("an answer of {}", names.join(" or ")));
                names.iter().for_each(|node| self.crew.give_up(node));
                return Err(failure);
            }
        };
        let mut results: Vec<_> = results.into_iter().flatten().collect();
        results.sort_by_key(|(place, ..)| *place);
        for (_, step, result) in &results {
            match result {
                Ok(answer) if answer.idle => {}
                Ok(answer) => {
                    let what = step.to_string();
                    let what = what.split_once(": ").map_or(what.as_str(), |(_, what)| what).to_owned();
                    let node = step.node().unwrap_or_default().to_owned();
                    tracing::info!(node, what, "done");
                    self.deeds.push(Deed { node, what, said: answer.said.clone() });
                }
                Err(error) if error.trouble == Trouble::Lost => self.crew.give_up(&error.node),
                Err(_) => {}
            }
        }
        Ok(results.into_iter().map(|(_, step, result)| (step, result)).collect())
    }

    async fn perform_all(&mut self, steps: &[Step]) -> Result<(), Failure> {
        for (_, result) in self.perform(steps).await? {
            result?;
        }
        Ok(())
    }

    /// Answers every conflict of the quarrel, those that come up meanwhile included, until none holds up replication.
    async fn settle_down(&mut self, course: &Course, mut group: Vec<Conflict>) -> Result<Vec<Conflict>, Failure> {
        let mut answers: BTreeMap<(String, i64), Answered> = BTreeMap::new();
        let mut ways = None;
        loop {
            let mut steps = Vec::new();
            for conflict in &group {
                let Some(step) = resolve::answer(course, conflict) else { continue };
                let (times, seen, refused) = answers.entry((conflict.node.clone(), conflict.id)).or_default();
                // Nobody else has closed it since, nor has replication got past it, so the refusal counts.
                if let Some((error, _)) = refused.take_if(|(_, at)| at.elapsed() > HINDSIGHT) {
                    return Err(error.into());
                }
                if *times > 0 && conflict.occurrences <= *seen {
                    continue;
                }
                if *times >= ANSWERS {
                    let why = conflict.message.as_deref().unwrap_or("no reason is known");
                    return Err(Failure::new(
                        Kind::Undone,
                        format!("{} comes up again and again: {why}", conflict.name()),
                    ));
                }
                (*times, *seen) = (*times + 1, conflict.occurrences);
                steps.push(step);
            }
            for (step, result) in self.perform(&steps).await? {
                let (Step::MakeRoom { node, id, .. } | Step::Resolve { node, id, .. } | Step::Skip { node, id }) = step
                else {
                    continue;
                };
                match result {
                    Ok(answer) => {
                        if let Some(conflict) = group.iter_mut().find(|c| c.node == *node && c.id == *id) {
                            as_they_were(conflict, &answer.rows);
                        }
                    }
                    Err(error) if error.trouble == Trouble::Refused => {
                        answers.entry((node.clone(), *id)).or_default().2 = Some((error, Instant::now()));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if *course == Course::Skip {
                return match answers.into_values().find_map(|(.., refused)| refused) {
                    Some((error, _)) => Err(error.into()),
                    None => Ok(group),
                };
            }
            group = self.look_again(group).await?;
            let waiting: Vec<String> = group
                .iter()
                .filter(|c| c.is_open() && (c.blocking || resolve::answer(course, c).is_some()))
                .map(Conflict::name)
                .collect();
            if waiting.is_empty() {
                return Ok(group);
            }
            let what = format!("replication to go on past {}", waiting.join(", "));
            // Whether it takes its time or stands still; not asked while it may be over at once.
            if self.limits.remaining() < MOVES {
                if ways.is_none() {
                    ways = Some(self.ways(&Self::concerned(&group)).await?);
                }
                if let Some(ways) = &mut ways {
                    self.catch_up(ways, &group).await?;
                }
            }
            self.limits.run(sleep(PAUSE)).await.map_err(|halt| self.halted(halt, &what))?;
        }
    }

    /// The conflicts of a quarrel as they are now, with those that have come up since.
    async fn look_again(&mut self, mut group: Vec<Conflict>) -> Result<Vec<Conflict>, Failure> {
        let clash = group.iter().any(Conflict::is_clash);
        if !clash {
            for known in &mut group {
                let look = match self.crew.session(&known.node) {
                    Ok(session) => conflict::by_id(session, &self.context.config, known.id).await,
                    Err(error) => Err(error),
                };
                match look {
                    Ok(Some(now)) => *known = now,
                    Ok(None) => close(known),
                    Err(error) => return Err(self.troubled(error)),
                }
            }
            return Ok(group);
        }
        // What is not found among the open ones is closed.
        group.iter_mut().for_each(close);
        self.gather(&group).await
    }

    /// Gives the flag to one of the rows, on one node, and waits until all nodes have it so.
    async fn crown(
        &mut self,
        course: &Course,
        flag: &str,
        by: &str,
        group: &mut Vec<Conflict>,
    ) -> Result<Resolved, Failure> {
        let mut crowned: Option<Step> = None;
        let mut ways = self.ways(&Self::concerned(group)).await?;
        loop {
            let held_up = self.catch_up(&mut ways, group).await?;
            // What the other node wrote a moment later may have come up against it.
            *group = self.look_again(std::mem::take(group)).await?;
            if group.iter().any(|conflict| conflict.is_open() && conflict.blocking) {
                *group = self.settle_down(course, std::mem::take(group)).await?;
                ways = self.ways(&Self::concerned(group)).await?;
                continue;
            }
            let handles = resolve::handles(group);
            let nodes = self.observe(&handles).await?;
            let sights = self.sights().await?;
            let all = resolve::keys(group).len();
            let able = handles.iter().filter(|(_, keys)| keys.len() == all);
            let candidates: BTreeSet<&str> = able.map(|(node, _)| node.as_str()).collect();
            let Some(hand) = resolve::hand(&self.context.config, &sights, &candidates) else {
                let message = format!("no node is writable that has met all of it: no row could be given {flag}");
                return Err(Failure::new(Kind::Undone, message));
            };
            let rows = &nodes[hand];
            let winner = resolve::crown(flag, by, group, rows).map_err(|flaw| Failure::new(Kind::Undone, flaw))?;
            let step = resolve::coronation(hand, &handles[hand], flag, rows, winner);
            let right = nodes.values().all(|rows| resolve::is_crowned(flag, rows, winner))
                && resolve::are_alike(&nodes, &handles)
                && ways.is_empty();
            if right || (!held_up.is_empty() && crowned.as_ref() == Some(&step)) {
                let resolution = match winner {
                    Some(row) => format!("winner {}, {by} {}", row.key, row.tuple[by]),
                    None => format!("no row has {flag} any more"),
                };
                let row = winner.map_or(Value::Null, |row| row.tuple.clone());
                let (not_compared, notes) = (self.without(&handles), Vec::new());
                return Ok(Resolved { row, resolution, conflicts: Vec::new(), not_compared, held_up, notes });
            }
            if crowned.as_ref() != Some(&step) {
                self.perform_all(std::slice::from_ref(&step)).await?;
                crowned = Some(step);
                ways = self.ways(&Self::concerned(group)).await?;
            } else {
                self.pause(&ways).await?;
            }
        }
    }

    async fn sights(&mut self) -> Result<Vec<Sight>, Failure> {
        let looks = self.limits.run(sights(self.context, self.crew)).await;
        looks.map_err(|halt| self.halted(halt, "the nodes' states"))
    }

    /// Connected nodes that are not among these.
    fn without(&self, handles: &Handles) -> Vec<String> {
        self.crew.names().into_iter().filter(|node| !handles.contains_key(node)).collect()
    }

    /// Waits until all nodes have the rows as the winner's node has them, and sees to it if they do not get there by themselves.
    async fn make_alike(
        &mut self,
        course: &Course,
        winner: &Version,
        group: &mut Vec<Conflict>,
    ) -> Result<Resolved, Failure> {
        let (mut rounds, mut looked_twice) = (0, false);
        let mut spread: BTreeMap<String, Instant> = BTreeMap::new();
        let (mut refused, mut notes) = (BTreeSet::new(), Vec::new());
        // Rows are compared only when each node has what the others had written: what waited behind the conflict may change
        // them once more, and one that has not come yet looks like one that is not there.
        let mut ways = self.ways(&Self::concerned(group)).await?;
        loop {
            let held_up = self.catch_up(&mut ways, group).await?;
            *group = self.look_again(std::mem::take(group)).await?;
            if group.iter().any(|conflict| conflict.is_open() && conflict.blocking) {
                *group = self.settle_down(course, std::mem::take(group)).await?;
                ways = self.ways(&Self::concerned(group)).await?;
                looked_twice = false;
                continue;
            }
            // What is held up in one direction is no reason to look before the other one has caught up: a row that has not come
            // yet would count as gone, and be deleted everywhere.
            if ways.iter().any(|way| !way.held_up) {
                self.pause(&ways).await?;
                continue;
            }
            // Whatever else a node has against these rows gives a way to look at them.
            let mut all = group.clone();
            if let Some(first) = group.first().cloned() {
                let others = self.related(&first, &resolve::keys(group)).await?;
                all.extend(
                    others
                        .into_iter()
                        .filter(|other| group.iter().all(|known| (&known.node, known.id) != (&other.node, other.id))),
                );
            }
            let handles = resolve::handles(&all);
            let nodes = self.observe(&handles).await?;
            let authority = resolve::authority(winner, &nodes)
                .ok_or_else(|| Failure::new(Kind::Undone, format!("the rows of {} are not known", winner.origin)))?;
            let sights = self.sights().await?;
            if !resolve::are_alike(&nodes, &handles) && (held_up.is_empty() || rounds == 0) {
                // Something may just be under way.
                if !looked_twice && held_up.is_empty() {
                    looked_twice = true;
                    ways = self.ways(&Self::concerned(&all)).await?;
                    continue;
                }
                rounds += 1;
                if rounds > ROUNDS {
                    let message = format!("the nodes were made alike {ROUNDS} times and have drifted apart again");
                    return Err(
                        Failure::new(Kind::Undone, message).hint("see what writes to these rows, and run it again")
                    );
                }
                let steps = resolve::mend(authority, &nodes, &handles, &sights)
                    .map_err(|flaw| Failure::new(Kind::Undone, flaw).hint("bring that node up, and run it again"))?;
                self.perform_all(&steps).await?;
                ways = self.ways(&Self::concerned(&all)).await?;
                looked_twice = false;
                continue;
            }
            let connected = self.crew.names();
            let mut found = resolve::spread(winner, group, &nodes, &handles, &connected, &sights);
            found.steps.retain(|key, _| !spread.contains_key(key));
            if !found.steps.is_empty() {
                for (key, steps) in found.steps {
                    spread.insert(key.clone(), Instant::now());
                    for (step, result) in self.perform(&steps).await? {
                        match result {
                            Ok(_) => {}
                            Err(error) if error.trouble == Trouble::Refused => {
                                refused.extend(self.without(&handles));
                                notes.push(format!("could not {step}: {error}"));
                            }
                            Err(error) => return Err(error.into()),
                        }
                    }
                }
                ways = self.ways(&connected.into_iter().collect()).await?;
                continue;
            }
            // What a node says of it later is a conflict of its own, so nothing that holds up replication has to wait for that.
            let grace = spread.values().any(|at| at.elapsed() < GRACE);
            if held_up.is_empty() && grace && !self.others_wait(group).await? {
                self.pause(&[]).await?;
                continue;
            }
            let row = nodes.get(authority).and_then(|rows| rows.get(&winner.key.to_string()));
            let row = row.map_or(Value::Null, |row| row.tuple.clone());
            let resolution = format!("winner {winner}");
            // What came up on the way is over with it.
            group
                .extend(all.into_iter().skip(group.len()).filter(|other| other.is_missing() || other.kept().is_some()));
            let not_compared = found.unknown.union(&refused).cloned().collect();
            return Ok(Resolved { row, resolution, conflicts: Vec::new(), not_compared, held_up, notes });
        }
    }

    /// Waits until the subscriptions between the nodes of these conflicts work; returns those that do not.
    pub async fn streaming(&mut self, nodes: &BTreeSet<String>, bound: Duration) -> Result<Vec<String>, Failure> {
        let until = Instant::now() + bound;
        loop {
            let looks = join_all(nodes.iter().map(async |node| {
                let rows = self.crew.session(node)?.rows(sql::SUBSCRIPTIONS, &[], LOOK_BOUND).await?;
                Ok::<_, NodeError>((node, rows))
            }));
            let looks = self.limits.run(looks).await.map_err(|halt| self.halted(halt, "the subscriptions"))?;
            let mut idle = Vec::new();
            for look in looks {
                let (node, rows) = look?;
                for row in rows {
                    let (name, working): (String, bool) = (row.get("name"), row.get("working"));
                    let source = self.context.config.source_of(node, &name);
                    if !working && source.is_some_and(|source| nodes.contains(&source.name)) {
                        idle.push(format!("{name} on {node}"));
                    }
                }
            }
            if idle.is_empty() || Instant::now() >= until {
                return Ok(idle);
            }
            self.limits.run(sleep(PAUSE)).await.map_err(|halt| self.halted(halt, &idle.join(", ")))?;
        }
    }
}

/// Conflicts as known, with what was found now. Rows that were in the way earlier stay in the record: they have been moved out
/// of it by us.
fn merge(known: Vec<Conflict>, found: Vec<Conflict>) -> Vec<Conflict> {
    let mut group = known;
    for mut now in found {
        match group.iter_mut().find(|conflict| (&conflict.node, conflict.id) == (&now.node, now.id)) {
            Some(earlier) => {
                for row in &earlier.local_conflicts {
                    match now.local_conflicts.iter_mut().find(|other| other.key == row.key) {
                        Some(other) => *other = row.clone(),
                        None => now.local_conflicts.push(row.clone()),
                    }
                }
                *earlier = now;
            }
            None => group.push(now),
        }
    }
    group
}

fn close(conflict: &mut Conflict) {
    if conflict.is_open() {
        conflict.status = "closed".into();
        conflict.blocking = false;
    }
}

/// Corrects what was recorded of the rows in the way by what they were when room was made.
fn as_they_were(conflict: &mut Conflict, rows: &[Value]) {
    for row in rows {
        let has = |key: &Value| {
            key.as_object().is_some_and(|key| key.iter().all(|(column, value)| row.get(column) == Some(value)))
        };
        if let Some(local) = conflict.local_conflicts.iter_mut().find(|local| has(&local.key)) {
            local.tuple = row.clone();
        }
    }
}

async fn take(session: &Session, step: &Step, by_whom: &str) -> Result<Answer, NodeError> {
    let refused = |message: String| session.error(Trouble::Refused, message);
    let said = |row: tokio_postgres::Row| Answer { said: row.get("done"), ..Answer::default() };
    match step {
        Step::MakeRoom { id, assignments, .. } => {
            let assignments = assignments.to_string();
            let rows = session.rows(sql::MAKE_ROOM, &[id, &assignments], STEP_BOUND).await?;
            let rows = rows.iter().map(|row| serde_json::from_str(row.get("tuple")));
            let rows =
                rows.collect::<Result<_, _>>().map_err(|error| refused(format!("row not understood: {error}")))?;
            Ok(Answer { rows, ..Answer::default() })
        }
        Step::Resolve { id, keep, .. } => {
            let done = session.rows(sql::RESOLVE, &[id, &keep.word()], STEP_BOUND).await?.pop();
            Ok(done.map_or_else(|| Answer { idle: true, ..Answer::default() }, said))
        }
        Step::Skip { id, .. } => session.row(sql::SKIP, &[id], STEP_BOUND).await.map(said),
        Step::Assign { rows, .. } => {
            let changes = json!(rows).to_string();
            let changed: i64 = session.row(sql::ASSIGN, &[&changes], STEP_BOUND).await?.get("changed");
            let gone = rows.len() as i64 - changed;
            Ok(Answer { said: (gone > 0).then(|| format!("{gone} of the rows were gone")), ..Answer::default() })
        }
        Step::Remove { id, key, .. } => {
            session.row(sql::REMOVE, &[id, &key.to_string()], STEP_BOUND).await.map(|_| Answer::default())
        }
        Step::Put { id, tuple, .. } => {
            session.row(sql::PUT, &[id, &tuple.to_string()], STEP_BOUND).await.map(|_| Answer::default())
        }
        Step::Settle { id, resolution, .. } => {
            let settled: bool = session.row(sql::SETTLE, &[id, resolution, &by_whom], STEP_BOUND).await?.get("settled");
            Ok(Answer { idle: !settled, ..Answer::default() })
        }
        Step::Notify { channel, payload, .. } => {
            session.row(sql::NOTIFY, &[channel, payload], STEP_BOUND).await.map(|_| Answer::default())
        }
        Step::WaitApplied { .. } => Ok(Answer::default()),
    }
}
