//! PostgreSQL as this extension needs it and pgrx does not offer it: functions without a binding, functions that hooks
//! must call as plain C, and the differences between major versions. No other file has `cfg(feature = "pg..")`.
//!
//! pgrx wraps every bound function in a guard that turns an ERROR into a Rust panic. A hook that is a plain frame has
//! nobody to catch it, so whatever may raise there is declared here, unwrapped: the ERROR then passes over our frames,
//! which hold nothing to drop, straight to PostgreSQL's own handler with all its fields intact.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

use pgrx::pg_sys;

use crate::{readonly, subscription};

unsafe extern "C-unwind" {
    pub fn standard_ExecutorStart(query: *mut pg_sys::QueryDesc, eflags: c_int);
    #[cfg(any(feature = "pg16", feature = "pg17"))]
    fn standard_ExecutorRun(
        query: *mut pg_sys::QueryDesc,
        direction: pg_sys::ScanDirection::Type,
        count: u64,
        once: bool,
    );
    #[cfg(feature = "pg18")]
    fn standard_ExecutorRun(query: *mut pg_sys::QueryDesc, direction: pg_sys::ScanDirection::Type, count: u64);
    pub fn standard_ProcessUtility(
        statement: *mut pg_sys::PlannedStmt,
        source: *const c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        dest: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );
    pub fn GetCommandLogLevel(statement: *mut pg_sys::Node) -> pg_sys::LogStmtLevel::Type;
    pub fn PreventCommandIfReadOnly(command: *const c_char);
    pub fn GetTopTransactionIdIfAny() -> pg_sys::TransactionId;
    pub fn IsTransactionState() -> bool;
    pub fn IsLogicalWorker() -> bool;
    pub fn die(signal: c_int);
    pub fn StatementCancelHandler(signal: c_int);
    fn enable_timeout_after(timeout: c_int, milliseconds: c_int);
    fn disable_timeout(timeout: c_int, keep_indicator: bool);
    pub fn SetLatch(latch: *mut pg_sys::Latch);
    pub fn GetCurrentTimestamp() -> pg_sys::TimestampTz;
    fn ApplyLauncherForgetWorkerStartTime(subscription: pg_sys::Oid);
    fn ApplyLauncherWakeupAtCommit();
    fn replorigin_session_get_progress(flush: bool) -> pg_sys::XLogRecPtr;
    fn replorigin_session_advance(remote_commit: pg_sys::XLogRecPtr, local_commit: pg_sys::XLogRecPtr);
    pub fn RecoveryInProgress() -> bool;
    pub fn geterrcode() -> c_int;
    pub fn errstart(level: c_int, domain: *const c_char) -> bool;
    pub fn errcode(code: c_int) -> c_int;
    pub fn errmsg(format: *const c_char, ...) -> c_int;
    pub fn errdetail(format: *const c_char, ...) -> c_int;
    pub fn errhint(format: *const c_char, ...) -> c_int;
    fn errfinish(file: *const c_char, line: c_int, function: *const c_char);
    pub fn quote_identifier(name: *const c_char) -> *const c_char;
    pub fn CommandCounterIncrement();
    pub fn SearchSysCache2(cache: c_int, first: pg_sys::Datum, second: pg_sys::Datum) -> pg_sys::HeapTuple;
    pub fn SysCacheGetAttr(
        cache: c_int,
        tuple: pg_sys::HeapTuple,
        attribute: pg_sys::AttrNumber,
        is_null: *mut bool,
    ) -> pg_sys::Datum;
    pub fn ReleaseSysCache(tuple: pg_sys::HeapTuple);
    pub fn get_attnum(relation: pg_sys::Oid, name: *const c_char) -> pg_sys::AttrNumber;
    pub fn superuser_arg(role: pg_sys::Oid) -> bool;
    pub fn tuplestore_tuple_count(rows: *mut pg_sys::Tuplestorestate) -> i64;
    pub fn tuplestore_end(rows: *mut pg_sys::Tuplestorestate);
    fn RegisterTimeout(timeout: c_int, handler: Option<unsafe extern "C-unwind" fn()>) -> c_int;

    pub fn table_open(relation: pg_sys::Oid, lock: pg_sys::LOCKMODE) -> pg_sys::Relation;
    pub fn table_close(relation: pg_sys::Relation, lock: pg_sys::LOCKMODE);
    pub fn ScanKeyInit(
        key: *mut pg_sys::ScanKeyData,
        attribute: pg_sys::AttrNumber,
        strategy: pg_sys::StrategyNumber,
        procedure: pg_sys::RegProcedure,
        argument: pg_sys::Datum,
    );
    pub fn systable_beginscan(
        relation: pg_sys::Relation,
        index: pg_sys::Oid,
        use_index: bool,
        snapshot: pg_sys::Snapshot,
        keys: c_int,
        key: *mut pg_sys::ScanKeyData,
    ) -> pg_sys::SysScanDesc;
    pub fn systable_getnext(scan: pg_sys::SysScanDesc) -> pg_sys::HeapTuple;
    pub fn systable_endscan(scan: pg_sys::SysScanDesc);
    pub fn heap_deform_tuple(
        tuple: pg_sys::HeapTuple,
        descriptor: pg_sys::TupleDesc,
        values: *mut pg_sys::Datum,
        nulls: *mut bool,
    );
    pub fn pg_detoast_datum(datum: *mut pg_sys::varlena) -> *mut pg_sys::varlena;
    pub fn deconstruct_array_builtin(
        array: *mut pg_sys::ArrayType,
        element_type: pg_sys::Oid,
        elements: *mut *mut pg_sys::Datum,
        nulls: *mut *mut bool,
        count: *mut c_int,
    );
    pub fn text_to_cstring(text: *const pg_sys::text) -> *mut c_char;
    pub fn get_extension_oid(name: *const c_char, missing_ok: bool) -> pg_sys::Oid;
    pub fn get_database_oid(name: *const c_char, missing_ok: bool) -> pg_sys::Oid;
    pub fn pgstat_clear_backend_activity_snapshot();

    static max_prepared_xacts: c_int;

    fn AlterSetting(database: pg_sys::Oid, role: pg_sys::Oid, statement: *mut pg_sys::VariableSetStmt);
    fn AlterSubscription(
        parse_state: *mut pg_sys::ParseState,
        statement: *mut pg_sys::Node,
        is_top_level: bool,
    ) -> pg_sys::ObjectAddress;
    fn Async_Notify(channel: *const c_char, payload: *const c_char);
    #[cfg(feature = "pg16")]
    fn LogLogicalMessage(prefix: *const c_char, message: *const c_char, size: usize, transactional: bool) -> u64;
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    fn LogLogicalMessage(
        prefix: *const c_char,
        message: *const c_char,
        size: usize,
        transactional: bool,
        flush: bool,
    ) -> u64;
    #[cfg(feature = "pg16")]
    fn BackendIdGetTransactionIds(
        backend: c_int,
        xid: *mut pg_sys::TransactionId,
        xmin: *mut pg_sys::TransactionId,
        subxids: *mut c_int,
        overflowed: *mut bool,
    );
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    fn ProcNumberGetTransactionIds(
        backend: c_int,
        xid: *mut pg_sys::TransactionId,
        xmin: *mut pg_sys::TransactionId,
        subxids: *mut c_int,
        overflowed: *mut bool,
    );
}

