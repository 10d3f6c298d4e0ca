//! The watchdog tells apart what can be the matter with replication, says it once on the channel, and says when it is
//! over.

use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use serde_json::Value;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, wait_until};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Child;

use crate::PATIENCE;
use crate::runs::agent;

/// Looks often, and has little patience: what usually mends itself has 0.3 s for it.
const CONFIGURATION: &str = "
[watch]
channel = \"scream.emergency\"
interval = \"100ms\"
stall = \"3s\"
";
const STALL: Duration = Duration::from_secs(3);

/// What has come in, in order.
type Lines = Arc<Mutex<Vec<String>>>;

fn read(lines: &Lines) -> Vec<String> {
    lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// An agent that watches a cluster, and everything that it says to anybody.
pub struct Watch {
    child: Child,
    /// Notifications, by node.
    heard: Vec<(String, Lines)>,
    /// Lines of standard output.
    printed: Lines,
    /// Datagrams to the supervisor.
    supervisor: Lines,
}

impl Watch {
    /// Starts it, and returns when it says that it is ready.
    pub async fn start(cluster: &Cluster) -> Result<Self> {
        Self::begin(cluster, &["watch", "--json"]).await
    }

    /// Starts the one of a node.
    pub async fn start_for(cluster: &Cluster, node: &str) -> Result<Self> {
        Self::begin(cluster, &["watch", "--json", "--node", node]).await
    }

    async fn begin(cluster: &Cluster, arguments: &[&str]) -> Result<Self> {
        let mut heard = Vec::new();
        for node in cluster.nodes() {
            let mut session = node.listen("rosuav", DATABASE).await?;
            session.client.batch_execute("listen \"scream.emergency\"").await?;
            let lines = Lines::default();
            heard.push((node.name().to_owned(), Arc::clone(&lines)));
            tokio::spawn(async move {
                // The whole of it, because the connection ends with the client.
                let session = &mut session;
                while let Some(notification) = session.notifications.recv().await {
                    push(&lines, notification.payload());
                }
            });
        }
        let path = cluster.agent_configuration().with_file_name(format!("notify-{}", heard.len() + rank()));
        let socket = UnixDatagram::bind(&path)?;
        socket.set_nonblocking(true)?;
        let socket = tokio::net::UnixDatagram::from_std(socket)?;
        let supervisor = Lines::default();
        let lines = Arc::clone(&supervisor);
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(length) = socket.recv(&mut buffer).await {
                String::from_utf8_lossy(&buffer[..length]).lines().for_each(|line| push(&lines, line));
            }
        });
        let mut command = cluster.agent_command(arguments);
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "400000").env_remove("WATCHDOG_PID");
        let mut child = command.spawn().with_context(|| format!("could not run {:?}", command.as_std()))?;
        let printed = Lines::default();
        let lines = Arc::clone(&printed);
        let mut stdout = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        tokio::spawn(async move {
            while let Ok(Some(line)) = stdout.next_line().await {
                push(&lines, &line);
            }
        });
        let watch = Self { child, heard, printed, supervisor };
        wait_until("the agent to be ready", PATIENCE, || async {
            Ok(read(&watch.supervisor).iter().any(|line| line == "READY=1").then_some(()))
        })
        .await?;
        Ok(watch)
    }

    /// What has been notified on a node.
    pub fn on(&self, node: &str) -> Vec<String> {
        self.heard.iter().find(|(name, _)| name == node).map(|(_, lines)| read(lines)).unwrap_or_default()
    }

    /// Waits until something with all these words is notified on the node; returns it.
    pub async fn hear(&self, node: &str, words: &[&str]) -> Result<String> {
        wait_until(&format!("{words:?} on {node}"), PATIENCE, || async {
            Ok(self.on(node).into_iter().find(|text| words.iter().all(|word| text.contains(word))))
        })
        .await
        .with_context(|| format!("heard so far: {:#?}, printed: {:#?}", self.on(node), read(&self.printed)))
    }

    /// Waits until it has told the supervisor so many times more that it is alive, which it does while it looks on.
    pub async fn look_on(&self, times: usize) -> Result<()> {
        let before = read(&self.supervisor).len();
        wait_until("the agent to look on", PATIENCE, || async {
            Ok((read(&self.supervisor).len() >= before + times).then_some(()))
        })
        .await
    }

    /// The lines of its standard output.
    pub fn printed(&self) -> Vec<String> {
        read(&self.printed)
    }

    /// Exactly these have been notified on each of the nodes, in this order, and printed: each a part of what was said.
    fn assert_heard(&self, nodes: &[&str], expected: &[&str]) -> Result<()> {
        let printed = read(&self.printed);
        let printed = printed.iter().filter(|line| !line.contains(r#""event":"watching""#)).cloned().collect();
        for (place, said) in nodes.iter().map(|node| (*node, self.on(node))).chain([("stdout", printed)]) {
            let fits = said.len() == expected.len()
                && said.iter().zip(expected).all(|(text, part)| text.contains(part))
                && (place == "stdout" || said.iter().all(|text| text.starts_with("REPL WDOG: ")));
            ensure!(fits, "{place}: expected {expected:#?}, heard {said:#?}");
        }
        Ok(())
    }

    /// Kilobytes of private memory that it has.
    pub fn resident(&self) -> Result<i64> {
        resident(self.child.id().context("it has ended")?)
    }

    /// Ends it with SIGKILL, and on the servers what it had asked for.
    pub async fn kill(mut self, cluster: &Cluster) -> Result<()> {
        cluster.expect_log(" 57P01 ");
        self.child.kill().await?;
        let ended = "select pg_terminate_backend(pid, 10000) from pg_stat_activity where usename = 'stillebot_agent'";
        for node in cluster.nodes() {
            node.execute(DATABASE, ended).await?;
        }
        Ok(())
    }

    /// Ends it with SIGTERM: cleanly, at once, and with a last word to the supervisor.
    pub async fn end(mut self) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().context("it has ended")?.try_into()?);
        let asked = Instant::now();
        signal::kill(pid, Signal::SIGTERM)?;
        let Ok(status) = tokio::time::timeout(PATIENCE, self.child.wait()).await else {
            bail!("the agent does not end")
        };
        let took = asked.elapsed();
        let mut stderr = String::new();
        self.child.stderr.take().context("no stderr")?.read_to_string(&mut stderr).await?;
        ensure!(status?.code() == Some(0), "{stderr}");
        ensure!(took < Duration::from_secs(1), "it took {took:?}");
        wait_until("the last word", PATIENCE, || async {
            Ok(read(&self.supervisor).iter().any(|line| line == "STOPPING=1").then_some(()))
        })
        .await
    }
}

