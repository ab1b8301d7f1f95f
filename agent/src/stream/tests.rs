//! A file that is written, emptied and restored, two edges that lose what they hold, a root, and requests that get lost:
//! whatever the order, the root has each line once in the end.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use tributary_common::ids::StreamId;
use tributary_common::position::TAIL_WINDOW_BYTES;

use super::*;

const LINE_BYTES: usize = 8;

fn at(bytes: &[u8], offset: usize) -> Position {
    Position { offset: offset as u64, tail: TailHash::of(&bytes[offset.saturating_sub(TAIL_WINDOW_BYTES)..offset]) }
}

/// A batch: its bytes, and where they are.
#[derive(Debug, Clone)]
struct Batch {
    stream: u128,
    base: Position,
    committed: Position,
    start: Position,
    end: Position,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct RootStream {
    base: usize,
    bytes: Vec<u8>,
    committed: Position,
    ends: BTreeMap<u64, TailHash>,
}

impl RootStream {
    fn next(&self) -> Position {
        let (offset, tail) = self.ends.last_key_value().expect("the base at least");
        Position { offset: *offset, tail: *tail }
    }
}

/// The root, by the rule that holds in every tier.
#[derive(Debug, Default)]
struct Root {
    streams: HashMap<u128, RootStream>,
}

impl Root {
    fn take(&mut self, batch: &Batch) -> Answer {
        if let std::collections::hash_map::Entry::Vacant(new) = self.streams.entry(batch.stream) {
            if batch.start != batch.base {
                return answer(batch.stream, None, None, Verdict::Unknown);
            }
            new.insert(RootStream {
                base: batch.base.offset as usize,
                bytes: Vec::new(),
                committed: batch.base,
                ends: BTreeMap::from([(batch.base.offset, batch.base.tail)]),
            });
        }
        let stream = self.streams.get_mut(&batch.stream).expect("made just now");
        let next = stream.next();
        let verdict = if batch.start.offset > next.offset {
            Verdict::Expected
        } else {
            let differs = |at: &Position| stream.ends.get(&at.offset).is_some_and(|tail| *tail != at.tail);
            let from = (batch.start.offset as usize).max(stream.base) - stream.base;
            let known = &stream.bytes[from..];
            let offered = &batch.bytes[(from + stream.base) - batch.start.offset as usize..];
            let common = known.len().min(offered.len());
            if differs(&batch.start) || differs(&batch.end) || known[..common] != offered[..common] {
                if next == stream.committed {
                    let history = stream.ends.iter().rev().take(16);
                    let history = history.map(|(&offset, &tail)| Position { offset, tail }).collect();
                    Verdict::Diverged { history }
                } else {
                    Verdict::Wait { reason: "not durable yet".into() }
                }
            } else {
                if batch.end.offset > next.offset {
                    stream.bytes.extend_from_slice(&offered[common..]);
                    stream.ends.insert(batch.end.offset, batch.end.tail);
                }
                Verdict::Ok
            }
        };
        let (next, committed) = (stream.next(), stream.committed);
        answer(batch.stream, Some(next), Some(committed), verdict)
    }

    fn query(&self, stream: u128, claimed: Option<Position>) -> Answer {
        let Some(known) = self.streams.get(&stream) else { return answer(stream, None, None, Verdict::Unknown) };
        let verdict = match claimed {
            Some(claimed) if claimed.offset > known.next().offset => Verdict::Expected,
            _ => Verdict::Ok,
        };
        answer(stream, Some(known.next()), Some(known.committed), verdict)
    }

    fn commit(&mut self) {
        for stream in self.streams.values_mut() {
            stream.committed = stream.next();
        }
    }
}

fn answer(stream: u128, next: Option<Position>, committed: Option<Position>, verdict: Verdict) -> Answer {
    Answer { stream: StreamId(stream), next, committed, owner: None, verdict }
}

#[derive(Debug)]
struct Held {
    committed: Position,
    batches: VecDeque<Batch>,
}

impl Held {
    fn end(&self) -> Position {
        self.batches.back().map_or(self.committed, |batch| batch.end)
    }

