//! Files that hold what a known stream held elsewhere: copies, compressed or not.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tributary_common::ids::StreamId;
use tributary_common::position::{Position, TailHash};

use super::{Engine, MIN_SCAN_INTERVAL, Tail, now_ms};
use crate::checkpoint::Checkpoint;
use crate::copies::{Compressor, Likeness, Original, Unpacked};
use crate::discover::{Found, FoundBy};
use crate::identity::{FileFacts, FileKey, stream_id};
use crate::worker::{Job, TailId};

/// For so long, copies of a stream whose file holds something else now are looked for, under names that no source has.
const ORPHAN_SEARCH: Duration = Duration::from_secs(600);

impl Engine {
    /// Has the file, which begins with `line`, compared with the streams that begin so, too. Gives the line back where
    /// there are none.
    pub(super) fn compare(&mut self, id: TailId, line: Vec<u8>, now: Instant) -> Option<Vec<u8>> {
        let tail = self.tails.get(&id)?;
        if tail.compared || !tail.is_new {
            return Some(line);
        }
        let rested = self.once || self.has_rested(tail.key, tail.source, now);
        let category = &self.config.sources[tail.source].category;
        let candidates = self.memory.candidates(category, TailHash::of(&line), &tail.path);
        if candidates.iter().any(|one| tail.by_hint || self.is_to_be_opened(one)) {
            // First the stream's own file has to be looked at, or what has its inode number now.
            self.put_off(id, now);
            return None;
        }
        let candidates: Vec<_> = candidates.into_iter().filter(|one| !self.is_successor(tail, one)).collect();
        if candidates.is_empty() {
            return Some(line);
        }
        let originals = candidates.into_iter().map(|one| self.original(one)).collect();
        let tail = self.tails.get_mut(&id)?;
        tail.comparing = Some(line);
        self.workers.submit(id, Job::Compare { file: Arc::clone(&tail.file), originals, rested });
        None
    }

    /// Whether the file took the name of the stream's file when that was renamed: then it is a new log, whatever its
    /// first lines are.
    fn is_successor(&self, tail: &Tail, one: &Checkpoint) -> bool {
        match self.tail_of(one.stream) {
            Some(other) => other.path == tail.path && !other.deleted,
            None => one.path == tail.path && self.is_there(one),
        }
    }

    pub(super) fn tail_of(&self, stream: StreamId) -> Option<&Tail> {
        self.tails.get(self.by_stream.get(&stream)?)
    }

    /// Whether the last scan found the stream's own file.
    pub(super) fn is_there(&self, one: &Checkpoint) -> bool {
        let has_other_file = self.gone.contains(&one.stream);
        self.there.contains_key(&one.inode) && !has_other_file && self.memory.is_newest(one)
    }

    /// Whether the stream's own file is there, and not open yet.
    fn is_to_be_opened(&self, one: &Checkpoint) -> bool {
        let Some(key) = self.there.get(&one.inode) else { return false };
        !self.by_key.contains_key(key) && !self.resting.contains_key(key) && self.is_there(one)
    }

    fn original(&self, one: &Checkpoint) -> Original {
        let tail = self.tail_of(one.stream);
        Original {
            stream: one.stream,
            file: tail.map(|tail| Arc::clone(&tail.file)),
            committed: one.committed,
            history: one.history.clone(),
            finished: one.finished,
        }
    }

    pub(super) fn compared(
        &mut self,
        id: TailId,
        likeness: std::io::Result<Option<(StreamId, Likeness)>>,
        now: Instant,
    ) {
        let Some(tail) = self.tails.get_mut(&id) else { return };
        let Some(line) = tail.comparing.take() else { return };
        let likeness = match likeness {
            Ok(likeness) => likeness,
            Err(error) => {
                tracing::warn!(path = %tail.path.display(), %error, "a file can't be read: it is tried again");
                return self.put_off(id, now);
            }
        };
        let (path, key) = (tail.path.clone(), tail.key);
        let path = path.display();
        match likeness {
            None => {
                tail.compared = true;
                self.beginnings.remove(&key);
                self.name_new(id, &line, now);
                self.advance(id, now);
            }
            Some((stream, Likeness::Beginning)) => {
                tracing::info!(%path, %stream, "a file is so far the same as the beginning of a known one: it waits");
                self.beginnings.insert(key, now);
                self.rest(id);
            }
            Some((stream, Likeness::Copy(upto))) if self.is_replaced(stream, upto) => {
                tracing::info!(%path, %stream, "the file of a stream was replaced by another with the same bytes: the stream goes on in that");
                if let Some(&old) = self.by_stream.get(&stream) {
                    self.close(old, false);
                }
                if let Some(known) = self.memory.get(stream).cloned() {
                    self.metrics.continued.inc();
                    self.name_known(id, known, now);
                    self.advance(id, now);
                }
            }
            Some((stream, Likeness::Copy(upto))) => {
                tracing::info!(%path, %stream, bytes = upto.offset, "a file is a copy of a known one: what it has beyond that is shipped");
                self.is_copy(id, &line, stream, upto, now);
            }
            Some((stream, Likeness::Continuation)) => {
                let elsewhere = self.by_stream.contains_key(&stream);
                let known = self.memory.get(stream).cloned();
                match known {
                    Some(known) if !elsewhere => {
                        tracing::info!(%path, %stream, committed = known.committed.offset, "a stream goes on in another file");
                        self.metrics.continued.inc();
                        self.name_known(id, known, now);
                        self.advance(id, now);
                    }
                    // The stream's own file will soon be seen to hold something else.
                    _ => self.put_off(id, now),
                }
            }
        }
    }

