//! The agent's configuration.
//!
//! Five lines are enough; everything else has a default that is safe:
//!
//! ```toml
//! endpoints = ["http://edge-1:7700", "http://edge-2:7700"]
//!
//! [[source]]
//! category = "nginx-access"
//! include = ["/var/log/nginx/access.log*"]
//! ```
//!
//! [`AgentConfig::load`] reads a file, [`AgentConfig::parse`] a text; both report all errors at once. What they return
//! is checked: the program needs no further look at any value.

mod source;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tributary_common::config::kind::{Kind, choice, duration, flag, integer, list, parsed, size, text, text_as};
use tributary_common::config::{Complaint, ConfigErrors, Field, GIB, KIB, MIB, Read, Table, parse, read_text};
use tributary_common::frame::Codec;
use tributary_common::http::backoff::BackoffLimits;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::ids::AgentId;
use tributary_common::limits::MAX_HOST_BYTES;
use tributary_common::telemetry::LogOptions;
use tributary_common::topology::{Topology, rendezvous};

pub use source::{LongLines, PathPattern, ReadFrom, Source, TimeFormat, TimestampOptions};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// A checked configuration. Only [`AgentConfig::load`] and [`AgentConfig::parse`] make one.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    file: PathBuf,
    /// `topology`: the file that describes the tree, relative to this file's directory; then the categories are checked
    /// against it. Default: none, and what the agent needs to know it is told by its endpoints.
    pub topology: Option<Topology>,
    /// `endpoints`: the aggregators to ship to, the preferred one first. At least one, none twice. Or, in its place,
    /// `tier`: one of the topology, whose nodes they are, in an order of this agent's own.
    pub endpoints: Vec<Endpoint>,
    /// `agent_id`: who this server is. Default: derived from the machine-id.
    pub agent_id: AgentId,
    /// `host`: a label, up to 255 bytes without spaces or control characters. Default: the host name.
    pub host: String,
    /// `data_dir`: where the checkpoints lie. Absolute. Default `/var/lib/tributary-agent`.
    pub data_dir: PathBuf,
    /// `refresh_interval`: time between directory scans. Default 10s, from 100ms to 10m.
    pub refresh_interval: Duration,
    /// `watch`: whether the system is asked to tell of changes (inotify). Default true. Without it, and on file systems that
    /// don't tell (NFS), new files and changes in quiet ones are found by the scans.
    pub watch: bool,
    /// `report_interval`: time between two reports of how far this agent has got. Default 5s, from 100ms to 1m.
    pub report_interval: Duration,
    /// `drain_timeout`: how long a stop waits for answers. Default 20s, from 0s to 10m.
    pub drain_timeout: Duration,
    /// `connect_timeout`: for a connection to an endpoint. Default 5s, from 100ms to 5m.
    pub connect_timeout: Duration,
    /// `request_timeout`: for a whole request, longer than `connect_timeout`. Default 60s, from 1s to 10m.
    pub request_timeout: Duration,
    /// `max_connection_age`: after which connections are made anew. Default 10m, from 10s to 1d.
    pub max_connection_age: Duration,
    /// `backoff`: `initial` (default 250ms, from 10ms to 1m) and `max` (default 30s, from 100ms to 1h).
    pub backoff: BackoffLimits,
    /// `bytes_per_second`: most bytes sent per second. Default: no limit of its own. From 1 KiB to 100 GiB.
    pub bytes_per_second: Option<u64>,
    /// `[http]`: where `/healthz`, `/readyz`, `/metrics` and `/status` are served; `None` if turned off.
    pub http_listen: Option<SocketAddr>,
    /// `[log]`.
    pub log: LogOptions,
    /// `[limits]`.
    pub limits: Limits,
    /// `[batch]`.
    pub batch: BatchOptions,
    /// `[compression]`.
    pub compression: Compression,
    /// `[[source]]`, in the order of the file: a path that two of them match belongs to the first. At least one.
    pub sources: Vec<Source>,
}

/// The table `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// `max_open_files`: log files held open. Default 4096, from 1 to 1048576.
    pub max_open_files: u32,
    /// `max_held_bytes`: bytes of deleted files held open until they are committed. Default 10 GiB, from 1 MiB to
    /// 1024 TiB.
    pub max_held_bytes: u64,
    /// `max_buffer_bytes`: bytes read and not yet sent off, over all streams: bounds the memory. At least twice
    /// `batch.max_bytes`. Default 24 MiB, from 1 MiB to 4 GiB.
    pub max_buffer_bytes: u64,
}

