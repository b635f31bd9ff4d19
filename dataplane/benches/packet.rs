//! What each step of a packet costs: parse, lookup, selection, rewrite, a packet of a known flow, a new table.
//!
//! `cargo bench -p sluice-dataplane`. `cargo test --benches` runs each once: only whether it works.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark")]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use etherparse::PacketBuilder;
use sluice_dataplane::decide::{NewFlow, Verdict};
use sluice_dataplane::flow::Address;
use sluice_dataplane::net::Protocol;
use sluice_dataplane::packet::rewrite::{Translation, rewrite};
use sluice_dataplane::packet::view::Packet;
use sluice_dataplane::packet::vnet;
use sluice_dataplane::packet_path::{Action, Settings, Shared, Worker};
use sluice_dataplane::select::{Selection, select};
use sluice_dataplane::table::{
    Balancing, DrainTimeout, EndpointSpec, NodeSpec, PortSpec, ServiceName, ServiceSpec, TableBuilder, Uid,
};

const ENDPOINTS: usize = 5;
const NOW_MS: u64 = 1_000_000;

fn address(first: [u8; 4], number: usize) -> IpAddr {
    Ipv4Addr::from(u32::from_be_bytes(first) + number as u32).into()
}

fn cluster_ip(service: usize) -> SocketAddr {
    SocketAddr::new(address([10, 96, 0, 1], service), 80)
}

/// A Service; `shift` gives it other endpoints.
fn service(number: usize, shift: usize) -> ServiceSpec {
    let endpoint = |index| SocketAddr::new(address([10, 128, 0, 0], number * ENDPOINTS + index + shift), 8080);
    let endpoints = (0..ENDPOINTS).map(endpoint).map(endpoint_of_a_pod).collect();
    let port = PortSpec {
        drain_timeout: DrainTimeout::After(Duration::from_secs(60)),
        ..PortSpec::plain(Protocol::Tcp, cluster_ip(number), endpoints)
    };
    ServiceSpec { name: ServiceName::new("bench", &format!("service-{number}")), created: None, ports: vec![port] }
}

/// One that is the same again when it is back, as a Pod's is.
fn endpoint_of_a_pod(address: SocketAddr) -> EndpointSpec {
    EndpointSpec { uid: Uid::of(&address.to_string()), ..EndpointSpec::ready(address) }
}

/// A packet path with so many Services, and the builder of its table.
fn path(services: usize, flows: usize) -> (Arc<Shared>, TableBuilder) {
    let shared = Shared::new(Settings { flow_capacity: flows, seed: 1, ..Settings::default() });
    let mut builder = TableBuilder::new(Arc::clone(&shared.slots));
    builder.set_node(NodeSpec {
        cluster_cidrs: vec!["10.128.0.0/9".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap()],
        ..NodeSpec::default()
    });
    (0..services).for_each(|number| assert!(builder.set(service(number, 0))));
    shared.publish(builder.build());
    (shared, builder)
}

/// A TCP segment as it comes from the TUN.
fn frame(client: SocketAddr, to: SocketAddr, is_syn: bool) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (client.ip(), to.ip()) else { unreachable!("all are IPv4") };
    let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), 64);
    let builder = builder.tcp(client.port(), to.port(), if is_syn { 1 } else { 2 }, 64_000);
    let builder = if is_syn { builder.syn() } else { builder.ack(1) };
    let mut frame = vec![0; vnet::LEN];
    builder.write(&mut frame, &[0; 64]).unwrap();
    frame
}

fn client(number: usize) -> SocketAddr {
    SocketAddr::new(address([10, 200, 0, 0], number / 50_000), (10_000 + number % 50_000) as u16)
}