    /// Whether the stream's own file has no name any more, and no more bytes than these.
    fn is_replaced(&self, stream: StreamId, upto: Position) -> bool {
        self.tail_of(stream)
            .is_some_and(|tail| FileFacts::of(&tail.file).is_ok_and(|facts| facts.deleted && facts.size <= upto.offset))
    }

    /// Up to a place the file holds what is shipped from another one.
    fn is_copy(&mut self, id: TailId, line: &[u8], original: StreamId, upto: Position, now: Instant) {
        let Some(tail) = self.tails.get(&id) else { return };
        let Some(known) = self.memory.get(original) else { return self.put_off(id, now) };
        let (origin, agent) = (tail.facts.origin(), &self.config.agent_id);
        let Some((incarnation, stream)) = (0..=u32::MAX)
            .map(|incarnation| (incarnation, stream_id(agent, origin, line, incarnation)))
            .find(|(_, stream)| !self.taken.contains(stream))
        else {
            return;
        };
        let checkpoint = Checkpoint {
            stream,
            path: tail.path.clone(),
            device: tail.key.device,
            inode: tail.key.inode,
            birth_or_filesystem: tail.facts.birth_or_filesystem,
            origin_inode: origin.inode,
            origin_birth: origin.birth_or_filesystem,
            first_line_bytes: line.len() as u32,
            first_line_hash: TailHash::of(line),
            incarnation,
            base: upto,
            committed: upto,
            history: vec![upto],
            category: known.category.clone(),
            finished: false,
            seen_ms: now_ms(),
            copy_of: Some(original),
        };
        self.taken.insert(stream);
        let rests = upto.offset == tail.pace.size() || tail.only_if_known;
        self.remember(checkpoint.clone());
        if rests {
            self.rest(id);
        } else {
            self.name_known(id, checkpoint, now);
            self.advance(id, now);
        }
    }

    /// The stream's file holds something else now: what is missing of it may be in a copy.
    pub(super) fn orphaned(&mut self, stream: StreamId, checkpoint: Checkpoint, now: Instant) {
        let source = self.config.sources.iter().position(|source| source.category == checkpoint.category);
        if let Some(source) = source {
            self.watermark_waits(source, "a file was replaced: what is missing of it may be in a copy");
        }
        self.remember(checkpoint);
        self.search_for(stream, now);
    }

    /// Where a stream is not complete and its file is gone, its copies are looked at anew: it goes on in one of them.
    pub(super) fn free_copies(&mut self) {
        let is_missing =
            |one: &Checkpoint| !one.finished && !self.by_stream.contains_key(&one.stream) && !self.is_there(one);
        let free = self
            .memory
            .mere_copies()
            .filter(|(copy, original)| is_missing(original) && !self.by_stream.contains_key(&copy.stream));
        let free: Vec<_> = free.map(|(copy, _)| (copy.stream, copy.inode)).collect();
        for (copy, inode) in free {
            self.memory.remove(copy);
            self.taken.remove(&copy);
            self.checkpoints.forget(vec![copy]);
            self.resting.retain(|key, _| key.inode != inode);
        }
    }

    /// The file with this inode number is that of `stream`, or of a new one: where others were known to be there, theirs
    /// is gone.
    pub(super) fn others_are_gone(&mut self, inode: u64, stream: Option<StreamId>, now: Instant) {
        let is_other = |one: &&Checkpoint| Some(one.stream) != stream && !self.gone.contains(&one.stream);
        let others = self.memory.at_inode(inode).filter(is_other);
        let others: Vec<_> = others.map(|one| (one.stream, one.finished || one.copy_of.is_some())).collect();
        for (other, complete) in others {
            self.gone.insert(other);
            if !complete && !self.by_stream.contains_key(&other) {
                self.search_for(other, now);
            }
        }
    }

    /// Has copies of the file of a stream looked for, which holds something else now.
    fn search_for(&mut self, stream: StreamId, now: Instant) {
        self.orphans.insert(stream, now + ORPHAN_SEARCH);
        for key in self.unsearched.drain() {
            self.resting.remove(&key);
        }
        self.scan_soon(now);
    }

