//! Tries, before a root serves, all that it will later rely on.
//!
//! Finds what would otherwise show up as a failure at three in the morning: missing permissions, erasure coding (no sync),
//! encryption zones, block size limits, quotas, mount points between the lanes' directories and the data's, and file
//! systems that replace on rename or make directories on create.

use bytes::Bytes;
use tokio::time::Instant;

use super::{CreateOptions, Dfs, DfsError, DfsPath, DfsWriter, RECOVERY_PAUSES, Recovered};

/// The probe's files have two blocks of this size; the smallest that a NameNode allows by default.
const BLOCK_BYTES: usize = 1 << 20;
/// Leftovers of probes that were killed are removed when they are older than this, in milliseconds.
const LEFTOVER_MS: i64 = 24 * 3600 * 1000;

/// Where the probe works, below the base.
const DIR: &str = "_tributary";
/// Its second place, beside the data.
const BESIDE: &str = "_probe";

/// The sink is not fit for use.
#[derive(Debug, thiserror::Error)]
#[error("the sink {sink} can't {step}: {reason}; {advice}")]
pub struct ProbeError {
    /// The sink.
    pub sink: String,
    /// What it can't do.
    pub step: &'static str,
    /// What happened.
    pub reason: String,
    /// What to do about it.
    pub advice: &'static str,
    /// Whether it may work later without anybody doing anything (safe mode, no connection).
    pub transient: bool,
}

struct Probe<'a> {
    dfs: &'a dyn Dfs,
    dir: DfsPath,
    beside: DfsPath,
    options: CreateOptions,
}

const PERMISSIONS: &str = "let the root's user own the sink's directory, and check quotas";
const SYNCS: &str =
    "use a directory without erasure coding and outside encryption zones, and check that all DataNodes are up";
const RENAMES: &str = "keep the whole sink in one file system: no mount points, links or encryption zones below it";
const SEMANTICS: &str =
    "this file system doesn't keep the promises that exactly-once delivery stands on: use HDFS or a local disk";
const RECOVERS: &str = "check that the DataNodes are up and reachable by the NameNode";

/// Probes the sink; returns when all works and its traces are removed. Takes a few seconds on HDFS, where the recovery of a
/// file does.
///
/// `options` are those of the files to come; the block size is the probe's own.
///
/// # Errors
/// The step that failed and what to do about it.
pub async fn probe(dfs: &dyn Dfs, options: CreateOptions) -> Result<(), ProbeError> {
    let nonce: u64 = rand::random();
    let probe = Probe {
        dfs,
        dir: DfsPath::base().join(DIR).join(format!("probe-{nonce:016x}")),
        beside: DfsPath::base().join(format!("{BESIDE}-{nonce:016x}")),
        options: CreateOptions { block_size: BLOCK_BYTES as u64, ..options },
    };
    let result = probe.run().await;
    for path in [&probe.dir, &probe.beside] {
        if let Err(error) = dfs.delete(path).await {
            tracing::warn!(%path, %error, "a probe's traces can't be removed yet");
        }
    }
    result?;
    probe.sweep().await;
    Ok(())
}

