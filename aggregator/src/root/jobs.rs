//! The hours that are worked on: a few at a time, the categories in turn, and what failed again after a pause that grows. Pure:
//! the time is told.
//!
//! A job that waits for its next attempt holds no place, and what fails for one category (its directory may not be written, its
//! quota is used up) leaves the others their turns.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tributary_common::http::backoff::{Backoff, BackoffLimits};
use tributary_common::ids::CategoryName;

use super::ledger::HourKey;

/// Jobs at a time: enough to hide the sink's latency, few enough not to crowd out the writers.
pub const MAX_JOBS: usize = 4;

/// Where so many hours of a category wait for another attempt, and the last one that was begun after them failed, too, it may be that
/// all of the category do: with each that fails the next one waits a minute longer.
const MAX_FAILED: usize = 8;

/// Pauses between the attempts for one hour.
const PAUSES: BackoffLimits = BackoffLimits { initial: Duration::from_secs(1), max: Duration::from_secs(60) };

/// How far the work for an hour is, beyond what the ledger says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Joins are being made.
    Preparing,
    /// The state is to be in the ledger before it is carried out.
    Announcing {
        /// The entry that has it.
        entry: u64,
    },
    /// It is being carried out.
    Executing,
}

#[derive(Debug)]
struct Failed {
    backoff: Backoff,
    /// When it is tried again.
    at: Instant,
}

/// The jobs of a lane.
#[derive(Debug, Default)]
pub struct Jobs {
    running: BTreeMap<HourKey, Job>,
    failed: BTreeMap<HourKey, Failed>,
    /// When last an hour of each category failed for the first time.
    stumbled: BTreeMap<CategoryName, Instant>,
    /// When each category had its last turn, counted in turns.
    turns: BTreeMap<CategoryName, u64>,
    turn: u64,
}

impl Jobs {
    /// Whether the hour is worked on.
    #[must_use]
    pub fn contains_key(&self, key: &HourKey) -> bool {
        self.running.contains_key(key)
    }

    /// The hours that are worked on.
    pub fn keys(&self) -> impl Iterator<Item = &HourKey> {
        self.running.keys()
    }

    /// Whether no other job may begin.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.running.len() >= MAX_JOBS
    }

    /// Whether work for this hour may begin once there is a place: it is not worked on, and does not wait for its next attempt.
    #[must_use]
    pub fn may_begin(&self, key: &HourKey, now: Instant) -> bool {
        if self.running.contains_key(key) {
            return false;
        }
        match self.failed.get(key) {
            Some(failed) => failed.at <= now,
            None => {
                let failed = self.failed.keys().filter(|failed| failed.category == key.category).count();
                let stumbled = self.stumbled.get(&key.category);
                let more = u32::try_from(failed.saturating_sub(MAX_FAILED - 1)).unwrap_or(u32::MAX);
                stumbled.is_none_or(|at| now.duration_since(*at) >= PAUSES.max.saturating_mul(more))
            }
        }
    }

    /// Whose turn it is: of the category that is worked on least, and of those that of the one whose last turn was the longest ago.
    pub fn next<'c>(&self, waiting: impl Iterator<Item = &'c CategoryName>) -> Option<CategoryName> {
        let running = |category: &CategoryName| self.running.keys().filter(|key| key.category == *category).count();
        waiting.min_by_key(|category| (running(category), self.turns.get(*category))).cloned()
    }

    /// Work for the hour begins, or has got so far.
    pub fn set(&mut self, key: HourKey, job: Job) {
        debug_assert!(job != Job::Executing || self.running.get(&key) != Some(&job), "{key} is carried out twice");
        if !self.running.contains_key(&key) {
            self.turn += 1;
            self.turns.insert(key.category.clone(), self.turn);
        }
        self.running.insert(key, job);
    }

    /// The hours that may be carried out when the entry `seen` has been seen.
    #[must_use]
    pub fn announced(&self, seen: u64) -> Vec<HourKey> {
        let announced = |job: &Job| matches!(job, Job::Announcing { entry } if *entry <= seen);
        self.running.iter().filter(|(_, job)| announced(job)).map(|(key, _)| key.clone()).collect()
    }

    /// The work for the hour is done.
    pub fn end(&mut self, key: &HourKey) {
        self.running.remove(key);
        self.failed.remove(key);
    }

    /// The work for the hour failed: it gives its place to others, and is tried again after a pause, which is returned. `random`:
    /// any 64 bits that differ from hour to hour.
    pub fn fail(&mut self, key: &HourKey, now: Instant, random: u64) -> Duration {
        self.running.remove(key);
        if !self.failed.contains_key(key) {
            self.stumbled.insert(key.category.clone(), now);
        }
        let failed =
            self.failed.entry(key.clone()).or_insert_with(|| Failed { backoff: Backoff::new(PAUSES), at: now });
        let pause = failed.backoff.fail(random, None);
        failed.at = now + pause;
        pause
    }
}

