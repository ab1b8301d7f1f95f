//! An agent over real files, in front of edges in this process: every line arrives once, whatever happens to the files,
//! the agent and the edges.

use crate::support::{Scene, append, lines, wait_for};
use tributary_common::messages::Verdict;

#[tokio::test]
async fn a_file_is_shipped_once_and_the_program_ends() {
    let scene = Scene::new(1).await;
    let expected = lines(0..20_000);
    append(&scene.log("a.log"), &expected);
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&expected).await;
    assert!(scene.root().batches > 5, "several batches");
}

#[tokio::test]
async fn lines_that_come_later_follow() {
    let scene = Scene::new(1).await;
    let expected = lines(0..300);
    let agent = scene.start();
    for (n, some) in expected.chunks(100).enumerate() {
        append(&scene.log("a.log"), some);
        scene.expect_lines(&expected[..(n + 1) * 100]).await;
    }
    append(&scene.log("new.log"), &lines(300..310));
    scene.expect_lines(&lines(0..310)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_file_that_is_rotated_away_is_followed_to_its_end() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..100));
    let agent = scene.start();
    scene.expect_lines(&lines(0..100)).await;
    for rotation in 1..4_u32 {
        let (from, old) = (rotation * 100, scene.log(&format!("a.log.{rotation}")));
        std::fs::rename(scene.log("a.log"), &old).expect("renamed");
        // Its writer has not been told yet.
        append(&old, &lines(from..from + 50));
        append(&scene.log("a.log"), &lines(from + 50..from + 100));
        scene.expect_lines(&lines(0..from + 100)).await;
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_file_renamed_within_the_pattern_is_not_read_again() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..1000));
    let agent = scene.start();
    scene.expect_lines(&lines(0..1000)).await;
    std::fs::rename(scene.log("a.log"), scene.log("a-1.log")).expect("renamed");
    append(&scene.log("a.log"), &lines(1000..1010));
    scene.expect_lines(&lines(0..1010)).await;
    agent.stop().await;
    scene.once().await.expect("nothing is left");
    scene.expect_lines(&lines(0..1010)).await;
}

#[tokio::test]
async fn a_file_that_is_truncated_in_place_begins_anew() {
    let scene = Scene::new(1).await;
    let log = scene.log("a.log");
    append(&log, &lines(0..500));
    let agent = scene.start();
    scene.expect_lines(&lines(0..500)).await;
    for round in 1..4_u32 {
        let writer = std::fs::OpenOptions::new().write(true).open(&log).expect("opens");
        writer.set_len(0).expect("truncated");
        // Longer than before, so that the size alone would not show it.
        append(&log, &lines(round * 1000..round * 1000 + 600));
        let expected = (1..=round).flat_map(|round| lines(round * 1000..round * 1000 + 600));
        scene.expect_lines(&lines(0..500).into_iter().chain(expected).collect::<Vec<_>>()).await;
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_truncated_file_with_the_same_first_line_is_another_stream() {
    let scene = Scene::new(1).await;
    let log = scene.log("a.log");
    let first = ["# version 1".to_owned()];
    let mut expected = Vec::new();
    let agent = scene.start();
    for round in 0..3_u32 {
        std::fs::write(&log, "").expect("truncated");
        append(&log, &first);
        append(&log, &lines(round * 100..round * 100 + 50 + round));
        expected.extend(first.iter().cloned().chain(lines(round * 100..round * 100 + 50 + round)));
        scene.expect_lines(&expected).await;
    }
    agent.stop().await;
    assert_eq!(scene.root().streams.len(), 3);
}

#[tokio::test]
async fn a_file_that_is_deleted_while_open_is_shipped_to_its_end() {
    let scene = Scene::new(1).await;
    scene.edges[0].fail(Some(http::StatusCode::SERVICE_UNAVAILABLE));
    append(&scene.log("a.log"), &lines(0..3000));
    let agent = scene.start();
    scene.edges[0].fail(None);
    wait_for(|| !scene.root().streams.is_empty(), || "nothing came".into()).await;
    append(&scene.log("a.log"), &lines(3000..9000));
    std::fs::remove_file(scene.log("a.log")).expect("removed");
    scene.expect_lines(&lines(0..9000)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_restart_goes_on_where_it_was_with_and_without_the_database() {
    let scene = Scene::new(1).await;
    for round in 0..6_u32 {
        append(&scene.log("a.log"), &lines(round * 2000..round * 2000 + 2000));
        append(&scene.log("b.log"), &lines(100_000 + round * 10..100_000 + round * 10 + 10));
        let agent = scene.start();
        let expected = lines(0..round * 2000 + 2000).into_iter().chain(lines(100_000..100_000 + round * 10 + 10));
        scene.expect_lines(&expected.collect::<Vec<_>>()).await;
        if round % 3 == 0 {
            agent.stop().await;
        } else {
            agent.kill().await;
        }
        if round % 2 == 1 {
            std::fs::remove_dir_all(scene.data_dir()).expect("removed");
        }
    }
    assert_eq!(scene.root().streams.len(), 2);
}

#[tokio::test]
async fn an_agent_that_is_killed_in_the_middle_loses_and_doubles_nothing() {
    let scene = Scene::new(1).await;
    let expected = lines(0..60_000);
    append(&scene.log("a.log"), &expected);
    for n in 0..8 {
        let before = scene.root().batches;
        let agent = scene.start();
        wait_for(
            || scene.root().batches > before || scene.root().records.len() == expected.len(),
            || "no batch came".into(),
        )
        .await;
        agent.kill().await;
        if n % 2 == 1 && scene.data_dir().exists() {
            std::fs::remove_dir_all(scene.data_dir()).expect("removed");
        }
    }
    scene.once().await.expect("the rest is shipped");
    scene.expect_lines(&expected).await;
}

#[tokio::test]
async fn a_file_rotated_while_the_agent_was_stopped_is_found_by_its_inode() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..100));
    let agent = scene.start();
    scene.expect_lines(&lines(0..100)).await;
    agent.stop().await;
    append(&scene.log("a.log"), &lines(100..150));
    std::fs::rename(scene.log("a.log"), scene.log("a.log.1")).expect("renamed");
    append(&scene.log("a.log"), &lines(150..200));
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..200)).await;
}

