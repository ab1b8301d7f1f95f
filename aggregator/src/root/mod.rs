//! The root: merges batches into few large files, each record once, and publishes complete hours.
//!
//! A root watches all lanes and owns some ([`ownership`]). Each that it owns has a task of its own ([`lane`]) that is started when
//! the lane was taken ([`recovery`]) and ends when it is drained or another root took it. [`Root`] hands every batch to the task
//! of its lane, or says which root has the lane.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::ids::{CategoryName, LaneId, NodeName};
use tributary_common::messages::{Answer, PositionsQuery, Verdict};
use tributary_common::report::{Report, ReportAnswer};
use tributary_common::topology::{OnMissing, Topology};

use self::keeper::{Keeper, Shown, State};
use self::lane::{CategorySettings, LaneSettings, Request};
use self::metrics::LaneMetrics;
use self::ownership::{Rules, Word};
use self::roster::MemberView;
use crate::dfs::Dfs;
use crate::surroundings::WallClock;
use crate::tier::{Elsewhere, Overloaded, Received, Tier};

pub mod hours;
pub mod ingest;
pub mod jobs;
mod keeper;
pub mod lane;
mod late_create;
pub mod ledger;
pub mod marks;
pub mod metrics;
pub mod open_hours;
pub mod ownership;
pub mod patience;
pub mod placement;
pub mod recovery;
pub mod relane;
pub mod roster;
pub mod segment;
pub mod sink;
#[cfg(test)]
mod storm;
#[cfg(test)]
mod tests;

/// When a sender that was refused comes again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How often a root that leaves looks whether another one has its lanes.
const HAND_OVER_LOOK: Duration = Duration::from_millis(500);

/// How many times the bytes of a commit may wait for the sink before batches are refused for a while.
const UNCOMMITTED_COMMITS: u64 = 4;

/// All lanes, of which this process owns some.
pub struct Root {
    dfs: Arc<dyn Dfs>,
    lanes: BTreeMap<LaneId, Slot>,
    /// Where the roots are.
    nodes: BTreeMap<NodeName, Endpoint>,
    stop: CancellationToken,
}

/// A lane at this root, whether it owns it or not.
struct Slot {
    shown: Shown,
    metrics: LaneMetrics,
    rules: Rules,
    task: Mutex<Option<JoinHandle<()>>>,
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
            forget_agents_after: topology.roster().forget_after,
            publish_partial: root.on_missing == OnMissing::Publish,
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
                        give_up_after: category.give_up_after,
                    };
                    (name.clone(), settings)
                })
                .collect(),
        }
    }
}

impl Root {
    /// Starts to watch all lanes, and to take those that it is this node's turn to have. Returns at once: a lane serves when it
    /// has been read back.
    #[must_use]
    pub fn start(dfs: &Arc<dyn Dfs>, topology: &Topology, name: &NodeName) -> Self {
        let roots = &topology.root_tier().nodes;
        let nodes = roots.iter().map(|node| (node.name.clone(), node.endpoint.clone())).collect();
        let takeover_after = topology.root().takeover_after;
        let rules = |lane: LaneId| Rules {
            me: name.clone(),
            order: topology.roots_of(lane).into_iter().map(|node| node.name.clone()).collect(),
            takeover_after,
            jitter: takeover_after.mul_f64(rand::random_range(0.0..0.5)),
        };
        Self::keep(dfs, &LaneSettings::of(topology), nodes, rules)
    }

    /// Keeps all lanes by the rules of each. `nodes`: where the roots are.
    #[must_use]
    pub fn keep(
        dfs: &Arc<dyn Dfs>,
        settings: &LaneSettings,
        nodes: BTreeMap<NodeName, Endpoint>,
        rules: impl Fn(LaneId) -> Rules,
    ) -> Self {
        let stop = CancellationToken::new();
        let start = |lane| {
            let (shown, metrics, rules) = (Shown::new(), LaneMetrics::default(), rules(lane));
            let keeper = Keeper {
                dfs: Arc::clone(dfs),
                lane,
                settings: settings.clone(),
                rules: rules.clone(),
                metrics: metrics.clone(),
                shown: shown.clone(),
                stop: stop.clone(),
            };
            (lane, Slot { shown, metrics, rules, task: Mutex::new(Some(tokio::spawn(keeper.run()))) })
        };
        let lanes = settings.lanes.lanes().map(start).collect();
        Self { dfs: Arc::clone(dfs), lanes, nodes, stop }
    }

