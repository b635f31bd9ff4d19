//! A file or folder of manifests: what has changed since the last look.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ahash::AHashMap;

use super::manifest::{self, Manifest};
pub use super::watch::{Watch, watch};
use super::{Change, Update};
use crate::object::{Key, Object};
use crate::problem::{Origin, Problem};

/// File systems stamp with the kernel's tick: a file younger than this may change again under the same stamp.
const STAMP_GRAIN: Duration = Duration::from_millis(50);

/// A file, or a folder with all `*.yaml`, `*.yml` and `*.json` below it. Names that start with `.` are left out.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    prune: bool,
    files: BTreeMap<Arc<Path>, File>,
    /// The files that hold an object, in path order. More than one is a conflict, unless the others are gone.
    holders: AHashMap<Key, BTreeSet<Arc<Path>>>,
    /// Objects with more than one holder.
    contested: BTreeSet<Key>,
    /// What has been handed out.
    in_force: AHashMap<Key, (Object, Origin)>,
    /// What cannot be looked at: nothing below it counts as deleted.
    unreadable: Vec<(PathBuf, Problem)>,
}

/// What tells that a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    changed: (i64, i64),
    size: u64,
    inode: (u64, u64),
    /// Too young to be told from the next version.
    is_young: bool,
}

#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    /// Last good objects with their document.
    objects: BTreeMap<Key, (Object, usize)>,
    problems: Vec<Problem>,
    skipped: BTreeMap<String, u64>,
    is_gone: bool,
}

impl Folder {
    /// Nothing is read yet. `prune`: a deleted file takes its objects with it.
    #[must_use]
    pub fn new(path: &Path, prune: bool) -> Self {
        Self {
            root: path.to_owned(),
            prune,
            files: BTreeMap::new(),
            holders: AHashMap::new(),
            contested: BTreeSet::new(),
            in_force: AHashMap::new(),
            unreadable: Vec::new(),
        }
    }

    /// The file or folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Looks again. Only files with another stamp are read, and only objects that differ, or have moved to another place,
    /// are among the changes. Never fails: what cannot be read is a problem, and its last good objects stay in force.
    pub fn scan(&mut self) -> Update {
        let mut found = BTreeMap::new();
        self.unreadable.clear();
        let root = self.root.clone();
        self.find(&root, &mut BTreeSet::new(), &mut found, true);

        let mut touched = BTreeSet::new();
        for (path, stamp) in &found {
            let known = self.files.get(path);
            let is_same = known.is_some_and(|file| !file.is_gone && file.stamp == Some(*stamp));
            if !is_same || stamp.is_young {
                self.read(path, *stamp, &mut touched);
            }
        }
        let gone = self.files.iter().filter(|(path, file)| !file.is_gone && !found.contains_key(*path));
        for path in gone.map(|(path, _)| Arc::clone(path)).collect::<Vec<_>>() {
            if !self.unreadable.iter().any(|(folder, _)| path.starts_with(folder)) {
                self.lose(&path, &mut touched);
            }
        }
        let changes = touched.into_iter().filter_map(|key| self.settle(key)).collect();
        self.forget_empty();
        Update { changes, problems: self.problems(), skipped: self.skipped(), ..Update::default() }
    }

