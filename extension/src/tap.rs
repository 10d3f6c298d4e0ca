//! The tap: every message that a replication worker receives passes by here, on its way from libpqwalreceiver to core.
//!
//! It remembers the transaction that is being received, as far as memory allows, so that an error can be told together with
//! what caused it; it makes core say when a row to be changed is not there; and it leaves out a change that the operator
//! resolved against. Otherwise nothing passes differently than it would without us.
//!
//! The way in is `WalReceiverFunctions`, the table through which core calls libpqwalreceiver: a copy of it with four
//! functions replaced is put in its place before the server has children. One of them, to connect, is subscription.rs's.
//! Physical receivers use the table too, and so does the initial copy of a table, whose rows are no messages: both pass
//! untouched, because only a logical worker that has started streaming is listened to.
//!
//! The functions are plain frames, as hooks are: what core raises below them passes over them by longjmp. Nothing of
//! ours raises, and memory is bounded.

use std::cell::UnsafeCell;
use std::ffi::{c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use pgrx::pg_sys;

use crate::event::{Delivery, push_change, push_frame};
use crate::pgoutput::{self, Decoded, Message};
use crate::shmem::{self, Queue};
use crate::{apply_log, compat, guc};

/// Bytes of changes that are kept of one transaction.
const KEPT: usize = 256 * 1024;
/// Bytes of descriptions of tables that are kept of one transaction: some 500 tables of ten columns.
const DESCRIBED: usize = 64 * 1024;
/// Streamed transactions that are kept at a time.
const STREAMS: usize = 16;
/// 'w', three positions and times of eight bytes each.
const HEADER: usize = 25;

/// libpqwalreceiver's own.
static REAL: OnceLock<pg_sys::WalReceiverFunctionsType> = OnceLock::new();
static TAP: Own = Own(UnsafeCell::new(Tap::new()));

/// What belongs to this process, which has one thread.
struct Own(UnsafeCell<Tap>);

// SAFETY: PostgreSQL's processes have one thread; tap() says how references are kept apart.
unsafe impl Sync for Own {}

pub fn init() {
    // SAFETY: called from _PG_init in the postmaster, before it has children; the library is part of the server.
    unsafe {
        pg_sys::load_file(c"libpqwalreceiver".as_ptr(), false);
        let real = *REAL.get_or_init(|| *pg_sys::WalReceiverFunctions);
        pg_sys::WalReceiverFunctions = Box::leak(Box::new(pg_sys::WalReceiverFunctionsType {
            walrcv_connect: Some(compat::connect),
            walrcv_startstreaming: Some(start_streaming),
            walrcv_endstreaming: Some(end_streaming),
            walrcv_receive: Some(receive),
            ..real
        }));
    }
}

/// Access for this process's only thread. References do not outlive calls that could come back here.
pub fn tap() -> &'static mut Tap {
    // SAFETY: no reference is held across a call of PostgreSQL's, and there is one thread.
    unsafe { &mut *TAP.0.get() }
}

/// libpqwalreceiver's own functions, all of which it has.
///
/// # Safety
/// init() has run.
pub unsafe fn real() -> &'static pg_sys::WalReceiverFunctionsType {
    // SAFETY: set once, before there were children; nobody gets here without init().
    unsafe { REAL.get().unwrap_unchecked() }
}

unsafe extern "C-unwind" fn start_streaming(
    connection: *mut pg_sys::WalReceiverConn,
    options: *const pg_sys::WalRcvStreamOptions,
) -> bool {
    // SAFETY: arguments are passed on as they came; libpqwalreceiver has all functions.
    unsafe {
        if (*options).logical && compat::IsLogicalWorker() {
            // Apply commits without waiting for the disk, and a worker tells the publisher that all is flushed when it knows
            // of nothing that is not: it does not know what the worker before it had applied last. A crash in that moment
            // would lose it for good. We have workers follow each other faster than core does, so this is ours to close.
            compat::flush_applied();
        }
        let started = real().walrcv_startstreaming.unwrap_unchecked()(connection, options);
        if started && (*options).logical && compat::IsLogicalWorker() {
            tap().begin();
        }
        started
    }
}

