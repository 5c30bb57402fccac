//! The serial console's host side.
//!
//! Output: a vCPU puts bytes into a bounded buffer and never waits. The thread `console` writes them to the host ([`output`]).
//!
//! Input: [`serial_console`] is a source of the main loop. It reads as much as the UART has room for ([`input`]), and finds the escape
//! key on a terminal ([`escape`]).
//!
//! [`open`] opens the host side as `--console` says, as a value of [`ends`].

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
