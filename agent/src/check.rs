//! What is right about a set of nodes, what is not, and what mends it: findings out of what the nodes told. Pure.
//!
//! One function per subject. Deliberately says nothing of what changes by the minute: that is the watchdog's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use crate::condition::Size;
use crate::config::{Config, Family, Node, TlsMode};
use crate::conninfo::{Conninfo, SECRETS};
use crate::hba::{self, Caller, Guard, Rule};
use crate::inspect;
use crate::node::{ADDRESS_BOUND, Answer};
use crate::quote::{literal, name};
use crate::sequences::{Series, collide};
use crate::survey::{Column, Key, LEAST_VERSION, Sequence, Subscription, Survey, Table};

/// Clocks that differ by more make the newest version of a row a matter of luck.
const SKEW_BOUND_US: f64 = 500_000.0;
/// Less free space than that is little for anybody's WAL.
const LEAST_FREE: u64 = 1 << 30;
/// How many differences of a table are told.
const SHOWN: usize = 3;

/// What was looked at, and how it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which thing, in words that stay.
    pub subject: &'static str,
    /// The node that it is about.
    pub node: String,
    /// The other node, if it is about two.
    pub peer: Option<String>,
    /// The table, line, slot or whatever else there are several of.
    pub about: Option<String>,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What is needed.
    pub needed: String,
    /// What makes it so, in order.
    pub remedy: Vec<Remedy>,
    /// Who or what can do that. None: nothing needs to be done.
    pub mends: Option<Mends>,
}

/// How a thing is, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it is needed.
    Ok,
    /// It could not be looked at.
    Unknown,
    /// It works, and will be regretted.
    Warning,
    /// It does not work, or harms.
    Error,
}

impl Verdict {
    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unknown => "unknown",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One step of what makes it right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Remedy {
    /// A statement, as superuser in the replicated database.
    Sql {
        /// Where.
        node: String,
        /// Without a semicolon.
        statement: String,
    },
    /// A line of a file on the node's host.
    File {
        /// Where.
        node: String,
        /// The file, as the server calls it.
        path: String,
        /// The line; empty: none.
        line: String,
        /// The number of the line whose place it takes.
        instead_of: Option<i32>,
        /// The number of the line that it must come before. Neither: anywhere.
        before: Option<i32>,
    },
    /// A command on a host.
    Shell {
        /// Where.
        node: String,
        /// The command.
        command: String,
    },
    /// A restart of the server.
    Restart {
        /// Where.
        node: String,
    },
}

/// Who or what mends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mends {
    /// Statements that change nothing but what is wrong.
    Sql,
    /// A file on the node's host.
    File,
    /// Statements, and a restart of the server.
    Restart,
    /// A person, who has to think: the remedy, if there is one, is what most would do.
    Person,
}

impl Finding {
    fn new(subject: &'static str, node: &str, verdict: Verdict) -> Self {
        Self {
            subject,
            node: node.to_owned(),
            peer: None,
            about: None,
            verdict,
            found: String::new(),
            needed: String::new(),
            remedy: Vec::new(),
            mends: (verdict > Verdict::Ok).then_some(Mends::Person),
        }
    }

    fn ok(subject: &'static str, node: &str) -> Self {
        Self::new(subject, node, Verdict::Ok)
    }

    fn unknown(subject: &'static str, node: &str) -> Self {
        Self::new(subject, node, Verdict::Unknown)
    }

    fn warning(subject: &'static str, node: &str) -> Self {
        Self::new(subject, node, Verdict::Warning)
    }

    fn error(subject: &'static str, node: &str) -> Self {
        Self::new(subject, node, Verdict::Error)
    }

    fn peer(mut self, peer: &str) -> Self {
        self.peer = Some(peer.to_owned());
        self
    }

    fn about(mut self, about: impl Into<String>) -> Self {
        self.about = Some(about.into());
        self
    }

    fn found(mut self, found: impl Into<String>) -> Self {
        self.found = found.into();
        self
    }

    fn needed(mut self, needed: impl Into<String>) -> Self {
        self.needed = needed.into();
        self
    }

    /// Adds a statement on the node itself.
    fn sql(self, statement: impl Into<String>) -> Self {
        let node = self.node.clone();
        self.sql_on(&node, statement)
    }

    fn sql_on(mut self, node: &str, statement: impl Into<String>) -> Self {
        self.remedy.push(Remedy::Sql { node: node.to_owned(), statement: statement.into() });
        self.mends = Some(Mends::Sql);
        self
    }

    fn restart(mut self) -> Self {
        self.remedy.push(Remedy::Restart { node: self.node.clone() });
        self.mends = Some(Mends::Restart);
        self
    }

    fn shell(mut self, command: impl Into<String>) -> Self {
        self.remedy.push(Remedy::Shell { node: self.node.clone(), command: command.into() });
        self.mends = Some(Mends::Person);
        self
    }

    /// Adds a line of pg_hba.conf, and has it read.
    fn rule(mut self, path: &str, line: impl Into<String>, instead_of: Option<i32>, before: Option<i32>) -> Self {
        let (node, path) = (self.node.clone(), path.to_owned());
        self.remedy.push(Remedy::File { node, path, line: line.into(), instead_of, before });
        self = self.sql(RELOAD);
        self.mends = Some(Mends::File);
        self
    }

    fn person(mut self) -> Self {
        self.mends = Some(Mends::Person);
        self
    }

    /// What it is about, and how that is.
    pub fn title(&self) -> String {
        let about = self.about.iter().chain(&self.peer).fold(String::new(), |all, one| all + " " + one);
        format!("{}{about}: {}", self.subject, self.found)
    }

    /// What is needed, and each step that makes it so, line by line.
    pub fn mending(&self) -> Vec<String> {
        let remedies = self.remedy.iter().map(|remedy| {
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
            let elsewhere = if *node == self.node { String::new() } else { format!("on {node}: ") };
            format!("mend:   {elsewhere}{what}")
        });
        std::iter::once(format!("needed: {}", self.needed)).chain(remedies).collect()
    }
}

const RELOAD: &str = "select pg_catalog.pg_reload_conf()";

/// The addresses of one name of a node, tried from here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The name, as configured.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The subscriptions of its peers connect there, and perhaps the agent.
    pub for_subscriptions: bool,
    /// Each address and what came of it; or why there is none.
    pub answers: Result<Vec<(SocketAddr, Answer)>, String>,
}

/// What is known.
pub struct Seen<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// What the nodes told, by name.
    pub surveys: &'a BTreeMap<String, Survey>,
    /// Where the nodes are, by name.
    pub places: &'a BTreeMap<String, Vec<Place>>,
}

/// A node that could not be asked.
pub fn unreachable(node: &str, found: &str, needed: &str) -> Finding {
    Finding::error("connection", node).found(found).needed(needed)
}

/// A certificate in use, as `certs check` finds it.
pub fn certificate(seen: &inspect::Finding) -> Finding {
    let verdict = match seen.level {
        inspect::Level::Well => Verdict::Ok,
        inspect::Level::Unknown => Verdict::Unknown,
        inspect::Level::Warning => Verdict::Warning,
        inspect::Level::Error => Verdict::Error,
    };
    Finding::new("certificate", &seen.node, verdict)
        .about(seen.what.clone())
        .found(if seen.text.is_empty() { "well" } else { &seen.text })
        .needed("valid, leading to the root, and in use as it is on disk: see `certs check`")
}

/// All findings, node by node in the order of the configuration.
pub fn findings(seen: &Seen<'_>) -> Vec<Finding> {
    let mut all = Vec::new();
    for node in &seen.config.nodes {
        all.extend(addresses(seen, node));
        let Some(survey) = seen.surveys.get(&node.name) else { continue };
        let this = This { seen, config: seen.config, node, survey };
        this.server(&mut all);
        if survey.about.version_num < LEAST_VERSION {
            continue;
        }
        this.space(&mut all);
        this.settings(&mut all);
        this.access(&mut all);
        this.extension(&mut all);
        this.identity(&mut all);
        this.roles(&mut all);
        this.publication(&mut all);
        this.tables(&mut all);
        this.subscriptions(&mut all);
        this.slots(&mut all);
        this.alike(&mut all);
    }
    all
}

/// One node among the others.
struct This<'a> {
    seen: &'a Seen<'a>,
    config: &'a Config,
    node: &'a Node,
    survey: &'a Survey,
}

