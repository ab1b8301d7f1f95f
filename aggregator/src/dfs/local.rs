//! `file://`: a directory of this machine.
//!
//! A local file system can't fence: whoever has a file open can go on writing to it, whatever its directory is called
//! now. Exclusion therefore rests on a lock (`flock`) that the owner of a lane holds for the life of its process and
//! that the kernel gives back when the process dies, also when it is only stopped. With it, a file that was left open was
//! left by a dead process: it is closed.
//!
//! Behind the lock stands a second line, for a lock that somebody removed by hand: a writer answers a sync or close only
//! if, after its bytes were on disk, its file was still under the name under which it was made. So what was answered as
//! durable was in the file before its directory was renamed, and the new owner reads it; what a writer adds afterwards it
//! is never told to be durable.
//!
//! After a failed `fsync` the kernel may have dropped the pages and marked them clean: a second `fsync` would answer OK.
//! So a writer with an error is of no use any more, and what it left is read back from disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use rustix::fs::{FlockOperation, RenameFlags};
use tokio::sync::RwLock;

use super::{CreateOptions, Dfs, DfsError, DfsPath, DfsWriter, DirEntry, FileStatus, Guard, Recovered};
use crate::disk::{BLOCK_BYTES, BlockWriter, sync_and_let_go};

