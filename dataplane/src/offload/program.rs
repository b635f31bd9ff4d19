//! The program that runs where packets come in. A TCP segment of a flow that it knows is rewritten and sent on the link that it
//! leaves by. What begins a connection or breaks it off, and whatever is not quite plain, is sent into the TUN link, as all packets
//! of these flows are that have no way. Packets of others go on as if the program were not there.

use std::mem::offset_of;
use std::os::fd::AsRawFd;

use super::flows::{CARRIED, Ends, Flow, NOT_OURS, OVER};
use super::maps::{Maps, Way};
use super::traffic::{Carried, DIRECTION, FlowTraffic, Traffic};
use crate::bpf::assembler::{
    Assembler, Atomic, If, Instruction, Label, Op, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, STACK, Size,
};
use crate::net::Family;
use crate::packet_path::ETHERNET;

// `struct __sk_buff` (linux/bpf.h): the packet as programs see it.
const LENGTH: i16 = 0;
const PACKET_TYPE: i16 = 4;
const MARK: i16 = 8;
const VLAN_PRESENT: i16 = 20;
const DATA: i16 = 76;
const DATA_END: i16 = 80;
const SEGMENT_SIZE: i16 = 176;

// Numbers of the kernel's functions (linux/bpf.h), and their flags.
const MAP_LOOKUP: i32 = 1;
const CHANGE_CHECKSUM: i32 = 11;
const REDIRECT: i32 = 23;
const REDIRECT_TO_PEER: i32 = 155;
const COARSE_CLOCK: i32 = 160;
const OF_PSEUDO_HEADER: i32 = 1 << 4;
const OF_IPV6: i32 = 1 << 7;

/// `TCX_NEXT`: as if this program were not there.
const GO_ON: i32 = -1;
/// `TCX_DROP`
const DISCARD: i32 = 2;
/// `PACKET_HOST`
const FOR_THIS_HOST: i32 = 0;

const TCP: i32 = 6;
const FIN: i32 = 1 << 0;
const SYN: i32 = 1 << 1;
const RST: i32 = 1 << 2;
const ACK: i32 = 1 << 4;
/// Hops a packet: one onto our link, one off it, as when we carry it.
const HOPS: i32 = 2;
/// What two hops less do to the checksum of an IPv4 header, whose words here are as they lie in memory (RFC 1624 §3).
const HOPS_CHECKSUM: i32 = 0xffff - u16::from_ne_bytes([HOPS as u8, 0]) as i32;

/// Where the key lies on the stack, in whole words of 64 bits, and other things.
pub(super) const KEY: i16 = -(size_of::<Ends>().next_multiple_of(8) as i16);
pub(super) const INDEX: i16 = KEY - 4;
const ACKNOWLEDGED: i16 = KEY - 8;
/// Flags of the segment.
const FLAGS: i16 = KEY - 16;
/// What was seen of the flow, and of this direction of it.
const TRAFFIC: i16 = KEY - 24;
const SEEN: i16 = KEY - 32;

/// A header as far as it is looked at.
struct Headers {
    family: Family,
    /// Bytes of the IP header.
    ip: i16,
    /// Where source and destination are in it, and how long each is.
    source: i16,
    address: i16,
    protocol: i16,
    hop_limit: i16,
    icmp: i32,
    /// Types of ICMP errors.
    errors: (i32, i32),
}

const V4: Headers =
    Headers { family: Family::V4, ip: 20, source: 12, address: 4, protocol: 9, hop_limit: 8, icmp: 1, errors: (3, 12) };
const V6: Headers =
    Headers { family: Family::V6, ip: 40, source: 8, address: 16, protocol: 6, hop_limit: 7, icmp: 58, errors: (1, 4) };

/// Where the Ethernet header ends.
const IP_AT: i16 = ETHERNET as i16;
const TCP_LENGTH: i16 = 20;
const ICMP_LENGTH: i16 = 8;

/// The program for these maps and this TUN link.
pub(super) fn program(maps: &Maps, tun: u32) -> Vec<Instruction> {
    let mut program = Writer { code: Assembler::default(), maps, exits: None };
    program.write(tun);
    program.code.finish()
}

