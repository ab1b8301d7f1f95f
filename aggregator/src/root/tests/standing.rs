//! How hours stand, as operators see it, and hours of agents that come and go.

use super::*;
use crate::root::open_hours::{OpenHour, OpenHours};

async fn open_hours(root: &Harness, lane: LaneId) -> Vec<OpenHour> {
    let status = root.root.status().await;
    let open = &status["lanes"][lane.to_string()]["open_hours"]["app"];
    serde_json::from_value::<OpenHours>(open.clone()).map_or_else(|_| Vec::new(), |open| open.hours)
}

#[tokio::test]
async fn an_hour_that_a_lane_has_sealed_is_listed_while_it_waits_for_another_lane() {
    let dir = tempdir();
    let lanes = LaneCount::try_from(2).expect("valid");
    let root = Harness::start(dir.path(), LaneSettings { lanes, ..settings(0) });
    root.ready().await;
    // Says all the time that all is stored, and so its lane seals.
    let log = Log::new(1, 100, 0, 1).of("web-1", lanes);
    let other = (2..).map(|n| format!("web-{n}"));
    let other = other.map(|name| Log::new(2, 50, 0, 1).of(&name, lanes)).find(|other| other.lane != log.lane);
    // Says nothing, and so its lane waits.
    let other = other.expect("one of them is in the other lane");
    for batch in [other.batch(0, 50), log.batch(0, 100)] {
        assert_eq!(root.offer(batch).await.verdict, Verdict::Ok);
    }
    let first_minute = async |lane| open_hours(&root, lane).await.into_iter().find(|hour| hour.bucket_start_s == 0);
    until(async || first_minute(log.lane).await.is_some_and(|hour| hour.sealed)).await;
    // From the announcement on, and when the seal lies in the hour's directory.
    until(async || {
        files(&dir.path().join("app")).iter().any(|file| file.ends_with(format!("_seal-{}.json", log.lane)))
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let sealed = first_minute(log.lane).await.expect("it is not published yet");
    assert_eq!((sealed.over, sealed.sealed, sealed.waiting_for), (true, true, 0));
    let waiting = first_minute(other.lane).await.expect("it is open");
    assert_eq!((waiting.sealed, waiting.records, waiting.waiting_for), (false, 50, 1));
    assert_eq!((waiting.agents[0].behind_ms, waiting.agents[0].uncommitted_bytes), (None, 0));
}

/// Says that an agent has shipped all, and that no more will come.
async fn take_leave(root: &Harness, agent: &AgentId) {
    let now_ms = root.settings.clock.now_ms();
    let run = RunId(now_ms.cast_unsigned());
    let mut report = Report {
        watermark_ms: Some(now_ms),
        last: true,
        ..Report::new(LaneId(0), agent.clone(), category(), agent.to_string(), run)
    };
    loop {
        report.number += 1;
        let answers = root.root.reports(vec![report.clone()]).await.expect("there is room");
        report.session = answers[0].session.or(report.session);
        if answers[0].heard == report.number {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// As of servers that ship by `tributary-agent run --once` from cron: between two runs nobody is expected.
#[tokio::test]
async fn an_hour_of_agents_that_come_and_go_is_open_for_close_delay_and_has_what_the_next_run_brings() {
    let dir = tempdir();
    let close_delay = Duration::from_secs(3);
    let mut settings = settings(0);
    settings.categories.get_mut(&category()).expect("there").close_delay = close_delay;
    let dfs: Arc<dyn Dfs> = Arc::new(LocalDfs::open(dir.path()).expect("a directory"));
    let root = Arc::new(Root::keep(&dfs, &settings, BTreeMap::new(), |_| alone()));
    let root = Harness { dir: dir.path().to_owned(), settings, root };
    root.ready().await;
    let began = tokio::time::Instant::now();
    let (first, second) = (Log::new(1, 100, 0, 1), Log::new(2, 50, 0, 1));
    for log in [&first, &second] {
        assert_eq!(root.offer(log.batch(0, log.lines.len())).await.verdict, Verdict::Ok);
        root.committed(log, log.len()).await;
        take_leave(&root, &log.agent).await;
        let expected = root.root.status().await["lanes"]["0"]["agents"].clone();
        assert_eq!(expected, 0, "nobody is expected between two runs");
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(root.lines(), Vec::<String>::new(), "it is open");
    }
    root.published(1).await;
    assert!(began.elapsed() >= close_delay, "{:?}", began.elapsed());
    assert_eq!(root.lines(), sorted(&[&first, &second]));
    let late = files(&dir.path().join("app/dt=1970-01-01/hm=0000/_late"));
    assert!(late.is_empty(), "{late:?}");
}
