//! `make demo`: two live nodes on this machine, eight bots that write all the time, and every promise put to the test
//! before your eyes. Exits non-zero if one was not kept.
//!
//! `KEEP=1` leaves the servers running and says how to play with them. The scenes are here; `stage` is what the audience
//! sees, `ways` is every known way to write.

mod stage;
mod ways;

use std::{
    ffi::OsStr,
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use stage::Stage;
use stillebot_tests::{
    Cluster, Hopped, Installation, Report, Rows, Server, Workload, WorkloadOptions, cluster::DATABASE,
    figures::Figures, server::keep_requested, wait::PATIENCE, wait_until,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout},
    time::timeout,
};

const HOPS: usize = 10;
/// How long queued writes get at the end of a workload.
const GRACE: Duration = Duration::from_secs(10);
/// How long two versions of one command may last, from when the nodes hear each other again.
const QUARREL: Duration = Duration::from_secs(1);
/// What a bot's operator would write into agent.toml: of two versions of a command the later one is active, and bots hear of it.
const RULE: &str = r#"
[[rule]]
table    = "stillebot.commands"
strategy = "deactivate-older"
flag     = "active"
by       = "created"
notify   = { channel = "stillebot.commands", payload = "{twitchid}:{cmdname}" }
"#;

#[tokio::main]
async fn main() -> ExitCode {
    match demo().await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("\nThe demo could not go on: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every promise was kept.
async fn demo() -> Result<bool> {
    let began = Instant::now();
    let mut stage = Stage::new();
    let cluster = tokio::select! {
        cluster = build() => cluster?,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
    };
    let version = &Installation::get()?.version;
    stage.heading(&format!("Two nodes, sikorsky and gideon, each a {version} of its own"));
    let scenes = tokio::select! {
        result = scenes(&mut stage, &cluster) => result,
        _ = tokio::signal::ctrl_c() => {
            let _ = cluster.finish().await;
            bail!("interrupted; the servers are gone");
        }
    };
    scenes?;

    let findings: Vec<_> = cluster.nodes().iter().flat_map(Server::unexpected_log).collect();
    stage.promise(findings.is_empty(), "the server logs have no line that nobody expected");
    findings.iter().take(10).for_each(|finding| eprintln!("{finding}"));
    let stays = if keep_requested() {
        Some(cluster)
    } else {
        let clean = cluster.finish().await.is_ok() || !findings.is_empty();
        stage.promise(clean, "both servers were stopped cleanly");
        None
    };
    let broken = stage.broken().len();
    stage.heading(&match broken {
        0 => format!("Every promise was kept. {:.0} seconds.", began.elapsed().as_secs_f64()),
        _ => format!("NOT kept: {broken} of the promises"),
    });
    stage.broken().iter().for_each(|what| println!("   {what}"));
    if let Some(cluster) = stays {
        leave(&stage, cluster)?;
    }
    Ok(broken == 0)
}

async fn build() -> Result<Cluster> {
    // On, against the harness's habit: the gaps shall be those of servers that keep what they acknowledge.
    let builder = Cluster::builder().direct().config("fsync", "on");
    let builder = if keep_requested() { builder.lasting() } else { builder };
    let cluster = builder.start().await?;
    // Of client backends only: replication is never refused.
    cluster.expect_log(" 25006 client backend ");
    cluster.expect_log("there is no transaction in progress");
    // Core says of a conflict what it always says, and of a worker that is started before the last one has quite gone.
    cluster.expect_log(" 23505 logical replication ");
    cluster.expect_log(" 55006 logical replication ");
    for node in cluster.nodes() {
        node.execute(DATABASE, &format!("set role rosuav; {}", ways::PROPS)).await?;
    }
    Ok(cluster)
}

/// What the audience has seen so far, for the table at the end.
#[derive(Default)]
struct Seen {
    reports: Vec<Report>,
    hops: Vec<Hopped>,
}

async fn scenes(stage: &mut Stage, cluster: &Cluster) -> Result<()> {
    let mut seen = Seen::default();
    // While both nodes are written or one dies, each client keeps to rows of its own on each node: the only conflict is
    // the one that is made. In between, the same rows on whatever node is live: whoever opened too early would be found out.
    let together = WorkloadOptions { pause: Duration::from_millis(10), ..Default::default() };
    let apart = WorkloadOptions { rows: Rows::PerClientAndNode, ..together.clone() };
    let workload = replication(stage, cluster, &apart).await?;
    conflict(stage, cluster).await?;
    down(stage, cluster).await?;
    let next = Workload::start(cluster, together);
    seen.reports.push(workload.stop(GRACE).await?);

    hops(stage, cluster, &next, &mut seen).await?;
    down_through_a_crash(stage, cluster, &next).await?;
    seen.reports.push(next.stop(GRACE).await?);

    let last = Workload::start(cluster, apart);
    emergency(stage, cluster, &last, &mut seen).await?;
    seen.reports.push(last.stop(GRACE).await?);
    account(stage, cluster, &seen).await
}

async fn replication(stage: &mut Stage, cluster: &Cluster, options: &WorkloadOptions) -> Result<Workload> {
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    stage.scene(
        "Replication both ways",
        "Each follows the other over TLS, both ends showing a certificate. Both are up, and take writes.",
    );
    sikorsky
        .execute(
            DATABASE,
            "insert into stillebot.commands (twitchid, cmdname, active, content)
               select n % 50, 'command' || n, true, jsonb_build_object('message', 'Hello ' || n) from generate_series(1, 2000) n;
             insert into stillebot.config
               select n % 50, 'setting' || n, jsonb_build_object('value', n) from generate_series(1, 1000) n;
             insert into stillebot.user_login_sightings (twitchid, login, bot)
               select n, 'viewer' || n, 'stillebot' from generate_series(1, 1000) n;",
        )
        .await?;
    let written = Instant::now();
    cluster.wait_applied("sikorsky", "gideon").await?;
    let took = written.elapsed();
    let rows: i64 = gideon
        .value(
            DATABASE,
            "select (select count(*) from stillebot.commands) + (select count(*) from stillebot.config) \
                  + (select count(*) from stillebot.user_login_sightings)",
        )
        .await?;
    stage.promise(rows == 4000, format!("{rows} rows saved on sikorsky are on gideon {}", later(took)));

    gideon.execute(DATABASE, "insert into stillebot.raids values (100, 200)").await?;
    let written = Instant::now();
    wait_until("the row on the other side", PATIENCE, || async {
        let there = sikorsky.value::<bool>(DATABASE, "select exists (select from stillebot.raids where fromid = 100)");
        Ok(there.await?.then_some(()))
    })
    .await?;
    stage.promise(true, format!("a row saved on gideon is on sikorsky {}", later(written.elapsed())));

    for (node, other) in [(sikorsky, "gideon"), (gideon, "sikorsky")] {
        let query = "select coalesce(min(version || ', as ' || client_dn), 'no TLS') from pg_stat_replication \
                     join pg_stat_ssl using (pid) where ssl and client_dn is not null";
        let link: String = node.value(DATABASE, query).await?;
        stage.promise(link.starts_with("TLS"), format!("{other} reads from {} over {link}", node.name()));
    }

    let workload = Workload::start(cluster, options.clone());
    workload.wait_writes(0, 100).await?;
    workload.wait_writes(1, 100).await?;
    stage.promise(
        true,
        format!(
            "{} bots have begun to write, {} times on sikorsky and {} on gideon up to now; from here on they never rest",
            options.clients,
            workload.acknowledged_by(0),
            workload.acknowledged_by(1)
        ),
    );
    Ok(workload)
}

async fn conflict(stage: &mut Stage, cluster: &Cluster) -> Result<()> {
    let nodes = [cluster.node("sikorsky"), cluster.node("gideon")];
    stage.scene(
        "A conflict",
        "Both sides save the command !hug while they cannot hear each other. PostgreSQL lets only one version be active, so \
         replication stops, both ways. stillebot-agent watch runs, and its configuration has a rule for commands.",
    );
    nodes[0].execute(DATABASE, &save_hug("hugs everyone")).await?;
    cluster.wait_applied("sikorsky", "gideon").await?;
    cluster.configure_agent(RULE)?;
    let mut watch = Watch::start(cluster).await?;

    for node in nodes {
        node.execute(DATABASE, "alter subscription multihome disable").await?;
    }
    for node in nodes {
        // A slot is not given to the next worker before it is left by the last one.
        wait_until("nobody to read the slot", PATIENCE, || async {
            Ok(node.value::<bool>(DATABASE, "select not active from pg_replication_slots").await?.then_some(()))
        })
        .await?;
    }
    nodes[0].execute(DATABASE, &save_hug("hugs from sikorsky")).await?;
    nodes[1].execute(DATABASE, &save_hug("hugs from gideon")).await?;
    let mut bot = nodes[1].listen("rosuav", DATABASE).await?;
    bot.client.batch_execute("listen \"stillebot.commands\"").await?;
    for node in nodes {
        node.execute(DATABASE, "alter subscription multihome enable").await?;
    }
    let enabled = Instant::now();
    // The later one, on both.
    let active = "select coalesce(string_agg(content ->> 'message', ' and ') filter (where active), 'none'), count(*) \
                  from stillebot.commands where twitchid = 1 and cmdname = 'hug'";
    let sessions = [nodes[0].superuser(DATABASE).await?, nodes[1].superuser(DATABASE).await?];
    let took = wait_until("one version of the command", PATIENCE, || async {
        for session in &sessions {
            let row = session.query_one(active, &[]).await?;
            if (row.get::<_, &str>(0), row.get::<_, i64>(1)) != ("hugs from gideon", 3) {
                return Ok(None);
            }
        }
        Ok(Some(enabled.elapsed()))
    })
    .await?;
    // What was decided goes into the log, and to the bots, at the end of it.
    let resolved = watch.hear(" resolved: ").await?;
    let agents = "select array_agg(pid) from pg_stat_activity where application_name = 'stillebot-agent'";
    let agents: Vec<i32> = nodes[1].value(DATABASE, agents).await?;
    // Other bots save commands, and triggers tell of that.
    let heard = async {
        while let Some(told) = bot.notifications.recv().await {
            if told.payload() == "1:hug" && agents.contains(&told.process_id()) {
                return Ok(format!("NOTIFY \"{}\", '{}'", told.channel(), told.payload()));
            }
        }
        bail!("disconnected")
    };
    let heard = timeout(PATIENCE, heard).await.context("no bot was told")??;

    for (node, other) in [(nodes[0], nodes[1]), (nodes[1], nodes[0])] {
        let row: Option<String> = node
            .value(
                DATABASE,
                "select min(format('%s in %s.%s, %s: %s came in, %s was there; %s', conflict_type, schemaname, relname, constraint_name, \
                            remote_tuple -> 'content' -> 'message', local_conflicts -> 0 -> 'tuple' -> 'content' -> 'message', status)) \
                   from multihome.conflicts where relname = 'commands'",
            )
            .await?;
        let row = row.unwrap_or_default();
        let both = row.contains("from sikorsky") && row.contains("from gideon") && row.ends_with("resolved");
        stage.promise(both, format!("multihome.conflicts on {}, of what {} sent: {row}", node.name(), other.name()));
    }
    stage.say(&format!("The agent: {resolved}"));
    stage.promise(
        took < QUARREL,
        format!(
            "both have the later version active, {} after replication's return; nobody did anything",
            milliseconds(took)
        ),
    );
    stage.promise(true, "nothing is lost: all three versions are on both nodes, two of them inactive");
    stage.promise(true, format!("a bot on gideon heard of it: {heard}"));
    watch.end().await
}

/// Saves a command as the bot does: the version before is kept.
fn save_hug(message: &str) -> String {
    format!(
        "begin;
         update stillebot.commands set active = false where twitchid = 1 and cmdname = 'hug' and active;
         insert into stillebot.commands (twitchid, cmdname, active, content)
           values (1, 'hug', true, jsonb_build_object('message', '{message}'));
         commit"
    )
}

/// An agent that watches, and resolves by its rules.
struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    /// Returns when it says that it watches.
    async fn start(cluster: &Cluster) -> Result<Self> {
        // Nobody reads what it has for the journal.
        let mut child = cluster.agent_command(&["watch"]).stderr(Stdio::null()).spawn().context("no agent")?;
        let lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        let mut watch = Self { child, lines };
        watch.hear("watching").await?;
        Ok(watch)
    }

    /// The first line from here on with that word, without its time.
    async fn hear(&mut self, word: &str) -> Result<String> {
        let hear = async {
            while let Some(line) = self.lines.next_line().await? {
                if line.contains(word) {
                    return Ok(line.split_once(' ').map_or_else(|| line.clone(), |(_, text)| text.to_owned()));
                }
            }
            bail!("the watching agent has ended")
        };
        timeout(PATIENCE, hear).await.with_context(|| format!("the watching agent does not say {word:?}"))?
    }

    /// Ends it as systemd does.
    async fn end(mut self) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().context("the watching agent has ended")?.try_into()?);
        signal::kill(pid, Signal::SIGTERM)?;
        let status = timeout(PATIENCE, self.child.wait()).await.context("the watching agent does not end")??;
        ensure!(status.success(), "the watching agent: {status}");
        Ok(())
    }
}

