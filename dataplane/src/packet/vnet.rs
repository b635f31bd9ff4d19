//! The offload header in front of each packet of the TUN (`struct virtio_net_hdr`, Virtual I/O Device 1.2 §5.1.6).

/// Bytes of the header.
pub const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;

/// Whether the transport checksum is partial: the field holds the pseudo-header sum, the kernel does the rest.
pub fn checksum_is_partial(header: &[u8]) -> bool {
    header[0] & NEEDS_CSUM != 0
}

/// Whether this is several packets of one flow in one piece, for the kernel to take apart.
pub fn is_train(header: &[u8]) -> bool {
    header[1] != 0
}

/// A header for a whole packet with a finished checksum.
pub fn plain(header: &mut [u8]) {
    header[..LEN].fill(0);
}

/// A header for a whole packet whose transport checksum is for the kernel to finish: the transport header lies at `start`,
/// its checksum field `field` bytes further.
pub fn partial(header: &mut [u8], start: usize, field: usize) {
    plain(header);
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&(start as u16).to_ne_bytes());
    header[8..10].copy_from_slice(&(field as u16).to_ne_bytes());
}
