//! `status`: every node, replication in each direction, who is connected, and whether a hop could begin.
//!
//! Deliberately takes no lock and changes nothing; a node that cannot be reached is a line, not an end.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use comfy_table::{Cell, Color};
use futures_util::future::{join, join_all};
use serde_json::{Value, json};

use super::{Context, Reply, print, render, table};
use crate::change;
use crate::config::{Config, Node};
use crate::crew::LOOK_BOUND;
use crate::facts::{self, Direction, Facts, Verdict};
use crate::failure::{Failure, Kind};
use crate::inspect::{self, Level};
use crate::node::{NodeError, Session};
use crate::schema;

/// How long everything about one node may take.
const NODE_BOUND: Duration = Duration::from_secs(8);

/// Runs it, once or until a signal comes.
pub async fn run(context: &Context, watch: Option<f64>) -> Result<Reply, Failure> {
    let mut certificates = None;
    let Some(seconds) = watch else { return Ok(once(context, &mut certificates).await) };
    loop {
        let reply = tokio::select! {
            reply = once(context, &mut certificates) => reply,
            _ = context.signals.wait() => break,
        };
        if context.json {
            print(&reply.json.to_string());
        } else {
            let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
            print(&format!("{clear}{}", reply.text));
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs_f64(seconds)) => {}
            _ = context.signals.wait() => break,
        }
    }
    // What is to be said has been said.
    Ok(Reply::done("", Value::Null))
}

/// What a node tells, and the fingerprint of its schema.
async fn look(context: &Context, node: &Node) -> Result<(Facts, Option<String>), NodeError> {
    let gather = async |session: &Session| {
        let facts = facts::gather(session, &context.config, LOOK_BOUND).await?;
        Ok((facts, schema::fingerprint(session, LOOK_BOUND).await?))
    };
    context.visit(node, NODE_BOUND, gather).await
}

/// Certificates, and when they were looked at: that takes more than all the rest, and they change less.
type Certificates = Option<(Instant, Vec<inspect::Finding>)>;

async fn once(context: &Context, certificates: &mut Certificates) -> Reply {
    let config = &context.config;
    let looks = join_all(config.nodes.iter().map(|node| look(context, node)));
    let known = certificates.take().filter(|(at, _)| at.elapsed() < config.watch.certificates);
    let inspection = async {
        match known {
            Some(known) => known,
            None => (Instant::now(), inspect::findings(context).await),
        }
    };
    let (results, inspected) = join(looks, inspection).await;
    let bad: Vec<&inspect::Finding> = inspected.1.iter().filter(|finding| finding.level >= Level::Warning).collect();
    let (mut facts, mut schemas, mut errors) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (node, result) in config.nodes.iter().zip(results) {
        match result {
            Ok((found, fingerprint)) => {
                facts.insert(node.name.clone(), found);
                schemas.extend(fingerprint.map(|fingerprint| (node.name.clone(), fingerprint)));
            }
            Err(error) => drop(errors.insert(node.name.clone(), error)),
        }
    }
    let missing: Vec<String> = errors.keys().cloned().collect();
    let verdict = facts::verdict(config, &facts, &missing);
    let directions = facts::directions(config, &facts);
    let kind = (!errors.is_empty()).then_some(Kind::Unreachable);
    let text = text(context, &facts, &schemas, &errors, &directions, &bad, &verdict);
    let nodes: Vec<Value> = config
        .nodes
        .iter()
        .map(|node| match (facts.get(&node.name), errors.get(&node.name)) {
            (Some(facts), _) => {
                let mut value = json!(facts);
                value["name"] = json!(node.name);
                value["reachable"] = json!(true);
                value["schema"] = json!(schemas.get(&node.name));
                value["is_active"] = json!(facts.active.as_ref() == Some(&node.active_name));
                value
            }
            (None, error) => json!({"name": node.name, "reachable": false,
                "error": error.map(ToString::to_string), "hint": error.and_then(|e| e.hint.clone())}),
        })
        .collect();
    let hop = facts.values().filter_map(|f| f.state.as_ref()).find_map(|state| state.hop.clone());
    let json = json!({"command": "status", "nodes": nodes, "replication": directions, "unfinished_hop": hop,
        "unfinished_schema_changes": change::left(&facts::changed(&facts)),
        "certificates": bad, "schemas_alike": unlike(config, &schemas).is_empty(), "verdict": verdict});
    *certificates = Some(inspected);
    Reply { text, json, kind }
}

/// Fingerprints of schemas, by node.
type Schemas = BTreeMap<String, String>;

/// The nodes whose schema is not that of the first one that tells.
fn unlike<'a>(config: &'a Config, schemas: &'a Schemas) -> Vec<&'a str> {
    let told = config.nodes.iter().filter_map(|node| Some((node.name.as_str(), schemas.get(&node.name)?.as_str())));
    schema::unlike(told)
}

