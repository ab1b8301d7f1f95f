//! One node's own configuration: its name, where it listens and keeps its data. Everything else is in the topology,
//! which is the same file on every node.
//!
//! ```toml
//! name = "edge-1"
//! topology = "topology.toml"
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tributary_common::config::kind::{duration, parsed, size, text, text_as};
use tributary_common::config::{
    Complaint, ConfigErrors, Field, MIB, Read, Table, nearest, parse, read_text, show_size,
};
use tributary_common::ids::NodeName;
use tributary_common::telemetry::LogOptions;
use tributary_common::topology::{NodeRef, SpoolOptions, Topology};

/// A checked configuration of a node that is in its topology. Only [`NodeConfig::load`] and [`NodeConfig::parse`] make
/// one.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    file: PathBuf,
    /// `name`: this node's, as in the topology. Required.
    pub name: NodeName,
    /// `topology`: the file that describes the tree, relative to this file's directory. Required.
    pub topology_file: PathBuf,
    /// What is in it.
    pub topology: Topology,
    /// `listen`: IP address and port. Default: the port of this node's address in the topology, on all interfaces.
    pub listen: SocketAddr,
    /// `data_dir`: where the spool lies. Absolute. Default `/var/lib/tributary-aggregator`.
    pub data_dir: PathBuf,
    /// `drain_timeout`: how long a stop waits for what is in flight. Default 20s, from 0s to 10m.
    pub drain_timeout: Duration,
    /// `[log]`.
    pub log: LogOptions,
    /// The topology's `[spool]`, with this file's `[spool] max_bytes` (the disk of this node) in its place.
    pub spool: SpoolOptions,
}

impl NodeConfig {
    /// Reads the file at `path` and the topology that it names.
    ///
    /// # Errors
    /// Everything that is wrong with both.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        Self::parse(path, &read_text(path)?, Topology::load)
    }

    /// Reads `content`, the content of the file at `path`; `load_topology` reads the topology at the path that it is
    /// given.
    ///
    /// # Errors
    /// Everything that is wrong with both.
    pub fn parse(
        path: &Path,
        content: &str,
        load_topology: impl FnOnce(&Path) -> Result<Topology, ConfigErrors>,
    ) -> Result<Self, ConfigErrors> {
        parse(&path.display().to_string(), content, |root| Self::read(path, root, load_topology))
    }

    /// The file that this was read from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// This node's place in the tree.
    #[must_use]
    pub fn place(&self) -> NodeRef<'_> {
        self.topology.node(self.name.as_str()).expect("a checked configuration names a node of its topology")
    }

    fn read(
        path: &Path,
        root: &mut Table<'_>,
        load_topology: impl FnOnce(&Path) -> Result<Topology, ConfigErrors>,
    ) -> Read<Self> {
        let name = root.required("name", parsed::<NodeName>("\"edge-1\""));
        let topology_file = root
            .required("topology", text().example("\"topology.toml\""))
            .map(|file| path.parent().unwrap_or(Path::new("")).join(file.as_str()));
        let topology = topology_file
            .as_ref()
            .map_err(|reported| *reported)
            .and_then(|file| load_topology(file).map_err(|errors| root.complain_about_file(errors)));
        let address = match (&name, &topology, &topology_file) {
            (Ok(name), Ok(topology), Ok(file)) => own_address(root, name, topology, file),
            (Err(reported), ..) | (_, Err(reported), _) | (.., Err(reported)) => Err(*reported),
        };
        let listen = root.optional(
            "listen",
            text_as("\"0.0.0.0:7700\"", |address| {
                address.parse::<SocketAddr>().map_err(|_| {
                    Complaint::new(format!("{address:?} is not an address to listen on"))
                        .help("write an IP address of this machine and a port, as in \"0.0.0.0:7700\" or \"[::]:7700\"")
                })
            }),
        );
        let data_dir = root.or(
            "data_dir",
            text_as("\"/var/lib/tributary-aggregator\"", |path| {
                if path.starts_with('/') {
                    Ok(PathBuf::from(path))
                } else {
                    Err(Complaint::new(format!("the path {path:?} is relative"))
                        .help("write the whole path, beginning with a slash"))
                }
            }),
            PathBuf::from("/var/lib/tributary-aggregator"),
        );
        let drain_timeout =
            root.or("drain_timeout", duration(Duration::ZERO..=Duration::from_secs(600)), Duration::from_secs(20));
        let log = LogOptions::read(&mut root.table("log"));
        let spool = read_spool(root, topology.as_ref().ok());
        let (topology, port) = (topology?, address?);
        Ok(Self {
            file: path.to_owned(),
            name: name?.into_value(),
            topology_file: topology_file?,
            listen: listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], port))),
            data_dir: data_dir.into_value(),
            drain_timeout: *drain_timeout,
            log,
            spool: spool.unwrap_or_else(|| topology.spool().clone()),
            topology,
        })
    }
}

