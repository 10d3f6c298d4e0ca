//! What one node tells about itself for set-up: settings, roles, rules of access, tables, publications, subscriptions.
//!
//! [`take`] asks; deliberately judges nothing. What may be asked depends on the role, so what could not be asked is None.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::clock::Clock;
use crate::config::{Config, Node};
use crate::grants::{self, Grant};
use crate::hba::{Mapping, Rule};
use crate::node::{NodeError, Params, Session, Trouble};
use crate::sql;

/// The least version of PostgreSQL: from it on subscriptions know `origin`. An older one is asked for its version only.
pub const LEAST_VERSION: i32 = 16_00_00;

/// The settings that set-up cares about.
pub const SETTINGS: &[&str] = &[
    "config_file",
    "data_directory",
    "hba_file",
    "ident_file",
    "listen_addresses",
    "max_active_replication_origins",
    "max_logical_replication_workers",
    "max_parallel_workers",
    "max_replication_slots",
    "max_slot_wal_keep_size",
    "max_sync_workers_per_subscription",
    "max_wal_senders",
    "max_worker_processes",
    "shared_preload_libraries",
    "ssl",
    "ssl_ca_file",
    "stillebot.node",
    "track_commit_timestamp",
    "wal_level",
];

/// Everything that one node told.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Survey {
    /// Server, database, extension.
    pub about: About,
    /// By name; those of [`SETTINGS`] that the role may see, and all that wait for a restart.
    pub settings: BTreeMap<String, Setting>,
    /// The role of the agent and that of the subscriptions, as far as they exist, by name.
    pub roles: BTreeMap<String, Role>,
    /// What the agent's role is not allowed, of all that it needs: the statements that allow it; and whether what they are
    /// about is there at all.
    pub missing_grants: Vec<(Grant, bool)>,
    /// pg_hba.conf, in order.
    pub rules: Option<Vec<Rule>>,
    /// pg_ident.conf, in order.
    pub mappings: Option<Vec<Mapping>>,
    /// All tables but the extension's, partitions included.
    pub tables: Vec<Table>,
    /// The publications of the database.
    pub publications: Vec<Publication>,
    /// The subscriptions of the database.
    pub subscriptions: Vec<Subscription>,
    /// What each subscription connects with, passwords as `***`.
    pub connections: Option<BTreeMap<String, String>>,
    /// The slots of the server.
    pub slots: Vec<Slot>,
    /// Who the node says it is. None: nobody told it, or its extension does not ask for that.
    pub identity: Option<Identity>,
    /// Its clock.
    pub clock: Option<Clock>,
    /// Free bytes where its WAL is.
    pub free: Option<u64>,
}

/// Server, database, extension.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct About {
    /// Version of PostgreSQL.
    pub version: String,
    /// The same as a number.
    pub version_num: i32,
    /// A standby.
    pub in_recovery: bool,
    /// Given by initdb, and copied with the data.
    pub system_identifier: String,
    /// Start of the server in microseconds.
    pub started_us: i64,
    /// Oid of the database.
    pub database_oid: i64,
    /// `UTF8`, ...
    pub encoding: String,
    /// `libc`, `icu`, `builtin`.
    pub provider: String,
    /// `lc_collate`.
    pub collate: String,
    /// `lc_ctype`.
    pub ctype: String,
    /// The locale of the providers other than libc.
    pub locale: Option<String>,
    /// The version of the collation that the indexes were made with.
    pub collation_version: Option<String>,
    /// What the libraries of the system have now.
    pub collation_version_now: Option<String>,
    /// Version of the extension in the database.
    pub extension: Option<String>,
    /// Version that the server's files would give.
    pub extension_available: Option<String>,
    /// This role may see pg_hba.conf.
    pub may_see_rules: bool,
    /// This role may see pg_ident.conf.
    pub may_see_mappings: bool,
    /// This role may ask for the free space.
    pub may_see_space: bool,
    /// This role may see what subscriptions connect with.
    pub may_see_connections: bool,
    /// The extension can say who the node is.
    pub knows_itself: bool,
    /// Where the server sees this session come from; None: through a socket.
    pub client: Option<String>,
    /// This session is encrypted.
    pub client_tls: Option<bool>,
    /// Slots that are not of this configuration.
    pub other_slots: i64,
    /// Processes that send WAL to others than the configuration's nodes.
    pub other_senders: i64,
    /// Enabled subscriptions that are not of this configuration, in all databases.
    pub other_subscriptions: i64,
    /// Other databases with enabled subscriptions.
    pub other_databases: i64,
}

/// A setting as `pg_settings` has it: numbers in its own unit.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Setting {
    /// Its name.
    pub name: String,
    /// What is in force.
    pub value: String,
    /// It was given on the server's command line, which wins over every file.
    pub on_command_line: bool,
    /// It was given by ALTER SYSTEM.
    pub altered: bool,
    /// It changes with a restart only.
    pub restart: bool,
    /// A change waits for that.
    pub pending: bool,
}

