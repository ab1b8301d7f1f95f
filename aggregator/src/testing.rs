//! What this crate's tests share: batches of known content, and a disk that fails.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tributary_common::batch::{Batch, BatchHeader, SliceRef};
use tributary_common::bucket::BucketSize;
use tributary_common::frame::{Codec, FrameEncoder, Run, SliceDescriptor, batch_hash};
use tributary_common::http::body::BodyPace;
use tributary_common::http::server::{ServerLimits, ServerMetrics, serve};
use tributary_common::ids::{AgentId, CategoryName, LaneCount, StreamId};
use tributary_common::messages::{
    Answer, Answers, BATCHES_CONTENT_TYPE, BATCHES_PATH, Categories, CategorySettings, POSITIONS_PATH, PositionsQuery,
    StreamQuery,
};
use tributary_common::position::{Position, TailHash};

use crate::receive::{ReceiveLimits, ReceiveMetrics, Receiver};
use crate::spool::io::{Folder, FolderFile};
use crate::surroundings::WallClock;
use crate::tier::Tier;

/// The content of a stream: its own at every offset.
pub(crate) fn content(stream: StreamId, from: u64, to: u64) -> Vec<u8> {
    (from..to).map(|at| b'a' + ((u64::try_from(stream.0 % 97).expect("small") + at * 31 + at / 7) % 26) as u8).collect()
}

/// The position at an offset of a stream.
pub(crate) fn at(stream: StreamId, offset: u64) -> Position {
    Position { offset, tail: TailHash::of(&content(stream, offset.saturating_sub(1024), offset)) }
}

pub(crate) fn agent() -> AgentId {
    "web-1".parse().expect("valid")
}

pub(crate) fn category() -> CategoryName {
    "app".parse().expect("valid")
}

/// A batch of a stream, from a sender that knows it to be committed up to `committed`.
pub(crate) fn batch(stream: StreamId, start: u64, end: u64, committed: u64) -> Batch {
    batch_between(stream, at(stream, start), at(stream, end), committed)
}

/// The same, with positions that may be those of other bytes.
pub(crate) fn batch_between(stream: StreamId, from: Position, to: Position, committed: u64) -> Batch {
    let (start, end) = (from.offset, to.offset);
    let raw = content(stream, start, end);
    let bucket = BucketSize::HOUR.bucket_of_ms(0);
    let descriptor = SliceDescriptor {
        agent: agent(),
        host: "web-1.example".into(),
        stream,
        base: Position::zero(),
        start: from,
        end: to,
        batch_hash: batch_hash(&raw),
        runs: vec![Run { start, len: end - start, stored: end - start }],
        records: 1,
        prefix_len: 0,
        altered: false,
        first_time_ms: 0,
        last_time_ms: 0,
    };
    let body = FrameEncoder::new(Codec::Gzip, 1).encode(&category(), bucket, &[descriptor], &raw).expect("encodes");
    Batch {
        header: BatchHeader {
            lane: agent().lane(LaneCount::ONE),
            agent: agent(),
            category: category(),
            stream,
            base: Position::zero(),
            start: from,
            end: to,
            committed: at(stream, committed),
            received_ms: Some(1_000_000),
            slices: vec![SliceRef { bucket, frame_len: body.len() as u32 }],
        },
        body,
    }
}

/// What goes wrong on a [`HostileFolder`].
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    /// The next write stores this many bytes and fails.
    pub(crate) write_stops_after: Option<usize>,
    /// The next sync fails.
    pub(crate) sync: bool,
    /// The next truncation fails.
    pub(crate) truncate: bool,
    /// Deletions fail.
    pub(crate) delete: bool,
    /// Files can't be made.
    pub(crate) create: bool,
}

#[derive(Default)]
struct Disk {
    files: HashMap<String, Arc<Mutex<Content>>>,
    /// The names that a crash leaves.
    synced_names: HashMap<String, Arc<Mutex<Content>>>,
    faults: Faults,
}

#[derive(Default, Clone)]
struct Content {
    bytes: Vec<u8>,
    synced: Vec<u8>,
}

