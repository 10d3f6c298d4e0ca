//! `stillebot-agent deinit`: what `init` made is taken away, and the rows stay.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use stillebot_tests::cluster::DATABASE;
use stillebot_tests::{Cluster, Server, Shutdown, wait_until};

use crate::PATIENCE;
use crate::runs::{Run, Started, agent, killed_at};

/// A set of nodes that `init` has made, with a row.
async fn initiated(nodes: usize) -> Result<Cluster> {
    let builder = Cluster::builder().bare().nodes(nodes).config("max_slot_wal_keep_size", "4GB");
    let cluster = if nodes > 2 { builder.direct() } else { builder }.start().await?;
    cluster.expect_log("terminating logical replication worker due to administrator command");
    // Core looks for slots of a copy that is under way, and finds that there is none.
    cluster.expect_log(" 55006 ");
    cluster.node("sikorsky").execute(DATABASE, "insert into stillebot.config values (1, 'kept', '{}')").await?;
    admin(&cluster, "init", &["--yes"]).await?.expect_code(0)?;
    Ok(cluster)
}

/// `init` or `deinit`, by the superuser.
async fn admin(cluster: &Cluster, command: &str, options: &[&str]) -> Result<Run> {
    let words = cluster.as_admin(command, options);
    agent(cluster, &words.iter().map(String::as_str).collect::<Vec<_>>()).await
}

async fn deinit(cluster: &Cluster, options: &[&str]) -> Result<Run> {
    admin(cluster, "deinit", options).await
}

/// What is left of replication on a node: subscriptions, slots, publications, the extension, settings of the database.
async fn left(node: &Server) -> Result<String> {
    node.value(
        DATABASE,
        "select format('%s %s %s %s %s', (select count(*) from pg_subscription), (select count(*) from pg_replication_slots),
                (select count(*) from pg_publication), (select count(*) from pg_extension where extname = 'stillebot'),
                (select count(*) from pg_db_role_setting))",
    )
    .await
}

