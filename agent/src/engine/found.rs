//! Files: found by scans and by hints, opened when there is room.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tributary_common::position::Position;

use super::{Directories, Engine, Event, FORGET_INTERVAL, MIN_SCAN_INTERVAL, now_ms};
use crate::checkpoint::Checkpoint;
use crate::config::ReadFrom;
use crate::discover::{Found, FoundBy, Missed, Scan, look_at, look_at_renamed, scan};
use crate::identity::{FileKey, Head};
use crate::status::Unshipped;
use crate::worker::{Job, Opened, TailId};

/// A scan may take one part in so many of the time.
const SCAN_SHARE: u32 = 20;

/// For so long, a file that was renamed between being found and being opened is looked for in its directory.
const STRAY_SEARCH: Duration = Duration::from_secs(600);

/// Files that were found and can't be opened now.
#[derive(Debug, Default)]
pub(super) struct Unopened {
    /// They wait until others are closed.
    waiting: HashMap<FileKey, Found>,
    /// Where they are that can't be opened, and why, as it was said.
    unreadable: HashMap<FileKey, (PathBuf, String)>,
    /// Where they are that can be opened, but not be cut into lines, and why, as it was said.
    refused: HashMap<FileKey, (PathBuf, String)>,
    /// Directories that can't be read, as it was said.
    directories: HashMap<PathBuf, String>,
    /// Files that had another name when they were to be opened, and until when they are looked for.
    strays: HashMap<u64, (Missed, Instant)>,
    /// Files that may be closed to make room, the least recently active one last, as far as is known.
    closable: Vec<TailId>,
    /// Whether it was said that files wait.
    said: bool,
}

impl Unopened {
    /// Whether files are found that have not been opened yet, but could be later.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// What will not be shipped as it is, and why.
    pub(super) fn unshipped(&self) -> impl Iterator<Item = Unshipped> {
        let files = self.unreadable.values().chain(self.refused.values()).map(|(path, why)| (path, why));
        let all = files.chain(self.directories.iter());
        all.map(|(path, why)| Unshipped { path: path.clone(), reason: why.clone() })
    }

    /// What waits until other files are closed.
    pub(super) fn waiting(&self) -> impl Iterator<Item = Unshipped> {
        let reason = "waits until another file is committed to its end: max_open_files are open";
        self.waiting.values().map(|found| Unshipped { path: found.path.clone(), reason: reason.to_owned() })
    }

    /// The sources of these files.
    pub(super) fn waiting_sources(&self) -> HashSet<usize> {
        self.waiting.values().map(|found| found.source).collect()
    }
}

impl Engine {
    pub(super) fn start_scan(&mut self, now: Instant) {
        self.scanning = true;
        self.scan_begins(now);
        self.scan_wanted = false;
        let missed = self.missed(now);
        let (config, sender) = (std::sync::Arc::clone(&self.config), self.sender.clone());
        tokio::task::spawn_blocking(move || {
            // The engine may have ended meanwhile.
            let _ = sender.send(Event::Scanned(scan(&config.sources, &missed)));
        });
    }

    /// Closed files that are looked for by their inode numbers, since they may have been renamed, and have grown.
    fn missed(&mut self, now: Instant) -> Vec<Missed> {
        self.orphans.retain(|_, until| now < *until);
        self.unopened.strays.retain(|_, (_, until)| now < *until);
        let missed = |one: &Checkpoint| {
            let source = self.config.sources.iter().position(|source| source.category == one.category)?;
            // What was rotated while nobody looked may have been compressed since.
            let copies = !one.finished && (!self.scanned || self.orphans.contains_key(&one.stream));
            Some(Missed { inode: one.inode, path: one.path.clone(), source, copies, unread: false })
        };
        let closed = self.memory.iter().filter(|one| !self.by_stream.contains_key(&one.stream)).filter_map(missed);
        closed.chain(self.unopened.strays.values().map(|(missed, _)| missed.clone())).collect()
    }

