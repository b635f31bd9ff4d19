//! `sluice status`: whether a running daemon is well, a line a subsystem.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use super::{WRONG, get, print};
use crate::admin::status::Status;

/// Arguments of `sluice status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit codes: 0 all is well, 1 a subsystem is degraded, 3 no daemon answers.")]
pub struct Args {
    /// Form of the answer [default: a line a subsystem]
    #[arg(short, long, value_enum)]
    output: Option<Output>,
    /// Admin address of the daemon
    #[arg(long, default_value = "127.0.0.1:10249", value_name = "ADDR:PORT")]
    admin: SocketAddr,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Json,
}

/// Asks, and prints the answer.
pub fn run(args: Args) -> Result<ExitCode> {
    let text = get::ask(args.admin, "/api/v1/status")?;
    let status: Status = serde_json::from_str(&text).context("the daemon's answer is not understood")?;
    match args.output {
        Some(Output::Json) => print(&(serde_json::to_string_pretty(&status)? + "\n"))?,
        None => {
            for subsystem in &status.subsystems {
                let word = if subsystem.degraded { "degraded" } else { "ok" };
                print(&format!("{:<9}{word:<10}{}\n", subsystem.name, subsystem.message))?;
            }
        }
    }
    Ok(ExitCode::from(if status.degraded { WRONG } else { 0 }))
}
