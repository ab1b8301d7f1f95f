//! What a lane's owner has of every stream, and what it does with a batch. Pure: no clock, no file, no socket.
//!
//! Per stream it keeps two sets of byte ranges: those that it **has** (written to a segment, in memory or on the
//! sink) and those that are **durable**. Both are nearly always one range. `next` is the highest known batch end
//! up to which the stream's bytes are there without a gap, `committed` the same for the durable ones: positions are
//! told at batch ends only, because only there a tail hash is known.
//!
//! After a recovery there may be more: ranges beyond the last batch end, where one slice of a batch survived and
//! another did not. They stay in the sets, and of a batch that comes again only the missing bytes are written. A file
//! may have been cut off and have grown again meanwhile: so the batch has to show the hashes of the batch ends that are
//! known beyond `next` before any of it counts as there. If it shows others, what is there beyond `next` is of bytes that the
//! file has no more, and the batch is written whole.

use std::collections::BTreeMap;
use std::ops::Range;

use tributary_common::batch::BatchHeader;
use tributary_common::frame::{FrameHeader, Run, SliceDescriptor};
use tributary_common::ids::{AgentId, CategoryName, StreamId};
use tributary_common::limits::HISTORY_LEN;
use tributary_common::messages::Verdict;
use tributary_common::position::{Position, TAIL_WINDOW_BYTES, TailHash};
use tributary_common::ranges::RangeSet;

use super::ledger::{EndRecord, StreamRecord};

/// What a lane knows of its streams.
#[derive(Debug)]
pub struct Ingest {
    streams: BTreeMap<StreamId, Stream>,
    stream_ttl_ms: i64,
    patient_until_ms: i64,
}

/// For so long after a recovery a batch waits that ends within another one of which only parts survived. Whoever holds that one sends
/// it again: its sender had no answer.
const PATIENCE_MS: i64 = 120_000;

#[derive(Debug)]
struct Stream {
    agent: AgentId,
    category: CategoryName,
    base: Position,
    has: RangeSet,
    durable: RangeSet,
    /// Known batch ends (and the base). Below `committed` the last [`HISTORY_LEN`] are kept, above it all.
    ends: BTreeMap<u64, End>,
    /// How many segments are being looked at that may hold, or may have lost, bytes of this stream.
    in_doubt: u32,
    /// When it last got bytes, milliseconds since 1970.
    touched_ms: i64,
    /// What was heard again last, if it ends shortly before `next`.
    echo: Option<Echo>,
    /// Whether the ledger does not have its present state.
    changed: bool,
}

/// A place where a batch ended.
#[derive(Debug, Clone, Copy)]
struct End {
    /// The tail hash there.
    tail: TailHash,
    /// Where the batch began and the hash of its bytes, if it was a [short one](batch_hash).
    batch: Option<(u64, TailHash)>,
}

impl From<TailHash> for End {
    fn from(tail: TailHash) -> Self {
        Self { tail, batch: None }
    }
}

/// What to do with a batch.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// Write nothing; this is the answer.
    Answer(Verdict),
    /// The batch crosses `next` here: decode it and call [`Ingest::decide_crossing`].
    NeedsTail {
        /// The offset at which the hash of the batch's own bytes is needed.
        at: u64,
    },
    /// Parts of the batch are there already beyond `next`, and batches are known to have ended within it: decode it and call
    /// [`Ingest::decide_overlapping`].
    NeedsTails {
        /// The offsets at which the hashes of the batch's own bytes are needed.
        at: Vec<u64>,
    },
    /// What is there beyond `next` is of other bytes than the batch: the file was cut off and has grown again before they were
    /// committed. Call [`Ingest::displace`].
    Displace(Vec<Range<u64>>),
    /// The batch is there already, but the next one will need its last bytes: decode it and call [`Ingest::heard`].
    NeedsEcho,
    /// The batch can't show that it continues what is there: the sender shall begin again from this place, which it
    /// has in its run.
    GoBack(Position),
    /// Take it: write these slices and report each with [`Ingest::wrote`], or none, and then call [`Ingest::took`].
    Take(Vec<SlicePlan>),
}

