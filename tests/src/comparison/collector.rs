//! (c) The classic collector (Flume, Scribe): every server sends to one of four collectors, which write into HDFS and begin a new
//! file every five minutes or 128 MiB.
//!
//! A collector has a durable channel, as Flume's file channel is: what it has acknowledged survives its death. It takes a
//! transaction of up to a thousand lines from the channel, writes and flushes it, and then commits: after a death in between the
//! lines are written again. Files are written under a name that ends with `.tmp` and renamed when they are closed; one that a
//! collector left behind at its death stays under that name.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tributary_aggregator::dfs::{Dfs, DfsPath, DfsWriter};

use super::servers::{Hour, Seen, Servers, Tail};
use super::{HOUR, NEW_FILE, READ_BYTES, Target};

/// How many final writers there are.
pub(super) const COLLECTORS: usize = 4;
/// Five minutes of an hour.
const ROLL_AFTER: Duration = Duration::from_secs(HOUR.as_secs() / 12);
const ROLL_BYTES: u64 = 128 << 20;
const TRANSACTION_LINES: usize = 1000;
/// Deliveries that wait at a collector's door.
const IN_FLIGHT: usize = 64;
/// How the name of an open file ends.
pub(super) const TEMPORARY: &str = ".tmp";
/// Between two looks at a log, and at an empty channel.
const LOOK: Duration = Duration::from_millis(500);
const IDLE: Duration = Duration::from_millis(50);
/// Between an error and the next attempt.
const BACKOFF: Duration = Duration::from_secs(1);

struct Batch {
    hour: Hour,
    lines: usize,
    bytes: Vec<u8>,
}

type Delivery = (Batch, oneshot::Sender<()>);
/// Where each collector takes batches, while it runs.
type Doors = Arc<Mutex<Vec<Option<mpsc::Sender<Delivery>>>>>;

/// What a collector has on its disk.
#[derive(Default)]
struct Channel(Mutex<VecDeque<Arc<Batch>>>);

impl Channel {
    fn with<T>(&self, work: impl FnOnce(&mut VecDeque<Arc<Batch>>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The next transaction's batches; they stay.
    fn transaction(&self) -> Vec<Arc<Batch>> {
        self.with(|batches| {
            let mut lines = 0;
            let fits = |batch: &&Arc<Batch>| {
                lines += batch.lines;
                lines <= TRANSACTION_LINES
            };
            let taken: Vec<_> = batches.iter().take_while(fits).cloned().collect();
            // A batch alone may be larger.
            if taken.is_empty() { batches.front().cloned().into_iter().collect() } else { taken }
        })
    }

    fn commit(&self, count: usize) {
        self.with(|batches| drop(batches.drain(..count)));
    }
}

/// The collectors and the servers' senders.
pub(super) struct Collectors {
    senders: Vec<Option<JoinHandle<Result<()>>>>,
    nodes: Vec<Option<JoinHandle<Result<Vec<String>>>>>,
    channels: Vec<Arc<Channel>>,
    doors: Doors,
    draining: Arc<AtomicBool>,
    target: Target,
    starts: u64,
}

impl Collectors {
    pub(super) fn start(servers: &Servers, target: &Target) -> Self {
        let doors: Doors = Arc::new(Mutex::new((0..COLLECTORS).map(|_| None).collect()));
        let send = |server: usize| {
            let (tail, doors) = (servers.tail(server), Arc::clone(&doors));
            Some(tokio::spawn(send_all(tail, server, doors)))
        };
        let mut collectors = Self {
            senders: (0..servers.count()).map(send).collect(),
            nodes: (0..COLLECTORS).map(|_| None).collect(),
            channels: (0..COLLECTORS).map(|_| Arc::default()).collect(),
            doors,
            draining: Arc::default(),
            target: target.clone(),
            starts: 0,
        };
        (0..COLLECTORS).for_each(|node| collectors.start_node(node));
        collectors
    }

    pub(super) fn start_node(&mut self, node: usize) {
        let (door, inbox) = mpsc::channel(IN_FLIGHT);
        self.set_door(node, Some(door));
        self.starts += 1;
        let name = format!("collector-{node}.{}", self.starts);
        let (channel, draining) = (Arc::clone(&self.channels[node]), Arc::clone(&self.draining));
        let target = self.target.clone();
        self.nodes[node] = Some(tokio::spawn(async move {
            let dfs = target.open().await?;
            let sink = Sink {
                dfs,
                name,
                channel: Arc::clone(&channel),
                files: BTreeMap::new(),
                count: 0,
                failures: Vec::new(),
            };
            let (_, failures) = tokio::join!(receive(inbox, channel), sink.run(draining));
            Ok(failures)
        }));
    }

    fn set_door(&self, node: usize, door: Option<mpsc::Sender<Delivery>>) {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner)[node] = door;
    }

    /// Ends a collector in the middle of what it does. Its channel stays.
    pub(super) fn kill_node(&mut self, node: usize) {
        if let Some(task) = self.nodes[node].take() {
            task.abort();
        }
        self.set_door(node, None);
    }

    pub(super) fn lose(&mut self, server: usize) {
        if let Some(sender) = self.senders[server].take() {
            sender.abort();
        }
    }

    /// Waits until all is written; returns what failed.
    pub(super) async fn finish(mut self) -> Result<Vec<String>> {
        for sender in self.senders.drain(..).flatten() {
            sender.await.map_err(|error| anyhow!("a sender ended early: {error}"))??;
        }
        self.draining.store(true, Ordering::SeqCst);
        (0..COLLECTORS).for_each(|node| self.set_door(node, None));
        let mut failures = Vec::new();
        for node in self.nodes.drain(..).flatten() {
            failures.extend(node.await.map_err(|error| anyhow!("a collector ended early: {error}"))??);
        }
        Ok(failures)
    }
}

/// Sends a server's log; goes on when a collector has acknowledged.
async fn send_all(mut tail: Tail, server: usize, doors: Doors) -> Result<()> {
    loop {
        let (hour, bytes) = match tail.look(READ_BYTES)? {
            Seen::Lines(hour, bytes) => (hour, bytes),
            Seen::HourOver(_) => continue,
            Seen::End => return Ok(()),
            Seen::Nothing => {
                tokio::time::sleep(LOOK).await;
                continue;
            }
        };
        // Another collector, where one doesn't answer.
        for attempt in server.. {
            let door = doors.lock().unwrap_or_else(PoisonError::into_inner)[attempt % COLLECTORS].clone();
            if let Some(door) = door {
                let (answer, acknowledged) = oneshot::channel();
                let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
                let batch = Batch { hour, lines, bytes: bytes.clone() };
                if door.send((batch, answer)).await.is_ok() && acknowledged.await.is_ok() {
                    break;
                }
            }
            tokio::time::sleep(IDLE).await;
        }
    }
}

async fn receive(mut inbox: mpsc::Receiver<Delivery>, channel: Arc<Channel>) {
    while let Some((batch, answer)) = inbox.recv().await {
        channel.with(|batches| batches.push_back(Arc::new(batch)));
        // A server that is lost doesn't wait for it.
        let _ = answer.send(());
    }
}

struct Open {
    writer: Box<dyn DfsWriter>,
    path: DfsPath,
    begun: Instant,
    bytes: u64,
}

struct Sink {
    dfs: Arc<dyn Dfs>,
    name: String,
    channel: Arc<Channel>,
    files: BTreeMap<Hour, Open>,
    count: u64,
    failures: Vec<String>,
}

impl Sink {
    async fn run(mut self, draining: Arc<AtomicBool>) -> Vec<String> {
        loop {
            // Asked before the channel is looked at: then nothing comes any more.
            let last = draining.load(Ordering::SeqCst);
            match self.step(last).await {
                Ok(false) if last => return self.failures,
                Ok(true) => {}
                Ok(false) => tokio::time::sleep(IDLE).await,
                Err(error) => {
                    self.failures.push(format!("{}, which begins other files: {error:#}", self.name));
                    self.files.clear();
                    tokio::time::sleep(BACKOFF).await;
                }
            }
        }
    }

