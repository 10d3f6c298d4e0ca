//! How all certificates in use stand: as files of this host, as served by every node, as presented by every subscription.
//!
//! [`findings`] asks; [`judge`] is pure. Deliberately reads nothing that its user may not: what a file says that belongs to
//! another user is known from the note of its deployment.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use futures_util::future::{join, join_all};
use serde::Serialize;
use tokio::time::timeout;

use crate::certs::{self, ALARM_DAYS, Chain, Facts, Pair, Term};
use crate::cmd::Context;
use crate::cmd::watch::own_node;
use crate::condition::{self, Condition, Subject};
use crate::config::{Certificate, Config, Node, TlsMode, Use};
use crate::crew::{CONNECT_BOUND, LOOK_BOUND};
use crate::node::{Handshake, NodeError, Session};
use crate::renewal::{self, Note, Outcome};
use crate::sql;

/// How long asking the nodes may take, once there are sessions.
const ASK_BOUND: Duration = Duration::from_secs(3);

/// How something stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing to do.
    Well,
    /// It cannot be seen from here.
    Unknown,
    /// Somebody should look.
    Warning,
    /// Something fails, or soon will.
    Error,
}

impl Level {
    /// For people.
    pub fn word(self) -> &'static str {
        match self {
            Self::Well => "well",
            Self::Unknown => "not known",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One certificate in one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The node that it belongs to.
    pub node: String,
    /// Which one: the same at every look.
    pub what: String,
    /// How it stands.
    pub level: Level,
    /// Why; empty if it is well.
    pub text: String,
    /// What it says, if that is known.
    pub certificate: Option<Facts>,
}

impl Finding {
    /// For the watchdog: what it is the matter with.
    pub fn subject(&self) -> Subject {
        Subject::Certificate { node: self.node.clone(), certificate: self.what.clone() }
    }
}

/// What of it is the watchdog's business: errors, and what is neither known to be well nor to be one. Warnings can wait for
/// somebody to look.
pub fn troubles(findings: &[Finding]) -> (Vec<condition::Finding>, Vec<Subject>) {
    let mut told = BTreeSet::new();
    let errors = findings
        .iter()
        .filter(|finding| finding.level == Level::Error)
        // One certificate may be in several places; what is the matter with it is said once.
        .filter(|finding| match &finding.certificate {
            Some(facts) => told.insert((&finding.node, &facts.serial, &finding.text)),
            None => true,
        })
        .map(|finding| condition::Finding {
            subject: finding.subject(),
            condition: Condition::Certificate { trouble: finding.text.clone() },
            age: Duration::ZERO,
        });
    let unknown = findings.iter().filter(|finding| finding.level == Level::Unknown);
    (errors.collect(), unknown.map(Finding::subject).collect())
}

/// What has been seen of one node.
#[derive(Default)]
pub struct Sight {
    /// What its server presents; none if it is not running. An error if it cannot be asked.
    served: Option<Result<Chain, String>>,
    /// What its subscriptions have presented, by the publisher's name; none if they were not asked.
    presented: BTreeMap<String, Option<String>>,
}

/// What has been seen of one place of the configuration.
pub struct File<'a> {
    entry: &'a Certificate,
    /// The node whose host this is.
    node: Option<&'a str>,
    /// What is there: none if it may not be read; an error if it is no pair.
    chain: Option<Result<Chain, String>>,
}

