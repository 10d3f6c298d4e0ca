//! What a publisher sends: the messages of PostgreSQL's logical replication protocol, versions 1 to 4, as the output
//! plugin `pgoutput` of PostgreSQL 16 to 18 writes them. Pure: bytes in, borrowed fields out, nothing allocated.
//!
//! A message here is what follows the 24 bytes of header of a 'w' (XLogData). Sources: the chapter "Logical Replication
//! Message Formats" of PostgreSQL's documentation and src/backend/replication/logical/proto.c.
//!
//! Three jobs: [`decode`] a message, [`shorten`] one that is too big to be kept, and write its tuples as JSON. What a
//! message means to the transaction that it is part of, and which relation a number stands for, is left to others.
//!
//! All text is bytes in the encoding that the subscriber asked for, which is its database's own. No server encoding of
//! PostgreSQL uses ASCII bytes inside of other characters, so quotes and control characters can be found without
//! knowing it.

/// These bytes are not a message of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// A message, and the transaction that it belongs to where the message itself says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded<'a> {
    /// Inside of a stream: the subtransaction (or the transaction itself) that made the change.
    pub subxid: Option<u32>,
    pub message: Message<'a>,
}

/// Positions (`lsn`) are bytes of WAL, instants (`ts`) are microseconds since 2000-01-01 00:00 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    Begin {
        /// Of the commit that ends this transaction.
        final_lsn: u64,
        commit_ts: i64,
        xid: u32,
    },
    Commit {
        commit_lsn: u64,
        end_lsn: u64,
        commit_ts: i64,
    },
    /// The transaction was not made on the publisher, but came there by replication itself.
    Origin {
        /// Of the commit on the origin.
        lsn: u64,
        name: &'a [u8],
    },
    Relation(Relation<'a>),
    Type {
        id: u32,
        /// Empty means pg_catalog.
        namespace: &'a [u8],
        name: &'a [u8],
    },
    Insert {
        relation: u32,
        new: Tuple<'a>,
    },
    Update {
        relation: u32,
        /// Only if the key changed, or with REPLICA IDENTITY FULL.
        old: Option<(OldTuple, Tuple<'a>)>,
        new: Tuple<'a>,
    },
    Delete {
        relation: u32,
        old: (OldTuple, Tuple<'a>),
    },
    Truncate {
        relations: Oids<'a>,
        cascade: bool,
        restart: bool,
    },
    /// Written by `pg_logical_emit_message`; apply ignores it.
    Logical {
        transactional: bool,
        lsn: u64,
        prefix: &'a [u8],
        content: &'a [u8],
    },
    StreamStart {
        xid: u32,
        /// Nothing of this transaction was streamed before.
        first: bool,
    },
    StreamStop,
    StreamCommit {
        xid: u32,
        commit_lsn: u64,
        end_lsn: u64,
        commit_ts: i64,
    },
    StreamAbort {
        xid: u32,
        /// Equal to `xid` if all of it was aborted.
        subxid: u32,
        /// Position and instant of the abort; only sent with `streaming = parallel`.
        abort: Option<(u64, i64)>,
    },
    BeginPrepare {
        prepare_lsn: u64,
        end_lsn: u64,
        prepare_ts: i64,
        xid: u32,
        gid: &'a [u8],
    },
    Prepare {
        prepare_lsn: u64,
        end_lsn: u64,
        prepare_ts: i64,
        xid: u32,
        gid: &'a [u8],
    },
    CommitPrepared {
        commit_lsn: u64,
        end_lsn: u64,
        commit_ts: i64,
        xid: u32,
        gid: &'a [u8],
    },
    RollbackPrepared {
        prepare_end_lsn: u64,
        rollback_end_lsn: u64,
        prepare_ts: i64,
        rollback_ts: i64,
        xid: u32,
        gid: &'a [u8],
    },
    StreamPrepare {
        prepare_lsn: u64,
        end_lsn: u64,
        prepare_ts: i64,
        xid: u32,
        gid: &'a [u8],
    },
}

/// What is known of the row as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldTuple {
    /// The columns of the replica identity; all others are sent as null.
    Key,
    /// The whole row: REPLICA IDENTITY FULL.
    Full,
}

/// What the changes that follow say about a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// Its oid on the publisher, by which the changes name it.
    pub id: u32,
    /// Empty means pg_catalog.
    pub namespace: &'a [u8],
    pub name: &'a [u8],
    /// As in `pg_class.relreplident`: d, n, f or i.
    pub replica_identity: u8,
    count: u16,
    columns: &'a [u8],
}

/// A column of a [`Relation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// Part of the replica identity.
    pub is_key: bool,
    pub name: &'a [u8],
    /// An oid of the publisher: only those of built-in types mean the same here.
    pub type_oid: u32,
    pub typmod: i32,
}

/// The values of a row, in the order of the relation's columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple<'a> {
    count: u16,
    columns: &'a [u8],
}

