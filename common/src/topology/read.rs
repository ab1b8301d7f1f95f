//! From the file's tables to a checked topology.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::options::{
    Category, ForwardOptions, Late, NodeLimits, OnMissing, RootOptions, RosterOptions, Sink, SinkKind, SpoolOptions,
};
use super::{Node, Tier, Topology};
use crate::bucket::BucketSize;
use crate::config::kind::{self, Kind, choice, duration, integer, parsed, size, text_as};
use crate::config::{Complaint, Field, GIB, KIB, MIB, Place, Read, Table, nearest};
use crate::frame::Codec;
use crate::http::backoff::BackoffLimits;
use crate::http::endpoint::Endpoint;
use crate::ids::{CategoryName, LaneCount, NodeName};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const TIB: u64 = 1024 * GIB;

pub(super) fn topology(root: &mut Table<'_>) -> Read<Topology> {
    let (cluster, lanes) = cluster(root);
    let (sink, call_timeout) = sink(root);
    let on_files = sink.as_ref().is_ok_and(|sink| sink.kind == SinkKind::File);
    let (roster, forget_after) = roster(root);
    let written = root_options(root, on_files, &forget_after);
    let (limits, max_request_bytes) = limits(root);
    let (spool, max_age) = spool(root, &max_request_bytes);
    let (forward, request_timeout) = forward(root);
    relations(root, &written, &call_timeout, &max_age, &request_timeout);
    let categories = categories(root, &written, &forget_after);
    let tiers = tiers(root);
    Ok(Topology {
        cluster: cluster?,
        lanes,
        sink: sink?,
        root: written.options(),
        roster,
        spool,
        forward,
        limits,
        tiers: tiers?,
        categories: categories?,
    })
}

/// What must hold between timeouts of different tables.
fn relations(
    root: &Table<'_>,
    written: &RootFields,
    call_timeout: &Field<Duration>,
    max_age: &Field<Duration>,
    request_timeout: &Field<Duration>,
) {
    root.require(
        **max_age < *written.stream_ttl,
        "spool.max_age < root.stream_ttl",
        "what a spool still holds must continue a stream that the root still knows",
        &[max_age.place(), written.stream_ttl.place()],
    );
    root.require(
        *written.commit_interval < **call_timeout,
        "root.commit_interval < sink.call_timeout",
        "a commit is a call to the sink, and the next one is due while a slow one is still waited for",
        &[written.commit_interval.place(), call_timeout.place()],
    );
    root.require(
        *written.takeover_after > 2 * **call_timeout,
        "root.takeover_after > 2 * sink.call_timeout",
        "an owner whose heartbeat meets one slow call must live to try another",
        &[written.takeover_after.place(), call_timeout.place()],
    );
    root.require(
        **request_timeout > **call_timeout,
        "forward.request_timeout > sink.call_timeout",
        "a root that waits for the sink is slow, not dead: its children must wait for longer than it does",
        &[request_timeout.place(), call_timeout.place()],
    );
}

fn cluster(root: &mut Table<'_>) -> (Read<String>, LaneCount) {
    let mut table = root.table("cluster");
    let name = table.required(
        "name",
        text_as("\"prod\"", |name| {
            let fits = name.len() <= 64
                && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
            if fits {
                Ok(name.to_owned())
            } else {
                Err(Complaint::new(format!("{name:?} can't name a cluster")).help("write 1 to 64 of a-z 0-9 -"))
            }
        }),
    );
    let lanes = table.or("lanes", integer(1..=256), 1_u16);
    (name.map(Field::into_value), LaneCount::try_from(*lanes).unwrap_or(LaneCount::ONE))
}