/// pg_db_role_setting and its primary key: settings attached to databases and roles.
pub const DB_ROLE_SETTING: pg_sys::Oid = pg_sys::Oid::from_u32(2964);
pub const DB_ROLE_SETTING_PKEY: pg_sys::Oid = pg_sys::Oid::from_u32(2965);

/// pg_subscription.
pub const SUBSCRIPTION: pg_sys::Oid = pg_sys::Oid::from_u32(6100);

/// ExecutorRun's arguments past the query: 18 dropped the last one.
#[cfg(any(feature = "pg16", feature = "pg17"))]
pub type RunArguments = (pg_sys::ScanDirection::Type, u64, bool);
#[cfg(feature = "pg18")]
pub type RunArguments = (pg_sys::ScanDirection::Type, u64);

static mut PREVIOUS_EXECUTOR_RUN: pg_sys::ExecutorRun_hook_type = None;

/// Puts readonly.rs before ExecutorRun.
///
/// # Safety
/// Called once, from _PG_init.
pub unsafe fn hook_executor_run() {
    // SAFETY: as above.
    unsafe {
        PREVIOUS_EXECUTOR_RUN = pg_sys::ExecutorRun_hook;
        pg_sys::ExecutorRun_hook = Some(executor_run);
    }
}

#[cfg(any(feature = "pg16", feature = "pg17"))]
unsafe extern "C-unwind" fn executor_run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
    once: bool,
) {
    // SAFETY: as PostgreSQL called us.
    unsafe { readonly::executor_run(query, (direction, count, once)) }
}

