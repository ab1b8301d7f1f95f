//! What a run takes from its seed: dice, and the trace of what happened.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::Instant;

/// Locks; a test that failed elsewhere leaves a state that is still good to look at.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The seed's dice, shared by all that happens.
#[derive(Clone)]
pub(crate) struct Chance(Arc<Mutex<StdRng>>);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(StdRng::seed_from_u64(seed))))
    }

    pub(crate) fn bits(&self) -> u64 {
        locked(&self.0).random()
    }

    /// A number from 0 to `bound`, without `bound`.
    pub(crate) fn below(&self, bound: u64) -> u64 {
        locked(&self.0).random_range(0..bound.max(1))
    }

    pub(crate) fn index(&self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    pub(crate) fn per_mille(&self, chances: u64) -> bool {
        self.below(1000) < chances
    }

    pub(crate) fn one_in(&self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    pub(crate) fn up_to(&self, most: Duration) -> Duration {
        Duration::from_micros(self.below(u64::try_from(most.as_micros()).unwrap_or(u64::MAX) + 1))
    }
}

/// What happened, in order, where anybody wants to know.
#[derive(Clone)]
pub(crate) struct Trace {
    born: Instant,
    lines: Option<Arc<Mutex<Vec<String>>>>,
}

impl Trace {
    pub(crate) fn new(wanted: bool) -> Self {
        Self { born: Instant::now(), lines: wanted.then(Arc::default) }
    }

    pub(crate) fn add(&self, what: impl FnOnce() -> String) {
        if let Some(lines) = &self.lines {
            let line = format!("{:>10.6} {}", self.born.elapsed().as_secs_f64(), what());
            tracing::debug!("{line}");
            locked(lines).push(line);
        }
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.as_ref().map(|lines| locked(lines).clone()).unwrap_or_default()
    }
}