#[tokio::test]
async fn a_last_line_without_its_newline_waits_or_is_given_one() {
    let mut scene = Scene::new(1).await;
    scene.source = "partial_line_timeout = \"300ms\"".into();
    let log = scene.log("a.log");
    append(&log, &lines(0..3));
    std::fs::write(&log, std::fs::read_to_string(&log).expect("read") + "half").expect("written");
    let agent = scene.start();
    let with = |line: &str| [lines(0..3), vec![line.to_owned()]].concat();
    scene.expect_lines(&with("half")).await;
    append(&log, &[String::new(), "whole".into()]);
    let expected = [with("half"), vec!["whole".to_owned()]].concat();
    scene.expect_lines(&expected).await;
    agent.stop().await;
}

#[tokio::test]
async fn once_ships_the_unterminated_last_line_and_a_first_line_without_end() {
    let scene = Scene::new(1).await;
    std::fs::write(scene.log("a.log"), "one\ntwo").expect("written");
    std::fs::write(scene.log("b.log"), "only").expect("written");
    std::fs::write(scene.log("c.log"), "").expect("written");
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&["one".into(), "only".into(), "two".into()]).await;
}

#[tokio::test]
async fn hours_that_interleave_arrive_in_their_buckets() {
    let mut scene = Scene::new(1).await;
    scene.source = "[source.timestamp]\nformat = \"%Y-%m-%dT%H:%M:%SZ\"\n".into();
    let hour = jiff::Timestamp::now().as_second() / 3600 * 3600 - 7200;
    let time =
        |n: u32| jiff::Timestamp::from_second(hour + i64::from(n % 3) * 3600 + i64::from(n % 60)).expect("valid");
    let timed = |n: u32| format!("{:.0} {n}", time(n));
    let expected: Vec<String> = (0..2000).map(timed).flat_map(|line| [line, "  at the same time".to_owned()]).collect();
    append(&scene.log("a.log"), &expected);
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&expected).await;
    let root = scene.root();
    let mut continued = 0;
    for (bucket, record) in &root.records {
        let record = String::from_utf8_lossy(record);
        match record.split_once(' ').and_then(|(time, _)| time.parse::<jiff::Timestamp>().ok()) {
            Some(time) => assert_eq!(time.as_second() / 3600 * 3600, *bucket, "{record}"),
            None => continued += 1,
        }
    }
    assert_eq!(continued, 2000);
}

