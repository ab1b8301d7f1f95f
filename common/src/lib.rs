//! What the agent and the aggregator share.
