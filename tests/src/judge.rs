//! The judge: every line that was written, against what readers find in the published buckets and beside them.
//!
//! A scenario ends with [`Scenario::end`]: it waits until the sink holds as many records as lines were written and nothing more
//! is under way, has each reader read everything, compares every line by content and count, has `inspect --verify` check every
//! file and `audit --deep` the whole, stops all processes, and looks once more. Its report goes to `target/judge/<scenario>.txt` too.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::{Cluster, Role};
use crate::lines::{Difference, Lines};
use crate::process::{AtParentDeath, Process};
use crate::programs::Programs;
use crate::published::{DataFile, Published, Rules};
use crate::readers::{Reader, Tree, read_lines};
use crate::wait::until;

/// Only turns a hang into a failure: what is waited for comes after the end of the last line's bucket.
const LIMIT: Duration = Duration::from_secs(300);
/// For one tool.
const TOOL_LIMIT: Duration = Duration::from_secs(120);

/// What the judge found.
#[derive(Clone, Debug)]
pub struct Report {
    scenario: String,
    /// What each reader has too little and too much.
    pub differences: Vec<(Reader, Difference)>,
    written_bytes: u64,
    /// Published buckets.
    pub hours: usize,
    /// Their files.
    pub files: usize,
    file_bytes: u64,
    /// Files beside published hours.
    pub late_files: Vec<String>,
    late_records: u64,
    verified: usize,
    /// What the audit of the whole sink says.
    audited: String,
    /// What is wrong besides the lines.
    complaints: Vec<String>,
    elapsed: Duration,
}

impl Report {
    /// Every line once for every reader, every file verified, every manifest right.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.complaints.is_empty() && self.differences.iter().all(|(_, difference)| difference.is_none())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_good() { "every line once" } else { "NOT GOOD" };
        writeln!(f, "{}: {verdict}", self.scenario)?;
        for (reader, difference) in &self.differences {
            writeln!(f, "  {:<10} {}", format!("{reader}:"), difference.to_string().replace('\n', "\n  "))?;
        }
        writeln!(
            f,
            "  {:<10} {} buckets with {} files, {} late files with {} lines; {} bytes of lines in {} bytes",
            "published:",
            self.hours,
            self.files,
            self.late_files.len(),
            self.late_records,
            self.written_bytes,
            self.file_bytes
        )?;
        writeln!(f, "  {:<10} inspect --verify of {} files", "checked:", self.verified)?;
        writeln!(f, "  {:<10} {}", "audit:", self.audited)?;
        for complaint in &self.complaints {
            writeln!(f, "  {:<10} {complaint}", "wrong:")?;
        }
        writeln!(f, "  {:<10} {} s", "took:", self.elapsed.as_secs())
    }
}

/// A scenario that is to be judged.
#[derive(Clone, Debug)]
pub struct Scenario {
    name: String,
    readers: Vec<Reader>,
    may_lack: Vec<String>,
    partial_succeeds: bool,
    begun: Instant,
}

impl Scenario {
    /// A scenario by its name, which is a file name too, judged by `readers`.
    #[must_use]
    pub fn new(name: &str, readers: &[Reader]) -> Self {
        Self {
            name: name.to_owned(),
            readers: readers.to_vec(),
            may_lack: Vec::new(),
            partial_succeeds: false,
            begun: Instant::now(),
        }
    }

    /// These hosts die for ever, so hours may be published without them; with a success file when `partial_succeeds`.
    #[must_use]
    pub fn without(mut self, hosts: &[&str], partial_succeeds: bool) -> Self {
        self.may_lack = hosts.iter().map(|host| (*host).to_owned()).collect();
        self.partial_succeeds = partial_succeeds;
        self
    }

    /// Ends it, `written` being the files that hold all lines that were written, each as often as it was.
    ///
    /// # Errors
    /// A line is missing, doubled, torn or invented, or anything else isn't as it must be.
    pub async fn end(&self, cluster: &mut Cluster, written: Vec<PathBuf>) -> Result<Report> {
        let written = Lines::of_files(written).context("reading what was written")?;
        ensure!(!written.is_empty(), "nothing was written");
        let sink = cluster.sink();
        let settled = self.wait_until_published(cluster, &sink, written.len() as u64).await;
        let mut report = self.judge(cluster, &written).await?;
        if let Err(error) = &settled {
            report.complaints.push(format!("{error:#}"));
        }
        let path = cluster.programs().output_folder("judge")?.join(format!("{}.txt", self.name));
        fs::write(&path, report.to_string()).with_context(|| format!("writing {}", path.display()))?;
        ensure!(report.is_good(), "{report}");

        // What is sent twice and would be published later shows as data that is left when all have ended.
        cluster.check_alive()?;
        cluster.stop_all().await?;
        let left = Published::look(&sink).await?;
        ensure!(left.unpublished.is_empty(), "all lines were published, and yet there is {:?}", left.unpublished);
        ensure!(left.records() == written.len() as u64, "{} lines, {} records", written.len(), left.records());
        cluster.check_logs()?;
        Ok(report)
    }

