//! `watch`: looks at all nodes again and again, says what is wrong with replication and when it is well again, and hands
//! open conflicts to whoever resolves them. Certificates are looked at, too, less often.
//!
//! Deliberately decides nothing: what is wrong is `watchdog.rs`'s to say, what of it is spoken of `alarm.rs`'s. Each node
//! has a post, which keeps a session there and is never waited for by the others; a node that cannot be reached is a
//! finding.
//!
//! Everything runs in one task, so that what keeps any of it from going on also keeps systemd from hearing that it is
//! alive.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::future::pending;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::{join_all, select_all};
use sd_notify::NotifyState;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_postgres::Notification;

use super::{Context, Reply, hostname, populate, print, refresh};
use crate::alarm::{self, Alarms, Word};
use crate::condition::{Condition, Finding, Subject};
use crate::config::{Config, Node, Watch};
use crate::crew::{CONNECT_BOUND, Crew, LOOK_BOUND};
use crate::digest::Digest;
use crate::failure::{Failure, Kind};
use crate::inspect;
use crate::node::{NodeError, Session, Trouble};
use crate::resolve::{self, Attempts, Leftover, Todo};
use crate::resolver::{self, End, Outcome};
use crate::schema;
use crate::sight::{self, Sight};
use crate::sql;
use crate::watchdog::{Gauge, Patience, Views, Watchdog};

/// Channel on which the extension says that there is a new conflict.
const CONFLICTS: &str = "stillebot_conflict";
/// Channel on which the extension says that the schema was changed.
const SCHEMA: &str = "stillebot_schema";
/// How long the fingerprint of a schema is taken for what it was, if nobody says that the schema was changed.
const FINGERPRINT: Duration = Duration::from_secs(60);
/// How long a table has to be empty on one node only before its rows count as not replicated.
const TO_ARRIVE: Duration = Duration::from_secs(2);
/// How long the copies of new tables are waited for.
const TO_COPY: Duration = Duration::from_secs(10);
/// Between two attempts to have the same new tables replicate.
const JOIN_AGAIN: Duration = Duration::from_secs(30);
/// How long one look at one node may take.
const NODE_BOUND: Duration = Duration::from_secs(8);
/// Between two attempts to reach a node, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Between two looks at one node, however many conflicts it tells of.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// How many looks may pass before what usually mends itself counts as a fault.
const LOOKS_TO_MEND: u32 = 3;
/// How long a rule has to resolve a conflict before it is an alarm.
const TO_RESOLVE: Duration = Duration::from_secs(2);
/// A conflict that no rule is for.
const LEFT: &str = "left to a person";
/// Alarms that wait for a post; it is busy connecting only.
const MAILBOX: usize = 64;

/// Runs it until a signal comes, or once.
pub async fn run(context: &Context, once: bool, node: Option<&str>) -> Result<Reply, Failure> {
    let own = match node {
        Some(name) => Some(context.node(name)?),
        None => own_node(&context.config),
    };
    if once {
        return tokio::select! {
            reply = report(context) => Ok(reply),
            signal = context.signals.wait() => Err(Failure::new(Kind::Undone, format!("stopped by {signal}"))),
        };
    }
    let (reports, inbox) = mpsc::channel(context.config.nodes.len().max(1));
    let (mut outboxes, mut posts) = (Vec::new(), Vec::new());
    for node in &context.config.nodes {
        let (outbox, mail) = mpsc::channel(MAILBOX);
        outboxes.push(outbox);
        posts.push(Box::pin(Post::new(context, node).keep(reports.clone(), mail)));
    }
    let mut desk = Desk::new(context, own, outboxes);
    tokio::select! {
        signal = context.signals.wait() => tracing::info!(signal, "stopping"),
        (never, ..) = select_all(posts) => match never {},
        never = desk.keep(inbox) => match never {},
    }
    supervisor(&[NotifyState::Stopping]);
    // What is to be said has been said.
    Ok(Reply::done("", Value::Null))
}

/// Tells systemd, if it started us and wants to be told.
fn supervisor(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the supervisor cannot be told");
    }
}

