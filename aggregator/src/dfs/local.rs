//! `file://`: a directory of this machine.
//!
//! A local file system can't fence: whoever has a file open can go on writing to it, whatever its directory is called
//! now. Exclusion therefore rests on a lock (`flock`) that the owner of a lane holds for the life of its process and
//! that the kernel gives back when the process dies. With it, a file that was left open was left by a dead process:
//! it is closed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::{FlockOperation, RenameFlags};

use super::{CreateOptions, Dfs, DfsError, DfsPath, DfsWriter, DirEntry, FileStatus, Guard, Recovered};

/// A directory of this machine.
#[derive(Debug, Clone)]
pub struct LocalDfs {
    base: Arc<PathBuf>,
}

struct Lock {
    /// The kernel holds the lock as long as this is open.
    _file: File,
}

impl Guard for Lock {}

impl LocalDfs {
    /// Works below `base`, which is made if it does not exist.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn open(base: &Path) -> io::Result<Self> {
        fs::create_dir_all(base)?;
        Ok(Self { base: Arc::new(base.canonicalize()?) })
    }

    fn path(&self, path: &DfsPath) -> PathBuf {
        if path.as_str().is_empty() { (*self.base).clone() } else { self.base.join(path.as_str()) }
    }

    /// Runs `work` where it may block.
    async fn run<T: Send + 'static>(
        &self,
        call: &'static str,
        path: &DfsPath,
        work: impl FnOnce(PathBuf) -> io::Result<T> + Send + 'static,
    ) -> Result<T, DfsError> {
        let full = self.path(path);
        match tokio::task::spawn_blocking(move || work(full)).await {
            Ok(result) => result.map_err(|error| classify(call, path, &error)),
            Err(panic) => {
                Err(DfsError::UnknownOutcome { call, path: path.clone(), reason: format!("the call died: {panic}") })
            }
        }
    }
}

fn classify(call: &'static str, path: &DfsPath, error: &io::Error) -> DfsError {
    let (path, reason) = (path.clone(), error.to_string());
    match error.kind() {
        ErrorKind::NotFound => DfsError::NotFound { path },
        ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty => DfsError::Exists { path },
        ErrorKind::PermissionDenied | ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::InvalidInput => {
            DfsError::Refused { call, path, reason }
        }
        // A full disk, a lack of descriptors, a failing device: an operator may mend it while this waits.
        _ => DfsError::Unavailable { call, path, reason },
    }
}

fn status(metadata: &fs::Metadata) -> io::Result<FileStatus> {
    let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(FileStatus {
        len: if metadata.is_dir() { 0 } else { metadata.len() },
        is_dir: metadata.is_dir(),
        modified_ms: i64::try_from(modified.as_millis()).unwrap_or(i64::MAX),
    })
}

/// A new or moved name is durable only when its directory is.
fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[async_trait]
impl Dfs for LocalDfs {
    fn describe(&self) -> String {
        format!("file://{}", self.base.display())
    }

