//! The kernel's short cut: a program at the ingress of links carries the plain TCP segments of flows that were decided about here,
//! so that they cost no system call and no wake-up. "Userspace decides, the kernel forwards": what begins and ends a connection
//! still comes to the packet threads, and so does everything that the program does not know a way for.
//!
//! A flow is *held* while the program brings us all its replies, and *carried* while it sends its segments on. It stays attached
//! when this process dies: then it goes on with what it knows until the next process puts its own program in its place.

mod maps;
mod program;

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bpf::{self, ProgramKind};
use crate::flow::{Address, FlowFields, Source};
use crate::net::{Direction, Protocol};
use crate::packet_path::Way;
pub(crate) use maps::Traffic;
use maps::{Flow, HARDWARE, Key, Maps};

/// Flows that may be carried: those with the lowest record numbers, which are used first.
pub const MOST_FLOWS: usize = 1 << 18;
/// What our program is called.
const NAME: &str = "sluice_offload";

/// How far a flow is the program's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Level {
    /// It does not know it.
    None,
    /// It brings us the replies.
    Held,
    /// It sends on what is plain.
    Carried,
}

/// What was seen of one direction of a flow since it was last asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    /// Milliseconds of the monotonic clock; 0 = nothing was seen.
    pub(crate) last_ms: u64,
    /// The last acknowledgement number; 0 = nothing was seen.
    pub(crate) acknowledged: u32,
}

/// The program and its maps.
pub struct Offload {
    maps: Maps,
    program: OwnedFd,
    number: u32,
    levels: Box<[AtomicU8]>,
    /// Addresses whose ways it knows.
    ways: Mutex<HashSet<IpAddr>>,
    /// Links that it is attached to.
    links: Mutex<BTreeSet<u32>>,
    carried: AtomicU64,
    packets: AtomicU64,
}

impl Offload {
    /// Loads the program; it is attached nowhere yet. `tun`: number of the link of the packet threads; `flow_capacity`: most
    /// flows. Fails with `PermissionDenied` without `CAP_BPF` and `CAP_NET_ADMIN`.
    pub fn new(tun: u32, flow_capacity: usize) -> io::Result<Self> {
        let flows = flow_capacity.clamp(1, MOST_FLOWS);
        let maps = Maps::new(flows as u32)?;
        let code = program::program(&maps.descriptors(), tun);
        let program = bpf::load(ProgramKind::Classifier, &code, NAME)?;
        let (number, _) = bpf::identity(&program)?;
        Ok(Self {
            maps,
            program,
            number,
            levels: (0..flows).map(|_| AtomicU8::new(Level::None as u8)).collect(),
            ways: Mutex::default(),
            links: Mutex::default(),
            carried: AtomicU64::new(0),
            packets: AtomicU64::new(0),
        })
    }

    /// Attaches the program to these links, where it is not, in place of the last process' one where that is there. Returns whether
    /// it was missing where it had been. Kernels before 6.6 refuse with `InvalidInput`.
    pub fn follow(&self, links: &BTreeSet<u32>) -> io::Result<bool> {
        let mut attached = BTreeSet::new();
        let mut was_missing = false;
        let result = links.iter().try_for_each(|link| {
            let there = bpf::attached(*link)?;
            if !there.contains(&self.number) {
                was_missing |= lock(&self.links).contains(link);
                match ours(&there) {
                    Some(other) => bpf::replace(*link, &self.program, &other)?,
                    None => bpf::attach(*link, &self.program)?,
                }
            }
            attached.insert(*link);
            Ok(())
        });
        *lock(&self.links) = attached;
        result.map(|()| was_missing)
    }

    /// Takes the program off all links. Returns whether it was attached to any.
    pub fn detach(&self) -> bool {
        let links = std::mem::take(&mut *lock(&self.links));
        // A link may be gone, and the program with it.
        links.iter().filter(|link| bpf::detach(**link, &self.program).is_ok()).count() > 0
    }

