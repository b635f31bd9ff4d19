//! `sluice drain` and `sluice undrain`: an operator takes an endpoint out, and sees its connections end.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{WRONG, get, print};
use crate::admin::drain::{Drained, Request};
use crate::admin::views::{EndpointView, List};
use crate::config::parse_duration;
use crate::drains::Target;

/// Pause between two looks of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// Arguments of `sluice drain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "With --watch the exit code is 0 when every flow ended by itself, 1 when some were cut.")]
pub struct Args {
    /// Endpoint: an address, or one port of it
    #[arg(value_name = "IP[:PORT]")]
    target: Target,
    /// Cut what is left after this time, such as 30s; `never`: wait for ever [default: drain.timeout of the daemon]
    #[arg(long, value_name = "DURATION")]
    timeout: Option<String>,
    /// Show how many flows are left until there is none
    #[arg(short, long)]
    watch: bool,
    /// Admin address of the daemon
    #[arg(long, default_value = "127.0.0.1:10249", value_name = "ADDR:PORT")]
    admin: SocketAddr,
}

/// Arguments of `sluice undrain`.
#[derive(Debug, clap::Args)]
pub struct UndrainArgs {
    /// Endpoint, as it was drained
    #[arg(value_name = "IP[:PORT]")]
    target: Target,
    /// Admin address of the daemon
    #[arg(long, default_value = "127.0.0.1:10249", value_name = "ADDR:PORT")]
    admin: SocketAddr,
}

/// Drains an endpoint.
pub fn drain(args: Args) -> Result<ExitCode> {
    let timeout_ms = match args.timeout.as_deref() {
        None => None,
        Some("never") => Some(None),
        Some(text) => match parse_duration(text) {
            Ok(timeout) => Some(Some(timeout.as_millis() as u64)),
            Err(reason) => {
                eprintln!("sluice: --timeout: {reason}, or never");
                return Ok(ExitCode::from(super::USAGE));
            }
        },
    };
    let drained = send(args.admin, "drain", &Request { target: args.target, timeout_ms })?;
    if drained.endpoints == 0 {
        print(&format!("{}: no such endpoint now; it will be drained when there is one\n", args.target))?;
        return Ok(ExitCode::from(WRONG));
    }
    print(&format!(
        "{}: {} endpoints get no new flows; {} flows are left\n",
        args.target, drained.endpoints, drained.flows
    ))?;
    if args.watch { watch(args.admin, args.target, drained.flows) } else { Ok(ExitCode::SUCCESS) }
}

/// Ends a drain.
pub fn undrain(args: UndrainArgs) -> Result<ExitCode> {
    let drained = send(args.admin, "undrain", &Request { target: args.target, timeout_ms: None })?;
    if !drained.known {
        print(&format!("{}: was not drained\n", args.target))?;
        return Ok(ExitCode::from(WRONG));
    }
    print(&format!("{}: {} endpoints get new flows again\n", args.target, drained.endpoints))?;
    Ok(ExitCode::SUCCESS)
}

/// Counts down. Flows that are there at one look and, with the deadline past, not at the next, were cut.
/// `before` are those that the drain began with: a short one may be over at the first look.
fn watch(admin: SocketAddr, target: Target, mut before: u64) -> Result<ExitCode> {
    let mut shown = None;
    loop {
        let text = get::ask(admin, "/api/v1/endpoints")?;
        let list: List<EndpointView> = serde_json::from_str(&text).context("the daemon's answer is not understood")?;
        let meant: Vec<&EndpointView> = list.items.iter().filter(|view| target.covers(view.address)).collect();
        let left: u64 = meant.iter().map(|view| view.active).sum();
        let is_gone = meant.iter().any(|view| view.state == "gone");
        if shown.replace(left) != Some(left) {
            let deadline = meant.iter().filter_map(|view| view.deadline_seconds).max();
            let deadline = deadline.map_or(String::new(), |seconds| format!(", cut in {seconds}s"));
            print(&format!("{target}: {left} flows are left{deadline}\n"))?;
        }
        if left == 0 {
            let was_cut = is_gone && before > 0;
            print(&format!(
                "{target}: {}\n",
                if was_cut { "the last flows were cut at the deadline" } else { "drained" }
            ))?;
            return Ok(if was_cut { ExitCode::from(WRONG) } else { ExitCode::SUCCESS });
        }
        before = left;
        std::thread::sleep(WATCH_INTERVAL);
    }
}

fn send(admin: SocketAddr, path: &str, request: &Request) -> Result<Drained> {
    let text = get::post(admin, &format!("/api/v1/{path}"), request)?;
    serde_json::from_str(&text).context("the daemon's answer is not understood")
}
