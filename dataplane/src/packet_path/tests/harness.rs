//! One packet thread and its table, driven packet by packet; time moves only when told.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use etherparse::PacketBuilder;

use super::super::{Action, Keeper, Settings, Shared, Worker};
use crate::net::Protocol;
use crate::packet::checksum;
use crate::packet::view::{Packet, Tcp, Transport};
use crate::packet::vnet;
use crate::table::{DrainTimeout, EndpointSpec, NodeSpec, PortSpec, ServiceName, ServiceSpec, TableBuilder};

pub(super) const CLIENT: &str = "10.244.0.9:40000";
pub(super) const FRONTEND: &str = "10.96.0.10:80";
pub(super) const NODE: &str = "192.168.0.1";

pub(super) fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// One packet thread with its table; time moves only when told.
pub(super) struct Path {
    pub(super) shared: Arc<Shared>,
    pub(super) worker: Worker,
    pub(super) builder: TableBuilder,
    pub(super) keeper: Keeper,
    pub(super) affinity: Option<Duration>,
    pub(super) retry: bool,
    pub(super) hold: Option<Duration>,
    pub(super) now_ms: u64,
}

impl Path {
    pub(super) fn new(flow_capacity: usize) -> Self {
        Self::over(Shared::new(settings(flow_capacity)))
    }

    pub(super) fn over(shared: Arc<Shared>) -> Self {
        let mut builder = TableBuilder::new(Arc::clone(&shared.slots));
        builder.inherit(shared.flows().map(|flow| (flow.endpoint.ip(), flow.endpoint_slot)));
        builder.set_node(NodeSpec {
            addresses: vec![NODE.parse().unwrap()],
            node_port_addresses: vec![NODE.parse().unwrap()],
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
            ..NodeSpec::default()
        });
        let (worker, keeper) = (Worker::new(Arc::clone(&shared), 0), Keeper::new(Arc::clone(&shared)));
        Self { worker, keeper, shared, builder, affinity: None, retry: true, hold: None, now_ms: 1_000_000 }
    }

    /// Publishes one Service `FRONTEND` with node port 30080 on these endpoints.
    pub(super) fn serve(&mut self, protocol: Protocol, endpoints: &[&str]) {
        let ready = endpoints.iter().map(|text| EndpointSpec::ready(socket(text))).collect();
        self.serve_all(protocol, ready);
    }

    /// The same with endpoints in any condition; new flows are for the ready ones.
    pub(super) fn serve_all(&mut self, protocol: Protocol, endpoints: Vec<EndpointSpec>) {
        let port = PortSpec {
            node_port: Some(30080),
            affinity: self.affinity,
            has_any_endpoint: !endpoints.is_empty(),
            retry: self.retry,
            drain_timeout: DrainTimeout::After(Duration::from_secs(60)),
            hold: self.hold,
            ..PortSpec::plain(protocol, socket(FRONTEND), endpoints)
        };
        self.builder.set(ServiceSpec { name: ServiceName::new("a", "b"), created: None, ports: vec![port] });
        self.shared.publish(self.builder.build());
    }

    /// Sends a packet; what comes back as (source, destination, packet, bytes).
    pub(super) fn send(&mut self, mut frame: Vec<u8>) -> Option<(SocketAddr, SocketAddr, Packet, Vec<u8>)> {
        let bytes = match self.worker.handle(&mut frame, self.now_ms) {
            Action::Send => frame,
            Action::Answer(length) => self.worker.answer(length).to_vec(),
            Action::Discard => return None,
        };
        let bytes = bytes[vnet::LEN..].to_vec();
        let packet = Packet::parse(&bytes).unwrap();
        let at = |ip: IpAddr, port| SocketAddr::new(ip, port);
        let source = at(packet.source.ip(), packet.source_port);
        Some((source, at(packet.destination.ip(), packet.destination_port), packet, bytes))
    }

