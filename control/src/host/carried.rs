//! What our nftables table needs where another service proxy's connections still live: they stay with connection tracking.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use sluice_dataplane::net::Family;

use super::conntrack::Direction;

/// Rules that keep packets of these connections from being taken out of connection tracking.
pub(super) fn rules(carried: &BTreeSet<Direction>) -> Vec<String> {
    let of_family = |family: Family| {
        let (ip, set) = names(family);
        let rule = format!("{ip} saddr . meta l4proto . th sport . {ip} daddr . th dport @{set} accept");
        carried.iter().any(|direction| is_of(direction, family)).then_some(rule)
    };
    Family::BOTH.into_iter().filter_map(of_family).collect()
}

/// The connections themselves, and hooks without which the kernel would rewrite no packet of theirs once the other proxy's
/// rules are gone.
pub(super) fn sets_and_chains(carried: &BTreeSet<Direction>) -> String {
    let mut text = String::new();
    if carried.is_empty() {
        return text;
    }
    for family in Family::BOTH {
        let elements: Vec<String> = carried.iter().filter(|direction| is_of(direction, family)).map(element).collect();
        if elements.is_empty() {
            continue;
        }
        let (ip, set) = names(family);
        let address = if ip == "ip" { "ipv4_addr" } else { "ipv6_addr" };
        let elements = elements.join(", ");
        let _ = writeln!(text, "  set {set} {{");
        let _ = writeln!(text, "    type {address} . inet_proto . inet_service . {address} . inet_service");
        let _ = writeln!(text, "    elements = {{ {elements} }}\n  }}");
    }
    for (hook, priority) in [("prerouting", "dstnat"), ("output", "-100"), ("input", "100"), ("postrouting", "srcnat")]
    {
        let _ = writeln!(text, "  chain rewrite_{hook} {{");
        let _ = writeln!(text, "    type nat hook {hook} priority {priority}; policy accept;\n  }}");
    }
    text
}

fn names(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("ip", "carried_v4"),
        Family::V6 => ("ip6", "carried_v6"),
    }
}

fn is_of(direction: &Direction, family: Family) -> bool {
    Family::of(direction.from.ip()) == family
}

fn element(direction: &Direction) -> String {
    let Direction { protocol, from, to } = direction;
    format!("{} . {} . {} . {} . {}", from.ip(), *protocol as u8, from.port(), to.ip(), to.port())
}
