//! When a log file is to be read: it grew, it was rotated away, its last line rests. Pure: what is seen of the file goes
//! in, a moment comes out.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::cut::DataEnd;

/// How many sizes of a file are remembered.
const MAX_SIZES: usize = 16;

/// The times and sizes that decide.
#[derive(Debug, Clone, Copy)]
pub struct PaceOptions {
    /// A batch of so many bytes doesn't wait for more.
    pub batch_bytes: u64,
    /// How long a smaller one does.
    pub batch_timeout: Duration,
    /// How long a file that was rotated away is watched for more.
    pub rotate_wait: Duration,
    /// How long an unterminated last line waits for its end.
    pub partial_line_timeout: Duration,
}

/// When to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// At once.
    Now(DataEnd),
    /// Then, if nothing changes before.
    At(Instant),
    /// When something changes.
    Later,
}

/// What was seen of a file.
#[derive(Debug, Clone)]
pub struct Pace {
    size: u64,
    grew_at: Instant,
    /// Which sizes were seen when first, up to [`MAX_SIZES`] of them, to tell how long bytes have been waiting.
    sizes: VecDeque<(u64, Instant)>,
    /// Since when there are bytes that were not read.
    pending_since: Option<Instant>,
    /// From where to where (the size) reading found no whole record.
    stuck: Option<(u64, u64)>,
    rotated_at: Option<Instant>,
    /// Whether it was written to without having become longer.
    touched: bool,
    /// Whether the file is as long as it will get, by whoever started the program.
    complete: bool,
}

impl Pace {
    /// A file of `size` bytes, seen first at `now`. `complete`: nobody is to wait for more of it.
    #[must_use]
    pub fn new(size: u64, complete: bool, now: Instant) -> Self {
        let sizes = VecDeque::from([(size, now)]);
        Self { size, grew_at: now, sizes, pending_since: None, stuck: None, rotated_at: None, touched: false, complete }
    }

    /// The size as seen last.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// When its size changed last.
    #[must_use]
    pub fn grew_at(&self) -> Instant {
        self.grew_at
    }

    /// How long the first byte from `committed` on has been seen in the file; zero where there is none.
    #[must_use]
    pub fn behind(&self, committed: u64, now: Instant) -> Duration {
        if committed >= self.size {
            return Duration::ZERO;
        }
        let first = self.sizes.iter().find(|(size, _)| *size > committed);
        first.map_or(Duration::ZERO, |(_, at)| now.saturating_duration_since(*at))
    }

    /// Bytes before `offset` wait no more.
    pub fn committed(&mut self, offset: u64) {
        while self.sizes.len() > 1 && self.sizes.front().is_some_and(|(size, _)| *size <= offset) {
            self.sizes.pop_front();
        }
    }

    /// Whether reading from `offset` found no whole record.
    #[must_use]
    pub fn is_unterminated(&self, offset: u64) -> bool {
        self.stuck == Some((offset, self.size))
    }

    /// The file has `size` bytes. Returns whether that is something new.
    pub fn seen(&mut self, size: u64, now: Instant) -> bool {
        let changed = size != self.size;
        if changed {
            if size < self.size {
                self.sizes.clear();
            } else if self.sizes.len() == MAX_SIZES {
                // Two become one: the wait is told a little too long rather than too short.
                let pairs = self.sizes.make_contiguous().chunks(2);
                self.sizes = pairs.map(|pair| (pair[pair.len() - 1].0, pair[0].1)).collect();
            }
            self.sizes.push_back((size, now));
            self.size = size;
            self.grew_at = now;
        }
        changed
    }

    /// It was written to, and has the size that was seen before: its bytes may be others.
    pub fn touched(&mut self) {
        self.touched = true;
    }

    /// Another file has its name now, or none.
    pub fn rotated(&mut self, now: Instant) {
        self.rotated_at.get_or_insert(now);
    }

    /// Whether it was rotated away.
    #[must_use]
    pub fn is_rotated(&self) -> bool {
        self.rotated_at.is_some()
    }

    /// Whether nothing more is awaited of it.
    #[must_use]
    pub fn is_over(&self, now: Instant, options: &PaceOptions) -> bool {
        self.complete || self.over_at(options).is_some_and(|at| now >= at)
    }

