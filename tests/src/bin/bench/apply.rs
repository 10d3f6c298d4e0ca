//! What the log of conflicts costs replication: the same changes applied with and without it.
//!
//! One publisher, without the extension, and two subscribers with a slot each. A batch of transactions is written while
//! both subscriptions are disabled; then one is enabled, held at the batch's first row until everything before it is
//! ready and waiting, and let go. What is measured is apply alone, from there to the batch's last row.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stillebot_tests::{Server, figures::Figures, wait::PATIENCE, wait_until};
use tokio::time::{sleep, timeout};

use crate::{DATABASE, Effort, Finding, SETTINGS, assign, describe_settings, median, private_memory, processor_time};

/// How often memory and progress are looked at.
const GLANCE: Duration = Duration::from_millis(50);

/// Rows of `items` of which the subscribers lack every hundredth, and of `absent`, of which they lack all.
const ITEMS: u32 = 100_000;

/// A batch of transactions, of one kind.
pub struct Load {
    name: &'static str,
    /// Of the ratio to plain PostgreSQL.
    goal: Option<f64>,
    /// How often `statement` runs, with i from 1; each of its parts that `commit` ends is a transaction.
    rounds: u32,
    statement: &'static str,
    /// For each round.
    changes: u32,
    /// Of these rounds one has a change that finds no row.
    missing: Option<u32>,
}

/// At full effort.
pub const LOADS: [Load; 4] = [
    Load {
        name: "transactions of one row, no conflicts",
        goal: Some(0.97),
        rounds: 20_000,
        statement: "insert into fresh (note) values (repeat('x', 80)); commit;
                    update items set touched = touched + 1 where id = i + (i - 1) / 99; commit;",
        changes: 2,
        missing: None,
    },
    Load {
        name: "transactions of 20,000 rows, no conflicts",
        goal: Some(0.97),
        rounds: 6,
        statement: "insert into fresh (note) select repeat('x', 80) from generate_series(1, 10000);
                    update items set touched = touched + 1 where id <= 10101 and id % 100 <> 0; commit;",
        changes: 20_000,
        missing: None,
    },
    Load {
        name: "transactions of one row, 1 % of them updates of rows that are missing",
        goal: None,
        rounds: 20_000,
        statement: "insert into fresh (note) values (repeat('x', 80)); commit;
                    update items set touched = touched + 1
                     where id = case when i % 50 = 0 then i / 50 * 100 else i + (i - 1) / 99 end; commit;",
        changes: 2,
        missing: Some(50),
    },
    Load {
        name: "transactions of one row, all of them updates of rows that are missing",
        goal: None,
        rounds: 20_000,
        statement: "update absent set touched = touched + 1 where id = i; commit;",
        changes: 1,
        missing: Some(1),
    },
];

/// What applying a batch came to.
struct Applied {
    took: Duration,
    /// Of the apply worker.
    processor: Duration,
    /// At most, of the apply worker and, if there is one, the collector, in kilobytes.
    memory: u64,
    /// With the extension: what became of the conflicts of the batch.
    log: Option<Logged>,
}

struct Logged {
    recorded: i64,
    dropped: i64,
    /// Until the last of them was committed to the table, from when the batch was let go.
    took: Duration,
}

/// A load that was applied with and without the extension.
struct Pair {
    ours: Applied,
    plain: Applied,
    changes: f64,
    missing: i64,
}

/// With the extension, or without.
type Side = fn(&Pair) -> &Applied;

pub async fn measure(effort: &Effort) -> Result<Vec<Finding>> {
    let mut bed = Bed::start(effort.apply_share).await?;
    describe_settings(&bed.publisher).await?;
    println!("one publisher, two subscribers that take turns, through the unix socket\n");
    let mut pairs: Vec<Vec<Pair>> = LOADS.iter().map(|_| Vec::new()).collect();
    for half in 0..2 {
        assign(&bed.subscribers[half], &bed.subscribers[1 - half]).await?;
        bed.pair(&LOADS[0], half, true).await?;
        for ((load, count), pairs) in LOADS.iter().zip(effort.apply_pairs).zip(&mut pairs) {
            for pair in 0..count / 2 {
                pairs.push(bed.pair(load, half, pair % 2 == 0).await?);
            }
        }
    }
    let mut findings = Vec::new();
    for (load, pairs) in LOADS.iter().zip(&pairs) {
        findings.extend(conclude(load, pairs)?);
    }
    let logs = pairs.iter().flatten().filter_map(|pair| Some((pair.missing, pair.ours.log.as_ref()?)));
    let uncounted: i64 = logs.map(|(missing, log)| (missing - log.recorded - log.dropped).abs()).sum();
    findings
        .push(Finding::never("conflicts in those that were neither recorded nor counted", usize::try_from(uncounted)?));
    bed.finish().await?;
    Ok(findings)
}

