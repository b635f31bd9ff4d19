//! Answers what packet threads ask: by which link packets to an address leave, and with which hardware addresses, as the kernel's
//! own routes and neighbours say. Follows both, and takes back what is no longer so.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, IpVersion, MulticastGroup, RouteMessageBuilder};
use sluice_dataplane::net::Family;
use sluice_dataplane::packet_path::{ETHERNET, Way, Ways, now_ms};
use tokio::net::UnixDatagram;
use tokio::sync::Notify;

use super::{LINK, TABLE_ALL, TABLE_SERVICES};

/// How long an answer holds, in milliseconds. The next packet then goes the kernel's way, which has the kernel see whether its
/// neighbour is still there.
const HOLDS_MS: u64 = 5_000;
/// The same where packets go the kernel's way.
const HOLDS_NO_WAY_MS: u64 = 500;
/// The same where that is so only until the kernel has found its neighbour: the packet that asked has it look.
const HOLDS_NO_NEIGHBOUR_MS: u64 = 20;
/// Answers that are remembered, so that changes of neighbours can be told to them.
const REMEMBERED: usize = 16_384;
/// `RT_TABLE_DEFAULT`, `RT_TABLE_MAIN`, `RT_TABLE_LOCAL`.
const KERNELS_TABLES: std::ops::RangeInclusive<u32> = 253..=255;
/// `ETH_P_IP`, `ETH_P_IPV6`.
const ETHER_TYPES: [[u8; 2]; 2] = [[0x08, 0x00], [0x86, 0xdd]];

/// A neighbour that an answer depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Neighbour {
    link: u32,
    address: IpAddr,
    mac: [u8; 6],
}

/// What of a link an answer needs.
#[derive(Clone, Copy, Debug)]
struct Ethernet {
    mac: [u8; 6],
    mtu: u32,
    is_pair: bool,
}

/// Answers until the kernel cannot be asked any more. `links_changed` is told when links come or go.
pub async fn answer(ways: Arc<Ways>, links_changed: Arc<Notify>) -> Result<()> {
    use MulticastGroup as Group;
    let groups = [
        [Group::Link, Group::Neigh],
        [Group::Ipv4Route, Group::Ipv6Route],
        [Group::Ipv4Rule, Group::Ipv6Rule],
        [Group::Ipv4Ifaddr, Group::Ipv6Ifaddr],
    ];
    let (connection, netlink, mut changes) =
        rtnetlink::new_multicast_connection(groups.as_flattened()).context("cannot follow the kernel's routes")?;
    let connection = tokio::spawn(connection);
    let questions = UnixDatagram::from_std(ways.questions()?)?;
    let mut finder =
        Finder { netlink, ways, links: HashMap::new(), has_own_rules: HashMap::new(), answered: HashMap::new() };
    let mut datagram = [0; 32];
    let ended = loop {
        tokio::select! {
            biased;
            change = changes.next() => match change {
                Some((message, _)) => finder.follow(&message.payload, &links_changed),
                None => break "the kernel's routes cannot be followed any more",
            },
            question = questions.recv(&mut datagram) => match Ways::question(&datagram[..question?]) {
                Some(address) => finder.find(address).await,
                None => break "a question is no address",
            },
        }
    };
    connection.abort();
    bail!(ended)
}

struct Finder {
    netlink: Handle,
    ways: Arc<Ways>,
    /// Links that were asked about; those without Ethernet have nothing.
    links: HashMap<u32, Option<Ethernet>>,
    /// Whether there are policy rules of others, which may go by more than the destination.
    has_own_rules: HashMap<Family, bool>,
    /// What answers that hold depend on.
    answered: HashMap<IpAddr, Neighbour>,
}

