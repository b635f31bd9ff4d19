//! The host's part of the packet path: what brings packets to the TUN link, and how it is taken away again.
//!
//! All of it carries our name or our numbers. It is set up idempotently, put right when somebody else changed it, and
//! removed by [`Host::clean_up`]. Order of set-up: link, nftables, routes, then the rules that send packets our way.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;

use anyhow::Context as _;
use tokio::task::JoinHandle;

use crate::config::PortRange;
use conntrack::Direction;
use hand_over::{HandOver, Ours};
use ingress::Ingress;
use link::Other;
pub use plan::Plan;
use sluice_dataplane::flow::FlowView;
use sluice_dataplane::offload::{self, Offload};
use sluice_dataplane::packet_path::Tun;

mod conntrack;
mod hand_over;
mod ingress;
pub mod link;
pub mod lock;
pub mod nft;
pub mod plan;
pub mod route;
pub mod rule;
pub mod sysctl;
pub mod ways;

/// Name of the TUN link.
pub const LINK: &str = "sluice0";
/// Routing table in which everything goes to the TUN link.
pub const TABLE_ALL: u32 = 5391;
/// Routing table of Service addresses; skipped for what comes from the TUN link.
pub const TABLE_SERVICES: u32 = 5392;
/// Mark of packets that belong to the packet path, under [`MARK_MASK`].
pub const MARK: u32 = 0x51ce_0000;
/// Mark of packets from our link that connection tracking leaves alone, since the kernel carries their connection.
pub const MARK_UNTRACKED: u32 = 0x51cf_0000;
/// The half of a mark that is ours.
pub const MARK_MASK: u32 = 0xffff_0000;

/// What the environment lacks. Ends the command with exit code 3.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Lacking(pub String);

/// A connection to the kernel of the network namespace that it was opened in.
pub struct Host {
    netlink: rtnetlink::Handle,
    connection: JoinHandle<()>,
    plan: Plan,
    /// Our nftables table as we left it.
    table: Option<nft::Table>,
    /// What we changed of the kernel's settings, should the table be taken away that notes it.
    noted: nft::Noted,
    hand_over: HandOver,
    ingress: Ingress,
    /// What has the kernel carry connections.
    offload: Option<Arc<Offload>>,
    /// What a service proxy before us has begun was looked for.
    has_looked: bool,
}

impl Host {
    /// Opens the connection. Changes nothing.
    pub fn new() -> anyhow::Result<Self> {
        let (connection, netlink, _) = rtnetlink::new_connection()?;
        Ok(Self {
            netlink,
            connection: tokio::spawn(connection),
            plan: Plan::default(),
            table: None,
            noted: nft::Noted::default(),
            hand_over: HandOver::default(),
            ingress: Ingress::default(),
            offload: None,
            has_looked: false,
        })
    }

    /// The plan in force.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Addresses of the host, loopback and link-local ones left out.
    pub async fn addresses(&self) -> anyhow::Result<Vec<IpAddr>> {
        link::addresses(&self.netlink).await
    }

