//! The only file that opens connections to servers.

use std::{
    future::poll_fn,
    io::{Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use openssl::ssl::{SslConnector, SslMethod, SslVerifyMode};
use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Client, Config, Connection, NoTls, Notification, config::SslMode};

use crate::authority::{Authority, serial};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a server listens, and who signs there.
#[derive(Clone)]
pub struct Endpoint {
    pub(crate) port: u16,
    pub(crate) socket_directory: PathBuf,
    pub(crate) authority: &'static Authority,
}

/// A session that hears: what comes in beside the answers to its statements.
pub struct Listener {
    /// The session.
    pub client: Client,
    /// The reported parameter `default_transaction_read_only` at the time of the connection.
    pub default_transaction_read_only: bool,
    /// Notifications in order. Ends when the connection does.
    pub notifications: mpsc::UnboundedReceiver<Notification>,
}

impl Endpoint {
    /// The same server, reached through another port (of a [`crate::Proxy`]).
    pub fn through(&self, port: u16) -> Self {
        Self { port, ..self.clone() }
    }

    /// Over TLS, verified in full, with a client certificate of that role.
    pub async fn connect(&self, role: &str, database: &str, application: &str) -> Result<Client> {
        Ok(self.listen(role, database, application).await?.client)
    }

    /// As [`Endpoint::connect`], with ears.
    pub async fn listen(&self, role: &str, database: &str, application: &str) -> Result<Listener> {
        let mut config = self.config(role, database, application);
        config.host("127.0.0.1").ssl_mode(SslMode::Require);
        let (client, connection) = config
            .connect(self.authority.connector(role)?)
            .await
            .with_context(|| format!("as {role} to port {}", self.port))?;
        Ok(drive(client, connection))
    }

    /// As superuser `postgres` through the unix socket.
    pub async fn superuser(&self, database: &str) -> Result<Client> {
        let mut config = self.config("postgres", database, "harness");
        config.host_path(&self.socket_directory);
        let (client, connection) =
            config.connect(NoTls).await.with_context(|| format!("as superuser to port {}", self.port))?;
        Ok(drive(client, connection).client)
    }

    /// The serial number, hexadecimal, of the certificate that the server presents to whoever comes.
    pub async fn presented_serial(&self) -> Result<String> {
        let port = self.port;
        tokio::task::spawn_blocking(move || {
            let address = ("127.0.0.1", port).to_socket_addrs()?.next().context("no address")?;
            let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
            stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
            // PostgreSQL's way into TLS.
            stream.write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f])?;
            let mut answer = [0];
            stream.read_exact(&mut answer)?;
            ensure!(answer == *b"S", "no TLS on port {port}");
            let mut connector = SslConnector::builder(SslMethod::tls_client())?;
            connector.set_verify(SslVerifyMode::NONE);
            let stream = connector.build().connect("localhost", stream).map_err(|error| anyhow!("{error}"))?;
            let certificate = stream.ssl().peer_certificate().context("no certificate")?;
            serial(&certificate)
        })
        .await?
    }

    fn config(&self, role: &str, database: &str, application: &str) -> Config {
        let mut config = Config::new();
        config.port(self.port).user(role).dbname(database).application_name(application);
        config.connect_timeout(CONNECT_TIMEOUT);
        config
    }
}

/// Gives the connection a task of its own, which ends with the client or with the server.
fn drive<S, T>(client: Client, mut connection: Connection<S, T>) -> Listener
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let default_transaction_read_only = connection.parameter("default_transaction_read_only") == Some("on");
    let (sender, notifications) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notification(notification) = message {
                // Nobody listening is no reason to stop: the statements still need the connection.
                let _ = sender.send(notification);
            }
        }
    });
    Listener { client, default_transaction_read_only, notifications }
}
