//! The configuration, `agent.toml`, with the defaults that psql's environment variables give.
//!
//! Deliberately opens no connection and resolves no name; the only file it reads is the one it is given. Holds no secret:
//! passwords and keys are read where a connection is made.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Kind};
use crate::template::Template;

/// Where the configuration is unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/stillebot/agent.toml";
/// Where the agent keeps what it has to remember unless `state` says otherwise.
const DEFAULT_STATE: &str = "/var/lib/stillebot";
/// Who owns the files that PostgreSQL reads unless `certificate.owner` says otherwise.
const SERVER_USER: &str = "postgres";

/// Everything the agent is told, checked and completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Database on every node.
    pub database: String,
    /// Role the agent connects as.
    pub user: String,
    /// Name of the publication on every node.
    pub publication: String,
    /// Name of the subscription with two nodes; with more, what its name begins with.
    pub subscription: String,
    /// How connections are secured.
    pub tls: Tls,
    /// Where the application keeps the name of its active side.
    pub active: Option<Active>,
    /// The nodes, in the order of the file; at least one.
    pub nodes: Vec<Node>,
    /// File of passwords.
    pub passfile: Option<PathBuf>,
    /// When `watch` looks, and when it gives up.
    pub watch: Watch,
    /// What is done about conflicts without asking, in the order of the file.
    pub rules: Vec<Rule>,
    /// What subscriptions connect with.
    pub replication: Replication,
    /// Where renewed certificates go, in the order of the file.
    pub certificates: Vec<Certificate>,
    /// Whose role `schema` acts as; none: it has to be said each time.
    pub schema_role: Option<String>,
    /// Directory of what the agent has to remember: how the last deployment of each certificate ended.
    pub state: PathBuf,
}

/// One place that renewed certificates go to: a pair of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The name of the certificate at the authority's client: its directory under `live/`.
    pub lineage: String,
    /// Who presents it; never empty.
    pub uses: BTreeSet<Use>,
    /// The node on whose host the files are; none: the node of this host.
    pub node: Option<String>,
    /// The certificate and those between it and its root.
    pub cert: PathBuf,
    /// Its key, in the same directory.
    pub key: PathBuf,
    /// The files' owner; none: whoever runs the deployment.
    pub owner: Option<String>,
    /// The files' group; none: the owner's.
    pub group: Option<String>,
    /// The files' mode.
    pub mode: u32,
    /// What the chain has to lead to; none: [`Tls::root`].
    pub root: Option<PathBuf>,
    /// Names and addresses that it has to cover; none: those that the node is reached and verified by.
    pub names: Option<Vec<String>>,
}

/// Who presents a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Use {
    /// The node's server, to its clients.
    Server,
    /// The node's subscriptions, to their publishers.
    Replication,
    /// This agent.
    Agent,
    /// Somebody else.
    Other,
}

/// What the subscriptions of all nodes connect to their publishers with. Paths are the servers', not the agent's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replication {
    /// The role.
    pub user: String,
    /// What is verified.
    pub mode: TlsMode,
    /// `sslrootcert`.
    pub root: Option<PathBuf>,
    /// `sslcert`.
    pub cert: Option<PathBuf>,
    /// `sslkey`.
    pub key: Option<PathBuf>,
    /// `passfile`, where a password takes the certificate's place.
    pub passfile: Option<PathBuf>,
}

/// What is different for one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeReplication {
    /// Where its peers reach it, if that is another name than the agent's.
    pub host: Option<String>,
    /// The port there.
    pub port: Option<u16>,
    /// `sslrootcert` of its own subscriptions.
    pub root: Option<PathBuf>,
    /// `sslcert` of its own subscriptions.
    pub cert: Option<PathBuf>,
    /// `sslkey` of its own subscriptions.
    pub key: Option<PathBuf>,
}

/// libpq's `sslmode`, `sslrootcert`, `sslcert`, `sslkey`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// What is verified.
    pub mode: TlsMode,
    /// Certificates that servers' certificates must be signed by; without it the system's.
    pub root: Option<PathBuf>,
    /// The agent's own certificate, and those between it and its root.
    pub cert: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
}

/// libpq's meanings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    /// Encrypted, signed by the root, and issued for the host.
    #[default]
    VerifyFull,
    /// Encrypted and signed by the root.
    VerifyCa,
    /// Encrypted; with a root, like `verify-ca`, as in libpq.
    Require,
    /// Plain.
    Disable,
}

/// One value of one row that names the application's active side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Active {
    /// The table, quoted for SQL; in schema public unless another is given.
    pub table: String,
    /// The column, quoted for SQL.
    pub column: String,
    /// Schema and name of the table, as they are in the catalog.
    pub place: (String, String),
}

/// One server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Node {
    /// What it is called here, in notes and in subscription names.
    pub name: String,
    /// Host name, address, or socket directory (begins with `/`).
    pub host: String,
    /// Port.
    pub port: u16,
    /// Which addresses of the host are tried.
    pub family: Family,
    /// What goes into [`Active`] when this node is the active side.
    pub active_name: String,
    /// Where it is not reached by, or does not use, what [`Config::replication`] says.
    pub replication: NodeReplication,
    /// The host that is dialled in place of `host`, whose name its certificate still has: the near end of a forwarded port.
    #[serde(skip)]
    pub through: Option<String>,
}

