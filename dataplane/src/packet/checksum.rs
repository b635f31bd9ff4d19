//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

/// Ones-complement sum of bytes as 16-bit big-endian words; an odd last byte is padded with zero. Not folded.
pub fn sum(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(2);
    let total: u64 = words.by_ref().map(|word| u64::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    total + words.remainder().first().map_or(0, |last| u64::from(*last) << 8)
}

/// Folds a sum to 16 bits.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The change that replacing some words makes to a ones-complement sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change(u64);

impl Change {
    /// Records that `old` was replaced by `new`, both at an even offset of the covered bytes.
    pub fn replace(&mut self, old: &[u8], new: &[u8]) {
        self.0 += u64::from(!fold(sum(old))) + sum(new);
    }

    /// Records a changed 16-bit word.
    pub fn replace_word(&mut self, old: u16, new: u16) {
        self.0 += u64::from(!old) + u64::from(new);
    }

    /// The change as such, in 16 bits.
    pub fn folded(self) -> u16 {
        fold(self.0)
    }

    /// Both changes together.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// The checksum field after the change (RFC 1624, equation 3).
    pub fn apply(self, checksum: u16) -> u16 {
        !fold(u64::from(!checksum) + self.0)
    }

    /// A partial checksum (the uncomplemented pseudo-header sum that offloading leaves in the field) after the change.
    pub fn apply_partial(self, partial: u16) -> u16 {
        fold(u64::from(partial) + self.0)
    }
}

/// Applies a change to a checksum field in a packet.
pub fn update(bytes: &mut [u8], at: usize, change: Change) {
    let old = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    bytes[at..at + 2].copy_from_slice(&change.apply(old).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_1624_example() {
        // RFC 1624 section 4: HC = 0xdd2f, m = 0x5555, m' = 0x3285 gives 0x0000.
        let mut change = Change::default();
        change.replace_word(0x5555, 0x3285);
        assert_eq!(change.apply(0xdd2f), 0x0000);
    }

    #[test]
    fn odd_lengths_are_padded() {
        assert_eq!(sum(&[0x12, 0x34, 0x56]), 0x1234 + 0x5600);
    }
}
