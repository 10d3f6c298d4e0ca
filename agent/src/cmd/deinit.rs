//! `deinit`: takes away what `init` made, on all nodes, and leaves the rows where they are.
//!
//! `leave.rs` makes the plan out of what is there, so a run that was cut off is gone on with by the next one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::json;

use super::admin::{self, Admin, Halt, consent, wait};
use super::{Context, Reply, unreachable};
use crate::cli::Deinit;
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts;
use crate::failure::{Failure, Kind};
use crate::leave::{self, Action, Plan, Seen, Step, Wish};
use crate::sql;
use crate::survey;

/// How long one statement may take: some wait for a worker to end.
const STATEMENT_BOUND: Duration = Duration::from_secs(60);
/// How long a slot may be in use by a sender whose receiver is gone.
const SLOT_BOUND: Duration = Duration::from_secs(15);

/// Runs it.
pub async fn run(context: &Context, options: &Deinit) -> Result<Reply, Failure> {
    let admin = Admin::new(context, &options.admin)?;
    let (crew, errors) = admin.muster().await?;
    if let Some(failure) = unreachable(&errors).filter(|_| !options.force && !options.dry_run) {
        return Err(failure.hint("mend that, or leave that node as it is with --force"));
    }
    if !options.dry_run {
        crew.lock().await?;
    }
    let nodes = look(context, &crew).await?;
    let down = leave::down(&nodes);
    if !down.is_empty() {
        let message = format!("{} is down, and refuses to be changed; nothing was changed", down.join(", "));
        return Err(Failure::new(Kind::Undone, message).hint("bring it up, with `up NODE`, and run deinit again"));
    }
    let plan =
        leave::plan(&context.config, &nodes, Wish { keep_extension: options.keep_extension, roles: options.roles });
    let mut text = describe(&plan);
    for error in errors.values() {
        let _ = writeln!(text, "cannot reach {error}");
    }
    let document = |outcome: &str| json!({"command": "deinit", "outcome": outcome, "plan": plan});
    if options.dry_run {
        let kind = (!errors.is_empty()).then_some(Kind::Unreachable);
        return Ok(Reply { text, json: document("dry_run"), kind });
    }
    if plan.steps.is_empty() {
        return Ok(Reply::done(format!("nothing to do\n{text}"), document("nothing_to_do")));
    }
    consent(context, &text, options.yes)?;
    for (taken, step) in plan.steps.iter().enumerate() {
        take(context, &crew, step).await.map_err(|failure| {
            let mut failure = admin::cut_off(failure, "deinit", &steps(&plan), taken, None);
            failure.report.insert("plan".into(), json!(plan));
            failure
        })?;
    }
    let stays: String = plan.stays.iter().map(|line| format!("stays: {line}\n")).collect();
    Ok(Reply::done(
        format!("the nodes do not replicate any more; their rows are as they were\n{stays}"),
        document("done"),
    ))
}

async fn look(context: &Context, crew: &Crew<'_>) -> Result<BTreeMap<String, Seen>, Failure> {
    let config = &context.config;
    let mut nodes = BTreeMap::new();
    for node in config.nodes.iter().filter(|node| crew.names().contains(&node.name)) {
        let session = crew.session(&node.name)?;
        let survey = survey::take(session, config, node, LOOK_BOUND).await?;
        let (mut up, mut sole) = (true, false);
        if survey.about.extension.is_some() {
            let state = facts::state(session, LOOK_BOUND).await?;
            (up, sole) = (state.is_up(), state.sole);
        }
        let mut owned = BTreeMap::new();
        for role in [&config.user, &config.replication.user] {
            if let Some(row) = session.rows(sql::DEINIT_OWNED, &[role], LOOK_BOUND).await?.first() {
                owned.insert(role.clone(), row.get("owned"));
            }
        }
        nodes.insert(node.name.clone(), Seen { survey, up, sole, owned });
    }
    Ok(nodes)
}

async fn take(context: &Context, crew: &Crew<'_>, step: &Step) -> Result<(), Failure> {
    admin::go_on(context)?;
    let session = crew.session(&step.node)?;
    match &step.action {
        Action::Run { statement } => Ok(session.run(statement, STATEMENT_BOUND).await?),
        Action::DropSlot { slot } => {
            let gone = wait(context, SLOT_BOUND, async || {
                let row = session.row(sql::DEINIT_SLOT, &[slot], LOOK_BOUND).await?;
                Ok(row.get::<_, bool>("gone").then_some(()))
            });
            gone.await.map_err(|halt| match halt {
                Halt::Late => {
                    let message = format!("{}: slot {slot} is still in use", step.node);
                    Failure::new(Kind::Undone, message).hint("see who reads it in pg_replication_slots")
                }
                Halt::Signal(signal) => admin::stopped(signal),
                Halt::Node(error) => error.into(),
            })
        }
    }
}

/// The plan as people read it.
fn describe(plan: &Plan) -> String {
    let stays: String = plan.stays.iter().map(|line| format!("stays: {line}\n")).collect();
    admin::by_node(steps(plan)) + &stays
}

fn steps(plan: &Plan) -> Vec<(&str, String)> {
    plan.steps.iter().map(|step| (step.node.as_str(), step.action.text())).collect()
}
