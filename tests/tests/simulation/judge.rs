//! Looks at what is answered and at what readers see, while a run goes on and at its end.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::StatusCode;
use tributary_aggregator::dfs::DfsPath;
use tributary_aggregator::dfs::hostile::HostileCluster;
use tributary_aggregator::root::hours::{MANIFEST_FILE, Manifest, PARTIAL_FILE, Partial};
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::checksum::Checksum;
use tributary_common::frame::{FrameHeader, Peek};
use tributary_common::ids::{LaneId, StreamId};
use tributary_common::messages::Answers;
use xxhash_rust::xxh3::xxh3_64;

use crate::agent::CLOSE_DELAY_MS;
use crate::chance::{Trace, locked};
use crate::server::{Server, Written};

/// A range of a stream's bytes.
type Span = (StreamId, u64, u64);

/// What hours must be like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HourRules {
    pub(crate) roll_size: u64,
    /// Whether an hour has its success file though an agent is missing.
    pub(crate) publish_partial: bool,
    /// Whether hours are published without a server that is gone for ever: nobody says that it is.
    pub(crate) gives_up: bool,
}

/// The frames of a file, as far as they were read.
#[derive(Default)]
struct Scanned {
    len: usize,
    spans: Vec<Span>,
}

#[derive(Default)]
struct State {
    /// Where streams begin; what lies before belongs to others.
    bases: BTreeMap<StreamId, u64>,
    /// How far streams were found to be durable.
    durable: BTreeMap<StreamId, u64>,
    scanned: BTreeMap<DfsPath, Scanned>,
    published: BTreeMap<DfsPath, Bytes>,
    broken: Vec<String>,
    /// Whether files lose bytes, so that streams may diverge.
    files_change: bool,
    looks: u64,
    diverged: u64,
    out_of_order: u64,
    hours: u64,
    partial: u64,
    rolled: u64,
}

#[derive(Clone)]
pub(crate) struct Judge {
    cluster: HostileCluster,
    trace: Trace,
    rules: HourRules,
    state: Arc<Mutex<State>>,
}

/// What a run came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Verdicts {
    /// Lines that were written.
    pub(crate) lines: u64,
    /// Lines that are missing, as they may.
    pub(crate) missing: u64,
    /// Lines that are there twice, as they may.
    pub(crate) doubled: u64,
    /// How often it was looked whether something that was answered `committed` is durable.
    pub(crate) looks: u64,
    /// Streams that diverged.
    pub(crate) diverged: u64,
    /// Bytes that a writer lost, and that stand behind later ones of their stream in a file.
    pub(crate) out_of_order: u64,
    /// Hours that were published.
    pub(crate) hours: u64,
    /// Those of them without an agent.
    pub(crate) partial: u64,
    /// Those of them with several files of a lane.
    pub(crate) rolled: u64,
}

fn is_visible(path: &DfsPath) -> bool {
    path.as_str().starts_with("app/") && !path.as_str().split('/').any(|part| part.starts_with('.'))
}

fn is_data(path: &DfsPath) -> bool {
    path.name().ends_with(".gz")
}

/// The part of a segment's name that says its category, hour and lane.
fn hour_and_lane_of(name: &str) -> &str {
    name.rsplit_once("-e").map_or(name, |(lane, _)| lane)
}

/// The part of it that says its lane.
fn lane_of(name: &str) -> &str {
    hour_and_lane_of(name).rsplit_once('.').map_or(name, |(_, lane)| lane)
}

/// Whether a file is of an hour before 2026: an agent that reads then does not believe its clock (`CLOCK_IS_RIGHT_FROM_MS`). It files
/// all lines under the time of reading, so what is sent again by a later run of it may have been lost in a file of another hour.
fn is_before_clocks_are_right(path: &DfsPath) -> bool {
    path.as_str().contains("/dt=2025-")
}

