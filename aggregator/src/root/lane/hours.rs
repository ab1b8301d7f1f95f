//! Hours: sealed when they are due, published, and given what came late.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use tokio::time::Instant;
use tributary_common::ids::{CategoryName, LaneId};

use super::{Event, Lane, Unpublished, millis};
use crate::dfs::DfsError;
use crate::root::jobs::{Job, MAX_JOBS};
use crate::root::ledger::{HourKey, HourState, SegmentRecord};
use crate::root::segment::SegmentId;
use crate::root::sink::Executed;

/// Hours of a category that are looked at at a time, the oldest first.
pub(super) const MAX_DUE_HOURS: usize = 1024;

impl Lane {
    /// Starts what can be started for hours that are over, or that have late data.
    pub(super) fn advance_hours(&mut self) {
        if !self.knows_the_time() {
            return;
        }
        self.note_categories();
        self.change_sizes();
        self.execute_announced();
        let now = self.settings.clock.now_ms();
        let candidates = self.candidates(now);
        self.find_hours(&candidates, now);
        self.begin_jobs(candidates, now);
        self.publish();
    }

    /// Begins what there is a place for, the categories in turn.
    fn begin_jobs(&mut self, candidates: BTreeSet<HourKey>, now_ms: i64) {
        let now = Instant::now();
        let mut waiting: BTreeMap<CategoryName, VecDeque<HourKey>> = BTreeMap::new();
        // What is announced is over, too.
        let others = candidates.into_iter().filter(|key| !self.announced.contains(key));
        for key in self.announced.iter().cloned().chain(others) {
            if self.jobs.may_begin(&key, now) {
                waiting.entry(key.category.clone()).or_default().push_back(key);
            }
        }
        while !self.jobs.is_full()
            && let Some(category) = self.jobs.next(waiting.keys())
        {
            match waiting.get_mut(&category).and_then(VecDeque::pop_front) {
                Some(key) => self.begin(key, now_ms),
                None => drop(waiting.remove(&category)),
            }
        }
    }

    fn begin(&mut self, key: HourKey, now_ms: i64) {
        match self.hours.get(&key) {
            None if self.is_due(&key, now_ms) && !self.gives_way(&key) => self.start_seal(key),
            Some(HourState::Published) => self.start_late(key),
            Some(HourState::Announced(_) | HourState::Late(_)) => self.execute(key),
            None | Some(HourState::Sealed) => {}
        }
    }

    /// The hours from each category's first one on that are over and not sealed. Of those that are so old that they are forgotten
    /// when they are published, the ones that are not remembered were: retention may have removed them since.
    pub(super) fn due_by_time(&mut self, now: i64) -> Vec<HourKey> {
        let ttl = millis(self.settings.stream_ttl);
        // By a wrong clock, as it may be where an operator asks, nothing is old.
        let knows_the_time = self.knows_the_time();
        let mut due = Vec::new();
        for (category, up_to) in &mut self.sealed_up_to {
            if !self.settings.categories.contains_key(category) {
                continue;
            }
            let (mut bucket, mut all_sealed) = (*up_to, true);
            for _ in 0..MAX_DUE_HOURS {
                let key = HourKey { category: category.clone(), bucket };
                if now < bucket.end_ms() {
                    break;
                }
                let sealed = match self.hours.get(&key) {
                    Some(state) => !matches!(state, HourState::Announced(_)),
                    None => now.saturating_sub(bucket.end_ms()) > ttl && self.patience.waited(&key).is_zero(),
                };
                all_sealed &= sealed;
                if !sealed {
                    due.push(key);
                }
                bucket = bucket.next();
                if all_sealed && knows_the_time {
                    *up_to = bucket;
                }
            }
        }
        due
    }

    /// The closed segments of an hour, if all of its segments are closed, settled and in the ledger; else orders what is
    /// missing.
    pub(super) fn ready_segments(&mut self, key: &HourKey) -> Option<Vec<SegmentRecord>> {
        let open: Vec<SegmentId> =
            self.open.values().filter(|segment| segment.key == *key).map(|segment| segment.id).collect();
        let mut ready = open.is_empty();
        for id in open {
            self.close(id);
        }
        ready &= !self.given_up.values().any(|given_up| key_of(&given_up.record) == *key);
        let mut records = Vec::new();
        for closed in self.closed.values().filter(|closed| key_of(&closed.record) == *key) {
            if closed.in_entry.is_some_and(|entry| self.seen_entry >= Some(entry)) {
                records.push(closed.record.clone());
            } else {
                ready = false;
            }
        }
        ready.then_some(records)
    }

