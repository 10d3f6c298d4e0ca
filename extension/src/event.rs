//! What a replication worker tells the collector of its database, as bytes on the way there and as JSON at the end of
//! it. Pure.
//!
//! The worker may be reporting an ERROR when it writes an event, so [`Event::parts`] allocates nothing: it lists what is
//! there already. The messages of the transaction travel as they came ([`crate::pgoutput`]); reading them is the collector's
//! work, in [`Event::to_json`].

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::pgoutput::{self, Message, OldTuple, Relation, write_string, write_tuple};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// An ERROR ended apply or an initial copy.
    Error = 1,
    /// Apply went on, but a change met something else than it expected: a conflict that is no error.
    Silent = 2,
    /// `ALTER SUBSCRIPTION .. SKIP` left out the transaction, all of which has been seen now.
    Skipped = 3,
    /// Not of replication: a transaction that changed the schema is committed. It is told, and no row.
    Schema = 4,
}

/// How the transaction comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Delivery {
    /// None is being applied, or none that we see.
    None = 0,
    /// After its commit, change by change.
    Plain = 1,
    /// While it ran, kept in a file and applied at its commit.
    Streamed = 2,
    /// In two phases, applied when it was prepared.
    Prepared = 3,
    /// An initial copy of a table.
    Copy = 4,
}

impl Delivery {
    fn name(self) -> Option<&'static str> {
        match self {
            Delivery::None => None,
            Delivery::Plain => Some("plain"),
            Delivery::Streamed => Some("streamed"),
            Delivery::Prepared => Some("prepared"),
            Delivery::Copy => Some("copy"),
        }
    }
}

/// Texts of a report, each at most [`MAX_TEXT`] bytes, without a NUL.
pub const TEXTS: [&str; 8] =
    ["message", "message_id", "detail", "context", "schemaname", "relname", "constraint_name", "conflict_type"];
/// The longest text of a report.
pub const MAX_TEXT: usize = 8192;

/// One event, borrowed from wherever it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    pub kind: Kind,
    pub delivery: Delivery,
    /// Oid of the subscription.
    pub subscription: u32,
    /// Oid of the local table of an initial copy; 0 otherwise.
    pub copied: u32,
    pub sqlstate: [u8; 5],
    /// Of the remote transaction; 0 if there is none.
    pub xid: u32,
    /// Where its commit is at the publisher; 0 if that is not known.
    pub lsn: u64,
    /// When it was committed there, in microseconds since 2000; 0 if that is not known.
    pub commit_ts: i64,
    /// When this happened, in microseconds since 2000.
    pub at: i64,
    /// The type of the message being applied; 0 if none.
    pub operation: u8,
    /// Changes of the transaction seen so far.
    pub seen: u32,
    /// The place, counted from 1, of the change being applied; 0 if that is not known.
    pub failing: u32,
    /// Of that change: what tells it from another in the same place; 0 if it is not known.
    pub fingerprint: u64,
    /// The transaction has been seen to its end, and all of its changes are in `changes`.
    pub complete: bool,
    pub texts: [&'a [u8]; TEXTS.len()],
    /// The relation messages that the changes need, and the type messages that those need, each after its length in four bytes.
    pub relations: &'a [u8],
    /// Changes, see [`push_change`].
    pub changes: &'a [u8],
}

/// A fixed part, then the texts, the relations and the changes.
const FIXED: usize = 3 + 5 + 2 + 4 * 5 + 8 * 4;
const LENGTHS: usize = (TEXTS.len() + 2) * 4;

