//! The spool: per stream an unbroken run of batches from `committed`, durably, in segment files.
//!
//! In memory there are only the runs ([`run`]) and which file needs which; bodies stay on disk. Writing goes by groups:
//! what was offered while one group was being written and synced makes up the next one. One group at a time is
//! [planned](Spool::plan), [carried out](Group::write) (the only part that blocks) and [concluded](Spool::conclude);
//! nobody is told of a batch before that.
//!
//! A file goes when none of its entries is needed. Before it goes, the newest file says how far all streams with entries
//! are committed, so that a restart knows where their runs begin.

pub mod io;
mod recovery;
pub mod run;
mod segment;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use tributary_common::batch::{Batch, BatchHeader};
use tributary_common::ids::{AgentId, CategoryName, LaneId, StreamId};
use tributary_common::messages::Owner;
use tributary_common::position::Position;

use self::io::{Folder, FolderFile};
pub use self::recovery::{OpenError, Recovery};
use self::run::{Entry, Offer, Place, Run};
pub use self::segment::{ReadError, read_batch};
use self::segment::{committed_records, file_header, file_name, padded, padding};
use crate::setaside::{Piece, SetAside};

/// Most entries at a time. What is kept in memory of one takes about 100 bytes.
pub const MAX_ENTRIES: u64 = 2_000_000;

/// Bounds of the spool.
#[derive(Debug, Clone, Copy)]
pub struct SpoolLimits {
    /// Most bytes of all segment files together.
    pub max_bytes: u64,
    /// A segment file that has reached this length is not written to any more.
    pub segment_bytes: u64,
}

/// One stream of which the spool has a run.
#[derive(Debug)]
pub struct Stream {
    /// The lane of its agent.
    pub lane: LaneId,
    /// Its agent.
    pub agent: AgentId,
    /// Its category.
    pub category: CategoryName,
    /// Its run.
    pub run: Run,
    /// Who said last how far it is committed, where known.
    pub owner: Option<Owner>,
    /// Since the last [`Spool::forget_idle`].
    mentioned: bool,
}

impl Stream {
    fn begin(header: &BatchHeader, committed: Position) -> Self {
        Self {
            lane: header.lane,
            agent: header.agent.clone(),
            category: header.category.clone(),
            run: Run::begin(committed),
            owner: None,
            mentioned: true,
        }
    }
}

struct Segment {
    file: Arc<dyn FolderFile>,
    len: u64,
}

/// The spool's state. Whoever owns it does one thing at a time.
pub struct Spool {
    folder: Arc<dyn Folder>,
    limits: SpoolLimits,
    streams: BTreeMap<StreamId, Stream>,
    segments: BTreeMap<u64, Segment>,
    /// How many entries of each segment file are needed; also of the one that is just being made.
    live: HashMap<u64, u64>,
    /// The file that is being appended to.
    active: Option<u64>,
    next_number: u64,
    entries: u64,
}

/// Why a batch that continues its run can't be stored now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// `spool.max_bytes` is reached.
    #[error("the spool is full: {max_bytes} bytes; what is above must take some first")]
    Bytes {
        /// The bound.
        max_bytes: u64,
    },
    /// [`MAX_ENTRIES`] is reached.
    #[error("the spool has {MAX_ENTRIES} batches, as many as it has memory for; what is above must take some first")]
    Entries,
}

impl Spool {
    /// Reads what is in `folder`. Blocks.
    ///
    /// # Errors
    /// When the folder can't be used. Damaged files are no error.
    pub fn open(
        folder: Arc<dyn Folder>,
        set_aside: &SetAside,
        limits: SpoolLimits,
    ) -> Result<(Self, Recovery), OpenError> {
        let recovered = recovery::recover(&folder, set_aside)?;
        let spool = Self {
            folder,
            limits,
            streams: recovered.streams,
            segments: recovered.segments,
            live: recovered.live,
            active: None,
            next_number: recovered.next_number,
            entries: recovered.report.entries,
        };
        Ok((spool, recovered.report))
    }

    /// A stream of which there is a run.
    #[must_use]
    pub fn stream(&self, id: StreamId) -> Option<&Stream> {
        self.streams.get(&id)
    }

    /// All of them, in no order.
    pub fn streams(&self) -> impl ExactSizeIterator<Item = (StreamId, &Stream)> {
        self.streams.iter().map(|(id, stream)| (*id, stream))
    }

