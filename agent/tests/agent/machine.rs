//! What of the machine a test has for itself: file systems and processes.

use std::path::{Path, PathBuf};

use crate::support::wait_for;

/// A file system of its own; unmounted in the end.
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// Mounts a file system in memory at `path`. None, and a word about it, where that is not permitted.
    pub(crate) fn in_memory(path: PathBuf, size: &str) -> Option<Self> {
        Self::mount(path, "tmpfs", &format!("size={size}"))
    }

    /// Mounts a file system of this type at `path`. None, and a word about it, where that is not permitted.
    pub(crate) fn mount(path: PathBuf, kind: &str, options: &str) -> Option<Self> {
        std::fs::create_dir_all(&path).expect("made");
        let mut mount = std::process::Command::new("mount");
        match mount.args(["-t", kind, "-o", options, kind]).arg(&path).output() {
            Ok(output) if output.status.success() => Some(Self(path)),
            other => {
                eprintln!("SKIPPED: mounting a {kind} is not permitted here, and this test needs one: {other:?}");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// From now on it can be written to, or not.
    pub(crate) fn writable(&self, writable: bool) {
        let options = if writable { "remount,rw" } else { "remount,ro" };
        let status = std::process::Command::new("mount").args(["-o", options]).arg(&self.0).status();
        assert!(status.expect("mount runs").success(), "{options}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// An agent in a process of its own; killed in the end.
pub(crate) struct AgentProcess {
    child: std::process::Child,
    log: PathBuf,
}

impl AgentProcess {
    pub(crate) fn new(child: std::process::Child, log: PathBuf) -> Self {
        Self { child, log }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends by itself; returns its exit code.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        let mut code = None;
        let child = &mut self.child;
        wait_for(
            || {
                code = child.try_wait().expect("it can be asked");
                code.is_some()
            },
            || "it doesn't end".into(),
        )
        .await;
        code.and_then(|status| status.code())
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).expect("read")
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: &str) {
        let status = std::process::Command::new("kill").arg(format!("-{signal}")).arg(self.pid().to_string()).status();
        assert!(status.expect("kill runs").success());
    }

    /// The most memory that it had at a time, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak.and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
    }

    /// How many of its descriptors are files in this directory.
    pub(crate) fn open_files(&self, directory: &Path) -> usize {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("it runs");
        let files = descriptors.flatten().filter_map(|descriptor| std::fs::read_link(descriptor.path()).ok());
        files.filter(|path| path.parent() == Some(directory)).count()
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
