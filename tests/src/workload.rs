//! Clients that write as the bot does, and an account of what became of every write.
//!
//! Each write carries an id of its own and leaves it in exactly one place, so that afterwards it can be looked for on every
//! node. A client does one write at a time and does not let go of it before it knows that it is saved.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::{
    sync::{Mutex, Notify, watch},
    task::JoinHandle,
    time::{sleep, timeout, timeout_at},
};
use tokio_postgres::{
    Client, Error,
    error::{DbError, Severity, SqlState},
    types::{ToSql, Type},
};

use crate::{
    background,
    cluster::{Cluster, DATABASE},
    endpoint::{Endpoint, Listener},
    server::Server,
};

/// How long a statement may take before the client takes its connection for dead.
const PATIENCE_WITH_A_SERVER: Duration = Duration::from_secs(5);
/// Between attempts to connect, and between questions to a database that refused without having said why.
const RETRY: Duration = Duration::from_millis(50);
/// Ids that one row collects. More would make rows grow without end, fewer would make every upsert an insert.
const IDS_PER_ROW: u64 = 32;
/// Commands that each client keeps saving new versions of.
const COMMANDS: u64 = 5;
/// The digit of an id, counted from 1, in which a command says on which node it was saved: its id is a primary key, and a
/// write that had to be repeated on another node shall be found twice rather than stop replication.
const PLACE_DIGIT: usize = 21;

/// How the clients behave.
#[derive(Debug, Clone)]
pub struct WorkloadOptions {
    /// How many write at once. Client n prefers node n modulo their number, as each bot prefers its own host.
    pub clients: usize,
    /// Pause between two writes of a client.
    pub pause: Duration,
    /// Which rows they write.
    pub rows: Rows,
}

/// Which rows the clients write. No two clients share any.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rows {
    /// A client goes on with the same rows on whatever node it writes. Right for a switchover that takes everything along:
    /// a counter that was read too early shows.
    PerClient,
    /// A client has other rows on each node. Right when both nodes are written or replication is behind, and conflicts
    /// are not what is being tested.
    PerClientAndNode,
}

impl Default for WorkloadOptions {
    fn default() -> Self {
        Self { clients: 8, pause: Duration::from_millis(5), rows: Rows::PerClient }
    }
}

/// Bot-like clients at work. They keep the notes' protocol: connected to every node, `default_transaction_read_only` read,
/// `LISTEN readonly`, the first live node written in `begin read write` transactions, everything kept while none is live.
pub struct Workload {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Vec<Outcome>>>,
    keepers: Vec<JoinHandle<()>>,
    stop: watch::Sender<Option<tokio::time::Instant>>,
    started: Instant,
}

/// What clients and the one who watches them both know.
struct Shared {
    options: WorkloadOptions,
    /// The first twitchid: workloads on one cluster do not meet.
    channels: i64,
    node_names: Vec<String>,
    acknowledged: Vec<AtomicUsize>,
    refused: AtomicUsize,
    disconnected: AtomicUsize,
}

/// A write that a node said was saved.
#[derive(Debug, Clone)]
pub struct Acknowledged {
    /// Its id: a uuid.
    pub id: String,
    /// When the answer to COMMIT was there, or when it was found.
    pub at: Instant,
    /// Index of the node that said so.
    pub node: usize,
    /// Whether some COMMIT of it was never answered, so that its fate had to be looked up.
    pub ambiguous: bool,
}

/// A write that was not acknowledged.
#[derive(Debug, Clone)]
pub struct Unsaved {
    /// Its id: a uuid.
    pub id: String,
    /// Whether a COMMIT was sent and not answered. If not, it is certainly nowhere.
    pub ambiguous: bool,
    /// The error for which it was given up; none if it was still waiting for a live node at the end.
    pub error: Option<String>,
}

enum Outcome {
    Acknowledged(Acknowledged),
    Unsaved(Unsaved),
}

/// What the clients saw.
#[derive(Debug)]
pub struct Report {
    channels: i64,
    clients: usize,
    node_names: Vec<String>,
    /// When the first client began.
    pub started: Instant,
    /// In the order of the answers.
    pub acknowledged: Vec<Acknowledged>,
    /// Given up, or still queued at the end.
    pub unsaved: Vec<Unsaved>,
    /// How often a write was refused as read-only (25006).
    pub refused: usize,
    /// How often a connection was lost or gave no answer.
    pub disconnected: usize,
}

