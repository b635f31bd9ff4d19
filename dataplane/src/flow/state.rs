//! States of a flow, what moves it between them, and how long it may be silent in each.

use std::time::Duration;

use crate::net::Direction;
use crate::packet::view::Tcp;

/// State of a flow. UDP and SCTP use unreplied and replied, TCP the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// The client's SYN went to the endpoint; the handshake is not finished.
    Opening = 0,
    /// Data may flow.
    Established = 1,
    /// The client has sent its FIN.
    HalfClosedByClient = 2,
    /// The endpoint has sent its FIN.
    HalfClosedByEndpoint = 3,
    /// Both have sent a FIN, or one a RST.
    Closing = 4,
    /// Only the client has sent.
    Unreplied = 5,
    /// Both have sent.
    Replied = 6,
    /// Ended by us: whatever still comes is answered with a RST.
    Reset = 7,
}

impl State {
    const ALL: [Self; 8] = [
        Self::Opening,
        Self::Established,
        Self::HalfClosedByClient,
        Self::HalfClosedByEndpoint,
        Self::Closing,
        Self::Unreplied,
        Self::Replied,
        Self::Reset,
    ];

    /// The state with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Name in `get flows`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::HalfClosedByClient | Self::HalfClosedByEndpoint => "half-closed",
            Self::Closing => "closing",
            Self::Unreplied => "unreplied",
            Self::Replied => "replied",
            Self::Reset => "reset",
        }
    }

    /// Whether it is a state of UDP and SCTP.
    pub fn is_of_datagrams(self) -> bool {
        matches!(self, Self::Unreplied | Self::Replied)
    }

    /// Whether the flow is over but for its last packets.
    pub fn is_finished(self) -> bool {
        matches!(self, Self::Closing | Self::Reset)
    }

    /// The state after a TCP segment. `expected`: the sequence number that the receiver last asked for, when known; a RST
    /// counts only if it has exactly that one (RFC 5961 §3.2), so that nobody ends a flow of others blindly.
    pub fn after_tcp(self, direction: Direction, tcp: &Tcp, expected: Option<u32>) -> Self {
        if self.is_finished() {
            return self;
        }
        if tcp.rst {
            let believed = self == Self::Opening || expected.is_none_or(|expected| expected == tcp.sequence);
            return if believed { Self::Closing } else { self };
        }
        let opened = match (self, direction) {
            (Self::Opening, Direction::Request) if tcp.ack && !tcp.syn => Self::Established,
            _ => self,
        };
        match (opened, direction, tcp.fin) {
            (Self::Opening | Self::Established, Direction::Request, true) => Self::HalfClosedByClient,
            (Self::Opening | Self::Established, Direction::Reply, true) => Self::HalfClosedByEndpoint,
            (Self::HalfClosedByClient, Direction::Reply, true) => Self::Closing,
            (Self::HalfClosedByEndpoint, Direction::Request, true) => Self::Closing,
            _ => opened,
        }
    }

    /// The state after a datagram.
    pub fn after_datagram(self, direction: Direction) -> Self {
        match (self, direction) {
            (Self::Unreplied, Direction::Reply) => Self::Replied,
            _ => self,
        }
    }
}

/// How long a flow may be silent in each state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Handshake not finished (Linux: `nf_conntrack_tcp_timeout_syn_recv`).
    pub opening: Duration,
    /// Established (kube-proxy: `conntrack.tcpEstablishedTimeout`).
    pub established: Duration,
    /// One FIN seen (kube-proxy: `conntrack.tcpCloseWaitTimeout`).
    pub half_closed: Duration,
    /// Both FINs or a RST seen: long enough for the last acknowledgements.
    pub closing: Duration,
    /// UDP without an answer (Linux: `nf_conntrack_udp_timeout`).
    pub unreplied: Duration,
    /// UDP with answers (Linux: `nf_conntrack_udp_timeout_stream`).
    pub replied: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            opening: Duration::from_secs(60),
            established: Duration::from_secs(24 * 3600),
            half_closed: Duration::from_secs(3600),
            closing: Duration::from_secs(30),
            unreplied: Duration::from_secs(30),
            replied: Duration::from_secs(120),
        }
    }
}

impl Timeouts {
    /// The limit for a state.
    pub fn of(&self, state: State) -> Duration {
        match state {
            State::Opening => self.opening,
            State::Established => self.established,
            State::HalfClosedByClient | State::HalfClosedByEndpoint => self.half_closed,
            State::Closing | State::Reset => self.closing,
            State::Unreplied => self.unreplied,
            State::Replied => self.replied,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Direction::{Reply, Request};

    fn segment(flags: &str) -> Tcp {
        let has = |flag| flags.contains(flag);
        let (syn, ack, fin, rst) = (has('S'), has('A'), has('F'), has('R'));
        Tcp { syn, ack, fin, rst, sequence: 7, acknowledgement: 0, length: 0 }
    }

    #[test]
    fn tcp_life() {
        let rows = [
            (State::Opening, Request, "S", State::Opening),
            (State::Opening, Reply, "SA", State::Opening),
            (State::Opening, Request, "A", State::Established),
            (State::Opening, Reply, "RA", State::Closing),
            (State::Established, Request, "A", State::Established),
            (State::Established, Request, "FA", State::HalfClosedByClient),
            (State::Established, Reply, "FA", State::HalfClosedByEndpoint),
            (State::HalfClosedByClient, Request, "FA", State::HalfClosedByClient),
            (State::HalfClosedByClient, Reply, "A", State::HalfClosedByClient),
            (State::HalfClosedByClient, Reply, "FA", State::Closing),
            (State::HalfClosedByEndpoint, Request, "FA", State::Closing),
            (State::Closing, Request, "A", State::Closing),
            (State::Established, Reply, "R", State::Closing),
        ];
        for (from, direction, flags, to) in rows {
            assert_eq!(from.after_tcp(direction, &segment(flags), Some(7)), to, "{from:?} {direction:?} {flags}");
        }
    }

    #[test]
    fn a_blind_reset_is_not_believed() {
        let established = State::Established;
        assert_eq!(established.after_tcp(Request, &segment("R"), Some(8)), established);
        assert_eq!(established.after_tcp(Request, &segment("R"), None), State::Closing);
    }
}
