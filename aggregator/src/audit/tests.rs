use super::*;
use crate::root::hours::{Manifest, Partial, is_success, seal_file};
use crate::root::ledger::{AgentCount, Entry, HourKey, Missing, Seal, SealedFile};
use std::path::{Path, PathBuf};
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::checksum::Checksum;
use tributary_common::frame::{Codec, FrameEncoder, FrameHeader, Run, SliceDescriptor};
use tributary_common::ids::{AgentId, Epoch, LaneId, StreamId};
use tributary_common::position::{Position, TailHash};

const HOUR: &str = "app/dt=2026-11-22/hr=20";
const NEXT: &str = "app/dt=2026-11-22/hr=21";
const THIRD: &str = "app/dt=2026-11-22/hr=22";
const START_S: i64 = 1_795_377_600;

mod moving;

/// A stream of lines, every one of them another.
fn text(stream: u128) -> Vec<u8> {
    (0..40).flat_map(|n| format!("{stream} line {n:03} of the log\n").into_bytes()).collect()
}

fn agent_of(stream: u128) -> AgentId {
    format!("web-{stream}").parse().expect("valid")
}

/// Where the line `number` of a stream begins.
fn place(stream: u128, number: u64) -> u64 {
    number * (text(stream).len() as u64 / 40)
}

/// A slice with the lines from `from` to `to` of a stream, and these lines.
fn slice(stream: u128, from: u64, to: u64) -> (SliceDescriptor, Vec<u8>) {
    let text = text(stream);
    let at = |line: u64| {
        let offset = place(stream, line);
        Position { offset, tail: TailHash::of(&text[..offset as usize]) }
    };
    let (start, end) = (at(from), at(to));
    let raw = text[start.offset as usize..end.offset as usize].to_vec();
    let len = raw.len() as u64;
    let slice = SliceDescriptor {
        agent: agent_of(stream),
        host: format!("web-{stream}.example"),
        stream: StreamId(stream),
        base: Position::zero(),
        start,
        end,
        batch_hash: None,
        runs: vec![Run { start: start.offset, len, stored: len }],
        records: to - from,
        prefix_len: 0,
        altered: false,
        first_time_ms: START_S * 1000,
        last_time_ms: START_S * 1000,
    };
    (slice, raw)
}

fn frame_of(category: &str, bucket: Bucket, codec: Codec, slices: &[(u128, u64, u64)]) -> Vec<u8> {
    let (mut slices, raw): (Vec<_>, Vec<_>) =
        slices.iter().map(|(stream, from, to)| slice(*stream, *from, *to)).unzip();
    for slice in &mut slices {
        slice.first_time_ms = bucket.start_s() * 1000;
        slice.last_time_ms = slice.first_time_ms;
    }
    let category = category.parse().expect("valid");
    FrameEncoder::new(codec, 1).encode(&category, bucket, &slices, &raw.concat()).expect("encodes").to_vec()
}

fn bucket_in(hours: i64) -> Bucket {
    BucketSize::HOUR.bucket_of_ms((START_S + hours * 3600) * 1000)
}

/// The frame with the lines from `from` to `to` of a stream, of the hour `hours` after the first.
fn frame_in(hours: i64, stream: u128, from: u64, to: u64) -> Vec<u8> {
    frame_of("app", bucket_in(hours), Codec::Gzip, &[(stream, from, to)])
}

fn frame(stream: u128, from: u64, to: u64) -> Vec<u8> {
    frame_in(0, stream, from, to)
}

/// Splits a file into its frames.
fn frames_of(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let Ok(tributary_common::frame::Peek::Header(header)) = FrameHeader::peek(&bytes[at..]) else {
            panic!("not a frame at {at}");
        };
        frames.push(bytes[at..at + header.frame_len as usize].to_vec());
        at += header.frame_len as usize;
    }
    frames
}

