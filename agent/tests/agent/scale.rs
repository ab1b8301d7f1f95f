//! Many files, few descriptors, little memory; a system that doesn't tell of changes, or not of all.

use std::time::Instant;

use crate::support::{Scene, append, lines, random_lines, wait_for};

/// Writes `count` files of one line each, and returns the lines.
fn many_files(scene: &Scene, count: u32) -> Vec<String> {
    let all = lines(0..count);
    for (n, line) in all.iter().enumerate() {
        append(&scene.log(&format!("{n}.log")), std::slice::from_ref(line));
    }
    all
}

#[tokio::test]
async fn ten_thousand_files_are_shipped_with_few_descriptors_and_little_memory() {
    let mut scene = Scene::new(1).await.answers_operators();
    scene.settings = "limits = { max_open_files = 300 }".into();
    let mut expected = many_files(&scene, 10_000);
    let agent = scene.spawn(&[], &[], None);
    scene.expect_lines(&expected).await;
    // Those that grow now have been closed for others, most of them.
    for round in 0..3_u32 {
        for n in 0..100_u32 {
            let line = format!("round {round} of {n}");
            append(&scene.log(&format!("{}.log", n * 97)), std::slice::from_ref(&line));
            expected.push(line);
        }
        scene.expect_lines(&expected).await;
        let open = agent.open_files(&scene.log(""));
        assert!((1..=300).contains(&open), "{open} files are open");
    }
    // Of the program built for tests; the files' own share is what is bounded here.
    assert!(agent.peak_memory() < 128 << 20, "{} bytes", agent.peak_memory());
}

