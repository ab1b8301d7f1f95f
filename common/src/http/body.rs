//! A request's body that comes in time or not at all.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

/// How slowly a body may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyPace {
    /// The longest pause between two pieces.
    pub idle_timeout: Duration,
    /// Bytes per second over the whole body; less may come during one `idle_timeout` in all. So a body of n bytes is
    /// waited for no longer than `idle_timeout` + n / `min_rate`.
    pub min_rate: u64,
}

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Nothing came any more.
    #[error("nothing came for {} ms", .0.as_millis())]
    Idle(Duration),
    /// Something came, but too slowly to go on with it for ever.
    #[error("it came too slowly: {received} bytes in {} ms of waiting", waited.as_millis())]
    Slow {
        /// Bytes that had come.
        received: u64,
        /// How long they were waited for.
        waited: Duration,
    },
    /// The connection failed, or what came was not HTTP.
    #[error("{0}")]
    Broken(#[from] hyper::Error),
}

/// A body that fails instead of keeping its server waiting.
///
/// Only waiting for the client counts: a handler that takes its time between two pieces costs the client nothing.
#[derive(Debug)]
pub struct TimedBody<B = Incoming> {
    inner: B,
    pace: BodyPace,
    received: u64,
    /// Time spent waiting until the last piece came.
    waited: Duration,
    /// Set while a piece is waited for.
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    since: Instant,
    deadline: Pin<Box<Sleep>>,
}

impl<B> TimedBody<B> {
    /// The body `inner`, which must keep the pace.
    pub fn new(inner: B, pace: BodyPace) -> Self {
        Self { inner, pace, received: 0, waited: Duration::ZERO, waiting: None }
    }

    /// How much longer the client may keep us waiting over the whole body.
    fn budget(&self) -> Duration {
        let earned = Duration::from_secs_f64(self.received as f64 / self.pace.min_rate.max(1) as f64);
        (self.pace.idle_timeout + earned).saturating_sub(self.waited)
    }
}

impl<B> Body for TimedBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    BodyError: From<B::Error>,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Poll::Ready(piece) = Pin::new(&mut self.inner).poll_frame(cx) {
            if let Some(waiting) = self.waiting.take() {
                self.waited += waiting.since.elapsed();
            }
            return Poll::Ready(piece.map(|piece| {
                let piece = piece?;
                self.received += piece.data_ref().map_or(0, |data| data.len() as u64);
                Ok(piece)
            }));
        }
        let pause = self.budget().min(self.pace.idle_timeout);
        let waiting = self.waiting.get_or_insert_with(|| {
            let since = Instant::now();
            Waiting { since, deadline: Box::pin(sleep_until(since + pause)) }
        });
        ready!(waiting.deadline.as_mut().poll(cx));
        let paused = waiting.since.elapsed();
        let error = if paused >= self.pace.idle_timeout {
            BodyError::Idle(self.pace.idle_timeout)
        } else {
            BodyError::Slow { received: self.received, waited: self.waited + paused }
        };
        Poll::Ready(Some(Err(error)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use std::convert::Infallible;
    use tokio::sync::mpsc;

    /// A body that is fed by hand.
    struct Fed(mpsc::UnboundedReceiver<Bytes>);

    impl Body for Fed {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.poll_recv(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
        }
    }

    impl From<Infallible> for BodyError {
        fn from(never: Infallible) -> Self {
            match never {}
        }
    }

    const PACE: BodyPace = BodyPace { idle_timeout: Duration::from_secs(10), min_rate: 100 };

    /// What a client achieves that sends `piece` bytes each `pause`, `count` times, and then ends the body.
    async fn send(piece: usize, pause: Duration, count: usize) -> Result<usize, BodyError> {
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            for _ in 0..count {
                tokio::time::sleep(pause).await;
                if sender.send(Bytes::from(vec![b'x'; piece])).is_err() {
                    return;
                }
            }
        });
        TimedBody::new(Fed(receiver), PACE).collect().await.map(|body| body.to_bytes().len())
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_keeps_the_pace_may_take_as_long_as_it_needs() {
        assert_eq!(send(1000, Duration::from_secs(9), 100).await.expect("fast enough"), 100_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_is_given_up() {
        let error = send(1000, Duration::from_secs(11), 1).await.expect_err("nothing came");
        assert!(matches!(error, BodyError::Idle(_)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_at_a_time_has_an_end() {
        let start = Instant::now();
        let error = send(1, Duration::from_secs(1), 100_000).await.expect_err("too slow");
        assert!(matches!(error, BodyError::Slow { received: 9..=11, .. }), "{error}");
        assert!(start.elapsed() < Duration::from_secs(12), "virtual time: {:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn the_readers_own_pauses_do_not_count() {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut body = TimedBody::new(Fed(receiver), PACE);
        for _ in 0..10 {
            sender.send(Bytes::from_static(b"x")).expect("the body is there");
            tokio::time::sleep(Duration::from_secs(60)).await;
            body.frame().await.expect("a piece").expect("it was there all the time");
        }
    }
}
