use proptest::prelude::*;
use tributary_common::ids::{Epoch, LaneId};

use super::*;

fn file(n: u64) -> FileKey {
    FileKey { device: 1, inode: n }
}

fn targets(sizes: &[(u64, u64)]) -> BTreeMap<TailId, Target> {
    sizes.iter().map(|(tail, size)| (TailId(*tail), Target { file: file(*tail), source: 0, size: *size })).collect()
}

/// Files with so many bytes read.
struct Files(BTreeMap<u64, u64>);

impl Files {
    fn look(&self, watermark: &mut Watermark) -> bool {
        let reach = |tail: TailId, target: &Target, _| match self.0.get(&tail.0) {
            Some(read) if *read < target.size => Reach::Behind(format!("file {} is behind", tail.0)),
            _ => Reach::Read,
        };
        let read = || self.0.iter().map(|(tail, read)| (StreamId(u128::from(*tail)), *read)).collect();
        watermark.look(100, reach, read)
    }
}

#[test]
fn the_watermark_is_the_beginning_of_a_scan_of_which_all_files_are_read_less_the_delay() {
    let mut watermark = Watermark::default();
    let mut files = Files(BTreeMap::from([(1, 0), (2, 5)]));
    assert!(!files.look(&mut watermark) && watermark.reached().is_none(), "without a scan nothing is known");
    watermark.scanned(1000, Instant::now(), targets(&[(1, 10), (2, 5), (3, 7)]));
    assert!(!files.look(&mut watermark));
    assert_eq!((watermark.reached(), watermark.held_by()), (None, "file 1 is behind"));
    files.0.insert(1, 12);
    assert!(files.look(&mut watermark), "file 3 is gone");
    let (watermark_ms, streams) = watermark.reached().expect("reached");
    assert_eq!((watermark_ms, streams.values().copied().collect::<Vec<_>>()), (900, vec![12, 5]));
    assert_eq!(watermark.held_by(), "");
}

#[test]
fn a_round_is_not_put_off_by_the_scans_that_follow() {
    let mut watermark = Watermark::default();
    let mut files = Files(BTreeMap::from([(1, 0)]));
    for round in 1..=20_u64 {
        // The file grows as fast as it is read.
        watermark.scanned(round as i64 * 1000, Instant::now(), targets(&[(1, round * 10)]));
        files.0.insert(1, (round - 1) * 10);
        files.look(&mut watermark);
    }
    assert_eq!(watermark.reached().map(|(at, _)| at), Some(19 * 1000 - 100));
}

#[test]
fn an_agent_that_catches_up_with_a_day_says_how_far_it_is_hour_by_hour() {
    const MINUTE_MS: i64 = 60_000;
    let mut watermark = Watermark::default();
    let mut files = Files(BTreeMap::from([(1, 0)]));
    // Nothing can be sent, so nothing more is read; a byte is written each minute, and a scan made.
    for minute in 1..=24 * 60_i64 {
        watermark.scanned(minute * MINUTE_MS, Instant::now(), targets(&[(1, minute.unsigned_abs())]));
        files.look(&mut watermark);
    }
    assert!(watermark.rounds.len() <= 24 * 4 + 2, "{}", watermark.rounds.len());
    for minute in 1..=24 * 60_i64 {
        files.0.insert(1, minute.unsigned_abs());
        files.look(&mut watermark);
        let at = watermark.reached().map_or(0, |(at, _)| at);
        assert!(at > (minute - 17) * MINUTE_MS && at <= minute * MINUTE_MS, "{minute}: {at}");
    }
    assert_eq!(watermark.reached().map(|(at, _)| at), Some(24 * 60 * MINUTE_MS - 100));
}

#[test]
fn rounds_that_wait_are_bounded_in_number_and_in_files() {
    for (files, most) in [(1, MAX_ROUNDS), (MAX_TARGETS as u64 / 4, 4)] {
        let sizes: Vec<_> = (0..files).map(|file| (file, 1)).collect();
        let mut watermark = Watermark::default();
        for scan in 0..(most as i64 + 10) {
            watermark.scanned(scan * APART_MS, Instant::now(), targets(&sizes));
        }
        assert_eq!(watermark.rounds.len(), most);
        assert_eq!(watermark.rounds.back().map(|round| round.began_ms), Some((most as i64 + 9) * APART_MS));
    }
}