impl Node {
    /// Reached through a socket in the file system.
    pub fn is_local(&self) -> bool {
        self.host.starts_with('/')
    }
}

/// Address families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Whatever the name resolves to, in the resolver's order.
    #[default]
    Any,
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
}

impl Family {
    /// Whether an address is of it.
    pub fn admits(self, address: std::net::IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::Ipv4 => address.is_ipv4(),
            Self::Ipv6 => address.is_ipv6(),
        }
    }
}

/// When `watch` looks, and when it gives up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// The channel that alarms are sent to, for NOTIFY.
    pub channel: Option<String>,
    /// How often it looks.
    pub interval: Duration,
    /// How long replication may be behind without moving before it counts as stalled.
    pub stall: Duration,
    /// How often a rule is tried for one conflict.
    pub attempts: u32,
    /// How often it looks at certificates.
    pub certificates: Duration,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            channel: None,
            interval: Duration::from_secs(5),
            stall: Duration::from_secs(60),
            attempts: 3,
            certificates: Duration::from_secs(3600),
        }
    }
}

/// What is done, without asking, about the conflicts of some tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The tables.
    pub tables: Tables,
    /// What is done.
    pub strategy: Strategy,
    /// Whom to tell afterwards.
    pub notify: Option<Notify>,
}

/// The tables of a rule, named as they are in the catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tables {
    /// Every table, and errors that are of no table.
    All,
    /// All tables of a schema.
    Schema(String),
    /// One table of a schema.
    One(String, String),
}

/// How a rule resolves a conflict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Strategy {
    /// All rows that claim one place are kept, and only the one with the greatest `by` keeps its flag.
    DeactivateOlder {
        /// The boolean column.
        flag: String,
        /// The column that decides.
        by: String,
    },
    /// The version with the greater value wins.
    Newest {
        /// In this column; none: the one committed later.
        by: Option<String>,
    },
    /// The version of this node wins.
    KeepNode(String),
    /// A row that one side has deleted stays away from all.
    LetDeleteWin,
    /// The failing transaction is left out.
    Skip,
    /// It is left for a person.
    Leave,
}

impl Strategy {
    /// Its name, as configured.
    pub fn name(&self) -> &'static str {
        match self {
            Self::DeactivateOlder { .. } => "deactivate-older",
            Self::Newest { .. } => "newest",
            Self::KeepNode(_) => "keep-node",
            Self::LetDeleteWin => "let-delete-win",
            Self::Skip => "skip",
            Self::Leave => "none",
        }
    }
}

/// What is sent to the application, on every node, after a rule has resolved a conflict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notify {
    /// The channel.
    pub channel: String,
    /// The payload, with columns of the winning row in it.
    pub payload: Template,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    database: Option<String>,
    user: Option<String>,
    publication: Option<String>,
    subscription: Option<String>,
    tls: Option<FileTls>,
    active: Option<FileActive>,
    #[serde(default)]
    node: Vec<FileNode>,
    watch: Option<FileWatch>,
    #[serde(default)]
    rule: Vec<FileRule>,
    replication: Option<FileReplication>,
    #[serde(default)]
    certificate: Vec<FileCertificate>,
    schema: Option<FileSchema>,
    state: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSchema {
    role: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileCertificate {
    lineage: String,
    r#use: FileUse,
    node: Option<String>,
    cert: PathBuf,
    key: PathBuf,
    owner: Option<String>,
    group: Option<String>,
    mode: Option<String>,
    root: Option<PathBuf>,
    names: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "must be one or several of \"server\", \"replication\", \"agent\", \"other\"")]
