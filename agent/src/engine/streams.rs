//! Streams: what each wants next, and what the worker threads bring.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tributary_common::batch::Batch;
use tributary_common::messages::CategorySettings;
use tributary_common::position::Position;

use super::{Engine, Packed, Tail, now_ms, random};
use crate::compress::BatchFacts;
use crate::stream::{Note, ReadShowed, Want};
use crate::tail::When;
use crate::worker::{Carry, Done, Job, ReadJob, TailId};

/// How many batches a thread makes of a file before it takes another job. The loop hears of them together, since each time it is woken
/// costs as much as compressing 10 KiB.
const BATCHES_IN_A_ROW: u64 = 8;

impl Engine {
    /// What is known of a source's category.
    pub(super) fn settings(&self, source: usize) -> Option<CategorySettings> {
        let category = &self.config.sources[source].category;
        self.categories.as_ref()?.categories.get(category).copied()
    }

    pub(super) fn missing_category(&self, source: usize) -> String {
        format!(
            "the category {} is not in the topology of {}: add it there, or correct the source",
            self.config.sources[source].category,
            self.config.endpoints[self.pool.current()]
        )
    }

    /// Does what a file and its stream want now.
    pub(super) fn advance(&mut self, id: TailId, now: Instant) {
        if self.draining_until.is_some() {
            return;
        }
        let Some(tail) = self.tails.get(&id) else { return };
        let source = tail.source;
        if self.settings(source).is_none() {
            let waiting = match &self.categories {
                None => "no endpoint has told the settings of the categories yet".to_owned(),
                Some(_) => self.missing_category(source),
            };
            if let Some(tail) = self.tails.get_mut(&id) {
                tail.waiting = Some(waiting);
            }
            return;
        }
        let options = self.pace_options(source);
        let bucket_ends_at = self.bucket_end(source, now);
        let orphan = self
            .tails
            .get(&id)
            .filter(|tail| tail.named.as_ref().is_some_and(|named| matches!(named.stream.want(), Want::Replace(_))));
        let orphan = orphan.and_then(|tail| self.checkpoint(tail));
        let Some(tail) = self.tails.get_mut(&id) else { return };
        if tail.comparing.is_some() {
            return;
        }
        let over = tail.pace.is_over(now, &options);
        if tail.named.is_none() {
            // The beginning is worth another look when there is more of it, or will be no more.
            if let Some(at) = tail.not_before.filter(|at| now < *at) {
                self.wake_at(id, at);
                return;
            }
            let grown = tail.head_read_at != Some(tail.pace.size());
            if !tail.reading_head && (grown || (over && tail.pace.size() > 0)) {
                tail.reading_head = true;
                self.workers.submit(id, Job::Head(Arc::clone(&tail.file)));
            } else if over && tail.pace.is_rotated() && tail.pace.size() == 0 {
                self.close(id, true);
            } else if let When::At(at) = tail.pace.when(0, now, &options, None) {
                self.wake_at(id, at);
            }
            return;
        }
        let file = Arc::clone(&tail.file);
        let Some(named) = &mut tail.named else { return };
        if !tail.checking
            && let Some(position) = named.stream.commit_to_check()
        {
            tail.checking = true;
            self.workers.submit(id, Job::Check(Arc::clone(&file), vec![position]));
        }
        let may_send = !tail.asked && tail.not_before.is_none_or(|at| now >= at);
        if may_send && named.stream.sendable().next().is_some() && !self.ready.contains(&id) {
            self.ready.push_back(id);
            self.flush_at.get_or_insert(now + super::GATHER);
        }
        if let Some(at) = tail.not_before {
            if now < at {
                self.wake_at(id, at);
                return;
            }
            tail.not_before = None;
        }
        match named.stream.want() {
            Want::Ask => self.next_ask = self.next_ask.min(tail.ask_at.max(now)),
            Want::Check(positions) => {
                if !tail.checking {
                    tail.checking = true;
                    self.workers.submit(id, Job::Check(file, positions));
                }
            }
            Want::Replace(base) => {
                tracing::warn!(
                    path = %tail.path.display(), stream = %named.stream_id, base = base.offset,
                    "the file and the stream are not the same any more: a new stream begins"
                );
                let stream = named.stream_id;
                tail.generation = named.stream.generation() + 1;
                let history = named.stream.history().filter(|position| position.offset <= base.offset).collect();
                tail.named = None;
                tail.next_base = base;
                tail.next_history = history;
                tail.head_read_at = None;
                tail.asked = false;
                tail.careful = 0;
                self.by_stream.remove(&stream);
                if let Some(orphan) = orphan {
                    self.orphaned(stream, orphan, now);
                }
                self.advance(id, now);
            }
            Want::Stopped(_) | Want::Send => {}
            Want::Read(from) => {
                if tail.reading || tail.in_read_queue {
                    return;
                }
                match tail.pace.when(from.offset, now, &options, bucket_ends_at) {
                    When::Now(_) => {
                        tail.in_read_queue = true;
                        self.read_queue.push_back(id);
                    }
                    When::At(at) => self.wake_at(id, at),
                    When::Later => {
                        if over && tail.pace.is_rotated() && tail.is_committed_to_its_end() && !tail.is_busy() {
                            self.close(id, true);
                        }
                    }
                }
            }
        }
    }

