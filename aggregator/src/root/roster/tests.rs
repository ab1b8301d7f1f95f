//! Members, claims, sessions: case by case, and against a model.

use proptest::prelude::*;
use std::cell::RefCell;

use super::*;
use tributary_common::ids::LaneId;

const HOUR_MS: i64 = 3_600_000;
const NOW: i64 = 100 * HOUR_MS;
const GONE_FOR_MS: i64 = 7 * 24 * HOUR_MS;

fn app() -> CategoryName {
    "app".parse().expect("valid")
}

fn agent(name: &str) -> AgentId {
    name.parse().expect("valid")
}

/// A roster with the ledger that its entries go to, and what is committed of streams.
struct World {
    roster: Roster,
    committed: RefCell<BTreeMap<StreamId, u64>>,
    now: i64,
    entry: u64,
    epoch: u64,
}

impl World {
    fn new() -> Self {
        Self {
            roster: Roster::load(Epoch(1), &[], Vec::new(), None, NOW),
            committed: RefCell::default(),
            now: NOW,
            entry: 0,
            epoch: 1,
        }
    }

    fn report(&mut self, report: &Report) -> ReportAnswer {
        let committed = self.committed.borrow();
        let of = |stream: StreamId| committed.get(&stream).copied().unwrap_or(0);
        let answer = self.roster.report(report, self.now, self.entry.checked_sub(1), &of);
        self.roster.settle(&of);
        answer
    }

    /// An entry is written and seen.
    fn write(&mut self) -> Vec<MemberRecord> {
        let records = self.roster.records(true, self.entry);
        self.entry += 1;
        records
    }

    /// A stream of agent a is committed up to there, by bytes of the present hour.
    fn commit(&mut self, stream: u128, offset: u64) {
        self.commit_of(stream, offset, self.now - self.now % HOUR_MS);
    }

    /// The same with bytes of the hour that begins then.
    fn commit_of(&mut self, stream: u128, offset: u64, hour_ms: i64) {
        let stream = StreamId(stream);
        let before = self.committed.borrow_mut().insert(stream, offset).unwrap_or(0);
        let came = Came { stream, moved: offset > before, bucket_end_ms: Some(hour_ms + HOUR_MS) };
        self.roster.came(&agent("a"), &app(), came);
        self.settle();
    }

    fn settle(&mut self) {
        let committed = self.committed.borrow();
        self.roster.settle(&|stream| committed.get(&stream).copied().unwrap_or(0));
    }

    /// Bytes of agent a are written: those of the stream from there on.
    fn wrote(&mut self, stream: u128, from: u64) -> bool {
        let from = StreamOffset { stream: StreamId(stream), offset: from };
        self.roster.noticed(&agent("a"), &app(), "a.example", from, self.now)
    }

    /// Whether anything has come, since this was asked last, of what the hour waits for that begins then.
    fn moves(&mut self, hour_ms: i64) -> bool {
        let end_ms = hour_ms + HOUR_MS;
        let moves = self.roster.moves(&app(), end_ms, end_ms, self.now);
        self.roster.looked();
        moves
    }

    fn takeover(&mut self) {
        let records = self.write();
        self.take_over_from(&records);
    }

    fn take_over_from(&mut self, records: &[MemberRecord]) {
        self.epoch += 1;
        let losses = self.roster.all_losses();
        self.roster = Roster::load(Epoch(self.epoch), records, losses, self.entry.checked_sub(1), self.now);
    }

    fn complete(&self, end_ms: i64) -> bool {
        let complete = self.roster.complete_to(&app()) >= Some(end_ms);
        assert_eq!(complete, self.roster.waits_for_count(&app(), end_ms) == 0);
        complete
    }
}

/// A run of an agent that does what agents do with answers.
struct Agent {
    next: Report,
}

impl Agent {
    fn new(name: &str, run: u64) -> Self {
        Self { next: Report::new(LaneId(0), agent(name), app(), format!("{name}.example"), RunId(run)) }
    }

    fn makes(&mut self, watermark_ms: impl Into<Option<i64>>, required: &[(u128, u64)]) -> &Report {
        self.next.number += 1;
        self.next.watermark_ms = watermark_ms.into();
        self.next.required = required
            .iter()
            .map(|(stream, offset)| StreamOffset { stream: StreamId(*stream), offset: *offset })
            .collect();
        &self.next
    }