    /// Commits what there is, closes all files, writes the ledgers, says goodbye to the other roots, and ends.
    pub async fn drain(&self) {
        self.stop.cancel();
        for slot in self.lanes.values() {
            let task = slot.task.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(task) = task {
                // It ends by itself; one that panicked has ended, too.
                let _ = task.await;
            }
        }
    }

    /// Ends the lanes' tasks in the middle of whatever they do, as a crash would; what they started beside them goes on.
    #[cfg(any(test, feature = "test-support"))]
    pub fn abandon(&self) {
        for slot in self.lanes.values() {
            if let Some(task) = slot.task.lock().unwrap_or_else(PoisonError::into_inner).take() {
                task.abort();
            }
        }
    }

    /// Does as [`Self::drain`], and waits until the other roots have this one's lanes: who still asks here is sent to them, and
    /// nobody meets a closed door. It waits for a while only, since there may be no other.
    pub async fn hand_over(&self) {
        let had = self.lanes.iter().filter(|(_, slot)| matches!(slot.shown.get(), State::Serving(_) | State::Leaving));
        let had: Vec<(LaneId, &Slot)> = had.map(|(lane, slot)| (*lane, slot)).collect();
        self.drain().await;
        if self.nodes.len() < 2 {
            return;
        }
        let begun = Instant::now();
        for (lane, slot) in had {
            let rules = &slot.rules;
            loop {
                if let Ok(look) = marks::look(&*self.dfs, lane).await
                    && let Some(mark) = look.mark.filter(|mark| mark.root != rules.me && mark.word == Word::Here)
                {
                    slot.shown.set(State::Elsewhere(Some(mark.root)));
                    break;
                }
                if begun.elapsed() >= rules.takeover_after {
                    tracing::warn!(%lane, "no other root has taken the lane; it is free for whoever comes");
                    break;
                }
                tokio::time::sleep(rules.beat().min(HAND_OVER_LOOK)).await;
            }
        }
    }

    /// The counters of each lane.
    pub fn metrics(&self) -> impl Iterator<Item = (LaneId, &LaneMetrics)> {
        self.lanes.iter().map(|(lane, slot)| (*lane, &slot.metrics))
    }

    /// The lane's task, or where to go instead.
    fn serving(&self, lane: LaneId) -> Result<mpsc::Sender<Request>, Overloaded> {
        let Some(slot) = self.lanes.get(&lane) else {
            return Err(Overloaded::new(format!("there is no lane {lane}"), RETRY_AFTER));
        };
        let reason = match slot.shown.get() {
            State::Serving(requests) => return Ok(requests),
            State::Taking(None) => format!("lane {lane} is being recovered"),
            State::Taking(Some(why)) => why,
            State::Leaving | State::Stopped => {
                let reason = format!("lane {lane} is being given up here");
                return Err(Overloaded::go(reason, RETRY_AFTER, Elsewhere::Sibling));
            }
            State::Elsewhere(Some(owner)) => {
                let reason = format!("{owner} owns lane {lane}");
                return Err(match self.nodes.get(&owner) {
                    Some(node) => Overloaded::go(reason, RETRY_AFTER, Elsewhere::Node(node.clone())),
                    None => Overloaded::new(reason, RETRY_AFTER),
                });
            }
            State::Elsewhere(None) => format!("another root is taking lane {lane}"),
        };
        Err(Overloaded::new(reason, RETRY_AFTER))
    }

    /// Asks the task of a lane.
    async fn request<R>(
        &self,
        lane: LaneId,
        request: impl FnOnce(oneshot::Sender<R>) -> Request,
    ) -> Result<R, Overloaded> {
        let gone = || Overloaded::new(format!("the owner of lane {lane} has just stopped"), RETRY_AFTER);
        let requests = self.serving(lane)?;
        let (reply, answered) = oneshot::channel();
        requests.send(request(reply)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())
    }

    /// Expects nothing more of the agent with this id or host name, in this category or in all, in the lanes that are served here.
    /// Returns in how many categories it was, by lane; none for lanes that are not served here.
    pub async fn retire(&self, name: &str, category: Option<&CategoryName>) -> BTreeMap<LaneId, Option<usize>> {
        let mut counts = BTreeMap::new();
        for lane in self.lanes.keys() {
            let asked = self.request(*lane, |reply| Request::Retire(name.to_owned(), category.cloned(), reply)).await;
            counts.insert(*lane, asked.ok());
        }
        counts
    }

