//! What an agent reports: that everything up to a time lies below some offsets, and when it doesn't know that.

use std::collections::BTreeMap;
use std::io::Write;

use tributary_common::ids::StreamId;
use tributary_common::report::{Report, StreamOffset};

use crate::support::{Scene, append, lines, random_lines, wait_for};

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

fn watermarks(scene: &Scene) -> Vec<i64> {
    scene.edges[0].reports().iter().filter_map(|(report, _)| report.watermark_ms).collect()
}

/// How many bytes a report says to be all: those that it names, and of the others what is committed.
fn claimed(report: &Report, committed: &BTreeMap<StreamId, u64>) -> u64 {
    let mut all = committed.clone();
    for StreamOffset { stream, offset } in &report.required {
        let known = all.entry(*stream).or_insert(0);
        *known = (*known).max(*offset);
    }
    all.values().sum()
}

async fn watermark_after(scene: &Scene, time_ms: i64) {
    wait_for(
        || watermarks(scene).last().is_some_and(|at| *at >= time_ms),
        || format!("{:?}", scene.edges[0].reports().last()),
    )
    .await;
}

#[tokio::test]
async fn an_agent_without_any_file_reports_too() {
    let scene = Scene::new(1).await;
    let agent = scene.start();
    wait_for(|| scene.edges[0].reports().len() >= 3, || "it is silent".into()).await;
    watermark_after(&scene, now_ms()).await;
    let (last, _) = scene.edges[0].reports().pop().expect("a report");
    assert!(last.required.is_empty() && last.session.is_some() && !last.last, "{last:?}");
    let numbers: Vec<u64> = scene.edges[0].reports().iter().map(|(report, _)| report.number).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    agent.stop().await;
}

#[tokio::test]
async fn every_line_from_before_a_watermark_lies_below_its_offsets_through_rotations_and_new_files() {
    let scene = Scene::new(1).await;
    let agent = scene.start();
    // When so many bytes had been written, in all files together.
    let mut written: Vec<(i64, u64)> = Vec::new();
    let mut total = 0;
    for round in 0..60_u32 {
        let lines = lines(round * 100..round * 100 + 100);
        let name = if round % 7 == 3 { format!("new-{round}.log") } else { "a.log".to_owned() };
        append(&scene.log(&name), &lines);
        total += lines.iter().map(|line| line.len() as u64 + 1).sum::<u64>();
        written.push((now_ms(), total));
        match round % 10 {
            4 => std::fs::rename(scene.log("a.log"), scene.log(&format!("a-{round}.log"))).expect("renamed"),
            // What can't be sent must be named.
            6 => scene.edges[0].forward(false),
            9 => scene.edges[0].forward(true),
            _ => {}
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    scene.edges[0].forward(true);
    watermark_after(&scene, now_ms()).await;
    let mut named = 0;
    for (report, committed) in scene.edges[0].reports() {
        let Some(watermark_ms) = report.watermark_ms else { continue };
        let before = written.iter().take_while(|(time, _)| *time < watermark_ms).last().map_or(0, |(_, bytes)| *bytes);
        let claimed = claimed(&report, &committed);
        assert!(
            claimed >= before,
            "{before} bytes were written before {watermark_ms}, {claimed} are claimed: {report:?}"
        );
        named += usize::from(!report.required.is_empty());
    }
    assert!(named > 0, "nothing was ever named");
    agent.stop().await;
}

#[tokio::test]
async fn the_beginning_of_a_line_holds_the_watermark_for_partial_line_timeout_at_most() {
    let mut scene = Scene::new(1).await;
    scene.source = "partial_line_timeout = \"2s\"".into();
    append(&scene.log("a.log"), &lines(0..10));
    let agent = scene.start();
    watermark_after(&scene, now_ms()).await;
    let mut file = std::fs::OpenOptions::new().append(true).open(scene.log("a.log")).expect("opened");
    file.write_all(b"half a li").expect("written");
    let since = now_ms();
    let mut behind = false;
    // Something is added all the time, and never a newline.
    while watermarks(&scene).last().is_some_and(|at| *at < since) {
        behind |= scene.edges[0].reports().last().is_some_and(|(report, _)| report.held_by.contains("a.log"));
        file.write_all(b"n").expect("written");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(behind, "nobody said what held it");
    agent.stop().await;
}

#[tokio::test]
async fn a_file_that_cannot_be_read_yet_holds_the_watermark() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..10));
    scene.edges[0].fail(Some(http::StatusCode::SERVICE_UNAVAILABLE));
    let agent = scene.start();
    scene.answered().await;
    scene.edges[0].fail(None);
    scene.expect_lines(&lines(0..10)).await;
    watermark_after(&scene, now_ms()).await;
    let first = scene.edges[0].reports().into_iter().find(|(report, _)| report.watermark_ms.is_some()).expect("one");
    assert!(claimed(&first.0, &first.1) > 0, "the first watermark was told before the file was read: {first:?}");
    agent.stop().await;
}

