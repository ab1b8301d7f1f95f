//! Odd bytes in files, and the times that lines say.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::FileExt;

use jiff::Timestamp;

use crate::support::{Scene, append, lines, wait_for};

const TIMED: &str = "[source.timestamp]\nformat = \"%Y-%m-%dT%H:%M:%SZ\"\n";

/// The start of an hour so many hours ago, in seconds since 1970.
fn hours_ago(hours: i64) -> i64 {
    Timestamp::now().as_second() / 3600 * 3600 - hours * 3600
}

fn written(second: i64) -> String {
    format!("{:.0}", Timestamp::from_second(second).expect("a time"))
}

/// Records by bucket.
fn by_hour(scene: &Scene) -> BTreeMap<i64, Vec<String>> {
    let mut hours: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    for (bucket, record) in &scene.root().records {
        hours.entry(*bucket).or_default().push(String::from_utf8_lossy(record).into_owned());
    }
    hours
}

#[tokio::test]
async fn odd_bytes_arrive_as_they_are() {
    let scene = Scene::new(1).await;
    let odd: [&[u8]; 9] =
        [b"", b"\r", b"dos\r", b"nul \0 nul", &[0; 100], &[0xff, 0x80, 0xc3], b"\xc3(", b" \t ", "€".as_bytes()];
    let file: Vec<u8> = odd.iter().flat_map(|line| [line, &b"\n"[..]].concat()).collect();
    std::fs::write(scene.log("odd.log"), &file).expect("written");
    std::fs::write(scene.log("empty.log"), "").expect("written");
    std::fs::write(scene.log("newline.log"), "\n").expect("written");
    std::fs::write(scene.log("byte.log"), "x").expect("written");
    scene.once().await.expect("all is shipped");
    let mut records: Vec<Vec<u8>> = scene.root().records.iter().map(|(_, record)| record.clone()).collect();
    let mut expected: Vec<Vec<u8>> = odd.iter().chain(&[&b""[..], &b"x"[..]]).map(|line| line.to_vec()).collect();
    records.sort();
    expected.sort();
    assert_eq!(records, expected);
}

