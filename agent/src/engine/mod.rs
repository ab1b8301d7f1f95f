//! The loop that carries out what the state machines decide: one task owns all state, everybody else sends it events.
//!
//! Log files are touched by worker threads ([`crate::worker`]) and directory scans by blocking tasks; the loop itself
//! only asks for the sizes of open files.

mod copies;
mod files;
mod found;
mod report;
mod requests;
mod streams;
mod watermarks;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::RngExt;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tributary_common::batch::Batch;
use tributary_common::config::show_duration;
use tributary_common::http::backoff::{Backoff, BackoffLimits};
use tributary_common::http::pool::{EndpointPool, PoolOptions};
use tributary_common::ids::StreamId;
use tributary_common::messages::{Answers, Categories};
use tributary_common::position::{Position, TailHash};
use tributary_common::report::ReportAnswers;

use crate::checkpoint::{Checkpoints, DataDir, DataDirTaken, Remembered};
use crate::config::AgentConfig;
use crate::discover::{Found, Scan};
use crate::identity::{FileFacts, FileKey, Origin};
use crate::memory::Memory;
use crate::metrics::AgentMetrics;
use crate::ship::{Sender, ShipError};
use crate::status::Status;
use crate::stream::Stream;
use crate::tail::{Pace, PaceOptions};
use crate::tally::Unstored;
use crate::watch::DirectoryWatcher;
use crate::worker::{Carry, Done, TailId, WorkerOptions, Workers};
use found::Unopened;

/// How long a request waits for more batches while there are some in the making. Each request costs an edge and a root together about
/// as much CPU time as compressing 250 KiB, and each of them a sync.
const GATHER: Duration = Duration::from_millis(50);

/// Bytes of batches after which a request is full.
const REQUEST_BYTES: u64 = 4 << 20;

/// Requests with batches on their way at a time. Each stream is in one of them at most.
const MAX_REQUESTS: usize = 4;

/// How often the sizes of files in use are looked at, and how often at most when something hints at a change.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const MIN_LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// How soon a scan follows the one before when something hints at a change.
const MIN_SCAN_INTERVAL: Duration = Duration::from_millis(200);

/// How often upstream is asked how far streams are committed.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// How often the settings of the categories are asked for, and while one is missing.
const CATEGORIES_INTERVAL: Duration = Duration::from_secs(60);
const MISSING_CATEGORIES_INTERVAL: Duration = Duration::from_secs(2);

/// The connection is renewed, and the preferred endpoint returned to, only while at most so many bytes are upstream
/// and not committed: they are all sent again.
const MOVE_BYTES: u64 = 32 << 20;

/// The pauses of one stream that upstream can't take now.
const STREAM_BACKOFF: BackoffLimits =
    BackoffLimits { initial: Duration::from_millis(500), max: Duration::from_secs(10) };

/// How often files that are gone are forgotten.
const FORGET_INTERVAL: Duration = Duration::from_secs(3600);

/// Something happened.
#[derive(Debug)]
pub(crate) enum Event {
    Worker(TailId, Done),
    Scanned(Scan),
    Hinted,
    Sent { request: u64, outcome: Result<Answers, ShipError> },
    Told { request: u64, outcome: Result<Answers, ShipError> },
    Categories { server: usize, outcome: Result<Categories, ShipError> },
    Reported { server: usize, outcome: Result<ReportAnswers, ShipError> },
    Status(oneshot::Sender<Status>),
}

