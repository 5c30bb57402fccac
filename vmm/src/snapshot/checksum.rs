//! Checksums of a file's description and of its RAM. They detect damage, but not forgery.

use arch::layout::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;

/// Bytes of RAM that have one checksum.
pub(super) const BLOCK: u64 = 2 << 20;

/// Whether all bytes of a page are zero.
pub(super) fn is_zero(page: &[u8]) -> bool {
    let (words, _) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0)
}

/// A checksum of bytes. It has four sums, each over every fourth word. Every step of a sum is invertible, so a change of one word always
/// changes the result.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut sums = [1_u64, 2, 3, 4];
    let step = |sum: u64, word: [u8; 8]| {
        ((sum ^ u64::from_le_bytes(word)).wrapping_mul(FACTOR)).rotate_left(29)
    };
    let (blocks, rest) = bytes.as_chunks::<32>();
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = step(*sum, *word);
        }
    }
    let tail =
        rest.iter().fold(bytes.len() as u64, |sum, byte| step(sum, u64::from(*byte).to_le_bytes()));
    sums.iter().fold(tail, |sum, lane| step(sum, lane.to_le_bytes()))
}

/// The checksum of a block of RAM, over its pages that are not zero and their positions. A block of zeroes has the checksum 0.
pub(super) fn block_checksum(block: &[u8]) -> u64 {
    block.chunks(PAGE).enumerate().filter(|(_, page)| !is_zero(page)).fold(0, |sum, (at, page)| {
        (sum ^ checksum(page)).wrapping_mul(2 * at as u64 + 3).wrapping_add(1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_counts_in_a_checksum() {
        let mut block = vec![0; 3 * PAGE];
        assert_eq!(block_checksum(&block), 0);
        block[PAGE] = 1;
        let one = block_checksum(&block);
        block.rotate_right(PAGE);
        assert_ne!(one, block_checksum(&block), "the place counts");
        let text: Vec<u8> = (0..100).collect();
        let sum = checksum(&text);
        for at in 0..text.len() {
            let mut other = text.clone();
            other[at] ^= 0x10;
            assert_ne!(checksum(&other), sum, "byte {at}");
            assert_ne!(checksum(&text[..at]), sum, "cut at {at}");
        }
    }
}
