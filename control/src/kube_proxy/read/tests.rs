//! kube-proxy's file and flags, value by value.

use std::fmt::Write as _;

use clap::{CommandFactory as _, Parser};
use sluice_dataplane::table::Balancing;

use super::super::{Flags, KEYS};
use super::*;
use crate::config::NodePortAddress::{All, Localhost, Primary};
use crate::config::{Config, NodePortAddress};

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

/// As kubeadm writes it.
const KUBEADM: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nbindAddress: 0.0.0.0\nbindAddressHardFail: false\n\
    clientConnection:\n  acceptContentTypes: \"\"\n  burst: 0\n  contentType: \"\"\n  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf\n  qps: 0\n\
    clusterCIDR: 10.244.0.0/16,fd00:10:244::/56\nconfigSyncPeriod: 0s\nconntrack:\n  maxPerCore: null\n  min: null\n  tcpBeLiberal: false\n  \
    tcpEstablishedTimeout: null\ndetectLocal:\n  bridgeInterface: \"\"\ndetectLocalMode: \"\"\nenableProfiling: false\nhealthzBindAddress: \"\"\n\
    hostnameOverride: \"\"\niptables:\n  localhostNodePorts: null\n  masqueradeAll: false\n  masqueradeBit: null\n  syncPeriod: 0s\nipvs:\n  \
    excludeCIDRs: null\n  scheduler: \"\"\nkind: KubeProxyConfiguration\nlogging:\n  flushFrequency: 0\n  options:\n    json:\n      \
    infoBufferSize: \"0\"\n  verbosity: 0\nmetricsBindAddress: \"\"\nmode: \"\"\nnodePortAddresses: null\noomScoreAdj: null\nportRange: \"\"\n\
    winkernel:\n  enableDSR: false\n";

fn config(text: &str) -> Config {
    read(&format!("{HEAD}{text}")).unwrap().0
}

#[test]
fn kubeadms_file_and_its_config_map_are_taken_as_they_are() {
    let (config, wishes) = read(KUBEADM).unwrap();
    let ranges = ["10.244.0.0/16", "fd00:10:244::/56"].map(|range| range.parse().unwrap());
    let expected =
        Config { cluster_cidrs: Some(ranges.to_vec()), node_port_addresses: vec![All, Localhost], ..Config::default() };
    assert_eq!(config, expected);
    let kubeconfig = Some("/var/lib/kube-proxy/kubeconfig.conf".into());
    assert_eq!(wishes, Wishes { kubeconfig, ..Wishes::default() });
    let map = serde_json::json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        "data": {"config.conf": KUBEADM, "kubeconfig.conf": "apiVersion: v1\nkind: Config\n"},
    });
    assert_eq!(read_config_map(&map.to_string()), Ok((config, wishes)));
}

