//! By which link packets to an address leave, and with which hardware addresses: what the kernel's routes and neighbours said a
//! moment ago. Packet threads read it without a lock; who answers their questions writes it.

use std::io;
use std::net::IpAddr;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::flow::Address;
use crate::offload::Offload;

/// Bytes of an Ethernet header (IEEE 802.3): receiver, sender, type.
pub const ETHERNET: usize = 14;
/// Places for addresses: 64 bytes each.
const PLACES: usize = 16_384;
/// Places that an address may have.
const CHOICE: usize = 4;
/// Milliseconds between two questions about addresses that share places.
const ASK_INTERVAL_MS: u64 = 20;

/// How a packet leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Number of the link.
    pub link: u32,
    /// Longest IP packet that the link takes, in bytes.
    pub mtu: u32,
    /// What goes before the packet.
    pub header: [u8; ETHERNET],
    /// The link is one end of a pair (veth) whose other end is in another network namespace.
    pub is_pair: bool,
}

/// What was said of an address. All zero: nothing yet.
#[derive(Default)]
#[repr(align(64))]
struct Place {
    /// Odd while the rest is written.
    version: AtomicU64,
    address: [AtomicU64; 2],
    /// Link in the upper half, whether it is a pair's in the next bit, MTU in the others; zero: packets go the kernel's way.
    link: AtomicU64,
    header: [AtomicU64; 2],
    /// When it must be asked again, in milliseconds of the monotonic clock.
    until_ms: AtomicU64,
    /// When it was last asked. Of the first place of an address: for all of them.
    asked_ms: AtomicU64,
}

const _: () = assert!(size_of::<Place>() == 64);

/// The bit that says that a link is a pair's.
const PAIR: u32 = 1 << 31;

fn pair(way: &Way) -> u32 {
    if way.is_pair { PAIR } else { 0 }
}

impl Place {
    fn is_of(&self, address: [u64; 2]) -> bool {
        self.address[0].load(Relaxed) == address[0] && self.address[1].load(Relaxed) == address[1]
    }

    /// What is said, and until when it holds: one consistent copy.
    fn read(&self, address: [u64; 2]) -> Option<(Option<Way>, u64)> {
        let version = self.version.load(Acquire);
        let is_of = self.is_of(address);
        let (link, until_ms) = (self.link.load(Relaxed), self.until_ms.load(Relaxed));
        let words = [self.header[0].load(Relaxed), self.header[1].load(Relaxed)];
        fence(Acquire);
        if !version.is_multiple_of(2) || self.version.load(Relaxed) != version || !is_of {
            return None;
        }
        let mut header = [0; ETHERNET];
        header[..8].copy_from_slice(&words[0].to_ne_bytes());
        header[8..].copy_from_slice(&words[1].to_ne_bytes()[..ETHERNET - 8]);
        let way = Way { link: (link >> 32) as u32, mtu: link as u32 & !PAIR, header, is_pair: link as u32 & PAIR != 0 };
        Some(((link != 0).then_some(way), until_ms))
    }

    /// Only for the holder of the writers' lock.
    fn write(&self, address: [u64; 2], way: Option<&Way>, until_ms: u64) {
        let version = self.version.load(Relaxed);
        self.version.store(version + 1, Relaxed);
        fence(Release);
        let (link, header) = way.map_or((0, [0; ETHERNET]), |way| {
            (u64::from(way.link) << 32 | u64::from(way.mtu & !PAIR | pair(way)), way.header)
        });
        let mut words = [[0; 8]; 2];
        words.as_flattened_mut()[..ETHERNET].copy_from_slice(&header);
        for (to, from) in self.address.iter().zip(address).chain(self.header.iter().zip(words.map(u64::from_ne_bytes)))
        {
            to.store(from, Relaxed);
        }
        self.link.store(link, Relaxed);
        self.until_ms.store(until_ms, Relaxed);
        self.version.store(version + 2, Release);
    }
}

/// What is known of ways, and questions about the rest.
pub struct Ways {
    places: Box<[Place]>,
    hasher: ahash::RandomState,
    writers: Mutex<()>,
    ask: UnixDatagram,
    asked: UnixDatagram,
    offload: OnceLock<Arc<Offload>>,
}

impl Ways {
    /// Nothing is known.
    pub fn new() -> io::Result<Self> {
        let (ask, asked) = UnixDatagram::pair()?;
        ask.set_nonblocking(true)?;
        asked.set_nonblocking(true)?;
        Ok(Self {
            places: std::iter::repeat_with(Place::default).take(PLACES).collect(),
            hasher: ahash::RandomState::new(),
            writers: Mutex::default(),
            ask,
            asked,
            offload: OnceLock::new(),
        })
    }

    /// From now on this learns all answers too. Once only.
    pub fn tell(&self, offload: Arc<Offload>) {
        // There is one program.
        let _ = self.offload.set(offload);
    }

    /// The other end of questions: each is a datagram that [`Ways::question`] reads. Does not block.
    pub fn questions(&self) -> io::Result<UnixDatagram> {
        self.asked.try_clone()
    }

    /// The address that a question is about.
    pub fn question(datagram: &[u8]) -> Option<IpAddr> {
        Some(Address::from_v6(datagram.try_into().ok()?).ip())
    }

