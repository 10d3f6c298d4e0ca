//! Connections: the only file that opens one.
//!
//! Deliberately knows nothing of hops or states. Every call is bounded; an error names the node, its address and what to do
//! next, and never a password or anything out of a key.

use std::collections::HashMap;
use std::error::Error as _;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use openssl::pkey::PKey;
use openssl::ssl::{Ssl, SslConnector, SslMethod, SslVerifyMode};
use openssl::x509::store::X509StoreBuilder;
use postgres_openssl::MakeTlsConnector;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;
use tokio_openssl::SslStream;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client, NoTls, Notification, Row, Statement};

use crate::certs::Chain;
use crate::config::{Config, Node, TlsMode};
use crate::failure::{Failure, Kind};
use crate::{pgpass, sql};

/// What the agent's sessions are called on the servers.
pub const APPLICATION_NAME: &str = "stillebot-agent";
/// How long one address may take to answer a connection attempt.
pub const ADDRESS_BOUND: Duration = Duration::from_secs(1);
/// How long a name may take to be resolved.
const NAME_BOUND: Duration = Duration::from_secs(5);
/// What to do about a lock that was not to be had.
pub const LOCKED: &str = "somebody holds a lock on it, see pg_locks; wait for its end, or longer: --lock-timeout";
/// Notifications that wait to be heard; more are dropped, as each only says that there is something to look at.
const EARFUL: usize = 64;

/// A query's parameters.
pub type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// What went wrong with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// No connection was made.
    Unreachable,
    /// The connection broke, or the server did not answer in time: what was asked may have been done or not.
    Lost,
    /// The server answered with an error; it did not do what was asked.
    Refused,
}

/// An error of a node, fit to be shown.
#[derive(Debug, Clone, thiserror::Error)]
pub struct NodeError {
    /// The node.
    pub node: String,
    /// Host and port as configured.
    pub place: Box<str>,
    /// Whether it was done or not.
    pub trouble: Trouble,
    /// What the server or the operating system said.
    pub message: String,
    /// More of it.
    pub detail: Option<String>,
    /// What to do next.
    pub hint: Option<String>,
    /// The server itself said so, with an SQLSTATE.
    pub answered: bool,
}

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.node, self.place, self.message)
    }
}

impl From<NodeError> for Failure {
    fn from(error: NodeError) -> Self {
        let kind = if error.trouble == Trouble::Refused { Kind::Undone } else { Kind::Unreachable };
        let mut failure = Self::new(kind, error.to_string());
        failure.detail = error.detail;
        failure.hint = error.hint;
        failure
    }
}

fn place(node: &Node) -> String {
    if node.is_local() {
        format!("socket {}, port {}", node.host, node.port)
    } else if let Some(through) = &node.through {
        format!("{} through {through}:{}", node.host, node.port)
    } else {
        format!("{}:{}", node.host, node.port)
    }
}

/// What came of trying one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Somebody listens there.
    Listens,
    /// It said no at once, or the system did: what.
    Refuses(String),
    /// Nothing, for [`ADDRESS_BOUND`].
    Silent,
}

/// Tries each address of a host, all at once, and says nothing there. The error says why the name has no addresses.
pub async fn try_each(host: &str, port: u16) -> Result<Vec<(SocketAddr, Answer)>, String> {
    let addresses: Vec<SocketAddr> = match timeout(NAME_BOUND, tokio::net::lookup_host((host, port))).await {
        Ok(Ok(addresses)) => addresses.collect(),
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => {
            return Err(format!("the resolver does not answer within {}", humantime::format_duration(NAME_BOUND)));
        }
    };
    let answers = addresses.into_iter().map(|address| async move {
        let answer = match timeout(ADDRESS_BOUND, TcpStream::connect(address)).await {
            Ok(Ok(_)) => Answer::Listens,
            Ok(Err(error)) => Answer::Refuses(error.to_string()),
            Err(_) => Answer::Silent,
        };
        (address, answer)
    });
    Ok(futures_util::future::join_all(answers).await)
}

/// Root, certificate and key, read.
struct Tls {
    connector: MakeTlsConnector,
    files: Files,
}

/// Which files those were: changes when one is replaced.
type Files = Vec<Option<(u64, i64, i64, u64)>>;

fn files(config: &Config) -> Files {
    let paths = [&config.tls.root, &config.tls.cert, &config.tls.key];
    let file = |path: &PathBuf| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.size()))
    };
    paths.into_iter().flatten().map(file).collect()
}

