//! `set-connection`: subscriptions reach a node at another place, or with other files; proven, or as it was.
//!
//! `connection.rs` decides; here one subscription after the other is changed, and seen to be connected anew before the next one is.
//! What does not come back gets its old connection string, and so do those before it. Deliberately remembers nothing: a run that
//! was killed is finished by the next one, which changes what is not yet as wished.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::admin::{self, Admin};
use super::progress::Progress;
use super::{Context, Reply};
use crate::cli::SetConnection;
use crate::config::Node;
use crate::connection::{self, Answer, Files, Found, Wish};
use crate::conninfo::Conninfo;
use crate::crew::{CONNECT_BOUND, Crew, LOOK_BOUND};
use crate::failure::{Failure, Kind};
use crate::node::{NodeError, Session};
use crate::sql;
use crate::survey::{self, About};

/// How long the statement may take: the extension tries what it is given, for a few seconds.
const STATEMENT_BOUND: Duration = Duration::from_secs(15);
/// Between two looks at a slot.
const GLANCE: Duration = Duration::from_millis(20);

/// One subscription that is to connect with something else.
struct Change {
    of: Found,
    after: Conninfo,
}

impl Change {
    fn text(&self) -> String {
        self.of.statement(&self.after.without_secrets().to_string())
    }

    fn json(&self) -> Value {
        json!({"node": self.of.subscriber, "publisher": self.of.publisher, "subscription": self.of.subscription,
               "connection": self.after.without_secrets().to_string()})
    }
}

/// Runs it.
pub async fn run(context: &Context, options: &SetConnection) -> Result<Reply, Failure> {
    let node = context.node(&options.node)?;
    let files = Files { cert: options.cert.as_deref(), key: options.key.as_deref(), root: options.root.as_deref() };
    let wish = Wish { host: options.host.as_deref(), port: options.port, files };
    let admin = Admin::new(context, &options.admin)?;
    let (crew, errors) = admin.muster().await?;
    let directions = wish.directions(&context.config, node);
    // The node itself need not be reached where the configuration has it: it may be there no more.
    if let Some(error) = directions.iter().find_map(|(subscriber, _)| errors.get(&subscriber.name)) {
        return Err(nothing_changed(error.clone().into()));
    }
    if !options.dry_run {
        crew.lock().await?;
    }
    let mut changes = Vec::new();
    for (subscriber, publisher) in directions {
        let of = find(context, &crew, subscriber, publisher).await?;
        let after = wish.change(&context.config, node, &of).map_err(|why| {
            let message = format!(
                "{}: what the subscription {} connects with cannot be changed in part: {why}; nothing was changed",
                subscriber.name, of.subscription
            );
            Failure::new(Kind::Undone, message)
                .hint("without options, set-connection has it connect as agent.toml says")
        })?;
        if let Some(after) = after {
            changes.push(Change { of, after });
        }
    }
    let mut sessions = BTreeMap::new();
    for change in &changes {
        try_out(context, &crew, change, &mut sessions).await.map_err(nothing_changed)?;
    }
    let lines = wish.configuration(&context.config, node);
    let advice = advice(node, &lines);
    let document = |outcome: &str, changes: Vec<Value>| {
        json!({"command": "set-connection", "outcome": outcome, "node": node.name, "changes": changes,
               "configuration": lines})
    };
    let planned = changes.iter().map(Change::json).collect::<Vec<_>>();
    if changes.is_empty() {
        let text = format!("nothing to do: that is what the subscriptions connect with\n{advice}");
        return Ok(Reply::done(text, document("nothing_to_do", planned)));
    }
    if options.dry_run {
        let steps = changes.iter().map(|change| (change.of.subscriber.as_str(), change.text() + ";"));
        return Ok(Reply::done(admin::by_node(steps) + &advice, document("dry_run", planned)));
    }

    let work = Work { context, options, crew: &crew, sessions: &sessions, progress: Progress::new(context.json) };
    let mut done = Vec::new();
    let mut text = String::new();
    for (number, change) in changes.iter().enumerate() {
        let Found { subscriber, publisher, subscription, .. } = &change.of;
        match work.take(change).await {
            Ok(gap) => {
                let mut json = change.json();
                json["milliseconds"] = json!(gap.map(|gap| gap.as_secs_f64() * 1000.0));
                done.push(json);
                let after = gap.map_or_else(
                    || "is disabled, so nothing has connected yet".to_owned(),
                    |gap| format!("was connected again after {:.0} ms", gap.as_secs_f64() * 1000.0),
                );
                let _ = writeln!(text, "{subscriber}: {subscription}, from {publisher}: {after}");
            }
            Err(failure) => return Err(work.undo(failure, &changes[..=number]).await),
        }
    }
    Ok(Reply::done(text + &advice, document("done", done)))
}

