//! Threads in one table, and a table that is found again.

use std::net::SocketAddr;
use std::sync::Arc;

use super::*;
use crate::net::{Direction, Protocol};
use crate::packet::view::Tcp;
use crate::table::{EndpointSlot, FrontendKind, PortSlot, Slots};

fn new_flow(client: u16, endpoint: u8) -> NewFlowRecord {
    let request = FlowKey {
        source: Address::from_v4([10, 0, 0, 1]),
        destination: Address::from_v4([10, 96, 0, 1]),
        source_port: client,
        destination_port: 80,
        protocol: Protocol::Tcp,
    };
    NewFlowRecord {
        request,
        endpoint: SocketAddr::from(([10, 1, 0, endpoint], 8080)),
        endpoint_slot: EndpointSlot(u32::from(endpoint)),
        port_slot: PortSlot(1),
        frontend: FrontendKind::ClusterIp,
        state: State::Opening,
    }
}

fn table(slots: &Arc<Slots>) -> FlowTable {
    let addresses = vec![Address::from_v4([192, 168, 0, 1])];
    let masquerade = Masquerade { addresses: addresses.clone(), ports: 61000..=61999 };
    let store = Store::heap(256);
    FlowTable::new(store.records, store.header, addresses, Arc::clone(slots), masquerade).0
}

#[test]
fn ends_that_close_at_the_same_moment_both_count() {
    let slots = Arc::new(Slots::new(1));
    let table = table(&slots);
    let request = table.open(&new_flow(1, 1), SourceChoice::Preserve, 0).expect("there is room");
    let segment = |fin| Tcp { syn: false, ack: true, fin, rst: false, sequence: 1, acknowledgement: 1, length: 1 };
    table.see_tcp(&request, &segment(false), 40, 0);
    // Two packet threads find the flow established before either has seen its FIN.
    let request = table.find(&new_flow(1, 1).request).expect("it is open");
    let reply = table.find(&request.fields().reply(&[])).expect("replies find it");
    table.see_tcp(&request, &segment(true), 40, 0);
    table.see_tcp(&reply, &segment(true), 40, 0);
    assert_eq!(table.find(&new_flow(1, 1).request).expect("it is open").state(), State::Closing);
    assert_eq!((slots.active(EndpointSlot(1)), slots.held(EndpointSlot(1))), (0, 1));
}

/// Threads open, find and close flows of their own while all share one small, crowded index: what a thread opened it
/// finds, in both directions, and nothing it closed.
#[test]
fn threads_never_see_each_others_flows() {
    let slots = Arc::new(Slots::new(1));
    let table = table(&slots);
    std::thread::scope(|scope| {
        for thread in 0..4u16 {
            let table = &table;
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(u64::from(thread));
                let mut mine: Vec<(NewFlowRecord, Hit)> = Vec::new();
                for round in 0..20_000u16 {
                    if mine.len() < 50 && rng.bool() {
                        let new = new_flow(thread << 14 | round & 0x3fff, rng.u8(1..4));
                        let source = if rng.bool() { SourceChoice::Preserve } else { SourceChoice::Masquerade(0) };
                        mine.push((new, table.open(&new, source, 0).expect("there is room")));
                    } else if !mine.is_empty() {
                        let (new, hit) = mine.swap_remove(rng.usize(..mine.len()));
                        let found = table.find(&new.request).expect("it is open");
                        assert_eq!(found.fields(), hit.fields());
                        let reply = table.find(&hit.fields().reply(table.masquerade())).expect("replies find it");
                        assert_eq!((reply.fields(), reply.direction), (hit.fields(), Direction::Reply));
                        table.close(&hit);
                        assert!(table.find(&new.request).is_none());
                    }
                }
                mine.iter().for_each(|(_, hit)| table.close(hit));
            });
        }
    });
    assert!(table.is_empty());
    assert!((1..4).all(|slot| slots.active(EndpointSlot(slot)) == 0));
}
