//! Which root has which lane, and the operator's commands that change that.

use std::fs;

use anyhow::{Context, Result, ensure};
use tributary_common::ids::{AgentId, LaneCount, LaneId};
use tributary_common::topology::Topology;

use super::{Cluster, LIMIT, Role};
use crate::process::{AtParentDeath, Process};
use crate::wait::until;

/// A name is soon found: each fits with a probability of one in the number of lanes.
const NAME_TRIES: usize = 10_000;

/// The id of agent `number`: one whose lane is `number` modulo the number of lanes, so that no lane is without agents.
pub(super) fn agent_id(number: usize, lanes: LaneCount) -> Result<AgentId> {
    for attempt in 0..NAME_TRIES {
        let name = if attempt == 0 { format!("web-{number}") } else { format!("web-{number}.{attempt}") };
        let id: AgentId = name.parse()?;
        if usize::from(id.lane(lanes).0) == number % usize::from(lanes.get()) {
            return Ok(id);
        }
    }
    anyhow::bail!("found no name for agent {number} among {NAME_TRIES}")
}

impl Cluster {
    /// The lane of an agent's streams.
    #[must_use]
    pub fn lane_of_agent(&self, number: usize) -> u16 {
        self.agent_ids[number].lane(self.lanes).0
    }

    /// The root that should have a lane while all are there.
    ///
    /// # Errors
    /// The topology can't be read.
    pub fn preferred_root(&self, lane: u16) -> Result<Role> {
        let topology = Topology::load(&self.folder().join("topology.toml"))?;
        let name = topology.preferred_root(LaneId(lane)).name.to_string();
        let roots = (0..self.options.roots).map(Role::Root);
        roots.into_iter().find(|role| role.to_string() == name).with_context(|| format!("{name} is no root"))
    }

    /// The root other than `role`, in a tree with two.
    #[must_use]
    pub fn other_root(&self, role: Role) -> Role {
        if role == Role::Root(0) { Role::Root(1) } else { Role::Root(0) }
    }

    /// The root that serves a lane now and its epoch, by the roots' own words. Of several the one with the highest epoch: others
    /// may not have noticed yet that they lost it.
    pub async fn owner(&self, lane: u16) -> Option<(Role, u64)> {
        let mut owner: Option<(Role, u64)> = None;
        for role in (0..self.options.roots).map(Role::Root) {
            if self.is_asleep(role) || self.pid(role).is_err() {
                continue;
            }
            let Ok(status) = self.status(role).await else { continue };
            if let Some(epoch) = status["lanes"][lane.to_string()]["epoch"].as_u64()
                && owner.is_none_or(|(_, highest)| epoch > highest)
            {
                owner = Some((role, epoch));
            }
        }
        owner
    }

    /// Waits until `role` serves the lane.
    ///
    /// # Errors
    /// It doesn't come about.
    pub async fn wait_until_owner(&self, lane: u16, role: Role) -> Result<u64> {
        until(format!("{role} to have lane {lane}"), LIMIT, async || {
            let owner = self.owner(lane).await;
            let (found, epoch) = owner.context("nobody has it")?;
            ensure!(found == role, "{found} has it");
            Ok(Some(epoch))
        })
        .await
    }

    /// Waits until each lane is served by the root that comes first for it.
    ///
    /// # Errors
    /// It doesn't come about.
    pub async fn wait_until_preferred_owners(&self) -> Result<()> {
        for lane in 0..self.lanes.get() {
            self.wait_until_owner(lane, self.preferred_root(lane)?).await?;
        }
        Ok(())
    }

    /// Empties a node with `tributary-aggregator drain`, as an operator does; returns when command and node have ended.
    ///
    /// # Errors
    /// Either ends with another code than 0, or not at all.
    pub async fn drain(&mut self, role: Role) -> Result<()> {
        self.command(role, &["drain"]).await?;
        let node = self.node(role)?;
        let mut process = node.process.take().with_context(|| format!("{role} doesn't run"))?;
        let ended = until(format!("{role} to end"), LIMIT, async || process.try_wait()).await;
        let status = ended.with_context(|| process.log_tail())?;
        ensure!(status.success(), "{role} was emptied and ended with {status}: {}", process.log_tail());
        Ok(())
    }

    /// `tributary-aggregator lanes set`, and the new number in the topology of all. No root may run.
    ///
    /// # Errors
    /// The command fails.
    pub async fn set_lanes(&mut self, lanes: u16) -> Result<()> {
        self.command(Role::Root(0), &["lanes", "set", &lanes.to_string()]).await?;
        self.lanes = LaneCount::try_from(lanes).map_err(anyhow::Error::msg)?;
        fs::write(self.folder().join("topology.toml"), self.topology()).context("writing the topology")
    }

    /// What a command of the aggregator writes to its standard output, with the configuration of one node, and how it ends.
    ///
    /// # Errors
    /// It can't be run.
    pub async fn ask(&self, role: Role, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let mut command = tokio::process::Command::new(&self.programs.aggregator);
        command.args(arguments).arg("--config").arg(self.config(role)).kill_on_drop(true);
        let output = command.output().await.with_context(|| format!("{arguments:?}"))?;
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        Ok((output.status.code(), String::from_utf8(output.stdout)?))
    }

    /// Runs a command of the aggregator with the configuration of one node.
    async fn command(&self, role: Role, arguments: &[&str]) -> Result<()> {
        let config = self.config(role).to_owned();
        let log =
            tempfile::Builder::new().prefix("command-").suffix(".txt").tempfile_in(self.folder())?.into_temp_path();
        let mut process = Process::spawn(&self.programs.aggregator, AtParentDeath::Kill, &*log, |command| {
            command.args(arguments).arg("--config").arg(config);
        })?;
        let status = until(format!("{arguments:?} for {role}"), LIMIT, async || process.try_wait()).await?;
        ensure!(status.success(), "{arguments:?} for {role}: {status}: {}", process.log_tail());
        Ok(())
    }
}
