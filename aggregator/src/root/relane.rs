//! Changing the number of lanes of a base directory: by an operator, while no root serves it.
//!
//! # Steps, and what a crash between any two of them leaves
//!
//! | Step | What is on the sink then | The next run |
//! |---|---|---|
//! | 1 | `_tributary/changing/<from>-to-<to>/`: no root takes a lane any more; each looks again after it has taken one | begins at 2 |
//! | 2 | every old lane is fenced and read; what was found in it has settled; its ledger ends with a snapshot of all | begins at 2 |
//! | 3 | `_tributary/lanes.new/`: the new lanes with their ledgers, each with the streams of its agents and with its share of the old segments, whose files are not there yet | begins at 2, and makes it anew |
//! | 4 | `…/changing/<from>-to-<to>/ready`: from here on there is no way back, only forward | goes on from 5 |
//! | 5 | `lanes` is `lanes.old` | goes on |
//! | 6 | the files of the old segments lie in the new lanes | goes on |
//! | 7 | `lanes.new` is `lanes` | goes on |
//! | 8 | `base.json` says the new number | goes on |
//! | 9 | `lanes.old` and `changing` are gone | nothing is left to do |
//!
//! Until step 4 nothing was changed that a root would not have changed by taking the lanes. A change that is refused takes its
//! mark back, and the roots go on with the old number.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tributary_common::ids::{Epoch, LaneCount, LaneId};

use super::lane::LaneSettings;
use super::ledger::{Entry, HourKey, HourRecord, HourState, SegmentRecord, StreamRecord};
use super::marks::OWNER_DIR;
use super::recovery::{self, CHANGING_DIR, TakeError, base_path, changing, epoch_of, nonce, read_base, write_base};
use super::replication::Replication;
use super::segment::Counts;
use super::sink::{LaneSink, lanes_dir};
use crate::dfs::{CreateOptions, Dfs, DfsError, DfsPath};

/// The block size of the few small files that are made here.
const BLOCK_BYTES: u64 = 1 << 20;

/// So many hours are named when a change is refused.
const NAMED_HOURS: usize = 5;

/// The pause between tries of a call that failed for a reason that passes.
const PAUSE: Duration = Duration::from_secs(1);

/// The number of lanes could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// A lane can't be taken or read.
    #[error("the number of lanes is as it was: {0}")]
    Take(#[from] TakeError),
    /// Another change is under way.
    #[error("a change from {from} to {to} lanes was begun and not ended: end it first, with lanes set {to}")]
    Begun {
        /// The old number.
        from: LaneCount,
        /// The new one.
        to: LaneCount,
    },
    /// The base directory is not there.
    #[error("nothing was written there yet: no roots have been started; write lanes = {0} into the topology")]
    Unborn(u16),
    /// Hours are being put together.
    #[error(
        "the number of lanes is as it was: {count} hours are sealed and not published yet, such as {hours}: start the roots with the old number, and try again when these hours are published"
    )]
    Hours {
        /// How many.
        count: usize,
        /// Some of them.
        hours: String,
    },
    /// The sink failed.
    #[error("{0}; run the same command again: it goes on where it stopped")]
    Dfs(#[from] DfsError),
}

/// What a change did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changed {
    /// The old number.
    pub from: LaneCount,
    /// The new one.
    pub to: LaneCount,
}

