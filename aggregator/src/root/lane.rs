//! The owner of a lane: one task that has all of the lane's state and never waits for the sink.
//!
//! It decides about batches ([`super::ingest`]), hands frames to segments, and once in a commit interval orders a sync of
//! those that are dirty. Whatever takes time (writers, ledger entries, recoveries, joins, seals) runs in tasks that
//! report back, so a sink that hangs holds up only what depends on it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::frame::{
    Codec, EncodeError, FrameEncoder, FrameError, FrameHeader, SliceDescriptor, cut_slice, records_of,
};
use tributary_common::ids::{CategoryName, Epoch, LaneCount, LaneId};
use tributary_common::messages::{Answer, Owner, PositionsQuery, StreamQuery, Verdict};

use super::ingest::{Decision, Ingest, SlicePlan};
use super::ledger::{Entry, HourKey, HourRecord, HourState, LateMove, Seal, SegmentRecord};
use super::metrics::LaneMetrics;
use super::recovery::Taken;
use super::replication::Replication;
use super::segment::{Counts, HeldRanges, Report, Segment, SegmentId, file_name, spawn_writer};
use super::sink::{LaneSink, Scan};
use crate::dfs::{CreateOptions, Dfs, DfsError, Guard};
use crate::tier::{Overloaded, Received};

/// How a lane works. Times as configured.
#[derive(Debug, Clone)]
pub struct LaneSettings {
    /// How many lanes there are.
    pub lanes: LaneCount,
    /// The time between two commits.
    pub commit_interval: Duration,
    /// Bytes that cause a commit before its time.
    pub commit_bytes: u64,
    /// The time between two ledger entries.
    pub ledger_interval: Duration,
    /// After what time bytes that a recovery found count as durable.
    pub settle: Duration,
    /// After what time of silence a stream is forgotten.
    pub stream_ttl: Duration,
    /// Segments written at a time.
    pub max_open_files: usize,
    /// Slices below this many bytes are merged with others of the same commit and file.
    pub recompress_below: u64,
    /// Bytes that may wait for a sync; above it, batches are refused for a while.
    pub max_uncommitted_bytes: u64,
    /// The name of the empty file that says that an hour is complete.
    pub success_file: String,
    /// How many copies a file has; none for the file system's default.
    pub replication: Option<u16>,
    /// The fewest copies to go down to while a new file can't be written with more.
    pub min_replication: u16,
    /// How long a sync may take.
    pub sync_timeout: Duration,
    /// The time of day.
    pub clock: WallClock,
    /// The categories.
    pub categories: BTreeMap<CategoryName, CategorySettings>,
}

/// How a lane treats one category.
#[derive(Debug, Clone, Copy)]
pub struct CategorySettings {
    /// The size of its buckets.
    pub bucket: BucketSize,
    /// At which length a segment is closed.
    pub roll_size: u64,
    /// After what time without a frame a segment is closed.
    pub idle_timeout: Duration,
    /// How long after its end an hour stays open.
    pub close_delay: Duration,
}

/// What a lane is asked.
pub enum Request {
    /// Take these batches.
    Offer(Vec<Received>, oneshot::Sender<Result<Vec<Answer>, Overloaded>>),
    /// Say what is known of these streams.
    Positions(PositionsQuery, oneshot::Sender<Result<Vec<Answer>, Overloaded>>),
    /// Say how things are.
    Status(oneshot::Sender<serde_json::Value>),
    /// Commit what there is, close all files, write the ledger and end.
    Drain,
}

enum Event {
    Entry { number: u64, snapshot: bool, result: Result<i64, DfsError> },
    ReadBack { id: SegmentId, result: Result<Option<(Scan, u64)>, DfsError> },
    SealReady { key: HourKey, result: Result<Option<Seal>, DfsError> },
    SealDone { key: HourKey, result: Result<(), DfsError> },
    LateReady { key: HourKey, result: Result<Vec<LateMove>, DfsError> },
    LateDone { key: HourKey, result: Result<(), DfsError> },
    Published { key: HourKey, result: Result<bool, DfsError> },
    Wanted(Result<Vec<HourKey>, DfsError>),
    Fenced,
}

/// A segment that nobody writes to any more.
struct Closed {
    record: SegmentRecord,
    /// What a recovery found behind the record's length, and when it counts as durable.
    unsettled: Option<Unsettled>,
    /// The last ledger entry that names it as it is now.
    in_entry: Option<u64>,
}

struct Unsettled {
    at: Instant,
    end: u64,
    counts: Counts,
    ranges: Vec<HeldRanges>,
}

/// A segment that is being read back.
struct GivenUp {
    record: SegmentRecord,
    lost_unless_found: Vec<HeldRanges>,
}

/// How far an hour is, beyond what the ledger says.
enum Job {
    /// Joins are being made.
    Preparing,
    /// The state is to be in the ledger before it is carried out.
    Announcing { entry: u64 },
    /// It is being carried out.
    Executing,
}

/// The owner of a lane.
pub struct Lane {
    settings: LaneSettings,
    sink: LaneSink,
    epoch: Epoch,
    _guard: Box<dyn Guard>,
    ingest: Ingest,
    open: BTreeMap<SegmentId, Segment>,
    writing: HashMap<(HourKey, Codec), SegmentId>,
    given_up: BTreeMap<SegmentId, GivenUp>,
    closed: BTreeMap<String, Closed>,
    hours: BTreeMap<HourKey, HourState>,
    changed_hours: BTreeSet<HourKey>,
    /// Those of `hours` that are sealed and not published.
    unpublished: BTreeSet<HourKey>,
    jobs: BTreeMap<HourKey, Job>,
    /// When it is looked again whether an hour can be published.
    publish_at: BTreeMap<HourKey, Instant>,
    /// Hours that other lanes have sealed, and that this one has to seal, too.
    wanted: Vec<HourKey>,
    /// When these are looked for; none while somebody looks.
    look_for_wanted_at: Option<Instant>,
    /// From this hour on every hour of the category is sealed, also an empty one.
    first_buckets: BTreeMap<CategoryName, Bucket>,
    changed_first_buckets: BTreeSet<CategoryName>,
    /// The first hour of the category that may not be sealed yet.
    sealed_up_to: BTreeMap<CategoryName, Bucket>,
    forgotten_streams: Vec<tributary_common::ids::StreamId>,
    forgotten_hours: Vec<HourKey>,
    next_segment: u64,
    encoders: HashMap<Codec, FrameEncoder>,
    next_entry: u64,
    seen_entry: Option<u64>,
    entry_under_way: bool,
    entries_since_snapshot: u64,
    entry_wanted: bool,
    last_entry_at: Instant,
    /// How far the sink's clock is ahead of this machine's; none until an entry was written.
    clock_ahead_ms: Option<i64>,
    reports: mpsc::UnboundedSender<(SegmentId, Report)>,
    events: mpsc::UnboundedSender<Event>,
    started: Instant,
    draining: bool,
    metrics: LaneMetrics,
}

