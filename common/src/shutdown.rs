//! Stopping by signal: the first asks, the second insists.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::exit::Exit;

/// Watches for SIGTERM and SIGINT (Ctrl-C) from now on. The first one of either cancels the token that is returned; the
/// program then drains and ends by itself. A second one ends the process at once with code 1, whatever it is doing:
/// nothing is lost by that, what was not committed is sent again.
///
/// Must be called in a Tokio runtime.
///
/// # Errors
/// When the system doesn't let us watch.
pub fn on_signal() -> io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        let name = next(&mut terminate, &mut interrupt).await;
        tracing::info!(signal = name, "stopping");
        cancelled.cancel();
        let name = next(&mut terminate, &mut interrupt).await;
        tracing::warn!(signal = name, "stopping at once, without waiting for what is in flight");
        std::process::exit(i32::from(Exit::Failed.code()));
    });
    Ok(token)
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    /// The child of the test below, in a process of its own since it gets signals.
    #[tokio::test]
    #[ignore = "run by the test of both signals"]
    async fn child() {
        let token = on_signal().expect("signals can be watched");
        eprintln!("child: watching");
        token.cancelled().await;
        eprintln!("child: draining");
        std::future::pending::<()>().await;
    }

    #[test]
    fn the_first_signal_asks_and_the_second_ends_the_process() {
        let mut child = Command::new(std::env::current_exe().expect("this test's program"))
            .args(["--exact", "--ignored", "--nocapture", "shutdown::tests::child"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a child");
        let pid = rustix::process::Pid::from_child(&child);
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let mut wait_for = |wanted: &str| {
            lines.by_ref().map_while(Result::ok).find(|line| line.contains(wanted)).expect("the child says it")
        };
        wait_for("child: watching");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("sent");
        wait_for("child: draining");
        assert!(child.try_wait().expect("our child").is_none(), "it drains");
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("sent");
        assert_eq!(child.wait().expect("our child").code(), Some(1));
    }
}