/// The program for what the TUN link brings: marks the segments of flows that the other program knows, so that connection tracking
/// leaves them alone.
pub(super) fn marking(maps: &Maps, mark: u32) -> Vec<Instruction> {
    let mut program = Writer { code: Assembler::default(), maps, exits: None };
    let (go_on, v6) = (program.code.label(), program.code.label());
    program.code.op(Op::Move, R6, R1);
    program.data(V4.ip + TCP_LENGTH, go_on);
    program.code.load(Size::Byte, R1, R2, 0);
    program.code.op(Op::ShiftRight, R1, 4);
    program.code.jump_if(R1, If::Equal, 6, v6);
    for (headers, label) in [(&V4, None), (&V6, Some(v6))] {
        if let Some(label) = label {
            program.code.at(label);
            program.data(headers.ip + TCP_LENGTH, go_on);
        }
        program.is_plain(headers, 0, go_on);
        program.code.load(Size::Byte, R1, R2, headers.protocol);
        program.code.jump_if(R1, If::NotEqual, TCP, go_on);
        // Known by its replies.
        program.key(headers, 0, true);
        program.flow(go_on);
        program.code.store(Size::Word, R6, MARK, mark as i32);
        program.code.jump(go_on);
    }
    program.code.at(go_on);
    program.code.op(Op::Move, R0, GO_ON);
    program.code.exit();
    program.code.finish()
}

/// Where a packet's handling ends.
#[derive(Clone, Copy)]
struct Exits {
    go_on: Label,
    to_us: Label,
    discard: Label,
}

pub(super) struct Writer<'m> {
    pub(super) code: Assembler,
    pub(super) maps: &'m Maps,
    exits: Option<Exits>,
}