#[tokio::test]
async fn what_a_dead_edge_held_is_sent_again_to_the_next_one() {
    let scene = Scene::new(2).await;
    scene.edges[0].forward(false);
    let expected = lines(0..20_000);
    append(&scene.log("a.log"), &expected[..15_000]);
    let agent = scene.start();
    wait_for(|| scene.edges[0].held() > 3, || "nothing came".into()).await;
    scene.edges[0].fail(Some(http::StatusCode::INTERNAL_SERVER_ERROR));
    append(&scene.log("a.log"), &expected[15_000..]);
    scene.expect_lines(&expected).await;
    agent.stop().await;
    assert!(scene.edges[1].requests() > 0);
}

#[tokio::test]
async fn what_an_edge_lost_is_sent_again_also_when_nothing_new_comes() {
    let scene = Scene::new(1).await;
    scene.edges[0].forward(false);
    let expected = lines(0..5000);
    append(&scene.log("a.log"), &expected);
    let agent = scene.start();
    wait_for(|| scene.edges[0].held() > 2, || "nothing came".into()).await;
    scene.edges[0].lose_spool();
    scene.edges[0].forward(true);
    scene.expect_lines(&expected).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_root_that_does_not_own_the_lane_says_who_does() {
    let scene = Scene::new(3).await;
    scene.edges[0].redirect(&scene.edges[2].url);
    append(&scene.log("a.log"), &lines(0..2000));
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..2000)).await;
    assert_eq!((scene.edges[0].requests(), scene.edges[1].requests()), (1, 0));
}

#[tokio::test]
async fn an_edge_that_is_being_emptied_is_left_at_once() {
    let scene = Scene::new(2).await;
    scene.edges[0].drain();
    append(&scene.log("a.log"), &lines(0..2000));
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..2000)).await;
    assert_eq!(scene.edges[0].requests(), 1);
}

#[tokio::test]
async fn an_edge_that_is_busy_is_asked_again() {
    let scene = Scene::new(1).await;
    scene.edges[0].fail(Some(http::StatusCode::SERVICE_UNAVAILABLE));
    append(&scene.log("a.log"), &lines(0..100));
    let agent = scene.start();
    wait_for(|| scene.edges[0].requests() > 1, || "it is not asked again".into()).await;
    assert_eq!(scene.root().lines().len(), 0);
    scene.edges[0].fail(None);
    scene.expect_lines(&lines(0..100)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_stream_that_upstream_can_not_take_now_waits() {
    let scene = Scene::new(1).await;
    scene.root().answer = Some(Verdict::Wait { reason: "being recovered".into() });
    append(&scene.log("a.log"), &lines(0..10_000));
    let agent = scene.start();
    wait_for(|| scene.edges[0].requests() > 3, || "it is not asked again".into()).await;
    scene.root().answer = None;
    scene.expect_lines(&lines(0..10_000)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_stream_that_upstream_refuses_stops_and_once_says_so() {
    let scene = Scene::new(1).await;
    scene.root().answer = Some(Verdict::Refused { reason: "not in this house".into() });
    append(&scene.log("a.log"), &lines(0..10));
    let error = scene.once().await.expect_err("it can't be shipped");
    assert!(error.contains("not in this house"), "{error}");
    scene.root().answer = None;
    scene.once().await.expect("a new run tries again");
    scene.expect_lines(&lines(0..10)).await;
}

#[tokio::test]
async fn a_request_that_is_refused_stops_only_the_streams_in_it() {
    let scene = Scene::new(1).await;
    scene.edges[0].refuse_first_line("bad");
    append(&scene.log("bad.log"), &["bad".to_owned()]);
    append(&scene.log("a.log"), &lines(0..1000));
    append(&scene.log("b.log"), &lines(1000..2000));
    let error = scene.once().await.expect_err("one can't be shipped");
    assert!(error.starts_with("1 files") && error.contains("400"), "{error}");
    scene.expect_lines(&lines(0..2000)).await;
}

#[tokio::test]
async fn a_root_that_forgot_a_stream_gets_the_rest_as_a_new_one() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..1000));
    let agent = scene.start();
    scene.expect_lines(&lines(0..1000)).await;
    // What was committed is in the files of the root; only what it knows of the stream is gone.
    wait_for(|| scene.root().streams.values().all(|stream| stream.committed.offset > 0), || "not committed".into())
        .await;
    agent.stop().await;
    let before = std::mem::take(&mut scene.root().streams);
    scene.edges[0].lose_spool();
    append(&scene.log("a.log"), &lines(1000..2000));
    scene.once().await.expect("the rest is shipped");
    scene.expect_lines(&lines(0..2000)).await;
    let root = scene.root();
    let (old, new) = (before.values().next().expect("one"), root.streams.values().next().expect("one"));
    assert_eq!(new.base, old.committed);
}

#[tokio::test]
async fn a_file_that_was_restored_and_went_on_otherwise_continues_as_a_new_stream() {
    let scene = Scene::new(1).await;
    let log = scene.log("a.log");
    append(&log, &lines(0..500));
    scene.once().await.expect("shipped");
    let snapshot = std::fs::read(&log).expect("read");
    append(&log, &lines(500..700));
    scene.once().await.expect("shipped");
    // The same inode, the content of the snapshot, and other lines than those that upstream has.
    std::fs::write(&log, snapshot).expect("written");
    append(&log, &lines(7000..7900));
    scene.once().await.expect("shipped");
    let expected = [lines(0..700), lines(7000..7900)].concat();
    scene.expect_lines(&expected).await;
}

#[tokio::test]
async fn a_compressed_file_is_not_shipped() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..10));
    std::fs::write(scene.log("a.1.log"), [0x1f, 0x8b, 8, 0, b'\n', b'x', b'\n']).expect("written");
    scene.once().await.expect("shipped");
    scene.expect_lines(&lines(0..10)).await;
}

