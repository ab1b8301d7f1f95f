use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tributary_common::messages::{Answer, Verdict};
use tributary_common::position::Position;

use super::*;
use crate::dfs::hostile::{HostileCluster, HostileDfs, Hostility, SETTLE};
use crate::root::Root;
use crate::root::storm::lines;
use crate::root::tests::{Log, alone, category, say_that_all_is_stored, settings};
use crate::surroundings::WallClock;
use crate::tier::{Overloaded, Tier};

const LINES: usize = 120;

fn count(lanes: u16) -> LaneCount {
    LaneCount::try_from(lanes).expect("valid")
}

fn lane_settings(cluster: &HostileCluster, lanes: LaneCount) -> LaneSettings {
    let clock = {
        let cluster = cluster.clone();
        WallClock::new(move || cluster.now_ms())
    };
    let mut settings = LaneSettings {
        lanes,
        commit_interval: Duration::from_secs(1),
        ledger_interval: Duration::from_secs(10),
        settle: SETTLE,
        clock,
        ..settings(0)
    };
    settings.categories.get_mut(&category()).expect("there").close_delay = Duration::from_secs(30);
    settings
}

fn start(cluster: &HostileCluster, lanes: LaneCount) -> (Arc<Root>, HostileDfs) {
    let process = cluster.process();
    let dfs: Arc<dyn Dfs> = Arc::new(process.clone());
    let settings = lane_settings(cluster, lanes);
    let root = Arc::new(Root::keep(&dfs, &settings, BTreeMap::new(), |_| alone()));
    for n in 0..4 {
        let (agent, clock) = (format!("web-{n}").parse().expect("valid"), settings.clock.clone());
        tokio::spawn(say_that_all_is_stored(Arc::downgrade(&root), clock, agent, Duration::from_secs(5), Vec::new()));
    }
    (root, process)
}

async fn offer(root: &Root, log: &Log, from: usize, to: usize, committed: Position) -> Result<Answer, Overloaded> {
    let mut batch = log.batch(from, to);
    batch.batch.header.committed = committed;
    root.offer(vec![batch]).await.map(|mut answers| answers.remove(0))
}

