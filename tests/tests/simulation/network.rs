//! A network that loses, doubles, delays and reorders requests and answers and falls into parts, and processes that are stopped,
//! go on, and die.
//!
//! What travels is HTTP as the programs speak it, without the bytes of its framing: a request goes to the receiver of a node, and
//! who asked makes of the response what the program makes of it.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tributary_aggregator::forward::{Failed, Failure, Upstream, Way, understand};
use tributary_aggregator::receive::Receiver;
use tributary_aggregator::tier::Tier;
use tributary_common::http::body::BodyError;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::http::pool::Trouble;
use tributary_common::messages::{
    Answer, Answers, BATCHES_CONTENT_TYPE, BATCHES_PATH, POSITIONS_PATH, PositionsQuery, REPORTS_PATH,
};
use tributary_common::report::{ReportAnswer, ReportAnswers, Reports};
use xxhash_rust::xxh3::xxh3_64;

use crate::chance::{Chance, Trace, locked};
use crate::judge::Judge;

/// What an asker waits for an answer.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Running,
    Stopped,
    Dead,
}

/// One process, as signals see it. Whatever it does outside of itself passes here first.
#[derive(Clone)]
pub(crate) struct Gate {
    pub(crate) name: Arc<str>,
    condition: Arc<Mutex<Condition>>,
    /// Wakes in the order of waiting, as other channels don't.
    changed: Arc<Notify>,
}

impl Gate {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.into(), condition: Arc::new(Mutex::new(Condition::Running)), changed: Arc::default() }
    }

    fn set(&self, condition: Condition) {
        let mut now = locked(&self.condition);
        if *now != Condition::Dead {
            *now = condition;
            self.changed.notify_waiters();
        }
    }

    pub(crate) fn stop(&self) {
        self.set(Condition::Stopped);
    }

    pub(crate) fn resume(&self) {
        self.set(Condition::Running);
    }

    pub(crate) fn kill(&self) {
        self.set(Condition::Dead);
    }

    pub(crate) fn is_running(&self) -> bool {
        *locked(&self.condition) == Condition::Running
    }

    pub(crate) fn is_dead(&self) -> bool {
        *locked(&self.condition) == Condition::Dead
    }

    async fn until(&self, condition: Condition) {
        loop {
            let changed = self.changed.notified();
            if *locked(&self.condition) == condition {
                return;
            }
            changed.await;
        }
    }

    /// Returns when the process runs. Never, once it is dead.
    pub(crate) async fn pass(&self) {
        self.until(Condition::Running).await;
    }

    /// Does `work` unless the process dies before.
    pub(crate) async fn while_alive<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.until(Condition::Dead) => None,
            done = work => Some(done),
        }
    }
}

/// How bad the network is; per mille of all requests.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weather {
    pub(crate) lost: u64,
    pub(crate) unanswered: u64,
    pub(crate) doubled: u64,
    pub(crate) delayed: u64,
}

/// What serves at an address.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) gate: Gate,
    pub(crate) receiver: Arc<Receiver<Arc<dyn Tier>>>,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<String, Node>,
    weather: Weather,
    /// Pairs that don't reach each other.
    parted: BTreeSet<(String, String)>,
}

#[derive(Clone)]
pub(crate) struct Network {
    state: Arc<Mutex<State>>,
    chance: Chance,
    trace: Trace,
    judge: Judge,
}

pub(crate) struct Response {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// A request: to whom, what for, and what it carries.
#[derive(Clone)]
pub(crate) struct Letter {
    pub(crate) to: Endpoint,
    pub(crate) path: &'static str,
    pub(crate) content_type: &'static str,
    pub(crate) body: Bytes,
}

impl Letter {
    pub(crate) fn positions(to: &Endpoint, query: &PositionsQuery) -> Self {
        let body = serde_json::to_vec(query).expect("plain data").into();
        Self { to: to.clone(), path: POSITIONS_PATH, content_type: "application/json", body }
    }

    pub(crate) fn reports(to: &Endpoint, reports: &Reports) -> Self {
        let body = serde_json::to_vec(reports).expect("plain data").into();
        Self { to: to.clone(), path: REPORTS_PATH, content_type: "application/json", body }
    }

