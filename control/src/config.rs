//! Configuration: every key, its default and its unit. Flags override the file.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sluice_dataplane::table::{Balancing, DrainTimeout};

use crate::kube_proxy::{self, Wishes};
pub use dns::{Dns, Headless, Upstream};

mod dns;

const API_VERSION: &str = "sluice.dev/v1alpha1";
const KIND: &str = "SluiceConfiguration";

/// The whole configuration. An empty file is a valid one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Config {
    /// `sluice.dev/v1alpha1`.
    pub api_version: String,
    /// `SluiceConfiguration`.
    pub kind: String,
    /// Name of the Node this runs on. Default: the host name, lower case.
    pub node_name: Option<String>,
    /// Sources inside are pods of the cluster. Default: the Node's `podCIDRs`.
    #[serde(rename = "clusterCIDRs")]
    pub cluster_cidrs: Option<Vec<IpNet>>,
    /// Service ranges, besides those of ServiceCIDR objects. Default: with `localControllers` 10.96.0.0/16 and
    /// fd00:10:96::/112, else none.
    #[serde(rename = "serviceCIDRs")]
    pub service_cidrs: Option<Vec<IpNet>>,
    /// Folder source only: play the controllers' part where objects leave something open.
    pub local_controllers: bool,
    /// Folder source only: a deleted file takes its objects with it.
    pub prune: bool,
    /// Addresses on which node ports answer: `primary`, `all`, `localhost` or CIDRs.
    pub node_port_addresses: Vec<NodePortAddress>,
    /// Ports that node ports are taken from.
    pub node_port_range: PortRange,
    /// Source ports of masqueraded flows.
    pub masquerade_ports: PortRange,
    /// Masquerade every flow to a ClusterIP.
    #[serde(rename = "masqueradeAll")]
    pub masquerade_all: bool,
    /// Serve the Services with this `service.kubernetes.io/service-proxy-name`; empty: those without the label.
    pub service_proxy_name: String,
    /// Endpoint selection where a Service does not choose.
    pub balancing: Balancing,
    /// What becomes of the flows of endpoints that leave.
    pub drain: Drain,
    /// Try a new connection at another endpoint when the chosen one does not take it.
    pub retry: bool,
    /// How long an endpoint that became ready gets fewer new flows than its share, under least-connections; 0s: never.
    #[serde(deserialize_with = "duration", serialize_with = "duration_text")]
    pub slow_start: Duration,
    /// Failed opens in a row after which an endpoint gets no new flows for a while; 0: never.
    pub eject_after: u16,
    /// Packet threads, each with a TUN queue. Default: one for each CPU, at most 8.
    pub workers: Option<usize>,
    /// Where packets of Services are taken and handed over.
    pub packet_path: PacketPath,
    /// Most flows at a time.
    pub flow_table_size: usize,
    /// Leave host state and link at a clean stop as after a crash: a start soon after goes on with every flow.
    pub leave_on_stop: bool,
    /// After handing over to another daemon wait for SIGTERM, instead of ending: for a supervisor that starts again whatever
    /// ends, which would then take over in turn.
    pub linger: bool,
    /// Where flows, drains and allocations are kept; best on a tmpfs.
    pub state_dir: PathBuf,
    /// Where metrics and the admin API listen.
    pub admin: SocketAddr,
    /// Where `/healthz` and `/livez` listen.
    pub health: SocketAddr,
    /// Names; none: they are not answered.
    pub dns: Option<Dns>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            node_name: None,
            cluster_cidrs: None,
            service_cidrs: None,
            local_controllers: true,
            prune: false,
            node_port_addresses: vec![NodePortAddress::Primary],
            node_port_range: PortRange::new(30000, 32767),
            masquerade_ports: PortRange::new(61000, 65534),
            masquerade_all: false,
            service_proxy_name: String::new(),
            balancing: Balancing::default(),
            drain: Drain::default(),
            retry: true,
            slow_start: Duration::from_secs(10),
            eject_after: 5,
            workers: None,
            packet_path: PacketPath::default(),
            flow_table_size: 1_000_000,
            leave_on_stop: false,
            linger: false,
            state_dir: PathBuf::from("/run/sluice"),
            admin: SocketAddr::from(([127, 0, 0, 1], 10249)),
            health: SocketAddr::from(([0, 0, 0, 0], 10256)),
            dns: None,
        }
    }
}

