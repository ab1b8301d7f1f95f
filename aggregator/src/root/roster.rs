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
//! One that has left or was retired is remembered for a while. What was on its way of it then (bytes, and reports that a tier had
//! kept, also later ones than any that was heard) does not bring it back: that takes a report with a session that was given to it
//! since, which nobody can make but an agent that lives. While what it had named is awaited, a later report cancels a leave, and so
//! do other bytes than those.
//!
//! A member's reports are **claims**: a watermark, and the offsets that belong to it. The oldest one that is not fulfilled stays
//! as it is until it is; only the newest behind it is replaced by later ones. So an agent that never rests does not put its
//! hours off for ever by naming ever higher offsets, and two claims are all that is kept.
//!
//! # When something moves that an hour waits for
//!
//! When bytes of the hour or of one before it become durable, or `committed` of a stream that the oldest claim of a member names,
//! and that member's reports are believed. What a member commits beside that says nothing: the logs of a server can go on for ever
//! while its watermark stands still.
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

/// Losses are remembered for so long after the time that they belong to, and longer while an hour of that time is open: an hour of a
/// backlog may begin later.
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

/// How a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Reports of it are expected.
    Expected,
    /// It has said that nothing more will come, and goes when its claims are fulfilled.
    Leaving,
    /// It has left, or was retired: nothing waits for it.
    Gone,
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
    standing: Standing,
    counts: BTreeMap<(i64, u32), BucketCount>,
    /// Whether, since the last look, `committed` of a stream has moved that its oldest claim names.
    claim_moved: bool,
    /// The end of the earliest open bucket of which bytes of it have become durable since the last look.
    came_of_ms: Option<i64>,
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
            standing: Standing::Expected,
            counts: BTreeMap::new(),
            claim_moved: false,
            came_of_ms: None,
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

    fn is_gone(&self) -> bool {
        self.standing == Standing::Gone
    }

    /// Nothing is expected of it any more. A session that it was given and has not used may be in a report on its way.
    fn goes(&mut self) {
        self.standing = Standing::Gone;
        self.candidates.clear();
        self.first = None;
        self.last = None;
        self.counts.clear();
        self.changed = true;
    }

    /// It is expected again, and how far it has got is not known; which runs it had is.
    fn returns(&mut self, host: &str, now_ms: i64) {
        let candidates = std::mem::take(&mut self.candidates);
        *self = Self { current: self.current, candidates, ..Self::new(host, now_ms) };
    }

    /// It has said something new: it is expected, whatever it had said before.
    fn speaks(&mut self, host: &str, now_ms: i64) {
        if self.is_gone() {
            self.returns(host, now_ms);
        }
        self.changed |= self.standing != Standing::Expected;
        self.standing = Standing::Expected;
    }

    /// Whether it has named bytes of the stream behind this place.
    fn awaits(&self, from: StreamOffset) -> bool {
        self.claims().any(|claim| claim.required.get(&from.stream) > Some(&from.offset))
    }

    fn is_heard(&self) -> bool {
        self.heard || self.standing == Standing::Leaving
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
            // One that is gone is one that leaves and has no claims.
            leaving: self.standing != Standing::Expected,
        }
    }

    fn load(record: &MemberRecord, number: u64, now_ms: i64) -> Self {
        let run = |run: &RunRecord| Run { run: RunId(run.run), session: run.session, number: run.number };
        // Former owners took the end of time for the watermark of an agent that leaves, also where it came back after all.
        let done_ms = record.done_ms.filter(|done| *done < i64::MAX);
        let mut reached = done_ms.unwrap_or(0);
        let mut claims = record.claims.iter().map(|claim| {
            reached = if claim.watermark_ms < i64::MAX { claim.watermark_ms } else { reached };
            Claim {
                watermark_ms: reached,
                required: claim.required.iter().map(|one| (one.stream, one.offset)).collect(),
            }
        });
        let standing = match (record.leaving, record.claims.is_empty()) {
            (false, _) => Standing::Expected,
            (true, false) => Standing::Leaving,
            (true, true) => Standing::Gone,
        };
        // When one that is gone went.
        let heard_ms = done_ms.filter(|_| standing == Standing::Gone).map_or(now_ms, |went| went.min(now_ms));
        Self {
            current: record.current.as_ref().map(run),
            candidates: record.candidates.iter().map(run).collect(),
            heard_ms,
            written: Written::In(number),
            done_ms,
            first: claims.next(),
            last: claims.next(),
            standing,
            changed: false,
            ..Self::new(&record.host, now_ms)
        }
    }
}

