//! What the audience sees: headings, a narrator's lines, and ✓ or ✗ for what was promised. Keeps count of the ✗.
//!
//! Knows nothing of servers. Colours on a terminal only.

use std::{env, fmt::Display, io::IsTerminal};

/// Longer lines are broken.
const WIDTH: usize = 100;

pub struct Stage {
    colours: bool,
    scenes: usize,
    broken: Vec<String>,
}

impl Stage {
    pub fn new() -> Self {
        let colours = std::io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none();
        Self { colours, scenes: 0, broken: Vec::new() }
    }

    /// The next scene, and the narrator's words before it.
    pub fn scene(&mut self, title: &str, narration: &str) {
        self.scenes += 1;
        let number = self.scenes;
        println!("\n{}", self.paint("1", &format!("{number}. {title}")));
        self.say(narration);
    }

    /// The narrator.
    pub fn say(&self, narration: &str) {
        for line in wrap(narration, " ", WIDTH - 3) {
            println!("   {}", self.paint("2", &line));
        }
    }

    /// A promise that was just put to the test.
    pub fn promise(&mut self, kept: bool, what: impl Display) {
        let what = what.to_string();
        let mark = if kept { self.paint("32", "✓") } else { self.paint("1;31", "✗") };
        for (number, line) in wrap(&what, " ", WIDTH - 5).iter().enumerate() {
            println!("   {} {line}", if number == 0 { &mark } else { " " });
        }
        if !kept {
            self.broken.push(what);
        }
    }

    /// A promise about several things at once: their names beside its label.
    pub fn group(&mut self, kept: bool, label: &str, names: &[&str]) {
        const LABEL: usize = 24;
        let mark = if kept { self.paint("32", "✓") } else { self.paint("1;31", "✗") };
        for (number, line) in wrap(&names.join(" · "), " · ", WIDTH - 5 - LABEL).iter().enumerate() {
            let (mark, label) = if number == 0 { (mark.as_str(), label) } else { (" ", "") };
            println!("   {mark} {label:<LABEL$}{line}");
        }
        if !kept {
            self.broken.push(format!("{label}: {}", names.join(", ")));
        }
    }

    /// A line of a table.
    pub fn row(&self, label: &str, value: impl Display) {
        println!("   {label:<42}{value:>10}");
    }

    /// A heading without a number.
    pub fn heading(&self, title: &str) {
        println!("\n{}", self.paint("1", title));
    }

    /// What was promised and not kept.
    pub fn broken(&self) -> &[String] {
        &self.broken
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[m") } else { text.to_owned() }
    }
}

/// Breaks a text at a separator so that lines are no longer than that, if they can be.
fn wrap(text: &str, separator: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(separator) {
        let line = lines.last_mut().expect("never empty");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + separator.len() + word.chars().count() <= width {
            line.push_str(separator);
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}
