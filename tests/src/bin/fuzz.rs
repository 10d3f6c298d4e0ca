//! `make fuzz`: feeds extension/src/pgoutput.rs with messages that are right, nearly right and plain noise, for SECONDS
//! (60 by default).
//!
//! Each input is made from a number of its own. A panic or a broken property ends the run with that number and the input
//! in hex, and SEED=.. starts another run with that very input.

// The module's own tests need what only the extension depends on.
#![cfg(not(test))]

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

#[allow(dead_code)]
#[path = "../../../extension/src/pgoutput.rs"]
mod pgoutput;

use pgoutput::{Column, Decoded, Message, Relation, Tuple, decode, shorten, unchanged, write_string, write_tuple};

fn main() -> ExitCode {
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().expect("SECONDS and SEED are numbers"));
    let time = Duration::from_secs(number("SECONDS").unwrap_or(60));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
    let seed = number("SEED").unwrap_or_else(now);

    let start = Instant::now();
    let (mut inputs, mut understood) = (0, 0);
    while start.elapsed() < time {
        let seed = seed.wrapping_add(inputs);
        let mut random = Random(seed);
        let input = Input::new(&mut random);
        match catch_unwind(AssertUnwindSafe(|| input.check(&mut random))) {
            Ok(Ok(decodes)) => understood += u64::from(decodes),
            Ok(Err(broken)) => return input.fails(seed, &broken),
            Err(_) => return input.fails(seed, "a panic, see above"),
        }
        inputs += 1;
    }
    println!("{inputs} inputs, {understood} of them messages, in {} s, from SEED={seed}", start.elapsed().as_secs());
    ExitCode::SUCCESS
}

/// SplitMix64: every number starts a sequence of its own.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }

    /// Text in UTF-8, with the characters that JSON escapes.
    fn text(&mut self) -> Vec<u8> {
        let length = if self.one_in(50) { self.below(3000) } else { self.below(12) };
        (0..length)
            .flat_map(|_| self.pick(&["a", "b ", "\"", "\\", "\n", "\u{1}", "ö", "€", "\u{10348}", "7f"]).bytes())
            .collect()
    }

    /// Text without a zero byte, ended by one.
    fn name(&mut self, to: &mut Vec<u8>) {
        to.extend(self.text());
        to.push(0);
    }

    fn counted(&mut self, to: &mut Vec<u8>) {
        let text = if self.one_in(8) {
            let length = self.below(20);
            self.bytes(length)
        } else {
            self.text()
        };
        to.extend((text.len() as u32).to_be_bytes());
        to.extend(text);
    }

    fn tuple(&mut self, kind: u8, to: &mut Vec<u8>) {
        let count = if self.one_in(200) { 1600 } else { self.below(9) };
        to.push(kind);
        to.extend((count as u16).to_be_bytes());
        for _ in 0..count {
            let kind = b"nutttbx"[self.below(7)];
            to.push(kind);
            if kind == b'x' {
                to.extend((self.next() as u32).to_be_bytes());
            }
            if !matches!(kind, b'n' | b'u') {
                self.counted(to);
            }
        }
    }

    fn relation(&mut self, to: &mut Vec<u8>) {
        to.extend(self.bytes(4));
        self.name(to);
        self.name(to);
        to.push(b'd');
        let count = self.below(9);
        to.extend((count as u16).to_be_bytes());
        for _ in 0..count {
            to.push(self.below(2) as u8);
            self.name(to);
            let type_oid: u32 = if self.one_in(20) { 114 } else { 25 };
            to.extend(type_oid.to_be_bytes());
            to.extend(self.bytes(4));
        }
    }

    /// A message as PostgreSQL might send it.
    fn message(&mut self, in_stream: bool) -> Vec<u8> {
        let kind = b"IIIIUUUUDDDRRTYMBCOSEcAbPKrp"[self.below(28)];
        let mut message = vec![kind];
        if in_stream && b"IUDTRYM".contains(&kind) {
            message.extend(self.bytes(4));
        }
        if b"CPKrp".contains(&kind) {
            message.push(0);
        }
        match kind {
            b'I' => {
                message.extend(self.bytes(4));
                self.tuple(b'N', &mut message);
            }
            b'U' => {
                message.extend(self.bytes(4));
                if self.one_in(2) {
                    let old = b"KO"[self.below(2)];
                    self.tuple(old, &mut message);
                }
                self.tuple(b'N', &mut message);
            }
            b'D' => {
                message.extend(self.bytes(4));
                let old = b"KO"[self.below(2)];
                self.tuple(old, &mut message);
            }
            b'R' => self.relation(&mut message),
            b'T' => {
                let count = self.below(5);
                message.extend((count as u32).to_be_bytes());
                message.extend(self.bytes(1 + 4 * count));
            }
            b'Y' => {
                message.extend(self.bytes(4));
                self.name(&mut message);
                self.name(&mut message);
            }
            b'M' => {
                message.extend(self.bytes(9));
                self.name(&mut message);
                self.counted(&mut message);
            }
            b'B' => message.extend(self.bytes(20)),
            b'C' => message.extend(self.bytes(24)),
            b'O' => {
                message.extend(self.bytes(8));
                self.name(&mut message);
            }
            b'S' => message.extend(self.bytes(5)),
            b'c' => {
                message.extend(self.bytes(4));
                message.push(0);
                message.extend(self.bytes(24));
            }
            b'A' => {
                let length = if self.one_in(2) { 8 } else { 24 };
                message.extend(self.bytes(length));
            }
            b'b' | b'P' | b'K' | b'p' => {
                message.extend(self.bytes(28));
                self.name(&mut message);
            }
            b'r' => {
                message.extend(self.bytes(36));
                self.name(&mut message);
            }
            _ => (),
        }
        message
    }

    /// Damages it a little.
    fn mutate(&mut self, message: &mut Vec<u8>) {
        const NUMBERS: [u32; 8] = [0, 1, 2, 255, 65_535, i32::MAX as u32, 1 << 31, u32::MAX];
        let at = self.below(message.len() + 1);
        match self.below(6) {
            0 => message.truncate(at),
            1 => message.insert(at, self.next() as u8),
            2 if at < message.len() => drop(message.remove(at)),
            3 if at + 4 <= message.len() => {
                message[at..at + 4].copy_from_slice(&NUMBERS[self.below(NUMBERS.len())].to_be_bytes());
            }
            4 => {
                let part = message[at..].to_vec();
                let into = self.below(at + 1);
                message.splice(into..into, part);
            }
            _ => {
                if let Some(byte) = message.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
        }
    }
}

