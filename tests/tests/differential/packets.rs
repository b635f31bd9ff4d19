//! The first packet of a flow through a packet thread, compared with an answer.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use etherparse::{IpHeaders, PacketBuilder, PacketBuilderStep};
use sluice_dataplane::packet::view::{Packet, Transport};
use sluice_dataplane::packet::vnet;
use sluice_dataplane::packet_path::{Action, Settings, Shared, Worker};
use sluice_dataplane::table::RoutingTable;
use sluice_tests::naive::{Answer, Flow};

/// A packet thread with a table.
pub(crate) struct Path {
    shared: Arc<Shared>,
    worker: Worker,
    client_port: u16,
    /// Time of the packet path's clock, in milliseconds.
    pub(crate) now_ms: u64,
}

/// Where a flow's first packet was sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent {
    /// The client.
    pub(crate) from: SocketAddr,
    /// What it dials.
    pub(crate) to: SocketAddr,
    /// Who the endpoint takes for the client.
    pub(crate) seen: SocketAddr,
    /// The endpoint.
    pub(crate) endpoint: SocketAddr,
}

/// Addresses that stand in for clients.
const MASQUERADE: [&str; 2] = ["192.0.2.250", "2001:db8:250::1"];

impl Path {
    /// Without a table.
    pub(crate) fn new() -> Self {
        let shared = Shared::new(Settings {
            workers: 1,
            flow_capacity: 256,
            masquerade_addresses: MASQUERADE.iter().map(|address| address.parse().expect("a constant")).collect(),
            masquerade_ports: 61000..=65534,
            seed: 1,
            ..Settings::default()
        });
        Self { worker: Worker::new(Arc::clone(&shared), 0), shared, client_port: 20_000, now_ms: 1_000_000 }
    }

    /// What the table must count in.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Uses this table.
    pub(crate) fn publish(&self, table: Arc<RoutingTable>) {
        self.shared.publish(table);
    }

    /// Sends the first packet of a flow. Where it went, if to an endpoint, or what of its fate is not what the answer says.
    pub(crate) fn open(&mut self, flow: &Flow, answer: &Answer) -> Result<Option<Sent>, String> {
        self.client_port += 1;
        let from = SocketAddr::new(flow.client, self.client_port);
        let sent = frame(from, flow);
        let mut frame = sent.clone();
        let action = self.worker.handle(&mut frame, self.now_ms);
        let found = match action {
            Action::Discard if answer.outcome == "drop" => return Ok(None),
            Action::Send if answer.outcome == "pass" && frame == sent => return Ok(None),
            Action::Answer(length) if answer.outcome == "reject" => {
                let refusal = self.worker.answer(length)[vnet::LEN..].to_vec();
                return refusal_is_wrong(&refusal, from, flow).map_or(Ok(None), Err);
            }
            Action::Send if answer.outcome == "forward" => {
                let (source, endpoint) = ends(&frame);
                let masquerade = answer.masquerade || endpoint.ip() == flow.client;
                let stands_in = MASQUERADE.iter().any(|address| address.parse() == Ok(source.ip()));
                let source_is_right = if masquerade { stands_in } else { source == from };
                if answer.endpoints.contains(&endpoint.to_string()) && source_is_right && frame.len() == sent.len() {
                    return Ok(Some(Sent { from, to: flow.to, seen: source, endpoint }));
                }
                format!("sent from {source} to {endpoint}")
            }
            other => format!("{other:?}"),
        };
        Err(format!("{found}; drops: {:?}", self.shared.drops()))
    }

    /// Sends a TCP segment that is no SYN, or is an answer to one. Where it went, or `None` when it was answered with a RST.
    pub(crate) fn segment(
        &mut self,
        from: SocketAddr,
        to: SocketAddr,
        is_syn: bool,
    ) -> Option<(SocketAddr, SocketAddr)> {
        let mut frame = vec![0; vnet::LEN];
        let step = ip(from.ip(), to.ip()).tcp(from.port(), to.port(), 1001, 64000).ack(1001);
        let step = if is_syn { step.syn() } else { step };
        step.write(&mut frame, b"").expect("a Vec takes all");
        match self.worker.handle(&mut frame, self.now_ms) {
            Action::Send => Some(ends(&frame)),
            Action::Answer(length) => {
                let packet = Packet::parse(&self.worker.answer(length)[vnet::LEN..]).expect("ours").transport;
                assert!(matches!(packet, Transport::Tcp(tcp) if tcp.rst), "{packet:?}");
                None
            }
            other => panic!("{other:?}; drops: {:?}", self.shared.drops()),
        }
    }
}

/// Source and destination of a frame of ours.
fn ends(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    let packet = Packet::parse(&frame[vnet::LEN..]).expect("what is sent on is a packet");
    let source = SocketAddr::new(packet.source.ip(), packet.source_port);
    (source, SocketAddr::new(packet.destination.ip(), packet.destination_port))
}

/// A RST from the frontend for TCP, else ICMP port unreachable.
fn refusal_is_wrong(bytes: &[u8], from: SocketAddr, flow: &Flow) -> Option<String> {
    let Ok(packet) = Packet::parse(bytes) else { return Some(format!("an unreadable refusal {bytes:?}")) };
    let addresses = packet.source.ip() == flow.to.ip() && packet.destination.ip() == from.ip();
    let is_right = match packet.transport {
        Transport::Tcp(tcp) => {
            let ports = (packet.source_port, packet.destination_port) == (flow.to.port(), from.port());
            flow.protocol == "TCP" && tcp.rst && ports
        }
        Transport::Icmp(kind) => {
            let wanted = if from.is_ipv4() { (3, 3) } else { (1, 4) };
            flow.protocol != "TCP" && (kind, bytes[packet.transport_at + 1]) == wanted
        }
        _ => false,
    };
    (!(is_right && addresses)).then(|| format!("refused with {packet:?}"))
}

/// A SYN, a datagram, or an SCTP packet.
fn frame(from: SocketAddr, flow: &Flow) -> Vec<u8> {
    let mut frame = vec![0; vnet::LEN];
    let ports = (from.port(), flow.to.port());
    let ip = ip(from.ip(), flow.to.ip());
    let written = match flow.protocol {
        "TCP" => ip.tcp(ports.0, ports.1, 1000, 64000).syn().write(&mut frame, b""),
        "UDP" => ip.udp(ports.0, ports.1).write(&mut frame, b"question"),
        _ => {
            let mut packet = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
            // No verification tag, no checksum (nobody checks it here), and an INIT chunk.
            packet.extend([0; 8]);
            packet.extend([1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 16, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
            ip.write(&mut frame, etherparse::IpNumber(132), &packet)
        }
    };
    written.expect("a Vec takes all");
    frame
}

fn ip(from: IpAddr, to: IpAddr) -> PacketBuilderStep<IpHeaders> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
        _ => unreachable!("a flow has one family"),
    }
}
