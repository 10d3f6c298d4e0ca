//! The bottom half of the log of conflicts: one background worker per database with subscriptions, which takes events out
//! of the queue and has `multihome.record()` write them down; and the launcher that starts it.
//!
//! An event leaves the queue when the transaction that recorded it is committed, so the death of a collector loses
//! nothing. What cannot be recorded (no extension, a table that was dropped, a full disk) is tried again, with less of it,
//! then counted as dropped: replication never waits for the log.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pgrx::bgworkers::{BackgroundWorker, BackgroundWorkerBuilder, BgWorkerStartTime, SignalWakeFlags};
use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgTryBuilder, pg_sys};

use crate::event::Event;
use crate::shmem::{self, Queue};
use crate::{compat, local};

/// How often the launcher and collectors look without having been woken: a wake-up can get lost when the one to be woken
/// is just being replaced.
const LOOK: Duration = Duration::from_secs(1);
/// How often a collector looks whether old rows can go and whether its database still has subscriptions.
const UPKEEP: Duration = Duration::from_secs(5);
/// How long a failed event is left alone.
const PAUSE: Duration = Duration::from_millis(500);
/// How often one event is tried as it is, and then how often without its data.
const ATTEMPTS: u32 = 2;

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
    // One that was started needs a moment to say that it is there.
    let mut started: Vec<(u32, Instant)> = Vec::new();
    loop {
        started.retain(|(_, at)| at.elapsed() < LOOK);
        for database in shmem::uncollected() {
            if started.iter().any(|(known, _)| *known == database) {
                continue;
            }
            started.push((database, Instant::now()));
            // Without a free place among max_worker_processes there is none now, and one later.
            let _ = BackgroundWorkerBuilder::new("stillebot collector")
                .set_type("stillebot collector")
                .set_library("stillebot")
                .set_function("stillebot_collector_main")
                .set_argument(Some(pg_sys::Datum::from(database)))
                .enable_spi_access()
                .set_start_time(BgWorkerStartTime::RecoveryFinished)
                .set_restart_time(None)
                .load_dynamic();
        }
        if !BackgroundWorker::wait_latch(Some(LOOK)) {
            return;
        }
    }
}

/// Collects the events of one database until it has no subscription any more.
#[pgrx::pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn stillebot_collector_main(database: pg_sys::Datum) {
    THIS_PROCESS.store(true, Relaxed);
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP | SignalWakeFlags::SIGTERM);
    let database = pg_sys::Oid::from(database.value() as u32);
    let Some(queue) = shmem::queue(database.to_u32(), false) else { return };
    // SAFETY: the callback is a plain function; it runs when this process ends, however it does.
    unsafe { pg_sys::before_shmem_exit(Some(leave), pg_sys::Datum::from(database.to_u32())) };
    if !queue.collect() {
        return;
    }
    BackgroundWorker::connect_worker_to_spi_by_oid(Some(database), None);
    // SAFETY: settings of this process, set as any session may. The log must not wait for a table that somebody has locked,
    // nor be lost with the newest commits.
    unsafe {
        for (name, value) in [(c"lock_timeout", c"1s"), (c"statement_timeout", c"20s"), (c"search_path", c"pg_catalog")]
        {
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
    let mut record = Vec::new();
    let mut attempts = 0;
    let mut pause = LOOK;
    // At once, for what was resolved before the server started must be in force before apply comes there.
    run("select multihome.resume()", None);
    let mut upkeep_at = Instant::now();
    let mut first = true;
    loop {
        // SAFETY: reloads settings, as every process does when it was told to.
        unsafe {
            if BackgroundWorker::sighup_received() {
                pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
            }
        }
        let mut news = first;
        first = false;
        while queue.ring().peek(&mut record) {
            news = true;
            match recorded(&record, attempts >= ATTEMPTS) {
                true => {
                    queue.ring().pop();
                    attempts = 0;
                }
                false if attempts + 1 < 2 * ATTEMPTS => {
                    attempts += 1;
                    pause = PAUSE;
                    break;
                }
                false => {
                    queue.ring().pop();
                    queue.ring().count_dropped();
                    attempts = 0;
                }
            }
            pgrx::check_for_interrupts!();
        }
        if news || queue.is_open() {
            queue.set_open(run("select multihome.sweep()", None).unwrap_or(0) as u32);
        }
        if upkeep_at.elapsed() >= UPKEEP {
            upkeep_at = Instant::now();
            run("select multihome.upkeep()", None);
            if subscriptions() == Some(0) {
                queue.dismiss();
                return;
            }
        }
        if !BackgroundWorker::wait_latch(Some(pause)) {
            return;
        }
        pause = LOOK;
    }
}

/// Has one event written down. `bare`: without the rows that came and the rows that are in the way.
fn recorded(record: &[u8], bare: bool) -> bool {
    let Some(mut event) = Event::read(record) else { return false };
    if bare {
        event.changes = &[];
    }
    run("select multihome.record($1::jsonb)", Some(event.to_json())).is_some()
}

/// How many subscriptions this database has.
fn subscriptions() -> Option<i64> {
    run(
        "select count(*) from pg_subscription s where s.subdbid = (select oid from pg_database where datname = current_database())",
        None,
    )
}

/// Runs a query that returns one bigint, in a transaction of its own that stays on this node. `None` if it failed, which
/// has been reported to the server's log, or if the extension is not there.
fn run(query: &str, argument: Option<Vec<u8>>) -> Option<i64> {
    // SAFETY: the outermost frame of a process that is connected to a database; an ERROR is caught below.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        local::begin();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
    }
    let result = PgTryBuilder::new(|| {
        // SAFETY: a transaction is in progress.
        let there = unsafe { pg_sys::get_extension_oid(c"stillebot".as_ptr(), true) } != pg_sys::InvalidOid;
        Ok(there.then(|| {
            let argument = argument.map(compat::valid_in_server_encoding);
            crate::conflicts::one_bigint(query, argument.as_deref())
        }))
    })
    .catch_others(|error| Err(describe(&error)))
    .execute();
    match result {
        Ok(value) => {
            // SAFETY: ends what was begun above.
            unsafe {
                pg_sys::PopActiveSnapshot();
                pg_sys::CommitTransactionCommand();
                pg_sys::pgstat_report_stat(true);
            }
            value.flatten()
        }
        Err(message) => {
            // SAFETY: the error has been taken from PostgreSQL; this undoes everything since StartTransactionCommand().
            unsafe { pg_sys::AbortCurrentTransaction() };
            pgrx::warning!("stillebot could not write its log of conflicts: {message}");
            None
        }
    }
}

fn describe(error: &CaughtError) -> String {
    match error {
        CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => report.message().to_owned(),
        CaughtError::RustPanic { ereport, .. } => ereport.message().to_owned(),
    }
}
