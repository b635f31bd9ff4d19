//! One daemon a network namespace, and one a state directory.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};

use super::Lacking;

/// Held while the daemon runs; a process that ends, however, gives it up.
#[derive(Debug)]
pub struct Lock {
    _namespace: OwnedFd,
    _directory: Flock<File>,
}

impl Lock {
    /// Takes both locks. Fails, with exit code 3, when another daemon holds one.
    pub fn take(state_dir: &Path) -> Result<Self> {
        let namespace = lock_namespace()?;
        fs::create_dir_all(state_dir).map_err(|error| {
            Lacking(format!(
                "cannot make the state directory {}: {error}: choose one with --state-dir",
                state_dir.display()
            ))
        })?;
        let path = state_dir.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|error| {
            Lacking(format!("cannot open {}: {error}: choose another directory with --state-dir", path.display()))
        })?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(directory) => Ok(Self { _namespace: namespace, _directory: directory }),
            Err((_, Errno::EWOULDBLOCK)) => {
                let directory = state_dir.display();
                Err(Lacking(format!("another sluice uses the state directory {directory}")).into())
            }
            Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
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
