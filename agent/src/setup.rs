//! From what the nodes are to what makes them a set that replicates: the steps of `init`, in order, each with its reason. Pure.
//!
//! The plan is made anew by every run out of what is there, so a run that was cut off is continued by the next one. Deliberately
//! runs nothing: `cmd/init.rs` does, and `check.rs` says what no statement can mend.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde::Serialize;

use crate::check::{Finding, Mends, Remedy, Verdict};
use crate::config::{Config, Node};
use crate::conninfo::Conninfo;
use crate::facts::State;
use crate::grants;
use crate::quote::{literal, name};
use crate::survey::{Slot, Subscription, Survey, Table};

/// The reason that a node is given which `init` takes down: by it a later run knows that it may open the node again.
pub const REASON: &str = "set-up by stillebot-agent init";

/// What `check` finds and statements of `init` mend, in the order in which they are run on a node.
const BEFORE: [&str; 6] =
    ["replication_role", "replication_reads", "agent_role", "extension", "stillebot.node", "publication"];
/// The same, of subscriptions that are there.
const OF_SUBSCRIPTIONS: [&str; 5] = [
    "subscription_origin",
    "subscription_streaming",
    "subscription_disable_on_error",
    "subscription_publication",
    "subscription_connection",
];
/// What is an error before `init` and none after it.
const MENDED: [&str; 5] = ["agent_grants", "identity", "subscription", "subscription_enabled", "subscription_copying"];
/// What only seems wrong from here, and is proved at the end.
const SEEN_FROM_HERE: [&str; 2] = ["agent_addresses", "replication_addresses"];

/// One node before `init`.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// What it tells.
    pub survey: Survey,
    /// Whether it takes writes.
    pub standing: Standing,
    /// Its tables that have rows. Counted only where more than one node has some.
    pub filled: BTreeMap<String, Option<Content>>,
}

/// Whether a node takes writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Standing {
    /// It does.
    #[default]
    Up,
    /// Somebody has taken it down, and it stays so.
    Down,
    /// An earlier `init` has taken it down.
    Parked,
}

impl Standing {
    /// By its recorded state, which tells whether an earlier run was it.
    pub fn of(state: &State) -> Self {
        if state.is_up() {
            Self::Up
        } else if state.reason.as_deref() == Some(REASON) && !state.rejoin {
            Self::Parked
        } else {
            Self::Down
        }
    }
}

/// The rows of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Content {
    /// How many.
    pub rows: i64,
    /// The same for the same rows, in whatever order.
    pub checksum: String,
}

/// What the operator says.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// The node that has the data.
    pub from: Option<String>,
    /// All nodes have the same rows already.
    pub assume_identical: bool,
    /// The name of the set of nodes, if none has one yet.
    pub fresh_pair: String,
}

/// What is done on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Action {
    /// One statement.
    Run {
        /// Without a semicolon.
        statement: String,
    },
    /// It is taken down.
    Close,
    /// What others have written is waited for.
    Gather {
        /// Those that it has subscribed to.
        peers: Vec<String>,
    },
    /// All nodes are compared.
    Compare,
    /// Whoever is making a slot for an earlier run is stopped, and the slot goes with him.
    StopMaking {
        /// Its name.
        slot: String,
    },
    /// A slot is dropped as soon as nobody reads it.
    DropSlot {
        /// Its name.
        slot: String,
    },
    /// A slot is made before the subscription that reads it.
    MakeSlot {
        /// Its name.
        slot: String,
    },
    /// A subscription is made, disabled, and it is looked for its slot on the very publisher that is meant.
    Subscribe {
        /// To whom.
        publisher: String,
        /// With the rows that are there.
        copy: bool,
        /// The statement.
        statement: String,
    },
    /// A subscription is enabled.
    Enable {
        /// To whom.
        publisher: String,
        /// The statement.
        statement: String,
    },
    /// Initial copies are waited for.
    Copy,
    /// It is opened again.
    Open,
    /// A row makes the round trip.
    Prove,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Where.
    pub node: String,
    /// What.
    #[serde(flatten)]
    pub action: Action,
    /// Why.
    pub why: String,
}

impl Step {
    /// As people read it: the node, what, and below it why.
    pub fn lines(&self) -> (&str, String) {
        (&self.node, format!("{}\n      {}", self.action.text(), self.why))
    }
}

/// All steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// In order.
    pub steps: Vec<Step>,
    /// Whose rows are copied, if any are.
    pub source: Option<String>,
    /// The nodes whose tables must still be empty once nobody can write there.
    pub newcomers: Vec<String>,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What is in the way.
    pub message: String,
    /// All of it.
    pub detail: Option<String>,
    /// What to do.
    pub hint: String,
}

impl Refusal {
    fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), detail: None, hint: hint.into() }
    }

    fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }
}

impl Action {
    /// As people read it.
    pub fn text(&self) -> String {
        match self {
            Self::Run { statement } | Self::Subscribe { statement, .. } | Self::Enable { statement, .. } => {
                format!("{statement};")
            }
            Self::Close => format!("select stillebot_down({});", literal(REASON)),
            Self::Gather { peers } => format!("wait for what {} has written", peers.join(" and ")),
            Self::Compare => "compare the rows of all tables on all nodes".into(),
            Self::StopMaking { slot } => format!("end whoever is still making the slot {slot}"),
            Self::DropSlot { slot } => format!("select pg_drop_replication_slot({});", literal(slot)),
            Self::MakeSlot { slot } => {
                format!("select pg_create_logical_replication_slot({}, 'pgoutput');", literal(slot))
            }
            Self::Copy => "wait for the initial copies".into(),
            Self::Open => "select stillebot_up();".into(),
            Self::Prove => {
                "write a row here, and when it has come to every other node one there that comes back".into()
            }
        }
    }
}

/// Whether `init` mends it.
fn by_init(finding: &Finding) -> bool {
    MENDED.contains(&finding.subject)
        || (finding.mends == Some(Mends::Sql)
            && (BEFORE.contains(&finding.subject) || OF_SUBSCRIPTIONS.contains(&finding.subject)))
}

