//! Shared memory: the only file that knows its layout. What all backends of a server must agree on at once:
//! the state of each database and its maintenance window, for each backend whether its transaction could still write, the queues through which
//! replication workers report, and the changes that they were told to leave out.
//!
//! Everything here is atomic and nothing locks: these words are read before every statement, and while an ERROR is
//! being reported. A server that starts finds zeros, that is, `Unknown` everywhere.

use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use pgrx::pg_sys;

use crate::ring::{Positions, Ring};
use crate::{compat, guc};

/// Databases whose state can be kept, of those that are used between two starts of the server. 2 kB each.
const DATABASES: usize = 512;
/// The longest state, as JSON text, in bytes.
pub const MAX_STATE: usize = 2000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Gate {
    /// Nobody has looked since the server started: ask the catalog.
    Unknown = 0,
    Open = 1,
    /// New writes are refused; transactions that were under way may still commit.
    Draining = 2,
    /// As draining, and nothing that was under way may commit any more.
    Severing = 3,
    Closed = 4,
}

impl Gate {
    fn from(word: u32) -> Gate {
        match word {
            0 => Gate::Unknown,
            1 => Gate::Open,
            2 => Gate::Draining,
            3 => Gate::Severing,
            _ => Gate::Closed,
        }
    }
}

/// One database. `text` is guarded by `version`: odd while somebody writes.
#[repr(C, align(64))]
pub struct Database {
    oid: AtomicU32,
    gate: AtomicU32,
    version: AtomicU32,
    length: AtomicU32,
    /// `role << 32 | serial` of the maintenance window, role 0 when it is shut: one word, so that whoever looks at it is let
    /// in by one window or by none. What follows was written before it.
    window: AtomicU64,
    opened: AtomicI64,
    until: AtomicI64,
    holder: AtomicI32,
    by: AtomicU32,
    text: [AtomicU8; MAX_STATE],
}

/// The maintenance window of a database: who may write although it is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Counted since the server started.
    pub serial: u32,
    /// The oid of the role that may; 0 when the window is shut.
    pub role: u32,
    /// When it was opened, and its deadline, as timestamptz.
    pub opened: i64,
    pub until: i64,
    /// The process that holds it open, and the oid of its user.
    pub holder: i32,
    pub by: u32,
}

/// One backend, on a cache line of its own: written before every statement.
#[repr(C, align(64))]
pub struct Backend {
    /// `local xid << 2 | Effect`: the strongest thing that the transaction has run in read-write mode.
    mark: AtomicU64,
    /// 1 while a utility command runs that may span transactions, as CREATE INDEX CONCURRENTLY does.
    utility: AtomicU32,
}

/// Databases with subscriptions that can report at the same time.
const QUEUES: usize = 8;
/// Changes that can be left out at the same time.
const EXCLUSIONS: usize = 256;

/// The queue of one database: replication workers put events into it, the database's collector takes them out.
#[repr(C, align(64))]
pub struct Queue {
    database: AtomicU32,
    /// 1 while there may be something to collect: set by replication workers, cleared by a collector that ends because
    /// its database has no subscription any more.
    wanted: AtomicU32,
    /// The collector at work; 0 if there is none.
    collector: AtomicI32,
    /// Open conflicts that stop a subscription: while there are any, the collector wants to hear that apply goes on.
    open: AtomicU32,
    /// 1 from the first time on that a transaction was prepared that changes the schema.
    prepared_change: AtomicU32,
    /// The collector's latch. May be stale: setting the latch of a process that took over the place wakes it for nothing.
    latch: AtomicPtr<pg_sys::Latch>,
    positions: Positions,
}

/// A change of a remote transaction that the apply worker of a subscription shall not see.
#[repr(C)]
struct Exclusion {
    /// 0 free, 1 until the end of the transaction that writes it, 2 in force.
    state: AtomicU32,
    subscription: AtomicU32,
    /// Its place in the transaction, counted from 1.
    change: AtomicU32,
    /// What tells it from another change in that place.
    fingerprint: AtomicU64,
    /// Where that transaction's commit is at the publisher.
    lsn: AtomicU64,
}

