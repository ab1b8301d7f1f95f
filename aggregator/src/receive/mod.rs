//! The receiving side of a node: HTTP in, [`Tier`] behind.
//!
//! Everything that can be said about a request from its own bytes is decided here, before anything of it is taken:
//!
//! | What is wrong | Answer |
//! |---|---|
//! | path, method | 404, 405 |
//! | content type, version of the protocol | 415 |
//! | too many bytes or batches | 413 |
//! | bytes that are no batch, cut off, corrupt, that contradict themselves | 400, naming the batch and the reason |
//! | more bytes in flight than this node has memory for | 429 with `Retry-After` |
//! | the tier has no room | 503 with `Retry-After` |
//! | another root owns the lane | 307 with its address in `Location` |
//! | the node is being emptied | 503 with `Retry-After` and `Tributary-Go: sibling` |
//! | the category is not in the topology | verdict `refused`, for that batch only |
//!
//! The lane is that of the batch's agent by this node's topology, whatever the sender wrote: the number of lanes may have
//! changed while the batch lay in a spool.
//!
//! Buckets of another size than the topology's are taken: after a change of the size, batches that were cut before lie in agents and
//! spools, and an agent hears of the new size within a minute.
//!
//! A 4xx other than 429 is final for exactly these bytes. Whatever gets a status other than 200 changed nothing, with
//! one exception that is harmless: of a request that got 503, batches may have been taken.

mod metrics;

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Body;
use serde::Serialize;
use tokio::sync::{Semaphore, SemaphorePermit};
use tributary_common::batch::{Batch, BatchError, BatchHeader};
use tributary_common::http::body::BodyError;
use tributary_common::limits::{MAX_BATCHES_PER_REQUEST, MAX_REPORTS_BYTES, MAX_STREAMS_PER_QUERY};
use tributary_common::messages::{
    Answer, Answers, BATCHES_CONTENT_TYPE, BATCHES_PATH, CATEGORIES_PATH, Categories, POSITIONS_PATH, PositionsQuery,
    Problem, REPORTS_PATH, SIBLING_HEADER, STATUS_PATH, Verdict,
};
use tributary_common::report::{Report, ReportAnswer, ReportAnswers, Reports};

pub use self::metrics::{ReceiveMetrics, Reject};
use crate::surroundings::WallClock;
use crate::tier::{Elsewhere, Overloaded, Received, Tier};

/// Most bytes of a positions query: room for [`MAX_STREAMS_PER_QUERY`] streams with the longest names.
const MAX_QUERY_BYTES: u64 = 8 << 20;

/// What a sender is told when the node's own memory for requests is full.
const BUSY_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Bounds of the receiving side.
#[derive(Debug, Clone, Copy)]
pub struct ReceiveLimits {
    /// Most bytes of one request's body.
    pub max_request_bytes: u64,
    /// Most bytes of one batch.
    pub max_batch_bytes: u64,
    /// Most bytes of bodies in memory at a time, over all requests. At least `max_request_bytes`.
    pub max_in_flight_bytes: u64,
}

/// Takes requests apart and hands what is good to the tier.
pub struct Receiver<T> {
    tier: T,
    categories: Categories,
    limits: ReceiveLimits,
    /// One permit per started kibibyte of body.
    memory: Semaphore,
    clock: WallClock,
    metrics: Arc<ReceiveMetrics>,
}

/// Why a request was not served.
#[derive(Debug)]
struct Rejected {
    status: StatusCode,
    why: Reject,
    error: String,
    retry_after: Option<Duration>,
    elsewhere: Option<Elsewhere>,
}

impl Rejected {
    fn new(status: StatusCode, why: Reject, error: impl Into<String>) -> Self {
        Self { status, why, error: error.into(), retry_after: None, elsewhere: None }
    }
}

impl From<Overloaded> for Rejected {
    fn from(full: Overloaded) -> Self {
        let (status, why) = match full.elsewhere {
            Some(Elsewhere::Node(_)) => (StatusCode::TEMPORARY_REDIRECT, Reject::Elsewhere),
            Some(Elsewhere::Sibling) => (StatusCode::SERVICE_UNAVAILABLE, Reject::Elsewhere),
            None => (StatusCode::SERVICE_UNAVAILABLE, Reject::Full),
        };
        Self { status, why, error: full.reason, retry_after: Some(full.retry_after), elsewhere: full.elsewhere }
    }
}

