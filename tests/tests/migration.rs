//! From kube-proxy to Sluice and back, with the real kube-proxy: its configuration, its connections, its rules.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use sluice_bench::client::{Connection, Target, ask};
use sluice_bench::netns::NetNs;
use sluice_tests::api_cluster::{ADDRESS, service, slices};
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::control_plane::{self, ControlPlane};
use sluice_tests::kube_proxy::{KubeProxy, configuration, has_tool, program};
use sluice_tests::{can_run_in_namespaces, manifests, sluice_binary};

/// Connections of each kind of client, by each kind of frontend, in each family.
const EACH: usize = 20;
/// How long a connection may take to answer; one that hangs is lost.
const ANSWER: Duration = Duration::from_secs(2);

#[test]
fn every_key_and_flag_of_the_real_kube_proxy_is_known() {
    let Some(program) = program("every key and flag of kube-proxy") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (file, manifests) = (folder.path().join("config.conf"), folder.path().join("manifests"));
    std::fs::create_dir(&manifests).unwrap();
    let written = Command::new(&program).arg("--write-config-to").arg(&file).output().unwrap();
    assert!(written.status.success(), "{written:?}");
    let check = Command::new(sluice_binary()).arg("check").arg(&manifests).arg("--config").arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success() && said.contains("ignored of kube-proxy's configuration: "), "{check:?}");
    assert!(said.contains("conntrack.maxPerCore") && !said.contains("clusterCIDR"), "{said}");

    let help = Command::new(&program).arg("--help").output().unwrap();
    let help = String::from_utf8([help.stdout, help.stderr].concat()).unwrap();
    let flag = |line: &str| {
        let (before, flag) = line.trim_start().split_once("--")?;
        let is_flag = before.is_empty() || before == "-v, " || before == "-h, ";
        let name = flag.split([' ', '[', '=']).next()?;
        (is_flag && line.starts_with(' ')).then(|| name.to_owned())
    };
    let flags: Vec<String> = help.lines().filter_map(flag).collect();
    assert!(flags.len() > 40 && flags.contains(&"v".to_owned()), "{help}");
    for flag in flags.iter().filter(|flag| !matches!(&***flag, "help" | "version")) {
        // That there is no such folder is found only where all flags are known.
        let run =
            Command::new(sluice_binary()).args(["run", &format!("--{flag}=true"), "--no-such-flag"]).output().unwrap();
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(said.contains("unexpected argument '--no-such-flag'"), "--{flag}: {said}");
    }
}

/// A node whose Service `web` with two endpoints is at an API server.
fn cluster() -> (Cluster, ControlPlane) {
    let mut cluster = Cluster::new().unwrap();
    for number in 1..=2 {
        cluster.add_pod(number).unwrap();
    }
    let pod = cluster.topology.add_pod("control-plane", &[ADDRESS.parse().unwrap()]).unwrap();
    let plane = ControlPlane::start(pod.ns, ADDRESS).unwrap();
    // Without a route to a Service address the kernel never comes to kube-proxy's rules.
    for v4 in [true, false] {
        let client = cluster.topology.client_address(v4).unwrap().to_string();
        cluster.output("ip", &[if v4 { "-4" } else { "-6" }, "route", "add", "default", "via", &client]).unwrap();
    }
    let addresses: Vec<IpAddr> = cluster.topology.config.node.iter().map(ipnet::IpNet::addr).collect();
    plane.create(&manifests::node(&addresses)).unwrap();
    plane.create(&service("web", 10)).unwrap();
    for slice in slices(&cluster, "web", 0..2) {
        plane.create(&slice).unwrap();
    }
    cluster.watch_api(plane.kubeconfig("proxy"));
    (cluster, plane)
}

fn answers(ns: &NetNs, address: SocketAddr) -> bool {
    ns.run(|| Ok(ask(Target::Http(address), ANSWER).result.is_ok())).unwrap()
}

fn wait_until_all_answer(cluster: &Cluster, what: &str) {
    let deadline = Instant::now() + SOON * 3;
    let all = |v4| cluster.web(v4)[..2].iter().all(|address| answers(&cluster.topology.client, *address));
    while !(all(true) && all(false)) {
        assert!(Instant::now() < deadline, "{what}: the Service does not answer");
    }
}