#[test]
fn values_become_what_they_mean_here() {
    let nodes =
        |entries: &[&str]| -> Vec<NodePortAddress> { entries.iter().map(|text| text.parse().unwrap()).collect() };
    for (text, expected) in [
        ("hostnameOverride: ' Node-1'\n", Config { node_name: Some("node-1".into()), ..Config::default() }),
        ("healthzBindAddress: '[::1]:1'\n", Config { health: "[::1]:1".parse().unwrap(), ..Config::default() }),
        ("healthzBindAddress: 10.0.0.1\n", Config { health: "10.0.0.1:10256".parse().unwrap(), ..Config::default() }),
        ("metricsBindAddress: '::'\n", Config { admin: "[::]:10249".parse().unwrap(), ..Config::default() }),
        (
            "bindAddress: '::'\n",
            Config {
                admin: "[::1]:10249".parse().unwrap(),
                health: "[::]:10256".parse().unwrap(),
                ..Config::default()
            },
        ),
        ("iptables: {masqueradeAll: true}\n", Config { masquerade_all: true, ..Config::default() }),
        ("nftables: {masqueradeAll: true}\n", Config::default()),
        ("iptables: {localhostNodePorts: false}\n", Config { node_port_addresses: vec![All], ..Config::default() }),
        ("mode: ipvs\n", Config { balancing: Balancing::RoundRobin, ..Config::default() }),
        ("mode: ipvs\nipvs: {scheduler: lc}\n", Config { balancing: Balancing::LeastConnections, ..Config::default() }),
        ("nodePortAddresses: [primary]\n", Config { node_port_addresses: vec![Primary], ..Config::default() }),
        (
            "nodePortAddresses: [10.0.0.0/8]\n",
            Config { node_port_addresses: nodes(&["10.0.0.0/8"]), ..Config::default() },
        ),
        (
            "nodePortAddresses: [127.0.0.0/8, '::/0']\n",
            Config { node_port_addresses: nodes(&["127.0.0.0/8", "::/0", "localhost"]), ..Config::default() },
        ),
    ] {
        let mut expected = Config { cluster_cidrs: Some(Vec::new()), ..expected };
        if expected.node_port_addresses == [Primary] && !text.contains("nodePortAddresses") {
            expected.node_port_addresses = vec![All, Localhost];
        }
        assert_eq!(config(text), expected, "{text}");
    }
    let nftables = config("mode: nftables\niptables: {masqueradeAll: true}\nnodePortAddresses: [127.0.0.0/8]\n");
    assert!(!nftables.masquerade_all && nftables.node_port_addresses == nodes(&["127.0.0.0/8"]));
    assert_eq!(config("mode: nftables\n").node_port_addresses, [Primary]);
    assert!(config("mode: nftables\nnftables: {masqueradeAll: true}\n").masquerade_all);
    assert_eq!(config("detectLocalMode: NodeCIDR\nclusterCIDR: 10.0.0.0/8\n").cluster_cidrs, None);
    let (_, wishes) = read(&format!("{HEAD}logging: {{format: json, verbosity: 4}}\n")).unwrap();
    assert_eq!((wishes.json_log, wishes.log_level), (true, Some("debug")));
}

#[test]
fn what_is_ignored_is_said_once_and_only_where_it_says_something() {
    let text = "featureGates: {A: true}\nconntrack: {min: 5, maxPerCore: 0}\nbindAddress: 10.0.0.9\nwinkernel: {enableDSR: false}\n";
    let warning = read(&format!("{HEAD}{text}")).unwrap().1.warning.unwrap();
    assert_eq!(
        warning,
        "ignored of kube-proxy's configuration: featureGates, conntrack.min, bindAddress 10.0.0.9 (docs/migration.md says why)"
    );
}

#[test]
fn what_is_unknown_or_cannot_be_served_is_named_with_its_line() {
    for (text, words) in [
        ("nope: 1\n", &["line 3", "nope", "no key"][..]),
        ("conntrack:\n  min: 1\n  mix: 1\n", &["line 5", "conntrack.mix"]),
        ("conntrack: 5\n", &["line 3", "conntrack", "map"]),
        ("mode: kernelspace\n", &["line 3", "kernelspace", "nftables"]),
        ("mode: [a]\n", &["line 3", "mode", "text"]),
        ("detectLocalMode: BridgeInterface\n", &["line 3", "BridgeInterface", "NodeCIDR"]),
        ("ipvs: {scheduler: sh}\n", &["line 3", "ipvs.scheduler", "sh"]),
        ("clusterCIDR: 10.0.0.0\n", &["line 3", "10.0.0.0", "CIDR"]),
        ("healthzBindAddress: here\n", &["line 3", "here", "0.0.0.0:10256"]),
        ("iptables: {masqueradeAll: maybe}\n", &["line 3", "maybe", "true"]),
        ("mode: iptables\nmode: ipvs\n", &["mode", "line 4"]),
    ] {
        let error = read(&format!("{HEAD}{text}")).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{text:?}: {error}");
    }
    let error = read("kind: KubeProxyConfiguration\napiVersion: v9\n").unwrap_err();
    assert!(error.contains("line 2") && error.contains("v9"), "{error}");
    let map =
        |data: serde_json::Value| read_config_map(&serde_json::json!({"kind": "ConfigMap", "data": data}).to_string());
    let error = map(serde_json::json!({"config.conf": format!("{HEAD}nope: 1\n")})).unwrap_err();
    assert!(error.contains("config.conf") && error.contains("line 3"), "{error}");
    assert!(map(serde_json::json!({"other": "kind: Config\n"})).unwrap_err().contains("no key holds"));
    assert!(map(serde_json::json!({"a": KUBEADM, "b": KUBEADM})).unwrap_err().contains("both"));
}

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    flags: Flags,
}