async fn down(stage: &mut Stage, cluster: &Cluster) -> Result<()> {
    let gideon = cluster.node("gideon");
    stage.scene(
        "Down means down",
        "The agent takes gideon down, with bots writing and a transaction half-way through. Then a write is tried in every \
         way we know: as the bot's own user and as superuser, over both protocols, in old sessions and new.",
    );
    let old = ways::OldSessions::open(gideon).await?;
    let (output, half_done) = tokio::join!(cluster.agent(&["down", "gideon", "--reason", "the demo says so"]), async {
        wait_until("gideon to refuse writes", PATIENCE, || async { Ok(is_down(gideon).await?.then_some(())) }).await?;
        old.half_done().await
    });
    let output = output?;
    let said = output.stdout.lines().next().unwrap_or(&output.stderr).to_owned();
    stage.promise(output.code == Some(0), format!("agent: {said}"));

    let (mut tried, mut holes, mut hint) = (0, Vec::new(), String::new());
    let mut look = |name: &str, answer: ways::Answer| {
        tried += 1;
        let refused = answer.is_refusal();
        match answer {
            ways::Answer::Refused(why) => hint = why,
            ways::Answer::Otherwise(what) => holes.push(format!("{name}: {what}")),
        }
        refused
    };
    let mut refused = look("half-done transaction", half_done?);
    let mut names = vec!["half-done transaction"];
    for (name, answer) in old.fire().await {
        refused &= look(name, answer);
        names.push(name);
    }
    stage.group(refused, "sessions from before", &names);
    let sessions = [gideon.connect("rosuav", DATABASE).await?, gideon.connect("postgres", DATABASE).await?];
    for group in ways::GROUPS {
        let mut refused = true;
        for session in sessions.iter().skip(group.superuser.into()) {
            for (way, extended) in group.ways.iter().flat_map(|way| [(way, false), (way, true)]) {
                refused &= look(way.name, ways::attempt(session, way, extended).await?);
            }
        }
        let names: Vec<_> = group.ways.iter().map(|way| way.name).collect();
        stage.group(refused, group.label, &names);
    }
    // Its error has no hint that could be shown.
    let fastpath = ways::fastpath(gideon)?.is_refusal();
    stage.group(fastpath, "protocol's back door", &["fastpath call"]);

    holes.iter().for_each(|hole| stage.say(hole));
    let written: bool =
        gideon.value(DATABASE, "select exists (select from stillebot.raids where fromid < 100)").await?;
    stage.promise(
        holes.is_empty() && !written,
        format!("{} writes tried, every one refused with 25006, and nothing was written", tried + 1),
    );
    stage.say(&format!("Each came with a hint: {hint}"));
    Ok(())
}

