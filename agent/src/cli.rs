//! The command line.
//!
//! Deliberately only its grammar: what a command does is in `cmd/`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::change::STEPS as CHANGE_STEPS;
use crate::cmd::certs::STEPS as DEPLOY_STEPS;
use crate::cmd::sequences::{PLACES, STEPS as STRIDE_STEPS};
use crate::config::DEFAULT_PATH;
use crate::hop::STEPS;
use crate::resolve::Wish;

/// Does what two live PostgreSQL nodes need from outside: status, down, up, switchover, watching.
#[derive(Debug, Parser)]
#[command(name = "stillebot-agent", version, max_term_width = 120, after_help = EXIT_CODES)]
pub struct Cli {
    /// The configuration.
    #[arg(long, global = true, value_name = "FILE", default_value = DEFAULT_PATH)]
    pub config: PathBuf,
    /// How much is logged on stderr: error, warn, info, debug, trace.
    #[arg(long, global = true, value_name = "LEVEL", default_value = "warn")]
    pub log: tracing::level_filters::LevelFilter,
    /// Print one JSON document instead of text; `watch` and `status --watch`: one a line.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed, nothing changed or everything undone; 2 usage; 3 failed and needs \
a person (says what to do); 69 a node cannot be reached; 78 configuration.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Shows every node, replication in each direction, who is connected, and whether a hop could begin.
    Status {
        /// Show it again and again, with so many seconds between.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = pause)]
        watch: Option<f64>,
    },
    /// Looks at everything that must be true of the nodes, and says what is not, and the statement or line that mends it.
    ///
    /// Looks as the agent; before `init` has made that role, as a superuser: --admin postgres, or --via.
    #[command(after_help = CHECK_HELP)]
    Check(Check),
    /// Makes the nodes replicate to each other: roles, extension, publication, identity, subscriptions, the first copy.
    ///
    /// Shows every statement first, and what is there already stays. Run again, it goes on where it was stopped.
    #[command(after_help = ADMIN_HELP)]
    Init(Init),
    /// Takes away what init made, on all nodes; rows stay where they are.
    #[command(after_help = ADMIN_HELP)]
    Deinit(Deinit),
    /// Changes how a node is reached by the others' subscriptions, or the files that its own connect with.
    ///
    /// Tests first, from this host and as the agent, that it is that node which answers there; then the server tries it from its
    /// own host, for 5 s. Waits until each subscription is connected again; otherwise the old is put back. Without an option: as
    /// agent.toml has it, in both directions. Works while down, too.
    #[command(after_help = ADMIN_HELP)]
    SetConnection(SetConnection),
    /// Takes a node down: it refuses writes from then on, through restarts, until somebody says up.
    Down {
        /// The node.
        node: String,
        /// Why; shown by status and in the hint of every refused write.
        #[arg(long)]
        reason: Option<String>,
        /// How long transactions under way may take to end.
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
        timeout: Duration,
        /// End transactions that are still there at the timeout, instead of giving up.
        #[arg(long)]
        terminate: bool,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Opens a node for writing.
    Up {
        /// The node.
        node: String,
        /// Open it although another node cannot be reached and may be writable: for when that node is lost.
        #[arg(long)]
        force: bool,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Moves the writable side to a node, losing nothing.
    Hop(Hop),
    /// Writes a node's name into the application's active side.
    Activate {
        /// The node.
        node: String,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Watches replication in each direction until it is stopped: logs, notifies, says when it is well again; and resolves
    /// conflicts by the rules of the configuration.
    Watch {
        /// The node that this agent runs for: it resolves while that is the active side. By default the node of this host, by
        /// its name; if there is none, whichever side is active.
        #[arg(long)]
        node: Option<String>,
        /// Look a few times, say how things are, and end: exit code 0 if all is well, 1 if not. Notifies nobody.
        #[arg(long)]
        once: bool,
    },
    /// Refreshes the subscriptions of all nodes, so that new tables are replicated; copies nothing.
    Refresh {
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Shows conflicts and errors of replication, and resolves them on all nodes.
    #[command(subcommand)]
    Conflicts(Conflicts),
    /// Puts renewed certificates where they are used, and shows how all certificates in use stand.
    #[command(subcommand)]
    Certs(Certs),
    /// Changes tables and the like on all nodes at once, compares them, and fills new tables.
    #[command(subcommand)]
    Schema(Schema),
    /// Shows where keys from sequences could be handed out twice, and gives each node keys of its own.
    #[command(subcommand)]
    Sequences(Sequences),
}

/// The commands under `sequences`.
#[derive(Debug, Subcommand)]
pub enum Sequences {
    /// Shows every sequence that gives keys, on all nodes: exit code 1 if two nodes can hand out the same key, or a node has
    /// none left.
    Check,
    /// Gives each node every 16th value, another one each, past all that are in use; all nodes are down meanwhile, and as
    /// before afterwards.
    ///
    /// Nodes that have values of their own keep them. Run again, it finishes what was cut off.
    Stride {
        /// For so many nodes there is room.
        #[arg(long, value_name = "NUMBER", default_value_t = PLACES, value_parser = clap::value_parser!(i64).range(2..=65536))]
        places: i64,
        /// How long transactions under way may take to end, on each node.
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
        timeout: Duration,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
        /// For tests: stop this process (SIGSTOP) before or after a step.
        #[arg(long, value_name = "before:STEP|after:STEP", hide = true, value_parser = pause_at_stride)]
        pause_at: Option<PauseAt>,
    },
}

/// The commands under `schema`.
#[derive(Debug, Subcommand)]
pub enum Schema {
    /// Runs the statements of a file on every node, or on none: takes writable nodes down, opens a maintenance window on each
    /// node, commits everywhere, refreshes the subscriptions, compares, and opens again what was up.
    ///
    /// The file is tried first, in a transaction that is rolled back: if nothing would change, nothing is done. What it writes
    /// into tables is written on each node and does not replicate.
    #[command(after_help = SCHEMA_HELP)]
    Apply(SchemaApply),
    /// Runs a command that changes the schema on every node by itself, as the bot's --dbupdate does, with all nodes down and a
    /// maintenance window for the role on each.
    #[command(after_help = SCHEMA_HELP)]
    Run(SchemaRun),
    /// Shows what is not alike on all nodes: tables, columns, constraints, indexes, triggers, functions, sequences, replica
    /// identities, publications, views and types. Exit code 0 if all is, 1 if not.
    Diff {
        /// Print the statements that make what a node lacks.
        #[arg(long)]
        ddl: bool,
    },
    /// Copies the rows of a table to the nodes where it is empty, once and one way: for a table that was created with rows in it.
    ///
    /// What is written meanwhile replicates as always; nothing of the copy travels back. Nodes where the table has rows are left as they
    /// are, unless --replace is given.
    Populate {
        /// The table, with its schema.
        table: String,
        /// The node whose rows the others get.
        #[arg(long, value_name = "NODE")]
        from: String,
        /// Where the table has rows already they give way, and are lost if no other node has them; those nodes must be down.
        #[arg(long)]
        replace: bool,
        /// How long the copy may take; it goes on by itself afterwards.
        #[arg(long, value_name = "TIME", default_value = "10m", value_parser = patience)]
        timeout: Duration,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

const SCHEMA_HELP: &str = "The agent's own role must be allowed to act as the role of `schema apply`: grant ROLE to AGENT with \
inherit false, set true. A run that was killed leaves the nodes down; run again, it finishes or begins anew, and opens what was up.";

/// Options of both.
#[derive(Debug, Args)]
pub struct SchemaHow {
    /// Who changes: apply acts as this role; run lets sessions in that log in as it. By default `role` of [schema] in the
    /// configuration.
    #[arg(long)]
    pub role: Option<String>,
    /// How long the maintenance windows stay open at most.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = patience)]
    pub window: Duration,
    /// How long transactions under way may take to end.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
    /// End transactions that are still there at the timeout, instead of giving up.
    #[arg(long)]
    pub terminate: bool,
    /// How long replication may take to catch up.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = deadline)]
    pub wait: Duration,
    /// Take no node down: refuse instead, and say what there is to change.
    #[arg(long)]
    pub no_down: bool,
    /// Say what would be done, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// For tests: stop this process (SIGSTOP) before or after a step; `undo` counts as one.
    #[arg(long, value_name = "before:STEP|after:STEP", hide = true, value_parser = pause_at_change)]
    pub pause_at: Option<PauseAt>,
}

/// Options of `schema apply`.
#[derive(Debug, Args)]
pub struct SchemaApply {
    /// The statements, without BEGIN and COMMIT: they are one transaction.
    pub file: PathBuf,
    /// What both have.
    #[command(flatten)]
    pub how: SchemaHow,
    /// How long a statement may wait for a lock; the trial on a node that is up waits for 1s at most, for others wait behind it.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = deadline)]
    pub lock_timeout: Duration,
}

/// Options of `schema run`.
#[derive(Debug, Args)]
pub struct SchemaRun {
    /// What both have.
    #[command(flatten)]
    pub how: SchemaHow,
    /// Run the command with the nodes as they are first. If it succeeds, there was nothing to change and no node goes down: for
    /// commands that refuse to change a database that is up, as the bot's --dbupdate does.
    #[arg(long)]
    pub try_up: bool,
    /// The command and its arguments. It is told STILLEBOT_NODES (names), STILLEBOT_HOSTS and STILLEBOT_PORTS (of those, separated
    /// by commas), PGDATABASE and PGUSER.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// The commands under `certs`.
#[derive(Debug, Subcommand)]
pub enum Certs {
    /// Puts a renewed certificate into the places that the configuration names for it, and proves that it is in use; certbot's
    /// deploy hook. If it is not, the old one is back.
    Deploy {
        /// The directory with fullchain.pem and privkey.pem, or its name under /etc/letsencrypt/live. By default what certbot
        /// says, in RENEWED_LINEAGE.
        #[arg(long, value_name = "DIRECTORY")]
        lineage: Option<PathBuf>,
        /// For tests: stop this process (SIGSTOP) before or after a step.
        #[arg(long, value_name = "before:STEP|after:STEP", hide = true, value_parser = pause_at_deploy)]
        pause_at: Option<PauseAt>,
    },
    /// Shows every certificate in use, as file on this host and as served by every node: exit code 1 if one has expired, will
    /// within 7 days, is not verified by the root, or is not the one that is served.
    Check,
}

/// The commands under `conflicts`.
#[derive(Debug, Subcommand)]
pub enum Conflicts {
    /// Lists the conflicts that are open.
    List {
        /// Of this node only.
        #[arg(long)]
        node: Option<String>,
        /// Those that are closed, too.
        #[arg(long)]
        all: bool,
    },
    /// Shows everything about one conflict: both versions side by side, the transaction, what can be done.
    Show {
        /// The conflict, as the list names it; the number alone will do if only one node has it.
        #[arg(value_name = "NODE/NUMBER")]
        id: ConflictId,
    },
    /// Keeps one of the versions, on all nodes, and lets replication go on.
    Resolve {
        /// The conflict, as the list names it; the number alone will do if only one node has it.
        #[arg(value_name = "NODE/NUMBER")]
        id: ConflictId,
        /// Whose version wins: that of the node in the conflict's name, that of the other node, or the one committed later.
        #[arg(long)]
        keep: Wish,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Skips the whole transaction that a conflict stopped, on its node: the nodes differ from then on.
    Skip {
        /// The conflict, as the list names it; the number alone will do if only one node has it.
        #[arg(value_name = "NODE/NUMBER")]
        id: ConflictId,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
}

/// Names a conflict: `sikorsky/12`, or `12`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConflictId {
    /// The node whose log it is in.
    pub node: Option<String>,
    /// Its number there.
    pub number: i64,
}

impl FromStr for ConflictId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (node, number) = text.rsplit_once('/').map_or((None, text), |(node, number)| (Some(node), number));
        let number = number.parse().ok().filter(|number| *number > 0);
        let number = number.ok_or("must be a number, or NODE/NUMBER as in `conflicts list`")?;
        Ok(Self { node: node.map(str::to_owned), number })
    }
}

impl Command {
    /// The verb, as typed.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Status { .. } => "status",
            Self::Check(_) => "check",
            Self::Init(_) => "init",
            Self::Deinit(_) => "deinit",
            Self::SetConnection(_) => "set-connection",
            Self::Down { .. } => "down",
            Self::Up { .. } => "up",
            Self::Hop(_) => "hop",
            Self::Activate { .. } => "activate",
            Self::Watch { .. } => "watch",
            Self::Refresh { .. } => "refresh",
            Self::Conflicts(Conflicts::List { .. }) => "conflicts list",
            Self::Conflicts(Conflicts::Show { .. }) => "conflicts show",
            Self::Conflicts(Conflicts::Resolve { .. }) => "conflicts resolve",
            Self::Conflicts(Conflicts::Skip { .. }) => "conflicts skip",
            Self::Certs(Certs::Deploy { .. }) => "certs deploy",
            Self::Certs(Certs::Check) => "certs check",
            Self::Sequences(Sequences::Check) => "sequences check",
            Self::Sequences(Sequences::Stride { .. }) => "sequences stride",
            Self::Schema(Schema::Apply(_)) => "schema apply",
            Self::Schema(Schema::Run(_)) => "schema run",
            Self::Schema(Schema::Diff { .. }) => "schema diff",
            Self::Schema(Schema::Populate { .. }) => "schema populate",
        }
    }
}

const ADMIN_HELP: &str = "Roles, extensions, publications of all tables and subscriptions are a superuser's to make: all nodes \
are connected to as --admin (postgres, by default), over TLS with --admin-cert and --admin-key, or those of [tls]. Where \
pg_hba.conf lets that role in through the socket only: run as the system's user postgres, with --via NODE=/run/postgresql for \
the node of this host, and for another one a port that is forwarded (ssh -L 6543:/run/postgresql/.s.PGSQL.5432 other.host), \
or its socket (ssh -L /tmp/other/.s.PGSQL.5432:/run/postgresql/.s.PGSQL.5432 other.host, and --via other=/tmp/other).";

const CHECK_HELP: &str = "Exit code 1 if anything is an error, 69 if a node cannot be asked; warnings, and what could not be looked at \
(unknown), are 0. With any of --admin, --admin-cert and --via it looks as a superuser, in the way `init --help` describes.";

/// Options of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// Show what is as it should be, too.
    #[arg(long)]
    pub verbose: bool,
    /// As whom it looks, if not as the agent.
    #[command(flatten)]
    pub admin: Admin,
}

/// Who set-up connects as, and how.
#[derive(Debug, Args)]
pub struct Admin {
    /// The superuser: postgres, unless another one is named.
    #[arg(long, value_name = "ROLE")]
    pub admin: Option<String>,
    /// Its certificate, instead of [tls] cert.
    #[arg(long, value_name = "FILE", requires = "admin_key")]
    pub admin_cert: Option<PathBuf>,
    /// The key of that.
    #[arg(long, value_name = "FILE", requires = "admin_cert")]
    pub admin_key: Option<PathBuf>,
    /// Where a node is reached for this, if not at its host: HOST:PORT, or a socket's directory, with :PORT if it is not 5432.
    /// May be given for each node.
    #[arg(long, value_name = "NODE=PLACE")]
    pub via: Vec<Via>,
}

impl Admin {
    /// Whether anything of it was said.
    pub fn is_given(&self) -> bool {
        self.admin.is_some() || self.admin_cert.is_some() || !self.via.is_empty()
    }

    /// The superuser's name.
    pub fn role(&self) -> &str {
        self.admin.as_deref().unwrap_or("postgres")
    }
}

/// Another way to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Via {
    /// The node.
    pub node: String,
    /// Host, address, or the directory of a socket.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl FromStr for Via {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (node, place) = text.split_once('=').ok_or("must be NODE=PLACE")?;
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_| "the port must be 1 to 65535")?),
            None if place.starts_with('/') => (place, 5432),
            None => return Err("must be NODE=HOST:PORT or NODE=/DIRECTORY".into()),
        };
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if node.is_empty() || host.is_empty() || port == 0 {
            return Err("must be NODE=HOST:PORT or NODE=/DIRECTORY".into());
        }
        Ok(Self { node: node.to_owned(), host: host.to_owned(), port })
    }
}

