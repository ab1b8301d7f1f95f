//! Frames: self-contained compressed units that name the bytes they hold.
//!
//! A segment is a plain concatenation of frames, and any reader of gzip (or zstd) files reads it: a gzip file may
//! consist of several members, and what Tributary adds lies where readers skip it. Because each frame names the
//! stream bytes that it holds, position and data become durable in one write, and a segment alone is enough to know
//! what has been stored.
//!
//! # Layout
//!
//! gzip (RFC 1952): one member per frame, the header payload in an extra field.
//!
//! ```text
//! 1f 8b 08 04 | mtime 0 (4) | xfl 0 | os 255 | xlen (2) | 'T' 'B' | len (2) | payload | deflate | crc32 (4) | isize (4)
//! ```
//!
//! zstd (RFC 8878): a skippable frame with the header payload, then one zstd frame.
//!
//! ```text
//! 5e 2a 4d 18 | len (4) | payload | zstd frame
//! ```
//!
//! The payload, all numbers little-endian:
//!
//! ```text
//! version (1) = 2 | codec (1) | 0 (2) | frame_len (4) | body_crc (4) | header_crc (4) | postcard: category, bucket, descriptors
//! ```
//!
//! `frame_len` counts the whole frame from its first byte, so headers are found by their lengths alone. `body_crc` is
//! the CRC-32C of all that follows the payload, `header_crc` that of the payload with its own four bytes zero.
//!
//! The fixed fields come first so that a reader of any later version can still skip a frame.

use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::bucket::Bucket;
use crate::checksum::Checksum;
use crate::ids::{AgentId, CategoryName, StreamId};
use crate::limits::{
    MAX_FRAME_BYTES, MAX_FRAME_HEADER_BYTES, MAX_FRAME_RAW_BYTES, MAX_HOST_BYTES, MAX_RECORD_PREFIX_BYTES,
    MAX_RUNS_PER_SLICE,
};
use crate::position::{Position, TAIL_WINDOW_BYTES, TailHash};

const VERSION: u8 = 2;
const GZIP_START: [u8; 10] = [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255];
const GZIP_FIXED: usize = GZIP_START.len() + 2 + 4;
const GZIP_TRAILER: usize = 8;
const SUBFIELD: [u8; 2] = *b"TB";
const ZSTD_START: [u8; 4] = 0x184d_2a5e_u32.to_le_bytes();
const ZSTD_FIXED: usize = ZSTD_START.len() + 4;
const PAYLOAD_FIXED: usize = 16;

/// How a frame is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// Every Hadoop reads it.
    Gzip,
    /// Smaller and faster, where the readers can.
    Zstd,
}

impl Codec {
    /// The file name extension by which readers choose the decompressor.
    #[must_use]
    pub fn extension(self) -> &'static str {
        match self {
            Self::Gzip => "gz",
            Self::Zstd => "zst",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Gzip => 1,
            Self::Zstd => 2,
        }
    }

    fn fixed_len(self) -> usize {
        match self {
            Self::Gzip => GZIP_FIXED,
            Self::Zstd => ZSTD_FIXED,
        }
    }
}

/// A piece of a stream inside a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Where it begins in the stream, in bytes.
    pub start: u64,
    /// How many bytes of the stream it covers; never 0.
    pub len: u64,
    /// How many bytes were stored for them: more with prefixes or an added newline, fewer (also 0) where records were
    /// truncated or dropped.
    pub stored: u64,
}

impl Run {
    /// The bytes of the stream that it covers.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.start..self.start + self.len
    }
}

/// What one slice (a batch's records of one bucket) holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceDescriptor {
    /// The agent that read it.
    pub agent: AgentId,
    /// The agent's host name: a label, not an identity.
    pub host: String,
    /// The stream.
    pub stream: StreamId,
    /// Where the stream began.
    pub base: Position,
    /// Where the batch begins.
    pub start: Position,
    /// Where the batch ends.
    pub end: Position,
    /// [`batch_hash`] of the batch.
    pub batch_hash: Option<TailHash>,
    /// The pieces of the stream in this slice, in order, disjoint, inside of the batch.
    pub runs: Vec<Run>,
    /// How many records are stored.
    pub records: u64,
    /// How many bytes were put in front of each record.
    pub prefix_len: u32,
    /// Whether some record was split, truncated, dropped or given a newline, so that stored bytes can no longer be
    /// mapped to stream bytes within a run.
    pub altered: bool,
    /// The earliest event time, milliseconds since 1970.
    pub first_time_ms: i64,
    /// The latest event time, milliseconds since 1970.
    pub last_time_ms: i64,
}

