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
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

#[cfg(any(test, feature = "test-support"))]
pub mod conformance;
pub mod hdfs;
#[cfg(any(test, feature = "test-support"))]
pub mod hostile;
pub mod local;
pub mod probe;

use hdfs::{HdfsDfs, HdfsSettings};
use local::LocalDfs;

/// How a file system is used, where its URI doesn't say it.
#[derive(Clone, PartialEq, Eq)]
pub struct DfsOptions {
    /// The longest that one call may take (of those to an HDFS; a local file system answers when it does).
    pub call_timeout: Duration,
    /// The user to be, where there is no Kerberos.
    pub user: Option<String>,
    /// The Kerberos principal.
    pub kerberos_principal: Option<String>,
    /// The principal's keytab.
    pub kerberos_keytab: Option<String>,
    /// The directory with Hadoop's `core-site.xml` and `hdfs-site.xml`.
    pub hadoop_conf_dir: Option<String>,
}

impl Default for DfsOptions {
    fn default() -> Self {
        Self {
            call_timeout: Duration::from_secs(20),
            user: None,
            kerberos_principal: None,
            kerberos_keytab: None,
            hadoop_conf_dir: None,
        }
    }
}

/// A sink can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URI is not one.
    #[error(
        "the sink {uri:?}: {reason}; write hdfs://HOST:PORT/DIRECTORY, hdfs://NAMESERVICE/DIRECTORY or file:///DIRECTORY"
    )]
    Uri {
        /// What was given.
        uri: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The directory can't be made or used.
    #[error("the sink {uri:?}: its directory can't be made or used: {error}")]
    Local {
        /// What was given.
        uri: String,
        /// The system's own words.
        error: std::io::Error,
    },
    /// The HDFS client can't be built.
    #[error(
        "the sink {uri:?}: the HDFS client can't be built: {reason}; check the host, hadoop_conf_dir and the Kerberos settings"
    )]
    Hdfs {
        /// What was given.
        uri: String,
        /// The client's own words.
        reason: String,
    },
}

/// Opens the sink that `uri` names: `hdfs://host:port/base`, `hdfs://nameservice/base` or `file:///base`. The path is taken
/// as it is written, without percent-decoding.
///
/// A local directory is made if it is missing; an HDFS is not asked anything yet, see [`probe`].
///
/// # Errors
/// What is wrong with the URI or the options.
pub async fn open_dfs(uri: &str, options: &DfsOptions) -> Result<Arc<dyn Dfs>, OpenError> {
    let wrong = |reason| OpenError::Uri { uri: uri.to_owned(), reason };
    let (scheme, rest) = uri.split_once("://").ok_or_else(|| wrong("it has no scheme"))?;
    let (authority, base) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let base = base.trim_end_matches('/');
    if base.split('/').skip(1).any(|part| matches!(part, "" | "." | "..")) {
        return Err(wrong("its path has an empty component or one of dots"));
    }
    match scheme {
        "file" if !authority.is_empty() => Err(wrong("a local directory has no host: three slashes")),
        "file" if base.is_empty() => Err(wrong("it names no directory")),
        "file" => match LocalDfs::open(Path::new(base)) {
            Ok(dfs) => Ok(Arc::new(dfs)),
            Err(error) => Err(OpenError::Local { uri: uri.to_owned(), error }),
        },
        "hdfs" if authority.is_empty() => Err(wrong("it names no NameNode")),
        "hdfs" => {
            let settings = HdfsSettings {
                authority: authority.to_owned(),
                base: base.to_owned(),
                call_timeout: options.call_timeout,
                user: options.user.clone(),
                kerberos_principal: options.kerberos_principal.clone(),
                kerberos_keytab: options.kerberos_keytab.clone(),
                hadoop_conf_dir: options.hadoop_conf_dir.clone(),
            };
            match HdfsDfs::open(settings).await {
                Ok(dfs) => Ok(Arc::new(dfs)),
                Err(error) => Err(OpenError::Hdfs { uri: uri.to_owned(), reason: error.to_string() }),
            }
        }
        _ => Err(wrong("its scheme is not known")),
    }
}

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

    /// Whether the file system says that no node has room for one more block. HDFS has no other sign of it than its words.
    #[must_use]
    pub fn is_no_room_for_a_block(&self) -> bool {
        match self {
            // "... replicated to 0 nodes" in Hadoop 2, "... written to 0 of the 1 minReplication nodes" in Hadoop 3.
            Self::Unavailable { reason, .. } | Self::UnknownOutcome { reason, .. } | Self::Refused { reason, .. } => {
                reason.contains("could only be replicated to 0") || reason.contains("could only be written to 0")
            }
            Self::NotFound { .. } | Self::Exists { .. } => false,
        }
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

    /// Syncs and closes; returns the length in bytes that the file has, by a look at it where the file system may err.
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

    /// A part of a name that nobody else has.
    fn nonce(&self) -> String {
        format!("{:016x}", rand::random::<u64>())
    }

    /// Takes the exclusive right to `dir` for this process where the file system can't fence (a local one); elsewhere does
    /// nothing.
    ///
    /// # Errors
    /// [`DfsError::Unavailable`] when another live process holds it.
    async fn lock(&self, dir: &DfsPath) -> Result<Box<dyn Guard>, DfsError>;

    /// Makes a new file, in a directory that exists.
    ///
    /// # Errors
    /// [`DfsError::Exists`] when it is there or being written, [`DfsError::NotFound`] (with the directory's path) when its
    /// directory is not, [`DfsError::UnknownOutcome`] when an empty file may be there now or later that nobody writes.
    async fn create(&self, path: &DfsPath, options: CreateOptions) -> Result<Box<dyn DfsWriter>, DfsError>;

    /// Makes one directory, in a directory that exists.
    ///
    /// Of two callers at once both may be told that they made it (HDFS doesn't tell them apart), so it excludes nobody.
    ///
    /// # Errors
    /// [`DfsError::Exists`] when something is there, [`DfsError::NotFound`] (with the directory's path) when its directory is
    /// not.
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
    /// [`DfsError::Refused`] when it is a file, or when the file system doesn't say.
    async fn list(&self, dir: &DfsPath) -> Result<Option<Vec<DirEntry>>, DfsError>;

    /// Up to `len` bytes from `offset`: fewer only at the file's end. Of a file that is being written, its end is somewhere
    /// before the last sync.
    ///
    /// # Errors
    /// [`DfsError::NotFound`], [`DfsError::Refused`] when it is a directory, or when they can't be read.
    async fn read(&self, path: &DfsPath, offset: u64, len: usize) -> Result<Bytes, DfsError>;

    /// Moves a file or a directory. Never replaces anything. An error of which a look can tell that the move was done or was
    /// not done is reported as that.
    ///
    /// # Errors
    /// [`DfsError::NotFound`] with the path of what is missing, the source or the destination's directory;
    /// [`DfsError::Exists`] when the destination is there, [`DfsError::UnknownOutcome`] when nobody knows: it may be done
    /// later.
    async fn rename(&self, from: &DfsPath, to: &DfsPath) -> Result<(), DfsError>;

    /// Deletes a file, or a directory with all in it. Fine when nothing is there.
    ///
    /// After an unknown outcome it may be done later: don't make anything under that name again.
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

/// What a look at both sides tells about a rename without an answer: `unknown` is the error if it tells nothing.
///
/// `to` there and `from` gone counts as done, whoever did it.
async fn look_after_rename(dfs: &dyn Dfs, from: &DfsPath, to: &DfsPath, unknown: DfsError) -> Result<(), DfsError> {
    let (Ok(source), Ok(target)) = (dfs.stat(from).await, dfs.stat(to).await) else { return Err(unknown) };
    match (source.is_some(), target.is_some()) {
        (false, true) => Ok(()),
        (false, false) => Err(DfsError::NotFound { path: from.clone() }),
        // Perhaps it was done between the two looks.
        (true, true) => match dfs.stat(from).await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(DfsError::Exists { path: to.clone() }),
            Err(_) => Err(unknown),
        },
        // It may still be under way.
        (true, false) => Err(unknown),
    }
}

