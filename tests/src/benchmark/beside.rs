//! The compressor beside an edge and a root that have as much to do as those that an agent feeds.
//!
//! A thread takes longer for the same work while the machine's other cores are busy: often two of them are one core's threads, and all
//! share cache, memory and clock rate. An agent can't be measured without those that it sends to; so neither is the compressor with which
//! it is compared. And since a shared machine is faster and slower by the second, both are measured in turn, half a second each.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;
use tributary_agent::ship::Sender;
use tributary_common::batch::Batch;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::position::Position;

use super::compressor::{BATCH_BYTES, Bare, CHUNK, Compressing};
use super::senders::{Made, client, send};
use crate::cluster::{Cluster, ClusterOptions, Role};
use crate::usage::Usage;

const ROLES: [Role; 2] = [Role::Root(0), Role::Edge(0)];
/// How long a request waits for more batches, as long as an agent's.
const GATHER: Duration = Duration::from_millis(50);

/// What the compressor used, and what the others did meanwhile.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// The compressor.
    pub compressor: Bare,
    /// CPU time of edge and root.
    pub others: Duration,
}

/// An edge and a root with their sender, and the compressor.
pub struct Beside {
    cluster: Cluster,
    _folder: TempDir,
    sender: Sender,
    /// What is left to be sent.
    batches: Vec<Batch>,
    sent: usize,
    committed: Option<Position>,
    /// None while it is at work.
    compressing: Option<Compressing>,
    used: Used,
}

impl Beside {
    /// Starts edge and root, which will be sent the batches of `made`; compresses `log`.
    ///
    /// # Errors
    /// A process fails, or the log can't be opened.
    pub async fn start(log: &Path, parent: &Path, made: Made) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("beside-").tempdir_in(parent).context("making a directory")?;
        let mut cluster = Cluster::prepare(ClusterOptions {
            tables: Some(String::new()),
            bucket: "1h".into(),
            folder: Some(folder.path().into()),
            ..ClusterOptions::default()
        })?;
        for role in ROLES {
            cluster.start_node(role)?;
            cluster.wait_until_ready(role).await?;
        }
        let endpoint: Endpoint = cluster.url(Role::Edge(0), "")?.parse().map_err(anyhow::Error::msg)?;
        Ok(Self {
            cluster,
            _folder: folder,
            sender: Sender { client: client()?, endpoint },
            batches: made.batches,
            sent: 0,
            committed: None,
            compressing: Some(Compressing::open(log)?),
            used: Used::default(),
        })
    }

    /// Compresses a piece of the log, and sends a batch for each batch of it that has been compressed, while there are any.
    ///
    /// # Errors
    /// A process fails, or the log can't be read.
    pub async fn run_piece(&mut self) -> Result<()> {
        let first = self.sent;
        let last = self.batches.len().min(first + (CHUNK as usize / BATCH_BYTES));
        if first == last {
            return Ok(());
        }
        let before = self.others()?;
        let done = Arc::new(AtomicUsize::new(first));
        let mut compressing = self.compressing.take().context("a piece failed before")?;
        let work = {
            let done = Arc::clone(&done);
            tokio::task::spawn_blocking(move || {
                let bytes = ((last - first) * BATCH_BYTES) as u64;
                let bare = compressing.next(bytes, || {
                    done.fetch_add(1, Ordering::Relaxed);
                });
                // Also where the log ends before.
                done.store(last, Ordering::Relaxed);
                (compressing, bare)
            })
        };
        while self.sent < last {
            let due = self.sent..done.load(Ordering::Relaxed).min(last);
            for batch in &mut self.batches[due.clone()] {
                batch.header.committed = self.committed.unwrap_or(batch.header.committed);
            }
            self.committed = send(&self.sender, &self.batches[due.clone()]).await?.or(self.committed);
            self.sent = due.end;
            if !work.is_finished() {
                tokio::time::sleep(GATHER).await;
            }
        }
        let (compressing, bare) = work.await?;
        self.compressing = Some(compressing);
        self.used.compressor = self.used.compressor.and(bare?);
        self.used.others += self.others()? - before;
        Ok(())
    }

    /// Ends edge and root; returns what was used.
    ///
    /// # Errors
    /// One doesn't end as it should.
    pub async fn stop(mut self) -> Result<Used> {
        self.cluster.stop_all().await?;
        Ok(self.used)
    }

    fn others(&self) -> Result<Duration> {
        ROLES.iter().map(|role| Ok(Usage::of(self.cluster.pid(*role)?)?.cpu)).sum()
    }
}
