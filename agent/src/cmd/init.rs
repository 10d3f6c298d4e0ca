//! `init`: makes the nodes replicate to each other, and proves it.
//!
//! Looks at all nodes, has `setup.rs` make the plan, shows it, and takes its steps. Deliberately remembers nothing: a run that
//! was stopped is gone on with by the next one, out of what is there. Nodes that get a copy are down meanwhile, by a reason
//! that names this command, and stay so until all that was written there is heard by the others.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use futures_util::future::{join, join_all};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;

use super::admin::{self, Admin, Halt, consent, wait};
use super::{Context, IN_THE_WAY, Reply, UP_BOUND, WRITE_BOUND};
use crate::check::{self, Finding, Seen as Looked};
use crate::cli::Init;
use crate::config::Node;
use crate::connection;
use crate::conninfo::Conninfo;
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts;
use crate::failure::{Failure, Kind};
use crate::node::{NodeError, Params, Session};
use crate::quote::{literal, name};
use crate::setup::{self, Action, Content, Plan, Refusal, Seen, Standing, Step, Wish};
use crate::sql;
use crate::survey::{self, Survey, Table};

use super::progress::Progress;
use super::sequences;

/// How long transactions that write may take to end on a node that is taken down.
const DRAIN: Duration = Duration::from_secs(30);
/// How long one statement of the plan may take, other than making a subscription.
const STATEMENT_BOUND: Duration = Duration::from_secs(60);
/// How long the rows of one table may take to be compared.
const COMPARE_BOUND: Duration = Duration::from_secs(3600);
/// How long a slot may take to go when what made it has been stopped.
const TIDY_BOUND: Duration = Duration::from_secs(5);

/// Runs it.
pub async fn run(context: &Context, options: &Init) -> Result<Reply, Failure> {
    let config = &context.config;
    if config.nodes.len() < 2 {
        let message = "init needs at least two nodes, and the configuration has one";
        return Err(Failure::new(Kind::Configuration, message));
    }
    if let Some(from) = &options.from {
        context.node(from)?;
    }
    let admin = Admin::new(context, &options.admin)?;
    let crew = admin.muster_all().await?;
    if !options.dry_run {
        crew.lock().await?;
    }
    let mut work = Work {
        context,
        options,
        admin: &admin,
        crew,
        taken: 0,
        parked: BTreeSet::new(),
        closed: BTreeSet::new(),
        proof: Vec::new(),
    };
    let Found { plan, colliding, concerns } = work.look().await?;
    let worries = worries(&concerns);
    if plan.steps.is_empty() {
        let json = json!({"command": "init", "outcome": "nothing_to_do", "steps": [], "concerns": concerns});
        let reply = Reply::done("nothing to do: the nodes replicate to each other as configured", json);
        return with_keys(work, reply, &colliding).await;
    }
    let mut text = admin::by_node(plan.steps.iter().map(Step::lines));
    if let Some(more) = about_keys(&colliding, options.stride) {
        text = format!("{}\n{more}", text.trim_end());
    }
    text = format!("{}\n{worries}", text.trim_end());
    if options.dry_run {
        let json = json!({"command": "init", "outcome": "dry_run", "plan": plan, "concerns": concerns});
        return Ok(Reply::done(text, json));
    }
    consent(context, &text, options.yes)?;
    let of = |wanted: Action| plan.steps.iter().filter(move |step| step.action == wanted).map(|step| step.node.clone());
    let closing: BTreeSet<String> = of(Action::Close).collect();
    work.parked = of(Action::Open).filter(|node| !closing.contains(node)).collect();
    let began = Instant::now();
    match work.carry_out(&plan).await {
        Ok(()) => {
            let mut text = String::new();
            for proof in &work.proof {
                let _ = writeln!(text, "{proof}");
            }
            let shut_out = work.shut_out().await;
            for line in shut_out.values() {
                let _ = writeln!(text, "{line}");
            }
            let _ = write!(text, "done in {:.1} s", began.elapsed().as_secs_f64());
            let json = json!({
                "command": "init",
                "outcome": "done",
                "plan": plan,
                "concerns": concerns,
                "agent_shut_out": shut_out,
                "proof": work.proof.iter().map(Proof::json).collect::<Vec<_>>(),
                "seconds": began.elapsed().as_secs_f64(),
            });
            with_keys(work, Reply::done(text, json), &colliding).await
        }
        Err(failure) => Err(work.stands(failure, &plan)),
    }
}

