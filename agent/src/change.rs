//! A change of the schema on all nodes: its steps, and the decisions between them.
//!
//! Deliberately without any IO: what was seen on the nodes goes in, what is to be done comes out; `cmd/change.rs` does it. A
//! run that was killed leaves three traces, and a later one goes by them: why a node was taken down ([`Closed`]), the
//! transactions that were prepared, and the journal, whose row is committed with the change itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::facts::State;
use crate::hop::{self, Refusal, Step};
use crate::schema::{Object, Schema, short};

/// How much is shown of a definition.
const SHOWN: usize = 160;

/// All steps in their order. `run` has a command where `apply` has its trial, change and commit.
pub const TABLE: [Step; 11] = [
    Step {
        name: "lock",
        does: "connect to every node and take its advisory lock",
        undo: "the lock goes with the connection",
        why_here: "first: neither a hop nor another change may come between",
    },
    Step {
        name: "preflight",
        does: "look at every node: state, replication, traces of an earlier change, schemas alike",
        undo: "nothing was changed",
        why_here: "before a single write is refused",
    },
    Step {
        name: "trial",
        does: "run the file in a transaction and roll it back, on nodes that are down first, until one would change; all that lack \
               it, if an earlier run is finished",
        undo: "it is rolled back",
        why_here: "a file that changes nothing, or fails, must not take a node down",
    },
    Step {
        name: "close",
        does: "take the writable nodes down, with a reason that says how they were",
        undo: "open again, as they were",
        why_here: "before the change: rows of the old form must not meet tables of the new one",
    },
    Step {
        name: "drain",
        does: "wait until every node has applied every write of the others",
        undo: "nothing was changed",
        why_here: "after close, when no write can be added",
    },
    Step {
        name: "window",
        does: "open a maintenance window on every node",
        undo: "it closes with the session, or by itself",
        why_here: "as late as possible: it is the only way in",
    },
    Step {
        name: "change",
        does: "run the file on every node, or the command",
        undo: "the transactions are rolled back",
        why_here: "all of them are ready before the first is committed",
    },
    Step {
        name: "commit",
        does: "prepare everywhere and then commit, or commit one after the other; each with its row of the journal",
        undo: "none: what one node has committed is finished on the others",
        why_here: "the point of no return, so everything that can fail comes before it",
    },
    Step {
        name: "compare",
        does: "close the windows, say in every journal that the change is whole, and compare the schemas of all nodes",
        undo: "none; nodes that are not alike stay down",
        why_here: "what one node has and another lacks must not be found by replication, nor by refresh",
    },
    Step {
        name: "refresh",
        does: "refresh all subscriptions without copying",
        undo: "none",
        why_here: "new tables are there on both ends, and still empty or filled alike",
    },
    Step {
        name: "reopen",
        does: "open the nodes that were up, as they were",
        undo: "none",
        why_here: "last: writes may go on",
    },
];

/// The names of the steps, in their order.
pub const STEPS: [&str; TABLE.len()] = hop::names(&TABLE);

/// Why a node was taken down, as its state keeps it: says to a later run which change it was, and how the node was before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// Of the change.
    pub id: String,
    /// The node was the only writable one.
    pub sole: bool,
}

const REASON: &str = "schema change ";
const WAS_SOLE: &str = ", the only writable node before";
const WAS_UP: &str = ", up before";

impl Closed {
    /// As a reason. `what` is the file or command.
    pub fn reason(&self, what: &str) -> String {
        let was = if self.sole { WAS_SOLE } else { WAS_UP };
        let what: String = what.chars().filter(|letter| !letter.is_control()).take(80).collect();
        format!("{REASON}{} ({what}){was}", self.id)
    }

    /// From a reason, if it is one of these.
    pub fn parse(reason: &str) -> Option<Self> {
        let id = Self::id(reason)?;
        Some(Self { id: id.to_owned(), sole: reason.ends_with(WAS_SOLE) })
    }

    fn id(reason: &str) -> Option<&str> {
        let (id, _) = reason.strip_prefix(REASON)?.split_once(' ')?;
        (reason.ends_with(WAS_SOLE) || reason.ends_with(WAS_UP)).then_some(id)
    }

    /// The file or program in a reason.
    fn what(reason: &str) -> &str {
        let inside = reason.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')'));
        inside.map_or("", |(what, _)| what)
    }
}

