//! Reports: how far an agent has got with a category, also when it has nothing to ship.
//!
//! Every few seconds an agent says of each of its categories up to which time all is in what it names ([`Report`]). Tiers in
//! between keep the latest report of each (agent, category) in memory and pass it on by the agent's lane; one that is lost
//! is replaced by the next. The lane's owner puts them in order, and what it has to say travels down as the answer to a later
//! report ([`ReportAnswer`]), as `committed` does.
//!
//! # What a report promises
//!
//! "All that I will ever ship of before `watermark_ms` lies below these offsets." Streams that are committed as far as that are
//! not named: committed bytes don't come back. An offset that was named once stays required until it is committed or declared
//! lost, whatever later reports name.
//!
//! # Sessions
//!
//! A run of an agent draws a [`RunId`] when it starts. The lane's owner gives each run a [`Session`], in the order in which it
//! hears of them, so no agent's clock decides which of two runs is the later one. A run counts from its first report *with* its
//! session on. One that is heard after a later run has begun is told of that run (`rival`); when it names it in a report of its
//! own, it has proven that two machines with one agent id are alive at the same time, and neither is believed.
//!
//! # Bounds
//!
//! [`MAX_REPORTS_PER_REQUEST`], [`MAX_STREAMS_PER_REPORT`] and [`MAX_COUNTS_PER_REPORT`]; [`Report::check`] enforces them.
//! Version 1 is what is described here. Readers ignore fields that they don't know.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::ids::{AgentId, CategoryName, Epoch, LaneId, StreamId};
use crate::limits::{
    MAX_COUNTS_PER_REPORT, MAX_HOST_BYTES, MAX_REPORTS_PER_REQUEST, MAX_STREAMS_PER_REPORT, MAX_WORDS_BYTES,
};

/// The version of the reports' form.
pub const REPORT_VERSION: u32 = 1;

/// The number that a run of an agent draws when it starts. In text: 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(pub u64);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for RunId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // JSON readers keep 53 bits of a number.
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for RunId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
            u64::from_str_radix(&text, 16).map(Self).map_err(de::Error::custom)
        } else {
            u64::deserialize(deserializer).map(Self)
        }
    }
}

/// The name that the lane's owner gave to a run of an agent. A later run has a greater one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Session {
    /// The epoch of the owner that gave it.
    pub epoch: Epoch,
    /// Counts the sessions of one owner.
    pub counter: u64,
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.counter)
    }
}

/// A place in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StreamOffset {
    /// The stream.
    pub stream: StreamId,
    /// Bytes from its start.
    pub offset: u64,
}

/// What an agent knows to be stored of one bucket; there may be more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketCount {
    /// The bucket's start, seconds since 1970, UTC.
    pub start_s: i64,
    /// The bucket's size in seconds.
    pub size_s: u32,
    /// Records.
    pub records: u64,
    /// Bytes of the files.
    pub bytes: u64,
}

/// What one agent says of one category.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The lane of the agent. Who receives it computes it anew.
    pub lane: LaneId,
    /// The agent.
    pub agent: AgentId,
    /// The category.
    pub category: CategoryName,
    /// The agent's host name, a label. At most [`MAX_HOST_BYTES`].
    pub host: String,
    /// The run of the agent.
    pub run: RunId,
    /// The name that the lane's owner gave to the run; none until it has said so.
    pub session: Option<Session>,
    /// The later session that this run was told of.
    pub rival: Option<Session>,
    /// Grows with every report of the run.
    pub number: u64,
    /// The watermark, milliseconds since 1970: all that will ever be shipped of before lies below the offsets. None while the
    /// agent has not read all that there is.
    pub watermark_ms: Option<i64>,
    /// The streams that are not committed as far as that, and how far they have to be. At most
    /// [`MAX_STREAMS_PER_REPORT`].
    pub required: Vec<StreamOffset>,
    /// Streams of which nothing more will come: their bytes have vanished. At most [`MAX_STREAMS_PER_REPORT`].
    pub lost: Vec<StreamId>,
    /// What of the latest buckets this run has read and knows to be stored. At most [`MAX_COUNTS_PER_REPORT`].
    pub counts: Vec<BucketCount>,
    /// Whether it is the run's last word: no more will come of this agent for this category until it says so.
    pub last: bool,
    /// Why the watermark does not move, for an operator; empty while it does. At most [`MAX_WORDS_BYTES`].
    pub held_by: String,
}

