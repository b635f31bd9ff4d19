//! Servers that say which Pod they are, and that they are going: with their last answer, as HTTP's `Connection: close` does.
//!
//! So a client never sends a request into a connection that is being closed, and what fails was failed by the way between
//! the two; but for connections that the kernel has accepted and the server has not, when it stops. A request is one byte, an answer is two: the Pod's number, and whether it is the last.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use sluice_bench::client::Failure;
use sluice_bench::netns::NetNs;
use sluice_bench::serve::listen_tcp;
use socket2::SockRef;

/// How long the end of a server may go unnoticed by its connections.
const PATIENCE: Duration = Duration::from_millis(100);

const SERVING: u8 = 0;
const FINISHING: u8 = 1;
const STOPPED: u8 = 2;

/// A running server. Dropping it closes everything.
pub(super) struct Server {
    phase: Arc<AtomicU8>,
    listener: Arc<TcpListener>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves inside a Pod.
    pub(super) fn start(ns: &NetNs, pod: u8, port: u16) -> Result<Self> {
        let listener = Arc::new(ns.run(|| listen_tcp(port))?);
        let phase = Arc::new(AtomicU8::new(SERVING));
        let (accepting, its_phase) = (Arc::clone(&listener), Arc::clone(&phase));
        let thread = thread::Builder::new()
            .name(format!("pod {pod}"))
            .spawn(move || accept(&accepting, pod, &its_phase))
            .context("cannot start a server's thread")?;
        Ok(Self { phase, listener, thread: Some(thread) })
    }

    /// No new connections; those that there are get one more answer.
    pub(super) fn finish(&mut self) {
        self.end(FINISHING);
    }

    fn end(&mut self, phase: u8) {
        self.phase.store(phase, SeqCst);
        // Wakes the thread that accepts, and has the kernel refuse from now on.
        drop(SockRef::from(&*self.listener).shutdown(Shutdown::Both));
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            drop(thread.join());
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(STOPPED);
    }
}

fn accept(listener: &TcpListener, pod: u8, phase: &Arc<AtomicU8>) {
    while phase.load(SeqCst) == SERVING {
        // Errors are of single connections, or say that the listener is shut.
        let Ok((stream, _)) = listener.accept() else { continue };
        let phase = Arc::clone(phase);
        let body = move || answer(stream, pod, &phase);
        if let Err(error) = thread::Builder::new().name(format!("pod {pod} answers")).spawn(body) {
            eprintln!("server: no thread for a connection: {error}");
        }
    }
}

fn answer(mut stream: TcpStream, pod: u8, phase: &AtomicU8) {
    let prepared = stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_nodelay(true));
    let mut request = [0];
    while prepared.is_ok() && phase.load(SeqCst) != STOPPED {
        match stream.read(&mut request) {
            Ok(1) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            Ok(_) | Err(_) => return,
        }
        let last = phase.load(SeqCst) != SERVING;
        if stream.write_all(&[pod, last.into()]).is_err() || last {
            return;
        }
    }
}

/// Who answered, and whether for the last time on this connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) pod: u8,
    pub(super) last: bool,
}

/// Connects; `timeout` holds for that and for each wait.
pub(super) fn connect(target: SocketAddr, timeout: Duration) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect_timeout(&target, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One request on a connection.
pub(super) fn ask(mut stream: &TcpStream) -> Result<Answer, Failure> {
    stream.write_all(b"?")?;
    let mut answer = [0; 2];
    stream.read_exact(&mut answer)?;
    match answer {
        [pod, last @ (0 | 1)] => Ok(Answer { pod, last: last == 1 }),
        _ => Err(Failure::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_answer_says_so() {
        let ns = NetNs::current().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Server::start(&ns, 7, port).unwrap();
        let target = SocketAddr::from(([127, 0, 0, 1], port));
        let stream = connect(target, Duration::from_secs(5)).unwrap();
        assert_eq!(ask(&stream), Ok(Answer { pod: 7, last: false }));
        server.finish();
        assert_eq!(connect(target, Duration::from_secs(5)).err(), Some(Failure::Refused));
        assert_eq!(ask(&stream), Ok(Answer { pod: 7, last: true }));
        assert!(ask(&stream).is_err());
    }
}
