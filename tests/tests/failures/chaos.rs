//! A minute of random faults on a whole tree of real processes, on local files and on HDFS. For longer: `--bin chaos`.

use std::time::Duration;

use anyhow::Result;
use tributary_tests::chaos::{ChaosOptions, SinkKind, run};

/// Other seeds than these are for the command; these make the tests run the same plan each time.
const SEED: u64 = 20_261_122;

async fn a_short_one(name: &str, sink: SinkKind) -> Result<()> {
    let options = ChaosOptions { seed: SEED, duration: Duration::from_secs(45), sink, per_second: 500 };
    let report = run(name, &options, |line| println!("{line}")).await?;
    println!("{report}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn in_chaos_every_line_is_published_once() -> Result<()> {
    a_short_one("chaos", SinkKind::File).await
}

#[tokio::test(flavor = "multi_thread")]
async fn in_chaos_on_hdfs_every_line_is_published_once() -> Result<()> {
    a_short_one("hdfs: chaos", SinkKind::Hdfs).await
}
