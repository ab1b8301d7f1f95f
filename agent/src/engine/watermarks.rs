//! Reports: how far this agent has got with each category, sent every few seconds, also when there is nothing to ship.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use rustix::fs::fstat;
use tributary_common::ids::{CategoryName, StreamId};
use tributary_common::limits::MAX_WORDS_BYTES;
use tributary_common::report::{Report, ReportAnswers, Reports, RunId, StreamOffset};

use super::{Engine, Event, RunError, Tail, now_ms};
use crate::ship::ShipError;
use crate::tally::Tally;
use crate::watermark::{Facts, Reach, Reporter, Target, Vanished, Watermark};
use crate::worker::TailId;

/// How often it is looked whether all files of a scan are read.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// The time between two reports while the lane's owner has not named this run, or is to hear the last one.
const EAGER_INTERVAL: Duration = Duration::from_millis(300);

/// After what time without a file that has them the bytes of a stream are declared lost: so long copies of it are looked for.
const LOST_AFTER: Duration = Duration::from_secs(600);

/// How long the end of a run that ships once waits until its last report was heard.
const PARTING_PATIENCE: Duration = Duration::from_secs(30);

/// What is to be reported of one category.
#[derive(Debug)]
pub(super) struct OfCategory {
    watermark: Watermark,
    reporter: Reporter,
    vanished: Vanished,
    pub(super) tally: Tally,
    /// Streams whose files were given up: there is nothing to wait for.
    given_up: HashMap<StreamId, Instant>,
}

/// All that is to be reported.
#[derive(Debug)]
pub(super) struct Desk {
    categories: BTreeMap<CategoryName, OfCategory>,
    /// When the scan under way, or the last one, began.
    scan_began: (i64, Instant),
    next_look: Instant,
    next_report: Instant,
    under_way: bool,
    /// The end of the run: the reports' numbers that are to be heard, and how long that is waited for.
    parting: Option<(BTreeMap<CategoryName, u64>, Instant)>,
}

impl Desk {
    pub(super) fn new(categories: impl Iterator<Item = CategoryName>, run: u64, now: Instant) -> Self {
        let of = |_| OfCategory {
            watermark: Watermark::default(),
            reporter: Reporter::new(RunId(run)),
            vanished: Vanished::default(),
            tally: Tally::default(),
            given_up: HashMap::new(),
        };
        Self {
            categories: categories.map(|category| (category.clone(), of(category))).collect(),
            scan_began: (0, now),
            next_look: now,
            next_report: now,
            under_way: false,
            parting: None,
        }
    }

    /// What is to be reported of a category.
    pub(super) fn of(&mut self, category: &CategoryName) -> Option<&mut OfCategory> {
        self.categories.get_mut(category)
    }

    /// What is wrong with the reports, by what the lane's owner says.
    pub(super) fn troubles(&self) -> impl Iterator<Item = String> {
        self.categories.values().filter_map(|of| of.reporter.refused().map(str::to_owned))
    }
}

/// The size of a file in bytes, or what was last seen of it where it can't be told.
fn size_now(tail: &Tail) -> u64 {
    fstat(&tail.file).map_or(tail.pace.size(), |facts| u64::try_from(facts.st_size).unwrap_or(0))
}

impl Engine {
    pub(super) fn scan_begins(&mut self, now: Instant) {
        self.desk.scan_began = (now_ms(), now);
    }

    /// A file can't be judged before another scan.
    pub(super) fn watermark_waits(&mut self, source: usize, reason: &str) {
        let category = &self.config.sources[source].category;
        if let Some(of) = self.desk.categories.get_mut(category) {
            of.watermark.drop_rounds(reason);
        }
    }

    /// The bytes of a stream that are not shipped will never be.
    pub(super) fn stream_given_up(&mut self, source: usize, stream: StreamId) {
        let category = &self.config.sources[source].category;
        if let Some(of) = self.desk.categories.get_mut(category) {
            of.given_up.insert(stream, Instant::now());
        }
    }