type NamedFile = (&'static str, Vec<u8>);

/// The seal of a lane for a bucket of `app`.
fn seal_of(lane: u16, key: &HourKey, files: &[NamedFile]) -> Seal {
    let mut agents: BTreeMap<AgentId, AgentCount> = BTreeMap::new();
    let mut sealed = Vec::new();
    for (name, bytes) in files {
        let headers: Vec<_> = frames_of(bytes).iter().map(|frame| FrameHeader::verify(frame).expect("good")).collect();
        let (file, counts) = SealedFile::new((*name).into(), (*name).into(), headers.iter().collect());
        sealed.push(file);
        for (agent, count) in counts {
            agents.entry(agent).or_default().add(count);
        }
    }
    Seal {
        version: 1,
        lane: LaneId(lane),
        category: key.category.clone(),
        bucket_start_s: key.bucket.start_s(),
        bucket_size_s: key.bucket.size().seconds(),
        files: sealed,
        losses: Vec::new(),
        missing: Vec::new(),
        publish_partial: false,
        inputs: Vec::new(),
        agents,
    }
}

fn sealed(lane: u16, hours: i64, files: &[NamedFile]) -> Seal {
    seal_of(lane, &key(hours), files)
}

fn key(hours: i64) -> HourKey {
    HourKey { category: "app".parse().expect("valid"), bucket: bucket_in(hours) }
}

fn json_of(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain")
}

struct Sink {
    dir: tempfile::TempDir,
}

impl Sink {
    /// Two lanes, two streams, two hours, and something late.
    fn good() -> Self {
        let sink = Self { dir: tempfile::tempdir().expect("a directory") };
        let first = [("a.l0.gz", [frame(1, 0, 10), frame(1, 10, 20)].concat())];
        let second = [("b.l1.gz", [frame(2, 0, 10), frame(2, 10, 20), frame(2, 20, 30)].concat())];
        sink.publish(HOUR, 0, &[(0, &first), (1, &second)]);
        let next = [("c.l0.gz", [frame_in(1, 1, 20, 25)].concat())];
        sink.publish(NEXT, 1, &[(0, &next), (1, &[])]);
        sink.add_late(HOUR, 0, "d.l1.gz", &frame(2, 30, 40));
        sink
    }

    fn add_late(&self, dir: &str, hours: i64, name: &'static str, bytes: &[u8]) {
        self.write(&format!("{dir}/_late/{name}"), bytes);
        self.add_late_manifest(dir, hours, name, bytes);
    }

    fn add_late_manifest(&self, dir: &str, hours: i64, name: &'static str, bytes: &[u8]) {
        let manifest = Manifest::of(&key(hours), &[sealed(1, hours, &[(name, bytes.to_vec())])]);
        self.write(&format!("{dir}/_late/_{name}.manifest.json"), &json_of(&manifest));
    }

    fn publish(&self, dir: &str, hours: i64, lanes: &[(u16, &[NamedFile])]) {
        let seals: Vec<Seal> = lanes.iter().map(|(lane, files)| sealed(*lane, hours, files)).collect();
        for (name, bytes) in lanes.iter().flat_map(|(_, files)| *files) {
            self.write(&format!("{dir}/{name}"), bytes);
        }
        self.publish_sealed(dir, &key(hours), &seals);
    }

    /// All that is made from the seals.
    fn publish_sealed(&self, dir: &str, key: &HourKey, seals: &[Seal]) {
        for seal in seals {
            self.write(&format!("{dir}/{}", seal_file(seal.lane)), &json_of(seal));
        }
        let manifest = Manifest::of(key, seals);
        self.write(&format!("{dir}/_MANIFEST.json"), &json_of(&manifest));
        if let Some(partial) = Partial::of(&manifest) {
            self.write(&format!("{dir}/_PARTIAL.json"), &json_of(&partial));
        }
        if is_success(seals) {
            self.write(&format!("{dir}/_SUCCESS"), b"");
        }
    }

    fn remove(&self, path: &str) {
        let path = self.path(path);
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.expect("removed");
    }

    fn rename(&self, from: &str, to: &str) {
        std::fs::rename(self.path(from), self.path(to)).expect("renamed");
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().expect("below the sink")).expect("made");
        std::fs::write(path, bytes).expect("written");
    }

    fn read(&self, path: &str) -> Vec<u8> {
        std::fs::read(self.path(path)).expect("read")
    }

    /// Changes the frames of a file of the first hour.
    fn change(&self, name: &str, change: impl FnOnce(&mut Vec<Vec<u8>>)) {
        let path = format!("{HOUR}/{name}");
        let mut frames = frames_of(&self.read(&path));
        change(&mut frames);
        self.write(&path, &frames.concat());
    }

    /// Changes a JSON file of the first hour.
    fn lie(&self, name: &str, lie: impl FnOnce(&mut serde_json::Value)) {
        let path = format!("{HOUR}/{name}");
        let mut value = serde_json::from_slice(&self.read(&path)).expect("JSON");
        lie(&mut value);
        self.write(&path, &serde_json::to_vec(&value).expect("plain"));
    }

    async fn audit(&self, change: impl FnOnce(&mut Options)) -> (bool, String) {
        let mut options = options(self.dir.path());
        change(&mut options);
        let mut out = Vec::new();
        let good = run(&options, &mut out).await.expect("audits");
        (good, String::from_utf8(out).expect("text"))
    }

    /// Audits, expects that it fails, and that some finding has all of `words`.
    async fn is_found(&self, words: &[&str]) {
        let (good, text) = self.audit(|_| ()).await;
        assert!(!good, "{words:?} is wrong:\n{text}");
        assert!(has(&text, "wrong: ", words), "{words:?} not in:\n{text}");
    }

    /// Audits, expects that all is right, and that some note has all of `words`.
    async fn is_noted(&self, words: &[&str]) {
        let (good, text) = self.audit(|_| ()).await;
        assert!(good, "{text}");
        assert!(has(&text, "note: ", words), "{words:?} not in:\n{text}");
    }
}

fn has(text: &str, label: &str, words: &[&str]) -> bool {
    text.lines().any(|line| line.starts_with(label) && words.iter().all(|word| line.contains(word)))
}

fn options(sink: &Path) -> Options {
    Options {
        sink: sink.display().to_string(),
        category: None,
        hour: None,
        since: None,
        deep: false,
        success_file: "_SUCCESS".into(),
        json: false,
    }
}

#[tokio::test]
async fn a_whole_sink_has_no_findings_from_headers_and_from_bytes() {
    let sink = Sink::good();
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good, "{text}");
    assert!(text.starts_with("2 hours, 3 files, 1 late files, 7 frames, 2 streams, 65 records"), "{text}");
    let (good, text) = sink.audit(|options| options.deep = true).await;
    assert!(good && text.contains("all bytes read"), "{text}");
    let (good, text) = sink.audit(|options| options.json = true).await;
    assert!(good);
    let totals: serde_json::Value = serde_json::from_str(text.trim()).expect("one object");
    assert_eq!((&totals["hours"], &totals["wrong"]), (&json!(2), &json!(0)));
}

#[tokio::test]
async fn a_removed_frame_is_a_gap_and_contradicts_the_manifest() {
    let sink = Sink::good();
    sink.change("b.l1.gz", |frames| drop(frames.remove(1)));
    sink.is_found(&["b.l1.gz", "bytes; _MANIFEST.json says"]).await;
    sink.is_found(&["web-2", "are in no file"]).await;
}

