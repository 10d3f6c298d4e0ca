//! The hop: its steps, and the decisions between them.
//!
//! Deliberately without any IO, clock or randomness: what was seen on the nodes goes in, what may be done next comes
//! out. `cmd/hop.rs` does what is decided here. The one rule everything serves: **never two databases writable that were
//! not both writable before**, whatever dies at whatever moment. It rests on four facts:
//!
//! * every agent holds the advisory lock of *every* node while it changes anything, so no second agent acts meanwhile;
//! * a closed database stays closed through any restart, and carries the note ([`Note`]) that says who closed it and why;
//! * the target is opened only after every other node is known to be closed;
//! * a source is opened again only if every other node is known to be closed or was writable together with it before.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// One step of a hop, for the operator, the documentation and the tests.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// What it is called in reports and in `--pause-at`.
    pub name: &'static str,
    /// What it does.
    pub does: &'static str,
    /// How it is undone.
    pub undo: &'static str,
    /// Why it stands where it stands.
    pub why_here: &'static str,
}

/// All steps in their order. A step that has nothing to do in a particular hop is passed through, not left out.
pub const TABLE: [Step; 11] = [
    Step {
        name: "lock",
        does: "connect to every node and take its advisory lock",
        undo: "the lock goes with the connection",
        why_here: "first: two agents at once could each decide rightly and together do wrong",
    },
    Step {
        name: "preflight",
        does: "look at every node: state, replication in each direction, unfinished hop, clock",
        undo: "nothing was changed",
        why_here: "before anything changes: a hop that cannot succeed must not cost a single refused write",
    },
    Step {
        name: "approach",
        does: "wait until the target has everything that was written up to now",
        undo: "nothing was changed",
        why_here: "before closing: a backlog is waited for while writing still goes on, and stuck replication shows here",
    },
    Step {
        name: "close",
        does: "take every writable node but the target down, leaving a note of the hop there",
        undo: "up again, as sole as it was, unless another node may have been opened",
        why_here: "before open: with nobody writable nothing can diverge",
    },
    Step {
        name: "drain",
        does: "wait until the target has applied every write of the closed nodes",
        undo: "nothing was changed",
        why_here: "after close, when no write can be added; before open, so that nobody reads or writes old data there",
    },
    Step {
        name: "sequences",
        does: "move the target's sequences past what the closed nodes have handed out",
        undo: "none is needed: values are skipped, and none is handed out twice",
        why_here: "after close, when the last values are final; before open, so that the first insert gets a new key",
    },
    Step {
        name: "open",
        does: "open the target as the only writable node",
        undo: "none: from here on the hop is finished, not undone",
        why_here: "the point of no return, so everything that can fail comes before it",
    },
    Step {
        name: "activate",
        does: "write the target's name into the application's active side",
        undo: "none",
        why_here: "needs a writable node that has all earlier values of the row",
    },
    Step {
        name: "reopen",
        does: "with --both: open the other nodes again",
        undo: "none",
        why_here: "after activate, so that the row travels to them before they are written",
    },
    Step {
        name: "conclude",
        does: "remove the note of the hop from the closed nodes",
        undo: "none",
        why_here: "last change: as long as the note is there, an interrupted hop can be found and ended",
    },
    Step {
        name: "report",
        does: "work out the write gap from the servers' own clocks",
        undo: "nothing was changed",
        why_here: "costs round trips, so not while writes are refused",
    },
];

/// The names of the steps, in their order.
pub const STEPS: [&str; TABLE.len()] = names(&TABLE);

/// The names of the steps of a table.
pub const fn names<const N: usize>(table: &[Step; N]) -> [&'static str; N] {
    let mut names = [""; N];
    let mut i = 0;
    while i < N {
        names[i] = table[i].name;
        i += 1;
    }
    names
}

/// What a hop leaves in the state of each node it closes, so that any later agent can finish or undo it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Names one hop; the same on all its nodes.
    pub id: String,
    /// The node to be opened.
    pub to: String,
    /// The node that carries the note.
    pub from: String,
    /// Whether the target was writable before, together with this node.
    pub target_was_up: bool,
    /// Whether the target was marked as the only writable node.
    #[serde(default)]
    pub target_was_sole: bool,
    /// Whether this node was marked as the only writable node.
    #[serde(default)]
    pub was_sole: bool,
    /// Every node that was writable together with this one before the hop.
    #[serde(default)]
    pub writable_before: BTreeSet<String>,
    /// Whether the hop ends with all of them open.
    #[serde(default)]
    pub both: bool,
    /// When the hop began, by the clock of the agent's machine (RFC 3339).
    pub started: String,
    /// Who began it: user and host of the agent.
    pub by: String,
}

