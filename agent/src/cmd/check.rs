//! `check`: everything that must be true of the nodes, with what was found, what is needed, and what mends it.
//!
//! Asks all nodes at once and prints what `crate::check` makes of it. Deliberately changes nothing and takes no lock.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use futures_util::future::{join, join_all};
use serde_json::json;

use super::admin::Admin;
use super::{Context, Reply};
use crate::check::{self, Finding, Place, Seen, Verdict};
use crate::cli;
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
    /// They were asked by a superuser, and not by the agent.
    pub as_admin: bool,
}

impl Looked {
    /// What is to be said of it: first of the nodes that could not be asked.
    pub fn findings(&self, context: &Context) -> Vec<Finding> {
        let unreachable = self.errors.iter().map(|(node, error)| {
            let hint = error.hint.as_deref().unwrap_or("a server that answers").to_owned();
            let before = "; before init has made the agent's role: look as a superuser, with --admin or --via";
            let more = if error.answered && !self.as_admin { before } else { "" };
            check::unreachable(node, &error.message, &(hint + more))
        });
        let seen = Seen { config: &context.config, surveys: &self.surveys, places: &self.places };
        unreachable.chain(check::findings(&seen)).collect()
    }
}

/// Runs it.
pub async fn run(context: &Context, options: &cli::Check) -> Result<Reply, Failure> {
    let admin = if options.admin.is_given() { Some(Admin::new(context, &options.admin)?) } else { None };
    let (looked, certificates) = join(look(context, admin.as_ref()), inspect::findings(context)).await;
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
    Ok(Reply { text: text(context, &findings, options.verbose), json, kind })
}

/// Asks all nodes, all at once.
async fn look(context: &Context, admin: Option<&Admin>) -> Looked {
    let nodes = &context.config.nodes;
    let results = join_all(nodes.iter().map(|node| join(ask(context, admin, node), places(node)))).await;
    let as_admin = admin.is_some();
    let mut looked = Looked { surveys: BTreeMap::new(), errors: BTreeMap::new(), places: BTreeMap::new(), as_admin };
    for (node, (survey, places)) in nodes.iter().zip(results) {
        match survey {
            Ok(survey) => drop(looked.surveys.insert(node.name.clone(), survey)),
            Err(error) => drop(looked.errors.insert(node.name.clone(), error)),
        }
        looked.places.insert(node.name.clone(), places);
    }
    looked
}

async fn ask(context: &Context, admin: Option<&Admin>, node: &Node) -> Result<Survey, NodeError> {
    let take = async |session: &Session| survey::take(session, &context.config, node, LOOK_BOUND).await;
    match admin {
        None => context.visit(node, NODE_BOUND, take).await,
        Some(admin) => admin.visit(node, NODE_BOUND, take).await,
    }
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
    let _ = writeln!(text, "  {style}{:<7}{style:#}  {}", finding.verdict.word(), finding.title());
    if finding.verdict > Verdict::Ok {
        for line in finding.mending() {
            let _ = writeln!(text, "           {line}");
        }
    }
}
