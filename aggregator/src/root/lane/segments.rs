//! Segments: found or begun for a frame, synced, closed, given up and read back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tributary_common::frame::{Codec, EncodeError, FrameHeader, SliceDescriptor};

use super::hours::key_of;
use super::{Closed, Event, GivenUp, Lane, Unsettled};
use crate::dfs::{CreateOptions, DfsError};
use crate::root::late_create::delete_late;
use crate::root::ledger::{Contents, HourKey, SegmentRecord};
use crate::root::placement::MIN_BLOCK_BYTES;
use crate::root::roster::Came;
use crate::root::segment::{HeldRanges, Segment, SegmentId, WriterReport, file_name, spawn_writer};
use crate::root::sink::Scan;

/// So many bytes of small frames are merged without waiting for the next commit.
const MOST_KEPT_BACK: u64 = 1 << 20;

impl Lane {
    pub(super) fn write(&mut self, key: HourKey, codec: Codec, slice: SliceDescriptor, frame: Bytes) {
        self.ingest.wrote(slice.stream, slice.runs.iter().map(tributary_common::frame::Run::range));
        self.metrics.wrote(frame.len() as u64, slice.records);
        let now = self.elapsed_ms();
        let id = self.segment_for(key, codec);
        let small = (frame.len() as u64) < self.settings.recompress_below;
        if !small && self.open.get(&id).is_some_and(|segment| segment.keeps_back(slice.stream)) {
            // A stream's bytes stand in a file in their order.
            self.flush_small(id);
        }
        let segment = self.open.get_mut(&id).expect("it was found or made just now");
        segment.last_write_ms = now;
        if small {
            segment.small_bytes += frame.len() as u64;
            segment.small.push((slice, frame));
            if segment.small_bytes >= MOST_KEPT_BACK {
                self.flush_small(id);
            }
        } else {
            segment.write(vec![slice], frame);
        }
    }

    pub(super) fn segment_for(&mut self, key: HourKey, codec: Codec) -> SegmentId {
        if let Some(id) = self.writing.get(&(key.clone(), codec)) {
            return *id;
        }
        let id = SegmentId(self.next_segment);
        self.next_segment += 1;
        let name = file_name(&key, codec, self.sink.lane, self.epoch, id);
        let roll_size =
            self.settings.categories.get(&key.category).map_or(MIN_BLOCK_BYTES, |settings| settings.roll_size);
        let wanted = CreateOptions { block_size: block_size(roll_size), ..self.sink.create };
        let asked = self.sink.placement.for_new_file(Instant::now(), wanted);
        let path = self.sink.dir.join(&name);
        let writer = spawn_writer(Arc::clone(&self.sink.dfs), path, asked, id, self.reports.clone());
        self.open.insert(id, Segment::new(id, name, key.clone(), codec, asked, writer));
        self.writing.insert((key, codec), id);
        id
    }

    /// Hands over what was kept back to be merged.
    pub(super) fn flush_small(&mut self, id: SegmentId) {
        let Some(segment) = self.open.get_mut(&id) else { return };
        let mut small = std::mem::take(&mut segment.small);
        segment.small_bytes = 0;
        let (codec, key) = (segment.codec, segment.key.clone());
        while !small.is_empty() {
            let rest = small.split_off(merge_count(&small));
            let group = std::mem::replace(&mut small, rest);
            let merged = if group.len() > 1 { self.merge(codec, &key, &group) } else { None };
            let segment = self.open.get_mut(&id).expect("nothing was removed in between");
            match merged {
                Some(frame) => segment.write(group.into_iter().map(|(slice, _)| slice).collect(), frame),
                None => group.into_iter().for_each(|(slice, frame)| segment.write(vec![slice], frame)),
            }
        }
    }

    /// Merges small frames into one; none when they are better written as they are.
    pub(super) fn merge(&mut self, codec: Codec, key: &HourKey, group: &[(SliceDescriptor, Bytes)]) -> Option<Bytes> {
        let mut body = Vec::new();
        for (slice, frame) in group {
            let decoded = FrameHeader::verify(frame).and_then(|header| header.decode(frame));
            match decoded {
                Ok(bytes) => body.extend_from_slice(&bytes),
                Err(error) => {
                    // Its checksum is that of its maker, so no tier can mend it; readers must be able to see that.
                    tracing::error!(stream = %slice.stream, %error, "a frame can't be decompressed; it is stored as it came");
                    return None;
                }
            }
        }
        let slices: Vec<SliceDescriptor> = group.iter().map(|(slice, _)| slice.clone()).collect();
        match self.encoder(codec).encode(&key.category, key.bucket, &slices, &body) {
            Ok(frame) => {
                self.metrics.merged(group.len());
                Some(frame)
            }
            Err(EncodeError::HeaderTooLarge { .. } | EncodeError::Descriptors(_)) => None,
        }
    }

