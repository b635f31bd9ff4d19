//! Packets of our own: the RST and the ICMP errors that refuse a flow, and datagrams that answer one.

use etherparse::{IpNumber, Ipv4Header, Ipv6Header, TcpHeader};

use crate::flow::{Address, FlowKey, Reset};
use crate::net::{Family, Protocol};
use crate::packet::checksum::{fold, sum};
use crate::packet::view::{Packet, Tcp};

/// Hop limit of what we send ourselves (RFC 1700's default).
const TTL: u8 = 64;
/// Most of an ICMP error: RFC 1812 §4.3.2.3 for IPv4, the minimum MTU for IPv6 (RFC 4443 §2.4).
const ICMP_V4_LIMIT: usize = 576;
const ICMP_V6_LIMIT: usize = 1280;

/// Bytes of a UDP header.
const UDP: usize = 8;

/// Bytes that any answer fits in.
pub const LIMIT: usize = ICMP_V6_LIMIT;

/// Writes the RST that answers `packet` (RFC 9293 §3.10.7.1) as if its destination had sent it. Returns the length.
///
/// The caller answers no RST with it.
pub fn answering_reset(packet: &Packet, tcp: &Tcp, out: &mut [u8]) -> usize {
    let key = packet.key(Protocol::Tcp).reversed();
    if tcp.ack {
        write_reset(&key, tcp.acknowledgement, None, out)
    } else {
        write_reset(&key, 0, Some(tcp.sequence.wrapping_add(tcp.length)), out)
    }
}

/// Writes a RST for one end of a flow. Returns the length.
///
/// It carries an acknowledgement number too: an end that has got no answer yet believes nothing else (RFC 9293 §3.10.7.3).
pub fn reset(reset: &Reset, out: &mut [u8]) -> usize {
    write_reset(&reset.key, reset.sequence, Some(reset.acknowledgement), out)
}

fn write_reset(key: &FlowKey, sequence: u32, acknowledgement: Option<u32>, out: &mut [u8]) -> usize {
    let mut header = TcpHeader::new(key.source_port, key.destination_port, sequence, 0);
    header.rst = true;
    header.ack = acknowledgement.is_some();
    header.acknowledgment_number = acknowledgement.unwrap_or(0);
    let at = ip_header(key.source, key.destination, IpNumber::TCP, TcpHeader::MIN_LEN, out);
    out[at..at + TcpHeader::MIN_LEN].copy_from_slice(&header.to_bytes());
    let checksum = transport_checksum(key.source, key.destination, IpNumber::TCP, &out[at..at + TcpHeader::MIN_LEN]);
    out[at + 16..at + 18].copy_from_slice(&checksum.to_be_bytes());
    at + TcpHeader::MIN_LEN
}

/// Writes "port unreachable" about `packet` (RFC 792; RFC 4443 §3.1) as if its destination had sent it. Returns the
/// length.
pub fn port_unreachable(bytes: &[u8], packet: &Packet, out: &mut [u8]) -> usize {
    let (number, header, limit) = match packet.family {
        Family::V4 => (IpNumber::ICMP, [3, 3], ICMP_V4_LIMIT - 20 - 8),
        Family::V6 => (IpNumber::IPV6_ICMP, [1, 4], ICMP_V6_LIMIT - 40 - 8),
    };
    let quote = &bytes[..packet.length.min(limit)];
    let at = ip_header(packet.destination, packet.source, number, 8 + quote.len(), out);
    let icmp = &mut out[at..at + 8 + quote.len()];
    icmp[..8].fill(0);
    icmp[..2].copy_from_slice(&header);
    icmp[8..].copy_from_slice(quote);
    let checksum = match packet.family {
        Family::V4 => !fold(sum(icmp)),
        Family::V6 => transport_checksum(packet.destination, packet.source, number, &out[at..at + 8 + quote.len()]),
    };
    out[at + 2..at + 4].copy_from_slice(&checksum.to_be_bytes());
    at + 8 + quote.len()
}

/// Writes the datagram that answers `packet` as if its destination had sent it. Returns the length. With the headers, the
/// payload has at most [`LIMIT`] bytes.
pub fn datagram(packet: &Packet, payload: &[u8], out: &mut [u8]) -> usize {
    let length = UDP + payload.len();
    let at = ip_header(packet.destination, packet.source, IpNumber::UDP, length, out);
    let body = &mut out[at..at + length];
    for (at, word) in [packet.destination_port, packet.source_port, length as u16, 0].into_iter().enumerate() {
        body[2 * at..2 * at + 2].copy_from_slice(&word.to_be_bytes());
    }
    body[UDP..].copy_from_slice(payload);
    let checksum = transport_checksum(packet.destination, packet.source, IpNumber::UDP, body);
    // Zero says that there is none (RFC 768).
    let checksum = if checksum == 0 { 0xffff } else { checksum };
    out[at + 6..at + 8].copy_from_slice(&checksum.to_be_bytes());
    at + length
}

/// Whether the checksum of a datagram is right, where it has one. `body`: from its header on.
pub fn is_intact(packet: &Packet, body: &[u8]) -> bool {
    let has_none = packet.family == Family::V4 && body[6..8] == [0, 0];
    has_none || transport_checksum(packet.source, packet.destination, IpNumber::UDP, body) == 0
}

/// Writes an IP header and returns its length.
fn ip_header(from: Address, to: Address, number: IpNumber, payload: usize, out: &mut [u8]) -> usize {
    match from.family() {
        Family::V4 => {
            let mut header =
                Ipv4Header::new(payload as u16, TTL, number, from.v4(), to.v4()).expect("payload is small");
            header.dont_fragment = true;
            header.header_checksum = header.calc_header_checksum();
            let bytes = header.to_bytes();
            out[..bytes.len()].copy_from_slice(&bytes);
            bytes.len()
        }
        Family::V6 => {
            let header = Ipv6Header {
                payload_length: payload as u16,
                next_header: number,
                hop_limit: TTL,
                source: from.bytes(),
                destination: to.bytes(),
                ..Ipv6Header::default()
            };
            let bytes = header.to_bytes();
            out[..bytes.len()].copy_from_slice(&bytes);
            bytes.len()
        }
    }
}

/// Checksum with the pseudo-header; the field itself must be zero.
fn transport_checksum(from: Address, to: Address, number: IpNumber, body: &[u8]) -> u16 {
    let size = if from.is_v4() { 4 } else { 16 };
    let address = |address: Address| sum(&address.bytes()[16 - size..]);
    let pseudo = address(from) + address(to) + body.len() as u64 + u64::from(number.0);
    !fold(pseudo + sum(body))
}