struct Input {
    message: Vec<u8>,
    in_stream: bool,
    /// It was not damaged.
    valid: bool,
    limit: usize,
    /// Of the table that tuples are written for.
    relation: Vec<u8>,
}

impl Input {
    fn new(random: &mut Random) -> Input {
        let in_stream = random.one_in(2);
        let mut message = if random.one_in(10) { vec![] } else { random.message(in_stream) };
        let noise = message.is_empty();
        if noise {
            let length = random.below(100);
            message = random.bytes(length);
        }
        let damage = if noise || random.one_in(3) { 0 } else { random.below(5) };
        (0..damage).for_each(|_| random.mutate(&mut message));

        let mut relation = vec![b'R'];
        random.relation(&mut relation);
        if random.one_in(4) {
            random.mutate(&mut relation);
        }
        let limit = if random.one_in(10) { 0 } else { random.below(message.len() + 10) };
        Input { message, in_stream, valid: !noise && damage == 0, limit, relation }
    }

    /// Whether it is a message, if all that is promised of it holds.
    fn check(&self, random: &mut Random) -> Result<bool, String> {
        let decoded = decode(&self.message, self.in_stream);
        ensure(decoded.is_ok() || !self.valid, "a valid message is refused")?;

        let mut out = b"before".to_vec();
        let cut = shorten(&self.message, self.in_stream, self.limit, &mut out);
        let short = out.strip_prefix(b"before").ok_or("shorten changed what was there before")?;

        let Ok(decoded) = decoded else {
            let kept = short == self.message && !cut && short.len() <= self.limit;
            ensure(kept || short.is_empty() && cut, "part of a malformed message was kept")?;
            return Ok(false);
        };
        let before = tuples(&decoded.message);
        ensure(cut == (size(&before) > self.limit && !before.is_empty()), "cut without need, or not at all")?;
        ensure(cut || short == self.message, "a message that fits was changed")?;
        let Ok(shortened) = decode(short, self.in_stream) else {
            return Err("a shortened message is malformed".into());
        };
        let after = tuples(&shortened.message);
        self.check_shortened(&decoded, &shortened)?;
        for tuple in before.iter().chain(&after) {
            self.check_json(tuple)?;
        }

        let (text, mut json) = (random.text(), vec![]);
        write_string(&text, &mut json);
        let read: String = serde_json::from_slice(&json).map_err(|error| format!("a string is not JSON: {error}"))?;
        ensure(read.as_bytes() == text, "a string is another one as JSON")?;
        Ok(true)
    }

