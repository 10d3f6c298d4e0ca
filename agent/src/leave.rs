//! From what the nodes are to databases that do not replicate: the steps of `deinit`, in order. Pure.
//!
//! First every subscription on every node is disabled: whatever is cut off, no node goes on receiving from one that does not receive any
//! more. Then the slots go, while the subscriptions still say which; then the rest. Deliberately drops no slot through a
//! subscription's own connection, which may lead nowhere: slots are dropped where they are.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::config::Config;
use crate::quote::name;
use crate::setup::{Action, Standing, Step, is_ours, run, step};
use crate::survey::{Subscription, Survey};

/// One node before `deinit`.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// What it tells.
    pub survey: Survey,
    /// Whether it takes writes. Without the extension every database does.
    pub standing: Standing,
    /// It is recorded as the only one that does.
    pub sole: bool,
    /// How many things each role owns that `init` made; those that are there.
    pub owned: BTreeMap<String, i64>,
}

/// What the operator says.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish {
    /// The extension stays, with its log.
    pub keep_extension: bool,
    /// Roles go too.
    pub roles: bool,
}

/// All steps, and what stays although it was to go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// In order.
    pub steps: Vec<Step>,
    /// What stays, and why.
    pub stays: Vec<String>,
}

/// The nodes that somebody has taken down: nothing can be taken away from them. One that `init` has closed is opened on the way.
pub fn down(nodes: &BTreeMap<String, Seen>) -> Vec<&str> {
    nodes.iter().filter(|(_, seen)| seen.standing == Standing::Down).map(|(node, _)| node.as_str()).collect()
}