impl Note {
    /// Whether `node` and the one that carries the note were both writable before the hop.
    pub fn was_writable_with(&self, node: &str) -> bool {
        self.writable_before.contains(node) || (self.target_was_up && self.to == node)
    }
}

/// What is known about a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Writable.
    Up {
        /// Marked as the only writable node: refuses writes after a restart.
        sole: bool,
    },
    /// Refuses writes, and does so through restarts.
    Down {
        /// It was the only writable node and has restarted.
        rejoin: bool,
        /// The hop that closed it, if unfinished.
        note: Option<Box<Note>>,
    },
    /// Cannot be reached: may be anything.
    Unknown,
}

impl Seen {
    fn note(&self) -> Option<&Note> {
        match self {
            Self::Down { note: Some(note), .. } => Some(note),
            _ => None,
        }
    }
    fn is_up(&self) -> bool {
        matches!(self, Self::Up { .. })
    }
}

/// Which way the operator wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `hop NODE`: begin one, or continue the unfinished one to the same node.
    Run,
    /// `--resume`: continue the unfinished one only.
    Resume,
    /// `--abort`: undo the unfinished one.
    Abort,
}

/// What the operator asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The node to hop to; may be left out with resume and abort.
    pub target: Option<String>,
    /// Run, resume or abort.
    pub mode: Mode,
    /// Return to all nodes open.
    pub both: bool,
    /// Name for a new hop.
    pub id: String,
    /// Now, RFC 3339.
    pub now: String,
    /// User and host.
    pub by: String,
}

/// A node to be closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Its name.
    pub node: String,
    /// Whether it is writable now; otherwise an earlier run closed it.
    pub up: bool,
    /// What to leave there.
    pub note: Note,
}

/// What a hop is going to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Names the hop.
    pub id: String,
    /// The node that will be writable.
    pub target: String,
    /// Whether it is writable already.
    pub target_up: bool,
    /// Return to all nodes open at the end.
    pub both: bool,
    /// The nodes to close, or closed already by an earlier run of the same hop.
    pub sources: Vec<Source>,
    /// The nodes that are down anyway and stay so.
    pub quiet: Vec<String>,
    /// An earlier run has opened the target: only the end remains to be done.
    pub opened_earlier: bool,
}

/// How an unfinished hop is undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abort {
    /// The node it was going to.
    pub target: String,
    /// The nodes to open, in this order, each with whether it is the only writable one.
    pub reopen: Vec<(String, bool)>,
    /// Set the target's mark of being the only writable node back to this.
    pub target_sole: Option<bool>,
    /// Nodes that could not be reached and may still carry the note.
    pub left: Vec<String>,
}

/// What follows from a request and what was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Hop, or go on with one.
    Run(Plan),
    /// Undo.
    Abort(Abort),
    /// The wished state is there; `Some(target)` if the active side should still be looked at.
    Nothing(Option<String>, String),
    /// Cannot or must not be done.
    Refuse(Refusal),
}

/// Why a hop is not done, before anything was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Nodes that cannot be reached are the reason.
    pub unreachable: bool,
    /// What stands in the way.
    pub why: String,
    /// What to do about it.
    pub hint: String,
}

fn refuse(why: impl Into<String>, hint: impl Into<String>) -> Decision {
    Decision::Refuse(Refusal { unreachable: false, why: why.into(), hint: hint.into() })
}

fn refuse_unreachable(nodes: &[&str], hint: impl Into<String>) -> Decision {
    Decision::Refuse(Refusal {
        unreachable: true,
        why: format!("{} cannot be reached and may be writable", nodes.join(", ")),
        hint: hint.into(),
    })
}