#[test]
fn what_only_another_scan_can_settle_holds_the_watermark_until_then() {
    let mut watermark = Watermark::default();
    let files = Files(BTreeMap::new());
    watermark.scanned(1000, Instant::now(), targets(&[]));
    watermark.drop_rounds("a file can't be opened");
    assert!(!files.look(&mut watermark));
    assert_eq!((watermark.reached(), watermark.held_by()), (None, "a file can't be opened"));
    watermark.scanned(2000, Instant::now(), targets(&[]));
    assert!(files.look(&mut watermark));
    assert_eq!(watermark.reached().map(|(at, _)| at), Some(1900));
}

#[test]
fn a_clock_that_was_set_back_does_not_take_the_watermark_back() {
    let mut watermark = Watermark::default();
    let files = Files(BTreeMap::new());
    for began_ms in [5000, 3000] {
        watermark.scanned(began_ms, Instant::now(), targets(&[]));
        files.look(&mut watermark);
    }
    assert_eq!(watermark.reached().map(|(at, _)| at), Some(4900));
}

#[test]
fn a_stream_is_lost_when_no_file_was_found_for_it_for_long() {
    let now = Instant::now();
    let minute = Duration::from_secs(60);
    let waiting = [1, 2].map(|n| StreamOffset { stream: StreamId(n), offset: 10 });
    let mut vanished = Vanished::default();
    let one_is_there = |one: &StreamOffset| one.stream == StreamId(1);
    let mut reporter = Reporter::new(RunId(7));
    reporter.told(ReportAnswer { waiting_for: waiting.to_vec(), ..answer(7) });
    let mut lost =
        |reporter: &Reporter, at, has: &dyn Fn(&StreamOffset) -> bool| vanished.look(at, minute, reporter, has);
    assert_eq!(lost(&reporter, now, &one_is_there), []);
    assert_eq!(lost(&reporter, now + minute, &one_is_there), [StreamId(2)]);
    assert_eq!(lost(&reporter, now + minute, &|_| true), [], "it was found");
    assert_eq!(lost(&reporter, now + minute, &one_is_there), [], "and the time begins anew");
    // The owner is away, and gets nothing from anybody.
    while reporter.is_listened_to() {
        reporter.report(facts(), empty());
    }
    assert_eq!(lost(&reporter, now + 2 * minute, &one_is_there), []);
    let heard = ReportAnswer { heard: reporter.number(), waiting_for: waiting.to_vec(), ..answer(7) };
    reporter.told(heard);
    assert_eq!(lost(&reporter, now + 3 * minute - Duration::from_secs(1), &one_is_there), []);
    assert_eq!(lost(&reporter, now + 3 * minute, &one_is_there), [StreamId(2)]);
}

fn empty() -> Report {
    Report::new(LaneId(0), "web-1".parse().expect("valid"), "app".parse().expect("valid"), "web-1", RunId(0))
}

fn facts() -> Facts {
    Facts { claim: Some((5, Vec::new())), lost: Vec::new(), last: false, held_by: String::new() }
}

fn answer(run: u64) -> ReportAnswer {
    ReportAnswer { run: RunId(run), ..empty().answer() }
}

#[test]
fn a_run_takes_its_name_and_says_it_from_then_on() {
    let mut reporter = Reporter::new(RunId(7));
    let session = Session { epoch: Epoch(3), counter: 1 };
    assert_eq!(reporter.report(facts(), empty()).session, None);
    reporter.told(ReportAnswer { session: Some(session), ..answer(8) });
    assert!(!reporter.is_known(), "that was for another run");
    reporter.told(ReportAnswer { session: Some(session), heard: 1, ..answer(7) });
    let second = reporter.report(facts(), empty());
    assert_eq!((second.session, second.number, second.watermark_ms), (Some(session), 2, Some(5)));
    assert!(reporter.is_heard(1) && !reporter.is_heard(2));
    // An answer that was kept in between says less.
    reporter.told(answer(7));
    assert!(reporter.is_known() && reporter.is_heard(1));
}

