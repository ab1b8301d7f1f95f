//! The task that owns an edge's state.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tributary_common::batch::Batch;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::http::pool::Trouble;
use tributary_common::ids::StreamId;
use tributary_common::messages::{Answer, Owner, PositionsQuery, StreamQuery, Verdict};
use tributary_common::position::Position;
use tributary_common::report::{Report, ReportAnswer, Reports};

use super::metrics::{EdgeMetrics, ForwardError, Outcome, Reason};
use super::recent::Recent;
use super::reports::{Desk, Full};
use super::{EdgeOptions, Shown};
use crate::forward::{Ask, Effect, Failed, Failure, Forwarder, Outgoing, RequestId, Upstream, Way};
use crate::setaside::{Piece, SetAside};
use crate::spool::run::{Entry, Offer, Place};
use crate::spool::{GroupError, ReadError, Spool, Written, read_batch};
use crate::surroundings::{Blocking, Surroundings, now};
use crate::tier::{Elsewhere, Overloaded, Received};

/// What was offered is put into one group up to this size.
const GROUP_BYTES: u64 = 32 << 20;

/// Most bytes of batches that are kept in memory for the tier above: several requests for each of some routes.
const RECENT_BYTES: u64 = 16 << 20;

/// A batch may grow by as much in the spool: its sender's idea of what is committed gives way to the spool's own.
const POSITION_BYTES: u64 = 32;

/// When a sender may come again after a write to the spool failed or found no room.
const NO_ROOM_RETRY_AFTER: Duration = Duration::from_secs(5);

/// When a sender that knows no other node may come again to one that is being emptied.
const DRAIN_RETRY_AFTER: Duration = Duration::from_secs(5);

/// Files that nobody needs wait so long for a group that comes anyway, and for the next attempt if they can't be deleted.
const GARBAGE_PAUSE: Duration = Duration::from_secs(1);

/// How often the state is shown, and its bounds are looked at.
const TICK: Duration = Duration::from_millis(500);

/// How often runs are looked through for what is too old, broken or forgotten.
const SWEEP: Duration = Duration::from_secs(60);

/// After what time setting aside is tried again.
const KEEP_RETRY: Duration = Duration::from_secs(30);

/// How long the last word about a stream is remembered for its sender. One that comes later begins anew, and is told again.
const ENDED_FOR: Duration = Duration::from_secs(3600);

/// Most last words that are remembered.
const MAX_ENDED: usize = 100_000;

/// Most questions to the parent tier at a time on behalf of senders.
const MAX_QUESTIONS: usize = 64;

/// So many redirects are followed with one question.
const MAX_QUESTION_HOPS: usize = 3;

/// When reports are passed on again that did not arrive.
const REPORTS_RETRY: Duration = Duration::from_millis(500);

/// Most streams that the status names.
const SHOWN_STREAMS: usize = 20;

pub(super) enum Message {
    Offer { batches: Vec<Received>, reply: oneshot::Sender<Result<Vec<Answer>, Overloaded>> },
    Reports { reports: Vec<Report>, reply: oneshot::Sender<Result<Vec<ReportAnswer>, Overloaded>> },
    Positions { query: PositionsQuery, reply: oneshot::Sender<Result<Vec<Answer>, Overloaded>> },
    Drain { reply: oneshot::Sender<()> },
    Stop { reply: oneshot::Sender<()> },
}

struct Offered {
    batches: Vec<Received>,
    reply: oneshot::Sender<Result<Vec<Answer>, Overloaded>>,
}

/// A request whose batches were put to the rule; it is answered when the group is on disk.
struct Decided {
    outcomes: Vec<(StreamId, Option<Offer>)>,
    /// All of them and where they are going to be, if all were taken: else most of the memory that they share would be kept
    /// for the few that were.
    taken: Vec<(Place, Batch)>,
    reply: oneshot::Sender<Result<Vec<Answer>, Overloaded>>,
}

/// Where a batch is that is to be sent on.
enum Source {
    Memory(Batch),
    Disk(Place, Piece),
}

struct Ended {
    verdict: Verdict,
    /// How far the stream was committed: a sender that hears it doesn't begin again before that.
    committed: Option<Position>,
    owner: Option<Owner>,
    since: Instant,
}

/// Entries that are to be set aside, and are needed until they are.
struct Keep {
    stream: StreamId,
    reason: Reason,
    entries: Vec<Entry>,
    pieces: Vec<Piece>,
}

/// What a question to the tier above came to.
struct Asked {
    route: usize,
    node: usize,
    failure: Option<Failure>,
}

