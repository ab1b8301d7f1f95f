//! The spool's way to the disk: a folder of files, at the level of system calls, so that a hostile one can stand in.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::disk::{BLOCK_BYTES, DirectWriter, sync_and_let_go};

/// One folder, without subfolders.
pub trait Folder: Send + Sync + 'static {
    /// Names and lengths in bytes of its files, in no order.
    ///
    /// # Errors
    /// As the operating system has them, for this and all other calls.
    fn list(&self) -> io::Result<Vec<(String, u64)>>;
    /// Makes a new, empty file. Its name is safe only after [`Folder::sync`].
    fn create(&self, name: &str) -> io::Result<Arc<dyn FolderFile>>;
    /// Opens a file that exists, for reading and truncating.
    fn open(&self, name: &str) -> io::Result<Arc<dyn FolderFile>>;
    /// Removes a file.
    fn delete(&self, name: &str) -> io::Result<()>;
    /// Makes names durable.
    fn sync(&self) -> io::Result<()>;
    /// Where it is, for messages.
    fn describe(&self) -> String;
}

/// One open file of a [`Folder`].
pub trait FolderFile: Send + Sync {
    /// Writes all pieces, one after the other, from `offset` on. After an error any part of them may be there. Whole blocks of
    /// 4 KiB cost the least.
    fn write_at(&self, pieces: &[Bytes], offset: u64) -> io::Result<()>;
    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Makes what was written durable.
    fn sync(&self) -> io::Result<()>;
    /// Cuts the file to `len` bytes.
    fn truncate(&self, len: u64) -> io::Result<()>;
    /// Its length in bytes.
    fn size(&self) -> io::Result<u64>;
}

/// A folder of the file system.
#[derive(Debug)]
pub struct DiskFolder {
    path: PathBuf,
    handle: File,
    direct: Arc<Mutex<DirectWriter>>,
}

impl DiskFolder {
    /// Opens the folder, and makes it first where it is missing.
    ///
    /// # Errors
    /// When it can't be made or opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        if let Some(parent) = path.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(Self { path: path.to_owned(), handle: File::open(path)?, direct: Arc::default() })
    }

    fn file(&self, name: &str, options: &mut OpenOptions) -> io::Result<Arc<dyn FolderFile>> {
        let path = self.path.join(name);
        let file = options.read(true).write(true).open(&path)?;
        Ok(Arc::new(DiskFile { file, path, direct: Arc::clone(&self.direct) }))
    }
}

impl Folder for DiskFolder {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if let (true, Ok(name)) = (meta.is_file(), entry.file_name().into_string()) {
                files.push((name, meta.len()));
            }
        }
        Ok(files)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn FolderFile>> {
        self.file(name, OpenOptions::new().create_new(true))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn FolderFile>> {
        self.file(name, &mut OpenOptions::new())
    }

    fn delete(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    fn describe(&self) -> String {
        self.path.display().to_string()
    }
}

struct DiskFile {
    file: File,
    path: PathBuf,
    direct: Arc<Mutex<DirectWriter>>,
}

impl FolderFile for DiskFile {
    fn write_at(&self, pieces: &[Bytes], mut offset: u64) -> io::Result<()> {
        let end = offset + pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
        if [offset, end].iter().all(|at| at.is_multiple_of(BLOCK_BYTES as u64))
            && self.direct.lock().expect("nothing panics while the lock is held").write(&self.path, pieces, offset)?
        {
            return Ok(());
        }
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut rest = &mut slices[..];
        // Drops empty slices at the front: for them alone, writing 0 bytes would be no progress.
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            // IOV_MAX is 1,024 on Linux.
            let now = rest.len().min(1024);
            match rustix::io::pwritev(&self.file, &rest[..now], offset) {
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

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut have = 0;
        while have < buffer.len() {
            match self.file.read_at(&mut buffer[have..], offset + have as u64) {
                Ok(0) => break,
                Ok(read) => have += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(have)
    }

    fn sync(&self) -> io::Result<()> {
        sync_and_let_go(&self.file)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}