fn text(
    context: &Context,
    facts: &BTreeMap<String, Facts>,
    schemas: &Schemas,
    errors: &BTreeMap<String, NodeError>,
    directions: &[Direction],
    certificates: &[&inspect::Finding],
    verdict: &Verdict,
) -> String {
    let mut nodes = table(&["node", "state", "since", "by", "why", "writers", "active side", "schema"]);
    for node in &context.config.nodes {
        let Some(found) = facts.get(&node.name) else {
            let error = errors.get(&node.name).map_or_else(String::new, |error| error.message.clone());
            nodes.add_row(vec![
                Cell::new(&node.name),
                Cell::new("unreachable").fg(Color::Red),
                Cell::new("-"),
                Cell::new("-"),
                Cell::new(error),
            ]);
            continue;
        };
        let active = match (&found.active, &found.active_flaw) {
            (Some(active), _) if *active == node.active_name => format!("{active} (this node)"),
            (Some(active), _) => active.clone(),
            (None, Some(_)) => "?".into(),
            (None, None) => "-".into(),
        };
        // Enough to see whether two are the same.
        let schema = schemas.get(&node.name).and_then(|fingerprint| fingerprint.get(..8)).unwrap_or("-");
        let dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
        match &found.state {
            Some(state) => {
                let window = state.window.as_ref();
                let (word, colour) = match (state.is_up(), state.sole, state.rejoin) {
                    (true, true, _) => ("up, only writable node", Color::Green),
                    (true, false, _) => ("up", Color::Green),
                    (false, _, true) => ("down, was the only writable node and restarted", Color::Yellow),
                    (false, _, false) => ("down", Color::Yellow),
                };
                let word = window.map_or_else(
                    || word.to_owned(),
                    |window| format!("maintenance: {} may write until {}", window.role, window.until),
                );
                nodes.add_row(vec![
                    Cell::new(&node.name),
                    Cell::new(word).fg(colour),
                    Cell::new(dash(&state.since)),
                    Cell::new(dash(&state.by)),
                    Cell::new(dash(&state.reason)),
                    Cell::new(state.writers.map_or_else(|| "-".into(), |n| n.to_string())),
                    Cell::new(active),
                    Cell::new(schema),
                ]);
            }
            None => {
                nodes.add_row(vec![
                    Cell::new(&node.name),
                    Cell::new("no extension").fg(Color::Red),
                    Cell::new("-"),
                    Cell::new("-"),
                    Cell::new(found.extension.flaw().unwrap_or_default()),
                    Cell::new("-"),
                    Cell::new(active),
                    Cell::new(schema),
                ]);
            }
        }
    }

    let mut replication = table(&["replication", "state", "behind", "delay", "last heard"]);
    for direction in directions {
        let (word, colour) = match &direction.trouble {
            None => ("connected".to_owned(), Color::Green),
            Some(trouble) => (trouble.clone(), Color::Red),
        };
        let seconds =
            |value: Option<f64>, after: &str| value.map_or_else(|| "-".into(), |s| format!("{s:.1} s{after}"));
        replication.add_row(vec![
            Cell::new(format!("{} -> {}", direction.from, direction.to)),
            Cell::new(word).fg(colour),
            Cell::new(direction.bytes_behind.map_or_else(|| "-".into(), |bytes| format!("{bytes} B"))),
            Cell::new(seconds(direction.seconds_behind, "")),
            Cell::new(seconds(direction.last_message_age, " ago")),
        ]);
    }

    let mut sessions = table(&["sessions on", "application", "client", "user", "state", "number"]);
    for (name, found) in facts {
        for session in &found.sessions {
            let application = if session.application_name.is_empty() { "-" } else { &session.application_name };
            sessions.add_row(vec![
                name.as_str(),
                application,
                &session.client,
                &session.user,
                &session.state,
                &session.sessions.to_string(),
            ]);
        }
    }

    let mut text = render(&nodes);
    if !directions.is_empty() {
        text.push('\n');
        text.push_str(&render(&replication));
    }
    if sessions.row_count() > 0 {
        text.push('\n');
        text.push_str(&render(&sessions));
    }
    let unlike = unlike(&context.config, schemas);
    if !unlike.is_empty() {
        let _ = write!(text, "\nthe schemas differ, see schema diff: {}\n", unlike.join(", "));
    }
    for finding in certificates {
        let _ = write!(text, "\n{} {}: {}\n", finding.subject(), finding.level.word(), finding.text);
    }
    for (name, note) in facts.iter().filter_map(|(n, f)| f.state.as_ref().and_then(|s| s.note()).map(|note| (n, note)))
    {
        let _ = write!(
            text,
            "\nunfinished hop {} -> {}{}, begun {} by {}\n",
            name,
            note.to,
            if note.both { " (--both)" } else { "" },
            note.started,
            note.by
        );
    }
    for left in change::left(&facts::changed(facts)) {
        let _ = write!(text, "\n{left}\n");
    }
    let colour = if verdict.ready { anstyle::AnsiColor::Green } else { anstyle::AnsiColor::Yellow };
    let style = anstyle::Style::new().bold().fg_color(Some(colour.into()));
    let word = if verdict.ready { "" } else { "not ready to hop: " };
    let _ = write!(text, "\n{style}{word}{}{style:#}", verdict.text);
    text
}
