//! What is known about the nodes, and what follows from it: is replication flowing, what stands in the way of a hop.
//!
//! [`gather`] asks one node; everything else here is pure. Deliberately judges nothing by age or guess: a thing is either
//! what the server says, or unknown.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::change::{self, Traces};
use crate::config::Config;
use crate::hop::{Note, Seen};
use crate::node::{NodeError, Session, Trouble};
use crate::sql;

/// The state the extension keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// `up`, `down`, or `maintenance`, which is down with a window.
    pub state: String,
    /// Since when, as the server writes it; not known for an up database that has restarted.
    pub since: Option<String>,
    /// The same in microseconds since 1970, by the server's clock.
    pub since_us: Option<i64>,
    /// Who took it down or up.
    pub by: Option<String>,
    /// Why it was taken down.
    pub reason: Option<String>,
    /// The only writable node: refuses writes after a restart.
    pub sole: bool,
    /// Refuses writes because it was the only writable node and has restarted.
    pub rejoin: bool,
    /// The note of an unfinished hop.
    pub hop: Option<serde_json::Value>,
    /// The maintenance window that is open.
    pub window: Option<Window>,
    /// Transactions that could write.
    pub writers: Option<i32>,
}

/// A maintenance window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Whose sessions may write.
    pub role: String,
    /// Until when.
    pub until: String,
}

impl State {
    /// Writable.
    pub fn is_up(&self) -> bool {
        self.state == "up"
    }

    /// The note, as far as it can be understood.
    pub fn note(&self) -> Option<Note> {
        self.hop.as_ref().and_then(|hop| serde_json::from_value(hop.clone()).ok())
    }

    /// As the hop's decisions want it. An error if there is a note that is not of this agent's making.
    pub fn seen(&self) -> Result<Seen, String> {
        if self.is_up() {
            return Ok(Seen::Up { sole: self.sole });
        }
        let note = match &self.hop {
            None => None,
            Some(hop) => Some(Box::new(
                serde_json::from_value(hop.clone())
                    .map_err(|_| format!("its note of a hop is not understood: {hop}"))?,
            )),
        };
        Ok(Seen::Down { rejoin: self.rejoin, note })
    }
}

/// Whether the extension can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Extension {
    /// Its version.
    Version(String),
    /// Not created in this database.
    Missing,
    /// There, but its functions fail: what they say.
    Failing(String),
}

impl Extension {
    /// What is wrong and what to do, if anything is.
    pub fn flaw(&self) -> Option<String> {
        match self {
            Self::Version(_) => None,
            Self::Missing => Some(
                "the extension is missing: install it on the server (make install PG_CONFIG=...), add stillebot to \
                 shared_preload_libraries, restart, then: create extension stillebot"
                    .into(),
            ),
            Self::Failing(message) => Some(message.clone()),
        }
    }
}

/// One subscription of a node.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Subscription {
    /// Its name.
    pub name: String,
    /// Switched on.
    pub enabled: bool,
    /// The slot on the publisher.
    pub slot: Option<String>,
    /// `streaming = parallel`: what its keepalives say need not be applied yet, and hop waits for just that.
    pub parallel: bool,
    /// Its worker is running.
    pub working: bool,
    /// Seconds since the last message of the publisher, keepalives included.
    pub last_message_age: Option<f64>,
    /// Errors in apply so far.
    pub apply_errors: i64,
    /// Errors in the initial copy so far.
    pub sync_errors: i64,
    /// Tables whose initial copy is not finished.
    pub copying: i64,
}

/// One logical slot of a node and who reads it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sender {
    /// The slot.
    pub slot: String,
    /// Somebody reads it.
    pub connected: bool,
    /// `streaming`, `catchup`, ...
    pub state: Option<String>,
    /// Bytes of WAL the subscriber has not applied.
    pub bytes_behind: Option<i64>,
    /// Seconds from writing to applying, as last measured; none when idle.
    pub seconds_behind: Option<f64>,
}

