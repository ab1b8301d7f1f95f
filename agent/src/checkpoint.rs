//! What the agent remembers of its streams from run to run, in SQLite, on a thread of its own.
//!
//! It saves time, no more: without it, upstream is asked what it has. So whatever is wrong with the file never stops
//! the agent:
//!
//! | Trouble | What is done |
//! |---|---|
//! | corrupt, no database, of a newer version | set aside under the name `checkpoints.db.corrupt-<n>`, and a new one begun |
//! | removed or replaced while it is in use | a new one is written, with all that is known |
//! | locked by another process, read-only, on a full or broken disk | tried again every few seconds, until all is written |
//!
//! Each is logged as an error, counted, and told to `readyz` until all is written again.
//!
//! Changes are gathered and written in one transaction per second. WAL and `synchronous=FULL`: what is written survives
//! a power cut.
//!
//! [`DataDir`] keeps two agents from sharing a directory.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OpenFlags, Row, params};
use rustix::fs::{Access, FlockOperation, access, flock};
use tributary_common::ids::{CategoryName, StreamId};
use tributary_common::messages::Categories;
use tributary_common::position::{Position, TailHash};

/// The version of the tables.
const VERSION: i64 = 1;

/// How often, and after what pauses, the lock of the data directory is tried for.
const LOCK_TRIES: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// How long changes are gathered.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// How soon what could not be written is tried again, if nothing new is to be written before.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// How long SQLite waits for another process that has locked the database.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// Streams of files that are gone are forgotten after so long: by then upstream has forgotten them, too.
const FORGET_GONE_AFTER_MS: i64 = 60 * 86_400_000;

/// The same for files that were committed to their end before they went.
const FORGET_FINISHED_AFTER_MS: i64 = 2 * 86_400_000;

const TABLES: &str = "
    CREATE TABLE streams (
        stream TEXT PRIMARY KEY,
        path TEXT NOT NULL,
        device INTEGER NOT NULL,
        inode INTEGER NOT NULL,
        birth TEXT NOT NULL,
        origin_inode INTEGER NOT NULL,
        origin_birth TEXT NOT NULL,
        first_line_bytes INTEGER NOT NULL,
        first_line_hash TEXT NOT NULL,
        incarnation INTEGER NOT NULL,
        base INTEGER NOT NULL,
        base_tail TEXT NOT NULL,
        committed INTEGER NOT NULL,
        committed_tail TEXT NOT NULL,
        history TEXT NOT NULL,
        category TEXT NOT NULL,
        finished INTEGER NOT NULL,
        seen_ms INTEGER NOT NULL,
        copy_of TEXT
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
";

/// What is remembered of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The stream.
    pub stream: StreamId,
    /// Where its file was last.
    pub path: PathBuf,
    /// The file's device number.
    pub device: u64,
    /// The file's inode number.
    pub inode: u64,
    /// See [`tributary_common::ids::StreamIdentity::birth_or_filesystem`].
    pub birth_or_filesystem: i128,
    /// The inode number of the file in which the stream began, which took part in its id. Another than `inode` where the
    /// stream goes on in a copy.
    pub origin_inode: u64,
    /// The same for `birth_or_filesystem`.
    pub origin_birth: i128,
    /// How many bytes of the file's beginning took part in the stream's id.
    pub first_line_bytes: u32,
    /// What [`TailHash::of`] says of these bytes: how copies are found.
    pub first_line_hash: TailHash,
    /// Which incarnation of the file it is.
    pub incarnation: u32,
    /// Where it began.
    pub base: Position,
    /// What is committed.
    pub committed: Position,
    /// The last positions up to which all was committed, in order.
    pub history: Vec<Position>,
    /// Its category.
    pub category: CategoryName,
    /// Whether the file was rotated away and is committed to its end.
    pub finished: bool,
    /// When this was written, milliseconds since 1970.
    pub seen_ms: i64,
    /// The stream of which the file is a copy up to `base`.
    pub copy_of: Option<StreamId>,
}

