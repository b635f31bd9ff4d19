//! Names: the DNS zone of a cluster as an immutable snapshot, the answers that follow from it, and the responder that
//! gives them to clients.
//!
//! Resolution hands over plain [`spec`]s; [`ZoneBuilder`] keeps them compiled, Service by Service, and hands out
//! [`Zone`]s, which share all that did not change. A question is a few lookups in one.

mod answer;
mod labels;
mod message;
mod service;
pub mod spec;
mod zone;

pub use answer::{Answer, Question, Record, Resolution};
pub use message::{Owner, Refusal, Request, Transport, encode, read};
pub use spec::{NamedEndpoint, NamedPort, NamedService, PodNames, Stands, ZoneSpec};
pub use zone::{Zone, ZoneBuilder};

/// Types of the wire format that answers are made of.
pub use hickory_proto as proto;