/// Changes the number of lanes to `to`. Returns what it was, which may be the same.
///
/// # Errors
/// When it can't be done now. It says whether the same command goes on later, or nothing was changed.
pub async fn change_lanes(dfs: &Arc<dyn Dfs>, settings: &LaneSettings, to: LaneCount) -> Result<Changed, ChangeError> {
    let change = match (changing(&**dfs).await?, read_base(&**dfs).await?) {
        (Some((from, begun)), _) if begun != to => return Err(ChangeError::Begun { from, to: begun }),
        (Some((from, _)), _) => Change { dfs, settings, from, to },
        (None, None) => return Err(ChangeError::Unborn(to.get())),
        (None, Some(from)) if from == to => return Ok(Changed { from, to }),
        (None, Some(from)) => {
            let change = Change { dfs, settings, from, to };
            dfs.mkdir_all(&change.mark()).await?;
            change
        }
    };
    if dfs.stat(&change.ready()).await?.is_none() {
        match change.prepare().await {
            Ok(()) => {}
            Err(error @ (ChangeError::Take(_) | ChangeError::Hours { .. })) => {
                change.take_back().await?;
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        dfs.mkdir_all(&change.ready()).await?;
    }
    change.finish().await?;
    Ok(Changed { from: change.from, to })
}

struct Change<'c> {
    dfs: &'c Arc<dyn Dfs>,
    settings: &'c LaneSettings,
    from: LaneCount,
    to: LaneCount,
}

fn tributary(name: &str) -> DfsPath {
    DfsPath::base().join("_tributary").join(name)
}

fn new_lanes() -> DfsPath {
    tributary("lanes.new")
}

fn old_lanes() -> DfsPath {
    tributary("lanes.old")
}

/// What the old lanes know, together.
#[derive(Default)]
struct Known {
    streams: Vec<StreamRecord>,
    segments: Vec<(LaneId, SegmentRecord)>,
    published: BTreeMap<HourKey, HourState>,
    first_buckets: BTreeMap<tributary_common::ids::CategoryName, tributary_common::bucket::Bucket>,
    epoch: Option<Epoch>,
}

impl Change<'_> {
    fn mark(&self) -> DfsPath {
        tributary(CHANGING_DIR).join(format!("{}-to-{}", self.from.get(), self.to.get()))
    }

    fn ready(&self) -> DfsPath {
        self.mark().join("ready")
    }

    /// The new lane that the files of an old one go to.
    fn heir(&self, old: LaneId) -> LaneId {
        LaneId(old.0 % self.to.get())
    }

    async fn take_back(&self) -> Result<(), DfsError> {
        self.dfs.delete(&new_lanes()).await?;
        self.dfs.delete(&tributary(CHANGING_DIR)).await
    }

    /// Steps 2 and 3.
    async fn prepare(&self) -> Result<(), ChangeError> {
        let stream_ttl_ms = i64::try_from(self.settings.stream_ttl.as_millis()).unwrap_or(i64::MAX);
        let mut taken = Vec::new();
        for lane in self.from.lanes() {
            let seized = recovery::seize(self.dfs, lane).await?;
            let now_ms = self.settings.clock.now_ms();
            taken.push((lane, recovery::read(self.dfs, lane, seized, stream_ttl_ms, now_ms).await?));
        }
        let unfinished: Vec<String> = taken
            .iter()
            .flat_map(|(_, taken)| &taken.hours)
            .filter(|(_, state)| !matches!(state, HourState::Published))
            .map(|(key, _)| key.to_string())
            .collect();
        if !unfinished.is_empty() {
            let hours = unfinished[..unfinished.len().min(NAMED_HOURS)].join(", ");
            return Err(ChangeError::Hours { count: unfinished.len(), hours });
        }
        if taken.iter().flat_map(|(_, taken)| &taken.segments).any(|found| !found.record.closed) {
            tracing::info!(seconds = self.settings.settle.as_secs(), "waiting until what was recovered has settled");
            tokio::time::sleep(self.settings.settle).await;
        }
        let mut known = Known::default();
        for (lane, mut taken) in taken {
            let mut segments = Vec::new();
            for found in taken.segments {
                for slice in found.scan.frames.iter().flat_map(|frame| &frame.slices) {
                    taken.ingest.durable(slice.stream, slice.runs.iter().map(tributary_common::frame::Run::range));
                }
                let mut record = found.record;
                if !record.closed {
                    let mut counts = Counts { records: record.records, agents: record.agents };
                    counts.add_all(&found.counts);
                    record = SegmentRecord {
                        covered: found.scan.end,
                        torn: record.torn || found.scan.torn.is_some(),
                        records: counts.records,
                        agents: counts.agents,
                        closed: true,
                        ..record
                    };
                }
                segments.push(record);
            }
            let streams = taken.ingest.records(true);
            let number = taken.last_entry.map_or(0, |last| last + 1);
            let entry = self.entry(number, lane, taken.epoch, &streams, &segments, &taken.hours, &taken.first_buckets);
            self.sink(taken.dir, lane, self.from, taken.epoch).write_entry(&entry).await?;
            known.streams.extend(streams);
            known.segments.extend(segments.into_iter().map(|segment| (lane, segment)));
            known.published.extend(taken.hours);
            for (category, bucket) in taken.first_buckets {
                let first = known.first_buckets.entry(category).or_insert(bucket);
                if bucket.start_s() < first.start_s() {
                    *first = bucket;
                }
            }
            known.epoch = known.epoch.max(Some(taken.epoch));
        }
        self.make_new_lanes(&known).await?;
        Ok(())
    }

    async fn make_new_lanes(&self, known: &Known) -> Result<(), DfsError> {
        self.dfs.delete(&new_lanes()).await?;
        // Higher than any before, so that an answer's epoch still says which of two owners of a stream came later.
        let epoch = Epoch(known.epoch.map_or(0, |epoch| epoch.0) + 1);
        for lane in self.to.lanes() {
            let dir = new_lanes().join(lane.to_string()).join(format!("e{epoch}-{}", nonce()));
            self.dfs.mkdir_all(&dir).await?;
            let streams: Vec<StreamRecord> =
                known.streams.iter().filter(|stream| stream.agent.lane(self.to) == lane).cloned().collect();
            let segments: Vec<SegmentRecord> = (known.segments.iter())
                .filter(|(old, _)| self.heir(*old) == lane)
                .map(|(_, segment)| segment.clone())
                .collect();
            let entry = self.entry(0, lane, epoch, &streams, &segments, &known.published, &known.first_buckets);
            self.sink(dir, lane, self.to, epoch).write_entry(&entry).await?;
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "all that an entry holds, for two kinds of lanes")]
    fn entry(
        &self,
        number: u64,
        lane: LaneId,
        epoch: Epoch,
        streams: &[StreamRecord],
        segments: &[SegmentRecord],
        hours: &BTreeMap<HourKey, HourState>,
        first_buckets: &BTreeMap<tributary_common::ids::CategoryName, tributary_common::bucket::Bucket>,
    ) -> Entry {
        Entry {
            number,
            lane,
            epoch,
            written_ms: self.settings.clock.now_ms(),
            snapshot: true,
            streams: streams.to_vec(),
            forgotten: Vec::new(),
            segments: segments.to_vec(),
            hours: hours.iter().map(|(key, state)| HourRecord { key: key.clone(), state: state.clone() }).collect(),
            forgotten_hours: Vec::new(),
            first_buckets: first_buckets.iter().map(|(category, bucket)| (category.clone(), *bucket)).collect(),
        }
    }

    fn sink(&self, dir: DfsPath, lane: LaneId, lanes: LaneCount, epoch: Epoch) -> LaneSink {
        LaneSink {
            dfs: Arc::clone(self.dfs),
            dir,
            lane,
            lanes,
            create: CreateOptions {
                block_size: BLOCK_BYTES,
                replication: self.settings.replication,
                sync_timeout: self.settings.sync_timeout,
            },
            replication: Arc::new(Replication::new(self.settings.replication, self.settings.min_replication)),
            epoch,
            attempts: Arc::default(),
            success_file: self.settings.success_file.clone(),
        }
    }

    /// Steps 5 to 9.
    async fn finish(&self) -> Result<(), ChangeError> {
        if self.dfs.stat(&new_lanes()).await?.is_some() {
            if self.dfs.stat(&old_lanes()).await?.is_none() {
                self.moved(&lanes_dir(), &old_lanes()).await?;
            }
            self.move_segments().await?;
            // A root that slept since it last looked at the mark may have made a lane of its own. It looks again before it
            // serves, so there is nothing in it.
            self.dfs.delete(&lanes_dir()).await?;
            self.moved(&new_lanes(), &lanes_dir()).await?;
        }
        if read_base(&**self.dfs).await? != Some(self.to) {
            self.dfs.delete(&base_path()).await?;
            write_base(&**self.dfs, self.to).await?;
        }
        self.dfs.delete(&old_lanes()).await?;
        self.dfs.delete(&tributary(CHANGING_DIR)).await?;
        Ok(())
    }

    async fn move_segments(&self) -> Result<(), DfsError> {
        for old in self.from.lanes() {
            let Some(source) = self.newest(&old_lanes(), old).await? else { continue };
            let target = self.newest(&new_lanes(), self.heir(old)).await?;
            let target = target.ok_or_else(|| DfsError::NotFound { path: new_lanes() })?;
            for file in self.dfs.list(&source).await?.unwrap_or_default() {
                if Entry::number_of(&file.name).is_none() && file.name != OWNER_DIR {
                    self.moved(&source.join(&file.name), &target.join(&file.name)).await?;
                }
            }
        }
        Ok(())
    }

    async fn newest(&self, lanes: &DfsPath, lane: LaneId) -> Result<Option<DfsPath>, DfsError> {
        let dir = lanes.join(lane.to_string());
        let entries = self.dfs.list(&dir).await?.unwrap_or_default();
        let newest = entries.into_iter().filter_map(|entry| Some((epoch_of(&entry.name)?, entry.name))).max();
        Ok(newest.map(|(_, name)| dir.join(name)))
    }

    /// Moves `from` to `to`; done when `to` is there and `from` is not.
    async fn moved(&self, from: &DfsPath, to: &DfsPath) -> Result<(), DfsError> {
        loop {
            let error = match self.dfs.rename(from, to).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if self.dfs.stat(from).await?.is_none() && self.dfs.stat(to).await?.is_some() {
                return Ok(());
            }
            if !matches!(error, DfsError::UnknownOutcome { .. }) {
                return Err(error);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests;
