//! How many copies, and how large blocks, new files get while DataNodes are missing or short of room.
//!
//! When a DataNode dies, HDFS goes on choosing it for new files until the NameNode notices, which takes minutes. On a
//! cluster with no more nodes than copies, every new file then meets the dead one: it can't be created, or its first sync
//! never returns. So each few failures in a row take one copy off, down to a minimum; the copies are added when a file is
//! closed. After a while the full number is tried again.
//!
//! HDFS also keeps a whole block's room free for each open file, so a DataNode that has much room for data may have none for one
//! more large block. Then the blocks of the next new files are half as large, again and again, down to a minimum.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::dfs::{CreateOptions, DfsError};

/// After how many failures in a row the next new files get one copy less.
const FAILURES_PER_STEP: u32 = 2;

/// The copies that HDFS makes when the topology names no number; where the way down begins then.
const USUAL_COPIES: u16 = 3;

/// How long after the last failure the full number is tried again.
const TRY_FULL_AFTER: Duration = Duration::from_secs(600);

/// The smallest block that is asked for, in bytes.
pub const MIN_BLOCK_BYTES: u64 = 64 << 20;

/// What to ask of the file system for new files; shared by all who make some in a lane.
#[derive(Debug)]
pub struct Placement {
    wanted: Option<u16>,
    least: u16,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    lowered: Option<u16>,
    /// The largest block that there may be room for, in bytes, if not every one.
    largest_block: Option<u64>,
    failures: u32,
    last_failure: Option<Instant>,
}

impl Placement {
    /// `wanted` copies, or as many as the file system makes by itself, and never fewer than `least`.
    #[must_use]
    pub fn new(wanted: Option<u16>, least: u16) -> Self {
        Self { wanted, least, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing in here panics between two changes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to ask for now: where possible what `wanted` says, with the copies of this placement.
    #[must_use]
    pub fn for_new_file(&self, now: Instant, wanted: CreateOptions) -> CreateOptions {
        let mut state = self.state();
        if state.last_failure.is_some_and(|last| now.duration_since(last) >= TRY_FULL_AFTER) {
            *state = State::default();
        }
        let block_size = state.largest_block.map_or(wanted.block_size, |largest| largest.min(wanted.block_size));
        CreateOptions { replication: state.lowered.or(self.wanted), block_size, ..wanted }
    }

    /// To how many copies a closed file is to be raised that was made with `made` copies; none if it has enough.
    #[must_use]
    pub fn raise_to(&self, made: Option<u16>) -> Option<u16> {
        let full = self.wanted.unwrap_or(USUAL_COPIES);
        made.filter(|made| *made < full).map(|_| full)
    }

    /// A new file that was asked for with these options could not be created, or failed before its first sync.
    pub fn failed(&self, now: Instant, asked: CreateOptions, error: &DfsError) {
        let mut state = self.state();
        state.last_failure = Some(now);
        if error.is_no_room_for_a_block() && asked.block_size > MIN_BLOCK_BYTES {
            let half = (asked.block_size / 2).next_multiple_of(1 << 20).max(MIN_BLOCK_BYTES);
            // Many files may fail at the same time.
            if state.largest_block.is_none_or(|largest| half < largest) {
                tracing::warn!(
                    block_size = half,
                    "no DataNode has room for a block of a new file; the next get smaller blocks"
                );
                state.largest_block = Some(half);
            }
            return;
        }
        state.failures += 1;
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

    const ROLL: u64 = 1 << 30;

    fn wanted() -> CreateOptions {
        CreateOptions { block_size: ROLL, replication: None, sync_timeout: Duration::from_secs(1) }
    }

    fn error(reason: &str) -> DfsError {
        DfsError::UnknownOutcome { call: "sync", path: crate::dfs::DfsPath::base(), reason: reason.into() }
    }

    fn copies(placement: &Placement, now: Instant) -> Option<u16> {
        placement.for_new_file(now, wanted()).replication
    }

    #[test]
    fn failures_in_a_row_take_copies_off_down_to_the_least() {
        let now = Instant::now();
        let placement = Placement::new(Some(3), 2);
        let fails = || placement.failed(now, placement.for_new_file(now, wanted()), &error("no answer"));
        assert_eq!(copies(&placement, now), Some(3));
        fails();
        placement.works();
        fails();
        assert_eq!(copies(&placement, now), Some(3), "not in a row");
        fails();
        assert_eq!(copies(&placement, now), Some(2));
        (0..20).for_each(|_| fails());
        assert_eq!(copies(&placement, now), Some(2));
        assert_eq!(placement.for_new_file(now, wanted()).block_size, ROLL, "nothing was said of room");
        assert_eq!(placement.raise_to(Some(2)), Some(3));
        assert_eq!(placement.raise_to(Some(3)), None);
    }

    #[test]
    fn where_there_is_no_room_for_a_block_the_next_is_half_as_large() {
        let now = Instant::now();
        let placement = Placement::new(Some(3), 2);
        let full = error("File /x could only be written to 0 of the 1 minReplication nodes.");
        let mut sizes = Vec::new();
        for _ in 0..6 {
            let asked = placement.for_new_file(now, wanted());
            sizes.push(asked.block_size >> 20);
            // All that were open at that time.
            (0..10).for_each(|_| placement.failed(now, asked, &full));
        }
        assert_eq!(sizes, [1024, 512, 256, 128, 64, 64]);
        assert_eq!(placement.for_new_file(now + TRY_FULL_AFTER, wanted()).block_size, ROLL);
    }

    #[test]
    fn the_full_number_is_tried_again_after_a_while() {
        let now = Instant::now();
        let placement = Placement::new(None, 2);
        assert_eq!(copies(&placement, now), None);
        (0..2).for_each(|_| placement.failed(now, wanted(), &error("no answer")));
        assert_eq!(copies(&placement, now), Some(2));
        assert_eq!(copies(&placement, now + TRY_FULL_AFTER), None);
        assert_eq!(placement.raise_to(None), None, "made with the file system's own number");
    }
}