impl<'a> This<'a> {
    fn name(&self) -> &'a str {
        &self.node.name
    }

    /// The other nodes of the configuration.
    fn peers(&self) -> impl Iterator<Item = &'a Node> {
        self.config.peers(self.name())
    }

    /// Those of them that come later, and could be asked: each pair is compared once.
    fn later(&self) -> impl Iterator<Item = (&'a str, &'a Survey)> {
        let own = self.name();
        let after = self.config.nodes.iter().skip_while(move |node| node.name != own).skip(1);
        let surveys = self.seen.surveys;
        after.filter_map(move |node| surveys.get(&node.name).map(|survey| (node.name.as_str(), survey)))
    }

    fn setting(&self, name: &str) -> Option<&'a str> {
        self.survey.settings.get(name).map(|setting| setting.value.as_str())
    }

    fn number(&self, name: &str) -> Option<i64> {
        self.setting(name).and_then(|value| value.parse().ok())
    }

    // ---- the server ----

    fn server(&self, out: &mut Vec<Finding>) {
        let about = &self.survey.about;
        let subject = "postgresql_version";
        let version = if about.version_num < LEAST_VERSION {
            Finding::error(subject, self.name())
        } else {
            Finding::ok(subject, self.name())
        };
        out.push(version.found(&about.version).needed("PostgreSQL 16 or newer"));
        if about.in_recovery {
            let found = "a standby in recovery: it can neither subscribe nor be written";
            out.push(Finding::error("standby", self.name()).found(found).needed("a primary server"));
        }
        let (made, now) = (&about.collation_version, &about.collation_version_now);
        if let (Some(made), Some(now)) = (made, now)
            && made != now
        {
            let database = name(&self.config.database);
            out.push(
                Finding::warning("collation_version", self.name())
                    .found(format!("indexes were made with version {made} of the collation, the system now has {now}"))
                    .needed("indexes of texts built anew, and then the version noted")
                    .sql(format!("reindex database {database}"))
                    .sql(format!("alter database {database} refresh collation version"))
                    .person(),
            );
        }
    }

    fn space(&self, out: &mut Vec<Finding>) {
        let subject = "disk_space";
        let Some(free) = self.survey.free else {
            // An extension that is not there, or too old, is told of; so is a privilege that is missing.
            let finding = Finding::unknown(subject, self.name()).found("the extension cannot be asked for it");
            return out.push(finding.needed("room for the WAL that slots keep: look with df"));
        };
        let kept = self.number("max_slot_wal_keep_size").filter(|megabytes| *megabytes >= 0);
        let needed = kept.map_or(LEAST_FREE, |megabytes| (megabytes.unsigned_abs() << 20).max(LEAST_FREE));
        let verdict = if free < needed { Verdict::Warning } else { Verdict::Ok };
        let finding = Finding::new(subject, self.name(), verdict).found(format!("{} free", Size(free)));
        out.push(finding.needed(format!("{} for WAL that slots keep", Size(needed))));
    }

    // ---- settings ----

    fn settings(&self, out: &mut Vec<Finding>) {
        let exactly = |value: &'static str| move |found: &str| found == value;
        self.must(out, "wal_level", "logical", exactly("logical"));
        self.must(out, "track_commit_timestamp", "on", exactly("on"));
        self.encryption(out);
        self.preload(out);
        self.listen(out);
        self.places(out);
        self.named(out);
        self.keep(out);
        // What waits for a restart and has been told of above is told once.
        let told: BTreeSet<&str> = out
            .iter()
            .filter(|finding| finding.node == self.name() && finding.verdict > Verdict::Ok)
            .map(|finding| finding.subject)
            .collect();
        for setting in self.survey.settings.values().filter(|setting| setting.pending) {
            if !told.contains(setting.name.as_str()) {
                out.push(
                    Finding::warning("pending_restart", self.name())
                        .about(&setting.name)
                        .found(format!("{}; what the configuration has now waits for a restart", setting.value))
                        .needed("what is configured to be in force")
                        .restart(),
                );
            }
        }
    }

    fn encryption(&self, out: &mut Vec<Finding>) {
        let host = self.node.replication.host.as_deref().unwrap_or(&self.node.host);
        let here = |host: &str| host.starts_with('/') || is_loopback(host);
        let by_agent = self.config.tls.mode != TlsMode::Disable && !self.node.is_local();
        let by_peers = self.config.replication.mode != TlsMode::Disable && !host.starts_with('/');
        if by_agent || by_peers || !here(host) {
            self.must(out, "ssl", "on", |found| found == "on");
        }
        if !by_peers && !here(host) {
            out.push(
                Finding::error("replication_mode", self.name())
                    .found("subscriptions connect without encryption")
                    .needed("mode = \"verify-full\" under [replication] in agent.toml"),
            );
        }
    }

    /// A setting that has to have a value.
    fn must(&self, out: &mut Vec<Finding>, setting: &'static str, needed: &str, well: impl Fn(&str) -> bool) {
        out.push(match self.setting(setting) {
            Some(value) if well(value) => Finding::ok(setting, self.name()).found(value).needed(needed),
            value => self.set(setting, Verdict::Error, value.map(str::to_owned), needed, &literal(needed)),
        });
    }

    /// A setting that has not the value it should have, with the statement that gives it; `value` as SQL wants it.
    fn set(
        &self,
        setting: &'static str,
        verdict: Verdict,
        found: Option<String>,
        needed: &str,
        value: &str,
    ) -> Finding {
        let known = self.survey.settings.get(setting);
        let Some(found) = found else {
            return Finding::unknown(setting, self.name())
                .found("the agent's role does not see it")
                .needed(needed)
                .sql(format!("grant pg_monitor to {}", name(&self.config.user)));
        };
        let pending = known.is_some_and(|setting| setting.pending);
        let found = if pending { format!("{found}; another value waits for a restart") } else { found };
        let finding = Finding::new(setting, self.name(), verdict).found(found);
        if known.is_some_and(|setting| setting.on_command_line) {
            return finding.needed(format!("{needed}, on the server's command line, where it is set"));
        }
        let finding = finding.needed(needed).sql(format!("alter system set {setting} = {value}"));
        if known.is_some_and(|setting| setting.restart) { finding.restart() } else { finding.sql(RELOAD) }
    }

    fn preload(&self, out: &mut Vec<Finding>) {
        let setting = "shared_preload_libraries";
        let needed = "stillebot among them";
        let found = self.setting(setting);
        let libraries: Vec<&str> = found
            .unwrap_or_default()
            .split(',')
            .map(|library| library.trim().trim_matches('"'))
            .filter(|library| !library.is_empty())
            .collect();
        let is_it =
            |library: &&str| library.rsplit('/').next().is_some_and(|file| file.trim_end_matches(".so") == "stillebot");
        out.push(if libraries.iter().any(is_it) {
            Finding::ok(setting, self.name()).found(libraries.join(", ")).needed(needed)
        } else {
            let value: Vec<String> = libraries.iter().copied().chain(["stillebot"]).map(literal).collect();
            let found = found.map(|_| if libraries.is_empty() { "none".into() } else { libraries.join(", ") });
            self.set(setting, Verdict::Error, found, needed, &value.join(", "))
        });
    }

    fn listen(&self, out: &mut Vec<Finding>) {
        let setting = "listen_addresses";
        let host = self.node.replication.host.as_deref().unwrap_or(&self.node.host);
        let found = self.setting(setting);
        let listens: Vec<&str> =
            found.unwrap_or_default().split(',').map(str::trim).filter(|a| !a.is_empty()).collect();
        let (needed, well) = if host.starts_with('/') {
            ("anything: peers come through the socket".to_owned(), true)
        } else if is_loopback(host) {
            ("an address of this host".to_owned(), !listens.is_empty())
        } else {
            ("'*', or an address that peers reach".to_owned(), listens.iter().any(|address| !is_loopback(address)))
        };
        out.push(match found {
            Some(found) if well => Finding::ok(setting, self.name()).found(found).needed(needed),
            found => {
                let value = if is_loopback(host) { "'localhost'" } else { "'*'" };
                self.set(setting, Verdict::Error, found.map(|found| format!("'{found}'")), &needed, value)
            }
        });
    }

    /// Slots, origins, senders and workers: with less than the first number replication does not run, with less than the
    /// second it cannot copy tables at the same time, or may find all places taken.
    fn places(&self, out: &mut Vec<Finding>) {
        let about = &self.survey.about;
        let peers = self.peers().count() as i64;
        let sync = self.number("max_sync_workers_per_subscription").unwrap_or(2);
        // The peers' own numbers say how many tables they copy at once.
        let copies: i64 = self
            .peers()
            .map(|peer| {
                let survey = self.seen.surveys.get(&peer.name);
                let setting = survey.and_then(|survey| survey.settings.get("max_sync_workers_per_subscription"));
                setting.and_then(|setting| setting.value.parse().ok()).unwrap_or(2)
            })
            .sum();
        let subscriptions = peers + about.other_subscriptions;
        // Up to 17 a subscriber's origins are counted by the same setting as a publisher's slots.
        let origins = if about.version_num < 18_00_00 { subscriptions + peers * sync } else { 0 };
        let slots = peers + about.other_slots;
        let logical = subscriptions + sync;
        // One launcher of core's, one of ours, and a collector for each database with subscriptions.
        let own = 2 + 1 + about.other_databases;
        let parallel = self.number("max_parallel_workers").unwrap_or(8);
        let reserved = self.number("max_logical_replication_workers").unwrap_or(logical).max(logical);
        let mut needs = vec![
            (
                "max_replication_slots",
                slots.max(if origins > 0 { subscriptions } else { 0 }),
                (slots + copies).max(origins),
            ),
            ("max_wal_senders", peers + about.other_senders, peers + copies + about.other_senders),
            ("max_logical_replication_workers", subscriptions, logical),
            ("max_worker_processes", subscriptions + own, reserved + own + parallel),
        ];
        if about.version_num >= 18_00_00 {
            needs.push(("max_active_replication_origins", subscriptions, subscriptions + peers * sync));
        }
        for (setting, least, ample) in needs {
            let found = self.number(setting);
            let why = match setting {
                "max_replication_slots" => format!("{slots} now, and {copies} while tables are copied"),
                "max_wal_senders" => format!("{least} now, and {copies} while tables are copied"),
                "max_logical_replication_workers" => {
                    format!("{subscriptions} subscriptions, and {sync} that copy tables")
                }
                "max_worker_processes" => format!(
                    "{own} that never end, {reserved} of replication, and {parallel} that parallel queries may take"
                ),
                _ => format!("{subscriptions} subscriptions, and {sync} tables of each being copied"),
            };
            let needed = format!("{ample} or more: {why}");
            out.push(match found {
                Some(found) if found >= ample => {
                    Finding::ok(setting, self.name()).found(found.to_string()).needed(needed)
                }
                found => {
                    let verdict = if found < Some(least) { Verdict::Error } else { Verdict::Warning };
                    self.set(setting, verdict, found.map(|found| found.to_string()), &needed, &ample.to_string())
                }
            });
        }
    }

    fn named(&self, out: &mut Vec<Finding>) {
        let setting = "stillebot.node";
        // Without the library there is no such setting, and that is told elsewhere.
        let Some(found) = self.setting(setting) else { return };
        out.push(if found == self.name() {
            Finding::ok(setting, self.name()).found(found).needed(self.name())
        } else {
            let shown = if found.is_empty() { "not set".to_owned() } else { found.to_owned() };
            self.set(setting, Verdict::Warning, Some(shown), self.name(), &literal(self.name()))
        });
    }

    fn keep(&self, out: &mut Vec<Finding>) {
        let setting = "max_slot_wal_keep_size";
        let needed = "a bound: otherwise a peer that stays away fills the disk with WAL";
        // In megabytes; none is -1.
        let megabytes = self.number(setting);
        out.push(match megabytes {
            Some(megabytes) if megabytes >= 0 => {
                let found = Size(megabytes.unsigned_abs() << 20).to_string();
                Finding::ok(setting, self.name()).found(found).needed(needed)
            }
            found => {
                let third = self.survey.free.map_or(10, |free| ((free / 3) >> 30).max(1));
                let found = found.map(|_| "no bound".to_owned());
                self.set(setting, Verdict::Warning, found, needed, &format!("'{third}GB'"))
            }
        });
    }

    // ---- pg_hba.conf ----

    fn access(&self, out: &mut Vec<Finding>) {
        let Some(rules) = &self.survey.rules else {
            out.push(
                Finding::unknown("pg_hba", self.name())
                    .found("the agent's role may not look at it")
                    .needed("EXECUTE on pg_hba_file_rules()")
                    .sql(format!(
                        "grant execute on function pg_catalog.pg_hba_file_rules() to {}",
                        name(&self.config.user)
                    )),
            );
            return;
        };
        let before = out.len();
        for rule in rules {
            if let Some(error) = &rule.error {
                out.push(
                    Finding::error("pg_hba_line", self.name())
                        .about(format!("{} line {}", rule.file, rule.line))
                        .found(error)
                        .needed("a line that the server understands: until then it keeps what it had read before"),
                );
            }
        }
        self.locals(rules, out);
        self.networks(rules, out);
        if out.len() == before {
            out.push(Finding::ok("pg_hba_line", self.name()).found("nothing too wide").needed("nothing too wide"));
        }
        self.mappings(out);
        self.certificates(rules, out);
        self.entrances(rules, out);
        self.entrance_of_agent(rules, out);
    }

    fn mappings(&self, out: &mut Vec<Finding>) {
        for mapping in self.survey.mappings.iter().flatten() {
            if let Some(error) = &mapping.error {
                out.push(
                    Finding::error("pg_ident_line", self.name())
                        .about(format!("{} line {}", mapping.file, mapping.line))
                        .found(error)
                        .needed("a line that the server understands: until then it keeps what it had read before"),
                );
            }
        }
    }

    /// A line that wants certificates turns everybody away if there is nothing to verify them with.
    fn certificates(&self, rules: &[Rule], out: &mut Vec<Finding>) {
        let Some(rule) = rules.iter().find(|rule| rule.wants_certificate()) else { return };
        let setting = "ssl_ca_file";
        let needed = format!("the root of client certificates, for line {} of pg_hba.conf wants them", rule.line);
        let wanted = self.peers().next().map(|peer| Conninfo::wanted(self.config, self.node, peer));
        let root =
            wanted.and_then(|wanted| wanted.get("sslrootcert").filter(|root| root.starts_with('/')).map(str::to_owned));
        out.push(match (self.setting(setting), root) {
            (Some(found), _) if !found.is_empty() => Finding::ok(setting, self.name()).found(found).needed(needed),
            (Some(_), None) => Finding::error(setting, self.name()).found("not set").needed(needed),
            // What servers are verified with is most likely what their clients are verified with.
            (found, root) => {
                let value = literal(&root.unwrap_or_default());
                self.set(setting, Verdict::Error, found.map(|_| "not set".to_owned()), &needed, &value)
            }
        });
    }

    fn locals(&self, rules: &[Rule], out: &mut Vec<Finding>) {
        let locals = || rules.iter().filter(|rule| rule.kind.as_deref() == Some("local"));
        let ours = |rule: &&Rule| rule.is_about(&self.config.database);
        // A line that lets in otherwise is told of below.
        if locals().filter(ours).all(|rule| rule.guard() == Guard::Shut) {
            let path = self.setting("hba_file").unwrap_or("pg_hba.conf");
            out.push(
                Finding::warning("pg_hba_local", self.name())
                    .found("nobody gets in through the socket by the operating system's word")
                    .needed("a line for that, which needs no secret and works when certificates do not")
                    .rule(path, "local all all peer", None, locals().next().map(|rule| rule.line)),
            );
        }
        // Who gets in elsewhere, as himself, is not this pair's business; who gets in as anybody is.
        let harms = |rule: &&Rule| matches!(rule.guard(), Guard::Open | Guard::Weak) || ours(rule);
        for rule in
            locals().filter(harms).filter(|rule| !matches!(rule.method.as_deref(), None | Some("peer" | "reject")))
        {
            let subject = "pg_hba_line";
            let finding = if rule.guard() == Guard::Open {
                Finding::error(subject, self.name())
            } else {
                Finding::warning(subject, self.name())
            };
            let mut line = rule.clone();
            line.method = Some("peer".into());
            line.options.clear();
            out.push(
                finding
                    .about(format!("{} line {}", rule.file, rule.line))
                    .found(rule.to_string())
                    .needed("the operating system's word for who comes through the socket: peer")
                    .rule(&rule.file, line.to_string(), Some(rule.line), None),
            );
        }
    }

    fn networks(&self, rules: &[Rule], out: &mut Vec<Finding>) {
        for rule in rules.iter().filter(|rule| rule.kind.as_deref().is_some_and(|kind| kind != "local")) {
            let (databases, roles) = (rule.is_for_all_databases(), rule.is_for_all_roles());
            let everybody = (databases || roles) && rule.is_for_everywhere();
            let wide = match (databases, roles) {
                (true, true) => "the databases and roles that are meant: this is about all, from everywhere",
                (true, false) => "the databases that are meant: this is about all, from everywhere",
                _ => "the roles that are meant, the application's too: this is about all, from everywhere",
            };
            let (verdict, needed) = match rule.guard() {
                Guard::Shut => continue,
                Guard::Open => (Verdict::Error, "cert, or scram-sha-256, over hostssl: this lets in whoever says so"),
                Guard::Weak => (Verdict::Warning, "scram-sha-256: this gives passwords away"),
                Guard::Strong if rule.may_be_plain() && !rule.is_for_this_host() => {
                    (Verdict::Warning, "hostssl: this lets connections in that are not encrypted")
                }
                Guard::Strong if everybody => (Verdict::Warning, wide),
                Guard::Strong => continue,
            };
            let mut line = rule.clone();
            let finding = Finding::new("pg_hba_line", self.name(), verdict)
                .about(format!("{} line {}", rule.file, rule.line))
                .found(rule.to_string())
                .needed(needed);
            if rule.guard() != Guard::Strong {
                line.method = Some("scram-sha-256".into());
                line.options.clear();
            }
            if rule.may_be_plain() && !rule.is_for_this_host() {
                line.kind = Some("hostssl".into());
            }
            if everybody && databases {
                line.databases = Some(vec![self.config.database.clone()]);
            }
            if everybody && roles {
                line.users = Some(vec![self.config.user.clone(), self.config.replication.user.clone()]);
            }
            out.push(finding.rule(&rule.file, line.to_string(), Some(rule.line), None).person());
        }
    }

    /// Whether each peer's subscription gets in, and by which line.
    fn entrances(&self, rules: &[Rule], out: &mut Vec<Finding>) {
        let subject = "pg_hba_replication";
        let role = &self.config.replication.user;
        let nobody = BTreeSet::new();
        let groups = self.survey.roles.get(role).map_or(&nobody, |role| &role.groups);
        for peer in self.peers() {
            let slot = self.config.slot(self.name(), &peer.name);
            let reader =
                self.survey.slots.iter().find(|found| found.name == slot).and_then(|found| found.reader.as_deref());
            // Where it does come from, or else where it is reached.
            let addresses: Vec<IpAddr> = match reader.and_then(|address| address.parse().ok()) {
                Some(address) => vec![address],
                None => self.addresses_of(peer),
            };
            let names = [peer.host.as_str(), peer.replication.host.as_deref().unwrap_or(&peer.host)];
            let method = if Conninfo::wanted(self.config, peer, self.node).get("sslcert").is_some() {
                "cert"
            } else {
                "scram-sha-256"
            };
            let line = format!("hostssl {} {} all {method}", hba::name(&self.config.database), hba::name(role));
            let needed = format!("{line} (and map=... where the certificate's name is not the role)");
            if addresses.is_empty() {
                let found = format!("where {} comes from is not known", peer.name);
                out.push(Finding::unknown(subject, self.name()).peer(&peer.name).found(found).needed(needed));
                continue;
            }
            let findings = addresses.into_iter().map(|address| {
                let database = &self.config.database;
                let caller = Caller { database, user: role, groups, address: Some(address), names: &names, tls: true };
                self.entrance(subject, rules, &caller, &line, &peer.host)
            });
            let worst = findings.max_by_key(|finding| finding.verdict);
            out.extend(worst.map(|finding| finding.peer(&peer.name).needed(needed)));
        }
    }

    /// Whether the agent's role gets in from where this very session comes from.
    fn entrance_of_agent(&self, rules: &[Rule], out: &mut Vec<Finding>) {
        let role = &self.config.user;
        let nobody = BTreeSet::new();
        let groups = self.survey.roles.get(role).map_or(&nobody, |role| &role.groups);
        let address = self.survey.about.client.as_deref().and_then(|address| address.parse().ok());
        if address.is_none() && !self.node.is_local() {
            let finding = Finding::unknown("pg_hba_agent", self.name());
            let needed = "a look without --via, or with a forwarded port; `init` tries it at its end";
            return out
                .push(finding.found("through the socket it is not seen where the agent comes from").needed(needed));
        }
        let tls = self.survey.about.client_tls == Some(true);
        let caller = Caller { database: &self.config.database, user: role, groups, address, names: &[], tls };
        let (database, role) = (hba::name(&self.config.database), hba::name(role));
        let line = match (address, &self.config.tls.cert) {
            (None, _) => format!("local {database} {role} peer"),
            (Some(_), Some(_)) => format!("hostssl {database} {role} all cert"),
            (Some(_), None) => format!("hostssl {database} {role} all scram-sha-256"),
        };
        out.push(self.entrance("pg_hba_agent", rules, &caller, &line, &self.node.host).needed(&line));
    }

    /// Whether somebody gets in, and by which line. How well that line guards is told of the line. `certified`: what his
    /// certificate is likely to call him.
    fn entrance(
        &self,
        subject: &'static str,
        rules: &[Rule],
        caller: &Caller<'_>,
        line: &str,
        certified: &str,
    ) -> Finding {
        let place = |rule: &Rule| format!("line {}: {rule}", rule.line);
        let whence = caller.address.map_or_else(|| "the socket".to_owned(), |address| address.to_string());
        match Rule::deciding(rules, caller) {
            Some(rule) if rule.guard() != Guard::Shut => self.mapped(subject, rule, caller, certified),
            Some(rule) => Finding::error(subject, self.name())
                .found(format!("{} from {whence} is turned away by {}", caller.user, place(rule)))
                .rule(&rule.file, line, None, Some(rule.line)),
            None => Finding::error(subject, self.name())
                .found(format!("no line lets {} in from {whence}", caller.user))
                .rule(self.setting("hba_file").unwrap_or("pg_hba.conf"), line, None, None),
        }
    }

    /// Whether the map of a line, if it has one, leads to the role.
    fn mapped(&self, subject: &'static str, rule: &Rule, caller: &Caller<'_>, certified: &str) -> Finding {
        let found = format!("line {}: {rule}", rule.line);
        let Some(map) = rule.map() else { return Finding::ok(subject, self.name()).found(found) };
        let Some(mappings) = &self.survey.mappings else {
            return Finding::unknown(subject, self.name())
                .found(format!("{found}; the agent's role may not look at pg_ident.conf"))
                .sql(format!(
                    "grant execute on function pg_catalog.pg_ident_file_mappings() to {}",
                    name(&self.config.user)
                ));
        };
        if mappings.iter().any(|mapping| mapping.leads_to(map, caller.user, caller.groups)) {
            return Finding::ok(subject, self.name()).found(found);
        }
        let path = self.setting("ident_file").unwrap_or("pg_ident.conf");
        let entry = format!("{map} {} {}", hba::name(certified), hba::name(caller.user));
        Finding::error(subject, self.name())
            .found(format!("{found}; and no line of pg_ident.conf maps anybody to {}", caller.user))
            .rule(path, entry, None, None)
            .person()
    }

    /// The addresses that a node is likely to come from: those at which it answers, or, if there is none, all of its name.
    fn addresses_of(&self, node: &Node) -> Vec<IpAddr> {
        let places = self.seen.places.get(&node.name).into_iter().flatten().filter(|place| place.for_subscriptions);
        let all: Vec<&(SocketAddr, Answer)> = places.flat_map(|place| place.answers.iter().flatten()).collect();
        let answer = all.iter().any(|(_, answer)| *answer == Answer::Listens);
        let likely = all.iter().filter(|(_, found)| !answer || *found == Answer::Listens);
        likely.map(|(address, _)| address.ip()).collect()
    }

    // ---- the extension ----

    fn extension(&self, out: &mut Vec<Finding>) {
        let subject = "extension";
        let about = &self.survey.about;
        let available = about.extension_available.as_deref();
        let Some(available) = available else {
            out.push(
                Finding::error(subject, self.name())
                    .found("not installed on the server")
                    .needed("its library and SQL files")
                    .shell("make install PG_CONFIG=..."),
            );
            return;
        };
        let needed = format!("{available}, which is what the server has installed");
        out.push(match about.extension.as_deref() {
            None => Finding::error(subject, self.name())
                .found("not created in the database")
                .needed(needed)
                .sql("create extension stillebot"),
            Some(found) if found != available => {
                Finding::error(subject, self.name()).found(found).needed(needed).sql("alter extension stillebot update")
            }
            Some(found) => Finding::ok(subject, self.name()).found(found).needed(needed),
        });
        for (peer, survey) in self.later() {
            let other = survey.about.extension_available.as_deref();
            if let Some(other) = other.filter(|other| *other != available) {
                out.push(
                    Finding::warning("extension_alike", self.name())
                        .peer(peer)
                        .found(format!("{available} is installed here, {other} on {peer}"))
                        .needed("the same version on all nodes"),
                );
            }
        }
    }

    fn identity(&self, out: &mut Vec<Finding>) {
        if !self.survey.about.knows_itself {
            return;
        }
        let subject = "identity";
        let pairs: BTreeSet<&str> = self
            .seen
            .surveys
            .values()
            .filter_map(|survey| survey.identity.as_ref())
            .map(|own| own.pair.as_str())
            .collect();
        let identify = |pair: &str| format!("select multihome.identify({}, {})", literal(self.name()), literal(pair));
        let Some(own) = &self.survey.identity else {
            let finding = Finding::warning(subject, self.name())
                .found("the node does not know who it is")
                .needed("its name, and to which nodes it belongs");
            out.push(match pairs.first() {
                Some(pair) if pairs.len() == 1 => finding.sql(identify(pair)),
                _ => finding.shell("stillebot-agent init"),
            });
            return;
        };
        let finding = if own.foreign {
            let why = own.why.as_deref().unwrap_or("its data was copied from another node");
            Finding::error(subject, self.name())
                .found(why)
                .needed("an original; a copy that has replaced it is adopted")
                .sql("select stillebot_adopt_identity()")
                .person()
        } else if own.node != self.name() {
            Finding::error(subject, self.name())
                .found(format!("it calls itself {}", own.node))
                .needed("the name that the configuration has: check node.host first")
                .sql(identify(&own.pair))
                .person()
        } else {
            Finding::ok(subject, self.name()).found(&own.node).needed(self.name())
        };
        out.push(finding);
        for (peer, survey) in self.later() {
            let Some(other) = &survey.identity else { continue };
            let found = if other.pair != own.pair {
                format!("{} and {peer} belong to different sets of nodes", self.name())
            } else if other.id == own.id {
                format!("{} and {peer} are one node: one is a copy of the other", self.name())
            } else {
                continue;
            };
            let needed = "nodes that were set up together";
            out.push(Finding::error("identity_alike", self.name()).peer(peer).found(found).needed(needed));
        }
    }

    // ---- roles ----

    fn roles(&self, out: &mut Vec<Finding>) {
        self.replication_role(out);
        let role = &self.config.user;
        let Some(found) = self.survey.roles.get(role) else {
            // Not who asks, then.
            let finding = Finding::error("agent_role", self.name()).found(format!("there is no role {role}"));
            let grants = self.survey.missing_grants.iter().map(|(grant, _)| grant.statement.clone());
            let finding = finding.needed("LOGIN").sql(format!("create role {} login", name(role)));
            out.push(grants.fold(finding, Finding::sql));
            return;
        };
        let (finding, shown) = match (found.superuser, found.login) {
            (true, _) => {
                let finding = Finding::warning("agent_role", self.name());
                (finding.sql(format!("alter role {} nosuperuser", name(role))).person(), "superuser")
            }
            (false, false) => {
                let finding = Finding::error("agent_role", self.name());
                (finding.sql(format!("alter role {} login", name(role))), "NOLOGIN")
            }
            (false, true) => (Finding::ok("agent_role", self.name()), "no superuser"),
        };
        out.push(finding.found(format!("{role}: {shown}")).needed("LOGIN, and no superuser"));
        let (grantable, absent): (Vec<_>, Vec<_>) = self.survey.missing_grants.iter().partition(|(_, there)| *there);
        // What an extension that is not there, or too old, does not have is told of the extension.
        let of_extension = |schema: &str| matches!(schema, "multihome" | "public");
        let absent: Vec<String> = absent
            .iter()
            .filter(|(grant, _)| !(of_extension(&grant.schema) || grant.name == "multihome"))
            .map(|(grant, _)| {
                let schema = if grant.schema.is_empty() { String::new() } else { format!("{}.", grant.schema) };
                format!("{} {schema}{}", grant.kind, grant.name)
            })
            .collect();
        let needed = "all that the agent does";
        let finding = match (grantable.is_empty(), absent.is_empty()) {
            (true, true) => Finding::ok("agent_grants", self.name()).found("all").needed(needed),
            (false, _) => {
                let finding = Finding::error("agent_grants", self.name())
                    .found(format!("{} privileges are missing", grantable.len()))
                    .needed(needed);
                grantable.iter().fold(finding, |finding, (grant, _)| finding.sql(&grant.statement))
            }
            (true, false) => Finding::error("agent_grants", self.name())
                .found(format!("there is no {}", absent.join(", ")))
                .needed("what agent.toml names under [active] and [schema]"),
        };
        out.push(finding);
    }

    fn replication_role(&self, out: &mut Vec<Finding>) {
        let subject = "replication_role";
        let role = &self.config.replication.user;
        let quoted = name(role);
        let needed = "LOGIN, REPLICATION, no superuser";
        let Some(found) = self.survey.roles.get(role) else {
            out.push(
                Finding::error(subject, self.name())
                    .found(format!("there is no role {role}"))
                    .needed(needed)
                    .sql(format!("create role {quoted} login replication"))
                    .sql(format!("grant pg_read_all_data to {quoted}")),
            );
            return;
        };
        let lacks: Vec<&str> = [(found.login, "LOGIN"), (found.replication, "REPLICATION")]
            .into_iter()
            .filter_map(|(has, what)| (!has).then_some(what))
            .collect();
        out.push(if !lacks.is_empty() {
            Finding::error(subject, self.name())
                .found(format!("{role}: without {}", lacks.join(" and ")))
                .needed(needed)
                .sql(format!("alter role {quoted} login replication"))
        } else if found.superuser {
            Finding::warning(subject, self.name())
                .found(format!("{role}: superuser"))
                .needed(needed)
                .sql(format!("alter role {quoted} nosuperuser"))
                .sql(format!("grant pg_read_all_data to {quoted}"))
                .person()
        } else {
            Finding::ok(subject, self.name()).found(role).needed(needed)
        });
        let tables = || self.survey.tables.iter().filter(|table| !table.unlogged && !table.partitioned);
        let unreadable: Vec<&str> =
            tables().filter(|table| table.readable == Some(false)).map(|table| table.name.as_str()).collect();
        let needed = "all tables, for their initial copy";
        let subject = "replication_reads";
        out.push(if found.reads_all || unreadable.is_empty() {
            Finding::ok(subject, self.name()).found("all tables").needed(needed)
        } else {
            Finding::error(subject, self.name())
                .found(format!("{role} may not read {}", some(&unreadable)))
                .needed(needed)
                .sql(format!("grant pg_read_all_data to {quoted}"))
        });
        let hidden: Vec<&str> = tables().filter(|table| table.row_security).map(|table| table.name.as_str()).collect();
        if !hidden.is_empty() && !found.past_row_security {
            out.push(
                Finding::warning("row_security", self.name())
                    .found(format!("row security on {}: a copy that {role} makes would fail", some(&hidden)))
                    .needed("BYPASSRLS for the role of the subscriptions")
                    .sql(format!("alter role {quoted} bypassrls"))
                    .person(),
            );
        }
    }

    // ---- the publication ----

    fn publication(&self, out: &mut Vec<Finding>) {
        let subject = "publication";
        let publication = &self.config.publication;
        let quoted = name(publication);
        let needed = "all tables; insert, update, delete, truncate";
        let create = format!("create publication {quoted} for all tables");
        let refreshed = |finding: Finding| {
            self.peers().fold(finding, |finding, peer| {
                let subscription = name(&self.config.subscription_to(self.name()));
                let statement =
                    format!("alter subscription {subscription} refresh publication with (copy_data = false)");
                let subscribed = self.seen.surveys.get(&peer.name).is_some_and(|survey| {
                    let subscription = self.config.subscription_to(self.name());
                    survey.subscriptions.iter().any(|found| found.name == subscription && found.enabled)
                });
                if subscribed { finding.sql_on(&peer.name, statement) } else { finding }
            })
        };
        let found = self.survey.publications.iter().find(|found| found.name == *publication);
        out.push(match found {
            None => {
                let found = format!("there is no publication {publication}");
                refreshed(Finding::error(subject, self.name()).found(found).needed(needed).sql(create))
            }
            Some(found) if !found.all_tables => {
                // In one statement, so that no subscriber finds it missing.
                let again = format!("begin; drop publication {quoted}; {create}; commit");
                refreshed(Finding::error(subject, self.name()).found("not for all tables").needed(needed).sql(again))
            }
            Some(found) => {
                let lacks: Vec<&str> = [
                    (found.inserts, "insert"),
                    (found.updates, "update"),
                    (found.deletes, "delete"),
                    (found.truncates, "truncate"),
                ]
                .into_iter()
                .filter_map(|(has, what)| (!has).then_some(what))
                .collect();
                if lacks.is_empty() {
                    Finding::ok(subject, self.name()).found("all tables").needed(needed)
                } else {
                    Finding::error(subject, self.name())
                        .found(format!("does not publish {}", lacks.join(", ")))
                        .needed(needed)
                        .sql(format!("alter publication {quoted} set (publish = 'insert, update, delete, truncate')"))
                }
            }
        });
    }

    // ---- tables ----

    fn tables(&self, out: &mut Vec<Finding>) {
        let before = out.len();
        for table in &self.survey.tables {
            if table.unlogged {
                out.push(
                    Finding::warning("unlogged_table", self.name())
                        .about(&table.name)
                        .found("unlogged: nothing of it is replicated")
                        .needed("a logged table, or to do without")
                        .sql(format!("alter table {} set logged", table.name))
                        .person(),
                );
            } else if !table.partitioned && !table.has_identity {
                out.push(self.identity_of(table));
            }
        }
        for (peer, survey) in self.later() {
            self.compare(peer, survey, out);
            self.sequences(peer, survey, out);
        }
        if out.len() == before {
            let found = format!("{} tables, with keys, and alike", self.survey.tables.len());
            let needed = "a key for each table, and the same tables on all nodes";
            out.push(Finding::ok("tables", self.name()).found(found).needed(needed));
        }
    }

    /// A table whose updates and deletes fail, because nothing says which row is meant.
    fn identity_of(&self, table: &Table) -> Finding {
        let primary = table.keys.iter().find(|key| key.primary);
        let needed = "a primary key, or another replica identity: without one UPDATE and DELETE fail";
        let alter = format!("alter table {}", table.name);
        let again = |key: &Key| {
            let kind = if key.primary { "primary key" } else { "unique" };
            let columns = key.columns.join(", ");
            format!("{alter} drop constraint {}, add constraint {} {kind} ({columns})", key.name, key.name)
        };
        let usable = table.keys.iter().find(|key| key.fit && !key.primary);
        match (table.identity.as_str(), primary, usable) {
            ("default", Some(key), _) => Finding::error("deferrable_key", self.name())
                .about(&table.name)
                .found(format!("its primary key {} is deferrable, which is no replica identity", key.name))
                .needed(needed)
                .sql(again(key))
                .person(),
            ("default", None, None) if table.keys.iter().any(|key| key.deferrable && key.constraint) => {
                let finding = Finding::error("deferrable_key", self.name()).about(&table.name);
                let finding =
                    finding.found("its only keys are deferrable, which are no replica identity").needed(needed);
                finding.sql(format!("{alter} replica identity full")).person()
            }
            (_, Some(key), _) if key.fit => Finding::error("replica_identity", self.name())
                .about(&table.name)
                .found(format!("replica identity {}, although there is a primary key", table.identity))
                .needed(needed)
                .sql(format!("{alter} replica identity default"))
                .person(),
            (_, _, Some(key)) => Finding::error("replica_identity", self.name())
                .about(&table.name)
                .found("no primary key")
                .needed(needed)
                .sql(format!("{alter} replica identity using index {}", key.name))
                .person(),
            _ => Finding::error("replica_identity", self.name())
                .about(&table.name)
                .found("no primary key")
                .needed(needed)
                .sql(format!("{alter} replica identity full"))
                .person(),
        }
    }

    fn compare(&self, peer: &str, survey: &Survey, out: &mut Vec<Finding>) {
        let here: BTreeMap<&str, &Table> =
            self.survey.tables.iter().map(|table| (table.name.as_str(), table)).collect();
        let there: BTreeMap<&str, &Table> = survey.tables.iter().map(|table| (table.name.as_str(), table)).collect();
        let names: BTreeSet<&str> = here.keys().chain(there.keys()).copied().collect();
        for table in names {
            let (own, other) = (here.get(table), there.get(table));
            let (Some(own), Some(other)) = (own, other) else {
                let (missing, has) = if own.is_none() { (self.name(), peer) } else { (peer, self.name()) };
                let database = &self.config.database;
                let mut finding = Finding::error("table_missing", missing)
                    .peer(has)
                    .about(table)
                    .found(format!("it is on {has} only: the first row of it stops replication to {missing}"))
                    .needed("the same tables on all nodes; then stillebot-agent refresh");
                finding.node = has.to_owned();
                finding = finding.shell(format!("pg_dump --schema-only --table={} {database}", shell_word(table)));
                finding.node = missing.to_owned();
                finding.peer = Some(has.to_owned());
                out.push(finding);
                continue;
            };
            let (harmful, differences) = differences(own, other, self.name(), peer);
            if !differences.is_empty() {
                let subject = "table_differs";
                let finding =
                    if harmful { Finding::error(subject, self.name()) } else { Finding::warning(subject, self.name()) };
                out.push(
                    finding
                        .peer(peer)
                        .about(table)
                        .found(some(&differences.iter().map(String::as_str).collect::<Vec<_>>()))
                        .needed("the same columns, keys and replica identity on all nodes"),
                );
            }
        }
    }

    /// Keys that sequences give on both nodes, so that two new rows get the same one.
    fn sequences(&self, peer: &str, survey: &Survey, out: &mut Vec<Finding>) {
        let there: BTreeMap<&str, &Table> = survey.tables.iter().map(|table| (table.name.as_str(), table)).collect();
        for table in &self.survey.tables {
            let Some(other) = there.get(table.name.as_str()) else { continue };
            let in_key = |column: &&Column| table.keys.iter().any(|key| key.columns.contains(&column.name));
            for column in table.columns.iter().filter(in_key) {
                let twin = other.columns.iter().find(|twin| twin.name == column.name);
                let (Some(own), Some(its)) = (&column.sequence, twin.and_then(|twin| twin.sequence.as_ref())) else {
                    continue;
                };
                if !collide(series(own), series(its)) {
                    continue;
                }
                out.push(
                    Finding::warning("sequence_key", self.name())
                        .peer(peer)
                        .about(format!("{}.{}", table.name, column.name))
                        .found(format!("both nodes take values from {}, and come to the same ones", own.name))
                        .needed("keys that nodes make without each other: uuid, or another residue on each node")
                        .shell("stillebot-agent sequences stride"),
                );
            }
        }
    }

    // ---- subscriptions ----

    fn subscriptions(&self, out: &mut Vec<Finding>) {
        for publisher in self.peers() {
            let subscription = self.config.subscription_to(&publisher.name);
            let wanted = Conninfo::wanted(self.config, self.node, publisher);
            match self.survey.subscriptions.iter().find(|found| found.name == subscription) {
                Some(found) => {
                    let before = out.len();
                    self.options(found, publisher, out);
                    self.connection(found, publisher, &wanted, out);
                    if out.len() == before {
                        let finding =
                            Finding::ok("subscription", self.name()).peer(&publisher.name).about(subscription);
                        out.push(finding.found("as it should be").needed("as the configuration has it"));
                    }
                }
                None => {
                    let slot = self.config.slot(&publisher.name, self.name());
                    let slot = if slot == subscription { String::new() } else { format!(", slot_name = {slot}") };
                    out.push(
                        Finding::error("subscription", self.name())
                            .peer(&publisher.name)
                            .about(&subscription)
                            .found("there is none")
                            .needed(format!("one to {}; with copy_data on a node without data", publisher.name))
                            .sql(format!(
                                "create subscription {} connection {} publication {} with (origin = none, streaming = on, \
                                 copy_data = false{slot})",
                                name(&subscription),
                                literal(&wanted.to_string()),
                                name(&self.config.publication),
                            )),
                    );
                }
            }
        }
        // What comes in twice collides with itself.
        let known: Vec<String> = self.peers().map(|peer| self.config.subscription_to(&peer.name)).collect();
        for stray in self.survey.subscriptions.iter().filter(|found| !known.contains(&found.name)) {
            out.push(
                Finding::warning("subscription_unknown", self.name())
                    .about(&stray.name)
                    .found(format!(
                        "a subscription that no node of the configuration has, to {}",
                        stray.publications.join(", ")
                    ))
                    .needed("to be known, or to be dropped")
                    .sql(format!("drop subscription {}", name(&stray.name)))
                    .person(),
            );
        }
    }

    fn options(&self, found: &Subscription, publisher: &Node, out: &mut Vec<Finding>) {
        let alter = format!("alter subscription {}", name(&found.name));
        let finding =
            |subject, verdict| Finding::new(subject, self.name(), verdict).peer(&publisher.name).about(&found.name);
        if !found.enabled {
            let disabled = finding("subscription_enabled", Verdict::Error).found("disabled").needed("enabled");
            out.push(match found.slot {
                Some(_) => disabled.sql(format!("{alter} enable")),
                None => disabled,
            });
        }
        if found.origin != "none" {
            out.push(
                finding("subscription_origin", Verdict::Error)
                    .found(format!("origin = {}: what comes in goes back to where it came from", found.origin))
                    .needed("origin = none")
                    .sql(format!("{alter} set (origin = none)")),
            );
        }
        if found.streaming == "parallel" {
            out.push(
                finding("subscription_streaming", Verdict::Error)
                    .found("streaming = parallel: conflicts are seen without their rows, and no hop is possible")
                    .needed("streaming = on")
                    .sql(format!("{alter} set (streaming = on)")),
            );
        }
        if found.disable_on_error {
            out.push(
                finding("subscription_disable_on_error", Verdict::Warning)
                    .found("disable_on_error = true: any lost connection ends replication")
                    .needed("disable_on_error = false")
                    .sql(format!("{alter} set (disable_on_error = false)")),
            );
        }
        if found.publications != [self.config.publication.clone()] {
            out.push(
                finding("subscription_publication", Verdict::Error)
                    .found(found.publications.join(", "))
                    .needed(&self.config.publication)
                    .sql(format!(
                        "{alter} set publication {} with (copy_data = false{})",
                        name(&self.config.publication),
                        if found.enabled { "" } else { ", refresh = false" }
                    )),
            );
        }
        if found.slot.is_none() {
            let slot = self.config.slot(&publisher.name, self.name());
            out.push(
                finding("subscription_slot", Verdict::Error)
                    .found("without slot")
                    .needed(format!("slot {slot} on {}", publisher.name))
                    .sql(format!("{alter} set (slot_name = {})", name(&slot)))
                    .person(),
            );
        }
        if found.copying > 0 {
            out.push(
                finding("subscription_copying", Verdict::Warning)
                    .found(format!("{} tables are still being copied", found.copying))
                    .needed("all tables copied: wait for it"),
            );
        }
    }

    /// What it connects with, against what the configuration says.
    fn connection(&self, found: &Subscription, publisher: &Node, wanted: &Conninfo, out: &mut Vec<Finding>) {
        let subject = "subscription_connection";
        let finding = |verdict| Finding::new(subject, self.name(), verdict).peer(&publisher.name).about(&found.name);
        let statement = format!("alter subscription {} connection {}", name(&found.name), literal(&wanted.to_string()));
        let Some(connections) = &self.survey.connections else {
            // An extension that is not there, or too old, is told of.
            if self.survey.about.extension.is_some()
                && self.survey.about.extension == self.survey.about.extension_available
            {
                let grant = format!("grant execute on function multihome.connections() to {}", name(&self.config.user));
                out.push(
                    finding(Verdict::Unknown)
                        .found("the agent's role does not see what it connects with")
                        .needed(wanted.to_string())
                        .sql(grant),
                );
            }
            return;
        };
        let Some(text) = connections.get(&found.name) else { return };
        let parsed = match Conninfo::parse(text) {
            Ok(parsed) => parsed,
            Err(why) => {
                let unread = finding(Verdict::Warning).found(format!("not read: {why}")).needed(wanted.to_string());
                out.push(unread.sql(statement).person());
                return;
            }
        };
        let (verdict, differing) = compare_conninfo(&parsed, wanted);
        if differing.is_empty() {
            return;
        }
        let differing: Vec<&str> = differing.iter().map(String::as_str).collect();
        let finding = finding(verdict).found(differing.join(" ")).needed(wanted.to_string()).sql(statement);
        // The password is not known here, so the statement would lose it.
        let keeps_password = SECRETS.iter().any(|keyword| parsed.get(keyword).is_some());
        out.push(if keeps_password { finding.person() } else { finding });
    }

    // ---- slots ----

    fn slots(&self, out: &mut Vec<Finding>) {
        let mut read = BTreeMap::new();
        for subscriber in self.peers() {
            let Some(survey) = self.seen.surveys.get(&subscriber.name) else { continue };
            let subscription = self.config.subscription_to(self.name());
            let Some(found) = survey.subscriptions.iter().find(|found| found.name == subscription) else { continue };
            let Some(slot) = found.slot.as_deref() else { continue };
            let finding = |verdict| Finding::new("slot", self.name(), verdict).peer(&subscriber.name).about(slot);
            if let Some(other) = read.insert(slot, subscriber.name.as_str()) {
                let found = format!("{other} and {} read the same slot", subscriber.name);
                out.push(finding(Verdict::Error).found(found).needed("a slot for each of them"));
                continue;
            }
            let needed = "a slot that has all WAL that its reader needs";
            out.push(match self.survey.slots.iter().find(|found| found.here && found.name == slot) {
                None => finding(Verdict::Error)
                    .found("there is no such slot: what was written meanwhile is lost to the peer")
                    .needed("the subscription made anew, with its data copied anew"),
                Some(found) => {
                    let kept = format!("{} of WAL kept", Size(found.kept.unwrap_or_default()));
                    match found.wal_status.as_deref() {
                        Some("lost") => finding(Verdict::Error)
                            .found("it has lost WAL that its reader needs: broken for good")
                            .needed("the subscription made anew, with its data copied anew"),
                        Some("unreserved") => finding(Verdict::Warning)
                            .found(format!("{kept}, more than max_slot_wal_keep_size: it is about to be lost"))
                            .needed(needed),
                        _ => finding(Verdict::Ok).found(kept).needed(needed),
                    }
                }
            });
        }
        // Only if everybody has been asked who reads what.
        if self.peers().all(|peer| self.seen.surveys.contains_key(&peer.name)) {
            let stray =
                |slot: &&crate::survey::Slot| slot.here && !slot.active && !read.contains_key(slot.name.as_str());
            for slot in self.survey.slots.iter().filter(stray) {
                out.push(
                    Finding::warning("slot_unused", self.name())
                        .about(&slot.name)
                        .found(format!("nobody reads it, and it keeps {} of WAL", Size(slot.kept.unwrap_or_default())))
                        .needed("a reader, or to be dropped")
                        .sql(format!("select pg_catalog.pg_drop_replication_slot({})", literal(&slot.name)))
                        .person(),
                );
            }
        }
    }

    // ---- two nodes ----

    fn alike(&self, out: &mut Vec<Finding>) {
        let own = &self.survey.about;
        for (peer, survey) in self.later() {
            let other = &survey.about;
            if (own.started_us, own.database_oid) == (other.started_us, other.database_oid) {
                out.push(
                    Finding::error("same_database", self.name())
                        .peer(peer)
                        .found(format!("{} and {peer} are the same database", self.name()))
                        .needed("another server behind each name: check node.host and node.port"),
                );
            }
            let differing: Vec<String> = [
                ("provider", Some(&own.provider), Some(&other.provider)),
                ("lc_collate", Some(&own.collate), Some(&other.collate)),
                ("lc_ctype", Some(&own.ctype), Some(&other.ctype)),
                ("locale", own.locale.as_ref(), other.locale.as_ref()),
            ]
            .into_iter()
            .filter(|(_, own, other)| own != other)
            .map(|(what, own, other)| {
                let none = "none".to_owned();
                format!("{what}: {} here, {} on {peer}", own.unwrap_or(&none), other.unwrap_or(&none))
            })
            .collect();
            let collate = if differing.is_empty() {
                Finding::ok("collation", self.name()).found(&own.collate)
            } else {
                // What is unique and how rows are ordered may then differ, but replication works.
                Finding::warning("collation", self.name()).found(differing.join("; "))
            };
            out.push(collate.peer(peer).needed("the same on both, which is decided when a database is created"));
            let encoding = if own.encoding == other.encoding {
                Finding::ok("encoding", self.name()).found(&own.encoding)
            } else {
                let found = format!("{} here, {} on {peer}", own.encoding, other.encoding);
                Finding::error("encoding", self.name()).found(found)
            };
            out.push(encoding.peer(peer).needed("the same on both, which is decided when a database is created"));
            if let (Some(own), Some(other)) = (self.survey.clock, survey.clock) {
                let (skew, doubt) = (other.offset - own.offset, own.uncertainty + other.uncertainty);
                let finding = if skew.abs() - doubt >= SKEW_BOUND_US {
                    Finding::warning("clock", self.name())
                } else if doubt >= SKEW_BOUND_US && skew.abs() + doubt >= SKEW_BOUND_US {
                    Finding::unknown("clock", self.name())
                } else {
                    Finding::ok("clock", self.name())
                };
                let which = if skew >= 0.0 { "ahead" } else { "behind" };
                out.push(
                    finding
                        .peer(peer)
                        .found(format!("{peer} is {:.1} ms {which} (± {:.1} ms)", skew.abs() / 1000.0, doubt / 1000.0))
                        .needed("less than 500 ms: the newest version of a row is known by the clocks; use NTP"),
                );
            }
        }
    }
}

