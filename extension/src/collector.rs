//! The bottom half of the log of conflicts: one background worker per database with subscriptions, which takes events out
//! of the queue and has `multihome.record()` write them down, or notifies that the schema has changed; and the launcher
//! that starts it.
//!
//! An event leaves the queue when the transaction that recorded it is committed, so the death of a collector loses
//! nothing. What cannot be recorded for a reason that passes (a lock, a full disk) stays in the queue until it can, for as
//! long as the queue has room; what cannot be recorded at all (no extension, a table that was dropped) is tried again, with
//! less of it, then counted as dropped: replication never waits for the log.

use std::panic::UnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pgrx::PgSqlErrorCode;
use pgrx::bgworkers::{
    BackgroundWorker, BackgroundWorkerBuilder, BackgroundWorkerStatus, BgWorkerStartTime, DynamicBackgroundWorker,
    SignalWakeFlags,
};
use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgTryBuilder, pg_sys};

use crate::event::{Event, Kind};
use crate::shmem::{self, Queue};
use crate::{compat, conflicts, local, node};

/// How often the launcher and collectors look without having been woken: a wake-up can get lost when the one to be woken
/// is just being replaced.
const LOOK: Duration = Duration::from_secs(1);
/// How often a collector looks whether its database still has subscriptions: DROP DATABASE and the like wait five seconds
/// for processes in it to leave.
const LEAVE: Duration = Duration::from_secs(2);
/// How often it looks whether old rows can go, which reads all of the log.
const UPKEEP: Duration = Duration::from_secs(10);
/// How long what could not be recorded is left alone before it is tried again.
const PAUSE: Duration = Duration::from_millis(500);
/// Events that are recorded in one transaction.
const BATCH: usize = 100;
/// Such transactions in a row.
const ROUNDS: usize = 20;
/// How long a statement may take.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(20);
const RECORD: &str = "select multihome.record($1::jsonb)";
const TELL: &str = "select 1::bigint from pg_notify('stillebot_schema', $1)";

/// Whether this process is a collector. Set before it connects, because its database may be down.
static THIS_PROCESS: AtomicBool = AtomicBool::new(false);

pub fn is_this_process() -> bool {
    THIS_PROCESS.load(Relaxed)
}

pub fn init() {
    BackgroundWorkerBuilder::new("stillebot launcher")
        .set_type("stillebot launcher")
        .set_library("stillebot")
        .set_function("stillebot_launcher_main")
        .enable_shmem_access(None)
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(Duration::from_secs(1)))
        .load();
}

/// Starts a collector wherever one is wanted and none is at work.
#[pgrx::pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn stillebot_launcher_main(_argument: pg_sys::Datum) {
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP | SignalWakeFlags::SIGTERM);
    shmem::become_launcher();
    // From its start to its end, that is, also before it has said that it is there.
    let mut started: Vec<(u32, DynamicBackgroundWorker)> = Vec::new();
    loop {
        started.retain(|(_, worker)| !matches!(worker.pid(), Err(BackgroundWorkerStatus::Stopped)));
        for database in shmem::uncollected() {
            if started.iter().any(|(known, _)| *known == database) {
                continue;
            }
            // SAFETY: a backend-local value.
            let launcher = unsafe { pg_sys::MyProcPid };
            let worker = BackgroundWorkerBuilder::new("stillebot collector")
                .set_type("stillebot collector")
                .set_library("stillebot")
                .set_function("stillebot_collector_main")
                .set_argument(Some(pg_sys::Datum::from(database)))
                .enable_spi_access()
                .set_start_time(BgWorkerStartTime::RecoveryFinished)
                .set_restart_time(None)
                .set_notify_pid(launcher)
                .load_dynamic();
            // Without a free place among max_worker_processes there is none now, and one later.
            if let Ok(worker) = worker {
                started.push((database, worker));
            }
        }
        if !BackgroundWorker::wait_latch(Some(LOOK)) {
            // Told to end, by the postmaster or by mistake: as core's launcher, with a code that has it started again.
            // SAFETY: ends this process in order; no frame holds anything that must be dropped.
            unsafe { pg_sys::proc_exit(1) };
        }
    }
}