    fn learn(&mut self, committed: Position) {
        if committed.offset > self.committed.offset {
            self.committed = committed;
            self.batches.retain(|batch| batch.end.offset > committed.offset);
        }
    }
}

/// An edge, by the same rule.
#[derive(Debug, Default)]
struct Edge {
    spool: HashMap<u128, Held>,
    /// What the root refused for good.
    refused: HashMap<u128, Answer>,
}

impl Edge {
    fn take(&mut self, batch: &Batch) -> Answer {
        if let Some(refused) = self.refused.remove(&batch.stream) {
            return refused;
        }
        let held = self
            .spool
            .entry(batch.stream)
            .or_insert_with(|| Held { committed: batch.committed, batches: VecDeque::new() });
        held.learn(batch.committed);
        let end = held.end();
        let verdict = if batch.start.offset > end.offset { Verdict::Expected } else { Verdict::Ok };
        if batch.start.offset <= end.offset && batch.end.offset > end.offset {
            held.batches.push_back(batch.clone());
        }
        answer(batch.stream, Some(held.end()), Some(held.committed), verdict)
    }

    fn query(&mut self, stream: u128, claimed: Option<Position>, root: &Root) -> Answer {
        if let Some(refused) = self.refused.remove(&stream) {
            return refused;
        }
        match self.spool.get(&stream).filter(|held| !held.batches.is_empty()) {
            Some(held) => answer(stream, Some(held.end()), Some(held.committed), Verdict::Ok),
            None => root.query(stream, claimed),
        }
    }

    fn forward(&mut self, root: &mut Root) {
        for (stream, held) in &mut self.spool {
            let mut at = 0;
            while let Some(batch) = held.batches.get(at) {
                let answer = root.take(batch);
                match answer.verdict {
                    Verdict::Ok => at += 1,
                    Verdict::Wait { .. } => break,
                    _ => {
                        self.refused.insert(*stream, answer);
                        held.batches.clear();
                        break;
                    }
                }
                if let Some(committed) = answer.committed {
                    let before = held.batches.len();
                    held.learn(committed);
                    at -= (before - held.batches.len()).min(at);
                }
            }
        }
        let refused = &self.refused;
        self.spool.retain(|stream, _| !refused.contains_key(stream));
    }
}

#[derive(Debug, Clone)]
enum Event {
    Append(usize),
    Empty,
    Restore(usize),
    Read(usize),
    Check,
    Send(usize, Fate),
    Ask(Fate),
    Forward,
    Commit,
    Switch,
    Lose(usize),
    Restart,
    RestartWithoutCheckpoint,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Answered,
    AnswerLost,
    Lost,
}

fn event() -> impl Strategy<Value = Event> {
    let fate = || prop_oneof![6 => Just(Fate::Answered), 1 => Just(Fate::AnswerLost), 1 => Just(Fate::Lost)];
    prop_oneof![
        6 => (1_usize..300).prop_map(Event::Append),
        1 => Just(Event::Empty),
        1 => (0_usize..100).prop_map(Event::Restore),
        10 => (1_usize..200).prop_map(Event::Read),
        6 => Just(Event::Check),
        10 => (1_usize..4, fate()).prop_map(|(count, fate)| Event::Send(count, fate)),
        4 => fate().prop_map(Event::Ask),
        5 => Just(Event::Forward),
        3 => Just(Event::Commit),
        1 => Just(Event::Switch),
        1 => (0_usize..2).prop_map(Event::Lose),
        1 => Just(Event::Restart),
        1 => Just(Event::RestartWithoutCheckpoint),
    ]
}

struct World {
    file: Vec<u8>,
    written: u32,
    stream: Stream<Batch>,
    /// The name of the stream: the incarnation.
    name: u128,
    root: Root,
    edges: [Edge; 2],
    edge: usize,
    /// The one position that is named in a checkpoint, with where the stream began and its history.
    checkpoint: (Position, Position, Vec<Position>),
    /// Lines that may be missing, since the file lost them; and that may be there twice.
    may_miss: Vec<u32>,
    may_double: Vec<u32>,
    /// Which stream was promised to bring all that the file had, and what that was; as long as it is not committed so far.
    promises: Vec<(u128, Vec<u8>)>,
    /// Lines that were not there when such a promise counted as kept: they must have been lost.
    must_miss: Vec<u32>,
    /// Whether the database was lost that said that the present stream isn't new.
    has_forgotten: bool,
}

fn numbers(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks(LINE_BYTES)
        .map(|line| std::str::from_utf8(line).expect("text").trim().parse().expect("a number"))
        .collect()
}

impl World {
    fn new() -> Self {
        let zero = Position::zero();
        Self {
            file: Vec::new(),
            written: 0,
            stream: Stream::unknown(zero),
            name: 0,
            root: Root::default(),
            edges: Default::default(),
            edge: 0,
            checkpoint: (zero, zero, Vec::new()),
            may_miss: Vec::new(),
            may_double: Vec::new(),
            promises: Vec::new(),
            must_miss: Vec::new(),
            has_forgotten: false,
        }
    }