/// A value of a [`Tuple`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column<'a> {
    Null,
    /// Stored out of line and not changed: the publisher does not send it.
    Unchanged,
    /// As the output function of its type writes it.
    Text(&'a [u8]),
    /// As the send function of its type writes it: `binary = on`.
    Binary(&'a [u8]),
    /// Not of the protocol: what [`shorten`] makes of a value. The byte 'x', the length that it had and the length of
    /// what is kept, four bytes each, and the first bytes of the value.
    Cut {
        whole: u32,
        kept: &'a [u8],
    },
}

/// The tables of a TRUNCATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oids<'a>(&'a [[u8; 4]]);

/// Reads one message. `in_stream`: it comes between StreamStart and StreamStop, where changes carry a transaction id.
///
/// Nothing may follow the message. What an iterator of the result walks through has been checked here.
pub fn decode(message: &[u8], in_stream: bool) -> Result<Decoded<'_>, Malformed> {
    let mut from = Reader(message);
    let kind = from.u8()?;
    let subxid = match kind {
        b'I' | b'U' | b'D' | b'T' | b'R' | b'Y' | b'M' if in_stream => Some(from.u32()?),
        _ => None,
    };
    let message = match kind {
        b'B' => Message::Begin { final_lsn: from.u64()?, commit_ts: from.i64()?, xid: from.u32()? },
        b'C' => {
            from.no_flags()?;
            Message::Commit { commit_lsn: from.u64()?, end_lsn: from.u64()?, commit_ts: from.i64()? }
        }
        b'O' => Message::Origin { lsn: from.u64()?, name: from.name()? },
        b'R' => Message::Relation(from.relation()?),
        b'Y' => Message::Type { id: from.u32()?, namespace: from.name()?, name: from.name()? },
        b'I' => Message::Insert { relation: from.u32()?, new: from.new_tuple()? },
        b'U' => Message::Update {
            relation: from.u32()?,
            old: if from.0.first() == Some(&b'N') { None } else { Some(from.old_tuple()?) },
            new: from.new_tuple()?,
        },
        b'D' => Message::Delete { relation: from.u32()?, old: from.old_tuple()? },
        b'T' => {
            let (count, flags) = (from.u32()?, from.u8()?);
            let (relations, rest) = from.0.as_chunks();
            if !rest.is_empty() || relations.len() != count as usize {
                return Err(Malformed);
            }
            from.0 = rest;
            Message::Truncate { relations: Oids(relations), cascade: flags & 1 != 0, restart: flags & 2 != 0 }
        }
        b'M' => Message::Logical {
            transactional: from.u8()? & 1 != 0,
            lsn: from.u64()?,
            prefix: from.name()?,
            content: from.counted()?,
        },
        b'S' => Message::StreamStart { xid: from.u32()?, first: from.u8()? == 1 },
        b'E' => Message::StreamStop,
        b'c' => {
            let xid = from.u32()?;
            from.no_flags()?;
            Message::StreamCommit { xid, commit_lsn: from.u64()?, end_lsn: from.u64()?, commit_ts: from.i64()? }
        }
        b'A' => Message::StreamAbort {
            xid: from.u32()?,
            subxid: from.u32()?,
            abort: if from.0.is_empty() { None } else { Some((from.u64()?, from.i64()?)) },
        },
        b'b' => Message::BeginPrepare {
            prepare_lsn: from.u64()?,
            end_lsn: from.u64()?,
            prepare_ts: from.i64()?,
            xid: from.u32()?,
            gid: from.name()?,
        },
        b'P' => {
            from.no_flags()?;
            Message::Prepare {
                prepare_lsn: from.u64()?,
                end_lsn: from.u64()?,
                prepare_ts: from.i64()?,
                xid: from.u32()?,
                gid: from.name()?,
            }
        }
        b'K' => {
            from.no_flags()?;
            Message::CommitPrepared {
                commit_lsn: from.u64()?,
                end_lsn: from.u64()?,
                commit_ts: from.i64()?,
                xid: from.u32()?,
                gid: from.name()?,
            }
        }
        b'r' => {
            from.no_flags()?;
            Message::RollbackPrepared {
                prepare_end_lsn: from.u64()?,
                rollback_end_lsn: from.u64()?,
                prepare_ts: from.i64()?,
                rollback_ts: from.i64()?,
                xid: from.u32()?,
                gid: from.name()?,
            }
        }
        b'p' => {
            from.no_flags()?;
            Message::StreamPrepare {
                prepare_lsn: from.u64()?,
                end_lsn: from.u64()?,
                prepare_ts: from.i64()?,
                xid: from.u32()?,
                gid: from.name()?,
            }
        }
        _ => return Err(Malformed),
    };
    if from.0.is_empty() { Ok(Decoded { subxid, message }) } else { Err(Malformed) }
}

impl<'a> Relation<'a> {
    /// Its columns that are published.
    pub fn columns(&self) -> impl Iterator<Item = Attribute<'a>> + use<'a> {
        let mut from = Reader(self.columns);
        (0..self.count).map_while(move |_| from.attribute().ok())
    }
}

impl<'a> Tuple<'a> {
    /// Its values, one for each published column.
    pub fn columns(&self) -> impl Iterator<Item = Column<'a>> + use<'a> {
        let mut from = Reader(self.columns);
        (0..self.count).map_while(move |_| from.column().ok())
    }

    /// Whether every value is here and whole. The nulls of a [`OldTuple::Key`] count as values.
    pub fn is_complete(&self) -> bool {
        self.columns().all(|column| !matches!(column, Column::Unchanged | Column::Cut { .. }))
    }

    /// How many bytes of values it has, if each has at most `threshold`.
    fn size(&self, threshold: usize) -> usize {
        self.columns().map(|column| column.bytes().len().min(threshold)).sum()
    }
}

impl<'a> Column<'a> {
    /// The bytes of its value that are here.
    fn bytes(&self) -> &'a [u8] {
        match *self {
            Column::Null | Column::Unchanged => &[],
            Column::Text(bytes) | Column::Binary(bytes) | Column::Cut { kept: bytes, .. } => bytes,
        }
    }
}

impl<'a> Oids<'a> {
    /// The tables' oids on the publisher.
    pub fn iter(&self) -> impl Iterator<Item = u32> + use<'a> {
        self.0.iter().map(|bytes| u32::from_be_bytes(*bytes))
    }
}

/// The columns whose values the publisher did not send, for they are stored out of line and have not changed.
pub fn unchanged<'a>(relation: &Relation<'a>, tuple: &Tuple<'a>) -> impl Iterator<Item = &'a [u8]> + use<'a> {
    let columns = relation.columns().zip(tuple.columns());
    columns.filter(|(_, value)| *value == Column::Unchanged).map(|(column, _)| column.name)
}

