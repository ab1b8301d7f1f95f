//! An agent: the streams, the reader, the pool of endpoints and the meaning of responses are the program's; the loop around them
//! is a small one of its own, over files in memory.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use tributary_agent::compress::BatchFacts;
use tributary_agent::config::{LongLines, ReadFrom, Source, TimeFormat, TimestampOptions};
use tributary_agent::identity::{FileKey, Origin, read_up_to, stream_id};
use tributary_agent::ship::{ShipError, understand};
use tributary_agent::stream::{Note, ReadShowed, Stream, Want};
use tributary_agent::tail::{Pace, PaceOptions, When};
use tributary_agent::watermark::{Facts, Reach, Reporter, Target, Vanished, Watermark};
use tributary_agent::worker::{Carry, Done, ReadJob, TailId, Worker, WorkerOptions, check};
use tributary_aggregator::surroundings::now;
use tributary_common::batch::Batch;
use tributary_common::bucket::BucketSize;
use tributary_common::frame::Codec;
use tributary_common::http::backoff::{Backoff, BackoffLimits};
use tributary_common::http::endpoint::Endpoint;
use tributary_common::http::pool::{Choice, EndpointPool, PoolOptions, Trouble};
use tributary_common::ids::{LaneCount, StreamId};
use tributary_common::limits::IDENTITY_LINE_BYTES;
use tributary_common::messages::{Answer, Answers, PositionsQuery, StreamQuery, Verdict};
use tributary_common::position::{Position, TailHash};
use tributary_common::report::{Report, ReportAnswer, ReportAnswers, Reports, RunId, StreamOffset};

use crate::chance::{Chance, locked};
use crate::judge::Judge;
use crate::network::{Gate, Letter, Network};
use crate::server::{Checkpoint, LogFile, Server, Shipped};

const BATCH_BYTES: usize = 1200;
const ASK_INTERVAL: Duration = Duration::from_secs(1);
const MAX_REQUESTS: usize = 2;
/// So many batches of a stream are made before it waits for answers.
const MAX_QUEUE: usize = 4;
/// So many of them by one job.
const MOST_IN_A_ROW: u64 = 3;
const BACKOFF: BackoffLimits = BackoffLimits { initial: Duration::from_millis(250), max: Duration::from_secs(10) };

const PACE: PaceOptions = PaceOptions {
    batch_bytes: BATCH_BYTES as u64,
    batch_timeout: Duration::from_millis(300),
    rotate_wait: Duration::from_secs(5),
    partial_line_timeout: Duration::from_secs(600),
};

const REPORT_INTERVAL: Duration = Duration::from_secs(3);
/// As the roots have it.
pub(crate) const CLOSE_DELAY_MS: u64 = 30_000;
const LOST_AFTER: Duration = Duration::from_secs(60);

/// Has the network carry a request, and the program understand the response.
async fn carry<T: serde::de::DeserializeOwned>(network: &Network, gate: &Gate, letter: Letter) -> Result<T, ShipError> {
    let (endpoint, path) = (letter.to.clone(), letter.path);
    match network.post(gate, letter).await {
        Ok(got) => understand(&endpoint, path, got.status, &got.headers, &got.body),
        Err(error) => {
            let kind = tributary_agent::metrics::RequestError::Connection;
            Err(ShipError::Broken { endpoint, kind, error })
        }
    }
}

/// What all agents share.
#[derive(Clone)]
pub(crate) struct Trade {
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) lanes: LaneCount,
    pub(crate) bucket: BucketSize,
    pub(crate) network: Network,
    pub(crate) judge: Judge,
    pub(crate) chance: Chance,
    /// The time of day.
    pub(crate) clock_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
}

struct Named {
    stream_id: StreamId,
    first_line: Vec<u8>,
    stream: Stream<Batch>,
}

struct Tail {
    file: Arc<LogFile>,
    pace: Pace,
    changes: u64,
    named: Option<Named>,
    is_new: bool,
    next_base: Position,
    next_history: Vec<Position>,
    generation: u64,
    carry: Carry,
    not_before: Option<Instant>,
    backoff: Backoff,
    asked: bool,
    ask_at: Instant,
}

