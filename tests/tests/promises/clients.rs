//! Clients that were not written for this project find the live node, and survive a hop, with settings of their own only:
//! those of docs/clients.md. psql and pgbench are libpq; psycopg is libpq in a program; asyncpg speaks the protocol itself.

use std::collections::BTreeSet;
use std::env;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::postgres::workspace;
use stillebot_tests::{Cluster, Installation, Server, Shutdown, wait_until};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::PATIENCE;

/// Two nodes of which sikorsky is the only writable one.
async fn cluster() -> Result<Cluster> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 25006 ");
    cluster.hop("sikorsky").await?;
    Ok(cluster)
}

/// What a client is told: both hosts, and that it wants the one that takes writes.
fn url(cluster: &Cluster) -> Result<String> {
    let hosts: Vec<_> = cluster.nodes().iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
    let conninfo = cluster.nodes()[0].conninfo("rosuav", DATABASE)?;
    let tls: Vec<_> = conninfo.split_whitespace().filter(|word| word.starts_with("ssl")).collect();
    Ok(format!("postgresql://rosuav@{}/{DATABASE}?target_session_attrs=read-write&{}", hosts.join(","), tls.join("&")))
}

/// A client at work, and all that it said.
struct Client {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
}

impl Client {
    fn start(cluster: &Cluster, program: &str) -> Result<Self> {
        let python =
            env::var_os("CLIENTS_PYTHON").map_or_else(|| workspace().join("target/clients/bin/python"), PathBuf::from);
        ensure!(python.exists(), "there is no {}; run scripts/setup", python.display());
        let mut command = Command::new(python);
        command.arg(workspace().join("tests/clients").join(program)).arg(url(cluster)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = said.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                heard.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Self { child, said })
    }

    fn said(&self, begin: &str) -> Vec<String> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.iter().filter_map(|line| line.strip_prefix(begin)).map(|rest| rest.trim().to_owned()).collect()
    }

    /// Waits for so many more rows that this node has saved.
    async fn wait_saved(&mut self, node: &Server, more: usize) -> Result<()> {
        let begin = format!("saved {} ", node.port());
        let goal = self.said(&begin).len() + more;
        let waited = wait_until(&format!("{more} rows saved by {}", node.name()), PATIENCE, || async {
            Ok((self.said(&begin).len() >= goal).then_some(()))
        })
        .await;
        if waited.is_err() {
            let _ = self.child.start_kill();
            let mut error = String::new();
            self.child.stderr.take().context("no stderr")?.read_to_string(&mut error).await?;
            return waited.with_context(|| format!("{:?}\n{error}", self.said.lock()));
        }
        waited
    }

    /// Has it finish what it does. The ids that it was told are saved.
    async fn stop(&mut self) -> Result<BTreeSet<String>> {
        drop(self.child.stdin.take());
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await.context("the client does not end")??;
        ensure!(status.success(), "the client: {status}");
        let saved = self.said("saved ");
        let ids: BTreeSet<_> =
            saved.iter().filter_map(|line| line.split_once(' ')).map(|(_, id)| id.to_owned()).collect();
        ensure!(ids.len() == saved.len() && !ids.is_empty(), "{} of {} ids", ids.len(), saved.len());
        Ok(ids)
    }
}

