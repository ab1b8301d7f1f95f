//! Where a category's hours begin, and what happens when the topology gives it another bucket size.
//!
//! The hour in which the change is noticed is the last one of the old size. All up to it that are not sealed yet are asked for on the
//! sink, as hours of which another lane has data are; from its end on, those of the new size are sealed one by one. Agents cut by the new size from
//! the change on, so until that end, and for what they still have of before, there are buckets of both sizes. Where two have the same
//! place, the one of the old size is published there, and what the other one has is late beside it.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tributary_common::bucket::Bucket;
use tributary_common::ids::CategoryName;

use super::hours::{MAX_DUE_HOURS, key_of};
use super::{Event, Lane};
use crate::root::ledger::HourKey;
use crate::root::sink::HourDirs;

/// The pause between attempts to ask for the hours of the old size.
const PAUSE: Duration = Duration::from_secs(60);

impl Lane {
    /// From the first sign of a category on, its hours are sealed one by one, also empty ones. Data of earlier hours (a backlog)
    /// has its hours sealed on demand.
    pub(super) fn note_categories(&mut self) {
        let now = self.settings.clock.now_ms();
        for (category, settings) in &self.settings.categories {
            if !self.first_buckets.contains_key(category) && self.roster.has_members(category) {
                let first = settings.bucket.bucket_of_ms(now);
                self.first_buckets.insert(category.clone(), first);
                self.sealed_up_to.insert(category.clone(), first);
                self.changed_first_buckets.insert(category.clone());
                self.entry_wanted = true;
            }
        }
    }

    /// Asks for what is left of the old size where the topology has a new one.
    pub(super) fn change_sizes(&mut self) {
        let now = self.settings.clock.now_ms();
        for (category, from) in &self.sealed_up_to {
            let Some(size) = self.settings.categories.get(category).map(|settings| settings.bucket) else { continue };
            if from.size() == size || self.changing.contains(category) {
                continue;
            }
            let mut old: BTreeSet<HourKey> = (self.open.values().map(|segment| segment.key.clone()))
                .chain(self.closed.values().map(|closed| key_of(&closed.record)))
                .chain(self.given_up.values().map(|given_up| key_of(&given_up.record)))
                .filter(|key| key.category == *category && key.bucket.size() != size)
                .collect();
            let mut bucket = *from;
            while bucket.start_s() * 1000 <= now && old.len() <= MAX_DUE_HOURS {
                old.insert(HourKey { category: category.clone(), bucket });
                bucket = bucket.next();
            }
            if old.len() > MAX_DUE_HOURS {
                // First what is over; a few are left then.
                continue;
            }
            old.retain(|key| !self.hours.contains_key(key));
            let first = size.first_from(bucket.start_s());
            self.changing.insert(category.clone());
            let (sink, events, category) = (self.sink.clone(), self.events.clone(), category.clone());
            tokio::spawn(async move {
                for key in &old {
                    while let Err(error) = sink.want_hour(key).await {
                        tracing::error!(hour = %key, %error, "an hour of the old bucket size can't be asked for; it is tried again");
                        tokio::select! {
                            biased;
                            () = events.closed() => return,
                            () = tokio::time::sleep(PAUSE) => {}
                        }
                    }
                }
                let _ = events.send(Event::SizeChanged { category, first, old });
            });
        }
    }

    /// What is left of the old size has been asked for, for whoever owns the lane: the hours of the new size count.
    pub(super) fn on_size_changed(&mut self, category: CategoryName, first: Bucket, old: BTreeSet<HourKey>) {
        tracing::info!(%category, %first, size_s = first.size().seconds(), left = old.len(), "the bucket size was changed");
        self.changing.remove(&category);
        self.wanted.retain(|key| !old.contains(key));
        self.wanted.extend(old);
        self.look_for_wanted_at = Some(Instant::now() + self.settings.ledger_interval);
        self.first_buckets.insert(category.clone(), first);
        self.sealed_up_to.insert(category.clone(), first);
        self.changed_first_buckets.insert(category);
        self.entry_wanted = true;
    }

    /// Whether a bucket of another size is to be published first, that has the same place.
    pub(super) fn gives_way(&self, key: &HourKey) -> bool {
        let is_old = |key: &HourKey| {
            let settings = self.settings.categories.get(&key.category);
            settings.is_none_or(|settings| settings.bucket != key.bucket.size())
        };
        if self.changing.contains(&key.category) && !is_old(key) {
            // It is not known yet what is left of the old size.
            return true;
        }
        let dirs = HourDirs::new(&key.category, key.bucket);
        let clashes = |other: &HourKey| {
            other.category == key.category
                && other.bucket.size() != key.bucket.size()
                && HourDirs::new(&other.category, other.bucket).clash(&dirs)
        };
        let mut begun = self.jobs.keys().chain(self.announced.iter()).chain(self.unpublished.keys());
        if begun.any(clashes) {
            return true;
        }
        // The old size comes first, and of two old ones the smaller one.
        let rank = |key: &HourKey| (!is_old(key), key.bucket.size());
        let open = (self.wanted.iter().cloned())
            .chain(self.open.values().map(|segment| segment.key.clone()))
            .chain(self.closed.values().map(|closed| key_of(&closed.record)));
        open.filter(|other| !self.hours.contains_key(other)).any(|other| clashes(&other) && rank(&other) < rank(key))
    }
}
