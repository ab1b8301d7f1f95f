//! What every aggregator is to those below it, whether it stands in the middle of the tree or is a root.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tributary_common::batch::Batch;
use tributary_common::frame::FrameHeader;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::messages::{Answer, PositionsQuery};
use tributary_common::report::{Report, ReportAnswer};

/// A batch that came in whole: its checksums are right, its frames are its own, its category, lane and bucket size are
/// those of the topology.
#[derive(Debug, Clone)]
pub struct Received {
    /// The batch. `received_ms` is set.
    pub batch: Batch,
    /// The headers of its frames, in order.
    pub frames: Vec<FrameHeader>,
}

/// Not here or not now, for nothing of the request; the same request may be sent again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Overloaded {
    /// What is full or missing, for the sender's log.
    pub reason: String,
    /// When to come again.
    pub retry_after: Duration,
    /// Where to go instead, where that is known.
    pub elsewhere: Option<Elsewhere>,
}

/// Where a sender should go instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Elsewhere {
    /// To this node: it owns the lane.
    Node(Endpoint),
    /// To any other node of the same tier: this one is being emptied.
    Sibling,
}

impl Overloaded {
    /// There is no room: come again.
    #[must_use]
    pub fn new(reason: impl Into<String>, retry_after: Duration) -> Self {
        Self { reason: reason.into(), retry_after, elsewhere: None }
    }

    /// Another node is better.
    #[must_use]
    pub fn go(reason: impl Into<String>, retry_after: Duration, elsewhere: Elsewhere) -> Self {
        Self { reason: reason.into(), retry_after, elsewhere: Some(elsewhere) }
    }
}

/// One aggregator, seen from below. It has one rule: per stream it holds an unbroken run of bytes from `committed`, takes
/// what continues the run, and lets go only of what is committed.
#[async_trait]
pub trait Tier: Send + Sync + 'static {
    /// Offers batches, in the order in which they were sent; those of one stream are in the order of the stream. Returns
    /// once what was taken is as safe as `next` in the answers promises: one answer per batch, in order.
    ///
    /// A caller may give up and drop the future at any await: what was taken until then stays taken.
    ///
    /// # Errors
    /// When there is no room, or another node is better. Part of the batches may have been taken; offering them again is harmless.
    async fn offer(&self, batches: Vec<Received>) -> Result<Vec<Answer>, Overloaded>;

    /// What is known of these streams: one answer per stream, in order.
    ///
    /// # Errors
    /// When there is no room for more questions.
    async fn positions(&self, query: PositionsQuery) -> Result<Vec<Answer>, Overloaded>;

    /// Takes reports, for the lane's owner. Returns what is known of these agents here, for some or all of them.
    ///
    /// # Errors
    /// When there is no room, or another node is better; they may be sent again.
    async fn reports(&self, reports: Vec<Report>) -> Result<Vec<ReportAnswer>, Overloaded>;

    /// All that an operator may want to see, as JSON.
    async fn status(&self) -> serde_json::Value;

    /// Whether it can serve; if not, why.
    ///
    /// # Errors
    /// Why it can't, in words for an operator.
    fn ready(&self) -> Result<(), String>;
}

#[async_trait]
impl<T: Tier + ?Sized> Tier for Arc<T> {
    async fn offer(&self, batches: Vec<Received>) -> Result<Vec<Answer>, Overloaded> {
        (**self).offer(batches).await
    }

    async fn positions(&self, query: PositionsQuery) -> Result<Vec<Answer>, Overloaded> {
        (**self).positions(query).await
    }

    async fn reports(&self, reports: Vec<Report>) -> Result<Vec<ReportAnswer>, Overloaded> {
        (**self).reports(reports).await
    }

    async fn status(&self) -> serde_json::Value {
        (**self).status().await
    }

    fn ready(&self) -> Result<(), String> {
        (**self).ready()
    }
}
