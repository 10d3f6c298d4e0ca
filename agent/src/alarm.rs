//! What the watchdog says, and when: an alarm when something begins, reminders further and further apart, one all-clear.
//!
//! Pure. Deliberately judges nothing: whether something is wrong is `watchdog.rs`'s to say.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::condition::{Finding, Subject, span};
use crate::watchdog::Findings;

/// How long nothing is said about a condition after it was, for the first time, the second, and from then on. Counts for
/// one that comes and goes, too: it is not spoken of again before.
pub const REMINDERS: [Duration; 3] = [Duration::from_secs(60), Duration::from_secs(600), Duration::from_secs(3600)];

/// What is said about a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// It is there.
    Alarm,
    /// It is still there.
    Reminder,
    /// It is there no more.
    Clear,
}

impl Word {
    /// As in `--json`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Alarm => "alarm",
            Self::Reminder => "reminder",
            Self::Clear => "clear",
        }
    }
}

/// Something to say.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// What kind of news it is.
    pub word: Word,
    /// What it is about; with [`Word::Clear`] as it was last seen, and its age what it came to.
    pub finding: Finding,
    /// With [`Word::Clear`]: nothing else is known to be wrong with the subject.
    pub well: bool,
}

impl Event {
    /// In one line.
    pub fn text(&self, clock: SystemTime) -> String {
        let Finding { subject, condition, age } = &self.finding;
        let phrase = condition.phrase();
        match self.word {
            Word::Clear if self.well => format!("{subject} is well again: was {phrase} for {}", span(*age)),
            Word::Clear => format!("{subject} no longer {phrase}, after {}", span(*age)),
            Word::Alarm | Word::Reminder => {
                let still = if self.word == Word::Reminder { "still " } else { "" };
                format!("{subject} {still}{phrase} since {}: {condition}", since(clock, *age))
            }
        }
    }

    /// For programs.
    pub fn json(&self, clock: SystemTime) -> Value {
        let mut value = json(&self.finding, clock);
        value["event"] = json!(self.word.word());
        value["at"] = json!(humantime::format_rfc3339_seconds(clock).to_string());
        value["text"] = json!(self.text(clock));
        if self.word == Word::Clear {
            value["well"] = json!(self.well);
        }
        value
    }
}

/// What is the matter, for programs.
pub fn json(finding: &Finding, clock: SystemTime) -> Value {
    let mut value = json!(finding.subject);
    if let (Some(value), Value::Object(condition)) = (value.as_object_mut(), json!(finding.condition)) {
        value.extend(condition);
    }
    value["since"] = json!(since(clock, finding.age));
    value
}

/// What is the matter, in one line.
pub fn line(finding: &Finding, clock: SystemTime) -> String {
    let Finding { subject, condition, age } = finding;
    let mut line = format!("{subject} {}", condition.phrase());
    if !age.is_zero() {
        let _ = write!(line, " since {}", since(clock, *age));
    }
    format!("{line}: {condition}")
}

fn since(clock: SystemTime, age: Duration) -> String {
    humantime::format_rfc3339_seconds(clock.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH)).to_string()
}

/// What has been said.
#[derive(Default)]
pub struct Alarms {
    entries: BTreeMap<Key, Entry>,
}

struct Entry {
    /// As last seen.
    finding: Finding,
    /// When it was first seen, and how old it was then.
    began: (Duration, Duration),
    /// It was there when it could last be told.
    present: bool,
    /// An alarm was said, and no all-clear since.
    raised: bool,
    /// When it was last spoken of, all-clears not counted.
    said: Duration,
    /// For how long it is not spoken of from then on: an index of [`REMINDERS`].
    level: usize,
    /// When it was last there.
    seen: Duration,
}

impl Entry {
    fn new(now: Duration, finding: &Finding) -> Self {
        Self {
            finding: finding.clone(),
            began: (now, finding.age),
            present: true,
            raised: true,
            said: now,
            level: 0,
            seen: now,
        }
    }

    /// As last seen, and since when as far as anybody knows.
    fn aged(&self, now: Duration) -> Finding {
        let age = now.saturating_sub(self.began.0) + self.began.1;
        Finding { age: age.max(self.finding.age), ..self.finding.clone() }
    }
}

