//! What becomes of a connection whose endpoint does not take it: it is opened at another one before its client notices.

use super::worker::{Action, Worker, open_at};
use crate::decide::{NewFlow, Verdict};
use crate::flow::{Hit, NewFlowRecord, State};
use crate::net::Direction;
use crate::packet::view::{Packet, Tcp, Transport};
use crate::packet::{rewrite, vnet};
use crate::packet_path::drops::Drop;
use crate::select::select;
use crate::table::Failure;

/// A SYN that comes again after so many milliseconds is a retransmission (RFC 6298 §2: after a second), no duplicate.
const RETRANSMITTED_MS: u32 = 500;

/// How a packet of a connection that is being opened goes on.
pub(super) enum Opening {
    /// As a packet of this flow.
    GoesOn(Hit),
    /// It does not; this happens instead.
    Instead(Action),
}

impl Worker {
    /// Looks at a segment of a flow that is being opened.
    pub(super) fn opening(&mut self, hit: Hit, tcp: &Tcp, now_ms: u64) -> Result<Opening, Drop> {
        let progress = self.shared.flows.opening(&hit, now_ms);
        match hit.direction {
            Direction::Reply if tcp.syn && tcp.ack => self.shared.slots.open_succeeded(hit.fields().endpoint_slot),
            // RFC 9293 §3.10.7.3: a RST counts if it acknowledges the SYN.
            Direction::Reply if tcp.rst && tcp.ack && tcp.acknowledgement == progress.expected => {
                return Ok(match self.failed(&hit, Failure::Refused, now_ms)? {
                    Some(action) => Opening::Instead(action),
                    None => Opening::GoesOn(hit),
                });
            }
            Direction::Request
                if tcp.syn
                    && !progress.is_answered
                    && progress.idle_ms >= RETRANSMITTED_MS
                    && tcp.sequence.wrapping_add(1) == progress.expected =>
            {
                if progress.requests == 1 {
                    self.count_failure(&hit, Failure::Timeout, now_ms);
                }
                return Ok(Opening::GoesOn(self.elsewhere(&hit, now_ms)?.unwrap_or(hit)));
            }
            Direction::Request | Direction::Reply => {}
        }
        Ok(Opening::GoesOn(hit))
    }

    /// Looks at an ICMP error that says that a packet of this flow did not reach its endpoint. `quoted` is that packet.
    pub(super) fn unreachable(&mut self, hit: &Hit, quoted: &Packet, now_ms: u64) -> Result<Option<Action>, Drop> {
        let Transport::Tcp(tcp) = quoted.transport else { return Ok(None) };
        let is_syn = tcp.sequence.wrapping_add(1) == self.shared.flows.opening(hit, now_ms).expected;
        if hit.state() != State::Opening || hit.direction != Direction::Reply || !is_syn {
            return Ok(None);
        }
        self.failed(hit, Failure::Unreachable, now_ms)
    }

    /// The endpoint refuses the connection: sends the SYN to another, if there is one.
    fn failed(&mut self, hit: &Hit, failure: Failure, now_ms: u64) -> Result<Option<Action>, Drop> {
        if self.shared.flows.opening(hit, now_ms).is_answered {
            return Ok(None);
        }
        self.count_failure(hit, failure, now_ms);
        let key = &hit.fields().request;
        if self.shared.opens.find(key).is_none_or(|open| open.syn().0.is_empty()) {
            return Ok(None);
        }
        match self.elsewhere(hit, now_ms)? {
            Some(next) => self.send_syn(&next, now_ms).map(Some),
            None => Ok(None),
        }
    }

    /// Moves a flow to an endpoint where it was not tried yet; nothing when it may not move or there is none.
    fn elsewhere(&mut self, hit: &Hit, now_ms: u64) -> Result<Option<Hit>, Drop> {
        let (fields, shared) = (hit.fields(), &*self.shared);
        let table = self.table.load();
        let new = NewFlow {
            client: fields.request.source.ip(),
            destination: fields.request.destination(),
            protocol: fields.request.protocol,
        };
        let decision = table.decide(&new);
        let (Verdict::Forward { endpoints, masquerade }, Some(frontend)) = (decision.verdict, decision.frontend) else {
            return Ok(None);
        };
        let port = &frontend.port;
        let is_listed = endpoints.iter().any(|endpoint| endpoint.slot == fields.endpoint_slot);
        if !port.retry || (port.affinity.is_some() && is_listed) {
            return Ok(None);
        }
        let Some(mut open) = shared.opens.find(&fields.request) else { return Ok(None) };
        let chosen = open.tried().and_then(|tried| {
            let selection = shared.selection(now_ms, tried);
            select(port.balancing, port.slot, endpoints, &selection, &mut self.rng)
        });
        let Some(chosen) = chosen else { return Ok(None) };
        // From here on there is no way back: when no flow can be opened, the client's next SYN begins anew.
        shared.flows.close(hit);
        let new = NewFlowRecord {
            request: fields.request,
            endpoint: endpoints[chosen].address,
            endpoint_slot: endpoints[chosen].slot,
            port_slot: port.slot,
            frontend: frontend.kind,
            state: State::Opening,
        };
        let next = open_at(shared, table, new, endpoints, chosen, masquerade, now_ms)?;
        open.try_at(next.fields().endpoint_slot);
        if let Some(timeout) = port.affinity {
            let (endpoint, slots) = (next.fields().endpoint_slot, &shared.slots);
            shared.affinity.remember(port.slot, fields.request.source, endpoint, slots, timeout, now_ms);
        }
        super::worker::count(&shared.slots.endpoint(self.thread, next.fields().endpoint_slot).opened, 1);
        super::worker::count(&shared.slots.port(self.thread, port.slot).retried, 1);
        Ok(Some(next))
    }

    /// Sends the SYN that was kept of the flow's client on to the flow's endpoint.
    fn send_syn(&mut self, hit: &Hit, now_ms: u64) -> Result<Action, Drop> {
        let shared = &*self.shared;
        let Some(open) = shared.opens.find(&hit.fields().request) else { return Ok(Action::Discard) };
        let (syn, partial) = open.syn();
        let (header, out) = self.answer.split_at_mut(vnet::LEN);
        let bytes = &mut out[..syn.len()];
        bytes.copy_from_slice(syn);
        let packet = Packet::parse(bytes).map_err(Drop::Malformed)?;
        if partial {
            vnet::partial(header, packet.transport_at, rewrite::TCP_CHECKSUM);
        } else {
            vnet::plain(header);
        }
        let translation = hit.fields().translation(Direction::Request, shared.flows.masquerade());
        rewrite::rewrite(bytes, &packet, partial, &translation);
        if let Transport::Tcp(tcp) = &packet.transport {
            shared.flows.see_tcp(hit, tcp, packet.length, now_ms);
        }
        self.count_traffic(hit, packet.length);
        Ok(Action::Answer(vnet::LEN + packet.length))
    }

    fn count_failure(&self, hit: &Hit, failure: Failure, now_ms: u64) {
        let (fields, slots) = (hit.fields(), &self.shared.slots);
        super::worker::count(&slots.port(self.thread, fields.port_slot).failed[failure as usize], 1);
        slots.open_failed(fields.endpoint_slot, self.shared.settings.eject_after, now_ms);
    }
}
