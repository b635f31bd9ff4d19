//! What our nftables table needs where another service proxy's connections still live, or ours when another takes over: each
//! packet stays with who has begun its connection.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use sluice_dataplane::net::Family;

use super::LINK;
use super::conntrack::Direction;

/// Whose connections are told one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HandOver {
    /// Another proxy's, with connection tracking; both directions.
    pub(super) carried: BTreeSet<Direction>,
    /// Ours, when all new ones are another's.
    pub(super) ours: Option<Ours>,
}

/// Connections of ours that another proxy must leave alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ours {
    /// From clients.
    pub(super) clients: BTreeSet<Direction>,
    /// To endpoints, masqueraded: these ports are taken, which connection tracking does not know.
    pub(super) masqueraded: BTreeSet<Direction>,
}

impl HandOver {
    /// Rules that keep packets of the others' connections from being taken out of connection tracking.
    pub(super) fn keep(&self) -> Vec<String> {
        rules(&self.carried, "carried", "accept")
    }

    /// Rules that take packets of our connections out of it, when no others are ours.
    pub(super) fn take(&self) -> Option<Vec<String>> {
        self.ours.as_ref().map(|ours| rules(&ours.clients, "ours", "notrack accept"))
    }

    /// The same for packets of the host itself.
    pub(super) fn take_own(&self) -> Vec<String> {
        match self.take() {
            Some(rules) => rules.iter().map(|rule| format!("oif \"{LINK}\" {rule}")).collect(),
            None => vec![format!("oif \"{LINK}\" notrack")],
        }
    }

    /// The connections themselves, and hooks without which the kernel would rewrite no packet of another proxy's once its rules
    /// are gone.
    pub(super) fn sets_and_chains(&self) -> String {
        let mut text = sets(&self.carried, "carried");
        if let Some(ours) = &self.ours {
            text += &(sets(&ours.clients, "ours") + &sets(&ours.masqueraded, "taken"));
            text += &leave_alone(&ours.masqueraded);
        }
        if self.carried.is_empty() {
            return text;
        }
        for (hook, priority) in
            [("prerouting", "dstnat"), ("output", "-100"), ("input", "100"), ("postrouting", "srcnat")]
        {
            let _ = writeln!(text, "  chain rewrite_{hook} {{");
            let _ = writeln!(text, "    type nat hook {hook} priority {priority}; policy accept;\n  }}");
        }
        text
    }
}

/// A connection that was given the port of one of ours towards an endpoint would never be answered. Before it is entered, connection
/// tracking can still forget it: the client's next SYN gets another port.
fn leave_alone(taken: &BTreeSet<Direction>) -> String {
    let mut text =
        "  chain leave_alone {\n    type filter hook postrouting priority srcnat + 10; policy accept;\n".to_owned();
    let _ = writeln!(text, "    iif \"{LINK}\" accept");
    for rule in rules(taken, "taken", "drop") {
        let _ = writeln!(text, "    {rule}");
    }
    text + "  }\n"
}

fn rules(connections: &BTreeSet<Direction>, set: &str, verdict: &str) -> Vec<String> {
    let of_family = |family: Family| {
        let (ip, version) = names(family);
        let rule = format!("{ip} saddr . meta l4proto . th sport . {ip} daddr . th dport @{set}_{version} {verdict}");
        connections.iter().any(|direction| is_of(direction, family)).then_some(rule)
    };
    Family::BOTH.into_iter().filter_map(of_family).collect()
}

fn sets(connections: &BTreeSet<Direction>, set: &str) -> String {
    let mut text = String::new();
    for family in Family::BOTH {
        let elements: Vec<String> =
            connections.iter().filter(|direction| is_of(direction, family)).map(element).collect();
        if elements.is_empty() {
            continue;
        }
        let (ip, version) = names(family);
        let address = if ip == "ip" { "ipv4_addr" } else { "ipv6_addr" };
        let elements = elements.join(", ");
        let _ = writeln!(text, "  set {set}_{version} {{");
        let _ = writeln!(text, "    type {address} . inet_proto . inet_service . {address} . inet_service");
        let _ = writeln!(text, "    elements = {{ {elements} }}\n  }}");
    }
    text
}

fn names(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("ip", "v4"),
        Family::V6 => ("ip6", "v6"),
    }
}

fn is_of(direction: &Direction, family: Family) -> bool {
    Family::of(direction.from.ip()) == family
}

fn element(direction: &Direction) -> String {
    let Direction { protocol, from, to } = direction;
    format!("{} . {} . {} . {} . {}", from.ip(), *protocol as u8, from.port(), to.ip(), to.port())
}
