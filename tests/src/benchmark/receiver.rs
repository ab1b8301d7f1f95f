//! The least that a server with durable answers does: it reads each body, checks a CRC-32C, writes it to a file, syncs, answers.
//! Aggregators are measured beside it.

use std::fs::File;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::mpsc;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use http::{HeaderName, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// The header with the CRC-32C of the body, in decimal digits.
pub const CRC_HEADER: HeaderName = HeaderName::from_static("body-crc");

type Write = (Bytes, oneshot::Sender<()>);

/// When the file is synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Syncs {
    /// For each body: what a server does that nobody has made faster.
    Each,
    /// Once for all bodies that came while the file was synced before, as the aggregators do it.
    Together,
}

/// Serves until the process is ended. Writes its port, as a line, to `port_file`, and all bodies to `output`.
///
/// # Errors
/// The files can't be made, or the system gives no port.
pub async fn serve(port_file: &Path, output: &Path, syncs: Syncs) -> Result<()> {
    let file = File::create(output).with_context(|| format!("making {}", output.display()))?;
    let (queue, writes) = mpsc::channel();
    std::thread::spawn(move || write_all(file, &writes, syncs));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("listening")?;
    let unfinished = port_file.with_extension("part");
    std::fs::write(&unfinished, listener.local_addr()?.port().to_string())?;
    std::fs::rename(&unfinished, port_file)?;
    loop {
        let (stream, _) = listener.accept().await.context("accepting")?;
        stream.set_nodelay(true)?;
        let queue = queue.clone();
        let service = service_fn(move |request| take(request, queue.clone()));
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

async fn take(request: Request<Incoming>, queue: mpsc::Sender<Write>) -> Result<Response<Full<Bytes>>> {
    let wanted: u32 = request.headers().get(CRC_HEADER).context("no CRC")?.to_str()?.parse()?;
    let mut body = request.into_body();
    let mut bytes = BytesMut::new();
    while let Some(piece) = body.frame().await {
        if let Some(data) = piece?.data_ref() {
            bytes.extend_from_slice(data);
        }
    }
    let mut response = Response::new(Full::default());
    if crc32c::crc32c(&bytes) == wanted {
        let (done, written) = oneshot::channel();
        queue.send((bytes.freeze(), done)).context("the writer ended")?;
        written.await.context("the body was not written")?;
    } else {
        *response.status_mut() = StatusCode::BAD_REQUEST;
    }
    Ok(response)
}

/// Returns, which ends all requests, when the file can't be written.
fn write_all(mut file: File, writes: &mpsc::Receiver<Write>, syncs: Syncs) {
    while let Ok(first) = writes.recv() {
        let mut group = vec![first];
        if syncs == Syncs::Together {
            group.extend(writes.try_iter());
        }
        let written = group.iter().try_for_each(|(body, _)| file.write_all(body));
        if written.and_then(|()| file.sync_data()).is_err() {
            return;
        }
        for (_, done) in group {
            // Nobody may wait for it any more.
            let _ = done.send(());
        }
    }
}
