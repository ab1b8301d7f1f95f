//! The one rule of every tier, for one stream: hold an unbroken run of bytes from `committed`, take what continues it,
//! let go only of what is committed. Nothing here knows files, clocks or tasks.
//!
//! ```text
//!             committed                next                end
//! stream: ------|------------------------|------------------|----->
//!          [  entry  ][  entry  ][ entry ][ entry not yet safe ]
//!            entries may overlap; each begins at or before the end of those before it
//! ```
//!
//! # Invariants
//!
//! 1. `unbroken`: the first entry begins at or before `committed`, each other one at or before the end of the one
//!    before it.
//! 2. `forward`: the entries' ends grow strictly, and all lie behind `committed`.

use std::collections::VecDeque;

use tributary_common::position::Position;

/// Where an entry lies in the spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The number of the segment file.
    pub segment: u64,
    /// Where in the file the entry begins, in bytes.
    pub offset: u64,
    /// The entry's length in bytes.
    pub len: u32,
}

/// What is kept in memory of a batch in the spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where the batch begins in the stream.
    pub start: Position,
    /// Where it ends.
    pub end: Position,
    /// Where it lies in the spool.
    pub place: Place,
    /// When the first aggregator received it, milliseconds since 1970.
    pub received_ms: i64,
}

/// What the rule says to a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Offer {
    /// It continues the run: store it, then [`Run::push`].
    Take,
    /// All of it lies inside the run.
    Held,
    /// All of it lies below `committed`.
    BelowCommitted,
    /// It begins behind the run's end: the sender goes back to [`Run::next`].
    Beyond,
    /// It names a position that this run has with other bytes before it: the file is another one than before.
    Diverged,
}

/// One stream's run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    committed: Position,
    entries: VecDeque<Entry>,
    /// How many of the entries, from the front, are known to be on disk.
    safe: usize,
}

impl Run {
    /// An empty run.
    #[must_use]
    pub fn begin(committed: Position) -> Self {
        Self { committed, entries: VecDeque::new(), safe: 0 }
    }

    /// How far the stream is known to be durable on the sink.
    #[must_use]
    pub fn committed(&self) -> Position {
        self.committed
    }

    /// The end of what is safe here: the byte that the sender is to send next.
    #[must_use]
    pub fn next(&self) -> Position {
        self.safe.checked_sub(1).and_then(|last| self.entries.get(last)).map_or(self.committed, |entry| entry.end)
    }

