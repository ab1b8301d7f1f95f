//! What to send up, when, and what the answers mean: the forwarder without sockets and without a clock.
//!
//! Per stream there is at most one request under way, so its batches arrive in order and its answers too. A request holds
//! batches of many streams. What the parent says it expects next is where sending goes on, forward or back; what it says
//! to be committed leaves the spool.
//!
//! A stream whose answers bring no progress rests a while, longer each time; the others go on.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use tributary_common::http::backoff::BackoffLimits;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::http::pool::{Choice, EndpointPool, PoolOptions, Trouble};
use tributary_common::ids::{LaneId, StreamId};
use tributary_common::limits::{MAX_BATCHES_PER_REQUEST, MAX_STREAMS_PER_QUERY};
use tributary_common::messages::{Answer, Owner, Verdict};
use tributary_common::position::Position;

use crate::spool::Spool;
use crate::spool::run::{Place, Run};

/// Where the forwarder finds the runs.
pub trait Runs {
    /// The run of a stream, if there is one.
    fn run(&self, stream: StreamId) -> Option<&Run>;
}

impl Runs for Spool {
    fn run(&self, stream: StreamId) -> Option<&Run> {
        self.stream(stream).map(|stream| &stream.run)
    }
}

/// A request with batches of so many streams is not small, whatever its size.
const MANY_STREAMS: usize = 32;

/// Bounds of forwarding.
#[derive(Debug, Clone, Copy)]
pub struct ForwardLimits {
    /// A request is not made larger than this, unless one batch alone is.
    pub request_bytes: u64,
    /// Most requests with batches under way at a time, per route.
    pub requests_in_flight: usize,
    /// Most of them over all routes: their bodies are in memory.
    pub total_in_flight: usize,
    /// A request with less than this, and of few streams, waits for more while another one is under way by its route: each request
    /// costs both sides.
    pub small_request_bytes: u64,
    /// It waits no longer than this, however long the other one takes.
    pub company_wait: Duration,
    /// How often the parent is asked about streams that wait for `committed`.
    pub poll_interval: Duration,
    /// The first rest of a stream that makes no progress; it doubles up to `max_rest`.
    pub rest: Duration,
    /// The longest rest.
    pub max_rest: Duration,
    /// Pauses of a route after failures, return to its preferred node, age of its connections.
    pub pool: PoolOptions,
}

impl Default for ForwardLimits {
    fn default() -> Self {
        Self {
            request_bytes: 8 << 20,
            requests_in_flight: 4,
            total_in_flight: 8,
            small_request_bytes: 1 << 20,
            company_wait: Duration::from_millis(20),
            poll_interval: Duration::from_millis(600),
            rest: Duration::from_millis(100),
            max_rest: Duration::from_secs(10),
            pool: PoolOptions::new(
                BackoffLimits { initial: Duration::from_millis(250), max: Duration::from_secs(30) },
                Duration::from_secs(600),
            ),
        }
    }
}

/// Names a request that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// Some consecutive batches of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The stream.
    pub stream: StreamId,
    /// How far it is known to be committed, which every batch says on its way up.
    pub committed: Position,
    /// Where the batches lie in the spool, in order.
    pub places: Vec<Place>,
}

/// What is to be asked of the parent tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// Offer these batches.
    Batches(Vec<Part>),
    /// Ask for the positions of these streams, with what is known of them to be committed.
    Positions(Vec<(StreamId, Position)>),
}

/// One request to be made. It ends with exactly one call of [`Forwarder::answered`], [`Forwarder::failed`] or
/// [`Forwarder::withdrawn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Its name.
    pub id: RequestId,
    /// By which route: an index into the routes.
    pub route: usize,
    /// To which node of the route, in order of preference.
    pub node: usize,
    /// Over a new connection.
    pub reconnect: bool,
    /// What it asks.
    pub ask: Ask,
}

/// Why a request brought no answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The way up is in trouble.
    Trouble(Trouble),
    /// The node says which one owns the lane.
    Moved(Endpoint),
    /// The node is being emptied, and any other one is better; when to come again if there is none.
    Declined(Option<Duration>),
    /// A 4xx that is final for exactly this request.
    Rejected {
        /// What the parent said.
        error: String,
    },
}

