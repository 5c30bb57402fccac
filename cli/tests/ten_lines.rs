//! The guests of the chapter *Ten-line guests* are those of the sources, and do what it says.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;

use minivmm_tests::guest::Program;
use minivmm_tests::session::Session;
use minivmm_tests::ten_lines::{hello, interrupt, mmio, port, story};
use minivmm_tests::{BOUND, kvm_is_usable, small_guest};
use tempfile::tempdir;

const CHAPTER: &str = include_str!("../../tests/docs/ten-line-guests.md");

/// The blocks of the chapter in this language.
fn blocks(language: &str) -> Vec<&str> {
    let begin = format!("```{language}\n");
    CHAPTER.split(&begin).skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

#[test]
fn the_chapter_has_the_sources() {
    let sources = [
        include_str!("../../tests/src/ten_lines/hello.s"),
        include_str!("../../tests/src/ten_lines/port.s"),
        include_str!("../../tests/src/ten_lines/mmio.s"),
        include_str!("../../tests/src/ten_lines/interrupt.s"),
        include_str!("../../tests/src/ten_lines/virtqueue.s"),
    ];
    assert_eq!(blocks("asm"), sources);
}

#[test]
fn each_exit_is_as_the_chapter_shows_it() {
    if !kvm_is_usable() {
        return;
    }
    let stories = [(hello(), false), (port(), false), (mmio(), false), (interrupt(), true)]
        .map(|(code, takes_interrupts)| story(code, takes_interrupts).join("\n") + "\n");
    assert_eq!(blocks("text"), stories);
}

#[test]
fn the_request_by_hand_reads_the_disk() {
    if !kvm_is_usable() {
        return;
    }
    let directory = tempdir().unwrap();
    let mut image = b"first sector\n".to_vec();
    image.resize(1 << 20, 0);
    fs::write(directory.path().join("disk.img"), image).unwrap();
    let mut command = small_guest(directory.path(), Program::Virtqueue);
    let ended = Session::start(command.args(["--disk", "disk.img"])).wait(BOUND).must_be(0);
    assert_eq!(ended.output, b"first sector\n", "{ended}");
}
