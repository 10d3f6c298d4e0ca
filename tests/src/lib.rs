//! Real PostgreSQL servers for tests, the demo and the benchmarks.
//!
//! From the outside in:
//!
//! - [`Cluster`]: nodes that replicate to each other over TLS, with the bot's tables, every link cuttable, and an agent.
//! - [`Workload`]: clients that write as the bot does, and a count afterwards of what became of each write.
//! - [`Server`]: one PostgreSQL server from initdb to SIGKILL.
//! - [`Proxy`]: a TCP link that can be cut, frozen and healed.
//! - [`Authority`]: a throw-away certificate authority. [`Endpoint`]: the only place that opens connections.
//! - [`Host`]: a whole Debian host, with a file system and a network of its own.
//! - [`wait_until`]: waiting for a condition, never for a guess.
//! - [`figures`]: numbers out of many measurements.
//! - [`log_check`]: what a server log may not contain.
//! - [`Installation`]: which PostgreSQL is under test; `process` starts its programs so that they do not outlive us;
//!   `scratch` hands out directories and ports and takes them back.
//!
//! Nothing here knows how the extension or the agent work inside: they are reached by SQL and by command line only.
//!
//! Set `KEEP=1` to keep data directories and logs after a test; the servers themselves still stop with it.

pub mod authority;
pub mod cluster;
pub mod endpoint;
pub mod figures;
pub mod host;
pub mod log_check;
pub mod postgres;
mod process;
pub mod proxy;
mod scratch;
pub mod server;
pub mod wait;
pub mod workload;

pub use authority::{Authority, Identity};
pub use cluster::{AgentOutput, Cluster, ClusterBuilder, Hopped};
pub use endpoint::{Endpoint, Listener};
pub use host::Host;
pub use postgres::Installation;
pub use proxy::Proxy;
pub use scratch::Port;
pub use server::{Backup, Server, ServerBuilder, Shutdown};
pub use wait::wait_until;
pub use workload::{Report, Rows, Verdict, Workload, WorkloadOptions};

/// Where proxies and bot-like clients run: threads of their own, so that a test that blocks its thread does not stall
/// the links it tests, nor the clients whose write gaps it measures.
pub(crate) fn background() -> &'static tokio::runtime::Handle {
    use std::sync::LazyLock;
    use tokio::runtime::{Builder, Runtime};

    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("background")
            .enable_all()
            .build()
            .expect("a tokio runtime")
    });
    RUNTIME.handle()
}
