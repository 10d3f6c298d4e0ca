//! Sequences that give keys: whether two nodes could hand out the same one, how many are left, and how each node gets values
//! of its own.
//!
//! Pure; `cmd/sequences.rs` has the IO. A node's values are told apart by what they leave when divided by the increment: its
//! *residue*. Nothing remembers residues but the sequences themselves.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Fewer than one in so many values left: soon there are none.
const SCARCE: i128 = 10;

/// A sequence on a node, as `multihome.sequences()` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Sequence {
    /// With its schema, quoted.
    pub name: String,
    /// From one value to the next.
    pub increment: i64,
    /// MINVALUE.
    pub least: i64,
    /// MAXVALUE.
    pub most: i64,
    /// Values that a session takes at once.
    pub cache: i64,
    /// Begins again at its end.
    pub cycle: bool,
    /// What it hands out next; beyond its bounds if there is nothing.
    pub next: i128,
    /// The columns it gives values to.
    pub columns: Vec<Column>,
}

/// A column of a key that a sequence feeds.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Column {
    /// With its schema, quoted.
    pub table: String,
    /// Its name, quoted.
    pub column: String,
    /// The greatest value of its type, if that is an integer.
    pub most: Option<i64>,
    /// The greatest value in use.
    pub highest: Option<i64>,
}

impl Sequence {
    /// The greatest value that sequence and columns can hold.
    pub fn limit(&self) -> i64 {
        self.columns.iter().filter_map(|column| column.most).fold(self.most, i64::min)
    }

    /// The greatest value in use in its columns.
    pub fn highest(&self) -> Option<i64> {
        self.columns.iter().filter_map(|column| column.highest).max()
    }

    /// What its values leave when divided by its increment.
    pub fn residue(&self) -> i128 {
        self.next.rem_euclid(i128::from(self.increment.unsigned_abs().max(1)))
    }

    /// How many values are left; nothing is said of one that goes down or cycles.
    pub fn left(&self) -> Option<i128> {
        let step = i128::from(self.increment);
        (step > 0 && !self.cycle).then(|| ((i128::from(self.limit()) - self.next).div_euclid(step) + 1).max(0))
    }

    /// Whether few of its values are left, or none.
    pub fn is_scarce(&self) -> bool {
        let (least, most) = (i128::from(self.least), i128::from(self.limit()));
        self.left().is_some_and(|left| left == 0)
            || (self.left().is_some() && (most - self.next) * SCARCE < most - least)
    }

    /// Whether a row has a value already that is still to come. With strides that cannot be told: the row may be another
    /// node's.
    pub fn is_behind(&self) -> bool {
        self.increment == 1 && self.highest().is_some_and(|highest| i128::from(highest) >= self.next)
    }

    fn series(&self) -> Series {
        Series { increment: self.increment, least: self.least, most: self.most, next: self.next }
    }
}

/// Values that a sequence can come to.
#[derive(Debug, Clone, Copy)]
pub struct Series {
    /// From one to the next.
    pub increment: i64,
    /// The bounds.
    pub least: i64,
    /// The bounds.
    pub most: i64,
    /// One of them.
    pub next: i128,
}

/// Whether two sequences can come to the same value.
pub fn collide(one: Series, other: Series) -> bool {
    if one.most < other.least || other.most < one.least {
        return false;
    }
    let common = gcd(one.increment.unsigned_abs(), other.increment.unsigned_abs());
    common == 0 || (one.next - other.next).rem_euclid(i128::from(common)) == 0
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// One sequence on the nodes that have it, in the order of the configuration.
pub type Everywhere<'a> = Vec<(&'a str, &'a Sequence)>;

/// All sequences of all nodes, by name.
pub fn by_name<'a>(nodes: &'a [(String, Vec<Sequence>)]) -> BTreeMap<&'a str, Everywhere<'a>> {
    let mut all: BTreeMap<&str, Everywhere<'_>> = BTreeMap::new();
    for (node, sequences) in nodes {
        for sequence in sequences {
            all.entry(&sequence.name).or_default().push((node, sequence));
        }
    }
    all
}

/// The pairs of nodes that could hand out the same key.
pub fn collisions<'a>(everywhere: &Everywhere<'a>) -> Vec<(&'a str, &'a str)> {
    let mut found = Vec::new();
    for (index, (node, own)) in everywhere.iter().enumerate() {
        for (peer, other) in &everywhere[index + 1..] {
            if collide(own.series(), other.series()) {
                found.push((*node, *peer));
            }
        }
    }
    found
}

