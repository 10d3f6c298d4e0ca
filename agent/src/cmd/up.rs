//! `up NODE`: opens a node for writing.
//!
//! Deliberately refuses where it cannot prove that this is safe, with `--force` as the explicit way out for an emergency.
//! With the other nodes down this one becomes the only writable node ("sole"); with others up, all of them lose that mark.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Context, Reply, open};
use crate::change;
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts::{self, Facts, State};
use crate::failure::{Failure, Kind};
use crate::node::Trouble;
use crate::stop::Limits;

/// How long replication that does not flow may take to come back.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs it.
pub async fn run(context: &Context, name: &str, force: bool, dry_run: bool) -> Result<Reply, Failure> {
    let node = context.node(name)?;
    let (mut crew, mut errors) = Crew::muster(&context.config, &context.connector, &context.nodes()).await;
    if let Some(error) = errors.remove(name) {
        return Err(error.into());
    }
    if !errors.is_empty() && !force {
        let missing: Vec<&str> = errors.keys().map(String::as_str).collect();
        let missing = missing.join(", ");
        let detail = errors.values().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        let failure = Failure::new(
            Kind::Unreachable,
            format!("{missing} cannot be reached and may be writable: {name} was not opened"),
        );
        return Err(failure.detail(detail).hint(format!(
            "if {missing} is surely not writable, `up {name} --force`. What it had not sent yet will arrive when it returns, \
             and may conflict; unless it was the only writable node, it returns writable: keep it off the network until then"
        )));
    }
    if !dry_run {
        crew.lock().await?;
    }

    let mut facts = std::collections::BTreeMap::new();
    for other in crew.names() {
        facts.insert(other.clone(), facts::gather(crew.session(&other)?, &context.config, LOOK_BOUND).await?);
    }
    let usable = |facts: &Facts| facts.extension.flaw();
    if let Some(flaw) = facts.get(name).and_then(usable) {
        return Err(Failure::new(Kind::Undone, format!("{name}: {flaw}")));
    }
    let states: Vec<(String, State)> =
        facts.iter().filter_map(|(n, f)| f.state.clone().map(|state| (n.clone(), state))).collect();
    let others_up: Vec<String> =
        states.iter().filter(|(n, s)| n != name && s.is_up()).map(|(n, _)| n.clone()).collect();
    let unproven: Vec<String> =
        facts.iter().filter(|(n, f)| *n != name && f.state.is_none()).map(|(n, _)| n.clone()).collect();
    let before = states.iter().find(|(n, _)| n == name).map(|(_, s)| s.clone());

    if !force {
        if let Some(other) = unproven.first() {
            let flaw = facts.get(other).and_then(usable).unwrap_or_default();
            return Err(Failure::new(
                Kind::Undone,
                format!("the state of {other} is not known: {name} was not opened"),
            )
            .detail(flaw)
            .hint(format!("mend {other}, or `up {name} --force` if it is surely not written")));
        }
        if let Some((other, state)) = states.iter().find(|(_, s)| s.hop.is_some()) {
            let to = state.note().map_or_else(|| "NODE".to_owned(), |note| note.to);
            return Err(Failure::new(Kind::Undone, format!("{other} was closed by an unfinished hop to {to}"))
                .hint(format!("finish it with `hop {to} --resume` or undo it with `hop {to} --abort`")));
        }
        if let Some(left) = change::half_done(&facts::changed(&facts)) {
            return Err(Failure::new(Kind::Undone, format!("{name} was not opened: {left}"))
                .hint(format!("the same command finishes or undoes it; `up {name} --force` opens it as it is")));
        }
        if !others_up.is_empty() && before.as_ref().is_some_and(|state| !state.is_up()) {
            // Replication that has just been interrupted (a server restarted, a link came back) gets a moment to come back.
            let limits = Limits::new(if dry_run { Duration::ZERO } else { PATIENCE }, &context.signals);
            loop {
                let broken: Vec<String> = facts::directions(&context.config, &facts)
                    .into_iter()
                    .filter(|d| {
                        (d.from == name && others_up.contains(&d.to)) || (d.to == name && others_up.contains(&d.from))
                    })
                    .filter_map(|d| d.trouble)
                    .collect();
                if broken.is_empty() {
                    break;
                }
                if limits.run(tokio::time::sleep(Duration::from_millis(100))).await.is_err() {
                    return Err(Failure::new(
                        Kind::Undone,
                        format!("{} is writable and replication does not flow: {name} was not opened", others_up.join(", ")),
                    )
                    .detail(broken.join("\n"))
                    .hint("mend replication first: two writable nodes that do not replicate drift apart; --force does it anyhow"));
                }
                for other in crew.names() {
                    facts.insert(
                        other.clone(),
                        facts::gather(crew.session(&other)?, &context.config, LOOK_BOUND).await?,
                    );
                }
            }
        }
    }

    // A node without any peer has nobody to be the only one among.
    let sole = others_up.is_empty() && context.config.nodes.len() > 1;
    let mut notes: Vec<String> = Vec::new();
    if let Some(behind) = behind(context, &facts, name) {
        notes.push(format!("note: {behind}"));
    }
    if !errors.is_empty() {
        let missing: Vec<&str> = errors.keys().map(String::as_str).collect();
        notes.push(format!(
            "forced: {0} could not be asked. What it had not sent yet will arrive when it returns, and may conflict. Unless it \
             was the only writable node, it returns writable: check `status` before its network is back",
            missing.join(", ")
        ));
    }
    let changed = before.as_ref().is_none_or(|state| !state.is_up() || state.sole != sole);
    let what = if sole { " as the only writable node" } else { "" };
    let with = if others_up.is_empty() { String::new() } else { format!(", together with {}", others_up.join(", ")) };
    if dry_run {
        let text = format!("would open {name}{what}{with}\n{}", notes.join("\n"));
        return Ok(Reply::done(
            text,
            json!({"command": "up", "outcome": "dry_run", "node": name, "sole": sole, "others_up": others_up}),
        ));
    }
    if let Some(signal) = context.signals.received() {
        return Err(Failure::new(Kind::Undone, format!("stopped by {signal}; nothing was changed")));
    }

    if let Err(error) = open(&mut crew, name, sole).await {
        let refused = error.trouble == Trouble::Refused;
        match crew.learn(name, Duration::from_secs(10)).await {
            Ok(state) if state.is_up() && !refused => {}
            Ok(_) => {
                let mut failure = Failure::from(error);
                failure.kind = Kind::Undone;
                failure.message = format!("{}; it is as it was before", failure.message);
                return Err(failure);
            }
            Err(_) => {
                return Err(Failure::new(Kind::NeedsPerson, format!("{error}; whether {name} is open is not known"))
                    .hint(format!("when it can be reached: `status`, and `up {name}` again if it is down")));
            }
        }
    }
    for other in &others_up {
        // None of several is the only one; opening what is open changes nothing but that mark.
        if let Err(error) = open(&mut crew, other, false).await {
            return Err(Failure::new(
                Kind::NeedsPerson,
                format!("{name} is open, but {other} may still be marked as the only writable node: {error}"),
            )
            .hint(format!("run `up {name}` again; until then {other} refuses writes after a restart")));
        }
    }
    let state: Value = match facts::state(crew.session(name)?, LOOK_BOUND).await {
        Ok(state) => json!(state),
        Err(_) => Value::Null,
    };
    let mut text = if before.is_some_and(|state| state.is_up()) {
        format!("{name} is up already{with}{}", if changed && sole { "; marked as the only writable node" } else { "" })
    } else {
        format!("{name} is up{what}{with}")
    };
    for note in notes {
        text.push('\n');
        text.push_str(&note);
    }
    let json = json!({"command": "up", "outcome": "done", "node": node.name, "changed": changed, "sole": sole,
        "others_up": others_up, "forced_past": errors.keys().collect::<Vec<_>>(), "state": state});
    Ok(Reply::done(text, json))
}

/// What the node is known not to have yet.
fn behind(context: &Context, facts: &std::collections::BTreeMap<String, Facts>, name: &str) -> Option<String> {
    let behind: Vec<String> = facts::directions(&context.config, facts)
        .into_iter()
        .filter(|d| d.to == name)
        .filter_map(|d| match (d.bytes_behind, d.trouble) {
            (_, Some(trouble)) if facts.contains_key(&d.from) => Some(trouble),
            (Some(bytes), None) if bytes > 0 => {
                Some(format!("{bytes} bytes of WAL of {} are still to be applied", d.from))
            }
            _ => None,
        })
        .collect();
    (!behind.is_empty()).then(|| behind.join("; "))
}
