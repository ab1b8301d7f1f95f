//! The way to the tier above, for one lane or for all: which of its nodes, and when.

use std::time::{Duration, Instant};

use tributary_common::http::backoff::{Backoff, BackoffLimits};

/// After how long on another node the preferred one is tried again.
const RETURN_AFTER: Duration = Duration::from_secs(60);

/// A node that is up but full is left after this many refusals in a row: what it holds would have to be sent again to
/// the next one.
const BUSY_BEFORE_LEAVING: u32 = 4;

/// Why a request brought no answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// No connection, no answer in time, or an answer that makes no sense: another node may do better.
    Broken,
    /// 429 or 503: it will do later, by its own word after this long.
    Busy(Option<Duration>),
}

/// One way up.
#[derive(Debug)]
pub(super) struct Route {
    nodes: usize,
    current: usize,
    left_preferred: Option<Instant>,
    backoff: Backoff,
    paused_until: Option<Instant>,
}

impl Route {
    pub(super) fn new(nodes: usize, backoff: BackoffLimits) -> Self {
        assert!(nodes > 0, "a tier has at least one node, which the topology checks");
        Self { nodes, current: 0, left_preferred: None, backoff: Backoff::new(backoff), paused_until: None }
    }

    /// The node to send to now, as an index into the nodes in order of preference.
    pub(super) fn node(&mut self, now: Instant) -> Option<usize> {
        if self.paused_until.is_some_and(|until| now < until) {
            return None;
        }
        self.paused_until = None;
        if self.left_preferred.is_some_and(|left| now.duration_since(left) >= RETURN_AFTER) {
            self.current = 0;
            self.left_preferred = None;
        }
        Some(self.current)
    }

    pub(super) fn paused_until(&self) -> Option<Instant> {
        self.paused_until
    }

    pub(super) fn failures(&self) -> u32 {
        self.backoff.failures()
    }

    pub(super) fn current(&self) -> usize {
        self.current
    }

    pub(super) fn works(&mut self, node: usize) {
        if node == self.current {
            self.backoff.reset();
            self.paused_until = None;
        }
    }

    /// A request to `node` failed at `now`.
    pub(super) fn fails(&mut self, now: Instant, node: usize, trouble: &Trouble, random: u64) {
        if node != self.current {
            // A late word of a node that was left already.
            return;
        }
        let asked = match trouble {
            Trouble::Broken => None,
            Trouble::Busy(after) => *after,
        };
        let pause = self.backoff.fail(random, asked);
        let leave = self.nodes > 1
            && match trouble {
                Trouble::Broken => true,
                Trouble::Busy(_) => self.backoff.failures() >= BUSY_BEFORE_LEAVING,
            };
        // While there are nodes that have not been tried since one last worked, the next one is tried at once.
        let untried = leave && (self.backoff.failures() as usize) < self.nodes && *trouble == Trouble::Broken;
        if leave {
            self.current = (self.current + 1) % self.nodes;
            self.left_preferred = (self.current != 0).then_some(now);
        }
        self.paused_until = (!untried).then(|| now + pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: BackoffLimits = BackoffLimits { initial: Duration::from_millis(200), max: Duration::from_secs(15) };

    #[test]
    fn the_next_node_is_tried_at_once_and_all_of_them_before_a_pause() {
        let now = Instant::now();
        let mut route = Route::new(3, BACKOFF);
        assert_eq!(route.node(now), Some(0));
        route.fails(now, 0, &Trouble::Broken, 0);
        assert_eq!(route.node(now), Some(1));
        route.fails(now, 1, &Trouble::Broken, 0);
        assert_eq!(route.node(now), Some(2));
        route.fails(now, 2, &Trouble::Broken, 0);
        assert_eq!(route.node(now), None, "none works: a pause");
        assert_eq!(route.node(now + BACKOFF.max), Some(0));
    }

    #[test]
    fn it_returns_to_the_preferred_node() {
        let now = Instant::now();
        let mut route = Route::new(2, BACKOFF);
        route.fails(now, 0, &Trouble::Broken, 0);
        route.works(1);
        assert_eq!(route.node(now + RETURN_AFTER / 2), Some(1));
        assert_eq!(route.node(now + RETURN_AFTER), Some(0));
    }

    #[test]
    fn a_full_node_is_asked_again_when_it_said_and_left_only_if_it_stays_full() {
        let mut now = Instant::now();
        let mut route = Route::new(2, BACKOFF);
        let asked = Duration::from_secs(3);
        for _ in 1..BUSY_BEFORE_LEAVING {
            route.fails(now, 0, &Trouble::Busy(Some(asked)), u64::MAX);
            assert_eq!(route.node(now + asked - Duration::from_millis(1)), None);
            now += BACKOFF.max;
            assert_eq!(route.node(now), Some(0));
        }
        route.fails(now, 0, &Trouble::Busy(Some(asked)), 0);
        assert_eq!(route.node(now + BACKOFF.max), Some(1));
    }

    #[test]
    fn late_failures_of_a_node_that_was_left_do_not_hurt_the_next() {
        let now = Instant::now();
        let mut route = Route::new(2, BACKOFF);
        route.fails(now, 0, &Trouble::Broken, 0);
        route.fails(now, 0, &Trouble::Broken, 0);
        assert_eq!(route.node(now), Some(1));
    }
}
