//! Schemas: what each node has, what of it differs, and the statements that make what a node lacks.
//!
//! [`read`] and [`fingerprint`] ask a node; everything else is pure. Deliberately never says which node is right, and has no
//! statement for what two nodes define differently: only a person knows which of the two was meant.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use crate::config::{Config, Node};
use crate::node::{NodeError, Session, Trouble};
use crate::sql;
use crate::watchdog::Views;

/// How much is shown of a definition.
const SHOWN: usize = 300;

/// What can be alike or not. Names are quoted and qualified as SQL wants them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Object {
    /// `table`, `column`, `index`, ...
    pub kind: String,
    /// The table it is part of; empty if of none.
    pub relation: String,
    /// Its name; empty for what a table has one of.
    pub name: String,
}

impl Object {
    /// Kind, and its place among all names: `trigger stillebot.raids.noticed`.
    pub fn path(&self) -> String {
        let names = [&self.relation, &self.name].into_iter().filter(|name| !name.is_empty());
        format!("{} {}", self.kind, names.map(String::as_str).collect::<Vec<_>>().join("."))
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, relation, name } = self;
        match (relation.is_empty(), name.is_empty(), kind.as_str()) {
            (true, ..) => write!(f, "{kind} {name}"),
            (_, true, _) => write!(f, "{kind} of {relation}"),
            (.., "column") => write!(f, "column {relation}.{name}"),
            _ => write!(f, "{kind} {name} on {relation}"),
        }
    }
}

/// How it is defined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// In words that are compared.
    pub text: String,
    /// Its place among its like, which is not.
    pub place: i32,
}

/// All that a node has.
pub type Schema = BTreeMap<Object, Definition>;

/// Something that is not alike on all nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What.
    pub object: Object,
    /// How each node defines it, in the order of the nodes; none if it has none.
    pub nodes: Vec<(String, Option<String>)>,
}

impl Difference {
    /// The nodes that have none.
    fn lacking(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().filter(|(_, text)| text.is_none()).map(|(node, _)| node.as_str())
    }

    /// What those that have one agree on, if they do.
    fn agreed(&self) -> Option<&str> {
        let mut texts = self.nodes.iter().filter_map(|(_, text)| text.as_deref());
        let first = texts.next()?;
        texts.all(|text| text == first).then_some(first)
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let nodes: BTreeMap<_, _> = self.nodes.iter().cloned().collect();
        let Object { kind, relation, name } = &self.object;
        json!({"kind": kind, "relation": relation, "name": name, "object": self.object.to_string(), "nodes": nodes})
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.object)?;
        if self.agreed().is_some() {
            return write!(f, "not on {}", self.lacking().collect::<Vec<_>>().join(", "));
        }
        f.write_str("differs")?;
        for (node, text) in &self.nodes {
            write!(
                f,
                "\n    {node}: {}",
                text.as_deref().map_or_else(|| "not there".to_owned(), |text| short(text, SHOWN))
            )?;
        }
        Ok(())
    }
}

