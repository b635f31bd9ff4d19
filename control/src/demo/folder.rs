//! Where does a demo keep its files: in a folder of its own, which the next demo removes if this one was killed.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use nix::fcntl::{Flock, FlockArg};

/// How the folders of running demos are called.
const PREFIX: &str = "sluice-demo-";

/// A private folder. Dropping it removes it.
#[derive(Debug)]
pub(super) struct DemoFolder {
    path: PathBuf,
    /// Held as long as the demo lives: by it others know.
    _lock: Flock<File>,
}

impl DemoFolder {
    /// Makes a folder in `parent`, after removing those of demos that are dead.
    pub(super) fn new(parent: &Path) -> Result<Self> {
        remove_dead(parent);
        let cannot = || format!("cannot make a folder in {}", parent.display());
        // It gets the name that others look for only when it is locked.
        let hidden = tempfile::Builder::new().prefix(&format!(".{PREFIX}")).tempdir_in(parent).with_context(cannot)?;
        let lock = lock(hidden.path()).with_context(cannot)?;
        let name = hidden.path().file_name().and_then(|name| name.to_str()).context("a folder without a name")?;
        let path = parent.join(name.trim_start_matches('.'));
        fs::rename(hidden.keep(), &path).with_context(cannot)?;
        Ok(Self { path, _lock: lock })
    }

    /// Its path.
    #[must_use]
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for DemoFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Removes folders of ours that nobody locks. What cannot be removed is left: it is no reason not to start.
fn remove_dead(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    let own = nix::unistd::geteuid().as_raw();
    for entry in entries.flatten() {
        let is_named = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        // Not following links: in a shared folder anybody may have put one there.
        let is_own = || entry.metadata().is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == own);
        if is_named && is_own() && lock(&entry.path()).is_ok() {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

fn lock(folder: &Path) -> Result<Flock<File>> {
    let file = File::open(folder)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| anyhow!("cannot lock it: {errno}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_demo_removes_what_dead_ones_left_and_only_that() {
        let parent = tempfile::tempdir().unwrap();
        let dead = parent.path().join(format!("{PREFIX}dead"));
        fs::create_dir_all(dead.join("manifests")).unwrap();
        let other = parent.path().join("other");
        fs::create_dir(&other).unwrap();
        std::os::unix::fs::symlink(&other, parent.path().join(format!("{PREFIX}link"))).unwrap();

        let first = DemoFolder::new(parent.path()).unwrap();
        assert!(!dead.exists());
        assert!(other.exists());
        let second = DemoFolder::new(parent.path()).unwrap();
        assert!(first.path().exists(), "a running demo keeps its folder");
        assert_ne!(first.path(), second.path());
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());
        let left: Vec<_> = fs::read_dir(parent.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left.len(), 3, "other, the link and the second one: {left:?}");
    }
}
