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
//! | a place with other bytes than the file has there | the same as wait: the lane's owner will decide |
//! | wait | what is queued is dropped and read again later, a piece at a time until one is taken |
//! | diverged, and the file has all that is stored | goes back to the end of that |
//! | diverged | the highest position that both sides have in common is looked for, and a new incarnation begins there |
//! | unknown | with something committed: a new incarnation begins there; else all is sent again from the base |
//! | refused | the stream stops and says why |
//! | committed C | believed when a batch ended there with that hash, or after a look into the file; else diverged |
//!
//! When the file itself turns out to hold other bytes than before (truncated, overwritten), what is already packed is
//! still sent, and it is waited for until that is committed; then it is as if the stream had been told that it diverged.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use tributary_common::messages::{Answer, Verdict};
use tributary_common::position::{Position, TailHash};

/// Most batch ends that are remembered above `committed`. Where there are more, every other one of the older half is
/// forgotten; a look into the file takes its place.
const MAX_ENDS: usize = 4096;

/// Committed batch ends that are remembered: where a file was restored from a copy, the common part ends at one of them.
const HISTORY_LEN: usize = 32;

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
    /// It is sent; how much of it becomes durable has to be known before the common ground is looked for.
    Settling,
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
    GoTo,
    /// The best of those that match is the common ground. Where that is all that upstream has, it is only that an
    /// aggregator held other bytes: the stream goes on.
    FindCommon { all: Option<Position> },
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
    /// Batch ends up to `committed`, in order, the denser the later.
    history: VecDeque<Position>,
    queue: VecDeque<Piece<B>>,
    phase: Phase,
    /// Grows whenever the queue is thrown away, so that late results can be told from present ones.
    generation: u64,
    /// Set while upstream doesn't take what comes: then one piece at a time is tried.
    probing: bool,
    /// Whether what upstream holds beyond `committed` was last found to be other bytes than the file has.
    contested: bool,
    /// Up to here aggregators may hold, and the owner may be about to get, what was sent when the file had other bytes: by a run before, or
    /// by this one before the stream went back.
    doubtful_to: u64,
    /// Told to be committed, and not yet compared with the file.
    told_committed: Option<Position>,
}