#[tokio::test]
async fn a_file_that_was_closed_for_others_is_noticed_when_it_grows() {
    let mut scene = Scene::new(1).await;
    // Scans are not what finds it.
    scene.refresh_interval = "10m";
    scene.settings = "limits = { max_open_files = 1 }".into();
    let all = many_files(&scene, 10);
    let agent = scene.start();
    scene.expect_lines(&all).await;
    for n in 0..10_u32 {
        append(&scene.log(&format!("{n}.log")), &lines(1000 + n..1001 + n));
        scene.expect_lines(&lines(0..10).into_iter().chain(lines(1000..1001 + n)).collect::<Vec<_>>()).await;
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_directory_with_many_foreign_files_does_not_hurt() {
    let mut scene = Scene::new(1).await.answers_operators();
    scene.refresh_interval = "10m";
    for n in 0..100_000 {
        std::fs::File::create(scene.log(&format!("{n}.tmp"))).expect("made");
    }
    append(&scene.log("a.log"), &lines(0..100));
    let agent = scene.start();
    scene.expect_lines(&lines(0..100)).await;
    let before = scene.metric_now("scans_total").await;
    for n in 0..20_u32 {
        for foreign in 0..100 {
            std::fs::remove_file(scene.log(&format!("{}.tmp", n * 100 + foreign))).expect("removed");
            std::fs::write(scene.log(&format!("{n}-{foreign}.new")), "foreign").expect("written");
        }
        append(&scene.log("a.log"), &lines(100 + n..101 + n));
        append(&scene.log(&format!("{n}.log")), &lines(1000 + n..1001 + n));
        scene.expect_lines(&[lines(0..101 + n), lines(1000..1001 + n)].concat()).await;
    }
    assert_eq!(scene.metric_now("scans_total").await, before, "foreign files made the agent scan");
    agent.stop().await;
}

#[tokio::test]
async fn without_hints_all_is_found_by_scans() {
    let mut scene = Scene::new(1).await;
    scene.settings = "watch = false\nlimits = { max_open_files = 2 }".into();
    let mut expected = many_files(&scene, 6);
    let agent = scene.start();
    scene.expect_lines(&expected).await;
    for n in 0..6_u32 {
        append(&scene.log(&format!("{n}.log")), &lines(1000 + n..1001 + n));
        append(&scene.log(&format!("new-{n}.log")), &lines(2000 + n..2001 + n));
        expected.extend([lines(1000 + n..1001 + n), lines(2000 + n..2001 + n)].concat());
        scene.expect_lines(&expected).await;
    }
    append(&scene.log("a.log"), &lines(3000..3010));
    expected.extend(lines(3000..3010));
    // What no scan has seen under its name can't be known for a log.
    scene.expect_lines(&expected).await;
    append(&scene.log("a.log"), &lines(3010..3020));
    scene.logrotate("create");
    append(&scene.log("a.log"), &lines(3020..3030));
    expected.extend(lines(3010..3030));
    scene.expect_lines(&expected).await;
    agent.stop().await;
}

#[tokio::test]
async fn where_the_system_has_no_watches_left_scans_find_all_and_it_is_said_once() {
    // A user namespace has limits of its own: with none left, the others on this machine are not disturbed.
    let limited = [
        "unshare",
        "--user",
        "--map-root-user",
        "sh",
        "-c",
        "echo 0 > /proc/sys/user/max_inotify_watches && exec \"$@\"",
        "sh",
    ];
    let possible = std::process::Command::new(limited[0]).args(&limited[1..]).arg("true").output();
    if !possible.as_ref().is_ok_and(|output| output.status.success()) {
        return eprintln!("SKIPPED: this test needs a user namespace of its own, and may not have one: {possible:?}");
    }
    let scene = Scene::new(1).await.answers_operators();
    append(&scene.log("a.log"), &lines(0..100));
    let agent = scene.spawn(&limited, &[], None);
    scene.expect_lines(&lines(0..100)).await;
    scene.metric("unwatched_directories", 1).await;
    for n in 1..10_u32 {
        append(&scene.log("a.log"), &lines(n * 100..n * 100 + 50));
        append(&scene.log(&format!("{n}.log")), &lines(n * 100 + 50..n * 100 + 100));
        scene.expect_lines(&lines(0..n * 100 + 100)).await;
    }
    let log = agent.log();
    assert_eq!(log.matches("directories can't be watched").count(), 1, "{log}");
}

#[tokio::test]
async fn what_an_overflowing_queue_does_not_tell_is_found_by_a_scan() {
    let mut scene = Scene::new(1).await.answers_operators();
    // Only the overflow itself brings a scan.
    scene.refresh_interval = "10m";
    append(&scene.log("a.log"), &lines(0..10));
    let agent = scene.spawn(&[], &[], None);
    scene.expect_lines(&lines(0..10)).await;
    agent.signal("STOP");
    // Several events each, and the queue holds 16,384 by default.
    let limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("read");
    let files = limit.trim().parse::<u32>().expect("a number") / 4 + 1000;
    for n in 0..files {
        std::fs::write(scene.log(&format!("{n}.tmp")), "foreign").expect("written");
    }
    append(&scene.log("late.log"), &lines(10..20));
    agent.signal("CONT");
    scene.expect_lines(&lines(0..20)).await;
    assert!(scene.metric_now("watch_overflows_total").await > 0);
    assert!(agent.log().contains("the system could not tell of all changes"), "{}", agent.log());
}

#[tokio::test]
async fn a_file_at_full_speed_does_not_starve_the_others() {
    let mut scene = Scene::new(1).await;
    // Slow enough that the large file takes far longer than the small ones.
    scene.settings = "bytes_per_second = \"400 KiB\"\nlimits = { max_buffer_bytes = \"1 MiB\" }".into();
    let large = random_lines("large", 400_000);
    append(&scene.log("large.log"), &large);
    let agent = scene.start();
    wait_for(|| !scene.root().records.is_empty(), || "nothing comes".into()).await;
    for n in 0..20 {
        append(&scene.log(&format!("small-{n}.log")), &[format!("small {n}")]);
    }
    let small = || scene.root().records.iter().filter(|(_, record)| record.starts_with(b"small")).count();
    wait_for(|| small() == 20, || format!("{} small files came", small())).await;
    let shipped = scene.root().records.len();
    assert!(shipped < large.len(), "the large file was shipped first");
    agent.stop().await;
}

/// However slow this machine is: it only makes that less.
#[tokio::test]
async fn at_no_time_more_was_sent_than_bytes_per_second_allows() {
    const RATE: usize = 400 << 10;
    let mut scene = Scene::new(1).await;
    scene.settings = "bytes_per_second = \"400 KiB\"".into();
    let lines = random_lines("a", 60_000);
    append(&scene.log("a.log"), &lines);
    let begun = Instant::now();
    let agent = scene.start();
    scene.expect_lines(&lines).await;
    agent.stop().await;
    let mut sent = 0;
    for (at, bytes) in scene.edges[0].arrivals() {
        sent += bytes;
        let allowed = (at - begun).as_secs_f64() * RATE as f64;
        assert!(sent as f64 <= allowed, "{sent} bytes where {allowed} are allowed");
    }
    assert!(sent > RATE, "{sent} bytes show nothing");
}

#[tokio::test]
async fn deleted_files_are_warned_of_before_they_are_given_up() {
    let mut scene = Scene::new(1).await.answers_operators();
    scene.settings = "limits = { max_held_bytes = \"1 MiB\" }".into();
    scene.root().committing = false;
    append(&scene.log("a.log"), &lines(0..12_000));
    let agent = scene.spawn(&[], &[], None);
    scene.expect_lines(&lines(0..12_000)).await;
    scene.metric("held_above_half", 0).await;
    std::fs::remove_file(scene.log("a.log")).expect("removed");
    scene.metric("held_above_half", 1).await;
    let log = agent.log();
    assert_eq!(log.matches("hold more than half of what is allowed").count(), 1, "{log}");
    // Now it is too much.
    append(&scene.log("b.log"), &lines(12_000..24_000));
    scene.expect_lines(&lines(0..24_000)).await;
    std::fs::remove_file(scene.log("b.log")).expect("removed");
    scene.answer("/metrics", |text| !text.contains("tributary_agent_lost_bytes_total 0\n")).await;
    scene.metric("held_above_half", 1).await;
    assert!(agent.log().contains("a deleted file was given up"), "{}", agent.log());
}

#[tokio::test]
async fn a_file_that_may_not_be_read_is_warned_of_once_and_shipped_when_it_may_be() {
    use std::os::unix::fs::PermissionsExt;
    const NOBODY: u32 = 65_534;
    let scene = Scene::new(1).await.answers_operators();
    if std::os::unix::fs::chown(scene.dir(), Some(NOBODY), None).is_err() {
        return eprintln!("SKIPPED: this test runs an agent as another user, which takes root");
    }
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("changed");
    };
    append(&scene.log("a.log"), &lines(0..10));
    append(&scene.log("secret.log"), &lines(10..20));
    mode(&scene.log("secret.log"), 0o600);
    let agent = scene.spawn(&[], &[], Some(NOBODY));
    scene.expect_lines(&lines(0..10)).await;
    scene.metric("unreadable_files", 1).await;
    let scans = scene.metric_now("scans_total").await;
    scene.answer("/metrics", |text| !text.contains(&format!("scans_total {scans}\n"))).await;
    let log = agent.log();
    assert_eq!(log.matches("a file can't be opened").count(), 1, "{log}");
    mode(&scene.log("secret.log"), 0o644);
    scene.expect_lines(&lines(0..20)).await;
    scene.metric("unreadable_files", 0).await;
}
