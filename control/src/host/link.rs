//! The TUN link and the addresses of the host.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::{Handle, LinkUnspec};

use super::{LINK, sysctl};

/// Addresses of the host, those of loopback, link-local ones and ours left out, in the kernel's order.
pub(super) async fn addresses(netlink: &Handle) -> Result<Vec<IpAddr>> {
    let is_own = |address: &IpAddr| match address {
        IpAddr::V4(address) => !address.is_loopback() && !address.is_link_local(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    };
    let ours = index(netlink).await?;
    let messages = all_addresses(netlink).await?;
    let elsewhere = messages.iter().filter(|(_, message)| Some(message.header.index) != ours);
    Ok(elsewhere.map(|(address, _)| *address).filter(is_own).collect())
}

/// Gives our link, where it is there, those of the addresses that no other link has, and takes others away that it was
/// given. Returns what had to be changed.
pub(super) async fn set_addresses(netlink: &Handle, wanted: &BTreeSet<IpAddr>) -> Result<Vec<String>> {
    let Some(ours) = index(netlink).await? else { return Ok(Vec::new()) };
    let present = all_addresses(netlink).await?;
    // Every address of 127.0.0.0/8 is there anyway.
    let may_need_link = |address: &IpAddr| !address.is_loopback() && !address.is_unspecified();
    let elsewhere = |address: &IpAddr| present.iter().any(|(at, it)| at == address && it.header.index != ours);
    let wanted: BTreeSet<IpAddr> =
        wanted.iter().filter(|address| may_need_link(address) && !elsewhere(address)).copied().collect();
    let mut changes = Vec::new();
    for (address, message) in present.into_iter().filter(|(_, message)| message.header.index == ours) {
        // The kernel gives a link an address of its own.
        let is_kernels = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        if !is_kernels && !wanted.contains(&address) {
            let removed = netlink.address().del(message).execute().await;
            removed.with_context(|| format!("cannot remove {address} from {LINK}"))?;
            changes.push(format!("address {address}"));
        }
    }
    let has = all_addresses(netlink).await?;
    let is_there = |address: &IpAddr| has.iter().any(|(at, message)| at == address && message.header.index == ours);
    for address in wanted.iter().filter(|address| !is_there(address)) {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let added = netlink.address().add(ours, *address, prefix).execute().await;
        added.with_context(|| format!("cannot give {LINK} the address {address}"))?;
        changes.push(format!("address {address}"));
    }
    Ok(changes)
}

async fn all_addresses(netlink: &Handle) -> Result<Vec<(IpAddr, AddressMessage)>> {
    let messages: Vec<AddressMessage> =
        netlink.address().get().execute().try_collect().await.context("cannot list the host's addresses")?;
    let address = |message: &AddressMessage| {
        let find = |local: bool| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) if local => Some(*address),
                AddressAttribute::Address(address) if !local => Some(*address),
                _ => None,
            })
        };
        // On a point-to-point link "address" is the peer's.
        find(true).or_else(|| find(false))
    };
    Ok(messages.into_iter().filter_map(|message| Some((address(&message)?, message))).collect())
}

/// Brings the link up with the settings that packets of our making need. The link must be there.
pub(super) async fn set_up(netlink: &Handle) -> Result<Vec<String>> {
    let link = find(netlink, LINK).await?.with_context(|| format!("the link {LINK} is gone"))?;
    let mut changes = sysctl::set_link(LINK)?;
    let mtu = largest_mtu(netlink).await?;
    let has_mtu = link.attributes.contains(&LinkAttribute::Mtu(mtu));
    if !has_mtu || !link.header.flags.contains(LinkFlags::Up) {
        let message = LinkUnspec::new_with_index(link.header.index).mtu(mtu).up().build();
        netlink.link().set(message).execute().await.with_context(|| format!("cannot bring {LINK} up"))?;
        changes.push(format!("link {LINK}"));
    }
    Ok(changes)
}

/// Index of the link, when it is there.
pub(super) async fn index(netlink: &Handle) -> Result<Option<u32>> {
    index_of(netlink, LINK).await
}

/// Index of any link, when it is there.
pub(super) async fn index_of(netlink: &Handle, name: &str) -> Result<Option<u32>> {
    Ok(find(netlink, name).await?.map(|link| link.header.index))
}

/// Removes a link, when it is there.
pub(super) async fn remove(netlink: &Handle, name: &str) -> Result<Vec<String>> {
    let Some(index) = index_of(netlink, name).await? else { return Ok(Vec::new()) };
    netlink.link().del(index).execute().await.with_context(|| format!("cannot remove the link {name}"))?;
    Ok(vec![format!("link {name}")])
}

async fn find(netlink: &Handle, name: &str) -> Result<Option<LinkMessage>> {
    let links = all(netlink).await?;
    let is_it = |link: &LinkMessage| {
        link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::IfName(other) if other == name))
    };
    Ok(links.into_iter().find(is_it))
}

/// A link that packets of others can come in by.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Other {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) is_ethernet: bool,
}

/// The links that packets of others can come in by.
pub(super) async fn others(netlink: &Handle) -> Result<Vec<Other>> {
    let other = |link: LinkMessage| {
        let (index, is_ethernet) = (link.header.index, link.header.link_layer_type == LinkLayerType::Ether);
        let mut attributes = link.attributes.into_iter().filter(|_| !link.header.flags.contains(LinkFlags::Loopback));
        let name = attributes.find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) if name != LINK => Some(name),
            _ => None,
        });
        name.map(|name| Other { index, name, is_ethernet })
    };
    Ok(all(netlink).await?.into_iter().filter_map(other).collect())
}

async fn all(netlink: &Handle) -> Result<Vec<LinkMessage>> {
    netlink.link().get().execute().try_collect().await.context("cannot list the host's links")
}

/// What fits through some link of the host must fit through ours, or path MTU discovery finds the wrong bottleneck.
async fn largest_mtu(netlink: &Handle) -> Result<u32> {
    let mtu = |link: LinkMessage| {
        let is_other = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::IfName(name) if name != LINK);
        let counts = !link.header.flags.contains(LinkFlags::Loopback) && link.attributes.iter().any(is_other);
        let mut attributes = link.attributes.into_iter().filter(|_| counts);
        attributes.find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(mtu),
            _ => None,
        })
    };
    Ok(all(netlink).await?.into_iter().filter_map(mtu).max().unwrap_or(0).clamp(1500, 65_521))
}
