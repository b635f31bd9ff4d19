//! Programs and maps of the kernel's own virtual machine: what of `bpf(2)` is needed, and no more.
#![expect(unsafe_code, reason = "bpf(2) has no safe form")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use assembler::Instruction;

pub(crate) mod assembler;

// linux/bpf.h: commands, kinds of maps and programs, where programs are attached, flags.
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const MAP_GET_FD_BY_ID: libc::c_long = 14;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const TCX_INGRESS: u32 = 46;
const REPLACE: u32 = 1 << 2;

/// Bytes of a name, the last of which is zero.
const NAME: usize = 16;
/// Programs at one link that are looked at.
const MOST_PROGRAMS: usize = 64;
/// Maps of a program that are looked at.
const MOST_MAPS: usize = 16;

/// Kinds of maps.
#[derive(Clone, Copy)]
pub(crate) enum MapKind {
    /// Keys of any kind; memory for those that are there.
    Hash,
    /// Numbers from zero on; all are there, and may be mapped.
    Array,
}

/// Kinds of programs.
#[derive(Clone, Copy)]
pub(crate) enum ProgramKind {
    SocketFilter = 1,
    Classifier = 3,
}

/// A map whose keys and values are these types, which must have no bytes that are not set.
pub(crate) struct Map<K, V> {
    descriptor: OwnedFd,
    types: PhantomData<fn(K, V)>,
}

impl<K: Copy, V> Map<K, V> {
    /// A map for so many entries.
    pub(crate) fn new(kind: MapKind, entries: u32, name: &str) -> io::Result<Self> {
        #[repr(C)]
        struct Create {
            kind: u32,
            key_size: u32,
            value_size: u32,
            entries: u32,
            flags: u32,
            inner: u32,
            node: u32,
            name: [u8; NAME],
        }
        // BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC; BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE
        let (kind, flags) = match kind {
            MapKind::Hash => (1, 1 << 0),
            MapKind::Array => (2, 1 << 10),
        };
        let (key_size, value_size) = (size_of::<K>() as u32, size_of::<V>() as u32);
        let mut request = Create { kind, key_size, value_size, entries, flags, inner: 0, node: 0, name: name_of(name) };
        Ok(Self { descriptor: bpf_descriptor(MAP_CREATE, &mut request)?, types: PhantomData })
    }

    /// The descriptor.
    pub(crate) fn descriptor(&self) -> &OwnedFd {
        &self.descriptor
    }

    /// Puts the entry in, in place of the one that there may be.
    pub(crate) fn put(&self, key: &K, value: &V) -> io::Result<()> {
        bpf(MAP_UPDATE_ELEM, &mut self.element(key, (&raw const *value) as u64)).map(drop)
    }

    /// Takes the entry out. Returns whether it was there.
    pub(crate) fn remove(&self, key: &K) -> io::Result<bool> {
        match bpf(MAP_DELETE_ELEM, &mut self.element(key, 0)) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn element(&self, key: &K, value: u64) -> Element {
        let map = self.descriptor.as_raw_fd() as u32;
        Element { map, _gap: 0, key: (&raw const *key) as u64, value, flags: 0 }
    }
}

#[repr(C)]
struct Element {
    map: u32,
    _gap: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Has the kernel check a program and take it. Needs `CAP_BPF`, and `CAP_NET_ADMIN` for a classifier; a program that the kernel
/// does not take is `InvalidInput` or `PermissionDenied`, for a reason that the kernel's log tells.
pub(crate) fn load(kind: ProgramKind, program: &[Instruction], name: &str) -> io::Result<OwnedFd> {
    bpf_descriptor(PROG_LOAD, &mut loading(kind, program, name, &mut []))
}

/// What the kernel says of a program that it does not take.
#[cfg(test)]
pub(crate) fn verdict(kind: ProgramKind, program: &[Instruction]) -> String {
    let mut log = vec![0; 1 << 20];
    let _ = bpf_descriptor(PROG_LOAD, &mut loading(kind, program, "verdict", &mut log));
    String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()
}

#[repr(C)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; NAME],
}

fn loading(kind: ProgramKind, program: &[Instruction], name: &str, log: &mut [u8]) -> Load {
    Load {
        kind: kind as u32,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: u32::from(!log.is_empty()),
        log_size: log.len() as u32,
        log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
        kernel_version: 0,
        flags: 0,
        name: name_of(name),
    }
}

#[repr(C)]
struct Attach {
    link: u32,
    program: u32,
    place: u32,
    flags: u32,
    replaced: u32,
    relative: u32,
    revision: u64,
}

impl Attach {
    fn new(link: u32, program: &OwnedFd, flags: u32, replaced: u32) -> Self {
        let program = program.as_raw_fd() as u32;
        Self { link, program, place: TCX_INGRESS, flags, replaced, relative: 0, revision: 0 }
    }
}

/// Attaches a classifier at the ingress of a link, behind those of others; it stays when this process ends. Kernels before
/// 6.6 refuse with `InvalidInput`.
pub(crate) fn attach(link: u32, program: &OwnedFd) -> io::Result<()> {
    bpf(PROG_ATTACH, &mut Attach::new(link, program, 0, 0)).map(drop)
}

/// Puts the program in the other's place at a link, so that no packet passes without.
pub(crate) fn replace(link: u32, program: &OwnedFd, other: &OwnedFd) -> io::Result<()> {
    bpf(PROG_ATTACH, &mut Attach::new(link, program, REPLACE, other.as_raw_fd() as u32)).map(drop)
}

/// Takes the program off a link.
pub(crate) fn detach(link: u32, program: &OwnedFd) -> io::Result<()> {
    bpf(PROG_DETACH, &mut Attach::new(link, program, 0, 0)).map(drop)
}

/// The programs at the ingress of a link, by their numbers, in order.
pub(crate) fn attached(link: u32) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Query {
        link: u32,
        place: u32,
        flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        _gap: u32,
        program_flags: u64,
        links: u64,
        link_flags: u64,
        revision: u64,
    }
    let mut programs = vec![0_u32; MOST_PROGRAMS];
    let mut request = Query {
        link,
        place: TCX_INGRESS,
        flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr() as u64,
        count: programs.len() as u32,
        _gap: 0,
        program_flags: 0,
        links: 0,
        link_flags: 0,
        revision: 0,
    };
    match bpf(PROG_QUERY, &mut request) {
        Ok(_) => programs.truncate(request.count as usize),
        // Nothing was ever attached there.
        Err(error) if error.kind() == io::ErrorKind::NotFound => programs.clear(),
        Err(error) => return Err(error),
    }
    Ok(programs)
}

