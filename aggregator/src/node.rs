//! A running node: the HTTP server in front, and behind it an edge or a root, as the topology has it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::Method;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tributary_common::http::body::BodyPace;
use tributary_common::http::ops::Ops;
use tributary_common::http::server::{Drained, ServerLimits, ServerMetrics, serve};
use tributary_common::ids::LaneId;
use tributary_common::shutdown::on_signal;
use tributary_common::telemetry::{Metrics, notify_ready, notify_stopping, start_watchdog};

use crate::config::NodeConfig;
use crate::dfs::probe::{ProbeError, probe};
use crate::dfs::{CreateOptions, Dfs, DfsOptions, OpenError, open_dfs};
use crate::edge::{Edge, EdgeMetrics, EdgeOptions, Folders, StartError};
use crate::operate::Operator;
use crate::receive::{ReceiveLimits, ReceiveMetrics, Receiver};
use crate::root::Root;
use crate::root::metrics::LaneMetrics;
use crate::root::recovery::{TakeError, check_base};
use crate::surroundings::WallClock;
use crate::tier::Tier;

/// How long a client may not take its answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// The block size that the sink is probed with; the probe only wants it to be possible.
const PROBE_BLOCK_BYTES: u64 = 1 << 20;

/// A node that was emptied stays until nobody has asked it for so long: longer than the default time between two reports of an
/// agent, and than it takes another root to see who has a lane. Who comes in between is sent elsewhere and meets no closed door.
const QUIET: Duration = Duration::from_secs(6);

/// The longest stay: who knows no other node comes again and again.
const MAX_STAY: Duration = Duration::from_secs(20);