/// What a look tells about a deletion without an answer.
async fn look_after_delete(dfs: &dyn Dfs, path: &DfsPath, unknown: DfsError) -> Result<(), DfsError> {
    match dfs.stat(path).await {
        Ok(None) => Ok(()),
        _ => Err(unknown),
    }
}

/// The pauses between attempts to recover a file; the last one repeats. Asking faster restarts a recovery on HDFS, which takes a
/// DataNode's heartbeat, so up to three seconds.
pub const RECOVERY_PAUSES: [Duration; 4] =
    [Duration::from_secs(3), Duration::from_secs(6), Duration::from_secs(16), Duration::from_secs(60)];

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_knows_its_parent_and_name() {
        let path = DfsPath::base().join("a/b").join("c=1");
        assert_eq!((path.as_str(), path.name()), ("a/b/c=1", "c=1"));
        let parents: Vec<_> = std::iter::successors(path.parent(), DfsPath::parent).map(|path| path.0).collect();
        assert_eq!(parents, ["a/b", "a", ""]);
    }

    #[test]
    fn a_name_that_leaves_its_directory_is_never_joined() {
        for name in ["", ".", "..", "a/../b", "/a", "a/", "a//b", "a\0b"] {
            assert!(std::panic::catch_unwind(|| DfsPath::base().join(name)).is_err(), "{name:?}");
        }
    }

    #[tokio::test]
    async fn a_uri_that_names_no_sink_is_refused_with_what_to_write() {
        for uri in [
            "/srv/logs",
            "s3://bucket/logs",
            "file://srv/logs",
            "file:///",
            "hdfs:///logs",
            "hdfs://nn:8020/logs/../other",
            "hdfs://nn:8020//logs",
        ] {
            let error = open_dfs(uri, &DfsOptions::default()).await.err().expect("it is not one");
            assert!(matches!(error, OpenError::Uri { .. }), "{uri}: {error}");
            assert!(error.to_string().contains("hdfs://HOST:PORT/DIRECTORY"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_sink_says_its_own_name() {
        for (uri, name) in [
            ("hdfs://nn:8020/logs/", "hdfs://nn:8020/logs"),
            ("hdfs://nn:8020/a/b", "hdfs://nn:8020/a/b"),
            ("hdfs://nn:8020", "hdfs://nn:8020/"),
        ] {
            let dfs = open_dfs(uri, &DfsOptions::default()).await.expect("nothing is asked yet");
            assert_eq!(dfs.describe(), name);
        }
        let folder = tempfile::tempdir().expect("a folder");
        let uri = format!("file://{}/new/er", folder.path().canonicalize().expect("there").display());
        assert_eq!(open_dfs(&uri, &DfsOptions::default()).await.expect("it is made").describe(), uri);
    }

    #[tokio::test]
    async fn a_nameservice_that_nobody_knows_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().to_str().expect("text").to_owned();
        let options = DfsOptions { hadoop_conf_dir: Some(dir), ..DfsOptions::default() };
        let error = open_dfs("hdfs://nowhere/logs", &options).await.err().expect("no configuration has it");
        assert!(matches!(&error, OpenError::Hdfs { .. }), "{error}");
        assert!(error.to_string().contains("nowhere") && error.to_string().contains("hadoop_conf_dir"), "{error}");
    }
}