/// What there is one of.
#[repr(C, align(64))]
struct Common {
    /// Of the process that starts collectors. May be stale, as above.
    launcher: AtomicPtr<pg_sys::Latch>,
    /// How many exclusions were ever made: while none was, nobody looks for one.
    exclusions_made: AtomicU32,
    exclusions: [Exclusion; EXCLUSIONS],
}

/// What a statement may do to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
pub enum Effect {
    Nothing = 0,
    /// A query that may call a function that writes.
    Perhaps = 1,
    /// An INSERT, UPDATE, DELETE, MERGE or a utility command that changes something.
    Writes = 2,
}

/// Set in the postmaster, inherited by every backend.
static DATABASE_ARRAY: AtomicPtr<Database> = AtomicPtr::new(null_mut());
static BACKEND_ARRAY: AtomicPtr<Backend> = AtomicPtr::new(null_mut());
static QUEUE_ARRAY: AtomicPtr<Queue> = AtomicPtr::new(null_mut());
/// The words of all queues, one after the other.
static QUEUE_WORDS: AtomicPtr<AtomicU64> = AtomicPtr::new(null_mut());
static COMMON: AtomicPtr<Common> = AtomicPtr::new(null_mut());
/// This backend's own database, found once.
static MY_DATABASE: AtomicPtr<Database> = AtomicPtr::new(null_mut());

static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

pub fn init() {
    // SAFETY: called from _PG_init in the postmaster, before it has children.
    unsafe {
        PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(request);
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
    }
}

/// Backend numbers run from 0 or 1 to MaxBackends, by version; auxiliary processes run no statements.
fn backend_slots() -> usize {
    // SAFETY: set before either hook runs, and constant.
    unsafe { pg_sys::MaxBackends as usize + 1 }
}

/// Words for the records of one queue.
fn queue_words() -> usize {
    guc::log_buffer() / size_of::<u64>()
}

fn size() -> usize {
    DATABASES * size_of::<Database>()
        + backend_slots() * size_of::<Backend>()
        + size_of::<Common>()
        + QUEUES * (size_of::<Queue>() + queue_words() * size_of::<u64>())
        + align_of::<Database>()
}

unsafe extern "C-unwind" fn request() {
    // SAFETY: PostgreSQL calls this hook when, and only when, memory may be requested.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            previous();
        }
        pg_sys::RequestAddinShmemSpace(size());
    }
}

/// Runs in the postmaster before any backend exists, so nobody races for the memory and AddinShmemInitLock is not needed.
unsafe extern "C-unwind" fn startup() {
    // SAFETY: the block is ours, at least `size()` long; all-zero bytes are valid atomics.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            previous();
        }
        let mut found = false;
        let block = pg_sys::ShmemInitStruct(c"stillebot".as_ptr(), size(), &mut found).cast::<u8>();
        if !found {
            block.write_bytes(0, size());
        }
        let aligned = block.add(block.align_offset(align_of::<Database>()));
        DATABASE_ARRAY.store(aligned.cast(), Ordering::Release);
        // All of these are aligned alike, and their sizes are multiples of that.
        let backends = aligned.add(DATABASES * size_of::<Database>());
        BACKEND_ARRAY.store(backends.cast(), Ordering::Release);
        let common = backends.add(backend_slots() * size_of::<Backend>());
        COMMON.store(common.cast(), Ordering::Release);
        let queues = common.add(size_of::<Common>());
        QUEUE_ARRAY.store(queues.cast(), Ordering::Release);
        QUEUE_WORDS.store(queues.add(QUEUES * size_of::<Queue>()).cast(), Ordering::Release);
    }
}

/// Whether the library was preloaded, so that there is anything to share.
pub fn is_there() -> bool {
    !DATABASE_ARRAY.load(Ordering::Relaxed).is_null()
}

/// The slot of this backend's database; `None` if there is no database, or no slot left for it.
#[inline]
pub fn my_database() -> Option<&'static Database> {
    // SAFETY: null, or points into shared memory, which lives as long as the process.
    match unsafe { MY_DATABASE.load(Ordering::Relaxed).as_ref() } {
        Some(database) => Some(database),
        None => find_database(),
    }
}