/// What a sequence gets on a node, as `multihome.stride()` takes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The sequence.
    pub name: String,
    /// Its increment from now on.
    pub increment: i64,
    /// Where TRUNCATE .. RESTART IDENTITY begins again.
    pub start: i64,
    /// What it hands out next.
    pub next: i64,
}

/// What is to be done about one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stride {
    /// No two nodes can hand out the same value.
    Nothing,
    /// Left as it is, and why.
    LeftAlone(String),
    /// Cannot be done, and why.
    Refused(String),
    /// What changes on each node.
    Give(Vec<(String, Change)>),
}

/// Decides how each node gets values of its own, with room for so many nodes.
///
/// A node that has that increment and a residue of its own keeps the residue; the others get the lowest that is free, in the
/// order of the configuration. All go past everything that was handed out or is in a column on any node.
pub fn stride(everywhere: &Everywhere<'_>, places: i64) -> Stride {
    if collisions(everywhere).is_empty() {
        return Stride::Nothing;
    }
    if everywhere.iter().any(|(_, sequence)| sequence.increment < 0) {
        return Stride::LeftAlone("it descends".into());
    }
    if everywhere.iter().any(|(_, sequence)| sequence.cycle) {
        return Stride::LeftAlone("it cycles, and hands out everything again anyhow".into());
    }
    if everywhere.len() as i128 > i128::from(places) {
        return Stride::Refused(format!("{} nodes do not fit into {places} places", everywhere.len()));
    }
    let mut taken: BTreeSet<i128> = BTreeSet::new();
    let keeps: Vec<Option<i128>> = everywhere
        .iter()
        .map(|(_, sequence)| {
            (sequence.increment == places && taken.insert(sequence.residue())).then(|| sequence.residue())
        })
        .collect();
    let used = |sequence: &Sequence| {
        let highest = sequence.highest().map_or(i128::MIN, i128::from);
        highest.max(sequence.next - i128::from(sequence.increment))
    };
    let past = everywhere.iter().map(|(_, sequence)| used(sequence)).max().unwrap_or_default();
    let wide = i128::from(places);
    let mut changes = Vec::new();
    for ((node, sequence), keeps) in everywhere.iter().zip(keeps) {
        let free = || (0..wide).find(|residue| !taken.contains(residue));
        let Some(residue) = keeps.or_else(free) else { return Stride::Refused(format!("no place is free for {node}")) };
        taken.insert(residue);
        let first = |from: i128| from + (residue - from).rem_euclid(wide);
        let next = first((past + 1).max(i128::from(sequence.least)));
        let start = first(i128::from(sequence.least).max(1));
        let limit = sequence.limit();
        let (Ok(next), Ok(start)) = (i64::try_from(next), i64::try_from(start)) else {
            return Stride::Refused(format!("it would be exhausted: {past} is in use, of {limit}"));
        };
        if next > limit || start > limit {
            return Stride::Refused(format!(
                "it would be exhausted on {node}: the next key would be {next}, and the greatest possible is {limit}"
            ));
        }
        changes.push(((*node).to_owned(), Change { name: sequence.name.clone(), increment: places, start, next }));
    }
    Stride::Give(changes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sequence(increment: i64, next: i128, highest: Option<i64>, most: i64) -> Sequence {
        let column = Column { table: "t".into(), column: "id".into(), most: Some(most), highest };
        let columns = vec![column];
        Sequence { name: "s".into(), increment, least: 1, most: i64::MAX, cache: 1, cycle: false, next, columns }
    }

    fn apply(sequence: &Sequence, change: &Change) -> Sequence {
        Sequence { increment: change.increment, next: i128::from(change.next), ..sequence.clone() }
    }

    #[test]
    fn a_column_that_is_narrower_than_its_sequence_is_the_limit() {
        let small = sequence(1, 32_000, None, 32_767);
        assert_eq!((small.limit(), small.left(), small.is_scarce()), (32_767, Some(768), true));
        assert_eq!(sequence(16, 32_767, None, 32_767).left(), Some(1));
        assert_eq!(sequence(16, 32_768, None, 32_767).left(), Some(0));
        assert!(!sequence(1, 1, None, 32_767).is_scarce());
        // The last value of one is 32,760, and 32,752 is left to the other.
        let last = sequence(16, 32_760, Some(3), 32_767);
        assert!(matches!(stride(&vec![("a", &last), ("b", &last)], 16), Stride::Give(_)));
        let over = sequence(16, 32_776, Some(3), 32_767);
        let Stride::Refused(why) = stride(&vec![("a", &over), ("b", &over)], 16) else { panic!("not refused") };
        assert!(why.contains("exhausted"), "{why}");
    }

    #[test]
    fn what_cannot_be_given_a_stride_is_left_alone() {
        let down = sequence(-1, -5, None, 32_767);
        assert!(matches!(stride(&vec![("a", &down), ("b", &down)], 16), Stride::LeftAlone(_)));
        let round = Sequence { cycle: true, ..sequence(1, 5, None, 32_767) };
        assert!(matches!(stride(&vec![("a", &round), ("b", &round)], 16), Stride::LeftAlone(_)));
        let one = sequence(1, 5, None, 32_767);
        assert_eq!(stride(&vec![("a", &one)], 16), Stride::Nothing);
        assert!(matches!(stride(&vec![("a", &one), ("b", &one)], 1), Stride::Refused(_)));
    }

    #[test]
    fn a_row_whose_key_is_still_to_come_is_seen() {
        assert!(sequence(1, 5, Some(5), 100).is_behind());
        assert!(!sequence(1, 6, Some(5), 100).is_behind());
        assert!(!sequence(16, 3, Some(5), 100).is_behind());
    }

    fn series() -> impl Strategy<Value = Series> {
        (prop_oneof![1_i64..6, -5_i64..0], 1_i128..30).prop_map(|(increment, next)| Series {
            increment,
            least: -1000,
            most: 1000,
            next,
        })
    }

    fn any_sequence() -> impl Strategy<Value = Sequence> {
        (prop_oneof![Just(1_i64), Just(4), Just(16), 1_i64..40], 1_i128..500, prop::option::of(1_i64..500))
            .prop_map(|(increment, next, highest)| sequence(increment, next, highest, i64::MAX))
    }

    proptest! {
        /// What is said not to collide never does.
        #[test]
        fn sequences_that_are_said_not_to_collide_have_no_value_in_common(a in series(), b in series()) {
            let values = |series: &Series| {
                (0..200).map(|step| series.next + step * i128::from(series.increment)).collect::<BTreeSet<_>>()
            };
            if !collide(a, b) {
                prop_assert!(values(&a).is_disjoint(&values(&b)));
            }
            prop_assert_eq!(collide(a, b), collide(b, a));
        }

        #[test]
        fn with_strides_nothing_collides_nothing_comes_twice_and_there_is_nothing_more_to_do(
            nodes in prop::collection::vec(any_sequence(), 2..5), places in 5_i64..40,
        ) {
            let names = ["a", "b", "c", "d", "e"];
            let everywhere: Everywhere<'_> = names.into_iter().zip(&nodes).collect();
            let Stride::Give(changes) = stride(&everywhere, places) else { return Ok(()) };
            let strided: Vec<Sequence> = nodes.iter().zip(&changes).map(|(s, (_, change))| apply(s, change)).collect();
            for (own, _) in strided.iter().zip(&changes) {
                for before in &nodes {
                    prop_assert!(own.next > before.next - i128::from(before.increment));
                    prop_assert!(before.highest().is_none_or(|highest| own.next > i128::from(highest)));
                }
            }
            for (_, change) in &changes {
                prop_assert_eq!((change.next - change.start).rem_euclid(places), 0);
                prop_assert!(change.start >= 1);
            }
            let after: Everywhere<'_> = names.into_iter().zip(&strided).collect();
            prop_assert_eq!(stride(&after, places), Stride::Nothing);
        }

        /// Also if the order of the nodes changes, and if only some of them were changed when it was interrupted.
        #[test]
        fn a_node_that_has_its_residue_keeps_it(
            nodes in prop::collection::vec(any_sequence(), 2..4), more in any_sequence(), first in any::<bool>(), cut in 0..4_usize,
        ) {
            let names = ["a", "b", "c"];
            let everywhere: Everywhere<'_> = names.into_iter().zip(&nodes).collect();
            let Stride::Give(changes) = stride(&everywhere, 64) else { return Ok(()) };
            let mut strided = nodes.clone();
            for (index, (_, change)) in changes.iter().enumerate().filter(|(index, _)| *index < cut.max(1)) {
                strided[index] = apply(&nodes[index], change);
            }
            let mut after: Everywhere<'_> = names.into_iter().zip(&strided).collect();
            after.insert(if first { 0 } else { after.len() }, ("new", &more));
            let Stride::Give(again) = stride(&after, 64) else { return Ok(()) };
            for ((_, change), (node, before)) in again.iter().zip(&after) {
                if before.increment == 64 && *node != "new" {
                    prop_assert_eq!(i128::from(change.next).rem_euclid(64), before.residue());
                }
            }
        }
    }
}
