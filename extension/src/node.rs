//! Who this database is, on a live server: the SQL functions of its identity, and where it is. identity.rs decides.

use std::ffi::{CStr, c_char};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::identity::{Home, Identity, MAX_NAME};
use crate::readonly::{Pending, settle_at_end};
use crate::shmem::{Database, Gate};
use crate::state::{Mode, State};
use crate::verbs::{Call, fail, jsonb, lines, lock, not_null, require_slot, session_user};
use crate::{catalog, compat, conflicts, guc, local, subscription};

/// Whether this process was told at its start that its database is a copy. Never changes afterwards.
static STARTED_FOREIGN: AtomicBool = AtomicBool::new(false);

/// As [`STARTED_FOREIGN`]; for replication workers, whose life is short.
pub fn started_foreign() -> bool {
    STARTED_FOREIGN.load(Relaxed)
}

/// Looks at the identity that this process is given with its database. Returns whether it is a copy's. Cannot raise.
pub fn look_at(setting: &str) -> bool {
    // SAFETY: a plain read.
    if unsafe { pg_sys::IsBinaryUpgrade } {
        return false; // pg_upgrade, which brings the record before it has moved in.
    }
    let foreign = Identity::parse(setting).is_some_and(|identity| identity.is_foreign(&home()));
    STARTED_FOREIGN.store(foreign, Relaxed);
    foreign
}

/// The state of a database that has just been looked at for the first time since the server started, if it is a copy. Cannot
/// raise.
///
/// # Safety
/// `recorded` is null or a C string.
pub unsafe fn foreign_state(recorded: *const c_char) -> Option<State> {
    // SAFETY: a plain read; the caller vouches for the string.
    let setting = unsafe {
        if pg_sys::IsBinaryUpgrade {
            return None;
        }
        CStr::from_ptr(recorded.as_ref()?).to_string_lossy()
    };
    let identity = Identity::parse(&setting)?;
    identity.is_foreign(&home()).then(|| identity.foreign_state(SystemTime::now()))
}

/// Where this database is now.
fn home() -> Home {
    // Every process of the server is in the data directory.
    let control = std::fs::metadata("global/pg_control").ok();
    let born = control.as_ref().and_then(|control| control.created().ok()?.duration_since(UNIX_EPOCH).ok());
    Home {
        // SAFETY: reads what does not change while the server runs.
        system: unsafe { pg_sys::GetSystemIdentifier() },
        // SAFETY: a backend-local value.
        database: unsafe { pg_sys::MyDatabaseId }.to_u32(),
        inode: control.map_or(0, |control| control.ino()),
        born: born.map(|born| born.as_nanos()),
    }
}

/// Who this database is, as committed by now or changed by this transaction. A transaction must be in progress.
pub fn identity() -> Option<Identity> {
    // SAFETY: called from SQL functions; what is found is a palloc'd C string.
    unsafe {
        let recorded = catalog::recorded(pg_sys::MyDatabaseId, catalog::IDENTITY).as_ref()?;
        Identity::parse(&CStr::from_ptr(recorded).to_string_lossy())
    }
}

/// What the operator calls this node.
pub fn name() -> Option<String> {
    guc::node().or_else(|| identity().map(|identity| identity.node))
}

/// This node, for the log: what it was given as its own, so that the log outlives pg_upgrade; before that the server's system
/// identifier and the database.
fn node_id() -> String {
    identity().map_or_else(
        || {
            let Home { system, database, .. } = home();
            format!("{system}/{database}")
        },
        |identity| identity.id,
    )
}

/// [`node_id`] of a statement: its transaction, and when it began. It may be asked for each row of the log.
static NODE_ID: Mutex<(u32, i64, String)> = Mutex::new((0, 0, String::new()));

#[pg_extern(sql = false)]
fn multihome_node_id() -> String {
    // SAFETY: backend-local.
    let (transaction, statement) = (compat::my_local_xid(), unsafe { pg_sys::GetCurrentStatementStartTimestamp() });
    let mut known = NODE_ID.lock().unwrap_or_else(PoisonError::into_inner);
    if (known.0, known.1) != (transaction, statement) {
        *known = (transaction, statement, node_id());
    }
    known.2.clone()
}

