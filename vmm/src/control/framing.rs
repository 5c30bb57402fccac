//! Cuts a client's bytes into JSON values. QMP puts nothing between them: a value ends where its brackets close.

/// Longest value in bytes. QMP's longest sensible command is a few hundred.
const LENGTH_MAX: usize = 1 << 20;

/// A client's bytes that were not yet understood. Each byte is looked at once, however slowly they arrive.
#[derive(Debug, Default)]
pub(super) struct Framer {
    bytes: Vec<u8>,
    /// First byte that belongs to no frame yet.
    start: usize,
    /// First byte that was not looked at.
    scanned: usize,
    /// Open brackets.
    depth: usize,
    in_string: bool,
    escaped: bool,
}

/// A piece of the stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    /// From an opening bracket to the one that closes it: probably a JSON value.
    Value(&'a [u8]),
    /// Something else, now forgotten up to the end of its line.
    Garbage,
    /// More than any value may have: the stream cannot be followed any further.
    TooLong,
}

impl Framer {
    /// Adds bytes from the client.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next piece, if it is there in full.
    pub(super) fn next(&mut self) -> Option<Frame<'_>> {
        if self.depth == 0 {
            let rest = &self.bytes[self.start..];
            let skipped = rest.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(rest.len());
            self.start += skipped;
            self.scanned = self.start;
            if !matches!(self.bytes.get(self.start)?, b'{' | b'[') {
                let rest = &self.bytes[self.start..];
                self.start += rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
                self.scanned = self.start;
                return Some(Frame::Garbage);
            }
        }
        while let Some(&byte) = self.bytes.get(self.scanned) {
            self.scanned += 1;
            if self.closes(byte) {
                let frame = self.start..self.scanned;
                self.start = self.scanned;
                return Some(Frame::Value(&self.bytes[frame]));
            }
        }
        (self.scanned - self.start > LENGTH_MAX).then_some(Frame::TooLong)
    }

    /// Follows the brackets. `true`: `byte` closes the last one.
    fn closes(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        self.depth == 0
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

    const STREAM: &str = "{\"a\":1}{\"b\":\"}\\\"{\"} \r\n[{}, [\"\\\\\"]]\n junk {\"not\": 1}\n{}";
    const EXPECTED: [&str; 5] = ["{\"a\":1}", "{\"b\":\"}\\\"{\"}", "[{}, [\"\\\\\"]]", "garbage", "{}"];

    #[test]
    fn values_need_nothing_between_them() {
        let mut framer = Framer::default();
        framer.push(STREAM.as_bytes());
        assert_eq!(frames(&mut framer), EXPECTED);
        assert_eq!(framer.next(), None);
    }

    #[test]
    fn bytes_may_come_one_by_one() {
        let mut framer = Framer::default();
        let mut all = Vec::new();
        // Without the line that is not JSON: how much of that is dropped depends on how much is there.
        for byte in STREAM.replace("junk {\"not\": 1}\n", "").bytes() {
            framer.push(&[byte]);
            all.extend(frames(&mut framer));
        }
        assert_eq!(all, ["{\"a\":1}", "{\"b\":\"}\\\"{\"}", "[{}, [\"\\\\\"]]", "{}"]);
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
        for _ in 0..1000 {
            framer.push(&[b'x'; 4096]);
            assert_eq!(frames(&mut framer), ["garbage"]);
        }
        assert!(framer.bytes.capacity() < 3 * 4096);
        framer.push(b"}]{}");
        assert_eq!(frames(&mut framer), ["garbage"]);
        framer.push(b"{}");
        assert_eq!(frames(&mut framer), ["{}"]);
    }
}
