//! What happens in the lives of endpoints, for logs and metrics.

use std::time::Duration;

use super::lifecycle::{Cause, Life};
use super::slots::EndpointSlot;

/// Something that happened in an endpoint's life, for logs and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LifeEvent {
    /// The endpoint.
    pub slot: EndpointSlot,
    /// What happened.
    pub change: LifeChange,
    /// Its flows at that moment.
    pub flows: u32,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifeChange {
    /// It is in this phase of its life now.
    Became(Life),
    /// Too many opens failed in a row: no new flows for a while.
    Ejected {
        /// For how long.
        interval: Duration,
    },
    /// It drains, and its last flow has ended.
    Drained {
        /// Since it began to drain.
        after: Duration,
    },
}

impl LifeChange {
    /// The reason in a word, for logs and metrics.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Became(Life::Gone(Cause::Terminated)) => "terminated",
            Self::Became(Life::Gone(Cause::Deadline)) => "deadline",
            Self::Became(life) => life.name(),
            Self::Ejected { .. } => "ejected",
            Self::Drained { .. } => "drained",
        }
    }
}
