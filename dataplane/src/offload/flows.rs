//! The flows that the program knows, in memory that it and we share: buckets of numbers, and what the numbers stand for. Only we
//! change the buckets, so that a flow comes and goes without a system call.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::atomic::{
    AtomicU32,
    Ordering::{Relaxed, Release},
};

use super::program::{INDEX, KEY, Writer};
use super::traffic::DIRECTION;
use crate::bpf::assembler::{Assembler, If, Label, Op, R0, R1, R2, R5, R7, R8, R9, STACK, Size};
use crate::bpf::{Map, MapKind};
use crate::flow::{Address, FlowKey};
use crate::memory::Region;
use crate::net::Direction;
use crate::packet::Translation;
use crate::packet::checksum::Change;
use crate::table::EndpointSlot;

/// [`Flow::fate`]: the program carries it; all of it comes to us; it is over, and the same packets may be of a connection that is none of
/// ours; and they were seen to be of such a one.
pub(super) const CARRIED: u32 = 0;
pub(super) const TO_US: u32 = 1;
pub(super) const OVER: u32 = 2;
pub(super) const NOT_OURS: u32 = 3;

/// A TCP flow's packets of one direction: how they come, and what becomes of them. Addresses and ports lie as in packets.
#[repr(C)]
pub(crate) struct Flow {
    pub(super) key: Ends,
    pub(super) onward: Ends,
    /// What the change of addresses, and that of ports, does to a checksum: sums of words as they lie in memory, of 16 bits.
    pub(super) address_change: AtomicU32,
    pub(super) port_change: AtomicU32,
    /// Where they are counted: the place, and the direction's part of it.
    pub(super) traffic: AtomicU32,
    pub(super) direction: AtomicU32,
    /// Where their endpoint is.
    pub(super) endpoint: AtomicU32,
    pub(super) fate: AtomicU32,
}

/// Both ends of a flow.
#[repr(C)]
pub(crate) struct Ends {
    pub(super) source: [AtomicU32; 4],
    pub(super) destination: [AtomicU32; 4],
    /// Source and destination.
    pub(super) ports: [AtomicU32; 1],
}

/// Numbers in a bucket, of a cache line.
const SLOTS: usize = 16;
/// What a slot has: the number of a flow, counted from one, below some bits of its hash. 0: nothing.
const NUMBER_BITS: u32 = 20;
/// So many bits of ports have one bucket.
const PORTS_BITS: i32 = 2;
type Bucket = [AtomicU32; SLOTS];

/// The flows by what their packets look like.
pub(super) struct Flows {
    buckets_map: Map<u32, Bucket>,
    flows_map: Map<u32, Flow>,
    buckets: Region<Bucket>,
    flows: Region<Flow>,
    /// Where each number is: one more than its slot, counted through all buckets. 0: nowhere.
    places: Region<AtomicU32>,
    seed: u64,
    factor: u64,
}

impl Flows {
    /// Room for so many. Buckets are filled to a quarter: ports that follow each other come four to a bucket.
    pub(super) fn new(flows: u32) -> io::Result<Self> {
        assert!(flows < 1 << NUMBER_BITS, "a slot has the number");
        let buckets = (4 * flows).next_power_of_two().div_ceil(SLOTS as u32);
        let buckets_map = Map::new(MapKind::Array, buckets, "sluice_buckets")?;
        let flows_map = Map::new(MapKind::Array, flows, "sluice_flows")?;
        let random = ahash::RandomState::new();
        Ok(Self {
            buckets: Region::of_kernel(buckets_map.descriptor(), buckets as usize)?,
            flows: Region::of_kernel(flows_map.descriptor(), flows as usize)?,
            places: Region::heap(flows as usize),
            buckets_map,
            flows_map,
            seed: random.hash_one(0),
            factor: random.hash_one(1) | 1,
        })
    }

