//! Hours that are over: which of them may be sealed, for whom the others wait, and what a seal says of those who didn't come.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;
use tributary_common::bucket::Bucket;
use tributary_common::ids::{AgentId, CategoryName};
use tributary_common::report::{BucketCount, StreamOffset};

use super::Lane;
use super::hours::key_of;
use crate::root::ledger::{HourKey, HourState, Lost, Missing, Seal};
use crate::root::open_hours::{NAMED_AGENTS, OpenHour, OpenHours, WaitedFor, named};
use crate::root::patience::Passed;
use crate::root::sink::HourVerdict;

/// The lane counts as serving for so many times `ledger_interval` after an entry was seen.
const SERVING_ENTRIES: u32 = 3;

/// Agents that a message names.
const AGENTS_IN_MESSAGE: usize = 5;

impl Lane {
    /// Hours that may have to be sealed, or have late data.
    pub(super) fn candidates(&mut self, now_ms: i64) -> BTreeSet<HourKey> {
        let mut candidates: BTreeSet<HourKey> = self
            .open
            .values()
            .map(|segment| segment.key.clone())
            .chain(self.given_up.values().map(|given_up| key_of(&given_up.record)))
            .chain(self.closed.values().map(|closed| key_of(&closed.record)))
            .collect();
        candidates.extend(self.due_by_time(now_ms));
        candidates.extend(self.wanted.iter().filter(|key| !self.hours.contains_key(*key)).cloned());
        candidates
    }

    /// Notes which of these hours are of a backlog: those that are not sealed one by one, whatever comes.
    pub(super) fn find_hours(&mut self, candidates: &BTreeSet<HourKey>, now_ms: i64) {
        for key in candidates.iter().filter(|key| !self.hours.contains_key(*key)) {
            let first = self.first_buckets.get(&key.category);
            if first.is_none_or(|first| key.bucket.end_ms() <= first.start_s() * 1000) {
                self.found_ms.entry(key.clone()).or_insert(now_ms);
            }
        }
        let hours = &self.hours;
        self.found_ms.retain(|key, _| !hours.contains_key(key));
    }

    /// The time that every agent must be past before an hour is complete, in milliseconds since 1970: its end; for one of a
    /// backlog the moment when the first of it was found. What agents said before that they said of the files they had then, and
    /// whoever brings or copies logs of last week to several of them doesn't do it in one moment.
    pub(super) fn complete_from(&self, key: &HourKey) -> i64 {
        self.found_ms.get(key).copied().unwrap_or(i64::MIN).max(key.bucket.end_ms())
    }

    /// Whether an hour can be sealed now: it is complete, or the agents that it waits for have been waited for long enough.
    pub(super) fn is_due(&self, key: &HourKey, now_ms: i64) -> bool {
        let end_ms = self.complete_from(key);
        let settings = self.settings.categories.get(&key.category);
        if !self.roster.has_members(&key.category) {
            let delay = settings.map_or(Duration::ZERO, |settings| settings.close_delay);
            return now_ms >= end_ms + super::millis(delay);
        }
        let patience = settings.map_or(Duration::MAX, |settings| settings.give_up_after);
        now_ms >= end_ms
            && (self.roster.complete_to(&key.category) >= Some(end_ms) || self.patience.waited(key) >= patience)
    }

    /// The hours that are over and wait for agents.
    fn waiting_hours(&mut self, now_ms: i64) -> BTreeSet<HourKey> {
        let mut complete_to: BTreeMap<CategoryName, Option<i64>> = BTreeMap::new();
        let mut waiting = BTreeSet::new();
        for key in self.candidates(now_ms) {
            let end_ms = self.complete_from(&key);
            let known = complete_to.entry(key.category.clone());
            let complete = *known.or_insert_with(|| self.roster.complete_to(&key.category)) >= Some(end_ms);
            let is_open = !self.hours.contains_key(&key) && !self.jobs.contains_key(&key);
            if end_ms <= now_ms && !complete && is_open {
                waiting.insert(key);
            }
        }
        waiting
    }

    /// Lets the clocks run of the hours that are over and wait for agents.
    pub(super) fn wait_for_hours(&mut self) {
        let time = std::mem::replace(&mut self.last_tick, Instant::now()).elapsed();
        if !self.knows_the_time() {
            return;
        }
        let now = self.settings.clock.now_ms();
        let waiting = self.waiting_hours(now);
        let serving_for = self.settings.ledger_interval * SERVING_ENTRIES;
        let is_serving = self.last_seen_at.is_some_and(|at| at.elapsed() < serving_for);
        for key in &waiting {
            let fails = self.given_up.values().any(|given_up| given_up.record.category == key.category);
            let passed = if !is_serving || fails {
                Passed::NotServed
            } else if self.roster.moves(&key.category, self.complete_from(key), key.bucket.end_ms(), now) {
                Passed::Moving
            } else {
                Passed::InVain
            };
            self.patience.pass(key, time, passed);
        }
        self.roster.looked();
        // One that is being sealed needs its clock until it is.
        let jobs = &self.jobs;
        self.patience.retain(|key| waiting.contains(key) || jobs.contains_key(key));
        self.metrics.waiting(self.roster.len(), waiting.len());
    }

