//! HTTP between the tiers: a server within bounds, and what a client needs to choose a server and to retry.

pub mod backoff;
pub mod body;
pub mod client;
pub mod endpoint;
pub mod ops;
pub mod pool;
pub mod server;
