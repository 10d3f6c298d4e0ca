//! `down NODE`: takes a node down and proves that nothing writes there any more.
//!
//! Deliberately asks no other node: it must work when it is the last one that can be reached.

use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::types::PgLsn;

use super::{Context, IN_THE_WAY, Reply, unreachable};
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts::{self, State};
use crate::failure::{Failure, Kind};
use crate::node::{Params, Trouble};
use crate::sql;

/// What is wanted.
pub struct Wish<'a> {
    /// The node.
    pub node: &'a str,
    /// Why.
    pub reason: Option<&'a str>,
    /// How long transactions may take to end.
    pub timeout: Duration,
    /// End them then.
    pub terminate: bool,
}

/// Runs it.
pub async fn run(context: &Context, wish: &Wish<'_>, dry_run: bool) -> Result<Reply, Failure> {
    let name = wish.node;
    let node = context.node(name)?;
    let (mut crew, errors) = Crew::muster(&context.config, &context.connector, &[node]).await;
    if let Some(failure) = unreachable(&errors) {
        return Err(failure);
    }
    let facts = facts::gather(crew.session(name)?, &context.config, LOOK_BOUND).await?;
    let Some(state) = facts.state else {
        let flaw = facts.extension.flaw().unwrap_or_default();
        return Err(Failure::new(Kind::Undone, format!("{name}: {flaw}")));
    };
    if dry_run {
        let writers = state.writers.map_or_else(String::new, |n| format!(", {n} transactions could write"));
        let text = if state.is_up() {
            format!("would take {name} down (it is up{writers})")
        } else {
            format!("{name} is down already{}", since(&state))
        };
        return Ok(Reply::done(text, json!({"command": "down", "outcome": "dry_run", "node": name, "state": state})));
    }
    crew.lock().await?;
    let before = facts::state(crew.session(name)?, LOOK_BOUND).await?;

    // What the server does with the timeout is its business; here it only must not be waited for endlessly.
    let bound = wish.timeout + Duration::from_secs(10);
    let seconds = wish.timeout.as_secs_f64();
    let params: Params<'_> = &[&wish.reason, &seconds, &wish.terminate, &None::<String>];
    let answer = {
        let session = crew.session(name)?;
        let call = session.row(sql::DOWN, params, bound);
        tokio::pin!(call);
        tokio::select! {
            answer = &mut call => Ok(answer),
            signal = context.signals.wait() => {
                // The server gives up and stays up, unless it had just finished.
                session.cancel(&context.connector, Duration::from_secs(2)).await;
                match tokio::time::timeout(Duration::from_secs(3), call).await {
                    Ok(answer) => Ok(answer),
                    Err(_) => Err(signal),
                }
            }
        }
    };
    let error = match answer {
        Ok(Ok(row)) => {
            let lsn: PgLsn = row.get("lsn");
            let state = facts::state(crew.session(name)?, LOOK_BOUND).await.ok();
            // A node that its own restart has closed is now down by the operator's word.
            let changed = before.is_up() || before.rejoin;
            let text = if changed {
                format!("{name} is down; every write before is in its WAL up to {lsn}")
            } else {
                format!("{name} is down already{}", since(&before))
            };
            let json = json!({"command": "down", "outcome": "done", "node": name, "changed": changed,
                "lsn": lsn.to_string(), "state": state});
            return Ok(Reply::done(text, json));
        }
        Ok(Err(error)) if error.trouble == Trouble::Refused => {
            let mut failure = Failure::from(error);
            failure.message = format!("{}; it is as it was before", failure.message);
            if failure.detail.is_some() {
                // The server's own hint is for those who type SQL.
                failure.hint = Some(IN_THE_WAY.into());
            }
            return Err(failure);
        }
        Ok(Err(error)) => error.to_string(),
        Err(signal) => format!("stopped by {signal}, and {name} does not answer"),
    };
    crew.give_up(name);
    match crew.learn(name, Duration::from_secs(10)).await {
        Ok(state) if state.is_up() => {
            Err(Failure::new(Kind::Undone, format!("{error}; {name} is up as before")).hint("run it again"))
        }
        Ok(state) => {
            let json = json!({"command": "down", "outcome": "done", "node": name, "changed": before.is_up(),
                "lsn": Value::Null, "state": state});
            Ok(Reply::done(format!("{name} is down (learned after: {error})"), json))
        }
        Err(_) => Err(Failure::new(Kind::NeedsPerson, format!("{error}; whether {name} is down now is not known"))
            .hint(format!("when it can be reached: `status`, and `down {name}` again if it is up"))),
    }
}

fn since(state: &State) -> String {
    let mut text = String::new();
    if let Some(since) = &state.since {
        text.push_str(&format!(" since {since}"));
    }
    if let Some(by) = &state.by {
        text.push_str(&format!(" by {by}"));
    }
    if let Some(reason) = &state.reason {
        text.push_str(&format!(": {reason}"));
    }
    text
}
