//! Batches: the unit that tiers hand to each other and keep in their spools.
//!
//! A batch is a contiguous byte range of one stream. All its slices travel together and are taken or refused together.
//! In a request and in a spool segment it has the same form, so a tier moves bytes and never encodes them again:
//!
//! ```text
//! magic "TBT1" (4) | header_len (4) | body_len (4) | crc (4) | header (postcard) | body: the slices' frames, in order
//! ```
//!
//! Numbers are little-endian. `crc` is the CRC-32C of the first 12 bytes and the header; the body is covered by the
//! checksums of its frames. What may change on the way up (who received it first, how far the sender knows the stream
//! to be committed) is in the header, outside of the frames.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::bucket::Bucket;
use crate::frame::{FrameError, FrameHeader};
use crate::ids::{AgentId, CategoryName, LaneId, StreamId};
use crate::limits::{MAX_BATCH_BODY_BYTES, MAX_BATCH_HEADER_BYTES, MAX_BATCH_RAW_BYTES, MAX_SLICES_PER_BATCH};
use crate::position::Position;

const MAGIC: [u8; 4] = *b"TBT1";

/// Bytes of a batch before its header.
pub const PREFIX_BYTES: usize = 16;

/// What a batch is and where it belongs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchHeader {
    /// The lane of the agent, by which tiers route.
    pub lane: LaneId,
    /// The agent that read it.
    pub agent: AgentId,
    /// The category of all its slices.
    pub category: CategoryName,
    /// The stream.
    pub stream: StreamId,
    /// Where the stream began: the only place at which its owner takes it up when it does not know it.
    pub base: Position,
    /// Where the batch begins.
    pub start: Position,
    /// Where the batch ends.
    pub end: Position,
    /// How far the sender knows the stream to be committed; the stream's base while nothing is.
    pub committed: Position,
    /// When the first aggregator received it, by that aggregator's clock, in milliseconds since 1970; none on its way
    /// from the agent.
    pub received_ms: Option<i64>,
    /// Its slices, in the order of their frames in the body.
    pub slices: Vec<SliceRef>,
}

/// One slice of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceRef {
    /// The bucket of its records.
    pub bucket: Bucket,
    /// The length of its frame in bytes.
    pub frame_len: u32,
}

impl BatchHeader {
    /// Bytes of the stream that it covers.
    #[must_use]
    pub fn raw_len(&self) -> u64 {
        self.end.offset - self.start.offset
    }

    fn check(&self, body_len: u64) -> Result<(), &'static str> {
        if self.base.offset > self.start.offset || self.start.offset >= self.end.offset {
            return Err("base, start and end are out of order");
        }
        if self.raw_len() > MAX_BATCH_RAW_BYTES {
            return Err("it covers too many bytes");
        }
        if self.slices.is_empty() || self.slices.len() > MAX_SLICES_PER_BATCH {
            return Err("the number of slices is out of bounds");
        }
        if self.slices.iter().map(|slice| u64::from(slice.frame_len)).sum::<u64>() != body_len {
            return Err("the lengths of its frames are not that of its body");
        }
        Ok(())
    }
}

/// Bytes that are not a good batch. All but [`BatchError::Truncated`] are final: sending the same again is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Not the beginning of a batch, or of a version that this program does not know.
    #[error("these bytes are not the beginning of a batch of a version that this program knows")]
    NotABatch,
    /// A length beyond the limits.
    #[error("the batch's {what} has {len} bytes; at most {max} are possible")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// The header contradicts itself or its checksum.
    #[error("the batch's header is corrupt: {0}")]
    CorruptHeader(&'static str),
    /// The bytes end before the batch does.
    #[error("the batch is cut off: {have} of {want} bytes")]
    Truncated {
        /// The bytes at hand.
        have: u64,
        /// The bytes that the batch needs.
        want: u64,
    },
    /// One of its frames is bad.
    #[error("frame {index} of the batch: {error}")]
    Frame {
        /// Which one, from 0.
        index: usize,
        /// What is wrong.
        error: FrameError,
    },
    /// A frame says something else than the batch.
    #[error("frame {index} of the batch has another {what} than the batch")]
    Mismatch {
        /// Which one, from 0.
        index: usize,
        /// What differs.
        what: &'static str,
    },
    /// The runs of the slices leave bytes of the batch out or cover them twice.
    #[error("the runs of the batch don't cover its bytes exactly once")]
    Coverage,
}

