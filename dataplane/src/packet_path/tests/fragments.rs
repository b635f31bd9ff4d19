//! Packets in pieces: each piece is translated by itself, and the whole is right.

use etherparse::{IpFragOffset, Ipv4Header, UdpHeader, ip_number};

use super::super::Shared;
use super::harness::{CLIENT, FRONTEND, NODE, Path, settings, socket};
use crate::net::Protocol;
use crate::packet::view::Transport;
use crate::packet::vnet;

const PIECE: usize = 1480;

/// The pieces of a datagram, first to last.
fn pieces(from: &str, to: &str, id: u16, protocol: etherparse::IpNumber) -> Vec<Vec<u8>> {
    let (from, to) = (socket(from), socket(to));
    let (std::net::IpAddr::V4(source), std::net::IpAddr::V4(destination)) = (from.ip(), to.ip()) else { panic!() };
    let payload: Vec<u8> = (0..4000_u32).map(|at| (at * 7) as u8).collect();
    let ip = Ipv4Header::new(0, 64, protocol, source.octets(), destination.octets()).unwrap();
    let udp = UdpHeader::with_ipv4_checksum(from.port(), to.port(), &ip, &payload).unwrap();
    let whole = [udp.to_bytes().as_slice(), &payload].concat();
    let count = whole.len().div_ceil(PIECE);
    let frame = |(number, piece): (usize, &[u8])| {
        let mut header = ip.clone();
        header.identification = id;
        header.fragment_offset = IpFragOffset::try_new((number * PIECE / 8) as u16).unwrap();
        header.more_fragments = number + 1 < count;
        header.set_payload_len(piece.len()).unwrap();
        header.header_checksum = header.calc_header_checksum();
        let mut frame = vec![0; vnet::LEN];
        header.write(&mut frame).unwrap();
        frame.extend(piece);
        frame
    };
    whole.chunks(PIECE).enumerate().map(frame).collect()
}

/// Sends the pieces; who sent the whole to whom, as its receiver sees it.
fn pass(path: &mut Path, pieces: Vec<Vec<u8>>) -> (String, String) {
    let (mut whole, mut ends) = (Vec::new(), None);
    for piece in pieces {
        let (from, to, packet, bytes) = path.send(piece).expect("every piece goes on");
        let (header, _) = Ipv4Header::from_slice(&bytes).unwrap();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(whole.len(), header.fragment_offset.byte_offset() as usize);
        whole.extend(&bytes[packet.transport_at..]);
        match &ends {
            None => ends = Some((from, to, header)),
            Some((first_from, first_to, _)) => assert_eq!((from.ip(), to.ip()), (first_from.ip(), first_to.ip())),
        }
    }
    let (from, to, header) = ends.unwrap();
    let (udp, payload) = UdpHeader::from_slice(&whole).unwrap();
    assert_eq!(udp.checksum, udp.calc_checksum_ipv4(&header, payload).unwrap(), "the checksum of the whole");
    (from.to_string(), to.to_string())
}

#[test]
fn every_piece_goes_the_way_of_the_first_both_ways() {
    const ENDPOINT: &str = "10.244.1.1:53";
    let mut path = Path::new(16);
    path.serve(Protocol::Udp, &[ENDPOINT, "10.244.1.2:53"]);
    for (client, frontend) in [(CLIENT, FRONTEND), ("8.8.8.8:999", "192.168.0.1:30080")] {
        for id in [7, 8] {
            let (seen, endpoint) = pass(&mut path, pieces(client, frontend, id, ip_number::UDP));
            assert_eq!(seen == client, client == CLIENT, "{seen}");
            assert!(endpoint.starts_with("10.244.1."), "{endpoint}");
            assert_eq!(
                pass(&mut path, pieces(&endpoint, &seen, id, ip_number::UDP)),
                (frontend.to_owned(), client.to_owned())
            );
        }
    }
    assert_eq!(path.states(), ["replied", "replied"], "pieces make no flows");
}

#[test]
fn pieces_of_what_is_not_ours_pass_unchanged() {
    let mut path = Path::new(16);
    path.serve(Protocol::Udp, &["10.244.1.1:53"]);
    for piece in pieces("8.8.8.8:999", "192.168.0.1:30081", 1, ip_number::UDP) {
        assert_eq!(path.send(piece.clone()).unwrap().3, piece[vnet::LEN..]);
    }
}

#[test]
fn a_piece_whose_first_is_not_known_goes_nowhere() {
    let mut path = Path::over(Shared::new(settings(16)));
    path.serve(Protocol::Udp, &["10.244.1.1:53"]);
    let udp = pieces(CLIENT, FRONTEND, 1, ip_number::UDP);
    assert!(path.send(udp[1].clone()).is_none(), "it comes before its first");
    assert!(path.send(udp[0].clone()).is_some() && path.send(udp[1].clone()).is_some());
    path.now_ms += 3_000;
    assert!(path.send(udp[2].clone()).is_none(), "too late");
    // The pieces of another packet, and of another protocol.
    assert!(path.send(pieces(CLIENT, FRONTEND, 2, ip_number::UDP)[1].clone()).is_none());
    for piece in pieces(CLIENT, FRONTEND, 1, ip_number::SCTP) {
        assert!(path.send(piece).is_none(), "SCTP is translated as a whole");
    }
    assert!(path.shared.drops().contains(&("fragment", 6)), "{:?}", path.shared.drops());
    // Refused: the first is answered, the others are not.
    path.serve(Protocol::Udp, &[]);
    let refused = pieces("10.244.0.9:41000", FRONTEND, 3, ip_number::UDP);
    let (from, _, packet, _) = path.send(refused[0].clone()).unwrap();
    assert!(matches!(packet.transport, Transport::Icmp(3)) && from.ip() == socket(FRONTEND).ip(), "{NODE}: {from}");
    assert!(path.send(refused[1].clone()).is_none());
}
