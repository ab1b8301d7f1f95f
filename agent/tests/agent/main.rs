//! The agent over real files, in front of edges and a root that live in this process.

mod database;
mod shipping;
mod support;