impl Checkpoint {
    /// Whether it may be forgotten, its file being gone. While a file is there its checkpoint is never forgotten, however
    /// old: upstream may know nothing of the stream any more, and the file would be shipped again from its beginning.
    /// `now_ms`: the clock, milliseconds since 1970.
    #[must_use]
    pub fn may_be_forgotten(&self, now_ms: i64) -> bool {
        let after = if self.finished { FORGET_FINISHED_AFTER_MS } else { FORGET_GONE_AFTER_MS };
        self.seen_ms < now_ms.saturating_sub(after)
    }
}

/// What was remembered.
#[derive(Debug, Default)]
pub struct Remembered {
    /// The streams.
    pub streams: Vec<Checkpoint>,
    /// The settings of the categories, as heard last.
    pub categories: Option<Categories>,
}

enum Message {
    Save(Box<Checkpoint>),
    Categories(Box<Categories>),
    Forget(Vec<StreamId>),
}

/// The thread that writes.
pub struct Checkpoints {
    messages: Option<Sender<Message>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Checkpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoints").finish_non_exhaustive()
    }
}

impl Checkpoints {
    /// Opens what lies in `data_dir`, which is made if it is missing. `told` is called with each trouble, after it was
    /// logged, and with nothing when all is written again.
    ///
    /// # Errors
    /// When the system gives no thread. Whatever is wrong with the files is dealt with.
    pub fn open(
        data_dir: &Path,
        told: impl Fn(Option<String>) + Send + 'static,
    ) -> std::io::Result<(Self, Remembered)> {
        let (mut store, remembered) = Store::open(data_dir.join("checkpoints.db"), told);
        let (messages, queue) = channel();
        let thread = std::thread::Builder::new().name("checkpoints".to_owned()).spawn(move || store.serve(&queue))?;
        Ok((Self { messages: Some(messages), thread: Some(thread) }, remembered))
    }

    /// Remembers a stream, in a second at the latest.
    pub fn save(&self, checkpoint: Checkpoint) {
        self.send(Message::Save(Box::new(checkpoint)));
    }

    /// Forgets streams.
    pub fn forget(&self, streams: Vec<StreamId>) {
        self.send(Message::Forget(streams));
    }

    /// Remembers the settings of the categories.
    pub fn save_categories(&self, categories: Categories) {
        self.send(Message::Categories(Box::new(categories)));
    }

    fn send(&self, message: Message) {
        // The thread ends only with this, or by a panic that has been heard of.
        let _ = self.messages.as_ref().map(|messages| messages.send(message));
    }
}

impl Drop for Checkpoints {
    /// Writes what has not been written.
    fn drop(&mut self) {
        self.messages = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The directory in which an agent keeps what it remembers, for itself alone: two agents with the same would ship the
/// same files, and each would undo what the other has written.
#[derive(Debug)]
pub struct DataDir {
    /// Locked until it is closed. A directory can be locked where nothing can be written, too.
    _locked: Option<File>,
}

/// Another agent has the directory.
#[derive(Debug, thiserror::Error)]
#[error(
    "another agent runs with data_dir = {:?}: stop that one first (also before --once), or give this one a directory of its own",
    .0.display()
)]
pub struct DataDirTaken(pub PathBuf);

impl DataDir {
    /// Makes it, if it is missing, and takes it for this process. Where it can't be made or locked, for another reason
    /// than that another process has it, that is logged, and the agent goes without.
    ///
    /// # Errors
    /// When another process has it.
    pub fn take(path: &Path) -> Result<Self, DataDirTaken> {
        let opened = std::fs::create_dir_all(path).and_then(|()| File::open(path));
        let locked = match opened.map(|file| (lock(&file), file)) {
            Ok((Ok(()), file)) => Some(file),
            Ok((Err(rustix::io::Errno::WOULDBLOCK), _)) => return Err(DataDirTaken(path.to_owned())),
            Ok((Err(error), _)) => {
                let error = std::io::Error::from(error);
                tracing::warn!(data_dir = %path.display(), %error, "the data directory can't be locked: see to it that no second agent uses it");
                None
            }
            Err(error) => {
                tracing::error!(data_dir = %path.display(), %error, "the data directory can't be made or opened: no checkpoints are kept, upstream is asked instead");
                None
            }
        };
        Ok(Self { _locked: locked })
    }
}

