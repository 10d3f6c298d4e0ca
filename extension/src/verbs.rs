//! The SQL functions: down, up, and what the agent needs of a node. `sql/` declares them, with their comments.
//!
//! A change of state is one transaction, the caller's own: the edge is drawn in shared memory at once, the record is
//! written to the catalog last, and the end of the transaction settles both ([`readonly::settle_at_end`]). So there is
//! no undo to forget: an error, a timeout, a cancelled call or a lost connection aborts, and the database is as before.

use std::time::{Duration, Instant, SystemTime};

use pgrx::prelude::*;
use pgrx::{JsonB, pg_sys};

use crate::readonly::{Pending, settle_at_end, write_no_more};
use crate::shmem::{self, Database, Effect, Gate, MAX_STATE};
use crate::state::{Mode, State, ascii};
use crate::{catalog, compat, guc, node, window};

/// How long terminated sessions get to end, past the timeout of the call.
const TERMINATION_GRACE: Duration = Duration::from_secs(10);

// A text is a varlena, as a bytea is, and this way comes as its bytes: pgrx's &str insists on UTF-8, a server need not.
#[pg_extern(sql = false)]
fn stillebot_down(reason: Option<&[u8]>, timeout: Option<Interval>, terminate: Option<bool>) -> i64 {
    take_down("stillebot_down()", reason, timeout, terminate, None)
}

#[pg_extern(sql = false)]
fn multihome_down(
    reason: Option<&[u8]>,
    timeout: Option<Interval>,
    terminate: Option<bool>,
    hop: Option<JsonB>,
) -> i64 {
    take_down("multihome.down()", reason, timeout, terminate, hop.map(|hop| hop.0))
}

#[pg_extern(sql = false)]
fn stillebot_up() {
    open("stillebot_up()", false);
}

#[pg_extern(sql = false)]
fn multihome_up(sole: Option<bool>) {
    open("multihome.up()", not_null("sole", sole));
}

#[pg_extern(sql = false)]
fn multihome_set_hop(hop: Option<JsonB>) {
    let call = Call::begin("multihome.set_hop()", None);
    let before = call.state();
    refuse_foreign(&before, "take part in a hop");
    if before.state == Mode::Up {
        fail(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "a hop can only be noted in a database that is down",
            None,
            "Only the agent's hop command needs this.",
        );
    }
    call.record(&State { hop: hop.map(|hop| hop.0), ..before });
}

/// The state as JSON, for stillebot_status() and the agent.
#[pg_extern(sql = false)]
fn multihome_state() -> Option<pgrx::datum::AnyElement> {
    let database = require_slot();
    let text = database.text().unwrap_or_default();
    let state = match database.gate() {
        // Nobody has looked since the start, which the very statement that calls us does unless this is a standby.
        Gate::Unknown => guc::session_state(),
        _ => State::parse(&text),
    };
    let writers = writers().len();
    let window = window::described(database);
    let json = serde_json::json!({
        "node": node::name(),
        "state": if window.is_some() { serde_json::json!("maintenance") } else { serde_json::json!(state.state) },
        "since": state.since.map(|at| humantime::format_rfc3339_micros(at).to_string()),
        "by": state.by,
        "reason": state.reason,
        "sole": state.sole,
        "rejoin": state.rejoin,
        "foreign": state.foreign,
        "hop": state.hop,
        "window": window,
        "writers": writers,
    });
    jsonb(&json)
}

/// A jsonb, by way of text, so that the server decodes what is beyond ASCII into its own encoding.
pub fn jsonb(json: &serde_json::Value) -> Option<pgrx::datum::AnyElement> {
    let json = compat::c_string(&ascii(&json.to_string()));
    // SAFETY: jsonb_in() takes a C string, which it copies.
    unsafe {
        let jsonb = pgrx::direct_function_call_as_datum(pg_sys::jsonb_in, &[Some(json.as_ptr().into())]);
        pgrx::datum::AnyElement::from_polymorphic_datum(jsonb?, false, pg_sys::JSONBOID)
    }
}

