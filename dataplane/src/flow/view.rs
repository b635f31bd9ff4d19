//! Flows as people see them.

use std::net::SocketAddr;

use super::FlowTable;
use super::record::Source;
use crate::net::Protocol;
use crate::table::{EndpointSlot, FrontendKind, PortSlot};

/// A flow as `get flows` shows it.
#[derive(Clone, Debug)]
pub struct FlowView {
    /// Protocol.
    pub protocol: Protocol,
    /// Client address and port.
    pub client: SocketAddr,
    /// Frontend that was dialled.
    pub frontend: SocketAddr,
    /// Kind of that frontend.
    pub kind: FrontendKind,
    /// Endpoint.
    pub endpoint: SocketAddr,
    /// Source that the endpoint sees, when it is not the client.
    pub masquerade: Option<SocketAddr>,
    /// State name.
    pub state: &'static str,
    /// Seconds since it opened.
    pub age_seconds: u32,
    /// Milliseconds since its last packet.
    pub idle_ms: u32,
    /// Bytes of IP packets by direction.
    pub bytes: [u64; 2],
    /// Packets by direction, modulo 2^32.
    pub packets: [u32; 2],
    /// Counters of the Service port.
    pub port_slot: PortSlot,
    /// Counters of the endpoint.
    pub endpoint_slot: EndpointSlot,
}

impl FlowTable {
    /// Every flow, as it is when the iterator comes to it.
    pub fn views(&self, now_ms: u64) -> impl Iterator<Item = FlowView> {
        self.records().iter().enumerate().filter_map(move |(number, record)| {
            let snapshot = self.settled(number as u32, record.read()?);
            let fields = &snapshot.fields;
            let (bytes, packets) = record.traffic();
            let reply = fields.reply(self.masquerade());
            Some(FlowView {
                protocol: fields.request.protocol,
                client: fields.request.source(),
                frontend: fields.request.destination(),
                kind: fields.frontend,
                endpoint: reply.source(),
                masquerade: (fields.source != Source::Preserved).then(|| reply.destination()),
                state: snapshot.state().name(),
                age_seconds: ((now_ms / 1000) as u32).wrapping_sub(fields.opened),
                idle_ms: record.idle_ms(now_ms as u32),
                bytes,
                packets,
                port_slot: fields.port_slot,
                endpoint_slot: fields.endpoint_slot,
            })
        })
    }
}
