//! Fuzz target: guest memory is saved again and again, each time as an increment on the previous file.

use std::collections::BTreeSet;

use vm_memory::{Bytes, GuestAddress};

use super::tests::{PAGE, chain, content, ram, save, write};
use super::*;
use crate::memory;

/// Pages are written, zeroed and read, and memory is cleared as by a reset. In between, memory is saved as an increment and restored.
#[test]
fn increments() {
    minivmm_fuzz::run("vmm/increments", |input| {
        page_map::open_page_map();
        let pages = 512 * input.below(3) as usize + 1 + input.below(64) as usize;
        let mut memory = ram(pages);
        let mut files = vec![];
        // Pages that may be in the next increment, and those that differ from the previous file.
        let (mut touched, mut before) = (BTreeSet::new(), content(&memory, pages));
        let mut mapped = None;
        while !input.is_empty() && files.len() < BASES_MAX {
            let page = input.u16() as usize % pages;
            match input.below(8) {
                0..3 => {
                    write(&memory, page, input.u8());
                    touched.insert(page);
                }
                3 => {
                    write(&memory, page, 0);
                    touched.insert(page);
                }
                4 => {
                    let mut byte = [0];
                    memory.read_slice(&mut byte, GuestAddress((page * PAGE) as u64)).unwrap();
                    // If no file is mapped there, the read has allocated a page of zeroes.
                    touched.insert(page);
                }
                5 if input.u8() == 0 => {
                    memory::clear(&memory).unwrap();
                    touched.extend(0..pages);
                }
                _ => {
                    let file = save(&memory, mapped.as_deref());
                    let now = content(&memory, pages);
                    for page in 0..pages {
                        let bytes = page * PAGE..(page + 1) * PAGE;
                        let differs = now[bytes.clone()] != before[bytes];
                        if mapped.is_some() {
                            assert!(file.has(page) || !differs, "page {page} is missing");
                            assert!(!file.has(page) || touched.contains(&page), "page {page}");
                        }
                    }
                    files.insert(0, file);
                    let copy = ram(pages);
                    chain(&files).copy(Some(&copy)).unwrap();
                    assert!(content(&copy, pages) == now, "the copy differs");
                    memory = ram(pages);
                    assert!(chain(&files).map(&memory).unwrap().is_some());
                    mapped = Some(PageMap::read().unwrap().files);
                    // A comparison would touch pages.
                    let other = ram(pages);
                    assert!(chain(&files).map(&other).unwrap().is_some());
                    assert!(content(&other, pages) == now, "what is mapped differs");
                    before = now;
                    touched.clear();
                }
            }
        }
    });
}
