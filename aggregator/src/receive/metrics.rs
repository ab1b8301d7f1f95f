//! What the receiving side counts.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tributary_common::batch::BatchError;

/// Why a request, or a batch of one, was not taken: the closed set of the metric's labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Reject {
    /// The path serves nothing.
    UnknownPath,
    /// The content type or the version in it.
    ContentType,
    /// Too many bytes, batches or streams.
    TooLarge,
    /// The body broke off or stalled.
    Body,
    /// Bytes that are no batch of a known version.
    NotABatch,
    /// The last batch is cut off.
    Truncated,
    /// A batch's header is corrupt.
    CorruptHeader,
    /// A frame is corrupt.
    CorruptFrame,
    /// Frames that are not the batch's, or that don't cover its bytes.
    Mismatch,
    /// A positions query that can't be read.
    BadQuery,
    /// A batch that contradicts the topology.
    Topology,
    /// No memory for more requests now.
    Busy,
    /// No room for more data now.
    Full,
    /// Another node is the right one, or a better one.
    Elsewhere,
    /// A bug in this node.
    Internal,
}

impl Reject {
    pub(crate) fn of(error: &BatchError) -> Self {
        match error {
            BatchError::NotABatch => Self::NotABatch,
            BatchError::TooLarge { .. } => Self::TooLarge,
            BatchError::CorruptHeader(_) => Self::CorruptHeader,
            BatchError::Truncated { .. } => Self::Truncated,
            BatchError::Frame { .. } => Self::CorruptFrame,
            BatchError::Mismatch { .. } | BatchError::Coverage => Self::Mismatch,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RejectLabels {
    reason: Reject,
}

/// Counters of the receiving side.
#[derive(Debug, Default)]
pub struct ReceiveMetrics {
    batches: Counter,
    bytes: Counter,
    rejected: Family<RejectLabels, Counter>,
}

impl ReceiveMetrics {
    /// Makes the counters visible.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("received_batches", "Batches that came in whole", self.batches.clone());
        registry.register("received_bytes", "Bytes of requests with batches that came in whole", self.bytes.clone());
        registry.register("rejected", "Requests and batches that were not taken", self.rejected.clone());
    }

    pub(crate) fn received(&self, batches: u64, bytes: u64) {
        self.batches.inc_by(batches);
        self.bytes.inc_by(bytes);
    }

    pub(crate) fn rejected(&self, reason: Reject) {
        self.rejected.get_or_create(&RejectLabels { reason }).inc();
    }

    /// How often `reason` was given.
    #[must_use]
    pub fn rejections(&self, reason: Reject) -> u64 {
        self.rejected.get_or_create(&RejectLabels { reason }).get()
    }
}