fn sink_uri(text: &str) -> Result<(String, SinkKind), Complaint> {
    const HELP: &str = "write \"file:///srv/logs\" for a local directory or \"hdfs://namenode:8020/logs\"";
    let wrong = |what: &str| Complaint::new(format!("the sink {text:?} {what}")).help(HELP);
    let (kind, rest) = if let Some(rest) = text.strip_prefix("file://") {
        (SinkKind::File, rest)
    } else if let Some(rest) = text.strip_prefix("hdfs://") {
        (SinkKind::Hdfs, rest)
    } else {
        return Err(wrong("is neither a file:// nor an hdfs:// URI"));
    };
    let Some(slash) = rest.find('/') else { return Err(wrong("has no directory")) };
    let (host, path) = rest.split_at(slash);
    let path = path.trim_end_matches('/');
    if path.is_empty() {
        return Err(wrong("has no directory: everything would lie in the root directory"));
    }
    if path.contains("//") || path.split('/').any(|part| part == "." || part == "..") {
        return Err(wrong("has “.”, “..” or an empty name in its path"));
    }
    match kind {
        SinkKind::File if !host.is_empty() => Err(wrong("has a host: three slashes begin an absolute path")),
        SinkKind::Hdfs if host.is_empty() => Err(wrong("has no host")),
        SinkKind::Hdfs if host.parse::<http::uri::Authority>().is_err() || host.contains('@') => {
            Err(wrong("has a host that can't be read"))
        }
        _ => Ok((text.trim_end_matches('/').to_owned(), kind)),
    }
}

fn absolute_path(example: &'static str) -> impl Kind<Out = PathBuf> {
    text_as(example, |path| {
        if path.starts_with('/') {
            Ok(PathBuf::from(path))
        } else {
            Err(Complaint::new(format!("the path {path:?} is relative"))
                .help("write the whole path, beginning with a slash: every node reads this file"))
        }
    })
}

fn sink(root: &mut Table<'_>) -> (Read<Sink>, Field<Duration>) {
    let mut table = root.table("sink");
    let uri = table.required("uri", text_as("\"file:///srv/logs\"", sink_uri));
    let call_timeout = table.or("call_timeout", duration(100 * MS..=10 * MINUTE), 20 * SECOND);
    let sync_timeout = table.or("sync_timeout", duration(100 * MS..=10 * MINUTE), 20 * SECOND);
    let replication = table.optional("replication", integer(1..=512_u16));
    let min_replication = table.or("min_replication", integer(1..=512_u16), replication.unwrap_or(2).min(2));
    table.require(
        replication.is_none_or(|replication| *min_replication <= replication),
        "sink.min_replication <= sink.replication",
        "fewer replicas are tried when DataNodes are missing, never more",
        &[min_replication.place(), replication.place()],
    );
    let user = table.optional("user", kind::text().example("\"tributary\""));
    let kerberos_principal = table.optional("kerberos_principal", kind::text().example("\"tributary@EXAMPLE.NET\""));
    let kerberos_keytab = table.optional("kerberos_keytab", absolute_path("\"/etc/tributary/tributary.keytab\""));
    table.require(
        kerberos_principal.is_written() == kerberos_keytab.is_written(),
        "sink.kerberos_principal is set if and only if sink.kerberos_keytab is",
        "the keytab proves who the principal is: write both or neither",
        &[kerberos_principal.place(), kerberos_keytab.place()],
    );
    let hadoop_conf_dir = table.optional("hadoop_conf_dir", absolute_path("\"/etc/hadoop/conf\""));
    let sink = uri.map(Field::into_value).map(|(uri, kind)| Sink {
        uri,
        kind,
        call_timeout: *call_timeout,
        sync_timeout: *sync_timeout,
        replication: *replication,
        min_replication: *min_replication,
        user: user.into_value(),
        kerberos_principal: kerberos_principal.into_value(),
        kerberos_keytab: kerberos_keytab.into_value(),
        hadoop_conf_dir: hadoop_conf_dir.into_value(),
    });
    (sink, call_timeout)
}

/// The fields that categories override and other tables relate to, with their places.
struct RootFields {
    commit_interval: Field<Duration>,
    commit_bytes: Field<u64>,
    ledger_interval: Field<Duration>,
    settle: Field<Duration>,
    takeover_after: Field<Duration>,
    stream_ttl: Field<Duration>,
    files: FileFields,
    max_open_files: u32,
    recompress_below: u64,
    late: Late,
    on_missing: OnMissing,
    success_file: String,
}

