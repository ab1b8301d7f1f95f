//! The agent over real files, in front of edges and a root that live in this process.

mod chaos;
mod cli;
mod content;
mod database;
mod docs;
mod filesystems;
mod machine;
mod reports;
mod rotation;
mod scale;
mod shipping;
mod support;
mod times;