/// The writes changed from one node to another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Switch {
    /// Index of the node before.
    pub from: usize,
    /// Index of the node after.
    pub to: usize,
    /// The first answer of the node after.
    pub at: Instant,
    /// Between the last answer of the node before and that one.
    pub gap: Duration,
}

/// What became of the writes, by looking for each on every node.
#[derive(Debug)]
pub struct Verdict {
    /// How many were acknowledged.
    pub acknowledged: usize,
    /// How many of those had an unanswered COMMIT on the way.
    pub ambiguous: usize,
    /// How many ids are on each node: its name, and the number.
    pub found: Vec<(String, usize)>,
    /// Acknowledged and missing: id, and the nodes where it is not.
    pub lost: Vec<(String, Vec<String>)>,
    /// Acknowledged and there more than once: id, and whether it was ambiguous.
    pub duplicated: Vec<(String, bool)>,
    /// Not acknowledged, and after an unanswered COMMIT on some node: allowed.
    pub unknown: Vec<String>,
    /// On some node although no client was told so, nor had reason to think so.
    pub phantom: Vec<String>,
    /// Counters that were increased from a value that was not the last: writes made without knowing of an earlier one.
    pub stale_counters: i64,
    /// Writes given up for an error, and the errors.
    pub failed: Vec<String>,
}

impl Workload {
    /// Starts writing to all nodes of a cluster.
    pub fn start(cluster: &Cluster, options: WorkloadOptions) -> Self {
        static NEXT: AtomicI64 = AtomicI64::new(1);
        let nodes: Vec<_> = cluster.nodes().iter().map(Server::endpoint).collect();
        let shared = Arc::new(Shared {
            channels: NEXT.fetch_add(1, Ordering::Relaxed) * 1_000_000,
            node_names: cluster.nodes().iter().map(|node| node.name().to_owned()).collect(),
            acknowledged: nodes.iter().map(|_| AtomicUsize::new(0)).collect(),
            refused: AtomicUsize::new(0),
            disconnected: AtomicUsize::new(0),
            options,
        });
        let (stop, stopped) = watch::channel(None);
        let mut workload = Self { shared, clients: Vec::new(), keepers: Vec::new(), stop, started: Instant::now() };
        for number in 0..workload.shared.options.clients {
            let changed = Arc::new(Notify::new());
            let links: Vec<_> = nodes.iter().map(|_| Arc::new(Link::new(changed.clone()))).collect();
            for (link, node) in links.iter().zip(&nodes) {
                workload.keepers.push(background().spawn(keep(link.clone(), node.clone())));
            }
            let bot =
                Bot { number, shared: workload.shared.clone(), links, changed, stopped: stopped.clone(), at: None };
            workload.clients.push(background().spawn(bot.run()));
        }
        workload
    }