/// The fields that `[root]` and the categories both have.
struct FileFields {
    roll_size: Field<u64>,
    idle_timeout: Field<Duration>,
    close_delay: Field<Duration>,
    give_up_after: Field<Duration>,
}

impl FileFields {
    fn read(table: &mut Table<'_>, default: Option<&Self>) -> Self {
        Self {
            roll_size: table.inherit("roll_size", size(MIB..=TIB), default.map(|d| &d.roll_size), GIB),
            idle_timeout: table.inherit(
                "idle_timeout",
                duration(SECOND..=7 * DAY),
                default.map(|d| &d.idle_timeout),
                30 * MINUTE,
            ),
            close_delay: table.inherit(
                "close_delay",
                duration(Duration::ZERO..=DAY),
                default.map(|d| &d.close_delay),
                2 * MINUTE,
            ),
            give_up_after: table.inherit(
                "give_up_after",
                duration(MINUTE..=30 * DAY),
                default.map(|d| &d.give_up_after),
                6 * HOUR,
            ),
        }
    }

    /// What must hold for files. `own` is the beginning of the table's own keys: a relation between other tables' fields
    /// is those tables' matter.
    fn require(
        &self,
        table: &Table<'_>,
        own: &str,
        commit_interval: &Field<Duration>,
        commit_bytes: &Field<u64>,
        forget_after: &Field<Duration>,
    ) {
        let require = |holds: bool, low: &Place, relation: &str, high: &Place, why: &str| {
            if low.key().starts_with(own) || high.key().starts_with(own) {
                table.require(holds, &format!("{} {relation} {}", low.key(), high.key()), why, &[low, high]);
            }
        };
        require(
            **commit_bytes <= *self.roll_size,
            commit_bytes.place(),
            "<=",
            self.roll_size.place(),
            "a file is committed before it is full",
        );
        require(
            **commit_interval < *self.idle_timeout,
            commit_interval.place(),
            "<",
            self.idle_timeout.place(),
            "a file is committed before it is closed for being idle",
        );
        require(
            *self.close_delay < *self.give_up_after,
            self.close_delay.place(),
            "<",
            self.give_up_after.place(),
            "both begin at the bucket's end, and giving up comes after the ordinary wait",
        );
        require(
            *self.give_up_after < **forget_after,
            self.give_up_after.place(),
            "<",
            forget_after.place(),
            "while an hour still waits for an agent, the agent is expected",
        );
    }
}

impl RootFields {
    fn options(self) -> RootOptions {
        RootOptions {
            commit_interval: *self.commit_interval,
            commit_bytes: *self.commit_bytes,
            ledger_interval: *self.ledger_interval,
            settle: *self.settle,
            takeover_after: *self.takeover_after,
            stream_ttl: *self.stream_ttl,
            roll_size: *self.files.roll_size,
            idle_timeout: *self.files.idle_timeout,
            max_open_files: self.max_open_files,
            recompress_below: self.recompress_below,
            close_delay: *self.files.close_delay,
            give_up_after: *self.files.give_up_after,
            late: self.late,
            on_missing: self.on_missing,
            success_file: self.success_file,
        }
    }
}