/// The table `[batch]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchOptions {
    /// `max_bytes`: raw bytes of one batch. Default 1 MiB, from 4 KiB to 8 MiB.
    pub max_bytes: u64,
    /// `timeout`: how long a batch that isn't full waits for more. Default 1s, from 10ms to 1m.
    pub timeout: Duration,
}

/// The table `[compression]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compression {
    /// `codec`: `gzip` or `zstd`. Default: the category's.
    pub codec: Option<Codec>,
    /// `level`: 1 (default) to 12; zstd takes more as well, but gzip does not.
    pub level: i32,
    /// `threads`: threads that compress. Default 1, from 1 to 64.
    pub threads: u16,
}

/// What the defaults of some keys are taken from.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// The machine's host name.
    pub hostname: String,
    /// The machine's id (see machine-id(5)), if it has one.
    pub machine_id: Option<String>,
}

impl Surroundings {
    /// Asks this machine.
    #[must_use]
    pub fn of_this_machine() -> Self {
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let machine_id = ["/etc/machine-id", "/var/lib/dbus/machine-id"].iter().find_map(|path| {
            let id = std::fs::read_to_string(path).ok()?.trim().to_owned();
            // While a system starts for the first time, the file says `uninitialized`.
            (id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
        });
        Self { hostname, machine_id }
    }

    /// An id for this machine's agent, from which the machine-id can't be had back: that is not to be told to others
    /// (machine-id(5)).
    fn agent_id(&self) -> Option<AgentId> {
        let hash = xxhash_rust::xxh3::xxh3_128(format!("tributary-agent {}", self.machine_id.as_ref()?).as_bytes());
        format!("{hash:032x}").parse().ok()
    }
}

impl AgentConfig {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        Self::parse(path, &read_text(path)?, &Surroundings::of_this_machine())
    }

    /// Reads `content`, the content of the file at `path`.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(path: &Path, content: &str, surroundings: &Surroundings) -> Result<Self, ConfigErrors> {
        parse(&path.display().to_string(), content, |root| Self::read(path, root, surroundings))
    }

    /// The file that this was read from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    fn read(path: &Path, root: &mut Table<'_>, surroundings: &Surroundings) -> Read<Self> {
        let agent_id = read_agent_id(root, surroundings);
        let (topology, has_topology) = read_topology(path, root);
        let known = topology.as_ref().ok().and_then(Option::as_ref);
        let endpoints = read_endpoints(root, known, has_topology, agent_id.as_ref().ok());
        let host = read_host(root, surroundings);
        let data_dir = root.or("data_dir", absolute_path(), PathBuf::from("/var/lib/tributary-agent"));
        let refresh_interval = root.or("refresh_interval", duration(100 * MS..=10 * MINUTE), 10 * SECOND);
        let watch = root.or("watch", flag(), true);
        let report_interval = root.or("report_interval", duration(100 * MS..=MINUTE), 5 * SECOND);
        let drain_timeout = root.or("drain_timeout", duration(Duration::ZERO..=10 * MINUTE), 20 * SECOND);
        let connect_timeout = root.or("connect_timeout", duration(100 * MS..=5 * MINUTE), 5 * SECOND);
        let request_timeout = root.or("request_timeout", duration(SECOND..=10 * MINUTE), MINUTE);
        root.require(
            *connect_timeout < *request_timeout,
            "connect_timeout < request_timeout",
            "a request includes its connecting: make connect_timeout shorter or request_timeout longer",
            &[connect_timeout.place(), request_timeout.place()],
        );
        let max_connection_age = root.or("max_connection_age", duration(10 * SECOND..=DAY), 10 * MINUTE);
        let bytes_per_second = root.optional("bytes_per_second", size(KIB..=100 * GIB));
        let backoff = BackoffLimits::read(root);
        let http_listen = read_http(root);
        let log = LogOptions::read(&mut root.table("log"));
        let (batch, max_batch) = BatchOptions::read(root);
        let limits = Limits::read(root, &max_batch);
        let compression = Compression::read(root);
        let sources = match (&agent_id, &host) {
            (Ok(agent_id), Ok(host)) => source::read_all(root, agent_id, host, batch.max_bytes, known),
            // The sources are checked all the same; only a record prefix would show the stand-ins.
            _ => source::read_all(root, &"unknown".parse().expect("a valid id"), "unknown", batch.max_bytes, known),
        };
        Ok(Self {
            file: path.to_owned(),
            topology: topology?,
            endpoints: endpoints?,
            agent_id: agent_id?,
            host: host?,
            data_dir: data_dir.into_value(),
            refresh_interval: *refresh_interval,
            watch: *watch,
            report_interval: *report_interval,
            drain_timeout: *drain_timeout,
            connect_timeout: *connect_timeout,
            request_timeout: *request_timeout,
            max_connection_age: *max_connection_age,
            backoff,
            bytes_per_second: *bytes_per_second,
            http_listen,
            log,
            limits,
            batch,
            compression,
            sources: sources?,
        })
    }
}

