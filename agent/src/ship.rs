//! Requests to the tier above: what goes over the wire, and what an outcome means. When and to whom is decided
//! elsewhere.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, LOCATION};
use http::{HeaderMap, StatusCode};
use hyper::body::{Body, Frame, SizeHint};
use tributary_common::http::backoff::retry_after;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::messages::{
    Answers, BATCHES_CONTENT_TYPE, BATCHES_PATH, CATEGORIES_PATH, Categories, POSITIONS_PATH, PositionsQuery, Problem,
    REPORTS_PATH, SIBLING_HEADER,
};
use tributary_common::report::{ReportAnswers, Reports};

use crate::metrics::RequestError;

/// The longest answer that is read: one per batch, each with a history.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Why a request brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// No connection, an answer that breaks off, or one that makes no sense.
    #[error("{endpoint} can't be reached or doesn't answer as it should: {error}")]
    Broken {
        /// Who was asked.
        endpoint: Endpoint,
        /// What kind of trouble it is.
        kind: RequestError,
        /// What happened.
        error: String,
    },
    /// 429 or 503.
    #[error("{endpoint} is busy: {reason}")]
    Busy {
        /// Who was asked.
        endpoint: Endpoint,
        /// Its word for it.
        reason: String,
        /// When it wants to be asked again.
        after: Option<Duration>,
        /// Whether it asks for being left, because it is being emptied.
        sibling: bool,
    },
    /// 307: another one has to be asked.
    #[error("{endpoint} says that {to} has to be asked")]
    Moved {
        /// Who was asked.
        endpoint: Endpoint,
        /// Who has to be.
        to: Endpoint,
    },
    /// 400, 413 or 422: final for exactly these bytes.
    #[error("{endpoint} refuses the request with {status}: {reason}")]
    Refused {
        /// Who was asked.
        endpoint: Endpoint,
        /// The status.
        status: StatusCode,
        /// Its word for it.
        reason: String,
    },
}

impl ShipError {
    /// Under which name it is counted.
    #[must_use]
    pub fn kind(&self) -> RequestError {
        match self {
            Self::Broken { kind, .. } => *kind,
            Self::Busy { sibling: true, .. } | Self::Moved { .. } => RequestError::Moved,
            Self::Busy { .. } => RequestError::Busy,
            Self::Refused { .. } => RequestError::Refused,
        }
    }
}

/// Pieces of memory as the body of a request, without copying them together.
#[derive(Debug)]
struct Pieces {
    pieces: VecDeque<Bytes>,
    left: u64,
}

impl Pieces {
    fn new(pieces: Vec<Bytes>) -> Self {
        let left = pieces.iter().map(|piece| piece.len() as u64).sum();
        Self { pieces: pieces.into(), left }
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.pieces.pop_front().map(|piece| {
            self.left -= piece.len() as u64;
            Ok(Frame::data(piece))
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Exact, so that the length is announced and the server knows how much room to make.
    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// Sends to one endpoint over one set of connections.
#[derive(Debug, Clone)]
pub struct Sender {
    /// The connections.
    pub client: reqwest::Client,
    /// To whom.
    pub endpoint: Endpoint,
}

impl Sender {
    /// Sends `count` batches, given as the pieces of their wire form, and returns one answer for each.
    ///
    /// # Errors
    /// When there is no such answer.
    pub async fn batches(&self, pieces: Vec<Bytes>, count: usize) -> Result<Answers, ShipError> {
        let request = self
            .client
            .post(self.endpoint.url(BATCHES_PATH))
            .header(CONTENT_TYPE, BATCHES_CONTENT_TYPE)
            .body(reqwest::Body::wrap(Pieces::new(pieces)));
        let answers: Answers = self.answer(request).await?;
        self.count(answers, count)
    }

    /// Asks for positions, and returns one answer for each stream.
    ///
    /// # Errors
    /// When there is no such answer.
    pub async fn positions(&self, query: &PositionsQuery) -> Result<Answers, ShipError> {
        let answers: Answers = self.answer(self.client.post(self.endpoint.url(POSITIONS_PATH)).json(query)).await?;
        self.count(answers, query.streams.len())
    }

    /// Sends reports, and returns what was answered to earlier ones.
    ///
    /// # Errors
    /// When they did not arrive.
    pub async fn reports(&self, reports: &Reports) -> Result<ReportAnswers, ShipError> {
        self.answer(self.client.post(self.endpoint.url(REPORTS_PATH)).json(reports)).await
    }

    /// Asks for the settings of the categories.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn categories(&self) -> Result<Categories, ShipError> {
        self.answer(self.client.get(self.endpoint.url(CATEGORIES_PATH))).await
    }

    fn count(&self, answers: Answers, wanted: usize) -> Result<Answers, ShipError> {
        match answers.answers.len() {
            got if got == wanted => Ok(answers),
            got => Err(nonsense(&self.endpoint, format!("{got} answers came to {wanted} questions"))),
        }
    }

    async fn answer<T: serde::de::DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<T, ShipError> {
        let broken = |error: &reqwest::Error| ShipError::Broken {
            endpoint: self.endpoint.clone(),
            kind: if error.is_timeout() { RequestError::Timeout } else { RequestError::Connection },
            error: chain(error),
        };
        let mut response = request.send().await.map_err(|error| broken(&error))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let path = response.url().path().to_owned();
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|error| broken(&error))? {
            if body.len() + piece.len() > MAX_ANSWER_BYTES {
                return Err(nonsense(&self.endpoint, format!("the answer has more than {MAX_ANSWER_BYTES} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        understand(&self.endpoint, &path, status, &headers, &body)
    }
}

fn nonsense(endpoint: &Endpoint, error: String) -> ShipError {
    ShipError::Broken { endpoint: endpoint.clone(), kind: RequestError::Nonsense, error }
}

/// What a response to a request for `path` of `endpoint` means.
///
/// # Errors
/// When it is not what was asked for.
pub fn understand<T: serde::de::DeserializeOwned>(
    endpoint: &Endpoint,
    path: &str,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<T, ShipError> {
    let reason = || {
        serde_json::from_slice::<Problem>(body).map_or_else(
            |_| String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned(),
            |problem| problem.error,
        )
    };
    let endpoint = endpoint.clone();
    match status {
        StatusCode::OK => serde_json::from_slice(body)
            .map_err(|error| nonsense(&endpoint, format!("its answer can't be read: {error}"))),
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            let sibling = headers.contains_key(SIBLING_HEADER);
            Err(ShipError::Busy { endpoint, reason: reason(), after: retry_after(headers), sibling })
        }
        StatusCode::TEMPORARY_REDIRECT if let Some(to) = moved_to(headers, path) => {
            Err(ShipError::Moved { endpoint, to })
        }
        // The body came too slowly: that is the network's doing.
        StatusCode::REQUEST_TIMEOUT => {
            Err(ShipError::Broken { endpoint, kind: RequestError::Timeout, error: reason() })
        }
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
            Err(ShipError::Refused { endpoint, status, reason: reason() })
        }
        // The others say nothing of the bytes: this is no aggregator, or one that doesn't know this protocol.
        status => Err(nonsense(&endpoint, format!("status {status}: {}", reason()))),
    }
}

/// The server that a redirect leads to.
fn moved_to(headers: &HeaderMap, path: &str) -> Option<Endpoint> {
    headers.get(LOCATION)?.to_str().ok()?.strip_suffix(path)?.parse().ok()
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
