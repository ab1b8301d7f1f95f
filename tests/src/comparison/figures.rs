//! What a method has cost and left behind, as HDFS tells it: nothing here knows what the method is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::HOUR;
use super::servers::{Server, server_and_number};
use crate::hdfs::{AuditLine, Edit, Fsck, MiniHdfs};
use crate::load::serial_of;
use crate::published::Published;
use crate::readers::{LinesJob, Tree, lines_job};

/// The figures of one method.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// What the NameNode counts: all files, those that readers don't see too.
    pub all: Fsck,
    /// Files that a job over the day reads.
    pub data_files: u64,
    /// Their bytes.
    pub data_bytes: u64,
    /// Operations in the NameNode's audit log, by their names.
    pub operations: BTreeMap<String, u64>,
    /// Of these, those of roots that come with the clock and not with files.
    pub by_the_clock: u64,
    /// Changes in the NameNode's edit log, by their names.
    pub changes: BTreeMap<String, u64>,
    /// Of these, the syncs of roots, which come with the clock too.
    pub root_syncs: u64,
    /// From the first change to the last, in milliseconds.
    pub span_ms: u64,
    /// Files that were open for writing.
    pub writers: Writers,
    /// Map tasks of a job over the day.
    pub map_tasks: u64,
    /// What that job read.
    pub lines: LineCounts,
}

/// What a job over the day reads.
#[derive(Clone, Debug)]
pub struct Input {
    /// For a job each.
    pub trees: Vec<Tree>,
    /// The lengths of the files in them.
    pub lengths: Vec<u64>,
}

impl Input {
    /// All below `/name`.
    ///
    /// # Errors
    /// HDFS can't be asked.
    pub async fn all(hdfs: &MiniHdfs, name: &str) -> Result<Self> {
        let base = format!("/{name}");
        let mut lengths = Vec::new();
        for (file, status) in hdfs.webhdfs().tree(&base).await? {
            if !file.split('/').any(|part| part.starts_with(['_', '.'])) {
                lengths.push(status.length);
            }
        }
        Ok(Self { trees: vec![Tree::in_hdfs(hdfs, base)], lengths })
    }

    /// The published hours of a category, and what came too late for them, if anything did.
    ///
    /// # Errors
    /// HDFS can't be asked.
    pub async fn published(sink: &Tree, category: &str) -> Result<Self> {
        let published = Published::look(sink).await?;
        let (files, late) = (published.files(), published.late());
        let mut trees = vec![sink.below(category)];
        if !late.is_empty() {
            trees.push(sink.below(&format!("{category}/dt=*/*/_late")));
        }
        Ok(Self { trees, lengths: files.iter().chain(&late).map(|file| file.bytes).collect() })
    }
}

impl Figures {
    /// Operations in the NameNode's audit log.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations.values().sum()
    }

    /// Syncs of which the NameNode heard.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.changes.get(SYNC).copied().unwrap_or_default()
    }

    /// What it would be in a day of 24 real hours after a run of so many scaled ones: as often for each file, and what comes with
    /// the clock as often in each second. Of the syncs only those of roots are operations by nature: Java's client makes bytes
    /// durable without asking the NameNode.
    #[must_use]
    pub fn operations_in_a_real_day(&self, hours: u32) -> u64 {
        let hours = f64::from(hours.max(1));
        let with_files = (self.operations() - self.by_the_clock) as f64 * 24.0 / hours;
        // Roots look as long as they run, and sync while there are lines.
        let looks = self.by_the_clock as f64 / (self.span_ms.max(1) as f64 / 1000.0);
        let syncs = self.root_syncs as f64 / (hours * HOUR.as_secs_f64());
        (with_files + (looks + syncs) * DAY.as_secs_f64()).round() as u64
    }

    /// Of the method that keeps everything below `/NAME`.
    ///
    /// # Errors
    /// HDFS can't be asked, or the job fails.
    pub async fn of(hdfs: &MiniHdfs, records: &Records, name: &str, input: &Input, servers: &[Server]) -> Result<Self> {
        let mut figures = records.of(name);
        figures.all = hdfs.fsck(&format!("/{name}")).await?;
        figures.data_files = input.lengths.len() as u64;
        figures.data_bytes = input.lengths.iter().sum();
        let mut counter = LineCounter::new(servers);
        for tree in &input.trees {
            let job = lines_job(tree).await?;
            figures.map_tasks += job.outputs.len() as u64;
            counter.add(&job)?;
        }
        figures.lines = counter.counts();
        Ok(figures)
    }
}