/// What `init` leaves as it is and does not refuse, and what will be regretted: of slots that the plan deals with, and of keys that
/// get strides, it is told elsewhere.
pub fn concerns(findings: &[Finding], plan: &Plan) -> Vec<Finding> {
    let dealt_with = |finding: &Finding| {
        finding.subject == "sequence_key"
            || plan.steps.iter().any(|step| match &step.action {
                Action::DropSlot { slot } | Action::StopMaking { slot } => finding.about.as_ref() == Some(slot),
                _ => false,
            })
    };
    findings.iter().filter(|f| f.verdict >= Verdict::Warning && !by_init(f) && !dealt_with(f)).cloned().collect()
}

/// What no statement of `init` mends.
pub fn preconditions(findings: &[Finding]) -> Result<(), Refusal> {
    let harmless = |finding: &Finding| by_init(finding) || SEEN_FROM_HERE.contains(&finding.subject);
    // A node that has another name than the configuration gives it is most likely another node.
    let swapped = |finding: &Finding| {
        (finding.subject == "stillebot.node" && finding.verdict > Verdict::Ok && finding.found != "not set")
            || (finding.subject == "identity" && finding.verdict == Verdict::Error)
    };
    let wrong: Vec<&Finding> = findings
        .iter()
        .filter(|finding| (finding.verdict == Verdict::Error && !harmless(finding)) || swapped(finding))
        .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    let mut detail = String::new();
    for finding in &wrong {
        let _ = writeln!(detail, "{}: {}", finding.node, finding.title());
        for line in finding.mending() {
            let _ = writeln!(detail, "  {line}");
        }
    }
    let things = if wrong.len() == 1 { "one thing is".into() } else { format!("{} things are", wrong.len()) };
    Err(Refusal::new(
        format!("{things} in the way that init does not mend"),
        "do what is said to mend it, and run init again; `stillebot-agent check --admin ROLE` shows everything there is",
    )
    .detail(detail.trim_end()))
}

/// The steps, or why there are none.
pub fn plan(
    config: &Config,
    nodes: &BTreeMap<String, Seen>,
    findings: &[Finding],
    wish: &Wish,
) -> Result<Plan, Refusal> {
    preconditions(findings)?;
    let planner = Planner { config, nodes, findings, wish };
    let pair = planner.pair()?;
    let names = planner.renames()?;
    let data = planner.data(&names)?;

    let mut steps = Vec::new();
    for node in planner.names() {
        planner.prepare(node, &mut steps);
        planner.identify(node, &pair, &mut steps);
    }
    for node in planner.names() {
        planner.tidy(node, &names, &data, &mut steps);
    }
    planner.refuse_writes_while_down(&steps)?;
    for node in &data.closed {
        let why = if data.compare { "while rows are compared, nobody may change any" } else { CLOSE_WHY };
        steps.push(step(node, Action::Close, why));
    }
    planner.mend(&names, &mut steps);
    if let Some(source) = &data.source {
        let heard = |peer: &&str| !data.copies.contains(*peer) && names.contains_key(&(source.as_str(), *peer));
        let peers: Vec<String> = planner.names().filter(heard).map(str::to_owned).collect();
        if !peers.is_empty() {
            let why = "the copy has to have everything, for it is made of one node only";
            steps.push(step(source, Action::Gather { peers }, why));
        }
    }
    if data.compare {
        for node in planner.names() {
            let peers = planner.names().filter(|peer| names.contains_key(&(node, *peer))).map(str::to_owned);
            let peers: Vec<String> = peers.collect();
            if !peers.is_empty() {
                let why = "what is under way among those that replicate already is no difference";
                steps.push(step(node, Action::Gather { peers }, why));
            }
        }
        let why = "nothing is copied, so the rows have to be the same already";
        steps.push(step(&config.nodes[0].name, Action::Compare, why));
    }
    planner.subscribe(&names, &data, &mut steps)?;
    for (subscriber, publisher) in planner.directions() {
        if !names.contains_key(&(subscriber.name.as_str(), publisher.name.as_str())) {
            steps.push(planner.enable(subscriber, publisher, "all slots are there, so nothing can be missed"));
        }
    }
    for node in planner.names().filter(|node| data.copies.contains(*node) || planner.is_copying(node)) {
        steps.push(step(node, Action::Copy, "until then it has not everything"));
    }
    let opened =
        |node: &&str| data.closed.iter().any(|closed| closed == node) || nodes[*node].standing == Standing::Parked;
    for node in planner.names().filter(opened) {
        steps.push(step(node, Action::Open, "it was writable before"));
    }
    if !steps.is_empty() {
        let standing = |node: &&str| opened(node) || nodes[*node].standing == Standing::Up;
        let node = data.source.as_deref().filter(standing).or_else(|| planner.names().find(standing));
        let node = node.unwrap_or(&config.nodes[0].name);
        steps.push(step(node, Action::Prove, "replication is there when a row has gone both ways"));
    }
    Ok(Plan { steps, source: data.source, newcomers: data.copies.into_iter().collect() })
}

const CLOSE_WHY: &str = "nobody may write there until it has everything and is heard by the others";

/// A step.
pub fn step(node: &str, action: Action, why: &str) -> Step {
    Step { node: node.to_owned(), action, why: why.to_owned() }
}

/// A step that is one statement.
pub fn run(node: &str, statement: impl Into<String>, why: &str) -> Step {
    step(node, Action::Run { statement: statement.into() }, why)
}

/// What becomes of the rows.
#[derive(Debug, Default)]
struct Data {
    source: Option<String>,
    /// The nodes that get a copy of the source.
    copies: BTreeSet<String>,
    /// The nodes to be taken down.
    closed: Vec<String>,
    /// Nothing is copied; all nodes are compared.
    compare: bool,
}

/// Of each subscriber and publisher: the subscription that is there, and what it is called now.
type Names<'a> = BTreeMap<(&'a str, &'a str), &'a Subscription>;

struct Planner<'a> {
    config: &'a Config,
    nodes: &'a BTreeMap<String, Seen>,
    findings: &'a [Finding],
    wish: &'a Wish,
}

