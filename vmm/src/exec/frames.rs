//! Finds the command's output and its status in what the guest writes to the serial port.
//!
//! `port` passes each byte to [`Frames`]. The guest's script writes `MARK begin;` and a newline, the command's output, and `MARK end
//! STATUS;`. MARK is random in each run, so no output looks like a frame by accident, and only a guest that got the mark can report a
//! status.
//!
//! The guest's terminal driver changes only newlines, each into a carriage return and a newline (ONLCR, the default of an 8250 port). So
//! one carriage return is removed before each newline.

/// The parts of the stream.
///
/// | state | input | next state |
/// |---|---|---|
/// | `Before` | `MARK begin;` and a newline; all else is dropped | `Output` |
/// | `Output` | any bytes: they are the command's output | `Output` |
/// | `Output` | `MARK end ` | `Status` |
/// | `Status` | a number up to 255 and `;` | `Ended` |
/// | `Status` | anything else: it was output | `Output` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Before,
    Output,
    Status,
    Ended(u8),
}

/// A decoder of the guest's stream.
#[derive(Debug)]
pub(super) struct Frames {
    begin: Vec<u8>,
    end: Vec<u8>,
    state: State,
    /// A carriage return that a newline may follow.
    has_return: bool,
    /// Bytes that may become a frame.
    held: Vec<u8>,
}

impl Frames {
    /// A decoder for frames with this mark.
    pub(super) fn new(mark: &str) -> Self {
        let frame = |rest| format!("{mark}{rest}").into_bytes();
        Self {
            begin: frame("begin;\n"),
            end: frame("end "),
            state: State::Before,
            has_return: false,
            held: Vec::new(),
        }
    }

    /// Called at a reset of the guest.
    pub(super) fn restart(&mut self) {
        self.state = State::Before;
        self.has_return = false;
        self.held.clear();
    }

    /// Whether the command was started.
    pub(super) fn has_begun(&self) -> bool {
        self.state != State::Before
    }

    /// The command's status, once it is known.
    pub(super) fn status(&self) -> Option<u8> {
        match self.state {
            State::Ended(status) => Some(status),
            State::Before | State::Output | State::Status => None,
        }
    }

    /// Takes a byte of the stream, and appends to `output` the bytes that are now known to be the command's output.
    pub(super) fn push(&mut self, byte: u8, output: &mut Vec<u8>) {
        if std::mem::replace(&mut self.has_return, byte == b'\r') && byte != b'\n' {
            self.push_decoded(b'\r', output);
        }
        if byte != b'\r' {
            self.push_decoded(byte, output);
        }
    }

    /// Called at the end of the stream: bytes that could have become a frame are output.
    pub(super) fn finish(&mut self, output: &mut Vec<u8>) {
        if std::mem::take(&mut self.has_return) {
            self.push_decoded(b'\r', output);
        }
        if matches!(self.state, State::Output | State::Status) {
            output.append(&mut self.held);
        }
    }

    fn push_decoded(&mut self, byte: u8, output: &mut Vec<u8>) {
        self.held.push(byte);
        match self.state {
            State::Before => {
                let length = output.len();
                self.release(output);
                output.truncate(length);
                if self.held == self.begin {
                    self.held.clear();
                    self.state = State::Output;
                }
            }
            State::Output => {
                self.release(output);
                if self.held == self.end {
                    self.state = State::Status;
                }
            }
            State::Status => self.push_status(byte, output),
            State::Ended(_) => self.held.clear(),
        }
    }

    /// Removes the bytes at the start of `held` that are not part of a frame.
    fn release(&mut self, output: &mut Vec<u8>) {
        let frame = if self.state == State::Before { &self.begin } else { &self.end };
        let is_start = |from: &usize| frame.starts_with(&self.held[*from..]);
        let kept = (0..self.held.len()).find(is_start).unwrap_or(self.held.len());
        output.extend(self.held.drain(..kept));
    }

    fn push_status(&mut self, byte: u8, output: &mut Vec<u8>) {
        let digits = &self.held[self.end.len()..self.held.len() - 1];
        if byte.is_ascii_digit() && digits.len() < 3 {
            return;
        }
        let status = str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
        if let (b';', Some(status)) = (byte, status) {
            self.state = State::Ended(status);
        } else {
            // No frame: its first byte is output, and the rest is looked at again.
            self.state = State::Output;
            let held = std::mem::take(&mut self.held);
            output.push(held[0]);
            held[1..].iter().for_each(|byte| self.push_decoded(*byte, output));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: &str = "\x01abcd ";

    /// What the terminal driver makes of the bytes.
    fn onlcr(bytes: &[u8]) -> Vec<u8> {
        bytes
            .iter()
            .flat_map(|byte| if *byte == b'\n' { &b"\r\n"[..] } else { std::slice::from_ref(byte) })
            .copied()
            .collect()
    }

    fn decoded(stream: &[u8]) -> (Vec<u8>, Option<u8>) {
        let (mut frames, mut output) = (Frames::new(MARK), Vec::new());
        onlcr(stream).into_iter().for_each(|byte| frames.push(byte, &mut output));
        frames.finish(&mut output);
        (output, frames.status())
    }

    fn framed(output: &[u8], rest: &str) -> Vec<u8> {
        [format!("{MARK}begin;\n").as_bytes(), output, rest.as_bytes()].concat()
    }

    #[test]
    fn any_output_passes_unchanged() {
        let every_pair: Vec<u8> =
            (0..=255).flat_map(|one| (0..=255).flat_map(move |other| [one, other])).collect();
        for output in [
            &b""[..],
            b"\n",
            b"\r",
            b"\r\n\r\r\n\n\r",
            b"no newline at the end",
            b"\x01abc\x01abcd \x01abcd en\x01abcd end",
            b"\x01abcd begin;\n",
            &every_pair,
        ] {
            assert_eq!(decoded(&framed(output, "\x01abcd end 7;\n")), (output.to_vec(), Some(7)));
            assert_eq!(decoded(&framed(output, "")), (output.to_vec(), None));
        }
    }

    #[test]
    fn only_a_whole_frame_is_a_status() {
        for (rest, status) in [("0", Some(0)), ("255", Some(255)), ("007", Some(7))] {
            let stream = framed(b"x", &format!("{MARK}end {rest};more"));
            assert_eq!(decoded(&stream), (b"x".to_vec(), status));
        }
        for rest in
            ["end ;", "end 256;", "end 1000;", "end -1;", "end 1 ;", "end 1\n", "end 1", "end x;"]
        {
            let text = format!("x{MARK}{rest}");
            assert_eq!(decoded(&framed(text.as_bytes(), "")), (text.into_bytes(), None), "{rest}");
        }
        let twice = format!("{MARK}end 1{MARK}end 2;");
        assert_eq!(decoded(&framed(b"", &twice)), (format!("{MARK}end 1").into_bytes(), Some(2)));
    }

    #[test]
    fn nothing_counts_before_the_command_begins() {
        let early = format!("noise {MARK}end 0;\n");
        assert_eq!(decoded(early.as_bytes()), (Vec::new(), None));
        let stream = [early.as_bytes(), &framed(b"x", &format!("{MARK}end 3;"))].concat();
        assert_eq!(decoded(&stream), (b"x".to_vec(), Some(3)));
    }
}
