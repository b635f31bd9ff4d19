//! Which queue takes a packet: that of the processor it is on. The kernel then keeps no table of flows and queues, which was
//! 7 % of the time of a short connection. Threads are not bound to processors: one bulk stream would be a fifth slower.
#![expect(unsafe_code, reason = "the kernel is given a program of two instructions")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::tun::Queue;

// linux/bpf.h
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
/// `call get_smp_processor_id` and `exit`. The kernel takes the result modulo the number of queues.
const PROCESSOR: [u64; 2] = [0x0000_0008_0000_0085, 0x0000_0000_0000_0095];

// linux/if_tun.h
nix::ioctl_write_ptr_bad!(tun_set_steering, nix::request_code_read!(b'T', 224, size_of::<libc::c_int>()), libc::c_int);

/// The part of `union bpf_attr` that loads a program.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// Lets all queues of the link take the packets of their processors. Needs `CAP_BPF`, on kernels that are not told
/// otherwise; without it the kernel spreads flows over the queues.
pub(super) fn by_processor(queue: &Queue) -> io::Result<()> {
    let program = load(&PROCESSOR)?;
    let number = program.as_raw_fd();
    // SAFETY: both descriptors are open; the kernel only reads the number during the call, and holds the program itself.
    unsafe { tun_set_steering(queue.as_raw_fd(), &raw const number) }?;
    Ok(())
}

fn load(program: &[u64]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let request = Load {
        kind: BPF_PROG_TYPE_SOCKET_FILTER,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..Load::default()
    };
    // SAFETY: what the request points to lives until the call returns; the kernel copies it, and reads no more than the
    // given size of the request.
    let descriptor = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const request, size_of::<Load>()) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}