/// A folder in memory that forgets and tears what was not synced.
#[derive(Clone, Default)]
pub(crate) struct HostileFolder {
    disk: Arc<Mutex<Disk>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostileFolder {
    pub(crate) fn folder(&self) -> Arc<dyn Folder> {
        Arc::new(self.clone())
    }

    pub(crate) fn set(&self, faults: Faults) {
        locked(&self.disk).faults = faults;
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = locked(&self.disk).files.keys().cloned().collect();
        names.sort();
        names
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        let file = Arc::clone(&locked(&self.disk).files[name]);
        locked(&file).bytes.clone()
    }

    pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) {
        let file = Arc::new(Mutex::new(Content { synced: bytes.clone(), bytes }));
        let mut disk = locked(&self.disk);
        disk.files.insert(name.into(), Arc::clone(&file));
        disk.synced_names.insert(name.into(), file);
    }

    /// The machine loses power: of what was not synced, any beginning stays, some of it as zeros.
    pub(crate) fn lose_power(&self, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut disk = locked(&self.disk);
        // A name that was not synced may stay, a removed one may come back.
        let mut names = disk.synced_names.clone();
        for (name, file) in &disk.files {
            if rng.random_bool(0.5) {
                names.insert(name.clone(), Arc::clone(file));
            }
        }
        names.retain(|name, _| disk.files.contains_key(name) || rng.random_bool(0.5));
        disk.files = names
            .into_iter()
            .map(|(name, file)| {
                let content = locked(&file);
                let mut bytes = content.synced.clone();
                if content.bytes.len() > bytes.len() && content.bytes.starts_with(&bytes) {
                    let torn = rng.random_range(bytes.len()..=content.bytes.len());
                    bytes = content.bytes[..torn].to_vec();
                    if rng.random_bool(0.3) {
                        let written = rng.random_range(content.synced.len()..=bytes.len());
                        bytes[written..].fill(0);
                    }
                }
                (name, Arc::new(Mutex::new(Content { synced: bytes.clone(), bytes })))
            })
            .collect();
        disk.synced_names = disk.files.clone();
        disk.faults = Faults::default();
    }
}

