//! Real connections through the running daemon: who answers, from where, how evenly, how whole.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use sluice_bench::client::{self, Connection, Failure, Target, ask};
use sluice_bench::load::{Load, Plan, run};
use sluice_bench::netns::NetNs;
use sluice_bench::pattern::Pattern;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};

/// The same with every way that packets can take through the host.
fn on_each_path(what: &str, pods: u8, body: impl Fn(Cluster)) {
    if !can_run_in_namespaces(what) {
        return;
    }
    for path in ["kernel", "links", "offload"] {
        eprintln!("packetPath: {path}");
        body(Cluster::with_web_by(path, pods).unwrap());
    }
}

fn seen_by_pod(ns: &NetNs, address: SocketAddr) -> String {
    ns.run(|| Ok(client::get(address, "/client", SOON))).unwrap().unwrap()
}

#[test]
fn every_frontend_answers_every_client_in_both_families() {
    on_each_path("frontends by real connections", 2, |cluster| {
        for (who, ns) in cluster.clients() {
            for v4 in [true, false] {
                for (frontend, kind) in cluster.web(v4).into_iter().zip(["clusterip", "nodeport", "loadbalancer"]) {
                    let udp = SocketAddr::new(frontend.ip(), if kind == "nodeport" { frontend.port() } else { 53 });
                    for target in [Target::Http(frontend), Target::Udp(udp)] {
                        let answer = ns.run(|| Ok(ask(target, SOON).result)).unwrap();
                        assert!(
                            answer.as_ref().is_ok_and(|pod| pod.starts_with("web-")),
                            "{who}: {target:?}: {answer:?}"
                        );
                    }
                    // Pods keep their address towards a ClusterIP, unless they reach themselves; all else is masqueraded.
                    for _ in 0..8 {
                        let seen = seen_by_pod(ns, frontend);
                        let masqueraded = seen.starts_with("192.168.50.1:") || seen.starts_with("[fd00:50::1]:");
                        let own = seen.starts_with("10.244.0.1:") || seen.starts_with("[fd00:10:244::1]:");
                        assert!(masqueraded || (own && who == "pod" && kind == "clusterip"), "{who}: {kind}: {seen}");
                    }
                }
            }
        }
    });
}

#[test]
fn a_pod_keeps_its_address_unless_it_reaches_itself() {
    on_each_path("source addresses", 2, |cluster| {
        for (v4, own, node) in [(true, "10.244.0.1:", "192.168.50.1:"), (false, "[fd00:10:244::1]:", "[fd00:50::1]:")] {
            let mut seen = [0, 0];
            for _ in 0..40 {
                let mut connection = cluster.pods[0]
                    .pod
                    .ns
                    .run(|| Connection::open(cluster.web(v4)[0], SOON).map_err(|failure| anyhow::anyhow!("{failure}")))
                    .unwrap();
                let (pod, client) = (connection.get("/").unwrap(), connection.get("/client").unwrap());
                let itself = pod == "web-1";
                assert!(client.starts_with(if itself { node } else { own }), "{pod} sees {client}");
                seen[usize::from(itself)] += 1;
            }
            assert!(seen[0] > 0 && seen[1] > 0, "both endpoints were chosen: {seen:?}");
        }
    });
}

#[test]
fn ten_thousand_connections_are_even_within_five_percent() {
    on_each_path("balance of 10,000 connections", 3, |cluster| {
        let (target, ns) = (cluster.web(true)[0], &cluster.topology.client);
        // Many are open at a time: with few, who has the fewest depends on how fast each Pod ends its own.
        let client = || {
            ns.enter()?;
            let mut answered = BTreeMap::<String, u32>::new();
            for _ in 0..10 {
                let mut open = Vec::new();
                for _ in 0..250 {
                    let mut connection = Connection::open(target, SOON).map_err(anyhow::Error::msg)?;
                    *answered.entry(connection.get("/").map_err(anyhow::Error::msg)?).or_default() += 1;
                    open.push(connection);
                }
            }
            anyhow::Ok(answered)
        };
        let mut answered = BTreeMap::<String, u32>::new();
        thread::scope(|scope| {
            let clients: Vec<_> = (0..4).map(|_| scope.spawn(client)).collect();
            for (pod, count) in clients.into_iter().flat_map(|client| client.join().unwrap().unwrap()) {
                *answered.entry(pod).or_default() += count;
            }
        });
        assert_eq!((answered.len(), answered.values().sum::<u32>()), (3, 10_000), "{answered:?}");
        for (pod, count) in &answered {
            let share = f64::from(*count) / 10_000.0 * 3.0;
            assert!((0.95..=1.05).contains(&share), "{pod} has {share:.3} of its fair share: {answered:?}");
        }
        let [opened, retried] =
            ["sluice_flows_opened_total{", "sluice_connect_retries_total{"].map(|name| cluster.metric(name).unwrap());
        assert_eq!(opened - retried, 10_000.0, "counted as they were made; {retried} retries");
    });
}