/// Decides what to do. `nodes` are all nodes of the configuration, in its order.
pub fn decide(request: &Request, nodes: &[(String, Seen)]) -> Decision {
    let unknown: Vec<&str> = nodes.iter().filter(|(_, s)| *s == Seen::Unknown).map(|(n, _)| n.as_str()).collect();
    let notes: Vec<(&str, &Note)> = nodes.iter().filter_map(|(n, s)| s.note().map(|note| (n.as_str(), note))).collect();
    let wanted = request.target.as_deref();

    let Some(target) = wanted.or(notes.first().map(|(_, note)| note.to.as_str())) else {
        return if unknown.is_empty() {
            Decision::Nothing(None, nothing_unfinished(nodes))
        } else {
            refuse_unreachable(&unknown, "an unfinished hop may be noted there; run this again when it can be reached")
        };
    };
    let Some((_, target_seen)) = nodes.iter().find(|(n, _)| n == target) else {
        return refuse(
            format!("there is an unfinished hop to {target}, which is not in the configuration"),
            "add the node, or remove the note with: select multihome.set_hop(null)",
        );
    };
    if let Some((node, note)) = notes.iter().find(|(_, note)| note.to != target) {
        return refuse(
            format!("{node} was closed by an unfinished hop to {}", note.to),
            format!("finish it with `hop {0} --resume` or undo it with `hop {0} --abort` first", note.to),
        );
    }
    if notes.is_empty() && request.mode != Mode::Run {
        return if unknown.is_empty() {
            Decision::Nothing(None, nothing_unfinished(nodes))
        } else {
            refuse_unreachable(&unknown, "an unfinished hop may be noted there; run this again when it can be reached")
        };
    }
    if request.mode == Mode::Abort {
        return decide_abort(target, target_seen, &notes, nodes, &unknown);
    }
    if !unknown.is_empty() {
        let hint = if unknown.contains(&target) {
            "run this again when it can be reached".to_owned()
        } else {
            format!("when it is gone for good or for long, open the survivor with `up {target} --force`")
        };
        return refuse_unreachable(&unknown, hint);
    }
    decide_run(request, target, target_seen, &notes, nodes)
}

fn nothing_unfinished(nodes: &[(String, Seen)]) -> String {
    let advice = if nodes.iter().any(|(_, seen)| seen.is_up()) {
        ""
    } else {
        "; no node is writable: `hop NODE` or `up NODE` opens one"
    };
    format!("there is no unfinished hop{advice}")
}

fn decide_run(
    request: &Request,
    target: &str,
    target_seen: &Seen,
    notes: &[(&str, &Note)],
    nodes: &[(String, Seen)],
) -> Decision {
    let up_now: BTreeSet<String> = nodes.iter().filter(|(_, s)| s.is_up()).map(|(n, _)| n.clone()).collect();
    let id = notes.first().map_or_else(|| request.id.clone(), |(_, note)| note.id.clone());
    let both = request.both || notes.iter().any(|(_, note)| note.both);
    let (target_up, target_sole) = match target_seen {
        Seen::Up { sole } => (true, *sole),
        _ => (false, false),
    };

    let mut sources = Vec::new();
    let mut quiet = Vec::new();
    for (node, seen) in nodes.iter().filter(|(n, _)| n != target) {
        match seen {
            Seen::Up { sole } => {
                let mut writable_before = up_now.clone();
                // Closed earlier by this same hop, and writable together with this node then.
                for (_, note) in notes.iter().filter(|(_, note)| note.was_writable_with(node)) {
                    writable_before.insert(note.from.clone());
                }
                sources.push(Source {
                    node: node.clone(),
                    up: true,
                    note: Note {
                        id: id.clone(),
                        to: target.into(),
                        from: node.clone(),
                        target_was_up: target_up,
                        target_was_sole: target_sole,
                        was_sole: *sole,
                        writable_before,
                        both,
                        started: request.now.clone(),
                        by: request.by.clone(),
                    },
                });
            }
            Seen::Down { note: Some(note), .. } => sources.push(Source {
                node: node.clone(),
                up: false,
                note: Note { from: node.clone(), both, ..(**note).clone() },
            }),
            _ => quiet.push(node.clone()),
        }
    }

    if sources.is_empty() && target_up && (target_sole || quiet.is_empty()) {
        return Decision::Nothing(Some(target.into()), format!("{target} is the only writable node already"));
    }
    let opened_earlier =
        target_up && !sources.is_empty() && sources.iter().all(|s| !s.up && !s.note.was_writable_with(target));
    Decision::Run(Plan { id, target: target.into(), target_up, both, sources, quiet, opened_earlier })
}

