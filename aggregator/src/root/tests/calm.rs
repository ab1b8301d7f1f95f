//! A root in virtual time, on a file system that does what it is told: days pass in milliseconds.

use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::dfs::DfsPath;
use crate::dfs::hostile::{HostileCluster, HostileDfs, Hostility, Refusal};
use crate::root::hours::Manifest;
use crate::root::storm::lines;

const AGENT: &str = "web-1";

const REPORT_EVERY: Duration = Duration::from_secs(10);

/// The file system, and how far the root's clock is ahead of its.
struct World {
    cluster: HostileCluster,
    ahead_ms: Arc<AtomicI64>,
    settings: LaneSettings,
}

/// A root and the agent that reports to it.
struct Running {
    root: Arc<Root>,
    process: HostileDfs,
}

impl World {
    fn new() -> Self {
        let _ = tracing_subscriber::fmt().with_test_writer().try_init();
        let cluster = HostileCluster::new(1, Hostility::none());
        let ahead_ms = Arc::new(AtomicI64::new(0));
        let clock = {
            let (cluster, ahead_ms) = (cluster.clone(), Arc::clone(&ahead_ms));
            WallClock::new(move || cluster.now_ms() + ahead_ms.load(Ordering::Relaxed))
        };
        let settings = LaneSettings {
            commit_interval: Duration::from_secs(1),
            ledger_interval: Duration::from_secs(10),
            clock,
            ..settings(0)
        };
        Self { cluster, ahead_ms, settings }
    }

    fn set_bucket(&mut self, seconds: u32) {
        self.settings.categories.get_mut(&category()).expect("there").bucket = seconds.try_into().expect("valid");
    }

    /// Starts a root, to which an agent says every few seconds that all that it has of each category is stored.
    async fn start(&self) -> Running {
        let process = self.cluster.process();
        let dfs: Arc<dyn Dfs> = Arc::new(process.clone());
        let root = Arc::new(Root::keep(&dfs, &self.settings, BTreeMap::new(), |_| alone()));
        for category in self.settings.categories.keys() {
            let (root, clock) = (Arc::downgrade(&root), self.settings.clock.clone());
            let agent = AGENT.parse().expect("valid");
            let said = say_that_all_is_stored_of(category.clone(), root, clock, agent, REPORT_EVERY, Vec::new());
            tokio::spawn(said);
        }
        until_soon(async || root.ready().is_ok()).await;
        Running { root, process }
    }

    fn batch(&self, log: &Log, from: usize, to: usize) -> Received {
        self.just_received(log.batch(from, to))
    }

    /// All of it, cut into buckets of so many seconds.
    fn sized(&self, log: &Log, seconds: u32) -> Received {
        self.just_received(log.batch_by(seconds.try_into().expect("valid"), 0, log.lines.len()))
    }

    fn just_received(&self, mut received: Received) -> Received {
        received.batch.header.received_ms = Some(self.cluster.now_ms());
        received
    }

    /// The published buckets of a category, by where they are, each with its manifest.
    fn published(&self, category: &str) -> BTreeMap<DfsPath, Manifest> {
        let files = self.cluster.files().into_iter();
        let manifests = files.filter(|(path, _)| {
            let hidden = path.as_str().split('/').any(|part| part.starts_with('.'));
            path.as_str().starts_with(&format!("{category}/")) && path.name() == "_MANIFEST.json" && !hidden
        });
        let parsed = manifests.map(|(path, bytes)| {
            (path.parent().expect("a directory"), serde_json::from_slice(&bytes).expect("a manifest"))
        });
        parsed.collect()
    }
}

impl Running {
    async fn offer(&self, batch: Received) -> Verdict {
        self.root.offer(vec![batch]).await.expect("there is room").remove(0).verdict
    }

    async fn position(&self, log: &Log) -> Answer {
        let asked = StreamQuery {
            lane: LaneId(0),
            agent: log.agent.clone(),
            category: category(),
            stream: log.stream,
            committed: None,
        };
        self.root.positions(PositionsQuery { streams: vec![asked] }).await.expect("there is room").remove(0)
    }

    /// Ends it as a crash does.
    fn crash(self, world: &World) {
        world.cluster.crash(&self.process);
        self.root.abandon();
    }

