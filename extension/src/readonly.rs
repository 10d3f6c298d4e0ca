//! Read-only mode: four hooks before anything that could write, and one at commit.
//!
//! The hooks decide one thing only, whether this database is closed to this process, and then turn PostgreSQL's own
//! switch, `XactReadOnly`; which statements a read-only transaction may run is core's knowledge, not ours. The four
//! are needed together: a portal bound before the edge meets ExecutorRun only, a fastpath call or `x := nextval()` in
//! PL/pgSQL meets no executor at all but object_access.
//!
//! Hooks are plain `extern "C-unwind"` functions without pgrx's guard: an ERROR of the statement passes over them by
//! longjmp, so they hold nothing to drop, never panic, and call only what compat.rs declares for them.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed};
use std::time::SystemTime;

use pgrx::pg_sys;

use crate::shmem::{self, Backend, Database, Effect, Gate};
use crate::state::{Mode, State};
use crate::{catalog, collector, compat, ddl, guc, local, node, subscription, window};

static mut PREVIOUS_EXECUTOR_START: pg_sys::ExecutorStart_hook_type = None;
static mut PREVIOUS_PROCESS_UTILITY: pg_sys::ProcessUtility_hook_type = None;
static mut PREVIOUS_OBJECT_ACCESS: pg_sys::object_access_hook_type = None;
static mut PREVIOUS_EMIT_LOG: pg_sys::emit_log_hook_type = None;

pub fn init() {
    // SAFETY: called from _PG_init in the postmaster; backends inherit hooks and callback.
    unsafe {
        PREVIOUS_EXECUTOR_START = pg_sys::ExecutorStart_hook;
        pg_sys::ExecutorStart_hook = Some(executor_start);
        compat::hook_executor_run();
        PREVIOUS_PROCESS_UTILITY = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(process_utility);
        PREVIOUS_OBJECT_ACCESS = pg_sys::object_access_hook;
        pg_sys::object_access_hook = Some(object_access);
        PREVIOUS_EMIT_LOG = pg_sys::emit_log_hook;
        pg_sys::emit_log_hook = Some(emit_log);
        pg_sys::RegisterXactCallback(Some(transaction_event), compat::NO_ARGUMENT);
    }
}

// --- Whom it binds ----------------------------------------------------------------------------------------------

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Process {
    Unasked = 0,
    /// Sessions, and background workers of others: bound by the state of their database.
    Ordinary = 1,
    /// Apply and table synchronisation, for replication goes on while down; the collector, which writes the log of
    /// conflicts; autovacuum, which writes no data; parallel workers, which cannot write, and whose leader is bound.
    Exempt = 2,
}

static PROCESS: AtomicU8 = AtomicU8::new(Process::Unasked as u8);

#[inline]
fn process() -> Process {
    match PROCESS.load(Relaxed) {
        1 => Process::Ordinary,
        2 => Process::Exempt,
        _ => classify(),
    }
}

#[cold]
fn classify() -> Process {
    // SAFETY: backend-local values, settled before a process runs its first statement.
    let process = unsafe {
        if pg_sys::IsBinaryUpgrade // Nobody is there but pg_upgrade, which may carry the record over before it has filled the database.
            || compat::IsLogicalWorker()
            || collector::is_this_process()
            || pg_sys::ParallelWorkerNumber >= 0
            || pg_sys::MyBackendType == pg_sys::BackendType::B_AUTOVAC_WORKER
        {
            Process::Exempt
        } else {
            Process::Ordinary
        }
    };
    PROCESS.store(process as u8, Relaxed);
    process
}

// --- The decision -----------------------------------------------------------------------------------------------

