//! ICMP errors about a flow: translated like the flow itself, so that path MTU discovery works through us (RFC 5508 §4).

use crate::flow::FlowKey;
use crate::net::{Family, Protocol};
use crate::packet::checksum::{Change, fold, sum};
use crate::packet::rewrite::{Translation, rewrite_quoted, write_addresses};
use crate::packet::view::{Malformed, Packet};

/// Bytes before the quoted packet in every ICMP error (RFC 792, RFC 4443 §3).
const HEADER: usize = 8;

/// Whether an ICMP type is an error that quotes a packet.
pub fn is_error(family: Family, icmp_type: u8) -> bool {
    match family {
        // RFC 792 and RFC 1122 §3.2.2: unreachable, source quench, redirect, time exceeded, parameter problem.
        Family::V4 => matches!(icmp_type, 3 | 4 | 5 | 11 | 12),
        // RFC 4443 §2.1: errors have the high bit clear.
        Family::V6 => icmp_type < 128,
    }
}

/// Whether an error says that its packet cannot reach its destination, now or at all.
pub fn is_unreachable(bytes: &[u8], error: &Packet) -> bool {
    match (error.family, bytes.get(error.transport_at..error.transport_at + 2)) {
        // RFC 792, RFC 1812 §5.2.7.1: all codes but "fragmentation needed".
        (Family::V4, Some([3, code])) => *code != 4,
        (Family::V6, Some([1, _])) => true,
        (Family::V4 | Family::V6, _) => false,
    }
}

/// The packet that an ICMP error quotes: its view, with offsets from the quote's own start.
pub fn quoted(bytes: &[u8], error: &Packet) -> Result<Packet, Malformed> {
    Packet::parse_quoted(bytes.get(error.transport_at + HEADER..error.length).ok_or(Malformed::Transport)?)
}

/// The key of the flow's packets that go *against* the quoted one, the way the error itself goes.
pub fn key_of_receiver(quoted: &Packet, protocol: Protocol) -> FlowKey {
    quoted.key(protocol).reversed()
}

/// Rewrites an error that travels as `translation` says for ordinary packets of its direction.
///
/// The error's sender stays as it is, unless it is the peer itself, which has the name the receiver knows it by.
pub fn translate(bytes: &mut [u8], error: &Packet, quoted: &Packet, translation: &Translation) {
    let at = error.transport_at + HEADER;
    // Both header lengths are even but for IPv4 options of no multiple of two, which do not exist: offsets stay even.
    let touched = at..error.length.min(at + quoted.transport_at + 20);
    let before = sum(&bytes[touched.clone()]);
    let back = Translation {
        source: translation.destination,
        source_port: translation.destination_port,
        destination: translation.source,
        destination_port: translation.source_port,
    };
    let from_peer = error.source == quoted.destination;
    rewrite_quoted(&mut bytes[at..error.length], quoted, &back);
    let after = sum(&bytes[touched]);
    let outer = Translation { source: if from_peer { translation.source } else { error.source }, ..*translation };
    let addresses = write_addresses(bytes, error, &outer);
    let mut change = Change::default();
    change.replace_word(fold(before), fold(after));
    if error.family == Family::V6 {
        // RFC 4443 §2.3: the pseudo-header counts.
        change = change.and(addresses);
    }
    crate::packet::checksum::update(bytes, error.transport_at + 2, change);
}
