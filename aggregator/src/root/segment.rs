//! Segments: the files that a lane writes, one at a time for each (hour, codec).
//!
//! [`Segment`] is the bookkeeping: which frames were handed over, which of them a sync has covered. Its writer is a
//! task of its own ([`spawn_writer`]), because a call on the sink may hang until its deadline while other segments go on.
//!
//! A segment's life: created with its first frame; synced by every commit that finds it dirty; closed when it is
//! large enough, idle, or its hour is over; then renamed out of the lane. After any error it is given up: nobody writes
//! to it again, it is recovered and read back, and what comes next goes into a new one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tributary_common::checksum::Checksum;
use tributary_common::frame::{Codec, Run, SliceDescriptor};
use tributary_common::ids::{Epoch, LaneId, StreamId};

use super::ledger::{Contents, HourKey, SegmentRecord};
use crate::dfs::{CreateOptions, Dfs, DfsError, DfsPath};

/// A segment's number, unique within an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u64);

/// The name of a segment, in the lane's directory and in its hour's: it never meets another one's.
#[must_use]
pub fn file_name(key: &HourKey, codec: Codec, lane: LaneId, epoch: Epoch, id: SegmentId) -> String {
    format!("{}.{}.l{lane}-e{epoch}-{}.{}", key.category, key.bucket.file_label(), id.0, codec.extension())
}

/// When a segment of this [name](file_name) was begun, among those of its lane: the epoch and the number in it.
#[must_use]
pub fn begun(name: &str) -> Option<(u64, u64)> {
    let (_, numbers) = name.rsplit_once("-e").filter(|(before, _)| before.contains(".l"))?;
    let (epoch, rest) = numbers.split_once('-')?;
    Some((epoch.parse().ok()?, rest.split('.').next()?.parse().ok()?))
}

/// A segment that is being written.
#[derive(Debug)]
pub struct Segment {
    /// Its number.
    pub id: SegmentId,
    /// Its name in the lane's directory.
    pub name: String,
    /// Its hour.
    pub key: HourKey,
    /// The codec of its frames.
    pub codec: Codec,
    /// What was asked of the file system for it.
    pub asked: CreateOptions,
    /// Bytes handed to the writer.
    pub written: u64,
    /// Bytes covered by a sync.
    pub synced: u64,
    /// Whether a sync or the close is under way.
    pub busy: bool,
    /// Whether the close was ordered.
    pub closing: bool,
    /// When the last frame came, in the lane's milliseconds.
    pub last_write_ms: u64,
    /// Slices kept back to be merged into one frame at the next commit.
    pub small: Vec<(SliceDescriptor, Bytes)>,
    /// Their bytes.
    pub small_bytes: u64,
    held: VecDeque<Held>,
    durable: Contents,
    writer: mpsc::UnboundedSender<Command>,
}

/// A frame that was handed over and that no sync has covered yet.
#[derive(Debug)]
struct Held {
    len: u64,
    checksum: Checksum,
    slices: Vec<SliceDescriptor>,
}

/// The stream bytes of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldRanges {
    /// The stream.
    pub stream: StreamId,
    /// Its bytes.
    pub ranges: Vec<Range<u64>>,
}

fn ranges_of(slice: &SliceDescriptor) -> HeldRanges {
    HeldRanges { stream: slice.stream, ranges: slice.runs.iter().map(Run::range).collect() }
}

impl Segment {
    /// A segment of which nothing is written yet.
    #[must_use]
    pub fn new(
        id: SegmentId,
        name: String,
        key: HourKey,
        codec: Codec,
        asked: CreateOptions,
        writer: mpsc::UnboundedSender<Command>,
    ) -> Self {
        Self {
            id,
            name,
            key,
            codec,
            asked,
            written: 0,
            synced: 0,
            busy: false,
            closing: false,
            last_write_ms: 0,
            small: Vec::new(),
            small_bytes: 0,
            held: VecDeque::new(),
            durable: Contents::default(),
            writer,
        }
    }

    /// Hands a frame to the writer.
    pub fn write(&mut self, slices: Vec<SliceDescriptor>, frame: Bytes) {
        self.written += frame.len() as u64;
        self.held.push_back(Held { len: frame.len() as u64, checksum: Checksum::of(&frame), slices });
        self.order(Command::Write(frame));
    }

    /// Whether bytes of this stream are kept back.
    #[must_use]
    pub fn keeps_back(&self, stream: StreamId) -> bool {
        self.small.iter().any(|(slice, _)| slice.stream == stream)
    }

    /// Whether there is something that no sync covers and no order is under way.
    #[must_use]
    pub fn wants_sync(&self) -> bool {
        !self.busy && !self.closing && (self.written > self.synced || !self.small.is_empty())
    }