/// In one line that can be read, of at most so many letters.
pub fn short(text: &str, most: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

/// What is not alike. What is missing along with its table is not said again.
pub fn compare(nodes: &[(String, Schema)]) -> Vec<Difference> {
    let objects: BTreeSet<&Object> = nodes.iter().flat_map(|(_, schema)| schema.keys()).collect();
    let differences: Vec<Difference> = objects
        .into_iter()
        .map(|object| {
            let text = |schema: &Schema| schema.get(object).map(|definition| definition.text.clone());
            let nodes = nodes.iter().map(|(node, schema)| (node.clone(), text(schema))).collect();
            Difference { object: object.clone(), nodes }
        })
        .filter(|difference| difference.agreed().is_none() || difference.lacking().next().is_some())
        .collect();
    let missing: BTreeSet<(String, Vec<String>)> = differences
        .iter()
        .filter(|difference| difference.object.relation.is_empty() && difference.agreed().is_some())
        .map(|difference| (difference.object.name.clone(), difference.lacking().map(str::to_owned).collect()))
        .collect();
    let implied = |difference: &Difference| {
        let lacking = difference.lacking().map(str::to_owned).collect();
        difference.agreed().is_some() && missing.contains(&(difference.object.relation.clone(), lacking))
    };
    differences.into_iter().filter(|difference| !implied(difference)).collect()
}

/// The statements that make on each node what it lacks and the others agree on, in an order in which they can be run.
pub fn mend(nodes: &[(String, Schema)], differences: &[Difference]) -> BTreeMap<String, Vec<String>> {
    let mut statements: BTreeMap<String, Vec<(usize, i32, String)>> = BTreeMap::new();
    for difference in differences.iter().filter(|difference| difference.agreed().is_some()) {
        let model = nodes.iter().map(|(_, schema)| schema).find(|schema| schema.contains_key(&difference.object));
        let Some(model) = model else { continue };
        for node in difference.lacking() {
            statements.entry(node.to_owned()).or_default().extend(create(model, &difference.object));
        }
    }
    statements
        .into_iter()
        .map(|(node, mut statements)| {
            statements.sort();
            (node, statements.into_iter().map(|(.., statement)| statement).collect())
        })
        .collect()
}

/// The statements that make on a node what it lacks of one table.
pub fn mend_table(nodes: &[(String, Schema)], node: &str, table: &str) -> Vec<String> {
    let mut differences = compare(nodes);
    differences.retain(|difference| difference.object.name == table || difference.object.relation == table);
    mend(nodes, &differences).remove(node).unwrap_or_default()
}

/// In which order things are made; what is not here has no statement.
const ORDER: [&str; 11] = [
    "schema",
    "type",
    "sequence",
    "table",
    "column",
    "constraint",
    "index",
    "replica identity",
    "function",
    "view",
    "trigger",
];

/// What makes an object that a node has, and all that is part of it: rank, place, statement.
fn create(model: &Schema, object: &Object) -> Vec<(usize, i32, String)> {
    let Some(definition) = model.get(object) else { return Vec::new() };
    let Object { kind, relation, name } = object;
    let Some(rank) = ORDER.iter().position(|known| known == kind) else { return Vec::new() };
    let text = definition.text.as_str();
    let statement = match kind.as_str() {
        "schema" => format!("create schema {name};"),
        "type" => match (text.strip_prefix("enum "), text.strip_prefix("domain ")) {
            (Some(labels), _) => format!("create type {name} as enum {labels};"),
            (_, Some(base)) => format!("create domain {name} as {base};"),
            _ => return Vec::new(),
        },
        "sequence" => format!("create sequence {name} {text};"),
        "table" => {
            let parts = model.iter().filter(|(part, _)| part.relation == *name);
            let mut columns: Vec<_> = parts.clone().filter(|(part, _)| part.kind == "column").collect();
            columns.sort_by_key(|(_, column)| column.place);
            let columns: Vec<String> =
                columns.iter().map(|(column, definition)| format!("{} {}", column.name, definition.text)).collect();
            let (unlogged, rest) = text.strip_prefix("unlogged").map_or(("", text), |rest| ("unlogged ", rest.trim()));
            // Partitions and children take their columns from elsewhere.
            if rest.starts_with("partition of") || rest.starts_with("inherits") {
                return Vec::new();
            }
            let after = if rest.is_empty() { String::new() } else { format!(" {rest}") };
            let table = format!("create {unlogged}table {name} ({}){after};", columns.join(", "));
            let rest = parts.filter(|(part, definition)| {
                part.kind != "column" && (part.kind != "replica identity" || definition.text != "default")
            });
            let rest: Vec<_> = rest.flat_map(|(part, _)| create(model, part)).collect();
            return [vec![(rank, 0, table)], rest].concat();
        }
        "column" => format!("alter table {relation} add column {name} {text};"),
        "constraint" => format!("alter table {relation} add constraint {name} {text};"),
        "replica identity" => format!("alter table {relation} replica identity {text};"),
        "view" => format!("create view {name} as {}", text.trim()),
        "function" if text.starts_with("aggregate ") => return Vec::new(),
        _ => format!("{};", text.trim_end()),
    };
    vec![(rank, definition.place, statement)]
}

/// Which of several nodes that tell a fingerprint differ from the first of them.
pub fn unlike<'a>(fingerprints: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<&'a str> {
    let mut fingerprints = fingerprints.into_iter();
    let Some((_, first)) = fingerprints.next() else { return Vec::new() };
    fingerprints.filter(|(_, fingerprint)| *fingerprint != first).map(|(node, _)| node).collect()
}

/// The tables that exist on both ends of a direction and do not replicate yet, by the node whose subscription has to be
/// refreshed. A node that lacks a table of its publisher is left out: there a refresh would fail, and the missing table is a
/// finding of the watchdog's.
pub fn unjoined(config: &Config, views: &Views) -> BTreeMap<String, BTreeSet<String>> {
    let sight = |node: &Node| views.get(&node.name).and_then(|view| view.as_ref().ok());
    let mut unjoined: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for to in &config.nodes {
        let Some(target) = sight(to) else { continue };
        let sources = config.nodes.iter().filter(|from| from.name != to.name);
        let sources: Vec<_> = sources.filter_map(|from| Some((from, sight(from)?))).collect();
        if sources.iter().any(|(_, source)| source.tables.keys().any(|table| !target.tables.contains_key(table))) {
            continue;
        }
        for (from, source) in sources {
            let name = config.subscription_to(&from.name);
            // A refresh is for those that are switched on.
            if !target.subscriptions.iter().any(|subscription| subscription.name == name && subscription.enabled) {
                continue;
            }
            let new = source
                .tables
                .keys()
                .filter(|table| target.tables.get(*table).is_some_and(|subscriptions| !subscriptions.contains(&name)));
            let new: Vec<String> = new.cloned().collect();
            if !new.is_empty() {
                unjoined.entry(to.name.clone()).or_default().extend(new);
            }
        }
    }
    unjoined
}

/// What to say of a new table, of which so many rows were counted on each node (0, or more) before it replicated and after:
/// rows that were written in between have not travelled.
pub fn rows_apart(table: &str, before: &[(String, i64)], after: &[(String, i64)]) -> Option<String> {
    let filled = |counts: &[(String, i64)]| -> Vec<String> {
        counts.iter().filter(|(_, rows)| *rows > 0).map(|(node, _)| node.clone()).collect()
    };
    let (earlier, later) = (filled(before), filled(after));
    let apart = if !earlier.is_empty() {
        earlier
    } else if later.len() < after.len() {
        later.clone()
    } else {
        Vec::new()
    };
    let before = format!("table {table} had rows on {} before it replicated", apart.join(" and "));
    let others = |node: &String| {
        let others = after.iter().map(|(other, _)| other).filter(|other| *other != node);
        others.cloned().collect::<Vec<_>>().join(", ")
    };
    match (apart.as_slice(), later.as_slice()) {
        ([], _) => None,
        ([node], [only]) if node == only => Some(format!("{before}: schema populate {table} --from {node}")),
        // Rows that came later are on all nodes; those of before are on one, and a copy brings both.
        ([node], _) => {
            Some(format!("{before}: take {} down, then schema populate {table} --from {node} --replace", others(node)))
        }
        _ => Some(format!(
            "{before}: compare them; with all nodes down but the one whose rows are right, schema populate {table} \
             --from that one --replace"
        )),
    }
}

/// Asks a node for its schema.
pub async fn read(session: &Session, bound: Duration) -> Result<Schema, NodeError> {
    let rows = session.rows(sql::SCHEMA, &[], bound).await.map_err(|error| match error.trouble {
        Trouble::Refused => NodeError {
            hint: Some("alter extension stillebot update, and grant the agent's role what `check` says".into()),
            ..error
        },
        _ => error,
    })?;
    let object = |row: &tokio_postgres::Row| {
        let object = Object { kind: row.get("kind"), relation: row.get("relation"), name: row.get("name") };
        let text = row.get::<_, Option<String>>("definition").unwrap_or_default();
        (object, Definition { text, place: row.get("place") })
    };
    Ok(rows.iter().map(object).collect())
}

/// Asks a node for the fingerprint of its schema; none if it cannot tell.
pub async fn fingerprint(session: &Session, bound: Duration) -> Result<Option<String>, NodeError> {
    if !session.row(sql::SCHEMA_TELLS, &[], bound).await?.get::<_, bool>("tells") {
        return Ok(None);
    }
    Ok(Some(session.row(sql::SCHEMA_FINGERPRINT, &[], bound).await?.get("fingerprint")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sight::{Sight, Subscription};
    use proptest::prelude::*;

    fn object(kind: &str, relation: &str, name: &str) -> Object {
        Object { kind: kind.into(), relation: relation.into(), name: name.into() }
    }

    fn with(objects: &[(&str, &str, &str, &str)]) -> Schema {
        objects
            .iter()
            .enumerate()
            .map(|(place, (kind, relation, name, text))| {
                (object(kind, relation, name), Definition { text: (*text).into(), place: place as i32 })
            })
            .collect()
    }

    fn pair(first: Schema, second: Schema) -> [(String, Schema); 2] {
        [("a".into(), first), ("b".into(), second)]
    }

    #[test]
    fn a_table_that_is_missing_is_one_difference_with_all_its_statements() {
        let nodes = pair(
            with(&[
                ("table", "", "s.t", ""),
                ("column", "s.t", "id", "bigint not null"),
                ("column", "s.t", "body", "text"),
                ("constraint", "s.t", "t_pkey", "PRIMARY KEY (id)"),
                ("index", "s.t", "t_body", "CREATE INDEX t_body ON s.t USING btree (body)"),
                ("replica identity", "s.t", "", "full"),
                ("trigger", "s.t", "told", "CREATE TRIGGER told ..; alter table s.t enable always trigger told"),
            ]),
            Schema::new(),
        );
        let differences = compare(&nodes);
        assert_eq!(differences.len(), 1);
        assert_eq!(differences[0].to_string(), "table s.t: not on b");
        let mended = mend(&nodes, &differences);
        assert_eq!(
            mended["b"],
            [
                "create table s.t (id bigint not null, body text);",
                "alter table s.t add constraint t_pkey PRIMARY KEY (id);",
                "CREATE INDEX t_body ON s.t USING btree (body);",
                "alter table s.t replica identity full;",
                "CREATE TRIGGER told ..; alter table s.t enable always trigger told;",
            ]
        );
        assert!(!mended.contains_key("a"));
    }

    #[test]
    fn what_two_nodes_define_differently_is_shown_and_left_to_a_person() {
        let table = ("table", "", "s.t", "");
        let nodes = pair(
            with(&[table, ("column", "s.t", "n", "text"), ("column", "s.t", "more", "jsonb")]),
            with(&[table, ("column", "s.t", "n", "integer")]),
        );
        let differences = compare(&nodes);
        let texts: Vec<String> = differences.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["column s.t.more: not on b", "column s.t.n: differs\n    a: text\n    b: integer"]);
        assert_eq!(mend(&nodes, &differences)["b"], ["alter table s.t add column more jsonb;"]);
    }

    #[test]
    fn one_table_is_mended_and_nothing_else() {
        let table = ("table", "", "s.t", "");
        let nodes =
            pair(with(&[table, ("column", "s.t", "more", "jsonb"), ("table", "", "s.other", "")]), with(&[table]));
        assert_eq!(mend_table(&nodes, "b", "s.t"), ["alter table s.t add column more jsonb;"]);
        assert!(mend_table(&nodes, "a", "s.t").is_empty());
    }

    #[test]
    fn those_that_are_unlike_the_first_are_named() {
        assert!(unlike([]).is_empty());
        assert!(unlike([("a", "x"), ("b", "x")]).is_empty());
        assert_eq!(unlike([("a", "x"), ("b", "x"), ("c", "y")]), ["c"]);
    }

    #[test]
    fn a_new_table_is_joined_where_it_exists_on_both_ends_and_nothing_else_is_missing() {
        let text = "user='u'\n[[node]]\nname='a'\nhost='a'\n[[node]]\nname='b'\nhost='b'";
        let environment = crate::config::Environment { variable: &|_| None, os_user: None };
        let config = Config::parse(text, &environment).unwrap();
        let name = config.subscription_to("a");
        let view = |tables: &[(&str, bool)], enabled| {
            let subscription = Subscription { name: name.clone(), enabled, ..Subscription::default() };
            let joined = |joined: &bool| if *joined { vec![name.clone()] } else { Vec::new() };
            let tables = tables.iter().map(|(table, is)| ((*table).to_owned(), joined(is))).collect();
            Ok(Sight { tables, subscriptions: vec![subscription], ..Sight::default() })
        };
        let unjoined = |a, b| unjoined(&config, &Views::from([("a".into(), a), ("b".into(), b)]));
        let names = |nodes: &[&str]| -> BTreeMap<String, BTreeSet<String>> {
            nodes.iter().map(|node| ((*node).to_owned(), BTreeSet::from(["new".to_owned()]))).collect()
        };
        assert!(unjoined(view(&[("t", true)], true), view(&[("t", true)], true)).is_empty());
        let (one, other) = (&[("t", true), ("new", false)][..], &[("t", true)][..]);
        assert_eq!(unjoined(view(one, true), view(other, true)), names(&[]), "nothing to join it with");
        assert_eq!(unjoined(view(one, true), view(one, true)), names(&["a", "b"]));
        assert_eq!(unjoined(view(one, true), view(&[("t", true), ("new", true)], true)), names(&["a"]));
        assert_eq!(unjoined(view(one, true), view(one, false)), names(&["a"]), "switched off");
        let more = &[("t", true), ("new", false), ("only", false)][..];
        assert_eq!(unjoined(view(more, true), view(one, true)), names(&["a"]), "b lacks one");
        assert!(unjoined(Err("gone".into()), view(one, true)).is_empty());
    }

    #[test]
    fn rows_from_before_a_table_replicated_are_told() {
        let counts = |a, b| [("a".to_owned(), a), ("b".to_owned(), b)];
        let apart = |before: [_; 2], after: [_; 2]| rows_apart("t", &before, &after);
        assert_eq!(apart(counts(0, 0), counts(0, 0)), None);
        assert_eq!(apart(counts(0, 0), counts(1, 1)), None, "written afterwards, and there");
        let populate = "table t had rows on a before it replicated: schema populate t --from a";
        assert_eq!(apart(counts(1, 0), counts(1, 0)).as_deref(), Some(populate));
        let replace =
            "table t had rows on a before it replicated: take b down, then schema populate t --from a --replace";
        assert_eq!(apart(counts(1, 0), counts(1, 1)).as_deref(), Some(replace), "one more has come");
        assert_eq!(apart(counts(0, 0), counts(1, 0)).as_deref(), Some(populate), "written in between");
        assert!(apart(counts(1, 1), counts(1, 1)).is_some_and(|text| text.contains("a and b")));
    }

    fn schema() -> impl Strategy<Value = Schema> {
        let object = ("table|view|index|function", "[a-d]").prop_map(|(kind, name)| object(&kind, "", &name));
        let definition = ("[xyz]", 0..9i32).prop_map(|(text, place)| Definition { text, place });
        proptest::collection::btree_map(object, definition, 1..8)
    }

    proptest! {
        #[test]
        fn what_is_alike_has_no_difference_whatever_its_places(schema in schema(), place: i32) {
            let mut moved = schema.clone();
            moved.values_mut().for_each(|definition| definition.place = place);
            prop_assert!(compare(&pair(schema, moved)).is_empty());
        }

        #[test]
        fn any_single_change_is_seen_and_named(schema in schema(), at: prop::sample::Index, gone: bool) {
            let mut changed = schema.clone();
            let object = at.get(&schema.keys().cloned().collect::<Vec<_>>()).clone();
            let old = schema[&object].text.clone();
            let new = if gone {
                changed.remove(&object);
                None
            } else {
                changed.get_mut(&object).unwrap().text.push('!');
                Some(format!("{old}!"))
            };
            let differences = compare(&pair(schema, changed));
            let nodes = vec![("a".to_owned(), Some(old)), ("b".to_owned(), new)];
            prop_assert_eq!(differences, vec![Difference { object, nodes }]);
        }
    }
}