/// Connections of a Pod, of the node and from outside, to the ClusterIP and the node port, in both families.
fn open_connections(cluster: &Cluster) -> Vec<(String, Connection)> {
    let mut connections = Vec::new();
    for (client, ns) in cluster.clients() {
        for v4 in [true, false] {
            let [cluster_ip, node_port, _] = cluster.web(v4);
            for address in [cluster_ip, node_port] {
                // To its own node port the node goes without conntrack's help in some modes: not of interest here.
                let each = if client == "node" && address == node_port { 0 } else { EACH };
                for _ in 0..each {
                    let open = || Connection::open(address, ANSWER).map_err(anyhow::Error::msg);
                    let connection = ns.run(open).unwrap_or_else(|error| panic!("{client} to {address}: {error}"));
                    connections.push((format!("{client} to {address}"), connection));
                }
            }
        }
    }
    connections.iter_mut().for_each(|(what, connection)| {
        connection.get("/").unwrap_or_else(|error| panic!("{what}: {error}"));
    });
    connections
}

/// Asks on every connection and forgets those that are lost. Returns how many, with an example.
fn lost(connections: &mut Vec<(String, Connection)>) -> (usize, String) {
    let before = connections.len();
    let mut example = String::new();
    connections.retain_mut(|(what, connection)| {
        connection.get("/").inspect_err(|error| example = format!("{what}: {error}")).is_ok()
    });
    (before - connections.len(), example)
}

/// Rules of somebody else, beside kube-proxy's.
fn add_foreign_rules(cluster: &Cluster, with_iptables: bool) {
    let table = "add table inet mine; add chain inet mine c { type filter hook forward priority 0; }; add rule inet mine c counter";
    cluster.output("nft", &[table]).unwrap();
    if with_iptables {
        for arguments in [&["-N", "MINE"][..], &["-A", "MINE", "-j", "RETURN"], &["-A", "FORWARD", "-j", "MINE"]] {
            cluster.output("iptables", arguments).unwrap();
        }
        cluster.output("iptables", &["-N", "KUBE-FIREWALL"]).unwrap();
    }
}