/// The program with this number. Needs `CAP_SYS_ADMIN`.
pub(crate) fn program(number: u32) -> io::Result<OwnedFd> {
    bpf_descriptor(PROG_GET_FD_BY_ID, &mut ById { number, next: 0, flags: 0 })
}

/// The map with this number. Needs `CAP_SYS_ADMIN`.
pub(crate) fn map(number: u32) -> io::Result<OwnedFd> {
    bpf_descriptor(MAP_GET_FD_BY_ID, &mut ById { number, next: 0, flags: 0 })
}

#[repr(C)]
struct ById {
    number: u32,
    next: u32,
    flags: u32,
}

/// The beginning of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    number: u32,
    tag: u64,
    lengths: [u32; 2],
    code: [u64; 2],
    load_time: u64,
    owner: u32,
    map_count: u32,
    maps: u64,
    name: [u8; NAME],
}

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    number: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
    name: [u8; NAME],
}

/// Number and name of a program.
pub(crate) fn identity(program: &OwnedFd) -> io::Result<(u32, String)> {
    let mut info = ProgramInfo::default();
    read_info(program, &mut info)?;
    Ok((info.number, text(&info.name)))
}

/// Numbers of the maps that a program uses.
pub(crate) fn maps_of(program: &OwnedFd) -> io::Result<Vec<u32>> {
    let mut maps = vec![0_u32; MOST_MAPS];
    let mut info =
        ProgramInfo { map_count: MOST_MAPS as u32, maps: maps.as_mut_ptr() as u64, ..ProgramInfo::default() };
    read_info(program, &mut info)?;
    maps.truncate(info.map_count as usize);
    Ok(maps)
}

/// Name of a map, size of its values, and how many entries it has room for.
pub(crate) fn map_info(map: &OwnedFd) -> io::Result<(String, u32, u32)> {
    let mut info = MapInfo::default();
    read_info(map, &mut info)?;
    Ok((text(&info.name), info.value_size, info.entries))
}

fn read_info<T>(of: &OwnedFd, info: &mut T) -> io::Result<()> {
    #[repr(C)]
    struct GetInfo {
        descriptor: u32,
        length: u32,
        info: u64,
    }
    let (descriptor, length) = (of.as_raw_fd() as u32, size_of::<T>() as u32);
    bpf(OBJ_GET_INFO_BY_FD, &mut GetInfo { descriptor, length, info: (&raw mut *info) as u64 }).map(drop)
}

fn text(name: &[u8; NAME]) -> String {
    String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

fn name_of(name: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    let length = name.len().min(NAME - 1);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

fn bpf_descriptor<T>(command: libc::c_long, request: &mut T) -> io::Result<OwnedFd> {
    let number = bpf(command, request)?;
    // SAFETY: the kernel just made it, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number as i32) })
}

/// `request`: the part of `union bpf_attr` that belongs to the command; what it points to must live until this returns.
fn bpf<T>(command: libc::c_long, request: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: all callers are in this file: each request is of its command, and whatever it points to is borrowed by the caller
    // with the size that the kernel is told, or has from the map's making.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *request, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
