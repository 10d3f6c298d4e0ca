//! `check`: everything that must be true of the nodes, with what was found, what is needed, and what mends it.
//!
//! Asks all nodes at once and prints what `crate::check` makes of it. Deliberately changes nothing and takes no lock.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use futures_util::future::{join, join_all};
use serde_json::json;

use super::{Context, Reply};
use crate::check::{self, Finding, Place, Remedy, Seen, Verdict};
use crate::config::Node;
use crate::crew::LOOK_BOUND;
use crate::failure::{Failure, Kind};
use crate::inspect;
use crate::node::{NodeError, Session, try_each};
use crate::survey::{self, Survey};

/// How long everything about one node may take.
const NODE_BOUND: Duration = Duration::from_secs(20);

/// All nodes, as far as they can be asked.
pub struct Looked {
    /// What they told, by name.
    pub surveys: BTreeMap<String, Survey>,
    /// Why one told nothing, by name.
    pub errors: BTreeMap<String, NodeError>,
    /// Where they are, by name.
    pub places: BTreeMap<String, Vec<Place>>,
}

impl Looked {
    /// What is to be said of it: first of the nodes that could not be asked.
    pub fn findings(&self, context: &Context) -> Vec<Finding> {
        let unreachable = self.errors.iter().map(|(node, error)| {
            let hint = error.hint.as_deref().unwrap_or("a server that answers");
            check::unreachable(node, &error.message, hint)
        });
        let seen = Seen { config: &context.config, surveys: &self.surveys, places: &self.places };
        unreachable.chain(check::findings(&seen)).collect()
    }
}

/// Runs it.
pub async fn run(context: &Context, verbose: bool) -> Result<Reply, Failure> {
    let (looked, certificates) = join(look(context), inspect::findings(context)).await;
    let mut findings = looked.findings(context);
    // Why one could not be looked at is told of its node or subscription already.
    let known = certificates.iter().filter(|certificate| certificate.level != inspect::Level::Unknown);
    findings.extend(known.map(check::certificate));
    let worst = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    let kind = match worst {
        _ if !looked.errors.is_empty() => Some(Kind::Unreachable),
        Verdict::Error => Some(Kind::Undone),
        _ => None,
    };
    let json = json!({"command": "check", "worst": worst, "findings": findings});
    Ok(Reply { text: text(context, &findings, verbose), json, kind })
}

/// Asks all nodes, all at once.
pub async fn look(context: &Context) -> Looked {
    let nodes = &context.config.nodes;
    let results = join_all(nodes.iter().map(|node| join(ask(context, node), places(node)))).await;
    let mut looked = Looked { surveys: BTreeMap::new(), errors: BTreeMap::new(), places: BTreeMap::new() };
    for (node, (survey, places)) in nodes.iter().zip(results) {
        match survey {
            Ok(survey) => drop(looked.surveys.insert(node.name.clone(), survey)),
            Err(error) => drop(looked.errors.insert(node.name.clone(), error)),
        }
        looked.places.insert(node.name.clone(), places);
    }
    looked
}

async fn ask(context: &Context, node: &Node) -> Result<Survey, NodeError> {
    let take = async |session: &Session| survey::take(session, &context.config, node, LOOK_BOUND).await;
    context.visit(node, NODE_BOUND, take).await
}

/// The addresses of a node, for the agent and for its peers' subscriptions.
pub(super) async fn places(node: &Node) -> Vec<Place> {
    let replication = &node.replication;
    let host = replication.host.as_deref().unwrap_or(&node.host);
    let wanted = [(node.host.as_str(), node.port, false), (host, replication.port.unwrap_or(node.port), true)];
    let tried =
        wanted.into_iter().filter(|(host, ..)| !host.starts_with('/')).map(async |(host, port, for_subscriptions)| {
            Place { host: host.to_owned(), port, for_subscriptions, answers: try_each(host, port).await }
        });
    join_all(tried).await
}

fn text(context: &Context, findings: &[Finding], verbose: bool) -> String {
    let mut text = String::new();
    for node in &context.config.nodes {
        let own = || findings.iter().filter(|finding| finding.node == node.name);
        let count = |verdict| own().filter(|finding| finding.verdict == verdict).count();
        let counts: Vec<String> = [Verdict::Error, Verdict::Warning, Verdict::Unknown, Verdict::Ok]
            .into_iter()
            .filter(|verdict| count(*verdict) > 0)
            .map(|verdict| format!("{} {}", count(verdict), verdict.word()))
            .collect();
        let bold = Style::new().bold();
        let _ = writeln!(text, "{bold}{}{bold:#}: {}", node.name, counts.join(", "));
        let mut shown: Vec<&Finding> = own().filter(|finding| verbose || finding.verdict > Verdict::Ok).collect();
        shown.sort_by_key(|finding| std::cmp::Reverse(finding.verdict));
        for finding in shown {
            line(&mut text, finding);
        }
    }
    text
}

fn line(text: &mut String, finding: &Finding) {
    let colour = match finding.verdict {
        Verdict::Ok => AnsiColor::Green,
        Verdict::Unknown | Verdict::Warning => AnsiColor::Yellow,
        Verdict::Error => AnsiColor::Red,
    };
    let style = Style::new().fg_color(Some(colour.into()));
    let mut subject = finding.subject.to_owned();
    for more in [&finding.about, &finding.peer].into_iter().flatten() {
        let _ = write!(subject, " {more}");
    }
    let word = finding.verdict.word();
    let _ = writeln!(text, "  {style}{word:<7}{style:#}  {subject}: {}", finding.found);
    if finding.verdict == Verdict::Ok {
        return;
    }
    let _ = writeln!(text, "           needed: {}", finding.needed);
    for remedy in &finding.remedy {
        let (node, what) = match remedy {
            Remedy::Sql { node, statement } => (node, format!("{statement};")),
            Remedy::File { node, path, line, instead_of, before } => {
                let place = match (instead_of, before) {
                    (Some(number), _) => format!("instead of line {number}"),
                    (None, Some(number)) => format!("before line {number}"),
                    (None, None) => "at the end".to_owned(),
                };
                (node, format!("{path}, {place}: {line}"))
            }
            Remedy::Shell { node, command } => (node, format!("$ {command}")),
            Remedy::Restart { node } => (node, "restart the server".to_owned()),
        };
        let elsewhere = if *node == finding.node { String::new() } else { format!("on {node}: ") };
        let _ = writeln!(text, "           mend:   {elsewhere}{what}");
    }
}
