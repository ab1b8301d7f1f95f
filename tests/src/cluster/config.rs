//! The configuration files of a tree.

use std::fmt::Write as _;
use std::fs;

use anyhow::Result;

use super::{Cluster, ClusterOptions, Role, Sink};
use crate::synthetic::{TIME_AFTER, TIME_FORMAT};

/// `SINK` and `ROOT` stand for the lines that depend on the sink and on the number of roots.
const SHORT_TIMEOUTS: &str = r#"
SINK
[root]
commit_interval = "200ms"
ledger_interval = "1s"
idle_timeout = "10s"
close_delay = "2s"
ROOT
[forward]
backoff = { initial = "50ms", max = "1s" }
"#;

const SHORT_AGENT_TIMEOUTS: &str = r#"
refresh_interval = "500ms"
backoff = { initial = "50ms", max = "1s" }
"#;

impl Cluster {
    pub(super) fn write_config(&self) -> Result<()> {
        let folder = self.folder();
        for name in ["logs", "state", "out", "sink"] {
            fs::create_dir_all(folder.join(name))?;
        }
        fs::write(folder.join("topology.toml"), self.topology())?;
        for (role, node) in &self.nodes {
            let text = match role {
                Role::Agent(number) => {
                    fs::create_dir_all(self.log_dir(*number))?;
                    self.agent_config(*number, node.port)
                }
                _ => self.aggregator_config(*role, node.port),
            };
            fs::write(&node.config, text)?;
        }
        Ok(())
    }

    pub(super) fn topology(&self) -> String {
        let ClusterOptions { category, bucket, codec, roll_size, topology_lines, .. } = &self.options;
        let lanes = self.lanes.get();
        let tables = self.options.tables.clone().unwrap_or_else(|| {
            let local = matches!(self.options.sink, Sink::Local);
            // On HDFS the default is a minute, which each restart would have to be waited for.
            let mut root = self.options.root_lines.clone();
            if !local {
                root += "settle = \"1s\"\n";
            }
            let mut sink = String::new();
            if self.options.roots > 1 {
                // A sleeping owner is waited for in every test, so for as short as one slow call allows.
                let (call, takeover) = if local { ("1500ms", "4s") } else { ("4s", "9s") };
                let _ = write!(sink, "call_timeout = \"{call}\"");
                let _ = write!(root, "takeover_after = \"{takeover}\"");
            }
            SHORT_TIMEOUTS.replace("SINK", &sink).replace("ROOT", &root)
        });
        let sink = self.sink_uri();
        let mut text = format!(
            "[cluster]\nname = \"test\"\nlanes = {lanes}\n[sink]\nuri = \"{sink}\"\n{tables}\n{topology_lines}\n\
             [category.{category}]\nbucket = \"{bucket}\"\ncodec = \"{codec}\"\n\
             roll_size = \"{roll_size}\"\n"
        );
        let above_edges = if self.options.mids > 0 { "mid" } else { "root" };
        let mut tier = |name: &str, parent: Option<&str>, roles: Vec<Role>| {
            // Writing to a String can't fail.
            let _ = writeln!(text, "[[tier]]\nname = \"{name}\"");
            if let Some(parent) = parent {
                let _ = writeln!(text, "parent = \"{parent}\"");
            }
            for role in roles {
                let port = self.nodes[&role].outer_port();
                let _ = writeln!(text, "[[tier.node]]\nname = \"{role}\"\naddress = \"127.0.0.1:{port}\"");
            }
        };
        tier("edge", Some(above_edges), (0..self.options.edges).map(Role::Edge).collect());
        if self.options.mids > 0 {
            tier("mid", Some("root"), (0..self.options.mids).map(Role::Mid).collect());
        }
        tier("root", None, (0..self.options.roots).map(Role::Root).collect());
        text
    }

    fn aggregator_config(&self, role: Role, port: u16) -> String {
        let state = self.state_dir(role);
        format!(
            "name = \"{role}\"\ntopology = \"topology.toml\"\nlisten = \"127.0.0.1:{port}\"\ndata_dir = \"{}\"\n\
             [log]\nformat = \"text\"\n",
            state.display()
        )
    }

    fn agent_config(&self, number: usize, port: u16) -> String {
        let ClusterOptions { category, include, exclude, agent_lines, tables, .. } = &self.options;
        // Each agent begins with another edge.
        let endpoints: Vec<String> = (0..self.options.edges)
            .map(|n| self.nodes[&Role::Edge((n + number) % self.options.edges)].outer_port())
            .map(|port| format!("\"http://127.0.0.1:{port}\""))
            .collect();
        let endpoints = if self.options.edges_by_tier {
            "topology = \"topology.toml\"\ntier = \"edge\"".to_owned()
        } else {
            format!("endpoints = [{}]", endpoints.join(", "))
        };
        let logs = self.log_dir(number);
        let (logs, state) = (logs.display(), self.state_dir(Role::Agent(number)));
        let (short, agent) = (tables.is_none(), &self.agent_ids[number]);
        let top = if short { SHORT_AGENT_TIMEOUTS } else { "" };
        let (batch, source) = if short {
            ("[batch]\ntimeout = \"200ms\"\n", "rotate_wait = \"1s\"\npartial_line_timeout = \"2s\"\n")
        } else {
            ("", "")
        };
        format!(
            "{endpoints}\nagent_id = \"{agent}\"\nhost = \"web-{number}\"\ndata_dir = \"{}\"\n\
             {top}{agent_lines}\n\
             [http]\nlisten = \"127.0.0.1:{port}\"\n[log]\nformat = \"text\"\n{batch}\
             [[source]]\ncategory = \"{category}\"\ninclude = [\"{logs}/{include}\"]\nexclude = [\"{logs}/{exclude}\"]\n{source}\
             [source.timestamp]\nformat = \"{TIME_FORMAT}\"\nafter = \"{TIME_AFTER}\"\n",
            state.display()
        )
    }
}