    fn say(
        &mut self,
        world: &mut World,
        watermark_ms: impl Into<Option<i64>>,
        required: &[(u128, u64)],
    ) -> ReportAnswer {
        self.makes(watermark_ms, required);
        let answer = world.report(&self.next);
        self.next.session = answer.session.or(self.next.session);
        self.next.rival = answer.rival.or(self.next.rival);
        answer
    }

    /// One that has a session.
    fn known(world: &mut World, name: &str, run: u64) -> Self {
        let mut agent = Self::new(name, run);
        assert_eq!(agent.say(world, None, &[]).session, None, "not before it is written down");
        world.write();
        assert!(agent.say(world, None, &[]).session.is_some());
        agent
    }
}

#[test]
fn an_hour_is_complete_when_every_agent_is_past_it_and_what_it_named_is_committed() {
    let mut world = World::new();
    assert!(world.complete(NOW), "where nobody is expected, nothing is waited for");
    let mut a = Agent::known(&mut world, "a", 1);
    let mut b = Agent::known(&mut world, "b", 2);
    assert!(!world.complete(NOW));
    a.say(&mut world, NOW - 1, &[(1, 10)]);
    b.say(&mut world, NOW - 2, &[]);
    assert!(!world.complete(NOW - HOUR_MS) && world.roster.complete_to(&app()).is_none());
    world.commit(1, 9);
    assert!(!world.complete(NOW - 2));
    world.commit(1, 10);
    assert!(world.complete(NOW - 2));
    assert!(!world.complete(NOW - 1), "the other one is not so far");
    let waits: Vec<Waiting> = world.roster.waits_for(&app(), NOW, NOW).collect();
    assert_eq!(waits.len(), world.roster.waits_for_count(&app(), NOW));
    assert_eq!(waits.iter().map(|one| one.host.as_str()).collect::<Vec<_>>(), ["a.example", "b.example"]);
    assert_eq!(waits[1].watermark_ms, Some(NOW - 2));
}

#[test]
fn an_offset_that_was_named_stays_required_whatever_is_named_later() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    a.say(&mut world, NOW - 20, &[(1, 10)]);
    a.say(&mut world, NOW - 10, &[(2, 5)]);
    world.commit(2, 5);
    a.say(&mut world, NOW - 1, &[]);
    assert!(!world.complete(NOW - 20));
    // Also where the agent begins anew and knows nothing of it.
    let mut a = Agent::known(&mut world, "a", 2);
    a.say(&mut world, NOW, &[]);
    assert!(!world.complete(NOW - 20));
    world.commit(1, 10);
    assert!(world.complete(NOW));
}

#[test]
fn an_agent_that_never_rests_puts_no_hour_off() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    for step in 0..50 {
        // What it names is always ahead of what is committed.
        a.say(&mut world, NOW - 1000 + step, &[(1, 10 * (step as u64 + 2))]);
        world.commit(1, 10 * (step as u64 + 1));
    }
    assert!(world.complete(NOW - 1000 + 45));
}

#[test]
fn after_a_takeover_nothing_is_complete_before_each_agent_was_heard_again() {
    let mut world = World::new();
    let (mut a, mut b) = (Agent::known(&mut world, "a", 1), Agent::known(&mut world, "b", 2));
    a.say(&mut world, NOW, &[]);
    b.say(&mut world, NOW, &[(7, 3)]);
    world.takeover();
    assert!(!world.complete(NOW - HOUR_MS));
    a.say(&mut world, NOW, &[]);
    assert!(!world.complete(NOW - HOUR_MS));
    assert_eq!(b.say(&mut world, NOW, &[]).session, b.next.session, "the session goes on");
    assert!(!world.complete(NOW), "what was named to the owner before is required");
    world.commit(7, 3);
    assert!(world.complete(NOW));
}

#[test]
fn a_watermark_from_the_future_is_refused_and_one_of_a_clock_a_little_ahead_counts_as_now() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    let answer = a.say(&mut world, NOW + MAX_AHEAD_MS + 1, &[]);
    assert!(answer.refused.is_some_and(|why| why.contains("set the clock")));
    assert!(!world.complete(NOW - HOUR_MS));
    assert_eq!(a.say(&mut world, NOW + MAX_AHEAD_MS, &[]).refused, None);
    assert!(world.complete(NOW) && !world.complete(NOW + 1));
}

