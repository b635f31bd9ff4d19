//! Memory that costs nothing until it is touched.
#![expect(unsafe_code, reason = "zeroed allocation of plain atomics")]

use std::sync::atomic::AtomicU32;

/// Types for which all-zero bytes are a valid value.
///
/// # Safety
/// Zeroed memory must be a valid value of the type.
pub(crate) unsafe trait Zeroed {}

// SAFETY: an atomic integer has the representation of the integer; zero is one.
unsafe impl Zeroed for AtomicU32 {}
// SAFETY: only atomic integers; zero means "not live".
unsafe impl Zeroed for crate::flow::Record {}
// SAFETY: only atomic integers; zero means "not in use".
unsafe impl Zeroed for crate::table::EndpointEntry {}
// SAFETY: only atomic integers; zero means "not in use".
unsafe impl Zeroed for crate::table::PortEntry {}

/// `count` zeroes. Pages become resident when they are first written.
pub(crate) fn zeroed<T: Zeroed>(count: usize) -> Box<[T]> {
    // SAFETY: `Zeroed` promises that zeroed memory is a valid value.
    unsafe { Box::<[T]>::new_zeroed_slice(count).assume_init() }
}