enum FileUse {
    One(Use),
    Several(BTreeSet<Use>),
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct FileReplication {
    user: Option<String>,
    mode: Option<TlsMode>,
    root: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    passfile: Option<PathBuf>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct FileTls {
    mode: Option<TlsMode>,
    root: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileActive {
    table: String,
    column: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileNode {
    name: String,
    host: String,
    #[serde(default = "default_port")]
    port: u16,
    #[serde(default)]
    family: Family,
    active_name: Option<String>,
    #[serde(default)]
    replication: NodeReplication,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct FileWatch {
    channel: Option<String>,
    interval: Option<String>,
    stall: Option<String>,
    attempts: Option<u32>,
    certificates: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    table: String,
    strategy: FileStrategy,
    flag: Option<String>,
    by: Option<String>,
    node: Option<String>,
    notify: Option<FileNotify>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FileStrategy {
    DeactivateOlder,
    Newest,
    KeepNode,
    LetDeleteWin,
    Skip,
    None,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileNotify {
    channel: String,
    payload: String,
}

fn default_port() -> u16 {
    5432
}

/// What the environment says; a type of its own so that tests need not change the process's.
pub struct Environment<'a> {
    /// An environment variable that is set and not empty.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    /// The name of the operating system's user.
    pub os_user: Option<String>,
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::new(Kind::Configuration, format!("cannot read the configuration {}: {error}", path.display()))
                .hint("name the file with --config FILE")
        })?;
        let environment = Environment {
            variable: &|name| std::env::var(name).ok().filter(|value| !value.is_empty()),
            os_user: nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.name),
        };
        Self::parse(&text, &environment)
            .map_err(|flaw| Failure::new(Kind::Configuration, format!("{}: {flaw}", path.display())))
    }

    /// Checks the text of a configuration; the error says which key is wrong and what is allowed.
    pub fn parse(text: &str, environment: &Environment<'_>) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        let variable = environment.variable;
        let path = |name| variable(name).map(PathBuf::from);
        let home = variable("HOME").map(PathBuf::from);

        let user = file
            .user
            .or_else(|| variable("PGUSER"))
            .or_else(|| environment.os_user.clone())
            .ok_or("user: not given, nor is PGUSER")?;
        let database = file.database.or_else(|| variable("PGDATABASE")).unwrap_or_else(|| user.clone());
        for (key, value) in [("user", &user), ("database", &database)] {
            if value.is_empty() {
                return Err(format!("{key}: must not be empty"));
            }
        }
        let publication = file.publication.unwrap_or_else(|| "multihome".into());
        let subscription = file.subscription.unwrap_or_else(|| "multihome".into());
        for (key, value) in [("publication", &publication), ("subscription", &subscription)] {
            if value.is_empty() || value.len() > 63 {
                return Err(format!("{key}: must have 1 to 63 bytes"));
            }
        }

        let tls = file.tls.unwrap_or_default();
        let tls = Tls {
            mode: tls.mode.unwrap_or_default(),
            root: tls.root.or_else(|| path("PGSSLROOTCERT")),
            cert: tls.cert.or_else(|| path("PGSSLCERT")),
            key: tls.key.or_else(|| path("PGSSLKEY")),
        };
        if tls.cert.is_some() != tls.key.is_some() {
            return Err("tls: cert and key (or PGSSLCERT and PGSSLKEY) go together".into());
        }

        let active = file
            .active
            .map(|active| {
                let table = identifiers(&active.table)
                    .filter(|parts| parts.len() <= 2)
                    .ok_or("active.table: must be \"table\" or \"schema.table\", each an SQL identifier")?;
                let column = identifiers(&active.column)
                    .filter(|parts| parts.len() == 1)
                    .ok_or("active.column: must be an SQL identifier")?;
                let table = if table.len() == 1 { vec!["public".into(), table[0].clone()] } else { table };
                let place = (table[0].clone(), table[1].clone());
                Ok::<_, String>(Active { table: quoted(&table), column: quoted(&column), place })
            })
            .transpose()?;

        let nodes = nodes(file.node, active.is_some())?;
        if nodes.len() > 2
            && let Some(node) = nodes.iter().find(|node| subscription.len() + 1 + node.name.len() > 63)
        {
            return Err(format!(
                "subscription: {subscription}_{} would have more than 63 bytes; shorten one of the names",
                node.name
            ));
        }
        let passfile = path("PGPASSFILE").or_else(|| home.map(|home| home.join(".pgpass")));
        let watch = watch(file.watch.unwrap_or_default())?;
        let rules = file.rule.into_iter().map(|file| rule(file, &nodes)).collect::<Result<_, _>>()?;
        let replication = replication(file.replication.unwrap_or_default())?;
        let certificates =
            file.certificate.into_iter().map(|file| certificate(file, &nodes)).collect::<Result<Vec<_>, _>>()?;
        let mut places = BTreeSet::new();
        if let Some(twice) = certificates.iter().find(|entry| !places.insert((&entry.node, &entry.cert))) {
            return Err(format!("certificate.cert: {} is there twice", twice.cert.display()));
        }
        let state = file.state.unwrap_or_else(|| DEFAULT_STATE.into());
        Ok(Self {
            database,
            user,
            publication,
            subscription,
            tls,
            active,
            nodes,
            passfile,
            watch,
            rules,
            replication,
            certificates,
            schema_role: file.schema.and_then(|schema| schema.role),
            state,
        })
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// All nodes but that one.
    pub fn peers<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Node> {
        self.nodes.iter().filter(move |peer| peer.name != node)
    }

    /// The name of the subscription, on any node, to what `source` publishes.
    pub fn subscription_to(&self, source: &str) -> String {
        if self.nodes.len() <= 2 { self.subscription.clone() } else { format!("{}_{source}", self.subscription) }
    }

    /// The name of the slot on `publisher` that `subscriber` reads: with more than two nodes one for each subscriber. A
    /// slot's name allows less than a node's.
    pub fn slot(&self, publisher: &str, subscriber: &str) -> String {
        let name = self.subscription_to(publisher);
        let name = if self.nodes.len() <= 2 { name } else { format!("{name}_{subscriber}") };
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        name.to_ascii_lowercase().chars().map(|c| if allowed(c) { c } else { '_' }).take(63).collect()
    }

    /// The node that a subscription of `node` brings rows from, if it is one of this configuration.
    pub fn source_of(&self, node: &str, subscription: &str) -> Option<&Node> {
        self.nodes.iter().find(|source| source.name != node && self.subscription_to(&source.name) == subscription)
    }
}

fn nodes(file: Vec<FileNode>, with_active: bool) -> Result<Vec<Node>, String> {
    if file.is_empty() {
        return Err("node: at least one [[node]] is needed".into());
    }
    let mut names = BTreeSet::new();
    let mut places = BTreeSet::new();
    let mut nodes: Vec<Node> = Vec::new();
    for node in file {
        let FileNode { name, host, port, family, active_name, replication } = node;
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c)) {
            return Err(format!("node.name: {name:?}: only letters, digits, '_', '-' and '.' are allowed"));
        }
        if name.starts_with('-') {
            return Err(format!("node.name: {name:?}: must not begin with '-'"));
        }
        if !names.insert(name.clone()) {
            return Err(format!("node.name: {name:?} is there twice"));
        }
        if !is_host(&host) {
            return Err(format!("node.host of {name}: must be one host name, address or socket directory"));
        }
        if port == 0 {
            return Err(format!("node.port of {name}: must be 1 to 65535"));
        }
        if !places.insert((host.to_ascii_lowercase(), port)) {
            return Err(format!("node.host of {name}: {host} port {port} is another node already"));
        }
        if let (Ok(address), Family::Ipv4 | Family::Ipv6) = (host.parse::<std::net::IpAddr>(), family)
            && address.is_ipv4() != (family == Family::Ipv4)
        {
            return Err(format!("node.family of {name}: {host} is of the other family"));
        }
        let active_name = match active_name {
            Some(active_name) if active_name.is_empty() => {
                return Err(format!("node.active_name of {name}: must not be empty"));
            }
            Some(active_name) => active_name,
            None if with_active && host.starts_with('/') => {
                return Err(format!(
                    "node.active_name of {name}: must be given, as host is a socket directory and [active] is there"
                ));
            }
            None => host.clone(),
        };
        if let Some(other) = nodes.iter().find(|node| with_active && node.active_name == active_name) {
            return Err(format!("node.active_name of {name}: {active_name:?} is that of {} already", other.name));
        }
        let flaw = |text: &str| Err(format!("node.replication of {name}: {text}"));
        if replication.host.as_ref().is_some_and(|host| !is_host(host)) {
            return flaw("host must be one host name, address or socket directory");
        }
        if replication.port == Some(0) {
            return flaw("port must be 1 to 65535");
        }
        if replication.cert.is_some() != replication.key.is_some() {
            return flaw("cert and key go together");
        }
        nodes.push(Node { name, host, port, family, active_name, replication, through: None });
    }
    Ok(nodes)
}

/// One host, in libpq's meaning, that takes lists too.
fn is_host(host: &str) -> bool {
    !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c == ',')
}