/// What is left to read of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const LENGTH: usize>(&mut self) -> Result<[u8; LENGTH], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    fn i32(&mut self) -> Result<i32, Malformed> {
        self.array().map(i32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64, Malformed> {
        self.array().map(i64::from_be_bytes)
    }

    /// Flags without a meaning yet: like PostgreSQL, refuse what may change how the rest is to be read.
    fn no_flags(&mut self) -> Result<(), Malformed> {
        if self.u8()? == 0 { Ok(()) } else { Err(Malformed) }
    }

    /// Text that ends with a zero byte.
    fn name(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.0.iter().position(|&byte| byte == 0).ok_or(Malformed)?;
        let name = self.take(length)?;
        self.u8()?;
        Ok(name)
    }

    /// Bytes with their number before them.
    fn counted(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    fn relation(&mut self) -> Result<Relation<'a>, Malformed> {
        let (id, namespace, name) = (self.u32()?, self.name()?, self.name()?);
        let (replica_identity, count) = (self.u8()?, self.u16()?);
        let columns = self.repeated(count, |from| from.attribute().map(drop))?;
        Ok(Relation { id, namespace, name, replica_identity, count, columns })
    }

    fn attribute(&mut self) -> Result<Attribute<'a>, Malformed> {
        Ok(Attribute { is_key: self.u8()? & 1 != 0, name: self.name()?, type_oid: self.u32()?, typmod: self.i32()? })
    }

    fn new_tuple(&mut self) -> Result<Tuple<'a>, Malformed> {
        if self.u8()? == b'N' { self.tuple() } else { Err(Malformed) }
    }

    fn old_tuple(&mut self) -> Result<(OldTuple, Tuple<'a>), Malformed> {
        let kind = match self.u8()? {
            b'K' => OldTuple::Key,
            b'O' => OldTuple::Full,
            _ => return Err(Malformed),
        };
        Ok((kind, self.tuple()?))
    }

    fn tuple(&mut self) -> Result<Tuple<'a>, Malformed> {
        let count = self.u16()?;
        let columns = self.repeated(count, |from| from.column().map(drop))?;
        Ok(Tuple { count, columns })
    }

    fn column(&mut self) -> Result<Column<'a>, Malformed> {
        Ok(match self.u8()? {
            b'n' => Column::Null,
            b'u' => Column::Unchanged,
            b't' => Column::Text(self.counted()?),
            b'b' => Column::Binary(self.counted()?),
            b'x' => Column::Cut { whole: self.u32()?, kept: self.counted()? },
            _ => return Err(Malformed),
        })
    }

    /// The bytes of `count` things that can be read one after the other.
    fn repeated(
        &mut self,
        count: u16,
        read: impl Fn(&mut Reader<'a>) -> Result<(), Malformed>,
    ) -> Result<&'a [u8], Malformed> {
        let start = self.0;
        for _ in 0..count {
            read(self)?;
        }
        Ok(&start[..start.len() - self.0.len()])
    }
}

/// Appends the message to `out` with at most `limit` bytes of column values, and says whether something had to go.
///
/// What fits is copied as it is, and so is every message that is not an insert, update or delete, whatever its length.
/// Otherwise the longest values are cut, all to the same length, and become [`Column::Cut`]: text keeps its beginning,
/// up to the end of a character, while part of a binary value would mean nothing and is left out. The frame around the
/// values, up to nine bytes per column, does not count. Nothing is appended of a longer message that is malformed: its
/// first bytes might read as another message.
pub fn shorten(message: &[u8], in_stream: bool, limit: usize, out: &mut Vec<u8>) -> bool {
    if message.len() <= limit {
        out.extend_from_slice(message);
        return false;
    }
    let Ok(Decoded { subxid, message: decoded }) = decode(message, in_stream) else {
        return true;
    };
    let (relation, old, new) = match decoded {
        Message::Insert { relation, new } => (relation, None, Some(new)),
        Message::Update { relation, old, new } => (relation, old, Some(new)),
        Message::Delete { relation, old } => (relation, Some(old), None),
        _ => {
            out.extend_from_slice(message);
            return false;
        }
    };
    let size =
        |threshold| old.map_or(0, |(_, tuple)| tuple.size(threshold)) + new.map_or(0, |tuple| tuple.size(threshold));
    if size(usize::MAX) <= limit {
        out.extend_from_slice(message);
        return false;
    }

    // The greatest threshold that fits, by bisection: `fits` always does, `exceeds` never.
    let (mut fits, mut exceeds) = (0, message.len());
    while exceeds - fits > 1 {
        let middle = fits + (exceeds - fits) / 2;
        if size(middle) <= limit {
            fits = middle;
        } else {
            exceeds = middle;
        }
    }

    out.push(message[0]);
    if let Some(subxid) = subxid {
        out.extend_from_slice(&subxid.to_be_bytes());
    }
    out.extend_from_slice(&relation.to_be_bytes());
    if let Some((kind, tuple)) = old {
        out.push(if kind == OldTuple::Key { b'K' } else { b'O' });
        put_tuple(&tuple, fits, out);
    }
    if let Some(tuple) = new {
        out.push(b'N');
        put_tuple(&tuple, fits, out);
    }
    true
}

/// The tuple as in a message, its values cut to the threshold.
fn put_tuple(tuple: &Tuple, threshold: usize, out: &mut Vec<u8>) {
    out.extend_from_slice(&tuple.count.to_be_bytes());
    for column in tuple.columns() {
        let bytes = column.bytes();
        // The lengths were read from four bytes each, so they fit there again.
        let cut = match column {
            Column::Text(_) if bytes.len() > threshold => {
                Column::Cut { whole: bytes.len() as u32, kept: beginning(bytes, threshold) }
            }
            Column::Binary(_) if bytes.len() > threshold => Column::Cut { whole: bytes.len() as u32, kept: &[] },
            Column::Cut { whole, kept } => Column::Cut { whole, kept: beginning(kept, threshold) },
            as_it_is => as_it_is,
        };
        put_column(&cut, out);
    }
}

