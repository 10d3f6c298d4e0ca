//! The configuration, `agent.toml`, with the defaults that psql's environment variables give.
//!
//! Deliberately opens no connection and resolves no name; the only file it reads is the one it is given. Holds no secret:
//! passwords and keys are read where a connection is made.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Kind};

/// Where the configuration is unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/stillebot/agent.toml";

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
                Ok::<_, String>(Active { table: quoted(&table), column: quoted(&column) })
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
        Ok(Self { database, user, publication, subscription, tls, active, nodes, passfile })
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The name of the subscription, on any node, to what `source` publishes.
    pub fn subscription_to(&self, source: &str) -> String {
        if self.nodes.len() <= 2 { self.subscription.clone() } else { format!("{}_{source}", self.subscription) }
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
        let FileNode { name, host, port, family, active_name } = node;
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c)) {
            return Err(format!("node.name: {name:?}: only letters, digits, '_', '-' and '.' are allowed"));
        }
        if name.starts_with('-') {
            return Err(format!("node.name: {name:?}: must not begin with '-'"));
        }
        if !names.insert(name.clone()) {
            return Err(format!("node.name: {name:?} is there twice"));
        }
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c == ',') {
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
        nodes.push(Node { name, host, port, family, active_name });
    }
    Ok(nodes)
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
    use super::*;
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
        }

        #[test]
        fn quoting_and_reading_are_inverse(parts in prop::collection::vec("[ -~]{1,20}", 1..3)) {
            prop_assert_eq!(identifiers(&quoted(&parts)), Some(parts));
        }
    }
}
