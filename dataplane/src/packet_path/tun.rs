//! TUN queues: made, read and written here; nothing else of the packet path calls the kernel.
#![expect(unsafe_code, reason = "TUN is set up by ioctl")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::packet::vnet;

/// Bytes of the largest frame: offload header and an IP packet.
pub(super) const FRAME_LIMIT: usize = vnet::LEN + 65_536;

// linux/if_tun.h
const IFF_TUN: i16 = 0x0001;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

nix::ioctl_write_int_bad!(tun_set_persist, nix::request_code_write!(b'T', 203, size_of::<libc::c_int>()));
nix::ioctl_write_ptr_bad!(tun_set_iff, nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()), libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_offload, nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>()));
nix::ioctl_write_ptr_bad!(tun_set_vnet_header_size, nix::request_code_write!(b'T', 216, size_of::<libc::c_int>()), i32);

/// A multi-queue TUN link with offload headers. The link goes when the last queue is closed, unless it is persistent.
#[derive(Debug)]
pub struct Tun {
    queues: Vec<Queue>,
}

impl Tun {
    /// Makes the link `name`, or joins it, with this many queues.
    ///
    /// Fails with `NotFound` without `/dev/net/tun`, with `PermissionDenied` without `CAP_NET_ADMIN` and with
    /// `ResourceBusy` when the link belongs to others.
    pub fn open(name: &str, queues: usize) -> io::Result<Self> {
        Ok(Self { queues: (0..queues).map(|_| Queue::open(name)).collect::<io::Result<_>>()? })
    }

    /// Lets the link stay when this process ends, however it does; [`PacketPath::stop`](super::PacketPath::stop) removes
    /// it all the same.
    pub fn persist(&self) -> io::Result<()> {
        self.queues.iter().try_for_each(|queue| set_persist(&queue.0, true))
    }

    pub(super) fn into_queues(self) -> Vec<Queue> {
        self.queues
    }
}

/// One queue.
#[derive(Debug)]
pub(super) struct Queue(File);

impl Queue {
    fn open(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: `ifreq` is plain old data; zeroes are a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("link name {name:?} is too long")));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
        let (fd, header) = (file.as_raw_fd(), vnet::LEN as i32);
        // SAFETY: the descriptor is open and the kernel only reads the request during the call.
        unsafe { tun_set_iff(fd, &raw const request) }?;
        // SAFETY: the descriptor is open and the kernel only reads the integer during the call.
        unsafe { tun_set_vnet_header_size(fd, &raw const header) }?;
        let tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        // SAFETY: the descriptor is open; the argument is a plain number.
        let all = unsafe { tun_set_offload(fd, (tcp | TUN_F_USO4 | TUN_F_USO6) as libc::c_int) };
        // Kernels before 6.2 know no UDP segmentation on TUN.
        // SAFETY: as above.
        all.or_else(|_| unsafe { tun_set_offload(fd, tcp as libc::c_int) })?;
        Ok(Self(file))
    }

    /// A way to send through the queue from another thread.
    pub(super) fn sender(&self) -> io::Result<Sender> {
        self.0.try_clone().map(Sender)
    }

    /// Lets reads fail, with [`io::ErrorKind::WouldBlock`], rather than wait.
    pub(super) fn stop_waiting(&self) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(&self.0, FcntlArg::F_GETFL)?);
        fcntl(&self.0, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(())
    }

    /// Waits for a frame.
    pub(super) fn read(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.0.read(frame)
    }

    /// Hands a frame to the kernel, which routes it.
    pub(super) fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.write(frame).map(|_| ())
    }
}

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Sends through a queue and never reads it: for threads other than the queue's own.
#[derive(Debug)]
pub(super) struct Sender(File);

impl Sender {
    /// Lets the link go with its last queue.
    pub(super) fn forget_link(&self) -> io::Result<()> {
        set_persist(&self.0, false)
    }

    /// Hands a frame to the kernel, which routes it.
    pub(super) fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.write(frame).map(|_| ())
    }
}

fn set_persist(file: &File, persist: bool) -> io::Result<()> {
    // SAFETY: the descriptor is open; the argument is a plain number.
    unsafe { tun_set_persist(file.as_raw_fd(), libc::c_int::from(persist)) }?;
    Ok(())
}