/// Resolves open conflicts by the rules. Goes from one piece of work to the next, with what it has to remember.
struct Hands<'a> {
    context: &'a Context,
    /// The node that this agent runs for; without one it resolves whichever side is active.
    node: Option<&'a Node>,
    crew: Crew<'a>,
    began: Instant,
    attempts: Attempts,
    /// What is to be said on the channel of alarms.
    said: Vec<String>,
    /// What became of the conflict that was worked on last: its node, number and outcome.
    done: Option<(String, i64, Outcome)>,
}

impl<'a> Hands<'a> {
    async fn new(context: &'a Context, node: Option<&'a Node>) -> Self {
        // Connects to nobody before there is something to do.
        let (crew, _) = Crew::muster(&context.config, &context.connector, &[]).await;
        Self { context, node, crew, began: Instant::now(), attempts: Attempts::default(), said: Vec::new(), done: None }
    }

    /// Has new tables replicate and resolves one conflict that there is a rule for, if that is this agent's business. One, so that
    /// what has come up meanwhile, or what this agent is no more to do, is seen before the next.
    async fn mend(mut self, unjoined: BTreeMap<String, BTreeSet<String>>) -> Self {
        resolver::connect(&mut self.crew).await;
        let sights = resolver::sights(self.context, &self.crew).await;
        let active = resolve::active_side(&self.context.config, &sights);
        let ours = active.filter(|node| self.node.is_none_or(|own| node.name == own.name));
        let Some(active) = ours.map(|node| node.name.clone()) else {
            tracing::debug!(active = active.map(|node| &node.name), "not ours to resolve");
            if active.is_some() {
                // Another agent tries, counts and speaks.
                self.attempts = Attempts::default();
            }
            return self;
        };
        if !unjoined.is_empty() {
            self.join(&active, &unjoined).await;
        }
        if self.context.config.rules.is_empty() {
            return self;
        }
        let next = resolver::next(&self.crew, &mut self.attempts, self.began.elapsed()).await;
        if let Some(Todo { node, id, .. }) = next {
            let (context, attempts) = (self.context, &mut self.attempts);
            let outcome = resolver::resolve_by_rules(context, &mut self.crew, attempts, &node, id).await;
            // Forgotten when it is seen to be closed.
            self.attempts.put_off(&node, id, self.began.elapsed() + context.config.watch.interval);
            self.done = Some((node, id, outcome));
        }
        self
    }

    /// Has the subscriptions that tables are new to replicate them, and says which of them have rows that did not travel.
    ///
    /// Until then changes to them are passed over in silence. So the other nodes copy what the active one has, be it nothing: what is
    /// written there meanwhile is in the copy or comes after it. The active node is refreshed first, so that it gets what the
    /// others write from then on; what they have written before keeps them from copying, and is told.
    async fn join(&mut self, active: &str, unjoined: &BTreeMap<String, BTreeSet<String>>) {
        if let Err(failure) = self.crew.lock().await {
            return tracing::info!(%failure, "new tables do not replicate yet");
        }
        let mut before = BTreeMap::new();
        for table in unjoined.values().flatten() {
            before.insert(table, self.count(table).await);
        }
        let subscription = self.context.config.subscription_to(active);
        let (mut copied, mut refreshed) = (BTreeSet::new(), Vec::new());
        let (first, others): (Vec<_>, Vec<_>) = unjoined.iter().partition(|(node, _)| *node == active);
        for (node, tables) in first.into_iter().chain(others) {
            for table in tables.iter().filter(|_| node != active) {
                match populate::join(&self.crew, self.context, node, table, &subscription).await {
                    Ok(()) => drop(copied.insert(table)),
                    Err(error) => tracing::info!(node, table, %error, "not copied"),
                }
            }
            refreshed.push((node, tables, refresh::node_of(&mut self.crew, node).await));
        }
        self.crew.unlock().await;
        for (node, tables, result) in refreshed {
            let names = tables.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            let (word, text) = match result {
                Err(error) => ("not joined", format!("new tables do not replicate to {node} yet: {names}: {error}")),
                Ok(_) if node == active || self.have_copied(node, tables, &subscription).await => {
                    ("joined", format!("new tables replicate to {node}: {names}"))
                }
                Ok(_) => ("joined", format!("new tables are being copied to {node}: {names}")),
            };
            self.tell_schema(node, word, &text);
        }
        for (table, before) in before.iter().filter(|(table, _)| !copied.contains(*table)) {
            let until = Instant::now() + TO_ARRIVE;
            loop {
                let apart = schema::rows_apart(table, before, &self.count(table).await);
                match apart {
                    Some(text) if Instant::now() >= until => {
                        self.tell_schema(active, "populate", &text);
                        self.said.push(text);
                        break;
                    }
                    Some(_) => sleep(SHORTEST_PAUSE).await,
                    None => break,
                }
            }
        }
    }