    /// Bytes on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.len).sum()
    }

    /// How many batches are held.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// How many segment files there are.
    #[must_use]
    pub fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Whether there are files to be deleted, which the next group does.
    #[must_use]
    pub fn has_garbage(&self) -> bool {
        self.garbage(self.appendable().map(|(number, _)| number)).next().is_some()
    }

    fn garbage(&self, keep: Option<u64>) -> impl Iterator<Item = u64> {
        self.segments.keys().copied().filter(move |number| Some(*number) != keep && !self.live.contains_key(number))
    }

    fn appendable(&self) -> Option<(u64, &Segment)> {
        let number = self.active?;
        self.segments.get(&number).filter(|segment| segment.len < self.limits.segment_bytes).map(|seg| (number, seg))
    }

    /// Begins a group. There is at most one at a time: the next one is begun after [`Spool::conclude`].
    #[must_use]
    pub fn plan(&mut self) -> Group {
        let (number, target, offset) = match self.appendable() {
            Some((number, segment)) => (number, Some(Arc::clone(&segment.file)), segment.len),
            None => (self.next_number, None, 0),
        };
        let mut group = Group {
            folder: Arc::clone(&self.folder),
            number,
            target,
            offset,
            len: 0,
            pieces: Vec::new(),
            touched: HashSet::new(),
            write_needed: false,
            delete: self.garbage(Some(number)).collect(),
        };
        if group.offset == 0 {
            group.add(file_header());
        }
        if !group.delete.is_empty() {
            let held: Vec<(StreamId, Position)> = (self.streams.iter())
                .filter(|(_, stream)| !stream.run.is_empty())
                .map(|(id, stream)| (*id, stream.run.committed()))
                .collect();
            if !held.is_empty() {
                group.add(committed_records(&held));
                group.write_needed = true;
            }
        }
        group
    }

    /// Whether there is room for batches of `bytes` more bytes behind what `group` has already.
    ///
    /// # Errors
    /// What is full.
    pub fn room(&self, group: &Group, batches: u64, bytes: u64) -> Result<(), NoRoom> {
        if self.bytes() + padded(group.len + bytes) > self.limits.max_bytes {
            return Err(NoRoom::Bytes { max_bytes: self.limits.max_bytes });
        }
        if self.entries + batches > MAX_ENTRIES {
            return Err(NoRoom::Entries);
        }
        Ok(())
    }

    /// Applies the rule to a batch; what it says to take becomes part of `group`. What its sender knows to be committed is
    /// learned first.
    pub fn offer(&mut self, group: &mut Group, batch: &mut Batch) -> Offer {
        let header = &mut batch.header;
        let stream = self.streams.entry(header.stream).or_insert_with(|| Stream::begin(header, header.committed));
        stream.mentioned = true;
        let left = stream.run.commit(header.committed);
        let offer = stream.run.offer(header.start, header.end);
        if offer == Offer::Take {
            // The sender may be behind. On disk, the batch says where its run begins if those before it are gone.
            header.committed = stream.run.committed();
            let (start, end) = (header.start, header.end);
            let received_ms = header.received_ms.unwrap_or(0);
            let id = header.stream;
            let head = batch.encode_head();
            let len = (head.len() + batch.body.len()) as u32;
            let place = Place { segment: group.number, offset: group.offset + group.len, len };
            stream.run.push(Entry { start, end, place, received_ms });
            self.entries += 1;
            *self.live.entry(group.number).or_default() += 1;
            group.add(head);
            group.add(batch.body.clone());
            group.touched.insert(id);
            group.write_needed = true;
        }
        self.release(left);
        offer
    }

    /// What has become of a group.
    pub fn conclude(&mut self, written: Written) -> Result<(), GroupError> {
        for number in written.deleted {
            self.segments.remove(&number);
        }
        if let Some((file, len)) = written.file {
            self.segments.insert(written.number, Segment { file, len });
            self.next_number = self.next_number.max(written.number + 1);
            self.active = Some(written.number);
        }
        for id in written.touched {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            if written.result.is_ok() {
                stream.run.settle();
            } else {
                let lost = stream.run.retract();
                self.release(lost);
            }
        }
        written.result
    }

    /// Learns how far a stream is committed, and who said so; what that covers leaves.
    pub fn commit(&mut self, id: StreamId, committed: Position, owner: Option<Owner>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.mentioned = true;
        stream.owner = owner.or(stream.owner);
        let left = stream.run.commit(committed);
        self.release(left);
    }

    /// The entry at `place` of a stream can't be read: its run ends before it. Returns the number of entries dropped.
    pub fn cut(&mut self, id: StreamId, place: Place) -> usize {
        let cut = self.streams.get_mut(&id).map(|stream| stream.run.cut(place)).unwrap_or_default();
        let dropped = cut.len();
        self.release(cut);
        dropped
    }

    /// Ends a stream's run. The entries that are on disk stay needed until they are [released](Spool::release).
    pub fn end(&mut self, id: StreamId) -> Vec<Entry> {
        let Some(mut stream) = self.streams.remove(&id) else { return Vec::new() };
        let unsafe_yet = stream.run.retract();
        self.release(unsafe_yet);
        stream.run.into_entries().collect()
    }

    /// These entries are no longer needed.
    pub fn release(&mut self, entries: impl IntoIterator<Item = Entry>) {
        for entry in entries {
            self.entries -= 1;
            if let Some(live) = self.live.get_mut(&entry.place.segment) {
                *live -= 1;
                if *live == 0 {
                    self.live.remove(&entry.place.segment);
                }
            }
        }
    }

    /// Forgets the empty runs of streams that nobody has mentioned since the last call: a sender that comes again says
    /// where its run begins.
    pub fn forget_idle(&mut self) {
        self.streams.retain(|_, stream| std::mem::take(&mut stream.mentioned) || !stream.run.is_empty());
    }

    /// Where an entry's bytes are.
    #[must_use]
    pub fn piece(&self, place: Place) -> Option<Piece> {
        let segment = self.segments.get(&place.segment)?;
        Some(Piece { file: Arc::clone(&segment.file), offset: place.offset, len: u64::from(place.len) })
    }
}

