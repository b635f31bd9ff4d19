//! Applies a translation: addresses, ports and checksums change, not one other bit.

use crate::flow::Address;
use crate::net::Family;
use crate::packet::checksum::{self, Change};
use crate::packet::view::{Packet, Transport};

/// New addresses and ports of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// New source address.
    pub source: Address,
    /// New source port.
    pub source_port: u16,
    /// New destination address.
    pub destination: Address,
    /// New destination port.
    pub destination_port: u16,
}

/// Offset of a transport's checksum in its header (RFC 9293 §3.1, RFC 768).
pub(crate) const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
/// Offset of the SCTP checksum, a CRC32c over the whole packet (RFC 9260 §3.1).
const SCTP_CHECKSUM: usize = 8;

/// Rewrites a packet in place. `partial`: the transport checksum is a pseudo-header sum, to which ports do not belong.
///
/// `packet` must be the view of these very bytes, in the family of the translation.
pub fn rewrite(bytes: &mut [u8], packet: &Packet, partial: bool, to: &Translation) {
    let addresses = write_addresses(bytes, packet, to);
    if packet.transport == Transport::Fragment {
        // The first has the ports, and the checksum of the whole.
        return;
    }
    let at = packet.transport_at;
    let ports = write_ports(bytes, packet, to);
    match packet.transport {
        Transport::Tcp(_) => update(bytes, at + TCP_CHECKSUM, partial, addresses, ports),
        Transport::Udp => {
            let field = at + UDP_CHECKSUM;
            // RFC 768: zero says that the sender computed none.
            if partial || bytes[field..field + 2] != [0, 0] {
                update(bytes, field, partial, addresses, ports);
                if !partial && bytes[field..field + 2] == [0, 0] {
                    bytes[field..field + 2].fill(0xff);
                }
            }
        }
        Transport::Sctp => sctp_checksum(&mut bytes[at..packet.length]),
        Transport::Icmp(_) | Transport::Fragment | Transport::Other => {}
    }
}

/// Rewrites the addresses and, in IPv4, the header checksum. Returns what changed for the transport's pseudo-header.
pub(super) fn write_addresses(bytes: &mut [u8], packet: &Packet, to: &Translation) -> Change {
    let mut change = Change::default();
    let (at, size) = match packet.family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    };
    let mut replace = |at: usize, old: Address, new: Address| {
        if old != new {
            let new = new.bytes();
            let new = &new[16 - size..];
            change.replace(&bytes[at..at + size], new);
            bytes[at..at + size].copy_from_slice(new);
        }
    };
    replace(at, packet.source, to.source);
    replace(at + size, packet.destination, to.destination);
    if packet.family == Family::V4 {
        checksum::update(bytes, 10, change);
    }
    change
}

fn write_ports(bytes: &mut [u8], packet: &Packet, to: &Translation) -> Change {
    let mut change = Change::default();
    let at = packet.transport_at;
    for (at, old, new) in
        [(at, packet.source_port, to.source_port), (at + 2, packet.destination_port, to.destination_port)]
    {
        if old != new {
            change.replace_word(old, new);
            bytes[at..at + 2].copy_from_slice(&new.to_be_bytes());
        }
    }
    change
}

fn update(bytes: &mut [u8], at: usize, partial: bool, addresses: Change, ports: Change) {
    let old = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let new = if partial { addresses.apply_partial(old) } else { addresses.and(ports).apply(old) };
    bytes[at..at + 2].copy_from_slice(&new.to_be_bytes());
}

fn sctp_checksum(sctp: &mut [u8]) {
    sctp[SCTP_CHECKSUM..SCTP_CHECKSUM + 4].fill(0);
    let crc = crc32c::crc32c(sctp);
    sctp[SCTP_CHECKSUM..SCTP_CHECKSUM + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Rewrites the packet that an ICMP error quotes, as far as it is there: addresses, ports and, when it was not cut off,
/// the transport checksum.
pub(super) fn rewrite_quoted(bytes: &mut [u8], quoted: &Packet, to: &Translation) {
    let change = write_addresses(bytes, quoted, to).and(write_ports(bytes, quoted, to));
    let field = match quoted.transport {
        Transport::Tcp(_) => TCP_CHECKSUM,
        Transport::Udp => UDP_CHECKSUM,
        Transport::Sctp | Transport::Icmp(_) | Transport::Fragment | Transport::Other => return,
    };
    let at = quoted.transport_at + field;
    let none = quoted.transport == Transport::Udp && bytes.get(at..at + 2) == Some(&[0, 0]);
    if bytes.len() >= at + 2 && !none {
        checksum::update(bytes, at, change);
    }
}