/// A row of a node's journal.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Entry {
    /// Of the change.
    pub id: String,
    /// Its file.
    pub file: String,
    /// Of the file's content.
    pub sha256: String,
    /// What it is for.
    pub nodes: Vec<String>,
    /// It is committed on all of them. An extension before 0.6 does not say.
    #[serde(default)]
    pub done: bool,
}

/// A change that is prepared on a node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Prepared {
    /// Of the change.
    pub id: String,
    /// What the transaction is called.
    pub gid: String,
    /// Who may end it.
    pub owner: String,
}

/// The traces of changes on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Traces {
    /// Those committed there.
    pub journal: Vec<Entry>,
    /// Those prepared there.
    pub prepared: Vec<Prepared>,
    /// Whether transactions can be prepared.
    pub two_phase: bool,
}

/// What a node tells.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: State,
    /// What changes have left there.
    pub traces: Traces,
}

/// What the transaction of a prepared change is called. Names of prepared transactions are the server's, and two databases of
/// one server may be nodes.
pub fn prepared_name(id: &str, node: &str) -> String {
    format!("stillebot_schema_{id}_{node}")
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Of this change.
    pub id: String,
    /// An earlier run has committed it on some node, so there is no way back.
    pub finishing: bool,
    /// Where the file is still to be run.
    pub run_on: Vec<String>,
    /// Where it is prepared, and to be committed.
    pub commit_on: Vec<String>,
    /// What an earlier run has prepared and nobody has committed: node and id.
    pub roll_back: Vec<(String, String)>,
    /// Writable nodes, each with whether it is the only one.
    pub close: Vec<(String, bool)>,
    /// Nodes to open at the end, each with whether it is the only writable one: those, and what an earlier run has closed.
    pub reopen: Vec<(String, bool)>,
    /// An earlier run has left nodes closed.
    pub resuming: bool,
    /// Prepared everywhere before it is committed anywhere.
    pub two_phase: bool,
}

/// How one schema differs from another, a line for each object; empty if they are alike. `gone`, `new` and `other` say it of an
/// object that only the first has, that only the second has, and that both have.
fn compare(first: &Schema, second: &Schema, gone: &str, new: &str, other: &str) -> Vec<String> {
    let objects: BTreeSet<&Object> = first.keys().chain(second.keys()).collect();
    let line = |object: &&Object| {
        let name = object.path();
        match (first.get(*object), second.get(*object)) {
            (Some(_), None) => Some(format!("{name}: {gone}")),
            (None, Some(_)) => Some(format!("{name}: {new}")),
            (Some(a), Some(b)) if a.text != b.text => {
                Some(format!("{name}: {other}: {} | {}", short(&a.text, SHOWN), short(&b.text, SHOWN)))
            }
            _ => None,
        }
    };
    objects.iter().filter_map(line).collect()
}

/// What nodes do not have in common; each is compared with the first.
pub fn differences(nodes: &[(String, Schema)]) -> Vec<String> {
    let Some(((first, theirs), others)) = nodes.split_first() else { return Vec::new() };
    others
        .iter()
        .flat_map(|(name, schema)| {
            let (gone, new) = (format!("not on {name}"), format!("not on {first}"));
            compare(theirs, schema, &gone, &new, &format!("{first} and {name} differ"))
        })
        .collect()
}

/// What a change would do on a node.
pub fn effects(before: &Schema, after: &Schema) -> Vec<String> {
    compare(before, after, "dropped", "created", "changed")
}

fn refuse<T>(why: impl Into<String>, hint: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { unreachable: false, why: why.into(), hint: hint.into() })
}