#[tokio::test]
async fn a_file_seen_first_is_read_from_its_end_if_so_wished() {
    let mut scene = Scene::new(1).await;
    scene.source = "read_from = \"end\"".into();
    append(&scene.log("a.log"), &lines(0..100));
    let agent = scene.start();
    wait_for(|| scene.edges[0].requests() > 1, || "it does not ask".into()).await;
    append(&scene.log("a.log"), &lines(100..110));
    scene.expect_lines(&lines(100..110)).await;
    append(&scene.log("new.log"), &lines(110..120));
    scene.expect_lines(&lines(100..120)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_category_that_upstream_does_not_have_is_waited_for() {
    let scene = Scene::new(1).await;
    let categories = scene.edges[0].set_categories(std::collections::BTreeMap::new());
    append(&scene.log("a.log"), &lines(0..10));
    let error = scene.once().await.expect_err("it can't be shipped");
    assert!(error.contains("the category app is not in the topology"), "{error}");
    let agent = scene.start();
    scene.edges[0].set_categories(categories);
    scene.expect_lines(&lines(0..10)).await;
    agent.stop().await;
}

#[tokio::test]
async fn long_lines_are_split_and_prefixed() {
    let mut scene = Scene::new(1).await;
    scene.source = "record_prefix = \"{host} \"".into();
    std::fs::write(scene.log("a.log"), format!("short\n{}\nend\n", "y".repeat(300_000))).expect("written");
    scene.once().await.expect("shipped");
    let pieces = (0..73).map(|_| format!("web-1 {}", "y".repeat(4096)));
    let rest = format!("web-1 {}", "y".repeat(300_000 - 73 * 4096));
    let expected: Vec<String> = pieces.chain([rest, "web-1 short".into(), "web-1 end".into()]).collect();
    scene.expect_lines(&expected).await;
}

#[tokio::test]
async fn a_corrupt_database_stops_nothing() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..1000));
    scene.once().await.expect("shipped");
    std::fs::write(scene.data_dir().join("checkpoints.db"), vec![7; 5000]).expect("written");
    append(&scene.log("a.log"), &lines(1000..2000));
    scene.once().await.expect("shipped");
    scene.expect_lines(&lines(0..2000)).await;
    assert!(scene.data_dir().join("checkpoints.db.corrupt-1").exists());
}

#[tokio::test]
async fn more_files_than_may_be_open_are_shipped_one_after_the_other() {
    let mut scene = Scene::new(1).await;
    scene.settings = "limits = { max_open_files = 3 }".into();
    for n in 0..10 {
        append(&scene.log(&format!("{n}.log")), &lines(n * 100..n * 100 + 100));
    }
    let agent = scene.start();
    scene.expect_lines(&lines(0..1000)).await;
    append(&scene.log("0.log"), &lines(1000..1010));
    scene.expect_lines(&lines(0..1010)).await;
    agent.stop().await;
}
