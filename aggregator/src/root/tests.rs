//! A lane against a real directory: what it writes is read back with an ordinary gzip reader.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tributary_common::batch::{Batch, BatchHeader, SliceRef};
use tributary_common::bucket::BucketSize;
use tributary_common::frame::{Codec, FrameEncoder, Run, SliceDescriptor, batch_hash};
use tributary_common::ids::{AgentId, CategoryName, LaneCount, StreamId};
use tributary_common::messages::StreamQuery;
use tributary_common::position::{Position, TailHash};
use tributary_common::report::{BucketCount, Report, RunId};

use super::*;
use crate::dfs::local::LocalDfs;

mod calm;
mod members;
mod order;
mod overlap;
mod standing;

const MINUTE_MS: i64 = 60_000;

pub(super) fn category() -> CategoryName {
    "app".parse().expect("valid")
}

/// A log file of one stream: `count` lines of a few dozen bytes, `ms_per_line` apart, the first at `start_ms`.
pub(super) struct Log {
    pub(super) stream: StreamId,
    pub(super) base: Position,
    pub(super) text: Vec<u8>,
    pub(super) lines: Vec<(usize, i64)>,
    pub(super) agent: AgentId,
    pub(super) lane: LaneId,
}

impl Log {
    pub(super) fn new(stream: u128, count: usize, start_ms: i64, ms_per_line: i64) -> Self {
        let mut log = Self {
            stream: StreamId(stream),
            base: Position::zero(),
            text: Vec::new(),
            lines: Vec::new(),
            agent: "web-1".parse().expect("valid"),
            lane: LaneId(0),
        };
        for n in 0..count {
            log.lines.push((log.text.len(), start_ms + n as i64 * ms_per_line));
            log.text.extend_from_slice(format!("stream {stream} line {n:06} {}\n", "x".repeat(n % 17)).as_bytes());
        }
        log
    }

    /// The same log on another server, in the lane of that.
    pub(super) fn of(self, agent: &str, lanes: LaneCount) -> Self {
        let agent: AgentId = agent.parse().expect("valid");
        Self { lane: agent.lane(lanes), agent, ..self }
    }

    pub(super) fn len(&self) -> u64 {
        self.text.len() as u64
    }

    pub(super) fn position(&self, offset: u64) -> Position {
        Position { offset, tail: TailHash::of(&self.text[..offset as usize]) }
    }

    pub(super) fn line_start(&self, n: usize) -> u64 {
        self.lines.get(n).map_or(self.text.len(), |(at, _)| *at) as u64
    }

    pub(super) fn lines(&self) -> Vec<String> {
        String::from_utf8_lossy(&self.text).lines().map(str::to_owned).collect()
    }

    /// The batch of lines `from..to`, cut into slices as an agent does.
    pub(super) fn batch(&self, from: usize, to: usize) -> Received {
        self.batch_by(BucketSize::try_from(60).expect("valid"), from, to)
    }

