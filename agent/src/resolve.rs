//! What to do about a conflict: whose version wins, which steps bring that about on which node, and who may take them.
//!
//! Deliberately without any IO, clock or randomness: what the nodes tell goes in, steps come out; `resolver.rs` takes them.
//! Every choice between versions is made over all of them and looks at nothing but the versions, so that it does not matter
//! on which node, or in which order, they were found: **the same versions have the same winner everywhere**.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use crate::config::{Config, Node, Rule, Strategy, Tables};
use crate::conflict::Conflict;
use crate::order::{self, Scale};

/// The first rule that is for the table of this conflict.
pub fn rule_for<'a>(rules: &'a [Rule], conflict: &Conflict) -> Option<&'a Rule> {
    let (schema, table) = (conflict.schemaname.as_deref(), conflict.relname.as_deref());
    rules.iter().find(|rule| match &rule.tables {
        Tables::All => true,
        Tables::Schema(name) => schema == Some(name),
        Tables::One(name, one) => schema == Some(name) && table == Some(one),
    })
}

// ---- who may ----

/// What is known of a node when it is decided who resolves, and where ordinary changes are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// The node.
    pub node: String,
    /// It is writable.
    pub up: bool,
    /// The application's active side as this node has it.
    pub active: Option<String>,
}

/// The node whose watcher resolves: the application's active side, as the first writable node has it; without `[active]` the
/// first writable node. None, and so nobody, while no node is writable or the active side is none of these nodes.
pub fn active_side<'a>(config: &'a Config, sights: &[Sight]) -> Option<&'a Node> {
    let sight = |node: &&Node| sights.iter().find(|sight| sight.node == node.name && sight.up);
    let first = config.nodes.iter().find(|node| sight(node).is_some())?;
    if config.active.is_none() {
        return Some(first);
    }
    let active = config.nodes.iter().filter_map(|node| sight(&node)).find_map(|sight| sight.active.as_ref())?;
    config.nodes.iter().find(|node| node.active_name == *active)
}

/// The one node on which ordinary, replicated changes are made: writable, and among `candidates`; the active side if it can be.
pub fn hand<'a>(config: &'a Config, sights: &[Sight], candidates: &BTreeSet<&str>) -> Option<&'a str> {
    let able =
        |node: &Node| candidates.contains(node.name.as_str()) && sights.iter().any(|s| s.node == node.name && s.up);
    let active = active_side(config, sights).filter(|node| able(node));
    active.or_else(|| config.nodes.iter().find(|node| able(node))).map(|node| node.name.as_str())
}

/// A conflict that there is something to do about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Todo {
    /// The node that met it.
    pub node: String,
    /// Its number there.
    pub id: i64,
    /// Replication waits for it.
    pub blocking: bool,
}

/// A conflict that is left to a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Its table.
    pub table: String,
    /// Why.
    pub why: String,
}

/// How often a rule was tried for each conflict, when it may be tried again, and which are left to a person. Times are durations
/// since the watch began.
#[derive(Debug, Default)]
pub struct Attempts(BTreeMap<(String, i64), Tried>);

#[derive(Debug, Default)]
struct Tried {
    times: u32,
    not_before: Duration,
    left: Option<Leftover>,
}

impl Attempts {
    fn of(&mut self, node: &str, id: i64) -> &mut Tried {
        self.0.entry((node.to_owned(), id)).or_default()
    }

    /// Counts one more; its number, from 1.
    pub fn begin(&mut self, node: &str, id: i64) -> u32 {
        let tried = self.of(node, id);
        tried.times += 1;
        tried.times
    }

    /// Takes back the last one: it was cut off by something that is no fault of the rule.
    pub fn take_back(&mut self, node: &str, id: i64) {
        let tried = self.of(node, id);
        tried.times = tried.times.saturating_sub(1);
    }

    /// It is left to a person.
    pub fn leave(&mut self, node: &str, id: i64, leftover: Leftover) {
        self.of(node, id).left = Some(leftover);
    }

    /// It is tried again then, and not before.
    pub fn put_off(&mut self, node: &str, id: i64, not_before: Duration) {
        self.of(node, id).not_before = not_before;
    }

    /// It is closed: should it come up again, counting begins anew.
    pub fn forget(&mut self, node: &str, id: i64) {
        self.0.remove(&(node.to_owned(), id));
    }

    /// Forgets the conflicts of a node that are not among these.
    pub fn retain(&mut self, node: &str, open: &BTreeSet<i64>) {
        self.0.retain(|(at, id), _| at != node || open.contains(id));
    }

    /// The conflicts of a node that are remembered.
    pub fn known(&self, node: &str) -> Vec<i64> {
        self.0.keys().filter(|(at, _)| at == node).map(|(_, id)| *id).collect()
    }

    /// Nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Which of these comes next: of those that may be tried now one that holds up replication, wherever it is; of several the one
    /// that has waited longest.
    pub fn next(&self, todo: Vec<Todo>, now: Duration) -> Option<Todo> {
        let due = todo.into_iter().filter_map(|todo| {
            let tried = self.0.get(&(todo.node.clone(), todo.id));
            let not_before = tried.map_or(Duration::ZERO, |tried| tried.not_before);
            let due = not_before <= now && tried.is_none_or(|tried| tried.left.is_none());
            due.then_some((not_before, todo))
        });
        due.min_by(|(when, one), (other_when, other)| {
            (!one.blocking, when, one.id, &one.node).cmp(&(!other.blocking, other_when, other.id, &other.node))
        })
        .map(|(_, todo)| todo)
    }

    /// What is left to a person, by node and table: the first of each, and how many there are.
    pub fn left(&self) -> BTreeMap<(String, String), (i64, Leftover, usize)> {
        let mut left: BTreeMap<(String, String), (i64, Leftover, usize)> = BTreeMap::new();
        for ((node, id), tried) in &self.0 {
            let Some(leftover) = &tried.left else { continue };
            let place = (node.clone(), leftover.table.clone());
            left.entry(place).or_insert_with(|| (*id, leftover.clone(), 0)).2 += 1;
        }
        left
    }
}

// ---- what belongs together ----

/// Whether two conflicts are sides of one quarrel: the same table, and a row that takes part in both. On two nodes that wrote
/// at once each side meets the other's row, so what is incoming here is in the way there.
pub fn is_related(one: &Conflict, other: &Conflict) -> bool {
    one.is_clash()
        && other.is_clash()
        && one.relname.is_some()
        && (&one.schemaname, &one.relname) == (&other.schemaname, &other.relname)
        && one.keys().iter().any(|key| other.keys().contains(key))
}

/// The conflict, as it is among the candidates if it is there, and all candidates that belong to it, directly or through
/// others; in an order of their own.
pub fn group(conflict: &Conflict, candidates: &[Conflict]) -> Vec<Conflict> {
    let (same, mut rest): (Vec<&Conflict>, Vec<&Conflict>) =
        candidates.iter().partition(|other| (&other.node, other.id) == (&conflict.node, conflict.id));
    let mut group = vec![same.first().map_or(conflict, |fresh| fresh).clone()];
    loop {
        let (found, left): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|candidate| group.iter().any(|member| is_related(member, candidate)));
        if found.is_empty() {
            break;
        }
        group.extend(found.into_iter().cloned());
        rest = left;
    }
    group.sort_by(|one, other| (&one.node, one.id).cmp(&(&other.node, other.id)));
    group.dedup_by(|one, other| (&one.node, one.id) == (&other.node, other.id));
    group
}

/// The conflict that the other end of the subscription has about the same rows.
pub fn counterpart<'a>(conflict: &Conflict, candidates: &'a [Conflict]) -> Option<&'a Conflict> {
    candidates.iter().find(|other| {
        conflict.peer.as_ref() == Some(&other.node)
            && other.peer.as_ref() == Some(&conflict.node)
            && is_related(conflict, other)
    })
}