/// The hash of all bytes of the stream in a batch that has fewer than [`TAIL_WINDOW_BYTES`]; none for a longer one.
///
/// The tail hash at the end of such a batch covers bytes that lie before it. Who has the batch alone, without those, compares
/// this one.
#[must_use]
pub fn batch_hash(bytes: &[u8]) -> Option<TailHash> {
    (bytes.len() < TAIL_WINDOW_BYTES).then(|| TailHash::of(bytes))
}

impl SliceDescriptor {
    /// How many bytes the slice has in the decompressed frame.
    #[must_use]
    pub fn stored_len(&self) -> u64 {
        self.runs.iter().map(|run| run.stored).sum()
    }

    /// How many bytes of the stream it covers.
    #[must_use]
    pub fn raw_len(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.host.len() > MAX_HOST_BYTES {
            return Err("the host name is too long");
        }
        if self.prefix_len as usize > MAX_RECORD_PREFIX_BYTES {
            return Err("the record prefix is too long");
        }
        if self.base.offset > self.start.offset || self.start.offset >= self.end.offset {
            return Err("base, start and end are out of order");
        }
        if self.runs.is_empty() || self.runs.len() > MAX_RUNS_PER_SLICE {
            return Err("the number of runs is out of bounds");
        }
        let mut at = self.start.offset;
        let mut stored = 0_u64;
        for run in &self.runs {
            let end = run.start.checked_add(run.len).ok_or("a run is too long")?;
            if run.start < at || run.len == 0 || end > self.end.offset {
                return Err("the runs are out of order or outside of the batch");
            }
            at = end;
            stored = stored.checked_add(run.stored).ok_or("the stored length is out of bounds")?;
        }
        if stored > MAX_FRAME_RAW_BYTES {
            return Err("the stored length is out of bounds");
        }
        Ok(())
    }
}

/// The header of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameHeader {
    /// How the body is compressed.
    pub codec: Codec,
    /// The length of the whole frame in bytes, header included.
    pub frame_len: u32,
    /// The category of every slice in it.
    pub category: CategoryName,
    /// The bucket of every slice in it.
    pub bucket: Bucket,
    /// What it holds; the decompressed body is the slices' stored bytes, one after the other.
    pub slices: Vec<SliceDescriptor>,
    body_crc: u32,
    header_len: usize,
    header_bytes: Checksum,
}

#[derive(Serialize, Deserialize)]
struct Contents<Slices> {
    category: CategoryName,
    bucket: Bucket,
    slices: Slices,
}

