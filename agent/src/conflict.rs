//! A conflict as its node tells it: a row of `multihome.conflicts`, with the nodes that its versions come from.
//!
//! Deliberately decides nothing; what to do about conflicts is in `resolve.rs`.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use crate::config::Config;
use crate::crew::LOOK_BOUND;
use crate::node::{NodeError, Params, Session, Trouble};
use crate::sql;

/// A row of `multihome.conflicts`. Times are as the server writes them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Conflict {
    /// The node that met it.
    pub node: String,
    /// The node that the incoming change was made on; none if the subscription is not of this configuration.
    pub peer: Option<String>,
    /// Its number on its node.
    pub id: i64,
    /// The subscription that brought the change.
    pub subscription: String,
    /// `insert_exists`, `update_missing`, `apply_error`, ...
    pub conflict_type: String,
    /// Schema of the table, if it is of one.
    pub schemaname: Option<String>,
    /// The table.
    pub relname: Option<String>,
    /// The constraint that was violated.
    pub constraint_name: Option<String>,
    /// Transaction at the peer.
    pub remote_xid: Option<String>,
    /// Where that transaction was committed in the peer's WAL.
    pub remote_commit_lsn: Option<String>,
    /// When it was committed there.
    pub remote_commit_ts: Option<String>,
    /// Key of the incoming row, an object.
    pub replica_identity: Value,
    /// The incoming row, an object; null if there is none.
    pub remote_tuple: Value,
    /// Whether that is all of the row; an older extension does not say.
    pub tuple_complete: Option<bool>,
    /// The rows of this node that stand in the way.
    #[serde(deserialize_with = "or_empty")]
    pub local_conflicts: Vec<LocalRow>,
    /// The error's code.
    pub sqlstate: Option<String>,
    /// The error.
    pub message: Option<String>,
    /// More of it.
    pub detail: Option<String>,
    /// Where it happened.
    pub context: Option<String>,
    /// When it came up.
    pub first_seen: Option<String>,
    /// When it last came up.
    pub last_seen: Option<String>,
    /// How often it came up.
    pub occurrences: i64,
    /// `open`, `resolved`, `skipped`.
    pub status: String,
    /// What was done about it.
    pub resolution: Option<String>,
    /// By whom.
    pub resolved_by: Option<String>,
    /// When.
    pub resolved_at: Option<String>,
    /// `insert`, `update`, `delete`, `truncate`, `commit`, `copy`.
    pub operation: Option<String>,
    /// Place of the failing change in its transaction, from 1.
    pub change_number: Option<i32>,
    /// Whether all changes of the transaction are known.
    pub changes_complete: Option<bool>,
    /// `plain`, `streamed`, `prepared`, `copy`.
    pub transaction_kind: Option<String>,
    /// Open, and replication waits for it.
    #[serde(deserialize_with = "or_empty")]
    pub blocking: bool,
    /// The statements that mend a table that differs from the publisher's, as far as the node can know; none before 0.6.
    pub remedy: Option<String>,
}

/// A row of the node that stands in the way of an incoming one.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LocalRow {
    /// The node that wrote this version; the node itself if that is not known.
    pub from: String,
    /// Transaction that wrote it.
    pub xid: Option<Value>,
    /// When that was committed; none if the node does not know any more.
    pub commit_ts: Option<String>,
    /// `local`, or the subscription that brought it; none if the node does not know any more.
    pub origin: Option<String>,
    /// Its key, an object.
    pub key: Value,
    /// The row, an object.
    pub tuple: Value,
}

