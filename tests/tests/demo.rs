//! `sluice demo` as a newcomer meets it: it ends with a table and nothing failed, and it leaves nothing behind.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice_tests::cluster::SOON;
use sluice_tests::{can_run_in_namespaces, sluice_binary};

fn demo(temporary: &Path) -> Command {
    let mut command = Command::new(sluice_binary());
    command.arg("demo").env("TMPDIR", temporary).stdin(Stdio::null());
    command
}

fn folders(temporary: &Path) -> Vec<String> {
    fs::read_dir(temporary).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Waits until a demo that is not among the `earlier` folders has a daemon with state.
fn wait_for_daemon(temporary: &Path, earlier: &[String]) {
    let begun = Instant::now();
    let is_up = |folder: &String| !earlier.contains(folder) && temporary.join(folder).join("state").exists();
    while !folders(temporary).iter().any(is_up) {
        assert!(begun.elapsed() < SOON, "no daemon: {:?}", folders(temporary));
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn daemon_of(demo: &Child) -> Vec<i32> {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", demo.id())).unwrap();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn is_running(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A dead process may wait to be reaped by whoever inherited it.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[test]
fn the_example_is_played_without_an_error() {
    if !can_run_in_namespaces("sluice demo") {
        return;
    }
    let temporary = tempfile::tempdir().unwrap();
    let output = demo(temporary.path()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(!text.contains('\x1b'), "no colours into a pipe: {text}");
    let last = text.lines().last().unwrap();
    assert!(text.contains(" changes of Pods' names answered after p50 "), "{text}");
    assert!(last.contains(" 0 errors,") && last.contains("refused as they should be"), "{last}");
    for service in ["shop/web http 80/TCP", "shop/api rest 80/TCP", "shop/names query 53/UDP", "shop/store-read"] {
        assert!(text.contains(service), "{service}: {text}");
    }
    for fate in ["replaced", "new", "replaced in place", "added"] {
        assert!(text.contains(fate), "{fate}: {text}");
    }
    assert_eq!(folders(temporary.path()), [""; 0]);
}

#[test]
fn nothing_is_left_however_it_ends() {
    if !can_run_in_namespaces("the end of sluice demo") {
        return;
    }
    let temporary = tempfile::tempdir().unwrap();
    for signal in [Signal::SIGKILL, Signal::SIGINT, Signal::SIGTERM] {
        let earlier = folders(temporary.path());
        let mut child = demo(temporary.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for_daemon(temporary.path(), &earlier);
        let daemon = daemon_of(&child);
        assert_eq!(folders(temporary.path()).len(), 1, "that of a demo killed before is gone");
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        let status = child.wait().unwrap();
        if signal == Signal::SIGKILL {
            assert_eq!(folders(temporary.path()).len(), 1, "nobody could remove it yet");
        } else {
            assert_eq!(status.code(), Some(130), "{signal}");
            assert_eq!(folders(temporary.path()), [""; 0], "{signal}");
        }
        let begun = Instant::now();
        while daemon.iter().any(|pid| is_running(*pid)) {
            assert!(begun.elapsed() < SOON, "{signal}: the daemon runs on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn what_is_lacking_is_said() {
    if !can_run_in_namespaces("what sluice demo says it lacks") {
        return;
    }
    let temporary = tempfile::tempdir().unwrap();
    let output = demo(temporary.path()).env("PATH", "/nonexistent").output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("nft"), "{error}");
}