/// Bytes that are not a good frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not the beginning of a frame: foreign data, or a position inside of a frame.
    #[error("these bytes are not the beginning of a frame")]
    NotAFrame,
    /// Written by a newer program.
    #[error("the frame has version {0}; this program reads version {VERSION}: use the newer program")]
    Version(u8),
    /// The header contradicts itself or its checksum.
    #[error("the frame's header is corrupt: {0}")]
    CorruptHeader(&'static str),
    /// The body doesn't match its checksum or its descriptors.
    #[error("the frame's body is corrupt: {0}")]
    CorruptBody(&'static str),
    /// The bytes end before the frame does.
    #[error("the frame is cut off: {have} of {want} bytes")]
    Truncated {
        /// The bytes at hand.
        have: u64,
        /// The bytes that the frame needs.
        want: u64,
    },
}

/// What [`FrameHeader::peek`] found.
#[derive(Debug)]
pub enum Peek {
    /// The header.
    Header(FrameHeader),
    /// Nothing wrong so far; call again with at least this many bytes from the frame's beginning.
    Need(usize),
}

impl FrameHeader {
    /// Reads the header of the frame that begins at the first of `bytes`.
    ///
    /// # Errors
    /// When these bytes can't be the beginning of a frame, or its header is corrupt.
    pub fn peek(bytes: &[u8]) -> Result<Peek, FrameError> {
        let codec = match bytes {
            [] => return Ok(Peek::Need(GZIP_FIXED)),
            [first, ..] if *first == GZIP_START[0] => Codec::Gzip,
            [first, ..] if *first == ZSTD_START[0] => Codec::Zstd,
            _ => return Err(FrameError::NotAFrame),
        };
        let start: &[u8] = match codec {
            Codec::Gzip => &GZIP_START,
            Codec::Zstd => &ZSTD_START,
        };
        let known = bytes.len().min(start.len());
        if bytes[..known] != start[..known] {
            return Err(FrameError::NotAFrame);
        }
        let fixed = codec.fixed_len();
        if bytes.len() < fixed {
            return Ok(Peek::Need(fixed));
        }
        let payload_len = match codec {
            Codec::Gzip => {
                let extra = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
                let len = usize::from(u16::from_le_bytes([bytes[14], bytes[15]]));
                if bytes[12..14] != SUBFIELD || extra != len + 4 {
                    return Err(FrameError::NotAFrame);
                }
                len
            }
            Codec::Zstd => u32_at(bytes, 4) as usize,
        };
        if !(PAYLOAD_FIXED..=MAX_FRAME_HEADER_BYTES).contains(&payload_len) {
            return Err(FrameError::CorruptHeader("its length is out of bounds"));
        }
        let header_len = fixed + payload_len;
        if bytes.len() < header_len {
            return Ok(Peek::Need(header_len));
        }
        let mut header = Self::read_payload(codec, &bytes[fixed..header_len], header_len)?;
        header.header_bytes = Checksum::of(&bytes[..header_len]);
        Ok(Peek::Header(header))
    }

    fn read_payload(codec: Codec, payload: &[u8], header_len: usize) -> Result<Self, FrameError> {
        if payload[0] != VERSION {
            return Err(FrameError::Version(payload[0]));
        }
        if payload_crc(payload) != u32_at(payload, 12) {
            return Err(FrameError::CorruptHeader("its checksum does not match"));
        }
        if payload[1] != codec.number() {
            return Err(FrameError::CorruptHeader("it names another codec than the one it is in"));
        }
        let frame_len = u32_at(payload, 4);
        if u64::from(frame_len) > MAX_FRAME_BYTES || (frame_len as usize) < header_len {
            return Err(FrameError::CorruptHeader("the frame's length is out of bounds"));
        }
        let contents: Contents<Vec<SliceDescriptor>> = postcard::from_bytes(&payload[PAYLOAD_FIXED..])
            .map_err(|_| FrameError::CorruptHeader("its descriptors can't be read"))?;
        Bucket::new(contents.bucket.start_s(), contents.bucket.size())
            .map_err(|_| FrameError::CorruptHeader("its bucket does not exist"))?;
        let header = Self {
            codec,
            frame_len,
            category: contents.category,
            bucket: contents.bucket,
            slices: contents.slices,
            body_crc: u32_at(payload, 8),
            header_len,
            header_bytes: Checksum::default(),
        };
        if header.slices.is_empty() {
            return Err(FrameError::CorruptHeader("it has no slices"));
        }
        for slice in &header.slices {
            slice.check().map_err(FrameError::CorruptHeader)?;
        }
        if header.stored_len() > MAX_FRAME_RAW_BYTES {
            return Err(FrameError::CorruptHeader("the stored length is out of bounds"));
        }
        Ok(header)
    }

    /// How many bytes the body decompresses to.
    #[must_use]
    pub fn stored_len(&self) -> u64 {
        self.slices.iter().map(SliceDescriptor::stored_len).sum()
    }

    /// The checksum of all of the frame's bytes, as the header tells it: only [`verify`](Self::verify) looks at the body.
    #[must_use]
    pub fn checksum(&self) -> Checksum {
        self.header_bytes.then(Checksum(self.body_crc), u64::from(self.frame_len) - self.header_len as u64)
    }

    /// How many records the frame holds.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.slices.iter().map(|slice| slice.records).sum()
    }

    /// Reads the header of a frame that is wholly in `frame`, nothing before or behind it, and compares the body with its
    /// checksum. Does not decompress.
    ///
    /// # Errors
    /// When it is not exactly one good frame.
    pub fn verify(frame: &[u8]) -> Result<Self, FrameError> {
        let header = match Self::peek(frame)? {
            Peek::Header(header) => header,
            Peek::Need(want) => {
                return Err(FrameError::Truncated { have: frame.len() as u64, want: want as u64 });
            }
        };
        if frame.len() < header.frame_len as usize {
            return Err(FrameError::Truncated { have: frame.len() as u64, want: u64::from(header.frame_len) });
        }
        if frame.len() > header.frame_len as usize {
            return Err(FrameError::CorruptHeader("the frame's length is not that of its bytes"));
        }
        if crc32c::crc32c(&frame[header.header_len..]) != header.body_crc {
            return Err(FrameError::CorruptBody("its checksum does not match"));
        }
        Ok(header)
    }

    /// Decompresses the body of the frame that this header was read from.
    ///
    /// # Errors
    /// When the body does not decompress to exactly the length that the descriptors add up to.
    ///
    /// # Panics
    /// When `frame` is not the whole frame that this header was read from.
    pub fn decode(&self, frame: &[u8]) -> Result<Vec<u8>, FrameError> {
        assert_eq!(frame.len(), self.frame_len as usize, "the bytes are those of the frame");
        let stored = usize::try_from(self.stored_len()).map_err(|_| FrameError::CorruptBody("it is too large"))?;
        let mut raw = vec![0; stored];
        let written = match self.codec {
            Codec::Gzip => {
                // The decoder wants room for at least one byte.
                let mut room: &mut [u8] = &mut raw;
                let mut spare = [0];
                if room.is_empty() {
                    room = &mut spare;
                }
                libdeflater::Decompressor::new()
                    .gzip_decompress(frame, room)
                    .map_err(|_| FrameError::CorruptBody("it does not decompress"))?
            }
            Codec::Zstd => zstd::bulk::decompress_to_buffer(&frame[self.header_len..], &mut raw[..])
                .map_err(|_| FrameError::CorruptBody("it does not decompress"))?,
        };
        if written != stored {
            return Err(FrameError::CorruptBody("it decompresses to another length than its descriptors say"));
        }
        Ok(raw)
    }

    /// The part of the decompressed body that belongs to slice number `index`.
    #[must_use]
    pub fn slice_range(&self, index: usize) -> Range<usize> {
        let start: u64 = self.slices[..index].iter().map(SliceDescriptor::stored_len).sum();
        let end = start + self.slices[index].stored_len();
        start as usize..end as usize
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn payload_crc(payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&payload[..12]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &payload[PAYLOAD_FIXED..])
}

/// A frame could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The descriptors don't fit the header.
    #[error("the frame's descriptors take {len} bytes; {MAX_FRAME_HEADER_BYTES} are possible")]
    HeaderTooLarge {
        /// Their length in bytes.
        len: usize,
    },
    /// The stored lengths of the descriptors don't add up to the body, or a descriptor contradicts itself.
    #[error("the frame's descriptors are wrong: {0}")]
    Descriptors(&'static str),
}

/// Makes frames. Keeps its working memory between frames, so one per thread is best.
pub struct FrameEncoder {
    compressor: Compressor,
    header: Vec<u8>,
    /// As long as the longest body could become so far: making it shorter, and longer again, would write it full of zeros for each
    /// frame.
    body: Vec<u8>,
}

enum Compressor {
    Gzip(libdeflater::Compressor),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl FrameEncoder {
    /// An encoder for `codec`. `level` is the codec's own, 1 to 12 for gzip (libdeflate's) and 1 to 19 for zstd; a level out of
    /// bounds becomes the nearest possible.
    #[must_use]
    pub fn new(codec: Codec, level: i32) -> Self {
        let compressor = match codec {
            Codec::Gzip => {
                let level = libdeflater::CompressionLvl::new(level.clamp(1, 12)).unwrap_or_default();
                Compressor::Gzip(libdeflater::Compressor::new(level))
            }
            Codec::Zstd => Compressor::Zstd(
                zstd::bulk::Compressor::new(level.clamp(1, 19)).expect("a zstd context needs nothing but memory"),
            ),
        };
        Self { compressor, header: Vec::new(), body: Vec::new() }
    }

    /// The codec of the frames that it makes.
    #[must_use]
    pub fn codec(&self) -> Codec {
        match self.compressor {
            Compressor::Gzip(_) => Codec::Gzip,
            Compressor::Zstd(_) => Codec::Zstd,
        }
    }

    /// Makes one frame. `raw` is the slices' stored bytes, one slice after the other.
    ///
    /// # Errors
    /// When the descriptors don't fit the header or don't describe `raw`.
    pub fn encode(
        &mut self,
        category: &CategoryName,
        bucket: Bucket,
        slices: &[SliceDescriptor],
        raw: &[u8],
    ) -> Result<Bytes, EncodeError> {
        if slices.is_empty() {
            return Err(EncodeError::Descriptors("there are no slices"));
        }
        for slice in slices {
            slice.check().map_err(EncodeError::Descriptors)?;
        }
        if slices.iter().map(SliceDescriptor::stored_len).sum::<u64>() != raw.len() as u64 {
            return Err(EncodeError::Descriptors("their stored lengths are not that of the body"));
        }
        if raw.len() as u64 > MAX_FRAME_RAW_BYTES {
            return Err(EncodeError::Descriptors("the body is too large"));
        }

        let codec = self.codec();
        let fixed = codec.fixed_len();
        let header = &mut self.header;
        header.clear();
        header.resize(fixed + PAYLOAD_FIXED, 0);
        let contents = Contents { category: category.clone(), bucket, slices };
        postcard::to_io(&contents, &mut *header).map_err(|_| EncodeError::Descriptors("they can't be written"))?;
        let header_len = header.len();
        let payload_len = header_len - fixed;
        if payload_len > MAX_FRAME_HEADER_BYTES {
            return Err(EncodeError::HeaderTooLarge { len: payload_len });
        }
        match codec {
            Codec::Gzip => {
                let len = u16::try_from(payload_len).map_err(|_| EncodeError::HeaderTooLarge { len: payload_len })?;
                header[..10].copy_from_slice(&GZIP_START);
                header[10..12].copy_from_slice(&(len + 4).to_le_bytes());
                header[12..14].copy_from_slice(&SUBFIELD);
                header[14..16].copy_from_slice(&len.to_le_bytes());
            }
            Codec::Zstd => {
                let len = u32::try_from(payload_len).map_err(|_| EncodeError::HeaderTooLarge { len: payload_len })?;
                header[..4].copy_from_slice(&ZSTD_START);
                header[4..8].copy_from_slice(&len.to_le_bytes());
            }
        }
        let too_small = EncodeError::Descriptors("the compressor's own bound was too small");
        let body = match &mut self.compressor {
            Compressor::Gzip(compressor) => {
                let room = room_for(&mut self.body, compressor.deflate_compress_bound(raw.len()) + GZIP_TRAILER);
                let len = compressor.deflate_compress(raw, room).map_err(|_| too_small)?;
                let (body, _) = room.split_at_mut(len + GZIP_TRAILER);
                body[len..len + 4].copy_from_slice(&libdeflater::crc32(raw).to_le_bytes());
                body[len + 4..].copy_from_slice(&(raw.len() as u32).to_le_bytes());
                body
            }
            Compressor::Zstd(compressor) => {
                let room = room_for(&mut self.body, zstd::zstd_safe::compress_bound(raw.len()));
                let len = compressor.compress_to_buffer(raw, room).map_err(|_| too_small)?;
                &mut room[..len]
            }
        };
        let frame_len =
            u32::try_from(header_len + body.len()).map_err(|_| EncodeError::Descriptors("the frame is too large"))?;
        let payload = &mut header[fixed..];
        payload[0] = VERSION;
        payload[1] = codec.number();
        payload[4..8].copy_from_slice(&frame_len.to_le_bytes());
        payload[8..12].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
        let header_crc = payload_crc(payload);
        payload[12..16].copy_from_slice(&header_crc.to_le_bytes());
        Ok([header.as_slice(), body].concat().into())
    }
}

/// The first `len` bytes of `bytes`, which becomes so long if it isn't.
fn room_for(bytes: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if bytes.len() < len {
        bytes.resize(len, 0);
    }
    &mut bytes[..len]
}

/// A slice's stored bytes can't be mapped to stream bytes, because records in it were altered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("records of the slice were altered, so it can't be cut")]
pub struct Altered;

/// Cuts a slice down to the stream bytes in `wanted` (in order, disjoint). Of a record that is wanted in part, the wanted
/// part becomes a record of its own. Returns nothing when no wanted byte is in the slice.
///
/// `stored` is the slice's part of the decompressed body.
///
/// # Errors
/// When records were altered, so that nobody knows which stored bytes are wanted.
pub fn cut_slice(
    slice: &SliceDescriptor,
    stored: &[u8],
    wanted: &[Range<u64>],
) -> Result<Option<(SliceDescriptor, Vec<u8>)>, Altered> {
    let mut kept = Vec::new();
    let mut runs = Vec::new();
    let mut records = 0;
    let mut altered = false;
    for record in records_of(slice, stored)? {
        for want in wanted {
            let piece = want.start.max(record.range.start)..want.end.min(record.range.end);
            if piece.is_empty() {
                continue;
            }
            let before = kept.len();
            kept.extend_from_slice(record.prefix);
            let from = (piece.start - record.range.start) as usize;
            let to = (piece.end - record.range.start) as usize;
            kept.extend_from_slice(&record.bytes[from..to]);
            if piece.end < record.range.end {
                kept.push(b'\n');
                altered = true;
            }
            records += 1;
            push_run(&mut runs, piece, (kept.len() - before) as u64);
        }
    }
    if runs.is_empty() {
        return Ok(None);
    }
    Ok(Some((SliceDescriptor { runs, records, altered, ..slice.clone() }, kept)))
}

fn push_run(runs: &mut Vec<Run>, piece: Range<u64>, stored: u64) {
    let len = piece.end - piece.start;
    match runs.last_mut() {
        Some(last) if last.start + last.len == piece.start => {
            last.len += len;
            last.stored += stored;
        }
        _ => runs.push(Run { start: piece.start, len, stored }),
    }
}

/// One record of a slice.
#[derive(Debug)]
pub struct Record<'a> {
    /// Where it lies in the stream.
    pub range: Range<u64>,
    /// What was put in front of it.
    pub prefix: &'a [u8],
    /// The bytes as in the stream, its newline included.
    pub bytes: &'a [u8],
}

/// The records of a slice, with their places in the stream.
///
/// `stored` is the slice's part of the decompressed body.
///
/// # Errors
/// When records were altered, or the stored bytes don't have the form that the descriptor says.
pub fn records_of<'a>(slice: &SliceDescriptor, stored: &'a [u8]) -> Result<Vec<Record<'a>>, Altered> {
    if slice.altered {
        return Err(Altered);
    }
    let prefix_len = slice.prefix_len as usize;
    let mut records = Vec::new();
    let mut rest = stored;
    for run in &slice.runs {
        let (mut text, behind) = rest.split_at_checked(run.stored as usize).ok_or(Altered)?;
        rest = behind;
        let mut at = run.start;
        while !text.is_empty() {
            // A prefix has no newline in it (the configuration refuses one), so the first newline ends the record.
            let end = memchr::memchr(b'\n', text).map_or(text.len(), |newline| newline + 1);
            let (record, behind) = text.split_at(end);
            text = behind;
            let (prefix, bytes) = record.split_at_checked(prefix_len).ok_or(Altered)?;
            records.push(Record { range: at..at + bytes.len() as u64, prefix, bytes });
            at += bytes.len() as u64;
        }
        if at != run.range().end {
            return Err(Altered);
        }
    }
    Ok(records)
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "`cut_slice` takes a list of ranges")]
mod tests {
    use super::*;
    use crate::bucket::BucketSize;
    use crate::position::TailHash;
    use proptest::prelude::*;
    use std::io::Read;

