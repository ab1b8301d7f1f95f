//! What makes a file the same file: its inode, its birth time, its first line. Not its name.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, FileType, StatxFlags, fstatvfs, statx};
use tributary_common::ids::{AgentId, StreamId, StreamIdentity};
use tributary_common::limits::IDENTITY_LINE_BYTES;

use crate::copies::Compressor;

/// A file of this machine, as long as it exists: inode numbers are used again after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileKey {
    /// The device number of its file system, which may change when the machine starts again.
    pub device: u64,
    /// Its inode number.
    pub inode: u64,
}

/// What the system says of an open file.
#[derive(Debug, Clone, Copy)]
pub struct FileFacts {
    /// Which file it is.
    pub key: FileKey,
    /// See [`StreamIdentity::birth_or_filesystem`].
    pub birth_or_filesystem: i128,
    /// Its length in bytes.
    pub size: u64,
    /// Whether no directory has it any more.
    pub deleted: bool,
    /// Whether it is a regular file.
    pub regular: bool,
}

impl FileFacts {
    /// Asks about an open file.
    ///
    /// # Errors
    /// When the system doesn't say.
    pub fn of(file: &File) -> io::Result<Self> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let facts = statx(file, "", AtFlags::EMPTY_PATH, wanted)?;
        let birth_or_filesystem = if StatxFlags::from_bits_retain(facts.stx_mask).contains(StatxFlags::BTIME) {
            i128::from(facts.stx_btime.tv_sec) * 1_000_000_000 + i128::from(facts.stx_btime.tv_nsec)
        } else {
            i128::from(fstatvfs(file)?.f_fsid)
        };
        Ok(Self {
            key: FileKey {
                device: rustix::fs::makedev(facts.stx_dev_major, facts.stx_dev_minor),
                inode: facts.stx_ino,
            },
            birth_or_filesystem,
            size: facts.stx_size,
            deleted: facts.stx_nlink == 0,
            regular: FileType::from_raw_mode(facts.stx_mode.into()).is_file(),
        })
    }
}

/// The beginning of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Head {
    /// Its first line without the newline, or as much of it as counts.
    Line(Vec<u8>),
    /// The first line has no end yet; this is what there is of it.
    Unfinished(Vec<u8>),
    /// It is compressed: what it holds are not lines. By this program, as it looks, which may be one that can be undone.
    Compressed(&'static str, Option<Compressor>),
    /// It is text whose lines don't end with the byte of a newline: in this encoding, by its byte order mark.
    Wide(&'static str),
}

/// How texts of wide characters begin, the longer marks first.
const WIDE: [(&[u8], &str); 4] = [
    (&[0xff, 0xfe, 0, 0], "UTF-32"),
    (&[0, 0, 0xfe, 0xff], "UTF-32"),
    (&[0xff, 0xfe], "UTF-16"),
    (&[0xfe, 0xff], "UTF-16"),
];

/// How files of common compressors begin.
const COMPRESSED: [(&[u8], &str, Option<Compressor>); 5] = [
    (&[0x1f, 0x8b, 8], "gzip", Some(Compressor::Gzip)),
    (&[0x28, 0xb5, 0x2f, 0xfd], "zstd", Some(Compressor::Zstd)),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz", None),
    (b"BZh", "bzip2", None),
    (&[0x04, 0x22, 0x4d, 0x18], "lz4", None),
];

impl Head {
    /// Reads it.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn of(file: &File) -> io::Result<Self> {
        let mut bytes = vec![0; IDENTITY_LINE_BYTES];
        let len = read_up_to(file, &mut bytes, 0)?;
        bytes.truncate(len);
        if let Some((_, name, compressor)) = COMPRESSED.iter().find(|(magic, ..)| bytes.starts_with(magic)) {
            return Ok(Self::Compressed(name, *compressor));
        }
        if let Some((_, encoding)) = WIDE.iter().find(|(mark, _)| bytes.starts_with(mark)) {
            return Ok(Self::Wide(encoding));
        }
        match memchr::memchr(b'\n', &bytes) {
            Some(newline) => {
                bytes.truncate(newline);
                Ok(Self::Line(bytes))
            }
            None if bytes.len() == IDENTITY_LINE_BYTES => Ok(Self::Line(bytes)),
            None => Ok(Self::Unfinished(bytes)),
        }
    }
}

