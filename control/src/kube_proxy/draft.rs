//! What kube-proxy's keys and flags ask for, before it is known how they act together.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde_json::Value;
use sluice_dataplane::table::Balancing;

use super::Wishes;
use crate::address;
use crate::config::{Config, NodePortAddress};

const HEALTH_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;

/// kube-proxy's modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    /// What it uses when it is not told.
    #[default]
    Iptables,
    Ipvs,
    Nftables,
}

/// How kube-proxy tells Pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DetectLocal {
    ClusterCidr,
    NodeCidr,
}

/// Values as they were given.
#[derive(Debug, Default)]
pub struct Draft {
    wishes: Wishes,
    hostname: Option<String>,
    is_v6: bool,
    healthz: Option<(IpAddr, u16)>,
    healthz_port: Option<u16>,
    metrics: Option<(IpAddr, u16)>,
    metrics_port: Option<u16>,
    mode: Option<Mode>,
    masquerade_all: Option<bool>,
    masquerade_all_nftables: Option<bool>,
    localhost_node_ports: Option<bool>,
    scheduler: Option<Balancing>,
    detect_local: Option<DetectLocal>,
    cluster_cidrs: Option<Vec<IpNet>>,
    node_port_addresses: Option<Vec<NodePortAddress>>,
    /// Values that have no meaning here, though their keys have.
    pub(super) ignored: Vec<String>,
}

impl Draft {
    /// The configuration of a whole file: what it leaves open is as kube-proxy has it.
    pub(super) fn into_config(mut self) -> (Config, Wishes) {
        if *self.mode.get_or_insert_default() == Mode::Nftables {
            self.masquerade_all_nftables.get_or_insert(false);
        }
        self.detect_local.get_or_insert(DetectLocal::ClusterCidr);
        if self.detect_local == Some(DetectLocal::ClusterCidr) {
            self.cluster_cidrs.get_or_insert_default();
        }
        let unspecified: IpAddr = if self.is_v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let loopback: IpAddr = if self.is_v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        self.healthz.get_or_insert((unspecified, HEALTH_PORT));
        self.metrics.get_or_insert((loopback, METRICS_PORT));
        self.apply(Config::default())
    }

    /// A configuration with what was given, and nothing else, changed.
    pub(super) fn apply(self, mut config: Config) -> (Config, Wishes) {
        config.node_name = self.hostname.or(config.node_name);
        if let Some((address, port)) = self.healthz {
            config.health = SocketAddr::new(address, port);
        }
        if let Some((address, port)) = self.metrics {
            config.admin = SocketAddr::new(address, port);
        }
        config.health.set_port(self.healthz_port.unwrap_or(config.health.port()));
        config.admin.set_port(self.metrics_port.unwrap_or(config.admin.port()));
        let masquerade_all = match self.mode {
            Some(Mode::Nftables) => self.masquerade_all_nftables.or(self.masquerade_all),
            Some(Mode::Iptables | Mode::Ipvs) | None => self.masquerade_all,
        };
        config.masquerade_all = masquerade_all.unwrap_or(config.masquerade_all);
        if self.mode == Some(Mode::Ipvs) {
            config.balancing = self.scheduler.unwrap_or(Balancing::RoundRobin);
        }
        config.cluster_cidrs = match self.detect_local {
            Some(DetectLocal::NodeCidr) => None,
            Some(DetectLocal::ClusterCidr) | None => self.cluster_cidrs.or(config.cluster_cidrs),
        };
        let localhost = self.localhost_node_ports.unwrap_or(true) && self.mode != Some(Mode::Nftables);
        match self.node_port_addresses {
            Some(mut addresses) => {
                let loopback = |entry: &NodePortAddress| matches!(entry, NodePortAddress::Range(range) if range.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)));
                if self.mode == Some(Mode::Iptables) && localhost && addresses.iter().any(loopback) {
                    addresses.push(NodePortAddress::Localhost);
                }
                config.node_port_addresses = addresses;
            }
            None => match self.mode {
                Some(Mode::Nftables) => config.node_port_addresses = vec![NodePortAddress::Primary],
                Some(Mode::Iptables | Mode::Ipvs) => {
                    config.node_port_addresses = vec![NodePortAddress::All];
                    config.node_port_addresses.extend(localhost.then_some(NodePortAddress::Localhost));
                }
                None => {}
            },
        }
        (config, self.wishes)
    }

    pub(super) fn kubeconfig(&mut self, value: &Value) -> Result<(), String> {
        self.wishes.kubeconfig = some_text(value)?.map(PathBuf::from);
        Ok(())
    }

    pub(super) fn log_format(&mut self, value: &Value) -> Result<(), String> {
        self.wishes.json_log = match some_text(value)?.as_deref() {
            None | Some("text") => false,
            Some("json") => true,
            Some(other) => return Err(format!("{other:?} is not known: use text or json")),
        };
        Ok(())
    }

    pub(super) fn verbosity(&mut self, value: &Value) -> Result<(), String> {
        self.wishes.log_level = match number::<u32>(value)? {
            0..=3 => None,
            4 | 5 => Some("debug"),
            _ => Some("trace"),
        };
        Ok(())
    }

    pub(super) fn hostname_override(&mut self, value: &Value) -> Result<(), String> {
        self.hostname = some_text(value)?.map(|name| name.trim().to_lowercase());
        Ok(())
    }

    pub(super) fn bind_address(&mut self, value: &Value) -> Result<(), String> {
        let Some(text) = some_text(value)? else { return Ok(()) };
        let address = address::parse(&text).ok_or_else(|| format!("{text:?} is no address"))?;
        self.is_v6 = address.is_ipv6();
        if !address.is_unspecified() {
            self.ignored.push(format!("bindAddress {address}"));
        }
        Ok(())
    }

    pub(super) fn healthz(&mut self, value: &Value) -> Result<(), String> {
        self.healthz = listen_at(value, HEALTH_PORT)?;
        Ok(())
    }

    pub(super) fn healthz_port(&mut self, value: &Value) -> Result<(), String> {
        self.healthz_port = Some(port(value)?);
        Ok(())
    }

    pub(super) fn metrics(&mut self, value: &Value) -> Result<(), String> {
        self.metrics = listen_at(value, METRICS_PORT)?;
        Ok(())
    }

    pub(super) fn metrics_port(&mut self, value: &Value) -> Result<(), String> {
        self.metrics_port = Some(port(value)?);
        Ok(())
    }

    pub(super) fn mode(&mut self, value: &Value) -> Result<(), String> {
        self.mode = match some_text(value)?.as_deref() {
            None => None,
            Some("iptables") => Some(Mode::Iptables),
            Some("ipvs") => Some(Mode::Ipvs),
            Some("nftables") => Some(Mode::Nftables),
            Some(other) => return Err(format!("{other:?} is no mode of Linux: use iptables, ipvs or nftables")),
        };
        Ok(())
    }

    pub(super) fn masquerade_all(&mut self, value: &Value) -> Result<(), String> {
        self.masquerade_all = some_bool(value)?;
        Ok(())
    }

    pub(super) fn masquerade_all_nftables(&mut self, value: &Value) -> Result<(), String> {
        self.masquerade_all_nftables = Some(some_bool(value)?.unwrap_or(false));
        Ok(())
    }

    pub(super) fn localhost_node_ports(&mut self, value: &Value) -> Result<(), String> {
        self.localhost_node_ports = some_bool(value)?;
        Ok(())
    }

    pub(super) fn scheduler(&mut self, value: &Value) -> Result<(), String> {
        self.scheduler = match some_text(value)?.as_deref() {
            None => None,
            Some("rr" | "wrr") => Some(Balancing::RoundRobin),
            Some("lc" | "wlc" | "sed" | "nq") => Some(Balancing::LeastConnections),
            Some(other) => return Err(format!("{other:?} is not known here: use rr, wrr, lc, wlc, sed or nq")),
        };
        Ok(())
    }

    pub(super) fn detect_local_mode(&mut self, value: &Value) -> Result<(), String> {
        self.detect_local = match some_text(value)?.as_deref() {
            None => None,
            Some("ClusterCIDR") => Some(DetectLocal::ClusterCidr),
            Some("NodeCIDR") => Some(DetectLocal::NodeCidr),
            Some(other) => {
                return Err(format!("{other:?}: Pods are told by their addresses: use ClusterCIDR or NodeCIDR"));
            }
        };
        Ok(())
    }

    pub(super) fn cluster_cidr(&mut self, value: &Value) -> Result<(), String> {
        let range = |text: &String| address::parse_range(text).ok_or_else(|| format!("{text:?} is no CIDR"));
        let ranges: Vec<IpNet> = list(value)?.iter().map(range).collect::<Result<_, _>>()?;
        self.cluster_cidrs = (!ranges.is_empty()).then_some(ranges);
        Ok(())
    }

    pub(super) fn node_port_addresses(&mut self, value: &Value) -> Result<(), String> {
        let entries: Vec<NodePortAddress> = list(value)?.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        self.node_port_addresses = (!entries.is_empty()).then_some(entries);
        Ok(())
    }
}

