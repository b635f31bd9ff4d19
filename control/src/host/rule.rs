//! Policy rules that send packets our way, before the kernel's own table of local addresses gets them.
//!
//! They stand at priority 0 like the kernel's `local` rule, which is put behind them at the same priority: whatever
//! happens to us, it stays where everybody expects it.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::IpProtocol;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange};
use rtnetlink::{Handle, IpVersion};
use sluice_dataplane::net::{Family, Protocol};

use super::{LINK, MARK, MARK_MASK, Plan, TABLE_ALL, TABLE_SERVICES};
use crate::config::PortRange;

/// `RT_TABLE_LOCAL`.
const TABLE_LOCAL: u32 = 255;

/// A rule at priority 0, as far as it is ours.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
struct Rule {
    to: Option<IpNet>,
    /// Destination ports, of one protocol or of all that have ports.
    ports: Option<(Option<Protocol>, PortRange)>,
    from_link: bool,
    not_from_link: bool,
    marked: bool,
    table: u32,
}

/// Brings the rules to the plan. Returns what had to be changed.
pub(super) async fn apply(netlink: &Handle, plan: &Plan) -> Result<Vec<String>> {
    let mut changes = Vec::new();
    for family in [Family::V4, Family::V6] {
        let wanted = if plan.families.contains(&family) { wanted(plan, family) } else { Vec::new() };
        let present = present(netlink, family).await?;
        let first: Vec<&Rule> = present.iter().map(|(rule, _)| rule).collect();
        let is_right = first.iter().copied().take(wanted.len()).eq(&wanted)
            && first.iter().skip(wanted.len()).all(|rule| !is_ours(rule));
        if is_right {
            continue;
        }
        // New rules come last at their priority: add ours, then `local` once more, and take the old ones away.
        for rule in wanted.iter().chain(has_local(&first).then_some(&local())) {
            add(netlink, rule, family).await.context("cannot add a policy rule")?;
        }
        for (_, message) in present.iter().filter(|(rule, _)| is_ours(rule) || *rule == local()) {
            netlink.rule().del(message.clone()).execute().await.context("cannot remove a policy rule")?;
        }
        changes.push(format!("policy rules of {family}"));
    }
    Ok(changes)
}

/// Removes our rules. Returns what was there.
pub(super) async fn remove(netlink: &Handle) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for family in Family::BOTH {
        let ours = present(netlink, family).await?.into_iter().filter(|(rule, _)| is_ours(rule));
        let mut count = 0;
        for (_, message) in ours {
            netlink.rule().del(message).execute().await.context("cannot remove a policy rule")?;
            count += 1;
        }
        if count > 0 {
            removed.push(format!("{count} policy rules of {family}"));
        }
    }
    Ok(removed)
}

fn local() -> Rule {
    Rule { table: TABLE_LOCAL, ..Rule::default() }
}

fn has_local(rules: &[&Rule]) -> bool {
    rules.contains(&&local())
}

fn is_ours(rule: &Rule) -> bool {
    rule.table == TABLE_ALL || rule.table == TABLE_SERVICES || rule.from_link
}

fn wanted(plan: &Plan, family: Family) -> Vec<Rule> {
    // What comes out of the packet path and is the node's own is delivered, never sent round again.
    let mut rules = vec![Rule { from_link: true, table: TABLE_LOCAL, ..Rule::default() }];
    // Each rule is tried for each packet that is routed: few are better than exact ones.
    let to_ports = |to: IpNet, ports: PortRange| Rule {
        to: Some(to),
        ports: Some((None, ports)),
        table: TABLE_ALL,
        ..Rule::default()
    };
    let of_family = |address: &IpAddr| Family::of(*address) == family;
    if let Some(ports) = plan.masquerade_ports {
        rules.extend(plan.primary(family).into_iter().map(|address| to_ports(address.into(), ports)));
    }
    if let Some(ports) = plan.node_ports {
        let ranges = plan.node_port_addresses.iter().filter(|range| of_family(&range.addr()));
        rules.extend(ranges.map(|range| to_ports(*range, ports)));
    }
    let own = plan.own_frontends.iter().filter(|(address, ..)| of_family(address));
    rules.extend(own.map(|(address, protocol, port)| Rule {
        to: Some((*address).into()),
        ports: Some((Some(*protocol), PortRange::new(*port, *port))),
        table: TABLE_ALL,
        ..Rule::default()
    }));
    rules.push(Rule { marked: true, table: TABLE_ALL, ..Rule::default() });
    rules.push(Rule { not_from_link: true, table: TABLE_SERVICES, ..Rule::default() });
    rules
}