    /// Waits for copies that have begun, for a while: big ones go on by themselves.
    async fn have_copied(&self, node: &str, tables: &BTreeSet<String>, subscription: &str) -> bool {
        let until = Instant::now() + TO_COPY;
        loop {
            let ready = populate::are_ready(&self.crew, self.context, node, tables, subscription).await;
            let ready = ready.unwrap_or_default();
            if ready || Instant::now() >= until {
                return ready;
            }
            sleep(SHORTEST_PAUSE).await;
        }
    }

    /// Whether a table has rows, on each node that tells.
    async fn count(&self, table: &str) -> Vec<(String, i64)> {
        let names = self.crew.names();
        let counts = names.iter().map(async |node| {
            let row = self.crew.session(node)?.row(sql::COUNT_ROWS, &[&table, &1_i64], LOOK_BOUND).await?;
            Ok::<_, NodeError>((node.clone(), row.get("counted")))
        });
        join_all(counts).await.into_iter().flatten().collect()
    }

    fn tell_schema(&self, node: &str, word: &str, text: &str) {
        match word {
            "joined" => tracing::info!(node, "{text}"),
            _ => tracing::warn!(node, "{text}"),
        }
        let now = time(SystemTime::now());
        if self.context.json {
            print(&json!({"event": "schema", "at": now, "end": word, "text": text}).to_string());
        } else {
            print(&format!("{now} schema: {text}"));
        }
    }
}

/// The node of this host: the one that is named as it, or has its name as host.
pub fn own_node(config: &Config) -> Option<&Node> {
    let name = hostname()?;
    let short = name.split('.').next()?;
    let same = |other: &str| other.eq_ignore_ascii_case(&name) || other.eq_ignore_ascii_case(short);
    config.nodes.iter().find(|node| same(&node.name) || same(&node.host))
}

// ---- the posts ----

/// What a post has seen.
struct Report {
    node: String,
    view: Result<Sight, String>,
}

/// Keeps a session on one node.
struct Post<'a> {
    context: &'a Context,
    node: &'a Node,
    session: Option<Seat>,
    /// The last attempts that failed, and when the next one is due.
    failures: u32,
    due: Instant,
    error: String,
}

/// A session, and what belongs to it.
struct Seat {
    session: Session,
    notifications: mpsc::Receiver<Notification>,
    /// This agent is the one that speaks on the node.
    speaks: bool,
    /// The extension's report fails there.
    status_refused: bool,
    /// The fingerprint of its schema, and when it was asked for; none after it was changed.
    schema: Option<(Instant, Option<String>)>,
}

impl<'a> Post<'a> {
    fn new(context: &'a Context, node: &'a Node) -> Self {
        Self { context, node, session: None, failures: 0, due: Instant::now(), error: String::new() }
    }

    /// Looks at the node at every interval and as soon as it tells of a conflict, and passes alarms on to it, for ever.
    async fn keep(mut self, reports: mpsc::Sender<Report>, mut mail: mpsc::Receiver<Arc<str>>) -> Infallible {
        loop {
            let view = self.look(true).await;
            let report = Report { node: self.node.name.clone(), view };
            // The desk lives as long as the posts do.
            let _ = reports.send(report).await;
            let looked = Instant::now();
            let mut next = pin!(sleep(self.context.config.watch.interval));
            loop {
                tokio::select! {
                    () = &mut next => break,
                    Some(text) = mail.recv() => self.tell(&text).await,
                    heard = hear(&mut self.session) => match heard {
                        // Which conflict, the look will show.
                        Some(told) => {
                            if told.channel() == SCHEMA && let Some(seat) = &mut self.session {
                                seat.schema = None;
                            }
                            next.as_mut().reset(looked + SHORTEST_PAUSE);
                        }
                        None => {
                            tracing::debug!(node = self.node.name, "the connection is lost");
                            self.session = None;
                            next.as_mut().reset(looked + SHORTEST_PAUSE);
                        }
                    },
                }
            }
        }
    }

