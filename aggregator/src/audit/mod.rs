//! `audit`: proves from the files alone that what is published is whole: no stream has a gap or an overlap, every file is as its
//! manifest says, and every manifest is what the seals make.
//!
//! It knows nothing but the files, and trusts none of them: frames name the bytes they hold, manifests name the frames' files,
//! seals name what each lane contributed. What one of them says is compared with what the others do.
//!
//! Memory: some hundred bytes for each stream, and about a hundred for each frame that doesn't continue the one before it.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use serde::de::DeserializeOwned;
use serde_json::json;
use tributary_common::ids::{CategoryName, LaneId};

mod hour;
mod streams;

use crate::dfs::{Dfs, DfsOptions, DfsPath, DirEntry, open_dfs};
use crate::frames::{Frame, Frames, Source};
use crate::published::{self, HourDir, parse_moment};
use crate::root::hours::{LATE_DIR, MANIFEST_FILE};
use crate::root::ledger::Contents;
use crate::root::sink::{lanes_dir, read_whole};
use hour::{Data, Folder, Form, Hour, late_manifest_of};
use streams::{FileNo, Misfit, StreamName, Streams};

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
    /// Only hours that begin at this moment or later, as when older ones were removed.
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
}

#[derive(Debug, Default)]
struct Totals {
    hours: u64,
    files: u64,
    late_files: u64,
    unpublished_files: u64,
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
    let streams = Streams::default();
    Audit { dfs, options, out, files: Vec::new(), streams, totals: Totals::default() }.run().await
}

