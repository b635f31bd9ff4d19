//! The responder: sockets and the threads that read them. Datagrams are spread over several sockets of one address by the
//! kernel; each connection has a thread, and there are only so many.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ahash::AHashMap;
use fastrand::Rng;
use socket2::{Domain, Socket, Type};

use super::answerer::Answerer;
use super::message::Transport;

/// How often a thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(200);
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// Stack of a connection's thread.
const STACK: usize = 256 << 10;
/// Longest message without EDNS or over a connection that is read; questions are far shorter.
const LONGEST_QUESTION: usize = 4096;
/// Room for datagrams that wait.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Settings of a responder.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Where it listens. The host has these addresses.
    pub listen: Vec<SocketAddr>,
    /// Sockets, each with a thread, for datagrams to each address.
    pub threads: usize,
    /// Most connections at a time.
    pub connections: usize,
    /// Most connections of one client at a time.
    pub connections_of_client: usize,
    /// How long a connection may be silent.
    pub idle: Duration,
    /// What random order begins with.
    pub seed: u64,
}

impl ServerSettings {
    /// Threads that answer at once: what an [`Answerer`] must be made for.
    #[must_use]
    pub fn answering(&self) -> usize {
        self.listen.len() * (self.threads + 1)
    }
}

/// A running responder. Dropping it closes its sockets.
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Opens all sockets, then answers.
    ///
    /// # Errors
    /// When an address cannot be listened on: it is named.
    pub fn start(answerer: &Arc<Answerer>, settings: &ServerSettings) -> io::Result<Self> {
        let failed = |address: &SocketAddr| {
            let address = *address;
            move |error: io::Error| io::Error::new(error.kind(), format!("{address}: {error}"))
        };
        let (mut datagrams, mut listeners) = (Vec::new(), Vec::new());
        for address in &settings.listen {
            for _ in 0..settings.threads {
                datagrams.push(open_datagrams(*address).map_err(failed(address))?);
            }
            listeners.push(open_listener(*address).map_err(failed(address))?);
        }
        let mut server = Self { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() };
        let limits = Arc::new(Limits { settings: settings.clone(), open: Mutex::default() });
        let mut number = 0;
        let mut next = || {
            number += 1;
            (number - 1, Rng::with_seed(settings.seed.wrapping_add(number as u64)))
        };
        for socket in datagrams.into_iter().map(Arc::new) {
            let (answerer, stop, (thread, rng)) = (Arc::clone(answerer), Arc::clone(&server.stop), next());
            server
                .spawn(format!("dns-udp-{thread}"), move || serve_datagrams(&answerer, &socket, thread, rng, &stop))?;
        }
        for listener in listeners {
            let (answerer, stop, limits) = (Arc::clone(answerer), Arc::clone(&server.stop), Arc::clone(&limits));
            let (thread, rng) = next();
            let body = move || accept(&answerer, &listener, thread, rng, &limits, &stop);
            server.spawn(format!("dns-tcp-{thread}"), body)?;
        }
        Ok(server)
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(thread::Builder::new().name(name).spawn(body)?);
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            if thread.join().is_err() {
                tracing::error!("a thread that answers names panicked");
            }
        }
    }
}

fn open(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    // Several threads, and the process that takes over while this one still answers.
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn open_datagrams(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = open(address, Type::DGRAM)?;
    // As much as the kernel allows; less is no reason to end.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
    socket.set_read_timeout(Some(LOOK))?;
    Ok(socket.into())
}

fn open_listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = open(address, Type::STREAM)?;
    // Bounds `accept` too.
    socket.set_read_timeout(Some(LOOK))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn serve_datagrams(answerer: &Arc<Answerer>, socket: &Arc<UdpSocket>, thread: usize, mut rng: Rng, stop: &AtomicBool) {
    let (mut message, mut out) = (vec![0; LONGEST_QUESTION], Vec::with_capacity(LONGEST_QUESTION));
    while !stop.load(Relaxed) {
        // Timeouts, signals, and ICMP errors about earlier answers.
        let Ok((length, from)) = socket.recv_from(&mut message) else { continue };
        let later = || -> super::answerer::Reply {
            let socket = Arc::clone(socket);
            Box::new(move |answer| drop(socket.send_to(answer, from)))
        };
        let how = (Transport::Udp, &from);
        if answerer.handle(&message[..length], how, (thread, &mut rng), &mut out, later) {
            // Who went away meanwhile needs no answer.
            drop(socket.send_to(&out, from));
        }
    }
}

/// How many connections there are, of whom.
struct Limits {
    settings: ServerSettings,
    open: Mutex<AHashMap<IpAddr, usize>>,
}

/// A place among the connections; free again when dropped.
struct Place {
    limits: Arc<Limits>,
    client: IpAddr,
}

impl Limits {
    fn take(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = open.values().sum();
        let of_client = open.get(&client).copied().unwrap_or_default();
        if total >= self.settings.connections || of_client >= self.settings.connections_of_client {
            return None;
        }
        *open.entry(client).or_default() += 1;
        Some(Place { limits: Arc::clone(self), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.limits.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.client);
            }
        }
    }
}

fn accept(
    answerer: &Arc<Answerer>,
    listener: &TcpListener,
    thread: usize,
    mut rng: Rng,
    limits: &Arc<Limits>,
    stop: &Arc<AtomicBool>,
) {
    while !stop.load(Relaxed) {
        let (stream, client) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => {
                // Too many open files, for one: it passes.
                thread::sleep(LOOK);
                continue;
            }
        };
        // Who has too many is closed at once, and comes again.
        let Some(place) = limits.take(client.ip()) else { continue };
        let (answerer, rng, stop) = (Arc::clone(answerer), rng.fork(), Arc::clone(stop));
        let idle = limits.settings.idle;
        let body = move || {
            let _place = place;
            // The client went away, or talks nonsense.
            drop(converse(&answerer, stream, client, thread, rng, idle, &stop));
        };
        drop(thread::Builder::new().name("dns-connection".to_owned()).stack_size(STACK).spawn(body));
    }
}

/// Answers the questions of a connection in the order in which answers are there (RFC 7766 §6.2.1.1).
fn converse(
    answerer: &Arc<Answerer>,
    mut stream: TcpStream,
    client: SocketAddr,
    thread: usize,
    mut rng: Rng,
    idle: Duration,
    stop: &AtomicBool,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(idle))?;
    stream.set_write_timeout(Some(idle))?;
    let writer = Arc::new(Mutex::new(stream.try_clone()?));
    let (mut message, mut out) = (vec![0; LONGEST_QUESTION], Vec::new());
    while !stop.load(Relaxed) {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let length = usize::from(u16::from_be_bytes(length));
        let Some(place) = message.get_mut(..length) else { return stream.shutdown(Shutdown::Both) };
        stream.read_exact(place)?;
        let later = || -> super::answerer::Reply {
            let writer = Arc::clone(&writer);
            Box::new(move |answer| drop(write(&writer, answer)))
        };
        let how = (Transport::Tcp, &client);
        if answerer.handle(&message[..length], how, (thread, &mut rng), &mut out, later) {
            write(&writer, &out)?;
        }
    }
    Ok(())
}

fn write(stream: &Mutex<TcpStream>, answer: &[u8]) -> io::Result<()> {
    let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
    let whole = [&length.to_be_bytes(), answer].concat();
    stream.lock().unwrap_or_else(PoisonError::into_inner).write_all(&whole)
}
