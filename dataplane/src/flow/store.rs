//! Where flows, endpoints and affinities lie: on the heap, or in a file that outlives the process.
//!
//! The file is a header page and four arrays, each entry of which is whole at any moment, so that the process may be
//! killed at any moment. Who holds its lock writes it. A second process asks for it by the header's `wanted` word; the
//! holder stops, lets go of the lock, and writes no more. A file of another layout, boot or network namespace is set aside.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use xxhash_rust::xxh3::xxh3_128;

use super::{Address, Record};
use crate::memory::{Plain, Region};
use crate::select::{AFFINITIES, AffinityEntry};
use crate::table::{EndpointEntry, PortEntry, Slots};

const MAGIC: u64 = u64::from_le_bytes(*b"SLUICEFL");
/// Grows with every change of what lies in the file.
const VERSION: u32 = 2;
/// Masquerade addresses that a record can name.
const ADDRESSES: usize = 255;
/// Between two attempts at the lock.
const PAUSE: Duration = Duration::from_millis(2);

/// The file's first page. `magic`, `version`, `wanted` and `holder` stay where they are in every version.
#[repr(C)]
pub(crate) struct Header {
    magic: AtomicU64,
    version: AtomicU32,
    /// Generation that is to hold the file: more than `holder` when somebody waits for it.
    wanted: AtomicU32,
    /// Generation that holds the file, or held it last.
    holder: AtomicU32,
    capacity: AtomicU32,
    /// Sizes of everything.
    layout: AtomicU64,
    /// Hash of what the file belongs to: boot and network namespace.
    owner: [AtomicU64; 2],
    /// Entries ever used, by array: nothing lies behind.
    pub(crate) records_used: AtomicU32,
    pub(crate) endpoints_used: AtomicU32,
    pub(crate) ports_used: AtomicU32,
    pub(crate) affinities_used: AtomicU32,
    addresses: AtomicU32,
    unused: AtomicU32,
    masquerade: [[AtomicU64; 2]; ADDRESSES],
}

const HEADER_ROOM: usize = 8192;
const _: () = assert!(size_of::<Header>() <= HEADER_ROOM);
const PORTS_AT: usize = HEADER_ROOM;
const ENDPOINTS_AT: usize = PORTS_AT + Slots::CAPACITY as usize * size_of::<PortEntry>();
const UIDS_AT: usize = ENDPOINTS_AT + Slots::CAPACITY as usize * size_of::<EndpointEntry>();
const AFFINITIES_AT: usize = UIDS_AT + Slots::CAPACITY as usize * size_of::<AtomicU64>();
/// Records come last: their number may grow.
const RECORDS_AT: usize = AFFINITIES_AT + AFFINITIES * size_of::<AffinityEntry>();
const _: () = assert!((ENDPOINTS_AT | UIDS_AT | AFFINITIES_AT | RECORDS_AT) & 4095 == 0, "whole pages");

fn layout() -> u64 {
    let sizes = [size_of::<Record>(), size_of::<EndpointEntry>(), size_of::<PortEntry>(), size_of::<AffinityEntry>()];
    let words = [Slots::CAPACITY as usize, AFFINITIES];
    sizes.iter().chain(&words).fold(0, |hash: u64, size| hash.wrapping_mul(0x1_0000_01b3).wrapping_add(*size as u64))
}

/// The file to keep flows in.
#[derive(Clone, Debug)]
pub struct FlowFile {
    /// Where; best on a tmpfs.
    pub path: PathBuf,
    /// What the flows belong to, for example boot id and cookie of the network namespace: the file of another owner is not
    /// used.
    pub owner: Vec<u8>,
    /// How long to wait for another process to hand over.
    pub patience: Duration,
}

/// Why there is no flow file.
#[derive(Debug, thiserror::Error)]
pub enum FlowFileError {
    /// The file system said no.
    #[error("flow file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Another process has it, and it is none of ours: it serves another network namespace.
    #[error("flow file {} is in use for another network namespace", path.display())]
    OfAnother {
        /// The file.
        path: PathBuf,
    },
    /// Another process has it and does not hand it over.
    #[error("flow file {} is in use and was not handed over", path.display())]
    Held {
        /// The file.
        path: PathBuf,
    },
}