unsafe extern "C-unwind" fn end_streaming(connection: *mut pg_sys::WalReceiverConn, next: *mut pg_sys::TimeLineID) {
    // SAFETY: as above.
    unsafe {
        tap().end();
        real().walrcv_endstreaming.unwrap_unchecked()(connection, next);
    }
}

unsafe extern "C-unwind" fn receive(
    connection: *mut pg_sys::WalReceiverConn,
    buffer: *mut *mut c_char,
    socket: *mut pg_sys::pgsocket,
) -> c_int {
    // SAFETY: arguments are passed on as they came; a positive result is the length of the buffer.
    unsafe {
        tap().applied();
        loop {
            let length = real().walrcv_receive.unwrap_unchecked()(connection, buffer, socket);
            if !tap().streaming || length <= HEADER as c_int || **buffer != b'w' as c_char {
                return length;
            }
            let message = std::slice::from_raw_parts((*buffer).cast::<u8>(), length as usize).split_at(HEADER).1;
            // A mistake of ours must cost the log, not replication.
            let passes = catch_unwind(AssertUnwindSafe(|| tap().see(message))).unwrap_or_else(|_| {
                tap().end();
                true
            });
            if passes {
                return length;
            }
        }
    }
}

/// A remote transaction, as far as it is known.
pub struct Transaction {
    pub delivery: Delivery,
    pub xid: u32,
    pub lsn: u64,
    pub commit_ts: i64,
    /// Changes that have passed.
    pub seen: u32,
    /// The last of them is being applied, if it was not the end of the transaction that came last.
    pub applying: bool,
    /// All changes so far are kept.
    pub whole: bool,
    /// The end of the transaction has passed.
    pub ended: bool,
    /// See [`push_change`]. The last change is there in any case.
    pub changes: Vec<u8>,
    /// How much of `changes` stays when the next change comes.
    kept: usize,
    /// Where the last change begins in `changes`.
    last: usize,
    /// The descriptions of the tables that the changes are of, and of their types; and which tables those are.
    pub relations: Vec<u8>,
    described: Vec<u32>,
}

impl Transaction {
    const fn new() -> Transaction {
        Transaction {
            delivery: Delivery::None,
            xid: 0,
            lsn: 0,
            commit_ts: 0,
            seen: 0,
            applying: false,
            whole: true,
            ended: false,
            changes: Vec::new(),
            kept: 0,
            last: 0,
            relations: Vec::new(),
            described: Vec::new(),
        }
    }

    /// Keeps the memory for the next one, unless it is much.
    fn reset(&mut self) {
        let mut fresh = Transaction::new();
        if self.changes.capacity() <= KEPT / 4 {
            fresh.changes = std::mem::take(&mut self.changes);
            fresh.relations = std::mem::take(&mut self.relations);
            fresh.described = std::mem::take(&mut self.described);
            fresh.changes.clear();
            fresh.relations.clear();
            fresh.described.clear();
        }
        *self = fresh;
    }

    fn add(&mut self, publisher: &Publisher, message: &[u8], in_stream: bool) {
        self.seen = self.seen.wrapping_add(1);
        self.applying = true;
        self.changes.truncate(self.kept);
        self.last = self.kept;
        let number = self.seen;
        push_change(&mut self.changes, number, in_stream, |out| {
            pgoutput::shorten(message, in_stream, guc::max_tuple_size(), out);
        });
        if self.changes.len() <= KEPT {
            self.kept = self.changes.len();
        } else {
            self.whole = false;
        }
        if message[0] == b'T' {
            if let Ok(Decoded { message: Message::Truncate { relations: tables, .. }, .. }) =
                pgoutput::decode(message, in_stream)
            {
                tables.iter().for_each(|table| self.describe(publisher, table));
            }
        } else if let Some(table) = message.get(if in_stream { 5..9 } else { 1..5 }) {
            self.describe(publisher, table.iter().fold(0, |id, byte| id << 8 | u32::from(*byte)));
        }
    }

