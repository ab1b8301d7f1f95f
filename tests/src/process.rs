//! Child processes that never outlive the test run.
//!
//! Each child leads a process group of its own and asks the kernel for a signal at its parent's death (`setpriv --pdeathsig`), so a
//! test run that is killed leaves nothing behind. The kernel means the parent *thread*: were a child started by a test's thread,
//! it would die with that test, and a cluster that several tests share with it. So one thread, which lives as long as the
//! process, starts all of them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::parts::Parts;

struct Order {
    command: Command,
    answer: Sender<io::Result<Child>>,
}

fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    static STARTER: OnceLock<Sender<Order>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (orders, inbox) = channel::<Order>();
        thread::spawn(move || {
            for mut order in inbox {
                // Nobody waits for the answer only when the asking thread has panicked.
                let _ = order.answer.send(order.command.spawn());
            }
        });
        orders
    });
    let (answer, child) = channel();
    let gone = || io::Error::other("the thread that starts processes is gone");
    starter.send(Order { command, answer }).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}

/// What a process gets when the test run dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtParentDeath {
    /// SIGKILL: for a process without children.
    Kill,
    /// SIGTERM: for a process that must end its own children.
    Terminate,
}

/// A running child with its log. Dropping it kills its whole process group.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid: Pid,
    log: PathBuf,
}

impl Process {
    /// Starts `program`; what it prints goes to the file `log`, which is made anew.
    ///
    /// # Errors
    /// The log can't be made or the program can't be started.
    pub fn spawn(
        program: impl AsRef<OsStr>,
        at_parent_death: AtParentDeath,
        log: impl Into<PathBuf>,
        configure: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;

        let log = log.into();
        let program = program.as_ref();
        let name = Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned();
        let output = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let mut command = Command::new(Parts::command("setpriv")?);
        let signal = match at_parent_death {
            AtParentDeath::Kill => "KILL",
            AtParentDeath::Terminate => "TERM",
        };
        command.args(["--pdeathsig", signal, "--"]).arg(program);
        configure(&mut command);
        command.process_group(0).stdin(Stdio::null());
        command.stdout(output.try_clone().context("sharing the log's descriptor")?).stderr(output);
        let child = spawn_from_lasting_thread(command).with_context(|| format!("starting {name}"))?;
        let pid = Pid::from_child(&child);
        Ok(Self { name, child, pid, log })
    }

    /// The process id; `setpriv` becomes the program, so it is the program's own.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Sends a signal to the process itself, not to its children.
    ///
    /// # Errors
    /// The kernel refuses, for instance because it has ended and been waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid, signal).with_context(|| format!("sending {signal:?} to {} ({})", self.name, self.id()))
    }

    /// SIGKILL to the whole group, and waits until the process is gone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        // Not yet waited for, so the id can't belong to somebody else; a group that has ended by itself is fine.
        if self.try_wait()?.is_none() {
            kill_process_group(self.pid, Signal::KILL)
                .with_context(|| format!("killing {} ({})", self.name, self.id()))?;
        }
        self.wait()
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().with_context(|| format!("waiting for the end of {}", self.name))
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("looking whether {} runs", self.name))
    }

    /// The last lines of its log, for an error message.
    #[must_use]
    pub fn log_tail(&self) -> String {
        log_tail(&self.log)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A process that is already gone is what is wanted, and a panic here would hide the test's own.
        let _ = self.kill();
    }
}

/// The last lines of a log file, for an error message.
pub(crate) fn log_tail(log: &Path) -> String {
    const LINES: usize = 30;
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(folder: &Path) -> Process {
        Process::spawn("sleep", AtParentDeath::Kill, folder.join("log"), |command| {
            command.arg("600");
        })
        .expect("sleep starts")
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_owned();
        let mut child = thread::spawn(move || sleeper(&path)).join().expect("the thread ends");
        assert_eq!(child.try_wait().expect("a look"), None);
        child.kill().expect("killed");
    }

    #[test]
    fn dropping_it_ends_the_child() {
        let folder = tempfile::tempdir().expect("a folder");
        let child = sleeper(folder.path());
        let pid = child.pid;
        drop(child);
        assert!(rustix::process::test_kill_process(pid).is_err());
    }
}