/// Called before anything runs. Returns whether the database is closed to this process, in which case the transaction
/// is read-only from here on.
#[inline]
fn enter(effect: Effect) -> bool {
    if process() != Process::Ordinary || local::is_writing() {
        return false;
    }
    let (Some(database), Some(backend)) = (shmem::my_database(), shmem::my_backend()) else {
        return without_a_slot();
    };
    // SAFETY: backend-local.
    let marks = effect != Effect::Nothing && !unsafe { pg_sys::XactReadOnly };
    let fresh = marks && backend.note(compat::my_local_xid(), effect);
    match database.gate() {
        Gate::Open => false,
        Gate::Unknown => resolve(database) && refuse(backend, fresh),
        Gate::Draining | Gate::Severing => refuse(backend, fresh),
        Gate::Closed if window::lets_in(database, marks) => false,
        // What was let in may run below us, as in a drain: the mark is for who shuts the window.
        Gate::Closed => refuse(backend, !window::has_let_in()),
    }
}

/// Makes the transaction read-only, and takes its mark back where that is the truth: `harmless` if nothing of it ran
/// before the edge.
///
/// That is so if the mark was made just now, or if the drain is over. Otherwise a statement may be under way that passed
/// core's check before the edge: an INSERT looks at XactReadOnly once, at its start, and we may be in its trigger. Its
/// mark has to stay for the drain to see.
#[cold]
fn refuse(backend: &Backend, harmless: bool) -> bool {
    // SAFETY: backend-local; the same assignment as SET TRANSACTION READ ONLY ends in.
    unsafe {
        if !pg_sys::XactReadOnly {
            pg_sys::XactReadOnly = true;
            REFUSED_IN.store(compat::my_local_xid(), Relaxed);
        }
        if harmless && compat::GetTopTransactionIdIfAny() == pg_sys::InvalidTransactionId {
            backend.forget();
        }
    }
    true
}

/// The local id of the last transaction that was made read-only here: for the hint, should the database open meanwhile.
static REFUSED_IN: AtomicU32 = AtomicU32::new(0);

/// For a verb, which must not be followed by writes in its own statement, nor wait for the end of others as one that
/// could still write.
pub fn write_no_more() {
    // SAFETY: backend-local.
    unsafe { pg_sys::XactReadOnly = true };
    if let Some(backend) = shmem::my_backend() {
        backend.forget();
    }
}

/// The first look at a database since the server started: what the catalog says holds, after what a restart does to
/// it. Returns whether the database is closed.
///
/// The catalog and not the session's setting, because a session that connected to a standby before its promotion may
/// have an old one. Two sessions may come here at once; they read the same, and the second to publish changes nothing.
#[cold]
fn resolve(database: &Database) -> bool {
    // SAFETY: asks for nothing but state of the backend.
    unsafe {
        if compat::RecoveryInProgress() {
            return false; // Core refuses writes itself, and what a standby's catalog says may change before promotion.
        }
        if !compat::IsTransactionState() {
            return guc::session_started_down(); // An aborted transaction: only ROLLBACK comes through here.
        }
        let identity = catalog::recorded(pg_sys::MyDatabaseId, catalog::IDENTITY);
        let recorded = catalog::recorded(pg_sys::MyDatabaseId, catalog::STATE);
        let foreign = publish(database, identity, recorded);
        if foreign && compat::errstart(pg_sys::LOG as c_int, std::ptr::null()) {
            compat::errmsg(
                c"this data directory is a copy of that of another node: the database is down and does not replicate"
                    .as_ptr(),
            );
            compat::errhint(c"SELECT * FROM stillebot_status() says more.".as_ptr());
            compat::finish_report();
        }
        database.gate() != Gate::Open
    }
}

/// The part of [`resolve`] that owns memory, and so must not raise. Returns whether it found a copy.
fn publish(database: &Database, identity: *const c_char, recorded: *const c_char) -> bool {
    let recorded = if recorded.is_null() {
        State::up()
    } else {
        // SAFETY: a C string fresh from the catalog.
        State::parse(&unsafe { CStr::from_ptr(recorded) }.to_string_lossy())
    };
    // SAFETY: as above.
    let copy = unsafe { node::foreign_state(identity) };
    let state = copy.unwrap_or_else(|| recorded.after_restart(SystemTime::now()));
    let first = database.publish(if state.state == Mode::Down { Gate::Closed } else { Gate::Open }, &state.to_json());
    first && state.foreign
}

