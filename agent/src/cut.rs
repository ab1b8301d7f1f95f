//! Cuts the bytes of a log into records, and batches of records into slices by the bucket of their time. Pure: bytes in,
//! a plan out.
//!
//! Whole batches of one bucket, unaltered and without a prefix, are the usual case: there the bytes that are stored are
//! the bytes that were read, and nothing is copied.
//!
//! # What is done with odd lines
//!
//! | Line | What becomes of it |
//! |---|---|
//! | longer than `max_line_bytes`, `long_lines = "split"` | several records, each with a newline added but the last |
//! | … `"truncate"` | its first `max_line_bytes` bytes and a newline |
//! | … `"drop"` | nothing; its bytes are covered by a run that stores none |
//! | the last one, without a newline | waits, until [`DataEnd::Final`]: then a newline is added |
//! | the newline that comes after such an addition | stored as nothing: the record has its newline |
//! | without a time | has the time of the line before |
//!
//! All of these but the last make the slice `altered`.

use std::ops::Range;

use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::frame::Run;
use tributary_common::limits::{MAX_RUNS_PER_SLICE, MAX_SLICES_PER_BATCH};

use crate::config::LongLines;
use crate::find;
use crate::tally::Share;
use crate::timestamp::{LineTime, TimeReader};

/// How lines become records.
#[derive(Debug, Clone)]
pub struct CutOptions {
    /// The most bytes of a line, its newline not counted.
    pub max_line_bytes: usize,
    /// What is done with longer ones.
    pub long_lines: LongLines,
    /// What is put before each record.
    pub prefix: bytes::Bytes,
    /// The size of the buckets.
    pub bucket: BucketSize,
    /// A batch ends before its stored bytes, prefixes included, get more than this.
    pub max_stored_bytes: usize,
}

/// What comes behind the bytes at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataEnd {
    /// More bytes, or at least there may be more: an unterminated line waits.
    Open,
    /// Nothing, ever or for long: an unterminated line is a record.
    Final,
}

/// The bytes to cut.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The bytes.
    pub data: &'a [u8],
    /// Where they begin in the stream.
    pub offset: u64,
    /// What comes behind them.
    pub end: DataEnd,
    /// Whether the byte before them is not a newline, so that they begin inside of a line.
    pub inside_line: bool,
    /// Whether that line is one whose rest is to be stored as nothing.
    pub skipping: bool,
    /// The time of the line before, milliseconds since 1970, if known.
    pub carry_ms: Option<i64>,
    /// The clock, milliseconds since 1970: the time of lines that have none before them.
    pub now_ms: i64,
}

/// A batch, planned.
#[derive(Debug, Default)]
pub struct Cut {
    /// How many bytes it takes, from the beginning of the data; 0 where there is no whole record.
    pub len: usize,
    /// Its slices, in the order of their first records.
    pub slices: Vec<SliceCut>,
    /// The time of its last line that says one, or the one handed in.
    pub carry_ms: Option<i64>,
    /// Lines that it takes.
    pub lines: u64,
    /// Lines that were split, truncated, dropped or given a newline.
    pub altered: u64,
    /// Lines whose time was not believed.
    pub implausible: u64,
    /// Whether a line was filed under the time of reading: read another time, it may be in another bucket.
    pub guessed: bool,
}

/// One slice, planned.
#[derive(Debug)]
pub struct SliceCut {
    /// The bucket of its records.
    pub bucket: Bucket,
    /// The pieces of the stream in it.
    pub runs: Vec<Run>,
    /// Records that are stored.
    pub records: u64,
    /// Whether some record was altered.
    pub altered: bool,
    /// The earliest time of a line in it, milliseconds since 1970.
    pub first_time_ms: i64,
    /// The latest.
    pub last_time_ms: i64,
    /// The stored bytes, where they are not those of the runs.
    copied: Option<Vec<u8>>,
}

impl Cut {
    /// What it has for each bucket, where another reading gives the same.
    #[must_use]
    pub fn shares(&self) -> Vec<Share> {
        let share = |slice: &SliceCut| Share {
            bucket: slice.bucket,
            records: slice.records,
            bytes: slice.runs.iter().map(|run| run.len).sum(),
        };
        if self.guessed { Vec::new() } else { self.slices.iter().map(share).collect() }
    }
}

