//! A proxy that does to connections what networks do: cuts them, lets them hang, delays, closes one half.
//!
//! ```no_run
//! # async fn f() -> anyhow::Result<()> {
//! use tributary_tests::proxy::{Fault, Proxy};
//!
//! let proxy = Proxy::start(7700).await?;
//! println!("connect to 127.0.0.1:{}", proxy.port());
//! proxy.set(Fault::CutAfter(10_000));
//! # Ok(()) }
//! ```

use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Bytes that pass at a time.
const PIECE: usize = 8 << 10;

/// What is done to all connections, those that are open and new ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Each piece of at most 8 KiB is this late.
    Delay(Duration),
    /// They are closed, and so are new ones.
    Cut,
    /// Each is closed when the client has sent so many bytes.
    CutAfter(u64),
    /// They stay open, and nothing passes.
    Hang,
    /// What the client sends passes; of the answers it sees the end.
    HalfClose,
}

/// A running proxy on a port of its own. Dropping it closes all its connections.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    fault: watch::Sender<Fault>,
    task: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.set(Fault::Cut);
    }
}

impl Proxy {
    /// A proxy in front of a port of this machine, where nobody has to listen yet.
    ///
    /// # Errors
    /// There is no port for it.
    pub async fn start(to: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("binding a proxy's port")?;
        let port = listener.local_addr()?.port();
        let (fault, seen) = watch::channel(Fault::None);
        let task = tokio::spawn(async move {
            loop {
                // Out of descriptors: they come back when connections end.
                let Ok((client, _)) = listener.accept().await else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                if *seen.borrow() != Fault::Cut {
                    tokio::spawn(serve(client, to, seen.clone()));
                }
            }
        });
        Ok(Self { port, fault, task })
    }

    /// Where to connect to.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Does this to all connections from now on.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

async fn serve(client: TcpStream, to: u16, fault: watch::Receiver<Fault>) {
    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await else { return };
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let forth = copy(from_client, to_server, fault.clone(), true);
    let back = copy(from_server, to_client, fault, false);
    // An error of one direction ends both; an orderly end of one leaves the other.
    let _ = tokio::try_join!(forth, back);
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut fault: watch::Receiver<Fault>,
    forth: bool,
) -> io::Result<()> {
    let cut = || io::Error::from(io::ErrorKind::ConnectionReset);
    let (mut piece, mut passed) = (vec![0; PIECE], 0_u64);
    let mut halved = false;
    loop {
        let now = *fault.borrow_and_update();
        match now {
            Fault::Cut => return Err(cut()),
            Fault::CutAfter(bytes) if forth && passed >= bytes => return Err(cut()),
            Fault::Hang => {
                fault.changed().await.map_err(|_| cut())?;
                continue;
            }
            Fault::HalfClose if !forth && !halved => {
                halved = true;
                to.shutdown().await?;
            }
            _ => {}
        }
        let count = tokio::select! {
            changed = fault.changed() => {
                changed.map_err(|_| cut())?;
                continue;
            }
            count = from.read(&mut piece) => count?,
        };
        if count == 0 {
            return if halved { Ok(()) } else { to.shutdown().await };
        }
        if let Fault::Delay(pause) = now {
            tokio::time::sleep(pause).await;
        }
        if !halved {
            to.write_all(&piece[..count]).await?;
        }
        passed += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers each connection's bytes with the same.
    async fn echo() -> Result<u16> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        Ok(port)
    }

    async fn exchange(stream: &mut TcpStream) -> io::Result<[u8; 4]> {
        let mut answer = [0; 4];
        stream.write_all(b"ping").await?;
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn passes_cuts_hangs_and_closes_one_half() -> Result<()> {
        let proxy = Proxy::start(echo().await?).await?;
        let connect = async || TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).await;
        let mut stream = connect().await?;
        assert_eq!(&exchange(&mut stream).await?, b"ping");

        proxy.set(Fault::Delay(Duration::from_millis(1)));
        assert_eq!(&exchange(&mut stream).await?, b"ping");

        proxy.set(Fault::Hang);
        let hung = tokio::time::timeout(Duration::from_millis(200), exchange(&mut stream)).await;
        assert!(hung.is_err(), "nothing passes");
        proxy.set(Fault::None);
        let mut late = [0; 4];
        stream.read_exact(&mut late).await?;

        proxy.set(Fault::HalfClose);
        assert_eq!(stream.read(&mut [0; 1]).await?, 0, "the answers have an end");

        proxy.set(Fault::Cut);
        assert!(exchange(&mut connect().await?).await.is_err());
        proxy.set(Fault::CutAfter(4));
        let mut stream = connect().await?;
        stream.write_all(b"ping").await?;
        let mut rest = Vec::new();
        // Closed, whether or not the answer was on its way already.
        let _ = stream.read_to_end(&mut rest).await;
        assert!(exchange(&mut stream).await.is_err());
        Ok(())
    }
}
