//! `sluice cleanup`: removes what a daemon, or kube-proxy, left on the host.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context as _, Result};

use super::{LACKING, WRONG, get, print};
use crate::host::Host;
use crate::host::lock::lock_namespace;
use crate::kube_proxy::leftovers::Leftovers;

/// Arguments of `sluice cleanup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Remove what kube-proxy left instead: nftables tables, iptables chains, ipsets, kube-ipvs0. A daemon of ours must
    /// serve already
    #[arg(long)]
    kube_proxy: bool,
    /// With --kube-proxy: say what would be removed, and remove nothing
    #[arg(long, requires = "kube_proxy")]
    dry_run: bool,
    /// With --kube-proxy: even where no daemon of ours serves
    #[arg(long, requires = "kube_proxy")]
    force: bool,
    /// Admin address of the daemon that is asked whether it serves
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:10249")]
    admin: SocketAddr,
}

/// Removes links, routes, rules and tables, and says which.
pub fn run(args: Args) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { if args.kube_proxy { kube_proxys(&args).await } else { ours().await } })
}

async fn ours() -> Result<ExitCode> {
    let _lock = lock_namespace()?;
    let mut host = Host::new()?;
    let mut removed = host.clean_up().await?;
    removed.extend(host.remove_link().await?);
    say("removed", &removed, "nothing of ours is here")?;
    Ok(ExitCode::SUCCESS)
}

async fn kube_proxys(args: &Args) -> Result<ExitCode> {
    let host = Host::new()?;
    let leftovers = Leftovers::find(&host).await?;
    let what = leftovers.describe();
    let nothing = "nothing of kube-proxy's is here";
    if args.dry_run {
        say("would remove", &what, nothing)?;
    } else {
        let admin = args.admin;
        if !args.force
            && !what.is_empty()
            && let Err(error) = tokio::task::spawn_blocking(move || get::ask(admin, "/api/v1/problems")).await?
        {
            eprintln!(
                "sluice: no daemon serves here yet ({error:#}): without one, Services would stop. Start it, wait for its \
                 first sync, or say --force"
            );
            return Ok(ExitCode::from(LACKING));
        }
        leftovers.remove(&host).await.context("not all of kube-proxy's rules could be removed")?;
        say("removed", &what, nothing)?;
    }
    for left in &leftovers.left {
        print(&format!("left {left}\n"))?;
    }
    Ok(ExitCode::from(if leftovers.left.is_empty() { 0 } else { WRONG }))
}

fn say(verb: &str, what: &[String], nothing: &str) -> Result<()> {
    if what.is_empty() {
        return print(&format!("{nothing}\n"));
    }
    what.iter().try_for_each(|what| print(&format!("{verb} {what}\n")))
}