/// What came of a TLS handshake.
pub enum Handshake {
    /// The certificates that the server presented.
    Served(Chain),
    /// No server listens there.
    NotRunning,
}

/// Makes connections to the nodes of one configuration.
pub struct Connector {
    config: Config,
    /// None with `mode = "disable"`.
    tls: Mutex<Option<Tls>>,
    /// One task for each connection made.
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Connector {
    /// Reads certificates and key.
    pub fn new(config: &Config) -> Result<Self, Failure> {
        let tls = match config.tls.mode {
            TlsMode::Disable => None,
            mode => Some(Tls { files: files(config), connector: tls(config, mode)? }),
        };
        Ok(Self { config: config.clone(), tls: Mutex::new(tls), tasks: Mutex::new(Vec::new()) })
    }

    /// What connections are secured with. Whoever watches for months has to use the certificate that was renewed meanwhile.
    fn tls(&self) -> Option<MakeTlsConnector> {
        let mut kept = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = kept.as_mut()?;
        let files = files(&self.config);
        if files != kept.files {
            match tls(&self.config, self.config.tls.mode) {
                Ok(connector) => *kept = Tls { connector, files },
                // Half-way through being replaced, perhaps: what was read before still serves, and the next connection looks
                // again.
                Err(failure) => tracing::warn!("{failure}; going on with what was read before"),
            }
        }
        Some(kept.connector.clone())
    }

    /// What a node's server presents to whoever comes, however it is signed. Over a socket there is no TLS, so that one is asked
    /// where its peers reach it.
    pub async fn handshake(&self, node: &Node, bound: Duration) -> Result<Handshake, NodeError> {
        let mut node = node.clone();
        if node.is_local() {
            node.port = node.replication.port.unwrap_or(node.port);
            node.host = node.replication.host.clone().unwrap_or_else(|| "localhost".into());
        }
        let work = async {
            let mut last = None;
            for address in addresses(&node).await? {
                let met = match timeout(ADDRESS_BOUND, TcpStream::connect(address)).await {
                    Ok(met) => met,
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                };
                match met {
                    Ok(stream) => return present(&node, stream).await.map(Handshake::Served),
                    Err(error) => last = Some(error),
                }
            }
            match last {
                Some(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(Handshake::NotRunning),
                last => {
                    let message = last.map_or_else(|| "no address".into(), |error| error.to_string());
                    Err(unreachable(&node, message, "check that the host is up and node.host is right"))
                }
            }
        };
        match timeout(bound, work).await {
            Ok(result) => result,
            Err(_) => Err(unreachable(
                &node,
                format!("no handshake within {}", humantime::format_duration(bound)),
                "check that the server runs and that nothing swallows the packets on the way",
            )),
        }
    }

    /// Gives the sessions that have been dropped a moment to say goodbye to their servers.
    pub async fn farewell(&self) {
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let _ = timeout(Duration::from_millis(300), futures_util::future::join_all(tasks)).await;
    }

    /// Gives a connection a task of its own. The notifications end when the connection does.
    fn spawn<S, T>(
        &self,
        node: &Node,
        mut connection: tokio_postgres::Connection<S, T>,
    ) -> (AbortHandle, mpsc::Receiver<Notification>)
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
        T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let node = node.name.clone();
        let (sender, notifications) = mpsc::channel(EARFUL);
        let task = tokio::spawn(async move {
            while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
                match message {
                    // Nobody listening is no reason to stop: the statements still need the connection.
                    Ok(AsyncMessage::Notification(notification)) => drop(sender.try_send(notification)),
                    Ok(AsyncMessage::Notice(notice)) => tracing::debug!(node, notice = notice.message(), "notice"),
                    Ok(_) => {}
                    Err(error) => {
                        tracing::debug!(node, error = chain(&error), "connection ended");
                        break;
                    }
                }
            }
        });
        let handle = task.abort_handle();
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
        (handle, notifications)
    }

    /// Connects, trying the node's addresses one after the other.
    pub async fn connect(&self, node: &Node, bound: Duration) -> Result<Session, NodeError> {
        match timeout(bound, self.try_addresses(node)).await {
            Ok(result) => result,
            Err(_) => Err(unreachable(
                node,
                format!("no connection within {}", humantime::format_duration(bound)),
                "check that the server runs and that nothing swallows the packets on the way",
            )),
        }
    }