fn advice(node: &Node, lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let lines: String = lines.iter().map(|line| format!("  {line}\n")).collect();
    format!("agent.toml, on every host, needs in [node.replication] of {}:\n{lines}", node.name)
}

fn nothing_changed(mut failure: Failure) -> Failure {
    if !failure.message.ends_with("nothing was changed") {
        failure.message.push_str("; nothing was changed");
    }
    failure
}

async fn find(context: &Context, crew: &Crew<'_>, subscriber: &Node, publisher: &Node) -> Result<Found, Failure> {
    let wanted = context.config.subscription_to(&publisher.name);
    let rows = crew.session(&subscriber.name)?.rows(sql::CONNECTIONS, &[], LOOK_BOUND).await?;
    let row = rows.iter().find(|row| row.get::<_, String>("subscription") == wanted).ok_or_else(|| {
        let message =
            format!("{} has no subscription {wanted} to {}; nothing was changed", subscriber.name, publisher.name);
        Failure::new(Kind::Undone, message).hint("init makes what is not there")
    })?;
    Ok(Found {
        subscriber: subscriber.name.clone(),
        publisher: publisher.name.clone(),
        subscription: wanted,
        conninfo: row.get("conninfo"),
        enabled: row.get("enabled"),
        slot: row.get("slot"),
    })
}

async fn who(session: &Session) -> Result<Answer, NodeError> {
    let (about, identity) = survey::who(session, LOOK_BOUND).await?;
    let About { system_identifier, started_us, database_oid, .. } = about;
    Ok(Answer { identity, system_identifier, started_us, database_oid })
}

/// Connects to where a subscription is to connect, if that is another place, and makes sure that it is the right node; and looks
/// whether the files are there. Leaves a session on the publisher, so that its slot can be seen.
async fn try_out(
    context: &Context,
    crew: &Crew<'_>,
    change: &Change,
    sessions: &mut BTreeMap<String, Session>,
) -> Result<(), Failure> {
    let Found { subscriber, publisher, .. } = &change.of;
    let session = crew.session(subscriber)?;
    let before = Conninfo::parse(&change.of.conninfo).ok();
    let known_files: Vec<&str> = before.iter().flat_map(connection::files).collect();
    for file in connection::files(&change.after).filter(|file| !known_files.contains(file)) {
        if session.row(sql::FILE_MISSING, &[&file], LOOK_BOUND).await?.get("missing") {
            let message = format!("{subscriber} has no file {file}");
            return Err(Failure::new(Kind::Undone, message).hint("it is looked for by the server, on its host"));
        }
    }
    let place = connection::place(&change.after);
    let elsewhere = before.as_ref().map(connection::place).as_ref() != Some(&place);
    if !elsewhere && crew.session(publisher).is_ok() {
        return Ok(());
    }
    let (host, port) = place;
    let mut there = context.node(publisher)?.clone();
    (there.host, there.port, there.through) = (host.clone(), port, None);
    let found = context.connector.connect(&there, CONNECT_BOUND).await?;
    let answer = who(&found).await?;
    let known = match crew.session(publisher) {
        Ok(session) => Some(who(session).await?),
        Err(_) => None,
    };
    if let Some(why) = connection::objection(publisher, &answer, &who(session).await?, known.as_ref()) {
        let message = format!("{host}:{port} is not {publisher}, to which {subscriber} would connect there: {why}");
        return Err(Failure::new(Kind::Undone, message).hint("give it the host and port of that node"));
    }
    sessions.insert(publisher.clone(), found);
    Ok(())
}