    fn batch_by(&self, size: BucketSize, from: usize, to: usize) -> Received {
        let agent = self.agent.clone();
        let (start, end) = (self.position(self.line_start(from)), self.position(self.line_start(to)));
        let mut slices: BTreeMap<_, (SliceDescriptor, Vec<u8>)> = BTreeMap::new();
        for n in from..to {
            let (range, time_ms) = (self.line_start(n)..self.line_start(n + 1), self.lines[n].1);
            let len = range.end - range.start;
            let (slice, body) = slices.entry(size.bucket_of_ms(time_ms)).or_insert_with(|| {
                let slice = SliceDescriptor {
                    agent: agent.clone(),
                    host: "web-1".into(),
                    stream: self.stream,
                    base: self.base,
                    start,
                    end,
                    batch_hash: batch_hash(&self.text[start.offset as usize..end.offset as usize]),
                    runs: Vec::new(),
                    records: 0,
                    prefix_len: 0,
                    altered: false,
                    first_time_ms: time_ms,
                    last_time_ms: time_ms,
                };
                (slice, Vec::new())
            });
            slice.records += 1;
            slice.last_time_ms = time_ms;
            match slice.runs.last_mut() {
                Some(run) if run.range().end == range.start => {
                    run.len += len;
                    run.stored += len;
                }
                _ => slice.runs.push(Run { start: range.start, len, stored: len }),
            }
            body.extend_from_slice(&self.text[range.start as usize..range.end as usize]);
        }
        let mut encoder = FrameEncoder::new(Codec::Gzip, 1);
        let mut refs = Vec::new();
        let mut body = Vec::new();
        for (bucket, (slice, raw)) in slices {
            let frame = encoder.encode(&category(), bucket, &[slice], &raw).expect("encodes");
            refs.push(SliceRef { bucket, frame_len: frame.len() as u32 });
            body.extend_from_slice(&frame);
        }
        let header = BatchHeader {
            lane: self.lane,
            agent,
            category: category(),
            stream: self.stream,
            base: self.base,
            start,
            end,
            committed: self.base,
            received_ms: Some(0),
            slices: refs,
        };
        let batch = Batch { header, body: Bytes::from(body) };
        let frames = batch.verify().expect("a good batch");
        Received { batch, frames }
    }
}

pub(super) fn settings(recompress_below: u64) -> LaneSettings {
    LaneSettings {
        lanes: LaneCount::ONE,
        commit_interval: Duration::from_millis(10),
        commit_bytes: 1 << 20,
        ledger_interval: Duration::from_millis(50),
        settle: Duration::ZERO,
        stream_ttl: Duration::from_secs(86_400 * 365 * 100),
        max_open_files: 10,
        recompress_below,
        max_uncommitted_bytes: 16 << 20,
        success_file: "_SUCCESS".into(),
        forget_agents_after: Duration::from_secs(86_400 * 365),
        publish_partial: false,
        replication: None,
        min_replication: 1,
        sync_timeout: Duration::from_secs(5),
        clock: WallClock::system(),
        categories: BTreeMap::from([(
            category(),
            CategorySettings {
                bucket: BucketSize::try_from(60).expect("valid"),
                roll_size: 64 << 20,
                idle_timeout: Duration::from_secs(3600),
                close_delay: Duration::ZERO,
                give_up_after: Duration::from_secs(86_400),
            },
        )]),
    }
}

/// The rules of a root that is the only one.
pub(super) fn alone() -> Rules {
    let me: NodeName = "root-1".parse().expect("valid");
    Rules { order: vec![me.clone()], me, takeover_after: Duration::from_secs(6), jitter: Duration::ZERO }
}

/// A root on a directory of its own; the directory outlives it.
struct Harness {
    dir: PathBuf,
    settings: LaneSettings,
    root: Arc<Root>,
}

/// Says all the time that all that an agent has is stored: what comes of it for an hour that is over is either part of the hour or
/// late. Ends with the root.
pub(super) async fn say_that_all_is_stored(
    root: std::sync::Weak<Root>,
    clock: WallClock,
    agent: AgentId,
    every: Duration,
    counts: Vec<BucketCount>,
) {
    say_that_all_is_stored_of(category(), root, clock, agent, every, counts).await;
}

async fn say_that_all_is_stored_of(
    category: CategoryName,
    root: std::sync::Weak<Root>,
    clock: WallClock,
    agent: AgentId,
    every: Duration,
    counts: Vec<BucketCount>,
) {
    let (host, run) = (agent.to_string(), RunId(clock.now_ms().cast_unsigned()));
    let mut report = Report { counts, ..Report::new(LaneId(0), agent, category, host, run) };
    while let Some(root) = root.upgrade() {
        report.lane = report.agent.lane(LaneCount::try_from(root.lanes.len() as u16).expect("valid"));
        report.number += 1;
        report.watermark_ms = Some(clock.now_ms());
        // It must not keep the root alive.
        let said = tokio::time::timeout(every, root.reports(vec![report.clone()])).await;
        drop(root);
        if let Ok(Ok(answers)) = said {
            report.session = answers[0].session.or(report.session);
        }
        tokio::time::sleep(every).await;
    }
}