impl Event<'_> {
    /// The bytes of an event, in parts: what has to be made goes into `head`.
    pub fn parts<'p>(&'p self, head: &'p mut [u8; HEAD]) -> [&'p [u8]; TEXTS.len() + 3] {
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            head[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&[self.kind as u8, self.delivery as u8, u8::from(self.complete)]);
        put(&self.sqlstate);
        put(&[self.operation, 0]);
        for word in [self.subscription, self.copied, self.xid, self.seen, self.failing] {
            put(&word.to_le_bytes());
        }
        put(&self.lsn.to_le_bytes());
        put(&self.commit_ts.to_le_bytes());
        put(&self.at.to_le_bytes());
        put(&self.fingerprint.to_le_bytes());
        for blob in self.texts.iter().chain([&self.relations, &self.changes]) {
            put(&(blob.len() as u32).to_le_bytes());
        }
        let mut parts: [&[u8]; TEXTS.len() + 3] = [&[]; TEXTS.len() + 3];
        parts[0] = &head[..];
        parts[1..=TEXTS.len()].copy_from_slice(&self.texts);
        parts[TEXTS.len() + 1] = self.relations;
        parts[TEXTS.len() + 2] = self.changes;
        parts
    }

    /// Reads what [`Event::parts`] wrote; `None` if it is something else.
    pub fn read(record: &[u8]) -> Option<Event<'_>> {
        let mut head = record.get(..HEAD)?;
        let mut take = |length: usize| {
            let (taken, rest) = head.split_at(length);
            head = rest;
            taken
        };
        let flags = take(3);
        let kind = match flags[0] {
            1 => Kind::Error,
            2 => Kind::Silent,
            3 => Kind::Skipped,
            4 => Kind::Schema,
            _ => return None,
        };
        let delivery = match flags[1] {
            0 => Delivery::None,
            1 => Delivery::Plain,
            2 => Delivery::Streamed,
            3 => Delivery::Prepared,
            4 => Delivery::Copy,
            _ => return None,
        };
        let complete = flags[2] != 0;
        let sqlstate = take(5).try_into().ok()?;
        let operation = take(2)[0];
        let mut word = || take(4).try_into().map(u32::from_le_bytes);
        let (subscription, copied, xid, seen, failing) =
            (word().ok()?, word().ok()?, word().ok()?, word().ok()?, word().ok()?);
        let mut long = || take(8).try_into().map(u64::from_le_bytes);
        let (lsn, commit_ts, at) = (long().ok()?, long().ok()? as i64, long().ok()? as i64);
        let fingerprint = long().ok()?;
        let mut rest = &record[HEAD..];
        let mut blob = || {
            let length = u32::from_le_bytes(take(4).try_into().ok()?) as usize;
            let (blob, after) = rest.split_at_checked(length)?;
            rest = after;
            Some(blob)
        };
        let mut texts: [&[u8]; TEXTS.len()] = [&[]; TEXTS.len()];
        for text in &mut texts {
            *text = blob()?;
        }
        let (relations, changes) = (blob()?, blob()?);
        Some(Event {
            kind,
            delivery,
            subscription,
            copied,
            sqlstate,
            xid,
            lsn,
            commit_ts,
            at,
            operation,
            seen,
            failing,
            fingerprint,
            complete,
            texts,
            relations,
            changes,
        })
    }

    /// For `multihome.record()`, in the database's encoding: `kind`, `transaction_kind`, `subscription` (oid), `copied` (oid),
    /// `sqlstate`, `remote_xid`, `remote_commit_lsn`, `remote_commit_ts`, `at`, `operation`, `seen`, `change_number`, `fingerprint`, `complete`,
    /// the texts, and `changes`: an array of {change_number, schemaname, relname, operation, key, tuple, incomplete, unchanged}.
    /// incomplete: the tuple is not all of the row as text, `unchanged` the columns that were not sent. With an error, also
    /// `relations`: what the publisher said of the tables, an array of {schemaname, relname, identity, columns: an array of {name, key,
    /// type, typmod, typeschema, typename}}; the last two of types that are not built in. What is not known is left out.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = Object::new();
        json.text(
            "kind",
            Some(match self.kind {
                Kind::Error => "error",
                Kind::Silent => "silent",
                Kind::Skipped => "skipped",
                Kind::Schema => "schema",
            }),
        );
        json.text("transaction_kind", self.delivery.name());
        json.number("subscription", self.subscription.into());
        json.number("copied", self.copied.into());
        json.bytes("sqlstate", &self.sqlstate);
        json.number("remote_xid", self.xid.into());
        json.text("remote_commit_lsn", (self.lsn != 0).then(|| lsn(self.lsn)).as_deref());
        json.text("remote_commit_ts", (self.commit_ts != 0).then(|| instant(self.commit_ts)).as_deref());
        json.text("at", Some(&instant(self.at)));
        json.text("operation", operation(self.operation));
        json.number("seen", self.seen.into());
        json.number("change_number", self.failing.into());
        if self.fingerprint != 0 {
            json.raw("fingerprint", (self.fingerprint as i64).to_string().as_bytes());
        }
        json.raw("complete", if self.complete { b"true" } else { b"false" });
        for (name, text) in TEXTS.iter().zip(self.texts) {
            if !text.is_empty() {
                json.bytes(name, text);
            }
        }
        json.raw("changes", &self.changes_to_json());
        if self.kind == Kind::Error {
            json.raw("relations", &self.relations_to_json());
        }
        json.close()
    }

    fn relations_to_json(&self) -> Vec<u8> {
        let messages =
            || frames(self.relations).filter_map(|message| Some(pgoutput::decode(message, false).ok()?.message));
        let types: BTreeMap<u32, (&[u8], &[u8])> = messages()
            .filter_map(|message| match message {
                Message::Type { id, namespace, name } => Some((id, (namespace, name))),
                _ => None,
            })
            .collect();
        let column = |column: pgoutput::Attribute| {
            let mut json = Object::new();
            json.bytes("name", column.name);
            json.raw("key", if column.is_key { b"true" } else { b"false" });
            json.number("type", column.type_oid.into());
            json.raw("typmod", column.typmod.to_string().as_bytes());
            if let Some((namespace, name)) = types.get(&column.type_oid) {
                json.bytes("typeschema", schema(namespace));
                json.bytes("typename", name);
            }
            json.close()
        };
        let relations = messages().filter_map(|message| match message {
            Message::Relation(relation) => {
                let mut json = Object::new();
                json.bytes("schemaname", schema(relation.namespace));
                json.bytes("relname", relation.name);
                json.bytes("identity", &[relation.replica_identity]);
                json.raw("columns", &array(relation.columns().map(column)));
                Some(json.close())
            }
            _ => None,
        });
        array(relations)
    }

    fn changes_to_json(&self) -> Vec<u8> {
        let relations: BTreeMap<u32, Relation> = frames(self.relations)
            .filter_map(|message| match pgoutput::decode(message, false).ok()?.message {
                Message::Relation(relation) => Some((relation.id, relation)),
                _ => None,
            })
            .collect();
        array(changes(self.changes).flat_map(|(number, in_stream, message)| {
            let decoded = pgoutput::decode(message, in_stream);
            decoded.map_or_else(|_| Vec::new(), |decoded| one(&relations, number, &decoded.message))
        }))
    }
}