/// Decides what to do. `nodes` are all nodes of the configuration; `sha256` is that of the file, none for a command.
pub fn decide(new_id: &str, sha256: Option<&str>, nodes: &[Seen]) -> Result<Plan, Refusal> {
    for node in nodes {
        let (name, state) = (&node.name, &node.state);
        if state.hop.is_some() {
            let to = state.note().map_or_else(|| "NODE".to_owned(), |note| note.to);
            return refuse(
                format!("{name} was closed by an unfinished hop to {to}"),
                format!("finish it with `hop {to} --resume` or undo it with `hop {to} --abort`"),
            );
        }
        if state.state == "maintenance" {
            return refuse(
                format!("a maintenance window is open on {name}"),
                "wait for its end, or end it there: SELECT multihome.close_window()",
            );
        }
        if state.rejoin {
            return refuse(
                format!("{name} is closed because it was the only writable node when it restarted"),
                format!("say what it is to be, `up {name}` or `down {name}`, and run this again"),
            );
        }
    }
    // What is whole is in nobody's way, even if its nodes are still closed.
    let left = left(nodes);
    if let Some(half) = left
        .iter()
        .find(|left| !left.missing_on.is_empty() && left.sha256.is_some() && left.sha256.as_deref() != sha256)
    {
        return refuse(
            format!("an earlier change, of {}, is not committed on {}", half.what, half.missing_on.join(", ")),
            format!("finish it first: `schema apply` with the content that {} had then", half.what),
        );
    }
    let ours = left.into_iter().find(|left| left.sha256.is_some() && left.sha256.as_deref() == sha256);
    let finishing = ours.is_some();
    let (id, missing) = match ours {
        Some(left) => (left.id, left.missing_on),
        None => (new_id.to_owned(), nodes.iter().map(|node| node.name.clone()).collect()),
    };
    let is_prepared = |name: &str| {
        nodes.iter().any(|node| node.name == name && node.traces.prepared.iter().any(|prepared| prepared.id == id))
    };
    let (commit_on, run_on) = missing.into_iter().partition(|name| finishing && is_prepared(name));
    let roll_back = nodes
        .iter()
        .flat_map(|node| node.traces.prepared.iter().map(|prepared| (node.name.clone(), prepared.id.clone())))
        .filter(|(_, prepared)| !(finishing && *prepared == id))
        .collect();
    let close: Vec<(String, bool)> =
        nodes.iter().filter(|node| node.state.is_up()).map(|node| (node.name.clone(), node.state.sole)).collect();
    let left = nodes.iter().filter(|node| !node.state.is_up()).filter_map(|node| {
        let closed = Closed::parse(node.state.reason.as_deref()?)?;
        Some((node.name.clone(), closed.sole))
    });
    let mut reopen: Vec<(String, bool)> = close.iter().cloned().chain(left).collect();
    if reopen.len() > 1 {
        // An operator has opened another node meanwhile: none of several is the only one.
        reopen.iter_mut().for_each(|(_, sole)| *sole = false);
    }
    let resuming = reopen.len() > close.len();
    let two_phase = nodes.iter().all(|node| node.traces.two_phase);
    Ok(Plan { id, finishing, run_on, commit_on, roll_back, close, reopen, resuming, two_phase })
}

/// A change that is not over: some of its nodes lack it, have it prepared, or are still closed for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Left {
    /// Of the change.
    pub id: String,
    /// Its file, or the program of a command; empty if none of those that can be asked knows.
    pub what: String,
    /// Of the file's content, if it is committed anywhere.
    #[serde(skip)]
    pub sha256: Option<String>,
    /// The nodes that have it.
    pub committed_on: Vec<String>,
    /// The nodes that lack it, of those that can be asked.
    pub missing_on: Vec<String>,
    /// The nodes where it is prepared.
    pub prepared_on: Vec<String>,
    /// The nodes that are closed for it.
    pub closed: Vec<String>,
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unfinished schema change {}", self.id)?;
        if !self.what.is_empty() {
            write!(f, " of {}", self.what)?;
        }
        let traces = [
            ("committed on", &self.committed_on),
            ("not on", &self.missing_on),
            ("prepared on", &self.prepared_on),
            ("closed for it:", &self.closed),
        ];
        let traces = traces.iter().filter(|(_, nodes)| !nodes.is_empty());
        let traces: Vec<String> = traces.map(|(what, nodes)| format!("{what} {}", nodes.join(" and "))).collect();
        write!(f, ": {}; run that `schema` command again", traces.join(", "))
    }
}

