//! Taking a lane: at the start, after a restart, from another owner. All that is needed is on the sink.
//!
//! # What a crash can leave, and what is done about it
//!
//! | Found in the lane's directory | Meaning | Done |
//! |---|---|---|
//! | a directory of a lower epoch | the owner before, dead or about to find out | renamed to the next epoch: everything it has open fails from then on |
//! | several epoch directories | a birth or rename with an unknown outcome | the highest is the lane; a lower one is reported and left alone |
//! | `owner/` | the marks of owners ([`super::ownership`]) | the new owner renames the latest to its own |
//! | an open segment | its writer died | its lease is recovered, its frames are read from where the ledger ends |
//! | a segment that the ledger doesn't name | made after the last entry | read whole |
//! | a torn tail | a frame that was never synced | cut off in memory; the file is copied up to it when its hour is sealed |
//! | a segment shorter than the ledger says | the sink lost synced bytes | an error is logged; what is left is kept |
//! | `tmp-…` | something unfinished | deleted |
//! | `join-…` that no announced seal names | unfinished, or announced in vain | deleted; its inputs are still there |
//! | an announced seal or late move | may be partly carried out | carried out again, step by step |
//! | inputs of an announced join | copied | never read as data; deleted by the seal's last step |
//!
//! # What is never guessed
//!
//! A ledger entry that can't be read, or is missing between two others, stops the recovery with an error: behind it may stand that
//! an hour is sealed. What was found but not known to be synced counts as durable only after `settle`, because closing a
//! file on HDFS does not sync it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use tributary_common::bucket::Bucket;
use tributary_common::ids::{CategoryName, Epoch, LaneCount, LaneId};
use tributary_common::report::StreamOffset;

use super::hours::{JOIN_PREFIX, TEMP_PREFIX};
use super::ingest::Ingest;
use super::ledger::{Contents, Entry, EntryError, HourKey, HourState, Replayed, SegmentRecord};
use super::marks::OWNER_DIR;
use super::roster::Roster;
use super::sink::{Scan, lanes_dir, read_whole, scan};
use crate::dfs::{Dfs, DfsError, DfsPath, Guard, recover_until_closed};

/// A lane that this process owns, with all that was found of it.
pub struct Taken {
    /// Held as long as the lane is.
    pub guard: Box<dyn Guard>,
    /// The lane's directory.
    pub dir: DfsPath,
    /// The new epoch.
    pub epoch: Epoch,
    /// The streams.
    pub ingest: Ingest,
    /// The segments.
    pub segments: Vec<Found>,
    /// The hours that are not open.
    pub hours: BTreeMap<HourKey, HourState>,
    /// The hour of each category from which on every hour is sealed.
    pub first_buckets: BTreeMap<CategoryName, Bucket>,
    /// The agents that reports are expected of.
    pub roster: Roster,
    /// The number of the last ledger entry.
    pub last_entry: Option<u64>,
}

/// A segment that was found.
#[derive(Debug)]
pub struct Found {
    /// What is known to be durable of it.
    pub record: SegmentRecord,
    /// The frames behind that.
    pub scan: Scan,
}