/// What follows from an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// The stream is committed so far.
    Committed {
        /// The stream.
        stream: StreamId,
        /// How far.
        committed: Position,
        /// Who said so, if anybody.
        owner: Option<Owner>,
    },
    /// The parent will never take more of this stream.
    Ended {
        /// The stream.
        stream: StreamId,
        /// Its last word.
        verdict: Verdict,
    },
    /// The parent expects bytes that are known to be committed: it has lost what it had promised to keep.
    Alarm {
        /// The stream.
        stream: StreamId,
        /// What the parent expects.
        expected: u64,
        /// What is known to be committed.
        committed: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing to send.
    Idle,
    /// In its route's queue.
    Queued,
    /// In a request.
    UnderWay,
    /// Not before then.
    Resting(Instant),
}

#[derive(Debug)]
struct Flow {
    route: usize,
    /// What the parent is thought to have: sending goes on here.
    at: u64,
    state: State,
    /// Answers in a row that brought no progress.
    stalls: u32,
    /// How often something was sent: an answer to a question that was asked before is out of date.
    sends: u64,
    /// A request with this stream was rejected: its batches go one by one, to find the bad one.
    alone: bool,
}

struct Route {
    nodes: Vec<Endpoint>,
    pool: EndpointPool,
    /// Until when the pool pauses, as it said last.
    paused: Option<Instant>,
    queue: VecDeque<StreamId>,
    /// Until when the next request waits for more to go with it.
    company_until: Option<Instant>,
    under_way: usize,
    polling: bool,
    next_poll: Option<Instant>,
}

struct Pending {
    route: usize,
    node: usize,
    ask: Ask,
    /// For questions: what `Flow::sends` was.
    sends: Vec<u64>,
}

/// The forwarder of one node.
pub struct Forwarder {
    limits: ForwardLimits,
    flows: BTreeMap<StreamId, Flow>,
    routes: Vec<Route>,
    resting: BTreeSet<(Instant, StreamId)>,
    pending: HashMap<RequestId, Pending>,
    next_id: u64,
}

impl Route {
    /// The node to send to now, and whether over a new connection; none while the pool pauses.
    fn choose(&mut self, now: Instant) -> Option<(usize, bool)> {
        match self.pool.choose(now, self.under_way == 0) {
            Choice::Send { server, reconnect } => {
                self.paused = None;
                Some((server, reconnect))
            }
            Choice::WaitUntil(until) => {
                self.paused = Some(until);
                None
            }
        }
    }
}

impl Route {
    /// What a request without answers says about the node that it went to.
    fn went_wrong(&mut self, now: Instant, node: usize, failure: &Failure, random: u64) {
        match failure {
            Failure::Trouble(trouble) => self.pool.fails(now, node, *trouble, random),
            Failure::Declined(asked) => self.pool.declined(now, node, *asked, random),
            Failure::Moved(to) => match self.nodes.iter().position(|known| known == to) {
                Some(to) => self.pool.redirected(now, node, to, random),
                // Its topology is another one than ours: nobody is believed about nodes that are not in ours.
                None => self.pool.fails(now, node, Trouble::Broken, random),
            },
            Failure::Rejected { .. } => self.pool.works(node),
        }
    }
}

impl Forwarder {
    /// A forwarder over routes with their nodes in order of preference. Lane n goes by route n modulo their number: one route for all
    /// lanes, or one for each.
    #[must_use]
    pub fn new(limits: ForwardLimits, routes: &[Vec<Endpoint>]) -> Self {
        let routes = routes.iter().map(|nodes| Route {
            nodes: nodes.clone(),
            pool: EndpointPool::new(nodes.len(), limits.pool),
            paused: None,
            queue: VecDeque::new(),
            company_until: None,
            under_way: 0,
            polling: false,
            next_poll: None,
        });
        Self {
            limits,
            flows: BTreeMap::new(),
            routes: routes.collect(),
            resting: BTreeSet::new(),
            pending: HashMap::new(),
            next_id: 0,
        }
    }

