use std::fs;
use std::path::Path;

use clap::Parser;
use serde_json::Value;
use tributary_common::bucket::BucketSize;
use tributary_common::ids::{LaneCount, LaneId};

use super::table::{State, TABLE_VERSION};
use super::*;
use crate::dfs::local::LocalDfs;
use crate::root::hours::{FORM_VERSION, Partial, seal_file};
use crate::root::ledger::{HourKey, SealedFile};
use crate::root::open_hours::{OpenHour, OpenHours};

/// 2026-11-22T20.
const EVENING_S: i64 = 1_795_377_600;
const DAY_S: i64 = 86_400;

fn category() -> CategoryName {
    "app".parse().expect("valid")
}

fn size(seconds: u32) -> BucketSize {
    seconds.try_into().expect("valid")
}

fn bucket(start_s: i64, seconds: u32) -> Bucket {
    Bucket::new(start_s, size(seconds)).expect("a bucket")
}

fn seal(lane: u16, bucket: Bucket, records: u64) -> Seal {
    Seal {
        version: 1,
        lane: LaneId(lane),
        category: category(),
        bucket_start_s: bucket.start_s(),
        bucket_size_s: bucket.size().seconds(),
        files: vec![SealedFile {
            source: "s.gz".into(),
            name: format!("l{lane}.gz"),
            bytes: records * 10,
            crc32c: Default::default(),
            records,
        }],
        inputs: Vec::new(),
        agents: BTreeMap::new(),
        losses: Vec::new(),
        missing: Vec::new(),
        publish_partial: false,
    }
}

fn manifest(bucket: Bucket, records: u64) -> Manifest {
    Manifest::of(&HourKey { category: category(), bucket }, &[seal(0, bucket, records)])
}

fn put(base: &Path, path: &DfsPath, form: &impl serde::Serialize) {
    let path = base.join(path.as_str());
    fs::create_dir_all(path.parent().expect("it has one")).expect("made");
    fs::write(path, serde_json::to_vec(form).expect("plain data")).expect("written");
}

fn publish(base: &Path, bucket: Bucket, manifest: &Manifest) {
    put(base, &HourDirs::new(&category(), bucket).visible.join(MANIFEST_FILE), manifest);
}

fn put_late(base: &Path, bucket: Bucket, name: &str, records: u64) {
    let late = HourDirs::new(&category(), bucket).visible.join(LATE_DIR);
    put(base, &late.join(late_manifest_file(name)), &manifest(bucket, records));
    fs::write(base.join(late.join(name).as_str()), b"data").expect("written");
}

/// What a lane says that names these hours as open, over and not sealed.
fn lane(buckets: &[Bucket]) -> LaneStatus {
    let hours = buckets.iter().map(|bucket| OpenHour {
        bucket_start_s: bucket.start_s(),
        bucket_size_s: bucket.size().seconds(),
        over: true,
        sealed: false,
        records: 0,
        bytes: 0,
        files: 0,
        waiting_for: 0,
        agents: Vec::new(),
        waited_in_vain_s: 0,
    });
    let hours = OpenHours { hours: hours.collect(), left_out: None };
    serde_json::from_value(serde_json::json!({ "epoch": 1, "open_hours": { "app": hours } })).expect("a lane's status")
}

async fn look(base: &Path, lanes: &[LaneStatus], since_s: i64) -> Vec<Hour> {
    let dfs = LocalDfs::open(base).expect("opens");
    let lanes: BTreeMap<LaneId, LaneStatus> = (0..).map(LaneId).zip(lanes.iter().cloned()).collect();
    let found = look_at_sink(&dfs, &[category()], &lanes, since_s).await.expect("reads");
    Table::new(LaneCount::try_from(2).expect("valid"), &lanes, found, None).hours
}

fn states(hours: &[Hour]) -> Vec<(i64, State)> {
    hours.iter().map(|hour| (hour.bucket_start_s - EVENING_S, hour.state)).collect()
}

fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

