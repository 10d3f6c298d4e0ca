//! TEST ME of the operator's notes, answered: what PostgreSQL does, without this project, with each conflict of the notes.
//!
//! Plain servers. What is found here is what docs/conflicts.md says, and what the conflict log and its verbs start from;
//! a test that fails on another version of PostgreSQL is news for that page. How they are resolved by the extension and
//! the agent is proved elsewhere.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Installation, Server, wait_until};
use tokio_postgres::Client;

use crate::PATIENCE;

/// Two plain servers that replicate, and what the tests here do with them.
struct Pair {
    cluster: Cluster,
}

/// What a worker says that is started before its predecessor, which has just failed, is quite gone from this server or
/// from the sender: the launcher hears of an end before the replication origin is free. The next attempt is the usual one.
const EARLY: [&str; 3] = [
    " ERROR:  replication origin with ID",
    " 55006 walsender stillebot multihome ERROR:  replication slot \"multihome\" is active for PID",
    " ERROR:  could not start WAL streaming: ERROR:  replication slot",
];

/// One failed attempt to apply a transaction, as the server log has it.
#[derive(Debug, Clone)]
struct ApplyError {
    /// Seconds since midnight (a run over midnight is not worth more).
    at: f64,
    sqlstate: String,
    message: String,
    detail: String,
    context: String,
}

impl ApplyError {
    /// What `ALTER SUBSCRIPTION .. SKIP` wants.
    fn finish_lsn(&self) -> Result<&str> {
        self.context.split("finished at ").nth(1).context("the context ends with an LSN")
    }

