//! The whole tree: servers with agents, edges, perhaps a tier between, roots, on one hostile file system; what befalls them, and
//! what has to be so in the end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tributary_aggregator::dfs::Dfs;
use tributary_aggregator::dfs::hostile::{HostileCluster, HostileDfs, Hostility, SETTLE};
use tributary_aggregator::edge::{Edge, EdgeOptions, Folders};
use tributary_aggregator::forward::ForwardLimits;
use tributary_aggregator::receive::{ReceiveLimits, Receiver};
use tributary_aggregator::root::Root;
use tributary_aggregator::root::lane::{CategorySettings, LaneSettings};
use tributary_aggregator::root::ownership::Rules;
use tributary_aggregator::spool::SpoolLimits;
use tributary_aggregator::surroundings::{Random, Surroundings, WallClock};
use tributary_aggregator::tier::Tier;
use tributary_common::bucket::BucketSize;
use tributary_common::frame::Codec;
use tributary_common::http::backoff::BackoffLimits;
use tributary_common::http::client::ClientOptions;
use tributary_common::http::endpoint::Endpoint;
use tributary_common::http::pool::PoolOptions;
use tributary_common::ids::{CategoryName, LaneCount, LaneId, NodeName};
use tributary_common::messages::Categories;
use tributary_common::topology::rendezvous_names;

use crate::agent::{Agent, Trade};
use crate::chance::{Chance, Trace};
use crate::disk::{Copy, Disk, Wear, slow};
use crate::judge::{HourRules, Judge};
use crate::network::{Gate, Network, Node, REQUEST_TIMEOUT, Weather, Wire, endpoint};
use crate::server::{Database, Server};

const TAKEOVER_AFTER: Duration = Duration::from_secs(45);

/// A midnight, in milliseconds since 1970.
const MIDNIGHT_MS: i64 = 1_767_225_600_000;

/// The sizes of buckets, and how long before the end of one a run begins, in seconds. A day must end soon after the faults, for a
/// run can't wait for the next one to end.
const BUCKETS: [(u32, std::ops::Range<u64>); 4] = [(60, 0..60), (60, 0..60), (900, 20..200), (86_400, 240..320)];

/// What becomes of the last of the servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is there to the end.
    Stays,
    /// Its agent leaves by a last report and comes back, again and again; in the end it leaves.
    ComesAndGoes,
    /// It dies for ever, and an operator says so.
    Retired,
    /// It dies for ever, and nobody says so.
    GivenUp,
}

const LIMITS: ReceiveLimits =
    ReceiveLimits { max_request_bytes: 256 << 10, max_batch_bytes: 16 << 10, max_in_flight_bytes: 1 << 20 };

/// What kinds of trouble a run has. Fewer kinds go deeper.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    hostility: Hostility,
    weather: Weather,
    wear: Wear,
    pub(crate) files_change: bool,
    pub(crate) databases_change: bool,
    pub(crate) spools_change: bool,
    /// One in so many steps has a fault.
    pub(crate) fault_every: u64,
    pub(crate) fate: Fate,
    /// The step in which the last server dies, if it does, and that in which an operator says so, if one does.
    pub(crate) dies_at: u64,
    pub(crate) retired_at: u64,
    bucket_s: u32,
    birth_ms: i64,
}

impl Plan {
    pub(crate) fn draw(chance: &Chance) -> Self {
        let hostility = match chance.below(3) {
            0 => Hostility { latency: Duration::from_millis(50), ..Hostility::none() },
            _ => Hostility::storm(),
        };
        let weather = match chance.below(3) {
            0 => Weather::default(),
            1 => Weather { lost: 10, unanswered: 10, doubled: 10, delayed: 20 },
            _ => Weather { lost: 50, unanswered: 50, doubled: 30, delayed: 60 },
        };
        let wear = if chance.one_in(3) { Wear { writes: 40, syncs: 20 } } else { Wear::default() };
        // Of a file that was brought back, an agent without its database can't know under which names what was shipped.
        let (bucket_s, before_end_s) = &BUCKETS[chance.index(BUCKETS.len())];
        let before_end_s = before_end_s.start + chance.below(before_end_s.end - before_end_s.start);
        let (files_change, databases_change) = [(true, false), (false, true), (false, false)][chance.index(3)];
        Self {
            hostility,
            weather,
            wear,
            files_change,
            databases_change,
            spools_change: chance.one_in(2),
            fault_every: [4, 8, 16][chance.index(3)],
            fate: [Fate::Stays, Fate::ComesAndGoes, Fate::Retired, Fate::GivenUp][chance.index(4)],
            dies_at: 20 + chance.below(80),
            retired_at: 100 + chance.below(40),
            bucket_s: *bucket_s,
            birth_ms: MIDNIGHT_MS - before_end_s as i64 * 1000,
        }
    }
}