impl Audit<'_> {
    async fn run(mut self) -> anyhow::Result<bool> {
        let mut hours = Vec::new();
        for category in published::categories(&*self.dfs).await? {
            if self.options.category.as_ref().is_none_or(|wanted| *wanted == category) {
                let since = self.options.since.unwrap_or(i64::MIN);
                hours.extend(published::hours(&*self.dfs, &category, since).await?);
            }
        }
        let whole = self.options.hour.is_none() && self.options.since.is_none();
        if whole {
            // Before the published files: what moves meanwhile is then seen twice, and not missed.
            self.read_lanes().await?;
            for hour in hours.iter().filter(|hour| !hour.published) {
                self.read_unpublished(&hour.path).await?;
            }
        }
        for hour in hours.into_iter().filter(|hour| hour.published) {
            self.audit_hour(hour).await?;
        }
        if self.totals.hours == 0 {
            bail!("{}: no hour is published there that this audit is about", self.options.sink);
        }
        let mut streams = std::mem::take(&mut self.streams);
        self.totals_of_streams(&mut streams, whole)?;
        self.tell_totals(streams.count())?;
        Ok(self.totals.wrong == 0)
    }

    /// The segments that roots are writing, and those that wait for the end of their hour.
    async fn read_lanes(&mut self) -> anyhow::Result<()> {
        let dirs = |entries: Vec<DirEntry>| entries.into_iter().filter(|entry| entry.status.is_dir);
        for lane in dirs(self.list(&lanes_dir()).await?) {
            let lane = lanes_dir().join(&lane.name);
            for epoch in dirs(self.list(&lane).await?) {
                self.read_unpublished(&lane.join(&epoch.name)).await?;
            }
        }
        Ok(())
    }

    async fn read_unpublished(&mut self, dir: &DfsPath) -> anyhow::Result<()> {
        for entry in self.list(dir).await? {
            if !is_data(&entry.name) {
                continue;
            }
            let path = dir.join(&entry.name);
            let source = Source::Dfs(Arc::clone(&self.dfs), path.clone());
            let mut frames = Frames::new(path.to_string(), source, entry.status.len, false);
            // It may be published or deleted at any time, and its end may be half written.
            while let Ok(Some(Ok(frame))) = frames.next().await {
                for slice in &frame.header.slices {
                    self.streams.add_unpublished(&frame.header.category, slice);
                }
            }
            self.totals.unpublished_files += 1;
        }
        Ok(())
    }

    async fn audit_hour(&mut self, dir: HourDir) -> anyhow::Result<()> {
        let manifest = self.form(&dir.path.join(MANIFEST_FILE)).await?;
        if let Some(moment) = self.options.hour {
            let size = match &manifest {
                Some(Ok(crate::root::hours::Manifest { bucket_size_s, .. })) => i64::from(*bucket_size_s),
                _ => 3600,
            };
            if !(dir.start_s..dir.start_s + size).contains(&moment) {
                return Ok(());
            }
        }
        let mut hour = Hour {
            category: dir.category.clone(),
            start_s: dir.start_s,
            dir_name: dir.path.name().to_owned(),
            manifest,
            seals: BTreeMap::new(),
            own: Folder::default(),
            late: Folder::default(),
            late_manifests: BTreeMap::new(),
        };
        hour.own = self.read_folder(&dir, &dir.path).await?;
        let late = dir.path.join(LATE_DIR);
        hour.late = self.read_folder(&dir, &late).await?;
        for name in &hour.own.others {
            let lane = name.strip_prefix("_seal-").and_then(|name| name.strip_suffix(".json"));
            if let Some(lane) = lane.and_then(|lane| lane.parse().ok()).map(LaneId)
                && let Some(seal) = self.form(&dir.path.join(name)).await?
            {
                hour.seals.insert(lane, seal);
            }
        }
        for name in &hour.late.others {
            let file = name.strip_prefix('_').and_then(|name| name.strip_suffix(".manifest.json"));
            if let Some(file) = file
                && let Some(manifest) = self.form(&late.join(late_manifest_of(file))).await?
            {
                hour.late_manifests.insert(file.to_owned(), manifest);
            }
        }
        if let Some(Ok(manifest)) = &hour.manifest {
            for lost in &manifest.losses {
                self.streams.add_lost(&dir.category, lost.stream, lost.from..lost.to);
                self.totals.lost_bytes += lost.to.saturating_sub(lost.from);
            }
        }
        self.totals.hours += 1;
        self.totals.files += hour.own.data.len() as u64;
        self.totals.late_files += hour.late.data.len() as u64;
        for what in hour.misfits(&self.options.success_file) {
            self.find(Weight::Wrong, dir.path.as_str(), &what)?;
        }
        Ok(())
    }

    /// Reads the data files of a directory, and the names of all others.
    async fn read_folder(&mut self, hour: &HourDir, dir: &DfsPath) -> anyhow::Result<Folder> {
        let mut folder = Folder::default();
        for entry in self.list(dir).await? {
            if is_data(&entry.name) && !entry.status.is_dir {
                let data = self.read_data(hour, &dir.join(&entry.name), entry.status.len).await?;
                folder.data.insert(entry.name, data);
            } else if !published::is_hour_of_a_day(&entry.name) {
                folder.others.insert(entry.name);
            }
        }
        Ok(folder)
    }

    async fn read_data(&mut self, hour: &HourDir, path: &DfsPath, len: u64) -> anyhow::Result<Data> {
        let file = FileNo(u32::try_from(self.files.len()).context("more than 4,294,967,295 files")?);
        self.files.push(path.to_string());
        let source = Source::Dfs(Arc::clone(&self.dfs), path.clone());
        let mut frames = Frames::new(path.to_string(), source, len, self.options.deep);
        let mut data = Data { len, contents: Contents::default(), damage: Vec::new() };
        while let Some(frame) = frames.next().await? {
            let Frame { offset, header, raw } = match frame {
                Ok(frame) => frame,
                Err(error) => {
                    data.damage.push(format!("at {} of {len}: {error}", frames.offset()));
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
                self.streams.add(&header.category, slice, file, offset);
            }
            data.contents.push(u64::from(header.frame_len), header.checksum(), &header.slices);
            self.totals.frames += 1;
        }
        self.totals.records += data.contents.records;
        self.totals.bytes += len;
        Ok(data)
    }

    fn totals_of_streams(&mut self, streams: &mut Streams, whole: bool) -> anyhow::Result<()> {
        let mut outside = 0;
        for (name, misfit) in streams.misfits() {
            let StreamName { category, stream, agent, host } = &name;
            let place = format!("{category} {stream} of {agent} ({host})");
            let (weight, what) = match misfit {
                // Lines of other hours than those that were looked at: the manifests prove these ones.
                Misfit::Gap(gap) if !whole => {
                    outside += gap.end - gap.start;
                    continue;
                }
                Misfit::Gap(gap) => (Weight::Wrong, format!("the bytes {}..{} are in no file", gap.start, gap.end)),
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
            let what = format!("{outside} bytes of its streams are in hours that this audit was not about");
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
        let Totals { hours, files, late_files, unpublished_files, frames, records, bytes, lost_bytes, wrong, notes } =
            self.totals;
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

    /// A JSON file, if it is there.
    async fn form<T: DeserializeOwned>(&self, path: &DfsPath) -> anyhow::Result<Option<Form<T>>> {
        if self.dfs.stat(path).await?.is_none() {
            return Ok(None);
        }
        let bytes = read_whole(&*self.dfs, path).await?;
        Ok(Some(serde_json::from_slice(&bytes).map_err(|error| error.to_string())))
    }
}

fn is_data(name: &str) -> bool {
    !name.starts_with(['_', '.']) && (name.ends_with(".gz") || name.ends_with(".zst"))
}

#[cfg(test)]
mod tests;
