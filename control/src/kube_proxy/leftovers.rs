//! What kube-proxy leaves on a host when it ends, and its removal: nftables tables, iptables chains, ipsets, `kube-ipvs0`.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::chains::{self, Removal};
use crate::host::{Host, nft, tool};

const TABLE: &str = "kube-proxy";
const LINK: &str = "kube-ipvs0";
const IPVS: &str = "/proc/net/ip_vs";

/// Everything of kube-proxy's that was found.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Families of nftables tables.
    tables: Vec<&'static str>,
    /// Chains, by the tool that restores them.
    chains: BTreeMap<String, Removal>,
    sets: Vec<String>,
    link: bool,
    /// What cannot be removed here, and why.
    pub left: Vec<String>,
}

impl Leftovers {
    /// Looks for them. Changes nothing.
    pub async fn find(host: &Host) -> Result<Self> {
        let mut found = Self::default();
        for family in ["ip", "ip6"] {
            found.tables.extend(nft::has_table(family, TABLE)?.then_some(family));
        }
        for tool in ["iptables", "ip6tables"] {
            found.find_chains(tool)?;
        }
        match output(Command::new("ipset").args(["list", "-name"]))? {
            Some(names) => {
                found.sets.extend(names.lines().filter(|name| chains::is_kube_proxys_set(name)).map(str::to_owned));
            }
            None => {
                if host.has_link(LINK).await? {
                    found.left.push("ipsets: ipset is not installed".to_owned());
                }
            }
        }
        found.link = host.has_link(LINK).await?;
        // Three lines of heading.
        if std::fs::read_to_string(IPVS).is_ok_and(|text| text.lines().count() > 3) {
            found.left.push(
                "IPVS virtual servers: not told from those of others: if there are none, `ipvsadm -C`".to_owned(),
            );
        }
        Ok(found)
    }

    fn find_chains(&mut self, tool: &str) -> Result<()> {
        let mut is_there = false;
        for variant in ["-nft", "-legacy"] {
            is_there |= self.find_chains_of(&format!("{tool}{variant}"))?;
        }
        // Where there is but one kind, it has no suffix everywhere.
        is_there = is_there || self.find_chains_of(tool)?;
        let legacy = format!("/proc/net/{}_names", tool.replace("tables", "_tables"));
        let may_have = std::fs::read_to_string(legacy).is_ok_and(|names| !names.trim().is_empty())
            || nft::has_table(if tool == "iptables" { "ip" } else { "ip6" }, "nat")?;
        if !is_there && may_have {
            self.left.push(format!("chains of {tool}, if there are any: {tool} is not installed"));
        }
        Ok(())
    }

    /// Whether the tool is there.
    fn find_chains_of(&mut self, tool: &str) -> Result<bool> {
        let Some(saved) = output(&mut Command::new(format!("{tool}-save")))? else { return Ok(false) };
        let removal = chains::removal(&saved);
        for chain in &removal.in_use {
            self.left.push(format!("chain {chain} of {tool}: rules of others use it"));
        }
        if !removal.script.is_empty() {
            self.chains.insert(format!("{tool}-restore"), removal);
        }
        Ok(true)
    }

    /// What would be removed, a line each.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        let mut lines: Vec<String> =
            self.tables.iter().map(|family| format!("nftables table {family} {TABLE}")).collect();
        for (restore, removal) in &self.chains {
            let tool = restore.trim_end_matches("-restore");
            lines
                .extend(removal.chains.iter().map(|(table, count)| format!("{count} chains of {tool}, table {table}")));
        }
        lines.extend(self.sets.iter().map(|set| format!("ipset {set}")));
        lines.extend(self.link.then(|| format!("link {LINK}")));
        lines
    }

    /// Removes them.
    pub async fn remove(&self, host: &Host) -> Result<()> {
        for family in &self.tables {
            nft::delete_table(family, TABLE)?;
        }
        for (restore, removal) in &self.chains {
            let mut child = tool(restore)
                .args(["--noflush", "--wait", "5"])
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("cannot run {restore}"))?;
            let mut input = child.stdin.take().context("it has no input")?;
            input.write_all(removal.script.as_bytes()).with_context(|| format!("cannot write to {restore}"))?;
            drop(input);
            let output = child.wait_with_output()?;
            if !output.status.success() {
                bail!("{restore}: {}", String::from_utf8_lossy(&output.stderr).trim());
            }
        }
        for set in &self.sets {
            output(Command::new("ipset").args(["destroy", set]))?;
        }
        if self.link {
            host.remove_link_named(LINK).await?;
        }
        Ok(())
    }
}

/// What a command prints; nothing when it is not installed.
fn output(command: &mut Command) -> Result<Option<String>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut command_in_path = tool(&name);
    match command_in_path.args(command.get_args()).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot run {name}")),
        Ok(output) if output.status.success() => Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned())),
        Ok(output) => bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim()),
    }
}