/// The keys of the table that clients write to.
async fn rows(node: &Server) -> Result<BTreeSet<String>> {
    let session = node.superuser(DATABASE).await?;
    let rows = session.query("select cookie from stillebot.http_sessions", &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// There and back under a client's writes, and on with one host gone: nothing that was acknowledged is missing on either
/// node, nothing else is there, and the client was refused, not fooled.
async fn survives(program: &str) -> Result<()> {
    let cluster = cluster().await?;
    let [sikorsky, gideon] = cluster.nodes() else { unreachable!("two nodes") };
    let mut client = Client::start(&cluster, program)?;
    client.wait_saved(sikorsky, 20).await?;
    for (name, node) in [("gideon", gideon), ("sikorsky", sikorsky), ("gideon", gideon)] {
        cluster.hop(name).await?;
        client.wait_saved(node, 20).await?;
    }
    ensure!(!client.said("refused").is_empty(), "the node that went down refused nothing");
    cluster.wait_replicated().await?;
    cluster.expect_log(" 57P0");
    cluster.expect_log(" 08006 ");
    cluster.expect_log("could not connect to the publisher");
    cluster.expect_log("could not receive data from WAL stream");
    // The first host of its list is gone altogether; a client that starts now finds the live node as well.
    sikorsky.stop(Shutdown::Fast).await?;
    client.wait_saved(gideon, 20).await?;
    let mut late = Client::start(&cluster, program)?;
    late.wait_saved(gideon, 20).await?;
    sikorsky.start().await?;
    let mut saved = client.stop().await?;
    saved.extend(late.stop().await?);
    cluster.wait_replicated().await?;
    for node in cluster.nodes() {
        let found = rows(node).await?;
        ensure!(found == saved, "{}: {} rows of {} acknowledged", node.name(), found.len(), saved.len());
    }
    cluster.assert_identical().await?;
    cluster.finish().await
}

#[tokio::test]
async fn psycopg_finds_the_live_node_and_survives_hops() -> Result<()> {
    survives("psycopg_client.py").await
}

#[tokio::test]
async fn a_pool_of_asyncpg_finds_the_live_node_and_survives_hops() -> Result<()> {
    survives("asyncpg_client.py").await
}

/// A program of PostgreSQL's own, to its end.
async fn run(program: &str, arguments: &[&str]) -> Result<(ExitStatus, String, String)> {
    let mut command = Command::from(Installation::get()?.command(program));
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await.context("it does not end")??;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
    Ok((output.status, text(output.stdout), text(output.stderr)))
}

#[tokio::test]
async fn psql_finds_the_live_node() -> Result<()> {
    let cluster = cluster().await?;
    let url = url(&cluster)?;
    let insert = "insert into stillebot.http_sessions (cookie) values (gen_random_uuid()) returning inet_server_port()";
    let psql = async || run("psql", &["-XqAt", "-c", insert, &url]).await;
    for (hop, name) in [(false, "sikorsky"), (true, "gideon"), (true, "sikorsky")] {
        if hop {
            cluster.hop(name).await?;
        }
        let (status, port, error) = psql().await?;
        ensure!(status.success() && port == cluster.node(name).port().to_string(), "{name}: {port} {error}");
        cluster.wait_replicated().await?;
    }
    // With none live it says so for each host, and does not wait.
    cluster.agent(&["down", "sikorsky"]).await?.expect_code(0)?;
    let (status, _, error) = psql().await?;
    ensure!(status.code() == Some(2) && error.matches("session is read-only").count() == 2, "{status}: {error}");
    cluster.assert_identical().await?;
    cluster.finish().await
}

#[tokio::test]
async fn pgbench_stops_at_a_hop_and_finds_the_live_node_when_it_is_run_again() -> Result<()> {
    let cluster = cluster().await?;
    let url = url(&cluster)?;
    let directory = cluster.agent_configuration();
    let script = directory.with_file_name("insert.pgbench");
    std::fs::write(&script, "insert into stillebot.http_sessions (cookie) values (gen_random_uuid());\n")?;
    let script = script.display().to_string();
    let options = ["-n", "-f", &script, "-c", "2", "-R", "200", "--max-tries=100"];
    let processed = |report: &str| -> Result<usize> {
        let line = report.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
        let number = line.and_then(|line| line.split('/').next()).with_context(|| report.to_owned())?;
        Ok(number.trim().parse()?)
    };
    let count = async |name: &str| -> Result<usize> { Ok(rows(cluster.node(name)).await?.len()) };

    // Trying again is for serialization failures and deadlocks; a refusal ends the run.
    let first = tokio::spawn({
        let (options, url) = (options.map(str::to_owned), url.clone());
        async move {
            let options: Vec<_> = options.iter().map(String::as_str).collect();
            run("pgbench", &[&options[..], &["-T", "25", &url]].concat()).await
        }
    });
    wait_until("rows of pgbench", PATIENCE, || async { Ok((count("sikorsky").await? >= 50).then_some(())) }).await?;
    cluster.hop("gideon").await?;
    let (status, report, error) = first.await??;
    ensure!(status.code() == Some(2), "{status}: {report}\n{error}");
    ensure!(error.contains("read-only transaction") && error.contains("Run was aborted"), "{error}");
    let before = processed(&report)?;
    cluster.wait_replicated().await?;
    ensure!(count("gideon").await? == before, "{} rows of {before} transactions", count("gideon").await?);

    let (status, report, error) = run("pgbench", &[&options[..], &["-t", "50", &url]].concat()).await?;
    ensure!(status.success() && processed(&report)? == 100, "{status}: {report}\n{error}");
    cluster.wait_replicated().await?;
    for node in cluster.nodes() {
        ensure!(count(node.name()).await? == before + 100, "{} of {before} and 100", count(node.name()).await?);
    }
    cluster.assert_identical().await?;
    cluster.finish().await
}