    async fn restart(self, world: &World) -> Self {
        self.crash(world);
        world.start().await
    }
}

async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

/// Waits until a condition holds, for ten minutes of virtual time.
async fn until_soon(condition: impl AsyncFn() -> bool) {
    let held = tokio::time::timeout(Duration::from_secs(600), async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    held.await.expect("the condition holds within ten minutes");
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_was_silent_for_stream_ttl_is_forgotten_for_good_and_its_old_batches_are_refused() {
    let mut world = World::new();
    world.settings.stream_ttl = Duration::from_secs(1000);
    let root = world.start().await;
    let log = Log::new(1, 100, world.cluster.now_ms(), 1);
    let (first, second) = (world.batch(&log, 0, 50), world.batch(&log, 50, 100));
    assert_eq!(root.offer(first.clone()).await, Verdict::Ok);
    until_soon(async || root.position(&log).await.committed == Some(log.position(log.line_start(50)))).await;
    pass(900).await;
    assert_ne!(root.position(&log).await.verdict, Verdict::Unknown, "not yet");
    pass(200).await;
    assert_eq!(root.position(&log).await.verdict, Verdict::Unknown);
    let root = root.restart(&world).await;
    assert_eq!(root.position(&log).await.verdict, Verdict::Unknown, "the ledger forgot it, too");
    assert_eq!(root.offer(second).await, Verdict::Unknown);
    let old = root.offer(first).await;
    assert!(matches!(&old, Verdict::Refused { reason } if reason.contains("stream_ttl")), "{old:?}");
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_wrong_or_was_set_to_another_day_forgets_no_stream_and_no_agent_and_seals_nothing() {
    const DAYS_MS: i64 = 40 * 86_400_000;
    let mut world = World::new();
    world.settings.stream_ttl = Duration::from_secs(30 * 86_400);
    world.settings.forget_agents_after = Duration::from_secs(30 * 86_400);
    let root = world.start().await;
    let log = Log::new(1, 100, world.cluster.now_ms(), 1);
    assert_eq!(root.offer(world.batch(&log, 0, 50)).await, Verdict::Ok);
    until_soon(async || root.position(&log).await.committed == Some(log.position(log.line_start(50)))).await;
    let is_as_it_was = async |root: &Running, what: &str| {
        assert_ne!(root.position(&log).await.verdict, Verdict::Unknown, "{what}: the stream is forgotten");
        assert_eq!(root.root.agents().await[&LaneId(0)].len(), 1, "{what}: the agent is forgotten");
        // An operator asks, too.
        root.root.status().await;
        let future = world.published("app").values().any(|hour| hour.bucket_start_s * 1000 > world.cluster.now_ms());
        assert!(!future, "{what}: a bucket that has not begun is published");
    };
    // Between two entries, in which the clocks agree.
    world.ahead_ms.store(DAYS_MS, Ordering::Relaxed);
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        is_as_it_was(&root, "set while it runs").await;
    }
    pass(300).await;
    is_as_it_was(&root, "wrong for long").await;
    let root = root.restart(&world).await;
    is_as_it_was(&root, "wrong from the start").await;
    pass(300).await;
    is_as_it_was(&root, "wrong from the start, for long").await;
    let before = world.published("app").len();
    world.ahead_ms.store(0, Ordering::Relaxed);
    pass(300).await;
    is_as_it_was(&root, "set right").await;
    assert!(world.published("app").len() > before + 3, "what was over meanwhile is published");
    pass(300).await;
    let starts: Vec<i64> = world.published("app").values().map(|hour| hour.bucket_start_s).collect();
    assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == 60), "none is passed over: {starts:?}");
}

