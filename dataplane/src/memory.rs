//! Memory that costs nothing until it is touched: on the heap, or in a file that the next process finds again.
#![expect(unsafe_code, reason = "mapped memory of plain atomics")]

use std::any::Any;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use memmap2::{MmapOptions, MmapRaw};

/// Types of atomic integers only, for which all-zero bytes are a valid value.
///
/// # Safety
/// Any bytes must be a valid value of the type, it must have no padding that matters, and whatever changes it must do so
/// by atomic operations: another process may have the same memory.
pub(crate) unsafe trait Plain: Send + Sync + 'static {}

// SAFETY: an atomic integer.
unsafe impl Plain for AtomicU32 {}
// SAFETY: an atomic integer.
unsafe impl Plain for AtomicU64 {}
// SAFETY: without gaps, and each as the type says.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::flow::Record {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::flow::Header {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::table::EndpointEntry {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::table::PortEntry {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::table::EndpointCounters {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::table::PortCounters {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::select::AffinityEntry {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::offload::Flow {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::offload::FlowTraffic {}
// SAFETY: only atomic integers.
unsafe impl Plain for crate::offload::Carried {}

/// A slice that lives as long as what owns its memory.
pub(crate) struct Region<T> {
    start: *const T,
    count: usize,
    /// Set for a file: where the slice begins in it, and how many elements have room on its file system.
    backing: Option<Backing>,
    _owner: Arc<dyn Any + Send + Sync>,
}

struct Backing {
    file: File,
    offset: usize,
    reserved: AtomicUsize,
}

// SAFETY: it is a `&[T]` with its owner, and `T` may be shared among threads.
unsafe impl<T: Plain> Send for Region<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Region<T> {}

/// Elements for which room is made at once.
const STEP: usize = 4096;

impl<T: Plain> Region<T> {
    /// Zeroes of this process alone. Mapped rather than allocated: an allocator may hand out used memory and zero it.
    pub(crate) fn heap(count: usize) -> Self {
        Self::over(zeroes::<T>(count), count)
    }

    /// The same for what is read all over: in large pages where the kernel has them, so that fewer reads have to look up where a page is.
    pub(crate) fn scattered(count: usize) -> Self {
        let map = zeroes::<T>(count);
        // Kernels without them serve as well.
        let _ = map.advise(memmap2::Advice::HugePage);
        Self::over(map, count)
    }

    fn over(map: MmapRaw, count: usize) -> Self {
        Self { start: map.as_ptr().cast(), count, backing: None, _owner: Arc::new(map) }
    }

    /// `count` elements at `offset`, a multiple of the page size, of a file that is long enough.
    pub(crate) fn map(file: &File, offset: usize, count: usize) -> io::Result<Self> {
        let length = count * size_of::<T>();
        if file.metadata()?.len() < (offset + length) as u64 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is too short"));
        }
        let map: MmapRaw = MmapOptions::new().offset(offset as u64).len(length).map_raw(file)?;
        let start = map.as_ptr().cast::<T>();
        let backing = Backing { file: file.try_clone()?, offset, reserved: AtomicUsize::new(0) };
        Ok(Self { start, count, backing: Some(backing), _owner: Arc::new(map) })
    }

    /// The `count` elements of a map of the kernel's.
    pub(crate) fn of_kernel(map: &OwnedFd, count: usize) -> io::Result<Self> {
        Ok(Self::over(MmapOptions::new().len(count * size_of::<T>()).map_raw(map)?, count))
    }

    /// Makes sure that the first `count` elements have room: a full file system is an error here, and a signal later.
    pub(crate) fn reserve(&self, count: usize) -> io::Result<()> {
        let Some(backing) = &self.backing else { return Ok(()) };
        let from = backing.reserved.load(Relaxed);
        if count <= from {
            return Ok(());
        }
        let to = count.next_multiple_of(STEP).min(self.count).max(count);
        let size = size_of::<T>();
        let (offset, length) = (backing.offset + from * size, (to - from) * size);
        // SAFETY: the descriptor is open for as long as `backing` is.
        let failed = unsafe { libc::fallocate(backing.file.as_raw_fd(), 0, offset as i64, length as i64) } != 0;
        if failed {
            return Err(io::Error::last_os_error());
        }
        backing.reserved.store(to, Relaxed);
        Ok(())
    }
}

fn zeroes<T>(count: usize) -> MmapRaw {
    let length = (count * size_of::<T>()).max(1);
    MmapRaw::from(MmapOptions::new().len(length).map_anon().expect("there is address space at start"))
}

impl<T> Deref for Region<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the owner keeps `count` elements at `start`, aligned to a page; `Plain` says
        // that any bytes are a value and that all changes are atomic.
        unsafe { std::slice::from_raw_parts(self.start, self.count) }
    }
}
