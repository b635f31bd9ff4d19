//! When the objects in force are saved: soon after they changed, off the threads that serve, never more than a twentieth of the time.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::saved::Saved;
use crate::source::Update;
use crate::state::State;

/// Between two looks at whether there is anything to save.
pub const INTERVAL: Duration = Duration::from_secs(5);
/// A save that took this long is followed by a pause so many times as long.
const PAUSE: u32 = 20;

/// Saves the objects of a source.
#[derive(Debug)]
pub struct Saving {
    saved: Saved,
    is_unsaved: bool,
    /// When the last save may be followed by another.
    rest_until: Option<Instant>,
    task: Option<JoinHandle<(io::Result<u64>, Duration)>>,
    has_warned: bool,
}

impl Saving {
    /// Nothing is saved before the source has told all there is.
    #[must_use]
    pub fn new(saved: Saved, is_synced: bool) -> Self {
        Self { saved, is_unsaved: is_synced, rest_until: None, task: None, has_warned: false }
    }

    /// An update comes, to objects that are the source's (`is_synced`) or an earlier process's.
    pub fn note(&mut self, update: &Update, is_synced: bool) {
        self.is_unsaved |= update.is_whole || is_synced && !update.changes.is_empty();
    }

    /// Begins to save, or says that what is saved is still true. Call it each [`INTERVAL`].
    pub async fn go_on(&mut self, state: &Arc<State>) {
        if self.task.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        self.end_task().await;
        if self.is_unsaved {
            if self.rest_until.is_none_or(|until| until <= Instant::now()) {
                self.begin_task(state);
            }
        } else if state.freshness().is_fresh()
            && let Err(error) = self.saved.confirm()
        {
            // Somebody took the file away.
            tracing::debug!(%error, "saved objects are written anew");
            self.is_unsaved = true;
        }
    }

    /// Ends what is being saved: another process is to write from now on.
    pub async fn let_go(&mut self) {
        self.end_task().await;
    }

    /// Saves what is not saved yet. Call it at the end.
    pub async fn finish(&mut self, state: &Arc<State>) {
        self.end_task().await;
        if self.is_unsaved {
            self.begin_task(state);
            self.end_task().await;
        }
    }

    fn begin_task(&mut self, state: &Arc<State>) {
        self.is_unsaved = false;
        let (saved, state) = (self.saved.clone(), Arc::clone(state));
        self.task = Some(tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            // Only pointers are copied while updates wait.
            let objects: Vec<_> = state.publisher().store().objects().collect();
            (saved.write(objects.into_iter()), begun.elapsed())
        }));
    }

    async fn end_task(&mut self) {
        let Some(task) = self.task.take() else { return };
        match task.await {
            Ok((Ok(bytes), took)) => {
                self.has_warned = false;
                self.rest_until = Some(Instant::now() + took * PAUSE);
                tracing::debug!(bytes, ?took, "objects saved");
            }
            Ok((Err(error), took)) => {
                self.is_unsaved = true;
                self.rest_until = Some(Instant::now() + took * PAUSE);
                if !std::mem::replace(&mut self.has_warned, true) {
                    tracing::warn!(%error, "objects cannot be saved: a restart without the API server would not know them");
                }
            }
            Err(error) => tracing::warn!(%error, "objects were not saved"),
        }
    }
}