/// Sessions of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sessions {
    /// `application_name`.
    pub application_name: String,
    /// Address, or `local`.
    pub client: String,
    /// Role.
    pub user: String,
    /// `active`, `idle`, ...
    pub state: String,
    /// How many.
    pub sessions: i64,
}

/// Everything one node told.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Facts {
    /// Version of PostgreSQL.
    pub server_version: String,
    /// A standby.
    pub in_recovery: bool,
    /// Start of the server and oid of the database: tells two names of one database apart from two databases.
    #[serde(skip)]
    pub identity: (i64, i64),
    /// Whether the agent's role sees what it must.
    pub monitors: bool,
    /// The extension.
    pub extension: Extension,
    /// Its state; none if the extension cannot be used.
    pub state: Option<State>,
    /// What changes of the schema have left there.
    #[serde(skip)]
    pub changes: Traces,
    /// The application's active side as this node has it.
    pub active: Option<String>,
    /// Why [`Facts::active`] is not known although configured.
    pub active_flaw: Option<String>,
    /// Its subscriptions.
    pub subscriptions: Vec<Subscription>,
    /// Its logical slots.
    pub senders: Vec<Sender>,
    /// Who is connected.
    pub sessions: Vec<Sessions>,
}

/// Reads the state through the extension.
pub async fn state(session: &Session, bound: Duration) -> Result<State, NodeError> {
    let row = session.row(sql::STATE, &[], bound).await?;
    let (hop, window): (Option<String>, Option<String>) = (row.get("hop"), row.get("window"));
    Ok(State {
        state: row.get::<_, Option<String>>("state").unwrap_or_default(),
        since: row.get("since"),
        since_us: row.get("since_us"),
        by: row.get("by_whom"),
        reason: row.get("reason"),
        sole: row.get("sole"),
        rejoin: row.get("rejoin"),
        hop: hop.and_then(|hop| serde_json::from_str(&hop).ok()),
        window: window.and_then(|window| serde_json::from_str(&window).ok()),
        writers: row.get("writers"),
    })
}

/// Asks one node everything. Fails only if the connection does.
pub async fn gather(session: &Session, config: &Config, bound: Duration) -> Result<Facts, NodeError> {
    let identity = session.row(sql::IDENTITY, &[], bound).await?;
    let installed: Option<String> = identity.get("extension");
    let (extension, state) = match installed {
        None => (Extension::Missing, None),
        Some(version) => match state(session, bound).await {
            Ok(state) => (Extension::Version(version), Some(state)),
            Err(error) if error.trouble == Trouble::Refused => {
                let hint = error.hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
                (Extension::Failing(format!("{}{hint}", error.message)), None)
            }
            Err(error) => return Err(error),
        },
    };
    let changes = if state.is_some() { traces(session, bound).await? } else { Traces::default() };
    let (active, active_flaw) = match active(session, config, bound).await {
        Ok(active) => (active, None),
        Err(error) if error.trouble == Trouble::Refused => (None, Some(error.message)),
        Err(error) => return Err(error),
    };
    let subscriptions = session
        .rows(sql::SUBSCRIPTIONS, &[], bound)
        .await?
        .iter()
        .map(|row| Subscription {
            name: row.get("name"),
            enabled: row.get("enabled"),
            slot: row.get("slot"),
            parallel: row.get("parallel"),
            working: row.get("working"),
            last_message_age: row.get("last_message_age"),
            apply_errors: row.get("apply_errors"),
            sync_errors: row.get("sync_errors"),
            copying: row.get("copying"),
        })
        .collect();
    let senders = session
        .rows(sql::SENDERS, &[], bound)
        .await?
        .iter()
        .map(|row| Sender {
            slot: row.get("slot"),
            connected: row.get("connected"),
            state: row.get("state"),
            bytes_behind: row.get("bytes_behind"),
            seconds_behind: row.get("seconds_behind"),
        })
        .collect();
    let sessions = session
        .rows(sql::SESSIONS, &[], bound)
        .await?
        .iter()
        .map(|row| Sessions {
            application_name: row.get("application_name"),
            client: row.get("client"),
            user: row.get("usename"),
            state: row.get("state"),
            sessions: row.get("sessions"),
        })
        .collect();
    Ok(Facts {
        server_version: identity.get("server_version"),
        in_recovery: identity.get("in_recovery"),
        identity: (identity.get("started_us"), identity.get("database_oid")),
        monitors: identity.get("monitors"),
        extension,
        state,
        changes,
        active,
        active_flaw,
        subscriptions,
        senders,
        sessions,
    })
}