/// Looks at everything. Takes as long as the slowest node, within bounds.
pub async fn findings(context: &Context) -> Vec<Finding> {
    let config = &context.config;
    let connector = &context.connector;
    let looks = config.nodes.iter().map(|node| join(served(context, node), connector.connect(node, CONNECT_BOUND)));
    let (served, sessions): (Vec<_>, Vec<_>) = join_all(looks).await.into_iter().unzip();
    let sessions: BTreeMap<&str, Session> = config
        .nodes
        .iter()
        .zip(sessions)
        .filter_map(|(node, session)| Some((node.name.as_str(), session.ok()?)))
        .collect();
    let presented = join_all(config.nodes.iter().map(|node| async {
        let presented = timeout(ASK_BOUND, presented(config, node, &sessions)).await;
        presented.unwrap_or_else(|_| Ok(BTreeMap::new())).unwrap_or_else(|error| {
            tracing::debug!(%error, "what subscriptions presented is not known");
            BTreeMap::new()
        })
    }));
    let sights: BTreeMap<&str, Sight> = config
        .nodes
        .iter()
        .zip(served.into_iter().zip(presented.await))
        .map(|(node, (served, presented))| (node.name.as_str(), Sight { served, presented }))
        .collect();
    let own = own_node(config).map(|node| node.name.as_str());
    let notes = notes(config);
    // Of a configuration that hosts share, only what is this one's.
    let here = |entry: &Certificate| match (&entry.node, own) {
        (Some(node), Some(own)) => node == own,
        (None, _) => true,
        (Some(_), None) => notes.iter().any(|note| note.lineage == entry.lineage),
    };
    let files: Vec<File<'_>> = config
        .certificates
        .iter()
        .filter(|entry| here(entry))
        .map(|entry| File { entry, node: entry.node.as_deref().or(own), chain: read(entry) })
        .collect();
    let root = config.tls.root.as_deref().and_then(|path| std::fs::read(path).ok());
    judge(config, &sights, &files, &notes, root.as_deref(), now())
}

/// The notes of this host's deployments, but for one that is under way.
fn notes(config: &Config) -> Vec<Note> {
    let lineages: BTreeSet<&str> = config.certificates.iter().map(|entry| entry.lineage.as_str()).collect();
    let under_way = renewal::is_under_way(&config.state);
    let notes = lineages.into_iter().filter_map(|lineage| renewal::read(&config.state, lineage));
    notes.filter(|note| !(under_way && note.outcome == Outcome::Unfinished)).collect()
}

/// What a node's server presents; none if it is not running.
async fn served(context: &Context, node: &Node) -> Option<Result<Chain, String>> {
    let config = &context.config;
    if config.tls.mode == TlsMode::Disable && config.replication.mode == TlsMode::Disable {
        return None;
    }
    match context.connector.handshake(node, CONNECT_BOUND).await {
        Ok(Handshake::Served(chain)) => Some(Ok(chain)),
        Ok(Handshake::NotRunning) => None,
        Err(error) => Some(Err(error.message)),
    }
}

/// What the publishers of a node's subscriptions say that these have presented, as far as there is a session on both.
async fn presented(
    config: &Config,
    node: &Node,
    sessions: &BTreeMap<&str, Session>,
) -> Result<BTreeMap<String, Option<String>>, NodeError> {
    let mut presented = BTreeMap::new();
    let Some(session) = sessions.get(node.name.as_str()) else { return Ok(presented) };
    for source in config.peers(&node.name) {
        let subscription = config.subscription_to(&source.name);
        let rows = session.rows(sql::CERT_WORKER, &[&subscription], LOOK_BOUND).await?;
        let Some(slot) = rows.first().and_then(|row| row.get::<_, Option<String>>("slot")) else { continue };
        let Some(peer) = sessions.get(source.name.as_str()) else { continue };
        let rows = peer.rows(sql::CERT_SENDER, &[&slot], LOOK_BOUND).await?;
        if let Some(row) = rows.first() {
            let serial = row.get::<_, Option<String>>("serial").and_then(|text| certs::serial_of_decimal(&text));
            presented.insert(source.name.clone(), serial);
        }
    }
    Ok(presented)
}