    /// Files below a path, with their stamps. Follows links, but enters no folder twice.
    fn find(
        &mut self,
        path: &Path,
        entered: &mut BTreeSet<(u64, u64)>,
        found: &mut BTreeMap<Arc<Path>, Stamp>,
        is_root: bool,
    ) {
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            // Deleted since its folder was listed, or a link to nothing.
            Err(error)
                if error.kind() == std::io::ErrorKind::NotFound && (!is_root || self.files.contains_key(path)) =>
            {
                return;
            }
            Err(error) => return self.cannot_read(path, &error),
        };
        if !metadata.is_dir() {
            if is_root || (metadata.is_file() && is_manifest(path)) {
                found.insert(path.into(), Stamp::of(&metadata));
            }
            return;
        }
        if !entered.insert((metadata.dev(), metadata.ino())) {
            return;
        }
        let entries = std::fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut entries = match entries {
            Ok(entries) => entries,
            Err(error) => return self.cannot_read(path, &error),
        };
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            if !entry.file_name().as_encoded_bytes().starts_with(b".") {
                self.find(&entry.path(), entered, found, false);
            }
        }
    }

    fn cannot_read(&mut self, path: &Path, error: &std::io::Error) {
        let problem = Problem::error("", format!("cannot be read: {error}"));
        self.unreadable.push((path.to_owned(), problem.from(&whole(&path.into()))));
    }

    fn read(&mut self, path: &Arc<Path>, stamp: Stamp, touched: &mut BTreeSet<Key>) {
        let text = std::fs::read(path).map_err(|error| error.to_string());
        let text = text.and_then(|bytes| String::from_utf8(bytes).map_err(|error| error.to_string()));
        let file = self.files.entry(Arc::clone(path)).or_default();
        if file.is_gone {
            touched.extend(file.objects.keys().cloned());
        }
        file.stamp = Some(stamp);
        file.is_gone = false;
        file.problems.clear();
        match text.map(|text| manifest::parse(&text)) {
            // Between "opened to be written" and "written" a file is blank.
            Ok(manifest) if manifest.is_blank && !file.objects.is_empty() => {
                let problem = Problem::error("", "is empty; its last good objects stay in force");
                file.problems.push(problem.from(&whole(path)));
            }
            Ok(manifest) => {
                let previous = file.take_in(path, manifest);
                for key in file.objects.keys().filter(|key| !previous.contains_key(*key)) {
                    self.holders.entry(key.clone()).or_default().insert(Arc::clone(path));
                }
                for key in previous.keys().filter(|key| !file.objects.contains_key(*key)) {
                    release(&mut self.holders, key, path);
                }
                touched.extend(previous.into_keys());
                touched.extend(file.objects.keys().cloned());
            }
            Err(error) => {
                file.stamp = None;
                file.problems.push(Problem::error("", format!("cannot be read: {error}")).from(&whole(path)));
            }
        }
    }

    fn lose(&mut self, path: &Arc<Path>, touched: &mut BTreeSet<Key>) {
        let Some(file) = self.files.get_mut(path) else { return };
        touched.extend(file.objects.keys().cloned());
        file.is_gone = true;
        file.stamp = None;
        file.problems.clear();
        file.skipped.clear();
        if self.prune {
            for key in std::mem::take(&mut file.objects).into_keys() {
                release(&mut self.holders, &key, path);
            }
        }
    }

    /// Decides which file an object is taken from: the first in path order; those that are gone come last.
    fn settle(&mut self, key: Key) -> Option<Change> {
        let holders: Vec<Arc<Path>> = self.holders.get(&key).into_iter().flatten().cloned().collect();
        let is_gone = |path: &Arc<Path>| self.files.get(path).is_none_or(|file| file.is_gone);
        let (gone, present): (Vec<_>, Vec<_>) = holders.into_iter().partition(is_gone);
        if !present.is_empty() {
            // It has moved.
            for path in &gone {
                release(&mut self.holders, &key, path);
                self.files.get_mut(path).and_then(|file| file.objects.remove(&key));
            }
        }
        if present.len() > 1 {
            self.contested.insert(key.clone());
        } else {
            self.contested.remove(&key);
        }
        let owner = present.first().or(gone.first());
        let next = owner.and_then(|path| {
            let (object, document) = self.files.get(path)?.objects.get(&key)?;
            Some((object.clone(), Origin::File { path: Arc::clone(path), document: *document }))
        });
        match next {
            Some(next) if self.in_force.get(&key) == Some(&next) => None,
            Some((object, origin)) => {
                self.in_force.insert(key, (object.clone(), origin.clone()));
                Some(Change::Apply(object, origin))
            }
            None => self.in_force.remove(&key).map(|_| Change::Delete(key)),
        }
    }

    /// Files that are gone and hold nothing any more.
    fn forget_empty(&mut self) {
        self.files.retain(|_, file| !file.is_gone || !file.objects.is_empty());
    }

    /// What is wrong, as of the last scan.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.unreadable.iter().map(|(_, problem)| problem.clone()).collect();
        for (path, file) in &self.files {
            problems.extend(file.problems.iter().cloned());
            if file.is_gone {
                let objects = match file.objects.len() {
                    1 => "its object stays".to_owned(),
                    count => format!("its {count} objects stay"),
                };
                let message = format!("is gone; {objects} in force (with `prune: true` they would go with it)");
                problems.push(Problem::warning("", message).from(&whole(path)));
            }
        }
        for key in &self.contested {
            let place = |path: &Arc<Path>| {
                let document = self.files.get(path)?.objects.get(key)?.1;
                Some(Origin::File { path: Arc::clone(path), document })
            };
            let mut places = self.holders.get(key).into_iter().flatten().filter_map(place);
            let Some(first) = places.next() else { continue };
            problems.extend(places.map(|place| twice(key, &first, &place)));
        }
        problems
    }

    /// Objects of kinds that are not used, as of the last scan.
    pub(super) fn skipped(&self) -> BTreeMap<String, u64> {
        let mut skipped = BTreeMap::new();
        for (kind, count) in self.files.values().flat_map(|file| &file.skipped) {
            *skipped.entry(kind.clone()).or_default() += count;
        }
        skipped
    }
}

