//! What `init`, `deinit` and `set-connection` share: sessions as superuser, on other ways if need be; how a plan is shown, the operator's consent, and
//! what is said of a run that did not come to its end.
//!
//! Deliberately changes nothing.

use std::collections::BTreeMap;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;

use super::{Context, print, unreachable, visit};
use crate::cli;
use crate::config::{Config, Node};
use crate::crew::{Crew, LOOK_BOUND};
use crate::failure::{Failure, Kind};
use crate::node::{Connector, NodeError, Session};
use crate::sql;

/// Between two looks at something that is waited for.
const GLANCE: Duration = Duration::from_millis(50);
/// How long a slot may be in use by a sender whose receiver is gone.
const SLOT_BOUND: Duration = Duration::from_secs(15);

/// How the nodes are reached as superuser.
pub struct Admin {
    /// The configuration, with the superuser in it and the other ways.
    config: Config,
    /// Makes those connections.
    pub connector: Connector,
}

impl Admin {
    /// Understands the options.
    pub fn new(context: &Context, options: &cli::Admin) -> Result<Self, Failure> {
        let mut config = context.config.clone();
        options.role().clone_into(&mut config.user);
        if let (Some(cert), Some(key)) = (&options.admin_cert, &options.admin_key) {
            config.tls.cert = Some(cert.clone());
            config.tls.key = Some(key.clone());
        }
        for via in &options.via {
            context.node(&via.node)?;
            let Some(node) = config.nodes.iter_mut().find(|node| node.name == via.node) else { continue };
            node.port = via.port;
            // A socket, on either end, needs no certificate; a forwarded port leads to the node whose name that one has.
            if via.host.starts_with('/') {
                node.host.clone_from(&via.host);
            } else {
                node.through = Some(via.host.clone());
            }
        }
        let connector = Connector::new(&config)?;
        Ok(Self { config, connector })
    }

    /// A session as superuser on each node that can be reached.
    pub async fn muster(&self) -> Result<(Crew<'_>, BTreeMap<String, NodeError>), Failure> {
        let nodes: Vec<&Node> = self.config.nodes.iter().collect();
        let (crew, mut errors) = Crew::muster(&self.config, &self.connector, &nodes).await;
        for error in errors.values_mut().filter(|error| error.answered) {
            error.hint = Some(format!(
                "{}; roles and subscriptions are a superuser's to make: see --admin, --admin-cert and --via in --help",
                error.hint.as_deref().unwrap_or_default()
            ));
        }
        for name in crew.names() {
            let session = crew.session(&name)?;
            if !session.row(sql::SETUP_SELF, &[], LOOK_BOUND).await?.get::<_, bool>("superuser") {
                let message = format!("{name}: {} is no superuser; nothing was changed", self.config.user);
                return Err(Failure::new(Kind::Configuration, message).hint("name one with --admin"));
            }
            // What a down database tells its sessions must not refuse the agent's own.
            // And what waits on a server for a run that was killed must not go on waiting, with the lock in its hands.
            let own = "set default_transaction_read_only = off; set client_connection_check_interval = '500ms'";
            session.run(own, LOOK_BOUND).await?;
        }
        Ok((crew, errors))
    }

    /// One more session as superuser on a node.
    pub async fn another(&self, context: &Context, name: &str) -> Result<Session, Failure> {
        let node = self.config.node(name).map_or_else(|| context.node(name), Ok)?;
        Ok(self.connector.connect(node, LOOK_BOUND).await?)
    }

    /// Connects to a node as superuser and asks it something, all of it within a bound.
    pub async fn visit<T>(
        &self,
        node: &Node,
        bound: Duration,
        ask: impl AsyncFnOnce(&Session) -> Result<T, NodeError>,
    ) -> Result<T, NodeError> {
        visit(&self.connector, self.config.node(&node.name).unwrap_or(node), bound, ask).await
    }

    /// A session as superuser on every node.
    pub async fn muster_all(&self) -> Result<Crew<'_>, Failure> {
        let (crew, errors) = self.muster().await?;
        match unreachable(&errors) {
            Some(failure) => Err(failure),
            None => Ok(crew),
        }
    }
}

/// Steps as people read them: the node of each, and its lines; the name of a node stands where it changes.
pub fn by_node<'a>(steps: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut text = String::new();
    let mut last = "";
    for (node, lines) in steps {
        if node != last {
            last = node;
            text.push_str(&format!("{node}:\n"));
        }
        text.push_str(&format!("  {lines}\n"));
    }
    text
}

/// An error if a signal has come.
pub fn go_on(context: &Context) -> Result<(), Failure> {
    context.signals.received().map_or(Ok(()), |signal| Err(stopped(signal)))
}