    /// Packets that the program sent on so far, as far as they were counted, and flows that it carries.
    pub fn totals(&self) -> (u64, u64) {
        (self.packets.load(Relaxed), self.carried.load(Relaxed))
    }

    /// Whether the program sees what comes in by this link.
    pub(crate) fn is_at(&self, link: u32) -> bool {
        lock(&self.links).contains(&link)
    }

    /// Tells the program how packets to this address leave; without a way they come to us.
    pub(crate) fn set_way(&self, address: IpAddr, way: Option<&Way>, until_ms: u64) {
        let mut ways = lock(&self.ways);
        let key = maps::address(address);
        let Some(way) = way else {
            if ways.remove(&address) {
                self.remove_way(address);
            }
            return;
        };
        let mut header = [0; HARDWARE];
        header.copy_from_slice(&way.header[..HARDWARE]);
        let value = maps::Way { until_ns: until_ms * 1_000_000, link: way.link, mtu: way.mtu, header, gap: 0 };
        if self.maps.ways.put(&key, &value).is_ok() {
            ways.insert(address);
            return;
        }
        // It is full, or the old way stands there: all are learned again.
        ways.insert(address);
        self.remove_ways(&mut ways);
    }

    /// The program knows no way.
    pub(crate) fn forget_ways(&self) {
        self.remove_ways(&mut lock(&self.ways));
    }

    fn remove_ways(&self, ways: &mut HashSet<IpAddr>) {
        ways.drain().for_each(|address| self.remove_way(address));
    }

    fn remove_way(&self, address: IpAddr) {
        if let Err(error) = self.maps.ways.remove(&maps::address(address)) {
            // It is not used beyond its time, which is some seconds.
            tracing::warn!(%error, %address, "the kernel keeps the way of an address");
        }
    }

    /// How far a flow is the program's.
    pub(crate) fn level(&self, record: u32) -> Level {
        match self.levels.get(record as usize).map(|level| level.load(Relaxed)) {
            Some(1) => Level::Held,
            Some(2) => Level::Carried,
            _ => Level::None,
        }
    }

    /// Has the program bring us the replies of a TCP flow, or carry it. Only for the holder of the flow table's lock. Returns whether
    /// it does.
    pub(crate) fn begin(&self, record: u32, fields: &FlowFields, masquerade: &[Address], level: Level) -> bool {
        let before = self.level(record);
        if record as usize >= self.levels.len() || fields.request.protocol != Protocol::Tcp || before >= level {
            return before >= level;
        }
        for direction in [Direction::Request, Direction::Reply] {
            let _ = self.take(record, direction);
            self.traffic(record, direction).acknowledged.store(0, Relaxed);
        }
        let is_carried = level == Level::Carried;
        // Replies first: none may pass by when requests do.
        let done = self.put(record, fields, masquerade, Direction::Reply, !is_carried).and_then(|()| {
            if is_carried { self.put(record, fields, masquerade, Direction::Request, false) } else { Ok(()) }
        });
        match done {
            Ok(()) => {
                self.carried.fetch_add(u64::from(is_carried), Relaxed);
                self.set_level(record, level);
                true
            }
            Err(error) => {
                tracing::debug!(%error, "a flow is not carried by the kernel");
                self.set_level(record, level);
                self.end(record, fields, masquerade);
                false
            }
        }
    }

    /// Has all packets of a flow come to us: it is over but for the last of them. Only for the holder of the flow table's lock.
    pub(crate) fn stop(&self, record: u32, fields: &FlowFields, masquerade: &[Address]) {
        if self.level(record) != Level::Carried {
            return;
        }
        if fields.source != Source::Preserved {
            return self.end(record, fields, masquerade);
        }
        // Nothing but the program tells those replies from others.
        self.remove(fields, masquerade, Direction::Request);
        if self.put(record, fields, masquerade, Direction::Reply, true).is_err() {
            return self.end(record, fields, masquerade);
        }
        self.carried.fetch_sub(1, Relaxed);
        self.set_level(record, Level::Held);
    }

