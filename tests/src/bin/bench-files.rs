//! What many files cost an agent that has little to do: to find them, to keep them, and while some of them grow.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tributary_tests::cluster::{Cluster, ClusterOptions, Role};
use tributary_tests::synthetic::AccessLog;
use tributary_tests::usage::Usage;
use tributary_tests::wait::until;

/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(3600);

/// Measures what many files cost an agent, and prints a table in Markdown.
///
/// The files begin with 20 lines each. An agent with its defaults, an edge and a root find and ship them. Then nothing is written for
/// a while, and then one line each second to each of some files. The agent's CPU time is that of all its threads; memory is the most
/// that was resident (VmHWM).
///
/// It judges nothing: the tests do that.
#[derive(Parser)]
#[command(
    after_help = "Example: cargo run --release -p tributary-tests --bin bench-files -- --files 10000 --active 100"
)]
struct Arguments {
    /// How many files.
    #[arg(long, default_value_t = 10_000)]
    files: u64,
    /// How many of them grow.
    #[arg(long, default_value_t = 100)]
    active: u64,
    /// Files beside them that are no logs.
    #[arg(long, default_value_t = 0)]
    foreign: u64,
    /// How long each state is measured, in seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = ClusterOptions {
        tables: Some(String::new()),
        bucket: "1h".into(),
        include: "app-*.log".into(),
        ..ClusterOptions::default()
    };
    let mut cluster = Cluster::prepare(options)?;
    let outcome = measure(&mut cluster, &arguments).await;
    print!("{}", cluster.explain(outcome)?);
    Ok(())
}

fn path(directory: &Path, file: u64) -> PathBuf {
    directory.join(format!("app-{file}.log"))
}

/// Appends lines of the present time; returns their bytes.
fn append(path: &Path, log: &mut AccessLog, first: u64, count: u64) -> Result<u64> {
    let now = jiff::Timestamp::now().as_second();
    let (mut text, mut line) = (Vec::new(), Vec::new());
    for number in first..first + count {
        line.clear();
        log.line(number, now, &mut line);
        text.extend_from_slice(&line);
    }
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))?;
    file.write_all(&text)?;
    Ok(text.len() as u64)
}

async fn measure(cluster: &mut Cluster, arguments: &Arguments) -> Result<String> {
    let Arguments { files, active, foreign, seconds } = *arguments;
    let directory = cluster.log_dir(0);
    let (mut log, mut bytes, mut number) = (AccessLog::default(), 0, 0);
    for file in 0..files {
        bytes += append(&path(&directory, file), &mut log, number, 20)?;
        number += 20;
    }
    for file in 0..foreign {
        fs::write(directory.join(format!("{file}.other")), "")?;
    }
    for role in [Role::Root(0), Role::Edge(0)] {
        cluster.start_node(role)?;
        cluster.wait_until_ready(role).await?;
    }
    let agent = Role::Agent(0);
    let begun = Instant::now();
    cluster.start_node(agent)?;
    let committed = async |cluster: &Cluster, bytes: u64| {
        until("all to be committed", LIMIT, async || {
            let committed = cluster.agent_committed(0).await?;
            ensure!(committed >= bytes, "{committed} of {bytes} bytes are");
            Ok(Some(()))
        })
        .await
    };
    committed(cluster, bytes).await?;
    let found = begun.elapsed();
    let start = Usage::of(cluster.pid(agent)?)?;

    let (quiet_begun, before) = (Instant::now(), start);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let quiet = share(before, Usage::of(cluster.pid(agent)?)?, quiet_begun);

    let (active_begun, before) = (Instant::now(), Usage::of(cluster.pid(agent)?)?);
    for _ in 0..seconds {
        let second = Instant::now();
        for file in 0..active {
            bytes += append(&path(&directory, file * (files / active.max(1)).max(1)), &mut log, number, 1)?;
            number += 1;
        }
        tokio::time::sleep(Duration::from_secs(1).saturating_sub(second.elapsed())).await;
    }
    let busy = share(before, Usage::of(cluster.pid(agent)?)?, active_begun);
    committed(cluster, bytes).await?;
    let end = Usage::of(cluster.pid(agent)?)?;
    let open = cluster.metric(agent, "tributary_agent_open_files").await?;
    let scan = cluster.metric(agent, "tributary_agent_last_scan_ms").await?;
    cluster.stop_all().await?;

    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut text = format!(
        "An agent with its defaults, {files} files in a directory with {foreign} others:\n\n| | |\n|---|---:|\n"
    );
    for (what, value) in [
        ("from its start until all is found, shipped and committed", format!("{:.1} s", found.as_secs_f64())),
        ("CPU time for that", format!("{:.2} s", start.cpu.as_secs_f64())),
        ("one scan", format!("{scan} ms")),
        ("while nothing is written", format!("{quiet:.2} % of a core")),
        (&*format!("while {active} of the files grow by a line each second"), format!("{busy:.2} % of a core")),
        ("descriptors of log files", format!("{open}")),
        ("peak memory", format!("{:.0} MiB", mib(end.peak_bytes))),
    ] {
        text += &format!("| {what} | {value} |\n");
    }
    Ok(text)
}

/// How much of a core was used since then, in percent.
fn share(before: Usage, after: Usage, since: Instant) -> f64 {
    100.0 * (after.cpu - before.cpu).as_secs_f64() / since.elapsed().as_secs_f64()
}