/// The lengths of a batch, from its first [`PREFIX_BYTES`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Bytes of the header.
    pub header_len: usize,
    /// Bytes of the body.
    pub body_len: u64,
    crc: u32,
    crc_so_far: u32,
}

impl Prefix {
    /// Reads the prefix.
    ///
    /// # Errors
    /// When this is not a batch or a length is out of bounds.
    pub fn read(bytes: &[u8; PREFIX_BYTES]) -> Result<Self, BatchError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..4] != MAGIC {
            return Err(BatchError::NotABatch);
        }
        let (header_len, body_len) = (word(4) as usize, u64::from(word(8)));
        let limits =
            [("header", header_len as u64, MAX_BATCH_HEADER_BYTES as u64), ("body", body_len, MAX_BATCH_BODY_BYTES)];
        for (what, len, max) in limits {
            if len > max {
                return Err(BatchError::TooLarge { what, len, max });
            }
        }
        Ok(Self { header_len, body_len, crc: word(12), crc_so_far: crc32c::crc32c(&bytes[..12]) })
    }

    /// The length of the whole batch in bytes.
    #[must_use]
    pub fn total_len(&self) -> u64 {
        PREFIX_BYTES as u64 + self.header_len as u64 + self.body_len
    }

    /// Reads the header that follows the prefix.
    ///
    /// # Errors
    /// When it is corrupt.
    pub fn read_header(&self, bytes: &[u8]) -> Result<BatchHeader, BatchError> {
        if bytes.len() != self.header_len || crc32c::crc32c_append(self.crc_so_far, bytes) != self.crc {
            return Err(BatchError::CorruptHeader("its checksum does not match"));
        }
        let header: BatchHeader =
            postcard::from_bytes(bytes).map_err(|_| BatchError::CorruptHeader("it can't be read"))?;
        header.check(self.body_len).map_err(BatchError::CorruptHeader)?;
        for slice in &header.slices {
            Bucket::new(slice.bucket.start_s(), slice.bucket.size())
                .map_err(|_| BatchError::CorruptHeader("a bucket does not exist"))?;
        }
        Ok(header)
    }
}

/// A batch: its header, and its frames as they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// What it is.
    pub header: BatchHeader,
    /// The frames of its slices, one after the other.
    pub body: Bytes,
}