/// A report that no agent makes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the report of agent {agent} for {category} has {what}")]
pub struct BadReport {
    agent: AgentId,
    category: CategoryName,
    what: String,
}

impl Report {
    /// One that says nothing yet: number 0 of a run without a session.
    #[must_use]
    pub fn new(lane: LaneId, agent: AgentId, category: CategoryName, host: impl Into<String>, run: RunId) -> Self {
        Self {
            lane,
            agent,
            category,
            host: host.into(),
            run,
            session: None,
            rival: None,
            number: 0,
            watermark_ms: None,
            required: Vec::new(),
            lost: Vec::new(),
            counts: Vec::new(),
            last: false,
            held_by: String::new(),
        }
    }

    /// An answer to it that says nothing yet.
    #[must_use]
    pub fn answer(&self) -> ReportAnswer {
        ReportAnswer {
            agent: self.agent.clone(),
            category: self.category.clone(),
            run: self.run,
            heard: 0,
            session: None,
            rival: None,
            refused: None,
            waiting_for: Vec::new(),
        }
    }

    /// Checks the bounds.
    ///
    /// # Errors
    /// Which one it doesn't keep.
    pub fn check(&self) -> Result<(), BadReport> {
        let bad = |what: String| Err(BadReport { agent: self.agent.clone(), category: self.category.clone(), what });
        let counted = [
            ("streams", self.required.len(), MAX_STREAMS_PER_REPORT),
            ("lost streams", self.lost.len(), MAX_STREAMS_PER_REPORT),
            ("counts", self.counts.len(), MAX_COUNTS_PER_REPORT),
            ("bytes of a host name", self.host.len(), MAX_HOST_BYTES),
            ("bytes of words", self.held_by.len(), MAX_WORDS_BYTES),
        ];
        for (what, len, max) in counted {
            if len > max {
                return bad(format!("{len} {what}; at most {max} are possible"));
            }
        }
        if self.watermark_ms.is_none() && !self.required.is_empty() {
            return bad("offsets without a watermark that they belong to".into());
        }
        Ok(())
    }

    /// About how many bytes it takes in a request, for bounds.
    #[must_use]
    pub fn weight(&self) -> usize {
        512 + self.host.len()
            + self.held_by.len()
            + 72 * self.required.len()
            + 36 * self.lost.len()
            + 96 * self.counts.len()
    }
}

/// The body of a request with reports. At most [`MAX_REPORTS_PER_REQUEST`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reports {
    /// The version of this form: [`REPORT_VERSION`].
    pub version: u32,
    /// The reports, of any agents and categories.
    pub reports: Vec<Report>,
}

impl Reports {
    /// A body of this version.
    #[must_use]
    pub fn new(reports: Vec<Report>) -> Self {
        Self { version: REPORT_VERSION, reports }
    }

    /// Checks the version and all bounds.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn check(&self) -> Result<(), String> {
        if self.version != REPORT_VERSION {
            return Err(format!(
                "the reports are of version {}, and this node reads version {REPORT_VERSION}: use a sender of the same release",
                self.version
            ));
        }
        if self.reports.len() > MAX_REPORTS_PER_REQUEST {
            return Err(format!(
                "the request has {} reports; at most {MAX_REPORTS_PER_REQUEST} are possible: send fewer in one request",
                self.reports.len()
            ));
        }
        self.reports.iter().try_for_each(Report::check).map_err(|error| error.to_string())
    }
}

/// What the lane's owner last said to an agent about a category.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportAnswer {
    /// The agent.
    pub agent: AgentId,
    /// The category.
    pub category: CategoryName,
    /// The run that it is for.
    pub run: RunId,
    /// The number of that run's last report that the owner has heard.
    pub heard: u64,
    /// The run's session; none until the owner has written it down.
    pub session: Option<Session>,
    /// A later session of the same agent, where this run is not the last one.
    pub rival: Option<Session>,
    /// Why the report does not count, and what to do.
    pub refused: Option<String>,
    /// What the owner still waits for of what this agent named, also in runs before. At most [`MAX_STREAMS_PER_REPORT`].
    pub waiting_for: Vec<StreamOffset>,
}

