//! `schema apply` and `schema run`: a change of the schema on all nodes, or on none.
//!
//! Walks the steps of `crate::change`. Up to the first commit every failure leads back: transactions and prepared ones are
//! rolled back, windows closed, nodes opened as they were, each by itself; one that cannot be asked is named and stays as it is.
//! After it every way leads forward.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio_postgres::types::PgLsn;

use super::{Context, IN_THE_WAY, Reply, UP_BOUND, open, pause, print, unreachable, whoami};
use crate::change::{self, Closed, Plan, Prepared, Seen, Written, prepared_name};
use crate::cli::{SchemaApply, SchemaHow, SchemaRun};
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts::{self, Facts};
use crate::failure::{Failure, Kind};
use crate::node::{LOCKED, NodeError, Session, Trouble};
use crate::schema::{self, Schema};
use crate::stop::{Halt, Limits};
use crate::{quote, sql};

/// How long a commit, or closing a window, may take.
const END_BOUND: Duration = Duration::from_secs(20);
/// Refreshing connects to the peer and may wait for a table's lock.
const REFRESH_BOUND: Duration = Duration::from_secs(30);
/// How long undoing may take on each node.
const UNDO_BOUND: Duration = Duration::from_secs(15);
/// How long the trial may wait for a lock on a node that is up, where everybody else waits behind it.
const BRIEF: Duration = Duration::from_secs(1);
/// How long a command may take to end when it is asked to.
const END_OF_COMMAND: Duration = Duration::from_secs(10);

/// What is run.
struct Content<'a> {
    /// The file or the command, as it is called in reports.
    what: String,
    /// The same for everybody to read: without a command's arguments, of which one may be a password.
    public: String,
    text: &'a str,
    sha256: Option<String>,
    lock_timeout: Duration,
}

/// What a trial has shown on one node.
enum Trial {
    Nothing,
    Changes { node: String, list: Vec<String> },
}

/// How far a node has come with its part.
enum Part {
    /// Its transaction is open.
    Ready,
    Prepared,
    /// Undone there: what it has done cannot be prepared, and why.
    CannotPrepare(String),
    /// Undone there, by the failure to prepare it.
    Failed(NodeError),
}

/// A change under way.
struct Work<'a> {
    context: &'a Context,
    how: &'a SchemaHow,
    role: String,
    content: Content<'a>,
    crew: Crew<'a>,
    limits: Limits,
    plan: Plan,
    /// What earlier runs have prepared, by node and id.
    prepared: BTreeMap<(String, String), Prepared>,
    windows: BTreeSet<String>,
    /// Nodes with an open transaction, failed or not.
    in_transaction: BTreeSet<String>,
    began: Instant,
    /// Since when writes are refused, and until when.
    closed: Option<Instant>,
    opened: Option<Instant>,
    /// For how long the trial may have kept others waiting on a node that is up.
    blocked: Duration,
    steps: Vec<Value>,
}