impl Batch {
    /// Prefix and header in the form of a request or a spool segment; the body follows them.
    ///
    /// # Panics
    /// When the header contradicts the body, or has more slices or bytes than the limits allow: a bug of the caller,
    /// who makes the header.
    #[must_use]
    pub fn encode_head(&self) -> Bytes {
        if let Err(error) = self.header.check(self.body.len() as u64) {
            panic!("a batch that nobody would accept was made: {error}");
        }
        let mut head = vec![0; PREFIX_BYTES];
        head[..4].copy_from_slice(&MAGIC);
        postcard::to_io(&self.header, &mut head).expect("writing to memory can't fail");
        let header_len = head.len() - PREFIX_BYTES;
        assert!(header_len <= MAX_BATCH_HEADER_BYTES, "limits.rs keeps headers below their bound");
        head[4..8].copy_from_slice(&(header_len as u32).to_le_bytes());
        head[8..12].copy_from_slice(&(self.body.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c(&head[..12]);
        let crc = crc32c::crc32c_append(crc, &head[PREFIX_BYTES..]);
        head[12..16].copy_from_slice(&crc.to_le_bytes());
        head.into()
    }

    /// Bytes of the whole batch in a request or a spool segment.
    #[must_use]
    pub fn encoded_len(&self) -> u64 {
        let header = postcard::serialize_with_flavor(&self.header, postcard::ser_flavors::Size::default())
            .expect("counting bytes can't fail");
        (PREFIX_BYTES + header + self.body.len()) as u64
    }

    /// Takes the batch at the beginning of `bytes` off. The body stays where it is in memory.
    ///
    /// # Errors
    /// When there is no good batch; `bytes` is then as it was.
    pub fn take_from(bytes: &mut Bytes) -> Result<Self, BatchError> {
        let have = bytes.len() as u64;
        let Some(prefix) = bytes.first_chunk::<PREFIX_BYTES>() else {
            return Err(BatchError::Truncated { have, want: PREFIX_BYTES as u64 });
        };
        let prefix = Prefix::read(prefix)?;
        if have < prefix.total_len() {
            return Err(BatchError::Truncated { have, want: prefix.total_len() });
        }
        let body_at = PREFIX_BYTES + prefix.header_len;
        let header = prefix.read_header(&bytes[PREFIX_BYTES..body_at])?;
        let batch = Self { header, body: bytes.slice(body_at..body_at + prefix.body_len as usize) };
        let _ = bytes.split_to(body_at + prefix.body_len as usize);
        Ok(batch)
    }

    /// The frames, as bytes.
    pub fn frames(&self) -> impl Iterator<Item = Bytes> + '_ {
        let mut at = 0;
        self.header.slices.iter().map(move |slice| {
            let frame = self.body.slice(at..at + slice.frame_len as usize);
            at += slice.frame_len as usize;
            frame
        })
    }

    /// Checks all that can be checked without decompressing: every frame's checksums, that the frames are those of
    /// this batch, and that their runs cover its bytes exactly once.
    ///
    /// Returns the frames' headers, in order.
    ///
    /// # Errors
    /// What is wrong first.
    pub fn verify(&self) -> Result<Vec<FrameHeader>, BatchError> {
        let header = &self.header;
        let mut frames = Vec::with_capacity(header.slices.len());
        let mut runs = Vec::new();
        for (index, (slice, bytes)) in header.slices.iter().zip(self.frames()).enumerate() {
            let frame = FrameHeader::verify(&bytes).map_err(|error| BatchError::Frame { index, error })?;
            let [descriptor] = frame.slices.as_slice() else {
                return Err(BatchError::Mismatch { index, what: "number of slices" });
            };
            let agreements = [
                ("category", frame.category == header.category),
                ("bucket", frame.bucket == slice.bucket),
                ("agent", descriptor.agent == header.agent),
                ("stream", descriptor.stream == header.stream),
                ("base", descriptor.base == header.base),
                ("start", descriptor.start == header.start),
                ("end", descriptor.end == header.end),
            ];
            if let Some((what, _)) = agreements.iter().find(|(_, agree)| !agree) {
                return Err(BatchError::Mismatch { index, what });
            }
            runs.extend(descriptor.runs.iter().map(crate::frame::Run::range));
            frames.push(frame);
        }
        runs.sort_unstable_by_key(|run| run.start);
        let mut at = header.start.offset;
        for run in runs {
            if run.start != at {
                return Err(BatchError::Coverage);
            }
            at = run.end;
        }
        if at == header.end.offset { Ok(frames) } else { Err(BatchError::Coverage) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::BucketSize;
    use crate::frame::{Codec, FrameEncoder, Run, SliceDescriptor, batch_hash};
    use crate::position::TailHash;
    use proptest::prelude::*;

    /// A batch of two hours whose records interleave: runs 0-4 and 8-12 in one, 4-8 in the other.
    fn batch() -> Batch {
        build(&[(0, vec![(0, 4), (8, 4)]), (3_600_000, vec![(4, 4)])])
    }

    fn build(slices: &[(i64, Vec<(u64, u64)>)]) -> Batch {
        let agent: AgentId = "web-1".parse().expect("valid");
        let category: CategoryName = "app".parse().expect("valid");
        let (start, end) = (Position::zero(), Position { offset: 12, tail: TailHash(9) });
        let mut body = Vec::new();
        let mut refs = Vec::new();
        for (time_ms, runs) in slices {
            let runs: Vec<Run> = runs.iter().map(|&(start, len)| Run { start, len, stored: len }).collect();
            let raw: Vec<u8> = runs.iter().flat_map(|run| vec![b'x'; run.len as usize]).collect();
            let descriptor = SliceDescriptor {
                agent: agent.clone(),
                host: "h".into(),
                stream: StreamId(7),
                base: Position::zero(),
                start,
                end,
                batch_hash: batch_hash(&[b'x'; 12]),
                records: runs.len() as u64,
                runs,
                prefix_len: 0,
                altered: false,
                first_time_ms: *time_ms,
                last_time_ms: *time_ms,
            };
            let bucket = BucketSize::HOUR.bucket_of_ms(*time_ms);
            let frame =
                FrameEncoder::new(Codec::Gzip, 1).encode(&category, bucket, &[descriptor], &raw).expect("encodes");
            refs.push(SliceRef { bucket, frame_len: frame.len() as u32 });
            body.extend_from_slice(&frame);
        }
        let header = BatchHeader {
            lane: LaneId(0),
            agent,
            category,
            stream: StreamId(7),
            base: Position::zero(),
            start,
            end,
            committed: start,
            received_ms: None,
            slices: refs,
        };
        Batch { header, body: body.into() }
    }

    fn encode(batch: &Batch) -> Vec<u8> {
        [&batch.encode_head()[..], &batch.body[..]].concat()
    }

    #[test]
    fn batches_are_taken_off_one_by_one() {
        let batch = batch();
        let mut bytes = Bytes::from([encode(&batch), encode(&batch)].concat());
        assert_eq!(bytes.len() as u64, 2 * batch.encoded_len());
        assert_eq!(Batch::take_from(&mut bytes).expect("a good batch"), batch);
        let second = Batch::take_from(&mut bytes).expect("a good batch");
        assert_eq!(second.verify().expect("verifies").len(), 2);
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_batch_that_is_cut_anywhere_is_truncated_and_leaves_the_bytes() {
        let whole = encode(&batch());
        for cut in 0..whole.len() {
            let mut bytes = Bytes::copy_from_slice(&whole[..cut]);
            assert!(matches!(Batch::take_from(&mut bytes), Err(BatchError::Truncated { .. })), "cut at {cut}");
            assert_eq!(bytes.len(), cut);
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let whole = encode(&batch());
        for at in 0..whole.len() * 8 {
            let mut bad = whole.clone();
            bad[at / 8] ^= 1 << (at % 8);
            let mut bytes = Bytes::from(bad);
            let noticed = Batch::take_from(&mut bytes).and_then(|batch| batch.verify()).is_err();
            assert!(noticed, "bit {at}");
        }
    }

    #[test]
    fn runs_that_leave_bytes_out_or_cover_them_twice_are_refused() {
        for slices in [
            vec![(0, vec![(0, 4), (8, 4)])],
            vec![(0, vec![(0, 8)]), (3_600_000, vec![(4, 8)])],
            vec![(0, vec![(0, 4)]), (3_600_000, vec![(4, 4)])],
            vec![(0, vec![(0, 12)]), (3_600_000, vec![(0, 12)])],
        ] {
            assert_eq!(build(&slices).verify(), Err(BatchError::Coverage), "{slices:?}");
        }
    }

    #[test]
    fn a_frame_of_another_stream_agent_or_category_is_refused() {
        let good = batch();
        let with = |change: fn(&mut BatchHeader)| {
            let mut bad = good.clone();
            change(&mut bad.header);
            bad.verify()
        };
        for (what, result) in [
            ("stream", with(|header| header.stream = StreamId(8))),
            ("agent", with(|header| header.agent = "web-2".parse().expect("valid"))),
            ("category", with(|header| header.category = "other".parse().expect("valid"))),
            ("end", with(|header| header.end.tail = TailHash(1))),
            ("bucket", with(|header| header.slices[0].bucket = header.slices[1].bucket)),
        ] {
            assert_eq!(result, Err(BatchError::Mismatch { index: 0, what }), "{what}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), good in 0_usize..200) {
            let whole = encode(&batch());
            let good = good.min(bytes.len()).min(whole.len());
            bytes[..good].copy_from_slice(&whole[..good]);
            let mut bytes = Bytes::from(bytes);
            if let Ok(batch) = Batch::take_from(&mut bytes) {
                let _ = batch.verify();
            }
        }

        /// Whoever sends may compute checksums over anything: what they cover is not to be believed for that.
        #[test]
        fn no_header_under_a_right_checksum_makes_the_reader_panic(
            edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
            cut in 0_usize..8,
        ) {
            let batch = batch();
            let mut bytes = encode(&batch);
            let head = bytes.len() - batch.body.len();
            for (at, value) in edits {
                bytes[PREFIX_BYTES + at.index(head - PREFIX_BYTES)] = value;
            }
            bytes.drain(head - cut..head);
            let header_len = head - cut - PREFIX_BYTES;
            bytes[4..8].copy_from_slice(&(header_len as u32).to_le_bytes());
            let crc = crc32c::crc32c(&bytes[..12]);
            let crc = crc32c::crc32c_append(crc, &bytes[PREFIX_BYTES..PREFIX_BYTES + header_len]);
            bytes[12..16].copy_from_slice(&crc.to_le_bytes());
            if let Ok(batch) = Batch::take_from(&mut Bytes::from(bytes)) {
                let _ = batch.verify();
            }
        }
    }
}