/// Options of `init`.
#[derive(Debug, Args)]
pub struct Init {
    /// Who connects, and how.
    #[command(flatten)]
    pub admin: Admin,
    /// The node whose rows the others get; needs to be said only if none has any.
    #[arg(long, value_name = "NODE", conflicts_with = "assume_identical")]
    pub from: Option<String>,
    /// All nodes have the same rows already: compare them while nobody can write, and copy nothing.
    #[arg(long)]
    pub assume_identical: bool,
    /// At the end, give each node keys of its own, as `sequences stride` does.
    #[arg(long)]
    pub stride: bool,
    /// How long nothing may move before it gives up.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = patience)]
    pub patience: Duration,
    /// Do it without asking.
    #[arg(long)]
    pub yes: bool,
    /// Say what would be done, and do nothing.
    #[arg(long, conflicts_with = "yes")]
    pub dry_run: bool,
}

/// Options of `deinit`.
#[derive(Debug, Args)]
pub struct Deinit {
    /// Who connects, and how.
    #[command(flatten)]
    pub admin: Admin,
    /// Leave the extension in the databases, with its log of conflicts.
    #[arg(long)]
    pub keep_extension: bool,
    /// Drop the roles of the agent and of the subscriptions, too, unless they own something.
    #[arg(long)]
    pub roles: bool,
    /// Do it on the nodes that can be reached, though others cannot: their slots and subscriptions stay.
    #[arg(long)]
    pub force: bool,
    /// Do it without asking.
    #[arg(long)]
    pub yes: bool,
    /// Say what would be done, and do nothing.
    #[arg(long, conflicts_with = "yes")]
    pub dry_run: bool,
}

