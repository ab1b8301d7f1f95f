//! What a run of the agent knows to be stored of each bucket. Pure.
//!
//! The lane that seals a bucket compares: fewer records than an agent knows to be stored means that something went wrong there. It
//! is a lower bound, so that it is never wrong itself: what another run shipped, what was skipped because upstream had it, and what
//! went into a bucket by the time of reading (which another reading may put elsewhere) is not counted.

use std::collections::{BTreeMap, VecDeque};

use tributary_common::bucket::Bucket;
use tributary_common::limits::MAX_COUNTS_PER_REPORT;
use tributary_common::report::BucketCount;

/// What a batch has for one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The bucket.
    pub bucket: Bucket,
    /// Records.
    pub records: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

#[derive(Debug)]
struct Piece {
    end: u64,
    shares: Vec<Share>,
}

/// What was read of a stream and is not known to be stored.
#[derive(Debug, Default)]
pub struct Unstored {
    pieces: VecDeque<Piece>,
}

impl Unstored {
    /// A batch was read, from the offset `from` to `end`. What was read before of what lies behind `from` counts no more.
    pub fn read(&mut self, from: u64, end: u64, shares: Vec<Share>) {
        while self.pieces.back().is_some_and(|last| last.end > from) {
            self.pieces.pop_back();
        }
        self.pieces.push_back(Piece { end, shares });
    }

    /// All up to the offset `to` is stored. Returns what that is.
    pub fn stored(&mut self, to: u64) -> impl Iterator<Item = Share> {
        let count = self.pieces.iter().take_while(|piece| piece.end <= to).count();
        self.pieces.drain(..count).flat_map(|piece| piece.shares)
    }
}

/// What is stored of the latest buckets of a category.
#[derive(Debug, Default)]
pub struct Tally {
    buckets: BTreeMap<(i64, u32), BucketCount>,
}

impl Tally {
    /// Something more is stored.
    pub fn add(&mut self, share: Share) {
        let (start_s, size_s) = (share.bucket.start_s(), share.bucket.size().seconds());
        let none = BucketCount { start_s, size_s, records: 0, bytes: 0 };
        let count = self.buckets.entry((start_s, size_s)).or_insert(none);
        count.records += share.records;
        count.bytes += share.bytes;
        while self.buckets.len() > MAX_COUNTS_PER_REPORT {
            self.buckets.pop_first();
        }
    }

    /// For a report.
    #[must_use]
    pub fn counts(&self) -> Vec<BucketCount> {
        self.buckets.values().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use tributary_common::bucket::BucketSize;

    use super::*;

    fn share(hour: i64, records: u64) -> Share {
        Share { bucket: BucketSize::HOUR.bucket_of_ms(hour * 3_600_000), records, bytes: 10 * records }
    }

    fn records(shares: impl Iterator<Item = Share>) -> u64 {
        shares.map(|share| share.records).sum()
    }

    #[test]
    fn a_batch_counts_when_all_of_it_is_stored() {
        let mut unstored = Unstored::default();
        unstored.read(0, 100, vec![share(0, 5), share(1, 1)]);
        unstored.read(100, 200, vec![share(1, 7)]);
        assert_eq!(records(unstored.stored(99)), 0);
        assert_eq!(records(unstored.stored(150)), 6);
        assert_eq!(records(unstored.stored(200)), 7);
        assert_eq!(records(unstored.stored(200)), 0, "each once");
    }

    #[test]
    fn what_is_read_again_or_skipped_is_not_counted_twice() {
        let mut unstored = Unstored::default();
        unstored.read(0, 100, vec![share(0, 5)]);
        unstored.read(100, 200, vec![share(0, 7)]);
        // Upstream has lost it, and it is cut at other places now.
        unstored.read(0, 150, vec![share(0, 9)]);
        assert_eq!(records(unstored.stored(150)), 9);
        // Upstream had more than was sent.
        unstored.read(150, 250, vec![share(0, 3)]);
        unstored.read(220, 300, vec![share(0, 4)]);
        assert_eq!(records(unstored.stored(300)), 4, "of what lies between it is not known what it is");
    }

    #[test]
    fn the_latest_buckets_are_reported() {
        let mut tally = Tally::default();
        for hour in 0..2 * MAX_COUNTS_PER_REPORT as i64 {
            tally.add(share(hour, 2));
            tally.add(share(hour, 3));
        }
        let counts = tally.counts();
        assert_eq!(counts.len(), MAX_COUNTS_PER_REPORT);
        let last = counts.last().expect("some");
        assert_eq!((last.start_s, last.size_s, last.records, last.bytes), ((2 * 64 - 1) * 3600, 3600, 5, 50));
    }
}