/// Why the agent ended without having done what it was started for.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The system refused something at the start.
    #[error("{what}: {error}")]
    Start {
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        #[source]
        error: std::io::Error,
    },
    /// Another agent has the data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirTaken),
    /// The port for operators is not to be had.
    #[error("listening on {address}, for operators: {error}; write another [http] listen, or enabled = false")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// What went wrong.
        #[source]
        error: std::io::Error,
    },
    /// The HTTP client could not be made.
    #[error("the HTTP client can't be set up: {0}")]
    Client(#[from] reqwest::Error),
    /// `--once` was stopped before everything was committed.
    #[error("stopped before everything was committed: {left} bytes are left, and will be shipped by the next run")]
    Unfinished {
        /// Bytes that are not committed.
        left: u64,
    },
    /// `--once` can't ship some files.
    #[error("{files} files can't be shipped, such as {}: {reason}", path.display())]
    Stopped {
        /// How many.
        files: usize,
        /// The first.
        path: PathBuf,
        /// Why it can't.
        reason: String,
    },
    /// `--once` has waited for too long.
    #[error(
        "nothing was committed for {}, and {left} bytes are not: {reason}; they will be shipped by the next run",
        show_duration(*patience)
    )]
    NoProgress {
        /// How long it has waited.
        patience: Duration,
        /// Bytes that are not committed.
        left: u64,
        /// Why, as far as is known.
        reason: String,
    },
    /// A worker thread panicked.
    #[error("a worker thread panicked, which is a bug: see the log")]
    WorkerDied,
}

/// A batch, and its share of the memory.
#[derive(Debug)]
struct Packed {
    batch: Batch,
    used: u64,
    total: Arc<AtomicU64>,
}

impl Packed {
    fn new(batch: Batch, total: &Arc<AtomicU64>) -> Self {
        let used = batch.body.len() as u64;
        total.fetch_add(used, Ordering::Relaxed);
        Self { batch, used, total: Arc::clone(total) }
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        self.total.fetch_sub(self.used, Ordering::Relaxed);
    }
}

/// What is remembered of a file's first line.
#[derive(Debug, Clone, Copy)]
struct FirstLine {
    bytes: u32,
    hash: TailHash,
}

/// The stream that a file's bytes go to.
#[derive(Debug)]
struct Named {
    stream_id: StreamId,
    /// The file in which it began.
    origin: Origin,
    incarnation: u32,
    first_line: FirstLine,
    stream: Stream<Packed>,
    unstored: Unstored,
}

/// One open file.
#[derive(Debug)]
struct Tail {
    key: FileKey,
    facts: FileFacts,
    path: PathBuf,
    source: usize,
    file: Arc<File>,
    pace: Pace,
    deleted: bool,
    /// Whether something hints at a change.
    look_soon: bool,
    /// When it was last written to, by the file system.
    modified: Option<(i64, i64)>,
    /// None before the first line is complete.
    named: Option<Named>,
    /// Of the next stream, so that results for the one before are stale.
    generation: u64,
    /// Where the next stream of the file begins, and its checkpoint may be used.
    next_base: Position,
    /// What is known to have been committed of the file before that, under other names.
    next_history: Vec<Position>,
    is_new: bool,
    /// Whether it is followed only if it turns out to hold a known stream: no source has its name.
    only_if_known: bool,
    /// Whether no scan has seen yet what else there is.
    by_hint: bool,
    /// Whether it had a name that a source has, and no scan would find it by the one that it has.
    by_former_name: bool,
    /// Whether its bytes were unpacked from the file that was found.
    unpacked: bool,
    /// The first line, while the file is being compared with known streams; and whether that is done.
    comparing: Option<Vec<u8>>,
    compared: bool,
    /// The size at which the beginning was read last, while there is no stream.
    head_read_at: Option<u64>,
    carry: Carry,
    reading: bool,
    reading_head: bool,
    checking: bool,
    in_read_queue: bool,
    timer: Option<Instant>,
    not_before: Option<Instant>,
    backoff: Backoff,
    /// Whether upstream is being asked about it, and since when not.
    asked: bool,
    ask_at: Instant,
    /// How carefully it is sent: 1: in a request of its own, 2: one batch at a time.
    careful: u8,
    waiting: Option<String>,
    saved: Option<Position>,
}

/// A request on its way.
#[derive(Debug)]
struct Request {
    server: usize,
    /// Per stream: the file, the stream's generation and the ends of its batches.
    parts: Vec<(TailId, StreamId, u64, Vec<Position>)>,
}

/// A question on its way.
#[derive(Debug)]
struct Question {
    server: usize,
    streams: Vec<(TailId, StreamId)>,
}

