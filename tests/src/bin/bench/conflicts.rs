//! How long a conflict stops replication: from the commit of a row that cannot be applied until it is.
//!
//! A client that hears of the conflict and calls `stillebot_resolve()` at once, and the agent with a rule, are compared with
//! plain PostgreSQL, where somebody reads the server's log without a pause, removes the row in the way at once, and waits
//! for the worker's own next try.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use stillebot_tests::{
    Cluster, Server,
    cluster::{DATABASE, NAMES},
    figures::Figures,
    wait::PATIENCE,
    wait_until,
};
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

use crate::{Effort, Finding};

/// Milliseconds, from the error to streaming again.
const GOAL: f64 = 1000.0;
/// PostgreSQL's default of `wal_retrieve_retry_interval`.
const RETRY: &str = "5s";
/// How often it is asked whether apply has passed.
const GLANCE: Duration = Duration::from_millis(1);

pub async fn measure(effort: &Effort) -> Result<Vec<Finding>> {
    println!("\nconflicts that stop apply, two nodes over TLS, fsync on, wal_retrieve_retry_interval = {RETRY}");
    let (told, resolved) = resolved_by_a_client(effort.conflicts).await?;
    let ruled = resolved_by_rule(effort.conflicts).await?;
    let plain = removed_by_hand(effort.retries).await?;
    for (what, figures) in [
        ("until stillebot_conflict told of it", &told),
        ("until apply had passed it", &resolved),
        ("on both nodes, by the agent's rule", &ruled),
        ("the same without the extension", &plain),
    ] {
        println!(
            "{what:<36}  min {:.1}  p50 {:.1}  p99 {:.1}  max {:.1} ms",
            figures.min(),
            figures.median(),
            figures.quantile(0.99),
            figures.max()
        );
    }
    let what = format!("from a conflict to streaming again, resolved by a client at once, p50 of {}", effort.conflicts);
    Ok(vec![
        Finding::milliseconds(what, Some(GOAL), 0.5, &resolved),
        Finding::milliseconds("the same, p99", Some(GOAL), 0.99, &resolved),
        Finding::milliseconds(
            "the same on both nodes at once, by the agent's rule `deactivate-older`, p50",
            Some(GOAL),
            0.5,
            &ruled,
        ),
        Finding::milliseconds("the same, p99", Some(GOAL), 0.99, &ruled),
        Finding::milliseconds(
            format!("the same without the extension, the row removed at once, p50 of {}", effort.retries),
            None,
            0.5,
            &plain,
        ),
    ])
}

/// Until the client was told of the conflict, and until apply had passed it.
async fn resolved_by_a_client(conflicts: usize) -> Result<(Figures, Figures)> {
    let collisions = Collisions::start(Cluster::builder()).await?;
    let node = collisions.subscriber();
    let mut listener = node.listen("postgres", DATABASE).await?;
    listener.client.batch_execute("listen stillebot_conflict").await?;
    let (mut told, mut passed) = (Vec::new(), Vec::new());
    for number in 1..=conflicts {
        let began = collisions.collide(number).await?;
        let notification = timeout(PATIENCE, listener.notifications.recv()).await.context("nothing was told")?;
        told.push(began.elapsed());
        let id: i64 = notification.context("the session ended")?.payload().parse()?;
        listener.client.query_one("select stillebot_resolve($1, 'remote')", &[&id]).await?;
        collisions.wait_applied(number).await?;
        passed.push(began.elapsed());
        wait_until("the conflict to be closed", PATIENCE, || async {
            let open: i64 = node.value(DATABASE, "select open_conflicts from stillebot_status()").await?;
            Ok((open == 0).then_some(()))
        })
        .await?;
    }
    collisions.finish().await?;
    Ok((Figures::milliseconds(told).context("no conflicts")?, Figures::milliseconds(passed).context("no conflicts")?))
}

/// What the operator of a bot would write.
const RULE: &str = r#"
[[rule]]
table    = "stillebot.commands"
strategy = "deactivate-older"
flag     = "active"
by       = "created"
"#;

