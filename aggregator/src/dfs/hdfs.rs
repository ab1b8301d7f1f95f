//! `hdfs://`: a Hadoop file system, through the crate `hdfs-native`.
//!
//! What this adds to that client:
//!
//! - **A deadline on every call.** It has none on NameNode calls and connects. A change without an answer is of unknown
//!   outcome: the NameNode may still have it in its queue.
//! - **A new connection after silence.** A host that vanished without a word leaves a connection that looks alive for a
//!   quarter of an hour, and a NameNode pair whose first member is dead is never left for the second. After
//!   `SILENT_CALLS` calls without an answer the client is built anew, with the NameNodes in another order.
//! - **Few retries inside.** The client's own failover loop sleeps for minutes; the users of [`Dfs`] wait themselves, and
//!   know what for.
//! - **A task per writer.** A writer is not safe to cancel, its `hsync` may never return when a DataNode of the pipeline is
//!   killed, and it may panic on other errors of a pipeline. Its task is aborted with it; a panic is an error.
//! - **Syncs at block ends.** `hsync` reaches the block that is being written, and not the ones before it, which are closed
//!   without one. So a write that fills a block syncs it before it goes on.
//!
//! A file that was recovered keeps all whole packets that every live DataNode of the pipeline has, also some behind the last
//! sync that was answered; they are in the DataNodes' page caches, not necessarily on their disks.

use std::fmt;
use std::future::Future;
use std::io::ErrorKind;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use hdfs_native::file::FileWriter;
use hdfs_native::{Client, ClientBuilder, HdfsError, WriteOptions};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{
    CreateOptions, Dfs, DfsError, DfsPath, DfsWriter, DirEntry, FileStatus, Guard, Recovered, look_after_delete,
    look_after_rename,
};

/// After so many calls in a row without an answer the connection is given up.
const SILENT_CALLS: u32 = 2;
/// Two rounds over a pair of NameNodes; one that is alone is asked once.
const PAIR_ATTEMPTS: &str = "3";
const LONE_ATTEMPTS: &str = "0";
/// The sleep between the two rounds is up to three times this, in milliseconds.
const FAILOVER_SLEEP_MS: &str = "200";
/// Bytes that are read or written under one deadline.
const PIECE_BYTES: usize = 4 << 20;
/// HDFS wants block sizes that are multiples of its checksums' chunks.
const CHUNK_BYTES: u64 = 512;
const DIR_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;

/// How to reach an HDFS.
#[derive(Clone, PartialEq, Eq)]
pub struct HdfsSettings {
    /// `host:port` of a NameNode, or the name of a pair that the Hadoop configuration knows.
    pub authority: String,
    /// The base directory: absolute, without a slash at its end; empty for the root.
    pub base: String,
    /// The longest that one call to the NameNode may take.
    pub call_timeout: Duration,
    /// The user to be, where there is no Kerberos; default: `HADOOP_USER_NAME`, else the user of this process.
    pub user: Option<String>,
    /// The Kerberos principal; default: that of the ticket cache.
    pub kerberos_principal: Option<String>,
    /// The principal's keytab.
    pub kerberos_keytab: Option<String>,
    /// The directory with `core-site.xml` and `hdfs-site.xml`; default: `HADOOP_CONF_DIR`, else `HADOOP_HOME`'s.
    pub hadoop_conf_dir: Option<String>,
}

impl HdfsSettings {
    fn client(&self, shuffled: bool, runtime: Handle) -> hdfs_native::Result<Client> {
        let attempts = if self.authority.contains(':') { LONE_ATTEMPTS } else { PAIR_ATTEMPTS };
        let mut config = vec![
            ("dfs.client.failover.max.attempts".to_owned(), attempts.to_owned()),
            ("dfs.client.failover.sleep.base.millis".to_owned(), FAILOVER_SLEEP_MS.to_owned()),
        ];
        if shuffled {
            config.push((format!("dfs.client.failover.random.order.{}", self.authority), "true".to_owned()));
        }
        let mut builder = ClientBuilder::new()
            .with_url(format!("hdfs://{}", self.authority))
            .with_config(config)
            .with_io_runtime(runtime);
        if let Some(dir) = &self.hadoop_conf_dir {
            builder = builder.with_config_dir(dir);
        }
        if let Some(user) = &self.user {
            builder = builder.with_user(user);
        }
        if let Some(principal) = &self.kerberos_principal {
            builder = builder.with_kerberos_principal(principal);
        }
        if let Some(keytab) = &self.kerberos_keytab {
            builder = builder.with_kerberos_keytab(keytab);
        }
        builder.build()
    }

