//! How are namespaces wired: veth pairs, addresses, routes and neighbours, by rtnetlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::netns::{NetNs, has_ipv6, set_sysctl};

/// A hardware address.
pub type Mac = [u8; 6];

/// A route by way of a link.
#[derive(Clone, Debug)]
pub struct Route {
    /// What the route leads to.
    pub to: IpNet,
    /// The router; `None` when the destination is on the link itself.
    pub via: Option<IpAddr>,
    /// The source address of own packets that take it.
    pub source: Option<IpAddr>,
}

impl Route {
    /// A route to a destination on the link itself.
    #[must_use]
    pub fn direct(to: impl Into<IpNet>) -> Self {
        Self { to: to.into(), via: None, source: None }
    }

    /// The default route of the router's family.
    #[must_use]
    pub fn default_via(router: IpAddr) -> Self {
        let to = match router {
            IpAddr::V4(_) => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
            IpAddr::V6(_) => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
        };
        Self { to, via: Some(router), source: None }
    }
}

/// One end of a veth pair, or any link: what it is to have.
#[derive(Clone, Debug, Default)]
pub struct LinkConfig {
    /// Name of the link.
    pub name: String,
    /// Hardware address; the kernel's choice if `None`.
    pub mac: Option<Mac>,
    /// Addresses with their prefixes. IPv6 addresses skip duplicate detection, so they are usable at once.
    pub addresses: Vec<IpNet>,
    /// Neighbours known for good, so that nobody needs to ask who has that address.
    pub neighbours: Vec<(IpAddr, Mac)>,
    /// Routes, in the order in which they are to be added.
    pub routes: Vec<Route>,
    /// Largest packet; the kernel's default (1500) if `None`.
    pub mtu: Option<u32>,
}

/// Makes a veth pair with one end in each namespace, and brings both up as configured.
pub fn veth(a: &NetNs, a_end: &LinkConfig, b: &NetNs, b_end: &LinkConfig) -> Result<()> {
    let mut peer = LinkMessageBuilder::<LinkUnspec>::new().name(b_end.name.clone()).setns_by_fd(b.as_raw_fd());
    let mut link = LinkMessageBuilder::<LinkVeth>::new(&a_end.name, &b_end.name);
    if let Some(mac) = b_end.mac {
        peer = peer.address(mac.to_vec());
    }
    if let Some(mac) = a_end.mac {
        link = link.address(mac.to_vec());
    }
    let message = link.set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build()))).build();
    with_netlink(a, async |handle| {
        handle
            .link()
            .add(message)
            .execute()
            .await
            .with_context(|| format!("cannot make the veth pair {} - {}", a_end.name, b_end.name))
    })?;
    configure(a, a_end)?;
    configure(b, b_end)
}

/// Gives an existing link its addresses, neighbours and routes, and brings it up.
pub fn configure(ns: &NetNs, config: &LinkConfig) -> Result<()> {
    with_netlink(ns, async |handle| {
        if has_ipv6() {
            // No address of the kernel's own choice: those start out tentative, and send solicitations.
            set_sysctl(&format!("net.ipv6.conf.{}.addr_gen_mode", sysctl_name(&config.name)), "1")?;
        }
        let index = link_index(&handle, &config.name).await?;
        let mut up = LinkUnspec::new_with_index(index).up();
        if let Some(mtu) = config.mtu {
            up = up.mtu(mtu);
        }
        handle.link().set(up.build()).execute().await.with_context(|| format!("cannot bring {} up", config.name))?;
        for address in usable(&config.addresses, IpNet::addr) {
            let mut request = handle.address().add(index, address.addr(), address.prefix_len());
            if address.addr().is_ipv6() {
                request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            }
            request.execute().await.with_context(|| format!("cannot give {address} to {}", config.name))?;
        }
        for (address, mac) in usable(&config.neighbours, |(address, _)| *address) {
            handle
                .neighbours()
                .add(index, *address)
                .link_layer_address(mac)
                .replace()
                .execute()
                .await
                .with_context(|| format!("cannot make {address} a neighbour on {}", config.name))?;
        }
        for route in usable(&config.routes, |route| route.to.addr()) {
            add_route(&handle, index, route)
                .await
                .with_context(|| format!("cannot route {} to {}", route.to, config.name))?;
        }
        Ok(())
    })
}

/// Removes a link, for example one end of a veth pair (and so its other end).
pub fn remove(ns: &NetNs, name: &str) -> Result<()> {
    with_netlink(ns, async |handle| {
        let index = link_index(&handle, name).await?;
        handle.link().del(index).execute().await.with_context(|| format!("cannot remove {name}"))
    })
}

/// What of `items` the kernel can take: all, or without IPv6 only the rest.
fn usable<T>(items: &[T], address: impl Fn(&T) -> IpAddr) -> impl Iterator<Item = &T> {
    let ipv6 = has_ipv6();
    items.iter().filter(move |item| ipv6 || address(item).is_ipv4())
}

async fn add_route(handle: &Handle, index: u32, route: &Route) -> Result<()> {
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.to.addr(), route.to.prefix_len())?
        .output_interface(index);
    if let Some(source) = route.source {
        message = message.pref_source(source)?;
    }
    message = match route.via {
        Some(router) => message.gateway(router)?,
        None => message.scope(RouteScope::Link),
    };
    handle.route().add(message.build()).execute().await?;
    Ok(())
}

async fn link_index(handle: &Handle, name: &str) -> Result<u32> {
    let mut found = handle.link().get().match_name(name.to_owned()).execute();
    let link = found
        .try_next()
        .await
        .with_context(|| format!("cannot find the link {name}"))?
        .with_context(|| format!("there is no link {name}"))?;
    Ok(link.header.index)
}

fn sysctl_name(link: &str) -> String {
    link.replace('.', "/")
}

/// Runs `work` with a netlink connection of the namespace `ns`.
fn with_netlink<T: Send>(ns: &NetNs, work: impl AsyncFnOnce(Handle) -> Result<T> + Send) -> Result<T> {
    ns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("cannot start a runtime for netlink")?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
            let connection = tokio::spawn(connection);
            let result = work(handle).await;
            connection.abort();
            result
        })
    })
}
