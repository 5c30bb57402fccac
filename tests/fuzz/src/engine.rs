//! libFuzzer as a library: it owns the loop and calls the target. Its arguments are words of an environment variable, since
//! the command line belongs to the test program.
#![expect(unsafe_code, reason = "libFuzzer's interface is C's")]

use std::ffi::{CString, c_char, c_int};
use std::path::Path;
use std::sync::OnceLock;

use libfuzzer_sys as _;

use crate::{Input, corpus};

/// libFuzzer's arguments, the first being the program that it starts to be started again.
const ARGUMENTS: &str = "MINIVMM_FUZZ";
/// Where to unpack the corpus to, if the arguments name that directory.
const SEEDS: &str = "MINIVMM_FUZZ_SEEDS";

static TARGET: OnceLock<fn(&mut Input<'_>)> = OnceLock::new();

unsafe extern "C" {
    fn LLVMFuzzerRunDriver(
        argc: *mut c_int,
        argv: *mut *mut *mut c_char,
        callback: extern "C" fn(*const u8, usize) -> c_int,
    ) -> c_int;
}

/// The entry that libfuzzer-sys expects of a program without this driver. It is never called.
// SAFETY: no other symbol has this name.
#[unsafe(no_mangle)]
extern "C" fn rust_fuzzer_test_input(_data: *const u8, _size: usize) -> c_int {
    0
}

/// A panic cannot leave a C function: it aborts the program, and libFuzzer writes the input to a file.
extern "C" fn play(data: *const u8, size: usize) -> c_int {
    // SAFETY: libFuzzer passes `size` bytes, which it leaves alone during the call. With 0 bytes the pointer may be null.
    let bytes = if size == 0 { &[] } else { unsafe { std::slice::from_raw_parts(data, size) } };
    TARGET.get().unwrap()(&mut Input::new(bytes));
    0
}

/// Does what the arguments say, and ends the process.
pub(crate) fn run(name: &str, target: fn(&mut Input<'_>)) {
    let arguments = std::env::var(ARGUMENTS).expect("resources/fuzz sets it");
    if let Some(directory) = std::env::var_os(SEEDS) {
        for (number, bytes) in corpus::inputs(name) {
            std::fs::write(Path::new(&directory).join(format!("line-{number}")), bytes).unwrap();
        }
    }
    TARGET.set(target).expect("one target runs");
    let words: Vec<_> = arguments.split(' ').map(|word| CString::new(word).unwrap()).collect();
    let mut pointers: Vec<_> = words.iter().map(|word| word.as_ptr().cast_mut()).collect();
    let mut count = pointers.len() as c_int;
    pointers.push(std::ptr::null_mut());
    let mut pointers = pointers.as_mut_ptr();
    // SAFETY: `pointers` are `count` C strings and a null pointer, as main gets them; `words` outlives the call.
    let status = unsafe { LLVMFuzzerRunDriver(&mut count, &mut pointers, play) };
    std::process::exit(status);
}