impl SliceCut {
    /// The stored bytes: of `data` itself where they are one piece of it, else gathered in `scratch`.
    #[must_use]
    pub fn stored<'a>(&'a self, data: &'a [u8], offset: u64, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let piece = |run: &Run| {
            let from = (run.start - offset) as usize;
            &data[from..from + run.len as usize]
        };
        match (&self.copied, self.runs.as_slice()) {
            (Some(copied), _) => copied,
            (None, [run]) => piece(run),
            (None, runs) => {
                scratch.clear();
                for run in runs {
                    scratch.extend_from_slice(piece(run));
                }
                scratch
            }
        }
    }

    /// From now on the stored bytes are others than those of the runs.
    fn copied(&mut self, data: &[u8], offset: u64) -> &mut Vec<u8> {
        let runs = &self.runs;
        self.copied.get_or_insert_with(|| {
            let mut copied = Vec::new();
            for run in runs {
                let from = (run.start - offset) as usize;
                copied.extend_from_slice(&data[from..from + run.len as usize]);
            }
            copied
        })
    }
}

/// How the bytes of one record are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    /// As they are.
    AsIs,
    /// Their first so many, and a newline.
    WithNewline(usize),
    /// Not at all.
    Nothing,
}

struct Cutting<'a> {
    options: &'a CutOptions,
    input: Input<'a>,
    cut: Cut,
    /// The slice of the last record, and what of time belongs to its bucket, in milliseconds.
    current: usize,
    current_ms: Range<i64>,
    /// Lines of these times, and not too long ones, only make the current slice's last run longer.
    plain_ms: Range<i64>,
    stored: usize,
}

/// Lines that follow one another, and only make the current slice's last run longer.
#[derive(Debug, Default)]
struct Span {
    len: usize,
    lines: u64,
    first_ms: i64,
    latest_ms: i64,
    /// The time of the last line.
    carry_ms: Option<i64>,
}

impl Span {
    #[inline]
    fn extend(&mut self, len: usize, ms: i64) {
        let is_first = self.lines == 0;
        self.first_ms = if is_first { ms } else { self.first_ms.min(ms) };
        self.latest_ms = if is_first { ms } else { self.latest_ms.max(ms) };
        self.len += len;
        self.lines += 1;
        self.carry_ms = Some(ms);
    }
}

/// Plans a batch of the records at the beginning of the input. `times` reads the times of lines; without it, all are of
/// the clock's.
#[must_use]
pub fn cut(options: &CutOptions, input: Input<'_>, mut times: Option<&mut TimeReader>) -> Cut {
    let data = input.data;
    let mut cutting = Cutting {
        options,
        input,
        cut: Cut { carry_ms: input.carry_ms, guessed: times.is_none(), ..Cut::default() },
        current: usize::MAX,
        current_ms: 0..0,
        plain_ms: 0..0,
        stored: 0,
    };
    if input.inside_line && !cutting.rest_of_line() {
        return cutting.cut;
    }
    let from = cutting.cut.len;
    let mut at = from;
    let mut span = Span::default();
    for newline in find::places(b'\n', &data[from..]).map(|newline| from + newline) {
        let line = &data[at..newline];
        let time = cutting.time_of(line, times.as_deref_mut());
        let plain = match time {
            LineTime::At(ms) => Some(ms),
            LineTime::None => span.carry_ms.or(cutting.cut.carry_ms),
            LineTime::Implausible => None,
        };
        if let Some(ms) = plain.filter(|ms| cutting.plain_ms.contains(ms))
            && line.len() <= options.max_line_bytes
        {
            span.extend(line.len() + 1, ms);
            at = newline + 1;
            continue;
        }
        cutting.add_span(&std::mem::take(&mut span));
        let before = (cutting.cut.carry_ms, cutting.cut.guessed);
        cutting.carry(time);
        let fits = if line.len() <= options.max_line_bytes {
            cutting.add(at, line.len() + 1, Store::AsIs)
        } else {
            cutting.add_long(at, line.len() + 1, true)
        };
        if !fits {
            if cutting.cut.len == at {
                // Nothing of it is in this batch, nor its time.
                (cutting.cut.carry_ms, cutting.cut.guessed) = before;
            }
            return cutting.cut;
        }
        cutting.count(time);
        at = newline + 1;
    }
    cutting.add_span(&span);
    let rest = &data[at..];
    let long = rest.len() > options.max_line_bytes;
    if long || (input.end == DataEnd::Final && !rest.is_empty()) {
        let time = cutting.time_of(rest, times);
        cutting.carry(time);
        let fits =
            if long { cutting.add_long(at, rest.len(), false) } else { cutting.add_unterminated(at, rest.len()) };
        if fits {
            cutting.count(time);
        }
    }
    cutting.cut
}