/// Bytes of a stream that have become durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Came {
    /// The stream.
    pub stream: StreamId,
    /// Whether `committed` of it has moved.
    pub moved: bool,
    /// The end of the bucket that they are of, milliseconds since 1970; none where that is sealed, so that they are late.
    pub bucket_end_ms: Option<i64>,
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

    /// Adds an agent of which bytes were written, or found by a recovery: those of a stream behind `from`. Returns whether it was not
    /// known before.
    ///
    /// One that is gone stays so, though its bytes may come for long after it was retired, from the spool of an edge that was down
    /// meanwhile. One that has come back says so itself, within seconds.
    pub fn noticed(
        &mut self,
        agent: &AgentId,
        category: &CategoryName,
        host: &str,
        from: StreamOffset,
        now_ms: i64,
    ) -> bool {
        let is_new = self.member(agent, category).is_none();
        let member = self.member_or_new(agent, category, host, now_ms);
        // It said that no more would come but for what it had named, and here is more.
        if member.standing == Standing::Leaving && !member.awaits(from) {
            member.standing = Standing::Expected;
            member.changed = true;
        }
        is_new
    }

    fn member_or_new(&mut self, agent: &AgentId, category: &CategoryName, host: &str, now_ms: i64) -> &mut Member {
        let members = self.members.entry(category.clone()).or_default();
        members.entry(agent.clone()).or_insert_with(|| Member::new(host, now_ms))
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
        let mut answer = report.answer();
        let is_absent = self.member(&report.agent, &report.category).is_none_or(Member::is_gone);
        if report.last && report.required.is_empty() && is_absent {
            // Nothing of it is waited for, and nothing will come.
            answer.heard = report.number;
            return answer;
        }
        let session = Session { epoch: self.epoch, counter: self.next_session };
        let member = self.member_or_new(&report.agent, &report.category, &report.host, now_ms);
        member.heard_ms = now_ms;
        if let Some(at) = member.candidates.iter().position(|one| one.run == report.run)
            && report.session == Some(member.candidates[at].session)
        {
            // It has heard its name: from here on it is the run that counts.
            let begun = member.candidates[at];
            member.candidates.retain(|one| one.session > begun.session);
            member.current = Some(begun);
            member.changed = true;
            member.speaks(&report.host, now_ms);
        }
        match member.current {
            // What it had said before it left is no news. To anything else it is given a session: it comes back with that.
            Some(current) if member.is_gone() && current.run == report.run && report.number <= current.number => {
                answer.session = Some(current.session);
            }
            Some(current) if !member.is_gone() && current.run == report.run => {
                answer.session = Some(current.session);
                if report.number > current.number {
                    member.current = Some(Run { number: report.number, ..current });
                    if !report.last {
                        member.speaks(&report.host, now_ms);
                    }
                    self.count(report, now_ms, committed);
                }
            }
            Some(current) if !member.is_gone() && report.session.is_some_and(|old| old < current.session) => {
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
            member.claim(watermark, &report.required);
            if report.last {
                member.changed |= member.standing != Standing::Leaving;
                member.standing = Standing::Leaving;
            }
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
        if too_many > 0 {
            tracing::error!(
                losses = too_many,
                most = MAX_LOSSES,
                "more is declared lost than a lane remembers: the manifests of the hours that come do not name the oldest losses"
            );
        }
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
        for member in self.members.values_mut().flat_map(BTreeMap::values_mut) {
            member.settle(committed);
            if member.standing == Standing::Leaving && member.first.is_none() {
                member.goes();
            }
        }
    }

    /// Notes that bytes of this agent have become durable. To be told before the claims are compared with it.
    pub fn came(&mut self, agent: &AgentId, category: &CategoryName, came: Came) {
        let Some(member) = self.members.get_mut(category).and_then(|members| members.get_mut(agent)) else { return };
        let is_of = |claim: &Claim| claim.required.contains_key(&came.stream);
        member.claim_moved |= came.moved && member.first.as_ref().is_some_and(is_of);
        let earliest = member.came_of_ms.into_iter().chain(came.bucket_end_ms).min();
        member.came_of_ms = earliest;
    }

    /// The members of a category that are expected.
    fn expected(&self, category: &CategoryName) -> impl Iterator<Item = (&AgentId, &Member)> {
        self.members.get(category).into_iter().flatten().filter(|(_, member)| !member.is_gone())
    }

    /// How many (agent, category) pairs there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.values().flat_map(BTreeMap::values).filter(|member| !member.is_gone()).count()
    }

    /// Whether nobody is expected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether any agent is expected for the category.
    #[must_use]
    pub fn has_members(&self, category: &CategoryName) -> bool {
        self.expected(category).next().is_some()
    }

    fn behind(&self, category: &CategoryName, end_ms: i64) -> impl Iterator<Item = (&AgentId, &Member)> {
        self.expected(category).filter(move |(_, member)| !member.is_past(end_ms))
    }

    /// The members that an hour of the category that ends at `end_ms` waits for. None: it is complete.
    pub fn waits_for(&self, category: &CategoryName, end_ms: i64, now_ms: i64) -> impl Iterator<Item = Waiting> {
        self.behind(category, end_ms).map(move |(agent, member)| member.waiting(agent, now_ms))
    }

    /// How many that are.
    #[must_use]
    pub fn waits_for_count(&self, category: &CategoryName, end_ms: i64) -> usize {
        self.behind(category, end_ms).count()
    }

    /// Up to which time all of a category is committed that its members will ever ship; none while one of them has not said
    /// that of any time, and the end of time where there are no members.
    #[must_use]
    pub fn complete_to(&self, category: &CategoryName) -> Option<i64> {
        let done = self.expected(category).map(|(_, member)| member.done_ms.filter(|_| member.is_heard()));
        done.min().unwrap_or(Some(i64::MAX))
    }

    /// Whether anything came, since [`Roster::looked`], of what an hour waits for that is complete when each member is past
    /// `end_ms`. `bucket_end_ms`: the end of its bucket.
    #[must_use]
    pub fn moves(&self, category: &CategoryName, end_ms: i64, bucket_end_ms: i64, now_ms: i64) -> bool {
        self.expected(category).any(|(_, member)| {
            let came = member.claim_moved || member.came_of_ms.is_some_and(|end| end <= bucket_end_ms);
            // Whatever comes of one that is not believed, it will not be past the hour.
            came && !member.is_past(end_ms) && member.refused.is_none() && !member.is_clashing(now_ms)
        })
    }

    /// Everything that came has been looked at.
    pub fn looked(&mut self) {
        for member in self.members.values_mut().flat_map(BTreeMap::values_mut) {
            member.claim_moved = false;
            member.came_of_ms = None;
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
        let of = (bucket.start_s(), bucket.size().seconds());
        self.expected(category).filter_map(|(agent, member)| Some((agent.clone(), *member.counts.get(&of)?))).collect()
    }

    /// Expects an agent, named by its id or its host name, no more in this category, or in any: it will not come back, and what it
    /// named and is not committed is lost. Returns how many members that were.
    pub fn retire(
        &mut self,
        name: &str,
        only: Option<&CategoryName>,
        now_ms: i64,
        committed: &impl Fn(StreamId) -> u64,
    ) -> usize {
        let (mut retired, mut losses) = (0, Vec::new());
        for (category, members) in
            self.members.iter_mut().filter(|(category, _)| only.is_none_or(|only| only == *category))
        {
            for (agent, member) in members.iter_mut().filter(|(_, member)| !member.is_gone()) {
                if agent.as_str() == name || member.host == name {
                    losses.extend(member.lose(agent, category, now_ms, committed, |_| true));
                    member.goes();
                    // It is remembered from now on, also by the next owner.
                    member.heard_ms = now_ms;
                    member.done_ms = Some(now_ms);
                    retired += 1;
                }
            }
        }
        self.lose(losses);
        retired
    }

    /// Forgets the agents that were silent for `forget_after_ms`, and returns them; those that have been gone for `gone_for_ms`, longer
    /// than any spool keeps what it has of them; and losses. `open_from_ms`: the start of the first hour of a category that is not sealed.
    pub fn forget(
        &mut self,
        now_ms: i64,
        forget_after_ms: i64,
        gone_for_ms: i64,
        open_from_ms: &impl Fn(&CategoryName) -> i64,
        committed: &impl Fn(StreamId) -> u64,
    ) -> Vec<(AgentId, CategoryName)> {
        self.losses.retain(|loss| {
            now_ms.saturating_sub(loss.until_ms) < LOSSES_FOR_MS || loss.until_ms >= open_from_ms(&loss.category)
        });
        let (mut forgotten, mut losses) = (Vec::new(), Vec::new());
        let left = &mut self.left;
        for (category, members) in &mut self.members {
            members.retain(|agent, member| {
                let after_ms = if member.is_gone() { gone_for_ms } else { forget_after_ms };
                if now_ms.saturating_sub(member.heard_ms) < after_ms {
                    return true;
                }
                left.push((agent.clone(), category.clone()));
                if !member.is_gone() {
                    losses.extend(member.lose(agent, category, now_ms, committed, |_| true));
                    forgotten.push((agent.clone(), category.clone()));
                }
                false
            });
        }
        self.lose(losses);
        forgotten
    }

    /// All members, for operators.
    pub fn views(&self, now_ms: i64) -> impl Iterator<Item = MemberView> {
        self.members.iter().flat_map(move |(category, members)| {
            members.iter().filter(|(_, member)| !member.is_gone()).map(move |(agent, member)| MemberView {
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

    /// The members that were forgotten since the last entry.
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