#[cfg(feature = "pg18")]
unsafe extern "C-unwind" fn executor_run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
) {
    // SAFETY: as PostgreSQL called us.
    unsafe { readonly::executor_run(query, (direction, count)) }
}

/// Goes on to what was there before us.
///
/// # Safety
/// As for ExecutorRun: `query` is live and was started.
pub unsafe fn next_executor_run(query: *mut pg_sys::QueryDesc, arguments: RunArguments) {
    // SAFETY: passed on unchanged from PostgreSQL's own call.
    unsafe {
        #[cfg(any(feature = "pg16", feature = "pg17"))]
        match PREVIOUS_EXECUTOR_RUN {
            Some(hook) => hook(query, arguments.0, arguments.1, arguments.2),
            None => standard_ExecutorRun(query, arguments.0, arguments.1, arguments.2),
        }
        #[cfg(feature = "pg18")]
        match PREVIOUS_EXECUTOR_RUN {
            Some(hook) => hook(query, arguments.0, arguments.1),
            None => standard_ExecutorRun(query, arguments.0, arguments.1),
        }
    }
}

/// walrcv_connect's arguments: 17 tells apart connections for replication and others.
#[cfg(feature = "pg16")]
pub type ConnectArguments = (*const c_char, bool, bool, *const c_char, *mut *mut c_char);
#[cfg(any(feature = "pg17", feature = "pg18"))]
pub type ConnectArguments = (*const c_char, bool, bool, bool, *const c_char, *mut *mut c_char);

/// What subscription.rs puts in place of walrcv_connect.
#[cfg(feature = "pg16")]
pub unsafe extern "C-unwind" fn connect(
    conninfo: *const c_char,
    logical: bool,
    must_use_password: bool,
    name: *const c_char,
    error: *mut *mut c_char,
) -> *mut pg_sys::WalReceiverConn {
    // SAFETY: as PostgreSQL called us.
    unsafe { subscription::connect((conninfo, logical, must_use_password, name, error)) }
}

/// What subscription.rs puts in place of walrcv_connect.
#[cfg(any(feature = "pg17", feature = "pg18"))]
pub unsafe extern "C-unwind" fn connect(
    conninfo: *const c_char,
    replication: bool,
    logical: bool,
    must_use_password: bool,
    name: *const c_char,
    error: *mut *mut c_char,
) -> *mut pg_sys::WalReceiverConn {
    // SAFETY: as PostgreSQL called us.
    unsafe { subscription::connect((conninfo, replication, logical, must_use_password, name, error)) }
}

/// As a subscription connects.
pub fn connect_arguments(
    conninfo: *const c_char,
    must_use_password: bool,
    name: *const c_char,
    error: *mut *mut c_char,
) -> ConnectArguments {
    #[cfg(feature = "pg16")]
    return (conninfo, true, must_use_password, name, error);
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    return (conninfo, true, true, must_use_password, name, error);
}

/// Whether it is logical replication that connects.
pub fn is_logical(arguments: &ConnectArguments) -> bool {
    #[cfg(feature = "pg16")]
    return arguments.1;
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    return arguments.1 && arguments.2;
}

