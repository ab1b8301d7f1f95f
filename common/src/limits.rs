//! Hard limits of the formats and the protocol, in one place, with their relations checked at compile time.
//!
//! Configuration may set tighter values, never looser ones.

/// Most raw (uncompressed) bytes one batch may cover. Also the most that one frame may decompress to, apart from
/// [`MAX_ADDED_BYTES`]: a decoder allocates no more than the sum of both.
pub const MAX_BATCH_RAW_BYTES: u64 = 16 << 20;

/// Most bytes that record prefixes and added newlines may add to one batch.
pub const MAX_ADDED_BYTES: u64 = 48 << 20;

/// Most bytes that the body of one frame may decompress to.
pub const MAX_FRAME_RAW_BYTES: u64 = MAX_BATCH_RAW_BYTES + MAX_ADDED_BYTES;

/// Most bytes of one encoded frame, header included. Incompressible input grows by a little, never by half.
pub const MAX_FRAME_BYTES: u64 = MAX_FRAME_RAW_BYTES + MAX_FRAME_RAW_BYTES / 2;

/// Most bytes of the header payload of a frame. A gzip extra field holds 65,535 bytes, 4 of which are its own.
pub const MAX_FRAME_HEADER_BYTES: usize = 65_535 - 4;

/// Most runs in one slice. A batch that would need more ends earlier. So many that lines of two hours that alternate
/// don't make tiny batches, so few that the header of a frame has room for them.
pub const MAX_RUNS_PER_SLICE: usize = 1024;

/// Most slices (buckets) in one batch.
pub const MAX_SLICES_PER_BATCH: usize = 64;

/// Most bytes of one encoded batch header.
pub const MAX_BATCH_HEADER_BYTES: usize = 64 << 10;

/// Most bytes of the encoded frames of one batch.
pub const MAX_BATCH_BODY_BYTES: u64 = MAX_FRAME_BYTES;

/// Most bytes of a record's prefix.
pub const MAX_RECORD_PREFIX_BYTES: usize = 256;

/// Most bytes of a host name (RFC 1035, section 2.3.4).
pub const MAX_HOST_BYTES: usize = 255;

/// How many (batch end, tail hash) pairs of a stream its owner remembers, for streams that diverged.
pub const HISTORY_LEN: usize = 16;

/// Longest first line, in bytes, that takes part in a stream's identity.
pub const IDENTITY_LINE_BYTES: usize = 1024;

/// Most batches in one request. Their headers take memory beside the bytes of the body.
pub const MAX_BATCHES_PER_REQUEST: usize = 16_384;

/// Most streams in one positions query.
pub const MAX_STREAMS_PER_QUERY: usize = 10_000;

/// Most reports in one request.
pub const MAX_REPORTS_PER_REQUEST: usize = 4096;

/// Most bytes of a request with reports.
pub const MAX_REPORTS_BYTES: u64 = 4 << 20;

/// Most streams that a report names, and most that it declares lost.
pub const MAX_STREAMS_PER_REPORT: usize = 4096;

/// Most buckets of which a report says how much of them is stored.
pub const MAX_COUNTS_PER_REPORT: usize = 64;

/// Most bytes of a reason that is told for an operator.
pub const MAX_WORDS_BYTES: usize = 256;

/// A bound on what one run, encoded, adds to a descriptor: three variable-length integers.
const RUN_ENCODED_BYTES: usize = 3 * 10;

// A slice with the most runs fits the header of a frame, and the headers of its descriptors fit the batch's.
const _: () = assert!(MAX_RUNS_PER_SLICE * RUN_ENCODED_BYTES + 2 * MAX_HOST_BYTES + 512 < MAX_FRAME_HEADER_BYTES);
const _: () = assert!(MAX_SLICES_PER_BATCH * 32 + 1024 < MAX_BATCH_HEADER_BYTES);
const _: () = assert!(MAX_FRAME_BYTES < u32::MAX as u64, "frame lengths are 32 bit");
