//! Conformance of names: every question of every case, asked of the zone itself and of the program.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write as _;
use std::process::Command;

use serde_json::Value;
use sluice_control::cli::offline;
use sluice_control::config::Config;
use sluice_control::dns::{Resolved, questions};
use sluice_dataplane::dns::{Resolution, Zone};
use sluice_tests::dns::{cases, difference};
use sluice_tests::sluice_binary;

#[test]
fn every_question_is_answered_as_coredns_would() {
    let cases = cases();
    assert!(!cases.is_empty(), "there are no cases");
    let (mut passed, mut failures) = (0, Vec::new());
    for case in &cases {
        let folder = tempfile::tempdir().unwrap();
        let (config, manifests) = (folder.path().join("config.yaml"), folder.path().join("manifests"));
        fs::write(&config, case.case["config"].to_string()).unwrap();
        fs::create_dir(&manifests).unwrap();
        case.write_objects(&manifests).unwrap();
        let mut publisher = offline::load(Config::read(&config).unwrap().0, &manifests);
        let zone = publisher.zone(jiff::Timestamp::now()).unwrap();
        for (index, query) in case.queries().enumerate() {
            let mut answers = vec![resolve(&zone, query)];
            // As a user would; the others would cost a start of the program each.
            if index == 0 {
                let (name, kind) = (query["qname"].as_str().unwrap(), query["qtype"].as_str().unwrap());
                let mut command = Command::new(sluice_binary());
                command
                    .args(["resolve", name, kind, "-o", "json", "--config"])
                    .arg(&config)
                    .arg("--manifests")
                    .arg(&manifests);
                let output = command.output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                answers.push(serde_json::from_slice(&output.stdout).unwrap());
            }
            for answer in answers {
                match difference(query, &answer) {
                    None => passed += 1,
                    Some(difference) => failures.push(format!("{}: {difference}", case.name())),
                }
            }
        }
    }
    writeln!(std::io::stdout(), "{} cases: {passed} passed, {} failed", cases.len(), failures.len()).unwrap();
    assert!(failures.is_empty(), "{passed} passed, {} failed\n{}", failures.len(), failures.join("\n"));
}

fn resolve(zone: &Zone, query: &Value) -> Value {
    let (name, kind) = (query["qname"].as_str().unwrap(), query["qtype"].as_str().unwrap());
    let question = questions(name, kind, None, "").unwrap().remove(0);
    match zone.resolve(&question, &mut fastrand::Rng::with_seed(1)) {
        Resolution::Answer(answer) | Resolution::Complete { otherwise: answer, .. } => {
            serde_json::to_value(Resolved::new(&question, &answer)).unwrap()
        }
        Resolution::Forward => serde_json::json!({"rcode": "REFUSED"}),
    }
}