/// `schema apply`.
pub async fn apply(context: &Context, options: &SchemaApply) -> Result<Reply, Failure> {
    let text = std::fs::read_to_string(&options.file).map_err(|error| {
        Failure::new(Kind::Usage, format!("cannot read {}: {error}", options.file.display()))
            .hint("the file has to be SQL, in UTF-8")
    })?;
    let sha256: String = openssl::sha::sha256(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    let what = options.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let content =
        Content { public: what.clone(), what, text: &text, sha256: Some(sha256), lock_timeout: options.lock_timeout };
    let mut work = Work::begin(context, &options.how, content).await?;
    work.pause("trial", false);
    let trial = match work.trial().await {
        Ok(trial) => trial,
        Err(failure) => return Err(work.nothing_changed(failure).await),
    };
    work.pause("trial", true);
    let list = match trial {
        _ if work.plan.finishing => vec![format!("an earlier run is finished: change {}", work.plan.id)],
        Trial::Nothing => return work.nothing().await,
        Trial::Changes { node, list } => {
            work.note("trial", format!("{node} would change{}", work.blocked_for()));
            list
        }
    };
    if options.how.dry_run {
        return Ok(work.describe(&list));
    }
    if options.how.no_down && !work.plan.close.is_empty() {
        return Err(work.refused_to_close("there is something to change", Some(list.join("\n"))).await);
    }
    match work.until_committed().await {
        Ok(()) => work.conclude(None).await,
        Err(failure) => Err(work.back(failure).await),
    }
}

/// `schema run`.
pub async fn run(context: &Context, options: &SchemaRun) -> Result<Reply, Failure> {
    let program = std::path::Path::new(&options.command[0]).file_name().unwrap_or_default();
    let content = Content {
        what: options.command.join(" "),
        public: program.to_string_lossy().into_owned(),
        text: "",
        sha256: None,
        lock_timeout: Duration::ZERO,
    };
    let mut work = Work::begin(context, &options.how, content).await?;
    if options.how.dry_run {
        let first = if options.try_up { " with the nodes as they are first" } else { "" };
        return Ok(work.describe(&[format!("would run{first}: {}", work.content.what)]));
    }
    let mut needed = "whether there is something to change, only the command knows".to_owned();
    if options.try_up {
        let before = work.schemas().await?;
        match work.command(&options.command).await {
            Ok(()) => return work.was_enough(&before).await,
            Err(failure) if work.context.signals.received().is_some() => {
                return Err(work.nothing_changed(failure).await);
            }
            Err(failure) => needed = format!("with the nodes as they are {}", failure.message),
        }
        work.note("trial", needed.clone());
    }
    if options.how.no_down && !work.plan.close.is_empty() {
        return Err(work.refused_to_close(&needed, None).await);
    }
    if let Err(failure) = work.until_windows().await {
        return Err(work.back(failure).await);
    }
    work.pause("change", false);
    let ended = work.command(&options.command).await;
    work.pause("change", true);
    match &ended {
        Ok(()) => work.note("change", "the command has succeeded"),
        Err(failure) => work.note("change", failure.message.clone()),
    }
    work.conclude(ended.err()).await
}

impl<'a> Work<'a> {
    // ---- before anything changes ----

    async fn begin(context: &'a Context, how: &'a SchemaHow, content: Content<'a>) -> Result<Self, Failure> {
        let Some(role) = how.role.clone().or_else(|| context.config.schema_role.clone()) else {
            return Err(Failure::new(Kind::Usage, "whose tables are changed?")
                .hint("say --role ROLE, or role = \"ROLE\" in [schema] of the configuration"));
        };
        let limits = Limits::new(how.wait, &context.signals);
        let began = Instant::now();
        let (crew, errors) = Crew::muster(&context.config, &context.connector, &context.nodes()).await;
        if let Some(failure) = unreachable(&errors) {
            return Err(failure);
        }
        let plan = Plan {
            id: String::new(),
            finishing: false,
            run_on: Vec::new(),
            commit_on: Vec::new(),
            roll_back: Vec::new(),
            close: Vec::new(),
            reopen: Vec::new(),
            resuming: false,
            two_phase: false,
        };
        let mut work = Self {
            context,
            how,
            role,
            content,
            crew,
            limits,
            plan,
            prepared: BTreeMap::new(),
            windows: BTreeSet::new(),
            in_transaction: BTreeSet::new(),
            began,
            closed: None,
            opened: None,
            blocked: Duration::ZERO,
            steps: Vec::new(),
        };
        work.pause("lock", false);
        work.crew.lock().await?;
        for name in work.names() {
            // What a down database tells its sessions must not refuse the agent's own calls.
            work.crew.session(&name)?.run("set default_transaction_read_only = off", LOOK_BOUND).await?;
        }
        work.note("lock", format!("connected to {}", work.names().join(", ")));
        work.pause("lock", true);
        work.pause("preflight", false);
        work.preflight().await?;
        work.pause("preflight", true);
        Ok(work)
    }

    async fn preflight(&mut self) -> Result<(), Failure> {
        let facts = self.replicating().await?;
        let mut nodes = Vec::new();
        for (name, facts) in facts {
            let Some(state) = facts.state else {
                let flaw = facts.extension.flaw().unwrap_or_default();
                return Err(Failure::new(Kind::Undone, format!("{name}: {flaw}; nothing was changed")));
            };
            let may = self.crew.session(&name)?.row(sql::CHANGE_MAY, &[&self.role], LOOK_BOUND).await?;
            let may_conclude: Option<bool> = may.get("may_conclude");
            if may_conclude.is_none() || (self.content.sha256.is_some() && may_conclude != Some(true)) {
                return Err(may_not_conclude(&name, may_conclude));
            }
            let may_act: Option<bool> = may.get("may_act");
            if may_act.is_none() || (self.content.sha256.is_some() && may_act != Some(true)) {
                return Err(self.may_not_act(&name, may_act));
            }
            let traces = facts.changes;
            self.prepared.extend(traces.prepared.iter().map(|it| ((name.clone(), it.id.clone()), it.clone())));
            nodes.push(Seen { name, state, traces });
        }
        nodes.sort_by_key(|node| self.context.config.nodes.iter().position(|known| known.name == node.name));
        self.plan = change::decide(&new_id()?, self.content.sha256.as_deref(), &nodes).map_err(|refusal| {
            Failure::new(Kind::Undone, format!("{}; nothing was changed", refusal.why)).hint(refusal.hint)
        })?;
        // A command may be what makes them alike, and one that was killed may have done a part.
        if self.content.sha256.is_some() && !self.plan.finishing && !self.plan.resuming {
            let differences = change::differences(&self.schemas().await?);
            if !differences.is_empty() {
                return Err(Failure::new(Kind::Undone, "the schemas of the nodes are not alike; nothing was changed")
                    .detail(differences.join("\n"))
                    .hint("make them alike first, by hand or with `schema run`"));
            }
        }
        let states: Vec<String> = nodes.iter().map(|node| format!("{} {}", node.name, node.state.state)).collect();
        self.note("preflight", states.join(", "));
        if self.how.dry_run {
            return Ok(());
        }
        for (node, id) in self.plan.roll_back.clone() {
            self.end_prepared("rollback", &node, &id).await?;
            self.note("preflight", format!("{node}: rolled back what an earlier run had prepared"));
        }
        Ok(())
    }

    fn may_not_act(&self, name: &str, may_act: Option<bool>) -> Failure {
        let (role, agent) = (quote::name(&self.role), quote::name(&self.context.config.user));
        match may_act {
            None => Failure::new(Kind::Undone, format!("{name} has no role {role}; nothing was changed"))
                .hint("check --role, or role in [schema] of the configuration"),
            Some(_) => {
                Failure::new(Kind::Undone, format!("{agent} may not act as {role} on {name}; nothing was changed"))
                    .hint(format!("on every node: grant {role} to {agent} with inherit false, set true"))
            }
        }
    }

    async fn schemas(&self) -> Result<Vec<(String, Schema)>, Failure> {
        let names = self.names();
        let looks = names.iter().map(async |name| {
            Ok::<_, NodeError>((name.clone(), schema::read(self.crew.session(name)?, LOOK_BOUND).await?))
        });
        Ok(join_all(looks).await.into_iter().collect::<Result<_, _>>()?)
    }

    /// What all nodes tell, once replication works in every direction.
    async fn replicating(&mut self) -> Result<BTreeMap<String, Facts>, Failure> {
        loop {
            let mut facts = BTreeMap::new();
            for name in self.names() {
                let found = facts::gather(self.crew.session(&name)?, &self.context.config, LOOK_BOUND).await?;
                facts.insert(name, found);
            }
            let permanent = facts::node_obstacles(&self.context.config, &facts);
            let transient: Vec<String> =
                facts::directions(&self.context.config, &facts).into_iter().filter_map(|d| d.trouble).collect();
            if permanent.is_empty() && transient.is_empty() {
                return Ok(facts);
            }
            let obstacles = permanent.iter().chain(&transient).cloned().collect::<Vec<_>>().join("\n");
            let failure = || {
                Failure::new(Kind::Undone, "not ready for a change of the schema; nothing was changed")
                    .detail(obstacles.clone())
                    .hint("see `status`; mend that first")
            };
            if !permanent.is_empty() || self.how.dry_run {
                return Err(failure());
            }
            self.limits.run(tokio::time::sleep(Duration::from_millis(100))).await.map_err(|_| failure())?;
        }
    }

    // ---- the trial ----

    /// Nodes that are down come first: there it costs nobody anything, and one that would change answers for all. What an earlier
    /// run has begun is tried wherever it is still to be run: a node that refuses it must not go down for nothing.
    async fn trial(&mut self) -> Result<Trial, Failure> {
        let up: BTreeSet<String> = self.plan.close.iter().map(|(name, _)| name.clone()).collect();
        let (up, down): (Vec<String>, Vec<String>) =
            self.plan.run_on.iter().cloned().partition(|name| up.contains(name));
        for name in down.iter().chain(&up) {
            self.stop_now()?;
            let is_down = down.contains(name);
            if is_down {
                self.open_window(name, &self.context.config.user.clone()).await?;
            }
            let began = Instant::now();
            let tried = self.try_on(name, if is_down { self.content.lock_timeout } else { self.brief() }).await;
            if !is_down {
                self.blocked += began.elapsed();
            } else if tried.is_ok() {
                self.close_window(name).await?;
            }
            let tried = tried.map_err(|failure| match failure.hint.as_deref() {
                Some(LOCKED) if !is_down => {
                    let brief = humantime::format_duration(self.brief());
                    failure.hint(format!(
                        "somebody holds a lock on it, see pg_locks; wait for its end: a trial on a node that is up waits for {brief} at most"
                    ))
                }
                _ => failure,
            });
            match tried? {
                changes @ Trial::Changes { .. } if !self.plan.finishing => return Ok(changes),
                _ => {}
            }
        }
        Ok(Trial::Nothing)
    }

    fn brief(&self) -> Duration {
        self.content.lock_timeout.min(BRIEF)
    }

    async fn try_on(&self, name: &str, lock_timeout: Duration) -> Result<Trial, Failure> {
        let session = self.crew.session(name)?;
        session.run("begin read write", LOOK_BOUND).await?;
        let work = async {
            let before = written(session).await?;
            let schema_before = schema::read(session, LOOK_BOUND).await?;
            let digest_before: String = session.row(sql::CHANGE_DIGEST, &[], LOOK_BOUND).await?.get("digest");
            session.script(&self.statements(lock_timeout), self.how.window).await?;
            let after = written(session).await?;
            let mut list = Vec::new();
            if after.any {
                let digest: String = session.row(sql::CHANGE_DIGEST, &[], LOOK_BOUND).await?.get("digest");
                let rows = after.rows - before.rows;
                if digest != digest_before {
                    list = change::effects(&schema_before, &schema::read(session, LOOK_BOUND).await?);
                    if list.is_empty() {
                        list.push("privileges, comments or the like: changed".to_owned());
                    }
                }
                if rows > 0 {
                    list.push(format!("rows: {rows} written"));
                }
                if list.is_empty() && change::is_hidden(&before, &after) {
                    list.push("something that is not compared: changed".to_owned());
                }
            }
            Ok::<_, NodeError>(list)
        };
        let list = match self.limits_of_statements().run(work).await {
            Ok(list) => list,
            Err(halt) => {
                session.cancel(&self.context.connector, LOOK_BOUND).await;
                return Err(halted(halt, "during the trial"));
            }
        };
        // Of two errors the first is the one to tell.
        let ended = session.run("rollback", LOOK_BOUND).await;
        let list = list?;
        ended?;
        Ok(if list.is_empty() { Trial::Nothing } else { Trial::Changes { node: name.to_owned(), list } })
    }

    /// The file as one statement, which the server takes apart: it refuses control of transactions there, and what cannot be in
    /// one.
    fn statements(&self, lock_timeout: Duration) -> String {
        let execute = format!("begin execute {}; end", quote::literal(self.content.text));
        format!(
            "set local idle_in_transaction_session_timeout = 0; set local lock_timeout = {}; \
             set local search_path = \"$user\", public; set local role {}; do {}; \
             set constraints all immediate; set local role none; set local search_path = pg_catalog",
            lock_timeout.as_millis(),
            quote::name(&self.role),
            quote::literal(&execute)
        )
    }

    async fn nothing(&mut self) -> Result<Reply, Failure> {
        let text = format!("nothing to do: {} changes nothing on any node", self.content.what);
        let left = self.left_closed();
        if !self.how.dry_run && !left.is_empty() {
            self.reopen().await?;
        }
        let json = json!({"command": "schema apply", "outcome": "nothing_to_do", "message": text,
            "reopened": left, "writes_refused_ms": 0,
            "writes_blocked_ms": ms(self.blocked), "steps": self.steps});
        Ok(Reply::done(text, json))
    }

    /// After a command that has succeeded with the nodes as they are.
    async fn was_enough(&mut self, before: &[(String, Schema)]) -> Result<Reply, Failure> {
        let after = self.schemas().await?;
        let differences = change::differences(&after);
        if !differences.is_empty() {
            let failure = Failure::new(
                Kind::Undone,
                "the command succeeds with the nodes as they are, and the schemas of the nodes are not alike",
            )
            .detail(differences.join("\n"))
            .hint("make them alike with a command that does, or without --try-up");
            return Err(self.reported(failure));
        }
        let changed = before != after;
        if changed {
            for name in self.names() {
                self.crew.ask(&name, sql::REFRESH, &[], REFRESH_BOUND).await?;
            }
            self.note("refresh", "subscriptions refreshed, nothing copied");
        }
        let left = self.left_closed();
        if !left.is_empty() {
            self.reopen().await?;
        }
        let (what, outcome) = (&self.content.what, if changed { "done" } else { "nothing_to_do" });
        let text = if changed {
            format!("{what} has changed the schema with the nodes as they are")
        } else {
            format!("nothing to do: {what} succeeds with the nodes as they are")
        };
        let json = json!({"command": "schema run", "outcome": outcome, "message": text,
            "reopened": left, "writes_refused_ms": 0, "steps": self.steps});
        Ok(Reply::done(text, json))
    }

    /// What an earlier run had closed.
    fn left_closed(&self) -> Vec<String> {
        let left =
            self.plan.reopen.iter().filter(|(name, _)| !self.plan.close.iter().any(|(closed, _)| closed == name));
        left.map(|(name, _)| name.clone()).collect()
    }

    /// With --no-down.
    async fn refused_to_close(&mut self, why: &str, detail: Option<String>) -> Failure {
        let up: Vec<&str> = self.plan.close.iter().map(|(name, _)| name.as_str()).collect();
        let verb = if up.len() > 1 { "are" } else { "is" };
        let mut failure = Failure::new(Kind::Undone, format!("{} {verb} writable, and {why}", up.join(" and ")))
            .hint("take it down first, or leave --no-down out");
        failure.detail = detail;
        self.nothing_changed(failure).await
    }

    /// After a failure before any node was taken down.
    async fn nothing_changed(&mut self, failure: Failure) -> Failure {
        let mut failure = failure;
        for name in self.names() {
            if self.windows.contains(&name)
                && let Err(error) = self.close_window(&name).await
            {
                failure = failure.also(&error.message);
            }
        }
        if self.plan.finishing {
            failure.kind = Kind::NeedsPerson;
            failure.message =
                format!("an earlier run's change cannot be finished, and nothing was changed: {}", failure.message);
            failure.hint.get_or_insert_with(|| {
                format!(
                    "what is missing on {} may have come there by other means; then say on a node that has the change: select \
                     multihome.conclude_schema_changes()",
                    self.plan.run_on.join(" and ")
                )
            });
        } else if failure.kind == Kind::Undone {
            failure.message = format!("{}; nothing was changed", failure.message);
        }
        self.reported(failure)
    }

    fn describe(&self, list: &[String]) -> Reply {
        let mut lines = list.to_vec();
        let names =
            |nodes: &[(String, bool)]| nodes.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" and ");
        if !self.plan.close.is_empty() {
            lines.push(format!("would take {} down meanwhile", names(&self.plan.close)));
        }
        if !self.plan.reopen.is_empty() {
            lines.push(format!("would open {} at the end", names(&self.plan.reopen)));
        }
        let json = json!({"command": self.verb(), "outcome": "dry_run", "would": lines,
            "writes_blocked_ms": ms(self.blocked), "steps": self.steps});
        Reply::done(lines.join("\n"), json)
    }

    // ---- the change ----

    async fn until_windows(&mut self) -> Result<(), Failure> {
        self.pause("close", false);
        self.close().await?;
        self.pause("close", true);
        self.pause("drain", false);
        self.drain().await?;
        self.pause("drain", true);
        self.pause("window", false);
        let user = if self.content.sha256.is_some() { self.context.config.user.clone() } else { self.role.clone() };
        for name in self.names() {
            self.stop_now()?;
            self.open_window(&name, &user).await?;
        }
        self.note("window", format!("open for {user}"));
        self.pause("window", true);
        Ok(())
    }

    async fn until_committed(&mut self) -> Result<(), Failure> {
        self.until_windows().await?;
        self.pause("change", false);
        self.change().await?;
        self.pause("change", true);
        self.commit().await
    }

    async fn close(&mut self) -> Result<(), Failure> {
        self.closed = Some(Instant::now());
        for (name, sole) in self.plan.close.clone() {
            let reason = Closed { id: self.plan.id.clone(), sole }.reason(&self.content.public);
            let seconds = self.how.timeout.as_secs_f64();
            let limits = Limits::new(self.how.timeout + UNDO_BOUND, &self.context.signals);
            let bound = self.how.timeout + UNDO_BOUND;
            let terminate = self.how.terminate;
            let call = async {
                let session = self.crew.session(&name)?;
                session.row(sql::DOWN, &[&Some(reason), &seconds, &terminate, &None::<String>], bound).await
            };
            match limits.run(call).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    let in_the_way = error.trouble == Trouble::Refused && error.detail.is_some();
                    let mut failure = Failure::from(error);
                    if in_the_way {
                        failure.hint = Some(IN_THE_WAY.into());
                    }
                    return Err(failure);
                }
                Err(halt) => {
                    self.crew.give_up(&name);
                    return Err(halted(halt, &format!("while {name} was going down")));
                }
            }
        }
        self.note("close", if self.plan.close.is_empty() { "all nodes are down" } else { "no node is writable" });
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), Failure> {
        let mut ways = Vec::new();
        // What an earlier run has committed was drained before; what it left prepared would be in the way.
        let closed: BTreeSet<&String> = self.plan.close.iter().map(|(name, _)| name).collect();
        let sources: Vec<String> =
            self.names().into_iter().filter(|name| !self.plan.finishing || closed.contains(name)).collect();
        for from in sources {
            // Down: returns at once, with a position past every write.
            let rows =
                self.crew.ask(&from, sql::DOWN, &[&None::<String>, &5.0_f64, &false, &None::<String>], END_BOUND);
            let rows = rows.await?;
            let position: PgLsn = rows.first().map_or(PgLsn::from(0), |row| row.get("lsn"));
            ways.extend(self.names().into_iter().filter(|to| *to != from).map(|to| (from.clone(), to, position)));
        }
        let limits = Limits::new(self.how.wait, &self.context.signals);
        while let Some((from, to, position)) = ways.last() {
            let subscription = self.context.config.subscription_to(from);
            if self.crew.has_applied(to, &subscription, *position).await? {
                ways.pop();
                continue;
            }
            let why = format!("while {to} was still applying what {from} had written");
            limits.run(tokio::time::sleep(Duration::from_millis(5))).await.map_err(|halt| halted(halt, &why))?;
        }
        self.note("drain", "every node has every write");
        Ok(())
    }

    async fn open_window(&mut self, name: &str, user: &str) -> Result<(), Failure> {
        let seconds = self.how.window.as_secs_f64();
        self.crew.ask(name, sql::OPEN_WINDOW, &[&user, &seconds], LOOK_BOUND).await?;
        self.windows.insert(name.to_owned());
        Ok(())
    }

    async fn close_window(&mut self, name: &str) -> Result<(), Failure> {
        self.crew.ask(name, sql::CLOSE_WINDOW, &[], END_BOUND).await?;
        self.windows.remove(name);
        Ok(())
    }

    /// Runs the file everywhere, each time in a transaction that stays open, or is prepared. What some node cannot prepare, such
    /// as temporary tables or rows whose trigger notifies, is run once more, to be committed on one node after the other.
    async fn change(&mut self) -> Result<(), Failure> {
        if let Some(why) = self.run_everywhere().await? {
            self.plan.two_phase = false;
            self.note("change", format!("cannot be prepared, so it is committed on one node after the other: {why}"));
            self.run_everywhere().await?;
        }
        if !self.plan.run_on.is_empty() {
            let how = if self.plan.two_phase { "prepared" } else { "ready to commit" };
            self.note("change", format!("{how} on {}", self.plan.run_on.join(", ")));
        }
        self.stop_now()
    }

    /// Once. Returns why it cannot be prepared; then it is undone.
    async fn run_everywhere(&mut self) -> Result<Option<String>, Failure> {
        let all =
            self.context.config.nodes.iter().map(|node| quote::literal(&node.name)).collect::<Vec<_>>().join(", ");
        let note = format!(
            "begin read write; select multihome.note_schema_change({}, {}, {}, array[{all}], {})",
            quote::literal(&self.plan.id),
            quote::literal(&self.content.what),
            quote::literal(self.content.sha256.as_deref().unwrap_or_default()),
            quote::literal(&whoami())
        );
        let statements = format!("{note}; {}", self.statements(self.content.lock_timeout));
        let (crew, id, two_phase, bound) = (&self.crew, &self.plan.id, self.plan.two_phase, self.how.window);
        let role = format!("set role {}", quote::name(&self.role));
        self.in_transaction = self.plan.run_on.iter().cloned().collect();
        let work = join_all(self.plan.run_on.iter().map(async |name| {
            let session = crew.session(name)?;
            session.script(&statements, bound).await?;
            if !two_phase {
                return Ok::<_, NodeError>(Part::Ready);
            }
            // Who prepares it is who may end it later. A refusal ends the transaction, too.
            session.run(&role, LOOK_BOUND).await?;
            let part = match session.prepare_transaction(&prepared_name(id, name), END_BOUND).await {
                Ok(refused) => refused.map_or(Part::Prepared, Part::CannotPrepare),
                Err(error) => return Ok(Part::Failed(error)),
            };
            session.run("reset role", LOOK_BOUND).await?;
            Ok(part)
        }));
        let results = match self.limits_of_statements().run(work).await {
            Ok(results) => results,
            Err(halt) => {
                // Their statements are still under way.
                for name in self.plan.run_on.clone() {
                    self.crew.give_up(&name);
                }
                return Err(halted(halt, "during the change"));
            }
        };
        let (mut prepared, mut cannot, mut errors) = (Vec::new(), None, Vec::new());
        for (name, result) in self.plan.run_on.clone().into_iter().zip(results) {
            match result {
                Ok(Part::Ready) => {}
                Ok(Part::Prepared) => {
                    self.in_transaction.remove(&name);
                    prepared.push(name);
                }
                Ok(Part::CannotPrepare(why)) => {
                    self.in_transaction.remove(&name);
                    cannot = Some(format!("{name}: {why}"));
                }
                Ok(Part::Failed(error)) => {
                    self.in_transaction.remove(&name);
                    errors.push(error);
                }
                Err(error) => errors.push(error),
            }
        }
        let mut errors = errors.into_iter();
        if let Some(first) = errors.next() {
            return Err(errors.fold(first.into(), |failure: Failure, error| failure.also(&error.to_string())));
        }
        if cannot.is_some() {
            for name in prepared {
                self.end_prepared("rollback", &name, &self.plan.id.clone()).await?;
            }
        }
        Ok(cannot)
    }

    /// An error leads back only if nothing is committed.
    async fn commit(&mut self) -> Result<(), Failure> {
        self.pause("commit", false);
        let mut committed: Vec<String> = Vec::new();
        let todo: Vec<(String, bool)> = self
            .plan
            .commit_on
            .iter()
            .map(|name| (name.clone(), true))
            .chain(self.plan.run_on.iter().map(|name| (name.clone(), self.plan.two_phase)))
            .collect();
        // Who cannot be asked any more shall not be found out after the first commit.
        let asked = todo.iter().map(async |(name, _)| self.crew.session(name)?.run("select", LOOK_BOUND).await);
        join_all(asked).await.into_iter().collect::<Result<Vec<()>, NodeError>>()?;
        for (index, (name, prepared)) in todo.iter().enumerate() {
            if index == 1 {
                self.pause("commit", true);
            }
            let result = if *prepared {
                self.end_prepared("commit", name, &self.plan.id.clone()).await
            } else {
                match self.crew.session(name) {
                    Ok(session) => session.run("commit", END_BOUND).await.map_err(Failure::from),
                    Err(error) => Err(error.into()),
                }
            };
            self.in_transaction.remove(name);
            let Err(failure) = result else {
                committed.push(name.clone());
                continue;
            };
            match self.is_committed(name).await {
                Some(true) => committed.push(name.clone()),
                Some(false) if committed.is_empty() && !self.plan.finishing => return Err(failure),
                known => {
                    let missing: Vec<&str> = todo[index..].iter().map(|(name, _)| name.as_str()).collect();
                    let not = if known.is_none() { "may not be" } else { "is not" };
                    let mut failure = Failure::new(
                        Kind::NeedsPerson,
                        format!("the change {not} committed on {}: {}", missing.join(", "), failure.message),
                    )
                    .hint(format!(
                        "run `schema apply` with {} again: it finishes what is left, and opens what was up. Until then the nodes \
                         stay down",
                        self.content.what
                    ));
                    if !committed.is_empty() {
                        failure = failure.detail(format!("committed on {}", committed.join(", ")));
                    }
                    return Err(failure);
                }
            }
        }
        if !todo.is_empty() {
            self.note("commit", format!("committed on {}", committed.join(", ")));
        }
        Ok(())
    }

    /// What the journal of a node says, after an answer that did not come or was no. None: it cannot be asked.
    async fn is_committed(&mut self, name: &str) -> Option<bool> {
        if self.crew.session(name).is_ok_and(Session::is_lost) || self.crew.session(name).is_err() {
            self.crew.learn(name, UNDO_BOUND).await.ok()?;
        }
        let traces = facts::traces(self.crew.session(name).ok()?, LOOK_BOUND).await.ok()?;
        Some(traces.journal.iter().any(|entry| entry.id == self.plan.id))
    }

    /// Commits or rolls back what is prepared, as its owner.
    async fn end_prepared(&mut self, verb: &str, node: &str, id: &str) -> Result<(), Failure> {
        let known = self.prepared.get(&(node.to_owned(), id.to_owned()));
        let owner = known.map_or(&self.role, |known| &known.owner);
        let gid = known.map_or_else(|| prepared_name(id, node), |known| known.gid.clone());
        let session = self.crew.session(node)?;
        session.run(&format!("set role {}", quote::name(owner)), LOOK_BOUND).await?;
        let ended = session.run(&format!("{verb} prepared {}", quote::literal(&gid)), END_BOUND).await;
        session.run("reset role", LOOK_BOUND).await?;
        Ok(ended?)
    }

    // ---- the command ----

    async fn command(&mut self, words: &[String]) -> Result<(), Failure> {
        let nodes = &self.context.config.nodes;
        let list = |of: fn(&crate::config::Node) -> String| nodes.iter().map(of).collect::<Vec<_>>().join(",");
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .env("STILLEBOT_NODES", list(|node| node.name.clone()))
            .env("STILLEBOT_HOSTS", list(|node| node.host.clone()))
            .env("STILLEBOT_PORTS", list(|node| node.port.to_string()))
            .env("PGDATABASE", &self.context.config.database)
            .env("PGUSER", &self.role)
            .kill_on_drop(true);
        if self.context.json {
            command.stdout(Stdio::from(std::io::stderr()));
        }
        let mut child = command.spawn().map_err(|error| {
            Failure::new(Kind::Undone, format!("cannot run {}: {error}", words[0])).hint("check the command's name")
        })?;
        match self.limits_of_statements().run(child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(Failure::new(Kind::Undone, format!("the command failed: {status}"))),
            Ok(Err(error)) => Err(Failure::new(Kind::Undone, format!("the command cannot be waited for: {error}"))),
            Err(halt) => {
                end(&mut child).await;
                Err(Failure::new(Kind::Undone, format!("{halt}; the command was ended")))
            }
        }
    }

    // ---- the end ----

    /// Closes the windows, compares, refreshes and opens again. `failed`: what the command said.
    async fn conclude(&mut self, failed: Option<Failure>) -> Result<Reply, Failure> {
        self.pause("compare", false);
        let differences = match self.closed_and_compared().await {
            Ok(differences) => differences,
            Err(error) => return Err(self.left_down(error)),
        };
        if !differences.is_empty() {
            let mut failure = Failure::new(
                Kind::NeedsPerson,
                "the schemas of the nodes differ now; the nodes stay down",
            )
            .detail(differences.join("\n"))
            .hint("make them alike with `schema run`, which then opens what was up; or open a node with `up` as it is");
            if let Some(failed) = failed {
                failure.message = format!("{}, and {}", failed.message, failure.message);
            }
            return Err(self.reported(failure));
        }
        self.note("compare", "the schemas are alike");
        self.pause("compare", true);
        self.pause("refresh", false);
        for name in self.names() {
            if let Err(error) = self.crew.ask(&name, sql::REFRESH, &[], REFRESH_BOUND).await {
                return Err(self.left_down(error.into()));
            }
        }
        self.note("refresh", "subscriptions refreshed, nothing copied");
        self.pause("refresh", true);
        self.pause("reopen", false);
        if let Err(error) = self.reopen().await {
            return Err(self.left_down(error));
        }
        self.pause("reopen", true);
        let refused = self.refused();
        if let Some(mut failure) = failed {
            failure.message = format!("{}; the nodes are as they were{}", failure.message, refused_for(refused));
            return Err(self.reported(failure));
        }
        let text = format!("{} is done on {}{}", self.content.what, self.names().join(" and "), refused_for(refused));
        let json = json!({"command": self.verb(), "outcome": "done", "id": self.plan.id, "nodes": self.names(),
            "writes_refused_ms": refused.map_or(0.0, ms), "writes_blocked_ms": ms(self.blocked), "steps": self.steps});
        Ok(Reply::done(text, json))
    }

    async fn closed_and_compared(&mut self) -> Result<Vec<String>, Failure> {
        for name in self.names() {
            if self.windows.contains(&name) {
                self.close_window(&name).await?;
            }
            // It stays on its node by its own means, which a window has not.
            if self.content.sha256.is_some() {
                self.crew.ask(&name, sql::CHANGE_CONCLUDE, &[], END_BOUND).await?;
            }
        }
        Ok(change::differences(&self.schemas().await?))
    }

    async fn reopen(&mut self) -> Result<(), Failure> {
        for (name, sole) in self.plan.reopen.clone() {
            self.open_as_before(&name, sole).await?;
        }
        if !self.plan.reopen.is_empty() {
            let names: Vec<&str> = self.plan.reopen.iter().map(|(name, _)| name.as_str()).collect();
            self.note("reopen", format!("{} up, as before", names.join(", ")));
        }
        Ok(())
    }

    async fn open_as_before(&mut self, name: &str, sole: bool) -> Result<(), Failure> {
        if let Err(error) = open(&mut self.crew, name, sole).await {
            let learned =
                if error.trouble == Trouble::Refused { None } else { self.crew.learn(name, UP_BOUND).await.ok() };
            if !learned.is_some_and(|state| state.is_up()) {
                return Err(error.into());
            }
        }
        self.opened = Some(Instant::now());
        Ok(())
    }

    /// After the change is made, something else did not go well.
    fn left_down(&mut self, cause: Failure) -> Failure {
        let names: Vec<&str> = self.plan.reopen.iter().map(|(name, _)| name.as_str()).collect();
        let mut failure = Failure::new(Kind::NeedsPerson, format!("the change is made, but: {}", cause.message)).hint(
            format!("run the same command again; or `refresh`, and then `up {}`", names.first().unwrap_or(&"NODE")),
        );
        failure.detail = cause.detail;
        self.reported(failure)
    }

    /// Undoes everything, after a failure before the first commit.
    ///
    /// Nothing is committed anywhere then, and whoever could commit is this process, so each node goes back without asking the
    /// others: what is open again was open before. What is prepared on a node that cannot be asked is in no journal, so that a
    /// later run rolls it back.
    async fn back(&mut self, cause: Failure) -> Failure {
        if cause.kind == Kind::NeedsPerson {
            return self.reported(cause);
        }
        if self.plan.finishing {
            let mut failure = cause;
            failure.kind = Kind::NeedsPerson;
            failure.message = format!("an earlier run's change could not be finished: {}", failure.message);
            failure.hint = Some("run it again; until then the nodes stay down, for one of them has the change".into());
            return self.reported(failure);
        }
        self.pause("undo", false);
        // Those that answer do not wait for those that do not.
        let (sound, lost): (Vec<String>, Vec<String>) =
            self.names().into_iter().partition(|name| self.crew.session(name).is_ok());
        let (mut undone, mut left, mut flaws) = (Vec::new(), Vec::new(), Vec::new());
        for name in sound.into_iter().chain(lost) {
            match self.back_on(&name).await {
                Ok(()) => undone.push(name),
                Err(failure) => {
                    flaws.push(format!("{name}: {}", failure.message));
                    left.push(name);
                }
            }
        }
        self.pause("undo", true);
        let mut failure = cause;
        let refused = refused_for(self.refused());
        if left.is_empty() {
            failure.kind = Kind::Undone;
            failure.message = format!("{}; everything is as it was{refused}", failure.message);
        } else {
            let (undone, left) = (undone.join(" and "), left.join(" and "));
            failure.kind = Kind::NeedsPerson;
            failure = failure.also(&flaws.join("\n"));
            let undone = if undone.is_empty() { String::new() } else { format!("; {undone} as before{refused}") };
            failure.message = format!("{}; nothing is committed{undone}; {left} could not be undone", failure.message);
            failure.hint = Some(format!(
                "when {left} can be reached, run the same command again, which undoes the rest first; or open what shall be up \
                 with `up`"
            ));
        }
        let left = self.left_closed();
        if !left.is_empty() {
            failure = failure.also(&format!("an earlier run had closed {}: still so", left.join(" and ")));
        }
        self.reported(failure)
    }

    async fn back_on(&mut self, name: &str) -> Result<(), Failure> {
        self.undo_on(name).await?;
        let closed = self.plan.close.iter().find(|(closed, _)| closed == name);
        match closed.map(|(_, sole)| *sole) {
            Some(sole) => self.open_as_before(name, sole).await,
            None => Ok(()),
        }
    }

    /// A session that is lost has taken its transaction and its window with it.
    async fn undo_on(&mut self, name: &str) -> Result<(), Failure> {
        let end = if self.in_transaction.remove(name) { "rollback; reset role" } else { "reset role" };
        let sound = match self.crew.session(name) {
            Ok(session) => session.run(end, LOOK_BOUND).await.is_ok(),
            Err(_) => false,
        };
        if !sound {
            self.crew.give_up(name);
            self.crew.learn(name, UNDO_BOUND).await?;
            self.windows.remove(name);
        }
        let traces = facts::traces(self.crew.session(name)?, LOOK_BOUND).await?;
        if let Some(prepared) = traces.prepared.into_iter().find(|prepared| prepared.id == self.plan.id) {
            self.prepared.insert((name.to_owned(), self.plan.id.clone()), prepared);
            self.end_prepared("rollback", name, &self.plan.id.clone()).await?;
        }
        if self.windows.contains(name) {
            self.close_window(name).await?;
        }
        Ok(())
    }

    // ---- small things ----

    fn names(&self) -> Vec<String> {
        self.context.config.nodes.iter().map(|node| node.name.clone()).collect()
    }

    fn verb(&self) -> &'static str {
        if self.content.sha256.is_some() { "schema apply" } else { "schema run" }
    }

    fn limits_of_statements(&self) -> Limits {
        Limits::new(self.how.window, &self.context.signals)
    }

    fn stop_now(&self) -> Result<(), Failure> {
        match self.context.signals.received() {
            Some(signal) => Err(Failure::new(Kind::Undone, format!("stopped by {signal}"))),
            None => Ok(()),
        }
    }

    fn refused(&self) -> Option<Duration> {
        let closed = self.closed.filter(|_| !self.plan.close.is_empty())?;
        Some(self.opened.unwrap_or_else(Instant::now).duration_since(closed))
    }

    fn blocked_for(&self) -> String {
        if self.blocked.is_zero() {
            return String::new();
        }
        format!("; writes there may have waited for up to {:.0} ms", ms(self.blocked))
    }

    fn note(&mut self, step: &'static str, what: impl Into<String>) {
        let what = what.into();
        let ms = ms(self.began.elapsed());
        self.began = Instant::now();
        tracing::info!(step, what, "step");
        if !self.context.json {
            print(&format!("{step:<10} {what} ({ms:.1} ms)"));
        }
        self.steps.push(json!({"step": step, "ms": ms, "what": what}));
    }

    fn reported(&self, mut failure: Failure) -> Failure {
        failure.report.insert("steps".into(), json!(self.steps));
        failure.report.insert("writes_refused_ms".into(), json!(self.refused().map_or(0.0, ms)));
        failure.report.insert("writes_blocked_ms".into(), json!(ms(self.blocked)));
        failure
    }

    /// For tests: stops this process, so that it can be killed at just this place.
    fn pause(&self, step: &str, after: bool) {
        pause(self.how.pause_at.as_ref(), step, after);
    }
}

