//! The pure step of a packet thread: one packet and the time in, what to do with it out. No I/O, no clock, no allocation;
//! a lock only where a flow begins or is missing.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use arc_swap::Cache;

use crate::decide::{NewFlow, Verdict};
use crate::flow::{Address, FlowKey, Full, Hit, NewFlowRecord, Source, SourceChoice, State};
use crate::net::{Direction, Protocol};
use crate::offload::Level;
use crate::packet::view::{Packet, Tcp, Transport};
use crate::packet::{icmp, reply, rewrite, vnet};
use crate::packet_path::drops::Drop;
use crate::packet_path::fragments::Fate;
use crate::packet_path::held::Meets;
use crate::packet_path::opening::Opening;
use crate::packet_path::shared::Shared;
use crate::packet_path::ways::Way;
use crate::select::select;
use crate::table::{Endpoint, RoutingTable, Standing};

/// What to do with the packet that was handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send it on: it was rewritten in place, or is none of ours.
    Send,
    /// Discard it and send the answer of this many bytes, offload header included, that lies in [`Worker::answer`].
    Answer(usize),
    /// Discard it.
    Discard,
}

/// One packet thread's own state.
pub struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) table: Cache<Arc<arc_swap::ArcSwap<RoutingTable>>, Arc<RoutingTable>>,
    pub(super) thread: usize,
    pub(super) rng: fastrand::Rng,
    pub(super) answer: Box<[u8; vnet::LEN + reply::LIMIT]>,
    /// The message that answers a question, while its packet is made.
    pub(super) name_answer: Vec<u8>,
    /// Clients may wait for a first endpoint; when not, they have waited.
    pub(super) holds: bool,
    /// See [`Worker::onward`].
    pub(super) onward: Option<Address>,
}

impl Worker {
    /// The state of packet thread number `thread`.
    pub fn new(shared: Arc<Shared>, thread: usize) -> Self {
        let seed = shared.settings.seed.wrapping_add(thread as u64);
        Self {
            table: Cache::new(Arc::clone(&shared.table)),
            shared,
            thread,
            rng: fastrand::Rng::with_seed(seed),
            answer: Box::new([0; vnet::LEN + reply::LIMIT]),
            name_answer: Vec::with_capacity(reply::LIMIT),
            holds: true,
            onward: None,
        }
    }

    /// Handles one frame: offload header, then IP packet. `now_ms`: any monotonic clock in milliseconds.
    pub fn handle(&mut self, frame: &mut [u8], now_ms: u64) -> Action {
        self.step(frame, now_ms).unwrap_or_else(|reason| {
            self.shared.drops[self.thread].count(reason);
            Action::Discard
        })
    }

    /// The answer that [`Action::Answer`] speaks of.
    pub fn answer(&self, length: usize) -> &[u8] {
        &self.answer[..length]
    }

    /// Where the packet goes that [`Action::Send`] speaks of, when it may be sent there on a link. Connection tracking must see
    /// requests with the client's address, unless the kernel's program does: one of both has to bring their replies to us.
    pub(super) fn onward(&self) -> Option<Address> {
        self.onward
    }

    fn step(&mut self, frame: &mut [u8], now_ms: u64) -> Result<Action, Drop> {
        self.onward = None;
        let Some((header, bytes)) = frame.split_at_mut_checked(vnet::LEN) else {
            return Err(Drop::Malformed(crate::packet::Malformed::IpHeader));
        };
        let partial = vnet::checksum_is_partial(header);
        let packet = Packet::parse(bytes).map_err(Drop::Malformed)?;
        match packet.transport {
            Transport::Tcp(tcp) => self.of_flow(bytes, &packet, Protocol::Tcp, Some(tcp), partial, now_ms),
            Transport::Udp => match self.answer_name(header, bytes, &packet) {
                Some(action) => Ok(action),
                None => self.of_flow(bytes, &packet, Protocol::Udp, None, partial, now_ms),
            },
            Transport::Sctp => self.of_flow(bytes, &packet, Protocol::Sctp, None, partial, now_ms),
            Transport::Icmp(kind) if icmp::is_error(packet.family, kind) => self.icmp_error(bytes, &packet, now_ms),
            Transport::Icmp(_) | Transport::Other => self.without_ports(bytes, &packet),
            Transport::Fragment => self.fragment(bytes, &packet, now_ms),
        }
    }