    async fn wait_until_published(&self, cluster: &mut Cluster, sink: &Tree, lines: u64) -> Result<()> {
        let agents: Vec<usize> = cluster
            .roles()
            .into_iter()
            .filter_map(|role| if let Role::Agent(number) = role { Some(number) } else { None })
            .collect();
        until(format!("{lines} lines to be published"), LIMIT, async || {
            if let Err(error) = cluster.check_alive() {
                return Ok(Some(Err(error)));
            }
            let seen = Published::look(sink).await?;
            let records = seen.records();
            ensure!(records >= lines, "{records} are, and {} files are not", seen.unpublished.len());
            ensure!(seen.unpublished.is_empty(), "{records} are, and there are more files: {:?}", seen.unpublished);
            for number in &agents {
                if cluster.pid(Role::Agent(*number)).is_ok() {
                    let lag = cluster.agent_lag(*number).await?;
                    ensure!(lag == 0, "agent {number} waits for {lag} bytes to be committed");
                }
            }
            Ok(Some(Ok(())))
        })
        .await?
    }

    /// Compares what is published now with the lines that were written, and checks every file.
    ///
    /// # Errors
    /// Something can't be read.
    pub async fn judge(&self, cluster: &Cluster, written: &Lines) -> Result<Report> {
        let sink = &cluster.sink();
        let published = Published::look(sink).await?;
        let (files, late) = (published.files(), published.late());
        let mut report = Report {
            scenario: self.name.clone(),
            differences: Vec::new(),
            written_bytes: written.bytes(),
            hours: published.hours.len(),
            files: files.len(),
            file_bytes: files.iter().chain(&late).map(|file| file.bytes).sum(),
            late_files: late.iter().map(|file| file.path.clone()).collect(),
            late_records: 0,
            verified: 0,
            audited: String::new(),
            complaints: Vec::new(),
            elapsed: Duration::ZERO,
        };
        let rules = Rules {
            roll_size: cluster.roll_size()?,
            may_lack: self.may_lack.clone(),
            partial_succeeds: self.partial_succeeds,
        };
        report.complaints.extend(published.check_manifests(&rules).err().map(|error| format!("{error:#}")));
        for reader in &self.readers {
            let mut found = read_lines(*reader, &sink.below(cluster.category())).await?;
            if let Some(late_lines) = read_late(*reader, sink, cluster.category(), &late).await? {
                report.late_records = late_lines.len() as u64;
                found = found.joined(late_lines);
            }
            report.differences.push((*reader, written.difference(&found)?));
        }
        for file in files.iter().chain(&late) {
            let uri = format!("{}/{}", cluster.sink_uri(), file.path);
            match aggregator(cluster.programs(), &["inspect", "--verify", &uri]).await {
                Ok(_) => report.verified += 1,
                Err(error) => report.complaints.push(format!("{error:#}")),
            }
        }
        match aggregator(cluster.programs(), &["audit", "--deep", &cluster.sink_uri()]).await {
            Ok(told) => report.audited = told.trim().to_owned(),
            Err(error) => report.complaints.push(format!("{error:#}")),
        }
        report.elapsed = self.begun.elapsed();
        Ok(report)
    }
}

/// The lines of all late files; `None` when there are none.
async fn read_late(reader: Reader, sink: &Tree, category: &str, late: &[DataFile]) -> Result<Option<Lines>> {
    let mut folders: Vec<&str> = late.iter().filter_map(|file| Some(file.path.rsplit_once('/')?.0)).collect();
    folders.dedup();
    if folders.is_empty() {
        return Ok(None);
    }
    if reader != Reader::Zcat {
        // One job for all of them, whose start takes longer than its work.
        return read_lines(reader, &sink.below(&format!("{category}/dt=*/*/_late"))).await.map(Some);
    }
    let mut all: Option<Lines> = None;
    for folder in folders {
        let lines = read_lines(reader, &sink.below(folder)).await?;
        all = Some(match all {
            Some(before) => before.joined(lines),
            None => lines,
        });
    }
    Ok(all)
}

/// Runs one of the aggregator's own tools to its end, and returns what it says.
async fn aggregator(programs: &Programs, args: &[&str]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("out");
    let mut process = Process::spawn(&programs.aggregator, AtParentDeath::Kill, log.clone(), |command| {
        command.args(args);
    })?;
    let status = until(format!("{} to end", args[0]), TOOL_LIMIT, async || process.try_wait()).await?;
    if !status.success() {
        bail!("{}: {status}: {}", args.join(" "), process.log_tail());
    }
    fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))
}