impl Finder {
    /// Answers a question.
    async fn find(&mut self, address: IpAddr) {
        let (way, holds_ms) = match self.way(address).await {
            Ok(Found::Way(way, neighbour)) => (Some((way, neighbour)), HOLDS_MS),
            Ok(Found::NoNeighbour) => (None, HOLDS_NO_NEIGHBOUR_MS),
            Ok(Found::Kernels) => (None, HOLDS_NO_WAY_MS),
            Err(error) => {
                tracing::debug!(%address, error = format!("{error:#}"), "packets go the kernel's way");
                (None, HOLDS_NO_WAY_MS)
            }
        };
        if self.answered.len() >= REMEMBERED {
            self.forget_all();
        }
        match &way {
            Some((_, neighbour)) => self.answered.insert(address, neighbour.clone()),
            None => self.answered.remove(&address),
        };
        self.ways.answer(address, way.as_ref().map(|(way, _)| way), now_ms() + holds_ms);
    }

    async fn way(&mut self, address: IpAddr) -> Result<Found> {
        if self.has_own_rules(Family::of(address)).await? {
            return Ok(Found::Kernels);
        }
        let Some(Next { link, hop, mtu }) = next(&self.route(address).await?, address) else {
            return Ok(Found::Kernels);
        };
        let Some(ethernet) = self.ethernet(link).await? else { return Ok(Found::Kernels) };
        let Some(mac) = self.neighbour(link, hop).await? else { return Ok(Found::NoNeighbour) };
        let mut header = [0; ETHERNET];
        header[..6].copy_from_slice(&mac);
        header[6..12].copy_from_slice(&ethernet.mac);
        header[12..].copy_from_slice(&ETHER_TYPES[usize::from(address.is_ipv6())]);
        let mtu = mtu.unwrap_or(u32::MAX).min(ethernet.mtu);
        Ok(Found::Way(Way { link, mtu, header, is_pair: ethernet.is_pair }, Neighbour { link, address: hop, mac }))
    }

    /// The route that the kernel takes.
    async fn route(&self, to: IpAddr) -> Result<RouteMessage> {
        let prefix = if to.is_ipv4() { 32 } else { 128 };
        let question = RouteMessageBuilder::<IpAddr>::new().destination_prefix(to, prefix)?.build();
        self.netlink.route().get(question).execute().try_next().await?.context("no route")
    }

    async fn ethernet(&mut self, link: u32) -> Result<Option<Ethernet>> {
        if let Some(known) = self.links.get(&link) {
            return Ok(*known);
        }
        let message = self.netlink.link().get().match_index(link).execute().try_next().await?.context("no link")?;
        let ethernet = ethernet(&message);
        self.links.insert(link, ethernet);
        Ok(ethernet)
    }

    /// The hardware address of a neighbour that may be used without asking for it first.
    async fn neighbour(&mut self, link: u32, address: IpAddr) -> Result<Option<[u8; 6]>> {
        let mut question = NeighbourMessage::default();
        question.header.ifindex = link;
        let (family, destination) = match address {
            IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
        };
        question.header.family = family;
        question.attributes.push(NeighbourAttribute::Destination(destination));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(question));
        request.header.flags = NLM_F_REQUEST;
        let answer = self.netlink.request(request)?.next().await.context("no answer")?;
        Ok(match answer.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => mac(&message),
            _ => None,
        })
    }

    async fn has_own_rules(&mut self, family: Family) -> Result<bool> {
        if let Some(known) = self.has_own_rules.get(&family) {
            return Ok(*known);
        }
        let version = match family {
            Family::V4 => IpVersion::V4,
            Family::V6 => IpVersion::V6,
        };
        let rules: Vec<RuleMessage> = self.netlink.rule().get(version).execute().try_collect().await?;
        let has = rules.iter().any(|rule| !is_known(rule));
        self.has_own_rules.insert(family, has);
        Ok(has)
    }

    /// Takes back what a change makes wrong, or may.
    fn follow(&mut self, change: &NetlinkPayload<RouteNetlinkMessage>, links_changed: &Notify) {
        use RouteNetlinkMessage as Message;
        match change {
            NetlinkPayload::InnerMessage(Message::NewNeighbour(message)) => {
                self.follow_neighbour(message, mac(message))
            }
            NetlinkPayload::InnerMessage(Message::DelNeighbour(message)) => self.follow_neighbour(message, None),
            NetlinkPayload::InnerMessage(Message::NewLink(_) | Message::DelLink(_)) => {
                links_changed.notify_one();
                self.forget_all();
            }
            // Of anything else, and when there was too much to be told of.
            _ => {
                self.forget_all();
                links_changed.notify_one();
            }
        }
    }

    fn follow_neighbour(&mut self, message: &NeighbourMessage, mac: Option<[u8; 6]>) {
        let link = message.header.ifindex;
        let Some(address) = message.attributes.iter().find_map(destination) else { return };
        let ways = &self.ways;
        self.answered.retain(|to, neighbour| {
            let is_right = (neighbour.link, neighbour.address) != (link, address) || mac == Some(neighbour.mac);
            if !is_right {
                ways.forget(*to);
            }
            is_right
        });
    }

    fn forget_all(&mut self) {
        self.ways.forget_all();
        self.links.clear();
        self.has_own_rules.clear();
        self.answered.clear();
    }
}