/// Ledger entries between two snapshots.
const SNAPSHOT_EVERY: u64 = 64;

/// How far the sink's clock and this machine's may differ before hours are no longer sealed.
const MAX_CLOCK_DIFFERENCE_MS: i64 = 60_000;

/// Jobs for hours at a time: enough to hide the sink's latency, few enough not to crowd out the writers.
const MAX_JOBS: usize = 4;

/// When a sender that was refused for lack of room comes again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The pause after a job for an hour failed.
const WORK_INTERVAL: Duration = Duration::from_millis(200);

/// Where a lane reads the time of day, in milliseconds since 1970: the system's clock, or a simulation's.
#[derive(Clone)]
pub struct WallClock(Arc<dyn Fn() -> i64 + Send + Sync>);

impl WallClock {
    /// The system's clock.
    #[must_use]
    pub fn system() -> Self {
        Self::new(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
        })
    }

    /// A clock that shows what `now_ms` says.
    pub fn new(now_ms: impl Fn() -> i64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(now_ms))
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        (self.0)()
    }
}

impl std::fmt::Debug for WallClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WallClock({})", self.now_ms())
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

impl Lane {
    /// The owner of a lane that was taken, together with the channels that its task listens to.
    fn new(
        dfs: Arc<dyn Dfs>,
        lane: LaneId,
        taken: Taken,
        settings: LaneSettings,
        metrics: LaneMetrics,
        reports: mpsc::UnboundedSender<(SegmentId, Report)>,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        let now = Instant::now();
        let create = CreateOptions {
            block_size: MIN_BLOCK_BYTES,
            replication: settings.replication,
            sync_timeout: settings.sync_timeout,
        };
        let sink = LaneSink {
            dfs,
            dir: taken.dir,
            lane,
            lanes: settings.lanes,
            create,
            replication: Arc::new(Replication::new(settings.replication, settings.min_replication)),
            epoch: taken.epoch,
            attempts: Arc::default(),
            success_file: settings.success_file.clone(),
        };
        let closed = taken
            .segments
            .into_iter()
            .map(|found| {
                let torn = found.record.torn || found.scan.torn.is_some();
                let ranges = ranges_of(found.scan.frames.iter().flat_map(|frame| &frame.slices));
                let unsettled = (!found.record.closed).then(|| Unsettled {
                    at: now + settings.settle,
                    end: found.scan.end,
                    counts: found.counts,
                    ranges,
                });
                let record = SegmentRecord { torn, ..found.record };
                (record.name.clone(), Closed { record, unsettled, in_entry: None })
            })
            .collect();
        let jobs = taken
            .hours
            .iter()
            .filter(|(_, state)| matches!(state, HourState::Announced(_) | HourState::Late(_)))
            .map(|(key, _)| (key.clone(), Job::Announcing { entry: 0 }))
            .collect();
        let sealed = taken.hours.iter().filter(|(_, state)| matches!(state, HourState::Sealed));
        let unpublished = sealed.map(|(key, _)| key.clone()).collect();
        let next_entry = taken.last_entry.map_or(0, |last| last + 1);
        Self {
            settings,
            sink,
            epoch: taken.epoch,
            _guard: taken.guard,
            ingest: taken.ingest,
            open: BTreeMap::new(),
            writing: HashMap::new(),
            given_up: BTreeMap::new(),
            closed,
            hours: taken.hours,
            changed_hours: BTreeSet::new(),
            unpublished,
            jobs,
            publish_at: BTreeMap::new(),
            wanted: Vec::new(),
            look_for_wanted_at: Some(now),
            sealed_up_to: taken.first_buckets.clone(),
            first_buckets: taken.first_buckets,
            changed_first_buckets: BTreeSet::new(),
            forgotten_streams: Vec::new(),
            forgotten_hours: Vec::new(),
            next_segment: 0,
            encoders: HashMap::new(),
            next_entry,
            seen_entry: taken.last_entry,
            entry_under_way: false,
            entries_since_snapshot: SNAPSHOT_EVERY,
            entry_wanted: true,
            last_entry_at: now,
            clock_ahead_ms: None,
            reports,
            events,
            started: now,
            draining: false,
            metrics,
        }
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn owner(&self) -> Owner {
        Owner { lane: self.sink.lane, epoch: self.epoch }
    }

    fn answer(&self, stream: tributary_common::ids::StreamId, verdict: Verdict) -> Answer {
        let positions = self.ingest.positions(stream);
        Answer {
            stream,
            next: positions.map(|positions| positions.next),
            committed: positions.map(|positions| positions.committed),
            owner: Some(self.owner()),
            verdict,
        }
    }

    fn say_positions(&mut self, asked: &StreamQuery) -> Answer {
        if let Some(committed) = asked.committed {
            self.ingest.learn(asked.stream, committed);
        }
        self.answer(asked.stream, self.ingest.query(asked.stream, asked.committed))
    }

    /// Sends answers. Those that say that less is known of a stream than the sender was told (`claims`: how far it was
    /// committed), or that it will never be taken, may come from an owner that was fenced while it slept and does not know
    /// what its successor has done. So they are sent only after a look that shows that the lane is still this owner's.
    fn reply(
        &self,
        mut answers: Vec<Answer>,
        claims: Vec<u64>,
        reply: oneshot::Sender<Result<Vec<Answer>, Overloaded>>,
    ) {
        let bold = |answer: &Answer, claim: u64| match answer.verdict {
            Verdict::Unknown | Verdict::Diverged { .. } | Verdict::Refused { .. } => true,
            Verdict::Ok | Verdict::Expected | Verdict::Wait { .. } => {
                answer.next.is_some_and(|next| next.offset < claim)
            }
        };
        if !answers.iter().zip(&claims).any(|(answer, claim)| bold(answer, *claim)) {
            // A sender that gave up will ask again.
            let _ = reply.send(Ok(answers));
            return;
        }
        let (sink, events) = (self.sink.clone(), self.events.clone());
        tokio::spawn(async move {
            let said = match sink.is_fenced().await {
                Ok(false) => Ok(answers),
                Ok(true) => {
                    let _ = events.send(Event::Fenced);
                    Err(Overloaded::new("another root has taken the lane", RETRY_AFTER))
                }
                Err(error) => {
                    for (answer, _) in answers.iter_mut().zip(&claims).filter(|(answer, claim)| bold(answer, **claim)) {
                        let reason = format!("the owner can't make sure that the lane is still its own: {error}");
                        answer.verdict = Verdict::Wait { reason };
                        answer.next = None;
                    }
                    Ok(answers)
                }
            };
            let _ = reply.send(said);
        });
    }

    // ---- batches ----

    fn uncommitted_bytes(&self) -> u64 {
        self.open.values().map(Segment::dirty_bytes).sum()
    }

    fn offer(&mut self, batches: Vec<Received>) -> Result<Vec<Answer>, Overloaded> {
        if self.draining {
            return Err(Overloaded::new("the lane's owner is stopping", RETRY_AFTER));
        }
        let waiting = self.uncommitted_bytes();
        if waiting >= self.settings.max_uncommitted_bytes {
            let reason = format!("{waiting} bytes wait for the sink to make them durable");
            return Err(Overloaded::new(reason, RETRY_AFTER));
        }
        Ok(batches.into_iter().map(|received| self.take(&received)).collect())
    }

    fn take(&mut self, received: &Received) -> Answer {
        let header = &received.batch.header;
        let now = self.settings.clock.now_ms();
        self.ingest.learn(header.stream, header.committed);
        let mut decision = self.ingest.decide(header, &received.frames, now);
        if let Decision::NeedsTail { at } = decision {
            decision = match with_pieces(received, |pieces| self.ingest.own_tail(header, pieces, at)) {
                Ok(own) => self.ingest.decide_crossing(header, &received.frames, own),
                Err(error) => Decision::Answer(Verdict::Refused { reason: error.to_string() }),
            };
        }
        let verdict = match decision {
            Decision::Answer(verdict) => verdict,
            Decision::NeedsEcho => match with_pieces(received, |pieces| self.ingest.heard(header, pieces)) {
                Ok(()) => Verdict::Ok,
                Err(error) => Verdict::Refused { reason: error.to_string() },
            },
            Decision::Take(plans) => match self.prepare(received, &plans) {
                Ok(writes) => {
                    self.ingest.took(header, now);
                    for (frame, slice, bytes) in writes {
                        self.write(
                            HourKey { category: header.category.clone(), bucket: frame.bucket },
                            frame.codec,
                            slice,
                            bytes,
                        );
                    }
                    Verdict::Ok
                }
                Err(reason) => Verdict::Refused { reason },
            },
            Decision::GoBack(place) => {
                self.metrics.batch(&Verdict::Expected);
                return Answer { next: Some(place), ..self.answer(header.stream, Verdict::Expected) };
            }
            Decision::NeedsTail { .. } => unreachable!("a decision with the tail asks for no tail"),
        };
        self.metrics.batch(&verdict);
        self.answer(header.stream, verdict)
    }

    /// What is to be written of a batch: nothing is, if any part of it can't be.
    fn prepare<'r>(
        &mut self,
        received: &'r Received,
        plans: &[SlicePlan],
    ) -> Result<Vec<(&'r FrameHeader, SliceDescriptor, Bytes)>, String> {
        let mut writes = Vec::new();
        for ((frame, bytes), plan) in received.frames.iter().zip(received.batch.frames()).zip(plans) {
            let [slice] = frame.slices.as_slice() else {
                return Err("a frame of a batch has more than one slice".into());
            };
            match plan {
                SlicePlan::Drop => {}
                SlicePlan::Whole => writes.push((frame, slice.clone(), bytes)),
                SlicePlan::Cut(wanted) => {
                    let body = frame.decode(&bytes).map_err(|error| error.to_string())?;
                    match cut_slice(slice, &body, wanted) {
                        Ok(Some((cut, kept))) => {
                            self.metrics.cut();
                            let encoder = self.encoder(frame.codec);
                            let bytes = encoder
                                .encode(&frame.category, frame.bucket, std::slice::from_ref(&cut), &kept)
                                .map_err(|error| error.to_string())?;
                            writes.push((frame, cut, bytes));
                        }
                        Ok(None) => {}
                        Err(altered) => {
                            tracing::warn!(
                                stream = %slice.stream, start = slice.start.offset, end = slice.end.offset, error = %altered,
                                "records may be doubled: a batch that overlaps what is stored is written whole"
                            );
                            self.metrics.possible_duplicate();
                            writes.push((frame, slice.clone(), bytes));
                        }
                    }
                }
            }
        }
        Ok(writes)
    }

