//! One table after another: conflicts, slots, and who is who.

use std::net::SocketAddr;
use std::sync::Arc;

use super::*;
use crate::net::Family;
use crate::table::lifecycle::Cause;
use crate::table::{Condition, Standing};

fn spec(name: &str, created: i64, cluster_ip: &str, endpoints: &[&str]) -> ServiceSpec {
    let endpoints = endpoints.iter().map(|text| EndpointSpec::ready(text.parse().unwrap())).collect();
    let cluster_ip = SocketAddr::new(cluster_ip.parse().unwrap(), 80);
    let port = PortSpec {
        name: "http".to_owned(),
        node_port: Some(30080),
        ..PortSpec::plain(Protocol::Tcp, cluster_ip, endpoints)
    };
    ServiceSpec { name: ServiceName::new("ns", name), created: Some(created), ports: vec![port] }
}

fn owner(table: &RoutingTable, key: FrontendKey) -> Option<String> {
    table.frontends.get(&key).map(|frontend| frontend.port.service.name.to_string())
}

#[test]
fn the_older_service_keeps_a_contested_frontend_whatever_the_order() {
    let contested = FrontendKey::NodePort(Family::V4, Protocol::Tcp, 30080);
    let (old, young) = (spec("old", 1, "10.96.0.1", &[]), spec("young", 2, "10.96.0.2", &[]));
    for order in [[&old, &young], [&young, &old]] {
        let mut builder = TableBuilder::new(Arc::new(Slots::new(1)));
        order.into_iter().for_each(|spec| assert!(builder.set(spec.clone())));
        assert_eq!(owner(&builder.build(), contested).as_deref(), Some("old"));
        assert_eq!(builder.conflicts().len(), 1);
        assert!(builder.remove(&old.name));
        assert_eq!(owner(&builder.build(), contested).as_deref(), Some("young"));
        assert!(builder.conflicts().is_empty());
        assert!(builder.remove(&young.name) && builder.build().is_empty());
    }
}

#[test]
fn a_published_table_never_changes() {
    let mut builder = TableBuilder::new(Arc::new(Slots::new(1)));
    builder.set(spec("a", 1, "10.96.0.1", &["10.0.0.1:80"]));
    let before = builder.build();
    assert!(!builder.set(spec("a", 1, "10.96.0.1", &["10.0.0.1:80"])), "an equal spec is no change");
    builder.set(spec("a", 1, "10.96.0.9", &["10.0.0.2:80"]));
    let after = builder.build();
    assert!(before.is_cluster_ip("10.96.0.1".parse().unwrap()) && !before.is_cluster_ip("10.96.0.9".parse().unwrap()));
    assert!(after.is_cluster_ip("10.96.0.9".parse().unwrap()) && !after.is_cluster_ip("10.96.0.1".parse().unwrap()));
    assert!(after.generation() > before.generation());
}

#[test]
fn an_endpoint_keeps_its_slot_while_flows_use_it() {
    let slots = Arc::new(Slots::new(1));
    let mut builder = TableBuilder::new(Arc::clone(&slots));
    let slot = |builder: &TableBuilder, endpoint: &str| {
        let address: SocketAddr = endpoint.parse().unwrap();
        builder.endpoints().find(|(name, _)| name.address == address).map(|(_, slot)| slot)
    };
    builder.set(spec("a", 1, "10.96.0.1", &["10.0.0.1:80", "10.0.0.2:80"]));
    let busy = slot(&builder, "10.0.0.1:80").unwrap();
    let name = ServiceName::new("ns", "a");
    let found = builder.endpoint_slot(&name, "http", Protocol::Tcp, "10.0.0.1:80".parse().unwrap());
    assert_eq!(found, Some(busy));
    slots.flow_opened(busy);
    builder.set(spec("a", 1, "10.96.0.1", &["10.0.0.3:80"]));
    assert_eq!(slots.standing(busy), Standing::NoDatagrams, "its UDP flows end");
    builder.release_idle();
    assert!(slot(&builder, "10.0.0.2:80").is_some(), "a thread may still use the last table");
    builder.release_idle();
    assert_eq!(slot(&builder, "10.0.0.1:80"), Some(busy));
    assert_eq!(slot(&builder, "10.0.0.2:80"), None, "the idle one is free");
    slots.flow_finished(busy);
    slots.flow_forgotten(busy);
    builder.release_idle();
    assert_eq!(slot(&builder, "10.0.0.1:80"), None);
    assert_eq!(slots.life(busy), None);
}

