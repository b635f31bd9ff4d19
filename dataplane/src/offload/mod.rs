//! The kernel's short cut: a program at the ingress of links carries the TCP segments of flows that were decided about here, so that
//! they cost no system call and no wake-up. "Userspace decides, the kernel forwards": what begins a connection or breaks it off
//! still comes to the packet threads, and so does everything that the program does not know a way for.
//!
//! A flow is *held* while the program brings us all its replies, and *carried* while it sends its segments on. It stays attached
//! when this process dies: then it goes on with what it knows until the next process puts its own program in its place, and
//! reads what the last one saw.

mod flows;
mod maps;
mod program;
mod traffic;

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bpf::{self, ProgramKind};
use crate::flow::{Address, FlowFields};
use crate::memory::Region;
use crate::net::Direction;
use crate::packet_path::Way;
use crate::table::EndpointSlot;
pub(crate) use flows::Flow;
use maps::{HARDWARE, Maps};
pub(crate) use traffic::{Carried, Course, FlowTraffic, Seen};

/// Most flows that the program knows at a time, whose memory is taken at the start; all others take the packet threads' way.
const MOST_FLOWS: usize = 1 << 17;
/// Milliseconds without a packet after which a connection that both ends have closed is carried no more.
const REST_MS: u64 = 50;
/// A place is another flow's only after so many others were: the program may be looking at it still.
const RESTING: usize = 1024;
/// What our programs are called: the one at links, and the one at the TUN link.
const NAME: &str = "sluice_offload";
const MARKING: &str = "sluice_marking";

/// How far a flow is the program's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// It does not know it.
    None,
    /// It brings us the replies.
    Held,
    /// It sends on what is plain.
    Carried,
}

/// What is in [`Offload::places`] of a flow that the program does not know; else twice its place, and whether it is carried.
const NONE: u32 = 0;

/// The program and its maps.
pub struct Offload {
    maps: Maps,
    program: OwnedFd,
    number: u32,
    /// By record number: how far the flow is the program's, and its place: where it is counted, and half the number of its first entry.
    places: Region<AtomicU32>,
    free: Mutex<Free>,
    /// Addresses whose ways it knows.
    ways: Mutex<HashSet<IpAddr>>,
    /// Links that it is attached to.
    links: Mutex<BTreeSet<u32>>,
    /// What the last process' program sees, at the start; and what it saw, once ours is in its place.
    before: Mutex<Option<Region<FlowTraffic>>>,
    inherited: Mutex<Option<Region<FlowTraffic>>>,
    packets: AtomicU64,
    /// Flows that are carried.
    carried: AtomicU32,
}

/// Places that no flow has.
#[derive(Default)]
struct Free {
    places: VecDeque<u32>,
    /// Places ever used; the first is none.
    used: u32,
}

impl Offload {
    /// Loads the program; it is attached to no link but the TUN link. `tun`: number of that; `mark`: what marks packets from there that
    /// connection tracking is to leave alone; `flow_capacity`: most flows; `links`: where the last process' program may be. Fails
    /// with `PermissionDenied` without `CAP_BPF` and `CAP_NET_ADMIN`, with `InvalidInput` before Linux 6.6.
    pub fn new(tun: u32, mark: u32, flow_capacity: usize, links: impl IntoIterator<Item = u32>) -> io::Result<Self> {
        let maps = Maps::new(flow_capacity.clamp(1, MOST_FLOWS) as u32)?;
        let code = program::program(&maps, tun);
        let program = bpf::load(ProgramKind::Classifier, &code, NAME)?;
        let (number, _) = bpf::identity(&program)?;
        let marking = bpf::load(ProgramKind::Classifier, &program::marking(&maps, mark), MARKING)?;
        put_at(tun, &marking, MARKING)?;
        let before = links.into_iter().find_map(|link| ours(&bpf::attached(link).ok()?, NAME));
        Ok(Self {
            maps,
            program,
            number,
            places: Region::heap(flow_capacity.max(1)),
            free: Mutex::default(),
            ways: Mutex::default(),
            links: Mutex::default(),
            before: Mutex::new(before.and_then(|before| maps::traffic_of(&before).ok())),
            inherited: Mutex::default(),
            packets: AtomicU64::new(0),
            carried: AtomicU32::new(0),
        })
    }

