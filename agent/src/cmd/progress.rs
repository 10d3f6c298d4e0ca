//! How far something is: bars on a terminal, lines elsewhere. On stderr, for stdout has the result.
//!
//! Deliberately decides nothing and forgets everything.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::condition::Size;

/// Between two lines about one table, where there is no terminal.
const PAUSE: Duration = Duration::from_secs(5);

/// Where progress is shown.
pub struct Progress {
    quiet: bool,
    terminal: bool,
}

/// The tables that are being copied.
pub struct Tables<'a> {
    progress: &'a Progress,
    bars: MultiProgress,
    /// By table: its bar, and the rows it is expected to have.
    shown: BTreeMap<String, (ProgressBar, bool)>,
    sizes: &'a BTreeMap<String, i64>,
    said: Instant,
}

impl Progress {
    /// Quiet where only one document may be printed.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, terminal: std::io::stderr().is_terminal() }
    }

    /// A line.
    pub fn say(&self, line: &str) {
        if !self.quiet {
            anstream::eprintln!("{line}");
        }
    }

    /// Begins with tables. The sizes are estimates of their rows; negative: not known.
    pub fn tables<'a>(&'a self, sizes: &'a BTreeMap<String, i64>) -> Tables<'a> {
        Tables { progress: self, bars: MultiProgress::new(), shown: BTreeMap::new(), sizes, said: Instant::now() }
    }
}

impl Tables<'_> {
    /// Shows how far they are: table, whether it is done, rows, bytes.
    pub fn show(&mut self, node: &str, tables: &[(String, bool, i64, i64)]) {
        if self.progress.quiet {
            return;
        }
        let pause_over = self.said.elapsed() >= PAUSE;
        for (table, copied, rows, bytes) in tables {
            if !self.shown.contains_key(table) {
                // What is done already when one begins to look is not shown.
                if *copied && self.shown.is_empty() {
                    continue;
                }
                let bar = if self.progress.terminal { self.bars.add(self.bar(table)) } else { ProgressBar::hidden() };
                self.shown.insert(table.clone(), (bar, false));
            }
            let Some((bar, done)) = self.shown.get_mut(table) else { continue };
            if *done {
                continue;
            }
            let amount = format!("{rows} rows, {}", Size(bytes.unsigned_abs()));
            if *copied {
                *done = true;
                bar.finish_with_message("copied");
                if !self.progress.terminal {
                    self.progress.say(&format!("      {node}: {table}: copied"));
                }
            } else if *rows > 0 {
                bar.set_position(rows.unsigned_abs());
                bar.set_message(amount.clone());
                if !self.progress.terminal && pause_over {
                    self.progress.say(&format!("      {node}: {table}: {amount}"));
                }
            }
        }
        if pause_over {
            self.said = Instant::now();
        }
    }

    fn bar(&self, table: &str) -> ProgressBar {
        let rows = self.sizes.get(table).copied().filter(|rows| *rows > 0);
        let (bar, template) = match rows {
            Some(rows) => (ProgressBar::new(rows.unsigned_abs()), "      {prefix:40!} {bar:20} {percent:>3} % {msg}"),
            None => (ProgressBar::no_length(), "      {prefix:40!} {spinner} {msg}"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(table.to_owned());
        bar
    }

    /// Leaves the bars as they are.
    pub fn finish(self) {
        for (bar, _) in self.shown.into_values() {
            bar.abandon();
        }
    }
}
