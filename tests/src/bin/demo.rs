//! A log writer, an agent, an edge and a root on local files, live on the terminal: what `tests/demo.sh` runs.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use jiff::Timestamp;
use tributary_tests::cluster::{Cluster, ClusterOptions, Role};
use tributary_tests::judge::Scenario;
use tributary_tests::lines::Lines;
use tributary_tests::published::Published;
use tributary_tests::readers::Reader;
use tributary_tests::wait::until;
use tributary_tests::writer::{Writer, WriterOptions};

/// Lines a second.
const RATE: u32 = 2000;
/// Lines after which the log is rotated.
const ROTATE_EVERY: u64 = 15_000;
/// Between two looks at the processes.
const LOOK: Duration = Duration::from_millis(250);
/// Between two lines where the output is no terminal.
const SAY: Duration = Duration::from_secs(5);
/// The least time before the first minute's end, so that its file has something in it.
const FIRST_MINUTE_S: i64 = 15;
/// How long before the last minute's end the writer stops.
const LAST_PAUSE_S: i64 = 5;
/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(120);

/// A minute or two of Tributary on this machine.
///
/// Starts a log writer (2000 lines a second, rotated every few seconds), an agent that tails the log, an edge, and a root that writes
/// to a local directory with a file for each minute. Ends by itself, and then compares every line.
#[derive(Parser)]
#[command(after_help = "Example: ./tests/demo.sh --kill")]
struct Arguments {
    /// Put everything into this empty directory; default: a new one in the system's temporary directory.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Kill each process once (SIGKILL) and start it again.
    #[arg(long)]
    kill: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { dir, kill } = Arguments::parse();
    let folder = match dir {
        Some(dir) => {
            std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
            dir
        }
        // Kept, because its files are what there is to see.
        None => tempfile::Builder::new().prefix("tributary-demo-").tempdir()?.keep(),
    };
    let tables = "[root]\nclose_delay = \"2s\"\nledger_interval = \"2s\"\n[forward]\nbackoff = { max = \"1s\" }\n";
    let options = ClusterOptions { folder: Some(folder), tables: Some(tables.into()), ..ClusterOptions::default() };
    let mut cluster = Cluster::start(options).await?;
    let outcome = run(&mut cluster, kill).await;
    cluster.explain(outcome)
}

async fn run(cluster: &mut Cluster, kill: bool) -> Result<()> {
    let log = cluster.log_dir(0).join("access.log");
    say(&format!("the log        {} (rotated by renaming)", log.display()))?;
    for role in cluster.roles() {
        say(&format!(
            "{:<14} process {}, configured by {}",
            role.to_string(),
            cluster.pid(role)?,
            cluster.config(role).display()
        ))?;
    }
    say(&format!("the sink       {}\n", cluster.sink_uri()))?;

    let copy = cluster.folder().join("written-lines");
    let writer = Writer::start(WriterOptions {
        per_second: RATE,
        rotate_every: Some(ROTATE_EVERY),
        ..WriterOptions::new(log, copy.clone())
    })?;
    let begun = Timestamp::now().as_second();
    let first_end = (begun + FIRST_MINUTE_S) / 60 * 60 + 60;
    let last_line = first_end + 60 - LAST_PAUSE_S;
    let mut kills = if kill { kills(begun, last_line) } else { Vec::new() }.into_iter().peekable();
    let (mut display, mut counters) = (Display::new(), Counters::default());
    while Timestamp::now().as_second() < last_line {
        if let Some((_, role)) = kills.next_if(|(second, _)| Timestamp::now().as_second() >= *second) {
            cluster.kill9(role)?;
            display.note(&format!("killed {role} with SIGKILL; starting it again"));
            cluster.start_node(role)?;
        }
        cluster.check_alive()?;
        display.show(&Progress::look(cluster, &writer, &mut counters).await, "writing")?;
        tokio::time::sleep(LOOK).await;
    }
    writer.pause().await?;
    let written = writer.written();
    until("everything to be published", LIMIT, async || {
        let progress = Progress::look(cluster, &writer, &mut counters).await;
        display.show(&progress, "waiting for the last minute to be over")?;
        ensure!(progress.published >= written, "{} of {written} lines are", progress.published);
        Ok(Some(()))
    })
    .await?;
    display.end();
    writer.stop()?;
    end(cluster, &copy).await
}