/// Text that is there and not empty. Numbers and booleans are text too: YAML takes `1.30` for one.
fn some_text(value: &Value) -> Result<Option<String>, String> {
    let text = match value {
        Value::Null => return Ok(None),
        Value::String(text) => text.clone(),
        Value::Number(_) | Value::Bool(_) => value.to_string(),
        Value::Array(_) | Value::Object(_) => return Err("must be text".to_owned()),
    };
    Ok((!text.is_empty()).then_some(text))
}

fn some_bool(value: &Value) -> Result<Option<bool>, String> {
    some_text(value)?.map(|text| text.parse().map_err(|_| format!("{text:?}: use true or false"))).transpose()
}

fn number<T: std::str::FromStr + Default>(value: &Value) -> Result<T, String> {
    let text = some_text(value)?;
    text.map_or(Ok(T::default()), |text| text.parse().map_err(|_| format!("{text:?} is no number in range")))
}

fn port(value: &Value) -> Result<u16, String> {
    let number: u16 = number(value)?;
    if number == 0 { Err("0: it cannot be switched off: use a port".to_owned()) } else { Ok(number) }
}

/// Texts of a list, or between commas.
fn list(value: &Value) -> Result<Vec<String>, String> {
    let texts = match value {
        Value::Array(entries) => entries.iter().map(some_text).collect::<Result<Vec<_>, _>>()?,
        other => vec![some_text(other)?],
    };
    let parts = texts.iter().flatten().flat_map(|text| text.split(',')).map(str::trim);
    Ok(parts.filter(|part| !part.is_empty()).map(str::to_owned).collect())
}

/// An address with or without a port.
fn listen_at(value: &Value, port: u16) -> Result<Option<(IpAddr, u16)>, String> {
    let Some(text) = some_text(value)? else { return Ok(None) };
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let at = text.parse::<SocketAddr>().ok().map(|at| (at.ip(), at.port()));
    let at = at.or_else(|| Some((bare.parse().ok()?, port)));
    match at {
        Some((_, 0)) => Err(format!("{text:?}: it cannot be switched off: use a port")),
        Some(at) => Ok(Some(at)),
        None => Err(format!("{text:?} is no address and port: use one such as 0.0.0.0:{port}")),
    }
}