    async fn try_addresses(&self, node: &Node) -> Result<Session, NodeError> {
        if node.is_local() {
            return self.connect_to(node, None).await;
        }
        let addresses = addresses(node).await?;
        let mut errors: Vec<NodeError> = Vec::new();
        for address in &addresses {
            match self.connect_to(node, Some(*address)).await {
                Ok(session) => return Ok(session),
                // The server is there and says no: other addresses lead to the same server.
                Err(error) if error.answered => return Err(error),
                Err(error) => errors.push(error),
            }
        }
        let mut error = errors.pop().unwrap_or_else(|| unreachable(node, "no address".into(), "check node.host"));
        if !errors.is_empty() {
            errors.push(error.clone());
            error.message = addresses
                .iter()
                .zip(&errors)
                .map(|(address, error)| format!("{}: {}", address.ip(), error.message))
                .collect::<Vec<_>>()
                .join("; ");
        }
        Err(error)
    }

    async fn connect_to(&self, node: &Node, address: Option<SocketAddr>) -> Result<Session, NodeError> {
        let mut settings = tokio_postgres::Config::new();
        settings
            .user(&self.config.user)
            .dbname(&self.config.database)
            .application_name(APPLICATION_NAME)
            .port(node.port)
            .host(&node.host)
            .connect_timeout(ADDRESS_BOUND)
            .keepalives_idle(Duration::from_secs(5))
            .keepalives_interval(Duration::from_secs(2))
            .keepalives_retries(3)
            .tcp_user_timeout(Duration::from_secs(10))
            // What the server should do when this agent or the link to it dies: notice, and give up what it was asked.
            .options(
                "-c client_connection_check_interval=500 -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 \
                 -c tcp_keepalives_count=3 -c tcp_user_timeout=10000 -c idle_in_transaction_session_timeout=15000 \
                 -c search_path=pg_catalog",
            );
        if let Some(address) = address {
            settings.hostaddr(address.ip());
        }
        let password =
            self.config.passfile.as_deref().and_then(pgpass::read).and_then(|text| {
                pgpass::lookup(&text, &node.host, node.port, &self.config.database, &self.config.user)
            });
        if let Some(password) = password {
            settings.password(password);
        }
        let started = tokio::time::Instant::now();
        let connected = match self.tls() {
            Some(tls) if !node.is_local() => {
                settings.ssl_mode(SslMode::Require);
                settings.connect(tls).await.map(|(client, connection)| (client, self.spawn(node, connection)))
            }
            _ => {
                settings.ssl_mode(SslMode::Disable);
                settings.connect(NoTls).await.map(|(client, connection)| (client, self.spawn(node, connection)))
            }
        };
        let (client, (connection, notifications)) = connected.map_err(|error| connect_error(node, &error))?;
        tracing::debug!(node = node.name, address = ?address, elapsed = ?started.elapsed(), "connected");
        let mut session = Session {
            node: node.name.clone(),
            place: place(node),
            client,
            connection,
            notifications: Some(notifications),
            statements: Mutex::new(HashMap::new()),
            backend: (0, 0),
        };
        let row = session.row(sql::SELF, &[], Duration::from_secs(5)).await?;
        session.backend = (row.get("pid"), row.get("started_us"));
        Ok(session)
    }
}

/// One connection to one node. Dropping it ends it, after what it was asked; see [`Session::abandon`].
pub struct Session {
    /// The node's name.
    pub node: String,
    place: String,
    client: Client,
    connection: AbortHandle,
    notifications: Option<mpsc::Receiver<Notification>>,
    statements: Mutex<HashMap<String, Statement>>,
    /// Process id and start (microseconds) of the server's process for this session.
    pub backend: (i32, i64),
}

impl Session {
    /// Closes the socket at once, whatever the server is doing: it notices, and gives up what it was asked.
    pub fn abandon(self) {
        self.connection.abort();
    }

    /// Whether the connection is known to be lost.
    pub fn is_lost(&self) -> bool {
        self.client.is_closed()
    }

    /// What comes in for this session once it has said LISTEN; ends when the connection does. None the second time.
    pub fn notifications(&mut self) -> Option<mpsc::Receiver<Notification>> {
        self.notifications.take()
    }