pub(crate) enum Running {
    Agent,
    Edge(Arc<tokio::sync::OnceCell<Edge>>),
    Root(Arc<Root>, HostileDfs),
}

pub(crate) struct Process {
    pub(crate) gate: Gate,
    pub(crate) running: Running,
    task: Option<JoinHandle<()>>,
}

/// The place of a process on its machine.
pub(crate) struct Seat {
    pub(crate) name: String,
    pub(crate) machine: Machine,
    pub(crate) process: Option<Process>,
    /// When it is started, or goes on.
    pub(crate) back: Option<Instant>,
    /// It is never started again.
    pub(crate) gone: bool,
}

pub(crate) enum Machine {
    Server(Arc<Server>, Vec<Database>),
    /// A node that isn't a root: its way up, and copies of its disk.
    Edge(Vec<Vec<Endpoint>>, Disk, Vec<Copy>),
    Root,
}

/// Where nodes put what they serve.
#[derive(Clone)]
struct Counter {
    network: Network,
    lanes: LaneCount,
    bucket: BucketSize,
    clock: WallClock,
}

impl Counter {
    fn serve(&self, gate: &Gate, tier: Arc<dyn Tier>) {
        let settings = tributary_common::messages::CategorySettings {
            bucket_s: self.bucket,
            codec: Codec::Gzip,
            close_delay_ms: 30_000,
        };
        let categories = Categories { lanes: self.lanes, categories: [(category(), settings)].into() };
        let receiver = Receiver::new(tier, categories, LIMITS, self.clock.clone(), Arc::default());
        self.network.serve(Node { gate: gate.clone(), receiver: Arc::new(receiver) });
    }
}

pub(crate) struct World {
    pub(crate) cluster: HostileCluster,
    pub(crate) chance: Chance,
    pub(crate) network: Network,
    pub(crate) judge: Judge,
    pub(crate) trace: Trace,
    pub(crate) servers: Vec<Arc<Server>>,
    trade: Trade,
    counter: Counter,
    settings: LaneSettings,
    roots: Vec<NodeName>,
    spool: SpoolLimits,
}

fn category() -> CategoryName {
    "app".parse().expect("a good name")
}

fn settings(chance: &Chance, lanes: LaneCount, bucket: BucketSize, clock: WallClock) -> LaneSettings {
    LaneSettings {
        lanes,
        commit_interval: Duration::from_secs(1),
        commit_bytes: 1 << 20,
        ledger_interval: Duration::from_secs(10),
        settle: SETTLE,
        stream_ttl: Duration::from_secs(86_400 * 365 * 100),
        max_open_files: 10,
        recompress_below: if chance.one_in(2) { 0 } else { 1 << 20 },
        max_uncommitted_bytes: 16 << 20,
        forget_agents_after: Duration::from_secs(86_400 * 365),
        publish_partial: chance.one_in(2),
        success_file: "_SUCCESS".into(),
        replication: None,
        min_replication: 1,
        sync_timeout: Duration::from_secs(5),
        clock,
        categories: BTreeMap::from([(
            category(),
            CategorySettings {
                bucket,
                roll_size: if chance.one_in(3) { 3_000 } else { 64 << 20 },
                idle_timeout: Duration::from_secs(3600),
                close_delay: Duration::from_secs(30),
                give_up_after: Duration::from_secs(600),
            },
        )]),
    }
}