    async fn lock(&self, dir: &DfsPath) -> Result<Box<dyn Guard>, DfsError> {
        let file = self
            .run("lock", dir, |full| {
                let mut name = full.into_os_string();
                name.push(".lock");
                let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&name)?;
                if let Err(error) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    let mut holder = String::new();
                    file.read_to_string(&mut holder)?;
                    return Err(io::Error::other(format!(
                        "another process has it (pid {}): {error}; stop that one first, or give this one another sink",
                        holder.trim()
                    )));
                }
                file.set_len(0)?;
                file.seek(SeekFrom::Start(0))?;
                writeln!(file, "{}", std::process::id())?;
                Ok(file)
            })
            .await?;
        Ok(Box::new(Lock { _file: file }))
    }

    async fn create(&self, path: &DfsPath, _options: CreateOptions) -> Result<Box<dyn DfsWriter>, DfsError> {
        let file = self
            .run("create", path, |full| OpenOptions::new().write(true).create_new(true).mode(0o644).open(full))
            .await?;
        let full = self.path(path);
        Ok(Box::new(LocalWriter {
            dfs: self.clone(),
            path: path.clone(),
            full,
            file: Some(file),
            buffer: Vec::new(),
            len: 0,
            named: false,
        }))
    }

    async fn mkdir(&self, path: &DfsPath) -> Result<(), DfsError> {
        self.run("mkdir", path, |full| {
            fs::create_dir(&full)?;
            sync_parent(&full)
        })
        .await
    }

    async fn mkdir_all(&self, path: &DfsPath) -> Result<(), DfsError> {
        let base = Arc::clone(&self.base);
        self.run("mkdir", path, move |full| {
            fs::create_dir_all(&full)?;
            full.ancestors().take_while(|dir| *dir != base.as_path()).try_for_each(sync_parent)
        })
        .await
    }

    async fn stat(&self, path: &DfsPath) -> Result<Option<FileStatus>, DfsError> {
        self.run("stat", path, |full| match fs::symlink_metadata(full) {
            Ok(metadata) => status(&metadata).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    async fn list(&self, dir: &DfsPath) -> Result<Option<Vec<DirEntry>>, DfsError> {
        self.run("list", dir, |full| {
            let reader = match fs::read_dir(full) {
                Ok(reader) => reader,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            let mut entries = Vec::new();
            for entry in reader {
                let entry = entry?;
                // A name that is not text is not one of ours.
                let Ok(name) = entry.file_name().into_string() else { continue };
                match entry.metadata() {
                    Ok(metadata) => entries.push(DirEntry { name, status: status(&metadata)? }),
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            entries.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(Some(entries))
        })
        .await
    }

    async fn read(&self, path: &DfsPath, offset: u64, len: usize) -> Result<Bytes, DfsError> {
        self.run("read", path, move |full| {
            let mut file = File::open(full)?;
            file.seek(SeekFrom::Start(offset))?;
            // Not more room than there are bytes, however much is asked for.
            let there = usize::try_from(file.metadata()?.len().saturating_sub(offset)).unwrap_or(usize::MAX);
            let mut bytes = Vec::with_capacity(len.min(there));
            file.take(len as u64).read_to_end(&mut bytes)?;
            Ok(bytes.into())
        })
        .await
    }

    async fn rename(&self, from: &DfsPath, to: &DfsPath) -> Result<(), DfsError> {
        let target = self.path(to);
        let moved = self
            .run("rename", from, move |full| {
                rustix::fs::renameat_with(rustix::fs::CWD, &full, rustix::fs::CWD, &target, RenameFlags::NOREPLACE)?;
                // Both directories changed. A failure to sync them must not look like a rename that wasn't done.
                Ok(sync_parent(&full).and_then(|()| sync_parent(&target)))
            })
            .await;
        match moved {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                let reason = format!("renamed, but the directory could not be synced: {error}");
                Err(DfsError::UnknownOutcome { call: "rename", path: from.clone(), reason })
            }
            Err(DfsError::Exists { .. }) => Err(DfsError::Exists { path: to.clone() }),
            Err(error) => Err(error),
        }
    }

    async fn delete(&self, path: &DfsPath) -> Result<(), DfsError> {
        self.run("delete", path, |full| {
            let removed = match fs::symlink_metadata(&full) {
                Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&full),
                Ok(_) => fs::remove_file(&full),
                Err(error) => Err(error),
            };
            match removed {
                Ok(()) => sync_parent(&full),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
            }
        })
        .await
    }

    async fn recover(&self, path: &DfsPath) -> Result<Recovered, DfsError> {
        // The lane's lock says that whoever wrote it is dead. What it wrote is in the page cache at least; the sync puts
        // it on disk, so that what is found can be called durable.
        self.run("recover", path, |full| {
            let file = OpenOptions::new().write(true).open(&full)?;
            file.sync_all()?;
            sync_parent(&full)?;
            Ok(Recovered::Closed { len: file.metadata()?.len() })
        })
        .await
    }

    async fn set_replication(&self, _path: &DfsPath, _replication: u16) -> Result<(), DfsError> {
        Ok(())
    }
}

struct LocalWriter {
    dfs: LocalDfs,
    path: DfsPath,
    full: PathBuf,
    /// Taken while a blocking call has it; stays away when that call fails, because after a failed sync the page cache
    /// can't be trusted.
    file: Option<File>,
    buffer: Vec<Bytes>,
    len: u64,
    named: bool,
}

impl LocalWriter {
    async fn flush(&mut self, sync: bool) -> Result<(), DfsError> {
        let Some(mut file) = self.file.take() else {
            return Err(DfsError::Refused {
                call: "write",
                path: self.path.clone(),
                reason: "an earlier call on the file failed".into(),
            });
        };
        let buffer = std::mem::take(&mut self.buffer);
        let (full, named) = (self.full.clone(), self.named);
        let file = self
            .dfs
            .run("write", &self.path, move |_| {
                for bytes in &buffer {
                    file.write_all(bytes)?;
                }
                if sync {
                    file.sync_data()?;
                    if !named {
                        sync_parent(&full)?;
                    }
                }
                Ok(file)
            })
            .await?;
        self.named |= sync;
        self.file = Some(file);
        Ok(())
    }
}

/// Bytes kept before they are handed to the kernel: enough to make the calls few.
const BUFFER_BYTES: usize = 1 << 20;

#[async_trait]
impl DfsWriter for LocalWriter {
    async fn write(&mut self, bytes: Bytes) -> Result<(), DfsError> {
        self.len += bytes.len() as u64;
        self.buffer.push(bytes);
        if self.buffer.iter().map(Bytes::len).sum::<usize>() >= BUFFER_BYTES { self.flush(false).await } else { Ok(()) }
    }

    async fn sync(&mut self) -> Result<(), DfsError> {
        self.flush(true).await
    }

    async fn close(mut self: Box<Self>) -> Result<u64, DfsError> {
        self.flush(true).await?;
        Ok(self.len)
    }
}