impl Alarms {
    /// Takes in what is the matter now; returns what there is to say about it, what is over first.
    pub fn hear(&mut self, now: Duration, findings: Findings) -> Vec<Event> {
        let Findings { present, unknown } = findings;
        let keys: BTreeSet<Key> = present.iter().map(key).collect();
        let troubled: BTreeSet<Subject> = keys.iter().map(|(subject, ..)| subject.clone()).collect();
        let raised: Vec<Event> = present.into_iter().filter_map(|finding| self.present(now, finding)).collect();
        let spoken_of = |(key, entry): (&Key, &Entry)| (entry.raised && keys.contains(key)).then(|| key.0.clone());
        let spoken_of: BTreeSet<Subject> = self.entries.iter().filter_map(spoken_of).collect();

        let mut events = Vec::new();
        self.entries.retain(|key, entry| {
            let subject = &key.0;
            if keys.contains(key) || unknown.contains(subject) {
                return true;
            }
            entry.present = false;
            // What has come in its place has been spoken of lately and is not yet again: until it is, or all is well, this
            // stands for it. Otherwise the last word would be that something is over, and never that all is well.
            if entry.raised && troubled.contains(subject) && !spoken_of.contains(subject) {
                return true;
            }
            if std::mem::take(&mut entry.raised) {
                let finding = entry.aged(now);
                events.push(Event { word: Word::Clear, finding, well: !troubled.contains(subject) });
            }
            now.saturating_sub(entry.said.max(entry.seen)) < REMINDERS[entry.level]
        });
        events.extend(raised);
        events
    }

    fn present(&mut self, now: Duration, finding: Finding) -> Option<Event> {
        let Some(entry) = self.entries.get_mut(&key(&finding)) else {
            self.entries.insert(key(&finding), Entry::new(now, &finding));
            return Some(Event { word: Word::Alarm, finding, well: false });
        };
        if !std::mem::replace(&mut entry.present, true) {
            entry.began = (now, finding.age);
        }
        entry.finding = finding;
        entry.seen = now;
        if now.saturating_sub(entry.said) < REMINDERS[entry.level] {
            return None;
        }
        entry.said = now;
        entry.level = (entry.level + 1).min(REMINDERS.len() - 1);
        let word = if std::mem::replace(&mut entry.raised, true) { Word::Reminder } else { Word::Alarm };
        Some(Event { word, finding: entry.aged(now), well: false })
    }

    /// What an alarm was said about and no all-clear.
    pub fn raised(&self, now: Duration) -> impl Iterator<Item = Finding> {
        self.entries.values().filter(|entry| entry.raised).map(move |entry| entry.aged(now))
    }
}