/// By what name it connects: that of the subscription, or of the slot of an initial copy.
pub fn connects_for(arguments: &ConnectArguments) -> *const c_char {
    #[cfg(feature = "pg16")]
    return arguments.3;
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    return arguments.4;
}

/// # Safety
/// `arguments` are as core would pass them.
pub unsafe fn real_connect(
    real: &pg_sys::WalReceiverFunctionsType,
    arguments: ConnectArguments,
) -> *mut pg_sys::WalReceiverConn {
    // SAFETY: the caller's promise; libpqwalreceiver has all functions.
    unsafe {
        let connect = real.walrcv_connect.unwrap_unchecked();
        #[cfg(feature = "pg16")]
        return connect(arguments.0, arguments.1, arguments.2, arguments.3, arguments.4);
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        return connect(arguments.0, arguments.1, arguments.2, arguments.3, arguments.4, arguments.5);
    }
}

/// Sends a report that errstart() and others have made.
///
/// # Safety
/// errstart() returned true.
pub unsafe fn finish_report() {
    // SAFETY: the caller's promise; the strings are static.
    unsafe { errfinish(c"stillebot".as_ptr(), 0, c"stillebot".as_ptr()) };
}

/// As [`finish_report`], of an ERROR.
///
/// # Safety
/// As above; nothing between here and PostgreSQL's handler is to be dropped.
pub unsafe fn raise() -> ! {
    // SAFETY: the caller's promise.
    unsafe {
        finish_report();
        std::hint::unreachable_unchecked()
    }
}

/// This backend's number, as virtual transaction ids carry it.
pub fn my_backend() -> c_int {
    // SAFETY: a plain integer, set once before any statement runs.
    unsafe {
        #[cfg(feature = "pg16")]
        return pg_sys::MyBackendId;
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        return pg_sys::MyProcNumber;
    }
}

/// The local id of this backend's transaction; 0 outside one.
pub fn my_local_xid() -> u32 {
    // SAFETY: MyProc is set before any statement runs, and only this backend writes the field.
    unsafe {
        #[cfg(feature = "pg16")]
        return (*pg_sys::MyProc).lxid;
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        return (*pg_sys::MyProc).vxid.lxid;
    }
}

/// The backend number of a virtual transaction id. A prepared transaction keeps that of the backend that prepared it.
pub fn backend_of(vxid: &pg_sys::VirtualTransactionId) -> c_int {
    #[cfg(feature = "pg16")]
    return vxid.backendId;
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    return vxid.procNumber;
}

/// The oids of the subscription that this replication worker works for, and of the table that it copies (0 if none), from the
/// name that core gave it. Allocates nothing: used while an ERROR is being reported.
pub fn my_subscription() -> Option<(u32, u32)> {
    // SAFETY: null, or an entry that lives as long as the process; the name ends with a NUL.
    let name = unsafe {
        let entry = pg_sys::MyBgworkerEntry.as_ref()?;
        CStr::from_ptr(entry.bgw_name.as_ptr()).to_str().ok()?
    };
    // logical replication tablesync worker for subscription %u sync %u
    let number = |after: &str| name.split_once(after)?.1.split(' ').next()?.parse().ok();
    Some((number("subscription ")?, number(" sync ").unwrap_or(0)))
}

/// Has everything flushed that workers of this subscription have applied. Not in a hook: may write, and wait.
pub fn flush_applied() {
    // SAFETY: an origin that is set is one that the worker has set up, before it started streaming.
    unsafe {
        if pg_sys::replorigin_session_origin != pg_sys::InvalidRepOriginId as pg_sys::RepOriginId {
            replorigin_session_get_progress(true);
        }
    }
}

/// How far this apply worker's subscription has its publisher's transactions; 0 if nothing is known. Raises nothing.
pub fn applied_up_to() -> u64 {
    // SAFETY: as above.
    unsafe {
        if pg_sys::replorigin_session_origin == pg_sys::InvalidRepOriginId as pg_sys::RepOriginId {
            return 0; // It copies a table, or has never got that far.
        }
        replorigin_session_get_progress(false)
    }
}