/// As the publisher means it: it leaves its name out.
fn schema(namespace: &[u8]) -> &[u8] {
    if namespace.is_empty() { b"pg_catalog" } else { namespace }
}

/// A JSON array of these.
fn array(items: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut list = vec![b'['];
    for item in items {
        if list.len() > 1 {
            list.extend_from_slice(b", ");
        }
        list.extend_from_slice(&item);
    }
    list.push(b']');
    list
}

/// Length of the head that [`Event::parts`] makes.
pub const HEAD: usize = FIXED + LENGTHS;

/// One message as a JSON object; a TRUNCATE is one for each table.
fn one(relations: &BTreeMap<u32, Relation>, number: u32, message: &Message) -> Vec<Vec<u8>> {
    let begin = |relation: u32, operation: &str| {
        let mut json = Object::new();
        json.number("change_number", number.into());
        if let Some(relation) = relations.get(&relation) {
            json.bytes("schemaname", schema(relation.namespace));
            json.bytes("relname", relation.name);
        }
        json.text("operation", Some(operation));
        json
    };
    let tuple = |json: &mut Object, name: &str, relation: u32, tuple: &pgoutput::Tuple, only_key: bool| {
        if let Some(relation) = relations.get(&relation) {
            let mut text = Vec::new();
            write_tuple(relation, tuple, only_key, &mut text);
            json.raw(name, &text);
            if !only_key && (!tuple.is_complete() || pgoutput::has_lost(relation, tuple)) {
                json.raw("incomplete", b"true");
            }
        }
    };
    match message {
        Message::Insert { relation, new } => {
            let mut json = begin(*relation, "insert");
            tuple(&mut json, "key", *relation, new, true);
            tuple(&mut json, "tuple", *relation, new, false);
            vec![json.close()]
        }
        Message::Update { relation, old, new } => {
            let mut json = begin(*relation, "update");
            match old {
                Some((_, old)) => tuple(&mut json, "key", *relation, old, true),
                None => tuple(&mut json, "key", *relation, new, true),
            }
            tuple(&mut json, "tuple", *relation, new, false);
            if let Some(described) = relations.get(relation) {
                let names: Vec<&[u8]> = pgoutput::unchanged(described, new).collect();
                if !names.is_empty() {
                    let quoted = names.into_iter().map(|name| {
                        let mut text = Vec::new();
                        write_string(name, &mut text);
                        text
                    });
                    json.raw("unchanged", &array(quoted));
                }
            }
            vec![json.close()]
        }
        Message::Delete { relation, old: (kind, old) } => {
            let mut json = begin(*relation, "delete");
            tuple(&mut json, "key", *relation, old, true);
            if *kind == OldTuple::Full {
                tuple(&mut json, "tuple", *relation, old, false);
            }
            vec![json.close()]
        }
        Message::Truncate { relations: tables, .. } => {
            tables.iter().map(|table| begin(table, "truncate").close()).collect()
        }
        _ => Vec::new(),
    }
}