    /// What the transaction did when it failed, and where, by the context.
    fn was(&self, operation: &str, relation: &str) -> bool {
        self.context
            .contains(&format!(r#"during message type "{operation}" for replication target relation "{relation}""#))
    }
}

/// All of them, in order. An attempt that did not get as far as the data is none.
fn apply_errors(node: &Server) -> Vec<ApplyError> {
    let mut errors: Vec<ApplyError> = Vec::new();
    let mut inside = "";
    let mut in_detail = false;
    // The last line may still be being written.
    let log = node.log();
    for line in log.rsplit_once('\n').map_or("", |(whole, _)| whole).lines() {
        // From 17 on it says what kind of worker.
        let kinds = [" logical replication worker ", " logical replication apply worker "];
        if let Some(more) = line.strip_prefix('\t').filter(|_| in_detail)
            && let Some(error) = errors.last_mut()
        {
            error.detail = format!("{}\n{more}", error.detail);
            continue;
        }
        in_detail = false;
        let Some((prefix, rest)) = kinds.iter().find_map(|kind| line.split_once(kind)) else { continue };
        if EARLY.iter().any(|early| line.contains(early)) {
            inside = "";
            continue;
        }
        let words: Vec<_> = prefix.split_whitespace().collect();
        let (Some(time), Some(pid), Some(sqlstate)) = (words.get(1), words.get(3), words.get(4)) else { continue };
        if let Some(message) = rest.strip_prefix("ERROR:  ") {
            let at = seconds(time);
            let (sqlstate, message) = ((*sqlstate).to_owned(), message.to_owned());
            errors.push(ApplyError { at, sqlstate, message, detail: String::new(), context: String::new() });
            inside = pid;
        } else if inside == *pid
            && let Some(error) = errors.last_mut()
        {
            if let Some(detail) = rest.strip_prefix("DETAIL:  ") {
                error.detail = detail.to_owned();
                in_detail = true;
            } else if let Some(context) = rest.strip_prefix("CONTEXT:  ") {
                error.context = context.to_owned();
            }
        }
    }
    errors
}

/// Whether PostgreSQL has words of its own for conflicts, which it logs by itself.
fn tells_conflicts() -> Result<bool> {
    Ok(Installation::get()?.major >= 18)
}

fn seconds(time: &str) -> f64 {
    time.split(':').fold(0.0, |sum, part| sum * 60.0 + part.parse::<f64>().unwrap_or(0.0))
}

/// When apply workers were started.
fn worker_starts(node: &Server) -> Vec<f64> {
    let log = node.log();
    let started = log.lines().filter(|line| line.ends_with(r#"apply worker for subscription "multihome" has started"#));
    started.filter_map(|line| line.split_whitespace().nth(1)).map(seconds).collect()
}

/// The first attempt that failed over that key. The detail of a unique violation names the key: `(id)=(1)`.
async fn wait_unique_violation(node: &Server, constraint: &str, key: &str) -> Result<ApplyError> {
    let detail = format!("Key {key} already exists.");
    let message = format!(r#"duplicate key value violates unique constraint "{constraint}""#);
    // From 18 on it is a conflict, of a type, and the detail has the index, the key and both rows.
    let index = format!(r#"Key already exists in unique index "{constraint}", "#);
    let rows = format!("\nKey {key}; existing local row ");
    let is_it = |error: &ApplyError| {
        error.detail == detail && error.message == message
            || error.message.starts_with("conflict detected on relation ")
                && error.detail.contains(&index)
                && error.detail.contains(&rows)
    };
    let error = wait_until(&format!("a violation of {constraint} by {key} on {}", node.name()), PATIENCE, || async {
        Ok(apply_errors(node).into_iter().find(|error| is_it(error) && !error.context.is_empty()))
    })
    .await?;
    ensure!(error.sqlstate == "23505", "{error:?}");
    Ok(error)
}

/// Waits for so many attempts after those that the log has now.
async fn wait_more_errors(node: &Server, more: usize) -> Result<()> {
    let before = apply_errors(node).len();
    wait_until(&format!("{more} more failures on {}", node.name()), PATIENCE, || async {
        Ok((apply_errors(node).len() >= before + more).then_some(()))
    })
    .await
}

/// How an upsert of the bot looks, and a save and a rollback of a command.
fn upsert(twitchid: i64, value: &str) -> String {
    format!(
        "insert into stillebot.config values ({twitchid}, 'k', '\"{value}\"') \
         on conflict (twitchid, keyword) do update set data = excluded.data;"
    )
}

fn save(name: &str, content: &str) -> String {
    format!(
        "update stillebot.commands set active = false where twitchid = 1 and cmdname = '{name}' and active;
         insert into stillebot.commands (twitchid, cmdname, active, content) values (1, '{name}', true, '\"{content}\"');"
    )
}

fn roll_back(name: &str, content: &str) -> String {
    format!(
        "update stillebot.commands set active = false where twitchid = 1 and cmdname = '{name}' and active;
         update stillebot.commands set active = true where twitchid = 1 and cmdname = '{name}' and content = '\"{content}\"';"
    )
}

fn deactivate(name: &str) -> String {
    format!("update stillebot.commands set active = false where twitchid = 1 and cmdname = '{name}' and active;")
}

/// The contents of a command's rows, the active one with a star, in the order they were created.
async fn versions(node: &Server, name: &str) -> Result<String> {
    let query = format!(
        "select coalesce(string_agg((content #>> '{{}}') || case when active then '*' else '' end, ' ' \
                                    order by created, content #>> '{{}}'), '') \
         from stillebot.commands where cmdname = '{name}'"
    );
    node.value(DATABASE, &query).await
}

/// What a config row holds, `-` if it is not there.
async fn config(node: &Server, twitchid: i64) -> Result<String> {
    let query = format!(
        "select coalesce((select data #>> '{{}}' from stillebot.config where twitchid = {twitchid} and keyword = 'k'), '-')"
    );
    node.value(DATABASE, &query).await
}

impl Pair {
    async fn start() -> Result<Self> {
        let cluster = Cluster::builder().without_extension().start().await?;
        EARLY.iter().for_each(|&early| cluster.expect_log(early));
        Ok(Self { cluster })
    }

    fn sikorsky(&self) -> &Server {
        self.cluster.node("sikorsky")
    }

    fn gideon(&self) -> &Server {
        self.cluster.node("gideon")
    }

    fn nodes(&self) -> &[Server] {
        self.cluster.nodes()
    }

    /// Allows exactly this error of an apply worker; from 18 on its first line names the table only.
    fn expect_violation(&self, constraint: &str) {
        self.cluster
            .expect_log(format!(r#"worker ERROR:  duplicate key value violates unique constraint "{constraint}""#));
        let table = constraint.split('_').next().unwrap_or(constraint);
        self.cluster.expect_log(format!(r#"worker ERROR:  conflict detected on relation "stillebot.{table}": "#));
    }

    /// The notes' second way: disable replication, make the changes, enable it again. In between, what each side has to
    /// send is looked up; see [`Pair::stream`].
    async fn apart(&self, on_sikorsky: &str, on_gideon: &str) -> Result<(String, String)> {
        for node in self.nodes() {
            node.execute(DATABASE, "alter subscription multihome disable").await?;
        }
        for node in self.nodes() {
            wait_until("the slot to be free", PATIENCE, || async {
                let active = "select bool_or(active) from pg_replication_slots";
                Ok((!node.value::<bool>(DATABASE, active).await?).then_some(()))
            })
            .await?;
        }
        // A batch is a transaction.
        self.sikorsky().execute(DATABASE, on_sikorsky).await?;
        self.gideon().execute(DATABASE, on_gideon).await?;
        let streams = (self.stream(self.sikorsky()).await?, self.stream(self.gideon()).await?);
        for node in self.nodes() {
            node.execute(DATABASE, "alter subscription multihome enable").await?;
        }
        Ok(streams)
    }

    /// The messages that a node has for its subscriber, a letter each: `B`egin, `I`nsert, `U`pdate, `D`elete, `C`ommit. Without
    /// the descriptions of relations.
    async fn stream(&self, node: &Server) -> Result<String> {
        node.value(
            DATABASE,
            "select coalesce(string_agg(chr(get_byte(data, 0)), ''), '') \
             from pg_logical_slot_peek_binary_changes('multihome', null, null, 'proto_version', '4', \
                                                      'publication_names', 'multihome', 'origin', 'none') \
             where chr(get_byte(data, 0)) <> 'R'",
        )
        .await
    }

    /// Both have what the other one has, and the same.
    async fn converged(&self) -> Result<()> {
        self.cluster.wait_replicated().await?;
        self.cluster.assert_identical().await
    }

    /// The error on each node, both over the same key.
    async fn wait_both(&self, constraint: &str, key: &str) -> Result<[ApplyError; 2]> {
        Ok([
            wait_unique_violation(self.sikorsky(), constraint, key).await?,
            wait_unique_violation(self.gideon(), constraint, key).await?,
        ])
    }

    async fn finish(self) -> Result<()> {
        self.cluster.finish().await
    }
}

/// The apply worker, waiting for a session: its wait event and whom it waits for.
async fn wait_apply_blocked(node: &Server) -> Result<(String, i32)> {
    let client = node.superuser(DATABASE).await?;
    wait_until(&format!("apply on {} to wait for a session", node.name()), PATIENCE, || async {
        let found = client
            .query_opt(
                "select a.wait_event_type || ':' || a.wait_event, (pg_blocking_pids(a.pid))[1] \
                 from pg_stat_subscription s join pg_stat_activity a on a.pid = s.pid \
                 where s.relid is null and cardinality(pg_blocking_pids(a.pid)) > 0",
                &[],
            )
            .await?;
        Ok(found.map(|row| (row.get(0), row.get(1))))
    })
    .await
}

async fn backend_pid(client: &Client) -> Result<i32> {
    Ok(client.query_one("select pg_backend_pid()", &[]).await?.get(0))
}

// The conflicts of the notes

#[tokio::test]
async fn serial_keys_taken_twice_stop_both_sides_until_each_moves_its_own_row_away() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("tickets_pkey");
    for node in pair.nodes() {
        node.execute(DATABASE, "create table stillebot.tickets (id serial primary key, body text)").await?;
    }
    for node in pair.nodes() {
        node.execute(DATABASE, "alter subscription multihome refresh publication with (copy_data = false)").await?;
    }
    let ticket = |node: &Server| format!("insert into stillebot.tickets (body) values ('{}')", node.name());
    let tickets = "select coalesce(string_agg(id || ' ' || body, ', ' order by id), '') from stillebot.tickets";

    // Sequences are not replicated: both take 1.
    let streams = pair.apart(&ticket(sikorsky), &ticket(gideon)).await?;
    ensure!(streams == ("BIC".to_owned(), "BIC".to_owned()), "{streams:?}");
    for error in pair.wait_both("tickets_pkey", "(id)=(1)").await? {
        ensure!(error.was("INSERT", "stillebot.tickets"), "{error:?}");
    }
    // What comes later waits behind it.
    sikorsky.execute(DATABASE, &upsert(1, "later")).await?;
    wait_more_errors(gideon, 2).await?;
    ensure!(config(gideon, 1).await? == "-");
    // Moving one's own row away makes room, and follows the insert that it is about. So neither is lost.
    sikorsky.execute(DATABASE, "update stillebot.tickets set id = 1001 where id = 1").await?;
    wait_until("sikorsky to have both", PATIENCE, || async {
        Ok((sikorsky.value::<String>(DATABASE, tickets).await? == "1 gideon, 1001 sikorsky").then_some(()))
    })
    .await?;
    ensure!(gideon.value::<String>(DATABASE, tickets).await? == "1 gideon", "gideon cannot apply anything yet");
    gideon.execute(DATABASE, "update stillebot.tickets set id = 1002 where id = 1").await?;
    pair.converged().await?;
    ensure!(gideon.value::<String>(DATABASE, tickets).await? == "1001 sikorsky, 1002 gideon");

    // Deleting it makes room, too, but the delete is replicated, and deletes what took its place.
    pair.apart(&ticket(sikorsky), &ticket(gideon)).await?;
    pair.wait_both("tickets_pkey", "(id)=(2)").await?;
    sikorsky.execute(DATABASE, "delete from stillebot.tickets where id = 2").await?;
    wait_until("gideon's row on sikorsky", PATIENCE, || async {
        Ok((sikorsky.value::<String>(DATABASE, tickets).await?.starts_with("2 gideon,")).then_some(()))
    })
    .await?;
    gideon.execute(DATABASE, "delete from stillebot.tickets where id = 2").await?;
    pair.converged().await?;
    ensure!(gideon.value::<String>(DATABASE, tickets).await? == "1001 sikorsky, 1002 gideon", "both are lost");
    pair.finish().await
}

#[tokio::test]
async fn a_command_saved_on_both_sides_at_once_stops_both_and_the_notes_procedure_mends_it_if_it_waits() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("commands_active");
    sikorsky.execute(DATABASE, &save("hi", "old")).await?;
    pair.converged().await?;

    let streams = pair.apart(&save("hi", "from sikorsky"), &save("hi", "from gideon")).await?;
    // The exact tuple change: one row updated, one inserted, whatever the searched update would find over there.
    ensure!(streams == ("BUIC".to_owned(), "BUIC".to_owned()), "{streams:?}");
    for error in pair.wait_both("commands_active", "(twitchid, cmdname)=(1, hi)").await? {
        // The update of the old row went through, the insert did not.
        ensure!(error.was("INSERT", "stillebot.commands"), "{error:?}");
    }
    ensure!(versions(sikorsky, "hi").await? == "old from sikorsky*");
    ensure!(versions(gideon, "hi").await? == "old from gideon*");

    // On each database: deactivate the active one. Activating the winner at once fills the place again.
    let client = sikorsky.superuser(DATABASE).await?;
    client.batch_execute(&deactivate("hi")).await?;
    let missing = "update stillebot.commands set active = true where content = '\"from gideon\"'";
    ensure!(client.execute(missing, &[]).await? == 0, "the other version has not come in");
    client.batch_execute("update stillebot.commands set active = true where content = '\"from sikorsky\"'").await?;
    wait_more_errors(sikorsky, 1).await?;
    client.batch_execute(&deactivate("hi")).await?;
    gideon.execute(DATABASE, &deactivate("hi")).await?;
    // When both have applied everything there is nothing active on either side, and the winner is on both.
    pair.converged().await?;
    ensure!(versions(sikorsky, "hi").await? == "old from sikorsky from gideon");
    ensure!(client.execute(missing, &[]).await? == 1);
    pair.converged().await?;
    ensure!(versions(gideon, "hi").await? == "old from sikorsky from gideon*");
    pair.finish().await
}

#[tokio::test]
async fn rollbacks_of_a_command_on_both_sides_at_once_stop_both_unless_they_chose_the_same_row() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("commands_active");
    for name in ["same", "both", "mixed"] {
        for content in ["one", "two", "three"] {
            sikorsky.execute(DATABASE, &save(name, content)).await?;
        }
    }
    pair.converged().await?;

    // The same row: two updates each that change nothing where they arrive.
    let streams = pair.apart(&roll_back("same", "one"), &roll_back("same", "one")).await?;
    ensure!(streams == ("BUUC".to_owned(), "BUUC".to_owned()), "{streams:?}");
    pair.converged().await?;
    ensure!(versions(gideon, "same").await? == "one* two three");

    // Different rows: the update that activates the other one fails.
    pair.apart(&roll_back("both", "one"), &roll_back("both", "two")).await?;
    for error in pair.wait_both("commands_active", "(twitchid, cmdname)=(1, both)").await? {
        ensure!(error.was("UPDATE", "stillebot.commands"), "{error:?}");
    }
    ensure!(versions(sikorsky, "both").await? == "one* two three");
    ensure!(versions(gideon, "both").await? == "one two* three");
    for node in pair.nodes() {
        node.execute(DATABASE, &deactivate("both")).await?;
    }
    pair.converged().await?;
    ensure!(versions(gideon, "both").await? == "one two three");
    // The one of the two that was originally newer.
    gideon.execute(DATABASE, &roll_back("both", "two")).await?;
    pair.converged().await?;
    ensure!(versions(sikorsky, "both").await? == "one two* three");

    // A rollback against a save: each end fails over the other's kind of change.
    pair.apart(&roll_back("mixed", "one"), &save("mixed", "four")).await?;
    let [on_sikorsky, on_gideon] = pair.wait_both("commands_active", "(twitchid, cmdname)=(1, mixed)").await?;
    ensure!(on_sikorsky.was("INSERT", "stillebot.commands"), "{on_sikorsky:?}");
    ensure!(on_gideon.was("UPDATE", "stillebot.commands"), "{on_gideon:?}");
    for node in pair.nodes() {
        node.execute(DATABASE, &deactivate("mixed")).await?;
    }
    pair.converged().await?;
    pair.finish().await
}

#[tokio::test]
async fn upserts_of_a_new_row_on_both_sides_stop_both_because_what_travels_is_the_insert() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("config_pkey");
    let key = |id| format!("(twitchid, keyword)=({id}, k)");

    let streams = pair.apart(&upsert(1, "s"), &upsert(1, "g")).await?;
    ensure!(streams == ("BIC".to_owned(), "BIC".to_owned()), "{streams:?}");
    for error in pair.wait_both("config_pkey", &key(1)).await? {
        ensure!(error.was("INSERT", "stillebot.config"), "{error:?}");
    }
    // Writing the value of the other side does not help: the row is still in the way.
    sikorsky.execute(DATABASE, &upsert(1, "g")).await?;
    wait_more_errors(sikorsky, 1).await?;
    // One side gives way for good, the other one only while the loser's insert and delete pass by.
    sikorsky.execute(DATABASE, "delete from stillebot.config where twitchid = 1").await?;
    gideon.execute(DATABASE, "update stillebot.config set twitchid = -1 where twitchid = 1").await?;
    pair.converged().await?;
    gideon.execute(DATABASE, "update stillebot.config set twitchid = 1 where twitchid = -1").await?;
    pair.converged().await?;
    ensure!(config(sikorsky, 1).await? == "g");

    // The same value on both sides is a conflict as well.
    pair.apart(&upsert(2, "equal"), &upsert(2, "equal")).await?;
    pair.wait_both("config_pkey", &key(2)).await?;
    // Skipped on both, and then written once more: an update, which overwrites.
    for node in pair.nodes() {
        let error = wait_unique_violation(node, "config_pkey", &key(2)).await?;
        let skip = format!("alter subscription multihome skip (lsn = '{}')", error.finish_lsn()?);
        node.execute(DATABASE, &skip).await?;
    }
    gideon.execute(DATABASE, &upsert(2, "again")).await?;
    pair.converged().await?;
    ensure!(config(sikorsky, 2).await? == "again");
    pair.finish().await
}

#[tokio::test]
async fn updates_of_one_row_on_both_sides_swap_it_and_no_log_knows() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    sikorsky.execute(DATABASE, &upsert(1, "old")).await?;
    sikorsky.execute(DATABASE, "insert into stillebot.botservice values (1, null, 'old', 'old')").await?;
    pair.converged().await?;

    let streams = pair.apart(&upsert(1, "s"), &upsert(1, "g")).await?;
    ensure!(streams == ("BUC".to_owned(), "BUC".to_owned()), "{streams:?}");
    pair.cluster.wait_replicated().await?;
    ensure!(config(sikorsky, 1).await? == "g" && config(gideon, 1).await? == "s", "each has the other's");

    // It is the row that travels, not the column: each side loses its own change, though they do not overlap.
    pair.apart("update stillebot.botservice set login = 's'", "update stillebot.botservice set display_name = 'g'")
        .await?;
    pair.cluster.wait_replicated().await?;
    let service = "select login || ' ' || display_name from stillebot.botservice";
    ensure!(sikorsky.value::<String>(DATABASE, service).await? == "old g");
    ensure!(gideon.value::<String>(DATABASE, service).await? == "s old");

    // Nobody has noticed, but for a line without consequences from 18 on.
    for node in pair.nodes() {
        let told = node
            .log()
            .contains(r#" LOG:  conflict detected on relation "stillebot.config": conflict=update_origin_differs"#);
        ensure!(told == tells_conflicts()?);
        ensure!(apply_errors(node).is_empty());
        let errors = "select apply_error_count from pg_stat_subscription_stats";
        ensure!(node.value::<i64>(DATABASE, errors).await? == 0);
    }
    pair.cluster.assert_identical().await.expect_err("the nodes differ");

    // Any write of the row makes it equal again, one that changes nothing included.
    sikorsky.execute(DATABASE, "update stillebot.config set data = data").await?;
    gideon.execute(DATABASE, "update stillebot.botservice set login = 's', display_name = 'g'").await?;
    pair.converged().await?;
    ensure!(config(gideon, 1).await? == "g");
    pair.finish().await
}

#[tokio::test]
async fn upsert_against_delete_ends_equal_on_both_sides_and_delete_and_insert_against_delete_does_not() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("config_pkey");
    let delete = |id| format!("delete from stillebot.config where twitchid = {id};");
    let tells = tells_conflicts()?;
    let missing = |node: &Server, operation: &str| {
        let line = match operation.trim_end_matches('d') {
            kind if tells => format!(r#"conflict detected on relation "stillebot.config": conflict={kind}_missing"#),
            _ => format!(r#"did not find row to be {operation} in replication target relation "config""#),
        };
        node.log().matches(&line).count()
    };
    for id in 2..=6 {
        sikorsky.execute(DATABASE, &upsert(id, "old")).await?;
    }
    pair.converged().await?;

    // The row did not exist: a delete that finds nothing is not replicated at all.
    let streams = pair.apart(&upsert(1, "s"), &delete(1)).await?;
    ensure!(streams == ("BIC".to_owned(), String::new()), "{streams:?}");
    pair.converged().await?;
    ensure!(config(gideon, 1).await? == "s");

    // It did: the delete wins on both. The update that comes too late for its row is dropped, before 18 without a line in the log.
    let streams = pair.apart(&upsert(2, "s"), &delete(2)).await?;
    ensure!(streams == ("BUC".to_owned(), "BDC".to_owned()), "{streams:?}");
    pair.converged().await?;
    ensure!(config(gideon, 2).await? == "-");
    let told = usize::from(tells);
    ensure!(missing(gideon, "updated") == told, "below the usual log_min_messages");

    // With it, there is one: on the side of the delete only.
    for node in pair.nodes() {
        node.config(&[("log_min_messages", "debug1")]).await?;
    }
    pair.apart(&upsert(3, "s"), &delete(3)).await?;
    pair.converged().await?;
    ensure!(config(gideon, 3).await? == "-");
    // And, before 17, the connection string.
    if Installation::get()?.major < 17 {
        ensure!(gideon.log().contains(r#"connecting to publisher using connection string "host="#));
    }
    ensure!(missing(gideon, "updated") == told + 1);
    ensure!(missing(sikorsky, "deleted") == 0 && missing(sikorsky, "updated") == 0);

    // Deleted on both sides: one on each.
    pair.apart(&delete(4), &delete(4)).await?;
    pair.converged().await?;
    ensure!(missing(gideon, "deleted") == 1 && missing(sikorsky, "deleted") == 1);

    // Deleted on both sides and set again on one: its delete comes first and finds nothing, the other's finds the new row.
    let streams = pair.apart(&delete(5), &format!("{} {}", delete(5), upsert(5, "g"))).await?;
    ensure!(streams == ("BDC".to_owned(), "BDIC".to_owned()), "{streams:?}");
    pair.cluster.wait_replicated().await?;
    ensure!(config(sikorsky, 5).await? == "g" && config(gideon, 5).await? == "-", "they differ");
    // It gets worse from there: set on the side without the row, it is an insert.
    gideon.execute(DATABASE, &upsert(5, "g again")).await?;
    wait_unique_violation(sikorsky, "config_pkey", "(twitchid, keyword)=(5, k)").await?;
    sikorsky.execute(DATABASE, &delete(5)).await?;
    pair.cluster.wait_replicated().await?;
    ensure!(config(sikorsky, 5).await? == "g again" && config(gideon, 5).await? == "-", "deleted once more");
    // What helps is to do the same where the row is: the delete finds nothing over there, the insert is what is missing.
    sikorsky.execute(DATABASE, &format!("{} {}", delete(5), upsert(5, "whole"))).await?;
    pair.converged().await?;
    ensure!(config(gideon, 5).await? == "whole");

    // An update against a delete and an insert: the update arrives as one of the new row.
    pair.apart(&upsert(6, "s"), &format!("{} {}", delete(6), upsert(6, "g"))).await?;
    pair.cluster.wait_replicated().await?;
    ensure!(config(sikorsky, 6).await? == "g" && config(gideon, 6).await? == "s", "swapped, as with two updates");
    gideon.execute(DATABASE, &upsert(6, "end")).await?;
    pair.converged().await?;
    pair.finish().await
}

#[tokio::test]
async fn a_conflict_can_be_in_one_log_only_and_the_other_direction_goes_on() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("config_pkey");
    // Gideon's row is gone by the time sikorsky's arrives; sikorsky's is there when gideon's insert does.
    for node in pair.nodes() {
        node.execute(DATABASE, "alter subscription multihome disable").await?;
    }
    sikorsky.execute(DATABASE, &upsert(1, "s")).await?;
    gideon.execute(DATABASE, &upsert(1, "g")).await?;
    gideon.execute(DATABASE, "delete from stillebot.config where twitchid = 1").await?;
    for node in pair.nodes() {
        node.execute(DATABASE, "alter subscription multihome enable").await?;
    }
    wait_unique_violation(sikorsky, "config_pkey", "(twitchid, keyword)=(1, k)").await?;
    sikorsky.execute(DATABASE, &upsert(2, "s")).await?;
    pair.cluster.wait_applied("sikorsky", "gideon").await?;
    ensure!(config(gideon, 1).await? == "s" && config(gideon, 2).await? == "s");
    wait_more_errors(sikorsky, 2).await?;
    ensure!(apply_errors(gideon).is_empty(), "gideon's log knows nothing of it");
    // The row out of the way for as long as gideon's insert and delete need.
    sikorsky.execute(DATABASE, "update stillebot.config set twitchid = -1 where twitchid = 1").await?;
    pair.converged().await?;
    sikorsky.execute(DATABASE, "update stillebot.config set twitchid = 1 where twitchid = -1").await?;
    pair.converged().await?;
    ensure!(config(gideon, 1).await? == "s");
    pair.finish().await
}

// The three questions

#[tokio::test]
async fn transactions_open_on_both_ends_make_apply_wait_and_their_end_decides() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("config_pkey");
    pair.expect_violation("commands_active");
    gideon.config(&[("log_lock_waits", "on"), ("deadlock_timeout", "100ms")]).await?;
    for id in [3, 4] {
        sikorsky.execute(DATABASE, &upsert(id, "old")).await?;
    }
    sikorsky.execute(DATABASE, &save("hi", "old")).await?;
    pair.converged().await?;
    let here = sikorsky.connect("rosuav", DATABASE).await?;
    let there = gideon.connect("rosuav", DATABASE).await?;
    let pid = backend_pid(&there).await?;

    // Both do it, sikorsky commits: what arrives on gideon waits for the transaction that is open there.
    let open = async |on_sikorsky: &str, on_gideon: &str| -> Result<()> {
        here.batch_execute(&format!("begin; {on_sikorsky}")).await?;
        there.batch_execute(&format!("begin; {on_gideon}")).await?;
        here.batch_execute("commit").await?;
        let blocked = wait_apply_blocked(gideon).await?;
        ensure!(blocked == ("Lock:transactionid".to_owned(), pid), "{blocked:?}");
        Ok(())
    };

    // A new row, and gideon rolls back: nothing happened.
    open(&upsert(1, "s"), &upsert(1, "g")).await?;
    sikorsky.execute(DATABASE, &upsert(10, "later")).await?;
    // Everything behind it waits as well, and no error tells.
    wait_until("the wait to be in the log", PATIENCE, || async {
        Ok(gideon.log().contains("still waiting for ShareLock on transaction").then_some(()))
    })
    .await?;
    ensure!(config(gideon, 10).await? == "-");
    let (working, errors) = worker_and_errors(gideon).await?;
    ensure!(working && errors == 0, "the subscription looks well");
    // The sender knows how far it has got, and gives it time: see the next test.
    let behind = "select state = 'streaming' and replay_lsn < pg_current_wal_lsn() from pg_stat_replication";
    ensure!(sikorsky.value::<bool>(DATABASE, behind).await?);
    there.batch_execute("rollback").await?;
    pair.converged().await?;
    ensure!(config(gideon, 1).await? == "s" && config(gideon, 10).await? == "later");

    // A new row, and gideon commits: now both ends fail.
    open(&upsert(2, "s"), &upsert(2, "g")).await?;
    ensure!(apply_errors(gideon).is_empty());
    there.batch_execute("commit").await?;
    pair.wait_both("config_pkey", "(twitchid, keyword)=(2, k)").await?;
    sikorsky.execute(DATABASE, "delete from stillebot.config where twitchid = 2").await?;
    gideon.execute(DATABASE, "update stillebot.config set twitchid = -2 where twitchid = 2").await?;
    pair.converged().await?;
    let after_conflict = apply_errors(gideon).len();

    // An existing row: rolled back, sikorsky's version; committed, a silent swap.
    open(&upsert(3, "s"), &upsert(3, "g")).await?;
    there.batch_execute("rollback").await?;
    pair.converged().await?;
    ensure!(config(gideon, 3).await? == "s");
    open(&upsert(4, "s"), &upsert(4, "g")).await?;
    there.batch_execute("commit").await?;
    pair.cluster.wait_replicated().await?;
    ensure!(config(sikorsky, 4).await? == "g" && config(gideon, 4).await? == "s");
    ensure!(apply_errors(gideon).len() == after_conflict);
    gideon.execute(DATABASE, &upsert(4, "s")).await?;
    pair.converged().await?;

    // A command: apply waits at the row that both deactivate; it goes on, or fails at the insert.
    open(&save("hi", "newer"), &save("hi", "never")).await?;
    there.batch_execute("rollback").await?;
    pair.converged().await?;
    ensure!(versions(gideon, "hi").await? == "old newer*");
    open(&save("hi", "s"), &save("hi", "g")).await?;
    there.batch_execute("commit").await?;
    for error in pair.wait_both("commands_active", "(twitchid, cmdname)=(1, hi)").await? {
        ensure!(error.was("INSERT", "stillebot.commands"), "{error:?}");
    }
    for node in pair.nodes() {
        node.execute(DATABASE, &deactivate("hi")).await?;
    }
    pair.converged().await?;
    pair.finish().await
}

/// What an application sees of the subscription: whether a worker is there, and how many errors there have been.
async fn worker_and_errors(node: &Server) -> Result<(bool, i64)> {
    let client = node.connect("rosuav", DATABASE).await?;
    let row = client
        .query_one(
            "select w.pid is not null, s.apply_error_count \
             from pg_stat_subscription w join pg_stat_subscription_stats s using (subid) where w.relid is null",
            &[],
        )
        .await?;
    Ok((row.get(0), row.get(1)))
}

#[tokio::test]
async fn a_transaction_open_for_longer_than_wal_sender_timeout_costs_the_connection_and_no_data() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    let session = gideon.connect("rosuav", DATABASE).await?;
    session.batch_execute(&format!("begin; {}", upsert(1, "g"))).await?;
    sikorsky.execute(DATABASE, &upsert(1, "s")).await?;
    wait_apply_blocked(gideon).await?;
    // A worker that waits for a lock answers nobody. In life the sender's patience is a minute.
    sikorsky.config(&[("wal_sender_timeout", "500ms")]).await?;
    let sender = "select count(*) from pg_stat_replication";
    wait_until("the sender to give up", PATIENCE, || async {
        Ok((sikorsky.value::<i64>(DATABASE, sender).await? == 0).then_some(()))
    })
    .await?;
    ensure!(sikorsky.log().contains("LOG:  terminating walsender process due to replication timeout"));
    // The worker waits on and knows nothing of it.
    wait_apply_blocked(gideon).await?;
    ensure!(apply_errors(gideon).is_empty());
    sikorsky.config(&[("wal_sender_timeout", "60s")]).await?;
    pair.cluster.expect_log(" ERROR:  could not receive data from WAL stream");
    pair.cluster.expect_log(" ERROR:  could not send data to WAL stream");
    session.batch_execute("rollback").await?;
    pair.converged().await?;
    ensure!(config(gideon, 1).await? == "s");
    let errors = apply_errors(gideon);
    ensure!(errors.len() == 1 && errors[0].sqlstate.starts_with("08"), "{errors:?}");
    pair.finish().await
}

#[tokio::test]
async fn a_deadlock_between_apply_and_a_session_ends_one_of_them_and_apply_tries_again() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    for id in 1..=4 {
        sikorsky.execute(DATABASE, &upsert(id, "old")).await?;
    }
    pair.converged().await?;
    let session = gideon.connect("rosuav", DATABASE).await?;
    gideon.config(&[("log_lock_waits", "on"), ("deadlock_timeout", "200ms")]).await?;

    // The session closes the circle after apply has looked for one: the session finds it and loses.
    session.batch_execute(&format!("begin; {}", upsert(2, "g"))).await?;
    sikorsky.execute(DATABASE, &format!("{} {}", upsert(1, "s"), upsert(2, "s"))).await?;
    wait_apply_blocked(gideon).await?;
    wait_until("apply to have looked for a deadlock", PATIENCE, || async {
        Ok(gideon.log().contains("still waiting for ShareLock on transaction").then_some(()))
    })
    .await?;
    pair.cluster.expect_log(" 40P01 client backend stillebot test ERROR:  deadlock detected");
    let refused = session.batch_execute(&upsert(1, "g")).await.expect_err("a deadlock");
    ensure!(refused.code().map(|code| code.code()) == Some("40P01"), "{refused}");
    session.batch_execute("rollback").await?;
    pair.converged().await?;
    ensure!(config(gideon, 1).await? == "s" && apply_errors(gideon).is_empty());

    // Before: apply finds it, loses, and begins the whole transaction again. No data fault, and nothing is lost.
    gideon.config(&[("deadlock_timeout", "2s")]).await?;
    pair.converged().await?; // The worker has been awake since, and so has read it.
    gideon.execute(DATABASE, "grant set on parameter deadlock_timeout to rosuav").await?;
    session.batch_execute("set deadlock_timeout = '60s'; set statement_timeout = '30s'").await?;
    pair.cluster.expect_log("worker ERROR:  deadlock detected");
    session.batch_execute(&format!("begin; {}", upsert(4, "g"))).await?;
    sikorsky.execute(DATABASE, &format!("{} {}", upsert(3, "s"), upsert(4, "s"))).await?;
    wait_apply_blocked(gideon).await?;
    session.batch_execute(&upsert(3, "g")).await?;
    // Its locks go first, then it says why.
    let errors = wait_until("apply to lose", PATIENCE, || async {
        let errors = apply_errors(gideon);
        Ok((!errors.is_empty() && errors.iter().all(|error| !error.context.is_empty())).then_some(errors))
    })
    .await?;
    ensure!(errors.len() == 1 && errors[0].sqlstate == "40P01", "{errors:?}");
    ensure!(errors[0].was("UPDATE", "stillebot.config"), "{errors:?}");
    session.batch_execute("rollback").await?;
    pair.converged().await?;
    ensure!(config(gideon, 3).await? == "s" && config(gideon, 4).await? == "s");
    pair.finish().await
}

#[tokio::test]
async fn an_application_sees_that_replication_has_failed_and_where_and_an_ordinary_change_mends_it() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("config_pkey");
    let default = "select boot_val || unit from pg_settings where name = 'wal_retrieve_retry_interval'";
    ensure!(gideon.value::<String>(DATABASE, default).await? == "5000ms");
    const INTERVAL: f64 = 1.5;
    for node in pair.nodes() {
        node.config(&[("wal_retrieve_retry_interval", "1500ms")]).await?;
    }
    // One conflict, met by a worker that has been running for longer than that.
    let old = "select bool_and(clock_timestamp() - backend_start > interval '2 s') from pg_stat_activity a \
               join pg_stat_subscription s using (pid)";
    wait_until("an old worker", PATIENCE, || async { Ok(gideon.value::<bool>(DATABASE, old).await?.then_some(())) })
        .await?;
    let held = gideon.connect("rosuav", DATABASE).await?;
    held.batch_execute(&format!("begin; {}", upsert(1, "g"))).await?;
    sikorsky.execute(DATABASE, &format!("insert into stillebot.raids values (1, 2); {}", upsert(1, "s"))).await?;
    wait_apply_blocked(gideon).await?;
    held.batch_execute("commit").await?;
    let error = wait_unique_violation(gideon, "config_pkey", "(twitchid, keyword)=(1, k)").await?;

    // The first repeat comes at once, the others in the interval, counted from start to start of the worker.
    let starts = wait_until("three more attempts", PATIENCE, || async {
        let starts: Vec<_> = worker_starts(gideon).into_iter().filter(|start| *start > error.at).collect();
        Ok((starts.len() >= 3).then_some(starts))
    })
    .await?;
    let gaps: Vec<_> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    println!("tried again {:.3} s after the error, then after {gaps:.3?} s", starts[0] - error.at);
    ensure!(starts[0] - error.at < INTERVAL / 2.0, "{error:?} {starts:?}");
    ensure!(gaps.iter().all(|gap| (INTERVAL * 0.8..INTERVAL + 5.0).contains(gap)), "{gaps:?}");

    // What the bot's own role can see, in SQL, on the node that fails: no worker, and so no positions; a counter.
    let bot = gideon.connect("rosuav", DATABASE).await?;
    wait_until("the signs between two attempts", PATIENCE, || async {
        let row = bot
            .query_one(
                "select c.subenabled and w.pid is null and w.received_lsn is null and w.latest_end_lsn is null, \
                        s.apply_error_count \
                 from pg_subscription c join pg_stat_subscription w on w.subid = c.oid \
                 join pg_stat_subscription_stats s on s.subid = c.oid",
                &[],
            )
            .await?;
        Ok((row.get::<_, bool>(0) && row.get::<_, i64>(1) >= 2).then_some(()))
    })
    .await?;
    // And on the node that sends: nobody takes from the slot, and it stays where it was.
    let sender = sikorsky.connect("rosuav", DATABASE).await?;
    let slot = "select not active and confirmed_flush_lsn < pg_current_wal_lsn() from pg_replication_slots";
    wait_until("the slot to be idle", PATIENCE, || async {
        Ok(sender.query_one(slot, &[]).await?.get::<_, bool>(0).then_some(()))
    })
    .await?;
    // What: relation, operation, xid and finish LSN, and the key. Of the rest of the transaction, nothing.
    ensure!(error.was("INSERT", "stillebot.config"), "{error:?}");
    let said = format!("{error:?}");
    ensure!(!said.contains("raids"), "{said}");
    // The rows themselves from 18 on.
    let rows = [r#"\"s\""#, r#"\"g\""#].map(|value| said.contains(value));
    ensure!(rows == [tells_conflicts()?; 2], "{said}");
    let xid: String = sikorsky.value(DATABASE, "select xmin::text from stillebot.config where twitchid = 1").await?;
    ensure!(error.context.contains(&format!("in transaction {xid}, finished at ")), "{error:?} is {xid}");
    // The slot on the sender still has all of it, for a superuser to look at between two attempts.
    let stream =
        wait_until("a look between two attempts", PATIENCE, || async { pair.stream(sikorsky).await.map(Some) }).await?;
    ensure!(stream == "BIIC", "{stream}");

    // The change that mends it needs no word to replication: the next attempt goes through.
    wait_more_errors(gideon, 1).await?;
    gideon.execute(DATABASE, "delete from stillebot.config where twitchid = 1").await?;
    let mended = std::time::Instant::now();
    pair.cluster.wait_applied("sikorsky", "gideon").await?;
    println!("applied {:.3} s after the change", mended.elapsed().as_secs_f64());
    ensure!(mended.elapsed() < Duration::from_secs_f64(INTERVAL + 5.0));
    ensure!(config(gideon, 1).await? == "s");
    // Sikorsky had the same trouble with gideon's row.
    wait_unique_violation(sikorsky, "config_pkey", "(twitchid, keyword)=(1, k)").await?;
    sikorsky.execute(DATABASE, "update stillebot.config set twitchid = -1 where twitchid = 1").await?;
    pair.converged().await?;
    ensure!(config(gideon, -1).await? == "s");
    pair.finish().await
}

// What PostgreSQL offers

#[tokio::test]
async fn skip_loses_the_whole_transaction_and_the_nodes_differ_in_silence() -> Result<()> {
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("config_pkey");
    pair.cluster.expect_log(" 22023 client backend stillebot harness ERROR:  skip WAL location");
    let transaction = |id, value| format!("insert into stillebot.raids values ({id}, 2); {}", upsert(1, value));
    pair.apart(&transaction(1, "s"), &transaction(2, "g")).await?;
    let errors = pair.wait_both("config_pkey", "(twitchid, keyword)=(1, k)").await?;

    // Not a position that has been applied already.
    let skip = |lsn: &str| format!("alter subscription multihome skip (lsn = '{lsn}')");
    let refused = gideon.execute(DATABASE, &skip("0/1")).await.expect_err("it is too low");
    ensure!(format!("{refused:#}").contains("must be greater than origin LSN"), "{refused:#}");
    // One that no transaction ends at skips nothing, and says nothing.
    gideon.execute(DATABASE, &skip("FFFFFFFF/0")).await?;
    wait_more_errors(gideon, 2).await?;

    for (node, error) in pair.nodes().iter().zip(&errors) {
        node.execute(DATABASE, &skip(error.finish_lsn()?)).await?;
    }
    pair.cluster.wait_replicated().await?;
    for (node, error) in pair.nodes().iter().zip(&errors) {
        let log = node.log();
        for word in ["starts", "completed"] {
            let line = format!("LOG:  logical replication {word} skipping transaction at LSN {}", error.finish_lsn()?);
            ensure!(log.contains(&line), "{line} is not in the log of {}", node.name());
        }
    }
    // The raids were in nobody's way, and are lost all the same.
    let raids = "select string_agg(fromid::text, ' ') from stillebot.raids";
    ensure!(sikorsky.value::<String>(DATABASE, raids).await? == "1");
    ensure!(gideon.value::<String>(DATABASE, raids).await? == "2");
    ensure!(config(sikorsky, 1).await? == "s" && config(gideon, 1).await? == "g");
    let cleared = "select subskiplsn::text from pg_subscription";
    ensure!(gideon.value::<String>(DATABASE, cleared).await? == "0/0", "for one transaction only");
    // A wrong one that is left there goes with the next transaction that is applied.
    pair.cluster.expect_log(r#" WARNING:  skip-LSN of subscription "multihome" cleared"#);
    gideon.execute(DATABASE, &skip("FFFFFFFF/0")).await?;
    sikorsky.execute(DATABASE, &upsert(2, "s")).await?;
    pair.cluster.wait_applied("sikorsky", "gideon").await?;
    ensure!(config(gideon, 2).await? == "s" && gideon.value::<String>(DATABASE, cleared).await? == "0/0");
    ensure!(gideon.log().contains("skip-LSN of subscription"));
    pair.finish().await
}

#[tokio::test]
async fn disable_on_error_stops_at_the_first_error_a_lost_connection_and_a_restart_of_the_peer_included() -> Result<()>
{
    let pair = Pair::start().await?;
    let (sikorsky, gideon) = (pair.sikorsky(), pair.gideon());
    pair.expect_violation("config_pkey");
    gideon.execute(DATABASE, "alter subscription multihome set (disable_on_error = true)").await?;
    let disabled = || {
        wait_until("gideon's subscription to be disabled", PATIENCE, || async {
            let enabled = "select subenabled from pg_subscription";
            Ok((!gideon.value::<bool>(DATABASE, enabled).await?).then_some(()))
        })
    };
    let lines =
        || gideon.log().matches(r#"LOG:  subscription "multihome" has been disabled because of an error"#).count();
    let count = "select apply_error_count from pg_stat_subscription_stats";

    pair.apart(&upsert(1, "s"), &upsert(1, "g")).await?;
    disabled().await?;
    let error = wait_unique_violation(gideon, "config_pkey", "(twitchid, keyword)=(1, k)").await?;
    ensure!(error.was("INSERT", "stillebot.config"), "{error:?}");
    ensure!(lines() == 1 && gideon.value::<i64>(DATABASE, count).await? == 1);
    // The other end tries again and again meanwhile. Here it stays with one error, and what mends it does not enable it.
    wait_more_errors(sikorsky, 2).await?;
    gideon.execute(DATABASE, "update stillebot.config set twitchid = -1 where twitchid = 1").await?;
    ensure!(
        apply_errors(gideon).len() == 1
            && !gideon.value::<bool>(DATABASE, "select subenabled from pg_subscription").await?
    );
    sikorsky.execute(DATABASE, "delete from stillebot.config where twitchid = 1").await?;
    gideon.execute(DATABASE, "alter subscription multihome enable").await?;
    pair.converged().await?;
    ensure!(config(sikorsky, -1).await? == "g");

    // Nothing is wrong with any data, the link is away for a moment: disabled all the same, and for good.
    let link = pair.cluster.link("sikorsky", "gideon");
    link.cut().await?;
    disabled().await?;
    link.heal().await?;
    ensure!(lines() == 2);
    let error = apply_errors(gideon).pop().context("an error")?;
    ensure!(error.sqlstate.starts_with("08"), "{error:?}");
    ensure!(gideon.value::<i64>(DATABASE, count).await? == 2, "the counter does not tell them apart");
    gideon.execute(DATABASE, "alter subscription multihome enable").await?;
    pair.converged().await?;

    // So does a clean restart of the other server.
    sikorsky.restart().await?;
    disabled().await?;
    ensure!(lines() == 3);
    gideon.execute(DATABASE, "alter subscription multihome enable").await?;
    pair.converged().await?;
    pair.finish().await
}