    /// The file is closed, and looked at again when it has another size.
    pub(super) fn rest(&mut self, id: TailId) {
        if let Some(tail) = self.let_go(id, Instant::now()) {
            self.resting.insert(tail.key, tail.pace.size());
        }
    }

    /// The file is closed, and looked at again with the next scan.
    fn put_off(&mut self, id: TailId, now: Instant) {
        if let Some(tail) = self.let_go(id, now) {
            self.watermark_waits(tail.source, "a file can't be judged yet");
            self.scan_wanted = true;
            self.next_scan = self.next_scan.min(self.next_hinted_scan.max(now + super::LOOK_INTERVAL));
        }
    }

    /// Closes a file of which no stream is read.
    fn let_go(&mut self, id: TailId, now: Instant) -> Option<Tail> {
        let tail = self.tails.remove(&id)?;
        self.by_key.remove(&tail.key);
        self.metrics.open_files.set(self.tails.len() as i64);
        if tail.by_former_name {
            self.keep_looking_for(tail.key, tail.path.clone(), tail.source, now);
        }
        Some(tail)
    }

    pub(super) fn scan_soon(&mut self, now: Instant) {
        self.scan_wanted = true;
        self.next_scan = self.next_scan.min(self.next_hinted_scan.max(now + MIN_SCAN_INTERVAL));
    }

    /// Whether a file is so far the beginning of a known one, and has not rested long enough to be judged.
    pub(super) fn is_undecided(&self, file: FileKey, source: usize, now: Instant) -> bool {
        self.beginnings.contains_key(&file) && !self.has_rested(file, source, now)
    }

    /// Whether a file that is so far the beginning of a known one has rested long enough to be judged.
    pub(super) fn has_rested(&self, file: FileKey, source: usize, now: Instant) -> bool {
        let wait = self.config.sources[source].rotate_wait;
        self.beginnings.get(&file).is_some_and(|since| now >= *since + wait)
    }

    pub(super) fn opened_compressed(
        &mut self,
        id: TailId,
        found: Found,
        file: Arc<File>,
        by: &'static str,
        compressor: Option<Compressor>,
    ) {
        let category = &self.config.sources[found.source].category;
        let is_missing = |one: &&Checkpoint| {
            let is_log = one.category == *category && one.copy_of.is_none();
            is_log && !one.finished && !self.is_there(one) && !self.by_stream.contains_key(&one.stream)
        };
        let originals: Vec<_> = self
            .memory
            .iter()
            .filter(is_missing)
            .map(|one| (one.first_line_hash, one.first_line_bytes, self.original(one)))
            .collect();
        match compressor {
            Some(compressor) if !originals.is_empty() => {
                let directory = self.config.data_dir.clone();
                self.being_opened.insert(found.key);
                self.unpacking.insert(id, found);
                self.workers.submit(id, Job::Unpack { file, compressor, originals, directory });
            }
            _ => {
                if found.by != FoundBy::Likeness {
                    tracing::info!(path = %found.path.display(), by, "a file is compressed, and so not a log to ship: exclude it to hear no more of it");
                }
                self.resting.insert(found.key, found.size);
                self.unsearched.insert(found.key);
            }
        }
    }

    pub(super) fn unpacked(&mut self, id: TailId, unpacked: std::io::Result<Option<Unpacked>>, now: Instant) {
        let Some(found) = self.unpacking.remove(&id) else { return };
        self.being_opened.remove(&found.key);
        let path = found.path.display();
        let Unpacked { stream, file } = match unpacked {
            Ok(Some(unpacked)) => unpacked,
            Ok(None) => {
                self.resting.insert(found.key, found.size);
                return;
            }
            Err(error) => {
                // It may be in the making; its size or the next run of this program brings it back.
                tracing::warn!(%path, %error, "a compressed file can't be searched for what is missing of known streams: it is tried again when its size changes");
                self.resting.insert(found.key, found.size);
                return;
            }
        };
        let is_open = self.by_stream.contains_key(&stream);
        let (Some(known), false) = (self.memory.get(stream).cloned(), is_open) else { return };
        let facts = match FileFacts::of(&file) {
            Ok(facts) => FileFacts { key: found.key, ..facts },
            Err(error) => {
                tracing::warn!(%path, %error, "the unpacked bytes of a file can't be read");
                return;
            }
        };
        tracing::info!(%path, %stream, committed = known.committed.offset, size = facts.size, "a stream goes on in a compressed file");
        self.metrics.continued.inc();
        self.follow(id, found, Arc::new(file), facts, known.base, now);
        if let Some(tail) = self.tails.get_mut(&id) {
            tail.unpacked = true;
            tail.is_new = false;
        }
        self.name_known(id, known, now);
        self.advance(id, now);
    }
}
