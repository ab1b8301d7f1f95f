//! The segment files of the spool.
//!
//! ```text
//! "TBSP" version (1) = 2 | 0 (3) | records
//! record: a batch, in the form of tributary_common::batch
//! record: "TBC1" | len (4) | crc (4) | postcard: [(stream, committed)]
//! ```
//!
//! A group of records begins at a multiple of 4 KiB, so that it can be written around the page cache, and so that no block that was
//! synced is written again: what is between it and the group before is zeros. Version 1 has no such zeros, and is read, too.
//!
//! Numbers are little-endian; `crc` is the CRC-32C of the four bytes of `len` and of the payload, which has `len` bytes.
//!
//! A batch carries checksums for all of itself, so a file needs none of its own. A file is written by appending, by one
//! writer, in groups that are synced before anybody is told of them: what is torn can only be the end of the newest file.
//! Files are numbered in the order in which they were made, and deleted when nothing in them is needed.
//!
//! The `committed` records stand in for files that are gone: of a stream whose first entries went with them, they say
//! where its run begins now.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use tributary_common::batch::{Batch, BatchError, BatchHeader, PREFIX_BYTES, Prefix};
use tributary_common::ids::StreamId;
use tributary_common::position::Position;

use super::io::FolderFile;
use super::run::Place;
use crate::disk::BLOCK_BYTES;

const MAGIC: [u8; 4] = *b"TBSP";
const VERSION: u8 = 2;
/// Versions that are read.
const VERSIONS: [u8; 2] = [1, VERSION];
const COMMITTED_MAGIC: [u8; 4] = *b"TBC1";
const COMMITTED_PREFIX_BYTES: usize = 12;

/// Bytes of a segment file before its first record.
pub(super) const HEADER_BYTES: u64 = 8;

/// Most streams in one `committed` record; of more, several are written.
const STREAMS_PER_RECORD: usize = 10_000;

/// Most bytes of one `committed` record's payload: an id, two integers of at most ten bytes, and the list's length.
const MAX_COMMITTED_BYTES: usize = STREAMS_PER_RECORD * (16 + 10 + 10) + 10;

/// How much is read at once where a record begins: enough for the header of nearly every batch.
const PEEK_BYTES: usize = 2048;

const SUFFIX: &str = ".spool";

/// The name of a segment file.
pub(super) fn file_name(number: u64) -> String {
    format!("{number:016}{SUFFIX}")
}

/// The number in a segment file's name, if it is one.
pub(super) fn file_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX)?;
    (digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// What a segment file begins with.
pub(super) fn file_header() -> Bytes {
    const HEADER: [u8; HEADER_BYTES as usize] = header_of(VERSION);
    Bytes::from_static(&HEADER)
}

const fn header_of(version: u8) -> [u8; HEADER_BYTES as usize] {
    let [a, b, c, d] = MAGIC;
    [a, b, c, d, version, 0, 0, 0]
}

/// The zeros that follow a group of records which ends at `offset`.
pub(super) fn padding(offset: u64) -> Bytes {
    static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    Bytes::from_static(&ZEROS[..(padded(offset) - offset) as usize])
}

/// Where the group begins that follows one which ends at `offset`.
pub(super) fn padded(offset: u64) -> u64 {
    offset.next_multiple_of(BLOCK_BYTES as u64)
}

/// Records that say how far streams are committed.
pub(super) fn committed_records(positions: &[(StreamId, Position)]) -> Bytes {
    let mut out = BytesMut::new();
    for chunk in positions.chunks(STREAMS_PER_RECORD) {
        let payload = postcard::to_stdvec(chunk).expect("writing to memory can't fail");
        let len = (payload.len() as u32).to_le_bytes();
        let crc = crc32c::crc32c_append(crc32c::crc32c(&len), &payload);
        out.put_slice(&COMMITTED_MAGIC);
        out.put_slice(&len);
        out.put_u32_le(crc);
        out.put_slice(&payload);
    }
    out.freeze()
}

/// One record, as found on disk.
#[derive(Debug)]
pub(super) enum Record {
    /// A batch.
    Batch(Box<BatchHeader>, Place),
    /// How far streams are committed.
    Committed(Vec<(StreamId, Position)>),
}

/// Why a file can't be read on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Damage {
    /// The file ends inside of a record, or in zeros: what a crash leaves of a group that was being written.
    #[error("it ends inside of a record")]
    Torn,
    /// The file does not begin like one of ours.
    #[error("it is not a segment file of version {VERSION}")]
    Foreign,
    /// A record is corrupt.
    #[error("{0}")]
    Corrupt(BatchError),
    /// A `committed` record is corrupt.
    #[error("a record of committed positions is corrupt")]
    CorruptCommitted,
    /// The disk does not give the bytes.
    #[error("the disk can't read it: {0}")]
    Unreadable(io::Error),
}

/// What a file holds.
#[derive(Debug)]
pub(super) struct Scan {
    /// The records up to the damage, in order.
    pub(super) records: Vec<Record>,
    /// How many bytes are good, from the start.
    pub(super) good_len: u64,
    /// What is wrong behind them.
    pub(super) damage: Option<Damage>,
}

