//! `sequences check` and `sequences stride`: keys that no two nodes hand out.
//!
//! Which node gets which values is decided in `crate::sequences`. Here all nodes are taken down for it, whatever happens are
//! brought back to the state they were in, and what a run that was cut off has left down is known by the reason it gave.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::types::PgLsn;

use super::{Context, IN_THE_WAY, Reply, UP_BOUND, open, pause, unreachable};
use crate::cli::{PauseAt, Sequences};
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts::{self, Facts, State};
use crate::failure::{Failure, Kind};
use crate::node::{NodeError, Trouble};
use crate::sequences::{self, Change, Everywhere, Sequence, Stride};
use crate::sql;
use crate::stop::Limits;

/// Where `stride` can be stopped by tests.
pub const STEPS: [&str; 4] = ["close", "drain", "stride", "reopen"];
/// The greatest key of a table that no index has first is looked for row by row.
const KEYS_BOUND: Duration = Duration::from_secs(60);
/// How long everything may take while nodes are down, but for transactions that do not end.
const DRAIN_BOUND: Duration = Duration::from_secs(60);
/// Longer than the servers themselves wait for locks.
const STRIDE_BOUND: Duration = Duration::from_secs(30);
/// What a node is down for meanwhile. A later run knows by it what to bring it back to.
const WAS_UP: &str = "sequences get strides; it was up before";
const WAS_SOLE: &str = "sequences get strides; it was the only writable node before";

/// For how many nodes there is room, unless said otherwise.
pub const PLACES: i64 = 16;

/// How strides are to be given.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// For how many nodes there is room.
    pub places: i64,
    /// How long transactions under way may take to end, on each node.
    pub timeout: Duration,
    /// Only say what would be done.
    pub dry_run: bool,
    /// For tests.
    pub pause_at: Option<&'a PauseAt>,
}

impl Default for Wish<'_> {
    fn default() -> Self {
        Self { places: PLACES, timeout: Duration::from_secs(30), dry_run: false, pause_at: None }
    }
}

/// Runs either.
pub async fn run(context: &Context, verb: &Sequences) -> Result<Reply, Failure> {
    match verb {
        Sequences::Check => check(context).await,
        Sequences::Stride { places, timeout, dry_run, pause_at } => {
            let (crew, errors) = Crew::muster(&context.config, &context.connector, &context.nodes()).await;
            if let Some(failure) = unreachable(&errors) {
                return Err(failure);
            }
            let pause_at = pause_at.as_ref();
            stride(context, crew, &Wish { places: *places, timeout: *timeout, dry_run: *dry_run, pause_at }).await
        }
    }
}

/// What the nodes say of the sequences that give keys, in the order of the configuration.
async fn look(context: &Context, crew: &Crew<'_>) -> Result<Vec<(String, Vec<Sequence>)>, NodeError> {
    let mut all = Vec::new();
    for node in &context.config.nodes {
        let session = crew.session(&node.name)?;
        let mut found = Vec::new();
        for row in session.rows(sql::SEQUENCES, &[], KEYS_BOUND).await? {
            let text: String = row.get("sequence");
            let sequence = serde_json::from_str(&text).map_err(|error| {
                session.error(Trouble::Refused, format!("what it says of its sequences is not understood: {error}"))
            })?;
            found.push(sequence);
        }
        all.push((node.name.clone(), found));
    }
    Ok(all)
}

async fn gather(context: &Context, crew: &Crew<'_>) -> Result<BTreeMap<String, Facts>, Failure> {
    let mut all = BTreeMap::new();
    for node in crew.names() {
        let facts = facts::gather(crew.session(&node)?, &context.config, LOOK_BOUND).await?;
        if let Some(flaw) = facts.extension.flaw() {
            return Err(Failure::new(Kind::Undone, format!("{node}: {flaw}")));
        }
        all.insert(node, facts);
    }
    Ok(all)
}

fn fed(sequence: &Sequence) -> String {
    let columns: Vec<String> = sequence.columns.iter().map(|c| format!("{}.{}", c.table, c.column)).collect();
    columns.join(", ")
}

// ---- check ----

