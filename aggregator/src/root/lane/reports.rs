//! Reports of agents, and answers that wait for the ledger.

use std::collections::BTreeMap;

use tokio::sync::oneshot;
use tributary_common::batch::BatchHeader;
use tributary_common::bucket::Bucket;
use tributary_common::ids::CategoryName;
use tributary_common::messages::Answer;
use tributary_common::report::{Report, ReportAnswer, StreamOffset};

use super::{Lane, RETRY_AFTER, millis};
use crate::root::ledger::HourKey;
use crate::tier::{Overloaded, Received};

/// Answers that may wait for a ledger entry. While the sink is not available, senders ask again and again.
const MAX_HELD_REPLIES: usize = 1024;

/// An answer that is given when a ledger entry is seen.
pub(super) struct HeldReply {
    entry: u64,
    answers: Answers,
}

enum Answers {
    Batches(Vec<Answer>, Vec<u64>, oneshot::Sender<Result<Vec<Answer>, Overloaded>>),
    Reports(Vec<ReportAnswer>, oneshot::Sender<Result<Vec<ReportAnswer>, Overloaded>>),
    Retired(usize, oneshot::Sender<usize>),
}

impl HeldReply {
    pub(super) fn batches(
        answers: Vec<Answer>,
        claims: Vec<u64>,
        reply: oneshot::Sender<Result<Vec<Answer>, Overloaded>>,
    ) -> Self {
        Self { entry: 0, answers: Answers::Batches(answers, claims, reply) }
    }

    fn is_closed(&self) -> bool {
        match &self.answers {
            Answers::Batches(_, _, reply) => reply.is_closed(),
            Answers::Reports(_, reply) => reply.is_closed(),
            Answers::Retired(_, reply) => reply.is_closed(),
        }
    }
}

impl Lane {
    /// The number of the next entry that will say how things are now.
    pub(super) fn next_entry_from_now(&self) -> u64 {
        if self.entry_under_way { self.next_entry + 1 } else { self.next_entry }
    }

    /// Puts the agent of a batch of which something is written on the roster. One that is known to the last byte shows nothing: it
    /// may have lain in a spool since long before its agent left.
    pub(super) fn notice(&mut self, received: &Received) {
        let header = &received.batch.header;
        let host =
            received.frames.first().and_then(|frame| frame.slices.first()).map_or("", |slice| slice.host.as_str());
        let from = StreamOffset { stream: header.stream, offset: header.start.offset };
        let now = self.settings.clock.now_ms();
        self.entry_wanted |= self.roster.noticed(&header.agent, &header.category, host, from, now);
    }

    /// The entry that is to be seen before the agent of a batch is answered.
    pub(super) fn answer_after(&self, header: &BatchHeader) -> Option<u64> {
        self.roster.answer_after(&header.agent, &header.category, self.seen_entry, self.next_entry_from_now())
    }

    /// Keeps an answer until the entry is seen.
    pub(super) fn hold(&mut self, entry: u64, reply: HeldReply) {
        if self.held_replies.len() >= MAX_HELD_REPLIES {
            self.held_replies.retain(|held| !held.is_closed());
        }
        if self.held_replies.len() < MAX_HELD_REPLIES {
            self.held_replies.push(HeldReply { entry, ..reply });
        }
        // Dropped, an answer tells its sender to come again.
    }

    /// An entry was seen: what waited for it is answered.
    pub(super) fn release(&mut self, seen: u64) {
        let (ready, waiting) = std::mem::take(&mut self.held_replies).into_iter().partition(|held| held.entry <= seen);
        self.held_replies = waiting;
        let ready: Vec<HeldReply> = ready;
        for held in ready {
            // A sender that gave up will ask again.
            match held.answers {
                Answers::Batches(answers, claims, reply) => self.reply(answers, claims, reply),
                Answers::Reports(answers, reply) => drop(reply.send(Ok(answers))),
                Answers::Retired(count, reply) => drop(reply.send(count)),
            }
        }
    }

    pub(super) fn take_reports(
        &mut self,
        reports: &[Report],
        reply: oneshot::Sender<Result<Vec<ReportAnswer>, Overloaded>>,
    ) {
        if self.draining {
            // A sender that gave up will ask again.
            let _ = reply.send(Err(Overloaded::new("the lane's owner is stopping", RETRY_AFTER)));
            return;
        }
        let now = self.settings.clock.now_ms();
        let mut answers = Vec::with_capacity(reports.len());
        for report in reports {
            for one in &report.required {
                self.ingest.mentioned(one.stream, now);
            }
            let ingest = &self.ingest;
            let committed = |stream| ingest.committed(stream);
            answers.push(self.roster.report(report, now, self.seen_entry, &committed));
        }
        self.metrics.reports(reports.len());
        self.entry_wanted |= self.roster.wants_entry();
        let parting = reports.iter().any(|report| report.last);
        self.settle_roster();
        if parting {
            // Nobody will repeat it: it has to be in the ledger, and the owner has to be one.
            self.entry_wanted = true;
            self.hold(self.next_entry_from_now(), HeldReply { entry: 0, answers: Answers::Reports(answers, reply) });
        } else {
            // A sender that gave up will ask again.
            let _ = reply.send(Ok(answers));
        }
    }

    /// Compares what agents named with what is committed.
    pub(super) fn settle_roster(&mut self) {
        let ingest = &self.ingest;
        self.roster.settle(&|stream| ingest.committed(stream));
    }

    pub(super) fn retire(&mut self, name: &str, category: Option<&CategoryName>, reply: oneshot::Sender<usize>) {
        let (ingest, now) = (&self.ingest, self.settings.clock.now_ms());
        let count = self.roster.retire(name, category, now, &|stream| ingest.committed(stream));
        if count == 0 {
            // Whoever asked may be gone.
            let _ = reply.send(0);
            return;
        }
        tracing::warn!(agent = name, categories = count, "an agent was retired: no hour waits for it any more");
        self.entry_wanted = true;
        self.hold(self.next_entry_from_now(), HeldReply { entry: 0, answers: Answers::Retired(count, reply) });
    }

    /// Stops to expect agents that were silent for very long.
    pub(super) fn forget_agents(&mut self) {
        let (ingest, now) = (&self.ingest, self.settings.clock.now_ms());
        let after = millis(self.settings.forget_agents_after);
        // Spools keep batches for a shorter time.
        let gone_for = millis(self.settings.stream_ttl);
        let open_from_ms = |category: &CategoryName| open_from_ms(category, &self.sealed_up_to, self.found_ms.keys());
        let committed = |stream| ingest.committed(stream);
        for (agent, category) in self.roster.forget(now, after, gone_for, &open_from_ms, &committed) {
            self.metrics.forgot_agent();
            tracing::error!(
                %agent, %category, forget_after_ms = after,
                "an agent is no longer waited for: nothing was heard of it for roster.forget_after; what it had named and was not stored counts as lost"
            );
        }
    }
}

/// The start of the first hour of a category that is not sealed, milliseconds since 1970. `sealed_up_to`: the first that may not be,
/// of those that are sealed one by one; `found`: those of a backlog.
fn open_from_ms<'k>(
    category: &CategoryName,
    sealed_up_to: &BTreeMap<CategoryName, Bucket>,
    found: impl Iterator<Item = &'k HourKey>,
) -> i64 {
    let found = found.filter(|key| key.category == *category).map(|key| key.bucket);
    let first = sealed_up_to.get(category).copied().into_iter().chain(found).map(Bucket::start_s).min();
    first.map_or(i64::MAX, |start_s| start_s.saturating_mul(1000))
}
