//! What the tables of the topology say, checked. Each field's doc gives the key, its default, bounds and unit.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::bucket::BucketSize;
use crate::frame::Codec;
use crate::http::backoff::BackoffLimits;

/// What kind of file system the sink is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum SinkKind {
    /// `file://`: a directory of the root's machine.
    File,
    /// `hdfs://`.
    Hdfs,
}

/// The table `[sink]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sink {
    /// `uri`: `file:///base` or `hdfs://host[:port]/base`, without a slash at its end. Required.
    pub uri: String,
    /// What the URI begins with.
    pub kind: SinkKind,
    /// `call_timeout`: for each call to the sink. Default 20s, from 100ms to 10m.
    pub call_timeout: Duration,
    /// `sync_timeout`: for making written bytes durable, which waits for several machines' disks. Default 20s, from
    /// 100ms to 10m.
    pub sync_timeout: Duration,
    /// `replication` of new files. Default: the cluster's. From 1 to 512.
    pub replication: Option<u16>,
    /// `min_replication`: the least that is tried while DataNodes are missing. Default 2, or `replication` if that is
    /// less. From 1 to 512, at most `replication`.
    pub min_replication: u16,
    /// `user`: whom HDFS takes us for, without Kerberos. Default: the user that the process runs as.
    pub user: Option<String>,
    /// `kerberos_principal`; together with the keytab.
    pub kerberos_principal: Option<String>,
    /// `kerberos_keytab`: absolute; together with the principal.
    pub kerberos_keytab: Option<PathBuf>,
    /// `hadoop_conf_dir`: absolute; where `core-site.xml` and `hdfs-site.xml` lie. Default: `HADOOP_CONF_DIR`.
    pub hadoop_conf_dir: Option<PathBuf>,
}

/// Where data goes that comes after its bucket was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Late {
    /// Into `_late` in the bucket's directory; readers choose.
    Beside,
}

/// How a bucket is published for which some agents' data is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum OnMissing {
    /// With `_PARTIAL.json` that names them, without the success file.
    Partial,
    /// With `_PARTIAL.json` and the success file.
    Publish,
}

/// The table `[root]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RootOptions {
    /// `commit_interval`: time between two syncs of a file that is written to. Default 1s, from 50ms to 60s.
    pub commit_interval: Duration,
    /// `commit_bytes`: unsynced bytes after which a sync is not waited for. Default 64 MiB, from 64 KiB to 1 GiB.
    pub commit_bytes: u64,
    /// `ledger_interval`: time between two ledger entries while something changes. Default 10s, from 100ms to 10m.
    pub ledger_interval: Duration,
    /// `settle`: how long after a recovered file's closing its bytes count as durable. Default 60s, from 1s to 10m; on
    /// `file://` 0s, from 0s.
    pub settle: Duration,
    /// `takeover_after`: how long a lane's owner may be silent. Default 60s, from 1s to 1h.
    pub takeover_after: Duration,
    /// `stream_ttl`: how long a silent stream is remembered. Default 30d, from 1h to 3650d.
    pub stream_ttl: Duration,
    /// `roll_size`: at which a file is closed. Default 1 GiB, from 1 MiB to 1 TiB. Bytes as stored.
    pub roll_size: u64,
    /// `idle_timeout`: after which a file that nothing comes for is closed. Default 30m, from 1s to 7d.
    pub idle_timeout: Duration,
    /// `max_open_files`: files written at a time. Default 200, from 1 to 100000.
    pub max_open_files: u32,
    /// `recompress_below`: frames smaller than this are merged. Default 8 KiB, from 0 (never merge) to 16 MiB.
    pub recompress_below: u64,
    /// `close_delay`: after a bucket's end before it is sealed. Default 2m, from 0s to 1d.
    pub close_delay: Duration,
    /// `give_up_after`: after a bucket's end, missing agents aren't waited for. Default 6h, from 1m to 30d.
    pub give_up_after: Duration,
    /// `late`: `beside`, the default.
    pub late: Late,
    /// `on_missing`: `partial` (default) or `publish`.
    pub on_missing: OnMissing,
    /// `success_file`: its name in a published bucket. Default `_SUCCESS`; begins with `_` or `.`.
    pub success_file: String,
}

/// The table `[roster]`: of which agents the roots expect reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RosterOptions {
    /// `forget_after`: an agent that was silent for so long is no longer expected. Default 30d, from 1h to 3650d; longer than
    /// every `give_up_after`.
    pub forget_after: Duration,
}