#[tokio::test]
async fn a_removed_frame_is_found_also_when_the_manifest_and_the_seal_were_made_to_fit() {
    let sink = Sink::good();
    let first = [("a.l0.gz", [frame(1, 0, 10), frame(1, 10, 20)].concat())];
    let second = [("b.l1.gz", [frame(2, 0, 10), frame(2, 20, 30)].concat())];
    sink.publish(HOUR, 0, &[(0, &first), (1, &second)]);
    sink.is_found(&["web-2", "are in no file"]).await;
    let (_, text) = sink.audit(|_| ()).await;
    assert_eq!(text.matches("wrong:").count(), 1, "{text}");
}

#[tokio::test]
async fn a_doubled_frame_is_an_overlap_wherever_it_is() {
    let sink = Sink::good();
    sink.change("a.l0.gz", |frames| frames.push(frames[0].clone()));
    sink.is_found(&["web-1", "are in app", "and in app"]).await;
    let sink = Sink::good();
    let other = [("c.l0.gz", [frame_in(1, 1, 20, 25), frame_in(1, 2, 5, 6)].concat())];
    sink.publish(NEXT, 1, &[(0, &other), (1, &[])]);
    sink.is_found(&["web-2", "b.l1.gz", "c.l0.gz"]).await;
}

#[tokio::test]
async fn swapped_frames_are_found_by_the_checksum() {
    let sink = Sink::good();
    sink.change("b.l1.gz", |frames| frames.swap(0, 1));
    sink.is_found(&["b.l1.gz", "checksum", "swapped"]).await;
}

#[tokio::test]
async fn an_altered_frame_is_found_from_its_header_or_by_reading_it() {
    let sink = Sink::good();
    sink.change("b.l1.gz", |frames| {
        let last = frames[1].len() - 12;
        frames[1][last] ^= 1;
    });
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good, "only the headers were read: {text}");
    let (good, text) = sink.audit(|options| options.deep = true).await;
    assert!(!good && text.contains("b.l1.gz: at ") && text.contains("body is corrupt"), "{text}");
    // Replaced by a good frame of the same length and place with other text.
    let sink = Sink::good();
    sink.change("b.l1.gz", |frames| {
        let mut header = FrameHeader::verify(&frames[1]).expect("good");
        let mut raw = header.decode(&frames[1]).expect("decodes");
        raw.swap(0, 1);
        header.slices[0].end.tail = TailHash(7);
        let encoded = FrameEncoder::new(Codec::Gzip, 1).encode(&header.category, header.bucket, &header.slices, &raw);
        frames[1] = encoded.expect("encodes").to_vec();
    });
    sink.is_found(&["web-2", "tell other bytes before"]).await;
    let (_, text) = sink.audit(|_| ()).await;
    assert!(text.contains("b.l1.gz has"), "{text}");
}

#[tokio::test]
async fn a_missing_and_a_foreign_file_are_found() {
    let sink = Sink::good();
    std::fs::remove_file(sink.path(&format!("{HOUR}/a.l0.gz"))).expect("removed");
    sink.is_found(&["a.l0.gz is missing", "_MANIFEST.json names it"]).await;
    sink.is_found(&["web-1", "are in no file"]).await;
    let sink = Sink::good();
    sink.write(&format!("{HOUR}/z.gz"), &frame(3, 0, 10));
    sink.is_found(&["z.gz is a foreign file"]).await;
    let sink = Sink::good();
    std::fs::remove_file(sink.path(&format!("{HOUR}/_SUCCESS"))).expect("removed");
    sink.is_found(&["_SUCCESS is missing"]).await;
    let sink = Sink::good();
    std::fs::remove_file(sink.path(&format!("{HOUR}/_MANIFEST.json"))).expect("removed");
    sink.is_found(&["_MANIFEST.json is missing"]).await;
}

#[tokio::test]
async fn a_file_in_the_wrong_hour_is_found() {
    let sink = Sink::good();
    let files = [("a.l0.gz", frame_in(1, 1, 0, 10))];
    sink.publish(HOUR, 0, &[(0, &files), (1, &[])]);
    sink.is_found(&["a.l0.gz", "the frame at 0 is of app 2026-11-22T21:00Z"]).await;
}

fn losses() -> serde_json::Value {
    json!([{ "agent": "web-2", "stream": StreamId(2), "from": 0, "to": 9 }])
}

fn missing() -> serde_json::Value {
    json!([missing_agent("web-3")])
}

fn missing_agent(agent: &str) -> Missing {
    Missing { agent: agent.parse().expect("valid"), host: agent.into(), watermark_ms: None, offsets: Vec::new() }
}

