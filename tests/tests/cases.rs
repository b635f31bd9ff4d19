//! Conformance: every flow of every case, asked of the built program about real files. `tests/README.md` has the format.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use serde_json::{Value, json};
use sluice_tests::sluice_binary;

/// Of each case so many flows are asked one by one, as a user would; the others together.
const SINGLY: usize = 1;

/// A case with the file it is from.
struct Case {
    file: String,
    case: Value,
}

impl Case {
    fn name(&self) -> String {
        format!("{}: {}", self.file, self.case["name"].as_str().unwrap_or("a case without a name"))
    }
}

/// What the flows of one case came to.
#[derive(Default)]
struct Tally {
    passed: usize,
    failures: Vec<String>,
}

#[test]
fn every_case_is_answered_as_kube_proxy_would() {
    let cases: Vec<Case> = files().iter().flat_map(|path| read(path)).collect();
    assert!(!cases.is_empty(), "there are no cases");
    let (next, total) = (AtomicUsize::new(0), Mutex::new(Tally::default()));
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Relaxed)) {
                    let tally = run(case);
                    let mut total = total.lock().unwrap();
                    total.passed += tally.passed;
                    total.failures.extend(tally.failures);
                }
            });
        }
    });
    let Tally { passed, mut failures } = total.into_inner().unwrap();
    failures.sort();
    // Not by println: the test harness would keep it to itself.
    writeln!(std::io::stdout(), "{} cases: {passed} passed, {} failed", cases.len(), failures.len()).unwrap();
    assert!(failures.is_empty(), "{passed} passed, {} failed\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_rule_of_our_own_cases_is_in_the_table() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = fs::read_to_string(here.join("README.md")).unwrap();
    for case in json_files(&here.join("tests/cases"), |_| true).iter().flat_map(|path| read(path)) {
        let (rule, name) = (case.case["source"].as_str().unwrap(), case.case["name"].as_str().unwrap());
        let row = table.lines().find(|line| line.starts_with(&format!("| {rule} |")));
        let row = row.unwrap_or_else(|| panic!("tests/README.md has no row for {rule:?}, the rule of {name}"));
        assert!(row.contains(&format!("`{name}`")), "tests/README.md: {name} is missing in the row of {rule:?}");
    }
}

/// Case files: our own, those beside the project, and those of the folder in `SLUICE_CASES`.
fn files() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = json_files(&here.join("tests/cases"), |_| true);
    assert!(!files.is_empty(), "our own cases are gone");
    let of_kube_proxy = |name: &str| name.contains("kube_proxy");
    let beside = here.join("../../shared/cases");
    match beside.is_dir() {
        true => files.extend(json_files(&beside, of_kube_proxy)),
        false => eprintln!("not tested: the cases of {}: there is no such folder", beside.display()),
    }
    if let Some(folder) = std::env::var_os("SLUICE_CASES") {
        let more = json_files(Path::new(&folder), of_kube_proxy);
        assert!(!more.is_empty(), "SLUICE_CASES has no *kube_proxy*.json: {}", folder.display());
        files.extend(more);
    }
    files
}

fn json_files(folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_case_file = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.ends_with(".json") && wanted(&name)
    };
    let mut files: Vec<PathBuf> = entries.filter(is_case_file).collect();
    files.sort();
    files
}

fn read(path: &Path) -> Vec<Case> {
    let file: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let cases = file["cases"].as_array().unwrap_or_else(|| panic!("{} has no cases", path.display()));
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    cases.iter().map(|case| Case { file: name.clone(), case: case.clone() }).collect()
}

fn run(case: &Case) -> Tally {
    let folder = tempfile::tempdir().unwrap();
    let (config, manifests) = (folder.path().join("config.yaml"), folder.path().join("manifests"));
    // JSON is YAML.
    fs::write(&config, case.case["config"].to_string()).unwrap();
    fs::create_dir(&manifests).unwrap();
    let objects = case.case["objects"].as_array().map_or(&[][..], Vec::as_slice);
    for (index, object) in objects.iter().enumerate() {
        fs::write(manifests.join(format!("{index:04}.json")), object.to_string()).unwrap();
    }
    let flows = case.case["flows"].as_array().map_or(&[][..], Vec::as_slice);
    let mut tally = Tally::default();
    let mut judge = |flow: &Value, answer: &Result<Value, String>| match difference(flow, answer) {
        None => tally.passed += 1,
        Some(difference) => tally.failures.push(format!("{}: {difference}", case.name())),
    };
    let trace = |more: &[&str], input: &str| ask(&config, &manifests, more, input);
    let together: Vec<&Value> = flows.iter().skip(SINGLY).collect();
    for flow in flows.iter().take(SINGLY) {
        let text = |field: &str| flow[field].as_str().unwrap_or_default().to_owned();
        let (from, to, proto) = (text("from"), text("to"), text("proto"));
        let asked = ["--from", &from, "--to", &to, "--proto", &proto, "-o", "json"];
        let answer = trace(&asked, "").and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()));
        judge(flow, &answer);
    }
    if !together.is_empty() {
        let line = |flow: &&Value| json!({"from": flow["from"], "to": flow["to"], "proto": flow["proto"]}).to_string();
        let input = together.iter().map(|flow| line(flow) + "\n").collect::<String>();
        let answers = trace(&["--flows", "-"], &input);
        let answers = answers.as_deref().map(|text| text.lines().collect::<Vec<_>>());
        for (index, flow) in together.into_iter().enumerate() {
            let answer = match &answers {
                Ok(lines) => lines.get(index).copied().ok_or("no answer".to_owned()),
                Err(error) => Err((*error).to_owned()),
            };
            judge(flow, &answer.and_then(|line| serde_json::from_str(line).map_err(|error| error.to_string())));
        }
    }
    tally
}

fn ask(config: &Path, manifests: &Path, more: &[&str], input: &str) -> Result<String, String> {
    let mut command = Command::new(sluice_binary());
    command.arg("trace").arg("--config").arg(config).arg("--manifests").arg(manifests).args(more);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    // Flows of one case are less than a pipe holds; the program reads before it writes anyway.
    child.stdin.take().expect("a pipe was asked for").write_all(input.as_bytes()).map_err(|error| error.to_string())?;
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|error| error.to_string())
}

/// What is different from what the case expects.
fn difference(flow: &Value, answer: &Result<Value, String>) -> Option<String> {
    let expect = &flow["expect"];
    let question = format!("{} -> {} {}", flow["from"], flow["to"], flow["proto"]);
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return Some(format!("{question}: {error}")),
    };
    // Only a forwarded flow has endpoints and a source.
    let fields: &[&str] =
        if expect["outcome"] == "forward" { &["outcome", "endpoints", "masquerade"] } else { &["outcome"] };
    let differs = |field: &&&str| expect[**field] != answer[**field];
    let reason = expect["reason"].as_str().filter(|reason| answer["reason"].as_str() != Some(reason)).map(|_| "reason");
    let wrong: Vec<&str> = fields.iter().filter(differs).copied().chain(reason).collect();
    (!wrong.is_empty()).then(|| format!("{question}: {} differ: expected {expect}, got {answer}", wrong.join(", ")))
}