    /// The end of the run, with what is still being written.
    fn end(&self) -> Position {
        self.entries.back().map_or(self.committed, |entry| entry.end)
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All entries, in order.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &Entry> + DoubleEndedIterator {
        self.entries.iter()
    }

    /// The entries on disk that hold anything at or behind `offset`, in order. The first of them holds the byte at
    /// `offset` unless that lies below `committed`.
    pub fn safe_from(&self, offset: u64) -> impl Iterator<Item = &Entry> {
        let from = self.entries.partition_point(|entry| entry.end.offset <= offset);
        self.entries.range(from.min(self.safe)..self.safe)
    }

    /// What to do with a batch from `start` to `end`.
    #[must_use]
    pub fn offer(&self, start: Position, end: Position) -> Offer {
        if self.contradicts(start) || self.contradicts(end) {
            Offer::Diverged
        } else if end.offset <= self.committed.offset {
            Offer::BelowCommitted
        } else if end.offset <= self.end().offset {
            Offer::Held
        } else if start.offset <= self.end().offset {
            Offer::Take
        } else {
            Offer::Beyond
        }
    }

    /// Whether this run knows the same offset with another tail hash.
    fn contradicts(&self, position: Position) -> bool {
        let known = if position.offset == self.committed.offset {
            Some(self.committed)
        } else {
            let at = self.entries.partition_point(|entry| entry.end.offset < position.offset);
            self.entries.get(at).map(|entry| entry.end).filter(|end| end.offset == position.offset)
        };
        known.is_some_and(|known| known.tail != position.tail)
    }

    /// Appends a batch that [`Run::offer`] said to take. It is not safe before [`Run::settle`].
    ///
    /// # Panics
    /// In debug builds, when the batch does not continue the run.
    pub fn push(&mut self, entry: Entry) {
        debug_assert_eq!(self.offer(entry.start, entry.end), Offer::Take, "only what continues a run is pushed");
        self.entries.push_back(entry);
        self.check();
    }

    /// All that was pushed is on disk.
    pub fn settle(&mut self) {
        self.safe = self.entries.len();
    }

    /// What was pushed since [`Run::settle`] did not get to disk. Returns those entries.
    pub fn retract(&mut self) -> Vec<Entry> {
        let lost = self.entries.drain(self.safe..).collect();
        self.check();
        lost
    }

    /// Learns how far the stream is committed; the highest one told counts. Returns the entries that this covers to their
    /// end: they leave.
    pub fn commit(&mut self, told: Position) -> Vec<Entry> {
        if told.offset <= self.committed.offset {
            return Vec::new();
        }
        let leave = self.entries.partition_point(|entry| entry.end.offset <= told.offset);
        let left = self.entries.drain(..leave).collect();
        self.safe = self.safe.saturating_sub(leave);
        self.committed = told;
        self.check();
        left
    }

    /// The entry at `place` turned out to be unreadable: the run ends before it. Returns it and those behind it.
    pub fn cut(&mut self, place: Place) -> Vec<Entry> {
        let Some(at) = self.entries.iter().position(|entry| entry.place == place) else { return Vec::new() };
        let cut = self.entries.drain(at..).collect();
        self.safe = self.safe.min(at);
        self.check();
        cut
    }

    /// Takes all entries out.
    pub fn into_entries(self) -> impl Iterator<Item = Entry> {
        self.entries.into_iter()
    }

    /// What of the invariants does not hold.
    fn violation(&self) -> Option<&'static str> {
        let mut end = self.committed.offset;
        for entry in &self.entries {
            if entry.start.offset > end {
                return Some("unbroken");
            }
            if entry.end.offset <= end {
                return Some("forward");
            }
            end = entry.end.offset;
        }
        (self.safe > self.entries.len()).then_some("safe")
    }

    fn check(&self) {
        if cfg!(debug_assertions)
            && let Some(invariant) = self.violation()
        {
            panic!("the invariant `{invariant}` of a run does not hold: {self:?}");
        }
    }

    /// As `Run::check`, for release builds, where it is too dear after each change: the name of the invariant that
    /// does not hold.
    #[must_use]
    pub fn broken_invariant(&self) -> Option<&'static str> {
        self.violation()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tributary_common::position::TailHash;

    fn at(offset: u64) -> Position {
        Position { offset, tail: TailHash(offset) }
    }

    fn entry(start: u64, end: u64) -> Entry {
        Entry {
            start: at(start),
            end: at(end),
            place: Place { segment: 0, offset: start * 1000 + end, len: 1 },
            received_ms: 0,
        }
    }

    fn run(committed: u64, entries: &[(u64, u64)]) -> Run {
        let mut run = Run::begin(at(committed));
        for &(start, end) in entries {
            run.push(entry(start, end));
        }
        run.settle();
        run
    }

    #[test]
    fn what_continues_the_run_is_taken_also_where_it_overlaps() {
        let run = run(100, &[(100, 200), (200, 300)]);
        for (start, end, offer) in [
            (300, 400, Offer::Take),
            (250, 400, Offer::Take),
            (0, 301, Offer::Take),
            (200, 300, Offer::Held),
            (50, 101, Offer::Held),
            (0, 100, Offer::BelowCommitted),
            (301, 400, Offer::Beyond),
        ] {
            assert_eq!(run.offer(at(start), at(end)), offer, "{start}..{end}");
        }
    }

    #[test]
    fn a_known_position_with_other_bytes_before_it_is_another_file() {
        let run = run(100, &[(100, 200), (200, 300)]);
        let other = |offset| Position { offset, tail: TailHash(7) };
        assert_eq!(run.offer(other(300), at(400)), Offer::Diverged);
        assert_eq!(run.offer(other(100), at(400)), Offer::Diverged);
        assert_eq!(run.offer(at(100), other(200)), Offer::Diverged);
        assert_eq!(run.offer(other(250), at(400)), Offer::Take, "no batch ended at 250: nothing is known of it here");
    }