/// The frames in `bytes` from `from` on that are whole. Returns where they end.
fn scan(bytes: &[u8], mut from: usize, spans: &mut Vec<Span>) -> usize {
    while let Ok(Peek::Header(header)) = FrameHeader::peek(&bytes[from..]) {
        let Some(frame) = bytes.get(from..from + header.frame_len as usize) else { break };
        if FrameHeader::verify(frame).is_err() {
            break;
        }
        for slice in &header.slices {
            spans.extend(slice.runs.iter().map(|run| (slice.stream, run.start, run.start + run.len)));
        }
        from += frame.len();
    }
    from
}

impl Judge {
    pub(crate) fn new(cluster: HostileCluster, trace: Trace, rules: HourRules, files_change: bool) -> Self {
        let state = State { files_change, ..State::default() };
        Self { cluster, trace, rules, state: Arc::new(Mutex::new(state)) }
    }

    /// Something happened that must not.
    pub(crate) fn broken(&self, what: String) {
        self.trace.add(|| format!("BROKEN: {what}"));
        locked(&self.state).broken.push(what);
    }

    /// A stream begins there.
    pub(crate) fn base(&self, stream: StreamId, offset: u64) {
        let mut state = locked(&self.state);
        let base = state.bases.entry(stream).or_insert(offset);
        *base = (*base).min(offset);
    }

    /// An agent was told that its file is another one than its stream, or found it out.
    pub(crate) fn diverged(&self, agent: &str) {
        self.trace.add(|| format!("{agent}: diverged"));
        locked(&self.state).diverged += 1;
    }

    /// An agent treats a file as another one than before.
    pub(crate) fn changed(&self, what: &str) {
        self.trace.add(|| what.to_owned());
        let mut state = locked(&self.state);
        if !state.files_change {
            state.broken.push(format!("{what}, and no file ever changed"));
        }
    }

    /// A node answers. What it calls committed is durable at this moment.
    pub(crate) fn answered(&self, node: &str, status: StatusCode, body: &[u8]) {
        if status != StatusCode::OK {
            return;
        }
        let Ok(answers) = serde_json::from_slice::<Answers>(body) else { return };
        for answer in answers.answers {
            let Some(committed) = answer.committed else { continue };
            let known = {
                let state = locked(&self.state);
                let base = state.bases.get(&answer.stream).copied().unwrap_or(0);
                state.durable.get(&answer.stream).copied().unwrap_or(0).max(base)
            };
            if committed.offset <= known {
                continue;
            }
            let durable = self.look_how_far(answer.stream, known);
            if durable < committed.offset {
                self.broken(format!(
                    "{node} answers that stream {} is committed up to {}, and {durable} bytes are durable",
                    answer.stream, committed.offset
                ));
            }
        }
    }

    /// How far a stream is durable: what would be there if all machines lost their power now.
    fn look_how_far(&self, stream: StreamId, known: u64) -> u64 {
        let files = self.cluster.durable_files();
        let mut state = locked(&self.state);
        state.looks += 1;
        state.scanned.retain(|path, scanned| files.get(path).is_some_and(|bytes| bytes.len() >= scanned.len));
        let mut spans: Vec<(u64, u64)> = Vec::new();
        for (path, bytes) in files.iter().filter(|(path, _)| is_data(path)) {
            let scanned = state.scanned.entry(path.clone()).or_default();
            if scanned.len < bytes.len() {
                scanned.len = scan(bytes, scanned.len, &mut scanned.spans);
            }
            spans.extend(scanned.spans.iter().filter(|span| span.0 == stream).map(|span| (span.1, span.2)));
        }
        spans.sort_unstable();
        let durable = spans.into_iter().fold(known, |end, (from, to)| if from <= end { end.max(to) } else { end });
        state.durable.insert(stream, durable);
        durable
    }

