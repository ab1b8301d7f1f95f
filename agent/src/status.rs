//! What an operator is shown: which files, how far each is, and why it waits.

use std::fmt::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tributary_common::ids::{AgentId, CategoryName, StreamId};

/// Where it is served.
pub const STATUS_PATH: &str = "/status";

/// The whole agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its program's version.
    pub version: String,
    /// The agent.
    pub agent: AgentId,
    /// Its host name.
    pub host: String,
    /// Where it sends to.
    pub endpoint: String,
    /// Why it can't do its work as it should: the endpoint doesn't answer, checkpoints can't be written.
    pub troubles: Vec<String>,
    /// Bytes read, and being packed or sent.
    pub buffered_bytes: u64,
    /// Bytes in files that are not committed.
    pub lag_bytes: u64,
    /// Bytes of deleted files that are held open until they are committed.
    pub held_bytes: u64,
    /// The open files. Those that were committed to their ends may be closed until they grow.
    pub files: Vec<FileStatus>,
    /// Files and directories that are not open, although they should be.
    pub unshipped: Vec<Unshipped>,
}

/// Something that is not shipped now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unshipped {
    /// Where it is.
    pub path: PathBuf,
    /// Why not, and what to do.
    pub reason: String,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStatus {
    /// Where it was seen last.
    pub path: PathBuf,
    /// Its category.
    pub category: CategoryName,
    /// Its stream, once it has one.
    pub stream: Option<StreamId>,
    /// Bytes in it.
    pub size: u64,
    /// Bytes read of it.
    pub read: u64,
    /// Bytes that upstream has.
    pub next: u64,
    /// Bytes that are durable.
    pub committed: u64,
    /// Bytes of it that are held on the disk although it was deleted.
    pub held: u64,
    /// Bytes that are not durable.
    pub lag: u64,
    /// How long the first of these has been waiting, in seconds.
    pub lag_seconds: u64,
    /// Whether it was rotated away.
    pub rotated: bool,
    /// Whether it was deleted, and is held open.
    pub deleted: bool,
    /// What it does.
    pub state: String,
    /// Why it waits, if it does.
    pub waiting: Option<String>,
}

impl Status {
    /// As a text for people.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text =
            format!("agent {} on {} (version {}) sends to {}\n", self.agent, self.host, self.version, self.endpoint);
        for trouble in &self.troubles {
            let _ = writeln!(text, "trouble: {trouble}");
        }
        let _ = writeln!(
            text,
            "{} files, {} bytes not committed, {} bytes of deleted files held, {} bytes in memory",
            self.files.len(),
            self.lag_bytes,
            self.held_bytes,
            self.buffered_bytes
        );
        for file in &self.files {
            let marks = match (file.deleted, file.rotated) {
                (true, _) => " (deleted)",
                (false, true) => " (rotated)",
                (false, false) => "",
            };
            let _ = writeln!(
                text,
                "\n{}{marks}\n  {}: size {}, read {}, next {}, committed {}, held {}, lag {} bytes, {} s\n  {}",
                file.path.display(),
                file.category,
                file.size,
                file.read,
                file.next,
                file.committed,
                file.held,
                file.lag,
                file.lag_seconds,
                file.state
            );
            if let Some(waiting) = &file.waiting {
                let _ = writeln!(text, "  waits: {waiting}");
            }
        }
        for Unshipped { path, reason } in &self.unshipped {
            let _ = writeln!(text, "\n{} (not shipped)\n  {reason}", path.display());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_waits_says_why() {
        let status = Status {
            version: "1".into(),
            agent: "web-1".parse().expect("valid"),
            host: "web-1".into(),
            endpoint: "http://edge:1".into(),
            troubles: vec!["it is down".into()],
            buffered_bytes: 0,
            lag_bytes: 7,
            held_bytes: 0,
            unshipped: vec![Unshipped { path: "/var/log/b.log".into(), reason: "no permission".into() }],
            files: vec![FileStatus {
                path: "/var/log/a.log".into(),
                category: "app".parse().expect("valid"),
                stream: None,
                size: 10,
                read: 5,
                next: 4,
                committed: 3,
                held: 0,
                lag: 7,
                lag_seconds: 12,
                rotated: true,
                deleted: false,
                state: "following".into(),
                waiting: Some("because".into()),
            }],
        };
        let text = status.to_text();
        for part in [
            "trouble: it is down",
            "/var/log/a.log (rotated)",
            "lag 7 bytes, 12 s",
            "waits: because",
            "/var/log/b.log (not shipped)\n  no permission",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