impl Harness {
    fn start(dir: &Path, settings: LaneSettings) -> Self {
        Self::start_told(dir, settings, Vec::new())
    }

    /// The agent says that so much of its buckets is stored.
    fn start_told(dir: &Path, settings: LaneSettings, counts: Vec<BucketCount>) -> Self {
        // What a lane says is shown with the test that fails.
        let _ = tracing_subscriber::fmt().with_test_writer().try_init();
        let dfs: Arc<dyn Dfs> = Arc::new(LocalDfs::open(dir).expect("a directory"));
        let root = Arc::new(Root::keep(&dfs, &settings, BTreeMap::new(), |_| alone()));
        let agent = "web-1".parse().expect("valid");
        let every = Duration::from_millis(10);
        tokio::spawn(say_that_all_is_stored(Arc::downgrade(&root), settings.clock.clone(), agent, every, counts));
        Self { dir: dir.to_owned(), settings, root }
    }

    /// Ends everything as a crash does: no drain, no last commit.
    async fn crash(self) -> (PathBuf, LaneSettings) {
        for slot in self.root.lanes.values() {
            let task = slot.task.lock().expect("not poisoned").take();
            if let Some(task) = task {
                task.abort();
                let _ = task.await;
            }
        }
        (self.dir, self.settings)
    }

    async fn restart(self) -> Self {
        let (dir, settings) = self.crash().await;
        Self::start(&dir, settings)
    }

    async fn ready(&self) {
        until(async || self.root.ready().is_ok()).await;
    }

    async fn offer(&self, batch: Received) -> Answer {
        self.ready().await;
        self.root.offer(vec![batch]).await.expect("there is room").remove(0)
    }

    async fn positions(&self, log: &Log, committed: Option<Position>) -> Answer {
        self.ready().await;
        let asked = StreamQuery {
            lane: LaneId(0),
            agent: "web-1".parse().expect("valid"),
            category: category(),
            stream: log.stream,
            committed,
        };
        self.root.positions(PositionsQuery { streams: vec![asked] }).await.expect("there is room").remove(0)
    }

    async fn committed(&self, log: &Log, offset: u64) {
        until(async || self.positions(log, None).await.committed == Some(log.position(offset))).await;
    }

    /// The files that a reader of the category may see, those beside their hours included.
    fn visible_files(&self) -> Vec<PathBuf> {
        let category = self.dir.join("app");
        let hidden = |file: &PathBuf| {
            let below = file.strip_prefix(&category).expect("it is below");
            below.components().any(|part| part.as_os_str().to_string_lossy().starts_with('.'))
        };
        files(&category).into_iter().filter(|file| !hidden(file)).collect()
    }

    fn lines(&self) -> Vec<String> {
        let data = self.visible_files().into_iter().filter(|file| file.extension().is_some_and(|e| e == "gz"));
        let mut lines: Vec<String> =
            data.flat_map(|file| gunzip(&file).lines().map(str::to_owned).collect::<Vec<_>>()).collect();
        lines.sort();
        lines
    }

    async fn published(&self, hours: usize) {
        let with_data = || self.visible_files().iter().filter(|file| file.ends_with("_SUCCESS")).count();
        until(async || with_data() >= hours).await;
    }

    fn lane_files(&self) -> Vec<String> {
        files(&self.dir.join("_tributary/lanes/0"))
            .iter()
            .filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned()))
            .collect()
    }
}