fn root_options(root: &mut Table<'_>, on_files: bool, forget_after: &Field<Duration>) -> RootFields {
    let mut table = root.table("root");
    let commit_interval = table.or("commit_interval", duration(50 * MS..=MINUTE), SECOND);
    let commit_bytes = table.or("commit_bytes", size(64 * KIB..=GIB), 64 * MIB);
    let ledger_interval = table.or("ledger_interval", duration(100 * MS..=10 * MINUTE), 10 * SECOND);
    // A local file's recovery is our own fdatasync; a DataNode's leaves the bytes to its kernel for a while.
    let (least, usual) = if on_files { (Duration::ZERO, Duration::ZERO) } else { (SECOND, MINUTE) };
    let settle = table.or("settle", duration(least..=10 * MINUTE), usual);
    let takeover_after = table.or("takeover_after", duration(SECOND..=HOUR), MINUTE);
    let stream_ttl = table.or("stream_ttl", duration(HOUR..=3650 * DAY), 30 * DAY);
    let files = FileFields::read(&mut table, None);
    let max_open_files = table.or("max_open_files", integer(1..=100_000), 200_u32);
    let recompress_below = table.or("recompress_below", size(0..=16 * MIB), 8 * KIB);
    let late = table.or("late", choice(&[("beside", Late::Beside)]), Late::Beside);
    let on_missing = table.or(
        "on_missing",
        choice(&[("partial", OnMissing::Partial), ("publish", OnMissing::Publish)]),
        OnMissing::Partial,
    );
    let success_file = table.or(
        "success_file",
        text_as("\"_SUCCESS\"", |name| {
            let hidden = name.starts_with(['_', '.']) && name.len() > 1;
            let taken = ["_MANIFEST.json", "_PARTIAL.json", "_late", ".."].contains(&name);
            // Spark takes a name with an equals sign for a partition, whatever it begins with.
            let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b'=';
            if hidden && !taken && name.len() <= 64 && name.bytes().all(plain) {
                Ok(name.to_owned())
            } else {
                Err(Complaint::new(format!("the success file can't have the name {name:?}")).help(
                    "write a file name of plain letters that begins with _ or ., so that readers skip it, and that means \
                     nothing else here, as in \"_SUCCESS\"",
                ))
            }
        }),
        "_SUCCESS".to_owned(),
    );
    files.require(&table, "root.", &commit_interval, &commit_bytes, forget_after);
    table.require(
        *commit_interval <= *ledger_interval,
        "root.commit_interval <= root.ledger_interval",
        "the ledger writes down what was committed",
        &[commit_interval.place(), ledger_interval.place()],
    );
    RootFields {
        commit_interval,
        commit_bytes,
        ledger_interval,
        settle,
        takeover_after,
        stream_ttl,
        files,
        max_open_files: *max_open_files,
        recompress_below: *recompress_below,
        late: *late,
        on_missing: *on_missing,
        success_file: success_file.into_value(),
    }
}

fn spool(root: &mut Table<'_>, max_request_bytes: &Field<u64>) -> (SpoolOptions, Field<Duration>) {
    let mut table = root.table("spool");
    let max_bytes = table.or("max_bytes", size(2 * MIB..=1024 * TIB), 10 * GIB);
    let max_age = table.or("max_age", duration(MINUTE..=3650 * DAY), 7 * DAY);
    let segment_bytes = table.or("segment_bytes", size(64 * KIB..=4 * GIB), 64 * MIB);
    let sync_interval = table.or("sync_interval", duration(Duration::ZERO..=SECOND), 5 * MS);
    table.require(
        2 * *segment_bytes <= *max_bytes,
        "2 * spool.segment_bytes <= spool.max_bytes",
        "a segment is freed as a whole: one must fit while another is filled",
        &[segment_bytes.place(), max_bytes.place()],
    );
    let options = SpoolOptions {
        max_bytes: *max_bytes,
        max_age: *max_age,
        segment_bytes: *segment_bytes,
        sync_interval: *sync_interval,
    };
    table.require(
        options.bytes_for_a_request(**max_request_bytes) <= *max_bytes,
        "spool.segment_bytes + 2 * limits.max_request_bytes <= spool.max_bytes",
        SpoolOptions::WHY_A_REQUEST_MUST_FIT,
        &[max_bytes.place(), segment_bytes.place(), max_request_bytes.place()],
    );
    (options, max_age)
}

fn roster(root: &mut Table<'_>) -> (RosterOptions, Field<Duration>) {
    let mut table = root.table("roster");
    let forget_after = table.or("forget_after", duration(HOUR..=3650 * DAY), 30 * DAY);
    (RosterOptions { forget_after: *forget_after }, forget_after)
}