    /// Looks once, after connecting if that is due.
    async fn look(&mut self, listens: bool) -> Result<Sight, String> {
        if self.session.is_none() {
            if Instant::now() < self.due {
                return Err(self.error.clone());
            }
            match self.connect(listens).await {
                Ok(seat) => self.session = Some(seat),
                Err(error) => return Err(self.failed(&error)),
            }
        }
        let Some(seat) = &mut self.session else { return Err(self.error.clone()) };
        if listens && !seat.speaks {
            let locked = seat.session.row(sql::WATCH_LOCK, &[], LOOK_BOUND).await;
            seat.speaks = locked.is_ok_and(|row| row.get("locked"));
        }
        let publication = &self.context.config.publication;
        let looked = async {
            let mut sight = sight::look(&seat.session, publication, &mut seat.status_refused, LOOK_BOUND).await?;
            sight.schema = match &seat.schema {
                Some((at, known)) if at.elapsed() < FINGERPRINT => known.clone(),
                _ => {
                    let at = Instant::now();
                    let found = schema::fingerprint(&seat.session, LOOK_BOUND).await?;
                    seat.schema = Some((at, found.clone()));
                    found
                }
            };
            Ok(sight)
        };
        match timeout(NODE_BOUND, looked).await {
            Ok(Ok(sight)) => {
                self.failures = 0;
                Ok(sight)
            }
            Ok(Err(error)) => Err(self.failed(&error)),
            Err(_) => {
                self.abandon();
                Err(format!("no answer within {}", humantime::format_duration(NODE_BOUND)))
            }
        }
    }

    async fn connect(&self, listens: bool) -> Result<Seat, NodeError> {
        let mut session = self.context.connector.connect(self.node, CONNECT_BOUND).await?;
        let notifications = session.notifications().unwrap_or_else(|| mpsc::channel(1).1);
        if listens {
            match session.run(&format!("listen {CONFLICTS}; listen {SCHEMA}"), LOOK_BOUND).await {
                // A standby: it has no conflicts to tell of.
                Err(error) if error.trouble == Trouble::Refused => tracing::debug!(%error, "cannot listen"),
                result => result?,
            }
        }
        Ok(Seat { session, notifications, speaks: false, status_refused: false, schema: None })
    }

    /// Counts a failure; without a sound session, the next attempt is a while off.
    fn failed(&mut self, error: &NodeError) -> String {
        if error.trouble != Trouble::Refused {
            self.abandon();
            let pause = self.context.config.watch.interval.saturating_mul(1 << self.failures.min(10));
            self.due = Instant::now() + pause.min(LONGEST_PAUSE);
            self.failures += 1;
        }
        tracing::debug!(%error, failures = self.failures, "look failed");
        self.error = error.to_string();
        self.error.clone()
    }

    fn abandon(&mut self) {
        if let Some(seat) = self.session.take() {
            seat.session.abandon();
        }
    }

    /// Sends an alarm to whoever listens on the node.
    async fn tell(&mut self, text: &str) {
        let (node, Some(channel)) = (&self.node.name, &self.context.config.watch.channel) else { return };
        match &self.session {
            None => tracing::debug!(node, "not notified, as it cannot be reached"),
            Some(seat) if !seat.speaks => tracing::debug!(node, "another agent speaks there"),
            Some(seat) => {
                if let Err(error) = seat.session.rows(sql::TELL, &[channel, &text], LOOK_BOUND).await {
                    tracing::warn!(%error, "could not notify");
                }
            }
        }
    }
}

/// The next notification; none when the connection has ended. For ever if there is none.
async fn hear(session: &mut Option<Seat>) -> Option<Notification> {
    match session {
        Some(seat) => seat.notifications.recv().await,
        None => pending().await,
    }
}