#[test]
fn a_last_report_lets_an_agent_go_when_all_is_committed_also_over_a_takeover() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    a.next.last = true;
    a.say(&mut world, NOW, &[(1, 10)]);
    world.takeover();
    assert!(!world.complete(NOW + HOUR_MS), "it will not speak again, and what it named is awaited");
    world.commit(1, 10);
    assert!(world.roster.is_empty() && world.complete(NOW + HOUR_MS));
    // Said again, since the answer was lost.
    let again = a.say(&mut world, NOW, &[]);
    assert_eq!((again.heard, world.roster.len()), (a.next.number, 0));
    // And when it comes back it is a member.
    let mut back = Agent::known(&mut world, "a", 2);
    back.say(&mut world, None, &[]);
    assert!(!world.complete(NOW));
}

#[test]
fn what_an_agent_lost_is_named_in_the_hours_that_it_may_belong_to() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    a.say(&mut world, NOW - 3 * HOUR_MS, &[]);
    a.say(&mut world, NOW - HOUR_MS, &[(1, 10), (2, 20)]);
    world.commit(1, 4);
    a.next.lost = vec![StreamId(1)];
    a.say(&mut world, NOW, &[]);
    assert!(!world.complete(NOW - HOUR_MS), "the other one still may come");
    world.commit(2, 20);
    assert!(world.complete(NOW));
    let lost = |hours_ago: i64| {
        let start = NOW - hours_ago * HOUR_MS;
        world
            .roster
            .losses(&app(), start, start + HOUR_MS)
            .iter()
            .map(|loss| (loss.stream.0, loss.from, loss.to))
            .collect::<Vec<_>>()
    };
    assert_eq!(lost(4), []);
    assert_eq!(lost(3), [(1, 4, 10)]);
    assert_eq!(lost(2), [(1, 4, 10)]);
    // It is known over a takeover.
    world.takeover();
    assert_eq!(world.roster.losses(&app(), NOW - 2 * HOUR_MS, NOW - HOUR_MS).len(), 1);
}

#[test]
fn a_retired_agent_is_not_waited_for_and_what_it_named_is_lost() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    a.say(&mut world, NOW - 1, &[(1, 10)]);
    assert_eq!(world.roster.retire("nobody", None, NOW, &|_| 0), 0);
    let elsewhere = "db".parse().expect("valid");
    assert_eq!(world.roster.retire("a.example", Some(&elsewhere), NOW, &|_| 0), 0);
    assert!(!world.complete(NOW));
    assert_eq!(world.roster.retire("a.example", Some(&app()), NOW, &|_| 3), 1);
    assert!(world.complete(NOW + HOUR_MS));
    let losses = world.roster.losses(&app(), NOW - HOUR_MS, NOW);
    assert_eq!((losses[0].from, losses[0].to), (3, 10));
    // It lives after all: then it is expected again.
    a.say(&mut world, NOW, &[]);
    world.write();
    assert_eq!(a.say(&mut world, NOW, &[]).heard, 3, "it has not been told yet that it had been given up");
    assert!(world.complete(NOW + HOUR_MS));
    assert_eq!(a.say(&mut world, NOW, &[]).heard, 6);
    assert!(!world.complete(NOW + HOUR_MS));
    assert!(world.complete(NOW));
}

#[test]
fn reports_that_come_from_edges_that_were_cut_off_do_not_bring_a_retired_agent_back() {
    let mut world = World::new();
    // Of one that was known, and of one that had just been given its session.
    let mut a = Agent::known(&mut world, "a", 1);
    a.say(&mut world, NOW - 2, &[]);
    let mut late: Vec<Report> = (0..4).map(|_| a.makes(NOW - 1, &[(1, 10)]).clone()).collect();
    let mut next = Agent::known(&mut world, "a", 2);
    late.extend((0..4).map(|_| next.makes(NOW, &[]).clone()));
    assert_eq!(world.roster.retire("a", None, NOW, &|_| 0), 1);
    for report in late.iter().chain(&late) {
        world.report(report);
        world.write();
        assert!(world.roster.is_empty(), "{report:?}");
    }
    world.takeover();
    for report in &late {
        world.report(report);
        assert!(world.roster.is_empty(), "{report:?}");
    }
    // The later one lives after all.
    for _ in 0..2 {
        world.write();
        next.say(&mut world, NOW, &[]);
    }
    assert!(!world.roster.is_empty() && world.complete(NOW));
}