    fn over_at(&self, options: &PaceOptions) -> Option<Instant> {
        self.rotated_at.map(|at| at.max(self.grew_at) + options.rotate_wait)
    }

    /// A read brought a batch that ends at `offset`.
    pub fn has_read(&mut self, offset: u64, now: Instant) {
        self.stuck = None;
        self.touched = false;
        self.pending_since = (offset < self.size).then_some(now);
    }

    /// A read from `offset` of the file, which had `size` bytes, brought no whole record.
    pub fn is_stuck(&mut self, offset: u64, size: u64, now: Instant) {
        self.seen(size, now);
        self.touched = false;
        self.stuck = Some((offset, size));
        self.pending_since = None;
    }

    /// Whether what lies behind `offset` is only the beginning of a line.
    #[must_use]
    pub fn is_stuck_at(&self, offset: u64) -> bool {
        self.stuck == Some((offset, self.size))
    }

    /// When to read from `offset`. `bucket_ends_at`: when the bucket ends into which the bytes go by the time of
    /// reading, if they do.
    pub fn when(&mut self, offset: u64, now: Instant, options: &PaceOptions, bucket_ends_at: Option<Instant>) -> When {
        if self.touched {
            // Reading compares the bytes before the offset with those that were there.
            return When::Now(DataEnd::Open);
        }
        if self.size == offset {
            self.pending_since = None;
            return self.over_at(options).filter(|at| *at > now).map_or(When::Later, When::At);
        }
        if self.size < offset {
            // Truncated: reading will show it.
            return When::Now(DataEnd::Open);
        }
        let over = self.is_over(now, options);
        if self.stuck == Some((offset, self.size)) {
            let rested = self.grew_at + options.partial_line_timeout;
            if over || now >= rested {
                return When::Now(DataEnd::Final);
            }
            return When::At(self.over_at(options).map_or(rested, |at| at.min(rested)));
        }
        let since = *self.pending_since.get_or_insert(now);
        let due = since + options.batch_timeout;
        let due = bucket_ends_at.map_or(due, |end| due.min(end));
        let left = self.size - offset;
        if over || self.is_rotated() || left >= options.batch_bytes || now >= due {
            When::Now(DataEnd::Open)
        } else {
            When::At(due)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: PaceOptions = PaceOptions {
        batch_bytes: 1000,
        batch_timeout: Duration::from_secs(1),
        rotate_wait: Duration::from_secs(5),
        partial_line_timeout: Duration::from_secs(30),
    };
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_small_batch_waits_and_a_full_one_does_not() {
        let start = Instant::now();
        let mut pace = Pace::new(0, false, start);
        assert_eq!(pace.when(0, start, &OPTIONS, None), When::Later);
        pace.seen(10, start);
        assert_eq!(pace.when(0, start, &OPTIONS, None), When::At(start + SECOND));
        pace.seen(20, start + SECOND / 2);
        assert_eq!(
            pace.when(0, start + SECOND / 2, &OPTIONS, None),
            When::At(start + SECOND),
            "more bytes don't put it off"
        );
        assert_eq!(pace.when(0, start + SECOND, &OPTIONS, None), When::Now(DataEnd::Open));
        pace.has_read(20, start + SECOND);
        assert_eq!(pace.when(20, start + SECOND, &OPTIONS, None), When::Later);
        pace.seen(1020, start + SECOND);
        assert_eq!(pace.when(20, start + SECOND, &OPTIONS, None), When::Now(DataEnd::Open));
    }

    #[test]
    fn a_batch_ends_with_its_bucket() {
        let start = Instant::now();
        let mut pace = Pace::new(10, false, start);
        let ends = start + SECOND / 4;
        assert_eq!(pace.when(0, start, &OPTIONS, Some(ends)), When::At(ends));
        assert_eq!(pace.when(0, ends, &OPTIONS, Some(ends)), When::Now(DataEnd::Open));
    }

    #[test]
    fn an_unterminated_line_is_shipped_when_it_rests() {
        let start = Instant::now();
        let mut pace = Pace::new(10, false, start);
        pace.is_stuck(0, 10, start);
        assert_eq!(pace.when(0, start, &OPTIONS, None), When::At(start + 30 * SECOND));
        let grown = start + 20 * SECOND;
        pace.seen(15, grown);
        assert_eq!(pace.when(0, grown, &OPTIONS, None), When::At(grown + SECOND), "its newline may have come");
        pace.is_stuck(0, 15, grown + SECOND);
        assert_eq!(pace.when(0, grown + SECOND, &OPTIONS, None), When::At(grown + 30 * SECOND));
        assert_eq!(pace.when(0, grown + 30 * SECOND, &OPTIONS, None), When::Now(DataEnd::Final));
    }

    #[test]
    fn a_stream_that_goes_back_is_read_from_there_at_once() {
        let start = Instant::now();
        let mut pace = Pace::new(1010, false, start);
        pace.is_stuck(1000, 1010, start);
        assert_eq!(pace.when(1000, start, &OPTIONS, None), When::At(start + 30 * SECOND));
        assert_eq!(pace.when(0, start, &OPTIONS, None), When::Now(DataEnd::Open));
    }

    #[test]
    fn a_rotated_file_is_read_at_once_and_over_after_the_wait() {
        let start = Instant::now();
        let mut pace = Pace::new(10, false, start);
        pace.rotated(start + SECOND);
        let now = start + SECOND;
        assert_eq!(pace.when(0, now, &OPTIONS, None), When::Now(DataEnd::Open));
        pace.is_stuck(0, 10, now);
        assert_eq!(pace.when(0, now, &OPTIONS, None), When::At(now + 5 * SECOND));
        assert!(!pace.is_over(now, &OPTIONS));
        let late = now + 3 * SECOND;
        pace.seen(12, late);
        pace.is_stuck(0, 12, late);
        assert_eq!(pace.when(0, late, &OPTIONS, None), When::At(late + 5 * SECOND), "its writer still writes");
        assert_eq!(pace.when(0, late + 5 * SECOND, &OPTIONS, None), When::Now(DataEnd::Final));
        assert!(pace.is_over(late + 5 * SECOND, &OPTIONS));
    }

    #[test]
    fn a_complete_file_is_read_to_its_last_byte() {
        let start = Instant::now();
        let mut pace = Pace::new(10, true, start);
        assert_eq!(pace.when(0, start, &OPTIONS, None), When::Now(DataEnd::Open));
        pace.is_stuck(0, 10, start);
        assert_eq!(pace.when(0, start, &OPTIONS, None), When::Now(DataEnd::Final));
    }

    #[test]
    fn a_file_that_was_written_to_and_is_as_long_as_before_is_looked_at_once() {
        let start = Instant::now();
        let mut pace = Pace::new(10, false, start);
        pace.touched();
        assert_eq!(pace.when(10, start, &OPTIONS, None), When::Now(DataEnd::Open));
        pace.is_stuck(10, 10, start);
        assert_eq!(pace.when(10, start, &OPTIONS, None), When::Later);
    }

    #[test]
    fn how_long_bytes_wait_is_known_by_when_they_were_seen() {
        let start = Instant::now();
        let mut pace = Pace::new(10, false, start);
        assert_eq!(pace.behind(10, start + 9 * SECOND), Duration::ZERO);
        assert_eq!(pace.behind(0, start + 9 * SECOND), 9 * SECOND);
        for second in 1..1000_u64 {
            let now = start + SECOND * second as u32;
            pace.seen(10 + second, now);
            let committed = second.saturating_sub(5) + 10;
            pace.committed(committed);
            let behind = pace.behind(committed, now);
            let wanted = SECOND * second.saturating_sub(1).min(4) as u32;
            assert!((wanted..=wanted + SECOND).contains(&behind), "{behind:?} after {second} s");
        }
        // From now on nothing is committed.
        for second in 1000..2000_u64 {
            pace.seen(10 + second, start + SECOND * second as u32);
        }
        let now = start + 2000 * SECOND;
        assert!(pace.sizes.len() <= MAX_SIZES);
        assert_eq!(pace.behind(1004, now), 1005 * SECOND);
        pace.seen(5, now);
        assert_eq!((pace.behind(5, now), pace.behind(0, now + SECOND)), (Duration::ZERO, SECOND));
    }

    #[test]
    fn a_file_that_became_shorter_is_looked_at() {
        let start = Instant::now();
        let mut pace = Pace::new(10, false, start);
        pace.seen(3, start);
        assert_eq!(pace.when(10, start, &OPTIONS, None), When::Now(DataEnd::Open));
    }
}
