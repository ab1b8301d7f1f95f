//! The end-to-end tests: real processes, a real HDFS, real log writers and readers.
//!
//! `tests/setup.sh` installs the real parts; a test that needs one that is missing fails and says so.

pub mod hdfs;
pub mod lines;
pub mod load;
pub mod logrotate;
pub mod nginx;
pub mod parts;
pub mod process;
pub mod readers;
pub mod wait;
pub mod webhdfs;