    /// Every published file stays as it was when it was seen first; only `_late` gets new ones.
    ///
    /// An hour is whole when it is seen first.
    pub(crate) fn look_at_published(&self, servers: &[Arc<Server>]) {
        let files: BTreeMap<DfsPath, Bytes> =
            self.cluster.files().into_iter().filter(|(path, _)| is_visible(path)).collect();
        let mut broken = Vec::new();
        let mut state = locked(&self.state);
        for (path, bytes) in &state.published {
            if files.get(path) != Some(bytes) {
                broken.push(format!("{path} was changed after it was published"));
            }
        }
        let known: BTreeSet<Option<DfsPath>> = state.published.keys().map(DfsPath::parent).collect();
        let is_new = |path: &&DfsPath| path.name() == "_MANIFEST.json" && !state.published.contains_key(*path);
        let new: Vec<DfsPath> = files.keys().filter(is_new).cloned().collect();
        for path in new {
            let hour = Hour::of(&path, &files);
            broken.extend(hour.without(servers, self.rules));
            broken.extend(hour.not_whole(servers));
            broken.extend(hour.too_many_files(self.rules.roll_size));
            state.hours += 1;
            state.partial += u64::from(!hour.manifest.complete);
            state.rolled += u64::from(hour.lanes().values().any(|(files, _)| *files > 1));
        }
        for (path, bytes) in files {
            if state.published.contains_key(&path) {
                continue;
            }
            let hour = path.parent();
            if known.contains(&hour) && hour.as_ref().is_none_or(|hour| hour.name() != "_late") {
                broken.push(format!("{path} was added to a published hour"));
            }
            self.trace.add(|| format!("published {path} {} bytes {:016x}", bytes.len(), xxh3_64(&bytes)));
            if is_data(&path) {
                let late = out_of_order(&path, &bytes);
                // What a writer lost that failed is sent again, and comes behind what came through.
                let wanted = if is_before_clocks_are_right(&path) { lane_of } else { hour_and_lane_of };
                if self.cluster.unfinished().iter().any(|file| wanted(file.name()) == wanted(path.name())) {
                    state.out_of_order += late.len() as u64;
                } else {
                    broken.extend(late);
                }
            }
            state.published.insert(path, bytes);
        }
        drop(state);
        broken.into_iter().for_each(|what| self.broken(what));
    }

    /// What was found to be wrong so far.
    pub(crate) fn findings(&self) -> Vec<String> {
        locked(&self.state).broken.clone()
    }

    /// Data files that no reader sees, joins too.
    pub(crate) fn unpublished(&self) -> Vec<DfsPath> {
        let files = self.cluster.files().into_keys();
        files.filter(|path| !is_visible(path) && is_data(path)).collect()
    }

    /// The first hour that is not published, from the one on in which an owner first knew an agent, to the one of `to_ms`.
    pub(crate) fn unpublished_hour(&self, servers: &[Arc<Server>], size: BucketSize, to_ms: i64) -> Option<Bucket> {
        let from_ms = servers.iter().filter_map(|server| server.known_ms()).min()?;
        let state = locked(&self.state);
        let mut hour = size.bucket_of_ms(from_ms);
        while hour.start_s() * 1000 <= to_ms {
            let day = hour.parent_dir().map(|day| format!("{day}/")).unwrap_or_default();
            let manifest = format!("app/{day}{}/{MANIFEST_FILE}", hour.dir_name());
            if !state.published.keys().any(|path| path.as_str() == manifest) {
                return Some(hour);
            }
            hour = size.bucket_of_ms(hour.end_ms());
        }
        None
    }

    /// How often each line is there for readers.
    fn counts(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for (path, bytes) in self.cluster.files() {
            if is_visible(&path) && is_data(&path) {
                names_in(&bytes, |name| *counts.entry(name.to_owned()).or_insert(0) += 1);
            }
        }
        counts
    }

    /// Lines that have to be there and are not.
    pub(crate) fn missing(&self, servers: &[Arc<Server>]) -> Vec<String> {
        let counts = self.counts();
        let mut missing = Vec::new();
        for server in servers {
            let (written, may_miss, _) = server.fates();
            let written = written.into_iter().map(|line| line.name);
            missing.extend(written.filter(|line| !counts.contains_key(line) && !may_miss.contains(line)));
        }
        missing
    }

