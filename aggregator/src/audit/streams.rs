//! What the frames of many files say of their streams together. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde::Serialize;
use tributary_common::frame::SliceDescriptor;
use tributary_common::ids::{AgentId, CategoryName, StreamId};
use tributary_common::position::{Position, TailHash};
use tributary_common::ranges::RangeSet;

/// A file of the audit, by its place in the list of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileNo(pub(super) u32);

/// How near a slice lies to the oldest hour of its category that has its own files: before it, retention may have removed
/// what the rest of the stream is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Age {
    /// In the first minutes of that hour, where lines of the one before it stand between its own; or before it, where only late
    /// files are left.
    Edge,
    /// In that hour.
    Oldest,
    /// Later.
    Later,
}

/// What is known of the hours before the oldest one of a category.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Older {
    /// There were none.
    None,
    /// Some may have been removed.
    Perhaps,
    /// They were not read.
    Unread,
}

/// A piece of a stream in a published file.
#[derive(Debug, Clone, Copy)]
struct Piece {
    start: u64,
    end: u64,
    file: FileNo,
    frame: u64,
    altered: bool,
    age: Age,
}

#[derive(Debug)]
struct Stream {
    agent: AgentId,
    host: String,
    /// The lowest one.
    base: u64,
    /// All that frames name: one, if nothing is wrong.
    bases: Vec<(Position, FileNo)>,
    pieces: Vec<Piece>,
    /// The positions at which frames stand that don't continue one another, by all that name one.
    ends: Vec<(Position, FileNo)>,
    /// Where the frame that was added last ends. Most go on from there, and nothing is kept of the place between two that do.
    last: Option<(Position, FileNo)>,
    /// In files that are not published yet, or declared as lost: they fill gaps, and nothing else.
    elsewhere: RangeSet,
}

/// What the streams of one or more categories have.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: BTreeMap<(CategoryName, StreamId), Stream>,
    lost: BTreeMap<(CategoryName, StreamId), RangeSet>,
}

/// A stream, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct StreamName {
    /// Its category.
    pub(super) category: CategoryName,
    /// Its id.
    pub(super) stream: StreamId,
    /// The agent that reads it.
    pub(super) agent: AgentId,
    /// That agent's host name when it last sent.
    pub(super) host: String,
}

/// A place in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FramePlace {
    /// The file.
    pub(super) file: FileNo,
    /// Where the frame begins in it.
    pub(super) offset: u64,
}

/// What doesn't fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Misfit {
    /// Bytes that no file has.
    Gap(Range<u64>),
    /// Bytes that no file has, and that may have been in an hour before all that were read.
    Before(Range<u64>),
    /// Bytes that two frames have.
    Overlap {
        /// Which bytes.
        bytes: Range<u64>,
        /// The one frame.
        first: FramePlace,
        /// The other.
        second: FramePlace,
        /// Whether one of them holds altered records, of which nobody can say which bytes they came from.
        altered: bool,
    },
    /// Two frames name other bytes before the same place of the stream, or other beginnings of it.
    Contradiction {
        /// The offset of the place.
        offset: u64,
        /// The one file.
        first: FileNo,
        /// The other.
        second: FileNo,
    },
}

impl Streams {
    /// Adds a slice of a published file.
    pub(super) fn add(&mut self, category: &CategoryName, slice: &SliceDescriptor, file: FileNo, frame: u64, age: Age) {
        let altered = slice.altered;
        let stream = self.stream(category, slice);
        for run in &slice.runs {
            let Range { start, end } = run.range();
            match stream.pieces.last_mut() {
                // Most batches follow one another in the same file.
                Some(last) if last.end == start && last.file == file && last.altered == altered && last.age == age => {
                    last.end = end;
                }
                _ => stream.pieces.push(Piece { start, end, file, frame, altered, age }),
            }
        }
        if stream.bases.iter().all(|(base, _)| *base != slice.base) {
            stream.bases.push((slice.base, file));
        }
        if stream.last.is_none_or(|(last, _)| last != slice.start) {
            stream.ends.extend(stream.last);
            stream.ends.push((slice.start, file));
        }
        stream.last = Some((slice.end, file));
    }

    /// Adds a slice of a file that is not published yet.
    pub(super) fn add_unpublished(&mut self, category: &CategoryName, slice: &SliceDescriptor) {
        let stream = self.stream(category, slice);
        slice.runs.iter().for_each(|run| stream.elsewhere.insert(run.range()));
    }