/// A node could not be started.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The address can't be listened on.
    #[error("can't listen on {address}: {error}; stop what has the port, or set listen to another address")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        error: std::io::Error,
    },
    /// Signals can't be watched.
    #[error("can't watch for signals: {0}")]
    Signals(#[source] std::io::Error),
    /// The spool or the data directory can't be used.
    #[error(transparent)]
    Edge(#[from] StartError),
    /// The sink can't be opened.
    #[error(transparent)]
    Sink(#[from] OpenError),
    /// The sink is not what the topology says.
    #[error(transparent)]
    Base(#[from] TakeError),
    /// The sink is not fit for use.
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

/// What stands behind the server.
enum Behind {
    Edge(Edge),
    Root(Arc<Root>),
}

/// When a sender last asked this node for something.
#[derive(Clone)]
struct LastAsked(Arc<Mutex<Instant>>);

impl LastAsked {
    fn now() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Waits until nobody has asked for [`QUIET`], and not longer than [`MAX_STAY`].
    async fn quiet(&self) {
        let end = Instant::now() + MAX_STAY;
        loop {
            let quiet = *self.0.lock().unwrap_or_else(PoisonError::into_inner) + QUIET;
            if quiet.min(end) <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(quiet.min(end)).await;
        }
    }
}

/// Runs the node until a signal stops it. Returns when it has drained.
///
/// # Errors
/// When it can't be started.
pub async fn run(config: NodeConfig) -> Result<(), RunError> {
    let shutdown = on_signal().map_err(RunError::Signals)?;
    // Before anything slow: that the port is taken shows at once.
    let listener =
        TcpListener::bind(config.listen).await.map_err(|error| RunError::Listen { address: config.listen, error })?;
    let address = listener.local_addr().unwrap_or(config.listen);
    let place = config.place();
    let (tier_name, is_root) = (place.tier.name.clone(), place.is_root());
    let mut metrics = Metrics::new("aggregator");
    let behind = if is_root {
        Behind::Root(Arc::new(start_root(&config, &mut metrics).await?))
    } else {
        let counters = Arc::new(EdgeMetrics::default());
        counters.register(metrics.registry());
        Behind::Edge(Edge::start(EdgeOptions::of(&config), Folders::open(&config.data_dir)?, counters).await?)
    };
    let tier: Arc<dyn Tier> = match &behind {
        Behind::Edge(edge) => Arc::new(edge.clone()),
        Behind::Root(root) => Arc::clone(root) as Arc<dyn Tier>,
    };

    let limits = config.topology.limits();
    let received = Arc::new(ReceiveMetrics::default());
    received.register(metrics.registry());
    let served = ServerMetrics::default();
    served.register(metrics.registry());
    let receiver = Arc::new(Receiver::new(
        Arc::clone(&tier),
        config.topology.for_agents(),
        ReceiveLimits {
            max_request_bytes: limits.max_request_bytes,
            max_batch_bytes: limits.max_batch_bytes,
            max_in_flight_bytes: limits.max_in_flight_bytes,
        },
        WallClock::system(),
        received,
    ));
    let drain = CancellationToken::new();
    let ops = {
        let drain = drain.clone();
        let ready = move || if drain.is_cancelled() { Err("this node is being emptied".into()) } else { tier.ready() };
        Ops::new(Arc::new(metrics), ready)
    };
    let server_limits = ServerLimits {
        max_connections: limits.max_connections as usize,
        header_timeout: limits.header_timeout,
        body: BodyPace { idle_timeout: limits.body_idle_timeout, min_rate: limits.min_body_rate },
        write_timeout: WRITE_TIMEOUT,
        drain_timeout: config.drain_timeout,
    };
    tracing::info!(
        node = %config.name, tier = %tier_name, %address, cluster = config.topology.cluster(),
        topology = config.topology.fingerprint(), "serving"
    );
    notify_ready();
    start_watchdog();
    let stopping = shutdown.clone();
    tokio::spawn(async move {
        stopping.cancelled().await;
        notify_stopping();
    });
    let behind = Arc::new(behind);
    let asked = LastAsked::now();
    {
        let (drain, behind, shutdown, asked) = (drain.clone(), Arc::clone(&behind), shutdown.clone(), asked.clone());
        tokio::spawn(async move {
            drain.cancelled().await;
            match &*behind {
                Behind::Edge(edge) => edge.drain().await,
                Behind::Root(root) => root.hand_over().await,
            }
            tracing::info!("this node is empty; ending when nobody asks it any more");
            asked.quiet().await;
            shutdown.cancel();
        });
    }
    let operator = Operator {
        own: address.ip(),
        drain,
        root: match &*behind {
            Behind::Root(root) => Some(Arc::clone(root)),
            Behind::Edge(_) => None,
        },
        nodes: config.topology.tiers().iter().flat_map(|tier| &tier.nodes).map(|node| node.endpoint.clone()).collect(),
    };
    let drained = serve(listener, server_limits, served, shutdown, move |request| {
        let (receiver, ops, operator, asked) = (Arc::clone(&receiver), ops.clone(), operator.clone(), asked.clone());
        async move {
            if Operator::knows(request.uri().path()) {
                return operator.answer(request).await;
            }
            match ops.answer(request.method(), request.uri().path()) {
                Some(answer) => answer,
                None => {
                    if request.method() == Method::POST {
                        asked.note();
                    }
                    receiver.handle(request).await
                }
            }
        }
    })
    .await;
    if let Drained::Cut(connections) = drained {
        tracing::warn!(connections, "requests were cut off at the end of drain_timeout; their senders send them again");
    }
    let stop = async {
        match &*behind {
            Behind::Edge(edge) => edge.stop().await,
            Behind::Root(root) => root.drain().await,
        }
    };
    if tokio::time::timeout(config.drain_timeout, stop).await.is_err() {
        tracing::warn!("the end of drain_timeout came before all was closed; the next start does the rest");
    }
    tracing::info!("stopped");
    Ok(())
}

/// Opens the sink of a node's topology.
///
/// # Errors
/// When its URI or its settings are wrong.
pub async fn open_sink(config: &NodeConfig) -> Result<Arc<dyn Dfs>, OpenError> {
    let sink = config.topology.sink();
    let text = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
    open_dfs(
        &sink.uri,
        &DfsOptions {
            call_timeout: sink.call_timeout,
            user: sink.user.clone(),
            kerberos_principal: sink.kerberos_principal.clone(),
            kerberos_keytab: text(&sink.kerberos_keytab),
            hadoop_conf_dir: text(&sink.hadoop_conf_dir),
        },
    )
    .await
}

async fn start_root(config: &NodeConfig, metrics: &mut Metrics) -> Result<Root, RunError> {
    let sink = config.topology.sink();
    let dfs = open_sink(config).await?;
    let options =
        CreateOptions { block_size: PROBE_BLOCK_BYTES, replication: sink.replication, sync_timeout: sink.sync_timeout };
    match probe(&*dfs, options).await {
        Ok(()) => tracing::info!(sink = dfs.describe(), "the sink is fit for use"),
        // The lanes try again and again, and say so.
        Err(error) if error.transient => tracing::warn!(%error, "the sink can't be probed now; going on without"),
        Err(error) => return Err(error.into()),
    }
    let patience = sink.call_timeout;
    match tokio::time::timeout(patience, check_base(&*dfs, config.topology.lanes())).await {
        Ok(Err(error)) if !error.is_transient() => return Err(error.into()),
        Ok(Ok(())) => {}
        // It is looked at again before a lane is taken.
        Ok(Err(_)) | Err(_) => {
            tracing::warn!("the sink doesn't say now for how many lanes it was made; going on without");
        }
    }
    let root = Root::start(&dfs, &config.topology, &config.name);
    let lanes = root.metrics().map(|(lane, metrics)| (lane, metrics.clone())).collect();
    metrics.registry().register_collector(Box::new(LaneCollector { lanes }));
    Ok(root)
}

/// Shows the numbers of all lanes, each metric with a label `lane`.
#[derive(Debug)]
struct LaneCollector {
    lanes: Vec<(LaneId, LaneMetrics)>,
}

impl Collector for LaneCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let lanes: Vec<_> = self.lanes.iter().map(|(lane, metrics)| (lane.to_string(), metrics.samples())).collect();
        let Some((_, first)) = lanes.first() else { return Ok(()) };
        for (index, (name, help, only_grows, _)) in first.iter().enumerate() {
            let kind =
                if *only_grows { ConstCounter::new(0_u64).metric_type() } else { ConstGauge::new(0_i64).metric_type() };
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            for (lane, samples) in &lanes {
                let value = samples[index].3;
                let labels = [("lane", lane.as_str())];
                let family = metric.encode_family(&labels)?;
                if *only_grows {
                    ConstCounter::new(value).encode(family)?;
                } else {
                    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(family)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_emptied_node_stays_while_senders_still_ask_it_but_not_for_ever() {
        let begun = Instant::now();
        let asked = LastAsked::now();
        asked.quiet().await;
        assert_eq!(begun.elapsed().as_secs(), QUIET.as_secs());

        let begun = Instant::now();
        asked.note();
        let asking = {
            let asked = asked.clone();
            tokio::spawn(async move {
                for _ in 0..3 {
                    tokio::time::sleep(Duration::from_secs(2)).await;
                    asked.note();
                }
            })
        };
        asked.quiet().await;
        assert_eq!(begun.elapsed().as_secs(), 6 + QUIET.as_secs(), "the last one came after 6 s");
        asking.await.expect("it ends");

        let begun = Instant::now();
        let asking = {
            let asked = asked.clone();
            tokio::spawn(async move {
                loop {
                    asked.note();
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            })
        };
        tokio::task::yield_now().await;
        asked.quiet().await;
        assert_eq!(begun.elapsed().as_secs(), MAX_STAY.as_secs());
        asking.abort();
    }
}