/// Per stream: the file, the stream, its generation and the ends of its batches.
type Parts = Vec<(u64, StreamId, u64, Vec<Position>)>;

enum Asked {
    Batches(Parts),
    Positions(Vec<(u64, StreamId)>),
}

/// What an answer brings.
enum Heard {
    Answers(Asked, Option<Vec<Answer>>),
    Reports(Option<Vec<ReportAnswer>>),
}

struct Request {
    server: usize,
    error: Option<ShipError>,
    heard: Heard,
}

pub(crate) struct Agent {
    server: Arc<Server>,
    gate: Gate,
    trade: Trade,
    options: WorkerOptions,
    pool: EndpointPool,
    tails: BTreeMap<u64, Tail>,
    requests: JoinSet<Request>,
    question: bool,
    watermark: Watermark,
    reporter: Reporter,
    vanished: Vanished,
    reporting: bool,
    report_at: Instant,
    /// The number of the report with which it began to leave.
    parting: Option<u64>,
    /// The number of the report from which on it is there again, after it began to leave.
    stays_from: u64,
}

fn source() -> Source {
    Source {
        category: "app".parse().expect("a good name"),
        include: Vec::new(),
        exclude: Vec::new(),
        read_from: ReadFrom::Beginning,
        ignore_older: None,
        rotate_wait: PACE.rotate_wait,
        partial_line_timeout: PACE.partial_line_timeout,
        max_line_bytes: BATCH_BYTES as u64,
        long_lines: LongLines::Split,
        record_prefix: Bytes::new(),
        timestamp: Some(TimestampOptions {
            formats: vec![TimeFormat::UnixMs],
            after: Bytes::new(),
            json_field: None,
            timezone: jiff::tz::TimeZone::UTC,
        }),
    }
}

impl Agent {
    pub(crate) fn new(server: Arc<Server>, gate: Gate, trade: Trade) -> Self {
        let options = PoolOptions::new(BACKOFF, Duration::from_secs(60));
        Self {
            pool: EndpointPool::new(trade.endpoints.len(), options),
            watermark: Watermark::default(),
            reporter: Reporter::new(RunId(trade.chance.bits())),
            vanished: Vanished::default(),
            reporting: false,
            report_at: now(),
            parting: None,
            // The lane's owner takes nothing from one that had left before it has a session of this run.
            stays_from: u64::from(server.said_goodbye()),
            options: WorkerOptions { sources: vec![source()], batch_bytes: BATCH_BYTES },
            server,
            gate,
            trade,
            tails: BTreeMap::new(),
            requests: JoinSet::new(),
            question: false,
        }
    }