impl File {
    /// Replaces the objects, except that a file with errors takes nothing away. Returns the objects before.
    fn take_in(&mut self, path: &Arc<Path>, manifest: Manifest) -> BTreeMap<Key, (Object, usize)> {
        let origin = |document| Origin::File { path: Arc::clone(path), document };
        let mut objects: BTreeMap<Key, (Object, usize)> = BTreeMap::new();
        for (object, document) in manifest.objects {
            let key = object.key();
            match objects.get(&key) {
                Some((_, first)) => self.problems.push(twice(&key, &origin(*first), &origin(document))),
                None => drop(objects.insert(key, (object, document))),
            }
        }
        let is_whole = manifest.problems.is_empty();
        self.problems.extend(manifest.problems.into_iter().map(|(problem, document)| problem.from(&origin(document))));
        self.skipped = manifest.skipped;
        let previous = std::mem::take(&mut self.objects);
        if !is_whole {
            for (key, object) in &previous {
                objects.entry(key.clone()).or_insert_with(|| object.clone());
            }
        }
        self.objects = objects;
        previous
    }
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        let changed =
            Duration::new(metadata.ctime().try_into().unwrap_or(0), metadata.ctime_nsec().try_into().unwrap_or(0));
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            size: metadata.size(),
            inode: (metadata.dev(), metadata.ino()),
            is_young: now.saturating_sub(changed) < STAMP_GRAIN,
        }
    }
}

fn whole(path: &Arc<Path>) -> Origin {
    Origin::File { path: Arc::clone(path), document: 0 }
}

fn is_manifest(path: &Path) -> bool {
    matches!(path.extension().and_then(std::ffi::OsStr::to_str), Some("yaml" | "yml" | "json"))
}

fn release(holders: &mut AHashMap<Key, BTreeSet<Arc<Path>>>, key: &Key, path: &Arc<Path>) {
    if let Some(paths) = holders.get_mut(key) {
        paths.remove(path);
        if paths.is_empty() {
            holders.remove(key);
        }
    }
}

fn twice(key: &Key, first: &Origin, second: &Origin) -> Problem {
    let message = format!("is there twice; the one in {first} is in force");
    Problem::error("", message).about(key.to_string()).from(second)
}

#[cfg(test)]
mod tests;