/// A directory of this machine.
#[derive(Debug, Clone)]
pub struct LocalDfs {
    base: Arc<PathBuf>,
    /// Held by every blocking write until it is over. It goes on when whoever waited for it is gone, so a recovery waits
    /// for it: it must not add to a file whose end was read.
    writing: Arc<RwLock<()>>,
    blocks: Arc<BlockWriter>,
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
        Ok(Self { base: Arc::new(base.canonicalize()?), writing: Arc::default(), blocks: Arc::default() })
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
            Ok(result) => result.map_err(|error| match call {
                "create" | "mkdir" => missing(call, path, &self.path(path), &error),
                _ => classify(call, path, &error),
            }),
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
        ErrorKind::PermissionDenied
        | ErrorKind::NotADirectory
        | ErrorKind::IsADirectory
        | ErrorKind::InvalidInput
        | ErrorKind::InvalidFilename
        | ErrorKind::CrossesDevices
        | ErrorKind::Unsupported => DfsError::Refused { call, path, reason },
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

/// Whether `path` leads to the file that is open as `file`.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let opened = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (opened.dev(), opened.ino())),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What is missing when a call on `path` found nothing: its directory, where that is not there.
fn missing(call: &'static str, path: &DfsPath, full: &Path, error: &io::Error) -> DfsError {
    if error.kind() == ErrorKind::NotFound
        && let (Some(dir), Some(parent)) = (full.parent(), path.parent())
        && matches!(dir.try_exists(), Ok(false))
    {
        return DfsError::NotFound { path: parent };
    }
    classify(call, path, error)
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
                if !is_at(&file, Path::new(&name))? {
                    return Err(io::Error::other("somebody is removing the lock file; leave it alone"));
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
            begin: 0,
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
            let metadata = file.metadata()?;
            if metadata.is_dir() {
                return Err(io::Error::from(ErrorKind::IsADirectory));
            }
            // Not more room than there are bytes, however much is asked for.
            let there = metadata.len().saturating_sub(offset);
            if there == 0 {
                return Ok(Bytes::new());
            }
            file.seek(SeekFrom::Start(offset))?;
            let mut bytes = Vec::with_capacity(len.min(usize::try_from(there).unwrap_or(usize::MAX)));
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
            Err(DfsError::NotFound { .. }) => {
                let parent = to.parent().unwrap_or_default();
                let path = if self.stat(&parent).await?.is_none() { parent } else { from.clone() };
                Err(DfsError::NotFound { path })
            }
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
        let _alone = self.writing.write().await;
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
    /// Taken while a blocking call has it; stays away when that call fails or is cancelled.
    file: Option<File>,
    /// The file's bytes from `begin` on.
    buffer: Vec<Bytes>,
    /// A whole block begins there, and all before it was written. What comes behind may be in the file, too: the beginning of a block
    /// that was synced, and is written again with the rest of it.
    begin: u64,
    len: u64,
    /// Whether the file's name is on disk.
    named: bool,
}

/// Bytes kept before they are handed to the kernel, so that the calls are few.
const BUFFER_BYTES: u64 = 1 << 20;

impl LocalWriter {
    async fn flush(&mut self, call: &'static str, sync: bool) -> Result<(), DfsError> {
        let refused = |reason: &str| DfsError::Refused { call, path: self.path.clone(), reason: reason.into() };
        let Some(file) = self.file.take() else { return Err(refused("an earlier call on the file failed")) };
        let writing = Arc::clone(&self.dfs.writing).read_owned().await;
        let mut whole = std::mem::take(&mut self.buffer);
        let (begin, len) = (self.begin, self.len);
        let block = len - len % BLOCK_BYTES as u64;
        let rest = split_off(&mut whole, (block - begin) as usize);
        self.buffer.push(rest.clone());
        self.begin = block;
        let (full, named, blocks) = (self.full.clone(), self.named, Arc::clone(&self.dfs.blocks));
        let done = self
            .dfs
            .run(call, &self.path, move |_| {
                let _writing = writing;
                blocks.write_at(&file, &whole, begin)?;
                if sync {
                    blocks.write_at(&file, &[rest], block)?;
                    sync_and_let_go(&file)?;
                    if !named && is_at(&file, &full)? {
                        sync_parent(&full)?;
                    }
                    if !is_at(&file, &full)? || file.metadata()?.len() != len {
                        return Ok(None);
                    }
                }
                Ok(Some(file))
            })
            .await;
        match done {
            Ok(Some(file)) => {
                self.named |= sync;
                self.file = Some(file);
                Ok(())
            }
            Ok(None) => {
                Err(refused("the file was moved or changed by somebody else: this process does not own it any more"))
            }
            Err(error) => Err(DfsError::UnknownOutcome { call, path: self.path.clone(), reason: error.to_string() }),
        }
    }
}

/// Takes what is behind the first `len` bytes off, as a copy: it is short, and may stay for long, unlike the memory that it lay in.
fn split_off(pieces: &mut [Bytes], len: usize) -> Bytes {
    let mut behind = BytesMut::new();
    let mut at = 0;
    for piece in pieces {
        let kept = piece.len().min(len - at);
        behind.extend_from_slice(&piece[kept..]);
        piece.truncate(kept);
        at += kept;
    }
    behind.freeze()
}

#[async_trait]
impl DfsWriter for LocalWriter {
    async fn write(&mut self, bytes: Bytes) -> Result<(), DfsError> {
        self.len += bytes.len() as u64;
        self.buffer.push(bytes);
        if self.len - self.begin >= BUFFER_BYTES { self.flush("write", false).await } else { Ok(()) }
    }

    async fn sync(&mut self) -> Result<(), DfsError> {
        self.flush("sync", true).await
    }

    async fn close(mut self: Box<Self>) -> Result<u64, DfsError> {
        self.flush("close", true).await?;
        Ok(self.len)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::dfs::conformance::{self, Place};

    struct Folder(PathBuf);

    #[async_trait]
    impl Place for Folder {
        async fn process(&self) -> Arc<dyn Dfs> {
            Arc::new(LocalDfs::open(&self.0).expect("the folder exists"))
        }

        fn recovery_fences(&self) -> bool {
            false
        }
    }

    fn folder() -> (tempfile::TempDir, LocalDfs) {
        let folder = tempfile::tempdir().expect("a folder");
        let dfs = LocalDfs::open(folder.path()).expect("the folder exists");
        (folder, dfs)
    }

    fn options() -> CreateOptions {
        CreateOptions { block_size: 1 << 20, replication: None, sync_timeout: std::time::Duration::from_secs(60) }
    }

    #[tokio::test]
    async fn a_local_directory_keeps_what_the_trait_promises() {
        let (folder, _) = folder();
        conformance::run(&Folder(folder.path().to_owned())).await;
    }

    #[tokio::test]
    async fn a_lane_has_one_owner_and_the_next_one_hears_who_it_is() {
        let (_folder, dfs) = folder();
        let lane = DfsPath::base().join("lane");
        let guard = dfs.lock(&lane).await.expect("nobody has it");
        let refused = dfs.lock(&lane).await.err().expect("it is taken");
        assert!(matches!(&refused, DfsError::Unavailable { .. }), "{refused}");
        assert!(refused.to_string().contains(&format!("pid {}", std::process::id())), "{refused}");
        drop(guard);
        dfs.lock(&lane).await.expect("it was given back");
    }

    #[tokio::test]
    async fn many_small_writes_and_large_ones_keep_their_order() {
        let (_folder, dfs) = folder();
        let path = DfsPath::base().join("f");
        let mut writer = dfs.create(&path, options()).await.expect("a new file");
        let mut wanted = Vec::new();
        for i in 0..3000_u32 {
            let piece = vec![u8::try_from(i % 251).expect("small"); if i % 100 == 0 { 70_000 } else { 37 }];
            wanted.extend_from_slice(&piece);
            writer.write(piece.into()).await.expect("written");
            if i % 350 == 0 {
                writer.sync().await.expect("synced");
                assert_eq!(
                    dfs.read(&path, 0, usize::MAX).await.expect("read"),
                    wanted,
                    "all of it is there, and no more"
                );
            }
        }
        assert_eq!(writer.close().await.expect("closed"), wanted.len() as u64);
        assert_eq!(dfs.read(&path, 0, usize::MAX).await.expect("read"), wanted);
    }

    #[tokio::test]
    async fn what_is_kept_of_a_block_until_it_is_whole_is_little_and_does_not_hold_more() {
        let (_folder, dfs) = folder();
        let large = Bytes::from(vec![7; BUFFER_BYTES as usize + 100]);
        let mut pieces = vec![Bytes::from_static(b"first"), large.clone()];
        let rest = split_off(&mut pieces, BUFFER_BYTES as usize);
        assert_eq!((pieces.concat().len(), rest.len()), (BUFFER_BYTES as usize, 105));
        drop(pieces);
        assert!(large.is_unique(), "the rest is a copy");
        let mut writer = dfs.create(&DfsPath::base().join("f"), options()).await.expect("a new file");
        writer.write(large).await.expect("written");
        assert_eq!(writer.close().await.expect("closed"), BUFFER_BYTES + 100);
    }

    #[tokio::test]
    async fn a_recovery_waits_for_a_write_that_nobody_waits_for_any_more() {
        const QUARTER: usize = BUFFER_BYTES as usize / 4;
        let (_folder, dfs) = folder();
        let mut left_alone = 0;
        while left_alone < 20 {
            let path = DfsPath::base().join("f");
            let mut writer = dfs.create(&path, options()).await.expect("a new file");
            for _ in 0..3 {
                writer.write(vec![7; QUARTER].into()).await.expect("kept");
            }
            // Begun, and then left alone, unless it was done before anybody could leave.
            let begun = writer.write(vec![7; 32 * QUARTER].into());
            left_alone += usize::from(begun.now_or_never().is_none());
            drop(writer);
            let Recovered::Closed { len } = dfs.recover(&path).await.expect("recovered") else {
                panic!("a local file is closed");
            };
            assert_eq!(len, 35 * QUARTER as u64);
            dfs.delete(&path).await.expect("deleted");
        }
    }

    #[tokio::test]
    async fn a_writer_whose_file_was_replaced_is_not_told_that_it_is_safe() {
        let (folder, dfs) = folder();
        let path = DfsPath::base().join("f");
        let mut writer = dfs.create(&path, options()).await.expect("a new file");
        writer.write("x".into()).await.expect("written");
        fs::remove_file(folder.path().join("f")).expect("removed");
        fs::write(folder.path().join("f"), "y").expect("another file under its name");
        assert!(matches!(writer.sync().await, Err(DfsError::Refused { .. })));
        assert!(matches!(writer.sync().await, Err(DfsError::Refused { .. })), "and it stays so");
    }
}