/// Kilobytes of private memory of a process; 0 when it is gone.
pub fn resident(pid: u32) -> Result<i64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    Ok(line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0))
}

fn push(lines: &Lines, text: &str) {
    lines.lock().unwrap_or_else(PoisonError::into_inner).push(text.to_owned());
}

/// A number of its own for each call.
fn rank() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

async fn watched() -> Result<(Cluster, Watch)> {
    let cluster = Cluster::start().await?;
    cluster.configure_agent(CONFIGURATION)?;
    let watch = Watch::start(&cluster).await?;
    Ok((cluster, watch))
}

const BOTH: [&str; 2] = ["sikorsky", "gideon"];

async fn write(cluster: &Cluster, node: &str, key: &str) -> Result<()> {
    let statement = format!(
        "insert into stillebot.config values (1, '{key}', '{{}}')
         on conflict (twitchid, keyword) do update set data = excluded.data"
    );
    cluster.node(node).execute(DATABASE, &statement).await
}

/// The walsender that serves gideon.
async fn walsender(cluster: &Cluster) -> Result<Pid> {
    let query = "select active_pid from pg_replication_slots where slot_name = 'multihome'";
    Ok(Pid::from_raw(cluster.node("sikorsky").value(DATABASE, query).await?))
}

#[tokio::test]
async fn a_pair_that_has_nothing_to_say_is_well() -> Result<()> {
    let (cluster, watch) = watched().await?;
    let began = Instant::now();
    let sikorsky = cluster.node("sikorsky");
    // WAL that is not replicated, and rows that are.
    for round in 0.. {
        sikorsky.execute(DATABASE, "create table if not exists public.other (i int); drop table public.other").await?;
        sikorsky.execute(DATABASE, "checkpoint").await?;
        sikorsky.execute(DATABASE, "select pg_switch_wal()").await?;
        write(&cluster, "gideon", &round.to_string()).await?;
        // Quiet for longer than what would be a stall.
        let quiet = Instant::now();
        let looks = read(&watch.supervisor).len();
        wait_until("it to look on", PATIENCE, || async {
            Ok((quiet.elapsed() > STALL * 3 / 2 && read(&watch.supervisor).len() > looks).then_some(()))
        })
        .await?;
        if began.elapsed() > STALL * 4 {
            break;
        }
    }
    watch.assert_heard(&BOTH, &[])?;
    let supervisor = read(&watch.supervisor);
    ensure!(supervisor.iter().any(|line| line == "STATUS=all is well"), "{supervisor:?}");
    // Twice in each period that systemd allows.
    let alive = supervisor.iter().filter(|line| *line == "WATCHDOG=1").count() as u32;
    let expected = (began.elapsed().as_millis() / 200) as u32;
    ensure!(alive > expected / 2 && alive <= expected + 10, "{alive} signs of life, not {expected}");
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_direction_that_is_cut_off_is_disconnected_until_it_is_mended() -> Result<()> {
    let (cluster, watch) = watched().await?;
    cluster.link("sikorsky", "gideon").cut().await?;
    for node in BOTH {
        watch.hear(node, &["sikorsky -> gideon disconnected since 2"]).await?;
    }
    cluster.link("sikorsky", "gideon").heal().await?;
    for node in BOTH {
        watch.hear(node, &["sikorsky -> gideon is well again: was disconnected for"]).await?;
    }
    watch.assert_heard(&BOTH, &["disconnected since", "well again"])?;
    let first: Value = serde_json::from_str(&read(&watch.printed)[1])?;
    ensure!(
        first["event"] == "alarm"
            && first["from"] == "sikorsky"
            && first["to"] == "gideon"
            && first["condition"] == "disconnected"
            && first["since"].is_string()
            && first["text"].is_string(),
        "{first:#}"
    );
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_worker_that_waits_for_its_connection_is_not_connected() -> Result<()> {
    let (cluster, watch) = watched().await?;
    cluster.expect_log(" 57P01 ");
    // The next worker may come before the last one has quite gone.
    cluster.expect_log("is already active for PID");
    let gideon = cluster.node("gideon");
    cluster.link("sikorsky", "gideon").freeze().await?;
    let ended = "select pg_terminate_backend(pid) from pg_stat_subscription where pid is not null";
    gideon.execute(DATABASE, ended).await?;
    watch
        .hear("gideon", &["disconnected since", "the worker of subscription multihome on gideon has no connection"])
        .await?;
    cluster.link("sikorsky", "gideon").heal().await?;
    watch.hear("gideon", &["well again"]).await?;
    watch.hear("sikorsky", &["well again"]).await?;
    watch.assert_heard(&BOTH, &["disconnected since", "well again"])?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_lock_in_the_way_of_apply_is_told_with_who_holds_it() -> Result<()> {
    let (cluster, watch) = watched().await?;
    write(&cluster, "sikorsky", "locked").await?;
    cluster.wait_replicated().await?;
    let holder = cluster.node("gideon").connect("rosuav", DATABASE).await?;
    let pid: i32 = holder.query_one("select pg_backend_pid()", &[]).await?.get(0);
    holder.batch_execute("begin; select from stillebot.config where keyword = 'locked' for update").await?;
    write(&cluster, "sikorsky", "locked").await?;
    let who = format!("pid {pid} (rosuav, test, 127.0.0.1, idle in transaction)");
    let alarm = watch.hear("sikorsky", &["sikorsky -> gideon blocked by a lock since 2", &who]).await?;
    ensure!(alarm.contains("of stillebot.config") && alarm.contains("keyword = 'locked' for update"), "{alarm}");
    // Longer than it takes to be stalled: it is still the lock.
    let since = Instant::now();
    wait_until("a stall", PATIENCE, || async { Ok((since.elapsed() > STALL * 3 / 2).then_some(())) }).await?;
    holder.batch_execute("rollback").await?;
    watch.hear("sikorsky", &["well again: was blocked by a lock"]).await?;
    watch.hear("gideon", &["well again: was blocked by a lock"]).await?;
    watch.assert_heard(&BOTH, &["blocked by a lock since", "well again"])?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_connection_on_which_nothing_moves_is_stalled() -> Result<()> {
    let (cluster, watch) = watched().await?;
    let sender = walsender(&cluster).await?;
    signal::kill(sender, Signal::SIGSTOP)?;
    write(&cluster, "sikorsky", "late").await?;
    let alarm = watch.hear("gideon", &["sikorsky -> gideon stalled since 2", "connected"]).await;
    signal::kill(sender, Signal::SIGCONT)?;
    alarm?;
    watch.hear("gideon", &["well again: was stalled"]).await?;
    watch.hear("sikorsky", &["well again: was stalled"]).await?;
    watch.assert_heard(&BOTH, &["stalled since", "well again"])?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn what_is_applied_long_after_it_was_written_is_slow_with_the_time_to_catch_up() -> Result<()> {
    let (cluster, watch) = watched().await?;
    let link = cluster.link("sikorsky", "gideon");
    link.slow(100_000).await?;
    // Half a minute's worth, written in a moment: while it grows nobody can say when it will be over.
    let rows = "do $$ begin for i in 1..3000 loop
                    insert into stillebot.config values (1, i, to_jsonb(repeat(md5(i::text), 32)));
                    if i % 100 = 0 then commit; end if;
                end loop; end $$";
    cluster.node("sikorsky").execute(DATABASE, rows).await?;
    watch.hear("gideon", &["sikorsky -> gideon slow since 2", " behind, ", " to catch up at the present rate"]).await?;
    link.heal().await?;
    for node in BOTH {
        watch.hear(node, &["sikorsky -> gideon is well again: was slow"]).await?;
    }
    watch.assert_heard(&BOTH, &["slow since", "well again"])?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_slot_that_nobody_reads_though_the_target_believes_to_be_connected_is_unread() -> Result<()> {
    let (cluster, watch) = watched().await?;
    cluster.expect_log(" 57P01 ");
    let link = cluster.link("sikorsky", "gideon");
    link.freeze().await?;
    let ended = format!("select pg_terminate_backend({})", walsender(&cluster).await?);
    cluster.node("sikorsky").execute(DATABASE, &ended).await?;
    watch.hear("gideon", &["sikorsky -> gideon with an unread slot since 2", "nobody reads slot multihome"]).await?;
    link.heal().await?;
    for node in BOTH {
        // The worker that learns of it ends, and the next one has to connect first.
        watch.hear(node, &["sikorsky -> gideon is well again: was "]).await?;
        let said = watch.on(node);
        ensure!(said.iter().filter(|text| text.contains("with an unread slot since")).count() == 1, "{said:#?}");
    }
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_slot_that_has_lost_wal_is_broken_for_good() -> Result<()> {
    let (cluster, watch) = watched().await?;
    cluster.expect_log("invalidating obsolete replication slot");
    let sikorsky = cluster.node("sikorsky");
    sikorsky.config(&[("max_slot_wal_keep_size", "1MB")]).await?;
    cluster.link("sikorsky", "gideon").cut().await?;
    watch.hear("gideon", &["sikorsky -> gideon disconnected"]).await?;
    for _ in 0..3 {
        sikorsky.execute(DATABASE, "select pg_logical_emit_message(false, 'x', 'x'), pg_switch_wal()").await?;
    }
    sikorsky.execute(DATABASE, "checkpoint").await?;
    let lost = "slot multihome has lost WAL that was needed, the target has to be set up anew";
    watch.hear("gideon", &["sikorsky -> gideon broken for good since 2", lost]).await?;
    sikorsky.execute(DATABASE, "select pg_drop_replication_slot('multihome')").await?;
    sikorsky.execute(DATABASE, "select pg_create_logical_replication_slot('multihome', 'pgoutput')").await?;
    cluster.link("sikorsky", "gideon").heal().await?;
    watch.hear("gideon", &["sikorsky -> gideon is well again"]).await?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_slot_that_is_gone_is_missed() -> Result<()> {
    let (cluster, watch) = watched().await?;
    for part in [" 57P01 ", "could not receive data from WAL stream", "could not send", "does not exist", " 55006 "] {
        cluster.expect_log(part);
    }
    let sikorsky = cluster.node("sikorsky");
    wait_until("the slot to go", PATIENCE, || async {
        let ended = "select pg_terminate_backend(active_pid) from pg_replication_slots where active";
        sikorsky.execute(DATABASE, ended).await?;
        sikorsky.execute(DATABASE, "select pg_drop_replication_slot('multihome')").await.map(Some)
    })
    .await?;
    watch.hear("gideon", &["sikorsky -> gideon without slot since 2", "slot multihome is gone"]).await?;
    sikorsky.execute(DATABASE, "select pg_create_logical_replication_slot('multihome', 'pgoutput')").await?;
    watch.hear("gideon", &["well again: was without slot"]).await?;
    watch.hear("sikorsky", &["well again: was without slot"]).await?;
    watch.assert_heard(&BOTH, &["without slot since", "well again"])?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_subscription_that_is_disabled_or_gone_is_told() -> Result<()> {
    let (cluster, watch) = watched().await?;
    let gideon = cluster.node("gideon");
    gideon.execute(DATABASE, "alter subscription multihome disable").await?;
    watch.hear("sikorsky", &["sikorsky -> gideon disabled since 2"]).await?;
    gideon.execute(DATABASE, "alter subscription multihome set (slot_name = none)").await?;
    watch.hear("sikorsky", &["no longer disabled"]).await?;
    watch.hear("sikorsky", &["sikorsky -> gideon without slot", "the subscription has no slot"]).await?;
    gideon.execute(DATABASE, "alter subscription multihome rename to other").await?;
    watch.hear("sikorsky", &["sikorsky -> gideon without subscription", "no subscription multihome"]).await?;
    gideon.execute(DATABASE, "alter subscription other rename to multihome").await?;
    gideon.execute(DATABASE, "alter subscription multihome set (slot_name = multihome)").await?;
    gideon.execute(DATABASE, "alter subscription multihome enable").await?;
    watch.hear("sikorsky", &["well again"]).await?;
    watch.hear("gideon", &["well again"]).await?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn apply_that_fails_again_and_again_is_erroring_and_not_disconnected() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.configure_agent(CONFIGURATION)?;
    // The same on both nodes, or it would be drift; only one refuses.
    let constraint = "alter table stillebot.config add constraint no
                      check (keyword <> 'no' or current_setting('test.refuses', true) is distinct from 'on')";
    for node in cluster.nodes() {
        node.execute(DATABASE, constraint).await?;
    }
    let gideon = cluster.node("gideon");
    gideon.config(&[("test.refuses", "on")]).await?;
    let watch = Watch::start(&cluster).await?;
    cluster.expect_log(" 23514 ");
    cluster.expect_log("terminated by exit code");
    write(&cluster, "sikorsky", "no").await?;
    watch.hear("gideon", &["sikorsky -> gideon erroring since 2"]).await?;
    // Long enough for a few more attempts, between which there is no worker.
    let counted = "select apply_error_count from pg_stat_subscription_stats";
    let before: i64 = gideon.value(DATABASE, counted).await?;
    wait_until("more errors", PATIENCE, || async {
        Ok((gideon.value::<i64>(DATABASE, counted).await? > before + 3).then_some(()))
    })
    .await?;
    gideon.config(&[("test.refuses", "off")]).await?;
    watch.hear("gideon", &["well again: was erroring"]).await?;
    watch.hear("sikorsky", &["well again: was erroring"]).await?;
    watch.assert_heard(&BOTH, &["erroring since", "well again"])?;
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn wal_kept_for_a_dead_peer_is_told_with_when_the_disk_is_full() -> Result<()> {
    let cluster = Cluster::start().await?;
    let sikorsky = cluster.node("sikorsky");
    // Through the socket, so that the agent is on the very host and can look at the disk.
    let configuration = std::fs::read_to_string(cluster.agent_configuration())?
        .replacen("host        = \"127.0.0.1\"", &format!("host = \"{}\"", sikorsky.socket_directory().display()), 1)
        .replacen(
            &format!("port        = {}", cluster.agent_link("sikorsky").port()),
            &format!("port = {}", sikorsky.port()),
            1,
        )
        .replacen("family      = \"ipv4\"", "", 1);
    std::fs::write(cluster.agent_configuration(), configuration)?;
    cluster.configure_agent(CONFIGURATION)?;
    let watch = Watch::start(&cluster).await?;
    cluster.link("sikorsky", "gideon").cut().await?;
    watch.hear("sikorsky", &["sikorsky -> gideon disconnected"]).await?;
    let write = |megabytes: u32| {
        format!("select pg_logical_emit_message(false, 'x', repeat('x', 1048576)) from generate_series(1, {megabytes})")
    };
    sikorsky.execute(DATABASE, &write(80)).await?;
    let alarm = wait_until("an alarm", PATIENCE, || async {
        sikorsky.execute(DATABASE, &write(1)).await?;
        Ok(watch.on("sikorsky").into_iter().find(|text| text.contains("keeping WAL")))
    })
    .await?;
    ensure!(alarm.contains("slot multihome on sikorsky keeping WAL since 2"), "{alarm}");
    ensure!(alarm.contains("B kept for gideon, ") && alarm.contains("/s more, the disk is full in "), "{alarm}");
    cluster.link("sikorsky", "gideon").heal().await?;
    watch.hear("gideon", &["slot multihome on sikorsky is well again: was keeping WAL"]).await?;
    watch.hear("gideon", &["sikorsky -> gideon is well again: was disconnected"]).await?;
    ensure!(watch.on("gideon").len() == 4, "{:#?}", watch.on("gideon"));
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn a_node_that_cannot_be_reached_is_told_on_those_that_can() -> Result<()> {
    let (cluster, watch) = watched().await?;
    cluster.agent_link("gideon").cut().await?;
    watch.hear("sikorsky", &["REPL WDOG: gideon unreachable since 2"]).await?;
    cluster.agent_link("gideon").heal().await?;
    for node in BOTH {
        watch.hear(node, &["gideon is well again: was unreachable"]).await?;
    }
    watch.assert_heard(&["sikorsky"], &["gideon unreachable", "well again"])?;
    watch.assert_heard(&[], &["gideon unreachable", "well again"])?;
    ensure!(watch.on("gideon").len() == 1, "{:?}", watch.on("gideon"));
    watch.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn of_two_agents_that_watch_one_speaks() -> Result<()> {
    let (cluster, first) = watched().await?;
    let second = Watch::start(&cluster).await?;
    let gideon = cluster.node("gideon");
    gideon.execute(DATABASE, "alter subscription multihome disable").await?;
    for watch in [&first, &second] {
        wait_until("both to see it", PATIENCE, || async {
            Ok(read(&watch.printed).iter().any(|line| line.contains("disabled since")).then_some(()))
        })
        .await?;
    }
    first.hear("gideon", &["disabled since"]).await?;
    // The other one takes over.
    first.end().await?;
    let locks =
        "select count(*) from pg_locks where locktype = 'advisory' and classid = 1937010028 and objid = 2 and granted";
    wait_until("the second to speak", PATIENCE, || async {
        Ok((gideon.value::<i64>(DATABASE, locks).await? == 1).then_some(()))
    })
    .await?;
    gideon.execute(DATABASE, "alter subscription multihome enable").await?;
    second.hear("gideon", &["well again"]).await?;
    second.hear("sikorsky", &["well again"]).await?;
    second.assert_heard(&BOTH, &["disabled since", "well again"])?;
    second.end().await?;
    cluster.finish().await
}

#[tokio::test]
async fn once_says_how_things_are() -> Result<()> {
    let cluster = Cluster::start().await?;
    cluster.configure_agent(CONFIGURATION)?;
    let run = agent(&cluster, &["watch", "--once"]).await?.expect_code(0)?;
    ensure!(run.json["well"] == true && run.json["conditions"] == serde_json::json!([]), "{run:#?}");
    ensure!(run.json["replication"][0]["connected"] == true, "{run:#?}");
    cluster.node("gideon").execute(DATABASE, "alter subscription multihome disable").await?;
    let run = agent(&cluster, &["watch", "--once"]).await?.expect_code(1)?;
    let condition = &run.json["conditions"][0];
    ensure!(condition["condition"] == "disabled" && condition["from"] == "sikorsky", "{run:#?}");
    cluster.agent_link("sikorsky").cut().await?;
    let text = cluster.agent(&["watch", "--once"]).await?.expect_code(1)?.stdout;
    ensure!(text.contains("sikorsky unreachable") && text.ends_with("not all is well\n"), "{text}");
    cluster.finish().await
}
