//! What a router does to a packet that it sends on by itself: whether it fits the next link, and its hop limit.

use crate::packet::checksum::Change;
use crate::packet::vnet;

// IANA protocol numbers.
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Takes one off the hop limit (RFC 1812 §5.3.1, RFC 8200 §3) of a TCP or UDP packet that a link with this MTU takes as it is,
/// segment by segment where it is to be cut. Returns its length by the IP header. Packets that need more than that —
/// an answer, since they are too long or came too far, or a look at their options — are left alone.
pub fn take(header: &[u8], bytes: &mut [u8], mtu: usize) -> Option<usize> {
    let (transport_at, protocol, length) = match bytes.first()? {
        // Without options, and no fragment.
        0x45 if bytes.len() >= 20 && bytes[6] & 0x3f == 0 && bytes[7] == 0 => {
            (20, bytes[9], usize::from(u16::from_be_bytes([bytes[2], bytes[3]])))
        }
        0x60..=0x6f if bytes.len() >= 40 => (40, bytes[6], 40 + usize::from(u16::from_be_bytes([bytes[4], bytes[5]]))),
        _ => return None,
    };
    let transport = match protocol {
        TCP => usize::from(bytes.get(transport_at + 12)? >> 4) * 4,
        UDP => 8,
        _ => return None,
    };
    let longest = vnet::segment(header).map_or(length, |payload| transport_at + transport + payload);
    if length > bytes.len() || longest > mtu {
        return None;
    }
    let at = if transport_at == 20 { 8 } else { 7 };
    let limit = bytes[at].checked_sub(1).filter(|limit| *limit > 0)?;
    if transport_at == 20 {
        let mut change = Change::default();
        change.replace(&[bytes[8], protocol], &[limit, protocol]);
        let checksum = change.apply(u16::from_be_bytes([bytes[10], bytes[11]]));
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    bytes[at] = limit;
    Some(length)
}

#[cfg(test)]
mod tests {
    use etherparse::{Ipv4HeaderSlice, PacketBuilder};

    use super::*;

    const PLAIN: [u8; vnet::LEN] = [0; vnet::LEN];

    fn tcp(v4: bool, limit: u8, payload: usize) -> Vec<u8> {
        let builder = match v4 {
            true => PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], limit),
            false => PacketBuilder::ipv6([1; 16], [2; 16], limit),
        };
        let mut bytes = Vec::new();
        builder.tcp(1, 2, 3, 4).write(&mut bytes, &vec![7; payload]).unwrap();
        bytes
    }

    #[test]
    fn a_packet_that_fits_loses_one_hop_and_no_other_bit() {
        for v4 in [true, false] {
            let (before, mut after) = (tcp(v4, 64, 100), tcp(v4, 64, 100));
            // As short frames come from a wire: with something behind the packet.
            after.extend([0; 6]);
            assert_eq!(take(&PLAIN, &mut after, before.len()), Some(before.len()));
            let at = if v4 { 8 } else { 7 };
            assert_eq!(after[at], 63);
            if v4 {
                let header = Ipv4HeaderSlice::from_slice(&after).unwrap();
                assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            }
            let same = |index: &usize| *index != at && !(v4 && (10..12).contains(index));
            assert!((0..before.len()).filter(same).all(|index| before[index] == after[index]));
        }
    }

    #[test]
    fn what_a_router_must_look_at_is_left_alone() {
        let with = |change: fn(&mut Vec<u8>)| {
            let mut bytes = tcp(true, 64, 100);
            change(&mut bytes);
            bytes
        };
        for (what, mut bytes, mtu) in [
            ("longer than the link takes", tcp(true, 64, 100), 139),
            ("its last hop", tcp(true, 1, 100), 1500),
            ("its last hop, IPv6", tcp(false, 1, 100), 1500),
            ("options", with(|bytes| bytes[0] = 0x46), 1500),
            ("a first fragment", with(|bytes| bytes[6] = 0x20), 1500),
            ("a later fragment", with(|bytes| bytes[7] = 1), 1500),
            ("another protocol", with(|bytes| bytes[9] = 132), 1500),
            ("cut short", with(|bytes| bytes.truncate(60)), 1500),
            ("no packet", vec![0x45; 3], 1500),
            ("nothing", Vec::new(), 1500),
        ] {
            let before = bytes.clone();
            assert_eq!(take(&PLAIN, &mut bytes, mtu), None, "{what}");
            assert_eq!(bytes, before, "{what}");
        }
    }

    #[test]
    fn segments_must_fit_not_the_whole() {
        let mut header = PLAIN;
        header[1] = 1;
        header[4..6].copy_from_slice(&1460_u16.to_ne_bytes());
        assert_eq!(take(&header, &mut tcp(true, 64, 20_000), 1500), Some(20_040));
        assert_eq!(take(&header, &mut tcp(true, 64, 20_000), 1499), None);
        assert_eq!(take(&header, &mut tcp(false, 64, 20_000), 1500), None);
    }
}
