//! The least that a hop through TUN can cost: one queue, one thread, addresses and ports rewritten by one map and one array.
//! No routing table, no states, no rules of nftables: what a data plane in userspace does beyond it is the difference to this.
//! IPv4 and TCP only, masqueraded only.
#![expect(unsafe_code, reason = "TUN is set up by ioctl")]

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::peer::Started;
use crate::lab::Mode;
use crate::lab::{Lab, NODE_PORT};

const LINK: &str = "hop0";
/// `struct virtio_net_hdr`.
const HEADER: usize = 10;
/// Ports that it masquerades with: above those that the lab's hosts dial from.
const FIRST_PORT: u16 = 61_000;
const LAST_PORT: u16 = 65_534;

// linux/if_tun.h: TUN, no packet information, offload headers; checksums and TCP segmentation of both families.
const FLAGS: i16 = 0x0001 | 0x1000 | 0x4000;
const OFFLOADS: libc::c_int = 0x01 | 0x02 | 0x04 | 0x08;

nix::ioctl_write_ptr_bad!(set_iff, nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()), libc::ifreq);
nix::ioctl_write_int_bad!(set_offload, nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>()));

/// What the process of this peer is told.
#[derive(Args, Clone, Debug)]
pub(crate) struct HopArgs {
    /// Where clients dial.
    #[arg(long)]
    service: SocketAddrV4,
    /// Where their connections go, in turn.
    #[arg(long = "endpoint", required = true)]
    endpoints: Vec<SocketAddrV4>,
}

/// The peer: this program once more, on the node.
pub(super) fn prepare(lab: &Lab, mode: Mode) -> Result<Started> {
    if mode == Mode::Preserve {
        return Ok(Started::Missing("it hides the client's address".to_owned()));
    }
    let mut command = lab.topology.node.command(std::env::current_exe().context("this program has no path")?);
    command.args(["hop", "--service", &format!("{}:{NODE_PORT}", lab.node_address())]);
    for endpoint in lab.endpoints() {
        command.args(["--endpoint", &endpoint.to_string()]);
    }
    Ok(Started::Process(command))
}

/// Runs until it is killed; its namespace goes with the lab.
pub(crate) fn run(arguments: &HopArgs) -> Result<()> {
    let mut tun = open()?;
    set_up(*arguments.service.ip(), arguments.service.port())?;
    let mut hop = Hop::new(arguments.service, arguments.endpoints.clone());
    let mut frame = vec![0; HEADER + 65_536];
    loop {
        let length = tun.read(&mut frame).context("cannot read the TUN link")?;
        if hop.rewrite(&mut frame[..length]) {
            tun.write_all(&frame[..length]).context("cannot write to the TUN link")?;
        }
    }
}

fn open() -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").context("cannot open /dev/net/tun")?;
    // SAFETY: `ifreq` is plain old data; zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(LINK.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = FLAGS;
    // SAFETY: the descriptor is open and the kernel only reads the request during the call.
    unsafe { set_iff(file.as_raw_fd(), &raw const request) }.context("cannot make the TUN link")?;
    // SAFETY: the descriptor is open; the argument is a plain number.
    unsafe { set_offload(file.as_raw_fd(), OFFLOADS) }.context("the TUN link has no offloads")?;
    Ok(file)
}

