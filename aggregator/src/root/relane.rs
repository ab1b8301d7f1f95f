//! Changing the number of lanes of a base directory: by an operator, while no root serves it.
//!
//! # Steps, and what a crash between any two of them leaves
//!
//! | Step | What is on the sink then | The next run |
//! |---|---|---|
//! | 1 | `_tributary/changing/<from>-to-<to>@<nonce>/`: no root takes a lane any more; each looks again after it has taken one | begins at 2 |
//! | 2 | every old lane is fenced and read; what was found in it has settled; its ledger ends with a snapshot of all | begins at 2 |
//! | 3 | `_tributary/lanes.new-<n>/`: the new lanes with their ledgers, each with the streams of its agents and with its share of the old segments, whose files are not there yet | begins at 2, under another name |
//! | 4 | `…/ready@<n>` in the mark: from here on there is no way back, only forward | goes on from 5 |
//! | 5 | `lanes` is `lanes.old-<n>` | goes on |
//! | 6 | the files of the old segments lie in the new lanes | goes on |
//! | 7 | `lanes.new-<n>` is `lanes` | goes on |
//! | 8 | `base.json` is `base.json.old-<n>`, and a new one says the new number | goes on |
//! | 9 | the mark is gone | nothing is left to do |
//!
//! Until step 4 nothing was changed that a root would not have changed by taking the lanes. A change that is refused takes its
//! mark back, and the roots go on with the old number.
//!
//! A call whose answer was lost may be carried out much later. So nothing is deleted under a name that is made again, and what
//! is moved away stays where it was moved to: a late second move finds the place taken. `lanes.old-<n>` holds no data; it may
//! be deleted by hand on another day.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tributary_common::ids::{Epoch, LaneCount, LaneId};

use super::hours::{JOIN_PREFIX, TEMP_PREFIX};
use super::lane::LaneSettings;
use super::ledger::{Entry, HourKey, HourRecord, HourState, Loss, MemberRecord, SegmentRecord, StreamRecord};
use super::marks::OWNER_DIR;
use super::placement::Placement;
use super::recovery::{self, CHANGING_DIR, Changing, TakeError, base_path, changing, epoch_of, read_base, write_base};
use super::sink::{LaneSink, lanes_dir};
use crate::dfs::{CreateOptions, Dfs, DfsError, DfsPath};

/// The block size of the few small files that are made here.
const BLOCK_BYTES: u64 = 1 << 20;

/// So many hours are named when a change is refused.
const NAMED_HOURS: usize = 5;

/// How the mark of an attempt that got ready begins, in the mark of the change.
const READY: &str = "ready@";

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
    let base = read_base(&**dfs).await.map_err(not_now)?;
    let begun = loop {
        match changing(&**dfs).await.map_err(not_now)? {
            // Made late by an attempt that heard no answer, and went on under another mark.
            Some(stale) if base != Some(stale.from) && ready(dfs, &stale.mark).await?.is_none() => {
                dfs.delete(&stale.mark).await?;
            }
            begun => break begun,
        }
    };
    let change = match (begun, base) {
        (Some(begun), _) if begun.to != to => return Err(ChangeError::Begun { from: begun.from, to: begun.to }),
        (Some(Changing { from, mark, .. }), _) => Change { dfs, settings, from, to, mark },
        (None, None) => return Err(ChangeError::Unborn(to.get())),
        (None, Some(from)) if from == to => return Ok(Changed { from, to }),
        (None, Some(from)) => {
            let mark = tributary(CHANGING_DIR).join(format!("{from}-to-{to}@{}", dfs.nonce()));
            dfs.mkdir_all(&mark).await?;
            Change { dfs, settings, from, to, mark }
        }
    };
    let places = if let Some(places) = ready(dfs, &change.mark).await? {
        places
    } else {
        let places = Places::new(&dfs.nonce());
        match change.prepare(&places).await {
            Ok(()) => {}
            Err(error @ (ChangeError::Take(_) | ChangeError::Hours { .. })) => {
                dfs.delete(&places.new).await?;
                dfs.delete(&change.mark).await?;
                return Err(error);
            }
            Err(error) => return Err(error),
        }
        dfs.mkdir(&change.mark.join(format!("{READY}{}", places.name))).await?;
        places
    };
    change.finish(&places).await?;
    Ok(Changed { from: change.from, to })
}

