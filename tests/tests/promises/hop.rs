//! A hop moves the writable side and loses nothing, and whatever dies at whatever moment, no two nodes become writable that
//! were not both writable before.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::future::join_all;
use nix::sys::signal::Signal;
use stillebot_agent::hop::STEPS;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Endpoint, Installation, Rows, Server, Workload, WorkloadOptions, wait_until};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, error::SqlState};

use crate::PATIENCE;
use crate::runs::{Run, Started, agent, assert_settled, is_writable, status, writable};

/// Two nodes of which sikorsky is the only writable one.
async fn cluster() -> Result<Cluster> {
    one_writable(Cluster::builder().start().await?).await
}

async fn one_writable(cluster: Cluster) -> Result<Cluster> {
    cluster.expect_log(" 25006 ");
    agent(&cluster, &["hop", "sikorsky"]).await?.expect_code(0)?;
    Ok(cluster)
}

/// A few clients: enough to be harmed, not enough to keep two processors busy.
fn light() -> WorkloadOptions {
    WorkloadOptions { clients: 2, pause: Duration::from_millis(40), ..WorkloadOptions::default() }
}

/// Waits for so many more writes, wherever: a client stays at its node as long as that one is live when it looks.
async fn wait_writes_anywhere(workload: &Workload, more: usize) -> Result<()> {
    let goal = workload.acknowledged() + more;
    wait_until("more writes", PATIENCE, || async { Ok((workload.acknowledged() >= goal).then_some(())) }).await
}

/// Every write of the workload is on every node exactly once, and the nodes are the same.
async fn assert_nothing_lost(cluster: &Cluster, workload: Workload) -> Result<()> {
    let report = workload.stop(PATIENCE).await?;
    ensure!(report.acknowledged.len() > 10, "there was no workload to speak of");
    ensure!(report.unsaved.is_empty(), "writes were left: {:?}", report.unsaved);
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    report.verify(cluster).await?.ensure_clean()
}

fn write_gap(run: &Run) -> Result<f64> {
    run.json["write_gap_ms"].as_f64().with_context(|| format!("no write gap: {run:#?}"))
}

#[tokio::test]
async fn a_hop_moves_the_writable_side_and_loses_nothing() -> Result<()> {
    let cluster = cluster().await?;
    let workload = Workload::start(&cluster, WorkloadOptions::default());
    for (target, source) in [(1, 0), (0, 1), (1, 0)] {
        workload.wait_writes(source, 50).await?;
        let nodes = cluster.nodes();
        let (to, from) = (nodes[target].name(), nodes[source].name());
        let run = agent(&cluster, &["hop", to]).await?.expect_code(0)?;
        ensure!(run.json["outcome"] == "done" && run.json["target"] == to, "{run:#?}");
        ensure!(run.json["sources"] == serde_json::json!([from]) && run.json["activated"] == true, "{run:#?}");
        // By one clock here, which both servers have: the edge of the one and the opening of the other.
        let since = "select (extract(epoch from since) * 1000000)::int8 from stillebot_status()";
        let opened: i64 = nodes[target].value(DATABASE, since).await?;
        let closed: i64 = nodes[source].value(DATABASE, since).await?;
        let gap = (opened - closed) as f64 / 1000.0;
        let uncertainty = run.json["write_gap_uncertainty_ms"].as_f64().context("no uncertainty")?;
        ensure!(gap > 0.0, "{to} was opened {gap} ms after {from} was closed");
        ensure!((write_gap(&run)? - gap).abs() <= uncertainty + 0.1, "the gap was {gap} ms: {run:#?}");
        assert_settled(&cluster, &[to]).await?;
        // The workload goes on there, and nothing is written at the source.
        let before = workload.acknowledged_by(source);
        workload.wait_writes(target, 50).await?;
        ensure!(workload.acknowledged_by(source) == before);
    }
    assert_nothing_lost(&cluster, workload).await?;
    cluster.finish().await
}

#[tokio::test]
async fn with_both_writable_the_other_is_taken_down_and_both_brings_them_back() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.expect_log(" 25006 ");
    // Each client has rows of its own, and goes where the writes may go.
    let options = WorkloadOptions { rows: Rows::PerClientAndNode, ..light() };
    let workload = Workload::start(&cluster, options);
    workload.wait_writes(0, 20).await?;
    workload.wait_writes(1, 20).await?;

    let run = agent(&cluster, &["hop", "gideon"]).await?.expect_code(0)?;
    ensure!(write_gap(&run)? == 0.0, "gideon was open all along: {run:#?}");
    assert_settled(&cluster, &["gideon"]).await?;
    workload.wait_writes(1, 20).await?;

    // From one writable node, back to the other and to both.
    let run = agent(&cluster, &["hop", "sikorsky", "--both"]).await?.expect_code(0)?;
    ensure!(write_gap(&run)? > 0.0 && run.json["both"] == true, "{run:#?}");
    assert_settled(&cluster, &["sikorsky", "gideon"]).await?;
    wait_writes_anywhere(&workload, 20).await?;

    // With both writable: the active side moves, and both are writable afterwards.
    let run = agent(&cluster, &["hop", "gideon", "--both"]).await?.expect_code(0)?;
    ensure!(write_gap(&run)? == 0.0, "{run:#?}");
    assert_settled(&cluster, &["gideon", "sikorsky"]).await?;
    wait_writes_anywhere(&workload, 20).await?;
    for node in cluster.nodes() {
        // Not the only writable node any more: up lasts.
        node.restart().await?;
        ensure!(is_writable(node).await?);
    }
    let report = workload.stop(PATIENCE).await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    let verdict = report.verify(&cluster).await?;
    ensure!(verdict.lost.is_empty() && verdict.phantom.is_empty() && verdict.failed.is_empty(), "{verdict:#?}");
    // A COMMIT that a server did not answer when it was restarted may have been made a second time at the other.
    ensure!(verdict.duplicated.iter().all(|(_, ambiguous)| *ambiguous), "{verdict:#?}");
    cluster.finish().await
}

