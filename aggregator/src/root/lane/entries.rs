//! Ledger entries: when one is due, what stands in it, what follows when it is seen.

use tokio::time::Instant;

use super::{Event, Lane, MAX_CLOCK_DIFFERENCE_MS, SNAPSHOT_EVERY, millis};
use crate::dfs::DfsError;
use crate::root::ledger::{Entry, HourRecord};
use crate::root::segment::Segment;

impl Lane {
    pub(super) fn ledger_due(&self) -> bool {
        !self.entry_under_way
            && (self.entry_wanted || self.last_entry_at.elapsed() >= self.settings.ledger_interval && self.has_news())
    }

    pub(super) fn has_news(&self) -> bool {
        // Another entry is what shows that the clocks agree again; an idle lane would write none.
        let clocks_differ = self.clock_ahead_ms.is_some() && !self.knows_the_time();
        !self.changed_hours.is_empty()
            || !self.open.is_empty()
            || !self.forgotten_streams.is_empty()
            || clocks_differ
            || self.roster.has_news()
            // An entry that is seen shows that the lane serves: only then may an hour be given up.
            || self.patience.is_waiting()
    }

    pub(super) fn write_entry(&mut self) {
        let snapshot = self.entries_since_snapshot >= SNAPSHOT_EVERY;
        let number = self.next_entry;
        let hours = self
            .hours
            .iter()
            .filter(|(key, _)| snapshot || self.changed_hours.contains(*key))
            .map(|(key, state)| HourRecord { key: key.clone(), state: state.clone() })
            .collect();
        let first_buckets = self
            .first_buckets
            .iter()
            .filter(|(category, _)| snapshot || self.changed_first_buckets.contains(*category))
            .map(|(category, bucket)| (category.clone(), *bucket))
            .collect();
        let segments = self
            .open
            .values()
            .map(Segment::record)
            .chain(self.given_up.values().map(|given_up| given_up.record.clone()))
            .chain(self.closed.values().map(|closed| closed.record.clone()))
            .collect();
        let entry = Entry {
            number,
            lane: self.sink.lane,
            epoch: self.epoch,
            written_ms: self.settings.clock.now_ms(),
            snapshot,
            streams: self.ingest.records(snapshot),
            forgotten: std::mem::take(&mut self.forgotten_streams),
            segments,
            hours,
            forgotten_hours: std::mem::take(&mut self.forgotten_hours),
            first_buckets,
            members: self.roster.records(snapshot, number),
            left: self.roster.take_left(),
            losses: self.roster.all_losses(),
        };
        for closed in self.closed.values_mut().filter(|closed| closed.record.closed) {
            closed.in_entry.get_or_insert(number);
        }
        self.changed_hours.clear();
        self.changed_first_buckets.clear();
        self.entry_wanted = false;
        self.entry_under_way = true;
        self.last_entry_at = Instant::now();
        let (sink, events, clock) = (self.sink.clone(), self.events.clone(), self.settings.clock.clone());
        let begun = Instant::now();
        tokio::spawn(async move {
            let written = sink.write_entry(&entry).await;
            // By the clock as it is now: it may have been set meanwhile.
            let now_ms = clock.now_ms();
            let result = written.map(|at_ms| ahead_ms(at_ms, now_ms.saturating_sub(millis(begun.elapsed())), now_ms));
            if result.is_ok()
                && entry.snapshot
                && let Err(error) = sink.drop_entries(entry.number).await
            {
                tracing::warn!(%error, "old ledger entries can't be deleted; they do no harm and are tried again");
            }
            let _ = events.send(Event::Entry { number, snapshot: entry.snapshot, result });
        });
    }

    pub(super) fn on_entry(&mut self, number: u64, snapshot: bool, result: Result<i64, DfsError>) {
        match result {
            Ok(ahead_ms) => {
                self.entry_under_way = false;
                self.next_entry = number + 1;
                self.seen_entry = Some(number);
                self.entries_since_snapshot = if snapshot { 0 } else { self.entries_since_snapshot + 1 };
                if self.clock_ahead_ms.is_none_or(|before| before.abs() <= MAX_CLOCK_DIFFERENCE_MS)
                    && ahead_ms.abs() > MAX_CLOCK_DIFFERENCE_MS
                {
                    tracing::error!(
                        ahead_ms,
                        "this machine's clock and the sink's differ by more than a minute: nothing is sealed, given up or forgotten until they agree"
                    );
                }
                self.clock_ahead_ms = Some(ahead_ms);
                self.last_seen_at = Some(Instant::now());
                self.last_seen_ms = self.settings.clock.now_ms();
                self.release(number);
            }
            Err(error) => {
                // No further entry may be written before this one is seen, so there will be none.
                tracing::error!(number, %error, "a ledger entry can't be written");
                self.look_for_fence();
            }
        }
    }

    /// Whether the clocks of the sink and of this machine agree. Where they don't, nothing is sealed, given up or forgotten.
    ///
    /// They are compared when an entry is seen. What has passed since then by this machine's time of day must have passed by its
    /// monotonic clock, too: one that is set to another day says nothing until it has been compared again.
    pub(super) fn knows_the_time(&self) -> bool {
        let agreed = self.clock_ahead_ms.is_some_and(|ahead| ahead.abs() <= MAX_CLOCK_DIFFERENCE_MS);
        agreed
            && self.last_seen_at.is_some_and(|at| {
                let passed_ms = self.settings.clock.now_ms().saturating_sub(self.last_seen_ms);
                passed_ms.saturating_sub(millis(at.elapsed())).abs() <= MAX_CLOCK_DIFFERENCE_MS
            })
    }

    pub(super) fn look_for_fence(&self) {
        let (sink, events) = (self.sink.clone(), self.events.clone());
        tokio::spawn(async move {
            if matches!(sink.is_fenced().await, Ok(true)) {
                let _ = events.send(Event::Fenced);
            }
        });
    }
}

/// How far the clock is ahead, in milliseconds, that showed `at_ms` at some moment between `from_ms` and `to_ms` of this machine's:
/// an entry may have taken long to write.
fn ahead_ms(at_ms: i64, from_ms: i64, to_ms: i64) -> i64 {
    if at_ms > to_ms { at_ms - to_ms } else { (at_ms - from_ms).min(0) }
}

#[cfg(test)]
mod tests {
    use super::ahead_ms;

    #[test]
    fn an_entry_that_took_long_says_nothing_against_the_clocks() {
        assert_eq!(ahead_ms(90_000, 0, 100_000), 0);
        assert_eq!(ahead_ms(200_000, 0, 100_000), 100_000);
        assert_eq!(ahead_ms(-70_000, 0, 100_000), -70_000);
    }
}
