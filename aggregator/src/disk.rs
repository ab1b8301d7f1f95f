//! Files that are written once and read late, if at all.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustix::fs::{Advice, OFlags, fadvise};

/// The blocks in which a file can be written around the page cache: a multiple of what every usual disk and file system asks for.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// How much is copied together before it is written.
const DIRECT_BYTES: usize = 1 << 20;

/// What is less is written through the page cache: the disk is asked once for all of it then, at the sync, and not once more.
const MIN_DIRECT_BYTES: usize = 64 << 10;

/// How many direct writes may go on at a time, each with memory of its own: more of them make a disk no faster.
const DIRECT_WRITES: usize = 4;

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

/// Writes to the files of one file system, around the page cache (`O_DIRECT`) where that is possible and worth it: it costs half the CPU
/// time, since the kernel makes no copy page by page and has nothing to let go of.
///
/// The disk takes only whole blocks that begin at whole blocks of memory, so pieces are copied together first, into memory that is used
/// again and again and stays in the processor's caches.
#[derive(Debug, Default)]
pub(crate) struct BlockWriter {
    /// The file system takes nothing directly.
    is_refused: AtomicBool,
    /// Empty before its first use. Longer than what is used of it by a block, as the allocator does not align it.
    memory: [Mutex<Vec<u8>>; DIRECT_WRITES],
}

impl BlockWriter {
    /// Writes all pieces, one after the other, from `offset` on. Directly, if that and the sum of their lengths are multiples of
    /// [`BLOCK_BYTES`], and they are not few.
    ///
    /// # Errors
    /// Any part of the pieces may be in the file then.
    pub(crate) fn write_at(&self, file: &File, pieces: &[Bytes], offset: u64) -> io::Result<()> {
        let len: usize = pieces.iter().map(Bytes::len).sum();
        let whole_blocks = len.is_multiple_of(BLOCK_BYTES) && offset.is_multiple_of(BLOCK_BYTES as u64);
        if whole_blocks && len >= MIN_DIRECT_BYTES && self.write_directly(file, pieces, offset)? {
            return Ok(());
        }
        write_all_at(file, pieces, offset)
    }