fn conclude(load: &Load, pairs: &[Pair]) -> Result<Vec<Finding>> {
    let rate = |changes: f64, took: Duration| changes / took.as_secs_f64();
    let per_change = |changes: f64, took: Duration| took.as_secs_f64() * 1e6 / changes;
    let ratio = |of: &dyn Fn(&Applied) -> Duration| {
        Figures::new(pairs.iter().map(|pair| of(&pair.plain).as_secs_f64() / of(&pair.ours).as_secs_f64()))
            .context("no pairs")
    };
    let (throughput, processor) = (ratio(&|applied| applied.took)?, ratio(&|applied| applied.processor)?);
    let name = load.name;
    println!("{name}: {} pairs of {:.0} changes", pairs.len(), pairs.first().context("no pairs")?.changes);
    let sides: [(&str, Side); 2] = [("with", |pair| &pair.ours), ("without", |pair| &pair.plain)];
    for (whose, of) in sides {
        println!(
            "  {whose:<8}{:>8.0} changes/s, {:>6.2} µs of the worker's processor time each, {:>6} kB at most",
            median(pairs.iter().map(|pair| rate(pair.changes, of(pair).took)))?,
            median(pairs.iter().map(|pair| per_change(pair.changes, of(pair).processor)))?,
            pairs.iter().map(|pair| of(pair).memory).max().unwrap_or(0),
        );
    }
    println!("  ratio   {:>8.3} ({:.3} to {:.3})", throughput.median(), throughput.min(), throughput.max());
    let mut findings = vec![
        Finding::ratio(format!("apply of {name}, with to without the extension"), load.goal, &throughput),
        Finding::ratio("the same, per second of the worker's processor time", None, &processor),
    ];

    let logs: Vec<_> = pairs.iter().filter_map(|pair| pair.ours.log.as_ref()).collect();
    if load.missing.is_some() {
        let recorded = Figures::new(logs.iter().map(|log| rate(log.recorded as f64, log.took))).context("no log")?;
        let (kept, dropped) =
            logs.iter().fold((0, 0), |(kept, dropped), log| (kept + log.recorded, dropped + log.dropped));
        println!(
            "  log     {:>8.0} events/s until the last was in the table; {kept} recorded, {dropped} counted as dropped",
            recorded.median()
        );
        if load.missing == Some(1) {
            findings.push(Finding {
                spread: format!("{:.0} to {:.0}", recorded.min(), recorded.max()),
                ..Finding::new("events per second that reach the table meanwhile", format!("{:.0}", recorded.median()))
            });
            findings.push(Finding::new(
                "of those events, dropped for want of room, and counted",
                format!("{:.0} %", 100.0 * dropped as f64 / (kept + dropped).max(1) as f64),
            ));
            let most = |of: &dyn Fn(&Pair) -> u64| pairs.iter().map(of).max().unwrap_or(0) as f64 / 1024.0;
            findings.push(Finding {
                spread: format!("worker without: {:.1} MB", most(&|pair| pair.plain.memory)),
                ..Finding::new(
                    "private memory of worker and collector meanwhile, at most",
                    format!("{:.1} MB", most(&|pair| pair.ours.memory)),
                )
            });
        }
    }
    Ok(findings)
}

/// The servers.
struct Bed {
    publisher: Server,
    subscribers: [Server; 2],
    /// What loads are divided by.
    share: u32,
    /// How many batches were written.
    batches: i32,
}

