//! The one file that describes the whole tree: tiers, nodes, categories, the sink, and the rules for all of them.
//!
//! Every node gets the same file and finds itself in it by name. [`Topology::load`] checks it as a whole, also the
//! relations between the timeouts of different tiers, and reports all errors at once.
//!
//! ```toml
//! [cluster]
//! name = "prod"
//!
//! [sink]
//! uri = "hdfs://nn1:8020/logs"
//!
//! [[tier]]
//! name = "edge"
//! parent = "root"
//! [[tier.node]]
//! name = "edge-1"
//! address = "10.0.0.11:7700"
//!
//! [[tier]]
//! name = "root"
//! [[tier.node]]
//! name = "root-1"
//! address = "10.0.0.21:7700"
//!
//! [category.nginx-access]
//! bucket = "1h"
//! ```

mod draw;
mod options;
mod read;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::config::{ConfigErrors, parse, read_text};
use crate::http::endpoint::Endpoint;
use crate::ids::{AgentId, CategoryName, LaneCount, LaneId, NodeName};
use crate::messages::{Categories, CategorySettings};

pub use options::{
    Category, ForwardOptions, Late, NodeLimits, OnMissing, RootOptions, RosterOptions, Sink, SinkKind, SpoolOptions,
};

/// One aggregator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Node {
    /// `name`: unique in the topology.
    pub name: NodeName,
    /// `address`: the `host:port` that its children connect to; unique in the topology.
    pub address: String,
    /// The same address as an endpoint.
    #[serde(skip)]
    pub endpoint: Endpoint,
}

/// Aggregators that do the same: any of them takes what the tier below sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tier {
    /// `name`: unique among the tiers.
    pub name: NodeName,
    /// `parent`: the tier that this one sends to. `None`: the root tier, of which there is exactly one.
    pub parent: Option<NodeName>,
    /// `[[tier.node]]`: at least one.
    pub nodes: Vec<Node>,
}

/// A node's place in the tree.
#[derive(Debug, Clone, Copy)]
pub struct NodeRef<'t> {
    /// The node.
    pub node: &'t Node,
    /// The tier that it is in.
    pub tier: &'t Tier,
    /// The tier that it sends to; `None` for a root.
    pub parent: Option<&'t Tier>,
}

impl NodeRef<'_> {
    /// Whether it writes to the sink.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.parent.is_none()
    }
}

/// A checked topology: a tree of tiers with one root tier, at least one node in each, at least one category. Only
/// [`Topology::load`] and [`Topology::parse`] make one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Topology {
    cluster: String,
    lanes: LaneCount,
    sink: Sink,
    root: RootOptions,
    roster: RosterOptions,
    spool: SpoolOptions,
    forward: ForwardOptions,
    limits: NodeLimits,
    tiers: Vec<Tier>,
    categories: BTreeMap<CategoryName, Category>,
}