/// The NameNode's records, up to the moment at which they were read.
#[derive(Debug, Default)]
pub struct Records {
    of_methods: BTreeMap<String, Figures>,
}

impl Records {
    /// Reads them.
    ///
    /// # Errors
    /// A log can't be read.
    pub async fn read(hdfs: &MiniHdfs) -> Result<Self> {
        let mut records = Self::default();
        // The harness looks by HTTP and with fsck; the methods don't.
        for line in hdfs.audit()?.iter().filter(|line| line.protocol == "rpc" && line.command != "fsck") {
            let figures = records.method(&line.source);
            *figures.operations.entry(line.command.clone()).or_default() += 1;
            figures.by_the_clock += u64::from(is_by_the_clock(line));
        }
        let mut writers: BTreeMap<String, WriterCounter> = BTreeMap::new();
        hdfs.edits(|edit| {
            let figures = records.method(&edit.path);
            *figures.changes.entry(edit.operation.clone()).or_default() += 1;
            figures.root_syncs += u64::from(edit.operation == SYNC && edit.path.contains(OF_ROOTS));
            writers.entry(method_of(&edit.path)).or_default().take(&edit);
        })
        .await?;
        for (method, writers) in writers {
            let figures = records.of_methods.entry(method).or_default();
            figures.span_ms = writers.span_ms();
            figures.writers = writers.finish();
        }
        Ok(records)
    }

    fn method(&mut self, path: &str) -> &mut Figures {
        self.of_methods.entry(method_of(path)).or_default()
    }

    fn of(&self, method: &str) -> Figures {
        self.of_methods.get(method).cloned().unwrap_or_default()
    }
}

/// The first component of a path.
fn method_of(path: &str) -> String {
    path.split('/').nth(1).unwrap_or_default().to_owned()
}

const DAY: Duration = Duration::from_secs(86_400);
/// Where roots work.
const OF_ROOTS: &str = "/_tributary/";
/// The sync of a file: the NameNode writes down how far it has got.
const SYNC: &str = "OP_UPDATE_BLOCKS";

/// Whether an operation comes every so many seconds, whatever is shipped: in a real day there are as many more of them as it is
/// longer than the run. These are the roots' looks for each other's marks and for hours that others have sealed, their own marks,
/// the entries of their ledgers, and the looks of each lane whether an hour that it has sealed is published.
fn is_by_the_clock(line: &AuditLine) -> bool {
    let marks = line.source.contains("/owner/") || line.source.contains("ledger-");
    let of_roots = line.source.contains(OF_ROOTS) && (marks || line.command == "listStatus");
    // Nobody else asks for an hour's folder.
    let hour = line.source.rsplit('/').next().is_some_and(|name| name.starts_with("hm="));
    of_roots || (hour && line.command == "getfileinfo")
}

/// Files that were open for writing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Writers {
    /// The most at a time.
    pub peak: usize,
    /// The mean over the time from the first file's beginning to the last change.
    pub mean: f64,
}

#[derive(Debug, Default)]
struct WriterCounter {
    /// By path, with the time since when.
    open: BTreeMap<String, u64>,
    peak: usize,
    open_ms: u64,
    first_ms: Option<u64>,
    last_ms: u64,
}

