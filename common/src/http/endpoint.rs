//! Where a server is.

use std::fmt;
use std::str::FromStr;

use http::Uri;
use http::uri::Scheme;

/// The address of a server: `http://host:port`, nothing behind it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(String);

/// A text is not an [`Endpoint`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// Not a URL at all.
    #[error("{0:?} is not an endpoint: write it like http://edge-1:7700")]
    NotAUrl(String),
    /// `https` or something else.
    #[error("the endpoint {0:?} does not begin with http://: no other scheme is supported yet")]
    Scheme(String),
    /// Without a port, 80 would be meant, which it never is.
    #[error("the endpoint {0:?} has no port: write it, as in http://edge-1:7700")]
    NoPort(String),
    /// Paths, queries and user names have no meaning here.
    #[error("the endpoint {0:?} has more than host and port: write only http://host:port")]
    More(String),
}

impl Endpoint {
    /// The endpoint at an address `host:port`.
    ///
    /// # Errors
    /// When that is not a host and a port.
    pub fn at(address: &str) -> Result<Self, EndpointError> {
        format!("http://{address}").parse()
    }

    /// The URL without a slash at its end.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The `host:port` in it.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.0["http://".len()..]
    }

    /// The port in it.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.rsplit(':').next().and_then(|port| port.parse().ok()).expect("an endpoint has a port")
    }

    /// The URL of a path on the server, which begins with a slash.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        debug_assert!(path.starts_with('/'), "{path:?} is not a path");
        format!("{}{path}", self.0)
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let uri: Uri = text.parse().map_err(|_| EndpointError::NotAUrl(text.to_owned()))?;
        match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => {}
            Some(_) => return Err(EndpointError::Scheme(text.to_owned())),
            None => return Err(EndpointError::NotAUrl(text.to_owned())),
        }
        let authority = uri.authority().ok_or_else(|| EndpointError::NotAUrl(text.to_owned()))?;
        if authority.host().is_empty() {
            return Err(EndpointError::NotAUrl(text.to_owned()));
        }
        if authority.as_str().contains('@') || uri.path() != "/" || uri.query().is_some() {
            return Err(EndpointError::More(text.to_owned()));
        }
        match authority.port_u16() {
            Some(port) if port > 0 => Ok(Self(format!("http://{}", authority.as_str().to_ascii_lowercase()))),
            _ => Err(EndpointError::NoPort(text.to_owned())),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_host_and_a_port() {
        for good in ["http://edge-1:7700", "http://10.0.0.1:1", "http://[::1]:7700", "http://Edge:7700/"] {
            let endpoint: Endpoint = good.parse().expect(good);
            assert_eq!(endpoint.as_str(), good.to_lowercase().trim_end_matches('/'));
        }
        let url = Endpoint::at("edge-1:7700").expect("valid").url("/v1/batches");
        assert_eq!(url, "http://edge-1:7700/v1/batches");
    }

    #[test]
    fn what_is_wrong_with_it_is_said() {
        let error = |text: &str| text.parse::<Endpoint>().expect_err(text);
        assert!(matches!(error("edge-1:7700"), EndpointError::Scheme(_) | EndpointError::NotAUrl(_)));
        assert!(matches!(error("https://edge-1:7700"), EndpointError::Scheme(_)));
        assert!(matches!(error("http://edge-1"), EndpointError::NoPort(_)));
        assert!(matches!(error("http://edge-1:0"), EndpointError::NoPort(_)));
        assert!(matches!(error("http://edge-1:7700/v1"), EndpointError::More(_)));
        assert!(matches!(error("http://me@edge-1:7700"), EndpointError::More(_)));
        assert!(matches!(error("http://:7700"), EndpointError::NotAUrl(_)));
        assert!(matches!(error(""), EndpointError::NotAUrl(_)));
    }
}
