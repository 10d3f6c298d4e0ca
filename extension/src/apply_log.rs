//! The top half of the log of conflicts: a hook that sees what a replication worker reports, and puts it, with the transaction
//! that the tap remembers, into the queue of its database. The bottom half is collector.rs.
//!
//! It runs while an ERROR is being reported, before or after its transaction was rolled back. So it takes no lock, asks no
//! catalog, allocates nothing and cannot raise; it copies bytes from here to there. What the report says to others it
//! leaves as it is, with one exception: lines that core would not have logged, had the tap not asked for them, are kept
//! out of the server's log.

use std::ffi::{CStr, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::UNIX_EPOCH;

use pgrx::pg_sys;

use crate::event::{Delivery, Event, HEAD, Kind, MAX_TEXT, TEXTS};
use crate::tap::tap;
use crate::{compat, shmem};

static mut PREVIOUS_EMIT_LOG: pg_sys::emit_log_hook_type = None;

pub fn init() {
    // SAFETY: called from _PG_init in the postmaster; backends inherit the hook.
    unsafe {
        PREVIOUS_EMIT_LOG = pg_sys::emit_log_hook;
        pg_sys::emit_log_hook = Some(emit_log);
    }
}

unsafe extern "C-unwind" fn emit_log(report: *mut pg_sys::ErrorData) {
    // SAFETY: PostgreSQL passes the report it is about to send.
    unsafe {
        if compat::IsLogicalWorker() {
            // Nothing here can panic; if it does nevertheless, the report goes on its way without us.
            let is_ours = catch_unwind(AssertUnwindSafe(|| {
                note(&*report);
                keep_out_of_the_log(&mut *report)
            }));
            if is_ours.unwrap_or(false) {
                return;
            }
        }
        if let Some(previous) = PREVIOUS_EMIT_LOG {
            previous(report);
        }
    }
}

fn note(report: &pg_sys::ErrorData) {
    let Some(kind) = kind(report) else { return };
    // SAFETY: a backend-local value.
    let database = unsafe { pg_sys::MyDatabaseId }.to_u32();
    let Some((subscription, copied)) = compat::my_subscription().filter(|_| database != 0) else { return };
    let Some(queue) = shmem::queue(database, true) else { return };

    let tap = tap();
    let silent = kind == Kind::Silent;
    if silent && conflict(text(report.message), text(report.message_id)).ends_with(ORIGIN_DIFFERS) {
        let committed = tap.current().map_or(0, |transaction| transaction.commit_ts);
        if replaced_at(text(report.detail)).is_some_and(|replaced| replaced <= committed) {
            return;
        }
    }
    let mut event = Event {
        kind,
        delivery: if copied != 0 { Delivery::Copy } else { Delivery::None },
        subscription,
        copied,
        sqlstate: sqlstate(report.sqlerrcode),
        xid: 0,
        lsn: 0,
        commit_ts: 0,
        // SAFETY: reads the clock.
        at: unsafe { compat::GetCurrentTimestamp() },
        operation: tap.message,
        seen: 0,
        failing: 0,
        fingerprint: 0,
        complete: false,
        texts: texts(report, silent),
        relations: &[],
        changes: &[],
    };
    if let Some(transaction) = tap.current() {
        event.delivery = transaction.delivery;
        (event.xid, event.lsn, event.commit_ts) = (transaction.xid, transaction.lsn, transaction.commit_ts);
        event.seen = transaction.seen;
        event.complete = transaction.ended && transaction.whole;
        event.relations = &transaction.relations;
        event.changes = &transaction.changes;
        if transaction.applying {
            (event.failing, event.fingerprint) = (transaction.seen, transaction.fingerprint());
            if silent {
                event.changes = transaction.last_change();
            }
        }
    }
    let mut head = [0; HEAD];
    queue.ring().push(&event.parts(&mut head));
    queue.call();
}

/// Rows that were not found: core's own words, which no translation changes. There are two of each, the second for
/// partitions.
const NOT_FOUND: [(&[u8], &CStr); 2] = [
    (b"logical replication did not find row to be updated", c"update_missing"),
    (b"logical replication did not find row to be deleted", c"delete_missing"),
];
/// From 18 on, core tells conflicts itself.
const DETECTED: &[u8] = b"conflict detected on relation";
/// The end of two types of conflict: the row was last changed by another than the publisher of what comes. Two nodes that
/// both write do that to each other's rows all day. What comes was committed after what it replaces, then: only where it was
/// not have the two changes crossed, which the node tells that has the later one replaced.
const ORIGIN_DIFFERS: &[u8] = b"_origin_differs";
const SKIPPED: &[u8] = b"logical replication completed skipping transaction";

/// What a report is to us; `None`: nothing.
fn kind(report: &pg_sys::ErrorData) -> Option<Kind> {
    let id = text(report.message_id);
    match report.elevel as u32 {
        pg_sys::PGERROR => Some(Kind::Error),
        pg_sys::LOG if id.starts_with(SKIPPED) => Some(Kind::Skipped),
        pg_sys::LOG if id.starts_with(DETECTED) => Some(Kind::Silent),
        pg_sys::DEBUG1 if NOT_FOUND.iter().any(|(words, _)| id.starts_with(words)) => Some(Kind::Silent),
        _ => None,
    }
}

/// In the order of [`TEXTS`]. Silent conflicts come in floods, so they are told without what the other fields say too.
fn texts(report: &pg_sys::ErrorData, silent: bool) -> [&'static [u8]; TEXTS.len()] {
    let (message, id) = (text(report.message), text(report.message_id));
    let conflict = conflict(message, id);
    [
        message,
        if silent { &[] } else { id },
        if silent && !conflict.ends_with(ORIGIN_DIFFERS) { &[] } else { text(report.detail) },
        if silent { &[] } else { text(report.context) },
        text(report.schema_name),
        text(report.table_name),
        text(report.constraint_name),
        conflict,
    ]
}

/// The type of a conflict where core's words tell it; otherwise nothing.
fn conflict(message: &'static [u8], id: &[u8]) -> &'static [u8] {
    const MARK: &[u8] = b"conflict=";
    if let Some((_, name)) = NOT_FOUND.iter().find(|(words, _)| id.starts_with(words)) {
        return name.to_bytes();
    }
    if !id.starts_with(DETECTED) {
        return b"";
    }
    // conflict detected on relation "%s.%s": conflict=%s
    let at = message.windows(MARK.len()).rposition(|part| part == MARK);
    at.map_or(b"", |at| &message[at + MARK.len()..])
}

/// When the row was committed that a change replaces, in microseconds since 2000: the last time in the first line of the
/// detail. timestamptz_to_str() writes ISO 8601 in the time zone of the process, whatever DateStyle and language.
fn replaced_at(detail: &[u8]) -> Option<i64> {
    const SHAPE: &[u8] = b"0000-00-00 00:00:00";
    const EPOCH: i64 = 946_684_800;
    let line = detail.split(|byte| *byte == b'\n').next()?;
    let fits = |text: &[u8]| {
        text.iter().zip(SHAPE).all(|(byte, like)| *byte == *like || *like == b'0' && byte.is_ascii_digit())
    };
    let time = &line[line.windows(SHAPE.len()).rposition(fits)?..];
    let zone = SHAPE.len() + time[SHAPE.len()..].iter().position(|byte| matches!(byte, b'+' | b'-'))?;
    let clock = humantime::parse_rfc3339_weak(str::from_utf8(&time[..zone]).ok()?).ok()?;
    let clock = i64::try_from(clock.duration_since(UNIX_EPOCH).ok()?.as_micros()).ok()?;
    // +hh, +hh:mm or +hh:mm:ss
    let mut east = 0;
    for (part, seconds) in time[zone..].chunks(3).zip([3600, 60, 1]) {
        let [b'+' | b'-' | b':', tens @ b'0'..=b'9', ones @ b'0'..=b'9'] = part else { break };
        east += seconds * i64::from((tens - b'0') * 10 + (ones - b'0'));
    }
    let east = if time[zone] == b'-' { -east } else { east };
    Some(clock - (EPOCH + east) * 1_000_000)
}

/// A text of a report, bounded. It lives as long as the report, which outlives our looking at it.
fn text(text: *const c_char) -> &'static [u8] {
    if text.is_null() {
        return &[];
    }
    // SAFETY: strings of a report end with a NUL.
    let bytes = unsafe { CStr::from_ptr(text) }.to_bytes();
    &bytes[..bytes.len().min(MAX_TEXT)]
}

/// A packed SQLSTATE, see MAKE_SQLSTATE() in elog.h.
fn sqlstate(mut code: c_int) -> [u8; 5] {
    [0; 5].map(|_: u8| {
        let letter = (code & 0x3f) as u8 + b'0';
        code >>= 6;
        letter
    })
}

/// Takes lines out of the server's log that are there only because the tap makes core talk. True: this is one, and nobody
/// else would have been told of it.
fn keep_out_of_the_log(report: &mut pg_sys::ErrorData) -> bool {
    let is_ours = tap().level().is_some_and(|level| !is_logged(report.elevel, level));
    if is_ours {
        report.output_to_server = false;
    }
    is_ours
}

/// Whether a report goes to the server's log at that log_min_messages: is_log_level_output() of elog.c.
pub fn is_logged(level: c_int, minimum: c_int) -> bool {
    let (level, minimum) = (level as u32, minimum as u32);
    if level == pg_sys::LOG || level == pg_sys::LOG_SERVER_ONLY {
        minimum == pg_sys::LOG || minimum <= pg_sys::PGERROR
    } else if level == pg_sys::WARNING_CLIENT_ONLY {
        false
    } else if minimum == pg_sys::LOG {
        level >= pg_sys::FATAL
    } else {
        level >= minimum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sqlstate_is_unpacked() {
        let packed = pg_sys::errcodes::PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION as c_int;
        assert_eq!(&sqlstate(packed), b"23505");
        let packed = pg_sys::errcodes::PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED as c_int;
        assert_eq!(&sqlstate(packed), b"40P01");
    }

    #[test]
    fn the_type_of_a_conflict_is_read_from_the_report() {
        assert_eq!(conflict(b"..", b"logical replication did not find row to be updated in .."), b"update_missing");
        assert_eq!(conflict(b"..", b"logical replication did not find row to be deleted in .."), b"delete_missing");
        let told = b"conflict detected on relation \"public.conflict=t\": conflict=update_origin_differs";
        assert_eq!(conflict(told, DETECTED), b"update_origin_differs");
    }

    #[test]
    fn when_a_replaced_row_was_committed_is_read_from_the_detail() {
        let at = |time: &str| {
            replaced_at(format!("Updating the row that was modified locally in transaction 765 at {time}.\nExisting local row (2001-01-01 00:00:00+00).").as_bytes())
        };
        assert_eq!(at("2000-01-01 00:00:01.5+00"), Some(1_500_000));
        assert_eq!(at("2000-01-01 05:30:00+05:30"), Some(0));
        assert_eq!(at("1999-12-31 22:00:00.000001-02"), Some(1));
        assert_eq!(at("2000-01-01 00:00:01+00:00:01"), Some(0));
        assert_eq!(at("noon"), None);
        assert_eq!(replaced_at(b""), None);
        assert_eq!(replaced_at("am 2000-01-01 00:00:02+00 geändert, in 765".as_bytes()), Some(2_000_000));
    }

    #[test]
    fn log_levels_are_those_of_core() {
        for (level, minimum, logged) in [
            (pg_sys::DEBUG1, pg_sys::WARNING, false),
            (pg_sys::LOG, pg_sys::WARNING, true),
            (pg_sys::LOG, pg_sys::FATAL, false),
            (pg_sys::PGERROR, pg_sys::LOG, false),
            (pg_sys::FATAL, pg_sys::LOG, true),
            (pg_sys::NOTICE, pg_sys::WARNING, false),
        ] {
            assert_eq!(is_logged(level as c_int, minimum as c_int), logged, "{level} at {minimum}");
        }
    }
}
