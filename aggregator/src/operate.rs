//! What operators ask of a running node: to empty itself, which agents it expects, to expect one no more.
//!
//! | request | who may | answer |
//! |---|---|---|
//! | POST [`DRAIN_PATH`] | this machine | 202, and the node ends when it is empty |
//! | GET [`AGENTS_PATH`] | everyone | `{"lanes": {"0": [{"agent": "web-1", …}]}}`: the lanes that this root serves |
//! | POST [`RETIRE_PATH`] `{"agent": "web-1"}` | the machines of the topology | `{"lanes": {"0": 1, "1": null}}`: in how many categories it was; null for a lane that is not served here |
//!
//! There is no other proof yet of who asks than the address.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Body;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::http::server::Peer;
use tributary_common::ids::CategoryName;
use tributary_common::messages::{AGENTS_PATH, DRAIN_PATH, RETIRE_PATH};

use crate::root::Root;

/// More than any name has.
const MAX_BODY_BYTES: usize = 4096;

/// Which agent is meant, by its id or its host name, and where.
#[derive(Debug, Serialize, Deserialize)]
pub struct Retire {
    /// The id or the host name.
    pub agent: String,
    /// The category; none for all.
    #[serde(default)]
    pub category: Option<CategoryName>,
}

/// Answers operators.
#[derive(Clone)]
pub struct Operator {
    /// The address that this node listens on.
    pub own: IpAddr,
    /// Cancelled to empty the node.
    pub drain: CancellationToken,
    /// What stands behind the server, if it is a root.
    pub root: Option<Arc<Root>>,
    /// All nodes of the topology.
    pub nodes: Arc<[Endpoint]>,
}

impl Operator {
    /// Whether a request is for an operator's path.
    #[must_use]
    pub fn knows(path: &str) -> bool {
        matches!(path, DRAIN_PATH | AGENTS_PATH | RETIRE_PATH)
    }

    /// Answers a request for a path that it [knows](Self::knows).
    pub async fn answer<B>(&self, request: Request<B>) -> Response<Full<Bytes>>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        match (request.method(), request.uri().path()) {
            (&Method::POST, DRAIN_PATH) if self.is_here(&request) => {
                self.drain.cancel();
                answer(StatusCode::ACCEPTED, &json!({}))
            }
            (&Method::POST, DRAIN_PATH) => {
                refuse(StatusCode::FORBIDDEN, "a node is drained from its own machine: tributary-aggregator drain")
            }
            (&Method::GET, AGENTS_PATH) => match &self.root {
                Some(root) => answer(StatusCode::OK, &agents(root).await),
                None => no_root(),
            },
            (&Method::POST, RETIRE_PATH) => match &self.root {
                Some(root) if self.is_here(&request) || self.is_of_the_tree(&request).await => {
                    retire(root, request.into_body()).await
                }
                Some(_) => refuse(
                    StatusCode::FORBIDDEN,
                    "an agent is retired from a machine of the topology: tributary-aggregator agents retire",
                ),
                None => no_root(),
            },
            (_, AGENTS_PATH) => refuse(StatusCode::METHOD_NOT_ALLOWED, "this path takes GET only"),
            _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "this path takes POST only"),
        }
    }

    fn is_here<B>(&self, request: &Request<B>) -> bool {
        peer(request).is_some_and(|peer| peer.is_loopback() || peer == self.own)
    }

    async fn is_of_the_tree<B>(&self, request: &Request<B>) -> bool {
        let Some(peer) = peer(request) else { return false };
        for node in self.nodes.iter() {
            // One whose name is not known now doesn't ask, either.
            let Ok(addresses) = tokio::net::lookup_host(node.address()).await else { continue };
            if addresses.into_iter().any(|address| address.ip().to_canonical() == peer) {
                return true;
            }
        }
        false
    }
}

fn peer<B>(request: &Request<B>) -> Option<IpAddr> {
    request.extensions().get::<Peer>().map(|Peer(peer)| peer.ip().to_canonical())
}

async fn agents(root: &Root) -> serde_json::Value {
    let mut lanes = serde_json::Map::new();
    for (lane, members) in root.agents().await {
        let members: Vec<_> = members
            .into_iter()
            .map(|member| {
                json!({
                    "agent": member.waiting.agent, "host": member.waiting.host, "category": member.category,
                    "heard": member.heard, "heard_ms": member.waiting.heard_ms, "complete_to_ms": member.done_ms,
                    "watermark_ms": member.waiting.watermark_ms, "uncommitted_streams": member.waiting.offsets.len(),
                    "reason": member.waiting.reason,
                })
            })
            .collect();
        lanes.insert(lane.to_string(), members.into());
    }
    json!({ "lanes": lanes })
}

async fn retire<B>(root: &Root, body: B) -> Response<Full<Bytes>>
where
    B: Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &format!("the body can't be read: {error}")),
    };
    match serde_json::from_slice::<Retire>(&body) {
        Ok(asked) => {
            let Retire { agent, category } = asked;
            let of = category.as_ref().map_or("all", CategoryName::as_str);
            tracing::warn!(agent, category = of, "an operator retires an agent: no hour waits for it any more");
            let lanes: serde_json::Map<_, _> = root
                .retire(&agent, category.as_ref())
                .await
                .into_iter()
                .map(|(lane, count)| (lane.to_string(), json!(count)))
                .collect();
            answer(StatusCode::OK, &json!({ "lanes": lanes }))
        }
        Err(error) => refuse(StatusCode::BAD_REQUEST, &format!("the body names no agent: {error}")),
    }
}

fn no_root() -> Response<Full<Bytes>> {
    refuse(StatusCode::NOT_FOUND, "only the roots know which agents are expected")
}

fn refuse(status: StatusCode, error: &str) -> Response<Full<Bytes>> {
    answer(status, &json!({ "error": error }))
}

fn answer(status: StatusCode, body: &serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}