/// What to do with one slice of a batch that is taken.
#[derive(Debug, PartialEq, Eq)]
pub enum SlicePlan {
    /// Write the frame as it came.
    Whole,
    /// All of it is there already.
    Drop,
    /// Write only these bytes of the stream.
    Cut(Vec<Range<u64>>),
}

/// What the batch's own bytes show before the offset that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnTail {
    /// The hash there.
    Hash(TailHash),
    /// The batch, and what was heard just before it, has too few bytes before the offset.
    TooShort {
        /// Where they begin.
        from: u64,
        /// They.
        bytes: Vec<u8>,
        /// Whether they begin at a batch end that is known here, which vouches for what lies before.
        anchored: bool,
    },
    /// Its records were altered, so its bytes are not those of the stream.
    Altered,
}

/// The last bytes of a batch that was sent again and is there already. It shows, together with the batch that follows,
/// what one alone is too short for.
#[derive(Debug, Clone)]
struct Echo {
    /// Where the bytes end.
    end: u64,
    /// The bytes before that, at most [`TAIL_WINDOW_BYTES`].
    bytes: Vec<u8>,
    /// Whether they begin at a batch end that is known here, which vouches for what lies before.
    anchored: bool,
}

impl Echo {
    /// What of it lies before `at`, where the next batch begins: batches of one run may overlap. None where there is a gap.
    fn up_to(mut self, at: u64) -> Option<Self> {
        let beyond = self.end.checked_sub(at)?;
        let left = (self.bytes.len() as u64).checked_sub(beyond)?;
        self.bytes.truncate(left as usize);
        self.end = at;
        Some(self)
    }
}

/// Of whom ranges have become durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durable<'i> {
    /// The agent.
    pub agent: &'i AgentId,
    /// The category.
    pub category: &'i CategoryName,
    /// Whether `committed` of the stream has moved.
    pub moved: bool,
}

/// The positions of a stream, as told to those below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Positions {
    /// The byte expected next.
    pub next: Position,
    /// Durable on the sink.
    pub committed: Position,
}

impl Stream {
    fn end_within(&self, set: &RangeSet) -> Position {
        let end = set.unbroken_end(self.base.offset);
        match self.ends.range(self.base.offset..=end).next_back() {
            Some((&offset, end)) => Position { offset, tail: end.tail },
            None => self.base,
        }
    }

    fn next(&self) -> Position {
        self.end_within(&self.has)
    }

    fn committed(&self) -> Position {
        self.end_within(&self.durable)
    }

    /// Says that the sender's bytes are others, once all that is here is durable: the sender goes on from what both have in a new
    /// stream, and what lies before that must not be lost any more.
    fn diverged(&self) -> Verdict {
        if self.next() == self.committed() {
            Verdict::Diverged { history: self.history() }
        } else {
            Verdict::Wait {
                reason: "the stream's bytes are others than those stored, and these are not durable yet".into(),
            }
        }
    }

    fn history(&self) -> Vec<Position> {
        let next = self.next().offset;
        let mut history: Vec<Position> = self
            .ends
            .range(..=next)
            .rev()
            .take(HISTORY_LEN)
            .map(|(&offset, end)| Position { offset, tail: end.tail })
            .collect();
        history.reverse();
        history
    }

    /// What is there beyond `next`.
    fn beyond_next(&self) -> Vec<Range<u64>> {
        let next = self.next().offset;
        let beyond = self.has.iter().filter(|range| range.end > next);
        beyond.map(|range| range.start.max(next)..range.end).collect()
    }

    /// Takes a batch that continues what is there. Where parts of it are there beyond `next` already, it has to show first that they
    /// are of the same bytes. `patient`: whether the batch that these parts are of may still come.
    fn take(&self, batch: &BatchHeader, frames: &[FrameHeader], patient: bool) -> Decision {
        let is_all_new = |range: Range<u64>| self.has.missing(range.clone()) == [range];
        let (next, end) = (self.next().offset, batch.end.offset);
        if is_all_new(next..end) {
            return Decision::Take(plan(&self.has, frames));
        }
        let at: Vec<u64> = self.ends.range(next + 1..=end).map(|(&at, _)| at).collect();
        let shown_up_to = at.last().copied().unwrap_or(next);
        if patient && shown_up_to < end && !is_all_new(shown_up_to..end) {
            let reason =
                "parts of a batch that ends behind this one are stored; waiting for that one to compare the two";
            return Decision::Answer(Verdict::Wait { reason: reason.into() });
        }
        if at.is_empty() { Decision::Take(plan(&self.has, frames)) } else { Decision::NeedsTails { at } }
    }

