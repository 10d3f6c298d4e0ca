//! The names of the queries in `sql/`, one a file.
//!
//! Deliberately nothing else: whoever needs a query says its name, whoever wants to know what it does opens the file.

macro_rules! queries {
    ($($name:ident = $file:literal;)*) => {
        $(#[doc = concat!("`sql/", $file, "`")] pub const $name: &str = include_str!(concat!("../sql/", $file));)*
    };
}

queries! {
    ACTIVATE = "activate.sql";
    ACTIVE = "active.sql";
    APPLIED = "applied.sql";
    CLOCK = "clock.sql";
    DOWN = "down.sql";
    DRAIN = "drain.sql";
    END_SESSION = "end_session.sql";
    IDENTITY = "identity.sql";
    LOCK = "lock.sql";
    LOCK_HOLDER = "lock_holder.sql";
    POSITION = "position.sql";
    REFRESH = "refresh.sql";
    SELF = "self.sql";
    SENDERS = "senders.sql";
    SESSIONS = "sessions.sql";
    SET_HOP = "set_hop.sql";
    STATE = "state.sql";
    SUBSCRIPTIONS = "subscriptions.sql";
    UP = "up.sql";
}