    /// Bytes that no sync covers.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.written - self.synced + self.small_bytes
    }

    /// Orders a sync of all that was handed over.
    pub fn sync(&mut self) {
        self.busy = true;
        self.order(Command::Sync);
    }

    /// Orders the close.
    pub fn close(&mut self) {
        self.busy = true;
        self.closing = true;
        self.order(Command::Close);
    }

    /// Notes that a sync covers the first `len` bytes; returns what became durable.
    pub fn synced(&mut self, len: u64) -> Vec<HeldRanges> {
        self.synced = len;
        let mut durable = Vec::new();
        while self.held.front().is_some_and(|held| self.durable.bytes + held.len <= len) {
            let held = self.held.pop_front().expect("looked at it just now");
            self.durable.push(held.len, held.checksum, &held.slices);
            durable.extend(held.slices.iter().map(ranges_of));
        }
        durable
    }

    /// What no sync has covered, when the segment is given up; also what was kept back and never handed over.
    #[must_use]
    pub fn unsynced(&self) -> Vec<HeldRanges> {
        let held = self.held.iter().flat_map(|held| &held.slices);
        held.chain(self.small.iter().map(|(slice, _)| slice)).map(ranges_of).collect()
    }

    /// Its line in the ledger.
    #[must_use]
    pub fn record(&self) -> SegmentRecord {
        SegmentRecord {
            name: self.name.clone(),
            category: self.key.category.clone(),
            bucket: self.key.bucket,
            codec: self.codec,
            covered: self.durable.clone(),
            closed: false,
            torn: false,
        }
    }

    fn order(&self, command: Command) {
        // A writer that is gone has reported its failure; the lane hears of it in its own time.
        let _ = self.writer.send(command);
    }
}

/// An order to a writer.
#[derive(Debug)]
pub enum Command {
    /// Add these bytes.
    Write(Bytes),
    /// Sync what was added.
    Sync,
    /// Sync and close.
    Close,
}

/// What a writer reports. After `Closed` or `Failed` it reports nothing more.
#[derive(Debug)]
pub enum WriterReport {
    /// A sync covers the first so many bytes.
    Synced(u64),
    /// The file is closed at this length.
    Closed(u64),
    /// The file is given up.
    Failed(DfsError),
}

/// Starts the writer of a segment. Reports go to `reports`, with the segment's number.
pub fn spawn_writer(
    dfs: Arc<dyn Dfs>,
    path: DfsPath,
    options: CreateOptions,
    id: SegmentId,
    reports: mpsc::UnboundedSender<(SegmentId, WriterReport)>,
) -> mpsc::UnboundedSender<Command> {
    let (commands, orders) = mpsc::unbounded_channel();
    let writer = tokio::spawn(run_writer(dfs, path.clone(), options, id, orders, reports.clone()));
    tokio::spawn(async move {
        let report = match writer.await {
            Ok(Ok(None)) => return,
            Ok(Ok(Some(len))) => WriterReport::Closed(len),
            Ok(Err(error)) => WriterReport::Failed(error),
            // The client of the sink can panic on errors of a pipeline; that is one failed writer, not a failed process.
            Err(panic) => WriterReport::Failed(DfsError::UnknownOutcome {
                call: "write",
                path,
                reason: format!("the writer died: {panic}"),
            }),
        };
        let _ = reports.send((id, report));
    });
    commands
}

/// Which part of the time for a sync the first one of a new file gets.
const FIRST_SYNC_SHARE: u32 = 4;

async fn run_writer(
    dfs: Arc<dyn Dfs>,
    path: DfsPath,
    options: CreateOptions,
    id: SegmentId,
    mut orders: mpsc::UnboundedReceiver<Command>,
    reports: mpsc::UnboundedSender<(SegmentId, WriterReport)>,
) -> Result<Option<u64>, DfsError> {
    let mut writer = dfs.create(&path, options).await?;
    let mut len = 0;
    let mut first_sync = true;
    while let Some(order) = orders.recv().await {
        match order {
            Command::Write(bytes) => {
                len += bytes.len() as u64;
                writer.write(bytes).await?;
            }
            Command::Sync => {
                if std::mem::take(&mut first_sync) {
                    // A new file may meet a DataNode that died: another one is tried soon.
                    let deadline = options.sync_timeout / FIRST_SYNC_SHARE;
                    tokio::time::timeout(deadline, writer.sync()).await.unwrap_or_else(|_| {
                        Err(DfsError::UnknownOutcome {
                            call: "sync",
                            path: path.clone(),
                            reason: format!("the first sync of a new file took longer than {deadline:?}"),
                        })
                    })?;
                } else {
                    writer.sync().await?;
                }
                let _ = reports.send((id, WriterReport::Synced(len)));
            }
            Command::Close => {
                let closed = writer.close().await?;
                if closed != len {
                    return Err(DfsError::UnknownOutcome {
                        call: "close",
                        path,
                        reason: format!("{len} bytes were written and the file has {closed}"),
                    });
                }
                return Ok(Some(len));
            }
        }
    }
    // The lane is gone: the process is ending, and the next owner recovers the file.
    Ok(None)
}