#[tokio::test]
async fn open_hours_are_listed_however_old_they_are_and_published_ones_by_their_end() {
    let dir = tempdir();
    for hours in -3..0_i64 {
        let hour = bucket(EVENING_S + hours * 3600, 3600);
        publish(dir.path(), hour, &manifest(hour, 1));
    }
    // Of last week: one is open, one was published since the lane said so.
    let (open, old) = (bucket(EVENING_S - 7 * DAY_S, 3600), bucket(EVENING_S - 8 * DAY_S, 3600));
    publish(dir.path(), old, &manifest(old, 1));
    let shown = look(dir.path(), &[lane(&[old, open]), lane(&[])], EVENING_S - 5400).await;
    let complete = |hours: i64| (hours * 3600, State::Complete);
    assert_eq!(states(&shown), [(-7 * DAY_S, State::Open), complete(-2), complete(-1)]);
}

#[tokio::test]
async fn a_day_that_began_before_the_moment_asked_for_is_listed_until_it_is_over() {
    let dir = tempdir();
    let midnight = EVENING_S - 20 * 3600;
    for days in [-1, 0] {
        let day = bucket(midnight + days * DAY_S, 86_400);
        publish(dir.path(), day, &manifest(day, 1));
    }
    let shown = look(dir.path(), &[], EVENING_S).await;
    assert_eq!(states(&shown), [(-20 * 3600, State::Complete)]);
}

#[tokio::test]
async fn an_hour_that_is_being_put_together_is_listed_with_what_its_seals_say() {
    let dir = tempdir();
    let hour = bucket(EVENING_S, 3600);
    let old = bucket(EVENING_S - 7 * DAY_S, 3600);
    for bucket in [hour, old] {
        let hidden = HourDirs::new(&category(), bucket).hidden;
        for (lane, records) in [(0, 7), (1, 8)] {
            put(dir.path(), &hidden.join(seal_file(LaneId(lane))), &seal(lane, bucket, records));
        }
    }
    // Also where no root answers.
    let shown = look(dir.path(), &[], EVENING_S).await;
    assert_eq!(states(&shown), [(0, State::Open)]);
    assert_eq!((shown[0].records, shown[0].bytes, shown[0].files), (15, 150, Some(2)));
    let shown = look(dir.path(), &[lane(&[old]), lane(&[old])], EVENING_S).await;
    assert_eq!((states(&shown)[0], shown[0].records), ((-7 * DAY_S, State::Open), 15));
}

#[tokio::test]
async fn what_came_late_is_counted_and_an_hour_of_nothing_else_is_late() {
    let dir = tempdir();
    let (hour, only_late) = (bucket(EVENING_S, 900), bucket(EVENING_S + 900, 900));
    publish(dir.path(), hour, &manifest(hour, 7));
    put_late(dir.path(), hour, "a.gz", 2);
    put_late(dir.path(), hour, "b.gz", 3);
    // Its file is still on its way.
    let late = HourDirs::new(&category(), hour).visible.join(LATE_DIR);
    put(dir.path(), &late.join(late_manifest_file("c.gz")), &manifest(hour, 100));
    put_late(dir.path(), only_late, "d.gz", 4);
    // Without anything in it there is no such hour.
    let nothing = HourDirs::new(&category(), bucket(EVENING_S + 1800, 900)).visible.join(LATE_DIR);
    fs::create_dir_all(dir.path().join(nothing.as_str())).expect("made");
    let shown = look(dir.path(), &[], EVENING_S).await;
    assert_eq!(states(&shown), [(0, State::Complete), (900, State::Late)]);
    assert_eq!((shown[0].records, shown[0].late), (7, Late { records: 5, bytes: 50, files: 2 }));
    assert_eq!((shown[1].bucket_size_s, shown[1].late), (Some(900), Late { records: 4, bytes: 40, files: 1 }));
}

#[tokio::test]
async fn a_manifest_that_can_not_be_read_is_a_line_that_says_so_and_hides_no_other() {
    let dir = tempdir();
    let [torn, newer, good] = [0, 1, 2].map(|hours| bucket(EVENING_S + hours * 3600, 3600));
    publish(dir.path(), newer, &Manifest { version: 2, ..manifest(newer, 1) });
    publish(dir.path(), good, &manifest(good, 1));
    let path = HourDirs::new(&category(), torn).visible.join(MANIFEST_FILE);
    put(dir.path(), &path, &"torn");
    let shown = look(dir.path(), &[], EVENING_S).await;
    assert_eq!(states(&shown), [(0, State::Unreadable), (3600, State::Unreadable), (7200, State::Complete)]);
    let problem = |at: usize| shown[at].problem.as_deref().unwrap_or_default();
    assert!(problem(0).starts_with("_MANIFEST.json: it can't be read"), "{}", problem(0));
    assert!(problem(1).contains("version 2") && problem(1).contains("newer program"), "{}", problem(1));
}

