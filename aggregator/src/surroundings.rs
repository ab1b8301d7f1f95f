//! What a node takes from its machine beside disk and network: the time of day, randomness, and threads that may block.
//! A simulation puts its own in their place, so that a run can be repeated.
//!
//! The monotonic clock is tokio's everywhere, which a simulation can stop.

use std::fmt;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::oneshot;

/// The monotonic clock's time.
#[must_use]
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The time of day, in milliseconds since 1970.
#[derive(Clone)]
pub struct WallClock(Arc<dyn Fn() -> i64 + Send + Sync>);

impl WallClock {
    /// The system's clock.
    #[must_use]
    pub fn system() -> Self {
        Self::new(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
        })
    }

    /// A clock that shows what `now_ms` says.
    pub fn new(now_ms: impl Fn() -> i64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(now_ms))
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        (self.0)()
    }
}

impl fmt::Debug for WallClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WallClock({})", self.now_ms())
    }
}

/// Where random numbers come from.
#[derive(Clone)]
pub struct Random(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Random {
    /// The system's.
    #[must_use]
    pub fn system() -> Self {
        Self::new(rand::random)
    }

    /// Numbers that `next` gives.
    pub fn new(next: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(next))
    }

    /// 64 random bits.
    #[must_use]
    pub fn bits(&self) -> u64 {
        (self.0)()
    }

    /// A part of a name that nobody else has.
    #[must_use]
    pub fn nonce(&self) -> String {
        format!("{:016x}", self.bits())
    }
}

impl fmt::Debug for Random {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Random")
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// Where work is done that blocks.
#[derive(Clone)]
pub struct Blocking(Arc<dyn Fn(Work) -> BoxFuture<'static, ()> + Send + Sync>);

impl Blocking {
    /// Threads of the runtime's pool. The work is done even if nobody waits for it any more.
    #[must_use]
    pub fn threads() -> Self {
        Self::new(|work| {
            let running = tokio::task::spawn_blocking(work);
            // A panic is a bug which must not be mistaken for an outcome: it goes on in the task that waits.
            running.map(|ended| ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))).boxed()
        })
    }

    /// Another place. Work that it drops unfinished must not have had an effect, and its future must not end then.
    pub fn new(begin: impl Fn(Work) -> BoxFuture<'static, ()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(begin))
    }

    /// Begins the work. What is returned waits for its end.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> BoxFuture<'static, T> {
        let (done, result) = oneshot::channel();
        let ended = (self.0)(Box::new(move || {
            // Nobody may wait for it any more.
            let _ = done.send(work());
        }));
        async move {
            ended.await;
            result.await.expect("the work has been done")
        }
        .boxed()
    }
}

impl fmt::Debug for Blocking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Blocking")
    }
}

/// All of them.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// The time of day.
    pub clock: WallClock,
    /// Random numbers.
    pub random: Random,
    /// Where the disk is waited for.
    pub blocking: Blocking,
}

impl Surroundings {
    /// The machine's.
    #[must_use]
    pub fn system() -> Self {
        Self { clock: WallClock::system(), random: Random::system(), blocking: Blocking::threads() }
    }
}
