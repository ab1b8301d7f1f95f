//! Agents that stay away, stand still, leave and seem to come back.

use super::*;
use crate::root::hours::{MANIFEST_FILE, Manifest, PARTIAL_FILE, Partial};

/// The first minute of 1970.
const HOUR: &str = "app/dt=1970-01-01/hm=0000";

/// Agents are waited for during `patience` in vain.
fn giving_up_after(patience: Duration, publish_partial: bool) -> LaneSettings {
    // Longer than the pause between two looks at the hours, so that the lane is seen to serve.
    let mut settings = LaneSettings { ledger_interval: Duration::from_millis(200), publish_partial, ..settings(0) };
    for category in settings.categories.values_mut() {
        category.give_up_after = patience;
    }
    settings
}

fn report_of(agent: &str) -> Report {
    Report::new(LaneId(0), agent.parse().expect("valid"), category(), format!("{agent}.example"), RunId(7))
}

impl Harness {
    /// Says the next report of a run until it counts.
    async fn say(&self, report: &mut Report) {
        self.ready().await;
        loop {
            report.number += 1;
            let answer = self.root.reports(vec![report.clone()]).await.expect("there is room").remove(0);
            report.session = answer.session.or(report.session);
            if answer.heard == report.number {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn agents(&self) -> u64 {
        self.ready().await;
        self.root.status().await["lanes"]["0"]["agents"].as_u64().expect("a number")
    }

    fn has(&self, name: &str) -> bool {
        self.dir.join(HOUR).join(name).exists()
    }

    fn read<T: serde::de::DeserializeOwned>(&self, name: &str) -> T {
        serde_json::from_slice(&std::fs::read(self.dir.join(HOUR).join(name)).expect("reads")).expect("as written")
    }

    fn given_up(&self) -> u64 {
        let samples = self.root.lanes[&LaneId(0)].metrics.samples();
        samples.iter().find(|(name, ..)| *name == "root_hours_given_up").map(|(.., value)| *value).expect("counted")
    }
}

#[tokio::test]
async fn an_hour_is_given_up_after_give_up_after_and_says_whom_it_does_without() {
    for publish_partial in [false, true] {
        let dir = tempdir();
        let root = Harness::start(dir.path(), giving_up_after(Duration::from_millis(600), publish_partial));
        let (log, dead) = (Log::new(1, 100, 0, 1), Log::new(2, 50, 0, 1).of("web-2", LaneCount::ONE));
        assert_eq!(root.offer(log.batch(0, 100)).await.verdict, Verdict::Ok);
        assert_eq!(root.offer(dead.batch(0, 50)).await.verdict, Verdict::Ok);
        root.committed(&dead, dead.len()).await;
        until(async || root.has(MANIFEST_FILE)).await;
        let partial: Partial = root.read(PARTIAL_FILE);
        assert_eq!(
            (partial.version, partial.category, partial.bucket_start_s, partial.bucket_size_s),
            (1, category(), 0, 60)
        );
        let [missing] = partial.missing.as_slice() else { panic!("{:?}", partial.missing) };
        assert_eq!((missing.agent.as_str(), missing.watermark_ms, missing.offsets.len()), ("web-2", None, 0));
        let manifest: Manifest = root.read(MANIFEST_FILE);
        assert_eq!((manifest.complete, manifest.records, manifest.missing.len()), (false, 150, 1));
        assert_eq!(root.has("_SUCCESS"), publish_partial, "it has one only where partial hours are to be published");
        assert!(root.given_up() > 0);
        assert_eq!(root.lines(), sorted(&[&log, &dead]));
    }
}

#[tokio::test]
async fn an_agent_whose_watermark_stands_still_while_its_logs_flow_holds_an_hour_for_give_up_after_and_no_longer() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), giving_up_after(Duration::from_millis(600), false));
    let now = WallClock::system().now_ms();
    let mut said = report_of("web-2");
    said.watermark_ms = Some(now - 3_600_000);
    said.held_by = "a.log: a file can't be opened".to_owned();
    root.say(&mut said).await;
    let log = Log::new(1, 50, 0, 1).of("web-2", LaneCount::ONE);
    assert_eq!(root.offer(log.batch(0, 50)).await.verdict, Verdict::Ok);
    // Lines of now, a commit for each, for as long as it takes.
    let flow = Log::new(2, 1000, now, 0).of("web-2", LaneCount::ONE);
    let mut sent = 0;
    while !root.has(PARTIAL_FILE) && sent < 1000 {
        assert_eq!(root.offer(flow.batch(sent, sent + 1)).await.verdict, Verdict::Ok);
        root.say(&mut said).await;
        sent += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let partial: Partial = root.read(PARTIAL_FILE);
    assert_eq!(partial.missing[0].watermark_ms, said.watermark_ms);
    assert!(!root.has("_SUCCESS"));
}

#[tokio::test]
async fn batches_do_not_bring_an_agent_back_that_has_left_and_its_reports_do() {
    let dir = tempdir();
    let root = Harness::start(dir.path(), settings(0));
    // An hour of the future stays open, and its file too.
    let start = (WallClock::system().now_ms() / MINUTE_MS + 100) * MINUTE_MS;
    let log = Log::new(1, 100, start, 1).of("web-2", LaneCount::ONE);
    assert_eq!(root.offer(log.batch(0, 50)).await.verdict, Verdict::Ok);
    root.committed(&log, log.line_start(50)).await;
    // The harness's own agent, too.
    until(async || root.agents().await == 2).await;
    let mut said = report_of("web-2");
    said.watermark_ms = Some(WallClock::system().now_ms());
    root.say(&mut said).await;
    said.last = true;
    root.say(&mut said).await;
    assert_eq!(root.agents().await, 1, "it has left");
    // An edge that was down while it left sends what it had spooled, and the report that it had kept.
    for round in 0..2 {
        for (from, to) in [(0, 50), (20, 40)] {
            assert_eq!(root.offer(log.batch(from, to)).await.verdict, Verdict::Ok);
        }
        let kept = Report { number: 2, last: false, ..said.clone() };
        root.root.reports(vec![kept]).await.expect("there is room");
        assert_eq!(root.agents().await, 1, "round {round}");
    }
    let root = root.restart().await;
    assert_eq!(root.offer(log.batch(0, 50)).await.verdict, Verdict::Ok);
    assert_eq!(root.agents().await, 1, "the next owner does not take it for an agent that came back, either");
    assert_eq!(root.offer(log.batch(50, 100)).await.verdict, Verdict::Ok);
    assert_eq!(root.agents().await, 1, "what nobody had yet is stored, and may be of one that was retired");
    let mut anew = Report { run: RunId(8), ..report_of("web-2") };
    root.say(&mut anew).await;
    assert_eq!(root.agents().await, 2, "it lives");
}