/// Rules at priority 0, in order.
async fn present(netlink: &Handle, family: Family) -> Result<Vec<(Rule, RuleMessage)>> {
    let version = match family {
        Family::V4 => IpVersion::V4,
        Family::V6 => IpVersion::V6,
    };
    let listed: std::result::Result<Vec<RuleMessage>, _> = netlink.rule().get(version).execute().try_collect().await;
    let messages = match listed {
        Ok(messages) => messages,
        // Without IPv6 in the kernel there is nothing to list.
        Err(_) if family == Family::V6 && !super::sysctl::has_family(family) => Vec::new(),
        Err(error) => return Err(error).context("cannot list policy rules"),
    };
    let priority = |message: &RuleMessage| {
        let find = |attribute: &RuleAttribute| match attribute {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        };
        message.attributes.iter().find_map(find).unwrap_or(0)
    };
    Ok(messages
        .into_iter()
        .filter(|message| priority(message) == 0)
        .map(|message| (parse(&message), message))
        .collect())
}

fn parse(message: &RuleMessage) -> Rule {
    let mut rule = Rule { table: u32::from(message.header.table), ..Rule::default() };
    let (mut protocol, mut ports) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Destination(address) => rule.to = IpNet::new(*address, message.header.dst_len).ok(),
            RuleAttribute::Iifname(name) if name == LINK => {
                let inverted = message.header.flags.contains(RuleFlags::Invert);
                (rule.from_link, rule.not_from_link) = (!inverted, inverted);
            }
            RuleAttribute::FwMark(mark) => rule.marked = *mark == MARK,
            RuleAttribute::IpProtocol(number) => protocol = Protocol::from_number(u8::from(*number)),
            RuleAttribute::DestinationPortRange(range) => ports = Some(PortRange::new(range.start, range.end)),
            _ => {}
        }
    }
    rule.ports = ports.map(|ports| (protocol, ports));
    rule
}

async fn add(netlink: &Handle, rule: &Rule, family: Family) -> Result<()> {
    // `replace` only lifts the refusal of a rule that is there already: `local` is there twice for a moment.
    let mut request = netlink.rule().add().replace();
    let message = request.message_mut();
    message.header.family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message.header.action = RuleAction::ToTable;
    message.attributes.push(RuleAttribute::Priority(0));
    message.header.table = u8::try_from(rule.table).unwrap_or(0);
    message.attributes.push(RuleAttribute::Table(rule.table));
    if let Some(to) = rule.to {
        message.header.dst_len = to.prefix_len();
        message.attributes.push(RuleAttribute::Destination(to.addr()));
    }
    if let Some((protocol, ports)) = rule.ports {
        if let Some(protocol) = protocol {
            message.attributes.push(RuleAttribute::IpProtocol(IpProtocol::from(protocol as u8)));
        }
        message
            .attributes
            .push(RuleAttribute::DestinationPortRange(RulePortRange { start: ports.first, end: ports.last }));
    }
    if rule.from_link || rule.not_from_link {
        message.attributes.push(RuleAttribute::Iifname(LINK.to_owned()));
    }
    if rule.not_from_link {
        message.header.flags |= RuleFlags::Invert;
    }
    if rule.marked {
        message.attributes.push(RuleAttribute::FwMark(MARK));
        message.attributes.push(RuleAttribute::FwMask(MARK_MASK));
    }
    request.execute().await?;
    Ok(())
}
