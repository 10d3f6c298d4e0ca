//! From what the nodes are to databases that do not replicate: the steps of `deinit`, in order. Pure.
//!
//! First every subscription on every node, then what others' subscriptions left behind, then the rest: whatever is cut off, no
//! node goes on receiving from one that does not receive any more. Deliberately drops no slot through a subscription's own connection,
//! which may lead nowhere: slots are dropped where they are.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::config::Config;
use crate::quote::name;
use crate::setup::is_ours;
use crate::survey::Survey;

/// One node before `deinit`.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// What it tells.
    pub survey: Survey,
    /// It takes writes. Without the extension every database does.
    pub up: bool,
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

/// What is done on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Action {
    /// One statement.
    Run {
        /// Without a semicolon.
        statement: String,
    },
    /// A slot is dropped as soon as nobody reads it.
    DropSlot {
        /// Its name.
        slot: String,
    },
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Where.
    pub node: String,
    /// What.
    #[serde(flatten)]
    pub action: Action,
}

/// All steps, and what stays although it was to go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// In order.
    pub steps: Vec<Step>,
    /// What stays, and why.
    pub stays: Vec<String>,
}

impl Plan {
    fn run(&mut self, node: &str, statement: String) {
        self.steps.push(Step { node: node.to_owned(), action: Action::Run { statement } });
    }
}

impl Action {
    /// As people read it.
    pub fn text(&self) -> String {
        match self {
            Self::Run { statement } => format!("{statement};"),
            Self::DropSlot { slot } => format!("select pg_drop_replication_slot('{slot}');"),
        }
    }
}

/// The nodes that are down: nothing can be taken away from them.
pub fn down(nodes: &BTreeMap<String, Seen>) -> Vec<&str> {
    nodes.iter().filter(|(_, seen)| !seen.up).map(|(node, _)| node.as_str()).collect()
}

/// The steps, for the nodes that could be asked.
pub fn plan(config: &Config, nodes: &BTreeMap<String, Seen>, wish: Wish) -> Plan {
    let mut plan = Plan::default();
    // In the order of the configuration, as everything is.
    let names = || config.nodes.iter().map(|node| node.name.as_str());
    let there = || names().filter_map(|node| nodes.get(node).map(|seen| (node, seen)));
    // Slots are in use by these names on the peers; or were made by these names, whatever became of their readers.
    let mut slots: BTreeSet<(String, String)> = BTreeSet::new();
    for (node, seen) in there() {
        for found in seen.survey.subscriptions.iter().filter(|found| is_ours(config, found)) {
            let subscription = name(&found.name);
            if found.enabled {
                plan.run(node, format!("alter subscription {subscription} disable"));
            }
            if let Some(slot) = &found.slot {
                plan.run(node, format!("alter subscription {subscription} set (slot_name = none)"));
                let publisher = config.source_of(node, &found.name).map(|publisher| publisher.name.clone());
                slots.extend(publisher.map(|publisher| (publisher, slot.clone())));
            }
            plan.run(node, format!("drop subscription {subscription}"));
        }
        let peers = config.peers(node).map(|peer| config.slot(node, &peer.name));
        slots.extend(peers.map(|slot| (node.to_owned(), slot)));
    }
    for (publisher, slot) in slots {
        match nodes.get(&publisher) {
            Some(seen) if seen.survey.slots.iter().any(|found| found.here && found.name == slot) => {
                plan.steps.push(Step { node: publisher, action: Action::DropSlot { slot } });
            }
            Some(_) => {}
            None => plan.stays.push(format!(
                "slot {slot} on {publisher}, which cannot be reached and keeps WAL for it: there, select pg_drop_replication_slot('{slot}')"
            )),
        }
    }
    for (node, seen) in there() {
        if seen.survey.publications.iter().any(|found| found.name == config.publication) {
            plan.run(node, format!("drop publication {}", name(&config.publication)));
        }
        if seen.survey.about.extension.is_some() {
            if seen.sole {
                // Alone it trusts its memory again.
                plan.run(node, "select multihome.up(false)".into());
            }
            if !wish.keep_extension {
                plan.run(node, "drop extension stillebot".into());
            } else if seen.survey.identity.is_some() {
                plan.run(node, "select multihome.forget_identity()".into());
            }
        }
        for (role, owned) in seen.owned.iter().filter(|_| wish.roles) {
            if *owned > 0 {
                plan.stays.push(format!("role {role} on {node}, which owns {owned} things"));
            } else {
                // Of a role that owns nothing these are its privileges.
                plan.run(node, format!("drop owned by {}", name(role)));
                plan.run(node, format!("drop role {}", name(role)));
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
            about: About { extension: Some("0.5.0".into()), ..About::default() },
            subscriptions: peers().map(subscription).collect(),
            slots: peers().map(slot).collect(),
            publications: vec![Publication { name: config.publication.clone(), ..Publication::default() }],
            identity: Some(Identity::default()),
            ..Survey::default()
        };
        let owned = BTreeMap::from([("agent".to_owned(), 0), ("replicator".to_owned(), 3)]);
        Seen { survey, up: true, sole: false, owned }
    }

    fn lines(plan: &Plan) -> Vec<String> {
        plan.steps.iter().map(|step| format!("{}: {}", step.node, step.action.text())).collect()
    }

    #[test]
    fn subscriptions_go_before_slots_and_slots_before_the_rest() {
        let config = config(2);
        let nodes = ["a", "b"].map(|node| (node.to_owned(), seen(&config, node))).into();
        let plan = plan(&config, &nodes, Wish::default());
        assert_eq!(
            lines(&plan),
            [
                "a: alter subscription multihome disable;",
                "a: alter subscription multihome set (slot_name = none);",
                "a: drop subscription multihome;",
                "b: alter subscription multihome disable;",
                "b: alter subscription multihome set (slot_name = none);",
                "b: drop subscription multihome;",
                "a: select pg_drop_replication_slot('multihome');",
                "b: select pg_drop_replication_slot('multihome');",
                "a: drop publication multihome;",
                "a: drop extension stillebot;",
                "b: drop publication multihome;",
                "b: drop extension stillebot;",
            ]
        );
        assert!(plan.stays.is_empty());
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
        let empty = Seen { up: true, ..Seen::default() };
        let mut nodes: BTreeMap<String, Seen> = ["a", "b"].map(|node| (node.to_owned(), empty.clone())).into();
        assert_eq!(plan(&config, &nodes, Wish::default()), Plan::default());
        let slot = Slot { name: "multihome".into(), here: true, ..Slot::default() };
        nodes.get_mut("a").unwrap().survey.slots.push(slot);
        assert_eq!(
            lines(&plan(&config, &nodes, Wish::default())),
            ["a: select pg_drop_replication_slot('multihome');"]
        );
        nodes.get_mut("b").unwrap().up = false;
        assert_eq!(down(&nodes), ["b"]);
    }
}
