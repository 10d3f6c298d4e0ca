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
    ADVANCE_SEQUENCES = "advance_sequences.sql";
    APPLIED = "applied.sql";
    ASSIGN = "assign.sql";
    CERT_OWN = "cert_own.sql";
    CERT_SENDER = "cert_sender.sql";
    CERT_WORKER = "cert_worker.sql";
    CHANGE_CONCLUDE = "change_conclude.sql";
    CHANGE_DIGEST = "change_digest.sql";
    CHANGE_MAY = "change_may.sql";
    CHANGE_SEEN = "change_seen.sql";
    CHANGE_TELLS = "change_tells.sql";
    CHANGE_WRITTEN = "change_written.sql";
    CLOCK = "clock.sql";
    CLOSE_WINDOW = "close_window.sql";
    CONFLICT = "conflict.sql";
    CONFLICTS = "conflicts.sql";
    CONFLICTS_BLOCKING = "conflicts_blocking.sql";
    CONFLICTS_OPEN = "conflicts_open.sql";
    CONFLICTS_RELATED = "conflicts_related.sql";
    CONFLICT_CHANGES = "conflict_changes.sql";
    CONNECTIONS = "connections.sql";
    COPY_TABLE = "copy_table.sql";
    COUNT_ROWS = "count_rows.sql";
    DEINIT_OWNED = "deinit_owned.sql";
    DEINIT_SLOT = "deinit_slot.sql";
    DOWN = "down.sql";
    DRAIN = "drain.sql";
    END_SESSION = "end_session.sql";
    EVEN = "even.sql";
    FILE_MISSING = "file_missing.sql";
    FLUSHED = "flushed.sql";
    FREE_SPACE = "free_space.sql";
    GRANTS = "grants.sql";
    HOP_CLOSE = "hop_close.sql";
    IDENTITY = "identity.sql";
    LOCK = "lock.sql";
    LOCK_HOLDER = "lock_holder.sql";
    MAKE_ROOM = "make_room.sql";
    NOTE = "note.sql";
    NOTIFY = "notify.sql";
    OPEN_WINDOW = "open_window.sql";
    POSITION = "position.sql";
    PUT = "put.sql";
    RECONNECT = "reconnect.sql";
    REFRESH = "refresh.sql";
    RELOAD = "reload.sql";
    REMOVE = "remove.sql";
    RESOLVE = "resolve.sql";
    RESTART_APPLY = "restart_apply.sql";
    SCHEMA = "schema.sql";
    SCHEMA_FINGERPRINT = "schema_fingerprint.sql";
    SCHEMA_TELLS = "schema_tells.sql";
    SELF = "self.sql";
    SENDERS = "senders.sql";
    SEQUENCES = "sequences.sql";
    SESSIONS = "sessions.sql";
    SETTLE = "settle.sql";
    SETUP_COPYING = "setup_copying.sql";
    SETUP_MAKE_SLOT = "setup_make_slot.sql";
    SETUP_PROBE = "setup_probe.sql";
    SETUP_SEEN = "setup_seen.sql";
    SETUP_SELF = "setup_self.sql";
    SETUP_SIZES = "setup_sizes.sql";
    SETUP_SLOT = "setup_slot.sql";
    SETUP_STOP_MAKING = "setup_stop_making.sql";
    SETUP_TROUBLE = "setup_trouble.sql";
    SETUP_UNPROBE = "setup_unprobe.sql";
    SETUP_WAITING = "setup_waiting.sql";
    SET_HOP = "set_hop.sql";
    SKIP = "skip.sql";
    STATE = "state.sql";
    STRIDE = "stride.sql";
    SUBSCRIPTIONS = "subscriptions.sql";
    SURVEY_CONNECTIONS = "survey_connections.sql";
    SURVEY_GRANTS = "survey_grants.sql";
    SURVEY_IDENTITY = "survey_identity.sql";
    SURVEY_MAPPINGS = "survey_mappings.sql";
    SURVEY_NODE = "survey_node.sql";
    SURVEY_PUBLICATIONS = "survey_publications.sql";
    SURVEY_ROLES = "survey_roles.sql";
    SURVEY_RULES = "survey_rules.sql";
    SURVEY_SETTINGS = "survey_settings.sql";
    SURVEY_SLOTS = "survey_slots.sql";
    SURVEY_SUBSCRIPTIONS = "survey_subscriptions.sql";
    SURVEY_TABLES = "survey_tables.sql";
    TABLES = "tables.sql";
    TELL = "tell.sql";
    UNLOCK = "unlock.sql";
    UP = "up.sql";
    VERSIONS = "versions.sql";
    WATCH_CONFLICTS = "watch_conflicts.sql";
    WATCH_LOCK = "watch_lock.sql";
    WATCH_LOCKS = "watch_locks.sql";
    WATCH_NODE = "watch_node.sql";
    WATCH_SLOTS = "watch_slots.sql";
    WATCH_STATUS = "watch_status.sql";
    WATCH_SUBSCRIPTIONS = "watch_subscriptions.sql";
    WRITABLE = "writable.sql";
}
