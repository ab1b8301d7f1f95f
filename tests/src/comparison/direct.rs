//! (b) Each server writes its log into HDFS itself: a file per server and hour, made durable every few seconds.
//!
//! After an error it begins another file, and with it from the last byte that it knows to be durable.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use tokio::task::JoinHandle;
use tributary_aggregator::dfs::{Dfs, DfsPath, DfsWriter};

use super::servers::{Hour, Position, Seen, Servers, Tail};
use super::{NEW_FILE, READ_BYTES, Target};

/// Between two looks at the log.
const LOOK: Duration = Duration::from_millis(500);
/// How long written lines may be unsafe.
const SYNC: Duration = Duration::from_secs(3);
/// Between an error and the next attempt.
const BACKOFF: Duration = Duration::from_secs(1);

/// The writers of all servers.
#[derive(Debug)]
pub(super) struct Direct {
    writers: Vec<Option<JoinHandle<Result<Vec<String>>>>>,
}

impl Direct {
    pub(super) fn start(servers: &Servers, target: &Target) -> Self {
        let start = |server: usize| {
            let (tail, target) = (servers.tail(server), target.clone());
            Some(tokio::spawn(async move {
                let dfs = target.open().await?;
                let durable = tail.position();
                Writer { dfs, tail, server, durable, file: None, failures: Vec::new() }.run().await
            }))
        };
        Self { writers: (0..servers.count()).map(start).collect() }
    }

    pub(super) fn lose(&mut self, server: usize) {
        if let Some(writer) = self.writers[server].take() {
            writer.abort();
        }
    }

    /// Waits until all is written; returns what failed.
    pub(super) async fn finish(self) -> Result<Vec<String>> {
        let mut failures = Vec::new();
        for writer in self.writers.into_iter().flatten() {
            failures.extend(writer.await.map_err(|error| anyhow!("a writer ended early: {error}"))??);
        }
        Ok(failures)
    }
}

struct Open {
    writer: Box<dyn DfsWriter>,
    /// When the oldest bytes that are not durable were written.
    dirty_since: Option<Instant>,
}

struct Writer {
    dfs: Arc<dyn Dfs>,
    tail: Tail,
    server: usize,
    /// Its checkpoint.
    durable: Position,
    file: Option<Open>,
    failures: Vec<String>,
}

impl Writer {
    async fn run(mut self) -> Result<Vec<String>> {
        loop {
            match self.step().await {
                Ok(true) => return Ok(self.failures),
                Ok(false) => {}
                Err(error) => {
                    self.failures.push(format!("server {}, which begins another file: {error:#}", self.server));
                    self.file = None;
                    self.tail.go_to(self.durable);
                    tokio::time::sleep(BACKOFF).await;
                }
            }
        }
    }

    /// Whether all hours are over.
    async fn step(&mut self) -> Result<bool> {
        match self.tail.look(READ_BYTES)? {
            Seen::Lines(hour, bytes) => {
                if self.file.is_none() {
                    self.file = Some(self.create(hour).await?);
                }
                if let Some(open) = &mut self.file {
                    open.writer.write(bytes.into()).await?;
                    open.dirty_since.get_or_insert_with(Instant::now);
                }
            }
            Seen::HourOver(_) => {
                if let Some(open) = self.file.take() {
                    open.writer.close().await?;
                }
                self.durable = self.tail.position();
            }
            Seen::Nothing => tokio::time::sleep(LOOK).await,
            Seen::End => return Ok(true),
        }
        if let Some(open) = &mut self.file
            && open.dirty_since.is_some_and(|since| since.elapsed() >= SYNC)
        {
            open.writer.sync().await?;
            open.dirty_since = None;
            self.durable = self.tail.position();
        }
        Ok(false)
    }

    async fn create(&mut self, hour: Hour) -> Result<Open> {
        let folder = DfsPath::base().join(hour.folder());
        self.dfs.mkdir_all(&folder).await?;
        let name = match self.failures.len() {
            0 => format!("server-{:03}.log", self.server),
            failures => format!("server-{:03}.{failures}.log", self.server),
        };
        Ok(Open { writer: self.dfs.create(&folder.join(name), NEW_FILE).await?, dirty_since: None })
    }
}
