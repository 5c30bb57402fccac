//! Cuts a client's bytes into JSON values. QMP has no separator between messages: a value ends where its brackets close.
//!
//! A byte that is never part of JSON, such as a control character or 0xff, resets this parser. A client sends it if it does not know what
//! was sent before (QEMU, docs/interop/qmp-spec.rst, "Forcing the JSON parser into known-good state").

/// Longest value in bytes. The longest useful QMP command has a few hundred.
const LENGTH_MAX: usize = 1 << 20;
/// Deepest nesting of brackets, as in QEMU.
const DEPTH_MAX: usize = 1024;

/// A client's bytes that were not returned as frames yet. Each byte is scanned once, however many reads deliver a frame.
#[derive(Debug, Default)]
pub(super) struct Framer {
    bytes: Vec<u8>,
    /// Index of the first byte that was not returned.
    start: usize,
    /// Index of the first byte that was not scanned.
    scanned: usize,
    depth: usize,
    quote: Option<u8>,
    escaped: bool,
    /// After garbage: bytes are skipped up to the end of the line or to an opening bracket.
    skipping: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    /// From an opening bracket or quote to the one that closes it: probably a JSON value.
    Value(&'a [u8]),
    /// Bytes that are no JSON. They were dropped, with an incomplete value before them.
    Garbage,
    /// A value is longer than `LENGTH_MAX`. Where the next one begins is not known, so the client has to be disconnected.
    TooLong,
}

/// What a byte means after those before it.
enum Meaning {
    Space,
    Part,
    End,
    Garbage,
}

impl Framer {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next frame. `None`: it is not complete yet.
    pub(super) fn next(&mut self) -> Option<Frame<'_>> {
        while let Some(&byte) = self.bytes.get(self.scanned) {
            self.scanned += 1;
            self.skipping &= !matches!(byte, b'{' | b'[' | b'\n');
            match if self.skipping { Meaning::Space } else { self.meaning(byte) } {
                Meaning::Part => {}
                Meaning::Space => self.start = self.scanned,
                Meaning::End => {
                    let frame = self.start..self.scanned;
                    self.start = self.scanned;
                    return Some(Frame::Value(&self.bytes[frame]));
                }
                Meaning::Garbage => {
                    self.start = self.scanned;
                    (self.depth, self.quote, self.escaped) = (0, None, false);
                    self.skipping = byte != b'\n';
                    return Some(Frame::Garbage);
                }
            }
        }
        (self.scanned - self.start > LENGTH_MAX).then_some(Frame::TooLong)
    }

    /// Updates the nesting of brackets and quotes, and returns what the byte means.
    fn meaning(&mut self, byte: u8) -> Meaning {
        if let Some(quote) = self.quote {
            match byte {
                // JSON has control characters only as escapes, and these two bytes are never part of UTF-8.
                0..0x20 | 0xfe | 0xff => return Meaning::Garbage,
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                _ if byte == quote => self.quote = None,
                _ => {}
            }
            return if self.quote.is_none() && self.depth == 0 {
                Meaning::End
            } else {
                Meaning::Part
            };
        }
        match byte {
            b'"' | b'\'' => self.quote = Some(byte),
            b'{' | b'[' if self.depth < DEPTH_MAX => self.depth += 1,
            b' ' | b'\t' | b'\r' | b'\n' if self.depth == 0 => return Meaning::Space,
            b'\t' | b'\r' | b'\n' => {}
            _ if self.depth == 0 => return Meaning::Garbage,
            b'}' | b']' => {
                self.depth -= 1;
                if self.depth == 0 {
                    return Meaning::End;
                }
            }
            b'{' | b'[' | 0..0x20 | 0x7f.. => return Meaning::Garbage,
            _ => {}
        }
        Meaning::Part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(framer: &mut Framer) -> Vec<String> {
        let mut frames = Vec::new();
        while let Some(frame) = framer.next() {
            frames.push(match frame {
                Frame::Value(bytes) => String::from_utf8(bytes.to_vec()).unwrap(),
                Frame::Garbage => "garbage".to_owned(),
                Frame::TooLong => {
                    frames.push("too long".to_owned());
                    break;
                }
            });
        }
        frames
    }

    fn all(stream: &[u8]) -> Vec<String> {
        let mut framer = Framer::default();
        framer.push(stream);
        let frames = frames(&mut framer);
        assert_eq!(framer.next(), None);
        frames
    }

    const STREAMS: &[(&[u8], &[&str])] = &[
        (
            b"{\"a\":1}{\"b\":\"}\\\"{\"} \r\n[{}, [\"\\\\\"]]\n{'c': '\"}\\''}",
            &["{\"a\":1}", "{\"b\":\"}\\\"{\"}", "[{}, [\"\\\\\"]]", "{'c': '\"}\\''}"],
        ),
        (b"\"a {\" {}", &["\"a {\"", "{}"]),
        // Garbage ends at an opening bracket or the end of the line, and is reported once a line.
        (
            b"GET / HTTP/1.1\r\n\r\n junk, 1 {} more\n{}",
            &["garbage", "garbage", "{}", "garbage", "{}"],
        ),
        (b"}]\n}{}", &["garbage", "garbage", "{}"]),
        (b"\xef\xbb\xbf{}\0{}", &["garbage", "{}", "garbage", "{}"]),
        // A byte that is never part of JSON resets the parser, also within a string.
        (b"{\"a\n{}", &["garbage", "{}"]),
        (b"{\"a\\\xff{}", &["garbage", "{}"]),
        (b"[[[{\"a\": \x01\"{}", &["garbage", "{}"]),
        (b"[ 'a\xfe } ] {}", &["garbage", "{}"]),
    ];

    #[test]
    fn values_need_nothing_between_them() {
        for (stream, expected) in STREAMS {
            assert_eq!(all(stream), *expected, "{}", String::from_utf8_lossy(stream));
        }
    }

    #[test]
    fn bytes_may_come_one_by_one() {
        for (stream, expected) in STREAMS {
            let mut framer = Framer::default();
            let mut all = Vec::new();
            for byte in *stream {
                framer.push(&[*byte]);
                all.extend(frames(&mut framer));
            }
            assert_eq!(all, *expected, "{}", String::from_utf8_lossy(stream));
        }
    }

    #[test]
    fn brackets_in_brackets_have_an_end() {
        let nested = |depth: usize| [b"[".repeat(depth), b"]".repeat(depth)].concat();
        assert_eq!(all(&nested(DEPTH_MAX)).len(), 1);
        let endless = b"[".repeat(DEPTH_MAX + 1);
        assert_eq!(all(&[&endless[..], b"\n{}"].concat()), ["garbage", "{}"]);
    }

    #[test]
    fn a_value_without_end_is_given_up() {
        let mut framer = Framer::default();
        framer.push(b"{\"");
        let mut pushed = 2;
        let chunk = [b'x'; 4096];
        while framer.next().is_none() {
            framer.push(&chunk);
            pushed += chunk.len();
        }
        assert_eq!(framer.next(), Some(Frame::TooLong));
        assert!(pushed <= LENGTH_MAX + 2 * chunk.len());
    }

    #[test]
    fn garbage_is_forgotten() {
        let mut framer = Framer::default();
        framer.push(b"x");
        assert_eq!(frames(&mut framer), ["garbage"]);
        for _ in 0..1000 {
            framer.push(&[b'x'; 4096]);
            assert!(frames(&mut framer).is_empty());
        }
        assert!(framer.bytes.capacity() < 3 * 4096);
    }
}
