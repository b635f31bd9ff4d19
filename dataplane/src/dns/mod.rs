//! Names: the DNS zone of a cluster as an immutable snapshot, the answers that follow from it, and the responder that
//! gives them to clients.
//!
//! Resolution hands over plain [`spec`]s; [`ZoneBuilder`] keeps them compiled, Service by Service, and hands out
//! [`Zone`]s, which share all that did not change. A question is a few lookups in one.

mod answer;
mod answerer;
mod find;
mod labels;
mod message;
mod quick;
mod server;
mod service;
pub mod spec;
pub mod stats;
mod zone;

#[cfg(test)]
pub(crate) mod tests;

pub use answer::{Answer, Question, Record, Resolution};
pub use answerer::{Answerer, Failure, Told, Upstream};
pub use message::{LARGEST_DATAGRAM, Owner, Refusal, Request, Transport, encode, read};
pub use server::{Server, ServerSettings};
pub use spec::{NamedEndpoint, NamedPort, NamedService, PodNames, Stands, ZoneSpec};
pub use stats::Source;
pub use zone::{Zone, ZoneBuilder};