#[tokio::test(start_paused = true)]
async fn no_hour_is_given_up_because_the_sink_was_away() {
    let mut world = World::new();
    let settings = &mut world.settings;
    settings.categories.get_mut(&category()).expect("there").give_up_after = Duration::from_secs(300);
    let root = world.start().await;
    let late = Log::new(2, 100, world.cluster.now_ms(), 1).of("web-2", LaneCount::ONE);
    assert_eq!(root.offer(world.batch(&late, 0, 50)).await, Verdict::Ok);
    pass(120).await;
    // Nothing can be committed, so nobody can be told of it: that is nobody's silence.
    world.cluster.set_hostility(Hostility { unavailable: 1000, ..Hostility::none() });
    pass(3600).await;
    world.cluster.set_hostility(Hostility::none());
    pass(120).await;
    assert_eq!(world.published("app").values().find(|hour| !hour.complete), None);
    let web_2 = say_that_all_is_stored_of(
        category(),
        Arc::downgrade(&root.root),
        world.settings.clock.clone(),
        "web-2".parse().expect("valid"),
        REPORT_EVERY,
        Vec::new(),
    );
    tokio::spawn(web_2);
    pass(120).await;
    let published = world.published("app");
    assert!(published.len() > 60 && published.values().all(|hour| hour.complete), "{published:?}");
    root.crash(&world);
}

#[tokio::test(start_paused = true)]
async fn an_hour_that_retention_removed_stays_away_after_a_restart() {
    let mut world = World::new();
    world.settings.stream_ttl = Duration::from_secs(300);
    let root = world.start().await;
    let log = Log::new(1, 100, world.cluster.now_ms(), 1);
    assert_eq!(root.offer(world.batch(&log, 0, 50)).await, Verdict::Ok);
    pass(1200).await;
    let before = world.published("app");
    assert!(before.len() >= 19 && before.values().next().is_some_and(|hour| hour.records == 50), "{before:?}");
    let dfs = world.cluster.process();
    for dir in before.keys() {
        dfs.delete(dir).await.expect("retention");
    }
    // Twice: the first owner forgets, and the second one must not begin anew.
    let root = root.restart(&world).await;
    pass(700).await;
    let root = root.restart(&world).await;
    pass(300).await;
    let after = world.published("app");
    let back: Vec<&DfsPath> = before.keys().filter(|dir| after.contains_key(dir)).collect();
    assert!(back.is_empty(), "{back:?}");
    let starts: Vec<i64> = after.values().map(|hour| hour.bucket_start_s).collect();
    assert!(starts.len() >= 16 && starts.windows(2).all(|pair| pair[1] - pair[0] == 60), "{starts:?}");
    root.crash(&world);
}

/// The starts of the published buckets by their size, both in seconds.
fn by_size(hours: &BTreeMap<DfsPath, Manifest>) -> BTreeMap<u32, Vec<i64>> {
    let mut sizes: BTreeMap<u32, Vec<i64>> = BTreeMap::new();
    for hour in hours.values() {
        sizes.entry(hour.bucket_size_s).or_default().push(hour.bucket_start_s);
    }
    sizes.values_mut().for_each(|starts| starts.sort_unstable());
    sizes
}

