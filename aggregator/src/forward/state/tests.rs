use std::collections::BTreeMap;

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::spool::run::{Entry, Offer};
use tributary_common::position::TailHash;

const S: StreamId = StreamId(1);

fn at(offset: u64) -> Position {
    Position { offset, tail: TailHash(offset) }
}

/// The spool, without a disk: a batch's place tells what it is.
#[derive(Default)]
struct Held {
    runs: BTreeMap<StreamId, Run>,
    batches: HashMap<Place, (StreamId, Position, Position)>,
    next_place: u64,
}

impl Runs for Held {
    fn run(&self, stream: StreamId) -> Option<&Run> {
        self.runs.get(&stream)
    }
}

impl Held {
    fn offer(&mut self, stream: StreamId, start: u64, end: u64, committed: u64) -> Offer {
        let run = self.runs.entry(stream).or_insert_with(|| Run::begin(at(committed)));
        run.commit(at(committed));
        let offer = run.offer(at(start), at(end));
        if offer == Offer::Take {
            let place = Place { segment: 1, offset: self.next_place, len: (end - start) as u32 };
            self.next_place += end - start;
            self.batches.insert(place, (stream, at(start), at(end)));
            run.push(Entry { start: at(start), end: at(end), place, received_ms: 0 });
            run.settle();
        }
        offer
    }

    fn apply(&mut self, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::Committed { stream, committed, .. } => {
                    if let Some(run) = self.runs.get_mut(stream) {
                        run.commit(*committed);
                    }
                }
                Effect::Ended { stream, .. } => {
                    self.runs.remove(stream);
                }
                Effect::Alarm { .. } => {}
            }
        }
    }
}

fn forwarder(nodes: usize) -> Forwarder {
    let limits = ForwardLimits { request_bytes: 250, small_request_bytes: 0, ..ForwardLimits::default() };
    Forwarder::new(limits, &[endpoints(nodes)])
}

fn endpoints(nodes: usize) -> Vec<Endpoint> {
    (0..nodes).map(|node| Endpoint::at(&format!("node-{node}:1")).expect("valid")).collect()
}

fn answer(next: Option<u64>, committed: Option<u64>, verdict: Verdict) -> Answer {
    Answer { stream: S, next: next.map(at), committed: committed.map(at), owner: None, verdict }
}

/// The byte ranges of the batches in a request.
fn ranges(held: &Held, outgoing: &Outgoing) -> Vec<(u64, u64)> {
    let Ask::Batches(parts) = &outgoing.ask else { panic!("{outgoing:?} has no batches") };
    let places = parts.iter().flat_map(|part| &part.places);
    places.map(|place| (held.batches[place].1.offset, held.batches[place].2.offset)).collect()
}

/// The streams in a request.
fn streams(outgoing: &Outgoing) -> Vec<u128> {
    let Ask::Batches(parts) = &outgoing.ask else { panic!("{outgoing:?} has no batches") };
    parts.iter().map(|part| part.stream.0).collect()
}

