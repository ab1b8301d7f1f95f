//! Which of several equal servers to send to, and when: a pure state machine.

use std::time::{Duration, Instant};

use super::backoff::{Backoff, BackoffLimits};

/// Why a request brought no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// No connection, no answer in time, or an answer that makes no sense: another server may do better.
    Broken,
    /// 429 or 503: the server lives and will do later, by its own word after this long.
    Busy(Option<Duration>),
}

/// So many redirects in a row are followed before a pause.
const MAX_HOPS: u32 = 4;

/// How a pool behaves.
#[derive(Debug, Clone, Copy)]
pub struct PoolOptions {
    /// Pauses after failures.
    pub backoff: BackoffLimits,
    /// After how long on another server the preferred one is tried again.
    pub return_after: Duration,
    /// After how long a connection is made anew, so that load finds servers that came later.
    pub max_connection_age: Duration,
    /// A server that is busy is left after so many refusals in a row: what it holds must be sent again to the next one.
    pub busy_before_leaving: u32,
}

impl PoolOptions {
    /// Usual options with these pauses and this age.
    #[must_use]
    pub fn new(backoff: BackoffLimits, max_connection_age: Duration) -> Self {
        Self { backoff, return_after: Duration::from_secs(60), max_connection_age, busy_before_leaving: 8 }
    }
}

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Send it to the server of this index.
    Send {
        /// Into the servers in the order of preference.
        server: usize,
        /// Over a new connection (that is: by a new client), because the server or the connection's age changed.
        reconnect: bool,
    },
    /// Wait until then, and ask again.
    WaitUntil(Instant),
}

/// Servers in the order of preference, one of which is the current one.
///
/// It stays with the current server as long as that works, since a change makes what was sent and isn't committed be
/// sent again. A broken server is left at once: each of the others is tried before the first pause. A busy one is
/// given time. From another server it returns to the preferred one after `return_after`.
#[derive(Debug)]
pub struct EndpointPool {
    servers: usize,
    options: PoolOptions,
    backoff: Backoff,
    current: usize,
    /// Set while the current server isn't the preferred one.
    left_preferred: Option<Instant>,
    paused_until: Option<Instant>,
    /// Failures in a row of the current server for being busy.
    busy: u32,
    /// Servers tried without success since one worked, the current one not included.
    tried: usize,
    /// Redirects followed since a server worked.
    hops: u32,
    /// When the connection was made that is in use; `None` before the first one and after a change.
    connected: Option<Instant>,
}

impl EndpointPool {
    /// A pool of so many servers, at least one.
    ///
    /// # Panics
    /// Without a server.
    #[must_use]
    pub fn new(servers: usize, options: PoolOptions) -> Self {
        assert!(servers > 0, "a pool has at least one server, which the configuration checks");
        Self {
            servers,
            options,
            backoff: Backoff::new(options.backoff),
            current: 0,
            left_preferred: None,
            paused_until: None,
            busy: 0,
            tried: 0,
            hops: 0,
            connected: None,
        }
    }

    /// Where to send now. `may_move`: whether a change of server or connection that isn't forced is all right; it isn't
    /// while much is uncommitted, since all of that would be sent again. Who is never at such a point moves all the same when
    /// twice the time has passed.
    ///
    /// The caller who is told to `Send` does so: a `reconnect` is said once.
    pub fn choose(&mut self, now: Instant, may_move: bool) -> Choice {
        if let Some(until) = self.paused_until {
            if now < until {
                return Choice::WaitUntil(until);
            }
            self.paused_until = None;
        }
        let due = |since: Instant, after: Duration| {
            let since = now.saturating_duration_since(since);
            since >= if may_move { after } else { 2 * after }
        };
        if self.left_preferred.is_some_and(|left| due(left, self.options.return_after)) {
            self.go_to(0, now);
        }
        let too_old = self.connected.is_some_and(|since| due(since, self.options.max_connection_age));
        let reconnect = too_old || self.connected.is_none();
        if reconnect {
            self.connected = Some(now);
        }
        Choice::Send { server: self.current, reconnect }
    }

    /// A request to `server` was answered, with whatever it deserved.
    pub fn works(&mut self, server: usize) {
        if server == self.current {
            self.backoff.reset();
            self.paused_until = None;
            self.busy = 0;
            self.tried = 0;
            self.hops = 0;
        }
    }

    /// A request to `server` failed. `random`: 64 random bits, for the length of the pause.
    pub fn fails(&mut self, now: Instant, server: usize, trouble: Trouble, random: u64) {
        if server != self.current {
            // A late word of a server that was left already.
            return;
        }
        let asked = match trouble {
            Trouble::Broken => {
                self.busy = 0;
                None
            }
            Trouble::Busy(asked) => {
                self.busy += 1;
                asked
            }
        };
        let leave =
            self.servers > 1 && (trouble == Trouble::Broken || self.busy >= self.options.busy_before_leaving.max(1));
        if !leave {
            self.paused_until = Some(now + self.backoff.fail(random, asked));
            return;
        }
        self.tried += 1;
        if self.tried >= self.servers {
            self.tried = 0;
            self.paused_until = Some(now + self.backoff.fail(random, None));
        }
        self.go_to((self.current + 1) % self.servers, now);
    }

