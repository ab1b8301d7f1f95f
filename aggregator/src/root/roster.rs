//! Which agents a lane expects to hear of, how far each has got, and so whether an hour is complete. Pure: no clock, no file,
//! no socket.
//!
//! # When an hour is complete
//!
//! When each **member** of its category has said ([`Report`]) that all it will ever ship of before the hour's end lies below
//! some offsets, and each offset that it named, then or before, is committed or declared lost. A member is every agent that was
//! ever heard of for a category, until it leaves by a last report, is retired by an operator, or is silent for
//! `forget_after`.
//!
//! A member's reports are **claims**: a watermark, and the offsets that belong to it. The oldest one that is not fulfilled stays
//! as it is until it is; only the newest behind it is replaced by later ones. So an agent that never rests does not put its
//! hours off for ever by naming ever higher offsets, and two claims are all that is kept.
//!
//! # What survives a takeover
//!
//! Members, their sessions and their claims are in the ledger ([`MemberRecord`]); a new member is in it before it gets its first
//! answer. A new owner believes what its predecessor was told, and still seals nothing before each member has been heard again.

use std::collections::{BTreeMap, BTreeSet};

use tributary_common::bucket::Bucket;
use tributary_common::ids::{AgentId, CategoryName, Epoch, StreamId};
use tributary_common::limits::MAX_STREAMS_PER_REPORT;
use tributary_common::report::{BucketCount, Report, ReportAnswer, RunId, Session, StreamOffset};

use super::ledger::{ClaimRecord, Loss, MemberRecord, RunRecord};

/// How far a watermark may be ahead of the owner's clock: as far as clocks may differ at all. It counts only up to the owner's
/// own time.
pub const MAX_AHEAD_MS: i64 = 60_000;

/// For so long after two runs of one agent were found alive at the same time none of them is believed.
pub const CLASH_MS: i64 = 120_000;

/// Runs that have been given a session and have not used it yet.
const MAX_CANDIDATES: usize = 4;

/// Buckets of which a member's own counts are remembered.
const MAX_COUNTS: usize = 128;

/// Losses that are remembered for the seals that come.
const MAX_LOSSES: usize = 10_000;

/// Losses are remembered for so long after the time that they belong to.
const LOSSES_FOR_MS: i64 = 7 * 86_400_000;

/// A promise of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Claim {
    watermark_ms: i64,
    required: BTreeMap<StreamId, u64>,
}

impl Claim {
    fn require(&mut self, streams: impl IntoIterator<Item = (StreamId, u64)>) {
        for (stream, offset) in streams {
            let known = self.required.entry(stream).or_insert(offset);
            *known = offset.max(*known);
        }
    }
}

/// A run of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    run: RunId,
    session: Session,
    number: u64,
}

/// How far the ledger knows a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    /// Not at all, or not as it is now.
    No,
    /// It is in this entry, which may not have been seen yet.
    In(u64),
}

#[derive(Debug, Clone)]
struct Member {
    host: String,
    current: Option<Run>,
    candidates: Vec<Run>,
    clash_ms: Option<i64>,
    written: Written,
    /// Whether it has been heard since this owner took the lane.
    heard: bool,
    heard_ms: i64,
    /// As told last.
    watermark_ms: Option<i64>,
    held_by: String,
    refused: Option<String>,
    /// All of before is committed.
    done_ms: Option<i64>,
    first: Option<Claim>,
    last: Option<Claim>,
    leaving: bool,
    counts: BTreeMap<(i64, u32), BucketCount>,
    /// Whether `committed` of one of its streams has moved since the last look.
    moved: bool,
    changed: bool,
}

impl Member {
    fn new(host: &str, now_ms: i64) -> Self {
        Self {
            host: host.to_owned(),
            current: None,
            candidates: Vec::new(),
            clash_ms: None,
            written: Written::No,
            heard: false,
            heard_ms: now_ms,
            watermark_ms: None,
            held_by: String::new(),
            refused: None,
            done_ms: None,
            first: None,
            last: None,
            leaving: false,
            counts: BTreeMap::new(),
            moved: false,
            changed: true,
        }
    }