    fn category() -> CategoryName {
        "nginx-access".parse().expect("valid")
    }

    fn bucket() -> Bucket {
        BucketSize::HOUR.bucket_of_ms(1_795_378_521_000)
    }

    fn descriptor(start: u64, runs: Vec<Run>, records: u64) -> SliceDescriptor {
        let end = runs.last().expect("a run").range().end;
        SliceDescriptor {
            agent: "web-1".parse().expect("valid"),
            host: "web-1.example".into(),
            stream: StreamId(42),
            base: Position::zero(),
            start: Position { offset: start, tail: TailHash(1) },
            end: Position { offset: end, tail: TailHash(2) },
            batch_hash: None,
            runs,
            records,
            prefix_len: 0,
            altered: false,
            first_time_ms: 5,
            last_time_ms: 6,
        }
    }

    fn plain(text: &[u8]) -> SliceDescriptor {
        let len = text.len() as u64;
        descriptor(100, vec![Run { start: 100, len, stored: len }], text.iter().filter(|b| **b == b'\n').count() as u64)
    }

    fn frame(codec: Codec, text: &[u8]) -> Bytes {
        FrameEncoder::new(codec, 1).encode(&category(), bucket(), &[plain(text)], text).expect("encodes")
    }

    #[test]
    fn a_frame_reads_back_with_all_that_it_says() {
        for codec in [Codec::Gzip, Codec::Zstd] {
            let text = b"one\ntwo\nthree\n";
            let bytes = frame(codec, text);
            let header = FrameHeader::verify(&bytes).expect("a good frame");
            assert_eq!(header.codec, codec);
            assert_eq!((&header.category, header.bucket), (&category(), bucket()));
            assert_eq!(header.slices, [plain(text)]);
            assert_eq!(header.decode(&bytes).expect("decodes"), text);
        }
    }

