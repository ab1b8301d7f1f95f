//! Copies: whether a file that was found is a new log, or holds what a known stream held in another file.
//!
//! `copytruncate` leaves a copy beside the file that it empties, compressors replace a file by a smaller one, `rsync` and
//! editors put a new file in the place of an old one. Where a file begins with the first line of a known stream, its bytes
//! are compared with what is known of that stream: with the file itself while that can still be read, else with the bytes
//! before the positions that are remembered of it.
//!
//! | Original | The other file | What it is taken for |
//! |---|---|---|
//! | can be read | has other bytes | another log |
//! | | is as long or longer, and the same up to there, `SURE_BYTES` at least (512 where the original was deleted) | a copy; what it has beyond that is its own |
//! | | is longer, and less is the same | another log |
//! | | is shorter, or little of it, and the same | so far a beginning: it may become either |
//! | gone or emptied | has other bytes before a remembered position | another log |
//! | | reaches what is committed, with the same bytes there | where the stream goes on |
//! | | doesn't reach it | so far a beginning |
//! | gone, and was committed to its end | is the same in less than `SURE_BYTES` | another log |
//!
//! A beginning that rests counts as a copy when at least `SURE_BYTES` were the same, else as another log: many programs
//! begin each of their files with the same lines.
//!
//! Two logs whose lines are all the same, with no time in them, can't be told apart this way.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use tributary_common::ids::StreamId;
use tributary_common::position::{Position, TAIL_WINDOW_BYTES, TailHash};

use crate::identity::{FileFacts, read_up_to};

/// So many equal bytes are no accident.
const SURE_BYTES: u64 = 4096;

/// So many are none where the original has lost its name: it was replaced, or it made room for a new one.
const SURE_BYTES_OF_UNLINKED: u64 = 512;

/// How much is read at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// What lies before the first byte that is missing of an unpacked file: lines there may say the time of the next ones.
const BEFORE_BYTES: usize = 64 << 10;

/// A stream that a file may be a copy of.
#[derive(Debug, Clone)]
pub struct Original {
    /// The stream.
    pub stream: StreamId,
    /// Its file, while it is open.
    pub file: Option<Arc<File>>,
    /// What is committed of it.
    pub committed: Position,
    /// The last positions up to which all was committed, in order.
    pub history: Vec<Position>,
    /// Whether it was committed to its end: then nothing of it is missing, and little likeness proves nothing.
    pub finished: bool,
}

impl Original {
    /// The positions at which its bytes are known.
    fn known(&self) -> impl Iterator<Item = Position> {
        self.history.iter().copied().filter(|at| at.offset < self.committed.offset).chain([self.committed])
    }
}

/// What a file is to a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Likeness {
    /// The same up to here, and the stream's own file still has it all: up to here it is a copy.
    Copy(Position),
    /// The same as far as it goes, which is not far enough to say more.
    Beginning,
    /// The same up to what is committed, and the stream's own file is gone: the stream goes on here.
    Continuation,
}

/// What `file` is to the first of `originals` that it is something to. `rested`: it will not become longer.
///
/// # Errors
/// When `file` can't be read. An original that can't be is taken for gone.
pub fn compare(file: &File, originals: &[Original], rested: bool) -> io::Result<Option<(StreamId, Likeness)>> {
    let size = FileFacts::of(file)?.size;
    let mut beginning = None;
    for original in originals {
        let likeness = match &original.file {
            Some(other) if is_intact(other, original) => compare_whole(file, size, other, rested)?,
            _ => compare_known(file, size, original, rested)?,
        };
        match likeness {
            None => {}
            // Of another one it may be more.
            Some(Likeness::Beginning) => beginning = beginning.or(Some((original.stream, Likeness::Beginning))),
            Some(likeness) => return Ok(Some((original.stream, likeness))),
        }
    }
    Ok(beginning)
}

/// Whether the original's file still has the bytes that were committed of it.
fn is_intact(file: &File, original: &Original) -> bool {
    tail_at(file, original.committed.offset).is_ok_and(|tail| tail == Some(original.committed.tail))
}

fn compare_whole(file: &File, size: u64, other: &File, rested: bool) -> io::Result<Option<Likeness>> {
    let Ok(facts) = FileFacts::of(other) else { return Ok(None) };
    let other_size = facts.size;
    let sure = if facts.deleted { SURE_BYTES_OF_UNLINKED } else { SURE_BYTES };
    let common = size.min(other_size);
    let (mut left, mut right) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut at = 0;
    while at < common {
        let wanted = usize::try_from(common - at).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        let got = read_up_to(file, &mut left[..wanted], at)?;
        // One of them became shorter meanwhile: nothing can be said but that they are not the same now.
        if got < wanted || read_up_to(other, &mut right[..wanted], at).unwrap_or(0) < wanted {
            return Ok(None);
        }
        if left[..wanted] != right[..wanted] {
            return Ok(None);
        }
        at += wanted as u64;
    }
    Ok(match common >= sure && (rested || size >= other_size) {
        true => position_at(file, common)?.map(Likeness::Copy),
        false if rested || size > other_size => None,
        false => Some(Likeness::Beginning),
    })
}