/// A role.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Role {
    /// Its name.
    pub name: String,
    /// LOGIN.
    pub login: bool,
    /// REPLICATION.
    pub replication: bool,
    /// SUPERUSER.
    pub superuser: bool,
    /// Sees rows whatever row security says.
    pub past_row_security: bool,
    /// Has pg_read_all_data.
    pub reads_all: bool,
    /// The roles it is in, itself included.
    pub groups: BTreeSet<String>,
}

/// A table. Names are quoted for SQL.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Table {
    /// With its schema.
    pub name: String,
    /// Its rows are in its partitions.
    pub partitioned: bool,
    /// Not replicated.
    pub unlogged: bool,
    /// The role of the subscriptions may read it; None if there is no such role.
    pub readable: Option<bool>,
    /// It shows some rows to some roles.
    pub row_security: bool,
    /// `default`, `nothing`, `full`, `index`.
    pub identity: String,
    /// Updates and deletes can be published.
    pub has_identity: bool,
    /// The columns by which they name a row, if that is an index.
    pub identity_columns: Vec<String>,
    /// Its unique indexes, the primary key first.
    pub keys: Vec<Key>,
    /// Its columns in order.
    pub columns: Vec<Column>,
}

/// A unique index.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Key {
    /// Its name.
    pub name: String,
    /// The primary key.
    pub primary: bool,
    /// Checked at the end of the transaction only, or possibly so.
    pub deferrable: bool,
    /// Made by a constraint.
    pub constraint: bool,
    /// It could be the replica identity.
    pub fit: bool,
    /// Its columns.
    pub columns: Vec<String>,
    /// What may be there once only: columns and expressions, NULLS NOT DISTINCT, the rows that it is about.
    pub rule: String,
}

/// A column.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// NOT NULL.
    pub not_null: bool,
    /// GENERATED ALWAYS AS (..).
    pub generated: bool,
    /// GENERATED ALWAYS AS IDENTITY.
    pub always: bool,
    /// What gives it its values.
    pub sequence: Option<Sequence>,
}

/// A sequence.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Sequence {
    /// With its schema.
    pub name: String,
    /// From one value to the next.
    pub increment: i64,
    /// The first value.
    pub start: i64,
    /// MINVALUE.
    pub least: i64,
    /// MAXVALUE.
    pub most: i64,
    /// The last value; None if there is none, or the role may not see it.
    pub last: Option<i64>,
}

/// A publication.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Publication {
    /// Its name.
    pub name: String,
    /// FOR ALL TABLES.
    pub all_tables: bool,
    /// What it publishes.
    pub inserts: bool,
    /// What it publishes.
    pub updates: bool,
    /// What it publishes.
    pub deletes: bool,
    /// What it publishes.
    pub truncates: bool,
}

/// A subscription.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Subscription {
    /// Its name.
    pub name: String,
    /// Switched on.
    pub enabled: bool,
    /// `none`, `any`.
    pub origin: String,
    /// `off`, `on`, `parallel`.
    pub streaming: String,
    /// Switched off by any error.
    pub disable_on_error: bool,
    /// The slot on the publisher.
    pub slot: Option<String>,
    /// What it subscribes to.
    pub publications: Vec<String>,
    /// Tables whose initial copy is not finished.
    pub copying: i64,
}

/// A slot.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// It is a logical slot of this database.
    pub here: bool,
    /// Somebody reads it, or makes it.
    pub active: bool,
    /// It is still being made.
    pub unmade: bool,
    /// It has everything since it was made, and nobody has got any of it, as far as statistics tell.
    pub unread: bool,
    /// `reserved`, `extended`, `unreserved`, `lost`.
    pub wal_status: Option<String>,
    /// Bytes of WAL that it keeps.
    pub kept: Option<u64>,
    /// Where the reader comes from.
    pub reader: Option<String>,
}

/// Who a node says it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Identity {
    /// Its name.
    pub node: String,
    /// Which nodes belong together.
    pub pair: String,
    /// Which of them it is.
    pub id: String,
    /// Its data was copied here from elsewhere.
    #[serde(default)]
    pub foreign: bool,
    /// How that is known.
    #[serde(default)]
    pub why: Option<String>,
}

