//! A set of pages of guest RAM, one bit for each. Pages are counted in the order of RAM, across its ranges.

/// Pages of RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PageSet {
    /// The lowest bit of the first byte is the first page.
    bits: Vec<u8>,
    pages: usize,
}

impl PageSet {
    /// The set that a saved machine has in `bits`. `None` if they are not for this number of pages.
    pub(super) fn from_bits(bits: &[u8], pages: usize) -> Option<Self> {
        let unused = pages.next_multiple_of(8) - pages;
        let rest = bits.last().map_or(0, |last| last.leading_zeros() as usize);
        let fits = bits.len() == pages.div_ceil(8) && rest >= unused;
        fits.then(|| Self { bits: bits.to_vec(), pages })
    }

    pub(super) fn bits(&self) -> &[u8] {
        &self.bits
    }

    /// Appends a page, which is in the set or not.
    pub(super) fn push(&mut self, is_member: bool) {
        if self.pages.is_multiple_of(8) {
            self.bits.push(0);
        }
        if let Some(last) = self.bits.last_mut() {
            *last |= u8::from(is_member) << (self.pages % 8);
        }
        self.pages += 1;
    }

    pub(super) fn contains(&self, page: usize) -> bool {
        self.bits.get(page / 8).is_some_and(|byte| byte >> (page % 8) & 1 != 0)
    }

    /// Adds the pages of `other`.
    pub(super) fn add(&mut self, other: &Self) {
        self.bits.resize(self.bits.len().max(other.bits.len()), 0);
        self.pages = self.pages.max(other.pages);
        self.bits.iter_mut().zip(&other.bits).for_each(|(bits, other)| *bits |= other);
    }

    /// How many pages are in the set.
    pub(super) fn count(&self) -> u64 {
        self.bits.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_read_as_it_was_written() {
        let mut set = PageSet::default();
        let pages: Vec<_> = (0..21).map(|page| page % 3 == 1).collect();
        pages.iter().for_each(|is_member| set.push(*is_member));
        assert_eq!(PageSet::from_bits(set.bits(), 21), Some(set.clone()));
        assert!((0..30).all(|page| set.contains(page) == (page < 21 && page % 3 == 1)));
        assert_eq!(set.count(), 7);
        let mut more = PageSet::default();
        more.push(true);
        more.add(&set);
        assert!(more.contains(0) && more.contains(19) && more.count() == 8);
    }

    #[test]
    fn bits_of_other_pages_are_no_set() {
        assert_eq!(PageSet::from_bits(&[], 0), Some(PageSet::default()));
        assert!(PageSet::from_bits(&[0xff], 8).is_some());
        for (bits, pages) in [(&[0x80][..], 7), (&[1], 9), (&[1, 1], 8), (&[], 1)] {
            assert_eq!(PageSet::from_bits(bits, pages), None);
        }
    }
}
