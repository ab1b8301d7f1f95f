//! How a sink is looked at on which roots work meanwhile.
//!
//! Files go one way: from a lane into an hour that is hidden, which then becomes visible as a whole, or beside a visible one.
//! So the lanes are read first, then the hidden hours, then all is listed again, and the visible hours are read: what moves
//! meanwhile is seen twice, and not missed. A lane whose directory got another name meanwhile is read again.
//!
//! That leaves what was written after the lanes were read and is between bytes that were published before the visible hours
//! were. So what may be a movement is not told before the sink was looked at again in the same order.

use std::collections::BTreeSet;
use std::sync::Arc;

use tributary_common::ids::{CategoryName, LaneId};

use super::hour::Waiting;
use super::{Audit, Weight, is_data};
use crate::dfs::{DfsError, DfsPath, DirEntry};
use crate::frames::{Frames, Source};
use crate::published::{self, Tree};
use crate::root::hours::LATE_DIR;
use crate::root::ledger::Entry;
use crate::root::recovery::epoch_of;
use crate::root::sink::{lanes_dir, read_whole};

/// How often the sink is looked at before what may be a movement is told.
const LOOKS: usize = 3;

/// How often a lane is read that has another owner each time.
const LANE_LOOKS: usize = 5;

impl Audit<'_> {
    /// Reads all that the audit is about.
    pub(super) async fn look(&mut self) -> anyhow::Result<()> {
        let trees = self.look_once(false).await?;
        if self.options.hour.is_none() {
            for (category, tree) in trees {
                self.tell_foreign(&category, &tree)?;
                self.empty_days.extend(tree.empty_days.into_iter().map(|(_, path)| (category.clone(), path)));
            }
        }
        for _ in 1..LOOKS {
            if self.doubtful.is_empty() && self.with_gaps().is_empty() {
                break;
            }
            self.look_once(true).await?;
            self.read_what_came_late().await?;
        }
        if let Some(since) = self.options.since {
            self.read_older(since).await?;
        }
        Ok(())
    }

    async fn look_once(&mut self, again: bool) -> anyhow::Result<Vec<(CategoryName, Tree)>> {
        self.unfinished.clear();
        self.unreadable.clear();
        let all = self.options.hour.is_none();
        if all || again {
            self.read_lanes().await?;
        }
        let mut trees = self.trees().await?;
        if all {
            for hour in trees.iter().flat_map(|(_, tree)| &tree.hours).filter(|hour| !hour.published) {
                for entry in data_files(self.list(&hour.path).await?) {
                    self.read_unpublished(&hour.path.join(&entry.name), entry.status.len).await;
                }
            }
            trees = self.trees().await?;
        }
        for hour in trees.iter_mut().flat_map(|(_, tree)| std::mem::take(&mut tree.hours)) {
            if hour.published && !self.audited.contains(&hour.path) {
                self.audit_hour(hour).await?;
            }
        }
        Ok(trees)
    }

    async fn trees(&self) -> anyhow::Result<Vec<(CategoryName, Tree)>> {
        let since = self.options.since.unwrap_or(i64::MIN);
        let mut trees = Vec::new();
        for category in published::categories(&*self.dfs).await? {
            if self.options.category.as_ref().is_none_or(|wanted| *wanted == category) {
                let tree = published::tree(&*self.dfs, &category, since).await?;
                trees.push((category, tree));
            }
        }
        Ok(trees)
    }

    /// The categories of which bytes are missing as far as all was read. With `--hour` nothing is missing: the other hours were
    /// not read.
    fn with_gaps(&mut self) -> BTreeSet<CategoryName> {
        if self.options.hour.is_some() {
            return BTreeSet::new();
        }
        let mut streams = std::mem::take(&mut self.streams);
        let found = streams.with_gaps(|category| self.older(category));
        self.streams = streams;
        found
    }

    /// The segments that roots are writing, and those that wait for the end of their hour.
    async fn read_lanes(&mut self) -> anyhow::Result<()> {
        self.waiting = Waiting::default();
        let lanes = lanes_dir();
        let above = lanes.parent().unwrap_or_default();
        // While their number is changed, files go from `lanes.old-2` into `lanes.new-4`, which then becomes `lanes`.
        let is_lanes =
            |name: &str| name.strip_prefix(lanes.name()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        for dir in dirs(self.list(&above).await?).filter(|dir| is_lanes(dir)).collect::<BTreeSet<_>>().into_iter().rev()
        {
            let dir = above.join(dir);
            for lane in dirs(self.list(&dir).await?) {
                self.read_lane(&dir.join(lane)).await?;
            }
        }
        Ok(())
    }

    async fn read_lane(&mut self, lane: &DfsPath) -> anyhow::Result<()> {
        let mut epochs = self.epochs(lane).await?;
        for _ in 0..LANE_LOOKS {
            for epoch in &epochs {
                self.read_epoch(lane, epoch).await?;
            }
            let now = self.epochs(lane).await?;
            if now == epochs {
                return Ok(());
            }
            epochs = now;
        }
        let what = "it had another owner each time that it was read: some of its files were perhaps not seen";
        self.find(Weight::Note, lane.as_str(), what)
    }

    async fn epochs(&self, lane: &DfsPath) -> anyhow::Result<Vec<DfsPath>> {
        let names = dirs(self.list(lane).await?).filter(|name| epoch_of(name).is_some());
        Ok(names.map(|name| lane.join(name)).collect())
    }

    /// The files of a lane.
    async fn read_epoch(&mut self, lane: &DfsPath, epoch: &DfsPath) -> anyhow::Result<()> {
        let entries = self.list(epoch).await?;
        let ledger: Vec<u64> = entries.iter().filter_map(|entry| Entry::number_of(&entry.name)).collect();
        for entry in data_files(entries) {
            self.read_unpublished(&epoch.join(&entry.name), entry.status.len).await;
            self.waiting.files.insert(entry.name);
        }
        let Ok(lane) = lane.name().parse().map(LaneId) else { return Ok(()) };
        // Which hour was the first of each category. An entry that can't be read tells nothing.
        for number in ledger {
            let path = epoch.join(Entry::file_name(number));
            let Ok(bytes) = read_whole(&*self.dfs, &path).await else { continue };
            let Ok(entry) = Entry::decode(&bytes, lane, number) else { continue };
            for (category, bucket) in entry.first_buckets {
                let first = self.first.entry(category).or_insert(bucket.start_s());
                *first = bucket.start_s().min(*first);
            }
        }
        Ok(())
    }

    async fn read_unpublished(&mut self, path: &DfsPath, len: u64) {
        self.fill_from(path, len).await;
        self.unpublished.insert(path.name().to_owned());
    }

    /// Late files of hours that were read before: what is in them is not missing.
    async fn read_what_came_late(&mut self) -> anyhow::Result<()> {
        for (dir, mut hour) in std::mem::take(&mut self.doubtful) {
            self.read_late(&dir, &mut hour).await?;
            self.doubtful.push((dir, hour));
        }
        let known: BTreeSet<String> = self.files.iter().cloned().collect();
        for hour in self.audited.clone() {
            let late = hour.join(LATE_DIR);
            // That it can't be listed was told when it was read.
            for entry in data_files(self.dfs.list(&late).await.ok().flatten().unwrap_or_default()) {
                let path = late.join(&entry.name);
                if !known.contains(path.as_str()) {
                    self.fill_from(&path, entry.status.len).await;
                }
            }
        }
        Ok(())
    }

    /// Looks for what is missing in the hours that are too old for this audit, the newest first: a line may be written hours
    /// after its time.
    async fn read_older(&mut self, since: i64) -> anyhow::Result<()> {
        for category in self.with_gaps() {
            let hours = published::hours(&*self.dfs, &category, i64::MIN).await?;
            for hour in hours.iter().rev().filter(|hour| hour.published && hour.start_s < since) {
                for dir in [hour.path.clone(), hour.path.join(LATE_DIR)] {
                    for entry in data_files(self.list(&dir).await?) {
                        self.fill_from(&dir.join(&entry.name), entry.status.len).await;
                    }
                }
                if !self.with_gaps().contains(&category) {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Adds what is in a file to what is not missing. It may be moved or deleted at any time, and its end may be half written.
    async fn fill_from(&mut self, path: &DfsPath, len: u64) {
        let source = Source::Dfs(Arc::clone(&self.dfs), path.clone());
        let mut frames = Frames::new(path.to_string(), source, len, false);
        // Of a file on HDFS that is being written, the length is told without the end.
        let mut unfinished = len == 0;
        loop {
            match frames.next().await {
                Ok(Some(Ok(frame))) => {
                    let header = frame.header;
                    for slice in &header.slices {
                        self.streams.add_unpublished(&header.category, slice);
                    }
                    self.waiting.hours.insert((header.category, header.bucket.start_s()));
                    continue;
                }
                Ok(None) => {}
                Ok(Some(Err(_))) => unfinished = true,
                // It is where it was moved to, and seen there.
                Err(error) if matches!(error.downcast_ref(), Some(DfsError::NotFound { .. })) => {}
                Err(error) => {
                    self.unreadable.insert(path.to_string(), format!("{error:#}"));
                }
            }
            break;
        }
        if unfinished {
            self.unfinished.insert(path.to_string());
        }
    }
}

fn dirs(entries: Vec<DirEntry>) -> impl Iterator<Item = String> {
    entries.into_iter().filter(|entry| entry.status.is_dir).map(|entry| entry.name)
}

fn data_files(entries: Vec<DirEntry>) -> impl Iterator<Item = DirEntry> {
    entries.into_iter().filter(|entry| is_data(&entry.name) && !entry.status.is_dir)
}
