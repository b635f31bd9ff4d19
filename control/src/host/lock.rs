//! One daemon a network namespace; and to whom a flow file belongs.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};

use sluice_dataplane::packet_path::namespace_cookie;

use super::Lacking;

/// Between two attempts at a lock.
const PAUSE: Duration = Duration::from_millis(5);
/// How long a daemon that handed over may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the state directory says of who runs.
#[derive(Debug)]
pub enum Standing {
    /// Nobody serves this network namespace. What is held keeps others from it.
    Alone(OwnedFd),
    /// A daemon with this very state directory serves it: it is to hand over.
    TakingOver,
}

/// Finds out who serves this network namespace. Fails, with exit code 3, when it is a daemon with another state directory.
pub fn standing(state_dir: &Path) -> Result<Standing> {
    fs::create_dir_all(state_dir).map_err(|error| {
        let directory = state_dir.display();
        Lacking(format!("cannot make the state directory {directory}: {error}: choose one with --state-dir"))
    })?;
    match lock_namespace() {
        Ok(held) => Ok(Standing::Alone(held)),
        Err(error) if error.is::<Lacking>() && is_held(&flow_file(state_dir)) => {
            tracing::info!("another daemon runs with this state directory: taking over from it");
            Ok(Standing::TakingOver)
        }
        Err(error) => Err(error),
    }
}

/// Where flows lie.
#[must_use]
pub fn flow_file(state_dir: &Path) -> PathBuf {
    state_dir.join("flows")
}

/// Waits for a daemon that handed over to end.
pub async fn succeed() -> Result<OwnedFd> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match lock_namespace() {
            Err(error) if error.is::<Lacking>() && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(PAUSE).await;
            }
            result => return result,
        }
    }
}

/// Fails, with exit code 3, when a daemon runs in this network namespace. What is returned keeps one from starting.
pub fn lock_namespace() -> Result<OwnedFd> {
    // The names of abstract sockets are the network namespace's own.
    let namespace =
        socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("cannot make a socket")?;
    match bind(namespace.as_raw_fd(), &UnixAddr::new_abstract(b"sluice")?) {
        Ok(()) => Ok(namespace),
        Err(Errno::EADDRINUSE) => Err(Lacking("another sluice runs in this network namespace".to_owned()).into()),
        Err(error) => Err(error).context("cannot lock the network namespace"),
    }
}

/// What tells this boot's network namespace from every other: state of another is never used.
pub fn namespace_identity() -> Result<String> {
    let boot = boot_id()?;
    let cookie = namespace_cookie().context("the kernel does not tell network namespaces apart")?;
    Ok(format!("{boot} {cookie}"))
}

/// The number of this boot.
pub fn boot_id() -> Result<String> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(PATH).with_context(|| format!("cannot read {PATH}"))?.trim().to_owned())
}

/// Whether a daemon has this flow file.
#[must_use]
pub fn is_held(path: &Path) -> bool {
    let Ok(file) = OpenOptions::new().read(true).write(true).open(path) else { return false };
    matches!(Flock::lock(file, FlockArg::LockExclusiveNonblock), Err((_, Errno::EWOULDBLOCK)))
}