    /// Writes acknowledged so far, by all nodes.
    pub fn acknowledged(&self) -> usize {
        self.shared.acknowledged.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// Writes acknowledged so far by the node of that index.
    pub fn acknowledged_by(&self, node: usize) -> usize {
        self.shared.acknowledged[node].load(Ordering::Relaxed)
    }

    /// Writes refused so far as read-only (25006).
    pub fn refused(&self) -> usize {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Waits until a node has acknowledged so many more writes than now.
    pub async fn wait_writes(&self, node: usize, more: usize) -> Result<()> {
        let goal = self.acknowledged_by(node) + more;
        let what = format!("{} to acknowledge {more} more writes", self.shared.node_names[node]);
        crate::wait_until(&what, crate::wait::PATIENCE, || async {
            Ok((self.acknowledged_by(node) >= goal).then_some(()))
        })
        .await
    }

    /// Ends it. Writes that are queued get in first, if a node is live within that time.
    pub async fn stop(mut self, grace: Duration) -> Result<Report> {
        self.stop.send_replace(Some(tokio::time::Instant::now() + grace));
        let mut report = Report {
            channels: self.shared.channels,
            clients: self.clients.len(),
            node_names: self.shared.node_names.clone(),
            started: self.started,
            acknowledged: Vec::new(),
            unsaved: Vec::new(),
            refused: 0,
            disconnected: 0,
        };
        for client in self.clients.drain(..) {
            for outcome in client.await.context("a client of the workload panicked")? {
                match outcome {
                    Outcome::Acknowledged(write) => report.acknowledged.push(write),
                    Outcome::Unsaved(write) => report.unsaved.push(write),
                }
            }
        }
        for keeper in self.keepers.drain(..) {
            keeper.abort();
            // Its sessions end with it; servers that are stopped next do not complain of them.
            let _ = keeper.await;
        }
        report.acknowledged.sort_by_key(|write| write.at);
        report.refused = self.refused();
        report.disconnected = self.shared.disconnected.load(Ordering::Relaxed);
        Ok(report)
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.clients.iter().for_each(JoinHandle::abort);
        self.keepers.iter().for_each(JoinHandle::abort);
    }
}

impl Report {
    /// The longest time between two instants in which nothing was acknowledged: the write gap as clients see it.
    pub fn longest_pause(&self, from: Instant, to: Instant) -> Duration {
        let inside = self.acknowledged.iter().map(|write| write.at).filter(|at| (from..=to).contains(at));
        let mut last = from;
        let mut longest = Duration::ZERO;
        for at in inside.chain([to]) {
            longest = longest.max(at - last);
            last = at;
        }
        longest
    }

    /// Every change of the node that answers, in order. Means something while one node at a time is live.
    pub fn switches(&self) -> Vec<Switch> {
        self.acknowledged
            .windows(2)
            .filter(|pair| pair[0].node != pair[1].node)
            .map(|pair| Switch { from: pair[0].node, to: pair[1].node, at: pair[1].at, gap: pair[1].at - pair[0].at })
            .collect()
    }

    /// Looks for every write on every node. Replication should have caught up ([`Cluster::wait_replicated`]).
    pub async fn verify(&self, cluster: &Cluster) -> Result<Verdict> {
        let mut copies = Vec::new();
        let mut stale_counters = 0;
        for node in cluster.nodes() {
            let (found, stale) = self.look_up(node).await?;
            copies.push(found);
            stale_counters = stale_counters.max(stale);
        }
        let mut verdict = Verdict {
            acknowledged: self.acknowledged.len(),
            ambiguous: self.acknowledged.iter().filter(|write| write.ambiguous).count(),
            found: self.node_names.iter().cloned().zip(copies.iter().map(HashMap::len)).collect(),
            lost: Vec::new(),
            duplicated: Vec::new(),
            unknown: self.unsaved.iter().filter(|write| write.ambiguous).map(|write| write.id.clone()).collect(),
            phantom: Vec::new(),
            stale_counters,
            failed: self
                .unsaved
                .iter()
                .filter_map(|write| write.error.as_ref().map(|error| format!("{}: {error}", write.id)))
                .collect(),
        };
        for write in &self.acknowledged {
            let missing: Vec<_> = self
                .node_names
                .iter()
                .zip(&copies)
                .filter(|(_, found)| !found.contains_key(&write.id))
                .map(|(name, _)| name.clone())
                .collect();
            if !missing.is_empty() {
                verdict.lost.push((write.id.clone(), missing));
            }
            if copies.iter().any(|found| found.get(&write.id).is_some_and(|&count| count > 1)) {
                verdict.duplicated.push((write.id.clone(), write.ambiguous));
            }
        }
        let known: BTreeSet<_> = self.acknowledged.iter().map(|write| &write.id).chain(&verdict.unknown).collect();
        let all: BTreeSet<_> = copies.iter().flat_map(HashMap::keys).collect();
        verdict.phantom = all.into_iter().filter(|id| !known.contains(id)).cloned().collect();
        Ok(verdict)
    }

    /// How often each id is on a node, and the number of counters that do not count.
    async fn look_up(&self, node: &Server) -> Result<(HashMap<String, usize>, i64)> {
        let client = node.superuser(DATABASE).await?;
        let last = self.channels + i64::try_from(self.clients)? - 1;
        let ids = client
            .query(
                &format!(
                    "select overlay(id::text placing '0' from {PLACE_DIGIT} for 1) from stillebot.commands \
                 where twitchid between $1 and $2 \
                 union all \
                 select jsonb_array_elements_text(data -> 'ids') from stillebot.config where twitchid between $1 and $2 \
                 union all \
                 select string_to_table(rtrim(convert_from(data, 'UTF8'), E'\\n'), E'\\n') from stillebot.http_sessions \
                 where split_part(cookie, '-', 1)::bigint between $1 and $2"),
                &[&self.channels, &last],
            )
            .await
            .with_context(|| node.name().to_owned())?;
        let mut found = HashMap::new();
        for row in ids {
            *found.entry(row.get::<_, String>(0)).or_default() += 1;
        }
        let stale = client
            .query_one(
                "select count(*) from stillebot.config \
                 where twitchid between $1 and $2 and (data ->> 'count')::int <> jsonb_array_length(data -> 'ids')",
                &[&self.channels, &last],
            )
            .await?
            .get(0);
        Ok((found, stale))
    }
}

impl Verdict {
    /// An error unless every acknowledged write is on every node exactly once, nothing else is anywhere, and nothing failed.
    pub fn ensure_clean(&self) -> Result<()> {
        let clean = self.lost.is_empty()
            && self.duplicated.is_empty()
            && self.phantom.is_empty()
            && self.failed.is_empty()
            && self.stale_counters == 0;
        ensure!(clean, "the account of the writes is not clean:\n{self}\n{self:#?}");
        Ok(())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<24}{:>8}", "writes acknowledged", self.acknowledged)?;
        for (node, count) in &self.found {
            writeln!(f, "{:<24}{count:>8}", format!("found on {node}"))?;
        }
        for (what, count) in [
            ("lost", self.lost.len()),
            ("duplicated", self.duplicated.len()),
            ("never asked for", self.phantom.len()),
            ("failed", self.failed.len()),
            ("fate unknown", self.unknown.len()),
        ] {
            writeln!(f, "{what:<24}{count:>8}")?;
        }
        write!(f, "{:<24}{:>8}", "stale counters", self.stale_counters)
    }
}

/// A client's connection to one node.
struct Link {
    /// What is known of the database at its other end.
    state: std::sync::Mutex<State>,
    /// The session, while there is one. Held for the length of a transaction.
    session: Mutex<Option<Client>>,
    /// Tells the client that the state has changed.
    changed: Arc<Notify>,
    /// Tells the keeper that the database does not do as it said.
    doubt: Notify,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    live: bool,
    /// Counts what the server said, so that an older refusal does not overrule newer news.
    news: u64,
}

impl Link {
    fn new(changed: Arc<Notify>) -> Self {
        Self { state: std::sync::Mutex::default(), session: Mutex::new(None), changed, doubt: Notify::new() }
    }