/// The agent at work.
#[derive(Debug)]
pub struct Engine {
    config: Arc<AgentConfig>,
    once: bool,
    metrics: AgentMetrics,
    events: mpsc::UnboundedReceiver<Event>,
    sender: mpsc::UnboundedSender<Event>,
    workers: Workers,
    checkpoints: Checkpoints,
    /// Why checkpoints can't be written, if they can't.
    checkpoint_trouble: Arc<Mutex<Option<String>>>,
    /// Locked until everything else has ended.
    _data_dir: DataDir,
    memory: Memory,
    taken: HashSet<StreamId>,
    /// Streams whose file holds something else now, or is gone: copies of them are looked for until then.
    orphans: HashMap<StreamId, Instant>,
    /// Streams at whose inode number another file was found.
    gone: HashSet<StreamId>,
    watcher: DirectoryWatcher,
    categories: Option<Categories>,
    asking_categories: bool,
    next_categories: Instant,

    tails: HashMap<TailId, Tail>,
    by_key: HashMap<FileKey, TailId>,
    by_stream: HashMap<StreamId, TailId>,
    opening: HashMap<TailId, Found>,
    /// Those, and those that are being unpacked.
    being_opened: HashSet<FileKey>,
    unopened: Unopened,
    /// When files are looked for again that could be closed for others.
    next_room: Instant,
    /// Compressed files that are being searched for what is missing of streams.
    unpacking: HashMap<TailId, Found>,
    /// Files that are done with, and their size then.
    resting: HashMap<FileKey, u64>,
    /// Those of them that are compressed, and hold nothing that is known to be missing.
    unsearched: HashSet<FileKey>,
    /// Those of them that are so far the same as the beginning of a known stream, and since when they rest.
    beginnings: HashMap<FileKey, Instant>,
    /// All files that the last scan found, by inode number.
    there: HashMap<u64, FileKey>,
    /// Whether another scan is needed before everything is known to be shipped.
    scan_wanted: bool,
    next_tail: u64,
    scanning: bool,
    scanned: bool,
    next_scan: Instant,
    /// Before that, no hint makes a scan: however many files there are, scans take a small part of the time.
    next_hinted_scan: Instant,
    /// When hints are taken, if there are any; and when they were taken last.
    next_hints: Option<Instant>,
    last_hints: Instant,
    next_forget: Instant,
    next_look: Instant,
    /// Whether deleted files hold more than half of what is allowed, of which that was said.
    holds_much: bool,

    read_queue: VecDeque<TailId>,
    jobs: usize,
    reserved: u64,
    buffered: Arc<AtomicU64>,

    ready: VecDeque<TailId>,
    flush_at: Option<Instant>,
    pool: EndpointPool,
    link: Option<Sender>,
    requests: HashMap<u64, Request>,
    question: Option<(u64, Question)>,
    next_request: u64,
    send_not_before: Option<Instant>,
    pool_paused_until: Option<Instant>,
    next_ask: Instant,
    may_move: bool,
    trouble: Option<String>,

    desk: watermarks::Desk,
    timers: BinaryHeap<Reverse<(Instant, TailId)>>,
    draining_until: Option<Instant>,
    /// With `--once`: how long nothing may be committed, and since when nothing was, with how much by then.
    patience: Option<Duration>,
    progress: (Instant, u64),
}

/// How other tasks talk to the engine.
#[derive(Debug, Clone)]
pub struct Handle(mpsc::UnboundedSender<Event>);

impl Handle {
    /// The status now; none when the agent has ended.
    pub async fn status(&self) -> Option<Status> {
        let (answer, status) = oneshot::channel();
        self.0.send(Event::Status(answer)).ok()?;
        status.await.ok()
    }
}