    /// When the bucket ends into which a line goes that is read now, where that is by the time of reading.
    fn bucket_end(&self, source: usize, now: Instant) -> Option<Instant> {
        if self.config.sources[source].timestamp.is_some() {
            return None;
        }
        let now_ms = now_ms();
        let left = self.settings(source)?.bucket_s.bucket_of_ms(now_ms).end_ms() - now_ms;
        Some(now + Duration::from_millis(u64::try_from(left).unwrap_or(0)))
    }

    fn wake_at(&mut self, id: TailId, at: Instant) {
        let Some(tail) = self.tails.get_mut(&id) else { return };
        if tail.timer.is_none_or(|timer| at < timer) {
            tail.timer = Some(at);
            self.timers.push(Reverse((at, id)));
        }
    }

    /// Gives the worker threads what they can take and the memory allows.
    pub(super) fn read_more(&mut self, now: Instant) {
        let threads = usize::from(self.config.compression.threads);
        let share = self.config.batch.max_bytes;
        debug_assert!(self.jobs > 0 || self.reserved == 0, "{} bytes are reserved for no job", self.reserved);
        // One job waits, so that no thread does.
        while self.jobs <= threads {
            let used = self.buffered.load(Ordering::Relaxed) + self.reserved;
            let room = self.config.limits.max_buffer_bytes.saturating_sub(used) / share;
            // Batches of one stream are for all threads where there aren't enough streams for them.
            let in_a_row = if threads == 1 || self.read_queue.len() >= threads { BATCHES_IN_A_ROW } else { 1 };
            if room == 0 {
                break;
            }
            let Some(id) = self.read_queue.pop_front() else { break };
            let Some(tail) = self.tails.get_mut(&id) else { continue };
            tail.in_read_queue = false;
            self.read_one(id, in_a_row.min(room), now);
        }
        self.metrics.buffered_bytes.set((self.buffered.load(Ordering::Relaxed) + self.reserved) as i64);
    }

    /// Has batches made of a file, `most` of them if it has grown by so many.
    fn read_one(&mut self, id: TailId, most: u64, now: Instant) {
        let Some(tail) = self.tails.get(&id) else { return };
        let source = tail.source;
        let (Some(settings), Some(categories)) = (self.settings(source), &self.categories) else { return };
        let lane = self.config.agent_id.lane(categories.lanes);
        let options = self.pace_options(source);
        let bucket_ends_at = self.bucket_end(source, now);
        let config = &self.config;
        let Some(tail) = self.tails.get_mut(&id) else { return };
        let Some(named) = &tail.named else { return };
        // What was true when it was queued may not be so any more.
        let Want::Read(from) = named.stream.want() else { return };
        let When::Now(end) = tail.pace.when(from.offset, now, &options, bucket_ends_at) else {
            return self.advance(id, now);
        };
        let full = tail.pace.size().saturating_sub(from.offset) / config.batch.max_bytes;
        let most = if named.stream.is_probing() || tail.careful > 0 { 1 } else { most.min(full).max(1) as u32 };
        let job = ReadJob {
            generation: named.stream.generation(),
            source,
            from,
            most,
            first_line: (named.first_line.bytes, named.first_line.hash),
            end,
            carry: tail.carry,
            now_ms: now_ms(),
            bucket: settings.bucket_s,
            codec: (config.compression.codec.unwrap_or(settings.codec), config.compression.level),
            facts: BatchFacts {
                lane,
                agent: config.agent_id.clone(),
                host: config.host.clone(),
                category: config.sources[source].category.clone(),
                stream: named.stream_id,
                base: named.stream.base(),
                committed: named.stream.committed(),
                prefix_len: config.sources[source].record_prefix.len() as u32,
            },
        };
        tail.reading = true;
        self.jobs += 1;
        self.reserved += u64::from(most) * config.batch.max_bytes;
        self.workers.submit(id, Job::Read(Arc::clone(&tail.file), Box::new(job)));
    }