    fn state(&self) -> State {
        *self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn hear(&self, live: bool) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *state = State { live, news: state.news + 1 };
        drop(state);
        self.changed.notify_one();
    }

    /// A write that was begun in that state was refused.
    fn refused(&self, begun: State) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if state.news == begun.news {
            state.live = false;
            // If no notification comes, it was a database that did not stay down, or one that says nothing.
            self.doubt.notify_one();
        }
    }
}

/// Keeps one connection of one client: connects for ever, and hears what the database says of itself.
async fn keep(link: Arc<Link>, node: Endpoint) {
    loop {
        if let Ok(listener) = node.listen("rosuav", DATABASE, "stillebot").await {
            let _ = attend(&link, listener).await;
        }
        link.hear(false);
        *link.session.lock().await = None;
        sleep(RETRY).await;
    }
}

/// One connection from beginning to end.
async fn attend(link: &Link, listener: Listener) -> Result<()> {
    let Listener { client, default_transaction_read_only, mut notifications } = listener;
    client.batch_execute("listen readonly").await?;
    // What changed between the connection and the LISTEN was announced to nobody here, and the reported parameter of a
    // session does not change with the database's setting: ask once more.
    let changed = is_live(&client).await? == default_transaction_read_only;
    *link.session.lock().await = Some(client);
    announce(link, !default_transaction_read_only ^ changed).await?;
    loop {
        tokio::select! {
            notification = notifications.recv() => match notification.context("disconnected")?.payload() {
                "on" => announce(link, false).await?,
                "off" => announce(link, true).await?,
                _ => {}
            },
            () = link.doubt.notified() => {
                sleep(RETRY).await;
                let session = link.session.lock().await;
                let live = is_live(session.as_ref().context("disconnected")?).await?;
                drop(session);
                if live != link.state().live {
                    announce(link, live).await?;
                }
            }
        }
    }
}