    /// Notes a batch end.
    fn ended(&mut self, batch: (Position, Position), hash: Option<TailHash>) {
        let (start, end) = batch;
        let known = self.ends.entry(end.offset).or_insert(end.tail.into());
        known.tail = end.tail;
        known.batch = hash.map(|hash| (start.offset, hash)).or(known.batch);
    }

    /// Whether a batch is known to have ended there, with these bytes before it.
    fn knows(&self, position: Position) -> bool {
        self.ends.get(&position.offset).is_some_and(|end| end.tail == position.tail)
    }

    /// Whether `bytes`, which begin at `start`, are others than those of the short batches between there and `next`.
    fn contradicts_batches(&self, start: u64, bytes: &[u8]) -> bool {
        let mut end = start + bytes.len() as u64;
        while let Some((began, hash)) = self.ends.get(&end).and_then(|end| end.batch)
            && began >= start
        {
            if TailHash::of(&bytes[(began - start) as usize..(end - start) as usize]) != hash {
                return true;
            }
            end = began;
        }
        false
    }

    /// Forgets batch ends that can matter no more.
    fn prune_ends(&mut self) {
        let committed = self.committed().offset;
        let below = self.ends.range(..=committed).count();
        for _ in HISTORY_LEN..below {
            self.ends.pop_first();
        }
    }
}

impl Ingest {
    /// Knows no stream. A stream that is unknown is accepted only if its first batch was received less than
    /// `stream_ttl_ms` ago, so that what comes later than the owner forgets can't be taken for new.
    #[must_use]
    pub fn new(stream_ttl_ms: i64) -> Self {
        Self { streams: BTreeMap::new(), stream_ttl_ms, patient_until_ms: i64::MIN }
    }

    /// What was found just now is what survived of an owner before.
    pub fn recovered(&mut self, now_ms: i64) {
        self.patient_until_ms = now_ms.saturating_add(PATIENCE_MS);
    }

    fn is_patient(&self, now_ms: i64) -> bool {
        now_ms < self.patient_until_ms
    }

    /// How many streams are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether no stream is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// The positions of a stream, or none for one that is unknown.
    #[must_use]
    pub fn positions(&self, stream: StreamId) -> Option<Positions> {
        let stream = self.streams.get(&stream)?;
        Some(Positions { next: stream.next(), committed: stream.committed() })
    }

    /// The answer to a question for positions: what the verdict is when nothing is offered.
    #[must_use]
    pub fn query(&self, stream: StreamId, claimed: Option<Position>) -> Verdict {
        let Some(known) = self.streams.get(&stream) else {
            return Verdict::Unknown;
        };
        if known.in_doubt > 0 {
            return in_doubt();
        }
        // What the asker believes to be committed must be on the way to what is.
        match claimed {
            Some(claimed) if claimed.offset > known.next().offset => Verdict::Expected,
            Some(claimed) if known.ends.get(&claimed.offset).is_some_and(|end| end.tail != claimed.tail) => {
                known.diverged()
            }
            _ => Verdict::Ok,
        }
    }

    /// Hears from a sender what it was told to be committed.
    ///
    /// An owner tells `committed` at any batch end below which all is durable, also at that of a batch of which it had
    /// everything already and which no frame names. The owner after it learns such an end from those who were told.
    pub fn learn(&mut self, stream: StreamId, committed: Position) {
        if let Some(stream) = self.streams.get_mut(&stream)
            && committed.offset > stream.committed().offset
            && committed.offset <= stream.has.unbroken_end(stream.base.offset)
        {
            stream.ends.entry(committed.offset).or_insert(committed.tail.into());
            stream.changed = true;
        }
    }