impl World {
    /// A tree as the seed has it, with all of its processes running.
    pub(crate) fn draw(seed: u64, plan: &Plan, chance: Chance, trace: Trace) -> (Self, Vec<Seat>) {
        let cluster = HostileCluster::born_at(plan.birth_ms, seed, plan.hostility);
        let now_ms = {
            let cluster = cluster.clone();
            move || cluster.now_ms()
        };
        let clock = WallClock::new(now_ms.clone());
        let lanes = LaneCount::try_from(1 + chance.below(3) as u16).expect("a few");
        let roots: Vec<NodeName> =
            (1..=1 + chance.below(3)).map(|n| format!("root-{n}").parse().expect("a good name")).collect();
        let bucket = BucketSize::try_from(plan.bucket_s).expect("a good size");
        let settings = settings(&chance, lanes, bucket, clock.clone());
        let rules = HourRules {
            roll_size: settings.categories[&category()].roll_size,
            publish_partial: settings.publish_partial,
            gives_up: plan.fate == Fate::GivenUp,
        };
        let judge = Judge::new(cluster.clone(), trace.clone(), rules, plan.files_change);
        let network = Network::new(chance.clone(), trace.clone(), judge.clone());
        network.set_weather(plan.weather);
        let (edges, mids, agents) = (1 + chance.below(2), chance.below(3), 1 + chance.below(3));
        let names = |what: &str, count: u64| (1..=count).map(|n| format!("{what}-{n}")).collect::<Vec<_>>();
        let (edges, mids) = (names("edge", edges), names("mid", mids));
        // Of the last bucket but one, too.
        let oldest_ms = (u64::from(plan.bucket_s) * 1500).max(90_000);
        let servers: Vec<_> = (names("web", agents).iter())
            .map(|name| Server::new(name, 1 + chance.index(2), oldest_ms, chance.clone(), trace.clone()))
            .map(Arc::new)
            .collect();
        let world = Self {
            trade: Trade {
                endpoints: edges.iter().map(|name| endpoint(name)).collect(),
                lanes,
                bucket,
                network: network.clone(),
                judge: judge.clone(),
                chance: chance.clone(),
                clock_ms: Arc::new(now_ms),
            },
            counter: Counter { network: network.clone(), lanes, bucket, clock },
            settings,
            spool: match chance.below(4) {
                // So small that it is full now and then: the smallest group takes 4 KiB.
                0 => SpoolLimits { max_bytes: 192 << 10, segment_bytes: 24 << 10 },
                1 => SpoolLimits { max_bytes: 1 << 20, segment_bytes: 12 << 10 },
                _ => SpoolLimits { max_bytes: 1 << 20, segment_bytes: 64 << 10 },
            },
            servers,
            cluster,
            network,
            judge,
            trace,
            chance,
            roots,
        };
        let seats = world.seats(plan, &edges, &mids);
        (world, seats)
    }

    fn seats(&self, plan: &Plan, edges: &[String], mids: &[String]) -> Vec<Seat> {
        let to_roots: Vec<Vec<Endpoint>> = (self.trade.lanes.lanes())
            .map(|lane| self.order(lane).iter().map(|name| endpoint(name.as_str())).collect())
            .collect();
        let to_mids = vec![mids.iter().map(|name| endpoint(name)).collect()];
        let up = if mids.is_empty() { &to_roots } else { &to_mids };
        let node = |name: &String, routes: &Vec<Vec<Endpoint>>| {
            let disk = Disk::new(self.chance.clone(), self.trace.clone());
            disk.set_wear(plan.wear);
            (name.clone(), Machine::Edge(routes.clone(), disk, Vec::new()))
        };
        let roots = self.roots.iter().map(|name| (name.to_string(), Machine::Root));
        let servers = self.servers.iter();
        let machines = roots
            .chain(mids.iter().map(|name| node(name, &to_roots)))
            .chain(edges.iter().map(|name| node(name, up)))
            .chain(servers.map(|server| (server.agent.to_string(), Machine::Server(Arc::clone(server), Vec::new()))));
        machines
            .map(|(name, machine)| {
                let process = Some(self.start(&name, &machine));
                Seat { name, machine, process, back: None, gone: false }
            })
            .collect()
    }

    pub(crate) fn bucket(&self) -> BucketSize {
        self.trade.bucket
    }

    fn rules(&self, me: &NodeName, lane: LaneId, jitter: Duration) -> Rules {
        Rules { me: me.clone(), order: self.order(lane), takeover_after: TAKEOVER_AFTER, jitter }
    }

    fn order(&self, lane: LaneId) -> Vec<NodeName> {
        rendezvous_names(format!("lane {lane}").as_bytes(), &self.roots)
    }

