//! The bare compressor, in turn with the processes that are measured beside it.
//!
//! A shared machine is faster and slower by the second, by a fifth of its speed. So the processes are stopped again and again, and the
//! compressor, which then has the machine to itself, is given a piece of the same log: what both took can be compared.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::compressor::{Bare, CHUNK, Compressing};
use crate::cluster::{Cluster, Role};

/// How long the processes work before it is the compressor's turn. Who has rested is slower for a moment, so that turns should not be short.
const TURN: Duration = Duration::from_secs(2);
/// What the compressor is given, for which it takes about as long.
const CHUNKS: usize = 4;

/// The compressor, and what it took.
pub struct Turns {
    /// None while it is at work.
    compressing: Option<Compressing>,
    used: Bare,
    paused: Duration,
}

impl Turns {
    /// Begins at the beginning of the log.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open(log: &Path) -> Result<Self> {
        Ok(Self { compressing: Some(Compressing::open(log)?), used: Bare::default(), paused: Duration::ZERO })
    }

    /// Leaves the processes to their work for a while, then stops them and compresses a piece.
    ///
    /// # Errors
    /// One doesn't run, or the log can't be read.
    pub async fn take(&mut self, cluster: &mut Cluster, roles: &[Role]) -> Result<()> {
        tokio::time::sleep(TURN).await;
        let begun = Instant::now();
        for role in roles {
            cluster.signal(*role, Signal::STOP)?;
        }
        let mut compressing = self.compressing.take().context("a piece before failed")?;
        let piece = tokio::task::spawn_blocking(move || {
            let chunks: Result<Vec<Bare>> = (0..CHUNKS).map(|_| compressing.next(CHUNK)).collect();
            (compressing, chunks)
        });
        let (compressing, chunks) = piece.await?;
        self.compressing = Some(compressing);
        self.used = chunks?.into_iter().fold(self.used, Bare::and);
        for role in roles {
            cluster.signal(*role, Signal::CONT)?;
        }
        self.paused += begun.elapsed();
        Ok(())
    }

    /// What the compressor used.
    #[must_use]
    pub fn used(&self) -> Bare {
        self.used
    }

    /// The time in which the processes were stopped.
    #[must_use]
    pub fn paused(&self) -> Duration {
        self.paused
    }
}