/// What a look at all nodes comes to.
struct Found {
    plan: Plan,
    /// The columns whose keys two nodes would hand out both.
    colliding: BTreeSet<String>,
    /// What stays as it is.
    concerns: Vec<Finding>,
}

/// What is said of what stays as it is.
fn worries(concerns: &[Finding]) -> String {
    let mut text = String::new();
    for finding in concerns {
        if text.is_empty() {
            text.push_str("what init leaves as it is:\n");
        }
        let _ = writeln!(text, "  {}: {}", finding.node, finding.title());
        for line in finding.mending() {
            let _ = writeln!(text, "      {line}");
        }
    }
    text
}

/// What is said of keys that come from sequences, and from the same ones on all nodes.
fn about_keys(columns: &BTreeSet<String>, stride: bool) -> Option<String> {
    if columns.is_empty() {
        return None;
    }
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    let then = if stride {
        "they get strides at the end"
    } else {
        "`init --stride` or `sequences stride` gives each node its own"
    };
    Some(format!("keys that two nodes would hand out both: {}; {then}", columns.join(", ")))
}

/// The end of init: strides for sequences, or what to do about them.
async fn with_keys(work: Work<'_>, mut reply: Reply, colliding: &BTreeSet<String>) -> Result<Reply, Failure> {
    let Work { context, options, crew, .. } = work;
    reply.json["colliding_keys"] = json!(colliding);
    if options.stride && !options.dry_run {
        let strided = sequences::stride(context, crew, &sequences::Wish::default()).await.map_err(|mut failure| {
            failure.message = format!("the nodes replicate to each other, but their sequences: {}", failure.message);
            failure
        })?;
        reply.text = format!("{}\n{}", reply.text, strided.text);
        reply.json["stride"] = strided.json;
    } else if let Some(more) = about_keys(colliding, options.stride) {
        reply.text = format!("{}\n{more}", reply.text);
    }
    Ok(reply)
}

/// A row, or a position, that has gone from one node to another.
struct Proof {
    from: String,
    to: String,
    by: &'static str,
    milliseconds: f64,
}

impl Proof {
    fn of(from: &str, to: &str, by: &'static str, began: Instant) -> Self {
        let milliseconds = began.elapsed().as_secs_f64() * 1000.0;
        Self { from: from.to_owned(), to: to.to_owned(), by, milliseconds }
    }

    fn json(&self) -> Value {
        json!({"from": self.from, "to": self.to, "by": self.by, "milliseconds": self.milliseconds})
    }
}

impl std::fmt::Display for Proof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { from, to, by, milliseconds } = self;
        match *by {
            "row" => write!(f, "{from} -> {to}: a row came after {milliseconds:.0} ms"),
            _ => write!(f, "{from} -> {to}: {from} is down; all it has is there, by its position in the WAL"),
        }
    }
}

struct Work<'a> {
    context: &'a Context,
    options: &'a Init,
    admin: &'a Admin,
    crew: Crew<'a>,
    /// How many steps are done.
    taken: usize,
    /// The nodes that an earlier run has left down, and this one opens at its end.
    parked: BTreeSet<String>,
    /// The nodes that this run has taken down until it is finished.
    closed: BTreeSet<String>,
    proof: Vec<Proof>,
}

impl<'a> Work<'a> {
    fn session(&self, node: &str) -> Result<&Session, NodeError> {
        self.crew.session(node)
    }