    fn claims(&self) -> impl Iterator<Item = &Claim> {
        self.first.iter().chain(&self.last)
    }

    /// Adds a claim; what was required before stays so.
    fn claim(&mut self, watermark_ms: i64, required: &[StreamOffset]) {
        let reached = self.claims().map(|claim| claim.watermark_ms).chain(self.done_ms).max();
        let mut claim = Claim {
            watermark_ms: reached.map_or(watermark_ms, |reached| watermark_ms.max(reached)),
            required: BTreeMap::new(),
        };
        // The last one has all that the first one has.
        let before = self.last.as_ref().or(self.first.as_ref());
        claim.require(before.iter().flat_map(|claim| &claim.required).map(|(stream, offset)| (*stream, *offset)));
        claim.require(required.iter().map(|one| (one.stream, one.offset)));
        let place = if self.first.is_none() { &mut self.first } else { &mut self.last };
        self.changed |= place.as_ref().is_none_or(|before| before.required != claim.required);
        *place = Some(claim);
    }

    /// Compares the claims with what is committed.
    fn settle(&mut self, committed: &impl Fn(StreamId) -> u64) {
        for claim in self.first.iter_mut().chain(&mut self.last) {
            claim.required.retain(|stream, offset| committed(*stream) < *offset);
        }
        while let Some(claim) = self.first.take_if(|claim| claim.required.is_empty()) {
            self.done_ms = self.done_ms.max(Some(claim.watermark_ms));
            self.first = self.last.take();
        }
    }

    fn is_heard(&self) -> bool {
        self.heard || self.leaving
    }

    fn is_past(&self, end_ms: i64) -> bool {
        self.is_heard() && self.done_ms.is_some_and(|done| done >= end_ms)
    }

    fn record(&self, agent: &AgentId, category: &CategoryName) -> MemberRecord {
        let run = |run: &Run| RunRecord { run: run.run.0, session: run.session, number: run.number };
        MemberRecord {
            agent: agent.clone(),
            category: category.clone(),
            host: self.host.clone(),
            current: self.current.as_ref().map(run),
            candidates: self.candidates.iter().map(run).collect(),
            done_ms: self.done_ms,
            claims: self
                .claims()
                .map(|claim| ClaimRecord {
                    watermark_ms: claim.watermark_ms,
                    required: claim.required.iter().map(|(&stream, &offset)| StreamOffset { stream, offset }).collect(),
                })
                .collect(),
            leaving: self.leaving,
        }
    }

    fn load(record: &MemberRecord, number: u64, now_ms: i64) -> Self {
        let run = |run: &RunRecord| Run { run: RunId(run.run), session: run.session, number: run.number };
        let mut claims = record.claims.iter().map(|claim| Claim {
            watermark_ms: claim.watermark_ms,
            required: claim.required.iter().map(|one| (one.stream, one.offset)).collect(),
        });
        Self {
            current: record.current.as_ref().map(run),
            candidates: record.candidates.iter().map(run).collect(),
            written: Written::In(number),
            done_ms: record.done_ms,
            first: claims.next(),
            last: claims.next(),
            leaving: record.leaving,
            changed: false,
            ..Self::new(&record.host, now_ms)
        }
    }
}

/// A member that an hour waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The agent.
    pub agent: AgentId,
    /// Its host name.
    pub host: String,
    /// Its watermark; none while it has none.
    pub watermark_ms: Option<i64>,
    /// Since when nothing was heard of it, milliseconds since 1970.
    pub heard_ms: i64,
    /// The offsets that it named and that are not committed.
    pub offsets: Vec<StreamOffset>,
    /// Why its watermark does not move, in its own words, or why it is not believed.
    pub reason: String,
}

/// A member as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberView {
    /// The category.
    pub category: CategoryName,
    /// All that an hour would say that waits for it.
    pub waiting: Waiting,
    /// Whether it has been heard since the lane was taken.
    pub heard: bool,
    /// Its session.
    pub session: Option<Session>,
    /// All of before is committed, milliseconds since 1970.
    pub done_ms: Option<i64>,
}