    /// What the seal of an hour that is sealed now says of the agents.
    pub(super) fn verdict(&self, key: &HourKey) -> HourVerdict {
        let (start_ms, end_ms) = (key.bucket.start_s() * 1000, key.bucket.end_ms());
        let now = self.settings.clock.now_ms();
        let losses = self.roster.losses(&key.category, start_ms, end_ms).into_iter();
        let missing = self.roster.waits_for(&key.category, self.complete_from(key), now);
        HourVerdict {
            losses: losses
                .map(|loss| Lost { agent: loss.agent, stream: loss.stream, from: loss.from, to: loss.to })
                .collect(),
            missing: missing
                .map(|waiting| Missing {
                    agent: waiting.agent,
                    host: waiting.host,
                    watermark_ms: waiting.watermark_ms,
                    offsets: waiting.offsets,
                })
                .collect(),
            publish_partial: self.settings.publish_partial,
        }
    }

    /// Says what is unusual about a seal.
    pub(super) fn look_at_seal(&self, key: &HourKey, seal: &Seal, told: &BTreeMap<AgentId, BucketCount>) {
        if !seal.missing.is_empty() {
            self.metrics.gave_up();
            let agents: Vec<&str> = seal.missing.iter().take(AGENTS_IN_MESSAGE).map(|one| one.agent.as_str()).collect();
            tracing::error!(hour = %key, missing = seal.missing.len(), ?agents, "an hour is sealed without some agents, after give_up_after");
        }
        if !seal.losses.is_empty() {
            tracing::error!(hour = %key, losses = seal.losses.len(), "bytes of an hour are lost; its manifest names them");
        }
        for (agent, told) in told {
            let stored = seal.agents.get(agent).copied().unwrap_or_default().records;
            if stored < told.records {
                self.metrics.too_few();
                tracing::error!(
                    hour = %key, %agent, stored, told = told.records,
                    "an hour has fewer records of an agent than were stored by what the agent was told: look with `audit --deep`"
                );
            }
        }
    }

    /// The hours of each category that readers don't see yet, and whom they wait for, for an operator.
    pub(super) fn waiting_status(&mut self) -> BTreeMap<CategoryName, OpenHours> {
        let now = self.settings.clock.now_ms();
        let mut keys = self.candidates(now);
        // The present hour is open, too, whether or not there is data.
        keys.extend(self.first_buckets.keys().filter_map(|category| {
            let size = self.settings.categories.get(category)?.bucket;
            Some(HourKey { category: category.clone(), bucket: size.bucket_of_ms(now) })
        }));
        let is_visible = |state: &HourState| matches!(state, HourState::Published | HourState::Late(_));
        keys.retain(|key| !self.hours.get(key).is_some_and(is_visible));
        // Sealed here, an hour still waits for the other lanes, and to be published.
        keys.extend(self.hours.iter().filter(|(_, state)| !is_visible(state)).map(|(key, _)| key.clone()));
        let mut open: BTreeMap<CategoryName, BTreeSet<Bucket>> = BTreeMap::new();
        for key in keys {
            open.entry(key.category).or_default().insert(key.bucket);
        }
        let of_category = |(category, buckets): (CategoryName, BTreeSet<Bucket>)| {
            let (named, left_out) = named(&buckets, now);
            let hours =
                named.into_iter().map(|bucket| self.open_hour(&HourKey { category: category.clone(), bucket }, now));
            let hours = OpenHours { hours: hours.collect(), left_out };
            (category, hours)
        };
        open.into_iter().map(of_category).collect()
    }

    fn open_hour(&self, key: &HourKey, now_ms: i64) -> OpenHour {
        let end_ms = self.complete_from(key);
        let mut hour = OpenHour {
            bucket_start_s: key.bucket.start_s(),
            bucket_size_s: key.bucket.size().seconds(),
            over: end_ms <= now_ms,
            sealed: self.hours.contains_key(key),
            records: 0,
            bytes: 0,
            files: 0,
            waiting_for: 0,
            agents: Vec::new(),
            waited_in_vain_s: self.patience.waited(key).as_secs(),
        };
        if let Some(HourState::Announced(seal)) = self.hours.get(key) {
            hour.records = seal.files.iter().map(|file| file.records).sum();
            hour.bytes = seal.files.iter().map(|file| file.bytes).sum();
            hour.files = seal.files.len() as u64;
        }
        if hour.sealed {
            return hour;
        }
        let open = self.open.values().filter(|segment| segment.key == *key).map(|segment| segment.record());
        let closed = self.closed.values().map(|closed| &closed.record).filter(|record| key_of(record) == *key);
        for record in open.chain(closed.cloned()) {
            hour.records += record.covered.records;
            hour.bytes += record.covered.bytes;
        }
        hour.waiting_for = self.roster.waits_for_count(&key.category, end_ms) as u64;
        let uncommitted = |offsets: &[StreamOffset]| -> u64 {
            offsets.iter().map(|one| one.offset.saturating_sub(self.ingest.committed(one.stream))).sum()
        };
        let waits = self.roster.waits_for(&key.category, end_ms, now_ms).take(NAMED_AGENTS);
        hour.agents = waits
            .map(|one| WaitedFor {
                behind_ms: one.watermark_ms.map(|watermark| end_ms.saturating_sub(watermark).max(0)),
                silent_ms: now_ms.saturating_sub(one.heard_ms).max(0),
                uncommitted_streams: one.offsets.len() as u64,
                uncommitted_bytes: uncommitted(&one.offsets),
                agent: one.agent,
                host: one.host,
                reason: one.reason,
            })
            .collect();
        hour
    }
}
