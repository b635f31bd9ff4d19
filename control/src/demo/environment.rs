//! Can the demo run here? It needs network namespaces, a TUN device and nftables, as root or in a user namespace.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};
use sluice_bench::netns;

use crate::host::Lacking;

const TUN: &str = "/dev/net/tun";

/// As whom the demo runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Privilege {
    /// With the privileges that it was started with.
    Own,
    /// As root of a user namespace of its own.
    UserNamespace,
}

/// Makes sure that namespaces can be made, entering a user namespace if need be, and that the rest is there.
///
/// The process must have one thread only.
pub(super) fn prepare() -> Result<Privilege> {
    let privilege = if netns::is_privileged() {
        Privilege::Own
    } else {
        if let Err(error) = netns::enter_user_namespace() {
            bail!(Lacking(format!("needs root, or a user namespace of its own: {error:#}")));
        }
        Privilege::UserNamespace
    };
    let found = [tun(Path::new(TUN)), nft()];
    let lacking: Vec<String> = found.into_iter().filter_map(Result::err).collect();
    if !lacking.is_empty() {
        bail!(Lacking(lacking.join("; ")));
    }
    Ok(privilege)
}

fn tun(path: &Path) -> Result<(), String> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map(drop).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => "load the kernel module: modprobe tun",
            std::io::ErrorKind::PermissionDenied => "run as root, or let others use it: chmod 666 /dev/net/tun",
            _ => "the kernel needs CONFIG_TUN",
        };
        format!("cannot open {}: {error} ({hint})", path.display())
    })
}

fn nft() -> Result<(), String> {
    let mut version = Command::new("nft");
    version.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match version.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("nft --version fails: {status}")),
        Err(error) => Err(format!("cannot run nft: {error} (install nftables; scripts/setup does)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_named_with_the_way_out() {
        let error = tun(Path::new("/nonexistent/tun")).unwrap_err();
        assert!(error.contains("/nonexistent/tun") && error.contains("modprobe tun"), "{error}");
    }
}