    /// How packets to this address leave, if not the kernel's way. Asks, where that is not known.
    pub(super) fn find(&self, address: Address, now_ms: u64) -> Option<Way> {
        let (words, places) = (address.words(), self.places_of(address));
        let known = places.iter().find(|place| place.is_of(words)).and_then(|place| place.read(words));
        if let Some((way, _)) = known.filter(|(_, until_ms)| now_ms < *until_ms) {
            return way;
        }
        let asked_ms = &places[0].asked_ms;
        if now_ms.saturating_sub(asked_ms.load(Relaxed)) >= ASK_INTERVAL_MS {
            asked_ms.store(now_ms, Relaxed);
            // When there are too many questions, the next packet asks again.
            let _ = self.ask.send(&address.bytes());
        }
        None
    }

    /// How packets to this address left when that was last known; it may be so no longer.
    pub(super) fn last(&self, address: Address) -> Option<Way> {
        let words = address.words();
        self.places_of(address).iter().find(|place| place.is_of(words)).and_then(|place| place.read(words))?.0
    }

    /// Answers: packets to this address leave so, or the kernel's way, until then (milliseconds of the monotonic clock).
    pub fn answer(&self, address: IpAddr, way: Option<&Way>, until_ms: u64) {
        let address = Address::from(address);
        let _lock = self.lock();
        let (words, places) = (address.words(), self.places_of(address));
        let oldest = || places.iter().min_by_key(|place| place.until_ms.load(Relaxed));
        if let Some(place) = places.iter().find(|place| place.is_of(words)).or_else(oldest) {
            place.write(words, way, until_ms);
        }
        self.offload.get().inspect(|offload| offload.set_way(address.ip(), way, until_ms));
    }

    /// Packets to this address go the kernel's way until an answer comes.
    pub fn forget(&self, address: IpAddr) {
        let address = Address::from(address);
        let _lock = self.lock();
        self.places_of(address).iter().filter(|place| place.is_of(address.words())).for_each(Self::end);
        self.offload.get().inspect(|offload| offload.set_way(address.ip(), None, 0));
    }

    /// All packets do.
    pub fn forget_all(&self) {
        let _lock = self.lock();
        self.places.iter().for_each(Self::end);
        self.offload.get().inspect(|offload| offload.forget_ways());
    }

    fn end(place: &Place) {
        place.until_ms.store(0, Relaxed);
    }

    fn places_of(&self, address: Address) -> &[Place] {
        let at = self.hasher.hash_one(address) as usize % (PLACES / CHOICE) * CHOICE;
        &self.places[at..at + CHOICE]
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ()> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(link: u32) -> Way {
        let header = std::array::from_fn(|at| (at as u8).wrapping_add(link as u8));
        Way { link, mtu: 1500, header, is_pair: link.is_multiple_of(2) }
    }

    #[test]
    fn what_is_not_known_is_asked_for_once_in_a_while() {
        let ways = Ways::new().unwrap();
        let (address, questions) = ("10.244.0.1".parse().unwrap(), ways.questions().unwrap());
        let mut datagram = [0; 64];
        let mut question = || questions.recv(&mut datagram).ok().and_then(|length| Ways::question(&datagram[..length]));
        assert_eq!(ways.find(Address::from(address), 1_000), None);
        assert_eq!(ways.find(Address::from(address), 1_001), None);
        assert_eq!((question(), question()), (Some(address), None));
        assert_eq!(ways.find(Address::from(address), 1_020), None);
        assert_eq!(question(), Some(address));
    }

    #[test]
    fn an_answer_holds_until_its_time_or_until_it_is_forgotten() {
        let ways = Ways::new().unwrap();
        let addresses: [IpAddr; 3] = ["10.244.0.1", "fd00::1", "10.244.0.2"].map(|text| text.parse().unwrap());
        let find = |number: usize, now_ms| ways.find(addresses[number].into(), now_ms);
        ways.answer(addresses[0], Some(&way(7)), 2_000);
        ways.answer(addresses[1], Some(&way(8)), 2_000);
        ways.answer(addresses[2], None, 2_000);
        assert_eq!([find(0, 1_999), find(1, 1_999), find(2, 1_999)], [Some(way(7)), Some(way(8)), None]);
        assert_eq!((find(0, 2_000), ways.last(addresses[0].into())), (None, Some(way(7))), "it is over");
        ways.answer(addresses[0], Some(&way(9)), 3_000);
        assert_eq!(find(0, 2_000), Some(way(9)));
        ways.forget(addresses[0]);
        assert_eq!([find(0, 1_000), find(1, 1_000)], [None, Some(way(8))]);
        ways.forget_all();
        assert_eq!(find(1, 1_000), None);
    }

    #[test]
    fn more_addresses_than_places_take_each_others() {
        let ways = Ways::new().unwrap();
        let address = |number: u32| IpAddr::from(std::net::Ipv4Addr::from(number));
        let count = PLACES as u32 * 2;
        (0..count).for_each(|number| ways.answer(address(number), Some(&way(number + 1)), u64::from(number) + 1));
        let found = (0..count).filter(|number| ways.find(address(*number).into(), 0).is_some());
        let right =
            found.inspect(|number| assert_eq!(ways.find(address(*number).into(), 0), Some(way(number + 1)))).count();
        assert!((1..=PLACES).contains(&right), "{right}");
        assert_eq!(ways.find(address(count - 1).into(), 0), Some(way(count)), "the newest is there");
    }
}