    fn describe(&mut self, publisher: &Publisher, table: u32) {
        if self.described.contains(&table) {
            return;
        }
        if let Some(description) = Publisher::find(&publisher.relations, table)
            && self.relations.len() + description.len() <= DESCRIBED
        {
            self.described.push(table);
            push_frame(&mut self.relations, |out| out.extend_from_slice(description));
            // Types that are not built in came before the table that needs them; without them it says less. Most databases have none,
            // and this is done for each transaction.
            if !publisher.types.is_empty()
                && let Ok(Decoded { message: Message::Relation(relation), .. }) = pgoutput::decode(description, false)
            {
                for column in relation.columns() {
                    if let Some(name) = Publisher::find(&publisher.types, column.type_oid)
                        && self.relations.len() + name.len() <= DESCRIBED
                    {
                        push_frame(&mut self.relations, |out| out.extend_from_slice(name));
                    }
                }
            }
        }
    }

    /// The change being applied, alone.
    pub fn last_change(&self) -> &[u8] {
        self.changes.get(self.last..).unwrap_or_default()
    }

    /// What tells the change being applied from any other that may be in its place when the transaction is sent again, after
    /// its publication was changed, say. Hash FNV-1a.
    pub fn fingerprint(&self) -> u64 {
        self.last_change()
            .iter()
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
    }

    /// Takes the changes of a subtransaction out, which was rolled back at the publisher.
    fn forget(&mut self, subxid: u32) {
        let mut left = Vec::new();
        let mut gone = 0;
        for (number, in_stream, message) in crate::event::changes(&self.changes[..self.kept]) {
            if message.get(1..5) == Some(&subxid.to_be_bytes()) {
                gone += 1;
            } else {
                push_change(&mut left, number - gone, in_stream, |out| out.extend_from_slice(message));
            }
        }
        self.seen -= gone;
        self.kept = left.len();
        self.changes = left;
    }
}

/// What the publisher has said of its tables and types, once per connection: the messages, by the oids there. Those that came
/// in a stream are without the transaction's id.
struct Publisher {
    relations: Vec<(u32, Vec<u8>)>,
    types: Vec<(u32, Vec<u8>)>,
}

impl Publisher {
    fn find(messages: &[(u32, Vec<u8>)], id: u32) -> Option<&Vec<u8>> {
        messages.iter().find(|(known, _)| *known == id).map(|(_, message)| message)
    }

    fn keep(messages: &mut Vec<(u32, Vec<u8>)>, id: u32, message: &[u8], in_stream: bool) {
        let mut kept = message[..1].to_vec();
        kept.extend_from_slice(message.get(if in_stream { 5 } else { 1 }..).unwrap_or_default());
        match messages.iter_mut().find(|(known, _)| *known == id) {
            Some((_, known)) => *known = kept,
            None => messages.push((id, kept)),
        }
    }
}

/// What this process knows of the messages that have passed.
pub struct Tap {
    /// Messages are coming, and we look at them.
    streaming: bool,
    subscription: u32,
    /// This is the subscription's apply worker, not one that copies a table and may be further on than that.
    applies: bool,
    queue: Option<&'static Queue>,
    publisher: Publisher,
    pub transaction: Transaction,
    /// Streamed transactions that have not ended; more than STREAMS are not kept.
    streams: Vec<Transaction>,
    /// The streamed transaction of which messages are coming.
    in_stream: Option<u32>,
    /// The type of the message that core deals with; 0 if none.
    pub message: u8,
    /// Changes of this transaction that are left out: their places, and their fingerprints.
    excluded: Vec<(u32, u64)>,
    /// Rows that are not here because what made them was left out: table and key.
    unmade: Vec<(u32, Vec<u8>)>,
    /// Where a transaction ends of which something was left out and whose commit core is dealing with; 0 if it is not.
    thinned: u64,
    /// While core is made to talk: what it would log otherwise (`log_min_messages`).
    level: Option<c_int>,
}

impl Tap {
    const fn new() -> Tap {
        Tap {
            streaming: false,
            subscription: 0,
            applies: false,
            queue: None,
            publisher: Publisher { relations: Vec::new(), types: Vec::new() },
            transaction: Transaction::new(),
            streams: Vec::new(),
            in_stream: None,
            message: 0,
            excluded: Vec::new(),
            unmade: Vec::new(),
            thinned: 0,
            level: None,
        }
    }