/// Locks the directory. A lock goes with the last process that has the file open: one that ends, or was just started by
/// the process that had it, may have it for a moment longer.
fn lock(directory: &File) -> rustix::io::Result<()> {
    for _ in 0..LOCK_TRIES {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
            other => return other,
        }
    }
    flock(directory, FlockOperation::NonBlockingLockExclusive)
}

#[derive(Debug, thiserror::Error)]
enum StoreError {
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("its directory can't be made or written to: {0}")]
    Directory(std::io::Error),
    #[error("it was removed or replaced while it was in use")]
    Gone,
    #[error("it has version {0}, and this program knows up to {VERSION}: it was written by a newer one")]
    Newer(i64),
    #[error("the checkpoint {0:?} can't be read")]
    Row(String),
}

impl StoreError {
    /// Whether the file itself is at fault, so that another one will do better.
    fn is_of_the_file(&self) -> bool {
        match self {
            Self::Sqlite(error) => matches!(
                error.sqlite_error_code(),
                Some(
                    ErrorCode::DatabaseCorrupt
                        | ErrorCode::NotADatabase
                        | ErrorCode::SchemaChanged
                        | ErrorCode::Unknown
                )
            ),
            Self::Newer(_) | Self::Row(_) => true,
            Self::Directory(_) | Self::Gone => false,
        }
    }
}

struct Store<F> {
    path: PathBuf,
    database: Option<Database>,
    /// All streams, so that a new file can be filled.
    streams: HashMap<StreamId, Checkpoint>,
    categories: Option<Categories>,
    /// Changed, or forgotten, since the last write.
    unwritten: HashSet<StreamId>,
    categories_unwritten: bool,
    told: F,
    /// Whether the last attempt failed.
    failing: bool,
    /// What was logged last of it: the same is not logged again.
    logged: Option<String>,
}

impl<F: Fn(Option<String>)> Store<F> {
    fn open(path: PathBuf, told: F) -> (Self, Remembered) {
        let mut store = Self {
            path,
            database: None,
            streams: HashMap::new(),
            categories: None,
            unwritten: HashSet::new(),
            categories_unwritten: false,
            told,
            failing: false,
            logged: None,
        };
        let remembered = match Database::connect(&store.path).and_then(|database| {
            let remembered = load(&database.connection)?;
            Ok((database, remembered))
        }) {
            Ok((database, remembered)) => {
                store.database = Some(database);
                remembered
            }
            Err(error) => {
                store.trouble(&error);
                Remembered::default()
            }
        };
        store.streams = remembered.streams.iter().map(|one| (one.stream, one.clone())).collect();
        store.categories = remembered.categories.clone();
        (store, remembered)
    }

