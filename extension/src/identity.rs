//! Who a database is: the value of its setting `stillebot.identity`. Pure: text in, decisions out.
//!
//! The setting travels with every copy of the data directory, and so does everything else that PostgreSQL knows of itself. What
//! tells the copy from its original is where it is: a file that is there once, was made once and is rewritten in place from
//! then on. Its inode number and time of birth are the same after a restart, a crash and a reboot, and others in every copy and in
//! whatever was restored, also to the same place: file systems give numbers again, but not times. Neither the device
//! number, which a reboot may change, nor the machine's own id is part of it: a data directory may move with its disk. A
//! copy of the disk itself, as of a virtual machine, is beyond this.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::state::{Mode, State, ascii, instant};

/// The longest name of a node, in bytes; as long as PostgreSQL's names, and short enough to be part of a state.
pub const MAX_NAME: usize = 63;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// What the operator and the agent call this node.
    pub node: String,
    /// What all nodes of a pair have in common.
    pub pair: String,
    /// What no other node has. Made once, kept for ever.
    pub id: String,
    /// [`Home`] as text.
    pub home: String,
    /// When this node was first told who it is.
    #[serde(default, with = "instant", skip_serializing_if = "Option::is_none")]
    pub since: Option<SystemTime>,
    /// Subscriptions that were switched off because this is a copy: adoption switches them on again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parked: Vec<String>,
}

/// Where a database is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    pub system: u64,
    pub database: u32,
    /// Of the file `global/pg_control`; 0 if it cannot be asked.
    pub inode: u64,
    /// When that file was made, in nanoseconds since 1970; `None` where the file system does not remember.
    pub born: Option<u128>,
}

impl Home {
    pub fn text(&self) -> String {
        let born = self.born.map_or_else(|| "?".into(), |born| born.to_string());
        format!("{}/{}/{}/{born}", self.system, self.database, self.inode)
    }

    /// Whether that text is of this place. A time that only one of the two has says nothing: another kernel, the same disk.
    fn is(&self, text: &str) -> bool {
        let here = self.text();
        match (here.rsplit_once('/'), text.rsplit_once('/')) {
            (Some((here, born)), Some((there, made))) => here == there && (born == made || born == "?" || made == "?"),
            _ => false,
        }
    }
}

impl Identity {
    /// Reads the setting. What cannot be read is an identity that is nowhere at home, for unknown counts as down.
    pub fn parse(setting: &str) -> Option<Identity> {
        if setting.is_empty() {
            return None;
        }
        Some(serde_json::from_str(setting).unwrap_or_else(|_| Identity {
            node: "unknown".into(),
            pair: String::new(),
            id: String::new(),
            home: String::new(),
            since: None,
            parked: Vec::new(),
        }))
    }

    /// In ASCII: the record is in a catalog that databases of all encodings share.
    pub fn to_json(&self) -> String {
        ascii(&serde_json::to_string(self).expect("an identity has string keys and no fallible parts"))
    }

    pub fn is_foreign(&self, home: &Home) -> bool {
        !home.is(&self.home)
    }

    /// What is wrong if the database is not where it was told who it is.
    pub fn why(&self) -> String {
        if self.home.is_empty() {
            return "its recorded identity cannot be read".into();
        }
        format!(
            "this data directory is a copy of that of node {}; what it would replicate is the business of the original",
            self.node
        )
    }

    /// The state of a copy that has just woken, whatever that of the original was.
    pub fn foreign_state(&self, now: SystemTime) -> State {
        State { state: Mode::Down, since: Some(now), foreign: true, reason: Some(self.why()), ..State::up() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::UNIX_EPOCH;

    const HOME: Home = Home { system: 7_431_000_000_000_000_001, database: 16384, inode: 42, born: Some(5) };

    fn identity(home: &Home) -> Identity {
        Identity {
            node: "sikorsky".into(),
            pair: "p".into(),
            id: "i".into(),
            home: home.text(),
            since: Some(UNIX_EPOCH),
            parked: vec!["multihome".into()],
        }
    }

    #[test]
    fn a_database_is_at_home_where_it_was_told_so_and_nowhere_else() {
        let identity = identity(&HOME);
        assert!(!identity.is_foreign(&HOME));
        for other in [
            Home { system: 1, ..HOME },
            Home { database: 1, ..HOME },
            Home { inode: 1, ..HOME },
            Home { born: Some(6), ..HOME }, // The number was given again.
        ] {
            assert!(identity.is_foreign(&other), "{other:?}");
        }
    }

    #[test]
    fn a_time_of_birth_that_is_not_known_says_nothing() {
        let unknown = Home { born: None, ..HOME };
        assert!(!identity(&HOME).is_foreign(&unknown) && !identity(&unknown).is_foreign(&HOME));
        assert!(identity(&unknown).is_foreign(&Home { inode: 1, ..HOME }));
    }

    #[test]
    fn what_cannot_be_read_is_foreign() {
        assert_eq!(Identity::parse(""), None);
        for text in ["{", "{}", "sikorsky"] {
            let identity = Identity::parse(text).unwrap();
            assert!(identity.is_foreign(&HOME) && identity.foreign_state(UNIX_EPOCH).state == Mode::Down, "{text}");
        }
    }

    proptest! {
        #[test]
        fn an_identity_survives_being_written_and_read(node in ".{1,40}", pair in ".{0,40}", parked in proptest::collection::vec(".{1,20}", 0..3)) {
            let identity = Identity { node, pair, parked, ..identity(&HOME) };
            prop_assert!(identity.to_json().is_ascii());
            prop_assert_eq!(Identity::parse(&identity.to_json()), Some(identity));
        }

        #[test]
        fn the_state_of_a_copy_fits_into_shared_memory(node in ".{0,63}") {
            let mut node = node;
            while node.len() > MAX_NAME {
                node.pop();
            }
            let state = Identity { node, ..identity(&HOME) }.foreign_state(SystemTime::now());
            prop_assert!(state.to_json().len() <= 1500);
        }
    }
}