    pub(super) fn tcp(
        &mut self,
        from: &str,
        to: &str,
        flags: &str,
    ) -> Option<(SocketAddr, SocketAddr, Packet, Vec<u8>)> {
        self.send(tcp(socket(from), socket(to), flags))
    }

    /// Opens a connection from `from` and returns (source that the endpoint sees, endpoint).
    pub(super) fn connect(&mut self, from: &str, to: &str) -> (SocketAddr, SocketAddr) {
        let (seen, endpoint, ..) = self.tcp(from, to, "S").expect("the SYN is forwarded");
        let (frontend, client, ..) = self.send(tcp(endpoint, seen, "SA")).expect("the SYN-ACK is forwarded");
        assert_eq!((frontend, client), (socket(to), socket(from)));
        let (again, same, ..) = self.tcp(from, to, "A").expect("the ACK is forwarded");
        assert_eq!((again, same), (seen, endpoint));
        (seen, endpoint)
    }

    /// A round of the keeper; the packets that it sends.
    pub(super) fn keep(&mut self) -> Vec<(SocketAddr, SocketAddr, Tcp)> {
        let mut sent = Vec::new();
        let mut send = |frame: &[u8]| {
            let bytes = &frame[vnet::LEN..];
            let packet = Packet::parse(bytes).unwrap();
            let Transport::Tcp(tcp) = packet.transport else { panic!("only TCP is reset") };
            let body = &bytes[packet.transport_at..];
            let addresses: Vec<u8> = [packet.source, packet.destination].iter().flat_map(|side| side.bytes()).collect();
            let (pseudo, length) = (checksum::sum(&addresses), 6 + body.len() as u64);
            // An IPv4-mapped prefix twice adds 2 * 0xffff, which is zero.
            assert_eq!(checksum::fold(pseudo + length + checksum::sum(body)), 0xffff, "checksum");
            let key = packet.key(Protocol::Tcp);
            sent.push((key.source(), key.destination(), tcp));
        };
        while self.keeper.round(self.now_ms, &mut send) {}
        sent
    }

    pub(super) fn states(&self) -> Vec<&'static str> {
        self.shared.flows.views(self.now_ms).map(|flow| flow.state).collect()
    }
}

/// A folder in memory, where there is one: flow files are sparse and large.
pub(super) fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

pub(super) fn settings(flow_capacity: usize) -> Settings {
    Settings {
        workers: 1,
        flow_capacity,
        masquerade_addresses: vec![NODE.parse().unwrap(), "fd00::1".parse().unwrap()],
        masquerade_ports: 61000..=61003,
        seed: 1,
        ..Settings::default()
    }
}

fn ip(from: SocketAddr, to: SocketAddr) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
        _ => panic!("mixed families"),
    }
}

pub(super) fn tcp(from: SocketAddr, to: SocketAddr, flags: &str) -> Vec<u8> {
    segment(from, to, flags, 1000, 1000)
}

pub(super) fn segment(from: SocketAddr, to: SocketAddr, flags: &str, sequence: u32, acknowledgement: u32) -> Vec<u8> {
    let mut step = ip(from, to).tcp(from.port(), to.port(), sequence, 64000);
    for flag in flags.chars() {
        step = match flag {
            'S' => step.syn(),
            'A' => step.ack(acknowledgement),
            'F' => step.fin(),
            'R' => step.rst(),
            _ => panic!("unknown flag {flag}"),
        };
    }
    let mut frame = vec![0; vnet::LEN];
    step.write(&mut frame, b"").unwrap();
    frame
}

pub(super) fn udp(from: &str, to: &str) -> Vec<u8> {
    let mut frame = vec![0; vnet::LEN];
    let (from, to) = (socket(from), socket(to));
    ip(from, to).udp(from.port(), to.port()).write(&mut frame, b"question").unwrap();
    frame
}

pub(super) fn is_reset(packet: &Packet) -> bool {
    matches!(packet.transport, Transport::Tcp(tcp) if tcp.rst)
}
