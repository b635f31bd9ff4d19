//! The offload header in front of each packet of the TUN (`struct virtio_net_hdr`, Virtual I/O Device 1.2 §5.1.6).

/// Bytes of the header.
pub const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;

/// Whether the transport checksum is partial: the field holds the pseudo-header sum, the kernel does the rest.
pub fn checksum_is_partial(header: &[u8]) -> bool {
    header[0] & NEEDS_CSUM != 0
}

/// A header for a whole packet with a finished checksum.
pub fn plain(header: &mut [u8]) {
    header[..LEN].fill(0);
}
