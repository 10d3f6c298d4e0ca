//! What is said of many conflicts: the first of a kind at once, and at the next look how many more there were.
//!
//! Pure. Deliberately knows no kinds; whoever asks does.

use std::collections::BTreeMap;

/// What was said since the last look, by kind.
pub struct Digest<Kind>(BTreeMap<Kind, usize>);

impl<Kind: Ord> Default for Digest<Kind> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<Kind: Ord> Digest<Kind> {
    /// Whether one of this kind is to be told; otherwise it is counted.
    pub fn is_told(&mut self, kind: Kind) -> bool {
        match self.0.get_mut(&kind) {
            Some(more) => {
                *more += 1;
                false
            }
            None => {
                self.0.insert(kind, 0);
                true
            }
        }
    }

    /// The kinds that there were more of than was told, and how many more. Begins anew, except with those: one more of them is
    /// counted and told at the next look again.
    pub fn look(&mut self) -> Vec<(Kind, usize)>
    where
        Kind: Clone,
    {
        self.0.retain(|_, more| *more > 0);
        self.0.iter_mut().map(|(kind, more)| (kind.clone(), std::mem::take(more))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_and_the_others_are_counted() {
        let mut digest = Digest::default();
        assert_eq!(
            [digest.is_told("a"), digest.is_told("a"), digest.is_told("b"), digest.is_told("a")],
            [true, false, true, false]
        );
        assert_eq!(digest.look(), [("a", 2)]);
        // It goes on, so it stays one line a look.
        assert!(!digest.is_told("a") && digest.is_told("b"));
        assert_eq!(digest.look(), [("a", 1)]);
        assert_eq!(digest.look(), []);
        assert!(digest.is_told("a"));
    }
}