/// No slot: the server has more databases than shmem.rs has room for. stillebot_down() refuses there, but one that
/// was down before stays down by what its sessions were told.
#[cold]
fn without_a_slot() -> bool {
    if guc::session_started_down() {
        // SAFETY: backend-local.
        unsafe { pg_sys::XactReadOnly = true };
        return true;
    }
    false
}

/// Whether a database whose record alone does not tell it refuses writes for such a reason: since its server has started
/// nobody has looked, or it was found so. Asked before a session's first statement. Without a slot nobody can have opened it
/// since.
pub fn is_closed_as(reason: impl Fn(&State) -> bool) -> bool {
    shmem::my_database().is_none_or(|database| match database.gate() {
        Gate::Unknown => true,
        Gate::Open => false,
        _ => database.text().is_none_or(|text| reason(&State::parse(&text))),
    })
}

// --- The hooks --------------------------------------------------------------------------------------------------

unsafe fn effect_of(query: *mut pg_sys::QueryDesc) -> Effect {
    // SAFETY: the executor's hooks are given a live query with a plan.
    let (operation, modifies) = unsafe { ((*query).operation, (*(*query).plannedstmt).hasModifyingCTE) };
    if operation == pg_sys::CmdType::CMD_SELECT && !modifies { Effect::Perhaps } else { Effect::Writes }
}

unsafe extern "C-unwind" fn executor_start(query: *mut pg_sys::QueryDesc, eflags: c_int) {
    // SAFETY: arguments are passed on as they came; `hint` outlives the call that may use it.
    unsafe {
        let closed = enter(effect_of(query));
        let mut hint = Hint::new();
        hint.push(closed);
        match PREVIOUS_EXECUTOR_START {
            Some(hook) => hook(query, eflags),
            None => compat::standard_ExecutorStart(query, eflags),
        }
        hint.pop(closed);
    }
}

/// # Safety
/// As for an ExecutorRun hook, which is in compat.rs because its arguments differ between versions.
pub unsafe fn executor_run(query: *mut pg_sys::QueryDesc, arguments: compat::RunArguments) {
    // SAFETY: as in executor_start.
    unsafe {
        let closed = enter(effect_of(query));
        let mut hint = Hint::new();
        hint.push(closed);
        compat::next_executor_run(query, arguments);
        hint.pop(closed);
    }
}

#[allow(clippy::too_many_arguments)] // The signature is PostgreSQL's.
unsafe extern "C-unwind" fn process_utility(
    statement: *mut pg_sys::PlannedStmt,
    source: *const c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    dest: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: arguments are passed on as they came; `hint` outlives the call that may use it.
    unsafe {
        let node = (*statement).utilityStmt;
        let changes = compat::GetCommandLogLevel(node) != pg_sys::LogStmtLevel::LOGSTMT_ALL || is_commit_prepared(node);
        let allowed = always_allowed(node);
        let closed = enter(if changes && !allowed { Effect::Writes } else { Effect::Nothing });
        let mut hint = Hint::new();
        hint.push(closed);
        if closed {
            refuse_two_phase(node);
            // Core asks once, before it begins; event triggers, should there be any, meet the hooks.
            pg_sys::XactReadOnly = !allowed;
        }
        refuse_to_touch_the_record(node);
        subscription::before(node);

        // Some commands commit in the middle, and what they do next has another transaction id than the one marked. An
        // ERROR below skips the end of this function: whatever is left set is set anew by the next command, which an
        // aborted (sub)transaction needs to end, or by the abort itself.
        let top = context == pg_sys::ProcessUtilityContext::PROCESS_UTILITY_TOPLEVEL;
        if top {
            set_in_utility(changes && !allowed);
            IN_MAINTENANCE.store(is_maintenance(node), Relaxed);
        }
        match PREVIOUS_PROCESS_UTILITY {
            Some(hook) => {
                hook(statement, source, read_only_tree, context, params, environment, dest, completion);
            }
            None => compat::standard_ProcessUtility(
                statement,
                source,
                read_only_tree,
                context,
                params,
                environment,
                dest,
                completion,
            ),
        }
        if allowed {
            subscription::after(node);
        }
        if is_commit_prepared(node) {
            ddl::committed_prepared();
        }
        if top {
            set_in_utility(false);
            IN_MAINTENANCE.store(false, Relaxed);
        }
        if closed {
            pg_sys::XactReadOnly = true; // Also if the command was SET TRANSACTION READ WRITE.
        }
        hint.pop(closed);
    }
}