struct Change<'c> {
    dfs: &'c Arc<dyn Dfs>,
    settings: &'c LaneSettings,
    from: LaneCount,
    to: LaneCount,
    mark: DfsPath,
}

/// Where one attempt puts what, under names that no other one uses.
struct Places {
    name: String,
    new: DfsPath,
    old: DfsPath,
    old_base: DfsPath,
}

impl Places {
    fn new(name: &str) -> Self {
        let place = |what: &str| tributary(&format!("{what}-{name}"));
        Self {
            name: name.to_owned(),
            new: place("lanes.new"),
            old: place("lanes.old"),
            old_base: place("base.json.old"),
        }
    }
}

/// The places of the attempt of a change that got ready, if one did.
async fn ready(dfs: &Arc<dyn Dfs>, mark: &DfsPath) -> Result<Option<Places>, DfsError> {
    let entries = dfs.list(mark).await?.unwrap_or_default();
    Ok(entries.iter().find_map(|entry| entry.name.strip_prefix(READY)).map(Places::new))
}

/// An error of the sink says nothing about how far the change is.
fn not_now(error: TakeError) -> ChangeError {
    match error {
        TakeError::Dfs { error, .. } => ChangeError::Dfs(error),
        error => ChangeError::Take(error),
    }
}

fn tributary(name: &str) -> DfsPath {
    DfsPath::base().join("_tributary").join(name)
}

/// What the old lanes know, together.
#[derive(Default)]
struct Known {
    streams: Vec<StreamRecord>,
    segments: Vec<(LaneId, SegmentRecord)>,
    published: BTreeMap<HourKey, HourState>,
    first_buckets: BTreeMap<tributary_common::ids::CategoryName, tributary_common::bucket::Bucket>,
    members: Vec<MemberRecord>,
    losses: Vec<Loss>,
    epoch: Option<Epoch>,
}

