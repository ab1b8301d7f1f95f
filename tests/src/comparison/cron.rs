//! (a) Each server compresses its log of the past hour and uploads it, as a cron job does with `hdfs dfs -put`.
//!
//! The calls are those of that command: make the directory, look whether the file is there, write it under a name that ends with
//! `._COPYING_`, rename it. An upload that fails is tried again with the next hour's.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use libdeflater::{CompressionLvl, Compressor};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinHandle;
use tributary_aggregator::dfs::{Dfs, DfsError, DfsPath};

use super::servers::{Hour, Servers, Tail};
use super::{NEW_FILE, Target};

/// The level of `gzip` without options.
const LEVEL: i32 = 6;
/// Cron jobs of many servers begin at about the same time, not at the same: two minutes of a real hour.
const JITTER: Duration = Duration::from_secs(2);
/// Between two looks whether the hour is over.
const LOOK: Duration = Duration::from_millis(200);

/// The jobs of all servers.
#[derive(Debug)]
pub(super) struct Cron {
    jobs: Vec<Option<JoinHandle<Result<Vec<String>>>>>,
}

impl Cron {
    pub(super) fn start(servers: &Servers, target: &Target, first: Hour, hours: u32, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let jobs = (0..servers.count()).map(|server| {
            let jitter = JITTER.mul_f64(random.random_range(0.0..1.0));
            let (tail, target) = (servers.tail(server), target.clone());
            Some(tokio::spawn(async move { upload_hours(&tail, &target, server, first, hours, jitter).await }))
        });
        Self { jobs: jobs.collect() }
    }

    pub(super) fn lose(&mut self, server: usize) {
        if let Some(job) = self.jobs[server].take() {
            job.abort();
        }
    }

    /// Waits until all is uploaded; returns the uploads that failed.
    pub(super) async fn finish(self) -> Result<Vec<String>> {
        let mut failures = Vec::new();
        for job in self.jobs.into_iter().flatten() {
            failures.extend(job.await.map_err(|error| anyhow!("a cron job ended early: {error}"))??);
        }
        Ok(failures)
    }
}

async fn upload_hours(
    tail: &Tail,
    target: &Target,
    server: usize,
    first: Hour,
    hours: u32,
    jitter: Duration,
) -> Result<Vec<String>> {
    let dfs = target.open().await?;
    let (mut failures, mut hour) = (Vec::new(), first);
    let mut waiting = BTreeSet::new();
    let end = Hour(first.0 + i64::from(hours));
    while hour < end || !waiting.is_empty() {
        while !tail.is_over(hour) && hour < end {
            tokio::time::sleep(LOOK).await;
        }
        tokio::time::sleep(if hour < end { jitter } else { super::HOUR }).await;
        if hour < end {
            waiting.insert(hour);
            hour = hour.next();
        }
        for waits in waiting.clone() {
            match upload(&dfs, tail, server, waits).await {
                Ok(()) => _ = waiting.remove(&waits),
                Err(error) => failures.push(format!("server {server}, for the next job: {error:#}")),
            }
        }
    }
    Ok(failures)
}

async fn upload(dfs: &Arc<dyn Dfs>, tail: &Tail, server: usize, hour: Hour) -> Result<()> {
    let path = tail.path(hour);
    if !path.exists() {
        return Ok(());
    }
    let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let bytes = gzip(&text)?;
    let folder = DfsPath::base().join(hour.folder());
    let file = folder.join(format!("server-{server:03}.log.gz"));
    let copying = folder.join(format!("server-{server:03}.log.gz._COPYING_"));
    dfs.mkdir_all(&folder).await?;
    if dfs.stat(&file).await?.is_some() {
        // Of the attempt before this one only the answer was lost.
        return Ok(());
    }
    let mut writer = match dfs.create(&copying, NEW_FILE).await {
        // Of an attempt that failed; the command would overwrite it.
        Err(DfsError::Exists { .. }) => {
            dfs.delete(&copying).await?;
            dfs.create(&copying, NEW_FILE).await?
        }
        created => created?,
    };
    writer.write(bytes.into()).await?;
    writer.close().await?;
    dfs.rename(&copying, &file).await?;
    Ok(())
}

fn gzip(text: &[u8]) -> Result<Vec<u8>> {
    let level = CompressionLvl::new(LEVEL).map_err(|error| anyhow!("level {LEVEL}: {error:?}"))?;
    let mut compressor = Compressor::new(level);
    let mut bytes = vec![0; compressor.gzip_compress_bound(text.len())];
    let len = compressor.gzip_compress(text, &mut bytes).context("compressing an hour")?;
    bytes.truncate(len);
    Ok(bytes)
}