#[pg_extern(sql = false)]
fn multihome_refresh(copy_data: Option<bool>) -> SetOfIterator<'static, String> {
    let copy_data = not_null("copy_data", copy_data);
    require_slot();
    prevent_in_block("multihome.refresh()");
    let names = lines(
        "select subname::text from pg_catalog.pg_subscription s join pg_catalog.pg_database d on d.oid = s.subdbid
          where d.datname = current_database() and s.subenabled order by 1",
        &[],
    );
    for name in &names {
        let name = compat::c_string(name);
        // SAFETY: copies a C string into a palloc'd identifier.
        let quoted = unsafe { std::ffi::CStr::from_ptr(pg_sys::quote_identifier(name.as_ptr())) };
        let statement = catalog::parse(&format!(
            "alter subscription {} refresh publication with (copy_data = {copy_data})",
            quoted.to_string_lossy()
        ));
        // SAFETY: the parser made it of ALTER SUBSCRIPTION; prevent_in_block() saw that no block is open.
        unsafe { compat::alter_subscription(statement) };
    }
    SetOfIterator::new(names)
}

// --- Down -------------------------------------------------------------------------------------------------------

fn take_down(
    verb: &str,
    reason: Option<&[u8]>,
    timeout: Option<Interval>,
    terminate: Option<bool>,
    hop: Option<serde_json::Value>,
) -> i64 {
    let deadline = Instant::now() + duration(not_null("timeout", timeout));
    let terminate = not_null("terminate", terminate);
    let call = Call::begin(verb, Some(deadline));
    let before = call.state();
    window::require_shut(call.database, verb);
    if before.state == Mode::Down && !before.rejoin {
        if window::was_ever_open(call.database) {
            drain(call.database, Aim::Down, deadline, terminate); // What the last one let in may be at its commit.
        }
        if hop.is_some() {
            refuse_foreign(&before, "take part in a hop");
            call.record(&State { hop, ..before });
        }
        return mark_the_edge();
    }

    let down = State {
        state: Mode::Down,
        since: Some(SystemTime::now()),
        by: Some(session_user()),
        reason: reason.map(compat::from_server_encoding),
        hop,
        ..State::up()
    };
    call.check_size(&down);
    settle_at_end(call.pending(Gate::Closed, &down));
    if call.database.gate() == Gate::Open {
        // The edge. Refused writers read who is at it, although the record says up until the transaction commits.
        call.database.set(Gate::Draining, &down.to_json());
        drain(call.database, Aim::Down, deadline, terminate);
    }
    catalog::record(catalog::READ_ONLY, Some("on")); // First: see assign_state() in guc.rs.
    catalog::record(catalog::STATE, down.setting().as_deref());
    compat::notify(c"readonly", c"on");
    // SAFETY: sets a flag of the current transaction. The record must be on disk before anybody acts on it.
    unsafe { pg_sys::ForceSyncCommit() };
    mark_the_edge()
}

/// What a drain is for, as its error says.
#[derive(Clone, Copy)]
pub enum Aim {
    Down,
    ShutWindow,
}

/// Waits until nobody can write any more, or raises.
pub fn drain(database: &Database, aim: Aim, deadline: Instant, terminate: bool) {
    let mut terminated = Vec::new();
    let mut until = deadline;
    let mut polls = 0;
    loop {
        let in_the_way = writers();
        if in_the_way.is_empty() {
            return;
        }
        if Instant::now() >= until {
            let sessions: Vec<i32> = in_the_way.iter().filter_map(|writer| writer.pid).collect();
            let prepared = sessions.len() < in_the_way.len();
            if !terminate || prepared || !terminated.is_empty() {
                refuse_to_drain(aim, &sessions, prepared, !terminated.is_empty());
            }
            // From here on they cannot commit, whatever comes first, their end or the signal. (Once closed, they cannot anyway.)
            if database.gate() == Gate::Draining {
                database.move_gate(Gate::Severing);
            }
            for &pid in &sessions {
                compat::terminate(pid);
            }
            terminated = sessions;
            until = Instant::now() + TERMINATION_GRACE;
        }
        // Short at first, for writes are refused meanwhile.
        polls += 1;
        sleep(if polls < 100 { 1 } else { 10 });
    }
}

/// Prepared transactions of this database, but for those of its two-phase subscriptions: they are replication's
/// business, and end by replication.
pub const PREPARED: &str = "pg_catalog.pg_prepared_xacts
     where database = current_database()
       and not exists (select from pg_catalog.pg_subscription s join pg_catalog.pg_database d on d.oid = s.subdbid
                        where d.datname = current_database() and s.subtwophasestate <> 'd'
                          and gid ~ format('^pg_gid_%s_[0-9]+$', s.oid))";

