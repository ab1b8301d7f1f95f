//! What servers do to their log files, with the tools that do it: logrotate in its ways, cp, mv, rm, ln, sed, rsync's way
//! of replacing a file. Each line arrives once.

use std::path::Path;
use std::process::Command;

use crate::support::{Scene, append, lines, wait_for};

fn run(program: &str, arguments: &[&Path]) {
    let status = Command::new(program).args(arguments).status().expect("it runs");
    assert!(status.success(), "{program}: {status}");
}

/// A scene in which only `a.log` itself is included.
async fn narrow() -> Scene {
    let mut scene = Scene::new(1).await;
    scene.include = "a.log";
    scene
}

/// One in which `a.log` and all that begins so is.
async fn wide() -> Scene {
    let mut scene = Scene::new(1).await;
    scene.include = "a.log*";
    scene
}

/// Rotates several times while an agent runs, and once more while it is stopped, with more lines at each place.
async fn rotate_all_ways(scene: &Scene, directives: &str) {
    let log = scene.log("a.log");
    append(&log, &lines(0..1000));
    let agent = scene.start();
    let mut written = 1000;
    for _ in 0..3 {
        scene.expect_lines(&lines(0..written)).await;
        append(&log, &lines(written..written + 500));
        scene.logrotate(directives);
        append(&log, &lines(written + 500..written + 700));
        written += 700;
        // A date is in some names, down to the second.
        if directives.contains("dateext") {
            std::thread::sleep(std::time::Duration::from_millis(1100));
        }
    }
    scene.expect_lines(&lines(0..written)).await;
    agent.stop().await;
    append(&log, &lines(written..written + 300));
    scene.logrotate(directives);
    append(&log, &lines(written + 300..written + 400));
    written += 400;
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..written)).await;
    // Nothing of it comes again.
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..written)).await;
}

#[tokio::test]
async fn logrotate_that_renames() {
    rotate_all_ways(&narrow().await, "create").await;
    rotate_all_ways(&wide().await, "create").await;
}

#[tokio::test]
async fn logrotate_that_renames_and_compresses_at_once() {
    rotate_all_ways(&narrow().await, "create\ncompress").await;
    rotate_all_ways(&wide().await, "create\ncompress").await;
}

#[tokio::test]
async fn logrotate_that_renames_and_compresses_the_next_time() {
    rotate_all_ways(&narrow().await, "create\ncompress\ndelaycompress").await;
    rotate_all_ways(&wide().await, "create\ncompress\ndelaycompress").await;
}

#[tokio::test]
async fn logrotate_that_puts_the_date_into_names() {
    rotate_all_ways(&narrow().await, "create\ncompress\ndateext\ndateformat -%Y%m%d-%s\nextension .log").await;
    rotate_all_ways(&wide().await, "create\ndateext\ndateformat -%Y%m%d-%s").await;
}

#[tokio::test]
async fn logrotate_that_copies_and_truncates() {
    rotate_all_ways(&narrow().await, "copytruncate").await;
    rotate_all_ways(&wide().await, "copytruncate").await;
}

#[tokio::test]
async fn logrotate_that_copies_truncates_and_compresses() {
    rotate_all_ways(&narrow().await, "copytruncate\ncompress").await;
    rotate_all_ways(&wide().await, "copytruncate\ncompress\ndelaycompress").await;
}

#[tokio::test]
async fn several_rotations_between_two_scans() {
    let mut scene = wide().await;
    // Scans come only when something hints at a change.
    scene.settings = String::new();
    let log = scene.log("a.log");
    append(&log, &lines(0..10));
    let agent = scene.start();
    scene.expect_lines(&lines(0..10)).await;
    for n in 1..8 {
        append(&log, &lines(n * 100..n * 100 + 50));
        scene.logrotate("create");
    }
    let expected: Vec<_> = lines(0..10).into_iter().chain((1..8).flat_map(|n| lines(n * 100..n * 100 + 50))).collect();
    scene.expect_lines(&expected).await;
    agent.stop().await;
}

/// The agent sleeps while a log is made, written and renamed several times, to names that its pattern doesn't match: no scan
/// ever sees these files by the names by which they are logs.
async fn rotate_unseen(directives: &str) {
    let mut scene = narrow().await;
    // Hints alone bring a scan.
    scene.refresh_interval = "10m";
    let log = scene.log("a.log");
    append(&log, &lines(0..10));
    let agent = scene.spawn(&[], &[], None);
    scene.expect_lines(&lines(0..10)).await;
    for round in 0..3_u32 {
        agent.signal("STOP");
        let from = 100 + round * 1000;
        for n in 0..7 {
            append(&log, &lines(from + n * 100..from + n * 100 + 50));
            scene.logrotate(directives);
            if directives.contains("dateext") {
                std::thread::sleep(std::time::Duration::from_millis(1100));
            }
        }
        append(&log, &lines(from + 700..from + 750));
        agent.signal("CONT");
        let rounds = (0..=round).flat_map(|round| (0..8).map(move |n| 100 + round * 1000 + n * 100));
        let expected: Vec<_> = lines(0..10).into_iter().chain(rounds.flat_map(|from| lines(from..from + 50))).collect();
        scene.expect_lines(&expected).await;
    }
}

