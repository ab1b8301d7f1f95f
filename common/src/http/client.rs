//! The HTTP client of the agent and of every aggregator that isn't a root.

use std::time::Duration;

/// How long a connection that nobody uses is kept. Shorter than a server waits for the next request by default, so that
/// it is rarely the server that closes it, just while a request is on its way.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// After so long without a byte, the system asks whether the other side still lives.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// What a client waits for.
#[derive(Debug, Clone, Copy)]
pub struct ClientOptions {
    /// For a connection.
    pub connect_timeout: Duration,
    /// For a whole request, from connecting to the last byte of the response.
    pub request_timeout: Duration,
    /// Connections kept per server while nobody uses them.
    pub max_idle_connections: usize,
}

/// A client that follows no redirects (an answer from another server than the one that was chosen would be believed
/// otherwise), takes no proxy from the environment, does not retry by itself, and waits for nothing for ever.
///
/// # Errors
/// When the system's TLS or name resolution can't be set up.
pub fn build(options: &ClientOptions) -> Result<reqwest::Client, reqwest::Error> {
    reqwest::Client::builder()
        .user_agent(concat!("tributary/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .no_proxy()
        .http1_only()
        .connect_timeout(options.connect_timeout)
        .timeout(options.request_timeout)
        .pool_idle_timeout(POOL_IDLE_TIMEOUT)
        .pool_max_idle_per_host(options.max_idle_connections)
        .tcp_nodelay(true)
        .tcp_keepalive(KEEPALIVE)
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn it_follows_no_redirect_and_gives_up_a_silent_server() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        let server = tokio::spawn(async move {
            let (mut redirecting, _) = listener.accept().await.expect("a connection");
            let mut head = [0; 4096];
            let _ = redirecting.read(&mut head).await.expect("a request");
            let answer = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            redirecting.write_all(answer).await.expect("written");
            let (silent, _) = listener.accept().await.expect("a connection");
            silent
        });
        let options = ClientOptions {
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_millis(500),
            max_idle_connections: 1,
        };
        let client = build(&options).expect("a client");
        let patient = client.get(&url).timeout(Duration::from_secs(60)).send().await.expect("an answer");
        assert_eq!(patient.status().as_u16(), 307);
        let error = client.get(&url).send().await.expect_err("nobody answers");
        assert!(error.is_timeout(), "{error:?}");
        drop(server.await.expect("no panic"));
    }
}
