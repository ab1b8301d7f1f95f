//! Files that are written once and read late, if at all.

use std::fs::File;
use std::io;

use rustix::fs::{Advice, fadvise};

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
}