    fn nodes(&self) -> &'a [Node] {
        &self.context.config.nodes
    }

    fn peers(&self, node: &str) -> impl Iterator<Item = &'a str> {
        let node = node.to_owned();
        self.nodes().iter().map(|peer| peer.name.as_str()).filter(move |peer| *peer != node)
    }

    // ---- looking ----

    async fn look(&self) -> Result<Found, Failure> {
        let config = &self.context.config;
        let mut surveys: BTreeMap<String, Survey> = BTreeMap::new();
        let mut places = BTreeMap::new();
        let looks = self.nodes().iter().map(|node| join(self.survey(&node.name), super::check::places(node)));
        for (node, (survey, answers)) in self.nodes().iter().zip(join_all(looks).await) {
            surveys.insert(node.name.clone(), survey?);
            places.insert(node.name.clone(), answers);
        }
        let findings: Vec<Finding> = check::findings(&Looked { config, surveys: &surveys, places: &places });
        setup::preconditions(&findings).map_err(refused)?;
        self.files().await?;
        let mut nodes = BTreeMap::new();
        let mut wish = Wish {
            from: self.options.from.clone(),
            assume_identical: self.options.assume_identical,
            ..Wish::default()
        };
        for (node, survey) in surveys {
            let session = self.session(&node)?;
            let standing = match survey.about.extension {
                None => Standing::Up,
                Some(_) => Standing::of(&facts::state(session, LOOK_BOUND).await?),
            };
            let filled = filled(session, &survey).await?;
            let filled = filled.into_iter().map(|table| (table, None)).collect();
            if wish.fresh_pair.is_empty() {
                wish.fresh_pair = session.row(sql::SETUP_SELF, &[], LOOK_BOUND).await?.get("fresh");
            }
            nodes.insert(node, Seen { survey, standing, filled });
        }
        for node in setup::to_be_counted(config, &nodes, self.options.assume_identical) {
            if let Some(seen) = nodes.get_mut(&node) {
                self.count(&node, seen).await?;
            }
        }
        let colliding =
            findings.iter().filter(|f| f.subject == "sequence_key").filter_map(|f| f.about.clone()).collect();
        let plan = setup::plan(config, &nodes, &findings, &wish).map_err(refused)?;
        let concerns = setup::concerns(&findings, &plan);
        Ok(Found { plan, colliding, concerns })
    }

    /// What subscriptions are to connect with is on the servers' hosts.
    async fn files(&self) -> Result<(), Failure> {
        let config = &self.context.config;
        let mut missing = BTreeSet::new();
        for node in self.nodes() {
            let session = self.session(&node.name)?;
            for peer in config.peers(&node.name) {
                for file in connection::files(&Conninfo::wanted(config, node, peer)) {
                    if session.row(sql::FILE_MISSING, &[&file], LOOK_BOUND).await?.get("missing") {
                        missing.insert(format!("{} has no file {file}", node.name));
                    }
                }
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let message = "files that subscriptions are to connect with are missing; nothing was changed";
        Err(Failure::new(Kind::Undone, message)
            .detail(missing.into_iter().collect::<Vec<_>>().join("\n"))
            .hint("put them on that host, where the server may read them; or name others under [replication], or [node.replication]"))
    }

    /// Counts the rows of a node.
    async fn count(&self, node: &str, seen: &mut Seen) -> Result<(), Failure> {
        let session = self.session(node)?;
        let full: Vec<&Table> =
            setup::replicated(&seen.survey).filter(|table| seen.filled.contains_key(&table.name)).collect();
        let mut counted = BTreeMap::new();
        read_alike(session).await?;
        for table in full {
            admin::go_on(self.context)?;
            counted.insert(table.name.clone(), Some(content(session, table).await?));
        }
        seen.filled = counted;
        Ok(())
    }

    // ---- acting ----

    async fn carry_out(&mut self, plan: &Plan) -> Result<(), Failure> {
        let progress = Progress::new(self.context.json);
        let total = plan.steps.len();
        for step in &plan.steps {
            admin::go_on(self.context)?;
            progress.say(&format!("[{}/{total}] {}: {}", self.taken + 1, step.node, step.action.text()));
            self.take(step, plan, &progress).await?;
            self.taken += 1;
        }
        Ok(())
    }

    async fn take(&mut self, step: &Step, plan: &Plan, progress: &Progress) -> Result<(), Failure> {
        let node = step.node.as_str();
        match &step.action {
            Action::Run { statement } => Ok(self.session(node)?.run(statement, STATEMENT_BOUND).await?),
            Action::Close => self.close(node, plan).await,
            Action::Gather { peers } => {
                // Whose own copy is not over has not everything, however far its subscription is.
                self.copy(node, progress).await?;
                for other in peers {
                    self.caught_up(other, node).await?;
                }
                Ok(())
            }
            Action::Compare => self.compare().await,
            Action::StopMaking { slot } => self.stop_making(node, slot).await,
            Action::DropSlot { slot } => admin::drop_slot(self.context, self.session(node)?, slot).await,
            Action::MakeSlot { slot } => {
                let making = sql::SETUP_MAKE_SLOT.replace("$1", &literal(slot));
                self.make_slot(node, node, slot, &making, progress).await
            }
            Action::Subscribe { publisher, statement, .. } => {
                self.subscribe(node, publisher, statement, progress).await
            }
            Action::Enable { publisher, statement } => self.enable(node, publisher, statement).await,
            Action::Copy => self.copy(node, progress).await,
            Action::Open => self.open(node).await,
            Action::Prove => self.prove(node).await,
        }
    }

    async fn close(&mut self, node: &str, plan: &Plan) -> Result<(), Failure> {
        let params: Params<'_> = &[&Some(setup::REASON), &DRAIN.as_secs_f64(), &false, &None::<String>];
        let session = self.session(node)?;
        session.row(sql::DOWN, params, DRAIN + LOOK_BOUND).await.map_err(|error| {
            let mut failure = Failure::from(error);
            if failure.detail.is_some() {
                failure.hint =
                    Some(IN_THE_WAY.replace(", or end them with --terminate", ", or end them, and run it again"));
            }
            failure
        })?;
        self.closed.insert(node.to_owned());
        // It was empty when the plan was made; from now on nobody can change that.
        let session = self.session(node)?;
        let survey = self.survey(node).await?;
        if plan.newcomers.iter().any(|newcomer| newcomer == node)
            && let Some(table) = filled(session, &survey).await?.into_iter().next()
        {
            self.session(node)?.rows(sql::UP, &[&false], UP_BOUND).await?;
            self.closed.remove(node);
            let message = format!("{node}: somebody has written into {table} meanwhile; {node} is open again");
            return Err(Failure::new(Kind::Undone, message).hint("run init again, which looks anew where the rows are"));
        }
        Ok(())
    }

    async fn survey(&self, node: &str) -> Result<Survey, Failure> {
        let config = &self.context.config;
        let place = self.context.node(node)?;
        Ok(survey::take(self.session(node)?, config, place, LOOK_BOUND).await?)
    }

    async fn compare(&mut self) -> Result<(), Failure> {
        let mut all: Vec<(String, BTreeMap<String, Content>)> = Vec::new();
        for node in self.nodes() {
            let survey = self.survey(&node.name).await?;
            let session = self.session(&node.name)?;
            let mut contents = BTreeMap::new();
            read_alike(session).await?;
            for table in setup::replicated(&survey) {
                admin::go_on(self.context)?;
                contents.insert(table.name.clone(), content(session, table).await?);
            }
            all.push((node.name.clone(), contents));
        }
        let (first, reference) = &all[0];
        let mut detail = String::new();
        for (table, content) in reference {
            for (node, contents) in &all[1..] {
                let other = contents.get(table);
                if other != Some(content) {
                    let rows = other.map_or(0, |other| other.rows);
                    let _ = writeln!(detail, "{table}: {} rows on {first}, {rows} on {node}", content.rows);
                }
            }
        }
        if detail.is_empty() {
            return Ok(());
        }
        // Nothing is made yet, so everything can be as it was.
        for node in std::mem::take(&mut self.closed) {
            self.open_now(&node).await?;
        }
        Err(Failure::new(Kind::Undone, "the nodes have different rows; all nodes are as they were")
            .detail(detail.trim_end())
            .hint("make them the same, or empty all but one; then run init again"))
    }

    async fn subscribe(
        &mut self,
        node: &str,
        publisher: &str,
        statement: &str,
        progress: &Progress,
    ) -> Result<(), Failure> {
        let slot = self.context.config.slot(publisher, node);
        self.make_slot(node, publisher, &slot, statement, progress).await.map_err(|mut failure| {
            if failure.message.contains("would replicate this database to itself") {
                failure.hint = Some(format!(
                    "check host and port of {publisher} in the configuration, under [node.replication] too"
                ));
            }
            failure
        })?;
        let (session, source) = (self.session(node)?, self.session(publisher)?);
        if admin::slot(source, &slot, None).await?.is_some() {
            return Ok(());
        }
        let subscription = self.context.config.subscription_to(publisher);
        // Its slot is on that other server, and goes with it.
        session.run(&format!("drop subscription {}", name(&subscription)), STATEMENT_BOUND).await?;
        let wanted = &self.context.node(publisher)?.replication;
        let host = wanted.host.as_deref().unwrap_or(&self.context.node(publisher)?.host).to_owned();
        let message = format!("what {node} reaches as {host} is not {publisher}; the subscription was dropped again");
        Err(Failure::new(Kind::Undone, message)
            .hint(format!("check host and port of {publisher} in the configuration, under [node.replication] too")))
    }

    /// Runs what makes a slot on a publisher, which waits for all transactions that are under way there.
    async fn make_slot(
        &self,
        node: &str,
        publisher: &str,
        slot: &str,
        statement: &str,
        progress: &Progress,
    ) -> Result<(), Failure> {
        let patience = self.options.patience;
        let session = self.session(node)?;
        // The session that makes it cannot be asked meanwhile.
        let watcher = match node == publisher {
            true => Some(self.admin.another(self.context, publisher).await?),
            false => None,
        };
        let source = match &watcher {
            Some(watcher) => watcher,
            None => self.session(publisher)?,
        };
        let making = session.run(statement, patience + STATEMENT_BOUND);
        tokio::pin!(making);
        let until = Instant::now() + patience;
        let mut told = String::new();
        let (ended, mut failure) = loop {
            tokio::select! {
                made = &mut making => match made {
                    Ok(()) => return Ok(()),
                    Err(error) => break (true, error.into()),
                },
                signal = self.context.signals.wait() => break (false, admin::stopped(signal)),
                () = sleep(Duration::from_millis(500)) => {
                    let waiting = source.rows(sql::SETUP_WAITING, &[&slot], LOOK_BOUND).await?;
                    let waiting: Vec<String> = waiting.iter().map(|row| row.get("who")).collect();
                    let waiting = waiting.join("; ");
                    if !waiting.is_empty() && waiting != told {
                        progress.say(&format!("      waits for a transaction on {publisher}: {waiting}"));
                        told = waiting;
                    }
                    if Instant::now() >= until {
                        let message = format!(
                            "{node}: the slot {slot} on {publisher} was not made within {}", humantime::format_duration(patience)
                        );
                        let failure = Failure::new(Kind::Undone, message);
                        let failure = match told.as_str() {
                            "" => failure.hint(format!("look into the logs of {node} and {publisher}; then run init again")),
                            told => failure
                                .detail(format!("a slot has to wait for all transactions on {publisher} that are older: {told}"))
                                .hint("wait for its end, or end it with pg_terminate_backend(); then run init again"),
                        };
                        break (false, failure);
                    }
                }
            }
        };
        if !ended {
            session.cancel(&self.admin.connector, LOOK_BOUND).await;
            let _ = tokio::time::timeout(TIDY_BOUND, making).await;
        }
        // The publisher would go on, and leave a slot that nobody reads.
        if let Err(error) = source.rows(sql::SETUP_STOP_MAKING, &[&slot], LOOK_BOUND).await {
            failure = failure.also(&error.to_string());
        }
        Err(failure)
    }

    /// Ends whoever makes a slot, and waits until there is none.
    async fn stop_making(&self, node: &str, slot: &str) -> Result<(), Failure> {
        let session = self.session(node)?;
        session.rows(sql::SETUP_STOP_MAKING, &[&slot], LOOK_BOUND).await?;
        let gone = wait(self.context, TIDY_BOUND, async || {
            Ok(admin::slot(session, slot, None).await?.is_none().then_some(()))
        });
        gone.await.map_err(|halt| match halt {
            Halt::Late => Failure::new(Kind::Undone, format!("{node}: the slot {slot} was finished meanwhile"))
                .hint("run init again, which looks anew whose it is"),
            Halt::Signal(signal) => admin::stopped(signal),
            Halt::Node(error) => error.into(),
        })
    }

    async fn enable(&mut self, node: &str, publisher: &str, statement: &str) -> Result<(), Failure> {
        self.session(node)?.run(statement, STATEMENT_BOUND).await?;
        let slot = self.slot_of(node, publisher).await?;
        let source = self.session(publisher)?;
        let read = wait(self.context, self.options.patience, async || {
            Ok(admin::slot(source, &slot, None).await?.and_then(|slot| slot.pid))
        });
        match read.await {
            Ok(_) => Ok(()),
            Err(halt) => Err(self.halted(halt, node, publisher, "is not read").await),
        }
    }

    /// The slot that a subscription reads, which may be called otherwise than it would be today.
    async fn slot_of(&self, node: &str, publisher: &str) -> Result<String, Failure> {
        let wanted = self.context.config.subscription_to(publisher);
        let survey = self.survey(node).await?;
        let found = survey.subscriptions.iter().find(|found| found.name == wanted);
        Ok(found.and_then(|found| found.slot.clone()).unwrap_or_else(|| self.context.config.slot(publisher, node)))
    }

    /// Waits until a node has applied all that another one has written up to now.
    async fn caught_up(&self, publisher: &str, node: &str) -> Result<(), Failure> {
        let slot = self.slot_of(node, publisher).await?;
        let source = self.session(publisher)?;
        let position: PgLsn = source.row(sql::POSITION, &[], LOOK_BOUND).await?.get("lsn");
        let heard = wait(self.context, self.options.patience, async || {
            let slot = admin::slot(source, &slot, Some(position)).await?;
            Ok(slot.is_some_and(|slot| slot.heard).then_some(()))
        });
        match heard.await {
            Ok(()) => Ok(()),
            Err(halt) => Err(self.halted(halt, node, publisher, "does not catch up").await),
        }
    }

    async fn halted(&self, halt: Halt, node: &str, publisher: &str, what: &str) -> Failure {
        match halt {
            Halt::Node(error) => error.into(),
            Halt::Signal(signal) => admin::stopped(signal),
            Halt::Late => {
                let subscription = self.context.config.subscription_to(publisher);
                let patience = humantime::format_duration(self.options.patience);
                let message = format!("subscription {subscription} on {node} {what}, for {patience}");
                let failure = Failure::new(Kind::Undone, message);
                let trouble = match self.session(node) {
                    Ok(session) => admin::trouble(session, &subscription).await,
                    Err(_) => None,
                };
                match trouble {
                    Some(trouble) => failure.detail(format!("{node}: {trouble}")).hint("mend that, and run init again"),
                    None => failure.hint(format!("look into the logs of {node} and {publisher}; then run init again")),
                }
            }
        }
    }

    async fn copy(&mut self, node: &str, progress: &Progress) -> Result<(), Failure> {
        let config = &self.context.config;
        for publisher in self.peers(node) {
            let subscription = config.subscription_to(publisher);
            let source = self.session(publisher)?;
            let session = self.session(node)?;
            let sizes = source.rows(sql::SETUP_SIZES, &[], LOOK_BOUND).await?;
            let sizes: BTreeMap<String, i64> =
                sizes.iter().map(|row| (row.get("relation"), row.get("tuples"))).collect();
            let mut bars = progress.tables(&sizes);
            let mut last = Vec::new();
            let mut moved = Instant::now();
            loop {
                let rows = session.rows(sql::SETUP_COPYING, &[&subscription], LOOK_BOUND).await?;
                let now: Vec<(String, bool, i64, i64)> = rows
                    .iter()
                    .map(|row| (row.get("relation"), row.get("copied"), row.get("tuples"), row.get("bytes")))
                    .collect();
                bars.show(node, &now);
                let (done, all) = (now.iter().filter(|(_, copied, ..)| *copied).count(), now.len());
                let stands = format!("{done} of {all} tables are copied");
                if done == all {
                    break;
                }
                if now != last {
                    (last, moved) = (now, Instant::now());
                }
                if moved.elapsed() > self.options.patience {
                    let failure = self.halted(Halt::Late, node, publisher, "copies nothing more").await;
                    return Err(failure.also(&stands));
                }
                tokio::select! {
                    signal = self.context.signals.wait() => {
                        let message = format!("stopped by {signal}; {node}: {stands}, and the servers go on with it");
                        return Err(Failure::new(Kind::Undone, message));
                    }
                    () = sleep(Duration::from_millis(200)) => {}
                }
            }
            bars.finish();
        }
        Ok(())
    }

    async fn open(&mut self, node: &str) -> Result<(), Failure> {
        for peer in self.peers(node) {
            self.caught_up(peer, node).await?;
        }
        self.open_now(node).await?;
        self.closed.remove(node);
        self.parked.remove(node);
        Ok(())
    }

    /// With nobody else writable it is the only one, and comes back closed after a restart; with others, none of them is.
    async fn open_now(&self, node: &str) -> Result<(), Failure> {
        let mut up = Vec::new();
        for peer in self.peers(node) {
            let state = facts::state(self.session(peer)?, LOOK_BOUND).await?;
            if state.is_up() {
                up.push((peer, state.sole));
            }
        }
        for (peer, _) in up.iter().filter(|(_, sole)| *sole) {
            self.session(peer)?.rows(sql::UP, &[&false], UP_BOUND).await?;
        }
        self.session(node)?.rows(sql::UP, &[&up.is_empty()], UP_BOUND).await?;
        Ok(())
    }

    // ---- the proof ----

    async fn prove(&mut self, first: &str) -> Result<(), Failure> {
        let mut written = Vec::new();
        let mut proof = Vec::new();
        let others = self.peers(first);
        for from in std::iter::once(self.context.node(first)?.name.as_str()).chain(others) {
            let state = facts::state(self.session(from)?, LOOK_BOUND).await?;
            let began = Instant::now();
            if !state.is_up() {
                for to in self.peers(from) {
                    self.caught_up(from, to).await?;
                    proof.push(Proof::of(from, to, "position", began));
                }
                continue;
            }
            let token = self.write(from, sql::SETUP_PROBE, &[&from]).await?;
            for to in self.peers(from) {
                self.wait_row(from, to, &token, true).await?;
                proof.push(Proof::of(from, to, "row", began));
            }
            written.push((from, token));
        }
        for (from, token) in &written {
            let session = self.session(from)?;
            session.write(sql::SETUP_UNPROBE, &[token, from], WRITE_BOUND).await?;
            for to in self.peers(from) {
                self.wait_row(from, to, token, false).await?;
            }
        }
        self.proof = proof;
        Ok(())
    }

    /// A writing query that returns a text.
    async fn write(&self, node: &str, query: &str, params: Params<'_>) -> Result<String, Failure> {
        let row = self.session(node)?.row(query, params, WRITE_BOUND).await?;
        Ok(row.get(0))
    }

    async fn wait_row(&self, from: &str, to: &str, token: &String, wanted: bool) -> Result<(), Failure> {
        let session = self.session(to)?;
        let came = wait(self.context, self.options.patience, async || {
            let seen: bool = session.row(sql::SETUP_SEEN, &[token], LOOK_BOUND).await?.get("seen");
            Ok((seen == wanted).then_some(()))
        });
        match came.await {
            Ok(()) => Ok(()),
            Err(halt) => {
                let what = if wanted { "brings no row" } else { "does not bring that a row was deleted" };
                Err(self.halted(halt, to, from, what).await)
            }
        }
    }

    // ---- how it ends ----

    /// The nodes that the agent does not get into as itself, with why: set-up may have come another way.
    async fn shut_out(&self) -> BTreeMap<&str, String> {
        let tries = self.nodes().iter().map(|node| self.context.visit(node, LOOK_BOUND, async |_| Ok(())));
        let tried = self.nodes().iter().zip(join_all(tries).await);
        tried
            .filter_map(|(node, result)| {
                let error = result.err()?;
                let hint = error.hint.as_deref().map(|hint| format!("; {hint}")).unwrap_or_default();
                let line = format!("the agent itself does not get into {error}{hint}; see `stillebot-agent check`");
                Some((node.name.as_str(), line))
            })
            .collect()
    }

    /// What a run that did not come to its end has left.
    fn stands(&self, failure: Failure, plan: &Plan) -> Failure {
        let steps: Vec<_> = plan.steps.iter().map(|step| (step.node.as_str(), step.action.text())).collect();
        let closed: Vec<&str> = self.closed.union(&self.parked).map(String::as_str).collect();
        let left =
            (!closed.is_empty()).then(|| format!("{} stays down until init has come to its end", closed.join(", ")));
        let mut failure = admin::cut_off(failure, "init", &steps, self.taken, left);
        failure.report.insert("plan".into(), json!(plan));
        failure.report.insert("closed".into(), json!(closed));
        failure
    }
}

fn refused(refusal: Refusal) -> Failure {
    let mut failure =
        Failure::new(Kind::Undone, format!("{}; nothing was changed", refusal.message)).hint(refusal.hint);
    failure.detail = refusal.detail;
    failure
}

/// The tables that have rows.
async fn filled(session: &Session, survey: &Survey) -> Result<Vec<String>, NodeError> {
    let asked: Vec<String> = setup::replicated(survey)
        .map(|table| {
            format!("select {}::text as relation where exists (select from only {})", literal(&table.name), table.name)
        })
        .collect();
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    let rows = session.rows(&asked.join(" union all "), &[], LOOK_BOUND).await?;
    Ok(rows.iter().map(|row| row.get("relation")).collect())
}

/// From here on, what a value looks like as text does not depend on the server.
async fn read_alike(session: &Session) -> Result<(), NodeError> {
    let alike = "set timezone = 'UTC'; set datestyle = 'ISO'; set intervalstyle = 'postgres'; set extra_float_digits = 1; \
                 set bytea_output = 'hex'; set xmloption = 'content'";
    session.run(alike, LOOK_BOUND).await
}

/// How many rows a table has, and a sum over them that does not depend on their order, nor on the order of the columns.
async fn content(session: &Session, table: &Table) -> Result<Content, NodeError> {
    let mut columns: Vec<&str> = table.columns.iter().map(|column| column.name.as_str()).collect();
    columns.sort_unstable();
    let query = format!(
        "select count(*) as rows, coalesce(sum(hashtextextended(row({})::text, 0)::numeric), 0)::text as checksum from only {}",
        columns.join(", "),
        table.name
    );
    let row = session.row(&query, &[], COMPARE_BOUND).await?;
    Ok(Content { rows: row.get("rows"), checksum: row.get("checksum") })
}
