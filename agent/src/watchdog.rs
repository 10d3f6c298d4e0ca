//! What is wrong with replication, judged from what the nodes tell at one look after the other.
//!
//! Pure: the shell in `cmd/watch.rs` asks the nodes ([`crate::sight`]), `alarm.rs` decides what of it is said and when.
//! A direction has at most one trouble at a time, the one that explains the others; WAL kept for a reader that is gone,
//! nodes that do not answer and warnings stand beside it. What cannot be seen is neither well nor wrong but unknown.
//!
//! Times are durations since the watch began, by the agent's own clock; no server's clock is compared with another.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use serde::Serialize;

use crate::condition::{CatchUp, Condition, End, Finding, Subject};
use crate::config::Config;
use crate::sight::{Conflict, Sight, Slot, Subscription};

/// A reader's backlog of fewer segments of WAL than this is what a server keeps anyway.
const SEGMENTS_KEPT_ANYWAY: u64 = 4;
/// One error may be the end of a connection; the second without progress between is the same change failing again.
const ERRORS_THAT_COUNT: i64 = 2;
/// Looks that are remembered of a direction; with more, every second one is forgotten.
const SAMPLES: usize = 512;

/// What the nodes tell: a node is missing that has not been asked yet, and an error if it could not be.
pub type Views = BTreeMap<String, Result<Sight, String>>;

/// How patient the watchdog is.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// No progress for so long while connected and behind: stalled. What is applied is older than that: slow.
    pub stall: Duration,
    /// How long what usually mends itself may take to do so: a worker that restarts, a lock, a node that restarts.
    pub mend: Duration,
    /// How often a worker may try to connect before it is disconnected: an error in apply ends the worker as well, and
    /// shows as one when the next worker fails.
    pub attempts: u32,
    /// How long a conflict may be open before it is one: a rule has to have its chance.
    pub resolve: Duration,
}

/// What one look says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Findings {
    /// Everything that is the matter.
    pub present: Vec<Finding>,
    /// What is neither known to be well nor to be wrong.
    pub unknown: BTreeSet<Subject>,
}

/// How a direction is, in figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gauge {
    /// Where it was written.
    pub from: String,
    /// Where it is applied.
    pub to: String,
    /// Both ends are at work; none if that cannot be seen.
    pub connected: Option<bool>,
    /// Bytes of WAL not yet applied.
    pub bytes_behind: Option<u64>,
}

/// The memory of one watch.
pub struct Watchdog {
    patience: Patience,
    nodes: Vec<String>,
    directions: Vec<Direction>,
    /// Since when a node could not be asked.
    silent: BTreeMap<String, Duration>,
    /// How much WAL each node has written when.
    written: BTreeMap<String, VecDeque<(Duration, u64)>>,
    /// Since when a node's schema is not that of the first.
    drifted: BTreeMap<String, Duration>,
    /// The slots, by node and name: where each was, and when it last moved.
    slots: BTreeMap<(String, String), (Place, Duration)>,
}

/// Where a slot is: what its reader has confirmed, and from where on it keeps WAL.
type Place = (Option<u64>, Option<u64>);

/// What is remembered of a direction.
struct Direction {
    from: String,
    to: String,
    subscription: String,
    /// The furthest positions seen.
    applied: u64,
    received: u64,
    heard_us: i64,
    /// When it last moved, or was not behind, or was not in a position to move.
    moved: Duration,
    /// When it last had nothing to catch up with, or was not in a position to.
    labours: Duration,
    /// Since when it is not connected, or nothing else explains that.
    apart: Option<Duration>,
    /// Since when only the source says so.
    unread: Option<Duration>,
    /// The counters of errors when last seen.
    counted: Option<(i64, i64)>,
    /// Errors since it last moved: in apply, in the initial copy.
    errors: (i64, i64),
    slow: bool,
    /// When, written, applied.
    samples: VecDeque<(Duration, u64, u64)>,
    gauge: Gauge,
}

/// What a look at one direction says.
enum Verdict {
    Well,
    Unknown,
    Wrong(Box<Condition>, Duration),
}

impl Verdict {
    fn wrong(condition: Condition, age: Duration) -> Self {
        Self::Wrong(Box::new(condition), age)
    }
}

impl Watchdog {
    /// Begins to watch all directions between the nodes of a configuration.
    pub fn new(config: &Config, patience: Patience) -> Self {
        let names = || config.nodes.iter().map(|node| node.name.clone());
        let pairs = names().flat_map(|from| names().map(move |to| (from.clone(), to)));
        let directions = pairs
            .filter(|(from, to)| from != to)
            .map(|(from, to)| Direction::new(config.subscription_to(&from), from, to))
            .collect();
        Self {
            patience,
            nodes: names().collect(),
            directions,
            silent: BTreeMap::new(),
            written: BTreeMap::new(),
            drifted: BTreeMap::new(),
            slots: BTreeMap::new(),
        }
    }

    /// The directions as they were at the last look.
    pub fn gauges(&self) -> impl Iterator<Item = &Gauge> {
        self.directions.iter().map(|direction| &direction.gauge)
    }