#[cold]
fn find_database() -> Option<&'static Database> {
    let array = DATABASE_ARRAY.load(Ordering::Acquire);
    // SAFETY: a backend-local integer, set once.
    let oid = unsafe { pg_sys::MyDatabaseId }.to_u32();
    if array.is_null() || oid == 0 {
        return None;
    }
    // SAFETY: startup() laid out DATABASES of them, and they are never freed.
    let slots = unsafe { std::slice::from_raw_parts(array, DATABASES) };
    // Slots are claimed from the front and never given back, so the search may stop at the first free one. Two backends
    // that race for it: one wins, the other sees whose it became and takes it too, or goes on.
    let slot =
        slots.iter().find(|slot| match slot.oid.compare_exchange(0, oid, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(owner) => owner == oid,
        })?;
    MY_DATABASE.store((&raw const *slot).cast_mut(), Ordering::Relaxed);
    Some(slot)
}

impl Database {
    /// One relaxed load: the price of the extension for a statement on a database that is up, but for [`Backend::mark`].
    #[inline]
    pub fn gate(&self) -> Gate {
        Gate::from(self.gate.load(Ordering::Relaxed))
    }

    /// Sets gate and text as one, and makes sure, as [`Database::move_gate`], that whoever starts a statement from now on
    /// sees the gate. Callers that change a known state hold the extension's lock; the only other writer is
    /// [`Database::publish`].
    pub fn set(&self, gate: Gate, text: &str) {
        self.write(|| Some((gate, text)));
    }

    /// Changes the gate alone, and makes sure that whoever starts a statement from now on sees it.
    pub fn move_gate(&self, gate: Gate) {
        self.gate.store(gate as u32, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Tells everybody what the catalog says, unless somebody has done so or changed it meanwhile. Returns whether it did.
    pub fn publish(&self, gate: Gate, text: &str) -> bool {
        self.write(|| (self.gate() == Gate::Unknown).then_some((gate, text)))
    }

    fn write<'t>(&self, decide: impl FnOnce() -> Option<(Gate, &'t str)>) -> bool {
        // Writers are rare and hold this for a copy of a few hundred bytes without a chance to fail between; a writer that
        // is killed takes the server, and so this memory, with it. Hence the spin ends.
        let version = loop {
            let version = self.version.load(Ordering::Acquire);
            if version.is_multiple_of(2)
                && self.version.compare_exchange(version, version + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                break version;
            }
            std::hint::spin_loop();
        };
        fence(Ordering::Release);
        let decided = decide();
        if let Some((gate, text)) = decided {
            let bytes = &text.as_bytes()[..text.len().min(MAX_STATE)];
            self.length.store(bytes.len() as u32, Ordering::Relaxed);
            for (to, from) in self.text.iter().zip(bytes) {
                to.store(*from, Ordering::Relaxed);
            }
            self.gate.store(gate as u32, Ordering::SeqCst);
        }
        self.version.store(version.wrapping_add(2), Ordering::Release);
        fence(Ordering::SeqCst);
        decided.is_some()
    }

    #[inline]
    pub fn window(&self) -> Window {
        let word = self.window.load(Ordering::Acquire);
        Window {
            serial: word as u32,
            role: (word >> 32) as u32,
            opened: self.opened.load(Ordering::Relaxed),
            until: self.until.load(Ordering::Relaxed),
            holder: self.holder.load(Ordering::Relaxed),
            by: self.by.load(Ordering::Relaxed),
        }
    }

    /// Opens a window; its serial is found here. The caller holds the extension's lock.
    pub fn open_window(&self, window: Window) {
        self.opened.store(window.opened, Ordering::Relaxed);
        self.until.store(window.until, Ordering::Relaxed);
        self.holder.store(window.holder, Ordering::Relaxed);
        self.by.store(window.by, Ordering::Relaxed);
        let serial = (self.window.load(Ordering::Relaxed) as u32).wrapping_add(1);
        self.window.store(u64::from(window.role) << 32 | u64::from(serial), Ordering::SeqCst);
    }

