//! What the SQL of the log of conflicts cannot do by itself. `sql/` has the rest: which rows are in the way, what is one
//! conflict and what is its repetition, how one is resolved.

use std::ffi::CString;

use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::verbs::{fail, prevent_in_block, prevent_in_writing_statement};
use crate::{compat, local, shmem};

/// Begins a transaction that stays on this node; see local.rs.
#[pg_extern(sql = false)]
fn multihome_begin_local(verb: &[u8]) {
    begin_local(&compat::from_server_encoding(verb));
}

pub fn begin_local(verb: &str) {
    if local::is_active() {
        return local::begin();
    }
    prevent_in_block(verb);
    prevent_in_writing_statement(verb, "Call it as a statement of its own.");
    // SAFETY: backend-local; raises on a standby, where nothing can be written.
    unsafe { pg_sys::PreventCommandDuringRecovery(compat::c_string(verb).as_ptr()) };
    // An apply worker, in a trigger, or a session that replays another node's transactions: the origin is theirs, and
    // without it at commit they would apply the same again.
    // SAFETY: backend-local.
    if unsafe { pg_sys::replorigin_session_origin } != pg_sys::InvalidRepOriginId as pg_sys::RepOriginId {
        fail(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            &format!("{verb} cannot be called where transactions have a replication origin"),
            None,
            "Call it from an ordinary session.",
        );
    }
    local::begin();
}

/// Ends what a verb wrote that stays on this node; see local.rs.
#[pg_extern(sql = false)]
fn multihome_end_local() {
    local::finish();
}

/// Runs a query as another role, as core runs the expressions of an index: functions of that role's making cannot take
/// over the rights of whoever called, and settings are as before when it is done, above all search_path, by which the
/// caller finds its own functions and operators. Returns the text in the first column of the first row.
#[pg_extern(sql = false)]
fn multihome_as_role(role: pg_sys::Oid, query: &[u8], first: Option<&[u8]>, second: Option<&[u8]>) -> Option<Vec<u8>> {
    const CONTEXT: u32 = pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION;
    let query = CString::new(query).expect("a text has no NUL");
    let (mut user, mut context) = (pg_sys::InvalidOid, 0);
    // SAFETY: backend-local state; if the query fails, the end of its (sub)transaction puts it back.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
        pg_sys::SetUserIdAndSecContext(role, context | CONTEXT as i32);
        let settings = pg_sys::NewGUCNestLevel();
        let result = first_column(&query, &[first, second], |datum| {
            let text = pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr());
            pgrx::varlena::varlena_to_byte_slice(text).to_vec()
        });
        pg_sys::AtEOXact_GUC(false, settings);
        pg_sys::SetUserIdAndSecContext(user, context);
        result
    }
}

/// Has a change of a remote transaction left out when it comes; see tap.rs.
#[pg_extern(sql = false)]
fn multihome_exclude(subscription: pg_sys::Oid, lsn: i64, change: i32, fingerprint: i64) -> bool {
    shmem::exclude(subscription.to_u32(), lsn as u64, change as u32, fingerprint as u64)
}

/// Has the apply worker started at once.
#[pg_extern(sql = false)]
fn multihome_restart(subscription: pg_sys::Oid) {
    compat::restart_apply(subscription);
}

/// The process that collects events of this database, if there is one.
#[pg_extern(sql = false)]
fn multihome_collector() -> Option<i32> {
    // SAFETY: a backend-local value.
    let database = unsafe { pg_sys::MyDatabaseId };
    shmem::queue(database.to_u32(), false)?.collector()
}

/// Events of this database that were lost since the server started.
#[pg_extern(sql = false)]
fn multihome_dropped() -> i64 {
    // SAFETY: a backend-local value.
    let database = unsafe { pg_sys::MyDatabaseId };
    shmem::queue(database.to_u32(), false).map_or(0, |queue| queue.ring().dropped() as i64)
}

/// The bigint that a query returns; its parameters are texts in the server's encoding. May raise.
pub fn one_bigint(query: &str, arguments: &[Option<&[u8]>]) -> Option<i64> {
    let query = compat::c_string(query);
    // SAFETY: the query returns a bigint.
    unsafe { first_column(&query, arguments, |datum| datum.value() as i64) }
}

/// The first column of the first row of a query with texts as parameters.
///
/// # Safety
/// `read` reads what the query returns. A transaction with a snapshot is in progress. It may raise: only called from guarded
/// functions.
unsafe fn first_column<T>(
    query: &CString,
    arguments: &[Option<&[u8]>],
    read: impl FnOnce(pg_sys::Datum) -> T,
) -> Option<T> {
    let mut types = vec![pg_sys::TEXTOID; arguments.len()];
    // SAFETY: parameters are as many as `types` says; what SPI returns is valid until SPI_finish().
    unsafe {
        let mut values: Vec<pg_sys::Datum> = arguments
            .iter()
            .map(|argument| match argument {
                Some(text) => pg_sys::cstring_to_text_with_len(text.as_ptr().cast(), text.len() as i32).into(),
                None => pg_sys::Datum::null(),
            })
            .collect();
        let nulls: Vec<std::ffi::c_char> =
            arguments.iter().map(|argument| if argument.is_some() { b' ' } else { b'n' } as std::ffi::c_char).collect();
        check(pg_sys::SPI_connect());
        check(pg_sys::SPI_execute_with_args(
            query.as_ptr(),
            arguments.len() as i32,
            types.as_mut_ptr(),
            values.as_mut_ptr(),
            nulls.as_ptr(),
            false,
            1,
        ));
        let mut result = None;
        if pg_sys::SPI_processed > 0 && !pg_sys::SPI_tuptable.is_null() {
            let table = pg_sys::SPI_tuptable;
            let mut is_null = false;
            let datum = pg_sys::SPI_getbinval(*(*table).vals, (*table).tupdesc, 1, &mut is_null);
            result = (!is_null).then(|| read(datum));
        }
        check(pg_sys::SPI_finish());
        result
    }
}

fn check(code: i32) {
    if code < 0 {
        pgrx::error!("SPI failed with code {code}");
    }
}