/// A transaction that wrote or could write.
struct Writer {
    /// `None`: a prepared transaction, which belongs to no process.
    pid: Option<i32>,
}

/// Everybody in this database who could still write, but for the caller.
fn writers() -> Vec<Writer> {
    let mut count = 0;
    // SAFETY: the array is palloc'd and `count` long. Sessions that begin a transaction afterwards begin their first
    // statement afterwards, and see the gate.
    let transactions = unsafe {
        compat::pgstat_clear_backend_activity_snapshot();
        let array = pg_sys::GetCurrentVirtualXIDs(pg_sys::InvalidTransactionId, false, false, 0, &mut count);
        let transactions = std::slice::from_raw_parts(array, count as usize).to_vec();
        pg_sys::pfree(array.cast());
        transactions
    };
    let mut writers = Vec::new();
    for transaction in &transactions {
        let number = compat::backend_of(transaction);
        let Some(backend) = shmem::backend(number) else { continue };
        if !backend.in_utility() && backend.effect_of(transaction.localTransactionId) == Effect::Nothing {
            continue;
        }
        // First the state, then the id: one that is idle now will see the gate before its next statement, and what its
        // last statement wrote already has its id.
        match compat::activity(number) {
            Some((_, true)) if !compat::has_xid(number) => {}
            Some((pid, _)) => writers.push(Writer { pid: Some(pid) }),
            None => {} // Its process is gone.
        }
    }
    if compat::two_phase_is_on() {
        let prepared = lines(&format!("select gid from {PREPARED}"), &[]);
        writers.extend(prepared.iter().map(|_| Writer { pid: None }));
    }
    writers
}

/// The rows of a query with one text column. Read-only, so that it takes no transaction id and works on a standby.
pub fn lines(query: &str, arguments: &[pgrx::datum::DatumWithOid]) -> Vec<String> {
    let query = format!("select convert_to(line, 'UTF8') from ({query}) as lines (line)");
    Spi::connect(|spi| {
        let rows = spi.select(&query, None, arguments)?;
        rows.map(|row| {
            row.get::<Vec<u8>>(1).map(|line| String::from_utf8_lossy(&line.unwrap_or_default()).into_owned())
        })
        .collect::<Result<_, _>>()
    })
    .unwrap_or_else(|error: spi::Error| pgrx::error!("cannot read a catalog: {error}"))
}

/// Raises, naming who is in the way.
fn refuse_to_drain(aim: Aim, sessions: &[i32], prepared: bool, terminated: bool) -> ! {
    // Not what they run: statements hold data and passwords.
    let mut who = lines(
        "select format('process %s: user %s, application \"%s\", client %s, %s, transaction open for %s s',
                       pid, usename, application_name, coalesce(host(client_addr), 'local'), state,
                       coalesce(extract(epoch from clock_timestamp() - xact_start)::numeric(12,1)::text, '?'))
           from pg_catalog.pg_stat_activity where pid = any($1) order by xact_start",
        &[sessions.to_vec().into()],
    );
    if prepared {
        who.extend(lines(
            &format!(
                "select format('prepared transaction %L of %s, prepared %s', gid, owner, date_trunc('second', prepared))
                   from {PREPARED} order by prepared"
            ),
            &[],
        ));
    }
    let hint = match (prepared, terminated) {
        (true, _) if matches!(aim, Aim::ShutWindow) => {
            "End prepared transactions with COMMIT PREPARED, in a window, or ROLLBACK PREPARED."
        }
        (true, _) => {
            "End prepared transactions with COMMIT PREPARED or ROLLBACK PREPARED: they were promised to somebody, so terminate does not end them."
        }
        (false, false) => "Wait for them, or end them with stillebot_down(terminate => true).",
        (false, true) => "They were terminated but have not ended yet; try again.",
    };
    fail(
        PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
        match aim {
            Aim::Down => "cannot take the database down: transactions that could write are still open",
            Aim::ShutWindow => "cannot close the maintenance window: transactions that could write are still open",
        },
        Some(&who.join("\n")),
        hint,
    )
}

/// Puts a marker into the WAL after everything that was committed, makes it durable and returns the position after it.
///
/// A record of our own, and not just the current position: that may lie past a page header, where a walsender only
/// arrives with the next record, and on a database that is down none need come.
pub fn mark_the_edge() -> i64 {
    let edge = compat::log_marker();
    // SAFETY: a position that the WAL has reached.
    unsafe { pg_sys::XLogFlush(edge) };
    edge as i64
}