async fn hops(stage: &mut Stage, cluster: &Cluster, workload: &Workload, seen: &mut Seen) -> Result<()> {
    stage.scene(
        "Ten hops",
        "sikorsky is live, gideon is down. Now the live side moves, ten times, with eight bots writing. The write gap is \
         the time from the first refused write on one node to the opening of the other, by the servers' own clocks.",
    );
    let names = ["sikorsky", "gideon"];
    for number in 1..=HOPS {
        let (from, to) = ((number + 1) % 2, number % 2);
        workload.wait_writes(from, 50).await?;
        let hop = cluster.hop(names[to]).await?;
        workload.wait_writes(to, 1).await?;
        let alone = is_down(cluster.node(names[from])).await? && !is_down(cluster.node(names[to])).await?;
        let gap = milliseconds(hop.write_gap);
        stage.promise(alone, format!("{} → {}: {gap} without a writable node", names[from], names[to]));
        seen.hops.push(hop);
    }
    Ok(())
}

async fn down_through_a_crash(stage: &mut Stage, cluster: &Cluster, workload: &Workload) -> Result<()> {
    let gideon = cluster.node("gideon");
    stage.scene(
        "kill -9 of the node that is down",
        "gideon's server is shot. Before it is back, somebody stands at its door and tries to write from the first \
         connection that it accepts.",
    );
    gideon.kill().await?;
    workload.wait_writes(0, 50).await?;
    stage.promise(true, "the bots write on, on sikorsky: they have not noticed");
    let hint = come_back(gideon).await?;
    let still = is_down(gideon).await?;
    stage.promise(still && hint.contains("hop to sikorsky"), format!("back, and still down. {hint}"));
    let back = Instant::now();
    cluster.wait_applied("sikorsky", "gideon").await?;
    stage.promise(true, format!("replication has caught up {}", later(back.elapsed())));
    Ok(())
}