impl<'a> Planner<'a> {
    fn names(&self) -> impl Iterator<Item = &'a str> {
        self.config.nodes.iter().map(|node| node.name.as_str())
    }

    fn seen(&self, node: &str) -> &'a Seen {
        &self.nodes[node]
    }

    /// Subscriber and publisher, everybody with everybody.
    fn directions(&self) -> impl Iterator<Item = (&'a Node, &'a Node)> {
        let nodes = &self.config.nodes;
        nodes
            .iter()
            .flat_map(move |publisher| nodes.iter().map(move |subscriber| (subscriber, publisher)))
            .filter(|(subscriber, publisher)| subscriber.name != publisher.name)
    }

    fn is_ours(&self, found: &Subscription) -> bool {
        is_ours(self.config, found)
    }

    // ---- who belongs together ----

    fn pair(&self) -> Result<String, Refusal> {
        let told: BTreeSet<&str> = self
            .nodes
            .values()
            .filter_map(|seen| seen.survey.identity.as_ref())
            .map(|identity| identity.pair.as_str())
            .collect();
        match told.len() {
            0 => Ok(self.wish.fresh_pair.clone()),
            1 => Ok(told.into_iter().next().unwrap_or_default().to_owned()),
            _ => Err(Refusal::new(
                "the nodes belong to different sets of nodes",
                "check node.host; `deinit` on the set that a node is to leave makes it free",
            )),
        }
    }

    /// What subscriptions there are, whatever number of nodes they were made for. With two nodes the name has no peer in it,
    /// so of two nodes that have such a one each is the other's peer.
    fn renames(&self) -> Result<Names<'a>, Refusal> {
        let plain = &self.config.subscription;
        let of = |node: &str, name: &str| {
            self.seen(node).survey.subscriptions.iter().find(|found| found.name == name && self.is_ours(found))
        };
        let two = self.config.nodes.len() <= 2;
        let mut holders: Vec<&str> = self.names().filter(|node| of(node, plain).is_some()).collect();
        // A run that was cut off may have renamed one of the two, whose slot is still called as before.
        if !two && let [holder] = holders[..] {
            let renamed = format!("{plain}_{holder}");
            let slot = Some(plain.as_str());
            holders.extend(
                self.names().filter(|node| of(node, &renamed).is_some_and(|found| found.slot.as_deref() == slot)),
            );
        }
        if !two && !holders.is_empty() && holders.len() != 2 {
            return Err(Refusal::new(
                format!("the publisher of subscription {plain} on {} is not known", holders.join(", ")),
                format!("rename it to {plain}_NODE after its publisher, or drop it; then run init again"),
            ));
        }
        let mut names = Names::new();
        for (subscriber, publisher) in self.directions() {
            let (subscriber, publisher) = (subscriber.name.as_str(), publisher.name.as_str());
            let pairwise = two || (holders.contains(&subscriber) && holders.contains(&publisher));
            let found = of(subscriber, &format!("{plain}_{publisher}"))
                .or_else(|| pairwise.then(|| of(subscriber, plain)).flatten());
            if let Some(found) = found {
                names.insert((subscriber, publisher), found);
            }
        }
        Ok(names)
    }

    // ---- where the rows are ----

    /// Nodes that have the same rows because they replicate to each other.
    fn groups(&self, names: &Names<'_>) -> Vec<BTreeSet<&'a str>> {
        let mut groups: Vec<BTreeSet<&str>> = self.names().map(|node| BTreeSet::from([node])).collect();
        for (subscriber, publisher) in names.keys() {
            let at = |node: &str, groups: &[BTreeSet<&str>]| groups.iter().position(|group| group.contains(node));
            if let (Some(a), Some(b)) = (at(subscriber, &groups), at(publisher, &groups))
                && a != b
            {
                let (low, high) = (a.min(b), a.max(b));
                let joined = groups.remove(high);
                groups[low].extend(joined);
            }
        }
        groups
    }

    fn data(&self, names: &Names<'_>) -> Result<Data, Refusal> {
        let groups = self.groups(names);
        // Of what was written where the subscription away from it is missing nothing is known, unless set-up has closed it, or
        // has made the slot before.
        let unheard = self.directions().find(|(subscriber, publisher)| {
            let (subscriber, publisher) = (subscriber.name.as_str(), publisher.name.as_str());
            !names.contains_key(&(subscriber, publisher))
                && groups.iter().any(|group| group.contains(subscriber) && group.contains(publisher))
                && self.seen(publisher).standing != Standing::Parked
                && self.kept(subscriber, publisher).is_none()
        });
        if let Some((subscriber, publisher)) = unheard
            && !self.wish.assume_identical
        {
            return Err(Refusal::new(
                format!(
                    "{} has no subscription to {}, although they have replicated: what was written there meanwhile is not known",
                    subscriber.name, publisher.name
                ),
                "`init --assume-identical` compares all rows first; if they differ, `deinit`, empty the tables of one node, and \
                 run init again",
            ));
        }
        let filled: Vec<&BTreeSet<&str>> =
            groups.iter().filter(|group| group.iter().any(|node| !self.seen(node).filled.is_empty())).collect();
        let up = |node: &&str| self.seen(node).standing == Standing::Up;
        if self.wish.assume_identical && (groups.len() > 1 || unheard.is_some()) {
            self.differences(&groups, true)?;
            let closed = self.names().filter(up).map(str::to_owned).collect();
            return Ok(Data { closed, compare: true, ..Data::default() });
        }
        // Nobody gets all rows from a node that is itself given them.
        if let Some(from) = &self.wish.from
            && self.is_copying(from)
        {
            return Err(Refusal::new(
                format!("{from} is itself being given a copy, by an earlier set-up"),
                "leave --from away, and that one is finished",
            ));
        }
        if groups.len() == 1 {
            return Ok(Data::default());
        }
        if filled.len() > 1 {
            self.differences(&groups, false)?;
        }
        let first = groups.iter().find(|group| self.names().next().is_some_and(|node| group.contains(node)));
        let chosen = |group: &&BTreeSet<&str>| self.wish.from.as_deref().is_none_or(|from| group.contains(from));
        let home = match filled.first() {
            Some(home) if chosen(home) => *home,
            Some(home) => {
                let home: Vec<&str> = home.iter().copied().collect();
                return Err(Refusal::new(
                    format!(
                        "{} has rows, which a copy from {} would collide with",
                        home.join(" and "),
                        self.wish.from.as_deref().unwrap_or_default()
                    ),
                    format!("empty its tables, or say --from {}", home[0]),
                ));
            }
            None => {
                groups.iter().find(|group| self.wish.from.is_some() && chosen(group)).or(first).unwrap_or(&groups[0])
            }
        };
        let members = || self.names().filter(|node| home.contains(node));
        let source = match self.wish.from.as_deref() {
            Some(from) => from,
            // Whoever is being written goes on being written.
            // Who was taken down by an earlier set-up may itself have no more than a part of a copy.
            None => {
                let whole = |node: &&str| self.seen(node).standing != Standing::Parked && !self.is_copying(node);
                members().find(up).or_else(|| members().find(whole)).or_else(|| members().next()).unwrap_or_default()
            }
        };
        Ok(Data {
            source: Some(source.to_owned()),
            copies: self.names().filter(|node| !home.contains(node)).map(str::to_owned).collect(),
            closed: self.names().filter(|node| *node != source).filter(up).map(str::to_owned).collect(),
            compare: false,
        })
    }

    /// Whether its initial copy is under way.
    fn is_copying(&self, node: &str) -> bool {
        self.seen(node).survey.subscriptions.iter().any(|found| self.is_ours(found) && found.copying > 0)
    }

    /// The slot that an earlier run has made on a node that is down, before there was a subscription to it, and that has everything.
    fn kept(&self, subscriber: &str, publisher: &str) -> Option<&'a Slot> {
        let seen = self.seen(publisher);
        let wanted = self.config.slot(publisher, subscriber);
        seen.survey.slots.iter().find(|slot| {
            slot.name == wanted && seen.standing == Standing::Down && slot.here && slot.unread && !slot.active
        })
    }

    /// Refuses unless the rows are the same and that is what the operator expects.
    fn differences(&self, groups: &[BTreeSet<&str>], expected: bool) -> Result<(), Refusal> {
        let speakers: Vec<&str> = groups.iter().filter_map(|group| group.iter().next().copied()).collect();
        let tables: BTreeSet<&str> =
            self.nodes.values().flat_map(|seen| seen.filled.keys().map(String::as_str)).collect();
        let mut detail = String::new();
        let mut shared = String::new();
        for table in tables {
            let contents: Vec<Option<&Content>> =
                speakers.iter().map(|node| self.seen(node).filled.get(table).and_then(Option::as_ref)).collect();
            let has_rows: Vec<bool> = speakers.iter().map(|node| self.seen(node).filled.contains_key(table)).collect();
            let alike = contents.windows(2).all(|pair| pair[0] == pair[1]) && has_rows.windows(2).all(|p| p[0] == p[1]);
            let counts: Vec<String> = speakers
                .iter()
                .zip(contents.iter().zip(&has_rows))
                .map(|(node, (content, filled))| match content {
                    Some(content) => format!("{} rows on {node}", content.rows),
                    None if *filled => format!("rows on {node}"),
                    None => format!("none on {node}"),
                })
                .collect();
            let line = format!("{table}: {}\n", counts.join(", "));
            if !alike {
                detail.push_str(&line);
            } else {
                shared.push_str(&line);
            }
        }
        if !detail.is_empty() {
            return Err(Refusal::new(
                "more than one node has rows, and they differ",
                "keep one node's rows and empty the tables of the others (truncate), or make them the same and say \
                 --assume-identical; then run init again",
            )
            .detail(detail.trim_end()));
        }
        if expected {
            return Ok(());
        }
        Err(Refusal::new(
            "more than one node has rows, and they are the same: a copy would collide with them",
            "say --assume-identical, and they are compared while nobody can write, and nothing is copied",
        )
        .detail(shared.trim_end()))
    }

    // ---- the steps ----

    fn remedies(&self, node: &str, subjects: &'a [&str]) -> impl Iterator<Item = (&'a Finding, &'a str, &'a str)> {
        let findings = self.findings;
        let node = node.to_owned();
        subjects
            .iter()
            .flat_map(move |subject| findings.iter().filter(move |finding| finding.subject == *subject))
            .filter(move |finding| finding.node == node && finding.mends == Some(Mends::Sql))
            .flat_map(|finding| {
                finding.remedy.iter().filter_map(move |remedy| match remedy {
                    Remedy::Sql { node, statement } => Some((finding, node.as_str(), statement.as_str())),
                    _ => None,
                })
            })
    }

    fn prepare(&self, node: &str, steps: &mut Vec<Step>) {
        let survey = &self.seen(node).survey;
        let mut statements = BTreeSet::new();
        for (finding, at, statement) in self.remedies(node, &BEFORE) {
            // What the role may do is told once, below, and with the extension there.
            let is_grant = finding.subject == "agent_role" && statement.starts_with("grant ");
            if !is_grant && statements.insert((at, statement)) {
                steps.push(run(at, statement, &finding.found));
            }
        }
        let anew = survey.about.extension.is_none() || survey.about.extension != survey.about.extension_available;
        let known = |grant: &grants::Grant| {
            self.config.active.as_ref().is_none_or(|active| {
                survey.tables.iter().any(|table| table.name == table_name(&active.place))
                    || (grant.schema != active.place.0 && grant.name != active.place.0)
            })
        };
        for (grant, there) in &survey.missing_grants {
            // Of what is not there yet, the extension brings everything but a role.
            if *there || (anew && grant.kind != "role" && known(grant)) {
                steps.push(run(node, &grant.statement, "what the agent needs, and nothing more"));
            }
        }
    }

    fn identify(&self, node: &str, pair: &str, steps: &mut Vec<Step>) {
        if self.seen(node).survey.identity.is_none() {
            let statement = format!("select multihome.identify({}, {})", literal(node), literal(pair));
            steps.push(run(node, statement, "so that a copy of it knows that it is not this node"));
        }
    }

    /// Old names, and what earlier set-ups have left.
    fn tidy(&self, node: &'a str, names: &Names<'_>, data: &Data, steps: &mut Vec<Step>) {
        for peer in self.config.peers(node) {
            let wanted = self.config.subscription_to(&peer.name);
            let (Some(found), Some(own)) = (names.get(&(node, peer.name.as_str())), self.config.node(node)) else {
                continue;
            };
            if found.name != wanted {
                let (old, new) = (name(&found.name), name(&wanted));
                steps.push(run(
                    node,
                    format!("alter subscription {old} rename to {new}"),
                    "with the number of nodes names change",
                ));
                let conninfo = literal(&Conninfo::wanted(self.config, own, peer).to_string());
                let statement = format!("alter subscription {new} connection {conninfo}");
                steps.push(run(node, statement, "application_name is the subscription's name"));
            }
        }
        let anew = self.seen(node).survey.about.extension.is_none();
        if data.copies.contains(node) && self.seen(node).standing == Standing::Up && !anew {
            let why = "what is left of an earlier set-up would collide with the copy";
            steps.push(run(node, "delete from multihome.probe", why));
            steps.push(run(node, "select multihome.upkeep()", why));
        }
    }

    /// A node that is down is not opened only to be set up.
    fn refuse_writes_while_down(&self, steps: &[Step]) -> Result<(), Refusal> {
        let writes = |statement: &str| {
            !statement.starts_with("alter subscription ") && !statement.starts_with("select multihome.identify(")
        };
        let refused = steps.iter().find(|step| {
            self.seen(&step.node).standing != Standing::Up
                && matches!(&step.action, Action::Run { statement } if writes(statement))
        });
        match refused {
            None => Ok(()),
            Some(step) => Err(Refusal::new(
                format!("{} is down, and this has to be written there: {}", step.node, step.action.text()),
                format!("`up {}`, and run init again", step.node),
            )),
        }
    }

    fn subscribe(&self, names: &Names<'_>, data: &Data, steps: &mut Vec<Step>) -> Result<(), Refusal> {
        // Copies first: what nobody has is nothing to subscribe to, and core warns of copying from a subscriber.
        let copies = |subscriber: &Node, publisher: &Node| {
            data.source.as_deref() == Some(&publisher.name) && data.copies.contains(&subscriber.name)
        };
        let mut directions: Vec<(&Node, &Node)> = self.directions().collect();
        directions.sort_by_key(|(subscriber, publisher)| !copies(subscriber, publisher));
        directions.retain(|(subscriber, publisher)| {
            !names.contains_key(&(subscriber.name.as_str(), publisher.name.as_str()))
        });
        let groups = self.groups(names);
        let mut made: BTreeSet<(&str, &str)> = BTreeSet::new();
        for &(subscriber, publisher) in &directions {
            let (reader, node) = (subscriber.name.as_str(), publisher.name.as_str());
            let joined = groups.iter().any(|group| group.contains(reader) && group.contains(node));
            if joined && self.kept(reader, node).is_some() {
                made.insert((reader, node));
                continue;
            }
            let slot = self.config.slot(node, reader);
            if let Some(left) = self.seen(node).survey.slots.iter().find(|found| found.name == slot) {
                let why = "nobody reads it; an earlier set-up has left it";
                if left.here && left.unmade {
                    steps.push(step(
                        node,
                        Action::StopMaking { slot: slot.clone() },
                        "it is for a run that was cut off",
                    ));
                } else if left.active || !left.here {
                    return Err(Refusal::new(
                        format!("slot {slot} on {node} is somebody else's, who may be reading it"),
                        "find out whose it is; drop it with pg_drop_replication_slot(), or choose another `subscription` in the \
                         configuration",
                    ));
                } else {
                    steps.push(step(node, Action::DropSlot { slot: slot.clone() }, why));
                }
            }
            if self.seen(node).standing == Standing::Down && !copies(subscriber, publisher) && !data.compare {
                let why = "whatever becomes of this run, nothing that is ever written there is missed";
                steps.push(step(node, Action::MakeSlot { slot }, why));
                made.insert((reader, node));
            }
        }
        for (subscriber, publisher) in directions {
            let copy = copies(subscriber, publisher);
            let slot = self.config.slot(&publisher.name, &subscriber.name);
            let create_slot = !made.contains(&(subscriber.name.as_str(), publisher.name.as_str()));
            let conninfo = literal(&Conninfo::wanted(self.config, subscriber, publisher).to_string());
            let statement = format!(
                "create subscription {} connection {conninfo} publication {} with (slot_name = {}, {}origin = none, streaming = on, \
                 copy_data = {copy}, enabled = false)",
                name(&self.config.subscription_to(&publisher.name)),
                name(&self.config.publication),
                name(&slot),
                if create_slot { "" } else { "create_slot = false, " }
            );
            let why = if copy {
                format!("{} gets the rows of {}, and then what changes", subscriber.name, publisher.name)
            } else {
                format!("{} gets what changes on {} from now on", subscriber.name, publisher.name)
            };
            let publisher = publisher.name.clone();
            steps.push(step(&subscriber.name, Action::Subscribe { publisher, copy, statement }, &why));
        }
        Ok(())
    }

    /// Subscriptions that are there become as they must be.
    fn mend(&self, names: &Names<'_>, steps: &mut Vec<Step>) {
        for node in self.names() {
            let renamed = |about: &str| {
                names.iter().any(|((subscriber, publisher), found)| {
                    *subscriber == node && found.name == about && self.config.subscription_to(publisher) != about
                })
            };
            for (finding, at, statement) in self.remedies(node, &OF_SUBSCRIPTIONS) {
                if !finding.about.as_deref().is_some_and(renamed) {
                    steps.push(run(at, statement, &finding.found));
                }
            }
        }
        for (subscriber, publisher) in self.directions() {
            let found = names.get(&(subscriber.name.as_str(), publisher.name.as_str()));
            if found.is_some_and(|found| !found.enabled) {
                steps.push(self.enable(subscriber, publisher, "it was made and never enabled, or has given up"));
            }
        }
    }

    fn enable(&self, subscriber: &Node, publisher: &Node, why: &str) -> Step {
        let statement = format!("alter subscription {} enable", name(&self.config.subscription_to(&publisher.name)));
        step(&subscriber.name, Action::Enable { publisher: publisher.name.clone(), statement }, why)
    }
}