/// A lane could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// The sink failed.
    #[error("can't take lane {lane}: {error}")]
    Dfs {
        /// Which lane.
        lane: LaneId,
        /// Why.
        error: DfsError,
    },
    /// Somebody else took it at the same moment.
    #[error("can't take lane {lane}: another root took it at the same moment; it is in {dir} now")]
    Lost {
        /// Which lane.
        lane: LaneId,
        /// Where it is.
        dir: String,
    },
    /// A ledger entry can't be read.
    #[error(
        "can't take lane {lane}: ledger entry {number} in {dir}: {error}; it is needed to know which hours are sealed: restore the file from a copy"
    )]
    Entry {
        /// Which lane.
        lane: LaneId,
        /// Where.
        dir: DfsPath,
        /// Which entry.
        number: u64,
        /// What is wrong.
        error: EntryError,
    },
    /// A ledger entry is missing.
    #[error(
        "can't take lane {lane}: ledger entry {number} is missing in {dir}, and later ones are there: restore the file from a copy"
    )]
    MissingEntry {
        /// Which lane.
        lane: LaneId,
        /// Where.
        dir: DfsPath,
        /// Which entry.
        number: u64,
    },
    /// The base directory belongs to another number of lanes.
    #[error(
        "the base directory was made for {found} lanes, and the topology says {configured}: write lanes = {found}, or change the directory with tributary-aggregator lanes set {configured}"
    )]
    LaneCount {
        /// What is written in the base directory.
        found: u16,
        /// What the topology says.
        configured: u16,
    },
    /// The number of lanes is being changed.
    #[error(
        "the number of lanes is being changed from {from} to {to}: wait until that has ended, or end it with tributary-aggregator lanes set {to}"
    )]
    Changing {
        /// The old number.
        from: u16,
        /// The new one.
        to: u16,
    },
    /// The base directory's own file can't be read.
    #[error(
        "{path} can't be read: {reason}; it says for how many lanes the base directory was made: restore it, or write it anew as {{\"version\":1,\"lanes\":N}}"
    )]
    Base {
        /// Which file.
        path: DfsPath,
        /// Why.
        reason: String,
    },
}