/// Options of `set-connection`.
#[derive(Debug, Args)]
pub struct SetConnection {
    /// The node.
    pub node: String,
    /// Where its peers reach it.
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub host: Option<String>,
    /// The port there.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// What the node's own subscriptions present: a file on its host.
    #[arg(long, value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// The key of that.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// The certificates that those of its peers must be signed by.
    #[arg(long, value_name = "FILE")]
    pub root: Option<PathBuf>,
    /// Who connects, and how.
    #[command(flatten)]
    pub admin: Admin,
    /// How long a subscription may take to be connected again before the old is put back.
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = patience)]
    pub patience: Duration,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
}

fn patience(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if duration < Duration::from_secs(1) || duration > Duration::from_secs(86400) {
        return Err("must be 1s to 1day".into());
    }
    Ok(duration)
}

/// Options of `hop`.
#[derive(Debug, Args)]
pub struct Hop {
    /// The node to hop to; may be left out with --resume and --abort.
    #[arg(required_unless_present_any = ["resume", "abort"])]
    pub node: Option<String>,
    /// End with every node writable that was, and the active side on NODE.
    #[arg(long, conflicts_with = "abort")]
    pub both: bool,
    /// After that time it is undone.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = deadline)]
    pub deadline: Duration,
    /// End transactions that do not end in time, instead of giving up.
    #[arg(long, conflicts_with = "abort")]
    pub terminate: bool,
    /// Go on with an unfinished hop; does nothing if there is none.
    #[arg(long, conflicts_with = "abort")]
    pub resume: bool,
    /// Undo an unfinished hop.
    #[arg(long)]
    pub abort: bool,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// For tests: stop this process (SIGSTOP) before or after a step, as in before:open; `undo` counts as one.
    #[arg(long, value_name = "before:STEP|after:STEP", hide = true, value_parser = pause_at_hop)]
    pub pause_at: Option<PauseAt>,
}

