//! Which hour a line belongs to, by clocks that show any time: the threads that read files, without an agent around them.

use std::fs::File;

use jiff::Timestamp;
use tributary_agent::compress::BatchFacts;
use tributary_agent::config::Source;
use tributary_agent::cut::DataEnd;
use tributary_agent::worker::{Carry, Done, ReadJob, Worker, WorkerOptions};
use tributary_common::bucket::BucketSize;
use tributary_common::frame::Codec;
use tributary_common::ids::{LaneId, StreamId};
use tributary_common::position::{Position, TailHash};

use crate::support::Scene;

fn ms(time: &str) -> i64 {
    time.parse::<Timestamp>().expect("a time").as_millisecond()
}

/// What an agent with this source makes of a file.
struct Reader {
    options: WorkerOptions,
}

impl Reader {
    async fn new(source: &str) -> Self {
        let mut scene = Scene::new(0).await;
        source.clone_into(&mut scene.source);
        let sources: Vec<Source> = scene.sources();
        Self { options: WorkerOptions { sources, batch_bytes: 64 << 10 } }
    }

    /// The hour of each line, in the order of the lines, where the clock shows these times, one line each.
    fn hours_by(&self, lines: &[(&str, &str)]) -> Vec<String> {
        let mut worker = Worker::new(&self.options);
        let dir = tempfile::tempdir().expect("a directory");
        let line = lines[0].1;
        let (mut from, mut carry, mut hours) = (Position::zero(), Carry::Search, Vec::new());
        for n in 0..lines.len() {
            let path = dir.path().join("log");
            let text: String = lines[..=n].iter().map(|(_, line)| format!("{line}\n")).collect();
            std::fs::write(&path, text).expect("written");
            let job = ReadJob {
                generation: 0,
                source: 0,
                first_line: (line.len() as u32, TailHash::of(line.as_bytes())),
                from,
                most: 1,
                end: DataEnd::Open,
                carry,
                now_ms: ms(lines[n].0),
                bucket: BucketSize::HOUR,
                codec: (Codec::Gzip, 1),
                facts: BatchFacts {
                    lane: LaneId(0),
                    agent: "web-1".parse().expect("valid"),
                    host: "web-1".into(),
                    category: "app".parse().expect("valid"),
                    stream: StreamId(7),
                    base: Position::zero(),
                    committed: Position::zero(),
                    prefix_len: 0,
                },
            };
            let mut done = Vec::new();
            let file = File::open(&path).expect("opens");
            let keep = |what| {
                done.push(what);
                true
            };
            worker.read(&file, job, keep);
            for what in done {
                match what {
                    Done::Cut { end, carry: last, .. } => (from, carry) = (end, Carry::Known(last)),
                    Done::Packed { batch, .. } => {
                        let frames = batch.expect("a batch").verify().expect("a good one");
                        hours.extend(frames.iter().map(|frame| hour(frame.bucket.start_s())));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!(hours.len(), lines.len());
        hours
    }

    /// The same, by one clock.
    fn hours(&self, now: &str, lines: &[&str]) -> Vec<String> {
        self.hours_by(&lines.iter().map(|line| (now, *line)).collect::<Vec<_>>())
    }
}

fn hour(second: i64) -> String {
    Timestamp::from_second(second).expect("a time").strftime("%Y-%m-%dT%H").to_string()
}

#[tokio::test]
async fn each_format_of_a_category_is_read() {
    let reader = Reader::new(
        "[source.timestamp]\nformat = [\"%Y-%m-%dT%H:%M:%S%:z\", \"%d/%b/%Y:%H:%M:%S %z\", \"%b %e %H:%M:%S\", \"%s\", \"unix_ms\"]\n",
    )
    .await;
    let lines = [
        "2026-11-22T20:15:31+01:00 a",
        "22/Nov/2026:13:15:31 -0500 b",
        "Nov 22 17:00:00 c",
        "1795370400 d",
        "no time, so it belongs to the line before",
        "2026-11-22T15:59:59+00:00 e",
    ];
    let hours = reader.hours("2026-11-22T20:16:00Z", &lines);
    let wanted = ["19", "18", "17", "18", "18", "15"].map(|hour| format!("2026-11-22T{hour}"));
    assert_eq!(hours, wanted);
}

#[tokio::test]
async fn local_times_are_of_their_zone_also_when_clocks_are_set() {
    let reader =
        Reader::new("[source.timestamp]\nformat = \"%Y-%m-%d %H:%M:%S\"\ntimezone = \"Europe/Berlin\"\n").await;
    let autumn = reader.hours(
        "2026-10-25T06:00:00Z",
        &[
            "2026-10-25 01:59:59 summer time",
            // It comes twice: taken for the first.
            "2026-10-25 02:30:00 twice",
            "2026-10-25 03:00:00 winter time",
        ],
    );
    assert_eq!(autumn, ["2026-10-24T23", "2026-10-25T00", "2026-10-25T02"]);
    let spring = reader.hours(
        "2026-03-29T06:00:00Z",
        &[
            "2026-03-29 01:59:59 winter time",
            // There is no such time: read by the offset from before.
            "2026-03-29 02:30:00 never",
            "2026-03-29 03:00:00 summer time",
        ],
    );
    assert_eq!(spring, ["2026-03-29T00", "2026-03-29T01", "2026-03-29T01"]);
    let reader = Reader::new("[source.timestamp]\nformat = \"%Y-%m-%d %H:%M:%S\"\ntimezone = \"Asia/Kolkata\"\n").await;
    assert_eq!(reader.hours("2026-10-25T06:00:00Z", &["2026-10-25 05:00:00 half hours"]), ["2026-10-24T23"]);
}

#[tokio::test]
async fn lines_without_a_year_around_new_year_are_of_their_year() {
    let reader = Reader::new("[source.timestamp]\nformat = \"%b %e %H:%M:%S\"\n").await;
    let lines = ["Dec 31 23:59:58 a", "Jan  1 00:00:03 b", "Dec 31 23:59:59 late", "Jan  1 01:00:00 c"];
    let wanted = ["2026-12-31T23", "2027-01-01T00", "2026-12-31T23", "2027-01-01T01"];
    // Read before, at and after midnight, and by an agent that was stopped for weeks.
    for now in ["2026-12-31T23:59:50Z", "2027-01-01T00:00:00Z", "2027-01-01T02:00:00Z", "2027-02-20T00:00:00Z"] {
        assert_eq!(reader.hours(now, &lines), wanted, "read at {now}");
    }
}

#[tokio::test]
async fn a_clock_that_jumps_does_not_move_lines_that_say_their_time() {
    let reader = Reader::new("[source.timestamp]\nformat = \"%Y-%m-%dT%H:%M:%SZ\"\n").await;
    let lines = [
        ("2026-11-22T20:00:00Z", "2026-11-22T20:00:00Z a"),
        ("2026-11-22T08:00:00Z", "2026-11-22T20:00:01Z the clock went back by half a day"),
        // A machine without a battery, before it has heard of the time.
        ("1970-01-01T00:00:10Z", "2026-11-22T20:00:02Z c"),
        ("2031-01-01T00:00:00Z", "2026-11-22T21:00:00Z the clock is years ahead"),
        ("2026-11-22T21:00:00Z", "2026-11-22T21:00:01Z e"),
        ("2026-11-22T21:00:02Z", "a line without a time"),
    ];
    let wanted = ["20", "20", "20", "21", "21", "21"].map(|hour| format!("2026-11-22T{hour}"));
    assert_eq!(reader.hours_by(&lines), wanted);
}

#[tokio::test]
async fn a_time_that_can_not_be_is_not_believed_and_the_next_one_is() {
    let reader = Reader::new("[source.timestamp]\nformat = \"%Y-%m-%dT%H:%M:%SZ\"\n").await;
    let lines = [
        "2026-11-22T18:00:00Z a",
        "2026-11-25T00:00:00Z days ahead",
        "2026-11-22T18:00:01Z b",
        "2001-01-01T00:00:00Z decades ago",
        "0000-00-00T00:00:00Z no time at all, so of the line before",
        "2026-11-22T19:00:00Z c",
    ];
    let wanted = ["18", "20", "18", "20", "20", "19"].map(|hour| format!("2026-11-22T{hour}"));
    assert_eq!(reader.hours("2026-11-22T20:15:00Z", &lines), wanted);
}