#[test]
fn an_hour_is_named_by_its_start_as_exactly_as_the_category_has_hours() {
    let of = |seconds, text: &str| hour_of(&category(), size(seconds), parse_hour(text).expect(text));
    for (seconds, text) in [
        (3600, "2026-11-22T20"),
        (3600, "2026-11-22T20:00Z"),
        (900, "2026-11-22T20:15"),
        (900, "2026-11-22T21:15:00+01:00"),
        (86_400, "2026-11-22"),
        (86_400, "2026-11-22T00"),
    ] {
        assert!(of(seconds, text).is_ok(), "{text} of {seconds} s");
    }
    for (seconds, text, right) in [
        (3600, "2026-11-22T20:15", "2026-11-22T20:00Z"),
        (86_400, "2026-11-22T20", "2026-11-22T00:00Z"),
        // The first quarter, or all four?
        (900, "2026-11-22T20", "2026-11-22T20:00Z"),
        (3600, "2026-11-22", "2026-11-22T00:00Z"),
    ] {
        let error = of(seconds, text).expect_err(text).to_string();
        assert!(error.contains(right), "{error}");
    }
}

#[derive(Debug, Parser)]
struct CommandLine {
    #[command(flatten)]
    options: Options,
}

/// A node's configuration with a sink below `dir` and a root that nobody answers at.
fn configure(dir: &Path, sink: &Path) -> String {
    let topology = format!(
        "[cluster]\nname = \"prod\"\n[sink]\nuri = \"file://{}\"\n[[tier]]\nname = \"root\"\n[[tier.node]]\nname = \"root-1\"\n\
         address = \"127.0.0.1:1\"\n[category.app]\n",
        sink.display()
    );
    fs::write(dir.join("topology.toml"), topology).expect("written");
    let config = dir.join("aggregator.toml");
    fs::write(&config, "name = \"root-1\"\ntopology = \"topology.toml\"\n").expect("written");
    config.display().to_string()
}

async fn command(arguments: &[&str]) -> (anyhow::Result<Exit>, String) {
    let options = CommandLine::try_parse_from([&["hours"], arguments].concat()).expect("a command line").options;
    let mut out = Vec::new();
    let ended = run(&options, &mut out).await;
    (ended, String::from_utf8(out).expect("text"))
}

#[tokio::test]
async fn waiting_for_an_hour_ends_with_another_code_for_each_reason() {
    let dir = tempdir();
    let sink = dir.path().join("sink");
    let config = configure(dir.path(), &sink);
    let [complete, partial, newer] = [0, 1, 2].map(|hours| bucket(EVENING_S + hours * 3600, 3600));
    publish(&sink, complete, &manifest(complete, 7));
    publish(&sink, partial, &Manifest { complete: false, ..manifest(partial, 7) });
    publish(&sink, newer, &Manifest { version: 2, ..manifest(newer, 7) });
    // Of before the hours got shorter, in the place of the first that it held.
    publish(&sink, bucket(EVENING_S - 7200, 3600), &manifest(bucket(EVENING_S - 7200, 7200), 7));
    let wait = async |category: &str, hour: &str, more: &[&str]| {
        let arguments = ["wait", "--config", &config, "--category", category, "--hour", hour, "--timeout", "0s"];
        command(&[&arguments, more].concat()).await
    };
    let code = |ended: &(anyhow::Result<Exit>, String)| ended.0.as_ref().ok().copied();
    let ended = wait("app", "2026-11-22T20", &[]).await;
    assert_eq!((code(&ended), ended.1.as_str()), (Some(Exit::Done), "app/dt=2026-11-22/hr=20: 7 records in 1 files\n"));
    assert_eq!(code(&wait("app", "2026-11-22T21", &[]).await), Some(Exit::Partial));
    assert_eq!(code(&wait("app", "2026-11-22T21", &["--partial"]).await), Some(Exit::Done));
    assert_eq!(code(&wait("app", "2026-11-22T23", &[]).await), Some(Exit::Failed), "it is not there");
    for more in [&[][..], &["--partial"]] {
        let ended = wait("app", "2026-11-22T18", more).await;
        assert_eq!(code(&ended), Some(Exit::Usage), "{}", ended.1);
    }
    let error = wait("app", "2026-11-22T22", &["--partial"]).await.0.expect_err("nobody knows what it means");
    assert!(format!("{error:#}").contains("newer program"), "{error:#}");
    for (category, hour) in [("ap", "2026-11-22T20"), ("app", "2026-11-22T20:30")] {
        let error = wait(category, hour, &[]).await.0.expect_err("there is no such hour");
        assert!(error.is::<UsageError>(), "{error:#}");
    }
    // The sink is a file.
    configure(dir.path(), &dir.path().join("aggregator.toml"));
    assert_eq!(code(&wait("app", "2026-11-22T20", &[]).await), Some(Exit::Config));
}