    fn encoder(&mut self, codec: Codec) -> &mut FrameEncoder {
        self.encoders.entry(codec).or_insert_with(|| FrameEncoder::new(codec, 1))
    }

    // ---- segments ----

    fn write(&mut self, key: HourKey, codec: Codec, slice: SliceDescriptor, frame: Bytes) {
        self.note_category(&key);
        self.ingest.wrote(slice.stream, slice.runs.iter().map(tributary_common::frame::Run::range));
        self.metrics.wrote(frame.len() as u64, slice.records);
        let now = self.elapsed_ms();
        let id = self.segment_for(key, codec);
        let small = (frame.len() as u64) < self.settings.recompress_below;
        let segment = self.open.get_mut(&id).expect("it was found or made just now");
        segment.last_write_ms = now;
        if small {
            segment.small_bytes += frame.len() as u64;
            segment.small.push((slice, frame));
        } else {
            segment.write(vec![slice], frame);
        }
    }

    /// From the first data of a category on, its hours are sealed one by one, also empty ones. Data of earlier hours (a backlog)
    /// has its hours sealed on demand.
    fn note_category(&mut self, key: &HourKey) {
        if !self.first_buckets.contains_key(&key.category) {
            let first = key.bucket.size().bucket_of_ms(self.settings.clock.now_ms());
            self.first_buckets.insert(key.category.clone(), first);
            self.sealed_up_to.insert(key.category.clone(), first);
            self.changed_first_buckets.insert(key.category.clone());
        }
    }

    fn segment_for(&mut self, key: HourKey, codec: Codec) -> SegmentId {
        if let Some(id) = self.writing.get(&(key.clone(), codec)) {
            return *id;
        }
        let id = SegmentId(self.next_segment);
        self.next_segment += 1;
        let name = file_name(&key, codec, self.sink.lane, self.epoch, id);
        let options = CreateOptions {
            replication: self.sink.replication.for_new_file(Instant::now()),
            block_size: block_size(
                self.settings.categories.get(&key.category).map_or(MIN_BLOCK_BYTES, |c| c.roll_size),
            ),
            ..self.sink.create
        };
        let path = self.sink.dir.join(&name);
        let writer = spawn_writer(Arc::clone(&self.sink.dfs), path, options, id, self.reports.clone());
        self.open.insert(id, Segment::new(id, name, key.clone(), codec, options.replication, writer));
        self.writing.insert((key, codec), id);
        id
    }