/// When which process is killed: each once, evenly over the time.
fn kills(begun: i64, end: i64) -> Vec<(i64, Role)> {
    let step = (end - begun) / 4;
    [Role::Edge(0), Role::Root(0), Role::Agent(0)]
        .into_iter()
        .zip(1..)
        .map(|(role, n)| (begun + n * step, role))
        .collect()
}

async fn end(cluster: &mut Cluster, copy: &Path) -> Result<()> {
    say("\ncomparing every line ...")?;
    let written = Lines::of_files([copy.to_owned()])?;
    let report = Scenario::new("demo", &[Reader::Zcat]).judge(cluster, &written).await?;
    cluster.stop_all().await?;
    let published = Published::look(&cluster.sink()).await?;
    let sink = cluster.folder().join("sink");
    say("")?;
    for (folder, hour) in &published.hours {
        for file in hour.files.iter().chain(&hour.late) {
            let manifest = hour.manifests().flat_map(|manifest| &manifest.files);
            let name = file.path.rsplit('/').next().unwrap_or_default();
            let records = manifest.filter(|entry| entry.name == name).map(|entry| entry.records).sum::<u64>();
            say(&format!("{records:>9} lines {:>9} bytes  {}", file.bytes, sink.join(&file.path).display()))?;
        }
        if hour.files.is_empty() && hour.late.is_empty() {
            say(&format!("{:>9} lines                  {}", 0, sink.join(folder).display()))?;
        }
    }
    say(&format!("\n{report}"))?;
    ensure!(report.is_good(), "lines are missing, doubled or torn");
    let (sink, folder) = (sink.display(), cluster.folder().display());
    let category = cluster.category();
    say("Read it as any gzip files, with the shell, Hadoop or Spark:\n")?;
    say(&format!("    zcat {sink}/{category}/dt=*/hm=*/*.gz | wc -l        # what is late is in _late/ beside them"))?;
    say(&format!("    wc -l {}", copy.display()))?;
    say(&format!("    cat {sink}/{category}/dt=*/hm=*/_MANIFEST.json"))?;
    say(&format!("    {} inspect --verify {sink}/{category}", cluster.programs().aggregator.display()))?;
    say(&format!("\nAll of it, with configuration and logs, is in {folder}; remove it with: rm -r {folder}"))
}

fn say(line: &str) -> Result<()> {
    writeln!(io::stdout(), "{line}").context("writing to the terminal")
}

