//! The chapter *follow one write* ends in a program; this is what it prints.

#[allow(dead_code, reason = "its main is for cargo run")]
#[path = "../examples/follow_one_write.rs"]
mod example;

#[test]
fn the_chapter_shows_what_its_program_prints() {
    let chapter = include_str!("../docs/follow-one-write.md");
    let (_, shown) = chapter.rsplit_once("```text\n").unwrap();
    let (shown, _) = shown.split_once("```").unwrap();
    assert_eq!(example::follow(), shown.lines().collect::<Vec<_>>());
}