// --- Up ---------------------------------------------------------------------------------------------------------

fn open(verb: &str, sole: bool) {
    let call = Call::begin(verb, None);
    let before = call.state();
    refuse_foreign(&before, "be brought up");
    window::require_shut(call.database, verb);
    // A database whose record says nothing may still have what a hand-made "down" left behind.
    // SAFETY: a transaction is in progress, this one.
    let marked = unsafe { !catalog::recorded(pg_sys::MyDatabaseId, catalog::READ_ONLY).is_null() };
    if before.state == Mode::Up && before.sole == sole && !marked {
        return;
    }
    let since = if before.state == Mode::Up { before.since } else { Some(SystemTime::now()) };
    let up = State { since, by: Some(session_user()), sole, ..State::up() };
    settle_at_end(call.pending(Gate::Open, &up));
    catalog::record(catalog::STATE, up.setting().as_deref());
    catalog::record(catalog::READ_ONLY, None);
    guc::leave_read_only();
    if before.state == Mode::Down || marked {
        compat::notify(c"readonly", c"off");
    }
    // SAFETY: sets a flag of the current transaction.
    unsafe { pg_sys::ForceSyncCommit() };
}

// --- What the verbs share ---------------------------------------------------------------------------------------

/// A call that may change the state: checked, and alone with it until its transaction ends.
pub struct Call {
    database: &'static Database,
}

impl Call {
    /// Without a deadline lock_timeout and statement_timeout bound the wait for other calls, as for any other lock.
    pub fn begin(verb: &str, deadline: Option<Instant>) -> Call {
        let database = require_slot();
        prevent_on_standby(verb);
        prevent_in_block(verb);
        prevent_in_writing_statement(verb, "Call it as a statement of its own: SELECT stillebot_down().");
        write_no_more();
        lock(verb, pg_sys::ShareUpdateExclusiveLock as i32, deadline);
        Call { database }
    }

    /// Refuses unless the database is down, now and after a restart.
    pub fn require_down(&self, deed: &str) {
        let state = self.state();
        refuse_foreign(&state, deed);
        if state.state != Mode::Down || state.rejoin {
            fail(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                &format!("this database cannot {deed}: it is not down"),
                None,
                "Take it down first: SELECT stillebot_down().",
            );
        }
    }

    pub fn database(&self) -> &'static Database {
        self.database
    }

    fn state(&self) -> State {
        State::parse(&self.database.text().unwrap_or_else(|| "unreadable".into()))
    }

    fn pending(&self, gate: Gate, state: &State) -> Pending {
        let before = (self.database.gate(), self.database.text().unwrap_or_default());
        Pending { database: self.database, before, after: (gate, state.to_json()) }
    }

    /// Rewrites the record of a database that stays down.
    fn record(&self, state: &State) {
        self.check_size(state);
        settle_at_end(self.pending(Gate::Closed, state));
        catalog::record(catalog::STATE, state.setting().as_deref());
        // SAFETY: sets a flag of the current transaction.
        unsafe { pg_sys::ForceSyncCommit() };
    }

    fn check_size(&self, state: &State) {
        if state.to_json().len() > MAX_STATE {
            fail(
                PgSqlErrorCode::ERRCODE_STRING_DATA_RIGHT_TRUNCATION,
                &format!("reason too long: with it the state has more than {MAX_STATE} bytes"),
                None,
                "Give a shorter reason.",
            );
        }
    }
}

/// A copy of another node stays closed until somebody says that it is the node now.
fn refuse_foreign(state: &State, deed: &str) {
    if state.foreign {
        fail(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            &format!(
                "this database cannot {deed}: {}",
                state.reason.as_deref().unwrap_or("it is a copy of another node")
            ),
            None,
            "If the original is gone for good, SELECT stillebot_adopt_identity(); otherwise stop this server.",
        );
    }
}

pub fn require_slot() -> &'static Database {
    if !shmem::is_there() {
        fail(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "stillebot must be loaded when the server starts",
            None,
            "Set shared_preload_libraries = 'stillebot' in postgresql.conf, after what is there, and restart the server.",
        );
    }
    shmem::my_database().unwrap_or_else(|| {
        fail(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            "the server has too many databases for stillebot to keep the state of this one",
            None,
            "Restart the server: the databases that are used first then get a place.",
        )
    })
}

