//! The sessions of one command: one on each node it changes, each holding that node's advisory lock.
//!
//! Everything a command does on a node goes through the session that holds the lock, so that losing the lock means losing
//! the ability to act. Deliberately takes no decision; it makes sure that what is learned about a node is final.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;

use crate::config::{Config, Node};
use crate::facts::{self, State};
use crate::failure::{Failure, Kind};
use crate::node::{Connector, NodeError, Session, Trouble};
use crate::sql;

/// How long making one connection may take.
pub const CONNECT_BOUND: Duration = Duration::from_secs(5);
/// How long a query may take that only looks something up.
pub const LOOK_BOUND: Duration = Duration::from_secs(5);
/// How long the lock is waited for: a server needs a moment to notice that an earlier agent has died.
const LOCK_BOUND: Duration = Duration::from_secs(3);

/// The sessions.
pub struct Crew<'a> {
    config: &'a Config,
    connector: &'a Connector,
    sessions: BTreeMap<String, Session>,
    /// Server processes of sessions given up, which may still be at work.
    lost: BTreeMap<String, (i32, i64)>,
}

impl<'a> Crew<'a> {
    /// Connects to the nodes, all at once; returns, too, those that cannot be reached.
    pub async fn muster(
        config: &'a Config,
        connector: &'a Connector,
        nodes: &[&Node],
    ) -> (Self, BTreeMap<String, NodeError>) {
        let mut crew = Self { config, connector, sessions: BTreeMap::new(), lost: BTreeMap::new() };
        let mut errors = BTreeMap::new();
        let results = join_all(nodes.iter().map(|node| connector.connect(node, CONNECT_BOUND))).await;
        for (node, result) in nodes.iter().zip(results) {
            match result {
                Ok(session) => drop(crew.sessions.insert(node.name.clone(), session)),
                Err(error) => drop(errors.insert(node.name.clone(), error)),
            }
        }
        (crew, errors)
    }

    /// Takes the lock on every node that is connected, in the order of the configuration.
    pub async fn lock(&self) -> Result<(), Failure> {
        for node in &self.config.nodes {
            if let Some(session) = self.sessions.get(&node.name)
                && !take_lock(session, LOCK_BOUND).await?
            {
                return Err(self.held(session).await);
            }
        }
        Ok(())
    }

    /// Gives the lock back on every node. A session that is lost has given it back.
    pub async fn unlock(&self) {
        let sessions = self.sessions.values();
        for result in join_all(sessions.map(|session| session.rows(sql::UNLOCK, &[], LOOK_BOUND))).await {
            if let Err(error) = result {
                tracing::debug!(%error, "not unlocked");
            }
        }
    }

    /// Connects to the nodes that have no sound session, all at once, without taking their lock; returns those that cannot be
    /// reached. For a command that goes on for long and holds the lock only at times.
    pub async fn refill(&mut self) -> BTreeMap<String, NodeError> {
        let lost: Vec<String> = self.sessions.values().filter(|s| s.is_lost()).map(|s| s.node.clone()).collect();
        for node in lost {
            self.give_up(&node);
        }
        let missing: Vec<&Node> =
            self.config.nodes.iter().filter(|node| !self.sessions.contains_key(&node.name)).collect();
        let results = join_all(missing.iter().map(|node| self.connect_anew(node, CONNECT_BOUND))).await;
        let mut errors = BTreeMap::new();
        for (node, result) in missing.iter().zip(results) {
            match result {
                Ok(session) => drop(self.sessions.insert(node.name.clone(), session)),
                Err(error) => drop(errors.insert(node.name.clone(), error)),
            }
        }
        errors
    }

    /// Why the lock cannot be had.
    async fn held(&self, session: &Session) -> Failure {
        let rows = session.rows(sql::LOCK_HOLDER, &[], LOOK_BOUND).await.unwrap_or_default();
        let mut failure =
            Failure::new(Kind::Undone, format!("another agent is at work on {}; nothing was changed", session.node))
                .hint("wait for it to end, or end its process and try again");
        if let Some(row) = rows.first() {
            let (pid, started): (i32, i64) = (row.get("pid"), row.get("started_us"));
            if let Some(own) = self.sessions.values().find(|own| own.backend == (pid, started)) {
                let message = format!("{} and {} are the same database; nothing was changed", own.node, session.node);
                return Failure::new(Kind::Configuration, message).hint("check node.host and node.port of both");
            }
            let (user, client, since): (String, String, String) =
                (row.get("usename"), row.get("client"), row.get("since"));
            failure.detail = Some(format!("held by pid {pid}, {user} from {client}, connected since {since}"));
        }
        failure
    }