    pub(super) fn roll_size(&self, key: &HourKey) -> u64 {
        self.settings.categories.get(&key.category).map_or(u64::MAX, |category| category.roll_size)
    }

    pub(super) fn start_seal(&mut self, key: HourKey) {
        let Some(records) = self.ready_segments(&key) else { return };
        let verdict = self.verdict(&key);
        // What is stored later is late, and not in the seal.
        let told = self.roster.counts(&key.category, key.bucket);
        self.jobs.set(key.clone(), Job::Preparing);
        let (sink, events, roll_size) = (self.sink.for_an_hour(), self.events.clone(), self.roll_size(&key));
        tokio::spawn(async move {
            let result = sink.prepare_seal(&key, &records, roll_size, verdict).await;
            let _ = events.send(Event::SealReady { key, told, result });
        });
    }

    pub(super) fn start_late(&mut self, key: HourKey) {
        // Late data that is still being written waits for its segment's own close.
        if self.open.values().any(|segment| segment.key == key) {
            return;
        }
        let Some(records) = self.ready_segments(&key).filter(|records| !records.is_empty()) else { return };
        self.jobs.set(key.clone(), Job::Preparing);
        let (sink, events, roll_size) = (self.sink.for_an_hour(), self.events.clone(), self.roll_size(&key));
        tokio::spawn(async move {
            let result = sink.prepare_late(&records, roll_size).await;
            let _ = events.send(Event::LateReady { key, result });
        });
    }

    pub(super) fn announce(&mut self, key: HourKey, state: HourState) {
        self.set_hour(key.clone(), state);
        // The entry under way does not have it; the next one does.
        let entry = self.next_entry_from_now();
        self.jobs.set(key, Job::Announcing { entry });
    }

    pub(super) fn set_hour(&mut self, key: HourKey, state: HourState) {
        if matches!(state, HourState::Announced(_) | HourState::Late(_)) {
            self.announced.insert(key.clone());
        } else {
            self.announced.remove(&key);
        }
        self.hours.insert(key.clone(), state);
        self.changed_hours.insert(key);
        self.entry_wanted = true;
    }

    pub(super) fn execute_announced(&mut self) {
        let Some(seen) = self.seen_entry else { return };
        for key in self.jobs.announced(seen) {
            self.execute(key);
        }
    }

    /// Carries out what the ledger announces.
    fn execute(&mut self, key: HourKey) {
        self.jobs.set(key.clone(), Job::Executing);
        let (sink, events) = (self.sink.for_an_hour(), self.events.clone());
        match self.hours.get(&key).cloned() {
            Some(HourState::Announced(seal)) => {
                tokio::spawn(async move {
                    let result = sink.execute_seal(&key, &seal).await;
                    let _ = events.send(Event::SealDone { key, result });
                });
            }
            Some(HourState::Late(moves)) => {
                tokio::spawn(async move {
                    let result = sink.execute_late(&key, &moves).await;
                    let _ = events.send(Event::LateDone { key, result });
                });
            }
            Some(HourState::Sealed | HourState::Published) | None => self.jobs.end(&key),
        }
    }

    pub(super) fn publish(&mut self) {
        let now = Instant::now();
        let under_way = self.unpublished.values().filter(|hour| hour.under_way).count();
        let mut due: Vec<(Instant, &HourKey)> = (self.unpublished.iter())
            .filter(|(_, hour)| hour.look_at <= now && !hour.under_way)
            .map(|(key, hour)| (hour.look_at, key))
            .collect();
        // Whoever has waited longest: the hours of one category must not keep those of another waiting.
        due.sort_unstable();
        let due: Vec<HourKey> =
            due.into_iter().take(MAX_JOBS.saturating_sub(under_way)).map(|(_, key)| key.clone()).collect();
        for key in due {
            if let Some(hour) = self.unpublished.get_mut(&key) {
                hour.under_way = true;
            }
            let (sink, events) = (self.sink.for_an_hour(), self.events.clone());
            tokio::spawn(async move {
                // One lane publishes for all; the others wait for what they see.
                let result =
                    if sink.lane == LaneId(0) { sink.publish(&key).await } else { sink.is_published(&key).await };
                let _ = events.send(Event::Published { key, result });
            });
        }
    }