    fn append(&mut self, lines: usize) {
        for _ in 0..lines {
            self.file.extend_from_slice(format!("{:07}\n", self.written).as_bytes());
            self.written += 1;
        }
    }

    fn restore(&mut self, percent: usize) {
        let len = self.file.len() / LINE_BYTES * percent / 100 * LINE_BYTES;
        let known = self.stream.history().chain([self.stream.committed(), self.stream.base()]);
        let common = known.map(|at| at.offset as usize).filter(|at| *at <= len).max().unwrap_or(0);
        self.may_double.extend(numbers(&self.file[common..len]));
        self.may_miss.extend(numbers(&self.file[len..]));
        self.file.truncate(len);
        self.append(1);
    }

    /// Does what the stream wants of the file.
    fn look(&mut self, lines: usize) {
        if let Some(position) = self.stream.commit_to_check() {
            let matches = self.has(&position);
            self.stream.commit_checked(position, matches);
        }
        match self.stream.want() {
            Want::Read(from) if !self.has(&from) => {
                self.stream.has_read(self.stream.generation(), from, ReadShowed::OtherBytes);
            }
            Want::Read(from) => {
                let start = from.offset as usize;
                let end = (start + lines * LINE_BYTES).min(self.file.len());
                if end > start {
                    let end = at(&self.file, end);
                    let generation = self.stream.generation();
                    assert!(self.stream.has_read(generation, from, ReadShowed::Batch(end)));
                    let batch = Batch {
                        stream: self.name,
                        base: self.stream.base(),
                        committed: self.stream.committed(),
                        start: from,
                        end,
                        bytes: self.file[start..end.offset as usize].to_vec(),
                    };
                    assert!(self.stream.has_packed(generation, end, batch).is_none());
                }
            }
            Want::Check(positions) => {
                let matching: Vec<_> = positions.into_iter().filter(|position| self.has(position)).collect();
                self.stream.checked(&matching);
            }
            Want::Replace(base) => {
                let history: Vec<_> = self.stream.history().filter(|at| at.offset <= base.offset).collect();
                let generation = self.stream.generation() + 1;
                self.name += 1;
                self.stream = Stream::unknown(base).with_history(history);
                self.stream.begin_generation(generation);
                self.has_forgotten = false;
            }
            Want::Ask | Want::Send => {}
            Want::Stopped(reason) => panic!("it stopped: {reason}"),
        }
        self.save();
    }

    fn has(&self, position: &Position) -> bool {
        position.offset as usize <= self.file.len() && at(&self.file, position.offset as usize) == *position
    }

    fn save(&mut self) {
        self.checkpoint = (self.stream.base(), self.stream.committed(), self.stream.history().collect());
    }

    fn send(&mut self, count: usize, fate: Fate) {
        let batches: Vec<_> = self.stream.sendable().filter_map(|piece| piece.batch.clone()).take(count).collect();
        if batches.is_empty() {
            return;
        }
        // What is committed by now travels with each batch.
        let committed = self.stream.committed();
        let batches: Vec<_> = batches.into_iter().map(|batch| Batch { committed, ..batch }).collect();
        let generation = self.stream.generation();
        self.stream.sent(batches.len());
        let answers: Vec<_> = match fate {
            Fate::Lost => Vec::new(),
            _ => batches.iter().map(|batch| self.edges[self.edge].take(batch)).collect(),
        };
        if fate == Fate::Answered {
            for (batch, answer) in batches.iter().zip(answers) {
                self.stream.answered(generation, batch.end, &answer);
            }
            self.save();
        } else {
            self.stream.not_answered(generation);
        }
    }

    fn ask(&mut self, fate: Fate) {
        let wanted = self.stream.is_asking() || self.stream.is_waiting_for_commit();
        if wanted && !self.stream.is_in_flight() && fate == Fate::Answered {
            let claimed = (!self.stream.is_asking()).then(|| self.stream.committed());
            let answer = self.edges[self.edge].query(self.name, claimed, &self.root);
            self.stream.told(&answer);
            self.save();
        }
    }

    fn restart(&mut self, with_checkpoint: bool) {
        let generation = self.stream.generation() + 1;
        let (base, committed, history) = self.checkpoint.clone();
        self.stream = if with_checkpoint {
            Stream::known(base, committed).with_history(history)
        } else {
            self.has_forgotten = true;
            Stream::unknown(Position::zero())
        };
        self.stream.begin_generation(generation);
    }