    /// Has the program forget a flow. Only for the holder of the flow table's lock.
    pub(crate) fn end(&self, record: u32, fields: &FlowFields, masquerade: &[Address]) {
        let level = self.level(record);
        if level == Level::None {
            return;
        }
        for direction in [Direction::Request, Direction::Reply] {
            self.remove(fields, masquerade, direction);
        }
        self.carried.fetch_sub(u64::from(level == Level::Carried), Relaxed);
        self.set_level(record, Level::None);
    }

    /// Whether a segment of this direction was sent on since the last [`Offload::take`].
    pub(crate) fn has_seen(&self, record: u32, direction: Direction) -> bool {
        self.traffic(record, direction).packets.load(Relaxed) != 0
    }

    /// What was seen of a direction since this was last asked for.
    pub(crate) fn take(&self, record: u32, direction: Direction) -> Seen {
        let traffic = self.traffic(record, direction);
        let packets = traffic.packets.swap(0, Relaxed);
        if packets == 0 {
            return Seen::default();
        }
        self.packets.fetch_add(packets, Relaxed);
        Seen {
            bytes: traffic.bytes.swap(0, Relaxed),
            packets,
            last_ms: traffic.seen_ns.load(Relaxed) / 1_000_000,
            acknowledged: u32::from_be(traffic.acknowledged.load(Relaxed)),
        }
    }

    fn traffic(&self, record: u32, direction: Direction) -> &Traffic {
        &self.maps.traffic[2 * record as usize + direction.index()]
    }

    fn set_level(&self, record: u32, level: Level) {
        self.levels[record as usize].store(level as u8, Relaxed);
    }

    fn put(
        &self,
        record: u32,
        fields: &FlowFields,
        masquerade: &[Address],
        direction: Direction,
        to_us: bool,
    ) -> io::Result<()> {
        let key = fields.key(direction, masquerade);
        let traffic = 2 * record + direction.index() as u32;
        let flow = Flow::new(&key, &fields.translation(direction, masquerade), traffic, to_us);
        self.maps.flows.put(&Key::from(&key), &flow)
    }

    fn remove(&self, fields: &FlowFields, masquerade: &[Address], direction: Direction) {
        if let Err(error) = self.maps.flows.remove(&Key::from(&fields.key(direction, masquerade))) {
            tracing::error!(%error, "the kernel keeps a flow that is over");
        }
    }
}

/// Takes our program, of whatever process, off a link. Returns whether it was there. Needs `CAP_SYS_ADMIN`.
pub fn clear(link: u32) -> io::Result<bool> {
    let mut was_there = false;
    while let Some(program) = ours(&bpf::attached(link)?) {
        bpf::detach(link, &program)?;
        was_there = true;
    }
    Ok(was_there)
}

/// The first of these programs that is ours by name. Those that may not be looked at are not.
fn ours(programs: &[u32]) -> Option<OwnedFd> {
    let named = |program: &OwnedFd| bpf::identity(program).is_ok_and(|(_, name)| name == NAME);
    programs.iter().filter_map(|number| bpf::program(*number).ok()).find(named)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that runs under a lock panics half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_the_program() {
        let maps = match Maps::new(16) {
            Ok(maps) => maps,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return eprintln!("not tested: needs CAP_BPF");
            }
            Err(error) => panic!("{error}"),
        };
        let code = program::program(&maps.descriptors(), 1);
        let loaded = bpf::load(ProgramKind::Classifier, &code, NAME);
        assert!(loaded.is_ok(), "{}", bpf::verdict(ProgramKind::Classifier, &code));
        assert_eq!(bpf::identity(&loaded.unwrap()).unwrap().1, NAME);
    }
}