    /// A step for an hour failed: it is tried again after a pause.
    fn job_failed(&mut self, key: &HourKey, what: &str, error: &DfsError) {
        let mut random = DefaultHasher::new();
        (self.sink.lane, key, self.elapsed_ms()).hash(&mut random);
        let pause = self.jobs.fail(key, Instant::now(), random.finish());
        self.say_failed(key, what, error, pause);
    }

    fn say_failed(&self, key: &HourKey, what: &str, error: &DfsError, pause: Duration) {
        let pause_ms = millis(pause);
        if error.is_transient() {
            tracing::warn!(hour = %key, step = what, %error, pause_ms, "a step for an hour can't be taken now; it is tried again");
        } else {
            tracing::error!(hour = %key, step = what, %error, pause_ms, "a step for an hour failed; it is tried again");
        }
        self.look_for_fence();
    }

    pub(super) fn on_event(&mut self, event: Event) {
        match event {
            Event::Entry { number, snapshot, result } => self.on_entry(number, snapshot, result),
            Event::ReadBack { id, result } => self.on_read_back(id, result),
            Event::SealReady { key, told, result } => match result {
                Ok(Some(seal)) => {
                    self.look_at_seal(&key, &seal, &told);
                    self.announce(key, HourState::Announced(seal));
                }
                Ok(None) => {
                    // The hour is there already, made before this lane remembers: all that is here is late.
                    self.jobs.end(&key);
                    self.set_hour(key, HourState::Published);
                }
                Err(error) => self.job_failed(&key, "prepare the seal", &error),
            },
            Event::SealDone { key, result } => match result {
                Ok(Executed::Overtaken) => {
                    if let Some(HourState::Announced(seal)) = self.hours.get(&key).cloned() {
                        tracing::warn!(hour = %key, "a bucket of another size was published in its place; what is here is put beside that");
                        self.announce(key, HourState::Late(seal.into_late()));
                    }
                }
                Ok(Executed::Sealed) => {
                    if let Some(HourState::Announced(seal)) = self.hours.get(&key) {
                        let records: u64 = seal.files.iter().map(|file| file.records).sum();
                        tracing::info!(hour = %key, files = seal.files.len(), records, "sealed");
                        let gone = seal.files.iter().map(|file| file.source.clone()).chain(seal.inputs.iter().cloned());
                        for name in gone.collect::<Vec<_>>() {
                            self.closed.remove(&name);
                        }
                    }
                    self.jobs.end(&key);
                    self.unpublished.insert(key.clone(), Unpublished::new(Instant::now()));
                    self.set_hour(key, HourState::Sealed);
                }
                Err(error) => self.job_failed(&key, "seal", &error),
            },
            Event::LateReady { key, result } => match result {
                Ok(moves) => self.announce(key, HourState::Late(moves)),
                Err(error) => self.job_failed(&key, "prepare late files", &error),
            },
            Event::LateDone { key, result } => match result {
                Ok(()) => {
                    if let Some(HourState::Late(moves)) = self.hours.get(&key) {
                        for one in moves {
                            self.metrics.late(one.file.as_ref().map_or(0, |file| file.records));
                            one.file.iter().for_each(|file| {
                                self.closed.remove(&file.source);
                            });
                            one.inputs.iter().for_each(|input| {
                                self.closed.remove(input);
                            });
                        }
                        let files = moves.iter().filter(|one| one.file.is_some()).count();
                        if files > 0 {
                            tracing::warn!(hour = %key, files, "late data was put beside the published hour");
                        }
                    }
                    self.jobs.end(&key);
                    self.set_hour(key, HourState::Published);
                }
                Err(error) => self.job_failed(&key, "move late files", &error),
            },
            Event::Published { key, result } => {
                // Other lanes have not sealed it yet, or the sink is not available.
                let now = Instant::now();
                let pause = self.unpublished.get_mut(&key).map(|hour| {
                    hour.wait(now, self.settings.commit_interval);
                    hour.look_at - now
                });
                match result {
                    Ok(true) => {
                        tracing::info!(hour = %key, "published");
                        self.metrics.published();
                        self.unpublished.remove(&key);
                        self.set_hour(key, HourState::Published);
                    }
                    Ok(false) => {}
                    Err(error) => self.say_failed(&key, "publish", &error, pause.unwrap_or_default()),
                }
            }
            Event::Wanted(result) => {
                // Else hours were asked for since this look began, and it is looked again.
                if self.look_for_wanted_at.is_none() {
                    // Of a single lane only a change of the bucket size asks for hours.
                    let is_all = self.settings.lanes.get() == 1 && result.as_ref().is_ok_and(Vec::is_empty);
                    self.look_for_wanted_at = (!is_all).then(|| Instant::now() + self.settings.ledger_interval);
                    match result {
                        Ok(wanted) => self.wanted = wanted,
                        Err(error) => tracing::warn!(%error, "can't look which hours are to be sealed"),
                    }
                }
                self.forget_wanted();
            }
            Event::SizeChanged { category, first, old } => self.on_size_changed(category, first, old),
            Event::Fenced => {}
        }
    }