// ---- whatever is killed at whatever step ----

/// Writes to every node all the time, each write a transaction of its own, and keeps when each was accepted.
///
/// The instant is read from the machine's clock, which all servers of a test share, inside the statement that writes: the
/// node was writable at that instant. So when one node may be writable at a time, and that moves in one direction, no
/// instant of the node before can be later than one of the node after.
struct Probes {
    accepted: Arc<Mutex<Vec<(i64, usize)>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Probes {
    async fn start(cluster: &Cluster) -> Result<Self> {
        let mut probes = Self { accepted: Arc::default(), tasks: Vec::new() };
        for (index, node) in cluster.nodes().iter().enumerate() {
            // Unlogged, so that it is of this node only.
            node.execute(DATABASE, "create unlogged table public.probe (at timestamptz)").await?;
            let (endpoint, accepted) = (node.endpoint(), Arc::clone(&probes.accepted));
            probes.tasks.push(tokio::spawn(async move {
                loop {
                    // The node is gone or coming: that it does not answer is what the test wants.
                    let _ = probe(&endpoint, index, &accepted).await;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }));
        }
        Ok(probes)
    }

    fn accepted(&self) -> Vec<(i64, usize)> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn forget(&self) {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Since `begin`, the writable side has gone from one node to the other at most once, in that direction, and never was
    /// on both. The node that is writable now is seen to be so before the verdict.
    async fn assert_never_two(&self, begin: i64, from: usize, to: usize, now: usize) -> Result<()> {
        let latest = self.accepted().len();
        wait_until("a write to be accepted", PATIENCE, || async {
            Ok(self.accepted()[latest..].iter().any(|&(_, node)| node == now).then_some(()))
        })
        .await?;
        let accepted: Vec<_> = self.accepted().into_iter().filter(|&(at, _)| at >= begin).collect();
        let last_of_from = accepted.iter().filter(|(_, node)| *node == from).max();
        let first_of_to = accepted.iter().filter(|(_, node)| *node == to).min();
        if let (Some((last, _)), Some((first, _))) = (last_of_from, first_of_to) {
            ensure!(last < first, "BOTH WRITABLE: the source took a write {} us after the target had", last - first);
        }
        Ok(())
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Until the session ends.
async fn probe(endpoint: &Endpoint, index: usize, accepted: &Mutex<Vec<(i64, usize)>>) -> Result<()> {
    let session = endpoint.superuser(DATABASE).await?;
    // Nor is the log to be filled with refusals.
    session.batch_execute("set default_transaction_read_only = off; set log_min_messages = fatal").await?;
    let insert =
        "insert into public.probe values (clock_timestamp()) returning (extract(epoch from at) * 1000000)::int8";
    let insert = session.prepare(insert).await?;
    loop {
        match session.query_one(&insert, &[]).await {
            Ok(row) => accepted.lock().unwrap_or_else(PoisonError::into_inner).push((row.get(0), index)),
            Err(error) if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => {}
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What happens while the agent stands still.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    AgentKilled,
    AgentInterrupted,
    SourceKilled,
    TargetKilled,
    ReplicationCut,
    LinkToSourceCut,
    LinkToTargetCut,
    /// What the agent has asked for may still be on its way when the agent has long given up.
    LinkToSourceFrozen,
    LinkToTargetFrozen,
}

impl Fate {
    async fn strike(self, cluster: &Cluster, started: &mut Started, from: &str, to: &str) -> Result<()> {
        match self {
            Self::AgentKilled => started.signal(Signal::SIGKILL),
            Self::AgentInterrupted => started.signal(Signal::SIGINT),
            Self::SourceKilled => cluster.node(from).kill().await,
            Self::TargetKilled => cluster.node(to).kill().await,
            Self::ReplicationCut => cluster.link(from, to).cut().await,
            Self::LinkToSourceCut => cluster.agent_link(from).cut().await,
            Self::LinkToTargetCut => cluster.agent_link(to).cut().await,
            Self::LinkToSourceFrozen => cluster.agent_link(from).freeze().await,
            Self::LinkToTargetFrozen => cluster.agent_link(to).freeze().await,
        }
    }

    async fn mend(self, cluster: &Cluster, from: &str, to: &str) -> Result<()> {
        match self {
            Self::AgentKilled | Self::AgentInterrupted => Ok(()),
            Self::SourceKilled => cluster.node(from).start().await,
            Self::TargetKilled => cluster.node(to).start().await,
            Self::ReplicationCut => cluster.link(from, to).heal().await,
            Self::LinkToSourceCut | Self::LinkToSourceFrozen => cluster.agent_link(from).heal().await,
            Self::LinkToTargetCut | Self::LinkToTargetFrozen => cluster.agent_link(to).heal().await,
        }
    }
}

/// How a person ends an unfinished hop.
#[derive(Debug, Clone, Copy)]
enum Ending {
    SameHopAgain,
    Resume,
    Abort,
}

/// All steps, each before and after, on a cluster each, because most of the time is spent waiting for bounds to pass.
async fn at_every_step(fate: Fate) -> Result<()> {
    let (before, after) =
        tokio::join!(on_one_side_of_every_step(fate, "before"), on_one_side_of_every_step(fate, "after"));
    before.and(after)
}

async fn on_one_side_of_every_step(fate: Fate, side: &str) -> Result<()> {
    let cluster = Cluster::start().await?;
    let probes = Probes::start(&cluster).await?;
    let cluster = one_writable(cluster).await?;
    let workload = Workload::start(&cluster, light());
    let (mut from, mut to) = (0, 1);
    for (number, step) in STEPS.iter().enumerate() {
        // Every way to end it comes to every other step, and over the kinds of mishap to each.
        let ending = [Ending::SameHopAgain, Ending::Resume, Ending::Abort]
            [(number + fate as usize + usize::from(side == "after")) % 3];
        let case = format!("{fate:?} {side} {step}, then {ending:?}");
        let writable =
            one_case(&cluster, &probes, (fate, side, step, ending), (from, to)).await.with_context(|| {
                let logs = cluster.nodes().iter().map(|node| format!("{}:\n{}", node.name(), node.log_tail(12)));
                format!("{case}\n{}", logs.collect::<Vec<_>>().join("\n"))
            })?;
        (from, to) = (writable, 1 - writable);
    }
    assert_nothing_lost(&cluster, workload).await?;
    drop(probes);
    cluster.finish().await
}

/// One line of the table. Begins and ends with one writable node and nothing unfinished; returns the index of that node.
async fn one_case(
    cluster: &Cluster,
    probes: &Probes,
    (fate, side, step, ending): (Fate, &str, &str, Ending),
    (from, to): (usize, usize),
) -> Result<usize> {
    let (source, target) = (&cluster.nodes()[from], &cluster.nodes()[to]);
    probes.forget();

    let begin: i64 = source.value("postgres", "select (extract(epoch from clock_timestamp()) * 1000000)::int8").await?;

    let hop = ["hop", target.name(), "--deadline", "3s"];
    let mut started = Started::paused(cluster, &hop, &format!("{side}:{step}")).await?;
    fate.strike(cluster, &mut started, source.name(), target.name()).await?;
    ensure!(writable(cluster).await?.len() <= 1);
    if fate != Fate::AgentKilled {
        started.signal(Signal::SIGCONT)?;
    }
    let run = started.end().await?;
    let found = writable(cluster).await?;
    ensure!(found.len() <= 1, "writable: {found:?}; {run:#?}");
    assert_keeps_its_word(cluster, fate, step, side, &run, (source, target))
        .await
        .with_context(|| format!("{run:#?}"))?;

    fate.mend(cluster, source.name(), target.name()).await?;
    let again = ["hop", target.name(), "--deadline", "20s"];
    match ending {
        Ending::SameHopAgain => drop(agent(cluster, &again).await?.expect_code(0)?),
        Ending::Resume => drop(agent(cluster, &[&again[..], &["--resume"]].concat()).await?.expect_code(0)?),
        Ending::Abort => {
            let abort = agent(cluster, &[&again[..], &["--abort"]].concat()).await?;
            if abort.code != Some(0) {
                // Allowed for one reason only, and then it says what to do instead.
                ensure!(abort.code == Some(1) && abort.says("--resume"), "{abort:#?}");
                let opened =
                    is_writable(target).await? || status(cluster).await?["nodes"][to]["state"]["rejoin"] == true;
                ensure!(opened, "{abort:#?}");
                agent(cluster, &[&again[..], &["--resume"]].concat()).await?.expect_code(0)?;
            }
        }
    }
    let found = writable(cluster).await?;
    ensure!(found.len() <= 1, "writable: {found:?}");
    if found.is_empty() {
        // The only writable node was killed before it was closed and came back closed. Nothing is unfinished.
        ensure!(matches!(fate, Fate::SourceKilled | Fate::TargetKilled), "no node is writable");
        ensure!(status(cluster).await?["unfinished_hop"].is_null());
        agent(cluster, &again).await?.expect_code(0)?;
    }
    let now = if writable(cluster).await?.first() == Some(&target.name()) { to } else { from };
    assert_settled(cluster, &[cluster.nodes()[now].name()]).await?;
    probes.assert_never_two(begin, from, to, now).await?;
    Ok(now)
}

/// What the exit code says is so.
async fn assert_keeps_its_word(
    cluster: &Cluster,
    fate: Fate,
    step: &str,
    side: &str,
    run: &Run,
    (source, target): (&Server, &Server),
) -> Result<()> {
    let running = |node: &Server| node.is_running();
    match run.code {
        None => ensure!(fate == Fate::AgentKilled, "ended by a signal"),
        Some(0) => ensure!(!running(target) || is_writable(target).await?, "it said done"),
        // Nothing changed, or all undone.
        Some(1 | 69) => {
            ensure!(!running(source) || is_writable(source).await?, "it said that nothing is changed");
            for node in cluster.nodes().iter().filter(|node| running(node)) {
                let hop: bool = node.value(DATABASE, "select multihome.state() -> 'hop' = 'null'").await?;
                ensure!(hop, "{} carries a note", node.name());
            }
        }
        Some(3) => {
            ensure!(!matches!(fate, Fate::AgentInterrupted | Fate::ReplicationCut), "every node could be reached");
            let hint = run.json["hint"].as_str().unwrap_or_default();
            ensure!(hint.contains("--resume"), "it does not say what to do");
        }
        _ => anyhow::bail!("an exit code that is none of ours"),
    }
    if fate == Fate::AgentInterrupted {
        let at = |name| STEPS.iter().position(|step| *step == name);
        let opened = at(step) > at("open") || (step == "open" && side == "after");
        // Between drain and open nothing is waited for, but where there are sequences: there it may be noticed too late.
        // Further on is no way back.
        if !matches!((side, step), ("after", "drain") | (_, "sequences") | ("before", "open")) {
            ensure!(run.code == Some(if opened { 0 } else { 1 }), "interrupted {side} {step}");
        }
    }
    Ok(())
}

mod whatever_is_killed_at_whatever_step_two_nodes_are_never_writable_that_were_not_both_before {
    use super::*;

    #[tokio::test]
    async fn the_agent() -> Result<()> {
        at_every_step(Fate::AgentKilled).await
    }

    #[tokio::test]
    async fn the_agent_by_ctrl_c() -> Result<()> {
        at_every_step(Fate::AgentInterrupted).await
    }

    #[tokio::test]
    async fn the_source() -> Result<()> {
        at_every_step(Fate::SourceKilled).await
    }

    #[tokio::test]
    async fn the_target() -> Result<()> {
        at_every_step(Fate::TargetKilled).await
    }

    #[tokio::test]
    async fn replication() -> Result<()> {
        at_every_step(Fate::ReplicationCut).await
    }

    #[tokio::test]
    async fn the_link_of_the_agent_to_the_source() -> Result<()> {
        at_every_step(Fate::LinkToSourceCut).await
    }

    #[tokio::test]
    async fn the_link_of_the_agent_to_the_target() -> Result<()> {
        at_every_step(Fate::LinkToTargetCut).await
    }

    #[tokio::test]
    async fn what_the_agent_has_sent_to_the_source_and_arrives_late() -> Result<()> {
        at_every_step(Fate::LinkToSourceFrozen).await
    }

    #[tokio::test]
    async fn what_the_agent_has_sent_to_the_target_and_arrives_late() -> Result<()> {
        at_every_step(Fate::LinkToTargetFrozen).await
    }
}

/// Between two steps is not the only place to die: here something that was asked of a server may be under way.
#[tokio::test]
async fn an_agent_killed_at_any_moment_leaves_a_hop_that_the_same_hop_again_ends() -> Result<()> {
    let cluster = Cluster::start().await?;
    let probes = Probes::start(&cluster).await?;
    let cluster = one_writable(cluster).await?;
    let workload = Workload::start(&cluster, light());
    let (mut from, mut to) = (0, 1);
    for moment in (0..20).map(|number| Duration::from_millis(number * 12)) {
        probes.forget();
        let now = "select (extract(epoch from clock_timestamp()) * 1000000)::int8";
        let begin = cluster.nodes()[from].value("postgres", now).await?;
        let hop = ["hop", cluster.nodes()[to].name()];
        let mut started = Started::new(&cluster, &hop)?;
        tokio::time::sleep(moment).await;
        if !started.has_ended()? {
            started.signal(Signal::SIGKILL)?;
        }
        started.end().await?;
        ensure!(writable(&cluster).await?.len() <= 1, "after {moment:?}");
        agent(&cluster, &hop).await?.expect_code(0)?;
        assert_settled(&cluster, &[hop[1]]).await?;
        probes.assert_never_two(begin, from, to, to).await.with_context(|| format!("after {moment:?}"))?;
        (from, to) = (to, from);
    }
    assert_nothing_lost(&cluster, workload).await?;
    drop(probes);
    cluster.finish().await
}

// ---- hops that do not come to their end ----

/// A session that has written and does not go on: no down can succeed as long as it lasts.
async fn idle_writer(node: &Server) -> Result<Client> {
    let writer = node.connect("rosuav", DATABASE).await?;
    writer
        .batch_execute("set application_name = 'the slow one'; begin; insert into stillebot.raids values (1, 2)")
        .await?;
    Ok(writer)
}

/// Waits until writes are refused.
async fn wait_for_the_edge(node: &Server) -> Result<()> {
    wait_until(&format!("{} to refuse writes", node.name()), PATIENCE, || async {
        Ok((node.value::<String>(DATABASE, "select state from stillebot_status()").await? == "down").then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_hop_that_cannot_finish_by_its_deadline_undoes_itself_and_says_so() -> Result<()> {
    let cluster = cluster().await?;
    let sikorsky = cluster.node("sikorsky");
    let hop = ["hop", "gideon", "--deadline", "2s"];

    // Replication stops after all that can be checked before has been.
    let mut started = Started::paused(&cluster, &hop, "before:close").await?;
    cluster.link("sikorsky", "gideon").freeze().await?;
    sikorsky.execute(DATABASE, "insert into stillebot.raids values (3, 4)").await?;
    started.signal(Signal::SIGCONT)?;
    wait_for_the_edge(sikorsky).await?;
    let run = started.end().await?.expect_code(1)?;
    ensure!(run.json["outcome"] == "failed" && run.says("deadline of 2s") && run.says("undone"), "{run:#?}");
    ensure!(writable(&cluster).await? == ["sikorsky"]);

    // Replication stands still from the beginning: not a single write is refused for that.
    let mut bot = sikorsky.listen("rosuav", DATABASE).await?;
    bot.client.batch_execute("listen readonly").await?;
    let run = agent(&cluster, &hop).await?.expect_code(1)?;
    ensure!(run.says("deadline of 2s") && run.says("nothing was changed"), "{run:#?}");
    sikorsky.execute(DATABASE, "notify readonly, 'end of test'").await?;
    let heard = bot.notifications.recv().await.map(|heard| heard.payload().to_owned());
    ensure!(heard.as_deref() == Some("end of test"), "bots were told {heard:?}");
    cluster.link("sikorsky", "gideon").heal().await?;
    cluster.wait_replicated().await?;

    cluster.expect_log(" 55006 ");
    let writer = idle_writer(sikorsky).await?;
    let run = agent(&cluster, &hop).await?.expect_code(1)?;
    ensure!(run.says("rosuav") && run.says("the slow one"), "{run:#?}");
    ensure!(run.says("all nodes are as they were before") && run.says("--terminate"), "{run:#?}");
    ensure!(writable(&cluster).await? == ["sikorsky"]);
    writer.batch_execute("commit").await?;
    assert_settled(&cluster, &["sikorsky"]).await?;

    // Unless it is told to end what stands in the way.
    cluster.expect_log(" 57P01 ");
    let writer = sikorsky.connect("rosuav", DATABASE).await?;
    writer.batch_execute("begin; insert into stillebot.raids values (5, 6)").await?;
    agent(&cluster, &[&hop[..], &["--terminate"]].concat()).await?.expect_code(0)?;
    ensure!(writer.batch_execute("commit").await.is_err());
    assert_settled(&cluster, &["gideon"]).await?;
    let raids: Vec<i64> = vec![
        cluster.node("gideon").value(DATABASE, "select count(*) from stillebot.raids").await?,
        sikorsky.value(DATABASE, "select count(*) from stillebot.raids").await?,
    ];
    ensure!(raids == [2, 2], "{raids:?}");
    cluster.finish().await
}

#[tokio::test]
async fn an_interrupted_hop_is_undone() -> Result<()> {
    let cluster = cluster().await?;
    cluster.expect_log(" 57014 ");
    let sikorsky = cluster.node("sikorsky");
    for (signal, name) in [(Signal::SIGINT, "SIGINT"), (Signal::SIGTERM, "SIGTERM")] {
        // While it waits for a writer.
        let writer = idle_writer(sikorsky).await?;
        let mut started = Started::new(&cluster, &["hop", "gideon", "--deadline", "40s"])?;
        wait_for_the_edge(sikorsky).await?;
        started.signal(signal)?;
        let run = started.end().await?.expect_code(1)?;
        ensure!(run.says(name) && run.says("nothing is changed"), "{run:#?}");
        ensure!(writable(&cluster).await? == ["sikorsky"]);
        writer.batch_execute("rollback").await?;
        assert_settled(&cluster, &["sikorsky"]).await?;

        // While it waits for replication.
        let mut started = Started::paused(&cluster, &["hop", "gideon", "--deadline", "40s"], "before:close").await?;
        cluster.link("sikorsky", "gideon").freeze().await?;
        sikorsky.execute(DATABASE, "update stillebot.settings set credentials = '{}'").await?;
        started.signal(Signal::SIGCONT)?;
        wait_for_the_edge(sikorsky).await?;
        started.signal(signal)?;
        let run = started.end().await?.expect_code(1)?;
        ensure!(run.says(name) && run.says("undone"), "{run:#?}");
        ensure!(writable(&cluster).await? == ["sikorsky"]);
        cluster.link("sikorsky", "gideon").heal().await?;
        assert_settled(&cluster, &["sikorsky"]).await?;
    }
    cluster.finish().await
}

#[tokio::test]
async fn a_second_hop_meanwhile_is_refused() -> Result<()> {
    let cluster = cluster().await?;
    for place in ["after:lock", "after:close", "after:open"] {
        let (from, to) = match writable(&cluster).await?[..] {
            ["sikorsky"] => ("sikorsky", "gideon"),
            _ => ("gideon", "sikorsky"),
        };
        let mut first = Started::paused(&cluster, &["hop", to, "--deadline", "60s"], place).await?;
        // All at the same time: each waits for the lock for some seconds.
        let others =
            [&["hop", to][..], &["hop", from], &["hop", "--abort"], &["up", from], &["down", to], &["refresh"]];
        for run in join_all(others.iter().map(|other| agent(&cluster, other))).await {
            let run = run?.expect_code(1)?;
            ensure!(run.says("another agent is at work") && run.says("held by pid"), "{run:#?}");
        }
        first.signal(Signal::SIGCONT)?;
        first.end().await?.expect_code(0)?;
        assert_settled(&cluster, &[to]).await?;
    }
    cluster.finish().await
}

/// Leaves a hop from sikorsky to gideon whose agent was killed.
async fn leave_unfinished(cluster: &Cluster, place: &str) -> Result<()> {
    let mut started = Started::paused(cluster, &["hop", "gideon"], place).await?;
    started.signal(Signal::SIGKILL)?;
    ensure!(started.end().await?.code.is_none());
    Ok(())
}

#[tokio::test]
async fn status_shows_an_unfinished_hop_and_only_its_end_is_allowed() -> Result<()> {
    let cluster = cluster().await?;
    leave_unfinished(&cluster, "after:close").await?;
    ensure!(writable(&cluster).await?.is_empty());
    let shown = status(&cluster).await?;
    let hop = &shown["unfinished_hop"];
    ensure!(hop["to"] == "gideon" && hop["from"] == "sikorsky" && hop["started"].is_string(), "{shown:#}");
    ensure!(shown["verdict"]["ready"] == false, "{shown:#}");
    let text = cluster.agent(&["status"]).await?.expect_code(0)?.stdout;
    for part in
        ["unfinished hop sikorsky -> gideon", "not ready to hop", "`hop gideon --resume`", "`hop gideon --abort`"]
    {
        ensure!(text.contains(part), "{part}: {text}");
    }
    for other in [&["hop", "sikorsky"][..], &["hop", "sikorsky", "--resume"], &["up", "gideon"]] {
        let run = agent(&cluster, other).await?.expect_code(1)?;
        ensure!(run.says("unfinished hop to gideon") && run.says("--resume") && run.says("--abort"), "{run:#?}");
        ensure!(writable(&cluster).await?.is_empty(), "{other:?}");
    }
    // It lasts through a crash of both.
    for node in cluster.nodes() {
        node.kill().await?;
        node.start().await?;
    }
    ensure!(writable(&cluster).await?.is_empty());
    ensure!(status(&cluster).await?["unfinished_hop"] == *hop);
    let run = agent(&cluster, &["hop", "--resume"]).await?.expect_code(0)?;
    ensure!(run.json["target"] == "gideon" && run.json["resumed"] == true, "{run:#?}");
    assert_settled(&cluster, &["gideon"]).await?;
    // Then there is nothing left to end.
    for nothing in ["--resume", "--abort"] {
        let run = agent(&cluster, &["hop", nothing]).await?.expect_code(0)?;
        ensure!(run.json["outcome"] == "nothing_to_do", "{run:#?}");
    }
    assert_settled(&cluster, &["gideon"]).await?;
    cluster.finish().await
}

#[tokio::test]
async fn the_same_hop_again_ends_an_unfinished_one() -> Result<()> {
    let cluster = cluster().await?;
    leave_unfinished(&cluster, "after:close").await?;
    let run = agent(&cluster, &["hop", "gideon"]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "done" && run.json["resumed"] == true, "{run:#?}");
    assert_settled(&cluster, &["gideon"]).await?;
    let run = agent(&cluster, &["hop", "gideon"]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "nothing_to_do", "{run:#?}");
    cluster.finish().await
}

#[tokio::test]
async fn abort_undoes_an_unfinished_hop_unless_its_target_is_open() -> Result<()> {
    let cluster = cluster().await?;
    leave_unfinished(&cluster, "after:drain").await?;
    let run = agent(&cluster, &["hop", "gideon", "--abort"]).await?.expect_code(0)?;
    ensure!(run.json["outcome"] == "undone" && run.json["reopened"] == serde_json::json!(["sikorsky"]), "{run:#?}");
    assert_settled(&cluster, &["sikorsky"]).await?;

    leave_unfinished(&cluster, "after:open").await?;
    for restarted in [false, true] {
        if restarted {
            // It comes back closed, with writes that nobody else may have.
            cluster.node("gideon").kill().await?;
            cluster.node("gideon").start().await?;
        }
        let run = agent(&cluster, &["hop", "gideon", "--abort"]).await?.expect_code(1)?;
        ensure!(run.says("--resume"), "{run:#?}");
        ensure!(!is_writable(cluster.node("sikorsky")).await?);
    }
    agent(&cluster, &["hop", "gideon", "--resume"]).await?.expect_code(0)?;
    assert_settled(&cluster, &["gideon"]).await?;
    cluster.finish().await
}

/// Both were writable before: then a node that is opened again is no second writable node.
#[tokio::test]
async fn abort_gives_two_writable_nodes_back_as_they_were() -> Result<()> {
    for place in ["after:close", "after:open"] {
        let cluster = Cluster::start().await?;
        cluster.expect_log(" 25006 ");
        leave_unfinished(&cluster, place).await?;
        ensure!(writable(&cluster).await? == ["gideon"], "{place}");
        agent(&cluster, &["hop", "gideon", "--abort"]).await?.expect_code(0)?;
        assert_settled(&cluster, &["sikorsky", "gideon"]).await?;
        cluster.finish().await?;
    }
    Ok(())
}

// ---- hops that do not begin ----

#[tokio::test]
async fn a_hop_is_refused_when_replication_stands_still() -> Result<()> {
    let cluster = cluster().await?;
    let mut bot = cluster.node("sikorsky").listen("rosuav", DATABASE).await?;
    bot.client.batch_execute("listen readonly").await?;
    let hop = ["hop", "gideon", "--deadline", "1s"];
    // In the direction of the hop, and in the other one, which is that of the way back.
    for (publisher, subscriber) in [("sikorsky", "gideon"), ("gideon", "sikorsky")] {
        let operator = cluster.node(subscriber).superuser(DATABASE).await?;
        operator.batch_execute("set default_transaction_read_only = off").await?;
        operator.batch_execute("alter subscription multihome disable").await?;
        let run = agent(&cluster, &hop).await?.expect_code(1)?;
        ensure!(run.says(&format!("subscription multihome on {subscriber} is disabled")), "{run:#?}");
        ensure!(run.says("nothing was changed"), "{run:#?}");
        operator.batch_execute("alter subscription multihome enable").await?;
        cluster.wait_applied(publisher, subscriber).await?;

        cluster.link(publisher, subscriber).cut().await?;
        let run = agent(&cluster, &hop).await?.expect_code(1)?;
        ensure!(run.says("nothing was changed") && run.says(subscriber), "{run:#?}");
        cluster.link(publisher, subscriber).heal().await?;
        cluster.wait_applied(publisher, subscriber).await?;
    }
    cluster.node("sikorsky").execute(DATABASE, "notify readonly, 'end of test'").await?;
    let heard = bot.notifications.recv().await.map(|heard| heard.payload().to_owned());
    ensure!(heard.as_deref() == Some("end of test"), "bots were told {heard:?}: a write was refused");
    assert_settled(&cluster, &["sikorsky"]).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_hop_is_refused_when_a_node_is_unreachable() -> Result<()> {
    let cluster = cluster().await?;
    for target in ["gideon", "sikorsky"] {
        for gone in ["gideon", "sikorsky"] {
            cluster.agent_link(gone).cut().await?;
            let run = agent(&cluster, &["hop", target]).await?.expect_code(69)?;
            ensure!(run.json["outcome"] == "unreachable" && run.says(gone), "{run:#?}");
            ensure!(run.says("nothing was changed"), "{run:#?}");
            cluster.agent_link(gone).heal().await?;
            ensure!(writable(&cluster).await? == ["sikorsky"]);
        }
    }
    cluster.node("gideon").kill().await?;
    agent(&cluster, &["hop", "gideon"]).await?.expect_code(69)?;
    ensure!(writable(&cluster).await? == ["sikorsky"]);
    cluster.node("gideon").start().await?;
    assert_settled(&cluster, &["sikorsky"]).await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_dry_run_says_what_it_would_do_and_does_nothing() -> Result<()> {
    let cluster = cluster().await?;
    let run = agent(&cluster, &["hop", "gideon", "--dry-run"]).await?.expect_code(0)?;
    let would = run.json["would"].to_string();
    ensure!(run.json["outcome"] == "dry_run", "{run:#?}");
    for part in ["take sikorsky down", "open gideon", "active side"] {
        ensure!(would.contains(part), "{part}: {would}");
    }
    assert_settled(&cluster, &["sikorsky"]).await?;
    leave_unfinished(&cluster, "after:close").await?;
    let run = agent(&cluster, &["hop", "gideon", "--abort", "--dry-run"]).await?.expect_code(0)?;
    ensure!(run.json["would"].to_string().contains("open sikorsky again"), "{run:#?}");
    ensure!(writable(&cluster).await?.is_empty());
    agent(&cluster, &["hop", "gideon"]).await?.expect_code(0)?;
    cluster.finish().await
}

// ---- more nodes, other clients, worse days ----

#[tokio::test]
async fn a_hop_takes_down_every_other_writable_node() -> Result<()> {
    let cluster = Cluster::builder().nodes(3).start().await?;
    cluster.expect_log(" 25006 ");
    // Rows of one client: three writable nodes would collide, so the first hop comes before the workload.
    agent(&cluster, &["hop", "gideon"]).await?.expect_code(0)?;
    assert_settled(&cluster, &["gideon"]).await?;
    let workload = Workload::start(&cluster, light());
    workload.wait_writes(1, 20).await?;
    for (target, name) in [(2, "rodan"), (0, "sikorsky"), (1, "gideon")] {
        let run = agent(&cluster, &["hop", name]).await?.expect_code(0)?;
        ensure!(write_gap(&run)? > 0.0, "{run:#?}");
        assert_settled(&cluster, &[name]).await?;
        workload.wait_writes(target, 20).await?;
    }
    // One of three that cannot be reached may be writable.
    cluster.agent_link("sikorsky").cut().await?;
    agent(&cluster, &["hop", "rodan"]).await?.expect_code(69)?;
    cluster.agent_link("sikorsky").heal().await?;
    assert_nothing_lost(&cluster, workload).await?;
    cluster.finish().await
}

#[tokio::test]
async fn multi_host_libpq_finds_the_live_node_before_and_after_a_hop() -> Result<()> {
    let cluster = cluster().await?;
    let nodes = cluster.nodes();
    let single = nodes[0].conninfo("rosuav", DATABASE)?;
    for live in ["sikorsky", "gideon", "sikorsky"] {
        agent(&cluster, &["hop", live]).await?.expect_code(0)?;
        for (first, second) in [(0, 1), (1, 0)] {
            let multiple =
                single.replace("host=127.0.0.1", "host=127.0.0.1,127.0.0.1 target_session_attrs=read-write").replace(
                    &format!("port={}", nodes[0].port()),
                    &format!("port={},{}", nodes[first].port(), nodes[second].port()),
                );
            let mut psql = Installation::get()?.command("psql");
            psql.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", &multiple, "-c"]);
            let output = psql
                .arg("update stillebot.settings set credentials = '{}'; select current_setting('stillebot.node')")
                .output()?;
            let found = String::from_utf8_lossy(&output.stdout);
            ensure!(output.status.success() && found.trim() == live, "{live}, {first} first: {output:?}");
        }
    }
    cluster.finish().await
}

#[tokio::test]
async fn the_emergency() -> Result<()> {
    let cluster = cluster().await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    // What the dead node had not sent arrives after others have gone on: in rows that both wrote, one would win here and
    // the other there. That is a conflict, and not what is being tested.
    let rows = Rows::PerClientAndNode;
    let workload = Workload::start(&cluster, WorkloadOptions { rows, ..light() });
    workload.wait_writes(0, 20).await?;
    // The last thing it does reaches nobody.
    cluster.link("sikorsky", "gideon").cut().await?;
    sikorsky.execute(DATABASE, "insert into stillebot.raids values (7, 8)").await?;
    sikorsky.kill().await?;

    let refused = agent(&cluster, &["up", "gideon"]).await?.expect_code(69)?;
    ensure!(refused.says("sikorsky cannot be reached and may be writable"), "{refused:#?}");
    ensure!(refused.says("--force") && refused.says("may conflict"), "{refused:#?}");
    ensure!(writable(&cluster).await?.is_empty());
    let forced = agent(&cluster, &["up", "gideon", "--force"]).await?.expect_code(0)?;
    ensure!(
        forced.json["forced_past"] == serde_json::json!(["sikorsky"]) && forced.json["sole"] == true,
        "{forced:#?}"
    );
    ensure!(writable(&cluster).await? == ["gideon"]);
    agent(&cluster, &["activate", "gideon"]).await?.expect_code(0)?;
    workload.wait_writes(1, 20).await?;

    // The dead one returns, before its network does, and knows that it may have been replaced.
    cluster.isolate("sikorsky").await?;
    sikorsky.start().await?;
    let session = sikorsky.listen("rosuav", DATABASE).await?;
    ensure!(session.default_transaction_read_only, "libpq and the bot must not take it for live");
    ensure!(writable(&cluster).await? == ["gideon"]);
    cluster.reconnect("sikorsky").await?;
    cluster.wait_replicated().await?;
    ensure!(gideon.value::<i64>(DATABASE, "select count(*) from stillebot.raids").await? == 1, "it arrives now");
    let shown = status(&cluster).await?;
    ensure!(shown["nodes"][0]["state"]["state"] == "down" && shown["nodes"][0]["state"]["rejoin"] == true, "{shown:#}");
    let text = cluster.agent(&["status"]).await?.expect_code(0)?.stdout;
    ensure!(text.contains("was the only writable node and restarted"), "{text}");
    ensure!(writable(&cluster).await? == ["gideon"]);

    // Back to where it was.
    agent(&cluster, &["hop", "sikorsky"]).await?.expect_code(0)?;
    assert_settled(&cluster, &["sikorsky"]).await?;
    workload.wait_writes(0, 20).await?;
    let report = workload.stop(PATIENCE).await?;
    cluster.wait_replicated().await?;
    cluster.assert_identical().await?;
    let verdict = report.verify(&cluster).await?;
    // What the link had not brought over is not lost, but was not known to who went on at gideon.
    ensure!(verdict.lost.is_empty() && verdict.phantom.is_empty() && verdict.failed.is_empty(), "{verdict:#?}");
    // And by hand, to both.
    agent(&cluster, &["up", "gideon"]).await?.expect_code(0)?;
    assert_settled(&cluster, &["sikorsky", "gideon"]).await?;
    cluster.finish().await
}
