//! `deinit`: takes away what `init` made, on all nodes, and leaves the rows where they are.
//!
//! `leave.rs` makes the plan out of what is there, so a run that was cut off is gone on with by the next one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::json;

use super::admin::{self, Admin, consent};
use super::progress::Progress;
use super::{Context, Reply, UP_BOUND, unreachable};
use crate::cli::Deinit;
use crate::crew::{Crew, LOOK_BOUND};
use crate::facts;
use crate::failure::{Failure, Kind};
use crate::leave::{self, Plan, Seen, Wish};
use crate::setup::{Action, Standing, Step};
use crate::sql;
use crate::survey;

/// How long one statement may take: some wait for a worker to end.
const STATEMENT_BOUND: Duration = Duration::from_secs(60);

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
    let progress = Progress::new(context.json);
    for (taken, step) in plan.steps.iter().enumerate() {
        progress.say(&format!("[{}/{}] {}: {}", taken + 1, plan.steps.len(), step.node, step.action.text()));
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
        let (mut standing, mut sole) = (Standing::Up, false);
        if survey.about.extension.is_some() {
            let state = facts::state(session, LOOK_BOUND).await?;
            (standing, sole) = (Standing::of(&state), state.sole);
        }
        let mut owned = BTreeMap::new();
        for role in [&config.user, &config.replication.user] {
            if let Some(row) = session.rows(sql::DEINIT_OWNED, &[role], LOOK_BOUND).await?.first() {
                owned.insert(role.clone(), row.get("owned"));
            }
        }
        nodes.insert(node.name.clone(), Seen { survey, standing, sole, owned });
    }
    Ok(nodes)
}

async fn take(context: &Context, crew: &Crew<'_>, step: &Step) -> Result<(), Failure> {
    admin::go_on(context)?;
    let session = crew.session(&step.node)?;
    match &step.action {
        Action::Run { statement } => Ok(session.run(statement, STATEMENT_BOUND).await?),
        Action::DropSlot { slot } => admin::drop_slot(context, session, slot).await,
        Action::Open => Ok(session.rows(sql::UP, &[&false], UP_BOUND).await.map(drop)?),
        action => Err(Failure::new(Kind::Undone, format!("no step of deinit: {}", action.text()))),
    }
}

/// The plan as people read it.
fn describe(plan: &Plan) -> String {
    let stays: String = plan.stays.iter().map(|line| format!("stays: {line}\n")).collect();
    admin::by_node(plan.steps.iter().map(Step::lines)) + &stays
}

fn steps(plan: &Plan) -> Vec<(&str, String)> {
    plan.steps.iter().map(|step| (step.node.as_str(), step.action.text())).collect()
}