/// The table `[spool]`: the disk buffer of every node that isn't a root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SpoolOptions {
    /// `max_bytes`: when as much is held, senders are put off. Default 10 GiB, from 2 MiB to 1024 TiB, and enough for two
    /// segments and for a segment with two of the largest requests.
    pub max_bytes: u64,
    /// `max_age`: what is held for longer is set aside. Default 7d, from 1m to 3650d.
    pub max_age: Duration,
    /// `segment_bytes`: size of one file of the spool. Default 64 MiB, from 64 KiB to 4 GiB.
    pub segment_bytes: u64,
    /// `sync_interval`: longest time that a batch waits for others, to be made durable with them. Default 5ms, from 0
    /// (don't wait) to 1s.
    pub sync_interval: Duration,
}

impl SpoolOptions {
    /// What is said where [`SpoolOptions::bytes_for_a_request`] isn't there.
    pub const WHY_A_REQUEST_MUST_FIT: &'static str = "the newest segment stays also when all of it is committed: a request that doesn't fit beside it would be put off for ever";

    /// Bytes without which a request of `max_request_bytes` might never be taken, however empty the spool is: it is written
    /// behind a segment that isn't full yet, and once more as much is for the positions that are written with it, and for what fills
    /// their last block up.
    #[must_use]
    pub const fn bytes_for_a_request(&self, max_request_bytes: u64) -> u64 {
        self.segment_bytes + 2 * max_request_bytes
    }
}

/// The table `[forward]`: how nodes that aren't roots send to their parents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForwardOptions {
    /// `connect_timeout`: for a connection to a parent. Default 5s, from 100ms to 5m.
    pub connect_timeout: Duration,
    /// `request_timeout`: for a whole request; longer than the roots wait for the sink. Default 60s, from 1s to 10m.
    pub request_timeout: Duration,
    /// `max_connection_age`: after which connections are made anew. Default 10m, from 10s to 1d.
    pub max_connection_age: Duration,
    /// `backoff`: `initial` (default 250ms, from 10ms to 1m) and `max` (default 30s, from 100ms to 1h).
    #[serde(with = "backoff_as_pair")]
    pub backoff: BackoffLimits,
}

mod backoff_as_pair {
    use serde::{Serialize, Serializer};

    use crate::http::backoff::BackoffLimits;

    pub(super) fn serialize<S: Serializer>(limits: &BackoffLimits, serializer: S) -> Result<S::Ok, S::Error> {
        (limits.initial, limits.max).serialize(serializer)
    }
}

/// The table `[limits]`: what each node takes at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeLimits {
    /// `max_request_bytes`: of one request. Default 32 MiB, from 64 KiB to 1 GiB.
    pub max_request_bytes: u64,
    /// `max_batch_bytes`: of one batch. Default 16 MiB, from 64 KiB to 64 MiB, at most `max_request_bytes`.
    pub max_batch_bytes: u64,
    /// `max_in_flight_bytes`: of all requests that are being read or dealt with. Default 256 MiB, from 1 MiB to 64 GiB,
    /// at least `max_request_bytes`.
    pub max_in_flight_bytes: u64,
    /// `max_connections`: open at a time. Default 10000, from 1 to 1000000.
    pub max_connections: u32,
    /// `header_timeout`: for a request's head, also while a connection is idle. Default 60s, from 1s to 10m.
    pub header_timeout: Duration,
    /// `body_idle_timeout`: longest pause in a request's body. Default 30s, from 100ms to 10m.
    pub body_idle_timeout: Duration,
    /// `min_body_rate`: slower bodies, in bytes per second after the first `body_idle_timeout`, are broken off. Default
    /// 4 KiB, from 1 B to 1 GiB.
    pub min_body_rate: u64,
}

/// A table `[category.<name>]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Category {
    /// `bucket`: the size of the time partitions, a divisor of a day. Default 1h, from 1m to 1d. After a change the hour of the old
    /// size in which it was noticed is the last one; a bucket of the new size that has the place of an old one goes to its `_late/`.
    pub bucket: BucketSize,
    /// `timezone`: that the buckets are aligned to. `UTC`, the only one that is possible yet.
    pub timezone: String,
    /// `codec`: `gzip` (default) or `zstd`.
    pub codec: Codec,
    /// `roll_size`: default and bounds as in `[root]`.
    pub roll_size: u64,
    /// `idle_timeout`: default and bounds as in `[root]`.
    pub idle_timeout: Duration,
    /// `close_delay`: default and bounds as in `[root]`.
    pub close_delay: Duration,
    /// `give_up_after`: default and bounds as in `[root]`.
    pub give_up_after: Duration,
}