#[test]
fn an_agent_that_is_silent_for_very_long_is_forgotten() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    Agent::known(&mut world, "b", 2);
    world.now += HOUR_MS;
    a.say(&mut world, NOW, &[]);
    assert_eq!(world.roster.forget(world.now, HOUR_MS, i64::MAX, &|_| 0, &|_| 0), [(agent("b"), app())]);
    assert_eq!(world.roster.take_left(), [(agent("b"), app())]);
    assert!(world.complete(NOW));
}

#[test]
fn two_machines_with_one_id_are_both_refused_while_both_live() {
    let mut world = World::new();
    let mut first = Agent::known(&mut world, "a", 1);
    first.say(&mut world, NOW - 10, &[]);
    let mut second = Agent::known(&mut world, "a", 2);
    assert!(second.say(&mut world, NOW - 9, &[]).refused.is_none(), "so far it is an agent that was started anew");
    let told = first.say(&mut world, NOW - 8, &[]);
    assert_eq!((told.rival, told.refused), (second.next.session, None));
    // It has heard of the other and speaks: both are alive.
    let refused = first.say(&mut world, NOW - 7, &[]).refused.expect("refused");
    assert!(refused.contains("agent_id of its own"), "{refused}");
    assert!(second.say(&mut world, NOW, &[]).refused.is_some());
    assert!(!world.complete(NOW) && world.complete(NOW - 9), "nothing of either is believed any more");
    assert!(world.roster.waits_for(&app(), NOW, NOW).next().is_some_and(|one| one.reason.contains("two machines")));
    // One of them is stopped.
    world.now += CLASH_MS;
    assert!(second.say(&mut world, NOW, &[]).refused.is_none());
    assert!(world.complete(NOW));
}

#[test]
fn a_restart_is_no_clash_whatever_is_delivered_late() {
    let mut world = World::new();
    let mut first = Agent::known(&mut world, "a", 1);
    first.say(&mut world, NOW - 10, &[]);
    let mut lingering: Vec<Report> = (0..5_u64)
        .map(|more| Report { number: first.next.number + 1 + more, watermark_ms: Some(NOW - 5), ..first.next.clone() })
        .collect();
    // Started, heard of, and stopped before it knew its session.
    let mut brief = Agent::new("a", 7);
    brief.say(&mut world, None, &[]);
    let mut second = Agent::known(&mut world, "a", 2);
    second.say(&mut world, NOW - 1, &[]);
    lingering.push(brief.next.clone());
    for late in &lingering {
        let answer = world.report(late);
        assert!(answer.refused.is_none(), "{answer:?}");
    }
    assert!(second.say(&mut world, NOW, &[]).refused.is_none());
    assert!(world.complete(NOW));
}

#[test]
fn an_older_report_changes_nothing() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    let old = Report { watermark_ms: Some(NOW), ..a.next.clone() };
    a.say(&mut world, NOW - 10, &[]);
    let answer = world.report(&old);
    assert_eq!(answer.heard, a.next.number);
    assert!(!world.complete(NOW));
}

#[test]
fn an_agent_of_which_only_data_came_is_waited_for_and_a_batch_of_it_is_answered_when_it_is_written_down() {
    let mut world = World::new();
    assert!(world.wrote(1, 0));
    assert!(!world.wrote(1, 10));
    assert!(!world.complete(NOW));
    assert_eq!(world.roster.answer_after(&agent("a"), &app(), None, 5), Some(5));
    world.roster.records(false, 5);
    assert_eq!(world.roster.answer_after(&agent("a"), &app(), Some(4), 6), Some(5));
    assert_eq!(world.roster.answer_after(&agent("a"), &app(), Some(5), 6), None);
}

/// The hour that is over, and that the tests of what moves it wait for.
const OVER: i64 = NOW - HOUR_MS;