    /// A stream has, or may have, something new to send, or to be asked about: the parent may have all of it already.
    pub fn notice(&mut self, now: Instant, stream: StreamId, lane: LaneId, runs: &impl Runs) {
        let Some(run) = runs.run(stream) else { return };
        let route = self.route_of(lane);
        let flow = self.flows.entry(stream).or_insert_with(|| Flow {
            route,
            at: run.committed().offset,
            state: State::Idle,
            stalls: 0,
            sends: 0,
            alone: false,
        });
        if !run.is_empty() {
            self.routes[flow.route].next_poll.get_or_insert(now + self.limits.poll_interval);
        }
        if flow.state == State::Idle && run.safe_from(flow.at).next().is_some() {
            flow.state = State::Queued;
            self.routes[flow.route].queue.push_back(stream);
        }
    }

    /// The route of a lane.
    #[must_use]
    pub fn route_of(&self, lane: LaneId) -> usize {
        usize::from(lane.0) % self.routes.len()
    }

    /// The node to ask by a route outside of the forwarder's own requests, and whether over a new connection.
    pub fn node(&mut self, route: usize, now: Instant) -> Option<(usize, bool)> {
        self.routes[route].choose(now)
    }

    /// Each route's current node and how many requests in a row have failed on it.
    pub fn health(&self) -> impl Iterator<Item = (usize, u32)> {
        self.routes.iter().map(|route| (route.pool.current(), route.pool.failures()))
    }

