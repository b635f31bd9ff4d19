//! Which queue takes a packet: that of the processor it is on. The kernel then keeps no table of flows and queues, which was
//! 7 % of the time of a short connection. Threads are not bound to processors: one bulk stream would be a fifth slower.
#![expect(unsafe_code, reason = "the kernel is given the program by ioctl(2)")]

use std::io;
use std::os::fd::AsRawFd;

use super::tun::Queue;
use crate::bpf::assembler::Assembler;
use crate::bpf::{self, ProgramKind};

/// `bpf_get_smp_processor_id` (linux/bpf.h)
const PROCESSOR: i32 = 8;

// linux/if_tun.h
nix::ioctl_write_ptr_bad!(tun_set_steering, nix::request_code_read!(b'T', 224, size_of::<libc::c_int>()), libc::c_int);

/// Lets all queues of the link take the packets of their processors. Needs `CAP_BPF`, on kernels that are not told
/// otherwise; without it the kernel spreads flows over the queues.
pub(super) fn by_processor(queue: &Queue) -> io::Result<()> {
    let mut code = Assembler::default();
    // The kernel takes the result modulo the number of queues.
    code.call(PROCESSOR);
    code.exit();
    let program = bpf::load(ProgramKind::SocketFilter, &code.finish(), "sluice_steer")?;
    let number = program.as_raw_fd();
    // SAFETY: both descriptors are open; the kernel only reads the number during the call, and holds the program itself.
    unsafe { tun_set_steering(queue.as_raw_fd(), &raw const number) }?;
    Ok(())
}
