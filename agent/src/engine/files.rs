//! Open files: named, looked at, closed.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::fstat;
use tributary_common::http::backoff::Backoff;
use tributary_common::ids::StreamId;
use tributary_common::position::{Position, TailHash};

use super::{Engine, FirstLine, LOOK_INTERVAL, MIN_LOOK_INTERVAL, Named, STREAM_BACKOFF, Tail, now_ms};
use crate::checkpoint::Checkpoint;
use crate::discover::{Found, FoundBy};
use crate::identity::{FileFacts, Head, Origin, stream_id};
use crate::stream::Stream;
use crate::tail::Pace;
use crate::tally::Unstored;
use crate::worker::{Carry, TailId};

/// A file that has not grown for so long is looked at when something hints at a change, and with every scan.
const QUIET_AFTER: Duration = Duration::from_secs(10);

impl Engine {
    /// Adds an open file.
    pub(super) fn follow(
        &mut self,
        id: TailId,
        found: Found,
        file: Arc<File>,
        facts: FileFacts,
        base: Position,
        now: Instant,
    ) {
        let mut tail = Tail {
            key: found.key,
            facts,
            path: found.path,
            source: found.source,
            file,
            pace: Pace::new(facts.size, self.once, now),
            deleted: facts.deleted,
            look_soon: true,
            modified: None,
            named: None,
            generation: 0,
            next_base: base,
            next_history: Vec::new(),
            is_new: true,
            only_if_known: found.by == FoundBy::Likeness,
            by_hint: found.by == FoundBy::Hint,
            by_former_name: found.by == FoundBy::FormerName,
            unpacked: false,
            comparing: None,
            compared: false,
            head_read_at: None,
            carry: Carry::Search,
            reading: false,
            reading_head: false,
            checking: false,
            in_read_queue: false,
            timer: None,
            not_before: None,
            backoff: Backoff::new(STREAM_BACKOFF),
            asked: false,
            ask_at: now,
            careful: 0,
            waiting: None,
            saved: None,
        };
        if !matches!(found.by, FoundBy::Name | FoundBy::Hint) {
            tail.pace.rotated(now);
        }
        tracing::info!(path = %tail.path.display(), size = facts.size, "following a file");
        self.by_key.insert(tail.key, id);
        self.tails.insert(id, tail);
        self.metrics.open_files.set(self.tails.len() as i64);
    }

    /// The beginning of a file is known: its stream gets its name, if the first line is whole or will never be.
    pub(super) fn head_is(&mut self, id: TailId, facts: FileFacts, head: Head, now: Instant) {
        let Some(tail) = self.tails.get(&id) else { return };
        if let Head::Wide(encoding) = head {
            let (key, path) = (tail.key, tail.path.clone());
            self.refuse(key, path, encoding);
            return self.rest(id);
        }
        let over = tail.pace.is_over(now, &self.pace_options(tail.source));
        let known = match &head {
            Head::Line(line) | Head::Unfinished(line) if tail.is_new => {
                self.memory.of_file(&self.config.agent_id, &facts, line).cloned()
            }
            _ => None,
        };
        if tail.is_new && known.is_none() {
            // Also where it is empty now.
            self.others_are_gone(facts.key.inode, None, now);
        }
        let line = match head {
            Head::Line(line) => Some(line),
            Head::Unfinished(line) if known.is_some() || (over && !line.is_empty()) => Some(line),
            Head::Unfinished(_) | Head::Compressed(..) | Head::Wide(_) => None,
        };
        let Some(tail) = self.tails.get_mut(&id) else { return };
        tail.facts = facts;
        tail.reading_head = false;
        tail.pace.seen(facts.size, now);
        tail.head_read_at = Some(facts.size);
        tail.carry = Carry::Search;
        match (line, known) {
            (Some(_), Some(known)) => self.name_known(id, known, now),
            (Some(line), None) => {
                if let Some(line) = self.compare(id, line, now) {
                    self.name_new(id, &line, now);
                }
            }
            (None, _) if tail.only_if_known => self.rest(id),
            (None, _) => {}
        }
        self.advance(id, now);
    }

    /// The file is read on for a stream that is known.
    pub(super) fn name_known(&mut self, id: TailId, known: Checkpoint, now: Instant) {
        let first_line = FirstLine { bytes: known.first_line_bytes, hash: known.first_line_hash };
        let stream = Stream::known(known.base, known.committed).with_history(known.history);
        let origin = Origin { inode: known.origin_inode, birth_or_filesystem: known.origin_birth };
        let named = Named {
            stream_id: known.stream,
            origin,
            incarnation: known.incarnation,
            first_line,
            stream,
            unstored: Unstored::default(),
        };
        self.name(id, named, now);
    }