/// The flows that an endpoint has when its Service goes are counted on its Service's port, not on another's.
#[test]
fn a_port_keeps_its_slot_while_its_endpoints_have_flows() {
    let slots = Arc::new(Slots::new(1));
    let mut builder = TableBuilder::new(Arc::clone(&slots));
    let port =
        |builder: &TableBuilder, name: &str| builder.port_slot(&ServiceName::new("ns", name), "http", Protocol::Tcp);
    builder.set(spec("gone", 1, "10.96.0.1", &["10.0.0.1:80"]));
    let old = port(&builder, "gone").unwrap();
    let (_, busy) = builder.endpoints().next().unwrap();
    slots.flow_opened(busy);
    builder.remove(&ServiceName::new("ns", "gone"));
    (0..3).for_each(|_| builder.release_idle());
    builder.set(spec("next", 1, "10.96.0.2", &["10.0.0.2:80"]));
    assert_ne!(port(&builder, "next").unwrap(), old);
    slots.flow_finished(busy);
    slots.flow_forgotten(busy);
    (0..3).for_each(|_| builder.release_idle());
    builder.set(spec("last", 1, "10.96.0.3", &["10.0.0.3:80"]));
    assert_eq!(port(&builder, "last").unwrap(), old);
}

/// Another uid at the same address is another endpoint, and so is who comes back after the end.
#[test]
fn a_reused_address_is_another_endpoint() {
    let slots = Arc::new(Slots::new(1));
    let mut builder = TableBuilder::new(Arc::clone(&slots));
    let mut set = |uid, condition| {
        let mut spec = spec("a", 1, "10.96.0.1", &["10.0.0.1:80"]);
        let endpoint = EndpointSpec { uid: Uid(uid), condition, ..spec.ports[0].endpoints[0] };
        spec.ports[0].endpoints = vec![endpoint];
        builder.set(spec.clone());
        let slot = builder.endpoint_slot(&spec.name, "http", Protocol::Tcp, endpoint.address).unwrap();
        assert_eq!(slots.life(slot), Some(Life::Present { condition, drain: None }));
        slot
    };
    let first = set(1, Condition::Ready);
    assert_eq!(set(1, Condition::Terminating { serving: true }), first);
    let second = set(2, Condition::Ready);
    assert_ne!(second, first);
    assert_eq!(slots.life(first), Some(Life::Gone(Cause::Terminated)));
    let third = set(1, Condition::Ready);
    assert!(third != first && third != second, "it was gone");
    assert_eq!(slots.life(second), Some(Life::Gone(Cause::Terminated)), "its address is another's");
    let fourth = set(2, Condition::Ready);
    assert!(![first, second, third].contains(&fourth), "it was gone");
}

