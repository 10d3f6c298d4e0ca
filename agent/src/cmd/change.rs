//! `schema apply` and `schema run`: a change of the schema on all nodes, or on none.
//!
//! Walks the steps of `crate::change`. Up to the first commit every failure leads back: transactions and prepared ones are
//! rolled back, windows closed, nodes opened as they were. After it every way leads forward.

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
use crate::change::{self, Closed, Entry, Plan, Seen};
use crate::cli::{SchemaApply, SchemaHow, SchemaRun};
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts::{self, Facts};
use crate::failure::{Failure, Kind};
use crate::node::{NodeError, Session, Trouble};
use crate::schema::{self, Schema};
use crate::stop::{Halt, Limits};
use crate::{quote, sql};

/// How long a commit, or closing a window, may take.
const END_BOUND: Duration = Duration::from_secs(20);
/// Refreshing connects to the peer and may wait for a table's lock.
const REFRESH_BOUND: Duration = Duration::from_secs(30);
/// How long undoing may take on each node.
const UNDO_BOUND: Duration = Duration::from_secs(15);
/// How long a command may take to end when it is asked to.
const END_OF_COMMAND: Duration = Duration::from_secs(10);

/// What is run.
struct Content<'a> {
    /// The file or the command, as it is called in reports.
    what: String,
    text: &'a str,
    sha256: Option<String>,
    lock_timeout: Duration,
}

/// What a trial has shown on one node.
enum Trial {
    Nothing,
    Changes { node: String, list: Vec<String> },
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
    /// Who prepared what, by node and id.
    owners: BTreeMap<(String, String), String>,
    windows: BTreeSet<String>,
    /// Nodes with an open transaction, failed or not.
    in_transaction: BTreeSet<String>,
    began: Instant,
    /// Since when writes are refused.
    closed: Option<Instant>,
    steps: Vec<Value>,
}