    /// Shuts that window, if it is not shut yet, and makes sure that whoever starts a statement, or comes to its commit, from
    /// now on sees it so. The fence pairs with the one in [`Backend::note`].
    pub fn shut_window(&self, window: Window) {
        let word = u64::from(window.role) << 32 | u64::from(window.serial);
        let shut = u64::from(window.serial);
        let _ = self.window.compare_exchange(word, shut, Ordering::SeqCst, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The text, unless writers got in the way again and again. Never waits: an ERROR may be under way.
    pub fn text(&self) -> Option<String> {
        for _ in 0..1000 {
            let before = self.version.load(Ordering::Acquire);
            if before.is_multiple_of(2) {
                let length = (self.length.load(Ordering::Relaxed) as usize).min(MAX_STATE);
                let bytes: Vec<u8> = self.text[..length].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
                fence(Ordering::Acquire);
                if self.version.load(Ordering::Relaxed) == before {
                    return String::from_utf8(bytes).ok();
                }
            }
            std::hint::spin_loop();
        }
        None
    }
}

/// The slot of a backend by its number.
#[inline]
pub fn backend(number: i32) -> Option<&'static Backend> {
    let array = BACKEND_ARRAY.load(Ordering::Relaxed);
    if array.is_null() || number < 0 || number as usize >= backend_slots() {
        return None;
    }
    // SAFETY: startup() laid out `backend_slots()` of them, and they are never freed.
    Some(unsafe { &*array.add(number as usize) })
}

impl Backend {
    /// Notes what this backend's transaction is about to run, and orders that before the next look at the gate. Returns
    /// whether it is the first note of this transaction.
    ///
    /// The fence pairs with the ones in [`Database::set`] and [`Database::move_gate`]: either this backend sees the gate closed, or whoever
    /// closed it sees this mark (and the activity report made before it).
    #[inline]
    pub fn note(&self, local_xid: u32, effect: Effect) -> bool {
        let mark = u64::from(local_xid) << 2 | effect as u64;
        let before = self.mark.load(Ordering::Relaxed);
        if before >> 2 != mark >> 2 || before < mark {
            self.mark.store(mark, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        before >> 2 != mark >> 2
    }

    /// The strongest effect so far of the transaction with this local id.
    pub fn effect_of(&self, local_xid: u32) -> Effect {
        let mark = self.mark.load(Ordering::Relaxed);
        match (mark >> 2 == u64::from(local_xid), mark & 3) {
            (false, _) | (_, 0) => Effect::Nothing,
            (true, 1) => Effect::Perhaps,
            (true, _) => Effect::Writes,
        }
    }

    pub fn forget(&self) {
        self.mark.store(0, Ordering::Relaxed);
    }

    pub fn in_utility(&self) -> bool {
        self.utility.load(Ordering::Relaxed) != 0
    }

    pub fn set_in_utility(&self, running: bool) {
        self.utility.store(running.into(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// This backend's slot.
#[inline]
pub fn my_backend() -> Option<&'static Backend> {
    backend(compat::my_backend())
}

fn queues() -> &'static [Queue] {
    let array = QUEUE_ARRAY.load(Ordering::Acquire);
    // SAFETY: startup() laid out QUEUES of them, and they are never freed.
    if array.is_null() { &[] } else { unsafe { std::slice::from_raw_parts(array, QUEUES) } }
}

fn common() -> Option<&'static Common> {
    // SAFETY: null, or points into shared memory, which lives as long as the process.
    unsafe { COMMON.load(Ordering::Acquire).as_ref() }
}

/// The queue of a database, if one was ever needed; `claim` makes it. `None` too if all are taken.
pub fn queue(database: u32, claim: bool) -> Option<&'static Queue> {
    // As in find_database().
    queues().iter().take_while(|queue| claim || queue.database.load(Ordering::Acquire) != 0).find(|queue| {
        let owner = if claim {
            queue.database.compare_exchange(0, database, Ordering::AcqRel, Ordering::Acquire).err()
        } else {
            Some(queue.database.load(Ordering::Acquire))
        };
        owner.is_none_or(|owner| owner == database)
    })
}

/// Databases whose events nobody collects although somebody should.
pub fn uncollected() -> impl Iterator<Item = u32> {
    queues()
        .iter()
        .filter(|queue| queue.wanted.load(Ordering::Acquire) != 0 && queue.collector.load(Ordering::Acquire) == 0)
        .map(|queue| queue.database.load(Ordering::Acquire))
}

/// Makes the calling process the one that is told when a collector is wanted.
pub fn become_launcher() {
    if let Some(common) = common() {
        // SAFETY: a pointer that is set before a background worker's main function runs.
        common.launcher.store(unsafe { pg_sys::MyLatch }, Ordering::Release);
    }
}

/// Wakes a process that waits for its latch. Neither locks nor raises.
fn wake(latch: &AtomicPtr<pg_sys::Latch>) {
    let latch = latch.load(Ordering::Acquire);
    if !latch.is_null() {
        // SAFETY: latches of processes are in PostgreSQL's shared memory and never freed; SetLatch() may be called from
        // signal handlers.
        unsafe { compat::SetLatch(latch) };
    }
}

impl Queue {
    /// The records.
    pub fn ring(&self) -> Ring<'_> {
        // SAFETY: startup() put queue_words() words for each queue, in the order of the queues.
        let words = unsafe {
            let index = (&raw const *self).offset_from(QUEUE_ARRAY.load(Ordering::Acquire)) as usize;
            std::slice::from_raw_parts(QUEUE_WORDS.load(Ordering::Acquire).add(index * queue_words()), queue_words())
        };
        Ring::new(&self.positions, words)
    }

    /// Wakes the collector, or has one started.
    pub fn call(&self) {
        self.wanted.store(1, Ordering::Release);
        if self.collector.load(Ordering::Acquire) != 0 {
            wake(&self.latch);
        } else if let Some(common) = common() {
            wake(&common.launcher);
        }
    }

    /// Wakes the collector if it waits for apply to go on.
    pub fn tell_progress(&self) {
        if self.open.load(Ordering::Relaxed) != 0 {
            wake(&self.latch);
        }
    }

    /// Whether conflicts stopped a subscription when the collector last counted.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed) != 0
    }

