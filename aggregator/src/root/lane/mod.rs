//! The owner of a lane: one task that has all of the lane's state and never waits for the sink.
//!
//! It decides about batches ([`super::ingest`]), hands frames to segments, and once in a commit interval orders a sync of
//! those that are dirty. Whatever takes time (writers, ledger entries, recoveries, joins, seals) runs in tasks that
//! report back, so a sink that hangs holds up only what depends on it.

mod batches;
mod entries;
mod hours;
mod reports;
mod segments;
mod sizes;
mod waiting;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::frame::{Codec, FrameEncoder};
use tributary_common::ids::{AgentId, CategoryName, Epoch, LaneCount, LaneId};
use tributary_common::messages::{Answer, Owner, PositionsQuery, StreamQuery, Verdict};
use tributary_common::report::{BucketCount, Report, ReportAnswer};

use self::reports::HeldReply;
use self::segments::ranges_of;
use super::ingest::Ingest;
use super::jobs::Jobs;
use super::ledger::{Contents, HourKey, HourState, LateMove, Seal, SegmentRecord};
use super::metrics::LaneMetrics;
use super::patience::Patience;
use super::placement::{MIN_BLOCK_BYTES, Placement};
use super::recovery::Taken;
use super::roster::{MemberView, Roster};
use super::segment::{HeldRanges, Segment, SegmentId, WriterReport};
use super::sink::{Executed, LaneSink, Scan};
use crate::dfs::{CreateOptions, Dfs, DfsError, Guard};
use crate::surroundings::WallClock;
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
    /// After what time of silence an agent is no longer expected.
    pub forget_agents_after: Duration,
    /// Whether an hour gets its success file though agents are missing.
    pub publish_partial: bool,
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
    /// How long after its end an hour stays open of which no agent is known.
    pub close_delay: Duration,
    /// For how long agents are waited for in vain before an hour is sealed without them.
    pub give_up_after: Duration,
}

/// What a lane is asked.
pub enum Request {
    /// Take these batches.
    Offer(Vec<Received>, oneshot::Sender<Result<Vec<Answer>, Overloaded>>),
    /// Say what is known of these streams.
    Positions(PositionsQuery, oneshot::Sender<Result<Vec<Answer>, Overloaded>>),
    /// Take these reports.
    Reports(Vec<Report>, oneshot::Sender<Result<Vec<ReportAnswer>, Overloaded>>),
    /// Expect nothing more of the agent with this id or host name. The answer is the number of categories that it was in.
    Retire(String, Option<CategoryName>, oneshot::Sender<usize>),
    /// List the agents.
    Agents(oneshot::Sender<Vec<MemberView>>),
    /// Say how things are.
    Status(oneshot::Sender<serde_json::Value>),
    /// Commit what there is, close all files, write the ledger and end.
    Drain,
}

enum Event {
    Entry {
        number: u64,
        snapshot: bool,
        result: Result<i64, DfsError>,
    },
    ReadBack {
        id: SegmentId,
        result: Result<Option<(Scan, u64)>, DfsError>,
    },
    /// `told`: what agents knew to be stored of the hour when the seal was begun.
    SealReady {
        key: HourKey,
        told: BTreeMap<AgentId, BucketCount>,
        result: Result<Option<Seal>, DfsError>,
    },
    SealDone {
        key: HourKey,
        result: Result<Executed, DfsError>,
    },
    LateReady {
        key: HourKey,
        result: Result<Vec<LateMove>, DfsError>,
    },
    LateDone {
        key: HourKey,
        result: Result<(), DfsError>,
    },
    Published {
        key: HourKey,
        result: Result<bool, DfsError>,
    },
    Wanted(Result<Vec<HourKey>, DfsError>),
    /// `first` is the first bucket of the new size; what is left of the old one has been asked for.
    SizeChanged {
        category: CategoryName,
        first: Bucket,
        old: BTreeSet<HourKey>,
    },
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
    found: Contents,
    ranges: Vec<HeldRanges>,
}

/// A segment that is being read back.
struct GivenUp {
    record: SegmentRecord,
    lost_unless_found: Vec<HeldRanges>,
}

/// An hour that this lane has sealed, and that others may not have.
struct Unpublished {
    since: Instant,
    /// When it is looked at next.
    look_at: Instant,
    under_way: bool,
}

impl Unpublished {
    fn new(now: Instant) -> Self {
        Self { since: now, look_at: now, under_way: false }
    }