/// What changes of the schema have left on a node; nothing if its extension is too old to know any.
pub async fn traces(session: &Session, bound: Duration) -> Result<Traces, NodeError> {
    if !session.row(sql::CHANGE_TELLS, &[], bound).await?.get::<_, bool>("tells") {
        return Ok(Traces::default());
    }
    let told: String = session.row(sql::CHANGE_SEEN, &[], bound).await?.get("traces");
    serde_json::from_str(&told).map_err(|error| {
        session.error(Trouble::Refused, format!("what it says of schema changes is not understood: {error}"))
    })
}

/// The nodes whose state is known, as the decisions about changes of the schema want them.
pub fn changed(facts: &BTreeMap<String, Facts>) -> Vec<change::Seen> {
    let seen = |(name, facts): (&String, &Facts)| {
        let state = facts.state.clone()?;
        Some(change::Seen { name: name.clone(), state, traces: facts.changes.clone() })
    };
    facts.iter().filter_map(seen).collect()
}

/// Reads the application's active side; none if not configured or not set.
pub async fn active(session: &Session, config: &Config, bound: Duration) -> Result<Option<String>, NodeError> {
    let Some(active) = &config.active else { return Ok(None) };
    let query = sql::ACTIVE.replace("{table}", &active.table).replace("{column}", &active.column);
    let rows = session.rows(&query, &[], bound).await?;
    Ok(rows.first().and_then(|row| row.get("active")))
}

/// Replication from one node to another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Direction {
    /// Where it was written.
    pub from: String,
    /// Where it is applied.
    pub to: String,
    /// Both ends are at work.
    pub connected: bool,
    /// Bytes of WAL not yet applied.
    pub bytes_behind: Option<i64>,
    /// Seconds from writing to applying; zero when all is applied.
    pub seconds_behind: Option<f64>,
    /// Seconds since the target heard from the source.
    pub last_message_age: Option<f64>,
    /// What is wrong, if anything.
    pub trouble: Option<String>,
}

/// All directions between the nodes; what one end cannot tell is taken from the other.
pub fn directions(config: &Config, facts: &BTreeMap<String, Facts>) -> Vec<Direction> {
    let names = || config.nodes.iter().map(|node| node.name.as_str());
    names()
        .flat_map(|from| names().filter(move |to| *to != from).map(move |to| (from, to)))
        .map(|(from, to)| direction(config, from, facts.get(from), to, facts.get(to)))
        .collect()
}