impl WriterCounter {
    fn take(&mut self, edit: &Edit) {
        self.last_ms = self.last_ms.max(edit.at_ms);
        match edit.operation.as_str() {
            "OP_ADD" | "OP_APPEND" => {
                let at = if edit.at_ms > 0 { edit.at_ms } else { self.last_ms };
                self.first_ms.get_or_insert(at);
                self.open.insert(edit.path.clone(), at);
                self.peak = self.peak.max(self.open.len());
            }
            "OP_CLOSE" => self.close(&edit.path, edit.at_ms),
            "OP_DELETE" => {
                let gone: BTreeSet<String> = self.below(&edit.path);
                gone.iter().for_each(|path| self.close(path, edit.at_ms));
            }
            "OP_RENAME_OLD" | "OP_RENAME" => {
                let Some(destination) = &edit.destination else { return };
                for path in self.below(&edit.path) {
                    if let Some(since) = self.open.remove(&path) {
                        self.open.insert(format!("{destination}{}", &path[edit.path.len()..]), since);
                    }
                }
            }
            _ => {}
        }
    }

    fn below(&self, path: &str) -> BTreeSet<String> {
        let is_below =
            |open: &&String| open.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        self.open.keys().filter(is_below).cloned().collect()
    }

    fn close(&mut self, path: &str, at_ms: u64) {
        if let Some(since) = self.open.remove(path) {
            self.open_ms += at_ms.saturating_sub(since);
        }
    }

    fn span_ms(&self) -> u64 {
        self.last_ms.saturating_sub(self.first_ms.unwrap_or(self.last_ms))
    }

    fn finish(mut self) -> Writers {
        let (last, span) = (self.last_ms, self.span_ms());
        for path in self.open.keys().cloned().collect::<Vec<_>>() {
            self.close(&path, last);
        }
        Writers { peak: self.peak, mean: self.open_ms as f64 / span.max(1) as f64 }
    }
}

/// Lines read against lines written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineCounts {
    /// Written to the servers' disks.
    pub written: u64,
    /// Not found, of servers that were lost.
    pub lost_with_servers: u64,
    /// Not found, of servers that are there.
    pub lost_else: u64,
    /// Found again.
    pub doubled: u64,
    /// Found, and written by no server: pieces of lines.
    pub torn: u64,
}

impl LineCounts {
    /// Not found.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost_with_servers + self.lost_else
    }
}

struct LineCounter<'a> {
    servers: &'a [Server],
    /// How often each line was found, by server and number.
    found: Vec<Vec<u8>>,
    torn: u64,
}

impl<'a> LineCounter<'a> {
    fn new(servers: &'a [Server]) -> Self {
        let found = servers.iter().map(|server| vec![0; server.lines as usize]).collect();
        Self { servers, found, torn: 0 }
    }

    fn add(&mut self, job: &LinesJob) -> Result<()> {
        job.outputs.iter().try_for_each(|file| self.add_file(file))
    }

    fn add_file(&mut self, file: &Path) -> Result<()> {
        let input = File::open(file).with_context(|| format!("opening {}", file.display()))?;
        for line in BufReader::new(input).split(b'\n') {
            let line = line.with_context(|| format!("reading {}", file.display()))?;
            self.add_line(&String::from_utf8_lossy(&line));
        }
        Ok(())
    }

    fn add_line(&mut self, line: &str) {
        let place = serial_of(line).filter(|_| is_whole(line)).map(server_and_number);
        let count = place.and_then(|(server, number)| self.found.get_mut(server)?.get_mut(number as usize));
        match count {
            Some(count) => *count = count.saturating_add(1),
            None => self.torn += 1,
        }
    }

    fn counts(&self) -> LineCounts {
        let mut counts = LineCounts { torn: self.torn, ..LineCounts::default() };
        for (server, found) in self.servers.iter().zip(&self.found) {
            counts.written += found.len() as u64;
            let lost = found.iter().filter(|times| **times == 0).count() as u64;
            *(if server.lost { &mut counts.lost_with_servers } else { &mut counts.lost_else }) += lost;
            counts.doubled += found.iter().map(|times| u64::from(times.saturating_sub(1))).sum::<u64>();
        }
        counts
    }
}

