use super::*;
use crate::root::hours::{Manifest, seal_file};
use crate::root::ledger::{AgentCount, HourKey, Seal, SealedFile};
use std::path::{Path, PathBuf};
use tributary_common::bucket::BucketSize;
use tributary_common::checksum::Checksum;
use tributary_common::frame::{Codec, FrameEncoder, FrameHeader, Run, SliceDescriptor};
use tributary_common::ids::{AgentId, StreamId};
use tributary_common::position::{Position, TailHash};

const HOUR: &str = "app/dt=2026-11-22/hr=20";
const START_S: i64 = 1_795_377_600;

/// A stream of lines, every one of them another.
fn text(stream: u128) -> Vec<u8> {
    (0..40).flat_map(|n| format!("{stream} line {n:03} of the log\n").into_bytes()).collect()
}

fn agent_of(stream: u128) -> AgentId {
    format!("web-{stream}").parse().expect("valid")
}

/// The frame with the lines from `from` to `to` of a stream, of the hour `hours` after the first.
fn frame_in(hours: i64, stream: u128, from: u64, to: u64) -> Vec<u8> {
    let text = text(stream);
    let line = text.len() as u64 / 40;
    let at = |line_no: u64| Position { offset: line_no * line, tail: TailHash::of(&text[..(line_no * line) as usize]) };
    let len = (to - from) * line;
    let slice = SliceDescriptor {
        agent: agent_of(stream),
        host: format!("web-{stream}.example"),
        stream: StreamId(stream),
        base: Position::zero(),
        start: at(from),
        end: at(to),
        batch_hash: None,
        runs: vec![Run { start: from * line, len, stored: len }],
        records: to - from,
        prefix_len: 0,
        altered: false,
        first_time_ms: START_S * 1000,
        last_time_ms: START_S * 1000,
    };
    let raw = &text[(from * line) as usize..(to * line) as usize];
    let bucket = BucketSize::HOUR.bucket_of_ms((START_S + hours * 3600) * 1000);
    let category = "app".parse().expect("valid");
    FrameEncoder::new(Codec::Gzip, 1).encode(&category, bucket, &[slice], raw).expect("encodes").to_vec()
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

fn sealed(lane: u16, hours: i64, files: &[NamedFile]) -> Seal {
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
        category: "app".parse().expect("valid"),
        bucket_start_s: START_S + hours * 3600,
        bucket_size_s: 3600,
        files: sealed,
        losses: Vec::new(),
        missing: Vec::new(),
        publish_partial: false,
        inputs: Vec::new(),
        agents,
    }
}

fn key(hours: i64) -> HourKey {
    let bucket = BucketSize::HOUR.bucket_of_ms((START_S + hours * 3600) * 1000);
    HourKey { category: "app".parse().expect("valid"), bucket }
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
        sink.publish("app/dt=2026-11-22/hr=21", 1, &[(0, &next), (1, &[])]);
        let late = [("d.l1.gz", frame(2, 30, 40))];
        sink.write(&format!("{HOUR}/_late/d.l1.gz"), &late[0].1);
        let manifest = Manifest::of(&key(0), &[sealed(1, 0, &late)]);
        sink.write(&format!("{HOUR}/_late/_d.l1.gz.manifest.json"), &serde_json::to_vec(&manifest).expect("plain"));
        sink
    }

    fn publish(&self, dir: &str, hours: i64, lanes: &[(u16, &[NamedFile])]) {
        let mut seals = Vec::new();
        for (lane, files) in lanes {
            let seal = sealed(*lane, hours, files);
            self.write(&format!("{dir}/{}", seal_file(LaneId(*lane))), &serde_json::to_vec(&seal).expect("plain"));
            seals.push(seal);
            files.iter().for_each(|(name, bytes)| self.write(&format!("{dir}/{name}"), bytes));
        }
        let manifest = Manifest::of(&key(hours), &seals);
        self.write(&format!("{dir}/_MANIFEST.json"), &serde_json::to_vec(&manifest).expect("plain"));
        self.write(&format!("{dir}/_SUCCESS"), b"");
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
        assert!(!good, "{text}");
        assert!(text.lines().any(|line| words.iter().all(|word| line.contains(word))), "{words:?} not in:\n{text}");
    }
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
    sink.publish("app/dt=2026-11-22/hr=21", 1, &[(0, &other), (1, &[])]);
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
    for (path, words) in [
        (format!("{HOUR}/notes.txt"), "notes.txt doesn't belong here"),
        (format!("{HOUR}/_late/e.gz"), "_late/e.gz is a foreign file"),
        (format!("{HOUR}/_late/readme"), "_late/readme doesn't belong here"),
        ("app/dt=2026-11-22/backup.tar".into(), "backup.tar doesn't belong here"),
    ] {
        let sink = Sink::good();
        sink.write(&path, b"");
        sink.is_found(&[words]).await;
    }
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