impl Bed {
    async fn start(share: u32) -> Result<Self> {
        let start = async |name: &str| -> Result<Server> {
            let server = Server::builder(name).without_stillebot();
            let server =
                SETTINGS.iter().fold(server, |server, (key, value)| server.config(key, *value)).start().await?;
            // Rows find room beside themselves, whatever was written before.
            server
                .execute(
                    DATABASE,
                    &format!(
                        "create table mark (id integer primary key);
                         create table fresh (id bigint generated by default as identity primary key, note text not null);
                         create table items (id bigint primary key, note text not null, touched bigint not null default 0)
                             with (fillfactor = 50);
                         create table absent (like items including all) with (fillfactor = 50);
                         insert into items select i, repeat('x', 80) from generate_series(1, {ITEMS}) as i;"
                    ),
                )
                .await?;
            Ok(server)
        };
        let publisher = start("publisher").await?;
        publisher
            .execute(
                DATABASE,
                &format!(
                    "insert into absent select i, repeat('x', 80) from generate_series(1, {ITEMS}) as i;
                     create publication bench for all tables"
                ),
            )
            .await?;
        let subscribers = [start("left").await?, start("right").await?];
        for server in &subscribers {
            let (directory, port) = (publisher.socket_directory().display(), publisher.port());
            server
                .execute(
                    DATABASE,
                    "delete from items where id % 100 = 0;
                     create function tell_mark() returns trigger language plpgsql as
                     $$ begin perform pg_notify('mark', new.id::text); return null; end $$;
                     create trigger tell_mark after insert on mark for each row execute function tell_mark();
                     alter table mark enable always trigger tell_mark;",
                )
                .await?;
            let subscription = format!(
                "create subscription bench connection 'host={directory} port={port} dbname={DATABASE} user=postgres' \
                 publication bench \
                 with (slot_name = {}, origin = none, streaming = on, copy_data = false, enabled = false)",
                server.name()
            );
            // A slot is made outside of a transaction block, so not in a batch.
            server.execute(DATABASE, &subscription).await?;
        }
        Ok(Self { publisher, subscribers, share, batches: 0 })
    }

    /// A batch, applied on both subscribers: `half` says which of them has the extension, `first` whether it goes first.
    async fn pair(&mut self, load: &Load, half: usize, first: bool) -> Result<Pair> {
        let rounds = (load.rounds / self.share).max(1);
        let missing = i64::from(load.missing.map_or(0, |one_of| rounds / one_of));
        self.write(load.statement, rounds).await?;
        let (ours, plain) = (&self.subscribers[half], &self.subscribers[1 - half]);
        let (ours, plain) = if first {
            let ours = self.apply(ours, Some(missing)).await?;
            (ours, self.apply(plain, None).await?)
        } else {
            let plain = self.apply(plain, None).await?;
            (self.apply(ours, Some(missing)).await?, plain)
        };
        Ok(Pair { ours, plain, changes: f64::from(rounds * load.changes), missing })
    }

    /// Writes a batch, between two marks.
    async fn write(&mut self, statement: &str, rounds: u32) -> Result<()> {
        self.batches += 1;
        let session = self.publisher.superuser(DATABASE).await?;
        session.batch_execute("set synchronous_commit = off").await?;
        session.batch_execute(&format!("insert into mark values ({})", -self.batches)).await?;
        session.batch_execute(&format!("do $$ begin for i in 1..{rounds} loop {statement} end loop; end $$")).await?;
        // What is not on disk is not sent, and the first to apply the batch would have to wait for it.
        session.batch_execute("set synchronous_commit = on").await?;
        session.batch_execute(&format!("insert into mark values ({})", self.batches)).await?;
        Ok(())
    }