/// The agents of a lane. See the module's description.
#[derive(Debug)]
pub struct Roster {
    epoch: Epoch,
    next_session: u64,
    members: BTreeMap<CategoryName, BTreeMap<AgentId, Member>>,
    left: Vec<(AgentId, CategoryName)>,
    losses: Vec<Loss>,
    losses_changed: bool,
}

impl Roster {
    /// The roster that the ledger knew up to entry `number`.
    #[must_use]
    pub fn load(epoch: Epoch, records: &[MemberRecord], losses: Vec<Loss>, number: Option<u64>, now_ms: i64) -> Self {
        let mut roster =
            Self { epoch, next_session: 0, members: BTreeMap::new(), left: Vec::new(), losses, losses_changed: false };
        for record in records {
            let member = Member::load(record, number.unwrap_or(0), now_ms);
            roster.members.entry(record.category.clone()).or_default().insert(record.agent.clone(), member);
        }
        roster
    }

    /// Adds an agent that data came of. Returns whether it is new.
    pub fn noticed(&mut self, agent: &AgentId, category: &CategoryName, host: &str, now_ms: i64) -> bool {
        let members = match self.members.get_mut(category) {
            Some(members) => members,
            None => self.members.entry(category.clone()).or_default(),
        };
        if let Some(member) = members.get_mut(agent) {
            // It said that no more would come, and here it is.
            member.changed |= std::mem::take(&mut member.leaving);
            return false;
        }
        members.insert(agent.clone(), Member::new(host, now_ms));
        true
    }

    /// The entry that has to be seen before the agent may be answered; none when it is in the ledger. `next`: the next entry.
    #[must_use]
    pub fn answer_after(&self, agent: &AgentId, category: &CategoryName, seen: Option<u64>, next: u64) -> Option<u64> {
        match self.member(agent, category)?.written {
            Written::In(entry) if Some(entry) <= seen => None,
            Written::In(entry) => Some(entry),
            Written::No => Some(next),
        }
    }

    fn member(&self, agent: &AgentId, category: &CategoryName) -> Option<&Member> {
        self.members.get(category)?.get(agent)
    }

    /// Whether a member is not in any entry yet.
    #[must_use]
    pub fn wants_entry(&self) -> bool {
        self.members.values().flat_map(BTreeMap::values).any(|member| member.written == Written::No)
    }

    /// Whether anything has changed since the last entry.
    #[must_use]
    pub fn has_news(&self) -> bool {
        !self.left.is_empty()
            || self.losses_changed
            || self.members.values().flat_map(BTreeMap::values).any(|member| member.changed)
    }

    /// Takes a report. `committed`: how far a stream is committed. `seen`: the last ledger entry that was seen.
    pub fn report(
        &mut self,
        report: &Report,
        now_ms: i64,
        seen: Option<u64>,
        committed: &impl Fn(StreamId) -> u64,
    ) -> ReportAnswer {
        let mut answer = ReportAnswer {
            agent: report.agent.clone(),
            category: report.category.clone(),
            run: report.run,
            heard: 0,
            session: None,
            rival: None,
            refused: None,
            waiting_for: Vec::new(),
        };
        if report.last && self.member(&report.agent, &report.category).is_none() {
            // Nothing is known of it, and nothing will come.
            answer.heard = report.number;
            return answer;
        }
        self.noticed(&report.agent, &report.category, &report.host, now_ms);
        let session = Session { epoch: self.epoch, counter: self.next_session };
        let Some(member) = self.members.get_mut(&report.category).and_then(|members| members.get_mut(&report.agent))
        else {
            return answer;
        };
        member.heard_ms = now_ms;
        if let Some(at) = member.candidates.iter().position(|one| one.run == report.run)
            && report.session == Some(member.candidates[at].session)
        {
            // It has heard its name: from here on it is the run that counts.
            let begun = member.candidates[at];
            member.candidates.retain(|one| one.session > begun.session);
            member.current = Some(begun);
            member.changed = true;
        }
        match member.current {
            Some(current) if current.run == report.run => {
                answer.session = Some(current.session);
                if report.number > current.number {
                    member.current = Some(Run { number: report.number, ..current });
                    self.count(report, now_ms, committed);
                }
            }
            Some(current) if report.session.is_some_and(|old| old < current.session) => {
                answer.rival = Some(current.session);
                if report.rival >= answer.rival {
                    member.clash_ms = Some(now_ms);
                }
            }
            _ => {
                let is_written = matches!(member.written, Written::In(entry) if Some(entry) <= seen);
                match member.candidates.iter_mut().find(|one| one.run == report.run) {
                    Some(candidate) => {
                        candidate.number = candidate.number.max(report.number);
                        answer.session = Some(candidate.session).filter(|_| is_written);
                    }
                    None => {
                        if member.candidates.len() == MAX_CANDIDATES {
                            member.candidates.remove(0);
                        }
                        // The report with which it is confirmed counts: no number of before does.
                        member.candidates.push(Run { run: report.run, session, number: 0 });
                        member.written = Written::No;
                        member.changed = true;
                        self.next_session += 1;
                    }
                }
            }
        }
        self.finish(answer, now_ms)
    }

