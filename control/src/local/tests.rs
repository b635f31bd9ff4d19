use std::path::Path;

use super::*;
use crate::source::manifest;

const SLICE: &str = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nendpoints: []\nmetadata: {name: s, \
    labels: {kubernetes.io/service-name: web}}\n";
const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: n, labels: {topology.kubernetes.io/zone: z}}\n";

fn service(name: &str, spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n")
}

fn pod(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: web}}}}\nspec: {{nodeName: n, containers: []}}\n\
        status: {{podIP: {ip}, conditions: [{{type: Ready, status: 'True'}}]}}\n"
    )
}

fn changes(texts: &[String]) -> Vec<Change> {
    let parsed = manifest::parse(&texts.join("---\n"));
    assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
    let origin = |document| Origin::File { path: Path::new("f").into(), document };
    parsed.objects.into_iter().map(|(object, document)| Change::Apply(object, origin(document))).collect()
}

struct Cluster {
    local: LocalControllers,
    services: BTreeMap<String, Service>,
    slices: BTreeMap<String, EndpointSlice>,
}

impl Cluster {
    fn new(config: &str) -> Self {
        let config = if config.is_empty() { Config::default() } else { serde_saphyr::from_str(config).unwrap() };
        Self { local: LocalControllers::new(&config), services: BTreeMap::new(), slices: BTreeMap::new() }
    }

    /// Applies the objects; says what came out, as names.
    fn apply(&mut self, texts: &[String]) -> Vec<String> {
        self.take(changes(texts))
    }

    fn delete(&mut self, kind: Kind, name: &str) -> Vec<String> {
        let service = (kind == Kind::EndpointSlice).then(|| "web".into());
        self.take(vec![Change::Delete(Key { kind, name: ServiceName::new("default", name), service })])
    }

    fn take(&mut self, changes: Vec<Change>) -> Vec<String> {
        let mut names = Vec::new();
        for change in self.local.complete(changes) {
            match change {
                Change::Apply(object, origin) => {
                    let name = object.key().name.name.to_string();
                    names.push(object.key().to_string());
                    match object {
                        Object::Service(object) => drop(self.services.insert(name, (*object).clone())),
                        Object::EndpointSlice(object) => {
                            assert_eq!(origin == Origin::LocalController, name != "s");
                            self.slices.insert(name, (*object).clone());
                        }
                        _ => {}
                    }
                }
                Change::Delete(key) => {
                    names.push(format!("- {key}"));
                    self.services.remove(&*key.name.name);
                    self.slices.remove(&*key.name.name);
                }
            }
        }
        names
    }

    fn ips(&self, name: &str) -> Vec<String> {
        self.services[name].spec.as_ref().unwrap().cluster_ips.clone().unwrap_or_default()
    }

    fn node_ports(&self, name: &str) -> Vec<Option<i32>> {
        self.services[name].spec.as_ref().unwrap().ports.iter().flatten().map(|port| port.node_port).collect()
    }

    fn problems(&self) -> Vec<String> {
        self.local.problems().iter().map(ToString::to_string).collect()
    }
}

#[test]
fn families_follow_the_policy() {
    let both = "serviceCIDRs: [10.96.0.0/16, 'fd00::/112']";
    for (config, spec, expected) in [
        (both, "", "4"),
        ("serviceCIDRs: ['fd00::/112', 10.96.0.0/16]", "", "6"),
        (both, "ipFamilies: [IPv6]", "6"),
        (both, "ipFamilyPolicy: PreferDualStack", "46"),
        (both, "ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6]", "64"),
        (both, "ipFamilies: [IPv6, IPv4]", "64"),
        (both, "clusterIP: 'fd00::9', ipFamilyPolicy: PreferDualStack", "64"),
        ("serviceCIDRs: [10.96.0.0/16]", "ipFamilyPolicy: PreferDualStack", "4"),
        ("serviceCIDRs: [10.96.0.0/16]", "ipFamilyPolicy: RequireDualStack", "4!"),
        ("serviceCIDRs: [10.96.0.0/16]", "ipFamilies: [IPv6]", "!"),
        ("serviceCIDRs: []", "", "!"),
        (both, "clusterIP: None", "N"),
        (both, "type: ExternalName, externalName: x", ""),
    ] {
        let mut cluster = Cluster::new(config);
        cluster.apply(&[service("a", spec)]);
        let mut is: String = cluster
            .ips("a")
            .iter()
            .map(|ip| match ip {
                ip if ip == "None" => 'N',
                ip if ip.starts_with("fd00::") => '6',
                ip if ip.starts_with("10.96.") => '4',
                ip => panic!("{ip}"),
            })
            .collect();
        is += if cluster.problems().is_empty() { "" } else { "!" };
        assert_eq!(is, expected, "{config} {spec}: {:?}", cluster.problems());
        let spec_is = cluster.services["a"].spec.as_ref().unwrap();
        assert_eq!(spec_is.cluster_ip.as_ref(), spec_is.cluster_ips.iter().flatten().next(), "{spec}");
    }
}