#[pg_extern(sql = false)]
fn multihome_identity() -> Option<pgrx::datum::AnyElement> {
    let identity = identity()?;
    let home = home();
    let foreign = identity.is_foreign(&home);
    // SAFETY: set once, when the server starts. PostgreSQL counts from 2000.
    let started = unsafe { pg_sys::PgStartTime } + 946_684_800_000_000;
    let mut json = serde_json::to_value(&identity).ok()?;
    let more = serde_json::json!({
        "foreign": foreign,
        "why": foreign.then(|| identity.why()),
        "system_identifier": home.system,
        "database_oid": home.database,
        "postmaster_started_us": started,
    });
    json.as_object_mut()?.extend(more.as_object()?.clone());
    jsonb(&json)
}

#[pg_extern(sql = false)]
fn multihome_identify(node: Option<&[u8]>, pair: Option<pgrx::Uuid>) -> pgrx::Uuid {
    const VERB: &str = "multihome.identify()";
    let node = compat::from_server_encoding(not_null("node", node));
    let pair = not_null("pair", pair).to_string();
    if node.is_empty() || node.len() > MAX_NAME {
        fail(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            &format!("the name of a node must have 1 to {MAX_NAME} bytes"),
            None,
            "Give it the name that the agent's configuration has for it.",
        );
    }
    begin(VERB);
    let known = identity();
    if let Some(known) = &known {
        if known.is_foreign(&home()) {
            fail(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                &format!("this database cannot be named: {}", known.why()),
                None,
                "To replace the original: SELECT stillebot_adopt_identity(). To become another node: SELECT multihome.forget_identity().",
            );
        }
        if known.pair != pair {
            fail(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                &format!("this database is node {} of pair {} already", known.node, known.pair),
                None,
                "Leave that pair first: SELECT multihome.forget_identity().",
            );
        }
    }
    let identity = match known {
        Some(known) => Identity { node, ..known },
        None => Identity {
            node,
            pair,
            id: random_uuid(),
            home: home().text(),
            since: Some(SystemTime::now()),
            parked: Vec::new(),
        },
    };
    become_node(Some(&identity));
    local::finish();
    parse_uuid(&identity.id)
}

#[pg_extern(sql = false)]
fn multihome_forget_identity() {
    let database = begin("multihome.forget_identity()");
    if let Some(known) = identity()
        && known.is_foreign(&home())
    {
        // Now it is nobody's copy, and nothing else would keep it from what is the original's.
        stay_down(database, &format!("it was a copy of that of node {}", known.node));
        enabled().iter().for_each(|name| switch(name, false));
    }
    become_node(None);
    local::finish();
}

/// Free bytes where the WAL is, which may be a file system of its own; null if that cannot be asked.
#[pg_extern(sql = false)]
fn multihome_free_space() -> Option<i64> {
    let mut volume = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: a C string, and room for what comes; every process of the server is in the data directory. What is read was
    // written, for the call says so.
    let volume = unsafe {
        if libc::statvfs(c"pg_wal".as_ptr(), volume.as_mut_ptr()) != 0 {
            return None;
        }
        volume.assume_init()
    };
    i64::try_from(volume.f_bavail.saturating_mul(volume.f_frsize)).ok()
}

/// Of 0.4 and 0.5, until ALTER EXTENSION .. UPDATE.
#[pg_extern(sql = false)]
fn stillebot_adopt_identity() -> String {
    adopt(false)
}

#[pg_extern(sql = false)]
fn multihome_adopt_identity(force: Option<bool>) -> String {
    adopt(force == Some(true))
}

