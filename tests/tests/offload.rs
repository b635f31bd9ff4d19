//! `packetPath: offload`: what the kernel carries, what is known of it, and what goes on while no daemon runs.
#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use sluice_bench::client::Connection;
use sluice_bench::netns::NetNs;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::stage::{Stage, ready};
use sluice_tests::talk::{Plan, Talk};
use socket2::{Domain, Socket, Type};

const EACH: usize = 20;

/// Connections that were answered, from outside to the node port (masqueraded) and from a Pod to the ClusterIP (preserved), in
/// both families.
fn connections(cluster: &Cluster) -> Vec<Connection> {
    let mut all = Vec::new();
    for v4 in [true, false] {
        for (ns, frontend) in [(&cluster.topology.client, 1), (&cluster.pods[2].pod.ns, 0)] {
            let to = cluster.web(v4)[frontend];
            ask_for_ways(ns, to);
            all.extend((0..EACH).map(|_| open(ns, to)));
        }
    }
    all.iter_mut().for_each(|connection| assert!(connection.get("/").unwrap().starts_with("web-")));
    all
}

fn open(ns: &NetNs, to: SocketAddr) -> Connection {
    ns.run(|| Connection::open(to, Duration::from_secs(2)).map_err(anyhow::Error::msg)).unwrap()
}

