use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::source::Change;

/// Well above what a busy machine needs; a test that waits for it has failed.
const LONG: Duration = Duration::from_secs(20);

struct Case {
    dir: TempDir,
    updates: mpsc::Receiver<Update>,
    watch: Option<Watch>,
}

fn service(name: &str) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n")
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("m")).unwrap();
        fs::write(dir.path().join("m/first.yaml"), service("first")).unwrap();
        let mut folder = Folder::new(&dir.path().join("m"), true);
        assert_eq!(folder.scan().changes.len(), 1);
        let (sender, updates) = mpsc::channel(4);
        let watch = Some(watch(folder, sender).unwrap());
        Self { dir, updates, watch }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Waits for an update that fits.
    #[track_caller]
    fn expect(&mut self, what: &str, fits: impl Fn(&Update) -> bool) {
        let end = Instant::now() + LONG;
        while Instant::now() < end {
            match self.updates.try_recv() {
                Ok(update) if fits(&update) => return,
                Ok(_) => {}
                Err(mpsc::error::TryRecvError::Empty) => std::thread::sleep(Duration::from_millis(1)),
                Err(mpsc::error::TryRecvError::Disconnected) => break,
            }
        }
        panic!("no update: {what}");
    }
}

fn applies(name: &'static str) -> impl Fn(&Update) -> bool {
    move |update| {
        let is = |change: &Change| matches!(change, Change::Apply(object, _) if &*object.key().name.name == name);
        update.changes.iter().any(is)
    }
}

#[test]
fn files_written_renamed_nested_and_deleted() {
    let mut case = Case::new();
    let dir = case.path().join("m");
    fs::write(dir.join("a.yaml"), service("a")).unwrap();
    case.expect("a new file", applies("a"));
    fs::write(dir.join(".b.tmp"), service("b")).unwrap();
    fs::rename(dir.join(".b.tmp"), dir.join("b.yaml")).unwrap();
    case.expect("renamed into place", applies("b"));
    fs::create_dir_all(dir.join("x/y")).unwrap();
    fs::write(dir.join("x/y/c.yaml"), service("c")).unwrap();
    case.expect("in a new folder", applies("c"));
    fs::remove_file(dir.join("a.yaml")).unwrap();
    case.expect("deleted", |update| matches!(&update.changes[..], [Change::Delete(_)]));
}

#[test]
fn the_folder_deleted_and_made_again() {
    let mut case = Case::new();
    let dir = case.path().join("m");
    fs::remove_dir_all(&dir).unwrap();
    case.expect("gone", |update| update.problems.iter().any(|problem| problem.message.contains("cannot be read")));
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("again.yaml"), service("again")).unwrap();
    case.expect("back", applies("again"));
    fs::write(dir.join("more.yaml"), service("more")).unwrap();
    case.expect("still watched", applies("more"));
}

#[test]
fn constant_writing_delays_nothing_for_long() {
    let mut case = Case::new();
    let dir = case.path().join("m");
    let (stop, stopped) = channel::<()>();
    let noise = dir.join("noise.txt");
    let writer = std::thread::spawn(move || {
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            fs::write(&noise, "x").unwrap();
        }
    });
    fs::write(dir.join("a.yaml"), service("a")).unwrap();
    case.expect("under noise", applies("a"));
    drop(stop);
    writer.join().unwrap();
}

#[test]
fn it_ends_when_dropped() {
    let mut case = Case::new();
    drop(case.watch.take());
    let end = Instant::now() + LONG;
    while !matches!(case.updates.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)) {
        assert!(Instant::now() < end, "still running");
        std::thread::sleep(Duration::from_millis(1));
    }
}
