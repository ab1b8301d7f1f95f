//! Jobs over a day of hours on a real HDFS: what MapReduce, Spark and Spark's partition discovery read is exactly what the
//! manifests say, and an hour appears at once and whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::sync::Notify;
use tributary_tests::cluster::{Cluster, ClusterOptions, Role, Sink};
use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};
use tributary_tests::judge::Scenario;
use tributary_tests::published::Published;
use tributary_tests::readers::{Partitions, Reader, Tree, spark_partitions};
use tributary_tests::synthetic::AccessLog;
use tributary_tests::webhdfs::WebHdfs;

const HOURS: u64 = 24;
const LINES: u64 = 60_000;

/// What an hour's folder held when it was seen first.
type FirstSight = BTreeMap<String, BTreeSet<String>>;

/// Looks at the folders of hours until it is told to stop; each is listed as soon as it is there.
async fn watch(webhdfs: WebHdfs, days: Vec<String>, stop: Arc<Notify>) -> Result<FirstSight> {
    let mut seen = FirstSight::new();
    loop {
        for day in &days {
            for hour in webhdfs.list(day).await?.unwrap_or_default() {
                let path = format!("{day}/{}", hour.name);
                if hour.name.starts_with("hr=") && !seen.contains_key(&path) {
                    let names = webhdfs.list(&path).await?.context("an hour that was there is gone")?;
                    seen.insert(path, names.into_iter().map(|file| file.name).collect());
                }
            }
        }
        tokio::select! {
            () = stop.notified() => return Ok(seen),
            () = tokio::time::sleep(Duration::from_millis(2)) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_over_a_day_of_hours_read_what_the_manifests_say() -> Result<()> {
    let scenario = Scenario::new("hdfs: a day of hours", &Reader::ALL);
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    let sink = Sink::Hdfs { uri: hdfs.uri(), webhdfs: hdfs.webhdfs().clone(), path: "/logs".into() };
    let options = ClusterOptions { sink, bucket: "1h".into(), ..ClusterOptions::default() };
    let mut cluster = Cluster::start(options).await?;
    let outcome = async {
        cluster.stop(Role::Agent(0)).await?;
        let now = jiff::Timestamp::now().as_second();
        // Not yesterday: its last lines belong to the first hour of today, which can't be complete before it is over.
        let midnight = now - now % 86_400 - 2 * 86_400;
        let (mut log, mut text) = (AccessLog::default(), Vec::new());
        // Busy and quiet hours; and lines that are some minutes early or late, also across the hours' ends.
        let second = |serial: u64| {
            let even = serial * HOURS * 3600 / LINES;
            midnight + (even * even / (HOURS * 3600)) as i64 + (serial % 5 * (serial % 3) * 60) as i64
        };
        (0..LINES).for_each(|serial| log.line(serial, second(serial), &mut text));
        let path = cluster.log_dir(0).join("access.log");
        fs::write(&path, text)?;

        let stop = Arc::new(Notify::new());
        let days: Vec<String> = (0..2)
            .map(|day| {
                let day = jiff::Timestamp::from_second(midnight + day * 86_400)?;
                Ok(format!("/logs/nginx-access/dt={}", day.strftime("%Y-%m-%d")))
            })
            .collect::<Result<_>>()?;
        let watcher = tokio::spawn(watch(hdfs.webhdfs().clone(), days, Arc::clone(&stop)));
        cluster.run_agent_once(0).await?;
        let report = scenario.end(&mut cluster, vec![path]).await?;
        stop.notify_one();
        let first_sight = watcher.await??;
        let tree = Tree::in_hdfs(&hdfs, "/logs");
        let published = Published::look(&tree).await?;
        compare(&published, &first_sight, &spark_partitions(&tree.below(cluster.category())).await?)?;
        Ok(report)
    };
    let outcome = outcome.await;
    let report = cluster.explain(outcome)?;
    println!("{report}");
    Ok(())
}

fn compare(published: &Published, first_sight: &FirstSight, partitions: &Partitions) -> Result<()> {
    ensure!(published.hours.len() as u64 >= HOURS, "only {} hours were published", published.hours.len());
    let mut said = BTreeMap::new();
    for (folder, hour) in &published.hours {
        let (day, hr) = folder.rsplit_once("/hr=").with_context(|| format!("{folder} is no hour"))?;
        let (_, dt) = day.rsplit_once("dt=").with_context(|| format!("{folder} is of no day"))?;
        ensure!(hour.late.is_empty(), "{folder} has late files");
        let records = hour.records();
        if records > 0 {
            said.insert((dt.to_owned(), hr.to_owned()), records);
        }
        let files: BTreeSet<&str> =
            hour.files.iter().map(|file| file.path.rsplit('/').next().unwrap_or_default()).collect();
        let sight = &first_sight[&format!("/logs/{folder}")];
        let missing: Vec<_> =
            files.into_iter().chain(["_SUCCESS", "_MANIFEST.json"]).filter(|name| !sight.contains(*name)).collect();
        ensure!(missing.is_empty(), "{folder} could be seen without {missing:?}");
    }
    ensure!(partitions.all == said, "Spark found {:?}; the manifests say {said:?}", partitions.all);
    let seven: BTreeMap<_, _> = said.into_iter().filter(|((_, hr), _)| hr == "07").collect();
    ensure!(!seven.is_empty() && partitions.only_seven == seven, "of 07 Spark found {:?}", partitions.only_seven);
    Ok(())
}