    /// A new stream begins in the file.
    pub(super) fn name_new(&mut self, id: TailId, line: &[u8], now: Instant) {
        let Some(tail) = self.tails.get(&id) else { return };
        if tail.only_if_known {
            return self.rest(id);
        }
        let origin = tail.facts.origin();
        let (incarnation, stream_id) = (0..=u32::MAX)
            .map(|incarnation| (incarnation, stream_id(&self.config.agent_id, origin, line, incarnation)))
            .find(|(_, stream_id)| !self.taken.contains(stream_id))
            .expect("there are more incarnations than streams in memory");
        let stream = Stream::unknown(tail.next_base).with_history(tail.next_history.iter().copied());
        let first_line = FirstLine { bytes: line.len() as u32, hash: TailHash::of(line) };
        self.name(id, Named { stream_id, origin, incarnation, first_line, stream, unstored: Unstored::default() }, now);
    }

    fn name(&mut self, id: TailId, mut named: Named, now: Instant) {
        let Some(tail) = self.tails.get_mut(&id) else { return };
        named.stream.begin_generation(tail.generation);
        tracing::info!(
            path = %tail.path.display(), stream = %named.stream_id, incarnation = named.incarnation,
            committed = named.stream.committed().offset, known = !named.stream.is_asking(), "a stream begins or goes on"
        );
        self.taken.insert(named.stream_id);
        self.by_stream.insert(named.stream_id, id);
        self.orphans.remove(&named.stream_id);
        let (inode, stream) = (tail.key.inode, named.stream_id);
        tail.is_new = false;
        if tail.only_if_known {
            tail.only_if_known = false;
            tail.pace.rotated(now);
        }
        tail.named = Some(named);
        tail.ask_at = now;
        self.next_ask = now;
        // Also what nothing is committed of yet: copies of it are to be known as such.
        if let Some(checkpoint) = self.tails.get(&id).and_then(|tail| self.checkpoint(tail)) {
            self.remember(checkpoint);
        }
        self.others_are_gone(inode, Some(stream), now);
    }

    /// Looks at the files that are in use, and at those that seem to have changed. The others are looked at by scans.
    pub(super) fn look(&mut self, now: Instant) {
        self.next_look = now + if self.unopened.is_waiting() { MIN_LOOK_INTERVAL } else { LOOK_INTERVAL };
        let mut changed = Vec::new();
        let (mut lag, mut held) = (0, 0);
        for (id, tail) in &mut self.tails {
            if (tail.look_soon || tail.is_in_use(now)) && tail.look(now) {
                changed.push(*id);
            }
            lag += tail.lag();
            held += if tail.deleted { tail.pace.size() } else { 0 };
        }
        self.metrics.lag_bytes.set(lag as i64);
        self.metrics.held_bytes.set(held as i64);
        self.hold(held);
        self.may_move = self.uncommitted() <= super::MOVE_BYTES;
        for id in changed {
            self.advance(id, now);
        }
        self.open_waiting();
    }

    /// Looks at one file, since something hints at a change.
    pub(super) fn look_at_one(&mut self, id: TailId, now: Instant) {
        if self.tails.get_mut(&id).is_some_and(|tail| tail.look(now)) {
            self.advance(id, now);
        }
    }

    /// Warns while there is time to do something, and lets go of files when there is none left.
    fn hold(&mut self, held: u64) {
        let max = self.config.limits.max_held_bytes;
        let much = held >= max / 2;
        if much && !self.holds_much {
            tracing::warn!(
                held_bytes = held,
                max_held_bytes = max,
                "deleted files that are not committed hold more than half of what is allowed; beyond that they are given up"
            );
        }
        self.holds_much = much;
        self.metrics.held_much.set(i64::from(much));
        if held > max {
            self.give_up_deleted(held);
        }
    }

    fn uncommitted(&self) -> u64 {
        let streams = self.tails.values().filter_map(|tail| tail.named.as_ref());
        streams.map(|named| named.stream.accepted().offset.saturating_sub(named.stream.committed().offset)).sum()
    }

    /// Lets go of deleted files, the one that rests longest first, until the others are within the limit.
    fn give_up_deleted(&mut self, mut held: u64) {
        let mut deleted: Vec<(Instant, TailId)> =
            self.tails.iter().filter(|(_, tail)| tail.deleted).map(|(id, tail)| (tail.pace.grew_at(), *id)).collect();
        deleted.sort_unstable();
        for (_, id) in deleted {
            if held <= self.config.limits.max_held_bytes {
                return;
            }
            let Some(tail) = self.tails.get(&id) else { continue };
            let lost = tail.lag();
            held = held.saturating_sub(tail.pace.size());
            if lost > 0 {
                self.metrics.lost_bytes.inc_by(lost);
                tracing::error!(
                    path = %tail.path.display(), lost_bytes = lost, max_held_bytes = self.config.limits.max_held_bytes,
                    "a deleted file was given up: deleted files that are not committed hold more bytes than is allowed"
                );
            }
            if let (Some(stream), source, true) = (tail.stream_id(), tail.source, lost > 0) {
                self.stream_given_up(source, stream);
            }
            self.close(id, true);
        }
    }