#[cfg(test)]
mod tests {
    use tributary_common::bucket::BucketSize;

    use super::*;

    fn key(category: &str, hour: i64) -> HourKey {
        let bucket = BucketSize::HOUR.bucket_of_ms(hour * 3_600_000);
        HourKey { category: category.parse().expect("valid"), bucket }
    }

    #[test]
    fn an_hour_that_failed_holds_no_place_and_waits_longer_from_time_to_time() {
        let (mut jobs, mut now) = (Jobs::default(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..10 {
            assert!(jobs.may_begin(&key("a", 0), now));
            jobs.set(key("a", 0), Job::Preparing);
            let pause = jobs.fail(&key("a", 0), now, u64::MAX);
            assert!(!jobs.contains_key(&key("a", 0)) && !jobs.may_begin(&key("a", 0), now));
            now += pause;
            pauses.push(pause);
        }
        assert!(pauses[0] < pauses[1] && pauses[9] > PAUSES.max - Duration::from_millis(1), "{pauses:?}");
        jobs.set(key("a", 0), Job::Preparing);
        jobs.end(&key("a", 0));
        assert_eq!(jobs.fail(&key("a", 0), now, u64::MAX), pauses[0], "what was done once begins anew");
    }

    #[test]
    fn each_category_has_its_turn_however_many_hours_another_one_has() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        let names: Vec<CategoryName> = ["a", "b", "c"].map(|name| name.parse().expect("valid")).to_vec();
        let mut begun: BTreeMap<CategoryName, i64> = BTreeMap::new();
        for round in 0..30 {
            while !jobs.is_full() {
                let category = jobs.next(names.iter()).expect("all have hours");
                let hour = begun.entry(category.clone()).or_default();
                jobs.set(key(category.as_str(), *hour), Job::Executing);
                *hour += 1;
            }
            // Those of the first fail, those of the others are done.
            for done in jobs.keys().cloned().collect::<Vec<_>>() {
                if done.category == names[0] {
                    jobs.fail(&done, now, round);
                } else {
                    jobs.end(&done);
                }
            }
        }
        assert!(begun.values().all(|count| (38..=42).contains(count)), "{begun:?}");
        // By then it has so many that wait for another attempt that it gets none but those.
        assert!(!jobs.may_begin(&key("a", 1000), now) && jobs.may_begin(&key("b", 1000), now));
    }

    #[test]
    fn hours_that_fail_for_reasons_of_their_own_do_not_stop_their_category() {
        let (mut jobs, mut now) = (Jobs::default(), Instant::now());
        for hour in 0..2 * MAX_FAILED as i64 {
            jobs.set(key("a", hour), Job::Executing);
            jobs.fail(&key("a", hour), now, 0);
        }
        assert!(!jobs.may_begin(&key("a", 1000), now), "it may be the category that fails");
        now += PAUSES.max * (MAX_FAILED as u32 + 1);
        for hour in 1000..1100 {
            assert!(jobs.may_begin(&key("a", hour), now));
            jobs.set(key("a", hour), Job::Preparing);
            jobs.end(&key("a", hour));
            jobs.fail(&key("a", hour % 8), now, 0);
        }
        jobs.set(key("a", 2000), Job::Preparing);
        jobs.fail(&key("a", 2000), now, 0);
        assert!(!jobs.may_begin(&key("a", 2001), now), "and so it may now");
    }
}