/// The topology, if the file names one, and whether it does.
fn read_topology(path: &Path, root: &mut Table<'_>) -> (Read<Option<Topology>>, bool) {
    let file = root.optional("topology", text().example("\"topology.toml\""));
    let topology = file.as_deref().map(|file| {
        let file = path.parent().unwrap_or(Path::new("")).join(file);
        Topology::load(&file).map_err(|errors| root.complain_about_file(errors))
    });
    (topology.transpose(), file.is_written())
}

/// The endpoints as they are written, or the nodes of the tier that is named instead of them.
fn read_endpoints(
    root: &mut Table<'_>,
    topology: Option<&Topology>,
    has_topology: bool,
    agent_id: Option<&AgentId>,
) -> Read<Vec<Endpoint>> {
    let endpoints = root.optional("endpoints", list(parsed::<Endpoint>("\"http://edge-1:7700\"")));
    let tier = root.optional("tier", text().example("\"edge\""));
    match (endpoints.is_written(), tier.is_written()) {
        (true, true) => Err(root.complain_between(
            &[endpoints.place(), tier.place()],
            Complaint::new("`endpoints` and `tier` are both written").help("write one: the tier's nodes are endpoints"),
        )),
        (false, false) => Err(root.missing("endpoints", "[\"http://edge-1:7700\"]")),
        (false, true) if !has_topology => Err(root.complain_at(
            tier.place(),
            Complaint::new("`tier` is a tier of the topology, and `topology` is missing")
                .help("write topology = \"…\", the path of the file, or write endpoints = [\"http://…\"] instead"),
        )),
        (false, true) => tier_endpoints(root, &tier, topology, agent_id),
        (true, false) => {
            // Where it is wrong, that has been reported.
            let written = endpoints.as_deref().unwrap_or_default();
            if let Some(twice) = (1..written.len()).find(|&n| written[..n].contains(&written[n])) {
                let complaint = Complaint::new(format!("`endpoints` has {} twice", written[twice]));
                return Err(root.complain_at(endpoints.place(), complaint.help("write each endpoint once")));
            }
            Ok(written.to_vec())
        }
    }
}

fn tier_endpoints(
    root: &Table<'_>,
    name: &Field<Option<String>>,
    topology: Option<&Topology>,
    agent_id: Option<&AgentId>,
) -> Read<Vec<Endpoint>> {
    // Without these, there is an error already, and what is returned is never used.
    let (Some(topology), Some(agent_id), Some(wanted)) = (topology, agent_id, name.as_deref()) else {
        return Ok(Vec::new());
    };
    let Some(tier) = topology.tier(wanted) else {
        let names: Vec<_> = topology.tiers().iter().map(|tier| tier.name.as_str()).collect();
        return Err(root.complain_at(
            name.place(),
            Complaint::new(format!("there is no tier {wanted:?} in the topology"))
                .help(format!("write one of {}", names.join(", "))),
        ));
    };
    // Every agent has its own order, so that they spread over the nodes.
    let order = rendezvous(agent_id.as_str().as_bytes(), &tier.nodes);
    Ok(order.into_iter().map(|node| node.endpoint.clone()).collect())
}