    /// Puts the next look off after one at `now` that was in vain: the longer it has waited, the longer, so that the hours that
    /// wait for a lost agent don't cost the sink more and more calls.
    fn wait(&mut self, now: Instant, interval: Duration) {
        let waited = now.saturating_duration_since(self.since);
        self.under_way = false;
        self.look_at = now + (waited / 8).clamp(interval, MAX_LOOK_INTERVAL.max(interval));
    }
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
    unpublished: BTreeMap<HourKey, Unpublished>,
    /// Those of `hours` whose state is to be carried out.
    announced: BTreeSet<HourKey>,
    jobs: Jobs,
    /// Hours that this lane has to seal, too: others have sealed them, or they are left of another bucket size.
    wanted: Vec<HourKey>,
    /// When this lane came to know that there is data of an hour before the category's first one, in milliseconds since 1970; for
    /// those that are not sealed.
    found_ms: BTreeMap<HourKey, i64>,
    /// When these are looked for; none while somebody looks.
    look_for_wanted_at: Option<Instant>,
    /// From this hour on every hour of the category is sealed, also an empty one.
    first_buckets: BTreeMap<CategoryName, Bucket>,
    changed_first_buckets: BTreeSet<CategoryName>,
    /// Those to which the topology gives another bucket size, while what is left of the old one is asked for.
    changing: BTreeSet<CategoryName>,
    /// The first hour of the category that may not be sealed yet.
    sealed_up_to: BTreeMap<CategoryName, Bucket>,
    forgotten_streams: Vec<tributary_common::ids::StreamId>,
    forgotten_hours: Vec<HourKey>,
    roster: Roster,
    patience: Patience,
    last_tick: Instant,
    /// Answers that wait for a ledger entry to be seen.
    held_replies: Vec<HeldReply>,
    next_segment: u64,
    encoders: HashMap<Codec, FrameEncoder>,
    next_entry: u64,
    seen_entry: Option<u64>,
    /// When an entry was seen last.
    last_seen_at: Option<Instant>,
    /// What this machine's time of day was then, in milliseconds since 1970.
    last_seen_ms: i64,
    entry_under_way: bool,
    entries_since_snapshot: u64,
    entry_wanted: bool,
    last_entry_at: Instant,
    /// How far the sink's clock is ahead of this machine's; none until an entry was written.
    clock_ahead_ms: Option<i64>,
    reports: mpsc::UnboundedSender<(SegmentId, WriterReport)>,
    events: mpsc::UnboundedSender<Event>,
    started: Instant,
    draining: bool,
    metrics: LaneMetrics,
}

/// Ledger entries between two snapshots.
const SNAPSHOT_EVERY: u64 = 64;

/// How far the sink's clock and this machine's may differ before nothing is sealed, given up or forgotten any more.
const MAX_CLOCK_DIFFERENCE_MS: i64 = 60_000;

/// The longest time between two looks at an hour that this lane has sealed and others have not.
const MAX_LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// When a sender that was refused for lack of room comes again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How often it is looked at what can be done.
const WORK_INTERVAL: Duration = Duration::from_millis(200);

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
        reports: mpsc::UnboundedSender<(SegmentId, WriterReport)>,
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
            placement: Arc::new(Placement::new(settings.replication, settings.min_replication)),
            epoch: taken.epoch,
            attempts: Arc::default(),
            success_file: settings.success_file.clone(),
            patience: None,
        };
        let closed = taken
            .segments
            .into_iter()
            .map(|found| {
                let torn = found.record.torn || found.scan.torn.is_some();
                let ranges = ranges_of(found.scan.frames.iter().flat_map(|frame| &frame.slices));
                let unsettled = (!found.record.closed).then(|| Unsettled {
                    at: now + settings.settle,
                    found: found.scan.frames.iter().collect(),
                    ranges,
                });
                let record = SegmentRecord { torn, ..found.record };
                (record.name.clone(), Closed { record, unsettled, in_entry: None })
            })
            .collect();
        let announced = taken
            .hours
            .iter()
            .filter(|(_, state)| matches!(state, HourState::Announced(_) | HourState::Late(_)))
            .map(|(key, _)| key.clone())
            .collect();
        let sealed = taken.hours.iter().filter(|(_, state)| matches!(state, HourState::Sealed));
        let unpublished = sealed.map(|(key, _)| (key.clone(), Unpublished::new(now))).collect();
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
            announced,
            jobs: Jobs::default(),
            wanted: Vec::new(),
            found_ms: BTreeMap::new(),
            look_for_wanted_at: Some(now),
            sealed_up_to: taken.first_buckets.clone(),
            first_buckets: taken.first_buckets,
            changed_first_buckets: BTreeSet::new(),
            changing: BTreeSet::new(),
            forgotten_streams: Vec::new(),
            forgotten_hours: Vec::new(),
            roster: taken.roster,
            patience: Patience::default(),
            last_tick: now,
            held_replies: Vec::new(),
            next_segment: 0,
            encoders: HashMap::new(),
            next_entry,
            seen_entry: taken.last_entry,
            last_seen_at: None,
            last_seen_ms: 0,
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

    fn tick(&mut self) {
        self.settle();
        self.settle_roster();
        self.forget_old();
        self.wait_for_hours();
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

    fn status(&mut self) -> serde_json::Value {
        let waiting = self.waiting_status();
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
            "open_hours": waiting,
            "agents": self.roster.len(),
            "records": self.metrics.records(),
            "published_hours": self.metrics.published_hours(),
            "late_records": self.metrics.late_records(),
        })
    }
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
                        Ok((answers, None)) => lane.reply(answers, claims, reply),
                        Ok((answers, Some(entry))) => lane.hold(entry, HeldReply::batches(answers, claims, reply)),
                        // A sender that gave up will ask again.
                        Err(full) => drop(reply.send(Err(full))),
                    }
                }
                Some(Request::Positions(query, reply)) => {
                    let claims = query.streams.iter().map(|asked| asked.committed.map_or(0, |at| at.offset)).collect();
                    let answers = query.streams.iter().map(|asked| lane.say_positions(asked)).collect();
                    lane.reply(answers, claims, reply);
                }
                Some(Request::Reports(reports, reply)) => lane.take_reports(&reports, reply),
                Some(Request::Retire(name, category, reply)) => lane.retire(&name, category.as_ref(), reply),
                Some(Request::Agents(reply)) => {
                    // Whoever asked may be gone.
                    let _ = reply.send(lane.roster.views(lane.settings.clock.now_ms()).collect());
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