impl Cutting<'_> {
    #[inline]
    fn time_of(&self, line: &[u8], times: Option<&mut TimeReader>) -> LineTime {
        times.map_or(LineTime::At(self.input.now_ms), |times| times.read(line, self.input.now_ms))
    }

    /// Notes the time of the line that is added next: it, and those behind it that say none, are filed under it.
    #[inline]
    fn carry(&mut self, time: LineTime) {
        match time {
            LineTime::At(ms) => self.cut.carry_ms = Some(ms),
            LineTime::None => {}
            LineTime::Implausible => {
                self.cut.carry_ms = Some(self.input.now_ms);
                self.cut.guessed = true;
            }
        }
    }

    /// Counts a line that was taken.
    #[inline]
    fn count(&mut self, time: LineTime) {
        self.cut.lines += 1;
        self.cut.implausible += u64::from(time == LineTime::Implausible);
    }

    /// The end of a line whose beginning lies before the data. Returns whether another line can follow.
    fn rest_of_line(&mut self) -> bool {
        let data = self.input.data;
        let newline = memchr::memchr(b'\n', data);
        let len = newline.map_or(data.len(), |newline| newline + 1);
        if len == 0 {
            return false;
        }
        let text = len - usize::from(newline.is_some());
        let fits = if self.input.skipping || data[0] == b'\n' {
            self.add(0, len, Store::Nothing)
        } else if text > self.options.max_line_bytes {
            self.add_long(0, len, newline.is_some())
        } else if newline.is_some() {
            self.add(0, len, Store::AsIs)
        } else {
            self.input.end == DataEnd::Final && self.add_unterminated(0, len)
        };
        fits && newline.is_some()
    }

    /// The last line, without its newline.
    fn add_unterminated(&mut self, at: usize, len: usize) -> bool {
        let added = self.add(at, len, Store::WithNewline(len));
        self.cut.altered += u64::from(added);
        added
    }

    /// A line that is too long, `len` bytes of which are at hand, its newline included if `whole`.
    fn add_long(&mut self, at: usize, len: usize, whole: bool) -> bool {
        let max = self.options.max_line_bytes;
        let added = match self.options.long_lines {
            LongLines::Drop => self.add(at, len, Store::Nothing),
            LongLines::Truncate => {
                let keep = char_boundary(&self.input.data[at..at + len], max);
                self.add(at, len, Store::WithNewline(keep))
            }
            LongLines::Split => {
                let (mut from, end) = (at, at + len);
                let text_end = end - usize::from(whole);
                loop {
                    let left = text_end - from;
                    if left <= max {
                        // What is left of a line that goes on is for the next batch, with what follows.
                        break !whole || self.add(from, end - from, Store::AsIs);
                    }
                    let piece = char_boundary(&self.input.data[from..text_end], max);
                    if !self.add(from, piece, Store::WithNewline(piece)) {
                        // A line that was cut between its pieces goes on in the next batch.
                        break false;
                    }
                    from += piece;
                }
            }
        };
        if added {
            self.cut.altered += 1;
        }
        added
    }

    /// Adds lines, of which each may be added.
    fn add_span(&mut self, span: &Span) {
        let Some(slice) = self.cut.slices.get_mut(self.current).filter(|_| span.lines > 0) else { return };
        if let Some(run) = slice.runs.last_mut() {
            run.len += span.len as u64;
            run.stored += span.len as u64;
        }
        slice.records += span.lines;
        slice.first_time_ms = slice.first_time_ms.min(span.first_ms);
        slice.last_time_ms = slice.last_time_ms.max(span.latest_ms);
        self.stored += span.len;
        self.cut.len += span.len;
        self.cut.lines += span.lines;
        self.cut.carry_ms = span.carry_ms;
    }

    /// Adds `len` bytes at `at` as one record, if the batch has room for it.
    fn add(&mut self, at: usize, len: usize, store: Store) -> bool {
        let prefix = &self.options.prefix;
        let stored = match store {
            Store::AsIs => prefix.len() + len,
            Store::WithNewline(keep) => prefix.len() + keep + 1,
            Store::Nothing => 0,
        };
        if self.stored + stored > self.options.max_stored_bytes && self.cut.len > 0 {
            return false;
        }
        self.cut.guessed |= self.cut.carry_ms.is_none();
        let ms = self.cut.carry_ms.unwrap_or(self.input.now_ms);
        if !self.current_ms.contains(&ms) && !self.go_to_slice(ms) {
            return false;
        }
        let (data, offset) = (self.input.data, self.input.offset);
        let start = offset + at as u64;
        let slice = &mut self.cut.slices[self.current];
        let continues = slice.runs.last().is_some_and(|run| run.start + run.len == start);
        if !continues && slice.runs.len() == MAX_RUNS_PER_SLICE {
            return false;
        }
        if !prefix.is_empty() || store != Store::AsIs || slice.copied.is_some() {
            let copied = slice.copied(data, offset);
            match store {
                Store::AsIs => {
                    copied.extend_from_slice(prefix);
                    copied.extend_from_slice(&data[at..at + len]);
                }
                Store::WithNewline(keep) => {
                    copied.extend_from_slice(prefix);
                    copied.extend_from_slice(&data[at..at + keep]);
                    copied.push(b'\n');
                    slice.altered = true;
                }
                Store::Nothing => slice.altered = true,
            }
        }
        match slice.runs.last_mut() {
            Some(run) if continues => {
                run.len += len as u64;
                run.stored += stored as u64;
            }
            _ => slice.runs.push(Run { start, len: len as u64, stored: stored as u64 }),
        }
        slice.records += u64::from(store != Store::Nothing);
        slice.first_time_ms = slice.first_time_ms.min(ms);
        slice.last_time_ms = slice.last_time_ms.max(ms);
        let is_plain = prefix.is_empty() && slice.copied.is_none();
        self.stored += stored;
        self.cut.len = at + len;
        let has_room = self.stored + (data.len() - self.cut.len) <= self.options.max_stored_bytes;
        self.plain_ms = if is_plain && has_room { self.current_ms.clone() } else { 0..0 };
        true
    }

    /// Makes the slice of the bucket of `ms` the current one, if the batch has room for it.
    fn go_to_slice(&mut self, ms: i64) -> bool {
        let bucket = self.options.bucket.bucket_of_ms(ms);
        let index = match self.cut.slices.iter().position(|slice| slice.bucket == bucket) {
            Some(index) => index,
            None if self.cut.slices.len() == MAX_SLICES_PER_BATCH => return false,
            None => {
                self.cut.slices.push(SliceCut {
                    bucket,
                    runs: Vec::new(),
                    records: 0,
                    altered: false,
                    first_time_ms: ms,
                    last_time_ms: ms,
                    copied: None,
                });
                self.cut.slices.len() - 1
            }
        };
        if self.cut.slices[index].runs.len() == MAX_RUNS_PER_SLICE {
            return false;
        }
        self.current = index;
        self.current_ms = bucket.start_s() * 1000..bucket.end_ms();
        true
    }
}

