//! Packets that are taken where they come in: at the ingress of every link, before the kernel looks at where they go. What is not
//! taken here goes the ordinary way, by routes and rules, and comes to the same end.

use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use sluice_dataplane::net::{Family, Protocol};

use super::nft::{self, TABLE};
use super::{LINK, Plan};

/// nftables' family of links.
const FAMILY: &str = "netdev";
/// The kernel takes 256 links in a chain.
const LINKS_A_CHAIN: usize = 200;

/// Our table of links, as it was left.
#[derive(Debug, Default)]
pub(super) struct Ingress {
    table: Option<nft::Table>,
    /// What it was made of.
    script: Option<String>,
}

impl Ingress {
    /// Brings the table to the plan and these links. `looks`: at what the kernel has, which others may have changed. Returns
    /// whether they did.
    pub(super) fn apply(&mut self, plan: &Plan, links: &[String], looks: bool) -> Result<bool> {
        let wanted = (plan.at_links && !links.is_empty()).then(|| script(plan, links));
        let is_changed = looks && nft::read_of(FAMILY)? != self.table;
        if wanted == self.script && !is_changed {
            return Ok(false);
        }
        match &wanted {
            Some(script) => nft::run(script)?,
            None => nft::delete_table(FAMILY, TABLE)?,
        }
        self.table = wanted.as_ref().map(|_| nft::read_of(FAMILY)).transpose()?.flatten();
        self.script = wanted;
        Ok(is_changed)
    }

    /// Removes the table. Returns whether it was there.
    pub(super) fn remove(&mut self) -> Result<bool> {
        *self = Self::default();
        let is_there = nft::has_table(FAMILY, TABLE)?;
        if is_there {
            nft::delete_table(FAMILY, TABLE)?;
        }
        Ok(is_there)
    }
}

/// The whole table.
fn script(plan: &Plan, links: &[String]) -> String {
    let mut text = format!("add table {FAMILY} {TABLE}\ndelete table {FAMILY} {TABLE}\ntable {FAMILY} {TABLE} {{\n");
    for family in &plan.families {
        text += &taken(*family);
        text += &ours(plan, *family);
    }
    let of_family: Vec<String> = plan.families.iter().map(|family| format!("{0} : goto of_{0}", ip(*family))).collect();
    for (number, links) in links.chunks(LINKS_A_CHAIN).enumerate() {
        let links: Vec<String> = links.iter().map(|link| format!("\"{link}\"")).collect();
        let _ = writeln!(text, "  chain arriving_{number} {{");
        let _ = writeln!(
            text,
            "    type filter hook ingress devices = {{ {} }} priority filter; policy accept;",
            links.join(", ")
        );
        let _ = writeln!(text, "    meta protocol vmap {{ {} }}\n  }}", of_family.join(", "));
    }
    text + "}\n"
}

/// Takes a packet, unless the kernel has more to do with it than to route it: one that is for another host, has options, is a
/// fragment, has come too far, is no TCP or UDP, belongs to a VLAN, or whose source is not where the link leads.
fn taken(family: Family) -> String {
    let ip = ip(family);
    // The address is nobody's: that of a neighbour on our link, which has none. So the packet goes there without Ethernet header,
    // one hop further. Rules that compare are cheaper than those that look into a set.
    let (plain, limit, protocol, ether_type, nowhere) = match family {
        Family::V4 => (&["@nh,0,8 != 0x45", "ip frag-off & 0x3fff != 0"][..], "ttl", "protocol", "0x0800", "192.0.0.8"),
        Family::V6 => (&[][..], "hoplimit", "nexthdr", "0x86dd", "100::1"),
    };
    let mut text = format!("  chain go_{ip} {{\n");
    for rule in plain {
        let _ = writeln!(text, "    {rule} accept");
    }
    for rule in [format!("{ip} {limit} < 2"), format!("@ll,96,16 != {ether_type}"), "meta pkttype != host".to_owned()] {
        let _ = writeln!(text, "    {rule} accept");
    }
    let _ = writeln!(text, "    fwd {ip} to {nowhere} device \"{LINK}\"\n  }}\n  chain check_{ip} {{");
    let _ = writeln!(text, "    fib saddr . iif oif missing accept\n    goto go_{ip}\n  }}\n  chain take_{ip} {{");
    // Whoever is in a connection was looked at when it began; a look costs as much as all the rest.
    let _ = writeln!(text, "    {ip} {protocol} tcp tcp flags & syn == 0 goto go_{ip}");
    for number in [Protocol::Tcp, Protocol::Udp] {
        let _ = writeln!(text, "    {ip} {protocol} {} goto check_{ip}", number as u8);
    }
    text + "  }\n"
}

/// Finds what is routed to us.
fn ours(plan: &Plan, family: Family) -> String {
    let ip = ip(family);
    let is_of = |address: IpAddr| Family::of(address) == family && !address.is_loopback();
    let mut text = String::new();
    let mut rules = Vec::new();
    let (single, ranges): (Vec<&IpNet>, Vec<&IpNet>) =
        plan.services.iter().filter(|range| is_of(range.addr())).partition(|range| nft::is_host(range));
    rules.extend(ranges.iter().map(|range| format!("{ip} daddr {}", range.trunc())));
    for address in plan.own_addresses().filter(|address| is_of(*address)) {
        // No other transport has ports here: which it is, is looked at next.
        let ports = plan.own_ports(address).into_iter();
        rules.extend(ports.map(|ports| format!("{ip} daddr {address} @th,16,16 {ports}")));
    }
    if !single.is_empty() {
        let single: Vec<String> = single.iter().map(|range| range.addr().to_string()).collect();
        let _ = writeln!(text, "  set services_{ip} {{\n    type {}", kind(family));
        let _ = writeln!(text, "    elements = {{ {} }}\n  }}", single.join(", "));
        rules.push(format!("{ip} daddr @services_{ip}"));
    }
    let own = plan.own_frontends.iter().filter(|(address, ..)| is_of(*address));
    let own: Vec<String> =
        own.map(|(address, protocol, port)| format!("{address} . {} . {port}", *protocol as u8)).collect();
    if !own.is_empty() {
        let _ = writeln!(text, "  set own_{ip} {{\n    type {} . inet_proto . inet_service", kind(family));
        let _ = writeln!(text, "    elements = {{ {} }}\n  }}", own.join(", "));
        rules.push(format!("{ip} daddr . meta l4proto . th dport @own_{ip}"));
    }
    let _ = writeln!(text, "  chain of_{ip} {{");
    for rule in rules {
        let _ = writeln!(text, "    {rule} goto take_{ip}");
    }
    text + "  }\n"
}

fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn kind(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4_addr",
        Family::V6 => "ipv6_addr",
    }
}