    async fn build(&self, shuffled: bool) -> hdfs_native::Result<Client> {
        let (settings, runtime) = (self.clone(), Handle::current());
        // It reads files and may ask for names.
        tokio::task::spawn_blocking(move || settings.client(shuffled, runtime))
            .await
            .unwrap_or_else(|panic| Err(HdfsError::InternalError(format!("the client can't be built: {panic}"))))
    }
}

/// An HDFS, below one base directory.
#[derive(Clone)]
pub struct HdfsDfs {
    settings: Arc<HdfsSettings>,
    connection: Arc<Mutex<Connection>>,
}

struct Connection {
    client: Client,
    generation: u64,
    /// Calls in a row that had no answer.
    silent: u32,
}

/// Whether a call can leave something changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Asks,
    Changes,
}

impl fmt::Debug for HdfsDfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HdfsDfs").field(&self.describe()).finish()
    }
}

impl HdfsDfs {
    /// Prepares to use it; connects with the first call.
    ///
    /// # Errors
    /// When the settings, or Hadoop's own configuration, are of no use.
    pub async fn open(settings: HdfsSettings) -> Result<Self, HdfsError> {
        let client = settings.build(false).await?;
        Ok(Self {
            settings: Arc::new(settings),
            connection: Arc::new(Mutex::new(Connection { client, generation: 0, silent: 0 })),
        })
    }

    fn path(&self, path: &DfsPath) -> String {
        match (self.settings.base.as_str(), path.as_str()) {
            ("", "") => "/".to_owned(),
            (base, "") => base.to_owned(),
            (base, path) => format!("{base}/{path}"),
        }
    }

    fn with_connection<T>(&self, work: impl FnOnce(&mut Connection) -> T) -> T {
        work(&mut self.connection.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes that a call had no answer; gives up a connection that seems dead.
    async fn silence(&self, generation: u64) {
        let give_up = self.with_connection(|connection| {
            if connection.generation != generation {
                return false;
            }
            connection.silent += 1;
            if connection.silent < SILENT_CALLS {
                return false;
            }
            connection.generation += 1;
            connection.silent = 0;
            true
        });
        if !give_up {
            return;
        }
        tracing::warn!(sink = %self.describe(), "the NameNode is silent; connecting anew");
        match self.settings.build(true).await {
            Ok(client) => self.with_connection(|connection| connection.client = client),
            Err(error) => {
                tracing::warn!(sink = %self.describe(), %error, "can't build a new client; keeping the old one");
            }
        }
    }

    /// One call, with its deadline.
    async fn call<T, F>(
        &self,
        call: &'static str,
        kind: Kind,
        path: &DfsPath,
        work: impl FnOnce(Client) -> F,
    ) -> Result<T, DfsError>
    where
        F: Future<Output = hdfs_native::Result<T>>,
    {
        let (client, generation) =
            self.with_connection(|connection| (connection.client.clone(), connection.generation));
        let deadline = self.settings.call_timeout;
        let lost = |reason: String| match kind {
            Kind::Asks => DfsError::Unavailable { call, path: path.clone(), reason },
            Kind::Changes => DfsError::UnknownOutcome { call, path: path.clone(), reason },
        };
        match timeout(deadline, AssertUnwindSafe(work(client)).catch_unwind()).await {
            Err(_) => {
                self.silence(generation).await;
                Err(lost(format!("no answer within {deadline:?}")))
            }
            Ok(Err(_)) => Err(lost("the HDFS client panicked".into())),
            Ok(Ok(result)) => {
                self.with_connection(|connection| {
                    if connection.generation == generation {
                        connection.silent = 0;
                    }
                });
                result.map_err(|error| classify(call, kind, path, &error))
            }
        }
    }
}

/// A Java class without its package, and the first line of its message: the rest is a stack trace.
fn java<'a>(class: &'a str, message: &'a str) -> (&'a str, &'a str) {
    (class.rsplit(['.', '$']).next().unwrap_or(class), message.lines().next().unwrap_or_default())
}

fn words(error: &HdfsError) -> String {
    match error {
        HdfsError::RPCError(class, message) | HdfsError::FatalRPCError(class, message) => {
            let (class, message) = java(class, message);
            format!("{class}: {message}")
        }
        other => other.to_string(),
    }
}

/// IO errors that come before anything was sent.
fn never_sent(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::AddrNotAvailable
            | ErrorKind::NotConnected
    )
}