fn gunzip(file: &Path) -> String {
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(std::fs::File::open(file).expect("opens"))
        .read_to_string(&mut text)
        .expect("an ordinary gzip file");
    text
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Waits until a condition holds. The limit only turns a hang into a failure.
async fn until(condition: impl AsyncFn() -> bool) {
    let held = tokio::time::timeout(Duration::from_secs(60), async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    held.await.expect("the condition holds within a minute");
}

fn sorted(logs: &[&Log]) -> Vec<String> {
    let mut lines: Vec<String> = logs.iter().flat_map(|log| log.lines()).collect();
    lines.sort();
    lines
}

fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

#[tokio::test]
async fn what_was_offered_is_committed_and_published_once() {
    for recompress_below in [0, 1 << 20] {
        let dir = tempdir();
        let root = Harness::start(dir.path(), settings(recompress_below));
        // Lines of three minutes of 1970, interleaved by two streams.
        let (a, b) = (Log::new(1, 300, 0, 600), Log::new(2, 200, 0, 600));
        for from in (0..300).step_by(50) {
            assert_eq!(root.offer(a.batch(from, from + 50)).await.verdict, Verdict::Ok);
            if from < 200 {
                assert_eq!(root.offer(b.batch(from, from + 50)).await.verdict, Verdict::Ok);
            }
        }
        root.committed(&a, a.len()).await;
        root.committed(&b, b.len()).await;
        root.published(3).await;
        until(async || root.lines().len() >= 500).await;
        assert_eq!(root.lines(), sorted(&[&a, &b]));
    }
}

#[tokio::test]
async fn a_batch_beyond_next_is_expected_and_one_again_changes_nothing() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), settings(0));
    let log = Log::new(1, 100, 0, 1);
    let early = root.offer(log.batch(10, 20)).await;
    assert_eq!((early.verdict, early.next), (Verdict::Unknown, None));
    assert_eq!(root.offer(log.batch(0, 10)).await.next, Some(log.position(log.line_start(10))));
    let beyond = root.offer(log.batch(20, 30)).await;
    assert_eq!((beyond.verdict, beyond.next), (Verdict::Expected, Some(log.position(log.line_start(10)))));
    assert_eq!(root.offer(log.batch(0, 10)).await.verdict, Verdict::Ok);
    assert_eq!(root.offer(log.batch(10, 100)).await.verdict, Verdict::Ok);
    root.published(1).await;
    until(async || root.lines().len() >= 100).await;
    assert_eq!(root.lines(), sorted(&[&log]));
}

#[tokio::test]
async fn a_batch_that_crosses_next_adds_only_what_is_missing() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), settings(0));
    let log = Log::new(1, 300, 0, 1);
    root.offer(log.batch(0, 150)).await;
    // Other boundaries, as after a failover of the agent; enough bytes before `next` to show its tail hash.
    let answer = root.offer(log.batch(20, 220)).await;
    assert_eq!((answer.verdict, answer.next), (Verdict::Ok, Some(log.position(log.line_start(220)))));
    // Few bytes before `next`: the start vouches for them, because it is a batch end that the root knows.
    assert_eq!(root.offer(log.batch(150, 300)).await.verdict, Verdict::Ok);
    root.published(1).await;
    until(async || root.lines().len() >= 300).await;
    assert_eq!(root.lines(), sorted(&[&log]));
}

#[tokio::test]
async fn other_bytes_under_the_same_name_are_diverged_and_nothing_is_written() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), settings(0));
    let log = Log::new(1, 100, 0, 1);
    root.offer(log.batch(0, 60)).await;
    root.committed(&log, log.line_start(60)).await;
    let mut other = Log::new(1, 100, 0, 1);
    for byte in other.text.iter_mut().filter(|byte| **byte == b'x') {
        *byte = b'y';
    }
    for batch in [other.batch(60, 100), other.batch(0, 60), other.batch(0, 100), other.batch(10, 100)] {
        let answer = root.offer(batch).await;
        let Verdict::Diverged { history } = answer.verdict else { panic!("{answer:?}") };
        assert!(history.contains(&log.position(log.line_start(60))));
    }
    root.offer(log.batch(60, 100)).await;
    root.published(1).await;
    until(async || root.lines().len() >= 100).await;
    assert_eq!(root.lines(), sorted(&[&log]));
}