/// Notes that this apply worker has got past a remote transaction that left no commit here. Not in a hook: takes an LWLock.
pub fn advance_origin(end_lsn: u64) {
    // SAFETY: an origin that is set is one that the worker has set up, before it started streaming. As at a commit, but for
    // the WAL record: a crash forgets it, and then the transaction comes again.
    unsafe {
        if pg_sys::replorigin_session_origin != pg_sys::InvalidRepOriginId as pg_sys::RepOriginId {
            replorigin_session_advance(end_lsn, 0);
        }
    }
}

/// Has the apply worker of a subscription started at once after this transaction, instead of wal_retrieve_retry_interval after
/// its last start. It is what core does for one that ended because its subscription was changed.
pub fn restart_apply(subscription: pg_sys::Oid) {
    // SAFETY: takes the lock it needs, and asks for a signal at commit. It may raise: only called from guarded functions.
    unsafe {
        guarded(|| {
            ApplyLauncherForgetWorkerStartTime(subscription);
            ApplyLauncherWakeupAtCommit();
        });
    }
}

/// Of enum TimeoutId, the same in all versions: STATEMENT_TIMEOUT. Every process with a database has a handler for it, but only
/// sessions arm it by themselves.
const STATEMENT_TIMEOUT: c_int = 3;

/// Has this process sent SIGINT after a while.
pub fn cancel_after(time: std::time::Duration) {
    // SAFETY: raises only for a timeout without a handler.
    unsafe { enable_timeout_after(STATEMENT_TIMEOUT, time.as_millis() as c_int) };
}

/// Takes [`cancel_after`] back, and what came too late to cancel anything.
pub fn cancel_no_more() {
    // SAFETY: as above; a flag that a signal handler sets.
    unsafe {
        disable_timeout(STATEMENT_TIMEOUT, false);
        (&raw mut pg_sys::QueryCancelPending).write_volatile(0);
    }
}

/// Of enum TimeoutId: USER_TIMEOUT, from where on RegisterTimeout() looks for a free one.
#[cfg(feature = "pg16")]
const USER_TIMEOUT: c_int = 12;
#[cfg(any(feature = "pg17", feature = "pg18"))]
const USER_TIMEOUT: c_int = 13;

/// This process's own timeout; 0 until it has one.
static INTERRUPTION: AtomicI32 = AtomicI32::new(0);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Has what this process is about to do cancelled after a while, beside the timeouts that the user may have set.
pub fn interrupt_after(time: std::time::Duration) {
    unsafe extern "C-unwind" fn interrupt() {
        INTERRUPTED.store(true, Relaxed);
        // SAFETY: flags that signal handlers set; the caller of this handler sets the latch.
        unsafe {
            (&raw mut pg_sys::QueryCancelPending).write_volatile(1);
            (&raw mut pg_sys::InterruptPending).write_volatile(1);
        }
    }
    INTERRUPTED.store(false, Relaxed);
    // SAFETY: raises only if there are ten such timeouts already. Only called from guarded functions.
    unsafe {
        guarded(|| {
            if INTERRUPTION.load(Relaxed) == 0 {
                INTERRUPTION.store(RegisterTimeout(USER_TIMEOUT, Some(interrupt)), Relaxed);
            }
            enable_timeout_after(INTERRUPTION.load(Relaxed), time.as_millis() as c_int);
        });
    }
}

/// Whether the time of [`interrupt_after`] was up.
pub fn was_interrupted() -> bool {
    INTERRUPTED.load(Relaxed)
}

/// Takes [`interrupt_after`] back, and what came too late to cancel anything.
pub fn interrupt_no_more() {
    // SAFETY: the timeout was registered; a flag that a signal handler sets.
    unsafe {
        disable_timeout(INTERRUPTION.load(Relaxed), false);
        if was_interrupted() {
            (&raw mut pg_sys::QueryCancelPending).write_volatile(0);
        }
    }
}

/// What this process does when it gets a signal.
pub fn on_signal(signal: c_int, handler: unsafe extern "C-unwind" fn(c_int)) {
    // SAFETY: the handler does what handlers may.
    unsafe {
        #[cfg(any(feature = "pg16", feature = "pg17"))]
        pg_sys::pqsignal(signal, Some(handler));
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(signal, Some(handler));
    }
}

