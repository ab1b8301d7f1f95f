//! Up to which time everything that an agent will ever ship of a category has been read. Pure: what the scans and the files show
//! goes in.
//!
//! A **round** begins with a scan of the directories. When all files that it found, and all that are still open, have been read as
//! far as they were long after the scan, then everything of before the scan's beginning was read, but for lines that are
//! written later than the time that they carry: for these the category's `close_delay` is taken off. So the watermark is the
//! beginning of the scan less `close_delay`, and the offsets up to which the files were read then belong to it.
//!
//! A round whose files are not read yet is not replaced by the next scan's: an agent that never catches up with its files
//! entirely still moves on. Of the scans that follow meanwhile the last one is kept, and one of each quarter of an hour: an agent
//! that catches up with a day says so hour by hour, and not all at the end. Rounds in which something was seen that only another
//! scan can settle are dropped.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use tributary_common::ids::StreamId;
use tributary_common::limits::MAX_STREAMS_PER_REPORT;
use tributary_common::report::{Report, ReportAnswer, RunId, Session, StreamOffset};

use crate::identity::FileKey;
use crate::worker::TailId;

/// Rounds that wait are so far apart, but for the last one.
const APART_MS: i64 = 900_000;

/// Rounds that are kept, and the files of all of them together.
const MAX_ROUNDS: usize = 200;
const MAX_TARGETS: usize = 100_000;

/// As many reports as an owner that is there may not have heard yet.
const MAX_UNHEARD: u64 = 16;

/// A file that a round waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Which file.
    pub file: FileKey,
    /// The number of its source.
    pub source: usize,
    /// So long it was after the scan.
    pub size: u64,
}

/// How far a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// Read as far as the target, or there is nothing to read.
    Read,
    /// Not yet, for this reason.
    Behind(String),
}

#[derive(Debug)]
struct Round {
    began_ms: i64,
    began: Instant,
    targets: BTreeMap<TailId, Target>,
}

/// The watermark of one category.
#[derive(Debug, Default)]
pub struct Watermark {
    /// The one under way, and those that follow.
    rounds: VecDeque<Round>,
    reached: Option<(i64, BTreeMap<StreamId, u64>)>,
    held_by: String,
}

impl Watermark {
    /// A scan that began at `began_ms` (milliseconds since 1970) and `began` is over, and these are the files.
    pub fn scanned(&mut self, began_ms: i64, began: Instant, targets: BTreeMap<TailId, Target>) {
        let waiting = self.rounds.len();
        if let Some(before) = waiting.checked_sub(2).map(|index| self.rounds[index].began_ms) {
            let files: usize = self.rounds.iter().map(|round| round.targets.len()).sum();
            let is_full = waiting == MAX_ROUNDS || files + targets.len() > MAX_TARGETS;
            if is_full || self.rounds[waiting - 1].began_ms.saturating_sub(before) < APART_MS {
                self.rounds.pop_back();
            }
        }
        self.rounds.push_back(Round { began_ms, began, targets });
    }

    /// Something was seen that only the next scan can settle.
    pub fn drop_rounds(&mut self, reason: impl Into<String>) {
        self.rounds.clear();
        self.held_by = reason.into();
    }

    /// Whether a round is under way.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.rounds.is_empty()
    }

    /// Looks how far the files are. `reach` is asked about each that is not known to have been read, with the beginning of its
    /// round; `read` gives the streams and how far each is read. Returns whether the watermark has moved.
    pub fn look(
        &mut self,
        close_delay_ms: u64,
        mut reach: impl FnMut(TailId, &Target, Instant) -> Reach,
        read: impl Fn() -> BTreeMap<StreamId, u64>,
    ) -> bool {
        let mut moved = false;
        while let Some(round) = self.rounds.front_mut() {
            let mut held_by = None;
            let began = round.began;
            round.targets.retain(|tail, target| match reach(*tail, target, began) {
                Reach::Read => false,
                Reach::Behind(reason) => {
                    held_by.get_or_insert(reason);
                    true
                }
            });
            if let Some(reason) = held_by {
                self.held_by = reason;
                return moved;
            }
            let delay = i64::try_from(close_delay_ms).unwrap_or(i64::MAX);
            let watermark_ms = round.began_ms.saturating_sub(delay);
            // The clock may have been set back.
            let watermark_ms = self.reached.as_ref().map_or(watermark_ms, |(before, _)| watermark_ms.max(*before));
            self.reached = Some((watermark_ms, read()));
            self.held_by.clear();
            self.rounds.pop_front();
            moved = true;
        }
        moved
    }

    /// The watermark, milliseconds since 1970, and how far its streams have to be stored; none while not all was read once.
    #[must_use]
    pub fn reached(&self) -> Option<(i64, &BTreeMap<StreamId, u64>)> {
        self.reached.as_ref().map(|(watermark_ms, streams)| (*watermark_ms, streams))
    }

    /// Why it does not move.
    #[must_use]
    pub fn held_by(&self) -> &str {
        &self.held_by
    }
}