fn read_agent_id(root: &mut Table<'_>, surroundings: &Surroundings) -> Read<AgentId> {
    let agent_id = root.optional("agent_id", parsed("\"web-1\""));
    if agent_id.is_written() {
        // Where it is wrong, that has been reported, and the stand-in is never used.
        return Ok(agent_id.into_value().unwrap_or_else(|| "unknown".parse().expect("a valid id")));
    }
    surroundings.agent_id().ok_or_else(|| {
        root.complain(
            Complaint::new("`agent_id` is missing, and this machine has no machine-id to derive it from").help(
                "write agent_id = \"…\", a name that no other server has, or make /etc/machine-id by systemd-machine-id-setup",
            ),
        )
    })
}

fn read_host(root: &mut Table<'_>, surroundings: &Surroundings) -> Read<String> {
    let valid = |host: &str| {
        let plain = |c: char| !c.is_whitespace() && !c.is_control();
        (!host.is_empty() && host.len() <= MAX_HOST_BYTES && host.chars().all(plain)).then(|| host.to_owned())
    };
    let rule = format!("1 to {MAX_HOST_BYTES} bytes without spaces or control characters");
    let host = root.optional(
        "host",
        text_as("\"web-1\"", |host| {
            valid(host).ok_or_else(|| Complaint::new(format!("{host:?} can't be a host")).help(format!("write {rule}")))
        }),
    );
    if host.is_written() {
        return Ok(host.into_value().unwrap_or_default());
    }
    valid(&surroundings.hostname).ok_or_else(|| {
        root.complain(
            Complaint::new(format!(
                "`host` is missing, and this machine's name {:?} can't be used",
                surroundings.hostname
            ))
            .help(format!("write host = \"…\", {rule}")),
        )
    })
}

fn read_http(root: &mut Table<'_>) -> Option<SocketAddr> {
    let mut table = root.table("http");
    let enabled = table.or("enabled", flag(), true);
    let listen = table.or(
        "listen",
        text_as("\"127.0.0.1:7701\"", |address| {
            address.parse::<SocketAddr>().map_err(|_| {
                Complaint::new(format!("{address:?} is not an address with a port"))
                    .help("write an IP address and a port, as in \"127.0.0.1:7701\" or \"[::1]:7701\"")
            })
        }),
        SocketAddr::from(([127, 0, 0, 1], 7701)),
    );
    (*enabled).then_some(*listen)
}

impl Limits {
    fn read(root: &mut Table<'_>, max_batch: &Field<u64>) -> Self {
        let mut table = root.table("limits");
        let max_open_files = table.or("max_open_files", integer(1..=1 << 20), 4096_u32);
        let max_held_bytes = table.or("max_held_bytes", size(MIB..=1 << 50), 10 * GIB);
        let max_buffer_bytes = table.or("max_buffer_bytes", size(MIB..=4 * GIB), 24 * MIB);
        table.require(
            *max_buffer_bytes >= 2 * **max_batch,
            "limits.max_buffer_bytes >= 2 * batch.max_bytes",
            "one batch is read while another is sent: give the buffer more or the batch less",
            &[max_buffer_bytes.place(), max_batch.place()],
        );
        Self { max_open_files: *max_open_files, max_held_bytes: *max_held_bytes, max_buffer_bytes: *max_buffer_bytes }
    }
}

impl BatchOptions {
    fn read(root: &mut Table<'_>) -> (Self, Field<u64>) {
        let mut table = root.table("batch");
        let max_bytes = table.or("max_bytes", size(4 * KIB..=8 * MIB), MIB);
        let timeout = table.or("timeout", duration(10 * MS..=MINUTE), SECOND);
        (Self { max_bytes: *max_bytes, timeout: *timeout }, max_bytes)
    }
}

impl Compression {
    fn read(root: &mut Table<'_>) -> Self {
        const CODECS: &[(&str, Option<Codec>)] = &[("gzip", Some(Codec::Gzip)), ("zstd", Some(Codec::Zstd))];
        let mut table = root.table("compression");
        let codec = table.or("codec", choice(CODECS), None);
        let level = table.or("level", integer(1..=12), 1_i32);
        let threads = table.or("threads", integer(1..=64), 1_u16);
        Self { codec: *codec, level: *level, threads: *threads }
    }
}

fn absolute_path() -> impl Kind<Out = PathBuf> {
    text_as("\"/var/lib/tributary-agent\"", |path| {
        if path.starts_with('/') {
            Ok(PathBuf::from(path))
        } else {
            Err(Complaint::new(format!("the path {path:?} is relative"))
                .help("write the whole path, beginning with a slash"))
        }
    })
}

#[cfg(test)]
mod tests;