impl Writer<'_> {
    /// Registers: R6 the packet, R7 its flow, R8 its way, R9 what a part needs for a while.
    fn write(&mut self, tun: u32) {
        let exits = Exits { go_on: self.code.label(), to_us: self.code.label(), discard: self.code.label() };
        let v6 = self.code.label();
        self.exits = Some(exits);
        let code = &mut self.code;
        code.op(Op::Move, R6, R1);
        code.load(Size::Word, R1, R6, PACKET_TYPE);
        code.jump_if(R1, If::NotEqual, FOR_THIS_HOST, exits.go_on);
        code.load(Size::Word, R1, R6, VLAN_PRESENT);
        code.jump_if(R1, If::NotEqual, 0, exits.go_on);
        self.data(IP_AT + V4.ip + TCP_LENGTH, exits.go_on);
        self.code.load(Size::Half, R1, R2, IP_AT - 2);
        self.code.jump_if(R1, If::Equal, wire(0x86dd), v6);
        self.code.jump_if(R1, If::NotEqual, wire(0x0800), exits.go_on);
        self.family(&V4);
        self.code.at(v6);
        self.data(IP_AT + V6.ip + TCP_LENGTH, exits.go_on);
        self.family(&V6);
        let code = &mut self.code;
        code.at(exits.to_us);
        code.op(Op::Move, R1, tun as i32);
        code.op(Op::Move, R2, 0);
        code.call(REDIRECT);
        code.exit();
        code.at(exits.discard);
        code.op(Op::Move, R0, DISCARD);
        code.exit();
        code.at(exits.go_on);
        code.op(Op::Move, R0, GO_ON);
        code.exit();
    }

    /// A packet of this family. R2: its data, of which a TCP header's length is there.
    fn family(&mut self, headers: &Headers) {
        let Exits { go_on, to_us, discard } = self.exits.expect("it is set first");
        let (icmp, unknown) = (self.code.label(), self.code.label());
        let tcp_at = IP_AT + headers.ip;
        self.is_plain(headers, IP_AT, go_on);
        let code = &mut self.code;
        code.load(Size::Byte, R1, R2, IP_AT + headers.protocol);
        code.jump_if(R1, If::Equal, headers.icmp, icmp);
        code.jump_if(R1, If::NotEqual, TCP, go_on);
        self.key(headers, IP_AT, false);
        let code = &mut self.code;
        code.load(Size::Byte, R1, R2, tcp_at + 13);
        code.store(Size::Double, STACK, FLAGS, R1);
        self.flow(unknown);
        self.may_be_carried(go_on, to_us);
        let code = &mut self.code;
        // The way, while it is known.
        code.op(Op::Move, R2, R7);
        code.op(Op::Add, R2, (offset_of!(Flow, onward) + offset_of!(Ends, destination)) as i32);
        code.map(R1, self.maps.ways.descriptor().as_raw_fd());
        code.call(MAP_LOOKUP);
        code.jump_if(R0, If::Equal, 0, to_us);
        code.op(Op::Move, R8, R0);
        code.call(COARSE_CLOCK);
        code.op(Op::Move, R9, R0);
        code.load(Size::Double, R1, R8, offset_of!(Way, until_ns) as i16);
        code.jump_if(R9, If::AtLeast, R1, to_us);
        // Hops and length.
        self.data(tcp_at + TCP_LENGTH, to_us);
        let code = &mut self.code;
        code.load(Size::Byte, R1, R2, IP_AT + headers.hop_limit);
        code.jump_if(R1, If::AtMost, HOPS, to_us);
        let (whole, known) = (code.label(), code.label());
        code.load(Size::Word, R4, R6, SEGMENT_SIZE);
        code.jump_if(R4, If::Equal, 0, whole);
        code.load(Size::Byte, R1, R2, tcp_at + 12);
        code.op(Op::ShiftRight, R1, 4);
        code.op(Op::ShiftLeft, R1, 2);
        code.op(Op::Add, R1, i32::from(headers.ip));
        code.op(Op::Add, R1, R4);
        code.jump(known);
        code.at(whole);
        code.load(Size::Word, R1, R6, LENGTH);
        code.op(Op::Sub, R1, i32::from(IP_AT));
        code.at(known);
        code.load(Size::Word, R4, R8, offset_of!(Way, mtu) as i16);
        code.jump_if(R1, If::Above, R4, to_us);
        code.load(Size::Word, R1, R2, tcp_at + 8);
        code.store(Size::Word, STACK, ACKNOWLEDGED, R1);
        self.checksum(headers, to_us);
        self.count();
        self.rewrite(headers, discard);
        let code = &mut self.code;
        let to_peer = code.label();
        code.load(Size::Word, R1, R8, offset_of!(Way, link) as i16);
        code.op(Op::Move, R2, 0);
        code.load(Size::Word, R3, R8, offset_of!(Way, to_peer) as i16);
        code.jump_if(R3, If::NotEqual, 0, to_peer);
        code.call(REDIRECT);
        code.exit();
        code.at(to_peer);
        code.call(REDIRECT_TO_PEER);
        code.exit();
        self.code.at(unknown);
        self.forget_what_is_over(headers);
        self.code.at(icmp);
        self.error(headers);
    }

    /// A client's SYN to an endpoint itself. Where its port was that of a flow to this endpoint, now over, the replies are none of ours
    /// any more.
    fn forget_what_is_over(&mut self, headers: &Headers) {
        let Exits { go_on, .. } = self.exits.expect("it is set first");
        let is_over = self.code.label();
        let code = &mut self.code;
        code.load(Size::Double, R1, STACK, FLAGS);
        code.op(Op::And, R1, SYN | ACK);
        code.jump_if(R1, If::NotEqual, SYN, go_on);
        self.data(IP_AT + headers.ip + TCP_LENGTH, go_on);
        self.key(headers, IP_AT, true);
        self.flow(go_on);
        let code = &mut self.code;
        code.load(Size::Word, R1, R7, offset_of!(Flow, fate) as i16);
        code.jump_if(R1, If::Equal, OVER as i32, is_over);
        code.jump_if(R1, If::NotEqual, CARRIED as i32, go_on);
        self.traffic(go_on);
        let code = &mut self.code;
        for direction in [0, DIRECTION] {
            let fin = offset_of!(FlowTraffic, directions) + direction + offset_of!(Traffic, fin);
            code.load(Size::Word, R1, R0, fin as i16);
            code.jump_if(R1, If::Equal, 0, go_on);
        }
        code.at(is_over);
        code.store(Size::Word, R7, offset_of!(Flow, fate) as i16, NOT_OURS as i32);
        code.jump(go_on);
    }

    /// R0: what was seen of the flow.
    fn traffic(&mut self, otherwise: Label) {
        let [traffic, _] = self.maps.arrays();
        self.element(traffic, offset_of!(Flow, traffic), otherwise);
    }

    /// R0: the element of this array that a field of the flow numbers.
    fn element(&mut self, array: i32, field: usize, otherwise: Label) {
        let code = &mut self.code;
        code.load(Size::Word, R1, R7, field as i16);
        code.store(Size::Word, STACK, INDEX, R1);
        self.at_index(array, otherwise);
    }

    /// R0: the element of this array at the index.
    pub(super) fn at_index(&mut self, array: i32, otherwise: Label) {
        let code = &mut self.code;
        code.op(Op::Move, R2, STACK);
        code.op(Op::Add, R2, i32::from(INDEX));
        code.map(R1, array);
        code.call(MAP_LOOKUP);
        code.jump_if(R0, If::Equal, 0, otherwise);
    }

    /// Looks up what was seen of the flow. A RST comes to us, and so do a client's SYN, and what an endpoint says before it has
    /// accepted the connection.
    fn may_be_carried(&mut self, go_on: Label, to_us: Label) {
        let code = &mut self.code;
        let (is_syn, is_answered) = (code.label(), code.label());
        code.load(Size::Word, R1, R7, offset_of!(Flow, fate) as i16);
        code.jump_if(R1, If::Equal, NOT_OURS as i32, go_on);
        code.jump_if(R1, If::NotEqual, CARRIED as i32, to_us);
        self.traffic(to_us);
        let code = &mut self.code;
        code.store(Size::Double, STACK, TRAFFIC, R0);
        code.load(Size::Word, R3, R7, offset_of!(Flow, direction) as i16);
        code.op(Op::And, R3, DIRECTION as i32);
        code.op(Op::Add, R0, R3);
        code.store(Size::Double, STACK, SEEN, R0);
        code.load(Size::Double, R9, STACK, FLAGS);
        code.op(Op::Move, R1, R9);
        code.op(Op::And, R1, RST);
        code.jump_if(R1, If::NotEqual, 0, to_us);
        code.op(Op::And, R9, SYN | ACK);
        code.jump_if(R9, If::Equal, SYN | ACK, is_syn);
        code.op(Op::And, R9, SYN);
        code.jump_if(R9, If::NotEqual, 0, to_us);
        code.jump_if(R3, If::Equal, 0, is_answered);
        code.load(Size::Double, R1, R0, offset_of!(Traffic, seen_ns) as i16);
        code.jump_if(R1, If::Equal, 0, to_us);
        code.jump(is_answered);
        code.at(is_syn);
        code.jump_if(R3, If::Equal, 0, to_us);
        code.at(is_answered);
    }

    /// An ICMP error about a packet of a flow is ours to translate. R2: the packet's data.
    fn error(&mut self, headers: &Headers) {
        let Exits { go_on, to_us, .. } = self.exits.expect("it is set first");
        let quoted_at = IP_AT + headers.ip + ICMP_LENGTH;
        let (first, last) = headers.errors;
        let code = &mut self.code;
        code.load(Size::Byte, R1, R2, IP_AT + headers.ip);
        code.op(Op::Sub, R1, first);
        code.jump_if(R1, If::Above, last - first, go_on);
        self.data(quoted_at + headers.ip + ICMP_LENGTH, go_on);
        self.is_plain(headers, quoted_at, go_on);
        let code = &mut self.code;
        code.load(Size::Byte, R1, R2, quoted_at + headers.protocol);
        code.jump_if(R1, If::NotEqual, TCP, go_on);
        // It comes the other way: from where the quoted packet went.
        self.key(headers, quoted_at, true);
        self.flow(go_on);
        self.code.jump(to_us);
    }

    /// R2: the packet's data; it goes on elsewhere when there is less of it than this.
    fn data(&mut self, length: i16, otherwise: Label) {
        let code = &mut self.code;
        code.load(Size::Word, R2, R6, DATA);
        code.load(Size::Word, R3, R6, DATA_END);
        code.op(Op::Move, R4, R2);
        code.op(Op::Add, R4, i32::from(length));
        code.jump_if(R4, If::Above, R3, otherwise);
    }

    /// Without IPv4 options, and no fragment.
    fn is_plain(&mut self, headers: &Headers, at: i16, otherwise: Label) {
        if headers.family == Family::V4 {
            let code = &mut self.code;
            code.load(Size::Byte, R1, R2, at);
            code.jump_if(R1, If::NotEqual, 0x45, otherwise);
            code.load(Size::Half, R1, R2, at + 6);
            code.op(Op::And, R1, wire(0x3fff));
            code.jump_if(R1, If::NotEqual, 0, otherwise);
        }
    }

    /// Puts the key on the stack. R2: the packet's data.
    fn key(&mut self, headers: &Headers, ip_at: i16, reversed: bool) {
        let code = &mut self.code;
        let [source, destination, port] =
            [offset_of!(Ends, source), offset_of!(Ends, destination), offset_of!(Ends, ports)]
                .map(|at| KEY + at as i16);
        let (targets, ports) = ([source, destination], [port, port + 2]);
        for from in 0..2 {
            let to = if reversed { 1 - from } else { from };
            let at = ip_at + headers.source + from as i16 * headers.address;
            match headers.family {
                Family::V4 => {
                    code.store(Size::Double, STACK, targets[to], 0);
                    code.store(Size::Word, STACK, targets[to] + 8, i32::from_ne_bytes([0, 0, 0xff, 0xff]));
                    code.load(Size::Word, R1, R2, at);
                    code.store(Size::Word, STACK, targets[to] + 12, R1);
                }
                Family::V6 => {
                    for word in (0..16).step_by(4) {
                        code.load(Size::Word, R1, R2, at + word);
                        code.store(Size::Word, STACK, targets[to] + word, R1);
                    }
                }
            }
            code.load(Size::Half, R1, R2, ip_at + headers.ip + from as i16 * 2);
            code.store(Size::Half, STACK, ports[to], R1);
        }
    }

    /// Notes the packet, and what it says of the connection. R9: the time.
    fn count(&mut self) {
        let code = &mut self.code;
        let (is_no_fin, end) = (code.label(), code.label());
        code.load(Size::Double, R0, STACK, SEEN);
        code.load(Size::Word, R1, R6, LENGTH);
        code.op(Op::Sub, R1, i32::from(IP_AT));
        code.atomic(Atomic::Add, Size::Double, R0, offset_of!(Traffic, bytes) as i16, R1);
        code.op(Op::Move, R1, 1);
        code.atomic(Atomic::Add, Size::Word, R0, offset_of!(Traffic, packets) as i16, R1);
        code.store(Size::Double, R0, offset_of!(Traffic, seen_ns) as i16, R9);
        code.load(Size::Word, R1, STACK, ACKNOWLEDGED);
        code.store(Size::Word, R0, offset_of!(Traffic, acknowledged) as i16, R1);
        code.load(Size::Double, R2, STACK, FLAGS);
        code.op(Op::Move, R1, R2);
        code.op(Op::And, R1, FIN);
        code.jump_if(R1, If::Equal, 0, is_no_fin);
        // The first FIN of this direction, and the second of the connection?
        code.atomic(Atomic::Exchange, Size::Word, R0, offset_of!(Traffic, fin) as i16, R1);
        code.jump_if(R1, If::NotEqual, 0, end);
        code.load(Size::Double, R0, STACK, TRAFFIC);
        code.op(Op::Move, R1, 1);
        code.atomic(Atomic::FetchAdd, Size::Word, R0, offset_of!(Traffic, fins) as i16, R1);
        code.jump_if(R1, If::NotEqual, 1, end);
        self.add_to_endpoint(offset_of!(Carried, finished), end);
        let code = &mut self.code;
        code.jump(end);
        code.at(is_no_fin);
        code.op(Op::And, R2, SYN);
        code.jump_if(R2, If::Equal, 0, end);
        self.add_to_endpoint(offset_of!(Carried, answered), end);
        self.code.at(end);
    }

    /// Adds one to a count of the endpoint's.
    fn add_to_endpoint(&mut self, count: usize, otherwise: Label) {
        let [_, endpoints] = self.maps.arrays();
        self.element(endpoints, offset_of!(Flow, endpoint), otherwise);
        let code = &mut self.code;
        code.op(Op::Move, R1, 1);
        code.atomic(Atomic::Add, Size::Word, R0, count as i16, R1);
    }

    /// Changes the TCP checksum as addresses and ports are about to change. Of a partial one only the addresses are a part.
    fn checksum(&mut self, headers: &Headers, otherwise: Label) {
        let (addresses, ports) = (offset_of!(Flow, address_change), offset_of!(Flow, port_change));
        match headers.family {
            Family::V4 => self.change_checksum(headers, addresses, OF_PSEUDO_HEADER),
            Family::V6 => {
                // An IPv6 header has no checksum that would make up for it in what a device summed. Kernels before 6.16 do
                // not know the flag.
                self.change_checksum(headers, addresses, OF_PSEUDO_HEADER | OF_IPV6);
                let is_done = self.code.label();
                self.code.jump_if(R0, If::Equal, 0, is_done);
                self.change_checksum(headers, addresses, OF_PSEUDO_HEADER);
                self.code.at(is_done);
            }
        }
        self.code.jump_if(R0, If::NotEqual, 0, otherwise);
        self.change_checksum(headers, ports, 0);
    }

    fn change_checksum(&mut self, headers: &Headers, by: usize, flags: i32) {
        let code = &mut self.code;
        code.op(Op::Move, R1, R6);
        code.op(Op::Move, R2, i32::from(IP_AT + headers.ip) + 16);
        code.op(Op::Move, R3, 0);
        code.load(Size::Word, R4, R7, by as i16);
        code.op(Op::Move, R5, flags);
        code.call(CHANGE_CHECKSUM);
    }

    /// Writes hops, addresses, ports, and the hardware addresses of the way.
    fn rewrite(&mut self, headers: &Headers, otherwise: Label) {
        self.data(IP_AT + headers.ip + TCP_LENGTH, otherwise);
        let code = &mut self.code;
        if headers.family == Family::V4 {
            code.load(Size::Half, R1, R2, IP_AT + 10);
            code.op(Op::Xor, R1, 0xffff);
            code.load(Size::Word, R4, R7, offset_of!(Flow, address_change) as i16);
            code.op(Op::Add, R1, R4);
            code.op(Op::Add, R1, HOPS_CHECKSUM);
            for _ in 0..2 {
                code.op(Op::Move, R4, R1);
                code.op(Op::ShiftRight, R4, 16);
                code.op(Op::And, R1, 0xffff);
                code.op(Op::Add, R1, R4);
            }
            code.op(Op::Xor, R1, 0xffff);
            code.store(Size::Half, R2, IP_AT + 10, R1);
        }
        code.load(Size::Byte, R1, R2, IP_AT + headers.hop_limit);
        code.op(Op::Sub, R1, HOPS);
        code.store(Size::Byte, R2, IP_AT + headers.hop_limit, R1);
        let mut copy = |size: Size, from, from_at: usize, to: i16| {
            code.load(size, R1, from, from_at as i16);
            code.store(size, R2, to, R1);
        };
        let onward = offset_of!(Flow, onward);
        let addresses = [offset_of!(Ends, source), offset_of!(Ends, destination)].map(|at| onward + at);
        for (from, to) in addresses.into_iter().zip([headers.source, headers.source + headers.address]) {
            // An IPv4 address is the last four bytes.
            for word in (0..headers.address).step_by(4) {
                copy(Size::Word, R7, from + 16 - headers.address as usize + word as usize, IP_AT + to + word);
            }
        }
        let ports = onward + offset_of!(Ends, ports);
        copy(Size::Half, R7, ports, IP_AT + headers.ip);
        copy(Size::Half, R7, ports + 2, IP_AT + headers.ip + 2);
        for word in (0..12).step_by(4) {
            copy(Size::Word, R8, offset_of!(Way, header) + word, word as i16);
        }
    }
}

/// A number as it lies in memory when it is in network order on the wire.
fn wire(number: u16) -> i32 {
    i32::from(u16::from_ne_bytes(number.to_be_bytes()))
}