/// As the bot does: no writes from the moment it hears `on`, and the session marked for `dbctl stat` to see.
async fn announce(link: &Link, live: bool) -> Result<()> {
    if !live {
        link.hear(false);
    }
    let session = link.session.lock().await;
    let client = session.as_ref().context("disconnected")?;
    let (name, read_only) = if live { ("stillebot", "off") } else { ("stillebot-ro", "on") };
    let marks = format!("set application_name = '{name}'; set default_transaction_read_only = {read_only}");
    timeout(PATIENCE_WITH_A_SERVER, client.batch_execute(&marks)).await??;
    drop(session);
    if live {
        link.hear(true);
    }
    Ok(())
}

/// What a new session would be told.
async fn is_live(client: &Client) -> Result<bool> {
    let row = timeout(
        PATIENCE_WITH_A_SERVER,
        client.query_one(
            "select not exists (select from pg_catalog.pg_db_role_setting s \
                                join pg_catalog.pg_database d on d.oid = s.setdatabase \
                                where d.datname = pg_catalog.current_database() and s.setrole = 0 \
                                      and 'default_transaction_read_only=on' = any (s.setconfig))",
            &[],
        ),
    )
    .await??;
    Ok(row.get(0))
}

/// One client.
struct Bot {
    number: usize,
    shared: Arc<Shared>,
    links: Vec<Arc<Link>>,
    changed: Arc<Notify>,
    stopped: watch::Receiver<Option<tokio::time::Instant>>,
    /// The node it writes to: it stays there until that node is no longer live.
    at: Option<usize>,
}

/// A write, before it is known which node saves it.
struct Write {
    id: String,
    sequence: u64,
    channel: i64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    SaveCommand,
    UpsertConfig,
    UpsertSession,
    Count,
}

/// Why an attempt did not end in an acknowledged write.
enum Trouble {
    /// 25006.
    Refused,
    /// Not saved; try again.
    Again,
    /// Not saved, and the connection is no good.
    Disconnected,
    /// The connection went while COMMIT was under way.
    Ambiguous,
    /// The command's id is there already.
    Saved,
    /// Not saved, and trying again would not help.
    Hopeless(String),
}

impl Bot {
    async fn run(mut self) -> Vec<Outcome> {
        static RUN: AtomicU64 = AtomicU64::new(0);
        let run = RUN.fetch_add(1, Ordering::Relaxed);
        let mut random = [0; 2];
        openssl::rand::rand_bytes(&mut random).expect("randomness");
        self.ask_own_node().await;
        let mut outcomes = Vec::new();
        for sequence in 0_u64.. {
            if self.stopped.borrow().is_some() {
                break;
            }
            let write = Write {
                // Reads as client and number in a report.
                id: format!(
                    "{:08x}-{:02x}{:02x}-4000-8000-{sequence:012x}",
                    run.wrapping_mul(0x1_0000) + self.number as u64,
                    random[0],
                    random[1]
                ),
                sequence,
                channel: self.shared.channels + self.number as i64,
                kind: [Kind::SaveCommand, Kind::UpsertConfig, Kind::UpsertSession, Kind::Count]
                    [(sequence % 4) as usize],
            };
            outcomes.push(self.save(&write).await);
            tokio::select! {
                () = sleep(self.shared.options.pause) => {}
                _ = self.stopped.changed() => {}
            }
        }
        outcomes
    }

    /// The node it prefers has the first word: without this, whichever connects faster would get all clients.
    async fn ask_own_node(&self) {
        let own = &self.links[self.number % self.links.len()];
        let answer = async {
            while own.state().news == 0 {
                self.changed.notified().await;
            }
        };
        let _ = timeout(PATIENCE_WITH_A_SERVER, answer).await;
    }