fn or_empty<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Conflict {
    /// Reads a row of the log of `node`, as `to_jsonb` writes it.
    pub fn read(config: &Config, node: &str, row: &str) -> Result<Self, String> {
        let mut conflict: Self = serde_json::from_str(row)
            .map_err(|error| format!("a row of multihome.conflicts is not understood: {error}"))?;
        conflict.node = node.to_owned();
        let source = |subscription: &String| config.source_of(node, subscription).map(|source| source.name.clone());
        conflict.peer = Some(&conflict.subscription).and_then(source);
        for local in &mut conflict.local_conflicts {
            local.from = local.origin.as_ref().and_then(source).unwrap_or_else(|| node.to_owned());
        }
        Ok(conflict)
    }

    /// How it is named on the command line.
    pub fn name(&self) -> String {
        format!("{}/{}", self.node, self.id)
    }

    /// Whether nothing has been done about it yet.
    pub fn is_open(&self) -> bool {
        self.status == "open"
    }

    /// The table as people write it.
    pub fn table(&self) -> String {
        match (&self.schemaname, &self.relname) {
            (Some(schema), Some(table)) => format!("{schema}.{table}"),
            (None, Some(table)) => table.clone(),
            _ => "no table".into(),
        }
    }

    /// It may come of a table that is not as on the other node: the classes of errors for what is missing, of values that do not
    /// fit a type, and of types that do not fit each other.
    pub fn may_be_drift(&self) -> bool {
        let class = self.sqlstate.as_deref().and_then(|sqlstate| sqlstate.get(..2));
        self.conflict_type == "apply_error" && matches!(class, Some("22" | "42" | "55"))
    }

    /// Two rows claim one place: the incoming one, and at least one that is here.
    pub fn is_clash(&self) -> bool {
        matches!(self.conflict_type.as_str(), "insert_exists" | "update_exists" | "multiple_unique_conflicts")
    }

    /// What it is, in few words; PostgreSQL 18 has the name of the constraint in none of its messages.
    pub fn gist(&self) -> Option<String> {
        match &self.constraint_name {
            Some(constraint) if self.is_clash() => Some(format!("violates {constraint}")),
            _ => self.message.clone(),
        }
    }

    /// The incoming change is of a row that is not here. Replication has gone on without it.
    pub fn is_missing(&self) -> bool {
        self.conflict_type == "update_missing"
    }

    /// What `stillebot_resolve` kept here, `local` or `remote`, if no agent has compared the nodes since and said who won.
    pub fn kept(&self) -> Option<&str> {
        let kept = self.resolution.as_deref().filter(|_| self.status == "resolved")?.strip_prefix("kept ")?;
        ["local", "remote"].into_iter().find(|word| kept.starts_with(word))
    }

    /// An agent of this role has answered it, and was cut off before it had compared the nodes.
    pub fn is_cut_off(&self, role: &str) -> bool {
        self.kept().is_some() && self.resolved_by.as_deref() == Some(role)
    }

    /// Key of the incoming row as it is to be: an update may move it.
    pub fn remote_key(&self) -> Value {
        let columns = self.replica_identity.as_object().into_iter().flatten();
        let moved = columns.map(|(column, _)| Some((column.clone(), self.remote_tuple.get(column)?.clone())));
        match moved.collect::<Option<serde_json::Map<_, _>>>() {
            Some(key) if !key.is_empty() => Value::Object(key),
            _ => self.replica_identity.clone(),
        }
    }

    /// The keys of all rows that take part.
    pub fn keys(&self) -> Vec<Value> {
        let mut keys = Vec::new();
        let local = self.local_conflicts.iter().map(|local| local.key.clone());
        for key in [self.replica_identity.clone(), self.remote_key()].into_iter().chain(local) {
            if key.is_object() && !keys.contains(&key) {
                keys.push(key);
            }
        }
        keys
    }
}

/// One change of the failing transaction.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Change {
    /// Place in the transaction, from 1.
    pub change_number: i32,
    /// Schema of the table.
    pub schemaname: Option<String>,
    /// The table.
    pub relname: Option<String>,
    /// `insert`, `update`, `delete`, `truncate`.
    pub operation: String,
    /// Key of the row.
    pub key: Value,
    /// The row.
    pub tuple: Value,
    /// It is the one that failed.
    #[serde(deserialize_with = "or_empty")]
    pub failed: bool,
    /// All changes of the transaction are known.
    #[serde(deserialize_with = "or_empty")]
    pub complete: bool,
}

async fn conflicts(
    session: &Session,
    config: &Config,
    query: &str,
    params: Params<'_>,
) -> Result<Vec<Conflict>, NodeError> {
    let rows = session.rows(query, params, LOOK_BOUND).await?;
    rows.iter()
        .map(|row| {
            Conflict::read(config, &session.node, row.get(0)).map_err(|flaw| session.error(Trouble::Refused, flaw))
        })
        .collect()
}

/// The conflict with that number, if the node has it.
pub async fn by_id(session: &Session, config: &Config, id: i64) -> Result<Option<Conflict>, NodeError> {
    Ok(conflicts(session, config, sql::CONFLICT, &[&id]).await?.pop())
}