    /// Hands over what was kept back to be merged.
    fn flush_small(&mut self, id: SegmentId) {
        let Some(segment) = self.open.get_mut(&id) else { return };
        let mut small = std::mem::take(&mut segment.small);
        segment.small_bytes = 0;
        let (codec, key) = (segment.codec, segment.key.clone());
        while !small.is_empty() {
            let rest = small.split_off(merge_count(&small));
            let group = std::mem::replace(&mut small, rest);
            let merged = if group.len() > 1 { self.merge(codec, &key, &group) } else { None };
            let segment = self.open.get_mut(&id).expect("nothing was removed in between");
            match merged {
                Some(frame) => segment.write(group.into_iter().map(|(slice, _)| slice).collect(), frame),
                None => group.into_iter().for_each(|(slice, frame)| segment.write(vec![slice], frame)),
            }
        }
    }

    /// Merges small frames into one; none when they are better written as they are.
    fn merge(&mut self, codec: Codec, key: &HourKey, group: &[(SliceDescriptor, Bytes)]) -> Option<Bytes> {
        let mut body = Vec::new();
        for (slice, frame) in group {
            let decoded = FrameHeader::verify(frame).and_then(|header| header.decode(frame));
            match decoded {
                Ok(bytes) => body.extend_from_slice(&bytes),
                Err(error) => {
                    // Its checksum is that of its maker, so no tier can mend it; readers must be able to see that.
                    tracing::error!(stream = %slice.stream, %error, "a frame can't be decompressed; it is stored as it came");
                    return None;
                }
            }
        }
        let slices: Vec<SliceDescriptor> = group.iter().map(|(slice, _)| slice.clone()).collect();
        match self.encoder(codec).encode(&key.category, key.bucket, &slices, &body) {
            Ok(frame) => {
                self.metrics.merged(group.len());
                Some(frame)
            }
            Err(EncodeError::HeaderTooLarge { .. } | EncodeError::Descriptors(_)) => None,
        }
    }

    fn commit(&mut self) {
        let dirty: Vec<SegmentId> =
            self.open.values().filter(|segment| segment.wants_sync()).map(|segment| segment.id).collect();
        for id in dirty {
            self.flush_small(id);
            if let Some(segment) = self.open.get_mut(&id) {
                segment.sync();
            }
        }
    }

    fn close(&mut self, id: SegmentId) {
        self.flush_small(id);
        if let Some(segment) = self.open.get_mut(&id)
            && !segment.closing
        {
            segment.close();
            self.writing.remove(&(segment.key.clone(), segment.codec));
        }
    }

    /// Closes what is large enough, idle, or too much.
    fn close_due(&mut self) {
        let now = self.elapsed_ms();
        let mut due: Vec<SegmentId> = Vec::new();
        for segment in self.open.values().filter(|segment| !segment.closing) {
            let settings = self.settings.categories.get(&segment.key.category);
            let idle = now.saturating_sub(segment.last_write_ms);
            let late = self.hours.contains_key(&segment.key);
            let patience = settings.map_or(Duration::ZERO, |settings| {
                // Late data is complete sooner or later than any hour; it waits no longer than an hour's own close.
                if late {
                    settings.idle_timeout.min(settings.close_delay.max(self.settings.commit_interval))
                } else {
                    settings.idle_timeout
                }
            });
            let full = settings.is_none_or(|settings| segment.written + segment.small_bytes >= settings.roll_size);
            if full || u128::from(idle) >= patience.as_millis() || self.draining {
                due.push(segment.id);
            }
        }
        let open = self.open.values().filter(|segment| !segment.closing).count() - due.len();
        if open > self.settings.max_open_files {
            let mut by_age: Vec<(u64, SegmentId)> = self
                .open
                .values()
                .filter(|segment| !segment.closing && !due.contains(&segment.id))
                .map(|segment| (segment.last_write_ms, segment.id))
                .collect();
            by_age.sort_unstable();
            due.extend(by_age.into_iter().take(open - self.settings.max_open_files).map(|(_, id)| id));
        }
        for id in due {
            self.close(id);
        }
    }

    fn on_report(&mut self, id: SegmentId, report: Report) {
        match report {
            Report::Synced(len) => {
                if let Some(segment) = self.open.get_mut(&id) {
                    if segment.synced == 0 {
                        self.sink.replication.works();
                    }
                    segment.busy = false;
                    let durable = segment.synced(len);
                    self.mark_durable(durable);
                }
            }
            Report::Closed(len) => {
                if let Some(mut segment) = self.open.remove(&id) {
                    let durable = segment.synced(len);
                    self.mark_durable(durable);
                    self.raise_copies(&segment);
                    let record = SegmentRecord { closed: true, ..segment.record() };
                    self.closed.insert(record.name.clone(), Closed { record, unsettled: None, in_entry: None });
                    self.entry_wanted = true;
                }
            }
            Report::Failed(error) => self.give_up(id, &error),
        }
    }

    /// Gives a file that was made with fewer copies the others.
    fn raise_copies(&self, segment: &Segment) {
        if let Some(copies) = self.sink.replication.raise_to(segment.replication) {
            let (sink, name) = (self.sink.clone(), segment.name.clone());
            tokio::spawn(async move {
                if let Err(error) = sink.dfs.set_replication(&sink.dir.join(&name), copies).await {
                    tracing::warn!(segment = %name, copies, %error, "the copies of a closed file can't be raised; do it by hand: hdfs dfs -setrep");
                }
            });
        }
    }

    fn mark_durable(&mut self, ranges: Vec<HeldRanges>) {
        for held in ranges {
            self.ingest.durable(held.stream, held.ranges);
        }
    }

    /// A writer failed: nobody writes to its file again, and what became of its last bytes is looked up.
    fn give_up(&mut self, id: SegmentId, error: &DfsError) {
        let Some(segment) = self.open.remove(&id) else { return };
        tracing::error!(segment = %segment.name, synced = segment.synced, written = segment.written, %error, "a segment is given up; reading back what it holds");
        self.metrics.segment_failed();
        self.writing.retain(|_, writing| *writing != id);
        if segment.synced == 0 {
            self.sink.replication.failed(Instant::now());
        }
        let lost_unless_found = segment.unsynced();
        for stream in streams_of(&lost_unless_found) {
            self.ingest.doubt(stream);
        }
        let record = segment.record();
        let (sink, events, name, synced) =
            (self.sink.clone(), self.events.clone(), record.name.clone(), record.covered);
        self.given_up.insert(id, GivenUp { record, lost_unless_found });
        tokio::spawn(async move {
            let result = sink.read_back(&name, synced).await;
            let _ = events.send(Event::ReadBack { id, result });
        });
        self.look_for_fence();
    }