    /// Prepares a query, so that the first use costs one round trip only.
    pub async fn prepare(&self, query: &str, bound: Duration) -> Result<Statement, NodeError> {
        let known = self.statements.lock().unwrap_or_else(PoisonError::into_inner).get(query).cloned();
        if let Some(statement) = known {
            return Ok(statement);
        }
        let statement = self.bounded(self.client.prepare(query), bound).await?;
        self.statements.lock().unwrap_or_else(PoisonError::into_inner).insert(query.to_owned(), statement.clone());
        Ok(statement)
    }

    /// All rows of a query.
    pub async fn rows(&self, query: &str, params: Params<'_>, bound: Duration) -> Result<Vec<Row>, NodeError> {
        let statement = self.prepare(query, bound).await?;
        self.bounded(self.client.query(&statement, params), bound).await
    }

    /// The first row of a query that has one.
    pub async fn row(&self, query: &str, params: Params<'_>, bound: Duration) -> Result<Row, NodeError> {
        let rows = self.rows(query, params, bound).await?;
        rows.into_iter().next().ok_or_else(|| self.error(Trouble::Refused, "the server returned no row".into()))
    }

    /// Runs statements that return nothing.
    pub async fn run(&self, statements: &str, bound: Duration) -> Result<(), NodeError> {
        self.bounded(self.client.batch_execute(statements), bound).await
    }

    /// Runs statements that somebody else wrote, as [`Session::run`]; of an error in a part that the server reads by itself, as in
    /// EXECUTE, it says where, and what to do.
    pub async fn script(&self, statements: &str, bound: Duration) -> Result<(), NodeError> {
        let error = match timeout(bound, self.client.batch_execute(statements)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => return self.bounded(std::future::pending(), Duration::ZERO).await,
        };
        let mut told = self.call_error(&error);
        if let Some(db) = error.as_db_error() {
            if let Some(tokio_postgres::error::ErrorPosition::Internal { position, query }) = db.position() {
                let before: String = query.chars().take(*position as usize - 1).collect();
                let number = before.matches('\n').count();
                let line = query.lines().nth(number).unwrap_or_default().trim();
                let place = format!("line {}: {line}", number + 1);
                told.detail = Some(told.detail.map_or_else(|| place.clone(), |detail| format!("{detail}\n{place}")));
            }
            let hint = match db.code().code() {
                "0A000" if db.message().contains("transaction") => {
                    Some("all of the file is one transaction: leave BEGIN, COMMIT and the like out")
                }
                "25001" | "2D000" => {
                    Some("all of the file is one transaction: what cannot be in one is for `schema run`")
                }
                "55P03" => Some(LOCKED),
                _ => None,
            };
            told.hint = told.hint.or(hint.map(str::to_owned));
        }
        Err(told)
    }

    /// Prepares the transaction of this session. Of one that has done what cannot be prepared it returns why; it is rolled back
    /// then.
    pub async fn prepare_transaction(&self, gid: &str, bound: Duration) -> Result<Option<String>, NodeError> {
        let statement = format!("prepare transaction {}", crate::quote::literal(gid));
        match timeout(bound, self.client.batch_execute(&statement)).await {
            Ok(Ok(())) => Ok(None),
            Ok(Err(error)) if error.code() == Some(&SqlState::FEATURE_NOT_SUPPORTED) => {
                Ok(Some(self.call_error(&error).message))
            }
            Ok(Err(error)) => Err(self.call_error(&error)),
            Err(_) => self.bounded(std::future::pending(), Duration::ZERO).await,
        }
    }

    /// Runs one statement in a transaction of its own that says READ WRITE; returns the number of rows it changed.
    pub async fn write(&self, statement: &str, params: Params<'_>, bound: Duration) -> Result<u64, NodeError> {
        let statement = self.prepare(statement, bound).await?;
        let work = async {
            self.client.batch_execute("begin read write").await?;
            match self.client.execute(&statement, params).await {
                Ok(changed) => self.client.batch_execute("commit").await.map(|()| changed),
                Err(error) => {
                    // The first error is the one to tell.
                    let _ = self.client.batch_execute("rollback").await;
                    Err(error)
                }
            }
        };
        self.bounded(work, bound).await
    }