/// What is written and deleted in one go.
pub struct Group {
    folder: Arc<dyn Folder>,
    number: u64,
    /// None: the file is to be made.
    target: Option<Arc<dyn FolderFile>>,
    offset: u64,
    len: u64,
    pieces: Vec<Bytes>,
    touched: HashSet<StreamId>,
    write_needed: bool,
    delete: Vec<u64>,
}

/// A group could not be written.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// Nothing of it counts; the spool is as before.
    #[error("can't write to the spool: {0}; check the disk's space and health")]
    Write(#[source] std::io::Error),
    /// The data may or may not be on disk, and what had been written before may be gone too: an operating system that
    /// failed to write pages back may drop them and report success the next time. Only reading the disk again, in a new
    /// process, shows what is there.
    #[error("can't make the spool durable: {0}; check the disk")]
    Sync(#[source] std::io::Error),
}

/// What has become of a group, for [`Spool::conclude`].
pub struct Written {
    number: u64,
    /// The file and how much of it counts.
    file: Option<(Arc<dyn FolderFile>, u64)>,
    touched: HashSet<StreamId>,
    deleted: Vec<u64>,
    result: Result<(), GroupError>,
}

impl Group {
    fn add(&mut self, piece: Bytes) {
        self.len += piece.len() as u64;
        self.pieces.push(piece);
    }

    /// Whether carrying it out would change nothing.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        !self.write_needed && self.delete.is_empty()
    }

    /// Bytes that it writes, but for what fills its last block up.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Writes, syncs, then deletes. Blocks.
    #[must_use]
    pub fn write(mut self) -> Written {
        self.add(padding(self.offset + self.len));
        let result = if self.write_needed { self.append() } else { Ok(()) };
        // On a full disk the record that goes before a deletion can't be written either. Without it a restart sends some
        // senders back further than needed, which is better than staying full.
        let delete = match result {
            Ok(()) | Err(GroupError::Write(_)) => std::mem::take(&mut self.delete),
            Err(GroupError::Sync(_)) => Vec::new(),
        };
        let mut deleted = Vec::new();
        for number in delete {
            match self.folder.delete(&file_name(number)) {
                Ok(()) => deleted.push(number),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => deleted.push(number),
                Err(error) => {
                    tracing::warn!(file = file_name(number), error = %error, "can't delete a spool file; tried again later");
                }
            }
        }
        let written = if self.write_needed && result.is_ok() { self.len } else { 0 };
        let file = self.target.map(|file| (file, self.offset + written));
        Written { number: self.number, file, touched: self.touched, deleted, result }
    }

    fn append(&mut self) -> Result<(), GroupError> {
        if self.target.is_none() {
            self.target = Some(self.folder.create(&file_name(self.number)).map_err(GroupError::Write)?);
        }
        let Some(file) = &self.target else { return Ok(()) };
        // A group that failed may have left something. It must not stay behind what is written now: a restart takes only
        // the end of the newest file for something that nobody was told of.
        if file.size().map_err(GroupError::Write)? > self.offset {
            file.truncate(self.offset).map_err(GroupError::Write)?;
        }
        file.write_at(&self.pieces, self.offset).map_err(GroupError::Write)?;
        file.sync().map_err(GroupError::Sync)?;
        if self.offset == 0 {
            self.folder.sync().map_err(GroupError::Sync)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
