//! A guest that knows the mark and writes anything, beside a second decoder that sees the whole stream at once.

use super::frames::Frames;

const MARK: &str = "\x01ab ";
const STATUS_DIGITS_MAX: usize = 3;

fn find(text: &[u8], word: &[u8]) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word)
}

/// The status at the start of `text`.
fn status(text: &[u8]) -> Option<u8> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = text.get(..digits).filter(|_| (1..=STATUS_DIGITS_MAX).contains(&digits))?;
    let number = str::from_utf8(number).ok()?.parse().ok()?;
    (text.get(digits) == Some(&b';')).then_some(number)
}

fn decode(stream: &[u8]) -> (Vec<u8>, Option<u8>) {
    let mut text = Vec::new();
    for (at, byte) in stream.iter().enumerate() {
        if *byte != b'\r' || stream.get(at + 1) != Some(&b'\n') {
            text.push(*byte);
        }
    }
    let begin = format!("{MARK}begin;\n").into_bytes();
    let Some(at) = find(&text, &begin) else { return (Vec::new(), None) };
    let output = &text[at + begin.len()..];
    let end = format!("{MARK}end ").into_bytes();
    let mut from = 0;
    while let Some(at) = find(&output[from..], &end) {
        if let Some(status) = status(&output[from + at + end.len()..]) {
            return (output[..from + at].to_vec(), Some(status));
        }
        from += at + 1;
    }
    (output.to_vec(), None)
}

#[test]
fn frames() {
    minivmm_fuzz::run("vmm/frames", |input| {
        let words = [
            "\x01",
            MARK,
            "begin;",
            "\r",
            "\n",
            "\r\n",
            "\x01ab begin;\r\n",
            "\x01ab end ",
            "7",
            "255",
            ";",
        ];
        let (mut frames, mut output, mut stream) = (Frames::new(MARK), Vec::new(), Vec::new());
        while !input.is_empty() {
            let bytes = match input.below(16) {
                word if (word as usize) < words.len() => words[word as usize].as_bytes(),
                _ => input.bytes(1),
            };
            stream.extend_from_slice(bytes);
            bytes.iter().for_each(|byte| frames.push(*byte, &mut output));
        }
        frames.finish(&mut output);
        assert_eq!((output, frames.status()), decode(&stream));
    });
}