async fn emergency(stage: &mut Stage, cluster: &Cluster, workload: &Workload, seen: &mut Seen) -> Result<()> {
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    stage.scene(
        "The emergency",
        "Now sikorsky is shot: the live one, in the middle of writes. No hop is possible, somebody must decide.",
    );
    workload.wait_writes(0, 50).await?;
    let shot = Instant::now();
    sikorsky.kill().await?;
    let output = cluster.agent(&["up", "gideon"]).await?;
    let why = output.stderr.lines().next().unwrap_or_default().trim_start_matches("stillebot-agent: ").to_owned();
    let refused = output.code == Some(69) && is_down(gideon).await?;
    stage.promise(refused, format!("up gideon: refused, unless we are sure. {why}"));
    let output = cluster.agent(&["up", "gideon", "--force"]).await?.expect_code(0)?;
    let said = output.stdout.lines().next().unwrap_or_default().trim_end();
    stage.promise(!is_down(gideon).await?, format!("up gideon --force: {said}"));
    workload.wait_writes(1, 1).await?;
    let saved = milliseconds(shot.elapsed());
    cluster.agent(&["activate", "gideon"]).await?.expect_code(0)?;
    stage.promise(true, format!("a bot has saved its first write there, {saved} after the shot"));
    workload.wait_writes(1, 50).await?;

    stage.say("sikorsky comes back. It was live when it died, and does not know what has happened since.");
    let before = workload.acknowledged_by(0);
    let hint = come_back(sikorsky).await?;
    stage.promise(is_down(sikorsky).await?, format!("it lets nobody write. {hint}"));
    let output = cluster.agent(&["down", "sikorsky", "--reason", "it was dead for a while"]).await?.expect_code(0)?;
    let said = output.stdout.lines().next().unwrap_or_default().to_owned();
    stage.promise(is_down(sikorsky).await?, format!("agent: {said}"));
    cluster.wait_replicated().await?;
    stage.promise(
        workload.acknowledged_by(0) == before,
        "replication has caught up both ways, without a conflict: what it had not sent when it died is on gideon now",
    );
    workload.wait_writes(1, 50).await?;
    let hop = cluster.hop("sikorsky").await?;
    workload.wait_writes(0, 50).await?;
    let alone = is_down(gideon).await? && !is_down(sikorsky).await?;
    stage.promise(alone, format!("and home again: gideon → sikorsky, {}", milliseconds(hop.write_gap)));
    seen.hops.push(hop);
    Ok(())
}

