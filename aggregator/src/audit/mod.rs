//! `audit`: proves from the files alone that what is published is whole: no stream has a gap or an overlap, every file is as its
//! manifest says, and every manifest is what the seals make.
//!
//! It knows nothing but the files, and trusts none of them: frames name the bytes they hold, manifests name the frames' files,
//! seals name what each lane contributed. What one of them says is compared with what the others do.
//!
//! Readers skip what has a name that begins with `.` or `_`, so that can't alter what a job reads: where it doesn't belong, it
//! is a note. All else in a category's directory that no manifest names is wrong.
//!
//! # What only other hours could prove
//!
//! A stream goes from hour to hour, so what is missing of it at its beginning may have been in an hour that retention has
//! removed. This is a note, and no gap,
//!
//! - when all hours are audited, of the streams that come up in the oldest hour of their category that has a manifest, unless the
//!   ledgers say that there was no older one. So a frame that was taken out of any other hour, or out of the middle of a stream,
//!   isn't hidden by it;
//! - with `--since`, of every stream: nothing tells whether it was quiet in the hours before, or was robbed of its beginning;
//! - besides, for the same streams, between the lines of the first minutes of the oldest hour, where lines of the hour before
//!   stand.
//!
//! With `--hour` no gap is told, only how many bytes are elsewhere: the hour is proved by its manifest and its seals alone.
//!
//! Memory: some hundred bytes for each stream, and about a hundred for each frame that doesn't continue the one before it.

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::json;
use tributary_common::frame::SliceDescriptor;
use tributary_common::ids::CategoryName;

mod hour;
mod look;
mod streams;

use crate::dfs::{Dfs, DfsError, DfsOptions, DfsPath, DirEntry, open_dfs};
use crate::frames::{Frame, Frames, Source};
use crate::published::{self, HourDir, Tree, parse_moment};
use crate::root::hours::{LATE_DIR, MANIFEST_FILE, Manifest, PARTIAL_FILE};
use crate::root::ledger::Contents;
use crate::root::sink::read_whole;
use hour::{Data, Folder, Form, Hour, Waiting, file_of_late_manifest, lane_of_seal, late_manifest_of};
use streams::{Age, FileNo, Misfit, Older, StreamName, Streams};

/// How long after its beginning the oldest hour may have lines between which lines of the hour before stand.
const EDGE_S: i64 = 5 * 60;

const DAY_S: u32 = 86_400;

/// What to audit, and how.
#[derive(Debug, Args)]
pub struct Options {
    /// The sink: hdfs://… or file:///…, or a local directory.
    #[arg(value_name = "URI")]
    pub sink: String,
    /// Only this category.
    #[arg(long)]
    pub category: Option<CategoryName>,
    /// Only the hour that holds this moment: 2026-11-22T20, UTC.
    #[arg(long, value_name = "H", value_parser = parse_moment)]
    pub hour: Option<i64>,
    /// Only hours that begin at this moment or later, as when older ones were removed: nothing is told of the bytes before the
    /// first ones that a stream has there.
    #[arg(long, value_name = "T", value_parser = parse_moment, conflicts_with = "hour")]
    pub since: Option<i64>,
    /// Also read and decompress every frame, and count its lines.
    #[arg(long)]
    pub deep: bool,
    /// The name of the file that says that an hour is complete.
    #[arg(long, value_name = "NAME", default_value = "_SUCCESS")]
    pub success_file: String,
    /// One JSON object per finding, and one with the totals, for programs.
    #[arg(long)]
    pub json: bool,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weight {
    /// Something is lost, double or altered, or can't be proved.
    Wrong,
    /// Worth knowing.
    Note,
}

struct Audit<'a> {
    dfs: Arc<dyn Dfs>,
    options: &'a Options,
    out: &'a mut dyn Write,
    files: Vec<String>,
    streams: Streams,
    totals: Totals,
    /// The directories of the hours that were read.
    audited: BTreeSet<DfsPath>,
    /// Hours that a root was perhaps working on when they were read.
    doubtful: Vec<(HourDir, Hour)>,
    /// What was in the lanes when they were read last.
    waiting: Waiting,
    /// The files that wait to be published.
    unpublished: BTreeSet<String>,
    /// Of these, those whose ends can't be read yet: they are being written.
    unfinished: BTreeSet<String>,
    /// Of these, those that can't be read, and why.
    unreadable: BTreeMap<String, String>,
    /// The oldest hour of each category that has a manifest.
    oldest: BTreeMap<CategoryName, i64>,
    /// The first hour of each category that there ever was, by the ledgers.
    first: BTreeMap<CategoryName, i64>,
    /// Start and size of each published hour; none where nothing tells the size.
    spans: BTreeMap<CategoryName, Vec<(i64, Option<u32>)>>,
    /// Days with nothing in them.
    empty_days: Vec<(CategoryName, DfsPath)>,
}