    pub(super) fn commit(&mut self) {
        let dirty: Vec<SegmentId> =
            self.open.values().filter(|segment| segment.wants_sync()).map(|segment| segment.id).collect();
        for id in dirty {
            self.flush_small(id);
            if let Some(segment) = self.open.get_mut(&id) {
                segment.sync();
            }
        }
    }

    pub(super) fn close(&mut self, id: SegmentId) {
        self.flush_small(id);
        if let Some(segment) = self.open.get_mut(&id)
            && !segment.closing
        {
            segment.close();
            self.writing.remove(&(segment.key.clone(), segment.codec));
        }
    }

    /// Closes what is large enough, idle, or too much.
    pub(super) fn close_due(&mut self) {
        let now = self.elapsed_ms();
        let mut due: Vec<SegmentId> = Vec::new();
        for segment in self.open.values().filter(|segment| !segment.closing) {
            let settings = self.settings.categories.get(&segment.key.category);
            let idle = now.saturating_sub(segment.last_write_ms);
            let late = self.hours.contains_key(&segment.key);
            let patience = settings.map_or(Duration::ZERO, |settings| {
                // Late data is complete sooner or later than any hour; it waits no longer than an hour's own close.
                if late {
                    settings.idle_timeout.min(settings.close_delay.max(self.settings.commit_interval))
                } else {
                    settings.idle_timeout
                }
            });
            let full = settings.is_none_or(|settings| segment.written + segment.small_bytes >= settings.roll_size);
            if full || u128::from(idle) >= patience.as_millis() || self.draining {
                due.push(segment.id);
            }
        }
        let open = self.open.values().filter(|segment| !segment.closing).count() - due.len();
        if open > self.settings.max_open_files {
            let mut by_age: Vec<(u64, SegmentId)> = self
                .open
                .values()
                .filter(|segment| !segment.closing && !due.contains(&segment.id))
                .map(|segment| (segment.last_write_ms, segment.id))
                .collect();
            by_age.sort_unstable();
            due.extend(by_age.into_iter().take(open - self.settings.max_open_files).map(|(_, id)| id));
        }
        for id in due {
            self.close(id);
        }
    }

    pub(super) fn on_report(&mut self, id: SegmentId, report: WriterReport) {
        match report {
            WriterReport::Synced(len) => {
                if let Some(segment) = self.open.get_mut(&id) {
                    if segment.synced == 0 {
                        self.sink.placement.works();
                    }
                    segment.busy = false;
                    let (key, durable) = (segment.key.clone(), segment.synced(len));
                    self.mark_durable(&key, durable);
                }
            }
            WriterReport::Closed(len) => {
                if let Some(mut segment) = self.open.remove(&id) {
                    let durable = segment.synced(len);
                    self.mark_durable(&segment.key, durable);
                    self.raise_copies(&segment);
                    let record = SegmentRecord { closed: true, ..segment.record() };
                    self.closed.insert(record.name.clone(), Closed { record, unsettled: None, in_entry: None });
                    self.entry_wanted = true;
                }
            }
            WriterReport::Failed(error) => self.give_up(id, &error),
        }
    }

    /// Gives a file that was made with fewer copies the others.
    pub(super) fn raise_copies(&self, segment: &Segment) {
        if let Some(copies) = self.sink.placement.raise_to(segment.asked.replication) {
            let (sink, name) = (self.sink.clone(), segment.name.clone());
            tokio::spawn(async move {
                if let Err(error) = sink.dfs.set_replication(&sink.dir.join(&name), copies).await {
                    tracing::warn!(segment = %name, copies, %error, "the copies of a closed file can't be raised; do it by hand: hdfs dfs -setrep");
                }
            });
        }
    }

    /// Notes that ranges are durable in files of this hour.
    pub(super) fn mark_durable(&mut self, key: &HourKey, ranges: Vec<HeldRanges>) {
        let bucket_end_ms = (!self.hours.contains_key(key)).then(|| key.bucket.end_ms());
        for HeldRanges { stream, ranges } in ranges {
            if let Some(durable) = self.ingest.durable(stream, ranges) {
                let came = Came { stream, moved: durable.moved, bucket_end_ms };
                self.roster.came(durable.agent, durable.category, came);
            }
        }
    }

    /// A writer failed: nobody writes to its file again, and what became of its last bytes is looked up.
    pub(super) fn give_up(&mut self, id: SegmentId, error: &DfsError) {
        let Some(segment) = self.open.remove(&id) else { return };
        tracing::error!(segment = %segment.name, synced = segment.synced, written = segment.written, %error, "a segment is given up; reading back what it holds");
        self.metrics.segment_failed();
        self.writing.retain(|_, writing| *writing != id);
        if segment.synced == 0 {
            self.sink.placement.failed(Instant::now(), segment.asked, error);
        }
        let lost_unless_found = segment.unsynced();
        for stream in streams_of(&lost_unless_found) {
            self.ingest.doubt(stream);
        }
        let record = segment.record();
        let (sink, events, name, synced) =
            (self.sink.clone(), self.events.clone(), record.name.clone(), record.covered.bytes);
        self.given_up.insert(id, GivenUp { record, lost_unless_found });
        tokio::spawn(async move {
            let result = sink.read_back(&name, synced).await;
            let _ = events.send(Event::ReadBack { id, result });
        });
        self.look_for_fence();
    }

