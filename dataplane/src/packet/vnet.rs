//! The offload header in front of each packet of the TUN (`struct virtio_net_hdr`, Virtual I/O Device 1.2 §5.1.6).

/// Bytes of the header.
pub const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;

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

/// Bytes of payload in each segment that the packet is to be cut into, when it is.
pub fn segment(header: &[u8]) -> Option<usize> {
    (header[1] != GSO_NONE).then(|| usize::from(u16::from_ne_bytes([header[4], header[5]])))
}

/// Fits the header to so many bytes more in front of the packet, or fewer.
pub fn put_before(header: &mut [u8], more: i16) {
    let mut shift = |at: usize| {
        let value = u16::from_ne_bytes([header[at], header[at + 1]]).saturating_add_signed(more);
        header[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    };
    // The length of all headers, and where the checksum begins.
    shift(2);
    shift(6);
}