    /// Works until it is dropped.
    pub(crate) async fn run(mut self) {
        loop {
            self.gate.pass().await;
            self.turn();
            let pause = self.trade.chance.up_to(Duration::from_millis(400));
            tokio::select! {
                biased;
                Some(done) = self.requests.join_next() => {
                    // An answer that comes while the process is stopped is heard when it goes on.
                    self.gate.pass().await;
                    self.heard(done.expect("requests don't panic"));
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn turn(&mut self) {
        for file in self.server.files() {
            let inode = file.inode;
            self.tails.entry(inode).or_insert_with(|| Tail {
                pace: Pace::new(file.facts().size, false, now()),
                changes: 0,
                file,
                named: None,
                is_new: true,
                next_base: Position::zero(),
                next_history: Vec::new(),
                generation: 0,
                carry: Carry::Search,
                not_before: None,
                backoff: Backoff::new(BACKOFF),
                asked: false,
                ask_at: now(),
            });
            self.advance(inode);
        }
        self.send();
        self.ask();
        self.show();
        self.report();
    }

    fn tail(&mut self, inode: u64) -> &mut Tail {
        self.tails.get_mut(&inode).expect("files stay")
    }

    fn advance(&mut self, inode: u64) {
        let at = now();
        let tail = self.tail(inode);
        let facts = tail.file.facts();
        let grown = tail.pace.seen(facts.size, at);
        if !grown && tail.changes != facts.changes {
            tail.pace.touched();
        }
        tail.changes = facts.changes;
        if facts.rotated {
            tail.pace.rotated(at);
        }
        self.name(inode);
        let tail = self.tail(inode);
        let Some(named) = &mut tail.named else { return };
        if let Some(position) = named.stream.commit_to_check() {
            let matches = check(&*tail.file, &[position]).expect("memory can be read").contains(&position);
            let notes = named.stream.commit_checked(position, matches);
            self.note(inode, &notes);
        }
        for _ in 0..8 {
            if !self.step(inode, at) {
                break;
            }
        }
    }

    /// Does what a stream wants. Returns whether it may want more.
    fn step(&mut self, inode: u64, at: Instant) -> bool {
        let tail = self.tail(inode);
        if tail.not_before.is_some_and(|not_before| at < not_before) {
            return false;
        }
        tail.not_before = None;
        let Some(named) = &mut tail.named else { return false };
        match named.stream.want() {
            Want::Ask | Want::Send => false,
            Want::Check(positions) => {
                let matching = check(&*tail.file, &positions).expect("memory can be read");
                tail.carry = Carry::Search;
                let notes = named.stream.checked(&matching);
                self.note(inode, &notes);
                self.save(inode);
                true
            }
            Want::Replace(base) => {
                let (judge, name) = (&self.trade.judge, &self.gate.name);
                judge.changed(&format!("{name} begins a new stream in file {inode} at {}", base.offset));
                let tail = self.tails.get_mut(&inode).expect("files stay");
                let Some(named) = &tail.named else { return false };
                tail.generation = named.stream.generation() + 1;
                tail.next_history = named.stream.history().filter(|known| known.offset <= base.offset).collect();
                tail.next_base = base;
                tail.named = None;
                tail.asked = false;
                self.name(inode);
                true
            }
            Want::Stopped(reason) => {
                self.trade.judge.broken(format!("a stream of {} stopped: {reason}", self.gate.name));
                false
            }
            Want::Read(from) => {
                if named.stream.queue().len() >= MAX_QUEUE {
                    return false;
                }
                match tail.pace.when(from.offset, at, &PACE, None) {
                    When::Now(end) => self.read(inode, from, end),
                    When::At(_) | When::Later => return false,
                }
                true
            }
        }
    }

    fn read(&mut self, inode: u64, from: Position, end: tributary_agent::cut::DataEnd) {
        let (lane, agent) = (self.server.agent.lane(self.trade.lanes), self.server.agent.clone());
        let (bucket, now_ms) = (self.trade.bucket, (self.trade.clock_ms)());
        let tail = self.tails.get_mut(&inode).expect("files stay");
        let Some(named) = &tail.named else { return };
        let full = tail.pace.size().saturating_sub(from.offset) / BATCH_BYTES as u64;
        let most = if named.stream.is_probing() { 1 } else { full.clamp(1, MOST_IN_A_ROW) as u32 };
        let job = ReadJob {
            generation: named.stream.generation(),
            source: 0,
            from,
            most,
            first_line: (named.first_line.len() as u32, TailHash::of(&named.first_line)),
            end,
            carry: tail.carry,
            now_ms,
            bucket,
            codec: (Codec::Gzip, 1),
            facts: BatchFacts {
                lane,
                host: format!("{agent}.example"),
                agent,
                category: self.options.sources[0].category.clone(),
                stream: named.stream_id,
                base: named.stream.base(),
                committed: named.stream.committed(),
                prefix_len: 0,
            },
        };
        let mut found = Vec::new();
        let done = |what| {
            found.push(what);
            true
        };
        Worker::new(&self.options).read(&*tail.file, job, done);
        for done in found {
            self.job_done(inode, done);
        }
    }

    fn job_done(&mut self, inode: u64, done: Done) {
        let at = now();
        let tail = self.tail(inode);
        let Some(named) = &mut tail.named else { return };
        match done {
            Done::Cut { generation, from, end, carry, .. } => {
                if named.stream.has_read(generation, from, ReadShowed::Batch(end)) {
                    tail.carry = Carry::Known(carry);
                    tail.pace.has_read(end.offset, at);
                }
            }
            Done::Packed { generation, end, batch, .. } => {
                drop(named.stream.has_packed(generation, end, batch.expect("a good cut")));
            }
            Done::Nothing { size, .. } => tail.pace.is_stuck(named.stream.read().offset, size, at),
            Done::OtherBytes { generation, from, size, .. } => {
                tail.pace.seen(size, at);
                named.stream.has_read(generation, from, ReadShowed::OtherBytes);
            }
            other => panic!("a reader doesn't say {other:?}"),
        }
    }

    /// Names the stream of a file whose first line is whole.
    fn name(&mut self, inode: u64) {
        let server = Arc::clone(&self.server);
        let tail = self.tail(inode);
        if tail.named.is_some() {
            return;
        }
        let mut head = vec![0; IDENTITY_LINE_BYTES];
        let got = read_up_to(&*tail.file, &mut head, 0).expect("memory can be read");
        let Some(newline) = head[..got].iter().position(|byte| *byte == b'\n') else { return };
        let first_line = head[..=newline].to_vec();
        let mut database = locked(&server.database);
        let known = database.files.get(&inode).filter(|known| tail.is_new && known.first_line == first_line);
        let (stream_id, mut stream) = match known {
            Some(known) => {
                let stream = Stream::known(known.base, known.committed).with_history(known.history.iter().copied());
                (known.stream, stream)
            }
            None => {
                let origin = Origin { inode, birth_or_filesystem: 1 };
                let ids = (0..).map(|incarnation| stream_id(&server.agent, origin, &first_line, incarnation));
                let id = ids.into_iter().find(|id| !database.taken.contains(id)).expect("there are enough");
                (id, Stream::unknown(tail.next_base).with_history(tail.next_history.iter().copied()))
            }
        };
        stream.begin_generation(tail.generation);
        database.taken.insert(stream_id);
        drop(database);
        tail.is_new = false;
        tail.carry = Carry::Search;
        tail.named = Some(Named { stream_id, first_line, stream });
        self.save(inode);
    }

    fn save(&mut self, inode: u64) {
        let Some(named) = self.tails.get(&inode).and_then(|tail| tail.named.as_ref()) else { return };
        let checkpoint = Checkpoint {
            first_line: named.first_line.clone(),
            stream: named.stream_id,
            base: named.stream.base(),
            committed: named.stream.committed(),
            history: named.stream.history().collect(),
        };
        self.trade.judge.base(named.stream_id, named.stream.base().offset);
        locked(&self.server.database).files.insert(inode, checkpoint);
    }

    fn show(&self) {
        let mut shipped = locked(&self.server.shipped);
        for (inode, tail) in &self.tails {
            let shown = match &tail.named {
                None => Shipped::default(),
                Some(Named { stream_id, stream, .. }) => {
                    let known = stream.history().chain([stream.committed(), stream.base()]);
                    let facts = tail.file.facts();
                    let size = facts.size;
                    let read = matches!(stream.want(), Want::Read(_)) && stream.queue().is_empty();
                    let here = check(&*tail.file, &[stream.committed()]).expect("memory can be read");
                    Shipped {
                        stream: Some(*stream_id),
                        committed: stream.committed().offset,
                        known: known.map(|position| position.offset).collect(),
                        all_of: (read && stream.committed().offset == size && !here.is_empty())
                            .then_some((size, facts.changes)),
                        state: format!("{} {}/{size}", stream.state(), stream.committed().offset),
                    }
                }
            };
            shipped.insert(*inode, shown);
        }
    }

    fn note(&mut self, inode: u64, notes: &[Note]) {
        let (at, random) = (now(), self.trade.chance.bits());
        let (judge, name) = (self.trade.judge.clone(), Arc::clone(&self.gate.name));
        let tail = self.tail(inode);
        for note in notes {
            match note {
                Note::Committed(_) => {}
                Note::Wait(_) => tail.not_before = Some(at + tail.backoff.fail(random, None)),
                Note::Back(_) | Note::Ahead(_) => tail.carry = Carry::Search,
                Note::Alarm { expected, committed } => {
                    judge.broken(format!("{name} is asked for {expected}, and {committed} was committed"));
                }
                Note::Diverged => judge.diverged(&name),
                Note::Lost(bytes) => judge.changed(&format!("{name} lost {bytes} bytes")),
                Note::Refused(reason) => judge.broken(format!("a stream of {name} is refused: {reason}")),
            }
        }
        if notes.iter().any(|note| matches!(note, Note::Committed(_))) {
            self.save(inode);
        }
    }

    fn choose(&mut self) -> Option<(usize, Endpoint)> {
        match self.pool.choose(now(), true) {
            Choice::Send { server, .. } => Some((server, self.trade.endpoints[server].clone())),
            Choice::WaitUntil(_) => None,
        }
    }

    fn send(&mut self) {
        let at = now();
        let ready = |tail: &Tail| {
            let rested = tail.not_before.is_none_or(|not_before| at >= not_before);
            rested && !tail.asked && tail.named.as_ref().is_some_and(|named| named.stream.sendable().next().is_some())
        };
        if self.requests.len() - usize::from(self.reporting) >= MAX_REQUESTS || !self.tails.values().any(ready) {
            return;
        }
        let Some((server, to)) = self.choose() else { return };
        let (mut parts, mut pieces) = (Parts::new(), Vec::new());
        for (inode, tail) in &mut self.tails {
            if !ready(tail) {
                continue;
            }
            let Some(named) = &mut tail.named else { continue };
            let committed = named.stream.committed();
            let mut ends = Vec::new();
            for piece in named.stream.sendable() {
                let Some(batch) = &piece.batch else { break };
                let mut header = batch.header.clone();
                header.committed = committed;
                pieces.push(Batch { header, body: batch.body.clone() }.encode_head());
                pieces.push(batch.body.clone());
                ends.push(piece.end);
            }
            named.stream.sent(ends.len());
            parts.push((*inode, named.stream_id, named.stream.generation(), ends));
        }
        self.post(server, Letter::batches(&to, &pieces), Asked::Batches(parts));
    }

    fn ask(&mut self) {
        let at = now();
        if self.question {
            return;
        }
        let due = |tail: &Tail| {
            let rested = tail.not_before.is_none_or(|not_before| at >= not_before) && at >= tail.ask_at;
            rested
                && tail.named.as_ref().is_some_and(|Named { stream, .. }| {
                    let waits = stream.is_waiting_for_commit() && stream.sendable().next().is_none();
                    (stream.is_asking() || waits) && !stream.is_in_flight()
                })
        };
        if !self.tails.values().any(due) {
            return;
        }
        let Some((server, to)) = self.choose() else { return };
        let mut query = PositionsQuery { streams: Vec::new() };
        let mut streams = Vec::new();
        for (inode, tail) in &mut self.tails {
            if !due(tail) {
                continue;
            }
            let Some(named) = &tail.named else { continue };
            query.streams.push(StreamQuery {
                lane: self.server.agent.lane(self.trade.lanes),
                agent: self.server.agent.clone(),
                category: self.options.sources[0].category.clone(),
                stream: named.stream_id,
                committed: (!named.stream.is_asking()).then(|| named.stream.committed()),
            });
            tail.asked = true;
            streams.push((*inode, named.stream_id));
        }
        self.question = true;
        self.post(server, Letter::positions(&to, &query), Asked::Positions(streams));
    }

    fn post(&mut self, server: usize, letter: Letter, asked: Asked) {
        let (network, gate) = (self.trade.network.clone(), self.gate.clone());
        self.requests.spawn(async move {
            let outcome: Result<Answers, ShipError> = carry(&network, &gate, letter).await;
            let (answers, error) = (outcome.as_ref().ok().map(|said| said.answers.clone()), outcome.err());
            Request { server, error, heard: Heard::Answers(asked, answers) }
        });
    }

    /// Says how far all is read that was there, as the program does.
    fn report(&mut self) {
        let at = now();
        let now_ms = (self.trade.clock_ms)();
        let file = |inode: u64| FileKey { device: 1, inode };
        let targets = self.tails.iter().map(|(inode, tail)| {
            (TailId(*inode), Target { file: file(*inode), source: 0, size: tail.file.facts().size })
        });
        self.watermark.scanned(now_ms, at, targets.collect());
        let tails = &self.tails;
        let size = |id: TailId, target: &Target| {
            tails.get(&id.0).map_or(target.size, |tail| target.size.min(tail.file.facts().size))
        };
        let reach = |id: TailId, target: &Target, _| match tails.get(&id.0).map(|tail| &tail.named) {
            _ if size(id, target) == 0 => Reach::Read,
            Some(Some(named)) if named.stream.is_following() && named.stream.promised().offset >= size(id, target) => {
                Reach::Read
            }
            _ => Reach::Behind("it is being read".to_owned()),
        };
        let read = || {
            let named = tails.values().filter_map(|tail| tail.named.as_ref());
            named.map(|named| (named.stream_id, named.stream.promised().offset)).collect()
        };
        self.watermark.look(CLOSE_DELAY_MS, reach, read);
        if self.reporting || at < self.report_at {
            return;
        }
        let Some((server, to)) = self.choose() else { return };
        let next = self.reporter.number() + 1;
        if self.server.wants_to_leave() && self.server.is_done() {
            self.parting.get_or_insert(next);
            self.server.says_goodbye(now_ms);
        } else if self.parting.take().is_some() {
            // More has come: it stays after all.
            self.stays_from = next;
        }
        let committed: BTreeMap<StreamId, u64> = (self.tails.values().filter_map(|tail| tail.named.as_ref()))
            .map(|named| (named.stream_id, named.stream.committed().offset))
            .collect();
        let reached = self.watermark.reached().map(|(watermark_ms, streams)| {
            let named = streams.iter().map(|(&stream, &offset)| StreamOffset { stream, offset });
            let open = |one: &StreamOffset| committed.get(&one.stream).copied().unwrap_or(0) < one.offset;
            (watermark_ms, named.filter(open).collect())
        });
        // All of it is committed.
        let claim = if self.parting.is_some() { Some((now_ms, Vec::new())) } else { reached };
        let may_reach = |named: &Named, tail: &Tail, offset| named.stream.may_reach(offset, tail.file.facts().size);
        let has = |one: &StreamOffset| {
            let mut named = self.tails.values().filter_map(|tail| Some((tail.named.as_ref()?, tail)));
            named.any(|(named, tail)| named.stream_id == one.stream && may_reach(named, tail, one.offset))
        };
        let waiting_for = self.reporter.waiting_for();
        // Nobody looks for longer than a run that ends.
        let lost = if self.parting.is_some() {
            waiting_for.iter().filter(|one| !has(one)).map(|one| one.stream).collect()
        } else {
            self.vanished.look(at, LOST_AFTER, &self.reporter, has)
        };
        let facts = Facts { claim, lost, last: self.parting.is_some(), held_by: self.watermark.held_by().to_owned() };
        let (agent, category) = (self.server.agent.clone(), self.options.sources[0].category.clone());
        let (lane, host) = (agent.lane(self.trade.lanes), agent.to_string());
        let empty = Report::new(lane, agent, category, host, self.reporter.run());
        let letter = Letter::reports(&to, &Reports::new(vec![self.reporter.report(facts, empty)]));
        self.reporting = true;
        let (network, gate) = (self.trade.network.clone(), self.gate.clone());
        self.requests.spawn(async move {
            let outcome: Result<ReportAnswers, ShipError> = carry(&network, &gate, letter).await;
            let (answers, error) = (outcome.as_ref().ok().map(|said| said.answers.clone()), outcome.err());
            Request { server, error, heard: Heard::Reports(answers) }
        });
    }

    fn heard(&mut self, Request { server, error, heard }: Request) {
        self.heard_of(server, error.as_ref());
        let (asked, answers) = match heard {
            Heard::Answers(asked, answers) => (asked, answers),
            Heard::Reports(answers) => {
                self.reporting = false;
                self.report_at = now() + REPORT_INTERVAL;
                for answer in answers.into_iter().flatten() {
                    self.reporter.told(answer);
                }
                if self.parting.is_some_and(|number| self.reporter.is_heard(number)) {
                    self.server.leaves();
                    self.gate.kill();
                } else if self.parting.is_none() && self.reporter.is_known() && self.reporter.is_heard(self.stays_from)
                {
                    self.server.is_known_from((self.trade.clock_ms)());
                }
                return;
            }
        };
        match asked {
            Asked::Batches(parts) => {
                let wanted: usize = parts.iter().map(|part| part.3.len()).sum();
                let mut answers = answers.filter(|answers| answers.len() == wanted).map(Vec::into_iter);
                for (inode, stream_id, generation, ends) in parts {
                    let mine = answers.as_mut().map(|answers| answers.by_ref().take(ends.len()).collect::<Vec<_>>());
                    self.answered(inode, stream_id, generation, &ends, mine);
                }
            }
            Asked::Positions(streams) => {
                self.question = false;
                let mut answers = answers.unwrap_or_default().into_iter();
                for (inode, stream_id) in streams {
                    let answer = answers.next();
                    let tail = self.tail(inode);
                    let Some(named) = tail.named.as_mut().filter(|named| named.stream_id == stream_id) else {
                        continue;
                    };
                    tail.asked = false;
                    tail.ask_at = now() + ASK_INTERVAL;
                    if let Some(answer) = answer.filter(|answer| answer.stream == stream_id) {
                        if answer.verdict == Verdict::Ok {
                            tail.backoff.reset();
                        }
                        let notes = named.stream.told(&answer);
                        self.note(inode, &notes);
                    }
                }
            }
        }
    }

    fn answered(
        &mut self,
        inode: u64,
        stream_id: StreamId,
        generation: u64,
        ends: &[Position],
        answers: Option<Vec<Answer>>,
    ) {
        let tail = self.tail(inode);
        let Some(named) = tail.named.as_mut().filter(|named| named.stream_id == stream_id) else { return };
        let Some(answers) = answers else { return named.stream.not_answered(generation) };
        let mut notes = Vec::new();
        for (end, answer) in ends.iter().zip(answers) {
            assert_eq!(answer.stream, stream_id, "an answer is about its batch");
            if answer.verdict == Verdict::Ok {
                tail.backoff.reset();
            }
            notes.extend(named.stream.answered(generation, *end, &answer));
        }
        tail.ask_at = now() + ASK_INTERVAL;
        self.note(inode, &notes);
    }

    fn heard_of(&mut self, server: usize, error: Option<&ShipError>) {
        let (at, random) = (now(), self.trade.chance.bits());
        match error {
            None => self.pool.works(server),
            Some(ShipError::Refused { reason, .. }) => {
                self.trade.judge.broken(format!("a request of {} is refused: {reason}", self.gate.name));
            }
            Some(ShipError::Broken { .. }) => self.pool.fails(at, server, Trouble::Broken, random),
            Some(ShipError::Busy { after, sibling: true, .. }) => self.pool.declined(at, server, *after, random),
            Some(ShipError::Busy { after, .. }) => self.pool.fails(at, server, Trouble::Busy(*after), random),
            Some(ShipError::Moved { to, .. }) => match self.trade.endpoints.iter().position(|one| one == to) {
                Some(index) => self.pool.redirected(at, server, index, random),
                None => self.pool.fails(at, server, Trouble::Broken, random),
            },
        }
    }
}