impl Engine {
    /// Sets everything up; nothing is read before [`Engine::run`]. `once`: ship everything to the end, then end.
    ///
    /// # Errors
    /// When the system refuses threads or connections.
    pub fn new(config: Arc<AgentConfig>, once: bool, metrics: AgentMetrics) -> Result<Self, RunError> {
        let now = Instant::now();
        let (sender, events) = mpsc::unbounded_channel();
        let data_dir = DataDir::take(&config.data_dir)?;
        let checkpoint_trouble = Arc::new(Mutex::new(None));
        let told = {
            let (errors, failing) = (metrics.checkpoint_errors.clone(), metrics.checkpoints_failing.clone());
            let trouble = Arc::clone(&checkpoint_trouble);
            move |what: Option<String>| {
                errors.inc_by(u64::from(what.is_some()));
                failing.set(i64::from(what.is_some()));
                *trouble.lock().unwrap_or_else(PoisonError::into_inner) = what;
            }
        };
        let (checkpoints, remembered) = Checkpoints::open(&config.data_dir, told)
            .map_err(|error| RunError::Start { what: "starting the thread of the checkpoints", error })?;
        let Remembered { streams, categories } = remembered;
        let taken = streams.iter().map(|one| one.stream).collect();
        let mut memory = Memory::default();
        for checkpoint in streams {
            memory.insert(checkpoint);
        }
        let results = sender.clone();
        let workers = Workers::start(
            config.compression.threads,
            WorkerOptions { sources: config.sources.clone(), batch_bytes: config.batch.max_bytes as usize },
            move |tail, done| results.send(Event::Worker(tail, done)).is_ok(),
        )
        .map_err(|error| RunError::Start { what: "starting worker threads", error })?;
        let watcher = DirectoryWatcher::new(
            config.watch,
            {
                let config = Arc::clone(&config);
                move |path| config.sources.iter().any(|source| source.matches(path))
            },
            {
                let sender = sender.clone();
                move || {
                    // Nobody listens any more: the agent ends.
                    let _ = sender.send(Event::Hinted);
                }
            },
        );
        let pool =
            EndpointPool::new(config.endpoints.len(), PoolOptions::new(config.backoff, config.max_connection_age));
        Ok(Self {
            once,
            metrics,
            events,
            sender,
            workers,
            checkpoints,
            checkpoint_trouble,
            _data_dir: data_dir,
            memory,
            taken,
            orphans: HashMap::new(),
            gone: HashSet::new(),
            watcher,
            categories,
            asking_categories: false,
            next_categories: now,
            tails: HashMap::new(),
            by_key: HashMap::new(),
            by_stream: HashMap::new(),
            opening: HashMap::new(),
            being_opened: HashSet::new(),
            unopened: Unopened::default(),
            next_room: now,
            unpacking: HashMap::new(),
            resting: HashMap::new(),
            unsearched: HashSet::new(),
            beginnings: HashMap::new(),
            there: HashMap::new(),
            scan_wanted: false,
            next_tail: 0,
            scanning: false,
            scanned: false,
            next_scan: now,
            next_hinted_scan: now,
            next_hints: None,
            last_hints: now,
            next_forget: now,
            next_look: now,
            holds_much: false,
            read_queue: VecDeque::new(),
            jobs: 0,
            reserved: 0,
            buffered: Arc::new(AtomicU64::new(0)),
            ready: VecDeque::new(),
            flush_at: None,
            pool,
            link: None,
            requests: HashMap::new(),
            question: None,
            next_request: 0,
            send_not_before: None,
            pool_paused_until: None,
            next_ask: now,
            may_move: true,
            trouble: None,
            desk: watermarks::Desk::new(config.sources.iter().map(|source| source.category.clone()), random(), now),
            timers: BinaryHeap::new(),
            draining_until: None,
            patience: None,
            progress: (now, 0),
            config,
        })
    }

    /// With `once`: the agent ends with an error when nothing has been committed for so long.
    #[must_use]
    pub fn give_up_after(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// For other tasks.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(self.sender.clone())
    }

