//! What a lane counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tributary_common::messages::Verdict;

/// The counters and gauges of one lane. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct LaneMetrics {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    batches_ok: AtomicU64,
    batches_refused: AtomicU64,
    batches_diverged: AtomicU64,
    batches_other: AtomicU64,
    bytes: AtomicU64,
    records: AtomicU64,
    cut: AtomicU64,
    possible_duplicates: AtomicU64,
    merged_slices: AtomicU64,
    segments_failed: AtomicU64,
    published: AtomicU64,
    late_records: AtomicU64,
    open_segments: AtomicU64,
    uncommitted_bytes: AtomicU64,
    streams: AtomicU64,
    reports: AtomicU64,
    partial_hours: AtomicU64,
    short_seals: AtomicU64,
    forgotten_agents: AtomicU64,
    agents: AtomicU64,
    waiting_hours: AtomicU64,
}

fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl LaneMetrics {
    pub(super) fn batch(&self, verdict: &Verdict) {
        let counter = match verdict {
            Verdict::Ok => &self.inner.batches_ok,
            Verdict::Refused { .. } => &self.inner.batches_refused,
            Verdict::Diverged { .. } | Verdict::Unknown => &self.inner.batches_diverged,
            Verdict::Expected | Verdict::Wait { .. } => &self.inner.batches_other,
        };
        add(counter, 1);
    }

    pub(super) fn wrote(&self, bytes: u64, records: u64) {
        add(&self.inner.bytes, bytes);
        add(&self.inner.records, records);
    }

    pub(super) fn cut(&self) {
        add(&self.inner.cut, 1);
    }

    pub(super) fn possible_duplicate(&self) {
        add(&self.inner.possible_duplicates, 1);
    }

    pub(super) fn merged(&self, slices: usize) {
        add(&self.inner.merged_slices, slices as u64);
    }

    pub(super) fn segment_failed(&self) {
        add(&self.inner.segments_failed, 1);
    }

    pub(super) fn published(&self) {
        add(&self.inner.published, 1);
    }

    pub(super) fn late(&self, records: u64) {
        add(&self.inner.late_records, records);
    }

    pub(super) fn reports(&self, count: usize) {
        add(&self.inner.reports, count as u64);
    }

    pub(super) fn gave_up(&self) {
        add(&self.inner.partial_hours, 1);
    }

    pub(super) fn too_few(&self) {
        add(&self.inner.short_seals, 1);
    }

    pub(super) fn forgot_agent(&self) {
        add(&self.inner.forgotten_agents, 1);
    }

    pub(super) fn waiting(&self, agents: usize, hours: usize) {
        self.inner.agents.store(agents as u64, Ordering::Relaxed);
        self.inner.waiting_hours.store(hours as u64, Ordering::Relaxed);
    }

    pub(super) fn state(&self, open_segments: usize, uncommitted_bytes: u64, streams: usize) {
        self.inner.open_segments.store(open_segments as u64, Ordering::Relaxed);
        self.inner.uncommitted_bytes.store(uncommitted_bytes, Ordering::Relaxed);
        self.inner.streams.store(streams as u64, Ordering::Relaxed);
    }

    /// Records written to segments since the start.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.inner.records.load(Ordering::Relaxed)
    }

    /// Hours that became visible since the start.
    #[must_use]
    pub fn published_hours(&self) -> u64 {
        self.inner.published.load(Ordering::Relaxed)
    }

    /// Records put beside their hour since the start.
    #[must_use]
    pub fn late_records(&self) -> u64 {
        self.inner.late_records.load(Ordering::Relaxed)
    }

    /// Every number with its name, its help and whether it only grows.
    #[must_use]
    pub fn samples(&self) -> Vec<(&'static str, &'static str, bool, u64)> {
        let inner = &*self.inner;
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        vec![
            ("root_batches_ok", "Batches taken, or there already", true, load(&inner.batches_ok)),
            ("root_batches_refused", "Batches refused for good", true, load(&inner.batches_refused)),
            ("root_batches_diverged", "Batches of diverged or unknown streams", true, load(&inner.batches_diverged)),
            ("root_batches_deferred", "Batches that begin too late or have to wait", true, load(&inner.batches_other)),
            ("root_segment_bytes", "Bytes written to segments", true, load(&inner.bytes)),
            ("root_records", "Records written to segments", true, load(&inner.records)),
            ("root_slices_cut", "Slices of which only the missing part was written", true, load(&inner.cut)),
            (
                "root_possible_duplicates",
                "Slices with altered records that overlap what is stored and were written whole",
                true,
                load(&inner.possible_duplicates),
            ),
            ("root_slices_merged", "Small slices merged with others into one frame", true, load(&inner.merged_slices)),
            (
                "root_segments_failed",
                "Segments given up after an error of the sink",
                true,
                load(&inner.segments_failed),
            ),
            ("root_hours_published", "Hours that became visible", true, load(&inner.published)),
            ("root_late_records", "Records put beside their hour", true, load(&inner.late_records)),
            ("root_reports", "Reports of agents", true, load(&inner.reports)),
            ("root_hours_given_up", "Hours sealed without some agents", true, load(&inner.partial_hours)),
            (
                "root_short_seals",
                "Agents of which an hour was sealed with fewer records than were stored by what the agent was told",
                true,
                load(&inner.short_seals),
            ),
            ("root_agents_forgotten", "Agents that are no longer expected", true, load(&inner.forgotten_agents)),
            ("root_agents", "Agents that are expected, by category", false, load(&inner.agents)),
            ("root_hours_waiting", "Hours that are over and wait for agents", false, load(&inner.waiting_hours)),
            ("root_open_segments", "Segments being written", false, load(&inner.open_segments)),
            ("root_uncommitted_bytes", "Bytes that wait for a sync", false, load(&inner.uncommitted_bytes)),
            ("root_streams", "Streams that the lane knows", false, load(&inner.streams)),
        ]
    }
}
