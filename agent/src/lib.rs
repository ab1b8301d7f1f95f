//! The agent.

pub mod config;
pub mod cut;
pub mod timestamp;