/// Whether a line has its last field, an id of 16 digits: one that was cut off behind its serial has not.
fn is_whole(line: &str) -> bool {
    line.rsplit(' ').next().is_some_and(|id| id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::AccessLog;

    fn line(serial: u64) -> String {
        let mut text = Vec::new();
        AccessLog::default().line(serial, 1_790_000_000, &mut text);
        String::from_utf8_lossy(&text).trim_end().to_owned()
    }

    #[test]
    fn lines_are_counted_by_what_became_of_their_server() {
        let servers = [Server { lines: 3, bytes: 0, lost: false }, Server { lines: 3, bytes: 0, lost: true }];
        let mut counter = LineCounter::new(&servers);
        for serial in [0, 0, 0, 1, 1_000_000_001] {
            counter.add_line(&line(serial));
        }
        // Cut off; of a number that was never written; of a server that isn't there.
        let cut = line(2);
        for torn in [&cut[..cut.len() - 1], &line(3), &line(2_000_000_000), ""] {
            counter.add_line(torn);
        }
        let expected = LineCounts { written: 6, lost_with_servers: 2, lost_else: 1, doubled: 2, torn: 4 };
        assert_eq!(counter.counts(), expected);
    }

    #[test]
    fn what_comes_with_the_clock_is_told_from_what_comes_with_files() {
        let line = |command: &str, source: &str| AuditLine {
            command: command.into(),
            source: source.into(),
            destination: None,
            protocol: "rpc".into(),
        };
        for (command, source, expected) in [
            ("listStatus", "/t/_tributary/lanes/0", true),
            ("rename", "/t/_tributary/lanes/0/e1-x/owner/7.1@root-1", true),
            ("create", "/t/_tributary/lanes/0/e1-x/tmp-e1-5.ledger-1", true),
            ("getfileinfo", "/t/c/dt=2026-11-22/hm=2015", true),
            ("getfileinfo", "/t/_tributary/lanes/0/e1-x/tmp-e1-5._seal-0.json", false),
            ("create", "/t/_tributary/lanes/0/e1-x/c.l0-e1-3.gz", false),
            ("rename", "/t/_tributary/lanes/0/e1-x/c.l0-e1-3.gz", false),
            ("getfileinfo", "/cron/dt=2026-11-22/hm=2015/server-001.log.gz", false),
            ("mkdirs", "/cron/dt=2026-11-22/hm=2015", false),
        ] {
            assert_eq!(is_by_the_clock(&line(command, source)), expected, "{command} {source}");
        }
        let figures = Figures {
            operations: [("create".to_owned(), 70), ("listStatus".to_owned(), 30)].into(),
            by_the_clock: 30,
            root_syncs: 24,
            span_ms: 15 * 60 * 1000,
            ..Figures::default()
        };
        // 30 looks in 15 minutes, 24 syncs in the 12 of the day.
        assert_eq!(figures.operations_in_a_real_day(12), 2 * 70 + 30 * 96 + 24 * 120);
    }

    #[test]
    fn open_files_are_followed_through_renames_of_their_folders() {
        let edit = |operation: &str, path: &str, destination: Option<&str>, at_ms| Edit {
            operation: operation.into(),
            path: path.into(),
            destination: destination.map(str::to_owned),
            at_ms,
        };
        let mut counter = WriterCounter::default();
        for edit in [
            edit("OP_ADD", "/t/e1/a", None, 1000),
            edit("OP_ADD", "/t/e1/b", None, 2000),
            edit("OP_ADD", "/t/e10/c", None, 2000),
            edit("OP_CLOSE", "/t/e10/c", None, 2000),
            edit("OP_RENAME_OLD", "/t/e1", Some("/t/e2"), 2500),
            edit("OP_CLOSE", "/t/e2/a", None, 3000),
            edit("OP_DELETE", "/t/e2", None, 4000),
            edit("OP_ADD", "/t/d", None, 4500),
            edit("OP_MKDIR", "/t/x", None, 5000),
        ] {
            counter.take(&edit);
        }
        // 2 s of a, 2 s of b, half a second of d, in 4 s.
        assert_eq!(counter.finish(), Writers { peak: 3, mean: 4.5 / 4.0 });
    }
}
