//! `activate NODE`: writes the node's name into the application's active side.
//!
//! Deliberately changes no node's state: the row is written where writing is possible, and replication carries it on.

use serde_json::json;

use super::{Context, Reply, write_active};
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts;
use crate::failure::{Failure, Kind};

/// Runs it.
pub async fn run(context: &Context, name: &str, dry_run: bool) -> Result<Reply, Failure> {
    let node = context.node(name)?;
    if context.config.active.is_none() {
        return Err(Failure::new(Kind::Configuration, "the configuration does not say where the active side is kept")
            .hint("add [active] with table and column"));
    }
    let (mut crew, errors) = Crew::muster(&context.config, &context.connector, &context.nodes()).await;
    let mut writable = Vec::new();
    let mut closed = Vec::new();
    for candidate in crew.names() {
        match facts::state(crew.session(&candidate)?, LOOK_BOUND).await {
            Ok(state) if state.is_up() => writable.push(candidate),
            Ok(_) => closed.push(format!("{candidate} is down")),
            Err(error) => closed.push(error.to_string()),
        }
    }
    closed.extend(errors.values().map(|error| format!("cannot reach {error}")));
    let Some(at) = writable.iter().find(|candidate| *candidate == name).or(writable.first()).cloned() else {
        let kind = if errors.is_empty() { Kind::Undone } else { Kind::Unreachable };
        return Err(Failure::new(kind, "no node is writable, so the active side cannot be written")
            .detail(closed.join("\n"))
            .hint(format!("open one: `hop {name}` or `up {name}`")));
    };
    let target = &node.active_name;
    if dry_run {
        return Ok(Reply::done(
            format!("would write {target:?} as the active side on {at}"),
            json!({"command": "activate", "outcome": "dry_run", "written_on": at, "active": target}),
        ));
    }
    let changed = write_active(&mut crew, &context.config, &at, node).await?;
    let text = if changed {
        format!("active side is {target} now (written on {at})")
    } else {
        format!("active side is {target} already (seen on {at})")
    };
    Ok(Reply::done(
        text,
        json!({"command": "activate", "outcome": "done", "written_on": at, "active": target, "changed": changed}),
    ))
}