#[test]
fn what_was_told_of_a_rival_is_said_and_a_refusal_is_news_once() {
    let mut reporter = Reporter::new(RunId(7));
    let rival = Session { epoch: Epoch(3), counter: 9 };
    let refusal = ReportAnswer { rival: Some(rival), refused: Some("two machines".into()), ..answer(7) };
    assert_eq!(reporter.told(refusal.clone()).as_deref(), Some("two machines"));
    assert_eq!(reporter.told(refusal), None);
    assert_eq!(reporter.report(facts(), empty()).rival, Some(rival));
    assert_eq!(reporter.refused(), Some("two machines"));
}

#[test]
fn a_claim_that_is_too_large_to_be_said_is_not_made() {
    let mut reporter = Reporter::new(RunId(7));
    let many = (0..=MAX_STREAMS_PER_REPORT as u128).map(|n| StreamOffset { stream: StreamId(n), offset: 1 }).collect();
    let report = reporter.report(Facts { claim: Some((5, many)), ..facts() }, empty());
    assert_eq!((report.watermark_ms, report.check()), (None, Ok(())));
    assert!(report.held_by.contains("files"));
}

/// What happens to a directory of log files.
#[derive(Debug, Clone)]
enum Step {
    /// Lines are written to a file.
    Write(u8, u8),
    /// So much of what is there is read.
    Read(u8, u8),
    Scan,
    Drop,
    Look,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4_u8, 1..20_u8).prop_map(|(file, bytes)| Step::Write(file, bytes)),
        (0..4_u8, 0..=100_u8).prop_map(|(file, part)| Step::Read(file, part)),
        Just(Step::Scan),
        Just(Step::Look),
        Just(Step::Look),
        Just(Step::Drop),
    ]
}

proptest! {
    /// Whatever is written and read in whatever order: every line from before the watermark lies below the offsets, as long as
    /// lines are written no later than the delay after their time.
    #[test]
    fn all_from_before_the_watermark_lies_below_the_offsets(steps in prop::collection::vec((step(), 0..100_i64, prop::bool::weighted(0.2)), 1..150)) {
        let mut watermark = Watermark::default();
        let mut files = Files(BTreeMap::new());
        // By file: the time that a line carries, and its end.
        let mut written: BTreeMap<u64, Vec<(i64, u64)>> = BTreeMap::new();
        let size = |written: &BTreeMap<u64, Vec<(i64, u64)>>, file: u64| {
            written.get(&file).and_then(|lines| lines.last()).map_or(0, |line| line.1)
        };
        let mut now = 10_000;
        for (step, late_by, is_long_after) in steps {
            now += if is_long_after { APART_MS } else { 7 };
            match step {
                Step::Write(file, bytes) => {
                    let end = size(&written, u64::from(file)) + u64::from(bytes);
                    written.entry(u64::from(file)).or_default().push((now - late_by, end));
                    files.0.entry(u64::from(file)).or_insert(0);
                }
                Step::Read(file, part) => {
                    if let Some(read) = files.0.get_mut(&u64::from(file)) {
                        *read += (size(&written, u64::from(file)) - *read) * u64::from(part) / 100;
                    }
                }
                Step::Scan => {
                    // The sizes are those of after the scan.
                    let sizes: Vec<_> = written.keys().map(|file| (*file, size(&written, *file))).collect();
                    watermark.scanned(now, Instant::now(), targets(&sizes));
                }
                Step::Drop => watermark.drop_rounds("something odd"),
                Step::Look => {
                    files.look(&mut watermark);
                }
            }
            if let Some((watermark_ms, offsets)) = watermark.reached() {
                for (file, lines) in &written {
                    let offset = offsets.get(&StreamId(u128::from(*file))).copied().unwrap_or(0);
                    for (time, end) in lines.iter().filter(|(time, _)| *time < watermark_ms) {
                        prop_assert!(*end <= offset, "a line of {time} ends at {end}; {watermark_ms} is reached with {offset}");
                    }
                }
            }
        }
    }
}