/// Reports that went to the tier above, and what came of it.
struct Passing {
    route: usize,
    node: usize,
    reports: Vec<Report>,
    outcome: Result<Vec<ReportAnswer>, Failed>,
}

enum Sent {
    Answered { batches: u64, bytes: u64, answers: Vec<Answer> },
    Failed(Failed),
    Unreadable { stream: StreamId, place: Place, error: ReadError },
}

/// What is on the disk.
pub(super) struct Opened {
    pub(super) spool: Spool,
    pub(super) set_aside: SetAside,
    pub(super) lock: Option<File>,
}

/// The disk failed to make something durable.
#[derive(Debug, thiserror::Error)]
#[error("{0}; what the disk has is found out by reading it again, in a new process")]
pub struct SyncFailed(#[source] GroupError);

pub(super) struct Core {
    options: EdgeOptions,
    spool: Spool,
    recent: Recent,
    forwarder: Forwarder,
    set_aside: Arc<SetAside>,
    upstream: Arc<dyn Upstream>,
    surroundings: Surroundings,
    metrics: Arc<EdgeMetrics>,
    shown: Arc<Mutex<Shown>>,
    ended: HashMap<StreamId, Ended>,
    waiting: VecDeque<Offered>,
    group: Option<(BoxFuture<'static, Written>, Vec<Decided>)>,
    last_group: Option<Instant>,
    requests: JoinSet<(RequestId, Sent)>,
    questions: JoinSet<Vec<Asked>>,
    keeping: JoinSet<(Keep, bool)>,
    keep_again: Vec<(Instant, Keep)>,
    next_tick: Instant,
    next_sweep: Instant,
    trouble: Option<String>,
    /// Who waits until it is empty; nothing new is taken.
    draining: Option<Vec<oneshot::Sender<()>>>,
    desk: Desk,
    passing: JoinSet<Passing>,
    _lock: Option<File>,
}

impl Core {
    pub(super) fn new(
        options: EdgeOptions,
        Opened { spool, set_aside, lock }: Opened,
        upstream: Arc<dyn Upstream>,
        surroundings: Surroundings,
        metrics: Arc<EdgeMetrics>,
        shown: Arc<Mutex<Shown>>,
    ) -> Self {
        let mut forwarder = Forwarder::new(options.forward, &options.routes);
        for (id, stream) in spool.streams() {
            forwarder.notice(now(), id, stream.agent.lane(options.lanes), &spool);
        }
        let (now, routes) = (now(), options.routes.len());
        Self {
            options,
            spool,
            recent: Recent::new(RECENT_BYTES),
            forwarder,
            set_aside: Arc::new(set_aside),
            upstream,
            surroundings,
            metrics,
            shown,
            ended: HashMap::new(),
            waiting: VecDeque::new(),
            group: None,
            last_group: None,
            requests: JoinSet::new(),
            questions: JoinSet::new(),
            keeping: JoinSet::new(),
            keep_again: Vec::new(),
            next_tick: now,
            next_sweep: now,
            trouble: None,
            draining: None,
            desk: Desk::new(routes),
            passing: JoinSet::new(),
            _lock: lock,
        }
    }

    /// Works until it is told to stop, or all handles are gone.
    ///
    /// # Errors
    /// When the disk failed to make something durable: going on would mean to promise what may be gone.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Message>) -> Result<(), SyncFailed> {
        loop {
            let at = now();
            self.begin_group(at)?;
            self.send(at);
            self.pass_reports_on(at);
            let deadline = self.deadline(at);
            // What was begun comes to its end before anything new is heard.
            tokio::select! {
                biased;
                written = group_done(&mut self.group) => {
                    if let Some((_, decided)) = self.group.take() {
                        self.end_group(written, decided)?;
                    }
                }
                Some(done) = self.requests.join_next() => {
                    let (id, sent) = join(done);
                    self.sent(id, sent, now());
                }
                Some(done) = self.questions.join_next() => {
                    for Asked { route, node, failure } in join(done) {
                        let random = self.surroundings.random.bits();
                        self.forwarder.asked(now(), route, node, failure.as_ref(), random);
                    }
                }
                Some(done) = self.keeping.join_next() => {
                    let (keep, kept) = join(done);
                    self.kept(keep, kept, now());
                }
                Some(done) = self.passing.join_next() => self.passed(join(done), now()),
                () = tokio::time::sleep_until(deadline.into()) => self.tick(now()),
                message = inbox.recv() => match message {
                    None => return Ok(()),
                    Some(Message::Stop { reply }) => {
                        if let Some((group, decided)) = self.group.take() {
                            self.end_group(group.await, decided)?;
                        }
                        self.show();
                        // Nobody may be left to hear it.
                        let _ = reply.send(());
                        return Ok(());
                    }
                    Some(message) => self.hear(message, at),
                },
            }
        }
    }

    fn deadline(&self, now: Instant) -> Instant {
        let group = self.group_due(now).filter(|_| self.group.is_none());
        [Some(self.next_tick), group, self.forwarder.next_deadline(), self.desk.deadline()]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.next_tick)
    }

    fn hear(&mut self, message: Message, now: Instant) {
        match message {
            Message::Offer { reply, .. } if self.draining.is_some() => {
                // Whoever gave up waiting asks another one.
                let _ = reply.send(Err(being_emptied()));
            }
            Message::Reports { reply, .. } if self.draining.is_some() => {
                // Whoever gave up waiting asks another one.
                let _ = reply.send(Err(being_emptied()));
            }
            Message::Reports { reports, reply } => {
                // Whoever gave up waiting reports again.
                let _ = reply.send(self.take_reports(reports, now));
            }
            Message::Drain { reply } => {
                tracing::info!(batches = self.spool.entries(), "this node is being emptied");
                self.draining.get_or_insert_default().push(reply);
                self.look_whether_empty();
            }
            Message::Offer { batches, reply } => self.waiting.push_back(Offered { batches, reply }),
            Message::Positions { query, reply } => self.positions(query, reply, now),
            Message::Stop { .. } => {}
        }
    }

    // ---- groups

    /// When the next group should begin, if there is anything to do.
    fn group_due(&self, now: Instant) -> Option<Instant> {
        let pause = match (self.waiting.is_empty(), self.spool.has_garbage()) {
            (false, _) => self.options.sync_interval,
            (true, true) => GARBAGE_PAUSE,
            (true, false) => return None,
        };
        Some(self.last_group.map_or(now, |last| last + pause))
    }

    fn begin_group(&mut self, now: Instant) -> Result<(), SyncFailed> {
        if self.group.is_some() || self.group_due(now).is_none_or(|due| now < due) {
            return Ok(());
        }
        let mut group = self.spool.plan();
        let mut decided = Vec::new();
        while group.bytes() < GROUP_BYTES {
            let Some(offered) = self.waiting.pop_front() else { break };
            // Whoever gave up waiting sends it again.
            if offered.reply.is_closed() {
                continue;
            }
            let bytes = offered.batches.iter().map(|one| one.batch.encoded_len() + POSITION_BYTES).sum();
            if let Err(full) = self.spool.room(&group, offered.batches.len() as u64, bytes) {
                self.metrics.offered(Outcome::NoRoom, offered.batches.len() as u64);
                self.trouble = Some(full.to_string());
                let _ = offered.reply.send(Err(Overloaded::new(full.to_string(), NO_ROOM_RETRY_AFTER)));
                continue;
            }
            let mut outcomes = Vec::with_capacity(offered.batches.len());
            let mut taken = Vec::with_capacity(offered.batches.len());
            for Received { mut batch, .. } in offered.batches {
                let header = &batch.header;
                let id = header.stream;
                // One that begins where its stream is committed begins anew.
                if header.start.offset == header.committed.offset || self.is_outdated(id, header.committed) {
                    self.ended.remove(&id);
                }
                if self.ended.contains_key(&id) {
                    self.metrics.offered(Outcome::Ended, 1);
                    outcomes.push((id, None));
                    continue;
                }
                let offer = self.spool.offer(&mut group, &mut batch);
                self.metrics.offered(Outcome::from(&offer), 1);
                if offer == Offer::Take
                    && let Some(entry) = self.spool.stream(id).and_then(|stream| stream.run.entries().next_back())
                {
                    taken.push((entry.place, batch));
                }
                outcomes.push((id, Some(offer)));
            }
            if taken.len() < outcomes.len() {
                taken.clear();
            }
            decided.push(Decided { outcomes, taken, reply: offered.reply });
        }
        self.last_group = Some(now);
        if group.is_idle() {
            // Whatever is answered now is on disk since an earlier group.
            self.end_group(group.write(), decided)
        } else {
            self.metrics.groups.inc();
            self.group = Some((self.surroundings.blocking.run(move || group.write()), decided));
            Ok(())
        }
    }

    fn end_group(&mut self, written: Written, decided: Vec<Decided>) -> Result<(), SyncFailed> {
        let failed = match self.spool.conclude(written) {
            Ok(()) => None,
            Err(error @ GroupError::Write(_)) => {
                self.metrics.failed_groups.inc();
                tracing::error!(error = %error, "a group of batches was not taken");
                self.trouble = Some(error.to_string());
                Some(Overloaded::new(error.to_string(), NO_ROOM_RETRY_AFTER))
            }
            Err(error @ GroupError::Sync(_)) => return Err(SyncFailed(error)),
        };
        for one in decided {
            let took = one.outcomes.iter().any(|(_, offer)| *offer == Some(Offer::Take));
            let answer = match &failed {
                Some(failed) if took => Err(failed.clone()),
                _ => Ok(one.outcomes.iter().map(|(id, offer)| self.answer(*id, offer.as_ref())).collect()),
            };
            if failed.is_none() {
                self.recent.add(one.taken);
            }
            for (id, _) in &one.outcomes {
                if let Some(stream) = self.spool.stream(*id) {
                    self.forwarder.notice(now(), *id, stream.agent.lane(self.options.lanes), &self.spool);
                }
            }
            // Whoever gave up waiting asks again.
            let _ = one.reply.send(answer);
        }
        Ok(())
    }

    fn answer(&self, id: StreamId, offer: Option<&Offer>) -> Answer {
        if let Some(ended) = self.ended.get(&id) {
            let Ended { verdict, committed, owner, .. } = ended;
            return Answer { stream: id, next: None, committed: *committed, owner: *owner, verdict: verdict.clone() };
        }
        let Some(stream) = self.spool.stream(id) else {
            let verdict =
                Verdict::Wait { reason: "the stream's run has just ended here; offer the batch again".into() };
            return Answer { stream: id, next: None, committed: None, owner: None, verdict };
        };
        let run = &stream.run;
        Answer {
            stream: id,
            next: Some(run.next()),
            committed: Some(run.committed()),
            owner: stream.owner,
            verdict: match offer {
                None | Some(Offer::Take | Offer::Held | Offer::BelowCommitted) => Verdict::Ok,
                Some(Offer::Beyond) => Verdict::Expected,
                // The sender takes what it is told with this word for stored, and only what is committed is.
                Some(Offer::Diverged) if run.is_empty() => Verdict::Diverged { history: vec![run.committed()] },
                Some(Offer::Diverged) => Verdict::Wait {
                    reason:
                        "the stream's bytes are others than those that are held here, and these are not committed yet"
                            .into(),
                },
            },
        }
    }

    /// Whether more of a stream is committed than when its last word was said: it went on by another way.
    fn is_outdated(&self, id: StreamId, committed: Position) -> bool {
        let known = self.ended.get(&id).and_then(|ended| ended.committed);
        known.is_some_and(|known| committed.offset > known.offset)
    }

    // ---- questions

    fn positions(
        &mut self,
        query: PositionsQuery,
        reply: oneshot::Sender<Result<Vec<Answer>, Overloaded>>,
        now: Instant,
    ) {
        let mut answers: Vec<Option<Answer>> = Vec::with_capacity(query.streams.len());
        let mut unknown: BTreeMap<usize, Vec<(usize, StreamQuery)>> = BTreeMap::new();
        for (index, asked) in query.streams.into_iter().enumerate() {
            let id = asked.stream;
            if let Some(committed) = asked.committed {
                self.spool.commit(id, committed, None);
                if self.is_outdated(id, committed) {
                    self.ended.remove(&id);
                }
            }
            if self.ended.contains_key(&id) || self.spool.stream(id).is_some() {
                answers.push(Some(self.answer(id, None)));
            } else {
                answers.push(None);
                unknown.entry(self.forwarder.route_of(asked.lane)).or_default().push((index, asked));
            }
        }
        if self.draining.is_some() && !unknown.is_empty() {
            // Whoever gave up waiting asks another one.
            let _ = reply.send(Err(being_emptied()));
            return;
        }
        if unknown.is_empty() {
            // Whoever gave up waiting asks again.
            let _ = reply.send(Ok(answers.into_iter().flatten().collect()));
            return;
        }
        if self.questions.len() >= MAX_QUESTIONS {
            let reason = format!("{MAX_QUESTIONS} questions to the tier above are under way");
            let _ = reply.send(Err(Overloaded::new(reason, Duration::from_secs(1))));
            return;
        }
        let asks = unknown.into_iter().map(|(route, asked)| {
            let chosen = self.forwarder.node(route, now);
            let way = chosen.map(|(node, reconnect)| self.way(route, node, reconnect));
            ask_above(
                Arc::clone(&self.upstream),
                way,
                chosen.map(|(node, _)| node),
                self.options.routes[route].clone(),
                asked,
            )
        });
        let asks: Vec<_> = asks.collect();
        self.questions.spawn(async move {
            let mut hops = Vec::new();
            for (given, asked) in join_all(asks).await {
                hops.extend(asked);
                for (index, answer) in given {
                    answers[index] = Some(answer);
                }
            }
            // Whoever gave up waiting asks again.
            let _ = reply.send(Ok(answers.into_iter().flatten().collect()));
            hops
        });
    }

    // ---- reports

    fn take_reports(&mut self, reports: Vec<Report>, now: Instant) -> Result<Vec<ReportAnswer>, Overloaded> {
        let mut answers = Vec::new();
        for report in reports {
            let route = self.forwarder.route_of(report.lane);
            match self.desk.take(report, route, now) {
                Ok(answer) => answers.extend(answer),
                Err(Full) => {
                    let reason = "there is no memory for the reports of more agents";
                    self.trouble = Some(reason.to_owned());
                    return Err(Overloaded::new(reason, NO_ROOM_RETRY_AFTER));
                }
            }
        }
        Ok(answers)
    }

    fn pass_reports_on(&mut self, now: Instant) {
        while let Some((route, reports)) = self.desk.due(now) {
            let Some((node, reconnect)) = self.forwarder.node(route, now) else {
                self.desk.not_passed_on(route, &reports, now + REPORTS_RETRY);
                continue;
            };
            let (way, upstream) = (self.way(route, node, reconnect), Arc::clone(&self.upstream));
            self.passing.spawn(async move {
                let body = Reports::new(reports);
                let outcome = upstream.reports(&way, &body).await;
                Passing { route, node, reports: body.reports, outcome }
            });
        }
    }

    fn passed(&mut self, passing: Passing, now: Instant) {
        let Passing { route, node, reports, outcome } = passing;
        let failure = outcome.as_ref().err().map(|failed| failed.failure.clone());
        self.forwarder.asked(now, route, node, failure.as_ref(), self.surroundings.random.bits());
        match outcome {
            Ok(answers) => {
                self.metrics.forwarded_reports.inc_by(reports.len() as u64);
                self.desk.passed_on(route, answers);
            }
            Err(failed) if matches!(failed.failure, Failure::Rejected { .. }) => {
                tracing::error!(error = %failed, reports = reports.len(), "the tier above rejected reports; they are dropped");
                self.desk.passed_on(route, Vec::new());
            }
            Err(failed) => {
                tracing::debug!(error = %failed, "reports were not passed on; they are sent again");
                self.desk.not_passed_on(route, &reports, now + REPORTS_RETRY);
            }
        }
    }

    // ---- forwarding

    fn way(&self, route: usize, node: usize, reconnect: bool) -> Way {
        Way { route, node: self.options.routes[route][node].clone(), reconnect }
    }

    fn send(&mut self, now: Instant) {
        while let Some(outgoing) = self.forwarder.next_request(now, &self.spool) {
            let Outgoing { id, route, node, reconnect, ask } = outgoing;
            let way = self.way(route, node, reconnect);
            let upstream = Arc::clone(&self.upstream);
            match ask {
                Ask::Batches(parts) => {
                    let mut reads = Vec::new();
                    for part in parts {
                        for place in part.places {
                            // A place of a run is in a segment that is there: it is needed.
                            let on_disk = || self.spool.piece(place).map(|piece| Source::Disk(place, piece));
                            if let Some(source) = self.recent.take(place).map(Source::Memory).or_else(on_disk) {
                                self.metrics.read_back.inc_by(u64::from(matches!(source, Source::Disk(..))));
                                reads.push((part.stream, part.committed, source));
                            }
                        }
                    }
                    let blocking = self.surroundings.blocking.clone();
                    self.requests.spawn(async move { (id, send_batches(&*upstream, &blocking, &way, reads).await) });
                }
                Ask::Positions(streams) => {
                    let streams = streams.into_iter().filter_map(|(id, committed)| {
                        let stream = self.spool.stream(id)?;
                        Some(StreamQuery {
                            lane: stream.agent.lane(self.options.lanes),
                            agent: stream.agent.clone(),
                            category: stream.category.clone(),
                            stream: id,
                            committed: Some(committed),
                        })
                    });
                    let query = PositionsQuery { streams: streams.collect() };
                    self.requests.spawn(async move {
                        let sent = match upstream.positions(&way, &query).await {
                            Ok(answers) => Sent::Answered { batches: 0, bytes: 0, answers },
                            Err(failed) => Sent::Failed(failed),
                        };
                        (id, sent)
                    });
                }
            }
        }
    }

    fn sent(&mut self, id: RequestId, sent: Sent, now: Instant) {
        let effects = match sent {
            Sent::Answered { batches, bytes, answers } => {
                self.metrics.forwarded_batches.inc_by(batches);
                self.metrics.forwarded_bytes.inc_by(bytes);
                self.forwarder.answered(now, id, &answers, &self.spool, self.surroundings.random.bits())
            }
            Sent::Failed(failed) => {
                let kind = match &failed.failure {
                    Failure::Trouble(Trouble::Broken) => ForwardError::Broken,
                    Failure::Trouble(Trouble::Busy(_)) => ForwardError::Busy,
                    Failure::Moved(_) | Failure::Declined(_) => ForwardError::Elsewhere,
                    Failure::Rejected { .. } => ForwardError::Rejected,
                };
                self.metrics.forward_failed(kind);
                match kind {
                    ForwardError::Elsewhere => {
                        tracing::info!(error = %failed, "the tier above sends us to another node");
                    }
                    ForwardError::Busy => tracing::debug!(error = %failed, "the tier above has no room now"),
                    ForwardError::Broken => tracing::warn!(error = %failed, "a request to the tier above failed"),
                    ForwardError::Rejected => tracing::error!(error = %failed, "the tier above rejected a request"),
                }
                self.forwarder.failed(now, id, &failed.failure, &self.spool, self.surroundings.random.bits())
            }
            Sent::Unreadable { stream, place, error } => {
                self.unreadable(stream, place, &error);
                self.forwarder.withdrawn(id, &self.spool);
                Vec::new()
            }
        };
        for effect in effects {
            match effect {
                Effect::Committed { stream, committed, owner } => self.spool.commit(stream, committed, owner),
                Effect::Ended { stream, verdict } => self.end_stream(stream, verdict, now),
                Effect::Alarm { stream, expected, committed } => {
                    self.metrics.alarms.inc();
                    tracing::error!(
                        %stream, expected, committed,
                        "the tier above expects bytes that it had said to be committed: it has lost data that it had promised to keep"
                    );
                }
            }
        }
    }

    fn unreadable(&mut self, stream: StreamId, place: Place, error: &ReadError) {
        let piece = self.spool.piece(place);
        let dropped = self.spool.cut(stream, place);
        tracing::error!(
            %stream, segment = place.segment, offset = place.offset, error = %error, dropped,
            "a batch in the spool can't be read any more: its stream's run ends before it, its sender sends it again"
        );
        if dropped > 0
            && let Some(piece) = piece
        {
            self.keep(Keep { stream, reason: Reason::Corrupt, entries: Vec::new(), pieces: vec![piece] });
        }
    }

    fn end_stream(&mut self, id: StreamId, verdict: Verdict, now: Instant) {
        let reason = Reason::of(&verdict);
        let known = self.spool.stream(id);
        let (committed, owner) = (known.map(|stream| stream.run.committed()), known.and_then(|stream| stream.owner));
        let entries = self.spool.end(id);
        self.forwarder.forget(id);
        tracing::warn!(stream = %id, batches = entries.len(), verdict = reason.label(), "the tier above takes no more of a stream");
        if self.ended.len() < MAX_ENDED {
            self.ended.insert(id, Ended { verdict, committed, owner, since: now });
        }
        self.keep_entries(id, reason, entries);
    }

    // ---- setting aside

    fn keep_entries(&mut self, stream: StreamId, reason: Reason, entries: Vec<Entry>) {
        if entries.is_empty() {
            return;
        }
        let pieces = entries.iter().filter_map(|entry| self.spool.piece(entry.place)).collect();
        self.keep(Keep { stream, reason, entries, pieces });
    }

    fn keep(&mut self, keep: Keep) {
        let set_aside = Arc::clone(&self.set_aside);
        let metrics = Arc::clone(&self.metrics);
        self.keeping.spawn(self.surroundings.blocking.run(move || {
            let label = format!("{}-{}.batches", keep.reason.label(), keep.stream);
            let kept = match set_aside.keep(&label, &keep.pieces) {
                Ok(name) => {
                    metrics.set_aside(keep.reason, keep.pieces.len() as u64);
                    tracing::warn!(stream = %keep.stream, batches = keep.pieces.len(), file = name, "batches set aside");
                    true
                }
                Err(error) => {
                    metrics.set_aside_errors.inc();
                    tracing::error!(stream = %keep.stream, error = %error, "batches stay in the spool: they can't be set aside");
                    false
                }
            };
            (keep, kept)
        }));
    }

    fn kept(&mut self, keep: Keep, kept: bool, now: Instant) {
        if kept {
            self.spool.release(keep.entries);
        } else if !keep.entries.is_empty() {
            self.keep_again.push((now + KEEP_RETRY, keep));
        }
    }

    // ---- time

    fn tick(&mut self, now: Instant) {
        if now < self.next_tick {
            return;
        }
        self.next_tick = now + TICK;
        let (due, later) = std::mem::take(&mut self.keep_again).into_iter().partition(|(at, _)| *at <= now);
        self.keep_again = later;
        let due: Vec<(Instant, Keep)> = due;
        due.into_iter().for_each(|(_, keep)| self.keep(keep));
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP;
            self.sweep(now);
        }
        self.show();
        self.trouble = None;
        self.look_whether_empty();
    }

    /// Tells those who wait for it that nothing is left here that anybody needs.
    fn look_whether_empty(&mut self) {
        let busy = self.group.is_some() || !self.waiting.is_empty() || !self.keeping.is_empty();
        if busy || !self.keep_again.is_empty() || self.spool.entries() > 0 {
            return;
        }
        for waiting in self.draining.iter_mut().flat_map(std::mem::take) {
            // It may have given up.
            let _ = waiting.send(());
        }
    }

    fn sweep(&mut self, now: Instant) {
        self.desk.forget(now);
        self.ended.retain(|_, ended| now.duration_since(ended.since) < ENDED_FOR);
        for (id, stream) in self.spool.streams() {
            if let Some(invariant) = stream.run.broken_invariant() {
                self.metrics.broken_invariants.inc();
                tracing::error!(stream = %id, invariant, run = ?stream.run, "an invariant of a run does not hold: a bug");
            }
        }
        let oldest = self
            .surroundings
            .clock
            .now_ms()
            .saturating_sub(i64::try_from(self.options.max_age.as_millis()).unwrap_or(i64::MAX));
        let old: Vec<StreamId> = (self.spool.streams())
            .filter(|(_, stream)| stream.run.entries().next().is_some_and(|entry| entry.received_ms < oldest))
            .map(|(id, _)| id)
            .collect();
        for id in old {
            // The run is dropped without a last word: a sender that still has the bytes brings them anew.
            let entries = self.spool.end(id);
            self.forwarder.forget(id);
            self.keep_entries(id, Reason::TooOld, entries);
        }
        self.spool.forget_idle();
        self.forwarder.retain(&self.spool);
    }

    fn show(&mut self) {
        let (bytes, entries, segments) = (self.spool.bytes(), self.spool.entries(), self.spool.segments());
        let streams = self.spool.streams().len();
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.metrics.spool_bytes.set(gauge(bytes));
        self.metrics.spool_batches.set(gauge(entries));
        self.metrics.spool_segments.set(gauge(segments as u64));
        self.metrics.streams.set(gauge(streams as u64));
        self.metrics.set_aside_bytes.set(gauge(self.set_aside.bytes()));
        let now_ms = self.surroundings.clock.now_ms();
        let mut waiting: Vec<_> = (self.spool.streams())
            .filter_map(|(id, stream)| Some((stream.run.entries().next()?.received_ms, id, stream)))
            .collect();
        let oldest_ms = waiting.iter().map(|(received_ms, ..)| now_ms - received_ms).max();
        let held_streams = waiting.len();
        if waiting.len() > SHOWN_STREAMS {
            waiting.select_nth_unstable_by_key(SHOWN_STREAMS, |(received_ms, ..)| *received_ms);
            waiting.truncate(SHOWN_STREAMS);
        }
        let waiting: Vec<_> = waiting
            .into_iter()
            .map(|(received_ms, id, stream)| {
                json!({
                    "stream": id, "agent": stream.agent, "category": stream.category,
                    "committed": stream.run.committed().offset, "next": stream.run.next().offset,
                    "batches": stream.run.entries().len(), "oldest_ms": now_ms - received_ms,
                })
            })
            .collect();
        let routes: Vec<_> = (self.forwarder.health())
            .zip(&self.options.routes)
            .map(|((node, failures), nodes)| {
                let nodes: Vec<&str> = nodes.iter().map(Endpoint::as_str).collect();
                json!({ "nodes": nodes, "current": nodes[node], "failures": failures })
            })
            .collect();
        let status = json!({
            "spool": {
                "bytes": bytes, "max_bytes": self.options.spool.max_bytes, "segments": segments, "batches": entries,
                "oldest_ms": oldest_ms,
            },
            "streams": { "known": streams, "held": held_streams, "ended": self.ended.len(), "oldest": waiting },
            "agents": self.desk.len(),
            "parents": routes,
            "requests_under_way": self.forwarder.under_way(),
            "set_aside": { "bytes": self.set_aside.bytes(), "waiting": self.keep_again.len() + self.keeping.len() },
            "trouble": self.trouble,
            "draining": self.draining.is_some(),
        });
        let mut shown = self.shown.lock().expect("nothing panics while the lock is held");
        *shown = Shown { status, trouble: self.trouble.clone() };
    }
}

