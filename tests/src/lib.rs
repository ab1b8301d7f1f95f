//! The end-to-end tests: real processes, a real HDFS, real log writers and readers.
//!
//! `tests/setup.sh` installs the real parts; a test that needs one that is missing fails and says so.
//!
//! | to run | call |
//! |---|---|
//! | every check and every test | `tests/run.sh` |
//! | the whole on local files, live | `tests/demo.sh` |
//! | what it costs, beside the compressor alone | `cargo run --release -p tributary-tests --bin bench` |
//! | random faults, for as long as you like | `cargo run -p tributary-tests --bin chaos -- --seed 7 --duration 10m` |
//! | the classic ways into HDFS beside Tributary, in figures | `cargo run -p tributary-tests --bin compare` |
//! | a real HDFS to play with | `cargo run -p tributary-tests --bin mini-hdfs` |
//!
//! | to have | use |
//! |---|---|
//! | a real HDFS, its faults, its audit log | [`hdfs::MiniHdfs`], or the command `mini-hdfs` to play with one |
//! | a look at HDFS without the code under test | [`webhdfs::WebHdfs`] |
//! | a real access log, rotated as in production | [`nginx::Nginx`], [`load::Load`], [`logrotate::Logrotate`] |
//! | a log of any speed, rotated by rename, with a copy of every line | [`writer::Writer`] |
//! | lines like those of an access log, from a number | [`synthetic::AccessLog`] |
//! | agents, edges and a root as real processes, to kill, stop, wipe | [`cluster::Cluster`] |
//! | a verdict on a whole run | [`judge::Scenario`], [`scenario::scenario`] |
//! | a look at each hour as it appears: whole, and never changed | [`watch::Watch`] |
//! | connections that are cut, delayed, half-closed | [`proxy::Proxy`] |
//! | a disk that can be filled | [`disk::SmallDisk`] |
//! | faults of all kinds, by a seed | [`chaos`] |
//! | what users' jobs find in a published tree | [`readers::read_lines`] |
//! | lines written against lines found | [`lines::Lines::difference`] |
//! | a child process that can't outlive the test run | [`process::Process`] |
//! | what everything costs, beside what it must cost | [`benchmark`] |
//! | what a process uses | [`usage::Usage`] |
//! | a condition instead of a sleep | [`wait::until`] |

pub mod benchmark;
pub mod chaos;
pub mod cluster;
pub mod comparison;
pub mod disk;
pub mod hdfs;
pub mod judge;
pub mod lines;
pub mod load;
pub mod logrotate;
pub mod machine;
pub mod nginx;
pub mod parts;
pub mod process;
pub mod programs;
pub mod proxy;
pub mod published;
pub mod readers;
pub mod scenario;
pub mod synthetic;
pub mod usage;
pub mod wait;
pub mod watch;
pub mod webhdfs;
pub mod writer;