/// An agent that is known and has not got past that hour, an hour and a half later.
fn behind(world: &mut World) -> Agent {
    world.now = NOW + HOUR_MS / 2;
    let mut a = Agent::known(world, "a", 1);
    a.say(world, OVER + 1, &[(1, 10)]);
    a
}

#[test]
fn bytes_of_an_hour_or_of_one_before_it_move_it_and_those_of_later_ones_do_not() {
    let mut world = World::new();
    let mut a = behind(&mut world);
    world.commit(1, 10);
    assert!(world.moves(OVER), "the agent had named the stream");
    assert!(!world.moves(OVER), "nothing has come since");
    // A file that can't be read holds the watermark, and another log flows.
    for step in 1..50 {
        a.say(&mut world, OVER + 1, &[]);
        world.commit(2, 10 * step);
        assert!(!world.moves(OVER));
    }
    world.commit_of(3, 10, OVER - 5 * HOUR_MS);
    assert!(world.moves(OVER), "what comes first may be of hours before");
    world.commit_of(3, 20, OVER);
    assert!(world.moves(OVER));
    assert!(!world.moves(OVER - HOUR_MS));
    a.say(&mut world, NOW, &[]);
    world.commit_of(3, 30, OVER);
    assert!(!world.moves(OVER), "nobody is waited for");
}

#[test]
fn while_what_an_agent_named_first_does_not_come_it_may_name_and_ship_more_for_ever_and_that_moves_no_hour() {
    let mut world = World::new();
    let mut a = behind(&mut world);
    // Stream 1 was stopped; stream 2 flows, and is named ever anew before it is committed.
    for step in 1..50 {
        a.say(&mut world, NOW + i64::try_from(step).expect("few"), &[(2, 10 * step)]);
        world.commit(2, 10 * step - 5);
        assert!(!world.moves(OVER));
    }
    world.commit(1, 5);
    assert!(world.moves(OVER));
}

#[test]
fn what_comes_of_an_agent_whose_clock_is_ahead_moves_no_hour_before_it_is_set() {
    let mut world = World::new();
    let mut a = behind(&mut world);
    let ahead = world.now + MAX_AHEAD_MS + 1;
    assert!(a.say(&mut world, ahead, &[]).refused.is_some());
    world.commit_of(1, 5, OVER);
    assert!(!world.moves(OVER));
    a.say(&mut world, OVER + 2, &[]);
    world.commit_of(1, 6, OVER);
    assert!(world.moves(OVER));
}

#[test]
fn what_comes_of_two_machines_with_one_id_moves_no_hour() {
    let mut world = World::new();
    let mut first = behind(&mut world);
    let mut second = Agent::known(&mut world, "a", 2);
    second.say(&mut world, OVER + 1, &[]);
    first.say(&mut world, OVER + 1, &[]);
    first.say(&mut world, OVER + 1, &[]);
    world.commit_of(1, 5, OVER);
    assert!(!world.moves(OVER));
    world.now += CLASH_MS;
    world.commit_of(1, 6, OVER);
    assert!(world.moves(OVER));
}

#[test]
fn late_bytes_of_an_hour_that_is_sealed_move_no_other_one() {
    let mut world = World::new();
    behind(&mut world);
    world.roster.came(&agent("a"), &app(), Came { stream: StreamId(9), moved: true, bucket_end_ms: None });
    assert!(!world.moves(OVER));
}

#[test]
fn a_leave_that_is_cancelled_leaves_no_claim_behind_that_an_agent_is_past_all_hours() {
    let mut world = World::new();
    let mut once = Agent::known(&mut world, "a", 1);
    once.say(&mut world, NOW - 10, &[(1, 10)]);
    once.next.last = true;
    once.say(&mut world, NOW - 5, &[]);
    // Its next run begins before what it named is there.
    let mut next = Agent::known(&mut world, "a", 2);
    next.say(&mut world, None, &[]);
    world.commit(1, 10);
    assert!(!world.roster.is_empty(), "it is back");
    assert!(!world.complete(NOW), "it has not said so");
    next.say(&mut world, NOW, &[]);
    assert!(world.complete(NOW) && !world.complete(NOW + 1));
}

