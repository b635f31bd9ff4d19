//! Who answers the load: a server so plain that it is not what is measured.
//!
//! A few threads with an epoll each share the listener. A request costs a read and a write, nothing is allocated. A
//! connection that asks for bulk data gets a thread of its own.

use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::client::Failure;
use crate::protocol::{Checker, HEAD, MAX_ANSWER, Request, answer_head, write_blocks};

/// How long a stop may go unnoticed.
const PATIENCE: Duration = Duration::from_millis(200);
const LISTENER: u64 = u64::MAX;

/// A running server. Dropping it closes everything.
#[derive(Debug)]
pub struct PlainServer {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    address: SocketAddr,
}

impl PlainServer {
    /// Serves a listener with this many threads.
    pub fn start(listener: TcpListener, threads: usize) -> Result<Self> {
        let address = listener.local_addr().context("the listener has no address")?;
        listener.set_nonblocking(true)?;
        let listener = Arc::new(listener);
        let mut server = Self { stop: Arc::default(), threads: Vec::new(), address };
        for number in 0..threads.max(1) {
            let mut worker = Worker::new(Arc::clone(&listener), Arc::clone(&server.stop))?;
            let thread = thread::Builder::new()
                .name(format!("serve {number}"))
                .spawn(move || {
                    if let Err(error) = worker.run() {
                        eprintln!("server: {error}");
                    }
                })
                .context("cannot start a server's thread")?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the process ends.
    pub fn wait(mut self) {
        for thread in self.threads.drain(..) {
            // A panic has been printed.
            drop(thread.join());
        }
    }
}

impl Drop for PlainServer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

struct Connection {
    stream: TcpStream,
    head: [u8; HEAD],
    filled: usize,
    /// Bytes of an answer that did not fit into the socket yet.
    unsent: usize,
}

/// What becomes of a connection after an event.
enum After {
    Keep,
    Close,
    Bulk(Request),
}

struct Worker {
    listener: Arc<TcpListener>,
    epoll: Epoll,
    /// By descriptor, which the kernel keeps small.
    connections: Vec<Option<Connection>>,
    received: Box<[u8]>,
    answer: Box<[u8]>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    fn new(listener: Arc<TcpListener>, stop: Arc<AtomicBool>) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll")?;
        // Exclusive: a new connection wakes one thread, not all.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        epoll.add(&*listener, EpollEvent::new(flags, LISTENER)).context("cannot watch the listener")?;
        Ok(Self {
            listener,
            epoll,
            connections: Vec::new(),
            received: vec![0; 16 * 1024].into(),
            answer: vec![0x2e; MAX_ANSWER as usize].into(),
            stop,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 128];
        let timeout = u16::try_from(PATIENCE.as_millis()).unwrap_or(u16::MAX);
        while !self.stop.load(Relaxed) {
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for event in &events[..count] {
                if event.data() == LISTENER {
                    self.accept()?;
                } else {
                    self.advance(event.data() as usize, event.events());
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            // Another thread was faster, or the client is gone already.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let index = stream.as_raw_fd() as usize;
        // Edges, in both directions: a connection is registered once and never changed.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        self.epoll.add(&stream, EpollEvent::new(flags, index as u64))?;
        if self.connections.len() <= index {
            self.connections.resize_with(index + 1, || None);
        }
        self.connections[index] = Some(Connection { stream, head: [0; HEAD], filled: 0, unsent: 0 });
        Ok(())
    }

    fn advance(&mut self, index: usize, events: EpollFlags) {
        let Some(connection) = self.connections.get_mut(index).and_then(Option::as_mut) else { return };
        match connection.advance(events, &mut self.received, &mut self.answer) {
            Ok(After::Keep) => {}
            Ok(After::Bulk(request)) => self.detach(index, request),
            Ok(After::Close) | Err(_) => self.connections[index] = None,
        }
    }

    /// Hands a connection to a thread of its own.
    fn detach(&mut self, index: usize, request: Request) {
        let Some(Connection { stream, .. }) = self.connections[index].take() else { return };
        let stop = Arc::clone(&self.stop);
        let watched = self.epoll.delete(&stream);
        let body = move || {
            // What goes wrong breaks the connection, and the client counts that.
            let _ = match request {
                Request::Take => take_bulk(&stream, &stop),
                Request::Send | Request::Answer { .. } => send_bulk(&stream, &stop),
            };
        };
        let spawned = thread::Builder::new().name("serve bulk".to_owned()).spawn(body);
        if let Err(error) = watched.map_err(io::Error::from).and(spawned) {
            eprintln!("server: no thread for bulk data: {error}");
        }
    }
}

impl Connection {
    fn advance(&mut self, events: EpollFlags, received: &mut [u8], answer: &mut [u8]) -> io::Result<After> {
        if events.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            return Ok(After::Close);
        }
        if events.contains(EpollFlags::EPOLLOUT) && self.unsent > 0 {
            self.send(answer, 0)?;
        }
        if !events.contains(EpollFlags::EPOLLIN) {
            return Ok(After::Keep);
        }
        loop {
            // The socket itself blocks, which saves a call for each connection.
            let count = match recv(self.stream.as_raw_fd(), received, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Ok(After::Close),
                Ok(count) => count,
                Err(nix::errno::Errno::EAGAIN) => return Ok(After::Keep),
                Err(errno) => return Err(errno.into()),
            };
            if let Some(bulk) = self.take_requests(&received[..count], answer)? {
                return Ok(After::Bulk(bulk));
            }
            if count < received.len() && !events.contains(EpollFlags::EPOLLRDHUP) {
                // All there was; what comes later is another edge.
                return Ok(After::Keep);
            }
        }
    }

    /// Answers the requests in `bytes`; the first that asks for bulk data ends it.
    fn take_requests(&mut self, mut bytes: &[u8], answer: &mut [u8]) -> io::Result<Option<Request>> {
        while !bytes.is_empty() {
            let taken = bytes.len().min(HEAD - self.filled);
            self.head[self.filled..][..taken].copy_from_slice(&bytes[..taken]);
            self.filled += taken;
            bytes = &bytes[taken..];
            if self.filled < HEAD {
                break;
            }
            self.filled = 0;
            match Request::decode(&self.head) {
                Some(Request::Answer { .. }) if self.unsent > 0 => return Err(io::ErrorKind::InvalidInput.into()),
                Some(Request::Answer { size, number }) => {
                    answer[..HEAD].copy_from_slice(&answer_head(size, number));
                    self.unsent = size as usize;
                    self.send(answer, size as usize)?;
                }
                // Clients send nothing until bulk data begins.
                Some(bulk) if bytes.is_empty() => return Ok(Some(bulk)),
                Some(_) | None => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        Ok(None)
    }

    /// Sends as much of an answer as fits. `whole` is its size at its beginning; later parts are filler.
    fn send(&mut self, answer: &[u8], whole: usize) -> io::Result<()> {
        let part = if whole > 0 { &answer[..whole] } else { &answer[HEAD..][..self.unsent.min(answer.len() - HEAD)] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.stream.as_raw_fd(), part, flags) {
            Ok(count) => self.unsent -= count,
            Err(nix::errno::Errno::EAGAIN) if whole == 0 => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }
}

fn send_bulk(mut stream: &TcpStream, stop: &AtomicBool) -> Result<(), Failure> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut sent = 0;
    while !stop.load(Relaxed) {
        match write_blocks(&mut stream, sent) {
            Ok(count) => sent += count as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn take_bulk(mut stream: &TcpStream, stop: &AtomicBool) -> Result<(), Failure> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&answer_head(0, 0))?;
    let mut checker = Checker::default();
    while !stop.load(Relaxed) {
        match checker.read(&mut stream) {
            Ok(0) => return Ok(stream.write_all(&answer_head(0, checker.finish()?))?),
            Ok(_) | Err(Failure::Timeout) => {}
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}