fn classify(call: &'static str, kind: Kind, path: &DfsPath, error: &HdfsError) -> DfsError {
    let (path, reason) = (path.clone(), words(error));
    match error {
        HdfsError::AlreadyExists(_) => DfsError::Exists { path },
        HdfsError::FileNotFound(_) => DfsError::NotFound { path },
        // The NameNode's own answer: it did nothing.
        HdfsError::RPCError(class, message) => {
            let (class, message) = java(class, message);
            match class {
                "FileNotFoundException" if message.contains("not a file") => DfsError::Refused { call, path, reason },
                "FileNotFoundException" => DfsError::NotFound { path },
                "FileAlreadyExistsException" | "AlreadyBeingCreatedException" | "RecoveryInProgressException" => {
                    DfsError::Exists { path }
                }
                "AccessControlException"
                | "AuthorizationException"
                | "ParentNotDirectoryException"
                | "PathIsNotDirectoryException"
                | "PathComponentTooLongException"
                | "MaxDirectoryItemsExceededException"
                | "InvalidPathException"
                | "IllegalArgumentException"
                | "HadoopIllegalArgumentException"
                | "UnsupportedOperationException"
                | "SnapshotAccessControlException"
                | "UnresolvedPathException"
                | "RpcNoSuchMethodException"
                | "LeaseExpiredException" => DfsError::Refused { call, path, reason },
                _ if message.contains("less than configured minimum") => DfsError::Refused { call, path, reason },
                // Safe mode, standby, quota, a busy server, and what nobody foresaw: somebody may mend it meanwhile.
                _ => DfsError::Unavailable { call, path, reason },
            }
        }
        HdfsError::InvalidPath(_)
        | HdfsError::InvalidArgument(_)
        | HdfsError::IsADirectoryError(_)
        | HdfsError::UnsupportedFeature(_)
        | HdfsError::UnsupportedErasureCodingPolicy(_) => DfsError::Refused { call, path, reason },
        HdfsError::IOError(io) if never_sent(io.kind()) => DfsError::Unavailable { call, path, reason },
        // Nothing is sent before the connection has its credentials, and they may be renewed.
        HdfsError::SASLError(_) | HdfsError::GSSAPIError(..) | HdfsError::NoSASLMechanism => {
            DfsError::Unavailable { call, path, reason }
        }
        _ if kind == Kind::Asks => DfsError::Unavailable { call, path, reason },
        _ => DfsError::UnknownOutcome { call, path, reason },
    }
}

fn status(status: &hdfs_native::client::FileStatus) -> FileStatus {
    FileStatus {
        len: if status.isdir { 0 } else { status.length as u64 },
        is_dir: status.isdir,
        modified_ms: i64::try_from(status.modification_time).unwrap_or(i64::MAX),
    }
}

/// HDFS fences by itself.
struct NoLock;

impl Guard for NoLock {}

#[async_trait]
impl Dfs for HdfsDfs {
    fn describe(&self) -> String {
        format!("hdfs://{}{}", self.settings.authority, self.path(&DfsPath::base()))
    }

