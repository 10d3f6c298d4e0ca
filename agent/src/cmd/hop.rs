//! `hop NODE`: moves the writable side to a node, losing nothing.
//!
//! Walks the table of steps in `crate::hop` and does what is decided there. Deliberately takes no decision about safety of
//! its own: between what happened and what is done next always stands [`crate::hop::Hop`]. Between close and open nothing is
//! done but drain, and what these three need (connections, prepared statements) is ready before.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use serde::Serialize;
use serde_json::{Value, json};
use tokio_postgres::types::PgLsn;

use super::{Context, IN_THE_WAY, Reply, UP_BOUND, WRITE_BOUND, open, pause, print, whoami, write_active};
use crate::change;
use crate::cli::Hop as Options;
use crate::clock::Clock;
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts::{self, Facts, State};
use crate::failure::{Failure, Kind};
use crate::hop::{Abort, Decision, Effect, Hop, Mode, Note, Plan, Request, Seen, Stage};
use crate::node::{NodeError, Params, Trouble};
use crate::sql;
use crate::stop::Limits;

/// How long undoing may take on each node, after the deadline.
const UNDO_BOUND: Duration = Duration::from_secs(10);
/// How long moving the target's sequences may take: longer than the server itself waits for a lock there.
const SEQUENCES_BOUND: Duration = Duration::from_secs(8);
/// What a node says that was closed: its last position, and what its sequences hand out next.
type Closed = Result<(PgLsn, String), NodeError>;

/// What was done in one step.
#[derive(Debug, Clone, Serialize)]
struct Done {
    step: &'static str,
    ms: f64,
    what: String,
}

/// A hop under way: everything its steps share.
struct Run<'a> {
    context: &'a Context,
    options: &'a Options,
    limits: Limits,
    crew: Crew<'a>,
    done: Vec<Done>,
    /// Lines not yet printed: a slow terminal must not lengthen the write gap.
    held: Vec<String>,
    holding: bool,
    clocks: BTreeMap<String, Clock>,
    /// Slot of the target's subscription on each source.
    slots: BTreeMap<String, String>,
    /// What the sequences of each closed node hand out next, as JSON.
    sequences: BTreeMap<String, String>,
    /// Whose transactions kept a node from closing.
    in_the_way: Vec<String>,
    /// When each node was closed or opened, by its own clock, in microseconds.
    edges: BTreeMap<String, Option<i64>>,
    began: Instant,
}

/// Runs it.
pub async fn run(context: &Context, options: &Options) -> Result<Reply, Failure> {
    if let Some(name) = &options.node {
        context.node(name)?;
    }
    if context.config.nodes.len() < 2 {
        return Err(Failure::new(Kind::Usage, "a hop needs at least two nodes, and the configuration has one"));
    }
    pause(options.pause_at.as_ref(), "lock", false);
    let began = Instant::now();
    let limits = Limits::new(options.deadline, &context.signals);
    let (crew, errors) = limits
        .run(Crew::muster(&context.config, &context.connector, &context.nodes()))
        .await
        .map_err(|halt| Failure::new(Kind::Undone, format!("{halt} while connecting; nothing was changed")))?;
    let mut run = Run {
        context,
        options,
        limits,
        crew,
        done: Vec::new(),
        held: Vec::new(),
        holding: false,
        clocks: BTreeMap::new(),
        slots: BTreeMap::new(),
        sequences: BTreeMap::new(),
        in_the_way: Vec::new(),
        edges: BTreeMap::new(),
        began,
    };
    if !options.dry_run {
        let locking = run.limits.run(run.crew.lock()).await;
        locking.map_err(|halt| Failure::new(Kind::Undone, format!("{halt} while locking; nothing was changed")))??;
    }
    run.note("lock", format!("connected to {}", run.crew.names().join(", ")));
    for error in errors.values() {
        run.note("lock", format!("cannot reach {error}"));
    }
    pause(options.pause_at.as_ref(), "lock", true);

    pause(options.pause_at.as_ref(), "preflight", false);
    run.began = Instant::now();
    let decided = run.preflight(&errors).await;
    let decision = match decided {
        Ok(decision) => decision,
        Err(failure) => return Err(run.with_steps(failure)),
    };
    pause(options.pause_at.as_ref(), "preflight", true);
    match decision {
        Decision::Refuse(refusal) => {
            let kind = if refusal.unreachable { Kind::Unreachable } else { Kind::Undone };
            let mut failure = Failure::new(kind, format!("{}; nothing was changed", refusal.why)).hint(refusal.hint);
            let errors: Vec<String> = errors.values().map(ToString::to_string).collect();
            failure.detail = (!errors.is_empty()).then(|| errors.join("\n"));
            Err(run.with_steps(failure))
        }
        Decision::Nothing(target, why) => run.nothing(target, why).await,
        Decision::Abort(abort) => run.abort(abort).await,
        Decision::Run(plan) if options.dry_run => Ok(run.describe(&plan)),
        Decision::Run(plan) => run.hop(plan).await,
    }
}

