//! The escape key on a terminal: `Ctrl-A` and the key after it are for minivmm and not for the guest.

const CTRL_A: u8 = 1;

/// What `Ctrl-A h` prints.
pub(super) const HELP: &str = "\r\nminivmm console keys:\r\n\
    \x20 Ctrl-A h       this help\r\n\
    \x20 Ctrl-A x       quit minivmm\r\n\
    \x20 Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// What a typed byte means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Typed {
    Byte(u8),
    Help,
    Quit,
    /// Not a byte: the terminal has hung up.
    HungUp,
}

/// Whether the last byte was the escape key.
#[derive(Debug, Default)]
pub(super) struct Escape {
    pending: bool,
}

impl Escape {
    /// What `byte` means after the bytes before it. `None`: it means nothing, or its meaning depends on the next byte.
    pub(super) fn typed(&mut self, byte: u8) -> Option<Typed> {
        if !std::mem::replace(&mut self.pending, false) {
            self.pending = byte == CTRL_A;
            return (!self.pending).then_some(Typed::Byte(byte));
        }
        match byte {
            b'x' => Some(Typed::Quit),
            b'h' | b'?' => Some(Typed::Help),
            CTRL_A => Some(Typed::Byte(CTRL_A)),
            // As QEMU: an unknown key after Ctrl-A is dropped with it.
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &[u8]) -> Vec<Typed> {
        let mut escape = Escape::default();
        text.iter().filter_map(|&byte| escape.typed(byte)).collect()
    }

    #[test]
    fn ordinary_bytes_pass() {
        assert_eq!(all(b"xh"), [Typed::Byte(b'x'), Typed::Byte(b'h')]);
    }

    #[test]
    fn escapes_are_taken_out() {
        assert_eq!(
            all(b"a\x01h\x01\x01\x01zb\x01x"),
            [Typed::Byte(b'a'), Typed::Help, Typed::Byte(1), Typed::Byte(b'b'), Typed::Quit]
        );
    }
}