    pub(super) fn job_done(&mut self, id: TailId, done: Done, now: Instant) {
        let (batches, job_ended) = match done {
            Done::Packed { more, .. } => (1, more == 0),
            Done::Nothing { missing, .. } | Done::OtherBytes { missing, .. } | Done::ReadFailed { missing, .. } => {
                (missing, true)
            }
            _ => (0, false),
        };
        self.reserved -= u64::from(batches) * self.config.batch.max_bytes;
        self.jobs -= usize::from(job_ended);
        match done {
            Done::Opened(opened) => return self.opened(id, *opened, now),
            Done::Head(Ok((facts, head))) => return self.head_is(id, facts, head, now),
            Done::Head(Err(error)) | Done::ReadFailed { error, .. } => {
                if let Some(tail) = self.tails.get_mut(&id) {
                    tail.reading = false;
                    tail.reading_head = false;
                    let pause = tail.backoff.fail(random(), None);
                    tracing::warn!(path = %tail.path.display(), %error, pause_ms = pause.as_millis() as u64, "a file can't be read: it is tried again");
                    tail.waiting = Some(format!("the file can't be read: {error}"));
                    tail.not_before = Some(now + pause);
                }
            }
            Done::Checked(positions, matching) => self.checked(id, &positions, matching, now),
            Done::Compared(likeness) => return self.compared(id, likeness, now),
            Done::Unpacked(unpacked) => return self.unpacked(id, unpacked, now),
            Done::Cut { generation, from, end, carry, lines, altered, implausible, shares, more } => {
                self.metrics.lines.inc_by(lines);
                self.metrics.altered.inc_by(altered);
                self.metrics.implausible_times.inc_by(implausible);
                self.metrics.read_bytes.inc_by(end.offset - from.offset);
                if let Some(tail) = self.tails.get_mut(&id) {
                    tail.reading = more > 0;
                    if let Some(named) = &mut tail.named
                        && named.stream.has_read(generation, from, ReadShowed::Batch(end))
                    {
                        named.unstored.read(from.offset, end.offset, shares);
                        tail.carry = Carry::Known(carry);
                        tail.pace.has_read(end.offset, now);
                    }
                }
            }
            Done::Packed { generation, end, batch, .. } => self.packed(id, generation, end, batch),
            Done::Nothing { generation, size, .. } => {
                if let Some(tail) = self.tails.get_mut(&id) {
                    tail.reading = false;
                    if let Some(named) = &tail.named
                        && named.stream.generation() == generation
                    {
                        tail.pace.is_stuck(named.stream.read().offset, size, now);
                    }
                }
            }
            Done::OtherBytes { generation, from, size, .. } => self.other_bytes(id, generation, from, size, now),
            Done::Died => {}
        }
        self.advance(id, now);
    }
}

impl Engine {
    fn packed(&mut self, id: TailId, generation: u64, end: Position, batch: Result<Batch, String>) {
        let Some(Tail { named: Some(named), path, .. }) = self.tails.get_mut(&id) else { return };
        match batch {
            // A batch that is given back is one that nobody waits for any more.
            Ok(batch) => drop(named.stream.has_packed(generation, end, Packed::new(batch, &self.buffered))),
            Err(error) => {
                tracing::error!(path = %path.display(), stream = %named.stream_id, error, "a batch can't be made, which is a bug");
                self.note(id, &[Note::Refused(error.clone())]);
                if let Some(Tail { named: Some(named), .. }) = self.tails.get_mut(&id) {
                    named.stream.stop(error);
                }
            }
        }
    }

    fn other_bytes(&mut self, id: TailId, generation: u64, from: Position, size: u64, now: Instant) {
        let Some(tail) = self.tails.get_mut(&id) else { return };
        tail.reading = false;
        let Some(named) = &mut tail.named else { return };
        if named.stream.generation() != generation {
            return;
        }
        tracing::warn!(
            path = %tail.path.display(), stream = %named.stream_id, offset = from.offset, size,
            "the file does not have the bytes that it had: it was truncated or overwritten"
        );
        self.metrics.truncations.inc();
        tail.pace.seen(size, now);
        named.stream.has_read(generation, from, ReadShowed::OtherBytes);
    }