#[test]
fn a_gibibyte_arrives_intact_both_ways() {
    on_each_path("1 GiB through one connection", 1, |cluster| {
        const GIBIBYTE: u64 = 1 << 30;
        let want = Pattern::digest(GIBIBYTE);
        // Masqueraded from outside, preserved from a Pod that is no endpoint, over both families.
        for (v4, ns) in [(true, &cluster.topology.client), (false, &cluster.topology.client)] {
            ns.run(|| {
                let failed = |failure: Failure| anyhow::anyhow!("{failure}");
                let mut connection = Connection::open(cluster.web(v4)[0], SOON).map_err(failed)?;
                assert_eq!(connection.upload(GIBIBYTE).map_err(failed)?, want.to_string());
                assert_eq!(connection.download(GIBIBYTE).map_err(failed)?, want);
                Ok(())
            })
            .unwrap();
        }
        assert!(cluster.metric("sluice_bytes_total{").unwrap() > 4.0 * GIBIBYTE as f64);
    });
}

#[test]
fn a_removed_endpoint_gets_no_new_connection() {
    on_each_path("removal of an endpoint", 3, |cluster| {
        let frontend = cluster.web(true)[0];
        let ns = &cluster.topology.client;
        let mut kept: Vec<(String, Connection)> = (0..12)
            .map(|_| {
                ns.run(|| {
                    let failed = |failure: Failure| anyhow::anyhow!("{failure}");
                    let mut connection = Connection::open(frontend, SOON).map_err(failed)?;
                    Ok((connection.get("/").map_err(failed)?, connection))
                })
                .unwrap()
            })
            .collect();
        assert!(kept.iter().any(|(pod, _)| pod == "web-1"));
        let generation = cluster.generation().unwrap();
        cluster.publish_web(1..3).unwrap();
        cluster.wait_for_table_after(generation).unwrap();
        let plan = Plan { connections: Some(500), ..Plan::new(vec![Target::Http(frontend)]) };
        let tally = run(ns, &plan).unwrap();
        assert_eq!((tally.answers(), tally.failed()), (500, 0));
        assert!(!tally.answered.contains_key("web-1"), "{:?}", tally.answered);
        for (pod, connection) in &mut kept {
            assert_eq!(connection.get("/").as_ref(), Ok(&*pod), "an established connection stays where it is");
        }
    });
}

#[test]
fn a_thousand_table_swaps_under_load_fail_no_connection() {
    on_each_path("1,000 table swaps under load", 3, |cluster| {
        let targets = cluster.web(true).map(Target::Http).to_vec();
        let load = Load::start(&cluster.topology.client, &Plan { concurrency: 4, ..Plan::new(targets) }).unwrap();
        let first = cluster.generation().unwrap();
        let mut generation = first;
        for round in 0.. {
            if generation >= first + 1_000 {
                break;
            }
            // Every Pod stays an endpoint of two tables in three.
            cluster.publish_web((0..3).filter(|pod| *pod != round % 3)).unwrap();
            generation = cluster.wait_for_table_after(generation).unwrap();
        }
        let tally = load.stop();
        assert_eq!(tally.failed(), 0, "{:?}", tally.failures);
        assert!(tally.answers() > 1_000, "there was load: {}", tally.answers());
        assert_eq!(tally.answered.len(), 3);
    });
}

#[test]
fn no_endpoint_is_a_refusal_at_once() {
    on_each_path("refusals", 1, |cluster| {
        let generation = cluster.generation().unwrap();
        cluster.publish_web([]).unwrap();
        cluster.wait_for_table_after(generation).unwrap();
        for (who, ns) in cluster.clients() {
            for v4 in [true, false] {
                for frontend in cluster.web(v4) {
                    let started = std::time::Instant::now();
                    let answer = ns.run(|| Ok(ask(Target::Http(frontend), SOON).result)).unwrap();
                    assert_eq!(answer, Err(Failure::Refused), "{who}: {frontend}");
                    assert!(started.elapsed() < Duration::from_millis(900), "{who}: {frontend}: by a RST, at once");
                }
                let dns = SocketAddr::new(cluster.web(v4)[0].ip(), 53);
                let answer = ns.run(|| Ok(ask(Target::Udp(dns), SOON).result)).unwrap();
                assert_eq!(answer, Err(Failure::Refused), "{who}: {dns}: ICMP port unreachable");
            }
        }
        assert!(cluster.metric("sluice_flows_rejected_total{").unwrap() > 20.0);
    });
}

#[test]
fn path_mtu_discovery_works_through_us() {
    on_each_path("path MTU discovery", 2, |cluster| {
        // The last hop to each Pod is narrower than the first: only the router's ICMP error tells the client.
        for pod in &cluster.pods {
            cluster.output("ip", &["link", "set", &pod.pod.node_link, "mtu", "1300"]).unwrap();
        }
        const BYTES: u64 = 4 << 20;
        // From outside and from a Pod to itself it is masqueraded, from a Pod to the other the client's address is kept.
        for pod in 0..2 {
            let generation = cluster.generation().unwrap();
            cluster.publish_web([pod]).unwrap();
            cluster.wait_for_table_after(generation).unwrap();
            for v4 in [true, false] {
                for ns in [&cluster.topology.client, &cluster.pods[0].pod.ns] {
                    let family = if v4 { "-4" } else { "-6" };
                    let flushed = ns.command("ip").args([family, "route", "flush", "cache"]).status().unwrap();
                    assert!(flushed.success(), "the client does not know the way's MTU");
                    let address = cluster.web(v4)[0];
                    let answer = ns.run(|| Ok(Connection::open(address, SOON).and_then(|mut to| to.upload(BYTES))));
                    assert_eq!(answer.unwrap(), Ok(Pattern::digest(BYTES).to_string()), "{address} at Pod {pod}");
                }
            }
        }
    });
}