#[tokio::test]
async fn a_file_of_one_byte_becomes_a_log_like_any_other() {
    let scene = Scene::new(1).await;
    let log = scene.log("a.log");
    std::fs::write(&log, "").expect("written");
    let agent = scene.start();
    scene.answered().await;
    let mut file = std::fs::OpenOptions::new().append(true).open(&log).expect("opens");
    for byte in b"one\ntwo\n" {
        file.write_all(&[*byte]).expect("written");
    }
    scene.expect_lines(&["one".into(), "two".into()]).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_sparse_region_is_zeros_and_costs_no_memory() {
    let mut scene = Scene::new(1).await;
    scene.source = "long_lines = \"drop\"".into();
    let log = scene.log("a.log");
    append(&log, &lines(0..10));
    let file = std::fs::OpenOptions::new().write(true).open(&log).expect("opens");
    // As a writer leaves it that goes on at its old offset after a truncation.
    file.write_all_at(b"\nbehind the hole\n", 64 << 20).expect("written");
    scene.once().await.expect("all is shipped");
    let expected = [lines(0..10), vec!["behind the hole".into()]].concat();
    scene.expect_lines(&expected).await;
}

#[tokio::test]
async fn a_line_of_a_hundred_mebibytes_is_split_truncated_or_dropped() {
    const LINE: usize = 100 << 20;
    for policy in ["split", "truncate", "drop"] {
        let mut scene = Scene::new(1).await;
        scene.source = format!("long_lines = {policy:?}");
        let mut file = std::fs::File::create(scene.log("a.log")).expect("made");
        file.write_all(b"before\n").expect("written");
        for _ in 0..LINE >> 20 {
            file.write_all(&vec![b'y'; 1 << 20]).expect("written");
        }
        file.write_all(b"\nafter\n").expect("written");
        scene.once().await.expect("all is shipped");
        let root = scene.root();
        let long: Vec<usize> = root.records.iter().map(|(_, record)| record.len()).filter(|len| *len > 10).collect();
        let short = root.records.iter().filter(|(_, record)| record == b"before" || record == b"after").count();
        assert_eq!(short, 2, "{policy}");
        match policy {
            "split" => assert_eq!((long.iter().sum::<usize>(), long.iter().max()), (LINE, Some(&4096))),
            "truncate" => assert_eq!(long, [4096]),
            _ => assert!(long.is_empty(), "{long:?}"),
        }
    }
}

#[tokio::test]
async fn memory_is_bounded_whatever_the_files_do() {
    for policy in ["split", "truncate", "drop"] {
        let mut scene = Scene::new(1).await;
        scene.source = format!("long_lines = {policy:?}");
        let write = |name: &str, piece: &[u8], pieces: usize| {
            let mut file = std::fs::File::create(scene.log(name)).expect("made");
            for _ in 0..pieces {
                file.write_all(piece).expect("written");
            }
            file.write_all(format!("\nend of {name}\n").as_bytes()).expect("written");
        };
        write("long.log", &vec![b'y'; 1 << 20], 100);
        write("newlines.log", &vec![b'\n'; 1 << 20], 4);
        write("zeros.log", &vec![0; 1 << 20], 64);
        let sparse = std::fs::File::create(scene.log("sparse.log")).expect("made");
        sparse.write_all_at(b"\nend of sparse.log\n", 256 << 20).expect("written");
        let agent = scene.spawn(&[], &[], None);
        let ends = || scene.root().records.iter().filter(|(_, record)| record.starts_with(b"end of")).count();
        wait_for(|| ends() == 4, || format!("{} ends came", ends())).await;
        assert!(agent.peak_memory() < 64 << 20, "{policy}: {} bytes", agent.peak_memory());
    }
}

#[tokio::test]
async fn a_file_in_utf_16_is_refused_until_it_is_another() {
    let scene = Scene::new(1).await.answers_operators();
    std::fs::write(scene.log("a.log"), "").expect("written");
    let agent = scene.spawn(&[], &[], None);
    scene.answered().await;
    for _ in 0..3 {
        let mut file = std::fs::OpenOptions::new().append(true).open(scene.log("a.log")).expect("opens");
        file.write_all(b"\xff\xfew\0\n\0").expect("written");
        scene.answer("/status", |text| text.contains("it is UTF-16, which can't be cut into lines")).await;
    }
    assert_eq!(agent.log().matches("a file is not shipped").count(), 1, "{}", agent.log());
    std::fs::write(scene.log("a.log"), "now it is a log\n").expect("written");
    scene.expect_lines(&["now it is a log".into()]).await;
    scene.answer("/status", |text| !text.contains("UTF-16")).await;
}

#[tokio::test]
async fn the_time_of_json_lines_decides_their_hour() {
    let mut scene = Scene::new(1).await;
    scene.source = "[source.timestamp]\nformat = [\"%Y-%m-%dT%H:%M:%SZ\", \"unix_ms\"]\njson_field = \"ts\"\n".into();
    let (old, new) = (hours_ago(5), hours_ago(3));
    let expected = [
        (old, format!("{{\"ts\":\"{}\",\"n\":1}}", written(old + 1))),
        (new, format!("{{\"n\":2,\"ts\" : {}}}", (new + 2) * 1000)),
        (new, "{\"n\":3}".to_owned()),
        (old, format!("{{\"kind\":\"ts\",\"ts\":\"{}\"}}", written(old + 3599))),
    ];
    append(&scene.log("a.log"), &expected.clone().map(|(_, line)| line));
    scene.once().await.expect("all is shipped");
    let mut wanted: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    for (hour, line) in expected {
        wanted.entry(hour).or_default().push(line);
    }
    assert_eq!(by_hour(&scene), wanted);
}

#[tokio::test]
async fn a_stack_trace_stays_with_its_line_across_batches_and_restarts() {
    let mut scene = Scene::new(1).await;
    scene.source = TIMED.into();
    let hour = hours_ago(7);
    let log = scene.log("a.log");
    append(&log, &[format!("{} it broke", written(hour))]);
    let mut traced = 0;
    for round in 0..6_u32 {
        // Longer than a batch, and in the end than what is read of the file to find a time.
        append(
            &log,
            &(0..400).map(|n| format!("\tat com.example.Main({round}.{n}) {}", "x".repeat(400))).collect::<Vec<_>>(),
        );
        traced += 400;
        scene.once().await.expect("shipped");
        if round % 2 == 1 {
            std::fs::remove_dir_all(scene.data_dir()).expect("removed");
        }
    }
    append(&log, &[format!("{} it goes on", written(hour + 3600))]);
    scene.once().await.expect("shipped");
    let hours: Vec<(i64, usize)> = by_hour(&scene).into_iter().map(|(hour, lines)| (hour, lines.len())).collect();
    assert_eq!(hours, [(hour, 1 + traced), (hour + 3600, 1)]);
}

#[tokio::test]
async fn lines_out_of_order_around_the_hour_get_into_their_hours_in_few_batches() {
    let mut scene = Scene::new(1).await;
    scene.source = TIMED.into();
    let hour = hours_ago(3);
    // Up to half a minute of disorder, as many writers to one file make it.
    let second = |n: u32| hour - 60 + i64::from(n / 100) + i64::from(n.wrapping_mul(2_654_435_761) >> 27) - 16;
    let expected: Vec<String> = (0..12_000).map(|n| format!("{} line {n}", written(second(n)))).collect();
    append(&scene.log("a.log"), &expected);
    scene.once().await.expect("shipped");
    scene.expect_lines(&expected).await;
    expect_in_their_hours(&scene, 2);
    expect_few_batches(&scene, &expected);
}

#[tokio::test]
async fn lines_of_many_hours_interleaved_get_into_their_hours_in_few_batches() {
    for hours in [2, 48] {
        let mut scene = Scene::new(1).await;
        scene.source = TIMED.into();
        let hour = hours_ago(50);
        let second = |n: u32| hour + i64::from(n % hours) * 3600 + i64::from(n % 3600);
        let expected: Vec<String> = (0..20_000).map(|n| format!("{} line {n}", written(second(n)))).collect();
        append(&scene.log("a.log"), &expected);
        scene.once().await.expect("shipped");
        scene.expect_lines(&expected).await;
        expect_in_their_hours(&scene, hours as usize);
        expect_few_batches(&scene, &expected);
    }
}

fn expect_in_their_hours(scene: &Scene, count: usize) {
    let hours = by_hour(scene);
    assert_eq!(hours.len(), count);
    for (bucket, lines) in hours {
        for line in lines {
            let time: Timestamp = line.split(' ').next().expect("a time").parse().expect("a time");
            assert_eq!(time.as_second() / 3600 * 3600, bucket, "{line}");
        }
    }
}

fn expect_few_batches(scene: &Scene, lines: &[String]) {
    let least = lines.iter().map(|line| line.len() + 1).sum::<usize>() / (64 << 10) + 1;
    let batches = scene.root().batches as usize;
    assert!(batches <= 2 * least, "{batches} batches, where {least} could do");
}

#[tokio::test]
async fn absurd_times_are_filed_under_the_present_hour() {
    let mut scene = Scene::new(1).await;
    scene.source = TIMED.into();
    let absurd = ["1970-01-01T00:00:00Z a", "9999-12-31T23:59:59Z b", "2999-01-01T00:00:00Z c"].map(str::to_owned);
    let before = hours_ago(0);
    append(&scene.log("a.log"), &absurd);
    scene.once().await.expect("shipped");
    scene.expect_lines(&absurd).await;
    for (bucket, record) in &scene.root().records {
        assert!((before..=hours_ago(0)).contains(bucket), "{bucket} {}", String::from_utf8_lossy(record));
    }
}