/// What was found of an address.
enum Found {
    Way(Way, Neighbour),
    /// Its neighbour's hardware address is not known yet.
    NoNeighbour,
    /// Packets go the kernel's way.
    Kernels,
}

/// Where a route leads.
struct Next {
    link: u32,
    hop: IpAddr,
    mtu: Option<u32>,
}

/// Where packets to this address go on a link; nothing when they are for this host, or go nowhere, or into a tunnel.
fn next(route: &RouteMessage, to: IpAddr) -> Option<Next> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut link, mut hop, mut mtu) = (None, to, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => hop = (*address).into(),
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) => hop = (*address).into(),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::Via(_) | RouteAttribute::Encap(_) | RouteAttribute::MultiPath(_) => return None,
            _ => {}
        }
    }
    Some(Next { link: link?, hop, mtu })
}

/// What an answer needs of a link, where it is Ethernet and not ours.
fn ethernet(link: &LinkMessage) -> Option<Ethernet> {
    let (mut mac, mut mtu, mut is_veth, mut leads_elsewhere) = (None, None, false, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) if name == LINK => return None,
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(&bytes[..]).ok(),
            LinkAttribute::Mtu(bytes) => mtu = Some(*bytes),
            LinkAttribute::LinkInfo(info) => is_veth = info.contains(&LinkInfo::Kind(InfoKind::Veth)),
            LinkAttribute::LinkNetNsId(_) => leads_elsewhere = true,
            _ => {}
        }
    }
    let is_pair = is_veth && leads_elsewhere;
    let is_ethernet = link.header.link_layer_type == LinkLayerType::Ether && link.header.flags.contains(LinkFlags::Up);
    is_ethernet.then_some(Ethernet { mac: mac?, mtu: mtu?, is_pair })
}

/// The hardware address of a neighbour that is there, for all that the kernel knows.
fn mac(message: &NeighbourMessage) -> Option<[u8; 6]> {
    use NeighbourState as State;
    let is_there = matches!(
        message.header.state,
        State::Reachable | State::Stale | State::Delay | State::Probe | State::Permanent
    );
    let mut attributes = message.attributes.iter().filter(|_| is_there);
    attributes.find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes[..].try_into().ok(),
        _ => None,
    })
}

fn destination(attribute: &NeighbourAttribute) -> Option<IpAddr> {
    match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some((*address).into()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some((*address).into()),
        _ => None,
    }
}

/// Whether a policy rule is ours, or leads to a table of the kernel's own.
fn is_known(rule: &RuleMessage) -> bool {
    let table = |attribute: &RuleAttribute| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    };
    let table = rule.attributes.iter().find_map(table).unwrap_or(u32::from(rule.header.table));
    table == TABLE_ALL || table == TABLE_SERVICES || KERNELS_TABLES.contains(&table)
}