fn change_over(mode: &str) {
    let what = format!("change-over from kube-proxy, mode {mode}");
    let is_iptables = mode == "iptables";
    let Some(program) = program(&what) else { return };
    if !can_run_in_namespaces(&what) || !control_plane::can_run(&what) || (is_iptables && !has_tool("iptables", &what))
    {
        return;
    }
    let (mut cluster, plane) = cluster();
    add_foreign_rules(&cluster, is_iptables);
    let kubeconfig = plane.kubeconfig("proxy");
    let mut proxy = KubeProxy::start(&program, &cluster.topology.node, mode, &kubeconfig).unwrap();
    wait_until_all_answer(&cluster, &proxy.log());
    let mut before = open_connections(&cluster);
    let count = before.len();

    // Its DaemonSet is deleted: its rules stay. They are not to be removed while nobody else serves.
    proxy.stop().unwrap();
    let refused = cluster.topology.node.command(sluice_binary()).args(["cleanup", "--kube-proxy"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    let rules = cluster.host_state().unwrap();
    let dry = cluster.sluice(&["cleanup", "--kube-proxy", "--dry-run"]).unwrap();
    let words = if is_iptables { "chains of iptables-nft, table nat" } else { "nftables table ip6 kube-proxy" };
    assert!(
        dry.contains(&format!("would remove {}", if is_iptables { "" } else { words })) && dry.contains(words),
        "{dry}"
    );
    assert_eq!(cluster.host_state().unwrap(), rules, "nothing is touched");

    cluster.configure(&configuration(mode, &kubeconfig).replace("10356", "10256").replace("10349", "10249")).unwrap();
    cluster.start().unwrap();
    let at_start = lost(&mut before);
    wait_until_all_answer(&cluster, &cluster.log());
    let mut ours = open_connections(&cluster);
    assert!(cluster.sluice(&["get", "flows"]).unwrap().lines().count() > ours.len(), "new connections are ours");
    let removed = cluster.sluice(&["cleanup", "--kube-proxy"]).unwrap();
    assert!(removed.contains(words), "{removed}");
    assert_eq!(cluster.sluice(&["cleanup", "--kube-proxy"]).unwrap(), "nothing of kube-proxy's is here\n");
    let left = cluster.output("nft", &["list", "ruleset"]).unwrap();
    assert!(!left.contains("kube-proxy") && !left.contains("KUBE-SERVICES") && !left.contains("KUBE-SVC"), "{left}");
    assert!(
        left.contains("table inet mine") && (!is_iptables || left.contains("MINE") && left.contains("KUBE-FIREWALL"))
    );
    // Looked at anew by the daemon: what lives goes on.
    std::thread::sleep(Duration::from_secs(6));
    let at_cleanup = lost(&mut before);
    let of_ours = lost(&mut ours);
    wait_until_all_answer(&cluster, &cluster.log());

    // And back: kube-proxy starts while Sluice still serves.
    let proxy = KubeProxy::start(&program, &cluster.topology.node, mode, &kubeconfig).unwrap();
    let deadline = Instant::now() + SOON * 3;
    let has_rules = || match mode {
        "nftables" => ["ip", "ip6"].iter().all(|family| {
            let table = cluster.output("nft", &["list", "table", family, "kube-proxy"]);
            table.is_ok_and(|table| table.contains("tcp . 30010"))
        }),
        _ => ["iptables-save", "ip6tables-save"]
            .iter()
            .all(|tool| cluster.output(tool, &[]).unwrap().contains("--dport 30010")),
    };
    while !has_rules() {
        assert!(Instant::now() < deadline, "{}", proxy.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    // New connections are kube-proxy's, those that are here stay ours until they end.
    let said = cluster.sluice(&["retire"]).unwrap();
    assert!(said.contains("until they end"), "{said}");
    let deadline = Instant::now() + SOON;
    while !cluster.log().contains("new connections are left") {
        assert!(Instant::now() < deadline, "{}", cluster.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let active = || cluster.metric("sluice_flows_opened_total").unwrap();
    let opened = active();
    wait_until_all_answer(&cluster, &proxy.log());
    let mut theirs = open_connections(&cluster);
    std::thread::sleep(Duration::from_secs(6));
    let at_retirement = [lost(&mut ours), lost(&mut theirs), lost(&mut before)];
    assert_eq!(active(), opened, "no new flow is ours");
    // Whoever does not wait for the last of them loses those.
    ours.truncate(EACH);
    let count_of_ours = ours.len();
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
    wait_until_all_answer(&cluster, &proxy.log());
    let at_return = [lost(&mut before), lost(&mut theirs)];
    let ours_at_return = lost(&mut ours);
    println!(
        "change-over, mode {mode}, {count} connections of each: of kube-proxy's lost {} when Sluice started, {} at its cleanup; of \
         Sluice's {} there, {} at retirement; then of kube-proxy's {} and at the end of Sluice {}; of {count_of_ours} of Sluice's \
         that were not waited for {}",
        at_start.0,
        at_cleanup.0,
        of_ours.0,
        at_retirement[0].0,
        at_retirement[1].0 + at_retirement[2].0,
        at_return[0].0 + at_return[1].0,
        ours_at_return.0
    );
    let all = [[at_start, at_cleanup, of_ours].as_slice(), &at_retirement, &at_return].concat();
    for (lost, example) in all {
        assert_eq!(lost, 0, "{example}");
    }
}

#[test]
fn every_kind_of_leftover_goes_and_nothing_else() {
    const WHAT: &str = "ipsets and older iptables of kube-proxy";
    let tools = ["ipset", "iptables-legacy", "iptables-nft"];
    if !can_run_in_namespaces(WHAT) || !tools.iter().all(|tool| has_tool(tool, WHAT)) {
        return;
    }
    let ns = NetNs::new().unwrap();
    let run = |program: &std::ffi::OsStr, arguments: &[&str]| {
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
        ns.command(program).args(arguments).env("PATH", path).output().unwrap()
    };
    let tool = |command: &str| {
        let words: Vec<&str> = command.split(' ').collect();
        let output = run(words[0].as_ref(), &words[1..]);
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for command in [
        "ipset create KUBE-CLUSTER-IP hash:ip,port",
        "ipset create KUBE-6-LOOP-BACK hash:ip,port,ip family inet6",
        "ipset create MINE hash:ip",
        "iptables-legacy -t nat -N KUBE-SERVICES",
        "iptables-legacy -t nat -A PREROUTING -j KUBE-SERVICES",
        "iptables-legacy -t nat -A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j RETURN",
        "iptables-legacy -t nat -N MINE",
        "iptables-nft -t nat -N KUBE-MARK-MASQ",
        "iptables-nft -t nat -N KUBE-SVC-X",
        "iptables-nft -t nat -A KUBE-SVC-X -j KUBE-MARK-MASQ",
        "iptables-nft -t nat -N PORTMAP",
        "iptables-nft -t nat -A PORTMAP -j KUBE-MARK-MASQ",
        // A kernel may have no dummy links: the name counts.
        "ip link add kube-ipvs0 type bridge",
        "nft add table ip6 kube-proxy",
    ] {
        tool(command);
    }
    let cleanup = |flag: &str| {
        let output = run(sluice_binary().as_ref(), &["cleanup", "--kube-proxy", flag]);
        assert_eq!(output.status.code(), Some(1), "PORTMAP keeps something: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let all = [
        "nftables table ip6 kube-proxy",
        "1 chains of iptables-legacy, table nat",
        "1 chains of iptables-nft, table nat",
        "ipset KUBE-CLUSTER-IP",
        "ipset KUBE-6-LOOP-BACK",
        "link kube-ipvs0",
    ];
    let left = "left chain KUBE-MARK-MASQ of iptables-nft: rules of others use it\n";
    let said = |verb: &str| all.iter().map(|what| format!("{verb} {what}\n")).collect::<String>() + left;
    assert_eq!(cleanup("--dry-run"), said("would remove"));
    assert_eq!(cleanup("--force"), said("removed"));
    assert_eq!(cleanup("--force"), format!("nothing of kube-proxy's is here\n{left}"));
    assert_eq!(tool("ipset list -name"), "MINE\n");
    let legacy = tool("iptables-legacy-save");
    assert!(legacy.contains(":MINE") && !legacy.contains("KUBE"), "{legacy}");
    let nft = tool("iptables-nft-save");
    assert!(nft.contains("-A PORTMAP -j KUBE-MARK-MASQ") && !nft.contains("KUBE-SVC"), "{nft}");
    assert!(!tool("ip -o link").contains("kube-ipvs0"));
}

#[test]
fn beside_kube_proxy_only_services_with_our_name_are_ours() {
    const WHAT: &str = "beside kube-proxy";
    let Some(program) = program(WHAT) else { return };
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (mut cluster, plane) = cluster();
    let _proxy = KubeProxy::start(&program, &cluster.topology.node, "nftables", &plane.kubeconfig("proxy")).unwrap();
    cluster.configure("serviceProxyName: sluice\nclusterCIDRs: [10.244.0.0/16, 'fd00:10:244::/64']\n").unwrap();
    cluster.start().unwrap();
    wait_until_all_answer(&cluster, "kube-proxy's Service");
    // A Service of ours, made while both run.
    let mut ours = service("ours", 11);
    ours["metadata"]["labels"] = serde_json::json!({"service.kubernetes.io/service-proxy-name": "sluice"});
    plane.create(&ours).unwrap();
    for slice in slices(&cluster, "ours", 0..2) {
        plane.create(&slice).unwrap();
    }
    let at_ours = |v4| {
        let [_, mut node_port, _] = cluster.web(v4);
        node_port.set_port(30011);
        [SocketAddr::new(if v4 { "10.96.0.11" } else { "fd00:96::b" }.parse().unwrap(), 80), node_port]
    };
    let deadline = Instant::now() + SOON;
    for (client, ns) in cluster.clients() {
        for v4 in [true, false] {
            for address in at_ours(v4) {
                while !answers(ns, address) {
                    assert!(Instant::now() < deadline, "{client} to {address} of ours\n{}", cluster.log());
                }
            }
        }
    }
    let flows = cluster.sluice(&["get", "flows"]).unwrap();
    assert!(flows.contains("default/ours") && !flows.contains("default/web"), "{flows}");
    // kube-proxy's ports of masqueraded connections are random: some are in our range. They live all the same.
    let mut theirs = open_connections(&cluster);
    let (lost, example) = lost(&mut theirs);
    assert_eq!(lost, 0, "{example}");
    // Addresses that nobody has are dropped by kube-proxy, and its other ports refused: as without us.
    let unallocated = Target::Http("10.96.0.99:80".parse().unwrap());
    let refused = Target::Http("10.96.0.10:81".parse().unwrap());
    let of = |target| cluster.topology.client.run(|| Ok(ask(target, ANSWER).result)).unwrap();
    assert_eq!(of(unallocated).unwrap_err().as_str(), "timeout");
    // The kernel limits how often it says so.
    assert!((0..5).any(|_| of(refused).unwrap_err().as_str() == "refused"));
    plane.delete(&ours).unwrap();
    let deadline = Instant::now() + SOON;
    while cluster.output("ip", &["route", "show", "table", "5392"]).unwrap().contains("10.96.0.11") {
        assert!(Instant::now() < deadline, "{}", cluster.log());
    }
}

#[test]
fn a_change_over_loses_no_connection_of_kube_proxys_nftables_mode() {
    change_over("nftables");
}

#[test]
fn a_change_over_loses_no_connection_of_kube_proxys_iptables_mode() {
    change_over("iptables");
}