fn forward(root: &mut Table<'_>) -> (ForwardOptions, Field<Duration>) {
    let mut table = root.table("forward");
    let connect_timeout = table.or("connect_timeout", duration(100 * MS..=5 * MINUTE), 5 * SECOND);
    let request_timeout = table.or("request_timeout", duration(SECOND..=10 * MINUTE), MINUTE);
    table.require(
        *connect_timeout < *request_timeout,
        "forward.connect_timeout < forward.request_timeout",
        "a request includes its connecting",
        &[connect_timeout.place(), request_timeout.place()],
    );
    let max_connection_age = table.or("max_connection_age", duration(10 * SECOND..=DAY), 10 * MINUTE);
    let backoff = BackoffLimits::read(&mut table);
    let options = ForwardOptions {
        connect_timeout: *connect_timeout,
        request_timeout: *request_timeout,
        max_connection_age: *max_connection_age,
        backoff,
    };
    (options, request_timeout)
}

fn limits(root: &mut Table<'_>) -> (NodeLimits, Field<u64>) {
    let mut table = root.table("limits");
    let max_request_bytes = table.or("max_request_bytes", size(64 * KIB..=GIB), 32 * MIB);
    let max_batch_bytes = table.or("max_batch_bytes", size(64 * KIB..=64 * MIB), 16 * MIB);
    let max_in_flight_bytes = table.or("max_in_flight_bytes", size(MIB..=64 * GIB), 256 * MIB);
    table.require(
        *max_batch_bytes <= *max_request_bytes,
        "limits.max_batch_bytes <= limits.max_request_bytes",
        "a request holds whole batches",
        &[max_batch_bytes.place(), max_request_bytes.place()],
    );
    table.require(
        *max_request_bytes <= *max_in_flight_bytes,
        "limits.max_request_bytes <= limits.max_in_flight_bytes",
        "one request at least must be served at a time",
        &[max_request_bytes.place(), max_in_flight_bytes.place()],
    );
    let max_connections = table.or("max_connections", integer(1..=1_000_000), 10_000_u32);
    let header_timeout = table.or("header_timeout", duration(SECOND..=10 * MINUTE), MINUTE);
    let body_idle_timeout = table.or("body_idle_timeout", duration(100 * MS..=10 * MINUTE), 30 * SECOND);
    let min_body_rate = table.or("min_body_rate", size(1..=GIB), 4 * KIB);
    let limits = NodeLimits {
        max_request_bytes: *max_request_bytes,
        max_batch_bytes: *max_batch_bytes,
        max_in_flight_bytes: *max_in_flight_bytes,
        max_connections: *max_connections,
        header_timeout: *header_timeout,
        body_idle_timeout: *body_idle_timeout,
        min_body_rate: *min_body_rate,
    };
    (limits, max_request_bytes)
}

fn categories(
    root: &mut Table<'_>,
    written: &RootFields,
    forget_after: &Field<Duration>,
) -> Read<BTreeMap<CategoryName, Category>> {
    let tables = root.named_tables("category");
    if tables.is_empty() {
        return Err(root.complain(
            Complaint::new("there is no category")
                .help("write [category.<name>] for each log, and below it bucket = \"1h\" or nothing"),
        ));
    }
    let category = |(name, mut table)| category(&name, &mut table, written, forget_after);
    let read: Vec<_> = tables.into_iter().map(category).collect();
    read.into_iter().collect()
}