/// `schema apply`.
pub async fn apply(context: &Context, options: &SchemaApply) -> Result<Reply, Failure> {
    let text = std::fs::read_to_string(&options.file).map_err(|error| {
        Failure::new(Kind::Usage, format!("cannot read {}: {error}", options.file.display()))
            .hint("the file has to be SQL, in UTF-8")
    })?;
    let sha256: String = openssl::sha::sha256(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    let content = Content {
        what: options.file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        text: &text,
        sha256: Some(sha256),
        lock_timeout: options.lock_timeout,
    };
    let mut work = Work::begin(context, &options.how, content).await?;
    if !work.plan.finishing {
        work.pause("trial", false);
        let trial = match work.trial().await {
            Ok(trial) => trial,
            Err(failure) => return Err(work.nothing_changed(failure).await),
        };
        work.pause("trial", true);
        let (node, list) = match trial {
            Trial::Nothing => return work.nothing().await,
            Trial::Changes { node, list } => (node, list),
        };
        if options.how.dry_run {
            return Ok(work.describe(&list));
        }
        if options.no_down && !work.plan.close.is_empty() {
            let up: Vec<&str> = work.plan.close.iter().map(|(name, _)| name.as_str()).collect();
            let failure = Failure::new(
                Kind::Undone,
                format!("{} is writable, and there is something to change", up.join(" and ")),
            )
            .detail(list.join("\n"))
            .hint("take it down first, or leave --no-down out");
            return Err(work.nothing_changed(failure).await);
        }
        work.note("trial", format!("{node} would change"));
    } else if options.how.dry_run {
        return Ok(work.describe(&[format!("an earlier run is finished: change {}", work.plan.id)]));
    }
    match work.until_committed().await {
        Ok(()) => work.conclude(None).await,
        Err(failure) => Err(work.back(failure).await),
    }
}

/// `schema run`.
pub async fn run(context: &Context, options: &SchemaRun) -> Result<Reply, Failure> {
    let what = options.command.join(" ");
    let content = Content { what, text: "", sha256: None, lock_timeout: Duration::ZERO };
    let mut work = Work::begin(context, &options.how, content).await?;
    if options.how.dry_run {
        return Ok(work.describe(&[format!("would run: {}", work.content.what)]));
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
            owners: BTreeMap::new(),
            windows: BTreeSet::new(),
            in_transaction: BTreeSet::new(),
            began,
            closed: None,
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
            let seen =
                self.crew.session(&name)?.row(sql::CHANGE_SEEN, &[&self.role], LOOK_BOUND).await.map_err(|error| {
                    Failure::from(error)
                        .hint("the extension has to be of version 0.5: alter extension stillebot update")
                })?;
            let may_act: Option<bool> = seen.get("may_act");
            if may_act.is_none() || (self.content.sha256.is_some() && may_act != Some(true)) {
                return Err(self.may_not_act(&name, may_act));
            }
            let (journal, prepared): (String, String) = (seen.get("journal"), seen.get("prepared"));
            let journal = read_journal(&journal);
            let prepared: BTreeMap<String, String> = serde_json::from_str(&prepared).unwrap_or_default();
            let ids = prepared.keys().cloned().collect();
            self.owners.extend(prepared.into_iter().map(|(id, owner)| ((name.clone(), id), owner)));
            nodes.push(Seen { name, state, journal, prepared: ids, two_phase: seen.get("two_phase") });
        }
        nodes.sort_by_key(|node| self.context.config.nodes.iter().position(|known| known.name == node.name));
        self.plan = change::decide(&new_id()?, self.content.sha256.as_deref(), &nodes).map_err(|refusal| {
            Failure::new(Kind::Undone, format!("{}; nothing was changed", refusal.why)).hint(refusal.hint)
        })?;
        // A command that was killed may have done a part.
        if !self.plan.finishing && !self.plan.resuming {
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

    /// Nodes that are down come first: there it costs nobody anything, and one that would change answers for all.
    async fn trial(&mut self) -> Result<Trial, Failure> {
        let up: BTreeSet<String> = self.plan.close.iter().map(|(name, _)| name.clone()).collect();
        let (up, down): (Vec<String>, Vec<String>) = self.names().into_iter().partition(|name| up.contains(name));
        for name in down.iter().chain(&up) {
            self.stop_now()?;
            let is_down = down.contains(name);
            if is_down {
                self.open_window(name, &self.context.config.user.clone()).await?;
            }
            let tried = self.try_on(name).await;
            if is_down && tried.is_ok() {
                self.close_window(name).await?;
            }
            match tried? {
                Trial::Nothing => {}
                changes @ Trial::Changes { .. } => return Ok(changes),
            }
        }
        Ok(Trial::Nothing)
    }

    async fn try_on(&self, name: &str) -> Result<Trial, Failure> {
        let session = self.crew.session(name)?;
        session.run("begin read write", LOOK_BOUND).await?;
        let work = async {
            let rows = async || session.row(sql::CHANGE_WRITTEN, &[], self.how.window).await;
            let before: i64 = rows().await?.get("rows");
            let schema_before = schema::read(session, LOOK_BOUND).await?;
            let digest_before: String = session.row(sql::CHANGE_DIGEST, &[], LOOK_BOUND).await?.get("digest");
            session.script(&self.statements(), self.how.window).await?;
            let after = rows().await?;
            let mut list = Vec::new();
            if after.get("written") {
                let digest: String = session.row(sql::CHANGE_DIGEST, &[], LOOK_BOUND).await?.get("digest");
                let written = after.get::<_, i64>("rows") - before;
                if digest != digest_before {
                    list = change::effects(&schema_before, &schema::read(session, LOOK_BOUND).await?);
                    if list.is_empty() {
                        list.push("privileges, comments or the like: changed".to_owned());
                    }
                }
                if written > 0 {
                    list.push(format!("rows: {written} written"));
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
    fn statements(&self) -> String {
        let execute = format!("begin execute {}; end", quote::literal(self.content.text));
        format!(
            "set local idle_in_transaction_session_timeout = 0; set local lock_timeout = {}; \
             set local search_path = \"$user\", public; set local role {}; do {}; \
             set constraints all immediate; set local role none; set local search_path = pg_catalog",
            self.content.lock_timeout.as_millis(),
            quote::name(&self.role),
            quote::literal(&execute)
        )
    }

    async fn nothing(&mut self) -> Result<Reply, Failure> {
        let text = format!("nothing to do: {} changes nothing on any node", self.content.what);
        let left: Vec<(String, bool)> =
            self.plan.reopen.iter().filter(|node| !self.plan.close.contains(node)).cloned().collect();
        if !self.how.dry_run && !left.is_empty() {
            // What an earlier run had closed.
            self.reopen().await?;
        }
        let json = json!({"command": "schema apply", "outcome": "nothing_to_do", "message": text,
            "reopened": left.iter().map(|(name, _)| name).collect::<Vec<_>>(), "writes_refused_ms": 0, "steps": self.steps});
        Ok(Reply::done(text, json))
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
        if failure.kind == Kind::Undone {
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
        let json = json!({"command": self.verb(), "outcome": "dry_run", "would": lines, "steps": self.steps});
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
            let reason = Closed { id: self.plan.id.clone(), sole }.reason(&self.content.what);
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
            let rows = self.crew.session(to)?.rows(sql::APPLIED, &[&subscription, position], LOOK_BOUND).await?;
            if rows.first().and_then(|row| row.get::<_, Option<bool>>("applied")) == Some(true) {
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

    /// Runs the file everywhere, each time in a transaction that stays open, or is prepared.
    async fn change(&mut self) -> Result<(), Failure> {
        let all =
            self.context.config.nodes.iter().map(|node| quote::literal(&node.name)).collect::<Vec<_>>().join(", ");
        let note = format!(
            "begin read write; select multihome.note_schema_change({}, {}, {}, array[{all}], {})",
            quote::literal(&self.plan.id),
            quote::literal(&self.content.what),
            quote::literal(self.content.sha256.as_deref().unwrap_or_default()),
            quote::literal(&whoami())
        );
        let statements = format!("{note}; {}", self.statements());
        let prepare = format!("prepare transaction {}", quote::literal(&prepared_name(&self.plan.id)));
        let (crew, two_phase, bound) = (&self.crew, self.plan.two_phase, self.how.window);
        let role = format!("set role {}", quote::name(&self.role));
        self.in_transaction = self.plan.run_on.iter().cloned().collect();
        let work = join_all(self.plan.run_on.iter().map(async |name| {
            let session = crew.session(name)?;
            session.script(&statements, bound).await?;
            if !two_phase {
                return Ok::<_, NodeError>(None);
            }
            // Who prepares it is who may end it later. A refusal ends the transaction, too.
            session.run(&role, LOOK_BOUND).await?;
            session.run(&prepare, END_BOUND).await?;
            session.run("reset role", LOOK_BOUND).await?;
            Ok(Some(name.clone()))
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
        let mut failure: Option<Failure> = None;
        for result in results {
            match result {
                Ok(Some(prepared)) => drop(self.in_transaction.remove(&prepared)),
                Ok(None) => {}
                Err(error) => {
                    failure = Some(match failure {
                        None => error.into(),
                        Some(failure) => failure.also(&error.to_string()),
                    });
                }
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        if !self.plan.run_on.is_empty() {
            let how = if two_phase { "prepared" } else { "ready to commit" };
            self.note("change", format!("{how} on {}", self.plan.run_on.join(", ")));
        }
        self.stop_now()
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
        let role = self.role.clone();
        let seen = self.crew.ask(name, sql::CHANGE_SEEN, &[&role], LOOK_BOUND).await.ok()?;
        let journal: String = seen.first()?.get("journal");
        Some(read_journal(&journal).iter().any(|entry| entry.id == self.plan.id))
    }

    /// Commits or rolls back what is prepared, as its owner.
    async fn end_prepared(&mut self, verb: &str, node: &str, id: &str) -> Result<(), Failure> {
        let owner = self.owners.get(&(node.to_owned(), id.to_owned())).unwrap_or(&self.role).clone();
        let session = self.crew.session(node)?;
        session.run(&format!("set role {}", quote::name(&owner)), LOOK_BOUND).await?;
        let ended = session.run(&format!("{verb} prepared {}", quote::literal(&prepared_name(id))), END_BOUND).await;
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
            "writes_refused_ms": refused.map_or(0.0, ms), "steps": self.steps});
        Ok(Reply::done(text, json))
    }

    async fn closed_and_compared(&mut self) -> Result<Vec<String>, Failure> {
        for name in self.names() {
            if self.windows.contains(&name) {
                self.close_window(&name).await?;
            }
        }
        Ok(change::differences(&self.schemas().await?))
    }

    async fn reopen(&mut self) -> Result<(), Failure> {
        for (name, sole) in self.plan.reopen.clone() {
            if let Err(error) = open(&mut self.crew, &name, sole).await {
                let learned =
                    if error.trouble == Trouble::Refused { None } else { self.crew.learn(&name, UP_BOUND).await.ok() };
                if !learned.is_some_and(|state| state.is_up()) {
                    return Err(error.into());
                }
            }
        }
        if !self.plan.reopen.is_empty() {
            let names: Vec<&str> = self.plan.reopen.iter().map(|(name, _)| name.as_str()).collect();
            self.note("reopen", format!("{} up, as before", names.join(", ")));
        }
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
        let mut flaws = Vec::new();
        for name in self.names() {
            if let Err(failure) = self.undo_on(&name).await {
                flaws.push(format!("{name}: {}", failure.message));
            }
        }
        if flaws.is_empty()
            && let Err(failure) = self.reopen().await
        {
            flaws.push(failure.message);
        }
        self.pause("undo", true);
        let mut failure = cause;
        if flaws.is_empty() {
            failure.kind = Kind::Undone;
            failure.message = format!("{}; everything is as it was{}", failure.message, refused_for(self.refused()));
        } else {
            failure.kind = Kind::NeedsPerson;
            failure = failure.also(&flaws.join("\n"));
            failure.message = format!("{}; and not all of it could be undone", failure.message);
            failure.hint =
                Some("run the same command again when the nodes can be reached, or `up` what shall be up".into());
        }
        self.reported(failure)
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
        let role = self.role.clone();
        let seen = self.crew.ask(name, sql::CHANGE_SEEN, &[&role], LOOK_BOUND).await?;
        let prepared: String = seen.first().map_or_else(String::new, |row| row.get("prepared"));
        let prepared: BTreeMap<String, String> = serde_json::from_str(&prepared).unwrap_or_default();
        if let Some(owner) = prepared.get(&self.plan.id)
            && !self.plan.finishing
        {
            self.owners.insert((name.to_owned(), self.plan.id.clone()), owner.clone());
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
        (!self.plan.close.is_empty()).then_some(self.closed?.elapsed())
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

fn prepared_name(id: &str) -> String {
    format!("stillebot_schema_{id}")
}

fn read_journal(text: &str) -> Vec<Entry> {
    let rows: Vec<Value> = serde_json::from_str(text).unwrap_or_default();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    rows.iter()
        .map(|row| Entry {
            id: text(row, "id"),
            file: text(row, "file"),
            sha256: text(row, "sha256"),
            nodes: serde_json::from_value(row["nodes"].clone()).unwrap_or_default(),
        })
        .collect()
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