#[tokio::test]
async fn logs_that_were_rotated_before_any_scan_saw_them_are_followed_by_their_renames() {
    rotate_unseen("create").await;
    rotate_unseen("create\ndateext\ndateformat -%Y%m%d-%s").await;
}

#[tokio::test]
async fn memory_is_bounded_while_the_rest_of_a_log_is_read_from_a_compressed_file() {
    let scene = narrow().await;
    append(&scene.log("a.log"), &lines(0..10));
    scene.once().await.expect("all is shipped");
    let mut bytes = std::fs::read(scene.log("a.log")).expect("read");
    let line = [&[b'z'; 4000][..], b"\n"].concat();
    while bytes.len() < 128 << 20 {
        bytes.extend_from_slice(&line);
    }
    bytes.extend_from_slice(b"the end\n");
    std::fs::remove_file(scene.log("a.log")).expect("removed");
    let packed = zstd::encode_all(&bytes[..], 1).expect("compressed");
    std::fs::write(scene.log("a.log.1.zst"), packed).expect("written");
    let agent = scene.spawn(&[], &[], None);
    let ended = || scene.root().records.iter().any(|(_, record)| record == b"the end");
    wait_for(ended, || format!("{} records came", scene.root().records.len())).await;
    assert_eq!(scene.root().records.len(), bytes.iter().filter(|byte| **byte == b'\n').count());
    assert!(agent.peak_memory() < 64 << 20, "{} bytes", agent.peak_memory());
}

#[tokio::test]
async fn what_was_compressed_by_zstd_while_the_agent_was_stopped_is_found() {
    let scene = narrow().await;
    let log = scene.log("a.log");
    append(&log, &lines(0..1000));
    scene.once().await.expect("all is shipped");
    append(&log, &lines(1000..1500));
    let bytes = std::fs::read(&log).expect("read");
    std::fs::write(scene.log("a.log.1.zst"), zstd::encode_all(&bytes[..], 1).expect("compressed")).expect("written");
    std::fs::remove_file(&log).expect("removed");
    append(&log, &lines(1500..1600));
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..1600)).await;
}

#[tokio::test]
async fn what_was_compressed_is_found_although_the_log_is_empty_since() {
    let scene = narrow().await;
    append(&scene.log("a.log"), &lines(0..1000));
    scene.once().await.expect("all is shipped");
    append(&scene.log("a.log"), &lines(1000..1500));
    scene.logrotate("copytruncate\ncompress");
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..1500)).await;
}

#[tokio::test]
async fn an_agent_that_is_killed_while_it_ships_from_a_compressed_file_goes_on_there() {
    let scene = narrow().await;
    let log = scene.log("a.log");
    append(&log, &lines(0..1000));
    scene.once().await.expect("all is shipped");
    append(&log, &lines(1000..40_000));
    scene.logrotate("nocreate\ncompress");
    while scene.root().records.len() < 40_000 {
        let before = scene.root().batches;
        let agent = scene.start();
        wait_for(
            || scene.root().batches > before || scene.root().records.len() == 40_000,
            || format!("{} lines came", scene.root().records.len()),
        )
        .await;
        agent.kill().await;
    }
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..40_000)).await;
}

#[tokio::test]
async fn a_copy_beside_the_log_is_not_another_log() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..2000));
    scene.once().await.expect("all is shipped");
    run("cp", &[&scene.log("a.log"), &scene.log("copy.log")]);
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..2000)).await;
    // What a copy has beyond the original is its own.
    let agent = scene.start();
    append(&scene.log("copy.log"), &lines(5000..5100));
    append(&scene.log("a.log"), &lines(2000..2100));
    let expected = [lines(0..2100), lines(5000..5100)].concat();
    scene.expect_lines(&expected).await;
    agent.stop().await;
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&expected).await;
}

#[tokio::test]
async fn a_file_that_was_replaced_by_another_with_the_same_lines_goes_on() {
    let scene = Scene::new(1).await;
    let log = scene.log("a.log");
    append(&log, &lines(0..2000));
    let agent = scene.start();
    scene.expect_lines(&lines(0..2000)).await;
    let mut written = 2000;
    for _ in 0..4 {
        // An editor, or rsync: a new file in the place of the old one.
        run("cp", &[&log, &scene.log("new")]);
        run("mv", &[&scene.log("new"), &log]);
        append(&log, &lines(written..written + 10));
        written += 10;
        scene.expect_lines(&lines(0..written)).await;
    }
    agent.stop().await;
    run("cp", &[&log, &scene.log("new")]);
    run("mv", &[&scene.log("new"), &log]);
    append(&log, &lines(written..written + 10));
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&lines(0..written + 10)).await;
}

