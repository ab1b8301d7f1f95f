//! How long an hour has been waited for. Pure: the time that passes is told.
//!
//! The clock of an hour runs only while its lane serves and commits its category, and begins anew whenever something of what
//! the hour waits for is committed ([`super::roster`] says what that is): while the sink is down, or while what agents had stored is
//! still coming in, no hour is given up.

use std::collections::BTreeMap;
use std::time::Duration;

use super::ledger::HourKey;

/// The clocks of the hours that are over and not complete.
#[derive(Debug, Default)]
pub struct Patience {
    waited: BTreeMap<HourKey, Duration>,
}

/// What happened while time passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passed {
    /// The category was served, and nothing of what is waited for came.
    InVain,
    /// Something came.
    Moving,
    /// The lane could not commit.
    NotServed,
}

impl Patience {
    /// `time` has passed since the last call for this hour, or since it is waited for.
    pub fn pass(&mut self, key: &HourKey, time: Duration, passed: Passed) {
        let waited = self.waited.entry(key.clone()).or_default();
        match passed {
            Passed::InVain => *waited += time,
            Passed::Moving => *waited = Duration::ZERO,
            Passed::NotServed => {}
        }
    }

    /// For how long the hour has been waited for in vain.
    #[must_use]
    pub fn waited(&self, key: &HourKey) -> Duration {
        self.waited.get(key).copied().unwrap_or_default()
    }

    /// Whether any hour is waited for.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.waited.is_empty()
    }

    /// Keeps the clocks of these hours only.
    pub fn retain(&mut self, keep: impl Fn(&HourKey) -> bool) {
        self.waited.retain(|key, _| keep(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tributary_common::bucket::BucketSize;

    #[test]
    fn only_time_in_vain_counts_and_any_movement_begins_anew() {
        let key = HourKey { category: "app".parse().expect("valid"), bucket: BucketSize::HOUR.bucket_of_ms(0) };
        let mut patience = Patience::default();
        let minute = Duration::from_secs(60);
        for passed in [Passed::InVain, Passed::NotServed, Passed::InVain] {
            patience.pass(&key, minute, passed);
        }
        assert_eq!(patience.waited(&key), 2 * minute);
        patience.pass(&key, minute, Passed::Moving);
        assert_eq!(patience.waited(&key), Duration::ZERO);
        patience.pass(&key, minute, Passed::InVain);
        assert_eq!(patience.waited(&key), minute);
        patience.retain(|_| false);
        assert!(!patience.is_waiting());
    }
}