// ---- the desk ----

/// Where the posts' reports come together.
struct Desk<'a> {
    context: &'a Context,
    own: Option<&'a Node>,
    outboxes: Vec<mpsc::Sender<Arc<str>>>,
    began: Instant,
    watchdog: Watchdog,
    alarms: Alarms,
    views: Views,
    heard: BTreeMap<String, Instant>,
    /// How certificates were when last looked at.
    certificates: Vec<inspect::Finding>,
    /// There may be conflicts to resolve, since they were last looked for.
    open: bool,
    /// Conflicts are tried again later, or left to a person; these.
    unfinished: bool,
    left: BTreeMap<(String, String), (i64, Leftover, usize)>,
    /// What was said of conflicts: by table, how they ended, and, where it is the same for many, why.
    digest: Digest<(String, &'static str, String)>,
    /// New tables that were handed over, and when.
    joining: (BTreeMap<String, BTreeSet<String>>, Instant),
    status: String,
}

impl<'a> Desk<'a> {
    fn new(context: &'a Context, own: Option<&'a Node>, outboxes: Vec<mpsc::Sender<Arc<str>>>) -> Self {
        let Watch { interval, stall, .. } = context.config.watch;
        let patience = Patience { stall, mend: interval * LOOKS_TO_MEND, attempts: 2, resolve: TO_RESOLVE };
        Self {
            context,
            own,
            outboxes,
            began: Instant::now(),
            watchdog: Watchdog::new(&context.config, patience),
            alarms: Alarms::default(),
            views: Views::new(),
            heard: BTreeMap::new(),
            certificates: Vec::new(),
            // What an agent before this one was cut off from is not among the open ones.
            open: !context.config.rules.is_empty(),
            unfinished: false,
            left: BTreeMap::new(),
            digest: Digest::default(),
            joining: (BTreeMap::new(), Instant::now()),
            status: String::new(),
        }
    }

    /// Takes in reports, judges, speaks and has conflicts resolved, for ever.
    async fn keep(&mut self, mut inbox: mpsc::Receiver<Report>) -> Infallible {
        let mut looks = interval(self.context.config.watch.interval);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut alive = sd_notify::watchdog_enabled().map(|period| interval(period / 2));
        let mut ready = false;
        let mut hands = Some(Hands::new(self.context, self.own).await);
        let mut at_work: AtWork<'a> = None;
        let mut certificate_looks = interval(self.context.config.watch.certificates);
        certificate_looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looking: Option<Pin<Box<dyn Future<Output = Vec<inspect::Finding>> + 'a>>> = None;
        loop {
            tokio::select! {
                Some(report) = inbox.recv() => {
                    self.take_in(report);
                    if !ready && self.views.len() == self.context.config.nodes.len() {
                        ready = true;
                        self.announce();
                        looks.reset_immediately();
                    }
                }
                _ = looks.tick(), if ready => self.judge(),
                _ = certificate_looks.tick(), if ready && looking.is_none() => {
                    looking = Some(Box::pin(inspect::findings(self.context)));
                }
                found = work(&mut looking) => (self.certificates, looking) = (found, None),
                mut idle = work(&mut at_work) => {
                    idle.said.drain(..).for_each(|text| self.notify(&text));
                    self.take_back(&mut idle);
                    (hands, at_work) = (Some(idle), None);
                }
                () = tick(&mut alive) => if self.posts_report() {
                    supervisor(&[NotifyState::Watchdog]);
                },
            }
            let unjoined = schema::unjoined(&self.context.config, &self.views);
            let new = !unjoined.is_empty() && (unjoined != self.joining.0 || self.joining.1.elapsed() > JOIN_AGAIN);
            if ready
                && (self.open || new)
                && let Some(hands) = hands.take()
            {
                self.open = false;
                let handed = if new { unjoined.clone() } else { BTreeMap::new() };
                at_work = Some(Box::pin(hands.mend(handed)));
                if new {
                    self.joining = (unjoined, Instant::now());
                }
            }
        }
    }