#[tokio::test]
async fn a_directory_restored_from_a_backup_is_not_shipped_again() {
    let scene = Scene::new(1).await;
    append(&scene.log("a.log"), &lines(0..2000));
    append(&scene.log("b.log"), &lines(10_000..12_000));
    scene.once().await.expect("all is shipped");
    let expected = [lines(0..2000), lines(10_000..12_000)].concat();
    for name in ["a.log", "b.log"] {
        run("cp", &[&scene.log(name), &scene.log("backup")]);
        run("rm", &[&scene.log(name)]);
        run("cp", &[&scene.log("backup"), &scene.log(name)]);
    }
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&expected).await;
    append(&scene.log("a.log"), &lines(2000..2010));
    scene.once().await.expect("all is shipped");
    scene.expect_lines(&[expected, lines(2000..2010)].concat()).await;
}

#[tokio::test]
async fn files_that_begin_alike_are_different_logs() {
    let scene = Scene::new(1).await;
    let banner = vec!["#Version: 1.0".to_owned(), "#Fields: date time".to_owned()];
    let mut expected = Vec::new();
    for n in 0..20_u32 {
        let own = [banner.clone(), lines(n * 100..n * 100 + n)].concat();
        append(&scene.log(&format!("{n}.log")), &own);
        expected.extend(own);
    }
    let agent = scene.start();
    scene.expect_lines(&expected).await;
    // And another that has only the banner for now.
    append(&scene.log("late.log"), &banner);
    expected.extend(banner.clone());
    scene.expect_lines(&expected).await;
    append(&scene.log("late.log"), &lines(9000..9010));
    expected.extend(lines(9000..9010));
    scene.expect_lines(&expected).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_rotated_log_that_begins_like_the_one_before_is_another_log() {
    let scene = wide().await;
    let log = scene.log("a.log");
    let mut expected = Vec::new();
    let agent = scene.start();
    for n in 0..4_u32 {
        let own = [vec!["same".to_owned(); 3000], lines(n * 10..n * 10 + 5)].concat();
        append(&log, &own);
        expected.extend(own);
        scene.expect_lines(&expected).await;
        scene.logrotate("create");
    }
    agent.stop().await;
}

#[tokio::test]
async fn links_lead_to_one_stream() {
    let scene = Scene::new(1).await;
    let log = scene.log("a.log");
    append(&log, &lines(0..100));
    std::fs::hard_link(&log, scene.log("hard.log")).expect("linked");
    std::os::unix::fs::symlink(&log, scene.log("soft.log")).expect("linked");
    std::os::unix::fs::symlink(scene.log("nowhere"), scene.log("dangling.log")).expect("linked");
    std::os::unix::fs::symlink(scene.log("loop.log"), scene.log("loop.log")).expect("linked");
    let agent = scene.start();
    scene.expect_lines(&lines(0..100)).await;
    std::fs::remove_file(&log).expect("removed");
    append(&scene.log("hard.log"), &lines(100..200));
    scene.expect_lines(&lines(0..200)).await;
    agent.stop().await;
    assert_eq!(scene.root().streams.len(), 1);
}

#[tokio::test]
async fn a_link_that_is_swapped_leads_to_the_next_file() {
    let mut scene = Scene::new(1).await;
    scene.include = "current/app.log";
    for day in ["1", "2"] {
        std::fs::create_dir(scene.log(day)).expect("made");
    }
    append(&scene.log("1/app.log"), &lines(0..100));
    std::os::unix::fs::symlink(scene.log("1"), scene.log("current")).expect("linked");
    let agent = scene.start();
    scene.expect_lines(&lines(0..100)).await;
    append(&scene.log("1/app.log"), &lines(100..150));
    append(&scene.log("2/app.log"), &lines(150..200));
    std::os::unix::fs::symlink(scene.log("2"), scene.log("next")).expect("linked");
    std::fs::rename(scene.log("next"), scene.log("current")).expect("swapped");
    scene.expect_lines(&lines(0..200)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_name_that_becomes_a_directory_and_a_file_again() {
    let scene = Scene::new(1).await;
    let log = scene.log("a.log");
    append(&log, &lines(0..100));
    let agent = scene.start();
    scene.expect_lines(&lines(0..100)).await;
    std::fs::remove_file(&log).expect("removed");
    std::fs::create_dir(&log).expect("made");
    append(&scene.log("b.log"), &lines(100..110));
    scene.expect_lines(&lines(0..110)).await;
    std::fs::remove_dir(&log).expect("removed");
    append(&log, &lines(110..200));
    scene.expect_lines(&lines(0..200)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_file_overwritten_with_as_many_bytes_is_noticed() {
    let scene = Scene::new(1).await;
    let log = scene.log("a.log");
    append(&log, &lines(0..50));
    let agent = scene.start();
    scene.expect_lines(&lines(0..50)).await;
    // Emptied and filled again, with not a byte more than before.
    std::fs::write(
        &log,
        lines(1000..1050)
            .iter()
            .enumerate()
            .map(|(n, line)| {
                let len = lines(0..50)[n].len();
                format!("{:.len$}\n", format!("{line}{}", "y".repeat(100)))
            })
            .collect::<String>(),
    )
    .expect("written");
    let expected: Vec<String> = std::fs::read_to_string(&log).expect("read").lines().map(str::to_owned).collect();
    scene.expect_lines(&[lines(0..50), expected].concat()).await;
    agent.stop().await;
}