/// The first connections have the daemon ask for the ways to both ends.
fn ask_for_ways(ns: &NetNs, to: SocketAddr) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(200) {
        open(ns, to).get("/").unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Two Pods that serve, and one that is nobody's endpoint.
fn cluster() -> Cluster {
    let mut cluster = Cluster::with_web_by("offload", 2).unwrap();
    cluster.add_pod(3).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    cluster
}

fn wait_until(cluster: &Cluster, what: &str, metric: &str, expected: f64) {
    let deadline = Instant::now() + SOON;
    loop {
        let now = cluster.metric(metric).unwrap();
        if now == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {metric} is {now}, not {expected}\n{}", cluster.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn packets_in(cluster: &Cluster) -> f64 {
    cluster.metric("sluice_packets_total{").unwrap()
}

#[test]
fn connections_are_carried_counted_and_forgotten() {
    if !can_run_in_namespaces("connections that the kernel carries") {
        return;
    }
    let cluster = cluster();
    let mut all = connections(&cluster);
    let many = all.len() as f64;
    // One that begins just when an address is asked for anew, and keeps the client's, is not.
    let carried = cluster.metric("sluice_offloaded_flows").unwrap();
    assert!(carried >= 0.9 * many, "{carried} of {many}");
    let seen_by_us = || cluster.metric("sluice_sent_on_links_total").unwrap();
    let (by_us, counted) = (seen_by_us(), packets_in(&cluster));
    for _ in 0..10 {
        all.iter_mut().for_each(|connection| assert!(connection.get("/").unwrap().starts_with("web-")));
    }
    // A request, its answer, and at least sometimes an acknowledgement of its own. An address is asked for anew now and then.
    let (by_us, counted) = (seen_by_us() - by_us, packets_in(&cluster) - counted);
    assert!(counted >= 20.0 * many && by_us < 0.1 * counted, "{counted} packets, {by_us} of them by us");
    let flows: serde_json::Value = serde_json::from_str(&cluster.admin("/api/v1/flows").unwrap()).unwrap();
    let open: Vec<_> =
        flows["items"].as_array().unwrap().iter().filter(|flow| flow["state"] == "established").collect();
    assert_eq!(open.len(), all.len(), "{flows}");
    wait_until(&cluster, "open", "sluice_endpoint_flows_active{", many);
    drop(all);
    wait_until(&cluster, "closed", "sluice_endpoint_flows_active{", 0.0);
    wait_until(&cluster, "closed", "sluice_offloaded_flows", 0.0);
}

#[test]
fn connections_go_on_and_end_while_no_daemon_runs() {
    if !can_run_in_namespaces("connections without a daemon") {
        return;
    }
    let mut cluster = cluster();
    // Ways hold for five seconds: who is slower, by other programs, tries again.
    let mut tries = 5;
    let (without, mut all) = loop {
        let begun = Instant::now();
        let mut all = connections(&cluster);
        cluster.stop(Signal::SIGKILL).unwrap();
        let without = Instant::now();
        let answers: Vec<_> = all.iter_mut().map(|connection| connection.get("/")).collect();
        if begun.elapsed() < Duration::from_secs(4) {
            assert!(answers.iter().flatten().all(|pod| pod.starts_with("web-")));
            let failed = answers.iter().filter(|answer| answer.is_err()).count();
            assert_eq!(failed, 0, "of {}", answers.len());
            break (without, all);
        }
        tries -= 1;
        assert!(tries > 0, "this machine is too slow");
        cluster.start().unwrap();
    };
    // Half of them are closed, and nobody sees it but the kernel's program.
    let closed = all.split_off(all.len() / 2);
    drop(closed);
    std::thread::sleep(Duration::from_millis(200));
    let without = without.elapsed();
    cluster.start().unwrap();
    all.iter_mut().for_each(|connection| assert!(connection.get("/").unwrap().starts_with("web-")));
    wait_until(&cluster, "half of them closed", "sluice_endpoint_flows_active{", all.len() as f64);
    // Those that go on are carried again, as soon as their ways are known.
    let deadline = Instant::now() + SOON;
    while cluster.metric("sluice_offloaded_flows").unwrap() != all.len() as f64 {
        assert!(Instant::now() < deadline, "{}", cluster.admin("/api/v1/flows").unwrap());
        all.iter_mut().for_each(|connection| assert!(connection.get("/").unwrap().starts_with("web-")));
    }
    println!("{without:?} without a daemon");
    drop(all);
    wait_until(&cluster, "closed", "sluice_endpoint_flows_active{", 0.0);
}

#[test]
fn what_is_carried_is_reset_when_its_endpoint_is_gone() {
    if !can_run_in_namespaces("resets of connections that the kernel carries") {
        return;
    }
    let stage = Stage::new([1, 2], "packetPath: offload\nslowStart: 0s\n").unwrap();
    let plan = Plan { to: stage.to(), clients: 2, pause: Duration::from_millis(20), questions: Some(1), again: true };
    for ns in [&stage.cluster.topology.client, &stage.client.ns] {
        for pause in [Duration::from_millis(1), Duration::from_secs(3)] {
            // The ways are asked for by the first.
            let first = Talk::start(ns, plan).unwrap();
            first.wait_for(SOON, |told| told.by.contains(&1) && told.by.contains(&2)).unwrap();
            std::thread::sleep(Duration::from_millis(100));
            drop(first.stop());
            let plan = Plan { clients: 20, pause, questions: None, again: false, ..plan };
            let staying = Talk::start(ns, plan).unwrap();
            staying.wait_for(SOON, |told| told.answers >= 20).unwrap();
            let of_first = staying.so_far().by.iter().filter(|by| **by == 1).count();
            let carried = stage.cluster.metric("sluice_offloaded_flows").unwrap();
            assert!(of_first > 0 && carried >= 1.0, "{of_first}, {carried}");
            stage.change(&[ready(1).terminating(), ready(2)]).unwrap();
            let written = stage.change(&[ready(2)]).unwrap();
            staying.wait_for(SOON, |told| told.ended.len() == of_first).unwrap();
            let told = staying.stop();
            let slowest = told.ended.iter().map(|end| end.at - written).max().unwrap();
            assert!(told.ended.iter().all(|end| end.by == 1), "{:?}", told.ended);
            assert!(slowest < Duration::from_secs(1), "{slowest:?}");
            stage.change(&[ready(1), ready(2)]).unwrap();
            println!("{of_first} reset within {slowest:?}, a pause of {pause:?}");
        }
    }
}

/// Ways hold for five seconds: a connection that begins later is carried all the same, once they are known again.
#[test]
fn connections_after_a_while_are_carried_too() {
    if !can_run_in_namespaces("connections whose ways were known") {
        return;
    }
    let cluster = cluster();
    let kinds = [(&cluster.topology.client, 1), (&cluster.pods[2].pod.ns, 0)];
    kinds.iter().for_each(|(ns, frontend)| ask_for_ways(ns, cluster.web(true)[*frontend]));
    wait_until(&cluster, "closed", "sluice_offloaded_flows", 0.0);
    for (ns, frontend) in kinds {
        std::thread::sleep(Duration::from_secs(6));
        let mut connection = open(ns, cluster.web(true)[frontend]);
        for _ in 0..5 {
            assert!(connection.get("/").unwrap().starts_with("web-"));
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(cluster.metric("sluice_offloaded_flows").unwrap(), 1.0);
        drop(connection);
        wait_until(&cluster, "closed", "sluice_offloaded_flows", 0.0);
    }
}

/// A client whose port was that of a connection by the Service dials the endpoint itself from it.
#[test]
fn what_is_over_does_not_stand_in_the_way_of_direct_connections() {
    if !can_run_in_namespaces("direct connections beside those that the kernel carries") {
        return;
    }
    let mut cluster = Cluster::with_web_by("offload", 1).unwrap();
    cluster.add_pod(3).unwrap();
    let ns = cluster.pods[1].pod.ns.clone();
    for v4 in [true, false] {
        let service = cluster.web(v4)[0];
        let pod = cluster.pods[0].pod.addresses.iter().find(|address| address.is_ipv4() == v4).unwrap();
        let pod = SocketAddr::new(*pod, 8080);
        ask_for_ways(&ns, service);
        // Before the program was told that the flow is over, and after.
        for (port, pause) in [(20_001, 50), (20_002, 2_000)] {
            assert_eq!(by_port(&ns, service, port), "web-1");
            std::thread::sleep(Duration::from_millis(pause));
            assert_eq!(by_port(&ns, pod, port), "web-1");
            assert_eq!(by_port(&ns, service, port + 10), "web-1");
        }
    }
}

/// An answer to a connection from this port.
fn by_port(ns: &NetNs, to: SocketAddr, port: u16) -> String {
    ns.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        socket.bind(&SocketAddr::new(any, port).into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(3))?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: sluice\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        // The server's own end may come first or ours.
        let mut byte = [0];
        while !answer.ends_with("web-1") && stream.read(&mut byte)? == 1 {
            answer.push(byte[0].into());
        }
        Ok(answer.rsplit('\n').next().unwrap_or_default().to_owned())
    })
    .unwrap()
}

#[test]
fn nothing_is_left_after_a_stop_or_a_cleanup() {
    if !can_run_in_namespaces("programs at links") {
        return;
    }
    let mut cluster = Cluster::with_web_by("offload", 1).unwrap();
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0));
    assert!(!cluster.sluice(&["cleanup"]).unwrap().contains("programs"), "a stop takes them away");
    cluster.start().unwrap();
    cluster.stop(Signal::SIGKILL).unwrap();
    let said = cluster.sluice(&["cleanup"]).unwrap();
    assert!(said.contains("programs at links"), "{said}");
    cluster.start().unwrap();
    cluster.stop(Signal::SIGKILL).unwrap();
    // A daemon that carries nothing takes them away.
    cluster.configure("localControllers: false\npacketPath: kernel\n").unwrap();
    cluster.start().unwrap();
    cluster.stop(Signal::SIGKILL).unwrap();
    assert!(!cluster.sluice(&["cleanup"]).unwrap().contains("programs"));
}
