//! A queue of byte records in memory that processes share: any number of producers, none of which ever waits, and one
//! consumer. Pure: it is handed the memory, and knows nothing of who wakes whom.
//!
//! Producers run while an ERROR is being reported, so nothing here locks, allocates or fails: a record that does not fit
//! is counted and dropped. A producer reserves its place by moving `head`, fills it, and publishes it by writing its
//! length, which is zero until then. The consumer copies a record, and gives its place back only when it has been dealt
//! with, zeroed, so that the next length there is zero again.
//!
//! A producer that dies between the two steps would stop the consumer for good. It cannot: what it does in between are
//! plain stores, ended by nothing but a crash, and a crash of one process makes PostgreSQL start with fresh memory.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

/// The positions; all-zero bytes are an empty queue. They count bytes since the beginning, so they only grow.
#[repr(C)]
pub struct Positions {
    /// Where the next record will be.
    head: AtomicU64,
    /// Where the oldest record is.
    tail: AtomicU64,
    /// Records that found no room.
    dropped: AtomicU64,
}

/// A queue: positions, and as many words as there are for the records.
#[derive(Clone, Copy)]
pub struct Ring<'a> {
    positions: &'a Positions,
    words: &'a [AtomicU64],
}

const WORD: u64 = size_of::<u64>() as u64;

/// Bytes that a record takes: its length, then itself, in whole words.
fn place(length: u64) -> u64 {
    WORD + length.div_ceil(WORD) * WORD
}

