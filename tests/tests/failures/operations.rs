//! What operators do to a tree under load, with real processes: emptying nodes, another number of lanes, nodes that go and come back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tributary_tests::cluster::{Cluster, ClusterOptions, Role};
use tributary_tests::proxy::Fault;
use tributary_tests::scenario::{restart, rotating_writer, scenario, stop, stop_all, writers};
use tributary_tests::wait::until;

const LIMIT: Duration = Duration::from_secs(180);

/// Requests of a node to the tier above that got no answer, or were refused. Being sent to another node is no error, nor is having to
/// wait for the moment in which a lane changes hands.
async fn errors(cluster: &Cluster, child: Role) -> Result<f64> {
    match child {
        Role::Agent(_) => {
            let kinds = ["connection", "timeout", "refused", "nonsense"];
            cluster.metric_of(child, "tributary_agent_request_errors_total", &kinds).await
        }
        _ => cluster.metric_of(child, "tributary_aggregator_forward_errors_total", &["broken", "rejected"]).await,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_emptied_for_maintenance_without_an_error_at_their_children() -> Result<()> {
    let options = ClusterOptions { agents: 2, edges: 2, roots: 2, lanes: 2, ..ClusterOptions::default() };
    scenario("drain", options, async |cluster| {
        cluster.wait_until_preferred_owners().await?;
        let writers = writers(cluster, 2, 1500)?;
        let agents = [Role::Agent(0), Role::Agent(1)];
        let edges = [Role::Edge(0), Role::Edge(1)];
        for (role, children) in [(edges[0], agents), (edges[1], agents), (cluster.preferred_root(0)?, edges)] {
            writers[0].wait_for_more(3000).await?;
            let mut before = Vec::new();
            for child in children {
                before.push((errors(cluster, child).await?, cluster.agent_committed(0).await?));
            }
            cluster.drain(role).await?;
            for (child, (errors_before, committed)) in children.into_iter().zip(before) {
                until("shipping to go on without it", LIMIT, async || {
                    Ok((cluster.agent_committed(0).await? > committed + 500_000).then_some(()))
                })
                .await?;
                let now = errors(cluster, child).await?;
                ensure!(
                    now <= errors_before,
                    "{child} had {errors_before} errors before {role} was emptied, and {now} after"
                );
            }
            restart(cluster, role).await?;
            if matches!(role, Role::Root(_)) {
                cluster.wait_until_preferred_owners().await?;
            }
        }
        stop_all(writers)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_lanes_is_changed_under_load() -> Result<()> {
    let options = ClusterOptions { agents: 3, edges: 2, roots: 2, lanes: 2, ..ClusterOptions::default() };
    scenario("lanes set 3", options, async |cluster| {
        let writers = writers(cluster, 3, 1000)?;
        writers[0].wait_for_more(5000).await?;
        // No hour may be between sealed and published.
        until("the middle of a minute", LIMIT, async || {
            let second = jiff::Timestamp::now().as_second() % 60;
            Ok((15..40).contains(&second).then_some(()))
        })
        .await?;
        for number in 0..2 {
            cluster.drain(Role::Root(number)).await?;
        }
        writers[0].wait_for_more(2000).await?;
        cluster.set_lanes(3).await?;
        writers[0].wait_for_more(1000).await?;
        for number in 0..2 {
            cluster.start_node(Role::Root(number))?;
        }
        // Edges read the topology when they start.
        for number in 0..2 {
            cluster.stop(Role::Edge(number)).await?;
            restart(cluster, Role::Edge(number)).await?;
        }
        cluster.wait_until_preferred_owners().await?;
        writers[0].wait_for_more(3000).await?;
        stop_all(writers)
    })
    .await
}

/// Requests break off in the middle of a batch, and some batches have been taken although no answer came.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_changes_edges_in_the_middle_of_a_batch_and_comes_back() -> Result<()> {
    let options = ClusterOptions { edges: 2, proxies: true, ..ClusterOptions::default() };
    scenario("failover mid-batch", options, async |cluster| {
        let writer = rotating_writer(cluster, 0)?;
        let taken = async |cluster: &Cluster, edge: usize| {
            cluster.metric(Role::Edge(edge), "tributary_aggregator_received_batches_total").await
        };
        for fault in [Fault::CutAfter(5000), Fault::HalfClose, Fault::Cut] {
            for edge in [0, 1] {
                writer.wait_for_more(2000).await?;
                cluster.proxy(Role::Edge(edge))?.set(fault);
                let before = taken(cluster, 1 - edge).await?;
                until(format!("the other edge to take batches after {fault:?}"), LIMIT, async || {
                    Ok((taken(cluster, 1 - edge).await? > before + 3.0).then_some(()))
                })
                .await?;
                cluster.proxy(Role::Edge(edge))?.set(Fault::None);
            }
        }
        // Killed for a while: the agent is at the other edge until it looks for its first one again.
        cluster.kill9(Role::Edge(0))?;
        writer.wait_for_more(3000).await?;
        restart(cluster, Role::Edge(0)).await?;
        until("the agent to come back to its first edge", LIMIT, async || {
            Ok((taken(cluster, 0).await? > 0.0).then_some(()))
        })
        .await?;
        stop(writer)
    })
    .await
}

/// A new edge, as its agents see it: it is in the topology, and comes up with an empty disk.
#[tokio::test(flavor = "multi_thread")]
async fn load_spreads_over_the_edges_and_over_one_that_joins() -> Result<()> {
    const AGENTS: usize = 6;
    let options = ClusterOptions { agents: AGENTS, edges: 3, edges_by_tier: true, ..ClusterOptions::default() };
    scenario("an edge joins", options, async |cluster| {
        let writers = writers(cluster, AGENTS, 300)?;
        // One that was started before its edge listened is with another one for a minute.
        for agent in (0..AGENTS).map(Role::Agent) {
            cluster.kill9(agent)?;
            restart(cluster, agent).await?;
        }
        let first = used_edges(cluster, AGENTS).await?;
        let used = first.iter().collect::<BTreeSet<_>>();
        ensure!(used.len() == 3, "each edge comes first for one of {AGENTS} agents, and not {first:?}");

        let new = first[0];
        cluster.kill9(new)?;
        cluster.wipe_state(new)?;
        until("all agents to ship without it", LIMIT, async || {
            Ok((!used_edges(cluster, AGENTS).await?.contains(&new)).then_some(()))
        })
        .await?;
        let without = used_edges(cluster, AGENTS).await?;
        let kept = (0..AGENTS).filter(|&agent| first[agent] != new).all(|agent| without[agent] == first[agent]);
        ensure!(kept, "only those that it served go elsewhere: first {first:?}, without it {without:?}");
        writers[0].wait_for_more(1000).await?;

        restart(cluster, new).await?;
        until("the agents for which it comes first to use it", LIMIT, async || {
            Ok((used_edges(cluster, AGENTS).await? == first).then_some(()))
        })
        .await?;
        until("it to take batches", LIMIT, async || {
            let taken = cluster.metric(new, "tributary_aggregator_received_batches_total").await?;
            Ok((taken > 0.0).then_some(()))
        })
        .await?;
        stop_all(writers)
    })
    .await
}

/// The edge that each agent ships to.
async fn used_edges(cluster: &Cluster, agents: usize) -> Result<Vec<Role>> {
    let edges =
        (0..3).map(Role::Edge).map(|edge| Ok((cluster.url(edge, "")?, edge))).collect::<Result<BTreeMap<_, _>>>()?;
    let mut used = Vec::new();
    for agent in (0..agents).map(Role::Agent) {
        let status = cluster.status(agent).await?;
        let endpoint = status["endpoint"].as_str().context("an agent says where it ships to")?;
        used.push(*edges.get(endpoint).with_context(|| format!("{endpoint} is none of {edges:?}"))?);
    }
    Ok(used)
}