fn set_in_utility(running: bool) {
    if process() == Process::Ordinary
        && let Some(backend) = shmem::my_backend()
        && backend.in_utility() != running
    {
        backend.set_in_utility(running);
    }
}

/// Whether a command runs whose transactions, begun by itself in the session's default mode, may have an id while the
/// database is closed: see [`refuse_to_commit_past_the_edge`].
static IN_MAINTENANCE: AtomicBool = AtomicBool::new(false);

/// # Safety
/// `node` is a statement of PostgreSQL's.
unsafe fn is_maintenance(node: *mut pg_sys::Node) -> bool {
    use pg_sys::NodeTag::{T_ClusterStmt, T_ReindexStmt, T_VacuumStmt};
    // SAFETY: every node has a tag.
    matches!(unsafe { (*node).type_ }, T_VacuumStmt | T_ReindexStmt | T_ClusterStmt)
}

unsafe extern "C-unwind" fn object_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub: c_int,
    argument: *mut c_void,
) {
    // SAFETY: arguments are passed on as they came; the class says what the object is.
    unsafe {
        match access {
            pg_sys::ObjectAccessType::OAT_FUNCTION_EXECUTE => {
                enter(Effect::Perhaps);
            }
            pg_sys::ObjectAccessType::OAT_DROP if class == pg_sys::ExtensionRelationId => {
                before_drop(object);
            }
            _ => {}
        }
        if let Some(hook) = PREVIOUS_OBJECT_ACCESS {
            hook(access, class, object, sub, argument);
        }
    }
}

/// Commands that core counts as writing but that a closed database lets through: running and mending replication must
/// not require opening the database. They change no data; a copy that they start is replication. Who may do it is for core
/// to say.
///
/// # Safety
/// `node` is a statement of PostgreSQL's.
unsafe fn always_allowed(node: *mut pg_sys::Node) -> bool {
    use pg_sys::NodeTag::{T_AlterSubscriptionStmt, T_CreateSubscriptionStmt, T_DropSubscriptionStmt, T_RenameStmt};
    // SAFETY: every node has a tag, which says what the node is.
    unsafe {
        match (*node).type_ {
            T_AlterSubscriptionStmt | T_CreateSubscriptionStmt | T_DropSubscriptionStmt => true,
            T_RenameStmt => (*node.cast::<pg_sys::RenameStmt>()).renameType == pg_sys::ObjectType::OBJECT_SUBSCRIPTION,
            _ => false,
        }
    }
}

/// To core a command that controls transactions; to us one that writes.
///
/// # Safety
/// `node` is a statement of PostgreSQL's.
unsafe fn is_commit_prepared(node: *mut pg_sys::Node) -> bool {
    // SAFETY: the tag says what the node is.
    unsafe {
        (*node).type_ == pg_sys::NodeTag::T_TransactionStmt
            && (*node.cast::<pg_sys::TransactionStmt>()).kind == pg_sys::TransactionStmtKind::TRANS_STMT_COMMIT_PREPARED
    }
}

/// Core lets a read-only transaction prepare, and commits prepared ones without asking.
///
/// # Safety
/// `node` is a statement of PostgreSQL's, and XactReadOnly is set.
unsafe fn refuse_two_phase(node: *mut pg_sys::Node) {
    use pg_sys::TransactionStmtKind::{TRANS_STMT_COMMIT_PREPARED, TRANS_STMT_PREPARE};
    // SAFETY: the tag says what the node is.
    unsafe {
        if (*node).type_ == pg_sys::NodeTag::T_TransactionStmt {
            match (*node.cast::<pg_sys::TransactionStmt>()).kind {
                TRANS_STMT_PREPARE => compat::PreventCommandIfReadOnly(c"PREPARE TRANSACTION".as_ptr()),
                TRANS_STMT_COMMIT_PREPARED => compat::PreventCommandIfReadOnly(c"COMMIT PREPARED".as_ptr()),
                _ => {}
            }
        }
    }
}