#[test]
fn a_small_request_waits_for_company_while_another_is_under_way_and_not_for_long() {
    let (mut held, mut now) = (Held::default(), Instant::now());
    let limits = ForwardLimits { small_request_bytes: 250, ..ForwardLimits::default() };
    let mut forwarder = Forwarder::new(limits, &[endpoints(1)]);
    let offer = |forwarder: &mut Forwarder, held: &mut Held, now: Instant, stream: u128| {
        assert_eq!(held.offer(StreamId(stream), 0, 100, 0), Offer::Take);
        forwarder.notice(now, StreamId(stream), LaneId(0), held);
    };
    let answer_for = |stream: u128| Answer { stream: StreamId(stream), ..answer(Some(100), None, Verdict::Ok) };

    offer(&mut forwarder, &mut held, now, 1);
    let first = forwarder.next_request(now, &held).expect("nothing is under way");
    offer(&mut forwarder, &mut held, now, 2);
    offer(&mut forwarder, &mut held, now, 3);
    assert_eq!(forwarder.next_request(now, &held), None);
    assert_eq!(forwarder.next_deadline(), Some(now + limits.company_wait));
    offer(&mut forwarder, &mut held, now, 4);
    let full = forwarder.next_request(now, &held).expect("it is not small any more");
    assert_eq!(streams(&full), [2, 3, 4]);

    // However long the others take.
    offer(&mut forwarder, &mut held, now, 5);
    assert_eq!(forwarder.next_request(now, &held), None);
    now += limits.company_wait;
    let late = forwarder.next_request(now, &held).expect("it has waited");
    assert_eq!(streams(&late), [5]);

    // And not for the last one that is under way.
    offer(&mut forwarder, &mut held, now, 6);
    assert_eq!(forwarder.next_request(now, &held), None);
    for outgoing in [first, full, late] {
        let answers: Vec<Answer> = streams(&outgoing).into_iter().map(answer_for).collect();
        forwarder.answered(now, outgoing.id, &answers, &held, 0);
    }
    assert_eq!(forwarder.next_request(now, &held).map(|outgoing| streams(&outgoing)), Some(vec![6]));
    // Of many streams none is small.
    for stream in 7..7 + MANY_STREAMS as u128 {
        let held = &mut held;
        assert_eq!(held.offer(StreamId(stream), 0, 1, 0), Offer::Take);
        forwarder.notice(now, StreamId(stream), LaneId(0), held);
    }
    assert!(forwarder.next_request(now, &held).is_some());
}

struct Setup {
    held: Held,
    forwarder: Forwarder,
    now: Instant,
}

impl Setup {
    /// A stream with batches of 100 bytes from 0 on.
    fn with_batches(count: u64) -> Self {
        let mut setup = Self { held: Held::default(), forwarder: forwarder(2), now: Instant::now() };
        for n in 0..count {
            assert_eq!(setup.held.offer(S, n * 100, n * 100 + 100, 0), Offer::Take);
        }
        setup.notice();
        setup
    }

    fn notice(&mut self) {
        self.forwarder.notice(self.now, S, LaneId(0), &self.held);
    }

    fn next(&mut self) -> Option<Outgoing> {
        self.forwarder.next_request(self.now, &self.held)
    }

    /// The next request with batches; questions are told to wait.
    fn next_batches(&mut self) -> Option<Outgoing> {
        loop {
            let outgoing = self.next()?;
            if matches!(outgoing.ask, Ask::Batches(_)) {
                return Some(outgoing);
            }
            self.answered(&outgoing, &[answer(None, None, Verdict::Wait { reason: "a reason".into() })]);
        }
    }

    fn answered(&mut self, outgoing: &Outgoing, answers: &[Answer]) -> Vec<Effect> {
        let effects = self.forwarder.answered(self.now, outgoing.id, answers, &self.held, 0);
        self.held.apply(&effects);
        effects
    }

    fn failed(&mut self, outgoing: &Outgoing, failure: &Failure) -> Vec<Effect> {
        let effects = self.forwarder.failed(self.now, outgoing.id, failure, &self.held, 0);
        self.held.apply(&effects);
        effects
    }
}

#[test]
fn batches_go_in_order_and_one_request_of_a_stream_at_a_time() {
    let mut setup = Setup::with_batches(5);
    let first = setup.next().expect("there is something to send");
    assert_eq!(ranges(&setup.held, &first), [(0, 100), (100, 200)], "as many as a request holds");
    assert_eq!(setup.next(), None, "one request of the stream is under way");
    let taken = [answer(Some(100), Some(0), Verdict::Ok), answer(Some(200), Some(0), Verdict::Ok)];
    assert_eq!(setup.answered(&first, &taken), []);
    let second = setup.next().expect("there is more to send");
    assert_eq!(ranges(&setup.held, &second), [(200, 300), (300, 400)]);
}

#[test]
fn a_batch_larger_than_a_request_goes_alone() {
    let mut setup = Setup::with_batches(0);
    setup.held.offer(S, 0, 900, 0);
    setup.held.offer(S, 900, 1000, 0);
    setup.notice();
    let first = setup.next().expect("there is something to send");
    assert_eq!(ranges(&setup.held, &first), [(0, 900)]);
}