    fn take_in(&mut self, report: Report) {
        let Report { node, view } = report;
        let conflicts = view.as_ref().is_ok_and(|sight| !sight.conflicts.is_empty());
        self.open |= (conflicts || self.unfinished) && !self.context.config.rules.is_empty();
        self.heard.insert(node.clone(), Instant::now());
        self.views.insert(node, view);
    }

    /// Takes in what became of a conflict; there may be more.
    fn take_back(&mut self, hands: &mut Hands<'a>) {
        if let Some((node, id, outcome)) = hands.done.take() {
            self.tell(&node, id, &outcome);
            self.open = true;
        }
        self.unfinished = !hands.attempts.is_empty();
        self.left = hands.attempts.left();
    }

    fn tell(&mut self, node: &str, id: i64, outcome: &Outcome) {
        let (word, text) = match &outcome.end {
            End::Resolved(text) => ("resolved", text.clone()),
            End::Left(why) => (LEFT, why.clone()),
            End::Failed { attempt, why } => ("not resolved", format!("attempt {attempt}: {why}")),
            End::GivenUp(why) => ("given up", why.clone()),
            End::Later(why) => return tracing::info!(node, id, why, "later"),
            End::Closed => return,
        };
        match &outcome.end {
            End::Resolved(_) => tracing::info!(node, id, "{word}: {text}"),
            _ => tracing::warn!(node, id, "{word}: {text}"),
        }
        let why = if word == LEFT { text.clone() } else { String::new() };
        if !self.digest.is_told((outcome.table.clone(), word, why)) {
            return;
        }
        let now = time(SystemTime::now());
        if self.context.json {
            let event = json!({"event": "conflict", "at": now, "node": node, "id": id, "table": outcome.table, "end": word,
                "text": text, "deeds": outcome.deeds, "notes": outcome.notes});
            print(&event.to_string());
        } else {
            print(&format!("{now} conflict {node}/{id} {word}: {text}"));
        }
    }

    /// Says how many more conflicts ended as those that were told of.
    fn tell_of_more(&mut self) {
        let now = time(SystemTime::now());
        for ((table, word, why), more) in self.digest.look() {
            if self.context.json {
                let event =
                    json!({"event": "conflicts", "at": now, "table": table, "end": word, "more": more, "text": why});
                print(&event.to_string());
            } else {
                let why = if why.is_empty() { why } else { format!(": {why}") };
                print(&format!("{now} conflicts of {table}: {more} more {word}{why}"));
            }
        }
    }

    fn announce(&self) {
        supervisor(&[NotifyState::Ready]);
        let names: Vec<&str> = self.context.config.nodes.iter().map(|node| node.name.as_str()).collect();
        if self.context.json {
            print(&json!({"event": "watching", "at": time(SystemTime::now()), "nodes": names}).to_string());
        } else {
            print(&format!("{} watching {}", time(SystemTime::now()), names.join(", ")));
        }
    }

    /// Whether every post has been heard of lately: it looks at every interval, and each look is bounded.
    fn posts_report(&self) -> bool {
        let longest = self.context.config.watch.interval + CONNECT_BOUND + NODE_BOUND + LOOK_BOUND;
        let late = |node: &Node| self.heard.get(&node.name).unwrap_or(&self.began).elapsed() > longest;
        !self.context.config.nodes.iter().any(late)
    }

    /// Says something on the channel of alarms, on every node.
    fn notify(&self, text: &str) {
        let payload: Arc<str> = payload(text).into();
        for outbox in &self.outboxes {
            if outbox.try_send(Arc::clone(&payload)).is_err() {
                tracing::warn!("an alarm was not sent: too many wait");
            }
        }
    }