/// Starts a killed server with a writer at its door; returns the hint that the writer was refused with.
async fn come_back(node: &Server) -> Result<String> {
    let (started, hint) = tokio::join!(node.start(), timeout(PATIENCE, ways::hammer(node, 5)));
    started?;
    hint.with_context(|| format!("{} accepts no connections", node.name()))?
}

async fn account(stage: &mut Stage, cluster: &Cluster, seen: &Seen) -> Result<()> {
    stage.heading("What became of every write");
    cluster.wait_replicated().await?;
    let mut verdicts = Vec::new();
    for report in &seen.reports {
        verdicts.push(report.verify(cluster).await?);
    }
    let sum = |count: &dyn Fn(&stillebot_tests::Verdict) -> usize| verdicts.iter().map(count).sum::<usize>();
    let acknowledged = sum(&|verdict| verdict.acknowledged);
    // Sent twice by its client, because the killed server never answered the first time: that is the client's doing.
    let repeated = sum(&|verdict| verdict.duplicated.iter().filter(|(_, ambiguous)| *ambiguous).count());
    let bad = [
        ("lost", sum(&|verdict| verdict.lost.len())),
        ("duplicated", sum(&|verdict| verdict.duplicated.len()) - repeated),
        ("never asked for", sum(&|verdict| verdict.phantom.len())),
        ("made without knowing of an earlier one", sum(&|verdict| verdict.stale_counters as usize)),
        ("failed for another reason than down", sum(&|verdict| verdict.failed.len())),
    ];
    stage.row("writes acknowledged", acknowledged);
    for (index, node) in cluster.nodes().iter().enumerate() {
        stage.row(&format!("found on {}", node.name()), sum(&|verdict| verdict.found[index].1));
    }
    bad.iter().for_each(|(what, count)| stage.row(what, count));
    if repeated > 0 {
        stage.row("saved twice after an unanswered COMMIT", repeated);
    }
    stage.row("told to wait, as a database was down", seen.reports.iter().map(|report| report.refused).sum::<usize>());

    let servers = Figures::milliseconds(seen.hops.iter().map(|hop| hop.write_gap)).context("no hops")?;
    // From the last answer to any bot to the next one, which includes that bot's way to the other node.
    let clients = seen.hops.iter().filter_map(|hop| {
        let report = seen.reports.iter().rfind(|report| report.started <= hop.began)?;
        Some(report.longest_pause(hop.began, hop.ended))
    });
    let clients = Figures::milliseconds(clients).context("no hops")?;
    stage.heading(&format!("Write gaps of {} hops{:>15}{:>11}{:>11}", seen.hops.len(), "min", "median", "max"));
    for (who, gaps) in [("as the servers say", servers), ("as the bots saw them", clients)] {
        println!("   {who:<22}{:>9.1} ms{:>8.1} ms{:>8.1} ms", gaps.min(), gaps.median(), gaps.max());
    }

    println!();
    for verdict in &verdicts {
        if let Err(error) = verdict.ensure_clean()
            && bad.iter().any(|(_, count)| *count > 0)
        {
            eprintln!("{error:#}");
        }
    }
    stage.promise(
        acknowledged > 0 && bad.iter().all(|(_, count)| *count == 0),
        "nothing was lost, nothing duplicated, nothing made up",
    );
    let identical = cluster.assert_identical().await;
    stage.promise(identical.is_ok(), "all tables are identical on both nodes");
    if let Err(differences) = identical {
        eprintln!("{differences:#}");
    }
    Ok(())
}

