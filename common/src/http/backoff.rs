//! How long to wait before the next attempt.

use std::time::Duration;

use http::{HeaderMap, header::RETRY_AFTER};

use crate::config::Table;
use crate::config::kind::duration;

/// Bounds of the pauses between attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackoffLimits {
    /// The first pause, before jitter.
    pub initial: Duration,
    /// No pause that we choose ourselves is longer.
    pub max: Duration,
}

impl BackoffLimits {
    /// Reads the table `backoff` in `parent`: `initial` (default 250ms, from 10ms to 1m) and `max` (default 30s, from
    /// 100ms to 1h).
    pub fn read(parent: &mut Table<'_>) -> Self {
        let mut table = parent.table("backoff");
        let bounds = |low: u64, high: u64| duration(Duration::from_millis(low)..=Duration::from_secs(high));
        let initial = table.or("initial", bounds(10, 60), Duration::from_millis(250));
        let max = table.or("max", bounds(100, 3600), Duration::from_secs(30));
        table.require(
            *initial <= *max,
            "backoff.initial <= backoff.max",
            "pauses grow from the first to the second",
            &[initial.place(), max.place()],
        );
        Self { initial: *initial, max: *max }
    }
}

/// The longest pause that a server's `Retry-After` is believed to ask for.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// The state of retrying one thing: pauses double from attempt to attempt up to a maximum.
///
/// Each pause is drawn between half of its length and all of it, so that many clients that failed together don't come
/// back together, and none comes back at once.
#[derive(Debug, Clone)]
pub struct Backoff {
    limits: BackoffLimits,
    failures: u32,
}

impl Backoff {
    /// Nothing has failed yet.
    #[must_use]
    pub fn new(limits: BackoffLimits) -> Self {
        Self { limits, failures: 0 }
    }

    /// Something succeeded: the next pause is the first one again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// How many attempts in a row have failed.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// An attempt failed: how long to wait. `random` is any 64 random bits; `asked` is what the server asked for, which
    /// is never undercut (a little is added, so that not everybody who was told the same comes at the same moment).
    pub fn fail(&mut self, random: u64, asked: Option<Duration>) -> Duration {
        let doubled = self.limits.initial.saturating_mul(1 << self.failures.min(30)).min(self.limits.max);
        self.failures = self.failures.saturating_add(1);
        let fraction = (random >> 11) as f64 / (1_u64 << 53) as f64;
        let own = doubled.mul_f64(0.5 + fraction / 2.0);
        match asked {
            Some(asked) => own.max(asked.min(MAX_RETRY_AFTER) + self.limits.initial.mul_f64(fraction)),
            None => own,
        }
    }
}

/// What the `Retry-After` of a response asks for. Only its form in seconds is read: the other one needs clocks to agree.
#[must_use]
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: BackoffLimits = BackoffLimits { initial: Duration::from_millis(250), max: Duration::from_secs(30) };

    proptest! {
        #[test]
        fn a_pause_is_within_half_and_all_of_its_length(randoms in proptest::collection::vec(any::<u64>(), 1..100)) {
            let mut backoff = Backoff::new(LIMITS);
            for (n, random) in randoms.into_iter().enumerate() {
                let full = (LIMITS.initial * 2_u32.pow(u32::try_from(n.min(10)).expect("small"))).min(LIMITS.max);
                let pause = backoff.fail(random, None);
                prop_assert!(pause >= full / 2 && pause <= full, "{pause:?} after {n} failures");
            }
        }

        #[test]
        fn a_server_is_never_asked_before_it_wants(random: u64, seconds in 0_u64..1000) {
            let asked = Duration::from_secs(seconds);
            let pause = Backoff::new(LIMITS).fail(random, Some(asked));
            prop_assert!(pause >= asked.min(MAX_RETRY_AFTER));
            prop_assert!(pause <= MAX_RETRY_AFTER + LIMITS.initial, "a server can't stop us for ever");
        }
    }

    #[test]
    fn success_starts_over() {
        let mut backoff = Backoff::new(LIMITS);
        for _ in 0..20 {
            backoff.fail(u64::MAX, None);
        }
        assert!(backoff.fail(u64::MAX, None) > Duration::from_secs(29));
        backoff.reset();
        assert!(backoff.fail(u64::MAX, None) <= LIMITS.initial);
    }

    #[test]
    fn only_seconds_are_read() {
        let headers = |value: &'static str| HeaderMap::from_iter([(RETRY_AFTER, value.parse().expect("a value"))]);
        assert_eq!(retry_after(&headers("7")), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(&headers("Wed, 21 Oct 2026 07:28:00 GMT")), None);
        assert_eq!(retry_after(&headers("-1")), None);
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }
}