    /// Looks which hours the other lanes have sealed, and which of another bucket size are to be sealed.
    pub(super) fn look_for_wanted(&mut self) {
        if self.look_for_wanted_at.is_none_or(|at| at > Instant::now()) {
            return;
        }
        self.look_for_wanted_at = None;
        let (sink, events) = (self.sink.clone(), self.events.clone());
        tokio::spawn(async move {
            let result = sink.wanted_hours().await;
            let _ = events.send(Event::Wanted(result));
        });
    }

    /// The lane that publishes takes back the requests for what it has published.
    pub(super) fn forget_wanted(&self) {
        if self.sink.lane != LaneId(0) {
            return;
        }
        let published =
            |key: &&HourKey| matches!(self.hours.get(*key), Some(HourState::Published | HourState::Late(_)));
        let done: Vec<HourKey> = self.wanted.iter().filter(published).cloned().collect();
        if done.is_empty() {
            return;
        }
        let sink = self.sink.clone();
        tokio::spawn(async move {
            for key in done {
                if let Err(error) = sink.has_hour(&key).await {
                    tracing::debug!(hour = %key, %error, "the request for a published hour stays until the next look");
                }
            }
        });
    }

    pub(super) fn forget_old(&mut self) {
        if !self.knows_the_time() {
            return;
        }
        self.forget_agents();
        let now = self.settings.clock.now_ms();
        self.forgotten_streams.extend(self.ingest.expire(now));
        let ttl = millis(self.settings.stream_ttl);
        let old: Vec<HourKey> = self
            .hours
            .iter()
            .filter(|(key, state)| {
                matches!(state, HourState::Published)
                    && now.saturating_sub(key.bucket.end_ms()) > ttl
                    && !self.jobs.contains_key(key)
                    && self.sealed_up_to.get(&key.category).is_none_or(|bucket| bucket.start_s() > key.bucket.start_s())
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in old {
            self.hours.remove(&key);
            self.forgotten_hours.push(key);
        }
    }
}

pub(super) fn key_of(record: &SegmentRecord) -> HourKey {
    HourKey { category: record.category.clone(), bucket: record.bucket }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::lane::MAX_LOOK_INTERVAL;

    #[test]
    fn the_longer_an_hour_waits_for_other_lanes_the_rarer_it_is_looked_at() {
        let (start, interval) = (Instant::now(), Duration::from_secs(5));
        let mut hour = Unpublished::new(start);
        let mut looks = Vec::new();
        while hour.look_at < start + Duration::from_secs(24 * 3600) {
            looks.push(hour.look_at - start);
            hour.wait(hour.look_at, interval);
        }
        assert!(looks.windows(2).all(|pair| pair[1] - pair[0] >= interval), "{looks:?}");
        let late = looks.windows(2).map(|pair| (pair[1] - pair[0]).saturating_sub(pair[0] / 8 + interval));
        assert_eq!(late.max(), Some(Duration::ZERO), "published soon after it can be");
        assert!(looks.len() < 24 * 61 && looks.windows(2).all(|pair| pair[1] - pair[0] <= MAX_LOOK_INTERVAL));
    }
}