#[test]
fn sending_goes_on_where_the_parent_expects_it() {
    let mut setup = Setup::with_batches(5);
    setup.held.runs.get_mut(&S).expect("is there").commit(at(100));
    setup.forwarder = forwarder(1);
    setup.notice();
    let first = setup.next().expect("there is something to send");
    assert_eq!(ranges(&setup.held, &first), [(100, 200), (200, 300)]);
    // The parent has more than we knew, but not as much as we were about to say.
    setup.answered(&first, &[answer(Some(200), None, Verdict::Ok), answer(Some(300), None, Verdict::Ok)]);
    let second = setup.next().expect("there is more to send");
    // It has lost its spool: back to the batch that holds the byte 150.
    let back = answer(Some(150), Some(100), Verdict::Expected);
    setup.answered(&second, &[back.clone(), back]);
    let third = setup.next().expect("sending goes back without a rest");
    assert_eq!(ranges(&setup.held, &third), [(100, 200), (200, 300)]);
}

#[test]
fn a_parent_that_is_ahead_gets_only_what_it_has_not() {
    let mut setup = Setup::with_batches(4);
    let first = setup.next().expect("there is something to send");
    setup.answered(&first, &[answer(Some(300), None, Verdict::Ok), answer(Some(300), None, Verdict::Ok)]);
    let second = setup.next().expect("there is more to send");
    assert_eq!(ranges(&setup.held, &second), [(300, 400)]);
}

#[test]
fn a_stream_without_progress_rests_and_then_tries_again() {
    let mut setup = Setup::with_batches(1);
    let wait = answer(None, None, Verdict::Wait { reason: "a reason".into() });
    let mut rests = Vec::new();
    for _ in 0..5 {
        let sent = setup.next_batches().expect("there is something to send");
        setup.answered(&sent, std::slice::from_ref(&wait));
        assert_eq!(setup.next_batches(), None, "it rests");
        let (until, _) = *setup.forwarder.resting.first().expect("it rests");
        rests.push(until - setup.now);
        setup.now = until;
    }
    assert!(rests.windows(2).all(|pair| pair[0] < pair[1]), "{rests:?}");
    let sent = setup.next_batches().expect("there is something to send");
    setup.answered(&sent, &[answer(Some(100), None, Verdict::Ok)]);
    assert!(setup.forwarder.resting.is_empty());
}

#[test]
fn committed_leaves_the_spool_and_is_asked_for_when_nothing_is_sent() {
    let mut setup = Setup::with_batches(2);
    let sent = setup.next().expect("there is something to send");
    setup.answered(&sent, &[answer(Some(100), None, Verdict::Ok), answer(Some(200), Some(100), Verdict::Ok)]);
    assert_eq!(setup.held.runs[&S].entries().len(), 1);
    assert_eq!(setup.next(), None);
    setup.now = setup.forwarder.next_deadline().expect("the parent is asked later");
    let poll = setup.next().expect("the parent is asked");
    assert_eq!(poll.ask, Ask::Positions(vec![(S, at(100))]));
    setup.answered(&poll, &[answer(Some(200), Some(200), Verdict::Ok)]);
    assert!(setup.held.runs[&S].is_empty());
    setup.now += Duration::from_secs(60);
    assert_eq!(setup.next(), None, "nobody waits for anything");
    assert_eq!(setup.forwarder.next_deadline(), None);
}

#[test]
fn an_idle_stream_whose_parent_lost_its_spool_is_sent_again() {
    let mut setup = Setup::with_batches(2);
    let sent = setup.next().expect("there is something to send");
    setup.answered(&sent, &[answer(Some(100), None, Verdict::Ok), answer(Some(200), None, Verdict::Ok)]);
    setup.now = setup.forwarder.next_deadline().expect("the parent is asked later");
    let poll = setup.next().expect("the parent is asked");
    setup.answered(&poll, &[answer(Some(0), Some(0), Verdict::Ok)]);
    let again = setup.next().expect("it is sent again");
    assert_eq!(ranges(&setup.held, &again), [(0, 100), (100, 200)]);
}

