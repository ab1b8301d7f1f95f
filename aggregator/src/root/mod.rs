//! The root: merges batches into few large files, each record once, and publishes complete hours.
//!
//! A root owns lanes. Each has a task of its own ([`lane`]) that is started when the lane was taken ([`recovery`]) and ends when
//! it is drained or another root took it. [`Root`] hands every batch to the task of its lane.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tributary_common::ids::{LaneId, NodeName};
use tributary_common::messages::{Answer, PositionsQuery, Verdict};
use tributary_common::topology::Topology;

use self::lane::{CategorySettings, Ended, LaneSettings, Request, WallClock};
use self::metrics::LaneMetrics;
use crate::dfs::Dfs;
use crate::tier::{Overloaded, Received, Tier};

pub mod hours;
pub mod ingest;
pub mod lane;
pub mod ledger;
pub mod metrics;
pub mod recovery;
pub mod replication;
pub mod segment;
pub mod sink;
#[cfg(test)]
mod storm;
#[cfg(test)]
mod tests;

/// Requests that may wait for a lane's task. Their bytes are bounded where they are received.
const QUEUE: usize = 64;

/// When a sender that was refused comes again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The pause before a lane that could not be taken is tried again.
const TAKE_PAUSE: Duration = Duration::from_secs(5);

/// How many times the bytes of a commit may wait for the sink before batches are refused for a while.
const UNCOMMITTED_COMMITS: u64 = 4;

/// The lanes that this process owns.
pub struct Root {
    lanes: BTreeMap<LaneId, Slot>,
}

/// A lane that this root is to own, whether it has it or not.
struct Slot {
    state: Arc<Mutex<State>>,
    metrics: LaneMetrics,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Clone)]
enum State {
    /// Being taken and read back; why it takes long, if it does.
    Taking(Option<String>),
    Serving(mpsc::Sender<Request>),
    /// Another root has it.
    Lost,
    Stopped,
}

impl Slot {
    fn state(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The lane's task, or why there is none.
    fn serving(&self, lane: LaneId) -> Result<mpsc::Sender<Request>, Overloaded> {
        let reason = match self.state() {
            State::Serving(requests) => return Ok(requests),
            State::Taking(None) => format!("lane {lane} is being recovered"),
            State::Taking(Some(why)) => why,
            State::Lost => format!("another root has taken lane {lane}"),
            State::Stopped => "this root is stopping".to_owned(),
        };
        Err(Overloaded { reason, retry_after: RETRY_AFTER })
    }
}

impl LaneSettings {
    /// What the topology says about every lane.
    #[must_use]
    pub fn of(topology: &Topology) -> Self {
        let (root, sink) = (topology.root(), topology.sink());
        Self {
            lanes: topology.lanes(),
            commit_interval: root.commit_interval,
            commit_bytes: root.commit_bytes,
            ledger_interval: root.ledger_interval,
            settle: root.settle,
            stream_ttl: root.stream_ttl,
            max_open_files: root.max_open_files as usize,
            recompress_below: root.recompress_below,
            max_uncommitted_bytes: root.commit_bytes.saturating_mul(UNCOMMITTED_COMMITS),
            success_file: root.success_file.clone(),
            replication: sink.replication,
            min_replication: sink.min_replication,
            sync_timeout: sink.sync_timeout,
            clock: WallClock::system(),
            categories: topology
                .categories()
                .iter()
                .map(|(name, category)| {
                    let settings = CategorySettings {
                        bucket: category.bucket,
                        roll_size: category.roll_size,
                        idle_timeout: category.idle_timeout,
                        close_delay: category.close_delay,
                    };
                    (name.clone(), settings)
                })
                .collect(),
        }
    }
}

impl Root {
    /// Starts to take the lanes that the topology prefers on this node. Returns at once: a lane serves when it has been read
    /// back.
    #[must_use]
    pub fn start(dfs: &Arc<dyn Dfs>, topology: &Topology, name: &NodeName) -> Self {
        let settings = LaneSettings::of(topology);
        let mine = topology.lanes().lanes().filter(|lane| topology.preferred_root(*lane).name == *name);
        Self { lanes: mine.map(|lane| (lane, Slot::start(Arc::clone(dfs), lane, settings.clone()))).collect() }
    }

    /// Commits what there is, closes all files, writes the ledgers, and ends the lanes' tasks.
    pub async fn drain(&self) {
        for slot in self.lanes.values() {
            let before =
                std::mem::replace(&mut *slot.state.lock().unwrap_or_else(PoisonError::into_inner), State::Stopped);
            if let State::Serving(requests) = before {
                let (done, drained) = oneshot::channel();
                if requests.send(Request::Drain(done)).await.is_ok() {
                    let _ = drained.await;
                }
            }
            let task = slot.task.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(task) = task {
                task.abort();
            }
        }
    }