/// Whether there can be prepared transactions.
pub fn two_phase_is_on() -> bool {
    // SAFETY: a plain integer, constant while the server runs.
    unsafe { max_prepared_xacts > 0 }
}

/// Whether a backend's transaction has an id, that is, has begun to write.
pub fn has_xid(backend: c_int) -> bool {
    let (mut xid, mut xmin) = (pg_sys::InvalidTransactionId, pg_sys::InvalidTransactionId);
    let (mut subxids, mut overflowed) = (0, false);
    // SAFETY: the function takes the lock it needs, and answers "none" for a number that is not in use.
    unsafe {
        #[cfg(feature = "pg16")]
        BackendIdGetTransactionIds(backend, &mut xid, &mut xmin, &mut subxids, &mut overflowed);
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        ProcNumberGetTransactionIds(backend, &mut xid, &mut xmin, &mut subxids, &mut overflowed);
    }
    xid != pg_sys::InvalidTransactionId
}

/// What the server's activity report says of a backend: its pid, and whether it waits in an open transaction for its
/// client. From a snapshot that lasts until [`pgstat_clear_backend_activity_snapshot`].
pub fn activity(backend: c_int) -> Option<(c_int, bool)> {
    use pg_sys::BackendState::{STATE_IDLE, STATE_IDLEINTRANSACTION, STATE_IDLEINTRANSACTION_ABORTED};
    // SAFETY: points into this backend's own copy of the report, or is null.
    let entry = unsafe {
        #[cfg(feature = "pg16")]
        let entry = pg_sys::pgstat_get_beentry_by_backend_id(backend);
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        let entry = pg_sys::pgstat_get_beentry_by_proc_number(backend);
        entry.as_ref()?
    };
    // Background workers report what they like, or nothing.
    let client = matches!(entry.st_backendType, pg_sys::BackendType::B_BACKEND | pg_sys::BackendType::B_WAL_SENDER);
    let idle =
        client && matches!(entry.st_state, STATE_IDLE | STATE_IDLEINTRANSACTION | STATE_IDLEINTRANSACTION_ABORTED);
    Some((entry.st_procpid, idle))
}

/// Ends a session, as pg_terminate_backend() does, but without its warning when the session has just ended by itself.
pub fn terminate(pid: c_int) {
    // SAFETY: looks the process up among this server's own; a signal to one that is gone by now does nothing.
    unsafe {
        if !pg_sys::BackendPidGetProc(pid).is_null() {
            libc::kill(pid, libc::SIGTERM);
        }
    }
}

/// Text of ours as the server, and so the client, can take it: characters beyond ASCII only where it speaks UTF-8. Cannot
/// fail, for it is used while an ERROR is being reported.
pub fn in_server_encoding(text: String) -> String {
    // SAFETY: a backend-local integer.
    if unsafe { pg_sys::GetDatabaseEncoding() } == pg_sys::pg_enc::PG_UTF8 as c_int || text.is_ascii() {
        text
    } else {
        text.chars().map(|letter| if letter.is_ascii() { letter } else { '?' }).collect()
    }
}

/// Text in the server's encoding, as it should be: whatever is not, because a text was cut in the middle of a character,
/// becomes a question mark.
pub fn valid_in_server_encoding(text: Vec<u8>) -> Vec<u8> {
    // SAFETY: reads `text.len()` bytes, and does not raise when asked not to.
    let valid = unsafe {
        let encoding = pg_sys::GetDatabaseEncoding();
        pg_sys::pg_verify_mbstr(encoding, text.as_ptr().cast(), text.len() as c_int, true)
    };
    if valid {
        return text;
    }
    // SAFETY: a backend-local integer.
    if unsafe { pg_sys::GetDatabaseEncoding() } == pg_sys::pg_enc::PG_UTF8 as c_int {
        String::from_utf8_lossy(&text).replace(char::REPLACEMENT_CHARACTER, "?").into_bytes()
    } else {
        text.into_iter().map(|byte| if byte.is_ascii() { byte } else { b'?' }).collect()
    }
}

