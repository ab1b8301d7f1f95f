//! How hours stand: put together from what the lanes say and from what lies on the sink, and shown as text. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tributary_common::ids::{CategoryName, Epoch, LaneCount, LaneId};

use crate::agents::{ago, moment};
use crate::root::hours::Manifest;
use crate::root::ledger::Seal;
use crate::root::open_hours::{LeftOut, OpenHour, OpenHours, WaitedFor};
use crate::root::sink::HourDirs;

/// The version of what `hours --json` writes.
pub(super) const TABLE_VERSION: u32 = 1;

/// Agents that a line of text names.
const AGENTS_IN_LINE: usize = 5;

/// How an hour stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// Published, with all of every agent.
    Complete,
    /// Published without some agents.
    Partial,
    /// Only what came late is there: retention had removed the hour.
    Late,
    /// It is not over, or agents are waited for, or it is being put together.
    Open,
    /// Published, and its manifest can't be read.
    Unreadable,
}

/// What lies beside a published hour.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Late {
    /// Records.
    pub(super) records: u64,
    /// The length of the files in bytes.
    pub(super) bytes: u64,
    /// Files.
    pub(super) files: u64,
}

/// An agent that an hour waits for, or lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Agent {
    /// Its id.
    pub(super) agent: String,
    /// Its host name.
    pub(super) host: String,
    /// For how long nothing was heard of it, in milliseconds; none for one that a published hour lacks.
    pub(super) silent_ms: Option<i64>,
    /// How far the moment up to which it has said all lies before the hour's end, in milliseconds; none if it never said so.
    pub(super) behind_ms: Option<i64>,
    /// Files of which it named bytes that are not stored.
    pub(super) uncommitted_streams: u64,
    /// These bytes; none for an agent that a published hour lacks.
    pub(super) uncommitted_bytes: Option<u64>,
    /// Why it gets no further, in its own words, or why it is not believed.
    pub(super) reason: String,
}

/// An hour of a category.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hour {
    /// The category.
    pub(super) category: CategoryName,
    /// Its directory below the sink's, also of one that is not there yet.
    pub(super) directory: String,
    /// Its start, seconds since 1970, UTC.
    pub(super) bucket_start_s: i64,
    /// Its size in seconds; none where no file could be read that says it.
    pub(super) bucket_size_s: Option<u32>,
    /// How it stands.
    pub(super) state: State,
    /// Records: of a published hour those in its manifest, of an open one those that are stored so far.
    pub(super) records: u64,
    /// Their stored length in bytes.
    pub(super) bytes: u64,
    /// Files: of an open hour those of the lanes that have sealed it; none while no lane has.
    pub(super) files: Option<u64>,
    /// What came after it was published, beside it.
    pub(super) late: Late,
    /// Bytes of log that are declared lost in its manifest.
    pub(super) lost_bytes: u64,
    /// Whether its end is past.
    pub(super) over: bool,
    /// The lanes that have sealed it; of a published one all that there were.
    pub(super) sealed_by: Vec<LaneId>,
    /// The lanes that may have something of an open hour, or wait for agents, and did not say so.
    pub(super) lanes_unknown: Vec<LaneId>,
    /// How many agents it waits for; of a partial one: how many it lacks.
    pub(super) waiting_for: u64,
    /// Some of them: up to 20 of each lane.
    pub(super) agents: Vec<Agent>,
    /// For how long nothing of what it waits for has moved, in seconds: after `give_up_after` it is published without.
    pub(super) waited_in_vain_s: u64,
    /// What can't be read of it, and why.
    pub(super) problem: Option<String>,
}

/// Open hours that a lane doesn't name, because there are too many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LeftOutByLane {
    /// The category.
    pub(super) category: CategoryName,
    /// The lane.
    pub(super) lane: LaneId,
    /// Which hours.
    #[serde(flatten)]
    pub(super) which: LeftOut,
}

/// What `hours` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Table {
    /// The version of this form: 1.
    pub(super) version: u32,
    /// The hours, by category and time.
    pub(super) hours: Vec<Hour>,
    /// Open hours that are not among them, unless another lane names them.
    pub(super) left_out: Vec<LeftOutByLane>,
    /// The lanes that no root answers for.
    pub(super) lanes_not_asked: Vec<LaneId>,
}

/// What tells one hour from another: its category, start and directory. (Where the size of a category's buckets was changed, two
/// begin at the same time.)
pub(super) type Key = (CategoryName, i64, String);

