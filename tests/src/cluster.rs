//! Nodes that replicate to each other over links that can be cut, with the bot's tables in them.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    fmt::Write as _,
    fs,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::process::Command;

use crate::{
    authority::Authority,
    log_check::Expected,
    postgres::{Installation, workspace},
    proxy::Proxy,
    scratch::Scratch,
    server::{Server, ServerBuilder},
    wait::{PATIENCE, wait_until},
};

/// The nodes' names, in order.
pub const NAMES: [&str; 3] = ["sikorsky", "gideon", "rodan"];
/// What the nodes of a cluster have in common.
pub const PAIR: &str = "0b0f3a5c-7c1e-4e5b-9d57-5a9f0c1de001";
/// The database that replicates.
pub const DATABASE: &str = "stillebot";

const BOT_TABLES: &str = include_str!("../sql/bot.sql");
/// The agent's own list, for it is also what operators are told to grant.
const AGENT_GRANTS: &str = include_str!("../../agent/sql/grants.sql");

/// Two or three nodes, each subscribed to all others (`origin = none`), and an agent that knows them.
///
/// Roles: `rosuav` is the bot and owns the tables, `stillebot_agent` is the agent and no superuser, `replicator` is what
/// subscriptions connect as. Node 0 is written as the active one.
///
/// End a test with [`Cluster::finish`].
pub struct Cluster {
    nodes: Vec<Server>,
    /// From publisher to subscriber: what the subscription's connection goes through.
    links: HashMap<(usize, usize), Proxy>,
    /// What the agent's connection to a node goes through.
    agent_links: Vec<Proxy>,
    expected: Expected,
    /// The agent's configuration and certificates.
    directory: Scratch,
}

/// What a new cluster is to be like.
pub struct ClusterBuilder {
    size: usize,
    extension: bool,
    direct: bool,
    lasting: bool,
    bare: bool,
    settings: Vec<(String, String)>,
    /// Of the nodes, in order; those that are not named run what is under test.
    installations: Vec<&'static Installation>,
}

/// What became of a run of the agent.
#[derive(Debug, Clone)]
pub struct AgentOutput {
    /// Exit code; nothing if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A hop that the agent made.
#[derive(Debug, Clone)]
pub struct Hopped {
    /// How long no node took writes, by the servers' clocks.
    pub write_gap: Duration,
    /// When the agent was started.
    pub began: Instant,
    /// When it had ended.
    pub ended: Instant,
}

impl AgentOutput {
    /// What it printed with `--json`.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not one JSON document: {self:#?}"))
    }

    /// The same, or an error that shows all of it unless the exit code is this one.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "the agent's exit code is not {code}: {self:#?}");
        Ok(self)
    }
}

impl ClusterBuilder {
    /// How many nodes: 1 to 3. Two unless said otherwise.
    pub fn nodes(mut self, size: usize) -> Self {
        assert!((1..=NAMES.len()).contains(&size), "there are names for 1 to {} nodes", NAMES.len());
        self.size = size;
        self
    }

