//! Guest memory that is saved on the file before, again and again.

use std::collections::BTreeSet;

use vm_memory::{Bytes, GuestAddress};

use super::tests::{PAGE, chain, content, ram, save, write};
use super::*;
use crate::memory;

/// Any pages are written, zeroed and read, memory is cleared as by a reset, and in between it is saved on the file before and restored.
#[test]
fn increments() {
    minivmm_fuzz::run("vmm/increments", |input| {
        page_map::open_page_map();
        let pages = 512 * input.below(3) as usize + 1 + input.below(64) as usize;
        let mut memory = ram(pages);
        let mut files = vec![];
        // Pages that may be in the next increment, and those that differ from the file before.
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
                    // Where no file is, the host has given a page of zeroes.
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
                    // To compare it would touch pages.
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