fn compare_known(file: &File, size: u64, original: &Original, rested: bool) -> io::Result<Option<Likeness>> {
    let (mut same, mut reach) = (0, None);
    for position in original.known().filter(|position| position.offset <= size) {
        if tail_at(file, position.offset)? != Some(position.tail) {
            return Ok(None);
        }
        same += position.offset.min(TAIL_WINDOW_BYTES as u64);
        reach = Some(position);
    }
    if reach == Some(original.committed) {
        return Ok((!original.finished || same >= SURE_BYTES).then_some(Likeness::Continuation));
    }
    Ok(match reach {
        _ if !rested => Some(Likeness::Beginning),
        Some(position) if same >= SURE_BYTES => Some(Likeness::Copy(position)),
        _ => None,
    })
}

/// The hash of the bytes before `offset`; none where the file is shorter.
fn tail_at(file: &File, offset: u64) -> io::Result<Option<TailHash>> {
    let before = offset.min(TAIL_WINDOW_BYTES as u64);
    let mut bytes = [0; TAIL_WINDOW_BYTES];
    let bytes = &mut bytes[..before as usize];
    let got = read_up_to(file, bytes, offset - before)?;
    Ok((got == bytes.len()).then(|| TailHash::of(bytes)))
}

fn position_at(file: &File, offset: u64) -> io::Result<Option<Position>> {
    Ok(tail_at(file, offset)?.map(|tail| Position { offset, tail }))
}

/// A compressed file that can be unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compressor {
    /// By `gzip`, also several members.
    Gzip,
    /// By `zstd`.
    Zstd,
}

/// What a compressed file holds of a stream.
#[derive(Debug)]
pub struct Unpacked {
    /// The stream.
    pub stream: StreamId,
    /// The bytes of the file from a little before what is committed, at the offsets that they have in the stream. It has
    /// no name, and what lies before is a hole.
    pub file: File,
}

/// Unpacks what `file` has of one of `originals` beyond what is committed of it, into a file without a name in
/// `directory`. None where it holds none of them, or nothing more. `stream_of` says which of the streams (by its number)
/// may begin with a line, given without its newline.
///
/// The whole file is decompressed once in constant memory; on disk lies only what is not committed.
///
/// # Errors
/// When `file` can't be read or is not whole, or `directory` can't be written.
pub fn unpack(
    file: &File,
    compressor: Compressor,
    originals: &[Original],
    directory: &Path,
    stream_of: impl Fn(&[u8]) -> Vec<usize>,
) -> io::Result<Option<Unpacked>> {
    let mut packed = file;
    packed.seek(SeekFrom::Start(0))?;
    let packed = io::BufReader::with_capacity(CHUNK_BYTES, packed);
    match compressor {
        Compressor::Gzip => unpack_from(flate2::bufread::MultiGzDecoder::new(packed), originals, directory, stream_of),
        Compressor::Zstd => {
            unpack_from(zstd::stream::read::Decoder::with_buffer(packed)?, originals, directory, stream_of)
        }
    }
}

fn unpack_from(
    mut bytes: impl Read,
    originals: &[Original],
    directory: &Path,
    stream_of: impl Fn(&[u8]) -> Vec<usize>,
) -> io::Result<Option<Unpacked>> {
    // The beginning of what is held, as an offset in the unpacked bytes; before a position is compared, its window is held.
    let (mut held, mut begin) = (Vec::with_capacity(CHUNK_BYTES + BEFORE_BYTES), 0_u64);
    let mut candidates: Option<Vec<Candidate<'_>>> = None;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut out: Option<(StreamId, File)> = None;
    loop {
        let got = read_full(&mut bytes, &mut chunk)?;
        if let Some((_, file)) = &mut out {
            file.write_all(&chunk[..got])?;
        } else {
            held.extend_from_slice(&chunk[..got]);
            let candidates = candidates.get_or_insert_with(|| {
                let line = held.split(|byte| *byte == b'\n').next().unwrap_or_default();
                stream_of(line).into_iter().map(|n| Candidate::new(&originals[n])).collect()
            });
            candidates.retain_mut(|candidate| candidate.still_fits(&held, begin));
            if candidates.is_empty() {
                return Ok(None);
            }
            if let Some(found) = candidates.iter().find(|candidate| candidate.left.is_empty()) {
                let committed = found.original.committed.offset;
                let from = committed.saturating_sub(BEFORE_BYTES as u64).max(begin);
                let mut file = tempfile::tempfile_in(directory)?;
                file.seek(SeekFrom::Start(from))?;
                file.write_all(&held[(from - begin) as usize..])?;
                out = Some((found.original.stream, file));
                held = Vec::new();
            } else {
                let surplus = held.len().saturating_sub(BEFORE_BYTES);
                held.drain(..surplus);
                begin += surplus as u64;
            }
        }
        if got < chunk.len() {
            break;
        }
    }
    Ok(out.map(|(stream, file)| Unpacked { stream, file }))
}