    /// Attaches the program to these links, where it is not, in place of the last process' one where that is there. Returns whether
    /// it was missing where it had been. Kernels before 6.6 refuse with `InvalidInput`.
    pub fn follow(&self, links: &BTreeSet<u32>) -> io::Result<bool> {
        let mut attached = BTreeSet::new();
        let (mut was_missing, mut before) = (false, None);
        let result = links.iter().try_for_each(|link| {
            let there = bpf::attached(*link)?;
            if !there.contains(&self.number) {
                was_missing |= lock(&self.links).contains(link);
                if let Some(other) = put_at(*link, &self.program, NAME)? {
                    before = Some(other);
                }
            }
            attached.insert(*link);
            Ok(())
        });
        *lock(&self.links) = attached;
        if let Some(before) = before {
            match maps::traffic_of(&before) {
                Ok(traffic) => *lock(&self.inherited) = Some(traffic),
                Err(error) => tracing::warn!(%error, "what the last process' program saw of connections is not known"),
            }
        }
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
        (self.packets.load(Relaxed), u64::from(self.carried.load(Relaxed)))
    }

    /// The flows that the last process' program knew at the start, once: number of the record, and of its life.
    pub(crate) fn known_before(&self) -> Vec<(u32, u32)> {
        let before = lock(&self.before).take();
        before.iter().flat_map(|traffic| traffic.iter()).filter_map(FlowTraffic::owner).collect()
    }

    /// What was seen of endpoints' connections.
    pub(crate) fn endpoints(&self) -> Arc<Region<Carried>> {
        Arc::clone(&self.maps.endpoints)
    }

    /// What the last process' program saw of flows, once: [`FlowTraffic::owner`] says whose each is.
    pub(crate) fn take_inherited(&self) -> Option<Region<FlowTraffic>> {
        lock(&self.inherited).take()
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
        let until_ns = until_ms * 1_000_000;
        let to_peer = u32::from(way.is_pair);
        let value = maps::Way { until_ns, link: way.link, mtu: way.mtu, header, to_peer };
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
        match self.place(record) {
            NONE => Level::None,
            place if place & 1 == 0 => Level::Held,
            _ => Level::Carried,
        }
    }

    /// What is seen of a flow, while it is carried.
    pub(crate) fn traffic(&self, record: u32) -> Option<&FlowTraffic> {
        let place = self.place(record);
        (place & 1 == 1).then(|| &self.maps.traffic[place as usize / 2])
    }

    /// Whether nothing was seen of a carried flow for so long that nothing is under way any more, as a rule.
    pub(crate) fn rests(&self, record: u32, now_ms: u64) -> bool {
        let last =
            |traffic: &FlowTraffic| traffic.directions.each_ref().map(|it| it.seen_ns.load(Relaxed)).into_iter().max();
        let last_ms = self.traffic(record).and_then(last).unwrap_or(0) / 1_000_000;
        now_ms >= last_ms + REST_MS
    }

    /// Has the program bring us the replies of a TCP flow that it does not know. Only for the holder of the flow table's lock. Returns
    /// whether it does.
    pub(crate) fn hold(&self, record: u32, fields: &FlowFields, masquerade: &[Address]) -> bool {
        let has_cell = (record as usize) < self.places.len();
        let Some(place) = has_cell.then(|| self.take_place()).flatten() else { return false };
        for direction in [Direction::Request, Direction::Reply] {
            let (key, to) = (fields.key(direction, masquerade), fields.translation(direction, masquerade));
            self.maps.flows.write(entry(place, direction), &key, &to, (place, direction), fields.endpoint_slot);
            self.maps.flows.set_fate(entry(place, direction), flows::TO_US);
        }
        let is_found = self.maps.flows.enter(entry(place, Direction::Reply));
        match is_found {
            true => self.set_place(record, 2 * place),
            false => self.give_back(place),
        }
        is_found
    }

    /// Has the program carry a TCP flow of this life that is held; `is_answered`: its endpoint has accepted it. Only for the holder of the
    /// flow table's lock.
    pub(crate) fn carry(&self, (record, life): (u32, u32), is_answered: bool) {
        let place = self.place(record) / 2;
        if !self.maps.flows.enter(entry(place, Direction::Request)) {
            return;
        }
        self.maps.traffic[place as usize].begin(record, life, is_answered);
        // Replies first: none may come to us when requests do not.
        for direction in [Direction::Reply, Direction::Request] {
            self.maps.flows.set_fate(entry(place, direction), flows::CARRIED);
        }
        self.carried.fetch_add(1, Relaxed);
        self.set_place(record, 2 * place + 1);
    }

    /// A flow that was carried is over; its replies come to us as yet. Only for the holder of the flow table's lock, who then
    /// calls [`Offload::release`].
    pub(crate) fn divert(&self, record: u32) {
        let place = self.place(record) / 2;
        self.maps.flows.leave(entry(place, Direction::Request));
        self.maps.flows.set_over(entry(place, Direction::Reply));
    }