#[derive(Debug, Default)]
struct Totals {
    hours: u64,
    files: u64,
    late_files: u64,
    frames: u64,
    records: u64,
    bytes: u64,
    lost_bytes: u64,
    wrong: u64,
    notes: u64,
}

/// Audits what `options` name. Returns whether all is right.
///
/// # Errors
/// When something can't be read or written, or there is nothing to audit.
pub async fn run(options: &Options, out: &mut dyn Write) -> anyhow::Result<bool> {
    let uri = if options.sink.contains("://") {
        options.sink.clone()
    } else {
        let path = std::path::absolute(&options.sink).with_context(|| options.sink.clone())?;
        format!("file://{}", path.display())
    };
    if let Some(local) = uri.strip_prefix("file://")
        && !std::path::Path::new(local).is_dir()
    {
        bail!("{local}: there is no such directory");
    }
    let dfs = open_dfs(&uri, &DfsOptions::default()).await?;
    audit(dfs, options, out).await
}

async fn audit(dfs: Arc<dyn Dfs>, options: &Options, out: &mut dyn Write) -> anyhow::Result<bool> {
    let audit = Audit {
        dfs,
        options,
        out,
        files: Vec::new(),
        streams: Streams::default(),
        totals: Totals::default(),
        audited: BTreeSet::new(),
        doubtful: Vec::new(),
        waiting: Waiting::default(),
        unpublished: BTreeSet::new(),
        unfinished: BTreeSet::new(),
        unreadable: BTreeMap::new(),
        oldest: BTreeMap::new(),
        first: BTreeMap::new(),
        spans: BTreeMap::new(),
        empty_days: Vec::new(),
    };
    audit.run().await
}