fn prevent_on_standby(verb: &str) {
    let verb = compat::c_string(verb);
    // SAFETY: the string outlives the call; it raises when the server is in recovery.
    unsafe { pg_sys::PreventCommandDuringRecovery(verb.as_ptr()) };
}

/// In a block the call would return before its change is final. Outside of one, this also makes the transaction end
/// with the statement when a client pipelines more behind it.
pub fn prevent_in_block(verb: &str) {
    let verb = compat::c_string(verb);
    // SAFETY: the string outlives the call; it raises in a transaction block.
    unsafe { pg_sys::PreventInTransactionBlock(true, verb.as_ptr()) };
}

/// `insert into log select stillebot_down()` would write behind the edge that it drew itself.
pub fn prevent_in_writing_statement(verb: &str, hint: &str) {
    let writes = shmem::my_backend().is_some_and(|me| me.effect_of(compat::my_local_xid()) == Effect::Writes);
    // SAFETY: reads the state of the current transaction.
    let has_written = unsafe { compat::GetTopTransactionIdIfAny() } != pg_sys::InvalidTransactionId;
    if writes || has_written {
        fail(
            PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION,
            &format!("{verb} cannot be called from a statement or function that writes"),
            None,
            hint,
        );
    }
}

/// One change of state at a time, and none while the extension is being dropped: the lock of the extension itself.
/// `mode` conflicts with itself.
pub fn lock(verb: &str, mode: i32, deadline: Option<Instant>) {
    // SAFETY: looks up this very extension; the lock goes with the transaction.
    unsafe {
        let extension = pg_sys::get_extension_oid(c"stillebot".as_ptr(), false);
        if deadline.is_none() {
            pg_sys::LockDatabaseObject(pg_sys::ExtensionRelationId, extension, 0, mode);
        }
        while let Some(deadline) = deadline
            && !pg_sys::ConditionalLockDatabaseObject(pg_sys::ExtensionRelationId, extension, 0, mode)
        {
            if Instant::now() >= deadline {
                fail(
                    PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE,
                    &format!("{verb} gave up waiting for another change of state of this database"),
                    None,
                    "See who is at it: SELECT * FROM pg_stat_activity WHERE query ILIKE '%stillebot%'.",
                );
            }
            sleep(1);
        }
        if pg_sys::get_extension_oid(c"stillebot".as_ptr(), true) != extension {
            fail(
                PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                "the extension stillebot was dropped meanwhile",
                None,
                "Create it again if that was not meant.",
            );
        }
    }
}

pub fn not_null<T>(parameter: &str, value: Option<T>) -> T {
    value.unwrap_or_else(|| {
        let message = format!("{parameter} must not be null");
        fail(PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED, &message, None, "Leave it out to get its default.")
    })
}

pub fn session_user() -> String {
    // SAFETY: the session has a user; the name is palloc'd.
    unsafe {
        let name = pg_sys::GetUserNameFromId(pg_sys::GetSessionUserId(), false);
        compat::from_server_encoding(std::ffi::CStr::from_ptr(name).to_bytes())
    }
}

pub fn duration(timeout: Interval) -> Duration {
    let day = 24 * 60 * 60 * 1_000_000i128;
    let micros = i128::from(timeout.micros()) + day * (i128::from(timeout.days()) + 30 * i128::from(timeout.months()));
    if micros < 0 {
        fail(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, "timeout must not be negative", None, "Use '30 s', say.");
    }
    // A year is for ever; more would overflow the clock.
    Duration::from_micros(micros.min(365 * day) as u64)
}

fn sleep(milliseconds: i64) {
    // SAFETY: this backend's own latch; PostgreSQL's own way to wait, ended by interrupts and by the postmaster's death.
    unsafe {
        let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
        pg_sys::WaitLatch(pg_sys::MyLatch, events as i32, milliseconds, pg_sys::PG_WAIT_EXTENSION);
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}

pub fn fail(code: PgSqlErrorCode, message: &str, detail: Option<&str>, hint: &str) -> ! {
    let message = compat::in_server_encoding(message.to_owned());
    let mut report = pgrx::pg_sys::panic::ErrorReport::new(code, message, "stillebot").set_hint(hint);
    if let Some(detail) = detail {
        report = report.set_detail(compat::in_server_encoding(detail.to_owned()));
    }
    report.report(PgLogLevel::ERROR);
    unreachable!("an ERROR does not return")
}