#[tokio::test]
async fn a_category_with_a_typo_is_an_error_and_one_that_was_taken_out_of_the_topology_is_not() {
    let dir = tempdir();
    let sink = dir.path().join("sink");
    let config = configure(dir.path(), &sink);
    fs::create_dir_all(sink.join("former/dt=2026-11-22/hr=20")).expect("made");
    let error = command(&["--config", &config, "--category", "apq"]).await.0.expect_err("there is none");
    assert!(error.is::<UsageError>() && error.to_string().contains("do you mean app?"), "{error:#}");
    for category in ["app", "former"] {
        let (ended, shown) = command(&["--config", &config, "--category", category, "--json"]).await;
        assert_eq!(ended.expect("it is known"), Exit::Failed, "no root answers");
        let table: Table = serde_json::from_str(&shown).expect("the form that is written");
        assert_eq!((table.version, table.lanes_not_asked), (1, vec![LaneId(0)]));
    }
}

const DOCUMENT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/HOURS.md"));

/// The example of JSON below a heading of the document.
fn example(heading: &str) -> Value {
    let (_, section) = DOCUMENT.split_once(&format!("\n### {heading}\n")).expect(heading);
    let section = section.split("\n#").next().unwrap_or(section);
    let (_, json) = section.split_once("```json\n").expect(heading);
    let (json, _) = json.split_once("```").expect(heading);
    serde_json::from_str(json).unwrap_or_else(|error| panic!("{heading}: {error}"))
}

/// Reads an example as a program does, and writes it again.
fn through<Form: serde::de::DeserializeOwned + serde::Serialize>(example: &Value) -> Value {
    let bytes = serde_json::to_vec(example).expect("plain data");
    let form: Form = read_form(&bytes).unwrap_or_else(|error| panic!("{example}: {error}"));
    serde_json::to_value(form).expect("plain data")
}

fn names(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                found.push(name.clone());
                // What it holds is by agent id.
                let inner = if name == "agents" && value.is_object() {
                    value.as_object().and_then(|all| all.values().next())
                } else {
                    Some(value)
                };
                inner.iter().for_each(|inner| names(inner, found));
            }
        }
        Value::Array(items) => items.iter().for_each(|item| names(item, found)),
        _ => {}
    }
}

/// Who changes a form has to change its version, or only to add to it, and in any case the document.
#[test]
fn the_document_for_readers_of_hours_shows_each_form_as_it_is() {
    type Through = fn(&Value) -> Value;
    let forms: [(&str, Through, u32); 5] = [
        ("`hours --json`", through::<Table>, TABLE_VERSION),
        ("`_MANIFEST.json`", through::<Manifest>, FORM_VERSION),
        ("`_PARTIAL.json`", through::<Partial>, FORM_VERSION),
        ("`_seal-0.json`", through::<Seal>, FORM_VERSION),
        ("`_late/_FILE.manifest.json`", through::<Manifest>, FORM_VERSION),
    ];
    for (heading, through, version) in forms {
        let example = example(heading);
        assert_eq!(through(&example), example, "{heading}");
        assert_eq!(example["version"], version, "{heading}");
        let mut fields = Vec::new();
        names(&example, &mut fields);
        for field in fields {
            assert!(DOCUMENT.contains(&format!("`{field}`")), "{heading}: nothing says what {field} means");
        }
    }
}
