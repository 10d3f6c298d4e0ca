//! What one node tells the watchdog at one look: positions, workers, slots, locks, conflicts.
//!
//! [`look`] asks; deliberately judges nothing, and keeps nothing from one look to the next. Positions are bytes of WAL.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use tokio_postgres::types::PgLsn;

use crate::node::{NodeError, Session, Trouble};
use crate::sql;

/// One node, seen.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sight {
    /// How far its WAL is written.
    pub written: u64,
    /// Size of a WAL segment in bytes.
    pub segment: u64,
    /// How long its apply workers wait before they try again.
    pub retry: Duration,
    /// Free bytes of the file system that holds its WAL; none from an extension that cannot tell.
    pub free: Option<u64>,
    /// The subscriptions of the database.
    pub subscriptions: Vec<Subscription>,
    /// The slots of the server.
    pub slots: Vec<Slot>,
    /// The subscriptions' workers that wait for a lock, the longest first.
    pub waits: Vec<Wait>,
    /// Open conflicts, those that stop apply first; none from an extension that does not record them.
    pub conflicts: Vec<Conflict>,
    /// The tables it publishes, each with the subscriptions that it is part of here.
    pub tables: BTreeMap<String, Vec<String>>,
    /// The fingerprint of its schema, which [`look`] does not ask for; none from an extension that cannot tell.
    pub schema: Option<String>,
    /// What the extension warns of.
    pub warnings: Vec<String>,
    /// Transient faults that have not healed, a line each.
    pub faults: Vec<String>,
}

/// One subscription and its apply worker.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Subscription {
    /// Its name.
    pub name: String,
    /// Switched on.
    pub enabled: bool,
    /// The slot on the publisher.
    pub slot: Option<String>,
    /// Its worker's process id.
    pub worker: Option<i32>,
    /// How far the worker has received.
    pub received: Option<u64>,
    /// How far it has handled all that came.
    pub handled: Option<u64>,
    /// When it last heard from the publisher, or was started, in microseconds of the server's clock.
    pub heard_us: Option<i64>,
    /// The worker has a connection, as far as it knows.
    pub connected: bool,
    /// It is inside a remote transaction.
    pub busy: bool,
    /// Seconds that it has been inside that transaction.
    pub applying: Option<f64>,
    /// What it waits for, in the words of `pg_stat_activity`; empty if it runs.
    pub waiting_for: String,
    /// Errors in apply, counted from whenever; lost connections count.
    pub apply_errors: i64,
    /// Errors in the initial copy, counted from whenever.
    pub sync_errors: i64,
    /// Tables whose initial copy is not finished.
    pub copying: i64,
}

/// One slot and its reader.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// It is a logical slot of this database.
    pub here: bool,
    /// Process id of the walsender that serves it.
    pub sender: Option<i32>,
    /// What the reader has confirmed, ever.
    pub confirmed: Option<u64>,
    /// What the present reader has applied.
    pub replayed: Option<u64>,
    /// From where on it keeps WAL; none if it keeps none.
    pub restart: Option<u64>,
    /// Bytes of WAL that it keeps.
    pub kept: u64,
    /// `reserved`, `extended`, `unreserved`, `lost`.
    pub wal_status: Option<String>,
    /// Bytes that can still be written before it is lost; none without `max_slot_wal_keep_size`.
    pub spare: Option<u64>,
    /// Seconds that nobody has read it; not known before PostgreSQL 17.
    pub unread: Option<f64>,
}

/// A worker that waits for a lock.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Wait {
    /// Its subscription.
    #[serde(skip)]
    pub subscription: String,
    /// Its process id.
    pub worker: i32,
    /// Seconds.
    #[serde(skip)]
    pub waited: f64,
    /// Kind of the lock: `relation`, `transactionid`, ...
    pub lock: String,
    /// The table, if it can be told.
    pub relation: Option<String>,
    /// Process id of who holds it; 0 is a prepared transaction.
    pub holder: i32,
    /// How many more are in the way.
    pub others: i64,
    /// The holder's role.
    pub user: Option<String>,
    /// Its `application_name`.
    pub application: Option<String>,
    /// Its address, or `local`.
    pub client: String,
    /// `client backend`, `autovacuum worker`, ...
    pub backend_type: Option<String>,
    /// `active`, `idle in transaction`, ...
    pub state: Option<String>,
    /// Its present or last statement, cut.
    pub query: Option<String>,
}

