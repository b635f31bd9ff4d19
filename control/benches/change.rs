//! What one changed EndpointSlice costs: resolution, and the new table in force.
//!
//! `cargo bench -p sluice-control --bench change`. `cargo test` runs each once: only whether it works.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark")]

mod objects;

use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use objects::{Cluster, apply, config, service, settings};
use sluice_control::object::Object;
use sluice_control::publish::Publisher;
use sluice_control::source::Update;
use sluice_dataplane::packet_path::Shared;

fn change(c: &mut Criterion) {
    let mut group = c.benchmark_group("one changed slice");
    for services in [1, 1000, 10_000] {
        let cluster = Cluster { services, endpoints: 5 * services };
        let shared = Shared::new(settings().unwrap());
        let address = vec!["192.168.0.2".parse().unwrap()];
        let mut publisher = Publisher::new(config().unwrap(), address, Arc::clone(&shared.slots));
        let slice = |index, round| apply(Object::EndpointSlice(Arc::new(cluster.slice(index, round).unwrap())));
        let of_one = |index| [apply(Object::Service(Arc::new(service(index).unwrap()))), slice(index, 0)];
        let changes = (0..services).flat_map(of_one).collect();
        shared.publish(publisher.update(Update { changes, ..Update::default() }).unwrap());
        let (mut rng, mut round) = (fastrand::Rng::with_seed(1), 0);
        group.bench_function(BenchmarkId::from_parameter(format!("{services} Services")), |b| {
            b.iter_batched(
                || {
                    round += 1;
                    Update { changes: vec![slice(rng.usize(..services), round)], ..Update::default() }
                },
                |update| shared.publish(publisher.update(update).expect("each change changes an endpoint")),
                BatchSize::PerIteration,
            );
        });
    }
}

criterion_group!(benches, change);
criterion_main!(benches);