    /// What a report of the run that counts says.
    fn count(&mut self, report: &Report, now_ms: i64, committed: &impl Fn(StreamId) -> u64) {
        let Some(member) = self.members.get_mut(&report.category).and_then(|members| members.get_mut(&report.agent))
        else {
            return;
        };
        member.host.clone_from(&report.host);
        if member.is_clashing(now_ms) {
            return;
        }
        if let Some(ahead) =
            report.watermark_ms.map(|watermark| watermark - now_ms).filter(|ahead| *ahead > MAX_AHEAD_MS)
        {
            member.refused = Some(format!(
                "the report is from {} s in the future by the clock of the lane's owner: set the clock of this machine",
                ahead / 1000
            ));
            return;
        }
        member.refused = None;
        member.heard = true;
        member.held_by.clone_from(&report.held_by);
        member.watermark_ms = report.watermark_ms.map(|watermark| watermark.min(now_ms));
        for count in &report.counts {
            member.counts.insert((count.start_s, count.size_s), *count);
        }
        while member.counts.len() > MAX_COUNTS {
            member.counts.pop_first();
        }
        if let Some(watermark) = member.watermark_ms {
            member.claim(if report.last { i64::MAX } else { watermark }, &report.required);
            member.changed |= member.leaving != report.last;
            member.leaving = report.last;
        }
        let lost: BTreeSet<StreamId> = report.lost.iter().copied().collect();
        if !lost.is_empty() {
            let losses =
                member.lose(&report.agent, &report.category, now_ms, committed, |stream| lost.contains(&stream));
            self.lose(losses);
        }
    }

    fn lose(&mut self, losses: Vec<Loss>) {
        self.losses_changed |= !losses.is_empty();
        self.losses.extend(losses);
        let too_many = self.losses.len().saturating_sub(MAX_LOSSES);
        self.losses.drain(..too_many);
    }

    fn finish(&mut self, mut answer: ReportAnswer, now_ms: i64) -> ReportAnswer {
        let Some(member) = self.member(&answer.agent, &answer.category) else { return answer };
        answer.heard = match member.current {
            Some(current) if current.run == answer.run => current.number,
            _ => 0,
        };
        answer.refused = if member.is_clashing(now_ms) {
            Some(format!(
                "another machine with the agent id {} sends reports, too: give each machine an agent_id of its own; until then hours wait for it",
                answer.agent
            ))
        } else {
            member.refused.clone()
        };
        let mut waiting: BTreeMap<StreamId, u64> = BTreeMap::new();
        for (stream, offset) in member.claims().flat_map(|claim| &claim.required) {
            let most = waiting.entry(*stream).or_insert(*offset);
            *most = offset.max(most).to_owned();
        }
        answer.waiting_for = waiting
            .into_iter()
            .take(MAX_STREAMS_PER_REPORT)
            .map(|(stream, offset)| StreamOffset { stream, offset })
            .collect();
        answer
    }

    /// Compares what is required with what is committed, and lets go of members that have left.
    pub fn settle(&mut self, committed: &impl Fn(StreamId) -> u64) {
        let left = &mut self.left;
        for (category, members) in &mut self.members {
            members.retain(|agent, member| {
                member.settle(committed);
                let gone = member.leaving && member.first.is_none();
                if gone {
                    left.push((agent.clone(), category.clone()));
                }
                !gone
            });
        }
    }

