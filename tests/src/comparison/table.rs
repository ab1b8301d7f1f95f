//! The figures as a table.

use std::fmt;

use super::figures::Figures;
use super::{Comparison, HOUR, tributary};

/// A row's name, and what stands in it for a method.
type Row = (&'static str, fn(&Comparison, &Figures) -> String);

const ROWS: [Row; 16] = [
    ("files that a job over the day reads", |_, figures| figures.data_files.to_string()),
    ("… their mean size", |_, figures| kib(figures.data_bytes as f64 / figures.data_files.max(1) as f64)),
    ("… lines in each, in the mean", |_, figures| {
        let found = figures.lines.written - figures.lines.lost() + figures.lines.doubled;
        (found / figures.data_files.max(1)).to_string()
    }),
    ("files in all", |_, figures| figures.all.files.to_string()),
    ("blocks", |_, figures| figures.all.blocks.to_string()),
    ("map tasks of a job over the day", |_, figures| figures.map_tasks.to_string()),
    ("files open for writing at a time: most", |_, figures| figures.writers.peak.to_string()),
    ("… in the mean", |_, figures| format!("{:.1}", figures.writers.mean)),
    ("NameNode operations (audit log)", |_, figures| figures.operations().to_string()),
    ("… of these by the clock", |_, figures| figures.by_the_clock.to_string()),
    ("syncs (edit log)", |_, figures| figures.syncs().to_string()),
    ("NameNode operations in a day of 24 real hours", |comparison, figures| {
        figures.operations_in_a_real_day(comparison.options.hours).to_string()
    }),
    ("lines lost with the servers", |_, figures| figures.lines.lost_with_servers.to_string()),
    ("lines lost otherwise", |_, figures| figures.lines.lost_else.to_string()),
    ("lines doubled", |_, figures| figures.lines.doubled.to_string()),
    ("pieces of lines", |_, figures| figures.lines.torn.to_string()),
];

fn kib(bytes: f64) -> String {
    format!("{:.0} KiB", bytes / 1024.0)
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lost = self.servers.iter().filter(|server| server.lost).count();
        let (lines, bytes) =
            self.servers.iter().fold((0, 0), |(lines, bytes), server| (lines + server.lines, bytes + server.bytes));
        let (least, most) = self
            .servers
            .iter()
            .filter(|server| !server.lost)
            .fold((u64::MAX, 0), |(least, most), server| (least.min(server.lines), most.max(server.lines)));
        writeln!(
            f,
            "{} servers, {} hours of {} s, {lines} lines in {:.0} MiB; of the servers that lived the quietest wrote {least} lines \
             and the busiest {most}. {lost} servers were lost; one collector and one of {} roots (with {} lanes in all) were \
             killed and started again. Seed {}.\n",
            self.options.servers,
            self.options.hours,
            HOUR.as_secs(),
            bytes as f64 / f64::from(1 << 20),
            tributary::ROOTS,
            tributary::LANES,
            self.options.seed,
        )?;
        writeln!(f, "| | (a) cron | (b) a writer per server | (c) collectors | (d) Tributary |")?;
        writeln!(f, "|---|---:|---:|---:|---:|")?;
        let methods = [&self.cron, &self.direct, &self.collector, &self.tributary];
        for (name, cell) in ROWS {
            write!(f, "| {name} |")?;
            for figures in methods {
                write!(f, " {} |", cell(self, figures))?;
            }
            writeln!(f)?;
        }
        writeln!(f)?;
        for (name, figures) in ["cron", "direct", "collector", "tributary"].into_iter().zip(methods) {
            writeln!(f, "{name}: audit log: {:?}", figures.operations)?;
            writeln!(f, "{name}: edit log: {:?}", figures.changes)?;
        }
        Ok(())
    }
}