/// The keys of all rows that take part, each once.
pub fn keys(group: &[Conflict]) -> Vec<Value> {
    let mut keys: Vec<Value> = Vec::new();
    for key in group.iter().flat_map(Conflict::keys) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys.sort_by_key(Value::to_string);
    keys
}

// ---- who wins ----

/// One version of a row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Version {
    /// The node that wrote it.
    pub origin: String,
    /// Its key.
    pub key: Value,
    /// The row; null if this version is that there is none.
    pub tuple: Value,
    /// When it was committed.
    pub commit_ts: Option<String>,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let absent = if self.tuple.is_null() { " (no row)" } else { "" };
        write!(f, "{} of {}{absent}", self.key, self.origin)
    }
}

fn incoming(conflict: &Conflict) -> Result<Version, String> {
    let origin = conflict.peer.clone().ok_or_else(|| {
        format!("subscription {} on {} leads to no node of the configuration", conflict.subscription, conflict.node)
    })?;
    let (key, tuple) = (conflict.remote_key(), conflict.remote_tuple.clone());
    Ok(Version { origin, key, tuple, commit_ts: conflict.remote_commit_ts.clone() })
}

fn here(conflict: &Conflict) -> Vec<Version> {
    if conflict.is_missing() {
        let (origin, key) = (conflict.node.clone(), conflict.replica_identity.clone());
        return vec![Version { origin, key, tuple: Value::Null, commit_ts: None }];
    }
    let rows = conflict.local_conflicts.iter();
    rows.map(|row| Version {
        origin: row.from.clone(),
        key: row.key.clone(),
        tuple: row.tuple.clone(),
        commit_ts: row.commit_ts.clone(),
    })
    .collect()
}

fn versions(group: &[Conflict]) -> Result<Vec<Version>, String> {
    let mut versions = Vec::new();
    for conflict in group {
        versions.push(incoming(conflict)?);
        versions.extend(here(conflict));
    }
    Ok(versions)
}

/// Compares two keys, column by column; to be used where all else is equal.
fn by_key(one: &Value, other: &Value) -> Ordering {
    if let (Value::Object(one), Value::Object(other)) = (one, other)
        && one.keys().eq(other.keys())
    {
        let columns = one.values().zip(other.values()).map(|(one, other)| order::plain(one, other));
        return columns.fold(Ordering::Equal, Ordering::then);
    }
    order::plain(one, other)
}

/// The greatest, by a value of each; ties go to the greater key, then to the greater row, then to the greater node.
fn greatest(versions: &[Version], value: impl Fn(&Version) -> Result<Value, String>) -> Result<Version, String> {
    let valued: Vec<(Value, &Version)> =
        versions.iter().map(|version| Ok((value(version)?, version))).collect::<Result<_, String>>()?;
    let scale = Scale::of(valued.iter().map(|(value, _)| value));
    let winner = valued.into_iter().max_by(|(value, version), (other_value, other)| {
        scale
            .compare(value, other_value)
            .then_with(|| by_key(&version.key, &other.key))
            .then_with(|| order::plain(&version.tuple, &other.tuple))
            .then_with(|| version.origin.cmp(&other.origin))
    });
    winner.map(|(_, version)| version.clone()).ok_or_else(|| "there are no versions to choose from".into())
}

fn column<'a>(row: &'a Value, key: &Value, column: &str) -> Result<&'a Value, String> {
    row.get(column).ok_or_else(|| format!("the row {key} as recorded has no column {column}"))
}

// ---- what is done ----

/// What shall become of a quarrel.
#[derive(Debug, Clone, PartialEq)]
pub enum Course {
    /// This version, with all that its node has of these rows, is to be on every node.
    Keep(Version),
    /// All rows are kept, and one of them gets the flag: see [`crown`].
    Deactivate {
        /// The boolean column.
        flag: String,
        /// The column that decides.
        by: String,
    },
    /// The failing transaction is left out, on this node.
    Skip,
}

/// What the operator wants to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Wish {
    /// The version of the node that the conflict is on.
    Local,
    /// The version of the node that the change came from.
    Remote,
    /// The version that was committed later.
    Newest,
}

impl Wish {
    /// As it is typed.
    pub fn word(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
            Self::Newest => "newest",
        }
    }
}

/// What the operator's wish means for this quarrel; an error says why it cannot be.
pub fn course_of_wish(wish: Wish, conflict: &Conflict, group: &[Conflict]) -> Result<Course, String> {
    fit(conflict)?;
    Ok(Course::Keep(match wish {
        Wish::Remote => incoming(conflict)?,
        Wish::Local => here(conflict).into_iter().next().ok_or("no row in the way was recorded")?,
        Wish::Newest => newest(conflict, group)?,
    }))
}

/// What a rule means for this quarrel; an error says why it does not fit.
pub fn course_of_rule(strategy: &Strategy, conflict: &Conflict, group: &[Conflict]) -> Result<Course, String> {
    match strategy {
        Strategy::Leave => Err("it is left for a person".into()),
        Strategy::Skip if conflict.blocking => Ok(Course::Skip),
        Strategy::Skip => Err("there is nothing to skip: replication has gone on".into()),
        Strategy::Newest { by: None } => fit(conflict).and_then(|()| newest(conflict, group)).map(Course::Keep),
        Strategy::Newest { by: Some(by) } => {
            fit(conflict)?;
            if conflict.is_missing() {
                return Err(format!("the row is not on {}, so there is no {by} to compare", conflict.node));
            }
            greatest(&versions(group)?, |version| column(&version.tuple, &version.key, by).cloned()).map(Course::Keep)
        }
        Strategy::LetDeleteWin if conflict.is_missing() => {
            let absent = here(conflict).into_iter().next();
            absent.map(Course::Keep).ok_or_else(|| "no version is that there is no row".into())
        }
        Strategy::LetDeleteWin => {
            Err(format!("it is for rows that one side deleted, not for {}", conflict.conflict_type))
        }
        Strategy::KeepNode(node) => {
            fit(conflict)?;
            // Of the conflict itself first: the versions of another side may be older.
            let own = std::iter::once(incoming(conflict)?).chain(here(conflict));
            let mut all = own.chain(versions(group)?);
            let version = all.find(|version| version.origin == *node);
            version.map(Course::Keep).ok_or_else(|| format!("none of the versions is of {node}"))
        }
        Strategy::DeactivateOlder { flag, by } => {
            if !conflict.is_clash() {
                return Err(format!("it is for rows that are in each other's way, not for {}", conflict.conflict_type));
            }
            versions(group)?;
            for conflict in group {
                if conflict.local_conflicts.iter().any(|row| row.key == conflict.replica_identity) {
                    return Err(format!(
                        "both versions have the key {}, so setting {flag} makes no room",
                        conflict.replica_identity
                    ));
                }
            }
            Ok(Course::Deactivate { flag: flag.clone(), by: by.clone() })
        }
    }
}

fn fit(conflict: &Conflict) -> Result<(), String> {
    if conflict.is_clash() || conflict.is_missing() {
        return Ok(());
    }
    Err(format!(
        "{} is not about two versions of a row: mend its cause, or skip the transaction",
        conflict.conflict_type
    ))
}

fn newest(conflict: &Conflict, group: &[Conflict]) -> Result<Version, String> {
    if conflict.is_missing() {
        return Err(format!("when the row was deleted on {} is not known", conflict.node));
    }
    greatest(&versions(group)?, |version| match &version.commit_ts {
        Some(commit_ts) => Ok(Value::from(commit_ts.as_str())),
        None => Err(format!("when {version} was committed is not known")),
    })
}

/// Which version one node keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// What it has.
    Local,
    /// What comes in.
    Remote,
}

impl Keep {
    /// As `stillebot_resolve` wants it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Remote => "remote",
        }
    }
}

