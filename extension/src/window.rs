//! The maintenance window: for a while, the sessions of one role may write to a database that is down. It is the only way
//! through, and for changes of the schema.
//!
//! Only sessions that began after it was opened, and the one that opened it: an application that runs as that role and has
//! not heard that its database is down would otherwise write here, and what is written here does not travel.
//!
//! It lives in shared memory and nowhere else, so a restart shuts it. It is shut by its holder, the session that opened it;
//! by the end of that session; and by its deadline, which whoever wants in looks at. The record of the database says
//! "down" all the time, so nothing that is told by it, as libpq and the bot are, takes the database for the live one.
//!
//! What is written in a window stays on its node, like the transactions of local.rs: a change of the schema is made on every
//! node, and the rows that it fills in would come to each of them once more.
//!
//! Why nothing is committed behind the LSN that [`multihome_close_window`] returns. Whatever commits in a window was let in by
//! it: marked itself in its backend's slot, full fence, looked at the window; once when it began to write, and again before
//! its commit. Against it: the window is shut, full fence, the marks are read. So a transaction either sees the window shut, at
//! the latest before its commit, and is refused; or it looked before, and then its mark is seen and its end waited for. A mark
//! stays until the transaction is over. Prepared transactions are looked for after those that have processes, because
//! a transaction is prepared before it has none.

