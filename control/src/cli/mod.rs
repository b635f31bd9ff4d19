//! The command line: one file a command, and what every command's failure means to a script.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::config::ConfigError;
use crate::host::Lacking;

pub mod check;
pub mod cleanup;
pub mod demo;
pub mod drain;
pub mod get;
pub mod offline;
mod report;
pub mod resolve;
pub mod run;
pub mod trace;

/// What was asked about is wrong.
pub const WRONG: u8 = 1;
/// The command was used wrongly.
pub const USAGE: u8 = 2;
/// The environment lacks something.
pub const LACKING: u8 = 3;

/// A userspace data plane for Kubernetes Services.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, max_term_width = 100, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str =
    "Exit codes: 0 ok, 1 the thing asked about is wrong, 2 usage, 3 the environment lacks something (and which).";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the Services of a cluster, or of a folder of manifests, on this node, until SIGTERM
    Run(run::Args),
    /// Play a private cluster on this machine, with real connections, a rolling update and a scale-up
    Demo(demo::Args),
    /// Validate manifests and say what would be routed
    Check(check::Args),
    /// Show what a running daemon serves
    Get(get::Args),
    /// Say what happens to a new connection, and by which rule
    Trace(trace::Args),
    /// Say what a name is answered with
    Resolve(resolve::Args),
    /// Give an endpoint no new flows and let those it has end
    Drain(drain::Args),
    /// Give a drained endpoint new flows again
    Undrain(drain::UndrainArgs),
    /// Remove every link, route, rule and table of ours from this host
    Cleanup(cleanup::Args),
    /// Print the version
    Version,
    /// Print shell completions
    Completions {
        /// Shell to complete for
        shell: clap_complete::Shell,
    },
}

/// Runs the command that the arguments name.
#[must_use]
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Check(args) => check::run(args),
        Command::Get(args) => get::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Resolve(args) => resolve::run(args),
        Command::Drain(args) => drain::drain(args),
        Command::Undrain(args) => drain::undrain(args),
        Command::Cleanup(args) => cleanup::run(args),
        Command::Version => print(concat!("sluice ", env!("CARGO_PKG_VERSION"), "\n")).map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "sluice", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("sluice: {error:#}");
        ExitCode::from(exit_code(&error))
    })
}

/// What a failure means: usage for a bad configuration, 3 where the environment is at fault.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<Lacking>().is_some() {
        LACKING
    } else if error.downcast_ref::<ConfigError>().is_some() {
        USAGE
    } else {
        WRONG
    }
}

/// Writes to standard output. That nobody reads any more (`sluice get flows | head`) is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write"),
        _ => Ok(()),
    }
}