/// Collects the events of one database until it has no subscription any more.
#[pgrx::pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn stillebot_collector_main(database: pg_sys::Datum) {
    THIS_PROCESS.store(true, Relaxed);
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP);
    compat::on_signal(libc::SIGTERM, end);
    compat::on_signal(libc::SIGINT, cancel);
    let database = pg_sys::Oid::from(database.value() as u32);
    let Some(queue) = shmem::queue(database.to_u32(), false) else { return };
    // SAFETY: the callback is a plain function; it runs when this process ends, however it does.
    unsafe { pg_sys::before_shmem_exit(Some(leave), pg_sys::Datum::from(database.to_u32())) };
    if !queue.collect() {
        return;
    }
    // If that fails, the database was dropped or lets nobody in, and no other collector would fare better: then not until
    // something happens there again.
    queue.dismiss();
    BackgroundWorker::connect_worker_to_spi_by_oid(Some(database), None);
    queue.want();
    // SAFETY: settings of this process, set as any session may. The log must not wait for a table that somebody has locked,
    // and writes values in the same way on all nodes. Plans are made once, when the log may be empty, and must do when it is
    // long.
    unsafe {
        for (name, value) in [
            (c"lock_timeout", c"1s"),
            (c"search_path", c"pg_catalog"),
            (c"timezone", c"UTC"),
            (c"intervalstyle", c"postgres"),
            (c"bytea_output", c"hex"),
            (c"enable_seqscan", c"off"),
            (c"jit", c"off"),
        ] {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_SESSION,
            );
        }
    }
    collect(queue);
}

unsafe extern "C-unwind" fn leave(_code: i32, database: pg_sys::Datum) {
    if let Some(queue) = shmem::queue(database.value() as u32, false) {
        queue.leave();
    }
}

fn collect(queue: &'static Queue) {
    // At once, for what was resolved before the server started must be in force before apply comes there.
    run("select multihome.resume()", &[]);
    let (mut upkeep_at, mut leave_at) = (Instant::now(), Instant::now());
    let mut first = true;
    loop {
        // SAFETY: reloads settings, as every process does when it was told to.
        unsafe {
            if BackgroundWorker::sighup_received() {
                pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
            }
        }
        let news = drain(queue);
        if node::started_foreign() && (news.any || first) {
            run("select multihome.park()", &[]);
        }
        if news.any || first || queue.is_open() {
            queue.set_open(run("select multihome.sweep()", &[]).unwrap_or(0) as u32);
        }
        first = false;
        if upkeep_at.elapsed() >= UPKEEP {
            upkeep_at = Instant::now();
            run("select multihome.upkeep()", &[]);
        }
        if !news.more && leave_at.elapsed() >= LEAVE {
            leave_at = Instant::now();
            if subscriptions() == Some(0) {
                queue.dismiss();
                return;
            }
        }
        let pause = if news.more { Duration::ZERO } else { LOOK };
        if !BackgroundWorker::wait_latch(Some(pause)) || is_ending() {
            return;
        }
    }
}

/// What was in the queue.
struct News {
    any: bool,
    /// And still is.
    more: bool,
}

/// Has what is in the queue written down, for a while: in a flood there is other work too.
fn drain(queue: &Queue) -> News {
    let ring = queue.ring();
    let mut any = false;
    for _ in 0..ROUNDS {
        // Many in one transaction: a flush of the WAL takes longer than an event.
        let (mut position, mut events, mut record) = (ring.start(), Vec::new(), Vec::new());
        while events.len() < BATCH
            && let Some(next) = ring.read(position, &mut record)
        {
            events.push((next, std::mem::take(&mut record)));
            position = next;
        }
        if events.is_empty() || is_ending() {
            return News { any, more: false };
        }
        any = true;
        let mut changes = Vec::new();
        events.retain(|(_, record)| match schema_change(record) {
            Some(change) => {
                changes.push(change);
                false
            }
            None => true,
        });
        if !changes.is_empty() {
            // Again, if this process dies or what is with them cannot be recorded yet, which does no harm; not at all if that fails.
            run(TELL, &changes);
        }
        let texts: Vec<Vec<u8>> = events.iter().map(|(_, record)| json(record, false)).collect();
        if texts.is_empty() || run(RECORD, &texts).is_some() {
            ring.remove_to(position);
            continue;
        }
        // One of them cannot be recorded, or none can now: one by one.
        for (next, record) in events {
            match record_one(&record) {
                Ok(()) => {}
                // It stays, for the next collector if this one ends.
                Err(Failure::Passing) => return News { any, more: false },
                Err(_) if is_ending() => return News { any, more: false },
                Err(_) => ring.count_dropped(),
            }
            ring.remove_to(next);
        }
        ring.remove_to(position);
    }
    News { any, more: true }
}