    fn of_flow(
        &mut self,
        bytes: &mut [u8],
        packet: &Packet,
        protocol: Protocol,
        tcp: Option<Tcp>,
        partial: bool,
        now_ms: u64,
    ) -> Result<Action, Drop> {
        let key = packet.key(protocol);
        let found = self.shared.flows.find(&key);
        let mut is_new = false;
        let hit = match found.map(|hit| (self.standing(&hit, tcp), hit)) {
            Some((Stands::GoesOn, hit)) => match tcp.filter(|_| hit.state() == State::Opening) {
                Some(tcp) => match self.opening(hit, &tcp, now_ms)? {
                    Opening::GoesOn(hit) => hit,
                    Opening::Instead(action) => return Ok(action),
                },
                None => hit,
            },
            Some((Stands::Ended, _)) => return self.answer_ended(bytes, packet, tcp),
            over => {
                over.inspect(|(_, over)| self.shared.flows.close(over));
                match self.open(bytes, packet, &key, tcp, partial, now_ms)? {
                    Opened::Flow(hit) => {
                        is_new = true;
                        hit
                    }
                    Opened::Not(action) => {
                        if action == Action::Send {
                            self.shared.fragments.keep(packet, Fate::Pass, now_ms);
                        }
                        return Ok(action);
                    }
                }
            }
        };
        self.shared.fragments.keep(packet, Fate::Flow(key), now_ms);
        let flows = &self.shared.flows;
        let translation = hit.fields().translation(hit.direction, flows.masquerade());
        rewrite::rewrite(bytes, packet, partial, &translation);
        match tcp {
            Some(tcp) => {
                flows.see_tcp(&hit, &tcp, packet.length, now_ms);
                self.offload(&hit, &tcp, is_new, now_ms);
            }
            None => flows.see_datagram(&hit, packet.length, now_ms),
        }
        let is_masqueraded = hit.fields().source != Source::Preserved;
        if hit.direction == Direction::Reply || is_masqueraded || flows.offloaded(&hit) != Level::None {
            self.onward = Some(translation.destination);
        }
        self.count_traffic(&hit, packet.length);
        Ok(Action::Send)
    }

    /// Has the kernel carry what it can of a connection: from its first packet on, or as soon as the ways to both ends are known. One
    /// that keeps the client's address and that connection tracking has seen stays there: it would never learn of its end.
    fn offload(&self, hit: &Hit, tcp: &Tcp, is_new: bool, now_ms: u64) {
        let (flows, settings) = (&self.shared.flows, &self.shared.settings);
        let Some((ways, offload)) = settings.ways.as_ref().zip(settings.offload.as_ref()) else { return };
        let is_answered = match (hit.state(), hit.direction) {
            (State::Opening, Direction::Request) if is_new => false,
            (State::Opening, Direction::Reply) if tcp.syn && tcp.ack => true,
            (State::Established, _) if !tcp.syn && !tcp.fin && !tcp.rst => true,
            _ => return,
        };
        let fields = hit.fields();
        let level = flows.offloaded(hit);
        let is_preserved = fields.source == Source::Preserved;
        if level == Level::Carried || (is_preserved && level == Level::None && !is_new) {
            return;
        }
        let (to_endpoint, to_client) = (ways.find(fields.endpoint, now_ms), ways.find(fields.request.source, now_ms));
        let sees_replies = |way: &Way| offload.is_at(way.link);
        if to_client.is_some() && to_endpoint.as_ref().is_some_and(sees_replies) {
            flows.carry(hit, is_answered);
        } else if is_preserved && is_new && ways.last(fields.endpoint).as_ref().is_some_and(sees_replies) {
            // It can be carried in a moment.
            flows.hold(hit);
        }
    }