fn decide_abort(
    target: &str,
    target_seen: &Seen,
    notes: &[(&str, &Note)],
    nodes: &[(String, Seen)],
    unknown: &[&str],
) -> Decision {
    let opened_by_hop = |note: &Note| !note.was_writable_with(target);
    if notes.iter().any(|(_, note)| opened_by_hop(note)) {
        match target_seen {
            Seen::Up { .. } => {
                return refuse(
                    format!("{target} is open already: undoing would leave two writable nodes"),
                    format!("finish it with `hop {target} --resume`; to go back, hop back afterwards"),
                );
            }
            Seen::Down { rejoin: true, .. } => {
                return refuse(
                    format!("{target} was writable before it restarted, and may hold writes nobody else has"),
                    format!("finish it with `hop {target} --resume`; to go back, hop back afterwards"),
                );
            }
            _ => {}
        }
    }

    let mut belief: BTreeMap<&str, Belief> = nodes.iter().map(|(n, s)| (n.as_str(), Belief::of(s))).collect();
    let mut reopen = Vec::new();
    for (node, note) in notes {
        let in_the_way: Vec<&str> = in_the_way(node, note, belief.iter().map(|(n, b)| (*n, *b)));
        if !in_the_way.is_empty() {
            return if in_the_way.iter().all(|n| unknown.contains(n)) {
                refuse_unreachable(
                    &in_the_way,
                    format!(
                        "run this again when it can be reached; if it is surely not running, `up {node} --force` opens {node}"
                    ),
                )
            } else {
                refuse(
                    format!(
                        "{} is writable and was not before the hop: opening {node} would leave two writable nodes",
                        in_the_way.join(", ")
                    ),
                    format!("finish the hop with `hop {target} --resume`, or take that node down first"),
                )
            };
        }
        belief.insert(node, Belief::Up);
        reopen.push(((*node).to_owned(), note.was_sole));
    }
    let was_sole = notes[0].1.target_was_sole;
    let target_sole = match target_seen {
        Seen::Up { sole } if *sole != was_sole => Some(was_sole),
        _ => None,
    };
    Decision::Abort(Abort {
        target: target.into(),
        reopen,
        target_sole,
        left: unknown.iter().map(|n| (*n).to_owned()).collect(),
    })
}

/// What the running agent may rely on, for one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Belief {
    Up,
    Down,
    Unsure,
}

impl Belief {
    fn of(seen: &Seen) -> Self {
        match seen {
            Seen::Up { .. } => Self::Up,
            Seen::Down { .. } => Self::Down,
            Seen::Unknown => Self::Unsure,
        }
    }
}

/// The nodes that forbid opening `node` again: not known to be down, and not writable together with it before.
fn in_the_way<'a>(node: &str, note: &Note, belief: impl Iterator<Item = (&'a str, Belief)>) -> Vec<&'a str> {
    belief
        .filter(|(other, belief)| *other != node && *belief != Belief::Down && !note.was_writable_with(other))
        .map(|(other, _)| other)
        .collect()
}

/// What came of something that was asked of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It was done.
    Done,
    /// It was not done, and will not be any more.
    Not,
    /// No answer: it may have been done, or may still be.
    Unsure,
}

/// Where a running hop stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The sources are being closed.
    Close,
    /// The target is catching up.
    Drain,
    /// The target may be opened.
    Open,
    /// Opening was asked for; whether it happened has to be learned.
    Learn,
    /// The target is open: from here on only forward.
    Opened,
    /// What was closed is to be opened again.
    Undo,
    /// Only a person can go on; everything that is closed stays closed.
    Person,
}

/// A hop under way.
#[derive(Debug, Clone)]
pub struct Hop {
    plan: Plan,
    belief: BTreeMap<String, Belief>,
    stage: Stage,
}

impl Hop {
    /// A hop that has just been planned.
    pub fn new(plan: Plan) -> Self {
        let mut belief = BTreeMap::new();
        belief.insert(plan.target.clone(), if plan.target_up { Belief::Up } else { Belief::Down });
        for source in &plan.sources {
            belief.insert(source.node.clone(), if source.up { Belief::Up } else { Belief::Down });
        }
        for node in &plan.quiet {
            belief.insert(node.clone(), Belief::Down);
        }
        let stage = match (plan.opened_earlier, plan.sources.is_empty()) {
            (true, _) => Stage::Opened,
            (false, true) => Stage::Open,
            (false, false) => Stage::Close,
        };
        Self { plan, belief, stage }
    }

    /// What it is going to do.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where it stands.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// `close` is about to be sent to the sources: from now on they may be closed.
    pub fn closing(&mut self) {
        for source in self.plan.sources.iter().filter(|s| s.up) {
            self.belief.insert(source.node.clone(), Belief::Unsure);
        }
    }

    /// What came of closing one source.
    pub fn closed(&mut self, node: &str, effect: Effect) {
        let belief = match effect {
            Effect::Done => Belief::Down,
            Effect::Not => Belief::Up,
            Effect::Unsure => Belief::Unsure,
        };
        self.belief.insert(node.to_owned(), belief);
        if self.stage == Stage::Close && self.plan.sources.iter().all(|s| self.belief[&s.node] == Belief::Down) {
            self.stage = Stage::Drain;
        }
    }

    /// The target has everything of every source.
    pub fn drained(&mut self) {
        if self.stage == Stage::Drain {
            self.stage = Stage::Open;
        }
    }

