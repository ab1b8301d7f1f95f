//! Batches: decided about, cut where that is needed, and handed on to segments.

use bytes::Bytes;
use tributary_common::frame::{Codec, FrameEncoder, FrameError, FrameHeader, SliceDescriptor, cut_slice, records_of};
use tributary_common::messages::{Answer, Verdict};

use super::{Lane, RETRY_AFTER};
use crate::root::ingest::{Decision, SlicePlan};
use crate::root::ledger::HourKey;
use crate::root::segment::Segment;
use crate::tier::{Overloaded, Received};

impl Lane {
    pub(super) fn uncommitted_bytes(&self) -> u64 {
        self.open.values().map(Segment::dirty_bytes).sum()
    }

    /// Takes batches. The answers may have to wait for a ledger entry: an agent that is new is written down before it hears
    /// anything.
    pub(super) fn offer(&mut self, batches: Vec<Received>) -> Result<(Vec<Answer>, Option<u64>), Overloaded> {
        if self.draining {
            return Err(Overloaded::new("the lane's owner is stopping", RETRY_AFTER));
        }
        let waiting = self.uncommitted_bytes();
        if waiting >= self.settings.max_uncommitted_bytes {
            let reason = format!("{waiting} bytes wait for the sink to make them durable");
            return Err(Overloaded::new(reason, RETRY_AFTER));
        }
        let mut after = None;
        let answers = batches
            .into_iter()
            .map(|received| {
                let answer = self.take(&received);
                after = after.max(self.answer_after(&received.batch.header));
                answer
            })
            .collect();
        Ok((answers, after))
    }

    pub(super) fn take(&mut self, received: &Received) -> Answer {
        let header = &received.batch.header;
        let now = self.settings.clock.now_ms();
        self.ingest.learn(header.stream, header.committed);
        let mut decision = self.ingest.decide(header, &received.frames, now);
        if let Decision::NeedsTail { at } = decision {
            decision = match with_pieces(received, |pieces| self.ingest.own_tail(header, pieces, at)) {
                Ok(own) => self.ingest.decide_crossing(header, &received.frames, own, now),
                Err(error) => Decision::Answer(Verdict::Refused { reason: error.to_string() }),
            };
        }
        if let Decision::NeedsTails { at } = decision {
            let tails = |pieces: Option<Vec<(u64, &[u8])>>| {
                let tail = |&at: &u64| (at, self.ingest.own_tail(header, pieces.clone(), at));
                at.iter().map(tail).collect::<Vec<_>>()
            };
            decision = match with_pieces(received, tails) {
                Ok(own) => self.ingest.decide_overlapping(header, &received.frames, own),
                Err(error) => Decision::Answer(Verdict::Refused { reason: error.to_string() }),
            };
        }
        if let Decision::Displace(ranges) = &decision {
            tracing::warn!(
                stream = %header.stream, agent = %header.agent, ?ranges,
                "records may be doubled: the file was cut off and has grown again before these bytes of it were committed; they are stored, and so is what it has there now"
            );
            self.metrics.possible_duplicate();
            decision = self.ingest.displace(header, &received.frames);
        }
        let verdict = match decision {
            Decision::Answer(verdict) => verdict,
            Decision::NeedsEcho => match with_pieces(received, |pieces| self.ingest.heard(header, pieces)) {
                Ok(()) => Verdict::Ok,
                Err(error) => Verdict::Refused { reason: error.to_string() },
            },
            Decision::Take(plans) => match self.prepare(received, &plans) {
                Ok(writes) => {
                    self.ingest.took(header, &received.frames, now);
                    if !writes.is_empty() {
                        self.notice(received);
                    }
                    for (frame, slice, bytes) in writes {
                        self.write(
                            HourKey { category: header.category.clone(), bucket: frame.bucket },
                            frame.codec,
                            slice,
                            bytes,
                        );
                    }
                    Verdict::Ok
                }
                Err(reason) => Verdict::Refused { reason },
            },
            Decision::GoBack(place) => {
                self.metrics.batch(&Verdict::Expected);
                return Answer { next: Some(place), ..self.answer(header.stream, Verdict::Expected) };
            }
            Decision::NeedsTail { .. } | Decision::NeedsTails { .. } | Decision::Displace(_) => {
                unreachable!("a decision with the hashes asks for no other")
            }
        };
        self.metrics.batch(&verdict);
        self.answer(header.stream, verdict)
    }

    /// What is to be written of a batch: nothing is, if any part of it can't be.
    pub(super) fn prepare<'r>(
        &mut self,
        received: &'r Received,
        plans: &[SlicePlan],
    ) -> Result<Vec<(&'r FrameHeader, SliceDescriptor, Bytes)>, String> {
        let mut writes = Vec::new();
        for ((frame, bytes), plan) in received.frames.iter().zip(received.batch.frames()).zip(plans) {
            let [slice] = frame.slices.as_slice() else {
                return Err("a frame of a batch has more than one slice".into());
            };
            match plan {
                SlicePlan::Drop => {}
                SlicePlan::Whole => writes.push((frame, slice.clone(), bytes)),
                SlicePlan::Cut(wanted) => {
                    let body = frame.decode(&bytes).map_err(|error| error.to_string())?;
                    match cut_slice(slice, &body, wanted) {
                        Ok(Some((cut, kept))) => {
                            self.metrics.cut();
                            let encoder = self.encoder(frame.codec);
                            let bytes = encoder
                                .encode(&frame.category, frame.bucket, std::slice::from_ref(&cut), &kept)
                                .map_err(|error| error.to_string())?;
                            writes.push((frame, cut, bytes));
                        }
                        Ok(None) => {}
                        Err(altered) => {
                            tracing::warn!(
                                stream = %slice.stream, start = slice.start.offset, end = slice.end.offset, error = %altered,
                                "records may be doubled: a batch that overlaps what is stored is written whole"
                            );
                            self.metrics.possible_duplicate();
                            writes.push((frame, slice.clone(), bytes));
                        }
                    }
                }
            }
        }
        Ok(writes)
    }

    pub(super) fn encoder(&mut self, codec: Codec) -> &mut FrameEncoder {
        self.encoders.entry(codec).or_insert_with(|| FrameEncoder::new(codec, 1))
    }
}

/// Hands the bytes of a batch, by their places in the stream, to `look`; none where records were altered.
fn with_pieces<T>(received: &Received, look: impl FnOnce(Option<Vec<(u64, &[u8])>>) -> T) -> Result<T, FrameError> {
    let mut bodies = Vec::new();
    for (frame, bytes) in received.frames.iter().zip(received.batch.frames()) {
        bodies.push(frame.decode(&bytes)?);
    }
    let mut pieces = Vec::new();
    for (frame, body) in received.frames.iter().zip(&bodies) {
        for (index, slice) in frame.slices.iter().enumerate() {
            match records_of(slice, &body[frame.slice_range(index)]) {
                Ok(records) => pieces.extend(records.into_iter().map(|record| (record.range.start, record.bytes))),
                Err(_) => return Ok(look(None)),
            }
        }
    }
    Ok(look(Some(pieces)))
}
