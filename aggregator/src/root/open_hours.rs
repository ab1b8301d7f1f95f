//! What a lane tells operators of the hours that readers don't see yet: `open_hours` in its status. Pure.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use tributary_common::bucket::{Bucket, BucketSize};
use tributary_common::ids::AgentId;

/// Of the open hours of a category so many of the oldest are named, and so many of the newest: all of a backlog of a week.
const NAMED_HOURS: usize = 100;

/// Of the agents that an hour waits for so many are named.
pub const NAMED_AGENTS: usize = 20;

/// The open hours of a category in one lane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenHours {
    /// The hours, by time.
    pub hours: Vec<OpenHour>,
    /// Those that are not among them.
    pub left_out: Option<LeftOut>,
}

/// Open hours that are not named: there are too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// How many.
    pub hours: u64,
    /// When the first of them begins, in seconds since 1970, UTC.
    pub from_s: i64,
    /// When the last of them begins.
    pub to_s: i64,
}

/// What one lane has of an hour that readers don't see yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenHour {
    /// Its start, seconds since 1970, UTC.
    pub bucket_start_s: i64,
    /// Its size in seconds.
    pub bucket_size_s: u32,
    /// Whether its end is past.
    pub over: bool,
    /// Whether this lane has sealed it: what the lane has of it stands in its seal in the hour's directory, or is on its way there.
    pub sealed: bool,
    /// Records that this lane has of it. 0 of one that it sealed, unless the files are on their way: then the seal says it.
    pub records: u64,
    /// Their stored length in bytes.
    pub bytes: u64,
    /// The files that its seal names, as long as they are on their way.
    pub files: u64,
    /// How many agents it waits for.
    pub waiting_for: u64,
    /// Some of them.
    pub agents: Vec<WaitedFor>,
    /// For how long nothing of what it waits for has moved, in seconds: what `give_up_after` is compared with.
    pub waited_in_vain_s: u64,
}

impl OpenHour {
    /// Its bucket, if there can be one like that.
    #[must_use]
    pub fn bucket(&self) -> Option<Bucket> {
        Bucket::new(self.bucket_start_s, BucketSize::try_from(self.bucket_size_s).ok()?).ok()
    }
}

/// An agent that an open hour waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitedFor {
    /// The agent.
    pub agent: AgentId,
    /// Its host name.
    pub host: String,
    /// How far its watermark lies before the hour's end, in milliseconds; none if it gave none.
    pub behind_ms: Option<i64>,
    /// For how long nothing was heard of it, in milliseconds; of one that was not heard since the lane was taken: since then.
    pub silent_ms: i64,
    /// Streams of which it named bytes that are not committed.
    pub uncommitted_streams: u64,
    /// These bytes.
    pub uncommitted_bytes: u64,
    /// Why its watermark does not move, in its own words, or why it is not believed.
    pub reason: String,
}

/// Which of a category's open hours are named: the oldest, the newest (these may be of the future, by agents' clocks), and the one
/// of the present moment; and what is left out.
#[must_use]
pub fn named(open: &BTreeSet<Bucket>, now_ms: i64) -> (Vec<Bucket>, Option<LeftOut>) {
    let is_named = |(at, bucket): &(usize, Bucket)| {
        *at < NAMED_HOURS || *at + NAMED_HOURS >= open.len() || bucket.contains_ms(now_ms)
    };
    let (named, left): (Vec<_>, Vec<_>) = open.iter().copied().enumerate().partition(is_named);
    let left_out = left.first().zip(left.last()).map(|((_, first), (_, last))| LeftOut {
        hours: left.len() as u64,
        from_s: first.start_s(),
        to_s: last.start_s(),
    });
    (named.into_iter().map(|(_, bucket)| bucket).collect(), left_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hours(range: std::ops::Range<i64>) -> BTreeSet<Bucket> {
        range.map(|hour| BucketSize::HOUR.bucket_of_ms(hour * 3_600_000)).collect()
    }

    #[test]
    fn of_many_open_hours_the_oldest_the_newest_and_the_present_one_are_named_and_the_others_counted() {
        assert_eq!(named(&hours(0..200), 0).1, None);
        // A clock that is wrong by days has made the last 148.
        let (named, left_out) = named(&hours(0..1000), 851 * 3_600_000 + 5);
        let named: Vec<i64> = named.into_iter().map(|bucket| bucket.start_s() / 3600).collect();
        assert_eq!(named, (0..100).chain([851]).chain(900..1000).collect::<Vec<_>>());
        assert_eq!(left_out, Some(LeftOut { hours: 799, from_s: 100 * 3600, to_s: 899 * 3600 }));
    }
}
