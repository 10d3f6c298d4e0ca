//! Which subscriptions are to connect with something else, and whether what answers there is the node it should be: the
//! decisions of `set-connection`. Pure.

use std::path::Path;

use crate::config::{Config, Node};
use crate::conninfo::Conninfo;
use crate::quote::{literal, name};
use crate::survey::Identity;

/// What the operator says; nothing at all: as the configuration has it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish<'a> {
    /// Where the node's peers reach it.
    pub host: Option<&'a str>,
    /// The port there.
    pub port: Option<u16>,
    /// The node's own files, as its server sees them.
    pub files: Files<'a>,
}

/// What a node's subscriptions present and verify with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Files<'a> {
    /// `sslcert`
    pub cert: Option<&'a Path>,
    /// `sslkey`
    pub key: Option<&'a Path>,
    /// `sslrootcert`
    pub root: Option<&'a Path>,
}

impl<'a> Files<'a> {
    /// By the keywords of libpq.
    fn keywords(self) -> impl Iterator<Item = (&'static str, &'a Path)> {
        let files = [("sslcert", self.cert), ("sslkey", self.key), ("sslrootcert", self.root)];
        files.into_iter().filter_map(|(keyword, path)| Some((keyword, path?)))
    }
}

impl Wish<'_> {
    fn is_about_the_place(&self) -> bool {
        self.host.is_some() || self.port.is_some()
    }

    fn is_about_files(&self) -> bool {
        self.files.keywords().next().is_some()
    }

    /// The subscriptions it is about: subscriber and publisher of each.
    pub fn directions<'c>(&self, config: &'c Config, node: &'c Node) -> Vec<(&'c Node, &'c Node)> {
        let all = !self.is_about_the_place() && !self.is_about_files();
        let mut directions = Vec::new();
        if all || self.is_about_the_place() {
            directions.extend(config.peers(&node.name).map(|peer| (peer, node)));
        }
        if all || self.is_about_files() {
            directions.extend(config.peers(&node.name).map(|peer| (node, peer)));
        }
        directions
    }

    /// What one of them is to connect with that connects with `before` now; `None` if it does already.
    ///
    /// Whatever the operator has added to it stays.
    ///
    /// # Errors
    /// Says why it cannot be changed keyword by keyword.
    pub fn change(&self, config: &Config, node: &Node, of: &Found) -> Result<Option<Conninfo>, String> {
        let before = Conninfo::parse(&of.conninfo);
        let incoming = of.publisher == node.name;
        let after = if self.is_about_the_place() || self.is_about_files() {
            let mut after = before.clone()?;
            if incoming {
                if let Some(host) = self.host {
                    after.set("host", host);
                    after.unset("hostaddr");
                }
                if let Some(port) = self.port {
                    after.set("port", &port.to_string());
                }
            } else {
                for (keyword, path) in self.files.keywords() {
                    after.set(keyword, &path.to_string_lossy());
                }
            }
            after
        } else {
            let [subscriber, publisher] = [&of.subscriber, &of.publisher].map(|name| config.node(name).unwrap_or(node));
            let mut after = before.clone().unwrap_or_default();
            after.adopt(&Conninfo::wanted(config, subscriber, publisher));
            after.unset("hostaddr");
            after
        };
        Ok((before.as_ref() != Ok(&after)).then_some(after))
    }

    /// The lines that agent.toml wants under `[node.replication]` of that node, so that it says what is now so.
    pub fn configuration(&self, config: &Config, node: &Node) -> Vec<String> {
        let own = &node.replication;
        let text = |key: &str, value: &str| format!("{key} = {}", toml::Value::from(value));
        let mut lines = Vec::new();
        if let Some(host) = self.host.filter(|host| *host != own.host.as_deref().unwrap_or(&node.host)) {
            lines.push(text("host", host));
        }
        if let Some(port) = self.port.filter(|port| *port != own.port.unwrap_or(node.port)) {
            lines.push(format!("port = {port}"));
        }
        let common = &config.replication;
        let known = |keyword| match keyword {
            "sslcert" => ("cert", own.cert.as_ref().or(common.cert.as_ref())),
            "sslkey" => ("key", own.key.as_ref().or(common.key.as_ref())),
            _ => ("root", own.root.as_ref().or(common.root.as_ref())),
        };
        for (keyword, path) in self.files.keywords() {
            let (key, known) = known(keyword);
            if known.map(AsRef::as_ref) != Some(path) {
                lines.push(text(key, &path.to_string_lossy()));
            }
        }
        lines
    }
}