impl<T: Tier> Receiver<T> {
    /// A receiver in front of `tier`. `clock` is the node's clock.
    #[must_use]
    pub fn new(
        tier: T,
        categories: Categories,
        limits: ReceiveLimits,
        clock: WallClock,
        metrics: Arc<ReceiveMetrics>,
    ) -> Self {
        let memory = Semaphore::new(permits(limits.max_in_flight_bytes) as usize);
        Self { tier, categories, limits, memory, clock, metrics }
    }

    /// The tier behind it.
    pub fn tier(&self) -> &T {
        &self.tier
    }

    /// Serves one request.
    pub async fn handle<B>(&self, request: Request<B>) -> Response<Full<Bytes>>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        BodyError: From<B::Error>,
    {
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let served = match (&method, path.as_str()) {
            (&Method::POST, BATCHES_PATH) => self.batches(request).await,
            (&Method::POST, POSITIONS_PATH) => self.positions(request).await,
            (&Method::POST, REPORTS_PATH) => self.reports(request).await,
            (&Method::GET, CATEGORIES_PATH) => Ok(json(StatusCode::OK, &self.categories)),
            (&Method::GET, STATUS_PATH) => Ok(json(StatusCode::OK, &self.tier.status().await)),
            (_, BATCHES_PATH | POSITIONS_PATH | REPORTS_PATH) => return method_not_allowed("POST"),
            (_, CATEGORIES_PATH | STATUS_PATH) => return method_not_allowed("GET"),
            _ => Err(Rejected::new(
                StatusCode::NOT_FOUND,
                Reject::UnknownPath,
                format!(
                    "there is nothing at {path}: the node serves {BATCHES_PATH}, {POSITIONS_PATH}, {REPORTS_PATH}, {CATEGORIES_PATH} and {STATUS_PATH}"
                ),
            )),
        };
        served.unwrap_or_else(|rejected| self.reject(&path, &rejected))
    }

    fn reject(&self, path: &str, rejected: &Rejected) -> Response<Full<Bytes>> {
        self.metrics.rejected(rejected.why);
        if rejected.retry_after.is_some() {
            tracing::debug!(path, status = rejected.status.as_u16(), error = rejected.error, "request put off");
        } else {
            tracing::warn!(path, status = rejected.status.as_u16(), error = rejected.error, "request refused");
        }
        let mut response = json(rejected.status, &Problem { error: rejected.error.clone() });
        if let Some(after) = rejected.retry_after {
            // Whole seconds, rounded up: 0 would mean "at once".
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        match &rejected.elsewhere {
            Some(Elsewhere::Node(node)) => {
                // An endpoint and a path of ours have no byte that a header could not have.
                if let Ok(location) = HeaderValue::try_from(node.url(path)) {
                    response.headers_mut().insert(LOCATION, location);
                }
            }
            Some(Elsewhere::Sibling) => {
                response.headers_mut().insert(SIBLING_HEADER, HeaderValue::from_static("sibling"));
            }
            None => {}
        }
        response
    }

    async fn batches<B>(&self, request: Request<B>) -> Result<Response<Full<Bytes>>, Rejected>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        BodyError: From<B::Error>,
    {
        check_content_type(request.headers(), BATCHES_CONTENT_TYPE)?;
        let (body, _memory) = self.read_body(request, self.limits.max_request_bytes).await?;
        let body_len = body.len();
        let received = self.take_apart(body)?;
        let count = received.len();
        let answers = self.offer(received).await?;
        self.metrics.received(count as u64, body_len as u64);
        Ok(json(StatusCode::OK, &Answers { answers }))
    }

    async fn positions<B>(&self, request: Request<B>) -> Result<Response<Full<Bytes>>, Rejected>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        BodyError: From<B::Error>,
    {
        check_content_type(request.headers(), "application/json")?;
        let (body, _memory) = self.read_body(request, MAX_QUERY_BYTES.min(self.limits.max_request_bytes)).await?;
        let mut query: PositionsQuery = serde_json::from_slice(&body).map_err(|error| {
            Rejected::new(
                StatusCode::BAD_REQUEST,
                Reject::BadQuery,
                format!("the positions query can't be read: {error}"),
            )
        })?;
        if query.streams.len() > MAX_STREAMS_PER_QUERY {
            return Err(Rejected::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                Reject::TooLarge,
                format!(
                    "the query names {} streams; at most {MAX_STREAMS_PER_QUERY} are possible",
                    query.streams.len()
                ),
            ));
        }
        for asked in &mut query.streams {
            asked.lane = asked.agent.lane(self.categories.lanes);
        }
        let answers = self.tier.positions(query).await?;
        Ok(json(StatusCode::OK, &Answers { answers }))
    }

