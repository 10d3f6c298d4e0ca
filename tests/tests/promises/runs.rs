//! Runs of the agent: what came of them, and one that stands still at a step.

use std::fs;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use serde_json::Value;
use stillebot_tests::cluster::{DATABASE, active_name};
use stillebot_tests::{Cluster, Server, wait_until};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;
use tokio_postgres::error::SqlState;

use crate::PATIENCE;

/// Longer than any run may take: its deadline, and what it may wait for afterwards.
const RUN_BOUND: Duration = Duration::from_secs(60);

/// A run of the agent with `--json`, ended.
#[derive(Debug)]
pub struct Run {
    /// Exit code; nothing if a signal ended it.
    pub code: Option<i32>,
    /// The document on stdout; null if there was none.
    pub json: Value,
    /// What it said to people.
    pub stderr: String,
}

impl Run {
    fn of(output: Output) -> Result<Self> {
        let stdout = String::from_utf8(output.stdout)?;
        let stderr = String::from_utf8(output.stderr)?;
        let json = match stdout.trim() {
            "" => Value::Null,
            text => serde_json::from_str(text).with_context(|| format!("not one document: {text}\n{stderr}"))?,
        };
        Ok(Self { code: output.status.code(), json, stderr })
    }

    /// The same, or an error that shows all of it unless the exit code is this one.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "the agent's exit code is not {code}: {self:#?}");
        Ok(self)
    }

    /// Whether what it said to people has this in it.
    pub fn says(&self, text: &str) -> bool {
        self.stderr.contains(text)
    }
}

/// Runs the agent to its end.
pub async fn agent(cluster: &Cluster, arguments: &[&str]) -> Result<Run> {
    Started::new(cluster, arguments)?.end().await
}

/// Runs a command that shows its steps, without `--json`, and kills it when it says that it takes the step of this number.
/// Whether it came that far.
pub async fn killed_at(cluster: &Cluster, arguments: &[&str], number: usize) -> Result<bool> {
    let mut child = cluster.agent_command(arguments).spawn()?;
    let mut lines = BufReader::new(child.stderr.take().context("no stderr")?).lines();
    let mut said = String::new();
    let reached = tokio::time::timeout(RUN_BOUND, async {
        while let Some(line) = lines.next_line().await? {
            if line.starts_with(&format!("[{number}/")) {
                return anyhow::Ok(true);
            }
            said += &(line + "\n");
        }
        Ok(false)
    });
    if reached.await.context("the agent stands still")?? {
        child.kill().await?;
        return Ok(true);
    }
    let status = child.wait().await?;
    ensure!(status.success(), "{arguments:?}: {status}: {said}");
    Ok(false)
}

/// An agent under way.
pub struct Started(Child);

impl Started {
    /// Starts it.
    pub fn new(cluster: &Cluster, arguments: &[&str]) -> Result<Self> {
        let mut command = cluster.agent_command(arguments);
        command.arg("--json");
        let child = command.spawn().with_context(|| format!("could not run {:?}", command.as_std()))?;
        Ok(Self(child))
    }

    /// Starts a hop, and returns when it stands still at this place: `before:STEP` or `after:STEP`.
    pub async fn paused(cluster: &Cluster, arguments: &[&str], place: &str) -> Result<Self> {
        let mut started = Self::new(cluster, &[arguments, &["--pause-at", place]].concat())?;
        let pid = started.pid()?;
        let stopped = wait_until(&format!("the agent to stand still {place}"), PATIENCE, || async move {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
            // The state follows the name, which is in parentheses and may hold anything.
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            Ok(match state {
                Some('T') => Some(true),
                Some('Z') => Some(false),
                _ => None,
            })
        })
        .await;
        if !stopped? {
            let _ = started.0.start_kill();
            anyhow::bail!("the agent did not come to {place}: {:#?}", started.end().await?);
        }
        Ok(started)
    }

    /// Its process.
    pub fn pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(self.0.id().context("it has ended")?.try_into()?))
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        Ok(signal::kill(self.pid()?, signal)?)
    }

    /// Whether it is over.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_some())
    }

    /// Waits for its end.
    pub async fn end(self) -> Result<Run> {
        let output = tokio::time::timeout(RUN_BOUND, self.0.wait_with_output());
        Run::of(output.await.context("the agent does not end")??)
    }
}

/// What `status` tells, whatever its exit code.
pub async fn status(cluster: &Cluster) -> Result<Value> {
    let run = agent(cluster, &["status"]).await?;
    ensure!(matches!(run.code, Some(0 | 69)) && run.json["command"] == "status", "{run:#?}");
    Ok(run.json)
}

/// Whether a database takes writes, found out by writing.
pub async fn is_writable(node: &Server) -> Result<bool> {
    let session = node.superuser(DATABASE).await?;
    match session.batch_execute("begin read write; create table public.probed (); rollback").await {
        Ok(()) => Ok(true),
        Err(error) if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => Ok(false),
        Err(error) => Err(error).with_context(|| node.name().to_owned()),
    }
}

/// The running nodes that take writes.
pub async fn writable(cluster: &Cluster) -> Result<Vec<&str>> {
    let mut found = Vec::new();
    for node in cluster.nodes().iter().filter(|node| node.is_running()) {
        if is_writable(node).await? {
            found.push(node.name());
        }
    }
    Ok(found)
}

/// What a node has in the application's active side.
pub async fn active_side(node: &Server) -> Result<String> {
    node.value(DATABASE, "select active_bot from stillebot.settings").await
}

/// All is well: exactly these nodes take writes, the active side is the first of them, no hop is unfinished, and every
/// node is ready for the next one.
pub async fn assert_settled(cluster: &Cluster, nodes: &[&str]) -> Result<()> {
    let found = writable(cluster).await?;
    let mut expected = nodes.to_vec();
    expected.sort_by_key(|name| cluster.nodes().iter().position(|node| node.name() == *name));
    ensure!(found == expected, "writable are {found:?}, not {expected:?}");
    let active = active_side(cluster.node(nodes[0])).await?;
    ensure!(active == active_name(nodes[0]), "the active side is {active}");
    let status = wait_until("status to be content", PATIENCE, || async {
        let status = status(cluster).await?;
        ensure!(status["verdict"]["ready"] == true, "{}", status["verdict"]["text"]);
        Ok(Some(status))
    })
    .await?;
    ensure!(status["unfinished_hop"].is_null(), "{status:#}");
    for node in status["nodes"].as_array().context("no nodes")? {
        let up = node["name"].as_str().is_some_and(|name| nodes.contains(&name));
        ensure!(node["state"]["state"] == if up { "up" } else { "down" }, "{status:#}");
        ensure!(node["state"]["sole"] == (up && nodes.len() == 1), "{status:#}");
    }
    Ok(())
}
