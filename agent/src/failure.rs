//! How a command ends when it does not succeed: the exit code, what failed, what to do next.
//!
//! Deliberately knows nothing of databases; it is a message with a meaning for the caller's shell. Never holds a secret.

use std::process::ExitCode;

use serde_json::{Map, Value};

/// What a failure means to whoever called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing is changed, or what was changed is undone. Exit code 1.
    Undone,
    /// The command line makes no sense. Exit code 2.
    Usage,
    /// It stopped half-way and a person has to go on; the hint says how. Exit code 3.
    NeedsPerson,
    /// A node cannot be reached, and nothing is changed. Exit code 69 (EX_UNAVAILABLE).
    Unreachable,
    /// The configuration is wrong. Exit code 78 (EX_CONFIG).
    Configuration,
}

impl Kind {
    /// The exit code as a number.
    pub fn code(self) -> u8 {
        match self {
            Self::Undone => 1,
            Self::Usage => 2,
            Self::NeedsPerson => 3,
            Self::Unreachable => 69,
            Self::Configuration => 78,
        }
    }

    /// The word for it in `--json`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Undone => "failed",
            Self::Usage => "usage",
            Self::NeedsPerson => "needs_person",
            Self::Unreachable => "unreachable",
            Self::Configuration => "configuration",
        }
    }
}

impl From<Kind> for ExitCode {
    fn from(kind: Kind) -> Self {
        Self::from(kind.code())
    }
}

/// A command that did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What it means.
    pub kind: Kind,
    /// What failed, and on which node.
    pub message: String,
    /// More about it, perhaps in several lines.
    pub detail: Option<String>,
    /// What to do next.
    pub hint: Option<String>,
    /// What the command has to report all the same; goes into the `--json` document.
    pub report: Map<String, Value>,
}

impl Failure {
    /// A failure of that kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), detail: None, hint: None, report: Map::new() }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds a line to what there is about it.
    #[must_use]
    pub fn also(mut self, line: &str) -> Self {
        self.detail = Some(self.detail.map_or_else(|| line.to_owned(), |detail| format!("{detail}\n{line}")));
        self
    }

    /// Adds more about it.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }
}