/// What makes it the same condition at two looks.
type Key = (Subject, &'static str, String);

fn key(finding: &Finding) -> Key {
    let (word, text) = finding.condition.identity();
    (finding.subject.clone(), word, text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condition::Condition;
    use proptest::prelude::*;

    fn finding(name: &str, condition: Condition) -> Finding {
        let subject = Subject::Direction { from: name.into(), to: "b".into() };
        Finding { subject, condition, age: Duration::ZERO }
    }

    fn disabled(name: &str) -> Finding {
        finding(name, Condition::Disabled { subscription: "multihome".into() })
    }

    fn slotless(name: &str) -> Finding {
        finding(name, Condition::SlotMissing { slot: None })
    }

    fn wrong(present: &[Finding]) -> Findings {
        Findings { present: present.to_vec(), ..Findings::default() }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn words(events: &[Event]) -> Vec<(Word, &'static str)> {
        events.iter().map(|event| (event.word, event.finding.condition.word())).collect()
    }

    #[test]
    fn one_alarm_reminders_further_and_further_apart_and_one_all_clear() {
        let mut alarms = Alarms::default();
        let mut said = Vec::new();
        for now in 0..10_000 {
            said.extend(alarms.hear(seconds(now), wrong(&[disabled("a")])).into_iter().map(|event| (now, event.word)));
        }
        let expected = [
            (0, Word::Alarm),
            (60, Word::Reminder),
            (660, Word::Reminder),
            (4260, Word::Reminder),
            (7860, Word::Reminder),
        ];
        assert_eq!(said, expected);
        let clear = alarms.hear(seconds(10_000), Findings::default());
        assert_eq!(words(&clear), [(Word::Clear, "disabled")]);
        assert!(clear[0].well && clear[0].finding.age == seconds(10_000));
        assert!(alarms.hear(seconds(10_001), Findings::default()).is_empty());
    }

    #[test]
    fn what_comes_and_goes_is_not_spoken_of_each_time() {
        let mut alarms = Alarms::default();
        let said: Vec<u64> = (0..3600)
            .filter(|now| {
                let present = if now % 2 == 0 { vec![disabled("a")] } else { vec![] };
                let said = alarms.hear(seconds(*now), wrong(&present));
                said.iter().any(|event| event.word == Word::Alarm)
            })
            .collect();
        assert_eq!(said, [0, 60, 660]);
    }

    #[test]
    fn what_cannot_be_seen_is_neither_repeated_nor_cleared() {
        let mut alarms = Alarms::default();
        alarms.hear(seconds(0), wrong(&[disabled("a")]));
        let unknown = || Findings { unknown: [disabled("a").subject].into(), ..Findings::default() };
        assert!(alarms.hear(seconds(100), unknown()).is_empty());
        assert_eq!(alarms.raised(seconds(100)).count(), 1);
        assert_eq!(words(&alarms.hear(seconds(101), Findings::default())), [(Word::Clear, "disabled")]);
    }

    #[test]
    fn the_last_word_is_that_all_is_well() {
        let mut alarms = Alarms::default();
        assert_eq!(words(&alarms.hear(seconds(0), wrong(&[disabled("a")]))), [(Word::Alarm, "disabled")]);
        let change = alarms.hear(seconds(1), wrong(&[slotless("a")]));
        assert_eq!(words(&change), [(Word::Clear, "disabled"), (Word::Alarm, "slot_missing")]);
        assert!(!change[0].well);
        // Disabled again, which has been spoken of a moment ago.
        assert!(alarms.hear(seconds(2), wrong(&[disabled("a")])).is_empty());
        let last = alarms.hear(seconds(3), Findings::default());
        assert_eq!(words(&last), [(Word::Clear, "slot_missing")]);
        assert!(last[0].well);
    }

    #[test]
    fn it_reads_well() {
        let clock = SystemTime::UNIX_EPOCH + seconds(1_000_000_000);
        let mut alarms = Alarms::default();
        let mut text = |now, findings: &[Finding]| -> Vec<String> {
            alarms.hear(seconds(now), wrong(findings)).iter().map(|event| event.text(clock)).collect()
        };
        assert_eq!(
            text(0, &[disabled("a")]),
            ["a -> b disabled since 2001-09-09T01:46:40Z: subscription multihome is switched off"]
        );
        assert_eq!(
            text(75, &[disabled("a")]),
            ["a -> b still disabled since 2001-09-09T01:45:25Z: subscription multihome is switched off"]
        );
        assert_eq!(text(200, &[]), ["a -> b is well again: was disabled for 3 min 20 s"]);
    }

    proptest! {
        /// Whatever comes and goes: nothing is spoken of twice within the interval, alarms and all-clears of a condition
        /// alternate, and when all has been well for a look, nothing is raised.
        #[test]
        fn nothing_floods_and_everything_is_cleared_once(
            looks in prop::collection::vec((1_u64..400, prop::collection::vec(any::<bool>(), 4), any::<bool>()), 1..200)
        ) {
            let conditions = [disabled("a"), slotless("a"), disabled("c"), slotless("c")];
            let mut alarms = Alarms::default();
            let mut now = 0;
            let mut spoken: BTreeMap<Key, u64> = BTreeMap::new();
            let mut raised: BTreeSet<Key> = BTreeSet::new();
            let mut events_of = |now: u64, findings: Findings, alarms: &mut Alarms| -> Result<(), TestCaseError> {
                for event in alarms.hear(seconds(now), findings) {
                    let key = key(&event.finding);
                    match event.word {
                        Word::Alarm => prop_assert!(raised.insert(key.clone())),
                        Word::Reminder => prop_assert!(raised.contains(&key)),
                        Word::Clear => {
                            prop_assert!(raised.remove(&key));
                            continue;
                        }
                    }
                    if let Some(before) = spoken.insert(key, now) {
                        prop_assert!(now - before >= REMINDERS[0].as_secs());
                    }
                }
                let listed: BTreeSet<Key> = alarms.raised(seconds(now)).map(|finding| key(&finding)).collect();
                prop_assert_eq!(&listed, &raised);
                Ok(())
            };
            for (pause, present, unknown) in looks {
                now += pause;
                let mut findings = wrong(&[]);
                findings.present =
                    conditions.iter().zip(present).filter(|(_, present)| *present).map(|(f, _)| f.clone()).collect();
                if unknown {
                    findings.unknown.insert(conditions[0].subject.clone());
                }
                events_of(now, findings, &mut alarms)?;
            }
            events_of(now + 1, wrong(&[]), &mut alarms)?;
            prop_assert_eq!(alarms.raised(seconds(now + 1)).count(), 0);
            // And all of it is forgotten.
            events_of(now + 10_000, wrong(&[]), &mut alarms)?;
            prop_assert!(alarms.entries.is_empty());
        }
    }
}
