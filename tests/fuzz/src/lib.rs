//! What a fuzz target is made of. A target is an ordinary unit test, in a module named `fuzz`, that calls [`run`] with its name
//! and a function that plays one input and asserts what must hold.
//!
//! `cargo test` plays the inputs of the target's corpus, a file in `tests/fuzz/corpus`. `resources/fuzz` (`make fuzz`)
//! builds the same tests with coverage counters and `--cfg fuzzing`. Then [`run`] hands the target to libFuzzer, which looks
//! for inputs that reach more code. Both work with a stable compiler.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by panicking"
)]

mod corpus;
#[cfg(fuzzing)]
mod engine;

use std::path::PathBuf;

/// Names a file whose bytes are the one input to play: what libFuzzer wrote when a target failed.
const ONE_INPUT: &str = "MINIVMM_FUZZ_INPUT";
/// Names a directory whose files become the target's corpus.
const PACK: &str = "MINIVMM_FUZZ_PACK";

/// Plays the inputs of the target `name` (such as `devices/block`), or fuzzes it when `resources/fuzz` runs.
///
/// # Panics
/// When the target does, or its corpus is missing.
pub fn run(name: &str, target: fn(&mut Input<'_>)) {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    if let Some(path) = variable(ONE_INPUT) {
        return target(&mut Input::new(&std::fs::read(path).unwrap()));
    }
    if let Some(directory) = variable(PACK) {
        return corpus::pack(name, &directory);
    }
    #[cfg(fuzzing)]
    engine::run(name, target);
    #[cfg(not(fuzzing))]
    for (number, bytes) in corpus::inputs(name) {
        println!("{name}: line {number}");
        target(&mut Input::new(&bytes));
    }
}

/// The bytes of an input, as the values that a target asks for. After the last byte everything is 0, so that a target ends
/// by [`is_empty`](Self::is_empty).
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether all bytes were taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All bytes that are left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// The next bytes, at most `count`.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `limit`, of one byte if that is enough and of four if not. 0 if `limit` is.
    pub fn below(&mut self, limit: u64) -> u64 {
        let number = if limit <= 256 { u64::from(self.u8()) } else { u64::from(self.u32()) };
        number.checked_rem(limit).unwrap_or(0)
    }

    /// One of `choices`, which must not be empty.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Whether something holds.
    pub fn bool(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// Bytes of any length up to 65535, with a length of two bytes in front. What the input lacks is missing at the end.
    pub fn sized(&mut self) -> &'a [u8] {
        let count = self.u16();
        self.bytes(count.into())
    }
}
