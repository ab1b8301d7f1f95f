//! Files: found, opened, named, looked at, closed.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::fstat;
use tributary_common::http::backoff::Backoff;
use tributary_common::ids::StreamId;
use tributary_common::position::{Position, TailHash};

use super::{
    Directories, Engine, Event, FORGET_INTERVAL, FirstLine, LOOK_INTERVAL, Named, STREAM_BACKOFF, Tail, now_ms,
};
use crate::checkpoint::Checkpoint;
use crate::config::ReadFrom;
use crate::discover::{Found, Missed, Scan, scan};
use crate::identity::{FileFacts, FileKey, Head, Origin, stream_id};
use crate::stream::Stream;
use crate::tail::Pace;
use crate::worker::{Carry, Job, Opened, TailId};

/// How far a file is that is to be shipped once.
pub(super) enum OnceState {
    Working,
    Done,
    Stuck(String),
}

impl Engine {
    pub(super) fn start_scan(&mut self, now: Instant) {
        self.scanning = true;
        self.scan_wanted = false;
        let missed = self.missed(now);
        let (config, sender) = (Arc::clone(&self.config), self.sender.clone());
        tokio::task::spawn_blocking(move || {
            // The engine may have ended meanwhile.
            let _ = sender.send(Event::Scanned(scan(&config.sources, &missed)));
        });
    }

    /// Closed files that are looked for by their inode numbers, since they may have been renamed, and have grown.
    fn missed(&mut self, now: Instant) -> Vec<Missed> {
        self.orphans.retain(|_, until| now < *until);
        let missed = |one: &Checkpoint| {
            let source = self.config.sources.iter().position(|source| source.category == one.category)?;
            // What was rotated while nobody looked may have been compressed since.
            let copies = !one.finished && (!self.scanned || self.orphans.contains_key(&one.stream));
            Some(Missed { inode: one.inode, path: one.path.clone(), source, copies })
        };
        self.memory.iter().filter(|one| !self.by_stream.contains_key(&one.stream)).filter_map(missed).collect()
    }

    pub(super) fn scan_done(&mut self, scan: Scan, now: Instant) {
        self.scanning = false;
        let first = !std::mem::replace(&mut self.scanned, true);
        self.next_scan = now + self.config.refresh_interval;
        for (directory, error) in &scan.unreadable {
            tracing::warn!(directory = %directory.display(), %error, "a directory can't be read: files in it are not shipped");
        }
        let directories: Directories = scan.directories;
        self.watcher.watch(&directories);
        let unreadable = |path: &Path| scan.unreadable.iter().any(|(directory, _)| path.starts_with(directory));
        // Files whose name another one has now, or none.
        for tail in self.tails.values_mut() {
            let found = scan.found.iter().find(|found| found.key == tail.key);
            match found {
                Some(found) if found.path == tail.path => {}
                Some(found) => {
                    tail.path.clone_from(&found.path);
                    tail.pace.rotated(now);
                }
                None if unreadable(&tail.path) => {}
                None => tail.pace.rotated(now),
            }
        }
        if scan.unreadable.is_empty() {
            self.forget_gone(&scan.found, now);
        }
        self.there = scan.found.iter().map(|found| (found.key.inode, found.key)).collect();
        self.free_copies();
        let mut opening: HashSet<FileKey> =
            self.opening.values().chain(self.unpacking.values()).map(|found| found.key).collect();
        for found in scan.found {
            let rests =
                self.resting.get(&found.key) == Some(&found.size) && !self.has_rested(found.key, found.source, now);
            let known = self.by_key.contains_key(&found.key) || rests || opening.contains(&found.key);
            if known || self.is_too_old(&found) {
                continue;
            }
            if self.tails.len() + self.opening.len() >= self.config.limits.max_open_files as usize && !self.make_room()
            {
                tracing::warn!(
                    path = %found.path.display(), max_open_files = self.config.limits.max_open_files,
                    "too many files are open: this one waits until another is committed to its end"
                );
                continue;
            }
            opening.insert(found.key);
            self.next_tail += 1;
            let id = TailId(self.next_tail);
            let at_end = self.config.sources[found.source].read_from == ReadFrom::End;
            self.workers.submit(id, Job::Open { path: found.path.clone(), find_end: first && at_end });
            self.opening.insert(id, found);
        }
        let ids: Vec<TailId> = self.tails.keys().copied().collect();
        for id in ids {
            self.advance(id, now);
        }
    }

