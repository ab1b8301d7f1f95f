//! Requests: batches, positions, categories.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tributary_common::batch::Batch;
use tributary_common::http::client::{ClientOptions, build};
use tributary_common::http::pool::{Choice, Trouble};
use tributary_common::limits::{MAX_BATCHES_PER_REQUEST, MAX_STREAMS_PER_QUERY};
use tributary_common::messages::{Answer, Answers, Categories, PositionsQuery, StreamQuery, Verdict};
use tributary_common::position::Position;

use super::{
    ASK_INTERVAL, CATEGORIES_INTERVAL, Engine, Event, MAX_REQUESTS, MISSING_CATEGORIES_INTERVAL, Packed, Question,
    REQUEST_BYTES, Request, RunError, random,
};
use crate::ship::{Sender, ShipError};
use crate::stream::Piece;
use crate::worker::TailId;

/// Sent one at a time, in a request of its own.
const ALONE: u8 = 1;
const ONE_BATCH: u8 = 2;

impl Engine {
    /// The endpoint to send to now, if it is not the time of a pause.
    pub(super) fn link(&mut self, now: Instant) -> Result<Option<(usize, Sender)>, RunError> {
        match self.pool.choose(now, self.may_move) {
            Choice::WaitUntil(until) => {
                self.pool_paused_until = Some(until);
                Ok(None)
            }
            Choice::Send { server, reconnect } => {
                self.pool_paused_until = None;
                let link = match &self.link {
                    Some(link) if !reconnect => link.clone(),
                    _ => {
                        let options = ClientOptions {
                            connect_timeout: self.config.connect_timeout,
                            request_timeout: self.config.request_timeout,
                            max_idle_connections: MAX_REQUESTS + 1,
                        };
                        let endpoint = self.config.endpoints[server].clone();
                        tracing::info!(%endpoint, "a new connection is made");
                        self.link.insert(Sender { client: build(&options)?, endpoint }).clone()
                    }
                };
                Ok(Some((server, link)))
            }
        }
    }

    pub(super) fn heard_of(&mut self, server: usize, error: Option<&ShipError>, now: Instant) {
        match error {
            None => {
                self.pool.works(server);
                self.trouble = None;
            }
            Some(error) => {
                self.metrics.request_error(error.kind());
                if self.trouble.is_none() {
                    tracing::warn!(%error, "a request brought no answer: it is tried again");
                }
                self.trouble = Some(error.to_string());
                match error {
                    ShipError::Refused { .. } => self.pool.works(server),
                    ShipError::Broken { .. } => self.pool.fails(now, server, Trouble::Broken, random()),
                    ShipError::Busy { after, sibling: true, .. } => {
                        self.pool.declined(now, server, *after, random());
                    }
                    ShipError::Busy { after, .. } => {
                        self.pool.fails(now, server, Trouble::Busy(*after), random());
                    }
                    ShipError::Moved { to, .. } => match self.config.endpoints.iter().position(|one| one == to) {
                        Some(index) => self.pool.redirected(now, server, index, random()),
                        None => {
                            tracing::error!(%error, "that is none of this agent's endpoints: add it to them; meanwhile the next one is asked");
                            self.pool.fails(now, server, Trouble::Broken, random());
                        }
                    },
                }
            }
        }
    }

    /// Sends what is ready, in requests that are full or have waited long enough.
    pub(super) fn send_more(&mut self, now: Instant) -> Result<(), RunError> {
        while !self.ready.is_empty() && self.requests.len() < MAX_REQUESTS {
            let paused = self.pool_paused_until.into_iter().chain(self.send_not_before).any(|until| now < until);
            let gathered = self.jobs == 0 || self.flush_at.is_none_or(|at| now >= at);
            if paused || !(gathered || self.is_request_full()) {
                return Ok(());
            }
            let Some((server, link)) = self.link(now)? else { return Ok(()) };
            let (request, pieces, bytes) = self.gather(server);
            if self.ready.is_empty() {
                self.flush_at = None;
            }
            if request.parts.is_empty() {
                continue;
            }
            // As over a network of that speed, on which a request has come when its last byte has: so at no time more has been sent than
            // that speed allows.
            self.send_not_before = self.config.bytes_per_second.map(|rate| {
                let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
                self.send_not_before.unwrap_or(now).max(now) + takes
            });
            let send_at = self.send_not_before;
            self.metrics.request();
            self.metrics.shipped_bytes.inc_by(bytes);
            let count = request.parts.iter().map(|part| part.3.len()).sum();
            self.next_request += 1;
            let number = self.next_request;
            self.requests.insert(number, request);
            let sender = self.sender.clone();
            tokio::spawn(async move {
                if let Some(at) = send_at {
                    tokio::time::sleep_until(at.into()).await;
                }
                let outcome = link.batches(pieces, count).await;
                // The engine may have ended meanwhile.
                let _ = sender.send(Event::Sent { request: number, outcome });
            });
        }
        Ok(())
    }