    /// Works until `shutdown` is cancelled, or, with `once`, until everything is committed.
    ///
    /// # Errors
    /// When it ends otherwise.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), RunError> {
        let ended = self.serve(shutdown).await;
        self.save_all();
        ended
    }

    async fn serve(&mut self, shutdown: CancellationToken) -> Result<(), RunError> {
        loop {
            let now = Instant::now();
            self.do_what_is_due(now)?;
            if let Some(ended) = self.is_over(now) {
                return ended;
            }
            let wake = self.next_wake(now);
            tokio::select! {
                event = self.events.recv() => {
                    // The engine keeps a sender itself: the channel has no end.
                    let mut next = event;
                    while let Some(event) = next {
                        self.handle_event(event)?;
                        next = self.events.try_recv().ok();
                    }
                }
                () = shutdown.cancelled(), if self.draining_until.is_none() => {
                    let until = Instant::now() + self.config.drain_timeout;
                    tracing::info!(requests = self.requests.len(), "reading stops; what is in flight is waited for");
                    self.draining_until = Some(until);
                }
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }

    fn do_what_is_due(&mut self, now: Instant) -> Result<(), RunError> {
        while let Some(Reverse((at, id))) = self.timers.peek().copied()
            && at <= now
        {
            self.timers.pop();
            if let Some(tail) = self.tails.get_mut(&id)
                && tail.timer == Some(at)
            {
                tail.timer = None;
                self.advance(id, now);
            }
        }
        if self.draining_until.is_some() {
            return Ok(());
        }
        if self.next_hints.is_some_and(|at| now >= at) {
            self.take_hints(now);
        }
        if now >= self.next_scan && self.may_scan() {
            self.start_scan(now);
        }
        if now >= self.next_look {
            self.look(now);
        }
        self.ask_categories(now)?;
        self.read_more(now);
        self.send_more(now)?;
        self.ask_more(now)?;
        self.report_more(now)
    }

    fn may_scan(&self) -> bool {
        let enough = self.once && self.scanned && !self.scan_wanted;
        !self.scanning && !enough
    }

    fn next_wake(&self, now: Instant) -> Instant {
        if let Some(until) = self.draining_until {
            return until;
        }
        let mut wake = self.next_look.min(self.next_ask).min(self.next_hints.unwrap_or(self.next_look));
        wake = wake.min(self.reports_wake(now));
        if self.may_scan() {
            wake = wake.min(self.next_scan);
        }
        if !self.asking_categories {
            wake = wake.min(self.next_categories.max(self.pool_paused_until.unwrap_or(now)));
        }
        if let Some(Reverse((at, _))) = self.timers.peek() {
            wake = wake.min(*at);
        }
        if !self.ready.is_empty() && self.requests.len() < MAX_REQUESTS {
            let sends = self.flush_at.unwrap_or(now);
            let paused = self.pool_paused_until.into_iter().chain(self.send_not_before).max().unwrap_or(now);
            wake = wake.min(sends.max(paused));
        }
        wake.max(now)
    }

    fn handle_event(&mut self, event: Event) -> Result<(), RunError> {
        let now = Instant::now();
        match event {
            Event::Worker(_, Done::Died) => return Err(RunError::WorkerDied),
            Event::Worker(tail, done) => self.job_done(tail, done, now),
            Event::Scanned(scan) => self.scan_done(scan, now),
            Event::Hinted => {
                self.next_hints.get_or_insert((self.last_hints + MIN_LOOK_INTERVAL).max(now));
            }
            Event::Sent { request, outcome } => self.sent(request, outcome, now),
            Event::Told { request, outcome } => self.told(request, outcome, now),
            Event::Categories { server, outcome } => self.categories_told(server, outcome, now),
            Event::Reported { server, outcome } => self.reported(server, outcome, now),
            Event::Status(answer) => {
                // Who asked may be gone.
                let _ = answer.send(self.status());
            }
        }
        Ok(())
    }

    fn pace_options(&self, source: usize) -> PaceOptions {
        let source = &self.config.sources[source];
        PaceOptions {
            batch_bytes: self.config.batch.max_bytes,
            batch_timeout: self.config.batch.timeout,
            rotate_wait: source.rotate_wait,
            partial_line_timeout: source.partial_line_timeout,
        }
    }
}

/// The clock, milliseconds since 1970.
fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

fn random() -> u64 {
    rand::rng().random()
}

/// Kept sorted by the path, for logs that can be compared.
type Directories = BTreeSet<PathBuf>;