    /// Notes that `committed` of a stream of this agent has moved.
    pub fn moved(&mut self, agent: &AgentId, category: &CategoryName) {
        if let Some(member) = self.members.get_mut(category).and_then(|members| members.get_mut(agent)) {
            member.moved = true;
        }
    }

    /// How many (agent, category) pairs there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.values().map(BTreeMap::len).sum()
    }

    /// Whether nobody is expected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether any agent is expected for the category.
    #[must_use]
    pub fn has_members(&self, category: &CategoryName) -> bool {
        self.members.get(category).is_some_and(|members| !members.is_empty())
    }

    /// The members that an hour of the category that ends at `end_ms` waits for. Empty: it is complete.
    #[must_use]
    pub fn waits_for(&self, category: &CategoryName, end_ms: i64, now_ms: i64) -> Vec<Waiting> {
        let members = self.members.get(category).into_iter().flatten();
        members
            .filter(|(_, member)| !member.is_past(end_ms))
            .map(|(agent, member)| member.waiting(agent, now_ms))
            .collect()
    }

    /// Up to which time all of a category is committed that its members will ever ship; none while one of them has not said
    /// that of any time, and the end of time where there are no members.
    #[must_use]
    pub fn complete_to(&self, category: &CategoryName) -> Option<i64> {
        let members = self.members.get(category).into_iter().flatten();
        let done = members.map(|(_, member)| member.done_ms.filter(|_| member.is_heard()));
        done.min().unwrap_or(Some(i64::MAX))
    }

    /// Whether anything moved, since [`Roster::looked`], of what an hour that ends at `end_ms` waits for.
    #[must_use]
    pub fn moves(&self, category: &CategoryName, end_ms: i64) -> bool {
        let members = self.members.get(category).into_iter().flatten();
        members.into_iter().any(|(_, member)| member.moved && !member.is_past(end_ms))
    }

    /// Everything that moved has been looked at.
    pub fn looked(&mut self) {
        for member in self.members.values_mut().flat_map(BTreeMap::values_mut) {
            member.moved = false;
        }
    }

    /// What is lost of the time from `start_ms` to `end_ms` of a category.
    #[must_use]
    pub fn losses(&self, category: &CategoryName, start_ms: i64, end_ms: i64) -> Vec<Loss> {
        let belongs = |loss: &&Loss| loss.category == *category && loss.since_ms < end_ms && loss.until_ms >= start_ms;
        self.losses.iter().filter(belongs).cloned().collect()
    }

    /// What the members know to be stored of a bucket.
    #[must_use]
    pub fn counts(&self, category: &CategoryName, bucket: Bucket) -> BTreeMap<AgentId, BucketCount> {
        let members = self.members.get(category).into_iter().flatten();
        let of = (bucket.start_s(), bucket.size().seconds());
        members.filter_map(|(agent, member)| Some((agent.clone(), *member.counts.get(&of)?))).collect()
    }

    /// Removes an agent, named by its id or its host name, from all categories: it will not come back, and what it named and is
    /// not committed is lost. Returns how many members that were.
    pub fn retire(&mut self, name: &str, now_ms: i64, committed: &impl Fn(StreamId) -> u64) -> usize {
        self.remove(now_ms, committed, |agent, member| agent.as_str() == name || member.host == name).len()
    }

    /// Removes the agents that were silent for `forget_after_ms`. Returns them.
    pub fn forget(
        &mut self,
        now_ms: i64,
        forget_after_ms: i64,
        committed: &impl Fn(StreamId) -> u64,
    ) -> Vec<(AgentId, CategoryName)> {
        self.losses.retain(|loss| now_ms.saturating_sub(loss.until_ms) < LOSSES_FOR_MS);
        self.remove(now_ms, committed, |_, member| now_ms.saturating_sub(member.heard_ms) >= forget_after_ms)
    }

    fn remove(
        &mut self,
        now_ms: i64,
        committed: &impl Fn(StreamId) -> u64,
        goes: impl Fn(&AgentId, &Member) -> bool,
    ) -> Vec<(AgentId, CategoryName)> {
        let (mut gone, mut losses) = (Vec::new(), Vec::new());
        for (category, members) in &mut self.members {
            members.retain(|agent, member| {
                if !goes(agent, member) {
                    return true;
                }
                losses.extend(member.lose(agent, category, now_ms, committed, |_| true));
                gone.push((agent.clone(), category.clone()));
                false
            });
        }
        self.left.extend(gone.iter().cloned());
        self.lose(losses);
        gone
    }

    /// All members, for operators.
    pub fn views(&self, now_ms: i64) -> impl Iterator<Item = MemberView> {
        self.members.iter().flat_map(move |(category, members)| {
            members.iter().map(move |(agent, member)| MemberView {
                category: category.clone(),
                waiting: member.waiting(agent, now_ms),
                heard: member.is_heard(),
                session: member.current.map(|run| run.session),
                done_ms: member.done_ms,
            })
        })
    }

    /// What entry `number` says of the roster: what has changed, or all of it.
    pub fn records(&mut self, all: bool, number: u64) -> Vec<MemberRecord> {
        let mut records = Vec::new();
        for (category, members) in &mut self.members {
            for (agent, member) in members {
                if all || std::mem::take(&mut member.changed) {
                    member.changed = false;
                    if member.written == Written::No {
                        member.written = Written::In(number);
                    }
                    records.push(member.record(agent, category));
                }
            }
        }
        records
    }

    /// The members that have left since the last entry.
    pub fn take_left(&mut self) -> Vec<(AgentId, CategoryName)> {
        let members = &self.members;
        // One that came back since is a member.
        let is_back = |(agent, category): &(AgentId, CategoryName)| {
            members.get(category).is_some_and(|of| of.contains_key(agent))
        };
        std::mem::take(&mut self.left).into_iter().filter(|one| !is_back(one)).collect()
    }

    /// All losses, for an entry.
    pub fn all_losses(&mut self) -> Vec<Loss> {
        self.losses_changed = false;
        self.losses.clone()
    }
}

