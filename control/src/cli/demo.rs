//! `sluice demo`: the whole of it on one machine.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use super::WRONG;
use crate::demo::{self, Interrupted};

/// As shells count a program that SIGINT ended.
const INTERRUPTED: u8 = 130;

/// Arguments of `sluice demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File or folder with Deployments, StatefulSets and Services to play [default: a built-in example]
    #[arg(value_name = "MANIFESTS")]
    manifests: Option<PathBuf>,
}

/// Plays a cluster and reports. Call it before the process has a second thread.
pub fn run(args: Args) -> Result<ExitCode> {
    match demo::run(args.manifests.as_deref()) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::from(WRONG)),
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("sluice: interrupted; everything is removed");
            Ok(ExitCode::from(INTERRUPTED))
        }
        Err(error) => Err(error),
    }
}
