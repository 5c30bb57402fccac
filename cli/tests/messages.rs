//! Every message for bad input, word for word: what failed, the option and its value, why, and what to do about it. The rows
//! are in `messages.txt`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use minivmm_tests::minivmm;
use support::{files, refused};

#[test]
fn each_line_is_pinned_and_nothing_is_changed() {
    let directory = files();
    let mut complaints = String::new();
    let rows = include_str!("messages.txt").lines();
    let mut rows = rows.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut count = 0;
    while let (Some(arguments), Some(line)) = (rows.next(), rows.next()) {
        let mut words: Vec<_> = arguments.split_whitespace().skip(1).collect();
        let commands = ["check", "ctl", "powercut", "replay", "show", "trace-view"];
        let complete = words.len() < 2 || commands.contains(&words[0]);
        for [option, value] in [["--console", "file:log"], ["--memory", "32M"]] {
            if !complete && !arguments.contains(option) {
                words.extend([option, value]);
            }
        }
        let mut command = minivmm(words.into_iter().map(bytes));
        let expected = format!("minivmm: {}\n", line.trim());
        let (start, end) = expected.split_once("{n}").unwrap_or((&expected, ""));
        let is_as_expected = |line: &str| {
            line.strip_prefix(start)
                .and_then(|rest| rest.strip_suffix(end))
                .is_some_and(|number| number.is_empty() != expected.contains("{n}"))
        };
        let complaint = match refused(directory.path(), &mut command, 2) {
            Ok(ended) if is_as_expected(&ended.errors) => continue,
            Ok(ended) => format!("  - {}\n  + {}", line.trim(), ended.errors),
            Err(complaint) => format!("  ! {complaint}\n"),
        };
        complaints += &format!("{arguments}\n{complaint}");
        count += 1;
    }
    assert!(complaints.is_empty(), "{count} complaints\n{complaints}");
}

/// `%ff` becomes that byte.
fn bytes(word: &str) -> OsString {
    let mut parts = word.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(&part[..2], 16).unwrap());
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    OsString::from_vec(bytes)
}
