//! What a database is told about itself: the value of its setting `stillebot.state`. Pure: text in, decisions out.
//!
//! The setting is attached to the database with `alter database .. set`, so PostgreSQL itself keeps it through
//! crashes, base backups and promotions, and hands it to every session before its first statement. A database that
//! is simply up has no setting at all: without the extension it is a plain PostgreSQL database.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Up,
    Down,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub state: Mode,
    /// Down: the instant of the first refused write. Up: when it was opened, if that was since the server started.
    #[serde(default, with = "instant", skip_serializing_if = "Option::is_none")]
    pub since: Option<SystemTime>,
    /// The session user of the call that led here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Up, and the only writable node: see [`State::after_restart`].
    #[serde(default, skip_serializing_if = "is_false")]
    pub sole: bool,
    /// Down because it was `sole` when its server stopped.
    #[serde(default, skip_serializing_if = "is_false")]
    pub rejoin: bool,
    /// Down because its data directory is a copy of another node's: see identity.rs. Found at each start, never recorded.
    #[serde(default, skip_serializing_if = "is_false")]
    pub foreign: bool,
    /// The hop that took it down, as the agent wrote it, until that hop is concluded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hop: Option<serde_json::Value>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl State {
    pub fn up() -> State {
        State {
            state: Mode::Up,
            since: None,
            by: None,
            reason: None,
            sole: false,
            rejoin: false,
            foreign: false,
            hop: None,
        }
    }

    /// Reads the setting. Nothing there is up; what cannot be read is down, for unknown counts as down.
    pub fn parse(setting: &str) -> State {
        if setting.is_empty() {
            return State::up();
        }
        serde_json::from_str(setting).unwrap_or_else(|_| State {
            state: Mode::Down,
            reason: Some("its recorded state cannot be read".into()),
            ..State::up()
        })
    }

    /// The setting to attach to the database; `None` means none.
    pub fn setting(&self) -> Option<String> {
        (self.state == Mode::Down || self.sole).then(|| self.to_json())
    }

    /// In ASCII: the record is in a catalog that databases of all encodings share.
    pub fn to_json(&self) -> String {
        ascii(&serde_json::to_string(self).expect("a state has string keys and no fallible parts"))
    }

    /// What the recorded state means to a server that has just started.
    ///
    /// Down stays down and up stays up, but for the only writable node of a pair: while its server was away somebody
    /// may have opened its peer, and it has no way to know. Unknown counts as down.
    pub fn after_restart(self, now: SystemTime) -> State {
        if self.state == Mode::Up && self.sole {
            State { state: Mode::Down, since: Some(now), rejoin: true, reason: None, ..self }
        } else {
            self
        }
    }

    /// The hint of a refused write: who, when, why, and the way out.
    pub fn hint(&self) -> String {
        if self.foreign {
            let why = self.reason.as_deref().unwrap_or("this data directory is a copy");
            return format!(
                "It is closed because {why}. If the original is gone for good, SELECT stillebot_adopt_identity(); otherwise \
                 stop this server."
            );
        }
        if self.rejoin {
            return "This was the only writable node when its server stopped; its peer may have been opened since. If no \
                    other node is writable, bring it up with \"stillebot-agent up\" or SELECT stillebot_up()."
                .into();
        }
        let mut hint = String::from("The database was taken down");
        if let Some(by) = &self.by {
            hint += &format!(" by {by}");
        }
        if let Some(since) = self.since {
            hint += &format!(" at {}", humantime::format_rfc3339_seconds(since));
        }
        if let Some(reason) = &self.reason {
            hint += &format!(": {}", reason.trim_end_matches('.'));
        }
        hint + ". SELECT stillebot_up() brings it up."
    }
}

/// JSON with everything beyond ASCII escaped. Such characters can only be inside of its strings.
pub fn ascii(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for letter in json.chars() {
        if letter.is_ascii() {
            escaped.push(letter);
        } else {
            for unit in letter.encode_utf16(&mut [0; 2]) {
                escaped += &format!("\\u{unit:04x}");
            }
        }
    }
    escaped
}

/// Instants as RFC 3339 text in UTC, with microseconds: PostgreSQL reads it as timestamptz, and so do people in \drds.
pub mod instant {
    use super::*;
    use serde::{Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(at: &Option<SystemTime>, to: S) -> Result<S::Ok, S::Error> {
        match at {
            Some(at) => to.collect_str(&humantime::format_rfc3339_micros(*at)),
            None => to.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SystemTime>, D::Error> {
        Option::<String>::deserialize(from)?
            .map(|text| humantime::parse_rfc3339(&text).map_err(D::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn states() -> impl Strategy<Value = State> {
        (
            prop_oneof![Just(Mode::Up), Just(Mode::Down)],
            proptest::option::of(0u64..4_000_000_000_000_000),
            proptest::option::of(".{0,40}"),
            proptest::option::of(".{0,40}"),
            any::<(bool, bool, bool)>(),
            proptest::option::of("[a-z]{1,8}"),
        )
            .prop_map(|(state, since, by, reason, (sole, rejoin, foreign), hop)| State {
                state,
                since: since.map(|us| UNIX_EPOCH + Duration::from_micros(us)),
                by,
                reason,
                sole,
                rejoin,
                foreign,
                hop: hop.map(|to| serde_json::json!({ "to": to })),
            })
    }

    proptest! {
        #[test]
        fn a_state_survives_being_written_and_read(state in states()) {
            prop_assert!(state.to_json().is_ascii());
            prop_assert_eq!(State::parse(&state.to_json()), state);
        }

        #[test]
        fn whatever_the_setting_says_reading_it_never_fails(text in ".{1,200}") {
            let state = State::parse(&text);
            prop_assert!(state.state == Mode::Down || serde_json::from_str::<State>(&text).is_ok());
        }

        #[test]
        fn only_a_plain_up_survives_a_restart_as_up(state in states()) {
            let recorded = state.setting().map_or_else(State::up, |text| State::parse(&text));
            let woken = recorded.after_restart(UNIX_EPOCH);
            prop_assert_eq!(woken.state == Mode::Up, state.state == Mode::Up && !state.sole);
        }

        #[test]
        fn a_hint_names_who_and_why(by in "[a-z]{1,20}", reason in "[a-z ]{1,40}") {
            let down = State { state: Mode::Down, by: Some(by.clone()), reason: Some(reason.clone()), ..State::up() };
            prop_assert!(down.hint().contains(&by) && down.hint().contains(&reason));
            let copy = State { foreign: true, ..down };
            prop_assert!(copy.hint().contains(&reason) && copy.hint().contains("stillebot_adopt_identity()"));
        }
    }

    #[test]
    fn what_cannot_be_read_is_down() {
        for text in ["up", "{", "{}", r#"{"state":"sideways"}"#, r#"{"state":"up","since":"yesterday"}"#] {
            assert_eq!(State::parse(text).state, Mode::Down, "{text}");
        }
    }
}
