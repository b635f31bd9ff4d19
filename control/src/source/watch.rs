//! Watches a [`Folder`]: scans it soon after something below it changes, and now and then in any case.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use super::Update;
use super::folder::Folder;

/// No event for so long: whoever writes has done.
const QUIET: Duration = Duration::from_millis(2);
/// Most that a change waits while others keep coming.
const PATIENCE: Duration = Duration::from_millis(100);
/// Most that a change waits for a file that is being written to be closed.
const OPEN_PATIENCE: Duration = Duration::from_millis(500);
/// Between looks of its own accord: events may be lost, and some file systems send none.
const RESCAN: Duration = Duration::from_secs(2);

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watch {
    signals: Sender<Signal>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The thread has ended by itself when nobody receives.
        let _ = self.signals.send(Signal::Stop);
    }
}

#[derive(Debug)]
enum Signal {
    /// Something changed.
    Changed,
    /// A file that is still being written changed.
    Writing(PathBuf),
    /// A file that was written is closed.
    Written(PathBuf),
    /// The watched path itself came, went or was replaced.
    Root,
    Stop,
}

/// Goes on from the scans that `folder` has had: sends an update whenever objects, problems or skipped kinds differ, from a
/// thread of its own, until the [`Watch`] is dropped or nobody receives. Without inotify it looks every two seconds.
pub fn watch(folder: Folder, updates: mpsc::Sender<Update>) -> std::io::Result<Watch> {
    let (signals, receiver) = channel();
    let events = signals.clone();
    let thread = std::thread::Builder::new().name("watch".to_owned());
    thread.spawn(move || Watching::new(folder, events).run(&receiver, &updates))?;
    Ok(Watch { signals })
}

struct Watching {
    folder: Folder,
    events: Sender<Signal>,
    watcher: Option<RecommendedWatcher>,
    /// The folder that is watched, as device and inode: another one may take its place.
    watched: Option<(u64, u64)>,
}

impl Watching {
    fn new(folder: Folder, events: Sender<Signal>) -> Self {
        Self { folder, events, watcher: None, watched: None }
    }

    fn run(mut self, signals: &Receiver<Signal>, updates: &mpsc::Sender<Update>) {
        // Before the first look, so that nothing falls in between.
        self.watch_root();
        let mut last = (self.folder.problems(), self.folder.skipped());
        loop {
            let update = self.folder.scan();
            let state = (update.problems.clone(), update.skipped.clone());
            let differs = !update.changes.is_empty() || last != state;
            last = state;
            if (differs && updates.blocking_send(update).is_err()) || updates.is_closed() {
                return;
            }
            match wait(signals) {
                Waited::Stop => return,
                Waited::Root => self.watched = None,
                Waited::Changed => {}
            }
            self.watch_root();
        }
    }

    /// Watches the folder at the path, unless that is the one already watched.
    fn watch_root(&mut self) {
        let identity = std::fs::metadata(self.folder.path()).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        if self.watcher.is_some() && self.watched == identity {
            return;
        }
        self.watched = identity;
        let path = self.folder.path();
        let events = self.events.clone();
        let root = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let path = root.clone();
        let handler = move |event: notify::Result<notify::Event>| {
            for signal in signals_of(event, &root) {
                let _ = events.send(signal);
            }
        };
        self.watcher = notify::recommended_watcher(handler)
            .inspect_err(|error| tracing::warn!(%error, "no inotify: manifests are looked at every {RESCAN:?}"))
            .ok();
        let Some(watcher) = &mut self.watcher else { return };
        // The parent tells when the path itself is replaced.
        let parent = path.parent().unwrap_or(&path);
        let mut watch = |path: &Path, mode| {
            if let Err(error) = watcher.watch(path, mode) {
                tracing::debug!(%error, path = %path.display(), "is not watched: looked at every {RESCAN:?}");
            }
        };
        watch(parent, RecursiveMode::NonRecursive);
        watch(&path, RecursiveMode::Recursive);
    }
}

fn signals_of(event: notify::Result<notify::Event>, root: &Path) -> Vec<Signal> {
    // Events that were lost show as an error, or as one that asks to look.
    let Ok(event) = event else { return vec![Signal::Changed] };
    if event.need_rescan() {
        return vec![Signal::Changed];
    }
    // The parent's other children are not ours.
    let ours = event.paths.into_iter().filter(|path| path.starts_with(root));
    let signal = |path: PathBuf| match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => Some(Signal::Written(path)),
        // Our own reading, too.
        EventKind::Access(_) => None,
        EventKind::Modify(ModifyKind::Data(_)) => Some(Signal::Writing(path)),
        EventKind::Create(_) | EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) if path == root => {
            Some(Signal::Root)
        }
        EventKind::Any | EventKind::Create(_) | EventKind::Modify(_) | EventKind::Remove(_) | EventKind::Other => {
            Some(Signal::Changed)
        }
    };
    ours.filter_map(signal).collect()
}

enum Waited {
    Changed,
    Root,
    Stop,
}

/// Waits for a change, and then until changes pause and written files are closed, both within bounds.
fn wait(signals: &Receiver<Signal>) -> Waited {
    let mut first: Option<Instant> = None;
    let mut open = BTreeSet::new();
    let mut outcome = Waited::Changed;
    loop {
        let pause = match first {
            None => RESCAN,
            Some(first) => {
                let (pause, patience) =
                    if open.is_empty() { (QUIET, PATIENCE) } else { (OPEN_PATIENCE, OPEN_PATIENCE) };
                pause.min(patience.saturating_sub(first.elapsed()))
            }
        };
        match signals.recv_timeout(pause) {
            Ok(Signal::Stop) | Err(RecvTimeoutError::Disconnected) => return Waited::Stop,
            Err(RecvTimeoutError::Timeout) => return outcome,
            Ok(Signal::Changed) => {}
            Ok(Signal::Root) => outcome = Waited::Root,
            Ok(Signal::Writing(path)) => {
                open.insert(path);
            }
            Ok(Signal::Written(path)) => {
                open.remove(&path);
            }
        }
        let first = first.get_or_insert_with(Instant::now);
        if first.elapsed() >= OPEN_PATIENCE {
            return outcome;
        }
    }
}

#[cfg(test)]
mod tests;
