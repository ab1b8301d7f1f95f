//! Jobs over a day of hours on a real HDFS, of several agents, lanes and roots: what MapReduce, Spark and Spark's partition discovery
//! read is exactly what the manifests say, and an hour appears at once and whole, to a job that runs meanwhile, too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tokio::sync::watch;
use tributary_tests::cluster::{Cluster, ClusterOptions, Role, Sink};
use tributary_tests::hdfs::{HdfsOptions, MiniHdfs};
use tributary_tests::judge::Scenario;
use tributary_tests::published::Published;
use tributary_tests::readers::{Partitions, Reader, Tree, lines_job, spark_partitions};
use tributary_tests::synthetic::AccessLog;
use tributary_tests::wait::until;
use tributary_tests::watch::lines_per_bucket;
use tributary_tests::webhdfs::WebHdfs;

const AGENTS: usize = 3;
const LANES: u16 = 3;
const HOURS: u64 = 24;
const LINES: u64 = 60_000;
/// So many hours are written at a time.
const HOURS_AT_ONCE: usize = 9;
const HOUR_FORM: &str = "dt=%Y-%m-%d/hr=%H";

/// Only turns a hang into a failure.
const LIMIT: Duration = Duration::from_secs(300);

/// What an hour's folder held when it was seen first.
type FirstSight = BTreeMap<String, BTreeSet<String>>;

/// The lines of each hour.
type Counts = BTreeMap<String, u64>;

/// Looks at the folders of hours until it is told to stop; each is listed as soon as it is there.
async fn watch(webhdfs: WebHdfs, days: Vec<String>, mut stop: watch::Receiver<bool>) -> Result<FirstSight> {
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
            _ = stop.wait_for(|stop| *stop) => return Ok(seen),
            () = tokio::time::sleep(Duration::from_millis(2)) => {}
        }
    }
}

/// Reads all that there is with one MapReduce job after the other, also while hours are being published; the last begins when it is
/// told to stop. Says how many have ended, and returns what each found.
async fn run_jobs(category: Tree, stop: watch::Receiver<bool>, ended: watch::Sender<usize>) -> Result<Vec<Counts>> {
    let mut found = Vec::new();
    loop {
        let is_last = *stop.borrow();
        let job = lines_job(&category).await?;
        found.push(lines_per_bucket(&job.outputs, HOUR_FORM)?);
        ended.send_replace(found.len());
        if is_last {
            return Ok(found);
        }
    }
}

/// The lines of each hour of a day and of each agent. Some are some minutes early or late, also across the hours' ends.
fn day(midnight: i64) -> Vec<[Vec<u8>; AGENTS]> {
    let mut logs: [AccessLog; AGENTS] = Default::default();
    let mut hours: BTreeMap<i64, [Vec<u8>; AGENTS]> = BTreeMap::new();
    for serial in 0..LINES {
        // Busy and quiet hours.
        let even = serial * HOURS * 3600 / LINES;
        let second = midnight + (even * even / (HOURS * 3600)) as i64 + (serial % 5 * (serial % 3) * 60) as i64;
        let agent = (serial / 7) as usize % AGENTS;
        logs[agent].line(serial, second, &mut hours.entry(second / 3600).or_default()[agent]);
    }
    hours.into_values().collect()
}

fn append(cluster: &Cluster, hours: &[[Vec<u8>; AGENTS]]) -> Result<()> {
    for agent in 0..AGENTS {
        let mut file = OpenOptions::new().append(true).create(true).open(log(cluster, agent))?;
        hours.iter().try_for_each(|hour| file.write_all(&hour[agent]))?;
    }
    Ok(())
}

fn log(cluster: &Cluster, agent: usize) -> PathBuf {
    cluster.log_dir(agent).join("access.log")
}

/// Has the agents find some hours at the same time: those who were past them before would be past them still.
async fn write(cluster: &mut Cluster, hours: &[[Vec<u8>; AGENTS]]) -> Result<()> {
    for agent in 0..AGENTS {
        cluster.signal(Role::Agent(agent), Signal::STOP)?;
    }
    append(cluster, hours)?;
    for agent in 0..AGENTS {
        cluster.signal(Role::Agent(agent), Signal::CONT)?;
    }
    Ok(())
}