impl<'a> Ring<'a> {
    /// `words` must not be empty, and always the same for the same positions.
    pub fn new(positions: &'a Positions, words: &'a [AtomicU64]) -> Ring<'a> {
        Ring { positions, words }
    }

    fn word(&self, position: u64) -> &AtomicU64 {
        &self.words[(position / WORD % self.words.len() as u64) as usize]
    }

    /// Adds a record made of parts. False if it did not fit, which has been counted.
    pub fn push(&self, parts: &[&[u8]]) -> bool {
        let length: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let (need, room) = (place(length), self.words.len() as u64 * WORD);
        let mut head = self.positions.head.load(Relaxed);
        loop {
            // Acquire: what the consumer gave back is zeroed.
            let tail = self.positions.tail.load(Acquire);
            // An empty record would look like none. A stale head may lie before the tail; the exchange then fails.
            if length == 0 || need > room || head.saturating_sub(tail) > room - need {
                self.positions.dropped.fetch_add(1, Relaxed);
                return false;
            }
            match self.positions.head.compare_exchange_weak(head, head + need, AcqRel, Relaxed) {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
        let (mut at, mut word, mut filled) = (head + WORD, 0u64, 0);
        for byte in parts.iter().flat_map(|part| part.iter()) {
            word |= u64::from(*byte) << (8 * filled);
            filled += 1;
            if filled == WORD {
                self.word(at).store(word, Relaxed);
                (at, word, filled) = (at + WORD, 0, 0);
            }
        }
        if filled > 0 {
            self.word(at).store(word, Relaxed);
        }
        self.word(head).store(length, Release);
        true
    }

    /// Where the oldest record is. For the consumer only.
    pub fn start(&self) -> u64 {
        self.positions.tail.load(Relaxed)
    }

    /// Copies the record at a position, which stays, and returns the position after it. For the consumer only, from
    /// [`Ring::start`] on. `None` if there is none, or its producer is still at work on it.
    pub fn read(&self, at: u64, record: &mut Vec<u8>) -> Option<u64> {
        record.clear();
        // After a record that ends at the end of the room, there is the first one again.
        if at - self.start() >= self.words.len() as u64 * WORD {
            return None;
        }
        let length = self.word(at).load(Acquire);
        if length == 0 {
            return None;
        }
        let mut word = at + WORD;
        while (record.len() as u64) < length {
            let bytes = self.word(word).load(Relaxed).to_le_bytes();
            let take = (length - record.len() as u64).min(WORD) as usize;
            record.extend_from_slice(&bytes[..take]);
            word += WORD;
        }
        Some(at + place(length))
    }

    /// Removes the records before a position that [`Ring::read`] returned. For the consumer only.
    pub fn remove_to(&self, position: u64) {
        for at in (self.start()..position).step_by(WORD as usize) {
            self.word(at).store(0, Relaxed);
        }
        self.positions.tail.store(position, Release);
    }

    /// Counts a record as dropped that never came here, or that was taken and could not be used.
    pub fn count_dropped(&self) {
        self.positions.dropped.fetch_add(1, Relaxed);
    }

    /// How many records were dropped since the memory was zeroed.
    pub fn dropped(&self) -> u64 {
        self.positions.dropped.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    struct Memory(Positions, Vec<AtomicU64>);

    impl Memory {
        fn new(words: usize) -> Memory {
            let positions = Positions { head: 0.into(), tail: 0.into(), dropped: 0.into() };
            Memory(positions, (0..words).map(|_| AtomicU64::new(0)).collect())
        }

        fn ring(&self) -> Ring<'_> {
            Ring::new(&self.0, &self.1)
        }
    }

    proptest! {
        /// Against the obvious model: a queue with a budget.
        #[test]
        fn records_come_out_whole_and_in_order(
            words in 1usize..20,
            steps in proptest::collection::vec(proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)), 1..200)
        ) {
            let memory = Memory::new(words);
            let ring = memory.ring();
            let (mut model, mut used, mut dropped) = (VecDeque::new(), 0, 0);
            let mut record = Vec::new();
            for step in steps {
                match step {
                    Some(bytes) => {
                        let fits = !bytes.is_empty() && used + place(bytes.len() as u64) <= words as u64 * WORD;
                        let (left, right) = bytes.split_at(bytes.len() / 3);
                        prop_assert_eq!(ring.push(&[left, right]), fits);
                        if fits {
                            used += place(bytes.len() as u64);
                            model.push_back(bytes);
                        } else {
                            dropped += 1;
                        }
                    }
                    None => {
                        // All of them, one after the other; then the first goes.
                        let (mut at, mut first) = (ring.start(), None);
                        for expected in &model {
                            let next = ring.read(at, &mut record);
                            prop_assert!(next.is_some());
                            prop_assert_eq!(&record, expected);
                            at = next.unwrap_or_default();
                            first = first.or(next);
                        }
                        prop_assert_eq!(ring.read(at, &mut record), None);
                        if let (Some(gone), Some(first)) = (model.pop_front(), first) {
                            ring.remove_to(first);
                            used -= place(gone.len() as u64);
                        }
                    }
                }
                prop_assert_eq!(ring.dropped(), dropped);
            }
        }
    }

    #[test]
    fn many_producers_lose_nothing_uncounted_and_tear_nothing() {
        const PRODUCERS: u64 = 4;
        const EACH: u64 = 20_000;
        let memory = Memory::new(64);
        let ring = memory.ring();
        let mut seen = vec![None::<u64>; PRODUCERS as usize];
        let mut count = 0;
        std::thread::scope(|scope| {
            let producers: Vec<_> = (0..PRODUCERS)
                .map(|producer| {
                    scope.spawn(move || {
                        for number in 0..EACH {
                            let filler = vec![producer as u8; (number % 60) as usize];
                            ring.push(&[&producer.to_le_bytes(), &number.to_le_bytes(), &filler]);
                        }
                    })
                })
                .collect();
            let mut record = Vec::new();
            loop {
                let done = producers.iter().all(|producer| producer.is_finished());
                if let Some(next) = ring.read(ring.start(), &mut record) {
                    let word = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap());
                    let (producer, number) = (word(0), word(8));
                    assert_eq!(record.len() as u64, 16 + number % 60);
                    assert!(record[16..].iter().all(|byte| u64::from(*byte) == producer));
                    assert!(seen[producer as usize].is_none_or(|last| last < number), "out of order");
                    seen[producer as usize] = Some(number);
                    count += 1;
                    ring.remove_to(next);
                } else if done {
                    break;
                }
            }
        });
        assert_eq!(count + ring.dropped(), PRODUCERS * EACH);
        assert!(count > 0);
    }
}
