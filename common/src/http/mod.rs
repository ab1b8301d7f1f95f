//! HTTP between the tiers: what a client needs to choose a server and to retry, and a bounded server.

pub mod backoff;
pub mod endpoint;