    /// The last word.
    pub(crate) fn end(&self, servers: &[Arc<Server>]) -> Verdicts {
        self.look_at_published(servers);
        let mut counts = self.counts();
        let mut verdicts = Verdicts::default();
        for server in servers {
            let (written, may_miss, may_double) = server.fates();
            for Written { name: line, .. } in written {
                verdicts.lines += 1;
                match counts.remove(&line).unwrap_or(0) {
                    1 => {}
                    0 if may_miss.contains(&line) => verdicts.missing += 1,
                    0 => self.broken(format!("line {line} is missing")),
                    2 if may_double.contains(&line) => verdicts.doubled += 1,
                    _ if may_double.contains(&line) => verdicts.doubled += 1,
                    count => self.broken(format!("line {line} is there {count} times")),
                }
            }
        }
        for line in counts.into_keys() {
            self.broken(format!("line {line} was never written"));
        }
        let state = locked(&self.state);
        verdicts.looks = state.looks;
        verdicts.diverged = state.diverged;
        verdicts.out_of_order = state.out_of_order;
        verdicts.hours = state.hours;
        verdicts.partial = state.partial;
        verdicts.rolled = state.rolled;
        verdicts
    }
}

/// The names of the lines in a file.
fn names_in(bytes: &[u8], mut each: impl FnMut(&str)) {
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(bytes).read_to_string(&mut text).expect("an ordinary gzip file");
    // Of a torn line, all of it says which one it is.
    text.lines().for_each(|line| each(line.split(' ').nth(1).unwrap_or(line)));
}

/// An hour that has just been published.
struct Hour<'a> {
    path: &'a DfsPath,
    /// What is in its directory, by name.
    files: BTreeMap<&'a str, &'a Bytes>,
    manifest: Manifest,
}

impl<'a> Hour<'a> {
    fn of(path: &'a DfsPath, all: &'a BTreeMap<DfsPath, Bytes>) -> Self {
        let manifest = serde_json::from_slice(&all[path]).expect("a manifest of the form that is documented");
        let is_in_it = |other: &DfsPath| other.parent() == path.parent();
        let files = all.iter().filter(|(other, _)| is_in_it(other)).map(|(other, bytes)| (other.name(), bytes));
        Self { path, files: files.collect(), manifest }
    }

    fn start_ms(&self) -> i64 {
        self.manifest.bucket_start_s * 1000
    }

    fn end_ms(&self) -> i64 {
        self.start_ms() + i64::from(self.manifest.bucket_size_s) * 1000
    }

    /// What is wrong with whom it lacks: a server that is gone for ever, where nobody said so, and nobody else; and what it says
    /// of that.
    fn without(&self, servers: &[Arc<Server>], rules: HourRules) -> Option<String> {
        let manifest = &self.manifest;
        let missing: BTreeSet<&str> = manifest.missing.iter().map(|one| one.agent.as_str()).collect();
        let is_gone = |server: &&Arc<Server>| rules.gives_up && server.died_ms().is_some();
        let gone = servers.iter().filter(is_gone);
        let may: BTreeSet<&str> = gone.clone().map(|server| server.agent.as_str()).collect();
        // One that died before the end can't have been past it.
        let is_due = |server: &&Arc<Server>| {
            server.died_ms().is_some_and(|died| died < self.end_ms()) && server.known_ms().is_some()
        };
        let must: BTreeSet<&str> = gone.filter(is_due).map(|server| server.agent.as_str()).collect();
        if !missing.is_subset(&may) || !must.is_subset(&missing) {
            return Some(format!("{} lacks {missing:?}, of {may:?}, and must lack {must:?}", self.path));
        }
        let partial = self.files.get(PARTIAL_FILE);
        let named = partial.map(|bytes| serde_json::from_slice(bytes).expect("a list of agents"));
        let named = named.map_or(Vec::new(), |partial: Partial| partial.missing);
        let complete = missing.is_empty();
        let success = self.files.contains_key("_SUCCESS");
        if manifest.complete != complete || named != manifest.missing || success != (complete || rules.publish_partial)
        {
            return Some(format!("{}: {manifest:?}, {PARTIAL_FILE} {named:?}, success file: {success}", self.path));
        }
        None
    }