    /// Promises all that the file has, where that is read.
    fn promise(&mut self) {
        let (promised, read) = (self.stream.promised().offset as usize, self.stream.read());
        let is_there = self.stream.is_following() && self.has(&read) && promised >= self.file.len();
        if is_there && !self.has_forgotten {
            self.promises.push((self.name, self.file.clone()));
        }
        self.settle_promises();
    }

    /// As the lane's owner does it: it compares offsets.
    fn settle_promises(&mut self) {
        let committed = |name: &u128| self.root.streams.get(name).map_or(0, |stream| stream.committed.offset as usize);
        let (kept, waiting) =
            std::mem::take(&mut self.promises).into_iter().partition(|(name, file)| committed(name) >= file.len());
        self.promises = waiting;
        let kept: Vec<(u128, Vec<u8>)> = kept;
        if !kept.is_empty() {
            let there: HashSet<u32> = self.root.streams.values().flat_map(|stream| numbers(&stream.bytes)).collect();
            let promised = kept.iter().flat_map(|(_, file)| numbers(file));
            self.must_miss.extend(promised.filter(|number| !there.contains(number)));
        }
    }

    fn happen(&mut self, event: &Event) {
        match *event {
            Event::Append(lines) => self.append(lines),
            Event::Empty => {
                self.may_miss.extend(numbers(&self.file));
                self.file.clear();
                self.append(1);
            }
            Event::Restore(percent) => self.restore(percent),
            Event::Read(lines) => self.look(lines),
            Event::Check => self.look(1),
            Event::Send(count, fate) => self.send(count, fate),
            Event::Ask(fate) => self.ask(fate),
            Event::Forward => self.edges.iter_mut().for_each(|edge| edge.forward(&mut self.root)),
            Event::Commit => self.root.commit(),
            Event::Switch => self.edge = 1 - self.edge,
            Event::Lose(edge) => self.edges[edge] = Edge::default(),
            Event::Restart => self.restart(true),
            // The name of a later incarnation is found again by asking for each in turn, which is not done here.
            Event::RestartWithoutCheckpoint if self.name == 0 && self.may_miss.is_empty() => self.restart(false),
            Event::RestartWithoutCheckpoint => self.restart(true),
        }
    }

    fn is_done(&self) -> bool {
        let all = self.stream.committed().offset as usize == self.file.len() && self.has(&self.stream.committed());
        all && !self.stream.is_asking() && matches!(self.stream.want(), Want::Read(_))
    }

    /// Without faults, all is committed after a number of steps.
    fn settle(&mut self) {
        for _ in 0..20_000 {
            if self.is_done() {
                return;
            }
            self.look(1000);
            self.send(4, Fate::Answered);
            self.ask(Fate::Answered);
            self.happen(&Event::Forward);
            self.root.commit();
        }
        panic!(
            "it never ends: {} of {} bytes are committed: {:?}",
            self.stream.committed().offset,
            self.file.len(),
            self.stream.state()
        );
    }

    fn judge(&self) {
        let mut count = vec![0_u32; self.written as usize];
        for stream in self.root.streams.values() {
            for number in numbers(&stream.bytes) {
                count[number as usize] += 1;
            }
        }
        for (number, count) in (0_u32..).zip(count) {
            match count {
                0 => assert!(self.may_miss.contains(&number), "line {number} is missing"),
                1 => {}
                _ => assert!(self.may_double.contains(&number), "line {number} is there {count} times"),
            }
            let is_late = count > 0 && self.must_miss.contains(&number);
            assert!(!is_late, "line {number} came after an hour for which it was promised might have been closed");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(2000), ..ProptestConfig::default() })]

    #[test]
    fn each_line_is_committed_once(events in proptest::collection::vec(event(), 1..120)) {
        let mut world = World::new();
        for event in &events {
            world.happen(event);
            world.promise();
        }
        world.settle();
        world.judge();
    }
}

#[test]
fn what_is_below_committed_is_refused_and_an_alarm() {
    let mut stream: Stream<Batch> = Stream::known(Position::zero(), at(&[b'x'; 100], 50));
    stream.has_read(0, stream.read(), ReadShowed::Batch(at(&[b'x'; 100], 60)));
    let asked = answer(0, Some(at(&[b'x'; 100], 20)), None, Verdict::Expected);
    let notes = stream.answered(0, at(&[b'x'; 100], 60), &asked);
    assert!(matches!(notes[..], [Note::Alarm { .. }]), "{notes:?}");
    assert_eq!(stream.committed().offset, 50);
    assert_eq!(stream.want(), Want::Read(stream.committed()));
}

