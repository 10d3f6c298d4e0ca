//! Who gets in by pg_hba.conf, and how well that is guarded: the first line that fits decides, as in the server. Pure.
//!
//! Deliberately knows no regular expressions and no reverse lookups: a line that has one is taken to fit, for whoever asks
//! wants to know what could let somebody in.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Rule {
    /// The file, for files include others.
    pub file: String,
    /// The line in it.
    pub line: i32,
    /// `local`, `host`, `hostssl`, ...; this and the rest are missing in a line that is not understood.
    pub kind: Option<String>,
    /// Names, or keywords, which look alike here.
    pub databases: Option<Vec<String>>,
    /// Names, `+group`, or keywords.
    pub users: Option<Vec<String>>,
    /// `all`, `samehost`, `samenet`, an address, or a name.
    pub address: Option<String>,
    /// Of an address.
    pub netmask: Option<String>,
    /// How who comes is asked who it is.
    pub method: Option<String>,
    /// `clientcert=verify-full`, ...
    pub options: Vec<String>,
    /// What is wrong with the line.
    pub error: Option<String>,
}

/// A line of pg_ident.conf.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Mapping {
    /// The file.
    pub file: String,
    /// The line in it.
    pub line: i32,
    /// Which map it is part of; this and the rest are missing in a line that is not understood.
    pub map: Option<String>,
    /// Who comes: a name, or `/` and a regular expression.
    pub user: Option<String>,
    /// As whom he may: a name, `all`, `+group`, a regular expression, or one with a part of the other in it.
    pub role: Option<String>,
    /// What is wrong with the line.
    pub error: Option<String>,
}

impl Mapping {
    /// Whether somebody becomes this role by it.
    pub fn leads_to(&self, map: &str, role: &str, groups: &BTreeSet<String>) -> bool {
        let by_part = self.user.as_deref().is_some_and(|user| user.starts_with('/'));
        self.map.as_deref() == Some(map)
            && self.role.as_deref().is_some_and(|text| match text.strip_prefix('+') {
                Some(group) => groups.contains(group),
                None => text == "all" || text == role || text.starts_with('/') || (by_part && text.contains("\\1")),
            })
    }
}

/// Who comes.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    /// The database.
    pub database: &'a str,
    /// The role.
    pub user: &'a str,
    /// The roles it is in.
    pub groups: &'a BTreeSet<String>,
    /// From where; None: through the socket.
    pub address: Option<IpAddr>,
    /// The names of that place.
    pub names: &'a [&'a str],
    /// Encrypted.
    pub tls: bool,
}

/// How well a line guards what it lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// It lets nobody in.
    Shut,
    /// By a certificate, the operating system, a challenge that gives no password away, or an authority outside.
    Strong,
    /// By a password that can be stolen on the way or from the server.
    Weak,
    /// Whoever says so is let in.
    Open,
}

impl Rule {
    /// The line that decides about this caller.
    pub fn deciding<'a>(rules: &'a [Self], caller: &Caller<'_>) -> Option<&'a Self> {
        rules.iter().find(|rule| rule.fits(caller))
    }

    /// Whether it is about this caller.
    pub fn fits(&self, caller: &Caller<'_>) -> bool {
        let kind = match (self.kind.as_deref(), caller.address) {
            (Some("local"), None) | (Some("host"), Some(_)) => true,
            (Some("hostssl"), Some(_)) => caller.tls,
            (Some("hostnossl"), Some(_)) => !caller.tls,
            _ => false,
        };
        kind && self.is_about(caller.database)
            && self.has_user(caller)
            && caller.address.is_none_or(|address| self.has_address(address, caller.names))
    }

    /// Whether it is about a database, for somebody. `replication` is about physical replication only.
    pub fn is_about(&self, database: &str) -> bool {
        self.databases.iter().flatten().any(|text| {
            matches!(text.as_str(), "all" | "sameuser" | "samerole" | "samegroup")
                || text == database
                || text.starts_with('/')
        })
    }

