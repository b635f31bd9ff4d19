//! Our two routing tables: one in which everything goes to the TUN link, and one of Service addresses.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope};
use rtnetlink::{Handle, RouteMessageBuilder};
use sluice_dataplane::net::Family;

use super::{LINK, Plan, TABLE_ALL, TABLE_SERVICES, link};

/// A route of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Route {
    table: u32,
    to: IpNet,
    /// Source of own packets that choose none.
    source: Option<IpAddr>,
}

/// Brings both tables to the plan. Returns what had to be changed.
pub(super) async fn apply(netlink: &Handle, plan: &Plan) -> Result<Vec<String>> {
    let index = link::index(netlink).await?.with_context(|| format!("the link {LINK} is gone"))?;
    let wanted = wanted(plan);
    let present = present(netlink).await?;
    let mut changes = Vec::new();
    for (route, message) in &present {
        if !wanted.contains(route) {
            netlink
                .route()
                .del(message.clone())
                .execute()
                .await
                .with_context(|| format!("cannot remove {}", name(route)))?;
            changes.push(name(route));
        }
    }
    for route in &wanted {
        if !present.iter().any(|(other, _)| other == route) {
            add(netlink, route, index).await.with_context(|| format!("cannot add {}", name(route)))?;
            changes.push(name(route));
        }
    }
    Ok(changes)
}

/// Empties both tables. Returns what was in them.
pub(super) async fn remove(netlink: &Handle) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for (route, message) in present(netlink).await? {
        netlink.route().del(message).execute().await.with_context(|| format!("cannot remove {}", name(&route)))?;
        removed.push(name(&route));
    }
    Ok(removed)
}

fn name(route: &Route) -> String {
    format!("route to {} in table {}", route.to, route.table)
}

fn wanted(plan: &Plan) -> BTreeSet<Route> {
    let mut routes = BTreeSet::new();
    for family in &plan.families {
        let source = plan.primary(*family);
        let everything = match family {
            Family::V4 => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
            Family::V6 => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
        };
        routes.insert(Route { table: TABLE_ALL, to: everything, source });
        let services = plan.services.iter().filter(|range| Family::of(range.addr()) == *family);
        routes.extend(services.map(|range| Route { table: TABLE_SERVICES, to: range.trunc(), source }));
    }
    routes
}

async fn present(netlink: &Handle) -> Result<Vec<(Route, RouteMessage)>> {
    let mut routes = Vec::new();
    for everything in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()] {
        let messages: Vec<RouteMessage> =
            netlink.route().get(everything).execute().try_collect().await.context("cannot list routes")?;
        routes.extend(messages.into_iter().filter_map(|message| Some((parse(&message)?, message))));
    }
    Ok(routes)
}

/// A route of our tables.
fn parse(message: &RouteMessage) -> Option<Route> {
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    let mut table = u32::from(message.header.table);
    let (mut to, mut source) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => to = ip(address),
            RouteAttribute::PrefSource(address) => source = ip(address),
            _ => {}
        }
    }
    if table != TABLE_ALL && table != TABLE_SERVICES {
        return None;
    }
    let unspecified = || match message.header.address_family {
        rtnetlink::packet_route::AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let to = IpNet::new(to.unwrap_or_else(unspecified), message.header.destination_prefix_length).ok()?;
    Some(Route { table, to, source })
}

async fn add(netlink: &Handle, route: &Route, link: u32) -> Result<()> {
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.to.addr(), route.to.prefix_len())?
        .table_id(route.table)
        .output_interface(link);
    if route.to.addr().is_ipv4() {
        message = message.scope(RouteScope::Link);
    }
    if let Some(source) = route.source {
        message = message.pref_source(source)?;
    }
    netlink.route().add(message.build()).replace().execute().await?;
    Ok(())
}