    fn begin(&mut self) {
        // SAFETY: a backend-local value, set before the worker connects to its publisher.
        let database = unsafe { pg_sys::MyDatabaseId };
        self.streaming = true;
        let (subscription, copied) = compat::my_subscription().unwrap_or_default();
        (self.subscription, self.applies) = (subscription, copied == 0);
        self.queue = shmem::queue(database.to_u32(), true);
        if let Some(queue) = self.queue {
            queue.call();
        }
    }

    fn end(&mut self) {
        self.applied();
        self.streaming = false;
    }

    /// Core has dealt with the last message and asks for the next.
    fn applied(&mut self) {
        if let Some(level) = self.level.take() {
            // SAFETY: a setting of this process; a reload can change it only between two messages, when it is as it was.
            unsafe { pg_sys::log_min_messages = level };
        }
        if matches!(self.message, b'C' | b'P' | b'c' | b'p')
            && let Some(queue) = self.queue
        {
            queue.tell_progress();
        }
        // If nothing is left of a transaction there is no commit here either, and core would ask for it again after the next
        // error, when the exclusion is forgotten.
        let end = std::mem::take(&mut self.thinned);
        if end != 0 {
            compat::advance_origin(end);
        }
        self.message = 0;
    }

    /// The transaction that the message at hand is of; `None`: of none that is being applied.
    pub fn current(&self) -> Option<&Transaction> {
        let applying = self.in_stream.is_none() && !matches!(self.message, 0 | b'S' | b'E' | b'A' | b'r');
        (applying && self.transaction.delivery != Delivery::None).then_some(&self.transaction)
    }

    /// What core would log if it had not been made to talk; `None` if it was not.
    pub fn level(&self) -> Option<c_int> {
        self.level
    }

    /// Makes core say at DEBUG1 what it says there only: that a row to be changed was not found. apply_log.rs takes the line
    /// out of the server's log again.
    fn listen(&mut self) {
        // SAFETY: a setting of this process.
        unsafe {
            if pg_sys::log_min_messages > pg_sys::DEBUG1 as c_int {
                self.level = Some(pg_sys::log_min_messages);
                pg_sys::log_min_messages = pg_sys::DEBUG1 as c_int;
            }
        }
    }

    /// Looks at a message; false: core shall not see it.
    fn see(&mut self, message: &[u8]) -> bool {
        let Some(&kind) = message.first() else { return true };
        self.message = kind;
        // SAFETY: a setting of this process.
        if !apply_log::is_logged(pg_sys::PGERROR as c_int, unsafe { pg_sys::log_min_messages }) {
            // Then nobody is told of an ERROR either.
            self.listen();
        }
        let in_stream = self.in_stream.is_some();
        match kind {
            b'I' | b'U' | b'D' | b'T' => return self.see_change(message),
            // Before a row can be found or missed, core reads the message; afterwards it asks for the next.
            b'c' | b'p' => self.listen(),
            _ => {}
        }
        let Ok(Decoded { message: decoded, .. }) = pgoutput::decode(message, in_stream) else { return true };
        match decoded {
            Message::Begin { final_lsn, commit_ts, xid } => {
                self.begin_transaction(Delivery::Plain, xid, final_lsn, commit_ts);
            }
            Message::BeginPrepare { prepare_lsn, prepare_ts, xid, .. } => {
                self.begin_transaction(Delivery::Prepared, xid, prepare_lsn, prepare_ts);
            }
            Message::Commit { end_lsn, .. } => {
                if !self.excluded.is_empty() {
                    self.thinned = end_lsn;
                }
                self.end_transaction();
            }
            Message::Prepare { .. } => self.end_transaction(),
            Message::CommitPrepared { xid, commit_lsn, commit_ts, .. } => {
                // Its changes were applied when it was prepared, maybe long ago.
                self.begin_transaction(Delivery::Prepared, xid, commit_lsn, commit_ts);
                self.transaction.whole = false;
                self.end_transaction();
            }
            Message::Relation(relation) => {
                Publisher::keep(&mut self.publisher.relations, relation.id, message, in_stream);
            }
            Message::Type { id, .. } => Publisher::keep(&mut self.publisher.types, id, message, in_stream),
            Message::StreamStart { xid, first } => {
                self.in_stream = Some(xid);
                if first && self.streams.len() < STREAMS {
                    let delivery = Delivery::Streamed;
                    self.streams.push(Transaction { delivery, xid, ..Transaction::new() });
                }
            }
            Message::StreamStop => self.in_stream = None,
            Message::StreamAbort { xid, subxid, .. } => {
                if xid == subxid {
                    self.streams.retain(|stream| stream.xid != xid);
                } else if let Some(stream) = self.streams.iter_mut().find(|stream| stream.xid == xid) {
                    stream.forget(subxid);
                }
            }
            Message::StreamCommit { xid, commit_lsn, commit_ts, .. } => self.end_stream(xid, commit_lsn, commit_ts),
            Message::StreamPrepare { xid, prepare_lsn, prepare_ts, .. } => {
                self.end_stream(xid, prepare_lsn, prepare_ts);
            }
            _ => {}
        }
        true
    }