fn flags(arguments: &[&str], is_kube_proxys: bool) -> Result<(Config, Wishes), String> {
    let command = Command::try_parse_from([&["run"], arguments].concat()).map_err(|error| error.to_string())?;
    command.flags.apply(Config::default(), is_kube_proxys).map_err(|error| error.to_string())
}

#[test]
fn flags_set_what_they_say_and_nothing_else() {
    assert_eq!(flags(&[], false), Ok((Config::default(), Wishes::default())));
    let arguments = [
        "--hostname-override=N",
        "--v=4",
        "--proxy-mode",
        "iptables",
        "--cluster-cidr=10.0.0.0/8",
        "--masquerade-all",
        "--nodeport-addresses=primary,10.0.0.0/8",
        "--nodeport-addresses",
        "::/0",
        "--healthz-port=7",
        "--metrics-bind-address=0.0.0.0",
        "--conntrack-min=0",
        "--profiling=false",
        "--iptables-sync-period",
        "10s",
    ];
    let (config, wishes) = flags(&arguments, false).unwrap();
    let expected = Config {
        node_name: Some("n".into()),
        cluster_cidrs: Some(vec!["10.0.0.0/8".parse().unwrap()]),
        masquerade_all: true,
        node_port_addresses: ["primary", "10.0.0.0/8", "::/0"].map(|text| text.parse().unwrap()).to_vec(),
        health: "0.0.0.0:7".parse().unwrap(),
        admin: "0.0.0.0:10249".parse().unwrap(),
        ..Config::default()
    };
    assert_eq!(config, expected);
    assert_eq!(wishes.log_level, Some("debug"));
    let warning = wishes.warning.unwrap();
    assert!(["--conntrack-min", "--profiling", "--iptables-sync-period"].iter().all(|flag| warning.contains(flag)));
    assert!(!warning.contains("--v"));

    let (config, wishes) = flags(&["-v2", "--hostname-override=N", "--proxy-mode=ipvs"], true).unwrap();
    assert_eq!(config, Config { node_name: Some("n".into()), ..Config::default() }, "as kube-proxy beside a file");
    assert!(wishes.warning.unwrap().contains("--proxy-mode (beside a file"));

    for (arguments, words) in [
        (&["--cleanup"][..], "sluice cleanup"),
        (&["--master=https://x"], "kubeconfig"),
        (&["--healthz-port=0"], "switched off"),
        (&["--proxy-mode=userspace"], "userspace"),
        (&["--nope"], "--nope"),
    ] {
        let error = flags(arguments, false).unwrap_err();
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
}

#[test]
fn the_table_of_the_documentation_is_the_code() {
    let mut table = "| key | flag | becomes | |\n| --- | --- | --- | --- |\n".to_owned();
    for key in KEYS {
        let code = |name: &str, dashes: &str| if name.is_empty() { String::new() } else { format!("`{dashes}{name}`") };
        let flag = if key.flag == "v" { "`--v`, `-v`".to_owned() } else { code(key.flag, "--") };
        let _ = writeln!(table, "| {} | {flag} | {} | {} |", code(key.path, ""), key.fate.word(), key.says);
    }
    let page = include_str!("../../../../docs/migration.md");
    assert!(page.contains(&table), "docs/migration.md must have this table:\n{table}");
}

#[test]
fn every_flag_is_declared_well() {
    Command::command().debug_assert();
}
