//! An HTTP/1.1 server in which nothing is without a bound.
//!
//! | What | Bound | Beyond it |
//! |---|---|---|
//! | connections | `max_connections` | 503 with `Retry-After: 1`, closed; of these at most 64 at a time, the others are closed at once |
//! | a request's head, also the wait for the next one | `header_timeout` | closed |
//! | a request's body | [`BodyPace`] | the handler sees an error |
//! | writing of a response that the client doesn't take | `write_timeout` | closed |
//! | a stop | `drain_timeout` | what is in flight is cut off |
//!
//! A handler that panics is answered for with 500, counted and logged; the server goes on.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

use super::body::{BodyPace, TimedBody};

/// How many connections over the limit are told so at a time.
const MAX_REFUSING: usize = 64;

/// How long a connection over the limit is given to take its answer.
const REFUSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause after the system gave no connection: nearly always, it has no file descriptor left, and more will be free
/// only when connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bytes that a request's head may have.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// What the server allows.
#[derive(Debug, Clone, Copy)]
pub struct ServerLimits {
    /// Connections at a time.
    pub max_connections: usize,
    /// For a request's head, counted from when the one before was answered.
    pub header_timeout: Duration,
    /// For a request's body.
    pub body: BodyPace,
    /// For a piece of a response that the client doesn't take.
    pub write_timeout: Duration,
    /// For what is in flight at a stop.
    pub drain_timeout: Duration,
}

/// Who is at the other end of a request's connection: an extension of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

/// What the server counts.
#[derive(Debug, Clone, Default)]
pub struct ServerMetrics {
    open: Gauge,
    accepted: Counter,
    refused: Counter,
    accept_errors: Counter,
    panics: Counter,
}

impl ServerMetrics {
    /// Makes the metrics visible.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("http_connections", "Connections that are open", self.open.clone());
        registry.register("http_accepted", "Connections that were accepted", self.accepted.clone());
        registry.register("http_refused", "Connections over the limit, answered 503", self.refused.clone());
        registry.register("http_accept_errors", "Connections that the system did not give", self.accept_errors.clone());
        registry.register("http_panics", "Requests whose handler panicked, answered 500", self.panics.clone());
    }

    /// Handlers that panicked.
    #[must_use]
    pub fn panics(&self) -> u64 {
        self.panics.get()
    }

    /// Connections that were refused for being over the limit.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.get()
    }
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Every request was answered.
    Clean,
    /// So many connections were cut off at the deadline.
    Cut(usize),
}

/// Serves `listener` until `shutdown` is cancelled, then answers what is in flight and returns.
///
/// Every request is given to `handler`, in a task of its connection; requests of one connection come one after the
/// other. When the client goes away, the handler's future is dropped at its next await.
pub async fn serve<H, F>(
    listener: TcpListener,
    limits: ServerLimits,
    metrics: ServerMetrics,
    shutdown: CancellationToken,
    handler: H,
) -> Drained
where
    H: Fn(Request<TimedBody>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let handler = Arc::new(handler);
    let places = Arc::new(Semaphore::new(limits.max_connections.min(Semaphore::MAX_PERMITS)));
    let refusing = Arc::new(Semaphore::new(MAX_REFUSING));
    let graceful = GracefulShutdown::new();
    let cut = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok((stream, peer)) => (stream, Peer(peer)),
            Err(error) => {
                metrics.accept_errors.inc();
                tracing::warn!(%error, "no connection could be accepted");
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    () = tokio::time::sleep(ACCEPT_PAUSE) => continue,
                }
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            metrics.refused.inc();
            if let Ok(permit) = Arc::clone(&refusing).try_acquire_owned() {
                tokio::spawn(refuse(stream, permit));
            }
            continue;
        };
        metrics.accepted.inc();
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection was gone before it was served");
            continue;
        }
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits.write_timeout));
        let service = {
            let (handler, metrics) = (Arc::clone(&handler), metrics.clone());
            service_fn(move |request: Request<hyper::body::Incoming>| {
                let mut request = request.map(|body| TimedBody::new(body, limits.body));
                request.extensions_mut().insert(peer);
                let (handler, metrics) = (Arc::clone(&handler), metrics.clone());
                async move { Ok::<_, Infallible>(guarded(&*handler, request, &metrics).await) }
            })
        };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(Box::pin(stream)), service);
        let connection = graceful.watch(connection);
        let (cut, open) = (cut.clone(), metrics.open.clone());
        open.inc();
        tokio::spawn(async move {
            tokio::select! {
                outcome = connection => {
                    if let Err(error) = outcome {
                        tracing::debug!(%error, "a connection ended in an error");
                    }
                }
                () = cut.cancelled() => {}
            }
            open.dec();
            drop(place);
        });
    }
    // Nobody may connect any more, rather than wait in the queue of a listener that nobody asks.
    drop(listener);
    let waiting = limits.max_connections.min(Semaphore::MAX_PERMITS);
    if timeout(limits.drain_timeout, graceful.shutdown()).await.is_ok() {
        return Drained::Clean;
    }
    let left = waiting.saturating_sub(places.available_permits());
    cut.cancel();
    tracing::warn!(connections = left, "requests were cut off at the deadline of the stop");
    Drained::Cut(left)
}

async fn guarded<H, F>(handler: &H, request: Request<TimedBody>, metrics: &ServerMetrics) -> Response<Full<Bytes>>
where
    H: Fn(Request<TimedBody>) -> F,
    F: Future<Output = Response<Full<Bytes>>>,
{
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    // The call itself may panic as well as its future; what either shares with other requests is behind locks that say
    // so (poisoning) or in tasks of their own.
    let served = AssertUnwindSafe(async { handler(request).await }).catch_unwind().await;
    served.unwrap_or_else(|_| {
        metrics.panics.inc();
        tracing::error!(%method, path, "a request's handler panicked");
        let mut response =
            Response::new(Full::new(Bytes::from_static(b"{\"error\":\"a bug in this node, see its log\"}")));
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
        response
    })
}

/// Tells a connection over the limit to come back later.
async fn refuse(mut stream: TcpStream, _permit: OwnedSemaphorePermit) {
    const ANSWER: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\
        Content-Type: application/json\r\nContent-Length: 32\r\n\r\n{\"error\":\"too many connections\"}";
    let answer = async {
        stream.write_all(ANSWER).await?;
        stream.shutdown().await?;
        // Closing while bytes are unread would reset the connection, and with it the answer on its way.
        let mut sink = [0; 4096];
        while stream.read(&mut sink).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    // Whether it was heard is the client's matter.
    let _ = timeout(REFUSE_TIMEOUT, answer).await;
}

#[cfg(test)]
mod tests;