/// From another database ALTER DATABASE could make a down database forget, at its next restart, that it is down.
/// pg_upgrade may: it carries the record over.
///
/// # Safety
/// `node` is a statement of PostgreSQL's, in a transaction.
unsafe fn refuse_to_touch_the_record(node: *mut pg_sys::Node) {
    // SAFETY: the tag says what the node is; strings are null or C strings.
    unsafe {
        if pg_sys::IsBinaryUpgrade {
            return;
        }
        // ALTER ROLE ALL IN DATABASE .. is another way to write ALTER DATABASE .. .
        let (database, change) = match (*node).type_ {
            pg_sys::NodeTag::T_AlterDatabaseSetStmt => {
                let statement = node.cast::<pg_sys::AlterDatabaseSetStmt>();
                ((*statement).dbname, (*statement).setstmt)
            }
            pg_sys::NodeTag::T_AlterRoleSetStmt => {
                let statement = node.cast::<pg_sys::AlterRoleSetStmt>();
                let database = if (*statement).role.is_null() { (*statement).database } else { std::ptr::null_mut() };
                (database, (*statement).setstmt)
            }
            _ => return,
        };
        let names = |setting: &CStr| {
            !(*change).name.is_null()
                && CStr::from_ptr((*change).name).to_bytes().eq_ignore_ascii_case(setting.to_bytes())
        };
        let recorded = |setting: &CStr| {
            let database =
                if database.is_null() { pg_sys::InvalidOid } else { compat::get_database_oid(database, true) };
            database != pg_sys::InvalidOid && !catalog::recorded(database, setting).is_null()
        };
        let resets_all = (*change).kind == pg_sys::VariableSetKind::VAR_RESET_ALL;
        if names(catalog::IDENTITY) || (resets_all && recorded(catalog::IDENTITY)) {
            refuse_command(c"a change of what is recorded of the identity of a database", hint_at_identity);
        }
        if names(catalog::STATE) || ((resets_all || names(catalog::READ_ONLY)) && recorded(catalog::STATE)) {
            refuse_command(c"a change of what is recorded for a database that is down", hint_at_verbs);
        }
    }
}

/// Dropped from a database that is marked as the only writable node, the extension would leave the mark behind: the
/// database would come back closed from its next restart, and nothing there to open it. (One that is down refuses the
/// DROP like any other change.) An identity goes with the extension: left behind, it would close a copy of the database with
/// nothing there to open that.
///
/// # Safety
/// Called while `extension` is about to be dropped.
unsafe fn before_drop(extension: pg_sys::Oid) {
    // SAFETY: a transaction is in progress, and with its end the removal is undone or done.
    unsafe {
        if extension != compat::get_extension_oid(c"stillebot".as_ptr(), true) {
            return;
        }
        if !catalog::recorded(pg_sys::MyDatabaseId, catalog::STATE).is_null() {
            refuse_command(c"DROP EXTENSION stillebot", hint_at_sole);
        }
        if !catalog::recorded(pg_sys::MyDatabaseId, catalog::IDENTITY).is_null() {
            compat::reset_setting(pg_sys::MyDatabaseId, catalog::IDENTITY);
        }
    }
}

/// Raises core's own 25006 for a command, with a hint.
unsafe fn refuse_command(command: &CStr, hint: unsafe extern "C-unwind" fn(*mut c_void)) {
    // SAFETY: plain frames from here to PostgreSQL's handler, which unlinks `entry`.
    unsafe {
        pg_sys::XactReadOnly = true;
        let mut entry = Hint::new();
        entry.0.callback = Some(hint);
        entry.push(true);
        compat::PreventCommandIfReadOnly(command.as_ptr());
    }
}

// --- The end of a transaction -----------------------------------------------------------------------------------

