//! Random faults on a whole tree of real processes: `cargo run -p tributary-tests --bin chaos -- --seed 7 --duration 10m`.

use std::io::{self, Write as _};
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use jiff::{SignedDuration, Timestamp};
use tributary_tests::chaos::{ChaosOptions, SinkKind, run};

/// Runs three log writers with rotation, three agents, two edges, a node between and two roots, kills, stops, empties, disconnects
/// and fills them up at random, and compares what is published with every line that was written. Exit code 1 when a line is missing
/// or doubled; then everything is kept. As root it also fills disks.
#[derive(Parser)]
#[command(after_help = "Example: chaos --seed 7 --duration 2h --sink hdfs")]
struct Arguments {
    /// The same seed gives the same plan of faults; default: the time.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// How long faults begin, like 90s, 10m, 2h.
    #[arg(long, value_name = "D", default_value = "1m", value_parser = duration)]
    duration: Duration,
    /// Where the roots write: a local folder, or a real HDFS with three DataNodes.
    #[arg(long, value_enum, default_value = "file")]
    sink: SinkName,
    /// Lines a second, of each of the three writers.
    #[arg(long, value_name = "N", default_value_t = 500)]
    rate: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum SinkName {
    File,
    Hdfs,
}

fn duration(text: &str) -> Result<Duration, String> {
    let span: SignedDuration = text.parse().map_err(|error| format!("{error}; write it like 90s, 10m, 2h"))?;
    Duration::try_from(span).map_err(|error| error.to_string())
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { seed, duration, sink, rate } = Arguments::parse();
    let sink = match sink {
        SinkName::File => SinkKind::File,
        SinkName::Hdfs => SinkKind::Hdfs,
    };
    let seed = seed.unwrap_or_else(|| Timestamp::now().as_second().unsigned_abs());
    let options = ChaosOptions { seed, duration, sink, per_second: rate };
    let say = |line: &str| {
        // With nobody to read it the run goes on all the same.
        let _ = writeln!(io::stdout(), "{line}");
    };
    let report = run("chaos", &options, say).await?;
    write!(io::stdout(), "{report}")?;
    Ok(())
}
