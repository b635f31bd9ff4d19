//! kube-proxy's configuration as ours: its file, the ConfigMap that holds it, and its flags.
//!
//! [`KEYS`] says of every key and flag what becomes of it, in `docs/migration.md` too; [`read()`] takes a file, [`flags`]
//! the command line. Both fill a [`Draft`], which knows how values act together.

use std::path::PathBuf;

mod chains;
pub mod draft;
pub mod flags;
pub mod keys;
pub mod leftovers;
pub mod read;

pub use draft::Draft;
pub use flags::Flags;
pub use keys::KEYS;
pub use read::read;

/// What kube-proxy's configuration asks for besides a [`crate::config::Config`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// The kubeconfig to use.
    pub kubeconfig: Option<PathBuf>,
    /// Log lines as JSON.
    pub json_log: bool,
    /// Least level that is logged, where it is another than the default.
    pub log_level: Option<&'static str>,
    /// What was ignored, for one warning.
    pub warning: Option<String>,
}

impl Wishes {
    fn ignoring(mut self, ignored: &[String]) -> Self {
        if !ignored.is_empty() {
            let ignored = ignored.join(", ");
            self.warning =
                Some(format!("ignored of kube-proxy's configuration: {ignored} (docs/migration.md says why)"));
        }
        self
    }

    /// Both, the second before the first.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            kubeconfig: other.kubeconfig.or(self.kubeconfig),
            json_log: other.json_log || self.json_log,
            log_level: other.log_level.or(self.log_level),
            warning: match (self.warning, other.warning) {
                (Some(first), Some(second)) => Some(format!("{first}; {second}")),
                (first, second) => first.or(second),
            },
        }
    }
}