    /// Stays with a write until it is saved, or hopeless, or the time is up.
    async fn save(&mut self, write: &Write) -> Outcome {
        let mut ambiguous = false;
        loop {
            let Some((node, begun)) = self.live_node().await else {
                return Outcome::Unsaved(Unsaved { id: write.id.clone(), ambiguous, error: None });
            };
            match self.attempt(write, node, ambiguous).await {
                Ok(()) | Err(Trouble::Saved) => {
                    self.shared.acknowledged[node].fetch_add(1, Ordering::Relaxed);
                    let id = write.id.clone();
                    return Outcome::Acknowledged(Acknowledged { id, at: Instant::now(), node, ambiguous });
                }
                Err(Trouble::Refused) => {
                    self.shared.refused.fetch_add(1, Ordering::Relaxed);
                    self.links[node].refused(begun);
                }
                Err(Trouble::Again) => sleep(Duration::from_millis(1)).await,
                Err(trouble @ (Trouble::Disconnected | Trouble::Ambiguous)) => {
                    self.shared.disconnected.fetch_add(1, Ordering::Relaxed);
                    ambiguous |= matches!(trouble, Trouble::Ambiguous);
                    self.links[node].refused(begun);
                }
                Err(Trouble::Hopeless(error)) => {
                    return Outcome::Unsaved(Unsaved { id: write.id.clone(), ambiguous, error: Some(error) });
                }
            }
        }
    }

    /// The node to write to, as soon as there is one; nothing when the time is up.
    async fn live_node(&mut self) -> Option<(usize, State)> {
        loop {
            let own_first = (0..self.links.len()).map(|step| (self.number + step) % self.links.len());
            let found = self.at.into_iter().chain(own_first).find(|&node| self.links[node].state().live);
            if let Some(node) = found {
                self.at = Some(node);
                return Some((node, self.links[node].state()));
            }
            let deadline = *self.stopped.borrow();
            let changed = self.changed.notified();
            match deadline {
                Some(deadline) => timeout_at(deadline, changed).await.ok()?,
                None => tokio::select! {
                    () = changed => {}
                    _ = self.stopped.changed() => {}
                },
            }
        }
    }

    async fn attempt(&self, write: &Write, node: usize, ambiguous: bool) -> Result<(), Trouble> {
        let mut session = self.links[node].session.lock().await;
        let client = session.as_ref().ok_or(Trouble::Disconnected)?;
        let place = if self.shared.options.rows == Rows::PerClient { 0 } else { node };
        let result = transact(client, write, place, ambiguous).await;
        if matches!(result, Err(Trouble::Disconnected | Trouble::Ambiguous)) {
            // Closes it, which its keeper notices.
            *session = None;
        }
        result
    }
}

/// One transaction, as the bot runs them.
async fn transact(client: &Client, write: &Write, place: usize, ambiguous: bool) -> Result<(), Trouble> {
    if ambiguous && patiently(is_saved(client, write)).await? {
        return Err(Trouble::Saved);
    }
    let body = async {
        client.batch_execute("begin read write").await?;
        perform(client, write, place).await
    };
    if let Err(trouble) = patiently(body).await {
        if !matches!(trouble, Trouble::Disconnected) {
            patiently(client.batch_execute("rollback")).await.map_err(|_| Trouble::Disconnected)?;
        }
        return Err(trouble);
    }
    match patiently(client.batch_execute("commit")).await {
        // An error of a session that goes on means that nothing was committed. Any other end leaves it open.
        Err(Trouble::Disconnected) => Err(Trouble::Ambiguous),
        result => result,
    }
}

/// With an end to it, and its error sorted.
async fn patiently<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Trouble> {
    match timeout(PATIENCE_WITH_A_SERVER, work).await {
        Ok(result) => result.map_err(|error| sort(&error)),
        Err(_) => Err(Trouble::Disconnected),
    }
}

fn sort(error: &Error) -> Trouble {
    let Some(report) = error.as_db_error() else { return Trouble::Disconnected };
    if matches!(report.parsed_severity(), Some(Severity::Fatal | Severity::Panic)) {
        return Trouble::Disconnected;
    }
    match report.code() {
        &SqlState::READ_ONLY_SQL_TRANSACTION => Trouble::Refused,
        &SqlState::UNIQUE_VIOLATION if report.constraint() == Some("commands_pkey") => Trouble::Saved,
        // Transient: serialization, deadlock, resources, an operator at work.
        code if ["40001", "40P01", "55P03"].contains(&code.code()) || ["53", "57"].contains(&&code.code()[..2]) => {
            Trouble::Again
        }
        _ => Trouble::Hopeless(describe(report)),
    }
}

fn describe(error: &DbError) -> String {
    format!("{} {} {}", error.code().code(), error.message(), error.detail().unwrap_or_default())
}

/// Where a write leaves its id.
fn keyword(write: &Write, place: usize) -> String {
    let kind = if matches!(write.kind, Kind::Count) { "counter" } else { "setting" };
    format!("{kind}{place}-{}", write.sequence / IDS_PER_ROW)
}