/// The answer to reports: what is known of them here, for some or all of them, in any order. A tier in between says what the
/// lane's owner said to an earlier report.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportAnswers {
    /// At most one for each (agent, category).
    pub answers: Vec<ReportAnswer>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let (agent, category) = ("web-1".parse().expect("valid"), "app".parse().expect("valid"));
        Report {
            session: Some(Session { epoch: Epoch(3), counter: 4 }),
            number: 7,
            watermark_ms: Some(1_795_378_521_000),
            required: vec![StreamOffset { stream: StreamId(1), offset: 30 }],
            lost: vec![StreamId(2)],
            counts: vec![BucketCount { start_s: 1_795_377_600, size_s: 3600, records: 2, bytes: 30 }],
            ..Report::new(LaneId(0), agent, category, "web-1.example", RunId(0xff))
        }
    }

    /// Agents and aggregators of different releases talk to each other: the JSON form is a contract.
    #[test]
    fn reports_have_a_stable_form() {
        let json = serde_json::to_string(&Reports::new(vec![report()])).expect("serializes");
        assert_eq!(
            json,
            concat!(
                r#"{"version":1,"reports":[{"lane":0,"agent":"web-1","category":"app","host":"web-1.example","#,
                r#""run":"00000000000000ff","session":{"epoch":3,"counter":4},"rival":null,"number":7,"#,
                r#""watermark_ms":1795378521000,"#,
                r#""required":[{"stream":"00000000000000000000000000000001","offset":30}],"#,
                r#""lost":["00000000000000000000000000000002"],"#,
                r#""counts":[{"start_s":1795377600,"size_s":3600,"records":2,"bytes":30}],"last":false,"held_by":""}]}"#
            )
        );
        assert_eq!(serde_json::from_str::<Reports>(&json).expect("reads"), Reports::new(vec![report()]));
    }

    #[test]
    fn a_report_beyond_the_bounds_is_refused() {
        let one = StreamOffset { stream: StreamId(1), offset: 1 };
        let bad = [
            Report { required: vec![one; MAX_STREAMS_PER_REPORT + 1], ..report() },
            Report { lost: vec![StreamId(1); MAX_STREAMS_PER_REPORT + 1], ..report() },
            Report { counts: vec![report().counts[0]; MAX_COUNTS_PER_REPORT + 1], ..report() },
            Report { host: "h".repeat(MAX_HOST_BYTES + 1), ..report() },
            Report { held_by: "h".repeat(MAX_WORDS_BYTES + 1), ..report() },
            Report { watermark_ms: None, ..report() },
        ];
        for bad in bad {
            assert!(Reports::new(vec![report(), bad.clone()]).check().is_err(), "{bad:?}");
        }
        assert_eq!(Reports::new(vec![report()]).check(), Ok(()));
        assert!(Reports { version: 2, reports: vec![report()] }.check().is_err());
    }

    #[test]
    fn the_heaviest_report_fits_a_request() {
        let one = StreamOffset { stream: StreamId(u128::MAX), offset: u64::MAX };
        let heavy = Report {
            required: vec![one; MAX_STREAMS_PER_REPORT],
            lost: vec![StreamId(u128::MAX); MAX_STREAMS_PER_REPORT],
            counts: vec![
                BucketCount { start_s: i64::MIN, size_s: u32::MAX, records: u64::MAX, bytes: u64::MAX };
                MAX_COUNTS_PER_REPORT
            ],
            ..report()
        };
        let bytes = serde_json::to_vec(&heavy).expect("serializes").len();
        assert!(bytes < crate::limits::MAX_REPORTS_BYTES as usize / 4, "{bytes}");
        assert!(bytes < 2 * heavy.weight(), "{bytes} bytes weigh {}", heavy.weight());
    }
}
