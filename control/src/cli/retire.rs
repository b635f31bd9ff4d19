//! `sluice retire`: leaves new connections to another service proxy.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{get, print};

/// Between two looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Arguments of `sluice retire`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Wait until no flow is left
    #[arg(short, long)]
    watch: bool,
    /// Admin address of the daemon
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:10249")]
    admin: SocketAddr,
}

/// Has the daemon do it, until it ends.
pub fn run(args: Args) -> Result<ExitCode> {
    let flows = get::post(args.admin, "/api/v1/retire", &Value::Null)?;
    let mut left: usize = flows.trim().parse().context("the daemon's answer is not understood")?;
    print(&format!("new connections are left to another service proxy; {left} flows are ours until they end\n"))?;
    while args.watch && left > 0 {
        std::thread::sleep(WATCH_INTERVAL);
        let list: Value = serde_json::from_str(&get::ask(args.admin, "/api/v1/flows")?)?;
        let now = list["items"].as_array().map_or(0, Vec::len);
        if now != left {
            print(&format!("{now} flows are left\n"))?;
        }
        left = now;
    }
    Ok(ExitCode::SUCCESS)
}
