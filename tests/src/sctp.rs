//! SCTP where the kernel has none: raw packets with an INIT, and an INIT ACK that tells who answers and whom he sees.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use sluice_bench::netns::NetNs;
use socket2::{Domain, Protocol, Socket, Type};

use crate::probe::{Answer, Background, LOOK, RESEND};

const HEADER: usize = 12;
/// Chunk header and the fixed fields of INIT and INIT ACK (RFC 9260 §3.3.2).
const INIT: usize = 20;
const KIND_INIT: u8 = 1;
const KIND_INIT_ACK: u8 = 2;
/// A parameter that receivers skip without a word when they do not know it (RFC 9260 §3.2.1).
const PARAMETER: u16 = 0x8001;
const TAG: u32 = 0x5eed_cafe;

/// Answers INITs to this address and port, inside `ns`. Packets with a wrong checksum get an answer that says so.
pub fn serve(ns: &NetNs, name: &str, address: SocketAddr) -> Result<Background> {
    let socket = ns
        .run(|| {
            let socket = raw(address.ip())?;
            socket.bind(&SocketAddr::new(address.ip(), 0).into())?;
            Ok(UdpSocket::from(socket))
        })
        .with_context(|| format!("a raw socket on {address}"))?;
    socket.set_read_timeout(Some(LOOK))?;
    let name = name.to_owned();
    Background::start(move || {
        let mut buffer = [0; 2048];
        // Timeouts, and ICMP errors about earlier answers.
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { return };
        let Some(packet) = Packet::parse(payload(&buffer[..length], address.ip())) else { return };
        if packet.to != address.port() || packet.kind != KIND_INIT {
            return;
        }
        let seen = SocketAddr::new(from.ip(), packet.from);
        let text = if packet.is_whole { format!("{name} {seen}") } else { format!("{name} wrong-checksum") };
        let answer = packet_bytes(packet.to, packet.from, packet.initiate_tag, KIND_INIT_ACK, text.as_bytes());
        drop(socket.send_to(&answer, SocketAddr::new(from.ip(), 0)));
    })
}

/// Sends an INIT from a new port and waits for its INIT ACK, in the calling thread's namespace.
pub fn ask(to: SocketAddr, wait: Duration) -> io::Result<Answer> {
    static PORT: AtomicU16 = AtomicU16::new(20_000);
    let port = PORT.fetch_add(1, Relaxed);
    let socket = raw(to.ip())?;
    socket.connect(&SocketAddr::new(to.ip(), 0).into())?;
    let socket = UdpSocket::from(socket);
    let own = socket.local_addr()?.ip();
    let deadline = Instant::now() + wait;
    while Instant::now() < deadline {
        socket.send(&packet_bytes(port, to.port(), 0, KIND_INIT, b""))?;
        let resend = deadline.min(Instant::now() + RESEND);
        while let Some(left) = resend.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            socket.set_read_timeout(Some(left))?;
            let mut buffer = [0; 2048];
            let length = match socket.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            let Some(packet) = Packet::parse(payload(&buffer[..length], to.ip())) else { continue };
            if (packet.from, packet.to, packet.kind) != (to.port(), port, KIND_INIT_ACK) {
                continue;
            }
            if !packet.is_whole || packet.tag != TAG {
                return Err(io::Error::new(ErrorKind::InvalidData, "checksum or tag of the answer is wrong"));
            }
            let (by, seen) = packet.text.split_once(' ').ok_or(ErrorKind::InvalidData)?;
            let seen = seen.parse().map_err(|_| io::Error::new(ErrorKind::InvalidData, packet.text.clone()))?;
            return Ok(Answer { by: by.to_owned(), seen, own: SocketAddr::new(own, port) });
        }
    }
    Err(ErrorKind::TimedOut.into())
}

/// A raw socket: made into a [`UdpSocket`], the standard library reads and writes it.
fn raw(address: IpAddr) -> io::Result<Socket> {
    let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    Socket::new(domain, Type::RAW, Some(Protocol::from(132)))
}

/// What follows the IP header, which raw sockets give for IPv4 only (raw(7), ipv6(7)).
fn payload(bytes: &[u8], address: IpAddr) -> &[u8] {
    if address.is_ipv6() {
        return bytes;
    }
    let header = bytes.first().map_or(0, |first| usize::from(first & 0xf) * 4);
    bytes.get(header..).unwrap_or_default()
}

fn packet_bytes(from: u16, to: u16, tag: u32, kind: u8, text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(from.to_be_bytes());
    bytes.extend(to.to_be_bytes());
    bytes.extend(tag.to_be_bytes());
    bytes.extend([0; 4]);
    let parameter = if text.is_empty() { 0 } else { 4 + text.len() };
    bytes.extend([kind, 0]);
    bytes.extend(((INIT + parameter) as u16).to_be_bytes());
    bytes.extend(TAG.to_be_bytes());
    bytes.extend(65_536_u32.to_be_bytes());
    bytes.extend([0, 1, 0, 1]);
    bytes.extend(1_u32.to_be_bytes());
    if parameter > 0 {
        bytes.extend(PARAMETER.to_be_bytes());
        bytes.extend((parameter as u16).to_be_bytes());
        bytes.extend(text);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    let checksum = checksum(&bytes);
    bytes[8..HEADER].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// CRC32c of a packet as if its checksum field were zero (RFC 9260 §6.8); it is written least byte first.
fn checksum(bytes: &[u8]) -> u32 {
    let head = crc32c::crc32c(&bytes[..8]);
    crc32c::crc32c_append(crc32c::crc32c_append(head, &[0; 4]), &bytes[HEADER..])
}

struct Packet {
    from: u16,
    to: u16,
    tag: u32,
    kind: u8,
    initiate_tag: u32,
    text: String,
    is_whole: bool,
}

impl Packet {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let chunk = bytes.get(HEADER..).filter(|chunk| chunk.len() >= INIT)?;
        let two = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let four =
            |bytes: &[u8], at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let text = chunk.get(INIT + 4..usize::from(two(chunk, 2))).unwrap_or_default();
        Some(Self {
            from: two(bytes, 0),
            to: two(bytes, 2),
            tag: four(bytes, 4),
            kind: chunk[0],
            initiate_tag: four(chunk, 4),
            text: String::from_utf8_lossy(text).into_owned(),
            is_whole: bytes[8..HEADER] == checksum(bytes).to_le_bytes(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_rfc_3720() {
        // Appendix B.4: 32 bytes of zeros.
        assert_eq!(checksum(&[0; 32]), 0x8a91_36aa);
        let bytes = packet_bytes(1, 2, 3, KIND_INIT_ACK, b"web-1 [fd00::1]:7");
        let packet = Packet::parse(&bytes).expect("long enough");
        assert!(packet.is_whole && packet.text == "web-1 [fd00::1]:7", "{}", packet.text);
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 0x10;
            assert!(!Packet::parse(&other).expect("as long").is_whole, "byte {at}");
        }
    }
}
