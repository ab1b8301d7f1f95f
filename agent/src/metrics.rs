//! What the agent counts.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// Why a request brought no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum RequestError {
    /// No connection, or it broke.
    Connection,
    /// No answer in time.
    Timeout,
    /// 429 or 503: later.
    Busy,
    /// 307, or a node that is being emptied: another endpoint has to be asked.
    Moved,
    /// Another 4xx: never.
    Refused,
    /// 5xx, or something that is no answer.
    Nonsense,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: RequestError,
}

/// The agent's metrics.
#[derive(Debug, Clone, Default)]
pub struct AgentMetrics {
    /// Lines read.
    pub lines: Counter,
    /// Bytes of files that were cut into batches.
    pub read_bytes: Counter,
    /// Bytes sent, compressed.
    pub shipped_bytes: Counter,
    /// Batches that were taken upstream.
    pub batches: Counter,
    /// Bytes of files that became durable upstream.
    pub committed_bytes: Counter,
    /// Bytes that are sent again.
    pub resent_bytes: Counter,
    /// Bytes in files that are not committed.
    pub lag_bytes: Gauge,
    /// Bytes read, and being packed or sent.
    pub buffered_bytes: Gauge,
    /// Files held open.
    pub open_files: Gauge,
    /// Bytes of deleted files held open.
    pub held_bytes: Gauge,
    /// Streams whose file and upstream disagreed.
    pub diverged: Counter,
    /// Files that became shorter, or were overwritten.
    pub truncations: Counter,
    /// Streams that went on in a copy of their file.
    pub continued: Counter,
    /// Bytes that are known to be lost: of deleted files over the limit, of replaced ones.
    pub lost_bytes: Counter,
    /// Lines that were split, truncated, dropped or given a newline.
    pub altered: Counter,
    /// Lines whose time was not believed.
    pub implausible_times: Counter,
    /// Troubles with the checkpoints.
    pub checkpoint_errors: Counter,
    /// 1 while checkpoints can't be written.
    pub checkpoints_failing: Gauge,
    /// Streams that stopped, because upstream refuses them for good.
    pub stopped: Gauge,
    /// Times that upstream wanted what it had committed before.
    pub alarms: Counter,
    /// 1 while deleted files hold more than half of what is allowed.
    pub held_much: Gauge,
    /// Files that wait until others are closed.
    pub waiting_files: Gauge,
    /// Files that can't be opened.
    pub unreadable_files: Gauge,
    /// Directories that the system refuses to watch.
    pub unwatched_directories: Gauge,
    /// Times that the system could not tell of all changes.
    pub watch_overflows: Counter,
    /// Scans for files.
    pub scans: Counter,
    /// How long the last scan took, in milliseconds.
    pub scan_ms: Gauge,
    requests: Counter,
    request_errors: Family<Kind, Counter>,
}

impl AgentMetrics {
    /// Makes the metrics visible.
    pub fn register(&self, registry: &mut Registry) {
        let counters = [
            ("lines", "Lines read", &self.lines),
            ("batches", "Batches that were taken upstream", &self.batches),
            ("diverged", "Streams whose file and upstream disagreed", &self.diverged),
            ("truncations", "Files that became shorter or were overwritten", &self.truncations),
            ("continued_streams", "Streams that went on in a copy of their file, compressed or not", &self.continued),
            ("altered_records", "Lines split, truncated, dropped or given a newline", &self.altered),
            ("implausible_times", "Lines whose time was not believed", &self.implausible_times),
            ("checkpoint_errors", "Troubles with the checkpoints", &self.checkpoint_errors),
            ("alarms", "Times that upstream wanted what it had committed before", &self.alarms),
            ("scans", "Scans for files", &self.scans),
            ("watch_overflows", "Times that the system could not tell of all changes", &self.watch_overflows),
            ("requests", "Requests sent", &self.requests),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        let byte_counters = [
            ("read", "Bytes of files cut into batches", &self.read_bytes),
            ("shipped", "Bytes sent, compressed", &self.shipped_bytes),
            ("committed", "Bytes of files that became durable upstream", &self.committed_bytes),
            ("resent", "Bytes of files sent again", &self.resent_bytes),
            ("lost", "Bytes of files that are known to be lost", &self.lost_bytes),
        ];
        for (name, help, counter) in byte_counters {
            registry.register_with_unit(name, help, Unit::Bytes, counter.clone());
        }
        let byte_gauges = [
            ("lag", "Bytes in files that are not committed", &self.lag_bytes),
            ("buffered", "Bytes read, and being packed or sent", &self.buffered_bytes),
            ("held", "Bytes of deleted files held open", &self.held_bytes),
        ];
        for (name, help, gauge) in byte_gauges {
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
        }
        let gauges = [
            ("open_files", "Files held open", &self.open_files),
            ("waiting_files", "Files that wait until others are closed", &self.waiting_files),
            ("unreadable_files", "Files that can't be opened", &self.unreadable_files),
            ("unwatched_directories", "Directories that the system refuses to watch", &self.unwatched_directories),
            ("held_above_half", "1 while deleted files hold more than half of max_held_bytes", &self.held_much),
            ("last_scan_ms", "How long the last scan took", &self.scan_ms),
            ("checkpoints_failing", "1 while checkpoints can't be written", &self.checkpoints_failing),
            ("stopped_streams", "Streams that upstream refuses for good", &self.stopped),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
        registry.register("request_errors", "Requests without an answer", self.request_errors.clone());
    }

    /// Counts a request that is sent.
    pub fn request(&self) {
        self.requests.inc();
    }

    /// Counts a request that brought no answer.
    pub fn request_error(&self, kind: RequestError) {
        self.request_errors.get_or_create(&Kind { kind }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_shown_under_its_name() {
        let mut metrics = tributary_common::telemetry::Metrics::new("agent");
        let agent = AgentMetrics::default();
        agent.register(metrics.registry());
        agent.request_error(RequestError::Busy);
        agent.committed_bytes.inc_by(7);
        let text = metrics.render();
        for line in ["tributary_agent_committed_bytes_total 7", "tributary_agent_request_errors_total{kind=\"Busy\"} 1"]
        {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }
}