#[test]
fn a_leave_is_not_cancelled_by_what_was_on_its_way_or_by_the_bytes_that_it_waits_for() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    a.say(&mut world, NOW - 10, &[(1, 10)]);
    let before = a.next.clone();
    a.next.last = true;
    a.say(&mut world, NOW - 5, &[]);
    for late in [&before, &a.next, &before] {
        world.report(late);
    }
    world.wrote(1, 0);
    // The next owner finds them, too.
    world.takeover();
    world.wrote(1, 5);
    world.report(&before);
    assert!(!world.complete(NOW - 5));
    world.commit(1, 10);
    assert!(world.roster.is_empty());
}

#[test]
fn a_leave_is_cancelled_by_a_later_report_and_by_bytes_that_were_not_named() {
    for by_bytes in [false, true] {
        let mut world = World::new();
        let mut a = Agent::known(&mut world, "a", 1);
        a.say(&mut world, NOW - 10, &[(1, 10)]);
        a.next.last = true;
        a.say(&mut world, NOW - 5, &[]);
        if by_bytes {
            world.wrote(1, 10);
        } else {
            a.next.last = false;
            a.say(&mut world, NOW - 4, &[]);
        }
        world.commit(1, 10);
        assert!(!world.roster.is_empty() && !world.complete(NOW));
    }
}

#[test]
fn an_agent_that_has_left_or_was_retired_is_not_brought_back_by_what_was_on_its_way() {
    for retired in [false, true] {
        let mut world = World::new();
        let mut old = Agent::known(&mut world, "a", 1);
        old.say(&mut world, NOW - 20, &[]);
        let first = Report { session: None, number: 1, ..old.next.clone() };
        let mut a = Agent::known(&mut world, "a", 2);
        a.say(&mut world, NOW - 10, &[]);
        let before = a.next.clone();
        if retired {
            assert_eq!(world.roster.retire("a", None, NOW, &|_| 0), 1);
        } else {
            a.next.last = true;
            a.say(&mut world, NOW, &[]);
        }
        for round in 0..2 {
            for late in [&first, &old.next, &before, &first, &a.next] {
                let answer = world.report(late);
                assert!(answer.refused.is_none() && world.roster.is_empty(), "{late:?}");
                world.write();
            }
            assert_eq!(world.report(&before).heard, a.next.number, "round {round}");
            assert_eq!(world.roster.retire("a", None, NOW, &|_| 0), 0);
            world.takeover();
        }
        // It is remembered for longer than any tier keeps what it said, and no longer.
        assert_eq!(world.roster.forget(world.now, i64::MAX, GONE_FOR_MS, &|_| 0, &|_| 0), []);
        assert_eq!(world.roster.take_left(), []);
        // Also where the lane gets another owner from time to time.
        for _ in 0..2 {
            assert_eq!(world.roster.take_left(), []);
            world.now += GONE_FOR_MS / 2;
            world.takeover();
            assert_eq!(world.roster.forget(world.now, i64::MAX, GONE_FOR_MS, &|_| 0, &|_| 0), []);
        }
        assert_eq!(world.roster.take_left(), [(agent("a"), app())]);
    }
}

#[test]
fn an_agent_that_has_left_comes_back_with_the_session_that_it_is_given_then_and_not_with_bytes() {
    let left = || {
        let mut world = World::new();
        let mut a = Agent::known(&mut world, "a", 1);
        a.next.last = true;
        a.say(&mut world, NOW, &[]);
        assert!(world.roster.is_empty());
        a.next.last = false;
        (world, a)
    };
    let (mut world, mut a) = left();
    for _ in 0..3 {
        assert!(world.roster.is_empty());
        a.say(&mut world, NOW - 5, &[]);
        world.write();
    }
    assert!(!world.roster.is_empty() && !world.complete(NOW));
    assert!(world.complete(NOW - 5));

    let (mut world, _) = left();
    let mut next = Agent::known(&mut world, "a", 2);
    next.say(&mut world, None, &[]);
    assert!(!world.complete(NOW - 5), "what its run before said is not said of it");
    next.say(&mut world, NOW, &[]);
    assert!(world.complete(NOW));

    let (mut world, _) = left();
    assert!(!world.wrote(1, 0), "it may have been retired, and an edge that was down bring what it had of it");
    assert!(world.roster.is_empty());
}