    pub(crate) fn batches(to: &Endpoint, pieces: &[Bytes]) -> Self {
        let body = pieces.concat().into();
        Self { to: to.clone(), path: BATCHES_PATH, content_type: BATCHES_CONTENT_TYPE, body }
    }
}

pub(crate) fn endpoint(name: &str) -> Endpoint {
    Endpoint::at(&format!("{name}:1")).expect("a name and a port")
}

fn name_of(endpoint: &Endpoint) -> String {
    let text = endpoint.as_str();
    text.trim_start_matches("http://").trim_end_matches(":1").to_owned()
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Network {
    pub(crate) fn new(chance: Chance, trace: Trace, judge: Judge) -> Self {
        Self { state: Arc::default(), chance, trace, judge }
    }

    pub(crate) fn set_weather(&self, weather: Weather) {
        locked(&self.state).weather = weather;
    }

    /// From now on two nodes don't reach each other.
    pub(crate) fn part(&self, one: &str, other: &str) {
        locked(&self.state).parted.insert((one.into(), other.into()));
    }

    pub(crate) fn heal(&self) {
        locked(&self.state).parted.clear();
    }

    pub(crate) fn serve(&self, node: Node) {
        locked(&self.state).nodes.insert(node.gate.name.to_string(), node);
    }

    fn are_parted(&self, one: &str, other: &str) -> bool {
        let state = locked(&self.state);
        state.parted.iter().any(|(a, b)| (a == one && b == other) || (a == other && b == one))
    }

    fn node(&self, name: &str) -> Option<Node> {
        locked(&self.state).nodes.get(name).filter(|node| !node.gate.is_dead()).cloned()
    }

    /// Hands a request to a node, as a task of that node's process. `reply` hears the response when it leaves.
    fn hand_over(&self, node: Node, letter: Letter, reply: Option<oneshot::Sender<Response>>) -> JoinHandle<()> {
        let network = self.clone();
        tokio::spawn(async move {
            let served = async {
                node.gate.pass().await;
                let body = Full::new(letter.body).map_err(|never| -> BodyError { match never {} });
                let request = Request::post(letter.path).header(CONTENT_TYPE, letter.content_type).body(body);
                let response = node.receiver.handle(request.expect("a good request")).await;
                node.gate.pass().await;
                let (head, body) = response.into_parts();
                let body = body.collect().await.expect("a body in memory").to_bytes();
                network.judge.answered(&node.gate.name, head.status, &body);
                if let Some(reply) = reply {
                    // Whoever gave up waiting doesn't hear it.
                    let _ = reply.send(Response { status: head.status, headers: head.headers, body });
                }
            };
            node.gate.while_alive(served).await;
        })
    }

    /// Sends a request and waits for the response.
    pub(crate) async fn post(&self, from: &Gate, letter: Letter) -> Result<Response, String> {
        from.pass().await;
        let (to, path, hash) = (name_of(&letter.to), letter.path, xxh3_64(&letter.body));
        self.trace.add(|| format!("{} -> {to} {path} {} bytes {hash:016x}", from.name, letter.body.len()));
        let carried = tokio::time::timeout(REQUEST_TIMEOUT, self.carry(&from.name, &to, letter)).await;
        from.pass().await;
        let outcome = carried.unwrap_or_else(|_| Err("no answer in time".to_owned()));
        self.trace.add(|| match &outcome {
            Ok(Response { status, body, .. }) => {
                format!("{} <- {to} {status} {}", from.name, String::from_utf8_lossy(body))
            }
            Err(error) => format!("{} <- {to} {error}", from.name),
        });
        outcome
    }

    async fn carry(&self, from: &str, to: &str, letter: Letter) -> Result<Response, String> {
        let weather = locked(&self.state).weather;
        let chance = &self.chance;
        tokio::time::sleep(chance.up_to(Duration::from_millis(20))).await;
        if self.are_parted(from, to) {
            return if chance.one_in(2) { Err("connection refused".into()) } else { pending().await };
        }
        if chance.per_mille(weather.lost) {
            return pending().await;
        }
        if chance.per_mille(weather.delayed) {
            tokio::time::sleep(chance.up_to(2 * REQUEST_TIMEOUT)).await;
        }
        let Some(node) = self.node(to) else { return Err("connection refused".into()) };
        if chance.per_mille(weather.doubled) {
            let (network, twin, pause) = (self.clone(), letter.clone(), chance.up_to(Duration::from_secs(60)));
            let to = to.to_owned();
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                if let Some(node) = network.node(&to) {
                    network.hand_over(node, twin, None);
                }
            });
        }
        let (reply, answered) = oneshot::channel();
        let serving = self.hand_over(node, letter, Some(reply));
        // A server notices that nobody listens any more, or doesn't.
        let _noticed = chance.one_in(2).then(|| AbortOnDrop(serving));
        let response = answered.await.map_err(|_| "connection closed".to_owned())?;
        if chance.per_mille(weather.unanswered) {
            return if chance.one_in(2) { Err("connection reset".into()) } else { pending().await };
        }
        if chance.per_mille(weather.delayed) {
            tokio::time::sleep(chance.up_to(2 * REQUEST_TIMEOUT)).await;
        }
        tokio::time::sleep(chance.up_to(Duration::from_millis(20))).await;
        if self.are_parted(from, to) { pending().await } else { Ok(response) }
    }
}

/// The way up from an edge.
pub(crate) struct Wire {
    pub(crate) network: Network,
    pub(crate) gate: Gate,
}

impl Wire {
    async fn ask<T: DeserializeOwned>(&self, letter: Letter) -> Result<T, Failed> {
        let (node, path) = (letter.to.clone(), letter.path);
        match self.network.post(&self.gate, letter).await {
            Ok(response) => understand(&node, path, response.status, &response.headers, &response.body),
            Err(error) => Err(Failed { url: node.url(path), error, failure: Failure::Trouble(Trouble::Broken) }),
        }
    }
}

#[async_trait]
impl Upstream for Wire {
    async fn batches(&self, way: &Way, pieces: Vec<Bytes>) -> Result<Vec<Answer>, Failed> {
        self.ask(Letter::batches(&way.node, &pieces)).await.map(|answers: Answers| answers.answers)
    }

    async fn positions(&self, way: &Way, query: &PositionsQuery) -> Result<Vec<Answer>, Failed> {
        self.ask(Letter::positions(&way.node, query)).await.map(|answers: Answers| answers.answers)
    }

    async fn reports(&self, way: &Way, reports: &Reports) -> Result<Vec<ReportAnswer>, Failed> {
        self.ask(Letter::reports(&way.node, reports)).await.map(|answers: ReportAnswers| answers.answers)
    }
}