    #[test]
    fn an_entry_leaves_only_when_committed_covers_its_end() {
        let mut run = run(0, &[(0, 100), (50, 150), (150, 200)]);
        assert_eq!(run.commit(at(99)), []);
        assert_eq!(run.commit(at(100)), [entry(0, 100)]);
        assert_eq!(run.commit(at(60)), [], "what is committed stays so");
        assert_eq!(run.committed(), at(100));
        assert_eq!(run.commit(at(1000)).len(), 2);
        assert_eq!((run.next(), run.is_empty()), (at(1000), true), "what is above has more: the run goes on there");
    }

    #[test]
    fn what_is_not_on_disk_is_not_promised() {
        let mut run = run(0, &[(0, 100)]);
        run.push(entry(100, 200));
        assert_eq!(run.next(), at(100));
        assert_eq!(run.offer(at(100), at(200)), Offer::Held);
        assert_eq!(run.safe_from(0).count(), 1);
        let mut failed = run.clone();
        assert_eq!(failed.retract(), [entry(100, 200)]);
        assert_eq!(failed.offer(at(100), at(200)), Offer::Take);
        run.settle();
        assert_eq!(run.next(), at(200));
    }

    #[test]
    fn a_run_ends_before_an_unreadable_entry() {
        let mut run = run(0, &[(0, 100), (100, 200), (200, 300)]);
        assert_eq!(run.cut(entry(100, 200).place).len(), 2);
        assert_eq!(run.next(), at(100));
        assert_eq!(run.offer(at(300), at(400)), Offer::Beyond);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Offer(u64, u64),
        Settle,
        Retract,
        Commit(u64),
        Cut(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0_u64..40, 1_u64..12).prop_map(|(start, len)| Step::Offer(start, start + len)),
            3 => Just(Step::Settle),
            1 => Just(Step::Retract),
            2 => (0_u64..45).prop_map(Step::Commit),
            1 => (0_usize..6).prop_map(Step::Cut),
        ];
        proptest::collection::vec(step, 0..60)
    }

    proptest! {
        /// The model: which bytes are held on disk, byte by byte.
        #[test]
        fn the_run_promises_exactly_the_bytes_that_it_holds(steps in steps(), committed in 0_u64..10) {
            let mut run = Run::begin(at(committed));
            let (mut committed, mut safe, mut pending) = (committed, Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Offer(start, end) => {
                        let reach = safe.iter().chain(&pending).map(|entry: &Entry| entry.end.offset).max();
                        let reach = reach.unwrap_or(0).max(committed);
                        let expected = if end <= committed { Offer::BelowCommitted }
                            else if end <= reach { Offer::Held }
                            else if start <= reach { Offer::Take }
                            else { Offer::Beyond };
                        prop_assert_eq!(run.offer(at(start), at(end)), expected.clone());
                        if expected == Offer::Take {
                            run.push(entry(start, end));
                            pending.push(entry(start, end));
                        }
                    }
                    Step::Settle => {
                        run.settle();
                        safe.append(&mut pending);
                    }
                    Step::Retract => prop_assert_eq!(run.retract(), std::mem::take(&mut pending)),
                    Step::Commit(to) => {
                        let left = run.commit(at(to));
                        committed = committed.max(to);
                        prop_assert!(left.iter().all(|entry| entry.end.offset <= committed));
                        safe.retain(|entry| entry.end.offset > committed);
                        pending.retain(|entry| entry.end.offset > committed);
                    }
                    Step::Cut(n) => {
                        let all: Vec<Entry> = safe.iter().chain(&pending).copied().collect();
                        if let Some(entry) = all.get(n) {
                            prop_assert_eq!(run.cut(entry.place), all[n..].to_vec());
                            pending.truncate(n.saturating_sub(safe.len()));
                            safe.truncate(n);
                        }
                    }
                }
                prop_assert_eq!(run.broken_invariant(), None);
                prop_assert_eq!(run.committed().offset, committed);
                let next = run.next().offset;
                prop_assert_eq!(next, safe.last().map_or(committed, |entry| entry.end.offset));
                for byte in committed..next {
                    let holder = run.safe_from(byte).next().expect("a promised byte is held");
                    prop_assert!((holder.start.offset..holder.end.offset).contains(&byte));
                }
                prop_assert_eq!(run.safe_from(next).count(), 0);
            }
        }
    }
}