#[tokio::test]
async fn after_a_crash_at_any_time_nothing_is_lost_or_doubled() {
    for crash_after in 0..6 {
        let dir = tempdir();
        let mut root = Harness::start(dir.path(), settings(if crash_after % 2 == 0 { 0 } else { 1 << 20 }));
        let log = Log::new(1, 600, 0, 250);
        for step in 0..6 {
            root.offer(log.batch(step * 50, step * 50 + 50)).await;
            if step == crash_after {
                if crash_after > 2 {
                    root.committed(&log, log.line_start(step * 50 + 50)).await;
                }
                root = root.restart().await;
                // The sender goes back to what the root says, or all the way.
                let from = root.positions(&log, None).await.next.map_or(0, |next| next.offset);
                let first = (0..600).find(|n| log.line_start(*n) >= from).expect("a line");
                assert_eq!(log.line_start(first), from, "next is a line's start");
                if crash_after > 2 {
                    assert_eq!(from, log.line_start(step * 50 + 50), "what was committed is there");
                }
                root.offer(log.batch(first, step * 50 + 57)).await;
                root.offer(log.batch(step * 50, step * 50 + 57)).await;
            }
        }
        root.offer(log.batch(0, 600)).await;
        root.committed(&log, log.len()).await;
        root.published(3).await;
        until(async || root.lines().len() >= 600).await;
        assert_eq!(root.lines(), sorted(&[&log]));
    }
}

#[tokio::test]
async fn data_for_a_published_hour_goes_beside_it_and_the_hour_stays_as_it_is() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), settings(0));
    let (log, late) = (Log::new(1, 100, 0, 1), Log::new(2, 50, 0, 1));
    root.offer(log.batch(0, 100)).await;
    root.published(1).await;
    let hour = dir.path().join("app/dt=1970-01-01/hm=0000");
    let listing = || -> Vec<_> {
        let mut names: Vec<_> =
            std::fs::read_dir(&hour).expect("the hour").flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        names
    };
    let before = listing();
    root.offer(late.batch(0, 50)).await;
    until(async || root.lines().len() >= 150).await;
    assert_eq!(listing(), before, "a published hour does not change");
    assert_eq!(files(&hour.join("_late")).len(), 2, "the data and its manifest");
    assert_eq!(root.lines(), sorted(&[&log, &late]));
}

#[tokio::test]
async fn leftovers_of_many_restarts_are_joined_into_one_file() {
    let dir = tempdir();
    let mut root = Harness::start(dir.path(), settings(0));
    // An hour of the present is not over while the test runs, so its segments pile up.
    let start = jiff::Timestamp::now().as_millisecond() / MINUTE_MS * MINUTE_MS;
    let log = Log::new(1, 100, start + 10 * MINUTE_MS, 1);
    for step in 0..5 {
        root.offer(log.batch(step * 20, step * 20 + 20)).await;
        root.committed(&log, log.line_start(step * 20 + 20)).await;
        root = root.restart().await;
    }
    root.ready().await;
    assert_eq!(root.lane_files().iter().filter(|name| name.starts_with("app.")).count(), 5);
    // The same with a topology that closes the hour long before its end.
    let (dir_path, mut settings) = root.crash().await;
    settings.categories.get_mut(&category()).expect("there").close_delay = Duration::ZERO;
    let dfs: Arc<dyn Dfs> = Arc::new(LocalDfs::open(&dir_path).expect("a directory"));
    let taken = recovery::take(&dfs, LaneId(0), i64::MAX, 0).await.expect("taken");
    let records: Vec<_> = taken
        .segments
        .iter()
        .map(|found| {
            let mut record = found.record.clone();
            record.covered.append(&found.scan.frames.iter().collect());
            ledger::SegmentRecord { closed: true, ..record }
        })
        .collect();
    let sink = sink::LaneSink {
        dfs,
        dir: taken.dir.clone(),
        lane: LaneId(0),
        lanes: LaneCount::ONE,
        create: crate::dfs::CreateOptions {
            block_size: 1 << 20,
            replication: None,
            sync_timeout: Duration::from_secs(5),
        },
        placement: Arc::new(placement::Placement::new(None, 1)),
        epoch: taken.epoch,
        attempts: Arc::default(),
        success_file: "_SUCCESS".into(),
        patience: None,
    };
    let key = ledger::HourKey { category: category(), bucket: records[0].bucket };
    let seal = sink
        .prepare_seal(&key, &records, 64 << 20, sink::HourVerdict::default())
        .await
        .expect("prepared")
        .expect("not published");
    assert_eq!((seal.files.len(), seal.files[0].records, seal.inputs.len()), (1, 100, 5));
    // A crash may come after any step, and the next owner carries all of it out again.
    for _ in 0..2 {
        sink.execute_seal(&key, &seal).await.expect("sealed");
    }
    for _ in 0..2 {
        assert!(sink.publish(&key).await.expect("published"));
        sink.execute_seal(&key, &seal).await.expect("sealed");
    }
    let file = files(&dir_path.join("app")).into_iter().find(|file| file.extension().is_some_and(|e| e == "gz"));
    let text = gunzip(&file.expect("a file"));
    assert_eq!(text.as_bytes(), log.text, "in the order of the stream");
}

