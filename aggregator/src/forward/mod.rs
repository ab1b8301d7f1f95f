//! Sending what the spool holds to the tier above.

mod client;
mod route;
mod state;

pub use self::client::{Client, ClientOptions, Failed};
pub use self::route::Trouble;
pub use self::state::{Ask, Effect, Failure, ForwardLimits, Forwarder, Outgoing, Part, RequestId, Runs};