// ---- addresses ----

/// Whether the addresses of a node's names answer. Names are resolved here; what the servers make of them is not seen.
fn addresses(seen: &Seen<'_>, node: &Node) -> Vec<Finding> {
    let places = seen.places.get(&node.name).into_iter().flatten();
    places.map(|place| if place.for_subscriptions { for_peers(node, place) } else { for_agent(node, place) }).collect()
}

fn for_peers(node: &Node, place: &Place) -> Finding {
    let finding = |verdict| Finding::new("replication_addresses", &node.name, verdict).about(&place.host);
    let needed = "addresses that answer; as resolved here, for the servers' own resolvers cannot be asked";
    let answers = match &place.answers {
        Ok(answers) => answers,
        Err(error) => return finding(Verdict::Error).found(format!("cannot resolve the name: {error}")).needed(needed),
    };
    let found = told(answers);
    let silent = answers.iter().filter(|(_, answer)| *answer == Answer::Silent).count();
    let listening = answers.iter().any(|(_, answer)| *answer == Answer::Listens);
    match (silent, listening) {
        (0, true) => finding(Verdict::Ok).found(found).needed(needed),
        (_, false) => {
            let needed = "a name under [node.replication] that peers reach; they may see what cannot be seen from here";
            finding(Verdict::Warning).found(found).needed(needed)
        }
        (silent, true) => {
            let bound = Conninfo::patience().as_secs() as usize * silent;
            let good: Vec<String> = answers
                .iter()
                .filter(|(_, answer)| *answer == Answer::Listens)
                .map(|(address, _)| address.ip().to_string())
                .collect();
            let found = format!("{found}: subscriptions may lose {bound} s at each connect");
            let needed =
                format!("host under [node.replication] of {}: a name that has only {}", node.name, good.join(", "));
            finding(Verdict::Warning).found(found).needed(needed)
        }
    }
}

