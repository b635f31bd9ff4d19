//! One question at a time: which addresses a name server answers a name with now.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hickory_proto::op::Message;
use hickory_proto::rr::RData;

use crate::workload::questions::Question;

/// How long an answer is waited for.
const WAIT: Duration = Duration::from_millis(200);

/// A client of one name server.
#[derive(Debug)]
pub struct NameClient {
    socket: UdpSocket,
    id: u16,
}

impl NameClient {
    /// In the calling thread's namespace.
    ///
    /// # Errors
    /// When the system refuses a socket.
    pub fn new(server: SocketAddr) -> Result<Self> {
        let any: SocketAddr = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
        let socket = UdpSocket::bind(any).context("cannot open a socket")?;
        socket.connect(server).with_context(|| format!("cannot ask {server}"))?;
        socket.set_read_timeout(Some(WAIT))?;
        Ok(Self { socket, id: 0 })
    }

    /// Addresses that are answered; nothing when no answer came in time.
    ///
    /// # Errors
    /// When what came is no DNS message.
    pub fn addresses(&mut self, question: &Question) -> Result<Option<Vec<IpAddr>>> {
        self.id = self.id.wrapping_add(1);
        let mut message = question.wire.to_vec();
        message[..2].copy_from_slice(&self.id.to_be_bytes());
        let mut received = [0; 4096];
        // Who does not listen refuses: that is no answer either.
        let Ok(length) = self.socket.send(&message).and_then(|_| self.socket.recv(&mut received)) else {
            return Ok(None);
        };
        let answer = Message::from_vec(&received[..length]).context("no DNS message")?;
        // To a question that was given up.
        if answer.id != self.id {
            return Ok(None);
        }
        let address = |data: &RData| match data {
            RData::A(address) => Some(IpAddr::V4(address.0)),
            RData::AAAA(address) => Some(IpAddr::V6(address.0)),
            _ => None,
        };
        Ok(Some(answer.answers.iter().filter_map(|record| address(&record.data)).collect()))
    }
}