/// `force`: although a publisher does not say whether the original is still running.
fn adopt(force: bool) -> String {
    const VERB: &str = "stillebot_adopt_identity()";
    let call = Call::begin(VERB, None);
    let Some(known) = identity() else {
        fail(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "this database has no identity to adopt",
            None,
            "Nothing keeps it from replicating. stillebot-agent init gives it an identity.",
        )
    };
    let home = home();
    if !known.is_foreign(&home) {
        return format!("This is node {}, and where it has always been: nothing to do.", known.node);
    }
    let parked = subscriptions(&known.parked);
    let mut ahead = Vec::new();
    for subscription in &parked {
        match at_the_publisher(subscription) {
            Some(Slot { active: true, .. }) => fail(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                &format!(
                    "node {} is still running: the slot of its subscription {} is in use",
                    known.node, subscription.name
                ),
                None,
                "Stop the original, and wait until its publisher has noticed, wal_sender_timeout at most; then try again.",
            ),
            Some(Slot { ahead: true, .. }) => ahead.push(subscription.name.as_str()),
            Some(_) => {}
            None if force => {}
            None => fail(
                PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                &format!(
                    "cannot ask the publisher of subscription {} whether node {} is still running and reads its slot",
                    subscription.name, known.node
                ),
                None,
                "Mend the connection, and try again; when the original is surely gone: SELECT stillebot_adopt_identity(force => true).",
            ),
        }
    }
    stay_down(call.database(), &format!("adopted the identity of node {}", known.node));
    let adopted = Identity { home: home.text(), parked: Vec::new(), ..known };
    catalog::record(catalog::IDENTITY, Some(&adopted.to_json()));
    for subscription in &parked {
        switch(&subscription.name, true);
    }
    // SAFETY: sets a flag of the current transaction.
    unsafe { pg_sys::ForceSyncCommit() };
    let mut next = format!("This is node {} now. It is down; bring it up with SELECT stillebot_up().", adopted.node);
    if !ahead.is_empty() {
        next += &format!(
            " The publisher of {} has sent more than is recorded here. If this data is older than what the original had last, rows are \
             missing and do not come by themselves: compare the tables of both, and copy again what differs.",
            ahead.join(", ")
        );
    }
    compat::in_server_encoding(next)
}

/// Switches the subscriptions of a copy off, and remembers which, so that their workers do not try again and again. Returns
/// how many. For the collector.
#[pg_extern(sql = false)]
fn multihome_park() -> i64 {
    lock("multihome.park()", pg_sys::ShareUpdateExclusiveLock as i32, None);
    let Some(known) = identity().filter(|known| known.is_foreign(&home())) else { return 0 };
    let enabled = enabled();
    if enabled.is_empty() {
        return 0;
    }
    enabled.iter().for_each(|name| switch(name, false));
    let names = enabled.join(", ");
    pgrx::log!("{}", compat::in_server_encoding(format!("disabled subscriptions {names}: {}", known.why())));
    let count = enabled.len() as i64;
    let again = enabled.into_iter().filter(|name| !known.parked.contains(name));
    let parked = known.parked.iter().cloned().chain(again).collect();
    catalog::record(catalog::IDENTITY, Some(&Identity { parked, ..known }.to_json()));
    count
}

// --- Subscriptions of a copy ------------------------------------------------------------------------------------

struct Parked {
    name: String,
    slot: String,
    /// How far the publisher's transactions have been applied here, as text.
    progress: String,
}

/// What the publisher says of a subscription's slot.
struct Slot {
    active: bool,
    ahead: bool,
}

/// Those of these subscriptions that are there and can be enabled, and those that are, should nobody have parked them yet.
fn subscriptions(names: &[String]) -> Vec<Parked> {
    let rows = lines(
        "select jsonb_build_object('name', s.subname, 'slot', s.subslotname, 'progress', coalesce(o.remote_lsn, '0/0'))::text
           from pg_catalog.pg_subscription s
           join pg_catalog.pg_database d on d.oid = s.subdbid
           left join pg_catalog.pg_replication_origin_status o on o.external_id = 'pg_' || s.oid
          where d.datname = current_database() and (s.subname = any ($1) or s.subenabled) and s.subslotname is not null
          order by s.subname",
        &[names.to_vec().into()],
    );
    rows.iter()
        .filter_map(|row| {
            let row: serde_json::Value = serde_json::from_str(row).ok()?;
            let text = |key: &str| Some(row.get(key)?.as_str()?.to_owned());
            Some(Parked { name: text("name")?, slot: text("slot")?, progress: text("progress")? })
        })
        .collect()
}

fn enabled() -> Vec<String> {
    lines(
        "select s.subname::text from pg_catalog.pg_subscription s join pg_catalog.pg_database d on d.oid = s.subdbid
          where d.datname = current_database() and s.subenabled order by 1",
        &[],
    )
}