    /// Forgets files that don't exist any more, so that neither memory nor the checkpoints grow with every rotation.
    fn forget_gone(&mut self, found: &[Found], now: Instant) {
        if now < self.next_forget {
            return;
        }
        self.next_forget = now + FORGET_INTERVAL;
        let there: HashSet<FileKey> = found.iter().map(|found| found.key).collect();
        self.resting.retain(|key, _| there.contains(key));
        self.beginnings.retain(|key, _| there.contains(key));
        self.unsearched.retain(|key| there.contains(key));
        let inodes: HashSet<u64> = there.iter().chain(self.by_key.keys()).map(|key| key.inode).collect();
        let forgotten = self.memory.forget(&inodes, now_ms());
        if !forgotten.is_empty() {
            for stream in &forgotten {
                self.taken.remove(stream);
            }
            self.checkpoints.forget(forgotten);
        }
    }

    fn is_too_old(&self, found: &Found) -> bool {
        let Some(limit) = self.config.sources[found.source].ignore_older else { return false };
        let age = found.modified.and_then(|modified| modified.elapsed().ok()).unwrap_or(Duration::ZERO);
        age > limit && !found.moved && !self.memory.knows_inode(found.key.inode)
    }

    /// Closes a file that has nothing to ship, if there is one.
    fn make_room(&mut self) -> bool {
        let idle = self.tails.iter().filter(|(_, tail)| tail.is_committed_to_its_end() && !tail.is_busy());
        let longest = idle.min_by_key(|(_, tail)| tail.pace.grew_at()).map(|(id, _)| *id);
        longest.is_some_and(|id| {
            self.close(id, false);
            true
        })
    }

    pub(super) fn opened(&mut self, id: TailId, opened: std::io::Result<Opened>, now: Instant) {
        let Some(found) = self.opening.remove(&id) else { return };
        let opened = match opened {
            Ok(opened) if opened.facts.key == found.key => opened,
            Ok(_) => {
                // Renamed between scan and opening: the next scan shows how.
                self.next_scan = self.next_scan.min(now + super::MIN_SCAN_INTERVAL);
                return;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => {
                tracing::warn!(path = %found.path.display(), %error, "a file can't be opened: it is tried again with the next scan");
                return;
            }
        };
        if let Head::Compressed(by, compressor) = opened.head {
            // Whatever was read from a file with this inode number, it was another one.
            self.others_are_gone(found.key.inode, None, now);
            return self.opened_compressed(id, found, opened.file, by, compressor);
        }
        self.follow(id, found, opened.file, opened.facts, opened.end.unwrap_or(Position::zero()), now);
        self.head_is(id, opened.facts, opened.head, now);
    }

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
            modified: None,
            named: None,
            generation: 0,
            next_base: base,
            next_history: Vec::new(),
            is_new: true,
            only_if_known: found.moved,
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
        if found.moved {
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
            Head::Unfinished(_) | Head::Compressed(..) => None,
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
        let named = Named { stream_id: known.stream, origin, incarnation: known.incarnation, first_line, stream };
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
        self.name(id, Named { stream_id, origin, incarnation, first_line, stream }, now);
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

    /// Looks at the sizes of all open files.
    pub(super) fn look(&mut self, now: Instant) {
        self.last_look = now;
        self.next_look = now + LOOK_INTERVAL;
        let mut changed = Vec::new();
        let (mut lag, mut held) = (0, 0);
        for (id, tail) in &mut self.tails {
            match fstat(&tail.file) {
                Ok(facts) => {
                    let size = u64::try_from(facts.st_size).unwrap_or(0);
                    let deleted = facts.st_nlink == 0;
                    let modified = Some((facts.st_mtime, facts.st_mtime_nsec.cast_signed()));
                    let written = std::mem::replace(&mut tail.modified, modified) != modified;
                    if tail.pace.seen(size, now) || deleted != tail.deleted {
                        changed.push(*id);
                    } else if written {
                        // Perhaps with other bytes, and as many as before.
                        tail.pace.touched();
                        changed.push(*id);
                    }
                    tail.deleted = deleted;
                    if deleted {
                        tail.pace.rotated(now);
                        held += size;
                    }
                }
                Err(error) => {
                    tracing::warn!(path = %tail.path.display(), error = %std::io::Error::from(error), "an open file can't be looked at");
                }
            }
            lag += tail.lag();
        }
        self.metrics.lag_bytes.set(lag as i64);
        self.metrics.held_bytes.set(held as i64);
        if held > self.config.limits.max_held_bytes {
            self.give_up_deleted(held);
        }
        self.may_move = self.uncommitted() <= super::MOVE_BYTES;
        for id in changed {
            self.advance(id, now);
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

    pub(super) fn once_state(&self, tail: &Tail) -> OnceState {
        match &tail.named {
            _ if tail.is_committed_to_its_end() => OnceState::Done,
            _ if self.settings(tail.source).is_none() && self.categories.is_some() => {
                OnceState::Stuck(self.missing_category(tail.source))
            }
            Some(named) if named.stream.stopped().is_some() => {
                OnceState::Stuck(named.stream.stopped().unwrap_or_default().to_owned())
            }
            _ => OnceState::Working,
        }
    }
}

impl Tail {
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