fn direction(config: &Config, from: &str, source: Option<&Facts>, to: &str, target: Option<&Facts>) -> Direction {
    let name = config.subscription_to(from);
    let subscription = target.and_then(|facts| facts.subscriptions.iter().find(|s| s.name == name));
    let slot = subscription.and_then(|s| s.slot.as_deref());
    let sender = source.and_then(|facts| facts.senders.iter().find(|s| Some(s.slot.as_str()) == slot));

    let trouble = match (target, subscription, source, sender) {
        (None, ..) => Some(format!("{to} cannot be asked")),
        (Some(_), None, ..) => Some(format!("{to} has no subscription {name}")),
        (_, Some(s), ..) if !s.enabled => Some(format!("subscription {name} on {to} is disabled")),
        (_, Some(s), ..) if !s.working => Some(format!(
            "subscription {name} on {to} is not working{}",
            if s.apply_errors > 0 { format!(" ({} apply errors so far)", s.apply_errors) } else { String::new() }
        )),
        (_, Some(s), ..) if s.parallel => Some(format!(
            "subscription {name} on {to} applies in parallel; there: alter subscription {name} set (streaming = on)"
        )),
        (_, Some(s), ..) if s.copying > 0 => Some(format!("{to} is still copying {} tables from {from}", s.copying)),
        (_, _, None, _) => Some(format!("{from} cannot be asked")),
        (_, Some(s), Some(_), None) => Some(format!("{from} has no slot {}", s.slot.as_deref().unwrap_or("at all"))),
        (_, _, Some(_), Some(sender)) if !sender.connected => {
            Some(format!("nobody reads slot {} on {from}", sender.slot))
        }
        (_, _, Some(facts), Some(sender)) if sender.state.is_none() && !facts.monitors => {
            Some(format!("the agent may not look at replication on {from}: grant pg_monitor to its role"))
        }
        (_, _, _, Some(sender)) if sender.state.as_deref() == Some("catchup") => {
            Some(format!("{to} is catching up with {from}"))
        }
        _ => None,
    };
    let bytes_behind = sender.and_then(|s| s.bytes_behind);
    Direction {
        from: from.into(),
        to: to.into(),
        connected: subscription.is_some_and(|s| s.working) && sender.is_none_or(|s| s.connected),
        bytes_behind,
        seconds_behind: if bytes_behind == Some(0) { Some(0.0) } else { sender.and_then(|s| s.seconds_behind) },
        last_message_age: subscription.and_then(|s| s.last_message_age),
        trouble,
    }
}

/// What about the nodes themselves stands in the way of a hop.
pub fn node_obstacles(config: &Config, facts: &BTreeMap<String, Facts>) -> Vec<String> {
    let mut obstacles = Vec::new();
    let mut identities: BTreeMap<(i64, i64), &str> = BTreeMap::new();
    for node in &config.nodes {
        let Some(facts) = facts.get(&node.name) else { continue };
        if let Some(other) = identities.insert(facts.identity, &node.name) {
            obstacles.push(format!("{other} and {} are the same database: check the host names", node.name));
        }
        if facts.in_recovery {
            obstacles.push(format!("{} is a standby in recovery", node.name));
        }
        if let Some(flaw) = facts.extension.flaw() {
            obstacles.push(format!("{}: {flaw}", node.name));
        }
        if let Some(flaw) = &facts.active_flaw {
            obstacles.push(format!("{}: the active side cannot be read: {flaw}", node.name));
        }
    }
    obstacles
}

/// The verdict of `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Nothing stands in the way.
    pub ready: bool,
    /// In one line.
    pub text: String,
    /// Each thing that stands in the way.
    pub obstacles: Vec<String>,
}