/// One thing done on one node.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// Sets columns of the rows in the way, on this node only; apply goes on at once.
    MakeRoom { node: String, id: i64, assignments: Value },
    /// Keeps what is here, or lets in what comes; the rest of the transaction is applied.
    Resolve { node: String, id: i64, keep: Keep },
    /// Leaves the failing transaction out.
    Skip { node: String, id: i64 },
    /// Waits until these conflicts hold up nothing any more.
    WaitApplied { conflicts: Vec<(String, i64)> },
    /// Changes rows, each a conflict of it, its key and assignments, in one transaction that replicates. No assignments: as it is.
    Assign { node: String, rows: Vec<(i64, Value, Value)> },
    /// Deletes a row; this replicates.
    Remove { node: String, id: i64, key: Value },
    /// Writes a row as it is on another node, on this node only.
    Put { node: String, id: i64, tuple: Value },
    /// Closes a conflict in the log.
    Settle { node: String, id: i64, resolution: String },
    /// Tells the application.
    Notify { node: String, channel: String, payload: String },
}

impl Step {
    /// The node it is done on; none if on several.
    pub fn node(&self) -> Option<&str> {
        match self {
            Self::MakeRoom { node, .. }
            | Self::Resolve { node, .. }
            | Self::Skip { node, .. }
            | Self::Assign { node, .. }
            | Self::Remove { node, .. }
            | Self::Put { node, .. }
            | Self::Settle { node, .. }
            | Self::Notify { node, .. } => Some(node),
            Self::WaitApplied { .. } => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeRoom { node, id, assignments } => {
                write!(f, "{node}: make room for conflict {id} by setting {assignments} in the rows in its way")
            }
            Self::Resolve { node, id, keep: Keep::Local } => {
                write!(f, "{node}: keep what is there, and leave the incoming change of conflict {id} out")
            }
            Self::Resolve { node, id, keep: Keep::Remote } => {
                write!(f, "{node}: let the incoming change of conflict {id} replace what is in its way")
            }
            Self::Skip { node, id } => write!(f, "{node}: skip the whole transaction that conflict {id} stopped"),
            Self::WaitApplied { conflicts } => {
                let names: Vec<String> = conflicts.iter().map(|(node, id)| format!("{node}/{id}")).collect();
                write!(f, "wait until replication is past {}", names.join(", "))
            }
            Self::Assign { node, rows, .. } => {
                let rows: Vec<String> = rows
                    .iter()
                    .map(|(_, key, assignments)| match assignments.as_object() {
                        Some(columns) if columns.is_empty() => format!("rewrite {key}"),
                        _ => format!("set {assignments} in {key}"),
                    })
                    .collect();
                write!(f, "{node}: {}, for all nodes", rows.join(", "))
            }
            Self::Remove { node, key, .. } => write!(f, "{node}: delete {key}, for all nodes"),
            Self::Put { node, tuple, .. } => write!(f, "{node}: write {tuple} there, as on the other node"),
            Self::Settle { node, id, resolution } => write!(f, "{node}: note in conflict {id}: {resolution}"),
            Self::Notify { node, channel, payload } => write!(f, "{node}: notify {channel:?}, {payload:?}"),
        }
    }
}

/// Which side of a conflict is the winner's.
pub fn side(winner: &Version, conflict: &Conflict) -> Keep {
    // Several rows of one node can take part, so it is the node that wins; unless the winner is just what is here.
    let is_here = here(conflict).iter().any(|row| row.origin == winner.origin && row.key == winner.key);
    if conflict.peer.as_ref() == Some(&winner.origin) && !is_here { Keep::Remote } else { Keep::Local }
}

/// What is done about one conflict of the quarrel, on its own node; none if nothing is left to do there.
pub fn answer(course: &Course, conflict: &Conflict) -> Option<Step> {
    let (node, id) = (conflict.node.clone(), conflict.id);
    if !conflict.is_open() {
        return None;
    }
    match course {
        Course::Keep(winner) if conflict.is_missing() || (conflict.is_clash() && conflict.blocking) => {
            Some(Step::Resolve { node, id, keep: side(winner, conflict) })
        }
        Course::Deactivate { flag, .. } if conflict.is_clash() && conflict.blocking => {
            Some(Step::MakeRoom { node, id, assignments: json!({flag: false}) })
        }
        Course::Skip if conflict.blocking => Some(Step::Skip { node, id }),
        _ => None,
    }
}

/// The first steps, up to where replication goes on. What comes after depends on what is found then: [`crown`] and [`mend`].
pub fn plan(course: &Course, group: &[Conflict]) -> Vec<Step> {
    let mut steps: Vec<Step> = group.iter().filter_map(|conflict| answer(course, conflict)).collect();
    let waiting: Vec<(String, i64)> =
        group.iter().filter(|c| c.is_open() && c.blocking).map(|c| (c.node.clone(), c.id)).collect();
    if !waiting.is_empty() {
        steps.push(Step::WaitApplied { conflicts: waiting });
    }
    steps
}

// ---- after replication goes on ----

/// Rows as one node has them, by their key as text.
pub type Rows = BTreeMap<String, Row>;

/// By node, and key as text: a conflict of that row on that node, which is what gives the agent the right to see and to touch
/// the row there.
pub type Handles = BTreeMap<String, BTreeMap<String, i64>>;

/// What can be seen and touched by way of these conflicts; of several of one row the first.
pub fn handles(conflicts: &[Conflict]) -> Handles {
    let mut handles = Handles::new();
    for conflict in conflicts {
        let of_node = handles.entry(conflict.node.clone()).or_default();
        for key in conflict.keys() {
            of_node.entry(key.to_string()).or_insert(conflict.id);
        }
    }
    handles
}

/// A row as a node has it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Its key.
    pub key: Value,
    /// All of it.
    pub tuple: Value,
}

/// Which of the rows of a node gets the flag: of those that claim it, the one with the greatest `by`, then the greatest key.
/// A row claims it that has it now, or that had it on its node until room was made. What has lost it by its own node's doing
/// claims nothing any more. None if no row does.
pub fn crown<'a>(flag: &str, by: &str, group: &[Conflict], rows: &'a Rows) -> Result<Option<&'a Row>, String> {
    let set = |tuple: &Value| tuple.get(flag) == Some(&Value::Bool(true));
    let mut claimants = Vec::new();
    for row in rows.values() {
        column(&row.tuple, &row.key, flag)?;
        let room_was_made =
            group.iter().flat_map(|c| &c.local_conflicts).any(|local| local.key == row.key && set(&local.tuple));
        if set(&row.tuple) || room_was_made {
            claimants.push((column(&row.tuple, &row.key, by)?, row));
        }
    }
    let scale = Scale::of(claimants.iter().map(|(value, _)| *value));
    let winner = claimants.into_iter().max_by(|(value, row), (other_value, other)| {
        scale.compare(value, other_value).then_with(|| by_key(&row.key, &other.key))
    });
    Ok(winner.map(|(_, row)| row))
}

/// The one transaction that gives the flag to the winner: all others lose it first, for only one row may have it at any time.
/// `ids`: a conflict of each row.
pub fn coronation(node: &str, ids: &BTreeMap<String, i64>, flag: &str, rows: &Rows, winner: Option<&Row>) -> Step {
    let others = rows.values().filter(|row| winner.is_none_or(|winner| winner.key != row.key));
    let changes = others.map(|row| (row, false)).chain(winner.map(|winner| (winner, true)));
    let rows = changes.filter_map(|(row, set)| {
        let id = ids.get(&row.key.to_string())?;
        Some((*id, row.key.clone(), json!({flag: set})))
    });
    Step::Assign { node: node.to_owned(), rows: rows.collect() }
}

/// Whether the flag is where it belongs in these rows.
pub fn is_crowned(flag: &str, rows: &Rows, winner: Option<&Row>) -> bool {
    rows.values().all(|row| {
        let wins = winner.is_some_and(|winner| winner.key == row.key);
        row.tuple.get(flag) == Some(&Value::Bool(wins))
    })
}

/// Whether all nodes have the same rows, as far as they can be seen.
pub fn are_alike(nodes: &BTreeMap<String, Rows>, handles: &Handles) -> bool {
    all_keys(handles).into_iter().all(|key| {
        let mut all = seeing(nodes, handles, key).map(|(_, rows, _)| rows.get(key));
        all.next().is_none_or(|first| all.all(|row| row == first))
    })
}