/// Waits until so many hours are published.
async fn until_published(tree: &Tree, hours: usize) -> Result<()> {
    until(format!("{hours} hours to be published"), LIMIT, async || {
        let published = Published::look(tree).await?;
        Ok((published.hours.len() >= hours).then_some(()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_over_a_day_of_hours_read_what_the_manifests_say() -> Result<()> {
    let scenario = Scenario::new("hdfs: a day of hours", &Reader::ALL);
    let hdfs = MiniHdfs::start(HdfsOptions::default()).await?;
    let sink = Sink::Hdfs { uri: hdfs.uri(), webhdfs: hdfs.webhdfs().clone(), path: "/logs".into() };
    let options = ClusterOptions {
        agents: AGENTS,
        roots: 2,
        lanes: LANES,
        sink,
        bucket: "1h".into(),
        ..ClusterOptions::default()
    };
    let mut cluster = Cluster::start(options).await?;
    let outcome = async {
        let lanes: BTreeSet<u16> = (0..AGENTS).map(|agent| cluster.lane_of_agent(agent)).collect();
        ensure!(lanes.len() == usize::from(LANES), "each lane has data: {lanes:?}");
        cluster.wait_until_preferred_owners().await?;
        let now = jiff::Timestamp::now().as_second();
        // Not yesterday: its last lines belong to the first hour of today, which can't be complete before it is over.
        let midnight = now - now % 86_400 - 2 * 86_400;
        let hours = day(midnight);
        let tree = Tree::in_hdfs(&hdfs, "/logs");
        let category = tree.below(cluster.category());

        let stop = watch::Sender::new(false);
        let days: Vec<String> = (0..2)
            .map(|day| {
                let day = jiff::Timestamp::from_second(midnight + day * 86_400)?;
                Ok(format!("/logs/nginx-access/dt={}", day.strftime("%Y-%m-%d")))
            })
            .collect::<Result<_>>()?;
        let watcher = tokio::spawn(watch(hdfs.webhdfs().clone(), days, stop.subscribe()));
        let (first, rest) = hours.split_at(HOURS_AT_ONCE);
        write(&mut cluster, first).await?;
        until_published(&tree, first.len()).await?;
        let (ended, mut jobs_ended) = watch::channel(0);
        let jobs = run_jobs(category.clone(), stop.subscribe(), ended);
        let rest = async {
            for (number, chunk) in rest.chunks(HOURS_AT_ONCE).enumerate() {
                write(&mut cluster, chunk).await?;
                until_published(&tree, hours.len().min((number + 2) * HOURS_AT_ONCE)).await?;
                if number == 0 {
                    // One that has begun before the last hours were there.
                    jobs_ended.wait_for(|ended| *ended > 0).await.context("the jobs have ended")?;
                }
            }
            stop.send_replace(true);
            Ok(())
        };
        let (jobs, ()) = tokio::try_join!(jobs, rest)?;
        let first_sight = watcher.await??;
        let written = (0..AGENTS).map(|agent| log(&cluster, agent)).collect();
        let report = scenario.end(&mut cluster, written).await?;
        compare(&Published::look(&tree).await?, &first_sight, &jobs, &spark_partitions(&category).await?)?;
        Ok(report)
    };
    let outcome = outcome.await;
    let report = cluster.explain(outcome)?;
    println!("{report}");
    Ok(())
}

fn compare(published: &Published, first_sight: &FirstSight, jobs: &[Counts], partitions: &Partitions) -> Result<()> {
    ensure!(published.hours.len() as u64 >= HOURS, "only {} hours were published", published.hours.len());
    let (mut said, mut by_folder) = (BTreeMap::new(), Counts::new());
    let mut of_all_lanes = 0;
    for (folder, hour) in &published.hours {
        let (day, hr) = folder.rsplit_once("/hr=").with_context(|| format!("{folder} is no hour"))?;
        let (_, dt) = day.rsplit_once("dt=").with_context(|| format!("{folder} is of no day"))?;
        ensure!(hour.late.is_empty(), "{folder} has late files");
        let records = hour.records();
        if records > 0 {
            said.insert((dt.to_owned(), hr.to_owned()), records);
            by_folder.insert(format!("dt={dt}/hr={hr}"), records);
        }
        let lanes: BTreeSet<u16> = hour.manifests().flat_map(|one| &one.files).map(|file| file.lane).collect();
        of_all_lanes += u64::from(lanes.len() == usize::from(LANES));
        let files: BTreeSet<&str> =
            hour.files.iter().map(|file| file.path.rsplit('/').next().unwrap_or_default()).collect();
        let sight = &first_sight[&format!("/logs/{folder}")];
        let missing: Vec<_> =
            files.into_iter().chain(["_SUCCESS", "_MANIFEST.json"]).filter(|name| !sight.contains(*name)).collect();
        ensure!(missing.is_empty(), "{folder} could be seen without {missing:?}");
    }
    ensure!(of_all_lanes >= HOURS, "only {of_all_lanes} hours have files of all lanes");
    for found in jobs {
        // Nothing of an hour, or all of it.
        for (hour, lines) in found {
            ensure!(
                by_folder.get(hour) == Some(lines),
                "a job found {lines} lines of {hour}: {:?}",
                by_folder.get(hour)
            );
        }
    }
    ensure!(jobs.last() == Some(&by_folder), "MapReduce found {:?}; the manifests say {by_folder:?}", jobs.last());
    let meanwhile = jobs.iter().filter(|found| found.len() < by_folder.len()).count();
    ensure!(meanwhile > 0, "no job read while hours were published");
    println!("{} jobs, {meanwhile} of them while hours were published", jobs.len());
    ensure!(partitions.all == said, "Spark found {:?}; the manifests say {said:?}", partitions.all);
    let seven: BTreeMap<_, _> = said.into_iter().filter(|((_, hr), _)| hr == "07").collect();
    ensure!(!seven.is_empty() && partitions.only_seven == seven, "of 07 Spark found {:?}", partitions.only_seven);
    Ok(())
}
