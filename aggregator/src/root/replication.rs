//! How many copies new files get while DataNodes are missing.
//!
//! When a DataNode dies, HDFS goes on choosing it for new files until the NameNode notices, which takes minutes. On a
//! cluster with no more nodes than copies, every new file then meets the dead one: it can't be created, or its first sync
//! never returns. So each few failures in a row take one copy off, down to a minimum; the copies are added when a file is
//! closed. After a while the full number is tried again.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// After how many failures in a row the next new files get one copy less.
const FAILURES_PER_STEP: u32 = 2;

/// The copies that HDFS makes when the topology names no number; where the way down begins then.
const USUAL_COPIES: u16 = 3;

/// How long after the last failure the full number is tried again.
const TRY_FULL_AFTER: Duration = Duration::from_secs(600);

/// The number of copies for new files; shared by all who make some in a lane.
#[derive(Debug)]
pub struct Replication {
    wanted: Option<u16>,
    least: u16,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    lowered: Option<u16>,
    failures: u32,
    last_failure: Option<Instant>,
}

impl Replication {
    /// `wanted` copies, or as many as the file system makes by itself, and never fewer than `least`.
    #[must_use]
    pub fn new(wanted: Option<u16>, least: u16) -> Self {
        Self { wanted, least, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing in here panics between two changes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many copies to ask for now; none for the file system's own number.
    #[must_use]
    pub fn for_new_file(&self, now: Instant) -> Option<u16> {
        let mut state = self.state();
        if state.last_failure.is_some_and(|last| now.duration_since(last) >= TRY_FULL_AFTER) {
            *state = State::default();
        }
        state.lowered.or(self.wanted)
    }

    /// To how many copies a closed file is to be raised that was made with `made` copies; none if it has enough.
    #[must_use]
    pub fn raise_to(&self, made: Option<u16>) -> Option<u16> {
        let full = self.wanted.unwrap_or(USUAL_COPIES);
        made.filter(|made| *made < full).map(|_| full)
    }

    /// A new file could not be created, or failed before its first sync.
    pub fn failed(&self, now: Instant) {
        let mut state = self.state();
        state.failures += 1;
        state.last_failure = Some(now);
        if state.failures.is_multiple_of(FAILURES_PER_STEP) {
            let copies = state.lowered.or(self.wanted).unwrap_or(USUAL_COPIES);
            if copies > self.least {
                tracing::warn!(
                    copies = copies - 1,
                    "new files fail again and again; the next get fewer copies until they are closed"
                );
                state.lowered = Some(copies - 1);
            }
        }
    }

    /// A new file passed its first sync.
    pub fn works(&self) {
        self.state().failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_in_a_row_take_copies_off_down_to_the_least() {
        let now = Instant::now();
        let replication = Replication::new(Some(3), 2);
        assert_eq!(replication.for_new_file(now), Some(3));
        replication.failed(now);
        replication.works();
        replication.failed(now);
        assert_eq!(replication.for_new_file(now), Some(3), "not in a row");
        replication.failed(now);
        assert_eq!(replication.for_new_file(now), Some(2));
        for _ in 0..20 {
            replication.failed(now);
        }
        assert_eq!(replication.for_new_file(now), Some(2));
        assert_eq!(replication.raise_to(Some(2)), Some(3));
        assert_eq!(replication.raise_to(Some(3)), None);
    }

    #[test]
    fn the_full_number_is_tried_again_after_a_while() {
        let now = Instant::now();
        let replication = Replication::new(None, 2);
        assert_eq!(replication.for_new_file(now), None);
        replication.failed(now);
        replication.failed(now);
        assert_eq!(replication.for_new_file(now), Some(2));
        assert_eq!(replication.for_new_file(now + TRY_FULL_AFTER), None);
        assert_eq!(replication.raise_to(None), None, "made with the file system's own number");
    }
}