/// How a flow file was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Found {
    /// There was none.
    #[default]
    Nothing,
    /// One of ours.
    Ours,
    /// One that cannot be used: it was renamed.
    Unusable {
        /// Why.
        reason: &'static str,
        /// Where it is now.
        kept: PathBuf,
    },
}

/// What was recovered at start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// How the file was found.
    pub found: Found,
    /// Another process was running and handed over.
    pub took_over: bool,
    /// Flows that go on.
    pub flows: usize,
    /// Records that were not whole, or made no sense, and were dropped.
    pub dropped: usize,
}

/// All memory that the next process takes over.
pub(crate) struct Store {
    pub(crate) header: Arc<Region<Header>>,
    pub(crate) ports: Region<PortEntry>,
    pub(crate) endpoints: Region<EndpointEntry>,
    pub(crate) uids: Region<AtomicU64>,
    pub(crate) affinities: Region<AffinityEntry>,
    pub(crate) records: Region<Record>,
    pub(crate) hold: Hold,
    pub(crate) recovery: Recovery,
}

/// The right to write the file.
pub(crate) struct Hold {
    generation: u32,
    lock: Mutex<Option<Flock<File>>>,
}

impl Hold {
    pub(crate) fn none() -> Self {
        Self { generation: 0, lock: Mutex::new(None) }
    }

    /// Whether another process waits for the file.
    pub(crate) fn is_wanted(&self, header: &Header) -> bool {
        header.wanted.load(SeqCst) > self.generation
    }