    /// How many requests with batches are under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.routes.iter().map(|way| way.under_way).sum()
    }

    /// Forgets a stream whose run has ended or is empty and forgotten.
    pub fn forget(&mut self, stream: StreamId) {
        if let Some(Flow { state: State::Resting(until), .. }) = self.flows.remove(&stream) {
            self.resting.remove(&(until, stream));
        }
    }

    /// Forgets the streams that have no run any more.
    pub fn retain(&mut self, runs: &impl Runs) {
        let gone: Vec<StreamId> = self.flows.keys().copied().filter(|id| runs.run(*id).is_none()).collect();
        gone.into_iter().for_each(|id| self.forget(id));
    }

    /// The next request to be made now, if any. Call until there is none.
    pub fn next_request(&mut self, now: Instant, runs: &impl Runs) -> Option<Outgoing> {
        self.wake(now, runs);
        (0..self.routes.len())
            .find_map(|route| self.next_send(route, now, runs).or_else(|| self.next_poll(route, now, runs)))
    }

    /// When [`Forwarder::next_request`] may have something without anything else having happened.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let room = self.under_way() < self.limits.total_in_flight;
        let routes = self.routes.iter().flat_map(|way| {
            // Where as many requests are under way as may be, it is the end of one that matters, not the end of a pause.
            let room = room && way.under_way < self.limits.requests_in_flight;
            let queued = way.paused.max(way.company_until).filter(|_| room && !way.queue.is_empty());
            let poll = way.next_poll.filter(|_| !way.polling).map(|at| at.max(way.paused.unwrap_or(at)));
            queued.into_iter().chain(poll)
        });
        routes.chain(self.resting.first().map(|(until, _)| *until)).min()
    }

    fn wake(&mut self, now: Instant, runs: &impl Runs) {
        while let Some(&(until, stream)) = self.resting.first() {
            if until > now {
                break;
            }
            self.resting.pop_first();
            if let Some(flow) = self.flows.get_mut(&stream) {
                flow.state = State::Idle;
            }
            self.queue_if_work(stream, runs);
        }
    }

    fn queue_if_work(&mut self, stream: StreamId, runs: &impl Runs) {
        let (Some(flow), Some(run)) = (self.flows.get_mut(&stream), runs.run(stream)) else { return };
        if flow.state == State::Idle && run.safe_from(flow.at).next().is_some() {
            flow.state = State::Queued;
            self.routes[flow.route].queue.push_back(stream);
        }
    }

    /// Whether what is queued would be no more than a small request.
    fn is_small(&self, way: &Route, runs: &impl Runs) -> bool {
        if way.queue.len() >= MANY_STREAMS {
            return false;
        }
        let mut bytes = 0;
        for stream in &way.queue {
            let (Some(flow), Some(run)) = (self.flows.get(stream), runs.run(*stream)) else { continue };
            for entry in run.safe_from(flow.at) {
                bytes += u64::from(entry.place.len);
                if bytes >= self.limits.small_request_bytes {
                    return false;
                }
            }
        }
        true
    }

    fn next_send(&mut self, route: usize, now: Instant, runs: &impl Runs) -> Option<Outgoing> {
        let total = self.under_way();
        let way = &self.routes[route];
        if way.queue.is_empty()
            || total >= self.limits.total_in_flight
            || way.under_way >= self.limits.requests_in_flight
        {
            return None;
        }
        let waits = way.under_way > 0 && self.is_small(way, runs);
        let way = &mut self.routes[route];
        if waits && now < *way.company_until.get_or_insert(now + self.limits.company_wait) {
            return None;
        }
        way.company_until = None;
        let node = way.choose(now)?;
        // A busy stream leaves room for the others that wait.
        let share = self.limits.request_bytes / way.queue.len().clamp(1, 4) as u64;
        let mut parts = Vec::new();
        let (mut bytes, mut batches) = (0, 0);
        while bytes < self.limits.request_bytes && batches < MAX_BATCHES_PER_REQUEST {
            let Some(&stream) = way.queue.front() else { break };
            let Some(flow) = self.flows.get_mut(&stream).filter(|flow| flow.state == State::Queued) else {
                // It was forgotten, and perhaps came back, since it was queued.
                way.queue.pop_front();
                continue;
            };
            if flow.alone && !parts.is_empty() {
                break;
            }
            way.queue.pop_front();
            let Some(run) = runs.run(stream) else {
                self.flows.remove(&stream);
                continue;
            };
            let mut part = Part { stream, committed: run.committed(), places: Vec::new() };
            let mut part_bytes = 0;
            for entry in run.safe_from(flow.at) {
                let len = u64::from(entry.place.len);
                let fits = bytes + len <= self.limits.request_bytes && (part_bytes == 0 || part_bytes + len <= share);
                let first = bytes == 0;
                if batches == MAX_BATCHES_PER_REQUEST || !(fits || first) || (flow.alone && !first) {
                    break;
                }
                part.places.push(entry.place);
                part_bytes += len;
                bytes += len;
                batches += 1;
            }
            if part.places.is_empty() {
                if run.safe_from(flow.at).next().is_none() {
                    flow.state = State::Idle;
                    continue;
                }
                // There is no room left for its next batch: it is the first of the next request.
                way.queue.push_front(stream);
                break;
            }
            flow.state = State::UnderWay;
            flow.sends += 1;
            let alone = flow.alone;
            parts.push(part);
            if alone {
                break;
            }
        }
        if parts.is_empty() {
            return None;
        }
        way.under_way += 1;
        way.next_poll.get_or_insert(now + self.limits.poll_interval);
        Some(self.ask(route, node, Ask::Batches(parts), Vec::new()))
    }

    fn next_poll(&mut self, route: usize, now: Instant, runs: &impl Runs) -> Option<Outgoing> {
        let way = &mut self.routes[route];
        if way.polling || way.next_poll.is_none_or(|at| now < at) {
            return None;
        }
        let node = way.choose(now)?;
        let (mut streams, mut sends, mut any) = (Vec::new(), Vec::new(), false);
        for (id, flow) in self.flows.iter().filter(|(_, flow)| flow.route == route) {
            let Some(run) = runs.run(*id).filter(|run| !run.is_empty()) else { continue };
            any = true;
            if matches!(flow.state, State::Idle | State::Resting(_)) && streams.len() < MAX_STREAMS_PER_QUERY {
                streams.push((*id, run.committed()));
                sends.push(flow.sends);
            }
        }
        way.next_poll = any.then(|| now + self.limits.poll_interval);
        if streams.is_empty() {
            return None;
        }
        way.polling = true;
        Some(self.ask(route, node, Ask::Positions(streams), sends))
    }

    fn ask(&mut self, route: usize, (node, reconnect): (usize, bool), ask: Ask, sends: Vec<u64>) -> Outgoing {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.pending.insert(id, Pending { route, node, ask: ask.clone(), sends });
        Outgoing { id, route, node, reconnect, ask }
    }

    fn finish(&mut self, id: RequestId) -> Option<Pending> {
        let pending = self.pending.remove(&id)?;
        let way = &mut self.routes[pending.route];
        way.paused = None;
        match pending.ask {
            Ask::Batches(_) => way.under_way -= 1,
            Ask::Positions(_) => way.polling = false,
        }
        Some(pending)
    }

    /// The parent answered. `random` is any 64 random bits.
    ///
    /// The caller applies the effects before it calls anything else of this forwarder.
    pub fn answered(
        &mut self,
        now: Instant,
        id: RequestId,
        answers: &[Answer],
        runs: &impl Runs,
        random: u64,
    ) -> Vec<Effect> {
        let fits = self.pending.get(&id).is_some_and(|pending| match &pending.ask {
            Ask::Batches(parts) => {
                let asked = parts.iter().flat_map(|part| part.places.iter().map(|_| part.stream));
                asked.eq(answers.iter().map(|answer| answer.stream))
            }
            Ask::Positions(streams) => {
                streams.iter().map(|(stream, _)| *stream).eq(answers.iter().map(|answer| answer.stream))
            }
        });
        if !fits {
            return self.failed(now, id, &Failure::Trouble(Trouble::Broken), runs, random);
        }
        let Some(pending) = self.finish(id) else { return Vec::new() };
        self.routes[pending.route].pool.works(pending.node);
        let mut effects = Vec::new();
        match pending.ask {
            Ask::Batches(parts) => {
                let mut rest = answers;
                for part in parts {
                    let (own, others) = rest.split_at(part.places.len());
                    rest = others;
                    self.part_answered(now, &part, own, runs, &mut effects);
                }
            }
            Ask::Positions(streams) => {
                for ((asked, sends), answer) in streams.into_iter().zip(pending.sends).zip(answers) {
                    self.position_answered(asked, sends, answer, runs, &mut effects);
                }
            }
        }
        effects
    }

    fn part_answered(
        &mut self,
        now: Instant,
        part: &Part,
        answers: &[Answer],
        runs: &impl Runs,
        effects: &mut Vec<Effect>,
    ) {
        let stream = part.stream;
        let committed = self.note_committed(stream, answers, runs, effects);
        let Some(flow) = self.flows.get_mut(&stream) else { return };
        flow.state = State::Idle;
        flow.alone &= answers.iter().any(|answer| answer.verdict != Verdict::Ok);
        let before = flow.at.max(part.committed.offset);
        // Once one batch was not taken, what is said of those behind it says nothing new.
        let Some(decisive) = answers.iter().find(|answer| answer.verdict != Verdict::Ok).or(answers.last()) else {
            return;
        };
        let waits = match &decisive.verdict {
            Verdict::Ok | Verdict::Expected => false,
            Verdict::Wait { .. } => true,
            Verdict::Diverged { .. } | Verdict::Unknown | Verdict::Refused { .. } => {
                effects.push(Effect::Ended { stream, verdict: decisive.verdict.clone() });
                return;
            }
        };
        let next = answers.iter().rev().find_map(|answer| answer.next.filter(|_| answer.verdict == Verdict::Ok));
        let next = decisive.next.or(next).map_or(flow.at, |next| next.offset);
        // The parent knew what this request said to be committed; what was committed since, it may not know.
        let alarm = next < part.committed.offset;
        if alarm {
            effects.push(Effect::Alarm { stream, expected: next, committed: part.committed.offset });
        } else {
            flow.at = next.max(committed);
        }
        if next > before {
            flow.stalls = 0;
        } else {
            flow.stalls += 1;
        }
        // Being sent back once is ordinary: the parent was changed, or has lost its spool.
        if waits || alarm || flow.stalls > 1 {
            let rest = self.limits.rest.saturating_mul(1 << flow.stalls.min(16)).min(self.limits.max_rest);
            flow.state = State::Resting(now + rest);
            self.resting.insert((now + rest, stream));
        }
        self.queue_if_work(stream, runs);
    }

    fn position_answered(
        &mut self,
        (stream, told): (StreamId, Position),
        sends: u64,
        answer: &Answer,
        runs: &impl Runs,
        effects: &mut Vec<Effect>,
    ) {
        let committed = self.note_committed(stream, std::slice::from_ref(answer), runs, effects);
        let Some(flow) = self.flows.get_mut(&stream).filter(|flow| flow.sends == sends) else { return };
        match (&answer.verdict, answer.next) {
            (Verdict::Ok | Verdict::Expected, Some(next)) if next.offset >= told.offset => {
                flow.at = next.offset.max(committed);
            }
            (Verdict::Ok | Verdict::Expected, Some(next)) => {
                effects.push(Effect::Alarm { stream, expected: next.offset, committed: told.offset });
            }
            // What it means for the bytes that are held is decided by offering them.
            (Verdict::Unknown | Verdict::Diverged { .. } | Verdict::Refused { .. }, _) => flow.at = committed,
            (Verdict::Ok | Verdict::Expected, None) | (Verdict::Wait { .. }, _) => {}
        }
        self.queue_if_work(stream, runs);
    }

    /// Passes on the highest `committed` among the answers. Returns how far the stream is known to be committed then.
    fn note_committed(&self, stream: StreamId, answers: &[Answer], runs: &impl Runs, effects: &mut Vec<Effect>) -> u64 {
        let known = runs.run(stream).map_or(0, |run| run.committed().offset);
        let told =
            answers.iter().filter_map(|answer| Some((answer.committed?, answer.owner))).max_by_key(|(at, _)| at.offset);
        match told {
            Some((committed, owner)) if committed.offset > known => {
                effects.push(Effect::Committed { stream, committed, owner });
                committed.offset
            }
            _ => known,
        }
    }

    /// A request brought no answers. `random` is any 64 random bits.
    pub fn failed(
        &mut self,
        now: Instant,
        id: RequestId,
        failure: &Failure,
        runs: &impl Runs,
        random: u64,
    ) -> Vec<Effect> {
        let Some(pending) = self.finish(id) else { return Vec::new() };
        let mut effects = Vec::new();
        match failure {
            Failure::Trouble(_) | Failure::Moved(_) | Failure::Declined(_) => {
                self.routes[pending.route].went_wrong(now, pending.node, failure, random);
                self.requeue(pending.ask, runs);
            }
            Failure::Rejected { error } => {
                self.routes[pending.route].went_wrong(now, pending.node, failure, random);
                match pending.ask {
                    Ask::Batches(parts) => match parts.as_slice() {
                        [Part { stream, places, .. }] if places.len() == 1 => effects.push(Effect::Ended {
                            stream: *stream,
                            verdict: Verdict::Refused { reason: error.clone() },
                        }),
                        _ => {
                            for part in &parts {
                                if let Some(flow) = self.flows.get_mut(&part.stream) {
                                    flow.alone = true;
                                }
                            }
                            self.requeue(Ask::Batches(parts), runs);
                        }
                    },
                    Ask::Positions(_) => {}
                }
            }
        }
        effects
    }

    /// A question that was asked beside the requests went to `node` of `route`, and came to this.
    pub fn asked(&mut self, now: Instant, route: usize, node: usize, failure: Option<&Failure>, random: u64) {
        let way = &mut self.routes[route];
        match failure {
            Some(failure) => way.went_wrong(now, node, failure, random),
            None => way.pool.works(node),
        }
    }

    /// A request was not made after all, for a reason that lies here.
    pub fn withdrawn(&mut self, id: RequestId, runs: &impl Runs) {
        if let Some(pending) = self.finish(id) {
            self.requeue(pending.ask, runs);
        }
    }

    fn requeue(&mut self, ask: Ask, runs: &impl Runs) {
        let Ask::Batches(parts) = ask else { return };
        for part in parts {
            if let Some(flow) = self.flows.get_mut(&part.stream) {
                flow.state = State::Idle;
            }
            self.queue_if_work(part.stream, runs);
        }
    }
}

#[cfg(test)]
mod tests;
