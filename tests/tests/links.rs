//! `packetPath: links`: what is taken and sent at the links, as links and neighbours change, and what is left of it.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use sluice_bench::client::{Failure, Target, ask};
use sluice_bench::netns::NetNs;
use sluice_bench::serve::PodServer;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};

/// A filter of somebody else's, which sees no packet that is taken at its link.
const FILTER: &str = "table inet somebody {\n  chain arriving {\n    type filter hook prerouting priority -350; policy accept;\n    \
    meta iifname != \"sluice0\" ip daddr 10.96.0.10 drop\n    meta iifname != \"sluice0\" tcp dport 30010 drop\n    \
    meta iifname != \"sluice0\" tcp dport 61000-65534 drop\n  }\n}\n";

fn answer(ns: &NetNs, to: SocketAddr, patience: Duration) -> Result<String, Failure> {
    ns.run(|| Ok(ask(Target::Http(to), patience).result)).unwrap()
}

/// Asks until somebody in particular answers.
fn wait_for(ns: &NetNs, to: SocketAddr, who: &str, cluster: &Cluster) {
    let deadline = Instant::now() + SOON;
    loop {
        let seen = answer(ns, to, Duration::from_millis(300));
        if seen.as_deref() == Ok(who) {
            return;
        }
        assert!(Instant::now() < deadline, "{to}: {seen:?}, not {who}\n{}", cluster.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn filter(cluster: &Cluster) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), FILTER).unwrap();
    cluster.output("nft", &["-f", file.path().to_str().unwrap()]).unwrap();
}

fn sent_on_links(cluster: &Cluster) -> f64 {
    cluster.metric("sluice_sent_on_links_total").unwrap()
}

#[test]
fn filters_of_others_see_packets_only_on_the_kernels_path() {
    if !can_run_in_namespaces("filters of others") {
        return;
    }
    for path in ["kernel", "links", "offload"] {
        let mut cluster = Cluster::with_web_by(path, 2).unwrap();
        filter(&cluster);
        let is_taken = path != "kernel";
        let frontends = cluster.web(true);
        // From a Pod to the ClusterIP: the reply comes by connection tracking, the request does not.
        for (ns, to) in [(&cluster.pods[0].pod.ns, frontends[0]), (&cluster.topology.client, frontends[1])] {
            let seen = answer(ns, to, Duration::from_millis(if is_taken { 5_000 } else { 500 }));
            assert_eq!(seen.is_ok(), is_taken, "{path}: {to}: {seen:?}\n{}", cluster.log());
        }
        // A link that was not there before.
        cluster.add_pod(7).unwrap();
        let new = &cluster.pods[2].pod.ns;
        let deadline = Instant::now() + if is_taken { SOON } else { Duration::from_millis(300) };
        let seen = loop {
            let seen = answer(new, frontends[0], Duration::from_millis(500));
            if seen.is_ok() || Instant::now() > deadline {
                break seen;
            }
        };
        assert_eq!(seen.is_ok(), is_taken, "{path}: a new Pod: {seen:?}\n{}", cluster.log());
        assert_eq!(sent_on_links(&cluster) > 0.0, is_taken);
    }
}

#[test]
fn packets_follow_an_address_to_another_link_and_another_hardware_address() {
    if !can_run_in_namespaces("an address on another link") {
        return;
    }
    let mut cluster = Cluster::with_web_by("links", 1).unwrap();
    let client = cluster.topology.client.clone();
    for v4 in [true, false] {
        let to = cluster.web(v4)[1];
        for _ in 0..20 {
            assert_eq!(answer(&client, to, SOON).as_deref(), Ok("web-1"));
        }
    }
    assert!(sent_on_links(&cluster) > 100.0, "{}", sent_on_links(&cluster));
    // The same addresses at another link: the kernel's routes say so.
    let addresses = cluster.pods[0].pod.addresses.clone();
    assert!(cluster.topology.remove_pod("web-1").unwrap());
    let pod = cluster.topology.add_pod("again", &addresses).unwrap();
    let _server = PodServer::start(&pod.ns, "again", &[8080], &[]).unwrap();
    for v4 in [true, false] {
        wait_for(&client, cluster.web(v4)[1], "again", &cluster);
    }
    // Another hardware address at the same link: its neighbours must learn it, by whichever packet.
    let in_pod = |arguments: &[&str]| assert!(pod.ns.command("ip").args(arguments).status().unwrap().success());
    in_pod(&["link", "set", "eth0", "address", "02:00:00:00:00:77"]);
    // With its own address a link forgets its neighbours.
    for router in ["169.254.1.1", "fe80::1"] {
        in_pod(&["neigh", "replace", router, "lladdr", "ee:ee:ee:ee:ee:ee", "dev", "eth0", "nud", "permanent"]);
    }
    cluster.output("ip", &["neigh", "flush", "dev", &pod.node_link]).unwrap();
    let before = sent_on_links(&cluster);
    for v4 in [true, false] {
        wait_for(&client, cluster.web(v4)[1], "again", &cluster);
    }
    for _ in 0..20 {
        assert_eq!(answer(&client, cluster.web(true)[1], SOON).as_deref(), Ok("again"));
    }
    assert!(sent_on_links(&cluster) > before + 50.0);
    drop(cluster.stop(Signal::SIGTERM));
}

#[test]
fn nothing_is_left_after_a_stop_or_a_cleanup() {
    if !can_run_in_namespaces("clean-up of links") {
        return;
    }
    let mut cluster = Cluster::with_web_by("links", 1).unwrap();
    let has_table = |cluster: &Cluster| cluster.output("nft", &["list", "tables"]).unwrap().contains("netdev sluice");
    assert!(has_table(&cluster));
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0));
    let left = cluster.output("nft", &["list", "ruleset"]).unwrap();
    assert!(!left.contains("sluice"), "{left}");
    cluster.start().unwrap();
    cluster.stop(Signal::SIGKILL).unwrap();
    assert!(has_table(&cluster), "as after a crash");
    // A daemon that takes packets by routes takes it away, and so does the command.
    cluster.configure("localControllers: false\npacketPath: kernel\n").unwrap();
    cluster.start().unwrap();
    assert!(!has_table(&cluster));
    assert_eq!(answer(&cluster.topology.client, cluster.web(true)[1], SOON).as_deref(), Ok("web-1"));
    cluster.stop(Signal::SIGKILL).unwrap();
    cluster.configure("localControllers: false\npacketPath: links\n").unwrap();
    cluster.start().unwrap();
    cluster.stop(Signal::SIGKILL).unwrap();
    let said = cluster.sluice(&["cleanup"]).unwrap();
    assert!(said.contains("nftables table of links"), "{said}");
    assert!(!has_table(&cluster));
}