    /// One transaction; whether there was one.
    async fn step(&mut self, last: bool) -> Result<bool> {
        let batches = self.channel.transaction();
        let mut hours: Vec<Hour> = batches.iter().map(|batch| batch.hour).collect();
        hours.dedup();
        for batch in &batches {
            if !self.files.contains_key(&batch.hour) {
                let open = self.create(batch.hour).await?;
                self.files.insert(batch.hour, open);
            }
            let open = self.files.get_mut(&batch.hour).context("the file was just made")?;
            open.writer.write(batch.bytes.clone().into()).await?;
            open.bytes += batch.bytes.len() as u64;
        }
        for hour in hours {
            if let Some(open) = self.files.get_mut(&hour) {
                open.writer.sync().await?;
            }
        }
        self.channel.commit(batches.len());
        let old = |open: &Open| open.begun.elapsed() >= ROLL_AFTER || open.bytes >= ROLL_BYTES;
        let all = last && batches.is_empty();
        let due: Vec<Hour> = self.files.iter().filter(|(_, open)| all || old(open)).map(|(hour, _)| *hour).collect();
        for hour in due {
            if let Some(open) = self.files.remove(&hour) {
                open.writer.close().await?;
                self.dfs.rename(&open.path, &final_name(&open.path)).await?;
            }
        }
        Ok(!batches.is_empty())
    }

    async fn create(&mut self, hour: Hour) -> Result<Open> {
        let folder = DfsPath::base().join(hour.folder());
        self.dfs.mkdir_all(&folder).await?;
        self.count += 1;
        let path = folder.join(format!("{}.{}.log{TEMPORARY}", self.name, self.count));
        let writer = self.dfs.create(&path, NEW_FILE).await?;
        Ok(Open { writer, path, begun: Instant::now(), bytes: 0 })
    }
}

/// The name of a closed file.
pub(super) fn final_name(path: &DfsPath) -> DfsPath {
    DfsPath::base().join(path.as_str().trim_end_matches(TEMPORARY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_stays_in_the_channel_until_it_is_committed() {
        let channel = Channel::default();
        for lines in [600, 400, 1, 5000, 1] {
            channel.with(|batches| batches.push_back(Arc::new(Batch { hour: Hour(1), lines, bytes: Vec::new() })));
        }
        let lines = || channel.transaction().iter().map(|batch| batch.lines).collect::<Vec<_>>();
        assert_eq!(lines(), [600, 400]);
        assert_eq!(lines(), [600, 400], "as after a death before the commit");
        channel.commit(2);
        assert_eq!(lines(), [1]);
        channel.commit(1);
        assert_eq!(lines(), [5000], "more than a transaction's lines, but one batch");
        channel.commit(1);
        assert_eq!(lines(), [1]);
    }

    #[test]
    fn a_closed_file_has_its_name_without_the_end() {
        let open = DfsPath::base().join("dt=1/collector-0.1.1.log.tmp");
        assert_eq!(final_name(&open), DfsPath::base().join("dt=1/collector-0.1.1.log"));
    }
}