    fn has_user(&self, caller: &Caller<'_>) -> bool {
        self.users.iter().flatten().any(|text| match text.strip_prefix('+') {
            Some(group) => caller.groups.contains(group),
            None => text == "all" || text == caller.user || text.starts_with('/'),
        })
    }

    fn has_address(&self, caller: IpAddr, names: &[&str]) -> bool {
        let Some(address) = self.address.as_deref() else { return false };
        if matches!(address, "all" | "samehost" | "samenet") {
            // Nobody but the server knows its other addresses.
            return address != "samehost" || caller.is_loopback();
        }
        match (address.parse(), self.netmask.as_deref().map(str::parse)) {
            (Ok(IpAddr::V4(own)), Some(Ok(IpAddr::V4(mask)))) => {
                matches!(caller, IpAddr::V4(caller) if caller & mask == own & mask)
            }
            (Ok(IpAddr::V6(own)), Some(Ok(IpAddr::V6(mask)))) => {
                matches!(caller, IpAddr::V6(caller) if caller & mask == own & mask)
            }
            // The server looks the caller's name up and back.
            _ => names.iter().any(|name| {
                let (name, address) = (name.to_ascii_lowercase(), address.to_ascii_lowercase());
                name == address || address.starts_with('.') && name.ends_with(&address)
            }),
        }
    }

    /// Only this host gets in by it.
    pub fn is_for_this_host(&self) -> bool {
        match self.address.as_deref() {
            None | Some("samehost") => true,
            Some(address) => match address.parse::<IpAddr>() {
                // 127.0.0.1 with a wide mask is the whole world.
                Ok(own) => own.is_loopback() && !self.has_address(outside(own), &[]),
                Err(_) => address.eq_ignore_ascii_case("localhost"),
            },
        }
    }

    /// Anybody's network gets in by it.
    pub fn is_for_everywhere(&self) -> bool {
        match self.address.as_deref() {
            Some("all") => true,
            Some(address) => {
                address.parse::<IpAddr>().is_ok()
                    && self.netmask.as_deref().is_some_and(|mask| matches!(mask, "0.0.0.0" | "::"))
            }
            None => false,
        }
    }

    /// It is about all databases.
    pub fn is_for_all_databases(&self) -> bool {
        self.databases.iter().flatten().any(|text| text == "all")
    }

    /// It is about all roles.
    pub fn is_for_all_roles(&self) -> bool {
        self.users.iter().flatten().any(|text| text == "all")
    }

    /// Who comes has to show a certificate, which the server verifies.
    pub fn wants_certificate(&self) -> bool {
        self.method.as_deref() == Some("cert") || self.options.iter().any(|option| option.starts_with("clientcert="))
    }

    /// The map that says which roles a name may take.
    pub fn map(&self) -> Option<&str> {
        self.options.iter().find_map(|option| option.strip_prefix("map="))
    }

    /// Through the network without encryption.
    pub fn may_be_plain(&self) -> bool {
        matches!(self.kind.as_deref(), Some("host" | "hostnossl"))
    }

    /// How well it guards.
    pub fn guard(&self) -> Guard {
        let proven = self.options.iter().any(|option| option == "clientcert=verify-full");
        match self.method.as_deref() {
            None | Some("reject") => Guard::Shut,
            Some(_) if proven => Guard::Strong,
            // `ident` asks the host that the caller comes from.
            Some("trust" | "ident") => Guard::Open,
            Some("password" | "md5") => Guard::Weak,
            Some(_) => Guard::Strong,
        }
    }
}

