//! Sends packets on a link straight away: past the kernel's second look at its routes, past its neighbours, and past what others
//! filter there. Offloads go on: a partial checksum and segments are for the link to finish.
#![expect(unsafe_code, reason = "a packet socket with offload headers has options and addresses that no crate makes")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use crate::flow::Address;
use crate::packet::{hop, vnet};
use crate::packet_path::ways::{ETHERNET, Way, Ways};

/// Bytes in front of a frame that [`Wire::send`] needs for itself.
pub(super) const ROOM: usize = ETHERNET;
/// Bytes that a socket may have under way: some of the largest frames on every link.
const SEND_BUFFER: libc::c_int = 8 << 20;

/// A packet thread's socket for all links. It receives nothing.
pub(super) struct Wire {
    socket: OwnedFd,
    ways: Arc<Ways>,
}

impl Wire {
    /// Fails with `PermissionDenied` without `CAP_NET_RAW`.
    pub(super) fn open(ways: Arc<Ways>) -> io::Result<Self> {
        // SAFETY: no memory is handed over.
        let number = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made it, for us alone.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        set(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        set(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, SEND_BUFFER)?;
        Ok(Self { socket, ways })
    }

    /// Sends a frame to this address, if its way is known and it fits; if not, it is as it was, but for its hop limit maybe. In
    /// front of it there are [`ROOM`] bytes.
    pub(super) fn send(&self, frame: &mut [u8], to: Address, now_ms: u64) -> bool {
        let Some(way) = self.ways.find(to, now_ms) else { return false };
        let (header, bytes) = frame[ROOM..].split_at_mut(vnet::LEN);
        let Some(length) = hop::take(header, bytes, way.mtu as usize) else { return false };
        // The offload header goes to the front, and the Ethernet header between it and the packet.
        frame.copy_within(ROOM..ROOM + vnet::LEN, 0);
        vnet::put_before(&mut frame[..vnet::LEN], ETHERNET as i16);
        frame[vnet::LEN..vnet::LEN + ETHERNET].copy_from_slice(&way.header);
        if self.hand_over(&frame[..ROOM + vnet::LEN + length], &way) {
            return true;
        }
        vnet::put_before(&mut frame[..vnet::LEN], -(ETHERNET as i16));
        frame.copy_within(..vnet::LEN, ROOM);
        false
    }

    fn hand_over(&self, frame: &[u8], way: &Way) -> bool {
        // SAFETY: `sockaddr_ll` is plain old data; zeroes are a valid value.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_ifindex = way.link as i32;
        to.sll_protocol = u16::from_ne_bytes([way.header[12], way.header[13]]);
        let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the descriptor is open; the kernel only reads the frame and the address, of the sizes named, during the call.
        let sent = unsafe {
            let (frame, length) = (frame.as_ptr().cast(), frame.len());
            libc::sendto(self.socket.as_raw_fd(), frame, length, libc::MSG_DONTWAIT, (&raw const to).cast(), size)
        };
        sent >= 0
    }
}

fn set(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open; the kernel only reads the integer during the call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast::<libc::c_void>(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