fn parse_and_rewrite(c: &mut Criterion) {
    let bytes = frame(client(0), cluster_ip(0), false).split_off(vnet::LEN);
    c.bench_function("parse", |b| b.iter(|| Packet::parse(black_box(&bytes)).unwrap()));
    let packet = Packet::parse(&bytes).unwrap();
    let to = Translation {
        source: Address::from_v4([192, 168, 0, 1]),
        source_port: 61_000,
        destination: Address::from_v4([10, 128, 0, 1]),
        destination_port: 8080,
    };
    let mut rewritten = bytes.clone();
    rewrite(&mut rewritten, &packet, false, &to);
    assert_eq!(rewritten[12..20], [192, 168, 0, 1, 10, 128, 0, 1]);
    c.bench_function("rewrite", |b| {
        let rewrite = |bytes: &mut Vec<u8>| rewrite(black_box(bytes), &packet, false, &to);
        b.iter_batched_ref(|| bytes.clone(), rewrite, BatchSize::SmallInput);
    });
}

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookup");
    for services in [1, 10_000, 44_000] {
        let (shared, _) = path(services, 1);
        let (table, mut rng) = (shared.table(), fastrand::Rng::with_seed(1));
        group.bench_function(BenchmarkId::from_parameter(format!("{services} Services")), |b| {
            b.iter(|| {
                let destination = cluster_ip(rng.usize(..services));
                let decision = table.decide(&NewFlow { client: client(0).ip(), destination, protocol: Protocol::Tcp });
                assert!(matches!(decision.verdict, Verdict::Forward { .. }));
            });
        });
    }
}

fn selection(c: &mut Criterion) {
    let (shared, _) = path(1, 1);
    let table = shared.table();
    let flow = NewFlow { client: client(0).ip(), destination: cluster_ip(0), protocol: Protocol::Tcp };
    let decision = table.decide(&flow);
    let Verdict::Forward { endpoints, .. } = decision.verdict else { panic!("{decision:?}") };
    let port = decision.frontend.unwrap().port.slot;
    let with = Selection { slots: &shared.slots, now_ms: NOW_MS, slow_start_ms: 10_000, avoid: &[] };
    let mut rng = fastrand::Rng::with_seed(1);
    let mut group = c.benchmark_group("select");
    for balancing in [Balancing::LeastConnections, Balancing::RoundRobin, Balancing::Random] {
        group.bench_function(format!("{balancing:?}"), |b| {
            b.iter(|| select(balancing, port, black_box(endpoints), &with, &mut rng).unwrap());
        });
    }
}

fn flows(c: &mut Criterion) {
    let mut group = c.benchmark_group("packet of a known flow");
    for flows in [1, 100_000] {
        let (shared, _builder) = path(1, 2 * flows);
        let mut worker = Worker::new(Arc::clone(&shared), 0);
        for number in 0..flows {
            let mut syn = frame(client(number), cluster_ip(0), true);
            assert_eq!(worker.handle(&mut syn, NOW_MS), Action::Send);
        }
        assert_eq!(shared.flow_count(), flows);
        let mut rng = fastrand::Rng::with_seed(1);
        let acks: Vec<Vec<u8>> = (0..flows).map(|number| frame(client(number), cluster_ip(0), false)).collect();
        group.bench_function(BenchmarkId::from_parameter(format!("{flows} flows")), |b| {
            b.iter_batched_ref(
                || acks[rng.usize(..flows)].clone(),
                |ack| assert_eq!(worker.handle(ack, NOW_MS), Action::Send),
                BatchSize::SmallInput,
            );
        });
    }
}

/// From a changed Service to the first packet that is handled by the new table.
fn table_swap(c: &mut Criterion) {
    let mut group = c.benchmark_group("table swap");
    for services in [1, 10_000, 44_000] {
        let (shared, mut builder) = path(services, 16);
        let mut worker = Worker::new(Arc::clone(&shared), 0);
        let ack = frame(client(0), cluster_ip(0), false);
        let (mut rng, mut shift) = (fastrand::Rng::with_seed(1), 0);
        group.bench_function(BenchmarkId::from_parameter(format!("{services} Services")), |b| {
            b.iter_batched(
                || {
                    // Endpoints come back after a while: their number is bounded, as a cluster's is.
                    shift = (shift + 1) % 7 + 1;
                    (service(rng.usize(..services), shift * 1_000_000), ack.clone())
                },
                |(changed, mut ack)| {
                    builder.set(changed);
                    shared.publish(builder.build());
                    black_box(worker.handle(&mut ack, NOW_MS));
                },
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group!(benches, parse_and_rewrite, lookup, selection, flows, table_swap);
criterion_main!(benches);