    fn serve(&mut self, queue: &Receiver<Message>) {
        loop {
            // While there is nothing to do, nothing wakes up.
            let first = if self.failing {
                queue.recv_timeout(RETRY_INTERVAL)
            } else {
                queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            match first {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => {
                    self.write();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let until = Instant::now() + WRITE_INTERVAL;
            let ended = loop {
                match queue.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(message) => self.take(message),
                    Err(RecvTimeoutError::Timeout) => break false,
                    Err(RecvTimeoutError::Disconnected) => break true,
                }
            };
            self.write();
            if ended {
                break;
            }
        }
        if !self.unwritten.is_empty() || self.categories_unwritten {
            self.write();
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Save(checkpoint) => {
                self.unwritten.insert(checkpoint.stream);
                self.streams.insert(checkpoint.stream, *checkpoint);
            }
            Message::Categories(categories) => {
                self.categories = Some(*categories);
                self.categories_unwritten = true;
            }
            Message::Forget(streams) => {
                for stream in streams {
                    self.streams.remove(&stream);
                    self.unwritten.insert(stream);
                }
            }
        }
    }

    fn write(&mut self) {
        let Err(error) = self.try_write() else { return self.works() };
        self.trouble(&error);
        // With the old file out of the way, there can be a new one.
        if self.database.is_none() && (error.is_of_the_file() || matches!(error, StoreError::Gone)) {
            match self.try_write() {
                Ok(()) => self.works(),
                Err(error) => self.trouble(&error),
            }
        }
    }

    fn works(&mut self) {
        if std::mem::take(&mut self.failing) {
            tracing::info!(path = %self.path.display(), "checkpoints are written again");
            self.logged = None;
            (self.told)(None);
        }
    }

    fn try_write(&mut self) -> Result<(), StoreError> {
        if self.database.as_ref().is_some_and(|database| Database::file_at(&self.path) != Some(database.file)) {
            self.database = None;
            return Err(StoreError::Gone);
        }
        let connection = match &mut self.database {
            Some(database) => &mut database.connection,
            none => {
                self.unwritten = self.streams.keys().copied().collect();
                self.categories_unwritten = self.categories.is_some();
                &mut none.insert(Database::connect(&self.path)?).connection
            }
        };
        let transaction = connection.transaction()?;
        {
            let mut statement = transaction.prepare_cached(
                "INSERT OR REPLACE INTO streams VALUES
                 (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19)",
            )?;
            let mut forget = transaction.prepare_cached("DELETE FROM streams WHERE stream = ?1")?;
            for stream in &self.unwritten {
                let Some(one) = self.streams.get(stream) else {
                    forget.execute(params![stream.to_string()])?;
                    continue;
                };
                statement.execute(params![
                    one.stream.to_string(),
                    one.path.to_string_lossy(),
                    one.device.cast_signed(),
                    one.inode.cast_signed(),
                    one.birth_or_filesystem.to_string(),
                    one.origin_inode.cast_signed(),
                    one.origin_birth.to_string(),
                    one.first_line_bytes,
                    one.first_line_hash.to_string(),
                    one.incarnation,
                    one.base.offset.cast_signed(),
                    one.base.tail.to_string(),
                    one.committed.offset.cast_signed(),
                    one.committed.tail.to_string(),
                    serde_json::to_string(&one.history).expect("positions are representable"),
                    one.category.as_str(),
                    one.finished,
                    one.seen_ms,
                    one.copy_of.map(|stream| stream.to_string()),
                ])?;
            }
            if self.categories_unwritten
                && let Some(categories) = &self.categories
            {
                let value = serde_json::to_string(categories).expect("categories are representable");
                transaction.execute("INSERT OR REPLACE INTO settings VALUES ('categories', ?1)", params![value])?;
            }
        }
        transaction.commit()?;
        self.unwritten.clear();
        self.categories_unwritten = false;
        Ok(())
    }

    /// Deals with an error: sets the file aside if it is at fault.
    fn trouble(&mut self, error: &StoreError) {
        self.failing = true;
        let text = error.to_string();
        (self.told)(Some(format!("checkpoints can't be written to {}: {text}", self.path.display())));
        if error.is_of_the_file() {
            self.database = None;
            match set_aside(&self.path) {
                Ok(aside) => tracing::error!(
                    path = %self.path.display(), set_aside = %aside.display(), %error,
                    "the checkpoints can't be used: they were set aside, and what is committed is asked for upstream"
                ),
                Err(rename) => tracing::error!(
                    path = %self.path.display(), %error, %rename,
                    "the checkpoints can't be used nor set aside: what is committed is asked for upstream; remove the file"
                ),
            }
        } else if self.logged.as_ref() != Some(&text) {
            tracing::error!(
                path = %self.path.display(), %error,
                "checkpoints can't be read or written: nothing is lost, it is tried again; after a restart what is committed is asked for upstream"
            );
            self.logged = Some(text);
        }
    }
}

/// An open database.
struct Database {
    connection: Connection,
    /// Device and inode number of its file. SQLite itself would go on writing to a file that is gone.
    file: (u64, u64),
}

impl Database {
    fn connect(path: &Path) -> Result<Self, StoreError> {
        if let Some(directory) = path.parent() {
            // SQLite says only that it can't open the file.
            let writable = || Ok(access(directory, Access::WRITE_OK | Access::EXEC_OK)?);
            std::fs::create_dir_all(directory).and_then(|()| writable()).map_err(StoreError::Directory)?;
        }
        let connection = connect(path)?;
        let file = Self::file_at(path).ok_or(StoreError::Gone)?;
        Ok(Self { connection, file })
    }

    fn file_at(path: &Path) -> Option<(u64, u64)> {
        std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
    }
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    match version {
        0 => {
            let transaction = connection.transaction()?;
            transaction.execute_batch(TABLES)?;
            transaction.pragma_update(None, "user_version", VERSION)?;
            transaction.commit()?;
        }
        VERSION => {}
        newer => return Err(StoreError::Newer(newer)),
    }
    Ok(connection)
}

fn load(connection: &Connection) -> Result<Remembered, StoreError> {
    let mut statement = connection.prepare(
        "SELECT stream, path, device, inode, birth, origin_inode, origin_birth, first_line_bytes, first_line_hash,
                incarnation, base, base_tail, committed, committed_tail, history, category, finished, seen_ms, copy_of
         FROM streams",
    )?;
    let mut rows = statement.query([])?;
    let mut streams = Vec::new();
    while let Some(row) = rows.next()? {
        streams.push(checkpoint_of(row)?);
    }
    let categories = connection
        .prepare("SELECT value FROM settings WHERE name = 'categories'")?
        .query_map([], |row| row.get::<_, String>(0))?
        .next()
        .transpose()?
        .and_then(|value| serde_json::from_str(&value).ok());
    Ok(Remembered { streams, categories })
}

fn checkpoint_of(row: &Row<'_>) -> Result<Checkpoint, StoreError> {
    let name: String = row.get(0)?;
    let bad = || StoreError::Row(name.clone());
    let text = |column: &str| row.get::<_, String>(column);
    let number = |column: &str| row.get::<_, i64>(column).map(i64::cast_unsigned);
    let hash = |column: &str| {
        let hash = u64::from_str_radix(&text(column)?, 16).map_err(|_| bad())?;
        Ok::<_, StoreError>(TailHash(hash))
    };
    Ok(Checkpoint {
        stream: name.parse().map_err(|_| bad())?,
        path: text("path")?.into(),
        device: number("device")?,
        inode: number("inode")?,
        birth_or_filesystem: text("birth")?.parse().map_err(|_| bad())?,
        origin_inode: number("origin_inode")?,
        origin_birth: text("origin_birth")?.parse().map_err(|_| bad())?,
        first_line_bytes: row.get("first_line_bytes")?,
        first_line_hash: hash("first_line_hash")?,
        incarnation: row.get("incarnation")?,
        base: Position { offset: number("base")?, tail: hash("base_tail")? },
        committed: Position { offset: number("committed")?, tail: hash("committed_tail")? },
        history: serde_json::from_str(&text("history")?).map_err(|_| bad())?,
        category: text("category")?.parse().map_err(|_| bad())?,
        finished: row.get("finished")?,
        seen_ms: row.get("seen_ms")?,
        copy_of: row
            .get::<_, Option<String>>("copy_of")?
            .map(|stream| stream.parse().map_err(|_| bad()))
            .transpose()?,
    })
}

/// Renames the file, with what SQLite keeps beside it, to the first free name.
fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let with = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let free = (1..)
        .map(|n| format!(".corrupt-{n}"))
        .find(|suffix| !with(suffix).exists())
        .expect("there are more numbers than files");
    let aside = with(&free);
    std::fs::rename(path, &aside)?;
    for beside in ["-wal", "-shm"] {
        match std::fs::rename(with(beside), with(&format!("{free}{beside}"))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tributary_common::bucket::BucketSize;
    use tributary_common::frame::Codec;
    use tributary_common::ids::LaneCount;
    use tributary_common::messages::CategorySettings;

    fn checkpoint(stream: u128, committed: u64) -> Checkpoint {
        Checkpoint {
            stream: StreamId(stream),
            path: "/var/log/app.log".into(),
            device: u64::MAX,
            inode: 7,
            birth_or_filesystem: -5,
            origin_inode: 8,
            origin_birth: i128::MAX,
            first_line_bytes: 12,
            first_line_hash: TailHash(1),
            incarnation: 1,
            base: Position { offset: 3, tail: TailHash(u64::MAX) },
            committed: Position { offset: committed, tail: TailHash(9) },
            history: vec![Position { offset: 3, tail: TailHash(u64::MAX) }],
            category: "app".parse().expect("valid"),
            finished: false,
            seen_ms: 1000,
            copy_of: Some(StreamId(77)),
        }
    }

    struct Opened {
        checkpoints: Checkpoints,
        remembered: Remembered,
        failures: Arc<AtomicU32>,
    }

    fn open(dir: &Path) -> Opened {
        let failures = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&failures);
        let (checkpoints, remembered) = Checkpoints::open(dir, move |trouble| {
            count.fetch_add(u32::from(trouble.is_some()), Ordering::Relaxed);
        })
        .expect("opens");
        Opened { checkpoints, remembered, failures }
    }

    #[test]
    fn what_was_saved_is_remembered_by_the_next_run() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = open(&dir.path().join("new/data"));
        assert_eq!(first.remembered.streams, []);
        first.checkpoints.save(checkpoint(1, 10));
        first.checkpoints.save(checkpoint(2, 10));
        first.checkpoints.save(checkpoint(1, 20));
        let settings = CategorySettings { bucket_s: BucketSize::HOUR, codec: Codec::Zstd, close_delay_ms: 0 };
        let categories =
            Categories { lanes: LaneCount::ONE, categories: [("app".parse().expect("valid"), settings)].into() };
        first.checkpoints.save_categories(categories.clone());
        drop(first.checkpoints);
        let mut second = open(&dir.path().join("new/data")).remembered;
        second.streams.sort_by_key(|one| one.stream);
        assert_eq!(second.streams, [checkpoint(1, 20), checkpoint(2, 10)]);
        assert_eq!(second.categories, Some(categories));
    }

    #[test]
    fn a_corrupt_or_newer_file_is_set_aside_and_a_new_one_begun() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("checkpoints.db");
        std::fs::write(&path, vec![b'x'; 10_000]).expect("written");
        for n in 1..=2 {
            let opened = open(dir.path());
            assert_eq!((opened.remembered.streams.len(), opened.failures.load(Ordering::Relaxed)), (0, 1));
            opened.checkpoints.save(checkpoint(1, 10));
            drop(opened.checkpoints);
            assert!(dir.path().join(format!("checkpoints.db.corrupt-{n}")).exists());
            let again = open(dir.path());
            assert_eq!(again.remembered.streams, [checkpoint(1, 10)]);
            drop(again.checkpoints);
            Connection::open(&path).expect("opens").pragma_update(None, "user_version", 99).expect("updated");
        }
    }