    fn on_read_back(&mut self, id: SegmentId, result: Result<Option<(Scan, u64)>, DfsError>) {
        let scan = match result {
            Ok(scan) => scan,
            Err(error) => {
                // Refused for good, such as by permissions: the streams keep waiting, and an operator has to look.
                tracing::error!(%error, "a segment that was given up can't be read back; its streams wait");
                self.look_for_fence();
                return;
            }
        };
        let Some(given_up) = self.given_up.remove(&id) else { return };
        let mut counts = Counts::default();
        let mut found: BTreeMap<_, tributary_common::ranges::RangeSet> = BTreeMap::new();
        let mut record = given_up.record;
        let is_there = scan.is_some();
        let mut end = 0;
        if let Some((scan, len)) = scan {
            end = scan.end;
            record.torn = len > scan.end;
            for slice in scan.frames.iter().flat_map(|frame| &frame.slices) {
                counts.add(slice);
                let ranges = found.entry(slice.stream).or_default();
                slice.runs.iter().for_each(|run| ranges.insert(run.range()));
            }
        }
        for stream in streams_of(&given_up.lost_unless_found) {
            let there = found.get(&stream).cloned().unwrap_or_default();
            let lost: Vec<_> = given_up
                .lost_unless_found
                .iter()
                .filter(|held| held.stream == stream)
                .flat_map(|held| held.ranges.iter().flat_map(|range| there.missing(range.clone())))
                .collect();
            self.ingest.resolve(stream, lost);
        }
        tracing::info!(segment = %record.name, synced = record.covered, end, "a segment was read back");
        if end > 0 {
            let ranges = found
                .into_iter()
                .map(|(stream, ranges)| HeldRanges { stream, ranges: ranges.iter().collect() })
                .collect();
            let unsettled = Some(Unsettled { at: Instant::now() + self.settings.settle, end, counts, ranges });
            self.closed.insert(record.name.clone(), Closed { record, unsettled, in_entry: None });
        } else if is_there {
            // Without a single frame: nothing of it must settle, and its hour's seal deletes it.
            record.closed = true;
            self.entry_wanted = true;
            self.closed.insert(record.name.clone(), Closed { record, unsettled: None, in_entry: None });
        }
    }

    /// What recoveries found becomes durable once it is settled.
    fn settle(&mut self) {
        let now = Instant::now();
        let mut durable = Vec::new();
        for closed in self.closed.values_mut() {
            if let Some(unsettled) = closed.unsettled.take_if(|unsettled| unsettled.at <= now) {
                closed.record.covered = unsettled.end;
                closed.record.closed = true;
                let mut counts =
                    Counts { records: closed.record.records, agents: std::mem::take(&mut closed.record.agents) };
                counts.add_all(&unsettled.counts);
                closed.record.records = counts.records;
                closed.record.agents = counts.agents;
                closed.in_entry = None;
                durable.extend(unsettled.ranges);
                self.entry_wanted = true;
            }
        }
        self.mark_durable(durable);
    }

    // ---- ledger ----

    fn ledger_due(&self) -> bool {
        !self.entry_under_way
            && (self.entry_wanted || self.last_entry_at.elapsed() >= self.settings.ledger_interval && self.has_news())
    }

    fn has_news(&self) -> bool {
        !self.changed_hours.is_empty() || !self.open.is_empty() || !self.forgotten_streams.is_empty()
    }

    fn write_entry(&mut self) {
        let snapshot = self.entries_since_snapshot >= SNAPSHOT_EVERY;
        let number = self.next_entry;
        let hours = self
            .hours
            .iter()
            .filter(|(key, _)| snapshot || self.changed_hours.contains(*key))
            .map(|(key, state)| HourRecord { key: key.clone(), state: state.clone() })
            .collect();
        let first_buckets = self
            .first_buckets
            .iter()
            .filter(|(category, _)| snapshot || self.changed_first_buckets.contains(*category))
            .map(|(category, bucket)| (category.clone(), *bucket))
            .collect();
        let segments = self
            .open
            .values()
            .map(Segment::record)
            .chain(self.given_up.values().map(|given_up| given_up.record.clone()))
            .chain(self.closed.values().map(|closed| closed.record.clone()))
            .collect();
        let entry = Entry {
            number,
            lane: self.sink.lane,
            epoch: self.epoch,
            written_ms: self.settings.clock.now_ms(),
            snapshot,
            streams: self.ingest.records(snapshot),
            forgotten: std::mem::take(&mut self.forgotten_streams),
            segments,
            hours,
            forgotten_hours: std::mem::take(&mut self.forgotten_hours),
            first_buckets,
        };
        for closed in self.closed.values_mut().filter(|closed| closed.record.closed) {
            closed.in_entry.get_or_insert(number);
        }
        self.changed_hours.clear();
        self.changed_first_buckets.clear();
        self.entry_wanted = false;
        self.entry_under_way = true;
        self.last_entry_at = Instant::now();
        let (sink, events) = (self.sink.clone(), self.events.clone());
        tokio::spawn(async move {
            let result = sink.write_entry(&entry).await;
            if result.is_ok()
                && entry.snapshot
                && let Err(error) = sink.drop_entries(entry.number).await
            {
                tracing::warn!(%error, "old ledger entries can't be deleted; they do no harm and are tried again");
            }
            let _ = events.send(Event::Entry { number, snapshot: entry.snapshot, result });
        });
    }

    fn on_entry(&mut self, number: u64, snapshot: bool, result: Result<i64, DfsError>) {
        match result {
            Ok(ahead_ms) => {
                self.entry_under_way = false;
                self.next_entry = number + 1;
                self.seen_entry = Some(number);
                self.entries_since_snapshot = if snapshot { 0 } else { self.entries_since_snapshot + 1 };
                if self.clock_ahead_ms.is_none_or(|before| before.abs() <= MAX_CLOCK_DIFFERENCE_MS)
                    && ahead_ms.abs() > MAX_CLOCK_DIFFERENCE_MS
                {
                    tracing::error!(
                        ahead_ms,
                        "this machine's clock and the sink's differ by more than a minute: no hour is sealed until they agree"
                    );
                }
                self.clock_ahead_ms = Some(ahead_ms);
            }
            Err(error) => {
                // No further entry may be written before this one is seen, so there will be none.
                tracing::error!(number, %error, "a ledger entry can't be written");
                self.look_for_fence();
            }
        }
    }