#[tokio::test]
async fn a_manifest_or_a_seal_that_lies_is_found() {
    type Lie = fn(&mut serde_json::Value);
    let lies: [(&str, Lie, &str); 29] = [
        ("_MANIFEST.json", |json| json["records"] = json!(51), "_MANIFEST.json says 51 records"),
        ("_MANIFEST.json", |json| json["bytes"] = json!(7), "in 7 bytes, and its files hold"),
        ("_MANIFEST.json", |json| json["files"][0]["bytes"] = json!(1), "it says 1, 20 and"),
        (
            "_MANIFEST.json",
            |json| json["files"][0]["records"] = json!(1),
            "a.l0.gz holds 20 records; _MANIFEST.json says 1",
        ),
        ("_MANIFEST.json", |json| json["files"][1]["crc32c"] = json!("00000000"), "_MANIFEST.json says 00000000"),
        ("_MANIFEST.json", |json| json["files"][0]["lane"] = json!(1), "of lane 0; it says"),
        ("_MANIFEST.json", |json| drop(json["files"].as_array_mut().expect("a list").pop()), "only the seals name"),
        ("_MANIFEST.json", |json| json["bucket_start_s"] = json!(START_S + 3600), "is of another hour"),
        ("_MANIFEST.json", |json| json["bucket_size_s"] = json!(900), "is of another hour"),
        ("_MANIFEST.json", |json| json["category"] = json!("other"), "is of another hour"),
        ("_MANIFEST.json", |json| json["version"] = json!(2), "_MANIFEST.json has version 2"),
        ("_MANIFEST.json", |json| json["lanes"] = json!([0]), "seals of the lanes [0, 1], and it names [0]"),
        ("_MANIFEST.json", |json| json["complete"] = json!(false), "it says complete = false"),
        ("_MANIFEST.json", |json| json["missing"] = missing(), "other agents are missing: expected nothing more"),
        ("_MANIFEST.json", |json| json["losses"] = losses(), "other losses: expected nothing more"),
        (
            "_MANIFEST.json",
            |json| json["agents"]["web-1"]["bytes"] = json!(1),
            "web-1 has 20 records of 440 bytes, and it says 20 records of 1 bytes",
        ),
        (
            "_MANIFEST.json",
            |json| json["agents"]["web-3"] = json!({ "records": 1, "bytes": 1 }),
            "web-3 has nothing, and it says 1 records",
        ),
        ("_seal-1.json", |json| json["agents"]["web-2"]["records"] = json!(1), "_seal-1.json says that its agents"),
        (
            "_seal-1.json",
            |json| json["agents"]["web-2"]["records"] = json!(1),
            "web-2 has 30 records of 660 bytes, and it says 1 records of 660 bytes",
        ),
        ("_seal-1.json", |json| json["lane"] = json!(0), "_seal-1.json is of lane 0"),
        ("_seal-1.json", |json| json["version"] = json!(2), "_seal-1.json has version 2"),
        ("_seal-1.json", |json| json["bucket_size_s"] = json!(900), "_seal-1.json is of lane 1 of app, of 900 s"),
        (
            "_seal-1.json",
            |json| json["bucket_start_s"] = json!(START_S - 3600),
            "_seal-1.json is of lane 1 of app, of 3600 s",
        ),
        ("_seal-1.json", |json| json["files"] = json!([]), "only the manifest names [\"b.l1.gz\"]"),
        ("_seal-1.json", |json| json["files"][0]["name"] = json!("e.gz"), "e.gz, which _seal-1.json names, is missing"),
        ("_seal-1.json", |json| json["files"][0]["bytes"] = json!(3), "b.l1.gz has 3 bytes, 30 records"),
        ("_seal-1.json", |json| json["losses"] = losses(), "other losses: expected Lost"),
        ("_seal-1.json", |json| json["missing"] = missing(), "other agents are missing: expected Missing"),
        ("_seal-1.json", |json| json["missing"] = missing(), "_SUCCESS is there, and agents are missing"),
    ];
    for (file, lie, words) in lies {
        let sink = Sink::good();
        sink.lie(file, lie);
        sink.is_found(&[words]).await;
    }
    let sink = Sink::good();
    sink.write(&format!("{HOUR}/_seal-0.json"), b"{");
    sink.is_found(&["_seal-0.json can't be read"]).await;
}

#[tokio::test]
async fn a_missing_seal_is_found_also_of_a_lane_without_a_file() {
    let sink = Sink::good();
    let first = [("a.l0.gz", [frame(1, 0, 10), frame(1, 10, 20)].concat())];
    let second = [("b.l1.gz", [frame(2, 0, 10), frame(2, 10, 20), frame(2, 20, 30)].concat())];
    sink.publish(HOUR, 0, &[(0, &first), (1, &second), (2, &[])]);
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good, "{text}");
    std::fs::remove_file(sink.path(&format!("{HOUR}/_seal-2.json"))).expect("removed");
    sink.is_found(&["seals of the lanes [0, 1], and it names [0, 1, 2]"]).await;
}

#[tokio::test]
async fn bytes_that_the_manifest_declares_as_lost_are_no_gap() {
    let sink = Sink::good();
    let first = [("a.l0.gz", [frame(1, 0, 10), frame(1, 10, 20)].concat())];
    let second = [("b.l1.gz", [frame(2, 0, 10), frame(2, 20, 30)].concat())];
    sink.publish(HOUR, 0, &[(0, &first), (1, &second)]);
    let lost = json!([{ "agent": "web-2", "stream": StreamId(2), "from": place(2, 10), "to": place(2, 20) }]);
    for file in ["_seal-1.json", "_MANIFEST.json"] {
        sink.lie(file, |json| json["losses"] = lost.clone());
    }
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good && text.contains("bytes declared as lost"), "{text}");
}

#[tokio::test]
async fn what_waits_to_be_published_fills_gaps_and_a_part_of_the_sink_is_audited_alone() {
    let sink = Sink::good();
    sink.change("a.l0.gz", |frames| drop(frames.remove(1)));
    sink.is_found(&["web-1", "are in no file"]).await;
    sink.write("_tributary/lanes/0/e1-x/s.gz", &frame(1, 10, 20));
    sink.write("_tributary/lanes/0/e1-x/owner/7.1@root-1", b"");
    sink.write("_tributary/lanes/0.lock", b"");
    let (_, text) = sink.audit(|_| ()).await;
    assert!(!text.contains("are in no file"), "{text}");
    // Alone, the hour is proved by its manifest; bytes of other hours are no gaps.
    let hour = |text: &'static str| move |options: &mut Options| options.hour = Some(parse_moment(text).expect("good"));
    let (good, text) = sink.audit(hour("2026-11-22T21:30")).await;
    assert!(good && text.contains("1 hours, 1 files"), "{text}");
    assert!(has(&text, "note: the streams", &["--hour proves an hour by its manifest"]), "{text}");
    let (good, _) = sink.audit(hour("2026-11-22T20")).await;
    assert!(!good);
    let (good, text) = sink.audit(|options| options.since = Some(START_S + 3600)).await;
    assert!(good && text.contains("1 hours"), "{text}");
    let error = run(&Options { hour: Some(0), ..options(sink.dir.path()) }, &mut Vec::new()).await;
    assert!(error.expect_err("nothing there").to_string().contains("no hour is published"));
}