/// Whether a subscription is of this configuration, whatever number of nodes it was made for.
pub fn is_ours(config: &Config, found: &Subscription) -> bool {
    let rest = found.name.strip_prefix(&config.subscription);
    let named = rest.is_some_and(|rest| {
        rest.is_empty() || config.nodes.iter().any(|node| rest.strip_prefix('_') == Some(node.name.as_str()))
    });
    named && found.publications.contains(&config.publication)
}

/// The nodes whose rows have to be counted before there can be a plan: one of each group that has rows, if there are several;
/// with nothing to be copied all groups.
pub fn to_be_counted(config: &Config, nodes: &BTreeMap<String, Seen>, assume_identical: bool) -> Vec<String> {
    let wish = Wish::default();
    let planner = Planner { config, nodes, findings: &[], wish: &wish };
    let Ok(names) = planner.renames() else { return Vec::new() };
    let groups = planner.groups(&names);
    let filled = groups.iter().filter(|group| group.iter().any(|node| !nodes[*node].filled.is_empty()));
    let speakers: Vec<String> = filled.filter_map(|group| group.iter().next().map(|node| (*node).to_owned())).collect();
    if speakers.len() > 1 || (assume_identical && groups.len() > 1) { speakers } else { Vec::new() }
}

/// The tables whose rows replicate: those of partitioned ones are in their partitions.
pub fn replicated(survey: &Survey) -> impl Iterator<Item = &Table> {
    survey.tables.iter().filter(|table| !table.partitioned && !table.unlogged)
}