#[test]
fn the_order_of_files_does_not_matter_and_explicit_values_win() {
    // Fourteen addresses for twelve Services: collisions are certain.
    let config = "serviceCIDRs: [10.96.0.0/28]\nnodePortRange: 30000-30015";
    let mut texts: Vec<String> =
        (0..11).map(|n| service(&format!("s{n}"), "type: NodePort, ports: [{port: 80}]")).collect();
    texts.push(service("explicit", "type: NodePort, clusterIP: 10.96.0.7, ports: [{port: 80, nodePort: 30007}]"));
    let mut first = Cluster::new(config);
    first.apply(&texts);
    texts.reverse();
    let mut second = Cluster::new(config);
    second.apply(&texts);
    assert_eq!(first.services, second.services);
    assert_eq!(first.problems(), Vec::<String>::new());
    let ips: BTreeSet<_> = first.services.keys().flat_map(|name| first.ips(name)).collect();
    let ports: BTreeSet<_> = first.services.keys().flat_map(|name| first.node_ports(name)).collect();
    assert_eq!((ips.len(), ports.len()), (12, 12));
    assert!(!ips.contains("10.96.0.0") && !ips.contains("10.96.0.15"), "network and broadcast are no addresses");
}

#[test]
fn an_explicit_value_that_comes_later_moves_only_its_holder() {
    let mut cluster = Cluster::new("");
    let node_port = "type: NodePort, ports: [{port: 80}]";
    cluster.apply(&[service("a", node_port), service("b", node_port)]);
    let (a, b) = (cluster.services["a"].clone(), cluster.services["b"].clone());
    let (ip, port) = (cluster.ips("a")[0].clone(), cluster.node_ports("a")[0].unwrap());
    let explicit = format!("type: NodePort, clusterIP: {ip}, ports: [{{port: 80, nodePort: {port}}}]");
    assert_eq!(cluster.apply(&[service("x", &explicit)]), ["Service default/a", "Service default/x"]);
    assert_ne!(cluster.ips("a")[0], ip);
    assert_ne!(cluster.node_ports("a")[0], Some(port));
    assert_eq!(cluster.services["b"], b);
    // Holders keep what they have, even when their first choice is free again.
    let moved = cluster.services["a"].clone();
    cluster.delete(Kind::Service, "x");
    cluster.apply(&[service("a", node_port)]);
    assert_eq!(cluster.services["a"], moved);
    assert_ne!(moved, a);
}

#[test]
fn pools_that_are_exhausted_are_a_problem_until_something_is_given_back() {
    let mut cluster = Cluster::new("serviceCIDRs: [10.96.0.0/30]\nnodePortRange: 30000-30001");
    let node_port = "type: NodePort, ports: [{port: 80}]";
    cluster.apply(&[service("a", node_port), service("b", node_port), service("c", node_port)]);
    let problems = cluster.problems();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("Service default/c: spec.clusterIP: no free IPv4 address is left in 10.96.0.0/30"));
    assert!(
        problems[1].contains("Service default/c: spec.ports[0].nodePort: no free node port is left in 30000-30001")
    );
    cluster.delete(Kind::Service, "a");
    assert_eq!(cluster.problems(), Vec::<String>::new());
    assert_eq!(cluster.ips("c").len(), 1);
}

#[test]
fn node_ports_where_they_are_wanted() {
    let balancer = "type: LoadBalancer, externalTrafficPolicy: Local, ports: [{port: 80, name: a}, {port: 81, name: b, nodePort: 31000}]";
    let none = "type: LoadBalancer, allocateLoadBalancerNodePorts: false, ports: [{port: 80}]";
    let twice = "type: NodePort, ports: [{port: 53, protocol: TCP}, {port: 53, protocol: UDP}]";
    let mut cluster = Cluster::new("");
    cluster.apply(&[
        service("lb", balancer),
        service("none", none),
        service("twice", twice),
        service("plain", "ports: [{port: 1}]"),
    ]);
    assert!(matches!(cluster.node_ports("lb")[..], [Some(30000..=32767), Some(31000)]));
    let health = cluster.services["lb"].spec.as_ref().unwrap().health_check_node_port;
    assert!(matches!(health, Some(30000..=32767)) && !cluster.node_ports("lb").contains(&health));
    assert_eq!(cluster.node_ports("none"), [None]);
    assert_eq!(cluster.node_ports("plain"), [None]);
    let [Some(tcp), Some(udp)] = cluster.node_ports("twice")[..] else { panic!("two node ports") };
    assert_ne!(tcp, udp);
    let made_up = |name: &str| cluster.local.made_up(&ServiceName::new("default", name)).to_vec();
    assert_eq!(made_up("lb"), ["clusterIP", "nodePort", "healthCheckNodePort"]);
    assert_eq!(made_up("none"), ["clusterIP"]);
}

