//! Reports on their way up. Pure: what comes and the time go in, what is to be sent comes out.
//!
//! Of each (agent, category) the latest report is kept in memory until it has been passed on; a later one takes its place, and
//! one that is lost is followed by another within seconds. What the lane's owner said to it is kept for the agent's next one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tributary_common::ids::{AgentId, CategoryName};
use tributary_common::limits::{MAX_REPORTS_BYTES, MAX_REPORTS_PER_REQUEST};
use tributary_common::report::{Report, ReportAnswer};

/// Most bytes, about, that reports and what was said to them take in memory.
const MAX_HELD_BYTES: usize = 128 << 20;

/// Reports are gathered for so long before they are passed on.
const GATHER: Duration = Duration::from_millis(100);

/// What an agent said is forgotten when it was silent for so long: it will say it anew.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// Reports of one request weigh at most so much, by [`Report::weight`], which may be half of what they take.
const REQUEST_WEIGHT: usize = MAX_REPORTS_BYTES as usize / 4;

type Key = (AgentId, CategoryName);

struct Held {
    report: Report,
    answer: Option<ReportAnswer>,
    heard_at: Instant,
}

impl Held {
    fn weight(&self) -> usize {
        self.report.weight() + self.answer.as_ref().map_or(0, |answer| 256 + 40 * answer.waiting_for.len())
    }
}

#[derive(Default)]
struct Route {
    /// What has not been passed on yet.
    fresh: BTreeSet<Key>,
    due: Option<Instant>,
    is_busy: bool,
}

/// The reports of a node that is no root.
pub(super) struct Desk {
    held: BTreeMap<Key, Held>,
    bytes: usize,
    routes: Vec<Route>,
}

/// There is no room for more agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Full;

impl Desk {
    pub(super) fn new(routes: usize) -> Self {
        Self { held: BTreeMap::new(), bytes: 0, routes: (0..routes).map(|_| Route::default()).collect() }
    }

    /// Takes a report that goes by `route`. Returns what its agent was told last.
    pub(super) fn take(&mut self, report: Report, route: usize, now: Instant) -> Result<Option<ReportAnswer>, Full> {
        let key = (report.agent.clone(), report.category.clone());
        let answer = match self.held.get_mut(&key) {
            // An older one of the same run, on another connection.
            Some(held) if held.report.run == report.run && held.report.number > report.number => {
                return Ok(held.answer.clone());
            }
            Some(held) => held.answer.take().filter(|answer| answer.run == report.run),
            None if self.bytes > MAX_HELD_BYTES => return Err(Full),
            None => None,
        };
        self.put(key.clone(), Held { report, answer: answer.clone(), heard_at: now });
        let route = &mut self.routes[route];
        route.fresh.insert(key);
        route.due.get_or_insert(now + GATHER);
        Ok(answer)
    }

    fn put(&mut self, key: Key, held: Held) {
        self.bytes += held.weight();
        if let Some(before) = self.held.insert(key, held) {
            self.bytes = self.bytes.saturating_sub(before.weight());
        }
    }