    pub(super) fn scan_done(&mut self, scan: Scan, now: Instant) {
        self.scanning = false;
        let first = !std::mem::replace(&mut self.scanned, true);
        self.next_hinted_scan = now + MIN_SCAN_INTERVAL.max(scan.took * SCAN_SHARE);
        self.next_scan = self.next_hinted_scan.max(now + self.config.refresh_interval);
        self.metrics.scans.inc();
        self.metrics.scan_ms.set(scan.took.as_millis() as i64);
        self.say_unreadable(&scan.unreadable);
        let directories: Directories = scan.directories;
        self.watcher.watch(&directories);
        self.metrics.unwatched_directories.set(self.watcher.refused() as i64);
        let unreadable = |path: &Path| scan.unreadable.iter().any(|(directory, _)| path.starts_with(directory));
        // Files whose name another one has now, or none.
        let by_key: HashMap<FileKey, &Found> = scan.found.iter().map(|found| (found.key, found)).collect();
        for tail in self.tails.values_mut() {
            match by_key.get(&tail.key) {
                Some(found) => {
                    if found.path != tail.path {
                        tail.path.clone_from(&found.path);
                        tail.pace.rotated(now);
                    }
                    // What the scan saw may be older than what was seen of the open file since.
                    tail.look_soon |= found.size != tail.pace.size() || tail.modified != Some(found.written);
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
        // Files that have no name that a source has are found by no scan.
        self.unopened.waiting.retain(|_, found| found.by == FoundBy::FormerName);
        self.unopened.unreadable.retain(|key, _| by_key.contains_key(key));
        self.unopened.refused.retain(|key, _| by_key.contains_key(key));
        for found in scan.found {
            self.take_up(found, first, now);
        }
        self.say_waiting();
        self.look(now);
        let unreadable: Vec<_> = scan.unreadable.iter().map(|(directory, _)| directory.clone()).collect();
        self.begin_rounds(&unreadable, now);
        let ids: Vec<TailId> = self.tails.keys().copied().collect();
        for id in ids {
            self.advance(id, now);
        }
    }

    /// Takes what the system told of changes.
    pub(super) fn take_hints(&mut self, now: Instant) {
        let hints = self.watcher.take_hints();
        self.next_hints = None;
        self.last_hints = now;
        if hints.overflows > 0 {
            self.metrics.watch_overflows.inc_by(hints.overflows);
            tracing::warn!(
                overflows = hints.overflows,
                "the system could not tell of all changes in directories: a scan finds what was missed; \
                 where this is said often, raise fs.inotify.max_queued_events"
            );
        }
        if hints.scan {
            self.hinted_scan(now);
        }
        if !self.scanned {
            // The first scan finds them all, and decides where they are read from.
            return;
        }
        for (first, path) in hints.renamed {
            self.hinted_scan(now);
            // What its name would have shown is known only from here: the scan finds it by its inode number.
            if let Some(found) = look_at_renamed(&self.config.sources, &first, &path)
                && !self.by_key.contains_key(&found.key)
            {
                self.keep_looking_for(found.key, path, found.source, now);
            }
        }
        for path in hints.paths {
            match look_at(&self.config.sources, &path) {
                Some(found) => match self.by_key.get(&found.key) {
                    Some(&id) => self.look_at_one(id, now),
                    None => {
                        self.there.insert(found.key.inode, found.key);
                        self.take_up(found, false, now);
                    }
                },
                None => self.hinted_scan(now),
            }
        }
    }

    fn hinted_scan(&mut self, now: Instant) {
        self.next_scan = self.next_scan.min(self.next_hinted_scan.max(now));
    }

    /// Has a file opened, unless it is open, or there is nothing to do for it.
    fn take_up(&mut self, found: Found, first: bool, now: Instant) {
        let rests = self.resting.get(&found.key) == Some(&found.size) && !self.has_rested(found.key, found.source, now);
        let known = self.by_key.contains_key(&found.key) || rests || self.being_opened.contains(&found.key);
        if known || self.is_too_old(&found) {
            return;
        }
        if self.tails.len() + self.opening.len() >= self.config.limits.max_open_files as usize && !self.make_room() {
            self.unopened.waiting.insert(found.key, found);
            return;
        }
        self.open(found, first);
    }

    fn open(&mut self, found: Found, first: bool) {
        self.next_tail += 1;
        let id = TailId(self.next_tail);
        let find_end = first && self.config.sources[found.source].read_from == ReadFrom::End;
        self.workers.submit(id, Job::Open { path: found.path.clone(), find_end });
        self.being_opened.insert(found.key);
        self.opening.insert(id, found);
    }

    /// Opens files that wait, as far as others can be closed for them.
    pub(super) fn open_waiting(&mut self) {
        if self.unopened.waiting.is_empty() {
            return;
        }
        for key in self.unopened.waiting.keys().copied().collect::<Vec<_>>() {
            let full = self.tails.len() + self.opening.len() >= self.config.limits.max_open_files as usize;
            if full && !self.make_room() {
                break;
            }
            if let Some(found) = self.unopened.waiting.remove(&key)
                && !self.by_key.contains_key(&key)
                && !self.being_opened.contains(&key)
            {
                self.open(found, false);
            }
        }
        self.say_waiting();
    }

    fn say_waiting(&mut self) {
        let waiting = self.unopened.waiting.len();
        self.metrics.waiting_files.set(waiting as i64);
        if waiting > 0 && !self.unopened.said {
            tracing::warn!(
                files = waiting,
                max_open_files = self.config.limits.max_open_files,
                "too many files have something to ship: some wait until others are committed to their ends"
            );
        }
        self.unopened.said = waiting > 0;
    }

    fn say_unreadable(&mut self, directories: &[(PathBuf, String)]) {
        let said = std::mem::take(&mut self.unopened.directories);
        for (directory, error) in directories {
            if said.get(directory) != Some(error) {
                tracing::warn!(directory = %directory.display(), error, "a directory can't be read: files in it are not shipped");
            }
        }
        self.unopened.directories = directories.iter().cloned().collect();
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
        let age = found.age().unwrap_or(Duration::ZERO);
        age > limit && matches!(found.by, FoundBy::Name | FoundBy::Hint) && !self.memory.knows_inode(found.key.inode)
    }

    /// Closes the file that has had nothing to ship for longest, if there is one.
    fn make_room(&mut self) -> bool {
        let is_idle = |tail: &super::Tail| tail.is_committed_to_its_end() && !tail.is_busy() && !tail.deleted;
        loop {
            while let Some(id) = self.unopened.closable.pop() {
                if self.tails.get(&id).is_some_and(is_idle) {
                    self.close(id, false);
                    return true;
                }
            }
            if self.next_room > Instant::now() {
                return false;
            }
            // Looking through all of them costs something.
            self.next_room = Instant::now() + super::MIN_LOOK_INTERVAL;
            let mut idle: Vec<_> = self
                .tails
                .iter()
                .filter(|(_, tail)| is_idle(tail))
                .map(|(id, tail)| (tail.pace.grew_at(), *id))
                .collect();
            idle.sort_unstable_by(|a, b| b.cmp(a));
            if idle.is_empty() {
                return false;
            }
            self.unopened.closable = idle.into_iter().map(|(_, id)| id).collect();
        }
    }

    pub(super) fn opened(&mut self, id: TailId, opened: std::io::Result<Opened>, now: Instant) {
        let Some(found) = self.opening.remove(&id) else { return };
        self.being_opened.remove(&found.key);
        let opened = match opened {
            Ok(opened) if opened.facts.key == found.key => opened,
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let error = format!("it can't be opened: {error}");
                let said = self.unopened.unreadable.insert(found.key, (found.path.clone(), error.clone()));
                if said.is_none_or(|(_, said)| said != error) {
                    tracing::warn!(path = %found.path.display(), error, "a file can't be opened: it is tried again with each scan");
                }
                self.metrics.unreadable_files.set(self.unopened.unreadable.len() as i64);
                self.watermark_waits(found.source, "a file can't be opened");
                return;
            }
            _ => {
                self.watermark_waits(found.source, "a file was renamed or deleted meanwhile");
                // Renamed between being found and being opened: the next scan finds it by its inode number.
                if found.by != FoundBy::Likeness {
                    self.keep_looking_for(found.key, found.path, found.source, now);
                }
                self.hinted_scan(now);
                self.scan_wanted = true;
                return;
            }
        };
        self.unopened.strays.remove(&found.key.inode);
        if self.unopened.unreadable.remove(&found.key).is_some() {
            tracing::info!(path = %found.path.display(), "a file can be read again");
        }
        self.metrics.unreadable_files.set(self.unopened.unreadable.len() as i64);
        if let Head::Wide(encoding) = opened.head {
            self.resting.insert(found.key, found.size);
            return self.refuse(found.key, found.path, encoding);
        }
        self.unopened.refused.remove(&found.key);
        if let Head::Compressed(by, compressor) = opened.head {
            if found.by == FoundBy::Hint {
                return self.hinted_scan(now);
            }
            // Whatever was read from a file with this inode number, it was another one.
            self.others_are_gone(found.key.inode, None, now);
            return self.opened_compressed(id, found, opened.file, by, compressor);
        }
        self.follow(id, found, opened.file, opened.facts, opened.end.unwrap_or(Position::zero()), now);
        self.head_is(id, opened.facts, opened.head, now);
    }

    /// Has the following scans look for a file by its inode number, since it has no name by which they would find it.
    pub(super) fn keep_looking_for(&mut self, key: FileKey, path: PathBuf, source: usize, now: Instant) {
        let missed = Missed { inode: key.inode, path, source, copies: false, unread: true };
        self.unopened.strays.insert(key.inode, (missed, now + STRAY_SEARCH));
    }

    /// Says once that a file can't be shipped.
    pub(super) fn refuse(&mut self, key: FileKey, path: PathBuf, encoding: &str) {
        if self.unopened.refused.contains_key(&key) {
            return;
        }
        let reason = format!(
            "it is {encoding}, which can't be cut into lines: have its writer write UTF-8, or convert it (iconv -f {encoding} -t UTF-8)"
        );
        tracing::error!(path = %path.display(), reason, "a file is not shipped");
        self.unopened.refused.insert(key, (path, reason));
    }
}
