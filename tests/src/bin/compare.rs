//! The classic ways into HDFS beside Tributary: `cargo run -p tributary-tests --bin compare`.

use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use tributary_tests::comparison::{Options, run};
use tributary_tests::machine::machine;

/// Ships the logs of many simulated servers into a real HDFS in four ways at the same time, and prints what each costs.
///
/// The ways: a cron upload per server and hour, an HDFS writer per server, four collectors that roll every five minutes, and
/// Tributary with four lanes. A minute of the run stands for an hour. A tenth of the servers lose their disks and processes at random
/// moments, and one collector and one root are killed and started again. It judges nothing: the tests do that.
#[derive(Parser)]
#[command(after_help = "Example: compare --minutes 4 --servers 20 --seed 7")]
struct Arguments {
    /// How many hours, of a minute each.
    #[arg(long, value_name = "N", default_value_t = 24)]
    minutes: u32,
    /// How many servers.
    #[arg(long, value_name = "N", default_value_t = 100)]
    servers: usize,
    /// Lines a second that a server writes in the mean; some write many times as much as others.
    #[arg(long, value_name = "N", default_value_t = 10.0)]
    rate: f64,
    /// The same seed gives the same rates and the same kills.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let Arguments { minutes, servers, rate, seed } = Arguments::parse();
    let begun = Instant::now();
    let options = Options { servers, hours: minutes, lines_per_second: rate, seed };
    let say = |what: &str| eprintln!("{:5} s  {what}", begun.elapsed().as_secs());
    let comparison = run(options, say).await?;
    println!("{comparison}");
    println!("{}; compare --minutes {minutes} --servers {servers} --rate {rate} --seed {seed}", machine());
    Ok(())
}