impl Folder for HostileFolder {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let disk = locked(&self.disk);
        Ok(disk.files.iter().map(|(name, file)| (name.clone(), locked(file).bytes.len() as u64)).collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn FolderFile>> {
        let mut disk = locked(&self.disk);
        if disk.faults.create {
            return Err(ErrorKind::StorageFull.into());
        }
        if disk.files.contains_key(name) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let content = Arc::<Mutex<Content>>::default();
        disk.files.insert(name.into(), Arc::clone(&content));
        Ok(Arc::new(HostileFile { content, disk: Arc::clone(&self.disk) }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn FolderFile>> {
        let content = locked(&self.disk).files.get(name).cloned().ok_or(ErrorKind::NotFound)?;
        Ok(Arc::new(HostileFile { content, disk: Arc::clone(&self.disk) }))
    }

    fn delete(&self, name: &str) -> io::Result<()> {
        let mut disk = locked(&self.disk);
        if disk.faults.delete {
            return Err(ErrorKind::PermissionDenied.into());
        }
        disk.files.remove(name).map(|_| ()).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = locked(&self.disk);
        disk.synced_names = disk.files.clone();
        Ok(())
    }

    fn describe(&self) -> String {
        "memory".into()
    }
}

struct HostileFile {
    content: Arc<Mutex<Content>>,
    disk: Arc<Mutex<Disk>>,
}

impl FolderFile for HostileFile {
    fn write_at(&self, pieces: &[Bytes], offset: u64) -> io::Result<()> {
        let stop = locked(&self.disk).faults.write_stops_after.take();
        let mut all = pieces.concat();
        if let Some(stop) = stop {
            all.truncate(stop);
        }
        let mut content = locked(&self.content);
        let (from, to) = (offset as usize, offset as usize + all.len());
        if content.bytes.len() < to {
            content.bytes.resize(to, 0);
        }
        content.bytes[from..to].copy_from_slice(&all);
        if stop.is_some() { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = locked(&self.content);
        let rest = content.bytes.get(offset as usize..).unwrap_or(&[]);
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn sync(&self) -> io::Result<()> {
        if std::mem::take(&mut locked(&self.disk).faults.sync) {
            return Err(io::Error::other("the disk is broken"));
        }
        let mut content = locked(&self.content);
        content.synced = content.bytes.clone();
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        if std::mem::take(&mut locked(&self.disk).faults.truncate) {
            return Err(io::Error::other("the disk is broken"));
        }
        locked(&self.content).bytes.truncate(len as usize);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(locked(&self.content).bytes.len() as u64)
    }
}

/// A server in front of a tier, on a port of its own. Ends when dropped, as a killed process would.
pub(crate) struct Served {
    pub(crate) address: std::net::SocketAddr,
    pub(crate) metrics: Arc<ReceiveMetrics>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the tests' topology says.
pub(crate) fn categories() -> Categories {
    let settings = CategorySettings { bucket_s: BucketSize::HOUR, codec: Codec::Gzip, close_delay_ms: 0 };
    Categories { lanes: LaneCount::ONE, categories: [(category(), settings)].into() }
}

pub(crate) const RECEIVE_LIMITS: ReceiveLimits =
    ReceiveLimits { max_request_bytes: 64 << 10, max_batch_bytes: 16 << 10, max_in_flight_bytes: 100 << 10 };

/// Serves a tier on `address`, where port 0 is one that is free.
pub(crate) async fn serve_on<T: Tier>(tier: T, address: std::net::SocketAddr) -> Served {
    let listener = tokio::net::TcpListener::bind(address).await.expect("the port is free");
    let address = listener.local_addr().expect("it has an address");
    let metrics = Arc::<ReceiveMetrics>::default();
    let receiver =
        Arc::new(Receiver::new(tier, categories(), RECEIVE_LIMITS, WallClock::new(|| 1_000_000), Arc::clone(&metrics)));
    let limits = ServerLimits {
        max_connections: 100,
        header_timeout: Duration::from_secs(60),
        body: BodyPace { idle_timeout: Duration::from_secs(60), min_rate: 1 },
        write_timeout: Duration::from_secs(60),
        drain_timeout: Duration::from_secs(60),
    };
    let shutdown = tokio_util::sync::CancellationToken::new();
    let served = serve(listener, limits, ServerMetrics::default(), shutdown, move |request| {
        let receiver = Arc::clone(&receiver);
        async move { receiver.handle(request).await }
    });
    let task = tokio::spawn(async move {
        served.await;
    });
    Served { address, metrics, task }
}

pub(crate) async fn serve_tier<T: Tier>(tier: T) -> Served {
    serve_on(tier, ([127, 0, 0, 1], 0).into()).await
}

/// The body of a request.
pub(crate) fn body(batches: &[Batch]) -> Vec<u8> {
    batches.iter().flat_map(|batch| [batch.encode_head(), batch.body.clone()].concat()).collect()
}

/// Posts bytes; returns the status and the body of the answer.
pub(crate) async fn post(
    address: std::net::SocketAddr,
    path: &str,
    content_type: &str,
    body: Vec<u8>,
) -> (u16, serde_json::Value) {
    let url = format!("http://{address}{path}");
    let response = reqwest::Client::builder().no_proxy().build().expect("a client");
    let response = response.post(url).header("content-type", content_type).body(body).send().await.expect("answers");
    (response.status().as_u16(), response.json().await.expect("the answer is JSON"))
}

/// Offers batches; they must be answered.
pub(crate) async fn offer(address: std::net::SocketAddr, batches: &[Batch]) -> Vec<Answer> {
    let (status, said) = post(address, BATCHES_PATH, BATCHES_CONTENT_TYPE, body(batches)).await;
    assert_eq!(status, 200, "{said}");
    serde_json::from_value::<Answers>(said).expect("answers").answers
}

/// Asks for the position of one stream.
pub(crate) async fn position(address: std::net::SocketAddr, stream: StreamId) -> Answer {
    let asked = StreamQuery {
        lane: agent().lane(LaneCount::ONE),
        agent: agent(),
        category: category(),
        stream,
        committed: None,
    };
    let query = serde_json::to_vec(&PositionsQuery { streams: vec![asked] }).expect("serializes");
    let (status, said) = post(address, POSITIONS_PATH, "application/json", query).await;
    assert_eq!(status, 200, "{said}");
    serde_json::from_value::<Answers>(said).expect("answers").answers.remove(0)
}
