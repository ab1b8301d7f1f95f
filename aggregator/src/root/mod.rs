//! The root: merges batches into few large files, each record once, and publishes complete hours.

pub mod hours;
pub mod ingest;
pub mod lane;
pub mod ledger;
pub mod metrics;
pub mod recovery;
pub mod segment;
pub mod sink;
