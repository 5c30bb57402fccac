//! Finds a debugger's packets in the bytes that it sends, and checks their checksums.
//!
//! After a wrong checksum, GDB's protocol answers `-`, which asks for the packet again, but gdbstub ends the connection. So [`Packets`]
//! checks packets first, and [`server`](super::server) sends the `-`.
//!
//! GDB itself sends `-` when a reply takes more than two seconds, as while the machine comes to a stop. The reply is on its way then, and a
//! socket damages none, so that `-` is ignored. gdbstub would end the connection.
//!
//! Other bytes outside of packets are passed on to gdbstub, which ends the connection. That keeps web pages out: a page can make a browser send
//! packets to a port of the loopback interface, but only after the first lines of an HTTP request.

use std::mem;

/// Most bytes of a packet. gdbstub ends the connection at a longer one.
const LONGEST: usize = 4096;

/// The result of a further byte.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// The byte is part of a packet that is not complete, or one to be ignored.
    Incomplete,
    /// Bytes for gdbstub: a packet, or bytes outside of packets.
    Whole(Vec<u8>),
    /// A packet with a wrong checksum.
    Damaged,
}

/// The part of a packet that was received, from `$` on.
#[derive(Debug, Default)]
pub(super) struct Packets(Vec<u8>);

impl Packets {
    pub(super) fn push(&mut self, byte: u8) -> Piece {
        self.0.push(byte);
        match self.0[..] {
            [b'$', ref body @ .., b'#', high, low] => {
                let sum = body.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
                let is_right = format!("{sum:02x}").as_bytes().eq_ignore_ascii_case(&[high, low]);
                let packet = mem::take(&mut self.0);
                if is_right { Piece::Whole(packet) } else { Piece::Damaged }
            }
            [b'$', ..] if self.0.len() <= LONGEST => Piece::Incomplete,
            [b'-'] => {
                self.0.clear();
                Piece::Incomplete
            }
            _ => Piece::Whole(mem::take(&mut self.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(bytes: &[u8]) -> Vec<Piece> {
        let mut packets = Packets::default();
        let pieces = bytes.iter().map(|byte| packets.push(*byte));
        pieces.filter(|piece| *piece != Piece::Incomplete).collect()
    }

    #[test]
    fn packets_are_whole_or_damaged_and_the_rest_goes_on() {
        let whole = |bytes: &[u8]| Piece::Whole(bytes.to_vec());
        assert_eq!(
            pieces(b"+$?#3f-$?#3F\x03$#00"),
            [whole(b"+"), whole(b"$?#3f"), whole(b"$?#3F"), whole(b"\x03"), whole(b"$#00")]
        );
        for damaged in ["$?#40", "$?#zz", "$?#+f", "$?##3", "$?#\u{e9}"] {
            assert_eq!(
                pieces(format!("{damaged}$?#3f").as_bytes()),
                [Piece::Damaged, whole(b"$?#3f")],
                "{damaged}"
            );
        }
        assert_eq!(pieces(b"GET")[..2], [whole(b"G"), whole(b"E")]);
        let overlong = [&b"$"[..], &[b'm'; LONGEST]].concat();
        assert_eq!(pieces(&overlong), [whole(&overlong)]);
    }
}