    /// `node` was found open, by somebody else's hand.
    pub fn found_open(&mut self, node: &str) {
        self.belief.insert(node.to_owned(), Belief::Up);
    }

    /// Whether the target may be opened now. Afterwards [`Stage::Learn`] rules until the outcome is known.
    #[must_use]
    pub fn may_open(&mut self) -> bool {
        let others_down = self.belief.iter().all(|(n, b)| *n == self.plan.target || *b == Belief::Down);
        if self.stage != Stage::Open || !others_down {
            return false;
        }
        self.stage = Stage::Learn;
        if !self.plan.target_up {
            self.belief.insert(self.plan.target.clone(), Belief::Unsure);
        }
        true
    }

    /// The server said that the target is open.
    pub fn opened(&mut self) {
        self.belief.insert(self.plan.target.clone(), Belief::Up);
        self.stage = Stage::Opened;
    }

    /// What a fresh look at the target said after opening it had been asked for, once nothing of that request can be
    /// under way any more; `None` if it cannot be known.
    pub fn learned(&mut self, target: Option<&Seen>) {
        if self.stage != Stage::Learn {
            return;
        }
        match target {
            Some(Seen::Up { .. }) => self.opened(),
            Some(Seen::Down { .. }) => {
                self.belief.insert(self.plan.target.clone(), Belief::Down);
                self.stage = Stage::Undo;
            }
            Some(Seen::Unknown) | None => {
                self.stage = if self.plan.target_up { Stage::Undo } else { Stage::Person };
            }
        }
    }

    /// Something failed, the deadline passed, or the operator stopped it.
    pub fn stop(&mut self) {
        self.stage = match self.stage {
            Stage::Close | Stage::Drain | Stage::Open | Stage::Undo => Stage::Undo,
            Stage::Learn | Stage::Opened | Stage::Person => Stage::Person,
        };
    }

    /// Whether the target, opened by this hop and closed again by its own restart, may be opened once more: nobody else is.
    pub fn may_open_again(&self) -> bool {
        let others_down = self.belief.iter().all(|(n, b)| *n == self.plan.target || *b == Belief::Down);
        self.stage == Stage::Opened && others_down
    }

    /// What a fresh look at the target said before undoing; `None` if it cannot be reached, and then what was known
    /// before still holds: it was down, and nobody asked it to open.
    pub fn rechecked(&mut self, target: Option<&Seen>) {
        if matches!(target, Some(Seen::Up { .. })) {
            self.belief.insert(self.plan.target.clone(), Belief::Up);
        }
    }

    /// The next source to open again while undoing, with whether it was the only writable node; `tried` are those that
    /// failed.
    pub fn next_undo(&self, tried: &[String]) -> Option<(&str, bool)> {
        self.undoable()
            .filter(|s| !tried.contains(&s.node))
            .find(|s| in_the_way(&s.node, &s.note, self.belief.iter().map(|(n, b)| (n.as_str(), *b))).is_empty())
            .map(|s| (s.node.as_str(), s.note.was_sole))
    }

    /// Whether the target is known to be open.
    pub fn target_is_open(&self) -> bool {
        self.belief[&self.plan.target] == Belief::Up
    }

    /// Whether the target may be open or not.
    pub fn target_is_unsure(&self) -> bool {
        self.belief[&self.plan.target] == Belief::Unsure
    }

    /// The sources that stay closed, because they could not be reached or must not be opened.
    pub fn left_closed(&self) -> Vec<&str> {
        self.undoable().map(|s| s.node.as_str()).collect()
    }

    fn undoable(&self) -> impl Iterator<Item = &Source> {
        self.plan.sources.iter().filter(|s| self.belief[&s.node] != Belief::Up)
    }