    /// Writes what a number stands for, which must be in no bucket, and have been in none for longer than the program looks at one.
    pub(super) fn write(
        &self,
        number: u32,
        key: &FlowKey,
        to: &Translation,
        (place, direction): (u32, Direction),
        endpoint: EndpointSlot,
    ) {
        let flow = &self.flows[number as usize];
        let (mut addresses, mut ports) = (Change::default(), Change::default());
        addresses.replace(&key.source.bytes(), &to.source.bytes());
        addresses.replace(&key.destination.bytes(), &to.destination.bytes());
        ports.replace_word(key.source_port, to.source_port);
        ports.replace_word(key.destination_port, to.destination_port);
        let in_memory = |change: Change| u32::from(u16::from_ne_bytes(change.folded().to_be_bytes()));
        flow.key.write((key.source, key.source_port), (key.destination, key.destination_port));
        flow.onward.write((to.source, to.source_port), (to.destination, to.destination_port));
        for (word, value) in [
            (&flow.address_change, in_memory(addresses)),
            (&flow.port_change, in_memory(ports)),
            (&flow.traffic, place),
            (&flow.direction, (direction.index() * DIRECTION) as u32),
            (&flow.endpoint, endpoint.0),
        ] {
            word.store(value, Relaxed);
        }
    }

    /// What becomes of the packets from now on.
    pub(super) fn set_fate(&self, number: u32, fate: u32) {
        self.flows[number as usize].fate.store(fate, Relaxed);
    }

    /// What is carried is over.
    pub(super) fn set_over(&self, number: u32) {
        // The program may have seen already that it is none of ours any more.
        let _ = self.flows[number as usize].fate.compare_exchange(CARRIED, OVER, Relaxed, Relaxed);
    }

    /// Has the program find the flow. Returns whether there was room.
    pub(super) fn enter(&self, number: u32) -> bool {
        let (bucket, tag) = self.place_of(&self.flows[number as usize].key);
        let Some(slot) = self.buckets[bucket].iter().position(|slot| slot.load(Relaxed) == 0) else { return false };
        // What was written is there before it is found.
        self.buckets[bucket][slot].store(tag | (number + 1), Release);
        self.places[number as usize].store((bucket * SLOTS + slot + 1) as u32, Relaxed);
        true
    }

    /// The program finds the flow no more.
    pub(super) fn leave(&self, number: u32) {
        let place = self.places[number as usize].swap(0, Relaxed) as usize;
        if let Some(place) = place.checked_sub(1) {
            self.buckets[place / SLOTS][place % SLOTS].store(0, Relaxed);
        }
    }

    /// The bucket of a key, and what its slot has beside the number. Addresses scatter, and ports that follow each other are near each
    /// other: clients take them in turn, and so do we, and a bucket is found in the cache.
    fn place_of(&self, key: &Ends) -> (usize, u32) {
        let step = |hash: u64, half: u64| {
            let product = (hash ^ half).wrapping_mul(self.factor);
            product ^ product >> 32
        };
        let addresses = key.addresses().fold(self.seed, step);
        let ports = key.ports[0].load(Relaxed);
        let [a, b, c, d] = ports.to_ne_bytes();
        let sum = (u64::from(a) + u64::from(c)) * 256 + u64::from(b) + u64::from(d);
        let bucket = addresses.wrapping_add(sum >> PORTS_BITS) as usize & (self.buckets.len() - 1);
        (bucket, (step(addresses, ports.into()) >> (32 + NUMBER_BITS) << NUMBER_BITS) as u32)
    }
}

impl Ends {
    fn write(&self, (source, source_port): (Address, u16), (destination, destination_port): (Address, u16)) {
        let [[a, b], [c, d]] = [source_port, destination_port].map(u16::to_be_bytes);
        for (words, bytes) in [
            (&self.source[..], &source.bytes()[..]),
            (&self.destination, &destination.bytes()),
            (&self.ports, &[a, b, c, d]),
        ] {
            for (word, bytes) in words.iter().zip(bytes.as_chunks().0) {
                word.store(u32::from_ne_bytes(*bytes), Relaxed);
            }
        }
    }

    /// The addresses in words of 64 bits as they lie in memory.
    fn addresses(&self) -> impl Iterator<Item = u64> {
        let pairs = self.source.as_chunks::<2>().0.iter().chain(self.destination.as_chunks().0);
        pairs.map(|pair| {
            let [[a, b, c, d], [e, f, g, h]] = [&pair[0], &pair[1]].map(|word| word.load(Relaxed).to_ne_bytes());
            u64::from_ne_bytes([a, b, c, d, e, f, g, h])
        })
    }
}