/// What a lane says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct LaneStatus {
    /// The epoch of its owner.
    pub(super) epoch: Epoch,
    /// Its open hours.
    pub(super) open_hours: BTreeMap<CategoryName, OpenHours>,
}

/// An hour that is being put together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Unpublished {
    /// The seals that lie in its directory.
    pub(super) seals: Vec<Seal>,
    /// What can't be read of it, and why.
    pub(super) problem: Option<String>,
}

/// What lies on the sink.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct OnSink {
    /// Published hours; none for one that is not to be shown, because it ended too long ago.
    pub(super) published: BTreeMap<Key, Option<Hour>>,
    /// Those that are being put together.
    pub(super) unpublished: BTreeMap<Key, Unpublished>,
}

/// Takes the lanes out of what roots answer, and says which answers are not understood. Of several that answer for one lane only
/// the one with the highest epoch owns it: a root that is cut off from the sink doesn't know that its lane was taken.
#[must_use]
pub(super) fn lanes_of(answers: &[Value]) -> (BTreeMap<LaneId, LaneStatus>, Vec<String>) {
    let (mut lanes, mut strange) = (BTreeMap::<LaneId, LaneStatus>::new(), Vec::new());
    for (lane, said) in answers.iter().filter_map(|answer| answer["lanes"].as_object()).flatten() {
        if said.get("open_hours").is_none() {
            // It is not served there.
            continue;
        }
        match (lane.parse().map(LaneId), LaneStatus::deserialize(said)) {
            (Ok(id), Ok(status)) => {
                if lanes.get(&id).is_none_or(|known| known.epoch < status.epoch) {
                    lanes.insert(id, status);
                }
            }
            (Err(_), _) => strange.push(format!("a root serves a lane {lane:?}, which is no number")),
            (_, Err(error)) => strange.push(format!(
                "a root speaks of lane {lane} in a form that this program doesn't know ({error}): use programs of one version"
            )),
        }
    }
    (lanes, strange)
}

/// The name of an hour that a lane calls open; none if there can be no such hour.
#[must_use]
pub(super) fn key_of(category: &CategoryName, hour: &OpenHour) -> Option<Key> {
    let directory = HourDirs::new(category, hour.bucket()?).visible;
    Some((category.clone(), hour.bucket_start_s, directory.as_str().to_owned()))
}

impl Hour {
    fn new(key: &Key, bucket_size_s: Option<u32>, state: State) -> Self {
        let (category, bucket_start_s, directory) = key.clone();
        Self {
            category,
            directory,
            bucket_start_s,
            bucket_size_s,
            state,
            records: 0,
            bytes: 0,
            files: None,
            late: Late::default(),
            lost_bytes: 0,
            over: true,
            sealed_by: Vec::new(),
            lanes_unknown: Vec::new(),
            waiting_for: 0,
            agents: Vec::new(),
            waited_in_vain_s: 0,
            problem: None,
        }
    }

    /// A published hour.
    #[must_use]
    pub(super) fn published(key: &Key, manifest: &Manifest) -> Self {
        let end_ms = (manifest.bucket_start_s + i64::from(manifest.bucket_size_s)) * 1000;
        let lacks = |missing: &crate::root::ledger::Missing| Agent {
            agent: missing.agent.to_string(),
            host: missing.host.clone(),
            silent_ms: None,
            behind_ms: missing.watermark_ms.map(|watermark| end_ms.saturating_sub(watermark).max(0)),
            uncommitted_streams: missing.offsets.len() as u64,
            uncommitted_bytes: None,
            reason: String::new(),
        };
        Self {
            records: manifest.records,
            bytes: manifest.bytes,
            files: Some(manifest.files.len() as u64),
            lost_bytes: manifest.losses.iter().map(|lost| lost.to.saturating_sub(lost.from)).sum(),
            sealed_by: manifest.lanes.clone(),
            waiting_for: manifest.missing.len() as u64,
            agents: manifest.missing.iter().map(lacks).collect(),
            ..Self::new(
                key,
                Some(manifest.bucket_size_s),
                if manifest.complete { State::Complete } else { State::Partial },
            )
        }
    }

    /// An hour of which only late files are there.
    #[must_use]
    pub(super) fn late(key: &Key, bucket_size_s: Option<u32>) -> Self {
        Self::new(key, bucket_size_s, State::Late)
    }

    /// A published hour whose manifest can't be read.
    #[must_use]
    pub(super) fn unreadable(key: &Key, problem: String) -> Self {
        Self { problem: Some(problem), ..Self::new(key, None, State::Unreadable) }
    }