/// Lets go of the servers, and says how to reach them.
fn leave(stage: &Stage, cluster: Cluster) -> Result<()> {
    let psql = Installation::get()?.bindir.join("psql").display().to_string();
    stage.heading("The servers go on (KEEP=1). psql as superuser, on either:");
    for node in cluster.nodes() {
        println!("   {psql} -h {} -p {} -U postgres {DATABASE}", node.socket_directory().display(), node.port());
    }
    stage.heading("psql as the bot's user over TLS, on whichever is live:");
    let (first, second) = (&cluster.nodes()[0], &cluster.nodes()[1]);
    let both = first
        .conninfo("rosuav", DATABASE)?
        .replace("host=127.0.0.1", "host=127.0.0.1,127.0.0.1")
        .replace(&format!("port={}", first.port()), &format!("port={},{}", first.port(), second.port()));
    println!("   {psql} '{both} target_session_attrs=read-write'");

    stage.heading("The agent:");
    let agent = cluster.agent_command(&[]);
    let words = std::iter::once(agent.as_std().get_program()).chain(agent.as_std().get_args());
    println!("   agent='{}'", words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" "));
    let commands =
        ["status", "hop gideon", "down gideon --reason 'just trying'", "up gideon", "conflicts list --all", "watch"];
    for command in commands {
        println!("   $agent {command}");
    }

    stage.heading("And the end of it all:");
    let script = cluster.agent_configuration().with_file_name("stop.sh");
    std::fs::write(&script, cluster.leave_running()?.join("\n"))?;
    println!("   sh {}", script.display());
    Ok(())
}

async fn is_down(node: &Server) -> Result<bool> {
    let state: String = node.value(DATABASE, "select state from stillebot_status()").await?;
    ensure!(["up", "down"].contains(&state.as_str()), "{} is {state}", node.name());
    Ok(state == "down")
}

fn later(time: Duration) -> String {
    format!("{} later", milliseconds(time))
}

fn milliseconds(time: Duration) -> String {
    let milliseconds = time.as_secs_f64() * 1000.0;
    if milliseconds < 10.0 { format!("{milliseconds:.1} ms") } else { format!("{milliseconds:.0} ms") }
}