async fn check(context: &Context) -> Result<Reply, Failure> {
    let (crew, errors) = Crew::muster(&context.config, &context.connector, &context.nodes()).await;
    if let Some(failure) = unreachable(&errors) {
        return Err(failure);
    }
    let facts = gather(context, &crew).await?;
    let nodes = look(context, &crew).await?;
    let (mut text, mut told, mut bad) = (String::new(), Vec::new(), false);
    for (name, everywhere) in sequences::by_name(&nodes) {
        let (lines, errors, warnings) = judge(&everywhere, &facts);
        bad |= !errors.is_empty();
        let verdict = if !errors.is_empty() {
            "error"
        } else if !warnings.is_empty() {
            "warning"
        } else {
            "ok"
        };
        let columns = everywhere.first().map(|(_, sequence)| fed(sequence)).unwrap_or_default();
        let _ = writeln!(text, "{verdict:<7}  {name} for {columns}");
        for line in errors.iter().chain(&warnings).chain(&lines) {
            let _ = writeln!(text, "           {line}");
        }
        let collisions = sequences::collisions(&everywhere);
        let seen: Vec<Value> = everywhere
            .iter()
            .map(|(node, s)| {
                json!({"node": node, "increment": s.increment, "next": i64::try_from(s.next).ok(), "residue": i64::try_from(s.residue()).ok(),
                "left": s.left().and_then(|left| i64::try_from(left).ok()), "scarce": s.is_scarce(), "highest": s.highest(), "cache": s.cache})
            })
            .collect();
        told.push(
            json!({"name": name, "columns": columns, "verdict": verdict, "collide": collisions, "errors": errors,
            "warnings": warnings, "nodes": seen}),
        );
    }
    if told.is_empty() {
        text = "no key comes from a sequence".to_owned();
    } else if told.iter().any(|one| one["collide"].as_array().is_some_and(|pairs| !pairs.is_empty())) {
        let _ = writeln!(text, "give each node keys of its own: stillebot-agent sequences stride");
    }
    let outcome = if bad { "failed" } else { "done" };
    let json = json!({"command": "sequences check", "outcome": outcome, "sequences": told});
    Ok(Reply { text, json, kind: bad.then_some(Kind::Undone) })
}

/// A line for each node; what is wrong; what soon will be.
fn judge(everywhere: &Everywhere<'_>, facts: &BTreeMap<String, Facts>) -> (Vec<String>, Vec<String>, Vec<String>) {
    let (mut lines, mut errors, mut warnings) = (Vec::new(), Vec::new(), Vec::new());
    for (node, peer) in sequences::collisions(everywhere) {
        errors.push(format!("{node} and {peer} can hand out the same key"));
    }
    for (node, s) in everywhere {
        let left = s.left().map_or_else(|| "without end".to_owned(), |left| format!("{left} keys left"));
        lines.push(format!("{node}: increment {}, residue {}, next {}, {left}", s.increment, s.residue(), s.next));
        match s.left() {
            Some(0) => errors.push(format!("{node} is exhausted: the greatest possible key is {}", s.limit())),
            Some(left) if s.is_scarce() => warnings.push(format!("{node} has {left} keys left, up to {}", s.limit())),
            _ => {}
        }
        let writable = facts.get(*node).and_then(|f| f.state.as_ref()).is_some_and(State::is_up);
        if writable && s.is_behind() {
            warnings.push(format!(
                "{node} is behind its rows: next is {}, and {} is in use already",
                s.next,
                s.highest().unwrap_or_default()
            ));
        }
    }
    (lines, errors, warnings)
}

// ---- stride ----

/// What a node is brought back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Up { sole: bool },
    Down,
}

/// What each node was before this run, or before the one that was cut off. A node that somebody has opened as the only
/// writable one since then stays that.
fn before(states: &[(String, State)]) -> BTreeMap<String, Before> {
    let up = |name: &str| states.iter().any(|(node, state)| node != name && state.is_up());
    let sole = states.iter().any(|(_, state)| state.is_up() && state.sole);
    states
        .iter()
        .map(|(node, state)| {
            let before = match state.reason.as_deref() {
                _ if state.is_up() => Before::Up { sole: state.sole },
                Some(WAS_UP) if !sole => Before::Up { sole: false },
                Some(WAS_SOLE) if !up(node) => Before::Up { sole: true },
                _ => Before::Down,
            };
            (node.clone(), before)
        })
        .collect()
}

/// What is to be done, by node, and what is said of the sequences that stay as they are.
struct Plan {
    changes: BTreeMap<String, Vec<Change>>,
    left_alone: Vec<String>,
}