    /// An hour that readers don't see yet. `said`: by the lanes that name it; `unknown`: of which lanes nothing is known about it.
    fn open(
        key: &Key,
        said: &BTreeMap<LaneId, &OpenHour>,
        here: Option<&Unpublished>,
        unknown: impl Fn(LaneId) -> bool,
        all: LaneCount,
    ) -> Self {
        let seals = here.into_iter().flat_map(|here| &here.seals);
        let seals: BTreeMap<LaneId, &Seal> = seals.map(|seal| (seal.lane, seal)).collect();
        let size = said.values().map(|hour| hour.bucket_size_s).next();
        let mut hour = Self::new(key, size.or(seals.values().map(|seal| seal.bucket_size_s).next()), State::Open);
        // Nobody seals an hour that isn't over.
        hour.over = !seals.is_empty() || said.values().any(|hour| hour.over);
        hour.problem = here.and_then(|here| here.problem.clone());
        let (mut files, mut agents) = (0, Vec::new());
        for lane in all.lanes() {
            match (seals.get(&lane), said.get(&lane)) {
                (Some(seal), _) => {
                    hour.sealed_by.push(lane);
                    hour.records += seal.files.iter().map(|file| file.records).sum::<u64>();
                    hour.bytes += seal.files.iter().map(|file| file.bytes).sum::<u64>();
                    files += seal.files.len() as u64;
                }
                (None, Some(said)) => {
                    if said.sealed {
                        hour.sealed_by.push(lane);
                    }
                    hour.records += said.records;
                    hour.bytes += said.bytes;
                    files += said.files;
                    hour.waited_in_vain_s = hour.waited_in_vain_s.max(said.waited_in_vain_s);
                    // One that is not over waits for time, not for agents.
                    if said.over {
                        hour.waiting_for += said.waiting_for;
                        agents.extend(said.agents.iter().map(Agent::waited_for));
                    }
                }
                (None, None) if unknown(lane) => hour.lanes_unknown.push(lane),
                (None, None) => {}
            }
        }
        hour.files = (!hour.sealed_by.is_empty()).then_some(files);
        hour.agents = agents;
        hour
    }

    fn note(&self) -> String {
        let mut notes = Vec::new();
        match self.state {
            State::Open if !self.over => notes.push("it is not over".to_owned()),
            State::Open if self.waiting_for > 0 => notes.push(format!("waits for {}", self.names())),
            State::Open if self.lanes_unknown.is_empty() => notes.push("is being put together".to_owned()),
            State::Partial => notes.push(format!("lacks {}", self.names())),
            _ => {}
        }
        if self.state == State::Open && self.waiting_for > 0 && !self.sealed_by.is_empty() {
            notes.push(format!("sealed by {}", lanes(&self.sealed_by)));
        }
        if !self.lanes_unknown.is_empty() {
            notes.push(format!("nothing is known of {}", lanes(&self.lanes_unknown)));
        }
        if self.lost_bytes > 0 {
            notes.push(format!("{} bytes are lost", self.lost_bytes));
        }
        notes.extend(self.problem.clone());
        notes.join("; ")
    }

    fn names(&self) -> String {
        let mut names: Vec<String> = self.agents.iter().take(AGENTS_IN_LINE).map(Agent::describe).collect();
        let more = self.waiting_for.saturating_sub(names.len() as u64);
        if more > 0 {
            names.push(format!("{more} more"));
        }
        names.join(", ")
    }
}

impl Agent {
    fn waited_for(said: &WaitedFor) -> Self {
        Self {
            agent: said.agent.to_string(),
            host: said.host.clone(),
            silent_ms: Some(said.silent_ms),
            behind_ms: said.behind_ms,
            uncommitted_streams: said.uncommitted_streams,
            uncommitted_bytes: Some(said.uncommitted_bytes),
            reason: said.reason.clone(),
        }
    }

    fn describe(&self) -> String {
        let mut said: Vec<String> = self.silent_ms.map(|ms| format!("heard {} ago", ago(ms))).into_iter().collect();
        said.push(match self.behind_ms {
            None => "has not said how far it is".to_owned(),
            Some(0) => "past the hour".to_owned(),
            Some(ms) => format!("{} behind", ago(ms.max(1000))),
        });
        if self.uncommitted_streams > 0 {
            let bytes = self.uncommitted_bytes.map_or_else(String::new, |bytes| format!("{bytes} bytes of "));
            said.push(format!("{bytes}{} files not stored", self.uncommitted_streams));
        }
        if !self.reason.is_empty() {
            said.push(self.reason.clone());
        }
        format!("{} ({})", self.host, said.join(", "))
    }
}

