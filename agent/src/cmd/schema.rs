//! `schema diff`: what is not alike on all nodes.
//!
//! Deliberately changes nothing; what differs is `crate::schema`'s to say.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;

use super::{Context, Reply, unreachable};
use crate::failure::{Failure, Kind};
use crate::schema;

/// How long one node may take.
const NODE_BOUND: Duration = Duration::from_secs(20);

/// Runs `schema diff`.
pub async fn diff(context: &Context, ddl: bool) -> Result<Reply, Failure> {
    let nodes = read(context).await?;
    let differences = schema::compare(&nodes);
    let statements = schema::mend(&nodes, &differences);
    let mut text = String::new();
    if differences.is_empty() {
        let names: Vec<&str> = nodes.iter().map(|(name, _)| name.as_str()).collect();
        text = format!("the schemas of {} are alike", names.join(", "));
    }
    for difference in &differences {
        let line = format!("{difference}\n");
        // With the statements, what is for people is a comment.
        text.push_str(&if ddl { line.lines().map(|line| format!("-- {line}\n")).collect() } else { line });
    }
    if ddl {
        for (node, statements) in &statements {
            text.push_str(&format!("\n-- on {node}:\n{}\n", statements.join("\n")));
        }
    }
    let kind = (!differences.is_empty()).then_some(Kind::Undone);
    let differences: Vec<_> = differences.iter().map(schema::Difference::json).collect();
    let json = json!({"command": "schema diff", "outcome": "done", "alike": differences.is_empty(),
        "differences": differences, "ddl": statements});
    Ok(Reply { text, json, kind })
}

/// The schemas of all nodes, in the order of the configuration.
pub async fn read(context: &Context) -> Result<Vec<(String, schema::Schema)>, Failure> {
    let looks = context.config.nodes.iter().map(async |node| {
        let schema = context.visit(node, NODE_BOUND, async |session| schema::read(session, NODE_BOUND).await).await;
        (node.name.clone(), schema)
    });
    let (mut schemas, mut errors) = (Vec::new(), BTreeMap::new());
    for (node, result) in join_all(looks).await {
        match result {
            Ok(schema) => schemas.push((node, schema)),
            Err(error) if error.trouble == crate::node::Trouble::Refused => return Err(error.into()),
            Err(error) => drop(errors.insert(node, error)),
        }
    }
    unreachable(&errors).map_or(Ok(schemas), Err)
}