    fn see_change(&mut self, message: &[u8]) -> bool {
        if let Some(xid) = self.in_stream {
            if let Some(stream) = self.streams.iter_mut().find(|stream| stream.xid == xid) {
                stream.add(&self.publisher, message, true);
            }
            return true;
        }
        self.transaction.add(&self.publisher, message, false);
        if !self.excluded.is_empty() && self.leaves_out(message) {
            self.message = 0;
            return false;
        }
        if matches!(message[0], b'U' | b'D') {
            self.listen();
        }
        true
    }

    /// Whether a change is left out: because that was said, or because it is of a row that something left out had made. A
    /// local row with that row's key is another row.
    fn leaves_out(&mut self, message: &[u8]) -> bool {
        let (number, print) = (self.transaction.seen, self.transaction.fingerprint());
        let said = self.excluded.contains(&(number, print));
        let Ok(Decoded { message, .. }) = pgoutput::decode(message, false) else { return said };
        let (table, old, new) = match &message {
            Message::Insert { relation, new } => (*relation, None, Some(new)),
            Message::Update { relation, old: Some((_, old)), new } => (*relation, Some(old), Some(new)),
            Message::Update { relation, old: None, new } => (*relation, Some(new), Some(new)),
            Message::Delete { relation, old: (_, old) } => (*relation, Some(old), None),
            _ => return said,
        };
        let described = Publisher::find(&self.publisher.relations, table);
        let Some(Ok(Decoded { message: Message::Relation(relation), .. })) =
            described.map(|description| pgoutput::decode(description, false))
        else {
            return said;
        };
        let row = |tuple| {
            let mut key = Vec::new();
            pgoutput::write_tuple(&relation, tuple, true, &mut key);
            (table, key)
        };
        let (old, new) = (old.map(row), new.map(row));
        let unmade = self.unmade.iter().position(|row| Some(row) == old.as_ref());
        if let Some(at) = unmade {
            self.unmade.swap_remove(at);
        }
        if (unmade.is_some() || (said && old != new))
            && let Some(new) = new
        {
            self.unmade.push(new);
        }
        said || unmade.is_some()
    }

    fn begin_transaction(&mut self, delivery: Delivery, xid: u32, lsn: u64, commit_ts: i64) {
        let transaction = &mut self.transaction;
        transaction.reset();
        (transaction.delivery, transaction.xid) = (delivery, xid);
        (transaction.lsn, transaction.commit_ts) = (lsn, commit_ts);
        self.unmade.clear();
        self.excluded.clear();
        self.excluded.extend(shmem::excluded(self.subscription, lsn));
        if self.applies {
            shmem::forget_excluded_before(self.subscription, lsn);
        }
    }

    fn end_transaction(&mut self) {
        self.transaction.applying = false;
        self.transaction.ended = true;
        self.transaction.changes.truncate(self.transaction.kept);
    }

    /// Core applies a streamed transaction now, out of its file: which change it is at, nobody can see.
    fn end_stream(&mut self, xid: u32, lsn: u64, commit_ts: i64) {
        let stream = self.streams.iter().position(|stream| stream.xid == xid);
        self.transaction = match stream {
            Some(at) => self.streams.swap_remove(at),
            None => Transaction { delivery: Delivery::Streamed, xid, whole: false, ..Transaction::new() },
        };
        (self.transaction.lsn, self.transaction.commit_ts) = (lsn, commit_ts);
        self.end_transaction();
    }
}
