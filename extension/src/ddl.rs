//! Changes of the schema are told when they are committed: the event triggers of `sql/` say here what a transaction has
//! changed, and its end puts that into the queue of the collector, which notifies in a transaction of its own. A
//! transaction that has notified by itself could not be prepared.
//!
//! Deliberately tells only that something has changed, and in few words: what, the agent compares.

use std::ffi::c_void;
use std::sync::Mutex;

use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::compat;
use crate::event::{Delivery, Event, HEAD, Kind, TEXTS};
use crate::shmem::{self, Queue};

/// Bytes that are told of one transaction; a notification has less than 8000.
const MOST: usize = 1900;

/// What this process's transaction has changed, each with the subtransaction that did it.
static PENDING: Mutex<Vec<(u32, Vec<u8>)>> = Mutex::new(Vec::new());

pub fn init() {
    // SAFETY: called from _PG_init in the postmaster; backends inherit the callbacks.
    unsafe {
        pg_sys::RegisterXactCallback(Some(transaction_event), compat::NO_ARGUMENT);
        pg_sys::RegisterSubXactCallback(Some(subtransaction_event), compat::NO_ARGUMENT);
    }
}

/// Has a text told once this transaction is committed. False: nobody would, for there is no collector.
#[pg_extern(sql = false)]
fn multihome_tell_at_commit(text: &[u8]) -> bool {
    let collected = queue().is_some_and(|queue| queue.collector().is_some());
    if collected {
        note(text);
    }
    collected
}

/// COMMIT PREPARED has committed what another session changed, maybe. Which one has nobody remembers, and after a restart not even
/// that there was one; the watch sees that at its next look.
pub fn committed_prepared() {
    if queue().is_some_and(Queue::has_prepared_change) {
        note(b"COMMIT PREPARED");
    }
}

fn note(text: &[u8]) {
    let mut pending = PENDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let length: usize = pending.iter().map(|(_, text)| text.len() + SEPARATOR.len()).sum();
    if length + text.len() <= MOST {
        // SAFETY: a backend-local value.
        pending.push((unsafe { pg_sys::GetCurrentSubTransactionId() }, text.to_vec()));
    }
}

const SEPARATOR: &[u8] = b"; ";

fn queue() -> Option<&'static Queue> {
    // SAFETY: a backend-local value.
    shmem::queue(unsafe { pg_sys::MyDatabaseId }.to_u32(), false)
}

unsafe extern "C-unwind" fn transaction_event(event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    if !matches!(event, XACT_EVENT_COMMIT | XACT_EVENT_ABORT | XACT_EVENT_PREPARE) {
        return;
    }
    let pending = std::mem::take(&mut *PENDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    if pending.is_empty() {
        return;
    }
    let Some(queue) = queue() else { return };
    match event {
        // Everybody sees it by now.
        XACT_EVENT_COMMIT => tell(queue, &pending),
        XACT_EVENT_PREPARE => queue.note_prepared_change(),
        _ => {}
    }
}

fn tell(queue: &Queue, pending: &[(u32, Vec<u8>)]) {
    let text = pending.iter().map(|(_, text)| text.as_slice()).collect::<Vec<_>>().join(SEPARATOR);
    let mut texts: [&[u8]; TEXTS.len()] = [&[]; TEXTS.len()];
    texts[0] = &text;
    let event = Event {
        kind: Kind::Schema,
        delivery: Delivery::None,
        subscription: 0,
        copied: 0,
        sqlstate: *b"00000",
        xid: 0,
        lsn: 0,
        commit_ts: 0,
        // SAFETY: reads the clock.
        at: unsafe { compat::GetCurrentTimestamp() },
        operation: 0,
        seen: 0,
        failing: 0,
        fingerprint: 0,
        complete: false,
        texts,
        relations: &[],
        changes: &[],
    };
    queue.ring().push(&event.parts(&mut [0; HEAD]));
    queue.call();
}

unsafe extern "C-unwind" fn subtransaction_event(
    event: pg_sys::SubXactEvent::Type,
    own: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _argument: *mut c_void,
) {
    if event == pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB {
        // Ids only grow: what came after its begin was part of it.
        PENDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).retain(|(id, _)| *id < own);
    }
}