/// A value as in a message.
fn put_column(column: &Column, out: &mut Vec<u8>) {
    match column {
        Column::Null => return out.push(b'n'),
        Column::Unchanged => return out.push(b'u'),
        Column::Text(_) => out.push(b't'),
        Column::Binary(_) => out.push(b'b'),
        Column::Cut { whole, .. } => {
            out.push(b'x');
            out.extend_from_slice(&whole.to_be_bytes());
        }
    }
    let bytes = column.bytes();
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// The first bytes of a text, at most `length`, up to the end of a character.
fn beginning(text: &[u8], length: usize) -> &[u8] {
    let Some(beginning) = text.get(..length) else {
        return text;
    };
    let end = match std::str::from_utf8(beginning) {
        Ok(_) => length,
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        // Another encoding than UTF-8. In all of them a character ends with every byte of ASCII.
        Err(_) => beginning.iter().rposition(u8::is_ascii).map_or(0, |last| last + 1),
    };
    &beginning[..end]
}

/// The type json.
pub const JSON: u32 = 114;
const JSONB: u32 = 3802;

/// Writes the tuple as a JSON object in the database's encoding, one member per column; `only_key`: of the replica
/// identity only.
///
/// Text is a string, but for columns of type json and jsonb, whose value is embedded as it came. A value that was cut is
/// `{"cut": 100000, "begin": "its first .."}`, as is JSON with a NUL character in it, a binary one `{"binary": "00ff"}`. What
/// was not sent is left out, and so is what has no counterpart if relation and tuple do not have the same number of columns.
pub fn write_tuple(relation: &Relation, tuple: &Tuple, only_key: bool, out: &mut Vec<u8>) {
    out.push(b'{');
    let mut separator: &[u8] = b"";
    for (column, value) in relation.columns().zip(tuple.columns()) {
        if value == Column::Unchanged || only_key && !column.is_key {
            continue;
        }
        out.extend_from_slice(separator);
        separator = b", ";
        write_string(column.name, out);
        out.extend_from_slice(b": ");
        match value {
            Column::Null | Column::Unchanged => out.extend_from_slice(b"null"),
            Column::Text(json) if has_nul(&column, json) => cut(json.len(), json, out),
            Column::Text(json) if matches!(column.type_oid, JSON | JSONB) => out.extend_from_slice(json),
            Column::Text(text) => write_string(text, out),
            Column::Binary(bytes) => {
                out.extend_from_slice(b"{\"binary\": \"");
                bytes.iter().for_each(|&byte| write_hex(byte, out));
                out.extend_from_slice(b"\"}");
            }
            Column::Cut { whole, kept } => cut(whole as usize, kept, out),
        }
    }
    out.push(b'}');
}

/// Whether [`write_tuple`] writes some value of the tuple as one that is not whole, although all of it is there.
pub fn has_lost(relation: &Relation, tuple: &Tuple) -> bool {
    relation.columns().zip(tuple.columns()).any(|(column, value)| match value {
        Column::Binary(_) => true,
        Column::Text(json) => has_nul(&column, json),
        _ => false,
    })
}

/// Whether a value is JSON that type json takes and jsonb, as which it is kept, does not. The escape of a backslash before
/// `u0000` is taken for it too.
fn has_nul(column: &Attribute, json: &[u8]) -> bool {
    column.type_oid == JSON && json.windows(6).any(|part| part == br"\u0000")
}

fn cut(whole: usize, kept: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"cut\": ");
    out.extend_from_slice(whole.to_string().as_bytes());
    out.extend_from_slice(b", \"begin\": ");
    write_string(kept, out);
    out.push(b'}');
}

/// Writes text as a JSON string. What is beyond ASCII passes as it is, so the result has the encoding of the text.
pub fn write_string(text: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    for &byte in text {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            0..b' ' => {
                out.extend_from_slice(b"\\u00");
                write_hex(byte, out);
            }
            _ => out.push(byte),
        }
    }
    out.push(b'"');
}