#[tokio::test]
async fn what_readers_would_read_and_no_manifest_names_is_found_wherever_it_lies() {
    for (path, words) in [
        (format!("{HOUR}/notes.txt"), "notes.txt doesn't belong here"),
        (format!("{HOUR}/_late/e.gz"), "_late/e.gz is a foreign file"),
        (format!("{HOUR}/_late/readme"), "_late/readme doesn't belong here"),
        // Moving an hour onto one that is there moves it into that.
        (format!("{HOUR}/hr=05/a.gz"), "hr=05 doesn't belong here"),
        (format!("{HOUR}/hr=05"), "hr=05 doesn't belong here"),
        (format!("{HOUR}/_late/hr=05/a.gz"), "_late/hr=05 doesn't belong here"),
        // Spark takes it for a partition.
        (format!("{HOUR}/_hr=05/a.gz"), "_hr=05 doesn't belong here"),
        ("app/dt=2026-11-22/backup.tar".into(), "backup.tar doesn't belong here"),
        ("app/dt=2026-11-22/hr=05".into(), "hr=05 doesn't belong here"),
        ("app/dt=2026-11-22/x.gz".into(), "x.gz doesn't belong here"),
        ("app/dt=2026-11-22/hr=5/x.gz".into(), "hr=5 doesn't belong here"),
        ("app/x.gz".into(), "x.gz doesn't belong here"),
        ("app/hr=05/x.gz".into(), "hr=05 doesn't belong here"),
        ("app/dt=2026-11-23".into(), "dt=2026-11-23 doesn't belong here"),
        ("app/dt=20261122/hr=05/x.gz".into(), "dt=20261122 doesn't belong here"),
    ] {
        let sink = Sink::good();
        sink.write(&path, b"");
        sink.is_found(&[words]).await;
    }
    // It is read by nobody who reads the category, but whoever looks for an hour by its name doesn't find it.
    let sink = Sink::good();
    sink.rename(NEXT, THIRD);
    sink.is_found(&[THIRD, "_MANIFEST.json is of another hour"]).await;
}

#[tokio::test]
async fn a_name_that_readers_skip_is_a_note() {
    for path in [
        "app/_temporary/x.gz".into(),
        "app/.staging/x.gz".into(),
        "app/dt=2026-11-22/_SUCCESS".into(),
        format!("{HOUR}/_x.gz"),
        format!("{HOUR}/.a.l0.gz.crc"),
        format!("{HOUR}/.hr=05/x.gz"),
        format!("{HOUR}/_seal-01.json"),
        format!("{HOUR}/_late/_temporary/x.gz"),
    ] {
        let sink = Sink::good();
        sink.write(&path, b"");
        sink.is_noted(&["doesn't belong here; readers skip names like this"]).await;
    }
    let sink = Sink::good();
    sink.write("backup/of/something.gz", b"");
    sink.is_noted(&["backup", "is not taken for a category"]).await;
}

#[tokio::test]
async fn a_file_that_is_named_twice_is_found_though_all_sums_are_made_to_fit() {
    let first: NamedFile = ("a.l0.gz", [frame(1, 0, 10), frame(1, 10, 20)].concat());
    let second: NamedFile = ("b.l1.gz", [frame(2, 0, 10), frame(2, 10, 20), frame(2, 20, 30)].concat());
    let sink = Sink::good();
    sink.publish(HOUR, 0, &[(0, &[first.clone(), first.clone()]), (1, std::slice::from_ref(&second))]);
    sink.is_found(&["a.l0.gz is named twice: by _seal-0.json and by _seal-0.json"]).await;
    sink.is_found(&["_MANIFEST.json names a.l0.gz twice"]).await;
    let sink = Sink::good();
    sink.publish(HOUR, 0, &[(0, std::slice::from_ref(&first)), (1, &[second, first.clone()])]);
    sink.is_found(&["a.l0.gz is named twice: by _seal-0.json and by _seal-1.json"]).await;
}

#[tokio::test]
async fn a_manifest_of_a_late_file_that_lies_is_found() {
    type Lie = fn(&mut serde_json::Value);
    let lies: [(Lie, &str); 11] = [
        (|json| json["files"][0]["crc32c"] = json!(Checksum(1)), "d.l1.gz has the checksum"),
        (|json| json["files"][0]["bytes"] = json!(1), "says 1"),
        (|json| json["files"][0]["name"] = json!("e.gz"), "names another file"),
        (|json| json["records"] = json!(1), "says 1 records"),
        (|json| json["agents"] = json!({}), "web-2 has 10 records"),
        (|json| json["version"] = json!(2), "has version 2"),
        (|json| json["bucket_start_s"] = json!(START_S + 3600), "is of another hour"),
        (|json| json["losses"] = losses(), "other losses"),
        (|json| json["missing"] = missing(), "other agents are missing"),
        (|json| json["complete"] = json!(false), "complete = false"),
        (
            |json| {
                json["files"] = json!([]);
                (json["records"], json["bytes"], json["agents"]) = (json!(0), json!(0), json!({}));
            },
            "names 0 files",
        ),
    ];
    for (lie, words) in lies {
        let sink = Sink::good();
        sink.lie("_late/_d.l1.gz.manifest.json", lie);
        sink.is_found(&["d.l1.gz", words]).await;
    }
    let sink = Sink::good();
    sink.write(&format!("{HOUR}/_late/_d.l1.gz.manifest.json"), b"{");
    sink.is_found(&["_late/_d.l1.gz.manifest.json can't be read"]).await;
}