/// What the message of that type does; commits too, for what is deferred to them.
fn operation(message: u8) -> Option<&'static str> {
    match message {
        b'I' => Some("insert"),
        b'U' => Some("update"),
        b'D' => Some("delete"),
        b'T' => Some("truncate"),
        b'C' | b'c' | b'K' | b'P' | b'p' => Some("commit"),
        _ => None,
    }
}

/// Appends a change to the changes of a transaction: its number, whether it came in a stream, its length, itself. Returns
/// where the message begins.
pub fn push_change(changes: &mut Vec<u8>, number: u32, in_stream: bool, write: impl FnOnce(&mut Vec<u8>)) {
    changes.extend_from_slice(&number.to_le_bytes());
    changes.push(in_stream.into());
    push_frame(changes, write);
}

/// Appends bytes, and before them their length.
pub fn push_frame(blob: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let at = blob.len();
    blob.extend_from_slice(&[0; 4]);
    write(blob);
    let length = (blob.len() - at - 4) as u32;
    blob[at..at + 4].copy_from_slice(&length.to_le_bytes());
}

/// What [`push_frame`] wrote.
fn frames(mut blob: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || frame(&mut blob))
}

fn frame<'a>(blob: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, rest) = blob.split_first_chunk::<4>()?;
    let (frame, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    *blob = rest;
    Some(frame)
}

/// What [`push_change`] wrote: number, whether in a stream, message.
pub fn changes(mut blob: &[u8]) -> impl Iterator<Item = (u32, bool, &[u8])> {
    std::iter::from_fn(move || {
        let (number, rest) = blob.split_first_chunk::<4>()?;
        let (in_stream, rest) = rest.split_first()?;
        blob = rest;
        Some((u32::from_le_bytes(*number), *in_stream != 0, frame(&mut blob)?))
    })
}

/// As PostgreSQL writes positions.
fn lsn(lsn: u64) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn as u32)
}

/// Microseconds since 2000 as RFC 3339, which PostgreSQL reads.
fn instant(micros: i64) -> String {
    const EPOCH: Duration = Duration::from_secs(946_684_800);
    let since = |base: SystemTime| match u64::try_from(micros) {
        Ok(after) => base.checked_add(Duration::from_micros(after)),
        Err(_) => base.checked_sub(Duration::from_micros(micros.unsigned_abs())),
    };
    // Nobody commits before 1970 or after 9999.
    let at = since(UNIX_EPOCH + EPOCH).filter(|at| *at >= UNIX_EPOCH).unwrap_or(UNIX_EPOCH);
    let last = UNIX_EPOCH + Duration::from_secs(253_402_300_799);
    humantime::format_rfc3339_micros(at.min(last)).to_string()
}

/// A JSON object being written.
struct Object(Vec<u8>);

impl Object {
    fn new() -> Object {
        Object(vec![b'{'])
    }

    fn raw(&mut self, name: &str, value: &[u8]) {
        if self.0.len() > 1 {
            self.0.extend_from_slice(b", ");
        }
        write_string(name.as_bytes(), &mut self.0);
        self.0.extend_from_slice(b": ");
        self.0.extend_from_slice(value);
    }

    fn bytes(&mut self, name: &str, value: &[u8]) {
        let mut text = Vec::new();
        write_string(value, &mut text);
        self.raw(name, &text);
    }

