//! The command line: one file a command, and what every command's failure means to a script.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

use crate::config::ConfigError;

pub mod offline;
pub mod trace;

/// What was asked about is wrong.
pub const WRONG: u8 = 1;
/// The command was used wrongly.
pub const USAGE: u8 = 2;

/// A userspace data plane for Kubernetes Services.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what happens to a new connection, and by which rule
    Trace(trace::Args),
}

/// Runs the command that the arguments name.
#[must_use]
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Trace(args) => trace::run(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("sluice: {error:#}");
        ExitCode::from(if error.downcast_ref::<ConfigError>().is_some() { USAGE } else { WRONG })
    })
}

/// Writes to standard output. That nobody reads any more (`sluice get flows | head`) is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write"),
        _ => Ok(()),
    }
}