#[tokio::test]
async fn what_was_done_to_late_files_is_found() {
    let sink = Sink::good();
    sink.change("_late/d.l1.gz", |frames| frames[0] = frame(2, 30, 39));
    sink.is_found(&["d.l1.gz has", "_late/_d.l1.gz.manifest.json says"]).await;
    let sink = Sink::good();
    sink.change("_late/d.l1.gz", |frames| {
        let last = frames[0].len() - 12;
        frames[0][last] ^= 1;
    });
    let (good, text) = sink.audit(|options| options.deep = true).await;
    assert!(!good && has(&text, "wrong: ", &["_late/d.l1.gz: at 0 of"]), "{text}");
    let sink = Sink::good();
    sink.remove(&format!("{HOUR}/_late/d.l1.gz"));
    sink.is_found(&["d.l1.gz is missing; _late/_d.l1.gz.manifest.json names it"]).await;
    let sink = Sink::good();
    sink.remove(&format!("{HOUR}/_late/_d.l1.gz.manifest.json"));
    sink.is_found(&["_late/d.l1.gz is a foreign file"]).await;
    // The file of one name is not the other.
    let sink = Sink::good();
    sink.add_late(HOUR, 0, "e.l1.gz", &frame(3, 0, 10));
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good, "{text}");
    sink.rename(&format!("{HOUR}/_late/e.l1.gz"), &format!("{HOUR}/_late/x"));
    sink.rename(&format!("{HOUR}/_late/d.l1.gz"), &format!("{HOUR}/_late/e.l1.gz"));
    sink.rename(&format!("{HOUR}/_late/x"), &format!("{HOUR}/_late/d.l1.gz"));
    sink.is_found(&["d.l1.gz has", "_d.l1.gz.manifest.json says"]).await;
}

/// An hour without `web-3`, which was waited for in vain.
fn partial(publish_partial: bool) -> Sink {
    let sink = Sink::good();
    let mut seals: Vec<Seal> = ["_seal-0.json", "_seal-1.json"]
        .map(|name| serde_json::from_slice(&sink.read(&format!("{HOUR}/{name}"))).expect("a seal"))
        .into();
    seals[1].missing = vec![missing_agent("web-3")];
    seals[1].publish_partial = publish_partial;
    sink.remove(&format!("{HOUR}/_SUCCESS"));
    sink.publish_sealed(HOUR, &key(0), &seals);
    sink
}

#[tokio::test]
async fn an_hour_without_some_agents_says_so_and_looks_complete_only_where_that_was_asked_for() {
    for publish_partial in [false, true] {
        let sink = partial(publish_partial);
        let (good, text) = sink.audit(|_| ()).await;
        assert!(good, "{text}");
        sink.remove(&format!("{HOUR}/_PARTIAL.json"));
        sink.is_found(&["_PARTIAL.json is missing"]).await;
    }
    let sink = partial(false);
    sink.write(&format!("{HOUR}/_SUCCESS"), b"");
    sink.is_found(&["_SUCCESS is there, and agents are missing"]).await;
    let sink = partial(true);
    sink.remove(&format!("{HOUR}/_SUCCESS"));
    sink.is_found(&["_SUCCESS is missing"]).await;
    for (lie, words) in
        [(json!([missing_agent("web-4")]), "expected Missing { agent: \"web-3\""), (json!([]), "found nothing more")]
    {
        let sink = partial(false);
        sink.lie("_PARTIAL.json", |json| json["missing"] = lie);
        sink.is_found(&["_PARTIAL.json is not what _MANIFEST.json makes", words]).await;
    }
    let sink = partial(false);
    sink.lie("_PARTIAL.json", |json| json["bucket_start_s"] = json!(START_S + 3600));
    sink.is_found(&["_PARTIAL.json is not what _MANIFEST.json makes", "another hour"]).await;
    sink.write(&format!("{HOUR}/_PARTIAL.json"), b"{");
    sink.is_found(&["_PARTIAL.json can't be read"]).await;
    let sink = partial(false);
    sink.lie("_MANIFEST.json", |json| json["missing"] = json!([]));
    sink.is_found(&["other agents are missing"]).await;
    sink.lie("_MANIFEST.json", |json| json["complete"] = json!(true));
    sink.is_found(&["_PARTIAL.json is there, and no agent is missing"]).await;
    let sink = Sink::good();
    sink.write(&format!("{HOUR}/_PARTIAL.json"), b"{}");
    sink.is_found(&["_PARTIAL.json is there, and no agent is missing"]).await;
}

#[tokio::test]
async fn an_hour_that_was_emptied_is_found_and_one_that_has_only_late_data_is_none() {
    for left in [
        &[][..],
        &["_SUCCESS"],
        &["_late"],
        &["_late", "_SUCCESS"],
        &["_seal-0.json", "_seal-1.json"],
        &["_PARTIAL.json"],
    ] {
        let sink = Sink::good();
        let empty = [];
        sink.publish(THIRD, 2, &[(0, &empty), (1, &empty)]);
        std::fs::create_dir_all(sink.path(&format!("{THIRD}/_late"))).expect("made");
        sink.write(&format!("{THIRD}/_PARTIAL.json"), b"{}");
        for name in ["_SUCCESS", "_late", "_seal-0.json", "_seal-1.json", "_MANIFEST.json", "_PARTIAL.json"] {
            if !left.contains(&name) {
                sink.remove(&format!("{THIRD}/{name}"));
            }
        }
        sink.is_found(&[THIRD, "_MANIFEST.json is missing"]).await;
    }
    // Retention removes hours, and late data still has its place.
    let sink = Sink::good();
    sink.remove(HOUR);
    sink.add_late(HOUR, 0, "d.l1.gz", &frame(2, 30, 40));
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good && text.contains("2 hours"), "{text}");
    sink.write(&format!("{HOUR}/_SUCCESS"), b"");
    sink.is_found(&[HOUR, "_MANIFEST.json is missing"]).await;
}