fn for_agent(node: &Node, place: &Place) -> Finding {
    let finding = |verdict| Finding::new("agent_addresses", &node.name, verdict).about(&place.host);
    let needed = "addresses that answer";
    let answers = match &place.answers {
        Ok(answers) => answers,
        Err(error) => return finding(Verdict::Error).found(format!("cannot resolve the name: {error}")).needed(needed),
    };
    let used: Vec<(SocketAddr, Answer)> =
        answers.iter().filter(|(address, _)| node.family.admits(address.ip())).cloned().collect();
    let found = told(&used);
    let listens = |family: Family| {
        answers.iter().any(|(address, answer)| family.admits(address.ip()) && *answer == Answer::Listens)
    };
    if !listens(node.family) {
        return finding(Verdict::Error).found(found).needed(needed);
    }
    if used.iter().all(|(_, answer)| *answer != Answer::Silent) {
        return finding(Verdict::Ok).found(found).needed(needed);
    }
    let found = format!("{found}: the agent may lose {} s at each connect", ADDRESS_BOUND.as_secs());
    let dead =
        |family: Family| used.iter().any(|(address, answer)| family.admits(address.ip()) && *answer == Answer::Silent);
    let needed = match (dead(Family::Ipv4), dead(Family::Ipv6)) {
        (false, true) => "family = \"ipv4\" for this node in agent.toml",
        (true, false) => "family = \"ipv6\" for this node in agent.toml",
        _ => needed,
    };
    finding(Verdict::Warning).found(found).needed(needed)
}