    /// How many conflicts stop a subscription, as the collector last counted.
    pub fn set_open(&self, count: u32) {
        self.open.store(count, Ordering::Relaxed);
    }

    /// Whether a transaction that changes the schema was ever prepared since the server started.
    pub fn has_prepared_change(&self) -> bool {
        self.prepared_change.load(Ordering::Relaxed) != 0
    }

    /// Remembers that one was.
    pub fn note_prepared_change(&self) {
        self.prepared_change.store(1, Ordering::Relaxed);
    }

    /// Makes the calling process the collector, unless there is one.
    pub fn collect(&self) -> bool {
        // SAFETY: backend-local values that are set before a background worker's main function runs.
        let (pid, latch) = unsafe { (pg_sys::MyProcPid, pg_sys::MyLatch) };
        if self.collector.compare_exchange(0, pid, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return false;
        }
        self.latch.store(latch, Ordering::Release);
        true
    }

    /// Ends what [`Queue::collect`] began, if this process did.
    pub fn leave(&self) {
        // SAFETY: a backend-local value.
        let pid = unsafe { pg_sys::MyProcPid };
        if self.collector.load(Ordering::Acquire) == pid {
            self.latch.store(null_mut(), Ordering::Release);
            self.collector.store(0, Ordering::Release);
            if let Some(common) = common() {
                wake(&common.launcher);
            }
        }
    }

    /// The process that collects, if any.
    pub fn collector(&self) -> Option<i32> {
        Some(self.collector.load(Ordering::Acquire)).filter(|pid| *pid != 0)
    }

    /// Says that a collector is needed.
    pub fn want(&self) {
        self.wanted.store(1, Ordering::Release);
    }

    /// Says that no collector is needed until the next [`Queue::call`].
    pub fn dismiss(&self) {
        self.wanted.store(0, Ordering::Release);
    }
}

/// What this process's transaction has excluded, as soon as it is committed.
static PENDING: Mutex<Vec<&Exclusion>> = Mutex::new(Vec::new());

/// Puts the exclusions of a transaction in force, or forgets them: it has ended.
pub fn settle_exclusions(committed: bool) {
    for place in PENDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).drain(..) {
        place.state.store(if committed { 2 } else { 0 }, Ordering::Release);
        if committed && let Some(common) = common() {
            common.exclusions_made.fetch_add(1, Ordering::Release);
        }
    }
}

/// Has a change left out when it comes, from the commit of this transaction on. False if there is no room to note it.
pub fn exclude(subscription: u32, lsn: u64, change: u32, fingerprint: u64) -> bool {
    let Some(common) = common() else { return false };
    if excluded(subscription, lsn).any(|known| known == (change, fingerprint)) {
        return true;
    }
    let Some(place) = common
        .exclusions
        .iter()
        .find(|place| place.state.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok())
    else {
        return false;
    };
    place.subscription.store(subscription, Ordering::Relaxed);
    place.change.store(change, Ordering::Relaxed);
    place.fingerprint.store(fingerprint, Ordering::Relaxed);
    place.lsn.store(lsn, Ordering::Relaxed);
    PENDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(place);
    true
}

