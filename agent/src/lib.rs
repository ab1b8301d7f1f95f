//! The agent: finds log files, follows them, and ships their lines in compressed batches to the tier above.
//!
//! | Part | What it does |
//! |---|---|
//! | [`config`] | what is shipped, how, and to whom |
//! | [`discover`], [`watch`] | find files, and hear of changes |
//! | [`identity`] | what makes a file the same file |
//! | [`copies`] | what makes another file hold the same |
//! | [`tail`] | decides when a file is read |
//! | [`stream`] | decides what is read, sent and let go of |
//! | [`find`], [`timestamp`], [`cut`], [`compress`] | make batches of bytes |
//! | [`worker`] | the threads that touch log files |
//! | [`memory`] | what is known of streams |
//! | [`checkpoint`] | what is remembered from run to run |
//! | [`watermark`] | up to which time all is read, and what is reported of that |
//! | [`ship`] | requests |
//! | [`engine`] | carries out what the others decide |
//! | [`status`], [`explain`], [`metrics`] | what is shown |
//! | [`cli`] | the program |

pub mod checkpoint;
pub mod cli;
pub mod compress;
pub mod config;
pub mod copies;
pub mod cut;
pub mod discover;
pub mod engine;
pub mod explain;
pub mod find;
pub mod identity;
pub mod memory;
pub mod metrics;
pub mod ship;
pub mod status;
pub mod stream;
pub mod tail;
pub mod tally;
pub mod timestamp;
pub mod watch;
pub mod watermark;
pub mod worker;