/// Asks one node everything. Fails only if the connection does, or if the server is not one that can be asked.
pub async fn take(session: &Session, config: &Config, node: &Node, bound: Duration) -> Result<Survey, NodeError> {
    let others = || config.peers(&node.name);
    let slots: Vec<String> = others().map(|other| config.slot(&node.name, &other.name)).collect();
    let subscriptions: Vec<String> = others().map(|other| config.subscription_to(&other.name)).collect();
    let about = about(session, &slots, &subscriptions, bound).await?;
    if about.version_num < LEAST_VERSION {
        return Ok(Survey { about, ..Survey::default() });
    }
    let settings: Vec<Setting> = read(session, sql::SURVEY_SETTINGS, &[&SETTINGS], bound).await?;
    let settings: BTreeMap<String, Setting> = settings.into_iter().map(|found| (found.name.clone(), found)).collect();
    let names = [&config.user, &config.replication.user];
    let roles: Vec<Role> = read(session, sql::SURVEY_ROLES, &[&names.as_slice()], bound).await?;
    let connections = match about.may_see_connections {
        false => None,
        true => {
            let rows = session.rows(sql::SURVEY_CONNECTIONS, &[], bound).await?;
            Some(rows.iter().map(|row| (row.get("subscription"), row.get("conninfo"))).collect())
        }
    };
    let free = match about.may_see_space {
        false => None,
        true => session.row(sql::FREE_SPACE, &[], bound).await?.get::<_, Option<i64>>("free").map(i64::unsigned_abs),
    };
    Ok(Survey {
        roles: roles.into_iter().map(|role| (role.name.clone(), role)).collect(),
        missing_grants: missing_grants(session, config, bound).await?,
        rules: if about.may_see_rules { Some(read(session, sql::SURVEY_RULES, &[], bound).await?) } else { None },
        mappings: match about.may_see_mappings {
            false => None,
            true => Some(read(session, sql::SURVEY_MAPPINGS, &[], bound).await?),
        },
        tables: read(session, sql::SURVEY_TABLES, &[&config.replication.user], bound).await?,
        publications: read(session, sql::SURVEY_PUBLICATIONS, &[], bound).await?,
        subscriptions: read(session, sql::SURVEY_SUBSCRIPTIONS, &[], bound).await?,
        connections,
        slots: read(session, sql::SURVEY_SLOTS, &[], bound).await?,
        identity: identity(session, &about, bound).await?,
        clock: Some(Clock::measure(session, bound).await?),
        free,
        about,
        settings,
    })
}

/// Who is at the other end: server and database, and what that has been told that it is.
pub async fn who(session: &Session, bound: Duration) -> Result<(About, Option<Identity>), NodeError> {
    let about = about(session, &[], &[], bound).await?;
    let identity = identity(session, &about, bound).await?;
    Ok((about, identity))
}

async fn about(
    session: &Session,
    slots: &[String],
    subscriptions: &[String],
    bound: Duration,
) -> Result<About, NodeError> {
    let about: Vec<About> = read(session, sql::SURVEY_NODE, &[&slots, &subscriptions], bound).await?;
    let missing = || session.error(Trouble::Refused, "the server says nothing of itself".into());
    about.into_iter().next().ok_or_else(missing)
}

async fn identity(session: &Session, about: &About, bound: Duration) -> Result<Option<Identity>, NodeError> {
    match about.knows_itself {
        false => Ok(None),
        true => Ok(read::<Option<Identity>>(session, sql::SURVEY_IDENTITY, &[], bound).await?.pop().flatten()),
    }
}

async fn missing_grants(session: &Session, config: &Config, bound: Duration) -> Result<Vec<(Grant, bool)>, NodeError> {
    let wanted = grants::wanted(config);
    let kinds: Vec<&str> = wanted.iter().map(|grant| grant.kind).collect();
    let column = |of: fn(&Grant) -> &String| wanted.iter().map(|grant| of(grant).as_str()).collect::<Vec<_>>();
    let (schemas, names) = (column(|grant| &grant.schema), column(|grant| &grant.name));
    let (arguments, privileges) = (column(|grant| &grant.arguments), column(|grant| &grant.privilege));
    let params: Params<'_> = &[&config.user, &kinds, &schemas, &names, &arguments, &privileges];
    let rows = session.rows(sql::SURVEY_GRANTS, params, bound).await?;
    let granted = rows.iter().map(|row| row.get::<_, Option<bool>>("granted"));
    Ok(wanted
        .into_iter()
        .zip(granted)
        .filter(|(_, granted)| *granted != Some(true))
        .map(|(grant, granted)| (grant, granted.is_some()))
        .collect())
}

/// Rows of a query that makes a document of each.
async fn read<T: DeserializeOwned>(
    session: &Session,
    query: &str,
    params: Params<'_>,
    bound: Duration,
) -> Result<Vec<T>, NodeError> {
    let rows = session.rows(query, params, bound).await?;
    rows.iter()
        .map(|row| {
            let text: Option<String> = row.get("survey");
            serde_json::from_str(text.as_deref().unwrap_or("null")).map_err(|error| {
                session.error(Trouble::Refused, format!("what the server says of itself is not understood: {error}"))
            })
        })
        .collect()
}