    fn checked(&mut self, id: TailId, positions: &[Position], matching: std::io::Result<Vec<Position>>, now: Instant) {
        let Some(tail) = self.tails.get_mut(&id) else { return };
        tail.checking = false;
        let Some(named) = &mut tail.named else { return };
        let before = named.stream.committed();
        let notes = match matching {
            Ok(matching) => match named.stream.commit_to_check() {
                Some(position) if positions == [position] => {
                    named.stream.commit_checked(position, matching.contains(&position))
                }
                _ if named.stream.want() == Want::Check(positions.to_vec()) => {
                    // Behind another place, the line before it may be of another time.
                    tail.carry = Carry::Search;
                    named.stream.checked(&matching)
                }
                _ => Vec::new(),
            },
            Err(error) => {
                let pause = tail.backoff.fail(random(), None);
                tracing::warn!(path = %tail.path.display(), %error, pause_ms = pause.as_millis() as u64, "a file can't be read: it is tried again");
                tail.not_before = Some(now + pause);
                Vec::new()
            }
        };
        let learned = named.stream.committed() != before;
        self.note(id, &notes);
        if learned && let Some(checkpoint) = self.tails.get(&id).and_then(|tail| self.checkpoint(tail)) {
            self.remember(checkpoint);
        }
    }

    /// Counts and logs what happened to a stream, and lets it rest where that is due.
    pub(super) fn note(&mut self, id: TailId, notes: &[Note]) {
        let now = Instant::now();
        let mut committed = false;
        let Some(tail) = self.tails.get_mut(&id) else { return };
        let Some(named) = &mut tail.named else { return };
        let (path, stream) = (tail.path.display(), named.stream_id);
        for note in notes {
            match note {
                Note::Committed(bytes) => {
                    self.metrics.committed_bytes.inc_by(*bytes);
                    committed = true;
                }
                Note::Wait(reason) => {
                    if tail.waiting.as_deref() != Some(reason) {
                        tracing::info!(%path, %stream, reason, "upstream can't take a stream now: it waits");
                    }
                    tail.not_before = Some(now + tail.backoff.fail(random(), None));
                    tail.waiting = Some(reason.clone());
                }
                Note::Back(bytes) => {
                    self.metrics.resent_bytes.inc_by(*bytes);
                    tail.carry = Carry::Search;
                    if *bytes > 0 {
                        tracing::info!(%path, %stream, bytes, "what was sent is missing upstream: it is sent again");
                    }
                }
                Note::Ahead(bytes) => {
                    tail.carry = Carry::Search;
                    tracing::info!(%path, %stream, bytes, "upstream has more than was sent: that is skipped");
                }
                Note::Alarm { expected, committed } => {
                    self.metrics.alarms.inc();
                    tracing::error!(
                        %path, %stream, expected = expected.offset, committed = committed.offset,
                        "upstream wants bytes that it had committed: it has lost them; nothing is sent again by itself"
                    );
                    let reason = format!("upstream wants {}, and had committed {}", expected.offset, committed.offset);
                    tail.not_before = Some(now + tail.backoff.fail(random(), None));
                    tail.waiting = Some(reason);
                }
                Note::Diverged => {
                    self.metrics.diverged.inc();
                    tracing::warn!(%path, %stream, "the file and upstream have different bytes: their common part is looked for");
                }
                Note::Refused(reason) => {
                    self.metrics.stopped.inc();
                    tracing::error!(%path, %stream, reason, "upstream refuses a stream for good: it stops, nothing is dropped; mend it and start the agent again");
                }
                Note::Lost(bytes) => {
                    self.metrics.lost_bytes.inc_by(*bytes);
                    tracing::error!(%path, %stream, lost_bytes = bytes, "bytes are lost: the file was replaced before they were taken upstream");
                }
            }
        }
        if committed {
            tail.saved = Some(named.stream.committed());
            tail.pace.committed(named.stream.committed().offset);
            if let Some(of) = self.desk.of(&self.config.sources[tail.source].category) {
                named.unstored.stored(named.stream.committed().offset).for_each(|share| of.tally.add(share));
            }
            let tail = &self.tails[&id];
            if let Some(checkpoint) = self.checkpoint(tail) {
                self.remember(checkpoint);
            }
        }
    }
}