fn all_keys(handles: &Handles) -> BTreeSet<&str> {
    handles.values().flat_map(BTreeMap::keys).map(String::as_str).collect()
}

/// The nodes on which that row can be seen, with their rows and a conflict of it.
fn seeing<'a>(
    nodes: &'a BTreeMap<String, Rows>,
    handles: &'a Handles,
    key: &'a str,
) -> impl Iterator<Item = (&'a str, &'a Rows, i64)> {
    handles.iter().filter_map(move |(node, keys)| Some((node.as_str(), nodes.get(node)?, *keys.get(key)?)))
}

/// The node whose rows are right. That is the winner's; should it have lost the winning row meanwhile, which an update of a
/// missing row that was let in comes to, or not be seen, a node that has it.
pub fn authority<'a>(winner: &Version, nodes: &'a BTreeMap<String, Rows>) -> Option<&'a str> {
    let key = winner.key.to_string();
    let origin = nodes.get_key_value(&winner.origin);
    let by_row = || nodes.iter().find(|(_, rows)| rows.contains_key(&key));
    let (name, _) = match origin {
        Some((_, rows)) if winner.tuple.is_null() || rows.contains_key(&key) => origin,
        _ => by_row().or(origin).or_else(|| nodes.first_key_value()),
    }?;
    Some(name)
}

fn writable(sights: &[Sight], node: &str) -> bool {
    sights.iter().any(|sight| sight.node == node && sight.up)
}

/// What makes the other nodes' rows equal to those of `authority`; a row that cannot be seen there is right on a node that has
/// it. An error says what cannot be done and why.
pub fn mend(
    authority: &str,
    nodes: &BTreeMap<String, Rows>,
    handles: &Handles,
    sights: &[Sight],
) -> Result<Vec<Step>, String> {
    let (mut removals, mut rewritten, mut puts) = (Vec::new(), BTreeMap::<&str, Vec<_>>::new(), Vec::new());
    for key in all_keys(handles) {
        let seeing: Vec<_> = seeing(nodes, handles, key).collect();
        let right = seeing.iter().find(|(node, ..)| *node == authority);
        let right = right.or_else(|| seeing.iter().find(|(_, rows, _)| rows.contains_key(key))).or(seeing.first());
        let Some((best, rows, best_id)) = right else { continue };
        let right = rows.get(key);
        for (node, rows, id) in seeing.iter().filter(|(node, ..)| node != best) {
            let (node, id) = ((*node).to_owned(), *id);
            match (right, rows.get(key)) {
                (right, row) if right == row => {}
                // Rewriting replicates in its place among all other changes; writing a copy does where that cannot be. An
                // update of a row that is not there does nothing.
                (Some(right), Some(_)) if writable(sights, best) => {
                    let changes = rewritten.entry(*best).or_default();
                    let change = (*best_id, right.key.clone(), json!({}));
                    if !changes.contains(&change) {
                        changes.push(change);
                    }
                }
                (Some(right), _) => puts.push(Step::Put { node, id, tuple: right.tuple.clone() }),
                (None, Some(row)) if writable(sights, &node) => {
                    removals.push(Step::Remove { node, id, key: row.key.clone() });
                }
                (None, _) => {
                    return Err(format!("{node} is down, so its row {key}, which lost, cannot be deleted there"));
                }
            }
        }
    }
    let mut steps = removals;
    steps.extend(rewritten.into_iter().map(|(node, rows)| Step::Assign { node: node.to_owned(), rows }));
    steps.extend(puts);
    Ok(steps)
}

/// What is done about rows that some of the nodes cannot be asked for.
#[derive(Debug, Default, PartialEq)]
pub struct Spread {
    /// This makes those nodes' rows as the others have them, or has them say that they lack one: their keys and steps.
    pub steps: BTreeMap<String, Vec<Step>>,
    /// Nodes whose rows stay unknown.
    pub unknown: BTreeSet<String>,
}

/// A node that met no conflict of a row cannot be asked for it, but follows what is written elsewhere: a row that is here is
/// rewritten; one that lost and was removed on its node only is put back there for the moment that deleting it takes; and a
/// winner that a later change of the loser has deleted on its own node comes back. To be done where all is alike otherwise.
pub fn spread(
    winner: &Version,
    group: &[Conflict],
    nodes: &BTreeMap<String, Rows>,
    handles: &Handles,
    connected: &[String],
    sights: &[Sight],
) -> Spread {
    let mut spread = Spread::default();
    for key in all_keys(handles) {
        let lacking = connected.iter().filter(|node| handles.get(*node).is_none_or(|keys| !keys.contains_key(key)));
        let lacking: BTreeSet<String> = lacking.cloned().collect();
        if lacking.is_empty() {
            continue;
        }
        let seeing: Vec<_> = seeing(nodes, handles, key).collect();
        let id_on = |node: &str| seeing.iter().find(|(name, ..)| *name == node).map(|(.., id)| *id);
        let rewrite =
            |node: &str, id, key: &Value| Step::Assign { node: node.into(), rows: vec![(id, key.clone(), json!({}))] };
        let holders: Vec<_> =
            seeing.iter().filter_map(|(node, rows, id)| Some((*node, &rows.get(key)?.key, *id))).collect();
        let steps = if holders.is_empty() {
            let wins = is_key(&winner.key, key) && winner.tuple.is_object();
            let found = match id_on(&winner.origin).filter(|_| wins) {
                Some(id) => Some((winner.origin.as_str(), id, &winner.tuple, true)),
                None => removed(winner, group, key).and_then(|(node, tuple)| Some((node, id_on(node)?, tuple, false))),
            };
            // Nobody but the nodes that lack it has ever changed it.
            let Some((node, id, tuple, comes_back)) = found else { continue };
            let then = match comes_back {
                true => rewrite(node, id, &winner.key),
                false => Step::Remove { node: node.into(), id, key: serde_json::from_str(key).unwrap_or_default() },
            };
            let possible = writable(sights, node) && is_whole(tuple, group);
            possible.then(|| vec![Step::Put { node: node.into(), id, tuple: tuple.clone() }, then])
        } else {
            let able = holders.iter().filter(|(node, ..)| writable(sights, node));
            let able = able.max_by_key(|(node, ..)| *node == winner.origin);
            able.map(|(node, key, id)| vec![rewrite(node, *id, key)])
        };
        match steps {
            Some(steps) => drop(spread.steps.insert(key.to_owned(), steps)),
            None => spread.unknown.extend(lacking),
        }
    }
    spread
}

/// A row that lost and is gone from its node only, with that node.
fn removed<'a>(winner: &Version, group: &'a [Conflict], key: &str) -> Option<(&'a str, &'a Value)> {
    group.iter().find_map(|conflict| match side(winner, conflict) {
        Keep::Remote if conflict.is_clash() => {
            let local = conflict.local_conflicts.iter().find(|local| is_key(&local.key, key))?;
            Some((conflict.node.as_str(), &local.tuple))
        }
        Keep::Local if conflict.is_missing() && is_key(&conflict.replica_identity, key) => {
            Some((conflict.node.as_str(), &conflict.remote_tuple))
        }
        _ => None,
    })
}

fn is_key(key: &Value, text: &str) -> bool {
    let own = key.to_string();
    own == text
}