/// What is to be notified, of a change of the schema.
fn schema_change(record: &[u8]) -> Option<Vec<u8>> {
    Event::read(record).filter(|event| event.kind == Kind::Schema).map(|event| event.texts[0].to_vec())
}

/// Why something was not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// The reason lies outside, and passes.
    Passing,
    /// It took too long, or somebody cancelled it.
    Cancelled,
    /// It would fail again.
    Lasting,
}

impl Failure {
    fn of(code: PgSqlErrorCode) -> Failure {
        use PgSqlErrorCode::*;
        match code {
            ERRCODE_QUERY_CANCELED => Failure::Cancelled,
            ERRCODE_LOCK_NOT_AVAILABLE
            | ERRCODE_T_R_SERIALIZATION_FAILURE
            | ERRCODE_T_R_DEADLOCK_DETECTED
            | ERRCODE_INSUFFICIENT_RESOURCES
            | ERRCODE_DISK_FULL
            | ERRCODE_OUT_OF_MEMORY
            | ERRCODE_TOO_MANY_CONNECTIONS
            | ERRCODE_CONFIGURATION_LIMIT_EXCEEDED => Failure::Passing,
            _ => Failure::Lasting,
        }
    }
}

/// Has one event written down, if it can be: if need be, after a while, and without the rows that it brings, which may be
/// what fails or takes too long.
fn record_one(record: &[u8]) -> Result<(), Failure> {
    let mut failure = Failure::Lasting;
    for (attempt, bare) in [false, true, true].into_iter().enumerate() {
        if is_ending() || attempt > 0 && !pause() {
            return Err(failure);
        }
        match try_run(RECORD, &[json(record, bare)]) {
            Ok(_) => return Ok(()),
            Err(Failure::Passing) => {
                pause();
                return Err(Failure::Passing);
            }
            Err(now) => failure = now,
        }
    }
    // Without its rows nothing of a user's is called, so it waited for something.
    Err(if failure == Failure::Cancelled { Failure::Passing } else { failure })
}

/// Waits, whoever calls meanwhile. False: this process ends.
fn pause() -> bool {
    let until = Instant::now() + PAUSE;
    while Instant::now() < until {
        if !BackgroundWorker::wait_latch(Some(until.saturating_duration_since(Instant::now()))) || is_ending() {
            return false;
        }
    }
    true
}

/// Whether this process was told to end.
fn is_ending() -> bool {
    // SAFETY: a flag that a signal handler sets.
    unsafe { (&raw const pg_sys::ShutdownRequestPending).read_volatile() != 0 }
}

/// The parameter of [`RECORD`].
fn json(record: &[u8], bare: bool) -> Vec<u8> {
    compat::valid_in_server_encoding(match Event::read(record) {
        Some(event) if bare => Event { changes: &[], ..event }.to_json(),
        Some(event) => event.to_json(),
        None => Vec::new(), // Which no cast accepts.
    })
}

/// How many subscriptions of this database may have something to tell. Asked with or without the extension.
fn subscriptions() -> Option<i64> {
    let counted = in_transaction(|| {
        let enabled = "select count(*) from pg_subscription s
                        where s.subenabled and s.subdbid = (select oid from pg_database where datname = current_database())";
        conflicts::one_bigint(enabled, &[])
    });
    counted.ok()
}

/// Runs a query that returns one bigint, in a transaction of its own that stays on this node: once for each text, which is
/// its parameter, or once without. Returns the last number. `None` if it failed, which has been reported to the server's
/// log, or if the extension is not there.
fn run(query: &str, texts: &[Vec<u8>]) -> Option<i64> {
    try_run(query, texts).ok()
}

/// As [`run`]; an error says whether trying again helps.
fn try_run(query: &str, texts: &[Vec<u8>]) -> Result<i64, Failure> {
    let written = in_transaction(|| last_number(query, texts));
    if written.is_ok() {
        HINDERED.store(false, Relaxed);
    }
    written
}