/// What is cut off before it was read is never read.
#[tokio::test]
async fn a_file_that_is_cut_before_it_was_read_does_not_hold_the_watermark_for_ever() {
    let mut scene = Scene::new(1).await;
    // Slow enough that most of the file is still to be read when it is cut.
    scene.settings = "bytes_per_second = \"400 KiB\"\nlimits = { max_buffer_bytes = \"1 MiB\" }".into();
    let lines = random_lines("a", 300_000);
    append(&scene.log("a.log"), &lines);
    let agent = scene.start();
    let is_behind = || scene.edges[0].reports().last().is_some_and(|(report, _)| report.held_by.contains("being read"));
    wait_for(is_behind, || format!("{:?}", scene.edges[0].reports().last())).await;
    let kept = &lines[..280_000];
    let len = kept.iter().map(|line| line.len() as u64 + 1).sum();
    std::fs::OpenOptions::new().write(true).open(scene.log("a.log")).and_then(|file| file.set_len(len)).expect("cut");
    watermark_after(&scene, now_ms()).await;
    scene.expect_lines(kept).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_run_that_ships_once_ends_with_a_last_report_that_is_heard() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..1000));
    scene.once().await.expect("all is shipped");
    let (last, committed) = scene.edges[0].reports().pop().expect("a report");
    assert!(last.last && last.required.is_empty() && last.watermark_ms.is_some(), "{last:?}");
    assert_eq!(committed.values().sum::<u64>(), std::fs::metadata(scene.log("a.log")).expect("there").len());
}

/// An agent was killed when it had named all of `a.log`; nobody else has it, and it is waited for. Returns what it had named.
async fn killed_after_naming() -> (Scene, Vec<StreamOffset>) {
    let scene = Scene::new(1).await;
    scene.edges[0].forward(false);
    append(&scene.log("a.log"), &lines(0..100));
    let agent = scene.start();
    let named = || scene.edges[0].reports().into_iter().map(|(report, _)| report.required).find(|all| !all.is_empty());
    wait_for(|| named().is_some(), || "nothing is named".into()).await;
    agent.kill().await;
    let named = named().expect("named");
    scene.edges[0].lose_spool();
    scene.edges[0].forward(true);
    scene.edges[0].awaits(named.clone());
    (scene, named)
}

/// A run that was killed when it had named offsets, and whose file is gone: where only runs that ship once are started, none of
/// them lives long enough to look for it for long.
#[tokio::test]
async fn a_run_that_ships_once_declares_lost_what_a_run_before_had_named_and_is_gone() {
    let (scene, named) = killed_after_naming().await;
    std::fs::remove_file(scene.log("a.log")).expect("removed");
    // Also with another file, which may have the inode number of that one.
    for name in [None, Some("b.log")] {
        if let Some(name) = name {
            append(&scene.log(name), &lines(100..200));
        }
        scene.once().await.expect("all is shipped");
        let (last, _) = scene.edges[0].reports().pop().expect("a report");
        assert!(last.last, "{last:?}");
        assert_eq!(last.lost, named.iter().map(|one| one.stream).collect::<Vec<_>>());
    }
}