    async fn lock(&self, _dir: &DfsPath) -> Result<Box<dyn Guard>, DfsError> {
        Ok(Box::new(NoLock))
    }

    async fn create(&self, path: &DfsPath, options: CreateOptions) -> Result<Box<dyn DfsWriter>, DfsError> {
        let full = self.path(path);
        let block_size = options.block_size.max(1).next_multiple_of(CHUNK_BYTES);
        let write_options = WriteOptions {
            block_size: Some(block_size),
            replication: options.replication.map(u32::from),
            permission: FILE_MODE,
            overwrite: false,
            create_parent: false,
        };
        let created = self
            .call("create", Kind::Changes, path, |client| async move { client.create(&full, write_options).await })
            .await;
        let writer = created.map_err(|error| match error {
            // The file can't be what is missing.
            DfsError::NotFound { path } => DfsError::NotFound { path: path.parent().unwrap_or(path) },
            error => error,
        })?;
        let pen = Pen {
            dfs: self.clone(),
            path: path.clone(),
            writer,
            block_size,
            sync_timeout: options.sync_timeout,
            len: 0,
            synced: 0,
        };
        let (orders, inbox) = mpsc::channel(1);
        Ok(Box::new(HdfsWriter { path: path.clone(), orders, task: tokio::spawn(pen.run(inbox)) }))
    }

    async fn mkdir(&self, path: &DfsPath) -> Result<(), DfsError> {
        // The NameNode answers OK for a directory that is there.
        if self.stat(path).await?.is_some() {
            return Err(DfsError::Exists { path: path.clone() });
        }
        let full = self.path(path);
        let made = self
            .call("mkdir", Kind::Changes, path, |client| async move { client.mkdirs(&full, DIR_MODE, false).await })
            .await;
        made.map_err(|error| match error {
            DfsError::NotFound { path } => DfsError::NotFound { path: path.parent().unwrap_or(path) },
            error => error,
        })
    }

    async fn mkdir_all(&self, path: &DfsPath) -> Result<(), DfsError> {
        let full = self.path(path);
        self.call("mkdir", Kind::Changes, path, |client| async move { client.mkdirs(&full, DIR_MODE, true).await })
            .await
    }