    /// Decides about a batch whose frames have been verified.
    #[must_use]
    pub fn decide(&self, batch: &BatchHeader, frames: &[FrameHeader], now_ms: i64) -> Decision {
        let Some(stream) = self.streams.get(&batch.stream) else {
            return self.decide_unknown(batch, frames.len(), now_ms);
        };
        if stream.in_doubt > 0 {
            return Decision::Answer(in_doubt());
        }
        if stream.category != batch.category {
            return Decision::Answer(Verdict::Refused {
                reason: format!(
                    "the stream belongs to category {}; a file can't change its category: give it back, or rename the file to a new one",
                    stream.category
                ),
            });
        }
        let next = stream.next();
        let diverged = || Decision::Answer(stream.diverged());
        // The same place with other bytes before it: wherever both sides know a batch end, it must be the same one.
        let contradicts =
            |position: Position| stream.ends.get(&position.offset).is_some_and(|end| end.tail != position.tail);
        if batch.start.offset > next.offset {
            return Decision::Answer(Verdict::Expected);
        }
        if contradicts(batch.start) {
            return diverged();
        }
        if batch.end.offset <= next.offset {
            return if contradicts(batch.end) {
                diverged()
            } else if batch.end.offset < next.offset && next.offset - batch.end.offset < TAIL_WINDOW_BYTES as u64 {
                Decision::NeedsEcho
            } else {
                Decision::Answer(Verdict::Ok)
            };
        }
        if batch.start.offset < next.offset {
            return Decision::NeedsTail { at: next.offset };
        }
        stream.take(batch, frames, self.is_patient(now_ms))
    }

    /// Decides about a batch for which the hashes of its own bytes at batch ends beyond `next` were asked for.
    #[must_use]
    pub fn decide_overlapping(
        &self,
        batch: &BatchHeader,
        frames: &[FrameHeader],
        own: impl IntoIterator<Item = (u64, OwnTail)>,
    ) -> Decision {
        let Some(stream) = self.streams.get(&batch.stream) else {
            return Decision::Answer(Verdict::Unknown);
        };
        let is_other = own.into_iter().any(|(at, own)| match own {
            OwnTail::Hash(tail) => !stream.knows(Position { offset: at, tail }),
            OwnTail::TooShort { from, bytes, .. } => stream.contradicts_batches(from, &bytes),
            OwnTail::Altered => false,
        });
        if !is_other {
            return Decision::Take(plan(&stream.has, frames));
        }
        let there = stream.beyond_next();
        if there.iter().all(|range| stream.durable.contains(range.clone())) {
            Decision::Displace(there)
        } else {
            Decision::Answer(Verdict::Wait {
                reason: "bytes of an older content of the file are stored, and they are not durable yet".into(),
            })
        }
    }

    /// Forgets what is there of a stream beyond `next`, after [`Decision::Displace`], and takes the batch whole from there on.
    pub fn displace(&mut self, batch: &BatchHeader, frames: &[FrameHeader]) -> Decision {
        let Some(stream) = self.streams.get_mut(&batch.stream) else {
            return Decision::Answer(Verdict::Unknown);
        };
        let next = stream.next().offset;
        for range in stream.beyond_next() {
            stream.has.remove(range.clone());
            stream.durable.remove(range);
        }
        stream.ends.split_off(&(next + 1));
        stream.changed = true;
        Decision::Take(plan(&stream.has, frames))
    }