impl Config {
    /// Reads a file: ours, kube-proxy's, or a ConfigMap with kube-proxy's; of the latter two also what they ask for besides.
    /// The error names the file, the key and its line.
    pub fn read(path: &Path) -> Result<(Self, Option<Wishes>), ConfigError> {
        let fail = |reason: String| ConfigError { path: path.to_owned(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
        let foreign = |(config, wishes)| (config, Some(wishes));
        let config = match kind(&text).as_deref() {
            Some(kube_proxy::read::KIND) => kube_proxy::read(&text).map(foreign),
            Some("ConfigMap") => kube_proxy::read::read_config_map(&text).map(foreign),
            _ => Self::parse(&text).map(|config| (config, None)),
        };
        config.map_err(fail)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let is_empty = text.lines().all(|line| matches!(line.trim(), "" | "---") || line.trim_start().starts_with('#'));
        if is_empty {
            return Ok(Self::default());
        }
        let config: Self = serde_saphyr::from_str(text).map_err(|error| error.without_snippet().to_string())?;
        if config.api_version != API_VERSION {
            return Err(format!("apiVersion: {:?} is not known: use {API_VERSION}", config.api_version));
        }
        if config.kind != KIND {
            return Err(format!("kind: {:?} is not known: use {KIND}", config.kind));
        }
        config.check()?;
        Ok(config)
    }

    /// Checks values that flags may have set. The error names the key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.check().map_err(|reason| ConfigError { path: PathBuf::from("configuration"), reason })
    }

    fn check(&self) -> Result<(), String> {
        if self.workers.is_some_and(|workers| !(1..=64).contains(&workers)) {
            return Err("workers: use a number from 1 to 64".to_owned());
        }
        if self.flow_table_size == 0 {
            return Err("flowTableSize: must be more than 0".to_owned());
        }
        self.dns.as_ref().map_or(Ok(()), Dns::check)
    }

    /// The node's name: configured, or the host's name in lower case.
    #[must_use]
    pub fn node_name(&self) -> String {
        let host = || {
            let name = nix::unistd::gethostname().unwrap_or_default();
            name.to_string_lossy().trim().to_lowercase()
        };
        self.node_name.clone().unwrap_or_else(host)
    }

    /// Service ranges of the configuration, or their default.
    #[must_use]
    pub fn service_cidrs(&self) -> Vec<IpNet> {
        let default = || {
            let ranges: &[&str] = if self.local_controllers { &["10.96.0.0/16", "fd00:10:96::/112"] } else { &[] };
            ranges.iter().map(|range| range.parse().expect("a constant range")).collect()
        };
        self.service_cidrs.clone().unwrap_or_else(default)
    }
}

/// The `kind` of a document, whatever else it holds.
pub(crate) fn kind(text: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Head {
        kind: Option<String>,
    }
    serde_saphyr::from_str::<Head>(text).ok()?.kind
}

/// What becomes of the flows of endpoints that leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Drain {
    /// How long an endpoint that leaves its slices, without having been terminating, keeps its flows: a duration such as
    /// `10m`, or `never`. Per Service: annotation `sluice.dev/drain-timeout`.
    #[serde(deserialize_with = "drain_timeout", serialize_with = "drain_timeout_text")]
    pub timeout: DrainTimeout,
}

/// Reads a drain timeout.
pub(crate) fn parse_drain_timeout(text: &str) -> Result<DrainTimeout, String> {
    match text {
        "never" => Ok(DrainTimeout::Never),
        text => parse_duration(text).map(DrainTimeout::After).map_err(|reason| format!("{reason}, or never")),
    }
}

/// Reads a duration such as `10m`, `1h30m` or `500ms`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let duration = text.parse::<jiff::SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok());
    duration.ok_or_else(|| format!("{text:?} is no duration: use one such as 10m, 30s or 1h30m"))
}

fn drain_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DrainTimeout, D::Error> {
    parse_drain_timeout(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

fn drain_timeout_text<S: Serializer>(timeout: &DrainTimeout, serializer: S) -> Result<S::Ok, S::Error> {
    match timeout {
        DrainTimeout::After(after) => duration_text(after, serializer),
        DrainTimeout::Never => serializer.serialize_str("never"),
    }
}

fn duration_text<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    let duration = jiff::SignedDuration::try_from(*duration).map_err(serde::ser::Error::custom)?;
    serializer.collect_str(&format_args!("{duration:#}"))
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

/// Where packets of Services are taken from the kernel, and handed back to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PacketPath {
    /// Routed to us, and routed on: everything that others filter on the host sees them.
    #[default]
    Kernel,
    /// At the links, as far as that may be: cheaper, and past what others filter.
    Links,
    /// The same, and the kernel carries connections once they are open: cheaper still.
    Offload,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct ConfigError {
    path: PathBuf,
    reason: String,
}

impl ConfigError {
    /// Of a file, or of what else is named so.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self { path: path.into(), reason: reason.into() }
    }
}

/// One entry of `nodePortAddresses`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddress {
    /// The Node's first address of each family.
    Primary,
    /// Every address of the node but loopback.
    All,
    /// Loopback, for clients on the node itself.
    Localhost,
    /// Every address of the node inside.
    Range(IpNet),
}

impl FromStr for NodePortAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "primary" => Ok(Self::Primary),
            "all" => Ok(Self::All),
            "localhost" => Ok(Self::Localhost),
            text => text.parse().map(Self::Range).map_err(|_| {
                format!("{text:?} is no node-port address: use primary, all, localhost or a CIDR such as 10.0.0.0/8")
            }),
        }
    }
}

