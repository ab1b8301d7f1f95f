//! The agent.

pub mod compress;
pub mod config;
pub mod cut;
pub mod identity;
pub mod stream;
pub mod tail;
pub mod timestamp;
pub mod worker;