    async fn reports<B>(&self, request: Request<B>) -> Result<Response<Full<Bytes>>, Rejected>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        BodyError: From<B::Error>,
    {
        check_content_type(request.headers(), "application/json")?;
        let (body, _memory) = self.read_body(request, MAX_REPORTS_BYTES.min(self.limits.max_request_bytes)).await?;
        let bad = |error: String| Rejected::new(StatusCode::BAD_REQUEST, Reject::BadQuery, error);
        let mut reports: Reports =
            serde_json::from_slice(&body).map_err(|error| bad(format!("the reports can't be read: {error}")))?;
        reports.check().map_err(bad)?;
        for report in &mut reports.reports {
            report.lane = report.agent.lane(self.categories.lanes);
        }
        let is_known = |report: &Report| self.categories.categories.contains_key(&report.category);
        let (known, foreign): (Vec<Report>, Vec<Report>) = reports.reports.into_iter().partition(is_known);
        let mut answers = if known.is_empty() { Vec::new() } else { self.tier.reports(known).await? };
        answers.extend(foreign.iter().map(|report| ReportAnswer {
            refused: Some(format!(
                "the category {} is not in this node's topology: add it there, or correct the agent's source",
                report.category
            )),
            ..report.answer()
        }));
        Ok(json(StatusCode::OK, &ReportAnswers { answers }))
    }

    /// Reads the body into one piece of memory. The permit stands for that memory.
    async fn read_body<B>(&self, request: Request<B>, limit: u64) -> Result<(Bytes, SemaphorePermit<'_>), Rejected>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        BodyError: From<B::Error>,
    {
        let too_large = || {
            Rejected::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                Reject::TooLarge,
                format!("the request has more than {limit} bytes: send fewer batches in one request"),
            )
        };
        let announced =
            request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        // A body of unknown length may become as large as the limit.
        let room = announced.unwrap_or(limit);
        if room > limit {
            return Err(too_large());
        }
        let permit = self.memory.try_acquire_many(permits(room)).map_err(|_| Rejected {
            status: StatusCode::TOO_MANY_REQUESTS,
            why: Reject::Busy,
            error: format!(
                "requests with {} bytes are being served, as many as this node has memory for",
                self.limits.max_in_flight_bytes
            ),
            retry_after: Some(BUSY_RETRY_AFTER),
            elsewhere: None,
        })?;
        let mut body = request.into_body();
        // Where the length is announced nothing is copied as it grows. It is only an address: the system gives memory when it is written
        // to.
        let mut bytes = BytesMut::with_capacity(announced.unwrap_or(64 << 10) as usize);
        loop {
            let Some(piece) = body.frame().await else { break };
            let piece = piece.map_err(|error| {
                let error = BodyError::from(error);
                let status = match error {
                    BodyError::Idle(_) | BodyError::Slow { .. } => StatusCode::REQUEST_TIMEOUT,
                    BodyError::Broken(_) => StatusCode::BAD_REQUEST,
                };
                let error = format!("the request's body broke off after {} bytes: {error}", bytes.len());
                Rejected::new(status, Reject::Body, error)
            })?;
            if let Ok(data) = piece.into_data() {
                if (bytes.len() + data.len()) as u64 > limit {
                    return Err(too_large());
                }
                bytes.extend_from_slice(&data);
            }
        }
        Ok((bytes.freeze(), permit))
    }