use std::ffi::{CStr, c_int, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::compat;
use crate::shmem::{self, Database, Window};
use crate::verbs::{Aim, Call, PREPARED, drain, duration, fail, lines, mark_the_edge, not_null};

const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

pub fn init() {
    // SAFETY: called from _PG_init in the postmaster; backends inherit the callback.
    unsafe { pg_sys::RegisterXactCallback(Some(transaction_event), compat::NO_ARGUMENT) };
}

// --- Who is let in ----------------------------------------------------------------------------------------------

/// `local xid << 32 | serial`: the transaction that a window has let in, and which.
static LET_IN: AtomicU64 = AtomicU64::new(0);

/// The serial of the window that let this transaction in.
#[inline]
fn let_in_by() -> Option<u32> {
    let let_in = LET_IN.load(Relaxed);
    (let_in != 0 && (let_in >> 32) as u32 == compat::my_local_xid()).then_some(let_in as u32)
}

#[inline]
pub fn has_let_in() -> bool {
    let_in_by().is_some()
}

/// Whether this process may write now to a database that is closed. `marked`: this transaction has just marked itself, so it
/// belongs to this window from here on, and to no later one.
///
/// The role is that which has authenticated itself: neither SET ROLE nor a superuser's SET SESSION AUTHORIZATION makes one
/// pass as another. Called from hooks: cannot raise.
#[inline]
pub fn lets_in(database: &Database, marked: bool) -> bool {
    let window = database.window();
    window.role != 0 && admits(window, marked)
}

fn admits(window: Window, marked: bool) -> bool {
    if !is_for_me(window) || is_over(window) || comes_from_before(window) {
        return false;
    }
    match let_in_by() {
        Some(serial) => serial == window.serial,
        None => {
            if marked {
                LET_IN.store(u64::from(compat::my_local_xid()) << 32 | u64::from(window.serial), Relaxed);
                stay_here();
            }
            true
        }
    }
}

fn is_for_me(window: Window) -> bool {
    // SAFETY: backend-local, and set in whatever runs statements.
    window.role == unsafe { pg_sys::GetAuthenticatedUserId() }.to_u32()
}

/// Whether this session is older than the window that it wants in by, and not its holder.
fn comes_from_before(window: Window) -> bool {
    // SAFETY: backend-local, set before a process runs its first statement.
    unsafe { pg_sys::MyStartTimestamp < window.opened && pg_sys::MyProcPid != window.holder }
}

/// Whether a window is open that would let this session in if it were younger.
pub fn is_for_younger_sessions(database: &Database) -> bool {
    let window = database.window();
    is_for_me(window) && !is_over(window) && comes_from_before(window)
}

/// Unless the session says itself where its changes are from.
fn stay_here() {
    // SAFETY: backend-local variables; see local::begin().
    unsafe {
        if pg_sys::replorigin_session_origin == pg_sys::InvalidRepOriginId as pg_sys::RepOriginId {
            pg_sys::replorigin_session_origin = pg_sys::DoNotReplicateId as pg_sys::RepOriginId;
            pg_sys::replorigin_session_origin_timestamp = 0;
        }
    }
}

fn stay_no_more() {
    // SAFETY: as above.
    unsafe {
        if pg_sys::replorigin_session_origin == pg_sys::DoNotReplicateId as pg_sys::RepOriginId {
            pg_sys::replorigin_session_origin = pg_sys::InvalidRepOriginId as pg_sys::RepOriginId;
            pg_sys::replorigin_session_origin_timestamp = 0;
        }
    }
}

fn is_over(window: Window) -> bool {
    // SAFETY: reads the clock.
    window.role == 0 || unsafe { compat::GetCurrentTimestamp() } >= window.until
}

/// Since the server started.
pub fn was_ever_open(database: &Database) -> bool {
    database.window().serial != 0
}

// --- The SQL functions ------------------------------------------------------------------------------------------

#[pg_extern(sql = false)]
fn multihome_open_window(role: Option<&CStr>, length: Option<Interval>) {
    let (Some(role), Some(length)) = (role, length) else {
        fail(
            PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
            "a maintenance window needs a role and a length",
            None,
            "Say both: SELECT multihome.open_window('owner', '10 min').",
        )
    };
    let length = length_of(length);
    let call = Call::begin("multihome.open_window()", None);
    call.require_down("be opened for maintenance");
    require_shut(call.database(), "multihome.open_window()");
    // SAFETY: a C string; raises if there is no such role. The clock and the rest are backend-local.
    let window = unsafe {
        let opened = compat::GetCurrentTimestamp();
        Window {
            serial: 0,
            role: pg_sys::get_role_oid(role.as_ptr(), false).to_u32(),
            opened,
            until: opened + length.as_micros() as i64,
            holder: pg_sys::MyProcPid,
            by: pg_sys::GetSessionUserId().to_u32(),
        }
    };
    shut_at_exit();
    *TO_OPEN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(window);
}

/// In this order: what is prepared can still be committed after the refusal; then nobody is let in, and no one more can
/// commit; then those who were about to are waited for.
#[pg_extern(sql = false)]
fn multihome_close_window(timeout: Option<Interval>) -> i64 {
    let deadline = Instant::now() + duration(not_null("timeout", timeout));
    let call = Call::begin("multihome.close_window()", Some(deadline));
    call.require_down("have a maintenance window closed");
    let window = call.database().window();
    if !is_over(window) && compat::two_phase_is_on() {
        let prepared = lines(&format!("select format('%L of %s', gid, owner) from {PREPARED} order by prepared"), &[]);
        if !prepared.is_empty() {
            fail(
                PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
                "the maintenance window stays open: there are prepared transactions",
                Some(&prepared.join("\n")),
                "COMMIT PREPARED or ROLLBACK PREPARED them; then close the window.",
            );
        }
    }
    call.database().shut_window(window);
    drain(call.database(), Aim::ShutWindow, deadline, true);
    mark_the_edge()
}

/// Refuses what cannot be done while a window is open. One that is over is shut for good.
pub fn require_shut(database: &Database, verb: &str) {
    let window = database.window();
    if is_over(window) {
        database.shut_window(window);
        return;
    }
    fail(
        PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
        &format!("{verb} is refused while a maintenance window is open"),
        Some(&format!(
            "It is open for role {} until {}, by {}, process {}.",
            role_name(window.role),
            instant(window.until),
            role_name(window.by),
            window.holder
        )),
        "SELECT multihome.close_window() closes it; so does the end of that process.",
    );
}

/// The window that is open now, as multihome.state() tells of it.
pub fn described(database: &Database) -> Option<serde_json::Value> {
    let window = database.window();
    (!is_over(window)).then(|| {
        serde_json::json!({
            "role": role_name(window.role),
            "until": instant(window.until),
            "by": role_name(window.by),
            "pid": window.holder,
        })
    })
}

fn length_of(length: Interval) -> Duration {
    let refused = || -> ! {
        fail(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            "a maintenance window is open for more than nothing and at most 24 hours",
            None,
            "Say how long: SELECT multihome.open_window('owner', '10 min').",
        )
    };
    if length.micros() < 0 || length.days() < 0 || length.months() < 0 {
        refused();
    }
    let length = duration(length);
    if length.is_zero() || length > LONGEST {
        refused();
    }
    length
}

fn role_name(role: u32) -> String {
    // SAFETY: a palloc'd name, or null if the role was dropped meanwhile.
    unsafe {
        let name = pg_sys::GetUserNameFromId(role.into(), true);
        if name.is_null() {
            format!("with oid {role}")
        } else {
            compat::from_server_encoding(CStr::from_ptr(name).to_bytes())
        }
    }
}

/// A timestamptz as text, in UTC.
fn instant(at: i64) -> String {
    const EPOCH: Duration = Duration::from_secs(946_684_800); // 2000-01-01
    let at = std::time::UNIX_EPOCH + EPOCH + Duration::from_micros(at.max(0) as u64);
    humantime::format_rfc3339_seconds(at).to_string()
}

// --- Opening with the call, shutting with the session -----------------------------------------------------------

/// Opened when the transaction of the call commits: a call that fails after all has opened nothing.
static TO_OPEN: Mutex<Option<Window>> = Mutex::new(None);

unsafe extern "C-unwind" fn transaction_event(event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    if !matches!(event, XACT_EVENT_COMMIT | XACT_EVENT_ABORT | XACT_EVENT_PREPARE) {
        return;
    }
    if LET_IN.swap(0, Relaxed) != 0 {
        stay_no_more();
    }
    let window = TO_OPEN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    if event == XACT_EVENT_COMMIT
        && let (Some(window), Some(database)) = (window, shmem::my_database())
    {
        database.open_window(window);
    }
}

/// Before a session leaves shared memory, it shuts the window that it holds. (One that cannot, because it was killed, takes
/// the server and so the window with it.)
fn shut_at_exit() {
    static REGISTERED: AtomicBool = AtomicBool::new(false);
    if !REGISTERED.swap(true, Relaxed) {
        // SAFETY: the callback is a plain function of a library that is never unloaded.
        unsafe { pg_sys::before_shmem_exit(Some(shut_mine), pg_sys::Datum::from(0)) };
    }
}

unsafe extern "C-unwind" fn shut_mine(_code: c_int, _argument: pg_sys::Datum) {
    if let Some(database) = shmem::my_database() {
        let window = database.window();
        // SAFETY: backend-local.
        if window.role != 0 && window.holder == unsafe { pg_sys::MyProcPid } {
            database.shut_window(window);
        }
    }
}