    /// Bytes of batches after which a request is full: no more than what may be sent in a second.
    fn request_bytes(&self) -> u64 {
        self.config.bytes_per_second.map_or(REQUEST_BYTES, |rate| REQUEST_BYTES.min(rate))
    }

    fn is_request_full(&self) -> bool {
        let mut bytes = 0;
        for id in &self.ready {
            let Some(named) = self.tails.get(id).and_then(|tail| tail.named.as_ref()) else { continue };
            bytes += named.stream.sendable().filter_map(|piece| piece.batch.as_ref()).map(|one| one.used).sum::<u64>();
            if bytes >= self.request_bytes() {
                return true;
            }
        }
        false
    }

    /// Takes batches of streams that are ready, up to the size of a request.
    fn gather(&mut self, server: usize) -> (Request, Vec<Bytes>, u64) {
        let most = self.request_bytes();
        let mut request = Request { server, parts: Vec::new() };
        let (mut pieces, mut bytes, mut batches) = (Vec::new(), 0, 0);
        while let Some(id) = self.ready.pop_front() {
            let Some(tail) = self.tails.get_mut(&id) else { continue };
            let careful = tail.careful;
            if careful > 0 && !request.parts.is_empty() {
                self.ready.push_front(id);
                break;
            }
            if tail.asked {
                continue;
            }
            let Some(named) = &mut tail.named else { continue };
            let committed = named.stream.committed();
            let mut ends = Vec::new();
            for piece in named.stream.sendable() {
                let Piece { end, batch: Some(packed), .. } = piece else { break };
                let len = packed.used;
                let full = bytes > 0 && (bytes + len > most || batches == MAX_BATCHES_PER_REQUEST);
                if full || (careful >= ONE_BATCH && !ends.is_empty()) {
                    break;
                }
                let head = head(packed, committed);
                bytes += len + head.len() as u64;
                pieces.push(head);
                pieces.push(packed.batch.body.clone());
                ends.push(*end);
                batches += 1;
            }
            if ends.is_empty() {
                if named.stream.sendable().next().is_some() {
                    // It is for the next request.
                    self.ready.push_front(id);
                    break;
                }
                continue;
            }
            named.stream.sent(ends.len());
            request.parts.push((id, named.stream_id, named.stream.generation(), ends));
            if careful > 0 {
                break;
            }
        }
        (request, pieces, bytes)
    }

    pub(super) fn sent(&mut self, number: u64, outcome: Result<Answers, ShipError>, now: Instant) {
        let Some(request) = self.requests.remove(&number) else { return };
        self.heard_of(request.server, outcome.as_ref().err(), now);
        let mut answers = match outcome {
            Ok(answers) => Some(answers.answers.into_iter()),
            Err(error) => {
                if let ShipError::Refused { .. } = error {
                    self.refused(&request, &error);
                }
                None
            }
        };
        for (id, stream_id, generation, ends) in &request.parts {
            let current = self.tails.get(id).is_some_and(|tail| tail.stream_id() == Some(*stream_id));
            match &mut answers {
                Some(answers) => {
                    for end in ends {
                        let answer = answers.next();
                        if let (true, Some(answer)) = (current, answer) {
                            self.answered(*id, *generation, *end, &answer);
                        }
                    }
                }
                None if current => {
                    if let Some(named) = self.tails.get_mut(id).and_then(|tail| tail.named.as_mut()) {
                        named.stream.not_answered(*generation);
                    }
                }
                None => {}
            }
            self.advance(*id, now);
        }
    }

    fn answered(&mut self, id: TailId, generation: u64, end: Position, answer: &Answer) {
        let Some(tail) = self.tails.get_mut(&id) else { return };
        let Some(named) = &mut tail.named else { return };
        if answer.stream != named.stream_id {
            tracing::warn!(stream = %named.stream_id, answered = %answer.stream, "an answer is about another stream than the batch: it is ignored");
            named.stream.not_answered(generation);
            return;
        }
        if answer.verdict == Verdict::Ok {
            tail.waiting = None;
            tail.careful = 0;
            tail.backoff.reset();
            self.metrics.batches.inc();
        }
        let notes = named.stream.answered(generation, end, answer);
        tail.ask_at = Instant::now() + ASK_INTERVAL;
        self.note(id, &notes);
    }

    /// A request was refused for its bytes: the batch at fault is found by sending less and less at a time.
    fn refused(&mut self, request: &Request, error: &ShipError) {
        let (streams, batches) = (request.parts.len(), request.parts.iter().map(|part| part.3.len()).sum::<usize>());
        tracing::error!(%error, streams, batches, "a request was refused");
        for (id, stream_id, ..) in &request.parts {
            let Some(tail) = self.tails.get_mut(id).filter(|tail| tail.stream_id() == Some(*stream_id)) else {
                continue;
            };
            if streams > 1 {
                tail.careful = ALONE;
            } else if batches > 1 {
                tail.careful = ONE_BATCH;
            } else if let Some(named) = &mut tail.named {
                let note = named.stream.stop(error.to_string());
                self.note(*id, &[note]);
            }
        }
    }

