//! `sluice cleanup`: removes what a daemon left on the host.

use std::process::ExitCode;

use anyhow::Result;

use super::print;
use crate::host::Host;
use crate::host::lock::lock_namespace;

/// Arguments of `sluice cleanup`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Removes links, routes, rules and tables of ours, and says which.
pub fn run(Args {}: Args) -> Result<ExitCode> {
    let _lock = lock_namespace()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let removed = runtime.block_on(async {
        let mut host = Host::new()?;
        let mut removed = host.clean_up().await?;
        removed.extend(host.remove_link().await?);
        anyhow::Ok(removed)
    })?;
    if removed.is_empty() {
        print("nothing of ours is here\n")?;
    }
    for what in removed {
        print(&format!("removed {what}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}