    /// When something is to be passed on.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.routes.iter().filter(|route| !route.is_busy && !route.fresh.is_empty()).filter_map(|route| route.due).min()
    }

    /// A route with reports that are to be passed on now. Each ends with one call of [`Desk::passed_on`] or
    /// [`Desk::not_passed_on`].
    pub(super) fn due(&mut self, now: Instant) -> Option<(usize, Vec<Report>)> {
        let is_due =
            |route: &Route| !route.is_busy && !route.fresh.is_empty() && route.due.is_none_or(|due| due <= now);
        let index = self.routes.iter().position(is_due)?;
        let route = &mut self.routes[index];
        let (mut reports, mut weight) = (Vec::new(), 0);
        while let Some(key) = route.fresh.pop_first() {
            let Some(held) = self.held.get(&key) else { continue };
            let own = held.report.weight();
            if !reports.is_empty() && (reports.len() == MAX_REPORTS_PER_REQUEST || weight + own > REQUEST_WEIGHT) {
                route.fresh.insert(key);
                break;
            }
            weight += own;
            reports.push(held.report.clone());
        }
        route.is_busy = true;
        route.due = Some(now + GATHER);
        Some((index, reports))
    }

    /// The tier above has taken what went by the route, and this is what it knows.
    pub(super) fn passed_on(&mut self, route: usize, answers: Vec<ReportAnswer>) {
        self.routes[route].is_busy = false;
        for answer in answers {
            let key = (answer.agent.clone(), answer.category.clone());
            if let Some(held) = self.held.get_mut(&key).filter(|held| held.report.run == answer.run) {
                let before = held.weight();
                held.answer = Some(answer);
                self.bytes = (self.bytes + held.weight()).saturating_sub(before);
            }
        }
    }

    /// What went by the route did not arrive: it is sent again, or what has come since in its place.
    pub(super) fn not_passed_on(&mut self, route: usize, reports: &[Report], again: Instant) {
        let route = &mut self.routes[route];
        route.is_busy = false;
        route.due = Some(again);
        route.fresh.extend(reports.iter().map(|report| (report.agent.clone(), report.category.clone())));
    }

    /// Forgets agents that are silent.
    pub(super) fn forget(&mut self, now: Instant) {
        self.held.retain(|_, held| now.duration_since(held.heard_at) < FORGET_AFTER);
        self.bytes = self.held.values().map(Held::weight).sum();
    }

    /// How many (agent, category) pairs are known.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tributary_common::ids::LaneId;
    use tributary_common::report::RunId;

    fn report(agent: &str, run: u64, number: u64) -> Report {
        let (id, category) = (agent.parse().expect("valid"), "app".parse().expect("valid"));
        Report { number, ..Report::new(LaneId(0), id, category, agent, RunId(run)) }
    }

    fn answer(report: &Report) -> ReportAnswer {
        ReportAnswer { heard: report.number, ..report.answer() }
    }

    fn sent(desk: &mut Desk, now: Instant) -> Vec<(String, u64)> {
        let (_, reports) = desk.due(now).expect("something is due");
        let sent = reports.iter().map(|report| (report.agent.to_string(), report.number)).collect();
        desk.passed_on(0, reports.iter().map(answer).collect());
        sent
    }

    #[test]
    fn only_the_latest_report_of_an_agent_goes_up_once_and_its_answer_comes_with_the_next() {
        let now = Instant::now();
        let mut desk = Desk::new(1);
        for (agent, number) in [("a", 1), ("b", 1), ("a", 3), ("a", 2)] {
            assert_eq!(desk.take(report(agent, 1, number), 0, now), Ok(None));
        }
        assert!(desk.due(now).is_none(), "they are gathered");
        assert_eq!(sent(&mut desk, now + GATHER), [("a".into(), 3), ("b".into(), 1)]);
        assert_eq!(desk.deadline(), None);
        let told = desk.take(report("a", 1, 4), 0, now).expect("room");
        assert_eq!(told.map(|answer| answer.heard), Some(3));
        assert_eq!(desk.take(report("a", 2, 1), 0, now), Ok(None), "another run is told nothing of that");
    }

    #[test]
    fn what_did_not_arrive_is_sent_again_later_unless_something_newer_came() {
        let now = Instant::now();
        let mut desk = Desk::new(1);
        desk.take(report("a", 1, 1), 0, now).expect("room");
        desk.take(report("b", 1, 1), 0, now).expect("room");
        let (route, reports) = desk.due(now + GATHER).expect("due");
        desk.take(report("a", 1, 2), 0, now + GATHER).expect("room");
        assert!(desk.due(now + 2 * GATHER).is_none(), "one request at a time");
        let again = now + 10 * GATHER;
        desk.not_passed_on(route, &reports, again);
        assert_eq!(desk.deadline(), Some(again));
        assert_eq!(sent(&mut desk, again), [("a".into(), 2), ("b".into(), 1)]);
    }

    #[test]
    fn a_silent_agent_is_forgotten_and_memory_is_bounded() {
        let now = Instant::now();
        let mut desk = Desk::new(1);
        let heavy = |agent: usize| Report { host: "h".repeat(1 << 20), ..report(&format!("a{agent}"), 1, 1) };
        let taken = (0..200).take_while(|agent| desk.take(heavy(*agent), 0, now).is_ok()).count();
        assert!((120..140).contains(&taken), "{taken}");
        assert_eq!(desk.take(heavy(0), 0, now), Ok(None), "one that is known replaces itself");
        desk.forget(now + FORGET_AFTER);
        assert_eq!((desk.len(), desk.bytes), (0, 0));
    }

    #[test]
    fn a_request_has_a_bound() {
        let now = Instant::now();
        let mut desk = Desk::new(1);
        for agent in 0..4 * MAX_REPORTS_PER_REQUEST {
            desk.take(report(&format!("a{agent}"), 1, 1), 0, now).expect("room");
        }
        let mut all = 0;
        while let Some((route, reports)) = desk.due(now + Duration::from_secs(60)) {
            assert!(serde_json::to_vec(&reports).expect("serializes").len() < MAX_REPORTS_BYTES as usize);
            all += reports.len();
            desk.passed_on(route, Vec::new());
            desk.routes[0].due = None;
        }
        assert_eq!(all, 4 * MAX_REPORTS_PER_REQUEST);
    }
}
