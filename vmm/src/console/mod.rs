//! The serial console's host side.
//!
//! Output: a vCPU puts bytes into a bounded buffer and never waits; the thread `console` moves them to the host ([`output`]).
//! Input: [`serial_console`], a source of the main loop, reads from the host what the UART has room for ([`input`]), and
//! recognizes the escape key of a terminal's user ([`escape`]). [`open`] opens the host side as `--console` says, and
//! [`ends`] is what the others know of it.

mod backends;
mod ends;
mod escape;
mod input;
mod open;
mod output;
mod ports;
mod serial_console;

pub(crate) use output::write_all;
pub(crate) use ports::attach_ports;
