//! What is seen to when a subscription connects to its publisher, or is about to: no database replicates itself, no copy of a
//! node replicates in its stead, nobody follows a node into the past, and what would go round in circles is warned of.
//!
//! Whoever connects for a subscription does it through `walrcv_connect`, and so through [`connect`]: CREATE and REFRESH in
//! sessions, apply and table synchronisation in workers. ALTER .. CONNECTION and ENABLE do not connect; when core is through
//! with them, [`after`] does, for as long as a person may be kept waiting. If that fails it is as without us: the workers
//! will find out.
//!
//! Plain frames, as hooks are, but for the trial, which has to catch.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use pgrx::pg_sys::errcodes::PgSqlErrorCode::{
    ERRCODE_INVALID_OBJECT_DEFINITION, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, ERRCODE_QUERY_CANCELED,
    ERRCODE_WARNING,
};
use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgTryBuilder, pg_sys};

use crate::catalog::{self, Subscription};
use crate::compat::{self, ConnectArguments};
use crate::{node, tap};

/// How long a trial may take.
const TRIAL: Duration = Duration::from_secs(5);

/// DROP SUBSCRIPTION is at work, which must succeed whatever the connection leads to.
static DROPPING: AtomicBool = AtomicBool::new(false);
/// The publisher that this command connected to has a subscription in its database.
static PEER_SUBSCRIBES: AtomicBool = AtomicBool::new(false);

/// Before a utility command. What an ERROR has left behind of the one before is overwritten.
///
/// # Safety
/// `node` is a statement of PostgreSQL's.
pub unsafe fn before(node: *mut pg_sys::Node) {
    // SAFETY: every node has a tag.
    let dropping = unsafe { (*node).type_ } == pg_sys::NodeTag::T_DropSubscriptionStmt;
    DROPPING.store(dropping, Relaxed);
    PEER_SUBSCRIBES.store(false, Relaxed);
}