    fn judge(&mut self) {
        self.tell_of_more();
        let now = self.began.elapsed();
        let clock = SystemTime::now();
        let mut findings = self.watchdog.look(now, &self.views);
        let (present, unknown) = inspect::troubles(&self.certificates);
        findings.present.extend(present);
        findings.unknown.extend(unknown);
        findings.present.extend(self.left.iter().map(|((node, table), (conflict, leftover, conflicts))| Finding {
            subject: Subject::Table { node: node.clone(), table: table.clone() },
            condition: Condition::Unresolved { conflict: *conflict, conflicts: *conflicts, why: leftover.why.clone() },
            age: Duration::ZERO,
        }));
        for event in self.alarms.hear(now, findings) {
            let text = event.text(clock);
            match event.word {
                Word::Alarm | Word::Reminder => tracing::warn!("{text}"),
                Word::Clear => tracing::info!("{text}"),
            }
            if self.context.json {
                print(&event.json(clock).to_string());
            } else {
                print(&format!("{} {}: {text}", time(clock), event.word.word()));
            }
            self.notify(&text);
        }
        let raised: Vec<String> = self
            .alarms
            .raised(now)
            .map(|finding| format!("{} {}", finding.subject, finding.condition.phrase()))
            .collect();
        let status = if raised.is_empty() { "all is well".to_owned() } else { raised.join("; ") };
        if status != self.status {
            supervisor(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }
}

/// What the bot is used to; a payload may not have 8000 bytes.
fn payload(text: &str) -> String {
    const MOST: usize = 2000;
    let mut payload = format!("REPL WDOG: {text}");
    if payload.len() > MOST {
        let end = (0..=MOST).rev().find(|end| payload.is_char_boundary(*end)).unwrap_or_default();
        payload.truncate(end);
        payload.push_str("...");
    }
    payload
}

fn time(clock: SystemTime) -> String {
    humantime::format_rfc3339_seconds(clock).to_string()
}

/// Hands at work, which come back idle.
type AtWork<'a> = Option<Pin<Box<dyn Future<Output = Hands<'a>> + 'a>>>;

/// Goes on with what is at work, if anything is.
async fn work<T>(at_work: &mut Option<Pin<Box<dyn Future<Output = T> + '_>>>) -> T {
    match at_work {
        Some(work) => work.await,
        None => pending().await,
    }
}

async fn tick(interval: &mut Option<tokio::time::Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => pending().await,
    }
}

// ---- once ----

/// Looks until nothing is the matter or three times, an interval apart.
async fn report(context: &Context) -> Reply {
    let Watch { interval, stall, .. } = context.config.watch;
    // As impatient as three looks allow.
    let patience = Patience {
        stall: stall.min(interval * (LOOKS_TO_MEND - 1)),
        mend: Duration::ZERO,
        attempts: 0,
        resolve: Duration::ZERO,
    };
    let mut watchdog = Watchdog::new(&context.config, patience);
    let mut posts: Vec<Post<'_>> = context.config.nodes.iter().map(|node| Post::new(context, node)).collect();
    let began = Instant::now();
    let (certificates, _) = inspect::troubles(&inspect::findings(context).await);
    let mut looks = LOOKS_TO_MEND;
    loop {
        let views = join_all(posts.iter_mut().map(|post| async { (post.node.name.clone(), post.look(false).await) }));
        let mut findings = watchdog.look(began.elapsed(), &views.await.into_iter().collect());
        looks -= 1;
        if looks == 0 || (findings.present.is_empty() && findings.unknown.is_empty()) {
            findings.present.extend(certificates);
            return reply(&findings.present, &watchdog.gauges().cloned().collect::<Vec<_>>());
        }
        sleep(interval).await;
    }
}

fn reply(present: &[Finding], gauges: &[Gauge]) -> Reply {
    let clock = SystemTime::now();
    let well = present.is_empty();
    let mut lines: Vec<String> = gauges
        .iter()
        .map(|gauge| {
            let connected = match gauge.connected {
                Some(true) => "connected",
                Some(false) => "not connected",
                None => "not known",
            };
            let behind = gauge.bytes_behind.map(|bytes| format!(", {bytes} B behind")).unwrap_or_default();
            format!("{} -> {}: {connected}{behind}", gauge.from, gauge.to)
        })
        .collect();
    lines.extend(present.iter().map(|finding| alarm::line(finding, clock)));
    lines.push(if well { "all is well".into() } else { "not all is well".to_owned() });
    let conditions: Vec<Value> = present.iter().map(|finding| alarm::json(finding, clock)).collect();
    let json = json!({"command": "watch", "outcome": "done", "well": well, "replication": gauges,
        "conditions": conditions});
    Reply { text: lines.join("\n"), json, kind: (!well).then_some(Kind::Undone) }
}