    #[test]
    fn ordinary_decompressors_read_concatenated_frames() {
        let mut file = frame(Codec::Gzip, b"one\n").to_vec();
        file.extend_from_slice(&frame(Codec::Gzip, b"two\n"));
        let mut text = String::new();
        flate2::read::MultiGzDecoder::new(&file[..]).read_to_string(&mut text).expect("plain gzip");
        assert_eq!(text, "one\ntwo\n");

        let mut file = frame(Codec::Zstd, b"one\n").to_vec();
        file.extend_from_slice(&frame(Codec::Zstd, b"two\n"));
        assert_eq!(zstd::stream::decode_all(&file[..]).expect("plain zstd"), b"one\ntwo\n");
    }

    #[test]
    fn an_empty_slice_is_a_good_frame() {
        for codec in [Codec::Gzip, Codec::Zstd] {
            let dropped = descriptor(0, vec![Run { start: 0, len: 9, stored: 0 }], 0);
            let bytes = FrameEncoder::new(codec, 1).encode(&category(), bucket(), &[dropped], b"").expect("encodes");
            let header = FrameHeader::verify(&bytes).expect("a good frame");
            assert_eq!(header.decode(&bytes).expect("decodes"), b"");
        }
    }

    #[test]
    fn every_cut_is_noticed_and_asks_for_more() {
        for codec in [Codec::Gzip, Codec::Zstd] {
            let bytes = frame(codec, b"one\ntwo\n");
            for cut in 0..bytes.len() {
                assert!(
                    matches!(FrameHeader::verify(&bytes[..cut]), Err(FrameError::Truncated { .. })),
                    "cut at {cut}"
                );
                if let Peek::Need(want) = FrameHeader::peek(&bytes[..cut]).expect("a good beginning") {
                    assert!(want > cut && want <= bytes.len());
                }
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for codec in [Codec::Gzip, Codec::Zstd] {
            let good = frame(codec, b"one\ntwo\n").to_vec();
            for at in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[at / 8] ^= 1 << (at % 8);
                assert!(FrameHeader::verify(&bad).is_err(), "bit {at} of {codec:?}");
            }
        }
    }

    #[test]
    fn a_body_of_another_length_than_described_is_refused() {
        let mut lying = plain(b"one\n");
        lying.runs[0].stored = 5;
        let error = FrameEncoder::new(Codec::Gzip, 1).encode(&category(), bucket(), &[lying], b"one\n");
        assert!(matches!(error, Err(EncodeError::Descriptors(_))));
    }

    #[test]
    fn a_cut_slice_keeps_exactly_the_wanted_bytes() {
        let text = b"one\ntwo\nthree\n";
        let (cut, kept) = cut_slice(&plain(text), text, &[104..108, 110..200]).expect("not altered").expect("some");
        assert_eq!(kept, b"two\nree\n");
        assert_eq!(cut.runs, [Run { start: 104, len: 4, stored: 4 }, Run { start: 110, len: 4, stored: 4 }]);
        assert_eq!((cut.records, cut.altered), (2, false));
    }

    #[test]
    fn a_record_that_loses_its_end_gets_a_newline() {
        let text = b"one\ntwo\n";
        let (cut, kept) = cut_slice(&plain(text), text, &[100..102]).expect("not altered").expect("some");
        assert_eq!(kept, b"on\n");
        assert_eq!(cut.runs, [Run { start: 100, len: 2, stored: 3 }]);
        assert!(cut.altered);
    }

    #[test]
    fn prefixes_stay_with_their_records() {
        let stored = b"h:one\nh:two\n";
        let slice = SliceDescriptor {
            prefix_len: 2,
            ..descriptor(100, vec![Run { start: 100, len: 8, stored: stored.len() as u64 }], 2)
        };
        let (cut, kept) = cut_slice(&slice, stored, &[105..108]).expect("not altered").expect("some");
        assert_eq!(kept, b"h:wo\n");
        assert_eq!(cut.runs, [Run { start: 105, len: 3, stored: 5 }]);
    }

    #[test]
    fn an_altered_slice_is_not_cut() {
        let text = b"one\n";
        let slice = SliceDescriptor { altered: true, ..plain(text) };
        assert_eq!(cut_slice(&slice, text, &[0..200]), Err(Altered));
    }

    /// A frame as version 2 wrote it, byte for byte: segments live for years. (Version 1 was never released.)
    #[test]
    fn frames_of_version_2_are_still_read() {
        let bytes = include_bytes!("../testdata/frame-v2.gz");
        let header = FrameHeader::verify(bytes).expect("a good frame");
        assert_eq!(header.slices, [plain(b"one\ntwo\n")]);
        assert_eq!(header.decode(bytes).expect("decodes"), b"one\ntwo\n");
        let bytes = include_bytes!("../testdata/frame-v2.zst");
        let header = FrameHeader::verify(bytes).expect("a good frame");
        assert_eq!(header.slices, [plain(b"one\ntwo\n")]);
        assert_eq!(header.decode(bytes).expect("decodes"), b"one\ntwo\n");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), gzip: bool, good in 0_usize..60) {
            // A good beginning takes the reader past its first checks.
            let mut bytes = bytes;
            let start = frame(if gzip { Codec::Gzip } else { Codec::Zstd }, b"one\ntwo\n");
            let good = good.min(bytes.len()).min(start.len());
            bytes[..good].copy_from_slice(&start[..good]);
            if let Ok(header) = FrameHeader::verify(&bytes) {
                let _ = header.decode(&bytes);
            }
        }

