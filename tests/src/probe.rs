//! What one new flow meets, seen from outside: who answers and whom he sees, or how it is refused.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use sluice_bench::client::{Connection, Failure};
use sluice_bench::netns::NetNs;

use crate::sctp;

/// After what time a datagram without an answer is sent again: a kernel may have lost it while it asked for a neighbour.
pub const RESEND: Duration = Duration::from_secs(1);
/// How often servers look whether they are to end.
pub(crate) const LOOK: Duration = Duration::from_millis(50);
/// Ports of conversations: no node ports, and none that Sluice masquerades with.
const PORTS: std::ops::Range<u16> = 10_000..30_000;

/// Protocols of Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// One connection, two HTTP requests.
    Tcp,
    /// One conversation.
    Udp,
    /// One INIT.
    Sctp,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Name of who answers.
    pub by: String,
    /// The client, as he sees it.
    pub seen: SocketAddr,
    /// The client, as it sees itself.
    pub own: SocketAddr,
}

/// Asks who answers at this address, from a new port of the calling thread's namespace.
pub fn ask(protocol: Protocol, to: SocketAddr, wait: Duration) -> Result<Answer, Failure> {
    match protocol {
        Protocol::Tcp => connect(to, wait),
        Protocol::Udp => Conversation::new(to).and_then(|conversation| conversation.ask(wait)).map_err(Failure::from),
        Protocol::Sctp => sctp::ask(to, wait).map_err(Failure::from),
    }
}

fn connect(to: SocketAddr, wait: Duration) -> Result<Answer, Failure> {
    let mut connection = Connection::open(to, wait)?;
    let own = connection.local_address()?;
    let by = connection.get("/")?;
    let seen = connection.get("/client")?.parse().map_err(|_| Failure::Malformed)?;
    Ok(Answer { by, seen, own })
}

/// A UDP socket that keeps talking to one address.
#[derive(Debug)]
pub struct Conversation(UdpSocket);

impl Conversation {
    /// From a port that no other conversation of this program had: flows from one port to one endpoint by two frontends cannot
    /// both keep the client's address.
    pub fn new(to: SocketAddr) -> io::Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let any = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = loop {
            let port = PORTS.start + NEXT.fetch_add(1, Relaxed) % (PORTS.end - PORTS.start);
            match UdpSocket::bind(SocketAddr::new(any, port)) {
                Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                bound => break bound?,
            }
        };
        socket.connect(to)?;
        Ok(Self(socket))
    }

    /// Asks who answers, and whom he sees.
    pub fn ask(&self, wait: Duration) -> io::Result<Answer> {
        let deadline = Instant::now() + wait;
        let (mut by, mut seen) = (None, None);
        while Instant::now() < deadline {
            self.0.send(if by.is_none() { b"who" } else { b"client" })?;
            self.0.set_read_timeout(Some(RESEND.min(wait)))?;
            let mut buffer = [0; 256];
            let length = match self.0.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            // An answer may come twice, when it came late.
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            match text.parse::<SocketAddr>() {
                Ok(address) => seen = Some(address),
                Err(_) => by = Some(text),
            }
            if let (Some(by), Some(seen)) = (&by, seen) {
                return Ok(Answer { by: by.clone(), seen, own: self.0.local_addr()? });
            }
        }
        Err(ErrorKind::TimedOut.into())
    }
}

/// A thread that does one thing again and again until this is dropped.
#[derive(Debug)]
pub struct Background {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts the thread; `step` must come back now and then.
    pub fn start(mut step: impl FnMut() + Send + 'static) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let run = move || {
            while !told.load(Relaxed) {
                step();
            }
        };
        let thread = thread::Builder::new().spawn(run).context("cannot start a thread")?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed, and its clients got no answers.
            drop(thread.join());
        }
    }
}

/// A UDP server on one address that answers as a Pod's does, and counts.
#[derive(Debug)]
pub struct Datagrams {
    received: Arc<AtomicU64>,
    _thread: Background,
}

impl Datagrams {
    /// Serves this address inside `ns`.
    pub fn start(ns: &NetNs, name: &str, address: SocketAddr) -> Result<Self> {
        let socket = ns.run(|| UdpSocket::bind(address).with_context(|| format!("cannot bind {address}")))?;
        socket.set_read_timeout(Some(LOOK))?;
        let received = Arc::new(AtomicU64::new(0));
        let (counted, name) = (Arc::clone(&received), name.to_owned());
        let thread = Background::start(move || {
            let mut datagram = [0; 256];
            // Timeouts, and ICMP errors about earlier answers.
            let Ok((length, from)) = socket.recv_from(&mut datagram) else { return };
            counted.fetch_add(1, Relaxed);
            let answer = if &datagram[..length] == b"client" { from.to_string() } else { name.clone() };
            drop(socket.send_to(answer.as_bytes(), from));
        })?;
        Ok(Self { received, _thread: thread })
    }

    /// Datagrams so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}