    fn text(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.bytes(name, value.as_bytes());
        }
    }

    /// Zero stands for unknown.
    fn number(&mut self, name: &str, value: u64) {
        if value != 0 {
            self.raw(name, value.to_string().as_bytes());
        }
    }

    fn close(mut self) -> Vec<u8> {
        self.0.push(b'}');
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn event<'a>(texts: &'a [Vec<u8>], relations: &'a [u8], changes: &'a [u8]) -> Event<'a> {
        let mut all: [&[u8]; TEXTS.len()] = [&[]; TEXTS.len()];
        for (to, from) in all.iter_mut().zip(texts) {
            *to = from;
        }
        Event {
            kind: Kind::Error,
            delivery: Delivery::Plain,
            subscription: 16394,
            copied: 0,
            sqlstate: *b"23505",
            xid: 735,
            lsn: 0x1_0000_00AB,
            commit_ts: 800_000_000_000_000,
            at: 800_000_000_000_001,
            operation: b'I',
            seen: 2,
            failing: 2,
            fingerprint: u64::MAX,
            complete: false,
            texts: all,
            relations,
            changes,
        }
    }

    /// stillebot.t (id bigint key, note text).
    fn relation() -> Vec<u8> {
        let mut message = b"R\0\0\0\x07stillebot\0t\0d\0\x02".to_vec();
        message.extend_from_slice(b"\x01id\0\0\0\0\x14\xff\xff\xff\xff");
        message.extend_from_slice(b"\0note\0\0\0\0\x19\xff\xff\xff\xff");
        message
    }

    proptest! {
        #[test]
        fn an_event_survives_its_way(
            texts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..TEXTS.len()),
            relations in proptest::collection::vec(any::<u8>(), 0..50),
            changes in proptest::collection::vec(any::<u8>(), 0..50),
        ) {
            let event = event(&texts, &relations, &changes);
            let mut head = [0; HEAD];
            let record = event.parts(&mut head).concat();
            prop_assert_eq!(Event::read(&record), Some(event.clone()));
            for length in 0..record.len() {
                prop_assert_eq!(Event::read(&record[..length]), None);
            }
        }

        #[test]
        fn whatever_is_in_the_queue_reading_it_never_panics(record in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(event) = Event::read(&record) {
                let _ = event.to_json();
            }
        }

        #[test]
        fn instants_never_panic(micros in any::<i64>()) {
            prop_assert!(instant(micros).ends_with('Z'));
        }
    }

    #[test]
    fn what_the_publisher_said_of_its_tables_is_told_with_an_error() {
        let mut relations = Vec::new();
        push_frame(&mut relations, |blob| blob.extend_from_slice(b"Y\0\0\x40\x01public\0mood\0"));
        push_frame(&mut relations, |blob| {
            blob.extend_from_slice(b"R\0\0\0\x07\0t\0d\0\x02");
            blob.extend_from_slice(b"\x01id\0\0\0\0\x14\xff\xff\xff\xff");
            blob.extend_from_slice(b"\0mood\0\0\0\x40\x01\xff\xff\xff\xff");
        });
        let error = event(&[], &relations, &[]);
        let json: Value = serde_json::from_slice(&error.to_json()).unwrap();
        let columns = serde_json::json!([
            {"name": "id", "key": true, "type": 20, "typmod": -1},
            {"name": "mood", "key": false, "type": 0x4001, "typmod": -1, "typeschema": "public", "typename": "mood"},
        ]);
        let relation =
            serde_json::json!({"schemaname": "pg_catalog", "relname": "t", "identity": "d", "columns": columns});
        assert_eq!(json["relations"], serde_json::json!([relation]));
        let silent: Value = serde_json::from_slice(&Event { kind: Kind::Silent, ..error }.to_json()).unwrap();
        assert_eq!(silent.get("relations"), None);
    }

    #[test]
    fn a_transaction_is_told_in_json() {
        let mut relations = Vec::new();
        push_frame(&mut relations, |blob| blob.extend_from_slice(&relation()));
        let mut changes = Vec::new();
        push_change(&mut changes, 1, false, |blob| {
            blob.extend_from_slice(b"I\0\0\0\x07N\0\x02t\0\0\0\x013t\0\0\0\x04a\"b\n");
        });
        push_change(&mut changes, 2, false, |blob| blob.extend_from_slice(b"U\0\0\0\x07N\0\x02t\0\0\0\x013u"));
        push_change(&mut changes, 3, true, |blob| blob.extend_from_slice(b"D\0\0\0\x09\0\0\0\x07K\0\x02t\0\0\0\x013n"));
        push_change(&mut changes, 4, false, |blob| blob.extend_from_slice(b"T\0\0\0\x01\0\0\0\0\x07"));
        let texts = [b"duplicate".to_vec()];
        let json: Value = serde_json::from_slice(&event(&texts, &relations, &changes).to_json()).unwrap();
        assert_eq!(json["remote_commit_lsn"], "1/AB");
        assert_eq!(json["remote_commit_ts"], "2025-05-08T06:13:20.000000Z");
        assert_eq!(json["message"], "duplicate");
        assert_eq!(json.get("detail"), None);
        let changes = json["changes"].as_array().unwrap();
        assert_eq!(changes[0]["tuple"], serde_json::json!({"id": "3", "note": "a\"b\n"}));
        assert_eq!(changes[0]["key"], serde_json::json!({"id": "3"}));
        assert_eq!(changes[1]["unchanged"], serde_json::json!(["note"]));
        assert_eq!((changes[0].get("incomplete"), &changes[1]["incomplete"]), (None, &Value::Bool(true)));
        assert_eq!(changes[1]["key"], serde_json::json!({"id": "3"}));
        assert_eq!((&changes[2]["operation"], &changes[2]["key"]), (&"delete".into(), &serde_json::json!({"id": "3"})));
        assert_eq!((&changes[3]["operation"], &changes[3]["relname"]), (&"truncate".into(), &"t".into()));
    }
}