#[tokio::test]
async fn a_manifest_or_a_seal_that_lies_is_found() {
    type Lie = fn(&mut serde_json::Value);
    let lies: [(&str, Lie, &str); 9] = [
        ("_MANIFEST.json", |json| json["records"] = json!(51), "_MANIFEST.json says 51 records"),
        ("_MANIFEST.json", |json| json["files"][0]["bytes"] = json!(1), "other lengths, checksums"),
        ("_MANIFEST.json", |json| json["files"][0]["records"] = json!(1), "_MANIFEST.json says 1"),
        ("_MANIFEST.json", |json| json["files"][1]["crc32c"] = json!("00000000"), "_MANIFEST.json says 00000000"),
        ("_MANIFEST.json", |json| drop(json["files"].as_array_mut().expect("a list").pop()), "only the seals name"),
        ("_MANIFEST.json", |json| json["bucket_start_s"] = json!(START_S + 3600), "is of another hour"),
        ("_MANIFEST.json", |json| json["agents"]["web-1"]["bytes"] = json!(1), "tell other sums"),
        ("_seal-1.json", |json| json["agents"]["web-2"]["records"] = json!(1), "_seal-1.json says that its agents"),
        ("_seal-1.json", |json| json["lane"] = json!(0), "_seal-1.json is of lane 0"),
    ];
    for (file, lie, words) in lies {
        let sink = Sink::good();
        sink.lie(file, lie);
        sink.is_found(&[words]).await;
    }
    let sink = Sink::good();
    sink.lie("_late/_d.l1.gz.manifest.json", |json| json["files"][0]["crc32c"] = json!(Checksum(1)));
    sink.is_found(&["d.l1.gz", "says 00000001"]).await;
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
    let line = text(2).len() as u64 / 40;
    let lost = json!([{ "agent": "web-2", "stream": StreamId(2), "from": 10 * line, "to": 20 * line }]);
    for file in ["_seal-1.json", "_MANIFEST.json"] {
        sink.lie(file, |json| json["losses"] = lost.clone());
    }
    let (good, text) = sink.audit(|_| ()).await;
    assert!(good && text.contains("bytes declared as lost"), "{text}");
}

#[tokio::test]
async fn what_waits_to_be_published_fills_gaps_and_a_part_of_the_sink_is_audited_alone() {
    let sink = Sink::good();
    sink.change("a.l0.gz", |frames| drop(frames.remove(0)));
    sink.is_found(&["web-1", "are in no file"]).await;
    sink.write("_tributary/lanes/0/e1-x/s.gz", &frame(1, 0, 10));
    sink.write("_tributary/lanes/0/e1-x/owner/7.1@root-1", b"");
    sink.write("_tributary/lanes/0.lock", b"");
    let (_, text) = sink.audit(|_| ()).await;
    assert!(!text.contains("are in no file"), "{text}");
    // Alone, the hour is proved by its manifest; bytes of other hours are no gaps.
    let hour = |text: &'static str| move |options: &mut Options| options.hour = Some(parse_moment(text).expect("good"));
    let (good, text) = sink.audit(hour("2026-11-22T21:30")).await;
    assert!(good && text.contains("1 hours, 1 files") && text.contains("note: the streams"), "{text}");
    let (good, _) = sink.audit(hour("2026-11-22T20")).await;
    assert!(!good);
    let (good, text) = sink.audit(|options| options.since = Some(START_S + 3600)).await;
    assert!(good && text.contains("1 hours"), "{text}");
    let error = run(&Options { hour: Some(0), ..options(sink.dir.path()) }, &mut Vec::new()).await;
    assert!(error.expect_err("nothing there").to_string().contains("no hour is published"));
}
