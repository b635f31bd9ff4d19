//! What are Pods called: as a cluster's controllers name them, but the same at every run.

use std::hash::{Hash, Hasher as _};

/// Letters and digits that Kubernetes puts into made-up names: none that make words.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// Longest prefix of a made-up name; five letters more make a Pod's name.
const LONGEST_PREFIX: usize = 58;

/// The `pod-template-hash` of a Deployment's revision.
#[must_use]
pub(super) fn template_hash(namespace: &str, deployment: &str, revision: u32) -> String {
    letters((namespace, deployment, revision), 10)
}

/// Name of the `serial`th Pod of a Deployment's revision with this hash.
#[must_use]
pub(super) fn deployment_pod(deployment: &str, hash: &str, serial: u32) -> String {
    let mut prefix = format!("{deployment}-{hash}-");
    prefix.truncate(LONGEST_PREFIX);
    prefix + &letters((deployment, hash, serial), 5)
}

/// Name of a StatefulSet's Pod.
#[must_use]
pub(super) fn stateful_pod(set: &str, ordinal: u32) -> String {
    format!("{set}-{ordinal}")
}

fn letters(seed: impl Hash, count: usize) -> String {
    let state = ahash::RandomState::with_seeds(0x51, 0x75, 0x1c, 0xe0);
    let mut hasher = std::hash::BuildHasher::build_hasher(&state);
    seed.hash(&mut hasher);
    let mut rest = hasher.finish();
    let base = ALPHABET.len() as u64;
    (0..count)
        .map(|_| {
            let letter = ALPHABET[(rest % base) as usize];
            rest /= base;
            char::from(letter)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_look_like_a_clusters_and_differ() {
        let hash = template_hash("shop", "web", 1);
        assert_eq!(hash.len(), 10);
        assert_ne!(hash, template_hash("shop", "web", 2), "a revision has a hash of its own");
        let names: std::collections::BTreeSet<String> =
            (0..50).map(|serial| deployment_pod("web", &hash, serial)).collect();
        assert_eq!(names.len(), 50);
        assert!(names.iter().all(|name| name.starts_with(&format!("web-{hash}-")) && name.len() == 20), "{names:?}");
        assert_eq!(deployment_pod(&"x".repeat(80), &hash, 0).len(), 63, "as long as a host name may be");
        assert_eq!(stateful_pod("store", 2), "store-2");
    }
}