/// Does something in a transaction that stays on this node. An error has been reported.
fn in_transaction(work: impl FnOnce() -> Option<i64> + UnwindSafe) -> Result<i64, Failure> {
    // SAFETY: the outermost frame of a process that is connected to a database; an ERROR is caught below.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        local::begin();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
    }
    OVERDUE.store(false, Relaxed);
    RUNNING.store(true, Relaxed);
    compat::cancel_after(STATEMENT_TIMEOUT);
    let result = PgTryBuilder::new(|| {
        let value = work();
        // SAFETY: ends what was begun above. That may fail as well: the queue of notifications may be full.
        unsafe {
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
        }
        Ok(value)
    })
    .catch_others(|error| Err(describe(&error)))
    .execute();
    RUNNING.store(false, Relaxed);
    compat::cancel_no_more();
    match result {
        Ok(value) => {
            // SAFETY: between transactions.
            unsafe { pg_sys::pgstat_report_stat(true) };
            value.ok_or(Failure::Lasting)
        }
        Err((message, failure)) => {
            // SAFETY: the error has been taken from PostgreSQL; this undoes everything since StartTransactionCommand().
            unsafe { pg_sys::AbortCurrentTransaction() };
            // Of what goes on for hours it is said once that it has begun.
            let passing = failure == Failure::Passing;
            let said = HINDERED.swap(passing, Relaxed) && passing;
            if !is_ending() && !said {
                pgrx::warning!("stillebot could not write its log of conflicts: {message}");
            }
            Err(failure)
        }
    }
}

/// The part of [`run`] that runs in its transaction.
fn last_number(query: &str, texts: &[Vec<u8>]) -> Option<i64> {
    // The lock, for as long as rows are written: node.rs changes the name by which they belong to this node.
    // SAFETY: a transaction is in progress.
    unsafe {
        let extension = pg_sys::get_extension_oid(c"stillebot".as_ptr(), true);
        if extension == pg_sys::InvalidOid {
            return None;
        }
        pg_sys::LockDatabaseObject(pg_sys::ExtensionRelationId, extension, 0, pg_sys::AccessShareLock as i32);
        if pg_sys::get_extension_oid(c"stillebot".as_ptr(), true) != extension {
            return None; // Dropped meanwhile.
        }
    }
    if texts.is_empty() {
        return conflicts::one_bigint(query, &[]);
    }
    let mut last = None;
    for text in texts {
        last = conflicts::one_bigint(query, &[Some(text)]);
    }
    last
}

/// Whether there is something to cancel.
static RUNNING: AtomicBool = AtomicBool::new(false);
/// Whether what is running took too long already, and was cancelled in vain: functions of users may catch that.
static OVERDUE: AtomicBool = AtomicBool::new(false);
/// Whether what was last tried failed for a reason that passes.
static HINDERED: AtomicBool = AtomicBool::new(false);

/// SIGTERM: what is running ends, and then this process. pgrx's own handler would let the shutdown of the server wait for
/// a user's function, which the rows of a conflict may call, for as long as that takes.
unsafe extern "C-unwind" fn end(signal: i32) {
    // SAFETY: plain stores, and functions that are made for signal handlers.
    unsafe {
        (&raw mut pg_sys::ShutdownRequestPending).write_volatile(1);
        match (RUNNING.load(Relaxed), OVERDUE.load(Relaxed)) {
            (true, true) => compat::die(signal),
            (true, false) => compat::StatementCancelHandler(signal),
            (false, _) => compat::SetLatch(pg_sys::MyLatch),
        }
    }
}

/// SIGINT: from the timeout, or from somebody who wants that one statement to end.
unsafe extern "C-unwind" fn cancel(signal: i32) {
    if RUNNING.load(Relaxed) {
        OVERDUE.store(true, Relaxed);
        // SAFETY: as above.
        unsafe { if is_ending() { compat::die(signal) } else { compat::StatementCancelHandler(signal) } }
    }
}

fn describe(error: &CaughtError) -> (String, Failure) {
    let report = match error {
        CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => report,
        CaughtError::RustPanic { ereport, .. } => ereport,
    };
    (report.message().to_owned(), Failure::of(report.sql_error_code()))
}
