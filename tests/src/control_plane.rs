//! Whether a real control plane can be had.

use std::process::{Command, Stdio};

pub use sluice_bench::control_plane::{ControlPlane, folder};
use sluice_bench::control_plane::{missing, script};

/// Whether the programs are there; with `SLUICE_KUBE_BUILD=1` they are built. When not, says on stderr what is left untested.
///
/// # Panics
/// When they are to be built and cannot be.
#[must_use]
pub fn can_run(what: &str) -> bool {
    if std::env::var("SLUICE_KUBE_BUILD").is_ok_and(|value| value == "1") {
        let built = Command::new(script("build")).stdout(Stdio::null()).status();
        assert!(built.as_ref().is_ok_and(std::process::ExitStatus::success), "scripts/kube/build: {built:?}");
    }
    let missing = missing(&["kube-apiserver", "kube-controller-manager"]);
    if let Some(missing) = &missing {
        eprintln!("not tested: {what}: {missing}, or set SLUICE_KUBE_BUILD=1");
    }
    missing.is_none()
}