    fn look_for_fence(&self) {
        let (sink, events) = (self.sink.clone(), self.events.clone());
        tokio::spawn(async move {
            if matches!(sink.is_fenced().await, Ok(true)) {
                let _ = events.send(Event::Fenced);
            }
        });
    }

    // ---- hours ----

    /// Starts what can be started for hours that are over, or that have late data.
    fn advance_hours(&mut self) {
        if self.clock_ahead_ms.is_none_or(|ahead| ahead.abs() > MAX_CLOCK_DIFFERENCE_MS) {
            return;
        }
        self.execute_announced();
        let now = self.settings.clock.now_ms();
        let mut candidates: Vec<HourKey> = self
            .open
            .values()
            .map(|segment| segment.key.clone())
            .chain(self.given_up.values().map(|given_up| key_of(&given_up.record)))
            .chain(self.closed.values().map(|closed| key_of(&closed.record)))
            .collect();
        candidates.extend(self.due_by_time(now));
        candidates.extend(self.wanted.iter().filter(|key| !self.hours.contains_key(*key)).cloned());
        candidates.sort();
        candidates.dedup();
        for key in candidates {
            if self.jobs.len() >= MAX_JOBS {
                break;
            }
            if self.jobs.contains_key(&key) {
                continue;
            }
            match self.hours.get(&key) {
                None if self.is_over(&key, now) => self.start_seal(key),
                Some(HourState::Published) => self.start_late(key),
                _ => {}
            }
        }
        self.publish();
    }

    fn is_over(&self, key: &HourKey, now_ms: i64) -> bool {
        let delay = self.settings.categories.get(&key.category).map_or(Duration::ZERO, |category| category.close_delay);
        now_ms >= key.bucket.end_ms() + millis(delay)
    }

    /// The hours from each category's first one on that are over and not sealed.
    fn due_by_time(&mut self, now: i64) -> Vec<HourKey> {
        let mut due = Vec::new();
        let categories: Vec<CategoryName> = self.sealed_up_to.keys().cloned().collect();
        for category in categories {
            let Some(size) = self.settings.categories.get(&category).map(|settings| settings.bucket) else { continue };
            let Some(mut bucket) = self.sealed_up_to.get(&category).copied() else { continue };
            if bucket.size() != size {
                // The topology has another bucket size now; it holds from the present hour on.
                bucket = size.bucket_of_ms(now);
            }
            let mut all_sealed = true;
            for _ in 0..MAX_JOBS {
                let key = HourKey { category: category.clone(), bucket };
                if !self.is_over(&key, now) {
                    break;
                }
                let sealed =
                    matches!(self.hours.get(&key), Some(HourState::Sealed | HourState::Published | HourState::Late(_)));
                all_sealed &= sealed;
                if !sealed {
                    due.push(key);
                }
                bucket = size.bucket_of_ms(bucket.end_ms());
                if all_sealed {
                    self.sealed_up_to.insert(category.clone(), bucket);
                }
            }
        }
        due
    }

    /// The closed segments of an hour, if all of its segments are closed, settled and in the ledger; else orders what is
    /// missing.
    fn ready_segments(&mut self, key: &HourKey) -> Option<Vec<SegmentRecord>> {
        let open: Vec<SegmentId> =
            self.open.values().filter(|segment| segment.key == *key).map(|segment| segment.id).collect();
        let mut ready = open.is_empty();
        for id in open {
            self.close(id);
        }
        ready &= !self.given_up.values().any(|given_up| key_of(&given_up.record) == *key);
        let mut records = Vec::new();
        for closed in self.closed.values().filter(|closed| key_of(&closed.record) == *key) {
            if closed.in_entry.is_some_and(|entry| self.seen_entry >= Some(entry)) {
                records.push(closed.record.clone());
            } else {
                ready = false;
            }
        }
        ready.then_some(records)
    }

    fn roll_size(&self, key: &HourKey) -> u64 {
        self.settings.categories.get(&key.category).map_or(u64::MAX, |category| category.roll_size)
    }

    fn start_seal(&mut self, key: HourKey) {
        let Some(records) = self.ready_segments(&key) else { return };
        self.jobs.insert(key.clone(), Job::Preparing);
        let (sink, events, roll_size) = (self.sink.clone(), self.events.clone(), self.roll_size(&key));
        tokio::spawn(async move {
            let result = sink.prepare_seal(&key, &records, roll_size).await;
            let _ = events.send(Event::SealReady { key, result });
        });
    }

    fn start_late(&mut self, key: HourKey) {
        // Late data that is still being written waits for its segment's own close.
        if self.open.values().any(|segment| segment.key == key) {
            return;
        }
        let Some(records) = self.ready_segments(&key).filter(|records| !records.is_empty()) else { return };
        self.jobs.insert(key.clone(), Job::Preparing);
        let (sink, events, roll_size) = (self.sink.clone(), self.events.clone(), self.roll_size(&key));
        tokio::spawn(async move {
            let result = sink.prepare_late(&records, roll_size).await;
            let _ = events.send(Event::LateReady { key, result });
        });
    }

    fn announce(&mut self, key: HourKey, state: HourState) {
        self.set_hour(key.clone(), state);
        // The entry under way does not have it; the next one does.
        let entry = if self.entry_under_way { self.next_entry + 1 } else { self.next_entry };
        self.jobs.insert(key, Job::Announcing { entry });
    }

    fn set_hour(&mut self, key: HourKey, state: HourState) {
        self.hours.insert(key.clone(), state);
        self.changed_hours.insert(key);
        self.entry_wanted = true;
    }

    fn execute_announced(&mut self) {
        let Some(seen) = self.seen_entry else { return };
        let ready: Vec<HourKey> = self
            .jobs
            .iter()
            .filter(|(_, job)| matches!(job, Job::Announcing { entry } if *entry <= seen))
            .map(|(key, _)| key.clone())
            .collect();
        for key in ready {
            self.jobs.insert(key.clone(), Job::Executing);
            let (sink, events) = (self.sink.clone(), self.events.clone());
            match self.hours.get(&key).cloned() {
                Some(HourState::Announced(seal)) => {
                    tokio::spawn(async move {
                        let result = sink.execute_seal(&key, &seal).await;
                        let _ = events.send(Event::SealDone { key, result });
                    });
                }
                Some(HourState::Late(moves)) => {
                    tokio::spawn(async move {
                        let result = sink.execute_late(&key, &moves).await;
                        let _ = events.send(Event::LateDone { key, result });
                    });
                }
                Some(HourState::Sealed | HourState::Published) | None => {
                    self.jobs.remove(&key);
                }
            }
        }
    }