/// Streams of which offsets are required that this agent can't ship: there is no file for them, or a shorter one; and since when that is
/// known.
#[derive(Debug, Default)]
pub struct Vanished {
    since: BTreeMap<StreamId, Instant>,
}

impl Vanished {
    /// Returns the streams that are waited for upstream and were not to be found for `patience`, in which the lane's owner has heard of
    /// this run: while it hears nothing it gets nothing, either. `has`: whether there is a file that has what is waited for, or may be.
    pub fn look(
        &mut self,
        now: Instant,
        patience: Duration,
        reporter: &Reporter,
        has: impl Fn(&StreamOffset) -> bool,
    ) -> Vec<StreamId> {
        if !reporter.is_listened_to() {
            self.since.clear();
        }
        let missing: Vec<StreamId> =
            reporter.waiting_for().iter().filter(|one| !has(one)).map(|one| one.stream).collect();
        self.since.retain(|stream, _| missing.contains(stream));
        let mut lost = Vec::new();
        for stream in missing {
            let since = *self.since.entry(stream).or_insert(now);
            if now.duration_since(since) >= patience {
                lost.push(stream);
            }
        }
        lost
    }
}

/// What one run of an agent says of one category, and what it was told.
#[derive(Debug)]
pub struct Reporter {
    run: RunId,
    session: Option<Session>,
    rival: Option<Session>,
    number: u64,
    heard: u64,
    refused: Option<String>,
    waiting_for: Vec<StreamOffset>,
}

/// What a report is made of, beside what its reporter knows.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The watermark, and the streams that belong to it with those offsets that are not committed.
    pub claim: Option<(i64, Vec<StreamOffset>)>,
    /// Streams that are lost.
    pub lost: Vec<StreamId>,
    /// Whether it is the last report.
    pub last: bool,
    /// Why the watermark does not move.
    pub held_by: String,
}

impl Reporter {
    /// For a run that drew this number.
    #[must_use]
    pub fn new(run: RunId) -> Self {
        Self { run, session: None, rival: None, number: 0, heard: 0, refused: None, waiting_for: Vec::new() }
    }

    /// Fills in a report of the run.
    pub fn report(&mut self, facts: Facts, empty: Report) -> Report {
        self.number += 1;
        let mut facts = facts;
        // So many are no way to go on: what is not named must not be left out of the claim.
        let too_many = facts.claim.as_ref().is_some_and(|(_, required)| required.len() > MAX_STREAMS_PER_REPORT);
        if too_many {
            facts.claim = None;
            facts.held_by = format!("more than {MAX_STREAMS_PER_REPORT} files are not stored yet");
        }
        facts.lost.truncate(MAX_STREAMS_PER_REPORT);
        let (watermark_ms, required) =
            facts.claim.map_or((None, Vec::new()), |(watermark_ms, required)| (Some(watermark_ms), required));
        Report {
            session: self.session,
            rival: self.rival,
            number: self.number,
            watermark_ms,
            required,
            lost: facts.lost,
            last: facts.last,
            held_by: facts.held_by,
            ..empty
        }
    }

    /// What was answered. Returns what is new and wrong, for the log.
    pub fn told(&mut self, answer: ReportAnswer) -> Option<String> {
        if answer.run != self.run {
            return None;
        }
        self.session = answer.session.or(self.session);
        self.rival = self.rival.max(answer.rival);
        self.heard = self.heard.max(answer.heard);
        self.waiting_for = answer.waiting_for;
        let is_new = answer.refused.is_some() && answer.refused != self.refused;
        self.refused = answer.refused;
        self.refused.clone().filter(|_| is_new)
    }

    /// The run.
    #[must_use]
    pub fn run(&self) -> RunId {
        self.run
    }

    /// Whether the lane's owner has given the run its name.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.session.is_some()
    }

    /// Whether the report with the last number was heard by the lane's owner.
    #[must_use]
    pub fn is_heard(&self, number: u64) -> bool {
        self.heard >= number
    }

    /// Whether the lane's owner has heard one of the last reports. Of each tier in between one may be on its way.
    #[must_use]
    pub fn is_listened_to(&self) -> bool {
        self.number <= self.heard + MAX_UNHEARD
    }

    /// The number of the last report.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Why the reports don't count.
    #[must_use]
    pub fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// What the lane's owner waits for.
    #[must_use]
    pub fn waiting_for(&self) -> &[StreamOffset] {
        &self.waiting_for
    }
}

#[cfg(test)]
mod tests;