/// Counters of processes that begin at nothing when they are started again, counted on.
#[derive(Default)]
struct Counters(BTreeMap<&'static str, (f64, f64)>);

impl Counters {
    /// What a counter has come to over all runs; `now` is what the present run says, if it answers.
    fn total(&mut self, name: &'static str, now: Option<f64>) -> f64 {
        let (before, last) = self.0.entry(name).or_default();
        if let Some(now) = now {
            if now < *last {
                *before += *last;
            }
            *last = now;
        }
        *before + *last
    }
}

/// How far the lines have come.
#[derive(Default)]
struct Progress {
    written: u64,
    written_bytes: u64,
    read: f64,
    shipped_bytes: f64,
    committed_bytes: f64,
    records: f64,
    files: usize,
    minutes: usize,
    unpublished: usize,
    published: u64,
}

impl Progress {
    /// Asks everybody. Of a process that doesn't answer now, what it said last counts.
    async fn look(cluster: &Cluster, writer: &Writer, counters: &mut Counters) -> Self {
        let mut counted = async |role: Role, name: &'static str| {
            let now = cluster.metric(role, name).await.ok();
            counters.total(name, now)
        };
        let (agent, root) = (Role::Agent(0), Role::Root(0));
        let read = counted(agent, "tributary_agent_lines_total").await;
        let shipped_bytes = counted(agent, "tributary_agent_shipped_bytes_total").await;
        let committed_bytes = counted(agent, "tributary_agent_committed_bytes_total").await;
        let records = counted(root, "tributary_aggregator_root_records_total").await;
        // During a rename a look at the directory can fail; the next one comes soon.
        let seen = Published::look(&cluster.sink()).await.unwrap_or_default();
        Self {
            written: writer.written(),
            written_bytes: writer.bytes(),
            read,
            shipped_bytes,
            committed_bytes,
            records,
            files: seen.files().len() + seen.late().len(),
            minutes: seen.hours.len(),
            unpublished: seen.unpublished.len(),
            published: seen.records(),
        }
    }

    fn rows(&self) -> [(&'static str, String); 5] {
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        [
            ("written", format!("{:>9} lines {:>7.1} MiB", self.written, mib(self.written_bytes as f64))),
            ("shipped", format!("{:>9.0} lines {:>7.1} MiB, compressed", self.read, mib(self.shipped_bytes))),
            ("at the root", format!("{:>9.0} lines", self.records)),
            ("committed", format!("{:>15} {:>7.1} MiB", "", mib(self.committed_bytes))),
            (
                "published",
                format!(
                    "{:>9} lines in {} files of {} minutes; {} files being written",
                    self.published, self.files, self.minutes, self.unpublished
                ),
            ),
        ]
    }
}

/// The progress on a terminal, each row in its place; elsewhere a line now and then.
enum Display {
    Terminal { all: MultiProgress, rows: Vec<ProgressBar>, begun: Instant },
    Lines { begun: Instant, last: Option<Instant> },
}

impl Display {
    fn new() -> Self {
        let begun = Instant::now();
        if !io::stderr().is_terminal() {
            return Self::Lines { begun, last: None };
        }
        let all = MultiProgress::new();
        let style =
            |text: &str| ProgressStyle::with_template(text).unwrap_or_else(|_| ProgressStyle::default_spinner());
        let mut rows = vec![all.add(ProgressBar::new_spinner().with_style(style("{spinner} {msg}")))];
        let row = || ProgressBar::new_spinner().with_style(style("  {prefix:<12} {msg}"));
        rows.extend((0..Progress::default().rows().len()).map(|_| all.add(row())));
        Self::Terminal { all, rows, begun }
    }

    fn show(&mut self, progress: &Progress, what: &str) -> Result<()> {
        match self {
            Self::Terminal { rows, begun, .. } => {
                rows[0].set_message(format!("{what}, {} s", begun.elapsed().as_secs()));
                rows[0].tick();
                for (bar, (name, text)) in rows[1..].iter().zip(progress.rows()) {
                    bar.set_prefix(name);
                    bar.set_message(text);
                    bar.tick();
                }
                Ok(())
            }
            Self::Lines { begun, last } => {
                if last.is_some_and(|last| last.elapsed() < SAY) {
                    return Ok(());
                }
                *last = Some(Instant::now());
                let text: Vec<String> = progress
                    .rows()
                    .iter()
                    .map(|(name, text)| format!("{name} {}", text.split_whitespace().collect::<Vec<_>>().join(" ")))
                    .collect();
                say(&format!("{:>3} s: {}", begun.elapsed().as_secs(), text.join("; ")))
            }
        }
    }

    fn note(&self, text: &str) {
        match self {
            Self::Terminal { all, .. } => {
                // A terminal that is gone ends the demo elsewhere.
                let _ = all.println(text);
            }
            Self::Lines { .. } => {
                let _ = say(text);
            }
        }
    }

    fn end(&self) {
        if let Self::Terminal { rows, .. } = self {
            rows.iter().for_each(ProgressBar::abandon);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_goes_on_where_the_run_before_ended() {
        let mut counters = Counters::default();
        let seen = [Some(5.0), Some(7.0), None, Some(1.0), Some(3.0)].map(|now| counters.total("a", now));
        assert!(seen.iter().zip([5.0, 7.0, 7.0, 8.0, 10.0]).all(|(seen, due)| (seen - due).abs() < 1e-9), "{seen:?}");
    }
}
