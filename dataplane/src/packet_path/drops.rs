//! Packets that went nowhere, counted by reason and thread.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::packet::Malformed;

/// Why a packet was dropped. The name is its label in `sluice_drops_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drop {
    /// It is no packet.
    Malformed(Malformed),
    /// A fragment without ports whose first one is not known, or is translated as a whole or not at all (SCTP).
    Fragment,
    /// A rule says so: source range, no local endpoint, unallocated address of a Service range.
    Rule,
    /// A RST, or an ICMP error, that belongs to no flow.
    NoFlow,
    /// The flow table is full.
    TableFull,
    /// Every masquerade port towards the endpoint is in use.
    NoPort,
    /// The node has no address of the family to masquerade with.
    NoMasqueradeAddress,
    /// The endpoints that were tried are frontends of ours.
    Loop,
    /// It belongs to a flow whose endpoint is gone, and asks for no answer.
    EndpointGone,
    /// No routing table is there yet: the client is to try again.
    NoTable,
    /// The kernel did not take the packet back.
    Write,
}

const COUNT: usize = 15;

impl Drop {
    /// Every reason.
    pub const ALL: [Self; COUNT] = [
        Self::Malformed(Malformed::Version),
        Self::Malformed(Malformed::IpHeader),
        Self::Malformed(Malformed::IpLength),
        Self::Malformed(Malformed::Transport),
        Self::Malformed(Malformed::Address),
        Self::Fragment,
        Self::Rule,
        Self::NoFlow,
        Self::TableFull,
        Self::NoPort,
        Self::NoMasqueradeAddress,
        Self::Loop,
        Self::EndpointGone,
        Self::NoTable,
        Self::Write,
    ];

    /// Name as metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Malformed(reason) => reason.label(),
            Self::Fragment => "fragment",
            Self::Rule => "rule",
            Self::NoFlow => "no_flow",
            Self::TableFull => "flow_table_full",
            Self::NoPort => "no_masquerade_port",
            Self::NoMasqueradeAddress => "no_masquerade_address",
            Self::Loop => "loop",
            Self::EndpointGone => "endpoint_gone",
            Self::NoTable => "no_table",
            Self::Write => "write",
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Malformed(reason) => reason as usize,
            Self::Fragment => 5,
            Self::Rule => 6,
            Self::NoFlow => 7,
            Self::TableFull => 8,
            Self::NoPort => 9,
            Self::NoMasqueradeAddress => 10,
            Self::Loop => 11,
            Self::EndpointGone => 12,
            Self::NoTable => 13,
            Self::Write => 14,
        }
    }
}

/// One thread's counts.
#[derive(Default)]
#[repr(align(64))]
pub struct Drops([AtomicU64; COUNT]);

impl Drops {
    /// Counts one packet.
    pub fn count(&self, reason: Drop) {
        self.0[reason.index()].fetch_add(1, Relaxed);
    }

    /// Packets dropped for this reason.
    pub fn get(&self, reason: Drop) -> u64 {
        self.0[reason.index()].load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::Drop;

    #[test]
    fn each_reason_has_its_own_cell() {
        for (index, reason) in Drop::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), index, "{reason:?}");
        }
    }
}