/// A change of state that takes effect with the transaction that recorded it, or not at all.
pub struct Pending {
    pub database: &'static Database,
    pub before: (Gate, String),
    pub after: (Gate, String),
}

static PENDING: Mutex<Option<Pending>> = Mutex::new(None);

/// Lets the end of the current transaction settle a change: commit makes it so, abort (an error, a cancelled or
/// disconnected call, a terminated session) puts back what was.
pub fn settle_at_end(pending: Pending) {
    *PENDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(pending);
}

fn take_pending() -> Option<Pending> {
    PENDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
}

fn is_pending() -> bool {
    PENDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).is_some()
}

unsafe extern "C-unwind" fn transaction_event(event: pg_sys::XactEvent::Type, _argument: *mut c_void) {
    use pg_sys::XactEvent::*;
    match event {
        // SAFETY: raises, as this event allows, with nothing of ours on the stack.
        XACT_EVENT_PRE_COMMIT | XACT_EVENT_PRE_PREPARE => unsafe { refuse_to_commit_past_the_edge() },
        XACT_EVENT_COMMIT => {
            if let Some(Pending { database, after, .. }) = take_pending() {
                database.set(after.0, &after.1);
            }
        }
        XACT_EVENT_ABORT => {
            set_in_utility(false);
            IN_MAINTENANCE.store(false, Relaxed);
            subscription::aborted();
            if let Some(Pending { database, before, .. }) = take_pending() {
                database.set(before.0, &before.1);
            }
        }
        _ => {}
    }
}

/// What a maintenance window let in commits in that window or not at all, whatever has become of the database: window.rs says
/// why that is enough.
///
/// Once the drain is over, a transaction with an id must not commit if it could write before the edge, or is not
/// read-only now: what writes while the database is closed (temporary tables, maintenance) has one of the hooks before it.
///
/// One race ends here, a session that is being terminated and reaches its commit before the signal. The rest is a second
/// lock on the door, for ways around the hooks: one is an expression that PL/pgSQL has cached across its own COMMIT.
unsafe fn refuse_to_commit_past_the_edge() {
    if process() != Process::Ordinary || is_pending() || local::is_active() || IN_MAINTENANCE.load(Relaxed) {
        return;
    }
    let (Some(database), Some(backend)) = (shmem::my_database(), shmem::my_backend()) else { return };
    if !window::has_let_in() && !matches!(database.gate(), Gate::Severing | Gate::Closed) {
        return;
    }
    // SAFETY: reads state of the backend; may raise, as the event allows.
    unsafe {
        let could_write = backend.effect_of(compat::my_local_xid()) != Effect::Nothing || !pg_sys::XactReadOnly;
        if could_write && compat::GetTopTransactionIdIfAny() != pg_sys::InvalidTransactionId {
            // A transaction within a command, as of CREATE INDEX CONCURRENTLY, has met no hook that marked it.
            backend.note(compat::my_local_xid(), Effect::Writes);
            if !window::lets_in(database, true) {
                refuse_command(c"COMMIT", hint_at_state);
            }
        }
    }
}

// --- The hint ---------------------------------------------------------------------------------------------------

/// An entry of PostgreSQL's error context stack, on the frame of a hook: whatever reports a 25006 below that frame
/// gets our hint. An ERROR that is caught resets the stack to where the catcher was, so entries never outlive frames.
struct Hint(pg_sys::ErrorContextCallback);

impl Hint {
    fn new() -> Hint {
        Hint(pg_sys::ErrorContextCallback {
            previous: std::ptr::null_mut(),
            callback: Some(hint_at_state),
            arg: compat::NO_ARGUMENT,
        })
    }

    /// # Safety
    /// `self` stays where it is until `pop`, or until an ERROR discards its frame.
    unsafe fn push(&mut self, closed: bool) {
        if closed {
            // SAFETY: backend-local list.
            unsafe {
                self.0.previous = pg_sys::error_context_stack;
                pg_sys::error_context_stack = &mut self.0;
            }
        }
    }