/// An address that is in no network of loopback addresses.
fn outside(of: IpAddr) -> IpAddr {
    match of {
        IpAddr::V4(_) => IpAddr::from([192, 0, 2, 1]),
        IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list =
            |list: &Option<Vec<String>>| list.iter().flatten().map(|text| word(text)).collect::<Vec<_>>().join(",");
        write!(f, "{} {} {}", self.kind.as_deref().unwrap_or("?"), list(&self.databases), list(&self.users))?;
        if let Some(address) = &self.address {
            let bits = self.netmask.as_deref().and_then(|mask| mask.parse().ok()).map(|mask| match mask {
                IpAddr::V4(mask) => mask.to_bits().count_ones(),
                IpAddr::V6(mask) => mask.to_bits().count_ones(),
            });
            write!(f, " {address}")?;
            bits.map_or(Ok(()), |bits| write!(f, "/{bits}"))?;
        }
        write!(f, " {}", self.method.as_deref().unwrap_or("?"))?;
        self.options.iter().try_for_each(|option| write!(f, " {option}"))
    }
}

/// A name or keyword, as the file wants it.
fn word(text: &str) -> Cow<'_, str> {
    let plain = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || ",\"#".contains(c));
    if plain { text.into() } else { format!("\"{}\"", text.replace('"', "\"\"")).into() }
}