    /// A handle that asks the server to cancel what it is doing for this session.
    pub async fn cancel(&self, connector: &Connector, bound: Duration) {
        let token = self.client.cancel_token();
        let cancelled = match (connector.tls(), self.place.starts_with("socket")) {
            (Some(tls), false) => timeout(bound, token.cancel_query(tls)).await,
            _ => timeout(bound, token.cancel_query(NoTls)).await,
        };
        tracing::debug!(node = self.node, ?cancelled, "cancel request");
    }

    async fn bounded<T>(
        &self,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
        bound: Duration,
    ) -> Result<T, NodeError> {
        match timeout(bound, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.call_error(&error)),
            Err(_) => Err(self.error(
                Trouble::Lost,
                format!(
                    "no answer within {}",
                    humantime::format_duration(Duration::from_millis(bound.as_millis() as u64))
                ),
            )),
        }
    }

    /// An error of this node that the agent has found itself.
    pub fn error(&self, trouble: Trouble, message: String) -> NodeError {
        NodeError {
            node: self.node.clone(),
            place: self.place.clone().into(),
            trouble,
            message,
            detail: None,
            hint: None,
            answered: false,
        }
    }

    fn call_error(&self, error: &tokio_postgres::Error) -> NodeError {
        let Some(db) = error.as_db_error() else {
            return self.error(Trouble::Lost, chain(error));
        };
        let fatal = matches!(db.severity(), "FATAL" | "PANIC") || self.client.is_closed();
        let mut result = self.error(if fatal { Trouble::Lost } else { Trouble::Refused }, db.message().to_owned());
        result.detail = db.detail().map(str::to_owned);
        result.hint = db.hint().map(str::to_owned);
        result.answered = true;
        if db.code().code() == "42501" && result.hint.is_none() {
            result.hint = Some("grant the agent's role what it needs; see the README".into());
        }
        result
    }
}

/// The addresses of a node, of the family wanted; at least one.
async fn addresses(node: &Node) -> Result<Vec<SocketAddr>, NodeError> {
    let dialled = node.through.as_deref().unwrap_or(&node.host);
    let admitted = |address: &SocketAddr| node.through.is_some() || node.family.admits(address.ip());
    let found = tokio::net::lookup_host((dialled, node.port)).await.map_err(|error| {
        unreachable(node, format!("cannot resolve the name: {error}"), "check node.host and the resolver")
    })?;
    let addresses: Vec<SocketAddr> = found.filter(admitted).collect();
    if addresses.is_empty() {
        return Err(unreachable(
            node,
            "the name has no address of the wanted family".into(),
            "check node.family and the name's A and AAAA records",
        ));
    }
    Ok(addresses)
}

/// PostgreSQL's way into TLS: asked for in eight bytes, answered in one.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Has a server present its certificates, and leaves. What they are worth is judged elsewhere.
async fn present(node: &Node, mut stream: TcpStream) -> Result<Chain, NodeError> {
    let failed = |message: String| unreachable(node, message, "look into the server's log");
    let mut answer = [0];
    let asked = async {
        stream.write_all(&SSL_REQUEST).await?;
        stream.read_exact(&mut answer).await
    };
    asked.await.map_err(|error| failed(format!("no answer to the request for TLS: {error}")))?;
    if answer != *b"S" {
        return Err(unreachable(
            node,
            "the server does not offer TLS".into(),
            "switch ssl on in the server's postgresql.conf; if it is, its certificate could not be loaded: see its log",
        ));
    }
    let prepare = || -> Result<Ssl, openssl::error::ErrorStack> {
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        builder.set_verify(SslVerifyMode::NONE);
        let mut settings = builder.build().configure()?;
        settings.set_verify_hostname(false);
        settings.into_ssl(&node.host)
    };
    let ssl = prepare().map_err(|error| failed(format!("tls: {error}")))?;
    let mut stream = SslStream::new(ssl, stream).map_err(|error| failed(format!("tls: {error}")))?;
    Pin::new(&mut stream).connect().await.map_err(|error| failed(format!("tls: {error}")))?;
    let chain = stream.ssl().peer_cert_chain().map(|chain| chain.iter().map(ToOwned::to_owned).collect());
    // That nobody says goodbye, the server does not mind.
    let _ = timeout(Duration::from_millis(100), stream.shutdown()).await;
    chain.and_then(Chain::of).ok_or_else(|| failed("the server presented no certificate".into()))
}

fn unreachable(node: &Node, message: String, hint: &str) -> NodeError {
    NodeError {
        node: node.name.clone(),
        place: place(node).into(),
        trouble: Trouble::Unreachable,
        message,
        detail: None,
        hint: Some(hint.into()),
        answered: false,
    }
}

