//! Our one nftables table, which never changes when Services do: it keeps packets of the packet path out of connection
//! tracking, except those of flows that keep the client's address, and marks what must come back to us.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use serde_json::Value;
use sluice_dataplane::net::Family;

use super::hand_over::HandOver;
use super::{LINK, Lacking, MARK, MARK_MASK, MARK_UNTRACKED, Plan, sysctl, tool};

/// Name of our tables.
pub(super) const TABLE: &str = "sluice";
const RESERVED: &str = "reserved_ports";
const EARLY_DEMUX: &str = "early_demux_was_on";

/// Fails unless `nft` is there and may be used.
pub fn require() -> Result<()> {
    list(&["tables"]).map(|_| ())
}

/// What we changed of the kernel's settings, to be undone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Noted {
    /// Ports that we reserved.
    pub(super) reserved: BTreeSet<u16>,
    /// Early demux of TCP was on.
    pub(super) early_demux: bool,
    /// Timeouts of connection tracking that we made longer, in seconds.
    pub(super) timeouts: BTreeMap<String, u32>,
}

impl Noted {
    /// Notes this too; what was noted first of a setting stays.
    pub(super) fn add(&mut self, other: Self) {
        self.reserved.extend(other.reserved);
        self.early_demux |= other.early_demux;
        for (name, seconds) in other.timeouts {
            self.timeouts.entry(name).or_insert(seconds);
        }
    }
}

/// Our table as the kernel has it, but for the numbers that it gives to everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table(Vec<Value>);

/// Our table on this host; nothing when it is not there.
pub(super) fn read() -> Result<Option<Table>> {
    read_of("inet")
}

/// Our table of this family.
pub(super) fn read_of(family: &str) -> Result<Option<Table>> {
    match list(&["table", family, TABLE]) {
        Ok(mut listing) => Ok(Some(Table::new(&mut listing))),
        Err(error) => {
            if has_table(family, TABLE)? {
                Err(error)
            } else {
                Ok(None)
            }
        }
    }
}

impl Table {
    fn new(listing: &mut Value) -> Self {
        let mut entries = listing["nftables"].as_array_mut().map(std::mem::take).unwrap_or_default();
        for object in entries.iter_mut().filter_map(Value::as_object_mut).flat_map(|entry| entry.values_mut()) {
            if let Some(object) = object.as_object_mut() {
                object.remove("handle");
            }
        }
        Self(entries)
    }

    /// What it notes.
    pub(super) fn noted(&self) -> Noted {
        noted(&self.0)
    }
}

fn noted(entries: &[Value]) -> Noted {
    let sets = || entries.iter().map(|entry| &entry["set"]);
    let elements = sets().filter(|set| set["name"] == RESERVED).filter_map(|set| set["elem"].as_array()).flatten();
    let port = |value: &Value| u16::try_from(value.as_u64()?).ok();
    let range = |element: &Value| match element["range"].as_array() {
        Some(ends) => Some(port(ends.first()?)?..=port(ends.get(1)?)?),
        None => port(element).map(|port| port..=port),
    };
    let timeout = |set: &Value| {
        let name = set["name"].as_str().filter(|name| sysctl::is_timeout(name))?;
        Some((name.to_owned(), u32::try_from(set["elem"][0].as_u64()?).ok()?))
    };
    Noted {
        reserved: elements.filter_map(range).flatten().collect(),
        early_demux: sets().any(|set| set["name"] == EARLY_DEMUX),
        timeouts: sets().filter_map(timeout).collect(),
    }
}

/// Puts the table in place of the last one, in one transaction, with this noted in it. Returns what the kernel makes of it.
pub(super) fn apply(plan: &Plan, noted: &Noted, hand_over: &HandOver) -> Result<Option<Table>> {
    run(&ruleset(plan, noted, hand_over))?;
    read()
}

/// Removes the table.
pub(super) fn remove() -> Result<()> {
    delete_table("inet", TABLE)
}

/// Whether there is such a table, of whomever.
pub(crate) fn has_table(family: &str, name: &str) -> Result<bool> {
    let tables = list(&["tables", family])?;
    Ok(tables["nftables"].as_array().is_some_and(|entries| entries.iter().any(|entry| entry["table"]["name"] == name)))
}

