//! Sending what the spool holds to the tier above.

mod client;
mod state;

pub use self::client::{Client, Failed, Upstream, Way, understand};
pub use self::state::{Ask, Effect, Failure, ForwardLimits, Forwarder, Outgoing, Part, RequestId, Runs};
