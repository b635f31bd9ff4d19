use std::fs;

use tempfile::TempDir;

use super::*;

struct Case {
    dir: TempDir,
    folder: Folder,
}

fn service(name: &str, port: u16) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n")
}

impl Case {
    fn new(prune: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), prune);
        Self { dir, folder }
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // Into place, so that the inode tells versions of one moment apart.
        let new = self.dir.path().join(".new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.dir.path().join(name)).unwrap();
    }

    /// Changes as words, and problems as text without the folder.
    fn scan(&mut self) -> (Vec<String>, Vec<String>) {
        let update = self.folder.scan();
        let root = format!("{}/", self.dir.path().display());
        let change = |change: &Change| match change {
            Change::Apply(object, origin) => format!("{} from {origin}", object.key()).replace(&root, ""),
            Change::Delete(key) => format!("- {key}"),
        };
        let problems = update.problems.iter().map(|problem| problem.to_string().replace(&root, ""));
        (update.changes.iter().map(change).collect(), problems.collect())
    }

    #[track_caller]
    fn check(&mut self, changes: &[&str], problems: &[&str]) {
        let (is, problems_are) = self.scan();
        assert_eq!(is, changes, "{problems_are:?}");
        assert_eq!(problems_are.len(), problems.len(), "{problems_are:?}");
        for (problem, words) in problems_are.iter().zip(problems) {
            assert!(words.split('|').all(|word| problem.contains(word)), "{problem:?} lacks {words:?}");
        }
    }
}

#[test]
fn only_what_differs_is_emitted() {
    let mut case = Case::new(false);
    case.write("a.yaml", &(service("a", 1) + &service("b", 2)));
    case.write("deep/er/c.json", r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"c"}}"#);
    for ignored in [".hidden.yaml", ".dir/x.yaml", "notes.txt"] {
        case.write(ignored, &service("x", 1));
    }
    let a_b = ["Service default/a from a.yaml, document 1", "Service default/b from a.yaml, document 2"];
    case.check(&[a_b[0], a_b[1], "Service default/c from deep/er/c.json, document 1"], &[]);
    case.check(&[], &[]);
    case.write("a.yaml", &(service("a", 1) + &service("b", 3)));
    case.check(&[a_b[1]], &[]);
    case.write("a.yaml", &service("a", 1));
    case.check(&["- Service default/b"], &[]);
}

#[test]
fn bad_files_keep_their_last_good_objects() {
    let mut case = Case::new(false);
    let both = service("a", 1) + &service("b", 2);
    case.write("a.yaml", &both);
    case.scan();
    case.write("a.yaml", "foo: [");
    case.check(&[], &["a.yaml, document 1"]);
    case.write("a.yaml", "");
    case.check(&[], &["a.yaml: is empty"]);
    // Object-wise: the good one is taken in, the bad one keeps its last good version.
    case.write("a.yaml", &(service("a", 9) + &service("b", 2).replace("2}", "x}")));
    let a = "Service default/a from a.yaml, document 1";
    case.check(&[a], &["a.yaml, document 2|Service default/b|spec.ports[0].port"]);
    case.write("a.yaml", &both);
    case.check(&[a], &[]);
    fs::write(case.dir.path().join("b.yaml"), b"\xff\xfe\xfa").unwrap();
    case.check(&[], &["b.yaml|utf-8"]);
    case.remove("b.yaml");
    case.check(&[], &[]);
}

#[test]
fn a_deleted_file_is_a_problem_until_it_is_back() {
    let mut case = Case::new(false);
    case.write("a.yaml", &service("a", 1));
    case.scan();
    case.remove("a.yaml");
    case.check(&[], &["a.yaml: is gone; its object stays in force"]);
    case.check(&[], &["a.yaml: is gone"]);
    case.write("a.yaml", &service("a", 1));
    case.check(&[], &[]);
}

#[test]
fn objects_that_moved_are_no_problem() {
    let mut case = Case::new(false);
    case.write("a.yaml", &service("a", 1));
    case.scan();
    case.remove("a.yaml");
    case.write("z.yaml", &service("a", 1));
    case.check(&["Service default/a from z.yaml, document 1"], &[]);
    case.remove("z.yaml");
    case.check(&[], &["z.yaml: is gone"]);
}