    /// Reads and verifies every batch of a body, all or nothing.
    fn take_apart(&self, mut body: Bytes) -> Result<Vec<Received>, Rejected> {
        let mut received = Vec::new();
        let now_ms = self.clock.now_ms();
        while !body.is_empty() {
            let index = received.len();
            if index == MAX_BATCHES_PER_REQUEST {
                return Err(Rejected::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    Reject::TooLarge,
                    format!("the request has more than {MAX_BATCHES_PER_REQUEST} batches: send fewer in one request"),
                ));
            }
            let bad = |error: BatchError| {
                Rejected::new(
                    StatusCode::BAD_REQUEST,
                    Reject::of(&error),
                    format!("batch {index} of the request (from 0) is bad, nothing of the request was taken: {error}"),
                )
            };
            let before = body.len();
            let mut batch = Batch::take_from(&mut body).map_err(bad)?;
            let batch_bytes = (before - body.len()) as u64;
            if batch_bytes > self.limits.max_batch_bytes {
                return Err(Rejected::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    Reject::TooLarge,
                    format!(
                        "batch {index} of the request (from 0) has {batch_bytes} bytes; at most {} are possible: set batch.max_bytes lower",
                        self.limits.max_batch_bytes
                    ),
                ));
            }
            let frames = batch.verify().map_err(bad)?;
            batch.header.received_ms.get_or_insert(now_ms);
            batch.header.lane = batch.header.agent.lane(self.categories.lanes);
            received.push(Received { batch, frames });
        }
        if received.is_empty() {
            return Err(Rejected::new(
                StatusCode::BAD_REQUEST,
                Reject::Truncated,
                "the request has no batch: send at least one",
            ));
        }
        Ok(received)
    }

    /// Offers to the tier what fits the topology, and answers for the rest.
    async fn offer(&self, received: Vec<Received>) -> Result<Vec<Answer>, Rejected> {
        let refusals: Vec<Option<Answer>> = received.iter().map(|one| self.refusal(&one.batch.header)).collect();
        let offered: Vec<Received> =
            received.into_iter().zip(&refusals).filter(|(_, refusal)| refusal.is_none()).map(|(one, _)| one).collect();
        let wanted = offered.len();
        let mut answers = if offered.is_empty() { Vec::new() } else { self.tier.offer(offered).await? }.into_iter();
        debug_assert_eq!(answers.len(), wanted, "a tier gives one answer per batch");
        refusals
            .into_iter()
            .map(|refusal| refusal.or_else(|| answers.next()))
            .collect::<Option<Vec<Answer>>>()
            .ok_or_else(|| {
                let error = "the node gave fewer answers than there were batches, which is a bug in it";
                Rejected::new(StatusCode::INTERNAL_SERVER_ERROR, Reject::Internal, error)
            })
    }

    fn refusal(&self, header: &BatchHeader) -> Option<Answer> {
        let reason = self.contradiction(header)?;
        self.metrics.rejected(Reject::Topology);
        tracing::warn!(
            agent = %header.agent, stream = %header.stream, category = %header.category, reason, "batch refused"
        );
        Some(Answer {
            stream: header.stream,
            next: None,
            committed: None,
            owner: None,
            verdict: Verdict::Refused { reason },
        })
    }

    /// What in the batch is not as the topology has it.
    fn contradiction(&self, header: &BatchHeader) -> Option<String> {
        let known = self.categories.categories.contains_key(&header.category);
        (!known).then(|| {
            format!(
                "the category {} is not in this node's topology: add it there, or correct the agent's source",
                header.category
            )
        })
    }
}

fn permits(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024))
        .unwrap_or(u32::MAX)
        .min((Semaphore::MAX_PERMITS / 2).min(u32::MAX as usize) as u32)
}

fn check_content_type(headers: &HeaderMap, wanted: &str) -> Result<(), Rejected> {
    let given = headers.get(CONTENT_TYPE).map_or("", |value| value.to_str().unwrap_or("(not text)"));
    let essence = given.split(';').next().unwrap_or("").trim();
    if essence.eq_ignore_ascii_case(wanted) {
        return Ok(());
    }
    Err(Rejected::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        Reject::ContentType,
        format!("the content type is {given:?}; this node reads {wanted}: use a sender of the same release"),
    ))
}

fn method_not_allowed(allowed: &'static str) -> Response<Full<Bytes>> {
    let problem = Problem { error: format!("this path takes {allowed} only") };
    let mut response = json(StatusCode::METHOD_NOT_ALLOWED, &problem);
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    response
}

fn json<B: Serialize>(status: StatusCode, body: &B) -> Response<Full<Bytes>> {
    let text = serde_json::to_vec(body).expect("messages have text keys and no failing serializers");
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests;