impl TakeError {
    /// Whether trying again later can help without anybody doing something about it.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Dfs { error, .. } if error.is_transient())
            || matches!(self, Self::Lost { .. } | Self::Changing { .. })
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct BaseFile {
    version: u32,
    lanes: LaneCount,
}

/// Recovering a lease takes the NameNode and the DataNodes seconds, nearly all of which is waiting for each other's next word.
const LEASES_AT_A_TIME: usize = 64;

/// Each is read in pieces of some MiB.
const READS_AT_A_TIME: usize = 4;

/// The pause between tries while the sink is not available.
const PAUSE: Duration = Duration::from_secs(1);

/// Repeats a call while the sink is not available.
macro_rules! wait_out {
    ($lane:expr, $call:expr) => {
        loop {
            match $call.await {
                Ok(value) => break Ok(value),
                Err(error) if error.is_transient() => {
                    tracing::warn!(lane = %$lane, %error, "waiting for the sink");
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => break Err(TakeError::Dfs { lane: $lane, error }),
            }
        }
    };
}

/// The epoch in the name of an owner's directory.
#[must_use]
pub fn epoch_of(name: &str) -> Option<Epoch> {
    let (epoch, _nonce) = name.strip_prefix('e')?.split_once('-')?;
    epoch.parse().ok().map(Epoch)
}

/// The directory of the mark of a change of the number of lanes ([`super::relane`]).
pub const CHANGING_DIR: &str = "changing";

/// Where it stands for how many lanes the base directory is.
#[must_use]
pub fn base_path() -> DfsPath {
    DfsPath::base().join("_tributary/base.json")
}

fn unavailable(error: DfsError) -> TakeError {
    TakeError::Dfs { lane: LaneId(0), error }
}

/// A change of the number of lanes that is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changing {
    /// The old number.
    pub from: LaneCount,
    /// The new one.
    pub to: LaneCount,
    /// What says so.
    pub mark: DfsPath,
}

/// The change of the number of lanes that is under way, if one is.
///
/// # Errors
/// When the sink doesn't say.
pub async fn changing(dfs: &dyn Dfs) -> Result<Option<Changing>, TakeError> {
    let dir = DfsPath::base().join("_tributary").join(CHANGING_DIR);
    let entries = dfs.list(&dir).await.map_err(unavailable)?.unwrap_or_default();
    let parsed = |name: &str| {
        let (from, to) = name.split_once('@')?.0.split_once("-to-")?;
        let count = |text: &str| LaneCount::try_from(text.parse::<u16>().ok()?).ok();
        Some(Changing { from: count(from)?, to: count(to)?, mark: dir.join(name) })
    };
    Ok(entries.iter().find_map(|entry| parsed(&entry.name)))
}

/// For how many lanes the base directory is; none when that is not written down.
///
/// # Errors
/// When it can't be read.
pub async fn read_base(dfs: &dyn Dfs) -> Result<Option<LaneCount>, TakeError> {
    let path = base_path();
    if dfs.stat(&path).await.map_err(unavailable)?.is_none() {
        return Ok(None);
    }
    let bytes = read_whole(dfs, &path).await.map_err(unavailable)?;
    let base: BaseFile = serde_json::from_slice(&bytes)
        .map_err(|error| TakeError::Base { path: path.clone(), reason: error.to_string() })?;
    Ok(Some(base.lanes))
}

/// Writes down for how many lanes the base directory is, where nothing is written yet.
///
/// # Errors
/// [`DfsError::Exists`] when it is written already, or when the sink failed.
pub async fn write_base(dfs: &dyn Dfs, lanes: LaneCount) -> Result<(), DfsError> {
    let dir = DfsPath::base().join("_tributary");
    let temp = dir.join(format!("{TEMP_PREFIX}base-{}", dfs.nonce()));
    dfs.mkdir_all(&dir).await?;
    let options =
        crate::dfs::CreateOptions { block_size: 1 << 20, replication: None, sync_timeout: Duration::from_secs(20) };
    let mut writer = dfs.create(&temp, options).await?;
    let json = serde_json::to_vec(&BaseFile { version: 1, lanes }).expect("plain data");
    writer.write(json.into()).await?;
    writer.close().await?;
    let written = dfs.rename(&temp, &base_path()).await;
    if matches!(written, Err(DfsError::Exists { .. })) {
        dfs.delete(&temp).await?;
    }
    written
}

/// Compares for how many lanes the base directory is, and writes it down if nobody has yet.
///
/// # Errors
/// When it was made for another number, when that is being changed, or when the sink is not available.
pub async fn check_base(dfs: &dyn Dfs, lanes: LaneCount) -> Result<(), TakeError> {
    loop {
        if let Some(Changing { from, to, .. }) = changing(dfs).await? {
            return Err(TakeError::Changing { from: from.get(), to: to.get() });
        }
        match read_base(dfs).await? {
            Some(found) if found == lanes => return Ok(()),
            Some(found) => return Err(TakeError::LaneCount { found: found.get(), configured: lanes.get() }),
            None => {}
        }
        match write_base(dfs, lanes).await {
            // Perhaps another root was faster: what is written is compared in the next round.
            Ok(()) | Err(DfsError::Exists { .. }) => {}
            Err(error) => return Err(unavailable(error)),
        }
    }
}

/// A lane's directory that was taken and not read yet.
pub struct Seized {
    /// Held as long as the lane is.
    pub guard: Box<dyn Guard>,
    /// The lane's directory.
    pub dir: DfsPath,
    /// The new epoch.
    pub epoch: Epoch,
}

/// Takes a lane and reads back all that is known of it.
///
/// # Errors
/// When somebody else has it, or what is on the sink can't be understood.
pub async fn take(dfs: &Arc<dyn Dfs>, lane: LaneId, stream_ttl_ms: i64, now_ms: i64) -> Result<Taken, TakeError> {
    let seized = seize(dfs, lane).await?;
    read(dfs, lane, seized, stream_ttl_ms, now_ms).await
}

/// Takes a lane's directory: from then on the owner before can't do anything under its name for it.
///
/// # Errors
/// When somebody else has it, or the sink is not available; nothing is waited for.
pub async fn seize(dfs: &Arc<dyn Dfs>, lane: LaneId) -> Result<Seized, TakeError> {
    let lane_dir = lanes_dir().join(lane.to_string());
    let failed = |error| TakeError::Dfs { lane, error };
    dfs.mkdir_all(&lanes_dir()).await.map_err(failed)?;
    let guard = dfs.lock(&lane_dir).await.map_err(failed)?;
    let (dir, epoch) = take_directory(&**dfs, lane, &lane_dir).await?;
    tracing::info!(%lane, %epoch, %dir, "took the lane");
    Ok(Seized { guard, dir, epoch })
}

/// Reads back all that is known of a lane.
///
/// # Errors
/// When what is on the sink can't be understood.
pub async fn read(
    dfs: &Arc<dyn Dfs>,
    lane: LaneId,
    seized: Seized,
    stream_ttl_ms: i64,
    now_ms: i64,
) -> Result<Taken, TakeError> {
    let Seized { guard, dir, epoch } = seized;
    let replayed = read_ledger(&**dfs, lane, &dir).await?;
    let mut ingest = Ingest::new(stream_ttl_ms);
    for record in replayed.streams.values() {
        ingest.load(record.clone());
    }
    let segments = read_segments(&**dfs, lane, &dir, &replayed, &mut ingest, now_ms).await?;
    let members: Vec<_> = replayed.members.values().cloned().collect();
    let mut roster = Roster::load(epoch, &members, replayed.losses, replayed.last, now_ms);
    // Of an agent that the ledger does not know nothing was answered yet; what is sent again will be known to the last byte.
    for frame in segments.iter().flat_map(|found| &found.scan.frames) {
        for slice in &frame.slices {
            let from = StreamOffset { stream: slice.stream, offset: slice.start.offset };
            roster.noticed(&slice.agent, &frame.category, &slice.host, from, now_ms);
        }
    }
    Ok(Taken {
        guard,
        dir,
        epoch,
        ingest,
        segments,
        hours: replayed.hours,
        first_buckets: replayed.first_buckets,
        roster,
        last_entry: replayed.last,
    })
}

/// Renames the lane's directory to the next epoch.
async fn take_directory(dfs: &dyn Dfs, lane: LaneId, lane_dir: &DfsPath) -> Result<(DfsPath, Epoch), TakeError> {
    let mine = dfs.nonce();
    let failed = |error| TakeError::Dfs { lane, error };
    // Whether a rename of mine may have been done or may still be: then only a look tells, however long that takes.
    let mut unsure = false;
    loop {
        let listed =
            if unsure { wait_out!(lane, dfs.list(lane_dir))? } else { dfs.list(lane_dir).await.map_err(failed)? };
        let epochs = listed.map(|entries| {
            let mut epochs: Vec<(Epoch, String)> =
                entries.into_iter().filter_map(|entry| Some((epoch_of(&entry.name)?, entry.name))).collect();
            epochs.sort();
            epochs
        });
        let highest = epochs.as_ref().and_then(|epochs| epochs.last());
        let Some((epoch, name)) = highest else {
            // A new lane: prepared beside and renamed whole, because making directories answers "fine" to everybody.
            let prepared = lanes_dir().join(format!("{TEMP_PREFIX}{mine}"));
            let born = async {
                dfs.mkdir_all(&prepared.join(format!("e0-{mine}"))).await?;
                dfs.rename(&prepared, lane_dir).await
            };
            match born.await {
                Ok(()) => {}
                Err(DfsError::Exists { .. }) => {
                    dfs.delete(&prepared).await.map_err(failed)?;
                }
                Err(DfsError::UnknownOutcome { .. }) => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(failed(error)),
            }
            continue;
        };
        if name.ends_with(&format!("-{mine}")) && *epoch > Epoch(0) {
            // Exactly my name is there, so an earlier rename of mine, whatever it answered, was done.
            return Ok((lane_dir.join(name), *epoch));
        }
        for (_, stale) in epochs.iter().flatten().rev().skip(1) {
            tracing::error!(%lane, directory = %stale, "the lane has a directory of an older epoch too; it is left alone: look what is in it");
        }
        let next = Epoch(epoch.0 + 1);
        let target = lane_dir.join(format!("e{next}-{mine}"));
        match dfs.rename(&lane_dir.join(name), &target).await {
            Ok(()) => return Ok((target, next)),
            Err(DfsError::NotFound { .. } | DfsError::Exists { .. }) => {
                let now = wait_out!(lane, dfs.list(lane_dir))?.unwrap_or_default();
                let last = now.iter().filter_map(|entry| Some((epoch_of(&entry.name)?, &entry.name))).max();
                match last {
                    Some((_, name)) if name.ends_with(&format!("-{mine}")) => {}
                    Some((_, name)) => return Err(TakeError::Lost { lane, dir: name.clone() }),
                    None => tokio::time::sleep(PAUSE).await,
                }
            }
            Err(DfsError::UnknownOutcome { .. }) => {
                unsure = true;
                tokio::time::sleep(PAUSE).await;
            }
            // Once unsure, an answer that says "not now" is no answer about the rename before.
            Err(error) if unsure && error.is_transient() => tokio::time::sleep(PAUSE).await,
            Err(error) => return Err(failed(error)),
        }
    }
}

async fn read_ledger(dfs: &dyn Dfs, lane: LaneId, dir: &DfsPath) -> Result<Replayed, TakeError> {
    let entries = wait_out!(lane, dfs.list(dir))?.unwrap_or_default();
    let numbers: Vec<u64> = entries.iter().filter_map(|entry| Entry::number_of(&entry.name)).collect();
    let mut replayed = Replayed::default();
    // Entries below a snapshot may be partly deleted: the newest snapshot is looked for from the end.
    let mut decoded = Vec::new();
    for (index, &number) in numbers.iter().enumerate().rev() {
        let path = dir.join(Entry::file_name(number));
        let bytes = wait_out!(lane, read_whole(dfs, &path))?;
        let entry = Entry::decode(&bytes, lane, number).map_err(|error| TakeError::Entry {
            lane,
            dir: dir.clone(),
            number,
            error,
        })?;
        let snapshot = entry.snapshot;
        decoded.push(entry);
        if snapshot {
            break;
        }
        let before = index.checked_sub(1).map(|index| numbers[index]);
        if number > 0 && before != Some(number - 1) {
            return Err(TakeError::MissingEntry { lane, dir: dir.clone(), number: number - 1 });
        }
    }
    for entry in decoded.into_iter().rev() {
        replayed.apply(entry);
    }
    tracing::debug!(%lane, last = ?replayed.last, streams = replayed.streams.len(), segments = replayed.segments.len(), "read the ledger");
    Ok(replayed)
}

async fn read_segments(
    dfs: &dyn Dfs,
    lane: LaneId,
    dir: &DfsPath,
    replayed: &Replayed,
    ingest: &mut Ingest,
    now_ms: i64,
) -> Result<Vec<Found>, TakeError> {
    let mut announced: BTreeSet<&str> = BTreeSet::new();
    for state in replayed.hours.values() {
        match state {
            HourState::Announced(seal) => {
                announced.extend(seal.files.iter().map(|file| file.source.as_str()));
                announced.extend(seal.inputs.iter().map(String::as_str));
            }
            HourState::Late(moves) => {
                for one in moves {
                    announced.extend(one.file.iter().map(|file| file.source.as_str()));
                    announced.extend(one.inputs.iter().map(String::as_str));
                }
            }
            HourState::Sealed | HourState::Published => {}
        }
    }
    let entries = wait_out!(lane, dfs.list(dir))?.unwrap_or_default();
    let mut names: BTreeSet<String> = BTreeSet::new();
    for entry in entries {
        let name = entry.name;
        if announced.contains(name.as_str()) || Entry::number_of(&name).is_some() || name == OWNER_DIR {
            continue;
        }
        let path = dir.join(&name);
        if name.starts_with(TEMP_PREFIX) || name.starts_with(JOIN_PREFIX) {
            wait_out!(lane, dfs.delete(&path))?;
            continue;
        }
        names.insert(name);
    }
    let close = |name: &String| close_segment(dfs, lane, dir.join(name), replayed.segments.get(name));
    let lens: Vec<Option<u64>> = stream::iter(names.iter().map(close)).buffered(LEASES_AT_A_TIME).try_collect().await?;
    tracing::info!(%lane, files = lens.iter().flatten().count(), "nothing of what was before is open any more");
    let there: Vec<(String, u64)> =
        names.iter().zip(lens).filter_map(|(name, len)| Some((name.clone(), len?))).collect();
    let read = |(name, len): &(String, u64)| read_segment(dfs, lane, dir.join(name), replayed.segments.get(name), *len);
    let segments: Vec<Option<Found>> =
        stream::iter(there.iter().map(read)).buffered(READS_AT_A_TIME).try_collect().await?;
    let found: Vec<Found> = segments.into_iter().flatten().collect();
    ingest.recovered(now_ms);
    for frame in found.iter().flat_map(|segment| &segment.scan.frames) {
        for slice in &frame.slices {
            ingest.found(&frame.category, slice, false, now_ms);
        }
    }
    for (name, record) in &replayed.segments {
        if record.covered.bytes > 0 && !names.contains(name) && !announced.contains(name.as_str()) {
            tracing::error!(%lane, segment = %name, bytes = record.covered.bytes, "a segment that the ledger names is gone: somebody deleted or moved it");
        }
    }
    Ok(found)
}

/// Closes what a writer may have left open, and gives its length in bytes; none when it is not there.
async fn close_segment(
    dfs: &dyn Dfs,
    lane: LaneId,
    path: DfsPath,
    known: Option<&SegmentRecord>,
) -> Result<Option<u64>, TakeError> {
    match known {
        Some(record) if record.closed => Ok(Some(record.covered.bytes)),
        _ => recover_until_closed(dfs, &path).await.map_err(|error| TakeError::Dfs { lane, error }),
    }
}

/// Reads what the ledger doesn't know of a segment of `len` bytes.
async fn read_segment(
    dfs: &dyn Dfs,
    lane: LaneId,
    path: DfsPath,
    known: Option<&SegmentRecord>,
    len: u64,
) -> Result<Option<Found>, TakeError> {
    let name = path.name().to_owned();
    if let Some(record) = known
        && record.closed
    {
        let scan = Scan { frames: Vec::new(), end: record.covered.bytes, torn: None };
        return Ok(Some(Found { record: record.clone(), scan }));
    }
    let mut known = known.cloned();
    if let Some(record) = &mut known
        && len < record.covered.bytes
    {
        let covered = record.covered.bytes;
        tracing::error!(%lane, segment = %name, bytes = len, covered, "a segment is shorter than what was synced: the sink has lost bytes");
        record.covered = Contents::default();
    }
    let covered = known.as_ref().map_or(0, |record| record.covered.bytes);
    let scan = wait_out!(lane, scan(dfs, &path, covered, len))?;
    if let Some(error) = &scan.torn {
        tracing::info!(%lane, segment = %name, bytes = len - scan.end, %error, "left out what is behind the last whole frame");
    }
    tracing::debug!(%lane, segment = %name, covered, end = scan.end, frames = scan.frames.len(), "read a segment");
    let record = match (known, scan.frames.first()) {
        (Some(record), _) => record,
        (None, Some(frame)) => SegmentRecord {
            name,
            category: frame.category.clone(),
            bucket: frame.bucket,
            codec: frame.codec,
            covered: Contents::default(),
            closed: false,
            torn: false,
        },
        (None, None) => {
            // Not one whole frame, and nobody was ever told of any of it.
            tracing::info!(%lane, segment = %name, bytes = len, "deleted a segment without a whole frame");
            wait_out!(lane, dfs.delete(&path))?;
            return Ok(None);
        }
    };
    Ok(Some(Found { record, scan }))
}
