//! The commands, one a file, and what they share: the context they run in and how their result is printed.
//!
//! Deliberately the only place that prints, but for the progress of `hop`, `init` and `set-connection`, the pages of `status --watch`
//! and the events of `watch`.

use std::process::ExitCode;
use std::time::Duration;

use comfy_table::{Attribute, Cell, Table, presets};
use nix::sys::signal::{Signal, raise};
use serde_json::{Map, Value, json};

use crate::cli::{Certs, Cli, Command, PauseAt, Schema};
use crate::config::{Config, Node};
use crate::crew::{CONNECT_BOUND, Crew, LOOK_BOUND};
use crate::failure::{Failure, Kind};
use crate::node::{Connector, NodeError, Session, Trouble};
use crate::sql;
use crate::stop::Signals;

pub mod activate;
mod admin;
pub mod certs;
pub mod change;
pub mod check;
pub mod conflicts;
pub mod deinit;
pub mod down;
pub mod hop;
pub mod init;
pub mod populate;
mod progress;
pub mod refresh;
pub mod schema;
pub mod sequences;
pub mod set_connection;
pub mod status;
pub mod up;
pub mod watch;

/// How long opening a database may take: it is one commit.
pub const UP_BOUND: Duration = Duration::from_secs(10);
/// What to do about transactions that keep a node from going down; the server's own hint is for those who type SQL.
pub const IN_THE_WAY: &str = "wait for them, or end them with --terminate";
/// How long a small write may take.
pub const WRITE_BOUND: Duration = Duration::from_secs(5);

/// What every command is given.
pub struct Context {
    /// The configuration.
    pub config: Config,
    /// Makes connections.
    pub connector: Connector,
    /// SIGINT and SIGTERM.
    pub signals: Signals,
    /// Nothing but one JSON document may go to stdout.
    pub json: bool,
}

impl Context {
    /// The node of that name, or an error that names those there are.
    pub fn node(&self, name: &str) -> Result<&Node, Failure> {
        self.config.node(name).ok_or_else(|| {
            let names: Vec<&str> = self.config.nodes.iter().map(|node| node.name.as_str()).collect();
            Failure::new(Kind::Usage, format!("there is no node {name} in the configuration"))
                .hint(format!("the nodes are {}", names.join(", ")))
        })
    }

    /// Connects to a node and asks it something, all of it within a bound.
    pub async fn visit<T>(
        &self,
        node: &Node,
        bound: Duration,
        ask: impl AsyncFnOnce(&Session) -> Result<T, NodeError>,
    ) -> Result<T, NodeError> {
        visit(&self.connector, node, bound, ask).await
    }

    /// References to all nodes.
    pub fn nodes(&self) -> Vec<&Node> {
        self.config.nodes.iter().collect()
    }
}

async fn visit<T>(
    connector: &Connector,
    node: &Node,
    bound: Duration,
    ask: impl AsyncFnOnce(&Session) -> Result<T, NodeError>,
) -> Result<T, NodeError> {
    let work = async { ask(&connector.connect(node, CONNECT_BOUND).await?).await };
    tokio::time::timeout(bound, work).await.unwrap_or_else(|_| {
        Err(NodeError {
            node: node.name.clone(),
            place: format!("{}:{}", node.host, node.port).into(),
            trouble: Trouble::Lost,
            message: format!("no answer within {}", humantime::format_duration(bound)),
            detail: None,
            hint: None,
            answered: false,
        })
    })
}

/// What a command has to say.
pub struct Reply {
    /// For people.
    pub text: String,
    /// For programs.
    pub json: Value,
    /// The meaning for the exit code, if it is not simply done.
    pub kind: Option<Kind>,
}

impl Reply {
    /// Done.
    pub fn done(text: impl Into<String>, json: Value) -> Self {
        Self { text: text.into(), json, kind: None }
    }
}

/// Runs one command and prints what came of it.
pub async fn run(cli: &Cli) -> ExitCode {
    match begin(cli).await {
        Ok(reply) => {
            if cli.json && !reply.json.is_null() {
                print(&reply.json.to_string());
            } else if !cli.json && !reply.text.is_empty() {
                print(reply.text.trim_end());
            }
            reply.kind.map_or(ExitCode::SUCCESS, ExitCode::from)
        }
        Err(failure) => {
            complain(cli, &failure);
            failure.kind.into()
        }
    }
}