    /// Takes in what the nodes tell now, and says what is the matter.
    pub fn look(&mut self, now: Duration, views: &Views) -> Findings {
        let mut findings = Findings::default();
        for node in &self.nodes {
            let subject = Subject::Node { node: node.clone() };
            match views.get(node) {
                Some(Err(error)) => {
                    let since = *self.silent.entry(node.clone()).or_insert(now);
                    let age = now.saturating_sub(since);
                    if age >= self.patience.mend {
                        let condition = Condition::Unreachable { error: error.clone() };
                        findings.present.push(Finding { subject: subject.clone(), condition, age });
                    }
                    findings.unknown.insert(subject);
                }
                None => drop(findings.unknown.insert(subject)),
                Some(Ok(sight)) => {
                    self.silent.remove(node);
                    for warning in &sight.warnings {
                        let condition = Condition::Warning { warning: warning.clone() };
                        findings.present.push(Finding { subject: subject.clone(), condition, age: Duration::ZERO });
                    }
                }
            }
        }
        self.look_at_schemas(now, views, &mut findings);
        self.look_at_slots(now, views, &mut findings);
        let sight = |node: &String| views.get(node).and_then(|view| view.as_ref().ok());
        for direction in &mut self.directions {
            let subject = Subject::Direction { from: direction.from.clone(), to: direction.to.clone() };
            match direction.look(now, sight(&direction.from), sight(&direction.to), &self.patience) {
                Verdict::Well => {}
                Verdict::Unknown => drop(findings.unknown.insert(subject)),
                Verdict::Wrong(condition, age) => {
                    findings.present.push(Finding { subject, condition: *condition, age })
                }
            }
        }
        findings
    }

    /// A change by hand is made on one node after the other, so a difference has to last before it is one.
    fn look_at_schemas(&mut self, now: Duration, views: &Views, findings: &mut Findings) {
        let told = |node: &String| views.get(node)?.as_ref().ok()?.schema.as_deref();
        let Some((reference, theirs)) = self.nodes.iter().find_map(|node| Some((node, told(node)?))) else { return };
        if self.nodes.iter().any(|node| told(node).is_none()) {
            findings.unknown.extend(self.drifted.keys().map(|node| Subject::Node { node: node.clone() }));
        }
        for node in self.nodes.iter().filter(|node| *node != reference) {
            match told(node) {
                None => {}
                Some(schema) if schema == theirs => {
                    self.drifted.remove(node);
                }
                Some(_) => {
                    let since = *self.drifted.entry(node.clone()).or_insert(now);
                    let age = now.saturating_sub(since);
                    if age >= self.patience.mend {
                        let missing = missing_tables(views, reference, node);
                        let condition = Condition::Drift { reference: reference.clone(), missing };
                        let subject = Subject::Node { node: node.clone() };
                        findings.present.push(Finding { subject, condition, age });
                    }
                }
            }
        }
    }

    fn look_at_slots(&mut self, now: Duration, views: &Views, findings: &mut Findings) {
        for node in &self.nodes {
            let subject = |slot: &str| Subject::Slot { node: node.clone(), slot: slot.to_owned() };
            let Some(Ok(sight)) = views.get(node) else {
                let remembered = self.slots.keys().filter(|(at, _)| at == node);
                findings.unknown.extend(remembered.map(|(_, slot)| subject(slot)));
                continue;
            };
            let history = self.written.entry(node.clone()).or_default();
            history.push_back((now, sight.written));
            let window = now.saturating_sub(self.patience.stall);
            while history.len() > SAMPLES || history.get(1).is_some_and(|(when, _)| *when <= window) {
                history.pop_front();
            }
            let rate = match (history.front(), history.back()) {
                (Some((then, before)), Some((now, after))) if now > then => {
                    after.saturating_sub(*before) as f64 / (*now - *then).as_secs_f64()
                }
                _ => 0.0,
            };
            self.slots.retain(|(at, name), _| at != node || sight.slots.iter().any(|slot| slot.name == *name));
            for slot in &sight.slots {
                let place = (slot.confirmed, slot.restart);
                let memory = self.slots.entry((node.clone(), slot.name.clone())).or_insert((place, now));
                if memory.0 != place {
                    *memory = (place, now);
                }
                let still = now.saturating_sub(memory.1);
                let age = if slot.sender.is_none() { still.max(seconds(slot.unread)) } else { still };
                let backlog = slot.confirmed.or(slot.restart).map_or(0, |at| sight.written.saturating_sub(at));
                let much = backlog >= sight.segment.max(1) * SEGMENTS_KEPT_ANYWAY;
                if slot.wal_status.as_deref() != Some("unreserved") && !(much && age >= self.patience.stall) {
                    continue;
                }
                let peer = self.directions.iter().find(|direction| {
                    direction.from == *node && slot.here && direction.slot(views) == Some(slot.name.as_str())
                });
                let (end, seconds_left) = end_of_keeping(slot, sight.free, rate).unzip();
                let condition = Condition::WalKept {
                    peer: peer.map(|direction| direction.to.clone()),
                    bytes: slot.kept,
                    bytes_per_second: rate as u64,
                    end,
                    seconds_left: seconds_left.flatten(),
                };
                findings.present.push(Finding { subject: subject(&slot.name), condition, age });
            }
        }
    }
}