fn plan(nodes: &[(String, Vec<Sequence>)], places: i64) -> Result<Plan, Failure> {
    let mut plan = Plan { changes: BTreeMap::new(), left_alone: Vec::new() };
    let mut refused = Vec::new();
    for (name, everywhere) in sequences::by_name(nodes) {
        match sequences::stride(&everywhere, places) {
            Stride::Nothing => {}
            Stride::LeftAlone(why) => plan.left_alone.push(format!("{name} is left as it is: {why}")),
            Stride::Refused(why) => refused.push(format!("{name}: {why}")),
            Stride::Give(changes) => {
                for (node, change) in changes {
                    plan.changes.entry(node).or_default().push(change);
                }
            }
        }
    }
    if refused.is_empty() {
        return Ok(plan);
    }
    Err(Failure::new(Kind::Undone, "not every sequence can be given a stride; none was changed")
        .detail(refused.join("\n"))
        .hint("make the column bigint, or ask for fewer --places"))
}

fn describe(plan: &Plan, places: i64) -> String {
    let mut text = String::new();
    for (node, changes) in &plan.changes {
        for change in changes {
            let (name, next) = (&change.name, change.next);
            let _ = writeln!(text, "{node}: {name} goes on with {next}, increment {places}");
        }
    }
    for line in &plan.left_alone {
        let _ = writeln!(text, "{line}");
    }
    text
}

/// Gives each node keys of its own, through sessions on all of them.
pub async fn stride(context: &Context, crew: Crew<'_>, wish: &Wish<'_>) -> Result<Reply, Failure> {
    let Wish { places, timeout, dry_run, pause_at } = *wish;
    if !dry_run {
        crew.lock().await?;
    }
    let facts = gather(context, &crew).await?;
    let states: Vec<(String, State)> =
        facts.iter().filter_map(|(node, facts)| Some((node.clone(), facts.state.clone()?))).collect();
    if let Some((node, _)) = states.iter().find(|(_, state)| state.hop.is_some()) {
        return Err(Failure::new(Kind::Undone, format!("{node} was closed by an unfinished hop; nothing was changed"))
            .hint("finish it with `hop --resume` or undo it with `hop --abort` first"));
    }
    let before = before(&states);
    let unfinished = states.iter().any(|(node, state)| !state.is_up() && before.get(node) != Some(&Before::Down));
    let wanted = plan(&look(context, &crew).await?, places)?;
    if wanted.changes.is_empty() && !unfinished {
        let text = format!("{}nothing to do: no two nodes hand out the same key", describe(&wanted, places));
        return Ok(Reply::done(
            text,
            json!({"command": "sequences stride", "outcome": "nothing_to_do",
            "left_alone": wanted.left_alone}),
        ));
    }
    if dry_run {
        let text =
            format!("would take all nodes down, and bring them back as they were\n{}", describe(&wanted, places));
        return Ok(Reply::done(
            text,
            json!({"command": "sequences stride", "outcome": "dry_run", "places": places,
            "changes": wanted.changes, "left_alone": wanted.left_alone}),
        ));
    }
    let troubles: Vec<String> =
        facts::directions(&context.config, &facts).into_iter().filter_map(|direction| direction.trouble).collect();
    if !troubles.is_empty() {
        return Err(Failure::new(Kind::Undone, "replication does not flow everywhere; nothing was changed")
            .detail(troubles.join("\n"))
            .hint("mend that first: what is still on its way may have greater keys"));
    }

    let mut work = Work { context, crew, before, pause_at };
    let result = work.while_down(&states, places, timeout).await;
    pause(pause_at, "reopen", false);
    let reopened = work.reopen().await;
    pause(pause_at, "reopen", true);
    match (result, reopened) {
        (Ok(plan), Ok(())) => Ok(Reply::done(
            format!("{}all nodes are as they were before", describe(&plan, places)),
            json!({"command": "sequences stride", "outcome": "done", "places": places, "changes": plan.changes,
                "left_alone": plan.left_alone}),
        )),
        (Err(mut failure), Ok(())) => {
            failure.message = format!("{}; all nodes are as they were before", failure.message);
            failure.hint.get_or_insert_with(|| "run it again: it finishes what was begun".into());
            Err(failure)
        }
        (result, Err(flaws)) => {
            let done = result.err().map_or_else(|| "the strides are given".to_owned(), |failure| failure.message);
            Err(Failure::new(Kind::NeedsPerson, format!("{done}; not every node could be brought back to its state"))
                .detail(flaws.join("\n"))
                .hint("when they can be reached: `sequences stride` again brings them back, `up NODE` one of them"))
        }
    }
}

struct Work<'a> {
    context: &'a Context,
    crew: Crew<'a>,
    before: BTreeMap<String, Before>,
    pause_at: Option<&'a PauseAt>,
}