    /// Opens the link, which goes with its last queue: the one that is there already, unless it is of another kind.
    ///
    /// # Errors
    /// What is [`Lacking`], mostly.
    pub async fn open_link(&self, queues: usize) -> anyhow::Result<Tun> {
        let tun = match Tun::open(LINK, queues) {
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                self.remove_link().await?;
                Tun::open(LINK, queues)
            }
            result => result,
        };
        tun.map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied => {
                anyhow::Error::new(Lacking(format!("cannot make the link {LINK}: needs CAP_NET_ADMIN: {error}")))
            }
            ErrorKind::NotFound => anyhow::Error::new(Lacking(format!("no TUN device: {error}"))),
            ErrorKind::ResourceBusy => {
                anyhow::Error::new(Lacking(format!("the link {LINK} belongs to another program: {error}")))
            }
            _ => anyhow::Error::new(error).context(format!("cannot make the link {LINK}")),
        })
    }

    /// Has the program that carries connections attached to the links, from the next [`Self::apply`] on.
    pub fn carry_with(&mut self, offload: Arc<Offload>) {
        self.offload = Some(offload);
    }

    /// Brings the link up with addresses where names are answered. [`Self::apply`] does that too, and the rest.
    pub async fn set_up_names(&self, addresses: &BTreeSet<IpAddr>) -> anyhow::Result<()> {
        link::set_up(&self.netlink).await?;
        link::set_addresses(&self.netlink, addresses).await.map(drop)
    }

    /// Brings the host to this plan, whatever it is at now. Returns what had to be changed: empty when all was right.
    pub async fn apply(&mut self, plan: Plan) -> anyhow::Result<Vec<String>> {
        let mut changes = link::set_up(&self.netlink).await?;
        changes.extend(link::set_addresses(&self.netlink, &plan.names).await?);
        let found = nft::read()?;
        let hand_over = HandOver { carried: self.find_carried(&plan), ..self.hand_over.clone() };
        let has_ended = self.has_looked && hand_over.carried != self.hand_over.carried;
        if found.is_none() && !hand_over.carried.is_empty() {
            // The other proxy's rewriting comes before routing: nothing goes our way until the table says so, at once for all.
            changes.extend(route::apply(&self.netlink, &plan).await?);
            changes.extend(rule::apply(&self.netlink, &plan).await?);
        }
        let (reserved, early_demux) = (sysctl::reserved_ports(), sysctl::early_demux());
        let short_timeouts = sysctl::short_timeouts();
        let wanted: BTreeSet<u16> = plan.masquerade_ports.into_iter().flat_map(PortRange::range).collect();
        let missing: BTreeSet<u16> = wanted.difference(&reserved).copied().collect();
        let is_noted = missing.is_empty() && !early_demux && short_timeouts.is_empty();
        if self.plan != plan || found.is_none() || self.table != found || !is_noted || has_ended {
            // What we change is noted in our nftables table first: only so can it be told from what others changed.
            self.noted.add(found.as_ref().map(nft::Table::noted).unwrap_or_default());
            self.noted.add(nft::Noted { reserved: missing.clone(), early_demux, timeouts: short_timeouts.clone() });
            self.table = nft::apply(&plan, &self.noted, &hand_over)?;
            // That connections end is no repair.
            if self.table != found && !has_ended {
                changes.push("nftables table".to_owned());
            }
        }
        if !missing.is_empty() {
            sysctl::set_reserved_ports(&reserved.union(&missing).copied().collect())?;
            changes.push("reserved ports".to_owned());
        }
        if early_demux {
            sysctl::set_early_demux(false)?;
            changes.push("TCP early demux".to_owned());
        }
        if !short_timeouts.is_empty() {
            sysctl::lengthen_timeouts()?;
            changes.push("timeouts of connection tracking".to_owned());
        }
        changes.extend(route::apply(&self.netlink, &plan).await?);
        changes.extend(rule::apply(&self.netlink, &plan).await?);
        self.plan = plan;
        let is_first = !self.has_looked;
        (self.hand_over, self.has_looked) = (hand_over, true);
        if self.take_at_links(self.plan.at_links || is_first).await? {
            changes.push("nftables table of links".to_owned());
        }
        Ok(changes)
    }

    /// Takes packets at the links that there are now.
    pub async fn follow_links(&mut self) -> anyhow::Result<()> {
        self.take_at_links(false).await.map(drop)
    }

    /// `looks`: whether others have changed it, which is returned. While another proxy's connections live, or ours are told one by
    /// one, it is connection tracking that knows whose a packet is: none is taken.
    async fn take_at_links(&mut self, looks: bool) -> anyhow::Result<bool> {
        let may_take = self.plan.at_links && self.hand_over == HandOver::default();
        let mut links = Vec::new();
        loop {
            let before = std::mem::take(&mut links);
            if self.plan.at_links || looks {
                links = link::others(&self.netlink).await?;
            }
            let names: Vec<String> = links.iter().filter(|_| may_take).map(|link| link.name.clone()).collect();
            let table = self.ingress.apply(&self.plan, &names, looks);
            let result = table.and_then(|is_changed| Ok(self.carry_at(&links, looks)? || is_changed));
            // A link may be gone that was there a moment ago.
            if result.is_ok() || links == before {
                return result;
            }
        }
    }

    /// Attaches what carries connections to these links; `looks`: takes away what an earlier process left, where nothing does.
    /// Returns whether others had changed it.
    fn carry_at(&self, links: &[Other], looks: bool) -> anyhow::Result<bool> {
        let ethernet = links.iter().filter(|link| link.is_ethernet).map(|link| link.index);
        let Some(offload) = &self.offload else {
            if looks {
                let ours = nix::net::if_::if_nametoindex(LINK);
                ethernet.chain(ours).try_for_each(|link| offload::clear(link).map(drop))?;
            }
            return Ok(false);
        };
        offload.follow(&ethernet.collect()).context("packetPath: offload: a program cannot be attached to a link")
    }

    /// Leaves new connections to another service proxy: only these flows are ours from now on.
    pub async fn retire(&mut self, flows: impl Iterator<Item = FlowView>) -> anyhow::Result<()> {
        let mut ours = Ours::default();
        for FlowView { protocol, client, frontend, endpoint, masquerade, .. } in flows {
            ours.clients.insert(Direction { protocol, from: client, to: frontend });
            ours.masqueraded.extend(masquerade.map(|from| Direction { protocol, from, to: endpoint }));
        }
        if self.hand_over.ours.as_ref() != Some(&ours) {
            self.hand_over.ours = Some(ours);
            self.take_at_links(false).await?;
            self.table = nft::apply(&self.plan, &self.noted, &self.hand_over)?;
        }
        Ok(())
    }

    /// The connections of a service proxy before us that still live: connection tracking goes on carrying them.
    fn find_carried(&self, plan: &Plan) -> BTreeSet<Direction> {
        if self.has_looked && self.hand_over.carried.is_empty() {
            return BTreeSet::new();
        }
        let found = conntrack::carried(|direction| plan.takes(direction.protocol, direction.to));
        let found = found.unwrap_or_else(|error| {
            tracing::warn!(
                error = format!("{error:#}"),
                "connections of a service proxy before us cannot be looked for"
            );
            BTreeSet::new()
        });
        if !self.has_looked && !found.is_empty() {
            tracing::info!(
                connections = found.len() / 2,
                "another service proxy's connections stay with connection tracking"
            );
        }
        found
    }

    /// Puts right what somebody else changed. Returns what that was.
    pub async fn repair(&mut self) -> anyhow::Result<Vec<String>> {
        self.apply(self.plan.clone()).await
    }

    /// Removes everything of ours, the link excepted, which goes with its last queue. Returns what was there.
    pub async fn clean_up(&mut self) -> anyhow::Result<Vec<String>> {
        let mut removed = rule::remove(&self.netlink).await?;
        removed.extend(link::set_addresses(&self.netlink, &BTreeSet::new()).await?);
        removed.extend(route::remove(&self.netlink).await?);
        if self.ingress.remove()? {
            removed.push("nftables table of links".to_owned());
        }
        if self.stop_carrying().await? {
            removed.push("programs at links".to_owned());
        }
        let found = nft::read()?;
        let mut ours = std::mem::take(&mut self.noted);
        ours.add(found.as_ref().map(nft::Table::noted).unwrap_or_default());
        if !ours.reserved.is_empty() {
            let left = sysctl::reserved_ports().difference(&ours.reserved).copied().collect();
            sysctl::set_reserved_ports(&left)?;
        }
        if ours.early_demux {
            sysctl::set_early_demux(true)?;
        }
        sysctl::restore_timeouts(&ours.timeouts)?;
        if found.is_some() {
            nft::remove()?;
            removed.push("nftables table".to_owned());
        }
        (self.plan, self.table) = Default::default();
        Ok(removed)
    }

    async fn stop_carrying(&mut self) -> anyhow::Result<bool> {
        let ours = self.offload.take().is_some_and(|offload| offload.detach());
        let mut was_there = ours;
        for link in link::others(&self.netlink).await? {
            was_there |= offload::clear(link.index).with_context(|| format!("programs at the link {}", link.name))?;
        }
        Ok(was_there)
    }

    /// Removes the link, when it is there.
    pub async fn remove_link(&self) -> anyhow::Result<Vec<String>> {
        link::remove(&self.netlink, LINK).await
    }

    /// Whether a link of this name is there.
    pub async fn has_link(&self, name: &str) -> anyhow::Result<bool> {
        Ok(link::index_of(&self.netlink, name).await?.is_some())
    }

    /// Removes a link that is not ours.
    pub async fn remove_link_named(&self, name: &str) -> anyhow::Result<()> {
        link::remove(&self.netlink, name).await.map(drop)
    }
}

/// A program of the system's: those live where a user's path does not always lead.
pub(crate) fn tool(program: &str) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

impl Drop for Host {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