/// Sends the lines up to `to` until they are committed.
async fn send(root: &Root, log: &Log, to: usize, mut committed: Position) -> Position {
    let (mut from, mut tries) = (0, 0);
    while committed.offset < log.line_start(to) {
        tries += 1;
        assert!(tries < 1_000, "{committed} of {} is committed", log.line_start(to));
        if let Ok(answer) = offer(root, log, from, to, committed).await {
            assert!(!matches!(answer.verdict, Verdict::Unknown | Verdict::Diverged { .. }), "{answer:?}");
            committed = answer.committed.filter(|at| at.offset > committed.offset).unwrap_or(committed);
            if let Some(next) = answer.next {
                assert!(next.offset >= committed.offset, "what was told committed is gone: {answer:?}");
                from = (0..to).rev().find(|line| log.line_start(*line) <= next.offset).expect("a line");
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    committed
}

async fn changes(seed: u64) -> u32 {
    let cluster = HostileCluster::new(seed, Hostility::none());
    let mut rng = StdRng::seed_from_u64(seed);
    let (from, to) = (count(rng.random_range(1..=4)), count(rng.random_range(1..=4)));
    let start_ms = cluster.now_ms();
    let log = |n: u32, lanes| Log::new(u128::from(n), LINES, start_ms, 1_000).of(&format!("web-{n}"), lanes);
    let (root, process) = start(&cluster, from);
    let mut committed = Vec::new();
    for n in 0..4 {
        committed.push(send(&root, &log(n, from), LINES / 2, Position::zero()).await);
    }
    // More that is on its way when it ends.
    if rng.random_bool(0.5) {
        let last = log(3, from);
        offer(&root, &last, LINES / 2, LINES / 2 + 20, committed[3]).await.expect("there is room");
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..500))).await;
    }
    cluster.crash(&process);
    drop(root);
    cluster.set_hostility(Hostility::storm());
    let mut crashes = 0;
    let mut said = Vec::new();
    loop {
        let process = cluster.process();
        let dfs: Arc<dyn Dfs> = Arc::new(process.clone());
        // A root with the old number comes back in between, and must not serve once the change is on its way.
        let (root, old) = if rng.random_bool(0.3) { Some(start(&cluster, from)) } else { None }.unzip();
        let patience = Duration::from_millis(rng.random_range(1..120_000));
        let settings = lane_settings(&cluster, from);
        let changed = tokio::time::timeout(patience, change_lanes(&dfs, &settings, to)).await;
        cluster.crash(&process);
        old.iter().for_each(|old| cluster.crash(old));
        drop(root);
        match changed {
            Ok(Ok(changed)) => {
                assert_eq!(changed.to, to);
                break;
            }
            Ok(Err(error @ ChangeError::Hours { .. })) => {
                said.push(error.to_string());
                // As the message says: the roots put the hours together.
                let (root, process) = start(&cluster, from);
                tokio::time::sleep(Duration::from_secs(120)).await;
                cluster.crash(&process);
                drop(root);
            }
            Ok(Err(error)) => said.push(error.to_string()),
            Err(_) => {}
        }
        crashes += 1;
        if crashes == 40 {
            cluster.set_hostility(Hostility::none());
        }
        assert!(crashes < 80, "seed {seed}: it never ends: {said:#?}");
    }
    cluster.set_hostility(Hostility::none());
    let (root, _) = start(&cluster, to);
    let mut expected = Vec::new();
    for (n, committed) in (0..4).zip(committed) {
        let log = log(n, to);
        send(&root, &log, LINES, committed).await;
        expected.extend(log.lines());
    }
    expected.sort();
    for _ in 0..100 {
        if lines(&cluster).len() >= expected.len() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
    let found = lines(&cluster);
    assert!(found == expected, "seed {seed}: {} lines were found, {} were written", found.len(), expected.len());
    crashes
}

#[test]
fn the_number_of_lanes_is_changed_through_crashes_and_every_line_is_there_once() {
    let number = |name: &str| std::env::var(name).ok().and_then(|number| number.parse().ok());
    let seeds = number("TRIBUTARY_SEEDS").unwrap_or(20);
    let seeds = number("TRIBUTARY_SEED").map_or(0..seeds, |seed| seed..seed + 1);
    let (mut crashes, count) = (0, seeds.end - seeds.start);
    for seed in seeds {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let run = std::panic::AssertUnwindSafe(|| runtime.expect("a runtime").block_on(changes(seed)));
        crashes += std::panic::catch_unwind(run).unwrap_or_else(|panic| {
            eprintln!("the change of seed {seed} went wrong; again with TRIBUTARY_SEED={seed}");
            std::panic::resume_unwind(panic);
        });
    }
    assert!(count == 1 || u64::from(crashes) > count / 2, "it was hardly ever interrupted: {crashes} times");
}

#[tokio::test(start_paused = true)]
async fn roots_keep_away_while_the_number_is_being_changed_and_from_another_number() {
    let cluster = HostileCluster::new(1, Hostility::none());
    let dfs: Arc<dyn Dfs> = Arc::new(cluster.process());
    let settings = lane_settings(&cluster, count(2));
    let unborn = change_lanes(&dfs, &settings, count(3)).await.expect_err("nothing is there");
    assert!(matches!(unborn, ChangeError::Unborn(3)), "{unborn}");
    recovery::check_base(&*dfs, count(2)).await.expect("written");
    dfs.mkdir_all(&tributary(CHANGING_DIR).join("2-to-3@1")).await.expect("made");
    for lanes in [2, 3] {
        let refused = recovery::check_base(&*dfs, count(lanes)).await.expect_err("it is being changed");
        assert!(matches!(refused, TakeError::Changing { from: 2, to: 3 }), "{refused}");
    }
    let other = change_lanes(&dfs, &settings, count(4)).await.expect_err("another one was begun");
    assert!(matches!(other, ChangeError::Begun { .. }), "{other}");
    let changed = change_lanes(&dfs, &settings, count(3)).await.expect("it goes on");
    assert_eq!(changed, Changed { from: count(2), to: count(3) });
    recovery::check_base(&*dfs, count(3)).await.expect("the new number");
    let old = recovery::check_base(&*dfs, count(2)).await.expect_err("the old number");
    assert!(old.to_string().contains("write lanes = 3"), "{old}");
    assert_eq!(change_lanes(&dfs, &settings, count(3)).await.expect("nothing to do").from, count(3));
    // A mark of the change before, made late: it must not lead back.
    dfs.mkdir_all(&tributary(CHANGING_DIR).join("2-to-3@2")).await.expect("made");
    assert_eq!(change_lanes(&dfs, &settings, count(3)).await.expect("nothing to do").from, count(3));
    recovery::check_base(&*dfs, count(3)).await.expect("roots may go on");
}