impl Run<'_> {
    // ---- reporting ----

    fn note(&mut self, step: &'static str, what: impl Into<String>) {
        let what = what.into();
        let ms = self.began.elapsed().as_secs_f64() * 1000.0;
        self.began = Instant::now();
        tracing::info!(step, what, "step");
        if !self.context.json {
            self.held.push(format!("{step:<10} {what} ({ms:.1} ms)"));
            if !self.holding {
                self.release();
            }
        }
        self.done.push(Done { step, ms, what });
    }

    fn release(&mut self) {
        self.holding = false;
        for line in self.held.drain(..) {
            print(&line);
        }
    }

    fn with_steps(&mut self, mut failure: Failure) -> Failure {
        self.release();
        failure.report.insert("steps".into(), json!(self.done));
        failure
    }

    // ---- before anything changes ----

    async fn preflight(&mut self, errors: &BTreeMap<String, NodeError>) -> Result<Decision, Failure> {
        let config = &self.context.config;
        let mode = match (self.options.resume, self.options.abort) {
            (true, _) => Mode::Resume,
            (_, true) => Mode::Abort,
            _ => Mode::Run,
        };
        let request = Request {
            target: self.options.node.clone(),
            mode,
            both: self.options.both,
            id: new_id()?,
            now: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            by: whoami(),
        };
        // Replication that has just been interrupted (a server restarted, a link came back) gets a moment to come back.
        let patience = tokio::time::Instant::now() + self.limits.total() / 2;
        let mut waiting = false;
        loop {
            let facts = self.gather().await?;
            let mut seen = Vec::new();
            for node in &config.nodes {
                let Some(facts) = facts.get(&node.name) else {
                    seen.push((node.name.clone(), Seen::Unknown));
                    continue;
                };
                let Some(state) = &facts.state else {
                    let flaw = facts.extension.flaw().unwrap_or_default();
                    return Err(Failure::new(Kind::Undone, format!("{}: {flaw}", node.name)));
                };
                if state.reason.as_deref().and_then(change::Closed::parse).is_some() {
                    let message = format!("{} is closed for an unfinished change of the schema", node.name);
                    return Err(Failure::new(Kind::Undone, format!("{message}; nothing was changed"))
                        .hint("run that `schema` command again: it finishes or begins anew, and opens what was up"));
                }
                let state = state.seen().map_err(|flaw| {
                    Failure::new(Kind::Undone, format!("{}: {flaw}", node.name))
                        .hint("if it is of no use any more, remove it there: select multihome.set_hop(null)")
                })?;
                seen.push((node.name.clone(), state));
            }
            if let Some(left) = change::half_done(&facts::changed(&facts)) {
                return Err(Failure::new(Kind::Undone, format!("{left}; nothing was changed"))
                    .hint("a hop between nodes of different schemas stops replication"));
            }
            let decision = crate::hop::decide(&request, &seen);
            let (target, permanent, transient) = match &decision {
                Decision::Run(plan) => {
                    let permanent = facts::node_obstacles(config, &facts);
                    // With the target open already, replication matters only if a second node is going to be opened.
                    let transient: Vec<String> = if plan.opened_earlier && !plan.both {
                        Vec::new()
                    } else {
                        facts::directions(config, &facts)
                            .into_iter()
                            .filter(|d| d.from == plan.target || d.to == plan.target)
                            .filter_map(|d| d.trouble)
                            .collect()
                    };
                    (plan.target.clone(), permanent, transient)
                }
                _ => {
                    debug_assert!(errors.len() + facts.len() == config.nodes.len());
                    return Ok(decision);
                }
            };
            if permanent.is_empty() && transient.is_empty() {
                self.get_ready(&target, &facts).await?;
                let states: Vec<String> = seen.iter().map(|(node, seen)| format!("{node} {}", word(seen))).collect();
                self.note("preflight", states.join(", "));
                return Ok(decision);
            }
            let over = self.options.dry_run || tokio::time::Instant::now() >= patience;
            if !permanent.is_empty() || over {
                let all: Vec<String> = permanent.into_iter().chain(transient).collect();
                return Err(Failure::new(Kind::Undone, format!("not ready to hop to {target}; nothing was changed"))
                    .detail(all.join("\n"))
                    .hint("see `status`; mend that first"));
            }
            if !waiting {
                waiting = true;
                self.note("preflight", format!("waiting: {}", transient.join("; ")));
            }
            self.limits.run(tokio::time::sleep(Duration::from_millis(100))).await.map_err(|halt| {
                Failure::new(Kind::Undone, format!("{halt} while waiting for replication; nothing was changed"))
                    .detail(transient.join("\n"))
            })?;
        }
    }

    async fn gather(&self) -> Result<BTreeMap<String, Facts>, Failure> {
        let names = self.crew.names();
        let work = join_all(
            names
                .iter()
                .map(async |name| facts::gather(self.crew.session(name)?, &self.context.config, LOOK_BOUND).await),
        );
        let results = self.limits.run(work).await.map_err(|halt| {
            Failure::new(Kind::Undone, format!("{halt} while looking at the nodes; nothing was changed"))
        })?;
        let mut facts = BTreeMap::new();
        for (name, result) in names.into_iter().zip(results) {
            facts.insert(name, result?);
        }
        Ok(facts)
    }

    /// Prepares everything that is needed between close and open, and measures the clocks.
    async fn get_ready(&mut self, target: &str, facts: &BTreeMap<String, Facts>) -> Result<(), Failure> {
        let config = &self.context.config;
        for name in facts.keys().filter(|name| *name != target) {
            let subscription = config.subscription_to(name);
            let slot = facts[target].subscriptions.iter().find(|s| s.name == subscription).and_then(|s| s.slot.clone());
            if let Some(slot) = slot {
                self.slots.insert(name.clone(), slot);
            }
            let session = self.crew.session(name)?;
            session.prepare(sql::HOP_CLOSE, LOOK_BOUND).await?;
            session.prepare(sql::DRAIN, LOOK_BOUND).await?;
        }
        let session = self.crew.session(target)?;
        session.prepare(sql::UP, LOOK_BOUND).await?;
        session.prepare(sql::ADVANCE_SEQUENCES, LOOK_BOUND).await?;
        session.prepare(sql::APPLIED, LOOK_BOUND).await?;
        for name in facts.keys() {
            let clock = Clock::measure(self.crew.session(name)?, LOOK_BOUND).await?;
            self.clocks.insert(name.clone(), clock);
        }
        Ok(())
    }

    fn describe(&mut self, plan: &Plan) -> Reply {
        let mut lines = Vec::new();
        let names = |up: bool| {
            plan.sources.iter().filter(|s| s.up == up).map(|s| s.node.as_str()).collect::<Vec<_>>().join(", ")
        };
        if plan.opened_earlier {
            lines.push(format!("{} was opened by an unfinished hop; would finish it", plan.target));
        } else {
            if !names(true).is_empty() {
                lines.push(format!("would take {} down", names(true)));
            }
            if !names(false).is_empty() {
                lines.push(format!("{} was taken down by an unfinished hop, which would be continued", names(false)));
            }
            lines.push(format!("would wait until {} has everything", plan.target));
            lines.push(if plan.target_up {
                format!("would mark {} as the only writable node (it is up)", plan.target)
            } else {
                format!("would open {} as the only writable node", plan.target)
            });
        }
        if self.context.config.active.is_some() {
            lines.push(format!("would write {} as the active side", plan.target));
        }
        if plan.both {
            let sources: Vec<&str> = plan.sources.iter().map(|s| s.node.as_str()).collect();
            lines.push(format!("would open {} again", sources.join(", ")));
        }
        let sources: Vec<&str> = plan.sources.iter().map(|s| s.node.as_str()).collect();
        let json = json!({"command": "hop", "outcome": "dry_run", "target": plan.target, "sources": sources,
            "both": plan.both, "would": lines});
        self.release();
        Reply::done(lines.join("\n"), json)
    }

    async fn nothing(&mut self, target: Option<String>, why: String) -> Result<Reply, Failure> {
        let mut text = format!("nothing to do: {why}");
        let mut activated = false;
        if let Some(target) = &target
            && self.context.config.active.is_some()
        {
            let node = self.context.node(target)?;
            let session = self.crew.session(target)?;
            let active = facts::active(session, &self.context.config, LOOK_BOUND).await?;
            if active.as_ref() != Some(&node.active_name) {
                if self.options.dry_run {
                    text.push_str(&format!("; would write {target} as the active side"));
                } else {
                    activated = write_active(&mut self.crew, &self.context.config, target, node).await?;
                    text.push_str(&format!("; wrote {} as the active side", node.active_name));
                }
            }
        }
        self.release();
        let json = json!({"command": "hop", "outcome": "nothing_to_do", "target": target, "message": text,
            "activated": activated, "write_gap_ms": Value::Null, "steps": self.done});
        Ok(Reply::done(text, json))
    }

    // ---- the hop ----

    async fn hop(mut self, plan: Plan) -> Result<Reply, Failure> {
        let mut hop = Hop::new(plan);
        let result = self.forward(&mut hop).await;
        let why = match result {
            Ok(reply) => return Ok(reply),
            Err(why) => why,
        };
        let mut failure = if hop.stage() == Stage::Undo {
            pause(self.options.pause_at.as_ref(), "undo", false);
            let failure = self.undo(&mut hop, &why).await;
            pause(self.options.pause_at.as_ref(), "undo", true);
            failure
        } else {
            self.for_a_person(&hop, &why)
        };
        if !self.in_the_way.is_empty() {
            let mut detail = self.in_the_way.join("\n");
            if let Some(more) = &failure.detail {
                detail = format!("{detail}\n{more}");
            }
            failure = failure.detail(detail);
            failure.hint.get_or_insert_with(|| IN_THE_WAY.into());
        }
        Err(self.with_steps(failure))
    }

    /// All steps from approach on. An error is the reason for stopping; the hop's stage says how it goes on then.
    async fn forward(&mut self, hop: &mut Hop) -> Result<Reply, String> {
        let plan = hop.plan().clone();
        let others: Vec<String> =
            plan.sources.iter().map(|s| s.node.clone()).chain(plan.quiet.iter().cloned()).collect();

        self.begin("approach");
        if !plan.opened_earlier {
            if let Err(why) = self.approach(&plan.target, &others).await {
                hop.stop();
                return Err(why);
            }
            self.note("approach", format!("{} has everything written up to now", plan.target));
        }
        self.end("approach");

        self.begin("close");
        let mut positions = BTreeMap::new();
        if hop.stage() == Stage::Close {
            self.holding = true;
            match self.close(hop).await {
                Ok(found) => positions = found,
                Err(why) => {
                    hop.stop();
                    return Err(why);
                }
            }
            let closed: Vec<&str> = plan.sources.iter().map(|s| s.node.as_str()).collect();
            self.note("close", format!("{} down, no write under way", closed.join(", ")));
        }
        self.end("close");

        self.begin("drain");
        if hop.stage() == Stage::Drain {
            for (node, position) in &positions {
                if let Err(why) = self.drain(hop, node, *position).await {
                    hop.stop();
                    return Err(why);
                }
            }
            hop.drained();
            self.note("drain", format!("{} has every write", plan.target));
        }
        self.end("drain");

        self.begin("sequences");
        if hop.stage() == Stage::Open
            && let Err(why) = self.advance_sequences(&plan.target).await
        {
            hop.stop();
            return Err(why);
        }
        self.end("sequences");

        self.begin("open");
        if hop.stage() == Stage::Open {
            self.open(hop).await?;
            self.note("open", format!("{} is the only writable node", plan.target));
        }
        // From here on the write gap is over, and there is no way back.
        self.release();
        self.read_edges(&plan).await;
        self.end("open");

        self.finish(hop, &plan).await
    }

    fn begin(&mut self, step: &'static str) {
        pause(self.options.pause_at.as_ref(), step, false);
        self.began = Instant::now();
    }

    fn end(&mut self, step: &'static str) {
        pause(self.options.pause_at.as_ref(), step, true);
    }

    /// Waits until the target has what the others have written up to now, while they may go on writing.
    async fn approach(&mut self, target: &str, others: &[String]) -> Result<(), String> {
        for node in others {
            let session = self.crew.session(node).map_err(|error| error.to_string())?;
            let mut sequences = None;
            let work = async {
                let state = facts::state(session, LOOK_BOUND).await?;
                let position: PgLsn = if state.is_up() {
                    session.row(sql::POSITION, &[], LOOK_BOUND).await?.get("lsn")
                } else {
                    // Down already: returns at once, with a position past every write.
                    let row = session
                        .row(sql::HOP_CLOSE, &[&None::<String>, &1.0_f64, &false, &None::<String>], LOOK_BOUND)
                        .await?;
                    sequences = Some(row.get("sequences"));
                    row.get("lsn")
                };
                self.wait_applied(node, target, position, false).await
            };
            match self.limits.run(work).await {
                Ok(Ok(_)) => self.sequences.extend(sequences.map(|sequences| (node.clone(), sequences))),
                Ok(Err(error)) => return Err(error.to_string()),
                Err(halt) => {
                    return Err(format!("{halt} while the target was still catching up with {node}"));
                }
            }
        }
        Ok(())
    }

    /// Polls until the target has applied everything up to a position. False if the node is found to be open.
    async fn wait_applied(
        &self,
        node: &str,
        target: &str,
        position: PgLsn,
        must_be_down: bool,
    ) -> Result<bool, NodeError> {
        let slot = self.slots.get(node).map_or("", String::as_str);
        let subscription = self.context.config.subscription_to(node);
        let (source, target) = (self.crew.session(node)?, self.crew.session(target)?);
        let at_source: Params<'_> = &[&slot, &position];
        let at_target: Params<'_> = &[&subscription, &position];
        loop {
            let (here, there) = tokio::join!(
                source.row(sql::DRAIN, at_source, LOOK_BOUND),
                target.rows(sql::APPLIED, at_target, LOOK_BOUND),
            );
            let (here, there) = (here?, there?);
            if must_be_down && !here.get::<_, bool>("down") {
                return Ok(false);
            }
            let applied_there = there.first().and_then(|row| row.get("applied")).unwrap_or(false);
            if here.get("applied") || (here.get("sent") && applied_there) {
                return Ok(true);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Closes all sources at once; returns the position of each that the target must reach.
    async fn close(&mut self, hop: &mut Hop) -> Result<BTreeMap<String, PgLsn>, String> {
        self.limits.check().map_err(|halt| halt.to_string())?;
        let plan = hop.plan().clone();
        // A quarter of what is left is kept for drain and open.
        let patience = self.limits.remaining().mul_f64(0.75);
        let reason = format!("hop to {}", plan.target);
        let mut notes = Vec::new();
        for source in &plan.sources {
            notes.push(Some(serde_json::to_string(&source.note).map_err(|error| error.to_string())?));
        }
        hop.closing();
        let answers: RefCell<Vec<Option<Closed>>> = RefCell::new(vec![None; notes.len()]);
        let calls = plan.sources.iter().zip(&notes).enumerate().map(async |(index, (source, note))| {
            let answer = match self.crew.session(&source.node) {
                Ok(session) => session
                    .row(
                        sql::HOP_CLOSE,
                        &[&Some(reason.as_str()), &patience.as_secs_f64(), &self.options.terminate, note],
                        patience + Duration::from_secs(2),
                    )
                    .await
                    .map(|row| (row.get("lsn"), row.get("sequences"))),
                Err(error) => Err(error),
            };
            answers.borrow_mut()[index] = Some(answer);
        });
        let halted = self.limits.run(join_all(calls)).await.err();

        let mut positions = BTreeMap::new();
        let mut flaws = Vec::new();
        for (source, answer) in plan.sources.iter().zip(answers.into_inner()) {
            let effect = match answer {
                Some(Ok((position, sequences))) => {
                    positions.insert(source.node.clone(), position);
                    self.sequences.insert(source.node.clone(), sequences);
                    Effect::Done
                }
                Some(Err(error)) => {
                    flaws.push(error.to_string());
                    self.in_the_way.extend(error.detail.clone());
                    if error.trouble == Trouble::Refused { Effect::Not } else { Effect::Unsure }
                }
                None => Effect::Unsure,
            };
            // A source that was closed by an earlier run is so still, whatever became of this request.
            let effect = if source.up || effect == Effect::Done { effect } else { Effect::Unsure };
            if effect == Effect::Unsure {
                self.crew.give_up(&source.node);
            }
            hop.closed(&source.node, effect);
        }
        match halted {
            Some(halt) => Err(format!("{halt} while closing")),
            None if flaws.is_empty() => Ok(positions),
            None => Err(flaws.join("; ")),
        }
    }

    async fn drain(&mut self, hop: &mut Hop, node: &str, position: PgLsn) -> Result<(), String> {
        let target = hop.plan().target.clone();
        loop {
            let error = match self.limits.run(self.wait_applied(node, &target, position, true)).await {
                Ok(Ok(true)) => return Ok(()),
                Ok(Ok(false)) => {
                    hop.found_open(node);
                    return Err(format!("{node} was opened by somebody else meanwhile"));
                }
                Ok(Err(error)) => error,
                Err(halt) => return Err(format!("{halt} while the target was still applying what {node} had written")),
            };
            // It may come back: the source is closed and stays so, the target has not been asked for anything.
            tracing::warn!(%error, "while draining; trying again");
            self.crew.give_up(&error.node);
            let limits = self.limits.clone();
            match limits.run(self.crew.learn(&error.node, limits.remaining())).await {
                Ok(Ok(_)) => {}
                Ok(Err(_)) => return Err(format!("{error}, and it did not come back")),
                Err(halt) => return Err(format!("{error}; {halt} before it came back")),
            }
        }
    }

    /// Also with the target open already: what others have handed out, it must not.
    async fn advance_sequences(&mut self, target: &str) -> Result<(), String> {
        // Where there are none, no round trip while writes are refused.
        let positions: Vec<&str> =
            self.sequences.values().map(String::as_str).filter(|positions| *positions != "{}").collect();
        if positions.is_empty() {
            return Ok(());
        }
        let positions = format!("[{}]", positions.join(","));
        let session = self.crew.session(target).map_err(|error| error.to_string())?;
        let params: Params<'_> = &[&positions];
        let moved: Vec<String> =
            match self.limits.run(session.row(sql::ADVANCE_SEQUENCES, params, SEQUENCES_BOUND)).await {
                Ok(answer) => answer.map_err(|error| error.to_string())?.get("moved"),
                Err(halt) => return Err(format!("{halt} while moving the target's sequences")),
            };
        if !moved.is_empty() {
            self.note("sequences", format!("{} moved past what was handed out", moved.join(", ")));
        }
        Ok(())
    }

    async fn open(&mut self, hop: &mut Hop) -> Result<(), String> {
        if let Err(halt) = self.limits.check() {
            hop.stop();
            return Err(halt.to_string());
        }
        // A connection known to be lost carries nothing: then it is certain that the target was not asked to open. Yielding
        // lets a connection that has broken meanwhile say so.
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        if let Err(error) = self.crew.session(&hop.plan().target) {
            hop.stop();
            return Err(error.to_string());
        }
        if !hop.may_open() {
            hop.stop();
            return Err("not every other node is known to be down".into());
        }
        let target = hop.plan().target.clone();
        // From here on neither signal nor deadline: the outcome has to be known.
        match open(&mut self.crew, &target, true).await {
            Ok(()) => {
                hop.opened();
                Ok(())
            }
            Err(error) => {
                let bound = self.limits.remaining().max(Duration::from_secs(5));
                let state = self.crew.learn(&target, bound).await.ok();
                hop.learned(state.and_then(|state| state.seen().ok()).as_ref());
                if hop.stage() == Stage::Opened { Ok(()) } else { Err(format!("opening {target} failed: {error}")) }
            }
        }
    }

    /// Reads when each node was closed or opened. Only for the report: what fails here is left out there.
    async fn read_edges(&mut self, plan: &Plan) {
        for node in plan.sources.iter().map(|s| &s.node).chain([&plan.target]) {
            let edge = match self.crew.session(node) {
                Ok(session) => facts::state(session, LOOK_BOUND).await.ok().and_then(|state| state.since_us),
                Err(_) => None,
            };
            self.edges.insert(node.clone(), edge);
        }
    }

    /// Everything after the point of no return.
    async fn finish(&mut self, hop: &mut Hop, plan: &Plan) -> Result<Reply, String> {
        let target = plan.target.as_str();
        let failed = |hop: &mut Hop, error: &NodeError| {
            hop.stop();
            error.to_string()
        };

        self.begin("activate");
        let mut activated = false;
        if self.context.config.active.is_some() {
            let Some(node) = self.context.config.node(target) else {
                return Err(format!("{target} is not configured"));
            };
            self.keep_open(hop).await?;
            activated = write_active(&mut self.crew, &self.context.config, target, node)
                .await
                .map_err(|error| failed(hop, &error))?;
            let already = if activated { "" } else { " already" };
            self.note("activate", format!("active side is {}{already}", node.active_name));
        }
        self.end("activate");

        self.begin("reopen");
        if plan.both {
            for node in std::iter::once(target).chain(plan.sources.iter().map(|s| s.node.as_str())) {
                self.connected(node).await.map_err(|error| failed(hop, &error))?;
                open(&mut self.crew, node, false).await.map_err(|error| failed(hop, &error))?;
            }
            self.note("reopen", "all of them are writable");
        }
        self.end("reopen");

        self.begin("conclude");
        if !plan.both {
            // The notes are what an unfinished hop is found by: they go only when its purpose is reached.
            self.keep_open(hop).await?;
            for source in &plan.sources {
                let state = self.connected(&source.node).await.map_err(|error| failed(hop, &error))?;
                if !state.is_up() && state.note().is_some_and(|note| note.id == plan.id) {
                    self.crew
                        .ask(&source.node, sql::SET_HOP, &[], WRITE_BOUND)
                        .await
                        .map_err(|error| failed(hop, &error))?;
                }
            }
            self.note("conclude", "note of the hop removed");
        }
        self.end("conclude");

        self.begin("report");
        let reply = self.report(plan, activated);
        self.end("report");
        Ok(reply)
    }

    /// Makes sure that the target is open still. As the only writable node it has closed itself if it has restarted.
    async fn keep_open(&mut self, hop: &mut Hop) -> Result<(), String> {
        let target = hop.plan().target.clone();
        let result = match self.connected(&target).await {
            Ok(state) if state.is_up() => return Ok(()),
            Ok(state) if state.rejoin && hop.may_open_again() => {
                let result = open(&mut self.crew, &target, true).await;
                if result.is_ok() {
                    self.note("open", format!("{target} had restarted, and is open again"));
                }
                result.map_err(|error| error.to_string())
            }
            Ok(_) => Err(format!("{target} was taken down meanwhile")),
            Err(error) => Err(error.to_string()),
        };
        if result.is_err() {
            hop.stop();
        }
        result
    }

    /// Makes sure that there is a session, after the point of no return.
    async fn connected(&mut self, node: &str) -> Result<State, NodeError> {
        self.crew.learn(node, self.limits.remaining().max(Duration::from_secs(3))).await
    }

    fn report(&mut self, plan: &Plan, activated: bool) -> Reply {
        let gap = self.write_gap(plan);
        let sources: Vec<&str> = plan.sources.iter().map(|s| s.node.as_str()).collect();
        let writable = if plan.both {
            format!("{} and {} are writable", sources.join(", "), plan.target)
        } else {
            format!("{} is the only writable node", plan.target)
        };
        let gap_text = match gap {
            _ if plan.target_up && !plan.opened_earlier => "no write gap: it was open all along".to_owned(),
            Some((gap, uncertainty)) => format!("write gap {gap:.1} ms (± {uncertainty:.2} ms)"),
            None => "write gap not known".to_owned(),
        };
        self.release();
        let json = json!({"command": "hop", "outcome": "done", "id": plan.id, "target": plan.target, "sources": sources,
            "both": plan.both, "resumed": plan.sources.iter().any(|s| !s.up), "activated": activated,
            "write_gap_ms": gap.map(|(gap, _)| gap), "write_gap_uncertainty_ms": gap.map(|(_, uncertainty)| uncertainty),
            "steps": self.done});
        Reply::done(format!("{writable}; {gap_text}"), json)
    }

    /// Milliseconds during which no node was writable, with the uncertainty of comparing the servers' clocks.
    fn write_gap(&self, plan: &Plan) -> Option<(f64, f64)> {
        if plan.target_up && !plan.opened_earlier {
            return Some((0.0, 0.0));
        }
        let instant = |node: &str| {
            let (edge, clock) = ((*self.edges.get(node)?)?, self.clocks.get(node)?);
            Some((edge as f64 - clock.offset, clock.uncertainty))
        };
        let (opened, mut uncertainty) = instant(&plan.target)?;
        let mut last = f64::NEG_INFINITY;
        let mut last_uncertainty = 0.0;
        for source in &plan.sources {
            let (closed, uncertainty) = instant(&source.node)?;
            if closed > last {
                (last, last_uncertainty) = (closed, uncertainty);
            }
        }
        uncertainty += last_uncertainty;
        last.is_finite().then(|| ((opened - last) / 1000.0, uncertainty / 1000.0))
    }

    // ---- when it does not go well ----

    async fn undo(&mut self, hop: &mut Hop, why: &str) -> Failure {
        let plan = hop.plan().clone();
        self.release();
        self.began = Instant::now();
        if hop.left_closed().is_empty() {
            let outcome =
                if self.in_the_way.is_empty() { "nothing was changed" } else { "all nodes are as they were before" };
            return Failure::new(Kind::Undone, format!("{why}; {outcome}"));
        }
        let target = self.crew.learn(&plan.target, Duration::from_secs(2)).await.ok();
        hop.rechecked(target.and_then(|state| state.seen().ok()).as_ref());
        let mut tried: Vec<String> = Vec::new();
        let mut flaws: Vec<String> = Vec::new();
        let mut reopened: Vec<String> = Vec::new();
        while let Some((node, sole)) = hop.next_undo(&tried).map(|(node, sole)| (node.to_owned(), sole)) {
            match self.restore(&plan, &node, sole).await {
                Ok(changed) => {
                    hop.restored(&node);
                    if changed {
                        reopened.push(node);
                    }
                }
                Err(flaw) => {
                    flaws.push(flaw);
                    tried.push(node);
                }
            }
        }
        let again: String = match reopened.as_slice() {
            [] if hop.left_closed().is_empty() => "nothing is changed".into(),
            [] => "not possible now".into(),
            nodes => format!("undone: {} writable as before", nodes.join(", ")),
        };
        self.note("undo", again.clone());
        if hop.left_closed().is_empty() {
            return Failure::new(Kind::Undone, format!("{why}; {again}"));
        }
        let mut failure = self.for_a_person(hop, why);
        if !flaws.is_empty() {
            failure.detail = Some(flaws.join("\n"));
        }
        failure
    }

    /// Opens one source again, if it is closed and closed by this hop. Whether anything had to be done.
    async fn restore(&mut self, plan: &Plan, node: &str, sole: bool) -> Result<bool, String> {
        let state = self.crew.learn(node, UNDO_BOUND).await.map_err(|error| error.to_string())?;
        if state.is_up() {
            return Ok(false);
        }
        // Closed by this hop; or, before it could be, by its own restart.
        let ours = state.note().map_or(state.rejoin, |note| note.id == plan.id);
        if !ours {
            return Err(format!("{node} was taken down by somebody else meanwhile, and stays down"));
        }
        if let Err(error) = open(&mut self.crew, node, sole).await {
            let state = self.crew.learn(node, UNDO_BOUND).await;
            if !state.is_ok_and(|state| state.is_up()) {
                return Err(error.to_string());
            }
        }
        Ok(true)
    }

    fn for_a_person(&self, hop: &Hop, why: &str) -> Failure {
        let target = &hop.plan().target;
        let closed = hop.left_closed().join(", ");
        let failure = |message: String| Failure::new(Kind::NeedsPerson, message);
        if hop.plan().opened_earlier || hop.target_is_open() {
            failure(format!("{target} was opened, but the hop is not finished: {why}"))
                .hint(format!("when that is mended, `hop {target} --resume` finishes it"))
        } else if hop.target_is_unsure() {
            failure(format!(
                "{why}; whether {target} is open now is not known, so {closed} stays down and there may be no writable node"
            ))
            .hint(format!(
                "when {target} can be reached: `hop {target} --resume` finishes the hop, `hop {target} --abort` undoes it"
            ))
        } else {
            failure(format!("{why}; {closed} could not be opened again, and is down or unreachable")).hint(format!(
                "when it can be reached: `hop {target} --resume` finishes the hop, `hop {target} --abort` undoes it"
            ))
        }
    }

    async fn abort(mut self, abort: Abort) -> Result<Reply, Failure> {
        let names: Vec<&str> = abort.reopen.iter().map(|(node, _)| node.as_str()).collect();
        let names = names.join(", ");
        if self.options.dry_run {
            let text = format!("would open {names} again, and leave {} as it is", abort.target);
            let json = json!({"command": "hop", "outcome": "dry_run", "target": abort.target, "would": [text]});
            return Ok(Reply::done(text, json));
        }
        pause(self.options.pause_at.as_ref(), "undo", false);
        let again = format!("`hop {} --abort` again", abort.target);
        if let Err(halt) = self.limits.check() {
            return Err(Failure::new(Kind::Undone, format!("{halt}; nothing was changed")).hint(again));
        }
        for (node, sole) in &abort.reopen {
            if let Err(error) = open(&mut self.crew, node, *sole).await
                && !self.crew.learn(node, UP_BOUND).await.is_ok_and(|state| state.is_up())
            {
                let failure = Failure::new(Kind::NeedsPerson, format!("{error}; {node} is not known to be open"));
                return Err(self.with_steps(failure.hint(format!("when it can be reached: {again}"))));
            }
            self.note("undo", format!("{node} is writable"));
        }
        if let Some(sole) = abort.target_sole
            && let Err(error) = open(&mut self.crew, &abort.target, sole).await
        {
            let message =
                format!("{names} is writable, but {} kept its mark of the only writable node: {error}", abort.target);
            return Err(
                self.with_steps(Failure::new(Kind::NeedsPerson, message).hint(format!("`up {}`", abort.target)))
            );
        }
        pause(self.options.pause_at.as_ref(), "undo", true);
        if !abort.left.is_empty() {
            let left = abort.left.join(", ");
            let message = format!(
                "{names} is writable again, but {left} could not be reached and may still be closed by the hop"
            );
            return Err(self.with_steps(
                Failure::new(Kind::NeedsPerson, message).hint(format!("when it can be reached: {again}")),
            ));
        }
        self.release();
        let json = json!({"command": "hop", "outcome": "undone", "target": abort.target,
            "reopened": abort.reopen.iter().map(|(node, _)| node).collect::<Vec<_>>(), "steps": self.done});
        Ok(Reply::done(format!("undone: {names} is writable as before the hop to {}", abort.target), json))
    }
}

fn word(seen: &Seen) -> String {
    match seen {
        Seen::Up { sole: true } => "up (only writable node)".into(),
        Seen::Up { sole: false } => "up".into(),
        Seen::Down { note: Some(note), .. } => {
            let Note { to, started, .. } = note.as_ref();
            format!("down for a hop to {to} begun {started}")
        }
        Seen::Down { rejoin: true, .. } => "down since its restart".into(),
        Seen::Down { .. } => "down".into(),
        Seen::Unknown => "unreachable".into(),
    }
}

fn new_id() -> Result<String, Failure> {
    let mut bytes = [0_u8; 8];
    openssl::rand::rand_bytes(&mut bytes)
        .map_err(|error| Failure::new(Kind::Undone, format!("no random numbers: {error}")))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