#[test]
fn a_restart_hands_out_the_same_even_after_collisions() {
    let dir = tempfile::tempdir().unwrap();
    let node_port = "type: NodePort, ports: [{port: 80, name: http}]";
    let texts: Vec<String> = (0..6).map(|n| service(&format!("s{n}"), node_port)).collect();
    let config = "serviceCIDRs: [10.96.0.0/28]\nnodePortRange: 30000-30007";
    let mut first = Cluster::new(config);
    first.local.load(dir.path()).unwrap();
    // One by one and backwards, so that the later ones are displaced.
    for text in texts.iter().rev() {
        first.apply(std::slice::from_ref(text));
    }
    first.local.save(dir.path()).unwrap();
    let mut fresh = Cluster::new(config);
    fresh.apply(&texts);
    assert_ne!(fresh.services, first.services, "no collision: the test shows nothing");
    let mut second = Cluster::new(config);
    second.local.load(dir.path()).unwrap();
    second.apply(&texts);
    assert_eq!(second.services, first.services);
    std::fs::write(dir.path().join("allocations.json"), "{").unwrap();
    assert!(second.local.load(dir.path()).is_err());
}

#[test]
fn pods_make_slices_and_only_their_own_services_are_rebuilt() {
    let mut cluster = Cluster::new("");
    let web = service("web", "selector: {app: web}, ports: [{port: 80}], trafficDistribution: PreferClose");
    let other = service("other", "selector: {app: other}, ports: [{port: 80}]");
    let out = cluster.apply(&[web, other, pod("a", "10.0.0.1")]);
    assert_eq!(out.len(), 5, "{out:?}");
    assert_eq!(cluster.slices.len(), 2, "one for each Service, if only an empty one");
    let slice = cluster.slices.keys().find(|name| name.starts_with("web-ipv4-")).unwrap().clone();
    let key = format!("EndpointSlice default/{slice}");
    assert_eq!(cluster.apply(&[pod("b", "10.0.0.2")]), ["Pod default/b", &key]);
    let endpoints = |cluster: &Cluster| cluster.slices[&slice].endpoints.clone().unwrap();
    assert_eq!(endpoints(&cluster).len(), 2);
    assert_eq!(endpoints(&cluster)[0].zone, None);
    assert_eq!(cluster.apply(&[pod("b", "10.0.0.2")]), ["Pod default/b"], "nothing has changed");
    assert_eq!(cluster.apply(&[NODE.to_owned()]), ["Node n", &key]);
    assert_eq!(endpoints(&cluster)[0].zone.as_deref(), Some("z"));
    assert!(endpoints(&cluster)[0].hints.is_some());
    assert_eq!(cluster.delete(Kind::Pod, "b"), ["- Pod default/b", &key]);
    assert_eq!(endpoints(&cluster).len(), 1);
    assert_eq!(cluster.delete(Kind::Service, "web"), [format!("- {key}"), "- Service default/web".to_owned()]);
}

#[test]
fn slices_of_the_source_win() {
    let mut cluster = Cluster::new("");
    cluster.apply(&[service("web", "selector: {app: web}, ports: [{port: 80}]"), pod("a", "10.0.0.1")]);
    let made_up = cluster.slices.keys().next().unwrap().clone();
    let out = cluster.apply(&[SLICE.to_owned()]);
    assert_eq!(out, ["EndpointSlice default/s".to_owned(), format!("- EndpointSlice default/{made_up}")]);
    assert_eq!(cluster.local.made_up(&ServiceName::new("default", "web")), ["clusterIP"]);
    assert_eq!(cluster.delete(Kind::EndpointSlice, "s").len(), 2);
    assert_eq!(cluster.slices.keys().collect::<Vec<_>>(), [&made_up]);
}

#[test]
fn a_pod_with_an_address_but_no_conditions_is_warned_about() {
    let mut cluster = Cluster::new("");
    let bare = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: web}}\nstatus: {podIP: 10.0.0.1}\n";
    cluster.apply(&[bare.to_owned()]);
    assert_eq!(cluster.problems(), Vec::<String>::new(), "no Service asks for it");
    cluster.apply(&[service("web", "selector: {app: web}")]);
    let problems = cluster.problems();
    assert!(problems[0].contains("Pod default/a: status.conditions: is missing"), "{problems:?}");
    cluster.apply(&[pod("a", "10.0.0.1")]);
    assert_eq!(cluster.problems(), Vec::<String>::new());
}