#[tokio::test]
async fn a_torn_tail_is_left_out_and_its_bytes_are_taken_again() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), settings(0));
    let log = Log::new(1, 100, 0, 1);
    // An hour far in the future stays open.
    let log = Log { lines: log.lines.iter().map(|(at, ms)| (*at, ms + 100_000_000 * MINUTE_MS)).collect(), ..log };
    root.offer(log.batch(0, 50)).await;
    root.committed(&log, log.line_start(50)).await;
    let (path, settings) = root.crash().await;
    let segment = files(&path.join("_tributary"))
        .into_iter()
        .find(|file| file.extension().is_some_and(|e| e == "gz"))
        .expect("a segment");
    let next = log.batch(50, 100);
    let mut bytes = std::fs::read(&segment).expect("reads");
    let whole = bytes.len();
    bytes.extend_from_slice(&next.batch.body[..next.batch.body.len() - 1]);
    std::fs::write(&segment, &bytes).expect("writes");
    let root = Harness::start(&path, settings);
    assert_eq!(root.positions(&log, None).await.next, Some(log.position(log.line_start(50))));
    assert_eq!(root.offer(log.batch(50, 100)).await.verdict, Verdict::Ok);
    root.committed(&log, log.len()).await;
    let scan = sink::scan(
        &LocalDfs::open(&path).expect("opens"),
        &crate::dfs::DfsPath::base().join(
            files(&path.join("_tributary"))
                .into_iter()
                .find(|file| file.metadata().expect("there").len() == bytes.len() as u64)
                .expect("the torn segment")
                .strip_prefix(&path)
                .expect("below")
                .to_string_lossy(),
        ),
        0,
        bytes.len() as u64,
    )
    .await
    .expect("scans");
    assert_eq!((scan.end, scan.torn.is_some()), (whole as u64, true));
}

#[tokio::test]
async fn a_ledger_entry_that_cannot_be_read_stops_the_recovery() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), settings(0));
    let log = Log::new(1, 100, 0, 1);
    root.offer(log.batch(0, 100)).await;
    root.published(1).await;
    let (path, settings) = root.crash().await;
    let entry = files(&path.join("_tributary"))
        .into_iter()
        .filter(|file| file.to_string_lossy().contains("/ledger-"))
        .max()
        .expect("an entry");
    let mut bytes = std::fs::read(&entry).expect("reads");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&entry, &bytes).expect("writes");
    let root = Harness::start(&path, settings);
    until(async || root.root.ready().is_err_and(|why| why.contains("ledger entry") && why.contains("restore"))).await;
}

#[tokio::test]
async fn a_base_directory_for_another_number_of_lanes_is_refused() {
    let dir = tempdir();
    let dfs = LocalDfs::open(dir.path()).expect("a directory");
    recovery::check_base(&dfs, LaneCount::ONE).await.expect("written");
    recovery::check_base(&dfs, LaneCount::ONE).await.expect("the same");
    let error = recovery::check_base(&dfs, LaneCount::try_from(2).expect("valid")).await.expect_err("another");
    assert!(error.to_string().contains("write lanes = 1"), "{error}");
}