    /// What is missing in it: it has every line that was there `close_delay` after its end, of every agent that was known by then
    /// and had not left.
    fn not_whole(&self, servers: &[Arc<Server>]) -> Vec<String> {
        let (mut there, mut records, mut wrong) = (BTreeSet::new(), 0, Vec::new());
        for (_, bytes) in self.files.iter().filter(|(name, _)| name.ends_with(".gz")) {
            names_in(bytes, |name| {
                there.insert(name.to_owned());
                records += 1;
            });
        }
        wrong.extend(self.lies(records));
        for server in servers {
            let (written, may_miss, may_double) = server.fates();
            let belongs = |line: &&Written| (self.start_ms()..self.end_ms()).contains(&line.time_ms);
            for line in written.iter().filter(belongs) {
                if server.must_be_in(line, self.end_ms(), CLOSE_DELAY_MS as i64)
                    && !there.contains(&line.name)
                    && !may_miss.contains(&line.name)
                    && !may_double.contains(&line.name)
                {
                    wrong.push(format!("{}: line {line:?} is not in its hour", self.path));
                }
            }
        }
        wrong
    }

    /// What the manifest says of files and records that is not so.
    fn lies(&self, records: u64) -> Option<String> {
        let files = self.files.iter().filter(|(name, _)| name.ends_with(".gz"));
        let there: Vec<(&str, u64, Checksum)> =
            files.map(|(name, bytes)| (*name, bytes.len() as u64, Checksum::of(bytes))).collect();
        let named = self.manifest.files.iter().map(|file| (file.name.as_str(), file.bytes, file.crc32c));
        let by_agents: u64 = self.manifest.agents.values().map(|count| count.records).sum();
        let by_files: u64 = self.manifest.files.iter().map(|file| file.records).sum();
        let is_so = [self.manifest.records, by_agents, by_files] == [records; 3] && named.eq(there.iter().copied());
        (!is_so).then(|| format!("{} has {there:?} with {records} records, and says {:?}", self.path, self.manifest))
    }

    /// How many files each lane has, and how many bytes.
    fn lanes(&self) -> BTreeMap<LaneId, (u64, u64)> {
        let mut lanes: BTreeMap<LaneId, (u64, u64)> = BTreeMap::new();
        for file in &self.manifest.files {
            let (files, bytes) = lanes.entry(file.lane).or_default();
            *files += 1;
            *bytes += file.bytes;
        }
        lanes
    }

    fn too_many_files(&self, roll_size: u64) -> Option<String> {
        let mut lanes = self.lanes().into_iter();
        let (lane, (files, bytes)) = lanes.find(|(_, (files, bytes))| *files > 2 * bytes / roll_size + 1)?;
        Some(format!("{}: lane {lane} has {files} files with {bytes} bytes, rolled at {roll_size}", self.path))
    }
}

/// The streams whose bytes don't stand in their order in a file.
fn out_of_order(path: &DfsPath, bytes: &[u8]) -> Vec<String> {
    let mut spans = Vec::new();
    let end = scan(bytes, 0, &mut spans);
    let mut wrong = Vec::new();
    if end < bytes.len() {
        wrong.push(format!("{path} has {} bytes behind its last whole frame", bytes.len() - end));
    }
    let mut ends: BTreeMap<StreamId, u64> = BTreeMap::new();
    for (stream, from, to) in spans {
        let end = ends.entry(stream).or_default();
        if from < *end {
            wrong.push(format!("{path} has bytes {from} to {to} of stream {stream} behind those before {end}"));
        }
        *end = to;
    }
    wrong
}