    /// Lets go of a file. `finished`: it was rotated away and is committed to its end, or given up.
    pub(super) fn close(&mut self, id: TailId, finished: bool) {
        let Some(tail) = self.tails.remove(&id) else { return };
        tracing::info!(path = %tail.path.display(), size = tail.pace.size(), finished, "a file is closed");
        self.by_key.remove(&tail.key);
        if let Some(named) = &tail.named {
            self.by_stream.remove(&named.stream_id);
        }
        if let Some(mut checkpoint) = self.checkpoint(&tail) {
            checkpoint.finished = finished;
            self.remember(checkpoint);
        }
        if !tail.is_unlinked() {
            self.resting.insert(tail.key, tail.pace.size());
        }
        self.metrics.open_files.set(self.tails.len() as i64);
    }

    pub(super) fn checkpoint(&self, tail: &Tail) -> Option<Checkpoint> {
        let named = tail.named.as_ref()?;
        Some(Checkpoint {
            stream: named.stream_id,
            path: tail.path.clone(),
            device: tail.key.device,
            inode: tail.key.inode,
            birth_or_filesystem: tail.facts.birth_or_filesystem,
            origin_inode: named.origin.inode,
            origin_birth: named.origin.birth_or_filesystem,
            first_line_bytes: named.first_line.bytes,
            first_line_hash: named.first_line.hash,
            incarnation: named.incarnation,
            base: named.stream.base(),
            committed: named.stream.committed(),
            history: named.stream.history().collect(),
            category: self.config.sources[tail.source].category.clone(),
            finished: false,
            seen_ms: now_ms(),
            copy_of: None,
        })
    }

    pub(super) fn remember(&mut self, checkpoint: Checkpoint) {
        self.memory.insert(checkpoint.clone());
        self.checkpoints.save(checkpoint);
    }

    /// Saves what changed since it was saved last.
    pub(super) fn save_all(&mut self) {
        let unsaved = self
            .tails
            .values()
            .filter(|tail| tail.named.as_ref().is_some_and(|named| tail.saved != Some(named.stream.committed())));
        for checkpoint in unsaved.filter_map(|tail| self.checkpoint(tail)).collect::<Vec<_>>() {
            self.remember(checkpoint);
        }
    }
}

impl Tail {
    /// Asks for its size. Returns whether there is anything new.
    fn look(&mut self, now: Instant) -> bool {
        self.look_soon = false;
        let facts = match fstat(&self.file) {
            Ok(facts) => facts,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), error = %std::io::Error::from(error), "an open file can't be looked at");
                return false;
            }
        };
        let deleted = facts.st_nlink == 0;
        let modified = Some((facts.st_mtime, facts.st_mtime_nsec.cast_signed()));
        let written = std::mem::replace(&mut self.modified, modified) != modified;
        let mut changed = self.pace.seen(u64::try_from(facts.st_size).unwrap_or(0), now) || deleted != self.deleted;
        if !changed && written {
            // Perhaps with other bytes, and as many as before.
            self.pace.touched();
            changed = true;
        }
        self.deleted = deleted;
        if deleted {
            self.pace.rotated(now);
        }
        changed
    }

    /// Whether it is likely to change, or not to be found by a scan.
    fn is_in_use(&self, now: Instant) -> bool {
        let quiet = now.saturating_duration_since(self.pace.grew_at()) > QUIET_AFTER;
        !quiet || self.deleted || self.pace.is_rotated() || self.lag() > 0
    }

    pub(super) fn is_committed_to_its_end(&self) -> bool {
        match &self.named {
            Some(named) => {
                !named.stream.is_asking()
                    && named.stream.committed().offset == self.pace.size()
                    && named.stream.read().offset == self.pace.size()
            }
            None => self.pace.size() == 0,
        }
    }

    /// Whether no directory has the file that was found, so that no scan can find it again.
    fn is_unlinked(&self) -> bool {
        self.deleted && !self.unpacked
    }

    pub(super) fn is_busy(&self) -> bool {
        let in_flight = self.named.as_ref().is_some_and(|named| named.stream.is_in_flight());
        self.reading || self.reading_head || self.checking || self.comparing.is_some() || self.asked || in_flight
    }

    pub(super) fn stream_id(&self) -> Option<StreamId> {
        self.named.as_ref().map(|named| named.stream_id)
    }
}
