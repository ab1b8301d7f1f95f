//! One stream: what was read, sent, accepted and committed of it, and what to do next. Pure: no clock, no file, no
//! socket.
//!
//! ```text
//!   base        committed          accepted             read            size of the file
//! ---|--------------|------------------|------------------|----------------|
//!      may be         held upstream,     in `queue`: being  still to read
//!      forgotten      not yet durable    packed or sent
//! ```
//!
//! The file is the buffer: bytes between `committed` and `read` are not kept, they are read again when that is
//! needed. Whatever is said upstream is believed only as far as this file shows it: a position that is told comes with
//! the hash of the bytes before it, and the stream moves there only after its own file has the same bytes there.
//!
//! # What is answered to what it hears
//!
//! | Heard | Done |
//! |---|---|
//! | taken | the piece leaves the queue; where more is known upstream, the stream skips ahead, after a look into the file |
//! | expected X | goes back (or ahead) to X; below the own `committed`: refused, an alarm, and asked again later |
//! | wait | what is queued is dropped and read again later, a piece at a time until one is taken |
//! | diverged | the highest position that both sides have in common is looked for; when it is committed, a new incarnation begins there |
//! | unknown | with something committed: a new incarnation begins there; else all is sent again from the base |
//! | refused | the stream stops and says why |
//! | committed C | believed when a batch ended there with that hash, or after a look into the file; else diverged |
//!
//! When the file itself turns out to hold other bytes than before (truncated, overwritten), what is already packed is
//! still sent, and then it is as if the stream had been told that it diverged.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use tributary_common::messages::{Answer, Verdict};
use tributary_common::position::{Position, TailHash};

/// Most batch ends that are remembered above `committed`. Where there are more, every other one of the older half is
/// forgotten; a look into the file takes its place.
const MAX_ENDS: usize = 4096;

/// Committed batch ends that are remembered: where a file was restored from a copy, the common part ends at one of them.
const HISTORY_LEN: usize = 16;

/// What the stream wants next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    /// To ask upstream what is known of it, before anything else.
    Ask,
    /// To read on from here.
    Read(Position),
    /// To know at which of these positions the file has the bytes that their hashes say.
    Check(Vec<Position>),
    /// To be replaced by a new incarnation that begins here.
    Replace(Position),
    /// To be left alone until its queue has been sent.
    Send,
    /// Nothing, for good.
    Stopped(String),
}

/// A batch on its way.
#[derive(Debug, Clone)]
pub struct Piece<B> {
    /// Where it begins.
    pub start: Position,
    /// Where it ends.
    pub end: Position,
    /// The batch, once it is packed.
    pub batch: Option<B>,
    /// Whether it is in a request that has not been answered.
    pub in_flight: bool,
}

/// What reading showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadShowed {
    /// A batch up to here; it is being packed.
    Batch(Position),
    /// Before the position, the file doesn't have the bytes that it had, or it ends before it.
    OtherBytes,
}

