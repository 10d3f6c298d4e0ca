//! libpq's connection strings: made for subscriptions, and read back from them. Pure.
//!
//! Deliberately only the form `keyword=value`: what a subscription was given as a URI is not taken apart.

use std::fmt;
use std::time::Duration;

use crate::config::{Config, Node, TlsMode};

/// How long a subscription's worker tries one address of its publisher before it tries the next: without it, an IPv6 address
/// that leads nowhere costs what TCP allows, two minutes and more. It is `tcp_user_timeout` that does that, for the server
/// connects without looking at `connect_timeout`; so it is, too, how long what was sent may stay unacknowledged later on.
const PATIENCE: Duration = Duration::from_secs(5);

/// The keywords whose values are nobody's business.
pub const SECRETS: [&str; 2] = ["password", "sslpassword"];

/// A connection string, keyword by keyword, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conninfo(Vec<(String, String)>);

impl Conninfo {
    /// What `subscriber` connects to `publisher` with, as the configuration wants it.
    pub fn wanted(config: &Config, subscriber: &Node, publisher: &Node) -> Self {
        let mut conninfo = Self::default();
        let replication = &config.replication;
        conninfo.set("host", publisher.replication.host.as_deref().unwrap_or(&publisher.host));
        conninfo.set("port", &publisher.replication.port.unwrap_or(publisher.port).to_string());
        conninfo.set("dbname", &config.database);
        conninfo.set("user", &replication.user);
        conninfo.set("sslmode", replication.mode.libpq());
        let own = &subscriber.replication;
        for (keyword, path) in [
            ("sslrootcert", own.root.as_ref().or(replication.root.as_ref())),
            ("sslcert", own.cert.as_ref().or(replication.cert.as_ref())),
            ("sslkey", own.key.as_ref().or(replication.key.as_ref())),
            ("passfile", replication.passfile.as_ref()),
        ] {
            if let Some(path) = path {
                conninfo.set(keyword, &path.to_string_lossy());
            }
        }
        conninfo.set("application_name", &config.subscription_to(&publisher.name));
        conninfo.set("tcp_user_timeout", &PATIENCE.as_millis().to_string());
        conninfo
    }

    /// How long one address is tried by a subscription that connects with what is wanted.
    pub const fn patience() -> Duration {
        PATIENCE
    }

    /// Takes a connection string apart by libpq's rules. The error says what is wrong, and repeats nothing of it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if ["postgres://", "postgresql://"].iter().any(|scheme| text.trim_start().starts_with(scheme)) {
            return Err("it is a URI".into());
        }
        let mut conninfo = Self::default();
        let mut rest = text.trim_start();
        while !rest.is_empty() {
            let (keyword, value) = rest.split_once('=').ok_or("a keyword has no value")?;
            let keyword = keyword.trim_end();
            if keyword.is_empty() || keyword.contains(char::is_whitespace) {
                return Err("a keyword has no value".into());
            }
            let (value, after) = value_of(value.trim_start())?;
            conninfo.set(keyword, &value);
            rest = after.trim_start();
        }
        Ok(conninfo)
    }

    /// The value of a keyword; an empty one counts as none, as for libpq.
    pub fn get(&self, keyword: &str) -> Option<&str> {
        self.0.iter().find(|(known, value)| known == keyword && !value.is_empty()).map(|(_, value)| value.as_str())
    }

    /// Sets a keyword, or changes it in its place.
    pub fn set(&mut self, keyword: &str, value: &str) {
        match self.0.iter_mut().find(|(known, _)| known == keyword) {
            Some((_, known)) => value.clone_into(known),
            None => self.0.push((keyword.to_owned(), value.to_owned())),
        }
    }

    /// Every keyword of another one is set as there; the rest stays.
    pub fn adopt(&mut self, other: &Self) {
        for (keyword, value) in &other.0 {
            self.set(keyword, value);
        }
    }

    /// Takes a keyword out.
    pub fn unset(&mut self, keyword: &str) {
        self.0.retain(|(known, _)| known != keyword);
    }

    /// The same to be shown: what nobody else should know is `***`.
    pub fn without_secrets(&self) -> Self {
        let mut shown = self.clone();
        for (_, value) in shown.0.iter_mut().filter(|(keyword, _)| SECRETS.contains(&keyword.as_str())) {
            "***".clone_into(value);
        }
        shown
    }
}