    fn edge_options(&self, routes: &[Vec<Endpoint>]) -> EdgeOptions {
        EdgeOptions {
            spool: self.spool,
            sync_interval: Duration::from_millis(20),
            max_age: Duration::from_secs(86_400),
            max_set_aside_bytes: 64 << 20,
            forward: ForwardLimits {
                request_bytes: 8 << 10,
                pool: PoolOptions::new(
                    BackoffLimits { initial: Duration::from_millis(250), max: Duration::from_secs(10) },
                    Duration::from_secs(120),
                ),
                ..ForwardLimits::default()
            },
            client: ClientOptions {
                connect_timeout: REQUEST_TIMEOUT,
                request_timeout: REQUEST_TIMEOUT,
                max_idle_connections: 1,
            },
            lanes: self.trade.lanes,
            routes: routes.to_vec(),
        }
    }

    /// Starts what belongs on a machine.
    pub(crate) fn start(&self, name: &str, machine: &Machine) -> Process {
        let gate = Gate::new(name);
        match machine {
            Machine::Server(server, _) => {
                let agent = Agent::new(Arc::clone(server), gate.clone(), self.trade.clone());
                Process { gate, running: Running::Agent, task: Some(tokio::spawn(agent.run())) }
            }
            Machine::Edge(routes, disk, _) => self.start_edge(gate, routes, disk),
            Machine::Root => {
                let process = self.cluster.process();
                let dfs: Arc<dyn Dfs> = Arc::new(process.clone());
                let nodes = self.roots.iter().map(|name| (name.clone(), endpoint(name.as_str()))).collect();
                let me: NodeName = name.parse().expect("a good name");
                let jitter = self.chance.up_to(Duration::from_secs(20));
                let root = Root::keep(&dfs, &self.settings, nodes, |lane| self.rules(&me, lane, jitter));
                let root = Arc::new(root);
                self.counter.serve(&gate, Arc::clone(&root) as Arc<dyn Tier>);
                Process { gate, running: Running::Root(root, process), task: None }
            }
        }
    }

    fn start_edge(&self, gate: Gate, routes: &[Vec<Endpoint>], disk: &Disk) -> Process {
        let folders = Folders::unlocked(disk.folder(&gate, "spool"), disk.folder(&gate, "set-aside"));
        let upstream = Arc::new(Wire { network: self.network.clone(), gate: gate.clone() });
        let chance = self.chance.clone();
        let surroundings = Surroundings {
            clock: self.counter.clock.clone(),
            random: Random::new(move || chance.bits()),
            blocking: slow(&gate, &self.chance),
        };
        let options = self.edge_options(routes);
        let handle = Arc::new(tokio::sync::OnceCell::new());
        let (counter, shown, own) = (self.counter.clone(), Arc::clone(&handle), gate.clone());
        let task = tokio::spawn(async move {
            let work = async {
                let prepared = Edge::prepare(options, folders, upstream, surroundings, Arc::default()).await;
                let Ok((edge, work)) = prepared else { return };
                counter.serve(&own, Arc::new(edge.clone()));
                assert!(shown.set(edge).is_ok(), "it is set once");
                // An error: the disk could not sync, which ends the process.
                let _ = work.await;
            };
            own.while_alive(work).await;
            own.kill();
        });
        Process { gate, running: Running::Edge(handle), task: Some(task) }
    }
}

impl Seat {
    /// Its process ends as `kill -9` ends it.
    pub(crate) fn crash(&mut self, world: &World) {
        let Some(process) = self.process.take() else { return };
        world.trace.add(|| format!("{} ends", self.name));
        process.gate.kill();
        if let Some(task) = &process.task {
            task.abort();
        }
        if let Running::Root(root, dfs) = &process.running {
            world.cluster.crash(dfs);
            root.abandon();
        }
    }

    /// Its process is stopped as SIGSTOP stops it.
    pub(crate) fn stop(&self, world: &World) {
        let Some(process) = &self.process else { return };
        process.gate.stop();
        if let Running::Root(_, dfs) = &process.running {
            world.cluster.pause(dfs);
        }
    }

    pub(crate) fn lose_power(&self) {
        if let Machine::Edge(_, disk, _) = &self.machine {
            disk.lose_power();
        }
    }

    /// Whether both are of the same tier.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let tier = |seat: &Self| seat.name.split('-').next().map(str::to_owned);
        tier(self) == tier(other)
    }

    /// What its node says of itself.
    pub(crate) async fn status(&self) -> Option<serde_json::Value> {
        match &self.process.as_ref()?.running {
            Running::Agent => None,
            Running::Edge(edge) => Some(edge.get()?.status().await),
            Running::Root(root, _) => Some(root.status().await),
        }
    }
}