#[test]
fn an_answer_to_an_old_question_does_not_send_back() {
    let mut setup = Setup::with_batches(1);
    let sent = setup.next().expect("there is something to send");
    setup.answered(&sent, &[answer(Some(100), None, Verdict::Ok)]);
    setup.now = setup.forwarder.next_deadline().expect("the parent is asked later");
    let poll = setup.next().expect("the parent is asked");
    setup.held.offer(S, 100, 200, 0);
    setup.notice();
    let sent = setup.next().expect("there is more to send");
    setup.answered(&sent, &[answer(Some(200), None, Verdict::Ok)]);
    setup.answered(&poll, &[answer(Some(100), None, Verdict::Ok)]);
    assert_eq!(setup.next(), None);
}

#[test]
fn the_last_word_about_a_stream_is_passed_on() {
    for verdict in
        [Verdict::Unknown, Verdict::Diverged { history: vec![at(0)] }, Verdict::Refused { reason: "no".into() }]
    {
        let mut setup = Setup::with_batches(2);
        let sent = setup.next().expect("there is something to send");
        let answers = [answer(Some(100), None, Verdict::Ok), answer(None, None, verdict.clone())];
        assert_eq!(setup.answered(&sent, &answers), [Effect::Ended { stream: S, verdict }]);
    }
}

#[test]
fn a_question_decides_nothing_for_good() {
    let mut setup = Setup::with_batches(1);
    let sent = setup.next().expect("there is something to send");
    setup.answered(&sent, &[answer(Some(100), None, Verdict::Ok)]);
    setup.now = setup.forwarder.next_deadline().expect("the parent is asked later");
    let poll = setup.next().expect("the parent is asked");
    assert_eq!(setup.answered(&poll, &[answer(None, None, Verdict::Unknown)]), []);
    assert!(setup.next().is_some(), "what is held is offered again: it may begin at the stream's base");
}

#[test]
fn a_parent_that_wants_committed_bytes_again_is_an_alarm_and_not_obeyed() {
    let mut setup = Setup::with_batches(3);
    setup.held.runs.get_mut(&S).expect("is there").commit(at(100));
    let sent = setup.next().expect("there is something to send");
    let back = answer(Some(50), None, Verdict::Expected);
    let effects = setup.answered(&sent, &[back.clone(), back]);
    assert_eq!(effects, [Effect::Alarm { stream: S, expected: 50, committed: 100 }]);
    assert_eq!(setup.next(), None, "it rests");
}

#[test]
fn one_bad_batch_is_found_among_good_ones() {
    let mut setup = Setup::with_batches(2);
    let other = StreamId(2);
    setup.held.offer(other, 0, 10, 0);
    setup.forwarder.notice(setup.now, other, LaneId(0), &setup.held);
    let rejected = Failure::Rejected { error: "batch 1 is bad".into() };
    let mut ended = Vec::new();
    let mut good = 0;
    while let Some(sent) = setup.next() {
        if matches!(sent.ask, Ask::Positions(_)) {
            break;
        }
        let ranges = ranges(&setup.held, &sent);
        if ranges.contains(&(0, 10)) {
            ended.extend(setup.failed(&sent, &rejected));
        } else {
            good += ranges.len();
            let answers: Vec<Answer> = ranges.iter().map(|range| answer(Some(range.1), None, Verdict::Ok)).collect();
            setup.answered(&sent, &answers);
        }
    }
    assert_eq!(ended, [Effect::Ended { stream: other, verdict: Verdict::Refused { reason: "batch 1 is bad".into() } }]);
    assert_eq!(good, 2);
}

#[test]
fn what_a_failed_request_held_is_sent_again_by_another_node() {
    let mut setup = Setup::with_batches(1);
    let first = setup.next().expect("there is something to send");
    assert_eq!(setup.failed(&first, &Failure::Trouble(Trouble::Broken)), []);
    let second = setup.next().expect("it is sent again");
    assert_eq!((first.node, second.node), (0, 1));
    assert_eq!(first.ask, second.ask);
}

