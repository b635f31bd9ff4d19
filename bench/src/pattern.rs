//! Did all bytes arrive, in order: data of a known pattern, and a digest of what came.

use std::fmt;

use xxhash_rust::xxh3::Xxh3Default;

/// Bytes in one chunk of a [`Pattern`].
pub const CHUNK: usize = 64 * 1024;

/// A given number of bytes in chunks, each beginning with its own number: a lost, doubled or exchanged chunk changes the
/// digest.
#[derive(Clone, Debug)]
pub struct Pattern {
    left: u64,
    number: u64,
}

impl Pattern {
    /// `count` bytes.
    #[must_use]
    pub fn new(count: u64) -> Self {
        Self { left: count, number: 0 }
    }

    /// The digest of `count` bytes.
    #[must_use]
    pub fn digest(count: u64) -> Digest {
        let mut digest = Digest::default();
        for chunk in Self::new(count) {
            digest.update(&chunk);
        }
        digest
    }
}

impl Iterator for Pattern {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.left == 0 {
            return None;
        }
        let length = self.left.min(CHUNK as u64) as usize;
        let mut chunk: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        for (byte, stamp) in chunk.iter_mut().zip(self.number.to_be_bytes()) {
            *byte = stamp;
        }
        self.left -= length as u64;
        self.number += 1;
        Some(chunk)
    }
}

/// Count and XXH3 hash of a stream of bytes; shown as `COUNT-HASH`.
#[derive(Clone, Default)]
pub struct Digest {
    count: u64,
    hash: Box<Xxh3Default>,
}

impl Digest {
    /// Takes in more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.count += bytes.len() as u64;
        self.hash.update(bytes);
    }

    /// How many bytes came.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count
    }
}

impl PartialEq for Digest {
    fn eq(&self, other: &Self) -> bool {
        self.count == other.count && self.hash.digest() == other.hash.digest()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.count, self.hash.digest())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_sees_order_and_length() {
        let chunks: Vec<Vec<u8>> = Pattern::new(3 * CHUNK as u64 + 5).collect();
        assert_eq!(chunks.len(), 4);
        let of = |order: &[usize]| {
            let mut digest = Digest::default();
            for index in order {
                digest.update(&chunks[*index]);
            }
            digest
        };
        assert_eq!(of(&[0, 1, 2, 3]), Pattern::digest(3 * CHUNK as u64 + 5));
        for wrong in [&[0, 2, 1, 3][..], &[0, 1, 2], &[0, 1, 1, 3]] {
            assert_ne!(of(wrong), of(&[0, 1, 2, 3]));
        }
    }
}
