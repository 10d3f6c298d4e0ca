//! The settings. Everyone else reads them through the functions here.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use pgrx::pg_sys;

use crate::state::{Mode, State};
use crate::{collector, compat, node, readonly};

static mut STATE: *mut c_char = null_mut();
static mut IDENTITY: *mut c_char = null_mut();
static mut NODE: *mut c_char = null_mut();
static mut REDACT: *mut c_char = null_mut();
static mut MAX_TUPLE_SIZE: c_int = 64;
static mut LOG_BUFFER: c_int = 2048;
static mut RETENTION: c_int = 30 * 24 * 60;

/// Whether this session was told at its start that its database is down. Never changes afterwards.
static STARTED_DOWN: AtomicBool = AtomicBool::new(false);

pub fn init() {
    // SAFETY: called from _PG_init; the variables are static, the strings too.
    unsafe {
        pg_sys::DefineCustomStringVariable(
            c"stillebot.state".as_ptr(),
            c"Whether the database is up or down, since when, by whom and why.".as_ptr(),
            c"Kept with the database by stillebot_down() and stillebot_up(); nobody else can set it. Empty means up."
                .as_ptr(),
            &raw mut STATE,
            c"".as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            (pg_sys::GUC_DISALLOW_IN_FILE | pg_sys::GUC_DISALLOW_IN_AUTO_FILE | pg_sys::GUC_NOT_IN_SAMPLE) as i32,
            Some(check_state),
            Some(assign_state),
            None,
        );
        pg_sys::DefineCustomStringVariable(
            c"stillebot.identity".as_ptr(),
            c"Which node the database is, of which pair, and where it was told so.".as_ptr(),
            c"Kept with the database by multihome.identify() and stillebot_adopt_identity(); nobody else can set it."
                .as_ptr(),
            &raw mut IDENTITY,
            c"".as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            (pg_sys::GUC_DISALLOW_IN_FILE | pg_sys::GUC_DISALLOW_IN_AUTO_FILE | pg_sys::GUC_NOT_IN_SAMPLE) as i32,
            Some(check_identity),
            Some(assign_identity),
            None,
        );
        pg_sys::DefineCustomStringVariable(
            c"stillebot.node".as_ptr(),
            c"The name of this node, as the agent's configuration and the operator call it.".as_ptr(),
            null(),
            &raw mut NODE,
            c"".as_ptr(),
            pg_sys::GucContext::PGC_SIGHUP,
            0,
            None,
            None,
            None,
        );
        pg_sys::DefineCustomIntVariable(
            c"stillebot.max_tuple_size".as_ptr(),
            c"How much of a row goes into the log of conflicts.".as_ptr(),
            c"Longer values are cut, and marked as cut.".as_ptr(),
            &raw mut MAX_TUPLE_SIZE,
            64,
            1,
            128,
            pg_sys::GucContext::PGC_SIGHUP,
            pg_sys::GUC_UNIT_KB as c_int,
            None,
            None,
            None,
        );
        pg_sys::DefineCustomIntVariable(
            c"stillebot.retention".as_ptr(),
            c"How long closed conflicts stay in the log.".as_ptr(),
            c"Open ones stay in any case. 0: for ever.".as_ptr(),
            &raw mut RETENTION,
            30 * 24 * 60,
            0,
            c_int::MAX / 60,
            pg_sys::GucContext::PGC_SIGHUP,
            pg_sys::GUC_UNIT_MIN as c_int,
            None,
            None,
            None,
        );
        pg_sys::DefineCustomStringVariable(
            c"stillebot.redact".as_ptr(),
            c"Tables of whose rows only keys go into the log of conflicts.".as_ptr(),
            c"A list of schema.table, separated by commas; \"schema.*\" and \"*\" stand for all of them.".as_ptr(),
            &raw mut REDACT,
            c"".as_ptr(),
            pg_sys::GucContext::PGC_SIGHUP,
            0,
            None,
            None,
            None,
        );
        pg_sys::DefineCustomIntVariable(
            c"stillebot.log_buffer".as_ptr(),
            c"Shared memory for conflicts on their way to the log, for each of eight databases with subscriptions."
                .as_ptr(),
            c"What does not fit is counted, and lost.".as_ptr(),
            &raw mut LOG_BUFFER,
            2048,
            1024,
            1024 * 1024,
            pg_sys::GucContext::PGC_POSTMASTER,
            pg_sys::GUC_UNIT_KB as c_int,
            None,
            None,
            None,
        );
        pg_sys::MarkGUCPrefixReserved(c"stillebot".as_ptr());
    }
}

/// The name of this node, if it was given one.
pub fn node() -> Option<String> {
    // SAFETY: a string setting is null or points to a C string that the setting owns.
    let name = unsafe { NODE.as_ref().map(|name| CStr::from_ptr(name)) }?;
    (!name.is_empty()).then(|| name.to_string_lossy().into_owned())
}