/// Whether a hop could begin now. `unreachable` are the nodes that could not be asked.
pub fn verdict(config: &Config, facts: &BTreeMap<String, Facts>, unreachable: &[String]) -> Verdict {
    let mut obstacles = Vec::new();
    for (name, facts) in facts {
        if let Some(state) = &facts.state
            && let Some(hop) = &state.hop
        {
            obstacles.push(match state.note() {
                Some(note) => format!(
                    "unfinished hop to {to} (begun {} by {}; {name} is closed for it): `hop {to} --resume` or \
                     `hop {to} --abort`",
                    note.started,
                    note.by,
                    to = note.to,
                ),
                None => format!("{name} carries a note that is not understood: {hop}"),
            });
        }
    }
    obstacles.extend(change::left(&changed(facts)).iter().map(ToString::to_string));
    obstacles.extend(unreachable.iter().map(|name| format!("{name} cannot be reached")));
    obstacles.extend(node_obstacles(config, facts));
    obstacles.extend(
        directions(config, facts)
            .into_iter()
            .filter(|d| !unreachable.contains(&d.from) && !unreachable.contains(&d.to))
            .filter_map(|d| d.trouble),
    );
    if config.nodes.len() < 2 {
        obstacles.push("there is only one node".into());
    }
    let up: Vec<&str> = config
        .nodes
        .iter()
        .map(|node| node.name.as_str())
        .filter(|name| facts.get(*name).and_then(|f| f.state.as_ref()).is_some_and(State::is_up))
        .collect();
    let writable = match up.as_slice() {
        [] => "no node is writable".to_owned(),
        [one] => format!("{one} is writable"),
        several => format!("{} are writable", several.join(" and ")),
    };
    let ready = obstacles.is_empty();
    let text = if ready { format!("ready to hop: {writable}") } else { obstacles.join("; ") };
    Verdict { ready, text, obstacles }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;

    fn config() -> Config {
        let text = "user='u'\n[[node]]\nname='a'\nhost='a'\n[[node]]\nname='b'\nhost='b'";
        Config::parse(text, &Environment { variable: &|_| None, os_user: None }).unwrap()
    }

    fn facts(started: i64, state: &str) -> Facts {
        Facts {
            server_version: "16.14".into(),
            in_recovery: false,
            identity: (started, 5),
            monitors: true,
            extension: Extension::Version("0.1.0".into()),
            state: Some(State {
                state: state.into(),
                since: None,
                since_us: None,
                by: None,
                reason: None,
                sole: false,
                rejoin: false,
                hop: None,
                window: None,
                writers: None,
            }),
            changes: Traces::default(),
            active: None,
            active_flaw: None,
            subscriptions: vec![Subscription {
                name: "multihome".into(),
                enabled: true,
                slot: Some("multihome".into()),
                parallel: false,
                working: true,
                last_message_age: Some(1.0),
                apply_errors: 0,
                sync_errors: 0,
                copying: 0,
            }],
            senders: vec![Sender {
                slot: "multihome".into(),
                connected: true,
                state: Some("streaming".into()),
                bytes_behind: Some(0),
                seconds_behind: None,
            }],
            sessions: vec![],
        }
    }

    fn pair() -> BTreeMap<String, Facts> {
        BTreeMap::from([("a".to_owned(), facts(1, "up")), ("b".to_owned(), facts(2, "down"))])
    }

    #[test]
    fn a_healthy_pair_is_ready() {
        let verdict = verdict(&config(), &pair(), &[]);
        assert!(verdict.ready, "{verdict:?}");
        assert_eq!(verdict.text, "ready to hop: a is writable");
        let directions = directions(&config(), &pair());
        assert_eq!(directions.len(), 2);
        assert_eq!(directions[0].seconds_behind, Some(0.0));
    }

    #[test]
    fn each_obstacle_is_named() {
        type Spoil = fn(&mut BTreeMap<String, Facts>);
        let cases: [(Spoil, &str); 9] = [
            (|f| f.get_mut("b").unwrap().subscriptions[0].enabled = false, "disabled"),
            (|f| f.get_mut("b").unwrap().subscriptions[0].working = false, "not working"),
            (|f| f.get_mut("b").unwrap().subscriptions[0].parallel = true, "set (streaming = on)"),
            (|f| f.get_mut("b").unwrap().subscriptions[0].copying = 2, "still copying 2 tables"),
            (|f| f.get_mut("b").unwrap().subscriptions.clear(), "no subscription multihome"),
            (|f| f.get_mut("a").unwrap().senders.clear(), "no slot multihome"),
            (|f| f.get_mut("b").unwrap().identity = (1, 5), "same database"),
            (|f| f.get_mut("b").unwrap().extension = Extension::Missing, "create extension stillebot"),
            (
                |f| f.get_mut("b").unwrap().state.as_mut().unwrap().hop = Some(serde_json::json!({"x": 1})),
                "not understood",
            ),
        ];
        for (spoil, expected) in cases {
            let mut facts = pair();
            spoil(&mut facts);
            let verdict = verdict(&config(), &facts, &[]);
            assert!(!verdict.ready && verdict.text.contains(expected), "{expected}: {}", verdict.text);
        }
    }

    #[test]
    fn an_unreachable_node_is_an_obstacle() {
        let mut facts = pair();
        facts.remove("b");
        let verdict = verdict(&config(), &facts, &["b".to_owned()]);
        assert_eq!(verdict.obstacles, ["b cannot be reached"]);
    }
}
