//! What do load and plain server say to each other: 16 bytes that ask, answers that begin with 16 bytes, and bulk data.
//!
//! | asked | answered |
//! | --- | --- |
//! | answer of SIZE bytes, with a number | that many bytes, the first 16 with the same size and number |
//! | send | [`Blocks`] without end, until the client closes |
//! | take | 0 as a go-ahead; after [`Blocks`] and the end of the client's direction their number of bytes, if all were right |

use std::io::{self, Read, Write};
use std::sync::LazyLock;

use xxhash_rust::xxh3::xxh3_64;

use crate::client::Failure;

/// Bytes of a request, and of the head of an answer.
pub const HEAD: usize = 16;
/// Bytes of the largest answer.
pub const MAX_ANSWER: u32 = 64 * 1024;
/// Bytes of bulk data that are hashed at a time.
pub const BLOCK: usize = 128 * 1024;

/// Different blocks: a missing or doubled one is noticed, and all of them still fit into a core's cache.
const PERIOD: usize = 8;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// An answer of `size` bytes that carries `number`.
    Answer {
        /// Bytes of the answer, from [`HEAD`] to [`MAX_ANSWER`].
        size: u32,
        /// Comes back, so that an answer is known to be this request's.
        number: u64,
    },
    /// Bulk data from the server.
    Send,
    /// Bulk data to the server.
    Take,
}

impl Request {
    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEAD] {
        let (kind, size, number) = match self {
            Self::Answer { size, number } => (b'?', size, number),
            Self::Send => (b'<', 0, 0),
            Self::Take => (b'>', 0, 0),
        };
        head(kind, size, number)
    }

    /// From bytes; `None` for anything that no client of ours sends.
    #[must_use]
    pub fn decode(bytes: &[u8; HEAD]) -> Option<Self> {
        let (kind, size, number) = split(bytes)?;
        match kind {
            b'?' if (HEAD as u32..=MAX_ANSWER).contains(&size) => Some(Self::Answer { size, number }),
            b'<' => Some(Self::Send),
            b'>' => Some(Self::Take),
            _ => None,
        }
    }
}

/// The first bytes of an answer of `size` bytes.
#[must_use]
pub fn answer_head(size: u32, number: u64) -> [u8; HEAD] {
    head(b'!', size, number)
}

/// Whether an answer of this size begins with these bytes.
#[must_use]
pub fn is_answer(bytes: &[u8], size: u32, number: u64) -> bool {
    bytes.get(..HEAD) == Some(&answer_head(size, number))
}

/// Number of bytes that the server took in, from its answer.
pub fn taken(bytes: &[u8; HEAD]) -> Result<u64, Failure> {
    match split(bytes) {
        Some((b'!', 0, number)) => Ok(number),
        _ => Err(Failure::Malformed),
    }
}

fn head(kind: u8, size: u32, number: u64) -> [u8; HEAD] {
    let mut bytes = [0; HEAD];
    bytes[..4].copy_from_slice(&[b'S', b'L', b'B', kind]);
    bytes[4..8].copy_from_slice(&size.to_be_bytes());
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    bytes
}

fn split(bytes: &[u8; HEAD]) -> Option<(u8, u32, u64)> {
    let [b'S', b'L', b'B', kind, s0, s1, s2, s3, number @ ..] = *bytes else { return None };
    Some((kind, u32::from_be_bytes([s0, s1, s2, s3]), u64::from_be_bytes(number)))
}

/// Bulk data: blocks of which the receiver knows the hashes, so that only one side hashes, and only once.
#[derive(Debug)]
pub struct Blocks {
    bytes: Vec<u8>,
    hashes: [u64; PERIOD],
}

impl Blocks {
    /// The blocks, made at the first use.
    #[must_use]
    pub fn get() -> &'static Self {
        static BLOCKS: LazyLock<Blocks> = LazyLock::new(Blocks::make);
        &BLOCKS
    }

    /// The block at this position of a stream.
    #[must_use]
    pub fn block(&self, number: u64) -> &[u8] {
        let index = (number % PERIOD as u64) as usize;
        &self.bytes[index * BLOCK..][..BLOCK]
    }

    fn make() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut bytes = Vec::with_capacity(PERIOD * BLOCK);
        while bytes.len() < PERIOD * BLOCK {
            // Xorshift: nothing on the way can compress it or take one part for another.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        let hashes = std::array::from_fn(|index| xxh3_64(&bytes[index * BLOCK..][..BLOCK]));
        Self { bytes, hashes }
    }
}

/// Takes in bulk data and checks it block by block.
#[derive(Debug)]
pub struct Checker {
    block: Box<[u8]>,
    filled: usize,
    number: u64,
}

impl Default for Checker {
    fn default() -> Self {
        Self { block: vec![0; BLOCK].into(), filled: 0, number: 0 }
    }
}

impl Checker {
    /// Reads once; the number of bytes, 0 at the end of the stream.
    pub fn read(&mut self, mut stream: impl Read) -> Result<usize, Failure> {
        let read = stream.read(&mut self.block[self.filled..])?;
        self.filled += read;
        if self.filled == BLOCK {
            let expected = Blocks::get().hashes[(self.number % PERIOD as u64) as usize];
            if xxh3_64(&self.block) != expected {
                return Err(Failure::Malformed);
            }
            self.number += 1;
            self.filled = 0;
        }
        Ok(read)
    }

    /// Checks what is left of a block; the number of bytes in all.
    pub fn finish(&self) -> Result<u64, Failure> {
        if self.block[..self.filled] != Blocks::get().block(self.number)[..self.filled] {
            return Err(Failure::Malformed);
        }
        Ok(self.number * BLOCK as u64 + self.filled as u64)
    }
}

/// Writes the next part of a stream of which `sent` bytes are out; the number of bytes.
pub fn write_blocks(mut stream: impl Write, sent: u64) -> io::Result<usize> {
    let block = Blocks::get().block(sent / BLOCK as u64);
    stream.write(&block[(sent % BLOCK as u64) as usize..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive() {
        for request in [Request::Answer { size: 64, number: 0x0102_0304_0506_0708 }, Request::Send, Request::Take] {
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        assert_eq!(Request::decode(&Request::Answer { size: 15, number: 1 }.encode()), None);
        assert_eq!(Request::decode(b"GET / HTTP/1.1\r\n"), None);
        assert!(is_answer(&answer_head(64, 7), 64, 7));
        assert!(!is_answer(&answer_head(64, 7), 64, 8));
    }

    #[test]
    fn checker_sees_any_change() {
        let mut stream = Vec::new();
        while stream.len() < 3 * BLOCK + 100 {
            let sent = stream.len() as u64;
            write_blocks(&mut stream, sent).unwrap();
        }
        stream.truncate(3 * BLOCK + 100);
        let check = |mut bytes: &[u8]| {
            let mut checker = Checker::default();
            while checker.read(&mut bytes)? > 0 {}
            checker.finish()
        };
        assert_eq!(check(&stream), Ok(stream.len() as u64));
        for position in [0, BLOCK, 3 * BLOCK + 99] {
            let mut wrong = stream.clone();
            wrong[position] ^= 1;
            assert_eq!(check(&wrong), Err(Failure::Malformed));
        }
        let mut missing = stream.clone();
        missing.drain(BLOCK..2 * BLOCK);
        assert_eq!(check(&missing), Err(Failure::Malformed));
    }
}
