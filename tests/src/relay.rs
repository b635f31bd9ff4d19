//! A TCP relay between a client and a server that can be made to misbehave.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use sluice_bench::netns::NetNs;

use crate::probe::{Background, LOOK};

/// How it treats connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// As they are.
    Faithful,
    /// It takes none.
    Refusing,
    /// It ends each after so many bytes of the server's, wherever that is in an answer, or fewer.
    Truncating(usize),
    /// What the server sends comes so much later.
    Late(Duration),
}

/// The relay. Dropping it ends it and its connections.
pub struct Relay {
    /// Where it listens.
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    _accepting: Background,
}

struct State {
    manner: Manner,
    /// Both ends of all connections.
    open: Vec<TcpStream>,
    /// Connections that were truncated.
    truncated: u64,
}

impl State {
    fn end_all(&mut self) {
        // Whose end is gone already needs no ending.
        self.open.drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }
}

impl Relay {
    /// Listens on loopback inside `ns` and passes on to `server`, from there.
    pub fn start(ns: &NetNs, server: SocketAddr) -> Result<Self> {
        let listener = ns.run(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State { manner: Manner::Faithful, open: Vec::new(), truncated: 0 }));
        let (shared, ns) = (Arc::clone(&state), ns.clone());
        let accepting = Background::start(move || {
            let Ok((client, _)) = listener.accept() else { return std::thread::sleep(LOOK) };
            // A server that is not there is one that refuses: the client's connection ends with this.
            drop(pass_on(client, &ns, server, &shared));
        })?;
        Ok(Self { address, state, _accepting: accepting })
    }

    /// From now on; connections that are open end.
    pub fn behave(&self, manner: Manner) {
        let mut state = lock(&self.state);
        state.manner = manner;
        state.end_all();
    }

    /// How many connections were truncated.
    #[must_use]
    pub fn truncated(&self) -> u64 {
        lock(&self.state).truncated
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        lock(&self.state).end_all();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pass_on(client: TcpStream, ns: &NetNs, server: SocketAddr, shared: &Arc<Mutex<State>>) -> Result<()> {
    client.set_nonblocking(false)?;
    let manner = lock(shared).manner;
    if manner == Manner::Refusing {
        return Ok(());
    }
    let server = ns.run(|| TcpStream::connect_timeout(&server, Duration::from_secs(2)).context("no server"))?;
    let ends = [client.try_clone()?, server.try_clone()?];
    {
        let mut state = lock(shared);
        if state.manner != manner {
            return Ok(());
        }
        state.open.retain(|stream| stream.peer_addr().is_ok());
        state.open.extend(ends);
    }
    let (to_server, from_client) = (server.try_clone()?, client.try_clone()?);
    std::thread::spawn(move || copy(from_client, to_server, Manner::Faithful));
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        if copy(server, client, manner) {
            lock(&shared).truncated += 1;
        }
    });
    Ok(())
}

/// Copies until either end ends, then ends both. Whether it was cut short.
fn copy(mut from: TcpStream, mut to: TcpStream, manner: Manner) -> bool {
    let (mut buffer, mut left) = ([0; 4096], usize::MAX);
    if let Manner::Truncating(bytes) = manner {
        left = bytes;
    }
    while left > 0 {
        let Ok(length @ 1..) = from.read(&mut buffer) else { break };
        let length = length.min(left);
        left -= length;
        if let Manner::Late(delay) = manner {
            std::thread::sleep(delay);
        }
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        drop(stream.shutdown(Shutdown::Both));
    }
    left == 0
}