/// After a utility command, in its transaction, which an ERROR undoes.
///
/// # Safety
/// `node` is the statement that core has just run.
pub unsafe fn after(node: *mut pg_sys::Node) {
    use pg_sys::AlterSubscriptionType::{
        ALTER_SUBSCRIPTION_CONNECTION, ALTER_SUBSCRIPTION_ENABLED, ALTER_SUBSCRIPTION_OPTIONS,
    };
    DROPPING.store(false, Relaxed);
    // SAFETY: the tag says what the node is.
    unsafe {
        match (*node).type_ {
            pg_sys::NodeTag::T_CreateSubscriptionStmt => {
                warn_of_loops((*node.cast::<pg_sys::CreateSubscriptionStmt>()).subname, false);
            }
            pg_sys::NodeTag::T_AlterSubscriptionStmt => {
                let statement = node.cast::<pg_sys::AlterSubscriptionStmt>();
                match (*statement).kind {
                    ALTER_SUBSCRIPTION_CONNECTION => try_out((*statement).subname, true),
                    ALTER_SUBSCRIPTION_ENABLED => try_out((*statement).subname, false),
                    ALTER_SUBSCRIPTION_OPTIONS if names_origin((*statement).options) => {
                        warn_of_loops((*statement).subname, true);
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

/// An ERROR has ended the transaction, and with it whatever was at work.
pub fn aborted() {
    DROPPING.store(false, Relaxed);
}

/// In place of libpqwalreceiver's own.
///
/// # Safety
/// As core calls it.
pub unsafe fn connect(arguments: ConnectArguments) -> *mut pg_sys::WalReceiverConn {
    // SAFETY: passed on from core's own call.
    unsafe {
        let (logical, name) = (compat::is_logical(&arguments), compat::connects_for(&arguments));
        if logical && compat::IsLogicalWorker() && node::started_foreign() {
            refuse_copy(name);
        }
        let connection = compat::real_connect(tap::real(), arguments);
        if connection.is_null() || !logical || DROPPING.load(Relaxed) {
            return connection;
        }
        if is_here(connection) {
            let place = Place::of(connection);
            disconnect(connection);
            refuse_own(name, place);
        }
        if compat::IsLogicalWorker() {
            let applied = compat::applied_up_to();
            if applied != 0 && ends_before(connection, applied) {
                disconnect(connection);
                refuse_past(name, applied);
            }
        } else {
            PEER_SUBSCRIBES.store(affirms(connection, SUBSCRIBES.as_ptr()), Relaxed);
        }
        connection
    }
}

// --- To the past ------------------------------------------------------------------------------------------------

/// Whether the WAL of the publisher ends before what is applied here of it. What it sends is flushed there, so that cannot be
/// unless it has been rolled back, or lost its WAL. Core would have it begin at the position asked for, and what it writes
/// until it comes there would never be sent. A standby that was restarted may have more than it says, and loses nothing.
///
/// # Safety
/// `connection` is live and logical.
unsafe fn ends_before(connection: *mut pg_sys::WalReceiverConn, applied: u64) -> bool {
    let mut query = [0u8; 256];
    let written = write!(
        &mut query[..255],
        "select where case when pg_catalog.pg_is_in_recovery() then false \
         else pg_catalog.pg_current_wal_flush_lsn() < '{:X}/{:X}' end",
        applied >> 32,
        applied & 0xffff_ffff,
    );
    // SAFETY: the caller's promise; a C string, for the last byte was never written.
    written.is_ok() && unsafe { affirms(connection, query.as_ptr().cast()) }
}

/// The words by which multihome.record() knows it.
unsafe fn refuse_past(name: *const c_char, applied: u64) -> ! {
    // SAFETY: as for the others.
    unsafe {
        compat::errstart(pg_sys::PGERROR as c_int, std::ptr::null());
        compat::errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE as c_int);
        compat::errmsg(c"subscription \"%s\" does not replicate: its publisher has gone back in time".as_ptr(), name);
        compat::errdetail(
            c"Its WAL ends before %X/%X, up to where its changes are applied here: it was restored or rolled back."
                .as_ptr(),
            (applied >> 32) as c_uint,
            (applied & 0xffff_ffff) as c_uint,
        );
        compat::errhint(
            c"Take the publisher down; what it has lost is here. Then stillebot-agent deinit, empty its tables, and init."
                .as_ptr(),
        );
        compat::raise()
    }
}

// --- To oneself -------------------------------------------------------------------------------------------------

/// Where a connection leads, as libpq says it.
#[derive(Clone, Copy)]
struct Place {
    host: *mut c_char,
    port: c_int,
}

impl Place {
    /// # Safety
    /// `connection` is live.
    unsafe fn of(connection: *mut pg_sys::WalReceiverConn) -> Place {
        let mut place = Place { host: null_mut(), port: 0 };
        // SAFETY: the caller's promise; the host is palloc'd.
        unsafe {
            tap::real().walrcv_get_senderinfo.unwrap_unchecked()(connection, &mut place.host, &mut place.port);
        }
        if place.host.is_null() {
            place.host = c"unknown".as_ptr().cast_mut();
        }
        place
    }
}

/// Whether a connection leads to this database of this server. A copy of the server has the same identifier, but was
/// started at another time; another database of this server is a legitimate peer.
///
/// # Safety
/// `connection` is live and logical.
unsafe fn is_here(connection: *mut pg_sys::WalReceiverConn) -> bool {
    let mut query = [0u8; 512];
    // SAFETY: set once, when the server starts.
    let started = unsafe { pg_sys::PgStartTime };
    // SAFETY: values that are settled before anybody connects. PostgreSQL counts from 2000; microseconds, as numeric, are exact.
    unsafe {
        let written = write!(
            &mut query[..511],
            "select where (select system_identifier from pg_catalog.pg_control_system()) = {} \
             and (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database()) = {} \
             and (extract(epoch from pg_catalog.pg_postmaster_start_time()) - 946684800) * 1000000 = {}",
            pg_sys::GetSystemIdentifier().cast_signed(), // As SQL shows it.
            pg_sys::MyDatabaseId.to_u32(),
            started,
        );
        written.is_ok() && affirms(connection, query.as_ptr().cast())
    }
}

/// Whether a query without columns has rows. So it needs no types, and no transaction, which a worker has none of yet.
/// False if it fails: what cannot be asked is left to core.
///
/// # Safety
/// `connection` is live and logical.
unsafe fn affirms(connection: *mut pg_sys::WalReceiverConn, query: *const c_char) -> bool {
    // SAFETY: the caller's promise; the result is palloc'd and ours to free.
    unsafe {
        let result = tap::real().walrcv_exec.unwrap_unchecked()(connection, query, 0, std::ptr::null());
        let rows = (*result).tuplestore;
        let some = (*result).status == pg_sys::WalRcvExecStatus::WALRCV_OK_TUPLES
            && !rows.is_null()
            && compat::tuplestore_tuple_count(rows) > 0;
        if !rows.is_null() {
            compat::tuplestore_end(rows);
        }
        some
    }
}

/// # Safety
/// `connection` is live, and not used any more.
unsafe fn disconnect(connection: *mut pg_sys::WalReceiverConn) {
    // SAFETY: the caller's promise.
    unsafe { tap::real().walrcv_disconnect.unwrap_unchecked()(connection) };
}

/// The words by which multihome.record() knows it.
unsafe fn refuse_own(name: *const c_char, place: Place) -> ! {
    // SAFETY: strings of PostgreSQL's; errfinish() does not return from an ERROR.
    unsafe {
        compat::errstart(pg_sys::PGERROR as c_int, std::ptr::null());
        compat::errcode(ERRCODE_INVALID_OBJECT_DEFINITION as c_int);
        compat::errmsg(c"subscription \"%s\" would replicate this database to itself".as_ptr(), name);
        compat::errdetail(
            c"Its connection, to host %s and port %d, leads back to this very database.".as_ptr(),
            place.host,
            place.port,
        );
        compat::errhint(c"Check host, port and dbname in its connection string.".as_ptr());
        compat::raise()
    }
}

unsafe fn refuse_copy(name: *const c_char) -> ! {
    // SAFETY: as above.
    unsafe {
        compat::errstart(pg_sys::PGERROR as c_int, std::ptr::null());
        compat::errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE as c_int);
        compat::errmsg(
            c"subscription \"%s\" does not replicate: this data directory is a copy of another node's".as_ptr(),
            name,
        );
        compat::errhint(
            c"If the original is gone for good, SELECT stillebot_adopt_identity(); otherwise stop this server."
                .as_ptr(),
        );
        compat::raise()
    }
}

// --- The trial --------------------------------------------------------------------------------------------------

/// Refuses a subscription that, as it is recorded now, leads back here. `anyway`: even if it is disabled.
unsafe fn try_out(name: *const c_char, anyway: bool) {
    // SAFETY: a transaction is in progress; what core has just changed becomes visible.
    unsafe {
        compat::CommandCounterIncrement();
        let Some(subscription) = catalog::subscription(name) else { return };
        let mut place = Place { host: null_mut(), port: 0 };
        if (subscription.enabled || anyway) && leads_here(name, &subscription, &mut place) {
            refuse_own(name, place);
        }
    }
}

/// Connects as a worker would. It has to catch, and so to own memory.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn leads_here(name: *const c_char, subscription: &Subscription, place: &mut Place) -> bool {
    let place = Cell::from_mut(place);
    let look = |connection| {
        // SAFETY: live and logical.
        unsafe {
            let here = is_here(connection);
            if here {
                place.set(Place::of(connection));
            }
            here
        }
    };
    ask(name, subscription, look).unwrap_or(false)
}

/// Whether a query without columns has rows at the publisher of a subscription; `None` if it does not answer. Raises if the
/// statement is cancelled: only called from guarded functions, in a transaction.
pub fn ask_publisher(name: &str, query: &str) -> Option<bool> {
    let (name, query) = (compat::c_string(name), compat::c_string(query));
    // SAFETY: the caller has a transaction; what is found is palloc'd.
    let subscription = unsafe { compat::guarded(|| catalog::subscription(name.as_ptr())) }?;
    // SAFETY: live and logical.
    ask(name.as_ptr(), &subscription, |connection| unsafe { affirms(connection, query.as_ptr()) })
}

/// Connects to the publisher of a subscription, and asks. `None` if that fails, or takes too long.
///
/// What is caught here ends no transaction, for there is nothing to undo: libpqwalreceiver holds no lock. 16 leaves a
/// connection behind, until the session ends, that was cut short while it was being made.
fn ask(
    name: *const c_char,
    subscription: &Subscription,
    question: impl Fn(*mut pg_sys::WalReceiverConn) -> bool,
) -> Option<bool> {
    let connection = Cell::new(null_mut());
    compat::interrupt_after(TRIAL);
    PgTryBuilder::new(AssertUnwindSafe(|| {
        // SAFETY: strings of PostgreSQL's; nothing in it is to be dropped.
        unsafe {
            compat::guarded(|| {
                let mut error = null_mut();
                let arguments =
                    compat::connect_arguments(subscription.conninfo, subscription.must_use_password, name, &mut error);
                connection.set(compat::real_connect(tap::real(), arguments));
                (!connection.get().is_null()).then(|| question(connection.get()))
            })
        }
    }))
    .catch_others(|error: CaughtError| {
        // Somebody wants this statement to end.
        if was_cancelled(&error) && !compat::was_interrupted() { error.rethrow() } else { None }
    })
    .finally(|| {
        compat::interrupt_no_more();
        if !connection.get().is_null() {
            // SAFETY: live, and not used any more.
            unsafe { disconnect(connection.get()) };
        }
    })
    .execute()
}

fn was_cancelled(error: &CaughtError) -> bool {
    match error {
        CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => {
            report.sql_error_code() == ERRCODE_QUERY_CANCELED
        }
        CaughtError::RustPanic { .. } => false,
    }
}

// --- In circles -------------------------------------------------------------------------------------------------

/// Whether the database that is asked has subscriptions.
const SUBSCRIBES: &CStr =
    c"select from pg_catalog.pg_subscription s join pg_catalog.pg_database d on d.oid = s.subdbid \
                            where d.datname = pg_catalog.current_database()";

/// Warns if a subscription that brings what came to its publisher from elsewhere is one of several, here or there.
/// `connects`: the publisher may be asked; CREATE has done so, unless it was told not to.
unsafe fn warn_of_loops(name: *const c_char, connects: bool) {
    // SAFETY: a transaction is in progress; what core has just changed becomes visible.
    unsafe {
        compat::CommandCounterIncrement();
        let Some(subscription) = catalog::subscription(name) else { return };
        if !subscription.any_origin
            || !(PEER_SUBSCRIBES.load(Relaxed)
                || catalog::has_other_subscription(name)
                || (connects && peer_subscribes(name, &subscription)))
        {
            return;
        }
        if compat::errstart(pg_sys::WARNING as c_int, std::ptr::null()) {
            compat::errcode(ERRCODE_WARNING as c_int);
            compat::errmsg(
                c"subscription \"%s\" has origin = any: what its publisher has from others it sends on to this database, and that loops if it came from here".as_ptr(),
                name,
            );
            compat::errhint(
                c"Between nodes that replicate to each other: ALTER SUBSCRIPTION %s SET (origin = none).".as_ptr(),
                compat::quote_identifier(name),
            );
            compat::finish_report();
        }
    }
}

/// For commands that have not connected.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn peer_subscribes(name: *const c_char, subscription: &Subscription) -> bool {
    // SAFETY: live and logical.
    ask(name, subscription, |connection| unsafe { affirms(connection, SUBSCRIBES.as_ptr()) }).unwrap_or(false)
}

/// # Safety
/// A list of DefElem.
unsafe fn names_origin(options: *const pg_sys::List) -> bool {
    // SAFETY: the caller's promise; the array is as long as the list says.
    unsafe {
        let Some(list) = options.as_ref() else { return false };
        (0..list.length as usize).any(|index| {
            let option = (*list.elements.add(index)).ptr_value.cast::<pg_sys::DefElem>();
            CStr::from_ptr((*option).defname) == c"origin"
        })
    }
}