impl Work<'_> {
    async fn while_down(
        &mut self,
        states: &[(String, State)],
        places: i64,
        timeout: Duration,
    ) -> Result<Plan, Failure> {
        let limits = Limits::new(timeout * states.len() as u32 + DRAIN_BOUND, &self.context.signals);
        let stopped = |halt| Failure::new(Kind::Undone, format!("{halt}"));
        pause(self.pause_at, "close", false);
        for (node, state) in states.iter().filter(|(_, state)| state.is_up()) {
            limits.check().map_err(stopped)?;
            let reason = if state.sole { WAS_SOLE } else { WAS_UP };
            let bound = timeout + Duration::from_secs(10);
            self.crew
                .ask(node, sql::DOWN, &[&Some(reason), &timeout.as_secs_f64(), &false, &None::<String>], bound)
                .await
                .map_err(|error| {
                    let in_the_way = error.detail.is_some();
                    let mut failure = Failure::from(error);
                    if in_the_way {
                        failure.hint = Some(IN_THE_WAY.replace("--terminate", "`down NODE --terminate`"));
                    }
                    failure
                })?;
        }
        pause(self.pause_at, "close", true);
        pause(self.pause_at, "drain", false);
        limits.run(self.drain()).await.map_err(|halt| {
            Failure::new(Kind::Undone, format!("{halt} before every node had what the others had written"))
        })??;
        pause(self.pause_at, "drain", true);
        // What was looked at before was not final.
        let nodes = limits.run(look(self.context, &self.crew)).await.map_err(stopped)??;
        let plan = plan(&nodes, places)?;
        pause(self.pause_at, "stride", false);
        for (node, changes) in &plan.changes {
            limits.check().map_err(stopped)?;
            let changes = serde_json::to_string(changes)
                .map_err(|error| Failure::new(Kind::Undone, format!("cannot be put into JSON: {error}")))?;
            self.crew.ask(node, sql::STRIDE, &[&changes], STRIDE_BOUND).await?;
        }
        pause(self.pause_at, "stride", true);
        Ok(plan)
    }

    /// Waits until every node has applied what every other has written, while none of them can write.
    async fn drain(&self) -> Result<(), NodeError> {
        for from in &self.context.config.nodes {
            let position: PgLsn = self.crew.session(&from.name)?.row(sql::POSITION, &[], LOOK_BOUND).await?.get("lsn");
            let subscription = self.context.config.subscription_to(&from.name);
            for to in self.context.config.nodes.iter().filter(|to| to.name != from.name) {
                while !self.crew.has_applied(&to.name, &subscription, position).await? {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
        Ok(())
    }

    /// Brings every node back to what it was.
    async fn reopen(&mut self) -> Result<(), Vec<String>> {
        let mut flaws = Vec::new();
        for (node, before) in &self.before {
            let Before::Up { sole } = *before else { continue };
            let result = async {
                if self.crew.learn(node, UP_BOUND).await?.is_up() {
                    return Ok(());
                }
                open(&mut self.crew, node, sole).await
            };
            if let Err(error) = result.await
                && !self.crew.learn(node, UP_BOUND).await.is_ok_and(|state| state.is_up())
            {
                flaws.push(error.to_string());
            }
        }
        if flaws.is_empty() { Ok(()) } else { Err(flaws) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(word: &str, sole: bool, reason: Option<&str>) -> State {
        State {
            state: word.into(),
            since: None,
            since_us: None,
            by: None,
            reason: reason.map(str::to_owned),
            sole,
            rejoin: false,
            hop: None,
            window: None,
            writers: None,
        }
    }

    fn states(a: State, b: State) -> Vec<Before> {
        before(&[("a".into(), a), ("b".into(), b)]).into_values().collect()
    }

    #[test]
    fn a_node_goes_back_to_what_it_was_unless_another_was_opened_instead() {
        let up = |sole| Before::Up { sole };
        let open = |sole| state("up", sole, None);
        let closed = |reason| state("down", false, Some(reason));
        assert_eq!(states(open(true), closed("holiday")), [up(true), Before::Down]);
        assert_eq!(states(closed(WAS_UP), open(false)), [up(false), up(false)]);
        assert_eq!(states(closed(WAS_UP), closed(WAS_UP)), [up(false), up(false)]);
        assert_eq!(states(closed(WAS_SOLE), closed("holiday")), [up(true), Before::Down]);
        assert_eq!(states(closed(WAS_UP), open(true)), [Before::Down, up(true)]);
        assert_eq!(states(closed(WAS_SOLE), open(false)), [Before::Down, up(false)]);
        assert_eq!(states(closed(WAS_SOLE), open(true)), [Before::Down, up(true)]);
    }
}