    /// Returns whether it was possible.
    fn write_directly(&self, file: &File, pieces: &[Bytes], offset: u64) -> io::Result<bool> {
        if self.is_refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        // A handle for each call costs 4 µs; one that is kept would be a second one for each file. By its number and not by its name, which
        // may lead to another file by now.
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        let direct = OpenOptions::new().write(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(own);
        let written = match direct {
            Ok(direct) => self.copy_and_write(&direct, pieces, offset),
            Err(error) if error.kind() == ErrorKind::InvalidInput => Err(error),
            // A lack of descriptors, say: for this once.
            Err(_) => return Ok(false),
        };
        match written {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                self.is_refused.store(true, Ordering::Relaxed);
                tracing::info!("the file system takes nothing around the page cache: going through it");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn copy_and_write(&self, file: &File, pieces: &[Bytes], mut offset: u64) -> io::Result<()> {
        let free = self.memory.iter().find_map(|memory| memory.try_lock().ok());
        let mut memory = free.unwrap_or_else(|| self.memory[0].lock().expect("nothing panics while the lock is held"));
        memory.resize(DIRECT_BYTES + BLOCK_BYTES, 0);
        let start = memory.as_ptr().align_offset(BLOCK_BYTES);
        let blocks = &mut memory[start..start + DIRECT_BYTES];
        let mut filled = 0;
        for piece in pieces {
            let mut rest = &piece[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(blocks.len() - filled));
                blocks[filled..filled + now.len()].copy_from_slice(now);
                filled += now.len();
                rest = later;
                if filled == blocks.len() {
                    file.write_all_at(blocks, offset)?;
                    offset += filled as u64;
                    filled = 0;
                }
            }
        }
        file.write_all_at(&blocks[..filled], offset)
    }
}

/// Writes all pieces, one after the other, from `offset` on, into the page cache.
fn write_all_at(file: &File, pieces: &[Bytes], mut offset: u64) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    let mut rest = &mut slices[..];
    // Drops empty slices at the front: for them alone, writing 0 bytes would be no progress.
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        // IOV_MAX is 1,024 on Linux.
        let now = rest.len().min(1024);
        match rustix::io::pwritev(file, &rest[..now], offset) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                IoSlice::advance_slices(&mut rest, written);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::Command;

    use super::*;

    /// How many pages of the file are in the page cache. To ask by reading would bring them there.
    fn pages_in_memory(file: &File) -> u64 {
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let fincore = Command::new("fincore").args(["--noheadings", "--raw", "--output", "PAGES", &path]).output();
        let told = fincore.expect("util-linux has it");
        assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
        String::from_utf8_lossy(&told.stdout).trim().parse().expect("a number")
    }

    #[test]
    fn what_was_synced_does_not_stay_in_memory() {
        let mut file = file();
        file.write_all(&vec![7; 4 << 20]).expect("written");
        assert!(pages_in_memory(&file) > 0, "what was just written is in the page cache");
        sync_and_let_go(&file).expect("synced");
        assert_eq!(pages_in_memory(&file), 0, "of 1,024 pages");
    }

    /// Not below /tmp, which may lie in memory itself.
    fn file() -> File {
        tempfile::tempfile_in("/var/tmp").expect("a file")
    }

    fn read(file: &File) -> Vec<u8> {
        let mut content = vec![0; file.metadata().expect("there").len() as usize];
        file.read_exact_at(&mut content, 0).expect("read");
        content
    }

    #[test]
    fn whole_blocks_are_written_around_the_page_cache_and_all_else_through_it() {
        // Pieces of any length, more of them than are copied at once, in calls that follow each other.
        let content: Vec<u8> = (0_u32..1_000_003).flat_map(u32::to_le_bytes).collect();
        let block = BLOCK_BYTES;
        let ends = [
            (MIN_DIRECT_BYTES - block, false),
            (2 * MIN_DIRECT_BYTES, true),
            (2 * MIN_DIRECT_BYTES + DIRECT_BYTES, true),
            (content.len() / block * block, true),
            (content.len(), false),
        ];
        let (file, writer) = (file(), BlockWriter::default());
        let mut at = 0;
        for (end, directly) in ends {
            let pieces: Vec<Bytes> = content[at..end].chunks(70_001).map(Bytes::copy_from_slice).collect();
            let before = pages_in_memory(&file);
            writer.write_at(&file, &pieces, at as u64).expect("written");
            let after = pages_in_memory(&file);
            assert_eq!(after <= before, directly, "{at} to {end}: {before} pages were in memory, {after} are");
            at = end;
        }
        // The last one, of which a part was there.
        let last = content.len() / block * block;
        let again: Vec<Bytes> = [&content[last..], &vec![9; MIN_DIRECT_BYTES + last + block - content.len()]]
            .map(Bytes::copy_from_slice)
            .into();
        let before = pages_in_memory(&file);
        writer.write_at(&file, &again, last as u64).expect("written");
        assert!(pages_in_memory(&file) < before, "the block is not in memory any more");
        let all = read(&file);
        assert!(all[..content.len()] == content && all[content.len()..].iter().all(|byte| *byte == 9));
    }

    #[test]
    fn where_nothing_can_be_written_directly_it_is_written_all_the_same() {
        let (file, writer) = (file(), BlockWriter { is_refused: true.into(), ..BlockWriter::default() });
        let pieces = vec![Bytes::from(vec![7; MIN_DIRECT_BYTES / 2]); 2];
        writer.write_at(&file, &pieces, 0).expect("written");
        assert!(pages_in_memory(&file) > 0);
        assert_eq!(read(&file), vec![7; MIN_DIRECT_BYTES]);
    }

    #[test]
    fn a_file_system_that_takes_nothing_directly_is_asked_once() {
        let (file, writer) = (file(), BlockWriter::default());
        // The kernel's answer is the same to what isn't a whole block.
        let pieces = [Bytes::from(vec![7; BLOCK_BYTES / 2 + 1])];
        assert!(!writer.write_directly(&file, &pieces, 0).expect("no error"));
        let pieces = [Bytes::from(vec![7; BLOCK_BYTES])];
        assert!(!writer.write_directly(&file, &pieces, 0).expect("no error"), "it is asked again");
        assert_eq!(file.metadata().expect("there").len(), 0);
    }

    #[test]
    fn it_is_the_same_file_also_under_another_name() {
        let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
        let (before, after) = (folder.path().join("before"), folder.path().join("after"));
        let file = File::create(&before).expect("made");
        std::fs::rename(&before, &after).expect("renamed");
        std::fs::write(&before, "of somebody else").expect("written");
        let pieces = [Bytes::from(vec![7; MIN_DIRECT_BYTES])];
        BlockWriter::default().write_at(&file, &pieces, 0).expect("written");
        assert_eq!(std::fs::read(&before).expect("there"), b"of somebody else");
        assert_eq!(std::fs::read(&after).expect("there"), pieces[0]);
    }

    #[test]
    fn more_writes_than_there_is_memory_for_at_a_time_wait_for_each_other() {
        let (files, writer) = ([(); 4 * DIRECT_WRITES].map(|()| file()), BlockWriter::default());
        std::thread::scope(|scope| {
            for (file, byte) in files.iter().zip(0..) {
                let writer = &writer;
                scope.spawn(move || {
                    let pieces = [Bytes::from(vec![byte; DIRECT_BYTES + MIN_DIRECT_BYTES])];
                    writer.write_at(file, &pieces, 0).expect("written");
                });
            }
        });
        for (file, byte) in files.iter().zip(0..) {
            assert!(read(file) == vec![byte; DIRECT_BYTES + MIN_DIRECT_BYTES], "file {byte}");
        }
    }

    #[test]
    fn that_a_write_fails_is_told() {
        let full = OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
        let pieces = [Bytes::from(vec![7; MIN_DIRECT_BYTES])];
        let error = BlockWriter::default().write_at(&full, &pieces, 0).expect_err("it is full");
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }
}