fn category(
    name: &Field<String>,
    table: &mut Table<'_>,
    written: &RootFields,
    forget_after: &Field<Duration>,
) -> Read<(CategoryName, Category)> {
    let parsed_name = name
        .parse::<CategoryName>()
        .map_err(|error| table.complain_at(name.place(), Complaint::new(error.to_string())));
    let bucket = table.or("bucket", Bucket, BucketSize::HOUR);
    let timezone = table.or(
        "timezone",
        text_as("\"UTC\"", |zone| {
            if zone == "UTC" {
                Ok(zone.to_owned())
            } else {
                Err(Complaint::new(format!("buckets can't be aligned to {zone:?}, only to UTC yet")).help(
                    "write \"UTC\" or leave the line out; the times of records keep whatever zone their lines say",
                ))
            }
        }),
        "UTC".to_owned(),
    );
    let codec = table.or("codec", choice(&[("gzip", Codec::Gzip), ("zstd", Codec::Zstd)]), Codec::Gzip);
    let files = FileFields::read(table, Some(&written.files));
    files.require(table, "category.", &written.commit_interval, &written.commit_bytes, forget_after);
    let category = Category {
        bucket: *bucket,
        timezone: timezone.into_value(),
        codec: *codec,
        roll_size: *files.roll_size,
        idle_timeout: *files.idle_timeout,
        close_delay: *files.close_delay,
        give_up_after: *files.give_up_after,
    };
    Ok((parsed_name?, category))
}

/// The size of a bucket.
struct Bucket;

impl Kind for Bucket {
    type Out = BucketSize;

    fn read(&self, spot: &kind::Spot<'_>, value: &serde_spanned::Spanned<toml::de::DeValue<'_>>) -> Read<Self::Out> {
        let duration = duration(MINUTE..=DAY).read(spot, value)?;
        let whole = u32::try_from(duration.as_secs()).ok().filter(|_| duration.subsec_nanos() == 0);
        whole.and_then(|seconds| BucketSize::try_from(seconds).ok()).ok_or_else(|| {
            spot.complain(
                value,
                Complaint::new(format!("`{}` doesn't divide a day", spot.key()))
                    .label("buckets would not begin at the same times every day")
                    .help("write 1m, 5m, 10m, 15m, 30m, 1h, 2h, 3h, 4h, 6h, 8h, 12h, 1d or another divisor of a day"),
            )
        })
    }

    fn show(&self, value: &Self::Out) -> String {
        crate::config::show_duration(Duration::from_secs(u64::from(value.seconds())))
    }

    fn example(&self) -> String {
        "\"1h\"".to_owned()
    }
}

/// A tier with the places of what other tiers may contradict.
struct TierFields {
    name: Field<NodeName>,
    parent: Field<Option<NodeName>>,
    nodes: Vec<(Field<NodeName>, Field<Endpoint>)>,
}

fn tiers(root: &mut Table<'_>) -> Read<Vec<Tier>> {
    let tables = root.tables("tier");
    if tables.is_empty() {
        return Err(root.complain(
            Complaint::new("there is no tier")
                .help("write [[tier]] with a name, and below it [[tier.node]] with name and address"),
        ));
    }
    let mut tiers = Vec::new();
    let mut whole = Ok(());
    for mut table in tables {
        match tier(&mut table) {
            Ok(tier) => tiers.push(tier),
            Err(reported) => whole = Err(reported),
        }
    }
    let unique = check_unique(root, &tiers);
    // A tier that couldn't be read may be the parent that the others seem to lack.
    whole?;
    check_tree(root, &tiers)?;
    unique?;
    let mut checked: Vec<Tier> = tiers.into_iter().map(TierFields::checked).collect();
    checked.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(checked)
}

impl TierFields {
    fn checked(self) -> Tier {
        let mut nodes: Vec<Node> = self
            .nodes
            .into_iter()
            .map(|(name, endpoint)| {
                let endpoint = endpoint.into_value();
                Node { name: name.into_value(), address: endpoint.address().to_owned(), endpoint }
            })
            .collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        Tier { name: self.name.into_value(), parent: self.parent.into_value(), nodes }
    }
}