/// The conflicts of a table in which a row with one of these keys takes part: the open ones, and those of [`Conflict::kept`].
pub async fn related(
    session: &Session,
    config: &Config,
    table: (&Option<String>, &Option<String>),
    keys: &[Value],
) -> Result<Vec<Conflict>, NodeError> {
    let keys = json!(keys).to_string();
    conflicts(session, config, sql::CONFLICTS_RELATED, &[table.0, table.1, &keys]).await
}

/// The conflicts for a list, without the rows in them: the open ones, or all.
pub async fn list(session: &Session, config: &Config, all: bool) -> Result<Vec<Conflict>, NodeError> {
    conflicts(session, config, sql::CONFLICTS, &[&all]).await
}

/// What the failing transaction did, as far as the node has seen it.
pub async fn changes(session: &Session, id: i64) -> Result<Vec<Change>, NodeError> {
    let rows = session.rows(sql::CONFLICT_CHANGES, &[&id], LOOK_BOUND).await?;
    rows.iter()
        .map(|row| {
            serde_json::from_str(row.get(0)).map_err(|error| {
                session.error(Trouble::Refused, format!("a change of conflict {id} is not understood: {error}"))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;

    #[test]
    fn a_row_of_the_log_is_understood() {
        let config =
            "user='u'\n[[node]]\nname='a'\nhost='a'\n[[node]]\nname='b'\nhost='b'\n[[node]]\nname='c'\nhost='c'";
        let config = Config::parse(config, &Environment { variable: &|_| None, os_user: None }).unwrap();
        let row = r#"{"id": 7, "subscription": "multihome_b", "conflict_type": "insert_exists", "schemaname": "s",
            "relname": "t", "remote_xid": "740", "replica_identity": {"id": 1},
            "remote_tuple": {"id": 1, "n": 12345678901234567890.123456789}, "detail": null,
            "local_conflicts": [{"xid": "3", "commit_ts": null, "origin": null, "key": {"id": 1}, "tuple": {}},
                {"xid": 3, "commit_ts": "t", "origin": "multihome_c", "key": {"id": 2}, "tuple": {}}],
            "occurrences": 2, "status": "open", "blocking": true, "later_column": [1]}"#;
        let conflict = Conflict::read(&config, "a", row).unwrap();
        assert_eq!((conflict.name().as_str(), conflict.table().as_str()), ("a/7", "s.t"));
        assert_eq!(conflict.peer.as_deref(), Some("b"));
        assert_eq!(conflict.local_conflicts[0].from, "a");
        assert_eq!(conflict.local_conflicts[1].from, "c");
        assert_eq!(conflict.keys(), [json!({"id": 1}), json!({"id": 2})]);
        assert!(conflict.is_clash() && conflict.is_open() && conflict.blocking);
        // Rows pass through the agent to another node, so not a digit may get lost.
        assert!(conflict.remote_tuple.to_string().contains("12345678901234567890.123456789"));

        let moved = r#"{"id": 9, "subscription": "multihome_b", "status": "resolved", "resolution": "kept local: left out",
            "replica_identity": {"id": 1}, "remote_tuple": {"id": 5, "n": 1}}"#;
        let conflict = Conflict::read(&config, "a", moved).unwrap();
        assert_eq!((conflict.remote_key(), conflict.kept()), (json!({"id": 5}), Some("local")));
        let settled = Conflict { resolution: Some("winner a; kept local: left out".into()), ..conflict };
        assert_eq!(settled.kept(), None);

        let lacks = r#"{"id": 9, "conflict_type": "apply_error", "sqlstate": "55000", "remedy": "alter table ..", "subscription": "x"}"#;
        let lacks = Conflict::read(&config, "a", lacks).unwrap();
        assert!(lacks.may_be_drift() && lacks.remedy.is_some() && !settled.may_be_drift());

        let empty = r#"{"id": 8, "subscription": "x", "local_conflicts": null, "blocking": null}"#;
        let conflict = Conflict::read(&config, "a", empty).unwrap();
        assert!(conflict.peer.is_none() && conflict.local_conflicts.is_empty() && !conflict.blocking);
        assert!(Conflict::read(&config, "a", "{}").is_ok() && Conflict::read(&config, "a", "1").is_err());
    }
}
