//! The comparison with the classic ways into HDFS, in its smallest form: that it runs, and what of its figures is a promise.

use std::time::Instant;

use anyhow::{Result, ensure};
use tributary_tests::comparison::{Options, run};

const LANES: u64 = 4;

#[tokio::test(flavor = "multi_thread")]
async fn beside_cron_jobs_writers_and_collectors_nothing_else_is_lost_or_doubled_and_files_are_few() -> Result<()> {
    let options = Options { servers: 6, hours: 1, lines_per_second: 30.0, seed: 7 };
    let begun = Instant::now();
    let compared = run(options, |what| println!("{:5} s  {what}", begun.elapsed().as_secs())).await?;
    println!("{compared}");

    let lines = compared.tributary.lines;
    ensure!(lines.written > 3000, "only {} lines were written", lines.written);
    ensure!((lines.lost_else, lines.doubled, lines.torn) == (0, 0, 0), "{lines:?}");
    let files = compared.tributary.data_files;
    ensure!((1..=LANES).contains(&files), "{files} files in an hour of {LANES} lanes");
    ensure!(compared.tributary.map_tasks == files, "{} map tasks for {files} files", compared.tributary.map_tasks);

    // What was on a lost server and not yet uploaded is gone with it: of an hour all, or seconds.
    let uploads = &compared.cron;
    ensure!(uploads.lines.lost_with_servers > lines.lost_with_servers, "{:?} and {lines:?}", uploads.lines);
    ensure!(uploads.data_files == 5, "{} uploads by the servers that are left", uploads.data_files);
    for (name, figures) in [("cron", uploads), ("direct", &compared.direct), ("collector", &compared.collector)] {
        ensure!(figures.lines.lost_else == 0, "{name}: {:?}", figures.lines);
        ensure!(figures.lines.written == lines.written, "{name}: {:?}", figures.lines);
        ensure!(figures.data_files > 0 && figures.operations() > 0, "{name}: {figures:?}");
    }
    ensure!(compared.collector.data_files > files, "a collector made only {} files", compared.collector.data_files);
    Ok(())
}