impl Member {
    fn is_clashing(&self, now_ms: i64) -> bool {
        self.clash_ms.is_some_and(|at| now_ms.saturating_sub(at) < CLASH_MS)
    }

    /// Gives up what is required of some streams.
    fn lose(
        &mut self,
        agent: &AgentId,
        category: &CategoryName,
        now_ms: i64,
        committed: &impl Fn(StreamId) -> u64,
        is_lost: impl Fn(StreamId) -> bool,
    ) -> Vec<Loss> {
        let mut losses: BTreeMap<StreamId, Loss> = BTreeMap::new();
        let since_ms = self.done_ms.unwrap_or(i64::MIN);
        for claim in self.first.iter_mut().chain(&mut self.last) {
            claim.required.retain(|stream, offset| {
                let (from, lost) = (committed(*stream), is_lost(*stream));
                if lost && from < *offset {
                    let until_ms = claim.watermark_ms.min(now_ms);
                    let loss = losses.entry(*stream).or_insert_with(|| Loss {
                        category: category.clone(),
                        agent: agent.clone(),
                        stream: *stream,
                        from,
                        to: *offset,
                        since_ms,
                        until_ms,
                    });
                    loss.to = loss.to.max(*offset);
                    loss.until_ms = loss.until_ms.max(until_ms);
                }
                !lost
            });
        }
        self.changed |= !losses.is_empty();
        losses.into_values().collect()
    }

    fn waiting(&self, agent: &AgentId, now_ms: i64) -> Waiting {
        let reason = if self.is_clashing(now_ms) {
            "two machines use this agent id at the same time".to_owned()
        } else if let Some(refused) = &self.refused {
            refused.clone()
        } else if !self.is_heard() {
            "not heard since this root took the lane".to_owned()
        } else {
            self.held_by.clone()
        };
        Waiting {
            agent: agent.clone(),
            host: self.host.clone(),
            watermark_ms: self.watermark_ms,
            heard_ms: self.heard_ms,
            offsets: self
                .first
                .iter()
                .flat_map(|claim| &claim.required)
                .map(|(&stream, &offset)| StreamOffset { stream, offset })
                .collect(),
            reason,
        }
    }
}

#[cfg(test)]
mod tests;