#[tokio::test]
async fn an_hour_that_is_not_there_is_told_and_what_it_had_is_a_gap() {
    let sink = Sink::good();
    let third = [("e.l0.gz", frame_in(2, 1, 25, 30))];
    sink.publish(THIRD, 2, &[(0, &third), (1, &[])]);
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good && text.contains(" 0 notes"), "{text}");
    sink.remove(NEXT);
    let missing = "no hour is published from 2026-11-22T21:00Z to 2026-11-22T22:00Z";
    let (good, text) = sink.audit(|_| ()).await;
    assert!(!good && has(&text, "note: app", &[missing]), "{text}");
    sink.is_found(&["web-1", "are in no file"]).await;
    // One that had nothing was perhaps never published.
    let sink = Sink::good();
    sink.publish(THIRD, 2, &[(0, &[]), (1, &[])]);
    let next = [("a.l0.gz", [frame(1, 0, 10), frame(1, 10, 20)].concat())];
    sink.publish(HOUR, 0, &[(0, &next), (1, &[("b.l1.gz", sink.read(&format!("{HOUR}/b.l1.gz")))])]);
    sink.remove(NEXT);
    sink.is_noted(&["app", missing]).await;
}

#[tokio::test]
async fn with_since_only_the_beginning_of_a_stream_may_be_elsewhere() {
    let since = |options: &mut Options| options.since = Some(START_S + 3600);
    let sink = Sink::good();
    let next = [("c.l0.gz", [frame_in(1, 1, 20, 25), frame_in(1, 1, 27, 30)].concat())];
    sink.publish(NEXT, 1, &[(0, &next), (1, &[])]);
    let third = [("e.l0.gz", [frame_in(2, 1, 30, 32), frame_in(2, 1, 35, 40)].concat())];
    sink.publish(THIRD, 2, &[(0, &third), (1, &[])]);
    let (good, text) = sink.audit(since).await;
    let gap = |from, to| format!("the bytes {}..{} are in no file", place(1, from), place(1, to));
    assert!(!good && has(&text, "wrong: ", &[&gap(32, 35)]), "{text}");
    // In the first minutes of the first hour, lines of the hour before stand between.
    assert!(!text.contains(&gap(25, 27)) && has(&text, "note: the streams", &["nothing tells"]), "{text}");
    assert!(text.contains(&format!("{} bytes are in hours before", place(1, 2))), "{text}");
    // What waits fills it; so does what lies in an older hour that is there, also what was before the first of them.
    sink.write("_tributary/lanes/0/e1-x/s.gz", &frame_in(3, 1, 32, 33));
    let (good, text) = sink.audit(since).await;
    assert!(!good && has(&text, "wrong: ", &[&gap(33, 35)]), "{text}");
    sink.add_late(HOUR, 0, "e.l1.gz", &frame(1, 33, 35));
    let (good, text) = sink.audit(since).await;
    assert!(good, "{text}");
}

#[tokio::test]
async fn what_retention_removed_is_no_gap_of_the_streams_that_come_up_in_the_oldest_hour() {
    let sink = Sink::good();
    sink.remove(HOUR);
    sink.is_noted(&["the streams", "nothing tells"]).await;
    // A stream that comes up later was perhaps robbed of its beginning.
    let third = [("e.l1.gz", frame_in(2, 2, 30, 40))];
    sink.publish(THIRD, 2, &[(0, &[]), (1, &third)]);
    sink.is_found(&["web-2", &format!("the bytes 0..{} are in no file", place(2, 30))]).await;
    // Where the ledgers know of no older hour, there was none.
    let sink = Sink::good();
    sink.remove(HOUR);
    let ledger = |hours: i64| {
        let entry = Entry {
            number: 7,
            lane: LaneId(0),
            epoch: Epoch(1),
            written_ms: 0,
            snapshot: true,
            streams: Vec::new(),
            forgotten: Vec::new(),
            segments: Vec::new(),
            hours: Vec::new(),
            forgotten_hours: Vec::new(),
            first_buckets: vec![(key(hours).category, key(hours).bucket)],
            members: Vec::new(),
            left: Vec::new(),
            losses: Vec::new(),
        };
        sink.write(&format!("_tributary/lanes/0/e1-x/{}", Entry::file_name(7)), &entry.encode());
    };
    ledger(0);
    sink.is_noted(&["the streams", "nothing tells"]).await;
    ledger(1);
    sink.is_found(&["web-1", &format!("the bytes 0..{} are in no file", place(1, 20))]).await;
}

#[tokio::test]
async fn frames_that_were_exchanged_between_files_are_found() {
    let sink = Sink::good();
    let two = [("a.l0.gz", frame(1, 0, 10)), ("f.l0.gz", frame(1, 10, 20))];
    let second = [("b.l1.gz", sink.read(&format!("{HOUR}/b.l1.gz")))];
    sink.publish(HOUR, 0, &[(0, &two), (1, &second)]);
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good, "{text}");
    let (a, f) = (sink.read(&format!("{HOUR}/a.l0.gz")), sink.read(&format!("{HOUR}/f.l0.gz")));
    sink.write(&format!("{HOUR}/a.l0.gz"), &f);
    sink.write(&format!("{HOUR}/f.l0.gz"), &a);
    sink.is_found(&["a.l0.gz has", "_MANIFEST.json says"]).await;
    sink.is_found(&["f.l0.gz has", "_MANIFEST.json says"]).await;
}