fn lanes(lanes: &[LaneId]) -> String {
    let numbers: Vec<String> = lanes.iter().map(ToString::to_string).collect();
    format!("{} {}", if lanes.len() == 1 { "lane" } else { "lanes" }, numbers.join(", "))
}

/// The start of an hour, to the minute.
fn minute(start_s: i64) -> String {
    let text = moment(start_s.saturating_mul(1000));
    text.get(..16).unwrap_or(&text).to_owned()
}

impl Table {
    /// Puts together what the lanes said and what was then found on the sink. `category`: only of this one.
    #[must_use]
    pub(super) fn new(
        all: LaneCount,
        lanes: &BTreeMap<LaneId, LaneStatus>,
        sink: OnSink,
        category: Option<&CategoryName>,
    ) -> Self {
        let is_wanted = |name: &CategoryName| category.is_none_or(|category| category == name);
        let mut said: BTreeMap<Key, BTreeMap<LaneId, &OpenHour>> = BTreeMap::new();
        let mut left_out = Vec::new();
        for (lane, status) in lanes {
            for (category, open) in status.open_hours.iter().filter(|(name, _)| is_wanted(name)) {
                let which = open.left_out.iter();
                left_out.extend(which.map(|which| LeftOutByLane {
                    category: category.clone(),
                    lane: *lane,
                    which: *which,
                }));
                for hour in &open.hours {
                    if let Some(key) = key_of(category, hour) {
                        said.entry(key).or_default().insert(*lane, hour);
                    }
                }
            }
        }
        let open: BTreeSet<&Key> = said.keys().chain(sink.unpublished.keys()).collect();
        let nothing = BTreeMap::new();
        let open = open.into_iter().filter(|key| !sink.published.contains_key(*key)).map(|key| {
            let is_left_out = |lane| {
                left_out.iter().any(|left: &LeftOutByLane| {
                    left.lane == lane
                        && left.category == key.0
                        && (left.which.from_s..=left.which.to_s).contains(&key.1)
                })
            };
            let unknown = |lane| !lanes.contains_key(&lane) || is_left_out(lane);
            let said = said.get(key).unwrap_or(&nothing);
            (key.clone(), Hour::open(key, said, sink.unpublished.get(key), unknown, all))
        });
        let mut hours: BTreeMap<Key, Hour> = open.collect();
        // One that is published is what readers see, whatever a root said of it before.
        hours.extend(sink.published.into_iter().filter_map(|(key, hour)| Some((key, hour?))));
        Self {
            version: TABLE_VERSION,
            hours: hours.into_values().collect(),
            left_out,
            lanes_not_asked: all.lanes().filter(|lane| !lanes.contains_key(lane)).collect(),
        }
    }

    /// Whether everything could be read and asked.
    #[must_use]
    pub(super) fn is_whole(&self) -> bool {
        self.lanes_not_asked.is_empty() && self.hours.iter().all(|hour| hour.problem.is_none())
    }

    /// Writes it for people.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn show(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "{:<20} {:<17} {:<10} {:>12} {:>15} {:>6} {:>10}",
            "CATEGORY", "HOUR", "STATE", "RECORDS", "BYTES", "FILES", "LATE"
        )?;
        for hour in &self.hours {
            let state = match hour.state {
                State::Complete => "complete",
                State::Partial => "partial",
                State::Late => "late",
                State::Open => "open",
                State::Unreadable => "unreadable",
            };
            let files = hour.files.map_or_else(|| "-".into(), |files| files.to_string());
            let late = if hour.late == Late::default() { "-".into() } else { hour.late.records.to_string() };
            let line = format!(
                "{:<20} {:<17} {state:<10} {:>12} {:>15} {files:>6} {late:>10}  {}",
                hour.category.as_str(),
                minute(hour.bucket_start_s),
                hour.records,
                hour.bytes,
                hour.note()
            );
            writeln!(out, "{}", line.trim_end())?;
        }
        for LeftOutByLane { category, lane, which } in &self.left_out {
            writeln!(
                out,
                "{category}: lane {lane} has {} more open hours, from {} to {}",
                which.hours,
                minute(which.from_s),
                minute(which.to_s)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