impl<B> Stream<B> {
    /// A stream about which nothing is known here: upstream is asked first. If it knows nothing either, the stream
    /// begins at `base`.
    #[must_use]
    pub fn unknown(base: Position) -> Self {
        Self { phase: Phase::Asking, doubtful_to: 0, ..Self::known(base, base) }
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
            contested: false,
            doubtful_to: u64::MAX,
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
            Phase::Settling => true,
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

    /// Whether the file is being read on.
    #[must_use]
    pub fn is_following(&self) -> bool {
        matches!(self.phase, Phase::Following)
    }

    /// How far it can be promised what will be stored: what was read up to there, and nothing in its place. Where others may hold what the
    /// file had before, that is what is committed, and was compared with the file.
    #[must_use]
    pub fn promised(&self) -> Position {
        if self.committed.offset < self.doubtful_to { self.committed } else { self.read }
    }

    /// Whether a file that is `size` bytes long now may still bring the stream as far as `offset`. Not one that was cut off below that
    /// and is being followed from a place before the cut: of what was read there once it has nothing any more.
    #[must_use]
    pub fn may_reach(&self, offset: u64, size: u64) -> bool {
        offset <= size.max(self.read.offset) || !self.is_following()
    }

    fn is_contested(&self) -> bool {
        self.contested && self.read.offset > self.committed.offset
    }

    /// Whether upstream doesn't take what comes, so that it is tried with one piece at a time.
    #[must_use]
    pub fn is_probing(&self) -> bool {
        self.probing
    }

    /// What it waits for, in words, for an operator.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match &self.phase {
            Phase::Asking => "asking upstream what it has",
            Phase::Following if self.is_contested() => "upstream holds other bytes of it, until its owner decides",
            Phase::Following if self.probing => "upstream can't take it now",
            Phase::Following => "following",
            Phase::Checking { .. } => "comparing the file with what upstream has",
            Phase::Draining => "the file was replaced; sending what was read of it",
            Phase::Settling => "the file was replaced; waiting until what was read of it is committed",
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
            Phase::Draining | Phase::Settling => Want::Send,
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
        if position.offset <= self.committed.offset {
            return notes;
        }
        match (&self.phase, matches) {
            (Phase::Following | Phase::Draining | Phase::Settling, true) => {
                self.commit(position, &mut notes);
                self.drained();
            }
            (Phase::Following | Phase::Settling, false) => {
                notes.push(Note::Diverged);
                self.find_common(&[]);
            }
            _ => {}
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
            (Then::GoTo, Some(position)) => {
                self.phase = Phase::Following;
                notes.push(match position.offset.checked_sub(self.read.offset) {
                    Some(ahead) => Note::Ahead(ahead),
                    None => Note::Back(self.read.offset - position.offset),
                });
                self.restart_at(position);
            }
            (Then::GoTo, None) => {
                self.phase = Phase::Following;
                self.contested(&mut notes);
            }
            // Each of them is durable upstream; the first that matches is the highest.
            (Then::FindCommon { all }, _) => {
                let common = positions.into_iter().find(|at| at.offset == 0 || matching.contains(at));
                let common = common.unwrap_or(Position::zero());
                if all == Some(common) && common.offset >= self.committed.offset {
                    self.phase = Phase::Following;
                    notes.push(Note::Back(self.read.offset.saturating_sub(common.offset)));
                    if common.offset > self.committed.offset {
                        self.commit(common, &mut notes);
                    }
                    self.restart_at(common);
                } else {
                    self.replace(common);
                }
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
        if self.phase == Phase::Settling {
            self.hear_while_settling(answer, notes);
            return;
        }
        if !current || !matches!(self.phase, Phase::Following | Phase::Draining) {
            return;
        }
        match &answer.verdict {
            Verdict::Ok => match answer.next {
                Some(next) if next == self.accepted => self.contested = false,
                Some(next) if next.offset == self.accepted.offset && next.tail != self.accepted.tail => {
                    self.contested(notes);
                }
                Some(next) if next.offset > self.accepted.offset => self.hear_ahead(next, notes),
                _ => {}
            },
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
        self.drained();
    }

    /// `committed`, as told.
    fn hear_committed(&mut self, told: Position, notes: &mut Vec<Note>) {
        let is_current = matches!(self.phase, Phase::Following | Phase::Draining | Phase::Settling);
        if told.offset <= self.committed.offset || !is_current {
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
            self.contested(notes);
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

    /// Everything is sent that was read of a file that has other bytes now.
    fn hear_while_settling(&mut self, answer: &Answer, notes: &mut Vec<Note>) {
        match &answer.verdict {
            Verdict::Wait { reason } => notes.push(Note::Wait(reason.clone())),
            Verdict::Refused { reason } => notes.push(self.stop(reason.clone())),
            Verdict::Unknown => self.find_common(&[]),
            Verdict::Diverged { history } => self.find_common(history),
            Verdict::Ok | Verdict::Expected => {
                if let Some(next) = answer.next.filter(|next| next.offset < self.accepted.offset) {
                    notes.push(Note::Lost(self.accepted.offset - next.offset.max(self.committed.offset)));
                    self.accepted = if next.offset < self.committed.offset { self.committed } else { next };
                }
                if self.committed.offset >= self.accepted.offset {
                    self.find_common(&[]);
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
            notes.push(Note::Lost(self.read.offset.saturating_sub(to.offset)));
            self.drop_queue();
            self.accepted = to;
            self.drained();
            return;
        }
        let known = match self.ends.get(&to.offset) {
            Some(&tail) => Some(Position { offset: to.offset, tail }),
            None => [self.committed, self.base].into_iter().find(|known| known.offset == to.offset),
        };
        match known {
            Some(known) if known == to => {
                notes.push(Note::Back(self.read.offset - to.offset));
                self.restart_at(to);
            }
            Some(_) => self.contested(notes),
            // The look into the file for that comes first: it may end this stream.
            None if self.told_committed.is_some() => {}
            None => {
                self.drop_queue();
                self.phase = Phase::Checking { positions: vec![to], then: Then::GoTo };
            }
        }
    }

    /// An aggregator holds other bytes than the file has. Whether those or what was sent elsewhere is stored in the end,
    /// only the lane's owner decides: it says "diverged", or that something is committed. Until then nothing is concluded.
    fn contested(&mut self, notes: &mut Vec<Note>) {
        notes.push(Note::Wait("upstream holds other bytes of the stream than the file has".to_owned()));
        self.contested = true;
        self.doubtful_to = u64::MAX;
        self.hold();
    }

    fn restart_at(&mut self, at: Position) {
        if at.offset < self.read.offset {
            self.doubtful_to = self.doubtful_to.max(self.read.offset);
        }
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

    /// Looks for the highest position that the file and upstream have in common, among those that are known to be
    /// durable: `history`, as told, and what was committed. What an aggregator holds doesn't count, it may hold other bytes.
    fn find_common(&mut self, history: &[Position]) {
        self.drop_queue();
        let known = history.iter().copied().chain(self.history());
        let mut positions: Vec<Position> = known.chain([self.committed, self.base]).collect();
        positions.sort_unstable_by_key(|position| Reverse((position.offset, position.tail)));
        positions.dedup();
        let all = history.iter().copied().max_by_key(|position| position.offset);
        self.phase = Phase::Checking { positions, then: Then::FindCommon { all } };
    }

    fn replace(&mut self, base: Position) {
        self.drop_queue();
        self.phase = Phase::Replacing { base };
    }

    /// Ends the draining when there is nothing more to send.
    fn drained(&mut self) {
        if self.phase == Phase::Draining && self.queue.is_empty() {
            if self.accepted.offset > self.committed.offset {
                self.phase = Phase::Settling;
            } else {
                self.find_common(&[]);
            }
        }
    }

    fn remember(&mut self, position: Position) {
        if self.history.back().is_some_and(|last| last.offset >= position.offset) {
            return;
        }
        self.history.push_back(position);
        // Those of a file that was replaced are about to be compared with it: none is given up for later ones.
        let is_replaced = matches!(self.phase, Phase::Draining | Phase::Settling);
        if self.history.len() > HISTORY_LEN && !is_replaced {
            self.thin_history();
        }
    }

    /// Forgets the position whose neighbours are nearest to each other, in proportion to how far back it is: a copy from
    /// which the file is restored may be a minute or a month old.
    fn thin_history(&mut self) {
        let Some(last) = self.history.back().map(|last| last.offset) else { return };
        let gaps = self.history.iter().zip(self.history.iter().skip(1).zip(self.history.iter().skip(2)));
        let weight = |(before, (at, after)): (&Position, (&Position, &Position))| {
            let gap = u128::from(after.offset - before.offset) << 32;
            gap / u128::from(last - at.offset).max(1)
        };
        if let Some((index, _)) = gaps.map(weight).enumerate().min_by_key(|(_, weight)| *weight) {
            self.history.remove(index + 1);
        }
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

#[cfg(test)]
mod tests;