/// An open conflict.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conflict {
    /// Its number on this node.
    pub id: i64,
    /// The subscription it came through.
    pub subscription: String,
    /// `insert_exists`, ...
    pub conflict_type: String,
    /// The table.
    pub relation: Option<String>,
    /// What PostgreSQL said.
    pub message: Option<String>,
    /// What has been tried.
    pub resolution: Option<String>,
    /// It stops apply.
    pub blocking: bool,
    /// Seconds since it was first seen.
    pub age: f64,
}

/// Asks one node. `status_refused` remembers that the extension's own report fails there, so that it is asked once only.
pub async fn look(
    session: &Session,
    publication: &str,
    status_refused: &mut bool,
    bound: Duration,
) -> Result<Sight, NodeError> {
    let about = session.row(sql::WATCH_NODE, &[], bound).await?;
    let position = |lsn: Option<PgLsn>| lsn.map(u64::from);
    let subscriptions = session.rows(sql::WATCH_SUBSCRIPTIONS, &[], bound).await?;
    let subscriptions = subscriptions.iter().map(|row| Subscription {
        name: row.get("name"),
        enabled: row.get("enabled"),
        slot: row.get("slot"),
        worker: row.get("worker"),
        received: position(row.get("received")),
        handled: position(row.get("handled")),
        heard_us: row.get("heard_us"),
        connected: row.get("connected"),
        busy: row.get("busy"),
        applying: row.get("applying"),
        waiting_for: row.get("waiting_for"),
        apply_errors: row.get("apply_errors"),
        sync_errors: row.get("sync_errors"),
        copying: row.get("copying"),
    });
    let slots = session.rows(sql::WATCH_SLOTS, &[], bound).await?;
    let slots = slots.iter().map(|row| Slot {
        name: row.get("slot"),
        here: row.get("here"),
        sender: row.get("sender"),
        confirmed: position(row.get("confirmed")),
        replayed: position(row.get("replayed")),
        restart: position(row.get("restart")),
        kept: row.get::<_, Option<i64>>("kept").map_or(0, i64::unsigned_abs),
        wal_status: row.get("wal_status"),
        spare: row.get::<_, Option<i64>>("spare").map(|bytes| bytes.max(0).unsigned_abs()),
        unread: row.get("unread"),
    });
    let waits = session.rows(sql::WATCH_LOCKS, &[], bound).await?;
    let waits = waits.iter().map(|row| Wait {
        subscription: row.get("subscription"),
        worker: row.get("worker"),
        waited: row.get("waited"),
        lock: row.get("lock"),
        relation: row.get("relation"),
        holder: row.get("holder"),
        others: row.get("others"),
        user: row.get("usename"),
        application: row.get("application_name"),
        client: row.get("client"),
        backend_type: row.get("backend_type"),
        state: row.get("state"),
        query: row.get("query"),
    });
    let mut sight = Sight {
        written: position(about.get("written")).unwrap_or_default(),
        segment: about.get::<_, i64>("segment").unsigned_abs(),
        retry: Duration::try_from_secs_f64(about.get("retry")).unwrap_or_default(),
        subscriptions: subscriptions.collect(),
        slots: slots.collect(),
        waits: waits.collect(),
        ..Sight::default()
    };
    if about.get("measures") {
        let free: Option<i64> = session.row(sql::FREE_SPACE, &[], bound).await?.get("free");
        sight.free = free.map(i64::unsigned_abs);
    }
    let tables = session.rows(sql::TABLES, &[&publication], bound).await?;
    sight.tables = tables.iter().map(|row| (row.get("name"), row.get("subscriptions"))).collect();
    if about.get("records") {
        let conflicts = session.rows(sql::WATCH_CONFLICTS, &[], bound).await?;
        sight.conflicts = conflicts
            .iter()
            .map(|row| Conflict {
                id: row.get("id"),
                subscription: row.get::<_, Option<String>>("subscription").unwrap_or_default(),
                conflict_type: row.get::<_, Option<String>>("conflict_type").unwrap_or_default(),
                relation: row.get("relation"),
                message: row.get("message"),
                resolution: row.get("resolution"),
                blocking: row.get::<_, Option<bool>>("blocking").unwrap_or_default(),
                age: row.get("age"),
            })
            .collect();
    }
    if about.get::<_, bool>("warns") && !*status_refused {
        match session.row(sql::WATCH_STATUS, &[], bound).await {
            Ok(row) => (sight.warnings, sight.faults) = (row.get("warnings"), row.get("faults")),
            Err(error) if error.trouble == Trouble::Refused => {
                tracing::warn!(%error, "the extension does not report");
                *status_refused = true;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(sight)
}