fn exclusions(subscription: u32) -> impl Iterator<Item = &'static Exclusion> {
    let made = common().filter(|common| common.exclusions_made.load(Ordering::Acquire) > 0);
    made.into_iter().flat_map(|common| common.exclusions.iter()).filter(move |place| {
        place.state.load(Ordering::Acquire) == 2 && place.subscription.load(Ordering::Relaxed) == subscription
    })
}

/// The changes of a transaction that shall be left out: their places and fingerprints.
pub fn excluded(subscription: u32, lsn: u64) -> impl Iterator<Item = (u32, u64)> {
    exclusions(subscription)
        .filter(move |place| place.lsn.load(Ordering::Relaxed) == lsn)
        .map(|place| (place.change.load(Ordering::Relaxed), place.fingerprint.load(Ordering::Relaxed)))
}

/// Forgets what was to be left out of transactions before this one: commits come in order, so those are over.
pub fn forget_excluded_before(subscription: u32, lsn: u64) {
    for place in exclusions(subscription).filter(|place| place.lsn.load(Ordering::Relaxed) < lsn) {
        place.state.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn zeroed<T>() -> Box<T> {
        // SAFETY: Database and Backend are made of atomics, for which all-zero bytes are valid, as in shared memory.
        unsafe { Box::<T>::new_zeroed().assume_init() }
    }

    #[test]
    fn a_reader_never_sees_half_of_a_change() {
        let database = zeroed::<Database>();
        std::thread::scope(|scope| {
            for letter in ["a", "b"] {
                let database = &database;
                scope.spawn(move || {
                    for length in (1..MAX_STATE).step_by(7) {
                        database.set(Gate::Closed, &letter.repeat(length));
                    }
                });
            }
            let mut seen = 0;
            while seen < 1000 {
                if let Some(text) = database.text() {
                    assert!(text.bytes().all(|byte| byte == text.as_bytes()[0]), "torn: {text}");
                    seen += 1;
                }
            }
        });
    }

    #[test]
    fn publishing_never_overrides_what_is_known() {
        let database = zeroed::<Database>();
        assert_eq!(database.gate(), Gate::Unknown);
        database.publish(Gate::Open, "up");
        database.publish(Gate::Closed, "late");
        assert_eq!((database.gate(), database.text().as_deref()), (Gate::Open, Some("up")));
        database.set(Gate::Closed, "down");
        database.publish(Gate::Open, "later still");
        assert_eq!((database.gate(), database.text().as_deref()), (Gate::Closed, Some("down")));
    }

    #[test]
    fn a_window_is_shut_by_who_means_that_one() {
        let database = zeroed::<Database>();
        let open = |role| database.open_window(Window { serial: 0, role, opened: 6, until: 7, holder: 8, by: 9 });
        open(5);
        let first = database.window();
        assert_eq!(first, Window { serial: 1, role: 5, opened: 6, until: 7, holder: 8, by: 9 });
        database.shut_window(first);
        assert_eq!(database.window().role, 0);
        open(6);
        database.shut_window(first);
        assert_eq!((database.window().role, database.window().serial), (6, 2));
    }

    proptest! {
        #[test]
        fn a_backend_remembers_the_strongest_effect_of_its_transaction_and_of_no_other(
            statements in proptest::collection::vec((0u32..4, prop_oneof![Just(Effect::Perhaps), Just(Effect::Writes)]), 1..20)
        ) {
            let backend = zeroed::<Backend>();
            // Local transaction ids only grow; a backend has one transaction at a time.
            let mut current = (0, Effect::Nothing);
            for (step, effect) in statements {
                let xid = current.0 + step;
                current = if xid == current.0 { (xid, effect.max(current.1)) } else { (xid, effect) };
                backend.note(xid, effect);
                prop_assert_eq!(backend.effect_of(current.0), current.1);
                prop_assert_eq!(backend.effect_of(current.0 + 1), Effect::Nothing);
            }
            backend.forget();
            prop_assert_eq!(backend.effect_of(current.0), Effect::Nothing);
        }
    }
}