    /// The PostgreSQL of each node, in order.
    pub fn on(mut self, installations: &[&'static Installation]) -> Self {
        self.installations = installations.to_vec();
        self
    }

    /// Plain PostgreSQL: the extension neither preloaded nor created.
    pub fn without_extension(mut self) -> Self {
        self.extension = false;
        self
    }

    /// No proxies: links cannot be cut, and cost nothing where time is measured.
    pub fn direct(mut self) -> Self {
        self.direct = true;
        self
    }

    /// No proxies, and servers that can outlive this process; see [`Cluster::leave_running`].
    pub fn lasting(mut self) -> Self {
        self.lasting = true;
        self.direct()
    }

    /// Servers that nobody has set up: TLS, pg_hba.conf and the bot's own tables, and nothing that replication needs. The
    /// agent's configuration says what is to become of them.
    pub fn bare(mut self) -> Self {
        self.bare = true;
        self
    }

    /// A line of every node's postgresql.conf.
    pub fn config(mut self, key: &str, value: &str) -> Self {
        self.settings.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Starts the servers and joins them. Returns when the first row has arrived everywhere.
    pub async fn start(self) -> Result<Cluster> {
        let expected = Expected::default();
        let mut nodes = Vec::new();
        for (index, name) in NAMES[..self.size].iter().enumerate() {
            let mut builder = self.describe(name, &expected);
            if let Some(installation) = self.installations.get(index) {
                builder = builder.installation(installation);
            }
            let server = builder.init()?;
            // All come up at the same time.
            server.spawn()?;
            nodes.push(server);
        }
        for node in &nodes {
            node.wait_ready().await?;
            self.furnish(node).await?;
        }
        let mut cluster = Cluster {
            nodes,
            links: HashMap::new(),
            agent_links: Vec::new(),
            expected,
            directory: Scratch::new("cluster")?,
        };
        if !self.direct {
            cluster.open_links().await?;
        }
        if self.bare {
            cluster.issue_certificates()?;
            cluster.agent_knows(&NAMES[..self.size])?;
            return Ok(cluster);
        }
        cluster.subscribe().await?;
        cluster.agent_knows(&NAMES[..self.size])?;
        let active = format!("insert into stillebot.settings (active_bot) values ('{}')", active_name(NAMES[0]));
        cluster.nodes[0].execute(DATABASE, &active).await?;
        cluster.wait_replicated().await?;
        Ok(cluster)
    }

    fn describe(&self, name: &str, expected: &Expected) -> ServerBuilder {
        let mut builder = Server::builder(name).shared_expected(expected).also_named(&active_name(name));
        if !self.extension {
            builder = builder.without_stillebot();
        }
        if self.lasting {
            builder = builder.lasting();
        }
        self.settings.iter().fold(builder, |builder, (key, value)| builder.config(key, value))
    }

    /// Roles, database, tables, publication.
    async fn furnish(&self, node: &Server) -> Result<()> {
        if self.bare {
            return furnish_bare(node).await;
        }
        node.execute(
            "postgres",
            "create role rosuav login;
             create role replicator login replication in role pg_read_all_data;
             create role stillebot_agent login in role pg_monitor;",
        )
        .await?;
        // Not in a batch: a batch is a transaction.
        node.execute("postgres", "create database stillebot owner rosuav").await?;
        let database = node.superuser(DATABASE).await?;
        if self.extension {
            database.batch_execute("create extension stillebot").await?;
            database.batch_execute(&AGENT_GRANTS.replace("{role}", "stillebot_agent")).await?;
            database.batch_execute(&format!("select multihome.identify('{}', '{PAIR}')", node.name())).await?;
        }
        database.batch_execute(&format!("set role rosuav; {BOT_TABLES} reset role;")).await?;
        database
            .batch_execute(
                "grant usage on schema stillebot to stillebot_agent;
                 grant select, update on stillebot.settings to stillebot_agent;
                 create publication multihome for all tables;",
            )
            .await?;
        Ok(())
    }
}

impl Cluster {
    /// A cluster, to be described further.
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder {
            size: 2,
            extension: true,
            direct: false,
            lasting: false,
            bare: false,
            settings: Vec::new(),
            installations: Vec::new(),
        }
    }

    /// Two nodes with the extension.
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// The nodes: sikorsky, gideon, rodan.
    pub fn nodes(&self) -> &[Server] {
        &self.nodes
    }

    /// The node of that name. Panics if there is none.
    pub fn node(&self, name: &str) -> &Server {
        &self.nodes[self.index(name)]
    }

    /// Puts a server in a node's place that nobody has made anything in, with the port, the certificates and the settings of the old one.
    pub async fn replace(&mut self, name: &str, installation: &'static Installation) -> Result<()> {
        let index = self.index(name);
        self.nodes[index].replace(installation).await
    }

    fn index(&self, name: &str) -> usize {
        let found = self.nodes.iter().position(|node| node.name() == name);
        found.unwrap_or_else(|| panic!("no node {name}"))
    }

    /// What replication from one node to another goes through. Panics if there is no such link.
    pub fn link(&self, publisher: &str, subscriber: &str) -> &Proxy {
        let key = (self.index(publisher), self.index(subscriber));
        self.links.get(&key).unwrap_or_else(|| panic!("no link from {publisher} to {subscriber}"))
    }

    /// What the agent's connection to a node goes through. Panics in a direct cluster, which has none.
    pub fn agent_link(&self, node: &str) -> &Proxy {
        &self.agent_links[self.index(node)]
    }

    /// Cuts every link of a node, the agent's included, as if its host were off the network. Clients connect without a
    /// proxy and still reach it.
    pub async fn isolate(&self, node: &str) -> Result<()> {
        for proxy in self.links_of(node) {
            proxy.cut().await?;
        }
        Ok(())
    }

    /// Undoes [`Cluster::isolate`].
    pub async fn reconnect(&self, node: &str) -> Result<()> {
        for proxy in self.links_of(node) {
            proxy.heal().await?;
        }
        Ok(())
    }

    fn links_of(&self, node: &str) -> impl Iterator<Item = &Proxy> {
        let index = self.index(node);
        let replication = self.links.iter().filter(move |((from, to), _)| *from == index || *to == index);
        replication.map(|(_, proxy)| proxy).chain(self.agent_links.get(index))
    }

    /// The name of the subscription on one node to another.
    pub fn subscription(&self, publisher: &str) -> String {
        if self.nodes.len() > 2 { format!("multihome_{publisher}") } else { "multihome".to_owned() }
    }

    /// The name of that subscription's slot on the publisher.
    pub fn slot(&self, publisher: &str, subscriber: &str) -> String {
        if self.nodes.len() > 2 { format!("multihome_{publisher}_{subscriber}") } else { "multihome".to_owned() }
    }

    async fn open_links(&mut self) -> Result<()> {
        for (publisher, node) in self.nodes.iter().enumerate() {
            for subscriber in (0..self.nodes.len()).filter(|&subscriber| subscriber != publisher) {
                self.links.insert((publisher, subscriber), Proxy::open(node.port(), &self.expected).await?);
            }
            self.agent_links.push(Proxy::open(node.port(), &self.expected).await?);
        }
        Ok(())
    }

    /// One after the other: making a slot waits for the transactions under way on the publisher, which making a
    /// subscription there is one of, so two crosswise would wait for each other for ever.
    async fn subscribe(&self) -> Result<()> {
        for (from, publisher) in self.nodes.iter().enumerate() {
            for (to, subscriber) in self.nodes.iter().enumerate().filter(|&(to, _)| to != from) {
                let port = self.links.get(&(from, to)).map_or(publisher.port(), Proxy::port);
                let subscription = self.subscription(publisher.name());
                let slot = self.slot(publisher.name(), subscriber.name());
                let tls = subscriber.outgoing_tls("replicator")?;
                let statement = format!(
                    "create subscription {subscription} \
                     connection 'host=127.0.0.1 port={port} dbname={DATABASE} user=replicator {tls} \
                                 application_name={subscription} tcp_user_timeout=5000' \
                     publication multihome \
                     with (slot_name = {slot}, origin = none, streaming = on, copy_data = false)"
                );
                subscriber.execute(DATABASE, &statement).await?;
            }
        }
        Ok(())
    }

    /// Waits until every node has applied what every other one has committed up to now. All must be running.
    ///
    /// Takes up to half a second, because a node's own apply commits asynchronously and the WAL of that is not sent before
    /// it is flushed; [`Cluster::wait_applied`] in the direction of the writes does not wait for that.
    pub async fn wait_replicated(&self) -> Result<()> {
        for publisher in &self.nodes {
            for subscriber in self.nodes.iter().filter(|subscriber| subscriber.name() != publisher.name()) {
                self.wait_applied(publisher.name(), subscriber.name()).await?;
            }
        }
        Ok(())
    }

    /// Waits until one node has applied what another one has committed up to now.
    pub async fn wait_applied(&self, publisher: &str, subscriber: &str) -> Result<()> {
        let slot = self.slot(publisher, subscriber);
        let client = self.node(publisher).superuser(DATABASE).await?;
        let written: String = client.query_one("select pg_current_wal_lsn()::text", &[]).await?.get(0);
        let applied = format!(
            "select coalesce(bool_or(sender.replay_lsn >= '{written}'), false) \
             from pg_replication_slots slot join pg_stat_replication sender on sender.pid = slot.active_pid \
             where slot.slot_name = '{slot}' and slot.database = '{DATABASE}'"
        );
        let what = format!("{subscriber} to have applied {publisher} up to {written}");
        wait_until(&what, PATIENCE, || async {
            Ok(client.query_one(&applied, &[]).await?.get::<_, bool>(0).then_some(()))
        })
        .await
        .with_context(|| format!("log of {subscriber}:\n{}", self.node(subscriber).log_tail(10)))
    }

    /// Compares all tables of schema `stillebot` row by row over all nodes. The error shows the first differences of each.
    pub async fn assert_identical(&self) -> Result<()> {
        let mut differences = String::new();
        let mut reference: Option<(&str, Tables)> = None;
        for node in &self.nodes {
            let tables = read_tables(node).await?;
            match &reference {
                None => reference = Some((node.name(), tables)),
                Some((name, expected)) => compare(name, expected, node.name(), &tables, &mut differences)?,
            }
        }
        ensure!(differences.is_empty(), "the nodes differ:\n{differences}");
        Ok(())
    }

    /// Where the agent's configuration is.
    pub fn agent_configuration(&self) -> PathBuf {
        self.directory.path().join("agent.toml")
    }

    /// The agent, ready to be started: for tests that kill it. It does not outlive the returned command's child.
    pub fn agent_command(&self, arguments: &[&str]) -> Command {
        let program = env::var_os("STILLEBOT_AGENT")
            .map_or_else(|| workspace().join("target/release/stillebot-agent"), PathBuf::from);
        let mut command = Command::new(program);
        command.arg("--config").arg(self.agent_configuration()).args(arguments);
        for variable in ["PGUSER", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGPASSFILE"] {
            command.env_remove(variable);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Appends to the agent's configuration: sections that tests of single commands want.
    pub fn configure_agent(&self, text: &str) -> Result<()> {
        let path = self.agent_configuration();
        let configuration = fs::read_to_string(&path)? + text;
        Ok(fs::write(path, configuration)?)
    }

    /// Runs the agent to its end: `cluster.agent(&["hop", "gideon"])`.
    pub async fn agent(&self, arguments: &[&str]) -> Result<AgentOutput> {
        let mut command = self.agent_command(arguments);
        let output = command.output().await.with_context(|| format!("could not run {:?}", command.as_std()))?;
        Ok(AgentOutput {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Has the agent hop to a node. An error shows all that it said.
    pub async fn hop(&self, target: &str) -> Result<Hopped> {
        let began = Instant::now();
        let output = self.agent(&["hop", target, "--json"]).await?.expect_code(0)?;
        let ended = Instant::now();
        let report = output.json()?;
        let number = |key: &str| report[key].as_f64().with_context(|| format!("no {key}: {output:#?}"));
        let (gap, uncertainty) = (number("write_gap_ms")?, number("write_gap_uncertainty_ms")?);
        ensure!(gap >= -uncertainty, "{target} was opened before the other node was closed: {output:#?}");
        Ok(Hopped { write_gap: Duration::from_secs_f64(gap.max(0.0) / 1000.0), began, ended })
    }

    /// Certificates of bare nodes' subscriptions, and one of a superuser: see [`Cluster::as_admin`].
    fn issue_certificates(&self) -> Result<()> {
        for node in &self.nodes {
            node.outgoing_tls("replicator")?;
        }
        let identity = Authority::shared().client("postgres")?;
        fs::write(self.directory.path().join("admin.pem"), identity.certificate_pem()?)?;
        crate::server::write_secret(&self.directory.path().join("admin.key"), &identity.key_pem()?)
    }

    /// A command of the agent as a superuser with a certificate gives it, on bare nodes: `init` or `deinit`, with these options.
    pub fn as_admin(&self, command: &str, options: &[&str]) -> Vec<String> {
        let file = |name: &str| self.directory.path().join(name).display().to_string();
        let (cert, key) = (file("admin.pem"), file("admin.key"));
        let words = [command, "--admin-cert", &cert, "--admin-key", &key];
        words.iter().chain(options).map(|&word| word.to_owned()).collect()
    }

    /// Writes the agent's configuration anew, with these nodes only.
    pub fn agent_knows(&self, names: &[&str]) -> Result<()> {
        let directory = self.directory.path();
        let identity = Authority::shared().client("stillebot_agent")?;
        fs::write(directory.join("root.pem"), Authority::shared().root_pem()?)?;
        fs::write(directory.join("agent.pem"), identity.certificate_pem()?)?;
        crate::server::write_secret(&directory.join("agent.key"), &identity.key_pem()?)?;
        let path = directory.display();
        let mut text = format!(
            r#"database     = "{DATABASE}"
user         = "stillebot_agent"
publication  = "multihome"
subscription = "multihome"

[tls]
mode = "verify-full"
root = "{path}/root.pem"
cert = "{path}/agent.pem"
key  = "{path}/agent.key"

[active]
table  = "stillebot.settings"
column = "active_bot"
"#
        );
        for (index, node) in self.nodes.iter().enumerate().filter(|(_, node)| names.contains(&node.name())) {
            write!(
                text,
                r#"
[[node]]
name        = "{}"
host        = "127.0.0.1"
port        = {}
family      = "ipv4"
active_name = "{}"

[node.replication]
port = {}
root = "{tls}/root.pem"
cert = "{tls}/server-as-replicator.pem"
key  = "{tls}/server-as-replicator.key"
"#,
                node.name(),
                self.agent_links.get(index).map_or(node.port(), Proxy::port),
                active_name(node.name()),
                // With more than two nodes each link of a node has a port of its own, which no configuration can say.
                (0..self.nodes.len()).find_map(|to| self.links.get(&(index, to))).map_or(node.port(), Proxy::port),
                tls = node.socket_directory().join("tls").display(),
            )?;
        }
        Ok(fs::write(self.agent_configuration(), text)?)
    }

    /// Allows log lines that contain this in all nodes' logs; see [`Server::expect_log`].
    pub fn expect_log(&self, part: impl Into<String>) {
        self.expected.allow(part);
    }

    /// Ends the test's use of it: an error if any log holds anything unexpected or any server does not shut down cleanly.
    pub async fn finish(self) -> Result<()> {
        let mut findings = String::new();
        // All logs before the first server stops: from then on the others have reason to complain.
        for node in &self.nodes {
            for entry in node.unexpected_log() {
                writeln!(findings, "{}: {entry}", node.name())?;
            }
        }
        for node in self.nodes {
            if let Err(error) = node.finish().await
                && findings.is_empty()
            {
                findings = format!("{error:#}");
            }
        }
        ensure!(findings.is_empty(), "the logs have lines nobody expected:\n{findings}");
        Ok(())
    }

    /// Lets go of a [`ClusterBuilder::lasting`] cluster: servers and files stay. Returns the commands that end it.
    pub fn leave_running(mut self) -> Result<Vec<String>> {
        self.directory.keep();
        let mut commands = self.nodes.into_iter().map(Server::leave_running).collect::<Result<Vec<_>>>()?;
        commands.push(format!("rm -r {}", self.directory.path().display()));
        Ok(commands)
    }
}

/// The bot's role and its tables.
async fn furnish_bare(node: &Server) -> Result<()> {
    node.execute("postgres", "create role rosuav login").await?;
    node.execute("postgres", "create database stillebot owner rosuav").await?;
    node.execute(DATABASE, &format!("set role rosuav; {BOT_TABLES}")).await
}

/// What `settings.active_bot` is when that node is the active one.
pub fn active_name(node: &str) -> String {
    format!("{node}.example.net")
}

/// Rows by primary key, by table.
type Tables = BTreeMap<String, BTreeMap<String, String>>;

async fn read_tables(node: &Server) -> Result<Tables> {
    let client = node.superuser(DATABASE).await?;
    // The key is written with names, for the reader of a difference.
    let catalog = client
        .query(
            "select c.oid::regclass::text, \
                    coalesce((select string_agg(format('%L, %I', a.attname, a.attname), ', ' order by a.attnum) \
                              from pg_index i join pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey) \
                              where i.indrelid = c.oid and i.indisprimary), '''row'', t') \
             from pg_class c where c.relnamespace = 'stillebot'::regnamespace and c.relkind in ('r', 'p')",
            &[],
        )
        .await?;
    let mut tables = Tables::new();
    for entry in catalog {
        let (table, key): (String, String) = (entry.get(0), entry.get(1));
        let query = format!("select jsonb_build_object({key})::text, to_jsonb(t)::text from {table} t");
        let rows = client.query(&query, &[]).await.with_context(|| format!("{}: {query}", node.name()))?;
        tables.insert(table, rows.into_iter().map(|row| (row.get(0), row.get(1))).collect());
    }
    Ok(tables)
}

/// Appends what differs, a few rows of each table.
fn compare(a: &str, rows_of_a: &Tables, b: &str, rows_of_b: &Tables, out: &mut String) -> Result<()> {
    const SHOWN: usize = 5;
    let nothing = BTreeMap::new();
    let tables: std::collections::BTreeSet<_> = rows_of_a.keys().chain(rows_of_b.keys()).collect();
    for table in tables {
        for (name, rows) in [(a, rows_of_a), (b, rows_of_b)] {
            if !rows.contains_key(table) {
                writeln!(out, "{table} is missing on {name}")?;
            }
        }
        let in_a = rows_of_a.get(table).unwrap_or(&nothing);
        let in_b = rows_of_b.get(table).unwrap_or(&nothing);
        let keys: std::collections::BTreeSet<_> = in_a.keys().chain(in_b.keys()).collect();
        let different: Vec<_> = keys.into_iter().filter(|key| in_a.get(*key) != in_b.get(*key)).collect();
        if !different.is_empty() {
            writeln!(out, "{table}: {} rows on {a}, {} on {b}, {} differ", in_a.len(), in_b.len(), different.len())?;
        }
        for key in different.into_iter().take(SHOWN) {
            writeln!(out, "  {key}")?;
            for (name, rows) in [(a, in_a), (b, in_b)] {
                let row = rows.get(key).map_or("-", String::as_str);
                writeln!(out, "    {name}: {}", row.chars().take(400).collect::<String>())?;
            }
        }
    }
    Ok(())
}