#[test]
fn with_prune_a_deleted_file_takes_its_objects_with_it() {
    let mut case = Case::new(true);
    case.write("a.yaml", &service("a", 1));
    case.write("b.yaml", &service("b", 1));
    case.scan();
    case.remove("a.yaml");
    case.check(&["- Service default/a"], &[]);
    // A folder that is gone as a whole is rather a mount that comes back.
    fs::remove_dir_all(case.dir.path()).unwrap();
    case.check(&[], &["cannot be read"]);
}

#[test]
fn of_two_of_one_name_the_first_in_path_order_is_in_force() {
    let mut case = Case::new(true);
    case.write("b.yaml", &service("a", 1));
    case.write("c.yaml", &(service("a", 2) + &service("a", 3)));
    let b = "Service default/a from b.yaml, document 1";
    let twice = "c.yaml, document 2|document 1";
    case.check(&[b], &[twice, "c.yaml, document 1|b.yaml, document 1"]);
    case.write("a.yaml", &service("a", 4));
    case.check(&["Service default/a from a.yaml, document 1"], &[twice, "b.yaml|a.yaml", "c.yaml|a.yaml"]);
    case.remove("a.yaml");
    case.check(&[b], &[twice, "c.yaml|b.yaml"]);
}

#[test]
fn folders_that_are_links_are_followed_and_loops_end() {
    let mut case = Case::new(false);
    let root = case.dir.path().to_owned();
    // As the kubelet mounts a ConfigMap.
    for (version, port) in [("..1", 1), ("..2", 2)] {
        fs::create_dir(root.join(version)).unwrap();
        fs::write(root.join(version).join("a.yaml"), service("a", port)).unwrap();
    }
    std::os::unix::fs::symlink("..1", root.join("..data")).unwrap();
    std::os::unix::fs::symlink("..data/a.yaml", root.join("a.yaml")).unwrap();
    std::os::unix::fs::symlink(".", root.join("loop")).unwrap();
    let a = "Service default/a from a.yaml, document 1";
    case.check(&[a], &[]);
    std::os::unix::fs::symlink("..2", root.join("..new")).unwrap();
    fs::rename(root.join("..new"), root.join("..data")).unwrap();
    case.check(&[a], &[]);
    // A whole folder elsewhere.
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("b.yaml"), service("b", 1)).unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), root.join("linked")).unwrap();
    case.check(&["Service default/b from linked/b.yaml, document 1"], &[]);
}

#[test]
fn one_file_and_a_missing_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("any.name");
    let mut folder = Folder::new(&path, false);
    let update = folder.scan();
    assert!(update.changes.is_empty());
    assert!(update.problems[0].to_string().contains("any.name: cannot be read"), "{:?}", update.problems);
    fs::write(&path, service("a", 1)).unwrap();
    let update = folder.scan();
    assert_eq!((update.changes.len(), update.problems.len()), (1, 0));
    fs::remove_file(&path).unwrap();
    let update = folder.scan();
    assert!(update.problems[0].to_string().contains("is gone"), "{:?}", update.problems);
}

#[test]
fn a_file_written_twice_at_one_moment_is_read_twice() {
    let mut case = Case::new(false);
    let path = case.dir.path().join("a.yaml");
    for port in 1..9 {
        // In place, same size, within the grain of the file system's clock.
        fs::write(&path, service("a", port)).unwrap();
        assert_eq!(case.scan().0.len(), 1, "port {port}");
    }
}

#[test]
fn skipped_kinds_are_counted_over_all_files() {
    let mut case = Case::new(false);
    for name in ["a.yaml", "b.yaml"] {
        case.write(name, "apiVersion: v1\nkind: Secret\n");
    }
    assert_eq!(case.folder.scan().skipped, BTreeMap::from([("v1/Secret".to_owned(), 2)]));
    case.remove("a.yaml");
    assert_eq!(case.folder.scan().skipped, BTreeMap::from([("v1/Secret".to_owned(), 1)]));
}
