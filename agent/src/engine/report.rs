//! What is told of the agent's state: its status, and how `--once` ends.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Engine, RunError, Tail};
use crate::status::{FileStatus, Status, Unshipped};
use crate::stream::Stream;

/// How far a file is that is to be shipped once.
pub(super) enum OnceState {
    Working,
    Done,
    Stuck(String),
}

impl Engine {
    /// How it ended, if it did.
    pub(super) fn is_over(&mut self, now: Instant) -> Option<Result<(), RunError>> {
        if let Some(until) = self.draining_until {
            let over = self.requests.is_empty() || now >= until;
            return over.then(|| match self.lag() {
                left if self.once && left > 0 => Err(RunError::Unfinished { left }),
                _ => Ok(()),
            });
        }
        if !self.once {
            return None;
        }
        let opening = !self.opening.is_empty() || !self.unpacking.is_empty() || self.unopened.is_waiting();
        let looking = opening || self.scanning || self.scan_wanted;
        if !self.scanned || looking {
            return self.lost_patience(now);
        }
        let mut stuck: Vec<Unshipped> = self.unopened.unshipped().collect();
        for tail in self.tails.values() {
            match self.once_state(tail) {
                OnceState::Working => {
                    self.stays();
                    return self.lost_patience(now);
                }
                OnceState::Done => {}
                OnceState::Stuck(reason) => stuck.push(Unshipped { path: tail.path.clone(), reason }),
            }
        }
        match (stuck.len(), stuck.into_iter().min_by(|a, b| a.path.cmp(&b.path))) {
            (files, Some(Unshipped { path, reason })) => Some(Err(RunError::Stopped { files, path, reason })),
            _ => self.has_parted(now).then_some(Ok(())),
        }
    }

    /// Whether nothing has been committed for too long.
    fn lost_patience(&mut self, now: Instant) -> Option<Result<(), RunError>> {
        let patience = self.patience?;
        let committed = self.metrics.committed_bytes.get();
        if committed != self.progress.1 {
            self.progress = (now, committed);
        }
        (now >= self.progress.0 + patience).then(|| {
            let waiting = self.tails.values().find_map(|tail| tail.waiting.clone());
            let reason = self.troubles().into_iter().next().or(waiting);
            let reason = reason.unwrap_or_else(|| "upstream has not said that they are durable".to_owned());
            Err(RunError::NoProgress { patience, left: self.lag(), reason })
        })
    }

    fn once_state(&self, tail: &Tail) -> OnceState {
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

    fn lag(&self) -> u64 {
        self.tails.values().map(Tail::lag).sum()
    }

    pub(super) fn status(&self) -> Status {
        let now = Instant::now();
        let mut files: Vec<FileStatus> = self.tails.values().map(|tail| self.file_status(tail, now)).collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut unshipped: Vec<_> = self.unopened.unshipped().chain(self.unopened.waiting()).collect();
        unshipped.sort_by(|a, b| a.path.cmp(&b.path));
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            agent: self.config.agent_id.clone(),
            host: self.config.host.clone(),
            endpoint: self.config.endpoints[self.pool.current()].to_string(),
            troubles: self.troubles(),
            buffered_bytes: self.buffered.load(Ordering::Relaxed) + self.reserved,
            lag_bytes: self.lag(),
            held_bytes: files.iter().map(|file| file.held).sum(),
            files,
            unshipped,
        }
    }

    /// What keeps the agent from doing its work as it should.
    fn troubles(&self) -> Vec<String> {
        let checkpoints = self.checkpoint_trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.trouble.iter().cloned().chain(checkpoints).chain(self.desk.troubles()).collect()
    }

    fn file_status(&self, tail: &Tail, now: Instant) -> FileStatus {
        let stream = tail.named.as_ref().map(|named| &named.stream);
        let source = &self.config.sources[tail.source];
        let committed = stream.map_or(0, |stream| stream.committed().offset);
        let size = tail.pace.size();
        let unnamed = if self.settings(tail.source).is_none() {
            "waiting for the settings of its category"
        } else if size == 0 {
            "empty"
        } else {
            "waiting for the end of the first line"
        };
        FileStatus {
            path: tail.path.clone(),
            category: source.category.clone(),
            stream: tail.named.as_ref().map(|named| named.stream_id),
            size,
            read: stream.map_or(0, |stream| stream.read().offset),
            next: stream.map_or(0, |stream| stream.accepted().offset),
            committed,
            held: if tail.deleted { size } else { 0 },
            lag: tail.lag(),
            lag_seconds: tail.pace.behind(committed, now).as_secs(),
            rotated: tail.pace.is_rotated(),
            deleted: tail.deleted,
            state: stream.map_or(unnamed, Stream::state).to_owned(),
            waiting: self.why_it_waits(tail),
        }
    }

    /// Why a file that is not committed to its end isn't, as far as is known.
    fn why_it_waits(&self, tail: &Tail) -> Option<String> {
        let stream = tail.named.as_ref().map(|named| &named.stream);
        let told = stream.and_then(|stream| stream.stopped().map(str::to_owned)).or_else(|| tail.waiting.clone());
        if told.is_some() || tail.lag() == 0 {
            return told;
        }
        let stream = stream?;
        let unread = tail.pace.size().saturating_sub(stream.read().offset);
        Some(match self.trouble.as_ref() {
            Some(trouble) => trouble.clone(),
            None if unread > 0 && tail.in_read_queue => "other files are read before it".to_owned(),
            None if unread > 0 && tail.pace.is_unterminated(stream.read().offset) => {
                "its last line has no end yet".to_owned()
            }
            None if unread > 0 => return None,
            None if stream.accepted().offset < stream.read().offset => "its last bytes are being sent".to_owned(),
            None => "upstream has it, and has not said that it is durable".to_owned(),
        })
    }
}

impl Tail {
    pub(super) fn lag(&self) -> u64 {
        let committed = self.named.as_ref().map_or(0, |named| named.stream.committed().offset);
        self.pace.size().saturating_sub(committed)
    }
}