    /// Adds bytes that a manifest declares as lost: no file has them, and that is known.
    pub(super) fn add_lost(&mut self, category: &CategoryName, stream: StreamId, bytes: Range<u64>) {
        self.lost.entry((category.clone(), stream)).or_default().insert(bytes);
    }

    fn stream(&mut self, category: &CategoryName, slice: &SliceDescriptor) -> &mut Stream {
        let stream = self.streams.entry((category.clone(), slice.stream)).or_insert_with(|| Stream {
            agent: slice.agent.clone(),
            host: slice.host.clone(),
            base: slice.base.offset,
            bases: Vec::new(),
            pieces: Vec::new(),
            ends: Vec::new(),
            last: None,
            elsewhere: RangeSet::new(),
        });
        if stream.host != slice.host {
            stream.host.clone_from(&slice.host);
        }
        stream.base = stream.base.min(slice.base.offset);
        stream
    }

    /// How many streams there are.
    #[must_use]
    pub(super) fn count(&self) -> usize {
        self.streams.len()
    }

    /// What was declared as lost fills the gaps of its stream.
    fn fill_with_lost(&mut self) {
        let streams = &mut self.streams;
        // One of which nothing was seen yet may be seen by the next look.
        self.lost.retain(|key, lost| {
            let Some(stream) = streams.get_mut(key) else { return true };
            lost.iter().for_each(|bytes| stream.elsewhere.insert(bytes));
            false
        });
    }

    /// The categories with streams of which bytes are in no file; `older` says what is known of a category's older hours.
    pub(super) fn with_gaps(&mut self, older: impl Fn(&CategoryName) -> Older) -> BTreeSet<CategoryName> {
        self.fill_with_lost();
        let mut found = BTreeSet::new();
        for ((category, _), stream) in &mut self.streams {
            if !found.contains(category) {
                let misfits = stream.gaps_and_overlaps(older(category));
                if misfits.iter().any(|misfit| matches!(misfit, Misfit::Gap(_))) {
                    found.insert(category.clone());
                }
            }
        }
        found
    }

    /// All that doesn't fit, stream by stream; `older` says what is known of a category's older hours.
    pub(super) fn misfits(
        &mut self,
        older: impl Fn(&CategoryName) -> Older,
    ) -> impl Iterator<Item = (StreamName, Misfit)> {
        self.fill_with_lost();
        self.streams.iter_mut().flat_map(move |((category, id), stream)| {
            let name = StreamName {
                category: category.clone(),
                stream: *id,
                agent: stream.agent.clone(),
                host: stream.host.clone(),
            };
            let mut found = stream.contradictions();
            found.extend(stream.gaps_and_overlaps(older(category)));
            found.into_iter().map(move |misfit| (name.clone(), misfit))
        })
    }
}

impl Stream {
    fn contradictions(&self) -> Vec<Misfit> {
        let mut known: BTreeMap<u64, (TailHash, FileNo)> = BTreeMap::new();
        let mut found = Vec::new();
        for (position, file) in self.bases.iter().chain(&self.ends).chain(&self.last) {
            let (tail, first) = *known.entry(position.offset).or_insert((position.tail, *file));
            if tail != position.tail {
                found.push(Misfit::Contradiction { offset: position.offset, first, second: *file });
            }
        }
        found
    }