    /// A scan is over, and what it found is open, or about to be, or rests. `unreadable`: directories that could not be read.
    pub(super) fn begin_rounds(&mut self, unreadable: &[std::path::PathBuf], now: Instant) {
        let (began_ms, began) = self.desk.scan_began;
        let mut targets: BTreeMap<CategoryName, BTreeMap<TailId, Target>> = BTreeMap::new();
        let category_of = |source: usize| self.config.sources[source].category.clone();
        for (id, tail) in &self.tails {
            let target = Target { file: tail.key, source: tail.source, size: size_now(tail) };
            targets.entry(category_of(tail.source)).or_default().insert(*id, target);
        }
        for (id, found) in self.opening.iter().chain(&self.unpacking) {
            let target = Target { file: found.key, source: found.source, size: found.size };
            targets.entry(category_of(found.source)).or_default().insert(*id, target);
        }
        let is_hidden = |path: &std::path::Path| unreadable.iter().any(|directory| path.starts_with(directory));
        // A directory in which nothing was ever found holds nobody up: its files are not shipped, and that is said.
        let hidden: HashSet<CategoryName> = self
            .memory
            .iter()
            .filter(|one| !one.finished && is_hidden(&one.path))
            .map(|one| one.category.clone())
            .collect();
        let skipped: HashSet<CategoryName> = self.unopened.waiting_sources().into_iter().map(category_of).collect();
        for (category, of) in &mut self.desk.categories {
            if hidden.contains(category) {
                of.watermark.drop_rounds("a directory can't be read in which files of it were");
            } else if skipped.contains(category) {
                of.watermark.drop_rounds("files wait until others are done: limits.max_open_files");
            } else {
                of.watermark.scanned(began_ms, began, targets.remove(category).unwrap_or_default());
            }
        }
        self.desk.next_look = now;
        // The scan that shows that a bucket is over is best made just then.
        if let Some(soonest) = self.next_boundary(now) {
            self.next_scan = self.next_scan.min(soonest);
        }
    }

    /// When the next bucket of any category is over, and `close_delay` too.
    fn next_boundary(&self, now: Instant) -> Option<Instant> {
        let now_ms = now_ms();
        let categories = self.categories.as_ref()?;
        let ends = self.desk.categories.keys().filter_map(|category| {
            let settings = categories.categories.get(category)?;
            let delay = i64::try_from(settings.close_delay_ms).unwrap_or(i64::MAX);
            let bucket = settings.bucket_s.bucket_of_ms(now_ms.saturating_sub(delay));
            Some(bucket.end_ms().saturating_add(delay).saturating_sub(now_ms))
        });
        ends.min().map(|left| now + Duration::from_millis(u64::try_from(left).unwrap_or(0) + 1))
    }

    /// How far a file is that a round waits for.
    fn reach(&self, id: TailId, target: &Target, began: Instant, now: Instant) -> Reach {
        let behind = |path: &std::path::Path, what: &str| {
            let mut reason = format!("{}: {what}", path.display());
            while reason.len() > MAX_WORDS_BYTES {
                reason.pop();
            }
            Reach::Behind(reason)
        };
        if let Some(found) = self.opening.get(&id).or_else(|| self.unpacking.get(&id)) {
            return behind(&found.path, "it is being opened");
        }
        // It may have been closed to make room, and opened again.
        let again = || self.tails.get(self.by_key.get(&target.file)?);
        let Some(tail) = self.tails.get(&id).or_else(again) else {
            // One that was closed is read; but one that is so far the same as another is not judged before it has rested.
            return if self.is_undecided(target.file, target.source, now) {
                Reach::Behind("a file that is so far the same as the beginning of another waits".to_owned())
            } else if self.resting.get(&target.file).is_some_and(|size| *size < target.size) {
                Reach::Behind("a file that had grown when it was closed is opened again".to_owned())
            } else {
                Reach::Read
            };
        };
        if tail.comparing.is_some() {
            return behind(&tail.path, "it is being compared with other files");
        }
        let rested = now >= began + self.config.sources[tail.source].partial_line_timeout;
        match &tail.named {
            None if tail.pace.size() == 0 || target.size == 0 || rested => Reach::Read,
            None => behind(&tail.path, "its first line is not complete"),
            Some(named) if !named.stream.is_following() => {
                behind(&tail.path, named.stream.stopped().unwrap_or_else(|| named.stream.state()))
            }
            Some(named) => {
                let (promised, read) = (named.stream.promised().offset, named.stream.read().offset);
                // What was cut off the file meanwhile can't be read any more.
                let present = size_now(tail);
                let size = target.size.min(present);
                if read > present {
                    behind(&tail.path, "it was cut off")
                } else if promised >= size || (rested && promised == read && tail.pace.is_stuck_at(read)) {
                    Reach::Read
                } else if read >= size {
                    behind(&tail.path, "it is read, and not committed; others may hold what it had before")
                } else {
                    behind(&tail.path, "it is being read")
                }
            }
        }
    }