/// Tables that only one of two nodes publishes.
fn missing_tables(views: &Views, first: &str, second: &str) -> Vec<String> {
    let tables = |node: &str| Some(&views.get(node)?.as_ref().ok()?.tables);
    let (Some(firsts), Some(seconds)) = (tables(first), tables(second)) else { return Vec::new() };
    let lacks = |has: &BTreeMap<String, Vec<String>>, other: &BTreeMap<String, Vec<String>>, node: &str| {
        let missing = has.keys().filter(|table| !other.contains_key(*table));
        missing.map(|table| format!("table {table} is missing on {node}")).collect::<Vec<_>>()
    };
    [lacks(firsts, seconds, second), lacks(seconds, firsts, first)].concat()
}

/// Whichever comes first, as far as it can be seen from here.
fn end_of_keeping(slot: &Slot, free: Option<u64>, rate: f64) -> Option<(End, Option<f64>)> {
    let (end, bytes) = [(End::SlotLost, slot.spare), (End::DiskFull, free)]
        .into_iter()
        .filter_map(|(end, bytes)| bytes.map(|bytes| (end, bytes)))
        .min_by_key(|(_, bytes)| *bytes)?;
    Some((end, (rate >= 1.0).then(|| bytes as f64 / rate)))
}

fn seconds(seconds: Option<f64>) -> Duration {
    seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or_default()
}

impl Direction {
    fn new(subscription: String, from: String, to: String) -> Self {
        let gauge = Gauge { from: from.clone(), to: to.clone(), connected: None, bytes_behind: None };
        Self {
            from,
            to,
            subscription,
            applied: 0,
            received: 0,
            heard_us: 0,
            moved: Duration::ZERO,
            labours: Duration::ZERO,
            apart: None,
            unread: None,
            counted: None,
            errors: (0, 0),
            slow: false,
            samples: VecDeque::new(),
            gauge,
        }
    }

