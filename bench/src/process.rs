//! What does a program that we started use, and how is it ended?

use std::fs;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Bound on starting and on stopping.
pub(crate) const SOON: Duration = Duration::from_secs(15);
/// What one tick in /proc/PID/stat is, on every Linux.
pub(crate) const TICK_US: f64 = 10_000.0;

/// A program with a folder of its own for configuration and log. Dropping it ends it.
pub(crate) struct Process {
    child: Child,
    folder: tempfile::TempDir,
}

impl Process {
    /// Starts it; its output goes to the log.
    pub(crate) fn start(mut command: Command, folder: tempfile::TempDir) -> Result<Self> {
        let log = fs::File::create(folder.path().join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {}", command.get_program().display()))?;
        Ok(Self { child, folder })
    }

    /// What it has written.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it and its children use.
    pub(crate) fn usage(&self) -> Usage {
        Usage::of(self.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(id) = self.child.id().try_into() {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        let deadline = Instant::now() + SOON;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Processor time and memory of a process and its children.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Since its start, in microseconds.
    pub(crate) cpu_us: f64,
    /// Resident bytes.
    pub(crate) memory: u64,
}

impl Usage {
    /// Nothing for a process that has ended.
    pub(crate) fn of(id: u32) -> Self {
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|id| id.parse().ok());
        children.chain([id]).fold(Self::default(), |sum, id| Self {
            cpu_us: sum.cpu_us + ticks(id) * TICK_US,
            memory: sum.memory + resident(id),
        })
    }
}

/// User and system time of a process; nothing for one that has ended.
fn ticks(id: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // The name may hold anything, so fields are counted from its end: state is the third, utime the fourteenth.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum()
}

fn resident(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_something() {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(40) {}
        let usage = Usage::of(std::process::id());
        assert!(usage.cpu_us >= 2.0 * TICK_US && usage.memory > 1 << 20, "{usage:?}");
        assert_eq!(Usage::of(u32::MAX).memory, 0);
    }
}
