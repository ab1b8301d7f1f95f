//! Hours: sealed when they are due, published, and given what came late.

use tokio::time::Instant;
use tributary_common::ids::{CategoryName, LaneId};

use super::{Event, Job, Lane, MAX_JOBS, Unpublished, millis};
use crate::dfs::DfsError;
use crate::root::ledger::{HourKey, HourState, SegmentRecord};
use crate::root::segment::SegmentId;

/// Hours of a category that are looked at at a time, the oldest first.
const MAX_DUE_HOURS: usize = 1024;

impl Lane {
    /// Starts what can be started for hours that are over, or that have late data.
    pub(super) fn advance_hours(&mut self) {
        if !self.knows_the_time() {
            return;
        }
        self.execute_announced();
        let now = self.settings.clock.now_ms();
        let candidates = self.candidates(now);
        self.find_hours(&candidates, now);
        for key in candidates {
            if self.jobs.len() >= MAX_JOBS {
                break;
            }
            if self.jobs.contains_key(&key) {
                continue;
            }
            match self.hours.get(&key) {
                None if self.is_due(&key, now) => self.start_seal(key),
                Some(HourState::Published) => self.start_late(key),
                _ => {}
            }
        }
        self.publish();
    }

    /// The hours from each category's first one on that are over and not sealed.
    pub(super) fn due_by_time(&mut self, now: i64) -> Vec<HourKey> {
        let mut due = Vec::new();
        let categories: Vec<CategoryName> = self.sealed_up_to.keys().cloned().collect();
        for category in categories {
            let Some(size) = self.settings.categories.get(&category).map(|settings| settings.bucket) else { continue };
            let Some(mut bucket) = self.sealed_up_to.get(&category).copied() else { continue };
            if bucket.size() != size {
                // The topology has another bucket size now; it holds from the present hour on.
                bucket = size.bucket_of_ms(now);
            }
            let mut all_sealed = true;
            for _ in 0..MAX_DUE_HOURS {
                let key = HourKey { category: category.clone(), bucket };
                if now < bucket.end_ms() {
                    break;
                }
                let sealed =
                    matches!(self.hours.get(&key), Some(HourState::Sealed | HourState::Published | HourState::Late(_)));
                all_sealed &= sealed;
                if !sealed {
                    due.push(key);
                }
                bucket = size.bucket_of_ms(bucket.end_ms());
                if all_sealed {
                    self.sealed_up_to.insert(category.clone(), bucket);
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
        self.jobs.insert(key.clone(), Job::Preparing);
        let (sink, events, roll_size) = (self.sink.clone(), self.events.clone(), self.roll_size(&key));
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
        self.jobs.insert(key.clone(), Job::Preparing);
        let (sink, events, roll_size) = (self.sink.clone(), self.events.clone(), self.roll_size(&key));
        tokio::spawn(async move {
            let result = sink.prepare_late(&records, roll_size).await;
            let _ = events.send(Event::LateReady { key, result });
        });
    }

    pub(super) fn announce(&mut self, key: HourKey, state: HourState) {
        self.set_hour(key.clone(), state);
        // The entry under way does not have it; the next one does.
        let entry = self.next_entry_from_now();
        self.jobs.insert(key, Job::Announcing { entry });
    }

    pub(super) fn set_hour(&mut self, key: HourKey, state: HourState) {
        self.hours.insert(key.clone(), state);
        self.changed_hours.insert(key);
        self.entry_wanted = true;
    }

    pub(super) fn execute_announced(&mut self) {
        let Some(seen) = self.seen_entry else { return };
        let ready: Vec<HourKey> = self
            .jobs
            .iter()
            .filter(|(_, job)| matches!(job, Job::Announcing { entry } if *entry <= seen))
            .map(|(key, _)| key.clone())
            .collect();
        for key in ready {
            self.jobs.insert(key.clone(), Job::Executing);
            let (sink, events) = (self.sink.clone(), self.events.clone());
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
                Some(HourState::Sealed | HourState::Published) | None => {
                    self.jobs.remove(&key);
                }
            }
        }
    }

    pub(super) fn publish(&mut self) {
        let now = Instant::now();
        let due = self.unpublished.iter().filter(|(key, hour)| hour.look_at <= now && !self.jobs.contains_key(*key));
        let keys: Vec<HourKey> = due.map(|(key, _)| key.clone()).take(MAX_JOBS).collect();
        for key in keys {
            self.jobs.insert(key.clone(), Job::Executing);
            let (sink, events) = (self.sink.clone(), self.events.clone());
            tokio::spawn(async move {
                // One lane publishes for all; the others wait for what they see.
                let result =
                    if sink.lane == LaneId(0) { sink.publish(&key).await } else { sink.is_published(&key).await };
                let _ = events.send(Event::Published { key, result });
            });
        }
    }

    pub(super) fn job_failed(&mut self, key: &HourKey, what: &str, error: &DfsError) {
        tracing::error!(hour = %key, step = what, %error, "a step for an hour failed; it is tried again");
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
                    self.jobs.remove(&key);
                    self.set_hour(key, HourState::Published);
                }
                Err(error) => {
                    self.job_failed(&key, "prepare the seal", &error);
                    self.jobs.remove(&key);
                }
            },
            Event::SealDone { key, result } => match result {
                Ok(()) => {
                    if let Some(HourState::Announced(seal)) = self.hours.get(&key) {
                        let records: u64 = seal.files.iter().map(|file| file.records).sum();
                        tracing::info!(hour = %key, files = seal.files.len(), records, "sealed");
                        let gone = seal.files.iter().map(|file| file.source.clone()).chain(seal.inputs.iter().cloned());
                        for name in gone.collect::<Vec<_>>() {
                            self.closed.remove(&name);
                        }
                    }
                    self.jobs.remove(&key);
                    self.unpublished.insert(key.clone(), Unpublished::new(Instant::now()));
                    self.set_hour(key, HourState::Sealed);
                }
                Err(error) => {
                    self.job_failed(&key, "seal", &error);
                    self.jobs.insert(key, Job::Announcing { entry: 0 });
                }
            },
            Event::LateReady { key, result } => match result {
                Ok(moves) => self.announce(key, HourState::Late(moves)),
                Err(error) => {
                    self.job_failed(&key, "prepare late files", &error);
                    self.jobs.remove(&key);
                }
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
                    self.jobs.remove(&key);
                    self.set_hour(key, HourState::Published);
                }
                Err(error) => {
                    self.job_failed(&key, "move late files", &error);
                    self.jobs.insert(key, Job::Announcing { entry: 0 });
                }
            },
            Event::Published { key, result } => {
                self.jobs.remove(&key);
                // Other lanes have not sealed it yet, or the sink is not available.
                if let Some(hour) = self.unpublished.get_mut(&key) {
                    hour.wait(Instant::now(), self.settings.commit_interval);
                }
                match result {
                    Ok(true) => {
                        tracing::info!(hour = %key, "published");
                        self.metrics.published();
                        self.unpublished.remove(&key);
                        self.set_hour(key, HourState::Published);
                    }
                    Ok(false) => {}
                    Err(error) => self.job_failed(&key, "publish", &error),
                }
            }
            Event::Wanted(result) => {
                self.look_for_wanted_at = Some(Instant::now() + self.settings.ledger_interval);
                match result {
                    Ok(wanted) => self.wanted = wanted,
                    Err(error) => tracing::warn!(%error, "can't look which hours the other lanes have sealed"),
                }
                self.forget_wanted();
            }
            Event::Fenced => {}
        }
    }

    /// Looks which hours the other lanes have sealed.
    pub(super) fn look_for_wanted(&mut self) {
        if self.settings.lanes.get() == 1 || self.look_for_wanted_at.is_none_or(|at| at > Instant::now()) {
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
        if self.knows_the_time() {
            self.forget_agents();
        }
        let now = self.settings.clock.now_ms();
        self.forgotten_streams.extend(self.ingest.expire(now));
        let ttl = millis(self.settings.stream_ttl);
        let old: Vec<HourKey> = self
            .hours
            .iter()
            .filter(|(key, state)| {
                matches!(state, HourState::Published)
                    && now.saturating_sub(key.bucket.end_ms()) > ttl
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
    use std::time::Duration;

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
