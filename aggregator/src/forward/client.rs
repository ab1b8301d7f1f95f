//! The forwarder's HTTP.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderValue, StatusCode};
use hyper::body::{Body, Frame, SizeHint};
use serde::de::DeserializeOwned;
use tributary_common::http::backoff::retry_after;
use tributary_common::http::client::{ClientOptions, build};
use tributary_common::http::endpoint::Endpoint;
use tributary_common::http::pool::Trouble;
use tributary_common::messages::{
    Answer, Answers, BATCHES_CONTENT_TYPE, BATCHES_PATH, POSITIONS_PATH, PositionsQuery, Problem, REPORTS_PATH,
    SIBLING_HEADER,
};
use tributary_common::report::{ReportAnswer, ReportAnswers, Reports};

use super::state::Failure;

/// Most bytes of a response that are read: answers for the most batches, each with a full history, take less.
const MAX_RESPONSE_BYTES: usize = 64 << 20;

/// A request brought no answers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{url}: {error}")]
pub struct Failed {
    /// Where it went.
    pub url: String,
    /// What went wrong.
    pub error: String,
    /// What that means.
    pub failure: Failure,
}

/// The tier above.
#[async_trait]
pub trait Upstream: Send + Sync + 'static {
    /// Offers batches: the pieces of memory that make them up, in order.
    ///
    /// # Errors
    /// When there is no answer to the batches.
    async fn batches(&self, way: &Way, pieces: Vec<Bytes>) -> Result<Vec<Answer>, Failed>;

    /// Asks for positions.
    ///
    /// # Errors
    /// When there is no answer to the question.
    async fn positions(&self, way: &Way, query: &PositionsQuery) -> Result<Vec<Answer>, Failed>;

    /// Passes reports on, and returns what is known there of their agents.
    ///
    /// # Errors
    /// When they did not arrive.
    async fn reports(&self, way: &Way, reports: &Reports) -> Result<Vec<ReportAnswer>, Failed>;
}

/// Asks nodes of the parent tier over HTTP.
pub struct Client {
    options: ClientOptions,
    /// One for each route.
    current: Mutex<Vec<reqwest::Client>>,
}

/// Where a request goes.
#[derive(Debug, Clone)]
pub struct Way {
    /// By which route.
    pub route: usize,
    /// To which node.
    pub node: Endpoint,
    /// Over a new connection.
    pub reconnect: bool,
}

impl Client {
    /// A client for so many routes.
    ///
    /// # Errors
    /// When the HTTP library can't be set up.
    pub fn new(options: ClientOptions, routes: usize) -> Result<Self, reqwest::Error> {
        let first = build(&options)?;
        Ok(Self { options, current: Mutex::new(vec![first; routes]) })
    }

    fn client(&self, way: &Way) -> reqwest::Client {
        let mut current = self.current.lock().expect("nothing panics while the lock is held");
        let current = &mut current[way.route];
        if way.reconnect
            && let Ok(fresh) = build(&self.options)
        {
            // The old connections close when the requests on them are done.
            *current = fresh;
        }
        current.clone()
    }

    async fn post<T: DeserializeOwned>(
        &self,
        way: &Way,
        path: &str,
        content_type: &'static str,
        body: reqwest::Body,
    ) -> Result<T, Failed> {
        let url = way.node.url(path);
        let broken = |error: String| Failed { url: url.clone(), error, failure: Failure::Trouble(Trouble::Broken) };
        let sent = self
            .client(way)
            .post(&url)
            .header(CONTENT_TYPE, HeaderValue::from_static(content_type))
            .body(body)
            .send()
            .await;
        let mut response = sent.map_err(|error| broken(causes(&error)))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|error| broken(causes(&error)))? {
            if body.len() + piece.len() > MAX_RESPONSE_BYTES {
                return Err(broken(format!("the answer has more than {MAX_RESPONSE_BYTES} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        understand(&way.node, path, status, &headers, &body)
    }
}

#[async_trait]
impl Upstream for Client {
    async fn batches(&self, way: &Way, pieces: Vec<Bytes>) -> Result<Vec<Answer>, Failed> {
        let body = reqwest::Body::wrap(Pieces::new(pieces));
        self.post(way, BATCHES_PATH, BATCHES_CONTENT_TYPE, body).await.map(|answers: Answers| answers.answers)
    }

    async fn positions(&self, way: &Way, query: &PositionsQuery) -> Result<Vec<Answer>, Failed> {
        let body = serde_json::to_vec(query).expect("messages have text keys and no failing serializers");
        self.post(way, POSITIONS_PATH, "application/json", body.into()).await.map(|answers: Answers| answers.answers)
    }

    async fn reports(&self, way: &Way, reports: &Reports) -> Result<Vec<ReportAnswer>, Failed> {
        let body = serde_json::to_vec(reports).expect("messages have text keys and no failing serializers");
        self.post(way, REPORTS_PATH, "application/json", body.into())
            .await
            .map(|answers: ReportAnswers| answers.answers)
    }
}

/// What a response to a request for `path` of `node` means: [`Answers`], or [`ReportAnswers`] to reports.
///
/// # Errors
/// When it brings no answers.
pub fn understand<T: DeserializeOwned>(
    node: &Endpoint,
    path: &str,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<T, Failed> {
    let url = node.url(path);
    if status == StatusCode::OK {
        return serde_json::from_slice(body).map_err(|error| Failed {
            url,
            error: format!("the answer is not one of a node of this release: {error}"),
            failure: Failure::Trouble(Trouble::Broken),
        });
    }
    let after = retry_after(headers);
    let said = serde_json::from_slice::<Problem>(body).map(|problem| problem.error);
    let said = said.unwrap_or_else(|_| String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned());
    let failure = match status {
        StatusCode::SERVICE_UNAVAILABLE if headers.contains_key(SIBLING_HEADER) => Failure::Declined(after),
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Failure::Trouble(Trouble::Busy(after)),
        // Final for exactly these bytes. Other statuses speak of the node, not of the batches.
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE => Failure::Rejected { error: said.clone() },
        _ => moved_to(status, headers, path).map_or(Failure::Trouble(Trouble::Broken), Failure::Moved),
    };
    Err(Failed { url, error: format!("status {}: {said}", status.as_u16()), failure })
}

/// Where a redirect points to: a node, at the same path.
fn moved_to(status: StatusCode, headers: &HeaderMap, path: &str) -> Option<Endpoint> {
    if status != StatusCode::TEMPORARY_REDIRECT {
        return None;
    }
    headers.get(LOCATION)?.to_str().ok()?.strip_suffix(path)?.parse().ok()
}

/// The error with all that lies behind it: the outermost one alone says only that sending failed.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A body in several pieces of memory, of known length, so that it is announced, and not copied together.
struct Pieces {
    rest: VecDeque<Bytes>,
    len: u64,
}

impl Pieces {
    fn new(pieces: Vec<Bytes>) -> Self {
        Self { len: pieces.iter().map(|piece| piece.len() as u64).sum(), rest: pieces.into() }
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.rest.pop_front();
        self.len -= piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.len)
    }
}