fn connect_error(node: &Node, error: &tokio_postgres::Error) -> NodeError {
    if let Some(db) = error.as_db_error() {
        let hint = match db.code().code() {
            "28000" | "28P01" => {
                "check the server's pg_hba.conf and the agent's user, certificate or password file".to_owned()
            }
            "3D000" => "check `database` in the configuration".to_owned(),
            "53300" => "raise max_connections or reserve connections for the agent".to_owned(),
            "57P03" => "the server is starting or stopping; try again".to_owned(),
            _ => db.hint().unwrap_or("look into the server's log").to_owned(),
        };
        let mut result = unreachable(node, db.message().to_owned(), &hint);
        result.detail = db.detail().map(str::to_owned);
        result.answered = true;
        return result;
    }
    let message = chain(error);
    let hint = if message.contains("certificate verify failed") {
        "the server's certificate is not signed by tls.root or not issued for node.host"
    } else if message.contains("alert") {
        "the server did not accept the agent's certificate: check tls.cert, tls.key and the server's ssl_ca_file"
    } else if message.contains("does not support TLS") {
        "switch ssl on in the server's postgresql.conf"
    } else if message.contains("timed out") {
        "check that the host is up; if one of its addresses does not route, set node.family"
    } else if message.contains("password missing") {
        "the server asks for a password: add a line to the password file (PGPASSFILE)"
    } else {
        "check that the server runs, listens there, and that node.host and node.port are right"
    };
    unreachable(node, message, hint)
}

/// An error with its causes, in one line.
fn chain(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn tls(config: &Config, mode: TlsMode) -> Result<MakeTlsConnector, Failure> {
    let flaw = |what: String| Failure::new(Kind::Configuration, what);
    let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(|error| flaw(format!("tls: {error}")))?;
    if let Some(root) = &config.tls.root {
        readable("tls.root", root)?;
        // As libpq's sslrootcert: in the place of the system's authorities, not beside them.
        let store = X509StoreBuilder::new().map_err(|error| flaw(format!("tls: {error}")))?;
        builder.set_cert_store(store.build());
        builder
            .set_ca_file(root)
            .map_err(|_| flaw(format!("tls.root: {} holds no PEM certificate", root.display())))?;
    }
    if let (Some(cert), Some(key)) = (&config.tls.cert, &config.tls.key) {
        readable("tls.cert", cert)?;
        builder
            .set_certificate_chain_file(cert)
            .map_err(|_| flaw(format!("tls.cert: {} holds no PEM certificate", cert.display())))?;
        let pem = private(key)?;
        // The callback answers instead of a question on the terminal: a key with a passphrase is no use to an agent.
        let key_pair = PKey::private_key_from_pem_callback(&pem, |_| Ok(0))
            .map_err(|_| flaw(format!("tls.key: {} holds no PEM key, or one with a passphrase", key.display())))?;
        builder
            .set_private_key(&key_pair)
            .and_then(|()| builder.check_private_key())
            .map_err(|_| flaw(format!("tls.key: {} does not belong to {}", key.display(), cert.display())))?;
    }
    let verify_host = mode == TlsMode::VerifyFull;
    if mode == TlsMode::Require && config.tls.root.is_none() {
        builder.set_verify(SslVerifyMode::NONE);
    }
    let mut connector = MakeTlsConnector::new(builder.build());
    connector.set_callback(move |connection, _host| {
        connection.set_verify_hostname(verify_host);
        Ok(())
    });
    Ok(connector)
}

fn readable(key: &str, path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path)
        .map_err(|error| Failure::new(Kind::Configuration, format!("{key}: cannot read {}: {error}", path.display())))
}

/// Reads a key that nobody else can read; root's may be readable by its group, as libpq allows.
fn private(path: &Path) -> Result<Vec<u8>, Failure> {
    let pem = readable("tls.key", path)?;
    if let Ok(metadata) = std::fs::metadata(path) {
        let forbidden = if metadata.uid() == 0 { 0o027 } else { 0o077 };
        if metadata.mode() & forbidden != 0 {
            return Err(Failure::new(
                Kind::Configuration,
                format!("tls.key: {} is accessible to others", path.display()),
            )
            .hint("chmod 0600 it (0640 if it belongs to root)"));
        }
    }
    Ok(pem)
}