fn tier(table: &mut Table<'_>) -> Read<TierFields> {
    let name = table.required("name", parsed::<NodeName>("\"edge\""));
    let parent = table.optional("parent", parsed::<NodeName>("\"root\""));
    let nodes: Vec<Read<_>> = table
        .tables("node")
        .into_iter()
        .map(|mut node| {
            let name = node.required("name", parsed::<NodeName>("\"edge-1\""));
            let address = node.required(
                "address",
                text_as("\"10.0.0.11:7700\"", |address| {
                    Endpoint::at(address).map_err(|_| {
                        Complaint::new(format!("{address:?} is not an address that children can connect to"))
                            .help("write host:port, as in \"10.0.0.11:7700\" or \"edge-1.example.net:7700\"")
                    })
                }),
            );
            Ok((name?, address?))
        })
        .collect();
    if nodes.is_empty() {
        let _: crate::config::Reported = table.complain(
            Complaint::new("this tier has no node").help("write [[tier.node]] below it, with name and address"),
        );
    }
    Ok(TierFields { name: name?, parent, nodes: nodes.into_iter().collect::<Read<_>>()? })
}

fn check_unique(root: &Table<'_>, tiers: &[TierFields]) -> Read<()> {
    let mut outcome = Ok(());
    let mut check = |what: &str, fields: Vec<(&str, &Place)>| {
        for (n, (text, place)) in fields.iter().enumerate() {
            if let Some((_, earlier)) = fields[..n].iter().find(|(other, _)| other == text) {
                outcome = Err(root.complain_between(
                    &[place, earlier],
                    Complaint::new(format!("two {what} {text:?}")).help("each must be there once in the whole file"),
                ));
            }
        }
    };
    check("tiers have the name", tiers.iter().map(|tier| (tier.name.as_str(), tier.name.place())).collect());
    let nodes = || tiers.iter().flat_map(|tier| &tier.nodes);
    check("nodes have the name", nodes().map(|(name, _)| (name.as_str(), name.place())).collect());
    check("nodes have the address", nodes().map(|(_, at)| (at.address(), at.place())).collect());
    outcome
}

fn check_tree(root: &Table<'_>, tiers: &[TierFields]) -> Read<()> {
    let find = |name: &NodeName| tiers.iter().position(|tier| *tier.name == *name);
    let mut outcome = Ok(());
    for tier in tiers {
        if let Some(parent) = tier.parent.as_ref()
            && find(parent).is_none()
        {
            let complaint = Complaint::new(format!("there is no tier {:?}", parent.as_str())).label("no such tier");
            let help = match nearest(parent.as_str(), tiers.iter().map(|tier| tier.name.as_str())) {
                Some(name) => format!("did you mean \"{name}\"?"),
                None => "write the name of another tier, or leave the line out if this is the root tier".to_owned(),
            };
            outcome = Err(root.complain_at(tier.parent.place(), complaint.help(help)));
        }
    }
    outcome?;
    let roots: Vec<&Place> =
        tiers.iter().filter(|tier| !tier.parent.is_written()).map(|tier| tier.name.place()).collect();
    match roots.as_slice() {
        [_] => {}
        [] => {
            return Err(root.complain_at(
                tiers[0].parent.place(),
                Complaint::new("no tier is the root tier: every one has a parent")
                    .help("leave `parent` out of the tier that writes to the sink"),
            ));
        }
        several => {
            return Err(root.complain_between(
                several,
                Complaint::new("several tiers have no parent, but only the root tier may have none")
                    .help("write parent = \"…\" into all but the tier that writes to the sink"),
            ));
        }
    }
    for (start, tier) in tiers.iter().enumerate() {
        let mut at = start;
        // Whoever isn't at the root after as many steps as there are tiers goes in a circle.
        for _ in 0..tiers.len() {
            let Some(next) = tiers[at].parent.as_ref().and_then(find) else { break };
            at = next;
            if at == start {
                return Err(root.complain_at(
                    tier.parent.place(),
                    Complaint::new(format!("the tier {:?} would send to itself in the end", tier.name.as_str()))
                        .label("this closes a circle")
                        .help("follow the parents from tier to tier: they must end at the root tier"),
                ));
            }
        }
    }
    Ok(())
}
