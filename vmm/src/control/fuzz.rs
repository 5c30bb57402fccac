//! Fuzz target: a client that sends any bytes, in any pieces.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use minivmm_fuzz::Input;
use serde_json::{Value, json};

use super::arguments::Arguments;
use super::client::Client;
use super::commands;
use super::framing::{Frame, Framer};
use super::protocol::{Failure, Request, answer};

/// What the client sends: the fuzzer's input mixed with words of the protocol, cut into pieces.
fn pieces(input: &mut Input<'_>) -> Vec<Vec<u8>> {
    let words: [&[u8]; 12] = [
        b"{\"execute\":\"",
        b"{'execute':'",
        b"\",\"arguments\":{",
        b"\"id\":",
        b"}}",
        b"{\"execute\":\"qmp_capabilities\"}",
        b"\\u0061",
        b"block_set_io_throttle",
        b"query-status",
        b"[",
        b"\xff",
        b"\n",
    ];
    let mut pieces = Vec::new();
    while !input.is_empty() {
        let mut piece = Vec::new();
        for _ in 0..input.below(8) {
            match input.below(16) {
                word @ 0..12 => piece.extend_from_slice(words[word as usize]),
                _ => {
                    let count = input.below(64) as usize;
                    piece.extend_from_slice(input.bytes(count));
                }
            }
        }
        pieces.push(piece);
    }
    pieces
}

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Value(Vec<u8>),
    Garbage,
}

fn frames(framer: &mut Framer) -> Vec<Seen> {
    let mut frames = Vec::new();
    while let Some(frame) = framer.next() {
        frames.push(match frame {
            Frame::Value(bytes) => Seen::Value(bytes.to_vec()),
            Frame::Garbage => Seen::Garbage,
            Frame::TooLong => panic!("an input is shorter than the longest value"),
        });
    }
    frames
}

/// Checks that frames do not depend on where the pieces end, and that 0xff resets the parser after any input.
fn check_framing(pieces: &[Vec<u8>]) -> Vec<Seen> {
    let (mut whole, mut cut) = (Framer::default(), Framer::default());
    whole.push(&pieces.concat());
    let mut seen = Vec::new();
    for piece in pieces {
        cut.push(piece);
        seen.append(&mut frames(&mut cut));
    }
    assert_eq!(frames(&mut whole), seen);
    whole.push(b"\xff\n{}");
    assert_eq!(frames(&mut whole).pop(), Some(Seen::Value(b"{}".to_vec())));
    seen
}

/// Checks that [`super::json`] agrees with serde_json, except for single quotes and duplicate keys.
fn check_json(bytes: &[u8]) {
    if bytes.contains(&b'\'') {
        return;
    }
    match (super::json::parse(bytes), serde_json::from_slice::<Value>(bytes)) {
        (Ok(ours), Ok(theirs)) => assert_eq!(ours, theirs),
        (Err(error), Ok(_)) => assert!(error.to_string().contains("duplicate key"), "{error}"),
        (Ok(ours), Err(error)) => panic!("{ours} is not JSON: {error}"),
        (Err(_), Err(_)) => {}
    }
}

/// Answers as the server does, but without a machine.
fn execute(request: &Request) -> Result<Value, Failure> {
    let Some(known) = commands::arguments_of(&request.command) else {
        return Err(Failure::command_not_found("there is no machine"));
    };
    Arguments::check(known, &request.arguments).map(|_| json!({}))
}

#[test]
fn qmp() {
    minivmm_fuzz::run("vmm/qmp", |input| {
        let pieces = pieces(input);
        let seen = check_framing(&pieces);
        for frame in &seen {
            if let Seen::Value(bytes) = frame {
                check_json(bytes);
            }
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let (mut client, mut answers, mut asked) = (Client::new(ours), Vec::new(), 0);
        for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
            theirs.write_all(piece).unwrap();
            // Answers wait until the client reads, and further commands wait until it has read those answers.
            let mut turns = 0..100;
            while turns.next().is_some() {
                client.read().unwrap();
                let request = client.next_request().unwrap();
                if let Some(request) = &request {
                    asked += 1;
                    client.reply(request.id.clone(), execute(request));
                }
                client.write().unwrap();
                let mut chunk = [0; 65536];
                let count = theirs.read(&mut chunk).unwrap_or(0);
                answers.extend_from_slice(&chunk[..count]);
                if request.is_none() && count == 0 {
                    break;
                }
            }
            assert!(turns.next().is_some(), "one piece keeps the server busy");
        }
        client.write().unwrap();
        let _ = theirs.read_to_end(&mut answers);
        let lines: Vec<_> =
            answers.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
        // The greeting, and an answer to each frame.
        assert_eq!(lines.len(), 1 + seen.len(), "{asked} commands");
        for line in &lines[1..] {
            let line: Value = serde_json::from_slice(line).unwrap();
            assert_ne!(line.get("return").is_some(), line.get("error").is_some(), "{line}");
        }
        // The `id` of a request is valid JSON in the answer.
        let id = Some(json!({ "a": pieces.len() }));
        assert!(answer(id, Ok(json!({}))).to_string().contains("\"a\""));
    });
}
