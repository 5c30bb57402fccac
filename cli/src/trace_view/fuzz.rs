//! Traces that are anything, and what their pictures and replays promise.

use std::fmt::Write;
use std::io::BufReader;

use minivmm_fuzz::Input;
use minivmm_tests::xml::{Element, elements};
use serde_json::json;

use super::{MARKS_MAX, read};
use crate::replay;

const NAMES: &[&str] = &[
    "virtio_blk_handle_write",
    "virtio_blk_handle_",
    "virtio_blk_submit",
    "virtio_blk_submit_multireq",
    "virtio_blk_rw_complete",
    "virtio_blk_req_complete",
    "virtio_notify",
    "kvm_run_exit",
    "irq_pulse",
    "lost",
];

const KINDS: [&str; 7] = ["Read", "Write", "Flush", "Discard", "WriteZeroes", "GetId", ""];

/// A line that is an event or, rarely, any bytes.
fn line(input: &mut Input<'_>, time: &mut f64, out: &mut Vec<u8>) {
    if input.below(32) == 31 {
        return out.extend_from_slice(input.sized());
    }
    *time = match input.below(32) {
        31 => f64::from(input.u32()) * 1e9,
        30 => -1.0,
        29 => 0.0,
        step => *time + step as f64 / 4.0,
    };
    let mut event = json!({ "event": input.pick(NAMES), "time_us": *time, "disk": "vda" });
    let choices = input.u8();
    let mut field = |bit: u8, name: &str, value: serde_json::Value| {
        if choices & 1 << bit != 0 {
            event[name] = value;
        }
    };
    let request = input.below(8);
    field(0, "req", json!(request));
    field(0, "kind", json!(KINDS[request as usize % KINDS.len()]));
    field(0, "nsectors", json!(request * 3));
    field(1, "reqs", json!([request, request + 1, "x", -1]));
    field(2, "since_us", json!(f64::from(input.u16()) - 10.0));
    field(3, "sector", json!(input.u16()));
    field(4, "thread", json!(String::from_utf8_lossy(input.bytes(2))));
    field(5, "reason", json!(String::from_utf8_lossy(input.bytes(3))));
    field(6, "event", json!(format!("virtio_blk_handle_{}", char::from(input.u8()))));
    field(7, "time_us", json!(null));
    out.extend_from_slice(event.to_string().as_bytes());
    out.push(b'\n');
}

#[test]
fn trace_view() {
    minivmm_fuzz::run("cli/trace_view", |input| {
        let requests = 1 + input.below(100);
        let (mut time, mut bytes) = (0.0, Vec::new());
        while !input.is_empty() {
            line(input, &mut time, &mut bytes);
        }
        replay::tests::keeps_its_bounds(&bytes);
        let trace = match read(BufReader::new(&bytes[..]), requests) {
            Ok(trace) => trace,
            Err(error) => {
                let mut text = String::new();
                return write!(text, "{error}").unwrap();
            }
        };
        assert!((1..=requests).contains(&(trace.lives.len() as u64)));
        assert!(trace.marks.len() <= MARKS_MAX);
        let elements = elements(&trace.svg());
        let picture = elements.last().unwrap();
        let number = |element: &Element, name: &str| element.number(name).unwrap();
        let (width, height) = (number(picture, "width"), number(picture, "height"));
        let boxes = elements.iter().filter(|element| {
            element.name == "rect" && element.attributes.iter().any(|(name, _)| name == "x")
        });
        for part in boxes {
            let (right, bottom) = (
                number(part, "x") + number(part, "width"),
                number(part, "y") + number(part, "height"),
            );
            assert!(number(part, "x") >= 0.0 && right <= width, "{part:?}, {width}");
            assert!(number(part, "y") >= 0.0 && bottom <= height, "{part:?}, {height}");
        }
        let labels = elements.iter().filter(|element| element.name == "text");
        assert!(labels.count() > trace.lives.len());
    });
}