    /// `from` said that `to` is the one to ask. It knows; so that one is asked as long as it works, whatever is preferred.
    /// `random` as for [`Self::fails`].
    pub fn redirected(&mut self, now: Instant, from: usize, to: usize, random: u64) {
        if from != self.current || to >= self.servers {
            return;
        }
        self.hops += 1;
        if self.hops > MAX_HOPS {
            // They point at each other: each believes that the other one has it, which passes.
            self.hops = 0;
            self.paused_until = Some(now + self.backoff.fail(random, None));
        }
        self.go_to(to, now);
        self.left_preferred = None;
    }

    /// `server` lives and asks for being left, because it is about to stop: no failure. When all do, there is a pause.
    pub fn declined(&mut self, now: Instant, server: usize, asked: Option<Duration>, random: u64) {
        if server != self.current {
            return;
        }
        self.tried += 1;
        if self.tried >= self.servers {
            self.tried = 0;
            self.paused_until = Some(now + self.backoff.fail(random, asked));
        }
        self.go_to((self.current + 1) % self.servers, now);
    }

    /// The server in use, as an index in the order of preference.
    #[must_use]
    pub fn current(&self) -> usize {
        self.current
    }

    /// How many pauses in a row it made.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.backoff.failures()
    }

    fn go_to(&mut self, server: usize, now: Instant) {
        if server != self.current {
            self.connected = None;
            self.busy = 0;
        }
        self.current = server;
        self.left_preferred = (server != 0).then(|| self.left_preferred.unwrap_or(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OPTIONS: PoolOptions = PoolOptions {
        backoff: BackoffLimits { initial: Duration::from_millis(200), max: Duration::from_secs(15) },
        return_after: Duration::from_secs(60),
        max_connection_age: Duration::from_secs(600),
        busy_before_leaving: 4,
    };

    fn send(server: usize, reconnect: bool) -> Choice {
        Choice::Send { server, reconnect }
    }

    #[test]
    fn the_first_request_connects_and_the_next_ones_do_not() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(2, OPTIONS);
        assert_eq!(pool.choose(now, true), send(0, true));
        assert_eq!(pool.choose(now, true), send(0, false));
    }

    #[test]
    fn all_servers_are_tried_before_the_first_pause() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(3, OPTIONS);
        for server in 0..3 {
            assert_eq!(pool.choose(now, true), send(server, true));
            pool.fails(now, server, Trouble::Broken, 0);
        }
        let Choice::WaitUntil(until) = pool.choose(now, true) else { panic!("none works: a pause") };
        assert!(until - now >= OPTIONS.backoff.initial / 2);
        assert_eq!(pool.choose(until, true), send(0, true), "and then from the preferred one again");
    }

    #[test]
    fn one_server_alone_is_tried_again_after_a_pause() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(1, OPTIONS);
        pool.choose(now, true);
        pool.fails(now, 0, Trouble::Broken, u64::MAX);
        assert!(matches!(pool.choose(now, true), Choice::WaitUntil(_)));
        assert!(matches!(pool.choose(now + OPTIONS.backoff.initial, true), Choice::Send { server: 0, .. }));
    }

    #[test]
    fn a_redirect_is_followed_remembered_and_not_left_for_the_preferred_one() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(3, OPTIONS);
        pool.choose(now, true);
        pool.redirected(now, 0, 2, 0);
        assert_eq!(pool.choose(now, true), send(2, true));
        pool.works(2);
        let later = now + 2 * OPTIONS.return_after;
        assert_eq!(pool.choose(later, true), send(2, false));
        pool.fails(later, 2, Trouble::Broken, 0);
        assert_eq!(pool.choose(later, true), send(0, true), "the others are tried when it breaks");
    }

    #[test]
    fn redirects_in_a_circle_end_in_a_pause() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(2, OPTIONS);
        let mut hops = 0;
        while let Choice::Send { server, .. } = pool.choose(now, true) {
            pool.redirected(now, server, 1 - server, 0);
            hops += 1;
            assert!(hops < 100, "it goes on for ever");
        }
        assert_eq!(hops, MAX_HOPS + 1);
    }

    #[test]
    fn a_server_that_asks_for_being_left_is_left_at_once_without_a_failure() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(2, OPTIONS);
        pool.choose(now, true);
        pool.declined(now, 0, Some(Duration::from_secs(1)), 0);
        assert_eq!(pool.choose(now, true), send(1, true));
        assert_eq!(pool.failures(), 0);
        pool.declined(now, 1, Some(Duration::from_secs(1)), 0);
        assert!(matches!(pool.choose(now, true), Choice::WaitUntil(_)), "both do: a pause");
    }

    #[test]
    fn who_never_rests_moves_after_twice_the_time() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(2, OPTIONS);
        pool.choose(now, false);
        assert_eq!(pool.choose(now + OPTIONS.max_connection_age, false), send(0, false));
        assert_eq!(pool.choose(now + 2 * OPTIONS.max_connection_age, false), send(0, true));
        let mut pool = EndpointPool::new(2, OPTIONS);
        pool.choose(now, false);
        pool.fails(now, 0, Trouble::Broken, 0);
        pool.choose(now, false);
        assert_eq!(pool.choose(now + OPTIONS.return_after, false), send(1, false));
        assert_eq!(pool.choose(now + 2 * OPTIONS.return_after, false), send(0, true));
    }

    #[test]
    fn it_returns_to_the_preferred_server_when_moving_is_all_right() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(2, OPTIONS);
        pool.fails(now, 0, Trouble::Broken, 0);
        assert_eq!(pool.choose(now, true), send(1, true));
        pool.works(1);
        assert_eq!(pool.choose(now + OPTIONS.return_after / 2, true), send(1, false));
        let later = now + OPTIONS.return_after;
        assert_eq!(pool.choose(later, false), send(1, false), "not now");
        assert_eq!(pool.choose(later, true), send(0, true));
        pool.fails(later, 0, Trouble::Broken, 0);
        assert_eq!(
            pool.choose(later, true),
            send(1, true),
            "still broken: back at once, and a wait before the next try"
        );
        pool.works(1);
        assert_eq!(pool.choose(later + OPTIONS.return_after / 2, true), send(1, false));
    }

    #[test]
    fn a_busy_server_is_asked_again_when_it_said_and_left_only_if_it_stays_busy() {
        let mut now = Instant::now();
        let mut pool = EndpointPool::new(2, OPTIONS);
        let asked = Duration::from_secs(3);
        for _ in 1..OPTIONS.busy_before_leaving {
            pool.fails(now, 0, Trouble::Busy(Some(asked)), 0);
            let Choice::WaitUntil(until) = pool.choose(now, true) else { panic!("it asked for a pause") };
            assert!(until - now >= asked);
            now = until;
            assert!(matches!(pool.choose(now, true), Choice::Send { server: 0, .. }));
        }
        pool.fails(now, 0, Trouble::Busy(Some(asked)), 0);
        assert_eq!(pool.choose(now, true), send(1, true));
    }

    #[test]
    fn a_connection_is_renewed_at_its_age_unless_that_would_cost_much() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(1, OPTIONS);
        pool.choose(now, true);
        let old = now + OPTIONS.max_connection_age;
        assert_eq!(pool.choose(old, false), send(0, false));
        assert_eq!(pool.choose(old, true), send(0, true));
        assert_eq!(pool.choose(old, true), send(0, false), "it is said once");
    }

    #[test]
    fn late_words_of_a_server_that_was_left_change_nothing() {
        let now = Instant::now();
        let mut pool = EndpointPool::new(3, OPTIONS);
        pool.fails(now, 0, Trouble::Broken, 0);
        pool.fails(now, 0, Trouble::Broken, 0);
        pool.fails(now, 0, Trouble::Busy(None), 0);
        assert_eq!(pool.choose(now, true), send(1, true));
    }

    proptest! {
        /// Whatever happens: nothing waits for longer than it must, and no server is asked more often than the pauses
        /// allow while none works.
        #[test]
        fn pauses_are_bounded_and_are_made(
            servers in 1_usize..5,
            steps in proptest::collection::vec((0_u8..4, any::<u64>(), 0_u64..400), 1..200),
        ) {
            let mut now = Instant::now();
            let mut pool = EndpointPool::new(servers, OPTIONS);
            let mut broken_in_a_row = 0;
            for (step, random, seconds) in steps {
                match pool.choose(now, random % 2 == 0) {
                    Choice::WaitUntil(until) => {
                        prop_assert!(until > now);
                        let longest = super::super::backoff::MAX_RETRY_AFTER + OPTIONS.backoff.max;
                        prop_assert!(until - now <= longest);
                        broken_in_a_row = 0;
                        now = until;
                    }
                    Choice::Send { server, .. } => {
                        prop_assert!(server < servers);
                        match step {
                            0 => { pool.works(server); broken_in_a_row = 0; }
                            1 => {
                                pool.fails(now, server, Trouble::Busy(Some(Duration::from_secs(seconds))), random);
                                broken_in_a_row = 0;
                            }
                            _ => {
                                pool.fails(now, server, Trouble::Broken, random);
                                broken_in_a_row += 1;
                                prop_assert!(broken_in_a_row <= servers, "a pause is due after a full round");
                            }
                        }
                    }
                }
            }
        }
    }
}
