//! The spool's way to the disk: a folder of files, at the level of system calls, so that a hostile one can stand in.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::disk::{BlockWriter, sync_and_let_go};

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
    writer: Arc<BlockWriter>,
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
        Ok(Self { path: path.to_owned(), handle: File::open(path)?, writer: Arc::default() })
    }

    fn file(&self, name: &str, options: &mut OpenOptions) -> io::Result<Arc<dyn FolderFile>> {
        let file = options.read(true).write(true).open(self.path.join(name))?;
        Ok(Arc::new(DiskFile { file, writer: Arc::clone(&self.writer) }))
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
    writer: Arc<BlockWriter>,
}

impl FolderFile for DiskFile {
    fn write_at(&self, pieces: &[Bytes], offset: u64) -> io::Result<()> {
        self.writer.write_at(&self.file, pieces, offset)
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
