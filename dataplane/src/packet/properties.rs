//! Properties of rewriting: exactly the right bytes change, and every checksum is right by a full, independent count.

use etherparse::{IpNumber, Ipv4Header, Ipv6Header};
use proptest::prelude::*;

use super::icmp;
use super::rewrite::{Translation, rewrite};
use super::view::{Packet, Transport};
use crate::flow::Address;
use crate::net::Family;

/// RFC 1071 the slow way, apart from the code under test.
fn internet_checksum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum = 0u32;
    for (index, byte) in bytes.iter().enumerate() {
        sum += if index % 2 == 0 { u32::from(*byte) << 8 } else { u32::from(*byte) };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[derive(Clone, Debug)]
struct Sample {
    v6: bool,
    tcp: bool,
    addresses: [[u8; 16]; 4],
    ports: [u16; 4],
    options: Vec<u8>,
    ip_options: Vec<u8>,
    payload: Vec<u8>,
    fields: [u8; 12],
    partial: bool,
    no_checksum: bool,
}

fn samples() -> impl Strategy<Value = Sample> {
    let words = proptest::collection::vec(any::<[u8; 4]>(), 0..=10).prop_map(|words| words.concat());
    let shape = (any::<[bool; 4]>(), any::<[[u8; 16]; 4]>(), any::<[u16; 4]>(), any::<[u8; 12]>());
    (shape, words.clone(), words, proptest::collection::vec(any::<u8>(), 0..300)).prop_map(
        |(([v6, tcp, partial, no_checksum], addresses, ports, fields), options, ip_options, payload)| Sample {
            v6,
            tcp,
            addresses: addresses.map(|mut address| {
                address[0] = 0x20;
                address
            }),
            ports,
            options,
            ip_options,
            payload,
            fields,
            partial,
            no_checksum,
        },
    )
}

impl Sample {
    fn address(&self, index: usize) -> Address {
        let bytes = self.addresses[index];
        if self.v6 { Address::from_v6(bytes) } else { Address::from_v4([bytes[0], bytes[5], bytes[9], bytes[15]]) }
    }

    fn transport(&self, from: usize) -> Vec<u8> {
        let [source, destination] = [self.ports[from], self.ports[from + 1]].map(u16::to_be_bytes);
        let f = &self.fields;
        let mut bytes = [source, destination].concat();
        if self.tcp {
            bytes.extend(&f[..8]);
            // Data offset, then every flag, window, no checksum yet, urgent pointer.
            bytes.extend([((5 + self.options.len() / 4) as u8) << 4 | f[8] & 1, f[9], f[10], f[11], 0, 0, f[0], f[1]]);
            bytes.extend(&self.options);
        } else {
            bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes.extend(&self.payload);
        bytes
    }

    fn checksum_at(&self) -> usize {
        if self.tcp { 16 } else { 6 }
    }

    fn pseudo(&self, from: usize, length: usize) -> Vec<u8> {
        let size = if self.v6 { 16 } else { 4 };
        let mut pseudo = Vec::new();
        for address in [self.address(from), self.address(from + 1)] {
            pseudo.extend(&address.bytes()[16 - size..]);
        }
        pseudo.extend((length as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, if self.tcp { 6 } else { 17 }]);
        pseudo
    }

    /// The whole packet with addresses and ports number `from` and `from + 1`, its checksums counted in full.
    fn packet(&self, from: usize) -> Vec<u8> {
        let mut body = self.transport(from);
        let pseudo = self.pseudo(from, body.len());
        let checksum = if self.partial {
            !internet_checksum(&[&pseudo])
        } else if !self.tcp && self.no_checksum && !self.v6 {
            0
        } else {
            match internet_checksum(&[&pseudo, &body]) {
                0 if !self.tcp => 0xffff,
                sum => sum,
            }
        };
        let at = self.checksum_at();
        body[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        let number = if self.tcp { IpNumber::TCP } else { IpNumber::UDP };
        let mut bytes = if self.v6 {
            let header = Ipv6Header {
                traffic_class: self.fields[2],
                flow_label: 0x1_2345u32.try_into().unwrap(),
                payload_length: body.len() as u16,
                next_header: number,
                hop_limit: self.fields[3],
                source: self.address(from).bytes(),
                destination: self.address(from + 1).bytes(),
            };
            header.to_bytes().to_vec()
        } else {
            let [source, destination] = [self.address(from).v4(), self.address(from + 1).v4()];
            let mut header = Ipv4Header::new(body.len() as u16, self.fields[3], number, source, destination).unwrap();
            header.dont_fragment = self.fields[4] & 1 == 1;
            header.identification = u16::from(self.fields[5]);
            header.dscp = (self.fields[2] >> 2).try_into().unwrap();
            header.ecn = (self.fields[2] & 3).try_into().unwrap();
            header.options = self.ip_options.as_slice().try_into().unwrap();
            header.set_payload_len(body.len()).unwrap();
            let mut bytes = header.to_bytes().to_vec();
            bytes[10..12].fill(0);
            let checksum = internet_checksum(&[&bytes]);
            bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
            bytes
        };
        bytes.extend(body);
        bytes
    }

    fn translation(&self) -> Translation {
        Translation {
            source: self.address(2),
            source_port: self.ports[2],
            destination: self.address(3),
            destination_port: self.ports[3],
        }
    }

    /// An ICMP error about this packet between addresses and ports number `from` and `from + 1`, sent to its source.
    fn icmp_error(&self, from: usize, sender: Address, quote: usize) -> Vec<u8> {
        let quoted = self.packet(from);
        let quote = &quoted[..quoted.len().min(quote)];
        let mut icmp = if self.v6 { vec![2, 0, 0, 0, 0, 0, 5, 0] } else { vec![3, 4, 0, 0, 0, 0, 5, 0] };
        icmp.extend(quote);
        let to = self.address(from);
        let mut bytes;
        if self.v6 {
            let mut pseudo = [sender.bytes(), to.bytes()].concat();
            pseudo.extend((icmp.len() as u32).to_be_bytes());
            pseudo.extend([0, 0, 0, 58]);
            let sum = internet_checksum(&[&pseudo, &icmp]);
            icmp[2..4].copy_from_slice(&sum.to_be_bytes());
            let header = Ipv6Header {
                payload_length: icmp.len() as u16,
                next_header: IpNumber::IPV6_ICMP,
                hop_limit: 64,
                source: sender.bytes(),
                destination: to.bytes(),
                ..Ipv6Header::default()
            };
            bytes = header.to_bytes().to_vec();
        } else {
            let sum = internet_checksum(&[&icmp]);
            icmp[2..4].copy_from_slice(&sum.to_be_bytes());
            let mut header = Ipv4Header::new(icmp.len() as u16, 64, IpNumber::ICMP, sender.v4(), to.v4()).unwrap();
            header.header_checksum = header.calc_header_checksum();
            bytes = header.to_bytes().to_vec();
        }
        bytes.extend(icmp);
        bytes
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_rewritten_packet_is_the_packet_written_anew(sample in samples()) {
        let mut bytes = sample.packet(0);
        let packet = Packet::parse(&bytes).unwrap();
        prop_assert_eq!(packet.length, bytes.len());
        rewrite(&mut bytes, &packet, sample.partial, &sample.translation());
        prop_assert_eq!(bytes, sample.packet(2));
    }

    #[test]
    fn an_icmp_error_is_the_error_about_the_rewritten_packet(sample in samples(), quote in 28usize..300, peer in any::<bool>()) {
        let sample = Sample { partial: false, ..sample };
        let router = if sample.v6 { Address::from_v6([0x2a; 16]) } else { Address::from_v4([9, 9, 9, 9]) };
        let header = if sample.v6 { 40 } else { 20 + sample.ip_options.len() };
        // Half a quoted checksum cannot be told from the other half: no cut goes through it.
        let cut = header + sample.checksum_at() + 1;
        let quote = if quote == cut { cut + 1 } else { quote.max(header + 8) };
        // The receiver of the error knows the quoted packet as 0 → 1; we carried it on as 2 → 3, and there it failed.
        let (inner, outer) = if peer { (sample.address(3), sample.address(1)) } else { (router, router) };
        let mut bytes = sample.icmp_error(2, inner, quote);
        let error = Packet::parse(&bytes).unwrap();
        let Transport::Icmp(kind) = error.transport else { panic!("not ICMP") };
        prop_assert!(icmp::is_error(error.family, kind));
        let quoted = icmp::quoted(&bytes, &error).unwrap();
        let translation = Translation {
            source: sample.address(1),
            source_port: sample.ports[1],
            destination: sample.address(0),
            destination_port: sample.ports[0],
        };
        icmp::translate(&mut bytes, &error, &quoted, &translation);
        prop_assert_eq!(bytes, sample.icmp_error(0, outer, quote));
    }

    #[test]
    fn every_truncation_is_survived(sample in samples(), garbage in any::<[u8; 4]>()) {
        let whole = sample.packet(0);
        for length in 0..whole.len() {
            prop_assert!(Packet::parse(&whole[..length]).is_err());
        }
        let error = sample.icmp_error(0, sample.address(2), 200);
        for length in 0..error.len() {
            prop_assert!(Packet::parse(&error[..length]).is_err());
        }
        // A length field that lies: parsed or refused, never read past the end.
        let mut lying = whole;
        let at = if sample.v6 { 4 } else { 2 };
        lying[at..at + 2].copy_from_slice(&garbage[..2]);
        lying[0] = garbage[2];
        if let Ok(packet) = Packet::parse(&lying) {
            rewrite(&mut lying, &packet, sample.partial, &sample.translation_for(packet.family));
        }
    }
}

impl Sample {
    /// A translation in this family, whatever the sample's own is.
    fn translation_for(&self, family: Family) -> Translation {
        Sample { v6: family == Family::V6, ..self.clone() }.translation()
    }
}