fn read(entry: &Certificate) -> Option<Result<Chain, String>> {
    let file = |path: &Path| match std::fs::read(path) {
        Ok(content) => Some(Ok(content)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
        Err(error) => Some(Err(format!("cannot read {}: {error}", path.display()))),
    };
    let cert = match file(&entry.cert)? {
        Ok(cert) => cert,
        Err(error) => return Some(Err(error)),
    };
    Some(match file(&entry.key) {
        None => Chain::read(&cert),
        Some(Ok(key)) => Pair::read(cert, key).map(|pair| pair.chain),
        Some(Err(error)) => Err(error),
    })
}

/// Says how everything stands that has been seen.
pub fn judge(
    config: &Config,
    sights: &BTreeMap<&str, Sight>,
    files: &[File<'_>],
    notes: &[Note],
    root: Option<&[u8]>,
    now: i64,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for node in &config.nodes {
        let Some(sight) = sights.get(node.name.as_str()) else { continue };
        findings.extend(of_server(config, node, sight, files, root, now));
        for source in config.peers(&node.name) {
            let serial = sight.presented.get(&source.name).map(Option::as_deref);
            findings.push(client(node, &source.name, serial, sight, files, now));
        }
    }
    for file in files {
        let note = notes.iter().find(|note| note.lineage == file.entry.lineage);
        let served = file.node.and_then(|node| sights.get(node)).and_then(|sight| sight.served.as_ref());
        findings.push(on_disk(file, note, served.and_then(|served| served.as_ref().ok()), root, now));
    }
    for note in notes {
        let (level, how) = match &note.outcome {
            Outcome::Deployed => continue,
            Outcome::Unproven { why } => (Level::Warning, format!("is not proven: {why}")),
            Outcome::Unfinished => (Level::Error, "failed: it was cut off; run it again".to_owned()),
            Outcome::Failed { why } => (Level::Error, format!("failed: {why}")),
        };
        let mut nodes = files.iter().filter(|file| file.entry.lineage == note.lineage).filter_map(|file| file.node);
        let when = if note.began > 0 { format!(" of {}", certs::date(note.began)) } else { String::new() };
        findings.push(Finding {
            node: nodes.next().unwrap_or_default().to_owned(),
            what: format!("deployment of {}", note.lineage),
            level,
            text: format!("certificate deployment{when} {how}"),
            certificate: None,
        });
    }
    findings
}

/// What a server presents, and the root that this leads to.
fn of_server(
    config: &Config,
    node: &Node,
    sight: &Sight,
    files: &[File<'_>],
    root: Option<&[u8]>,
    now: i64,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let finding = |what: &str, (level, text): (Level, String), certificate: Option<Facts>| Finding {
        node: node.name.clone(),
        what: what.to_owned(),
        level,
        text,
        certificate,
    };
    let chain = match &sight.served {
        None => return vec![finding("server", (Level::Unknown, "not running".into()), None)],
        Some(Err(error)) => return vec![finding("server", (Level::Unknown, error.clone()), None)],
        Some(Ok(chain)) => chain,
    };
    let facts = chain.facts();
    let mut stand = vec![lasts(&facts, now)];
    let entries = config.certificates.iter().map(|entry| (entry.node.as_deref(), entry));
    let own = entries.chain(files.iter().map(|file| (file.node, file.entry)));
    let configured = own.filter(|(of, entry)| *of == Some(&node.name) && entry.uses.contains(&Use::Server));
    let wanted = configured.filter_map(|(_, entry)| entry.names.clone()).next();
    let wanted = wanted.unwrap_or_else(|| certs::names_of(config, node));
    let missing = certs::uncovered(&facts.names, &wanted);
    if !missing.is_empty() {
        stand.push((Level::Error, format!("not issued for {}", missing.join(", "))));
    }
    let anchor = root.map(|root| chain.anchor(root, Some(Use::Server), true));
    match &anchor {
        Some(Err(error)) => stand.push((Level::Error, unverified(&facts, error))),
        Some(Ok(anchor)) => {
            if let Some(root) = Chain::of(vec![anchor.clone()]) {
                let mut facts = root.facts();
                let name = certs::name_text(anchor.subject_name());
                facts.names = vec![name.clone()];
                findings.push(finding(&format!("root {name}"), lasts(&facts, now), Some(facts)));
            }
        }
        None => {}
    }
    findings.push(finding("server", all(stand), Some(facts)));
    findings
}

fn unverified(facts: &Facts, error: &str) -> String {
    format!("signed by {}, which the root does not verify: {error}", facts.issuer)
}

/// What a subscription has connected with. Servers tell its serial number only; how long it lasts is known where the same
/// certificate is seen elsewhere.
fn client(
    node: &Node,
    source: &str,
    presented: Option<Option<&str>>,
    sight: &Sight,
    files: &[File<'_>],
    now: i64,
) -> Finding {
    let what = format!("subscription from {source}");
    let Some(serial) = presented else {
        let text = format!("not connected, or {source} cannot be asked");
        return Finding { node: node.name.clone(), what, level: Level::Unknown, text, certificate: None };
    };
    let own = |file: &&File<'_>| file.node == Some(&node.name) && file.entry.uses.contains(&Use::Replication);
    let on_disk = files.iter().find(own).and_then(|file| file.chain.as_ref()?.as_ref().ok());
    let served = sight.served.as_ref().and_then(|served| served.as_ref().ok());
    let same = |chain: &&Chain| Some(chain.facts().serial.as_str()) == serial;
    let seen = [on_disk, served].into_iter().flatten().find(same);
    let file = on_disk.map(|chain| chain.facts().serial);
    let (level, text) = match (serial, file, seen) {
        (None, ..) => (Level::Well, format!("{source} asks for no certificate")),
        (Some(serial), Some(file), _) if file != serial => {
            (Level::Error, format!("reload pending: connected with serial {serial}, the file has {file}"))
        }
        (Some(_), _, Some(chain)) => all([vec![lasts(&chain.facts(), now)], for_clients(chain)].concat()),
        (Some(serial), ..) => (Level::Unknown, format!("serial {serial}; until when cannot be seen from here")),
    };
    Finding { node: node.name.clone(), what, level, text, certificate: seen.map(Chain::facts) }
}

/// What keeps a certificate from being a client's, or will at its next renewal.
fn for_clients(chain: &Chain) -> Vec<(Level, String)> {
    let mut stand = Vec::new();
    if !chain.is_for_clients() {
        stand.push((Level::Error, "not issued for clients: see docs/certificates.md".into()));
    } else if chain.is_public() {
        let text =
            "public authorities no longer issue for clients, so it will not be renewed: see docs/certificates.md";
        stand.push((Level::Warning, text.into()));
    }
    if chain.common_name().is_none() {
        stand.push((Level::Warning, "no common name, so `cert` authentication has no role for it".into()));
    }
    stand
}

fn on_disk(file: &File<'_>, note: Option<&Note>, served: Option<&Chain>, root: Option<&[u8]>, now: i64) -> Finding {
    let finding = |(level, text): (Level, String), certificate: Option<Facts>| Finding {
        node: file.node.unwrap_or_default().to_owned(),
        what: format!("file {}", file.entry.cert.display()),
        level,
        text,
        certificate,
    };
    let facts = match (&file.chain, note) {
        (Some(Err(error)), _) => return finding((Level::Error, error.clone()), None),
        (Some(Ok(chain)), _) => chain.facts(),
        (None, Some(Note { certificate: Some(facts), .. })) => facts.clone(),
        (None, _) => {
            let text = "it may not be read by this user, and has not been deployed yet".into();
            return finding((Level::Unknown, text), None);
        }
    };
    let mut stand = vec![lasts(&facts, now)];
    // One that may not be read by this user is known by what is served, if that is the same.
    let seen = match &file.chain {
        Some(Ok(chain)) => Some(chain),
        _ => served.filter(|served| served.facts().serial == facts.serial),
    };
    if let Some(chain) = seen.filter(|_| file.entry.uses.iter().any(|purpose| purpose.is_client())) {
        stand.extend(for_clients(chain));
    }
    if let (Some(Ok(chain)), Some(root)) = (&file.chain, root.filter(|_| file.entry.root.is_none()))
        && let Err(error) = chain.anchor(root, None, true)
    {
        stand.push((Level::Error, unverified(&facts, &error)));
    }
    if let Some(served) = served.map(Chain::facts).filter(|_| file.entry.uses.contains(&Use::Server))
        && served.serial != facts.serial
    {
        let newer = facts.not_before > served.not_before;
        let why = if newer { "reload pending" } else { "not the file's" };
        stand.push((Level::Error, format!("{why}: the server presents serial {}", served.serial)));
    }
    finding(all(stand), Some(facts))
}

fn lasts(facts: &Facts, now: i64) -> (Level, String) {
    let (level, left) = match certs::term(facts, now) {
        Term::Well => return (Level::Well, String::new()),
        Term::Early => return (Level::Error, format!("not valid before {}", certs::date(facts.not_before))),
        Term::Expired => return (Level::Error, format!("expired on {}", certs::date(facts.not_after))),
        Term::Warning(days) => (Level::Warning, days),
        Term::Alarm(days) => (Level::Error, days),
    };
    let days = if left == 1 { "day" } else { "days" };
    let urge = if left < ALARM_DAYS { ", and nobody has renewed it" } else { "" };
    (level, format!("expires in {left} {days}{urge}"))
}

/// The worst, and all the words.
fn all(stand: Vec<(Level, String)>) -> (Level, String) {
    let level = stand.iter().map(|(level, _)| *level).max().unwrap_or(Level::Well);
    let texts: Vec<String> = stand.into_iter().map(|(_, text)| text).filter(|text| !text.is_empty()).collect();
    (level, texts.join("; "))
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::tests::{Authority, elliptic, now};
    use crate::config::Environment;

    const DAY: i64 = 86_400;

    fn config() -> Config {
        let text = "
            [[node]]
            name = 'a'
            host = 'a.net'
            [[node]]
            name = 'b'
            host = 'b.net'
            [[certificate]]
            lineage = 'a.net'
            use = ['server', 'replication']
            node = 'a'
            cert = '/etc/c.pem'
            key = '/etc/k.pem'
        ";
        Config::parse(text, &Environment { variable: &|_| None, os_user: Some("os".into()) }).unwrap()
    }

    struct Case {
        root: Authority,
        served: Chain,
        presented: Option<Option<String>>,
        file: Option<Result<Chain, String>>,
        notes: Vec<Note>,
    }

    fn chain(authority: &Authority, names: &[&str], from: i64, days: i64) -> Chain {
        let leaf = authority.issue(&elliptic(), names, now() + from, now() + days * DAY + 60, true);
        Chain::of(vec![leaf]).unwrap()
    }

    impl Case {
        /// All is well.
        fn new() -> Self {
            let root = Authority::new("root");
            let served = chain(&root, &["a.net"], -60, 90);
            let (presented, file) = (Some(Some(served.facts().serial)), Some(Ok(served.clone())));
            Self { root, served, presented, file, notes: Vec::new() }
        }

        /// What is not well of node a, by its name: level and text.
        fn judge(&self) -> Vec<(String, Level, String)> {
            let config = config();
            let presented = self.presented.iter().map(|serial| ("b".to_owned(), serial.clone())).collect();
            let sight = Sight { served: Some(Ok(self.served.clone())), presented };
            let files = [File { entry: &config.certificates[0], node: Some("a"), chain: self.file.clone() }];
            let root = self.root.certificate.to_pem().unwrap();
            let sights = BTreeMap::from([("a", sight)]);
            let findings = judge(&config, &sights, &files, &self.notes, Some(&root), now());
            let bad = findings.into_iter().filter(|finding| finding.level != Level::Well);
            bad.map(|finding| (finding.what, finding.level, finding.text)).collect()
        }
    }

    #[track_caller]
    fn assert_says(case: &Case, expected: &[(&str, Level, &str)]) {
        let found = case.judge();
        let fits = found.len() == expected.len()
            && found
                .iter()
                .zip(expected)
                .all(|((what, level, text), (a, b, c))| what == a && level == b && text.contains(c));
        assert!(fits, "expected {expected:#?}, found {found:#?}");
    }

    #[test]
    fn a_certificate_that_is_in_use_everywhere_is_well() {
        assert_says(&Case::new(), &[]);
    }

    #[test]
    fn each_trouble_is_told_where_it_is() {
        let newer = |case: &Case| chain(&case.root, &["a.net"], -1, 90);
        let mut case = Case::new();
        case.file = Some(Ok(newer(&case)));
        assert_says(
            &case,
            &[
                ("subscription from b", Level::Error, "reload pending: connected with serial"),
                ("file /etc/c.pem", Level::Error, "reload pending: the server presents"),
            ],
        );
        let mut case = Case::new();
        case.served = chain(&Authority::new("next"), &["a.net"], -60, 90);
        case.file = None;
        case.presented = None;
        assert_says(
            &case,
            &[
                ("server", Level::Error, "signed by next, which the root does not verify"),
                ("subscription from b", Level::Unknown, "not connected"),
                ("file /etc/c.pem", Level::Unknown, "may not be read"),
            ],
        );
        let mut case = Case::new();
        case.served = chain(&case.root, &["b.net"], -60, 90);
        case.file = Some(Err("the key does not belong to the certificate".into()));
        assert_says(
            &case,
            &[
                ("server", Level::Error, "not issued for a.net"),
                // Neither what is served nor what is in the file says what that serial is.
                ("subscription from b", Level::Unknown, "until when cannot be seen from here"),
                ("file /etc/c.pem", Level::Error, "does not belong"),
            ],
        );
    }

    #[test]
    fn the_end_is_told_of_every_place_that_it_is_known_of() {
        for (days, level) in [(15, Level::Warning), (5, Level::Error), (-1, Level::Error)] {
            let mut case = Case::new();
            case.served = chain(&case.root, &["a.net"], -20 * DAY, days);
            case.presented = Some(Some(case.served.facts().serial));
            case.file = Some(Ok(case.served.clone()));
            let text = if days > 0 { format!("expires in {days} days") } else { "expired on".into() };
            assert_says(
                &case,
                &[("server", level, &text), ("subscription from b", level, &text), ("file /etc/c.pem", level, &text)],
            );
        }
    }

    #[test]
    fn the_watchdog_hears_of_errors_once_and_of_no_warnings() {
        let finding = |what: &str, level| Finding {
            node: "a".into(),
            what: what.into(),
            level,
            text: "expires in 5 days".into(),
            certificate: Some(chain(&Authority::new("root"), &["a.net"], -60, 90).facts()),
        };
        let server = finding("server", Level::Error);
        let file = Finding { what: "file".into(), ..server.clone() };
        let another = finding("another", Level::Error);
        let others = [finding("warned of", Level::Warning), finding("unseen", Level::Unknown)];
        let all = [&[server.clone(), file, another.clone()][..], &others].concat();
        let (present, unknown) = troubles(&all);
        let subjects: Vec<Subject> = present.into_iter().map(|finding| finding.subject).collect();
        assert_eq!(subjects, [server.subject(), another.subject()]);
        assert_eq!(unknown, [others[1].subject()]);
    }

    #[test]
    fn what_is_no_clients_certificate_is_told_while_it_still_works() {
        let mut case = Case::new();
        let leaf = case.root.issue(&elliptic(), &["a.net"], now() - 60, now() + 90 * DAY, false);
        case.served = Chain::of(vec![leaf]).unwrap();
        case.presented = Some(Some(case.served.facts().serial));
        for file in [Some(Ok(case.served.clone())), None] {
            case.file = file;
            case.notes = vec![Note {
                lineage: "a.net".into(),
                began: 7,
                outcome: Outcome::Deployed,
                certificate: Some(case.served.facts()),
            }];
            let said = "not issued for clients";
            assert_says(&case, &[("subscription from b", Level::Error, said), ("file /etc/c.pem", Level::Error, said)]);
        }
        case.presented = Some(Some("AB".into()));
        case.file = None;
        case.served = Case::new().served;
        case.notes.clear();
        let told = case.judge();
        assert!(
            told.iter().any(|(_, level, text)| *level == Level::Unknown && text.contains("until when")),
            "{told:?}"
        );
    }

    #[test]
    fn what_could_not_be_proven_is_a_warning() {
        let mut case = Case::new();
        let certificate = Some(case.served.facts());
        let outcome = Outcome::Unproven { why: "b cannot be asked".into() };
        case.notes = vec![Note { lineage: "a.net".into(), began: 7, outcome, certificate }];
        assert_says(&case, &[("deployment of a.net", Level::Warning, "is not proven: b cannot be asked")]);
    }

    #[test]
    fn a_note_stands_for_a_file_that_may_not_be_read_and_for_what_failed() {
        let mut case = Case::new();
        let newer = chain(&case.root, &["a.net"], -1, 90).facts();
        case.file = None;
        let note = |outcome| Note { lineage: "a.net".into(), began: 7, outcome, certificate: Some(newer.clone()) };
        case.notes = vec![note(Outcome::Deployed)];
        assert_says(&case, &[("file /etc/c.pem", Level::Error, "reload pending")]);
        for (outcome, text) in [
            (Outcome::Failed { why: "the disk is full".into() }, "failed: the disk is full"),
            (Outcome::Unfinished, "it was cut off"),
        ] {
            case.notes = vec![note(outcome)];
            assert_says(
                &case,
                &[("file /etc/c.pem", Level::Error, "reload pending"), ("deployment of a.net", Level::Error, text)],
            );
        }
    }
}