    /// The counters of each lane.
    pub fn metrics(&self) -> impl Iterator<Item = (LaneId, &LaneMetrics)> {
        self.lanes.iter().map(|(lane, slot)| (*lane, &slot.metrics))
    }
}

impl Slot {
    fn start(dfs: Arc<dyn Dfs>, lane: LaneId, settings: LaneSettings) -> Self {
        let state = Arc::new(Mutex::new(State::Taking(None)));
        let metrics = LaneMetrics::default();
        let task = tokio::spawn(own(dfs, lane, settings, metrics.clone(), Arc::clone(&state)));
        Self { state, metrics, task: Mutex::new(Some(task)) }
    }
}

/// Takes a lane and serves it until it is drained or lost.
async fn own(dfs: Arc<dyn Dfs>, lane: LaneId, settings: LaneSettings, metrics: LaneMetrics, state: Arc<Mutex<State>>) {
    let set = |new: State| *state.lock().unwrap_or_else(PoisonError::into_inner) = new;
    let taken = loop {
        let now_ms = settings.clock.now_ms();
        let stream_ttl_ms = i64::try_from(settings.stream_ttl.as_millis()).unwrap_or(i64::MAX);
        let taken = async {
            recovery::check_base(&*dfs, settings.lanes).await?;
            recovery::take(&dfs, lane, stream_ttl_ms, now_ms).await
        };
        match taken.await {
            Ok(taken) => break taken,
            Err(error) => {
                tracing::error!(%lane, %error, "the lane can't be taken; trying again");
                set(State::Taking(Some(error.to_string())));
                tokio::time::sleep(TAKE_PAUSE).await;
            }
        }
    };
    let (requests, queue) = mpsc::channel(QUEUE);
    set(State::Serving(requests));
    match lane::run(dfs, lane, taken, settings, metrics, queue).await {
        Ended::Drained => set(State::Stopped),
        Ended::Fenced => set(State::Lost),
    }
}

#[async_trait]
impl Tier for Root {
    async fn offer(&self, batches: Vec<Received>) -> Result<Vec<Answer>, Overloaded> {
        let count = batches.len();
        let mut by_lane: BTreeMap<LaneId, (Vec<usize>, Vec<Received>)> = BTreeMap::new();
        let mut answers: Vec<Option<Answer>> = vec![None; count];
        for (index, received) in batches.into_iter().enumerate() {
            let header = &received.batch.header;
            if self.lanes.contains_key(&header.lane) {
                let (places, batches) = by_lane.entry(header.lane).or_default();
                places.push(index);
                batches.push(received);
            } else {
                answers[index] = Some(elsewhere(header.stream, header.lane));
            }
        }
        for (lane, (places, batches)) in by_lane {
            let requests = self.lanes[&lane].serving(lane)?;
            let (reply, answered) = oneshot::channel();
            let gone = || Overloaded {
                reason: format!("the owner of lane {lane} has just stopped"),
                retry_after: RETRY_AFTER,
            };
            requests.send(Request::Offer(batches, reply)).await.map_err(|_| gone())?;
            let given = answered.await.map_err(|_| gone())??;
            for (place, answer) in places.into_iter().zip(given) {
                answers[place] = Some(answer);
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    async fn positions(&self, query: PositionsQuery) -> Result<Vec<Answer>, Overloaded> {
        let mut by_lane: BTreeMap<LaneId, (Vec<usize>, PositionsQuery)> = BTreeMap::new();
        let mut answers: Vec<Option<Answer>> = vec![None; query.streams.len()];
        for (index, asked) in query.streams.into_iter().enumerate() {
            if self.lanes.contains_key(&asked.lane) {
                let (places, streams) =
                    by_lane.entry(asked.lane).or_insert_with(|| (Vec::new(), PositionsQuery { streams: Vec::new() }));
                places.push(index);
                streams.streams.push(asked);
            } else {
                answers[index] = Some(elsewhere(asked.stream, asked.lane));
            }
        }
        for (lane, (places, query)) in by_lane {
            let requests = self.lanes[&lane].serving(lane)?;
            let (reply, answered) = oneshot::channel();
            let gone = || Overloaded {
                reason: format!("the owner of lane {lane} has just stopped"),
                retry_after: RETRY_AFTER,
            };
            requests.send(Request::Positions(query, reply)).await.map_err(|_| gone())?;
            let given = answered.await.map_err(|_| gone())?;
            for (place, answer) in places.into_iter().zip(given) {
                answers[place] = Some(answer);
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    async fn status(&self) -> serde_json::Value {
        let mut lanes = BTreeMap::new();
        for (lane, slot) in &self.lanes {
            let status = match slot.serving(*lane) {
                Ok(requests) => {
                    let (reply, answered) = oneshot::channel();
                    let sent = requests.send(Request::Status(reply)).await;
                    match (sent, answered.await) {
                        (Ok(()), Ok(status)) => status,
                        _ => serde_json::json!({ "state": "stopped" }),
                    }
                }
                Err(why) => serde_json::json!({ "state": why.reason }),
            };
            lanes.insert(lane.to_string(), status);
        }
        serde_json::json!({ "lanes": lanes })
    }

    fn ready(&self) -> Result<(), String> {
        let reasons: Vec<String> =
            self.lanes.iter().filter_map(|(lane, slot)| slot.serving(*lane).err()).map(|why| why.reason).collect();
        if reasons.is_empty() { Ok(()) } else { Err(reasons.join("; ")) }
    }
}

fn elsewhere(stream: tributary_common::ids::StreamId, lane: LaneId) -> Answer {
    Answer {
        stream,
        next: None,
        committed: None,
        owner: None,
        verdict: Verdict::Wait { reason: format!("lane {lane} belongs to another root") },
    }
}