struct Work<'a> {
    context: &'a Context,
    options: &'a SetConnection,
    crew: &'a Crew<'a>,
    /// On publishers, where they are reached from now on.
    sessions: &'a BTreeMap<String, Session>,
    progress: Progress,
}

/// A process that sends to a subscription, and since when it does.
type Sender = (i32, i64);

impl Work<'_> {
    /// Who sends to a subscription.
    async fn sender(&self, of: &Found) -> Result<Option<Sender>, NodeError> {
        let Some(slot) = &of.slot else { return Ok(None) };
        let session = match self.sessions.get(&of.publisher) {
            Some(session) => session,
            None => self.crew.session(&of.publisher)?,
        };
        let slot = admin::slot(session, slot, None).await?;
        Ok(slot.and_then(|slot| Some((slot.pid?, slot.since?))))
    }

    /// Waits until another process sends to it than that one. False: none came.
    async fn connected_anew(&self, of: &Found, before: Option<Sender>) -> Result<bool, NodeError> {
        let until = Instant::now() + self.options.patience;
        loop {
            let sender = self.sender(of).await?;
            if sender.is_some() && sender != before {
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            sleep(GLANCE).await;
        }
    }

    /// Changes one subscription, and waits until it is connected: how long that took. `None`: it is disabled.
    ///
    /// Between the look at the sender and the statement the worker may have connected anew by itself, as before. Core ends such a
    /// worker as soon as it has seen the change, so then only the time that is told is too short.
    async fn take(&self, change: &Change) -> Result<Option<Duration>, Failure> {
        admin::go_on(self.context)?;
        let of = &change.of;
        let session = self.crew.session(&of.subscriber)?;
        let before = self.sender(of).await?;
        self.progress.say(&format!("{}: {}", of.subscriber, change.text()));
        let began = Instant::now();
        session.run(&of.statement(&change.after.to_string()), STATEMENT_BOUND).await?;
        if !of.enabled {
            return Ok(None);
        }
        let connected = tokio::select! {
            signal = self.context.signals.wait() => return Err(admin::stopped(signal)),
            connected = self.connected_anew(of, before) => connected?,
        };
        if connected {
            return Ok(Some(began.elapsed()));
        }
        let message = format!(
            "{}: the subscription {} was not connected again within {}",
            of.subscriber,
            of.subscription,
            humantime::format_duration(self.options.patience)
        );
        let mut failure = Failure::new(Kind::Undone, message);
        failure.detail = admin::trouble(session, &of.subscription).await;
        Err(failure)
    }

    /// Gives these their old connection strings, the last one first, and waits until they are connected. The last one may not
    /// have been changed at all.
    async fn undo(&self, mut failure: Failure, changes: &[Change]) -> Failure {
        let mut unproven = Vec::new();
        for Change { of, .. } in changes.iter().rev() {
            let undone = async {
                let session = self.crew.session(&of.subscriber)?;
                let now = find(
                    self.context,
                    self.crew,
                    self.context.node(&of.subscriber)?,
                    self.context.node(&of.publisher)?,
                );
                if now.await?.conninfo == of.conninfo {
                    return Ok(true);
                }
                let before = self.sender(of).await?;
                session.run(&of.statement(&of.conninfo), STATEMENT_BOUND).await?;
                Ok::<_, Failure>(!of.enabled || self.connected_anew(of, before).await?)
            };
            match undone.await {
                Ok(true) => {}
                Ok(false) => unproven.push(format!(
                    "{}: {} has its old connection back, and does not connect with that either",
                    of.subscriber, of.subscription
                )),
                Err(error) => {
                    let old = Conninfo::parse(&of.conninfo).unwrap_or_default().without_secrets();
                    unproven.push(format!("{error}; {}: {};", of.subscriber, of.statement(&old.to_string())));
                }
            }
        }
        if unproven.is_empty() {
            failure.message.push_str("; what was changed is as it was");
        } else {
            failure.kind = Kind::NeedsPerson;
            failure = unproven.iter().fold(failure, |failure, line| failure.also(line));
            failure.hint = Some("look at `status` and `check`; the same command again goes on from there".into());
        }
        failure
    }
}