fn halted(halt: Halt, when: &str) -> Failure {
    Failure::new(Kind::Undone, format!("{halt} {when}"))
}

fn may_not_conclude(name: &str, may: Option<bool>) -> Failure {
    match may {
        None => Failure::new(Kind::Undone, format!("the extension on {name} is older than 0.6; nothing was changed"))
            .hint("on every node: alter extension stillebot update; then `check` says what to grant"),
        Some(_) => Failure::new(
            Kind::Undone,
            format!("the agent may not call multihome.conclude_schema_changes() on {name}; nothing was changed"),
        )
        .hint("grant what `check` says"),
    }
}

/// What the transaction of this session has written so far.
async fn written(session: &Session) -> Result<Written, NodeError> {
    let row = session.row(sql::CHANGE_WRITTEN, &[], LOOK_BOUND).await?;
    let catalogs: String = row.get("catalogs");
    Ok(Written {
        any: row.get("written"),
        rows: row.get("rows"),
        catalogs: serde_json::from_str(&catalogs).unwrap_or_default(),
        counted: row.get("counted"),
    })
}

fn refused_for(refused: Option<Duration>) -> String {
    refused.map_or_else(String::new, |refused| format!("; writes were refused for {:.0} ms", ms(refused)))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn new_id() -> Result<String, Failure> {
    let mut bytes = [0_u8; 8];
    openssl::rand::rand_bytes(&mut bytes)
        .map_err(|error| Failure::new(Kind::Undone, format!("no random numbers: {error}")))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Asks a command to end, and ends it if it does not.
async fn end(child: &mut Child) {
    if let Some(pid) = child.id() {
        let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
    }
    if tokio::time::timeout(END_OF_COMMAND, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}
