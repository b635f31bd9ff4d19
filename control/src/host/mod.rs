//! The host's part of the packet path: what brings packets to the TUN link, and how it is taken away again.
//!
//! All of it carries our name or our numbers. It is set up idempotently, put right when somebody else changed it, and
//! removed by [`clean_up`]. Order of set-up: link, nftables, routes, then the rules that send packets our way.

use std::collections::BTreeSet;
use std::net::IpAddr;

use tokio::task::JoinHandle;

use crate::config::PortRange;
pub use plan::Plan;

pub mod link;
pub mod lock;
pub mod nft;
pub mod plan;
pub mod route;
pub mod rule;
pub mod sysctl;

/// Name of the TUN link.
pub const LINK: &str = "sluice0";
/// Routing table in which everything goes to the TUN link.
pub const TABLE_ALL: u32 = 5391;
/// Routing table of Service addresses; skipped for what comes from the TUN link.
pub const TABLE_SERVICES: u32 = 5392;
/// Mark of packets that belong to the packet path, under [`MARK_MASK`].
pub const MARK: u32 = 0x51ce_0000;
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
}

impl Host {
    /// Opens the connection. Changes nothing.
    pub fn new() -> anyhow::Result<Self> {
        let (connection, netlink, _) = rtnetlink::new_connection()?;
        Ok(Self { netlink, connection: tokio::spawn(connection), plan: Plan::default() })
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

    /// Brings the host to this plan, whatever it is at now. Returns what had to be changed: empty when all was right.
    pub async fn apply(&mut self, plan: Plan) -> anyhow::Result<Vec<String>> {
        let mut changes = link::set_up(&self.netlink).await?;
        changes.extend(link::set_addresses(&self.netlink, &plan.names).await?);
        let noted = nft::noted()?;
        let (reserved, early_demux) = (sysctl::reserved_ports(), sysctl::early_demux());
        let wanted: BTreeSet<u16> = plan.masquerade_ports.into_iter().flat_map(PortRange::range).collect();
        let missing: BTreeSet<u16> = wanted.difference(&reserved).copied().collect();
        if self.plan != plan || noted.is_none() || !missing.is_empty() || early_demux {
            // What we change is noted in our nftables table first: only so can it be told from what others changed.
            let mut noted = noted.unwrap_or_default();
            noted.reserved.extend(&missing);
            noted.early_demux |= early_demux;
            if nft::apply(&plan, &noted)? {
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
        changes.extend(route::apply(&self.netlink, &plan).await?);
        changes.extend(rule::apply(&self.netlink, &plan).await?);
        self.plan = plan;
        Ok(changes)
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
        if let Some(ours) = nft::noted()? {
            let left = sysctl::reserved_ports().difference(&ours.reserved).copied().collect();
            sysctl::set_reserved_ports(&left)?;
            if ours.early_demux {
                sysctl::set_early_demux(true)?;
            }
            nft::remove()?;
            removed.push("nftables table".to_owned());
        }
        self.plan = Plan::default();
        Ok(removed)
    }

    /// Removes the link, when it is there.
    pub async fn remove_link(&self) -> anyhow::Result<Vec<String>> {
        link::remove(&self.netlink).await
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