    fn check_shortened(&self, before: &Decoded, after: &Decoded) -> Result<(), String> {
        ensure(before.subxid == after.subxid, "another transaction id after shortening")?;
        let same = std::mem::discriminant(&before.message) == std::mem::discriminant(&after.message);
        ensure(same, "another message after shortening")?;
        let (before, after) = (tuples(&before.message), tuples(&after.message));
        ensure(before.len() == after.len(), "another number of tuples after shortening")?;
        ensure(before.is_empty() || size(&after) <= self.limit, "more bytes than the limit")?;
        for (before, after) in before.iter().zip(&after) {
            ensure(before.columns().count() == after.columns().count(), "another number of columns after shortening")?;
            for (before, after) in before.columns().zip(after.columns()) {
                let kept = match (before, after) {
                    (Column::Text(value), Column::Cut { whole, kept }) => {
                        let whole_characters = std::str::from_utf8(value).is_err() || std::str::from_utf8(kept).is_ok();
                        whole as usize == value.len() && value.starts_with(kept) && whole_characters
                    }
                    (Column::Binary(value), Column::Cut { whole, kept }) => {
                        whole as usize == value.len() && kept.is_empty()
                    }
                    (Column::Cut { whole, kept }, Column::Cut { whole: still, kept: less }) => {
                        whole == still && kept.starts_with(less)
                    }
                    _ => before == after,
                };
                ensure(kept, "a value was cut to something else")?;
            }
        }
        Ok(())
    }

    fn check_json(&self, tuple: &Tuple) -> Result<(), String> {
        let Ok(Decoded { message: Message::Relation(relation), .. }) = decode(&self.relation, false) else {
            return Ok(());
        };
        for only_key in [false, true] {
            let mut json = vec![];
            write_tuple(&relation, tuple, only_key, &mut json);
            // What is embedded as it came need not be JSON here.
            let embeds = relation.columns().any(|column| matches!(column.type_oid, 114 | 3802));
            if embeds || std::str::from_utf8(&json).is_err() {
                continue;
            }
            let object: serde_json::Map<_, _> =
                serde_json::from_slice(&json).map_err(|error| format!("a tuple is not JSON: {error}"))?;
            ensure(object.len() <= names(&relation, tuple, only_key).len(), "members without a column")?;
            for name in names(&relation, tuple, only_key) {
                ensure(std::str::from_utf8(name).is_ok_and(|name| object.contains_key(name)), "a column is missing")?;
            }
        }
        let missing = unchanged(&relation, tuple).count();
        ensure(missing == 0 || !tuple.is_complete(), "complete without all of its columns")
    }

    fn fails(&self, seed: u64, why: &str) -> ExitCode {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        eprintln!("{why}: SEED={seed} in_stream={} limit={}", self.in_stream, self.limit);
        eprintln!("message  {}\nrelation {}", hex(&self.message), hex(&self.relation));
        ExitCode::FAILURE
    }
}

fn ensure(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

/// The tuples of a change, the old one first.
fn tuples<'a>(message: &Message<'a>) -> Vec<Tuple<'a>> {
    match *message {
        Message::Insert { new, .. } => vec![new],
        Message::Update { old, new, .. } => old.into_iter().map(|(_, old)| old).chain([new]).collect(),
        Message::Delete { old: (_, old), .. } => vec![old],
        _ => vec![],
    }
}

/// The bytes of all values.
fn size(tuples: &[Tuple]) -> usize {
    let length = |column| match column {
        Column::Null | Column::Unchanged => 0,
        Column::Text(bytes) | Column::Binary(bytes) | Column::Cut { kept: bytes, .. } => bytes.len(),
    };
    tuples.iter().flat_map(Tuple::columns).map(length).sum()
}

/// The columns that a JSON object of the tuple has.
fn names<'a>(relation: &Relation<'a>, tuple: &Tuple, only_key: bool) -> Vec<&'a [u8]> {
    let columns = relation.columns().zip(tuple.columns());
    let written = columns.filter(|(column, value)| *value != Column::Unchanged && (column.is_key || !only_key));
    written.map(|(column, _)| column.name).collect()
}