    /// Looks at the rounds, and says when one ends a bucket.
    fn look_at_rounds(&mut self, now: Instant) {
        self.desk.next_look = now + LOOK_INTERVAL;
        let Some(categories) = self.categories.clone() else { return };
        let mut desk = std::mem::take(&mut self.desk.categories);
        for (category, of) in &mut desk {
            let Some(settings) = categories.categories.get(category) else { continue };
            let before = of.watermark.reached().map(|(watermark_ms, _)| watermark_ms);
            let sources = &self.config.sources;
            let is_of_it = |tail: &&Tail| sources[tail.source].category == *category;
            let moved = of.watermark.look(
                settings.close_delay_ms,
                |id, target, began| self.reach(id, target, began, now),
                || {
                    let named = self.tails.values().filter(is_of_it).filter_map(|tail| tail.named.as_ref());
                    named.map(|named| (named.stream_id, named.stream.promised().offset)).collect()
                },
            );
            let after = of.watermark.reached().map(|(watermark_ms, _)| watermark_ms);
            let bucket = |ms: Option<i64>| ms.map(|ms| settings.bucket_s.bucket_of_ms(ms));
            if moved && bucket(before) != bucket(after) {
                // A bucket is over: whoever waits for that hears it at once.
                self.desk.next_report = now;
            }
        }
        self.desk.categories = desk;
    }

