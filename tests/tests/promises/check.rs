//! `stillebot-agent check`: each thing that is not as it must be is found, and what is said to mend it does.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stillebot_tests::Cluster;

use crate::runs::agent;

/// A pair about which there is nothing to say.
async fn good_pair() -> Result<Cluster> {
    Cluster::builder().config("max_slot_wal_keep_size", "4GB").start().await
}

/// What `check` finds, but for what is as it should be.
async fn troubles(cluster: &Cluster) -> Result<Vec<Value>> {
    let run = agent(cluster, &["check"]).await?;
    let findings = run.json["findings"].as_array().with_context(|| format!("no findings: {run:#?}"))?;
    let troubles: Vec<Value> = findings.iter().filter(|finding| finding["verdict"] != "ok").cloned().collect();
    let worst = if troubles.iter().any(|finding| finding["verdict"] == "error") { 1 } else { 0 };
    ensure!(run.code == Some(worst), "the exit code is not {worst}: {run:#?}");
    Ok(troubles)
}

#[tokio::test]
async fn a_good_pair_is_all_well() -> Result<()> {
    let cluster = good_pair().await?;
    let found = troubles(&cluster).await?;
    ensure!(found.is_empty(), "{found:#?}");
    cluster.finish().await
}