async fn begin(cli: &Cli) -> Result<Reply, Failure> {
    let config = Config::load(&cli.config)?;
    let signals =
        Signals::listen().map_err(|error| Failure::new(Kind::Undone, format!("cannot listen for signals: {error}")))?;
    if let Command::Certs(Certs::Deploy { lineage, pause_at }) = &cli.command {
        // Before a connector: the agent's own certificate may be the one that is missing.
        let order = certs::Order { lineage: lineage.as_deref(), pause_at: pause_at.as_ref() };
        return certs::deploy(&config, &signals, &order).await;
    }
    let connector = Connector::new(&config)?;
    let context = Context { config, connector, signals, json: cli.json };
    let result = match &cli.command {
        Command::Status { watch } => status::run(&context, *watch).await,
        Command::Init(options) => init::run(&context, options).await,
        Command::Deinit(options) => deinit::run(&context, options).await,
        Command::SetConnection(options) => set_connection::run(&context, options).await,
        Command::Check(options) => check::run(&context, options).await,
        Command::Down { node, reason, timeout, terminate, dry_run } => {
            let wish = down::Wish { node, reason: reason.as_deref(), timeout: *timeout, terminate: *terminate };
            down::run(&context, &wish, *dry_run).await
        }
        Command::Up { node, force, dry_run } => up::run(&context, node, *force, *dry_run).await,
        Command::Hop(options) => hop::run(&context, options).await,
        Command::Activate { node, dry_run } => activate::run(&context, node, *dry_run).await,
        Command::Watch { once, node } => watch::run(&context, *once, node.as_deref()).await,
        Command::Refresh { dry_run } => refresh::run(&context, *dry_run).await,
        Command::Conflicts(verb) => conflicts::run(&context, verb).await,
        Command::Schema(Schema::Apply(options)) => change::apply(&context, options).await,
        Command::Schema(Schema::Run(options)) => change::run(&context, options).await,
        Command::Schema(Schema::Diff { ddl }) => schema::diff(&context, *ddl).await,
        Command::Schema(Schema::Populate { table, from, replace, timeout, dry_run }) => {
            let wish = populate::Wish { table, from, replace: *replace, timeout: *timeout };
            populate::run(&context, &wish, *dry_run).await
        }
        Command::Certs(_) => Ok(certs::check(&context).await),
        Command::Sequences(verb) => sequences::run(&context, verb).await,
    };
    context.connector.farewell().await;
    result
}

fn complain(cli: &Cli, failure: &Failure) {
    if cli.json {
        let mut document = Map::new();
        document.insert("command".into(), json!(cli.command.verb()));
        document.insert("outcome".into(), json!(failure.kind.word()));
        document.insert("error".into(), json!(failure.message));
        document.insert("detail".into(), json!(failure.detail));
        document.insert("hint".into(), json!(failure.hint));
        document.extend(failure.report.clone());
        print(&Value::Object(document).to_string());
    }
    let bold = anstyle::Style::new().bold();
    let red = bold.fg_color(Some(anstyle::AnsiColor::Red.into()));
    anstream::eprintln!("{red}stillebot-agent:{red:#} {}", failure.message);
    for (label, text) in [("detail", &failure.detail), ("what to do", &failure.hint)] {
        if let Some(text) = text {
            for (number, line) in text.lines().enumerate() {
                if number == 0 {
                    anstream::eprintln!("  {bold}{label}:{bold:#} {line}");
                } else {
                    anstream::eprintln!("    {line}");
                }
            }
        }
    }
}

/// Prints to stdout; that nobody reads it any more is no reason to stop half-way.
pub fn print(text: &str) {
    use std::io::Write as _;
    let mut out = anstream::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// A table without lines, with a bold header.
fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header.iter().map(|title| Cell::new(title).add_attribute(Attribute::Bold)));
    table
}

fn render(table: &Table) -> String {
    table.lines().fold(String::new(), |text, line| text + line.trim_end() + "\n")
}

/// For tests: stops this process, so that something can be killed at just this place.
fn pause(at: Option<&PauseAt>, step: &str, after: bool) {
    if at.is_some_and(|at| at.step == step && at.after == after) {
        // A process that cannot stop itself goes on; the test sees that.
        let _ = raise(Signal::SIGSTOP);
    }
}

/// Opens a database through its session.
pub async fn open(crew: &mut Crew<'_>, node: &str, sole: bool) -> Result<(), NodeError> {
    crew.ask(node, sql::UP, &[&sole], UP_BOUND).await.map(drop)
}

/// Writes the name of `node` into the application's active side, through the session on `at`. True if it was another before.
pub async fn write_active(crew: &mut Crew<'_>, config: &Config, at: &str, node: &Node) -> Result<bool, NodeError> {
    let Some(active) = &config.active else { return Ok(false) };
    let update = sql::ACTIVATE.replace("{table}", &active.table).replace("{column}", &active.column);
    let result = async {
        let session = crew.session(at)?;
        let changed = session.write(&update, &[&node.active_name], WRITE_BOUND).await?;
        if changed == 0 && crate::facts::active(session, config, LOOK_BOUND).await?.as_ref() != Some(&node.active_name)
        {
            return Err(NodeError {
                node: at.to_owned(),
                place: format!("{}:{}", node.host, node.port).into(),
                trouble: Trouble::Refused,
                message: format!("table {} has no row to write the active side into", active.table),
                detail: None,
                hint: Some("insert its row, then run activate".into()),
                answered: false,
            });
        }
        Ok(changed > 0)
    }
    .await;
    if result.as_ref().is_err_and(|error| error.trouble == Trouble::Lost) {
        crew.give_up(at);
    }
    result
}

/// User and host of this process, for the servers' records.
pub fn whoami() -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.name);
    format!("{}@{}", user.as_deref().unwrap_or("?"), hostname().as_deref().unwrap_or("?"))
}

/// The name of this host.
pub fn hostname() -> Option<String> {
    nix::unistd::gethostname().ok()?.into_string().ok()
}

/// The failure for nodes that cannot be reached.
pub fn unreachable(errors: &std::collections::BTreeMap<String, NodeError>) -> Option<Failure> {
    let first = errors.values().next()?;
    let mut failure = Failure::new(
        Kind::Unreachable,
        format!(
            "cannot reach {}; nothing was changed",
            errors.values().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        ),
    );
    failure.detail = first.detail.clone();
    failure.hint = first.hint.clone();
    Some(failure)
}
