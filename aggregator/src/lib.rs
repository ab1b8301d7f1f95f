//! The aggregator: a node of any tier above the agents.

pub mod receive;
pub mod tier;
