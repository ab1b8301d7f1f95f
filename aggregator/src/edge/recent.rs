//! The batches that were written last, as they were received: most are sent on within moments, and need not be read back from
//! the disk and verified for that. A restart, a batch that is sent again and one that waits for long take the disk's.

use std::collections::{HashMap, VecDeque};

use tributary_common::batch::Batch;

use crate::spool::run::Place;

/// What a batch takes in memory beside its bytes, about.
const BATCH_OVERHEAD: u64 = 512;

/// The newest batches that are on the disk and were not sent on yet.
#[derive(Debug)]
pub(super) struct Recent {
    max_bytes: u64,
    batches: HashMap<Place, Batch>,
    /// All that were added, the oldest first, also those that are gone: batches of one request share its memory, which is only
    /// free when the last one goes. So what counts is what came in, not what is left.
    order: VecDeque<(Place, u64)>,
    bytes: u64,
}

impl Recent {
    pub(super) fn new(max_bytes: u64) -> Self {
        Self { max_bytes, batches: HashMap::new(), order: VecDeque::new(), bytes: 0 }
    }

    /// Adds all batches of a request, which are on the disk at these places; the oldest ones go.
    pub(super) fn add(&mut self, batches: impl IntoIterator<Item = (Place, Batch)>) {
        for (place, batch) in batches {
            let bytes = u64::from(place.len) + BATCH_OVERHEAD;
            self.bytes += bytes;
            self.order.push_back((place, bytes));
            self.batches.insert(place, batch);
        }
        while self.bytes > self.max_bytes
            && let Some((place, bytes)) = self.order.pop_front()
        {
            self.bytes -= bytes;
            self.batches.remove(&place);
        }
    }

    /// The batch at a place, if it is here. It is not any more then.
    pub(super) fn take(&mut self, place: Place) -> Option<Batch> {
        self.batches.remove(&place)
    }
}

#[cfg(test)]
mod tests {
    use tributary_common::ids::StreamId;

    use super::*;
    use crate::testing::batch;

    const LEN: u32 = 1000;
    const COST: u64 = LEN as u64 + BATCH_OVERHEAD;

    fn place(number: u64) -> Place {
        Place { segment: 1, offset: number * u64::from(LEN), len: LEN }
    }

    fn one(number: u64) -> (Place, Batch) {
        (place(number), batch(StreamId(7), number * 10, number * 10 + 10, 0))
    }

    #[test]
    fn a_batch_is_there_for_the_first_who_takes_it() {
        let mut recent = Recent::new(10 * COST);
        recent.add([one(0), one(1)]);
        assert_eq!(recent.take(place(1)).map(|batch| batch.header.start.offset), Some(10));
        assert!(recent.take(place(1)).is_none());
        assert!(recent.take(place(0)).is_some());
    }

    #[test]
    fn the_oldest_go_for_new_ones_and_those_that_were_taken_still_count() {
        let mut recent = Recent::new(3 * COST);
        recent.add([one(0), one(1), one(2)]);
        assert!(recent.take(place(1)).is_some());
        // The memory of 1 may be shared with 0 and 2.
        recent.add([one(3)]);
        assert_eq!([0, 2, 3].map(|number| recent.take(place(number)).is_some()), [false, true, true]);
    }

    #[test]
    fn a_request_larger_than_the_bound_leaves_its_end() {
        let mut recent = Recent::new(2 * COST);
        recent.add((0..5).map(one));
        assert_eq!([2, 3, 4].map(|number| recent.take(place(number)).is_some()), [false, true, true]);
    }
}
