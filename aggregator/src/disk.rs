//! Files that are written once and read late, if at all.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{Advice, OFlags, fadvise};

/// The blocks in which a file can be written around the page cache: a multiple of what every usual disk and file system asks for.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// How much is copied together before it is written.
const DIRECT_BYTES: usize = 1 << 20;

/// Makes what was written to a file durable, and has the kernel let go of its copy.
///
/// What a spool or a segment was just given is sent on from this process's own memory, or read by a job hours later. Left in the page
/// cache, it takes a fresh page for each 4 KiB, which costs more CPU than everything else about the write, and pushes out what others
/// on the machine need. Pages that are given back at once are the ones that the next write gets.
///
/// # Errors
/// When the data is not known to be durable. That the kernel keeps its copy is none.
pub(crate) fn sync_and_let_go(file: &File) -> io::Result<()> {
    file.sync_data()?;
    // Only advice; and only of clean pages, so nothing that isn't on the disk can go.
    let _ = fadvise(file, 0, None, Advice::DontNeed);
    Ok(())
}

/// Writes around the page cache (`O_DIRECT`), which costs half the CPU time of writing through it: the kernel makes no copy page by page
/// and has nothing to let go of.
///
/// The disk takes only whole blocks that begin at whole blocks of memory, so pieces are copied together first, into memory that is used
/// again and again and stays in the processor's caches.
#[derive(Debug, Default)]
pub(crate) struct DirectWriter {
    /// Empty before the first use. Longer than what is used of it by a block, as the allocator does not align it.
    memory: Vec<u8>,
    /// The file system does not do it.
    is_refused: bool,
}

impl DirectWriter {
    /// Writes all pieces, one after the other, from `offset` on, to a file that exists; both `offset` and the sum of their lengths
    /// are multiples of [`BLOCK_BYTES`]. Returns whether that was possible: where it wasn't, the caller writes them in the usual way.
    ///
    /// # Errors
    /// Any part of the pieces may be in the file then.
    pub(crate) fn write(&mut self, path: &Path, pieces: &[Bytes], offset: u64) -> io::Result<bool> {
        if self.is_refused {
            return Ok(false);
        }
        // A handle for each call costs a thousandth of what it writes; one that is kept would be a second one for each file.
        let file = OpenOptions::new().write(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path);
        match file.and_then(|file| self.copy_and_write(&file, pieces, offset)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                self.is_refused = true;
                self.memory = Vec::new();
                tracing::info!(path = %path.display(), "this file system can't be written to directly: going by the page cache");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn copy_and_write(&mut self, file: &File, pieces: &[Bytes], mut offset: u64) -> io::Result<()> {
        if self.memory.is_empty() {
            self.memory = vec![0; DIRECT_BYTES + BLOCK_BYTES];
        }
        let start = self.memory.as_ptr().align_offset(BLOCK_BYTES);
        let memory = &mut self.memory[start..start + DIRECT_BYTES];
        let mut filled = 0;
        for piece in pieces {
            let mut rest = &piece[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(memory.len() - filled));
                memory[filled..filled + now.len()].copy_from_slice(now);
                filled += now.len();
                rest = later;
                if filled == memory.len() {
                    file.write_all_at(memory, offset)?;
                    offset += filled as u64;
                    filled = 0;
                }
            }
        }
        file.write_all_at(&memory[..filled], offset)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Whether the file can be read at `offset` without the disk.
    fn is_in_memory(file: &File, offset: u64) -> bool {
        let mut byte = [0];
        let read = rustix::io::preadv2(
            file,
            &mut [io::IoSliceMut::new(&mut byte)],
            offset,
            rustix::io::ReadWriteFlags::NOWAIT,
        );
        read.is_ok()
    }

    #[test]
    fn what_was_synced_does_not_stay_in_memory() {
        // Not below /tmp, which may lie in memory itself.
        let mut file = tempfile::tempfile_in("/var/tmp").expect("a file");
        file.write_all(&vec![7; 4 << 20]).expect("written");
        assert!(is_in_memory(&file, 0), "what was just written is in the page cache");
        sync_and_let_go(&file).expect("synced");
        let left = (0..1024).filter(|page| is_in_memory(&file, page * 4096)).count();
        assert_eq!(left, 0, "so many of 1,024 pages");
    }

    #[test]
    fn what_is_written_directly_is_all_there_and_never_in_memory() {
        // Not below /tmp, which may lie in memory itself.
        let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file");
        let mut writer = DirectWriter::default();
        // Pieces of any length, more of them than are copied at once, in calls that follow each other.
        let content: Vec<u8> = (0_u32..1_000_003).flat_map(u32::to_le_bytes).collect();
        let whole = content.len() / BLOCK_BYTES * BLOCK_BYTES;
        let calls = [0, BLOCK_BYTES, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + DIRECT_BYTES, whole];
        for call in calls.windows(2) {
            let pieces: Vec<Bytes> = content[call[0]..call[1]].chunks(70_001).map(Bytes::copy_from_slice).collect();
            let written = writer.write(file.path(), &pieces, call[0] as u64).expect("written");
            assert!(written, "/var/tmp lies on a file system that can be written to directly");
        }
        assert!(!is_in_memory(file.as_file(), 0));
        assert!(std::fs::read(file.path()).expect("read") == content[..whole]);
    }

    #[test]
    fn a_disk_that_takes_nothing_directly_is_asked_once() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file");
        let mut writer = DirectWriter::default();
        // What isn't a whole block is refused by the kernel with the same error.
        let half = [Bytes::from_static(&[7; BLOCK_BYTES / 2 + 1])];
        assert!(!writer.write(file.path(), &half, 0).expect("no error"), "the caller writes it");
        let whole = [Bytes::from_static(&[7; BLOCK_BYTES])];
        assert!(!writer.write(file.path(), &whole, 0).expect("no error"), "not asked again");
        assert_eq!(file.as_file().metadata().expect("there").len(), 0);
    }

    #[test]
    fn that_a_direct_write_fails_is_told() {
        let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
        let mut writer = DirectWriter::default();
        let whole = [Bytes::from_static(&[7; BLOCK_BYTES])];
        let error = writer.write(&folder.path().join("gone"), &whole, 0).expect_err("it is not there");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
