//! What tiers say to each other over HTTP.
//!
//! | Request | Body | Answer |
//! |---|---|---|
//! | `POST /v1/batches` | batches ([`crate::batch`]), one after the other | [`Answers`], one per batch, in order |
//! | `POST /v1/positions` | [`PositionsQuery`] | [`Answers`], one per stream, in order |
//! | `POST /v1/reports` | [`Reports`](crate::report::Reports) | [`ReportAnswers`](crate::report::ReportAnswers) |
//! | `GET /v1/categories` | | [`Categories`] |
//! | `GET /v1/status` | | what the node's `status` command shows |
//! | `POST /v1/drain`, from the node's own machine | | 202; the node empties itself and ends |
//!
//! Bodies other than batches are JSON. A request that can't be served as a whole gets an HTTP status and a
//! [`Problem`]: 4xx is final for exactly this request, 429 and 503 come with `Retry-After`.
//!
//! 307 with `Location` comes from a root: another one owns the lane, and the same request goes there, at the same path. Who
//! sends remembers that for the lane, and follows only to nodes that it knows. 503 with [`SIBLING_HEADER`] comes from a node
//! that is being emptied: any other node of its tier is better, at once.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bucket::BucketSize;
use crate::frame::Codec;
use crate::ids::{AgentId, CategoryName, Epoch, LaneId, StreamId};
use crate::position::Position;

/// Where batches go.
pub const BATCHES_PATH: &str = "/v1/batches";
/// Where positions are asked for.
pub const POSITIONS_PATH: &str = "/v1/positions";
/// Where reports go.
pub const REPORTS_PATH: &str = "/v1/reports";
/// Where an agent learns the settings of its categories.
pub const CATEGORIES_PATH: &str = "/v1/categories";
/// Where an operator asks an aggregator how it is.
pub const STATUS_PATH: &str = "/v1/status";
/// Where an operator tells an aggregator to empty itself and end.
pub const DRAIN_PATH: &str = "/v1/drain";
/// Where an operator asks a root which agents it expects.
pub const AGENTS_PATH: &str = "/v1/agents";
/// Where an operator tells a root to expect an agent no more.
pub const RETIRE_PATH: &str = "/v1/agents/retire";
/// The content type of a body of batches; the version of the protocol is part of it.
pub const BATCHES_CONTENT_TYPE: &str = "application/vnd.tributary.batches.v1";

/// With a 503: the node is being emptied before it stops; go to another one of its tier, and count no failure. Its value is
/// `sibling`.
pub const SIBLING_HEADER: &str = "tributary-go";

/// What became of a batch, or what is known of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// The batch was taken, or was there already, or lies below `committed`; or (to a query) the stream is known.
    Ok,
    /// The batch begins beyond what this tier has: send from `next`.
    Expected,
    /// Not now; send the same again later.
    Wait {
        /// Why.
        reason: String,
    },
    /// The stream's bytes are not those that its owner has: the file was replaced by something else. Nothing was written.
    Diverged {
        /// The last batch ends that the owner knows, oldest first; at most [`crate::limits::HISTORY_LEN`].
        history: Vec<Position>,
    },
    /// The lane's owner, which knows all that there is, does not know the stream, and the batch does not begin at
    /// its base.
    Unknown,
    /// Final: this batch will never be taken.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}

/// Which owner of which lane an answer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The lane.
    pub lane: LaneId,
    /// The owner's epoch.
    pub epoch: Epoch,
}

/// One stream's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The stream.
    pub stream: StreamId,
    /// The byte expected next: the sender may read on to here. Always a batch end (or the base). None where this tier
    /// does not know.
    pub next: Option<Position>,
    /// Durable on the sink: everybody below may forget what lies before. None where this tier does not know.
    pub committed: Option<Position>,
    /// Who owned the stream's lane when `committed` was said, where known.
    pub owner: Option<Owner>,
    /// What became of the batch.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// The answer to batches and to a positions query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    /// One per batch or stream asked for, in that order.
    pub answers: Vec<Answer>,
}