    fn publish(&mut self) {
        let now = Instant::now();
        let due = |key: &&HourKey| {
            !self.jobs.contains_key(*key) && self.publish_at.get(*key).is_none_or(|publish_at| *publish_at <= now)
        };
        let keys: Vec<HourKey> = self.unpublished.iter().filter(due).take(MAX_JOBS).cloned().collect();
        for key in keys {
            self.jobs.insert(key.clone(), Job::Executing);
            let (sink, events) = (self.sink.clone(), self.events.clone());
            tokio::spawn(async move {
                // One lane publishes for all; the others wait for what they see.
                let result =
                    if sink.lane == LaneId(0) { sink.publish(&key).await } else { sink.is_published(&key).await };
                let _ = events.send(Event::Published { key, result });
            });
        }
    }

    fn job_failed(&mut self, key: &HourKey, what: &str, error: &DfsError) {
        tracing::error!(hour = %key, step = what, %error, "a step for an hour failed; it is tried again");
        self.look_for_fence();
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Entry { number, snapshot, result } => self.on_entry(number, snapshot, result),
            Event::ReadBack { id, result } => self.on_read_back(id, result),
            Event::SealReady { key, result } => match result {
                Ok(Some(seal)) => self.announce(key, HourState::Announced(seal)),
                Ok(None) => {
                    // The hour is there already, made before this lane remembers: all that is here is late.
                    self.jobs.remove(&key);
                    self.set_hour(key, HourState::Published);
                }
                Err(error) => {
                    self.job_failed(&key, "prepare the seal", &error);
                    self.jobs.remove(&key);
                }
            },
            Event::SealDone { key, result } => match result {
                Ok(()) => {
                    if let Some(HourState::Announced(seal)) = self.hours.get(&key) {
                        let records: u64 = seal.files.iter().map(|file| file.records).sum();
                        tracing::info!(hour = %key, files = seal.files.len(), records, "sealed");
                        let gone = seal.files.iter().map(|file| file.source.clone()).chain(seal.inputs.iter().cloned());
                        for name in gone.collect::<Vec<_>>() {
                            self.closed.remove(&name);
                        }
                    }
                    self.jobs.remove(&key);
                    self.unpublished.insert(key.clone());
                    self.set_hour(key, HourState::Sealed);
                }
                Err(error) => {
                    self.job_failed(&key, "seal", &error);
                    self.jobs.insert(key, Job::Announcing { entry: 0 });
                }
            },
            Event::LateReady { key, result } => match result {
                Ok(moves) => self.announce(key, HourState::Late(moves)),
                Err(error) => {
                    self.job_failed(&key, "prepare late files", &error);
                    self.jobs.remove(&key);
                }
            },
            Event::LateDone { key, result } => match result {
                Ok(()) => {
                    if let Some(HourState::Late(moves)) = self.hours.get(&key) {
                        for one in moves {
                            self.metrics.late(one.file.as_ref().map_or(0, |file| file.records));
                            one.file.iter().for_each(|file| {
                                self.closed.remove(&file.source);
                            });
                            one.inputs.iter().for_each(|input| {
                                self.closed.remove(input);
                            });
                        }
                        let files = moves.iter().filter(|one| one.file.is_some()).count();
                        if files > 0 {
                            tracing::warn!(hour = %key, files, "late data was put beside the published hour");
                        }
                    }
                    self.jobs.remove(&key);
                    self.set_hour(key, HourState::Published);
                }
                Err(error) => {
                    self.job_failed(&key, "move late files", &error);
                    self.jobs.insert(key, Job::Announcing { entry: 0 });
                }
            },
            Event::Published { key, result } => {
                self.jobs.remove(&key);
                // Other lanes have not sealed it yet, or the sink is not available.
                self.publish_at.insert(key.clone(), Instant::now() + self.settings.commit_interval);
                match result {
                    Ok(true) => {
                        tracing::info!(hour = %key, "published");
                        self.metrics.published();
                        self.unpublished.remove(&key);
                        self.publish_at.remove(&key);
                        self.set_hour(key, HourState::Published);
                    }
                    Ok(false) => {}
                    Err(error) => self.job_failed(&key, "publish", &error),
                }
            }
            Event::Wanted(result) => {
                self.look_for_wanted_at = Some(Instant::now() + self.settings.ledger_interval);
                match result {
                    Ok(wanted) => self.wanted = wanted,
                    Err(error) => tracing::warn!(%error, "can't look which hours the other lanes have sealed"),
                }
                self.forget_wanted();
            }
            Event::Fenced => {}
        }
    }

    /// Looks which hours the other lanes have sealed.
    fn look_for_wanted(&mut self) {
        if self.settings.lanes.get() == 1 || self.look_for_wanted_at.is_none_or(|at| at > Instant::now()) {
            return;
        }
        self.look_for_wanted_at = None;
        let (sink, events) = (self.sink.clone(), self.events.clone());
        tokio::spawn(async move {
            let result = sink.wanted_hours().await;
            let _ = events.send(Event::Wanted(result));
        });
    }

    /// The lane that publishes takes back the requests for what it has published.
    fn forget_wanted(&self) {
        if self.sink.lane != LaneId(0) {
            return;
        }
        let published =
            |key: &&HourKey| matches!(self.hours.get(*key), Some(HourState::Published | HourState::Late(_)));
        let done: Vec<HourKey> = self.wanted.iter().filter(published).cloned().collect();
        if done.is_empty() {
            return;
        }
        let sink = self.sink.clone();
        tokio::spawn(async move {
            for key in done {
                if let Err(error) = sink.has_hour(&key).await {
                    tracing::debug!(hour = %key, %error, "the request for a published hour stays until the next look");
                }
            }
        });
    }

    fn forget_old(&mut self) {
        let now = self.settings.clock.now_ms();
        self.forgotten_streams.extend(self.ingest.expire(now));
        let ttl = millis(self.settings.stream_ttl);
        let old: Vec<HourKey> = self
            .hours
            .iter()
            .filter(|(key, state)| {
                matches!(state, HourState::Published)
                    && now.saturating_sub(key.bucket.end_ms()) > ttl
                    && self.sealed_up_to.get(&key.category).is_none_or(|bucket| bucket.start_s() > key.bucket.start_s())
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in old {
            self.hours.remove(&key);
            self.forgotten_hours.push(key);
        }
    }

    fn tick(&mut self) {
        self.settle();
        self.forget_old();
        self.look_for_wanted();
        self.close_due();
        self.advance_hours();
        if self.ledger_due() {
            self.write_entry();
        }
        self.metrics.state(self.open.len(), self.uncommitted_bytes(), self.ingest.len());
    }

    fn drained(&self) -> bool {
        self.draining && self.open.is_empty() && !self.entry_under_way && !self.entry_wanted
    }

    fn status(&self) -> serde_json::Value {
        let mut hours = BTreeMap::new();
        for state in self.hours.values() {
            let name = match state {
                HourState::Announced(_) => "sealing",
                HourState::Sealed => "sealed",
                HourState::Published => "published",
                HourState::Late(_) => "late files on their way",
            };
            *hours.entry(name).or_insert(0_u64) += 1;
        }
        serde_json::json!({
            "lane": self.sink.lane,
            "epoch": self.epoch,
            "directory": format!("{}/{}", self.sink.dfs.describe(), self.sink.dir),
            "streams": self.ingest.len(),
            "uncommitted_bytes": self.uncommitted_bytes(),
            "ledger_entry": self.seen_entry,
            "clock_ahead_ms": self.clock_ahead_ms,
            "segments": {
                "open": self.open.values().map(|segment| serde_json::json!({
                    "name": segment.name, "written": segment.written, "synced": segment.synced,
                })).collect::<Vec<_>>(),
                "closed": self.closed.len(),
                "being_read_back": self.given_up.values().map(|given_up| &given_up.record.name).collect::<Vec<_>>(),
            },
            "hours": hours,
            "records": self.metrics.records(),
            "published_hours": self.metrics.published_hours(),
            "late_records": self.metrics.late_records(),
        })
    }
}

/// Hands the bytes of a batch, by their places in the stream, to `look`; none where records were altered.
fn with_pieces<T>(received: &Received, look: impl FnOnce(Option<Vec<(u64, &[u8])>>) -> T) -> Result<T, FrameError> {
    let mut bodies = Vec::new();
    for (frame, bytes) in received.frames.iter().zip(received.batch.frames()) {
        bodies.push(frame.decode(&bytes)?);
    }
    let mut pieces = Vec::new();
    for (frame, body) in received.frames.iter().zip(&bodies) {
        for (index, slice) in frame.slices.iter().enumerate() {
            match records_of(slice, &body[frame.slice_range(index)]) {
                Ok(records) => pieces.extend(records.into_iter().map(|record| (record.range.start, record.bytes))),
                Err(_) => return Ok(look(None)),
            }
        }
    }
    Ok(look(Some(pieces)))
}

/// How many of the slices at the front fit into one merged frame.
fn merge_count(small: &[(SliceDescriptor, Bytes)]) -> usize {
    // A bound on what a descriptor takes: names, three positions, numbers, and thirty bytes for each run.
    const DESCRIPTOR_BYTES: usize = 256;
    const RUN_BYTES: usize = 30;
    const MOST_RAW_BYTES: u64 = 16 << 20;
    let (mut header, mut raw, mut count) = (1024, 0, 0);
    for (slice, _) in small {
        header += DESCRIPTOR_BYTES + slice.host.len() + slice.runs.len() * RUN_BYTES;
        raw += slice.stored_len();
        if count > 0 && (header > tributary_common::limits::MAX_FRAME_HEADER_BYTES || raw > MOST_RAW_BYTES) {
            break;
        }
        count += 1;
    }
    count
}

const MIN_BLOCK_BYTES: u64 = 64 << 20;

/// The block size for a file that grows to `roll_size`: a gzip file can't be split, so it had best be one block. HDFS wants a
/// multiple of its checksum chunk of 512 bytes.
fn block_size(roll_size: u64) -> u64 {
    roll_size.max(MIN_BLOCK_BYTES).next_multiple_of(1 << 20)
}

fn key_of(record: &SegmentRecord) -> HourKey {
    HourKey { category: record.category.clone(), bucket: record.bucket }
}

fn ranges_of<'s>(slices: impl Iterator<Item = &'s SliceDescriptor>) -> Vec<HeldRanges> {
    slices
        .map(|slice| HeldRanges {
            stream: slice.stream,
            ranges: slice.runs.iter().map(tributary_common::frame::Run::range).collect(),
        })
        .collect()
}

