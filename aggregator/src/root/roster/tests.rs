//! Members, claims, sessions: case by case, and against a model.

use proptest::prelude::*;
use std::cell::RefCell;

use super::*;
use tributary_common::ids::LaneId;

const HOUR_MS: i64 = 3_600_000;
const NOW: i64 = 100 * HOUR_MS;

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
}

impl World {
    fn new() -> Self {
        Self {
            roster: Roster::load(Epoch(1), &[], Vec::new(), None, NOW),
            committed: RefCell::default(),
            now: NOW,
            entry: 0,
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

    fn commit(&mut self, stream: u128, offset: u64) {
        self.committed.borrow_mut().insert(StreamId(stream), offset);
        let committed = self.committed.borrow();
        self.roster.settle(&|stream| committed.get(&stream).copied().unwrap_or(0));
        drop(committed);
        self.roster.moved(&agent("a"), &app());
    }

    fn takeover(&mut self) {
        let records = self.write();
        let losses = self.roster.all_losses();
        self.roster = Roster::load(Epoch(2), &records, losses, Some(self.entry - 1), self.now);
    }

    fn complete(&self, end_ms: i64) -> bool {
        let complete = self.roster.complete_to(&app()) >= Some(end_ms);
        assert_eq!(complete, self.roster.waits_for(&app(), end_ms, self.now).is_empty());
        complete
    }
}

/// A run of an agent that does what agents do with answers.
struct Agent {
    next: Report,
}

impl Agent {
    fn new(name: &str, run: u64) -> Self {
        Self {
            next: Report {
                lane: LaneId(0),
                agent: agent(name),
                category: app(),
                host: format!("{name}.example"),
                run: RunId(run),
                session: None,
                rival: None,
                number: 0,
                watermark_ms: None,
                required: Vec::new(),
                lost: Vec::new(),
                counts: Vec::new(),
                last: false,
                held_by: String::new(),
            },
        }
    }

    fn say(
        &mut self,
        world: &mut World,
        watermark_ms: impl Into<Option<i64>>,
        required: &[(u128, u64)],
    ) -> ReportAnswer {
        self.next.number += 1;
        self.next.watermark_ms = watermark_ms.into();
        self.next.required = required
            .iter()
            .map(|(stream, offset)| StreamOffset { stream: StreamId(*stream), offset: *offset })
            .collect();
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
    let waits = world.roster.waits_for(&app(), NOW, NOW);
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
    assert_eq!(world.roster.take_left(), [(agent("a"), app())]);
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
    assert_eq!(world.roster.retire("nobody", NOW, &|_| 0), 0);
    assert_eq!(world.roster.retire("a.example", NOW, &|_| 3), 1);
    assert!(world.complete(NOW + HOUR_MS));
    let losses = world.roster.losses(&app(), NOW - HOUR_MS, NOW);
    assert_eq!((losses[0].from, losses[0].to), (3, 10));
    // It lives after all: then it is expected again.
    a.say(&mut world, NOW, &[]);
    assert!(!world.complete(NOW + HOUR_MS));
}

#[test]
fn an_agent_that_is_silent_for_very_long_is_forgotten() {
    let mut world = World::new();
    let mut a = Agent::known(&mut world, "a", 1);
    Agent::known(&mut world, "b", 2);
    world.now += HOUR_MS;
    a.say(&mut world, NOW, &[]);
    assert_eq!(world.roster.forget(world.now, HOUR_MS, &|_| 0), [(agent("b"), app())]);
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
    assert!(world.roster.waits_for(&app(), NOW, NOW)[0].reason.contains("two machines"));
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
    assert!(world.roster.noticed(&agent("a"), &app(), "h", NOW));
    assert!(!world.roster.noticed(&agent("a"), &app(), "h", NOW));
    assert!(!world.complete(NOW));
    assert_eq!(world.roster.answer_after(&agent("a"), &app(), None, 5), Some(5));
    world.roster.records(false, 5);
    assert_eq!(world.roster.answer_after(&agent("a"), &app(), Some(4), 6), Some(5));
    assert_eq!(world.roster.answer_after(&agent("a"), &app(), Some(5), 6), None);
}

#[test]
fn committed_bytes_of_a_member_that_is_waited_for_move_the_hour() {
    let mut world = World::new();
    Agent::known(&mut world, "a", 1);
    world.commit(1, 1);
    assert!(world.roster.moves(&app(), NOW));
    world.roster.looked();
    assert!(!world.roster.moves(&app(), NOW));
}

/// A step of a history of one agent and its lane's owners.
#[derive(Debug, Clone)]
enum Step {
    /// The agent reads so many bytes of a stream, of now.
    Read(u8, u8),
    /// So much of what was read of a stream is committed.
    Commit(u8, u8),
    Report,
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
        Just(Step::Restart),
        Just(Step::Takeover),
        Just(Step::Write),
    ]
}

proptest! {
    /// Whatever happens, in whatever order: where the roster says that all of before a time is there, it is; and in the end it
    /// says so of all.
    #[test]
    fn what_is_called_complete_is_committed(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        let mut a = Agent::new("a", 1);
        // By stream: the time and the end of each piece that was read.
        let mut read: BTreeMap<u128, Vec<(i64, u64)>> = BTreeMap::new();
        let end_of = |read: &BTreeMap<u128, Vec<(i64, u64)>>, stream: u128| {
            read.get(&stream).and_then(|pieces| pieces.last()).map_or(0, |piece| piece.1)
        };
        let mut run = 1;
        let named = |world: &World, read: &BTreeMap<u128, Vec<(i64, u64)>>| -> Vec<(u128, u64)> {
            let ends = read.keys().map(|stream| (*stream, end_of(read, *stream)));
            let committed = world.committed.borrow();
            ends.filter(|(stream, end)| committed.get(&StreamId(*stream)).copied().unwrap_or(0) < *end).collect()
        };
        for step in steps {
            world.now += 10;
            match step {
                Step::Read(stream, bytes) => {
                    let end = end_of(&read, u128::from(stream)) + u64::from(bytes);
                    read.entry(u128::from(stream)).or_default().push((world.now, end));
                }
                Step::Commit(stream, part) => {
                    let stream = u128::from(stream);
                    let before = world.committed.borrow().get(&StreamId(stream)).copied().unwrap_or(0);
                    let left = end_of(&read, stream) - before;
                    world.commit(stream, before + left * u64::from(part) / 100);
                }
                Step::Report => {
                    let (now, required) = (world.now, named(&world, &read));
                    a.say(&mut world, now, &required);
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
            let Some(done) = world.roster.complete_to(&app()).filter(|done| *done < i64::MAX) else { continue };
            for (stream, pieces) in &read {
                let committed = world.committed.borrow().get(&StreamId(*stream)).copied().unwrap_or(0);
                for (time, end) in pieces.iter().filter(|(time, _)| *time < done) {
                    prop_assert!(*end <= committed, "{stream}: {end} of {time} is not committed, and {done} is complete");
                }
            }
        }
        for stream in 0..4 {
            world.commit(stream, end_of(&read, stream));
        }
        for _ in 0..4 {
            world.write();
            let now = world.now;
            a.say(&mut world, now, &[]);
        }
        prop_assert!(world.complete(world.now));
    }
}
