//! What the agent and the aggregators share: names, positions, the frame and batch formats, the messages between
//! tiers, configuration, topology, HTTP and telemetry.
//!
//! The words used here (category, stream, bucket, batch, slice, run, frame, lane) are defined in `ARCHITECTURE.md`.

pub mod batch;
pub mod bucket;
pub mod checksum;
pub mod config;
pub mod exit;
pub mod frame;
pub mod http;
pub mod ids;
pub mod limits;
pub mod messages;
pub mod position;
pub mod ranges;
pub mod report;
pub mod shutdown;
pub mod telemetry;
pub mod topology;