    async fn stat(&self, path: &DfsPath) -> Result<Option<FileStatus>, DfsError> {
        let full = self.path(path);
        let found =
            self.call("stat", Kind::Asks, path, |client| async move { client.get_file_info(&full).await }).await;
        match found {
            Ok(found) => Ok(Some(status(&found))),
            Err(DfsError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn list(&self, dir: &DfsPath) -> Result<Option<Vec<DirEntry>>, DfsError> {
        let full = self.path(dir);
        let listed =
            self.call("list", Kind::Asks, dir, |client| async move { client.list_status(&full, false).await }).await;
        let listed = match listed {
            Ok(listed) => listed,
            Err(DfsError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let full = self.path(dir);
        if listed.iter().any(|entry| entry.path.trim_end_matches('/') == full.trim_end_matches('/')) {
            // A file lists itself.
            return Err(DfsError::Refused { call: "list", path: dir.clone(), reason: "not a directory".into() });
        }
        let mut entries: Vec<_> = listed
            .iter()
            .map(|entry| DirEntry {
                name: entry.path.rsplit('/').next().unwrap_or_default().to_owned(),
                status: status(entry),
            })
            .collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Some(entries))
    }

    async fn read(&self, path: &DfsPath, offset: u64, len: usize) -> Result<Bytes, DfsError> {
        let full = self.path(path);
        let reader = self.call("read", Kind::Asks, path, |client| async move { client.read(&full).await }).await?;
        // It panics when asked for what is not there.
        let end = reader.file_length();
        let mut at = usize::try_from(offset).unwrap_or(usize::MAX).min(end);
        let end = at.saturating_add(len).min(end);
        let mut pieces = Vec::new();
        while at < end {
            let piece = (end - at).min(PIECE_BYTES);
            let read = self
                .call("read", Kind::Asks, path, |_| {
                    let reader = &reader;
                    async move { reader.read_range(at, piece).await }
                })
                .await?;
            if read.len() != piece {
                return Err(DfsError::Unavailable {
                    call: "read",
                    path: path.clone(),
                    reason: format!("{} bytes came of the {piece} from {at}", read.len()),
                });
            }
            at += piece;
            pieces.push(read);
        }
        if pieces.len() == 1 {
            return Ok(pieces.swap_remove(0));
        }
        let mut bytes = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
        for piece in pieces {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }

    async fn rename(&self, from: &DfsPath, to: &DfsPath) -> Result<(), DfsError> {
        let (source, target) = (self.path(from), self.path(to));
        let renamed = self
            .call("rename", Kind::Changes, from, |client| async move { client.rename(&source, &target, false).await })
            .await;
        match renamed {
            Err(DfsError::Exists { .. }) => Err(DfsError::Exists { path: to.clone() }),
            // The NameNode's words for the two differ between its versions.
            Err(DfsError::NotFound { .. }) => {
                let parent = to.parent().unwrap_or_default();
                let path = if self.stat(&parent).await?.is_none() { parent } else { from.clone() };
                Err(DfsError::NotFound { path })
            }
            Err(error @ DfsError::UnknownOutcome { .. }) => look_after_rename(self, from, to, error).await,
            // So it answers when one is a file and the other a directory.
            Err(error @ DfsError::Unavailable { .. }) if error.to_string().contains("IOException") => {
                look_after_rename(self, from, to, error).await
            }
            other => other,
        }
    }

    async fn delete(&self, path: &DfsPath) -> Result<(), DfsError> {
        let full = self.path(path);
        let deleted = self
            .call("delete", Kind::Changes, path, |client| async move { client.delete(&full, true).await.map(drop) })
            .await;
        match deleted {
            Err(DfsError::NotFound { .. }) => Ok(()),
            Err(error @ DfsError::UnknownOutcome { .. }) => look_after_delete(self, path, error).await,
            other => other,
        }
    }

    async fn recover(&self, path: &DfsPath) -> Result<Recovered, DfsError> {
        let full = self.path(path);
        // Asked twice it does no harm, so an answer that is lost is no more than a reason to ask again.
        let closed =
            self.call("recover", Kind::Asks, path, |client| async move { client.recover_lease(&full).await }).await;
        match closed {
            Ok(true) => match self.stat(path).await? {
                Some(found) => Ok(Recovered::Closed { len: found.len }),
                None => Err(DfsError::NotFound { path: path.clone() }),
            },
            Ok(false) | Err(DfsError::Exists { .. }) => Ok(Recovered::StillOpen),
            Err(error) => Err(error),
        }
    }

    async fn set_replication(&self, path: &DfsPath, replication: u16) -> Result<(), DfsError> {
        let full = self.path(path);
        let set = self
            .call("set replication", Kind::Changes, path, |client| async move {
                client.set_replication(&full, u32::from(replication)).await
            })
            .await?;
        if set { Ok(()) } else { Err(DfsError::NotFound { path: path.clone() }) }
    }
}

type Answer<T> = oneshot::Sender<Result<T, DfsError>>;

enum Order {
    Write(Bytes, Answer<()>),
    Sync(Answer<()>),
    Close(Answer<u64>),
}

/// The writer's task: it owns what must not be cancelled.
struct Pen {
    dfs: HdfsDfs,
    path: DfsPath,
    writer: FileWriter,
    block_size: u64,
    sync_timeout: Duration,
    len: u64,
    synced: u64,
}

impl Pen {
    /// Ends with the first error, and with the writer: the file stays open until somebody recovers it.
    async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        while let Some(order) = orders.recv().await {
            // Whoever gave the order may be gone; then the channel is closed next.
            let failed = match order {
                Order::Write(bytes, answer) => {
                    let result = self.write(bytes).await;
                    let failed = result.is_err();
                    let _ = answer.send(result);
                    failed
                }
                Order::Sync(answer) => {
                    let result = self.sync().await;
                    let failed = result.is_err();
                    let _ = answer.send(result);
                    failed
                }
                Order::Close(answer) => {
                    let _ = answer.send(self.close().await);
                    return;
                }
            };
            if failed {
                return;
            }
        }
    }

    async fn write(&mut self, mut bytes: Bytes) -> Result<(), DfsError> {
        while !bytes.is_empty() {
            let room = usize::try_from(self.block_size - self.len % self.block_size).unwrap_or(usize::MAX);
            let piece = bytes.split_to(bytes.len().min(room).min(PIECE_BYTES));
            let wrote = piece.len() as u64;
            let written = timeout(self.sync_timeout, self.writer.write_bytes(piece)).await;
            judge("write", &self.path, self.sync_timeout, written)?;
            self.len += wrote;
            if self.len.is_multiple_of(self.block_size) {
                self.sync().await?;
            }
        }
        Ok(())
    }

    async fn sync(&mut self) -> Result<(), DfsError> {
        let synced = timeout(self.sync_timeout, self.writer.hsync()).await;
        judge("sync", &self.path, self.sync_timeout, synced)?;
        self.synced = self.len;
        Ok(())
    }

    async fn close(mut self) -> Result<u64, DfsError> {
        if self.synced < self.len {
            self.sync().await?;
        }
        let deadline = self.sync_timeout + self.dfs.settings.call_timeout;
        let closed = timeout(deadline, self.writer.close()).await;
        judge("close", &self.path, deadline, closed)?;
        match self.dfs.stat(&self.path).await {
            Ok(Some(found)) if found.len == self.len => Ok(self.len),
            found => Err(DfsError::UnknownOutcome {
                call: "close",
                path: self.path,
                reason: format!("{} bytes were written, and a look at the file says {found:?}", self.len),
            }),
        }
    }
}

/// What became of a writer's call. Only "the file is not yours" is certain; after all else the file's end is unknown.
fn judge<T>(
    call: &'static str,
    path: &DfsPath,
    deadline: Duration,
    outcome: Result<hdfs_native::Result<T>, tokio::time::error::Elapsed>,
) -> Result<(), DfsError> {
    let reason = match outcome {
        Ok(Ok(_)) => return Ok(()),
        Ok(Err(error)) => match classify(call, Kind::Changes, path, &error) {
            refused @ DfsError::Refused { .. } => return Err(refused),
            DfsError::NotFound { .. } => {
                return Err(DfsError::Refused { call, path: path.clone(), reason: words(&error) });
            }
            _ => words(&error),
        },
        Err(_) => format!("no answer within {deadline:?}"),
    };
    Err(DfsError::UnknownOutcome { call, path: path.clone(), reason })
}

struct HdfsWriter {
    path: DfsPath,
    orders: mpsc::Sender<Order>,
    task: JoinHandle<()>,
}

impl HdfsWriter {
    async fn order<T>(&self, call: &'static str, order: impl FnOnce(Answer<T>) -> Order) -> Result<T, DfsError> {
        let (answer, answered) = oneshot::channel();
        if self.orders.send(order(answer)).await.is_err() {
            return Err(DfsError::Refused {
                call,
                path: self.path.clone(),
                reason: "an earlier call on the file failed".into(),
            });
        }
        answered.await.unwrap_or_else(|_| {
            Err(DfsError::UnknownOutcome { call, path: self.path.clone(), reason: "the writer panicked".into() })
        })
    }
}

impl Drop for HdfsWriter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[async_trait]
impl DfsWriter for HdfsWriter {
    async fn write(&mut self, bytes: Bytes) -> Result<(), DfsError> {
        self.order("write", |answer| Order::Write(bytes, answer)).await
    }

    async fn sync(&mut self) -> Result<(), DfsError> {
        self.order("sync", Order::Sync).await
    }

    async fn close(self: Box<Self>) -> Result<u64, DfsError> {
        self.order("close", Order::Close).await
    }
}
