//! Helpers of the whole-program tests: they drive the built programs from outside, as a user would.

pub mod api_cluster;
pub mod apply;
pub mod cluster;
pub mod control_plane;
pub mod dns;
pub mod fake_api;
pub mod http;
pub mod kube_proxy;
pub mod kubelet;
pub mod lab;
pub mod manifests;
pub mod naive;
pub mod name_server;
pub mod probe;
pub mod relay;
pub mod sctp;
pub mod stage;
pub mod talk;

use std::path::PathBuf;

/// The built `sluice` program of the profile that this test was built in.
///
/// # Panics
/// When it is not built: `scripts/test` builds it first.
#[must_use]
pub fn sluice_binary() -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    // target/PROFILE/deps/TEST
    let profile = test.ancestors().nth(2).expect("a test lies in target/PROFILE/deps");
    let sluice = profile.join("sluice");
    assert!(sluice.exists(), "{} is not built: run scripts/test, or cargo build --workspace --bins", sluice.display());
    sluice
}

/// Whether network namespaces and a TUN can be had here; when not, says on stderr what is left untested.
#[must_use]
pub fn can_run_in_namespaces(what: &str) -> bool {
    let able = sluice_bench::netns::is_privileged() && std::path::Path::new("/dev/net/tun").exists();
    if !able {
        eprintln!("not tested: {what}: needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN) and /dev/net/tun");
    }
    able
}
