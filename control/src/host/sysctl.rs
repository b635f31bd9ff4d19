//! Kernel settings: those of our link, the ports we reserve, and those that must be on already.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;

use anyhow::Result;
use sluice_dataplane::net::Family;

use super::Lacking;

const RESERVED_PORTS: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// Of both families, whatever its name.
const EARLY_DEMUX: &str = "/proc/sys/net/ipv4/tcp_early_demux";

/// Timeouts of connection tracking that must not be shorter than those of our flows: what it has forgotten of a flow that keeps
/// the client's address, it cannot bring back to us. The kernel's own values are those of a host where it is not loaded yet.
const TIMEOUTS: [Timeout; 2] = [
    Timeout { name: "tcp_timeout_established", seconds: 24 * 3600, of_kernel: 5 * 24 * 3600 },
    Timeout { name: "tcp_timeout_close_wait", seconds: 3600, of_kernel: 60 },
];

struct Timeout {
    name: &'static str,
    seconds: u32,
    of_kernel: u32,
}

/// Whether the host has this family at all.
#[must_use]
pub fn has_family(family: Family) -> bool {
    match family {
        Family::V4 => true,
        Family::V6 => read("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_some_and(|value| value == "0"),
    }
}

/// Fails unless the host forwards packets of the family: replies of Pods come in at other links.
pub fn require_forwarding(family: Family) -> Result<()> {
    let (path, name) = match family {
        Family::V4 => ("/proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward"),
        Family::V6 => ("/proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    };
    match read(path).as_deref() {
        Some("0") | None => {
            let advice = format!("the kernel does not forward {family}: run `sysctl -w {name}=1`");
            Err(Lacking(advice).into())
        }
        Some(_) => Ok(()),
    }
}

/// Settings of our link. Returns what had to be changed.
pub(super) fn set_link(link: &str) -> Result<Vec<String>> {
    let v4 = |name: &str| format!("/proc/sys/net/ipv4/conf/{link}/{name}");
    let v6 = |name: &str| format!("/proc/sys/net/ipv6/conf/{link}/{name}");
    // The larger of "all" and the link's own value counts; loose is what lets clients' addresses in.
    let is_filtered = read("/proc/sys/net/ipv4/conf/all/rp_filter").is_some_and(|value| value != "0");
    let mut wanted = vec![
        // Translated replies and masqueraded packets carry addresses of the node itself.
        (v4("accept_local"), "1"),
        (v4("rp_filter"), if is_filtered { "2" } else { "0" }),
        (v4("forwarding"), "1"),
        (v4("route_localnet"), "1"),
    ];
    if has_family(Family::V6) {
        // No address of the kernel's choice, which would be advertised into the packet path.
        wanted.extend([(v6("addr_gen_mode"), "1"), (v6("accept_ra"), "0"), (v6("forwarding"), "1")]);
    }
    let mut changes = Vec::new();
    for (path, value) in wanted {
        if read(&path).as_deref() != Some(value) {
            write(&path, value)?;
            changes.push(path);
        }
    }
    Ok(changes)
}

/// Ports that the kernel gives to no socket by itself.
pub(super) fn reserved_ports() -> BTreeSet<u16> {
    let text = read(RESERVED_PORTS).unwrap_or_default();
    let range = |entry: &str| -> Option<std::ops::RangeInclusive<u16>> {
        let (first, last) = entry.split_once('-').unwrap_or((entry, entry));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

/// Sets the ports that the kernel gives to no socket by itself.
pub(super) fn set_reserved_ports(ports: &BTreeSet<u16>) -> Result<()> {
    let ranges: Vec<String> = ranges(ports).iter().map(|(first, last)| format!("{first}-{last}")).collect();
    // An empty write changes nothing; a line break is taken as an empty list.
    write(RESERVED_PORTS, &(ranges.join(",") + "\n"))
}

/// Whether the kernel looks for the socket of a TCP packet before it routes it. The packet path cannot have that: what comes
/// for a port in the node-port range that no Service has is routed to our link and back, and the kernel drops a packet that
/// it forwards when it has a socket already (`ip_forward`). So connections to servers of the host itself on such ports,
/// health checks of ours among them, would not get past their handshake.
pub(super) fn early_demux() -> bool {
    read(EARLY_DEMUX).is_some_and(|value| value != "0")
}

/// Turns that on or off.
pub(super) fn set_early_demux(on: bool) -> Result<()> {
    write(EARLY_DEMUX, if on { "1" } else { "0" })
}

/// Timeouts of connection tracking that are too short, in seconds.
pub(super) fn short_timeouts() -> BTreeMap<String, u32> {
    let now = |timeout: &Timeout| timeout_now(timeout.name).unwrap_or(timeout.of_kernel);
    TIMEOUTS.iter().filter(|it| now(it) < it.seconds).map(|it| (it.name.to_owned(), now(it))).collect()
}

/// Makes them as long as they must be. The module must be loaded.
pub(super) fn lengthen_timeouts() -> Result<()> {
    let short = short_timeouts();
    TIMEOUTS.iter().filter(|it| short.contains_key(it.name)).try_for_each(|it| set_timeout(it.name, it.seconds))
}

/// Makes them what they were, unless somebody has changed them since.
pub(super) fn restore_timeouts(noted: &BTreeMap<String, u32>) -> Result<()> {
    let ours = TIMEOUTS.iter().filter(|it| timeout_now(it.name) == Some(it.seconds));
    ours.filter_map(|it| noted.get_key_value(it.name)).try_for_each(|(name, seconds)| set_timeout(name, *seconds))
}

/// Whether a setting is one of them.
pub(super) fn is_timeout(name: &str) -> bool {
    TIMEOUTS.iter().any(|it| it.name == name)
}

fn timeout_path(name: &str) -> String {
    format!("/proc/sys/net/netfilter/nf_conntrack_{name}")
}

fn timeout_now(name: &str) -> Option<u32> {
    read(&timeout_path(name))?.parse().ok()
}

fn set_timeout(name: &str, seconds: u32) -> Result<()> {
    write(&timeout_path(name), &seconds.to_string())
}

/// Consecutive ports as ranges.
pub(super) fn ranges(ports: &BTreeSet<u16>) -> Vec<(u16, u16)> {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *port => *last = *port,
            _ => ranges.push((*port, *port)),
        }
    }
    ranges
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn write(path: &str, value: &str) -> Result<()> {
    // In a container /proc/sys is read-only, but our manifests mount its part of networks once more.
    let elsewhere = || fs::write(format!("/host{path}"), value);
    let is_read_only = |error: &std::io::Error| error.kind() == ErrorKind::ReadOnlyFilesystem;
    let written = fs::write(path, value)
        .or_else(|error| if is_read_only(&error) { elsewhere().map_err(|_| error) } else { Err(error) });
    written.map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            Lacking(format!("cannot set {path} to {value}: {error}")).into()
        }
        _ => anyhow::Error::new(error).context(format!("cannot set {path} to {value}")),
    })
}