/// Text of the server's as Rust's.
pub fn from_server_encoding(bytes: &[u8]) -> String {
    // SAFETY: reads `bytes.len()` bytes, and returns them or a palloc'd C string. It may raise: only called from guarded
    // functions.
    unsafe {
        let start = bytes.as_ptr().cast::<c_char>().cast_mut();
        let converted = pg_sys::pg_server_to_any(start, bytes.len() as c_int, pg_sys::pg_enc::PG_UTF8 as c_int);
        if std::ptr::eq(converted, start) {
            String::from_utf8_lossy(bytes).into_owned()
        } else {
            CStr::from_ptr(converted).to_string_lossy().into_owned()
        }
    }
}

/// A C string of Rust text, which in PostgreSQL never holds a NUL byte.
pub fn c_string(text: &str) -> std::ffi::CString {
    std::ffi::CString::new(text.replace('\0', "")).expect("NUL bytes are gone")
}

/// Writes a marker into the WAL and returns the position after it.
pub fn log_marker() -> u64 {
    // SAFETY: both strings outlive the call. It may raise: only called from guarded functions.
    unsafe {
        guarded(|| {
            #[cfg(feature = "pg16")]
            return LogLogicalMessage(c"stillebot".as_ptr(), c"down".as_ptr(), 4, false);
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            return LogLogicalMessage(c"stillebot".as_ptr(), c"down".as_ptr(), 4, false, false);
        })
    }
}

/// # Safety
/// `statement` comes from PostgreSQL's parser. It may raise: only called from guarded functions.
pub unsafe fn alter_setting(database: pg_sys::Oid, statement: *mut pg_sys::VariableSetStmt) {
    // SAFETY: as above.
    unsafe { guarded(|| AlterSetting(database, pg_sys::InvalidOid, statement)) }
}

/// Removes a setting from a database, in a hook: what PostgreSQL raises passes over this frame, which holds nothing to drop.
///
/// # Safety
/// A transaction is in progress.
pub unsafe fn reset_setting(database: pg_sys::Oid, setting: &'static CStr) {
    // SAFETY: of a statement that resets, only the kind and the name are looked at, and the name lives for ever.
    unsafe {
        let mut statement: pg_sys::VariableSetStmt = std::mem::zeroed();
        statement.type_ = pg_sys::NodeTag::T_VariableSetStmt;
        statement.kind = pg_sys::VariableSetKind::VAR_RESET;
        statement.name = setting.as_ptr().cast_mut();
        AlterSetting(database, pg_sys::InvalidOid, &raw mut statement);
    }
}

/// # Safety
/// `statement` is an AlterSubscriptionStmt from PostgreSQL's parser, and no transaction block is open. It may raise:
/// only called from guarded functions.
pub unsafe fn alter_subscription(statement: *mut pg_sys::Node) {
    // SAFETY: as above.
    unsafe {
        let parse_state = pg_sys::make_parsestate(std::ptr::null_mut());
        guarded(|| AlterSubscription(parse_state, statement, true));
    }
}

/// Sends a notification at commit.
pub fn notify(channel: &CStr, payload: &CStr) {
    // SAFETY: both strings are copied. It may raise: only called from guarded functions.
    unsafe { guarded(|| Async_Notify(channel.as_ptr(), payload.as_ptr())) }
}

/// Runs a function without a pgrx binding the way pgrx runs bound ones: an ERROR becomes a panic, which the guard of
/// the calling SQL function turns back into the same ERROR after Rust's frames are unwound.
///
/// # Safety
/// `call` holds nothing to drop: an ERROR leaves it by longjmp.
pub unsafe fn guarded<T>(call: impl FnOnce() -> T) -> T {
    // SAFETY: the caller's promise.
    unsafe { pg_sys::ffi::pg_guard_ffi_boundary(call) }
}

/// For [`pg_sys::RegisterXactCallback`] and hooks that want an argument they never use.
pub const NO_ARGUMENT: *mut c_void = std::ptr::null_mut();