    /// The name of the slot, as the target knows it.
    fn slot<'a>(&self, views: &'a Views) -> Option<&'a str> {
        let target = views.get(&self.to)?.as_ref().ok()?;
        target.subscriptions.iter().find(|s| s.name == self.subscription)?.slot.as_deref()
    }

    fn look(&mut self, now: Duration, source: Option<&Sight>, target: Option<&Sight>, patience: &Patience) -> Verdict {
        self.gauge.connected = None;
        self.gauge.bytes_behind = None;
        let Some(target) = target else {
            self.excuse(now);
            return Verdict::Unknown;
        };
        let Some(subscription) = target.subscriptions.iter().find(|s| s.name == self.subscription) else {
            self.excuse(now);
            let condition = Condition::SubscriptionMissing { subscription: self.subscription.clone() };
            return Verdict::wrong(condition, Duration::ZERO);
        };
        let slot = source
            .map(|source| source.slots.iter().find(|slot| slot.here && Some(&slot.name) == subscription.slot.as_ref()));
        let moves = self.take_in(now, source, slot.flatten(), subscription);
        if let Some(verdict) = self.obstacle(slot, target, subscription, patience) {
            if let Verdict::Wrong(..) = verdict {
                self.excuse(now);
            }
            return verdict;
        }
        let Some(source) = source else {
            // Whether it moves, only the source can tell.
            self.excuse(now);
            return Verdict::Unknown;
        };
        if let Some(since) = self.apart {
            self.rest(now);
            return self.parted(now, since, target, subscription, slot.flatten(), patience);
        }
        self.pace(now, source.written.saturating_sub(self.applied), moves, subscription, patience)
    }

    /// Nothing can be said about progress now, so counting begins anew.
    fn rest(&mut self, now: Duration) {
        self.moved = now;
        self.labours = now;
    }

    /// The same, and whatever it is explains why there is no connection; afterwards it may take its time to connect.
    fn excuse(&mut self, now: Duration) {
        self.rest(now);
        self.apart = self.apart.map(|_| now);
        self.unread = self.unread.map(|_| now);
    }

    /// Updates what is remembered; true if there was progress since the last look.
    fn take_in(
        &mut self,
        now: Duration,
        source: Option<&Sight>,
        slot: Option<&Slot>,
        subscription: &Subscription,
    ) -> bool {
        let applied = [slot.and_then(|s| s.confirmed), slot.and_then(|s| s.replayed), subscription.handled];
        let applied = applied.into_iter().flatten().max().unwrap_or_default();
        let received = subscription.received.unwrap_or_default();
        let heard_us = subscription.heard_us.unwrap_or_default();
        // A message in the middle of a transaction is progress even if it is about something older than the last one:
        // transactions that ran side by side are sent one after the other.
        let moves = applied > self.applied
            || received > self.received
            || (subscription.busy && heard_us > self.heard_us && self.heard_us > 0);
        let applies = applied > self.applied;
        self.applied = self.applied.max(applied);
        self.received = self.received.max(received);
        self.heard_us = heard_us;

        let hears = subscription.worker.is_some() && subscription.connected;
        let connected = match (source, slot) {
            (Some(_), slot) => hears && slot.is_some_and(|slot| slot.sender.is_some()),
            (None, _) => hears,
        };
        self.gauge.connected = Some(connected);
        self.apart = if connected { None } else { self.apart.or(Some(now)) };
        self.unread = if connected || !hears { None } else { self.unread.or(Some(now)) };
        if let Some(source) = source {
            let behind = source.written.saturating_sub(self.applied);
            self.gauge.bytes_behind = Some(behind);
            self.samples.push_back((now, source.written, self.applied));
            if self.samples.len() > SAMPLES {
                // The first is kept, and with it the last.
                let mut odd = true;
                self.samples.retain(|_| {
                    odd = !odd;
                    !odd
                });
            }
        }

        let counters = (subscription.apply_errors, subscription.sync_errors);
        let before = self.counted.replace(counters).unwrap_or(counters);
        let idle = connected && self.gauge.bytes_behind == Some(0);
        if applies || idle {
            self.errors.0 = 0;
        }
        if subscription.copying == 0 {
            self.errors.1 = 0;
        }
        // Counters that went back have been reset.
        self.errors.0 += (counters.0 - before.0).max(0);
        self.errors.1 += (counters.1 - before.1).max(0);
        moves
    }

    /// What is plainly in the way, whether it is connected or not.
    fn obstacle(
        &self,
        slot: Option<Option<&Slot>>,
        target: &Sight,
        subscription: &Subscription,
        patience: &Patience,
    ) -> Option<Verdict> {
        let wrong = |condition| Some(Verdict::wrong(condition, Duration::ZERO));
        match slot {
            Some(None) => return wrong(Condition::SlotMissing { slot: subscription.slot.clone() }),
            Some(Some(slot)) if slot.wal_status.as_deref() == Some("lost") => {
                return wrong(Condition::SlotLost { slot: slot.name.clone() });
            }
            _ => {}
        }
        let stops = |conflict: &&Conflict| conflict.blocking && conflict.subscription == self.subscription;
        let conflicts: Vec<&Conflict> = target.conflicts.iter().filter(stops).collect();
        let errors = self.errors.0.max(self.errors.1);
        if let Some(first) = conflicts.first() {
            let age = seconds(Some(first.age));
            return Some(match age >= patience.resolve {
                true => Verdict::wrong(erroring(errors, &conflicts, subscription), age),
                false => Verdict::Unknown,
            });
        }
        if !subscription.enabled {
            return wrong(Condition::Disabled { subscription: self.subscription.clone() });
        }
        if errors >= ERRORS_THAT_COUNT {
            return wrong(erroring(errors, &[], subscription));
        }
        let wait = target.waits.iter().find(|wait| wait.subscription == self.subscription)?;
        let age = seconds(Some(wait.waited));
        Some(match age >= patience.mend {
            true => Verdict::wrong(Condition::Blocked(wait.clone()), age),
            false => Verdict::Unknown,
        })
    }

    /// Not connected, and nothing else explains it.
    fn parted(
        &self,
        now: Duration,
        since: Duration,
        target: &Sight,
        subscription: &Subscription,
        slot: Option<&Slot>,
        patience: &Patience,
    ) -> Verdict {
        let mend = patience.mend.max(target.retry * patience.attempts);
        let long = |since: Duration| now.saturating_sub(since) >= mend;
        let age = now.saturating_sub(since).max(seconds(slot.and_then(|slot| slot.unread)));
        match (slot, self.unread) {
            (Some(slot), Some(unread)) if long(unread) => {
                return Verdict::wrong(Condition::SlotInactive { slot: slot.name.clone() }, age);
            }
            (None, _) | (_, None) if long(since) => {}
            _ => return Verdict::Unknown,
        }
        let mut evidence = match subscription.worker {
            None => format!("subscription {} has no worker on {}", self.subscription, self.to),
            Some(_) => format!("the worker of subscription {} on {} has no connection", self.subscription, self.to),
        };
        if let Some(Slot { name, sender: Some(sender), .. }) = slot {
            evidence.push_str(&format!("; on {} slot {name} is held by pid {sender}", self.from));
        }
        if let Some(fault) = target.faults.iter().find(|fault| fault.contains(&self.subscription)) {
            evidence.push_str(&format!("; {fault}"));
        }
        Verdict::wrong(Condition::Disconnected { evidence }, age)
    }

    /// Connected, and nothing in the way: does it keep up?
    fn pace(
        &mut self,
        now: Duration,
        behind: u64,
        moves: bool,
        subscription: &Subscription,
        patience: &Patience,
    ) -> Verdict {
        if behind == 0 {
            self.rest(now);
        }
        if moves {
            self.moved = now;
        }
        let still = now.saturating_sub(self.moved);
        if still >= patience.stall {
            // What had to wait meanwhile is not slow for it at once.
            self.labours = now;
            let condition = Condition::Stalled {
                bytes_behind: behind,
                seconds_applying: subscription.applying,
                waiting_for: subscription.waiting_for.clone(),
            };
            return Verdict::wrong(condition, still);
        }

        let window = now.saturating_sub(patience.stall);
        while self.samples.get(1).is_some_and(|(when, written, _)| *when <= window && *written <= self.applied) {
            self.samples.pop_front();
        }
        // All that had been written at that look is applied by now; what was written after it may not be.
        let reached = self.samples.iter().rev().find(|(_, written, _)| *written <= self.applied);
        let since = reached.or(self.samples.front()).map_or(now, |(when, ..)| *when);
        // After an interruption, the time to catch up does not count at once.
        let late = now.saturating_sub(since).min(now.saturating_sub(self.labours));
        // Only what moves is slow; what does not may be about to be stalled.
        let enough = if self.slow { late >= patience.stall / 2 } else { moves && late >= patience.stall };
        self.slow = behind > 0 && enough;
        if self.slow {
            let condition = Condition::Slow {
                bytes_behind: behind,
                seconds_behind: late.as_secs_f64(),
                catch_up: self.catch_up(window, behind),
            };
            return Verdict::wrong(condition, late);
        }
        if moves || behind == 0 { Verdict::Well } else { Verdict::Unknown }
    }

    fn catch_up(&self, from: Duration, behind: u64) -> CatchUp {
        let first = self.samples.iter().find(|(when, ..)| *when >= from);
        let (Some((then, wrote, had)), Some((now, written, applied))) = (first, self.samples.back()) else {
            return CatchUp::Unknown;
        };
        if applied <= had || now <= then {
            return CatchUp::Unknown;
        }
        let gain = (applied - had) as f64 - written.saturating_sub(*wrote) as f64;
        if gain <= 0.0 {
            return CatchUp::Never;
        }
        CatchUp::Seconds(behind as f64 * (*now - *then).as_secs_f64() / gain)
    }
}