fn cookie(write: &Write, place: usize) -> String {
    format!("{}-{place}-{}", write.channel, write.sequence / IDS_PER_ROW)
}

async fn perform(client: &Client, write: &Write, place: usize) -> Result<(), Error> {
    let (id, channel) = (&write.id as &(dyn ToSql + Sync), &write.channel as &(dyn ToSql + Sync));
    match write.kind {
        Kind::SaveCommand => {
            let name = format!("command{place}-{}", write.sequence / 4 % COMMANDS);
            client
                .execute_typed(
                    "update stillebot.commands set active = false where twitchid = $1 and cmdname = $2 and active",
                    &[(channel, Type::INT8), (&name, Type::TEXT)],
                )
                .await?;
            let mut own_id = write.id.clone();
            own_id.replace_range(PLACE_DIGIT - 1..PLACE_DIGIT, &place.to_string());
            client
                .execute_typed(
                    "insert into stillebot.commands (id, twitchid, cmdname, active, content) \
                     values ($1::uuid, $2, $3, true, jsonb_build_object('message', 'Hello from ' || $1))",
                    &[(&own_id, Type::TEXT), (channel, Type::INT8), (&name, Type::TEXT)],
                )
                .await?;
        }
        Kind::UpsertConfig => {
            client
                .execute_typed(
                    "insert into stillebot.config as c (twitchid, keyword, data) \
                     values ($1, $2, jsonb_build_object('ids', jsonb_build_array($3))) \
                     on conflict (twitchid, keyword) do update \
                     set data = jsonb_build_object('ids', c.data -> 'ids' || to_jsonb($3))",
                    &[(channel, Type::INT8), (&keyword(write, place), Type::TEXT), (id, Type::TEXT)],
                )
                .await?;
        }
        Kind::UpsertSession => {
            client
                .execute_typed(
                    "insert into stillebot.http_sessions as s (cookie, data) values ($1, convert_to($2 || E'\\n', 'UTF8')) \
                     on conflict (cookie) do update set active = now(), data = s.data || excluded.data",
                    &[(&cookie(write, place), Type::TEXT), (id, Type::TEXT)],
                )
                .await?;
        }
        Kind::Count => {
            let keyword = keyword(write, place);
            let key: [(&(dyn ToSql + Sync), Type); 2] = [(channel, Type::INT8), (&keyword, Type::TEXT)];
            client
                .execute_typed(
                    "insert into stillebot.config (twitchid, keyword, data) values ($1, $2, '{\"count\": 0, \"ids\": []}') \
                     on conflict do nothing",
                    &key,
                )
                .await?;
            // Increased by the client, from what it read: that is what goes wrong when it reads too early.
            let count: i32 = client
                .query_typed(
                    "select (data ->> 'count')::int from stillebot.config where twitchid = $1 and keyword = $2 for update",
                    &key,
                )
                .await?[0]
                .get(0);
            client
                .execute_typed(
                    "update stillebot.config \
                     set data = jsonb_build_object('count', $3::int, 'ids', data -> 'ids' || to_jsonb($4::text)) \
                     where twitchid = $1 and keyword = $2",
                    &[key[0].clone(), key[1].clone(), (&(count + 1), Type::INT4), (id, Type::TEXT)],
                )
                .await?;
        }
    }
    Ok(())
}

/// Whether this node has it, wherever it was saved.
async fn is_saved(client: &Client, write: &Write) -> Result<bool, Error> {
    let (id, channel) = (&write.id as &(dyn ToSql + Sync), &write.channel as &(dyn ToSql + Sync));
    let query = match write.kind {
        Kind::SaveCommand => &format!(
            "select from stillebot.commands \
             where twitchid = $1 and overlay(id::text placing '0' from {PLACE_DIGIT} for 1) = $2"
        ),
        Kind::UpsertConfig | Kind::Count => "select from stillebot.config where twitchid = $1 and data -> 'ids' ? $2",
        Kind::UpsertSession => {
            "select from stillebot.http_sessions \
             where split_part(cookie, '-', 1)::bigint = $1 and position($2 in convert_from(data, 'UTF8')) > 0"
        }
    };
    Ok(!client.query_typed(query, &[(channel, Type::INT8), (id, Type::TEXT)]).await?.is_empty())
}