#[tokio::test(start_paused = true)]
async fn after_a_change_of_the_bucket_size_every_time_is_in_a_bucket_and_no_published_one_changes() {
    // Names that meet (`hm=0000` of one, two and five minutes), days that hold hours, and back.
    for (from, to) in [(60, 120), (120, 60), (300, 60), (60, 3600), (3600, 60), (86_400, 60), (60, 86_400)] {
        let mut world = World::new();
        world.set_bucket(from);
        if to.max(from) == 86_400 {
            // Until shortly before midnight nobody is there.
            pass(86_400 - 1800).await;
        }
        let root = world.start().await;
        let log = Log::new(1, 100, world.cluster.now_ms(), 1);
        let at = log.lines[0].1;
        pass(if from == 86_400 { 630 } else { u64::from(from) * 3 + 30 }).await;
        // Not sealed yet when the size changes.
        let open = Log::new(2, 100, world.cluster.now_ms(), 1);
        assert_eq!(root.offer(world.sized(&open, from)).await, Verdict::Ok);
        until_soon(async || root.position(&open).await.committed == Some(open.position(open.len()))).await;
        let changed_s = world.cluster.now_ms() / 1000;
        let before = world.cluster.files();
        world.set_bucket(to);
        let root = root.restart(&world).await;
        // Of the same time, cut anew, and of long before.
        let (same, old) = (Log::new(3, 100, open.lines[0].1, 1), Log::new(4, 100, at, 1));
        assert_eq!(root.offer(world.sized(&same, to)).await, Verdict::Ok);
        assert_eq!(root.offer(world.sized(&old, to)).await, Verdict::Ok);
        let after = if to.max(from) == 86_400 { 1800 + u64::from(to) } else { u64::from(from) + 5 * u64::from(to) };
        pass(after / 2).await;
        let root = root.restart(&world).await;
        pass(after - after / 2 + 200).await;
        let published = world.published("app");
        let sizes = by_size(&published);
        let new: Vec<i64> = sizes[&to].iter().copied().filter(|start| *start >= changed_s).collect();
        assert!(
            new.len() >= if to == 86_400 { 1 } else { 3 }
                && new.windows(2).all(|pair| pair[1] - pair[0] == i64::from(to)),
            "{from} to {to}: {sizes:?}"
        );
        // Without a gap between the old ones and the new ones.
        let covered =
            published.values().map(|hour| hour.bucket_start_s..hour.bucket_start_s + i64::from(hour.bucket_size_s));
        let covered: tributary_common::ranges::RangeSet =
            covered.map(|range| range.start.cast_unsigned()..range.end.cast_unsigned()).collect();
        let until = new.last().expect("some").cast_unsigned();
        let gap = covered.missing((at / 1000).cast_unsigned()..until);
        let most = u64::from(to.max(from));
        assert!(gap.iter().all(|gap| gap.end - gap.start < most), "{from} to {to}: {gap:?}, {sizes:?}");
        let after = world.cluster.files();
        let is_published = |path: &DfsPath| published.keys().any(|dir| path.parent().as_ref() == Some(dir));
        let changed =
            before.iter().filter(|(path, _)| is_published(path)).find(|(path, bytes)| after.get(*path) != Some(*bytes));
        assert_eq!(changed, None, "{from} to {to}");
        for (dir, hour) in &published {
            for file in &hour.files {
                assert_eq!(after[&dir.join(&file.name)].len() as u64, file.bytes, "{dir}");
            }
            let data = after.keys().filter(|path| path.parent().as_ref() == Some(dir) && path.name().ends_with(".gz"));
            assert_eq!(
                data.count(),
                hour.files.len(),
                "{from} to {to}: {dir} has files that its manifest does not name"
            );
        }
        assert_eq!(lines(&world.cluster), sorted(&[&open, &same, &old]), "{from} to {to}");
        let asked = root.process.list(&DfsPath::base().join("_tributary/hours")).await.expect("answers");
        assert!(asked.is_none_or(|asked| asked.is_empty()), "nothing is asked for any more");
        root.crash(&world);
    }
}

#[tokio::test(start_paused = true)]
async fn what_one_category_may_not_write_holds_up_no_other_and_is_tried_again_with_pauses() {
    for refusal in [Refusal::Forbidden, Refusal::ForNow] {
        let mut world = World::new();
        let other: CategoryName = "other".parse().expect("valid");
        let app = world.settings.categories[&category()];
        world.settings.categories.insert(other, app);
        // Before all others in every order by name.
        let dir = DfsPath::base().join("app");
        world.cluster.refuse_below(Some((dir, refusal)));
        let root = world.start().await;
        let log = Log::new(1, 100, world.cluster.now_ms(), 1);
        assert_eq!(root.offer(world.batch(&log, 0, 50)).await, Verdict::Ok);
        pass(1800).await;
        let (calls, done) = (world.cluster.calls(), world.published("other").len());
        assert!(done >= 28, "{done} of the other category, {refusal:?}");
        pass(600).await;
        assert!(world.published("other").len() >= done + 9, "{refusal:?}");
        let calls = world.cluster.calls() - calls;
        assert!(calls < 10_000, "{calls} calls in ten minutes, {refusal:?}");
        assert_eq!(world.published("app").len(), 0);
        world.cluster.refuse_below(None);
        pass(300).await;
        let published = world.published("app");
        assert!(published.len() >= 40, "{} of 45, {refusal:?}", published.len());
        assert_eq!(published.values().map(|hour| hour.records).sum::<u64>(), 50);
        let left: Vec<DfsPath> = (world.cluster.files().into_keys())
            .filter(|path| path.as_str().starts_with("_tributary/lanes") && !path.name().starts_with("ledger-"))
            .collect();
        assert!(left.len() < 3, "attempts that failed left {left:?}, {refusal:?}");
        root.crash(&world);
    }
}