fn pause(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=86400.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be 0.1 to 86400".into()),
    }
}

fn deadline(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if duration < Duration::from_millis(100) || duration > Duration::from_secs(3600) {
        return Err("must be 100ms to 1h".into());
    }
    Ok(duration)
}

/// A place in the table of steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PauseAt {
    /// After the step, not before it.
    pub after: bool,
    /// Its name.
    pub step: String,
}

fn pause_at_hop(text: &str) -> Result<PauseAt, String> {
    PauseAt::parse(text, &STEPS)
}

fn pause_at_change(text: &str) -> Result<PauseAt, String> {
    PauseAt::parse(text, &CHANGE_STEPS)
}

fn pause_at_deploy(text: &str) -> Result<PauseAt, String> {
    PauseAt::parse(text, &DEPLOY_STEPS)
}

fn pause_at_stride(text: &str) -> Result<PauseAt, String> {
    PauseAt::parse(text, &STRIDE_STEPS)
}

impl PauseAt {
    fn parse(text: &str, steps: &[&str]) -> Result<Self, String> {
        let (when, step) = text.split_once(':').ok_or("must be before:STEP or after:STEP")?;
        let after = match when {
            "before" => false,
            "after" => true,
            _ => return Err("must begin with before: or after:".into()),
        };
        if step != "undo" && !steps.contains(&step) {
            return Err(format!("no such step; the steps are {}", steps.join(", ")));
        }
        Ok(Self { after, step: step.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn hop_needs_a_node_unless_it_goes_on_with_one() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("x hop").is_err());
        assert!(parse("x hop --resume").is_ok());
        assert!(parse("x hop a --abort").is_ok());
        assert!(parse("x hop a --abort --resume").is_err());
        assert!(parse("x hop a --deadline 1ms").is_err());
        assert!(parse("x status --watch").is_ok());
        assert!(parse("x status --watch 5 --json").is_ok());
        assert!(parse("x watch --once").is_ok());
    }

    #[test]
    fn conflicts_are_named_by_node_and_number() {
        assert_eq!("12".parse(), Ok(ConflictId { node: None, number: 12 }));
        assert_eq!("a.b-c/7".parse(), Ok(ConflictId { node: Some("a.b-c".into()), number: 7 }));
        for bad in ["", "a", "a/", "a/0", "/", "a/-3", "a/1x"] {
            assert!(bad.parse::<ConflictId>().is_err(), "{bad}");
        }
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("x conflicts list --node a --all --json").is_ok());
        assert!(parse("x conflicts show a/1").is_ok());
        assert!(parse("x conflicts resolve 1 --keep newest --dry-run").is_ok());
        assert!(parse("x conflicts resolve 1").is_err());
        assert!(parse("x conflicts resolve 1 --keep both").is_err());
        assert!(parse("x conflicts skip a/1").is_ok());
        assert!(parse("x conflicts skip").is_err());
    }

