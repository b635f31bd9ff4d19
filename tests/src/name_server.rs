//! A DNS server that is played: an upstream with scripted answers, which counts what it is asked.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, CNAME, SOA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use sluice_bench::netns::NetNs;

use crate::probe::{Background, LOOK};

/// Addresses of names; a name without any does not exist. Answers of more than 20 addresses are truncated in datagrams.
pub type Names = BTreeMap<&'static str, Vec<Ipv4Addr>>;

/// A running server.
pub struct NameServer {
    asked: Arc<AtomicU64>,
    connections: Arc<AtomicU64>,
    delay: Arc<Mutex<Duration>>,
    _threads: [Background; 2],
}

impl NameServer {
    /// Serves these names inside `ns`.
    pub fn start(ns: &NetNs, address: SocketAddr, names: Names) -> Result<Self> {
        let (socket, listener) = ns.run(|| {
            let socket = UdpSocket::bind(address).with_context(|| format!("cannot bind {address}"))?;
            Ok((socket, TcpListener::bind(address)?))
        })?;
        socket.set_read_timeout(Some(LOOK))?;
        listener.set_nonblocking(true)?;
        let (asked, connections) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let delay = Arc::new(Mutex::new(Duration::ZERO));
        let (counted, names_too, waits) = (Arc::clone(&asked), names.clone(), Arc::clone(&delay));
        let datagrams = Background::start(move || {
            let mut buffer = [0; 4096];
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { return };
            counted.fetch_add(1, Relaxed);
            std::thread::sleep(*waits.lock().unwrap_or_else(PoisonError::into_inner));
            if let Some(answer) = answer(&buffer[..length], &names_too, true) {
                drop(socket.send_to(&answer, from));
            }
        })?;
        let (counted, connected) = (Arc::clone(&asked), Arc::clone(&connections));
        let streams = Background::start(move || {
            let mut stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return std::thread::sleep(LOOK / 5),
                Err(_) => return,
            };
            connected.fetch_add(1, Relaxed);
            let mut converse = || -> std::io::Result<()> {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(Duration::from_secs(1)))?;
                let mut length = [0; 2];
                stream.read_exact(&mut length)?;
                let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut question)?;
                counted.fetch_add(1, Relaxed);
                let answer = answer(&question, &names, false).unwrap_or_default();
                stream.write_all(&[&(answer.len() as u16).to_be_bytes()[..], &answer].concat())
            };
            drop(converse());
        })?;
        Ok(Self { asked, connections, delay, _threads: [datagrams, streams] })
    }

    /// Questions so far.
    #[must_use]
    pub fn asked(&self) -> u64 {
        self.asked.load(Relaxed)
    }

    /// Connections so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    /// Answers take so long from now on.
    pub fn set_delay(&self, delay: Duration) {
        *self.delay.lock().unwrap_or_else(PoisonError::into_inner) = delay;
    }
}

fn answer(question: &[u8], names: &Names, is_datagram: bool) -> Option<Vec<u8>> {
    let question = Message::from_vec(question).ok()?;
    let query = question.queries.first()?.clone();
    let mut answer = Message::response(question.id, question.op_code);
    answer.metadata.recursion_available = true;
    answer.metadata.recursion_desired = true;
    let name = query.name().to_ascii().to_ascii_lowercase();
    let (kind, owner) = (query.query_type(), query.name().clone());
    answer.add_query(query);
    match names.get(name.trim_end_matches('.')) {
        Some(addresses) => {
            let mut owner = owner;
            if name.starts_with("alias.") {
                let target = Name::from_ascii("real.example.org.").ok()?;
                answer.add_answer(Record::from_rdata(owner, 60, RData::CNAME(CNAME(target.clone()))));
                owner = target;
            }
            if is_datagram && addresses.len() > 20 {
                answer.metadata.truncation = true;
            } else if kind == RecordType::A {
                let records = addresses.iter().map(|it| Record::from_rdata(owner.clone(), 60, RData::A(A(*it))));
                answer.add_answers(records.collect::<Vec<_>>());
            }
        }
        None => {
            answer.metadata.response_code = ResponseCode::NXDomain;
            let zone = Name::from_ascii("org.").ok()?;
            let soa = SOA::new(zone.clone(), zone.clone(), 1, 7200, 1800, 86400, 60);
            answer.add_authority(Record::from_rdata(zone, 60, RData::SOA(soa)));
        }
    }
    answer.to_vec().ok()
}