    /// Has a subscriber apply the batch. `missing`: it has the extension, and will meet so many conflicts.
    async fn apply(&self, server: &Server, missing: Option<i64>) -> Result<Applied> {
        let before = if missing.is_some() { logged(server).await? } else { (0, 0) };
        let mut listener = server.listen("postgres", DATABASE).await?;
        listener.client.batch_execute("listen mark").await?;
        let gate = server.superuser(DATABASE).await?;
        gate.batch_execute("begin; lock table mark in share mode").await?;
        let session = server.superuser(DATABASE).await?;
        session.batch_execute("alter subscription bench enable").await?;
        let worker = self.wait_held(server).await?;
        let mut pids = vec![worker];
        if missing.is_some() {
            let collector = "select pid from pg_stat_activity where backend_type = 'stillebot collector'";
            pids.push(
                wait_until("the collector", PATIENCE, || async {
                    Ok(session.query_opt(collector, &[]).await?.map(|row| row.get(0)))
                })
                .await?,
            );
        }

        let last = self.batches.to_string();
        let used = processor_time(worker)?;
        let let_go: f64 = session.query_one("select extract(epoch from clock_timestamp())::float8", &[]).await?.get(0);
        let began = Instant::now();
        gate.batch_execute("commit").await?;
        let mut memory = 0;
        let took = loop {
            match timeout(GLANCE, listener.notifications.recv()).await {
                Ok(told) if told.as_ref().context("the session ended")?.payload() == last => break began.elapsed(),
                Ok(_) => {}
                Err(_) => {
                    memory = memory.max(pids.iter().copied().map(private_memory).sum());
                    ensure!(began.elapsed() < 4 * PATIENCE, "the batch is not applied:\n{}", server.log_tail(10));
                }
            }
        };
        let processor = processor_time(worker)? - used;
        memory = memory.max(pids.iter().copied().map(private_memory).sum());

        let mut log = None;
        if let Some(missing) = missing {
            // However long that takes: it may not fall into the other server's turn.
            let (recorded, dropped) = loop {
                let now = logged(server).await?;
                memory = memory.max(pids.iter().copied().map(private_memory).sum());
                if now.0 + now.1 >= before.0 + before.1 + missing {
                    break (now.0 - before.0, now.1 - before.1);
                }
                ensure!(began.elapsed() < 4 * PATIENCE, "{now:?} of {missing} are recorded:\n{}", server.log_tail(10));
                sleep(GLANCE).await;
            };
            let ended = "select coalesce(extract(epoch from max(pg_xact_commit_timestamp(xmin)))::float8, $1) \
                         from multihome.log where first_seen >= to_timestamp($1)";
            let ended: f64 = session.query_one(ended, &[&let_go]).await?.get(0);
            log = Some(Logged { recorded, dropped, took: Duration::from_secs_f64((ended - let_go).max(1e-6)) });
        }
        self.disable(server).await?;
        Ok(Applied { took, processor, memory, log })
    }

    /// Waits until the apply worker stands at the batch's first row and the publisher has made ready all that finds room
    /// on the way. Returns the worker's process id.
    async fn wait_held(&self, server: &Server) -> Result<i32> {
        let session = server.superuser(DATABASE).await?;
        let worker =
            "select pid from pg_stat_subscription join pg_stat_activity using (pid) where wait_event_type = 'Lock'";
        let worker = wait_until("the worker to be held", PATIENCE, || async {
            Ok(session.query_opt(worker, &[]).await?.map(|row| row.get(0)))
        })
        .await
        .with_context(|| server.log_tail(10))?;
        let session = self.publisher.superuser(DATABASE).await?;
        let sender =
            "select pid from pg_stat_activity where backend_type = 'walsender' and wait_event ilike 'walsender%'";
        wait_until("the publisher to be ready", PATIENCE, || async {
            Ok(session.query_opt(sender, &[]).await?.map(|_| ()))
        })
        .await?;
        Ok(worker)
    }

    /// Ends apply, once the publisher knows how far it is, so that it need not read all of it again next time.
    async fn disable(&self, server: &Server) -> Result<()> {
        let publisher = self.publisher.superuser(DATABASE).await?;
        let written: String = publisher.query_one("select pg_current_wal_lsn()::text", &[]).await?.get(0);
        let confirmed = format!(
            "select slot_name from pg_replication_slots where slot_name = '{}' and confirmed_flush_lsn >= '{written}'",
            server.name()
        );
        wait_until("the publisher to hear of it", PATIENCE, || async {
            Ok(publisher.query_opt(&confirmed, &[]).await?.map(|_| ()))
        })
        .await?;
        server.execute(DATABASE, "alter subscription bench disable").await?;
        let inactive =
            format!("select slot_name from pg_replication_slots where slot_name = '{}' and not active", server.name());
        wait_until("the worker to end", PATIENCE, || async {
            Ok(publisher.query_opt(&inactive, &[]).await?.map(|_| ()))
        })
        .await
    }

    async fn finish(self) -> Result<()> {
        for server in self.subscribers {
            server.execute(DATABASE, "drop subscription bench").await?;
            server.finish().await?;
        }
        self.publisher.finish().await
    }
}

/// Conflicts that a server has recorded, and dropped.
async fn logged(server: &Server) -> Result<(i64, i64)> {
    let session = server.superuser(DATABASE).await?;
    let row = session.query_one(
        "select (select coalesce(sum(occurrences), 0)::bigint from multihome.log), multihome.dropped()",
        &[],
    );
    let row = row.await?;
    Ok((row.get(0), row.get(1)))
}
