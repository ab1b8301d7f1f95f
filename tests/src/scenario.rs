//! What most scenarios with real processes begin and end with.

use std::path::PathBuf;

use anyhow::Result;

use crate::cluster::{Cluster, ClusterOptions, Role};
use crate::judge::{Report, Scenario};
use crate::readers::Reader;
use crate::writer::{Writer, WriterOptions};

/// Runs a scenario on a tree of its own, and shows all logs if it fails. `act` gives the files with all lines that were written.
///
/// # Errors
/// What `act` gives, or the judge's verdict.
pub async fn scenario(
    name: &str,
    options: ClusterOptions,
    act: impl AsyncFnOnce(&mut Cluster) -> Result<Vec<PathBuf>>,
) -> Result<()> {
    reported(name, options, act).await.map(drop)
}

/// The same; returns what the judge found.
///
/// # Errors
/// As of [`scenario`].
pub async fn reported(
    name: &str,
    options: ClusterOptions,
    act: impl AsyncFnOnce(&mut Cluster) -> Result<Vec<PathBuf>>,
) -> Result<Report> {
    judged(Scenario::new(name, &[Reader::Zcat]), options, act).await
}

/// The same, judged as `scenario` says.
///
/// # Errors
/// As of [`scenario`].
pub async fn judged(
    scenario: Scenario,
    options: ClusterOptions,
    act: impl AsyncFnOnce(&mut Cluster) -> Result<Vec<PathBuf>>,
) -> Result<Report> {
    let mut cluster = Cluster::start(options).await?;
    let outcome = async {
        let written = act(&mut cluster).await?;
        scenario.end(&mut cluster, written).await
    };
    let outcome = outcome.await;
    let report = cluster.explain(outcome)?;
    println!("{report}");
    Ok(report)
}

/// The log of agent `number`.
#[must_use]
pub fn log(cluster: &Cluster, number: usize) -> PathBuf {
    cluster.log_dir(number).join("access.log")
}

/// The copy of all lines of that log.
#[must_use]
pub fn copy(cluster: &Cluster, number: usize) -> PathBuf {
    cluster.folder().join(format!("written-{number}"))
}

/// A writer of the log of agent `number`, rotated by rename about twice a second.
///
/// # Errors
/// A file can't be opened.
pub fn rotating_writer(cluster: &Cluster, number: usize) -> Result<Writer> {
    Writer::start(WriterOptions {
        per_second: 3000,
        rotate_every: Some(1700),
        first_serial: number as u64 * 1_000_000_000,
        ..WriterOptions::new(log(cluster, number), copy(cluster, number))
    })
}

/// Such writers for so many agents, slower together than one alone would be several times over.
///
/// # Errors
/// A file can't be opened.
pub fn writers(cluster: &Cluster, agents: usize, per_second: u32) -> Result<Vec<Writer>> {
    let start = |number: usize| {
        Writer::start(WriterOptions {
            per_second,
            rotate_every: Some(1700 + 300 * number as u64),
            first_serial: number as u64 * 1_000_000_000,
            ..WriterOptions::new(log(cluster, number), copy(cluster, number))
        })
    };
    (0..agents).map(start).collect()
}

/// Ends the writer; its copy is what was written.
///
/// # Errors
/// A line couldn't be written.
pub fn stop(writer: Writer) -> Result<Vec<PathBuf>> {
    stop_all([writer])
}

/// The same of several.
///
/// # Errors
/// As of [`stop`].
pub fn stop_all(writers: impl IntoIterator<Item = Writer>) -> Result<Vec<PathBuf>> {
    let stop = |writer: Writer| {
        let copy = writer.copy().to_owned();
        writer.stop().map(|_| copy)
    };
    writers.into_iter().map(stop).collect()
}

/// Starts a process and waits until it is ready.
///
/// # Errors
/// It doesn't come up.
pub async fn restart(cluster: &mut Cluster, role: Role) -> Result<()> {
    cluster.start_node(role)?;
    cluster.wait_until_ready(role).await
}