#[test]
fn committed_is_believed_only_where_the_file_has_the_same_bytes() {
    let file = vec![b'x'; 100];
    let mut stream: Stream<Batch> = Stream::known(Position::zero(), Position::zero());
    stream.has_read(0, Position::zero(), ReadShowed::Batch(at(&file, 100)));
    let other = Position { tail: TailHash(1), ..at(&file, 100) };
    let notes = stream.answered(0, at(&file, 100), &answer(0, Some(other), Some(other), Verdict::Ok));
    assert_eq!(notes[0], Note::Diverged);
    assert_eq!(stream.committed().offset, 0);
    assert!(matches!(stream.want(), Want::Check(_)));
}

fn read(stream: &mut Stream<Batch>, file: &[u8], to: usize) {
    assert!(stream.has_read(stream.generation(), stream.read(), ReadShowed::Batch(at(file, to))));
}

#[test]
fn what_was_read_is_promised_of_a_new_stream_and_only_what_is_committed_where_others_may_hold_other_bytes() {
    let file = vec![b'x'; 300];
    let promised = |stream: &Stream<Batch>| stream.promised().offset;
    let ok = |next, committed| answer(0, Some(at(&file, next)), Some(at(&file, committed)), Verdict::Ok);

    // By a run before.
    let mut known: Stream<Batch> = Stream::known(Position::zero(), at(&file, 50));
    read(&mut known, &file, 60);
    known.answered(known.generation(), at(&file, 60), &ok(60, 60));
    read(&mut known, &file, 100);
    assert_eq!(promised(&known), 60);

    let mut new: Stream<Batch> = Stream::unknown(Position::zero());
    new.told(&answer(0, None, None, Verdict::Unknown));
    read(&mut new, &file, 100);
    assert_eq!(promised(&new), 100);
    // By this run: an aggregator may hold what was sent before it went back, and the file may have been cut off since.
    let expected = answer(0, Some(at(&file, 0)), Some(at(&file, 0)), Verdict::Expected);
    read(&mut new, &file, 120);
    new.answered(new.generation(), at(&file, 100), &ok(100, 0));
    new.answered(new.generation(), at(&file, 120), &expected);
    assert_eq!((promised(&new), new.want()), (0, Want::Read(Position::zero())));
    read(&mut new, &file, 110);
    new.answered(new.generation(), at(&file, 110), &ok(110, 110));
    read(&mut new, &file, 130);
    assert_eq!(promised(&new), 110);
    new.answered(new.generation(), at(&file, 130), &ok(130, 130));
    read(&mut new, &file, 200);
    assert_eq!(promised(&new), 200, "nobody was sent more than 120 before");

    // And where one says so.
    let other = Position { tail: TailHash(1), ..at(&file, 200) };
    new.answered(new.generation(), at(&file, 200), &answer(0, Some(other), Some(at(&file, 130)), Verdict::Ok));
    read(&mut new, &file, 220);
    assert_eq!(promised(&new), 130);
}

#[test]
fn a_file_that_was_cut_off_below_what_was_promised_does_not_bring_it_any_more() {
    let file = vec![b'x'; 300];
    let mut stream: Stream<Batch> = Stream::known(Position::zero(), at(&file, 50));
    assert!(stream.may_reach(200, 200), "it is there to be read");
    assert!(!stream.may_reach(201, 200), "it is shorter, and what it has is followed");
    read(&mut stream, &file, 250);
    assert!(stream.may_reach(250, 200), "it is read, and on its way");
    assert!(!stream.may_reach(251, 200));
    stream.has_read(stream.generation(), at(&file, 250), ReadShowed::OtherBytes);
    assert!(stream.may_reach(251, 200), "what was read of it is waited for; then it makes room for another stream");
}

#[test]
fn old_positions_are_remembered_sparsely() {
    let mut stream: Stream<Batch> = Stream::known(Position::zero(), Position::zero());
    for offset in 1..=100_000 {
        stream.commit(Position { offset: offset * 100, tail: TailHash(offset) }, &mut Vec::new());
    }
    let history: Vec<_> = stream.history().map(|position| position.offset).collect();
    assert_eq!(history.len(), HISTORY_LEN);
    for back in [300, 3000, 30_000, 300_000, 3_000_000] {
        let wanted = 10_000_000 - back;
        let common = history.iter().rev().find(|offset| **offset <= wanted).expect("there is one");
        assert!(wanted - common <= back, "restored to {wanted}, common to {common}");
    }
}