fn write_hex(byte: u8, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.extend_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use serde_json::{Value, json};

    /// A value that owns its bytes.
    #[derive(Clone, Debug)]
    enum Held {
        Null,
        Unchanged,
        Text(String),
        Binary(Vec<u8>),
        /// What is kept, and how much longer the whole was.
        Cut(String, u32),
    }

    impl Held {
        fn column(&self) -> Column<'_> {
            match self {
                Held::Null => Column::Null,
                Held::Unchanged => Column::Unchanged,
                Held::Text(text) => Column::Text(text.as_bytes()),
                Held::Binary(bytes) => Column::Binary(bytes),
                Held::Cut(kept, more) => Column::Cut { whole: kept.len() as u32 + more, kept: kept.as_bytes() },
            }
        }
    }

    fn values() -> impl Strategy<Value = Held> {
        prop_oneof![
            Just(Held::Null),
            Just(Held::Unchanged),
            "\\PC{0,30}".prop_map(Held::Text),
            any::<String>().prop_map(Held::Text),
            vec(any::<u8>(), 0..40).prop_map(Held::Binary),
            ("\\PC{0,20}", 0u32..1000).prop_map(|(kept, more)| Held::Cut(kept, more)),
        ]
    }

    fn names() -> impl Strategy<Value = Vec<u8>> {
        vec(1u8.., 0..20)
    }

    /// What a message may consist of; `form` says of which message.
    #[derive(Clone, Debug)]
    struct Parts {
        form: usize,
        subxid: Option<u32>,
        lsns: [u64; 2],
        instants: [i64; 2],
        xids: [u32; 2],
        flags: [bool; 2],
        names: [Vec<u8>; 2],
        tuples: [Vec<Held>; 2],
        old: Option<bool>,
        attributes: Vec<(bool, Vec<u8>, u32, i32)>,
        oids: Vec<[u8; 4]>,
    }

    const FORMS: usize = 19;
    /// The forms that carry tuples.
    const CHANGES: [usize; 3] = [5, 6, 7];

    prop_compose! {
        fn parts(forms: std::ops::Range<usize>)(
            form in forms,
            subxid in proptest::option::of(any::<u32>()),
            (lsns, instants, xids, flags) in any::<([u64; 2], [i64; 2], [u32; 2], [bool; 2])>(),
            names in [names(), names()],
            tuples in [vec(values(), 0..6), vec(values(), 0..6)],
            old in any::<Option<bool>>(),
            attributes in vec((any::<bool>(), names(), any::<u32>(), any::<i32>()), 0..6),
            oids in vec(any::<[u8; 4]>(), 0..6),
        ) -> Parts {
            Parts { form, subxid, lsns, instants, xids, flags, names, tuples, old, attributes, oids }
        }
    }

    impl Parts {
        /// The columns of tuples and relation as bytes, for [`Parts::decoded`] to borrow.
        fn columns(&self) -> [Vec<u8>; 3] {
            let mut bytes: [Vec<u8>; 3] = Default::default();
            for (tuple, bytes) in self.tuples.iter().zip(&mut bytes) {
                for value in tuple {
                    let (kind, whole, value): (u8, Option<u32>, Option<&[u8]>) = match value.column() {
                        Column::Null => (b'n', None, None),
                        Column::Unchanged => (b'u', None, None),
                        Column::Text(text) => (b't', None, Some(text)),
                        Column::Binary(value) => (b'b', None, Some(value)),
                        Column::Cut { whole, kept } => (b'x', Some(whole), Some(kept)),
                    };
                    bytes.push(kind);
                    whole.iter().for_each(|whole| bytes.extend(whole.to_be_bytes()));
                    value.iter().for_each(|value| bytes.extend((value.len() as u32).to_be_bytes()));
                    value.iter().for_each(|value| bytes.extend(*value));
                }
            }
            for (key, name, oid, typmod) in &self.attributes {
                bytes[2].push(u8::from(*key));
                bytes[2].extend(name);
                bytes[2].push(0);
                bytes[2].extend(oid.to_be_bytes());
                bytes[2].extend(typmod.to_be_bytes());
            }
            bytes
        }

        fn decoded<'a>(&'a self, columns: &'a [Vec<u8>; 3]) -> Decoded<'a> {
            let [a, b] = self.lsns;
            let [at, then] = self.instants;
            let [xid, subxid] = self.xids;
            let [name, prefix] = self.names.each_ref().map(|name| &name[..]);
            let [new, before] = [0, 1].map(|n| Tuple { count: self.tuples[n].len() as u16, columns: &columns[n] });
            let old = |full| (if full { OldTuple::Full } else { OldTuple::Key }, before);
            let message = match self.form {
                0 => Message::Begin { final_lsn: a, commit_ts: at, xid },
                1 => Message::Commit { commit_lsn: a, end_lsn: b, commit_ts: at },
                2 => Message::Origin { lsn: a, name },
                3 => Message::Relation(Relation {
                    id: xid,
                    namespace: prefix,
                    name,
                    replica_identity: b'd',
                    count: self.attributes.len() as u16,
                    columns: &columns[2],
                }),
                4 => Message::Type { id: xid, namespace: prefix, name },
                5 => Message::Insert { relation: xid, new },
                6 => Message::Update { relation: xid, old: self.old.map(old), new },
                7 => Message::Delete { relation: xid, old: old(self.old.is_some()) },
                8 => Message::Truncate { relations: Oids(&self.oids), cascade: self.flags[0], restart: self.flags[1] },
                9 => Message::Logical { transactional: self.flags[0], lsn: a, prefix, content: name },
                10 => Message::StreamStart { xid, first: self.flags[0] },
                11 => Message::StreamStop,
                12 => Message::StreamCommit { xid, commit_lsn: a, end_lsn: b, commit_ts: at },
                13 => Message::StreamAbort { xid, subxid, abort: self.old.map(|_| (a, at)) },
                14 => Message::BeginPrepare { prepare_lsn: a, end_lsn: b, prepare_ts: at, xid, gid: name },
                15 => Message::Prepare { prepare_lsn: a, end_lsn: b, prepare_ts: at, xid, gid: name },
                16 => Message::CommitPrepared { commit_lsn: a, end_lsn: b, commit_ts: at, xid, gid: name },
                17 => Message::RollbackPrepared {
                    prepare_end_lsn: a,
                    rollback_end_lsn: b,
                    prepare_ts: at,
                    rollback_ts: then,
                    xid,
                    gid: name,
                },
                _ => Message::StreamPrepare { prepare_lsn: a, end_lsn: b, prepare_ts: at, xid, gid: name },
            };
            Decoded { subxid: self.subxid.filter(|_| (3..10).contains(&self.form)), message }
        }
    }

    /// The message as the publisher writes it.
    fn encode(decoded: &Decoded) -> Vec<u8> {
        struct Writer(Vec<u8>);
        impl Writer {
            fn put(mut self, bytes: impl AsRef<[u8]>) -> Writer {
                self.0.extend_from_slice(bytes.as_ref());
                self
            }
            fn name(self, name: &[u8]) -> Writer {
                self.put(name).put([0])
            }
            fn tuple(self, kind: u8, tuple: &Tuple) -> Writer {
                self.put([kind]).put(tuple.count.to_be_bytes()).put(tuple.columns)
            }
            fn old(self, (kind, tuple): &(OldTuple, Tuple)) -> Writer {
                self.tuple(if *kind == OldTuple::Full { b'O' } else { b'K' }, tuple)
            }
            fn three(self, a: u64, b: u64, at: i64) -> Writer {
                self.put(a.to_be_bytes()).put(b.to_be_bytes()).put(at.to_be_bytes())
            }
        }

        let subxid = decoded.subxid.map_or(vec![], |xid| xid.to_be_bytes().to_vec());
        let start = |kind: u8| Writer(vec![kind]).put(&subxid);
        match decoded.message {
            Message::Begin { final_lsn, commit_ts, xid } => {
                start(b'B').put(final_lsn.to_be_bytes()).put(commit_ts.to_be_bytes()).put(xid.to_be_bytes())
            }
            Message::Commit { commit_lsn, end_lsn, commit_ts } => {
                start(b'C').put([0]).three(commit_lsn, end_lsn, commit_ts)
            }
            Message::Origin { lsn, name } => start(b'O').put(lsn.to_be_bytes()).name(name),
            Message::Relation(Relation { id, namespace, name, replica_identity, count, columns }) => start(b'R')
                .put(id.to_be_bytes())
                .name(namespace)
                .name(name)
                .put([replica_identity])
                .put(count.to_be_bytes())
                .put(columns),
            Message::Type { id, namespace, name } => start(b'Y').put(id.to_be_bytes()).name(namespace).name(name),
            Message::Insert { relation, new } => start(b'I').put(relation.to_be_bytes()).tuple(b'N', &new),
            Message::Update { relation, old, new } => {
                let writer = start(b'U').put(relation.to_be_bytes());
                match &old {
                    Some(old) => writer.old(old),
                    None => writer,
                }
                .tuple(b'N', &new)
            }
            Message::Delete { relation, old } => start(b'D').put(relation.to_be_bytes()).old(&old),
            Message::Truncate { relations, cascade, restart } => start(b'T')
                .put((relations.0.len() as u32).to_be_bytes())
                .put([u8::from(cascade) | u8::from(restart) << 1])
                .put(relations.0.as_flattened()),
            Message::Logical { transactional, lsn, prefix, content } => start(b'M')
                .put([u8::from(transactional)])
                .put(lsn.to_be_bytes())
                .name(prefix)
                .put((content.len() as u32).to_be_bytes())
                .put(content),
            Message::StreamStart { xid, first } => start(b'S').put(xid.to_be_bytes()).put([u8::from(first)]),
            Message::StreamStop => start(b'E'),
            Message::StreamCommit { xid, commit_lsn, end_lsn, commit_ts } => {
                start(b'c').put(xid.to_be_bytes()).put([0]).three(commit_lsn, end_lsn, commit_ts)
            }
            Message::StreamAbort { xid, subxid, abort } => {
                let writer = start(b'A').put(xid.to_be_bytes()).put(subxid.to_be_bytes());
                match abort {
                    Some((lsn, at)) => writer.put(lsn.to_be_bytes()).put(at.to_be_bytes()),
                    None => writer,
                }
            }
            Message::BeginPrepare { prepare_lsn, end_lsn, prepare_ts, xid, gid } => {
                start(b'b').three(prepare_lsn, end_lsn, prepare_ts).put(xid.to_be_bytes()).name(gid)
            }
            Message::Prepare { prepare_lsn, end_lsn, prepare_ts, xid, gid } => {
                start(b'P').put([0]).three(prepare_lsn, end_lsn, prepare_ts).put(xid.to_be_bytes()).name(gid)
            }
            Message::CommitPrepared { commit_lsn, end_lsn, commit_ts, xid, gid } => {
                start(b'K').put([0]).three(commit_lsn, end_lsn, commit_ts).put(xid.to_be_bytes()).name(gid)
            }
            Message::RollbackPrepared { prepare_end_lsn, rollback_end_lsn, prepare_ts, rollback_ts, xid, gid } => {
                start(b'r')
                    .put([0])
                    .three(prepare_end_lsn, rollback_end_lsn, prepare_ts)
                    .put(rollback_ts.to_be_bytes())
                    .put(xid.to_be_bytes())
                    .name(gid)
            }
            Message::StreamPrepare { prepare_lsn, end_lsn, prepare_ts, xid, gid } => {
                start(b'p').put([0]).three(prepare_lsn, end_lsn, prepare_ts).put(xid.to_be_bytes()).name(gid)
            }
        }
        .0
    }

    /// The values of a change, old ones first.
    fn columns<'a>(message: &Message<'a>) -> Vec<Column<'a>> {
        match message {
            Message::Insert { new, .. } => new.columns().collect(),
            Message::Update { old: Some((_, old)), new, .. } => old.columns().chain(new.columns()).collect(),
            Message::Update { old: None, new, .. } => new.columns().collect(),
            Message::Delete { old: (_, old), .. } => old.columns().collect(),
            _ => vec![],
        }
    }

    /// A relation with the columns c0, c1, .. of type text, the first of them the key.
    fn relation(columns: usize, bytes: &mut Vec<u8>) -> Relation<'_> {
        for n in 0..columns {
            bytes.push(u8::from(n == 0));
            bytes.extend(format!("c{n}\0").as_bytes());
            bytes.extend([25u32.to_be_bytes(), (-1i32).to_be_bytes()].as_flattened());
        }
        Relation {
            id: 1,
            namespace: b"public",
            name: b"t",
            replica_identity: b'd',
            count: columns as u16,
            columns: bytes,
        }
    }

    proptest! {
        #[test]
        fn a_message_survives_being_written_and_read(parts in parts(0..FORMS)) {
            let bytes = parts.columns();
            let decoded = parts.decoded(&bytes);
            let in_stream = decoded.subxid.is_some();
            let message = encode(&decoded);
            prop_assert_eq!(decode(&message, in_stream), Ok(decoded));

            for (tuple, bytes) in parts.tuples.iter().zip(&bytes) {
                let columns = Tuple { count: tuple.len() as u16, columns: bytes }.columns();
                prop_assert!(columns.eq(tuple.iter().map(Held::column)));
            }
            if let Message::Relation(relation) = decoded.message {
                let attributes = relation.columns().map(|it| (it.is_key, it.name.to_vec(), it.type_oid, it.typmod));
                prop_assert!(attributes.eq(parts.attributes.iter().cloned()));
            }
            if let Message::Truncate { relations, .. } = decoded.message {
                prop_assert!(relations.iter().eq(parts.oids.iter().map(|oid| u32::from_be_bytes(*oid))));
            }
        }

        #[test]
        fn part_of_a_message_or_more_than_one_is_refused(parts in parts(0..FORMS), more in any::<u8>()) {
            let bytes = parts.columns();
            let decoded = parts.decoded(&bytes);
            let in_stream = decoded.subxid.is_some();
            let mut message = encode(&decoded);
            for length in 0..message.len() {
                // The one message with an optional end.
                let short = matches!(decoded.message, Message::StreamAbort { abort: Some(_), .. }) && length == 9;
                prop_assert_eq!(decode(&message[..length], in_stream).is_ok(), short);
            }
            message.push(more);
            prop_assert_eq!(decode(&message, in_stream), Err(Malformed));
        }

        #[test]
        fn no_bytes_make_it_panic(
            kind in proptest::option::of(proptest::sample::select(b"BCORYIUDTMSEcAbPKrp".to_vec())),
            rest in vec(prop_oneof![any::<u8>(), Just(0), proptest::sample::select(b"NKOnutbx".to_vec())], 0..200),
            in_stream: bool,
            limit in 0usize..200,
        ) {
            let message: Vec<u8> = kind.into_iter().chain(rest).collect();
            let mut out = vec![];
            shorten(&message, in_stream, limit, &mut out);
            if let Ok(Decoded { message, .. }) = decode(&message, in_stream) {
                let mut bytes = vec![];
                let relation = relation(8, &mut bytes);
                if let Message::Insert { new: tuple, .. } | Message::Delete { old: (_, tuple), .. } = message {
                    write_tuple(&relation, &tuple, false, &mut out);
                    prop_assert!(unchanged(&relation, &tuple).count() <= tuple.columns().count());
                }
            }
        }

        #[test]
        fn a_shortened_change_has_its_columns_and_no_byte_too_many(
            parts in parts(CHANGES[0]..CHANGES[2] + 1),
            limit in 0usize..300,
        ) {
            let bytes = parts.columns();
            let decoded = parts.decoded(&bytes);
            let in_stream = decoded.subxid.is_some();
            let message = encode(&decoded);
            let before = columns(&decoded.message);
            let size = |columns: &[Column]| columns.iter().map(|column| column.bytes().len()).sum::<usize>();

            let mut out = b"before".to_vec();
            let cut = shorten(&message, in_stream, limit, &mut out);
            prop_assert_eq!(&out[..6], b"before");
            prop_assert_eq!(cut, size(&before) > limit);
            if !cut {
                prop_assert_eq!(&out[6..], &message);
                return Ok(());
            }
            let short = decode(&out[6..], in_stream);
            prop_assert_eq!(short.map(|short| short.subxid), Ok(decoded.subxid));
            let short = short.unwrap().message;
            let after = columns(&short);
            prop_assert_eq!(std::mem::discriminant(&short), std::mem::discriminant(&decoded.message));
            prop_assert_eq!(after.len(), before.len());
            prop_assert!(size(&after) <= limit);

            // The greatest length for all that fits, found the slow way.
            let threshold = (0..).take_while(|threshold| {
                before.iter().map(|column| column.bytes().len().min(*threshold)).sum::<usize>() <= limit
            }).last().unwrap();
            for (before, after) in before.into_iter().zip(after) {
                let fits = before.bytes().len() <= threshold;
                match (before, after) {
                    _ if fits => prop_assert_eq!(before, after),
                    (Column::Text(text), Column::Cut { whole, kept }) => {
                        prop_assert_eq!(whole as usize, text.len());
                        prop_assert!(text.starts_with(kept) && std::str::from_utf8(kept).is_ok());
                        prop_assert!(kept.len() <= threshold && kept.len() + 4 > threshold);
                    }
                    (Column::Binary(bytes), after) => {
                        prop_assert_eq!(after, Column::Cut { whole: bytes.len() as u32, kept: &[] });
                    }
                    (Column::Cut { whole, kept }, Column::Cut { whole: still, kept: less }) => {
                        prop_assert_eq!(whole, still);
                        prop_assert!(kept.starts_with(less) && less.len() <= threshold);
                    }
                    _ => prop_assert!(false, "{before:?} became {after:?}"),
                }
            }
        }

        #[test]
        fn what_is_not_a_change_is_never_shortened(parts in parts(8..FORMS)) {
            let bytes = parts.columns();
            let decoded = parts.decoded(&bytes);
            let (message, mut out) = (encode(&decoded), vec![]);
            prop_assert!(!shorten(&message, decoded.subxid.is_some(), 0, &mut out));
            prop_assert_eq!(out, message);
        }

        #[test]
        fn a_string_survives_being_json(text: String) {
            let mut out = vec![];
            write_string(text.as_bytes(), &mut out);
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }

        #[test]
        fn a_tuple_is_a_json_object(values in vec(values(), 0..8), columns in 0usize..8, only_key: bool) {
            let (parts, mut bytes, mut out) = (Parts { tuples: [values.clone(), vec![]], ..empty() }, vec![], vec![]);
            let buffers = parts.columns();
            let tuple = Tuple { count: values.len() as u16, columns: &buffers[0] };
            let relation = relation(columns, &mut bytes);
            write_tuple(&relation, &tuple, only_key, &mut out);

            let mut expected = serde_json::Map::new();
            let mut left_out = vec![];
            for (n, value) in values.iter().enumerate().take(columns) {
                let value = match value {
                    Held::Null => Value::Null,
                    Held::Unchanged => {
                        left_out.push(format!("c{n}").into_bytes());
                        continue;
                    }
                    Held::Text(text) => json!(text),
                    Held::Binary(bytes) => {
                        json!({ "binary": bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() })
                    }
                    Held::Cut(kept, more) => json!({ "cut": kept.len() + *more as usize, "begin": kept }),
                };
                if n == 0 || !only_key {
                    expected.insert(format!("c{n}"), value);
                }
            }
            prop_assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), Value::Object(expected));
            prop_assert!(unchanged(&relation, &tuple).eq(left_out));
            let whole = values.iter().all(|value| !matches!(value, Held::Unchanged | Held::Cut(..)));
            prop_assert_eq!(tuple.is_complete(), whole);
        }
    }

    fn empty() -> Parts {
        Parts {
            form: 0,
            subxid: None,
            lsns: [0; 2],
            instants: [0; 2],
            xids: [0; 2],
            flags: [false; 2],
            names: Default::default(),
            tuples: Default::default(),
            old: None,
            attributes: vec![],
            oids: vec![],
        }
    }

    /// As PostgreSQL 16.14 sent them, from a table `t (id int primary key, txt text, js json, jb jsonb, m mood)` and a
    /// table `f (a int, b text)` with REPLICA IDENTITY FULL.
    #[test]
    fn real_messages_are_understood() {
        fn read<'a>(message: &'a mut Vec<u8>, hex: &str, in_stream: bool) -> Message<'a> {
            let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
            *message = hex.as_bytes().chunks(2).map(byte).collect();
            let decoded = decode(message, in_stream).unwrap();
            assert_eq!(encode(&decoded), *message);
            assert_eq!(decoded.subxid.unwrap_or(0x2e0) & !0xf, 0x2e0);
            decoded.message
        }

        let (mut of_t, mut of_f, mut message) = (vec![], vec![], vec![]);
        let t = "52000002e0000040037075626c69630074006400050169640000000017ffffffff007478740000000019ffffffff006a7300000000\
                 72ffffffff006a620000000edaffffffff006d0000004001ffffffff";
        let Message::Relation(t) = read(&mut of_t, t, true) else { panic!() };
        assert_eq!((t.id, t.namespace, t.name, t.replica_identity), (0x4003, &b"public"[..], &b"t"[..], b'd'));
        let is_key: Vec<_> = t.columns().map(|column| (column.name, column.is_key)).collect();
        assert_eq!(is_key, [(&b"id"[..], true), (b"txt", false), (b"js", false), (b"jb", false), (b"m", false)]);
        let f = "520000400a7075626c696300660066000201610000000017ffffffff01620000000019ffffffff";
        let Message::Relation(f) = read(&mut of_f, f, false) else { panic!() };
        assert!(f.replica_identity == b'f' && f.columns().all(|column| column.is_key));

        // Tuples, streamed and not, as text and binary, with the key that changed, with the whole row as it was.
        for (relation, in_stream, hex, old, new) in [
            (&f, true, "49000002e00000400a4e00027400000001316e", "", r#"{"a": "1", "b": null}"#),
            (
                &t,
                true,
                "55000002e1000040034e00057400000001317574000000087b2261223a20317d74000000065b6e756c6c5d6e",
                "",
                r#"{"id": "1", "js": {"a": 1}, "jb": [null], "m": null}"#,
            ),
            (
                &t,
                false,
                "55000040034b00056200000004000000016e6e6e6e4e00056200000004000000027562000000087b2261223a20317d62000000\
                 07015b6e756c6c5d6e",
                r#"{"id": {"binary": "00000001"}}"#,
                concat!(
                    r#"{"id": {"binary": "00000002"}, "js": {"binary": "7b2261223a20317d"}, "#,
                    r#""jb": {"binary": "015b6e756c6c5d"}, "m": null}"#
                ),
            ),
            (
                &f,
                true,
                "55000002e30000400a4f00027400000001316e4e00027400000001317400000004c3b6225c",
                r#"{"a": "1", "b": null}"#,
                r#"{"a": "1", "b": "ö\"\\"}"#,
            ),
            (&t, true, "44000002e4000040034b00057400000001326e6e6e6e", r#"{"id": "2"}"#, ""),
            (
                &f,
                false,
                "440000400a4f00026200000004000000016200000004c3b6225c",
                r#"{"a": {"binary": "00000001"}, "b": {"binary": "c3b6225c"}}"#,
                "",
            ),
        ] {
            let (before, after) = match read(&mut message, hex, in_stream) {
                Message::Insert { new, .. } => (None, Some(new)),
                Message::Update { old, new, .. } => (old, Some(new)),
                Message::Delete { old, .. } => (Some(old), None),
                other => panic!("{other:?}"),
            };
            let mut out = vec![];
            before.iter().for_each(|(_, tuple)| write_tuple(relation, tuple, true, &mut out));
            assert_eq!(String::from_utf8(out).unwrap(), old);
            let mut out = vec![];
            after.iter().for_each(|tuple| write_tuple(relation, tuple, false, &mut out));
            assert_eq!(String::from_utf8(out).unwrap(), new);
            let toasted: Vec<_> = after.iter().flat_map(|tuple| unchanged(relation, tuple)).collect();
            assert!(after.is_none_or(|tuple| tuple.is_complete() == toasted.is_empty()));
            assert!(toasted.is_empty() || toasted == [b"txt"]);
        }

        // 2026-11-25 01:13:31.028408 UTC, and a little later.
        let [at, prepared, then, rolled_back, aborted] =
            [848_884_411_028_408, 0x3040e4dc65d5e, 0x3040e4dc65dce, 0x3040e4dc65f61, 0x3040e4dc6610c];
        let [a, b, c, d] = [0x1514360, 0x1514458, 0x1514490, 0x1514600];
        for (in_stream, hex, expected) in [
            (
                false,
                "4200000000015129180003040e4dc653b8000002e0",
                Message::Begin { final_lsn: 0x1512918, commit_ts: at, xid: 0x2e0 },
            ),
            (
                false,
                "4300000000000151291800000000015129480003040e4dc653b8",
                Message::Commit { commit_lsn: 0x1512918, end_lsn: 0x1512948, commit_ts: at },
            ),
            (
                true,
                "59000002e0000040017075626c6963006d6f6f6400",
                Message::Type { id: 0x4001, namespace: b"public", name: b"mood" },
            ),
            (
                true,
                "54000002e60000000201000040030000400a",
                Message::Truncate {
                    relations: Oids(&[[0, 0, 0x40, 3], [0, 0, 0x40, 10]]),
                    cascade: true,
                    restart: false,
                },
            ),
            (
                true,
                "4d000002e90100000000015146f87072650000000007636f6e74656e74",
                Message::Logical { transactional: true, lsn: 0x15146f8, prefix: b"pre", content: b"content" },
            ),
            (false, "53000002e001", Message::StreamStart { xid: 0x2e0, first: true }),
            (true, "45", Message::StreamStop),
            (
                false,
                "63000002e000000000000151291800000000015129480003040e4dc653b8",
                Message::StreamCommit { xid: 0x2e0, commit_lsn: 0x1512918, end_lsn: 0x1512948, commit_ts: at },
            ),
            (
                false,
                "41000002e9000002ea00000000015146b00003040e4dc6610c",
                Message::StreamAbort { xid: 0x2e9, subxid: 0x2ea, abort: Some((0x15146b0, aborted)) },
            ),
            (
                false,
                "62000000000151436000000000015144580003040e4dc65d5e000002e7673100",
                Message::BeginPrepare { prepare_lsn: a, end_lsn: b, prepare_ts: prepared, xid: 0x2e7, gid: b"g1" },
            ),
            (
                false,
                "5000000000000151436000000000015144580003040e4dc65d5e000002e7673100",
                Message::Prepare { prepare_lsn: a, end_lsn: b, prepare_ts: prepared, xid: 0x2e7, gid: b"g1" },
            ),
            (
                false,
                "7000000000000151436000000000015144580003040e4dc65d5e000002e7673100",
                Message::StreamPrepare { prepare_lsn: a, end_lsn: b, prepare_ts: prepared, xid: 0x2e7, gid: b"g1" },
            ),
            (
                false,
                "4b00000000000151445800000000015144900003040e4dc65dce000002e7673100",
                Message::CommitPrepared { commit_lsn: b, end_lsn: c, commit_ts: then, xid: 0x2e7, gid: b"g1" },
            ),
            (
                false,
                "720000000000015145c800000000015146000003040e4dc65f050003040e4dc65f61000002e8673200",
                Message::RollbackPrepared {
                    prepare_end_lsn: 0x15145c8,
                    rollback_end_lsn: d,
                    prepare_ts: 0x3040e4dc65f05,
                    rollback_ts: rolled_back,
                    xid: 0x2e8,
                    gid: b"g2",
                },
            ),
        ] {
            assert_eq!(read(&mut message, hex, in_stream), expected);
        }
    }

    #[test]
    fn json_is_embedded_and_not_quoted() {
        let columns = [(false, 114u32, "js"), (false, 3802, "jb"), (true, 25, "t\"")]
            .map(|(key, oid, name)| (key, name.as_bytes().to_vec(), oid, -1));
        let json = r#"{"a": [1, null]}"#;
        let parts = Parts {
            form: 3,
            attributes: columns.to_vec(),
            tuples: [vec![json, "[]", "\\"].into_iter().map(|text| Held::Text(text.into())).collect(), vec![]],
            ..empty()
        };
        let bytes = parts.columns();
        let Message::Relation(relation) = parts.decoded(&bytes).message else { panic!() };
        let mut out = vec![];
        write_tuple(&relation, &Tuple { count: 3, columns: &bytes[0] }, false, &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), r#"{"js": {"a": [1, null]}, "jb": [], "t\"": "\\"}"#);
    }

    #[test]
    fn a_cut_falls_between_characters_in_any_encoding() {
        // UTF-8; EUC_JP, with and without ASCII before; LATIN1.
        assert_eq!(beginning("aö€".as_bytes(), 5), "aö".as_bytes());
        assert_eq!(beginning(b"ab \xa4\xa2\xa4\xa4", 6), b"ab ");
        assert_eq!(beginning(b"\xa4\xa2\xa4\xa4", 3), b"");
        assert_eq!(beginning(b"caf\xe9 cr\xe8me", 7), b"caf\xe9 cr");
        assert_eq!(beginning(b"abc", 3), b"abc");
    }

    #[test]
    fn a_long_malformed_message_is_not_kept_in_part() {
        let mut out = vec![];
        assert!(shorten(b"E and more", false, 5, &mut out));
        assert!(out.is_empty());
    }
}