    /// Decides about a batch for which [`Ingest::decide`] asked for the tail of its own bytes at `next`.
    #[must_use]
    pub fn decide_crossing(&self, batch: &BatchHeader, frames: &[FrameHeader], own: OwnTail, now_ms: i64) -> Decision {
        let Some(stream) = self.streams.get(&batch.stream) else {
            return Decision::Answer(Verdict::Unknown);
        };
        let patient = self.is_patient(now_ms);
        let next = stream.next();
        match own {
            OwnTail::Hash(hash) if hash == next.tail => stream.take(batch, frames, patient),
            OwnTail::Hash(_) => Decision::Answer(stream.diverged()),
            OwnTail::TooShort { from, bytes, anchored: true } => {
                if stream.contradicts_batches(from, &bytes) {
                    Decision::Answer(stream.diverged())
                } else {
                    stream.take(batch, frames, patient)
                }
            }
            OwnTail::Altered if stream.knows(batch.start) => stream.take(batch, frames, patient),
            // It is the first of its run, and reaches back behind what the sender knows to be committed: whatever came before
            // it is gone there, so it will never show more.
            OwnTail::TooShort { .. }
                if batch.start.offset < batch.committed.offset
                    && batch.committed.offset >= stream.committed().offset =>
            {
                Decision::Answer(stream.diverged())
            }
            OwnTail::TooShort { .. } => {
                // Its run begins at the highest committed position that it knows, and it will know this answer's.
                let committed = stream.committed();
                Decision::GoBack(if committed.offset > batch.committed.offset { committed } else { batch.committed })
            }
            OwnTail::Altered => Decision::Answer(stream.diverged()),
        }
    }

    /// Notes the last bytes of a batch for which [`Ingest::decide`] asked. `pieces` are its bytes by place in the stream, in any
    /// order; none where records were altered.
    pub fn heard(&mut self, batch: &BatchHeader, pieces: Option<Vec<(u64, &[u8])>>) {
        let Some(stream) = self.streams.get_mut(&batch.stream) else { return };
        let before = stream.echo.take().and_then(|echo| echo.up_to(batch.start.offset));
        let known_start = stream.knows(batch.start);
        let Some(pieces) = pieces else { return };
        let (mut bytes, mut anchored) = before.map_or((Vec::new(), known_start), |echo| (echo.bytes, echo.anchored));
        let from = batch.end.offset.saturating_sub(TAIL_WINDOW_BYTES as u64).max(batch.start.offset);
        let Some(own) = bytes_between(pieces, from, batch.end.offset) else { return };
        bytes.extend_from_slice(&own);
        if bytes.len() > TAIL_WINDOW_BYTES {
            bytes.drain(..bytes.len() - TAIL_WINDOW_BYTES);
            anchored = false;
        }
        stream.echo = Some(Echo { end: batch.end.offset, bytes, anchored });
    }

    /// The hash of a batch's own bytes before `at`, with the help of what was heard just before it. `pieces` as for
    /// [`Ingest::heard`].
    #[must_use]
    pub fn own_tail(&self, batch: &BatchHeader, pieces: Option<Vec<(u64, &[u8])>>, at: u64) -> OwnTail {
        let from = at.saturating_sub(TAIL_WINDOW_BYTES as u64);
        let Some(own) = pieces.and_then(|pieces| bytes_between(pieces, from.max(batch.start.offset), at)) else {
            return OwnTail::Altered;
        };
        if from >= batch.start.offset {
            return OwnTail::Hash(TailHash::of(&own));
        }
        let stream = self.streams.get(&batch.stream);
        let echo = stream.and_then(|stream| stream.echo.clone());
        match echo.and_then(|echo| echo.up_to(batch.start.offset)) {
            Some(echo) if echo.bytes.len() as u64 >= batch.start.offset - from => {
                OwnTail::Hash(TailHash::of(&[&echo.bytes[..], &own[..]].concat()))
            }
            // All from a known batch end on was heard: as good as a batch that begins there.
            Some(echo) if echo.anchored => {
                let from = echo.end - echo.bytes.len() as u64;
                OwnTail::TooShort { from, bytes: [echo.bytes, own].concat(), anchored: true }
            }
            _ => {
                let anchored = stream.is_some_and(|stream| stream.knows(batch.start));
                OwnTail::TooShort { from: batch.start.offset, bytes: own, anchored }
            }
        }
    }

    fn decide_unknown(&self, batch: &BatchHeader, slices: usize, now_ms: i64) -> Decision {
        if batch.start != batch.base {
            return Decision::Answer(Verdict::Unknown);
        }
        if batch.received_ms.is_some_and(|received| now_ms.saturating_sub(received) >= self.stream_ttl_ms) {
            return Decision::Answer(Verdict::Refused {
                reason: "the batch is older than stream_ttl: whether it was stored before can't be known any more; replay it by hand if it was not".into(),
            });
        }
        Decision::Take((0..slices).map(|_| SlicePlan::Whole).collect())
    }