impl Probe<'_> {
    fn failed(&self, step: &'static str, advice: &'static str, error: &DfsError) -> ProbeError {
        ProbeError {
            sink: self.dfs.describe(),
            step,
            reason: error.to_string(),
            advice,
            transient: error.is_transient(),
        }
    }

    fn broken(&self, step: &'static str, reason: String) -> ProbeError {
        ProbeError { sink: self.dfs.describe(), step, reason, advice: SEMANTICS, transient: false }
    }

    async fn run(&self) -> Result<(), ProbeError> {
        let first = self.dir.join("first");
        let fail = |step, advice| move |error: DfsError| self.failed(step, advice, &error);

        self.dfs.mkdir_all(&self.dir).await.map_err(fail("make a directory", PERMISSIONS))?;
        let bytes = Bytes::from(vec![b'.'; BLOCK_BYTES]);
        let mut writer = self.dfs.create(&first, self.options).await.map_err(fail("create a file", PERMISSIONS))?;
        self.write(&mut *writer, bytes.clone()).await.map_err(fail("write and sync", SYNCS))?;
        self.write(&mut *writer, bytes.slice(..1)).await.map_err(fail("begin a second block", SYNCS))?;
        let len = writer.close().await.map_err(fail("close a file", SYNCS))?;
        if len != BLOCK_BYTES as u64 + 1 {
            return Err(self.broken("keep what was written", format!("a closed file has {len} bytes")));
        }
        let back = self.dfs.read(&first, len - 2, 10).await.map_err(fail("read a file", PERMISSIONS))?;
        if back != bytes[..2] {
            return Err(self.broken("keep what was written", format!("{back:?} came back")));
        }

        match self.dfs.create(&first, self.options).await {
            Err(DfsError::Exists { .. }) => {}
            Ok(_) => return Err(self.broken("create exclusively", "it made a file where one was".into())),
            Err(error) => return Err(self.failed("create exclusively", SEMANTICS, &error)),
        }
        match self.dfs.create(&self.dir.join("gone/file"), self.options).await {
            Err(DfsError::NotFound { .. }) => {}
            Ok(_) => return Err(self.broken("create without its directory", "it made the directory, too".into())),
            Err(error) => return Err(self.failed("refuse a file without its directory", SEMANTICS, &error)),
        }

        let second = self.dir.join("second");
        let mut left = self.dfs.create(&second, self.options).await.map_err(fail("create a file", PERMISSIONS))?;
        self.write(&mut *left, bytes.slice(..1)).await.map_err(fail("write and sync", SYNCS))?;
        match self.dfs.rename(&first, &second).await {
            Err(DfsError::Exists { .. }) => {}
            Ok(()) => return Err(self.broken("rename without replacing", "it replaced a file".into())),
            Err(error) => return Err(self.failed("rename without replacing", SEMANTICS, &error)),
        }
        self.dfs.rename(&self.dir, &self.beside).await.map_err(fail("rename across the sink", RENAMES))?;
        drop(left);
        self.recover(&self.beside.join("second")).await
    }

    async fn write(&self, writer: &mut dyn DfsWriter, bytes: Bytes) -> Result<(), DfsError> {
        writer.write(bytes).await?;
        writer.sync().await
    }

    async fn recover(&self, path: &DfsPath) -> Result<(), ProbeError> {
        let step = "recover a file that its writer left";
        let began = Instant::now();
        let mut pauses = RECOVERY_PAUSES.iter();
        loop {
            match self.dfs.recover(path).await {
                Ok(Recovered::Closed { len: 1 }) => return Ok(()),
                Ok(Recovered::Closed { len }) => {
                    return Err(self.broken(step, format!("{len} bytes are left of the one that was synced")));
                }
                Ok(Recovered::StillOpen) => {}
                Err(error) => return Err(self.failed(step, RECOVERS, &error)),
            }
            let Some(pause) = pauses.next() else {
                return Err(ProbeError {
                    sink: self.dfs.describe(),
                    step,
                    reason: format!("it is still open after {:?}", began.elapsed()),
                    advice: RECOVERS,
                    transient: true,
                });
            };
            tokio::time::sleep(*pause).await;
        }
    }

    /// Removes what earlier probes left that were killed. Ages are by the sink's own clock.
    async fn sweep(&self) {
        for (dir, prefix) in [(DfsPath::base().join(DIR), "probe-"), (DfsPath::base(), "_probe-")] {
            let (Ok(Some(now)), Ok(Some(entries))) = (self.dfs.stat(&dir).await, self.dfs.list(&dir).await) else {
                continue;
            };
            // The directory changed a moment ago: this probe was deleted from it.
            let old = |modified: i64| now.modified_ms.saturating_sub(modified) > LEFTOVER_MS;
            for entry in entries.iter().filter(|entry| entry.name.starts_with(prefix) && old(entry.status.modified_ms))
            {
                if let Err(error) = self.dfs.delete(&dir.join(&entry.name)).await {
                    tracing::warn!(name = %entry.name, %error, "an old probe's traces can't be removed");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::dfs::hostile::{HostileCluster, Hostility};
    use crate::dfs::local::LocalDfs;

    fn options() -> CreateOptions {
        CreateOptions { block_size: 64 << 20, replication: None, sync_timeout: Duration::from_secs(10) }
    }

    #[tokio::test]
    async fn a_good_sink_passes_and_keeps_no_trace() {
        let folder = tempfile::tempdir().expect("a folder");
        let dfs = LocalDfs::open(folder.path()).expect("the folder exists");
        probe(&dfs, options()).await.expect("a local disk is fit");
        let left: Vec<_> = dfs.list(&DfsPath::base()).await.expect("listed").expect("there");
        assert_eq!(left.iter().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), [DIR]);
        assert_eq!(dfs.list(&DfsPath::base().join(DIR)).await.expect("listed").expect("there"), []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_says_the_step_and_whether_waiting_helps() {
        let cluster = HostileCluster::new(1, Hostility::none());
        cluster.safe_mode(true);
        let error = probe(&cluster.process(), options()).await.expect_err("nothing can be made");
        assert!(error.transient);
        assert!(error.to_string().contains("make a directory") && error.to_string().contains("safe mode"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn leftovers_of_killed_probes_are_removed_when_they_are_old() {
        let cluster = HostileCluster::new(1, Hostility::none());
        let dfs = cluster.process();
        let old = DfsPath::base().join("_tributary/probe-0");
        dfs.mkdir_all(&old).await.expect("made");
        tokio::time::sleep(Duration::from_secs(23 * 3600)).await;
        probe(&dfs, options()).await.expect("fit");
        assert!(dfs.stat(&old).await.expect("asked").is_some(), "it may still be at work");
        tokio::time::sleep(Duration::from_secs(2 * 3600)).await;
        probe(&dfs, options()).await.expect("fit");
        assert!(dfs.stat(&old).await.expect("asked").is_none());
    }
}