/// Reads the records of a file of `len` bytes. The bodies of batches are read and verified too if `bodies` is set;
/// otherwise they are verified when they are forwarded.
pub(super) fn scan(file: &dyn FolderFile, number: u64, len: u64, bodies: bool) -> Scan {
    let mut scan = Scan { records: Vec::new(), good_len: 0, damage: None };
    let mut start = [0; HEADER_BYTES as usize];
    match file.read_at(&mut start, 0) {
        Ok(read) if read < start.len() => scan.damage = Some(Damage::Torn),
        Ok(_) if !VERSIONS.iter().any(|version| start == header_of(*version)) => {
            scan.damage = Some(if start == [0; HEADER_BYTES as usize] { Damage::Torn } else { Damage::Foreign });
        }
        Ok(_) => scan.good_len = HEADER_BYTES,
        Err(error) => scan.damage = Some(Damage::Unreadable(error)),
    }
    while scan.damage.is_none() && scan.good_len < len {
        match record_at(file, number, scan.good_len, len - scan.good_len, bodies) {
            Ok((record, record_len)) => {
                scan.records.extend(record);
                scan.good_len += record_len;
            }
            Err(Damage::Unreadable(error)) => scan.damage = Some(Damage::Unreadable(error)),
            Err(damage) => {
                let torn = matches!(&damage, Damage::Torn) || only_zeros(file, scan.good_len);
                scan.damage = Some(if torn { Damage::Torn } else { damage });
            }
        }
    }
    scan
}

/// The record at `offset` and its length; no record where there is only what fills a block up.
fn record_at(
    file: &dyn FolderFile,
    number: u64,
    offset: u64,
    room: u64,
    bodies: bool,
) -> Result<(Option<Record>, u64), Damage> {
    let read = |offset: u64, len: usize| -> Result<Bytes, Damage> {
        let mut buffer = vec![0; len];
        let have = file.read_at(&mut buffer, offset).map_err(Damage::Unreadable)?;
        buffer.truncate(have);
        Ok(buffer.into())
    };
    let peek = read(offset, PEEK_BYTES.min(room as usize))?;
    let padding_len = room.min(padded(offset) - offset);
    if padding_len > 0 && peek.first() == Some(&0) {
        let padding = read(offset, padding_len as usize)?;
        if padding.iter().all(|byte| *byte == 0) {
            return Ok((None, padding_len));
        }
    }
    if peek.starts_with(&COMMITTED_MAGIC) {
        let fixed = peek.first_chunk::<COMMITTED_PREFIX_BYTES>().ok_or(Damage::Torn)?;
        let word = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let payload_len = word(4) as usize;
        if payload_len > MAX_COMMITTED_BYTES {
            return Err(Damage::CorruptCommitted);
        }
        let payload = read(offset + COMMITTED_PREFIX_BYTES as u64, payload_len)?;
        if payload.len() < payload_len {
            return Err(Damage::Torn);
        }
        if crc32c::crc32c_append(crc32c::crc32c(&fixed[4..8]), &payload) != word(8) {
            return Err(Damage::CorruptCommitted);
        }
        let positions = postcard::from_bytes(&payload).map_err(|_| Damage::CorruptCommitted)?;
        return Ok((Some(Record::Committed(positions)), (COMMITTED_PREFIX_BYTES + payload_len) as u64));
    }
    let fixed = peek.first_chunk::<PREFIX_BYTES>().ok_or(Damage::Torn)?;
    let prefix = Prefix::read(fixed).map_err(Damage::Corrupt)?;
    if prefix.total_len() > room {
        return Err(Damage::Torn);
    }
    let total = prefix.total_len();
    let place = Place { segment: number, offset, len: total as u32 };
    let header = if bodies {
        let batch = read_batch(file, place).map_err(|error| match error {
            ReadError::Io(error) => Damage::Unreadable(error),
            ReadError::Corrupt(error) => Damage::Corrupt(error),
        })?;
        batch.header
    } else {
        let header_end = PREFIX_BYTES + prefix.header_len;
        let whole = if peek.len() < header_end { read(offset, header_end)? } else { peek };
        let header = whole.get(PREFIX_BYTES..header_end).ok_or(Damage::Torn)?;
        prefix.read_header(header).map_err(Damage::Corrupt)?
    };
    Ok((Some(Record::Batch(Box::new(header), place)), total))
}

/// A file system may have given a file its length before its data.
fn only_zeros(file: &dyn FolderFile, mut offset: u64) -> bool {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read_at(&mut buffer, offset) {
            Ok(0) => return true,
            Ok(read) if buffer[..read].iter().all(|byte| *byte == 0) => offset += read as u64,
            _ => return false,
        }
    }
}

/// A batch could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk does not give the bytes.
    #[error("the disk can't read it: {0}")]
    Io(#[from] io::Error),
    /// The bytes are no longer those that were written.
    #[error("{0}")]
    Corrupt(#[from] BatchError),
}

/// Reads and verifies the batch at `place`.
///
/// # Errors
/// When the disk or the checksums say no.
#[expect(
    clippy::slow_vector_initialization,
    reason = "zeroed memory comes from the system page by page, which costs more"
)]
pub fn read_batch(file: &dyn FolderFile, place: Place) -> Result<Batch, ReadError> {
    let mut buffer = Vec::with_capacity(place.len as usize);
    buffer.resize(place.len as usize, 0);
    let have = file.read_at(&mut buffer, place.offset)?;
    buffer.truncate(have);
    let mut rest = Bytes::from(buffer);
    let batch = Batch::take_from(&mut rest)?;
    if !rest.is_empty() {
        return Err(BatchError::CorruptHeader("its length is not that of its entry").into());
    }
    batch.verify()?;
    Ok(batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_as_numbers_do_and_others_are_left_alone() {
        assert!(file_name(9) < file_name(10));
        assert_eq!(file_number(&file_name(1234)), Some(1234));
        for foreign in ["", ".spool", "1.spool", "000000000000000x.spool", "0000000000000001.spool.tmp", "lost+found"] {
            assert_eq!(file_number(foreign), None, "{foreign}");
        }
    }
}