    pub(super) fn on_read_back(&mut self, id: SegmentId, result: Result<Option<(Scan, u64)>, DfsError>) {
        let scan = match result {
            Ok(scan) => scan,
            Err(error) => {
                // Refused for good, such as by permissions: the streams keep waiting, and an operator has to look.
                tracing::error!(%error, "a segment that was given up can't be read back; its streams wait");
                self.look_for_fence();
                return;
            }
        };
        let Some(given_up) = self.given_up.remove(&id) else { return };
        let mut behind = Contents::default();
        let mut found: BTreeMap<_, tributary_common::ranges::RangeSet> = BTreeMap::new();
        let mut record = given_up.record;
        let is_there = scan.is_some();
        let mut end = 0;
        if let Some((scan, len)) = scan {
            end = scan.end;
            record.torn = len > scan.end;
            behind = scan.frames.iter().collect();
            for slice in scan.frames.iter().flat_map(|frame| &frame.slices) {
                let ranges = found.entry(slice.stream).or_default();
                slice.runs.iter().for_each(|run| ranges.insert(run.range()));
            }
        }
        for stream in streams_of(&given_up.lost_unless_found) {
            let there = found.get(&stream).cloned().unwrap_or_default();
            let lost: Vec<_> = given_up
                .lost_unless_found
                .iter()
                .filter(|held| held.stream == stream)
                .flat_map(|held| held.ranges.iter().flat_map(|range| there.missing(range.clone())))
                .collect();
            self.ingest.resolve(stream, lost);
        }
        tracing::info!(segment = %record.name, synced = record.covered.bytes, end, "a segment was read back");
        if end > 0 {
            let ranges = found
                .into_iter()
                .map(|(stream, ranges)| HeldRanges { stream, ranges: ranges.iter().collect() })
                .collect();
            let unsettled = Some(Unsettled { at: Instant::now() + self.settings.settle, found: behind, ranges });
            self.closed.insert(record.name.clone(), Closed { record, unsettled, in_entry: None });
        } else if is_there {
            // Without a single frame: nothing of it must settle, and its hour's seal deletes it.
            record.closed = true;
            self.entry_wanted = true;
            self.closed.insert(record.name.clone(), Closed { record, unsettled: None, in_entry: None });
        } else {
            tokio::spawn(delete_late(self.sink.clone(), record.name, self.events.clone()));
        }
    }

    /// What recoveries found becomes durable once it is settled.
    pub(super) fn settle(&mut self) {
        let now = Instant::now();
        let mut durable = Vec::new();
        for closed in self.closed.values_mut() {
            if let Some(unsettled) = closed.unsettled.take_if(|unsettled| unsettled.at <= now) {
                closed.record.covered.append(&unsettled.found);
                closed.record.closed = true;
                closed.in_entry = None;
                durable.push((key_of(&closed.record), unsettled.ranges));
                self.entry_wanted = true;
            }
        }
        for (key, ranges) in durable {
            self.mark_durable(&key, ranges);
        }
    }
}

/// How many of the slices at the front fit into one merged frame.
fn merge_count(small: &[(SliceDescriptor, Bytes)]) -> usize {
    // A bound on what a descriptor takes: names, three positions, numbers, and thirty bytes for each run.
    const DESCRIPTOR_BYTES: usize = 256;
    const RUN_BYTES: usize = 30;
    const MOST_RAW_BYTES: u64 = 16 << 20;
    let (mut header, mut raw, mut count) = (1024, 0, 0);
    for (slice, _) in small {
        header += DESCRIPTOR_BYTES + slice.host.len() + slice.runs.len() * RUN_BYTES;
        raw += slice.stored_len();
        if count > 0 && (header > tributary_common::limits::MAX_FRAME_HEADER_BYTES || raw > MOST_RAW_BYTES) {
            break;
        }
        count += 1;
    }
    count
}

/// The block size for a file that grows to `roll_size`: a gzip file can't be split, so it had best be one block. HDFS wants a
/// multiple of its checksum chunk of 512 bytes.
fn block_size(roll_size: u64) -> u64 {
    roll_size.max(MIN_BLOCK_BYTES).next_multiple_of(1 << 20)
}
pub(super) fn ranges_of<'s>(slices: impl Iterator<Item = &'s SliceDescriptor>) -> Vec<HeldRanges> {
    slices
        .map(|slice| HeldRanges {
            stream: slice.stream,
            ranges: slice.runs.iter().map(tributary_common::frame::Run::range).collect(),
        })
        .collect()
}

fn streams_of(held: &[HeldRanges]) -> BTreeSet<tributary_common::ids::StreamId> {
    held.iter().map(|held| held.stream).collect()
}
