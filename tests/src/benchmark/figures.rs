//! Measured figures, the goals that they are held against, and the report of a run.

use std::fmt::Write as _;
use std::fs;

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// At most so much.
    AtMost(f64),
    /// At least so much.
    AtLeast(f64),
}

impl Goal {
    /// Whether `value` is good enough.
    #[must_use]
    pub fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

/// One measured number.
#[derive(Clone, Debug)]
pub struct Figure {
    /// What was measured.
    pub what: String,
    /// How much.
    pub value: f64,
    /// Of what: `MiB/s`, `× the compressor`.
    pub unit: &'static str,
    /// What it should be; none for one that is only told.
    pub goal: Option<Goal>,
}

/// A section of the report: figures, and what was measured how.
#[derive(Clone, Debug, Default)]
pub struct Section {
    title: String,
    how: String,
    load: String,
    figures: Vec<Figure>,
    more: String,
}

impl Section {
    /// An empty one, for what has just been measured: it notes the load that the machine has now. `how` says in Markdown what that is.
    #[must_use]
    pub fn new(title: impl Into<String>, how: impl Into<String>) -> Self {
        Self { title: title.into(), how: how.into(), load: load(), ..Self::default() }
    }

    /// Adds a figure without a goal.
    pub fn tell(&mut self, what: impl Into<String>, value: f64, unit: &'static str) {
        self.figures.push(Figure { what: what.into(), value, unit, goal: None });
    }

    /// Adds a figure with a goal.
    pub fn judge(&mut self, what: impl Into<String>, value: f64, unit: &'static str, goal: Goal) {
        self.figures.push(Figure { what: what.into(), value, unit, goal: Some(goal) });
    }

    /// Adds Markdown behind the figures.
    pub fn add(&mut self, markdown: &str) {
        self.more += markdown;
    }

    /// The section in Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = format!("## {}\n\n{} {}\n", self.title, self.how, self.load);
        if !self.figures.is_empty() {
            text += "\n| | figure | goal | |\n|---|---:|---:|---|\n";
        }
        for Figure { what, value, unit, goal } in &self.figures {
            let (goal, met) = match goal {
                None => (String::new(), ""),
                Some(goal) => {
                    let met = if goal.is_met_by(*value) { "met" } else { "**not met**" };
                    match goal {
                        Goal::AtMost(most) => (format!("≤ {most}"), met),
                        Goal::AtLeast(least) => (format!("≥ {least}"), met),
                    }
                }
            };
            // Writing to a String can't fail.
            let _ = writeln!(text, "| {what} | {} {unit} | {goal} | {met} |", rounded(*value));
        }
        if !self.more.is_empty() {
            text += "\n";
            text += self.more.trim_end();
            text += "\n";
        }
        text
    }
}

/// With three digits that count.
#[must_use]
pub fn rounded(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        small if small >= 0.1 || small == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// A table in Markdown; the first row is its head, and all columns but the first are numbers.
#[must_use]
pub fn table(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (n, row) in rows.iter().enumerate() {
        let _ = writeln!(text, "| {} |", row.join(" | "));
        if n == 0 {
            let _ = writeln!(text, "|---|{}", "---:|".repeat(row.len().saturating_sub(1)));
        }
    }
    text
}

/// What others do on this machine, which wall times depend on.
fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let minute = text.split(' ').next().unwrap_or("unknown");
    format!("(The machine's load over the last minute, this benchmark included: {minute}.)")
}

/// Bytes in MiB.
#[must_use]
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Bytes in GiB.
#[must_use]
pub fn gib(bytes: u64) -> f64 {
    mib(bytes) / 1024.0
}

/// The value below which `share` of the values lie; 0 where there are none.
#[must_use]
pub fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len() as f64 * share) as usize;
    values.get(index.min(values.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_that_is_missed_is_said_to_be() {
        let mut section = Section::new("Agent", "It runs.");
        section.judge("CPU", 1.16, "× the compressor", Goal::AtMost(1.15));
        section.judge("speed", 200.0, "MiB/s", Goal::AtLeast(189.0));
        section.tell("lines", 5.0, "");
        let text = section.markdown();
        assert!(text.contains("| CPU | 1.16 × the compressor | ≤ 1.15 | **not met** |"), "{text}");
        assert!(text.contains("| speed | 200 MiB/s | ≥ 189 | met |"), "{text}");
        assert!(text.contains("| lines | 5.00  |  |  |"), "{text}");
    }

    #[test]
    fn quantiles_are_of_the_sorted_values() {
        let mut values: Vec<f64> = (0..100).rev().map(f64::from).collect();
        assert!((quantile(&mut values, 0.5) - 50.0).abs() < 1e-9);
        assert!((quantile(&mut values, 0.99) - 99.0).abs() < 1e-9);
        assert!((quantile(&mut values, 1.0) - 99.0).abs() < 1e-9);
        assert!(quantile(&mut [], 0.5).abs() < 1e-9);
    }
}