/// A signal came before the end.
pub fn stopped(signal: &str) -> Failure {
    Failure::new(Kind::Undone, format!("stopped by {signal}"))
}

/// What a run has left that did so many of these steps, and what else it left; the same command again goes on from there.
pub fn cut_off(
    mut failure: Failure,
    command: &str,
    steps: &[(&str, String)],
    taken: usize,
    left: Option<String>,
) -> Failure {
    if taken == 0 && left.is_none() {
        failure.message.push_str("; nothing was changed");
    } else {
        let mut stands = format!("{taken} of {} steps are done", steps.len());
        if let Some((node, step)) = steps.get(taken) {
            stands.push_str(&format!("; this one is not: {node}: {step}"));
        }
        failure = failure.also(&stands);
        if let Some(left) = left {
            failure = failure.also(&left);
        }
        failure.kind = Kind::NeedsPerson;
    }
    let again = format!("run {command} again: it goes on from there");
    match &mut failure.hint {
        Some(hint) if hint.contains("again") => {}
        Some(hint) => hint.push_str(&format!("; then {again}")),
        None => failure.hint = Some(again),
    }
    failure.report.insert("taken".into(), json!(taken));
    failure
}

/// Shows a plan and asks whether to go on. Without a terminal nobody can be asked.
pub fn consent(context: &Context, plan: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    let refuse = |message: &str| Err(Failure::new(Kind::Undone, format!("{message}; nothing was changed")));
    if context.json || !std::io::stdin().is_terminal() {
        return refuse("nobody can be asked")
            .map_err(|failure| failure.hint("look at what --dry-run says, and then say --yes"));
    }
    print(plan.trim_end());
    let mut terminal = std::io::stderr();
    let _ = write!(terminal, "Do it? [y/N] ").and_then(|()| terminal.flush());
    let mut answer = String::new();
    match std::io::stdin().lock().read_line(&mut answer) {
        Ok(_) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        _ => refuse("not agreed to"),
    }
}

/// Why something was not waited for to the end.
pub enum Halt {
    /// It did not come in that time.
    Late,
    /// A signal came.
    Signal(&'static str),
    /// A node said no, or nothing.
    Node(NodeError),
}

impl From<NodeError> for Halt {
    fn from(error: NodeError) -> Self {
        Self::Node(error)
    }
}

/// Looks again and again until there is something, the time is over or a signal comes.
pub async fn wait<T>(
    context: &Context,
    bound: Duration,
    mut look: impl AsyncFnMut() -> Result<Option<T>, NodeError>,
) -> Result<T, Halt> {
    let until = Instant::now() + bound;
    loop {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        if Instant::now() >= until {
            return Err(Halt::Late);
        }
        tokio::select! {
            signal = context.signals.wait() => return Err(Halt::Signal(signal)),
            () = sleep(GLANCE) => {}
        }
    }
}

/// How a slot stands.
pub struct Slot {
    /// Who sends to its reader; none: nobody reads it.
    pub pid: Option<i32>,
    /// Since when, in microseconds by the server's clock.
    pub since: Option<i64>,
    /// The reader has everything up to the position that was asked about.
    pub heard: bool,
}

/// A slot of this database, if there is one of that name.
pub async fn slot(publisher: &Session, name: &str, position: Option<PgLsn>) -> Result<Option<Slot>, NodeError> {
    let rows = publisher.rows(sql::SETUP_SLOT, &[&name, &position], LOOK_BOUND).await?;
    Ok(rows.first().map(|row| Slot { pid: row.get("pid"), since: row.get("started_us"), heard: row.get("heard") }))
}

/// Drops a slot as soon as nobody reads it; one that is not there is no error.
pub async fn drop_slot(context: &Context, publisher: &Session, slot: &str) -> Result<(), Failure> {
    let gone = wait(context, SLOT_BOUND, async || {
        let row = publisher.row(sql::DEINIT_SLOT, &[&slot], LOOK_BOUND).await?;
        Ok(row.get::<_, bool>("gone").then_some(()))
    });
    gone.await.map_err(|halt| match halt {
        Halt::Late => {
            let message = format!("{}: slot {slot} is still in use", publisher.node);
            Failure::new(Kind::Undone, message).hint("see who reads it in pg_replication_slots")
        }
        Halt::Signal(signal) => stopped(signal),
        Halt::Node(error) => error.into(),
    })
}

/// What a node has noted about a subscription that does not replicate. Nothing, if it has not even the extension.
pub async fn trouble(subscriber: &Session, subscription: &str) -> Option<String> {
    let rows = subscriber.rows(sql::SETUP_TROUBLE, &[&subscription], LOOK_BOUND).await.ok()?;
    rows.first().map(|row| row.get("message"))
}