#[test]
fn of_two_machines_with_one_id_the_one_that_goes_on_is_expected_when_the_other_has_left() {
    let mut world = World::new();
    let mut first = Agent::known(&mut world, "a", 1);
    let mut second = Agent::known(&mut world, "a", 2);
    second.next.last = true;
    second.say(&mut world, NOW, &[]);
    assert!(world.roster.is_empty());
    for _ in 0..3 {
        first.say(&mut world, NOW, &[]);
        world.write();
    }
    first.say(&mut world, NOW, &[]);
    assert!(!world.roster.is_empty() && world.complete(NOW));
}

#[test]
fn a_ledger_in_which_a_leave_claims_the_end_of_time_is_not_believed_in_that() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    a.say(&mut world, NOW - 10, &[(1, 10)]);
    a.say(&mut world, NOW - 5, &[]);
    let records = world.write();
    let far = ClaimRecord { watermark_ms: i64::MAX, required: records[0].claims[0].required.clone() };
    let poisoned = [
        // It is leaving, or the leave was cancelled.
        MemberRecord { claims: vec![records[0].claims[0].clone(), far.clone()], leaving: true, ..records[0].clone() },
        MemberRecord { claims: vec![far.clone(), far], ..records[0].clone() },
        MemberRecord { claims: Vec::new(), done_ms: Some(i64::MAX), ..records[0].clone() },
    ];
    for record in poisoned {
        world.committed.borrow_mut().clear();
        world.take_over_from(std::slice::from_ref(&record));
        let mut a = Agent::known(&mut world, "a", 2);
        a.say(&mut world, NOW - 10, &[]);
        world.commit(1, 10);
        assert!(world.complete(NOW - 10) && !world.complete(NOW), "{record:?}");
    }
}

#[test]
fn a_loss_is_remembered_as_long_as_an_hour_of_its_time_is_open() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    a.say(&mut world, NOW - HOUR_MS, &[(1, 10)]);
    a.next.lost = vec![StreamId(1)];
    a.say(&mut world, NOW, &[]);
    let lost = |world: &World| world.roster.losses(&app(), OVER - HOUR_MS, OVER).len();
    world.now += 25 * 86_400_000;
    a.say(&mut world, NOW, &[]);
    world.roster.forget(world.now, i64::MAX, GONE_FOR_MS, &|_| OVER - HOUR_MS, &|_| 0);
    assert_eq!(lost(&world), 1, "that hour has waited for somebody else all the time");
    world.roster.forget(world.now, i64::MAX, GONE_FOR_MS, &|_| NOW + HOUR_MS, &|_| 0);
    assert_eq!(lost(&world), 0);
}

/// A step of a history of one agent and its lane's owners.
#[derive(Debug, Clone)]
enum Step {
    /// The agent reads so many bytes of a stream, of now.
    Read(u8, u8),
    /// So much of what was read of a stream is committed.
    Commit(u8, u8),
    Report,
    /// The agent makes a report that does not arrive, or not yet.
    Delayed,
    /// One of the reports that were made before arrives, perhaps again.
    Arrives(prop::sample::Index),
    /// The agent says its last word; what happens next, its next run does.
    Leave,
    /// The agent is started anew; it remembers its streams.
    Restart,
    Takeover,
    Write,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4_u8, 1..50_u8).prop_map(|(stream, bytes)| Step::Read(stream, bytes)),
        (0..4_u8, 0..=100_u8).prop_map(|(stream, part)| Step::Commit(stream, part)),
        Just(Step::Report),
        Just(Step::Report),
        Just(Step::Delayed),
        any::<prop::sample::Index>().prop_map(Step::Arrives),
        any::<prop::sample::Index>().prop_map(Step::Arrives),
        Just(Step::Leave),
        Just(Step::Restart),
        Just(Step::Takeover),
        Just(Step::Write),
    ]
}

/// What an agent has read: by stream, the time and the end of each piece.
#[derive(Default)]
struct Read(BTreeMap<u128, Vec<(i64, u64)>>);

impl Read {
    fn end_of(&self, stream: u128) -> u64 {
        self.0.get(&stream).and_then(|pieces| pieces.last()).map_or(0, |piece| piece.1)
    }

