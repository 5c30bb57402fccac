//! Runs a guest of the chapter *Ten-line guests*, and prints a line for each of its exits.

use minivmm_tests::ten_lines::{hello, interrupt, mmio, port, story};

fn main() {
    let guest = std::env::args().nth(1).unwrap_or_default();
    let code = match guest.as_str() {
        "hello" => hello(),
        "port" => port(),
        "mmio" => mmio(),
        "interrupt" => interrupt(),
        _ => return eprintln!("ten_lines: name a guest: hello, port, mmio, interrupt"),
    };
    for line in story(code, guest == "interrupt") {
        println!("{line}");
    }
}