/// Removes a table, when it is there.
pub(crate) fn delete_table(family: &str, name: &str) -> Result<()> {
    run(&format!("add table {family} {name}\ndelete table {family} {name}\n"))
}

fn list(arguments: &[&str]) -> Result<Value> {
    let output = command().args(["-j", "-s", "list"]).args(arguments).output().map_err(missing)?;
    if !output.status.success() {
        return Err(refused(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).context("nft prints what is no JSON")
}

/// Runs a script of `nft`, which is one transaction.
pub(super) fn run(script: &str) -> Result<()> {
    let mut child = command()
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    let mut input = child.stdin.take().context("nft has no input")?;
    input.write_all(script.as_bytes()).context("cannot write to nft")?;
    drop(input);
    let output = child.wait_with_output().context("nft cannot be waited for")?;
    if !output.status.success() {
        return Err(refused(&output.stderr));
    }
    Ok(())
}

fn command() -> Command {
    tool("nft")
}

fn missing(error: std::io::Error) -> anyhow::Error {
    Lacking(format!("cannot run nft: {error}: install nftables")).into()
}

fn refused(stderr: &[u8]) -> anyhow::Error {
    let text = String::from_utf8_lossy(stderr);
    Lacking(format!("nftables cannot be used: {}", text.trim())).into()
}

/// The whole table as an nft script.
fn ruleset(plan: &Plan, noted: &Noted, hand_over: &HandOver) -> String {
    let mut chains = Chains::default();
    for family in &plan.families {
        chains.own_ports(plan, *family);
    }
    let ours = format!("{:#010x}", MARK);
    let (mask, rest) = (format!("{MARK_MASK:#010x}"), format!("{:#010x}", !MARK_MASK));
    // Cheap rules first, and each ends the chain: every packet of the host comes by here. Service addresses outside the
    // ranges, where there are any, are those that the host routes to our link: the rule never needs to name them.
    if plan.services.iter().any(is_host) {
        chains.arriving.push(format!("fib daddr oif \"{LINK}\" notrack accept"));
        chains.leaving.push(format!("fib saddr oif \"{LINK}\" notrack accept"));
        // Passed on as it came: no Service has the port. Its replies need not come to us.
        chains.leaving.push(format!("fib daddr oif \"{LINK}\" notrack accept"));
    }
    let remember = format!("ct direction original ct mark set ct mark and {rest} or {ours}");
    let bring_back =
        format!("ct direction reply ct mark and {mask} == {ours} meta mark set meta mark and {rest} or {ours} accept");
    // Outside the window of what connection tracking has seen, it belongs to no connection there. It may to a flow of ours.
    let unplaced =
        format!("meta l4proto {{ tcp, sctp }} ct state invalid meta mark set meta mark and {rest} or {ours} accept");
    let reserved: Vec<String> =
        sysctl::ranges(&noted.reserved).into_iter().map(|(first, last)| format!("{first}-{last}")).collect();
    let elements =
        if reserved.is_empty() { String::new() } else { format!("elements = {{ {} }}", reserved.join(", ")) };
    let mut text = format!("add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    let mut chain = |name: &str, hook: &str, rules: &[String]| {
        let _ = writeln!(text, "  chain {name} {{");
        if !hook.is_empty() {
            let _ = writeln!(text, "    type {hook}; policy accept;");
        }
        for rule in rules {
            let _ = writeln!(text, "    {rule}");
        }
        text.push_str("  }\n");
    };
    chain("from_us", "", &chains.leaving);
    let kept = hand_over.keep();
    let arriving = match hand_over.take() {
        Some(ours) => [ours, replies_only(plan)].concat(),
        None => chains.arriving,
    };
    let carried =
        format!("meta mark and {mask} == {MARK_UNTRACKED:#010x} meta mark set meta mark and {rest} notrack accept");
    let from_us = [plan.at_links.then_some(carried), Some("goto from_us".to_owned())];
    let from_us = from_us.into_iter().flatten().map(|rule| format!("iif \"{LINK}\" {rule}")).collect();
    let untracked = [from_us, kept.clone(), arriving].concat();
    chain("untracked", "filter hook prerouting priority raw", &untracked);
    let untracked_output = [kept, hand_over.take_own()].concat();
    chain("untracked_output", "filter hook output priority raw", &untracked_output);
    // Most packets: nothing that follows is for them.
    let most = "ct state untracked accept".to_owned();
    let marked = [
        vec![most.clone(), format!("iif \"{LINK}\" {remember} accept"), format!("iif \"{LINK}\" accept")],
        vec![bring_back.clone(), unplaced.clone()],
        chains.errors.clone(),
    ]
    .concat();
    chain("marked", "filter hook prerouting priority mangle", &marked);
    // Endpoints in the host's own namespace, and ICMP errors of the host itself: also about what connection tracking left alone.
    let about_carried = plan.families.iter().filter(|_| plan.at_links).map(|family| {
        let (error, protocol_at) = (icmp_error(*family), QUOTED_AT + if *family == Family::V4 { 9 } else { 6 });
        format!("{error} @th,{},8 6 ct state invalid meta mark set meta mark and {rest} or {ours}", protocol_at * 8)
    });
    let about_carried = about_carried.collect();
    let marked_output = [vec![most, bring_back, unplaced], chains.errors, about_carried].concat();
    chain("marked_output", "route hook output priority mangle", &marked_output);
    let _ = write!(text, "  set {RESERVED} {{\n    type inet_service; flags interval; {elements}\n  }}\n");
    text.push_str(&hand_over.sets_and_chains());
    if noted.early_demux {
        // An empty set: that it is there says it.
        let _ = writeln!(text, "  set {EARLY_DEMUX} {{\n    type inet_service\n  }}");
    }
    for (name, seconds) in &noted.timeouts {
        let _ = writeln!(text, "  set {name} {{\n    type mark; elements = {{ {seconds} }}\n  }}");
    }
    text.push_str("}\n");
    text
}

/// Rules about replies to masqueraded flows alone.
fn replies_only(plan: &Plan) -> Vec<String> {
    let plan = Plan { services: BTreeSet::new(), node_ports: None, ..plan.clone() };
    let mut chains = Chains::default();
    plan.families.iter().for_each(|family| chains.own_ports(&plan, *family));
    chains.arriving
}

#[derive(Default)]
struct Chains {
    /// Packets that are to come to us: out of connection tracking.
    arriving: Vec<String>,
    /// Packets that come from us: out of connection tracking, unless the client's address is kept.
    leaving: Vec<String>,
    /// ICMP errors about packets of ours.
    errors: Vec<String>,
}

impl Chains {
    /// Rules about Service ranges and about the node's own addresses: node ports, and the ports of masqueraded flows.
    fn own_ports(&mut self, plan: &Plan, family: Family) {
        let (ip, header) = match family {
            Family::V4 => ("ip", 20),
            Family::V6 => ("ip6", 40),
        };
        for range in plan.services.iter().filter(|range| Family::of(range.addr()) == family && !is_host(range)) {
            self.arriving.push(format!("{ip} daddr {range} notrack accept"));
            self.leaving.push(format!("{ip} saddr {range} notrack accept"));
        }
        for address in plan.own_addresses().filter(|address| Family::of(*address) == family) {
            let ports: Vec<String> = plan.own_ports(address).iter().map(ToString::to_string).collect();
            if ports.is_empty() {
                continue;
            }
            let ports = ports.join(", ");
            let protocols = "meta l4proto { tcp, udp, sctp }";
            self.arriving.push(format!("{ip} daddr {address} {protocols} th dport {{ {ports} }} notrack accept"));
            self.leaving.push(format!("{ip} saddr {address} {protocols} th sport {{ {ports} }} notrack accept"));
            // The packet that an error quotes is one of ours: its source is this address with such a port.
            self.errors.push(format!(
                "iif != \"{LINK}\" {ip} daddr {address} {} @th,{},16 {{ {ports} }} meta mark set meta mark and {:#010x} or {MARK:#010x}",
                icmp_error(family),
                (QUOTED_AT + header) * 8,
                !MARK_MASK
            ));
        }
    }
}

/// Where an ICMP error quotes the packet that it is about.
const QUOTED_AT: usize = 8;

/// What matches an ICMP error.
fn icmp_error(family: Family) -> &'static str {
    match family {
        Family::V4 => "icmp type { destination-unreachable, time-exceeded, parameter-problem }",
        Family::V6 => "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }",
    }
}

pub(super) fn is_host(range: &ipnet::IpNet) -> bool {
    range.prefix_len() == range.max_prefix_len()
}