    /// Looks at the files, and reports where that is due.
    pub(super) fn report_more(&mut self, now: Instant) -> Result<(), RunError> {
        if now >= self.desk.next_look {
            self.look_at_rounds(now);
        }
        let paused = self.pool_paused_until.is_some_and(|until| now < until);
        if self.desk.under_way || now < self.desk.next_report || paused {
            return Ok(());
        }
        let reports = self.reports(now);
        if reports.is_empty() {
            self.desk.next_report = now + EAGER_INTERVAL;
            return Ok(());
        }
        let Some((server, link)) = self.link(now)? else { return Ok(()) };
        self.desk.under_way = true;
        self.metrics.request();
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let outcome = link.reports(&Reports::new(reports)).await;
            // The engine may have ended meanwhile.
            let _ = sender.send(Event::Reported { server, outcome });
        });
        Ok(())
    }

    /// When something is to be done for reports.
    pub(super) fn reports_wake(&self, now: Instant) -> Instant {
        let mut wake = now + LOST_AFTER;
        if self.desk.categories.values().any(|of| of.watermark.is_waiting()) {
            wake = wake.min(self.desk.next_look);
        }
        if !self.desk.under_way {
            wake = wake.min(self.desk.next_report.max(self.pool_paused_until.unwrap_or(now)));
        }
        wake
    }

    fn reports(&mut self, now: Instant) -> Vec<Report> {
        let Some(categories) = self.categories.clone() else { return Vec::new() };
        let lane = self.config.agent_id.lane(categories.lanes);
        let mut desk = std::mem::take(&mut self.desk.categories);
        let is_parting = self.desk.parting.is_some();
        let mut reports = Vec::new();
        for (category, of) in &mut desk {
            if !categories.categories.contains_key(category) {
                continue;
            }
            let uncommitted = |(stream, offset): (&StreamId, &u64)| {
                let committed = self.committed(*stream).unwrap_or(0);
                (committed < *offset).then_some(StreamOffset { stream: *stream, offset: *offset })
            };
            let claim = if is_parting {
                // All of it is committed.
                Some((now_ms(), Vec::new()))
            } else {
                let reached = of.watermark.reached();
                reached.map(|(watermark_ms, streams)| (watermark_ms, streams.iter().filter_map(uncommitted).collect()))
            };
            let given_up = &of.given_up;
            let may_have = |one: &StreamOffset| self.may_have(one) && !given_up.contains_key(&one.stream);
            let mut lost = if is_parting {
                self.never_found(of.reporter.waiting_for())
            } else {
                of.vanished.look(now, LOST_AFTER, &of.reporter, may_have)
            };
            lost.extend(given_up.keys().copied());
            let facts = Facts { claim, lost, last: is_parting, held_by: of.watermark.held_by().to_owned() };
            let (agent, host) = (self.config.agent_id.clone(), self.config.host.clone());
            let mut empty = Report::new(lane, agent, category.clone(), host, of.reporter.run());
            empty.counts = of.tally.counts();
            reports.push(of.reporter.report(facts, empty));
        }
        self.desk.categories = desk;
        reports
    }

    /// How far a stream is known to be committed.
    fn committed(&self, stream: StreamId) -> Option<u64> {
        let open = self.by_stream.get(&stream).and_then(|id| self.tails.get(id)?.named.as_ref());
        open.map(|named| named.stream.committed().offset).or_else(|| Some(self.memory.get(stream)?.committed.offset))
    }

    /// Whether there is a file that has what is waited for, or one may still be found.
    fn may_have(&self, one: &StreamOffset) -> bool {
        self.orphans.contains_key(&one.stream) || self.has(one)
    }

    /// Whether there is a file for a stream, and it is not known to end before the offset.
    fn has(&self, one: &StreamOffset) -> bool {
        if let Some(tail) = self.tail_of(one.stream) {
            return tail.named.as_ref().is_none_or(|named| named.stream.may_reach(one.offset, size_now(tail)));
        }
        let Some(known) = self.memory.get(one.stream).filter(|known| !known.finished && self.is_there(known)) else {
            return false;
        };
        // A file that rests is read to its end.
        let rests_at = self.there.get(&known.inode).and_then(|key| self.resting.get(key));
        rests_at.is_none_or(|size| one.offset <= *size)
    }

    /// Of what is waited for, the streams of which a run that ends has not found as much: its scans are over, and where only such runs
    /// are started nobody looks for longer. Not those that are stored by what the agent was told: an owner that has just taken the
    /// lane may not count them yet.
    fn never_found(&self, waiting_for: &[StreamOffset]) -> Vec<StreamId> {
        let is_stored = |one: &StreamOffset| self.committed(one.stream).is_some_and(|stored| stored >= one.offset);
        let never = waiting_for.iter().filter(|one| !self.has(one) && !is_stored(one));
        never.map(|one| one.stream).collect()
    }

    pub(super) fn reported(&mut self, server: usize, outcome: Result<ReportAnswers, ShipError>, now: Instant) {
        self.desk.under_way = false;
        self.heard_of(server, outcome.as_ref().err(), now);
        if let Ok(answers) = outcome {
            for answer in answers.answers.into_iter().filter(|answer| answer.agent == self.config.agent_id) {
                let category = answer.category.clone();
                let Some(of) = self.desk.categories.get_mut(&category) else { continue };
                if let Some(error) = of.reporter.told(answer) {
                    tracing::error!(%category, error, "the roots don't count what this agent reports: hours wait for it");
                }
                of.given_up.retain(|_, since| now.duration_since(*since) < LOST_AFTER);
            }
        }
        let is_eager = self.desk.parting.is_some() || self.desk.categories.values().any(|of| !of.reporter.is_known());
        let interval = self.config.report_interval;
        self.desk.next_report = now + if is_eager { EAGER_INTERVAL.min(interval) } else { interval };
    }

    /// Everything is shipped, and the run is to end: whether its last report was heard.
    pub(super) fn has_parted(&mut self, now: Instant) -> bool {
        if self.desk.parting.is_none() {
            let next = |of: &OfCategory| of.reporter.number() + 1;
            let numbers = self.desk.categories.iter().map(|(category, of)| (category.clone(), next(of))).collect();
            self.desk.parting = Some((numbers, now + PARTING_PATIENCE));
            self.desk.next_report = now;
            return false;
        }
        let Some((numbers, until)) = &self.desk.parting else { return false };
        let known = self.categories.as_ref().map(|categories| &categories.categories);
        let is_heard = |(category, number): (&CategoryName, &u64)| {
            let is_known = known.is_some_and(|known| known.contains_key(category));
            !is_known || self.desk.categories.get(category).is_none_or(|of| of.reporter.is_heard(*number))
        };
        if numbers.iter().all(is_heard) {
            return true;
        }
        if now >= *until {
            tracing::warn!(
                "everything is shipped, but the roots did not hear that nothing more will come: hours wait for this agent until it is retired"
            );
            return true;
        }
        false
    }

    /// Goes on after all: something came while the run was about to end.
    pub(super) fn stays(&mut self) {
        self.desk.parting = None;
    }
}
