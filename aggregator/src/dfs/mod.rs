//! The file system on which roots keep everything, behind one small trait at the level of its calls.
//!
//! What the root's correctness rests on, and what every driver must show (the conformance tests run the same cases
//! against each):
//!
//! - `create` is exclusive and never makes a directory;
//! - `rename` never replaces anything, and moves a whole directory in one step;
//! - what `sync` has answered is there after any crash, and `recover` closes a file that another process left open, so
//!   that the other can add nothing any more;
//! - a directory that was renamed away fences everybody who knew it under its old name.
//!
//! An error whose outcome is not known is a variant of its own. Drivers look before they report it: only what a look
//! can't decide is left to the caller.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

pub mod local;

/// A path below the base of a [`Dfs`]: components joined by `/`, none of them empty, `.` or `..`; empty for the base itself.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DfsPath(String);

impl DfsPath {
    /// The base.
    #[must_use]
    pub fn base() -> Self {
        Self::default()
    }

    /// The path of `name` in this directory. `name` may consist of several components.
    ///
    /// # Panics
    /// When a component is empty, `.` or `..`: names are made by this program from checked parts, and one that could
    /// leave the base must never reach the sink.
    #[must_use]
    pub fn join(&self, name: impl AsRef<str>) -> Self {
        let name = name.as_ref();
        let fine = name.split('/').all(|part| !matches!(part, "" | "." | "..") && !part.contains('\0'));
        assert!(fine, "{name:?} is not a path below a directory");
        if self.0.is_empty() { Self(name.to_owned()) } else { Self(format!("{}/{name}", self.0)) }
    }

    /// The directory that holds it; none for the base.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        if self.0.is_empty() {
            return None;
        }
        Some(Self(self.0.rsplit_once('/').map_or_else(String::new, |(parent, _)| parent.to_owned())))
    }

    /// The last component; empty for the base.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.rsplit_once('/').map_or(&self.0, |(_, name)| name)
    }

    /// The components joined by `/`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DfsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "." } else { &self.0 })
    }
}

impl fmt::Debug for DfsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// How a file is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// The block size in bytes, where the file system has one.
    pub block_size: u64,
    /// How many copies; none for the file system's default.
    pub replication: Option<u16>,
    /// How long a `sync` may take before the writer is given up.
    pub sync_timeout: Duration,
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileStatus {
    /// Length in bytes as far as readers see it; 0 for a directory.
    pub len: u64,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// When it was last changed, by the file system's clock, in milliseconds since 1970.
    pub modified_ms: i64,
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The last component of its path.
    pub name: String,
    /// What it is.
    pub status: FileStatus,
}

/// A call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DfsError {
    /// Nothing is there.
    #[error("{path}: nothing is there")]
    NotFound {
        /// Where.
        path: DfsPath,
    },
    /// Something is there already (or, for a creation, somebody still writes it).
    #[error("{path}: something is there already")]
    Exists {
        /// Where.
        path: DfsPath,
    },
    /// It can't be done now: no connection, a NameNode in safe mode or standby, a full disk or quota, a deadline that passed
    /// for a call that changes nothing. Nothing was changed; try again later.
    #[error("{call} {path}: {reason}")]
    Unavailable {
        /// The call.
        call: &'static str,
        /// On what.
        path: DfsPath,
        /// The file system's own words.
        reason: String,
    },
    /// It may have been done or not, or may still be. Look before deciding.
    #[error("{call} {path}: the outcome is not known: {reason}")]
    UnknownOutcome {
        /// The call.
        call: &'static str,
        /// On what.
        path: DfsPath,
        /// The file system's own words.
        reason: String,
    },
    /// It was refused, and will be refused again: permissions, a file where a directory should be.
    #[error("{call} {path}: {reason}")]
    Refused {
        /// The call.
        call: &'static str,
        /// On what.
        path: DfsPath,
        /// The file system's own words.
        reason: String,
    },
}

impl DfsError {
    /// Whether trying again later can help without anybody doing something about it.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::UnknownOutcome { .. })
    }
}

/// What one attempt at recovery found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovered {
    /// The file is closed, whoever had it open can't add to it, and this is its length in bytes.
    Closed {
        /// Bytes.
        len: u64,
    },
    /// The recovery was started or is under way. Ask again after a pause: asking faster than about once a second starts it
    /// anew each time on HDFS, and it never ends.
    StillOpen,
}

/// Held as long as this process owns something; dropping it gives it up.
pub trait Guard: Send + Sync {}

/// A file being written by this process. After any error it is of no use: drop it, and look at what is there.
#[async_trait]
pub trait DfsWriter: Send {
    /// Adds bytes. They may be kept in memory until the next sync.
    ///
    /// # Errors
    /// Whatever went wrong; the file's end is then unknown.
    async fn write(&mut self, bytes: Bytes) -> Result<(), DfsError>;