impl Audit<'_> {
    async fn run(mut self) -> anyhow::Result<bool> {
        self.look().await?;
        if self.totals.hours == 0 {
            bail!("{}: no hour is published there that this audit is about", self.options.sink);
        }
        for (dir, hour) in std::mem::take(&mut self.doubtful) {
            self.tell_hour(&dir, &hour)?;
        }
        for (path, reason) in std::mem::take(&mut self.unreadable) {
            self.find(Weight::Note, &path, &format!("it waits to be published, and can't be read: {reason}"))?;
        }
        if self.options.hour.is_none() {
            self.tell_missing_hours()?;
        }
        let mut streams = std::mem::take(&mut self.streams);
        self.totals_of_streams(&mut streams)?;
        self.tell_totals(streams.count())?;
        Ok(self.totals.wrong == 0)
    }

    async fn audit_hour(&mut self, dir: HourDir) -> anyhow::Result<()> {
        self.audited.insert(dir.path.clone());
        let far = |moment: i64| !(dir.start_s..dir.start_s + i64::from(DAY_S)).contains(&moment);
        if self.options.hour.is_some_and(far) {
            return Ok(());
        }
        let manifest: Option<Form<Manifest>> = self.form(&dir.path.join(MANIFEST_FILE)).await;
        let size = match &manifest {
            Some(Ok(manifest)) => Some(manifest.bucket_size_s),
            _ => size_of(dir.path.name()),
        };
        if let Some(moment) = self.options.hour
            && moment >= dir.start_s + i64::from(size.unwrap_or(3600))
        {
            return Ok(());
        }
        self.spans.entry(dir.category.clone()).or_default().push((dir.start_s, size));
        if manifest.is_some() {
            let oldest = self.oldest.entry(dir.category.clone()).or_insert(dir.start_s);
            *oldest = dir.start_s.min(*oldest);
        }
        let mut hour = Hour {
            category: dir.category.clone(),
            start_s: dir.start_s,
            path: dir.path.clone(),
            manifest,
            partial: self.form(&dir.path.join(PARTIAL_FILE)).await,
            seals: BTreeMap::new(),
            own: Folder::default(),
            late: Folder::default(),
            late_manifests: BTreeMap::new(),
        };
        self.read_folder(&dir, &dir.path, &mut hour.own).await?;
        for name in &hour.own.others {
            if let Some(lane) = lane_of_seal(name)
                && let Some(seal) = self.form(&dir.path.join(name)).await
            {
                hour.seals.insert(lane, seal);
            }
        }
        self.read_late(&dir, &mut hour).await?;
        if let Some(Ok(manifest)) = &hour.manifest {
            for lost in &manifest.losses {
                self.streams.add_lost(&dir.category, lost.stream, lost.from..lost.to);
                self.totals.lost_bytes += lost.to.saturating_sub(lost.from);
            }
        }
        self.totals.hours += 1;
        self.totals.files += hour.own.data.len() as u64;
        if hour.may_be_moving(&self.options.success_file) {
            self.doubtful.push((dir, hour));
            return Ok(());
        }
        self.tell_hour(&dir, &hour)
    }

    fn tell_hour(&mut self, dir: &HourDir, hour: &Hour) -> anyhow::Result<()> {
        let found = hour.misfits(&self.options.success_file, &self.waiting);
        for (weight, sentences) in [(Weight::Wrong, found.wrong), (Weight::Note, found.notes)] {
            for what in sentences {
                self.find(weight, dir.path.as_str(), &what)?;
            }
        }
        Ok(())
    }

    /// Reads what came late, as far as it was not read yet.
    async fn read_late(&mut self, dir: &HourDir, hour: &mut Hour) -> anyhow::Result<()> {
        let late = dir.path.join(LATE_DIR);
        let had = hour.late.data.len();
        self.read_folder(dir, &late, &mut hour.late).await?;
        self.totals.late_files += (hour.late.data.len() - had) as u64;
        for name in &hour.late.others {
            if let Some(file) = file_of_late_manifest(name)
                && !hour.late_manifests.contains_key(file)
                && let Some(manifest) = self.form(&late.join(late_manifest_of(file))).await
            {
                hour.late_manifests.insert(file.to_owned(), manifest);
            }
        }
        Ok(())
    }

    /// Reads the data files of a directory that are not in `folder` yet, and the names of all others.
    async fn read_folder(&mut self, hour: &HourDir, dir: &DfsPath, folder: &mut Folder) -> anyhow::Result<()> {
        let is_day = dir.name().starts_with("dt=");
        for entry in self.list_or_tell(dir).await? {
            if is_data(&entry.name) && !entry.status.is_dir {
                let path = dir.join(&entry.name);
                if let btree_map::Entry::Vacant(unread) = folder.data.entry(entry.name) {
                    unread.insert(self.read_data(hour, &path, entry.status.len).await?);
                }
            } else if !(is_day && entry.status.is_dir && published::is_hour_of_a_day(&entry.name)) {
                folder.others.insert(entry.name);
            }
        }
        Ok(())
    }

    async fn read_data(&mut self, hour: &HourDir, path: &DfsPath, len: u64) -> anyhow::Result<Data> {
        let file = FileNo(u32::try_from(self.files.len()).context("more than 4,294,967,295 files")?);
        self.files.push(path.to_string());
        let source = Source::Dfs(Arc::clone(&self.dfs), path.clone());
        let mut frames = Frames::new(path.to_string(), source, len, self.options.deep);
        let mut data = Data { len, contents: Contents::default(), damage: Vec::new() };
        loop {
            let Frame { offset, header, raw } = match frames.next().await {
                Ok(Some(Ok(frame))) => frame,
                Ok(None) => break,
                Ok(Some(Err(error))) => {
                    data.damage.push(format!("at {} of {len}: {error}", frames.offset()));
                    break;
                }
                Err(error) => {
                    data.damage.push(format!("at {} of {len} it can't be read: {error:#}", frames.offset()));
                    break;
                }
            };
            if header.category != hour.category || header.bucket.start_s() != hour.start_s {
                data.damage.push(format!("the frame at {offset} is of {} {}", header.category, header.bucket));
            }
            if let Some(raw) = raw {
                for (index, slice) in header.slices.iter().enumerate() {
                    let lines = memchr::memchr_iter(b'\n', &raw[header.slice_range(index)]).count() as u64;
                    if lines != slice.records {
                        let said = slice.records;
                        data.damage.push(format!("the frame at {offset} has {lines} lines where it says {said}"));
                    }
                }
            }
            for slice in &header.slices {
                let age = self.age(hour, slice);
                self.streams.add(&header.category, slice, file, offset, age);
            }
            data.contents.push(u64::from(header.frame_len), header.checksum(), &header.slices);
            self.totals.frames += 1;
        }
        self.totals.records += data.contents.records;
        self.totals.bytes += len;
        Ok(data)
    }

    fn age(&self, hour: &HourDir, slice: &SliceDescriptor) -> Age {
        match self.oldest.get(&hour.category) {
            Some(oldest) if *oldest < hour.start_s => Age::Later,
            Some(oldest) if *oldest == hour.start_s && slice.first_time_ms >= (oldest + EDGE_S) * 1000 => Age::Oldest,
            _ => Age::Edge,
        }
    }

    /// What is known of the hours before those that are audited.
    fn older(&self, category: &CategoryName) -> Older {
        if self.options.since.is_some() || self.options.hour.is_some() {
            return Older::Unread;
        }
        match (self.oldest.get(category), self.first.get(category)) {
            (Some(oldest), Some(first)) if oldest <= first => Older::None,
            _ => Older::Perhaps,
        }
    }

    /// What is no hour and lies where hours are.
    fn tell_foreign(&mut self, category: &CategoryName, tree: &Tree) -> anyhow::Result<()> {
        if tree.days == 0 {
            return self.find(Weight::Note, category.as_str(), "it holds no day: it is not taken for a category");
        }
        for path in &tree.foreign {
            let place = path.parent().unwrap_or_default();
            let name = path.name();
            if published::is_hidden(name) {
                let what = format!("{name} doesn't belong here; readers skip names like this");
                self.find(Weight::Note, place.as_str(), &what)?;
            } else {
                let what = format!("{name} doesn't belong here: whoever reads {place} reads it, too");
                self.find(Weight::Wrong, place.as_str(), &what)?;
            }
        }
        Ok(())
    }

    /// The hours that are not there, between those that are. It is no mistake: of a backlog only the hours with data are
    /// published.
    fn tell_missing_hours(&mut self) -> anyhow::Result<()> {
        let mut spans = std::mem::take(&mut self.spans);
        for (category, path) in std::mem::take(&mut self.empty_days) {
            if spans.get(&category).is_some_and(|spans| spans.iter().any(|(_, size)| *size == Some(DAY_S))) {
                self.find(Weight::Wrong, path.as_str(), "it is empty: no job may rely on this day")?;
            }
        }
        for (category, spans) in &mut spans {
            spans.sort_unstable();
            let mut end = None;
            for (start_s, size) in spans {
                if let Some(end) = end.filter(|end| *end < *start_s) {
                    let what = format!("no hour is published from {} to {}", moment(end), moment(*start_s));
                    self.find(Weight::Note, category.as_str(), &what)?;
                }
                end = size.map(|size| end.unwrap_or(i64::MIN).max(*start_s + i64::from(size)));
            }
        }
        Ok(())
    }

    fn totals_of_streams(&mut self, streams: &mut Streams) -> anyhow::Result<()> {
        let (mut outside, mut before) = (0, 0);
        let misfits: Vec<_> = streams.misfits(|category| self.older(category)).collect();
        for (name, misfit) in misfits {
            let StreamName { category, stream, agent, host } = &name;
            let place = format!("{category} {stream} of {agent} ({host})");
            let (weight, what) = match misfit {
                Misfit::Gap(bytes) | Misfit::Before(bytes) if self.options.hour.is_some() => {
                    outside += bytes.end - bytes.start;
                    continue;
                }
                Misfit::Before(bytes) => {
                    before += bytes.end - bytes.start;
                    continue;
                }
                Misfit::Gap(bytes) => {
                    let mut what = format!("the bytes {}..{} are in no file", bytes.start, bytes.end);
                    if !self.unfinished.is_empty() {
                        let files = self.unfinished.len();
                        what.push_str(&format!("; {files} that are being written can't be read to their ends yet"));
                    }
                    (Weight::Wrong, what)
                }
                Misfit::Overlap { bytes, first, second, altered } => {
                    let what = format!(
                        "the bytes {}..{} are in {} (frame at {} or later) and in {} (frame at {} or later)",
                        bytes.start,
                        bytes.end,
                        self.files[first.file.0 as usize],
                        first.offset,
                        self.files[second.file.0 as usize],
                        second.offset
                    );
                    match altered {
                        true => {
                            (Weight::Note, format!("{what}; they hold altered records, which were perhaps sent twice"))
                        }
                        false => (Weight::Wrong, what),
                    }
                }
                Misfit::Contradiction { offset, first, second } => (
                    Weight::Wrong,
                    format!(
                        "{} and {} tell other bytes before {offset}",
                        self.files[first.0 as usize], self.files[second.0 as usize]
                    ),
                ),
            };
            self.find(weight, &place, &what)?;
        }
        if outside > 0 {
            let what = format!(
                "{outside} bytes of its streams are in other hours, or nowhere: --hour proves an hour by its manifest and its \
                 seals alone; an audit of all hours tells whether a stream has a gap"
            );
            self.find(Weight::Note, "the streams", &what)?;
        }
        if before > 0 {
            let what =
                format!("{before} bytes are in hours before the oldest ones that were read, or nowhere: nothing tells");
            self.find(Weight::Note, "the streams", &what)?;
        }
        Ok(())
    }

    fn find(&mut self, weight: Weight, place: &str, what: &str) -> anyhow::Result<()> {
        let (label, counter) = match weight {
            Weight::Wrong => ("wrong", &mut self.totals.wrong),
            Weight::Note => ("note", &mut self.totals.notes),
        };
        *counter += 1;
        if self.options.json {
            writeln!(self.out, "{}", json!({ "finding": label, "place": place, "what": what }))?;
        } else {
            writeln!(self.out, "{label}: {place}: {what}")?;
        }
        Ok(())
    }

    fn tell_totals(&mut self, streams: usize) -> anyhow::Result<()> {
        let Totals { hours, files, late_files, frames, records, bytes, lost_bytes, wrong, notes } = self.totals;
        let unpublished_files = self.unpublished.len();
        let deep = self.options.deep;
        if self.options.json {
            let totals = json!({
                "hours": hours, "files": files, "late_files": late_files, "unpublished_files": unpublished_files,
                "frames": frames, "streams": streams, "records": records, "bytes": bytes, "declared_lost_bytes": lost_bytes,
                "deep": deep,
                "wrong": wrong, "notes": notes,
            });
            writeln!(self.out, "{totals}")?;
            return Ok(());
        }
        let verdict = if wrong == 0 { "all is right" } else { "something is wrong" };
        let read = if deep { "all bytes read" } else { "headers read" };
        writeln!(
            self.out,
            "{hours} hours, {files} files, {late_files} late files, {frames} frames, {streams} streams, {records} records, \
             {bytes} bytes, {lost_bytes} bytes declared as lost; {read}; {wrong} wrong, {notes} notes: {verdict}"
        )?;
        Ok(())
    }

    async fn list(&self, dir: &DfsPath) -> anyhow::Result<Vec<DirEntry>> {
        Ok(self.dfs.list(dir).await?.unwrap_or_default())
    }

    /// The same; what the sink refuses is a finding.
    async fn list_or_tell(&mut self, dir: &DfsPath) -> anyhow::Result<Vec<DirEntry>> {
        match self.dfs.list(dir).await {
            Ok(entries) => Ok(entries.unwrap_or_default()),
            Err(error @ DfsError::Refused { .. }) => {
                self.find(Weight::Wrong, dir.as_str(), &format!("it can't be listed: {error}"))?;
                Ok(Vec::new())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A JSON file, if it is there.
    async fn form<T: DeserializeOwned>(&self, path: &DfsPath) -> Option<Form<T>> {
        match read_whole(&*self.dfs, path).await {
            Ok(bytes) => Some(serde_json::from_slice(&bytes).map_err(|error| error.to_string())),
            Err(DfsError::NotFound { .. }) => None,
            Err(error) => Some(Err(error.to_string())),
        }
    }
}

/// How long the hour is whose directory has this name, as far as the name tells.
fn size_of(name: &str) -> Option<u32> {
    match name.split_once('=')?.0 {
        "dt" => Some(DAY_S),
        "hr" => Some(3600),
        _ => None,
    }
}

fn moment(second: i64) -> String {
    Timestamp::from_second(second)
        .map_or_else(|_| second.to_string(), |moment| moment.strftime("%Y-%m-%dT%H:%MZ").to_string())
}

fn is_data(name: &str) -> bool {
    !name.starts_with(['_', '.']) && (name.ends_with(".gz") || name.ends_with(".zst"))
}

#[cfg(test)]
mod tests;