/// The steps, for the nodes that could be asked.
pub fn plan(config: &Config, nodes: &BTreeMap<String, Seen>, wish: Wish) -> Plan {
    let mut plan = Plan::default();
    // In the order of the configuration, as everything is.
    let names = || config.nodes.iter().map(|node| node.name.as_str());
    let there = || names().filter_map(|node| nodes.get(node).map(|seen| (node, seen)));
    let ours = |seen: &'_ Seen| -> Vec<Subscription> {
        seen.survey.subscriptions.iter().filter(|found| is_ours(config, found)).cloned().collect()
    };
    // Slots are in use by these names on the peers; or were made by these names, whatever became of their readers.
    let mut slots: BTreeSet<(String, String)> = BTreeSet::new();
    for (node, seen) in there() {
        for found in ours(seen) {
            if found.enabled {
                let why = "nobody is to go on receiving from a node that does not receive any more";
                plan.steps.push(run(node, format!("alter subscription {} disable", name(&found.name)), why));
            }
            let publisher = config.source_of(node, &found.name).map(|publisher| publisher.name.clone());
            slots.extend(publisher.zip(found.slot));
        }
        let peers = config.peers(node).map(|peer| config.slot(node, &peer.name));
        slots.extend(peers.map(|slot| (node.to_owned(), slot)));
    }
    for (publisher, slot) in slots {
        match nodes.get(&publisher) {
            Some(seen) if seen.survey.slots.iter().any(|found| found.here && found.name == slot) => {
                let why = "unread, it would keep WAL until the disk is full";
                plan.steps.push(step(&publisher, Action::DropSlot { slot }, why));
            }
            Some(_) => {}
            None => plan.stays.push(format!(
                "slot {slot} on {publisher}, which cannot be reached and keeps WAL for it: there, select pg_drop_replication_slot('{slot}')"
            )),
        }
    }
    for (node, seen) in there() {
        for found in ours(seen) {
            let subscription = name(&found.name);
            if found.slot.is_some() {
                let why = "its slot is gone, or cannot be reached";
                plan.steps.push(run(node, format!("alter subscription {subscription} set (slot_name = none)"), why));
            }
            plan.steps.push(run(node, format!("drop subscription {subscription}"), "it receives nothing any more"));
        }
    }
    for (node, seen) in there() {
        if seen.standing == Standing::Parked {
            plan.steps.push(step(node, Action::Open, "init had taken it down, and has nothing left to wait for"));
        } else if seen.sole && seen.survey.about.extension.is_some() {
            plan.steps.push(step(node, Action::Open, "alone it trusts its memory again"));
        }
        if seen.survey.publications.iter().any(|found| found.name == config.publication) {
            plan.steps.push(run(
                node,
                format!("drop publication {}", name(&config.publication)),
                "nobody subscribes to it",
            ));
        }
        if seen.survey.about.extension.is_some() && !wish.keep_extension {
            let why = "the state, the log and the identity of the node go with it";
            plan.steps.push(run(node, "drop extension stillebot", why));
        } else if seen.survey.identity.is_some() {
            plan.steps.push(run(node, "select multihome.forget_identity()", "it belongs to no set of nodes any more"));
        }
        if seen.survey.settings.get("stillebot.node").is_some_and(|setting| setting.altered) {
            plan.steps.push(run(
                node,
                "alter system reset stillebot.node",
                "it was given its name by ALTER SYSTEM, as init does",
            ));
            plan.steps.push(run(node, "select pg_catalog.pg_reload_conf()", "so that this is in force"));
        }
        for (role, owned) in &seen.owned {
            if !wish.roles {
                plan.stays.push(format!("role {role} on {node}, which --roles would drop"));
            } else if *owned > 0 {
                plan.stays.push(format!("role {role} on {node}, which owns {owned} things"));
            } else {
                plan.steps.push(run(
                    node,
                    format!("drop owned by {}", name(role)),
                    "of a role that owns nothing, its privileges",
                ));
                plan.steps.push(run(node, format!("drop role {}", name(role)), "nobody connects as it any more"));
            }
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;
    use crate::survey::{About, Identity, Publication, Slot, Subscription};

    fn config(nodes: usize) -> Config {
        let mut text = String::from("user = 'agent'\ndatabase = 'd'\n");
        for node in ["a", "b", "c"].iter().take(nodes) {
            text += &format!("[[node]]\nname = '{node}'\nhost = '{node}'\n");
        }
        Config::parse(&text, &Environment { variable: &|_| None, os_user: None }).unwrap()
    }

    fn seen(config: &Config, node: &str) -> Seen {
        let peers = || config.peers(node);
        let subscription = |peer: &crate::config::Node| Subscription {
            name: config.subscription_to(&peer.name),
            enabled: true,
            slot: Some(config.slot(&peer.name, node)),
            publications: vec![config.publication.clone()],
            ..Subscription::default()
        };
        let slot =
            |peer: &crate::config::Node| Slot { name: config.slot(node, &peer.name), here: true, ..Slot::default() };
        let survey = Survey {
            about: About { extension: Some("0.6.0".into()), ..About::default() },
            subscriptions: peers().map(subscription).collect(),
            slots: peers().map(slot).collect(),
            publications: vec![Publication { name: config.publication.clone(), ..Publication::default() }],
            identity: Some(Identity::default()),
            ..Survey::default()
        };
        let owned = BTreeMap::from([("agent".to_owned(), 0), ("replicator".to_owned(), 3)]);
        Seen { survey, standing: Standing::Up, sole: false, owned }
    }

    fn lines(plan: &Plan) -> Vec<String> {
        plan.steps.iter().map(|step| format!("{}: {}", step.node, step.action.text())).collect()
    }

    #[test]
    fn subscriptions_rest_before_slots_go_and_slots_go_before_what_names_them() {
        let config = config(2);
        let nodes = ["a", "b"].map(|node| (node.to_owned(), seen(&config, node))).into();
        let plan = plan(&config, &nodes, Wish::default());
        assert_eq!(
            lines(&plan),
            [
                "a: alter subscription multihome disable;",
                "b: alter subscription multihome disable;",
                "a: select pg_drop_replication_slot('multihome');",
                "b: select pg_drop_replication_slot('multihome');",
                "a: alter subscription multihome set (slot_name = none);",
                "a: drop subscription multihome;",
                "b: alter subscription multihome set (slot_name = none);",
                "b: drop subscription multihome;",
                "a: drop publication multihome;",
                "a: drop extension stillebot;",
                "b: drop publication multihome;",
                "b: drop extension stillebot;",
            ]
        );
        let stay = ["agent on a", "replicator on a", "agent on b", "replicator on b"];
        assert_eq!(plan.stays, stay.map(|role| format!("role {role}, which --roles would drop")));
    }

    #[test]
    fn a_name_that_was_given_by_alter_system_goes_too() {
        let config = config(2);
        let mut nodes: BTreeMap<String, Seen> = ["a", "b"].map(|node| (node.to_owned(), seen(&config, node))).into();
        let setting = crate::survey::Setting { altered: true, ..Default::default() };
        nodes.get_mut("b").unwrap().survey.settings.insert("stillebot.node".into(), setting);
        let plan = plan(&config, &nodes, Wish::default());
        let lines: Vec<String> = lines(&plan).into_iter().filter(|line| line.contains("stillebot.node")).collect();
        assert_eq!(lines, ["b: alter system reset stillebot.node;"]);
    }

    #[test]
    fn what_cannot_go_is_said() {
        let config = config(3);
        let nodes = ["a", "b"].map(|node| (node.to_owned(), seen(&config, node))).into();
        let plan = plan(&config, &nodes, Wish { keep_extension: true, roles: true });
        let lines = lines(&plan);
        assert!(lines.contains(&"a: select multihome.forget_identity();".to_owned()));
        assert!(
            lines.contains(&"b: drop role agent;".to_owned())
                && !lines.iter().any(|line| line.contains("role replicator"))
        );
        assert!(plan.stays.iter().any(|line| line.starts_with("slot multihome_c_a on c")), "{:?}", plan.stays);
        assert!(plan.stays.contains(&"role replicator on b, which owns 3 things".to_owned()), "{:?}", plan.stays);
    }

    #[test]
    fn there_is_nothing_to_do_where_nothing_is_and_a_lonely_slot_goes() {
        let config = config(2);
        let empty = Seen::default();
        let mut nodes: BTreeMap<String, Seen> = ["a", "b"].map(|node| (node.to_owned(), empty.clone())).into();
        assert_eq!(plan(&config, &nodes, Wish::default()), Plan::default());
        let slot = Slot { name: "multihome".into(), here: true, ..Slot::default() };
        nodes.get_mut("a").unwrap().survey.slots.push(slot);
        assert_eq!(
            lines(&plan(&config, &nodes, Wish::default())),
            ["a: select pg_drop_replication_slot('multihome');"]
        );
        nodes.get_mut("b").unwrap().standing = Standing::Down;
        assert_eq!(down(&nodes), ["b"]);
    }

    #[test]
    fn what_init_has_closed_is_opened() {
        let config = config(2);
        let nodes = ["a", "b"].map(|node| (node.to_owned(), seen(&config, node)));
        let mut nodes: BTreeMap<String, Seen> = nodes.into();
        nodes.get_mut("b").unwrap().standing = Standing::Parked;
        assert!(down(&nodes).is_empty());
        let lines = lines(&plan(&config, &nodes, Wish::default()));
        let at = |line: &str| lines.iter().position(|found| found == line).unwrap();
        assert!(at("b: drop subscription multihome;") < at("b: select stillebot_up();"), "{lines:#?}");
        assert!(at("b: select stillebot_up();") < at("b: drop publication multihome;"), "{lines:#?}");
    }
}