    #[test]
    fn a_place_where_nothing_can_be_written_is_survived() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("file"), "").expect("written");
        let opened = open(&dir.path().join("file"));
        opened.checkpoints.save(checkpoint(1, 10));
        drop(opened.checkpoints);
        assert!(opened.failures.load(Ordering::Relaxed) >= 2);
    }

    #[test]
    fn what_was_forgotten_is_not_remembered_by_the_next_run() {
        let dir = tempfile::tempdir().expect("a directory");
        let opened = open(dir.path());
        opened.checkpoints.save(checkpoint(1, 10));
        opened.checkpoints.save(checkpoint(2, 10));
        drop(opened.checkpoints);
        let again = open(dir.path());
        again.checkpoints.forget(vec![StreamId(1)]);
        drop(again.checkpoints);
        assert_eq!(open(dir.path()).remembered.streams, [checkpoint(2, 10)]);
    }

    #[test]
    fn a_finished_file_that_is_gone_may_be_forgotten_sooner() {
        let unfinished = checkpoint(1, 10);
        let finished = Checkpoint { finished: true, ..unfinished.clone() };
        let days = |days: i64| unfinished.seen_ms + days * 86_400_000;
        for (day, expected) in [(1, (false, false)), (3, (true, false)), (61, (true, true))] {
            assert_eq!(
                (finished.may_be_forgotten(days(day)), unfinished.may_be_forgotten(days(day))),
                expected,
                "after {day} days"
            );
        }
    }
}