    /// Notes that the batch is taken: its ends are known from now on. To be called before [`Ingest::wrote`].
    pub fn took(&mut self, batch: &BatchHeader, frames: &[FrameHeader], now_ms: i64) {
        let stream = self.streams.entry(batch.stream).or_insert_with(|| Stream {
            agent: batch.agent.clone(),
            category: batch.category.clone(),
            base: batch.base,
            has: RangeSet::new(),
            durable: RangeSet::new(),
            ends: BTreeMap::from([(batch.base.offset, batch.base.tail.into())]),
            in_doubt: 0,
            touched_ms: now_ms,
            echo: None,
            changed: true,
        });
        let hash = frames.iter().flat_map(|frame| &frame.slices).find_map(|slice| slice.batch_hash);
        // The batch says what the bytes beyond `next` are, so an end there that bytes which are lost had, says nothing any more.
        let beyond = stream.next().offset + 1..batch.end.offset;
        if !beyond.is_empty() {
            let stale: Vec<u64> = stream.ends.range(beyond).map(|(&at, _)| at).collect();
            for at in stale {
                stream.ends.remove(&at);
            }
        }
        stream.ended((batch.start, batch.end), hash);
        stream.echo = None;
        stream.touched_ms = stream.touched_ms.max(now_ms);
        stream.changed = true;
    }

    /// Notes ranges that were handed to a segment.
    pub fn wrote(&mut self, stream: StreamId, ranges: impl IntoIterator<Item = Range<u64>>) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            for range in ranges {
                stream.has.insert(range);
            }
            stream.changed = true;
        }
    }

    /// Notes ranges that are durable: covered by a sync, or found by a recovery and settled. Returns whose stream it is.
    pub fn durable(&mut self, stream: StreamId, ranges: impl IntoIterator<Item = Range<u64>>) -> Option<Durable<'_>> {
        let stream = self.streams.get_mut(&stream)?;
        let before = stream.committed().offset;
        for range in ranges {
            debug_assert!(stream.has.contains(range.clone()), "durable bytes are bytes that it has");
            stream.durable.insert(range);
        }
        stream.prune_ends();
        stream.changed = true;
        let moved = stream.committed().offset > before;
        Some(Durable { agent: &stream.agent, category: &stream.category, moved })
    }

    /// How far a stream is committed; 0 for one that is unknown.
    #[must_use]
    pub fn committed(&self, stream: StreamId) -> u64 {
        self.streams.get(&stream).map_or(0, |stream| stream.committed().offset)
    }

    /// Notes that an agent still speaks of a stream, so that it is not forgotten.
    pub fn mentioned(&mut self, stream: StreamId, now_ms: i64) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.touched_ms = stream.touched_ms.max(now_ms);
        }
    }

    /// A segment failed, and bytes of the stream behind its last sync may or may not be in it.
    pub fn doubt(&mut self, stream: StreamId) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.in_doubt += 1;
        }
    }

    /// The segment was read back: of the ranges in doubt these are lost, the others are there.
    pub fn resolve(&mut self, stream: StreamId, lost: impl IntoIterator<Item = Range<u64>>) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.in_doubt = stream.in_doubt.saturating_sub(1);
            for range in lost {
                debug_assert!(stream.durable.missing(range.clone()) == [range.clone()], "durable bytes are not lost");
                stream.has.remove(range);
            }
            stream.changed = true;
        }
    }

    /// Adds what a frame on the sink holds. `durable` when it is settled, too.
    pub fn found(&mut self, category: &CategoryName, slice: &SliceDescriptor, durable: bool, now_ms: i64) {
        let stream = self.streams.entry(slice.stream).or_insert_with(|| Stream {
            agent: slice.agent.clone(),
            category: category.clone(),
            base: slice.base,
            has: RangeSet::new(),
            durable: RangeSet::new(),
            ends: BTreeMap::from([(slice.base.offset, slice.base.tail.into())]),
            in_doubt: 0,
            touched_ms: now_ms,
            echo: None,
            changed: true,
        });
        stream.ends.entry(slice.start.offset).or_insert(slice.start.tail.into()).tail = slice.start.tail;
        stream.ended((slice.start, slice.end), slice.batch_hash);
        for range in slice.runs.iter().map(Run::range) {
            stream.has.insert(range.clone());
            if durable {
                stream.durable.insert(range);
            }
        }
        stream.changed = true;
    }

    /// Loads a stream from the ledger; all that the ledger knows is durable.
    pub fn load(&mut self, record: StreamRecord) {
        let end = |end: &EndRecord| (end.position.offset, End { tail: end.position.tail, batch: end.batch });
        let ends = record.ends.iter().map(end).collect();
        self.streams.insert(
            record.stream,
            Stream {
                agent: record.agent,
                category: record.category,
                base: record.base,
                has: record.durable.clone(),
                durable: record.durable,
                ends,
                in_doubt: 0,
                touched_ms: record.touched_ms,
                echo: None,
                changed: false,
            },
        );
    }

    /// The streams for a ledger entry: those that changed since the last one, or all.
    pub fn records(&mut self, all: bool) -> Vec<StreamRecord> {
        let mut records = Vec::new();
        for (id, stream) in &mut self.streams {
            if !all && !stream.changed {
                continue;
            }
            // What is not durable yet makes another entry necessary once it is.
            stream.changed = stream.has != stream.durable;
            records.push(StreamRecord {
                stream: *id,
                agent: stream.agent.clone(),
                category: stream.category.clone(),
                base: stream.base,
                durable: stream.durable.clone(),
                ends: stream
                    .ends
                    .iter()
                    .map(|(&offset, end)| EndRecord { position: Position { offset, tail: end.tail }, batch: end.batch })
                    .collect(),
                touched_ms: stream.touched_ms,
            });
        }
        records
    }

    /// Forgets streams that got nothing for `stream_ttl`; returns their ids.
    pub fn expire(&mut self, now_ms: i64) -> Vec<StreamId> {
        let expired: Vec<StreamId> = self
            .streams
            .iter()
            .filter(|(_, stream)| {
                stream.in_doubt == 0 && now_ms.saturating_sub(stream.touched_ms) >= self.stream_ttl_ms
            })
            .map(|(id, _)| *id)
            .collect();
        for id in &expired {
            self.streams.remove(id);
        }
        expired
    }

    /// Every stream with its agent, category and positions, for the status page.
    pub fn iter(&self) -> impl Iterator<Item = (StreamId, &AgentId, &CategoryName, Positions)> {
        self.streams.iter().map(|(id, stream)| {
            (*id, &stream.agent, &stream.category, Positions { next: stream.next(), committed: stream.committed() })
        })
    }
}