    /// # Safety
    /// Pairs with `push`, with the same argument.
    unsafe fn pop(&mut self, closed: bool) {
        if closed {
            // SAFETY: backend-local list.
            unsafe { pg_sys::error_context_stack = self.0.previous };
        }
    }
}

unsafe extern "C-unwind" fn hint_at_state(_argument: *mut c_void) {
    // SAFETY: PostgreSQL calls this while it builds an error report.
    unsafe {
        if compat::geterrcode() == pg_sys::errcodes::PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION as c_int {
            let mut text = [0u8; 1024];
            copy_hint(&mut text);
            compat::errhint(c"%s".as_ptr(), text.as_ptr().cast::<c_char>());
        }
    }
}

unsafe extern "C-unwind" fn hint_at_verbs(_argument: *mut c_void) {
    // SAFETY: as above.
    unsafe {
        compat::errhint(
            c"%s".as_ptr(),
            c"Connect to that database and call stillebot_down() or stillebot_up().".as_ptr(),
        );
    }
}

unsafe extern "C-unwind" fn hint_at_identity(_argument: *mut c_void) {
    // SAFETY: as above.
    unsafe {
        compat::errhint(
            c"%s".as_ptr(),
            c"Connect to that database and call multihome.identify() or multihome.forget_identity().".as_ptr(),
        );
    }
}

unsafe extern "C-unwind" fn hint_at_sole(_argument: *mut c_void) {
    // SAFETY: as above.
    unsafe {
        compat::errhint(
            c"%s".as_ptr(),
            c"The database is marked as the only writable node. SELECT stillebot_up() takes the mark away; then drop the extension.".as_ptr(),
        );
    }
}

/// The part that owns memory, and so must not raise. Leaves at least one NUL byte at the end.
fn copy_hint(buffer: &mut [u8; 1024]) {
    let text = shmem::my_database().and_then(Database::text);
    let hint = if window::has_let_in() {
        "The maintenance window that this transaction began in is over. Open one again, and begin anew.".to_owned()
    } else if shmem::my_database().is_some_and(window::is_for_younger_sessions) {
        "A maintenance window is open for this role, and for sessions that began after it. Connect anew.".to_owned()
    } else {
        text.map_or_else(guc::session_state, |text| State::parse(&text)).hint()
    };
    let hint = compat::in_server_encoding(hint);
    let mut length = hint.len().min(buffer.len() - 1);
    while !hint.is_char_boundary(length) {
        length -= 1;
    }
    buffer[..length].copy_from_slice(&hint.as_bytes()[..length]);
}

/// Fastpath calls run below no hook that could hold an entry on the context stack: they get the hint here, on the way
/// to log and client. So does a session that connected while its database was down and is read-only still.
unsafe extern "C-unwind" fn emit_log(report: *mut pg_sys::ErrorData) {
    // SAFETY: PostgreSQL passes the report it is about to send, and has made it the top of its stack of reports.
    unsafe {
        if (*report).hint.is_null()
            && (*report).sqlerrcode == pg_sys::errcodes::PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION as c_int
            && (*report).elevel == pg_sys::PGERROR as c_int
            && process() == Process::Ordinary
            && let Some(database) = shmem::my_database()
        {
            match database.gate() {
                Gate::Unknown => {}
                Gate::Open if guc::session_started_down() && pg_sys::DefaultXactReadOnly => {
                    compat::errhint(
                        c"%s".as_ptr(),
                        c"The database is up again, but this session began while it was down. SET default_transaction_read_only = off, or connect anew."
                            .as_ptr(),
                    );
                }
                Gate::Open if pg_sys::XactReadOnly && REFUSED_IN.load(Relaxed) == compat::my_local_xid() => {
                    compat::errhint(
                        c"%s".as_ptr(),
                        c"The database is up again, but this transaction became read-only while it was not. Begin a new one.".as_ptr(),
                    );
                }
                Gate::Open => {}
                Gate::Draining | Gate::Severing | Gate::Closed => hint_at_state(compat::NO_ARGUMENT),
            }
        }
        if let Some(previous) = PREVIOUS_EMIT_LOG {
            previous(report);
        }
    }
}