fn being_emptied() -> Overloaded {
    Overloaded::go("this node is being emptied", DRAIN_RETRY_AFTER, Elsewhere::Sibling)
}

/// A task of ours that panicked is a bug which must not be mistaken for an outcome: it goes on in the task that waits.
fn join<T>(done: Result<T, tokio::task::JoinError>) -> T {
    done.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

async fn group_done(group: &mut Option<(BoxFuture<'static, Written>, Vec<Decided>)>) -> Written {
    match group {
        Some((written, _)) => written.await,
        None => pending().await,
    }
}

/// Asks the tier above about streams of which there is no run here.
async fn ask_above(
    upstream: Arc<dyn Upstream>,
    mut way: Option<Way>,
    mut node: Option<usize>,
    nodes: Vec<Endpoint>,
    asked: Vec<(usize, StreamQuery)>,
) -> (Vec<(usize, Answer)>, Vec<Asked>) {
    let (indexes, streams): (Vec<usize>, Vec<StreamQuery>) = asked.into_iter().unzip();
    let query = PositionsQuery { streams };
    let mut hops = Vec::new();
    let answered = loop {
        let (Some(to), Some(index)) = (&way, node) else {
            break Err("the last requests to it failed; the next one waits a little".into());
        };
        let answered = upstream.positions(to, &query).await;
        let failure = answered.as_ref().err().map(|failed| failed.failure.clone());
        let next = match &failure {
            Some(Failure::Moved(owner)) => nodes.iter().position(|known| known == owner),
            _ => None,
        };
        hops.push(Asked { route: to.route, node: index, failure });
        match next {
            Some(next) if hops.len() <= MAX_QUESTION_HOPS => {
                way = Some(Way { route: to.route, node: nodes[next].clone(), reconnect: false });
                node = Some(next);
            }
            _ => break answered.map_err(|failed| failed.to_string()),
        }
    };
    let reason = match answered {
        Ok(answers)
            if answers.iter().map(|answer| answer.stream).eq(query.streams.iter().map(|asked| asked.stream)) =>
        {
            // What is beyond `committed` would have to be here before a sender may go on behind it.
            let answers = answers.into_iter().map(|answer| Answer { next: answer.committed, ..answer });
            return (indexes.into_iter().zip(answers).collect(), hops);
        }
        Ok(_) => "its answers are not to what was asked".into(),
        Err(error) => error,
    };
    let reason = format!("the tier above can't be asked about this stream now: {reason}");
    let wait = |stream: &StreamQuery| Answer {
        stream: stream.stream,
        next: None,
        committed: None,
        owner: None,
        verdict: Verdict::Wait { reason: reason.clone() },
    };
    (indexes.into_iter().zip(query.streams.iter().map(wait)).collect(), hops)
}

async fn send_batches(
    upstream: &dyn Upstream,
    blocking: &Blocking,
    way: &Way,
    reads: Vec<(StreamId, Position, Source)>,
) -> Sent {
    let batches = reads.len() as u64;
    let read = blocking.run(move || {
        let mut pieces: Vec<Bytes> = Vec::with_capacity(reads.len() * 2);
        for (stream, committed, source) in reads {
            let mut batch = match source {
                Source::Memory(batch) => batch,
                Source::Disk(place, piece) => {
                    read_batch(&*piece.file, place).map_err(|error| (stream, place, error))?
                }
            };
            batch.header.committed = committed;
            pieces.push(batch.encode_head());
            pieces.push(batch.body);
        }
        Ok(pieces)
    });
    match read.await {
        Ok(pieces) => {
            let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
            match upstream.batches(way, pieces).await {
                Ok(answers) => Sent::Answered { batches, bytes, answers },
                Err(failed) => Sent::Failed(failed),
            }
        }
        Err((stream, place, error)) => Sent::Unreadable { stream, place, error },
    }
}