/// Whether a row in the log of one of these is the whole row: not cut, and all of it was sent.
fn is_whole(tuple: &Value, group: &[Conflict]) -> bool {
    let cut = |value: &Value| value.get("cut").is_some() && value.get("begin").is_some();
    let lacks = |conflict: &Conflict| conflict.tuple_complete == Some(false) && conflict.remote_tuple == *tuple;
    tuple.as_object().is_some_and(|tuple| !tuple.values().any(cut)) && !group.iter().any(lacks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Environment, Strategy};
    use crate::conflict::LocalRow;
    use proptest::prelude::*;
    use proptest::strategy::Strategy as _;
    use std::borrow::Borrow;

    fn config(nodes: &[&str], more: &str) -> Config {
        let nodes: String =
            nodes.iter().map(|node| format!("[[node]]\nname='{node}'\nhost='{node}.example.net'\n")).collect();
        let text = format!("user='u'\n{more}\n{nodes}");
        Config::parse(&text, &Environment { variable: &|_| None, os_user: None }).unwrap()
    }

    fn pair() -> Config {
        config(&["a", "b"], "")
    }

    fn key(id: i64) -> Value {
        json!({"id": id})
    }

    fn command(id: i64, created: &str, active: bool) -> Value {
        json!({"id": id, "cmdname": "hi", "active": active, "created": created})
    }

    /// On `node`, a row that came from `peer` and one of `node` itself, each with the time of its commit.
    fn clash(node: &str, id: i64, peer: &str, incoming: (&Value, &str), local: (&Value, &str)) -> Conflict {
        let id_of = |row: &Value| key(row["id"].as_i64().unwrap());
        Conflict {
            node: node.into(),
            peer: Some(peer.into()),
            id,
            conflict_type: "insert_exists".into(),
            schemaname: Some("stillebot".into()),
            relname: Some("commands".into()),
            replica_identity: id_of(incoming.0),
            remote_tuple: incoming.0.clone(),
            remote_commit_ts: Some(incoming.1.into()),
            local_conflicts: vec![LocalRow {
                from: node.into(),
                commit_ts: Some(local.1.into()),
                key: id_of(local.0),
                tuple: local.0.clone(),
                ..LocalRow::default()
            }],
            occurrences: 1,
            status: "open".into(),
            operation: Some("insert".into()),
            blocking: true,
            ..Conflict::default()
        }
    }

    const EARLY: &str = "2026-11-23T07:00:00.5+00:00";
    const LATE: &str = "2026-11-23T09:00:00+01:00";

    /// Both sides of one quarrel: the row 1 of a, the row 2 of b.
    fn quarrel(one: &Value, one_at: &str, two: &Value, two_at: &str) -> Vec<Conflict> {
        vec![clash("a", 11, "b", (two, two_at), (one, one_at)), clash("b", 22, "a", (one, one_at), (two, two_at))]
    }

    fn commands() -> Vec<Conflict> {
        quarrel(&command(1, EARLY, true), LATE, &command(2, LATE, true), EARLY)
    }

    fn winner(course: Result<Course, String>) -> (String, Value) {
        match course.unwrap() {
            Course::Keep(version) => (version.origin, version.key),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_row_of_which_not_all_was_sent_is_not_whole() {
        let sent = Conflict { remote_tuple: json!({"id": 1}), ..missing() };
        for (told, whole) in [(None, true), (Some(true), true), (Some(false), false)] {
            let group = [Conflict { tuple_complete: told, ..sent.clone() }];
            assert_eq!(is_whole(&sent.remote_tuple, &group), whole, "{told:?}");
        }
        assert!(!is_whole(&json!({"id": 1, "t": {"cut": 9, "begin": "x"}}), &[]));
    }

    fn missing() -> Conflict {
        let mut conflict = clash("a", 5, "b", (&command(7, EARLY, true), EARLY), (&command(7, EARLY, true), EARLY));
        conflict.local_conflicts.clear();
        Conflict { conflict_type: "update_missing".into(), blocking: false, ..conflict }
    }

    // ---- rules ----

    #[test]
    fn the_first_rule_for_the_table_is_used() {
        let rules = "[[rule]]\ntable='stillebot.commands'\nstrategy='newest'\n[[rule]]\ntable='stillebot.*'\nstrategy='skip'\n\
                     [[rule]]\ntable='*'\nstrategy='none'";
        let config = config(&["a", "b"], rules);
        let rule = |schema: Option<&str>, table: Option<&str>| {
            let conflict = Conflict {
                schemaname: schema.map(str::to_owned),
                relname: table.map(str::to_owned),
                ..Conflict::default()
            };
            rule_for(&config.rules, &conflict).map(|rule| rule.strategy.name())
        };
        assert_eq!(rule(Some("stillebot"), Some("commands")), Some("newest"));
        assert_eq!(rule(Some("stillebot"), Some("config")), Some("skip"));
        assert_eq!(rule(Some("public"), Some("commands")), Some("none"));
        assert_eq!(rule(None, None), Some("none"));
        assert_eq!(rule_for(&config.rules[..2], &Conflict::default()), None);
    }

    // ---- who may ----

    fn sight(node: &str, up: bool, active: Option<&str>) -> Sight {
        Sight { node: node.into(), up, active: active.map(str::to_owned) }
    }

    #[test]
    fn the_active_side_is_what_the_writable_node_says() {
        let config = config(&["a", "b"], "[active]\ntable='t'\ncolumn='c'");
        let side = |sights: &[Sight]| active_side(&config, sights).map(|node| node.name.clone());
        let (a, b) = (Some("a.example.net"), Some("b.example.net"));
        assert_eq!(side(&[sight("a", true, b), sight("b", true, b)]).as_deref(), Some("b"));
        assert_eq!(side(&[sight("a", false, a), sight("b", true, b)]).as_deref(), Some("b"));
        assert_eq!(side(&[sight("b", true, a)]).as_deref(), Some("a"));
        // They differ only while replication between them is broken: one of them decides, for every watcher the same.
        assert_eq!(side(&[sight("b", true, b), sight("a", true, a)]).as_deref(), Some("a"));
        assert_eq!(side(&[sight("a", true, None), sight("b", true, b)]).as_deref(), Some("b"));
        assert_eq!(side(&[sight("a", true, Some("elsewhere"))]), None);
        assert_eq!(side(&[sight("a", false, a), sight("b", false, a)]), None);
        assert_eq!(side(&[]), None);
    }

    #[test]
    fn without_an_active_side_the_first_writable_node_has_the_say() {
        let side = |sights: &[Sight]| active_side(&pair(), sights).map(|node| node.name.clone());
        assert_eq!(side(&[sight("b", true, None), sight("a", true, None)]).as_deref(), Some("a"));
        assert_eq!(side(&[sight("b", true, None), sight("a", false, None)]).as_deref(), Some("b"));
        assert_eq!(side(&[sight("a", false, None)]), None);
    }

    #[test]
    fn ordinary_changes_are_made_on_the_active_side_if_it_met_the_conflict() {
        let config = config(&["a", "b"], "[active]\ntable='t'\ncolumn='c'");
        let active = Some("b.example.net");
        let both_up = [sight("a", true, active), sight("b", true, active)];
        assert_eq!(hand(&config, &both_up, &BTreeSet::from(["a", "b"])), Some("b"));
        assert_eq!(hand(&config, &both_up, &BTreeSet::from(["a"])), Some("a"));
        assert_eq!(
            hand(&config, &[sight("b", false, active), sight("a", true, active)], &["a", "b"].into()),
            Some("a")
        );
        assert_eq!(hand(&config, &[sight("a", false, active)], &["a"].into()), None);
    }

    #[test]
    fn attempts_are_counted_for_each_conflict() {
        let mut attempts = Attempts::default();
        assert_eq!([attempts.begin("a", 1), attempts.begin("a", 1), attempts.begin("b", 1)], [1, 2, 1]);
        attempts.take_back("a", 1);
        assert_eq!(attempts.begin("a", 1), 2);
        attempts.retain("b", &BTreeSet::new());
        attempts.retain("a", &BTreeSet::from([1]));
        assert_eq!((attempts.known("a"), attempts.known("b")), (vec![1], vec![]));
        attempts.forget("a", 1);
        assert_eq!(attempts.begin("a", 1), 1);
    }

    #[test]
    fn what_holds_up_replication_comes_first_and_what_was_tried_just_now_last() {
        let todo = |node: &str, id, blocking| Todo { node: node.into(), id, blocking };
        let all = || vec![todo("a", 1, false), todo("a", 2, false), todo("b", 9, true), todo("c", 8, true)];
        let mut attempts = Attempts::default();
        let next = |attempts: &Attempts, now| {
            let next = attempts.next(all(), Duration::from_secs(now));
            next.map(|todo| (todo.node, todo.id))
        };
        assert_eq!(next(&attempts, 0), Some(("c".into(), 8)));
        attempts.put_off("c", 8, Duration::from_secs(5));
        assert_eq!(next(&attempts, 1), Some(("b".into(), 9)));
        attempts.put_off("b", 9, Duration::from_secs(6));
        assert_eq!(next(&attempts, 2), Some(("a".into(), 1)));
        attempts.put_off("a", 1, Duration::from_secs(3));
        assert_eq!(next(&attempts, 3), Some(("a".into(), 2)));
        assert_eq!(next(&attempts, 5), Some(("c".into(), 8)));
        assert_eq!(attempts.next(Vec::new(), Duration::ZERO), None);
    }

    #[test]
    fn what_is_left_to_a_person_is_counted_by_node_and_table_and_not_tried_again() {
        let mut attempts = Attempts::default();
        let leftover = |why: &str| Leftover { table: "s.t".into(), why: why.into() };
        for (node, id, why) in [("a", 3, "second"), ("a", 2, "first"), ("b", 1, "other")] {
            attempts.leave(node, id, leftover(why));
        }
        attempts.begin("a", 1);
        let left = attempts.left();
        assert_eq!(left[&("a".into(), "s.t".into())], (2, leftover("first"), 2));
        assert_eq!(left.len(), 2);
        let todo = |id| Todo { node: "a".into(), id, blocking: true };
        assert_eq!(attempts.next(vec![todo(2), todo(3)], Duration::MAX), None);
        attempts.forget("a", 2);
        assert_eq!(attempts.next(vec![todo(2), todo(3)], Duration::ZERO), Some(todo(2)));
    }

    // ---- what belongs together ----

    #[test]
    fn the_other_side_is_found() {
        let quarrel = commands();
        let mut other_table = quarrel[1].clone();
        other_table.relname = Some("config".into());
        let other_rows = clash("b", 23, "a", (&command(3, EARLY, true), EARLY), (&command(4, EARLY, true), EARLY));
        let candidates = [other_table, other_rows, quarrel[1].clone()];
        assert_eq!(counterpart(&quarrel[0], &candidates).map(|c| c.id), Some(22));
        assert_eq!(counterpart(&quarrel[0], &candidates[..2]), None);
        // The same key on both sides.
        let row = command(9, EARLY, true);
        let same = [clash("a", 1, "b", (&row, EARLY), (&row, LATE)), clash("b", 2, "a", (&row, LATE), (&row, EARLY))];
        assert_eq!(counterpart(&same[0], &same[1..]).map(|c| c.id), Some(2));
        // A missing row is no quarrel, though its key be the same.
        assert_eq!(counterpart(&Conflict { node: "b".into(), ..missing() }, &same), None);
    }

    #[test]
    fn a_group_holds_together_through_its_rows() {
        let [one, two, three] = [1, 2, 3].map(|id| command(id, EARLY, true));
        let all = [
            clash("a", 1, "b", (&two, EARLY), (&one, EARLY)),
            clash("c", 2, "b", (&two, EARLY), (&three, EARLY)),
            clash("b", 3, "a", (&three, EARLY), (&command(8, EARLY, true), EARLY)),
            clash("b", 4, "a", (&command(9, EARLY, true), EARLY), (&command(10, EARLY, true), EARLY)),
        ];
        let found = group(&all[0], &all);
        assert_eq!(found.iter().map(|c| c.id).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(keys(&found), [key(1), key(2), key(3), key(8)]);
        // What is known of the conflict itself is renewed.
        let fresh = Conflict { occurrences: 9, ..all[0].clone() };
        assert_eq!(group(&all[0], &[fresh])[0].occurrences, 9);
    }

    // ---- who wins ----

    #[test]
    fn a_wish_is_for_the_node_that_the_conflict_is_named_by() {
        let group = commands();
        for (wish, at, expected) in [
            (Wish::Local, 0, ("a", 1)),
            (Wish::Remote, 0, ("b", 2)),
            (Wish::Local, 1, ("b", 2)),
            (Wish::Remote, 1, ("a", 1)),
            // Committed at a: 08:00:00, at b: 07:00:00.5.
            (Wish::Newest, 0, ("a", 1)),
            (Wish::Newest, 1, ("a", 1)),
        ] {
            let found = winner(course_of_wish(wish, &group[at], &group));
            assert_eq!(found, (expected.0.to_owned(), key(expected.1)), "{wish:?} {at}");
        }
    }

    #[test]
    fn rules_choose_by_column_by_time_by_node() {
        let group = commands();
        let rule = |strategy: Strategy| winner(course_of_rule(&strategy, &group[0], &group)).0;
        assert_eq!(rule(Strategy::Newest { by: Some("created".into()) }), "b");
        assert_eq!(rule(Strategy::Newest { by: None }), "a");
        assert_eq!(rule(Strategy::KeepNode("b".into())), "b");
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let group = commands();
        let flaw = |strategy: Strategy, conflict: &Conflict, group: &[Conflict]| {
            course_of_rule(&strategy, conflict, group).unwrap_err()
        };
        let newest = |by: Option<&str>| Strategy::Newest { by: by.map(str::to_owned) };
        assert!(flaw(newest(Some("sighted")), &group[0], &group).contains("no column sighted"));
        assert!(flaw(Strategy::KeepNode("c".into()), &group[0], &group).contains("none of the versions is of c"));
        let mut unknown = group.clone();
        unknown[0].local_conflicts[0].commit_ts = None;
        assert!(flaw(newest(None), &unknown[0], &unknown).contains("is not known"));
        unknown[1].peer = None;
        unknown[1].subscription = "reports".into();
        assert!(flaw(newest(None), &unknown[0], &unknown).contains("subscription reports on b leads to no node"));
        let error = Conflict { conflict_type: "apply_error".into(), ..group[0].clone() };
        assert!(flaw(newest(None), &error, &[]).contains("skip the transaction"));
        assert!(flaw(newest(None), &missing(), &[missing()]).contains("is not known"));
        assert!(flaw(newest(Some("created")), &missing(), &[missing()]).contains("is not on a"));
        assert!(flaw(Strategy::Skip, &missing(), &[]).contains("nothing to skip"));
        let deactivate = || Strategy::DeactivateOlder { flag: "active".into(), by: "created".into() };
        assert!(flaw(deactivate(), &error, &[]).contains("not for apply_error"));
        let same = quarrel(&command(1, EARLY, true), EARLY, &command(1, LATE, true), LATE);
        assert!(flaw(deactivate(), &same[0], &same).contains("makes no room"));
        assert!(course_of_rule(&deactivate(), &group[0], &group).is_ok());
        let none = Conflict { local_conflicts: Vec::new(), ..group[0].clone() };
        assert!(course_of_wish(Wish::Local, &none, &[]).is_err());
    }

    // ---- steps ----

    fn keeps(course: &Course, group: &[Conflict]) -> Vec<(String, Keep)> {
        let steps = group.iter().filter_map(|conflict| answer(course, conflict));
        steps
            .map(|step| match step {
                Step::Resolve { node, keep, .. } => (node, keep),
                other => panic!("{other}"),
            })
            .collect()
    }

    #[test]
    fn the_winner_stays_and_the_loser_gives_way() {
        let group = commands();
        let course = course_of_wish(Wish::Local, &group[0], &group).unwrap();
        assert_eq!(keeps(&course, &group), [("a".into(), Keep::Local), ("b".into(), Keep::Remote)]);
        let steps = plan(&course, &group);
        assert_eq!(steps[2], Step::WaitApplied { conflicts: vec![("a".into(), 11), ("b".into(), 22)] });
        // One side alone is answered alike.
        assert_eq!(keeps(&course, &group[1..]), [("b".into(), Keep::Remote)]);
        // What is done already is not done again.
        let passed: Vec<Conflict> = group.iter().map(|c| Conflict { blocking: false, ..c.clone() }).collect();
        assert!(plan(&course, &passed).is_empty());
        let closed: Vec<Conflict> = group.iter().map(|c| Conflict { status: "resolved".into(), ..c.clone() }).collect();
        assert!(plan(&course, &closed).is_empty());
    }

    #[test]
    fn all_rows_of_the_winners_node_come_in() {
        // Two rows of a are in the way of one of b; there each of them comes in by itself.
        let [one, two, three] = [(1, LATE), (2, EARLY), (3, EARLY)].map(|(id, at)| command(id, at, true));
        let mut at_a = clash("a", 1, "b", (&three, EARLY), (&one, LATE));
        at_a.local_conflicts.push(LocalRow { key: key(2), tuple: two.clone(), ..at_a.local_conflicts[0].clone() });
        let group = [
            at_a,
            clash("b", 2, "a", (&one, LATE), (&three, EARLY)),
            clash("b", 3, "a", (&two, LATE), (&three, EARLY)),
        ];
        let strategy = Strategy::Newest { by: Some("created".into()) };
        let course = course_of_rule(&strategy, &group[0], &group).unwrap();
        assert_eq!(
            keeps(&course, &group),
            [("a".into(), Keep::Local), ("b".into(), Keep::Remote), ("b".into(), Keep::Remote)]
        );
    }

    #[test]
    fn with_three_nodes_the_version_goes_by_who_wrote_it() {
        // b and c wrote at once; a has c's row already, and b's comes in.
        let [of_b, of_c] = [2, 3].map(|id| command(id, EARLY, true));
        let mut at_a = clash("a", 1, "b", (&of_b, EARLY), (&of_c, LATE));
        at_a.local_conflicts[0].from = "c".into();
        let group = [
            at_a,
            clash("b", 2, "c", (&of_c, LATE), (&of_b, EARLY)),
            clash("c", 3, "b", (&of_b, EARLY), (&of_c, LATE)),
        ];
        let local = course_of_wish(Wish::Local, &group[0], &group).unwrap();
        let expected = |a, b, c| [("a".to_owned(), a), ("b".to_owned(), b), ("c".to_owned(), c)];
        assert_eq!(keeps(&local, &group), expected(Keep::Local, Keep::Remote, Keep::Local));
        let remote = course_of_wish(Wish::Remote, &group[0], &group).unwrap();
        assert_eq!(keeps(&remote, &group), expected(Keep::Remote, Keep::Local, Keep::Remote));
    }

    #[test]
    fn a_missing_row_stays_away_or_comes() {
        let course = |wish| course_of_wish(wish, &missing(), &[missing()]).unwrap();
        assert_eq!(keeps(&course(Wish::Local), &[missing()]), [("a".into(), Keep::Local)]);
        assert_eq!(keeps(&course(Wish::Remote), &[missing()]), [("a".into(), Keep::Remote)]);
        let node = course_of_rule(&Strategy::KeepNode("a".into()), &missing(), &[missing()]).unwrap();
        assert_eq!(node, course(Wish::Local));
    }

    #[test]
    fn a_deleted_row_stays_away_if_the_rule_says_so() {
        let course = course_of_rule(&Strategy::LetDeleteWin, &missing(), &[missing()]).unwrap();
        assert_eq!(keeps(&course, &[missing()]), [("a".into(), Keep::Local)]);
        assert!(course_of_rule(&Strategy::LetDeleteWin, &commands()[0], &commands()).is_err());
    }

    #[test]
    fn room_is_made_on_both_sides() {
        let group = commands();
        let course = Course::Deactivate { flag: "active".into(), by: "created".into() };
        let assignments = json!({"active": false});
        let room = |node: &str, id| Step::MakeRoom { node: node.into(), id, assignments: assignments.clone() };
        assert_eq!(plan(&course, &group)[..2], [room("a", 11), room("b", 22)]);
    }

    // ---- after replication goes on ----

    fn rows(tuples: &[impl Borrow<Value>]) -> Rows {
        let row = |tuple: &Value| Row { key: json!({"id": tuple["id"]}), tuple: tuple.clone() };
        tuples.iter().map(Borrow::borrow).map(row).map(|row| (row.key.to_string(), row)).collect()
    }

    fn crowned(group: &[Conflict], tuples: &[Value]) -> Option<i64> {
        let rows = rows(tuples);
        crown("active", "created", group, &rows).unwrap().map(|row| row.tuple["id"].as_i64().unwrap())
    }

    #[test]
    fn the_newest_claimant_gets_the_flag() {
        let group = commands();
        // As a has them after room was made there: its own row is not active, the one of b is.
        assert_eq!(crowned(&group, &[command(1, EARLY, false), command(2, LATE, true)]), Some(2));
        assert_eq!(crowned(&group, &[command(1, LATE, false), command(2, EARLY, true)]), Some(1));
        assert_eq!(crowned(&group, &[command(1, EARLY, false), command(2, EARLY, true)]), Some(2));
        // One side alone, and the other node deactivated its row itself meanwhile: it claims nothing.
        assert_eq!(crowned(&group[..1], &[command(1, EARLY, false), command(2, LATE, false)]), Some(1));
        // A row that is gone gets nothing.
        assert_eq!(crowned(&group, &[command(1, EARLY, false)]), Some(1));
        assert_eq!(crowned(&group, &[]), None);
        assert_eq!(crowned(&[], &[command(1, EARLY, false)]), None);
        assert!(crown("active", "made", &group, &rows(&[command(1, EARLY, true)])).is_err());
        assert!(crown("on", "created", &group, &rows(&[command(1, EARLY, true)])).is_err());
    }

    #[test]
    fn the_losers_lose_the_flag_before_the_winner_gets_it() {
        let rows = rows(&[command(1, EARLY, false), command(2, LATE, true), command(3, EARLY, true)]);
        let winner = rows.values().next();
        let ids: BTreeMap<String, i64> = rows.keys().map(|key| (key.clone(), 11)).collect();
        let Step::Assign { node, rows: changes } = coronation("a", &ids, "active", &rows, winner) else { panic!() };
        assert_eq!(node, "a");
        let (off, on) = (json!({"active": false}), json!({"active": true}));
        assert_eq!(changes, [(11, key(2), off.clone()), (11, key(3), off), (11, key(1), on)]);
        assert!(!is_crowned("active", &rows, winner));
        let right = self::rows(&[command(1, EARLY, true), command(2, LATE, false)]);
        assert!(is_crowned("active", &right, right.values().next()));
        assert!(!is_crowned("active", &right, None));
    }

    #[test]
    fn the_nodes_are_made_alike() {
        let both = [sight("a", true, None), sight("b", true, None)];
        let b_down = [sight("a", true, None), sight("b", false, None)];
        let a_down = [sight("a", false, None), sight("b", true, None)];
        let handles =
            [("a", 11), ("b", 22)].map(|(node, id)| (node.to_owned(), BTreeMap::from([(key(1).to_string(), id)])));
        let handles = Handles::from(handles);
        let nodes = |a: &[&Value], b: &[&Value]| BTreeMap::from([("a".to_owned(), rows(a)), ("b".to_owned(), rows(b))]);
        let mend = |nodes: &BTreeMap<String, Rows>, sights: &[Sight]| mend("a", nodes, &handles, sights);
        let are_alike = |nodes: &BTreeMap<String, Rows>| are_alike(nodes, &handles);
        let (row, other) = (command(1, EARLY, true), command(1, LATE, true));
        let put = Step::Put { node: "b".into(), id: 22, tuple: row.clone() };

        assert!(are_alike(&nodes(&[&row], &[&row])) && are_alike(&BTreeMap::new()));
        assert_eq!(mend(&nodes(&[&row], &[&row]), &both), Ok(Vec::new()));
        let differs = nodes(&[&row], &[&other]);
        assert!(!are_alike(&differs));
        let rewrite = Step::Assign { node: "a".into(), rows: vec![(11, key(1), json!({}))] };
        assert_eq!(mend(&differs, &both), Ok(vec![rewrite]));
        assert_eq!(mend(&differs, &a_down), Ok(vec![put.clone()]));
        assert_eq!(mend(&nodes(&[&row], &[]), &both), Ok(vec![put]));
        let surplus = nodes(&[], &[&row]);
        assert_eq!(mend(&surplus, &both), Ok(vec![Step::Remove { node: "b".into(), id: 22, key: key(1) }]));
        assert!(mend(&surplus, &b_down).unwrap_err().contains("b is down"));
    }

    #[test]
    fn the_winners_node_knows_best_unless_it_has_lost_the_row() {
        let nodes = |a: &[&Value], b: &[&Value]| BTreeMap::from([("a".to_owned(), rows(a)), ("b".to_owned(), rows(b))]);
        let row = command(7, EARLY, true);
        let of = |wish| match course_of_wish(wish, &missing(), &[missing()]).unwrap() {
            Course::Keep(version) => version,
            other => panic!("{other:?}"),
        };
        assert_eq!(authority(&of(Wish::Remote), &nodes(&[&row], &[&row])), Some("b"));
        assert_eq!(authority(&of(Wish::Remote), &nodes(&[&row], &[])), Some("a"));
        assert_eq!(authority(&of(Wish::Local), &nodes(&[], &[&row])), Some("a"));
        assert_eq!(authority(&of(Wish::Remote), &nodes(&[], &[])), Some("b"));
        assert_eq!(authority(&of(Wish::Remote), &BTreeMap::new()), None);
        assert_eq!(authority(&of(Wish::Remote), &BTreeMap::from([("a".to_owned(), rows(&[&row]))])), Some("a"));
    }

    #[test]
    fn rows_that_a_node_cannot_be_asked_for_are_spread() {
        let [up, down] = [true, false].map(|b_up| [sight("a", true, None), sight("b", b_up, None)]);
        let connected = ["a".to_owned(), "b".to_owned()];
        let (of_a, of_b) = (command(1, EARLY, true), command(1, LATE, true));
        // Only b met it: a had deleted its row when that of b came.
        let group = [clash("b", 22, "a", (&of_a, EARLY), (&of_b, LATE))];
        let spread = |wish, at_b: &[&Value], sights: &[Sight]| {
            let Course::Keep(winner) = course_of_wish(wish, &group[0], &group).unwrap() else { panic!() };
            let nodes = BTreeMap::from([("b".to_owned(), rows(at_b))]);
            let mut spread = spread(&winner, &group, &nodes, &handles(&group), &connected, sights);
            (
                spread.steps.remove(&key(1).to_string()).unwrap_or_default(),
                spread.unknown.into_iter().collect::<Vec<_>>(),
            )
        };
        let put = |tuple: &Value| Step::Put { node: "b".into(), id: 22, tuple: tuple.clone() };
        let rewrite = || Step::Assign { node: "b".into(), rows: vec![(22, key(1), json!({}))] };
        let remove = Step::Remove { node: "b".into(), id: 22, key: key(1) };
        assert_eq!(spread(Wish::Local, &[&of_b], &up), (vec![rewrite()], vec![]));
        assert_eq!(spread(Wish::Local, &[], &up), (vec![put(&of_b), rewrite()], vec![]));
        assert_eq!(spread(Wish::Remote, &[], &up), (vec![put(&of_b), remove], vec![]));
        assert_eq!(spread(Wish::Remote, &[&of_a], &up), (vec![rewrite()], vec![]));
        assert_eq!(spread(Wish::Local, &[&of_b], &down), (vec![], vec!["a".to_owned()]));
        assert_eq!(spread(Wish::Remote, &[&of_a], &down), (vec![], vec!["a".to_owned()]));
    }

    // ---- properties ----

    fn created() -> impl proptest::strategy::Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            (0_i64..4).prop_map(Value::from),
            prop_oneof![Just(EARLY), Just(LATE), Just("2026-11-23T08:00:00Z")].prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from),
        ]
    }

    fn times() -> impl proptest::strategy::Strategy<Value = &'static str> {
        prop_oneof![Just(EARLY), Just(LATE), Just("2026-11-23T08:00:00+00:00")]
    }

    prop_compose! {
        /// Two nodes that wrote at once; the same key or not.
        fn any_quarrel()(ids in (1_i64..4, 1_i64..4), by in (created(), created()), at in (times(), times())) -> Vec<Conflict> {
            let row = |id: i64, by: Value| json!({"id": id, "created": by, "active": true});
            quarrel(&row(ids.0, by.0), at.0, &row(ids.1, by.1), at.1)
        }
    }

    fn strategies() -> Vec<Strategy> {
        vec![
            Strategy::Newest { by: Some("created".into()) },
            Strategy::Newest { by: None },
            Strategy::KeepNode("a".into()),
        ]
    }

    proptest! {
        #[test]
        fn the_winner_is_the_same_from_both_nodes(group in any_quarrel()) {
            let reversed: Vec<Conflict> = group.iter().rev().cloned().collect();
            for strategy in strategies() {
                let course = course_of_rule(&strategy, &group[0], &group).unwrap();
                prop_assert_eq!(&course, &course_of_rule(&strategy, &group[1], &group).unwrap());
                prop_assert_eq!(&course, &course_of_rule(&strategy, &group[1], &reversed).unwrap());
                // With one side alone, too, the same version wins, on either node.
                for side in &group {
                    let alone = course_of_rule(&strategy, side, std::slice::from_ref(side)).unwrap();
                    prop_assert_eq!(&course, &alone);
                }
                // One node keeps what it has, and the other lets it in.
                let kept: Vec<Keep> = keeps(&course, &group).into_iter().map(|(_, keep)| keep).collect();
                prop_assert!(kept == [Keep::Local, Keep::Remote] || kept == [Keep::Remote, Keep::Local]);
            }
        }

        #[test]
        fn swapping_the_nodes_swaps_nothing_but_names(group in any_quarrel()) {
            // The same two rows, written on the other node each.
            let name = |node: &str| if node == "a" { "b".to_owned() } else { "a".to_owned() };
            let swapped: Vec<Conflict> = group.iter().map(|conflict| {
                let mut conflict = conflict.clone();
                conflict.peer = conflict.peer.as_deref().map(name);
                conflict.node = name(&conflict.node);
                conflict.local_conflicts.iter_mut().for_each(|row| row.from = name(&row.from));
                conflict
            }).collect();
            for strategy in &strategies()[..2] {
                let (course, other) = (
                    course_of_rule(strategy, &group[0], &group).unwrap(),
                    course_of_rule(strategy, &swapped[0], &swapped).unwrap(),
                );
                let (Course::Keep(one), Course::Keep(other)) = (course, other) else { panic!() };
                prop_assert_eq!((one.key, one.tuple), (other.key, other.tuple));
            }
        }

        #[test]
        fn a_crown_does_not_depend_on_where_the_rows_are_looked_at(group in any_quarrel(), flags in any::<(bool, bool)>()) {
            prop_assume!(group[0].replica_identity != group[1].replica_identity);
            let with = |tuple: &Value, flag: bool| { let mut tuple = tuple.clone(); tuple["active"] = flag.into(); tuple };
            let (one, two) = (&group[0].local_conflicts[0].tuple, &group[1].local_conflicts[0].tuple);
            let id = |rows: &Rows, group: &[Conflict]| {
                crown("active", "created", group, rows).unwrap().map(|row| row.key.clone())
            };
            let reversed: Vec<Conflict> = group.iter().rev().cloned().collect();
            let here = rows(&[with(one, flags.0), with(two, flags.1)]);
            let there = rows(&[with(two, !flags.1), with(one, !flags.0)]);
            prop_assert_eq!(id(&here, &group), id(&there, &reversed));
        }
    }
}
