//! The `sluice` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    sluice_control::cli::run().unwrap_or_else(|error| {
        eprintln!("sluice: {error:#}");
        ExitCode::from(3)
    })
}