impl Topology {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        Self::parse(&path.display().to_string(), &read_text(path)?)
    }

    /// Reads `content`, the content of the file `name`.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(name: &str, content: &str) -> Result<Self, ConfigErrors> {
        parse(name, content, read::topology)
    }

    /// The cluster's name.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// How many lanes there are.
    #[must_use]
    pub fn lanes(&self) -> LaneCount {
        self.lanes
    }

    /// Where the roots write.
    #[must_use]
    pub fn sink(&self) -> &Sink {
        &self.sink
    }

    /// How the roots write.
    #[must_use]
    pub fn root(&self) -> &RootOptions {
        &self.root
    }

    /// Of which agents the roots expect reports.
    #[must_use]
    pub fn roster(&self) -> &RosterOptions {
        &self.roster
    }

    /// How the other nodes buffer.
    #[must_use]
    pub fn spool(&self) -> &SpoolOptions {
        &self.spool
    }

    /// How the other nodes send.
    #[must_use]
    pub fn forward(&self) -> &ForwardOptions {
        &self.forward
    }

    /// What every node takes at a time.
    #[must_use]
    pub fn limits(&self) -> &NodeLimits {
        &self.limits
    }

    /// The tiers, sorted by name.
    #[must_use]
    pub fn tiers(&self) -> &[Tier] {
        &self.tiers
    }

    /// The tier of that name.
    #[must_use]
    pub fn tier(&self, name: &str) -> Option<&Tier> {
        self.tiers.iter().find(|tier| tier.name.as_str() == name)
    }

    /// The tier that writes to the sink.
    #[must_use]
    pub fn root_tier(&self) -> &Tier {
        self.tiers.iter().find(|tier| tier.parent.is_none()).expect("a checked topology has a root tier")
    }

    /// The place of the node of that name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<NodeRef<'_>> {
        self.tiers.iter().find_map(|tier| {
            let node = tier.nodes.iter().find(|node| node.name.as_str() == name)?;
            let parent = tier.parent.as_ref().and_then(|parent| self.tier(parent.as_str()));
            Some(NodeRef { node, tier, parent })
        })
    }

    /// The nodes that the node of that name may send to; none for a root or a name that isn't there.
    #[must_use]
    pub fn parents_of(&self, name: &str) -> &[Node] {
        self.node(name).and_then(|place| place.parent).map_or(&[], |tier| &tier.nodes)
    }

    /// Whether the node of that name writes to the sink.
    #[must_use]
    pub fn is_root(&self, name: &str) -> bool {
        self.node(name).is_some_and(|place| place.is_root())
    }

    /// The lane that owns an agent's streams.
    #[must_use]
    pub fn lane_of(&self, agent: &AgentId) -> LaneId {
        agent.lane(self.lanes)
    }

    /// The root that should own a lane as long as it lives.
    #[must_use]
    pub fn preferred_root(&self, lane: LaneId) -> &Node {
        self.roots_of(lane).into_iter().next().expect("a checked topology has a node in each tier")
    }

    /// All roots, in the order in which they should own a lane: rendezvous hashing, but nobody comes first for more lanes than its
    /// even share. There are few lanes, and by their hashes alone one of two roots would often have all.
    #[must_use]
    pub fn roots_of(&self, lane: LaneId) -> Vec<&Node> {
        let roots = &self.root_tier().nodes;
        let share = usize::from(self.lanes.get()).div_ceil(roots.len());
        let mut first_for: BTreeMap<&NodeName, usize> = BTreeMap::new();
        let mut order = Vec::new();
        for number in 0..=lane.0 {
            order = rendezvous(format!("lane {number}").as_bytes(), roots);
            let has_room = |node: &&Node| first_for.get(&node.name).is_none_or(|lanes| *lanes < share);
            // Somebody has room for each lane below the number of lanes; for any other the hashes decide.
            let first = order.iter().position(has_room).unwrap_or(0);
            order[..=first].rotate_right(1);
            *first_for.entry(&order[0].name).or_default() += 1;
        }
        order
    }

    /// The category of that name.
    #[must_use]
    pub fn category(&self, name: &CategoryName) -> Option<&Category> {
        self.categories.get(name)
    }

    /// All categories by name.
    #[must_use]
    pub fn categories(&self) -> &BTreeMap<CategoryName, Category> {
        &self.categories
    }

    /// What agents are told of the topology.
    #[must_use]
    pub fn for_agents(&self) -> Categories {
        let settings = |category: &Category| CategorySettings {
            bucket_s: category.bucket,
            codec: category.codec,
            close_delay_ms: u64::try_from(category.close_delay.as_millis()).unwrap_or(u64::MAX),
        };
        Categories {
            lanes: self.lanes,
            categories: self.categories.iter().map(|(name, category)| (name.clone(), settings(category))).collect(),
        }
    }

    /// A hash of all that the file means: two nodes with the same one have the same topology, however it is written.
    /// 32 hexadecimal digits.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let meaning = serde_json::to_vec(self).expect("maps have text keys, and no serializer fails");
        format!("{:032x}", xxh3_128(&meaning))
    }

    /// The tree as text, for people.
    #[must_use]
    pub fn draw(&self) -> String {
        draw::draw(self)
    }
}

/// The nodes, the one that should serve `key` first, then the one that should do so in its place, and so on.
///
/// Rendezvous hashing: when a node goes or comes, only the keys move that it served or will serve.
#[must_use]
pub fn rendezvous<'n>(key: &[u8], nodes: &'n [Node]) -> Vec<&'n Node> {
    let mut order: Vec<_> = nodes.iter().collect();
    order.sort_by_cached_key(|node| place(key, &node.name));
    order
}

/// The same for names alone.
#[must_use]
pub fn rendezvous_names(key: &[u8], names: &[NodeName]) -> Vec<NodeName> {
    let mut order = names.to_vec();
    order.sort_by_cached_key(|name| place(key, name));
    order
}

fn place(key: &[u8], name: &NodeName) -> (std::cmp::Reverse<u64>, NodeName) {
    let mut hash = Xxh3::new();
    // The length keeps key and name apart.
    hash.update(&(key.len() as u64).to_le_bytes());
    hash.update(key);
    hash.update(name.as_str().as_bytes());
    (std::cmp::Reverse(hash.digest()), name.clone())
}

#[cfg(test)]
mod tests;