/// What becomes of an endpoint that has flows: they go on (with its slot, or draining), or it is gone.
#[test]
fn who_has_an_address_is_told_by_uid_of_the_pod_or_by_place_and_slice() {
    let (pod, other_pod) = (Some(Uid::of("pod")), Some(Uid::of("other")));
    let (slice, other_slice, unknown) =
        (Some(Uid::of_slice("slice")), Some(Uid::of_slice("other")), Some(Uid::default()));
    let (stays, drains, gone) = ("ready", "draining", "gone");
    // Uids that 10.0.0.1:80 has one after the other, and 10.0.0.1:81 at the end.
    for (what, uids, beside, becomes) in [
        ("others change", &[pod, pod][..], None, stays),
        ("a Pod that comes back", &[pod, None, pod], None, stays),
        ("another Pod at once", &[pod, other_pod], None, gone),
        ("another Pod later", &[pod, None, other_pod], None, gone),
        ("another Pod at another port", &[pod, None], other_pod, gone),
        ("the same Pod at another port", &[pod, None], pod, drains),
        ("the address in a slice that says no more", &[pod, None], slice, drains),
        ("of a slice, others change", &[slice, slice], None, stays),
        ("of a slice, away and back", &[slice, None, slice], None, gone),
        ("of a slice, away", &[slice, None], None, drains),
        ("of another slice at once", &[slice, other_slice], None, gone),
        ("of another slice later", &[slice, None, other_slice], None, gone),
        ("of a slice, then a Pod", &[slice, pod], None, gone),
        ("a Pod, then of a slice", &[pod, None, slice], None, gone),
        ("of a slice, another port", &[slice, None], slice, drains),
        ("unknown, others change", &[unknown, unknown], None, stays),
        ("unknown, away and back", &[unknown, None, unknown], None, gone),
    ] {
        let slots = Arc::new(Slots::new(1));
        let mut builder = TableBuilder::new(Arc::clone(&slots));
        let mut first = None;
        for (step, uid) in uids.iter().enumerate() {
            let beside = beside.filter(|_| step + 1 == uids.len()).map(|uid| ("10.0.0.1:81", uid));
            let other = format!("10.0.0.9:{step}");
            let named = uid.map(|uid| ("10.0.0.1:80", uid)).into_iter().chain(beside);
            let named: Vec<_> = named.chain([(other.as_str(), Uid::of("busy"))]).collect();
            let mut spec = spec("a", 1, "10.96.0.1", &named.iter().map(|(address, _)| *address).collect::<Vec<_>>());
            spec.ports[0].endpoints.iter_mut().zip(&named).for_each(|(endpoint, (_, uid))| endpoint.uid = *uid);
            builder.set(spec.clone());
            first = first.or_else(|| {
                let slot = builder.endpoint_slot(&spec.name, "http", Protocol::Tcp, "10.0.0.1:80".parse().unwrap());
                slot.inspect(|slot| slots.flow_opened(*slot))
            });
        }
        assert_eq!(slots.life(first.unwrap()).unwrap().name(), becomes, "{what}");
    }
}

#[test]
fn beside_another_proxy_the_host_is_asked_for_each_node_port() {
    for beside in [false, true] {
        let mut builder = TableBuilder::new(Arc::new(Slots::new(1)));
        builder.set_node(NodeSpec {
            service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
            beside,
            ..NodeSpec::default()
        });
        let before = builder.build().host_version();
        let mut spec = spec("a", 1, "10.96.0.1", &[]);
        spec.ports[0].node_port = Some(30000);
        builder.set(spec);
        assert_eq!(builder.build().host_version() != before, beside);
    }
}

#[test]
fn the_host_is_asked_only_for_what_is_outside_the_service_ranges() {
    let mut builder = TableBuilder::new(Arc::new(Slots::new(1)));
    builder.set_node(NodeSpec { service_cidrs: vec!["10.96.0.0/16".parse().unwrap()], ..NodeSpec::default() });
    let mut version = builder.build().host_version();
    let mut changes = |builder: &mut TableBuilder| {
        let before = std::mem::replace(&mut version, builder.build().host_version());
        before != version
    };
    let external = |endpoints: &[&str]| {
        let mut spec = spec("a", 1, "10.96.0.1", endpoints);
        spec.ports[0].external_ips = vec!["198.51.100.1".parse().unwrap()];
        spec
    };
    builder.set(spec("a", 1, "10.96.0.1", &["10.0.0.1:80"]));
    assert!(!changes(&mut builder), "a ClusterIP in the range");
    builder.set(external(&["10.0.0.1:80"]));
    assert!(changes(&mut builder), "an external address comes");
    builder.set(external(&["10.0.0.2:80"]));
    assert!(!changes(&mut builder), "another endpoint");
    builder.set(spec("a", 1, "172.30.0.1", &[]));
    assert!(changes(&mut builder), "another address");
    builder.set_node(NodeSpec { service_cidrs: vec!["172.30.0.0/16".parse().unwrap()], ..NodeSpec::default() });
    assert!(changes(&mut builder), "another range");
    builder.remove(&ServiceName::new("ns", "a"));
    assert!(!changes(&mut builder), "nothing outside is gone");
    builder.set(external(&[]));
    assert!(changes(&mut builder) && builder.remove(&ServiceName::new("ns", "a")) && changes(&mut builder));
}
