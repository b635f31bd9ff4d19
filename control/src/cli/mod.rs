//! The command line: one file a command, and what every command's failure means to a script.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::config::{Config, ConfigError};
use crate::host::Lacking;

pub mod check;
pub mod cleanup;
pub mod demo;
pub mod drain;
pub mod get;
pub mod offline;
mod report;
pub mod resolve;
pub mod retire;
pub mod run;
pub mod status;
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
    /// Say whether a running daemon is well, a line a subsystem; exit 1 when not
    Status(status::Args),
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
    /// Leave new connections to another service proxy; those that are here go on until they end
    Retire(retire::Args),
    /// Remove every link, route, rule and table of ours from this host
    Cleanup(cleanup::Args),
    /// Print the version
    Version,
    /// Print the manual page
    Man {
        /// Write this page and one for each command to a folder instead
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
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
        Command::Status(args) => status::run(args),
        Command::Get(args) => get::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Resolve(args) => resolve::run(args),
        Command::Drain(args) => drain::drain(args),
        Command::Undrain(args) => drain::undrain(args),
        Command::Retire(args) => retire::run(args),
        Command::Cleanup(args) => cleanup::run(args),
        Command::Version => print(concat!("sluice ", env!("CARGO_PKG_VERSION"), "\n")).map(|()| ExitCode::SUCCESS),
        Command::Man { dir } => man(dir.as_deref()).map(|()| ExitCode::SUCCESS),
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

fn man(dir: Option<&Path>) -> anyhow::Result<()> {
    if let Some(dir) = dir {
        std::fs::create_dir_all(dir)?;
        return clap_mangen::generate_to(Cli::command(), dir).with_context(|| dir.display().to_string());
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut page)?;
    print(&String::from_utf8_lossy(&page))
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

/// The configuration of a file, or the default one. Says on standard error what of kube-proxy's is ignored.
pub(crate) fn read_config(path: Option<&Path>) -> Result<Config, ConfigError> {
    let Some(path) = path else { return Ok(Config::default()) };
    let (config, wishes) = Config::read(path)?;
    if let Some(warning) = wishes.and_then(|wishes| wishes.warning) {
        eprintln!("sluice: {warning}");
    }
    Ok(config)
}

/// Writes to standard output. That nobody reads any more (`sluice get flows | head`) is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("cannot write"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_manual_page() {
        Cli::command().debug_assert();
        let dir = tempfile::tempdir().unwrap();
        man(Some(dir.path())).unwrap();
        let run = std::fs::read_to_string(dir.path().join("sluice-run.1")).unwrap();
        assert!(run.contains("kubeconfig") && !run.contains("iptables"), "kube-proxy's flags are hidden: {run}");
        assert!(dir.path().join("sluice.1").exists() && dir.path().join("sluice-cleanup.1").exists());
    }
}
