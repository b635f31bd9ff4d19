//! Questions to a Service whose endpoint is our responder: answered from the zone where their packets are, without a flow. What
//! the zone does not know goes to the responder like any datagram, and so does what is no plain question.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::decide::{NewFlow, Verdict};
use crate::dns::{Answerer, LARGEST_DATAGRAM};
use crate::net::{Direction, Protocol};
use crate::packet::view::Packet;
use crate::packet::{reply, vnet};
use crate::packet_path::worker::{Action, Worker, count};

/// Where questions are looked at; Services at other ports get their answers from the responder itself.
const PORT: u16 = 53;
/// Bytes of a UDP header.
const UDP: usize = 8;

/// Who answers, for all packet threads.
pub struct Names {
    /// Who answers.
    pub answerer: Arc<Answerer>,
    /// Where the responder listens: the endpoint that says that a Service is ours.
    pub listen: Box<[SocketAddr]>,
    /// Counters of the answerer from here on are those of the packet threads.
    pub first_thread: usize,
}

impl Worker {
    /// The answer to a datagram, where it is a question that the zone can answer.
    pub(super) fn answer_name(&mut self, header: &[u8], bytes: &[u8], packet: &Packet) -> Option<Action> {
        if packet.destination_port != PORT || packet.fragment.is_some() || vnet::is_train(header) {
            return None;
        }
        let names = self.shared.names.get()?;
        let key = packet.key(Protocol::Udp);
        let flow = NewFlow { client: key.source.ip(), destination: key.destination(), protocol: key.protocol };
        let decision = self.table.load().decide(&flow);
        let (Verdict::Forward { endpoints, .. }, Some(frontend)) = (decision.verdict, decision.frontend) else {
            return None;
        };
        let is_ours = endpoints.iter().any(|endpoint| names.listen.contains(&endpoint.address));
        let body = &bytes[packet.transport_at..packet.length];
        if !is_ours || !(vnet::checksum_is_partial(header) || reply::is_intact(packet, body)) {
            return None;
        }
        let (client, thread) = (key.source(), names.first_thread + self.thread);
        let question = body.get(UDP..usize::from(u16::from_be_bytes([body[4], body[5]])))?;
        if !names.answerer.answer_now(question, &client, (thread, &mut self.rng), &mut self.name_answer) {
            return None;
        }
        debug_assert!(self.name_answer.len() <= usize::from(LARGEST_DATAGRAM));
        let (header, out) = self.answer.split_at_mut(vnet::LEN);
        vnet::plain(header);
        let length = reply::datagram(packet, &self.name_answer, out);
        let port = self.shared.slots.port(self.thread, frontend.port.slot);
        for (way, length) in [(Direction::Request, packet.length), (Direction::Reply, length)] {
            count(&port.bytes[way.index()], length as u64);
            count(&port.packets[way.index()], 1);
        }
        Some(Action::Answer(vnet::LEN + length))
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use hickory_proto::op::{Message, MessageType, OpCode, Query};
    use hickory_proto::rr::{Name, RecordType};

    use super::*;
    use crate::dns::Zone;
    use crate::dns::tests::spec;
    use crate::packet_path::{Settings, Shared};
    use crate::table::{EndpointSpec, NodeSpec, PortSpec, ServiceName, ServiceSpec, TableBuilder};

    const LISTEN: &str = "169.254.20.10:53";

    fn worker() -> Worker {
        let shared = Shared::new(Settings::default());
        let answerer = Answerer::new(Arc::new(Zone::unknown(spec())), None, 3);
        shared.answer_names(Names { answerer, listen: [LISTEN.parse().unwrap()].into(), first_thread: 2 });
        let mut builder = TableBuilder::new(Arc::clone(&shared.slots));
        builder.set_node(NodeSpec { service_cidrs: vec!["10.96.0.0/16".parse().unwrap()], ..NodeSpec::default() });
        for (name, at, endpoint) in [("dns", "10.96.0.10:53", LISTEN), ("other", "10.96.0.11:53", "10.244.0.1:53")] {
            let endpoints = vec![EndpointSpec::ready(endpoint.parse().unwrap())];
            let port = PortSpec::plain(Protocol::Udp, at.parse().unwrap(), endpoints);
            builder.set(ServiceSpec { name: ServiceName::new("ns", name), created: None, ports: vec![port] });
        }
        shared.publish(builder.build());
        Worker::new(shared, 0)
    }

    fn frame(to: [u8; 4], name: &str) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::SOA));
        let mut frame = vec![0; vnet::LEN];
        let step = PacketBuilder::ipv4([10, 244, 0, 9], to, 64).udp(40_000, 53);
        step.write(&mut frame, &message.to_vec().unwrap()).unwrap();
        frame
    }

    #[test]
    fn a_question_that_the_zone_knows_needs_no_flow() {
        let mut worker = worker();
        let Action::Answer(length) = worker.handle(&mut frame([10, 96, 0, 10], "cluster.local."), 0) else {
            panic!("no answer")
        };
        let bytes = worker.answer(length)[vnet::LEN..].to_vec();
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.source.ip().to_string(), packet.source_port), ("10.96.0.10".to_owned(), 53));
        assert_eq!((packet.destination.ip().to_string(), packet.destination_port), ("10.244.0.9".to_owned(), 40_000));
        let body = &bytes[packet.transport_at..];
        assert!(reply::is_intact(&packet, body), "the checksum is right");
        let answer = Message::from_vec(&body[UDP..]).unwrap();
        assert_eq!((answer.id, answer.answers.len()), (7, 1));
        let names = &worker.shared.names.get().unwrap().answerer;
        assert_eq!(names.totals().requests.iter().map(|(.., count)| count).sum::<u64>(), 1);
        assert_eq!(worker.shared.flow_count(), 0);
    }

    #[test]
    fn everything_else_goes_its_way() {
        let mut worker = worker();
        let mut broken = frame([10, 96, 0, 10], "cluster.local.");
        *broken.last_mut().unwrap() ^= 1;
        let mut train = frame([10, 96, 0, 10], "cluster.local.");
        train[1] = 5;
        for (mut frame, why) in [
            (frame([10, 96, 0, 11], "cluster.local."), "another Service's endpoint"),
            (frame([10, 96, 0, 10], "example.org."), "a name outside"),
            (broken, "a wrong checksum"),
            (train, "several datagrams in one"),
        ] {
            assert_eq!(worker.step_of_names(&mut frame), None, "{why}");
        }
        let names = &worker.shared.names.get().unwrap().answerer;
        assert!(names.totals().requests.is_empty(), "the responder counts what it answers");
    }

    impl Worker {
        fn step_of_names(&mut self, frame: &mut [u8]) -> Option<Action> {
            let (header, bytes) = frame.split_at(vnet::LEN);
            self.answer_name(header, bytes, &Packet::parse(bytes).unwrap())
        }
    }
}