impl Writer<'_> {
    /// R7: the flow of the key. Takes R8 and R9.
    pub(super) fn flow(&mut self, otherwise: Label) {
        let (flows, code) = (&self.maps.flows, &mut self.code);
        let (next, other, candidate) = (code.label(), code.label(), code.label());
        let ports = offset_of!(Ends, ports) as i16;
        // As above.
        code.wide(R0, flows.seed);
        code.wide(R5, flows.factor);
        let step = |code: &mut Assembler, size, at| {
            code.load(size, R1, STACK, KEY + at);
            code.op(Op::Xor, R0, R1);
            code.op(Op::Multiply, R0, R5);
            code.op(Op::Move, R1, R0);
            code.op(Op::ShiftRight, R1, 32);
            code.op(Op::Xor, R0, R1);
        };
        (0..ports).step_by(8).for_each(|at| step(code, Size::Double, at));
        code.op(Op::Move, R8, R0);
        step(code, Size::Word, ports);
        code.op(Op::ShiftRight, R0, 32 + NUMBER_BITS as i32);
        code.op(Op::ShiftLeft, R0, NUMBER_BITS as i32);
        code.op(Op::Move, R7, R0);
        let byte = |code: &mut Assembler, to, at| code.load(Size::Byte, to, STACK, KEY + ports + at);
        byte(code, R1, 0);
        byte(code, R2, 2);
        code.op(Op::Add, R1, R2);
        code.op(Op::ShiftLeft, R1, 8);
        for at in [1, 3] {
            byte(code, R2, at);
            code.op(Op::Add, R1, R2);
        }
        code.op(Op::ShiftRight, R1, PORTS_BITS);
        code.op(Op::Add, R8, R1);
        code.op(Op::And, R8, flows.buckets.len() as i32 - 1);
        code.store(Size::Word, STACK, INDEX, R8);
        self.at_index(flows.buckets_map.descriptor().as_raw_fd(), otherwise);
        let code = &mut self.code;
        code.op(Op::Move, R8, R0);
        code.op(Op::Move, R9, SLOTS as i32);
        code.at(next);
        code.load(Size::Word, R1, R8, 0);
        code.op(Op::Xor, R1, R7);
        code.op(Op::Sub, R1, 1);
        code.jump_if(R1, If::AtMost, (1 << NUMBER_BITS) - 2, candidate);
        code.at(other);
        code.op(Op::Add, R8, size_of::<AtomicU32>() as i32);
        code.op(Op::Sub, R9, 1);
        code.jump_if(R9, If::NotEqual, 0, next);
        code.jump(otherwise);
        code.at(candidate);
        code.store(Size::Word, STACK, INDEX, R1);
        self.at_index(flows.flows_map.descriptor().as_raw_fd(), other);
        let code = &mut self.code;
        for (size, at) in (0..ports).step_by(8).map(|at| (Size::Double, at)).chain([(Size::Word, ports)]) {
            code.load(size, R1, R0, offset_of!(Flow, key) as i16 + at);
            code.load(size, R2, STACK, KEY + at);
            code.jump_if(R1, If::NotEqual, R2, other);
        }
        code.op(Op::Move, R7, R0);
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::net::Protocol;

    #[test]
    fn what_left_makes_room() {
        let flows = match Flows::new(8 * SLOTS as u32) {
            Ok(flows) => flows,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return eprintln!("not tested: needs CAP_BPF");
            }
            Err(error) => panic!("{error}"),
        };
        let address = |last| Address::from(IpAddr::from([10, 0, 0, last]));
        // All with one key, so in one bucket.
        let key = FlowKey {
            protocol: Protocol::Tcp,
            source: address(1),
            source_port: 7,
            destination: address(2),
            destination_port: 80,
        };
        let to = Translation { source: address(3), source_port: 8, destination: address(4), destination_port: 81 };
        for number in 0..=SLOTS as u32 {
            flows.write(number, &key, &to, (number / 2, Direction::Request), EndpointSlot(0));
            assert_eq!(flows.enter(number), number < SLOTS as u32, "{number}");
        }
        flows.leave(SLOTS as u32);
        assert!(!flows.enter(SLOTS as u32), "what was not there left no room");
        flows.leave(3);
        assert!(flows.enter(SLOTS as u32) && !flows.enter(3));
        let used = flows.buckets.iter().flatten().filter(|slot| slot.load(Relaxed) != 0).count();
        assert_eq!(used, SLOTS);
    }
}