fn table_name((schema, table): &(String, String)) -> String {
    format!("{}.{}", name(schema), name(table))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;
    use crate::survey::Identity;
    use proptest::prelude::*;

    fn config(nodes: usize) -> Config {
        let mut text = "database = \"app\"\nuser = \"agent\"\n".to_owned();
        for name in ["a", "b", "c"].iter().take(nodes) {
            let _ = writeln!(text, "[[node]]\nname = \"{name}\"\nhost = \"{name}.example.net\"");
        }
        Config::parse(&text, &Environment { variable: &|_| None, os_user: None }).unwrap()
    }

    fn empty(config: &Config) -> BTreeMap<String, Seen> {
        let mut seen = Seen::default();
        seen.survey.about.extension = Some("1".into());
        seen.survey.about.extension_available = Some("1".into());
        config.nodes.iter().map(|node| (node.name.clone(), seen.clone())).collect()
    }

    fn fill(seen: &mut Seen, rows: i64) {
        seen.filled.insert("app.t".into(), Some(Content { rows, checksum: rows.to_string() }));
    }

    fn wish() -> Wish {
        Wish { fresh_pair: "pair".into(), ..Wish::default() }
    }

    fn plan_of(config: &Config, nodes: &BTreeMap<String, Seen>, wish: &Wish) -> Result<Plan, Refusal> {
        plan(config, nodes, &[], wish)
    }

    /// The steps in short.
    fn short(plan: &Plan) -> Vec<String> {
        let line = |step: &Step| match &step.action {
            Action::Run { statement } => {
                let words: Vec<&str> = statement.split([' ', '(']).take(2).collect();
                format!("{}: {}", step.node, words.join(" "))
            }
            Action::Subscribe { publisher, copy: true, .. } => format!("{}: copies {publisher}", step.node),
            Action::Subscribe { publisher, .. } => format!("{}: follows {publisher}", step.node),
            Action::Enable { publisher, .. } => format!("{}: hears {publisher}", step.node),
            Action::Gather { peers } => format!("{}: gathers {}", step.node, peers.join(" ")),
            action => format!("{}: {action:?}", step.node).to_lowercase(),
        };
        plan.steps.iter().map(line).filter(|line| !line.contains("delete from") && !line.contains("upkeep")).collect()
    }

    /// What the nodes are when these steps have been taken.
    fn take(config: &Config, nodes: &mut BTreeMap<String, Seen>, steps: &[Step]) {
        for step in steps {
            let subscription = |publisher: &str| config.subscription_to(publisher);
            match &step.action {
                Action::Run { statement } if statement.starts_with("select multihome.identify(") => {
                    let identity = Identity { node: step.node.clone(), pair: "pair".into(), ..Identity::default() };
                    nodes.get_mut(&step.node).unwrap().survey.identity = Some(identity);
                }
                Action::Run { statement } if statement.contains(" rename to ") => {
                    let words: Vec<&str> = statement.split(' ').collect();
                    let all = &mut nodes.get_mut(&step.node).unwrap().survey.subscriptions;
                    all.iter_mut().find(|found| found.name == words[2]).unwrap().name = words[5].to_owned();
                }
                Action::MakeSlot { slot } => {
                    let slots = &mut nodes.get_mut(&step.node).unwrap().survey.slots;
                    assert!(slots.iter().all(|found| found.name != *slot), "{slot} is there already");
                    slots.push(Slot { name: slot.clone(), here: true, unread: true, ..Slot::default() });
                }
                Action::DropSlot { slot } | Action::StopMaking { slot } => {
                    nodes.get_mut(&step.node).unwrap().survey.slots.retain(|found| found.name != *slot);
                }
                Action::Subscribe { publisher, copy, statement } => {
                    let slot = config.slot(publisher, &step.node);
                    let slots = &mut nodes.get_mut(publisher).unwrap().survey.slots;
                    let there = slots.iter().any(|found| found.name == slot);
                    assert_eq!(there, statement.contains("create_slot = false"), "{slot}: {statement}");
                    if !there {
                        slots.push(Slot { name: slot, here: true, unread: true, ..Slot::default() });
                    }
                    let from = nodes[publisher].filled.clone();
                    let seen = nodes.get_mut(&step.node).unwrap();
                    seen.survey.subscriptions.push(Subscription {
                        name: subscription(publisher),
                        slot: Some(config.slot(publisher, &step.node)),
                        publications: vec![config.publication.clone()],
                        ..Subscription::default()
                    });
                    if *copy {
                        seen.filled.extend(from);
                    }
                }
                Action::Enable { publisher, .. } => {
                    let all = &mut nodes.get_mut(&step.node).unwrap().survey.subscriptions;
                    all.iter_mut().find(|found| found.name == subscription(publisher)).unwrap().enabled = true;
                }
                Action::Close => nodes.get_mut(&step.node).unwrap().standing = Standing::Parked,
                Action::Open => nodes.get_mut(&step.node).unwrap().standing = Standing::Up,
                _ => {}
            }
        }
    }

    #[test]
    fn of_empty_nodes_the_second_is_closed_and_gets_whatever_is_written_on_the_first() {
        let config = config(2);
        let plan = plan_of(&config, &empty(&config), &wish()).unwrap();
        let expected = [
            "a: select multihome.identify",
            "b: select multihome.identify",
            "b: close",
            "b: copies a",
            "a: follows b",
            "b: hears a",
            "a: hears b",
            "b: copy",
            "b: open",
            "a: prove",
        ];
        assert_eq!(short(&plan), expected);
        let Action::Subscribe { statement, .. } = &plan
            .steps
            .iter()
            .find(|step| step.node == "b" && matches!(step.action, Action::Subscribe { .. }))
            .unwrap()
            .action
        else {
            unreachable!()
        };
        for part in ["origin = none", "enabled = false", "copy_data = true", "slot_name = multihome"] {
            assert!(statement.contains(part), "no {part} in {statement}");
        }
    }

    #[test]
    fn the_node_with_the_rows_stays_open_and_the_empty_one_copies() {
        let config = config(2);
        let mut nodes = empty(&config);
        fill(nodes.get_mut("b").unwrap(), 7);
        let plan = plan_of(&config, &nodes, &wish()).unwrap();
        assert_eq!((plan.source.as_deref(), plan.newcomers.as_slice()), (Some("b"), &["a".to_owned()][..]));
        assert!(short(&plan).contains(&"a: close".to_owned()) && !short(&plan).contains(&"b: close".to_owned()));
        let from_the_empty_one = Wish { from: Some("a".into()), ..wish() };
        assert!(plan_of(&config, &nodes, &from_the_empty_one).unwrap_err().message.contains("b has rows"));
    }

    #[test]
    fn two_nodes_with_rows_are_refused_unless_they_are_the_same_and_meant_to_be() {
        let config = config(2);
        let mut nodes = empty(&config);
        fill(nodes.get_mut("a").unwrap(), 7);
        fill(nodes.get_mut("b").unwrap(), 8);
        let same = Wish { assume_identical: true, ..wish() };
        for wish in [&wish(), &same] {
            let refusal = plan_of(&config, &nodes, wish).unwrap_err();
            assert_eq!(refusal.detail.as_deref(), Some("app.t: 7 rows on a, 8 rows on b"));
        }
        fill(nodes.get_mut("b").unwrap(), 7);
        assert!(plan_of(&config, &nodes, &wish()).unwrap_err().hint.contains("--assume-identical"));
        let plan = short(&plan_of(&config, &nodes, &same).unwrap());
        assert_eq!(plan[2..5], ["a: close", "b: close", "a: compare"]);
        assert!(!plan.iter().any(|line| line.contains("copies")));
    }

    #[test]
    fn a_set_that_replicates_needs_nothing_and_one_left_closed_is_opened() {
        let config = config(2);
        let mut nodes = empty(&config);
        let steps = plan_of(&config, &nodes, &wish()).unwrap().steps;
        take(&config, &mut nodes, &steps);
        assert_eq!(plan_of(&config, &nodes, &wish()).unwrap().steps, []);
        nodes.get_mut("b").unwrap().standing = Standing::Parked;
        assert_eq!(short(&plan_of(&config, &nodes, &wish()).unwrap()), ["b: open", "a: prove"]);
        // Whoever was taken down by somebody else stays so.
        nodes.get_mut("b").unwrap().standing = Standing::Down;
        assert_eq!(plan_of(&config, &nodes, &wish()).unwrap().steps, []);
    }

    #[test]
    fn a_third_node_makes_new_names_and_gets_a_copy_of_one_that_has_heard_the_other() {
        let (pair, set) = (config(2), config(3));
        let mut nodes = empty(&pair);
        fill(nodes.get_mut("a").unwrap(), 7);
        let steps = plan_of(&pair, &nodes, &wish()).unwrap().steps;
        take(&pair, &mut nodes, &steps);
        nodes.insert("c".into(), empty(&set)["c"].clone());
        let plan = plan_of(&set, &nodes, &wish()).unwrap();
        let lines = short(&plan);
        assert_eq!(lines.iter().filter(|line| line.contains("copies")).collect::<Vec<_>>(), ["c: copies a"]);
        let at = |line: &str| lines.iter().position(|found| found == line).unwrap();
        assert!(at("b: close") < at("a: gathers b") && at("a: gathers b") < at("c: copies a"), "{lines:#?}");
        // Also if the last run was cut off when it had renamed one of the two.
        let renamed = plan.steps.iter().position(|step| step.action.text().contains(" rename to ")).unwrap();
        take(&set, &mut nodes, &plan.steps[..=renamed]);
        let plan = plan_of(&set, &nodes, &wish()).unwrap();
        assert_eq!(short(&plan).iter().filter(|line| line.contains("copies")).collect::<Vec<_>>(), ["c: copies a"]);
        take(&set, &mut nodes, &plan.steps);
        assert_eq!(plan_of(&set, &nodes, &wish()).unwrap().steps, []);
    }

    #[test]
    fn a_node_that_somebody_took_down_has_its_slots_before_anything_is_subscribed() {
        let config = config(2);
        let mut nodes = empty(&config);
        fill(nodes.get_mut("a").unwrap(), 7);
        nodes.get_mut("b").unwrap().standing = Standing::Down;
        let plan = plan_of(&config, &nodes, &wish()).unwrap();
        let lines = short(&plan);
        let made = plan.steps.iter().position(|step| matches!(step.action, Action::MakeSlot { .. })).unwrap();
        let at = |line: &str| lines.iter().position(|found| found == line).unwrap();
        assert!(plan.steps[made].node == "b" && made < at("b: copies a") && at("b: copies a") < at("a: follows b"));
        assert!(!lines.contains(&"b: open".to_owned()), "{lines:#?}");
        // Cut off between the two, the slot tells that nothing was missed; one that somebody has read does not.
        take(&config, &mut nodes, &plan.steps[..=at("b: copies a")]);
        let next = plan_of(&config, &nodes, &wish()).unwrap();
        assert!(
            !next.steps.iter().any(|step| matches!(step.action, Action::MakeSlot { .. } | Action::DropSlot { .. }))
        );
        nodes.get_mut("b").unwrap().survey.slots[0].unread = false;
        assert!(plan_of(&config, &nodes, &wish()).unwrap_err().message.ends_with("meanwhile is not known"));
    }

    #[test]
    fn a_slot_that_a_killed_run_is_having_made_is_ended_first() {
        let config = config(2);
        let mut nodes = empty(&config);
        let slot = Slot { name: "multihome".into(), here: true, active: true, unmade: true, ..Slot::default() };
        nodes.get_mut("a").unwrap().survey.slots.push(slot);
        let plan = plan_of(&config, &nodes, &wish()).unwrap();
        assert!(plan.steps.contains(&step(
            "a",
            Action::StopMaking { slot: "multihome".into() },
            "it is for a run that was cut off"
        )));
        nodes.get_mut("a").unwrap().survey.slots[0].unmade = false;
        assert!(plan_of(&config, &nodes, &wish()).unwrap_err().message.contains("somebody else's"));
    }

    #[test]
    fn said_again_from_is_no_error_but_for_a_node_that_is_given_a_copy() {
        let config = config(2);
        let mut nodes = empty(&config);
        fill(nodes.get_mut("a").unwrap(), 7);
        let from = |node: &str| Wish { from: Some(node.into()), ..wish() };
        let steps = plan_of(&config, &nodes, &from("a")).unwrap().steps;
        let copied = steps.iter().position(|step| step.action == Action::Copy).unwrap();
        take(&config, &mut nodes, &steps[..copied]);
        nodes.get_mut("b").unwrap().survey.subscriptions[0].copying = 1;
        assert_eq!(short(&plan_of(&config, &nodes, &from("a")).unwrap()), ["b: copy", "b: open", "a: prove"]);
        assert!(plan_of(&config, &nodes, &from("b")).unwrap_err().message.contains("being given a copy"));
        nodes.get_mut("b").unwrap().survey.subscriptions[0].copying = 0;
        nodes.get_mut("b").unwrap().standing = Standing::Up;
        assert_eq!(plan_of(&config, &nodes, &from("a")).unwrap().steps, []);
    }

    #[test]
    fn nodes_of_different_sets_are_refused() {
        let config = config(2);
        let mut nodes = empty(&config);
        for (name, pair) in [("a", "one"), ("b", "another")] {
            let identity = Identity { node: name.into(), pair: pair.into(), ..Identity::default() };
            nodes.get_mut(name).unwrap().survey.identity = Some(identity);
        }
        assert!(plan_of(&config, &nodes, &wish()).unwrap_err().message.contains("different sets"));
    }

    fn some_nodes() -> impl Strategy<Value = (Config, BTreeMap<String, Seen>, Wish)> {
        let standing = prop_oneof![4 => Just(Standing::Up), 1 => Just(Standing::Down), 1 => Just(Standing::Parked)];
        let node = (standing, prop_oneof![2 => Just(0), 1 => 1..3_i64]);
        let from = proptest::option::weighted(0.2, 0..2_usize);
        (2..=3_usize, proptest::collection::vec(node, 3), from, any::<bool>()).prop_map(|(size, states, from, same)| {
            let config = config(size);
            let mut nodes = empty(&config);
            for (seen, (standing, rows)) in nodes.values_mut().zip(states) {
                seen.standing = standing;
                if rows > 0 {
                    fill(seen, rows);
                }
            }
            let from = from.map(|index| config.nodes[index].name.clone());
            let wish = Wish { assume_identical: same && from.is_none(), from, ..wish() };
            (config, nodes, wish)
        })
    }

    proptest! {
        #[test]
        fn no_plan_copies_into_rows_or_both_ways_and_each_ends_with_the_proof((config, nodes, wish) in some_nodes()) {
            let Ok(plan) = plan_of(&config, &nodes, &wish) else { return Ok(()) };
            prop_assert_eq!(&plan.steps.last().unwrap().action, &Action::Prove);
            let at = |wanted: &dyn Fn(&Step) -> bool| -> Vec<usize> {
                (0..plan.steps.len()).filter(|&index| wanted(&plan.steps[index])).collect()
            };
            for step in &plan.steps {
                if let Action::Subscribe { publisher, copy: true, .. } = &step.action {
                    prop_assert_eq!(Some(publisher), plan.source.as_ref());
                    prop_assert!(nodes[&step.node].filled.is_empty());
                    prop_assert!(plan.newcomers.contains(&step.node));
                }
            }
            for name in nodes.keys() {
                // Closed before the first copy, and opened after it has all.
                let closed = at(&|step| step.node == *name && step.action == Action::Close);
                let opened = at(&|step| step.node == *name && step.action == Action::Open);
                let made = at(&|step| matches!(step.action, Action::Subscribe { .. } | Action::Enable { .. }));
                let copied = at(&|step| step.action == Action::Copy);
                prop_assert!(closed.iter().all(|index| made.iter().all(|later| index < later)));
                prop_assert!(opened.iter().all(|index| made.iter().chain(&copied).all(|earlier| index > earlier)));
                prop_assert_eq!(!opened.is_empty(), !closed.is_empty() || nodes[name].standing == Standing::Parked);
                if plan.newcomers.contains(name) {
                    prop_assert!(!closed.is_empty() || nodes[name].standing != Standing::Up);
                }
            }
        }

        #[test]
        fn what_was_cut_off_anywhere_is_finished_by_the_next_run((config, nodes, wish) in some_nodes(), cut in 0..100_usize) {
            let Ok(first) = plan_of(&config, &nodes, &wish) else { return Ok(()) };
            let before: BTreeMap<String, Standing> =
                nodes.iter().map(|(name, seen)| (name.clone(), seen.standing)).collect();
            let mut nodes = nodes;
            let cut = cut % (first.steps.len() + 1);
            take(&config, &mut nodes, &first.steps[..cut]);
            let next = plan_of(&config, &nodes, &wish)
                .map_err(|refusal| TestCaseError::fail(format!("{:#?}, cut at {cut}: {refusal:#?}", short(&first))))?;
            // Nobody is waited for who has no way to be heard.
            for (index, step) in next.steps.iter().enumerate() {
                let Action::Gather { peers } = &step.action else { continue };
                for peer in peers {
                    let wanted = config.subscription_to(peer);
                    let mut until = nodes.clone();
                    take(&config, &mut until, &next.steps[..index]);
                    let all = &until[&step.node].survey.subscriptions;
                    prop_assert!(all.iter().any(|found| found.name == wanted && found.enabled));
                }
            }
            take(&config, &mut nodes, &next.steps);
            prop_assert_eq!(plan_of(&config, &nodes, &Wish { fresh_pair: "pair".into(), ..Wish::default() }).unwrap().steps, vec![]);
            // Whoever was taken down by somebody stays so; all others are open, whatever an earlier run had closed.
            for (name, seen) in &nodes {
                let was = if before[name] == Standing::Down { Standing::Down } else { Standing::Up };
                prop_assert_eq!(seen.standing, was, "{}", name);
            }
        }
    }
}
