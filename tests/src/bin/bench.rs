//! What shipping costs: an access log from the agent through an edge and a root to a local directory, beside the compressor alone.

use std::fs::{self, File};
use std::io::{BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use libdeflater::{CompressionLvl, Compressor};
use rustix::time::{ClockId, clock_gettime};
use tributary_common::config::parse_size;
use tributary_tests::cluster::{Cluster, ClusterOptions, Role};
use tributary_tests::machine::machine;
use tributary_tests::programs::Programs;
use tributary_tests::synthetic::AccessLog;
use tributary_tests::usage::Usage;
use tributary_tests::wait::until;

/// The agent's `batch.max_bytes`, unless it is configured.
const BATCH_BYTES: usize = 1 << 20;
/// The agent's `compression.level`, unless it is configured.
const LEVEL: i32 = 1;
/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(3600);

/// Measures what shipping a log costs, and prints a table in Markdown.
///
/// It makes an access log of lines of about 210 bytes, always the same but for their times, all of the present hour. The baseline is
/// the agent's compressor alone (libdeflate, level 1) over the same bytes in memory, in pieces as large as the agent's batches. Then
/// an agent, an edge and a root, all with their defaults, ship the log to a local directory, until all of it is committed. CPU
/// seconds are those of all threads, in user space and in the kernel; memory is the most that was resident (VmHWM).
///
/// It judges nothing: the tests do that.
#[derive(Parser)]
#[command(after_help = "Example: cargo run --release -p tributary-tests --bin bench -- --size 1GiB")]
struct Arguments {
    /// The log's size.
    #[arg(long, default_value = "1GiB", value_parser = parse_size)]
    size: u64,
    /// Work in this directory, which needs twice the log's size; default: target/bench.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

struct Baseline {
    cpu: Duration,
    compressed: u64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { size, dir } = Arguments::parse();
    let parent = match dir {
        Some(dir) => dir,
        None => Programs::find()?.output_folder("bench")?,
    };
    let folder = tempfile::Builder::new().prefix("run-").tempdir_in(&parent).context("making a directory")?;
    let tables = Some(String::new());
    let options =
        ClusterOptions { tables, bucket: "1h".into(), folder: Some(folder.path().into()), ..ClusterOptions::default() };
    let mut cluster = Cluster::prepare(options)?;

    let log = cluster.log_dir(0).join("access.log");
    eprintln!("writing {} ...", log.display());
    let lines = write_log(&log, size)?;
    let length = fs::metadata(&log)?.len();
    eprintln!("the compressor alone ...");
    let baseline = baseline(&log)?;
    eprintln!("agent, edge and root ...");
    let outcome = ship(&mut cluster, length).await;
    let (elapsed, usages) = cluster.explain(outcome)?;
    print!("{}", table(length, lines, &baseline, elapsed, &usages)?);
    Ok(())
}

/// Writes a log of at least `size` bytes; returns its number of lines.
fn write_log(path: &Path, size: u64) -> Result<u64> {
    let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    let mut output = BufWriter::with_capacity(1 << 20, file);
    let now = jiff::Timestamp::now().as_second();
    let (mut log, mut line) = (AccessLog::default(), Vec::new());
    let (mut lines, mut written) = (0_u64, 0_u64);
    while written < size {
        // From the hour's beginning until now, as a log of this hour would be.
        let second = now - now % 3600 + (now % 3600) * (written >> 10) as i64 / (size >> 10).max(1) as i64;
        line.clear();
        log.line(lines, second, &mut line);
        output.write_all(&line)?;
        lines += 1;
        written += line.len() as u64;
    }
    // Or the kernel would write it out while others are measured.
    output.into_inner().map_err(|error| anyhow!("writing {}: {error}", path.display()))?.sync_all()?;
    Ok(lines)
}

fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn baseline(log: &Path) -> Result<Baseline> {
    const CHUNK: u64 = 64 << 20;
    let level = CompressionLvl::new(LEVEL).map_err(|error| anyhow!("level {LEVEL}: {error:?}"))?;
    let mut compressor = Compressor::new(level);
    let mut compressed = vec![0; compressor.gzip_compress_bound(BATCH_BYTES)];
    let mut result = Baseline { cpu: Duration::ZERO, compressed: 0 };
    let input = File::open(log)?;
    let mut chunk = Vec::new();
    loop {
        chunk.clear();
        if (&input).take(CHUNK).read_to_end(&mut chunk)? == 0 {
            return Ok(result);
        }
        let before = thread_cpu();
        for piece in chunk.chunks(BATCH_BYTES) {
            let length = compressor.gzip_compress(piece, &mut compressed);
            result.compressed += length.map_err(|error| anyhow!("compressing: {error}"))? as u64;
        }
        result.cpu += thread_cpu() - before;
    }
}

/// Ships the log; returns the time from the agent's start until all is committed, and what each process used.
async fn ship(cluster: &mut Cluster, length: u64) -> Result<(Duration, Vec<(Role, Usage)>)> {
    for role in [Role::Root(0), Role::Edge(0)] {
        cluster.start_node(role)?;
        cluster.wait_until_ready(role).await?;
    }
    let begun = Instant::now();
    cluster.start_node(Role::Agent(0))?;
    until("all to be committed", LIMIT, async || {
        let committed = cluster.agent_committed(0).await?;
        ensure!(committed >= length, "{committed} of {length} bytes are");
        Ok(Some(()))
    })
    .await?;
    let elapsed = begun.elapsed();
    let roles = cluster.roles().into_iter();
    let usages = roles.map(|role| Ok((role, Usage::of(cluster.pid(role)?)?))).collect::<Result<Vec<_>>>()?;
    cluster.stop_all().await?;
    Ok((elapsed, usages))
}

fn table(length: u64, lines: u64, baseline: &Baseline, elapsed: Duration, usages: &[(Role, Usage)]) -> Result<String> {
    let of = |wanted: Role| {
        let found = usages.iter().find(|(role, _)| *role == wanted);
        found.map(|(_, usage)| *usage).with_context(|| format!("{wanted} was not measured"))
    };
    let (agent, edge, root) = (of(Role::Agent(0))?, of(Role::Edge(0))?, of(Role::Root(0))?);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let seconds = |usage: Usage| usage.cpu.as_secs_f64();
    let (total, base) = (mib(length), baseline.cpu.as_secs_f64());
    let row = |name: &str, usage: Usage, ratio: String, memory: String| {
        let (cpu, peak) = (seconds(usage), mib(usage.peak_bytes));
        format!("| {name} | {cpu:.2} | {:.0} | {ratio} | {peak:.0} {memory} |\n", total / cpu)
    };
    let of_agent = |usage: Usage| format!("{:.2} × agent (goal: at most 0.25)", seconds(usage) / seconds(agent));
    let mut text = format!(
        "{total:.0} MiB of access log ({lines} lines), compressed to {:.1} %, in {:.1} s from the agent's start until all is \
         committed: **{:.0} MiB/s**. {}.\n\n",
        100.0 * baseline.compressed as f64 / length as f64,
        elapsed.as_secs_f64(),
        total / elapsed.as_secs_f64(),
        machine(),
    );
    text += "| | CPU seconds | MiB per CPU second | CPU compared | peak memory, MiB |\n|---|---:|---:|---|---|\n";
    text += &format!("| the compressor alone | {base:.2} | {:.0} | 1 | |\n", total / base);
    let ratio = format!("{:.2} × the compressor (goal: at most 1.40)", seconds(agent) / base);
    text += &row("agent", agent, ratio, "(goal: at most 64)".into());
    text += &row("edge", edge, of_agent(edge), String::new());
    text += &row("root", root, of_agent(root), String::new());
    Ok(text)
}
