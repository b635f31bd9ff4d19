//! What does one client see: an answer with the Pod's name, or a failure of a kind.
//!
//! Everything here blocks the calling thread and makes its sockets in that thread's network namespace.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::pattern::{Digest, Pattern};

/// Largest answer that is no download, head included.
const MAX_ANSWER: usize = 16 * 1024;

/// What is asked, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// One HTTP request on a new TCP connection.
    Http(SocketAddr),
    /// One datagram from a new socket.
    Udp(SocketAddr),
}

impl Target {
    /// Whom the client dials.
    #[must_use]
    pub fn address(self) -> SocketAddr {
        match self {
            Self::Http(address) | Self::Udp(address) => address,
        }
    }
}

/// Why no answer came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Failure {
    /// RST to the SYN, or ICMP port unreachable.
    Refused,
    /// ICMP unreachable of another kind, or no route.
    Unreachable,
    /// Nothing came in time.
    Timeout,
    /// RST on an open connection.
    Reset,
    /// The connection ended before the answer did.
    Closed,
    /// The answer was not what the protocol says.
    Malformed,
    /// Anything else that the system says.
    Other(io::ErrorKind),
}

impl Failure {
    /// One word for tables and labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::Closed => "closed",
            Self::Malformed => "malformed",
            Self::Other(_) => "other",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other(kind) => write!(f, "{kind}"),
            known => f.write_str(known.as_str()),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::ConnectionRefused => Self::Refused,
            Kind::HostUnreachable | Kind::NetworkUnreachable => Self::Unreachable,
            // A blocking socket says "would block" when its timeout is over.
            Kind::TimedOut | Kind::WouldBlock => Self::Timeout,
            Kind::ConnectionReset | Kind::BrokenPipe | Kind::ConnectionAborted => Self::Reset,
            Kind::UnexpectedEof => Self::Closed,
            kind => Self::Other(kind),
        }
    }
}

/// One try: who answered or why nobody did, and how long that took, connecting included.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The answer (the Pod's name), or why there was none.
    pub result: Result<String, Failure>,
    /// From before connecting to the answer or the failure.
    pub latency: Duration,
}

/// Asks once, on a new connection, for the Pod's name.
#[must_use]
pub fn ask(target: Target, timeout: Duration) -> Attempt {
    let begun = Instant::now();
    let result = match target {
        Target::Http(address) => get(address, "/", timeout),
        Target::Udp(address) => datagram(address, b"who", timeout),
    };
    Attempt { result, latency: begun.elapsed() }
}

/// One GET request on a new connection; the body of the answer.
pub fn get(address: SocketAddr, path: &str, timeout: Duration) -> Result<String, Failure> {
    Connection::open(address, timeout)?.request("GET", path, "Connection: close\r\n")
}

/// One datagram from a new socket; the answer's text.
pub fn datagram(address: SocketAddr, payload: &[u8], timeout: Duration) -> Result<String, Failure> {
    let local: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(local)?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.send(payload)?;
    let mut answer = [0; 2048];
    let length = socket.recv(&mut answer)?;
    text(&answer[..length])
}

/// A TCP connection that is kept for many HTTP requests.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects; `timeout` holds for connecting and then for each wait.
    pub fn open(address: SocketAddr, timeout: Duration) -> Result<Self, Failure> {
        let stream = TcpStream::connect_timeout(&address, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(1024) })
    }

    /// One GET request; the body of the answer.
    pub fn get(&mut self, path: &str) -> Result<String, Failure> {
        self.request("GET", path, "")
    }

    /// Our own address, as our namespace sees it.
    pub fn local_address(&self) -> Result<SocketAddr, Failure> {
        Ok(self.stream.local_addr()?)
    }

    /// Has the server send `bytes` bytes, and digests them.
    pub fn download(&mut self, bytes: u64) -> Result<Digest, Failure> {
        self.send_head("GET", &format!("/bytes/{bytes}"), "")?;
        let length = self.read_head()?;
        let mut digest = Digest::default();
        let already = self.buffer.len().min(usize::try_from(length).unwrap_or(usize::MAX));
        digest.update(&self.buffer[..already]);
        self.buffer.drain(..already);
        let mut chunk = vec![0; 256 * 1024];
        while digest.bytes() < length {
            let wanted = (length - digest.bytes()).min(chunk.len() as u64) as usize;
            let read = self.stream.read(&mut chunk[..wanted])?;
            if read == 0 {
                return Err(Failure::Closed);
            }
            digest.update(&chunk[..read]);
        }
        Ok(digest)
    }

    /// Sends `bytes` bytes of [`Pattern`]; the digest that the server answers, as text.
    pub fn upload(&mut self, bytes: u64) -> Result<String, Failure> {
        self.send_head("POST", "/hash", &format!("Content-Length: {bytes}\r\n"))?;
        for chunk in Pattern::new(bytes) {
            self.stream.write_all(&chunk)?;
        }
        self.read_answer()
    }

    fn request(&mut self, method: &str, path: &str, headers: &str) -> Result<String, Failure> {
        self.send_head(method, path, headers)?;
        self.read_answer()
    }

    fn send_head(&mut self, method: &str, path: &str, headers: &str) -> Result<(), Failure> {
        let head = format!("{method} {path} HTTP/1.1\r\nHost: sluice\r\n{headers}\r\n");
        Ok(self.stream.write_all(head.as_bytes())?)
    }

    fn read_answer(&mut self) -> Result<String, Failure> {
        let length = self.read_head()?;
        let length = usize::try_from(length).map_err(|_| Failure::Malformed)?;
        if length > MAX_ANSWER {
            return Err(Failure::Malformed);
        }
        while self.buffer.len() < length {
            self.read_more()?;
        }
        let body = text(&self.buffer[..length]);
        self.buffer.drain(..length);
        body
    }

    /// Reads the head of an answer: what the buffer holds afterwards is body. Returns the body's length.
    fn read_head(&mut self) -> Result<u64, Failure> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut response = httparse::Response::new(&mut headers);
            let parsed = response.parse(&self.buffer).map_err(|_| Failure::Malformed)?;
            if let httparse::Status::Complete(head) = parsed {
                let length = response
                    .headers
                    .iter()
                    .find(|header| header.name.eq_ignore_ascii_case("content-length"))
                    .and_then(|header| str::from_utf8(header.value).ok()?.parse().ok());
                if response.code != Some(200) {
                    return Err(Failure::Malformed);
                }
                self.buffer.drain(..head);
                return length.ok_or(Failure::Malformed);
            }
            self.read_more()?;
        }
    }

    fn read_more(&mut self) -> Result<(), Failure> {
        if self.buffer.len() > MAX_ANSWER {
            return Err(Failure::Malformed);
        }
        let mut chunk = [0; 2048];
        let read = self.stream.read(&mut chunk)?;
        if read == 0 {
            return Err(Failure::Closed);
        }
        self.buffer.extend_from_slice(&chunk[..read]);
        Ok(())
    }
}

fn text(bytes: &[u8]) -> Result<String, Failure> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Failure::Malformed)
}