    #[test]
    fn another_way_to_a_node_is_understood() {
        let via = |host: &str, port| Ok(Via { node: "a".into(), host: host.into(), port });
        assert_eq!("a=/run/postgresql".parse(), via("/run/postgresql", 5432));
        assert_eq!("a=/tmp/x:5433".parse(), via("/tmp/x", 5433));
        assert_eq!("a=localhost:6543".parse(), via("localhost", 6543));
        assert_eq!("a=[::1]:6543".parse(), via("::1", 6543));
        for bad in ["", "a", "a=", "a=h", "=h:1", "a=h:0", "a=h:x", "a=:1"] {
            assert!(bad.parse::<Via>().is_err(), "{bad}");
        }
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("x init --via a=/run --via b=h:1 --admin me --yes --from a").is_ok());
        assert!(parse("x init --yes --dry-run").is_err());
        assert!(parse("x init --from a --assume-identical").is_err());
        assert!(parse("x init --admin-cert c").is_err());
        assert!(parse("x deinit --roles --force").is_ok());
        assert!(parse("x set-connection a --host h --port 1").is_ok());
        assert!(parse("x set-connection --host h").is_err());
    }

    #[test]
    fn places_to_pause_are_checked() {
        assert_eq!(pause_at_hop("after:open"), Ok(PauseAt { after: true, step: "open".into() }));
        assert_eq!(pause_at_deploy("before:undo"), Ok(PauseAt { after: false, step: "undo".into() }));
        assert!(pause_at_hop("open").is_err());
        assert!(pause_at_deploy("after:open").is_err());
    }
}
