//! What the first table is made of: what the source has, or what an earlier process had, until the source has told all.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;

use crate::config::Config;
use crate::host::lock::{self, Standing};
use crate::saved::{Earlier, Saved};
use crate::source::{Feed, Update};

/// How often it is looked whether the other daemon is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Where the objects in force are kept.
pub(crate) fn saved(config: &Config) -> Result<Saved> {
    let owner = format!("{} {}", lock::namespace_identity()?, config.node_name());
    Ok(Saved::new(&config.state_dir, &owner))
}

/// What the first table is made of.
pub(crate) struct First {
    pub(crate) update: Update,
    /// When it was true, where it is an earlier process's and not the source's.
    pub(crate) as_of: Option<Timestamp>,
}

/// All that the source has; or, where that is not there yet and nobody else serves, what an earlier process had.
pub(crate) async fn first(
    feed: &mut Feed,
    saved: Option<&Saved>,
    standing: &Standing,
    state_dir: &Path,
) -> Result<First> {
    let earlier = || match saved.map(Saved::read) {
        Some(Ok(earlier)) => earlier,
        Some(Err(reason)) => {
            tracing::warn!(%reason, "the objects of an earlier process cannot be used");
            None
        }
        None => None,
    };
    let mut problems = Vec::new();
    let mut another_serves = matches!(standing, Standing::TakingOver);
    let mut look = tokio::time::interval(LOOK_INTERVAL);
    if !another_serves && let Some(Earlier { update, as_of }) = earlier() {
        let age = Timestamp::now().duration_since(as_of).as_secs();
        tracing::info!(
            objects = update.changes.len(),
            age,
            "the objects of an earlier process serve until the source has told all"
        );
        return Ok(First { update, as_of: Some(as_of) });
    }
    loop {
        tokio::select! {
            update = feed.next() => {
                let update = update?;
                if update.is_whole {
                    return Ok(First { update, as_of: None });
                }
                problems = update.problems;
            }
            _ = look.tick(), if another_serves => {
                // A daemon that ended by itself leaves us alone with what it knew.
                another_serves = lock::is_held(&lock::flow_file(state_dir));
                if !another_serves && let Some(Earlier { update, as_of }) = earlier() {
                    return Ok(First { update: Update { problems, ..update }, as_of: Some(as_of) });
                }
            }
        }
    }
}