/// How many bytes of a row's values are kept.
pub fn max_tuple_size() -> usize {
    // SAFETY: a plain integer within its bounds.
    unsafe { MAX_TUPLE_SIZE as usize * 1024 }
}

/// How many bytes of records the queue of a database holds.
pub fn log_buffer() -> usize {
    // SAFETY: as above; constant while the server runs.
    unsafe { LOG_BUFFER as usize * 1024 }
}

/// The recorded state as this session got it when it connected.
pub fn session_state() -> State {
    // SAFETY: as above.
    let text = unsafe { STATE.as_ref().map(|text| CStr::from_ptr(text)) };
    State::parse(&text.unwrap_or_default().to_string_lossy())
}

pub fn session_started_down() -> bool {
    STARTED_DOWN.load(Relaxed)
}

/// Makes the calling session what a new one would be, now that its database is up: one that connected while it was down
/// would go on in default_transaction_read_only. Takes effect with the transaction, and is reported to the client.
pub fn leave_read_only() {
    // SAFETY: both strings are static; a setting that every user may change.
    unsafe {
        if session_started_down() && pg_sys::DefaultXactReadOnly {
            pg_sys::SetConfigOption(
                c"default_transaction_read_only".as_ptr(),
                c"off".as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
            );
        }
    }
}

/// The state comes from the database or not at all: not from SET, not from a role, not from a connection's options.
/// PGC_S_TEST is `alter database .. set` trying a value; readonly.rs decides who may do that.
unsafe extern "C-unwind" fn check_state(
    _value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    source: pg_sys::GucSource::Type,
) -> bool {
    comes_from_database(source, c"Only stillebot_down() and stillebot_up() change the state of a database.")
}

/// As [`check_state`].
unsafe extern "C-unwind" fn check_identity(
    _value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    source: pg_sys::GucSource::Type,
) -> bool {
    comes_from_database(source, c"Only multihome.identify() and the like change the identity of a database.")
}

fn comes_from_database(source: pg_sys::GucSource::Type, detail: &'static CStr) -> bool {
    use pg_sys::GucSource::{PGC_S_DATABASE, PGC_S_DEFAULT, PGC_S_DYNAMIC_DEFAULT, PGC_S_TEST};
    let allowed = matches!(source, PGC_S_DEFAULT | PGC_S_DYNAMIC_DEFAULT | PGC_S_DATABASE | PGC_S_TEST);
    if !allowed {
        // SAFETY: only printed, never freed, by the caller of these hooks.
        unsafe { pg_sys::GUC_check_errdetail_string = detail.as_ptr().cast_mut() };
    }
    allowed
}

/// Runs when a session takes the setting over from its database, before the client is told of the session's settings,
/// and after default_transaction_read_only, which is recorded before this one.
///
/// A database that was the only writable node before its server restarted has no default_transaction_read_only of its
/// own, but must not look writable to libpq and to the bot while it refuses writes. A replication worker, on the other
/// hand, must not have it: apply itself does not look, but triggers and identity columns would fail. Nor must the
/// collector, which writes the log of conflicts.
unsafe extern "C-unwind" fn assign_state(value: *const c_char, _extra: *mut c_void) {
    // SAFETY: PostgreSQL passes null or a C string.
    let Some(value) = (unsafe { value.as_ref() }) else { return };
    // SAFETY: as above.
    let state = State::parse(&unsafe { CStr::from_ptr(value) }.to_string_lossy());
    // SAFETY: plain reads and writes of backend-local settings.
    unsafe {
        if pg_sys::MyDatabaseId == pg_sys::InvalidOid {
            return;
        }
        if compat::IsLogicalWorker() || collector::is_this_process() {
            if state.state == Mode::Down {
                pg_sys::DefaultXactReadOnly = false;
            }
        } else if state.state == Mode::Down {
            STARTED_DOWN.store(true, Relaxed);
        } else if state.sole && readonly::is_closed_as(|state| state.rejoin) {
            STARTED_DOWN.store(true, Relaxed);
            pg_sys::DefaultXactReadOnly = true;
        }
    }
}

/// As [`assign_state`], for a copy of another node: it must not look writable either, before anybody has looked at it. On a
/// standby everybody is read-only as it is, and what is promoted is looked at then.
unsafe extern "C-unwind" fn assign_identity(value: *const c_char, _extra: *mut c_void) {
    // SAFETY: PostgreSQL passes null or a C string.
    let Some(value) = (unsafe { value.as_ref() }) else { return };
    // SAFETY: plain reads and writes of backend-local settings.
    unsafe {
        if pg_sys::MyDatabaseId == pg_sys::InvalidOid
            || compat::RecoveryInProgress()
            || !node::look_at(&CStr::from_ptr(value).to_string_lossy())
        {
            return;
        }
        if compat::IsLogicalWorker() || collector::is_this_process() {
            pg_sys::DefaultXactReadOnly = false;
        } else if readonly::is_closed_as(|state| state.foreign) {
            STARTED_DOWN.store(true, Relaxed);
            pg_sys::DefaultXactReadOnly = true;
        }
    }
}