fn replication(file: FileReplication) -> Result<Replication, String> {
    let FileReplication { user, mode, root, cert, key, passfile } = file;
    let user = user.unwrap_or_else(|| "replicator".into());
    if user.is_empty() || user.len() > 63 {
        return Err("replication.user: must have 1 to 63 bytes".into());
    }
    if cert.is_some() != key.is_some() {
        return Err("replication: cert and key go together".into());
    }
    Ok(Replication { user, mode: mode.unwrap_or_default(), root, cert, key, passfile })
}

fn certificate(file: FileCertificate, nodes: &[Node]) -> Result<Certificate, String> {
    let FileCertificate { lineage, r#use, node, cert, key, owner, group, mode, root, names } = file;
    if lineage.is_empty() || lineage.starts_with('.') || lineage.contains('/') {
        return Err(format!("certificate.lineage: {lineage:?}: must be the name of a directory under live/"));
    }
    let flaw = |key: &str, text: &str| Err(format!("certificate.{key} of {lineage}: {text}"));
    let uses = match r#use {
        FileUse::One(one) => BTreeSet::from([one]),
        FileUse::Several(several) => several,
    };
    if uses.is_empty() {
        return flaw("use", "must not be empty");
    }
    if let Some(name) = &node
        && !nodes.iter().any(|node| node.name == *name)
    {
        return flaw("node", &format!("there is no node {name}"));
    }
    for (name, path) in [("cert", &cert), ("key", &key)] {
        if !path.is_absolute() || path.file_name().and_then(|name| name.to_str()).is_none() {
            return flaw(name, "must be the absolute path of a file");
        }
    }
    if cert.parent() != key.parent() || cert == key {
        return flaw("key", "must be another file in the directory of cert");
    }
    let for_postgres = uses.contains(&Use::Server) || uses.contains(&Use::Replication);
    let owner = owner.or_else(|| for_postgres.then(|| SERVER_USER.into()));
    let mode = mode.as_deref().unwrap_or("0600");
    let Some(mode) = u32::from_str_radix(mode, 8).ok().filter(|mode| [0o400, 0o440, 0o600, 0o640].contains(mode))
    else {
        return flaw("mode", "must be \"0600\", \"0400\", \"0640\" or \"0440\"");
    };
    // PostgreSQL's and libpq's own rule.
    if for_postgres && mode & 0o040 != 0 && owner.as_deref() != Some("root") {
        return flaw("mode", "PostgreSQL takes a key that its group can read from root only");
    }
    if names.as_ref().is_some_and(|names| names.iter().any(String::is_empty)) {
        return flaw("names", "must not be empty");
    }
    Ok(Certificate { lineage, uses, node, cert, key, owner, group, mode, root, names })
}