/// Routes the service's port and the ports of replies to the link, before the kernel's own table of local addresses.
fn set_up(node: Ipv4Addr, port: u16) -> Result<()> {
    for setting in ["accept_local=1", "rp_filter=0"] {
        let (name, value) = setting.split_once('=').expect("has one");
        std::fs::write(format!("/proc/sys/net/ipv4/conf/{LINK}/{name}"), value)?;
    }
    let script = format!(
        "link set {LINK} up mtu 65535\nroute add default dev {LINK} table 5391\n\
         rule add pref 0 iif {LINK} lookup local\n\
         rule add pref 0 to {node} ipproto tcp dport {FIRST_PORT}-{LAST_PORT} lookup 5391\n\
         rule add pref 0 to {node} ipproto tcp dport {port} lookup 5391\n\
         rule add pref 1 lookup local\nrule del pref 0 lookup local\n"
    );
    for line in script.lines() {
        let output = Command::new("ip").args(line.split_whitespace()).output().context("cannot run ip")?;
        ensure!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

struct Hop {
    service: SocketAddrV4,
    endpoints: Vec<SocketAddrV4>,
    /// The port that stands for a client.
    ports: HashMap<SocketAddrV4, u16>,
    /// The client and the endpoint of each port.
    flows: Vec<Option<(SocketAddrV4, SocketAddrV4)>>,
    opened: usize,
}

impl Hop {
    fn new(service: SocketAddrV4, endpoints: Vec<SocketAddrV4>) -> Self {
        let flows = vec![None; usize::from(LAST_PORT - FIRST_PORT) + 1];
        Self { service, endpoints, ports: HashMap::new(), flows, opened: 0 }
    }

    /// Whether the frame is to go on.
    fn rewrite(&mut self, frame: &mut [u8]) -> bool {
        let Some(packet) =
            frame.get(HEADER..).filter(|packet| packet.len() >= 40 && packet[0] == 0x45 && packet[9] == 6)
        else {
            return false;
        };
        let (from, to) = (address(packet, 12, 20), address(packet, 16, 22));
        let (new_from, new_to) = if to == self.service {
            let port = match self.ports.get(&from) {
                Some(port) => *port,
                None => self.begin(from),
            };
            let Some(Some((_, endpoint))) = self.flows.get(usize::from(port - FIRST_PORT)) else { return false };
            (SocketAddrV4::new(*self.service.ip(), port), *endpoint)
        } else {
            let flow = to.port().checked_sub(FIRST_PORT).and_then(|number| self.flows.get(usize::from(number)));
            let Some(Some((client, _))) = flow else { return false };
            (self.service, *client)
        };
        let partial = frame[0] & 1 != 0;
        let packet = &mut frame[HEADER..];
        for (ip, port, old, new) in [(12, 20, from, new_from), (16, 22, to, new_to)] {
            let (old_ip, new_ip) = (old.ip().octets(), new.ip().octets());
            update(packet, 10, &old_ip, &new_ip, false);
            update(packet, 36, &old_ip, &new_ip, partial);
            packet[ip..ip + 4].copy_from_slice(&new_ip);
            let (old_port, new_port) = (old.port().to_be_bytes(), new.port().to_be_bytes());
            if !partial {
                update(packet, 36, &old_port, &new_port, false);
            }
            packet[port..port + 2].copy_from_slice(&new_port);
        }
        true
    }

    /// The next port in turn, whoever had it.
    fn begin(&mut self, client: SocketAddrV4) -> u16 {
        let number = self.opened % self.flows.len();
        let endpoint = self.endpoints[self.opened % self.endpoints.len()];
        self.opened += 1;
        if let Some((old, _)) = self.flows[number].replace((client, endpoint)) {
            self.ports.remove(&old);
        }
        let port = FIRST_PORT + number as u16;
        self.ports.insert(client, port);
        port
    }
}

fn address(packet: &[u8], ip: usize, port: usize) -> SocketAddrV4 {
    let ip: [u8; 4] = packet[ip..ip + 4].try_into().expect("four bytes");
    SocketAddrV4::new(ip.into(), u16::from_be_bytes([packet[port], packet[port + 1]]))
}

/// Updates the checksum at `field` (RFC 1624, equation 3). A partial one is the sum itself, not its complement.
fn update(packet: &mut [u8], field: usize, old: &[u8], new: &[u8], partial: bool) {
    let word = |bytes: &[u8]| u32::from(u16::from_be_bytes([bytes[0], bytes[1]]));
    let flip = if partial { 0 } else { 0xffff };
    let mut sum = word(&packet[field..]) ^ flip;
    for (old, new) in old.chunks_exact(2).zip(new.chunks_exact(2)) {
        sum += (word(old) ^ 0xffff) + word(new);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[field..field + 2].copy_from_slice(&((sum ^ flip) as u16).to_be_bytes());
}