impl fmt::Display for NodePortAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Primary => f.write_str("primary"),
            Self::All => f.write_str("all"),
            Self::Localhost => f.write_str("localhost"),
            Self::Range(range) => range.fmt(f),
        }
    }
}

impl Serialize for NodePortAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NodePortAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A range of ports, written `30000-32767`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

impl PortRange {
    /// From both ends.
    #[must_use]
    pub const fn new(first: u16, last: u16) -> Self {
        Self { first, last }
    }

    /// As a range.
    #[must_use]
    pub fn range(self) -> RangeInclusive<u16> {
        self.first..=self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || -> Option<Self> {
            let (first, last) = text.split_once('-')?;
            Some(Self::new(first.trim().parse().ok()?, last.trim().parse().ok()?))
        };
        // The kernel refuses port 0 and port 65535 in a policy rule.
        parse().filter(|range| 0 < range.first && range.first <= range.last && range.last < u16::MAX).ok_or_else(|| {
            format!("{text:?} is no port range: use two ports from 1 to 65534, the lower first, such as 30000-32767")
        })
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_and_comments_are_the_defaults() {
        for text in ["", "\n", "# nothing\n", "---\n"] {
            assert_eq!(Config::parse(text), Ok(Config::default()), "{text:?}");
        }
    }

    #[test]
    fn every_key_is_read() {
        let text = "apiVersion: sluice.dev/v1alpha1\nkind: SluiceConfiguration\nnodeName: n\nclusterCIDRs: [10.0.0.0/8]\n\
            serviceCIDRs: [10.96.0.0/16]\nlocalControllers: false\nprune: true\nnodePortAddresses: [primary, 10.0.0.0/8]\n\
            nodePortRange: 30000-30100\nmasqueradePorts: 61000-62000\nmasqueradeAll: true\nserviceProxyName: x\n\
            balancing: round-robin\ndrain: {timeout: never}\nretry: false\nslowStart: 5s\nejectAfter: 3\nworkers: 2\npacketPath: links\nflowTableSize: 10\nleaveOnStop: true\nlinger: true\nstateDir: /tmp/x\nadmin: 127.0.0.1:1\nhealth: '[::]:2'\n\
             dns: {listen: ['127.0.0.1:53'], zones: [c.local, 10.in-addr.arpa], ttl: 30s, pods: verified, namespaces: [a], ignoreEmptyService: true,\
             endpointPodNames: true, fallthrough: [.], upstreams: [1.1.1.1, '9.9.9.9:54'], maxConcurrent: 7, cacheSize: 0, headless: virtual,\
             virtualCIDRs: [240.0.0.0/24], service: kube-system/kube-dns}\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.node_port_addresses.len(), 2);
        assert_eq!(config.node_port_range, PortRange::new(30000, 30100));
        assert_eq!(config.balancing, Balancing::RoundRobin);
        assert_eq!((config.drain.timeout, config.slow_start), (DrainTimeout::Never, Duration::from_secs(5)));
        assert!(config.masquerade_all && config.prune && !config.local_controllers);
        assert_eq!((config.health.port(), config.packet_path), (2, PacketPath::Links));
        // What `/configz` shows is a configuration again.
        assert_eq!(Config::parse(&serde_json::to_string(&config).unwrap()), Ok(config.clone()));
        assert_eq!(Config::parse(&serde_json::to_string(&Config::default()).unwrap()), Ok(Config::default()));
        let dns = config.dns.unwrap();
        assert_eq!((dns.ttl, dns.headless), (Duration::from_secs(30), Headless::Virtual));
        assert_eq!(dns.upstreams.unwrap().iter().map(|it| it.0.port()).collect::<Vec<_>>(), [53, 54]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, words) in [
            ("nodeName: n\nbalancin: random\n", &["balancin", "line 2"][..]),
            ("\nbalancing: fastest\n", &["fastest", "line 2"]),
            ("nodePortRange: 10\n", &["10", "30000-32767"]),
            ("nodePortAddresses: [here]\n", &["here", "primary"]),
            ("drain: {timeout: soon}\n", &["soon", "10m"]),
            ("slowStart: fast\n", &["fast", "30s"]),
            ("kind: Other\n", &["Other"]),
            ("apiVersion: v2\n", &["v2"]),
            ("workers: 0\n", &["workers"]),
            ("packetPath: fast\n", &["fast", "kernel", "links"]),
            ("dns: {pods: all}\n", &["all", "insecure"]),
            ("dns: {ttl: 2h}\n", &["dns.ttl", "1h"]),
            ("dns: {zones: [a..b]}\n", &["a..b"]),
            ("dns: {upstreams: [dns.example]}\n", &["dns.example", "address"]),
            ("dns: {service: kube-dns}\n", &["kube-dns", "namespace/name"]),
        ] {
            let error = Config::parse(text).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{text:?}: {error}");
        }
    }
}