impl Change<'_> {
    /// The new lane that the files of an old one go to.
    fn heir(&self, old: LaneId) -> LaneId {
        LaneId(old.0 % self.to.get())
    }

    /// Steps 2 and 3.
    async fn prepare(&self, places: &Places) -> Result<(), ChangeError> {
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
                    // Nothing is waited for here.
                    let _ =
                        taken.ingest.durable(slice.stream, slice.runs.iter().map(tributary_common::frame::Run::range));
                }
                let mut record = found.record;
                if !record.closed {
                    record.covered.append(&found.scan.frames.iter().collect());
                    record.torn |= found.scan.torn.is_some();
                    record.closed = true;
                }
                segments.push(record);
            }
            let number = taken.last_entry.map_or(0, |last| last + 1);
            let entry = Entry {
                streams: taken.ingest.records(true),
                segments,
                members: taken.roster.records(true, number),
                losses: taken.roster.all_losses(),
                ..self.entry(number, lane, taken.epoch, &taken.hours, &taken.first_buckets)
            };
            self.sink(taken.dir, lane, self.from, taken.epoch).write_entry(&entry).await?;
            known.streams.extend(entry.streams);
            known.segments.extend(entry.segments.into_iter().map(|segment| (lane, segment)));
            known.members.extend(entry.members);
            known.losses.extend(entry.losses);
            known.published.extend(taken.hours);
            for (category, bucket) in taken.first_buckets {
                let first = known.first_buckets.entry(category).or_insert(bucket);
                if bucket.start_s() < first.start_s() {
                    *first = bucket;
                }
            }
            known.epoch = known.epoch.max(Some(taken.epoch));
        }
        self.make_new_lanes(places, &known).await?;
        Ok(())
    }

    async fn make_new_lanes(&self, places: &Places, known: &Known) -> Result<(), DfsError> {
        // Higher than any before, so that an answer's epoch still says which of two owners of a stream came later.
        let epoch = Epoch(known.epoch.map_or(0, |epoch| epoch.0) + 1);
        for lane in self.to.lanes() {
            let dir = places.new.join(lane.to_string()).join(format!("e{epoch}-{}", self.dfs.nonce()));
            self.dfs.mkdir_all(&dir).await?;
            let streams: Vec<StreamRecord> =
                known.streams.iter().filter(|stream| stream.agent.lane(self.to) == lane).cloned().collect();
            let segments: Vec<SegmentRecord> = (known.segments.iter())
                .filter(|(old, _)| self.heir(*old) == lane)
                .map(|(_, segment)| segment.clone())
                .collect();
            let here = |agent: &tributary_common::ids::AgentId| agent.lane(self.to) == lane;
            let entry = Entry {
                streams,
                segments,
                members: known.members.iter().filter(|member| here(&member.agent)).cloned().collect(),
                losses: known.losses.iter().filter(|loss| here(&loss.agent)).cloned().collect(),
                ..self.entry(0, lane, epoch, &known.published, &known.first_buckets)
            };
            self.sink(dir, lane, self.to, epoch).write_entry(&entry).await?;
        }
        Ok(())
    }

    /// A snapshot without anything that belongs to one lane alone.
    fn entry(
        &self,
        number: u64,
        lane: LaneId,
        epoch: Epoch,
        hours: &BTreeMap<HourKey, HourState>,
        first_buckets: &BTreeMap<tributary_common::ids::CategoryName, tributary_common::bucket::Bucket>,
    ) -> Entry {
        Entry {
            number,
            lane,
            epoch,
            written_ms: self.settings.clock.now_ms(),
            snapshot: true,
            streams: Vec::new(),
            forgotten: Vec::new(),
            segments: Vec::new(),
            hours: hours.iter().map(|(key, state)| HourRecord { key: key.clone(), state: state.clone() }).collect(),
            forgotten_hours: Vec::new(),
            first_buckets: first_buckets.iter().map(|(category, bucket)| (category.clone(), *bucket)).collect(),
            members: Vec::new(),
            left: Vec::new(),
            losses: Vec::new(),
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
            placement: Arc::new(Placement::new(self.settings.replication, self.settings.min_replication)),
            epoch,
            attempts: Arc::default(),
            success_file: self.settings.success_file.clone(),
            patience: None,
        }
    }

    /// Steps 5 to 9.
    async fn finish(&self, places: &Places) -> Result<(), ChangeError> {
        if self.dfs.stat(&places.new).await?.is_some() {
            if self.dfs.stat(&places.old).await?.is_none() {
                self.moved(&lanes_dir(), &places.old).await?;
            }
            self.move_segments(places).await?;
            if self.dfs.stat(&lanes_dir()).await?.is_some() {
                // A root that slept since it looked at the mark has made lanes of its own. It looks again before it serves, so
                // there is nothing in them.
                self.moved(&lanes_dir(), &tributary(&format!("lanes.empty-{}", self.dfs.nonce()))).await?;
            }
            self.moved(&places.new, &lanes_dir()).await?;
        }
        if read_base(&**self.dfs).await.map_err(not_now)? != Some(self.to) {
            if self.dfs.stat(&places.old_base).await?.is_none() {
                self.moved(&base_path(), &places.old_base).await?;
            }
            write_base(&**self.dfs, self.to).await?;
        }
        self.dfs.delete(&self.mark).await?;
        Ok(())
    }

    async fn move_segments(&self, places: &Places) -> Result<(), DfsError> {
        for old in self.from.lanes() {
            let Some(source) = self.newest(&places.old, old).await? else { continue };
            let target = self.newest(&places.new, self.heir(old)).await?;
            let target = target.ok_or_else(|| DfsError::NotFound { path: places.new.clone() })?;
            for file in self.dfs.list(&source).await?.unwrap_or_default() {
                let unfinished = file.name.starts_with(TEMP_PREFIX) || file.name.starts_with(JOIN_PREFIX);
                if Entry::number_of(&file.name).is_none() && file.name != OWNER_DIR && !unfinished {
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