struct Candidate<'a> {
    original: &'a Original,
    /// Positions that were not reached yet, the next one last.
    left: Vec<Position>,
}

impl<'a> Candidate<'a> {
    fn new(original: &'a Original) -> Self {
        let mut left: Vec<Position> = original.known().collect();
        left.reverse();
        Self { original, left }
    }

    fn still_fits(&mut self, held: &[u8], begin: u64) -> bool {
        while let Some(next) = self.left.last()
            && next.offset <= begin + held.len() as u64
        {
            let end = (next.offset - begin) as usize;
            if TailHash::of(&held[end.saturating_sub(TAIL_WINDOW_BYTES)..end]) != next.tail {
                return false;
            }
            self.left.pop();
        }
        true
    }
}

/// Reads until `buffer` is full or there is no more.
fn read_full(bytes: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match bytes.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(bytes).expect("written");
        file
    }

    fn at(bytes: &[u8], offset: usize) -> Position {
        let tail = TailHash::of(&bytes[offset.saturating_sub(TAIL_WINDOW_BYTES)..offset]);
        Position { offset: offset as u64, tail }
    }

    fn text(len: usize) -> Vec<u8> {
        let lines = (0..).flat_map(|n| format!("line {n:08} of a log\n").into_bytes());
        lines.take(len).collect()
    }

    fn linked(bytes: &[u8]) -> (tempfile::NamedTempFile, File) {
        let mut named = tempfile::NamedTempFile::new().expect("a file");
        named.write_all(bytes).expect("written");
        let file = named.reopen().expect("opened");
        (named, file)
    }

    fn original(bytes: &[u8], open: bool, committed: usize, history: &[usize]) -> Original {
        Original {
            stream: StreamId(7),
            file: open.then(|| Arc::new(file(bytes))),
            committed: at(bytes, committed),
            history: history.iter().map(|offset| at(bytes, *offset)).collect(),
            finished: false,
        }
    }

    fn likeness(bytes: &[u8], original: &Original, rested: bool) -> Option<Likeness> {
        let found = compare(&file(bytes), std::slice::from_ref(original), rested).expect("read");
        found.map(|(stream, likeness)| {
            assert_eq!(stream, StreamId(7));
            likeness
        })
    }

    #[test]
    fn a_whole_copy_is_one_while_the_original_can_be_read() {
        let bytes = text(600_000);
        let (_named, file) = linked(&bytes);
        let open = Original { file: Some(Arc::new(file)), ..original(&bytes, false, 200_000, &[]) };
        assert_eq!(likeness(&bytes, &open, false), Some(Likeness::Copy(at(&bytes, 600_000))));
        assert_eq!(likeness(&bytes[..300_000], &open, false), Some(Likeness::Beginning));
        assert_eq!(likeness(&bytes[..300_000], &open, true), Some(Likeness::Copy(at(&bytes, 300_000))));
        assert_eq!(likeness(&bytes[..3000], &open, true), None, "too little to be sure");
        let mut other = bytes.clone();
        other[599_999] ^= 1;
        assert_eq!(likeness(&other, &open, false), None);
        let longer = [&bytes[..], b"more\n"].concat();
        assert_eq!(likeness(&longer, &open, false), Some(Likeness::Copy(at(&bytes, 600_000))));
    }

    #[test]
    fn little_that_is_the_same_makes_a_copy_only_of_a_file_that_was_deleted() {
        let bytes = text(4000);
        let (_named, file) = linked(&bytes[..3000]);
        let small = Original { file: Some(Arc::new(file)), ..original(&bytes, false, 200, &[]) };
        assert_eq!(likeness(&bytes[..3000], &small, false), Some(Likeness::Beginning));
        assert_eq!(likeness(&bytes[..3000], &small, true), None, "many programs begin all their logs so");
        assert_eq!(likeness(&bytes[..3010], &small, false), None);
        let deleted = original(&bytes[..3000], true, 200, &[]);
        assert_eq!(likeness(&bytes[..3010], &deleted, false), Some(Likeness::Copy(at(&bytes, 3000))));
        let banner = original(&bytes[..500], true, 200, &[]);
        assert_eq!(likeness(&bytes[..3010], &banner, false), None);
    }

    #[test]
    fn a_stream_goes_on_in_the_copy_of_a_file_that_is_gone_or_emptied() {
        let bytes = text(50_000);
        let gone = original(&bytes, false, 20_000, &[5000, 10_000, 15_000]);
        let emptied = Original { file: Some(Arc::new(file(b"new\n"))), ..gone.clone() };
        for original in [gone, emptied] {
            assert_eq!(likeness(&bytes, &original, false), Some(Likeness::Continuation));
            assert_eq!(likeness(&bytes[..20_000], &original, false), Some(Likeness::Continuation));
            assert_eq!(likeness(&bytes[..19_999], &original, false), Some(Likeness::Beginning));
            assert_eq!(likeness(&bytes[..19_999], &original, true), None, "three kilobytes are not enough to be sure");
            let mut other = bytes.clone();
            other[19_990] ^= 1;
            assert_eq!(likeness(&other, &original, false), None);
        }
    }

    #[test]
    fn a_log_that_begins_like_a_finished_one_is_another_log() {
        let bytes = text(50_000);
        let finished = |committed| Original { finished: true, ..original(&bytes, false, committed, &[]) };
        assert_eq!(likeness(&bytes, &finished(44), false), None);
        let long = Original { finished: true, ..original(&bytes, false, 20_000, &[5000, 10_000, 15_000]) };
        assert_eq!(likeness(&bytes, &long, false), Some(Likeness::Continuation));
    }

    #[test]
    fn an_older_copy_that_rests_is_a_copy_up_to_the_last_position_that_is_known() {
        let bytes = text(50_000);
        let gone = original(&bytes, false, 20_000, &[5000, 10_000, 12_000, 15_000]);
        assert_eq!(likeness(&bytes[..16_000], &gone, true), Some(Likeness::Copy(at(&bytes, 15_000))));
    }

    fn gzip(bytes: &[u8], members: usize) -> Vec<u8> {
        let mut packed = Vec::new();
        for piece in bytes.chunks(bytes.len().div_ceil(members).max(1)) {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(piece).expect("written");
            packed.extend(encoder.finish().expect("finished"));
        }
        packed
    }

    fn rest(packed: &[u8], compressor: Compressor, original: &Original) -> io::Result<Option<Unpacked>> {
        let dir = tempfile::tempdir().expect("a directory");
        unpack(&file(packed), compressor, std::slice::from_ref(original), dir.path(), |line| {
            if line == b"line 00000000 of a log" { vec![0] } else { Vec::new() }
        })
    }

    #[test]
    fn what_is_missing_is_unpacked_at_its_offset() {
        let bytes = text(2_000_000);
        for committed in [0, 22, 100_000, 1_234_567, 2_000_000] {
            let history: Vec<usize> = (0..committed).step_by(100_000).skip(1).collect();
            let gone = original(&bytes, false, committed, &history);
            for (packed, compressor) in [
                (gzip(&bytes, 3), Compressor::Gzip),
                (zstd::encode_all(&bytes[..], 1).expect("encoded"), Compressor::Zstd),
            ] {
                let unpacked = rest(&packed, compressor, &gone).expect("read").expect("it is this stream");
                assert_eq!(unpacked.stream, StreamId(7));
                let mut all = vec![0; bytes.len() + 1];
                assert_eq!(read_up_to(&unpacked.file, &mut all, 0).expect("read"), bytes.len());
                let from = committed.saturating_sub(TAIL_WINDOW_BYTES);
                assert!(all[from..bytes.len()] == bytes[from..], "committed {committed}");
            }
        }
    }

    #[test]
    fn another_log_and_one_that_ends_before_what_is_committed_are_left_alone() {
        let bytes = text(200_000);
        let gone = original(&bytes, false, 150_000, &[50_000]);
        let mut other = bytes.clone();
        other[49_000] ^= 1;
        for bytes in [&other[..], &bytes[..149_999], b"something else\n"] {
            assert!(rest(&gzip(bytes, 1), Compressor::Gzip, &gone).expect("read").is_none());
        }
    }

    proptest! {
        /// Whatever the bytes are, reading them ends, with a result or an error.
        #[test]
        fn a_damaged_file_is_an_error_and_no_panic(
            at in 0_usize..30_000, byte: u8, cut in 0_usize..30_000, zstd: bool, committed in 0_usize..100_000,
        ) {
            let bytes = text(100_000);
            let (mut packed, compressor) = if zstd {
                (zstd::encode_all(&bytes[..], 1).expect("encoded"), Compressor::Zstd)
            } else {
                (gzip(&bytes, 2), Compressor::Gzip)
            };
            let at = at % packed.len();
            packed[at] = byte;
            packed.truncate(packed.len().saturating_sub(cut % 100));
            let gone = original(&bytes, false, committed, &[]);
            // An unpacked file, none, or an error: all are answers.
            let _ = rest(&packed, compressor, &gone);
            let _ = rest(&bytes[..at], compressor, &gone);
        }
    }
}