fn watch(file: FileWatch) -> Result<Watch, String> {
    let default = Watch::default();
    let time = |key: &str, text: Option<String>, default: Duration, allowed: RangeInclusive<Duration>| {
        let Some(text) = text else { return Ok(default) };
        let [least, most] = [allowed.start(), allowed.end()].map(|bound| humantime::format_duration(*bound));
        let flaw = format!("watch.{key}: must be {least} to {most}, such as \"5s\"");
        humantime::parse_duration(&text).ok().filter(|time| allowed.contains(time)).ok_or(flaw)
    };
    let (milliseconds, seconds) = (Duration::from_millis, Duration::from_secs);
    let channel = file.channel.map(|name| channel("watch.channel", name)).transpose()?;
    let interval = time("interval", file.interval, default.interval, milliseconds(100)..=seconds(300))?;
    // Between two looks nothing can be seen to move.
    let stall = time("stall", file.stall, default.stall.max(interval), interval..=seconds(86400))?;
    let attempts = file.attempts.unwrap_or(default.attempts);
    if !(1..=100).contains(&attempts) {
        return Err("watch.attempts: must be 1 to 100".into());
    }
    let certificates = time("certificates", file.certificates, default.certificates, seconds(1)..=seconds(86400))?;
    Ok(Watch { channel, interval, stall, attempts, certificates })
}

fn channel(key: &str, name: String) -> Result<String, String> {
    // PostgreSQL's own bound for the name of a channel.
    if name.is_empty() || name.len() > 63 || name.contains('\0') {
        return Err(format!("{key}: must have 1 to 63 bytes"));
    }
    Ok(name)
}

fn rule(file: FileRule, nodes: &[Node]) -> Result<Rule, String> {
    let FileRule { table, strategy, flag, by, node, notify } = file;
    let of = format!("of the rule for {table:?}");
    let tables = tables(&table)
        .ok_or_else(|| format!("rule.table: {table:?}: must be \"schema.table\", \"schema.*\" or \"*\""))?;
    let column = |key: &str, name: &String| match identifiers(name).as_deref() {
        Some([column]) => Ok(column.clone()),
        _ => Err(format!("rule.{key} {of}: {name:?}: must be an SQL identifier")),
    };
    let needed = |key: &str, what: &str| format!("rule.{key} {of}: must be given: {what}");
    let used: &[&str];
    let strategy = match strategy {
        FileStrategy::DeactivateOlder => {
            used = &["flag", "by", "notify"];
            let flag =
                flag.as_ref().ok_or_else(|| needed("flag", "the boolean column that only one row may have set"))?;
            let by = by.as_ref().ok_or_else(|| needed("by", "the column whose greatest value wins"))?;
            Strategy::DeactivateOlder { flag: column("flag", flag)?, by: column("by", by)? }
        }
        FileStrategy::Newest => {
            used = &["by", "notify"];
            Strategy::Newest { by: by.as_ref().map(|by| column("by", by)).transpose()? }
        }
        FileStrategy::KeepNode => {
            used = &["node", "notify"];
            let name = node.as_ref().ok_or_else(|| needed("node", "the node whose version wins"))?;
            if !nodes.iter().any(|node| node.name == *name) {
                let names: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
                return Err(format!("rule.node {of}: there is no node {name}; the nodes are {}", names.join(", ")));
            }
            Strategy::KeepNode(name.clone())
        }
        // The row is gone, so there is nothing to tell the application about.
        FileStrategy::LetDeleteWin => {
            used = &[];
            Strategy::LetDeleteWin
        }
        // Of a transaction that is left out no row wins, so there is nothing to tell the application about.
        FileStrategy::Skip => {
            used = &[];
            Strategy::Skip
        }
        FileStrategy::None => {
            used = &[];
            Strategy::Leave
        }
    };
    let given =
        [("flag", flag.is_some()), ("by", by.is_some()), ("node", node.is_some()), ("notify", notify.is_some())];
    if let Some((key, _)) = given.iter().find(|(key, given)| *given && !used.contains(key)) {
        return Err(format!("rule.{key} {of}: has no meaning for {}", strategy.name()));
    }
    let notify = notify
        .map(|FileNotify { channel: name, payload }| {
            let payload =
                Template::parse(&payload).map_err(|flaw| format!("rule.notify.payload {of}: {payload:?}: {flaw}"))?;
            Ok::<_, String>(Notify { channel: channel("rule.notify.channel", name)?, payload })
        })
        .transpose()?;
    Ok(Rule { tables, strategy, notify })
}

