//! An agent with the machine to itself: its edge keeps nothing, as if it were on a machine of its own.
//!
//! A thread takes longer for the same work while the machine's other cores are busy: often two of them are one core's threads, and all
//! share cache, memory and clock rate. The compressor has no neighbours, either.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::compressor::{BATCH_BYTES, Bare};
use super::path::{LIMIT, PathOptions, is_nearly, lay};
use super::taker::Taker;
use super::turns::Turns;
use crate::cluster::{Cluster, Role};
use crate::usage::Usage;
use crate::wait::until;

const AGENT: Role = Role::Agent(0);

/// What both took.
#[derive(Clone, Copy, Debug)]
pub struct Alone {
    /// Bytes of the log that the agent was given.
    pub raw: u64,
    /// From the agent's start until all but the last batch of it was taken: that one isn't full, so it waits for `batch.timeout`.
    pub elapsed: Duration,
    /// The agent's, from its start to its end.
    pub agent: Usage,
    /// The compressor's, over the same log.
    pub compressor: Bare,
}

impl Alone {
    /// The agent's CPU time in the compressor's.
    #[must_use]
    pub fn cpu(&self) -> f64 {
        self.compressor.in_its_cpu(self.agent.cpu, self.raw)
    }

    /// The agent's time in the compressor's.
    #[must_use]
    pub fn wall(&self) -> f64 {
        self.compressor.in_its_time(self.elapsed, self.raw)
    }
}

/// Gives the log at `log` to an agent with its defaults, in turn with the compressor. Works in a new folder below `parent`.
///
/// # Errors
/// The agent fails.
pub async fn measure(log: &Path, parent: &Path) -> Result<Alone> {
    let mut laid = lay(log, parent, &PathOptions::default())?;
    let outcome = run(&mut laid.cluster, laid.raw, Turns::open(log)?).await;
    laid.cluster.explain(outcome)
}

async fn run(cluster: &mut Cluster, raw: u64, mut turns: Turns) -> Result<Alone> {
    let taker = Taker::start(cluster.port(Role::Edge(0))?).await?;
    let begun = Instant::now();
    cluster.start_node(AGENT)?;
    while !is_nearly(raw, taker.taken()) {
        turns.take(cluster, &[AGENT]).await?;
        ensure!(begun.elapsed() < LIMIT, "{} of {raw} bytes were taken in {LIMIT:?}", taker.taken());
    }
    let until_taken = async |bytes| {
        until("the bytes to be taken", LIMIT, async || {
            let taken = taker.taken();
            ensure!(taken >= bytes, "{taken} of {bytes} are");
            Ok(Some(()))
        })
        .await
    };
    until_taken(raw.saturating_sub(BATCH_BYTES as u64)).await?;
    let elapsed = begun.elapsed() - turns.paused();
    until_taken(raw).await?;
    let agent = Usage::of(cluster.pid(AGENT)?)?;
    cluster.stop_all().await?;
    Ok(Alone { raw, elapsed, agent, compressor: turns.used() })
}