#[tokio::test]
async fn deinit_takes_away_what_init_made_and_leaves_the_rows() -> Result<()> {
    for nodes in [2, 3] {
        let cluster = initiated(nodes).await?;
        let before = left(cluster.node("gideon")).await?;
        let run = deinit(&cluster, &["--dry-run"]).await?.expect_code(0)?;
        ensure!(run.json["plan"]["steps"].as_array().is_some_and(|steps| !steps.is_empty()), "{run:#?}");
        let refused = deinit(&cluster, &[]).await?.expect_code(1)?;
        ensure!(
            refused.json["error"].as_str().is_some_and(|error| error.contains("nobody can be asked")),
            "{refused:#?}"
        );
        ensure!(left(cluster.node("gideon")).await? == before, "nothing was agreed to");

        deinit(&cluster, &["--yes"]).await?.expect_code(0)?;
        for node in cluster.nodes() {
            ensure!(left(node).await? == "0 0 0 0 0", "{}: {}", node.name(), left(node).await?);
            let kept: i64 = node.value(DATABASE, "select count(*) from stillebot.config").await?;
            ensure!(kept == 1, "{}: {kept} rows", node.name());
            node.execute(DATABASE, "insert into stillebot.config values (2, 'here', '{}')").await?;
        }
        let again = deinit(&cluster, &["--yes"]).await?.expect_code(0)?;
        ensure!(again.json["outcome"] == "nothing_to_do", "{again:#?}");
        // And back again: the rows are the same everywhere.
        admin(&cluster, "init", &["--yes", "--assume-identical"]).await?.expect_code(0)?;
        cluster.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn deinit_takes_back_the_name_that_init_gave_a_server_and_says_which_roles_stay() -> Result<()> {
    let cluster = Cluster::builder().bare().config("stillebot.node", "").start().await?;
    cluster.expect_log("terminating logical replication worker due to administrator command");
    cluster.expect_log(" 55006 ");
    admin(&cluster, "init", &["--yes"]).await?.expect_code(0)?;
    let gideon = cluster.node("gideon");
    let name = "select current_setting('stillebot.node')";
    wait_until("its name to be in force", PATIENCE, || async {
        Ok((gideon.value::<String>(DATABASE, name).await? == "gideon").then_some(()))
    })
    .await?;
    let run = deinit(&cluster, &["--yes"]).await?.expect_code(0)?;
    let stays = run.json["plan"]["stays"].to_string();
    for role in ["stillebot_agent on sikorsky", "replicator on gideon"] {
        ensure!(stays.contains(&format!("role {role}, which --roles would drop")), "{run:#?}");
    }
    let altered = "select count(*) from pg_file_settings where sourcefile like '%auto.conf'";
    for node in cluster.nodes() {
        ensure!(node.value::<i64>(DATABASE, altered).await? == 0, "{} keeps its name", node.name());
    }
    cluster.finish().await
}

#[tokio::test]
async fn deinit_refuses_where_a_node_is_down_or_away_unless_forced_and_says_what_stays() -> Result<()> {
    let cluster = initiated(2).await?;
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    // gideon, back again, asks for a slot that is gone.
    cluster.expect_log(" 42704 ");
    let before = left(sikorsky).await?;
    gideon.execute(DATABASE, "select stillebot_down('work')").await?;
    let run = deinit(&cluster, &["--yes"]).await?.expect_code(1)?;
    ensure!(run.json["error"].as_str().is_some_and(|error| error.contains("gideon is down")), "{run:#?}");
    gideon.execute(DATABASE, "select stillebot_up()").await?;
    gideon.stop(Shutdown::Fast).await?;
    deinit(&cluster, &["--yes"]).await?.expect_code(69)?;
    ensure!(left(sikorsky).await? == before, "nothing was changed");
    let run = deinit(&cluster, &["--yes", "--force"]).await?.expect_code(0)?;
    let stays = run.json["plan"]["stays"].to_string();
    ensure!(stays.contains("slot multihome on gideon"), "{run:#?}");
    ensure!(left(sikorsky).await? == "0 0 0 0 0");
    gideon.start().await?;
    // What stays can be taken away later.
    deinit(&cluster, &["--yes", "--roles"]).await?.expect_code(0)?;
    ensure!(left(gideon).await? == "0 0 0 0 0", "{}", left(gideon).await?);
    let roles = "select count(*) from pg_roles where rolname in ('stillebot_agent', 'replicator')";
    for node in cluster.nodes() {
        ensure!(node.value::<i64>(DATABASE, roles).await? == 0, "roles are left on {}", node.name());
    }
    cluster.finish().await
}

#[tokio::test]
async fn the_extension_and_its_log_can_be_kept() -> Result<()> {
    let cluster = initiated(2).await?;
    deinit(&cluster, &["--yes", "--keep-extension"]).await?.expect_code(0)?;
    for node in cluster.nodes() {
        ensure!(left(node).await? == "0 0 0 1 0", "{}", left(node).await?);
        node.execute(DATABASE, "select * from multihome.conflicts").await?;
        node.execute(DATABASE, "select stillebot_down()").await?;
        node.execute(DATABASE, "select stillebot_up()").await?;
    }
    cluster.finish().await
}

#[tokio::test]
async fn a_deinit_that_is_killed_again_and_again_comes_to_its_end_and_leaves_the_rows() -> Result<()> {
    // A pair that has become a set of three: its subscriptions are renamed, and the slots are called as before.
    let cluster = Cluster::builder().bare().nodes(3).direct().config("max_slot_wal_keep_size", "4GB").start().await?;
    let lost = "connection to client lost";
    for part in ["terminating logical replication worker due to administrator command", " 55006 ", " 42704 ", lost] {
        cluster.expect_log(part);
    }
    cluster.expect_log("requested copy_data with origin = NONE but might copy data that had a different origin");
    cluster.node("sikorsky").execute(DATABASE, "insert into stillebot.config values (1, 'kept', '{}')").await?;
    for nodes in [&["sikorsky", "gideon"][..], &["sikorsky", "gideon", "rodan"]] {
        cluster.agent_knows(nodes)?;
        admin(&cluster, "init", &["--yes"]).await?.expect_code(0)?;
    }
    let words = cluster.as_admin("deinit", &["--yes", "--roles"]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut killed = 0;
    while killed_at(&cluster, &words, 3).await? {
        killed += 1;
        ensure!(killed < 60, "killed so often, deinit makes no headway");
    }
    ensure!(killed > 8, "it was killed only {killed} times");
    for node in cluster.nodes() {
        ensure!(left(node).await? == "0 0 0 0 0", "{}: {}", node.name(), left(node).await?);
        let kept: i64 = node.value(DATABASE, "select count(*) from stillebot.config").await?;
        ensure!(kept == 1, "{}: {kept} rows", node.name());
        node.execute(DATABASE, "insert into stillebot.config values (2, 'here', '{}')").await?;
    }
    cluster.finish().await
}

#[tokio::test]
async fn deinit_takes_away_half_an_init_and_opens_what_that_had_closed() -> Result<()> {
    let cluster = Cluster::builder().bare().config("max_slot_wal_keep_size", "4GB").start().await?;
    cluster.expect_log("terminating logical replication worker due to administrator command");
    cluster.expect_log(" 55006 ");
    cluster.expect_log(" 57014 ");
    cluster.expect_log("connection to client lost");
    let (sikorsky, gideon) = (cluster.node("sikorsky"), cluster.node("gideon"));
    let insert = "insert into stillebot.config select n, 'kept', '{}' from generate_series(1, 40000) n";
    sikorsky.execute(DATABASE, insert).await?;
    let words = cluster.as_admin("init", &["--yes"]);
    let mut init = Started::new(&cluster, &words.iter().map(String::as_str).collect::<Vec<_>>())?;
    wait_until("a copy to be under way", PATIENCE, || async {
        let copying = "select exists (select from pg_subscription_rel where srsubstate <> 'r')";
        Ok(gideon.value::<bool>(DATABASE, copying).await?.then_some(()))
    })
    .await?;
    cluster.link("sikorsky", "gideon").cut().await?;
    init.signal(Signal::SIGKILL)?;
    init.end().await?;
    deinit(&cluster, &["--yes"]).await?.expect_code(0)?;
    for node in cluster.nodes() {
        ensure!(left(node).await? == "0 0 0 0 0", "{}: {}", node.name(), left(node).await?);
        node.execute(DATABASE, "insert into stillebot.config values (0, 'here', '{}')").await?;
    }
    let kept: i64 = sikorsky.value(DATABASE, "select count(*) from stillebot.config").await?;
    ensure!(kept == 40_001, "{kept} rows");
    cluster.finish().await
}