    fn gaps_and_overlaps(&mut self, older: Older) -> Vec<Misfit> {
        self.pieces.sort_by_key(|piece| (piece.start, piece.end));
        let mut found = Vec::new();
        let Some(first) = self.pieces.first() else { return found };
        let mut have: (u64, Piece) = (first.start, *first);
        let beginning = self.elsewhere.missing(self.base..first.start.max(self.base));
        let begins_before = match older {
            Older::None => false,
            Older::Perhaps => first.age <= Age::Oldest && !beginning.is_empty(),
            Older::Unread => true,
        };
        found.extend(beginning.into_iter().map(if begins_before { Misfit::Before } else { Misfit::Gap }));
        for piece in &self.pieces {
            if piece.start > have.0 {
                let before = begins_before && have.1.age == Age::Edge;
                let missing = self.elsewhere.missing(have.0..piece.start).into_iter();
                found.extend(missing.map(if before { Misfit::Before } else { Misfit::Gap }));
            } else if piece.start < have.0 {
                found.push(Misfit::Overlap {
                    bytes: piece.start..piece.end.min(have.0),
                    first: FramePlace { file: have.1.file, offset: have.1.frame },
                    second: FramePlace { file: piece.file, offset: piece.frame },
                    altered: have.1.altered || piece.altered,
                });
            }
            if piece.end > have.0 {
                have = (piece.end, *piece);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{at, category};
    use proptest::prelude::*;
    use tributary_common::frame::Run;

    const S: StreamId = StreamId(7);

    fn slice(start: u64, end: u64) -> SliceDescriptor {
        SliceDescriptor {
            agent: "web-1".parse().expect("valid"),
            host: "web-1.example".into(),
            stream: S,
            base: Position::zero(),
            start: at(S, start),
            end: at(S, end),
            batch_hash: None,
            runs: vec![Run { start, len: end - start, stored: end - start }],
            records: 1,
            prefix_len: 0,
            altered: false,
            first_time_ms: 0,
            last_time_ms: 0,
        }
    }

    #[test]
    fn of_a_long_stream_without_a_break_a_few_positions_are_kept_and_a_break_in_it_is_found_all_the_same() {
        let mut streams = Streams::default();
        let mut kept = Vec::new();
        for n in 0..10_000 {
            // Some hundred frames in each file.
            streams.add(&category(), &slice(n * 10, n * 10 + 10), FileNo((n / 200) as u32), n, Age::Later);
            let stream = &streams.streams[&(category(), S)];
            kept.push((stream.bases.len() + stream.ends.len(), stream.pieces.len()));
        }
        assert_eq!(kept[1], (2, 1));
        assert_eq!(kept[9_999], (2, 50), "of each file one piece is kept, and no position");
        let mut other = slice(100_000, 100_010);
        other.start.tail = TailHash(1);
        streams.add(&category(), &other, FileNo(50), 0, Age::Later);
        streams.add(&category(), &slice(100_020, 100_030), FileNo(50), 10, Age::Later);
        let found: Vec<Misfit> = streams.misfits(|_| Older::None).map(|(_, misfit)| misfit).collect();
        let contradiction = Misfit::Contradiction { offset: 100_000, first: FileNo(49), second: FileNo(50) };
        assert_eq!(found, [contradiction, Misfit::Gap(100_010..100_020)]);
    }

    #[test]
    fn a_beginning_of_other_bytes_contradicts_however_many_frames_name_it() {
        let mut streams = Streams::default();
        streams.add(&category(), &slice(0, 100), FileNo(0), 0, Age::Later);
        for n in 1..10 {
            let mut other = slice(n * 100, n * 100 + 100);
            other.base.tail = TailHash(1);
            streams.add(&category(), &other, FileNo(1), n, Age::Later);
        }
        let found: Vec<Misfit> = streams.misfits(|_| Older::None).map(|(_, misfit)| misfit).collect();
        assert_eq!(found, [Misfit::Contradiction { offset: 0, first: FileNo(0), second: FileNo(1) }]);
    }

    fn misfits(pieces: &[(u64, u64)]) -> Vec<Misfit> {
        let mut streams = Streams::default();
        for (index, (start, end)) in pieces.iter().enumerate() {
            streams.add(&category(), &slice(*start, *end), FileNo(index as u32), 0, Age::Later);
        }
        streams.misfits(|_| Older::None).map(|(_, misfit)| misfit).collect()
    }

    #[test]
    fn a_stream_in_pieces_of_any_order_fits() {
        assert_eq!(misfits(&[(100, 200), (0, 100), (200, 201)]), []);
    }

    #[test]
    fn what_is_missing_and_what_is_double_is_named() {
        assert_eq!(misfits(&[(100, 200), (250, 300)]), [Misfit::Gap(0..100), Misfit::Gap(200..250)]);
        let found = misfits(&[(0, 100), (50, 150)]);
        let place = |file| FramePlace { file: FileNo(file), offset: 0 };
        assert_eq!(found, [Misfit::Overlap { bytes: 50..100, first: place(0), second: place(1), altered: false }]);
    }

    #[test]
    fn bytes_that_wait_to_be_published_or_were_declared_lost_are_no_gap() {
        let mut streams = Streams::default();
        streams.add(&category(), &slice(0, 100), FileNo(0), 0, Age::Later);
        streams.add(&category(), &slice(300, 400), FileNo(0), 0, Age::Later);
        streams.add_unpublished(&category(), &slice(100, 200));
        streams.add_lost(&category(), S, 200..250);
        let found: Vec<Misfit> = streams.misfits(|_| Older::None).map(|(_, misfit)| misfit).collect();
        assert_eq!(found, [Misfit::Gap(250..300)]);
    }

    #[test]
    fn a_loss_is_known_also_of_a_stream_that_is_seen_only_by_a_later_look() {
        let mut streams = Streams::default();
        streams.add_lost(&category(), S, 0..50);
        assert!(streams.with_gaps(|_| Older::None).is_empty());
        streams.add(&category(), &slice(50, 100), FileNo(0), 0, Age::Later);
        assert!(streams.with_gaps(|_| Older::None).is_empty());
    }

    #[test]
    fn a_frame_of_other_bytes_at_the_same_place_contradicts() {
        let mut streams = Streams::default();
        streams.add(&category(), &slice(0, 100), FileNo(0), 0, Age::Later);
        let mut other = slice(100, 200);
        other.start.tail = TailHash(99);
        streams.add(&category(), &other, FileNo(1), 0, Age::Later);
        let found: Vec<Misfit> = streams.misfits(|_| Older::None).map(|(_, misfit)| misfit).collect();
        assert_eq!(found, [Misfit::Contradiction { offset: 100, first: FileNo(0), second: FileNo(1) }]);
    }

    #[test]
    fn only_what_may_lie_before_the_oldest_hour_is_no_gap() {
        // Crosses into the oldest hour, with lines of the one before it between its first ones, and has a later gap.
        let ages = [(100, 110, Age::Edge), (120, 200, Age::Edge), (200, 210, Age::Oldest), (220, 300, Age::Later)];
        let found = |skip: usize, older| {
            let mut streams = Streams::default();
            for (start, end, age) in ages.into_iter().skip(skip) {
                streams.add(&category(), &slice(start, end), FileNo(0), 0, age);
            }
            let gapped = !streams.with_gaps(|_| older).is_empty();
            let misfits: Vec<Misfit> = streams.misfits(|_| older).map(|(_, misfit)| misfit).collect();
            assert_eq!(gapped, misfits.iter().any(|misfit| matches!(misfit, Misfit::Gap(_))));
            misfits
        };
        let (gap, before) = (Misfit::Gap, Misfit::Before);
        assert_eq!(found(0, Older::None), [gap(0..100), gap(110..120), gap(210..220)]);
        assert_eq!(found(0, Older::Perhaps), [before(0..100), before(110..120), gap(210..220)]);
        assert_eq!(found(0, Older::Unread), [before(0..100), before(110..120), gap(210..220)]);
        // One that comes up only later says nothing of what was removed, unless older hours were left out.
        assert_eq!(found(3, Older::Perhaps), [gap(0..220)]);
        assert_eq!(found(3, Older::Unread), [before(0..220)]);
        // One that begins in the oldest hour has all its bytes.
        let mut streams = Streams::default();
        for (start, end) in [(0, 100), (110, 200)] {
            streams.add(&category(), &slice(start, end), FileNo(0), 0, Age::Edge);
        }
        let misfits: Vec<Misfit> = streams.misfits(|_| Older::Perhaps).map(|(_, misfit)| misfit).collect();
        assert_eq!(misfits, [gap(100..110)]);
    }

    proptest! {
        /// Bytes are counted one by one: every byte that is not there once is named, and no other.
        #[test]
        fn exactly_the_bytes_that_are_not_there_once_are_named(
            pieces in prop::collection::vec((0_u64..60, 1_u64..20), 1..12),
        ) {
            let pieces: Vec<(u64, u64)> = pieces.into_iter().map(|(start, len)| (start, start + len)).collect();
            let count = |at: u64| pieces.iter().filter(|(start, end)| (*start..*end).contains(&at)).count();
            let end = pieces.iter().map(|(_, end)| *end).max().expect("not empty");
            let found = misfits(&pieces);
            for at in 0..end {
                let gaps = found.iter().filter(|one| matches!(one, Misfit::Gap(gap) if gap.contains(&at))).count();
                let double = found.iter().filter(|one| matches!(one, Misfit::Overlap { bytes, .. } if bytes.contains(&at))).count();
                prop_assert_eq!(gaps, usize::from(count(at) == 0));
                prop_assert_eq!(double > 0, count(at) > 1, "at {}", at);
            }
        }
    }
}
