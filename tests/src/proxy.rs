//! A TCP link on loopback that can be cut, frozen, slowed down and healed.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::sleep,
};

use crate::{background, log_check::Expected, scratch::Port, wait::PATIENCE};

/// Between two attempts to listen.
const GLANCE: Duration = Duration::from_millis(5);

/// A slow link passes something so many times in a second.
const PORTIONS: usize = 20;

/// Listens on a port of its own and passes bytes on to another one.
pub struct Proxy {
    port: Port,
    orders: mpsc::UnboundedSender<Order>,
    expected: Expected,
}

/// What to do, and whom to tell when it has been done.
type Order = (Link, oneshot::Sender<io::Result<()>>);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Link {
    Open,
    /// Passes about so many bytes in a second.
    Slow(usize),
    Frozen,
    Cut,
}

impl Proxy {
    /// Opens a link to that port of 127.0.0.1. Whatever the servers at its ends log when it is disturbed goes to `expected`.
    pub async fn open(target: u16, expected: &Expected) -> Result<Self> {
        let port = Port::take()?;
        let (orders, inbox) = mpsc::unbounded_channel();
        background().spawn(serve(address(port.number), address(target), inbox));
        let proxy = Self { port, orders, expected: expected.clone() };
        proxy.order(Link::Open).await?;
        Ok(proxy)
    }

    /// The port to connect to instead of the target's.
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// Closes what is connected and refuses what comes, as if the host were gone. Done when it returns.
    pub async fn cut(&self) -> Result<()> {
        self.expected.allow_weather();
        self.order(Link::Cut).await
    }

    /// Keeps connections, and accepts new ones, but passes nothing, as if a cable were pulled.
    pub async fn freeze(&self) -> Result<()> {
        self.expected.allow_weather();
        self.order(Link::Frozen).await
    }

    /// Passes about so many bytes in a second, each way of each connection.
    pub async fn slow(&self, bytes_per_second: usize) -> Result<()> {
        self.order(Link::Slow(bytes_per_second)).await
    }

    /// Passes everything again; what was frozen arrives, what was cut has to connect anew.
    pub async fn heal(&self) -> Result<()> {
        self.order(Link::Open).await
    }

    async fn order(&self, link: Link) -> Result<()> {
        let (done, answer) = oneshot::channel();
        self.orders.send((link, done)).ok().context("the proxy is gone")?;
        answer.await.context("the proxy is gone")?.with_context(|| format!("proxy on port {}", self.port.number))
    }
}

fn address(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Lives until the [`Proxy`] is dropped.
async fn serve(listen: SocketAddr, target: SocketAddr, mut orders: mpsc::UnboundedReceiver<Order>) {
    let (link, _) = watch::channel(Link::Cut);
    let link = Arc::new(link);
    let mut listener: Option<TcpListener> = None;
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            order = orders.recv() => {
                let Some((wanted, done)) = order else { return };
                let result = if wanted == Link::Cut {
                    listener = None;
                    // Waits until every socket is closed.
                    connections.shutdown().await;
                    Ok(())
                } else if listener.is_none() {
                    bind(listen).await.map(|bound| listener = Some(bound))
                } else {
                    Ok(())
                };
                link.send_replace(wanted);
                let _ = done.send(result);
            }
            Ok((client, _)) = accept(listener.as_ref()), if listener.is_some() => {
                connections.spawn(pass(client, target, link.subscribe()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// A process that another test is just starting has a copy of every socket until its exec, the closed one included.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let patience = Instant::now() + PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < patience => {
                sleep(GLANCE).await;
            }
            result => return result,
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}

/// One connection. PostgreSQL never closes one direction only, so the first end is the end of both.
async fn pass(client: TcpStream, target: SocketAddr, mut link: watch::Receiver<Link>) {
    if link.wait_for(passes).await.is_err() {
        return;
    }
    let Ok(server) = TcpStream::connect(target).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_reads, client_writes) = client.into_split();
    let (server_reads, server_writes) = server.into_split();
    tokio::select! {
        _ = pump(client_reads, server_writes, link.clone()) => {}
        _ = pump(server_reads, client_writes, link) => {}
    }
}

fn passes(link: &Link) -> bool {
    matches!(link, Link::Open | Link::Slow(_))
}

async fn pump(
    mut from: tcp::OwnedReadHalf,
    mut to: tcp::OwnedWriteHalf,
    mut link: watch::Receiver<Link>,
) -> Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let rate = match *link.borrow() {
            Link::Slow(rate) => Some(rate),
            _ => None,
        };
        let portion = rate.map_or(buffer.len(), |rate| (rate / PORTIONS).clamp(1, buffer.len()));
        let read = from.read(&mut buffer[..portion]).await;
        if rate.is_some() {
            sleep(Duration::from_secs(1) / PORTIONS as u32).await;
        }
        // Also an end is news, which a frozen link does not pass on.
        link.wait_for(passes).await?;
        match read? {
            0 => return Ok(()),
            length => to.write_all(&buffer[..length]).await?,
        }
    }
}