    /// The agents of the lanes that are served here.
    pub async fn agents(&self) -> BTreeMap<LaneId, Vec<MemberView>> {
        let mut agents = BTreeMap::new();
        for lane in self.lanes.keys() {
            if let Ok(members) = self.request(*lane, Request::Agents).await {
                agents.insert(*lane, members);
            }
        }
        agents
    }

    /// Hands the parts of a request to the tasks of their lanes. What is for a lane that is not served here waits, unless that
    /// is all of it.
    async fn ask<T>(
        &self,
        parts: BTreeMap<LaneId, Vec<(usize, tributary_common::ids::StreamId, T)>>,
        request: impl Fn(Vec<T>, oneshot::Sender<Result<Vec<Answer>, Overloaded>>) -> Request,
    ) -> Result<Vec<Answer>, Overloaded> {
        let mut answers: BTreeMap<usize, Answer> = BTreeMap::new();
        let mut refused = None;
        let mut served = false;
        for (lane, parts) in parts {
            let (places, asked): (Vec<_>, Vec<T>) =
                parts.into_iter().map(|(index, stream, asked)| ((index, stream), asked)).unzip();
            let given = self.request(lane, |reply| request(asked, reply)).await;
            match given.and_then(|given| given) {
                Ok(given) => {
                    served = true;
                    answers.extend(places.into_iter().map(|(index, _)| index).zip(given));
                }
                Err(why) => {
                    let wait = |(index, stream)| {
                        let verdict = Verdict::Wait { reason: why.reason.clone() };
                        (index, Answer { stream, next: None, committed: None, owner: None, verdict })
                    };
                    answers.extend(places.into_iter().map(wait));
                    refused.get_or_insert(why);
                }
            }
        }
        match refused {
            Some(why) if !served => Err(why),
            _ => Ok(answers.into_values().collect()),
        }
    }
}

#[async_trait]
impl Tier for Root {
    async fn offer(&self, batches: Vec<Received>) -> Result<Vec<Answer>, Overloaded> {
        let mut parts: BTreeMap<LaneId, Vec<_>> = BTreeMap::new();
        for (index, received) in batches.into_iter().enumerate() {
            let header = &received.batch.header;
            parts.entry(header.lane).or_default().push((index, header.stream, received));
        }
        self.ask(parts, Request::Offer).await
    }

    async fn positions(&self, query: PositionsQuery) -> Result<Vec<Answer>, Overloaded> {
        let mut parts: BTreeMap<LaneId, Vec<_>> = BTreeMap::new();
        for (index, asked) in query.streams.into_iter().enumerate() {
            parts.entry(asked.lane).or_default().push((index, asked.stream, asked));
        }
        self.ask(parts, |streams, reply| Request::Positions(PositionsQuery { streams }, reply)).await
    }

    async fn reports(&self, reports: Vec<Report>) -> Result<Vec<ReportAnswer>, Overloaded> {
        let mut parts: BTreeMap<LaneId, Vec<Report>> = BTreeMap::new();
        for report in reports {
            parts.entry(report.lane).or_default().push(report);
        }
        let (mut answers, mut refused, mut served) = (Vec::new(), None, false);
        for (lane, reports) in parts {
            match self.request(lane, |reply| Request::Reports(reports, reply)).await {
                Ok(Ok(given)) => {
                    served = true;
                    answers.extend(given);
                }
                Ok(Err(why)) | Err(why) => {
                    refused.get_or_insert(why);
                }
            }
        }
        match refused {
            // Some were heard. The others are sent again in a few seconds, as everything is.
            Some(why) if !served => Err(why),
            _ => Ok(answers),
        }
    }

    async fn status(&self) -> serde_json::Value {
        let mut lanes = BTreeMap::new();
        for lane in self.lanes.keys() {
            let status = match self.serving(*lane) {
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
        let reasons: Vec<String> = self
            .lanes
            .iter()
            .filter_map(|(lane, slot)| match slot.shown.get() {
                State::Serving(_) | State::Elsewhere(_) => None,
                State::Taking(_) | State::Leaving | State::Stopped => Some(self.serving(*lane).err()?.reason),
            })
            .collect();
        if reasons.is_empty() { Ok(()) } else { Err(reasons.join("; ")) }
    }
}