#[tokio::test]
async fn a_file_that_was_cut_off_or_whose_header_was_altered_is_found() {
    let sink = Sink::good();
    let path = format!("{HOUR}/b.l1.gz");
    let whole = sink.read(&path);
    for len in [whole.len() - 1, whole.len() / 2, 5, 0] {
        sink.write(&path, &whole[..len]);
        sink.is_found(&["b.l1.gz has", "_MANIFEST.json says"]).await;
    }
    sink.write(&path, &whole[..whole.len() - 1]);
    sink.is_found(&["b.l1.gz: at "]).await;
    // A gzip member's, with its extra field.
    let header_len = 12 + usize::from(u16::from_le_bytes([whole[10], whole[11]]));
    for at in 0..header_len {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        sink.write(&path, &flipped);
        let (good, text) = sink.audit(|_| ()).await;
        assert!(!good, "byte {at} of the header: {text}");
        assert!(has(&text, "wrong: ", &["b.l1.gz"]), "{text}");
    }
}

#[tokio::test]
async fn other_codecs_merged_frames_and_buckets_of_other_sizes_are_audited_alike() {
    let size = |seconds: u32| BucketSize::try_from(seconds).expect("valid");
    for (dir, bucket) in [
        ("app/dt=2026-11-22", size(86_400).bucket_of_ms(START_S * 1000)),
        ("app/dt=2026-11-22/hm=2015", size(900).bucket_of_ms((START_S + 900) * 1000)),
        ("app/dt=2026-11-22/hr=20", size(4 * 3600).bucket_of_ms(START_S * 1000)),
    ] {
        let key = HourKey { category: "app".parse().expect("valid"), bucket };
        let merged = frame_of("app", bucket, Codec::Zstd, &[(1, 0, 10), (2, 0, 5), (1, 10, 12)]);
        let last = frame_of("app", bucket, Codec::Zstd, &[(2, 5, 40)]);
        let sink = Sink { dir: tempfile::tempdir().expect("a directory") };
        let publish = |frames: &[&[u8]]| {
            let file: NamedFile = ("a.l0.zst", frames.concat());
            sink.write(&format!("{dir}/a.l0.zst"), &file.1);
            sink.publish_sealed(dir, &key, &[seal_of(0, &key, &[file])]);
        };
        publish(&[&merged, &last]);
        for deep in [false, true] {
            let (good, text) = sink.audit(|options| options.deep = deep).await;
            assert!(good && text.contains("1 hours, 1 files, 0 late files, 2 frames, 2 streams, 52 records"), "{text}");
        }
        let (good, _) = sink.audit(|options| options.hour = Some(bucket.start_s() + 899)).await;
        assert!(good);
        publish(&[&merged, &last, &merged]);
        sink.is_found(&["web-1", "and in"]).await;
        publish(&[
            &frame_of("app", bucket, Codec::Zstd, &[(2, 0, 5)]),
            &frame_of("app", bucket, Codec::Zstd, &[(2, 6, 40)]),
        ]);
        sink.is_found(&["web-2", "are in no file"]).await;
        publish(&[&merged, &last]);
        sink.write(&format!("{dir}/a.l0.zst"), &merged);
        sink.is_found(&["a.l0.zst has"]).await;
    }
}

#[tokio::test]
async fn a_day_that_was_emptied_is_found_where_days_are_published() {
    let day = BucketSize::try_from(86_400).expect("valid");
    let sink = Sink { dir: tempfile::tempdir().expect("a directory") };
    for (n, name) in ["app/dt=2026-11-21", "app/dt=2026-11-22"].into_iter().enumerate() {
        let bucket = day.bucket_of_ms((START_S - 86_400 + n as i64 * 86_400) * 1000);
        let key = HourKey { category: "app".parse().expect("valid"), bucket };
        sink.publish_sealed(name, &key, &[seal_of(0, &key, &[])]);
    }
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good && text.contains("2 hours"), "{text}");
    sink.remove("app/dt=2026-11-21");
    std::fs::create_dir(sink.path("app/dt=2026-11-21")).expect("made");
    sink.is_found(&["app/dt=2026-11-21", "it is empty"]).await;
    // Where hours are, a day without any is what retention leaves.
    let sink = Sink::good();
    std::fs::create_dir(sink.path("app/dt=2026-11-21")).expect("made");
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good && text.contains(" 0 notes"), "{text}");
}

#[tokio::test]
async fn a_category_is_audited_alone_and_the_success_file_may_have_another_name() {
    let sink = Sink::good();
    let bucket = bucket_in(0);
    let key = HourKey { category: "other".parse().expect("valid"), bucket };
    let file: NamedFile = ("a.l0.gz", frame_of("other", bucket, Codec::Gzip, &[(1, 0, 10)]));
    let dir = "other/dt=2026-11-22/hr=20";
    sink.write(&format!("{dir}/a.l0.gz"), &file.1);
    sink.publish_sealed(dir, &key, &[seal_of(0, &key, &[file])]);
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good && text.contains("3 hours"), "{text}");
    sink.remove(&format!("{dir}/a.l0.gz"));
    let of = |name: &'static str| move |options: &mut Options| options.category = Some(name.parse().expect("valid"));
    let (good, text) = sink.audit(of("app")).await;
    assert!(good && text.contains("2 hours"), "{text}");
    let (good, text) = sink.audit(of("other")).await;
    assert!(!good && text.contains("1 hours"), "{text}");
    let done = |options: &mut Options| (options.success_file, options.category) = ("_DONE".into(), "app".parse().ok());
    let (good, text) = sink.audit(done).await;
    assert!(!good && has(&text, "wrong: ", &[HOUR, "_DONE is missing"]), "{text}");
    for hour in [HOUR, NEXT] {
        sink.rename(&format!("{hour}/_SUCCESS"), &format!("{hour}/_DONE"));
    }
    let (good, text) = sink.audit(done).await;
    assert!(good && text.contains(" 0 notes"), "{text}");
}