#[tokio::test]
async fn a_second_owner_on_the_same_machine_is_kept_out_while_the_first_lives() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), settings(0));
    root.ready().await;
    let dfs: Arc<dyn Dfs> = Arc::new(LocalDfs::open(dir.path()).expect("a directory"));
    let error = recovery::take(&dfs, LaneId(0), i64::MAX, 0).await.err().expect("locked");
    assert!(error.to_string().contains("another process has it"), "{error}");
}

#[tokio::test]
async fn an_hour_with_fewer_records_than_an_agent_knows_to_be_stored_is_an_alarm() {
    let log = Log::new(1, 100, 0, 1);
    let size_s = settings(0).categories[&category()].bucket.seconds();
    for (records, alarms) in [(99, 0), (100, 0), (101, 1)] {
        let dir = tempdir();
        let told = vec![BucketCount { start_s: 0, size_s, records, bytes: 0 }];
        let root = Harness::start_told(dir.path(), settings(0), told);
        assert_eq!(root.offer(log.batch(0, 100)).await.verdict, Verdict::Ok);
        root.published(1).await;
        let samples = root.root.lanes[&LaneId(0)].metrics.samples();
        let found = samples.iter().find(|(name, ..)| *name == "root_short_seals").map(|(.., value)| *value);
        assert_eq!(found, Some(alarms), "{records} of 100 are known to be stored");
        assert_eq!(root.lines(), sorted(&[&log]), "it is an alarm, not a lock");
    }
}

#[tokio::test]
async fn an_hour_is_published_when_lanes_without_data_have_sealed_it_too() {
    let dir = tempdir();
    let lanes = LaneCount::try_from(3).expect("valid");
    let root = Harness::start(dir.path(), LaneSettings { lanes, ..settings(0) });
    root.ready().await;
    let log = Log::new(1, 100, 0, 1).of("web-1", lanes);
    assert_eq!(root.offer(log.batch(0, 100)).await.verdict, Verdict::Ok);
    root.published(1).await;
    until(async || root.lines().len() >= 100).await;
    assert_eq!(root.lines(), sorted(&[&log]));
    let wanted = dir.path().join("_tributary/hours");
    let oldest = || std::fs::read_dir(&wanted).expect("there").flatten().map(|entry| entry.file_name()).min();
    until(async || oldest().is_none_or(|name| !name.to_string_lossy().starts_with("app@0+"))).await;
}

#[tokio::test]
async fn a_root_that_is_emptied_leaves_its_lanes_to_another_one_at_once_and_sends_on_who_still_asks() {
    let dir = tempdir();
    let lanes = LaneCount::try_from(2).expect("valid");
    let names: Vec<NodeName> = ["root-1", "root-2"].map(|name| name.parse().expect("valid")).to_vec();
    let settings = LaneSettings { lanes, ..settings(0) };
    let start = |me: &NodeName| {
        let dfs: Arc<dyn Dfs> = Arc::new(LocalDfs::open(dir.path()).expect("a directory"));
        let nodes = names.iter().map(|name| (name.clone(), Endpoint::at(&format!("{name}:1")).expect("valid")));
        let rules = |lane: LaneId| Rules {
            me: me.clone(),
            // Each prefers one lane.
            order: if lane == LaneId(0) { names.clone() } else { names.iter().rev().cloned().collect() },
            // Longer than the test: only a goodbye can move a lane.
            takeover_after: Duration::from_secs(3600),
            jitter: Duration::ZERO,
        };
        Root::keep(&dfs, &settings, nodes.collect(), rules)
    };
    let (first, second) = (start(&names[0]), start(&names[1]));
    let serves = |root: &Root, lane: u16| root.serving(LaneId(lane)).is_ok();
    until(async || serves(&first, 0) && serves(&second, 1)).await;
    until(async || {
        let elsewhere = first.serving(LaneId(1)).err().and_then(|why| why.elsewhere);
        elsewhere == Some(Elsewhere::Node(Endpoint::at("root-2:1").expect("valid")))
    })
    .await;
    first.hand_over().await;
    until(async || serves(&second, 0) && serves(&second, 1)).await;
    let elsewhere = first.serving(LaneId(0)).err().and_then(|why| why.elsewhere);
    assert_eq!(elsewhere, Some(Elsewhere::Node(Endpoint::at("root-2:1").expect("valid"))));
    // Nobody is left to take them, and nobody is waited for for ever.
    second.drain().await;
    assert!(matches!(second.serving(LaneId(0)), Err(Overloaded { elsewhere: Some(Elsewhere::Sibling), .. })));
}