/// The changes that are not over, as far as these nodes know.
pub fn left(nodes: &[Seen]) -> Vec<Left> {
    let mut all: BTreeMap<&str, (Left, BTreeSet<&str>)> = BTreeMap::new();
    for node in nodes {
        let closed = node.state.reason.as_deref().filter(|_| !node.state.is_up());
        let closed = closed.and_then(|reason| Some((Closed::id(reason)?, Closed::what(reason))));
        let ids = node.traces.journal.iter().map(|entry| entry.id.as_str());
        let ids = ids.chain(node.traces.prepared.iter().map(|prepared| prepared.id.as_str()));
        for id in ids.chain(closed.map(|(id, _)| id)).collect::<BTreeSet<_>>() {
            let (left, wanted) = all.entry(id).or_insert_with(|| {
                let none = Vec::new;
                let left = Left {
                    id: id.to_owned(),
                    what: String::new(),
                    sha256: None,
                    committed_on: none(),
                    missing_on: none(),
                    prepared_on: none(),
                    closed: none(),
                };
                (left, nodes.iter().map(|node| node.name.as_str()).collect())
            });
            if let Some(entry) = node.traces.journal.iter().find(|entry| entry.id == id) {
                left.what.clone_from(&entry.file);
                left.sha256 = Some(entry.sha256.clone());
                left.committed_on.push(node.name.clone());
                // One that says so is enough: a node may have lost its rows since.
                wanted.retain(|name| !entry.done && entry.nodes.iter().any(|node| node == name));
            }
            if node.traces.prepared.iter().any(|prepared| prepared.id == id) {
                left.prepared_on.push(node.name.clone());
            }
            if let Some((_, what)) = closed.filter(|(closed, _)| *closed == id) {
                left.closed.push(node.name.clone());
                if left.what.is_empty() {
                    what.clone_into(&mut left.what);
                }
            }
        }
    }
    all.into_values()
        .map(|(mut left, wanted)| {
            let missing =
                wanted.into_iter().filter(|name| left.sha256.is_some() && !left.committed_on.iter().any(|n| n == name));
            left.missing_on = missing.map(str::to_owned).collect();
            left
        })
        .filter(|left| !(left.missing_on.is_empty() && left.prepared_on.is_empty() && left.closed.is_empty()))
        .collect()
}

/// Why no node may be opened as if nothing were: nodes that are closed although nothing is committed anywhere may.
pub fn half_done(nodes: &[Seen]) -> Option<Left> {
    left(nodes).into_iter().find(|left| !(left.missing_on.is_empty() && left.prepared_on.is_empty()))
}

/// What a transaction has written, as the server counts it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// Anything at all.
    pub any: bool,
    /// Rows of tables.
    pub rows: i64,
    /// Rows of PostgreSQL's own catalogs.
    pub catalogs: BTreeMap<String, i64>,
    /// Whether rows are counted (`track_counts`).
    pub counted: bool,
}

/// The catalogs that `change_digest.sql` compares, or whose rows go with those of others.
const COMPARED: [&str; 50] = [
    "pg_aggregate",
    "pg_amop",
    "pg_amproc",
    "pg_attrdef",
    "pg_attribute",
    "pg_auth_members",
    "pg_cast",
    "pg_class",
    "pg_collation",
    "pg_constraint",
    "pg_database",
    "pg_db_role_setting",
    "pg_default_acl",
    "pg_depend",
    "pg_description",
    "pg_enum",
    "pg_event_trigger",
    "pg_extension",
    "pg_foreign_data_wrapper",
    "pg_foreign_server",
    "pg_foreign_table",
    "pg_index",
    "pg_inherits",
    "pg_language",
    "pg_largeobject_metadata",
    "pg_namespace",
    "pg_opclass",
    "pg_operator",
    "pg_opfamily",
    "pg_parameter_acl",
    "pg_partitioned_table",
    "pg_policy",
    "pg_proc",
    "pg_publication",
    "pg_publication_namespace",
    "pg_publication_rel",
    "pg_range",
    "pg_rewrite",
    "pg_seclabel",
    "pg_sequence",
    "pg_shdepend",
    "pg_shdescription",
    "pg_statistic_ext",
    "pg_tablespace",
    "pg_transform",
    "pg_trigger",
    "pg_ts_config",
    "pg_ts_config_map",
    "pg_ts_dict",
    "pg_type",
];