    /// A source is open again.
    pub fn restored(&mut self, node: &str) {
        self.belief.insert(node.to_owned(), Belief::Up);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(target: &str, mode: Mode, both: bool) -> Request {
        Request {
            target: Some(target.into()),
            mode,
            both,
            id: "1".into(),
            now: "2026-01-01T00:00:00Z".into(),
            by: "me".into(),
        }
    }

    fn up() -> Seen {
        Seen::Up { sole: false }
    }

    fn down() -> Seen {
        Seen::Down { rejoin: false, note: None }
    }

    fn two(a: Seen, b: Seen) -> Vec<(String, Seen)> {
        vec![("a".into(), a), ("b".into(), b)]
    }

    fn plan(decision: Decision) -> Plan {
        match decision {
            Decision::Run(plan) => plan,
            other => panic!("not a plan: {other:?}"),
        }
    }

    fn noted(target_up: bool) -> Seen {
        let target = if target_up { up() } else { down() };
        let plan = plan(decide(&request("b", Mode::Run, false), &two(up(), target)));
        Seen::Down { rejoin: false, note: Some(Box::new(plan.sources[0].note.clone())) }
    }

    #[test]
    fn the_names_are_those_of_the_table() {
        assert_eq!(STEPS[0], "lock");
        assert!(STEPS.iter().zip(TABLE.iter()).all(|(name, step)| *name == step.name && !step.why_here.is_empty()));
    }

    #[test]
    fn an_ordinary_hop_closes_the_writable_node() {
        let plan = plan(decide(&request("b", Mode::Run, false), &two(up(), down())));
        assert_eq!(plan.sources.len(), 1);
        assert!(plan.sources[0].up && !plan.target_up && !plan.opened_earlier);
    }

    #[test]
    fn with_nobody_writable_the_target_is_opened_without_closing_anything() {
        let plan = plan(decide(&request("b", Mode::Run, false), &two(down(), down())));
        assert!(plan.sources.is_empty());
        let mut hop = Hop::new(plan);
        assert!(hop.may_open());
    }

    #[test]
    fn nothing_is_done_twice() {
        let decision = decide(&request("b", Mode::Run, false), &two(down(), Seen::Up { sole: true }));
        assert!(matches!(decision, Decision::Nothing(Some(_), _)));
        let plan = plan(decide(&request("b", Mode::Run, false), &two(down(), up())));
        assert!(plan.sources.is_empty() && plan.target_up, "only the mark is missing");
    }

    #[test]
    fn an_unreachable_node_stops_a_hop() {
        let decision = decide(&request("b", Mode::Run, false), &two(Seen::Unknown, down()));
        assert!(matches!(decision, Decision::Refuse(Refusal { unreachable: true, .. })));
    }

    #[test]
    fn an_unfinished_hop_elsewhere_stops_a_hop() {
        let decision = decide(&request("a", Mode::Run, false), &two(noted(false), down()));
        assert!(matches!(decision, Decision::Refuse(Refusal { unreachable: false, .. })));
    }

    #[test]
    fn a_hop_whose_target_is_open_is_finished_not_undone() {
        let nodes = two(noted(false), Seen::Up { sole: true });
        assert!(plan(decide(&request("b", Mode::Resume, false), &nodes)).opened_earlier);
        assert!(matches!(decide(&request("b", Mode::Abort, false), &nodes), Decision::Refuse(_)));
        let restarted = two(noted(false), Seen::Down { rejoin: true, note: None });
        assert!(matches!(decide(&request("b", Mode::Abort, false), &restarted), Decision::Refuse(_)));
        assert!(!plan(decide(&request("b", Mode::Resume, false), &restarted)).opened_earlier);
    }

    #[test]
    fn a_hop_between_two_writable_nodes_can_be_undone_although_the_target_is_open() {
        let nodes = two(noted(true), Seen::Up { sole: true });
        let Decision::Abort(abort) = decide(&request("b", Mode::Abort, false), &nodes) else { panic!() };
        assert_eq!(abort.reopen, [("a".to_owned(), false)]);
        assert_eq!(abort.target_sole, Some(false));
    }

    #[test]
    fn an_unreachable_target_forbids_the_abort_unless_it_was_writable_anyway() {
        let abort = |seen| decide(&request("b", Mode::Abort, false), &two(seen, Seen::Unknown));
        assert!(matches!(abort(noted(false)), Decision::Refuse(Refusal { unreachable: true, .. })));
        assert!(matches!(abort(noted(true)), Decision::Abort(_)));
    }

    #[test]
    fn an_open_of_unknown_outcome_leaves_everything_closed() {
        let mut hop = Hop::new(plan(decide(&request("b", Mode::Run, false), &two(up(), down()))));
        hop.closing();
        hop.closed("a", Effect::Done);
        hop.drained();
        assert!(hop.may_open());
        hop.learned(None);
        assert_eq!(hop.stage(), Stage::Person);
        assert_eq!(hop.left_closed(), ["a"]);
    }

    // ---- the world: servers that restart, requests that get lost, agents that die ----

    #[derive(Debug, Clone)]
    struct Server {
        up: bool,
        sole: bool,
        rejoin: bool,
        note: Option<Note>,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Luck {
        Fine,
        /// Done, but the answer is lost.
        AnswerLost,
        /// Never arrived.
        RequestLost,
        /// Stuck on the way: done after the agent gave up, before any other agent gets the lock.
        Late,
        /// The server said no.
        Refused,
        AgentDiesBefore,
        AgentDiesAfter,
        /// Done; then another server restarts.
        Restart,
        /// Signal or deadline.
        Stopped,
    }

    struct World {
        servers: Vec<Server>,
        luck: Vec<Luck>,
        before: BTreeSet<usize>,
        late: Vec<(usize, Change)>,
        /// Nodes this run of the agent cannot reach.
        cut: Vec<usize>,
        both: bool,
    }

    #[derive(Debug, Clone)]
    enum Change {
        Close(Note),
        Open(bool),
        Forget,
    }

    struct AgentDied;

    const NAMES: [&str; 3] = ["a", "b", "c"];

    fn index(name: &str) -> usize {
        NAMES.iter().position(|n| *n == name).unwrap()
    }

    impl World {
        fn check(&self) {
            if self.both {
                return;
            }
            let now: Vec<usize> = (0..self.servers.len()).filter(|i| self.servers[*i].up).collect();
            if now.len() > 1 {
                assert!(
                    now.iter().all(|i| self.before.contains(i)),
                    "writable now: {now:?}, before: {:?}",
                    self.before
                );
            }
        }

        fn apply(&mut self, node: usize, change: &Change) {
            let server = &mut self.servers[node];
            match change {
                Change::Close(note) => {
                    server.up = false;
                    server.note = Some(note.clone());
                }
                Change::Open(sole) => {
                    *server = Server { up: true, sole: *sole, rejoin: false, note: None };
                }
                Change::Forget => server.note = None,
            }
            self.check();
        }

        fn ask(&mut self, node: usize, change: Change) -> Result<Effect, AgentDied> {
            match self.luck.pop().unwrap_or(Luck::Fine) {
                Luck::Fine | Luck::Stopped => {
                    self.apply(node, &change);
                    Ok(Effect::Done)
                }
                Luck::Restart => {
                    self.apply(node, &change);
                    for server in self.servers.iter_mut().filter(|s| s.up && s.sole) {
                        (server.up, server.rejoin) = (false, true);
                    }
                    self.check();
                    Ok(Effect::Done)
                }
                Luck::AnswerLost => {
                    self.apply(node, &change);
                    Ok(Effect::Unsure)
                }
                Luck::RequestLost => Ok(Effect::Unsure),
                Luck::Late => {
                    self.late.push((node, change));
                    Ok(Effect::Unsure)
                }
                Luck::Refused => Ok(Effect::Not),
                Luck::AgentDiesBefore => Err(AgentDied),
                Luck::AgentDiesAfter => {
                    self.apply(node, &change);
                    Err(AgentDied)
                }
            }
        }

        fn come_through(&mut self, changes: Vec<(usize, Change)>) {
            for (node, change) in changes {
                self.apply(node, &change);
            }
        }

        fn seen(&self, node: usize) -> Seen {
            let server = &self.servers[node];
            if server.up {
                Seen::Up { sole: server.sole }
            } else {
                Seen::Down { rejoin: server.rejoin, note: server.note.clone().map(Box::new) }
            }
        }

        /// A new connection that got the lock: nothing of the old one is on its way any more. With a request stuck,
        /// the lock is not to be had.
        fn look(&mut self, node: usize) -> Option<Seen> {
            let unlucky = matches!(self.luck.pop(), Some(Luck::RequestLost | Luck::AnswerLost | Luck::Late));
            (!unlucky && self.late.iter().all(|(n, _)| *n != node)).then(|| self.seen(node))
        }

        /// One run of the agent, as `cmd/hop.rs` does it.
        fn agent(&mut self, request: &Request) -> Result<(), AgentDied> {
            // The locks: on the nodes that can be reached, what was stuck has come through or died by now.
            let cut = self.cut.clone();
            let (stuck, through) = std::mem::take(&mut self.late).into_iter().partition(|(n, _)| cut.contains(n));
            self.late = stuck;
            self.come_through(through);
            // A request that is stuck still belongs to the hop that sent it, and so does what was writable before that one.
            if self.late.is_empty() && self.servers.iter().all(|s| s.note.is_none()) {
                self.before = (0..self.servers.len()).filter(|i| self.servers[*i].up).collect();
            }
            let nodes: Vec<(String, Seen)> = (0..self.servers.len())
                .map(|i| (NAMES[i].to_owned(), if cut.contains(&i) { Seen::Unknown } else { self.seen(i) }))
                .collect();
            let plan = match decide(request, &nodes) {
                Decision::Run(plan) => plan,
                Decision::Abort(abort) => {
                    for (node, sole) in abort.reopen {
                        if self.ask(index(&node), Change::Open(sole))? != Effect::Done {
                            return Ok(());
                        }
                    }
                    return Ok(());
                }
                Decision::Nothing(..) | Decision::Refuse(_) => return Ok(()),
            };
            let both = plan.both;
            let sources = plan.sources.clone();
            let target = index(&plan.target);
            let mut hop = Hop::new(plan);
            if hop.stage() == Stage::Close {
                hop.closing();
                for source in &sources {
                    if self.luck.last() == Some(&Luck::Stopped) {
                        self.luck.pop();
                        break;
                    }
                    let effect = self.ask(index(&source.node), Change::Close(source.note.clone()))?;
                    hop.closed(&source.node, effect);
                }
            }
            if hop.stage() == Stage::Drain && self.luck.pop() != Some(Luck::Stopped) {
                hop.drained();
            }
            if hop.stage() == Stage::Open && hop.may_open() {
                if self.ask(target, Change::Open(true))? == Effect::Done {
                    hop.opened();
                } else {
                    let seen = self.look(target);
                    hop.learned(seen.as_ref());
                }
            }
            if matches!(hop.stage(), Stage::Close | Stage::Drain | Stage::Open) {
                hop.stop();
            }
            if hop.stage() == Stage::Undo {
                let seen = self.look(target);
                hop.rechecked(seen.as_ref());
                let mut tried = Vec::new();
                while let Some((node, sole)) = hop.next_undo(&tried).map(|(n, s)| (n.to_owned(), s)) {
                    match self.look(index(&node)) {
                        None => tried.push(node),
                        Some(Seen::Up { .. }) => hop.restored(&node),
                        Some(_) => {
                            if self.ask(index(&node), Change::Open(sole))? == Effect::Done {
                                hop.restored(&node);
                            } else {
                                tried.push(node);
                            }
                        }
                    }
                }
            }
            if hop.stage() == Stage::Opened {
                if !self.servers[target].up && self.servers[target].rejoin && hop.may_open_again() {
                    self.ask(target, Change::Open(true))?;
                }
                if both {
                    self.both = true;
                    self.ask(target, Change::Open(false))?;
                }
                for source in &sources {
                    let change = if both { Change::Open(false) } else { Change::Forget };
                    self.ask(index(&source.node), change)?;
                }
            }
            Ok(())
        }
    }

    fn luck() -> impl Strategy<Value = Luck> {
        prop_oneof![
            8 => Just(Luck::Fine),
            1 => Just(Luck::AnswerLost),
            1 => Just(Luck::RequestLost),
            1 => Just(Luck::Late),
            1 => Just(Luck::Refused),
            1 => Just(Luck::AgentDiesBefore),
            1 => Just(Luck::AgentDiesAfter),
            1 => Just(Luck::Restart),
            1 => Just(Luck::Stopped),
        ]
    }

    fn cut() -> impl Strategy<Value = Vec<usize>> {
        prop_oneof![4 => Just(vec![]), 1 => (0..3_usize).prop_map(|node| vec![node])]
    }

    fn server() -> impl Strategy<Value = Server> {
        (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(up, sole, rejoin)| Server {
            up,
            sole: up && sole,
            rejoin: !up && rejoin,
            note: None,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

        #[test]
        fn no_two_nodes_become_writable_that_were_not_both_before_and_the_same_hop_again_ends_it(
            servers in prop::collection::vec(server(), 2..=3),
            runs in prop::collection::vec((0..3_u8, 0..3_usize, cut(), prop::collection::vec(luck(), 0..12)), 1..6),
            both in any::<bool>(),
        ) {
            let mut world = World { servers, luck: vec![], before: BTreeSet::new(), late: vec![], cut: vec![], both: false };
            for (mode, target, cut, luck) in runs {
                world.luck = luck;
                world.cut = cut;
                let mode = [Mode::Run, Mode::Resume, Mode::Abort][usize::from(mode)];
                let target = NAMES[target % world.servers.len()];
                world.both = false;
                let _ = world.agent(&request(target, mode, false));
                // The links come back, with what was stuck in them.
                if mode == Mode::Abort {
                    let late = std::mem::take(&mut world.late);
                    world.come_through(late);
                }
            }
            world.cut.clear();
            // Without further misfortune, what is unfinished can be ended in both directions.
            world.luck.clear();
            let mut unnamed = request("a", Mode::Resume, false);
            unnamed.target = None;
            let _ = world.agent(&unnamed);
            prop_assert!(world.servers.iter().all(|s| s.note.is_none()), "{:?}", world.servers);
            let _ = world.agent(&request("a", Mode::Run, both));
            prop_assert!(world.servers[0].up);
            prop_assert!(both || world.servers[1..].iter().all(|s| !s.up));
        }
    }
}