/// Asks the publisher of a subscription; `None` if it does not answer.
///
/// Core silently begins where the slot is, if that is past what the subscriber has: what a restored database lacks it never
/// asks for. The slot of a subscription that is at rest is ahead too, because keepalives move it past what was not for it. So
/// it says something only where data may be older than the slot, in a copy, and there it says "perhaps".
fn at_the_publisher(subscription: &Parked) -> Option<Slot> {
    let ask = |condition: &str| {
        let query = format!(
            "select from pg_catalog.pg_replication_slots where slot_name = '{}' and database = pg_catalog.current_database() and {condition}",
            subscription.slot // Of a slot's letters: nothing to quote.
        );
        subscription::ask_publisher(&subscription.name, &query)
    };
    let active = ask("active")?;
    let ahead = ask(&format!("confirmed_flush_lsn > '{}'", subscription.progress))?;
    Some(Slot { active, ahead })
}

fn switch(subscription: &str, on: bool) {
    let name = compat::c_string(subscription);
    // SAFETY: copies a C string into a palloc'd identifier.
    let quoted = unsafe { CStr::from_ptr(pg_sys::quote_identifier(name.as_ptr())) }.to_string_lossy();
    let statement = catalog::parse(&format!("alter subscription {quoted} {}", if on { "enable" } else { "disable" }));
    // SAFETY: the parser made it of ALTER SUBSCRIPTION.
    unsafe { compat::alter_subscription(statement) };
}

/// Records as down what was down for another reason: because it is a copy.
fn stay_down(database: &'static Database, reason: &str) {
    let before = State::parse(&database.text().unwrap_or_default());
    let down = State {
        state: Mode::Down,
        since: before.since,
        by: Some(session_user()),
        reason: Some(reason.to_owned()),
        ..State::up()
    };
    settle_at_end(Pending {
        database,
        before: (database.gate(), before.to_json()),
        after: (Gate::Closed, down.to_json()),
    });
    catalog::record(catalog::READ_ONLY, Some("on")); // First: see assign_state() in guc.rs.
    catalog::record(catalog::STATE, down.setting().as_deref());
}

// --- What the functions share -----------------------------------------------------------------------------------

/// Keeps the transaction here, for it changes the log too, and everybody out who knows the node by its former name: the
/// collector holds the extension's lock in a weaker mode.
fn begin(verb: &str) -> &'static Database {
    let database = require_slot();
    conflicts::begin_local(verb);
    lock(verb, pg_sys::AccessExclusiveLock as i32, None);
    database
}

/// Records who this database is, and has its log follow.
fn become_node(identity: Option<&Identity>) {
    let former = node_id();
    catalog::record(catalog::IDENTITY, identity.map(Identity::to_json).as_deref());
    let latter = node_id();
    *NODE_ID.lock().unwrap_or_else(PoisonError::into_inner) = (0, 0, String::new());
    if former != latter {
        // The last one is of version 0.5.
        for table in ["log", "fault", "schema_change"] {
            if !is_there(table) {
                continue;
            }
            let rename = format!("update multihome.{table} set node = $2 where node = $1");
            Spi::run_with_args(&rename, &[former.as_str().into(), latter.as_str().into()])
                .unwrap_or_else(|error| pgrx::error!("cannot rename the node in multihome.{table}: {error}"));
        }
    }
    // SAFETY: sets a flag of the current transaction.
    unsafe { pg_sys::ForceSyncCommit() };
}

fn is_there(table: &str) -> bool {
    let found = Spi::get_one_with_args::<bool>(
        "select exists (select from pg_catalog.pg_class where relname = $1 and relnamespace = 'multihome'::pg_catalog.regnamespace)",
        &[table.into()],
    );
    found.ok().flatten().unwrap_or(false)
}

fn random_uuid() -> String {
    let uuid = Spi::get_one::<pgrx::Uuid>("select gen_random_uuid()");
    uuid.ok().flatten().expect("gen_random_uuid() returns a uuid").to_string()
}

fn parse_uuid(text: &str) -> pgrx::Uuid {
    let digits: Vec<u8> =
        text.bytes().filter_map(|digit| char::from(digit).to_digit(16)).map(|digit| digit as u8).collect();
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    pgrx::Uuid::from_slice(&bytes).expect("identities are made of uuids")
}