/// A subscription as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The node that has it.
    pub subscriber: String,
    /// The node that it is about.
    pub publisher: String,
    /// Its name.
    pub subscription: String,
    /// What it connects with, secrets included.
    pub conninfo: String,
    /// Switched on.
    pub enabled: bool,
    /// Its slot on the publisher.
    pub slot: Option<String>,
}

impl Found {
    /// The statement that has it connect with something.
    pub fn statement(&self, conninfo: &str) -> String {
        format!("alter subscription {} connection {}", name(&self.subscription), literal(conninfo))
    }
}

/// Host and port of a connection string, as libpq takes them.
pub fn place(conninfo: &Conninfo) -> (String, u16) {
    let host = conninfo.get("host").unwrap_or("localhost").to_owned();
    (host, conninfo.get("port").and_then(|port| port.parse().ok()).unwrap_or(5432))
}

/// The files that a connection needs where it begins.
pub fn files(conninfo: &Conninfo) -> impl Iterator<Item = &str> {
    ["sslcert", "sslkey", "sslrootcert"]
        .into_iter()
        .filter_map(|keyword| conninfo.get(keyword))
        .filter(|path| *path != "system")
}

/// Who answers somewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// What the database has been told that it is.
    pub identity: Option<Identity>,
    /// Given by initdb, and copied with the data.
    pub system_identifier: String,
    /// Start of the server in microseconds, which tells a copy that runs from its original.
    pub started_us: i64,
    /// The database.
    pub database_oid: i64,
}

impl Answer {
    fn is_the_same_as(&self, other: &Self) -> bool {
        (&self.system_identifier, self.started_us, self.database_oid)
            == (&other.system_identifier, other.started_us, other.database_oid)
    }
}