fn told(answers: &[(SocketAddr, Answer)]) -> String {
    if answers.is_empty() {
        return "no address of the wanted family".into();
    }
    let one = |(address, answer): &(SocketAddr, Answer)| match answer {
        Answer::Listens => format!("{} answers", address.ip()),
        Answer::Refuses(what) => format!("{} says no ({what})", address.ip()),
        Answer::Silent => format!("{} does not answer within {} s", address.ip(), ADDRESS_BOUND.as_secs()),
    };
    answers.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

// ---- what differs ----

/// What is different about two tables of one name; and whether it stops replication, rather than perhaps.
fn differences(own: &Table, other: &Table, here: &str, there: &str) -> (bool, Vec<String>) {
    let mut harmful = false;
    let mut all = Vec::new();
    let find = |table: &Table, column: &str| table.columns.iter().find(|found| found.name == column).cloned();
    let names: BTreeSet<&String> = own.columns.iter().chain(&other.columns).map(|column| &column.name).collect();
    for column in names {
        match (find(own, column), find(other, column)) {
            (Some(own), Some(other)) => {
                if own.kind != other.kind {
                    harmful = true;
                    all.push(format!("{column} is {} on {here}, {} on {there}", own.kind, other.kind));
                }
                for (what, own, other) in [
                    ("not null", own.not_null, other.not_null),
                    ("generated", own.generated, other.generated),
                    ("generated always as identity", own.always, other.always),
                ] {
                    if own != other {
                        all.push(format!("{column} is {what} on {} only", if own { here } else { there }));
                    }
                }
            }
            (own, _) => {
                harmful = true;
                all.push(format!("{column} is on {} only", if own.is_some() { here } else { there }));
            }
        }
    }
    let rules = |table: &Table| table.keys.iter().map(|key| key.rule.clone()).collect::<BTreeSet<_>>();
    let (ours, theirs) = (rules(own), rules(other));
    for (only, node) in [(ours.difference(&theirs), here), (theirs.difference(&ours), there)] {
        for rule in only {
            // What one node takes, the other refuses.
            harmful = true;
            all.push(format!("unique ({rule}) is on {node} only"));
        }
    }
    for key in &own.keys {
        let twin = other.keys.iter().find(|twin| twin.rule == key.rule);
        if let Some(twin) = twin.filter(|twin| twin.deferrable != key.deferrable) {
            let node = if twin.deferrable { there } else { here };
            all.push(format!("unique ({}) is deferrable on {node} only", key.rule));
        }
    }
    let identity = |table: &Table| match table.identity_columns.as_slice() {
        [] => table.identity.clone(),
        columns => format!("({})", columns.join(", ")),
    };
    let (ours, theirs) = (identity(own), identity(other));
    if ours != theirs {
        // A node finds the rows of the other by its own identity, if what comes has those columns; FULL has all.
        harmful |= ours != "full" && theirs != "full";
        all.push(format!("replica identity is {ours} on {here}, {theirs} on {there}"));
    }
    if own.partitioned != other.partitioned {
        all.push(format!("partitioned on {} only", if own.partitioned { here } else { there }));
    }
    (harmful, all)
}

/// The values a sequence comes to. Where the last one is not seen, the first one speaks for it.
fn series(sequence: &Sequence) -> Series {
    let Sequence { increment, least, most, .. } = *sequence;
    Series { increment, least, most, next: i128::from(sequence.last.unwrap_or(sequence.start)) }
}

/// The keywords whose values are not as wanted, as found; and how bad the worst of it is.
fn compare_conninfo(found: &Conninfo, wanted: &Conninfo) -> (Verdict, Vec<String>) {
    let mut verdict = Verdict::Warning;
    let mut differing = Vec::new();
    for keyword in [
        "host",
        "port",
        "dbname",
        "user",
        "sslmode",
        "sslrootcert",
        "sslcert",
        "sslkey",
        "passfile",
        "tcp_user_timeout",
    ] {
        let default = match keyword {
            "port" => Some("5432"),
            "sslmode" => Some("prefer"),
            _ => None,
        };
        let own = found.get(keyword).or(default);
        let right = wanted.get(keyword).or(default);
        // Paths that the configuration does not name may be the server's business.
        let matters = wanted.get(keyword).is_some();
        if matters && own != right {
            // Somewhere else, or somebody who cannot be told from another.
            let weaker = keyword == "sslmode" && own != Some("verify-full") && right == Some("verify-full");
            if weaker || matches!(keyword, "host" | "port" | "dbname") {
                verdict = Verdict::Error;
            }
            differing.push(match own {
                Some(own) => format!("{keyword}={own}"),
                None => format!("{keyword} is missing;"),
            });
        }
    }
    if found.get("hostaddr").is_some() {
        differing.push("hostaddr is set".into());
    }
    (verdict, differing)
}

/// A few of many.
fn some(all: &[&str]) -> String {
    let shown = all.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    if all.len() > SHOWN { format!("{shown}, and {} more", all.len() - SHOWN) } else { shown }
}

fn shell_word(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::config::Environment;
    use crate::hba::Mapping;
    use crate::hba::tests::rule;
    use crate::survey::{About, Identity, Publication, Role, Setting, Slot};

    fn config(change: impl Fn(String) -> String) -> Config {
        let text = r#"
            database = "app"
            user = "agent"
            [replication]
            root = "/r"
            cert = "/c"
            key = "/k"
            [[node]]
            name = "a"
            host = "a.example.net"
            [[node]]
            name = "b"
            host = "b.example.net"
        "#;
        Config::parse(&change(text.to_owned()), &Environment { variable: &|_| None, os_user: None }).unwrap()
    }

    fn role(name: &str, replication: bool) -> (String, Role) {
        let groups = BTreeSet::from([name.to_owned()]);
        let role = Role { name: name.into(), login: true, replication, reads_all: true, groups, ..Role::default() };
        (name.to_owned(), role)
    }

    fn table(name: &str) -> Table {
        let (name_of, rule) = ("t_pkey".to_owned(), "id".to_owned());
        let key = Key { name: name_of, primary: true, fit: true, columns: vec!["id".into()], rule, ..Key::default() };
        let id = Column { name: "id".into(), kind: "uuid".into(), not_null: true, ..Column::default() };
        Table {
            name: name.into(),
            readable: Some(true),
            identity: "default".into(),
            has_identity: true,
            identity_columns: vec!["id".into()],
            keys: vec![key],
            columns: vec![id],
            ..Table::default()
        }
    }

    fn mapping(map: &str, role: &str) -> Mapping {
        let some = |text: &str| Some(text.to_owned());
        Mapping { map: some(map), user: some("x.example.net"), role: some(role), ..Mapping::default() }
    }

    /// A node of [`config`] that is as it should be.
    fn good(config: &Config, name: &str) -> Survey {
        let settings = [
            ("wal_level", "logical"),
            ("track_commit_timestamp", "on"),
            ("ssl", "on"),
            ("listen_addresses", "*"),
            ("shared_preload_libraries", "stillebot"),
            ("max_replication_slots", "10"),
            ("max_wal_senders", "10"),
            ("max_logical_replication_workers", "4"),
            ("max_sync_workers_per_subscription", "2"),
            ("max_parallel_workers", "8"),
            ("max_worker_processes", "16"),
            ("max_slot_wal_keep_size", "1024"),
            ("stillebot.node", name),
            ("hba_file", "/hba"),
            ("ident_file", "/ident"),
            ("ssl_ca_file", "/r"),
        ];
        let setting = |(name, value): (&str, &str)| {
            let restart = name.starts_with("max_w") || name == "wal_level" || name.ends_with("libraries");
            let setting = Setting { name: name.into(), value: value.into(), restart, ..Setting::default() };
            (name.to_owned(), setting)
        };
        let node = config.node(name).unwrap();
        let peer = config.nodes.iter().find(|peer| peer.name != name).unwrap();
        let all = |name: &str| Publication {
            name: name.into(),
            all_tables: true,
            inserts: true,
            updates: true,
            deletes: true,
            truncates: true,
        };
        Survey {
            about: About {
                version: "17.2".into(),
                version_num: 17_00_02,
                encoding: "UTF8".into(),
                collate: "C".into(),
                extension: Some("1".into()),
                extension_available: Some("1".into()),
                started_us: if name == "a" { 1 } else { 2 },
                client: Some("198.51.100.1".into()),
                client_tls: Some(true),
                ..About::default()
            },
            settings: settings.into_iter().map(setting).collect(),
            roles: BTreeMap::from([role("replicator", true), role("agent", false)]),
            rules: Some(vec![rule("local all all peer"), rule("hostssl app replicator,agent all cert map=m")]),
            mappings: Some(["replicator", "agent"].map(|role| mapping("m", role)).to_vec()),
            tables: vec![table("app.t")],
            free: Some(1 << 40),
            publications: vec![all("multihome")],
            subscriptions: vec![Subscription {
                name: "multihome".into(),
                enabled: true,
                origin: "none".into(),
                streaming: "on".into(),
                slot: Some("multihome".into()),
                publications: vec!["multihome".into()],
                ..Subscription::default()
            }],
            connections: Some(BTreeMap::from([(
                "multihome".to_owned(),
                Conninfo::wanted(config, node, peer).to_string(),
            )])),
            slots: vec![Slot {
                name: "multihome".into(),
                here: true,
                active: true,
                unmade: false,
                unread: false,
                wal_status: Some("reserved".into()),
                kept: Some(1000),
                reader: Some("192.0.2.9".into()),
            }],
            clock: Some(Clock { offset: 0.0, uncertainty: 100.0 }),
            ..Survey::default()
        }
    }

    /// What is not well with the pair after a change to node a, in the form `node verdict subject`.
    fn after(change: impl Fn(&mut Survey)) -> Vec<Finding> {
        let config = config(|text| text);
        let mut surveys: BTreeMap<String, Survey> =
            ["a", "b"].into_iter().map(|name| (name.to_owned(), good(&config, name))).collect();
        change(surveys.get_mut("a").unwrap());
        let seen = Seen { config: &config, surveys: &surveys, places: &BTreeMap::new() };
        findings(&seen).into_iter().filter(|finding| finding.verdict > Verdict::Ok).collect()
    }

    fn set(survey: &mut Survey, name: &str, value: &str) {
        survey.settings.get_mut(name).unwrap().value = value.into();
    }

    fn one(change: impl Fn(&mut Survey)) -> (String, Vec<String>) {
        let found = after(change);
        assert_eq!(found.len(), 1, "{found:#?}");
        let remedy = found[0].remedy.iter().map(|remedy| match remedy {
            Remedy::Sql { statement, .. } => statement.clone(),
            Remedy::File { line, .. } => line.clone(),
            Remedy::Shell { command, .. } => command.clone(),
            Remedy::Restart { .. } => "restart".to_owned(),
        });
        (format!("{} {} {}", found[0].node, found[0].verdict.word(), found[0].subject), remedy.collect())
    }

    #[test]
    fn a_good_pair_has_nothing_to_be_said_about() {
        assert_eq!(after(|_| {}), []);
    }

    #[test]
    fn settings_come_with_the_statement_and_with_what_puts_it_in_force() {
        let (line, remedy) = one(|a| set(a, "wal_level", "replica"));
        assert_eq!(line, "a error wal_level");
        assert_eq!(remedy, ["alter system set wal_level = 'logical'", "restart"]);
        let (line, remedy) = one(|a| set(a, "ssl", "off"));
        assert_eq!(line, "a error ssl");
        assert_eq!(remedy, ["alter system set ssl = 'on'", RELOAD]);
        let (line, remedy) = one(|a| set(a, "shared_preload_libraries", "pg_stat_statements, \"other\""));
        assert_eq!(line, "a error shared_preload_libraries");
        assert_eq!(
            remedy,
            ["alter system set shared_preload_libraries = 'pg_stat_statements', 'other', 'stillebot'", "restart"]
        );
        // What was given on the command line can be changed there only.
        let (line, remedy) = one(|a| {
            set(a, "wal_level", "replica");
            a.settings.get_mut("wal_level").unwrap().on_command_line = true;
        });
        assert_eq!((line.as_str(), remedy.len()), ("a error wal_level", 0));
        // What the role does not see is not known to be wrong.
        let (line, remedy) = one(|a| drop(a.settings.remove("shared_preload_libraries")));
        assert_eq!(line, "a unknown shared_preload_libraries");
        assert_eq!(remedy, ["grant pg_monitor to agent"]);
    }

    #[test]
    fn libraries_are_known_by_any_name() {
        for libraries in ["$libdir/stillebot", "a, stillebot.so", "\"stillebot\""] {
            assert_eq!(after(|a| set(a, "shared_preload_libraries", libraries)), [], "{libraries}");
        }
    }

    #[test]
    fn localhost_will_not_do_for_peers_elsewhere() {
        assert_eq!(after(|a| set(a, "listen_addresses", "localhost, 192.0.2.1")), []);
        for addresses in ["localhost", "127.0.0.1, ::1", ""] {
            let (line, remedy) = one(|a| set(a, "listen_addresses", addresses));
            assert_eq!(
                (line.as_str(), remedy[0].as_str()),
                ("a error listen_addresses", "alter system set listen_addresses = '*'")
            );
        }
    }

    #[test]
    fn places_are_counted_with_what_others_take() {
        for (setting, value, verdict) in [
            ("max_replication_slots", "3", None),
            ("max_replication_slots", "2", Some("warning")),
            ("max_replication_slots", "0", Some("error")),
            ("max_wal_senders", "3", None),
            ("max_wal_senders", "1", Some("warning")),
            ("max_wal_senders", "0", Some("error")),
            ("max_logical_replication_workers", "3", None),
            ("max_logical_replication_workers", "2", Some("warning")),
            ("max_logical_replication_workers", "0", Some("error")),
            ("max_worker_processes", "15", None),
            ("max_worker_processes", "14", Some("warning")),
            ("max_worker_processes", "4", Some("warning")),
            ("max_worker_processes", "3", Some("error")),
        ] {
            let found = after(|a| set(a, setting, value));
            let lines: Vec<_> = found.iter().map(|finding| (finding.subject, finding.verdict.word())).collect();
            assert_eq!(
                lines,
                verdict.map(|verdict| (setting, verdict)).into_iter().collect::<Vec<_>>(),
                "{setting} {value}"
            );
        }
        let (line, remedy) = one(|a| a.about.other_senders = 8);
        assert_eq!(
            (line.as_str(), remedy[0].as_str()),
            ("a warning max_wal_senders", "alter system set max_wal_senders = 11")
        );
        let (line, _) = one(|a| a.about.other_slots = 10);
        assert_eq!(line, "a error max_replication_slots");
    }

    #[test]
    fn who_is_turned_away_gets_a_line_before_the_one_that_does_it() {
        let found = after(|a| {
            a.rules.as_mut().unwrap().insert(0, rule("hostssl all replicator 192.0.2.0/255.255.255.0 reject"))
        });
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(
            found[0].remedy[0],
            Remedy::File {
                node: "a".into(),
                path: "/pg_hba.conf".into(),
                line: "hostssl app replicator all cert".into(),
                instead_of: None,
                before: Some(1),
            }
        );
        assert_eq!(found[0].mends, Some(Mends::File));
        // From elsewhere that line does not matter; and where a peer comes from may not be known.
        assert_eq!(
            after(|a| a
                .rules
                .as_mut()
                .unwrap()
                .insert(0, rule("hostssl all replicator 203.0.113.0/255.255.255.0 reject"))),
            []
        );
        assert_eq!(one(|a| a.slots[0].reader = None).0, "a unknown pg_hba_replication");
        let rules = || Some(vec![rule("local all all peer"), rule("hostssl app replicator all cert")]);
        let (line, remedy) = one(|a| a.rules = rules());
        assert_eq!(
            (line.as_str(), remedy[0].as_str()),
            ("a error pg_hba_agent", "hostssl app agent all scram-sha-256")
        );
    }

    #[test]
    fn a_line_with_a_map_needs_a_line_of_the_map() {
        let (line, remedy) = one(|a| a.mappings = Some(vec![mapping("m", "agent"), mapping("n", "replicator")]));
        assert_eq!(line, "a error pg_hba_replication");
        assert_eq!(remedy, ["m b.example.net replicator", RELOAD]);
        let found = after(|a| a.mappings = None);
        assert_eq!(found.iter().map(|finding| finding.verdict).collect::<Vec<_>>(), [Verdict::Unknown; 2]);
        assert!(found.iter().all(|finding| finding.mends == Some(Mends::Sql)), "{found:#?}");
        // Without map= the name is the role.
        let plain = |a: &mut Survey| {
            a.mappings = Some(Vec::new());
            a.rules = Some(vec![rule("local all all peer"), rule("hostssl app replicator,agent all cert")]);
        };
        assert_eq!(after(plain), []);
        let broken = Mapping { line: 7, error: Some("no".into()), ..Mapping::default() };
        assert_eq!(one(|a| a.mappings.as_mut().unwrap().push(broken.clone())).0, "a error pg_ident_line");
    }

    #[test]
    fn certificates_need_a_root_to_be_verified_with() {
        let (line, remedy) = one(|a| set(a, "ssl_ca_file", ""));
        assert_eq!(line, "a error ssl_ca_file");
        assert_eq!(remedy, ["alter system set ssl_ca_file = '/r'", RELOAD]);
        assert_eq!(one(|a| drop(a.settings.remove("ssl_ca_file"))).0, "a unknown ssl_ca_file");
        let by_password = |a: &mut Survey| {
            set(a, "ssl_ca_file", "");
            a.rules = Some(vec![rule("local all all peer"), rule("hostssl app replicator,agent all scram-sha-256")]);
        };
        assert_eq!(after(by_password), []);
    }

    #[test]
    fn lines_that_let_in_too_many_are_told_of_whatever_they_are_about() {
        let with = |text: &str| after(|a| a.rules.as_mut().unwrap().push(rule(text)));
        let lines =
            |text: &str| with(text).iter().map(|f| format!("{} {}", f.verdict.word(), f.subject)).collect::<Vec<_>>();
        assert_eq!(lines("local replication all trust"), ["error pg_hba_line"]);
        assert_eq!(lines("local other all md5"), ["warning pg_hba_line"]);
        assert_eq!(lines("local other all scram-sha-256"), [""; 0]);
        assert_eq!(lines("local app all scram-sha-256"), ["warning pg_hba_line"]);
        assert_eq!(lines("hostssl app all all cert"), ["warning pg_hba_line"]);
        assert_eq!(lines("hostssl all rosuav 0.0.0.0/0.0.0.0 cert"), ["warning pg_hba_line"]);
        assert_eq!(lines("hostssl all all 192.0.2.0/255.255.255.0 cert"), [""; 0]);
        let found = with("hostssl all all all cert");
        let Remedy::File { line, .. } = &found[0].remedy[0] else { panic!("{found:#?}") };
        assert_eq!(line, "hostssl app agent,replicator all cert");
        let (line, remedy) = one(|a| drop(a.rules.as_mut().unwrap().remove(0)));
        assert_eq!((line.as_str(), remedy[0].as_str()), ("a warning pg_hba_local", "local all all peer"));
    }

    #[test]
    fn keys_and_replica_identities_are_compared() {
        let told = |change: fn(&mut Table)| {
            let found = after(|a| change(&mut a.tables[0]));
            assert_eq!(found.len(), 1, "{found:#?}");
            (found[0].verdict, found[0].found.clone())
        };
        assert_eq!(
            told(|t| t.keys.push(Key { rule: "lower(name) where active".into(), ..Key::default() })),
            (Verdict::Error, "unique (lower(name) where active) is on a only".into())
        );
        assert_eq!(
            told(|t| t.keys[0].deferrable = true),
            (Verdict::Warning, "unique (id) is deferrable on a only".into())
        );
        assert_eq!(
            told(|t| t.identity_columns = vec!["other".into()]),
            (Verdict::Error, "replica identity is (other) on a, (id) on b".into())
        );
        assert_eq!(
            told(|t| (t.identity, t.identity_columns) = ("full".into(), Vec::new())),
            (Verdict::Warning, "replica identity is full on a, (id) on b".into())
        );
        let bigint = told(|t| t.columns[0].kind = "bigint".into());
        assert_eq!(bigint, (Verdict::Error, "id is bigint on a, uuid on b".into()));
    }

    #[test]
    fn what_is_lost_is_told_and_not_mended_by_a_statement() {
        let (line, remedy) = one(|a| a.slots[0].wal_status = Some("lost".into()));
        assert_eq!((line.as_str(), remedy.len()), ("a error slot", 0));
        let missing = after(|a| a.slots.clear());
        assert!(
            missing.iter().any(|finding| finding.subject == "slot" && finding.verdict == Verdict::Error),
            "{missing:#?}"
        );
    }

    #[test]
    fn databases_that_are_not_alike_are_told_once() {
        let lines = |change: fn(&mut Survey)| one(change).0;
        assert_eq!(lines(|a| a.about.encoding = "LATIN1".into()), "a error encoding");
        assert_eq!(lines(|a| a.about.collate = "de_DE.UTF-8".into()), "a warning collation");
        assert_eq!(lines(|a| a.about.locale = Some("de".into())), "a warning collation");
        assert_eq!(lines(|a| a.about.started_us = 2), "a error same_database");
        assert_eq!(
            lines(|a| (a.about.extension, a.about.extension_available) = (Some("2".into()), Some("2".into()))),
            "a warning extension_alike"
        );
    }

    #[test]
    fn clocks_may_differ_by_half_a_second_less_what_is_not_known() {
        let skewed = |offset, uncertainty| after(|a| a.clock = Some(Clock { offset, uncertainty }));
        assert_eq!(skewed(499_000.0, 100.0), []);
        let found = skewed(-600_000.0, 100.0);
        assert_eq!((found[0].verdict, found[0].found.as_str()), (Verdict::Warning, "b is 600.0 ms ahead (± 0.2 ms)"));
        assert_eq!(skewed(100_000.0, 900_000.0)[0].verdict, Verdict::Unknown);
    }

    #[test]
    fn nodes_that_know_each_other_are_told_from_strangers_and_copies() {
        let identity = |node: &str, pair: &str, id: &str| Identity {
            node: node.into(),
            pair: pair.into(),
            id: id.into(),
            ..Identity::default()
        };
        let told = |a: Option<Identity>, b: Option<Identity>| {
            let config = config(|text| text);
            let surveys = [("a", a), ("b", b)].map(|(name, identity)| {
                let mut survey = good(&config, name);
                (survey.about.knows_itself, survey.identity) = (true, identity);
                (name.to_owned(), survey)
            });
            let seen = Seen { config: &config, surveys: &BTreeMap::from(surveys), places: &BTreeMap::new() };
            let found = findings(&seen).into_iter().filter(|finding| finding.verdict > Verdict::Ok);
            found
                .map(|finding| format!("{} {}: {:?}", finding.node, finding.subject, finding.remedy))
                .collect::<Vec<_>>()
        };
        assert_eq!(told(Some(identity("a", "p", "1")), Some(identity("b", "p", "2"))), [""; 0]);
        let one = told(Some(identity("a", "p", "1")), None);
        assert!(one.len() == 1 && one[0].contains("select multihome.identify('b', 'p')"), "{one:?}");
        assert!(told(None, None).iter().all(|line| line.contains("stillebot-agent init")));
        assert!(told(Some(identity("a", "p", "1")), Some(identity("b", "q", "2")))[0].starts_with("a identity_alike"));
        assert!(told(Some(identity("a", "p", "1")), Some(identity("b", "p", "1")))[0].starts_with("a identity_alike"));
        assert!(told(Some(identity("b", "p", "1")), Some(identity("b", "p", "2")))[0].starts_with("a identity: "));
        let copy = Identity { foreign: true, ..identity("a", "p", "1") };
        assert!(told(Some(copy), Some(identity("b", "p", "2")))[0].contains("stillebot_adopt_identity"));
    }

    #[test]
    fn a_connection_is_compared_keyword_by_keyword() {
        let connects = |from: &str, to: &str| {
            one(|a| {
                let text = a.connections.as_mut().unwrap().get_mut("multihome").unwrap();
                let changed = text.replace(from, to);
                assert_ne!(changed, *text);
                *text = changed;
            })
        };
        for (from, to, verdict) in [
            ("host=b.example.net", "host=a.example.net", "error"),
            ("port=5432", "port=5433", "error"),
            ("sslmode=verify-full", "sslmode=require", "error"),
            ("sslmode=verify-full ", "", "error"),
            ("sslkey=/k", "sslkey=/other", "warning"),
            ("tcp_user_timeout=5000", "", "warning"),
            ("host=", "hostaddr=192.0.2.1 host=", "warning"),
        ] {
            let (line, remedy) = connects(from, to);
            assert_eq!(line, format!("a {verdict} subscription_connection"), "{from}");
            assert!(
                remedy[0].starts_with("alter subscription multihome connection 'host=b.example.net port=5432 "),
                "{remedy:?}"
            );
        }
        // The order is nobody's business, nor is a default that is not written.
        assert_eq!(
            after(|a| {
                let text = a.connections.as_mut().unwrap().get_mut("multihome").unwrap();
                *text = text.replace("port=5432 ", "") + " keepalives=1";
            }),
            []
        );
    }

    #[test]
    fn dead_addresses_are_told_with_what_they_cost() {
        let config = config(|text| text);
        let surveys = BTreeMap::new();
        let place = |for_subscriptions, answers: &[(&str, Answer)]| Place {
            host: "a.example.net".into(),
            port: 5432,
            for_subscriptions,
            answers: Ok(answers.iter().map(|(address, answer)| (address.parse().unwrap(), answer.clone())).collect()),
        };
        let told = |place: Place| {
            let places = BTreeMap::from([("a".to_owned(), vec![place])]);
            findings(&Seen { config: &config, surveys: &surveys, places: &places }).remove(0)
        };
        let (v4, v6) = ("192.0.2.1:5432", "[2001:db8::1]:5432");
        let finding = told(place(true, &[(v6, Answer::Silent), (v4, Answer::Listens)]));
        assert_eq!(finding.verdict, Verdict::Warning);
        assert_eq!(
            finding.found,
            "2001:db8::1 does not answer within 1 s, 192.0.2.1 answers: subscriptions may lose 5 s at each connect"
        );
        assert!(finding.needed.ends_with("a name that has only 192.0.2.1"), "{}", finding.needed);
        let refuses = Answer::Refuses("refused".into());
        assert_eq!(told(place(true, &[(v6, refuses.clone()), (v4, Answer::Listens)])).verdict, Verdict::Ok);
        assert_eq!(told(place(true, &[(v4, refuses)])).verdict, Verdict::Warning);
        assert_eq!(told(place(false, &[(v6, Answer::Silent), (v4, Answer::Listens)])).verdict, Verdict::Warning);
        assert_eq!(told(place(false, &[(v4, Answer::Silent)])).verdict, Verdict::Error);
    }

    #[test]
    fn an_old_server_is_told_of_and_nothing_else() {
        let old = |a: &mut Survey| {
            *a = Survey {
                about: About { version: "15.9".into(), version_num: 15_00_09, ..About::default() },
                ..Survey::default()
            };
        };
        let found = after(old);
        let of_a: Vec<&str> =
            found.iter().filter(|finding| finding.node == "a").map(|finding| finding.subject).collect();
        assert_eq!(of_a, ["postgresql_version"]);
    }
}
