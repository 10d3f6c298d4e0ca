//! Transactions that stay on this node: the log of conflicts, and what makes room for a remote change.
//!
//! Such a transaction carries the origin `DoNotReplicateId`, which core itself keeps for changes that no subscription
//! with `origin = none` shall get: it needs no entry in a catalog, any number of processes may use it at once, and recovery
//! knows it. It also passes read-only mode: what mends replication must not require opening the database.
//!
//! Both are for the verb that began it, and for nothing else that its caller may want to write: when the verb is done, the
//! rest of the transaction is read-only.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use pgrx::pg_sys;

use crate::{compat, shmem};

/// The local id of the transaction that stays here; 0 if none does.
static LOCAL: AtomicU32 = AtomicU32::new(0);
/// Whether the verb that began it is still at work.
static AT_WORK: AtomicBool = AtomicBool::new(false);

pub fn init() {
    // SAFETY: called from _PG_init in the postmaster; backends inherit the callback.
    unsafe { pg_sys::RegisterXactCallback(Some(transaction_event), compat::NO_ARGUMENT) };
}

/// Whether this process's transaction stays here.
#[inline]
pub fn is_active() -> bool {
    let local = LOCAL.load(Relaxed);
    local != 0 && local == compat::my_local_xid()
}

/// Whether this process is writing what stays here.
#[inline]
pub fn is_writing() -> bool {
    is_active() && AT_WORK.load(Relaxed)
}

/// Keeps all of this transaction here, which must not have written before: the origin of its commit is that of all of it.
pub fn begin() {
    AT_WORK.store(true, Relaxed);
    LOCAL.store(compat::my_local_xid(), Relaxed);
    // SAFETY: backend-local variables. Without a time of its own core sets the time to that of the commit, and there it
    // would stay for the next transaction.
    unsafe {
        pg_sys::replorigin_session_origin = pg_sys::DoNotReplicateId as pg_sys::RepOriginId;
        pg_sys::replorigin_session_origin_timestamp = 0;
        pg_sys::XactReadOnly = false;
    }
}

/// Whatever else the transaction does, it writes nothing more: that would not replicate.
pub fn finish() {
    if is_active() {
        AT_WORK.store(false, Relaxed);
        // SAFETY: backend-local.
        unsafe { pg_sys::XactReadOnly = true };
    }
}

unsafe extern "C-unwind" fn transaction_event(event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    if !matches!(event, XACT_EVENT_COMMIT | XACT_EVENT_ABORT | XACT_EVENT_PREPARE) {
        return;
    }
    shmem::settle_exclusions(event == XACT_EVENT_COMMIT);
    if LOCAL.swap(0, Relaxed) != 0 {
        // SAFETY: as in begin().
        unsafe {
            pg_sys::replorigin_session_origin = pg_sys::InvalidRepOriginId as pg_sys::RepOriginId;
            pg_sys::replorigin_session_origin_timestamp = 0;
        }
    }
}