    /// Asks about the streams of which nothing is known, and about those that wait to be committed.
    pub(super) fn ask_more(&mut self, now: Instant) -> Result<(), RunError> {
        if now < self.next_ask {
            return Ok(());
        }
        self.next_ask = now + ASK_INTERVAL;
        if self.question.is_some() {
            return Ok(());
        }
        let Some(categories) = &self.categories else { return Ok(()) };
        let lane = self.config.agent_id.lane(categories.lanes);
        let mut query = PositionsQuery { streams: Vec::new() };
        let mut streams = Vec::new();
        for (id, tail) in &self.tails {
            let Some(named) = &tail.named else { continue };
            let wanted = named.stream.is_asking()
                || (named.stream.is_waiting_for_commit() && named.stream.sendable().next().is_none());
            let may = !named.stream.is_in_flight() && tail.not_before.is_none_or(|at| now >= at) && now >= tail.ask_at;
            let known = categories.categories.contains_key(&self.config.sources[tail.source].category);
            if !wanted || !may || !known || query.streams.len() == MAX_STREAMS_PER_QUERY {
                continue;
            }
            query.streams.push(StreamQuery {
                lane,
                agent: self.config.agent_id.clone(),
                category: self.config.sources[tail.source].category.clone(),
                stream: named.stream_id,
                committed: (!named.stream.is_asking()).then(|| named.stream.committed()),
            });
            streams.push((*id, named.stream_id));
        }
        if streams.is_empty() || self.pool_paused_until.is_some_and(|until| now < until) {
            return Ok(());
        }
        let Some((server, link)) = self.link(now)? else { return Ok(()) };
        for (id, _) in &streams {
            if let Some(tail) = self.tails.get_mut(id) {
                tail.asked = true;
            }
        }
        self.metrics.request();
        self.next_request += 1;
        let number = self.next_request;
        self.question = Some((number, Question { server, streams }));
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let outcome = link.positions(&query).await;
            // The engine may have ended meanwhile.
            let _ = sender.send(Event::Told { request: number, outcome });
        });
        Ok(())
    }

    pub(super) fn told(&mut self, number: u64, outcome: Result<Answers, ShipError>, now: Instant) {
        let Some((_, question)) = self.question.take_if(|(asked, _)| *asked == number) else { return };
        self.heard_of(question.server, outcome.as_ref().err(), now);
        let mut answers = outcome.ok().map(|answers| answers.answers.into_iter());
        for (id, stream_id) in question.streams {
            let answer = answers.as_mut().and_then(Iterator::next);
            let Some(tail) = self.tails.get_mut(&id).filter(|tail| tail.stream_id() == Some(stream_id)) else {
                continue;
            };
            tail.asked = false;
            tail.ask_at = now + ASK_INTERVAL;
            let Some(named) = &mut tail.named else { continue };
            if let Some(answer) = answer.filter(|answer| answer.stream == stream_id) {
                if answer.verdict == Verdict::Ok {
                    tail.waiting = None;
                    tail.backoff.reset();
                }
                let notes = named.stream.told(&answer);
                self.note(id, &notes);
            }
            self.advance(id, now);
        }
    }

    pub(super) fn ask_categories(&mut self, now: Instant) -> Result<(), RunError> {
        let paused = self.pool_paused_until.is_some_and(|until| now < until);
        if self.asking_categories || now < self.next_categories || paused {
            return Ok(());
        }
        let Some((server, link)) = self.link(now)? else { return Ok(()) };
        self.asking_categories = true;
        self.metrics.request();
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let outcome = link.categories().await;
            // The engine may have ended meanwhile.
            let _ = sender.send(Event::Categories { server, outcome });
        });
        Ok(())
    }

    pub(super) fn categories_told(&mut self, server: usize, outcome: Result<Categories, ShipError>, now: Instant) {
        self.asking_categories = false;
        self.heard_of(server, outcome.as_ref().err(), now);
        if let Ok(categories) = outcome
            && self.categories.as_ref() != Some(&categories)
        {
            self.checkpoints.save_categories(categories.clone());
            self.categories = Some(categories);
            for source in 0..self.config.sources.len() {
                if self.settings(source).is_none() {
                    tracing::error!(error = self.missing_category(source), "a source can't be shipped, its files wait");
                }
            }
        }
        let missing = (0..self.config.sources.len()).any(|source| self.settings(source).is_none());
        self.next_categories = now + if missing { MISSING_CATEGORIES_INTERVAL } else { CATEGORIES_INTERVAL };
        let waiting: Vec<TailId> = self.tails.keys().copied().collect();
        for id in waiting {
            if let Some(tail) = self.tails.get_mut(&id) {
                tail.waiting = None;
            }
            self.advance(id, now);
        }
    }
}

/// The beginning of a batch in its wire form, with what is known to be committed by now.
fn head(packed: &Packed, committed: Position) -> Bytes {
    let mut header = packed.batch.header.clone();
    header.committed = committed;
    Batch { header, body: packed.batch.body.clone() }.encode_head()
}