#[test]
fn answers_that_are_not_to_the_question_are_trouble() {
    let mut setup = Setup::with_batches(2);
    let sent = setup.next().expect("there is something to send");
    assert_eq!(setup.answered(&sent, &[answer(Some(100), Some(200), Verdict::Ok)]), []);
    assert_eq!(setup.held.runs[&S].committed(), at(0));
    assert_eq!(setup.next().expect("it is sent again").node, 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Children, this node and parents all follow the one rule; parents lose their spools, requests and answers get lost,
    /// nodes are full. In the end every byte is committed above, and the parents have been offered no gap.
    #[test]
    fn everything_gets_up_in_the_end(seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let ids: Vec<StreamId> = (0..3).map(StreamId).collect();
        let mut held = Held::default();
        let mut forwarder = Forwarder::new(
            ForwardLimits { request_bytes: 250, requests_in_flight: 2, ..ForwardLimits::default() },
            &[endpoints(2)],
        );
        let mut now = Instant::now();
        let mut parents = [Held::default(), Held::default()];
        // What is durable on the sink, which only grows; both parents see the same.
        let mut sink: BTreeMap<StreamId, u64> = ids.iter().map(|id| (*id, 0)).collect();
        let mut ends: BTreeMap<StreamId, u64> = sink.clone();
        let mut told: BTreeMap<StreamId, u64> = sink.clone();
        let mut under_way: Vec<Outgoing> = Vec::new();
        for step in 0..3000_u32 {
            let calm = step > 400;
            while let Some(outgoing) = forwarder.next_request(now, &held) {
                under_way.push(outgoing);
            }
            // Who waits for the deadline must not wake up again and again for nothing.
            prop_assert!(forwarder.next_deadline().is_none_or(|deadline| deadline > now), "there is nothing to do now");
            match rng.random_range(0..10) {
                // A child sends more, or the same again.
                0..=2 if !calm => {
                    let id = ids[rng.random_range(0..ids.len())];
                    let reached = held.runs.get(&id).map_or(told[&id], |run| run.next().offset);
                    let start = rng.random_range(told[&id]..=reached.max(told[&id]));
                    let end = start + rng.random_range(1..120);
                    held.offer(id, start, end, told[&id]);
                    ends.insert(id, held.runs[&id].next().offset);
                    told.insert(id, held.runs[&id].committed().offset);
                    forwarder.notice(now, id, LaneId(0), &held);
                }
                // A parent's spool becomes durable, or is lost.
                3 => {
                    let parent = &parents[rng.random_range(0..2)];
                    for (id, run) in &parent.runs {
                        let at = sink.get_mut(id).expect("known");
                        prop_assert!(run.committed().offset <= *at, "nobody commits what the sink has not");
                        *at = (*at).max(run.next().offset);
                    }
                }
                4 if !calm => parents[rng.random_range(0..2)] = Held::default(),
                // Something else is asked of the same nodes, such as to take reports.
                5 if !calm => {
                    if let Some((node, _)) = forwarder.node(0, now) {
                        let failure = rng.random_bool(0.5).then_some(Failure::Trouble(Trouble::Broken));
                        forwarder.asked(now, 0, node, failure.as_ref(), rng.random());
                    }
                    now += Duration::from_millis(rng.random_range(0..3000));
                }
                _ if !under_way.is_empty() => {
                    let outgoing = under_way.swap_remove(rng.random_range(0..under_way.len()));
                    let fate = if calm { 9 } else { rng.random_range(0..10) };
                    let trouble = match fate {
                        0 | 1 => Some(Trouble::Broken),
                        2 => Some(Trouble::Busy(Some(Duration::from_secs(1)))),
                        _ => None,
                    };
                    // The parent may have taken all of it, and its answer is lost.
                    let effects = if trouble.is_none() || fate == 1 {
                        let parent = &mut parents[outgoing.node];
                        let mut answers = Vec::new();
                        match &outgoing.ask {
                            Ask::Batches(parts) => for part in parts {
                                let id = part.stream;
                                for place in &part.places {
                                    let (_, start, end) = held.batches[place];
                                    let offer = parent.offer(id, start.offset, end.offset, part.committed.offset);
                                    let run = parent.runs.get_mut(&id).expect("there is a run");
                                    run.commit(at(sink[&id].min(run.next().offset)));
                                    let verdict = if offer == Offer::Beyond { Verdict::Expected } else { Verdict::Ok };
                                    answers.push(Answer {
                                        stream: id, next: Some(run.next()), committed: Some(run.committed()), owner: None, verdict,
                                    });
                                }
                            },
                            Ask::Positions(streams) => for (id, committed) in streams {
                                let run = parent.runs.entry(*id).or_insert_with(|| Run::begin(*committed));
                                run.commit(*committed);
run.commit(at(sink[id].min(run.next().offset)));
                                answers.push(Answer {
                                    stream: *id, next: Some(run.next()), committed: Some(run.committed()), owner: None,
                                    verdict: Verdict::Ok,
                                });
                            },
                        }
                        match trouble {
                            None => forwarder.answered(now, outgoing.id, &answers, &held, rng.random()),
                            Some(trouble) => forwarder.failed(now, outgoing.id, &Failure::Trouble(trouble), &held, rng.random()),
                        }
                    } else {
                        let failure = Failure::Trouble(trouble.unwrap_or(Trouble::Broken));
                        forwarder.failed(now, outgoing.id, &failure, &held, rng.random())
                    };
                    prop_assert!(effects.iter().all(|effect| matches!(effect, Effect::Committed { .. })), "{effects:?}");
                    held.apply(&effects);
                }
                _ => {
                    if let Some(deadline) = forwarder.next_deadline() {
                        now = now.max(deadline);
                    }
                }
            }
        }
        for (id, end) in ends {
            prop_assert_eq!(sink[&id], end, "{} of {} bytes of {} got up", sink[&id], end, id);
            if let Some(run) = held.runs.get(&id) {
                prop_assert!(run.is_empty(), "{id} still holds {run:?}");
            }
        }
    }
}

#[test]
fn the_end_of_a_pause_wakes_nobody_while_no_more_requests_may_be_made() {
    let limits = ForwardLimits { requests_in_flight: 2, small_request_bytes: 0, ..ForwardLimits::default() };
    let mut forwarder = Forwarder::new(limits, &[endpoints(1)]);
    let (mut held, mut now) = (Held::default(), Instant::now());
    for id in (0..3).map(StreamId) {
        held.offer(id, 0, 10, 0);
        forwarder.notice(now, id, LaneId(0), &held);
        let asked = forwarder.next_request(now, &held);
        assert_eq!(asked.is_some(), id.0 < 2);
    }
    // Something else that was asked of the node failed, and more of it wants to be asked.
    forwarder.asked(now, 0, 0, Some(&Failure::Trouble(Trouble::Broken)), 0);
    assert_eq!(forwarder.node(0, now), None, "the route has a pause");
    now += Duration::from_millis(500);
    assert_eq!(forwarder.next_request(now, &held), None);
    assert!(forwarder.next_deadline().is_none_or(|deadline| deadline > now), "there is nothing to do before an answer");
}

#[test]
fn a_redirect_is_followed_and_remembered_for_the_lane_only() {
    let mut held = Held::default();
    let other = StreamId(2);
    let mut forwarder = Forwarder::new(ForwardLimits::default(), &[endpoints(3), endpoints(3)]);
    held.offer(S, 0, 100, 0);
    held.offer(other, 0, 100, 0);
    forwarder.notice(Instant::now(), S, LaneId(0), &held);
    forwarder.notice(Instant::now(), other, LaneId(1), &held);
    let now = Instant::now();
    let first = forwarder.next_request(now, &held).expect("there is something to send");
    let second = forwarder.next_request(now, &held).expect("there is something to send");
    assert_eq!((first.route, first.node, second.route, second.node), (0, 0, 1, 0));
    let moved = Failure::Moved(endpoints(3)[2].clone());
    assert_eq!(forwarder.failed(now, first.id, &moved, &held, 0), []);
    let again = forwarder.next_request(now, &held).expect("the same again");
    assert_eq!((again.route, again.node, &again.ask), (0, 2, &first.ask));
    forwarder.answered(now, again.id, &[answer(Some(100), Some(0), Verdict::Ok)], &held, 0);
    held.offer(S, 100, 200, 0);
    forwarder.notice(Instant::now(), S, LaneId(0), &held);
    let much_later = now + Duration::from_secs(86_400);
    let next = std::iter::from_fn(|| forwarder.next_request(much_later, &held));
    let nodes: Vec<_> = next.map(|outgoing| (outgoing.route, outgoing.node)).collect();
    assert!(nodes.contains(&(0, 2)), "{nodes:?}");
    assert_eq!(forwarder.health().collect::<Vec<_>>(), [(2, 0), (0, 0)]);
}

#[test]
fn a_redirect_to_a_node_that_is_not_in_the_topology_is_not_followed() {
    let mut held = Held::default();
    let mut forwarder = forwarder(2);
    held.offer(S, 0, 100, 0);
    forwarder.notice(Instant::now(), S, LaneId(0), &held);
    let now = Instant::now();
    let first = forwarder.next_request(now, &held).expect("there is something to send");
    let moved = Failure::Moved(Endpoint::at("evil.example:1").expect("valid"));
    forwarder.failed(now, first.id, &moved, &held, 0);
    assert_eq!(forwarder.next_request(now, &held).expect("the other one is tried").node, 1);
}

#[test]
fn a_node_that_is_being_emptied_is_left_at_once_and_without_a_failure() {
    let mut held = Held::default();
    let mut forwarder = forwarder(2);
    held.offer(S, 0, 100, 0);
    forwarder.notice(Instant::now(), S, LaneId(0), &held);
    let now = Instant::now();
    let first = forwarder.next_request(now, &held).expect("there is something to send");
    forwarder.failed(now, first.id, &Failure::Declined(Some(Duration::from_secs(5))), &held, 0);
    assert_eq!(forwarder.next_request(now, &held).expect("the other one is asked at once").node, 1);
    assert_eq!(forwarder.health().next(), Some((1, 0)));
}

#[test]
fn connections_are_made_anew_when_they_are_old_also_when_there_is_always_something_to_send() {
    let mut held = Held::default();
    let limits = ForwardLimits { request_bytes: 100, small_request_bytes: 0, ..ForwardLimits::default() };
    let age = limits.pool.max_connection_age;
    let mut forwarder = Forwarder::new(limits, &[endpoints(1)]);
    for stream in 1..=2 {
        held.offer(StreamId(stream), 0, 100, 0);
        forwarder.notice(Instant::now(), StreamId(stream), LaneId(0), &held);
    }
    let now = Instant::now();
    let reconnects = |forwarder: &mut Forwarder, at: Instant, held: &Held| {
        forwarder.next_request(at, held).expect("there is something to send").reconnect
    };
    assert!(reconnects(&mut forwarder, now, &held), "the first one connects");
    // The first request is under way all the while.
    assert!(reconnects(&mut forwarder, now + 2 * age, &held));
}

#[test]
fn what_the_parent_has_already_is_asked_about_until_it_is_committed() {
    let mut setup = Setup::with_batches(1);
    let sent = setup.next().expect("there is something to send");
    setup.answered(&sent, &[answer(Some(100), Some(0), Verdict::Ok)]);
    // The batch can't be read any more; nothing is held for a while, and then its sender brings it again.
    let held = std::mem::take(&mut setup.held);
    setup.now += Duration::from_secs(60);
    assert_eq!(setup.next(), None);
    setup.held = held;
    setup.notice();
    setup.now += Duration::from_secs(60);
    let asked = setup.next().expect("it is asked about");
    assert!(matches!(asked.ask, Ask::Positions(_)), "{asked:?}");
}