/// The port of this node's address in the topology.
fn own_address(root: &Table<'_>, name: &Field<NodeName>, topology: &Topology, file: &Path) -> Read<u16> {
    let Some(place) = topology.node(name.as_str()) else {
        let names: Vec<&str> =
            topology.tiers().iter().flat_map(|tier| &tier.nodes).map(|node| node.name.as_str()).collect();
        let help = match nearest(name.as_str(), names.iter().copied()) {
            Some(known) => format!("did you mean \"{known}\"?"),
            None => format!("the nodes there are {}; write one of them, or add this one", names.join(", ")),
        };
        return Err(root.complain_at(
            name.place(),
            Complaint::new(format!("there is no node {:?} in the topology {}", name.as_str(), file.display()))
                .label("not in the topology")
                .help(help),
        ));
    };
    Ok(place.node.endpoint.port())
}

/// The topology's spool with this file's bound, if it has one.
fn read_spool(root: &mut Table<'_>, topology: Option<&Topology>) -> Option<SpoolOptions> {
    let mut table = root.table("spool");
    let max_bytes = table.optional("max_bytes", size(2 * MIB..=1 << 50));
    let mut spool = topology?.spool().clone();
    spool.max_bytes = (*max_bytes)?;
    table.require(
        2 * spool.segment_bytes <= spool.max_bytes,
        &format!(
            "2 * spool.segment_bytes <= spool.max_bytes, where the topology's spool.segment_bytes is {}",
            show_size(spool.segment_bytes)
        ),
        "a segment is freed as a whole: one must fit while another is filled",
        &[max_bytes.place()],
    );
    let max_request_bytes = topology?.limits().max_request_bytes;
    table.require(
        spool.bytes_for_a_request(max_request_bytes) <= spool.max_bytes,
        &format!(
            "spool.segment_bytes + 2 * limits.max_request_bytes <= spool.max_bytes, where the topology's \
             spool.segment_bytes is {} and limits.max_request_bytes is {}",
            show_size(spool.segment_bytes),
            show_size(max_request_bytes)
        ),
        SpoolOptions::WHY_A_REQUEST_MUST_FIT,
        &[max_bytes.place()],
    );
    Some(spool)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOPOLOGY: &str = r#"
[cluster]
name = "prod"
[sink]
uri = "file:///srv/logs"
[[tier]]
name = "edge"
parent = "root"
[[tier.node]]
name = "edge-1"
address = "10.0.0.11:7700"
[[tier]]
name = "root"
[[tier.node]]
name = "root-1"
address = "10.0.0.21:7800"
[category.app]
"#;

    proptest::proptest! {
        /// Whatever a node's file says, it is read, or its errors are shown.
        #[test]
        fn any_text_is_read_or_its_errors_are_shown(
            edits in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), 0_usize..12, "[\\[\\]=\"'.#{}\r\n\t aé日0-]{0,4}"), 1..6),
        ) {
            let mut text: Vec<char> = include_str!("../../deploy/aggregator-edge.toml").chars().collect();
            for (at, removed, inserted) in edits {
                let at = at.index(text.len());
                let end = (at + removed).min(text.len());
                text.splice(at..end, inserted.chars());
            }
            let text: String = text.into_iter().collect();
            let read = NodeConfig::parse(Path::new("node.toml"), &text, |_| Topology::parse("t.toml", TOPOLOGY));
            if let Err(errors) = read {
                proptest::prop_assert!(errors.to_string().contains("error: "));
            }
        }
    }

    fn parse_text(content: &str) -> Result<NodeConfig, ConfigErrors> {
        NodeConfig::parse(Path::new("/etc/tributary/node.toml"), content, |file| {
            assert_eq!(file, Path::new("/etc/tributary/topology.toml"), "relative to the node's file");
            Topology::parse("topology.toml", TOPOLOGY)
        })
    }

    #[test]
    fn two_lines_are_enough() {
        let config = parse_text("name = 'root-1'\ntopology = 'topology.toml'\n").expect("a good file");
        assert_eq!(config.listen, "0.0.0.0:7800".parse().expect("an address"), "the port of its own address");
        assert!(config.place().is_root());
        assert_eq!(config.spool, *config.topology.spool());
        assert_eq!(config.data_dir, Path::new("/var/lib/tributary-aggregator"));
    }

    #[test]
    fn a_node_has_its_own_disk() {
        let config = parse_text(
            "name = 'edge-1'\ntopology = '/etc/tributary/topology.toml'\nlisten = '127.0.0.1:0'\ndata_dir = '/srv/t'\n\
             drain_timeout = '5s'\n[log]\nformat = 'json'\n[spool]\nmax_bytes = '1 TiB'\n",
        )
        .expect("a good file");
        assert_eq!((config.spool.max_bytes, config.listen.port()), (1 << 40, 0));
        assert_eq!(config.spool.max_age, config.topology.spool().max_age);
        assert_eq!(config.topology.parents_of(config.name.as_str())[0].name.as_str(), "root-1");
    }

    #[test]
    fn all_that_is_wrong_with_it_is_reported_at_once() {
        let shown = parse_text(
            "name = 'edge-2'\ntopology = 'topology.toml'\nlisten = 'edge-2:7700'\ndata_dir = 'data'\n\
             [spool]\nmax_bytes = '100 MiB'\nmax_age = '1d'\n",
        )
        .expect_err("a bad file")
        .to_string();
        for expected in [
            "there is no node \"edge-2\" in the topology /etc/tributary/topology.toml",
            "did you mean \"edge-1\"?",
            "\"edge-2:7700\" is not an address to listen on",
            "the path \"data\" is relative",
            "2 * spool.segment_bytes <= spool.max_bytes, where the topology's spool.segment_bytes is 64 MiB",
            "where the topology's spool.segment_bytes is 64 MiB and limits.max_request_bytes is 32 MiB",
            "unknown key `spool.max_age`",
            "6 errors in /etc/tributary/node.toml",
        ] {
            assert!(shown.contains(expected), "{expected} is missing in:\n{shown}");
        }
    }

    #[test]
    fn the_errors_of_both_files_are_reported() {
        let shown =
            NodeConfig::parse(Path::new("node.toml"), "name = 'edge-1'\ntopology = 't.toml'\nx = 1\n", |file| {
                Topology::parse(
                    &file.display().to_string(),
                    &TOPOLOGY.replace("parent = \"root\"", "parent = \"rooot\""),
                )
            })
            .expect_err("both are bad")
            .to_string();
        assert!(shown.contains("--> node.toml:3:1") && shown.contains("--> t.toml:8:10"), "{shown}");
        assert!(shown.ends_with("2 errors in node.toml, t.toml"), "{shown}");
    }

    #[test]
    fn a_topology_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("node.toml");
        std::fs::write(&file, "name = 'edge-1'\ntopology = 'nowhere.toml'\n").expect("written");
        let shown = NodeConfig::load(&file).expect_err("no topology").to_string();
        assert!(shown.contains("nowhere.toml") && shown.contains("can't be read"), "{shown}");
    }

    /// A file of the directory `deploy`.
    fn deployed(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
    }

    #[test]
    fn the_examples_are_good_files() {
        let directory = std::fs::read_dir(deployed("")).expect("it is there");
        let mut seen = 0;
        for entry in directory {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
            if !name.ends_with(".toml") || name.starts_with("agent") {
                continue;
            }
            seen += 1;
            let checked = if name == "topology.toml" {
                Topology::load(&path).map(|_| ())
            } else {
                NodeConfig::load(&path).map(|config| {
                    assert_eq!(config.place().is_root(), name.contains("root"), "{name}");
                })
            };
            checked.unwrap_or_else(|errors| panic!("{errors}"));
        }
        assert_eq!(seen, 3, "an edge, a root, a topology");
    }

    /// What the example shows as defaults, in its comments, are the defaults.
    #[test]
    fn the_defaults_in_the_topologys_comments_are_the_defaults() {
        let content = std::fs::read_to_string(deployed("topology.toml")).expect("it is there");
        // Keys whose comment shows a value that isn't the default, but what a value may look like.
        let illustrations = ["replication", "user", "kerberos_principal", "kerberos_keytab", "hadoop_conf_dir"];
        let written: String = content
            .lines()
            .map(|line| {
                let shown = line.strip_prefix("# ").unwrap_or(line);
                let key = shown.split(" =").next().unwrap_or("");
                let is_key = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
                let is_default = shown.contains(" = ") && is_key && !illustrations.contains(&key);
                if is_default { format!("{shown}\n") } else { format!("{line}\n") }
            })
            .collect();
        let uncommented = written.lines().filter(|line| !line.starts_with('#') && line.contains(" = ")).count();
        assert!(uncommented > 40, "the comments were found: {uncommented} keys\n{written}");
        let parse = |text: &str| Topology::parse("topology.toml", text).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(parse(&written), parse(&content));
    }

    #[test]
    fn the_unit_gives_the_node_the_time_and_the_files_that_it_is_configured_for() {
        let unit = std::fs::read_to_string(deployed("tributary-aggregator.service")).expect("it is there");
        let value =
            |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).expect(key).to_owned();
        let config = parse_text("name = 'root-1'\ntopology = 'topology.toml'\n").expect("a good file");
        let stop = tributary_common::config::parse_duration(&value("TimeoutStopSec")).expect("a duration");
        assert!(stop > config.drain_timeout, "TimeoutStopSec > drain_timeout");
        let files: u32 = value("LimitNOFILE").parse().expect("a number");
        assert!(files > 2 * config.topology.limits().max_connections, "LimitNOFILE > 2 * limits.max_connections");
        assert_eq!((value("RestartPreventExitStatus").as_str(), value("Type").as_str()), ("64 78", "notify"));
        assert!(value("ExecStart").ends_with(" run --config /etc/tributary/aggregator.toml"));
    }
}