fn erroring(errors: i64, conflicts: &[&Conflict], subscription: &Subscription) -> Condition {
    let message = conflicts.first().map(|first| {
        let relation = first.relation.as_deref().map(|name| format!(" on {name}")).unwrap_or_default();
        let tried = first.resolution.as_deref().map(|text| format!(" ({text})")).unwrap_or_default();
        format!("{}{relation}: {}{tried}", first.conflict_type, first.message.as_deref().unwrap_or("no message"))
    });
    Condition::Erroring {
        errors,
        conflicts: conflicts.iter().map(|conflict| conflict.id).collect(),
        message,
        disabled: !subscription.enabled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;
    use crate::sight::Wait;
    use proptest::prelude::*;

    const STALL: u64 = 60;

    fn watchdog() -> Watchdog {
        let text = "user='u'\n[[node]]\nname='a'\nhost='a'\n[[node]]\nname='b'\nhost='b'";
        let config = Config::parse(text, &Environment { variable: &|_| None, os_user: None }).unwrap();
        let patience = Patience { stall: seconds(STALL), mend: seconds(15), attempts: 2, resolve: seconds(2) };
        Watchdog::new(&config, patience)
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    const SEGMENT: u64 = 16 << 20;

    /// A node as it is when all is well and nothing happens.
    fn idle() -> Sight {
        Sight {
            written: 1000,
            segment: SEGMENT,
            retry: seconds(5),
            subscriptions: vec![Subscription {
                name: "multihome".into(),
                enabled: true,
                slot: Some("multihome".into()),
                worker: Some(1),
                received: Some(1000),
                handled: Some(1000),
                heard_us: Some(1),
                connected: true,
                ..Subscription::default()
            }],
            slots: vec![Slot {
                name: "multihome".into(),
                here: true,
                sender: Some(2),
                confirmed: Some(1000),
                replayed: Some(1000),
                wal_status: Some("reserved".into()),
                ..Slot::default()
            }],
            ..Sight::default()
        }
    }

    /// Both nodes, told apart from idle ones by `spoil`: the source `a` first, then the target `b`.
    fn views(spoil: impl FnOnce(&mut Sight, &mut Sight)) -> Views {
        let (mut source, mut target) = (idle(), idle());
        spoil(&mut source, &mut target);
        [("a".to_owned(), Ok(source)), ("b".to_owned(), Ok(target))].into()
    }

    fn words(findings: &Findings) -> Vec<String> {
        findings.present.iter().map(|f| format!("{} {}", f.subject, f.condition.word())).collect()
    }

    /// Looks every five seconds for so long, at the same views, and returns the last findings.
    fn look_for(watchdog: &mut Watchdog, from: u64, until: u64, views: &Views) -> Findings {
        (from..=until).step_by(5).map(|now| watchdog.look(seconds(now), views)).last().unwrap()
    }

    type Spoil = fn(&mut Sight, &mut Sight);

    #[test]
    fn schemas_that_differ_for_a_while_are_drift_and_what_cannot_be_seen_is_not_its_end() {
        let mut watchdog = watchdog();
        let view = |schema: &str| Ok(Sight { schema: Some(schema.into()), ..Sight::default() });
        let mut look = |at: u64, a: Result<Sight, String>, b: Result<Sight, String>| {
            let findings = watchdog.look(seconds(at), &Views::from([("a".into(), a), ("b".into(), b)]));
            let drift = |finding: &&Finding| matches!(finding.condition, Condition::Drift { .. });
            let drift = findings.present.iter().find(drift).map(|finding| (finding.subject.to_string(), finding.age));
            (drift, findings.unknown.contains(&Subject::Node { node: "b".into() }))
        };
        assert_eq!(look(0, view("x"), view("x")), (None, false));
        assert_eq!(look(5, view("y"), view("x")), (None, false), "the other one is being changed");
        assert_eq!(look(10, view("y"), view("y")), (None, false));
        assert_eq!(look(15, view("z"), view("y")), (None, false));
        assert_eq!(look(30, view("z"), view("y")), (Some(("b".into(), seconds(15))), false));
        assert_eq!(look(35, Err("gone".into()), view("y")), (None, true));
        assert_eq!(look(40, view("z"), view("y")), (Some(("b".into(), seconds(25))), false));
        assert_eq!(look(45, view("z"), view("z")), (None, false));
    }

    #[test]
    fn each_condition_is_told_apart() {
        let behind: Spoil = |source, _| source.written = 5000;
        let cases: [(&str, u64, Spoil); 12] = [
            ("subscription_missing", 0, |_, target| target.subscriptions.clear()),
            ("slot_missing", 0, |source, _| source.slots.clear()),
            ("slot_missing", 0, |source, _| source.slots[0].here = false),
            ("slot_missing", 0, |_, target| target.subscriptions[0].slot = None),
            ("slot_lost", 0, |source, _| source.slots[0].wal_status = Some("lost".into())),
            ("disabled", 0, |_, target| target.subscriptions[0].enabled = false),
            ("blocked", 0, |source, target| {
                source.written = 5000;
                target.waits =
                    vec![Wait { subscription: "multihome".into(), waited: 20.0, holder: 7, ..Wait::default() }];
            }),
            ("disconnected", 15, |source, target| {
                source.slots[0].sender = None;
                target.subscriptions[0].worker = None;
                target.subscriptions[0].connected = false;
            }),
            ("disconnected", 15, |_, target| {
                target.subscriptions[0].connected = false;
            }),
            ("slot_inactive", 15, |source, _| source.slots[0].sender = None),
            ("stalled", STALL - 5, behind),
            ("erroring", 0, |_, target| {
                let conflict = Conflict {
                    id: 12,
                    subscription: "multihome".into(),
                    blocking: true,
                    age: 3.0,
                    ..Conflict::default()
                };
                target.conflicts = vec![conflict];
            }),
        ];
        for (word, after, spoil) in cases {
            let mut watchdog = watchdog();
            look_for(&mut watchdog, 0, 0, &views(|_, _| {}));
            let spoilt = views(spoil);
            if after > 0 {
                let before = look_for(&mut watchdog, 5, after, &spoilt);
                assert!(words(&before).is_empty(), "{word} too early: {before:?}");
            }
            let found = look_for(&mut watchdog, after + 5, after + 5, &spoilt);
            assert_eq!(words(&found), [format!("a -> b {word}")], "{found:?}");
            let well = look_for(&mut watchdog, after + 10, after + 10, &views(|_, _| {}));
            assert_eq!(well, Findings::default(), "{word}");
        }
    }

    #[test]
    fn what_explains_comes_before_what_follows() {
        let mut watchdog = watchdog();
        let spoilt = views(|source, target| {
            source.slots.clear();
            source.written = 5000;
            target.subscriptions[0].worker = None;
        });
        look_for(&mut watchdog, 0, 600, &spoilt);
        // The slot is back, and the worker has not had the time to connect.
        let mended = views(|_, target| target.subscriptions[0].worker = None);
        let found = watchdog.look(seconds(601), &mended);
        assert!(words(&found).is_empty() && !found.unknown.is_empty(), "{found:?}");
        assert_eq!(words(&look_for(&mut watchdog, 605, 620, &mended)), ["a -> b disconnected"]);
    }

    #[test]
    fn one_error_is_a_lost_connection_and_two_without_progress_are_errors() {
        let mut watchdog = watchdog();
        let with = |errors: i64, behind: u64, worker: Option<i32>| {
            views(|source, target| {
                source.written = 1000 + behind;
                target.subscriptions[0].apply_errors = errors;
                target.subscriptions[0].worker = worker;
            })
        };
        watchdog.look(seconds(0), &with(7, 0, Some(1)));
        assert!(words(&watchdog.look(seconds(5), &with(8, 100, None))).is_empty());
        // Connected again with nothing left to do: whatever it was is over.
        assert!(words(&watchdog.look(seconds(10), &with(8, 0, Some(1)))).is_empty());
        assert!(words(&watchdog.look(seconds(15), &with(9, 100, None))).is_empty());
        assert_eq!(words(&watchdog.look(seconds(20), &with(10, 100, Some(1)))), ["a -> b erroring"]);
        // Still, whether its worker is there at the moment or not.
        assert_eq!(words(&look_for(&mut watchdog, 25, 90, &with(10, 100, None))), ["a -> b erroring"]);
        // Statistics that have been reset are no errors, and progress ends it.
        assert_eq!(words(&watchdog.look(seconds(95), &with(0, 100, Some(1)))), ["a -> b erroring"]);
        assert_eq!(watchdog.look(seconds(100), &with(0, 0, Some(1))), Findings::default());
    }

    #[test]
    fn slow_says_when_it_has_caught_up() {
        let mut watchdog = watchdog();
        // Written: 100 bytes a second; applied: nothing for a start, then 150 a second.
        let at = |now: u64, applied: u64| {
            views(|source, _| {
                source.written = 1000 + now * 100;
                source.slots[0].confirmed = Some(1000 + applied);
                source.slots[0].replayed = None;
            })
        };
        let found: Vec<(u64, Findings)> =
            (0..=200).step_by(5).map(|now| (now, watchdog.look(seconds(now), &at(now, 1 + now * 10)))).collect();
        let (first, slow) = found.iter().find(|(_, findings)| !findings.present.is_empty()).unwrap();
        assert_eq!((*first, words(slow)), (65, vec!["a -> b slow".to_owned()]));
        let Condition::Slow { catch_up, seconds_behind, .. } = found.last().unwrap().1.present[0].condition else {
            panic!("{found:?}")
        };
        assert_eq!(catch_up, CatchUp::Never);
        assert!((175.0..=185.0).contains(&seconds_behind), "{seconds_behind}");
        let mut last = Findings::default();
        for now in (205..=270).step_by(5) {
            last = watchdog.look(seconds(now), &at(now, 2000 + (now - 200) * 150));
        }
        let Condition::Slow { catch_up: CatchUp::Seconds(left), bytes_behind, .. } = last.present[0].condition else {
            panic!("{last:?}")
        };
        assert!((left - bytes_behind as f64 / 50.0).abs() < 10.0, "{left} s for {bytes_behind} B");
        // It is well again when it is less than half of that behind.
        let well = (275..=900)
            .step_by(5)
            .map(|now| (now, watchdog.look(seconds(now), &at(now, (2000 + (now - 200) * 150).min(now * 100)))));
        let well = well.filter(|(_, findings)| findings.present.is_empty()).map(|(now, _)| now).next().unwrap();
        assert!((480..=560).contains(&well), "{well}");
    }

    #[test]
    fn what_has_moved_a_little_and_stopped_is_stalled_and_was_never_slow() {
        let mut watchdog = watchdog();
        let at = |applied| {
            views(|source, _| {
                source.written = 5000;
                source.slots[0].confirmed = Some(applied);
            })
        };
        look_for(&mut watchdog, 0, 0, &views(|_, _| {}));
        assert!(words(&watchdog.look(seconds(5), &at(2000))).is_empty());
        assert!(words(&look_for(&mut watchdog, 10, 60, &at(2000))).is_empty());
        assert_eq!(words(&watchdog.look(seconds(65), &at(2000))), ["a -> b stalled"]);
    }

    #[test]
    fn wal_kept_says_for_whom_and_until_when() {
        let mut watchdog = watchdog();
        let at = |now: u64, free: Option<u64>, spare: Option<u64>| {
            views(|source, target| {
                source.written = 1000 + now * (1 << 20);
                source.free = free;
                source.slots[0].sender = None;
                source.slots[0].restart = Some(900);
                source.slots[0].kept = now << 20;
                source.slots[0].spare = spare;
                target.subscriptions[0].worker = None;
                target.subscriptions[0].connected = false;
            })
        };
        let early = (0..=60).step_by(5).map(|now| watchdog.look(seconds(now), &at(now, None, None))).last().unwrap();
        assert_eq!(words(&early), ["a -> b disconnected"]);
        let found = watchdog.look(seconds(65), &at(65, Some(600 << 20), None));
        assert_eq!(words(&found), ["slot multihome on a wal_kept", "a -> b disconnected"]);
        assert_eq!(
            found.present[0].condition.to_string(),
            "65.0 MB kept for b, 1.0 MB/s more, the disk is full in 10 min 0 s"
        );
        let found = watchdog.look(seconds(70), &at(70, Some(600 << 20), Some(60 << 20)));
        assert!(found.present[0].condition.to_string().ends_with("the slot is lost in 1 min 0 s"));
        // The reader is back and takes what was kept.
        let back = views(|source, _| {
            source.written = 1000 + (70 << 20);
            source.slots[0].kept = 70 << 20;
            source.slots[0].confirmed = Some(2000);
        });
        assert!(words(&watchdog.look(seconds(75), &back)).is_empty());
    }

    #[test]
    fn a_slot_of_nobody_is_told_too() {
        let mut watchdog = watchdog();
        let at = |now: u64| {
            views(|source, target| {
                source.written = 1000 + (now << 20);
                source.slots[0].confirmed = Some(source.written);
                target.subscriptions[0].handled = Some(source.written);
                source.slots.push(Slot { name: "old".into(), restart: Some(1000), kept: now << 20, ..Slot::default() });
            })
        };
        let found = (0..=600).step_by(5).map(|now| watchdog.look(seconds(now), &at(now))).last().unwrap();
        assert_eq!(words(&found), ["slot old on a wal_kept"]);
    }

    #[test]
    fn a_node_that_does_not_answer_is_told_after_a_while_and_hides_the_rest() {
        let mut watchdog = watchdog();
        let mut silent = views(|source, _| source.slots[0].sender = None);
        silent.insert("b".into(), Err("no answer".into()));
        assert!(words(&look_for(&mut watchdog, 0, 10, &silent)).is_empty());
        let found = look_for(&mut watchdog, 15, 100, &silent);
        assert_eq!(words(&found), ["b unreachable"]);
        for (from, to) in [("a", "b"), ("b", "a")] {
            assert!(found.unknown.contains(&Subject::Direction { from: from.into(), to: to.into() }));
        }
        assert_eq!(watchdog.look(seconds(105), &views(|_, _| {})), Findings::default());
    }

    #[test]
    fn warnings_are_passed_on() {
        let warned = views(|_, target| target.warnings = vec!["subscription multihome applies in parallel".into()]);
        let found = watchdog().look(seconds(0), &warned);
        assert_eq!(words(&found), ["b warning"]);
    }

    #[test]
    fn sizes_and_spans_are_readable() {
        let texts: Vec<String> =
            [0, 1023, 1024, 150 << 10, 5 << 30].into_iter().map(|b| crate::condition::Size(b).to_string()).collect();
        assert_eq!(texts, ["0 B", "1023 B", "1.0 kB", "150 kB", "5.0 GB"]);
        let texts: Vec<String> = [0, 59, 61, 7200, 90_000].map(|s| crate::condition::span(seconds(s))).into();
        assert_eq!(texts, ["0 s", "59 s", "1 min 1 s", "2 h 0 min", "1 d 1 h"]);
    }

    /// One look at a direction whose nodes answer: what was written and applied meanwhile, and how it looks otherwise.
    #[derive(Debug, Clone)]
    struct Step {
        pause: u64,
        written: u64,
        applied: u64,
        connected: bool,
        errors: i64,
        reachable: bool,
    }

    fn steps(moves: std::ops::Range<u64>) -> impl Strategy<Value = Vec<Step>> {
        let step = (1_u64..200, 0_u64..5000, moves, prop::bool::weighted(0.8), 0_i64..2, prop::bool::weighted(0.9));
        let step = step.prop_map(|(pause, written, applied, connected, errors, reachable)| Step {
            pause,
            written,
            applied,
            connected,
            errors,
            reachable,
        });
        prop::collection::vec(step, 1..100)
    }

    /// Plays the steps; `check` is shown what each look found.
    fn play(steps: &[Step], mut check: impl FnMut(&mut Watchdog, u64, &Views, Findings)) -> (Watchdog, u64) {
        let mut watchdog = watchdog();
        let (mut now, mut written, mut applied, mut errors) = (0, 1_000_000, 1, 0);
        for step in steps {
            now += step.pause;
            written += step.written;
            applied += step.applied;
            written = written.max(applied);
            errors += step.errors;
            let mut views = views(|source, target| {
                source.written = written;
                source.slots[0].confirmed = Some(applied);
                source.slots[0].replayed = None;
                source.slots[0].sender = step.connected.then_some(2);
                let subscription = &mut target.subscriptions[0];
                subscription.handled = None;
                subscription.worker = step.connected.then_some(1);
                subscription.apply_errors = errors;
            });
            if !step.reachable {
                views.insert("b".into(), Err("no answer".into()));
            }
            let findings = watchdog.look(seconds(now), &views);
            check(&mut watchdog, now, &views, findings);
        }
        (watchdog, now)
    }

    proptest! {
        #[test]
        fn a_direction_that_makes_progress_is_never_stalled(steps in steps(1..3000)) {
            play(&steps, |_, _, _, findings| {
                assert!(findings.present.iter().all(|f| f.condition.word() != "stalled"), "{findings:?}");
            });
        }

        #[test]
        fn a_pair_with_nothing_to_say_is_well(pauses in prop::collection::vec(1_u64..5000, 1..100)) {
            let mut watchdog = watchdog();
            let mut now = 0;
            for pause in pauses {
                now += pause;
                prop_assert_eq!(watchdog.look(seconds(now), &views(|_, _| {})), Findings::default());
            }
        }

        /// Whatever has happened: it is said once, and once it has been well for a look, nothing is left of it.
        #[test]
        fn whatever_has_happened_all_is_well_in_the_end(steps in steps(0..3000)) {
            let mut alarms = crate::alarm::Alarms::default();
            let (mut watchdog, mut now) = play(&steps, |_, now, _, findings| {
                let subjects: BTreeSet<&Subject> = findings.present.iter().map(|f| &f.subject).collect();
                assert_eq!(subjects.len(), findings.present.len(), "two troubles of one thing: {findings:?}");
                alarms.hear(seconds(now), findings);
            });
            // Everything written is applied.
            let end = views(|source, target| {
                source.written = 100_000_000;
                source.slots[0].confirmed = Some(source.written);
                target.subscriptions[0].apply_errors = 1_000;
            });
            for _ in 0..2 {
                now += 5;
                alarms.hear(seconds(now), watchdog.look(seconds(now), &end));
            }
            prop_assert_eq!(alarms.raised(seconds(now)).count(), 0);
        }
    }
}