    /// A later fragment goes where the first went.
    fn fragment(&mut self, bytes: &mut [u8], packet: &Packet, now_ms: u64) -> Result<Action, Drop> {
        let key = match self.shared.fragments.find(packet, now_ms) {
            Some(Fate::Flow(key)) => key,
            Some(Fate::Pass) => return Ok(Action::Send),
            None => return Err(Drop::Fragment),
        };
        let flows = &self.shared.flows;
        let hit = flows.find(&key).ok_or(Drop::Fragment)?;
        rewrite::rewrite(bytes, packet, false, &hit.fields().translation(hit.direction, flows.masquerade()));
        if key.protocol == Protocol::Udp {
            flows.see_datagram(&hit, packet.length, now_ms);
        }
        self.count_traffic(&hit, packet.length);
        Ok(Action::Send)
    }

    /// Counts a packet of the flow.
    pub(super) fn count_traffic(&self, hit: &Hit, length: usize) {
        let (slots, at) = (&self.shared.slots, hit.direction.index());
        let endpoint = slots.endpoint(self.thread, hit.fields().endpoint_slot);
        let port = slots.port(self.thread, hit.fields().port_slot);
        for (bytes, packets) in [(&endpoint.bytes, &endpoint.packets), (&port.bytes, &port.packets)] {
            count(&bytes[at], length as u64);
            count(&packets[at], 1);
        }
    }

    /// How the flow stands to a packet of it. A SYN on a finished flow begins a new one, and so does a datagram to an
    /// endpoint that no longer serves; a connection to an endpoint that is gone is over.
    fn standing(&self, hit: &Hit, tcp: Option<Tcp>) -> Stands {
        let fields = hit.fields();
        let endpoint = self.shared.slots.standing(fields.endpoint_slot);
        match (tcp, hit.direction) {
            (Some(tcp), direction) => {
                let begins = direction == Direction::Request && tcp.syn && !tcp.ack;
                let ended = endpoint == Standing::Gone || hit.state() == State::Reset;
                match (begins, ended) {
                    (true, _) if ended || hit.state().is_finished() => Stands::Over,
                    (false, true) => Stands::Ended,
                    (_, _) => Stands::GoesOn,
                }
            }
            (None, Direction::Reply) => Stands::GoesOn,
            (None, Direction::Request) => match (endpoint, fields.request.protocol) {
                (Standing::Gone, _) | (Standing::NoDatagrams, Protocol::Udp) => Stands::Over,
                (Standing::Serves | Standing::NoDatagrams, _) => Stands::GoesOn,
            },
        }
    }

    /// Answers a segment of a flow that we ended, or are about to end: not a byte of it goes on.
    fn answer_ended(&mut self, bytes: &[u8], packet: &Packet, tcp: Option<Tcp>) -> Result<Action, Drop> {
        match tcp {
            Some(tcp) if !tcp.rst => refuse(bytes, packet, &mut self.answer[..]),
            Some(_) | None => Err(Drop::EndpointGone),
        }
    }