    /// The nodes that are connected.
    pub fn names(&self) -> Vec<String> {
        self.sessions.keys().cloned().collect()
    }

    /// The session on a node.
    pub fn session(&self, node: &str) -> Result<&Session, NodeError> {
        self.sessions.get(node).filter(|session| !session.is_lost()).ok_or_else(|| self.no_connection(node))
    }

    fn no_connection(&self, node: &str) -> NodeError {
        NodeError {
            node: node.to_owned(),
            place: self.config.node(node).map_or_else(String::new, |n| format!("{}:{}", n.host, n.port)).into(),
            trouble: Trouble::Lost,
            message: "the connection is lost".into(),
            detail: None,
            hint: None,
            answered: false,
        }
    }

    /// Gives up a session whose last request has an unknown outcome.
    pub fn give_up(&mut self, node: &str) {
        if let Some(session) = self.sessions.remove(node) {
            self.lost.insert(node.to_owned(), session.backend);
            session.abandon();
        }
    }

    /// The state of a node, for certain: nothing that was asked earlier is still under way. Uses the session if it is sound;
    /// otherwise makes a new one and gets the lock, which the old one held as long as it lived.
    pub async fn learn(&mut self, node: &str, bound: Duration) -> Result<State, NodeError> {
        let until = Instant::now() + bound;
        if let Ok(session) = self.session(node) {
            match facts::state(session, bound.min(LOOK_BOUND)).await {
                Err(error) if error.trouble == Trouble::Lost => {}
                result => return result,
            }
        }
        self.give_up(node);
        let Some(place) = self.config.node(node) else { return Err(self.no_connection(node)) };
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.reconnect(place, left).await {
                Ok((session, state)) => {
                    self.sessions.insert(node.to_owned(), session);
                    return Ok(state);
                }
                Err(error) if until.saturating_duration_since(Instant::now()) < Duration::from_millis(150) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::debug!(node, %error, "trying again");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Makes a new session, and ends on the server the one that was given up.
    async fn connect_anew(&self, node: &Node, bound: Duration) -> Result<Session, NodeError> {
        let session = self.connector.connect(node, bound.min(CONNECT_BOUND)).await?;
        if let Some((pid, started)) = self.lost.get(&node.name)
            && let Err(error) = session.rows(sql::END_SESSION, &[pid, started], LOOK_BOUND).await
        {
            tracing::debug!(node = node.name, %error, "the lost session could not be ended, waiting for its end");
        }
        Ok(session)
    }

    async fn reconnect(&self, node: &Node, bound: Duration) -> Result<(Session, State), NodeError> {
        let session = self.connect_anew(node, bound).await?;
        if !take_lock(&session, bound.min(LOCK_BOUND)).await? {
            let mut error = self.no_connection(&node.name);
            error.message = "an earlier session of an agent is still alive there".into();
            return Err(error);
        }
        let state = facts::state(&session, LOOK_BOUND).await?;
        Ok((session, state))
    }

    /// Whether a subscription of a node has applied everything up to that position of its publisher.
    pub async fn has_applied(&self, node: &str, subscription: &str, position: PgLsn) -> Result<bool, NodeError> {
        let rows = self.session(node)?.rows(sql::APPLIED, &[&subscription, &position], LOOK_BOUND).await?;
        Ok(rows.first().and_then(|row| row.get::<_, Option<bool>>("applied")) == Some(true))
    }

    /// Runs a query on a node through its session, and gives the session up if the outcome is unknown.
    pub async fn ask(
        &mut self,
        node: &str,
        query: &str,
        params: crate::node::Params<'_>,
        bound: Duration,
    ) -> Result<Vec<tokio_postgres::Row>, NodeError> {
        let result = match self.session(node) {
            Ok(session) => session.rows(query, params, bound).await,
            Err(error) => Err(error),
        };
        if result.as_ref().is_err_and(|error| error.trouble == Trouble::Lost) {
            self.give_up(node);
        }
        result
    }
}

async fn take_lock(session: &Session, bound: Duration) -> Result<bool, NodeError> {
    let until = Instant::now() + bound;
    loop {
        if session.row(sql::LOCK, &[], LOOK_BOUND).await?.get("locked") {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        sleep(Duration::from_millis(50)).await;
    }
}