/// One stream of a positions query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamQuery {
    /// The lane of the agent.
    pub lane: LaneId,
    /// The agent.
    pub agent: AgentId,
    /// The category.
    pub category: CategoryName,
    /// The stream.
    pub stream: StreamId,
    /// How far the asker knows it to be committed, if it knows.
    pub committed: Option<Position>,
}

/// "What have you of these streams?" At most [`crate::limits::MAX_STREAMS_PER_QUERY`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PositionsQuery {
    /// The streams.
    pub streams: Vec<StreamQuery>,
}

/// What an agent needs to know of a category to cut its batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CategorySettings {
    /// The size of its buckets in seconds.
    pub bucket_s: BucketSize,
    /// How its frames are compressed.
    pub codec: Codec,
    /// How long after its time a line may be written to its file, in milliseconds: an agent says that it has all of a
    /// bucket no sooner than so long after the bucket's end.
    #[serde(default)]
    pub close_delay_ms: u64,
}

/// The categories of the topology.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Categories {
    /// How many lanes there are.
    pub lanes: crate::ids::LaneCount,
    /// By name.
    pub categories: BTreeMap<CategoryName, CategorySettings>,
}

/// Why a request was not served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What was wrong and what to do.
    pub error: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Nothing that a server answers, and nothing that a client asks, makes the reader panic, and what is read can be said again.
        #[test]
        fn no_text_makes_the_readers_of_messages_panic(
            text in r#"[\[\]{}:,"a-z0-9.\-]{0,60}"#,
            at: proptest::sample::Index,
            cut in 0_usize..20,
        ) {
            let answers = r#"{"answers":[{"stream":"000000000000000000000000000000ff","next":{"offset":0,"tail":"2d06800538d394c2"},"committed":null,"owner":{"lane":0,"epoch":3},"verdict":"diverged","history":[{"offset":9,"tail":"2d06800538d394c2"}]}]}"#;
            let query = r#"{"streams":[{"lane":0,"agent":"web-1","category":"app","stream":"000000000000000000000000000000ff","committed":null}]}"#;
            let categories = r#"{"lanes":2,"categories":{"app":{"bucket_s":3600,"codec":"gzip"}}}"#;
            for good in [answers, query, categories] {
                let at = at.index(good.len());
                let bad = format!("{}{text}{}", &good[..at], &good[(at + cut).min(good.len())..]);
                if let Ok(read) = serde_json::from_str::<Answers>(&bad) {
                    let again = serde_json::to_string(&read).expect("serializes");
                    prop_assert_eq!(serde_json::from_str::<Answers>(&again).expect("reads"), read);
                }
                let _ = serde_json::from_str::<PositionsQuery>(&bad);
                let _ = serde_json::from_str::<Categories>(&bad);
                let _ = serde_json::from_str::<Problem>(&bad);
            }
        }
    }

    /// Agents and aggregators of different releases talk to each other: the JSON form is a contract.
    #[test]
    fn answers_have_a_stable_form() {
        let answer = Answer {
            stream: StreamId(255),
            next: Some(Position::zero()),
            committed: None,
            owner: Some(Owner { lane: LaneId(0), epoch: Epoch(3) }),
            verdict: Verdict::Diverged { history: vec![Position::zero()] },
        };
        let json = serde_json::to_string(&answer).expect("serializes");
        assert_eq!(
            json,
            concat!(
                r#"{"stream":"000000000000000000000000000000ff","next":{"offset":0,"tail":"2d06800538d394c2"},"#,
                r#""committed":null,"owner":{"lane":0,"epoch":3},"verdict":"diverged","#,
                r#""history":[{"offset":0,"tail":"2d06800538d394c2"}]}"#
            )
        );
        assert_eq!(serde_json::from_str::<Answer>(&json).expect("reads"), answer);
    }
}
