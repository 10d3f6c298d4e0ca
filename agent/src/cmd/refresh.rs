//! `refresh`: ALTER SUBSCRIPTION .. REFRESH PUBLICATION on all nodes, so that new tables are replicated.
//!
//! Deliberately copies nothing: with both sides filled already, a copy would collide with what is there.

use std::time::Duration;

use serde_json::{Map, json};

use super::{Context, Reply, unreachable};
use crate::crew::{Crew, LOOK_BOUND};
use crate::failure::{Failure, Kind};
use crate::node::NodeError;
use crate::sql;

/// It connects to the peer and may wait for a table's lock.
const REFRESH_BOUND: Duration = Duration::from_secs(30);

/// Runs it.
pub async fn run(context: &Context, dry_run: bool) -> Result<Reply, Failure> {
    let (mut crew, errors) = Crew::muster(&context.config, &context.connector, &context.nodes()).await;
    if dry_run {
        let names = crew.names();
        let mut text = format!("would refresh the subscriptions on {}", names.join(", "));
        for error in errors.values() {
            text.push_str(&format!("\ncannot reach {error}"));
        }
        let kind = (!errors.is_empty()).then_some(Kind::Unreachable);
        let json = json!({"command": "refresh", "outcome": "dry_run", "nodes": names});
        return Ok(Reply { text, json, kind });
    }
    // One side refreshed and the other not is what makes a table replicate one way only.
    if let Some(failure) = unreachable(&errors) {
        return Err(failure);
    }
    crew.lock().await?;
    let (mut text, mut refreshed) = (String::new(), Map::new());
    for node in crew.names() {
        if let Some(signal) = context.signals.received() {
            return Err(stopped(format!("stopped by {signal} before {node}"), refreshed));
        }
        let result = node_of(&mut crew, &node).await;
        match result {
            Ok(names) => {
                let shown = if names.is_empty() { "no enabled subscription".to_owned() } else { names.join(", ") };
                text.push_str(&format!("{node}: refreshed {shown}\n"));
                refreshed.insert(node, json!(names));
            }
            Err(error) => {
                let mut failure = stopped(error.to_string(), refreshed);
                failure.detail = error.detail;
                if let Some(hint) = error.hint {
                    failure.hint = Some(format!("{hint}; then run refresh again"));
                }
                return Err(failure);
            }
        }
    }
    Ok(Reply::done(text, json!({"command": "refresh", "outcome": "done", "nodes": refreshed})))
}

/// Refreshes the subscriptions of one node; returns their names.
pub async fn node_of(crew: &mut Crew<'_>, node: &str) -> Result<Vec<String>, NodeError> {
    // The state of a down database must not refuse the agent's own session.
    crew.session(node)?.run("set default_transaction_read_only = off", LOOK_BOUND).await?;
    let rows = crew.ask(node, sql::REFRESH, &[], REFRESH_BOUND).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

fn stopped(message: String, refreshed: Map<String, serde_json::Value>) -> Failure {
    let done: Vec<&str> = refreshed.keys().map(String::as_str).collect();
    let done = if done.is_empty() { "no node".to_owned() } else { done.join(", ") };
    let mut failure = Failure::new(Kind::Undone, format!("{message}; refreshed so far: {done}"))
        .hint("run refresh again: it does no harm twice");
    failure.report.insert("nodes".into(), json!(refreshed));
    failure
}
