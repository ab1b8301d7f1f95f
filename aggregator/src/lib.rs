//! The aggregator: receives batches, spools and forwards them, and as a root merges them into large files.

pub mod agents;
pub mod audit;
pub mod cli;
pub mod config;
pub mod dfs;
mod disk;
pub mod edge;
pub mod forward;
pub mod frames;
pub mod hours;
pub mod inspect;
pub mod node;
pub mod operate;
pub mod published;
pub mod receive;
pub mod root;
pub mod setaside;
pub mod spool;
pub mod surroundings;
pub mod tier;

#[cfg(test)]
mod testing;