/// Until apply had passed it on both nodes, each of which has made the same command active, with an agent that watches.
async fn resolved_by_rule(conflicts: usize) -> Result<Figures> {
    let collisions = Collisions::start(Cluster::builder()).await?;
    collisions.cluster.configure_agent(RULE)?;
    let mut agent = collisions.cluster.agent_command(&["watch"]);
    let mut agent = agent.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("the agent does not start")?;
    let here = collisions.subscriber().superuser(DATABASE).await?;
    let mut passed = Vec::new();
    // The first one is the agent's to get ready with.
    for number in 0..=conflicts {
        let began = collisions.collide_on_both(&here, number).await?;
        for client in [&here, &collisions.there] {
            let query = "select count(*) from stillebot.commands where twitchid = $1";
            while client.query_one(query, &[&(number as i64)]).await?.get::<_, i64>(0) < 2 {
                ensure!(began.elapsed() < PATIENCE, "it is not applied:\n{}", collisions.subscriber().log_tail(10));
                sleep(GLANCE).await;
            }
        }
        if number > 0 {
            passed.push(began.elapsed());
        }
        for node in collisions.cluster.nodes() {
            wait_until("the conflict to be settled", PATIENCE, || async {
                let open: i64 = node.value(DATABASE, "select open_conflicts from stillebot_status()").await?;
                Ok((open == 0).then_some(()))
            })
            .await?;
        }
    }
    agent.kill().await?;
    collisions.finish().await?;
    Figures::milliseconds(passed).context("no conflicts")
}

/// Until apply had passed it, without the extension.
async fn removed_by_hand(conflicts: usize) -> Result<Figures> {
    let collisions = Collisions::start(Cluster::builder().without_extension()).await?;
    let node = collisions.subscriber();
    let mut passed = Vec::new();
    for number in 1..=conflicts {
        let errors = || node.log().matches(ERROR).count();
        let before = errors();
        let began = collisions.collide(number).await?;
        while errors() == before {
            ensure!(began.elapsed() < PATIENCE, "no error:\n{}", node.log_tail(10));
            sleep(GLANCE).await;
        }
        collisions.here.execute("delete from stillebot.commands where twitchid = $1", &[&(number as i64)]).await?;
        collisions.wait_applied(number).await?;
        passed.push(began.elapsed());
    }
    collisions.finish().await?;
    Figures::milliseconds(passed).context("no conflicts")
}

/// What the server's log has of each: its SQLSTATE, and who met it.
const ERROR: &str = " 23505 logical replication";

/// Two nodes, on which the same command is made active again and again.
struct Collisions {
    cluster: Cluster,
    /// Writes what does not travel, as if it had come from elsewhere.
    here: Client,
    /// At the other node.
    there: Client,
}

impl Collisions {
    async fn start(cluster: stillebot_tests::ClusterBuilder) -> Result<Self> {
        let cluster =
            cluster.direct().config("fsync", "on").config("wal_retrieve_retry_interval", RETRY).start().await?;
        cluster.expect_log(ERROR);
        // A worker may be started before the one that met the error has quite gone.
        cluster.expect_log(" 55006 logical replication");
        let here = cluster.node(NAMES[1]).superuser(DATABASE).await?;
        here.batch_execute(
            "select pg_replication_origin_create('elsewhere'), pg_replication_origin_session_setup('elsewhere')",
        )
        .await?;
        let there = cluster.node(NAMES[0]).superuser(DATABASE).await?;
        Ok(Self { cluster, here, there })
    }

    /// Who meets the conflicts.
    fn subscriber(&self) -> &Server {
        self.cluster.node(NAMES[1])
    }

    /// Makes a command active on both nodes, so that the row from the other one cannot be applied here. Returns when it
    /// was committed there.
    async fn collide(&self, number: usize) -> Result<Instant> {
        for (client, by) in [(&self.here, "here"), (&self.there, "there")] {
            let insert = format!(
                "insert into stillebot.commands (twitchid, cmdname, active, content) \
                 values ({number}, 'bench', true, '\"{by}\"')"
            );
            client.batch_execute(&insert).await?;
        }
        Ok(Instant::now())
    }

    /// Makes a command active on both nodes in transactions that overlap, so that each meets the other's. Returns when both
    /// are committed.
    async fn collide_on_both(&self, here: &Client, number: usize) -> Result<Instant> {
        for (client, by) in [(here, "here"), (&self.there, "there")] {
            let insert = format!(
                "begin; insert into stillebot.commands (twitchid, cmdname, active, content) \
                 values ({number}, 'bench', true, '\"{by}\"')"
            );
            client.batch_execute(&insert).await?;
        }
        tokio::try_join!(here.batch_execute("commit"), self.there.batch_execute("commit"))?;
        Ok(Instant::now())
    }

    /// Waits until the row from the other node is here.
    async fn wait_applied(&self, number: usize) -> Result<()> {
        let query = "select from stillebot.commands where twitchid = $1 and content = '\"there\"'";
        let query = self.here.prepare(query).await?;
        let began = Instant::now();
        while self.here.query_opt(&query, &[&(number as i64)]).await?.is_none() {
            ensure!(began.elapsed() < PATIENCE, "it is not applied:\n{}", self.subscriber().log_tail(10));
            sleep(GLANCE).await;
        }
        Ok(())
    }

    async fn finish(self) -> Result<()> {
        self.cluster.wait_replicated().await?;
        self.cluster.assert_identical().await?;
        self.cluster.finish().await
    }
}