fn tables(text: &str) -> Option<Tables> {
    if text == "*" {
        return Some(Tables::All);
    }
    if let Some(schema) = text.strip_suffix(".*") {
        let [schema] = <[String; 1]>::try_from(identifiers(schema)?).ok()?;
        return Some(Tables::Schema(schema));
    }
    let mut parts = identifiers(text)?;
    let table = parts.pop()?;
    match parts.as_slice() {
        [] => Some(Tables::One("public".into(), table)),
        [schema] => Some(Tables::One(schema.clone(), table)),
        _ => None,
    }
}

/// The parts of a dotted SQL name: folded to lower case unless quoted, as PostgreSQL does.
fn identifiers(text: &str) -> Option<Vec<String>> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        let (part, after) = if let Some(quoted) = rest.strip_prefix('"') {
            let mut part = String::new();
            let mut chars = quoted.char_indices().peekable();
            let after = loop {
                match chars.next()? {
                    (_, '"') if chars.next_if(|(_, c)| *c == '"').is_some() => part.push('"'),
                    (at, '"') => break &quoted[at + 1..],
                    (_, c) => part.push(c),
                }
            };
            (part, after)
        } else {
            let end = rest.find('.').unwrap_or(rest.len());
            let (part, after) = rest.split_at(end);
            let first = part.chars().next()?;
            let plain = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
            if !(first.is_alphabetic() || first == '_') || !part.chars().all(plain) {
                return None;
            }
            (part.to_lowercase(), after)
        };
        if part.is_empty() || part.len() > 63 || part.contains('\0') {
            return None;
        }
        parts.push(part);
        if after.is_empty() {
            return Some(parts);
        }
        rest = after.strip_prefix('.')?;
    }
}