fn streams_of(held: &[HeldRanges]) -> BTreeSet<tributary_common::ids::StreamId> {
    held.iter().map(|held| held.stream).collect()
}

/// Why a lane ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was drained, or nobody can ask it any more.
    Drained,
    /// Another owner took it.
    Fenced,
}

/// Runs the owner of a lane until it is drained or fenced.
pub async fn run(
    dfs: Arc<dyn Dfs>,
    lane: LaneId,
    taken: Taken,
    settings: LaneSettings,
    metrics: LaneMetrics,
    mut requests: mpsc::Receiver<Request>,
) -> Ended {
    let (reports, mut reported) = mpsc::unbounded_channel();
    let (events, mut happened) = mpsc::unbounded_channel();
    let commit_interval = settings.commit_interval;
    let commit_bytes = settings.commit_bytes;
    let mut lane = Lane::new(dfs, lane, taken, settings, metrics, reports, events);
    let mut commit = tokio::time::interval(commit_interval);
    commit.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut work = tokio::time::interval(WORK_INTERVAL);
    work.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            Some((id, report)) = reported.recv() => lane.on_report(id, report),
            Some(event) = happened.recv() => {
                if matches!(event, Event::Fenced) {
                    tracing::error!(lane = %lane.sink.lane, epoch = %lane.epoch, "another root has taken the lane; nothing more is written here");
                    return Ended::Fenced;
                }
                lane.on_event(event);
                lane.advance_hours();
                if lane.ledger_due() {
                    lane.write_entry();
                }
            }
            _ = commit.tick() => lane.commit(),
            _ = work.tick() => lane.tick(),
            request = requests.recv() => match request {
                Some(Request::Offer(batches, reply)) => {
                    let claims = batches.iter().map(|received| received.batch.header.committed.offset).collect();
                    let answers = lane.offer(batches);
                    if lane.uncommitted_bytes() >= commit_bytes {
                        lane.commit();
                    }
                    match answers {
                        Ok(answers) => lane.reply(answers, claims, reply),
                        // A sender that gave up will ask again.
                        Err(full) => drop(reply.send(Err(full))),
                    }
                }
                Some(Request::Positions(query, reply)) => {
                    let claims = query.streams.iter().map(|asked| asked.committed.map_or(0, |at| at.offset)).collect();
                    let answers = query.streams.iter().map(|asked| lane.say_positions(asked)).collect();
                    lane.reply(answers, claims, reply);
                }
                Some(Request::Status(reply)) => {
                    // Whoever asked may be gone.
                    let _ = reply.send(lane.status());
                }
                Some(Request::Drain) => {
                    lane.draining = true;
                    lane.entry_wanted = true;
                }
                None => return Ended::Drained,
            },
        }
        if lane.drained() {
            return Ended::Drained;
        }
    }
}