/// A name, and no keyword, as the file wants it.
pub fn name(text: &str) -> Cow<'_, str> {
    let keyword = matches!(text, "all" | "sameuser" | "samerole" | "samegroup" | "replication");
    if keyword || text.starts_with(['+', '/', '@']) { format!("\"{text}\"").into() } else { word(text) }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A line, as in the file; addresses as `address/mask`.
    pub fn rule(text: &str) -> Rule {
        let mut words = text.split_whitespace().map(str::to_owned);
        let list = |word: Option<String>| word.map(|word| word.split(',').map(str::to_owned).collect());
        let kind = words.next();
        let (databases, users) = (list(words.next()), list(words.next()));
        let address = if kind.as_deref() == Some("local") { None } else { words.next() };
        let (address, netmask) = match address.as_deref().and_then(|text| text.split_once('/')) {
            Some((address, mask)) => (Some(address.to_owned()), Some(mask.to_owned())),
            None => (address, None),
        };
        let method = words.next();
        Rule {
            file: "/pg_hba.conf".into(),
            line: 1,
            kind,
            databases,
            users,
            address,
            netmask,
            method,
            options: words.collect(),
            error: None,
        }
    }

    fn caller<'a>(groups: &'a BTreeSet<String>, address: Option<&str>, tls: bool) -> Caller<'a> {
        let address = address.map(|text| text.parse().unwrap());
        Caller { database: "app", user: "replicator", groups, address, names: &["gideon.example.net"], tls }
    }

    #[test]
    fn a_line_fits_by_kind_database_role_and_address() {
        let groups = BTreeSet::from(["replicator".to_owned(), "readers".to_owned()]);
        let from = |address: &str| caller(&groups, Some(address), true);
        for (text, address, fits) in [
            ("hostssl app replicator all cert", "192.0.2.7", true),
            ("host app replicator all cert", "192.0.2.7", true),
            ("hostnossl app replicator all cert", "192.0.2.7", false),
            ("hostgssenc app replicator all cert", "192.0.2.7", false),
            ("local app replicator cert", "192.0.2.7", false),
            ("hostssl replication replicator all cert", "192.0.2.7", false),
            ("hostssl other,app +readers all cert", "192.0.2.7", true),
            ("hostssl app +writers all cert", "192.0.2.7", false),
            ("hostssl app rosuav all cert", "192.0.2.7", false),
            ("hostssl app /^rep all cert", "192.0.2.7", true),
            ("hostssl all all 192.0.2.0/255.255.255.0 cert", "192.0.2.7", true),
            ("hostssl all all 192.0.2.0/255.255.255.0 cert", "192.0.3.7", false),
            ("hostssl all all 192.0.2.0/255.255.255.0 cert", "2001:db8::7", false),
            ("hostssl all all 2001:db8::/ffff:ffff:: cert", "2001:db8::7", true),
            ("hostssl all all samehost cert", "127.0.0.1", true),
            ("hostssl all all samehost cert", "192.0.2.7", false),
            ("hostssl all all Gideon.example.net cert", "192.0.2.7", true),
            ("hostssl all all .example.net cert", "192.0.2.7", true),
            ("hostssl all all rodan.example.net cert", "192.0.2.7", false),
        ] {
            assert_eq!(rule(text).fits(&from(address)), fits, "{text}: {address}");
        }
        assert!(rule("local all all peer").fits(&caller(&groups, None, false)));
        assert!(!rule("host all all all trust").fits(&caller(&groups, None, false)));
    }

    #[test]
    fn the_first_line_that_fits_decides() {
        let groups = BTreeSet::new();
        let rules = [rule("hostssl app replicator 192.0.2.0/255.255.255.0 reject"), rule("hostssl app all all cert")];
        let method = |address| {
            Rule::deciding(&rules, &caller(&groups, Some(address), true)).and_then(|rule| rule.method.as_deref())
        };
        assert_eq!(method("192.0.2.7"), Some("reject"));
        assert_eq!(method("198.51.100.7"), Some("cert"));
        assert_eq!(Rule::deciding(&rules, &caller(&groups, Some("198.51.100.7"), false)), None);
    }

    #[test]
    fn how_wide_a_line_is() {
        assert!(rule("host all all 127.0.0.1/255.255.255.255 trust").is_for_this_host());
        assert!(rule("host all all ::1/ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff trust").is_for_this_host());
        assert!(!rule("host all all 127.0.0.1/0.0.0.0 trust").is_for_this_host());
        assert!(!rule("host all all 192.0.2.1/255.255.255.255 trust").is_for_this_host());
        assert!(rule("host all all 0.0.0.0/0.0.0.0 md5").is_for_everywhere());
        assert!(rule("host all all ::/:: md5").is_for_everywhere());
        assert!(!rule("host all all samenet md5").is_for_everywhere());
        assert!(rule("hostssl all app all cert").is_for_all_databases());
        assert!(!rule("hostssl app,other all all cert").is_for_all_databases());
        assert!(rule("hostssl app all all cert").is_for_all_roles());
        assert!(!rule("hostssl all app all cert").is_for_all_roles());
        assert_eq!(rule("host all all all trust").guard(), Guard::Open);
        assert_eq!(rule("hostssl all all all trust clientcert=verify-full").guard(), Guard::Strong);
        assert_eq!(rule("hostssl all all all trust clientcert=verify-ca").guard(), Guard::Open);
        assert_eq!(rule("host all all all reject").guard(), Guard::Shut);
    }

    #[test]
    fn a_map_leads_to_a_role_by_name_group_or_pattern() {
        let groups = BTreeSet::from(["replicator".to_owned(), "readers".to_owned()]);
        let leads = |map: &str, user: &str, role: &str| {
            let some = |text: &str| Some(text.to_owned());
            let mapping = Mapping { map: some(map), user: some(user), role: some(role), ..Mapping::default() };
            mapping.leads_to("m", "replicator", &groups)
        };
        for role in ["replicator", "all", "+readers", "/^rep"] {
            assert!(leads("m", "gideon.example.net", role), "{role}");
            assert!(!leads("other", "gideon.example.net", role), "{role}");
        }
        assert!(leads("m", "/^(.*)[.]example[.]net$", "\\1") && !leads("m", "gideon", "\\1"));
        assert!(!leads("m", "replicator", "agent") && !leads("m", "replicator", "+writers"));
        assert!(!Mapping::default().leads_to("m", "replicator", &groups));
    }

    #[test]
    fn a_line_is_shown_as_it_is_written() {
        assert_eq!(
            rule("hostssl a,b +c 192.0.2.0/255.255.255.0 cert map=m").to_string(),
            "hostssl a,b +c 192.0.2.0/24 cert map=m"
        );
        assert_eq!(rule("local all all peer").to_string(), "local all all peer");
    }
}