    /// Makes all that was written durable: on disk, on every copy.
    ///
    /// # Errors
    /// Whatever went wrong; what was written since the last sync may or may not be there.
    async fn sync(&mut self) -> Result<(), DfsError>;

    /// Syncs and closes; returns the length in bytes.
    ///
    /// # Errors
    /// Whatever went wrong; the file may be open or closed, and what was written since the last sync may or may not be
    /// there.
    async fn close(self: Box<Self>) -> Result<u64, DfsError>;
}

/// A file system, below one base directory.
#[async_trait]
pub trait Dfs: Send + Sync {
    /// The base, for people.
    fn describe(&self) -> String;

    /// Takes the exclusive right to `dir` for this process where the file system can't fence (a local one); elsewhere does
    /// nothing.
    ///
    /// # Errors
    /// [`DfsError::Unavailable`] when another live process holds it.
    async fn lock(&self, dir: &DfsPath) -> Result<Box<dyn Guard>, DfsError>;

    /// Makes a new file, in a directory that exists.
    ///
    /// # Errors
    /// [`DfsError::Exists`] when it is there or being written, [`DfsError::NotFound`] when its directory is not.
    async fn create(&self, path: &DfsPath, options: CreateOptions) -> Result<Box<dyn DfsWriter>, DfsError>;

    /// Makes one directory, in a directory that exists.
    ///
    /// # Errors
    /// [`DfsError::Exists`] when something is there, [`DfsError::NotFound`] when its directory is not.
    async fn mkdir(&self, path: &DfsPath) -> Result<(), DfsError>;

    /// Makes a directory and all that lead to it. Fine when it exists.
    ///
    /// # Errors
    /// When it can't be made.
    async fn mkdir_all(&self, path: &DfsPath) -> Result<(), DfsError>;

    /// What is at `path`, if anything.
    ///
    /// # Errors
    /// When the file system doesn't say.
    async fn stat(&self, path: &DfsPath) -> Result<Option<FileStatus>, DfsError>;

    /// The entries of a directory in the order of their names; none if it is not there.
    ///
    /// # Errors
    /// When the file system doesn't say.
    async fn list(&self, dir: &DfsPath) -> Result<Option<Vec<DirEntry>>, DfsError>;

    /// Up to `len` bytes from `offset`: fewer only at the file's end.
    ///
    /// # Errors
    /// [`DfsError::NotFound`], or when they can't be read.
    async fn read(&self, path: &DfsPath, offset: u64, len: usize) -> Result<Bytes, DfsError>;

    /// Moves a file or a directory. Never replaces anything. An error of which a look can tell that the move was done or was
    /// not done is reported as that.
    ///
    /// # Errors
    /// [`DfsError::NotFound`] when the source (or the destination's directory) is not there, [`DfsError::Exists`] when
    /// the destination is, [`DfsError::UnknownOutcome`] when nobody knows.
    async fn rename(&self, from: &DfsPath, to: &DfsPath) -> Result<(), DfsError>;

    /// Deletes a file, or a directory with all in it. Fine when nothing is there.
    ///
    /// # Errors
    /// When it can't be deleted or nobody knows.
    async fn delete(&self, path: &DfsPath) -> Result<(), DfsError>;

    /// Takes a file that another process left open (or may have) away from it and closes it: one attempt.
    ///
    /// # Errors
    /// [`DfsError::NotFound`], or when it can't be started.
    async fn recover(&self, path: &DfsPath) -> Result<Recovered, DfsError>;

    /// Changes how many copies a closed file has.
    ///
    /// # Errors
    /// When it can't be done.
    async fn set_replication(&self, path: &DfsPath, replication: u16) -> Result<(), DfsError>;
}

/// The pauses between attempts to recover a file; the last one repeats. Asking faster restarts a recovery on HDFS.
pub const RECOVERY_PAUSES: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(4), Duration::from_secs(16), Duration::from_secs(60)];

/// Recovers a file, however long it takes, and returns its length in bytes; none when it is not there.
///
/// Errors that pass are waited out.
///
/// # Errors
/// Those that don't.
pub async fn recover_until_closed(dfs: &dyn Dfs, path: &DfsPath) -> Result<Option<u64>, DfsError> {
    let mut pauses = RECOVERY_PAUSES.iter().chain(std::iter::repeat(&RECOVERY_PAUSES[RECOVERY_PAUSES.len() - 1]));
    loop {
        match dfs.recover(path).await {
            Ok(Recovered::Closed { len }) => return Ok(Some(len)),
            Ok(Recovered::StillOpen) => {
                tracing::info!(file = %path, "waiting for the recovery of a file that was left open");
            }
            Err(DfsError::NotFound { .. }) => return Ok(None),
            Err(error) if error.is_transient() => {
                tracing::warn!(file = %path, %error, "a file can't be recovered yet");
            }
            Err(error) => return Err(error),
        }
        if let Some(pause) = pauses.next() {
            tokio::time::sleep(*pause).await;
        }
    }
}