/// What can be read from anywhere in it: a file, or a model of one.
pub trait ReadAt {
    /// Reads up to `buffer.len()` bytes from `offset` on, and returns how many; 0 only at the end.
    ///
    /// # Errors
    /// As the operating system has them.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }
}

/// Reads at `offset` until `buffer` is full or the file ends; returns how many bytes it got.
///
/// # Errors
/// When the file can't be read.
pub fn read_up_to(file: &(impl ReadAt + ?Sized), buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

/// The file in which a stream began: what of it takes part in the stream's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Its inode number.
    pub inode: u64,
    /// See [`StreamIdentity::birth_or_filesystem`].
    pub birth_or_filesystem: i128,
}

impl FileFacts {
    /// The file as the origin of a stream.
    #[must_use]
    pub fn origin(&self) -> Origin {
        Origin { inode: self.key.inode, birth_or_filesystem: self.birth_or_filesystem }
    }
}

/// The id of an incarnation of a file.
#[must_use]
pub fn stream_id(agent: &AgentId, origin: Origin, first_line: &[u8], incarnation: u32) -> StreamId {
    let Origin { inode, birth_or_filesystem } = origin;
    StreamId::derive(agent, &StreamIdentity { inode, birth_or_filesystem, first_line, incarnation })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    fn file(bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf, File) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        std::fs::write(&path, bytes).expect("written");
        let file = File::open(&path).expect("opened");
        (dir, path, file)
    }

    #[test]
    fn a_file_is_the_same_after_a_rename_and_deleted_when_no_directory_has_it() {
        let (dir, path, file) = file(b"line\n");
        let before = FileFacts::of(&file).expect("facts");
        assert_eq!(before.key.inode, path.metadata().expect("metadata").ino());
        assert_eq!(before.key.device, path.metadata().expect("metadata").dev());
        assert!(before.regular && !before.deleted);
        let other = dir.path().join("log.1");
        std::fs::rename(&path, &other).expect("renamed");
        let after = FileFacts::of(&file).expect("facts");
        assert_eq!((after.key, after.birth_or_filesystem), (before.key, before.birth_or_filesystem));
        std::fs::remove_file(other).expect("removed");
        assert!(FileFacts::of(&file).expect("facts").deleted);
    }

    #[test]
    fn the_first_line_counts_when_it_is_whole() {
        assert_eq!(Head::of(&file(b"").2).expect("read"), Head::Unfinished(Vec::new()));
        assert_eq!(Head::of(&file(b"half").2).expect("read"), Head::Unfinished(b"half".to_vec()));
        assert_eq!(Head::of(&file(b"one\ntwo\n").2).expect("read"), Head::Line(b"one".to_vec()));
        let long = vec![b'x'; 5000];
        assert_eq!(Head::of(&file(&long).2).expect("read"), Head::Line(vec![b'x'; IDENTITY_LINE_BYTES]));
    }

    #[test]
    fn wide_characters_are_told_by_their_mark() {
        assert_eq!(Head::of(&file(b"\xff\xfea\0\n\0").2).expect("read"), Head::Wide("UTF-16"));
        assert_eq!(Head::of(&file(b"\xfe\xff\0a\0\n").2).expect("read"), Head::Wide("UTF-16"));
        assert_eq!(Head::of(&file(b"\xff\xfe\0\0a\0\0\0").2).expect("read"), Head::Wide("UTF-32"));
        assert_eq!(Head::of(&file(b"\xef\xbb\xbfa\n").2).expect("read"), Head::Line(b"\xef\xbb\xbfa".to_vec()));
    }

    #[test]
    fn a_compressed_file_is_no_log() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(b"line\n").expect("written");
        let bytes = encoder.finish().expect("finished");
        assert_eq!(Head::of(&file(&bytes).2).expect("read"), Head::Compressed("gzip", Some(Compressor::Gzip)));
    }
}
