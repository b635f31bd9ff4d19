//! Which network namespace this is.
#![expect(unsafe_code, reason = "a socket option that no crate reads")]

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// The number that the kernel gives the calling thread's network namespace, and to no other until the next boot
/// (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn namespace_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open; both pointers are to locals of the sizes that are named, valid during the call.
    let result = unsafe {
        let value = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, value, &raw mut length)
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