/// The longest beginning of `bytes`, at most `max` and at least 1 byte long, that does not end inside of a character of
/// UTF-8; simply `max` bytes of what is not UTF-8.
fn char_boundary(bytes: &[u8], max: usize) -> usize {
    let is_continuation = |at: usize| bytes.get(at).is_some_and(|byte| byte & 0b1100_0000 == 0b1000_0000);
    (max.saturating_sub(3).max(1)..=max).rev().find(|at| !is_continuation(*at)).unwrap_or(max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{TimeFormat, TimestampOptions};
    use jiff::tz::TimeZone;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// 2026-11-22T20:00:00Z
    const HOUR_MS: i64 = 1_795_377_600_000;

    fn options() -> CutOptions {
        CutOptions {
            max_line_bytes: 100,
            long_lines: LongLines::Split,
            prefix: bytes::Bytes::new(),
            bucket: BucketSize::HOUR,
            max_stored_bytes: 1 << 20,
        }
    }

    fn times() -> TimeReader {
        TimeReader::new(&TimestampOptions {
            formats: vec![TimeFormat::Strptime("%Y-%m-%dT%H:%M:%SZ".to_owned())],
            after: bytes::Bytes::new(),
            json_field: None,
            timezone: TimeZone::UTC,
        })
    }

    fn input(data: &[u8]) -> Input<'_> {
        Input {
            data,
            offset: 0,
            end: DataEnd::Open,
            inside_line: false,
            skipping: false,
            carry_ms: None,
            now_ms: HOUR_MS + 5,
        }
    }

    fn stored(cut: &Cut, data: &[u8]) -> Vec<Vec<u8>> {
        cut.slices.iter().map(|slice| slice.stored(data, 0, &mut Vec::new()).to_vec()).collect()
    }

    #[test]
    fn whole_lines_of_one_bucket_are_stored_as_they_are_read() {
        let data = b"2026-11-22T20:15:31Z a\n  trace\n2026-11-22T20:15:30Z b\n2026-11-22T20:16:00Z half";
        let cut = cut(&options(), input(data), Some(&mut times()));
        assert_eq!((cut.len, cut.lines, cut.altered), (54, 3, 0));
        let [slice] = cut.slices.as_slice() else { panic!("one slice: {cut:?}") };
        assert_eq!(slice.runs, [Run { start: 0, len: 54, stored: 54 }]);
        assert_eq!((slice.first_time_ms, slice.last_time_ms), (HOUR_MS + 930_000, HOUR_MS + 931_000));
        assert!(slice.copied.is_none() && !slice.altered);
        assert_eq!(stored(&cut, data), [&data[..54]]);
    }

    #[test]
    fn hours_that_interleave_become_runs_of_two_slices() {
        let data = b"2026-11-22T20:59:59Z a\n2026-11-22T21:00:00Z b\n2026-11-22T20:59:59Z c\n";
        let cut = cut(&options(), input(data), Some(&mut times()));
        assert_eq!(cut.len, data.len());
        let runs: Vec<Vec<_>> =
            cut.slices.iter().map(|slice| slice.runs.iter().map(|run| (run.start, run.len)).collect()).collect();
        assert_eq!(runs, [vec![(0, 23), (46, 23)], vec![(23, 23)]]);
        assert_eq!(stored(&cut, data)[0], b"2026-11-22T20:59:59Z a\n2026-11-22T20:59:59Z c\n");
    }

    #[test]
    fn a_batch_ends_before_it_has_too_many_runs_or_slices() {
        let mut data = Vec::new();
        for n in 0..1000 {
            data.extend_from_slice(format!("2026-11-22T{:02}:00:00Z x\n", 20 + n % 2).as_bytes());
        }
        assert_eq!(cut(&options(), input(&data), Some(&mut times())).lines, 1000, "two hours that alternate fit");
        let data_of_more: Vec<u8> = data.repeat(3);
        let interleaved = cut(&options(), input(&data_of_more), Some(&mut times()));
        assert_eq!(interleaved.lines, 2 * MAX_RUNS_PER_SLICE as u64);
        data.clear();
        for n in 0..1000 {
            data.extend_from_slice(format!("2026-11-{:02}T{:02}:00:00Z x\n", 1 + n / 24 % 20, n % 24).as_bytes());
        }
        let spread = cut(&options(), input(&data), Some(&mut times()));
        assert_eq!(spread.lines, MAX_SLICES_PER_BATCH as u64);
    }

    #[test]
    fn a_prefix_is_put_before_each_record_and_bounded() {
        let with_prefix = CutOptions { prefix: "web-1\t".into(), max_stored_bytes: 30, ..options() };
        let cut = cut(&with_prefix, input(b"a\nbb\nccc\ndddd\n"), None);
        assert_eq!((cut.len, cut.lines), (9, 3), "the fourth record would be stored beyond the bound");
        assert_eq!(stored(&cut, b"")[0], b"web-1\ta\nweb-1\tbb\nweb-1\tccc\n");
        assert_eq!(cut.slices[0].runs, [Run { start: 0, len: 9, stored: 27 }]);
        assert!(!cut.slices[0].altered);
    }

    #[test]
    fn the_last_line_waits_for_its_newline_or_for_the_end() {
        let open = cut(&options(), input(b"half"), None);
        assert_eq!((open.len, open.slices.len()), (0, 0));
        let last = cut(&options(), Input { end: DataEnd::Final, ..input(b"whole\nhalf") }, None);
        assert_eq!((last.len, last.lines, last.altered), (10, 2, 1));
        assert_eq!(stored(&last, b"")[0], b"whole\nhalf\n");
        assert_eq!(last.slices[0].runs, [Run { start: 0, len: 10, stored: 11 }]);
    }

    #[test]
    fn the_newline_of_a_line_that_got_one_is_not_another_record() {
        let late = Input { inside_line: true, ..input(b"\nnext\n") };
        let cut = cut(&options(), late, None);
        assert_eq!((cut.len, cut.slices[0].records), (6, 1));
        assert_eq!(stored(&cut, b"")[0], b"next\n");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        assert_eq!(char_boundary("aé".as_bytes(), 2), 1);
        assert_eq!(char_boundary("éa".as_bytes(), 2), 2);
        assert_eq!(char_boundary(&[0x80; 10], 5), 5);
        assert_eq!(char_boundary("€".as_bytes(), 1), 1, "at least one byte");
    }

    #[derive(Debug, Clone)]
    struct Line {
        hour: Option<u8>,
        len: usize,
    }

    fn text_of(lines: &[Line], terminated: bool) -> (Vec<u8>, Vec<(i64, Vec<u8>)>) {
        let (mut data, mut parts, mut hour_ms) = (Vec::new(), Vec::new(), HOUR_MS);
        for (n, line) in lines.iter().enumerate() {
            let mut text = Vec::new();
            if let Some(hour) = line.hour {
                hour_ms = HOUR_MS + i64::from(hour) * 3_600_000;
                text.extend_from_slice(format!("2026-11-22T{:02}:00:00Z ", 20 + hour).as_bytes());
            }
            text.extend_from_slice(format!("{n} ").as_bytes());
            text.extend((0..line.len).map(|at| b'a' + (at % 26) as u8));
            data.extend_from_slice(&text);
            data.push(b'\n');
            parts.push((hour_ms, text));
        }
        if !terminated {
            data.pop();
        }
        (data, parts)
    }

    /// What the records must be, by bucket.
    fn expected(parts: &[(i64, Vec<u8>)], options: &CutOptions) -> BTreeMap<i64, Vec<Vec<u8>>> {
        let mut records: BTreeMap<i64, Vec<Vec<u8>>> = BTreeMap::new();
        for (hour_ms, line) in parts {
            let pieces: Vec<&[u8]> = if line.len() <= options.max_line_bytes {
                vec![line]
            } else {
                match options.long_lines {
                    LongLines::Split => line.chunks(options.max_line_bytes).collect(),
                    LongLines::Truncate => vec![&line[..options.max_line_bytes]],
                    LongLines::Drop => Vec::new(),
                }
            };
            for piece in pieces {
                records.entry(*hour_ms / 1000).or_default().push([&options.prefix[..], piece].concat());
            }
        }
        records
    }

    proptest! {
        /// Whatever the bytes are, each is covered once, and nothing panics.
        #[test]
        fn no_bytes_make_it_panic(
            data in proptest::collection::vec(prop_oneof![3 => any::<u8>(), 1 => Just(b'\n'), 1 => Just(0), 1 => Just(b'\r')], 0..3000),
            max_line_bytes in 1_usize..300,
            max_stored_bytes in 1_usize..2000,
            policy in 0_usize..3,
            (inside_line, skipping, is_final, prefix) in any::<(bool, bool, bool, bool)>(),
            carry_ms in any::<Option<i32>>(),
        ) {
            let options = CutOptions {
                max_line_bytes,
                long_lines: [LongLines::Split, LongLines::Truncate, LongLines::Drop][policy],
                prefix: if prefix { "p ".into() } else { bytes::Bytes::new() },
                max_stored_bytes,
                ..options()
            };
            let input = Input {
                end: if is_final { DataEnd::Final } else { DataEnd::Open },
                inside_line,
                skipping: inside_line && skipping,
                carry_ms: carry_ms.map(i64::from),
                ..input(&data)
            };
            let cut = cut(&options, input, Some(&mut times()));
            let mut covered: Vec<_> = cut.slices.iter().flat_map(|slice| slice.runs.iter().map(Run::range)).collect();
            covered.sort_by_key(|run| run.start);
            let mut reach = 0;
            for run in covered {
                prop_assert_eq!(run.start, reach);
                reach = run.end;
            }
            prop_assert_eq!(reach, cut.len as u64);
            for slice in &cut.slices {
                let stored = slice.stored(&data, 0, &mut Vec::new()).len() as u64;
                prop_assert_eq!(stored, slice.runs.iter().map(|run| run.stored).sum::<u64>());
            }
        }

        /// Lines that are taken together give what they give one by one, as where the batch hasn't room for all that is there.
        #[test]
        fn lines_together_are_the_lines_one_by_one(
            lines in proptest::collection::vec(
                (prop_oneof![6 => 0_u32..3, 1 => Just(90), 2 => Just(99)], 0..60_u32, 0_usize..79),
                2..60,
            ),
            carry_ms in prop_oneof![Just(None), (HOUR_MS..HOUR_MS + 7_200_000).prop_map(Some)],
            timed in proptest::bool::weighted(0.8),
        ) {
            let mut data = Vec::new();
            for (hour, second, len) in lines {
                match hour {
                    0..3 => data.extend_from_slice(format!("2026-11-22T{}:00:{second:02}Z ", 20 + hour).as_bytes()),
                    90 => data.extend_from_slice(b"1971-01-01T00:00:00Z "),
                    _ => {}
                }
                data.extend(std::iter::repeat_n(b'x', len));
                data.push(b'\n');
            }
            let tight = CutOptions { max_stored_bytes: data.len() - 1, ..options() };
            let mut reader = times();
            let one_by_one = cut(&tight, Input { carry_ms, ..input(&data) }, timed.then_some(&mut reader));
            let taken = Input { carry_ms, ..input(&data[..one_by_one.len]) };
            let together = cut(&options(), taken, timed.then_some(&mut reader));
            prop_assert_eq!(format!("{together:?}"), format!("{one_by_one:?}"));
        }

        /// However the file is read in pieces, the records are the same, and every byte is covered once.
        #[test]
        fn the_records_do_not_depend_on_how_the_file_is_read(
            lines in proptest::collection::vec(
                (proptest::option::weighted(0.7, 0_u8..3), prop_oneof![4 => 0_usize..60, 1 => 60_usize..700])
                    .prop_map(|(hour, len)| Line { hour, len }),
                1..60,
            ),
            terminated: bool,
            reads in proptest::collection::vec(101_usize..400, 1..20),
            policy in 0_usize..3,
            prefix: bool,
        ) {
            let options = CutOptions {
                long_lines: [LongLines::Split, LongLines::Truncate, LongLines::Drop][policy],
                prefix: if prefix { "p ".into() } else { bytes::Bytes::new() },
                max_stored_bytes: 1000,
                ..options()
            };
            let (data, parts) = text_of(&lines, terminated);
            let mut records: BTreeMap<i64, Vec<Vec<u8>>> = BTreeMap::new();
            let (mut at, mut carry_ms, mut times) = (0, Some(HOUR_MS), times());
            for read in reads.iter().cycle() {
                let end = (at + read).min(data.len());
                let before = &data[..at];
                let tail = &before[before.len().saturating_sub(options.max_line_bytes + 1)..];
                let skipping = options.long_lines != LongLines::Split
                    && tail.len() > options.max_line_bytes && !tail.contains(&b'\n');
                let cut = cut(&options, Input {
                    data: &data[at..end],
                    offset: at as u64,
                    end: if end == data.len() { DataEnd::Final } else { DataEnd::Open },
                    inside_line: before.last().is_some_and(|byte| *byte != b'\n'),
                    skipping,
                    carry_ms,
                    now_ms: HOUR_MS,
                }, Some(&mut times));
                let mut covered: Vec<_> = cut.slices.iter().flat_map(|slice| slice.runs.iter().map(Run::range)).collect();
                covered.sort_by_key(|run| run.start);
                let mut reach = at as u64;
                for run in covered {
                    prop_assert_eq!(run.start, reach);
                    reach = run.end;
                }
                prop_assert_eq!(reach, (at + cut.len) as u64);
                prop_assert!(cut.len > 0 || end == data.len());
                for slice in &cut.slices {
                    let mut scratch = Vec::new();
                    let stored = slice.stored(&data[at..end], at as u64, &mut scratch);
                    prop_assert_eq!(stored.len() as u64, slice.runs.iter().map(|run| run.stored).sum::<u64>());
                    let texts: Vec<_> = stored.split_inclusive(|byte| *byte == b'\n').collect();
                    prop_assert_eq!(texts.len() as u64, slice.records);
                    for text in texts {
                        let text = text.strip_suffix(b"\n").expect("a record ends with a newline");
                        records.entry(slice.bucket.start_s()).or_default().push(text.to_vec());
                    }
                }
                at += cut.len;
                carry_ms = cut.carry_ms;
                if at == data.len() {
                    break;
                }
            }
            prop_assert_eq!(records, expected(&parts, &options));
        }
    }
}