        /// Whoever sends may compute checksums over anything: what they cover is not to be believed for that.
        #[test]
        fn no_header_under_right_checksums_makes_the_reader_panic_or_decode_more_than_it_says(
            edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
            gzip: bool,
        ) {
            let codec = if gzip { Codec::Gzip } else { Codec::Zstd };
            let mut bytes = frame(codec, b"one\ntwo\n").to_vec();
            let fixed = codec.fixed_len();
            let Ok(Peek::Header(header)) = FrameHeader::peek(&bytes) else { panic!("a good frame") };
            let end = header.header_len;
            for (at, value) in edits {
                // Also bytes of the compressed body.
                let at = fixed + at.index(bytes.len() - fixed);
                bytes[at] = value;
            }
            let body_crc = crc32c::crc32c(&bytes[end..]);
            bytes[fixed + 8..fixed + 12].copy_from_slice(&body_crc.to_le_bytes());
            let header_crc = payload_crc(&bytes[fixed..end]);
            bytes[fixed + 12..fixed + 16].copy_from_slice(&header_crc.to_le_bytes());
            if let Ok(header) = FrameHeader::verify(&bytes)
                && let Ok(raw) = header.decode(&bytes)
            {
                prop_assert_eq!(raw.len() as u64, header.stored_len());
                for slice in &header.slices {
                    let _ = records_of(slice, &raw);
                }
            }
        }

        #[test]
        fn cutting_and_keeping_loses_and_doubles_nothing(
            lines in proptest::collection::vec("[a-z]{0,6}", 1..12),
            cuts in proptest::collection::btree_set(0_u64..80, 0..6),
        ) {
            let text: Vec<u8> = lines.iter().flat_map(|line| [line.as_bytes(), b"\n"].concat()).collect();
            let slice = plain(&text);
            let end = 100 + text.len() as u64;
            let mut edges: Vec<u64> = cuts.into_iter().map(|cut| 100 + cut).filter(|cut| *cut < end).collect();
            edges.push(end);
            let mut at = 100;
            let mut whole = Vec::new();
            for edge in edges {
                let wanted = at..edge;
                at = edge;
                let Some((cut, mut kept)) = cut_slice(&slice, &text, std::slice::from_ref(&wanted)).expect("not altered") else { continue };
                prop_assert_eq!(cut.stored_len(), kept.len() as u64);
                prop_assert_eq!(cut.raw_len(), wanted.end - wanted.start);
                if cut.altered { kept.pop(); }
                whole.extend_from_slice(&kept);
            }
            prop_assert_eq!(whole, text);
        }
    }
}
