//! What ends a command before its time: signals and the deadline.
//!
//! Deliberately only says *that* it is time; what is undone is decided elsewhere.

use std::fmt;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Tells whether SIGINT or SIGTERM has come.
#[derive(Clone)]
pub struct Signals(watch::Receiver<Option<&'static str>>);

impl Signals {
    /// Begins to listen, for the rest of the process's life.
    pub fn listen() -> std::io::Result<Self> {
        let (send, receive) = watch::channel(None);
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        tokio::spawn(async move {
            loop {
                let name = tokio::select! {
                    _ = interrupt.recv() => "SIGINT",
                    _ = terminate.recv() => "SIGTERM",
                };
                if send.send(Some(name)).is_err() {
                    break;
                }
            }
        });
        Ok(Self(receive))
    }

    /// The signal that has come, if any.
    pub fn received(&self) -> Option<&'static str> {
        *self.0.borrow()
    }

    /// Waits for a signal; at once if one has come already.
    pub async fn wait(&self) -> &'static str {
        let mut receiver = self.0.clone();
        match receiver.wait_for(Option::is_some).await {
            Ok(name) => name.unwrap_or("signal"),
            Err(_) => std::future::pending().await,
        }
    }
}

/// Why something was not waited for any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Halt {
    /// The time for the whole command is over.
    Deadline(Duration),
    /// A signal came.
    Signal(&'static str),
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deadline(total) => write!(f, "the deadline of {} passed", humantime::format_duration(*total)),
            Self::Signal(name) => write!(f, "stopped by {name}"),
        }
    }
}

/// Until when a command may take, and the signals.
#[derive(Clone)]
pub struct Limits {
    deadline: Instant,
    total: Duration,
    signals: Signals,
}

impl Limits {
    /// Counts from now.
    pub fn new(total: Duration, signals: &Signals) -> Self {
        Self { deadline: Instant::now() + total, total, signals: signals.clone() }
    }

    /// What is left; zero when it is over.
    pub fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// The whole of it.
    pub fn total(&self) -> Duration {
        self.total
    }

    /// An error if it is time to stop.
    pub fn check(&self) -> Result<(), Halt> {
        if let Some(name) = self.signals.received() {
            return Err(Halt::Signal(name));
        }
        if self.remaining().is_zero() { Err(Halt::Deadline(self.total)) } else { Ok(()) }
    }

    /// Runs something until it is done or it is time to stop; then it is dropped where it stands.
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> Result<T, Halt> {
        tokio::select! {
            biased;
            name = self.signals.wait() => Err(Halt::Signal(name)),
            value = work => Ok(value),
            () = sleep_until(self.deadline) => Err(Halt::Deadline(self.total)),
        }
    }
}
