//! What is shown meanwhile: a live line on a terminal, plain lines otherwise.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::traffic::Counters;

/// How often the live figures change.
const REFRESH: Duration = Duration::from_millis(250);

/// Colours, where they are wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint(bool);

impl Paint {
    /// Colours if standard output is a terminal and nobody objects (`NO_COLOR`, see no-color.org).
    #[must_use]
    pub(super) fn detect() -> Self {
        let objects = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self(std::io::stdout().is_terminal() && !objects && !is_dumb)
    }

    /// Good news.
    #[must_use]
    pub(super) fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    /// Bad news.
    #[must_use]
    pub(super) fn red(self, text: &str) -> String {
        self.with("31", text)
    }

    /// What stands out.
    #[must_use]
    pub(super) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    /// What stands back.
    #[must_use]
    pub(super) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The lines of a demo, and the live one under them.
#[derive(Debug)]
pub(super) struct Progress {
    /// Colours of its lines.
    pub(super) paint: Paint,
    live: ProgressBar,
    begun: Instant,
    follower: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

impl Progress {
    /// Nothing is shown yet.
    #[must_use]
    pub(super) fn new() -> Self {
        let is_live = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        let target = if is_live { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let paint = Paint::detect();
        let template = if paint.0 { "{spinner:.cyan} {prefix:.bold}{msg:.dim}" } else { "{spinner} {prefix}{msg}" };
        let style = ProgressStyle::with_template(template).expect("a constant template");
        let live = ProgressBar::with_draw_target(None, target).with_style(style);
        Self { paint, live, begun: Instant::now(), follower: None }
    }

    /// Says what is being done now; only on a terminal.
    pub(super) fn doing(&self, what: &str) {
        self.live.set_prefix(what.to_owned());
        self.live.enable_steady_tick(REFRESH / 2);
    }

    /// A line about what has been done.
    pub(super) fn done(&self, what: &str) {
        let time = format!("{:6.1} s", self.begun.elapsed().as_secs_f64());
        self.line(&format!("{} {what}", self.paint.dim(&time)));
    }

    /// A line.
    pub(super) fn line(&self, text: &str) {
        // Not being able to show a line is no reason to stop; the report at the end would fail the same way, and say so.
        self.live.suspend(|| drop(crate::cli::print(&format!("{text}\n"))));
    }

    /// Shows the figures of a traffic behind what is being done, until [`Progress::finish`].
    pub(super) fn follow(&mut self, counters: Arc<Counters>) {
        let (stop, live) = (Arc::new(AtomicBool::new(false)), self.live.clone());
        let stopped = Arc::clone(&stop);
        let show = move || {
            let (mut last, _) = counters.read();
            let mut since = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(REFRESH);
                let (connections, errors) = counters.read();
                let rate = (connections - last) as f64 / since.elapsed().as_secs_f64();
                (last, since) = (connections, Instant::now());
                let figures = [grouped(rate as u64), grouped(connections), grouped(errors)];
                live.set_message(format!(" · {}/s · {} connections · {} errors", figures[0], figures[1], figures[2]));
            }
        };
        self.follower = Some((stop, std::thread::spawn(show)));
    }

    /// Takes the live line away.
    pub(super) fn finish(&mut self) {
        if let Some((stop, thread)) = self.follower.take() {
            stop.store(true, Ordering::Relaxed);
            // It only shows figures: a panic there has been printed, and is no reason to fail.
            drop(thread.join());
        }
        self.live.finish_and_clear();
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// `12,345`.
#[must_use]
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (12_345_678, "12,345,678")] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn without_colours_text_stays_text() {
        assert_eq!(Paint(false).red("x"), "x");
        assert_eq!(Paint(true).red("x"), "\x1b[31mx\x1b[0m");
    }
}