/// Whether a transaction that seems to have changed nothing has written something that is compared nowhere: a sequence's
/// position, a large object, a password.
pub fn is_hidden(before: &Written, after: &Written) -> bool {
    let grown: Vec<&str> = after
        .catalogs
        .iter()
        .filter(|(name, count)| before.catalogs.get(*name).is_none_or(|before| before < count))
        .map(|(name, _)| name.as_str())
        .collect();
    after.any && (!after.counted || grown.is_empty() || grown.iter().any(|name| !COMPARED.contains(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Definition;
    use proptest::prelude::*;

    fn state(state: &str, sole: bool, reason: Option<String>) -> State {
        State {
            state: state.into(),
            since: None,
            since_us: None,
            by: None,
            reason,
            sole,
            rejoin: false,
            hop: None,
            window: None,
            writers: None,
        }
    }

    fn seen(name: &str, state: State) -> Seen {
        Seen { name: name.into(), state, traces: Traces { two_phase: true, ..Traces::default() } }
    }

    fn entry(id: &str, sha256: &str) -> Entry {
        let nodes = vec!["a".into(), "b".into()];
        Entry { id: id.into(), file: "f.sql".into(), sha256: sha256.into(), nodes, done: false }
    }

    fn prepared(id: &str, node: &str) -> Prepared {
        Prepared { id: id.into(), gid: prepared_name(id, node), owner: "o".into() }
    }

    fn closed(id: &str, sole: bool) -> State {
        state("down", false, Some(Closed { id: id.into(), sole }.reason("f.sql")))
    }

    #[test]
    fn nodes_go_back_to_what_they_were() {
        let nodes = [seen("a", state("up", true, None)), seen("b", state("down", false, Some("holiday".into())))];
        let plan = decide("new", Some("s"), &nodes).unwrap();
        assert_eq!(plan.close, [("a".to_owned(), true)]);
        assert_eq!(plan.reopen, plan.close);
        assert_eq!(plan.run_on, ["a", "b"]);
        assert!(!plan.finishing && plan.two_phase);
    }

    #[test]
    fn what_a_killed_run_closed_is_opened_by_the_next() {
        let nodes = [seen("a", closed("old", true)), seen("b", state("down", false, None))];
        let plan = decide("new", Some("s"), &nodes).unwrap();
        assert_eq!((plan.id.as_str(), plan.finishing), ("new", false));
        assert_eq!((plan.close, plan.reopen), (vec![], vec![("a".to_owned(), true)]));
    }

    #[test]
    fn what_nobody_committed_is_rolled_back_and_what_somebody_did_is_committed_everywhere() {
        let mut nodes = [seen("a", closed("old", false)), seen("b", closed("old", false))];
        nodes[0].traces.prepared = vec![prepared("old", "a")];
        nodes[1].traces.prepared = vec![prepared("old", "b")];
        let plan = decide("new", Some("s"), &nodes).unwrap();
        assert_eq!(plan.roll_back.len(), 2);
        assert_eq!(plan.run_on, ["a", "b"]);
        nodes[0].traces.prepared.clear();
        nodes[0].traces.journal = vec![entry("old", "s")];
        let plan = decide("new", Some("s"), &nodes).unwrap();
        assert_eq!((plan.id.as_str(), plan.finishing), ("old", true));
        assert_eq!((plan.commit_on, plan.run_on, plan.roll_back), (vec!["b".to_owned()], vec![], vec![]));
        // The content of the file is what the change is.
        assert!(decide("new", Some("other"), &nodes).is_err());
        assert!(decide("new", None, &nodes).is_err());
    }

    #[test]
    fn a_change_that_is_whole_but_left_its_nodes_closed_is_only_concluded() {
        let mut nodes = [seen("a", closed("old", true)), seen("b", state("down", false, None))];
        for node in &mut nodes {
            node.traces.journal = vec![entry("old", "s")];
        }
        let plan = decide("new", Some("s"), &nodes).unwrap();
        assert!(plan.finishing && plan.run_on.is_empty() && plan.commit_on.is_empty());
        nodes[0].state = state("up", true, None);
        assert!(!decide("new", Some("s"), &nodes).unwrap().finishing);
    }

    #[test]
    fn a_change_that_is_whole_stays_so_whatever_becomes_of_the_journals() {
        let mut nodes = [seen("a", state("up", false, None)), seen("b", state("up", false, None))];
        nodes[0].traces.journal = vec![entry("old", "s")];
        assert!(decide("new", Some("other"), &nodes).is_err());
        assert_eq!(half_done(&nodes).unwrap().missing_on, ["b"]);
        nodes[0].traces.journal[0].done = true;
        assert!(!decide("new", Some("other"), &nodes).unwrap().finishing);
        assert!(!decide("new", Some("s"), &nodes).unwrap().finishing);
        assert_eq!(left(&nodes), []);
        // What is still closed for it is opened by its own file, and by whatever comes next.
        nodes[1].state = closed("old", false);
        assert_eq!(half_done(&nodes), None);
        assert!(decide("new", Some("s"), &nodes).unwrap().finishing);
        for other in [Some("other"), None] {
            let plan = decide("new", other, &nodes).unwrap();
            assert!(!plan.finishing && plan.resuming && plan.reopen.len() == 2);
        }
    }

    #[test]
    fn what_a_change_has_left_is_said() {
        let mut nodes = [seen("a", closed("old", true)), seen("b", state("down", false, None))];
        assert_eq!(half_done(&nodes), None);
        let said = left(&nodes)[0].to_string();
        assert_eq!(said, "unfinished schema change old of f.sql: closed for it: a; run that `schema` command again");
        nodes[1].traces.prepared = vec![prepared("old", "b")];
        assert_eq!(half_done(&nodes).unwrap().prepared_on, ["b"]);
        nodes[0].traces.journal = vec![entry("old", "s")];
        let said = left(&nodes)[0].to_string();
        assert!(said.contains("committed on a, not on b, prepared on b, closed for it: a; run"), "{said}");
    }

    #[test]
    fn what_is_compared_nowhere_is_taken_for_a_change() {
        let written = |catalogs: &[&str]| Written {
            any: true,
            counted: true,
            catalogs: catalogs.iter().map(|name| ((*name).to_owned(), 1)).collect(),
            ..Written::default()
        };
        let nothing = Written { counted: true, ..Written::default() };
        assert!(!is_hidden(&nothing, &nothing));
        // The same function once more.
        assert!(!is_hidden(&nothing, &written(&["pg_depend", "pg_proc"])));
        // setval(); lo_put(); whatever there is with track_counts off.
        assert!(is_hidden(&nothing, &written(&[])));
        assert!(is_hidden(&nothing, &written(&["pg_largeobject", "pg_proc"])));
        assert!(is_hidden(&nothing, &Written { counted: false, ..written(&["pg_proc"]) }));
        // What an earlier transaction of the session has written is not this one's.
        assert!(is_hidden(&written(&["pg_proc"]), &written(&["pg_proc"])));
    }

    #[test]
    fn the_digest_compares_what_is_said_to_be_compared() {
        let goes_with_others = ["pg_depend", "pg_shdepend"];
        for name in COMPARED.iter().filter(|name| !goes_with_others.contains(name)) {
            assert!(crate::sql::CHANGE_DIGEST.contains(&format!("from {name} ")), "{name}");
        }
    }

    #[test]
    fn what_somebody_else_is_at_is_not_disturbed() {
        let up = || seen("a", state("up", true, None));
        for flaw in [
            State { hop: Some(serde_json::json!({})), ..state("down", false, None) },
            State { rejoin: true, ..state("down", false, None) },
            state("maintenance", false, None),
        ] {
            assert!(decide("new", None, &[up(), seen("b", flaw)]).is_err());
        }
    }

    fn schema() -> impl Strategy<Value = Schema> {
        let object = ("table|index", "[a-c]").prop_map(|(kind, name)| Object { kind, relation: String::new(), name });
        let definition = ("[xy]", 0..2).prop_map(|(text, place)| Definition { text, place });
        proptest::collection::btree_map(object, definition, 0..5)
    }

    proptest! {
        #[test]
        fn whatever_is_not_alike_is_named_once(first in schema(), second in schema()) {
            let nodes = [("a".to_owned(), first.clone()), ("b".to_owned(), second.clone())];
            let differing: BTreeSet<_> = first
                .keys()
                .chain(second.keys())
                .filter(|object| first.get(*object).map(|d| &d.text) != second.get(*object).map(|d| &d.text))
                .collect();
            let lines = differences(&nodes);
            prop_assert_eq!(lines.len(), differing.len());
            prop_assert_eq!(effects(&first, &second).len(), differing.len());
            for (line, Object { kind, name, .. }) in lines.iter().zip(differing) {
                prop_assert!(line.starts_with(&format!("{kind} {name}: ")), "{}", line);
            }
        }

        #[test]
        fn a_reason_says_what_was(id in "[0-9a-f]{16}", sole: bool, what in ".{0,200}") {
            let closed = Closed { id, sole };
            let reason = closed.reason(&what);
            prop_assert!(reason.len() < 500);
            prop_assert_eq!(Closed::parse(&reason), Some(closed));
        }

        #[test]
        fn other_reasons_mean_nothing(reason in "[a-z ,]{0,40}") {
            prop_assert_eq!(Closed::parse(&reason), None);
        }
    }
}