    /// Decides about the first packet of a flow.
    fn open(
        &mut self,
        bytes: &[u8],
        packet: &Packet,
        key: &FlowKey,
        tcp: Option<Tcp>,
        partial: bool,
        now_ms: u64,
    ) -> Result<Opened, Drop> {
        let table = self.table.load();
        if table.generation() == 0 {
            return Err(Drop::NoTable);
        }
        let flow = NewFlow { client: key.source.ip(), destination: key.destination(), protocol: key.protocol };
        let decision = table.decide(&flow);
        let first = tcp.is_none_or(|tcp| tcp.syn && !tcp.ack);
        if !first && !matches!(decision.verdict, Verdict::Pass) {
            // In the middle of a connection that nobody knows: its ends had better learn it.
            self.shared.drops[self.thread].count(Drop::NoFlow);
            return refuse(bytes, packet, &mut self.answer[..]).map(Opened::Not);
        }
        let port = decision.frontend.map(|frontend| self.shared.slots.port(self.thread, frontend.port.slot));
        match (decision.verdict, decision.frontend) {
            (Verdict::Pass, _) => Ok(Opened::Not(Action::Send)),
            (Verdict::Drop, _) => {
                port.inspect(|port| count(&port.dropped, 1));
                Err(Drop::Rule)
            }
            (Verdict::Reject, Some(frontend)) if self.holds && tcp.is_some() && frontend.port.hold.is_some() => {
                let (slot, hold) = (frontend.port.slot, frontend.port.hold.unwrap_or_default());
                let syn = (&bytes[..packet.length], partial);
                match self.shared.held.wait(key, slot, syn, hold, now_ms) {
                    Meets::Waits => Ok(Opened::Not(Action::Discard)),
                    Meets::NoRoom => {
                        port.inspect(|port| count(&port.rejected, 1));
                        refuse(bytes, packet, &mut self.answer[..]).map(Opened::Not)
                    }
                }
            }
            (Verdict::Reject, _) | (Verdict::Forward { .. }, None) => {
                port.inspect(|port| count(&port.rejected, 1));
                refuse(bytes, packet, &mut self.answer[..]).map(Opened::Not)
            }
            (Verdict::Forward { endpoints, masquerade }, Some(frontend)) => {
                let (shared, slot) = (&self.shared, frontend.port.slot);
                let sticky = frontend.port.affinity.map(|timeout| (timeout, key.source));
                let chosen = sticky
                    .and_then(|(_, client)| shared.affinity.recall(slot, client, endpoints, &shared.slots, now_ms))
                    .or_else(|| {
                        let selection = shared.selection(now_ms, &[]);
                        select(frontend.port.balancing, slot, endpoints, &selection, &mut self.rng)
                    })
                    .ok_or(Drop::Rule)?;
                let new = NewFlowRecord {
                    request: *key,
                    endpoint: endpoints[chosen].address,
                    endpoint_slot: endpoints[chosen].slot,
                    port_slot: slot,
                    frontend: frontend.kind,
                    state: if tcp.is_some() { State::Opening } else { State::Unreplied },
                };
                let hit = open_at(shared, table, new, endpoints, chosen, masquerade, now_ms)?;
                if let Some((timeout, client)) = sticky {
                    let (endpoint, slots) = (hit.fields().endpoint_slot, &shared.slots);
                    shared.affinity.remember(slot, client, endpoint, slots, timeout, now_ms);
                }
                let may_move = frontend.port.retry && endpoints.len() > 1;
                if tcp.is_some() && (may_move || hit.fields().source != Source::Preserved) {
                    shared.opens.keep(key, hit.fields().endpoint_slot, &bytes[..packet.length], partial);
                }
                if tcp.is_some() {
                    shared.held.released(key);
                }
                let endpoint = shared.slots.endpoint(self.thread, hit.fields().endpoint_slot);
                count(&endpoint.opened, 1);
                port.inspect(|port| count(&port.opened[frontend.kind as usize], 1));
                Ok(Opened::Flow(hit))
            }
        }
    }

    fn icmp_error(&mut self, bytes: &mut [u8], packet: &Packet, now_ms: u64) -> Result<Action, Drop> {
        let quoted = icmp::quoted(bytes, packet).map_err(Drop::Malformed)?;
        let flows = &self.shared.flows;
        let hit = quoted.protocol().and_then(|protocol| flows.find(&icmp::key_of_receiver(&quoted, protocol)));
        if let Some(hit) = hit {
            let standing = self.shared.slots.standing(hit.fields().endpoint_slot);
            if standing == Standing::Gone || hit.state() == State::Reset {
                return Err(Drop::EndpointGone);
            }
            if icmp::is_unreachable(bytes, packet)
                && let Some(action) = self.unreachable(&hit, &quoted, now_ms)?
            {
                return Ok(action);
            }
            let translation = hit.fields().translation(hit.direction, self.shared.flows.masquerade());
            icmp::translate(bytes, packet, &quoted, &translation);
            return Ok(Action::Send);
        }
        match self.table.load().decide_address(packet.destination.ip()).0 {
            Verdict::Pass => Ok(Action::Send),
            // No error about an error (RFC 1122 §3.2.2).
            Verdict::Reject | Verdict::Drop | Verdict::Forward { .. } => Err(Drop::NoFlow),
        }
    }

