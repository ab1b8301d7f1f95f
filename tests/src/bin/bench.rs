//! What Tributary costs, beside what it must cost.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use tributary_common::config::parse_size;
use tributary_tests::benchmark::figures::Section;
use tributary_tests::benchmark::receiver::Syncs;
use tributary_tests::benchmark::{Bench, receiver};
use tributary_tests::programs::Programs;

/// Measures what Tributary costs, and prints tables in Markdown: each figure, its goal, and whether it is met.
///
/// CPU seconds are those of all threads of a process, in user space and in the kernel; memory is the most that was resident (VmHWM).
/// Baselines are measured in the same run, since the machine may be busy.
///
/// It judges nothing but its own figures: no test depends on them.
#[derive(Parser)]
#[command(after_help = "Example: cargo run --release -p tributary-tests --bin bench -- all")]
struct Arguments {
    #[command(subcommand)]
    what: What,
    /// The size of the log that is shipped.
    #[arg(long, global = true, default_value = "4GiB", value_parser = parse_size)]
    size: u64,
    /// Work in this directory; default: target/bench. The logs that are shipped lie there, too.
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(Clone, Subcommand)]
enum What {
    /// All of it, and a report with plots in the directory.
    All,
    /// An agent beside the bare compressor, and the whole way to a local directory.
    Path,
    /// The whole way to a real HDFS.
    Hdfs,
    /// Edges, nodes between and roots beside a server that does the least that one must.
    Tiers,
    /// An edge with 5,000 agents, a root with 50 open segments.
    Memory,
    /// How long a line takes to a real HDFS.
    Latency,
    /// How soon a lane with 6 GiB of unpublished data is served again.
    Recovery,
    /// Real logs of several kinds beside the bare compressor.
    Corpora,
    /// Whether an agent keeps to its `bytes_per_second`.
    Rate,
    /// How cost grows with agents, streams, line length and batch size, with plots.
    Growth,
    /// That server.
    #[command(hide = true)]
    BaselineServer {
        /// Where it writes its port.
        port_file: PathBuf,
        /// Where it writes all that it gets.
        output: PathBuf,
        /// When it syncs that.
        syncs: Syncs,
    },
}

/// What [`What::All`] is made of.
const PARTS: [What; 9] = [
    What::Path,
    What::Hdfs,
    What::Tiers,
    What::Memory,
    What::Latency,
    What::Recovery,
    What::Corpora,
    What::Rate,
    What::Growth,
];

async fn measure(bench: &Bench, part: What) -> Result<Vec<Section>> {
    match part {
        What::Path => bench.path().await,
        What::Hdfs => bench.hdfs().await,
        What::Tiers => bench.tiers().await,
        What::Memory => bench.memory().await,
        What::Latency => bench.latency().await,
        What::Recovery => bench.recovery().await,
        What::Corpora => bench.corpora().await,
        What::Rate => bench.rate().await,
        What::Growth => bench.growth().await,
        What::All | What::BaselineServer { .. } => Ok(Vec::new()),
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { what, size, dir } = Arguments::parse();
    if let What::BaselineServer { port_file, output, syncs } = &what {
        return receiver::serve(port_file, output, *syncs).await;
    }
    ensure!(!cfg!(debug_assertions), "figures of a build without optimisation say nothing: cargo run --release");
    let parent = match dir {
        Some(dir) => dir,
        None => Programs::find()?.output_folder("bench")?,
    };
    let logs = tempfile::Builder::new().prefix("logs-").tempdir_in(&parent).context("making a directory for logs")?;
    let bench = Bench { parent, logs: logs.path().into(), log_bytes: size, tier_bytes: size / 2 };
    let is_all = matches!(what, What::All);
    let parts = if is_all { PARTS.to_vec() } else { vec![what] };
    let mut sections = Vec::new();
    for part in parts {
        for section in measure(&bench, part).await? {
            println!("{}", section.markdown());
            sections.push(section);
        }
        if is_all {
            bench.write_report(&sections)?;
        }
    }
    Ok(())
}