fn quoted(parts: &[String]) -> String {
    parts.iter().map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::{Strategy, *};
    use proptest::prelude::*;

    const EXAMPLE: &str = r#"
        database     = "stillebot"
        user         = "stillebot_agent"
        publication  = "multihome"
        subscription = "multihome"
        [tls]
        mode = "verify-full"
        root = "/etc/stillebot/root.pem"
        cert = "/etc/stillebot/agent.pem"
        key  = "/etc/stillebot/agent.key"
        [active]
        table  = "stillebot.settings"
        column = "active_bot"
        [[node]]
        name   = "sikorsky"
        host   = "sikorsky.example.net"
        port   = 5432
        family = "any"
        active_name = "sikorsky.example.net"
        [[node]]
        name = "gideon"
        host = "ipv4.example.net"
        family = "ipv4"
    "#;

    fn parse(text: &str) -> Result<Config, String> {
        parse_with(text, &[])
    }

    fn parse_with(text: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
        let variable =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Config::parse(text, &Environment { variable: &variable, os_user: Some("os".into()) })
    }

    #[test]
    fn the_example_that_is_installed_is_understood() {
        let config = parse(include_str!("../agent.toml")).unwrap();
        assert_eq!(config.nodes[1].replication.host.as_deref(), Some("ipv4.example.net"));
        assert_eq!(config.rules.len(), 2);
    }

    #[test]
    fn the_example_of_the_design_is_understood() {
        let config = parse(EXAMPLE).unwrap();
        assert_eq!(config.nodes.len(), 2);
        assert_eq!(config.active.as_ref().unwrap().table, r#""stillebot"."settings""#);
        assert_eq!(config.nodes[1].active_name, "ipv4.example.net");
        assert_eq!(config.subscription_to("gideon"), "multihome");
    }

    #[test]
    fn psql_variables_are_defaults_only() {
        let variables = [("PGUSER", "u"), ("PGDATABASE", "d"), ("PGSSLROOTCERT", "/r"), ("PGPASSFILE", "/p")];
        let config = parse_with("[[node]]\nname='a'\nhost='h'", &variables).unwrap();
        assert_eq!((config.user.as_str(), config.database.as_str()), ("u", "d"));
        assert_eq!(config.tls.root, Some("/r".into()));
        assert_eq!(config.passfile, Some("/p".into()));
        assert_eq!(config.tls.mode, TlsMode::VerifyFull);
        assert_eq!(parse_with(EXAMPLE, &variables).unwrap().user, "stillebot_agent");
        assert_eq!(parse("[[node]]\nname='a'\nhost='h'").unwrap().database, "os");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let node = "[[node]]\nname='a'\nhost='h'\n";
        for (text, expected) in [
            ("", "at least one [[node]]"),
            ("colour = 1", "unknown field `colour`"),
            ("[tls]\nmode='prefer'\n", "unknown variant `prefer`"),
            ("[tls]\ncert='/x'\n[[node]]\nname='a'\nhost='h'", "go together"),
            ("[[node]]\nname='a b'\nhost='h'", "only letters"),
            ("[[node]]\nname='a'\nhost=''", "must be one host name"),
            ("[[node]]\nname='a'\nhost='h'\nport=0", "1 to 65535"),
            ("[[node]]\nname='a'\nhost='h'\nport=70000", "port"),
            ("[[node]]\nname='a'\nhost='::1'\nfamily='ipv4'", "other family"),
            ("[active]\ntable='a.b.c'\ncolumn='d'\n[[node]]\nname='a'\nhost='h'", "active.table"),
            ("[active]\ntable='a b'\ncolumn='d'\n[[node]]\nname='a'\nhost='h'", "active.table"),
            ("[active]\ntable='a'\ncolumn='d; drop'\n[[node]]\nname='a'\nhost='h'", "active.column"),
            ("[active]\ntable='a'\ncolumn='d'\n[[node]]\nname='a'\nhost='/run'", "active_name"),
            (&format!("{node}{node}"), "twice"),
            (&format!("{node}[[node]]\nname='b'\nhost='H'\n"), "another node already"),
        ] {
            let flaw = parse(text).unwrap_err();
            assert!(flaw.contains(expected), "{text}\n{flaw}");
        }
    }

    const RULES: &str = r#"
        [[node]]
        name = "sikorsky"
        host = "a"
        [[node]]
        name = "gideon"
        host = "b"
        [watch]
        channel  = "scream.emergency"
        interval = "2s"
        stall    = "1m 30s"
        attempts = 5
        [[rule]]
        table    = "stillebot.commands"
        strategy = "deactivate-older"
        flag     = "active"
        by       = "created"
        notify   = { channel = "stillebot.commands", payload = "{twitchid}:{cmdname}" }
        [[rule]]
        table    = "stillebot.config"
        strategy = "newest"
        [[rule]]
        table    = 'stillebot."Sessions"'
        strategy = "newest"
        by       = "active"
        [[rule]]
        table    = "stillebot.*"
        strategy = "keep-node"
        node     = "sikorsky"
        [[rule]]
        table    = "scratch"
        strategy = "skip"
        [[rule]]
        table    = "*"
        strategy = "none"
    "#;

    #[test]
    fn rules_and_watch_are_understood() {
        let config = parse(RULES).unwrap();
        let watch = Watch {
            channel: Some("scream.emergency".into()),
            interval: Duration::from_secs(2),
            stall: Duration::from_secs(90),
            attempts: 5,
            ..Watch::default()
        };
        assert_eq!(config.watch, watch);
        let one = |schema: &str, table: &str| Tables::One(schema.into(), table.into());
        let expected = [
            (one("stillebot", "commands"), Strategy::DeactivateOlder { flag: "active".into(), by: "created".into() }),
            (one("stillebot", "config"), Strategy::Newest { by: None }),
            (one("stillebot", "Sessions"), Strategy::Newest { by: Some("active".into()) }),
            (Tables::Schema("stillebot".into()), Strategy::KeepNode("sikorsky".into())),
            (one("public", "scratch"), Strategy::Skip),
            (Tables::All, Strategy::Leave),
        ];
        let rules: Vec<_> = config.rules.iter().map(|rule| (rule.tables.clone(), rule.strategy.clone())).collect();
        assert_eq!(rules, expected);
        let notify = config.rules[0].notify.as_ref().unwrap();
        assert_eq!(notify.channel, "stillebot.commands");
        assert!(config.rules[1].notify.is_none());
        assert_eq!(parse("[[node]]\nname='a'\nhost='h'").unwrap().watch, Watch::default());
    }

    #[test]
    fn what_is_wrong_with_rules_and_watch_is_said() {
        let rule = |lines: &str| format!("[[rule]]\ntable='s.t'\n{lines}");
        let with = |strategy: &str, lines: &str| rule(&format!("strategy='{strategy}'\n{lines}"));
        for (text, expected) in [
            ("[watch]\ncolour=1".into(), "unknown field `colour`"),
            ("[watch]\ninterval='soon'".into(), "watch.interval: must be 100ms to 5m"),
            ("[watch]\ninterval='2h'".into(), "watch.interval"),
            ("[watch]\ninterval='10s'\nstall='5s'".into(), "watch.stall: must be 10s to 1day"),
            ("[watch]\nattempts=0".into(), "watch.attempts: must be 1 to 100"),
            ("[watch]\nattempts=-1".into(), "attempts"),
            ("[watch]\nchannel=''".into(), "watch.channel: must have 1 to 63 bytes"),
            ("[[rule]]\nstrategy='skip'".into(), "missing field `table`"),
            (rule(""), "missing field `strategy`"),
            (rule("strategy='oldest'"), "unknown variant `oldest`, expected one of `deactivate-older`, `newest`"),
            (with("skip", "colour=1"), "unknown field `colour`"),
            ("[[rule]]\ntable='a.b.c'\nstrategy='skip'".into(), "rule.table: \"a.b.c\": must be \"schema.table\""),
            ("[[rule]]\ntable='*.t'\nstrategy='skip'".into(), "rule.table"),
            ("[[rule]]\ntable='a.b.*'\nstrategy='skip'".into(), "rule.table"),
            (with("deactivate-older", "by='c'"), "rule.flag of the rule for \"s.t\": must be given"),
            (with("deactivate-older", "flag='f'"), "rule.by of the rule for \"s.t\": must be given"),
            (with("deactivate-older", "flag='f g'\nby='c'"), "rule.flag of the rule for \"s.t\": \"f g\""),
            (with("keep-node", ""), "rule.node of the rule for \"s.t\": must be given"),
            (with("keep-node", "node='z'"), "there is no node z; the nodes are a, b"),
            (with("newest", "flag='f'"), "rule.flag of the rule for \"s.t\": has no meaning for newest"),
            (with("skip", "by='c'"), "has no meaning for skip"),
            (
                with("none", "notify={channel='c',payload=''}"),
                "rule.notify of the rule for \"s.t\": has no meaning for none",
            ),
            (with("newest", "notify={channel='',payload=''}"), "rule.notify.channel: must have 1 to 63 bytes"),
            (with("newest", "notify={channel='c',payload='{a'}"), "rule.notify.payload of the rule for \"s.t\""),
        ] {
            let text = format!("[[node]]\nname='a'\nhost='a'\n[[node]]\nname='b'\nhost='b'\n{text}\n");
            let flaw = parse(&text).unwrap_err();
            assert!(flaw.contains(expected), "{text}\n{flaw}");
        }
    }

    const CERTIFICATE: &str = r#"
        [[certificate]]
        lineage = "sikorsky.example.net"
        use     = ["server", "replication"]
        cert    = "/etc/postgresql/17/main/certificate.pem"
        key     = "/etc/postgresql/17/main/privkey.pem"
    "#;

    #[test]
    fn a_certificate_of_postgresql_is_owned_by_it_and_read_by_nobody_else() {
        let config = parse(&format!("[[node]]\nname='a'\nhost='a'\n{CERTIFICATE}")).unwrap();
        let certificate = &config.certificates[0];
        assert_eq!(certificate.uses, BTreeSet::from([Use::Server, Use::Replication]));
        assert_eq!((certificate.owner.as_deref(), certificate.mode), (Some("postgres"), 0o600));
        assert_eq!(config.state, PathBuf::from(DEFAULT_STATE));
    }

    #[test]
    fn what_is_wrong_with_certificates_is_said() {
        let node = "[[node]]\nname='a'\nhost='a'\n";
        for (from, to, expected) in [
            ("\"sikorsky.example.net\"", "\"../x\"", "certificate.lineage"),
            ("[\"server\", \"replication\"]", "\"bot\"", "one or several of"),
            ("[\"server\", \"replication\"]", "[]", "certificate.use"),
            ("main/privkey", "other/privkey", "in the directory of cert"),
            ("\"/etc/postgresql/17/main/c", "\"c", "certificate.cert"),
            ("use ", "mode='0644'\nuse ", "certificate.mode"),
            ("use ", "mode='0640'\nuse ", "from root only"),
            ("use ", "node='z'\nuse ", "there is no node z"),
            ("use ", "names=['']\nuse ", "certificate.names"),
            ("use ", "colour=1\nuse ", "unknown field `colour`"),
        ] {
            let text = CERTIFICATE.replace(from, to);
            assert_ne!(text, CERTIFICATE);
            let flaw = parse(&format!("{node}{text}")).unwrap_err();
            assert!(flaw.contains(expected), "{text}\n{flaw}");
        }
        assert!(parse(&format!("{node}{CERTIFICATE}{CERTIFICATE}")).unwrap_err().contains("twice"));
    }

    #[test]
    fn a_subscription_leads_to_its_source() {
        let source = |config: &Config, node: &str, subscription: &str| {
            config.source_of(node, subscription).map(|source| source.name.clone())
        };
        let two = parse("[[node]]\nname='a'\nhost='a'\n[[node]]\nname='b'\nhost='b'").unwrap();
        assert_eq!(source(&two, "a", "multihome").as_deref(), Some("b"));
        assert_eq!(source(&two, "b", "multihome").as_deref(), Some("a"));
        assert_eq!(source(&two, "b", "reports"), None);
        let three =
            parse("[[node]]\nname='a'\nhost='a'\n[[node]]\nname='b'\nhost='b'\n[[node]]\nname='c'\nhost='c'").unwrap();
        assert_eq!(source(&three, "a", "multihome_c").as_deref(), Some("c"));
        assert_eq!(source(&three, "c", "multihome_c"), None);
    }

    #[test]
    fn more_than_two_nodes_have_a_subscription_for_each_peer() {
        let config =
            parse("[[node]]\nname='a'\nhost='a'\n[[node]]\nname='b'\nhost='b'\n[[node]]\nname='c'\nhost='c'").unwrap();
        assert_eq!(config.subscription_to("b"), "multihome_b");
    }

    #[test]
    fn identifiers_fold_and_quote_as_in_sql() {
        assert_eq!(identifiers("Stillebot.Settings"), Some(vec!["stillebot".into(), "settings".into()]));
        assert_eq!(identifiers(r#""A.b"."c""d""#), Some(vec!["A.b".into(), "c\"d".into()]));
        for bad in ["", ".", "a.", "a..b", "1a", "\"a", "\"\"", "a\"b\"", "a;b"] {
            assert_eq!(identifiers(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,200}") {
            let _ = parse(&text);
            let _ = identifiers(&text);
            let _ = tables(&text);
        }

        #[test]
        fn quoting_and_reading_are_inverse(parts in prop::collection::vec("[ -~]{1,20}", 1..3)) {
            prop_assert_eq!(identifiers(&quoted(&parts)), Some(parts));
        }
    }
}
