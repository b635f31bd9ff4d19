//! The `sluice` command: a file a subcommand.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod check;
pub mod offline;
mod report;

/// A userspace data plane for Kubernetes Services.
#[derive(Debug, Parser)]
#[command(name = "sluice", version)]
struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Check(check::Args),
}

/// Runs the command line.
pub fn run() -> anyhow::Result<ExitCode> {
    match Command::parse().action {
        Action::Check(args) => check::run(args),
    }
}
