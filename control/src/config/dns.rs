//! Keys of `dns`: what names are answered, where, and who is asked for the rest.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sluice_dataplane::dns::{PodNames, ZoneSpec};

use super::{duration, duration_text};

/// Longest time to live.
const LONGEST_TTL: Duration = Duration::from_secs(3600);
/// Port of a server that none is said of.
const DNS_PORT: u16 = 53;

/// Names, answered on the node. Nothing is answered unless the key is there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Dns {
    /// Where questions come in. Addresses that no link has are put on `lo` while the daemon runs.
    pub listen: Vec<SocketAddr>,
    /// Zones answered for; reverse zones too. Without any reverse zone, reverse names of our addresses are answered.
    pub zones: Vec<String>,
    /// Time to live of records.
    #[serde(deserialize_with = "duration", serialize_with = "duration_text")]
    pub ttl: Duration,
    /// Names of Pods by address: `disabled`, `insecure` or `verified`.
    #[serde(deserialize_with = "pods", serialize_with = "pods_text")]
    pub pods: PodNames,
    /// Namespaces that have names; empty: all.
    pub namespaces: Vec<String>,
    /// A Service with a ClusterIP and no ready endpoint has no name.
    pub ignore_empty_service: bool,
    /// An endpoint without a host name is called as its Pod.
    pub endpoint_pod_names: bool,
    /// Zones below which a name that does not exist is asked for elsewhere.
    #[serde(rename = "fallthrough")]
    pub fall_through: Vec<String>,
    /// Servers for all other names, as ADDRESS or ADDRESS:PORT. Default: those of the host's resolv.conf.
    pub upstreams: Option<Vec<Upstream>>,
    /// Questions to upstreams at a time; more are refused.
    pub max_concurrent: usize,
    /// Answers of upstreams that are kept, existing and missing names together; 0: none.
    pub cache_size: u64,
    /// Whether the names of headless Services answer virtual addresses, where a Service does not say.
    pub headless: Headless,
    /// Ranges that virtual addresses are taken from.
    #[serde(rename = "virtualCIDRs")]
    pub virtual_cidrs: Vec<IpNet>,
    /// Answer at the ClusterIP of this Service too, written `namespace/name`.
    pub service: Option<String>,
}

impl Default for Dns {
    fn default() -> Self {
        let range = |text: &str| text.parse().expect("a constant range");
        Self {
            listen: vec![SocketAddr::from(([169, 254, 20, 10], DNS_PORT))],
            zones: vec!["cluster.local".to_owned()],
            ttl: Duration::from_secs(5),
            pods: PodNames::default(),
            namespaces: Vec::new(),
            ignore_empty_service: false,
            endpoint_pod_names: false,
            fall_through: vec!["in-addr.arpa".to_owned(), "ip6.arpa".to_owned()],
            upstreams: None,
            max_concurrent: 1000,
            cache_size: 10_000,
            headless: Headless::default(),
            virtual_cidrs: vec![range("240.241.0.0/16"), range("fd00:240:241::/112")],
            service: None,
        }
    }
}

impl Dns {
    /// What is wrong, with the key.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.ttl > LONGEST_TTL {
            return Err("dns.ttl: use at most 1h".to_owned());
        }
        if self.ttl.subsec_nanos() != 0 {
            return Err("dns.ttl: use whole seconds".to_owned());
        }
        if let Some(any) = self.listen.iter().find(|address| address.ip().is_unspecified()) {
            return Err(format!(
                "dns.listen: {any}: name the address: an answer must come from where the question went"
            ));
        }
        if self.zones.is_empty() {
            return Err("dns.zones: name at least one, such as cluster.local".to_owned());
        }
        if let Some(zone) = self.zones.iter().chain(&self.fall_through).find(|zone| !is_domain(zone)) {
            return Err(format!("dns: {zone:?} is no zone: use a domain such as cluster.local"));
        }
        if let Some(name) = self.service.as_ref().filter(|name| name.split('/').count() != 2) {
            return Err(format!(
                "dns.service: {name:?} is no Service: use namespace/name, such as kube-system/kube-dns"
            ));
        }
        Ok(())
    }

    /// The zone's part.
    #[must_use]
    pub fn zone(&self) -> ZoneSpec {
        ZoneSpec {
            zones: self.zones.iter().map(|zone| zone.trim_end_matches('.').to_owned()).collect(),
            ttl: self.ttl,
            pods: self.pods,
            namespaces: self.namespaces.clone(),
            ignore_empty_service: self.ignore_empty_service,
            fall_through: self.fall_through.clone(),
            listen: self.listen.iter().map(SocketAddr::ip).collect(),
        }
    }
}

fn is_domain(zone: &str) -> bool {
    let zone = zone.strip_suffix('.').unwrap_or(zone);
    let fits = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    zone.is_empty() || (zone.len() < 254 && zone.split('.').all(fits))
}

/// What the name of a headless Service answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Headless {
    /// Its endpoints.
    #[default]
    Plain,
    /// An address of ours, whose connections are balanced over the endpoints.
    Virtual,
}

/// Somebody who is asked for names that are not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upstream(pub SocketAddr);

impl FromStr for Upstream {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, DNS_PORT));
        let wrong = |_| format!("{text:?} is no server: use an address, or an address with a port");
        address.or_else(|_| text.parse()).map(Self).map_err(wrong)
    }
}

impl Serialize for Upstream {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Upstream {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

fn pods_text<S: Serializer>(pods: &PodNames, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match pods {
        PodNames::Disabled => "disabled",
        PodNames::Insecure => "insecure",
        PodNames::Verified => "verified",
    })
}

fn pods<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PodNames, D::Error> {
    match &*String::deserialize(deserializer)? {
        "disabled" => Ok(PodNames::Disabled),
        "insecure" => Ok(PodNames::Insecure),
        "verified" => Ok(PodNames::Verified),
        other => Err(serde::de::Error::custom(format!("{other:?}: use disabled, insecure or verified"))),
    }
}