/// Why what answers there must not be subscribed to as that node; nothing, if it is that node.
///
/// `subscriber`: who would subscribe; `known`: who answers where the configuration has the node, if anybody does.
pub fn objection(node: &str, answer: &Answer, subscriber: &Answer, known: Option<&Answer>) -> Option<String> {
    if answer.is_the_same_as(subscriber) {
        return Some("it is the subscriber itself".into());
    }
    let known_to_be = known.map(|known| answer.is_the_same_as(known));
    let Some(identity) = &answer.identity else {
        // A pair from before nodes had identities: only the way that is known can tell.
        return (known_to_be != Some(true)).then(|| "it does not say which node it is".into());
    };
    if identity.foreign {
        Some(format!("it is a copy of {}", identity.node))
    } else if identity.node != node {
        Some(format!("it is {}", identity.node))
    } else if subscriber.identity.as_ref().is_some_and(|own| own.pair != identity.pair) {
        Some(format!("it is the {node} of another set of nodes"))
    } else if known_to_be == Some(false) {
        Some(format!("it says that it is {node}, and so does another server, where the configuration has it"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;
    use proptest::prelude::*;

    fn config() -> Config {
        let text = r#"
            database = "stillebot"
            user = "stillebot_agent"
            [replication]
            cert = "/c"
            key = "/k"
            [[node]]
            name = "a"
            host = "a.example.net"
            [[node]]
            name = "b"
            host = "b.example.net"
            [node.replication]
            port = 5433
            [[node]]
            name = "c"
            host = "c.example.net"
        "#;
        Config::parse(text, &Environment { variable: &|_| None, os_user: None }).unwrap()
    }

    fn found(subscriber: &str, publisher: &str, conninfo: &str) -> Found {
        Found {
            subscriber: subscriber.into(),
            publisher: publisher.into(),
            subscription: "multihome".into(),
            conninfo: conninfo.into(),
            ..Found::default()
        }
    }

    fn changed(wish: &Wish<'_>, subscriber: &str, publisher: &str, conninfo: &str) -> Option<String> {
        let config = config();
        let node = config.node("b").unwrap();
        wish.change(&config, node, &found(subscriber, publisher, conninfo)).unwrap().map(|after| after.to_string())
    }

    #[test]
    fn a_place_is_for_the_peers_and_files_are_for_the_node_itself() {
        let config = config();
        let names = |wish: Wish<'_>| {
            let directions = wish.directions(&config, config.node("b").unwrap());
            directions.iter().map(|(to, from)| format!("{}<{}", to.name, from.name)).collect::<Vec<_>>().join(" ")
        };
        let file = Files { cert: Some(Path::new("/x")), ..Files::default() };
        assert_eq!(names(Wish { port: Some(1), ..Wish::default() }), "a<b c<b");
        assert_eq!(names(Wish { files: file, ..Wish::default() }), "b<a b<c");
        assert_eq!(names(Wish { host: Some("h"), files: file, ..Wish::default() }), "a<b c<b b<a b<c");
        assert_eq!(names(Wish::default()), "a<b c<b b<a b<c");
    }

    #[test]
    fn what_the_operator_has_added_stays() {
        let place = Wish { host: Some("new"), port: Some(7), ..Wish::default() };
        let before = "host=old hostaddr=1.2.3.4 password='a b' keepalives_idle=3";
        assert_eq!(
            changed(&place, "a", "b", before).as_deref(),
            Some("host=new password='a b' keepalives_idle=3 port=7")
        );
        let files = Files { key: Some(Path::new("/n k")), ..Files::default() };
        let files = Wish { files, ..Wish::default() };
        assert_eq!(changed(&files, "b", "a", "host=a sslkey=/o x=y").as_deref(), Some("host=a sslkey='/n k' x=y"));
        assert_eq!(changed(&files, "b", "a", "host=a sslkey='/n k'"), None);
    }

    #[test]
    fn without_a_wish_everything_becomes_as_configured_and_a_password_stays() {
        let after = changed(&Wish::default(), "a", "b", "host=old password=p").unwrap();
        assert!(
            after.starts_with("host=b.example.net password=p port=5433 dbname=stillebot user=replicator "),
            "{after}"
        );
        assert_eq!(changed(&Wish::default(), "a", "b", &after), None);
        let uri = changed(&Wish::default(), "b", "a", "postgresql://old/x").unwrap();
        assert!(uri.starts_with("host=a.example.net port=5432 "), "{uri}");
    }

    #[test]
    fn a_uri_is_not_changed_in_part() {
        let config = config();
        let wish = Wish { host: Some("h"), ..Wish::default() };
        let answer = wish.change(&config, config.node("b").unwrap(), &found("a", "b", "postgresql://old/x"));
        assert_eq!(answer, Err("it is a URI".into()));
    }

    #[test]
    fn the_configuration_is_told_what_it_does_not_say() {
        let config = config();
        let node = config.node("b").unwrap();
        let files = Files { cert: Some(Path::new("/c")), key: Some(Path::new("/\"k")), root: None };
        let wish = Wish { host: Some("b.example.net"), port: Some(5432), files };
        assert_eq!(wish.configuration(&config, node), ["port = 5432", "key = '/\"k'"]);
        assert!(Wish::default().configuration(&config, node).is_empty());
    }

    fn answer(node: Option<&str>, pair: &str, server: &str) -> Answer {
        let identity = node.map(|node| Identity { node: node.into(), pair: pair.into(), ..Identity::default() });
        Answer { identity, system_identifier: server.into(), started_us: 1, database_oid: 1 }
    }

    #[test]
    fn only_the_node_itself_is_the_node() {
        let subscriber = answer(Some("a"), "p", "1");
        let right = answer(Some("b"), "p", "2");
        assert_eq!(objection("b", &right, &subscriber, Some(&right)), None);
        assert_eq!(objection("b", &right, &subscriber, None), None);
        let mut copy = right.clone();
        copy.identity.as_mut().unwrap().foreign = true;
        let restarted = Answer { started_us: 2, ..right.clone() };
        for (wrong, known) in [
            (&subscriber, Some(&right)),
            (&answer(None, "", "1"), None),
            (&answer(None, "", "3"), Some(&right)),
            (&answer(None, "", "3"), None),
            (&answer(Some("c"), "p", "3"), None),
            (&answer(Some("b"), "q", "3"), None),
            (&copy, None),
            (&restarted, Some(&right)),
        ] {
            assert!(objection("b", wrong, &subscriber, known).is_some(), "{wrong:?}");
        }
        let nameless = answer(None, "", "2");
        assert_eq!(objection("b", &nameless, &answer(None, "", "1"), Some(&nameless)), None);
    }

    proptest! {
        #[test]
        fn doing_it_twice_changes_nothing_more(
            conninfo in "(host=[a-z]{1,4} )?(port=[0-9]{1,4} )?(hostaddr=::1 )?(sslcert='/[a-z ]{0,4}')?",
            host in proptest::option::of("[a-z ']{1,6}"),
            port in proptest::option::of(1u16..),
            cert in proptest::option::of("/[a-z' ]{1,6}"),
            incoming in any::<bool>(),
        ) {
            let files = Files { cert: cert.as_deref().map(Path::new), ..Files::default() };
            let wish = Wish { host: host.as_deref(), port, files };
            let (subscriber, publisher) = if incoming { ("a", "b") } else { ("b", "a") };
            if let Some(after) = changed(&wish, subscriber, publisher, &conninfo) {
                prop_assert_eq!(changed(&wish, subscriber, publisher, &after), None);
            }
        }
    }
}