/// As of a machine that lost its power: its file system brings the file back without what was not written to the disk yet.
#[tokio::test]
async fn a_file_that_was_cut_off_below_what_a_run_before_had_named_is_declared_lost_from_there_on() {
    let (scene, named) = killed_after_naming().await;
    let file = std::fs::OpenOptions::new().write(true).open(scene.log("a.log")).expect("opens");
    let kept: usize = lines(0..50).iter().map(|line| line.len() + 1).sum();
    file.set_len(kept as u64).expect("cut off");
    for (more, lost) in [(0..0, vec![named[0].stream]), (50..100, Vec::new())] {
        append(&scene.log("a.log"), &lines(more));
        scene.once().await.expect("all is shipped");
        let (last, committed) = scene.edges[0].reports().pop().expect("a report");
        assert_eq!(committed.get(&named[0].stream), Some(&file.metadata().expect("there").len()));
        assert!(last.last && last.lost == lost, "{last:?}");
    }
}

#[tokio::test]
async fn what_is_stored_and_whose_file_is_gone_is_not_declared_lost_where_it_is_still_waited_for() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..100));
    scene.once().await.expect("all is shipped");
    let (_, committed) = scene.edges[0].reports().pop().expect("a report");
    std::fs::remove_file(scene.log("a.log")).expect("removed");
    // As by an owner that has just taken the lane.
    scene.edges[0].awaits(committed.into_iter().map(|(stream, offset)| StreamOffset { stream, offset }).collect());
    scene.once().await.expect("nothing is left");
    let (last, _) = scene.edges[0].reports().pop().expect("a report");
    assert!(last.last && last.lost.is_empty(), "{last:?}");
}

/// By bucket, what the last report says to be stored.
fn told(scene: &Scene) -> Vec<(i64, u64, u64)> {
    let last = scene.edges[0].reports().pop();
    let counts = last.into_iter().flat_map(|(report, _)| report.counts);
    counts.map(|count| (count.start_s, count.records, count.bytes)).collect()
}

#[tokio::test]
async fn reports_say_how_much_of_each_bucket_is_stored_and_never_too_much() {
    let mut scene = Scene::new(1).await;
    scene.source = "[source.timestamp]\nformat = \"%Y-%m-%dT%H:%M:%SZ\"\n".into();
    let at = |hour: i64, lines: u32| -> Vec<String> {
        let line = |n| format!("2026-11-22T{:02}:{:02}:00Z line {n:03}", 20 + hour, n % 60);
        (0..lines).map(line).collect()
    };
    let start_s =
        |hour: i64| "2026-11-22T20:00:00Z".parse::<jiff::Timestamp>().expect("a time").as_second() + hour * 3600;
    let each = at(0, 1)[0].len() as u64 + 1;
    // Before it is stored, nothing of it is.
    scene.edges[0].forward(false);
    append(&scene.log("a.log"), &[at(0, 120), at(1, 30)].concat());
    let agent = scene.start();
    wait_for(|| scene.edges[0].held() > 0, || "nothing comes".into()).await;
    watermark_after(&scene, now_ms()).await;
    assert_eq!(told(&scene), []);
    scene.edges[0].forward(true);
    let whole = vec![(start_s(0), 120, 120 * each), (start_s(1), 30, 30 * each)];
    wait_for(|| told(&scene) == whole, || format!("{:?}", told(&scene))).await;
    // What is lost above and sent again counts once.
    scene.edges[0].forward(false);
    append(&scene.log("a.log"), &at(1, 10));
    wait_for(|| scene.edges[0].held() > 0, || "nothing comes".into()).await;
    scene.edges[0].lose_spool();
    scene.edges[0].forward(true);
    let whole = vec![(start_s(0), 120, 120 * each), (start_s(1), 40, 40 * each)];
    wait_for(|| told(&scene) == whole, || format!("{:?}", told(&scene))).await;
    agent.stop().await;

    // Another run knows of what it read itself.
    append(&scene.log("a.log"), &at(2, 7));
    let agent = scene.start();
    wait_for(|| told(&scene) == [(start_s(2), 7, 7 * each)], || format!("{:?}", told(&scene))).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_restart_begins_a_new_run_that_counts_from_one() {
    let scene = Scene::new(1).await;
    for _ in 0..2 {
        let agent = scene.start();
        watermark_after(&scene, now_ms()).await;
        agent.stop().await;
    }
    let reports = scene.edges[0].reports();
    let runs: std::collections::BTreeSet<_> = reports.iter().map(|(report, _)| report.run).collect();
    assert_eq!(runs.len(), 2);
    assert_eq!(reports.iter().filter(|(report, _)| report.number == 1).count(), 2);
}
