//! What a node between agents and roots counts.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tributary_common::messages::Verdict;

use crate::spool::run::Offer;

/// What the rule said to a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Outcome {
    /// Taken.
    Taken,
    /// It was there already, or is committed.
    Known,
    /// It begins beyond what is here.
    Beyond,
    /// The stream's file is another one now.
    Diverged,
    /// The stream has ended, by the parent's word.
    Ended,
    /// There was no room.
    NoRoom,
}

impl From<&Offer> for Outcome {
    fn from(offer: &Offer) -> Self {
        match offer {
            Offer::Take => Self::Taken,
            Offer::Held | Offer::BelowCommitted => Self::Known,
            Offer::Beyond => Self::Beyond,
            Offer::Diverged => Self::Diverged,
        }
    }
}

/// Why batches were set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Reason {
    /// The parent has other bytes of the stream.
    Diverged,
    /// The owner does not know the stream and the batches don't begin where it began.
    Unknown,
    /// The parent refused them for good.
    Refused,
    /// They are older than `spool.max_age`.
    TooOld,
    /// They can't be read from the disk any more.
    Corrupt,
}

impl Reason {
    pub(super) fn of(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Diverged { .. } => Self::Diverged,
            Verdict::Unknown => Self::Unknown,
            Verdict::Ok | Verdict::Expected | Verdict::Wait { .. } | Verdict::Refused { .. } => Self::Refused,
        }
    }

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Diverged => "diverged",
            Self::Unknown => "unknown",
            Self::Refused => "refused",
            Self::TooOld => "too-old",
            Self::Corrupt => "corrupt",
        }
    }
}

/// Why a request to the parent tier brought no answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum ForwardError {
    /// No connection, no answer, or one that makes no sense.
    Broken,
    /// 429 or 503.
    Busy,
    /// Another node is the right one, or a better one.
    Elsewhere,
    /// Refused as a whole.
    Rejected,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: Reason,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    error: ForwardError,
}

/// Counters and gauges of an edge.
#[derive(Debug, Default)]
pub struct EdgeMetrics {
    offers: Family<OutcomeLabels, Counter>,
    set_aside_batches: Family<ReasonLabels, Counter>,
    forward_errors: Family<ErrorLabels, Counter>,
    /// Groups written to the spool.
    pub(super) groups: Counter,
    /// Groups that could not be written.
    pub(super) failed_groups: Counter,
    /// Batches that the parent tier answered.
    pub(super) forwarded_batches: Counter,
    /// Batches that were read from the spool to be sent on.
    pub(super) read_back: Counter,
    pub(super) forwarded_reports: Counter,
    /// Their bytes.
    pub(super) forwarded_bytes: Counter,
    /// Times that the parent tier expected what it had committed.
    pub(super) alarms: Counter,
    /// Runs whose invariants did not hold.
    pub(super) broken_invariants: Counter,
    /// Things that could not be set aside.
    pub(super) set_aside_errors: Counter,
    pub(super) spool_bytes: Gauge,
    pub(super) spool_batches: Gauge,
    pub(super) spool_segments: Gauge,
    pub(super) streams: Gauge,
    pub(super) set_aside_bytes: Gauge,
    recovered: Counter,
    recovery_dropped: Counter,
    recovery_corrupt: Counter,
}

impl EdgeMetrics {
    /// Makes them visible.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("offered_batches", "Batches offered, by what became of them", self.offers.clone());
        registry.register("set_aside_batches", "Batches set aside, by reason", self.set_aside_batches.clone());
        registry.register("forward_errors", "Requests to the parent tier that failed", self.forward_errors.clone());
        registry.register("spool_groups", "Groups of batches made durable", self.groups.clone());
        registry.register(
            "spool_group_errors",
            "Groups of batches that could not be written",
            self.failed_groups.clone(),
        );
        registry.register(
            "spool_read_batches",
            "Batches read from the spool to be sent on: they waited for long, or are sent again",
            self.read_back.clone(),
        );
        registry.register("forwarded_reports", "Reports that the parent tier took", self.forwarded_reports.clone());
        registry.register("forwarded_batches", "Batches that the parent tier answered", self.forwarded_batches.clone());
        registry.register(
            "forwarded_bytes",
            "Bytes of batches that the parent tier answered",
            self.forwarded_bytes.clone(),
        );
        registry.register("alarms", "Times that the parent tier expected committed bytes again", self.alarms.clone());
        registry.register(
            "broken_invariants",
            "Runs whose invariants did not hold: bugs",
            self.broken_invariants.clone(),
        );
        registry.register("set_aside_errors", "Things that could not be set aside", self.set_aside_errors.clone());
        registry.register("spool_bytes", "Bytes of the spool on disk", self.spool_bytes.clone());
        registry.register("spool_batches", "Batches in the spool", self.spool_batches.clone());
        registry.register("spool_segments", "Segment files of the spool", self.spool_segments.clone());
        registry.register("streams", "Streams with a run", self.streams.clone());
        registry.register("set_aside_bytes", "Bytes set aside", self.set_aside_bytes.clone());
        registry.register("recovered_batches", "Batches found in the spool at start", self.recovered.clone());
        registry.register(
            "recovery_dropped_batches",
            "Batches found at start that no longer continue their stream's run",
            self.recovery_dropped.clone(),
        );
        registry.register(
            "recovery_corrupt_files",
            "Spool files with a corrupt part, found at start",
            self.recovery_corrupt.clone(),
        );
    }

    pub(super) fn offered(&self, outcome: Outcome, batches: u64) {
        self.offers.get_or_create(&OutcomeLabels { outcome }).inc_by(batches);
    }

    pub(super) fn set_aside(&self, reason: Reason, batches: u64) {
        self.set_aside_batches.get_or_create(&ReasonLabels { reason }).inc_by(batches);
    }

    pub(super) fn forward_failed(&self, error: ForwardError) {
        self.forward_errors.get_or_create(&ErrorLabels { error }).inc();
    }

    pub(super) fn recovered(&self, recovery: &crate::spool::Recovery) {
        self.recovered.inc_by(recovery.entries);
        self.recovery_dropped.inc_by(recovery.dropped_entries);
        self.recovery_corrupt.inc_by(recovery.corrupt_files);
    }
}
