//! Where does this code run: network namespaces without a name, which are gone when nobody uses them.

#![expect(
    unsafe_code,
    reason = "a child process enters its namespace between fork and exec, which only `pre_exec` can do"
)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getegid, geteuid, getpid, getppid};

/// A network namespace that exists as long as a clone of this, a socket or a process in it.
///
/// It has no entry in `/run/netns`, so nothing is left behind, however the program ends.
#[derive(Clone, Debug)]
pub struct NetNs {
    file: Arc<File>,
}

impl NetNs {
    /// A new, empty namespace: only `lo`, and that down.
    pub fn new() -> Result<Self> {
        let file = thread::scope(|scope| {
            join(scope.spawn(|| -> Result<File> {
                unshare(CloneFlags::CLONE_NEWNET).map_err(no_namespaces)?;
                current_namespace()
            }))
        })?;
        Ok(Self { file: Arc::new(file) })
    }

    /// The namespace that the calling thread is in.
    pub fn current() -> Result<Self> {
        Ok(Self { file: Arc::new(current_namespace()?) })
    }

    /// Runs `work` on a thread of its own inside this namespace, and waits for it.
    ///
    /// Sockets made there stay in this namespace, whoever uses them later. `/proc/sys/net` is this namespace's too.
    /// A panic of `work` is passed on.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            join(scope.spawn(|| {
                self.enter()?;
                work()
            }))
        })
    }

    /// Moves the calling thread into this namespace for good: for a thread that was made for it.
    pub fn enter(&self) -> Result<()> {
        setns(self, CloneFlags::CLONE_NEWNET).context("cannot enter a network namespace")
    }

    /// A command that will run inside this namespace and is killed when the thread that spawned it ends (so spawn it from
    /// one that outlives it, not from within [`NetNs::run`]).
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let namespace = Arc::clone(&self.file);
        let parent = getpid();
        let mut command = Command::new(program);
        let in_child = move || enter_as_child(namespace.as_fd(), parent);
        // SAFETY: the closure runs in the forked child of a program that may have threads, so it must not allocate or
        // take locks: it makes three system calls with values captured before, and its errors are plain error numbers.
        unsafe { command.pre_exec(in_child) };
        command
    }

    /// Sets a kernel parameter of this namespace, for example `net.ipv4.ip_forward` to `1`.
    ///
    /// A slash is taken for a dot inside a name, as by sysctl(8).
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.run(|| set_sysctl(name, value))
    }

    /// The number by which the kernel tells namespaces apart (`ls -l /proc/PID/ns/net`).
    pub fn inode(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(self.file.metadata().context("stat of a namespace")?.ino())
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for NetNs {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}

fn enter_as_child(namespace: BorrowedFd<'_>, parent: Pid) -> io::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The parent may have died before the line above, and then nothing would ever end us.
    if getppid() != parent {
        return Err(Errno::ESRCH.into());
    }
    Ok(())
}

fn current_namespace() -> Result<File> {
    let path = "/proc/thread-self/ns/net";
    File::open(path).with_context(|| format!("cannot open {path}"))
}

fn join<T>(handle: thread::ScopedJoinHandle<'_, T>) -> T {
    handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Sets a kernel parameter of the calling thread's namespace.
pub fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let swapped: String = name
        .chars()
        .map(|c| match c {
            '.' => '/',
            '/' => '.',
            c => c,
        })
        .collect();
    let path = format!("/proc/sys/{swapped}");
    fs::write(&path, value).with_context(|| format!("cannot set {path} to {value}"))
}

/// Whether the kernel has IPv6 at all.
#[must_use]
pub fn has_ipv6() -> bool {
    fs::exists("/proc/sys/net/ipv6").unwrap_or(false)
}

/// Whether this process may make network namespaces and devices as it is.
#[must_use]
pub fn is_privileged() -> bool {
    // Asking is surer than reading capability bits: seccomp and security modules have a say too.
    thread::scope(|scope| join(scope.spawn(|| unshare(CloneFlags::CLONE_NEWNET).is_ok())))
}

/// Moves this whole process into a user, mount and network namespace of its own, in which it is root.
///
/// Call it first thing in `main`: the kernel refuses it to a process with several threads. The error says what of the
/// system forbids it.
pub fn enter_user_namespace() -> Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET;
    if let Err(errno) = unshare(flags) {
        bail!("{}", no_user_namespaces(errno));
    }
    // Without "deny" an unprivileged process may not map a group (user_namespaces(7)).
    for (path, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ] {
        if let Err(error) = fs::write(path, text) {
            bail!("cannot write {path}: {error}{}", restriction_hint());
        }
    }
    Ok(())
}

fn no_namespaces(errno: Errno) -> anyhow::Error {
    match errno {
        Errno::EPERM => anyhow::anyhow!(
            "not allowed to make a network namespace: needs CAP_SYS_ADMIN (root), or a user namespace of its own"
        ),
        Errno::ENOSPC => anyhow::anyhow!(
            "no more network namespaces: the limit is {}",
            read_limit("/proc/sys/user/max_net_namespaces")
        ),
        errno => anyhow::Error::new(errno).context("cannot make a network namespace"),
    }
}

fn no_user_namespaces(errno: Errno) -> String {
    let why = match errno {
        Errno::ENOSPC => format!("user.max_user_namespaces is {}", read_limit("/proc/sys/user/max_user_namespaces")),
        Errno::EINVAL => "the process has several threads, or the kernel has no user namespaces".to_owned(),
        errno => errno.to_string(),
    };
    format!("cannot make a user namespace: {why}{}", restriction_hint())
}

/// Names the switches by which distributions forbid user namespaces to ordinary users.
fn restriction_hint() -> String {
    let switches = [
        ("kernel.unprivileged_userns_clone", "0"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1"),
        ("user.max_user_namespaces", "0"),
    ];
    let forbidding: Vec<String> = switches
        .iter()
        .filter(|(name, value)| {
            fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))).is_ok_and(|text| text.trim() == *value)
        })
        .map(|(name, value)| format!("{name} = {value}"))
        .collect();
    if forbidding.is_empty() { String::new() } else { format!(" (the system forbids it: {})", forbidding.join(", ")) }
}

fn read_limit(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn closures_and_commands_run_inside() {
        if !is_privileged() {
            eprintln!("not tested: needs CAP_SYS_ADMIN to make network namespaces");
            return;
        }
        let outer = NetNs::current().unwrap().inode().unwrap();
        let ns = NetNs::new().unwrap();
        let seen = ns.run(|| NetNs::current()?.inode()).unwrap();
        assert_eq!(seen, ns.inode().unwrap());
        assert_ne!(seen, outer);

        ns.sysctl("net.ipv4.ip_forward", "1").unwrap();
        let output = ns
            .command("sh")
            .args(["-c", "readlink /proc/self/ns/net; cat /proc/sys/net/ipv4/ip_forward"])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text, format!("net:[{seen}]\n1\n"));
    }
}