    /// Has the program forget a flow that it knows. Only for the holder of the flow table's lock, who then calls
    /// [`Offload::release`].
    pub(crate) fn remove(&self, record: u32) {
        let place = self.place(record) / 2;
        for direction in [Direction::Request, Direction::Reply] {
            self.maps.flows.leave(entry(place, direction));
        }
    }

    /// The flow is not carried any more; `is_held`: the program knows it still. Only for the holder of the flow table's lock.
    pub(crate) fn release(&self, record: u32, endpoint: EndpointSlot, is_held: bool) {
        let place = self.place(record) / 2;
        if let Some(traffic) = self.traffic(record) {
            self.note_end(traffic, endpoint);
            traffic.directions[0].owner.store(0, Relaxed);
            self.carried.fetch_sub(1, Relaxed);
        }
        if is_held {
            return self.set_place(record, 2 * place);
        }
        self.set_place(record, NONE);
        self.give_back(place);
    }

    /// The flow is known to be over: it is not to be taken off the endpoint's active ones any more, if the program did so.
    pub(crate) fn note_end(&self, traffic: &FlowTraffic, endpoint: EndpointSlot) {
        if traffic.directions[0].fins.compare_exchange(2, 0, Relaxed, Relaxed).is_ok() {
            self.maps.endpoints[endpoint.0 as usize].finished.fetch_sub(1, Relaxed);
        }
    }

    /// Adds to the packets that were counted.
    pub(crate) fn add(&self, packets: u32) {
        self.packets.fetch_add(u64::from(packets), Relaxed);
    }

    /// The flows of which something was seen since it was last asked for: number of the record, and of its life.
    pub(crate) fn seen(&self) -> impl Iterator<Item = (u32, u32)> {
        let used = if self.carried.load(Relaxed) == 0 { 0 } else { lock(&self.free).used as usize + 1 };
        self.maps.traffic[..used].iter().filter(|traffic| traffic.has_news()).filter_map(FlowTraffic::owner)
    }

    fn take_place(&self) -> Option<u32> {
        let mut free = lock(&self.free);
        let is_new = (free.used as usize) + 1 < self.maps.traffic.len();
        if is_new && free.places.len() <= RESTING {
            free.used += 1;
            return Some(free.used);
        }
        free.places.pop_front()
    }

    fn give_back(&self, place: u32) {
        lock(&self.free).places.push_back(place);
    }

    /// Records of an earlier process with a larger table are beyond ours.
    fn place(&self, record: u32) -> u32 {
        self.places.get(record as usize).map_or(NONE, |place| place.load(Relaxed))
    }

    fn set_place(&self, record: u32, place: u32) {
        self.places[record as usize].store(place, Relaxed);
    }
}

/// The number of a direction's entry.
fn entry(place: u32, direction: Direction) -> u32 {
    2 * place + direction.index() as u32
}

/// Takes our programs, of whatever process, off a link. Returns whether one was there. Needs `CAP_SYS_ADMIN`.
pub fn clear(link: u32) -> io::Result<bool> {
    let mut was_there = false;
    for name in [NAME, MARKING] {
        // A kernel that cannot attach them, or does not let us look, has none of ours.
        while let Some(program) = bpf::attached(link).ok().and_then(|there| ours(&there, name)) {
            bpf::detach(link, &program)?;
            was_there = true;
        }
    }
    Ok(was_there)
}

/// Attaches a program to a link, in place of another of this name, which is returned.
fn put_at(link: u32, program: &OwnedFd, name: &str) -> io::Result<Option<OwnedFd>> {
    let other = ours(&bpf::attached(link)?, name);
    match &other {
        Some(other) => bpf::replace(link, program, other)?,
        None => bpf::attach(link, program)?,
    }
    Ok(other)
}

/// The first of these programs that is ours by name. Those that may not be looked at are not.
fn ours(programs: &[u32], name: &str) -> Option<OwnedFd> {
    let named = |program: &OwnedFd| bpf::identity(program).is_ok_and(|(_, its)| its == name);
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
        let code = program::program(&maps, 1);
        for code in [code, program::marking(&maps, 7)] {
            let loaded = bpf::load(ProgramKind::Classifier, &code, NAME);
            assert!(loaded.is_ok(), "{}", bpf::verdict(ProgramKind::Classifier, &code));
            assert_eq!(bpf::identity(&loaded.unwrap()).unwrap().1, NAME);
        }
    }
}
