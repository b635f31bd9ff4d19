//! Has somebody asked us to stop? SIGINT and SIGTERM become an error that ends the demo in good order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Bound on how late a signal is noticed.
const STEP: Duration = Duration::from_millis(25);

/// The demo was asked to stop.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Whether a signal has come.
#[derive(Clone, Debug, Default)]
pub(super) struct Interrupt {
    flag: Arc<AtomicBool>,
}

impl Interrupt {
    /// Catches SIGINT and SIGTERM from now on. A second one ends the process at once.
    pub(super) fn catch() -> Result<Self> {
        let caught = Self::default();
        let flag = Arc::clone(&caught.flag);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start a runtime for signals")?;
        let (mut interrupt, mut terminate) = {
            let _inside = runtime.enter();
            let listen = |kind| signal(kind).context("cannot listen for signals");
            (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?)
        };
        let wait = move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                    if flag.swap(true, Ordering::Relaxed) {
                        // The daemon is killed with us, namespaces vanish; the next demo removes our folder.
                        std::process::exit(130);
                    }
                }
            });
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(wait).context("cannot start a thread")?;
        Ok(caught)
    }

    /// An error once a signal has come.
    pub(super) fn check(&self) -> Result<(), Interrupted> {
        if self.flag.load(Ordering::Relaxed) { Err(Interrupted) } else { Ok(()) }
    }

    /// Sleeps, unless a signal comes.
    pub(super) fn sleep(&self, time: Duration) -> Result<(), Interrupted> {
        let end = Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(STEP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_ends_when_asked() {
        let interrupt = Interrupt::default();
        assert!(interrupt.sleep(Duration::from_millis(1)).is_ok());
        interrupt.flag.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        assert!(interrupt.sleep(Duration::from_secs(60)).is_err());
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
}