#[tokio::test]
async fn a_root_whose_clock_is_wrong_seals_nothing_until_it_is_set_and_ships_on() {
    let dir = tempdir();
    let skew_ms = Arc::new(std::sync::atomic::AtomicI64::new(120_000));
    let clock = {
        let skew_ms = Arc::clone(&skew_ms);
        WallClock::new(move || WallClock::system().now_ms() + skew_ms.load(std::sync::atomic::Ordering::Relaxed))
    };
    let mut settings = LaneSettings { clock, ..settings(0) };
    for category in settings.categories.values_mut() {
        // Nothing stays open, so nothing but the clock is a reason for another entry.
        category.idle_timeout = Duration::from_millis(20);
    }
    let root = Harness::start(dir.path(), settings);
    let log = Log::new(1, 100, 0, 1);
    assert_eq!(root.offer(log.batch(0, 50)).await.verdict, Verdict::Ok);
    let ahead_ms = async || root.root.status().await["lanes"]["0"]["clock_ahead_ms"].as_i64().unwrap_or(0);
    until(async || ahead_ms().await.abs() > 60_000).await;
    assert_eq!(root.offer(log.batch(50, 100)).await.verdict, Verdict::Ok);
    root.committed(&log, log.line_start(100)).await;
    let closed = async || root.root.status().await["lanes"]["0"]["segments"]["open"] == serde_json::json!([]);
    until(closed).await;
    assert_eq!(root.lines(), Vec::<String>::new(), "nothing is published by a wrong clock");
    skew_ms.store(0, std::sync::atomic::Ordering::Relaxed);
    root.published(1).await;
    assert_eq!(root.lines(), sorted(&[&log]));
}

#[tokio::test]
async fn a_spool_that_comes_back_adds_to_the_next_owner_only_what_is_missing_though_its_agent_is_gone() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), settings(0));
    let log = Log::new(1, 300, 0, 1);
    for (from, to) in [(0, 100), (100, 150)] {
        assert_eq!(root.offer(log.batch(from, to)).await.verdict, Verdict::Ok);
    }
    root.committed(&log, log.line_start(150)).await;
    let root = root.restart().await;
    // Cut by another edge, days ago. Nobody is left who could send other batches.
    let mut sent = 30;
    for to in [90, 130, 200, 300] {
        let answer = root.offer(log.batch(sent, to)).await;
        assert_eq!(answer.verdict, Verdict::Ok, "{sent}..{to}: {answer:?}");
        sent = to;
    }
    root.published(1).await;
    until(async || root.lines().len() >= 300).await;
    assert_eq!(root.lines(), sorted(&[&log]));
}

#[tokio::test]
async fn a_lane_without_data_finds_out_that_the_clocks_agree_again() {
    let dir = tempdir();
    let behind_ms = Arc::new(std::sync::atomic::AtomicI64::new(600_000));
    let clock = {
        let behind_ms = Arc::clone(&behind_ms);
        WallClock::new(move || WallClock::system().now_ms() - behind_ms.load(std::sync::atomic::Ordering::Relaxed))
    };
    let root = Harness::start(dir.path(), LaneSettings { clock, ..settings(0) });
    let ahead_ms = async || root.root.status().await["lanes"]["0"]["clock_ahead_ms"].as_i64();
    until(async || ahead_ms().await.is_some_and(|ahead| ahead > 500_000)).await;
    behind_ms.store(0, std::sync::atomic::Ordering::Relaxed);
    until(async || ahead_ms().await.is_some_and(|ahead| ahead < 60_000)).await;
}