    /// Ping and the like: nothing balances them.
    fn without_ports(&mut self, bytes: &[u8], packet: &Packet) -> Result<Action, Drop> {
        match self.table.load().decide_address(packet.destination.ip()).0 {
            Verdict::Pass => Ok(Action::Send),
            Verdict::Drop => Err(Drop::Rule),
            Verdict::Reject | Verdict::Forward { .. } => refuse(bytes, packet, &mut self.answer[..]),
        }
    }
}

/// How a flow stands to a packet of it.
enum Stands {
    GoesOn,
    /// The packet begins another flow.
    Over,
    /// The packet goes nowhere.
    Ended,
}

/// How the first packet of a flow ended.
enum Opened {
    Flow(Hit),
    Not(Action),
}

/// Opens the flow at the chosen endpoint or, where its packets could not be told from another flow's, at a neighbour.
pub(super) fn open_at(
    shared: &Shared,
    table: &RoutingTable,
    mut new: NewFlowRecord,
    endpoints: &[Endpoint],
    chosen: usize,
    masquerade: bool,
    now_ms: u64,
) -> Result<Hit, Drop> {
    let flows = &shared.flows;
    let address = |client: Address| flows.masquerade_of(client.family()).ok_or(Drop::NoMasqueradeAddress);
    let protocol = new.request.protocol;
    let around = endpoints[chosen..].iter().chain(&endpoints[..chosen]);
    let usable = around.filter(|endpoint| !table.leads_back(endpoint.address, protocol));
    let (tries, mut failure) = (endpoints.len().min(4), Drop::Loop);
    for (attempt, endpoint) in usable.cycle().take(tries + 1).enumerate() {
        failure = Drop::NoPort;
        (new.endpoint, new.endpoint_slot) = (endpoint.address, endpoint.slot);
        let client: Address = new.request.source;
        // An endpoint that reaches itself must see another source, and so must one that has this client's port in use.
        let replace = masquerade || client == endpoint.address.ip().into() || attempt == tries;
        let source = if replace { address(client)? } else { SourceChoice::Preserve };
        match flows.open(&new, source, now_ms) {
            Ok(hit) => return Ok(hit),
            Err(Full::Exists) => return flows.find(&new.request).ok_or(Drop::NoFlow),
            Err(Full::Table) => return Err(Drop::TableFull),
            Err(Full::Ports | Full::Collision) => {}
        }
    }
    Err(failure)
}

/// Refuses a packet: RST for TCP, ICMP port unreachable for the rest; nothing for a RST.
fn refuse(bytes: &[u8], packet: &Packet, answer: &mut [u8]) -> Result<Action, Drop> {
    let (header, out) = answer.split_at_mut(vnet::LEN);
    vnet::plain(header);
    let length = match packet.transport {
        Transport::Tcp(tcp) if tcp.rst => return Err(Drop::NoFlow),
        Transport::Tcp(tcp) => reply::answering_reset(packet, &tcp, out),
        Transport::Udp | Transport::Sctp | Transport::Icmp(_) | Transport::Fragment | Transport::Other => {
            reply::port_unreachable(bytes, packet, out)
        }
    };
    Ok(Action::Answer(vnet::LEN + length))
}

/// Adds to a cell that only this thread writes.
pub(super) fn count(cell: &std::sync::atomic::AtomicU64, more: u64) {
    cell.store(cell.load(Relaxed) + more, Relaxed);
}