/// The value at the beginning of a text, and what follows.
fn value_of(text: &str) -> Result<(String, &str), String> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut letters = text.char_indices().skip(usize::from(quoted));
    while let Some((at, letter)) = letters.next() {
        match letter {
            '\\' => value.extend(letters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &text[at + 1..])),
            letter if !quoted && letter.is_whitespace() => return Ok((value, &text[at..])),
            letter => value.push(letter),
        }
    }
    if quoted { Err("a quote is not closed".into()) } else { Ok((value, "")) }
}

impl fmt::Display for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (keyword, value)) in self.0.iter().enumerate() {
            let space = if number > 0 { " " } else { "" };
            let plain = !value.is_empty() && !value.contains(|c: char| c.is_whitespace() || c == '\'' || c == '\\');
            if plain {
                write!(f, "{space}{keyword}={value}")?;
            } else {
                write!(f, "{space}{keyword}='{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))?;
            }
        }
        Ok(())
    }
}

impl TlsMode {
    /// As libpq calls it.
    pub fn libpq(self) -> &'static str {
        match self {
            Self::VerifyFull => "verify-full",
            Self::VerifyCa => "verify-ca",
            Self::Require => "require",
            Self::Disable => "disable",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_string_is_read_as_libpq_reads_it() {
        let read = Conninfo::parse(r" host = a  password='it\'s \\ here' empty='' user=b\ c sslkey=/k ").unwrap();
        assert_eq!(read.get("host"), Some("a"));
        assert_eq!(read.get("password"), Some(r"it's \ here"));
        assert_eq!(read.get("empty"), None);
        assert_eq!(read.get("user"), Some("b c"));
        assert_eq!(read.get("sslkey"), Some("/k"));
        for bad in ["host", "a b=c", "=a", "host='a", "postgresql://a/b"] {
            assert!(Conninfo::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_subscription_is_given_its_publishers_place_and_its_own_files() {
        let text = r#"
            database = "stillebot"
            user = "stillebot_agent"
            [replication]
            cert = "/c"
            key = "/k"
            root = "/r"
            [[node]]
            name = "a"
            host = "a.example.net"
            [node.replication]
            host = "ipv4.a.example.net"
            port = 5433
            [[node]]
            name = "b"
            host = "b.example.net"
            [node.replication]
            cert = "/b c"
            key = "/b k"
        "#;
        let environment = crate::config::Environment { variable: &|_| None, os_user: None };
        let config = Config::parse(text, &environment).unwrap();
        let wanted = |subscriber, publisher| {
            Conninfo::wanted(&config, config.node(subscriber).unwrap(), config.node(publisher).unwrap()).to_string()
        };
        assert_eq!(
            wanted("b", "a"),
            "host=ipv4.a.example.net port=5433 dbname=stillebot user=replicator sslmode=verify-full sslrootcert=/r \
             sslcert='/b c' sslkey='/b k' application_name=multihome tcp_user_timeout=5000"
        );
        assert!(wanted("a", "b").starts_with("host=b.example.net port=5432 "));
        assert!(wanted("a", "b").contains(" sslcert=/c sslkey=/k "));
    }

    proptest! {
        #[test]
        fn writing_and_reading_are_inverse(values in prop::collection::vec("[ -~ä]{0,12}", 0..6)) {
            let mut conninfo = Conninfo::default();
            for (number, value) in values.iter().enumerate() {
                conninfo.set(&format!("k{number}"), value);
            }
            prop_assert_eq!(Conninfo::parse(&conninfo.to_string()), Ok(conninfo));
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,60}") {
            let _ = Conninfo::parse(&text);
        }
    }
}
