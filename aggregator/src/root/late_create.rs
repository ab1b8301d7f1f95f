//! A file whose creation brought no answer, and that was not there when it was looked for, may come into being after all: a call
//! on the sink can wait in a queue for minutes. Nobody writes to it, no reader sees it, and the lane's next owner would delete it;
//! but a lane can have one owner for years.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use super::sink::LaneSink;

/// Pauses before the looks at whether it came. After the last one it is left to the lane's next owner.
const LOOKS: [Duration; 6] = [
    Duration::from_secs(60),
    Duration::from_secs(2 * 60),
    Duration::from_secs(4 * 60),
    Duration::from_secs(8 * 60),
    Duration::from_secs(16 * 60),
    Duration::from_secs(32 * 60),
];

/// Deletes the file when it comes, if it does. Ends when nobody listens to `owner` any more: the lane is no longer this owner's.
pub(super) async fn delete_late<T>(sink: LaneSink, name: String, owner: UnboundedSender<T>) {
    let path = sink.dir.join(&name);
    for pause in LOOKS {
        tokio::select! {
            biased;
            () = owner.closed() => return,
            () = tokio::time::sleep(pause) => {}
        }
        if !matches!(sink.dfs.stat(&path).await, Ok(Some(_))) {
            continue;
        }
        match sink.read_back(&name, 0).await {
            Ok(Some((_, 0))) => match sink.dfs.delete(&path).await {
                Ok(()) => {
                    tracing::info!(file = %path, "a file that came late, and that nobody writes to, is deleted");
                    return;
                }
                Err(error) => tracing::debug!(file = %path, %error, "a file that came late is not deleted yet"),
            },
            Ok(Some((_, len))) => {
                tracing::error!(file = %path, len, "a file came back that was gone; the lane's next owner takes what is in it");
                return;
            }
            Ok(None) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::dfs::Dfs;
    use crate::dfs::hostile::{HostileCluster, Hostility};
    use crate::root::Root;
    use crate::root::lane::LaneSettings;
    use crate::root::tests::{Log, alone, settings};
    use crate::tier::Tier;

    #[tokio::test(start_paused = true)]
    async fn a_segment_that_comes_into_being_when_it_was_given_up_does_not_stay() {
        let settings = LaneSettings { commit_interval: Duration::from_secs(1), ..settings(0) };
        let mut came_late = 0;
        for seed in 0..20 {
            let cluster = HostileCluster::new(seed, Hostility::none());
            let dfs: Arc<dyn Dfs> = Arc::new(cluster.process());
            let root = Root::keep(&dfs, &settings, BTreeMap::new(), |_| alone());
            while root.ready().is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            // The first answer waits until its agent is in the ledger.
            root.offer(vec![Log::new(1, 10, 0, 1).batch(0, 10)]).await.expect("there is room");
            cluster.set_hostility(Hostility { late_calls: 1000, ..Hostility::none() });
            root.offer(vec![Log::new(2, 10, 3_600_000, 1).batch(0, 10)]).await.expect("there is room");
            tokio::time::sleep(Duration::from_millis(1500)).await;
            cluster.set_hostility(Hostility::none());
            tokio::time::sleep(Duration::from_secs(10 * 60)).await;
            let samples = root.metrics().flat_map(|(_, lane)| lane.samples());
            let failed: u64 =
                samples.filter(|sample| sample.0.contains("segments_failed")).map(|sample| sample.3).sum();
            let is_data = |path: &&crate::dfs::DfsPath| path.name().ends_with(".gz");
            let files = cluster.files();
            let left: Vec<_> = files.keys().filter(is_data).collect();
            // One that came before it was read back is a closed file without frames, which goes with its hour.
            let known = root.status().await["lanes"]["0"]["segments"]["closed"].as_u64().expect("a number");
            assert_eq!(left.len() as u64, 1 + known, "seed {seed}: {left:?}");
            came_late += failed - known;
            root.drain().await;
        }
        assert!(came_late > 0, "no creation came late");
    }
}