/// What the caller should know of what just happened, to count and to log it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// `committed` moved forward by so many bytes.
    Committed(u64),
    /// Upstream can't take it now.
    Wait(String),
    /// The stream goes back; so many bytes are sent again.
    Back(u64),
    /// The stream skips so many bytes that upstream has already.
    Ahead(u64),
    /// Upstream wants bytes below `committed`: what was durable is gone there.
    Alarm {
        /// What upstream expects.
        expected: Position,
        /// What had been committed.
        committed: Position,
    },
    /// The bytes here and upstream are not the same.
    Diverged,
    /// The stream stops.
    Refused(String),
    /// Packed bytes were dropped that the file no longer has.
    Lost(u64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Nothing is read before upstream has said what it knows.
    Asking,
    Following,
    /// Nothing moves before the file has been looked at.
    Checking {
        positions: Vec<Position>,
        then: Then,
    },
    /// The file has other bytes than before: what is packed is sent, and then the common ground is looked for.
    Draining,
    /// Common ground, highest first, was found; upstream must have the best of it durable.
    Settling {
        common: Vec<Position>,
    },
    Replacing {
        base: Position,
    },
    Stopped {
        reason: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Then {
    /// Upstream told, when first asked, that it is committed to the position, and has it up to `next`.
    Resume { next: Option<Position> },
    /// Reading goes on at the position.
    SkipTo,
    /// The best of those that match is the common ground.
    FindCommon,
}

/// One stream. `B` is a packed batch.
#[derive(Debug)]
pub struct Stream<B> {
    base: Position,
    committed: Position,
    accepted: Position,
    read: Position,
    /// Batch ends that were read from the file, above `committed`.
    ends: BTreeMap<u64, TailHash>,
    /// The last batch ends up to `committed`, in order.
    history: VecDeque<Position>,
    queue: VecDeque<Piece<B>>,
    phase: Phase,
    /// Grows whenever the queue is thrown away, so that late results can be told from present ones.
    generation: u64,
    /// Set while upstream doesn't take what comes: then one piece at a time is tried.
    probing: bool,
    /// Told to be committed, and not yet compared with the file.
    told_committed: Option<Position>,
}

impl<B> Stream<B> {
    /// A stream about which nothing is known here: upstream is asked first. If it knows nothing either, the stream
    /// begins at `base`.
    #[must_use]
    pub fn unknown(base: Position) -> Self {
        Self { phase: Phase::Asking, ..Self::known(base, base) }
    }

    /// A stream with a checkpoint.
    #[must_use]
    pub fn known(base: Position, committed: Position) -> Self {
        Self {
            base,
            committed,
            accepted: committed,
            read: committed,
            ends: BTreeMap::new(),
            history: VecDeque::new(),
            queue: VecDeque::new(),
            phase: Phase::Following,
            generation: 0,
            probing: false,
            told_committed: None,
        }
    }

    /// Remembers positions, in order, at which the file had these bytes and up to which all was committed.
    #[must_use]
    pub fn with_history(mut self, history: impl IntoIterator<Item = Position>) -> Self {
        let reach = self.committed.offset;
        for position in history.into_iter().filter(|position| position.offset <= reach) {
            self.remember(position);
        }
        self
    }

    /// The last positions, in order, up to which all was committed.
    pub fn history(&self) -> impl Iterator<Item = Position> {
        self.history.iter().copied()
    }

    /// Counts generations from `generation` on.
    pub fn begin_generation(&mut self, generation: u64) {
        self.generation = generation;
    }

    /// Where it began.
    #[must_use]
    pub fn base(&self) -> Position {
        self.base
    }

    /// What is durable upstream.
    #[must_use]
    pub fn committed(&self) -> Position {
        self.committed
    }

    /// What upstream has.
    #[must_use]
    pub fn accepted(&self) -> Position {
        self.accepted
    }

    /// What was read.
    #[must_use]
    pub fn read(&self) -> Position {
        self.read
    }

    /// See [`Stream`]'s field of that name: results of an older generation are stale.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Pieces that are not accepted yet.
    #[must_use]
    pub fn queue(&self) -> &VecDeque<Piece<B>> {
        &self.queue
    }

    /// Whether upstream has bytes that it has not said to be durable, or is to be asked for another reason: then it is
    /// worth asking for positions when nothing is under way.
    #[must_use]
    pub fn is_waiting_for_commit(&self) -> bool {
        match &self.phase {
            Phase::Following | Phase::Draining => self.accepted.offset > self.committed.offset,
            Phase::Settling { .. } => true,
            _ => false,
        }
    }

    /// Whether a piece of it is in a request.
    #[must_use]
    pub fn is_in_flight(&self) -> bool {
        self.queue.iter().any(|piece| piece.in_flight)
    }

    /// Whether it is to be asked about before it can go on.
    #[must_use]
    pub fn is_asking(&self) -> bool {
        matches!(self.phase, Phase::Asking)
    }

    /// What it waits for, in words, for an operator.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match &self.phase {
            Phase::Asking => "asking upstream what it has",
            Phase::Following if self.probing => "upstream can't take it now",
            Phase::Following => "following",
            Phase::Checking { .. } => "comparing the file with what upstream has",
            Phase::Draining => "the file was replaced; sending what was read of it",
            Phase::Settling { .. } => "diverged; waiting until the common part is committed",
            Phase::Replacing { .. } => "beginning a new incarnation",
            Phase::Stopped { .. } => "stopped",
        }
    }

    /// Why it stopped, if it did.
    #[must_use]
    pub fn stopped(&self) -> Option<&str> {
        match &self.phase {
            Phase::Stopped { reason } => Some(reason),
            _ => None,
        }
    }

    /// What it wants next.
    #[must_use]
    pub fn want(&self) -> Want {
        match &self.phase {
            Phase::Asking => Want::Ask,
            Phase::Following if self.probing && !self.queue.is_empty() => Want::Send,
            Phase::Following => Want::Read(self.read),
            Phase::Checking { positions, .. } => Want::Check(positions.clone()),
            Phase::Draining | Phase::Settling { .. } => Want::Send,
            Phase::Replacing { base } => Want::Replace(*base),
            Phase::Stopped { reason } => Want::Stopped(reason.clone()),
        }
    }

    /// Reading from `from` showed this. Returns whether that is of the present generation, so that the piece is awaited.
    pub fn has_read(&mut self, generation: u64, from: Position, showed: ReadShowed) -> bool {
        if generation != self.generation || self.phase != Phase::Following || from != self.read {
            return false;
        }
        match showed {
            ReadShowed::Batch(end) => {
                self.queue.push_back(Piece { start: from, end, batch: None, in_flight: false });
                self.ends.insert(end.offset, end.tail);
                self.thin_ends();
                self.read = end;
                true
            }
            ReadShowed::OtherBytes => {
                self.phase = Phase::Draining;
                self.drained();
                false
            }
        }
    }

    /// A piece was packed. Gives the batch back if nobody waits for it any more.
    pub fn has_packed(&mut self, generation: u64, end: Position, batch: B) -> Option<B> {
        let piece = self.queue.iter_mut().find(|piece| piece.end == end && piece.batch.is_none());
        match piece {
            Some(piece) if generation == self.generation => {
                piece.batch = Some(batch);
                None
            }
            _ => Some(batch),
        }
    }

    /// The pieces that can be sent now: the packed ones at the front of the queue, if none is under way.
    pub fn sendable(&self) -> impl Iterator<Item = &Piece<B>> {
        let allowed = match self.phase {
            Phase::Following | Phase::Draining if !self.is_in_flight() => self.queue.len(),
            _ => 0,
        };
        self.queue.iter().take(allowed).take_while(|piece| piece.batch.is_some())
    }

    /// The first `count` of the sendable pieces go into a request.
    pub fn sent(&mut self, count: usize) {
        for piece in self.queue.iter_mut().take(count) {
            piece.in_flight = true;
        }
    }

    /// A request with pieces of this generation brought no answer: they are to be sent again.
    pub fn not_answered(&mut self, generation: u64) {
        if generation == self.generation {
            for piece in &mut self.queue {
                piece.in_flight = false;
            }
        }
    }

    /// The stream is to stop: its bytes will not be taken, whatever is tried.
    pub fn stop(&mut self, reason: String) -> Note {
        self.drop_queue();
        self.phase = Phase::Stopped { reason: reason.clone() };
        Note::Refused(reason)
    }

    /// A batch that ended at `end` was answered.
    pub fn answered(&mut self, generation: u64, end: Position, answer: &Answer) -> Vec<Note> {
        let mut notes = Vec::new();
        let current = generation == self.generation;
        if current && let Some(front) = self.queue.iter_mut().find(|piece| piece.end == end) {
            front.in_flight = false;
        }
        if current && answer.verdict == Verdict::Ok && self.queue.front().is_some_and(|piece| piece.end == end) {
            self.queue.pop_front();
            if self.accepted.offset < end.offset {
                self.accepted = end;
            }
            self.probing = false;
        }
        self.heard(answer, current, &mut notes);
        notes
    }

    /// A question for positions was answered. Only to be called when no piece is in flight.
    pub fn told(&mut self, answer: &Answer) -> Vec<Note> {
        let mut notes = Vec::new();
        if self.phase == Phase::Asking {
            self.first_told(answer, &mut notes);
        } else {
            self.heard(answer, true, &mut notes);
            if answer.verdict == Verdict::Ok
                && matches!(self.phase, Phase::Following | Phase::Draining)
                && let Some(next) = answer.next
                && next.offset < self.accepted.offset
            {
                // What was taken has been lost on the way: it is sent again. An aggregator that has not heard how far the
                // stream is committed may name a place below that, where nothing is missing.
                let next = if next.offset < self.committed.offset { self.committed } else { next };
                self.go_to(next, &mut notes);
            }
        }
        notes
    }

    /// A position that was told to be committed and that no batch of this run of the agent ended at: it is believed when
    /// the file has the bytes before it that its hash says. To be looked for whatever else the stream wants.
    #[must_use]
    pub fn commit_to_check(&self) -> Option<Position> {
        self.told_committed
    }

    /// What the look into the file for [`Stream::commit_to_check`] showed.
    pub fn commit_checked(&mut self, position: Position, matches: bool) -> Vec<Note> {
        let mut notes = Vec::new();
        if self.told_committed != Some(position) {
            return notes;
        }
        self.told_committed = None;
        if position.offset <= self.committed.offset || !matches!(self.phase, Phase::Following | Phase::Draining) {
            return notes;
        }
        if matches {
            self.commit(position, &mut notes);
        } else if self.phase == Phase::Following {
            notes.push(Note::Diverged);
            self.find_common(&[]);
        }
        notes
    }

    /// At these of the positions that were to be checked, the file has the bytes that their hashes say.
    pub fn checked(&mut self, matching: &[Position]) -> Vec<Note> {
        let mut notes = Vec::new();
        let Phase::Checking { positions, then } = &self.phase else { return notes };
        let (positions, then) = (positions.clone(), then.clone());
        let good = positions.first().filter(|first| matching.contains(first)).copied();
        match (then, good) {
            (Then::Resume { next }, Some(committed)) => {
                self.phase = Phase::Following;
                // Where the stream began is not told; all before `committed` is durable, so it may as well be there.
                *self = Self { generation: self.generation + 1, ..Self::known(committed, committed) };
                if let Some(next) = next.filter(|next| next.offset > committed.offset) {
                    self.go_to(next, &mut notes);
                }
            }
            // Upstream has another stream of this name: this one needs a name of its own.
            (Then::Resume { .. }, None) => {
                notes.push(Note::Diverged);
                self.replace(Position::zero());
            }
            (Then::SkipTo, Some(position)) => {
                self.phase = Phase::Following;
                notes.push(Note::Ahead(position.offset - self.read.offset.min(position.offset)));
                self.restart_at(position);
            }
            (Then::SkipTo, None) => {
                notes.push(Note::Diverged);
                self.find_common(&[]);
            }
            (Then::FindCommon, _) => {
                let mut common: Vec<Position> =
                    positions.into_iter().filter(|at| at.offset == 0 || matching.contains(at)).collect();
                if common.is_empty() {
                    common.push(Position::zero());
                }
                self.settle(common);
            }
        }
        notes
    }

    fn first_told(&mut self, answer: &Answer, notes: &mut Vec<Note>) {
        match (&answer.verdict, answer.committed) {
            (Verdict::Unknown, _) => self.phase = Phase::Following,
            (Verdict::Ok | Verdict::Expected | Verdict::Diverged { .. }, Some(committed)) => {
                self.phase = Phase::Checking { positions: vec![committed], then: Then::Resume { next: answer.next } };
            }
            (Verdict::Ok | Verdict::Expected | Verdict::Diverged { .. }, None) => {
                notes.push(Note::Wait("it is not known upstream how far the stream is committed".to_owned()));
            }
            (Verdict::Wait { reason }, _) => notes.push(Note::Wait(reason.clone())),
            (Verdict::Refused { reason }, _) => notes.push(self.stop(reason.clone())),
        }
    }

    /// What an answer means, apart from the piece that it is for. `current`: whether it is about what is under way.
    fn heard(&mut self, answer: &Answer, current: bool, notes: &mut Vec<Note>) {
        if let Some(committed) = answer.committed {
            self.hear_committed(committed, notes);
        }
        if let Phase::Settling { common } = &self.phase {
            let common = common.clone();
            self.hear_while_settling(common, answer, notes);
            return;
        }
        if !current || !matches!(self.phase, Phase::Following | Phase::Draining) {
            return;
        }
        match &answer.verdict {
            Verdict::Ok => {
                if let Some(next) = answer.next.filter(|next| next.offset > self.accepted.offset) {
                    self.hear_ahead(next, notes);
                }
                self.drained();
            }
            Verdict::Expected => match answer.next {
                Some(next) if next.offset < self.committed.offset => {
                    notes.push(Note::Alarm { expected: next, committed: self.committed });
                    self.hold();
                }
                // It has been sent from there just now: nothing would change by doing so again at once.
                Some(next) if self.queue.front().is_some_and(|piece| piece.start == next) => {
                    notes.push(Note::Wait("upstream expects what it has just been sent".to_owned()));
                    self.hold();
                }
                Some(next) => self.go_to(next, notes),
                None => self.go_to(self.committed, notes),
            },
            Verdict::Wait { reason } => {
                notes.push(Note::Wait(reason.clone()));
                self.hold();
            }
            Verdict::Diverged { history } => {
                notes.push(Note::Diverged);
                let history: Vec<Position> = history.iter().copied().chain(answer.committed).collect();
                self.find_common(&history);
            }
            Verdict::Unknown if self.committed.offset > self.base.offset => {
                notes.push(Note::Diverged);
                self.replace(self.committed);
            }
            Verdict::Unknown => {
                if self.accepted == self.base && self.queue.front().is_none_or(|piece| piece.start == self.base) {
                    notes.push(Note::Wait("upstream does not know the stream, not even at its beginning".to_owned()));
                    self.hold();
                } else {
                    self.go_to(self.base, notes);
                }
            }
            Verdict::Refused { reason } => notes.push(self.stop(reason.clone())),
        }
    }

    /// `committed`, as told.
    fn hear_committed(&mut self, told: Position, notes: &mut Vec<Note>) {
        if told.offset <= self.committed.offset || !matches!(self.phase, Phase::Following | Phase::Draining) {
            return;
        }
        match self.ends.get(&told.offset) {
            Some(tail) if *tail == told.tail => self.commit(told, notes),
            Some(_) => {
                notes.push(Note::Diverged);
                self.find_common(&[]);
            }
            None => self.told_committed = Some(told),
        }
    }

    /// Upstream has more than was sent to it.
    fn hear_ahead(&mut self, next: Position, notes: &mut Vec<Note>) {
        if self.ends.get(&next.offset).is_some_and(|tail| *tail != next.tail) {
            notes.push(Note::Diverged);
            self.find_common(&[]);
        } else if next.offset > self.read.offset {
            self.go_to(next, notes);
        } else {
            while self.queue.front().is_some_and(|piece| piece.end.offset <= next.offset && !piece.in_flight) {
                let piece = self.queue.pop_front().expect("looked at just now");
                if self.accepted.offset < piece.end.offset {
                    self.accepted = piece.end;
                }
            }
        }
    }

    /// Diverged, and the common ground is known: is it durable upstream?
    fn hear_while_settling(&mut self, mut common: Vec<Position>, answer: &Answer, notes: &mut Vec<Note>) {
        match &answer.verdict {
            Verdict::Wait { reason } => notes.push(Note::Wait(reason.clone())),
            Verdict::Refused { reason } => notes.push(self.stop(reason.clone())),
            Verdict::Unknown => {
                let reach = self.committed.offset;
                common.retain(|at| at.offset <= reach);
                self.replace(common.first().copied().unwrap_or(Position::zero()));
            }
            Verdict::Ok | Verdict::Expected | Verdict::Diverged { .. } => {
                if let Some(next) = answer.next {
                    let reach = next.offset.max(self.committed.offset);
                    common.retain(|at| at.offset <= reach);
                }
                let durable = answer.committed.map_or(0, |at| at.offset).max(self.committed.offset);
                match common.first() {
                    Some(best) if best.offset > durable => self.phase = Phase::Settling { common },
                    best => {
                        let base = best.copied().unwrap_or(Position::zero());
                        self.replace(base);
                    }
                }
            }
        }
    }

    fn commit(&mut self, to: Position, notes: &mut Vec<Note>) {
        notes.push(Note::Committed(to.offset - self.committed.offset));
        self.committed = to;
        let above = self.ends.split_off(&(to.offset + 1));
        for (offset, tail) in std::mem::replace(&mut self.ends, above) {
            self.remember(Position { offset, tail });
        }
        self.remember(to);
        if self.accepted.offset < to.offset {
            self.accepted = to;
        }
        if self.read.offset < to.offset {
            self.restart_at(to);
        } else {
            while self.queue.front().is_some_and(|piece| piece.end.offset <= to.offset && !piece.in_flight) {
                self.queue.pop_front();
            }
        }
    }

    /// Goes back, or ahead after a look into the file.
    fn go_to(&mut self, to: Position, notes: &mut Vec<Note>) {
        if self.phase == Phase::Draining {
            let lost = self.read.offset.saturating_sub(self.accepted.offset.min(to.offset));
            notes.push(Note::Lost(lost));
            self.find_common(&[]);
        } else if to.offset > self.read.offset {
            self.drop_queue();
            self.phase = Phase::Checking { positions: vec![to], then: Then::SkipTo };
        } else if self.ends.get(&to.offset).is_some_and(|tail| *tail != to.tail) {
            notes.push(Note::Diverged);
            self.find_common(&[]);
        } else {
            notes.push(Note::Back(self.read.offset - to.offset));
            self.restart_at(to);
        }
    }

    fn restart_at(&mut self, at: Position) {
        self.drop_queue();
        self.ends.split_off(&(at.offset + 1));
        self.read = at;
        self.accepted = at;
    }

    /// What is queued is not taken now: it is read again when it is.
    fn hold(&mut self) {
        if self.phase == Phase::Draining {
            // It can't be read again: it is kept.
            for piece in &mut self.queue {
                piece.in_flight = false;
            }
        } else {
            self.restart_at(self.accepted);
        }
        self.probing = true;
    }

    fn drop_queue(&mut self) {
        self.queue.clear();
        self.generation += 1;
    }

    /// Looks for the highest position that the file and upstream have in common.
    fn find_common(&mut self, history: &[Position]) {
        self.drop_queue();
        let reach = self.accepted.offset;
        let own = self.ends.range(..=reach).map(|(&offset, &tail)| Position { offset, tail });
        let mut positions: Vec<Position> = history
            .iter()
            .copied()
            .chain(own)
            .chain(self.history())
            .chain([self.accepted, self.committed, self.base])
            .collect();
        positions.sort_unstable_by_key(|position| Reverse((position.offset, position.tail)));
        positions.dedup();
        self.phase = Phase::Checking { positions, then: Then::FindCommon };
    }

    fn settle(&mut self, common: Vec<Position>) {
        let best = common.first().copied().unwrap_or(Position::zero());
        if best.offset <= self.committed.offset {
            self.replace(best);
        } else {
            self.phase = Phase::Settling { common };
        }
    }

    fn replace(&mut self, base: Position) {
        self.drop_queue();
        self.phase = Phase::Replacing { base };
    }

    /// Ends the draining when there is nothing more to send.
    fn drained(&mut self) {
        if self.phase == Phase::Draining && self.queue.is_empty() {
            self.find_common(&[]);
        }
    }

    fn remember(&mut self, position: Position) {
        if self.history.back().is_some_and(|last| last.offset >= position.offset) {
            return;
        }
        if self.history.len() == HISTORY_LEN {
            self.history.pop_front();
        }
        self.history.push_back(position);
    }

    fn thin_ends(&mut self) {
        if self.ends.len() > MAX_ENDS {
            let older: Vec<u64> = self.ends.keys().take(MAX_ENDS / 2).step_by(2).copied().collect();
            for offset in older {
                self.ends.remove(&offset);
            }
        }
    }
}