fn in_doubt() -> Verdict {
    Verdict::Wait { reason: "a segment with bytes of this stream failed and is being read back".into() }
}

fn plan(has: &RangeSet, frames: &[FrameHeader]) -> Vec<SlicePlan> {
    frames
        .iter()
        .map(|frame| {
            let runs: Vec<Range<u64>> =
                frame.slices.iter().flat_map(|slice| slice.runs.iter().map(Run::range)).collect();
            let missing: Vec<Range<u64>> = runs.iter().flat_map(|run| has.missing(run.clone())).collect();
            if missing.is_empty() {
                SlicePlan::Drop
            } else if missing == runs {
                SlicePlan::Whole
            } else {
                SlicePlan::Cut(missing)
            }
        })
        .collect()
}

/// The bytes of a stream between two offsets; none when the pieces don't have all of them.
fn bytes_between(mut pieces: Vec<(u64, &[u8])>, from: u64, to: u64) -> Option<Vec<u8>> {
    pieces.sort_unstable_by_key(|(start, _)| *start);
    let mut bytes = Vec::with_capacity((to - from) as usize);
    let mut expected = from;
    for (start, piece) in pieces {
        let end = start + piece.len() as u64;
        if end <= expected || start >= to {
            continue;
        }
        if start > expected {
            return None;
        }
        bytes.extend_from_slice(&piece[(expected - start) as usize..(end.min(to) - start) as usize]);
        expected = end.min(to);
    }
    (expected == to).then_some(bytes)
}