    /// Lets go of the file; nothing may be written after that.
    pub(crate) fn release(&self) {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Store {
    /// On the heap: gone with the process.
    pub(crate) fn heap(capacity: usize) -> Self {
        let slots = Slots::CAPACITY as usize;
        Self {
            header: Arc::new(Region::heap(1)),
            ports: Region::heap(slots),
            endpoints: Region::heap(slots),
            uids: Region::heap(slots),
            affinities: Region::heap(AFFINITIES),
            records: Region::heap(capacity),
            hold: Hold::none(),
            recovery: Recovery::default(),
        }
    }

    /// In a file, which is made, taken over from the process that has it, or resumed.
    pub(crate) fn open(settings: &FlowFile, capacity: usize) -> Result<Self, FlowFileError> {
        let path = &settings.path;
        let io = |source| FlowFileError::Io { path: path.clone(), source };
        let owner = xxh3_128(&settings.owner);
        let owner = [owner as u64, (owner >> 64) as u64];
        let (mut lock, took_over) = lock(settings, owner)?;
        let length = lock.metadata().map_err(io)?.len();
        let mut found = if length == 0 { Found::Nothing } else { Found::Ours };
        if length > 0
            && let Some(reason) = unusable(&lock, owner).map_err(io)?
        {
            let mut kept = path.clone().into_os_string();
            kept.push(".aside");
            fs::rename(path, &kept).map_err(io)?;
            found = Found::Unusable { reason, kept: kept.into() };
            let file = open_file(path).map_err(io)?;
            // Nobody else makes the file: who waits for it waits for the lock on the old one, and then looks again.
            lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
                .map_err(|_| FlowFileError::Held { path: path.clone() })?;
        }
        let is_ours = found == Found::Ours;
        let file = &*lock;
        if !is_ours {
            file.set_len(HEADER_ROOM as u64).map_err(io)?;
        }
        let header = Region::<Header>::map(file, 0, 1).map_err(io)?;
        let head = &header[0];
        let capacity = capacity.max(head.records_used.load(Relaxed) as usize);
        file.set_len((RECORDS_AT + capacity * size_of::<Record>()) as u64).map_err(io)?;
        if !is_ours {
            head.version.store(VERSION, Relaxed);
            head.layout.store(layout(), Relaxed);
            head.owner[0].store(owner[0], Relaxed);
            head.owner[1].store(owner[1], Relaxed);
            head.magic.store(MAGIC, SeqCst);
        }
        head.capacity.store(capacity as u32, Relaxed);
        let generation = head.wanted.load(SeqCst);
        head.holder.store(generation, SeqCst);
        fn map<T: Plain>(file: &File, at: usize, count: usize) -> io::Result<Region<T>> {
            Region::map(file, at, count)
        }
        let slots = Slots::CAPACITY as usize;
        Ok(Self {
            ports: map(file, PORTS_AT, slots).map_err(io)?,
            endpoints: map(file, ENDPOINTS_AT, slots).map_err(io)?,
            uids: map(file, UIDS_AT, slots).map_err(io)?,
            affinities: map(file, AFFINITIES_AT, AFFINITIES).map_err(io)?,
            records: map(file, RECORDS_AT, capacity).map_err(io)?,
            header: Arc::new(header),
            hold: Hold { generation, lock: Mutex::new(Some(lock)) },
            recovery: Recovery { found, took_over, ..Recovery::default() },
        })
    }

    /// The masquerade addresses that records may name: those of earlier processes, then what is new in `now`.
    pub(crate) fn masquerade(&self, now: &[Address]) -> Vec<Address> {
        let header = &self.header[0];
        let count = (header.addresses.load(Relaxed) as usize).min(ADDRESSES);
        let words = header.masquerade[..count].iter();
        let mut all: Vec<Address> =
            words.map(|words| Address::from_words([words[0].load(Relaxed), words[1].load(Relaxed)])).collect();
        for address in now {
            if all.len() < ADDRESSES && !all.contains(address) {
                for (word, value) in header.masquerade[all.len()].iter().zip(address.words()) {
                    word.store(value, Relaxed);
                }
                all.push(*address);
                header.addresses.store(all.len() as u32, SeqCst);
            }
        }
        all
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Locks the file, asking the process that has it to let go. Whether one did.
fn lock(settings: &FlowFile, owner: [u64; 2]) -> Result<(Flock<File>, bool), FlowFileError> {
    let path = &settings.path;
    let io = |source| FlowFileError::Io { path: path.clone(), source };
    let mut was_held = false;
    for _ in 0..=settings.patience.as_millis() / PAUSE.as_millis() {
        let file = open_file(path).map_err(io)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                // The file may have been set aside between our opening and our locking it.
                let is_current = fs::metadata(path).is_ok_and(|now| {
                    lock.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (now.dev(), now.ino()))
                });
                if is_current {
                    return Ok((lock, was_held));
                }
            }
            Err((file, _)) => {
                was_held = true;
                // A header that is not there yet is being written.
                if let Ok(header) = Region::<Header>::map(&file, 0, 1) {
                    ask(&header[0], owner).map_err(|()| FlowFileError::OfAnother { path: path.clone() })?;
                }
            }
        }
        std::thread::sleep(PAUSE);
    }
    Err(FlowFileError::Held { path: path.clone() })
}

/// Asks the holder to let go, unless somebody does so already.
fn ask(header: &Header, owner: [u64; 2]) -> Result<(), ()> {
    if header.magic.load(SeqCst) != MAGIC {
        return Ok(());
    }
    // Only of our own version do we know where the owner is written.
    let same = [0, 1].map(|word| header.owner[word].load(Relaxed)) == owner;
    if header.version.load(Relaxed) == VERSION && !same {
        return Err(());
    }
    let holder = header.holder.load(SeqCst);
    let _ = header.wanted.compare_exchange(holder, holder + 1, SeqCst, SeqCst);
    Ok(())
}

/// Why a file that we hold cannot be used, if so.
fn unusable(file: &File, owner: [u64; 2]) -> io::Result<Option<&'static str>> {
    let length = file.metadata()?.len();
    if length < HEADER_ROOM as u64 {
        return Ok(Some("it is no flow file"));
    }
    let header = Region::<Header>::map(file, 0, 1)?;
    let header = &header[0];
    let records = header.capacity.load(Relaxed) as usize;
    Ok(if header.magic.load(SeqCst) != MAGIC {
        Some("it is no flow file")
    } else if header.version.load(Relaxed) != VERSION || header.layout.load(Relaxed) != layout() {
        Some("it has another version")
    } else if [0, 1].map(|word| header.owner[word].load(Relaxed)) != owner {
        Some("it belongs to another boot or network namespace")
    } else if length < (RECORDS_AT + records * size_of::<Record>()) as u64
        || header.records_used.load(Relaxed) as usize > records
        || header.endpoints_used.load(Relaxed).max(header.ports_used.load(Relaxed)) > Slots::CAPACITY
        || header.affinities_used.load(Relaxed) as usize > AFFINITIES
    {
        Some("it contradicts itself")
    } else {
        None
    })
}
