//! Makes a batch of what was cut: each slice is compressed once, here, and moved as it is from then on.

use std::collections::HashMap;

use bytes::Bytes;
use tributary_common::batch::{Batch, BatchHeader, SliceRef};
use tributary_common::frame::{Codec, EncodeError, FrameEncoder, SliceDescriptor, batch_hash};
use tributary_common::ids::{AgentId, CategoryName, LaneId, StreamId};
use tributary_common::position::Position;

use crate::cut::Cut;

/// What a batch says of itself, apart from what was cut.
#[derive(Debug, Clone)]
pub struct BatchFacts {
    /// The agent's lane.
    pub lane: LaneId,
    /// The agent.
    pub agent: AgentId,
    /// Its host name.
    pub host: String,
    /// The category.
    pub category: CategoryName,
    /// The stream.
    pub stream: StreamId,
    /// Where the stream began.
    pub base: Position,
    /// What is committed of it.
    pub committed: Position,
    /// Bytes that were put before each record.
    pub prefix_len: u32,
}

/// Compresses. One per thread: it keeps its working memory.
#[derive(Default)]
pub struct Packer {
    encoders: HashMap<Codec, FrameEncoder>,
    scratch: Vec<u8>,
}

impl Packer {
    /// Makes the batch from `start` to `end`, cut from `data`, which begins at `start`. `level`: see
    /// [`FrameEncoder::new`].
    ///
    /// # Errors
    /// When the cut contradicts itself.
    pub fn pack(
        &mut self,
        (codec, level): (Codec, i32),
        facts: BatchFacts,
        (start, end): (Position, Position),
        cut: &Cut,
        data: &[u8],
    ) -> Result<Batch, EncodeError> {
        let encoder = self.encoders.entry(codec).or_insert_with(|| FrameEncoder::new(codec, level));
        let mut slices = Vec::with_capacity(cut.slices.len());
        let mut frames = Vec::with_capacity(cut.slices.len());
        for slice in &cut.slices {
            let descriptor = SliceDescriptor {
                agent: facts.agent.clone(),
                host: facts.host.clone(),
                stream: facts.stream,
                base: facts.base,
                start,
                end,
                batch_hash: batch_hash(&data[..(end.offset - start.offset) as usize]),
                runs: slice.runs.clone(),
                records: slice.records,
                prefix_len: facts.prefix_len,
                altered: slice.altered,
                first_time_ms: slice.first_time_ms,
                last_time_ms: slice.last_time_ms,
            };
            let stored = slice.stored(data, start.offset, &mut self.scratch);
            let frame = encoder.encode(&facts.category, slice.bucket, &[descriptor], stored)?;
            let frame_len =
                u32::try_from(frame.len()).map_err(|_| EncodeError::Descriptors("the frame is too large"))?;
            slices.push(SliceRef { bucket: slice.bucket, frame_len });
            frames.push(frame);
        }
        let body = match <[Bytes; 1]>::try_from(frames) {
            Ok([frame]) => frame,
            Err(frames) => frames.concat().into(),
        };
        let header = BatchHeader {
            lane: facts.lane,
            agent: facts.agent,
            category: facts.category,
            stream: facts.stream,
            base: facts.base,
            start,
            end,
            committed: facts.committed,
            received_ms: None,
            slices,
        };
        Ok(Batch { header, body })
    }
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}