    /// What is read and not committed.
    fn named(&self, world: &World) -> Vec<(u128, u64)> {
        let committed = world.committed.borrow();
        let ends = self.0.keys().map(|stream| (*stream, self.end_of(*stream)));
        ends.filter(|(stream, end)| committed.get(&StreamId(*stream)).copied().unwrap_or(0) < *end).collect()
    }
}

proptest! {
    /// Whatever happens, in whatever order: where the roster says that all of before a time is there, it is; in the end it says
    /// so of all; and when the agent has left, nothing that was on its way brings it back.
    #[test]
    fn what_is_called_complete_is_committed(steps in prop::collection::vec(step(), 1..150)) {
        let mut world = World::new();
        let mut a = Agent::new("a", 1);
        let mut read = Read::default();
        let mut said: Vec<Report> = Vec::new();
        let mut run = 1;
        // All that was read before is named when it leaves.
        let mut left_ms = i64::MIN;
        for step in steps {
            world.now += 10;
            if a.next.last && !matches!(step, Step::Commit(..) | Step::Arrives(_) | Step::Takeover | Step::Write) {
                run += 1;
                a = Agent::new("a", run);
            }
            match step {
                Step::Read(stream, bytes) => {
                    let end = read.end_of(u128::from(stream)) + u64::from(bytes);
                    read.0.entry(u128::from(stream)).or_default().push((world.now, end));
                }
                Step::Commit(stream, part) => {
                    let stream = u128::from(stream);
                    let before = world.committed.borrow().get(&StreamId(stream)).copied().unwrap_or(0);
                    let more = (read.end_of(stream) - before) * u64::from(part) / 100;
                    if more > 0 {
                        world.wrote(stream, before);
                        world.commit(stream, before + more);
                    }
                }
                Step::Report => {
                    let (now, required) = (world.now, read.named(&world));
                    a.say(&mut world, now, &required);
                    said.push(a.next.clone());
                }
                Step::Delayed => {
                    let (now, required) = (world.now, read.named(&world));
                    said.push(a.makes(now, &required).clone());
                }
                Step::Arrives(index) if !said.is_empty() => {
                    let report = index.get(&said).clone();
                    let answer = world.report(&report);
                    if report.last && answer.heard == report.number {
                        left_ms = left_ms.max(report.watermark_ms.unwrap_or(i64::MIN));
                    }
                }
                Step::Arrives(_) => {}
                Step::Leave => {
                    let (now, required) = (world.now, read.named(&world));
                    a.next.last = true;
                    let answer = a.say(&mut world, now, &required);
                    said.push(a.next.clone());
                    if answer.heard == a.next.number {
                        left_ms = world.now;
                    }
                }
                Step::Restart => {
                    run += 1;
                    a = Agent::new("a", run);
                }
                Step::Takeover => world.takeover(),
                Step::Write => {
                    world.write();
                }
            }
            let Some(done) = world.roster.complete_to(&app()) else { continue };
            prop_assert!(done == i64::MAX || done <= world.now);
            let done = if done == i64::MAX { left_ms } else { done };
            for (stream, pieces) in &read.0 {
                let committed = world.committed.borrow().get(&StreamId(*stream)).copied().unwrap_or(0);
                for (time, end) in pieces.iter().filter(|(time, _)| *time < done) {
                    prop_assert!(*end <= committed, "{stream}: {end} of {time} is not committed, and {done} is complete");
                }
            }
        }
        for stream in 0..4 {
            world.commit(stream, read.end_of(stream));
        }
        if a.next.last {
            a = Agent::new("a", run + 1);
        }
        let say = |world: &mut World, a: &mut Agent, said: &mut Vec<Report>| {
            for _ in 0..4 {
                world.write();
                let now = world.now;
                a.say(world, now, &[]);
                said.push(a.next.clone());
            }
        };
        say(&mut world, &mut a, &mut said);
        prop_assert!(!world.roster.is_empty() && world.complete(world.now) && !world.complete(world.now + 1));
        a.next.last = true;
        say(&mut world, &mut a, &mut said);
        prop_assert!(world.roster.is_empty());
        world.takeover();
        for late in said.iter().chain(said.iter().rev()) {
            world.report(late);
            world.write();
            prop_assert!(world.roster.is_empty(), "{late:?} has brought it back");
        }
    }
}
